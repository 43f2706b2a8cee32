"""Feature maps φ: R^D → R^R with positive entries, by the name of their kernel.

φ(x)_r = f(w_r·x') / √R with x' = x / D^(1/4): the random features of Choromanski et al. 2021,
"Rethinking Attention with Performers", arXiv 2009.14794, eq. (5), where w_r are the rows of a
projection W. The scaling of x makes φ(q)·φ(k) an estimate of a kernel of q·k/√D, as in softmax
attention, and 1/√R makes it a mean over features. Positive features make the attention normaliser
φ(q)·Σ φ(k) positive.

All maps take x [..., D] of any floating dtype and multiply by the weights in that dtype, with sums
in float32; features are float32 (float64 for float64 x). Weights are shared by everything on the
leading axes.
"""

import math

import jax
import jax.numpy as jnp

Theta = dict[str, jax.Array]

# Where f can be 0 a query may have no active feature, and a key none in common with it. This much
# is added to f, so that the normaliser is at least ε² for each key attended to: far above what
# float32 can hold, and small beside f's values of order 1. It needs no more for bfloat16 inputs,
# because features are not rounded to bfloat16.
EPSILON = 1e-3

# min over u of GELU(u) = u Φ(u), taken at u = -0.7517915...
GELU_MINIMUM = -0.16997120747990369

# The exponential branch of fθ's mixture stays within exp(±10): its products, summed over thousands
# of keys, are far from float32's largest number.
MAX_EXPONENT = 10.0


def softmax_log_features(x: jax.Array, projection: jax.Array) -> jax.Array:
    """Logarithm of the positive random features of the softmax kernel.

    log φ(x)_r = w_r·x' - |x'|²/2 - ½ log R, x' = x / D^(1/4). With rows w_r ~ N(0, I_D),
    E[φ(q)·φ(k)] = exp(q·k/√D) (Choromanski et al. 2021, Lemma 1). φ itself over- and underflows
    float32 where |x'| is large; its logarithm does not, so attention takes this and stabilises it.

    Args:
      x: [..., D].
      projection: W [R, D].

    Returns:
      [..., R] float32.
    """
    scaled = x.astype(_accumulator(x)) * x.shape[-1] ** -0.25
    half_square = 0.5 * jnp.sum(scaled * scaled, axis=-1, keepdims=True)
    return _project(x, projection) - half_square - 0.5 * math.log(projection.shape[0])


def softmax(x: jax.Array, projection: jax.Array) -> jax.Array:
    """Positive random features of the softmax kernel, exp of `softmax_log_features`.

    Not stabilised: positive as real numbers, and in float32 for |x'| up to about 10, beyond which
    they may under- or overflow. Use it to study the estimator, and
    `softmax_log_features` to attend.

    Args:
      x: [..., D].
      projection: W [R, D].

    Returns:
      [..., R] float32.
    """
    return jnp.exp(softmax_log_features(x, projection))


def relu(x: jax.Array, projection: jax.Array | None = None) -> jax.Array:
    """φ(x)_r = (max(w_r·x', 0) + ε) / √R, at least ε/√R > 0 by construction.

    The generalised attention with f = ReLU of Choromanski et al. 2021, section 4, with the same ε.

    Args:
      x: [..., D].
      projection: W [R, D], or None for x' itself in its place (R = D).

    Returns:
      [..., R] float32.
    """
    return _normalise(jax.nn.relu(_project(x, projection)) + EPSILON)


def gelu(x: jax.Array, projection: jax.Array | None = None) -> jax.Array:
    """φ(x)_r = (GELU(w_r·x') - min GELU + ε) / √R, at least about ε/√R > 0 by construction.

    GELU(u) = u Φ(u) (Hendrycks and Gimpel 2016, arXiv 1606.08415; exact, not the tanh formula)
    dips to -0.16997; shifted by that minimum it is never negative. ε also covers its rounding.

    Args:
      x: [..., D].
      projection: W [R, D], or None for x' itself in its place (R = D).

    Returns:
      [..., R] float32.
    """
    value = jax.nn.gelu(_project(x, projection), approximate=False)
    return _normalise(value + (EPSILON - GELU_MINIMUM))


