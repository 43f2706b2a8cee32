"""Random projections W of FAVOR+, as pure functions of a key.

The rows of W [R, D] play the part of samples ω ~ N(0, I_D) in the random features of Choromanski et
al. 2021, "Rethinking Attention with Performers", arXiv 2009.14794. `gaussian` draws them
independently; `orthogonal` makes them exactly orthogonal within blocks of D rows, which keeps each
row's distribution and lowers the variance of the estimator (the paper's section 2.4).
"""

import functools

import jax
import jax.numpy as jnp

from performer_vit.errors import BadInput, choose

PROJECTIONS = ('orthogonal', 'gaussian', 'none')
ROW_NORMS = ('gaussian', 'sqrt_dim')


def gaussian(key: jax.Array, num_features: int, dim: int) -> jax.Array:
    """Independent rows ω_r ~ N(0, I_D).

    Args:
      key: a JAX random key.
      num_features: R ≥ 1.
      dim: D ≥ 1, the head dimension.

    Returns:
      [R, D] float32.

    Raises:
      BadInput: R or D is less than 1.
    """
    _check_sizes(num_features, dim)
    return jax.random.normal(key, (num_features, dim), jnp.float32)


# Compiled as one piece: otherwise XLA fuses, and rounds, differently inside a caller's jit and
# outside, and a redraw within a train step would not give the bits that `init` gave.
@functools.partial(jax.jit, static_argnames=('num_features', 'dim', 'row_norms'))
def orthogonal(
    key: jax.Array, num_features: int, dim: int, row_norms: str = 'gaussian'
) -> jax.Array:
    """Rows that are orthogonal within each block of D, with the norms of Gaussian vectors.

    Each block is a D×D orthogonal matrix drawn from the Haar measure: Q of the QR decomposition of
    a Gaussian matrix, with its columns' signs set so that R has a positive diagonal (Mezzadri 2007,
    "How to generate random matrices from the classical compact groups", arXiv math-ph/0609050).
    Blocks are independent; the last one is cut to the rows that are left, so R may be smaller or
    larger than D and no multiple of it.

    Args:
      key: a JAX random key.
      num_features: R ≥ 1.
      dim: D ≥ 1, the head dimension.
      row_norms: 'gaussian' rescales every row to the norm of an independent Gaussian vector
        (chi-distributed, D degrees of freedom), so that each row is exactly N(0, I_D) and the
        softmax estimator stays unbiased; 'sqrt_dim' to √D, the root of its mean square, which is
        biased but has less variance.

    Returns:
      [R, D] float32.

    Raises:
      BadInput: R or D is less than 1, or `row_norms` is unknown.
    """
    _check_sizes(num_features, dim)
    choose('row_norms', row_norms, ROW_NORMS)
    direction_key, norm_key = jax.random.split(key)
    num_blocks = -(-num_features // dim)
    q, r = jnp.linalg.qr(jax.random.normal(direction_key, (num_blocks, dim, dim), jnp.float32))
    # LAPACK's own choice of signs is not uniform: without this Q is orthogonal, but not Haar.
    q = q * jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[:, None, :]
    rows = q.reshape(num_blocks * dim, dim)[:num_features]
    if row_norms == 'sqrt_dim':
        return rows * dim**0.5
    norms = jnp.linalg.norm(gaussian(norm_key, num_features, dim), axis=1, keepdims=True)
    return rows * norms


def draw(
    seed: int,
    layer: int,
    draw_number: int | jax.Array,
    num_features: int,
    dim: int,
    projection: str,
    row_norms: str = 'gaussian',
) -> jax.Array | None:
    """The projection of one layer, a pure function of (seed, layer, draw number).

    No state is kept: equal arguments give equal bits, whatever was drawn before. The key is
    Threefry's whatever JAX's default generator is, so a setting elsewhere cannot change a model.

    Args:
      seed: the model's seed.
      layer: an integer 0 ≤ layer < 2³² that tells the layers of a model apart.
      draw_number: 0 for the initial matrix, counting up at each redraw; may be a traced int32.
      num_features: R ≥ 1.
      dim: D ≥ 1, the head dimension.
      projection: one of `PROJECTIONS`.
      row_norms: see `orthogonal`; Gaussian rows have Gaussian norms and ignore it.

    Returns:
      [R, D] float32, or None for projection 'none'.

    Raises:
      BadInput: `projection` or `row_norms` is unknown, or R or D is less than 1.
    """
    choose('projection', projection, PROJECTIONS)
    choose('row_norms', row_norms, ROW_NORMS)
    if projection == 'none':
        return None
    key = jax.random.key(seed, impl='threefry2x32')
    key = jax.random.fold_in(jax.random.fold_in(key, layer), draw_number)
    if projection == 'gaussian':
        return gaussian(key, num_features, dim)
    return orthogonal(key, num_features, dim, row_norms)


def _check_sizes(num_features: int, dim: int) -> None:
    if num_features < 1 or dim < 1:
        raise BadInput(
            f'a projection of {num_features} features in {dim} dimensions was asked for; '
            'both must be at least 1. Set num_features to an integer ≥ 1.'
        )
