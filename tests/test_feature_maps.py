"""Feature maps against NumPy, their positivity, and the estimators of the softmax kernel."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from performer_vit import feature_maps, projections
from performer_vit.errors import BadInput
from tests import reference

PROJECTED = ('relu', 'gelu', 'elu')
LEARNT = ('ftheta', 'ftheta_mixture')

# f with its ε, in NumPy.
FUNCTIONS = {
    'relu': lambda u: np.maximum(u, 0) + 1e-3,
    'relu_squared': lambda u: np.maximum(u, 0) ** 2 + 1e-3,
    'gelu': lambda u: u * scipy.special.ndtr(u) + 0.16997120747990369 + 1e-3,
    'elu': lambda u: np.where(u > 0, u + 1, np.exp(np.minimum(u, 0))) + 1e-3,
    'sigmoid': lambda u: scipy.special.expit(u) + 1e-3,
    'softplus': lambda u: np.logaddexp(u, 0) + 1e-3,
    'exp': lambda u: np.exp(np.clip(u, -15, 15)),
    'identity': lambda u: u,
}
POSITIVE = tuple(kernel for kernel in FUNCTIONS if kernel != 'identity')
# The least value of f; that of the exponential's clamp where it has no ε.
FLOOR = {'exp': math.exp(-15)}


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


@pytest.mark.parametrize('kernel', [kernel for kernel in POSITIVE if kernel != 'relu_squared'])
def test_positive_at_every_scale_of_float32(kernel):
    """All signs and exponents of float32, by bit patterns; catches ELU's cancellation to 0.

    Subnormal and infinite patterns are left out, as is the squared ReLU, which leaves float32.
    """
    bits = np.linspace(0x00800000, 0x7F7FFFFF, 200_001).astype(np.uint32)
    x = np.concatenate([bits, bits | np.uint32(0x80000000)]).view(np.float32)
    x = np.concatenate([x, np.linspace(-20, 20, 200_001, dtype=np.float32)])[:, None]
    features = np.asarray(jax.jit(getattr(feature_maps, kernel))(x))
    assert np.all(features >= 0.99 * FLOOR.get(kernel, feature_maps.EPSILON))
    assert np.all(np.isfinite(features))


EXTREME = hnp.arrays(
    np.float32,
    (3, 4),
    elements=st.one_of(
        st.floats(-1e3, 1e3, width=32), st.sampled_from([-1e3, 1e3, 0.0, -0.0, 1e-30])
    ),
)


@pytest.mark.parametrize('kernel', [*POSITIVE, *LEARNT])
def test_positive_and_finite_on_extreme_inputs(kernel):
    """|x| to 1e3; catches a map that goes negative or overflows."""
    phi, _ = feature_map(kernel)

    @settings(max_examples=60, deadline=None)
    @given(EXTREME, st.sampled_from([jnp.float32, jnp.bfloat16]))
    def check(x, dtype):
        features = np.asarray(phi(jnp.asarray(x, dtype)))
        assert np.all(features > 0.99 * FLOOR.get(kernel, feature_maps.EPSILON) / 6**0.5)
        assert np.all(np.isfinite(features))

    check()


LOG_KERNELS = ('softmax_log_features', 'hyperbolic_log_features', 'optimal_log_features')
# Every map of x [..., 4] alone that has a reference below; and every function with a temperature.
REFERENCED = (*FUNCTIONS, 'elementwise', 'softmax', 'trigonometric', *LOG_KERNELS)
SCALED = (*REFERENCED, 'mean_square_sum', *LEARNT)
# A of `optimal_log_features` wherever it does not matter which.
A = -0.3


def any_map(name, **options):
    """x [..., 4] ↦ all that the function gives, with fixed weights; x's neighbours are the keys."""
    function = functools.partial(getattr(feature_maps, name), **options)
    if name in LEARNT:
        return functools.partial(function, theta=theta_for(name))
    if name == 'mean_square_sum':
        return lambda x: function(x[:, None], x[::-1, None])
    arguments = {'elementwise': {'function': jnp.tanh}, 'optimal_log_features': {'a': A}}
    projection = projections.gaussian(jax.random.key(0), 6, 4)
    return functools.partial(function, projection=projection, **arguments.get(name, {}))


def scaled(x):
    """x' in float64."""
    return np.asarray(x, np.float64) / x.shape[-1] ** 0.25


