"""The study of whole models' speed: what it compares, its arithmetic, what it leaves out.

No test asserts on a clock.
"""

import json
import math

import jax
import numpy as np
import pytest

from performer_vit import figures, flops, model_speed, timing, workdir
from performer_vit.errors import BadInput


@pytest.fixture
def tiny(monkeypatch):
    """Three contenders, 64 tokens in a batch, one call a turn."""
    monkeypatch.setattr(model_speed, 'PERFORMERS', ('relu',))
    monkeypatch.setattr(model_speed, 'CONTENDERS', ('exact', 'jax_exact', 'relu'))
    monkeypatch.setattr(model_speed, 'NUM_TOKENS', 64)
    monkeypatch.setattr(timing, 'PEAK_SIZE', 64)
    monkeypatch.setattr(timing, 'TURN_SECONDS', 0)
    monkeypatch.setattr(timing, 'PAUSE_SECONDS', 0)


def find(rows, **wanted):
    (row,) = (row for row in rows if all(row[name] == value for name, value in wanted.items()))
    return row


def test_figures_are_complete_and_follow_from_the_seconds(tiny, tiny_config, tmp_path):
    """Catches a contender or pass that is lost, the ViT over the Performer, and wrong rates.

    One round, so that every spread is one number.
    """
    said = []
    tiny_config.model.update(stem='conv', stem_blocks=1, pooling='conv')
    study = model_speed.study(
        tiny_config, lengths=[64, 16], rounds=1, quadratic_limit=16, on_progress=said.append
    )
    rounds = [message for message in said if 'round' in message]
    assert rounds == ['N = 16: round 1 of 1', 'N = 64: round 1 of 1'] and len(said) == 6 + 2
    order = [(row['length'], row['contender'], row['pass']) for row in study['rows']]
    assert order == [
        (length, name, which)
        for length in (16, 64)
        for name in ('exact', 'jax_exact', 'relu')
        for which in ('training', 'inference')
    ]
    peaks = {peak['length']: peak['median'] for peak in study['peak_gflop_per_second']}
    for which in ('training', 'inference'):
        relu, exact, jax_exact = (
            find(study['rows'], length=16, contender=name, **{'pass': which})
            for name in ('relu', 'exact', 'jax_exact')
        )
        assert (relu['batch_size'], relu['image_size'], relu['patch_size']) == (4, 32, 8)
        seconds = relu['seconds_per_image']['median']
        assert relu['images_per_second']['median'] == pytest.approx(1 / seconds)
        rate = relu['gflop_per_second']['median']
        assert rate == pytest.approx(relu['gflop_per_image'] / seconds)
        assert relu['fraction_of_peak']['median'] == pytest.approx(rate / peaks[16])
        for other in (exact, jax_exact):
            name = other['contender']
            assert relu['time_ratios'][name]['median'] == pytest.approx(
                seconds / other['seconds_per_image']['median']
            )
            assert relu['flop_ratios'][name] == pytest.approx(
                relu['gflop_per_image'] / other['gflop_per_image']
            )
            assert 'time_ratios' not in other and 'flop_ratios' not in other

        # At 64 tokens the Performer runs, the ViTs do not, and say so.
        relu, exact = (
            find(study['rows'], length=64, contender=name, **{'pass': which})
            for name in ('relu', 'exact')
        )
        assert (relu['batch_size'], relu['image_size'], relu['patch_size']) == (1, 32, 4)
        assert relu['time_ratios'] == {} and set(relu['flop_ratios']) == {'exact', 'jax_exact'}
        assert exact['not_run'] == 'longer than --quadratic_limit=16'
        assert 'seconds_per_image' not in exact and exact['gflop_per_image'] > 0
    assert [found['lengths'] for found in study['crossovers']] == [[16], [16]]
    config = study['settings']['config']
    assert config['model']['stem'] == 'patch' and config['model']['width'] == 16
    assert 'dataset' not in config and 'batch_size' not in config

    text = model_speed.table(study)
    assert text.count('not run: longer than --quadratic_limit=16') == 2 * 2
    assert 'training step\n' in text and "always the 'patch' stem" in text
    workdir.write_json(tmp_path / 'study.json', study)
    read = workdir.read_json(tmp_path / 'study.json')
    assert read == json.loads(json.dumps(study)) and model_speed.table(read) == text
    assert figures.to_array(figures.model_speed(read)).std() > 10


def test_what_does_not_fit_in_memory_is_left_out(tiny, tiny_config, monkeypatch):
    """Catches a run that the system kills after an hour, and a shortage that is not said."""
    monkeypatch.setattr(model_speed, '_free_bytes', lambda: 2**30)
    monkeypatch.setattr(model_speed, '_working_bytes', lambda compiled: 3 * 2**29)
    study = model_speed.study(tiny_config, lengths=[16], rounds=1)
    reasons = {row['not_run'] for row in study['rows']}
    assert reasons == {'it takes 1.5 GiB of memory, and 1.0 GiB are free'}
    assert {found['verdict'] for found in study['crossovers']} == {'unknown'}
    text = model_speed.table(study)
    assert 'not run: it takes 1.5 GiB' in text and 'exact did not run' in text


def test_shortage_leaves_some_memory_free(monkeypatch):
    """Catches a program that takes the last byte, and a system that does not say what is free."""
    monkeypatch.setattr(model_speed, '_free_bytes', lambda: 1000)
    assert model_speed._shortage(900) is None and model_speed._shortage(901)
    monkeypatch.setattr(model_speed, '_free_bytes', lambda: None)
    assert model_speed._shortage(2**60) is None
    monkeypatch.undo()
    assert 2**20 < model_speed._free_bytes() < 2**50


