"""Timing contenders in turn, and the machine's matrix-product peak beside them.

A machine's speed drifts, so contenders of one run alternate round by round; a ratio of two of them
is taken within each round.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping

import jax
import jax.numpy as jnp

PEAK_SIZE = 4096  # Side of the square float32 product that stands for the machine's peak.

TURN_SECONDS = 0.2  # Short calls are repeated within a turn until they fill this much.
# Before a turn: a thread pool that has done its work spins for some milliseconds before it sleeps.
PAUSE_SECONDS = 0.02


def alternate(
    contenders: Mapping[Hashable, Callable[[], float]],
    rounds: int,
    on_round: Callable[[int], None] = lambda number: None,
) -> dict[Hashable, list[float]]:
    """Lets every contender run once a round, in turn, and collects what each returns.

    `on_round` hears the number of each round, from 1, before it begins.
    """
    measured = {name: [] for name in contenders}
    for number in range(1, rounds + 1):
        on_round(number)
        for name, contender in contenders.items():
            measured[name].append(contender())
    return measured


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest of repeated measurements."""
    return {'median': statistics.median(values), 'low': min(values), 'high': max(values)}


def spread_text(value: Mapping[str, float], pattern: str, factor: float = 1) -> str:
    """What `spread` returns, times `factor`, as 'median (low to high)', each by `pattern`."""
    median, low, high = (pattern.format(factor * value[end]) for end in ('median', 'low', 'high'))
    return f'{median} ({low} to {high})'


def repeated(call: Callable[[], object]) -> Callable[[], float]:
    """A contender that returns the seconds of a call, as the mean over a turn of some calls.

    The call must return only when its result is there. It is made twice here, once to warm up and
    once to find how many fill `TURN_SECONDS`. Every turn begins with a call that does not count:
    what the contender before it left in the caches and the allocator is not this one's fault.
    """
    call()
    count = max(1, round(TURN_SECONDS / _seconds(call, 1)))

    def measure() -> float:
        time.sleep(PAUSE_SECONDS)
        call()
        return _seconds(call, count)

    return measure


def matmul_peak() -> Callable[[], float]:
    """A contender that returns the FLOP/s of dense float32 products of side `PEAK_SIZE`.

    Of one product, times the accelerators of this process; the devices of a CPU share its cores.
    """
    devices = 1 if jax.default_backend() == 'cpu' else jax.local_device_count()
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (PEAK_SIZE, PEAK_SIZE)) for key in keys)
    product = jax.jit(jnp.matmul).lower(a, b).compile()
    jax.block_until_ready(product(a, b))

    def measure() -> float:
        started = time.perf_counter()
        jax.block_until_ready(product(a, b))
        return 2 * devices * PEAK_SIZE**3 / (time.perf_counter() - started)

    return measure


def _seconds(call: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count
