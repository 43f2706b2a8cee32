"""Signals: the first is remembered, the second ends the process."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from performer_vit import interruption
from tests.conftest import ROOT


@pytest.fixture
def interruptible():
    """As in a terminal, also where these tests run in the background and SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures('interruptible')
@pytest.mark.parametrize('number', interruption.SIGNALS)
def test_the_first_signal_is_remembered(number):
    """Nothing is interrupted, and the handlers are those from before afterwards."""
    before = [signal.getsignal(each) for each in interruption.SIGNALS]
    with pytest.raises(interruption.Interrupted, match='has saved'):
        with interruption.deferred() as asked:
            assert not asked()
            os.kill(os.getpid(), number)
            assert asked()
            raise interruption.Interrupted('This run has saved.')
    assert [signal.getsignal(each) for each in interruption.SIGNALS] == before


@pytest.mark.parametrize('number', interruption.SIGNALS)
def test_what_a_library_swallows_is_heard_by_the_next_run(number, monkeypatch):
    """Python drops what a handler raises within a callback, of a garbage collection for one.

    Catches a training that begins after it had been asked to stop, and a signal that is no longer
    ignored.
    """
    monkeypatch.setattr(interruption, '_heard', [])
    before = {each: signal.getsignal(each) for each in interruption.SIGNALS}
    other = next(each for each in interruption.SIGNALS if each != number)
    try:
        signal.signal(number, signal.default_int_handler)
        signal.signal(other, signal.SIG_IGN)
        interruption.listen()
        assert signal.getsignal(other) == signal.SIG_IGN
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            threading.Event().wait(10)
        with pytest.raises(interruption.Interrupted):
            with interruption.deferred() as asked:
                assert asked()
                raise interruption.Interrupted('This run has saved.')
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_a_signal_that_nobody_acted_on_is_not_swallowed():
    """Catches a series of runs that goes on with the next one."""
    with pytest.raises(interruption.Interrupted, match='was done first'):
        with interruption.deferred():
            os.kill(os.getpid(), signal.SIGTERM)


def test_without_a_signal_nothing_happens():
    with interruption.deferred() as asked:
        pass
    assert not asked()


def test_errors_pass():
    with pytest.raises(ZeroDivisionError):
        with interruption.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            raise ZeroDivisionError


def test_a_series_ends_with_the_run_that_was_asked():
    """Catches a sweep that begins the next trial, since the one that was asked to stop failed."""
    with pytest.raises(ZeroDivisionError) as asked:
        with interruption.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            raise ZeroDivisionError
    with pytest.raises(interruption.Interrupted, match='no other one begins'):
        interruption.end_series(interruption.was_asked(asked.value))
    with pytest.raises(ZeroDivisionError) as unasked:
        with interruption.deferred():
            raise ZeroDivisionError
    interruption.end_series(interruption.was_asked(unasked.value))


def test_an_ignored_signal_stays_ignored():
    """As `nohup` and shells have it for commands in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.deferred() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert not asked()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_may_train():
    """Catches a handler that Python refuses there."""
    seen = []

    def work():
        with interruption.deferred() as asked:
            seen.append(asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize('numbers', [(15, 15), (15, 2), (2, 15), (2, 2)])
def test_the_second_signal_ends_a_process_that_waits(numbers):
    """Within one long call, as a compilation is one, in which no handler of Python's is called."""
    code = f"""
import hashlib, os, signal, threading, time
from performer_vit import interruption

def ask_twice():
    for number in {numbers}:
        time.sleep(0.5)
        os.kill(os.getpid(), number)

signal.signal(signal.SIGINT, signal.default_int_handler)
with interruption.deferred() as asked:
    threading.Thread(target=ask_twice, daemon=True).start()
    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
"""
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 128 + numbers[1]
    first, second = filter(None, done.stderr.splitlines())
    assert first.startswith('Asked to stop: this run finishes what it is at, and saves the steps')
    assert second.startswith('Ended at once. The same command goes on')


def test_who_was_told_of_signals_is_told_again_afterwards():
    """Catches an event loop that no signal reaches any more, a thread and files that stay."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    threads, files = threading.active_count(), len(os.listdir('/proc/self/fd'))
    try:
        with interruption.deferred():
            assert signal.set_wakeup_fd(-1) not in (-1, writing)
        assert signal.set_wakeup_fd(before) == writing
    finally:
        os.close(reading)
        os.close(writing)
    assert threading.active_count() == threads
    assert len(os.listdir('/proc/self/fd')) == files - 2


@pytest.mark.parametrize('numbers', [(15, 15), (15, 2), (2, 15), (2, 2)])
def test_the_second_signal_ends_the_process(numbers):
    code = f"""
import os, signal
from performer_vit import interruption
signal.signal(signal.SIGINT, signal.default_int_handler)
with interruption.deferred() as asked:
    os.kill(os.getpid(), {numbers[0]})
    print(asked(), flush=True)
    os.kill(os.getpid(), {numbers[1]})
    print('still here')
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -numbers[1] and done.stdout == 'True\n', done.stderr


@pytest.mark.parametrize('number', interruption.SIGNALS)
@pytest.mark.parametrize('outcome, code', [('return', 0), ('raise KeyboardInterrupt', 75)])
def test_a_signal_at_the_very_end_does_not_spoil_the_exit_code(number, outcome, code):
    """While the interpreter ends it calls no handlers: catches a run that is done and "failed"."""
    program = f"""
import os, signal, sys
from absl import app
import run
from performer_vit import train

class Last:
    def __del__(self, kill=os.kill, process=os.getpid()):
        kill(process, {int(number)})

def action(*_):
    {outcome}

sys.modules['last'] = Last()
signal.signal(signal.SIGINT, signal.default_int_handler)
train.train = action
sys.argv = ['run.py', '--config=configs/performer_relu.py']
app.run(run._main, flags_parser=run.parse)
"""
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
