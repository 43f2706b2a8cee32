"""Faults that a training survives: python -m performer_vit.chaos --workdir=DIR [--kills=100].

Each try disturbs one training of `run.py` in a directory of its own, gives the same command until
it completes, and compares what there is then with an undisturbed run, bit for bit: the final train
state, `history.csv` and TensorBoard's scalars but for measured times, and the predictions.
"""

import argparse
import collections
import concurrent.futures
import functools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from performer_vit import environment, events, interruption, typeset
from performer_vit import workdir as run_directory
from performer_vit.command_line import quiet_libraries
from performer_vit.errors import one_line

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The real loop with all that a run saves, small enough to be run some hundred times.
FLAGS = (
    '--config=configs/performer_relu.py:digits,small',
    '--config.num_epochs=6',
    '--config.log_every_steps=3',
    '--config.model.width=16',
    '--config.model.mlp_dim=16',
    '--config.model.stem=patch',
    '--config.model.pooling=gap',
)
# Measured anew by each run.
_TIMES = ('seconds', 'images_per_second')
_LAST_SECONDS = 600  # After which a run is taken to hang.
_FIRST_STEP = 'img/s'  # Of the bar of progress, which is there when all is compiled.


class LostError(Exception):
    """What a fault cost, or what it did that it should not have."""


Undisturbed = collections.namedtuple('Undisturbed', 'workdir start seconds')
Undisturbed.__doc__ = """A run that nothing happened to.

Its directory, the seconds from its command to its first step, and those from there to its end.
"""


class Training:
    """A training of `run.py` in a process of its own, by the one command that is given again.

    Args:
      workdir: of the run.
      variables: of the environment, added to this process's.
      before: the command that runs the command, such as `unshare`.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        variables: dict[str, str] | None = None,
        before: Sequence[str] = (),
    ):
        self.workdir = workdir
        self._output = workdir.with_name(f'{workdir.name}.{time.monotonic_ns()}.log')
        with open(self._output, 'w') as output:
            self.process = subprocess.Popen(
                [*before, sys.executable, 'run.py', *FLAGS, f'--workdir={workdir}'],
                cwd=ROOT,
                env={**os.environ, **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors='replace')

    def until(self, what: Callable[[], bool]) -> bool:
        """Waits until something is so, and says whether it came before the end of the process."""
        while self.process.poll() is None:
            if what():
                return True
            time.sleep(0.0005)
        return False

    def until_it_says(self, text: str) -> bool:
        return self.until(lambda: text in self.output)

    def ends(self, *allowed: int) -> int:
        """Waits for the end; `LostError` for another exit code than the allowed ones."""
        try:
            code = self.process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            raise LostError(f'the process hung for {_LAST_SECONDS} s') from error
        if code not in allowed:
            raise LostError(f'exit code {code}, not one of {allowed}: {self.output[-2000:]}')
        return code


def _within(training: Training, moments: random.Random, seconds: float):
    """Waits until a random moment of the next so many seconds, or the end of the process."""
    until = time.monotonic() + moments.uniform(0, seconds)
    training.until(lambda: time.monotonic() >= until)


def _at_a_random_moment(training: Training, moments: random.Random, undisturbed: Undisturbed):
    """Waits until the training is somewhere between its first step and its end."""
    training.until_it_says(_FIRST_STEP)
    _within(training, moments, undisturbed.seconds)


def kill_twice(workdir, moments, undisturbed) -> None:
    """`kill -9` at a random moment of the training, and at any of the process that goes on."""
    training = Training(workdir)
    _at_a_random_moment(training, moments, undisturbed)
    training.process.kill()
    training.ends(-signal.SIGKILL, 0)
    training = Training(workdir)
    _within(training, moments, undisturbed.start + undisturbed.seconds)
    training.process.kill()
    training.ends(-signal.SIGKILL, 0)


def kill_while_saving(workdir, moments, undisturbed) -> None:
    """`kill -9` while a checkpoint is being written: there is an unfinished one afterwards."""
    for attempt in range(20):
        training = Training(workdir.with_name(f'{workdir.name}-{attempt}'))
        begun = training.workdir / 'checkpoints'
        epoch = moments.randrange(1, 6)
        training.until_it_says(f'Epoch {epoch}/')
        training.until(lambda begun=begun: any(begun.glob('*.orbax-checkpoint-tmp')))
        training.process.kill()
        training.ends(-signal.SIGKILL, 0)
        if any(begun.glob('*.orbax-checkpoint-tmp')):
            training.workdir.rename(workdir)
            return
    raise LostError('no kill of 20 met a checkpoint that was being written')


def ask_to_stop(number: int, workdir, moments, undisturbed) -> None:
    """One signal at a random moment: exit code 75, and no traceback."""
    training = Training(workdir)
    _at_a_random_moment(training, moments, undisturbed)
    training.process.send_signal(number)
    training.ends(interruption.EXIT_CODE, 0)
    if 'Traceback' in training.output:
        raise LostError(f'a traceback: {training.output[-2000:]}')


def ask_twice(workdir, moments, undisturbed) -> None:
    """Two signals, one upon the other: the second ends the process at once."""
    training = Training(workdir)
    _at_a_random_moment(training, moments, undisturbed)
    training.process.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    training.process.send_signal(signal.SIGTERM)
    training.ends(-signal.SIGTERM, 128 + signal.SIGTERM, interruption.EXIT_CODE, 0)


def _stopped(workdir, moments) -> list[pathlib.Path]:
    """Stops a training after two epochs or more; its checkpoints, the newest last."""
    training = Training(workdir)
    training.until_it_says(f'Epoch {moments.randrange(2, 6)}/')
    training.process.send_signal(signal.SIGTERM)
    training.ends(interruption.EXIT_CODE)
    return sorted((workdir / 'checkpoints').glob('[0-9]*'), key=lambda path: int(path.name))


def damage(change: Callable[[bytes, random.Random], bytes], workdir, moments, undisturbed) -> None:
    """A file of the newest checkpoint is damaged: it is named, the one before is used."""
    *_, before, newest = _stopped(workdir, moments)
    # The arrays are in one or a few files; the others describe them.
    size = {path: path.stat().st_size for path in newest.rglob('*') if path.is_file()}
    path = moments.choices(list(size), list(size.values()))[0]
    path.write_bytes(change(path.read_bytes(), moments))
    training = Training(workdir)
    training.ends(0)
    if f'Going on after step {int(newest.name):,}' in training.output:
        return  # Bytes that nothing reads: the comparison is the judge.
    for text in (f'step {newest.name} in', 'cannot be used', f'step {before.name} is used'):
        if text not in training.output:
            raise LostError(f'{text!r} is not said: {training.output[-2000:]}')
    if not (workdir / 'damaged_checkpoints' / newest.name).is_dir():
        raise LostError('the damaged checkpoint was deleted')


def _cut(content: bytes, moments: random.Random) -> bytes:
    return content[: moments.randrange(len(content))]


def _flip(content: bytes, moments: random.Random) -> bytes:
    place = moments.randrange(len(content))
    flipped = content[place] ^ (1 << moments.randrange(8))
    return content[:place] + bytes([flipped]) + content[place + 1 :]


def delete_history(workdir, moments, undisturbed) -> None:
    """`history.csv` is deleted between two commands."""
    _stopped(workdir, moments)
    (workdir / 'history.csv').unlink()


def damage_events(change, workdir, moments, undisturbed) -> None:
    """TensorBoard's file is damaged or deleted between two commands: it is written anew."""
    _stopped(workdir, moments)
    (path,) = workdir.glob('*tfevents*')
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes(), moments))
    training = Training(workdir)
    training.ends(0)
    text = "TensorBoard's files lack"
    if change is None and text not in training.output:
        raise LostError(f'{text!r} is not said: {training.output[-2000:]}')


