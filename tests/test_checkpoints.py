"""Checkpoints that are damaged on disk: noticed, named, and gone around."""

import errno
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn

from performer_vit import chaos, checkpoints
from performer_vit.checkpoints import Checkpoints
from performer_vit.errors import BadInput
from tests.conftest import ROOT, flip

STEPS = (8, 16, 24)


def create_template():
    return checkpoints.create_state(
        nn.Dense(3), optax.adam(1e-3), image_shape=(4, 4, 2), seed=0, ema=True
    )


@pytest.fixture(scope='module')
def template():
    return create_template()


def state_of(template, step):
    moved = jax.tree.map(lambda leaf: leaf + leaf.dtype.type(0.5 * step), template.params)
    return template.replace(step=jnp.int32(step), params=moved)


def scalars_of(step):
    return [[n, {'train/loss': 1 / n, 'train/images_per_second': 1e3}] for n in range(4, step, 4)]


def history_of(step):
    return [{'epoch': n, 'step': n, 'validation_accuracy': 0.1 * n} for n in range(8, step + 1, 8)]


@pytest.fixture(scope='module')
def written(template, tmp_path_factory):
    """Three checkpoints, the second of them in the middle of an epoch."""
    directory = tmp_path_factory.mktemp('run') / 'checkpoints'
    manager = Checkpoints(directory, 3, every_epochs=1)
    for step, seconds in zip(STEPS, (None, 1.25, None), strict=True):
        manager.save(state_of(template, step), history_of(step), scalars_of(step), seconds)
    manager.close()
    return directory


def test_arrays_of_other_shapes_are_another_state(written, template):
    """Orbax fits them into the template: catches a head of four classes that is one of five."""
    wider = checkpoints.create_state(
        nn.Dense(5), optax.adam(1e-3), image_shape=(4, 4, 2), seed=0, ema=True
    )
    manager = Checkpoints(written, 3, every_epochs=1)
    try:
        with pytest.raises(BadInput, match='step 24 .* holds another state .* other classes'):
            manager.restore(wider, 24)
        manager.restore(template, 24)
    finally:
        manager.close()


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / 'run' / 'checkpoints')


def latest(directory, template):
    """What is restored, and the warnings."""
    warnings = []
    manager = Checkpoints(directory, 3, every_epochs=1)
    try:
        return manager.restore_latest(template, warnings.append), warnings
    finally:
        manager.close()


def is_whole(saved, template, step):
    expected = state_of(template, step)
    same = jax.tree.map(
        lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype, saved.state, expected
    )
    beside = saved.history == history_of(step) and saved.scalars == scalars_of(step)
    return all(jax.tree.leaves(same)) and beside


def files_of(directory, step):
    files = sorted(path for path in (directory / f'{step}').rglob('*') if path.is_file())
    assert len(files) > 5
    return [path for path in files if path.stat().st_size]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_what_is_written_comes_back(written, template):
    saved, warnings = latest(written, template)
    assert is_whole(saved, template, 24) and saved.seconds == 0.0 and not warnings
    manager = Checkpoints(written, 3, every_epochs=1)
    middle = manager.restore(template, 16)
    manager.close()
    assert is_whole(middle, template, 16) and middle.seconds == 1.25


@pytest.mark.parametrize('damage', [truncate, flip])
def test_every_file_of_the_newest_may_be_damaged(written, template, tmp_path, damage):
    """What is restored is what was written, of the newest or of the one before.

    Where it is the one before, the newest is named and lies elsewhere, as it is. Catches numbers
    that are read as they happen to lie there, and a checkpoint that is thrown away.
    """
    gone_around = 0
    for number, file in enumerate(files_of(written, 24)):
        directory = shutil.copytree(written, tmp_path / f'{number}' / 'checkpoints')
        path = directory / file.relative_to(written)
        damage(path)
        content = path.read_bytes()
        saved, warnings = latest(directory, template)
        aside = directory.with_name('damaged_checkpoints') / '24'
        if not warnings:
            assert is_whole(saved, template, 24), file
            assert not aside.exists()
            continue
        gone_around += 1
        assert is_whole(saved, template, 16), file
        (warning,) = warnings
        assert f'checkpoint of step 24 in {directory}' in warning and 'step 16 is used' in warning
        assert f'It is in {aside} now' in warning
        assert (aside / file.relative_to(written / '24')).read_bytes() == content
    assert gone_around >= 2  # Of the files that hold numbers, at the least.


def test_a_step_whose_checkpoint_was_damaged_is_saved_anew(copied, template):
    """Catches a manager that takes the step for saved, and a second one that finds no name."""
    for expected in ('24', '24-2'):
        shutil.rmtree(copied / '24' / 'state')
        latest(copied, template)
        assert (copied.with_name('damaged_checkpoints') / expected).is_dir()
        manager = Checkpoints(copied, 3, every_epochs=1)
        manager.save(state_of(template, 24), history_of(24), scalars_of(24))
        manager.close()
        saved, warnings = latest(copied, template)
        assert is_whole(saved, template, 24) and not warnings


def test_where_all_are_damaged_nothing_is_touched(copied, template):
    for step in STEPS:
        shutil.rmtree(copied / f'{step}' / 'state')
    with pytest.raises(BadInput, match=r'checkpoint of step 24 .* is damaged .*restore it from'):
        latest(copied, template)
    assert sorted(path.name for path in copied.iterdir()) == ['16', '24', '8']
    assert not copied.with_name('damaged_checkpoints').exists()


