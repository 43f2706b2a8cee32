"""Dropout by bytes: a quarter of the random bits that Flax's own draws.

Drawing 32 random bits an element is a large part of a layer's time on a CPU. A byte is enough: it
gives the probability in steps of 1/256, and a threshold that is rounded up or down at random, row
by row, makes the probability exact.

Source: Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting".
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from performer_vit.errors import BadInput


def drop_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """True with probability `rate`, independently but for rows: bool of `shape`.

    An element is dropped where its byte is below ⌊256·rate + u⌋, with a byte an element and one u,
    uniform in [0, 1), a row (the last axis); over both the probability is `rate`, to the 2⁻²³ that
    a uniform number is rounded to. Elements of one row share u, so that they are dropped together
    a little more often than by chance: their covariance is at most 2⁻¹⁸.

    Args:
      key: a JAX random key.
      rate: from 0 to 1.
      shape: one axis or more.
    """
    byte_key, row_key = jax.random.split(key)
    *rows, columns = shape
    words = -(-columns // 4)
    drawn = jax.random.bits(byte_key, (*rows, words), jnp.uint32)
    drawn = jax.lax.bitcast_convert_type(drawn, jnp.uint8).reshape(*rows, 4 * words)[..., :columns]
    threshold = jnp.floor(256.0 * rate + jax.random.uniform(row_key, (*rows, 1)))
    # As int32: a byte cannot hold the threshold 256 of a rate of 1.
    return drawn.astype(jnp.int32) < threshold.astype(jnp.int32)


class Dropout(nn.Module):
    """Zeroes elements with probability `rate` in training, divides the others by 1 − rate.

    Takes the key of Flax's `nn.Dropout`, 'dropout', and draws other masks from it.

    Attributes:
      rate: from 0 to below 1; at 0 no key is needed.
    """

    rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.rate < 1.0:
            raise BadInput(
                f'rate is {self.rate}; it is a probability: set it to a number from 0 to below 1.'
            )

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if not train or self.rate == 0.0:
            return x
        dropped = drop_mask(self.make_rng('dropout'), self.rate, x.shape)
        return jnp.where(dropped, 0.0, x / (1.0 - self.rate)).astype(x.dtype)