def train_twice(workdir, moments, undisturbed) -> None:
    """A second training on the workdir is refused, and the first does not notice."""
    first = Training(workdir)
    first.until_it_says('Compiling')
    second = Training(workdir)
    second.ends(2)
    if 'another process trains in the workdir' not in second.output:
        raise LostError(f'it is not said why: {second.output[-2000:]}')
    first.ends(0)


def jump_the_clock(workdir, moments, undisturbed) -> None:
    """The clock that Python reads jumps back and forth by up to a year at every third reading."""
    tampered = workdir.with_name(f'{workdir.name}.python')
    tampered.mkdir()
    (tampered / 'sitecustomize.py').write_text(
        'import random, time\n'
        f'jumps, real, shift = random.Random({moments.randrange(2**32)}), time.time, [0.0]\n'
        'def clock():\n'
        '    if jumps.random() < 1 / 3:\n'
        '        shift[0] = jumps.uniform(-3e7, 3e7)\n'
        '    return real() + shift[0]\n'
        'time.time = clock\n'
        'time.time_ns = lambda: int(clock() * 1e9)\n'
        'print("The clock jumps.")\n'
    )
    path = os.pathsep.join([str(tampered), *filter(None, [os.environ.get('PYTHONPATH')])])
    training = Training(workdir, {'PYTHONPATH': path})
    training.until_it_says(f'Epoch {moments.randrange(1, 6)}/')
    training.process.kill()
    training.ends(-signal.SIGKILL, 0)
    training = Training(workdir, {'PYTHONPATH': path})
    training.ends(0)
    if 'The clock jumps.' not in training.output:
        raise LostError('the clock did not jump')