def feature_reference(name, x, w, a=A):
    """The docstrings' formulas in float64; of 'trigonometric' the features alone."""
    x, w = scaled(x), np.asarray(w, np.float64)
    u, half_square = x @ w.T, np.sum(x**2, axis=-1, keepdims=True) / 2
    root = len(w) ** 0.5
    if name in FUNCTIONS:
        return FUNCTIONS[name](u) / root
    if name == 'elementwise':
        return (np.tanh(u) + 1e-3) / root
    if name == 'trigonometric':
        return np.concatenate([np.cos(u), np.sin(u)], axis=-1) / root
    if name == 'softmax':
        return np.exp(u - half_square) / root
    if name == 'softmax_log_features':
        return u - half_square - np.log(root)
    if name == 'hyperbolic_log_features':
        return np.concatenate([u, -u], axis=-1) - half_square - np.log(2**0.5 * root)
    weight = (1 - 4 * a) ** (x.shape[-1] / 4) * np.exp(a * np.sum(w**2, axis=-1))
    return np.log(weight) + np.sqrt(1 - 4 * a) * u - half_square - np.log(root)


@pytest.mark.parametrize('kernel', LOG_KERNELS)
def test_log_features_on_extreme_inputs(kernel):
    """Catches an exponential taken before the stabiliser, where it under- or overflows."""
    log_map = jax.jit(any_map(kernel))
    w = projections.gaussian(jax.random.key(0), 6, 4)

    @settings(max_examples=60, deadline=None)
    @given(EXTREME, st.sampled_from([jnp.float32, jnp.bfloat16]))
    def check(x, dtype):
        x = jnp.asarray(x, dtype)
        expected = feature_reference(kernel, x, w.astype(dtype))
        np.testing.assert_allclose(log_map(x), expected, rtol=1e-5, atol=1e-2)

    check()


@pytest.mark.parametrize('name', REFERENCED)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('size', [1, 30])
def test_formulas_against_numpy(name, dtype, size):
    """Catches a wrong function, term, ε, clamp or order of features; 30 is far beyond exp's clamp.

    The reference gets the weights as rounded to the compute dtype: catches ‖w‖² of other rows than
    those of the product, too.
    """
    x = (size * np.random.default_rng(1).normal(size=(2, 5, 3, 4))).astype(dtype)
    actual = jax.jit(any_map(name))(x)
    features = actual[0] if name == 'trigonometric' else actual
    assert features.dtype == jnp.float32
    w = projections.gaussian(jax.random.key(0), 6, 4).astype(dtype)
    tolerance = 1e-5 * size
    np.testing.assert_allclose(
        features, feature_reference(name, x, w), rtol=tolerance, atol=tolerance
    )


def test_trigonometric_scale():
    """Catches a scale of another shape, or without the half."""
    x = np.random.default_rng(1).normal(size=(2, 5, 3, 4)).astype(np.float32)
    _, log_scale = jax.jit(any_map('trigonometric'))(x)
    np.testing.assert_allclose(log_scale, np.sum(x**2, axis=-1) / 4, rtol=1e-5)