def elu(x: jax.Array, projection: jax.Array | None = None) -> jax.Array:
    """φ(x)_r = (ELU(w_r·x') + 1 + ε) / √R, at least ε/√R > 0 by construction.

    ELU(u) + 1 is u + 1 for u > 0 and exp(u) elsewhere (Katharopoulos et al. 2020, "Transformers are
    RNNs", arXiv 2006.16236, eq. (7)). It is positive as a real number; ε keeps it so where exp(u)
    underflows.

    Args:
      x: [..., D].
      projection: W [R, D], or None for x' itself in its place (R = D).

    Returns:
      [..., R] float32.
    """
    u = _project(x, projection)
    # Not jax.nn.elu(u) + 1, whose expm1(u) + 1 cancels to 0 from u = -17 on.
    value = jnp.where(u > 0, u + 1, jnp.exp(jnp.minimum(u, 0)))
    return _normalise(value + EPSILON)


def init_theta(key: jax.Array, dim: int, hidden: int, num_features: int, *, mixture: bool) -> Theta:
    """Initial weights of the learnable feature map fθ.

    Kernels are normal with variance 1/fan-in (LeCun), biases 0; the mixture starts at equal weights
    and temperature 1.

    Args:
      key: a JAX random key.
      dim: D, the head dimension.
      hidden: width of the hidden layer.
      num_features: R.
      mixture: whether the weights are for `ftheta_mixture` rather than `ftheta`.

    Returns:
      float32 arrays: `hidden_kernel` [D, hidden], `hidden_bias` [hidden], `output_kernel`
      [hidden, R], `output_bias` [R]; for the mixture also the scalars `mixture_logit` and
      `log_temperature`.
    """
    hidden_key, output_key = jax.random.split(key)
    init = jax.nn.initializers.lecun_normal()
    theta = {
        'hidden_kernel': init(hidden_key, (dim, hidden), jnp.float32),
        'hidden_bias': jnp.zeros((hidden,), jnp.float32),
        'output_kernel': init(output_key, (hidden, num_features), jnp.float32),
        'output_bias': jnp.zeros((num_features,), jnp.float32),
    }
    if mixture:
        theta['mixture_logit'] = jnp.zeros((), jnp.float32)
        theta['log_temperature'] = jnp.zeros((), jnp.float32)
    return theta


def ftheta(x: jax.Array, theta: Theta) -> jax.Array:
    """Learnable map φ(x) = (ReLU(u) + ε) / √R, at least ε/√R > 0 by construction.

    u = A₂ ReLU(A₁ x' + b₁) + b₂, a perceptron of one hidden layer.

    Args:
      x: [..., D].
      theta: as `init_theta(..., mixture=False)` makes it.

    Returns:
      [..., R] float32.
    """
    return _normalise(jax.nn.relu(_perceptron(x, theta)) + EPSILON)


def ftheta_mixture(x: jax.Array, theta: Theta) -> jax.Array:
    """Learnable map φ(x) = (a ReLU(u) + (1 - a) exp(clamp(u/τ, ±10)) + ε) / √R, at least ε/√R > 0.

    u is the perceptron of `ftheta`; the weight a = sigmoid(`mixture_logit`) and the temperature
    τ = exp(`log_temperature`) are learnt, one of each for the map.

    Args:
      x: [..., D].
      theta: as `init_theta(..., mixture=True)` makes it.

    Returns:
      [..., R] float32.
    """
    u = _perceptron(x, theta)
    weight = jax.nn.sigmoid(theta['mixture_logit'])
    exponent = jnp.clip(u * jnp.exp(-theta['log_temperature']), -MAX_EXPONENT, MAX_EXPONENT)
    return _normalise(weight * jax.nn.relu(u) + (1 - weight) * jnp.exp(exponent) + EPSILON)


def _accumulator(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum(
        '...d,dr->...r', x, kernel.astype(x.dtype), preferred_element_type=_accumulator(x)
    )


def _project(x: jax.Array, projection: jax.Array | None) -> jax.Array:
    # x is scaled after the product, in float32, not rounded once more before it.
    scale = x.shape[-1] ** -0.25
    if projection is None:
        return x.astype(_accumulator(x)) * scale
    return _dense(x, projection.T) * scale


def _perceptron(x: jax.Array, theta: Theta) -> jax.Array:
    hidden = _dense(x, theta['hidden_kernel']) * x.shape[-1] ** -0.25 + theta['hidden_bias']
    hidden = jax.nn.relu(hidden).astype(x.dtype)
    return _dense(hidden, theta['output_kernel']) + theta['output_bias']


def _normalise(features: jax.Array) -> jax.Array:
    return features * features.shape[-1] ** -0.5
