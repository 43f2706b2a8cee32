"""Locks between processes that no crash can leave behind."""

import os
from typing import IO


def take(path: str | os.PathLike, *, wait: bool) -> IO | None:
    """Takes the lock that a file stands for, until the returned file is closed.

    The kernel lets go of it when the process dies, however it dies, so a lock that can be taken is
    nobody's. It holds between processes of one machine, and of several where their common file
    system keeps `flock`.

    Args:
      path: of the file, which is made where it is missing and is never removed.
      wait: whether to wait for another process, or to return None at once.
    """
    import fcntl  # Not on Windows, where sweeps need it and trainings go without.

    file = open(path, 'a')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file
