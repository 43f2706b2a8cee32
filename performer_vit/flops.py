"""How many floating-point operations a function takes, by XLA's count."""

import sys
from collections.abc import Callable

import jax

from performer_vit import convolution, exact_attention, linear_attention
from performer_vit.errors import BadInput


def count(function: Callable, *arguments) -> float:
    """FLOPs of a function under `pmap` on the batch of all devices: XLA's count, not optimised.

    It is counted as one device would do it, so that what devices repeat or share out, such as the
    step of the optimiser, counts once. XLA counts the body of a loop once however often it runs,
    and attention and convolutions loop over blocks; so they are counted in one block, which also
    leaves out what the backward pass computes twice.

    JAX's CPU backend counts, whatever computes: others count only what is compiled, and there
    nothing of what they leave to libraries, such as the products on a GPU.

    Args:
      function: what `jax.pmap(function, axis_name='batch')` takes.
      arguments: trees of arrays whose first axis is that of the devices. The last argument is the
        batch, which is spread over them; of the others, every device has a copy.

    Raises:
      BadInput: JAX has no CPU backend, as with JAX_PLATFORMS=cuda.
    """
    try:
        devices = jax.local_devices(backend='cpu')[:1]
    except RuntimeError as error:
        raise BadInput(
            "operations are counted by JAX's CPU backend, which is not there "
            f'({str(error).rstrip(".")}). Where JAX_PLATFORMS is set, add it, as in '
            'JAX_PLATFORMS=cuda,cpu: the accelerator still comes first.'
        ) from error
    *copies, batch = arguments
    copies = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), copies)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, x.shape[0] * x.shape[1], *x.shape[2:]), x.dtype), batch
    )
    blocks = exact_attention.BLOCK_SIZE, linear_attention.BLOCK_FEATURES, convolution.BLOCK_PLACES
    exact_attention.BLOCK_SIZE = convolution.BLOCK_PLACES = sys.maxsize
    linear_attention.BLOCK_FEATURES = {jax.default_backend(): sys.maxsize}
    try:
        # A function of its own, or JAX would find the trace of the one with blocks. This is what
        # `pmap` does on one device; of several processes it would insist on all devices.
        mapped = jax.shard_map(
            lambda *args: jax.tree.map(
                lambda x: x[None], function(*jax.tree.map(lambda x: x[0], args))
            ),
            mesh=jax.sharding.Mesh(devices, 'batch'),
            in_specs=jax.P('batch'),
            out_specs=jax.P('batch'),
            check_vma=False,
        )
        lowered = jax.jit(mapped).lower(*copies, batch)
    finally:
        exact_attention.BLOCK_SIZE, linear_attention.BLOCK_FEATURES = blocks[:2]
        convolution.BLOCK_PLACES = blocks[2]
    return lowered.cost_analysis()['flops']
