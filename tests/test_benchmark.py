"""The benchmarks' arithmetic and command line; no test asserts on a clock."""

import dataclasses
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver
from matplotlib.image import imread

from performer_vit import (
    approximation,
    attention_contenders,
    attention_speed,
    benchmark,
    command_line,
    exact_attention,
    favor,
    figures,
    flops,
    linear_attention,
    model_speed,
    timing,
    workdir,
)
from performer_vit.errors import BadInput
from tests.conftest import ROOT


@pytest.fixture
def run():
    """Runs the benchmark by its command line, within this process."""

    def run_command(*arguments: str) -> None:
        benchmark.main(command_line.parse(['benchmark', *arguments]))

    with flagsaver.flagsaver():
        yield run_command


@pytest.mark.parametrize('name', ['train_step', 'inference'])
def test_figures_agree_with_each_other(tiny_config, monkeypatch, name):
    """GFLOP/s = images/s × GFLOP an image, and the FLOPs are those of the matrix products.

    The forward pass by hand, in multiply-adds per image: the stem, three projections, two products
    of FAVOR+ with their features, the output, the MLP, the head; a training step is three times
    that. XLA also counts what is element-wise, and leaves out the gradients of the pixels: here,
    where the width is tiny, it may say from 0.8 times to twice as much.
    """
    monkeypatch.setattr(timing, 'PEAK_SIZE', 256)
    measured = getattr(benchmark, name)(tiny_config, 2)
    rate = measured['images_per_second']['median'] * measured['gflop_per_image']
    assert measured['gflop_per_second']['median'] == pytest.approx(rate, rel=1e-9)
    tokens, width, mlp, features, heads, dim = 16, 16, 32, 8, 2, 8
    macs = tokens * width * (8 * 8 * 3 + 4 * width + 2 * mlp)
    macs += tokens * heads * (2 * dim * features + 2 * features * (dim + 1)) + width * 10
    by_hand = 2e-9 * macs * (3 if name == 'train_step' else 1)
    assert 0.8 * by_hand < measured['gflop_per_image'] < 2.0 * by_hand
    assert measured['dataset'] == 'digits' and measured['num_tokens'] == 16
    text = benchmark.table(measured)
    assert 'of the peak' in text and 'images/s' in text
    assert ('whole loop' in text) == (name == 'train_step')


def test_a_training_that_diverges_has_no_figures(tiny_config, monkeypatch):
    """It stops at its bad step: catches the steps after it, which took no time, counted as fast."""
    monkeypatch.setattr(timing, 'PEAK_SIZE', 256)
    tiny_config.optimizer.update(
        name='sgd', learning_rate=1e3, weight_decay=1e3, clip_norm=0.0, warmup_epochs=0.0
    )
    with pytest.raises(FloatingPointError, match='are not finite'):
        benchmark.train_step(tiny_config, 4)


def test_the_twin_takes_turns_with_ours(tiny_config, monkeypatch):
    """Catches theirs over ours, a peer that is left out of the table, and a batch counted wrong."""
    torch_vit = pytest.importorskip('performer_vit.torch_vit')
    monkeypatch.setattr(timing, 'PEAK_SIZE', 256)
    tiny_config.optimizer.name = 'adamw'
    measured = benchmark.train_step(tiny_config, 1, peers=True)
    ours, theirs = (
        measured[name]['median'] for name in ('images_per_second', 'torch_images_per_second')
    )
    assert measured['bare_step_over_torch']['median'] == pytest.approx(ours / theirs)
    assert measured['included'] == torch_vit.INCLUDES and 'torch' in measured['versions']
    assert measured['torch_device'].startswith('cpu, ')
    text = benchmark.table(measured)
    assert f'{theirs:,.1f} images/s' in text and f'{ours / theirs:.2f} times the speed' in text