# A name space of mounts in which the user may mount; not every system permits it.
UNSHARE = ('unshare', '--user', '--map-root-user', '--mount')


@functools.cache
def may_mount() -> bool:
    if not shutil.which('unshare'):
        return False
    command = [*UNSHARE, 'mount', '-t', 'tmpfs', 'tmpfs', '/mnt']
    return not subprocess.run(command, capture_output=True).returncode


def fill_the_disk(workdir, moments, undisturbed) -> None:
    """A disk that is full after a random number of bytes: exit code 2, and a last line on it."""
    needed = sum(p.stat().st_size for p in undisturbed.workdir.rglob('*') if p.is_file())
    # Pages of 4 KiB; it may be full by the first file or by the last figure.
    room = 4096 * moments.randrange(4, int(0.9 * needed) // 4096)
    kept = workdir.with_name(f'{workdir.name}.kept')
    kept.mkdir()
    workdir.mkdir()
    # The disk is gone with the process; what is on it is copied before.
    script = (
        f'mount -t tmpfs -o size={room} tmpfs "$0" && shift && {{ "$@"; code=$?; }}; '
        f'cp -a "$0"/. "{kept}"; exit $code'
    )
    training = Training(workdir, before=(*UNSHARE, 'sh', '-c', script, str(workdir), '--'))
    training.ends(2)
    last = training.output.splitlines()[-1]
    if not last.startswith('error: a file cannot be written (No space left on device)'):
        raise LostError(f'it is not said why: {last}')
    workdir.rmdir()
    kept.rename(workdir)


def write_protect(workdir, moments, undisturbed) -> None:
    """The workdir becomes read-only between two commands: refused before anything is computed."""
    _stopped(workdir, moments)
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && shift && "$@"'
    training = Training(workdir, before=(*UNSHARE, 'sh', '-c', script, str(workdir), '--'))
    training.ends(2)
    if 'cannot be written' not in training.output or 'Compiling' in training.output:
        raise LostError(f'it is not refused: {training.output[-2000:]}')


Fault = collections.namedtuple('Fault', 'disturb tries needs_mounts', defaults=[False])
# By what stands in the table; `tries` beside those of `--kills`, which the first has.
FAULTS = {
    '`kill -9` at two random moments': Fault(kill_twice, None),
    '`kill -9` while a checkpoint is written': Fault(kill_while_saving, 5),
    'SIGINT at a random moment': Fault(functools.partial(ask_to_stop, signal.SIGINT), 5),
    'SIGTERM at a random moment': Fault(functools.partial(ask_to_stop, signal.SIGTERM), 5),
    'a second signal, 20 ms after the first': Fault(ask_twice, 5),
    'full disk after a random number of bytes': Fault(fill_the_disk, 10, needs_mounts=True),
    'read-only workdir': Fault(write_protect, 2, needs_mounts=True),
    'newest checkpoint: a file truncated': Fault(functools.partial(damage, _cut), 5),
    'newest checkpoint: a bit flipped': Fault(functools.partial(damage, _flip), 5),
    '`history.csv` deleted': Fault(delete_history, 2),
    "TensorBoard's file deleted": Fault(functools.partial(damage_events, None), 2),
    "TensorBoard's file: a bit flipped": Fault(functools.partial(damage_events, _flip), 5),
    'two trainings on one workdir': Fault(train_twice, 2),
    'a clock that jumps, and `kill -9`': Fault(jump_the_clock, 5),
}


def undisturbed_run(directory: pathlib.Path) -> Undisturbed:
    """Trains where nothing happens; in a subdirectory."""
    began = time.monotonic()
    training = Training(directory / 'undisturbed')
    training.until_it_says(_FIRST_STEP)
    steps = time.monotonic()
    training.ends(0)
    return Undisturbed(training.workdir, steps - began, time.monotonic() - steps)


def survive(name: str, workdir: pathlib.Path, seed: int, undisturbed: Undisturbed) -> None:
    """One try of a fault. Raises `LostError` where the training did not survive it whole."""
    FAULTS[name].disturb(workdir, random.Random(seed), undisturbed)
    Training(workdir).ends(0)
    found = list(differences(workdir, undisturbed.workdir))
    if found:
        raise LostError('; '.join(found))


def differences(workdir: pathlib.Path, whole: pathlib.Path) -> Iterator[str]:
    """What a run's directory has otherwise than that of the undisturbed run."""
    for what, read in _READ.items():
        try:
            ours, theirs = read(workdir), read(whole)
        except Exception as error:  # Of any kind: files may be missing or broken.
            yield f'{what} cannot be read: {one_line(error)}'
            continue
        missing, more = theirs.keys() - ours.keys(), ours.keys() - theirs.keys()
        changed = [
            key for key in theirs.keys() & ours.keys() if not np.array_equal(theirs[key], ours[key])
        ]
        for kind, keys in (('misses', missing), ('has more', more), ('has other', changed)):
            if keys:
                yield f'{what} {kind} {sorted(map(str, keys))[:3]}, {len(keys)} in all'


def final_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """The leaves of the newest checkpoint's train state by name."""
    newest = max((workdir / 'checkpoints').glob('[0-9]*'), key=lambda path: int(path.name))
    with ocp.StandardCheckpointer() as checkpointer:
        leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(newest / 'state'))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _history(workdir: pathlib.Path) -> dict[tuple, str]:
    rows = run_directory.read_history(workdir / 'history.csv')
    # By place and column, so that a row twice is a row more.
    return {
        (number, name): '' if value is None else value
        for number, row in enumerate(rows)
        for name, value in row.items()
        if name not in _TIMES
    }


