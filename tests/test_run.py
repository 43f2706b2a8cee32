"""The command line as a user types it."""

import contextlib
import os
import subprocess
import sys

import pytest

from performer_vit import workdir
from tests.conftest import ROOT

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
        (('--config=configs/vit.py', '--config.ema_decay=1' + 400 * '0'), 'ema_decay is inf'),
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
