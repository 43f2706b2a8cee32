"""The published tables say what the results say, and the README what the tables say."""

import copy
import pathlib

import pytest

from performer_vit import tables, workdir
from performer_vit.errors import BadInput

ROOT = pathlib.Path(__file__).parent.parent
ROW = {
    'dataset': 'cifar10', 'kernel': 'relu', 'seed': 0, 'epochs': 2, 'num_features': 64,
    'projection': 'orthogonal', 'num_params': 370634, 'num_tokens': 64, 'test_accuracy': 0.70125,
    'validation_accuracy': 0.7, 'train_seconds_per_epoch': 109.4, 'inference_seconds': 9.96,
    'images_per_second': 366.0, 'train_gflop_per_image': 0.5, 'device': '1 × cpu (made up)',
    'versions': {'jax': '0.10.2', 'git_commit': '0123456789'},
    'history': [
        {'seconds': 100.0, 'validation_accuracy': 0.5, 'validation_loss': 1.2},
        {'seconds': 110.0, 'validation_accuracy': 0.7, 'validation_loss': 0.9},
    ],
    'config': {'seed': 0, 'model': {'width': 64, 'attention': {'kernel': 'relu'}}},
}  # fmt: skip
ACCURACIES = {'exact': (0.80, 0.81, 0.79), 'relu': (0.82, 0.83, 0.812), 'gelu': (0.5, 0.9, 0.7)}


def write(directory, kernel='relu', seed=0, *, width=64, name=None, **fields):
    row = {**copy.deepcopy(ROW), 'kernel': kernel, 'seed': seed, **fields}
    row['config'].update(seed=seed)
    row['config']['model'].update(width=width)
    row['config']['model']['attention']['kernel'] = kernel
    workdir.write_json(directory / f'{name or f"{kernel}-{seed}"}.json', row)


@pytest.fixture
def compared(tmp_path):
    """A comparison of three kernels with three seeds each."""
    for kernel, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            write(tmp_path, kernel, seed, test_accuracy=accuracy)
    return tmp_path


def cells(line: str) -> list[str]:
    return line.strip('| ').split(' | ')


def test_comparison_says_mean_deviation_and_difference(compared):
    """Catches a population's deviation, a wrong sign, an unsupported claim, or a lost commit."""
    text = tables.comparison_table(compared)
    vit, relu, gelu = (cells(line) for line in text.splitlines()[2:5])
    assert vit[:6] == ['ViT', '3', '80.00 ± 1.00 %', '–', '–', '–']
    assert relu[:4] == ['Performer-ReLU', '3', '82.07 ± 0.90 %', '+2.07']
    assert gelu[:4] == ['Performer-GELU', '3', '70.00 ± 20.00 %', '-10.00']
    assert 'Performer-ReLU above the ViT' in text and 'Performer-GELU below' not in text
    assert 'commit 0123456.' in text and '1 × cpu (made up)' in text


def test_a_comparison_of_unlike_runs_is_refused(compared):
    write(compared, 'elu', 0, width=128)
    with pytest.raises(BadInput, match=r'model.width \(64 and 128\) differ'):
        tables.comparison_table(compared)


def test_study_beside_ours(compared):
    """Both differences are from the ViT of the same column."""
    lines = tables.study_table(compared).splitlines()[2:]
    vit, relu, _ = (cells(line) for line in lines)
    assert vit[1] == '84.79 %' and vit[-2:] == ['+0.00', '+0.00']
    assert relu[1] == '87.39 %' and relu[-2:] == ['+2.60', '+2.07']
    assert len(lines) == 3  # No row for a model that was not run here.


def test_ablations_are_named_by_what_changed(tmp_path):
    write(tmp_path, name='base')
    write(tmp_path, name='any-name', width=128, validation_accuracy=0.72)
    lines = tables.ablation_table(tmp_path).splitlines()[2:4]
    assert cells(lines[0])[:3] == ['nothing', '70.00%', '–']
    assert cells(lines[1])[:3] == ['`model.width` 128, not 64', '72.00%', '+2.00']
    write(tmp_path, name='copy')
    with pytest.raises(BadInput, match='copy.json has the config of base.json'):
        tables.ablation_table(tmp_path)


