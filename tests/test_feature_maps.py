"""Feature maps against NumPy, their positivity, and the estimator of the softmax kernel."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from performer_vit import feature_maps, projections
from tests import reference

PROJECTED = ('relu', 'gelu', 'elu')
LEARNT = ('ftheta', 'ftheta_mixture')


@functools.cache
def theta_for(kernel, dim=4, num_features=6):
    """fθ's weights away from their initial zeros, which would hide a term left out."""
    init = jax.jit(feature_maps.init_theta, static_argnums=(1, 2, 3), static_argnames='mixture')
    theta = init(jax.random.key(0), dim, 16, num_features, mixture=kernel == 'ftheta_mixture')
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: np.float32(np.asarray(leaf) + 0.3 * rng.normal(size=leaf.shape)), theta
    )


def feature_map(kernel):
    """x [..., 4] ↦ φ(x), with fixed weights, compiled."""
    phi = getattr(feature_maps, kernel)
    if kernel in LEARNT:
        weights = theta_for(kernel)
    else:
        weights = projections.gaussian(jax.random.key(0), 6, 4)
    return jax.jit(lambda x: phi(x, weights)), weights


@pytest.mark.parametrize('kernel', ['softmax', *PROJECTED, *LEARNT])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_against_numpy(kernel, dtype):
    """Catches a wrong formula, scale or ε, and features in the compute dtype.

    The reference gets the weights as rounded to the compute dtype, so what is left is the rounding
    of float32, but for fθ's hidden layer, which bfloat16 rounds to 8 bits.
    """
    phi, weights = feature_map(kernel)
    x = np.random.default_rng(1).normal(size=(2, 5, 3, 4)).astype(dtype)
    features = phi(x)
    assert features.shape == (2, 5, 3, 6)
    assert features.dtype == jnp.float32
    if kernel in LEARNT:
        kernels = {
            name: weight.astype(dtype)
            for name, weight in weights.items()
            if name.endswith('kernel')
        }
        rounded = {'theta': weights | kernels}
    else:
        rounded = {'projection': weights.astype(dtype)}
    expected = np.exp(reference.log_features(kernel, x, **rounded)) / 6**0.5
    tolerance = 2e-2 if dtype == jnp.bfloat16 and kernel in LEARNT else 2e-5
    np.testing.assert_allclose(features, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('kernel', PROJECTED)
def test_without_projection_features_are_the_inputs_own(kernel):
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    expected = np.exp(reference.log_features(kernel, x)) / 4**0.5
    np.testing.assert_allclose(jax.jit(getattr(feature_maps, kernel))(x), expected, rtol=1e-5)


def test_gelu_minimum():
    """Catches a shift that leaves GELU negative, or lifts it by more than its minimum."""
    u = np.linspace(-0.76, -0.74, 200_001)
    gelu = u * 0.5 * (1 + np.vectorize(math.erf)(u / np.sqrt(2)))
    assert feature_maps.GELU_MINIMUM == pytest.approx(gelu.min(), abs=1e-14)


@pytest.mark.parametrize('kernel', PROJECTED)
def test_positive_at_every_scale_of_float32(kernel):
    """All signs and exponents of float32, by bit patterns; catches ELU's cancellation to 0.

    Subnormal and infinite patterns are left out.
    """
    bits = np.linspace(0x00800000, 0x7F7FFFFF, 200_001).astype(np.uint32)
    x = np.concatenate([bits, bits | np.uint32(0x80000000)]).view(np.float32)
    x = np.concatenate([x, np.linspace(-20, 20, 200_001, dtype=np.float32)])[:, None]
    features = np.asarray(jax.jit(getattr(feature_maps, kernel))(x))
    assert np.all(features >= 0.99 * feature_maps.EPSILON)
    assert np.all(np.isfinite(features))


EXTREME = hnp.arrays(
    np.float32,
    (3, 4),
    elements=st.one_of(
        st.floats(-1e3, 1e3, width=32), st.sampled_from([-1e3, 1e3, 0.0, -0.0, 1e-30])
    ),
)


@pytest.mark.parametrize('kernel', [*PROJECTED, *LEARNT])
def test_positive_and_finite_on_extreme_inputs(kernel):
    """|x| to 1e3; catches a map that goes negative or overflows."""
    phi, _ = feature_map(kernel)

    @settings(max_examples=60, deadline=None)
    @given(EXTREME, st.sampled_from([jnp.float32, jnp.bfloat16]))
    def check(x, dtype):
        features = np.asarray(phi(jnp.asarray(x, dtype)))
        assert np.all(features > 0.99 * feature_maps.EPSILON / 6**0.5)
        assert np.all(np.isfinite(features))

    check()


LOG_FEATURES = jax.jit(feature_maps.softmax_log_features)


@settings(max_examples=60, deadline=None)
@given(EXTREME)
def test_softmax_log_features_on_extreme_inputs(x):
    """Catches an exponential taken before the stabiliser, where it under- or overflows."""
    w = projections.gaussian(jax.random.key(0), 6, 4)
    log_features = LOG_FEATURES(x, w)
    expected = reference.log_features('softmax', x, w) - 0.5 * np.log(6)
    np.testing.assert_allclose(log_features, expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize('name', ['mixture_logit', 'log_temperature'])
def test_the_mixture_learns(name):
    """Catches a weight or temperature that the output does not depend on."""
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    theta = theta_for('ftheta_mixture')
    gradient = jax.jit(jax.grad(lambda t: jnp.sum(feature_maps.ftheta_mixture(x, t))))(theta)
    assert abs(gradient[name]) > 1e-3


def estimates(query, key, projection, num_features, num_draws):
    """φ(q)·φ(k) [draws, pairs] over independent draws, and the kernel exp(q·k/√D) [pairs]."""
    dim = query.shape[-1]

    def estimate(number):
        w = projections.draw(0, 0, number, num_features, dim, projection)
        return jnp.sum(feature_maps.softmax(query, w) * feature_maps.softmax(key, w), axis=-1)

    kernel = np.exp(np.sum(np.asarray(query * key, np.float64), axis=-1) / dim**0.5)
    return np.asarray(jax.jit(jax.vmap(estimate))(jnp.arange(num_draws)), np.float64), kernel


@pytest.mark.parametrize('projection', ['orthogonal', 'gaussian'])
@pytest.mark.parametrize('num_features', [3, 6])
def test_softmax_estimator_is_unbiased(projection, num_features):
    """The mean of 10,000 draws within 4.5 standard errors of exp(q·k/√D), and within 3 %.

    By the central limit theorem a false alarm comes once in 10^5 per pair. Catches a missing
    exp(-|x|²/2), d^(-1/4), 1/√R or rescaling of the orthogonal rows.
    """
    query, key = 0.45 * jax.random.normal(jax.random.key(9), (2, 3, 4))
    # Aligned, opposed and unrelated pairs: the kernel above, below and near 1. Not k = -q: there
    # the estimate is exact whatever is drawn.
    key = key.at[0].set(0.7 * query[0]).at[1].set(-0.4 * query[1])
    samples, kernel = estimates(query, key, projection, num_features, 10_000)
    error = np.abs(samples.mean(axis=0) - kernel)
    assert np.all(error < 4.5 * samples.std(axis=0) / len(samples) ** 0.5)
    assert np.all(error < 0.03 * kernel)
    assert np.any(np.abs(kernel - 1) > 0.2)


def test_orthogonal_rows_have_less_variance():
    """Over 30,000 draws the mean squared errors differ by over 3.7 standard errors.

    Were they equal, that would pass once in 10,000 seeds. Choromanski et al. 2021, theorem 2.
    Catches rows that are not orthogonal, or not in the feature map's own coordinates.
    """
    # |q' + k'| = 0.8: larger ones have tails too heavy for a sample variance to be trusted.
    query = jnp.full((1, 8), 0.4 * 8**-0.25)
    errors = {}
    for projection in ('orthogonal', 'gaussian'):
        samples, kernel = estimates(query, query, projection, 8, 30_000)
        errors[projection] = (samples - kernel) ** 2
    gain = errors['gaussian'].mean() - errors['orthogonal'].mean()
    spread = np.sqrt(sum(error.var() / error.size for error in errors.values()))
    assert gain > 3.7 * spread
