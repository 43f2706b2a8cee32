"""Comparisons and ablations: every variant with every seed once, and never two configs mixed."""

import csv
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from performer_vit import comparison, datasets, memory, progress, train, variants, workdir
from performer_vit.errors import BadInput
from tests.conftest import load_config

CHANGES = (
    ('exact', {'model.attention.kernel': 'exact'}),
    ('relu', {}),
    ('wide relu', {'model.width': 32}),
)


def with_section(config, name, **fields):
    config[name] = ConfigDict(fields)
    return config


def compare_config(config, seeds=(0, 1), baseline='exact', changes=CHANGES):
    return with_section(config, 'compare', seeds=seeds, baseline=baseline, variants=changes)


def fake_results(config, accuracy):
    """What `train.train` returns, of a run that takes no time."""
    history = [
        {'epoch': epoch, 'validation_accuracy': accuracy, 'validation_loss': 1.0, 'seconds': 60.0}
        for epoch in (1, 2)
    ]
    return {
        'config': config.to_dict(), 'dataset': 'digits', 'kernel': config.model.attention.kernel,
        'seed': config.seed, 'num_features': 8, 'projection': 'orthogonal', 'num_params': 1000,
        'train_seconds_per_epoch': 60.0, 'images_per_second': 100.0 + config.model.width,
        'inference_seconds': 1.0, 'train_gflop_per_image': 0.5, 'test_accuracy': accuracy,
        'validation_accuracy': accuracy, 'history': history, 'device': 'cpu (made up)',
    }  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    """Replaces training; returns what was trained, in turn."""
    calls = []

    def train_one(config, directory):
        calls.append((config, directory))
        accuracy = 0.5 + 0.01 * config.seed
        if config.model.width == 32:
            accuracy += 0.1 + 0.002 * config.seed
        return fake_results(config, accuracy)

    monkeypatch.setattr(train, 'train', train_one)
    monkeypatch.setattr(
        train, 'validate', lambda config, dataset, directory: train_one(config, directory)
    )
    return calls


def test_each_variant_runs_with_each_seed_in_a_directory_of_its_own(tiny_config, tmp_path, trained):
    """Catches a field that stays changed for the next variant, and a section that trains along."""
    results = variants.compare(compare_config(tiny_config), tmp_path)
    described = [
        (config.model.attention.kernel, config.model.width, config.seed) for config, _ in trained
    ]
    assert described == [
        (kernel, width, seed)
        for seed in (0, 1)
        for kernel, width in (('exact', 16), ('relu', 16), ('relu', 32))
    ]
    assert len({str(directory) for _, directory in trained}) == 6
    assert trained[2][1] == tmp_path / 'wide_relu' / 'seed_0'
    assert all('compare' not in config for config, _ in trained)
    assert [row['model'] for row in results['models']] == ['exact', 'relu', 'wide relu']
    wide = results['models'][2]
    np.testing.assert_allclose(wide['test_accuracy'], 0.606)
    np.testing.assert_allclose(wide['difference'], 0.101)
    assert workdir.read_json(tmp_path / 'results.json')['models'] == results['models']
    with open(tmp_path / 'table.csv', encoding='utf-8', newline='') as file:
        assert float(list(csv.DictReader(file))[2]['test_accuracy']) == wide['test_accuracy']
    assert r'60.60 ± 0.85 \%' in (tmp_path / 'table.tex').read_text()
    markdown = (tmp_path / 'table.md').read_text()
    assert '| ViT | 2 |' in markdown and 'wide relu above the ViT' in markdown
    for name in ('comparison', 'learning_curves', 'pareto', 'accuracy'):
        assert (tmp_path / 'figures' / f'{name}.png').stat().st_size > 10_000


def test_time_left_is_that_of_the_runs_that_were_not_finished(
    tiny_config, tmp_path, trained, monkeypatch, capfd
):
    """Four of six runs were done earlier, two take ten minutes each by a clock of our own.

    Catches finished runs counted as quick ones: 'about 2 min left' before the last.
    """
    config = compare_config(tiny_config)
    for seed, variant in ((0, 'exact'), (0, 'relu'), (0, 'wide relu'), (1, 'relu')):
        directory = tmp_path / workdir.directory_name(variant) / f'seed_{seed}'
        directory.mkdir(parents=True)
        workdir.write_json(directory / 'results.json', {})
    monkeypatch.setattr(variants.run_directory, 'check_same', lambda *_: None)
    clock, train_one = [0.0], train.train

    def takes_time(config, directory):
        clock[0] += 0 if workdir.is_finished(directory) else 600
        return train_one(config, directory)

    monkeypatch.setattr(train, 'train', takes_time)
    monkeypatch.setattr(progress.time, 'perf_counter', lambda: clock[0])
    variants.compare(config, tmp_path)
    said = [line for line in capfd.readouterr().out.splitlines() if ' of 6: ' in line]
    assert said == [
        '[digits] Run 1 of 6: exact, seed 0',
        '[digits] Run 2 of 6: relu, seed 0',
        '[digits] Run 3 of 6: wide relu, seed 0',
        '[digits] Run 4 of 6: exact, seed 1',
        '[digits] Run 5 of 6: relu, seed 1, about 10 min left',
        '[digits] Run 6 of 6: wide relu, seed 1, about 10 min left',
    ]


