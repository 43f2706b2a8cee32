"""Several processes that train one model: how they meet, what they share, who writes.

Every function here does the obvious thing where there is one process.
"""

import collections
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from performer_vit.errors import BadInput, first_difference, one_line, shown

# Seconds without a sign of life after which a process is taken to be dead, and the others end.
HEARTBEAT_TIMEOUT = 20
# Seconds that a process which ends waits for the others to end as well, alive all the while: where
# it ends by an error of its own, they wait for it elsewhere.
_SHUTDOWN_TIMEOUT = 30


class OtherFailed(Exception):
    """Another process has ended by an error, and so this one does."""


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins a cluster, for the beginning of a program; what is None is detected by JAX.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: this one's number, from 0 on.

    Raises:
      BadInput: the arguments do not fit, what is missing cannot be detected, the others do not
        answer, or have another number of devices.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
        )
    except (ValueError, RuntimeError, IndexError, OSError) as error:
        raise BadInput(
            f'this process cannot join a cluster ({error}): give --coordinator=HOST:PORT, '
            '--num_processes and --process_id, each process its own number from 0 on, or start the '
            'processes by a scheduler that JAX detects.'
        ) from error
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        numbers = [counts[process] for process in sorted(counts)]
        raise BadInput(
            f'the processes have different numbers of devices, from process 0 on {numbers}: give '
            'each as many, such as by CUDA_VISIBLE_DEVICES, or on CPUs by '
            'XLA_FLAGS=--xla_force_host_platform_device_count=1.'
        )


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def devices() -> list[jax.Device] | None:
    """All devices, those of process 0 first, as `jax.pmap` takes them; None for its own choice."""
    if jax.process_count() == 1:
        return None
    return list(
        itertools.chain.from_iterable(
            jax.local_devices(process_index=index) for index in range(jax.process_count())
        )
    )


def over_devices(tree, chosen: Sequence[jax.Device] | None = None):
    """Arrays (L, …) of this process, one entry a device, as arrays over all processes' devices.

    Args:
      tree: of NumPy arrays.
      chosen: the devices; None means all of them.
    """
    mesh = jax.sharding.Mesh(np.array(chosen or devices() or jax.devices()), ('batch',))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('batch'))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def replicate(tree):
    """A copy on every device of all processes."""
    count = jax.local_device_count()
    return over_devices(
        jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (count, *np.shape(x))), tree)
    )


def local(array: jax.Array) -> np.ndarray:
    """The entries (L, …) of this process's devices, on the host."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def first_replica(tree):
    """One of the equal copies on the devices, on the host."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree)


def gather(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, (P, …), on each of them."""
    return np.asarray(multihost_utils.process_allgather(array)).reshape(
        jax.process_count(), *array.shape
    )


def any_of(flag: bool) -> bool:
    """Whether any process says so; all must ask at the same time."""
    return bool(gather(np.array(flag)).any())


def together(asked: Callable[[], bool], every: int) -> Callable[[], bool]:
    """A question that all processes ask equally often, and to which they get one answer.

    Between several it is asked every so many times alone, since each answer is waited for.
    """
    if jax.process_count() == 1:
        return asked
    calls = itertools.count()
    return lambda: next(calls) % every == 0 and any_of(asked())


def check_agreement(what: str, values: Mapping[str, object], remedy: str) -> None:
    """Raises `BadInput` in every process where one has another value under a name than process 0.

    Args:
      what: the whole of the values, in the message.
      values: JSON can represent them; the names are the same in all processes, in one order: the
        first that differs is named.
      remedy: what to do, a sentence.
    """
    names = list(values)
    texts = [json.dumps(values[name]) for name in names]
    codes = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    theirs = gather(_bytes(b''.join(codes)).reshape(len(names), 8))
    differing = np.argwhere((theirs != theirs[0]).any(-1))
    if not len(differing):
        return
    process, place = (int(number) for number in differing[0])
    # All processes come here, with the same place.
    theirs = _texts(texts[place])
    name, first, other = first_difference(
        names[place], *(json.loads(theirs[index]) for index in (0, process))
    )
    raise BadInput(
        f'the processes differ in {what}, in {name}: {shown(first)} in process 0, {shown(other)} '
        f'in process {process}. {remedy}'
    )


def _texts(text: str) -> list[str]:
    """The texts of all processes, none of which ends with spaces."""
    content = text.encode()
    length = int(gather(np.array(len(content))).max())
    return [bytes(each).decode().rstrip() for each in gather(_bytes(content.ljust(length)))]


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def _told(error: Exception) -> str:
    """What the other processes say of an error that ends them too."""
    if isinstance(error, BadInput):  # Which says all.
        return str(error)
    return (
        f'{one_line(error).rstrip(".: ")}. The output of that process says more. Mend the cause '
        'and give the same commands again: they go on from what is saved.'
    )


def _other_failed(process: int, told: str) -> OtherFailed:
    return OtherFailed(f'process {process} has failed, and this one ends with it: {told}')


def everywhere(function: Callable[[], Any]) -> Any:
    """What this process gets from a function that all of them call; where one fails, all do.

    Raises:
      OtherFailed: the function raised an error in another process, and none in this one.
    """
    if jax.process_count() == 1:
        return function()
    value, error = None, None
    try:
        value = function()
    except Exception as failure:
        error = failure
    said = _texts(_told(error) if error else '')
    if error:
        raise error
    for process, text in enumerate(said):
        if text:
            raise _other_failed(process, text)
    return value


def from_main(function: Callable[[], Any]) -> Any:
    """What process 0 gets from a function that it alone calls, by way of JSON, in every process.

    Raises:
      BadInput: in every process, where it was raised in process 0.
      OtherFailed: in the others, where process 0 raises any other error.
    """
    if jax.process_count() == 1:
        return function()
    outcome, error = '', None
    if is_main():
        try:
            value = function()
            outcome = json.dumps({'value': value})
        except BadInput as bad_input:
            outcome = json.dumps({'bad_input': str(bad_input)})
        except Exception as failure:
            error = failure
            outcome = json.dumps({'failure': _told(error)})
    encoded = _bytes(outcome.encode())
    size = int(multihost_utils.broadcast_one_to_all(np.array(encoded.size)))
    content = encoded if is_main() else np.zeros(size, np.uint8)
    received = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(content))))
    if 'bad_input' in received:
        raise BadInput(received['bad_input'])
    if error:
        raise error
    if 'failure' in received:
        raise _other_failed(0, received['failure'])
    return value if is_main() else received['value']


def arrays_from_main(tree):
    """The arrays that process 0 has, bit for bit, in every process.

    Args:
      tree: of NumPy arrays, in all processes of the same structure, shapes and dtypes.
    """
    if jax.process_count() == 1:
        return tree

    def share(array: np.ndarray) -> np.ndarray:
        # As bytes, since JAX sums what process 0 has with zeros, and -0.0 + 0.0 is 0.0.
        received = np.asarray(multihost_utils.broadcast_one_to_all(_bytes(array.tobytes())))
        return np.frombuffer(received.tobytes(), array.dtype).reshape(array.shape)

    return jax.tree.map(share, tree)