@pytest.mark.parametrize('kernel', FUNCTIONS)
def test_without_projection_the_function_acts_on_the_inputs(kernel):
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    expected = feature_reference(kernel, x, np.eye(4))
    np.testing.assert_allclose(
        jax.jit(getattr(feature_maps, kernel))(x), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize('name', REFERENCED)
def test_gradients_against_central_differences(name):
    """Catches a derivative that a clamp, a branch or a custom rule gets wrong."""
    x, direction = np.random.default_rng(2).normal(size=(2, 3, 4))
    w = projections.gaussian(jax.random.key(0), 6, 4)
    # Unequal weights of the features in the sum, so that errors cannot cancel.
    weights = np.random.default_rng(3).normal(size=feature_reference(name, x, w).shape)

    def total(x):
        return np.sum(weights * feature_reference(name, x, w))

    def total_in_jax(x):
        actual = any_map(name)(x)
        return jnp.sum(weights * (actual[0] if name == 'trigonometric' else actual))

    expected = (total(x + 1e-5 * direction) - total(x - 1e-5 * direction)) / 2e-5
    gradient = jax.jit(jax.grad(total_in_jax))(np.float32(x))
    assert np.sum(gradient * direction) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('name', REFERENCED)
def test_float64_inputs_give_float64(name):
    """Catches a float32 constant or cast, which would show at 1e-12."""
    x = np.random.default_rng(1).normal(size=(5, 4))
    w = projections.gaussian(jax.random.key(0), 6, 4)
    with jax.enable_x64(True):
        actual = any_map(name)(jnp.asarray(x))
        features = actual[0] if name == 'trigonometric' else actual
        assert features.dtype == jnp.float64
        expected = feature_reference(name, x, w)
        np.testing.assert_allclose(features, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize('name', ['mixture_logit', 'log_temperature', 'norm_weight'])
def test_the_mixture_learns(name):
    """Catches a weight or temperature that the output does not depend on, wherever it starts."""
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    starts = [init_theta('ftheta_mixture', theta_init) for theta_init in feature_maps.THETA_INITS]
    for theta in (theta_for('ftheta_mixture'), *starts):
        gradient = jax.jit(jax.grad(lambda t: jnp.sum(feature_maps.ftheta_mixture(x, t))))(theta)
        assert abs(gradient[name]) > 1e-3


W = projections.gaussian(jax.random.key(7), 6, 4)


def init_theta(kernel, theta_init, hidden=0):
    return feature_maps.init_theta(
        jax.random.key(3),
        4,
        hidden,
        6,
        mixture=kernel == 'ftheta_mixture',
        theta_init=theta_init,
        projection=None if theta_init == 'lecun' else W,
    )


@pytest.mark.parametrize('hidden', [0, 6, 15])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_ftheta_starts_as_relu_features(hidden, dtype):
    """Values and slopes of `relu` with the same W, whatever hidden units there are besides.

    Catches a scale, a sign or an ε of its own, and spare units that have a say at the start. To
    float32's rounding; bfloat16 rounds the hidden layer to 8 bits.
    """
    x = np.random.default_rng(1).normal(size=(2, 5, 3, 4)).astype(dtype)
    weights = np.random.default_rng(2).normal(size=(2, 5, 3, 6))
    theta = init_theta('ftheta', 'relu', hidden)
    assert theta['hidden_kernel'].shape == (4, hidden or 6)

    def values_and_slopes(phi):
        total = jax.jit(jax.value_and_grad(lambda x: jnp.sum(weights * phi(x).astype(float))))
        return jax.jit(phi)(x), *total(x)

    actual = values_and_slopes(lambda x: feature_maps.ftheta(x, theta, temperature=3))
    expected = values_and_slopes(lambda x: feature_maps.relu(x, W, temperature=3))
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-6
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.float32(one), np.float32(other), tolerance, tolerance)


@pytest.mark.parametrize('hidden', [0, 12, 15])
@pytest.mark.parametrize('theta_init', ['relu', 'softmax'])
def test_mixture_starts_as_one_of_its_branches(theta_init, hidden):
    """The closed form in float64, and the weight of the other branch.

    Catches a u that is not Wx', an exponent without -‖x'‖²/2, and a branch that has no weight.
    """
    x = np.random.default_rng(1).normal(size=(20, 4)).astype(np.float32)
    theta = init_theta('ftheta_mixture', theta_init, hidden)
    u = scaled(x) @ np.float64(W).T
    if theta_init == 'relu':
        u = np.maximum(u, 0)
    weight = 1 / (1 + math.exp(-4 if theta_init == 'relu' else 4))
    exponential = np.exp(u - np.sum(scaled(x) ** 2, axis=-1, keepdims=True) / 2)
    expected = weight * np.maximum(u, 0) + (1 - weight) * exponential + 1e-3
    actual = jax.jit(feature_maps.ftheta_mixture)(x, theta)
    np.testing.assert_allclose(actual, expected / 6**0.5, rtol=1e-5)
    assert 0.01 < min(weight, 1 - weight) < 0.02
    branch = getattr(feature_maps, theta_init)(x, W)
    assert np.max(np.abs(actual - branch)) < 0.03 * np.max(branch)


@pytest.mark.parametrize('theta_init', ['relu', 'softmax'])
def test_spare_units_are_learnt(theta_init):
    """After one step of descent no weight of theirs is without a gradient; catches dead units."""
    x = np.random.default_rng(1).normal(size=(200, 4)).astype(np.float32)
    theta = init_theta('ftheta_mixture', theta_init, 15)
    needed = {'relu': 6, 'softmax': 12}[theta_init]
    assert np.all(theta['output_kernel'][needed:] == 0)
    assert len(np.unique(theta['hidden_kernel'][:, needed:])) == 4 * (15 - needed)
    weights = np.random.default_rng(2).normal(size=(200, 6))
    gradient = jax.jit(
        jax.grad(lambda theta: jnp.mean(weights * feature_maps.ftheta_mixture(x, theta)))
    )
    first = gradient(theta)
    assert np.all(first['output_kernel'][needed:] != 0)
    second = gradient(jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, theta, first))
    assert np.all(second['hidden_kernel'][:, needed:] != 0)
    assert np.all(second['hidden_bias'][needed:] != 0)


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'theta_init': 'zeros'}, "theta_init is 'zeros'; allowed are 'lecun', 'relu', 'softmax'"),
        ({'theta_init': 'softmax', 'mixture': False}, "the kernel to 'ftheta_mixture'"),
        ({'theta_init': 'softmax', 'hidden': 11}, 'hidden is 11; .* needs 12 or more.* 0 for 12'),
        ({'theta_init': 'relu', 'hidden': 5}, 'hidden is 5; .* needs 6 or more.* 0 for 6'),
        ({'theta_init': 'lecun', 'hidden': -1}, 'hidden is -1; .* needs 1 or more'),
        ({'theta_init': 'lecun', 'projection': W}, "projection is given, but theta_init 'lecun'"),
        ({'theta_init': 'relu', 'projection': None}, "projection is missing, .* but 'none'"),
        ({'theta_init': 'relu', 'projection': W[:5]}, r'projection is \(5, 4\) .* \(6, 4\)'),
    ],
)
def test_init_theta_refuses(given, message):
    """Catches a start that is silently another one."""
    options = {'hidden': 0, 'mixture': True, 'projection': W} | given
    if options['theta_init'] == 'lecun' and 'projection' not in given:
        options['projection'] = None
    with pytest.raises(BadInput, match=message):
        feature_maps.init_theta(jax.random.key(0), 4, num_features=6, **options)


