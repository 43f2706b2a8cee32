"""What a run that goes on takes out of TensorBoard's files, and what it leaves."""

import functools
import json
import os

import pytest
import tensorflow as tf
from clu import metric_writers

from performer_vit import events, progress
from tests.conftest import flip, make_tiny_config


def write(directory, values: dict[str, list[int]], hyperparameters: bool = False) -> None:
    """An event file with a scalar under each tag at each of its steps."""
    writer = metric_writers.SummaryWriter(str(directory))
    if hyperparameters:
        writer.write_hparams({'seed': 0})
    for tag, steps in values.items():
        for step in steps:
            writer.write_scalars(step, {tag: step / 2})
    writer.close()


def read(directory) -> list[tuple[str, int]]:
    """The tags and steps of all event files, by TensorFlow's own reader."""
    return sorted(
        (value.tag, event.step)
        for path in directory.glob('*tfevents*')
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    )


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_is_written_again_is_forgotten_and_the_rest_stays(tmp_path):
    """Catches a step on the wrong side of the boundary, and the loss of what others wrote."""
    write(tmp_path, {'train/loss': [3, 6, 9], 'epoch/seconds': [4, 8], 'mine': [0, 9]}, True)
    write(tmp_path, {'train/loss': [12], 'test/loss': [4]}, True)
    assert len(list(tmp_path.iterdir())) == 2
    events.forget_after(tmp_path, 8)
    assert read(tmp_path) == [
        ('epoch/seconds', 4), ('epoch/seconds', 8), ('mine', 0), ('mine', 9),
        ('train/loss', 3), ('train/loss', 6),
    ]  # fmt: skip
    # The second file would be empty.
    assert len(list(tmp_path.iterdir())) == 1
    before = contents(tmp_path)
    events.forget_after(tmp_path, 8)
    assert contents(tmp_path) == before


def test_without_a_checkpoint_nothing_of_the_run_stays(tmp_path):
    write(tmp_path, {'train/loss': [3, 6], 'epoch/seconds': [4]}, True)
    (tmp_path / 'config.json').write_text('{}')
    events.forget_after(tmp_path, 0)
    assert contents(tmp_path) == {'config.json': b'{}'}


@pytest.mark.parametrize('lost', [1, 5, 20])
def test_half_a_record_goes(tmp_path, lost):
    """A killed process leaves one, behind which TensorBoard would read nothing more."""
    write(tmp_path, {'train/loss': [3, 6]})
    (path,) = tmp_path.iterdir()
    os.truncate(path, path.stat().st_size - lost)
    events.forget_after(tmp_path, 8)
    assert read(tmp_path) == [('train/loss', 3)]


def test_other_files_are_not_touched(tmp_path):
    """Catches rewriting what needs none: the files of another program, and directories below."""
    write(tmp_path, {'theirs/loss': [3, 60]})
    (tmp_path / 'trial').mkdir()
    write(tmp_path / 'trial', {'train/loss': [60]})
    (path,) = tmp_path.glob('*tfevents*')
    before = path.read_bytes(), path.stat().st_ino
    events.forget_after(tmp_path, 8)
    assert (path.read_bytes(), path.stat().st_ino) == before
    assert read(tmp_path / 'trial') == [('train/loss', 60)]


EXPECTED = [[3, {'train/loss': 1.5}], [4, {'epoch/seconds': 2.0}], [6, {'train/loss': 3.0}]]


def test_what_is_missing_is_counted(tmp_path):
    """In all files together. Catches a value that hides behind a damaged record."""
    assert events.missing(tmp_path, EXPECTED) == 3
    write(tmp_path, {'train/loss': [3, 6, 9]})
    assert events.missing(tmp_path, EXPECTED) == 1
    write(tmp_path, {'epoch/seconds': [4]})
    assert events.missing(tmp_path, EXPECTED) == 0
    first = min(tmp_path.iterdir(), key=lambda path: path.name)
    flip(first)
    assert 0 < events.missing(tmp_path, EXPECTED) < 3
    assert events.missing(tmp_path, []) == 0


def test_what_the_checkpoint_does_not_have_stays(tmp_path):
    """The values of an earlier version, where others have to be written anew."""
    write(tmp_path, {'train/loss': [1, 2, 3, 9], 'epoch/seconds': [2, 4]})
    events.forget_after(tmp_path, 8, {('train/loss', 3), ('epoch/seconds', 4), ('train/loss', 6)})
    assert read(tmp_path) == [('epoch/seconds', 2), ('train/loss', 1), ('train/loss', 2)]


@pytest.mark.parametrize('lost', ['nothing', 'a bit', 'half a file', 'the file'])
def test_what_was_lost_is_shown_anew(tmp_path, lost, capsys):
    """Each value once and in the order of steps, with the numbers that were shown first."""
    config = make_tiny_config()
    create = functools.partial(progress.Progress, tmp_path, 'digits', 'tiny', config)
    shown = create(0, 12)
    for step in (3, 6, 9):
        shown.steps_done(step, {'loss': 1 / step})
    kept = json.loads(json.dumps(shown.scalars[:2]))  # Of a checkpoint after step 6.
    shown.close()
    (path,) = tmp_path.iterdir()
    before = events.scalars(tmp_path)
    if lost == 'a bit':
        flip(path)
    elif lost == 'half a file':
        os.truncate(path, path.stat().st_size // 2)
    elif lost == 'the file':
        path.unlink()
    shown = create(6, 12, kept)
    shown.steps_done(9, {'loss': 1 / 9})
    shown.close()
    after = events.scalars(tmp_path)
    assert [step for tag, step, _ in after if tag == 'train/loss'] == [3, 6, 9]
    times = 'train/images_per_second'
    assert [each for each in after if each[:2] != (times, 9)] == [
        each for each in before if each[:2] != (times, 9)
    ]
    assert [step for step, _ in shown.scalars] == [3, 6, 9]
    assert ('files lack' in capsys.readouterr().out) == (lost != 'nothing')