def test_runs_say_their_minutes_and_their_machines(tmp_path):
    """Catches one machine's minutes under another's name."""
    write(tmp_path, name='one', history=[{'seconds': 300.0, 'validation_accuracy': None}] * 3)
    write(tmp_path, 'exact', name='other', device='2 × GPU (made up)')
    vit, relu = (cells(line) for line in tables.runs_table(tmp_path).splitlines()[2:4])
    assert relu[:5] == ['`one`', 'Performer-ReLU', '70.12%', '15', '2']
    assert relu[-1] == '1 × cpu (made up)'
    assert vit[:4] == ['`other`', 'ViT', '70.12%', '4'] and vit[-1] == '2 × GPU (made up)'
    readme = tmp_path / 'README.md'
    readme.write_text('<!-- begin runs . -->\n<!-- end -->\n')
    tables.main(['tables', str(readme)])
    assert all((tmp_path / f'{name}.png').stat().st_size > 5000 for name in ('one', 'other'))


def test_folds_of_a_cross_validation_and_their_interval(tmp_path):
    """Catches a mean without its deviation, and an interval of other folds."""
    common = {'validation_loss': 0.5, 'epochs': 2, 'train_seconds_per_epoch': 100.0}
    results = {
        **{field: ROW[field] for field in ('dataset', 'kernel', 'device', 'versions')},
        'epochs': 2,
        'num_folds': 2,
        'validation_accuracy': 0.81,
        'validation_accuracy_deviation': 0.0141,
        'validation_accuracy_low': 0.7,
        'validation_accuracy_high': 0.92,
        'folds': [
            {'validation_accuracy': accuracy, **common, 'history': ROW['history']}
            for accuracy in (0.8, 0.82)
        ],
    }
    path = tmp_path / 'relu.json'
    workdir.write_json(path, results)
    text = tables.crossval_table(path)
    assert [cells(line)[:2] for line in text.splitlines()[2:5]] == [
        ['0', '80.00 %'], ['1', '82.00 %'], ['mean', '81.00 ± 1.41 %'],
    ]  # fmt: skip
    assert '| 95 % interval of the mean | 70.00 to 92.00 % |' in text
    assert text.endswith('commit 0123456.')
    readme = tmp_path / 'README.md'
    readme.write_text('<!-- begin crossval relu.json -->\n<!-- end -->\n')
    tables.main(['tables', str(readme)])
    assert text in readme.read_text() and (tmp_path / 'relu.png').stat().st_size > 5000


def test_trials_of_a_sweep(tmp_path):
    """Catches a value under the wrong field, and a machine that is not named."""
    common = {'epochs': 2, 'seconds': 90.0, 'message': None}
    origin = {field: ROW[field] for field in ('device', 'versions')}
    fields = 'model.width', 'optimizer.learning_rate'
    results = {
        'space': [[field, 'choice', []] for field in fields],
        'trials': [
            {
                'number': number,
                'state': state,
                'value': value,
                'params': dict(zip(fields, (width, 0.01), strict=True)),
                **common,
                **origin,
            }
            for number, state, value, width in ((1, 'complete', 0.8, 64), (0, 'pruned', 0.5, 32))
        ],
    }
    workdir.write_json(tmp_path / 'sweep.json', results)
    text = tables.sweep_table(tmp_path / 'sweep.json')
    assert cells(text.splitlines()[2]) == ['1', '80.00 %', 'complete', '2', '1.5', '64', '0.01']
    assert cells(text.splitlines()[3])[:3] == ['0', '50.00 %', 'pruned']
    assert text.endswith('Measured on 1 × cpu (made up), JAX 0.10.2, commit 0123456.')


def spread(value):
    return {'median': value, 'low': value, 'high': value}