NORMS = np.array([0.5, 2.0])
ANGLES = np.linspace(0, np.pi, 7)


def test_profile_of_relu_features_is_the_arc_cosine_kernel():
    """Within 5 standard errors for 100,000 independent rows: a false alarm comes once in 10^6.

    E[ReLU(w·x) ReLU(w·y)] = ‖x‖ ‖y‖ (sin α + (π - α) cos α) / 2π (Cho and Saul 2009), and what ε
    adds to it. By Cauchy and Schwarz the variance of one row is at most 3/2 ‖x‖² ‖y‖², E ReLU(z)⁴
    being 3/2 for z ~ N(0, 1), and that of the mean over planes no more. Catches x' mistaken for x,
    a wrong angle, sum or mean.
    """
    w = projections.gaussian(jax.random.key(1), 100_000, 8)
    relu = jax.jit(functools.partial(feature_maps.relu, projection=w))
    profile = feature_maps.kernel_profile(relu, 8, NORMS, ANGLES, jax.random.key(2), num_planes=2)
    x, y = NORMS[:, None, None] / 8**0.25, NORMS[:, None] / 8**0.25
    expected = x * y * (np.sin(ANGLES) + (np.pi - ANGLES) * np.cos(ANGLES)) / (2 * np.pi)
    expected = expected + 1e-3 * (x + y) / np.sqrt(2 * np.pi) + 1e-6
    standard_error = np.sqrt(1.5 / 100_000) * x * y
    assert profile.mean.shape == profile.deviation.shape == (2, 2, 7)
    assert np.all(np.abs(profile.mean - expected) < 5 * standard_error)
    assert np.all(profile.deviation < 5 * standard_error)


def test_profile_of_softmax_features_is_the_exponential_kernel():
    """exp(x'·y') within 5 standard errors of 100,000 independent rows, from their closed form.

    Opposite vectors of one length have no variance: there it is rounding alone, of a sum whose
    order is the processor's to choose; that of n terms of one sign is about √n roundings off.
    """
    n = 100_000
    w = projections.gaussian(jax.random.key(1), n, 8)
    softmax = jax.jit(functools.partial(feature_maps.softmax, projection=w, temperature=4))
    profile = feature_maps.kernel_profile(
        softmax, 8, NORMS, ANGLES, jax.random.key(2), num_planes=2
    )
    x, y = NORMS[:, None, None] / 2, NORMS[:, None] / 2
    products = x * y * np.cos(ANGLES)
    variance = np.expm1(x**2 + y**2 + 2 * products) / n
    rounding = np.sqrt(n) * np.finfo(np.float32).eps
    error = np.abs(profile.mean / np.exp(products) - 1)
    assert np.all(error < 5 * np.sqrt(variance) + rounding)
    assert np.any(np.abs(products) > 0.5)


