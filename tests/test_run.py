"""The command line as a user types it."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence

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


# Answers each of many commands as a process of its own would, at the price of one start: what is
# imported is forked.
ANSWERS = """
import json, os, runpy, sys, tempfile
from performer_vit import train
answers = []
for arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile('w+') as out:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            sys.argv = ['run.py', *arguments]
            runpy.run_path('run.py', run_name='__main__')
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        answers.append((code, out.read()))
json.dump(answers, sys.stdout)
"""


def answers(commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Exit code and output of each command that ends before it trains."""
    done = subprocess.run(
        [sys.executable, '-c', ANSWERS],
        cwd=ROOT, env=environment() | {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=0'},
        input=json.dumps(commands), stdout=subprocess.PIPE, text=True, timeout=900, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, 'run.py', *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip


MISTAKES = [
    ((), '--config is missing; an example is --config=configs/performer_relu.py'),
    (('--config=configs/nope.py',), 'configs/nope.py'),
    (('--config=configs/vit.py:mnist',), "the config argument is 'mnist'"),
    (
        ('--config=configs/vit.py', '--config.num_epoch=3'),
        "there is no field 'num_epoch' there. Did",
    ),
    (('--config=configs/vit.py', '--config.nothing=3'), "there is no field 'nothing' there"),
    (('--config=configs/vit.py', '--config.num_epochs=three'), 'three'),
    (('--config=configs/vit.py', '--config.ema_decay=1' + 400 * '0'), 'ema_decay is inf'),
    (('--config=configs/vit.py', '--mode=fly'), '<train|evaluate|inspect|crossval|compare|'),
    (('--config=configs/vit.py', '--mode=compare'), 'needs a config with a section `compare`'),
    (('--config=configs/comparisons/kernels.py',), 'is for --mode=compare alone'),
    (
        ('--mode=compare', '--config=configs/comparisons/kernels.py', '--config.seed=5'),
        '--config.seed does nothing in --mode=compare',
    ),
    (('--mode=compare', '--config=configs/vit.py', '--config.seed=5'), 'a section `compare`'),
    (
        ('--mode=crossval', '--config=configs/vit.py', '--config.dataset.fallback=digits'),
        '--mode=crossval never goes on with other data',
    ),
    (('--mode=inspect',), 'needs the --workdir=DIR'),
    (('--config=configs/vit.py', 'train'), "unknown arguments ['train']"),
    (('--mode=evaluate',), 'needs the --workdir=DIR'),
    (('--config=configs/vit.py:digits', '--config.num_epochs=0'), 'num_epochs is 0'),
    (
        ('--config=configs/vit.py:digits', '--config.model.stem_channels=(32,64)'),
        'model.stem_channels is (32, 64)',
    ),
    (('--mode=evaluate', '--workdir=/nonexistent'), 'config.json does not exist'),
    (('--config=configs/rerun.py:/nonexistent',), 'error: /nonexistent/config.json does not exist'),
]
# What a config file of the user's may have, and what is said.
FILES = [
    ('x = 1', 'has no function get_config'),
    ('def get_config(argument=""): return None', 'has no function get_config'),
    ('def get_config(argument=""): return nothing', "NameError: name 'nothing' is not defined ("),
    ('def get_config(', "cannot be loaded: SyntaxError: '(' was never closed ("),
    ('import nothing', "ModuleNotFoundError: No module named 'nothing'"),
    ('from ml_collections import ConfigDict as get_config', "there is no field 'seed' there"),
]


def test_mistakes_get_an_error_without_a_traceback(tmp_path):
    """Exit code 2, the reason on stderr, and no Python in the user's face."""
    cases = list(MISTAKES)
    for number, (text, message) in enumerate(FILES):
        path = tmp_path / f'config{number}.py'
        path.write_text(text)
        cases.append(((f'--config={path}',), message))
    for (arguments, message), (code, said) in zip(
        cases, answers([arguments for arguments, _ in cases]), strict=True
    ):
        assert code == 2, (arguments, said)
        assert message in said and said.count('error: ') == 1, (arguments, said)
        assert 'Traceback' not in said, arguments


def test_a_mistake_in_a_process_of_its_own():
    """As a shell has it: the error is on stderr."""
    done = run('--config=configs/vit.py:mnist')
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: the config argument is 'mnist'; allowed is")


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
    # On a number of devices that no batch of the training could be shared by.
    kept['XLA_FLAGS'] = '--xla_force_host_platform_device_count=3'
    done = command('--mode=evaluate', f'--workdir={results.parent}')
    assert done.returncode == 0, done.stderr
    assert '3 devices' in workdir.read_json(results)['evaluation_device']
    assert workdir.read_json(results)['test_loss'] == pytest.approx(before['test_loss'], rel=1e-6)
    kept['XLA_FLAGS'] = ''

    done = command(f'--config={ROOT}/configs/vit.py:cifar10')
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert 'cifar10 cannot be had' in done.stderr


def _parse(value: str) -> object:
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(value)
    return value