@pytest.mark.parametrize('kernel', ['relu', 'exact'])
def test_blocks_do_not_change_the_count(monkeypatch, kernel):
    """Catches a loop over blocks of attention whose body is counted once, however often it runs."""
    shape = (jax.local_device_count(), 4, 64, 2, 8)
    query = jnp.ones(shape)
    projection = None if kernel == 'exact' else jnp.ones((16, 8))

    def loss(x):
        output = favor.favor_attention(x, x, x, kernel=kernel, projection=projection)
        return jnp.sum(output**2)

    whole = flops.count(jax.grad(loss), query)
    monkeypatch.setattr(exact_attention, 'BLOCK_SIZE', 16)
    monkeypatch.setattr(linear_attention, 'BLOCK_FEATURES', {'cpu': 16 * 2 * 16})
    monkeypatch.setattr(linear_attention, 'BLOCK_FEATURES_ELSEWHERE', 16 * 2 * 16)
    in_blocks = jax.jit(jax.grad(loss)).lower(query[0]).cost_analysis()['flops']
    assert flops.count(jax.grad(loss), query) == whole
    assert in_blocks < 0.7 * whole / len(query)


def test_what_devices_repeat_counts_once():
    """Catches a count that grows with the devices: one product is of the batch, one is not."""
    weights, images = jnp.ones((4, 8, 8)), jnp.ones((4, 3, 8))

    def step(weights, images):
        return images @ weights, weights @ weights

    one = flops.count(step, weights[:1], images.reshape(1, 12, 8))
    assert one == pytest.approx(2 * (12 + 8) * 8 * 8, rel=0.01)
    assert flops.count(step, weights, images) == one


def test_the_cpu_counts_for_other_devices(monkeypatch):
    """Catches a count on the device that computes, where that is one whose XLA does not count."""
    local_devices = jax.local_devices

    def on_the_cpu(*, backend=None):
        if backend is None:
            raise NotImplementedError
        return local_devices(backend=backend)[2:]  # Not where the arrays are, as with a GPU.

    monkeypatch.setattr(jax, 'local_devices', on_the_cpu)
    eye = jnp.eye(8)
    assert flops.count(lambda x: x @ eye, jnp.ones((1, 4, 8))) == pytest.approx(512, rel=0.01)

    def without(*, backend):
        raise RuntimeError(f"Unknown backend: '{backend}' requested.")

    monkeypatch.setattr(jax, 'local_devices', without)
    with pytest.raises(BadInput, match='JAX_PLATFORMS=cuda,cpu'):
        flops.count(lambda x: x @ eye, jnp.ones((1, 4, 8)))


# The command line


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((), 'the benchmark is []; give one of train_step, inference, tokens, attention, approx'),
        (('speed',), "the benchmark is ['speed']"),
        (('attention', 'approximation'), "the benchmark is ['attention', 'approximation']"),
        (('train_step',), '--config is missing; an example is'),
        (('inference', '--rounds=2'), '--config is missing'),
        (('tokens', '--lengths=64'), '--config is missing'),
        (('tokens', '--peers'), '--peers is given, but tokens has no use for it'),
        (('tokens', '--num_features=64'), '--num_features is given, but tokens has no use for it'),
        (('inference', '--peers'), '--peers is given, but inference has no use for it'),
        (('attention', '--draws=3'), '--draws is given, but attention has no use for it'),
        (('approximation', '--rounds=3'), '--rounds is given, but approximation has no use'),
        (('approximation', '--nopeers'), '--peers is given, but approximation has no use'),
        (('train_step', '--lengths=64'), '--lengths is given, but train_step has no use'),
        (('attention', '--lengths=64,long'), '--lengths is 64,long; allowed are integers'),
        (('attention', '--num_features=0'), 'num_features is [0]; allowed are integers ≥ 1'),
        (('attention', '--lengths=64,64'), 'lengths is [64, 64]'),
        (('attention', '--rounds=0'), 'rounds'),
        (('attention', '--quadratic_limit=0'), 'quadratic_limit'),
        (('approximation', '--draws=1'), 'draws'),
        (
            ('attention', '--json=/nonexistent/a.json'),
            'the directory of --json=/nonexistent/a.json',
        ),
        (('attention', '--json=a.png'), '--json=a.png is the name of a figure'),
        (('attention', '--json=/proc'), '--json=/proc is a directory; give a file, such as /proc/'),
        (('attention', '--json=/proc/a.json'), 'nothing can be written beside --json=/proc/a.json'),
    ],
)
def test_flags_are_honoured_or_refused(run, capsys, arguments, message):
    """Catches a flag that is accepted and ignored: exit code 2 and one line that names it."""
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ''