def test_profile_of_other_maps_of_keys():
    """A kernel without randomness, x·y ‖y‖²: catches axes in another order, and a map of keys
    that is not used or is that of queries.
    """
    profile = feature_maps.kernel_profile(
        lambda x: x,
        5,
        NORMS,
        ANGLES[:6],
        jax.random.key(2),
        key_feature_map=lambda y: y * jnp.sum(y**2, axis=-1, keepdims=True),
    )
    expected = NORMS[:, None, None] * NORMS[:, None] ** 3 * np.cos(ANGLES[:6])
    np.testing.assert_allclose(profile.mean, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(profile.deviation, 0, atol=1e-5)


def test_profile_is_the_mean_over_planes_of_all_directions():
    """Of x₁ y₁ it is x·y / D, by symmetry, and of ReLU(x₁) ReLU(y₁) the arc-cosine kernel / 2D;
    within 5 standard errors of 4,000 planes.

    Catches planes that favour a direction or one of its two ends, and a deviation that is not that
    of planes: Var[x₁²] = 2 (D - 1) / (D² (D + 2)) for a uniform direction x.
    """
    arc_cosine = (np.sin(ANGLES) + (np.pi - ANGLES) * np.cos(ANGLES)) / np.pi
    signed, relu = (
        feature_maps.kernel_profile(
            feature_map, 3, [1.0], ANGLES, jax.random.key(2), num_planes=4000
        )
        for feature_map in (lambda x: x[..., :1], lambda x: jax.nn.relu(x[..., :1]))
    )
    for profile, expected in ((signed, np.cos(ANGLES) / 3), (relu, arc_cosine / 6)):
        standard_error = profile.deviation[0, 0] / 4000**0.5 + 1e-9  # That of 0 at π is 0.
        assert np.all(np.abs(profile.mean[0, 0] - expected) < 5 * standard_error)
    assert signed.deviation[0, 0, 0] == pytest.approx((4 / 45) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'norms': [0.0]}, r'norms is \[0'),
        ({'norms': [math.inf]}, 'norms is .*inf'),
        ({'norms': 1.0}, 'norms is 1'),
        ({'angles': [-0.1]}, 'angles is .*from 0 to π'),
        ({'angles': [3.2]}, 'angles is'),
        ({'angles': []}, 'angles is .* at least one'),
        ({'dim': 1}, 'dim is 1 and num_planes 64'),
        ({'num_planes': 0}, 'num_planes 0'),
    ],
)
def test_profile_refuses(given, message):
    given = {'dim': 4, 'norms': [1.0], 'angles': [0.0], 'key': jax.random.key(0)} | given
    with pytest.raises(BadInput, match=message):
        feature_maps.kernel_profile(lambda x: x, **given)


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


@pytest.mark.parametrize('name', SCALED)
def test_temperature_scales_the_inputs(name):
    """τ = √D is the default, and τ is x' = x/√τ; catches a term that keeps its own scale."""
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    for temperature, factor in ((2.0, 1), (8, 0.5), (np.float32(0.5), 2)):
        actual = jax.jit(any_map(name, temperature=temperature))(x)
        expected = jax.jit(any_map(name))(np.float32(factor) * x)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), actual, expected)


@pytest.mark.parametrize('name', SCALED)
def test_temperature_must_be_a_positive_number(name):
    for temperature in (0, -1.0, math.nan, math.inf, 'warm', jnp.ones(())):
        with pytest.raises(BadInput, match='temperature is .*None for the root'):
            any_map(name, temperature=temperature)(jnp.ones((5, 4)))


@pytest.mark.parametrize('name', [name for name in SCALED if name != 'softmax'])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_finite_forward_and_backward_at_1e3(name, dtype):
    """Every |x_d| at 1e3, in all sign patterns: catches 0 · ∞ in a gradient, and an overflow.

    `softmax` is left out, which says that it leaves float32's range.
    """
    x = jnp.asarray(1e3 * np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, 16).T, dtype)

    @jax.jit
    def value_and_gradient(x):
        values, pullback = jax.vjp(any_map(name), x)
        return values, pullback(jax.tree.map(jnp.ones_like, values))

    for leaf in jax.tree.leaves(value_and_gradient(x)):
        assert np.all(np.isfinite(np.float32(leaf)))


def test_exponential_leaves_room_for_the_normaliser():
    """Over 100,000 keys the square of the normaliser, and its inverse, stay normal in float32.

    The gradient of a plain quotient divides by that square. Catches a larger clamp.
    """
    ends = np.float32([[-1e3], [1e3]])
    features = np.asarray(jax.jit(feature_maps.exp)(ends), np.float64)
    np.testing.assert_allclose(features, np.exp([[-15], [15]]), rtol=1e-5)
    smallest, largest = features[:, 0] ** 2
    limits = np.finfo(np.float32)
    assert (1e5 * largest) ** 2 < limits.max
    assert 1 / smallest**2 < limits.max
    assert np.all(jax.grad(lambda x: jnp.sum(feature_maps.exp(x)))(ends) == 0)


def test_elementwise_takes_any_function():
    """A function of no named map, with an ε of its own; catches ε or √R left out."""
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    w = projections.gaussian(jax.random.key(0), 6, 4)
    u = scaled(x) @ np.float64(w).T
    actual = feature_maps.elementwise(x, w, lambda u: u**4 / (1 + u**2), epsilon=0.25)
    np.testing.assert_allclose(actual, (u**4 / (1 + u**2) + 0.25) / 6**0.5, rtol=1e-5)
    # A result in another dtype does not make the features leave float32.
    for dtype in (jnp.bfloat16, bool):
        steps = feature_maps.elementwise(x, w, lambda u, d=dtype: (u > 0).astype(d), epsilon=0.0)
        assert steps.dtype == jnp.float32
        np.testing.assert_allclose(steps, (u > 0) / 6**0.5, rtol=1e-6)


