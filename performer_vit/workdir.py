"""The directory of a run: its name, whose it is, and the small files in it.

They are written whole and swapped in, so that a reader or a crash never meets half a file.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from performer_vit import files, locks
from performer_vit.datasets import DATASETS
from performer_vit.errors import ABSENT, LONGEST, BadInput, first_difference, one_line, shown

HISTORY_COLUMNS = (
    'dataset', 'epoch', 'step', 'train_loss', 'train_accuracy', 'validation_loss',
    'validation_accuracy', 'learning_rate', 'seconds',
)  # fmt: skip
# File systems take 255 bytes, and a mode puts its own name behind it.
_LONGEST_NAME = 200
_DATA = 'data_read'  # In config.json: the fingerprints of what was read.
# Where data comes from; what was read stands in `dataset_read` and `data_read`, which must agree.
_WHEREABOUTS = ('dataset.data_dir', 'dataset.fallback')
# What may change when a run goes on; a sweep may go further than it was to go at first.
_FREE = (*_WHEREABOUTS, 'sweep.num_trials', 'sweep.minutes')
# Of what was typed, what is no part of a run's name: the directory names the data set that was
# read, a database may have a password, and a comparison may get further seeds.
_UNNAMED = (
    *_FREE, 'dataset.name', 'sweep.storage', 'compare.seeds', 'compare.baseline', 'ablate.seeds',
)  # fmt: skip


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file in one step: the old content or the new, never a part."""
    _write_bytes(path, text.encode('utf-8'))


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name as a compressed `.npz` file, in one step."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    _write_bytes(path, content.getvalue())


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays of a file that `write_arrays` wrote.

    What NumPy would unpickle, and so run, is refused: the file may be a stranger's.

    Raises:
      BadInput: the file is damaged, or has something else than arrays of numbers and texts.
    """
    try:
        with np.load(path, allow_pickle=False) as saved:
            return dict(saved)
    except FileNotFoundError:
        raise
    except Exception as error:  # Of any kind: anything may come of a damaged file.
        raise BadInput(
            f'{path} is damaged, or no .npz file of arrays without Python objects '
            f'({one_line(error)}): restore it, or let what wrote it write it again, such as '
            '--mode=evaluate the predictions of a finished run.'
        ) from error


def _write_bytes(path: str | os.PathLike, content: bytes) -> None:
    with files.replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | os.PathLike, values: Mapping) -> None:
    """Writes a mapping as indented JSON with sorted keys, in one step."""
    write_text(path, json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + '\n')


def read_json(path: str | os.PathLike) -> dict:
    """Reads a JSON file that `write_json` wrote; `BadInput` where there is none."""
    try:
        values = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise BadInput(
            f'{path} does not exist: give the directory of a run that wrote one.'
        ) from error
    except json.JSONDecodeError as error:
        raise BadInput(
            f'{path} is not valid JSON ({error}): restore it, or give another directory.'
        ) from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(
            f'{path} cannot be read ({one_line(error)}): restore it, or give another directory.'
        ) from error
    if not isinstance(values, dict):
        raise BadInput(
            f'{path} holds {shown(values)} and not the fields of a run or a measurement: restore '
            'it, or give another directory.'
        )
    return values


def write_history(path: str | os.PathLike, rows: Sequence[Mapping]) -> None:
    """Writes `history.csv`: a row an epoch; missing values (None) are empty cells."""
    file = io.StringIO()
    writer = csv.DictWriter(file, HISTORY_COLUMNS, extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, file.getvalue())


def read_history(path: str | os.PathLike) -> list[dict]:
    """Reads `history.csv` back: numbers as numbers, empty cells as None.

    Raises:
      BadInput: the file is damaged.
    """

    def parse(name: str, cell: str):
        if cell == '':
            return None
        if name == 'dataset':
            return cell
        return int(cell) if name in ('epoch', 'step') else float(cell)

    try:
        with open(path, encoding='utf-8', newline='') as file:
            return [{k: parse(k, v) for k, v in row.items()} for row in csv.DictReader(file)]
    except (ValueError, TypeError, csv.Error) as error:
        raise BadInput(
            f'{path} is damaged ({one_line(error)}): restore it, or remove it and give the command '
            'of the run again, which writes it anew.'
        ) from error


def flatten(values: Mapping, prefix: str = '') -> dict:
    """{'model': {'width': 128}} → {'model.width': 128}."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f'{prefix}{name}.'))
        else:
            flat[f'{prefix}{name}'] = value
    return flat


