"""Batches of a split in memory, by index look-up alone.

Global batch number `step` is a pure function of (seed, step): a run that is resumed at any step
sees the batches that it would have seen, and so does a run on another number of devices.
"""

import collections
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from performer_vit import cluster
from performer_vit.datasets import Split
from performer_vit.errors import BadInput

# Batches on their way to the devices: one in use, one behind it.
_PREFETCH = 2


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which epoch number `epoch` visits the n examples.

    The permutation that sorts n draws of 64 bits from the counter-based generator Philox (Salmon
    et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the key (seed, epoch). NumPy
    keeps this stream of bits fixed across its versions, unlike `Generator.permutation`.

    Args:
        seed: from 0 to 2**64 - 1.
        epoch: from 0.
        n: number of examples.

    Returns:
        (n,) int64, a permutation of 0 … n - 1, read-only because it is cached.

    Raises:
        BadInput: seed out of range.
    """
    if not 0 <= seed < 2**64:
        raise BadInput(
            f'The seed of the batch order is {seed!r}; allowed are integers from 0 to 2**64 - 1. '
            'Choose one of these.'
        )
    draws = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    order = np.argsort(draws, kind='stable')
    order.setflags(write=False)
    return order


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches per epoch, ⌊n / batch_size⌋: the rest of each epoch's order is dropped."""
    return n // batch_size


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """The examples of global batch number `step`, counted from 0 over all epochs.

    Args:
        seed: see `epoch_order`.
        step: from 0.
        batch_size: B, the size of the global batch, at most n.
        n: number of examples.

    Returns:
        (B,) int64 indices, without repetition within an epoch.

    Raises:
        BadInput: seed out of range.
    """
    epoch, batch = divmod(step, steps_per_epoch(n, batch_size))
    return epoch_order(seed, epoch, n)[batch * batch_size : (batch + 1) * batch_size]


def check_batch_size(batch_size: int, num_devices: int, n: int | None = None) -> None:
    """Raises `BadInput` unless batches of this size can be made.

    Args:
        batch_size: size of the global batch; a positive multiple of `num_devices`.
        num_devices: devices of all processes together.
        n: number of examples, which the batch must not exceed; None where batches are padded.
    """
    if batch_size < 1 or batch_size % num_devices:
        raise BadInput(
            f'batch_size is {batch_size!r}; allowed are positive multiples of the number of '
            f'devices, {num_devices}. The nearest is '
            f'{max(1, round(batch_size / num_devices)) * num_devices}. (A CPU is one device with '
            'XLA_FLAGS=--xla_force_host_platform_device_count=1.)'
        )
    if n is not None and batch_size > n:
        raise BadInput(
            f'batch_size is {batch_size} and there are {n} images to train on; allowed are at most '
            'as many. Choose a smaller batch.'
        )


def shard_positions(
    batch_size: int, local_devices: int, process_index: int, process_count: int
) -> np.ndarray:
    """Which positions of the global batch each device of one process holds.

    The global batch is cut into equal consecutive runs, one per device: the devices of process 0
    first, then those of process 1, and so on. Every process has the same number of devices.

    Args:
        batch_size: B, a multiple of local_devices · process_count.
        local_devices: L, devices of this process.
        process_index: from 0 to process_count - 1.
        process_count: P.

    Returns:
        (L, B / (L·P)) int32.
    """
    per_process = np.arange(batch_size, dtype=np.int32).reshape(process_count, local_devices, -1)
    return per_process[process_index]


def train_batches(
    split: Split,
    *,
    seed: int,
    batch_size: int,
    first_step: int,
    num_steps: int,
    devices: Sequence[jax.Device] | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """The shuffled batches of the steps first_step … first_step + num_steps - 1.

    Args:
        split: the training part, in memory.
        seed: the order is a pure function of (seed, step); see `batch_indices`.
        batch_size: B, the size of the global batch.
        first_step: number of the first batch, counted from 0 over all epochs.
        num_steps: how many batches.
        devices: the L devices of this process; None means all of them, in the order of `jax.pmap`.
        process_index: this process among those that share each batch; None means JAX's own.
        process_count: how many processes, P; None means JAX's own.

    Returns:
        An iterator of dicts, already on the devices, two batches ahead:
        image (L, B/(L·P), h, w, c) uint8, and (L, B/(L·P)) int32 each of label, position (of the
        example in the global batch) and index (of the example in the split).

    Raises:
        BadInput: at once, before the first batch: batch_size larger than the split or not a
            multiple of the number of devices, seed out of range.
    """
    local, index, count = _topology(devices, process_index, process_count)
    check_batch_size(batch_size, local * count, len(split))
    epoch_order(seed, 0, len(split))  # An impossible seed is refused here, not at the first batch.
    positions = shard_positions(batch_size, local, index, count)

    def batches():
        for step in range(first_step, first_step + num_steps):
            chosen = batch_indices(seed, step, batch_size, len(split))[positions]
            yield {
                'image': split.images[chosen],
                'label': split.labels[chosen],
                'position': positions,
                'index': chosen.astype(np.int32),
            }

    return _prefetch(batches(), devices)


def eval_batches(
    split: Split,
    *,
    batch_size: int,
    devices: Sequence[jax.Device] | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """All examples once, in order, in batches of one shape; the last batch is padded.

    Args:
        split: the split, in memory.
        batch_size: B, the size of the global batch; it may exceed the split.
        devices: see `train_batches`.
        process_index: see `train_batches`.
        process_count: see `train_batches`.

    Returns:
        An iterator of dicts, already on the devices, two batches ahead:
        image (L, B/(L·P), h, w, c) uint8, label (L, B/(L·P)) int32 and weight (L, B/(L·P)) float32,
        1 for an example and 0 for padding, which repeats the split's last example.

    Raises:
        BadInput: at once: batch_size not a multiple of the number of devices.
    """
    local, index, count = _topology(devices, process_index, process_count)
    check_batch_size(batch_size, local * count)
    positions = shard_positions(batch_size, local, index, count)

    def batches():
        for start in range(0, len(split), batch_size):
            chosen = start + positions
            weight = (chosen < len(split)).astype(np.float32)
            chosen = np.minimum(chosen, len(split) - 1)
            yield {'image': split.images[chosen], 'label': split.labels[chosen], 'weight': weight}

    return _prefetch(batches(), devices)


def _prefetch(
    batches: Iterator[dict], devices: Sequence[jax.Device] | None
) -> Iterator[dict[str, jax.Array]]:
    """The batches on the devices, some ahead, so that transfers and steps go beside each other."""
    ahead = collections.deque()
    for batch in batches:
        ahead.append(cluster.over_devices(batch, devices))
        if len(ahead) > _PREFETCH:
            yield ahead.popleft()
    yield from ahead


def _topology(
    devices: Sequence[jax.Device] | None, process_index: int | None, process_count: int | None
) -> tuple[int, int, int]:
    """(devices of this process, its index, number of processes)."""
    return (
        jax.local_device_count() if devices is None else len(devices),
        jax.process_index() if process_index is None else process_index,
        jax.process_count() if process_count is None else process_count,
    )