@pytest.mark.parametrize(
    'function', [lambda u: u[..., :3], lambda u: 1.0, jnp.sum, lambda u: 1j * u, 'relu', None]
)
def test_elementwise_refuses_what_is_no_elementwise_function(function):
    """Catches a function over the features, whose result would broadcast."""
    with pytest.raises(BadInput, match='^function'):
        feature_maps.elementwise(jnp.ones((5, 4)), None, function)


def test_optimal_features_with_an_a_for_every_batch_element_and_head():
    """Catches A broadcast along another axis, and A = 0 that is not the positive features."""
    x = np.random.default_rng(1).normal(size=(2, 5, 3, 4)).astype(np.float32)
    w = projections.gaussian(jax.random.key(0), 6, 4)
    a = np.linspace(-2, 0.12, 6, dtype=np.float32).reshape(2, 1, 3, 1)
    optimal = jax.jit(feature_maps.optimal_log_features)
    expected = feature_reference('optimal_log_features', x, w, np.float64(a))
    np.testing.assert_allclose(optimal(x, w, a), expected, rtol=1e-5, atol=1e-5)
    positive = jax.jit(feature_maps.softmax_log_features)(x, w)
    np.testing.assert_allclose(optimal(x, w, 0.0), positive, rtol=1e-6)


@pytest.mark.parametrize('a', [0.125, 1, math.nan, -math.inf, np.zeros(6), np.zeros((5, 1, 3, 1))])
def test_optimal_features_refuse_an_a_without_a_variance_or_of_another_shape(a):
    """[6] would broadcast against the features, [5, 1, 3, 1] against a batch of 1."""
    with pytest.raises(BadInput, match='^a '):
        feature_maps.optimal_log_features(jnp.ones((1, 5, 3, 4)), jnp.ones((6, 4)), a)


# Pairs in the coordinates of q' and k': aligned, unrelated, opposed. ‖q' + k'‖² is at most 0.37:
# from about 0.6 on the tails are too heavy for a sample variance to be trusted.
QUERY = 0.7 * np.float32([[0.4, 0.2, -0.1, 0.3]] * 3)
KEY = 0.7 * np.float32([[0.3, 0.1, 0.2, 0.1], [-0.3, 0.4, 0.1, 0.2], [-0.4, 0.1, 0.3, -0.2]])
NUM_ROWS = 200_000
SUM_SQUARE = np.sum(np.float64(QUERY + KEY) ** 2, axis=-1)
DIFFERENCE_SQUARE = np.sum(np.float64(QUERY - KEY) ** 2, axis=-1)
KERNEL = np.exp(np.sum(np.float64(QUERY * KEY), axis=-1))


def second_moment(a, sum_square, dim):
    """E[(φ_r(q) φ_r(k) R)²] / exp(2 q'·k') of the optimal features, by the Gaussian integral."""
    return (1 - 4 * a) ** dim * (1 - 8 * a) ** (-dim / 2) * np.exp(sum_square / (1 - 8 * a))


# A of the optimal features, by the name of the estimator.
OPTIMAL = {
    'optimal': -0.1,
    'optimal_above_0': 0.03,
    'best': np.asarray(feature_maps.optimal_a(SUM_SQUARE, 4))[:, None],
}
# Relative variance of the estimate from one row: that from R features is, for independent rows,
# divided by R, and by R/2 where a row makes two features.
VARIANCES = {
    'positive': np.exp(SUM_SQUARE) - 1,
    'hyperbolic': np.cosh(SUM_SQUARE) - 1,
    'trigonometric': np.cosh(DIFFERENCE_SQUARE) - 1,
    'optimal': second_moment(OPTIMAL['optimal'], SUM_SQUARE, 4) - 1,
    'optimal_above_0': second_moment(OPTIMAL['optimal_above_0'], SUM_SQUARE, 4) - 1,
}


@functools.cache
def row_estimates(estimator):
    """φ(q)·φ(k) from each of `NUM_ROWS` independent rows, over exp(q·k/√D): [rows, pairs]."""
    w = projections.gaussian(jax.random.key(5), NUM_ROWS, 4)

    def features(x):
        x = 4**0.25 * x
        if estimator == 'trigonometric':
            features, log_scale = feature_maps.trigonometric(x, w)
            return features * jnp.exp(log_scale)[:, None]
        if estimator == 'positive':
            return jnp.exp(feature_maps.softmax_log_features(x, w))
        if estimator == 'hyperbolic':
            return jnp.exp(feature_maps.hyperbolic_log_features(x, w))
        return jnp.exp(feature_maps.optimal_log_features(x, w, OPTIMAL[estimator]))

    products = np.float64(features(QUERY)) * np.float64(features(KEY))
    # The features of a row stand R/2 apart; φ(q)·φ(k) is the mean of the rows' estimates.
    return products.reshape(3, -1, NUM_ROWS).sum(axis=1).T * NUM_ROWS / KERNEL


