"""Feature maps φ: R^D → R^R by the name of their kernel, whose inner products estimate kernels.

φ(x)_r = f(w_r·x') / √R with x' = x / √τ, τ = √D unless `temperature` says otherwise: the random
features of Choromanski et al. 2021, "Rethinking Attention with Performers", arXiv 2009.14794, eq.
(5), where w_r are the rows of a projection W. The scaling of x makes φ(q)·φ(k) an estimate of a
kernel of q·k/τ, as in softmax attention, and 1/√R makes it a mean over features. Positive features
make the attention normaliser φ(q)·Σ φ(k) positive; of the maps here `identity` and `trigonometric`
alone may be negative, and `elementwise` is what its function is.

The estimators of the softmax kernel exp(q'·k') come with their relative variance, Var[φ(q)·φ(k)] /
exp(2 q'·k'), for independent rows w_r ~ N(0, I_D). It depends on ‖q' + k'‖ for all but the
trigonometric one, and on ‖q' - k'‖ for that. Orthogonal rows lower it for the positive ones.

All maps take x [..., D] of any floating dtype and multiply by the weights in that dtype, with sums
in float32; features are float32 (float64 for float64 x). Weights are shared by everything on the
leading axes. `temperature` is a Python number, known at compilation.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from performer_vit.errors import BadInput, choose

Theta = dict[str, jax.Array]

THETA_INITS = ('lecun', 'relu', 'softmax')

# Where f can be 0 a query may have no active feature, and a key none in common with it. This much
# is added to f, so that the normaliser is at least ε² for each key attended to: far above what
# float32 can hold, and small beside f's values of order 1. It needs no more for bfloat16 inputs,
# because features are not rounded to bfloat16.
EPSILON = 1e-3

# min over u of GELU(u) = u Φ(u), taken at u = -0.7517915...
GELU_MINIMUM = -0.16997120747990369

# `mixture_logit` and `norm_weight` at the start. The branch that fθ starts without has the weight
# sigmoid(-4) = 0.018: little, but the logit's gradient is proportional to it.
_MIXTURE_INITS = {'lecun': (0.0, 0.0), 'relu': (4.0, 1.0), 'softmax': (-4.0, 1.0)}

# The exponential branch of fθ's mixture stays within exp(±10): its products, summed over thousands
# of keys, are far from float32's largest number.
MAX_EXPONENT = 10.0

# The exponential map stays within exp(±15). Products then reach e^30 = 1e13 and, over 100,000 keys,
# a normaliser of 1e18: the largest whose square float32 still holds, by which the gradient of a
# plain quotient x / y divides (that of `linear_attention` does not). The smallest product, 1e-13,
# needs no ε.
MAX_EXP_EXPONENT = 15.0

# From here on the second moment of the optimal positive features is infinite.
MAX_A = 0.125

# That `kernel_profile` looks at together.
_PLANES = 32


def softmax_log_features(
    x: jax.Array, projection: jax.Array, *, temperature: float | None = None
) -> jax.Array:
    """Logarithm of the positive random features of the softmax kernel.

    log φ(x)_r = w_r·x' - ‖x'‖²/2 - ½ log R, x' = x/√τ. With rows w_r ~ N(0, I_D),
    E[φ(q)·φ(k)] = exp(q·k/τ) (Choromanski et al. 2021, Lemma 1). φ itself over- and underflows
    float32 where ‖x'‖ is large; its logarithm does not, so attention takes this and stabilises it.

    Relative variance for independent rows, s = q' + k': (exp(‖s‖²) - 1) / R. It is least for
    opposed pairs, whose kernel is small, and grows exponentially for long, aligned ones.

    Args:
      x: [..., D].
      projection: W [R, D].
      temperature: τ > 0; None for √D.

    Returns:
      [..., R] float32.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    u = _project(x, projection, temperature)
    return u - _log_norm(x, temperature, projection.shape[0])


