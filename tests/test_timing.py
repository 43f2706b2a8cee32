"""How contenders take turns and how their calls are counted; no test asserts on a clock."""

import types

import pytest

from performer_vit import timing


def test_contenders_alternate():
    """Catches contenders that run one after the other, which drift would favour."""
    order = []

    def contender(name):
        return lambda: order.append(name) or float(len(order))

    contenders = {'a': contender('a'), 'b': contender('b')}
    measured = timing.alternate(contenders, 3, lambda number: order.append(number))
    assert order == [1, 'a', 'b', 2, 'a', 'b', 3, 'a', 'b']
    assert measured == {'a': [2.0, 5.0, 8.0], 'b': [3.0, 6.0, 9.0]}
    assert timing.spread([3.0, 1.0, 2.0]) == {'median': 2.0, 'low': 1.0, 'high': 3.0}


@pytest.mark.parametrize(('seconds', 'count'), [(0.03, 7), (0.5, 1)])
def test_short_calls_are_repeated_and_averaged(monkeypatch, seconds, count):
    """Catches a turn that is too short to measure, and one that reports the sum of its calls.

    The clock is made up: it moves when the contender is called, and when it sleeps.
    """
    clock = types.SimpleNamespace(now=0.0, calls=0)

    def pass_time(amount):
        clock.now += amount

    def call():
        clock.calls += 1
        pass_time(seconds)

    fake = types.SimpleNamespace(perf_counter=lambda: clock.now, sleep=pass_time)
    monkeypatch.setattr(timing, 'time', fake)
    measure = timing.repeated(call)
    assert clock.calls == 2
    assert measure() == pytest.approx(seconds)
    assert clock.calls == 2 + 1 + count
