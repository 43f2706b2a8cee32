"""How many floating-point operations a function takes, by XLA's count."""

import sys
from collections.abc import Callable

import jax

from performer_vit import exact_attention, linear_attention


def count(function: Callable, *arguments) -> float:
    """FLOPs of a function under `pmap`, over all devices: XLA's count before it optimises.

    XLA counts the body of a loop once however often it runs, and attention loops over blocks; so it
    is counted in one block, which also leaves out what the backward pass computes twice.

    Args:
      function: what `jax.pmap(function, axis_name='batch')` takes.
      arguments: arrays or trees of arrays, whose first axis is that of the devices.
    """
    sizes = exact_attention.BLOCK_SIZE, linear_attention.BLOCK_FEATURES
    exact_attention.BLOCK_SIZE = sys.maxsize
    linear_attention.BLOCK_FEATURES = {jax.default_backend(): sys.maxsize}
    try:
        # A function of its own, or JAX would find the trace of the one with blocks.
        lowered = jax.pmap(lambda *args: function(*args), axis_name='batch').lower(*arguments)
    finally:
        exact_attention.BLOCK_SIZE, linear_attention.BLOCK_FEATURES = sizes
    num_devices = jax.tree.leaves(arguments)[0].shape[0]
    return lowered.cost_analysis()['flops'] * num_devices
