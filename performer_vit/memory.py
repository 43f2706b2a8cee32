"""The memory of a device, and an error for what cannot fit into it, before it is asked for."""

import math
import os

import jax

from performer_vit.errors import BadInput, one_line


class TooLargeError(BadInput):
    """What a config asks for does not fit into a device's memory."""


def exceeded(error: Exception) -> str | None:
    """What an error says of too little memory, before or while it was used; None of any other."""
    if isinstance(error, TooLargeError):
        return str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)
    ):
        # Python's own says nothing.
        reason = f': {one_line(error)}' if str(error) else ''
        return f'more memory needed than there is{reason}'
    return None


def available(device: jax.Device) -> float:
    """Bytes of a device; of a CPU device its share of the machine's, infinite where unknown."""
    limit = (device.memory_stats() or {}).get('bytes_limit')
    if limit is not None:
        return limit
    if not hasattr(os, 'sysconf'):  # Windows.
        return math.inf
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / jax.local_device_count()


def size(tree) -> int:
    """Bytes of a tree of arrays, or of their shapes as `jax.eval_shape` tells them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check(what: str, needed: float, fields: str) -> None:
    """Raises `TooLargeError` where `what`, by these fields, needs more bytes than a device has."""
    device = jax.local_devices()[0]
    limit = available(device)
    if needed > limit:
        raise TooLargeError(
            f'{what} needs {needed / 2**30:,.1f} GiB on each device, and {device.device_kind} has '
            f'{limit / 2**30:,.1f} GiB for each: lower {fields}.'
        )