def softmax(x: jax.Array, projection: jax.Array, *, temperature: float | None = None) -> jax.Array:
    """Positive random features of the softmax kernel, exp of `softmax_log_features`.

    Not stabilised: positive as real numbers, and in float32 for ‖x'‖ up to about 10, beyond which
    they may under- or overflow. Use it to study the estimator, and
    `softmax_log_features` to attend.

    Args:
      x: [..., D].
      projection: W [R, D].
      temperature: τ > 0; None for √D.

    Returns:
      [..., R] float32.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    return jnp.exp(softmax_log_features(x, projection, temperature=temperature))


def hyperbolic_log_features(
    x: jax.Array, projection: jax.Array, *, temperature: float | None = None
) -> jax.Array:
    """Logarithm of the hyperbolic random features of the softmax kernel, two from each row.

    log φ(x) = ±w_r·x' - ‖x'‖²/2 - ½ log R, first + for the R/2 rows, then -. With rows
    w_r ~ N(0, I_D), E[φ(q)·φ(k)] = exp(q·k/τ): per row it averages to the hyperbolic cosine of
    Choromanski et al. 2021, arXiv 2009.14794.

    Relative variance for independent rows, s = q' + k': (exp(‖s‖²) - 1) (1 - exp(-‖s‖²)) / R, from
    R features of R/2 rows. That is less than that of R positive features of R rows, by the factor
    1 - exp(-‖s‖²): much for short s, nothing for long.

    Args:
      x: [..., D].
      projection: W [R/2, D].
      temperature: τ > 0; None for √D.

    Returns:
      [..., R] float32.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    u = _project(x, projection, temperature)
    features = jnp.concatenate([u, -u], axis=-1)
    return features - _log_norm(x, temperature, features.shape[-1])


def optimal_log_features(
    x: jax.Array,
    projection: jax.Array,
    a: float | jax.Array,
    *,
    temperature: float | None = None,
) -> jax.Array:
    """Logarithm of the optimal positive random features of the softmax kernel (FAVOR++).

    log φ(x)_r = (D/4) log(1-4A) + A ‖w_r‖² + √(1-4A) w_r·x' - ‖x'‖²/2 - ½ log R. With rows
    w_r ~ N(0, I_D), E[φ(q)·φ(k)] = exp(q·k/τ) for the same A at q and k (Likhosherstov et al. 2022,
    "Chefs' Random Tables: Non-Trigonometric Random Features", arXiv 2205.15317). A = 0 gives
    `softmax_log_features`; for A < 0 features are bounded, however long w_r.

    Relative variance for independent rows, s = q' + k':
    ((1-4A)^D (1-8A)^(-D/2) exp(‖s‖² / (1-8A)) - 1) / R. `optimal_a` minimises it.

    Args:
      x: [..., D].
      projection: W [R, D].
      a: A < 1/8, a number or an array that broadcasts to [..., 1], the leading axes of x. The
        values of an array are not checked.
      temperature: τ > 0; None for √D.

    Returns:
      [..., R] float32.

    Raises:
      BadInput: `a` is a number not below 1/8 or an array of another shape; or `temperature` is not
        a positive number.
    """
    dim = x.shape[-1]
    if isinstance(a, numbers.Real) and not -math.inf < a < MAX_A:
        raise BadInput(
            f'a is {a}; allowed is a finite number < {MAX_A}. Take the one of optimal_a, or 0.'
        )
    a = jnp.asarray(a, _accumulator(x))
    if not _broadcasts(a.shape, (*x.shape[:-1], 1)):
        raise BadInput(
            f'a has shape {a.shape}, x {x.shape}; allowed is what broadcasts to '
            f"{(*x.shape[:-1], 1)}, x's leading axes and a 1. Reshape it, or give a number."
        )
    # Of the matrix that _project multiplies by, or A ‖w‖² would weigh other rows than it uses.
    rows = projection.astype(x.dtype).astype(a.dtype)
    log_weight = 0.25 * dim * jnp.log1p(-4 * a) + a * jnp.sum(rows * rows, axis=-1)
    log_value = jnp.sqrt(1 - 4 * a) * _project(x, projection, temperature)
    return log_weight + log_value - _log_norm(x, temperature, projection.shape[0])


def optimal_a(mean_square: float | jax.Array, dim: int) -> jax.Array:
    """The A of `optimal_log_features` that is best for pairs of mean ‖q' + k'‖² = m.

    A = (1 - 1/ρ) / 8 ≤ 0 with ρ = 2D / (2m + D + √((2m + D)² + 8mD)), the minimiser of
    (1-4A)^D (1-8A)^(-D/2) exp(m / (1-8A)), by which the second moment exceeds the squared kernel
    (Likhosherstov et al. 2022, arXiv 2205.15317). Over pairs of unequal ‖q' + k'‖² it minimises the
    mean logarithm of that ratio.

    Args:
      mean_square: m ≥ 0 of any shape, as `mean_square_sum` gives it.
      dim: D, the head dimension.

    Returns:
      A, of m's shape, float32 (float64 for float64 m); to about 1e-8 near m = 0, where A = 0, and
      to float32's relative precision where m is large, up to 1e18 D.
    """
    ratio = jnp.asarray(mean_square) / dim
    return (1 - 2 * ratio - jnp.sqrt((1 + 2 * ratio) ** 2 + 8 * ratio)) / 16


