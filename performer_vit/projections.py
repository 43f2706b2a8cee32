"""Random projections W of FAVOR+, as pure functions of a key.

The rows of W [R, D] play the part of samples ω ~ N(0, I_D) in the random features of Choromanski et
al. 2021, "Rethinking Attention with Performers", arXiv 2009.14794. `gaussian` draws them
independently; `orthogonal` makes them exactly orthogonal within blocks of D rows, which keeps each
row's distribution and lowers the variance of the estimator (the paper's section 2.4). `simplex`
lowers it further, by rows of a block that point away from each other; `hadamard` draws orthogonal
rows that can be applied in O(R log D) instead of O(R D), and are Gaussian only approximately.
"""

import functools
import numbers
import warnings

import jax
import jax.numpy as jnp

from performer_vit.errors import BadInput, choose

PROJECTIONS = ('orthogonal', 'gaussian', 'simplex', 'hadamard', 'none')
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
    rows = _haar_blocks(direction_key, -(-num_features // dim), dim).reshape(-1, dim)
    return _rescale(rows[:num_features], norm_key, dim, row_norms)


@functools.partial(jax.jit, static_argnames=('num_features', 'dim', 'row_norms'))
def simplex(key: jax.Array, num_features: int, dim: int, row_norms: str = 'gaussian') -> jax.Array:
    """Rows that point to the corners of a randomly turned regular simplex, a block of D at a time.

    The directions of a block are the rows of √(D/(D-1)) (I - 11ᵀ/D) Q, Q a D×D orthogonal matrix
    from the Haar measure: unit vectors whose cosine with each other is -1/(D-1). D = 1 has no such
    pair; there a block is one random sign. Blocks are independent and the last one is cut, as in
    `orthogonal`. These are the simplex random features of Reid et al. 2023, "Simplex Random
    Features", arXiv 2301.13856.

    Each row by itself is exactly N(0, I_D), so the softmax estimator is unbiased. What lowers its
    variance is that w_i·(q + k) and w_j·(q + k) are negatively correlated: E[exp((w_i + w_j)·v)]
    grows with |w_i + w_j|, hence with the cosine of the two rows, and is convex in it, and
    -1/(D-1) is the least mean cosine that D directions can have. So the mean square error is below
    that of `orthogonal` (cosine 0) wherever q + k ≠ 0 and a block has two rows, and with full
    blocks it is the least of all couplings of directions that do not look at the norms. The gain
    is large where v = (q + k)/D^(1/4) is short: with R = D = 16 the error of `orthogonal` is 11.9
    times as large for |v| = 0.5, 2.86 times for |v| = 1, and hardly larger from |v| = 2 on. All
    this is of the softmax kernel; for others nothing is claimed.

    Args:
      key: a JAX random key.
      num_features: R ≥ 1.
      dim: D ≥ 1, the head dimension.
      row_norms: see `orthogonal`. With 'sqrt_dim' the rows of a full block (D ≥ 2) sum to 0.

    Returns:
      [R, D] float32.

    Raises:
      BadInput: R or D is less than 1, or `row_norms` is unknown.
    """
    _check_sizes(num_features, dim)
    choose('row_norms', row_norms, ROW_NORMS)
    direction_key, norm_key = jax.random.split(key)
    rows = _haar_blocks(direction_key, -(-num_features // dim), dim)
    if dim > 1:
        # (I - 11ᵀ/D) Q without a matrix product: Q less the mean of its rows.
        rows = (rows - jnp.mean(rows, axis=-2, keepdims=True)) * (dim / (dim - 1)) ** 0.5
    return _rescale(rows.reshape(-1, dim)[:num_features], norm_key, dim, row_norms)


def hadamard(key: jax.Array, num_features: int, dim: int, row_norms: str = 'gaussian') -> jax.Array:
    """Orthogonal rows from √D' H S₁ H S₂ H S₃, a block of D' at a time, as a matrix.

    H is the normalised Walsh-Hadamard matrix, S₁, S₂, S₃ are diagonal matrices of random signs and
    D' is D rounded up to a power of two (Yu et al. 2016, "Orthogonal Random Features", arXiv
    1610.09072; Choromanski et al. 2017, "The Unreasonable Effectiveness of Structured Random
    Orthogonal Embeddings", arXiv 1703.00864). Blocks are independent and the last one is cut, as in
    `orthogonal`. With 'sqrt_dim' it is the matrix that `hadamard_project` applies, for
    `hadamard_signs` of the same key.

    The product is orthogonal but not Haar: a row has mean 0 and covariance I_D exactly, and is
    only nearly N(0, I_D), so the softmax estimator is only nearly unbiased. The relative bias with
    'gaussian' depends on v = (q + k)/D^(1/4), and averages to 0 over its directions. For D = 8 it
    lies between -0.4% (v along a coordinate axis) and +0.1% (along (1, ..., 1)) at |v| = 1, and
    between -3.4% and +4.1% at |v| = 2. Along an axis it is -0.1% and -1.2% for D = 16, and -0.01%
    and -0.1% for D = 64, with -0.5% at |v| = 3. Below D = 8 rows have too few different
    directions: use `orthogonal` there.

    When D is not a power of two, rows of D' are cut to D columns. They are then no longer exactly
    orthogonal, and 'sqrt_dim' holds for their norms in the root mean square only; a warning says
    so at each call.

    Args:
      key: a JAX random key.
      num_features: R ≥ 1.
      dim: D ≥ 1, the head dimension; best a power of two.
      row_norms: 'gaussian' rescales every row to the norm of an independent Gaussian vector
        (chi-distributed, D' degrees of freedom) before it is cut to D columns; 'sqrt_dim' to √D'.

    Returns:
      [R, D] float32.

    Raises:
      BadInput: R or D is less than 1, or `row_norms` is unknown.
    """
    _check_sizes(num_features, dim)
    choose('row_norms', row_norms, ROW_NORMS)
    _warn_of_padding(dim)
    return _hadamard(key, num_features, dim, row_norms)


def hadamard_signs(key: jax.Array, num_features: int, dim: int) -> jax.Array:
    """The random signs of `hadamard`: all that `hadamard_project` needs of it.

    Args:
      key: a JAX random key.
      num_features: R ≥ 1.
      dim: D ≥ 1, the head dimension; a warning is given where it is not a power of two, see
        `hadamard`.

    Returns:
      ±1 as float32 [⌈R/D'⌉, 3, D'], D' being D rounded up to a power of two: the diagonals of S₁,
      S₂ and S₃ of each block.

    Raises:
      BadInput: R or D is less than 1.
    """
    _check_sizes(num_features, dim)
    _warn_of_padding(dim)
    return _signs(key, num_features, dim)


@functools.partial(jax.jit, static_argnames='num_features')
def hadamard_project(x: jax.Array, signs: jax.Array, num_features: int) -> jax.Array:
    """W x for the W of `hadamard` with row norm √D', in O(R log D') per vector.

    W is never formed: x is padded with zeros to D' and goes through three signed Walsh-Hadamard
    transforms per block, √D' H S₁ H S₂ H S₃ x. Fewer operations are not always less time: on a CPU
    the dense product is faster at head dimensions such as 64. Measure before choosing.

    Args:
      x: [..., D] of any floating dtype.
      signs: [⌈R/D'⌉, 3, D'], as `hadamard_signs` draws them for R and D; a cast to x's dtype does
        no harm.
      num_features: R ≥ 1.

    Returns:
      [..., R] float32 (float64 for float64 x); bfloat16 and float16 are not rounded on the way.

    Raises:
      BadInput: x is not real floating or has no axis, R is less than 1, or the shape of `signs`
        does not fit D and R.
    """
    _check_real_floating('hadamard_project', x)
    dim = x.shape[-1]
    _check_sizes(num_features, dim)
    padded = _power_of_two(dim)
    expected = (-(-num_features // padded), 3, padded)
    if signs.shape != expected:
        raise BadInput(
            f'signs has the shape {signs.shape}; {num_features} features of {dim} dimensions need '
            f'{expected}. Draw them by hadamard_signs(key, {num_features}, {dim}).'
        )
    pad = [(0, 0)] * (x.ndim - 1) + [(0, padded - dim)]
    y = jnp.pad(x.astype(jnp.promote_types(x.dtype, jnp.float32)), pad)[..., None, :]
    for which in (2, 1, 0):
        y = hadamard_transform(signs[:, which] * y)
    return y.reshape(*x.shape[:-1], y.shape[-2] * padded)[..., :num_features] * padded**0.5


@jax.jit
def hadamard_transform(x: jax.Array) -> jax.Array:
    """H x along the last axis, H the orthonormal Walsh-Hadamard matrix, in O(D log D).

    H = H_D / √D with H_1 = 1 and H_2n = [[H_n, H_n], [H_n, -H_n]] (Sylvester's order). H is
    symmetric and its own inverse. The fast transform is log₂ D stages of sums and differences of
    pairs, D/2 of each at a stage.

    Args:
      x: [..., D] of any floating dtype, D a power of two.

    Returns:
      [..., D] of x's dtype; sums are in float32 (float64 for float64 x).

    Raises:
      BadInput: D is not a power of two, or x is not real floating or has no axis.
    """
    _check_real_floating('hadamard_transform', x)
    dim = x.shape[-1]
    if dim < 1 or dim != _power_of_two(dim):
        raise BadInput(
            f'x has {dim} entries on its last axis; hadamard_transform takes a power of two. '
            'Pad it with zeros to the next one.'
        )
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    half = 1
    while half < dim:
        y = y.reshape(*x.shape[:-1], dim // (2 * half), 2, half)
        first, second = y[..., 0, :], y[..., 1, :]
        y = jnp.stack([first + second, first - second], axis=-2)
        half *= 2
    return (y.reshape(x.shape) * dim**-0.5).astype(x.dtype)


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
    Threefry's whatever JAX's default generator is, and 64-bit mode changes nothing; of JAX's
    settings, `jax_threefry_partitionable=False` alone draws others.

    Args:
      seed: the model's seed, an integer 0 ≤ seed < 2³².
      layer: an integer 0 ≤ layer < 2³² that tells the layers of a model apart.
      draw_number: 0 for the initial matrix, counting up at each redraw; may be a traced int32.
      num_features: R ≥ 1.
      dim: D ≥ 1, the head dimension.
      projection: one of `PROJECTIONS`.
      row_norms: see `orthogonal` and `hadamard`; the rows of 'gaussian' have Gaussian norms and
        ignore it.

    Returns:
      [R, D] float32, what the function of the projection's name draws; None for 'none'.

    Raises:
      BadInput: `projection` or `row_norms` is unknown, R or D is less than 1, or the seed is out
        of its range.

    Warns:
      UserWarning: projection is 'hadamard' and D is not a power of two.
    """
    choose('projection', projection, PROJECTIONS)
    choose('row_norms', row_norms, ROW_NORMS)
    # Of others JAX takes the last 32 bits, or in 64-bit mode more.
    if isinstance(seed, numbers.Integral) and not 0 <= seed < 2**32:
        raise BadInput(
            f'seed is {seed}; allowed are integers from 0 to 2**32 - 1. Set it to one of these.'
        )
    if projection == 'none':
        return None
    key = jax.random.key(seed, impl='threefry2x32')
    key = jax.random.fold_in(jax.random.fold_in(key, layer), draw_number)
    if projection == 'gaussian':
        return gaussian(key, num_features, dim)
    draw_rows = {'orthogonal': orthogonal, 'simplex': simplex, 'hadamard': hadamard}[projection]
    return draw_rows(key, num_features, dim, row_norms)


def _haar_blocks(key: jax.Array, num_blocks: int, dim: int) -> jax.Array:
    q, r = jnp.linalg.qr(jax.random.normal(key, (num_blocks, dim, dim), jnp.float32))
    # LAPACK's own choice of signs is not uniform: without this Q is orthogonal, but not Haar.
    return q * jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[:, None, :]


def _rescale(directions: jax.Array, key: jax.Array, dim: int, row_norms: str) -> jax.Array:
    """Gives unit rows the norms of vectors of `dim` entries."""
    if row_norms == 'sqrt_dim':
        return directions * dim**0.5
    norms = jnp.linalg.norm(gaussian(key, len(directions), dim), axis=1, keepdims=True)
    return directions * norms


# Apart from `hadamard`, because a warning inside jit would be given at the first call alone.
@functools.partial(jax.jit, static_argnames=('num_features', 'dim', 'row_norms'))
def _hadamard(key: jax.Array, num_features: int, dim: int, row_norms: str) -> jax.Array:
    padded = _power_of_two(dim)
    _, norm_key = jax.random.split(key)
    signs = _signs(key, num_features, dim)
    columns = hadamard_project(jnp.eye(dim, dtype=jnp.float32), signs, num_features)
    return _rescale(columns.T * padded**-0.5, norm_key, padded, row_norms)


def _signs(key: jax.Array, num_features: int, dim: int) -> jax.Array:
    # The key's other half is for the norms.
    sign_key, _ = jax.random.split(key)
    padded = _power_of_two(dim)
    # The bits of `jax.random.rademacher`, which draws others with jax_enable_x64.
    is_plus = jax.random.bernoulli(
        sign_key, jnp.float32(0.5), (-(-num_features // padded), 3, padded)
    )
    return 2 * is_plus.astype(jnp.float32) - 1


def _power_of_two(dim: int) -> int:
    return 1 << (dim - 1).bit_length()


def _warn_of_padding(dim: int) -> None:
    padded = _power_of_two(dim)
    if dim != padded:
        warnings.warn(
            f'dim is {dim}, which is not a power of two: the hadamard projection pads it to '
            f'{padded}, and its rows cut to {dim} columns are no longer exactly orthogonal. Choose '
            "a power of two, or projection 'orthogonal'.",
            stacklevel=3,
        )


def _check_real_floating(function: str, x: jax.Array) -> None:
    if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise BadInput(
            f'x is {x.dtype} of shape {x.shape}; {function} takes a real floating dtype and at '
            'least one axis. Convert or reshape it.'
        )


def _check_sizes(num_features: int, dim: int) -> None:
    if num_features < 1 or dim < 1:
        raise BadInput(
            f'a projection of {num_features} features in {dim} dimensions was asked for; '
            'both must be at least 1. Set num_features to an integer ≥ 1.'
        )