@pytest.mark.parametrize('estimator', VARIANCES)
def test_estimators_are_unbiased(estimator):
    """The mean over 200,000 independent rows within 5 standard errors of the kernel.

    The standard error is that of the closed-form variance, at most 0.4 %; by the central limit
    theorem a false alarm comes once in 10^6 per pair. Catches a term or a normalisation left out.
    """
    error = np.abs(row_estimates(estimator).mean(axis=0) - 1)
    standard_error = np.sqrt(VARIANCES[estimator] / NUM_ROWS)
    assert np.all(standard_error < 4e-3)
    assert np.all(error < 5 * standard_error)


@pytest.mark.parametrize('estimator', VARIANCES)
def test_estimators_have_the_variance_of_the_closed_form(estimator):
    """The mean squared error over the rows within 5 of its own standard errors, each under 3 %.

    By the central limit theorem a false alarm comes once in 10^6 per pair. Catches an estimator
    that is unbiased but another one, such as rows that the two halves do not share.
    """
    squared_errors = (row_estimates(estimator) - 1) ** 2
    standard_error = squared_errors.std(axis=0) / NUM_ROWS**0.5
    assert np.all(standard_error < 0.03 * VARIANCES[estimator])
    assert np.all(np.abs(squared_errors.mean(axis=0) - VARIANCES[estimator]) < 5 * standard_error)


@pytest.mark.parametrize('better', ['hyperbolic', 'best'])
def test_estimators_with_less_variance_than_the_positive(better):
    """At as many features, by more than 3.7 standard errors of the difference on the same rows.

    Were they equal, that would pass once in 10,000 seeds per pair.
    """
    # The hyperbolic estimate of a row has two features; that of two positive ones has half the
    # variance of one.
    rows_per_estimate = 2 if better == 'hyperbolic' else 1
    gain = (row_estimates('positive') - 1) ** 2 / rows_per_estimate
    gain = gain - (row_estimates(better) - 1) ** 2
    assert np.all(gain.mean(axis=0) > 3.7 * gain.std(axis=0) / NUM_ROWS**0.5)


@pytest.mark.parametrize('dim', [4, 64])
@pytest.mark.parametrize('sum_square', [1e-3, 0.6, 5, 100, 1e4, 1e7])
def test_optimal_a_minimises_the_second_moment(dim, sum_square):
    """Against SciPy's scalar minimisation of its logarithm, over log(1 - 8A)."""

    def log_moment(log_inverse):
        a = (1 - math.exp(log_inverse)) / 8
        return (
            dim * math.log(1 - 4 * a) - dim / 2 * log_inverse + sum_square * math.exp(-log_inverse)
        )

    best = scipy.optimize.minimize_scalar(
        log_moment, bounds=(-2, 20), method='bounded', options={'xatol': 1e-10}
    )
    actual = feature_maps.optimal_a(jnp.float32(sum_square), dim)
    assert actual.dtype == jnp.float32
    # Flat as a minimum is, rounding hides its place to the root of float64's precision.
    assert np.log1p(-8 * np.float64(actual)) == pytest.approx(best.x, rel=1e-5, abs=3e-6)
    rho = (
        2
        * dim
        / (2 * sum_square + dim + math.sqrt((2 * sum_square + dim) ** 2 + 8 * sum_square * dim))
    )
    assert actual == pytest.approx((1 - 1 / rho) / 8, rel=1e-5, abs=1e-7)


def test_optimal_a_is_0_where_queries_and_keys_cancel():
    np.testing.assert_array_equal(feature_maps.optimal_a(np.zeros((2, 1, 3, 1)), 64), 0)
    assert np.isfinite(jax.grad(feature_maps.optimal_a)(0.0, 64))


def mean_square_reference(query, key, mask):
    """Pair by pair in float64."""
    query, key = scaled(query), scaled(key)
    sums = np.sum((query[..., :, None, :, :] + key[..., None, :, :, :]) ** 2, axis=-1)
    mask = np.ones(key.shape[:-2], bool) if mask is None else mask
    weights = np.broadcast_to(mask[..., None, :, None], sums.shape)
    total = np.sum(np.where(weights, sums, 0), axis=(-3, -2)) / weights.sum(axis=(-3, -2))
    return total[..., None, :, None]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('masked', [False, True])