def mean_square_sum(
    query: jax.Array,
    key: jax.Array,
    key_mask: jax.Array | None = None,
    *,
    temperature: float | None = None,
    axis_name: Any = None,
) -> jax.Array:
    """The mean of ‖q'_n + k'_m‖² over all pairs (n, m), in linear time, for `optimal_a`.

    It is mean ‖q' - q̄‖² + mean ‖k' - k̄‖² + ‖q̄ + k̄‖² with the means q̄ of q' and k̄ of k'.

    Args:
      query: [..., N, H, D].
      key: [..., M, H, D].
      key_mask: [..., M] bool, True for the keys that count; None for all. What the other positions
        hold, NaN included, has no effect; where no key counts they are taken for zeros.
      temperature: τ > 0, x' = x/√τ; None for √D.
      axis_name: of an axis of `pmap` or `shard_map` along which the tokens are split; the mean is
        over the pairs of all devices.

    Returns:
      [..., 1, H, 1] float32 (float64 for float64 inputs), at least 0.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    query_mean, query_spread = _mean_and_spread(_scaled(query, temperature), None, axis_name)
    key_mean, key_spread = _mean_and_spread(_scaled(key, temperature), key_mask, axis_name)
    # Not mean ‖q'‖² + mean ‖k'‖² + 2 q̄·k̄: where q' = -k' rounding could leave it negative.
    mean_sum = query_mean + key_mean
    return query_spread + key_spread + jnp.sum(mean_sum * mean_sum, axis=-1, keepdims=True)


def trigonometric(
    x: jax.Array, projection: jax.Array, *, temperature: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Random Fourier features of the Gaussian kernel, and the scale that makes it the softmax's.

    φ(x) = √(2/R) [cos(w_r·x'), sin(w_r·x')], first the cosines of the R/2 rows, then the sines,
    and c(x) = ‖x'‖²/2. With rows w_r ~ N(0, I_D), E[φ(q)·φ(k)] exp(c(q) + c(k)) = exp(q·k/τ)
    (Rahimi and Recht 2007, "Random Features for Large-Scale Kernel Machines"). Features are signed:
    the normaliser of an attention with them may be 0 or negative.

    Relative variance for independent rows, d = q' - k': (exp(‖d‖²) - 1) (1 - exp(-‖d‖²)) / R, from
    R features of R/2 rows. It is 0 for q' = k', and grows exponentially for pairs far apart, whose
    kernel is small: there the estimate is mostly noise.

    Args:
      x: [..., D].
      projection: W [R/2, D].
      temperature: τ > 0; None for √D.

    Returns:
      φ(x) [..., R] float32, and c(x) [...] float32.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    u = _project(x, projection, temperature)
    features = jnp.concatenate([jnp.cos(u), jnp.sin(u)], axis=-1) * u.shape[-1] ** -0.5
    return features, _half_square(x, temperature)[..., 0]


def elementwise(
    x: jax.Array,
    projection: jax.Array | None,
    function: Callable[[jax.Array], jax.Array],
    *,
    temperature: float | None = None,
    epsilon: float = EPSILON,
) -> jax.Array:
    """φ(x)_r = (f(w_r·x') + ε) / √R for any f, applied to all w_r·x' at once, entry by entry.

    The generalised attention of Choromanski et al. 2021, arXiv 2009.14794, section 4. Features are
    non-negative where f ≥ -ε; nothing here checks it.

    Args:
      x: [..., D].
      projection: W [R, D], or None for x' itself in its place (R = D).
      function: f, from a float32 array to a real one of the same shape, differentiable by JAX.
      temperature: τ > 0, x' = x/√τ; None for √D.
      epsilon: ε.

    Returns:
      [..., R] float32.

    Raises:
      BadInput: `function` cannot be called, or returns another shape or complex numbers; or
        `temperature` is not a positive number.
    """
    if not callable(function):
        raise BadInput(
            f'function is {function!r}; allowed is a callable of one array. Give one, such as '
            'jax.nn.relu.'
        )
    u = _project(x, projection, temperature)
    value = jnp.asarray(function(u))
    if value.shape != u.shape or jnp.iscomplexobj(value):
        raise BadInput(
            f'function returns {value.dtype}{list(value.shape)} for {u.dtype}{list(u.shape)}; '
            'allowed are real numbers of the same shape. Give one that acts on each entry by '
            'itself.'
        )
    return _normalise(value.astype(u.dtype) + epsilon)


def relu(
    x: jax.Array, projection: jax.Array | None = None, *, temperature: float | None = None
) -> jax.Array:
    """φ(x)_r = (max(w_r·x', 0) + ε) / √R, at least ε/√R > 0 by construction.

    The generalised attention with f = ReLU of Choromanski et al. 2021, section 4, with the same ε.

    Args:
      x, projection, temperature: see `elementwise`.

    Returns:
      [..., R] float32.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    return elementwise(x, projection, jax.nn.relu, temperature=temperature)


def relu_squared(
    x: jax.Array, projection: jax.Array | None = None, *, temperature: float | None = None
) -> jax.Array:
    """φ(x)_r = (max(w_r·x', 0)² + ε) / √R, at least ε/√R > 0 by construction.

    The squared ReLU of So et al. 2021, "Primer: Searching for Efficient Transformers for Language
    Modeling", arXiv 2109.08668, there the activation of the MLP. It sharpens attention. Products
    grow with the fourth power of x, to 1e16 where w_r·x' is 1e4: float32 holds the sum of 1e5 of
    them, but not the square of a normaliser above 1e19, by which the gradient of a plain quotient
    divides; that of `linear_attention` does not.

    Args:
      x, projection, temperature: see `elementwise`.

    Returns:
      [..., R] float32.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    return elementwise(x, projection, lambda u: jnp.square(jax.nn.relu(u)), temperature=temperature)


def gelu(
    x: jax.Array, projection: jax.Array | None = None, *, temperature: float | None = None
) -> jax.Array:
    """φ(x)_r = (GELU(w_r·x') - min GELU + ε) / √R, at least about ε/√R > 0 by construction.

    GELU(u) = u Φ(u) (Hendrycks and Gimpel 2016, arXiv 1606.08415; exact, not the tanh formula)
    dips to -0.16997; shifted by that minimum it is never negative. ε also covers its rounding.

    Args:
      x, projection, temperature: see `elementwise`.

    Returns:
      [..., R] float32.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    return elementwise(
        x,
        projection,
        lambda u: jax.nn.gelu(u, approximate=False),
        temperature=temperature,
        epsilon=EPSILON - GELU_MINIMUM,
    )


def elu(
    x: jax.Array, projection: jax.Array | None = None, *, temperature: float | None = None
) -> jax.Array:
    """φ(x)_r = (ELU(w_r·x') + 1 + ε) / √R, at least ε/√R > 0 by construction.

    ELU(u) + 1 is u + 1 for u > 0 and exp(u) elsewhere (Katharopoulos et al. 2020, "Transformers are
    RNNs", arXiv 2006.16236, eq. (7)). It is positive as a real number; ε keeps it so where exp(u)
    underflows.

    Args:
      x, projection, temperature: see `elementwise`.

    Returns:
      [..., R] float32.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    # Not jax.nn.elu(u) + 1, whose expm1(u) + 1 cancels to 0 from u = -17 on.
    return elementwise(
        x,
        projection,
        lambda u: jnp.where(u > 0, u + 1, jnp.exp(jnp.minimum(u, 0))),
        temperature=temperature,
    )


def sigmoid(
    x: jax.Array, projection: jax.Array | None = None, *, temperature: float | None = None
) -> jax.Array:
    """φ(x)_r = (1 / (1 + exp(-w_r·x')) + ε) / √R, at least ε/√R > 0 by construction.

    The generalised attention of Choromanski et al. 2021, section 4, with f the logistic function:
    bounded, so that no key can outweigh the others by its length. ε keeps it positive where f
    underflows.

    Args:
      x, projection, temperature: see `elementwise`.

    Returns:
      [..., R] float32.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    return elementwise(x, projection, jax.nn.sigmoid, temperature=temperature)


def softplus(
    x: jax.Array, projection: jax.Array | None = None, *, temperature: float | None = None
) -> jax.Array:
    """φ(x)_r = (log(1 + exp(w_r·x')) + ε) / √R, at least ε/√R > 0 by construction.

    The generalised attention of Choromanski et al. 2021, section 4, with f a smooth ReLU whose
    gradient is nowhere 0. ε keeps it positive where f underflows.

    Args:
      x, projection, temperature: see `elementwise`.

    Returns:
      [..., R] float32.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    return elementwise(x, projection, jax.nn.softplus, temperature=temperature)


def exp(
    x: jax.Array, projection: jax.Array | None = None, *, temperature: float | None = None
) -> jax.Array:
    """φ(x)_r = exp(clamp(w_r·x', ±15)) / √R, at least e^-15/√R > 0 by construction; no ε.

    The generalised attention of Choromanski et al. 2021, section 4, with f = exp. Not the softmax
    estimator, which is `softmax`: without exp(-‖x'‖²/2) a key counts exp(‖k'‖²/2) times what it
    does in softmax attention. Beyond ±15 features are constant and gradients 0: products then stay
    within e^±30, about 1e±13, and 1e5 of them within 1e18, so that float32 holds the normaliser
    and its square, which the gradient of a plain quotient needs.

    Args:
      x, projection, temperature: see `elementwise`.

    Returns:
      [..., R] float32.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    return elementwise(
        x,
        projection,
        lambda u: jnp.exp(jnp.clip(u, -MAX_EXP_EXPONENT, MAX_EXP_EXPONENT)),
        temperature=temperature,
        epsilon=0.0,
    )


def identity(
    x: jax.Array, projection: jax.Array | None = None, *, temperature: float | None = None
) -> jax.Array:
    """φ(x)_r = w_r·x' / √R, without ε: signed features.

    E[φ(q)·φ(k)] = q·k/τ with rows w_r ~ N(0, I_D), and φ(q)·φ(k) = q·k/(τD) without a projection.
    Attention with them is linear attention without positivity, whose normaliser may be 0 or
    negative.

    Args:
      x, projection, temperature: see `elementwise`.

    Returns:
      [..., R] float32, of any sign.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    return elementwise(x, projection, lambda u: u, temperature=temperature, epsilon=0.0)


def cosine_reweight(features: jax.Array, positions: jax.Array, horizon: int) -> jax.Array:
    """Features that weigh every pair of positions p, p' by cos(π (p - p') / (2·horizon)) besides.

    φ'(x) = [φ(x) cos(π p / (2·horizon)), φ(x) sin(π p / (2·horizon))], so that φ'(q)·φ'(k) is
    φ(q)·φ(k) times that cosine: near tokens count more (cosFormer: Qin et al. 2022, "cosFormer:
    Rethinking Softmax in Attention", arXiv 2202.08791). Both factors are in [0, 1], so features
    that are non-negative stay so.

    Args:
      features: φ(x) [..., N, H, R].
      positions: p, integers [N] or [..., N], with 0 ≤ p < horizon. Their values are not checked;
        beyond the horizon weights turn negative.
      horizon: an integer ≥ 1 above every position of queries and keys, the same for both.

    Returns:
      [..., N, H, 2R] float32 (float64 for float64 features), first the cosines, then the sines.

    Raises:
      BadInput: `positions` are no integers or of another shape, or `horizon` is no integer ≥ 1.
    """
    if not isinstance(horizon, numbers.Integral) or horizon < 1:
        raise BadInput(
            f'horizon is {horizon!r}; allowed is an integer ≥ 1. Set it to the largest position '
            'plus 1, or more.'
        )
    positions = jnp.asarray(positions)
    tokens = features.shape[:-2]
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise BadInput(
            f'positions has dtype {positions.dtype}; allowed is an integer one. Number the tokens, '
            'as jnp.arange does.'
        )
    if positions.shape[-1:] != tokens[-1:] or not _broadcasts(positions.shape, tokens):
        raise BadInput(
            f'positions has shape {positions.shape}, features {features.shape}; allowed is '
            f'[{tokens[-1]}] or what broadcasts to {tokens}. Give one position for every token.'
        )
    features = features.astype(_accumulator(features))
    positions = positions.astype(jnp.int32)[..., None, None]
    step = math.pi / (2 * horizon)
    # The cosine as the sine of the complement: near π/2 rounding would make the cosine negative.
    cosine, sine = (
        jnp.sin(steps.astype(features.dtype) * step) for steps in (horizon - positions, positions)
    )
    return jnp.concatenate([features * cosine, features * sine], axis=-1)


def init_theta(
    key: jax.Array,
    dim: int,
    hidden: int,
    num_features: int,
    *,
    mixture: bool,
    theta_init: str = 'lecun',
    projection: jax.Array | None = None,
) -> Theta:
    """Initial weights of the learnable feature map fθ: of nothing, or of the kernel it generalises.

    'lecun': kernels are normal with variance 1/fan-in, biases 0; the mixture has a = 1/2, t = 1 and
    s = 0.

    'relu': A₁ has the rows of W and A₂ is the identity, so that u = ReLU(Wx'), and `ftheta` is
    `relu` of W. The mixture has a = 0.982, t = 1 and s = 1.

    'softmax', of the mixture alone: A₁ has the rows of W and of -W, and A₂ = [I, -I], so that
    u = ReLU(Wx') - ReLU(-Wx') = Wx'. With a = 0.018, t = 1 and s = 1 the map is nearly `softmax` of
    W, as far as `MAX_EXPONENT` and ε let it.

    Hidden units that these do not need are there to be learnt: their rows are drawn from N(0, I_D)
    and weigh nothing in A₂, where their gradients are not 0.

    Args:
      key: a JAX random key.
      dim: D, the head dimension.
      hidden: width of the hidden layer, at least R for 'relu' and 2R for 'softmax'; 0 for that, and
        for R with 'lecun'.
      num_features: R.
      mixture: whether the weights are for `ftheta_mixture` rather than `ftheta`.
      theta_init: one of `THETA_INITS`.
      projection: W [R, D], for 'relu' and 'softmax' alone.

    Returns:
      float32 arrays: `hidden_kernel` A₁ᵀ [D, hidden], `hidden_bias` [hidden], `output_kernel` A₂ᵀ
      [hidden, R], `output_bias` [R]; for the mixture also the scalars `mixture_logit`,
      `log_temperature` and `norm_weight`.

    Raises:
      BadInput: an unknown `theta_init`, one that the map has no branch for, too few hidden units,
        or a projection that is missing, not wanted, or of another shape.
    """
    choose('theta_init', theta_init, THETA_INITS)
    if theta_init == 'softmax' and not mixture:
        raise BadInput(
            "theta_init is 'softmax' for ftheta, which has no exponential branch. Set it to 'relu' "
            "or 'lecun', or the kernel to 'ftheta_mixture'."
        )
    needed = 2 * num_features if theta_init == 'softmax' else num_features
    least = 1 if theta_init == 'lecun' else needed
    if hidden and hidden < least:
        raise BadInput(
            f'hidden is {hidden}; theta_init {theta_init!r} with {num_features} features needs '
            f'{least} or more. Set hidden to such a number, or to 0 for {needed}.'
        )
    hidden = hidden or needed
    hidden_key, output_key = jax.random.split(key)
    if theta_init == 'lecun':
        if projection is not None:
            raise BadInput(
                "projection is given, but theta_init 'lecun' draws its own weights. Leave it as "
                "None, or set theta_init to 'relu', for example."
            )
        init = jax.nn.initializers.lecun_normal()
        hidden_kernel = init(hidden_key, (dim, hidden), jnp.float32)
        output_kernel = init(output_key, (hidden, num_features), jnp.float32)
    else:
        if projection is None or projection.shape != (num_features, dim):
            given = "missing, as with 'none'," if projection is None else projection.shape
            raise BadInput(
                f'projection is {given} for theta_init {theta_init!r}, which starts from its rows; '
                f'allowed is [R, D] = {(num_features, dim)}, as projections.draw makes it for '
                "every projection but 'none'. Choose another projection, or set theta_init to "
                "'lecun'."
            )
        rows, outputs = projection, jnp.eye(num_features)
        if theta_init == 'softmax':
            rows, outputs = (jnp.concatenate([x, -x]) for x in (rows, outputs))
        spare = hidden - needed
        rows = jnp.concatenate([rows, jax.random.normal(hidden_key, (spare, dim))])
        hidden_kernel = rows.T.astype(jnp.float32)
        output_kernel = jnp.pad(outputs, [(0, spare), (0, 0)]).astype(jnp.float32)
    theta = {
        'hidden_kernel': hidden_kernel,
        'hidden_bias': jnp.zeros((hidden,), jnp.float32),
        'output_kernel': output_kernel,
        'output_bias': jnp.zeros((num_features,), jnp.float32),
    }
    if mixture:
        logit, norm_weight = _MIXTURE_INITS[theta_init]
        theta['mixture_logit'] = jnp.full((), logit, jnp.float32)
        theta['log_temperature'] = jnp.zeros((), jnp.float32)
        theta['norm_weight'] = jnp.full((), norm_weight, jnp.float32)
    return theta


def ftheta(x: jax.Array, theta: Theta, *, temperature: float | None = None) -> jax.Array:
    """Learnable map φ(x) = (ReLU(u) + ε) / √R, at least ε/√R > 0 by construction.

    u = A₂ ReLU(A₁ x' + b₁) + b₂, a perceptron of one hidden layer. `relu` is one of these maps:
    that with A₁ = W, A₂ = I and no biases.

    Args:
      x: [..., D].
      theta: as `init_theta(..., mixture=False)` makes it.
      temperature: τ > 0, x' = x/√τ; None for √D.

    Returns:
      [..., R] float32.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    return _normalise(jax.nn.relu(_perceptron(x, theta, temperature)) + EPSILON)


def ftheta_mixture(x: jax.Array, theta: Theta, *, temperature: float | None = None) -> jax.Array:
    """Learnable map φ(x) = (a ReLU(u) + (1 - a) exp(clamp(v, ±10)) + ε) / √R, at least ε/√R > 0.

    v = u/t - s ‖x'‖²/2 with the perceptron u of `ftheta`. The weight a = sigmoid(`mixture_logit`)
    of the ReLU, the temperature t = exp(`log_temperature`) of the exponential, which is not τ, and
    s = `norm_weight`, of any sign, are learnt, one of each for the map.

    With u = Wx', a = 0, t = 1 and s = 1 it is `softmax` but for ε and the clamp, which keeps
    products within e^20 = 5e8. Unlike the softmax estimators it is not stabilised: where all of a
    token's ‖x'‖²/2 - w_r·x' are far above -log ε = 6.9, its features are no more than ε.

    Args:
      x: [..., D].
      theta: as `init_theta(..., mixture=True)` makes it.
      temperature: τ > 0, x' = x/√τ; None for √D.

    Returns:
      [..., R] float32.

    Raises:
      BadInput: `temperature` is not a positive number.
    """
    u = _perceptron(x, theta, temperature)
    weight = jax.nn.sigmoid(theta['mixture_logit'])
    exponent = u * jnp.exp(-theta['log_temperature'])
    exponent = exponent - theta['norm_weight'] * _half_square(x, temperature)
    exponent = jnp.clip(exponent, -MAX_EXPONENT, MAX_EXPONENT)
    return _normalise(weight * jax.nn.relu(u) + (1 - weight) * jnp.exp(exponent) + EPSILON)


class KernelProfile(NamedTuple):
    """K(x, y) over random planes; n norms, t angles, float32.

    Attributes:
      mean: [n, n, t] for ‖x‖, ‖y‖ and the angle between x and y.
      deviation: standard deviation over the planes, of the same shape. It is 0 for a kernel that
        depends on norms and angle alone.
    """

    mean: np.ndarray
    deviation: np.ndarray


def kernel_profile(
    feature_map: Callable[[jax.Array], jax.Array],
    dim: int,
    norms: Any,
    angles: Any,
    key: jax.Array,
    *,
    key_feature_map: Callable[[jax.Array], jax.Array] | None = None,
    num_planes: int = 64,
) -> KernelProfile:
    """The kernel that a feature map implies: K(x, y) = φ(x)·ψ(y) by norms and angle of x and y.

    Both lie in a random plane through 0: x along its first axis, y at the angle from it. Planes are
    drawn with uniform directions. For a learnt map φ is that of one head, such as
    `functools.partial(ftheta, theta=jax.tree.map(lambda leaf: leaf[head], theta))`.

    K of 'relu' with many Gaussian rows is ‖x'‖ ‖y'‖ (sin α + (π - α) cos α) / 2π, the arc-cosine
    kernel of degree 1 (Cho and Saul 2009, "Kernel Methods for Deep Learning"), up to ε; that of
    'softmax' is exp(x'·y').

    Args:
      feature_map: φ, from [..., D] to [..., R].
      dim: D ≥ 2.
      norms: [n] numbers > 0, of x and y as the map takes them: ‖x'‖ is ‖x‖/√τ.
      angles: [t] numbers from 0 to π, in radians.
      key: a JAX random key, of the planes.
      key_feature_map: ψ, where keys have a map of their own; None for φ.
      num_planes: ≥ 1.

    Returns:
      NumPy arrays: `mean` and `deviation`, both [n, n, t].

    Raises:
      BadInput: a number out of its range.
    """
    norms, angles = (np.asarray(values, np.float64) for values in (norms, angles))
    for name, values, allowed in (
        ('norms', norms, (norms > 0) & (norms < math.inf)),
        ('angles', angles, (angles >= 0) & (angles <= math.pi)),
    ):
        if values.ndim != 1 or not values.size or not np.all(allowed):
            raise BadInput(
                f'{name} is {values}; allowed is a list of finite numbers, norms > 0, angles from '
                '0 to π. Give at least one.'
            )
    if dim < 2 or num_planes < 1:
        raise BadInput(
            f'dim is {dim} and num_planes {num_planes}; a plane needs two dimensions. Set dim to 2 '
            'or more and num_planes to 1 or more.'
        )
    q, r = jnp.linalg.qr(jax.random.normal(key, (num_planes, dim, 2), jnp.float32))
    # By LAPACK's own choice of signs all x would lie in one half of the space.
    planes = q * jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[:, None, :]

    def products_of_plane(plane):
        first, second = plane.T
        directions = jnp.cos(angles)[:, None] * first + jnp.sin(angles)[:, None] * second
        queries = feature_map(norms[:, None] * first)
        keys = (key_feature_map or feature_map)(norms[:, None, None] * directions)
        return jnp.einsum('ar,btr->abt', queries, keys)

    # A few planes at a time, because each has n·t keys of R features.
    products = jax.lax.map(products_of_plane, planes, batch_size=min(num_planes, _PLANES))
    return KernelProfile(np.asarray(products.mean(axis=0)), np.asarray(products.std(axis=0)))


def _accumulator(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    padded = (1,) * (len(target) - len(shape)) + shape
    return len(padded) == len(target) and all(
        s in (1, t) for s, t in zip(padded, target, strict=True)
    )


def _scale(x: jax.Array, temperature: float | None) -> float:
    """1/√τ: x' = x · scale."""
    if temperature is None:
        return x.shape[-1] ** -0.25
    if not isinstance(temperature, numbers.Real) or not 0 < temperature < math.inf:
        raise BadInput(
            f'temperature is {temperature!r}; allowed is a finite number > 0, known at '
            'compilation. Set it to one, or to None for the root of the head dimension.'
        )
    return float(temperature) ** -0.5


def _scaled(x: jax.Array, temperature: float | None) -> jax.Array:
    """x' in float32."""
    return x.astype(_accumulator(x)) * _scale(x, temperature)


def _half_square(x: jax.Array, temperature: float | None) -> jax.Array:
    """‖x'‖²/2 [..., 1]."""
    scaled = _scaled(x, temperature)
    return 0.5 * jnp.sum(scaled * scaled, axis=-1, keepdims=True)


def _log_norm(x: jax.Array, temperature: float | None, num_features: int) -> jax.Array:
    """‖x'‖²/2 + ½ log R [..., 1]: one number to subtract from all features of a token."""
    return _half_square(x, temperature) + 0.5 * math.log(num_features)


def _mean_and_spread(
    x: jax.Array, mask: jax.Array | None, axis_name: Any
) -> tuple[jax.Array, jax.Array]:
    """Over the tokens that `mask` lets through: x̄ [..., 1, H, D], mean ‖x - x̄‖² [..., 1, H, 1]."""
    keep = jnp.ones((x.shape[-3], 1, 1), bool) if mask is None else mask[..., None, None]

    def total(x: jax.Array) -> jax.Array:
        x = jnp.sum(x, axis=-3, keepdims=True)
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    count = jnp.maximum(total(keep), 1)
    mean = total(jnp.where(keep, x, 0)) / count
    deviation = jnp.where(keep, x - mean, 0)
    return mean, jnp.sum(total(deviation * deviation), axis=-1, keepdims=True) / count


def _dense(x: jax.Array, kernel: jax.Array, scale: float = 1) -> jax.Array:
    dtype = _accumulator(x)
    kernel = kernel.astype(x.dtype)
    if x.dtype == dtype:
        # The kernel is smaller than x and than the product.
        return jnp.einsum('...d,dr->...r', x, kernel * scale)
    # bfloat16 would round the kernel once more: what else is a function of it would not fit.
    return jnp.einsum('...d,dr->...r', x, kernel, preferred_element_type=dtype) * scale


def _project(x: jax.Array, projection: jax.Array | None, temperature: float | None) -> jax.Array:
    if projection is None:
        return _scaled(x, temperature)
    return _dense(x, projection.T, _scale(x, temperature))


def _perceptron(x: jax.Array, theta: Theta, temperature: float | None) -> jax.Array:
    hidden = _dense(x, theta['hidden_kernel'], _scale(x, temperature)) + theta['hidden_bias']
    hidden = jax.nn.relu(hidden).astype(x.dtype)
    return _dense(hidden, theta['output_kernel']) + theta['output_bias']


def _normalise(features: jax.Array) -> jax.Array:
    return features * features.shape[-1] ** -0.5