def test_working_memory_is_that_of_the_program(tiny, tiny_config):
    """Catches memory of weights alone: JAX's attention keeps N² numbers a head, ours does not."""
    found = {}
    for name in ('exact', 'jax_exact'):
        function, arguments = model_speed._functions(tiny_config, 1024, name)['training']
        mapped = jax.pmap(function, axis_name='batch', donate_argnums=0)
        found[name] = model_speed._working_bytes(mapped.lower(*arguments).compile())
    matrix = 4 * 2 * 1024**2
    assert matrix <= found['jax_exact'] < 10 * matrix
    assert found['exact'] < matrix


def test_both_vits_are_the_same_function(tiny, tiny_config):
    """Catches JAX's attention in another layout, or our attention timed under its name."""
    outputs, programs = {}, {}
    for name in model_speed.VITS:
        forward, arguments = model_speed._functions(tiny_config, 16, name)['inference']
        leaves, tree = jax.tree.flatten(arguments[0])
        keys = jax.random.split(jax.random.key(1), len(leaves))
        params = tree.unflatten(
            jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
        )
        arguments = (params, *arguments[1:])
        outputs[name] = np.asarray(jax.pmap(forward, axis_name='batch')(*arguments))
        programs[name] = str(jax.make_jaxpr(forward)(*jax.tree.map(lambda x: x[0], arguments)))
    assert outputs['exact'].shape == (1, 4, 10) and outputs['exact'].std() > 0.1
    np.testing.assert_allclose(outputs['jax_exact'], outputs['exact'], atol=1e-4)
    assert programs['exact'] != programs['jax_exact']


@pytest.mark.parametrize('name', ['exact', 'jax_exact', 'relu'])
def test_operations_are_those_of_the_products(tiny, tiny_config, name):
    """Catches a count of one block of many: at 1,024 tokens attention runs in loops over blocks.

    Multiply-adds of the forward pass by hand; XLA also counts what is element-wise, which at this
    width is up to half as much.
    """
    functions = model_speed._functions(tiny_config, 1024, name)
    tokens, width, mlp, heads, dim, features = 1024, 16, 32, 2, 8, 8
    macs = tokens * width * (3 + 4 * width + 2 * mlp)
    if name == 'relu':
        macs += tokens * heads * (2 * dim * features + 2 * features * (dim + 1))
    else:
        macs += 2 * heads * tokens**2 * dim
    for which, times in (('inference', 1), ('training', 3)):
        function, arguments = functions[which]
        assert 0.8 * 2 * times * macs < flops.count(function, *arguments) < 3 * times * macs


def test_training_goes_on_from_step_to_step_on_one_device(tiny, tiny_config):
    """Catches a step that is timed on the same state again, and a batch spread over devices."""
    function, (state, batch) = model_speed._functions(tiny_config, 16, 'relu')['training']
    assert batch['image'].shape == (1, 4, 32, 32, 3)
    assert batch['image'].devices() == set(jax.local_devices()[:1])
    seen = []

    def compiled(state, batch):
        seen.append(state)
        return state + 1, {}

    call = model_speed._call(compiled, 'training', (0, batch))
    call()
    call()
    assert seen == [0, 1]


# Lengths


@pytest.mark.parametrize(
    ('length', 'sizes'),
    [(16, (32, 8)), (64, (32, 4)), (256, (32, 2)), (1024, (32, 1)), (1600, (40, 1)),
     (4096, (64, 1))],
)  # fmt: skip
def test_images_have_as_many_patches_as_tokens(length, sizes):
    """Catches an image that grows where its patches could shrink, and a wrong grid."""
    assert model_speed.image_and_patch_size(length) == sizes
    size, patch_size = sizes
    assert math.prod((size // patch_size,) * 2) == length


@pytest.mark.parametrize('lengths', [[100], [64, 65], [0], [-4], [1089], [24**2]])
def test_lengths_that_make_no_grid_are_refused(tiny_config, lengths):
    """Catches a grid that is not square, and images of other sizes than were asked for."""
    with pytest.raises(BadInput, match=rf'lengths holds {lengths[-1]}; allowed are the squares'):
        model_speed.study(tiny_config, lengths=lengths, rounds=1)


@pytest.mark.parametrize('lengths', [[], [64, 64]])
def test_lengths_are_given_once(tiny_config, lengths):
    with pytest.raises(BadInput, match=r'lengths is \[.*each once'):
        model_speed.study(tiny_config, lengths=lengths, rounds=1)


@pytest.mark.parametrize(
    ('field', 'value', 'lengths', 'message'),
    [
        ('model.attention.projection', 'none', [64], "projection 'none'"),
        ('optimizer.learning_rate', -1.0, [64], 'learning_rate is -1.0'),
        ('augment.mixup', 0.2, [64, 4096], 'of 4096 tokens a batch has 1: set both to 0, or leave'),
    ],
)
def test_configs_are_refused_before_work(tiny_config, monkeypatch, field, value, lengths, message):
    """Catches a config that one contender or length cannot have, found after an hour."""
    monkeypatch.setattr(model_speed, '_programs', lambda *arguments: pytest.fail('too late'))
    tiny_config.update_from_flattened_dict({field: value})
    with pytest.raises(BadInput, match=message):
        model_speed.study(tiny_config, lengths=lengths, rounds=1)


@pytest.mark.parametrize(('length', 'batch'), [(64, 64), (1024, 4), (4096, 1), (16384, 1)])
def test_batches_have_the_same_number_of_tokens(length, batch):
    """Catches a batch that shrinks or grows the work from one length to the next."""
    assert model_speed.batch_size(length) == batch
