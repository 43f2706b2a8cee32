"""What happens when a training is asked to stop: it finishes its step and saves before it ends."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command goes on. Neither of the shell's
# own codes for signals (130, 143), which say nothing about what was saved.
EXIT_CODE = 75


class Interrupted(KeyboardInterrupt):
    """A training was asked to stop, and has saved what the same command goes on from."""


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGINT or SIGTERM is only remembered; the next ends the process at once.

    Yields a function that says whether there was one. Whoever acts on it raises `Interrupted`;
    where nobody did, the end of the block does. A signal that was ignored before is ignored still.
    Python gives signals to the main thread alone, so in another one nothing is deferred.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # None: a handler that is not Python's, which could not be put back.
    ours = [number for number in SIGNALS if before[number] not in (signal.SIG_IGN, None)]
    received = []

    def remember(number: int, _) -> None:
        received.append(number)
        for each in ours:
            signal.signal(each, signal.SIG_DFL)

    for number in ours:
        signal.signal(number, remember)
    try:
        yield lambda: bool(received)
    finally:
        for number in ours:
            signal.signal(number, before[number])
    if received:
        raise Interrupted('Asked to stop, this run was done first.')