def test_tokens_say_times_and_speeds(tmp_path):
    """Catches a ratio upside down or of another ViT, and a model that did not run."""
    common = {'length': 64, 'pass': 'training'}
    study = {
        'settings': {
            'lengths': [64],
            'config': {'model': {'width': 8, 'depth': 1, 'num_heads': 2}},
        },
        'device': '1 × cpu (made up)',
        'versions': ROW['versions'],
        'rows': [
            {**common, 'contender': 'exact', 'seconds_per_image': spread(0.2)},
            {**common, 'contender': 'jax_exact', 'not_run': 'too long'},
            {
                **common,
                'contender': 'relu',
                'seconds_per_image': spread(0.1),
                'time_ratios': {'exact': spread(0.5)},
                'flop_ratios': {'exact': 0.8, 'jax_exact': 0.4},
            },
        ],
    }
    path = tmp_path / 'tokens.json'
    workdir.write_json(path, study)
    text = tables.tokens_table(path)
    times, own, jax_nn = (part.splitlines() for part in text.split('\n\n')[1:7:2])
    assert cells(times[0]) == ['model', 'training, 64 tokens']
    assert [cells(line)[1] for line in times[2:]] == ['200.0', 'not run', '100.0']
    assert [cells(line) for line in own[2:]] == [['Performer-ReLU', '2.00 (1.25)']]
    assert [cells(line) for line in jax_nn[2:]] == [['Performer-ReLU', 'not run (2.50)']]
    assert 'ViT, attention of jax.nn' in text and text.endswith('commit 0123456.')
    readme = tmp_path / 'README.md'
    readme.write_text('<!-- begin tokens tokens.json -->\n<!-- end -->\n')
    tables.main(['tables', str(readme)])
    assert text in readme.read_text()
    assert not (tmp_path / 'tokens.png').exists()  # One length makes no curve.
    study['settings']['lengths'].append(256)
    study['rows'] += [{**row, 'length': 256} for row in study['rows']]
    workdir.write_json(path, study)
    tables.main(['tables', str(readme)])
    assert (tmp_path / 'tokens.png').stat().st_size > 5000


def test_train_steps_with_and_without_peers(tmp_path):
    """Catches a peer's figure in another config's row, and shares that are no percentages."""
    row = {
        'num_params': 1234, 'gflop_per_image': 0.5, 'images_per_second': spread(100.0),
        'gflop_per_second': spread(50.0), 'fraction_of_peak': spread(0.625),
        'loop_images_per_second': spread(95.0), 'device': ROW['device'],
        'versions': ROW['versions'],
    }  # fmt: skip
    peers = {'torch_images_per_second': spread(80.0), 'bare_step_over_torch': spread(1.25)}
    workdir.write_json(tmp_path / 'vit.json', {**row, **peers})
    workdir.write_json(tmp_path / 'relu.json', row)
    relu, vit = (cells(line) for line in tables.train_step_table(tmp_path).splitlines()[2:4])
    assert relu[:6] == ['`relu`', '1,234', '0.500', '100.0 (100.0 to 100.0)', '50', '62%']
    assert relu[7:] == ['–', '–']
    assert vit[7:] == ['80.0 (80.0 to 80.0)', '1.25 (1.25 to 1.25)']


def test_main_rewrites_what_is_generated_and_nothing_else(compared, capsys):
    text = 'before\n<!-- begin comparison . -->\nold\n<!-- end -->\nafter\n'
    readme = compared / 'README.md'
    readme.write_text(text)
    tables.main(['tables', str(readme)])
    made = readme.read_text()
    assert made.startswith('before\n<!-- begin comparison . -->\n| model')
    assert made.endswith('<!-- end -->\nafter\n') and 'old' not in made
    assert (compared / 'comparison.png').stat().st_size > 5000
    assert (compared / 'learning_curves.png').stat().st_size > 5000
    assert tables.rewrite(made, compared) == made


def test_an_unknown_kind_is_refused_before_anything_is_drawn(tmp_path):
    readme = tmp_path / 'README.md'
    readme.write_text('<!-- begin poem results -->\n<!-- end -->\n')
    with pytest.raises(SystemExit, match="the kind of a generated table is 'poem'; allowed are"):
        tables.main(['tables', str(readme)])


def test_the_readme_is_as_generated():
    """Catches a README whose tables were edited by hand, or that is older than the results."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert tables.rewrite(text, ROOT) == text


def test_an_empty_directory(tmp_path):
    with pytest.raises(BadInput, match=r'holds no \*.json'):
        tables.read(tmp_path)