@pytest.mark.parametrize('number', [errno.EACCES, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize('kind', ['as Python has it', 'as TensorStore has it'])
def test_what_cannot_be_read_is_not_damaged(copied, template, monkeypatch, number, kind):
    """Catches an hour that is trained again since someone had lost a right for a while."""
    reason = os.strerror(number)
    if kind == 'as Python has it':
        error = OSError(number, reason)
    else:
        error = ValueError(
            f'PERMISSION_DENIED: Error opening "manifest.ocdbt" [OS error: {reason}]'
        )

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, 'restore', refuse)
    with pytest.raises(BadInput, match=rf'step 24 .* cannot be read \({reason}\).*same command'):
        latest(copied, template)
    assert sorted(path.name for path in copied.iterdir()) == ['16', '24', '8']
    monkeypatch.undo()
    saved, warnings = latest(copied, template)
    assert is_whole(saved, template, 24) and not warnings


def test_too_many_open_files(copied, template):
    """As the libraries really say it: catches a message that has none of the known reasons.

    In a process of its own, since pytest opens files as well.
    """
    program = f"""
import os, resource
from tests import test_checkpoints
from performer_vit import checkpoints

template = test_checkpoints.create_template()
manager = checkpoints.Checkpoints({str(copied)!r}, 3, every_epochs=1)
manager.restore(template, 8)  # Imports.
free = os.open(os.devnull, os.O_RDONLY)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
message = 'restored'
try:
    manager.restore_latest(template, print)
except checkpoints.BadInput as error:
    message = error
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(message)
manager.close()
"""
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    (said,) = done.stdout.splitlines()
    assert re.search(r'step 24 in .* cannot be read \(Too many open files\)', said), done
    saved, warnings = latest(copied, template)
    assert is_whole(saved, template, 24) and not warnings


def test_what_has_no_rights_is_not_damaged(copied, template):
    """Real rights, of directories and files. Catches libraries that take what they may not see for
    missing. Root may read all, but not in a name space of its own that does not know it."""
    before = ['unshare', '--user'] if not os.geteuid() else []
    if before and not chaos.may_mount():
        pytest.skip('this system has no name spaces for users')
    (arrays,) = (path for path in (copied / '24' / 'state').glob('d/*') if path.is_file())
    paths = [copied / '24' / name for name in ('', 'state', 'history', 'state/_METADATA')]
    paths += [arrays, copied]
    program = f"""
import os, pathlib
from tests import test_checkpoints
from performer_vit import checkpoints

template = test_checkpoints.create_template()
for path in {[str(path) for path in paths]}:
    rights = os.stat(path).st_mode
    os.chmod(path, 0)
    try:
        test_checkpoints.latest(pathlib.Path({str(copied)!r}), template)
        print('restored')
    except checkpoints.BadInput as error:
        print(error)
    finally:
        os.chmod(path, rights)
"""
    done = subprocess.run(
        [*before, sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True
    )
    said = done.stdout.splitlines()
    assert len(said) == len(paths), done
    for path, line in zip(paths, said, strict=True):
        assert 'cannot be read (Permission denied)' in line, path
    assert not copied.with_name('damaged_checkpoints').exists()
    saved, warnings = latest(copied, template)
    assert is_whole(saved, template, 24) and not warnings


def test_earlier_versions_kept_no_scalars(copied, template, monkeypatch):
    """Catches a run of theirs that is taken for damaged."""
    real = ocp.CheckpointManager.restore

    def without(*arguments, **named):
        restored = real(*arguments, **named)
        del restored.history['scalars']
        return restored

    monkeypatch.setattr(ocp.CheckpointManager, 'restore', without)
    monkeypatch.setattr(checkpoints, '_digest', lambda state, progress: 'the same')
    manager = Checkpoints(copied, 3, every_epochs=1)
    manager.save(state_of(template, 32), history_of(32), [])
    manager.wait()
    assert manager.restore(template, 32).scalars == []
    manager.close()


def test_where_there_are_none_the_run_begins(tmp_path, template):
    assert latest(tmp_path / 'checkpoints', template) == (None, [])


def test_a_step_that_is_asked_for_is_never_another(copied, template):
    """What was tested is evaluated again, or nothing."""
    shutil.rmtree(copied / '24' / 'state')
    manager = Checkpoints(copied, 3, every_epochs=1)
    with pytest.raises(BadInput, match=r'checkpoint of step 24 .* is damaged'):
        manager.restore(template, 24)
    manager.close()


def test_what_was_the_best_before_the_newest_is_still_there(template, tmp_path):
    """Where the newest is damaged and trained again otherwise, it may become the best again."""
    accuracies = {8: 0.5, 16: 0.9, 24: 0.3, 32: 0.4, 40: 0.95, 48: 0.1}
    rows = [
        {'epoch': step // 8, 'step': step, 'validation_accuracy': accuracy}
        for step, accuracy in accuracies.items()
    ]
    manager = Checkpoints(tmp_path, 2, every_epochs=1)
    kept = []
    for count, step in enumerate(accuracies, 1):
        manager.save(state_of(template, step), rows[:count], [])
        manager.wait()
        kept.append(manager.steps())
    assert kept == [[8], [8, 16], [16, 24], [16, 24, 32], [16, 32, 40], [40, 48]]
    manager.close()


def test_the_middle_of_an_epoch_is_never_the_best(template, tmp_path):
    """Catches a checkpoint without a validation of its own that displaces the best one."""
    manager = Checkpoints(tmp_path, 1, every_epochs=1)
    rows = history_of(8)
    manager.save(state_of(template, 8), rows, [])
    for step in (10, 12, 14):
        manager.save(state_of(template, step), rows, [], 0.5)
    manager.close()
    manager = Checkpoints(tmp_path, 1, every_epochs=1)
    assert manager.steps() == [8, 14]
    assert manager.best(rows)['step'] == 8
    manager.close()