@pytest.mark.parametrize('name', ['attention', 'approximation'])
def test_a_config_is_refused_where_there_is_no_model(name):
    """Catches --config read by a benchmark of attention alone, which would suggest it has effect.

    In a process of its own: a config once given leaves its fields behind as flags.
    """
    done = subprocess.run(
        [sys.executable, '-m', 'performer_vit.benchmark', name, '--config=configs/vit.py'],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert f'--config is given, but {name} has no use for it' in done.stderr


def test_attention_leaves_a_table_a_file_and_a_figure(run, monkeypatch, tmp_path, capsys):
    """Catches flags that do not reach the study, and figures that miss the saved numbers."""
    for module in (attention_contenders, attention_speed):
        monkeypatch.setattr(module, 'NUM_TOKENS', 32)
    monkeypatch.setattr(timing, 'PEAK_SIZE', 64)
    monkeypatch.setattr(timing, 'TURN_SECONDS', 0)
    run(
        'attention', '--lengths=16', '--num_features=4,6', '--causal', '--rounds=1',
        '--quadratic_limit=8', f'--json={tmp_path}/study.json',
    )  # fmt: skip
    study = workdir.read_json(tmp_path / 'study.json')
    settings = study['settings']
    assert settings['lengths'] == [16] and settings['num_features'] == [4, 6]
    assert settings['is_causal'] and settings['rounds'] == 1
    assert settings['quadratic_limit'] == 8
    captured = capsys.readouterr()
    assert captured.out == attention_speed.table(study) + '\n'
    assert 'jax_per_token' in captured.out and captured.out.startswith('Causal attention')
    assert 'round 1 of 1' in captured.err
    assert imread(tmp_path / 'study.png').shape[1] == 1600
    assert not flags.FLAGS['config'].present


def test_tokens_get_their_flags_and_draw_beside_the_file(monkeypatch, tmp_path, tiny_config):
    """Catches a flag that does not reach the study, and a figure that goes elsewhere."""
    asked, drawn = {}, []
    monkeypatch.setattr(
        model_speed, 'study', lambda config, **options: asked.update(options, config=config)
    )
    monkeypatch.setattr(benchmark, '_CONFIG', types.SimpleNamespace(value=tiny_config))
    with flagsaver.flagsaver(lengths=['16', '64'], rounds=2, quadratic_limit=16):
        benchmark.BENCHMARKS['tokens'].run()
    del asked['on_progress']
    assert asked == {
        'config': tiny_config, 'lengths': [16, 64], 'rounds': 2, 'quadratic_limit': 16,
    }  # fmt: skip
    monkeypatch.setattr(figures, 'model_speed', lambda values: f'figure of {values}')
    monkeypatch.setattr(figures, 'save', lambda *arguments, num_colours: drawn.append(arguments))
    benchmark.BENCHMARKS['tokens'].draw('values', tmp_path / 'tokens.json')
    assert drawn == [('figure of values', tmp_path / 'tokens.png')]


def test_approximation_gets_its_draws_and_draws_beside_the_file(run, monkeypatch, tmp_path, capsys):
    """Catches --draws that is dropped, and figures that go elsewhere."""
    drawn = []
    monkeypatch.setattr(
        approximation, 'study', lambda *, draws, on_progress: {'settings': {'draws': draws}}
    )
    monkeypatch.setattr(figures, 'approximation', lambda *arguments: drawn.append(arguments))
    tabled = dataclasses.replace(
        benchmark.BENCHMARKS['approximation'], table=lambda values: f'table of {values}'
    )
    monkeypatch.setitem(benchmark.BENCHMARKS, 'approximation', tabled)
    run('approximation', '--draws=3', f'--json={tmp_path}/errors.json')
    values = {'settings': {'draws': 3}}
    assert workdir.read_json(tmp_path / 'errors.json') == values
    assert drawn == [(values, tmp_path)]
    assert capsys.readouterr().out == f'table of {values}\n'
