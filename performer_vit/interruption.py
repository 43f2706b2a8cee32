"""What happens when a training is asked to stop: it finishes its step and saves before it ends."""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command goes on. Neither of the shell's
# own codes for signals (130, 143), which say nothing about what was saved.
EXIT_CODE = 75


# What `heard` has heard: what it raises may be lost in a callback of a library's.
_heard = []


class Interrupted(KeyboardInterrupt):
    """A training was asked to stop, and has saved what the same command goes on from."""


def listen() -> None:
    """From here on both signals interrupt the program outside of `deferred`, which hears of them.

    For the beginning of a program. A signal that was ignored before is ignored still.
    """

    def heard(number: int, _) -> None:
        _heard.append(number)
        raise KeyboardInterrupt

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, heard)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGINT or SIGTERM is only remembered; the next ends the process at once.

    Yields a function that says whether there was one. Whoever acts on it raises `Interrupted`;
    where nobody did, the end of the block does. An error passes, and `was_asked` tells whoever goes
    on after it. A signal that was ignored before is ignored still.
    Python gives signals to the main thread alone, so in another one nothing is deferred.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # None: a handler that is not Python's, which could not be put back.
    ours = [number for number in SIGNALS if before[number] not in (signal.SIG_IGN, None)]
    received = list(_heard)

    def remember(number: int, _) -> None:
        received.append(number)
        for each in ours:
            signal.signal(each, signal.SIG_DFL)

    for number in ours:
        signal.signal(number, remember)
    try:
        with _ending_at_the_second(ours):
            yield lambda: bool(received)
    except Exception as error:
        error.asked_to_stop = bool(received)
        raise
    finally:
        for number in ours:
            signal.signal(number, before[number])
    if received:
        raise Interrupted('Asked to stop, this run was done first.')


def was_asked(error: Exception) -> bool:
    """Whether the run that this error ended had also been asked to stop, within `deferred`."""
    return getattr(error, 'asked_to_stop', False)


def end_series(asked: bool) -> None:
    """Raises `Interrupted` where a run `was_asked` to stop that had ended by an error.

    For whoever would begin the next run, which does not hear of that signal.
    """
    if asked:
        raise Interrupted('Asked to stop, this run had ended, and no other one begins.')


@contextlib.contextmanager
def _ending_at_the_second(numbers: Sequence[int]) -> Iterator[None]:
    """Within, the second signal ends the process with 128 + its number, whatever Python waits for.

    The first is answered by a line on the standard error at once.

    Python calls a handler only between two operations of its own, so not while XLA compiles; but it
    writes the number of each signal to a file at once, which a thread reads here.
    """
    if os.name == 'nt':  # Windows writes to sockets alone.
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        with open(reading, 'rb', buffering=0) as signals:
            first = True
            while number := signals.read(1)[0]:  # 0: no signal, but the end of the block.
                if number in numbers:
                    if not first:
                        _tell('Ended at once. The same command goes on from what was saved before.')
                        os._exit(128 + number)
                    first = False
                    _tell(
                        'Asked to stop: this run finishes what it is at, and saves the steps that '
                        'it has done. A second signal ends it at once.'
                    )

    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name='second signal', daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writing, b'\0')
        thread.join()
        os.close(writing)


def _tell(line: str) -> None:
    """Writes a line below the bar of progress; Python's own stream may be in use, or be closed."""
    if sys.__stderr__ is None:  # Closed from the start; the number may be another file's.
        return
    with contextlib.suppress(OSError):
        # A terminal that is halted, or a pipe that nobody reads, must not keep the second signal.
        if select.select([], [2], [], 0)[1]:
            os.write(2, f'\n{line}\n'.encode())
