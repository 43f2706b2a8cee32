"""Files written whole or not at all, and disks that take nothing more."""

import errno
import os

import pytest

from performer_vit import files


def test_the_new_content_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / 'results.json'
    for content in ('old', 'new'):
        with files.replacing(path) as temporary:
            temporary.write_text(content)
    assert path.read_text() == 'new' and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path):
    """Catches half a file that takes the place of a whole one, and rubbish beside it."""
    path = tmp_path / 'results.json'
    path.write_text('old')
    with pytest.raises(KeyboardInterrupt):
        with files.replacing(path) as temporary:
            temporary.write_text('ne')
            raise KeyboardInterrupt
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_goes_and_nothing_else(tmp_path):
    pid = os.fork()
    if not pid:
        with files.replacing(tmp_path / 'history.csv') as temporary:
            temporary.write_text('half')
            os._exit(0)
    os.waitpid(pid, 0)
    assert len(list(tmp_path.iterdir())) == 1
    others = {tmp_path / name for name in ('.mine.unfinished', 'history.csv', '.training.lock')}
    for path in others:
        path.write_text('mine')
    files.remove_unfinished(tmp_path)
    assert set(tmp_path.iterdir()) == others


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a device of Linux')
def test_a_full_disk_is_told_however_it_is_wrapped():
    with pytest.raises(OSError) as error:
        with open('/dev/full', 'wb', buffering=0) as file:
            file.write(b'1')
    assert files.no_room(error.value) == os.strerror(errno.ENOSPC)
    try:
        raise RuntimeError('the writer gave up') from error.value
    except RuntimeError as wrapped:
        assert files.no_room(wrapped) == os.strerror(errno.ENOSPC)
    # As TensorStore, which Orbax writes with, says it.
    told = ValueError("RESOURCE_EXHAUSTED: Failed writing: '/x': No space left on device")
    assert files.no_room(told) == os.strerror(errno.ENOSPC)


def test_other_errors_are_no_full_disk():
    for error in (None, ValueError('RESOURCE_EXHAUSTED: out of memory'), PermissionError(13, 'no')):
        assert files.no_room(error) is None


def test_errors_that_came_of_each_other():
    """As where one is raised again while what came of it is handled. Catches a search for ever."""
    first, second = ValueError('one'), ValueError('two')
    first.__context__, second.__cause__ = second, first
    assert files.no_room(first) is None