def _scalars(workdir: pathlib.Path) -> dict[tuple, float]:
    counts = collections.Counter()
    values = {}
    for tag, step, value in events.scalars(workdir):
        counts[tag, step] += 1
        time = tag.rpartition('/')[2] in _TIMES
        values[tag, step, counts[tag, step]] = 0.0 if time else value
    return values


def _predictions(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    return run_directory.read_arrays(workdir / 'test_predictions.npz')


def _results(workdir: pathlib.Path) -> dict[str, object]:
    results = run_directory.read_json(workdir / 'results.json')
    same = ('epochs', 'tested_epoch', 'tested_step', 'test_accuracy', 'test_loss')
    return {name: results[name] for name in same}


# What is compared, as values by key.
_READ = {
    'the final train state': final_state,
    'history.csv': _history,
    'TensorBoard': _scalars,
    'the predictions': _predictions,
    'results.json': _results,
}


def table(outcome: dict) -> str:
    """The outcome of all faults as a Markdown table."""
    rows = [
        [
            row['fault'],
            str(row['tried']) if row['tried'] else 'not permitted here',
            str(row['survived']),
            '; '.join(row['lost']) or 'nothing',
        ]
        for row in outcome['faults']
    ]
    return typeset.markdown(['fault', 'tried', 'survived', 'lost'], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries every fault; returns how many tries were not survived."""
    parser = argparse.ArgumentParser(prog='python -m performer_vit.chaos', description=__doc__)
    parser.add_argument('--workdir', required=True, help='a new directory, for some 2 MB a try')
    parser.add_argument('--kills', type=int, default=100, help='trainings that are killed twice')
    parser.add_argument('--jobs', type=int, default=2, help='trainings at a time')
    parser.add_argument('--seed', type=int, default=0, help='of the random moments')
    given = parser.parse_args(arguments)
    versions = environment.versions()  # Those that begin.
    directory = pathlib.Path(given.workdir).absolute()
    if given.kills < 1 or given.jobs < 1:
        parser.error('--kills and --jobs are 1 or more')
    if directory.exists():
        parser.error(f'{directory} exists already: give a new directory')
    directory.mkdir(parents=True)
    # Compiled once, by the undisturbed run: the others spend their time on what can be disturbed.
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(directory / 'compiled'))
    try:
        whole = undisturbed_run(directory)
    except LostError as error:
        parser.error(f'the training does not even go undisturbed: {error}')
    lost = {name: [] for name in FAULTS}
    tries = [
        (name, number)
        for name, fault in FAULTS.items()
        if may_mount() or not fault.needs_mounts
        for number in range(fault.tries or given.kills)
    ]

    def attempt(which: int) -> None:
        name, _ = tries[which]
        workdir = directory / f'{which}'
        try:
            survive(name, workdir, given.seed * len(tries) + which, whole)
        except LostError as error:
            lost[name].append(f'{workdir}: {error}')
            tqdm.write(f'{name}: {workdir}: {error}')
        else:
            for path in directory.glob(f'{which}[-.]*'):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.rmtree(workdir)

    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        done = pool.map(attempt, range(len(tries)))
        collections.deque(tqdm(done, total=len(tries), unit='try'), maxlen=0)
    counts = collections.Counter(name for name, _ in tries)
    outcome = {
        'faults': [
            {
                'fault': name,
                'tried': counts[name],
                'survived': counts[name] - len(lost[name]),
                'lost': lost[name],
            }
            for name in FAULTS
        ],
        'seed': given.seed,
        'device': environment.device(),
        'versions': versions,
    }
    run_directory.write_json(directory / 'chaos.json', outcome)
    print(table(outcome))
    print(f'Everything is in {directory}')
    return sum(map(len, lost.values()))


if __name__ == '__main__':
    quiet_libraries()
    sys.exit(bool(main()))