def default_workdir(run_name: str, dataset_name: str) -> pathlib.Path:
    """`runs/<data set>/<run name>`, where a run goes that was given no --workdir."""
    return pathlib.Path('runs') / dataset_name / run_name


def run_name(config_path: str, arguments: str, overrides: Mapping[str, object]) -> str:
    """A readable name from what was typed: `performer_relu-num_epochs=3`."""
    words = [word.strip() for word in arguments.split(',')]
    words = [word for word in words if word and word not in DATASETS]
    changes = [
        f'{field}={value}' for field, value in sorted(overrides.items()) if field not in _UNNAMED
    ]
    return directory_name('-'.join([pathlib.Path(config_path).stem, *words, *changes]))


def directory_name(text: str) -> str:
    """The text with only what every file system takes in the name of a directory.

    Of what is too long, the end gives way to a digest of all of it.
    """
    name = ''.join(c if c.isalnum() or c in '-_=.,' else '_' for c in text)
    content = name.encode()
    if len(content) <= _LONGEST_NAME:
        return name
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    return f'{content[: _LONGEST_NAME - len(digest) - 1].decode(errors="ignore")}-{digest}'


def check_writable(workdir: str | os.PathLike) -> None:
    """Raises `BadInput` unless files can be made in the directory, or where it would be made.

    And found again: Orbax looks for its own by patterns, in which some characters are marks.
    """
    if '://' in os.fspath(workdir):
        raise BadInput(
            f'the workdir is {workdir}, an address; allowed are directories of a mounted file '
            'system: give such a --workdir=DIR.'
        )
    workdir = pathlib.Path(workdir).absolute()
    marks = [mark for mark in ('[', ']', '**', '\\') if mark in os.fspath(workdir)]
    if os.name == 'nt':
        marks.remove('\\')
    if marks or not files.is_text(os.fspath(workdir)):
        reason = f'has {" and ".join(marks)} in it' if marks else 'is no UTF-8'
        raise BadInput(
            f'the path {os.fspath(workdir)!a} {reason}, and checkpoints could not be read back '
            'from there: give another --workdir=DIR.'
        )
    try:
        files.try_to_write(next(path for path in (workdir, *workdir.parents) if path.exists()))
    except OSError as error:
        raise BadInput(_not_writable(workdir, error)) from error


def _not_writable(workdir: pathlib.Path, error: OSError) -> str:
    return (
        f'the directory {workdir} cannot be written ({error.strerror or error}): give another '
        '--workdir=DIR, or change its permissions.'
    )


