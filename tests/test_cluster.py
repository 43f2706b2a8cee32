"""Several real processes on this machine train one model, by the command line and gloo."""

import functools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from performer_vit import chaos, cluster, workdir
from performer_vit.errors import BadInput
from tests.conftest import ROOT

# A batch for 1, 2 and 3 processes; 360 test images and 144 of validation do not divide by it.
FLAGS = (
    '--config=configs/performer_relu.py:digits,small',
    '--config.num_epochs=3',
    '--config.batch_size=96',
    '--config.log_every_steps=3',
    '--config.model.width=16',
    '--config.model.mlp_dim=16',
    '--config.model.stem=patch',
    '--config.model.pooling=gap',
)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


class Processes:
    """`run.py` in so many processes that share the devices; one process joins no cluster."""

    def __init__(
        self,
        count: int,
        directory: pathlib.Path,
        *flags: str,
        devices: int = 2,
        each: Callable[[int], tuple] = lambda i: (),
        before: Callable[[int], tuple] = lambda i: (),
        program: Callable[[int], tuple] = lambda i: ('run.py',),
    ):
        self.all = []
        self.outputs = []
        port = free_port()
        environment = {
            **os.environ,
            'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices // count} '
            '--xla_backend_optimization_level=0',
        }
        for i in range(count):
            others = (f'--coordinator=localhost:{port}', f'--num_processes={count}')
            own = (*others, f'--process_id={i}') if count > 1 else ()
            # Not a pipe, which a process that nobody reads would wait for.
            path = directory.with_name(f'{directory.name}.{time.monotonic_ns()}.log')
            self.outputs.append(path)
            with open(path, 'w') as output:
                self.all.append(
                    subprocess.Popen(
                        [*before(i), sys.executable, *program(i), f'--workdir={directory}']
                        + [*FLAGS, *flags, *each(i), *own],
                        cwd=ROOT,
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def said(self, i: int) -> str:
        return self.outputs[i].read_text(errors='replace')

    def wait_for(self, text: str) -> None:
        while text not in self.said(0):
            assert self.all[0].poll() is None, self.said(0)[-3000:]
            time.sleep(0.01)

    def codes(self, timeout: float = 300) -> list[int]:
        try:
            return [process.wait(timeout) for process in self.all]
        finally:
            for process in self.all:
                process.kill()


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """The run that one process trains on so many devices."""

    @functools.cache
    def train(devices: int, *flags: str) -> pathlib.Path:
        directory = tmp_path_factory.mktemp('cluster') / 'alone'
        assert Processes(1, directory, *flags, devices=devices).codes() == [0]
        return directory

    return train


def assert_equal_weights(directory, alone):
    """The weights and their averages within 1e-5; momenta are sums of 20 gradients or so."""
    ours, theirs = chaos.final_state(directory), chaos.final_state(alone)
    assert ours.keys() == theirs.keys() and ours["['step']"] == theirs["['step']"] >= 30
    names = [name for name in theirs if name.startswith(("['params']", "['ema']"))]
    assert len(names) > 60
    for name in names:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5, err_msg=name)


def assert_equal_runs(directory, alone):
    """Weights, history and predictions, with each image of the test split once."""
    assert_equal_weights(directory, alone)
    ours, theirs = (workdir.read_history(each / 'history.csv') for each in (directory, alone))
    assert [row['step'] for row in ours] == [row['step'] for row in theirs]
    for field in ('train_loss', 'train_accuracy', 'validation_loss', 'validation_accuracy'):
        np.testing.assert_allclose(
            [row[field] for row in ours], [row[field] for row in theirs], rtol=1e-5, atol=1e-5
        )
    ours, theirs = (
        workdir.read_arrays(each / 'test_predictions.npz') for each in (directory, alone)
    )
    assert len(theirs['labels']) == 360
    np.testing.assert_array_equal(ours['labels'], theirs['labels'])
    np.testing.assert_allclose(ours['log_probabilities'], theirs['log_probabilities'], atol=1e-4)
    assert len(list(directory.glob('*tfevents*'))) == len(list(alone.glob('*tfevents*')))


def elsewhere(directory: pathlib.Path) -> Callable[[int], tuple]:
    """A workdir of its own for every process but the first, as where hosts share no files."""
    return lambda i: (f'--workdir={directory}/{i}',) * bool(i)


# Muon and Adam divide gradients by their size, so that rounding grows from step to step, to 1e-4
# here. Of two terms there is one sum, to the last bit; of three, its order matters.
SGD = ('--config.optimizer.name=sgd', '--config.optimizer.learning_rate=0.05',
       '--config.optimizer.weight_decay=0.0')  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('count, optimizer', [(2, ()), (3, SGD)])
def test_several_processes_are_one(alone, tmp_path, count, optimizer):
    """30 steps and more. Catches shares of a batch that overlap, gradients that are summed, an
    image that is tested twice or not at all, and a second writer."""
    own = tmp_path / 'own'
    together = Processes(count, tmp_path / 'run', *optimizer, devices=count, each=elsewhere(own))
    assert together.codes() == [0] * count, together.said(0)[-3000:]
    assert_equal_runs(tmp_path / 'run', alone(count, *optimizer))
    assert '[digits]' not in together.said(1)  # Process 0 speaks for all,
    assert not own.exists()  # and writes.


@pytest.mark.slow
@pytest.mark.parametrize('before, after', [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(alone, tmp_path, before, after):
    """Stopped by a signal to the last process alone, after which all save one step and end."""
    first = Processes(before, tmp_path / 'run')
    first.wait_for('Epoch 1/')
    first.all[-1].send_signal(signal.SIGTERM)
    assert first.codes() == [75] * before, first.said(0)[-3000:]
    steps = {re.search('has saved step (\\d+)', first.said(i))[1] for i in range(before)}
    assert len(steps) == 1
    second = Processes(after, tmp_path / 'run', each=elsewhere(tmp_path / 'own'))
    assert second.codes() == [0] * after, second.said(0)[-3000:]
    assert f'Going on after step {steps.pop()} of' in second.said(0)
    assert_equal_weights(tmp_path / 'run', alone(2))


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_the_others_end_when_one_is_killed(tmp_path, killed):
    """Within a minute, with an error. Catches processes that wait for ever."""
    together = Processes(2, tmp_path / 'run', '--config.num_epochs=100000')
    together.wait_for('Epoch 2/')
    together.all[killed].kill()
    codes = together.codes(timeout=60)
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] not in (0, 75), together.said(1 - killed)[-3000:]


@pytest.mark.slow
def test_processes_that_differ_all_end_and_say_how(tmp_path):
    """Before anything is written."""
    together = Processes(2, tmp_path / 'run', each=lambda i: (f'--config.seed={i}',))
    assert together.codes() == [2, 2]
    for i in range(2):
        assert re.search(
            'differ in their config, in seed: 0 in process 0, 1 in process 1', together.said(i)
        ), together.said(i)[-3000:]
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_processes_of_unlike_devices_all_end_and_say_so(tmp_path):
    """Catches a traceback of a reshape: shares of a batch are those of as many devices each."""
    flag = '--xla_force_host_platform_device_count'
    together = Processes(2, tmp_path / 'run', before=lambda i: ('env', f'XLA_FLAGS={flag}={i + 1}'))
    assert together.codes() == [2, 2]
    for i in range(2):
        last = together.said(i).splitlines()[-1]
        assert 'different numbers of devices, from process 0 on [1, 2]: give each' in last, last
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
@pytest.mark.parametrize('wrong', [0, 1])
@pytest.mark.parametrize(
    'flags, reason',
    [
        (('--config.batch_size=7',), 'batch_size is 7'),
        (('--config.dataset.name=folder', '--config.dataset.data_dir=none'), 'is not a directory'),
    ],
)
def test_what_one_cannot_use_ends_all(tmp_path, wrong, flags, reason):
    """By its name, before anything is written."""
    together = Processes(2, tmp_path / 'run', each=lambda i: flags * (i == wrong))
    assert together.codes() == [2, 2]
    own, others = (together.said(i).splitlines()[-1] for i in (wrong, 1 - wrong))
    assert re.fullmatch(f'error: [^:]*{reason}.*', own), own
    assert others == f'error: process {wrong} has failed, and this one ends with it: ' + (
        own.removeprefix('error: ')
    )
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_what_tensorboard_fails_at_ends_all(tmp_path):
    """Within the epoch. Its thread tells of a full disk at any step, and process 0 alone."""
    program = """
import runpy
from clu import metric_writers
from performer_vit import progress

open_files = progress.Progress._open

def fail(*_, **__):
    raise OSError(28, 'No space left on device', 'events')

def open_and_fail(self, *arguments):
    open_files(self, *arguments)
    full = metric_writers.MultiWriter([])
    full.write_scalars = fail
    self._writer = metric_writers.AsyncWriter(full)

progress.Progress._open = open_and_fail
runpy.run_path('run.py', run_name='__main__')
"""
    together = Processes(2, tmp_path / 'run', program=lambda i: ('-c', program))
    assert together.codes() == [2, 2]
    last, theirs = (together.said(i).splitlines()[-1] for i in range(2))
    assert last.startswith('error: a file cannot be written (No space left on device)'), last
    # The error itself, not the thread's advice to programmers.
    why = "OSError: [Errno 28] No space left on device: 'events'"
    assert last.endswith(f'It was: {why}'), last
    assert theirs.startswith(f'error: process 0 has failed, and this one ends with it: {why}. The')
    assert theirs.endswith('they go on from what is saved.')
    assert 'Epoch 1/' not in together.said(0)


@pytest.mark.slow
@pytest.mark.parametrize('wrong', [0, 1])
def test_one_that_fails_alone_ends_the_others(tmp_path, wrong):
    """Within a minute or so of an error in a step. Catches those that wait for one that ended."""
    program = """
import runpy
from performer_vit import train

def fail(*_):
    raise ArithmeticError('this process alone')

train.report_steps = fail
runpy.run_path('run.py', run_name='__main__')
"""
    together = Processes(
        2, tmp_path / 'run', program=lambda i: ('-c', program) if i == wrong else ('run.py',)
    )
    deadline = time.monotonic() + 120
    while 'ArithmeticError: this process alone' not in (said := together.said(wrong)):
        assert time.monotonic() < deadline, said[-3000:]
        time.sleep(0.1)
    codes = together.codes(timeout=75)
    assert 0 not in codes and 75 not in codes


@pytest.mark.slow
def test_what_process_0_has_and_how_it_fails():
    """Bit for bit, and by name. Catches a sum with zeros, which makes 0.0 of -0.0."""
    port = free_port()
    program = f"""
import sys
import ml_dtypes
import numpy as np
from performer_vit import cluster
from performer_vit.errors import BadInput

process = int(sys.argv[1])
cluster.join('localhost:{port}', 2, process)
arrays = [
    np.array([-0.0, np.nan, np.inf, 5e-324]), np.float32(-0.0), np.zeros((0, 3), np.float32),
    np.array([[1, -2]], ml_dtypes.bfloat16), np.array([True, False]), np.uint32(2**32 - 1),
]
mine = arrays if not process else [np.ones_like(array) for array in arrays]
for ours, expected in zip(cluster.arrays_from_main(mine), arrays, strict=True):
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
    assert ours.tobytes() == expected.tobytes(), expected

def wrong(error):
    raise error

assert cluster.from_main(lambda: [process]) == [0]
for function in (
    lambda: wrong(BadInput('bad')), lambda: wrong(OSError('worse')), lambda: {{1, 2}},
):
    try:
        cluster.from_main(function)
    except Exception as error:
        print(type(error).__name__, error, sep=': ')
assert cluster.everywhere(lambda: {{process}}) == {{process}}
for error in (ValueError('ä' * 400), BadInput('bad ' * 100 + 'end')):
    try:
        cluster.everywhere(lambda: process or wrong(error))
    except Exception as failure:
        print(type(failure).__name__, failure, sep=': ')
try:
    cluster.check_agreement('all', {{'same': 0, 'b': 'x' * process, 'a': process}}, 'Mend it.')
except BadInput as differ:
    print(differ)
try:
    cluster.check_agreement('all', {{'names': ['x'] * (99 + process)}}, 'Mend it.')
except BadInput as differ:
    print(differ)
"""
    both = [
        subprocess.Popen(
            [sys.executable, '-c', program, f'{i}'], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=300)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    no_json = 'TypeError: Object of type set is not JSON serializable'
    ours, theirs = ([line for line in lines if '[Gloo]' not in line] for lines in said)
    item = "in names, number 100: absent in process 0, 'x' in process 1. Mend it."
    assert ours.pop() == theirs.pop() == f'the processes differ in all, {item}'
    # The first that differs, as the names are given.
    differ = "the processes differ in all, in b: '' in process 0, 'x' in process 1. Mend it."
    assert ours.pop() == theirs.pop() == differ
    assert ours == [
        'BadInput: bad', 'OSError: worse', no_json, f'ValueError: {"ä" * 400}',
        f'BadInput: {"bad " * 100}end',
    ]  # fmt: skip
    cut, whole = theirs[-2:]
    del theirs[-2:]
    first = 'OtherFailed: process 0 has failed, and this one ends with it: '
    last = (
        '. The output of that process says more. Mend the cause and give the same commands again: '
        'they go on from what is saved.'
    )
    assert cut.startswith(f'{first}ValueError: …')
    # What a user can mend is said whole, since its end says how.
    assert whole == f'{first}{"bad " * 100}end'
    assert theirs == ['BadInput: bad', f'{first}OSError: worse{last}', f'{first}{no_json}{last}']


@pytest.mark.slow
@pytest.mark.parametrize('room', [0.02, 0.2, 0.9])
def test_a_full_disk_ends_all(alone, tmp_path, room):
    """Process 0, which writes, says why. Catches others that wait for what it cannot save."""
    if not chaos.may_mount():
        pytest.skip('this system does not let its users mount')
    written = (alone(2) / 'checkpoints').rglob('*')
    size = int(room * sum(path.stat().st_size for path in written if path.is_file()))
    (tmp_path / 'run').mkdir()
    script = f'mount -t tmpfs -o size={size} tmpfs "$0" && shift && "$@"'
    disk = (*chaos.UNSHARE, 'sh', '-c', script, str(tmp_path / 'run'), '--')
    together = Processes(
        2, tmp_path / 'run', '--config.num_epochs=100', before=lambda i: disk * (i == 0)
    )
    assert together.codes() == [2, 2]
    last, theirs = (together.said(i).splitlines()[-1] for i in range(2))
    assert last.startswith('error: a file cannot be written (No space left on device)'), last
    assert theirs.startswith('error: process 0 has failed, and this one ends with it: '), theirs


def test_one_process_is_no_cluster():
    """What everyone calls does the obvious thing."""
    assert cluster.is_main() and cluster.devices() is None
    assert cluster.any_of(True) and not cluster.any_of(False)
    np.testing.assert_array_equal(cluster.gather(np.arange(3)), [[0, 1, 2]])
    asked = object()
    assert cluster.together(asked, 5) is asked
    assert cluster.from_main(lambda: 7) == cluster.everywhere(lambda: 7) == 7
    with pytest.raises(BadInput, match='mine'):
        cluster.from_main(lambda: (_ for _ in ()).throw(BadInput('mine')))
    arrays = {'a': np.arange(3)}
    assert cluster.arrays_from_main(arrays) is arrays
    cluster.check_agreement('the config', {'seed': 0}, 'Start it again.')


def test_replicas_lie_on_all_devices():
    state = {'a': np.arange(3.0), 'b': np.float32(2)}
    copies = cluster.replicate(state)
    assert copies['a'].shape == (4, 3) and len(copies['a'].addressable_shards) == 4
    np.testing.assert_array_equal(cluster.local(copies['a']), [state['a']] * 4)
    again = cluster.first_replica(copies)
    np.testing.assert_array_equal(again['a'], state['a'])
    assert again['b'] == 2 and again['b'].shape == ()
