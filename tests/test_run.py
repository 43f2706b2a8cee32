"""The command line as a user types it, and a run that is killed."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from performer_vit import checkpoints, datasets, train, workdir
from performer_vit.errors import BadInput
from tests.conftest import ROOT, load_config

SMALL = (
    '--config=configs/performer_relu.py:digits',
    '--config.num_epochs=4',
    '--config.batch_size=64',
    '--config.dataset.validation_fraction=0.2',
    '--config.log_every_steps=2',
    '--config.model.stem=patch',
    '--config.model.patch_size=8',
    '--config.model.width=16',
    '--config.model.depth=1',
    '--config.model.num_heads=2',
    '--config.model.mlp_dim=32',
    '--config.model.attention.num_features=8',
    '--config.model.attention.redraw_every=5',
)


def environment() -> dict[str, str]:
    """As a user has it, with no devices forced upon it and no prepared data."""
    kept = {name: value for name, value in os.environ.items() if name != 'TFDS_DATA_DIR'}
    return {**kept, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, 'run.py', *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip


@pytest.mark.parametrize(
    'arguments, message',
    [
        ((), '--config is missing; an example is --config=configs/performer_relu.py'),
        (('--config=configs/nope.py',), 'configs/nope.py'),
        (('--config=configs/vit.py:mnist',), "the config argument is 'mnist'"),
        (('--config=configs/vit.py', '--config.num_epoch=3'), 'num_epochs'),
        (('--config=configs/vit.py', '--config.num_epochs=three'), 'three'),
        (('--config=configs/vit.py', '--mode=fly'), '<train|evaluate|inspect|crossval|compare|'),
        (('--config=configs/vit.py', '--mode=compare'), 'needs a config with a section `compare`'),
        (('--config=configs/comparisons/kernels.py',), 'is for --mode=compare alone'),
        (('--mode=inspect',), 'needs the --workdir=DIR'),
        (('--config=configs/vit.py', 'train'), "unknown arguments ['train']"),
        (('--mode=evaluate',), 'needs the --workdir=DIR'),
        (('--config=configs/vit.py:digits', '--config.num_epochs=0'), 'num_epochs is 0'),
        (
            ('--config=configs/vit.py:digits', '--config.model.stem_channels=(32,64)'),
            'model.stem_channels is (32, 64)',
        ),
        (('--mode=evaluate', '--workdir=/nonexistent'), 'config.json does not exist'),
    ],
)
def test_mistakes_get_an_error_without_a_traceback(arguments, message):
    """Exit code 2, the reason on stderr, and no Python in the user's face."""
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.slow
def test_kill_9_at_three_moments_changes_nothing(tmp_path):
    """The same command after each kill ends in the bits of a run that was never stopped.

    The moments are random; what must hold does not depend on them. Catches state that lives
    outside the checkpoint, a half-written checkpoint that is read, and an order of images that
    starts anew.
    """
    done = run(*SMALL, f'--workdir={tmp_path}/whole')
    assert done.returncode == 0, done.stderr
    assert all(line.startswith('[digits]') for line in done.stdout.splitlines())
    whole = workdir.read_history(tmp_path / 'whole' / 'history.csv')
    moments = random.Random(0)
    command = [sys.executable, 'run.py', *SMALL, f'--workdir={tmp_path}/killed']
    for _ in range(3):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        # From the first line about an epoch on: before it there is nothing to lose.
        for line in process.stdout:
            if 'Epoch' in line:
                break
        time.sleep(moments.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run(*SMALL, f'--workdir={tmp_path}/killed')
    assert done.returncode == 0, done.stderr

    config = load_config('performer_relu', 'digits')
    config.update_from_flattened_dict({
        name.removeprefix('--config.'): _parse(value)
        for name, value in (flag.split('=') for flag in SMALL[1:])
    })  # fmt: skip
    template = train.prepare(config, datasets.load('digits')).state
    states = []
    for name in ('whole', 'killed'):
        manager = checkpoints.Checkpoints(tmp_path / name / 'checkpoints', 2, 1)
        saved = manager.restore(template, manager.steps()[-1])
        states.append(jax.tree.map(np.asarray, saved.state))
        manager.close()
    assert int(states[0].step) == 4 * (1149 // 64)
    jax.tree.map(np.testing.assert_array_equal, *states)
    results = [workdir.read_json(tmp_path / name / 'results.json') for name in ('whole', 'killed')]
    for field in ('tested_epoch', 'test_loss', 'test_accuracy', 'validation_accuracy'):
        assert results[0][field] == results[1][field]
    history = workdir.read_history(tmp_path / 'killed' / 'history.csv')
    for row, other in zip(history, whole, strict=True):
        assert {**row, 'seconds': 0} == {**other, 'seconds': 0}


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_saves_and_says_so(tmp_path, number):
    """Exit code 75, and a line that says what was saved; the same command goes on from there.

    Meanwhile another process on the workdir is refused. Catches a code that scripts take for a
    failure, a traceback, and two processes that write the same files.
    """
    # So many epochs that none of this is over before the signal comes.
    long = [*SMALL, '--config.num_epochs=100000', f'--workdir={tmp_path}/run']
    process = subprocess.Popen(
        [sys.executable, 'run.py', *long], cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if 'Epoch 1/' in line:
            break
    with pytest.raises(BadInput, match='another process trains in the workdir'):
        with workdir.alone(tmp_path / 'run'):
            pass
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert 'Traceback' not in errors
    (step,) = re.findall(r'Asked to stop, this run has saved step ([\d,]+)\. The same', errors)
    saved = sorted(int(path.name) for path in (tmp_path / 'run' / 'checkpoints').glob('[0-9]*'))
    assert saved[-1] == int(step.replace(',', ''))


@pytest.mark.slow
def test_without_data_the_default_command_trains_on_digits_and_says_so(tmp_path):
    """Notice first; `digits` in the path, the lines and the results; then `--mode=evaluate`.

    The ViT without a moving average: also the one with neither projections nor averages to save.
    """
    # No proxy listens there: the download fails at once, with a network or without.
    nowhere = {name: 'http://127.0.0.1:9' for name in ('HTTPS_PROXY', 'https_proxy')}
    kept = {**environment(), **nowhere, 'HOME': str(tmp_path)}

    def command(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(ROOT / 'run.py'), *arguments],
            cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=900,
        )  # fmt: skip

    small = [flag for flag in SMALL[1:] if 'attention' not in flag and 'num_epochs' not in flag]
    flags = ['--config.num_epochs=1', '--config.ema_decay=0.0']
    done = command(f'--config={ROOT}/configs/vit.py', *flags, *small)
    assert done.returncode == 0, done.stderr
    assert 'oneDNN' not in done.stderr  # Of TensorFlow's log, which is no business of the user's.
    assert done.stderr.index('NOTICE') < done.stderr.index('img/s')
    assert 'cifar10' in done.stderr and 'TFDS_DATA_DIR' in done.stderr
    assert all(line.startswith('[digits]') for line in done.stdout.splitlines())
    (results,) = (tmp_path / 'runs' / 'digits').glob('vit-*num_epochs=1*/results.json')
    before = workdir.read_json(results)
    assert before['dataset'] == 'digits' and before['num_features'] is None
    done = command('--mode=evaluate', f'--workdir={results.parent}')
    assert done.returncode == 0, done.stderr
    assert workdir.read_json(results)['test_loss'] == pytest.approx(before['test_loss'], rel=1e-6)

    done = command(f'--config={ROOT}/configs/vit.py:cifar10')
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert 'cifar10 cannot be had' in done.stderr


def _parse(value: str) -> object:
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(value)
    return value