def _made(workdir: str | os.PathLike) -> pathlib.Path:
    """The directory, made where it is missing, absolute."""
    workdir = pathlib.Path(workdir).absolute()
    check_writable(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(_not_writable(workdir, error)) from error
    return workdir


@contextlib.contextmanager
def alone(workdir: str | os.PathLike) -> Iterator[None]:
    """Within, no other process trains in the directory, which is made where it is missing.

    The lock is the kernel's, which lets go of it however the process ends.

    Raises:
      BadInput: another one does, or the directory cannot be written.
    """
    workdir = _made(workdir)
    if os.name == 'nt':  # Windows has no such lock, and nobody is refused there.
        yield
        return
    # Not `.lock`, which is that of a trial and is held around this one.
    try:
        lock = locks.take(workdir / '.training.lock', wait=False)
    except OSError as error:
        raise BadInput(
            f'the workdir {workdir} cannot be locked against a second training '
            f'({error.strerror or error}): give another --workdir=DIR, of your own and on a file '
            'system that has locks.'
        ) from error
    if lock is None:
        raise BadInput(
            f'another process trains in the workdir {workdir}: wait for it, stop it, or give this '
            'run another --workdir=DIR.'
        )
    with lock:
        for directory in (workdir, workdir / 'figures'):
            files.remove_unfinished(directory)
        yield


def claim(workdir: str | os.PathLike, run: Mapping) -> pathlib.Path:
    """Makes the directory, or checks that the run in it is this very one, and returns its path.

    Args:
      workdir: the directory.
      run: what makes a run another one, see `definition`.

    Raises:
      BadInput: the directory cannot be written, or holds a run with another config or of other
        data; the message lists every field that differs.
    """
    workdir = _made(workdir)
    check_same(workdir, run)
    path = workdir / 'config.json'
    if not path.exists():
        write_json(path, run)
    return workdir


def check_same(workdir: str | os.PathLike, run: Mapping) -> None:
    """Raises `BadInput` as `claim` does where another run is in the directory; makes nothing."""
    path = pathlib.Path(workdir) / 'config.json'
    if not path.exists():
        return
    lines = differences(read_json(path), run)
    if lines:
        raise BadInput(
            f'the workdir {workdir} holds a run with another config or of other data:\n'
            + '\n'.join(lines)
            + '\nGive this run another --workdir=DIR, or repeat the config of the run there, with '
            'its data, to continue it.'
        )


def definition(config: Mapping, data: Mapping[str, object]) -> dict:
    """What config.json holds, as JSON has it: the config, and what data it has read.

    Args:
      config: of the run.
      data: from `datasets.fingerprints`, or its `name` alone where each of several runs has data of
        its own.
    """
    read = dict(data)
    told = {**config, 'dataset_read': read.pop('name')}
    return json.loads(json.dumps({**told, _DATA: read} if read else told))


def read_config(workdir: str | os.PathLike) -> ConfigDict:
    """The config of the run in a directory, on the data that it read, or none.

    Raises:
      BadInput: there is no config.json of a run.
    """
    values = read_json(pathlib.Path(workdir) / 'config.json')
    if 'mode' in values:
        raise BadInput(
            f'{workdir} is the directory of several runs, of --mode={values["mode"]}: give that of '
            'one, VARIANT/seed_S of a comparison or an ablation, fold_I of a cross-validation or '
            'trial_NNNN of a sweep, whose best config is best_config.py.'
        )
    try:
        name, data_dir = values.pop('dataset_read'), values['dataset']['data_dir']
        values.pop(_DATA, None)
        grids = values['model']['stem_channels']
        values['dataset'] |= {'name': name, 'fallback': 'none'}
        # Where TFDS has the data may have changed; a folder that is gone is to be named.
        if name != 'folder' and not pathlib.Path(data_dir).is_dir():
            values['dataset']['data_dir'] = ''
        # JSON has no tuples, which command lines set.
        values['model']['stem_channels'] = tuple(map(tuple, grids))
    except (AttributeError, KeyError, TypeError) as error:
        raise BadInput(
            f'{workdir}/config.json is not the config of a training: it is damaged. Restore it, '
            'or give the directory of another run.'
        ) from error
    return ConfigDict(values)


def differences(theirs: Mapping, ours: Mapping) -> list[str]:
    """A line for each field in which two configs differ and which may not change in a run.

    Of data, only what both have read: one of them may be without a test, or of an earlier version.
    """
    theirs, ours = flatten(theirs), flatten(ours)
    lines = []
    for field in sorted(set(theirs) | set(ours)):
        their, our = (values.get(field, ABSENT) for values in (theirs, ours))
        is_unread = field.startswith(f'{_DATA}.') and ABSENT in (their, our)
        if field not in _FREE and their != our and not is_unread:
            if max(len(repr(their)), len(repr(our))) > LONGEST:
                field, their, our = first_difference(field, their, our)
            lines.append(f'  {field}: {shown(their)} there, {shown(our)} here')
    return lines


def other_data(workdir: str | os.PathLike, data: Mapping[str, object]) -> list[str] | None:
    """A line for each thing in which data differ from those that the run in a directory has read.

    None where the run, of an earlier version, does not say what data it has read.

    Args:
      workdir: of a run.
      data: from `datasets.fingerprints`.
    """
    values = read_json(pathlib.Path(workdir) / 'config.json')
    if _DATA not in values:
        return None
    read = {name: values[name] for name in ('dataset_read', _DATA)}
    return differences(read, definition({}, data))


def is_finished(workdir: str | os.PathLike) -> bool:
    """Whether the run, or the series of runs, in a directory is done and has its results."""
    return (pathlib.Path(workdir) / 'results.json').exists()


def check_tested(workdir: str | os.PathLike, images: str) -> None:
    """Raises `BadInput` where the run in a directory was tested again, on other images than these.

    Args:
      workdir: of a run, finished or not.
      images: the fingerprint of the test's, as in `datasets.fingerprints`.
    """
    path = pathlib.Path(workdir) / 'results.json'
    tested = read_json(path).get('evaluation_images', images) if path.exists() else images
    if tested != images:
        raise BadInput(
            f'the run in {workdir} was tested again, on {tested}, which are other images than '
            f'these ({images}), and its results are theirs. Test it on these: --mode=evaluate '
            f'--workdir={workdir} reads the data where its config.json says that they are.'
        )
