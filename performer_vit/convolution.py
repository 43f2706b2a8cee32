"""A 3×3 convolution whose weight gradient is fast on CPUs.

XLA's CPU backend computes the gradient of a convolution's weights as a convolution whose window is
a whole image, which is slower than the convolution and the gradient of its images. Here it is a
matrix product of windows and gradients, a few images at a time, so that their windows stay in the
cache.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

# Rows of a product: windows of so many places at once. More leave the cache, fewer make products
# too small. Blocks are of whole images and divide a device's batch, so a prime batch goes image by
# image.
BLOCK_PLACES = 1024
# With fewer output channels the product is too narrow, and XLA's own gradient is the faster.
_FEWEST_CHANNELS = 128


@jax.custom_vjp
def convolve(images: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ_ij images[b, y+i−1, x+j−1] weights[i, j], zeros beyond the borders: (B, h, w, c').

    Differentiable in reverse mode.

    Args:
      images: (B, h, w, c).
      weights: (3, 3, c, c').
    """
    return lax.conv_general_dilated(
        images, weights, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def _forward(images, weights):
    return convolve(images, weights), (images, weights)


def _backward(residual, gradient):
    images, weights = residual
    # The convolution with the weights turned by 180°, which is what XLA makes of it too.
    turned = weights[::-1, ::-1].swapaxes(2, 3)
    by_weights = _by_convolution
    if gradient.shape[-1] >= _FEWEST_CHANNELS:
        # A function of its own: JAX would find the trace of another size of blocks.
        by_weights = functools.partial(_by_blocks, block_places=BLOCK_PLACES)
    weights_gradient = lax.platform_dependent(
        images, gradient, cpu=by_weights, default=_by_convolution
    )
    return convolve(gradient, turned), weights_gradient


convolve.defvjp(_forward, _backward)


def _by_convolution(images: jax.Array, gradient: jax.Array) -> jax.Array:
    """The gradient of the weights by a convolution over the batch: (3, 3, c, c')."""
    return lax.conv_general_dilated(
        images, gradient, (1, 1), ((1, 1), (1, 1)), dimension_numbers=('CHWN', 'IHWO', 'HWNC')
    )


def _by_blocks(images: jax.Array, gradient: jax.Array, block_places: int) -> jax.Array:
    """The gradient of the weights by products of windows and gradients: (3, 3, c, c')."""
    batch, height, width, channels = images.shape
    out = gradient.shape[-1]
    accumulator = jnp.promote_types(gradient.dtype, jnp.float32)
    block = min(batch, max(1, block_places // (height * width)))
    # A divisor of the batch, so that no image is left over.
    block = max(size for size in range(1, block + 1) if batch % size == 0)

    def add(total, part):
        x, g = part
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = jnp.concatenate(
            [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1
        )
        product = lax.dot_general(
            windows.reshape(-1, 9 * channels),
            g.reshape(-1, out),
            (((0,), (0,)), ((), ())),
            preferred_element_type=accumulator,
        )
        return total + product, None

    parts = tuple(x.reshape(-1, block, height, width, x.shape[-1]) for x in (images, gradient))
    total, _ = lax.scan(add, jnp.zeros((9 * channels, out), accumulator), parts)
    return total.reshape(3, 3, channels, out).astype(gradient.dtype)


class Conv3x3(nn.Module):
    """`nn.Conv(features, (3, 3), use_bias=False)` of Flax, with its weights, by `convolve`."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.features)
        weights = self.param('kernel', nn.initializers.lecun_normal(), shape)
        return convolve(x.astype(self.dtype), weights.astype(self.dtype))
