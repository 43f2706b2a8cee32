"""Files that are written whole or not at all, and why one could not be."""

import contextlib
import errno
import os
import pathlib
import tempfile
import uuid
from collections.abc import Iterator, Sequence

# A disk that is full, a quota that is used up, a disk that became read-only.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Other rights, too many files open, no memory, a file server that does not answer or was restarted:
# nothing is wrong with a file.
_NO_ACCESS = (
    errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT,
    errno.ESTALE,
)  # fmt: skip
_UNFINISHED = '.unfinished'


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields where to write what takes the place of a file in one step, at the end of the block.

    A reader or a crash meets the old content or the new, never a part. Where the block raises, the
    old file stays as it was.
    """
    path = pathlib.Path(path)
    # Nothing of the file's own name: TensorBoard reads whatever has `tfevents` in it.
    temporary = path.with_name(f'.{uuid.uuid4().hex}{_UNFINISHED}')
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def try_to_write(directory: str | os.PathLike) -> None:
    """Raises `OSError` unless files can be made in a directory; leaves none there."""
    with tempfile.TemporaryFile(dir=directory):
        pass


def is_text(value: object) -> bool:
    """Whether it is a text that a file of text can hold and that can be part of a path."""
    try:
        return isinstance(value, str) and b'\0' not in value.encode('utf-8')
    except UnicodeEncodeError:  # Half a character, as Python makes of a path that is no UTF-8.
        return False


def remove_unfinished(directory: pathlib.Path) -> None:
    """Removes what a process left that was killed within `replacing`; none may be at it now."""
    for path in directory.glob(f'.{"[0-9a-f]" * 32}{_UNFINISHED}'):
        path.unlink(missing_ok=True)


def no_room(error: BaseException | None) -> str | None:
    """What the operating system said, if an error came of a disk that takes nothing more."""
    return _said(error, _NO_ROOM)


def no_access(error: BaseException | None) -> str | None:
    """What the operating system said, if an error came of a file that it did not let be read."""
    return _said(error, _NO_ACCESS)


def kept_from_reading(directory: str | os.PathLike) -> str | None:
    """What the operating system says against reading what is below a directory; None: nothing.

    Some libraries take a file that they may not see for one that is not there.
    """

    def refuse(error: OSError) -> None:
        raise error

    try:
        for parent, _, names in os.walk(directory, onerror=refuse):
            for name in names:
                open(os.path.join(parent, name), 'rb').close()
    except OSError as error:
        return no_access(error)
    return None


def _said(error: BaseException | None, numbers: Sequence[int]) -> str | None:
    """The operating system's words for the first of its errors that an error came of.

    The libraries that read and write raise errors of their own kinds, from threads of their own; so
    the text counts too, and so do the errors that one came from.
    """
    seen = []
    # An error that is raised again while another is handled that came of it makes a circle.
    while error is not None and error not in seen:
        for number in numbers:
            reason = os.strerror(number)
            if getattr(error, 'errno', None) == number or reason in str(error):
                return reason
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None