def test_mean_square_sum_against_all_pairs(dtype, masked):
    """Catches a mean over the wrong axis, masked keys that count, or 2 q̄·k̄ left out."""
    rng = np.random.default_rng(1)
    query = (rng.normal(size=(2, 5, 3, 4)) + 0.5).astype(dtype)
    key = (2 * rng.normal(size=(2, 7, 3, 4)) - 1).astype(dtype)
    mask = rng.random((2, 7)) < 0.6 if masked else None
    actual = jax.jit(feature_maps.mean_square_sum)(query, key, mask)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, mean_square_reference(query, key, mask), rtol=1e-5)


def test_mean_square_sum_does_not_see_masked_keys():
    """NaN there reaches neither the value nor the gradients, nor does an empty mask make one."""
    query, key = np.random.default_rng(1).normal(size=(2, 2, 5, 3, 4)).astype(np.float32)
    mask = np.array([[True, True, False, True, False], [False] * 5])
    hidden = np.where(mask[..., None, None], key, np.nan)

    def total(query, key):
        return jnp.sum(feature_maps.mean_square_sum(query, key, mask))

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(query, hidden)
    assert value == pytest.approx(float(total(query, key)), rel=1e-6)
    assert np.all(np.isfinite(gradients))
    assert np.all(gradients[1][~mask] == 0)
    assert np.all(gradients[1][mask] != 0)


def test_mean_square_sum_is_never_negative():
    """Opposed and long: catches a difference of large terms, whose root is then NaN in A."""
    query = np.float32(1e3) * np.random.default_rng(1).normal(size=(50, 1, 1, 4)).astype(np.float32)
    mean_square = jax.jit(feature_maps.mean_square_sum)(query, -query)
    np.testing.assert_array_equal(mean_square, 0)
    np.testing.assert_array_equal(feature_maps.optimal_a(mean_square, 4), 0)


@pytest.mark.parametrize('positions', [np.arange(5), np.array([[0, 3, 1, 7, 7], [2, 2, 6, 0, 5]])])
def test_cosine_reweight_multiplies_the_products(positions):
    """φ'(q)·φ'(k) is φ(q)·φ(k) times the cosine; catches an axis, a sign or a period mixed up."""
    features = np.random.default_rng(1).random(size=(2, 2, 5, 3, 6)).astype(np.float32)
    query, key = (
        jax.jit(feature_maps.cosine_reweight, static_argnums=2)(x, positions, 8) for x in features
    )
    assert query.shape == (2, 5, 3, 12)
    positions = np.broadcast_to(positions, (2, 5))
    angles = (positions[:, :, None] - positions[:, None, :]) * np.pi / 16
    expected = np.einsum('bnhr,bmhr->bhnm', *np.float64(features)) * np.cos(angles)[:, None]
    np.testing.assert_allclose(np.einsum('bnhr,bmhr->bhnm', query, key), expected, rtol=1e-5)
    first = np.float64(features[0]) * np.cos(positions * np.pi / 16)[..., None, None]
    np.testing.assert_allclose(query[..., :6], first, rtol=1e-5)


@given(st.integers(1, 2**30), st.data())
@settings(max_examples=60, deadline=None)
def test_cosine_reweight_stays_non_negative(horizon, data):
    """Up to the last position; catches a cosine rounded below 0 near π/2, or an overflow."""
    distance = data.draw(st.sampled_from([1, 2, horizon]) | st.integers(1, horizon))
    position = max(horizon - distance, 0)
    weights = np.asarray(
        feature_maps.cosine_reweight(jnp.ones((1, 1, 1)), jnp.array([position]), horizon)
    )[0, 0]
    assert np.all(weights >= 0)
    angle = np.pi / 2 * position / horizon
    np.testing.assert_allclose(weights, [np.cos(angle), np.sin(angle)], rtol=1e-5, atol=1e-15)


def test_cosine_reweight_takes_small_integers_and_bfloat16():
    """Catches horizon - p computed in 8 bits."""
    positions = np.arange(5, dtype=np.uint8)
    features = jnp.ones((5, 1, 1), jnp.bfloat16)
    actual = feature_maps.cosine_reweight(features, positions, 1000)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual[:, 0, 0], np.cos(np.arange(5) * np.pi / 2000), rtol=1e-6)


@pytest.mark.parametrize(
    ('positions', 'horizon', 'name'),
    [
        (np.arange(5), 0, 'horizon'),
        (np.arange(5), 8.0, 'horizon'),
        (np.arange(5.0), 8, 'positions'),
        (np.arange(4), 8, 'positions'),
        (np.zeros(1, int), 8, 'positions'),
        (np.zeros((3, 5), int), 8, 'positions'),
        (np.zeros((2, 5, 3), int), 8, 'positions'),
    ],
)
def test_cosine_reweight_refuses(positions, horizon, name):
    with pytest.raises(BadInput, match=f'^{name} '):
        feature_maps.cosine_reweight(jnp.ones((2, 5, 3, 6)), positions, horizon)