def test_ablation_changes_one_factor_and_never_tests(tiny_config, tmp_path, trained, monkeypatch):
    """Catches changes that pile up, and the test split read for a choice."""
    monkeypatch.setattr(train, 'train', lambda *_: pytest.fail('reads the test split'))
    changes = ({'model.width': 32}, {'model.depth': 2, 'model.pooling': 'map'})
    config = with_section(tiny_config, 'ablate', seeds=(3,), changes=changes)
    results = variants.ablate(config, tmp_path)
    described = [
        (config.model.width, config.model.depth, config.model.pooling, config.seed)
        for config, _ in trained
    ]
    assert described == [(16, 1, 'gap', 3), (32, 1, 'gap', 3), (16, 2, 'map', 3)]
    assert [row['model'] for row in results['models']] == [
        'base',
        'width=32',
        'depth=2,pooling=map',
    ]
    # One seed: a difference without an interval is still a difference.
    assert results['quantity'] == 'validation_accuracy'
    table = (tmp_path / 'table.md').read_text()
    assert 'test' not in table


@pytest.mark.parametrize(
    ('error', 'message'),
    [
        (FloatingPointError('the loss of step 7 is not finite'), 'the loss of step 7 is not'),
        (memory.TooLargeError('the train state needs 90 GiB'), 'the train state needs 90 GiB'),
        (MemoryError(), 'more memory needed than there is'),
        (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out'), 'than there is: .*EXHAUSTED'),
    ],
)
def test_a_run_that_fails_is_named_and_counts_nowhere(
    tiny_config, tmp_path, monkeypatch, error, message
):
    """Catches one variant, diverged or too large, that ends the runs of all others."""

    def train_one(config, directory):
        if config.model.width == 32 and config.seed == 0:
            raise error
        return fake_results(config, 0.5)

    monkeypatch.setattr(train, 'train', train_one)
    results = variants.compare(compare_config(tiny_config), tmp_path)
    assert [row['runs'] for row in results['models']] == [2, 2, 1]
    (failed,) = results['failed']
    assert (failed['variant'], failed['seed']) == ('wide relu', 0)
    assert re.search(message, failed['error'])
    assert 'wide relu, seed 0, failed' in (tmp_path / 'table.md').read_text()


def test_what_is_nobodys_fault_ends_a_comparison(tiny_config, tmp_path, monkeypatch):
    """Catches a full disk written down as a variant that fails, and a table without any run."""

    def train_one(config, directory):
        raise error

    monkeypatch.setattr(train, 'train', train_one)
    for error in (OSError('no space left'), jax.errors.JaxRuntimeError('INTERNAL: x')):
        with pytest.raises(type(error), match='no space|INTERNAL'):
            variants.compare(compare_config(tiny_config), tmp_path)
    error = FloatingPointError('not finite')
    with pytest.raises(BadInput, match='compare: every run failed; the first: not finite'):
        variants.compare(compare_config(tiny_config), tmp_path)
    assert not (tmp_path / 'results.json').exists()


def test_names_that_are_hard_to_draw_and_to_store(tiny_config, tmp_path, trained):
    """Catches mathematics made of $, of which half is an error once all runs are trained.

    And a name longer than a file's may be, and one that a table takes for two cells.
    """
    names = ('a$b_$', 'λ|μ', 'x' * 300, 'relu')
    changes = [(name, {'num_epochs': 2 + place}) for place, name in enumerate(names)]
    config = compare_config(tiny_config, baseline='relu', changes=tuple(changes))
    results = variants.compare(config, tmp_path)
    assert [row['model'] for row in results['models']] == list(names)
    assert len({directory.parent for _, directory in trained}) == 4
    assert all(len(directory.parent.name) <= 200 for _, directory in trained)
    rows = (tmp_path / 'table.md').read_text().splitlines()[:6]
    assert len({row.replace(r'\|', '').count('|') for row in rows}) == 1


@pytest.mark.parametrize(
    ('section', 'fields', 'message'),
    [
        ('compare', {'baseline': 'vit'}, "compare.baseline is 'vit'"),
        ('compare', {'seeds': ()}, r'compare\.seeds is \(\)'),
        ('compare', {'seeds': (1, 1)}, r'compare\.seeds is \(1, 1\)'),
        ('compare', {'seeds': (0, 'x')}, r"compare\.seeds is \(0, 'x'\)"),
        ('compare', {'seeds': 3}, r'compare\.seeds is 3; it is a tuple'),
        ('compare', {'seeds': ((1,), (2,))}, r'compare\.seeds is \(\(1,\), \(2,\)\); give one'),
        ('ablate', {'changes': None}, r'ablate\.changes is None; it is a tuple'),
        ('compare', {'variants': (('exact', {}), ('..', {'num_epochs': 3}))}, 'no place for'),
        ('compare', {'variants': (('exact', {}), ('figures', {'num_epochs': 3}))}, 'no place for'),
        (
            'compare',
            {'variants': (('exact', {}), ('Exact', {'num_epochs': 3}))},
            "'exact' and 'Exact' would be one directory",
        ),
        ('compare', {'seeds': (0, -1)}, "variant 'exact': seed is -1"),
        ('compare', {'reference': 'x'}, 'needs just these: variants, seeds, baseline'),
        ('compare', {'variants': ('exact', 'relu')}, "has the row 'exact'"),
        ('compare', {'variants': (('exact', 3), ('relu', {}))}, r"has the row \('exact', 3\)"),
        ('compare', {'variants': (('exact', {}), ('b', {'seed': 1}))}, 'changes the seed'),
        ('ablate', {'changes': ('model.width',)}, "has 'model.width'; a change is a mapping"),
        ('compare', {'variants': (('exact', {}),)}, 'compare.variants has less than two'),
        ('compare', {'variants': (('exact', {}), ('exact', {}))}, 'twice'),
        ('compare', {'variants': (('exact', {}), ('relu', {}))}, 'the same config'),
        (
            'compare',
            {'variants': (('exact', {}), ('a b', {'num_epochs': 3}), ('a_b', {'num_epochs': 1}))},
            'one directory',
        ),
        ('compare', {'variants': (('exact', {'model.widht': 8}), ('b', {}))}, "'model.widht'"),
        ('compare', {'variants': (('exact', {'model.width': 'x'}), ('b', {}))}, 'of type int'),
        ('compare', {'variants': (('exact', {'model': 3}), ('b', {}))}, "changes 'model'"),
        (
            'compare',
            {'variants': (('exact', {}), ('b', {'model.attention.kernel': 'tanh'}))},
            "variant 'b'.*tanh",
        ),
        ('ablate', {'changes': ()}, 'ablate.changes is empty'),
        (
            'ablate',
            {'changes': ({'batch_size': 1200},)},
            "variant 'batch_size=1200'.*images to train",
        ),
        (
            'compare',
            {'variants': (('exact', {}), ('b', {'max_skipped_steps': 50}))},
            "variant 'b': max_skipped_steps is 50 and an epoch has 8 steps",
        ),
        (
            'compare',
            {'variants': (('exact', {}), ('b', {'flip_averaging': True}))},
            "changes 'flip_averaging', which changes nothing of the test_accuracy",
        ),
        (
            'ablate',
            {'changes': ({'test_state': 'last'},)},
            "changes 'test_state', which changes nothing of the validation_accuracy",
        ),
        (
            'ablate',
            {'changes': ({'dataset.split_seed': 1},)},
            "changes 'dataset.split_seed', but all variants must be scored on the same images",
        ),
        (
            'compare',
            {'variants': (('exact', {}), ('b', {'dataset.name': 'cifar10'}))},
            "changes 'dataset.name', but all variants must be scored on the same images",
        ),
        ('ablate', {'changes': ({'model.width': 32}, {'model.width': 32})}, 'width=32 twice'),
        ('ablate', {'changes': ({'early_stopping_patience': 1},)}, 'early_stopping_patience is 1'),
    ],
)
def test_mistakes_end_before_anything_is_trained(
    tiny_config, tmp_path, trained, section, fields, message
):
    given = {
        'compare': {'seeds': (0,), 'baseline': 'exact', 'variants': CHANGES},
        'ablate': {'seeds': (0,), 'changes': ({'model.width': 32},)},
    }[section]
    config = with_section(tiny_config, section, **{**given, **fields})
    with pytest.raises(BadInput, match=message):
        getattr(variants, section)(config, tmp_path / 'run')
    assert not trained and not (tmp_path / 'run').exists()


def test_another_run_in_the_place_of_a_later_one(tiny_config, tmp_path, trained):
    """Catches hours of training before the last run is found to be another one's."""
    theirs = tiny_config.copy_and_resolve_references()
    theirs.update(num_epochs=9, seed=1)
    theirs.dataset.fallback = 'none'
    directory = tmp_path / 'relu' / 'seed_1'
    data = datasets.fingerprints(datasets.load(**theirs.dataset))
    workdir.claim(directory, workdir.definition(theirs.to_dict(), data))
    with pytest.raises(BadInput, match=rf'{directory} holds a run .*\n  .*num_epochs: 9 there, 2'):
        variants.compare(compare_config(tiny_config), tmp_path)
    assert not trained


def test_a_later_run_that_was_tested_on_other_images(tiny_config, tmp_path, trained):
    """Catches hours of training before results of other images are found among those to compare."""
    directory = tmp_path / 'relu' / 'seed_1'
    directory.mkdir(parents=True)
    workdir.write_json(directory / 'results.json', {'evaluation_images': '9, of digest a'})
    with pytest.raises(BadInput, match=rf'{directory} was tested again, on 9, of digest a'):
        variants.compare(compare_config(tiny_config), tmp_path)
    assert not trained


def test_other_images_in_the_place_of_those_of_a_run(tiny_config, tmp_path, trained):
    """Catches a table of two folders' images."""
    theirs = tiny_config.copy_and_resolve_references()
    theirs.update(seed=1)
    theirs.dataset.fallback = 'none'
    data = datasets.fingerprints(datasets.load(**theirs.dataset))
    data['test images'] = '360, of digest 0123456789abcdef'
    workdir.claim(tmp_path / 'relu' / 'seed_1', workdir.definition(theirs.to_dict(), data))
    with pytest.raises(BadInput, match=r'data_read\.test images: .*0123456789abcdef. there'):
        variants.compare(compare_config(tiny_config), tmp_path)
    assert not trained


@pytest.mark.slow
def test_three_kernels_with_two_seeds_on_the_digits(tiny_config, tmp_path, monkeypatch):
    """For real, twice: the second time nothing is trained, and a changed config is refused."""
    kernels = ('exact', 'relu', 'ftheta')
    changes = tuple((kernel, {'model.attention.kernel': kernel}) for kernel in kernels)
    config = compare_config(tiny_config, changes=changes)
    results = variants.compare(config, tmp_path)
    assert {(run['variant'], run['seed']) for run in results['runs']} == {
        (kernel, seed) for kernel in kernels for seed in (0, 1)
    }
    monkeypatch.setattr(train, 'compile_step', lambda *_: pytest.fail('trains again'))
    assert variants.compare(config, tmp_path) == results
    config.num_epochs = 1
    with pytest.raises(BadInput, match='num_epochs: 2 there, 1 here'):
        variants.compare(config, tmp_path)


@pytest.mark.slow
def test_an_ablation_on_the_digits(tiny_config, tmp_path):
    changes = ({'model.attention.kernel': 'none'}, {'model.attention.num_features': 4})
    config = with_section(tiny_config, 'ablate', seeds=(0,), changes=changes)
    results = variants.ablate(config, tmp_path)
    assert [row['model'] for row in results['models']] == ['base', 'kernel=none', 'num_features=4']
    assert all('test_accuracy' not in run for run in results['runs'])
    by_name = comparison.by_seed(results['runs'], 'variant')
    expected = (
        by_name['kernel=none'][0]['validation_accuracy'] - by_name['base'][0]['validation_accuracy']
    )
    np.testing.assert_allclose(results['models'][1]['difference'], expected)


@pytest.mark.parametrize(
    ('name', 'section'),
    [
        ('comparisons/kernels', 'compare'),
        ('ablations/performer_relu', 'ablate'),
        ('ablations/performer_ftheta', 'ablate'),
    ],
)
def test_shipped_configs_pass_every_check(name, section, trained, tmp_path):
    """Catches a field that was renamed: all variants of each file get as far as training."""
    config = load_config(name, 'digits,small')
    results = getattr(variants, section)(config, tmp_path)
    listed = config.compare.variants if section == 'compare' else ('base', *config.ablate.changes)
    assert len(results['models']) == len(listed)
    assert len(trained) == len(listed) * len(config[section].seeds)
