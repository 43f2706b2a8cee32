"""The old makers against quadratic NumPy float64 references, argument by argument."""

import functools
import inspect
import math
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from performer_vit import projections
from performer_vit.errors import BadInput
from performer_vit.fast_attention import (
    make_fast_generalized_attention,
    make_fast_softmax_attention,
)

# Two attention axes of more tokens than a causal chunk has; the feature dimensions all differ.
B, X, Y, H, D, V, R = 2, 13, 11, 2, 4, 3, 6
SOFTMAX = functools.partial(make_fast_softmax_attention, D, nb_features=R, redraw_features=False)
GENERALIZED = functools.partial(make_fast_generalized_attention, D, nb_features=R)


def dpfp(x):
    """A kernel_fn that changes the number of features and mixes them (Schlag et al. 2021)."""
    x = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)
    return x * jnp.roll(x, 1, axis=-1)


def dpfp_in_numpy(x):
    x = np.maximum(np.concatenate([x, -x], axis=-1), 0)
    return x * np.concatenate([x[..., -1:], x[..., :-1]], axis=-1)


# The function in JAX, and in NumPy.
KERNEL_FNS = {
    'relu': (jax.nn.relu, lambda x: np.maximum(x, 0)),
    'dpfp': (dpfp, dpfp_in_numpy),
    'signed': (lambda x: x + 0.5, lambda x: x + 0.5),
}


def inputs(shape=(X, Y), key_shape=None):
    rng = np.random.default_rng(0)
    key_shape = shape if key_shape is None else key_shape
    query = rng.normal(size=(B, *shape, H, D))
    key = rng.normal(size=(B, *key_shape, H, D))
    value = rng.normal(size=(B, *key_shape, H, V))
    return tuple(x.astype(np.float32) for x in (query, key, value))


def draw(projection, row_norms='gaussian', rows=R):
    matrix = projections.draw(0, 0, 0, rows, D, projection, row_norms)
    return None if matrix is None else np.asarray(matrix, np.float64)


def softmax_features(x, matrix, nonnegative):
    x = np.asarray(x, np.float64) / D**0.25
    half_square = np.sum(x**2, axis=-1, keepdims=True) / 2
    if nonnegative:
        return np.exp(x @ matrix.T - half_square) / math.sqrt(len(matrix))
    waves = np.concatenate([np.sin(x @ matrix.T), np.cos(x @ matrix.T)], axis=-1)
    return waves * np.exp(half_square) / math.sqrt(len(matrix))


def generalized_features(x, matrix, function, epsilon):
    x = np.asarray(x, np.float64)
    return function(x if matrix is None else x @ matrix.T) + epsilon


def contract(query, key, value, causal=False, renormalize=True):
    """Features [B, X, Y, H, R] of all tokens of two axes, by the matrix [B, H, X, Y, X', Y']."""
    weights = np.einsum('bxyhr,bzwhr->bhxyzw', query, key)
    if causal:
        number = np.arange(query.shape[1] * query.shape[2]).reshape(query.shape[1:3])
        weights = weights * (number[:, :, None, None] >= number)
    output = np.einsum('bhxyzw,bzwhv->bxyhv', weights, np.asarray(value, np.float64))
    if not renormalize:
        return output
    return output / np.moveaxis(weights.sum(axis=(-2, -1)), 1, -1)[..., None]


def assert_close(output, expected):
    """To float32's rounding of sums of terms as large as the largest result."""
    tolerance = 2e-5 * max(1.0, np.max(np.abs(expected)))
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=tolerance)


def signature(function):
    return [
        (parameter.name, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind == parameter.POSITIONAL_OR_KEYWORD
    ]


def test_names_order_and_defaults_are_the_original_s():
    """Catches an argument renamed, moved or of another default: old calls would change meaning."""
    required = inspect.Parameter.empty
    assert signature(make_fast_softmax_attention) == [
        ('qkv_dim', required),
        ('renormalize_attention', True),
        ('numerical_stabilizer', 0.000001),
        ('nb_features', 256),
        ('ortho_features', True),
        ('ortho_scaling', 0.0),
        ('redraw_features', True),
        ('unidirectional', False),
        ('nonnegative_features', True),
        ('lax_scan_unroll', 1),
    ]
    assert signature(make_fast_generalized_attention) == [
        ('qkv_dim', required),
        ('renormalize_attention', True),
        ('numerical_stabilizer', 0.0),
        ('nb_features', 256),
        ('features_type', 'deterministic'),
        ('kernel_fn', jax.nn.relu),
        ('kernel_epsilon', 0.001),
        ('redraw_features', False),
        ('unidirectional', False),
        ('lax_scan_unroll', 1),
    ]
    for function in (SOFTMAX(), GENERALIZED()):
        assert signature(function) == [
            ('query', required),
            ('key', required),
            ('value', required),
            ('dtype', jnp.float32),
            ('bias', None),
            ('axis', None),
            ('broadcast_dropout', True),
            ('dropout_rng', None),
            ('dropout_rate', 0.0),
            ('deterministic', False),
            ('precision', None),
        ]


@pytest.mark.parametrize('unidirectional', [False, True])
@pytest.mark.parametrize('renormalize', [False, True])
@pytest.mark.parametrize('nonnegative', [False, True])
@pytest.mark.filterwarnings('ignore:renormalize_attention')
def test_softmax_against_the_quadratic_reference(nonnegative, renormalize, unidirectional):
    """Catches a wrong kernel, count of features or scale, a later token seen, axes mixed up."""
    attend = SOFTMAX(
        nb_features=40,
        renormalize_attention=renormalize,
        unidirectional=unidirectional,
        nonnegative_features=nonnegative,
    )
    # Of this size the trigonometric normaliser stays away from 0, where no two results agree.
    query, key, value = (x * scale for x, scale in zip(inputs(), (0.5, 0.5, 1), strict=True))
    matrix = draw('orthogonal', rows=40)
    features = (softmax_features(x, matrix, nonnegative) for x in (query, key))
    expected = contract(*features, value, unidirectional, renormalize)
    assert_close(jax.jit(attend)(query, key, value), expected)


@pytest.mark.parametrize(
    ('ortho_features', 'ortho_scaling', 'projection', 'row_norms'),
    [
        (True, 0.0, 'orthogonal', 'gaussian'),
        (True, 1.0, 'orthogonal', 'sqrt_dim'),
        (False, 0.0, 'gaussian', 'gaussian'),
    ],
)
def test_rows_of_the_softmax_projection(ortho_features, ortho_scaling, projection, row_norms):
    """Catches ortho_features or ortho_scaling taken and ignored, or swapped."""
    arrays = inputs((4, 3))
    attend = SOFTMAX(ortho_features=ortho_features, ortho_scaling=ortho_scaling)
    matrix = draw(projection, row_norms)
    features = (softmax_features(x, matrix, True) for x in arrays[:2])
    assert_close(jax.jit(attend)(*arrays), contract(*features, arrays[2]))


@pytest.mark.parametrize('unidirectional', [False, True])
@pytest.mark.parametrize('renormalize', [False, True])
@pytest.mark.parametrize('kernel_fn', KERNEL_FNS)
def test_generalized_against_the_quadratic_reference(kernel_fn, renormalize, unidirectional):
    """Without W: catches x or features scaled, ε lost, a normaliser taken for positive.

    The signed kernel's normaliser is negative in places; the original divided by it as it is.
    """
    function, in_numpy = KERNEL_FNS[kernel_fn]
    attend = GENERALIZED(
        kernel_fn=function,
        kernel_epsilon=0.25,
        renormalize_attention=renormalize,
        unidirectional=unidirectional,
    )
    query, key, value = inputs()
    if kernel_fn == 'signed':
        # Far from 0 for any number of keys, on either side: near it no two results agree.
        query = np.sign(query[..., :1]) * (1 + np.abs(query))
        key = np.abs(key)
    features = (generalized_features(x, None, in_numpy, 0.25) for x in (query, key))
    expected = contract(*features, value, unidirectional, renormalize)
    assert_close(jax.jit(attend)(query, key, value), expected)


@pytest.mark.parametrize(
    ('features_type', 'projection'), [('ortho', 'orthogonal'), ('iid', 'gaussian')]
)
def test_generalized_features_by_a_projection(features_type, projection):
    """Catches features_type ignored, and W x scaled, which relu alone would hide but for ε."""
    arrays = inputs((4, 3))
    attend = GENERALIZED(features_type=features_type, kernel_fn=jax.nn.sigmoid)
    features = (
        generalized_features(x, draw(projection), lambda u: 1 / (1 + np.exp(-u)), 1e-3)
        for x in arrays[:2]
    )
    assert_close(jax.jit(attend)(*arrays), contract(*features, arrays[2]))


def test_defaults_of_generalized_attention():
    """ReLU and ε = 0.001 without W: qkv_dim and nb_features do not matter, as they did not."""
    arrays = inputs()
    features = (generalized_features(x, None, KERNEL_FNS['relu'][1], 1e-3) for x in arrays[:2])
    output = jax.jit(make_fast_generalized_attention(D + 5))(*arrays)
    assert_close(output, contract(*features, arrays[2]))


@pytest.mark.parametrize(
    ('axis', 'unidirectional'), [(1, False), ((1,), True), ([2], False), (np.int64(2), True)]
)
def test_one_of_two_axes(axis, unidirectional):
    """Row by row, or column by column; catches the wrong axis, or tokens of other rows seen."""
    arrays = inputs((4, 3))
    attend = GENERALIZED(unidirectional=unidirectional)
    output = jax.jit(functools.partial(attend, axis=axis))(*arrays)
    which = int(np.ravel(axis)[0])
    for index in range(arrays[0].shape[3 - which]):
        line = [np.take(x, [index], axis=3 - which) for x in arrays]
        features = (generalized_features(x, None, KERNEL_FNS['relu'][1], 1e-3) for x in line[:2])
        expected = contract(*features, line[2], unidirectional)
        assert_close(np.take(output, [index], axis=3 - which), expected)
    assert np.max(np.abs(output - jax.jit(attend)(*arrays))) > 0.01


def test_tokens_are_in_the_order_of_axis():
    """(2, 1) is column-major: catches axes sorted, or the result restored in another order."""
    arrays = inputs((4, 3))
    attend = GENERALIZED(unidirectional=True)
    turned = jax.jit(attend)(*(np.swapaxes(x, 1, 2) for x in arrays))
    output = jax.jit(functools.partial(attend, axis=(2, 1)))(*arrays)
    np.testing.assert_allclose(output, np.swapaxes(turned, 1, 2), rtol=1e-5, atol=1e-6)


def test_three_axes_of_which_the_middle_one_is_batch():
    """Catches the axes left over, or the restored ones, in a wrong place."""
    query, key, value = inputs((3, 4, 5))
    output = jax.jit(functools.partial(GENERALIZED(), axis=(1, 3)))(query, key, value)
    for index in range(4):
        slices = [x[:, :, index] for x in (query, key, value)]
        features = (generalized_features(x, None, KERNEL_FNS['relu'][1], 1e-3) for x in slices[:2])
        assert_close(output[:, :, index], contract(*features, slices[2]))


@pytest.mark.parametrize('make', [SOFTMAX, GENERALIZED])
def test_other_keys_than_queries(make):
    """Catches the query's shape taken for the key's: 5·2 queries, 3·4 keys."""
    query, key, value = inputs((5, 2), (3, 4))
    output = jax.jit(make())(query, key, value)
    assert output.shape == (B, 5, 2, H, V)
    if make is SOFTMAX:
        features = (softmax_features(x, draw('orthogonal'), True) for x in (query, key))
    else:
        features = (
            generalized_features(x, None, KERNEL_FNS['relu'][1], 1e-3) for x in (query, key)
        )
    assert_close(output, contract(*features, value))


@pytest.mark.parametrize('renormalize', [False, True])
@pytest.mark.parametrize('make', [SOFTMAX, GENERALIZED])
@pytest.mark.filterwarnings('ignore:renormalize_attention')
def test_later_tokens_do_not_reach_earlier_ones(make, renormalize):
    """Bit by bit within a chunk and across; catches a scale taken over all keys, as of old."""
    attend = jax.jit(make(unidirectional=True, renormalize_attention=renormalize))
    query, key, value = inputs()
    before = np.asarray(attend(query, key, value))
    for x in (query, key, value):
        x[:, 6, 5:] += 3
        x[:, 7:] -= 2
    after = np.asarray(attend(query, key, value))
    np.testing.assert_array_equal(after[:, :6], before[:, :6])
    np.testing.assert_array_equal(after[:, 6, :5], before[:, 6, :5])
    assert np.max(np.abs(after[:, 6, 5:] - before[:, 6, 5:])) > 0.1


@pytest.mark.parametrize('unidirectional', [False, True])
@pytest.mark.parametrize('renormalize', [False, True])
@pytest.mark.parametrize('make', [SOFTMAX, GENERALIZED])
@pytest.mark.filterwarnings('ignore:renormalize_attention')
def test_gradients_against_differences_of_the_reference(make, renormalize, unidirectional):
    """Along a random direction of all inputs, in float64; catches a gradient cut or blocked."""
    attend = make(renormalize_attention=renormalize, unidirectional=unidirectional)
    arrays = inputs()
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(B, X, Y, H, V))
    direction = [rng.normal(size=x.shape) for x in arrays]

    def reference(step):
        query, key, value = (x + step * d for x, d in zip(arrays, direction, strict=True))
        if make is SOFTMAX:
            features = (softmax_features(x, draw('orthogonal'), True) for x in (query, key))
        else:
            features = (generalized_features(x, None, np.tanh, 2) for x in (query, key))
        return np.sum(weight * contract(*features, value, unidirectional, renormalize))

    if make is GENERALIZED:
        attend = make(
            kernel_fn=jnp.tanh,
            kernel_epsilon=2,
            renormalize_attention=renormalize,
            unidirectional=unidirectional,
        )
    gradient = jax.jit(jax.grad(lambda *x: jnp.sum(weight * attend(*x)), argnums=(0, 1, 2)))
    slope = sum(np.sum(g * d) for g, d in zip(gradient(*arrays), direction, strict=True))
    expected = (reference(1e-6) - reference(-1e-6)) / 2e-6
    np.testing.assert_allclose(slope, expected, rtol=1e-3)


@pytest.mark.parametrize('unidirectional', [False, True])
@pytest.mark.parametrize('make', [SOFTMAX, GENERALIZED])
def test_gradients_are_finite_where_no_feature_is_active(make, unidirectional):
    """Without ε, queries and keys to ±1e3: catches 0/0 and overflow, forward and backward."""
    given = {} if make is SOFTMAX else {'kernel_epsilon': 0.0}
    attend = make(unidirectional=unidirectional, **given)
    query, key, value = (x * scale for x, scale in zip(inputs((4, 3)), (1e3, 1e3, 1), strict=True))
    query[:, 0] = key[:, :2] = -1000
    output, gradient = jax.jit(jax.value_and_grad(lambda *x: jnp.sum(attend(*x)), (0, 1, 2)))(
        query, key, value
    )
    assert np.isfinite(output)
    assert all(np.all(np.isfinite(g)) for g in gradient)


@pytest.mark.parametrize('nonnegative', [False, True])
@pytest.mark.filterwarnings('ignore:renormalize_attention')
def test_the_softmax_numerator_estimates_the_exponential(nonnegative):
    """One key of value 1: within 5 standard errors of exp(q·k/√D), from 20,000 independent rows.

    Catches a scale of x or of the features that the quotient, or a reference made alike, hides.
    """
    rows = 20000
    attend = make_fast_softmax_attention(
        D,
        nb_features=rows,
        ortho_features=False,
        redraw_features=False,
        renormalize_attention=False,
        nonnegative_features=nonnegative,
    )
    rng = np.random.default_rng(4)
    query, key = rng.normal(size=(2, 20, 1, 1, D)).astype(np.float32)
    estimate = np.ravel(attend(query, key, np.ones((20, 1, 1, 1), np.float32)))
    query, key = (np.reshape(x, (20, D)) / D**0.25 for x in (query, key))
    expected = np.exp(np.sum(query * key, axis=-1))
    # Of one row: positive features by their second moment, trigonometric ones by that of a cosine.
    if nonnegative:
        deviation = expected * np.sqrt(np.expm1(np.sum((query + key) ** 2, axis=-1)))
    else:
        gap = np.sum((query - key) ** 2, axis=-1)
        deviation = expected * np.exp(gap / 2) * (1 - np.exp(-gap)) / math.sqrt(2)
    error = np.abs(estimate - expected) / deviation * math.sqrt(rows)
    assert np.max(error) < 5
    # A bound far above the errors would catch nothing.
    assert 0.3 < np.sqrt(np.mean(error**2)) < 2


@pytest.mark.parametrize('unidirectional', [False, True])
def test_many_features_come_near_exact_attention(unidirectional):
    """Catches a quotient of the right form and the wrong kernel."""
    query, key, value = (0.5 * x for x in inputs((4, 3)))
    attend = SOFTMAX(nb_features=4096, unidirectional=unidirectional)
    query_row, key_row, value_row = (x.reshape(B, 12, *x.shape[-2:]) for x in (query, key, value))
    mask = np.tri(12, dtype=bool) if unidirectional else None
    exact = nn.dot_product_attention(query_row, key_row, value_row, mask=mask)
    output = np.reshape(jax.jit(attend)(query, key, value), exact.shape)
    assert np.max(np.abs(output - exact)) < 0.03
    assert np.max(np.abs(exact - np.mean(value_row, axis=1, keepdims=True))) > 0.1


@pytest.mark.parametrize(
    ('make', 'given', 'message'),
    [
        (make_fast_softmax_attention, {}, 'redraw_features=True has no effect'),
        (SOFTMAX, {'redraw_features': True}, 'redraw_features=True has no effect'),
        (SOFTMAX, {'numerical_stabilizer': 1e-3}, 'numerical_stabilizer=0.001 has no effect'),
        (SOFTMAX, {'lax_scan_unroll': 16}, 'lax_scan_unroll=16 has no effect'),
        (SOFTMAX, {'renormalize_attention': False}, 'gives the bare sums'),
        (GENERALIZED, {'numerical_stabilizer': 1e-6}, 'numerical_stabilizer=1e-06 has no effect'),
        (GENERALIZED, {'lax_scan_unroll': 16}, 'lax_scan_unroll=16 has no effect'),
        (
            GENERALIZED,
            {'features_type': 'iid', 'redraw_features': True},
            'redraw_features=True has no effect',
        ),
    ],
)
def test_what_is_not_honoured_is_said(make, given, message):
    """Once, at the line that asked for it; catches an argument dropped in silence."""
    if make is make_fast_softmax_attention:
        make = functools.partial(make, D)
    with pytest.warns(UserWarning, match=message) as caught:
        make(**given)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize('make', [SOFTMAX, GENERALIZED])
def test_heads_in_the_place_of_tokens_are_warned_of(make):
    """The commonest mistake of those who used the original; two attention axes are no mistake."""
    attend = make()
    with pytest.warns(UserWarning, match='4 tokens in 128 heads') as caught:
        jax.eval_shape(attend, *[jnp.ones((2, 4, 128, D))] * 3)
    assert caught[0].category is UserWarning
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        jax.eval_shape(attend, *[jnp.ones((2, 4, 32, 128, D))] * 3)


def test_what_is_honoured_is_not_warned_of():
    """Catches a warning at every call, which teaches not to read any."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        SOFTMAX(unidirectional=True, ortho_scaling=1, nonnegative_features=False)
        GENERALIZED(redraw_features=True, unidirectional=True, renormalize_attention=False)
        GENERALIZED(features_type='ortho')


@pytest.mark.parametrize(
    ('make', 'given', 'message'),
    [
        (SOFTMAX, {'ortho_scaling': 0.5}, 'ortho_scaling is 0.5; allowed are 0.0, 1.0'),
        (SOFTMAX, {'nb_features': 0}, 'nb_features is 0'),
        (SOFTMAX, {'nb_features': 1.5}, 'nb_features is 1.5'),
        (GENERALIZED, {'features_type': 'ortho', 'nb_features': -1}, 'nb_features is -1'),
        (GENERALIZED, {'features_type': 'random'}, "features_type is 'random'"),
        (GENERALIZED, {'kernel_fn': 'relu'}, "kernel_fn is 'relu'"),
        (lambda: make_fast_softmax_attention(0, redraw_features=False), {}, 'qkv_dim is 0'),
    ],
)
def test_refused_when_made(make, given, message):
    """Catches a wrong argument that would only be met in training, or never."""
    with pytest.raises(BadInput, match=message):
        make(**given)


@pytest.mark.parametrize('make', [SOFTMAX, GENERALIZED])
@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'bias': np.zeros((1, 1, 1, 1))}, 'bias is given'),
        ({'mask': np.ones((1, 1, 1, 1), bool)}, 'mask is given'),
        ({'dropout_rate': 0.1}, 'dropout_rate is 0.1'),
        ({'axis': 0}, 'axis is 0'),
        ({'axis': 3}, 'axis is 3'),
        ({'axis': -3}, 'axis is -3'),
        ({'axis': (1, 1)}, r'axis is \(1, 1\)'),
        ({'axis': ()}, r'axis is \(\)'),
        ({'precision': 3}, 'precision is 3'),
    ],
)
def test_refused_when_called(make, given, message):
    """Catches what acts on attention weights, or another layout, taken and ignored."""
    with pytest.raises(BadInput, match=message):
        make()(*inputs((3, 4)), **given)


def test_dropout_is_no_matter_when_deterministic():
    """Catches evaluation refused for a rate that only training would apply."""
    arrays = inputs((3, 4))
    attend = GENERALIZED()
    output = attend(
        *arrays,
        dropout_rate=0.5,
        dropout_rng=jax.random.key(0),
        broadcast_dropout=False,
        deterministic=True,
    )
    np.testing.assert_array_equal(output, attend(*arrays))


@pytest.mark.parametrize(
    ('query', 'key', 'value', 'message'),
    [
        ((2, 5, 2, D), (2, 5, 2, D), (2, 6, 2, D), 'key and value must agree'),
        ((2, 5, 2, D), (1, 5, 2, D), (1, 5, 2, D), 'query and key must agree'),
        ((2, 5, 2, D), (2, 5, 1, D), (2, 5, 1, D), 'query and key must agree'),
        ((2, 5, 2, D), (2, 5, 2, 3), (2, 5, 2, D), 'query and key must agree'),
        ((2, 5, 2, D), (2, 5, 1, 2, D), (2, 5, 1, 2, D), 'query and key must agree'),
        ((5, 2, D), (5, 2, D), (5, 2, D), 'at least four axes'),
        ((2, 5, 2, 3), (2, 5, 2, 3), (2, 5, 2, 3), 'qkv_dim is 4'),
    ],
)
def test_arrays_that_do_not_fit(query, key, value, message):
    """Catches shapes that would broadcast, or fail deep inside."""
    with pytest.raises(BadInput, match=message):
        SOFTMAX()(*(np.zeros(shape, np.float32) for shape in (query, key, value)))


def test_unidirectional_attention_needs_as_many_keys():
    """Catches queries and keys of different lengths aligned in some way that nobody asked for."""
    with pytest.raises(BadInput, match='of a sequence to itself'):
        GENERALIZED(unidirectional=True)(*inputs((4, 2), (4, 3)))


@pytest.mark.parametrize('renormalize', [False, True])
@pytest.mark.parametrize('make', [SOFTMAX, GENERALIZED])
@pytest.mark.filterwarnings('ignore:renormalize_attention')
def test_dtype(make, renormalize):
    """float32 unless asked for another; catches a dtype that is taken and ignored."""
    attend = jax.jit(make(renormalize_attention=renormalize), static_argnames='dtype')
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs()]
    full = attend(*arrays)
    half = attend(*arrays, dtype=jnp.bfloat16)
    assert full.dtype == jnp.float32
    assert half.dtype == attend(*arrays, dtype=None).dtype == jnp.bfloat16
    scale = np.max(np.abs(full))
    np.testing.assert_allclose(np.asarray(half, np.float32), full, atol=0.02 * scale)


@pytest.mark.parametrize('renormalize', [False, True])
@pytest.mark.parametrize('make', [SOFTMAX, functools.partial(GENERALIZED, features_type='iid')])
@pytest.mark.filterwarnings('ignore:renormalize_attention')
def test_precision_reaches_the_products(make, renormalize):
    """Catches a precision that is taken and ignored."""
    attend = make(renormalize_attention=renormalize)
    arrays = inputs((3, 4))

    @jax.default_matmul_precision(None)  # Which the environment may set.
    def products(precision):
        jaxpr = str(jax.make_jaxpr(functools.partial(attend, precision=precision))(*arrays))
        return jaxpr.count('dot_general['), jaxpr.count('HIGHEST, Precision.HIGHEST')

    total, highest = products(jax.lax.Precision.HIGHEST)
    assert total == highest > 2
    assert products(None)[1] == 0


def test_made_under_a_trace():
    """As a module that makes it in `__call__` does; catches a projection that leaks a tracer."""
    arrays = inputs((3, 4))
    made_inside = jax.jit(lambda *x: SOFTMAX()(*x))(*arrays)
    np.testing.assert_allclose(made_inside, jax.jit(SOFTMAX())(*arrays), rtol=1e-6)


@pytest.mark.filterwarnings('ignore:renormalize_attention')
def test_in_flax_s_module():
    """Catches a signature that Flax cannot call, and a padding mask that it would leave out."""
    module = nn.MultiHeadDotProductAttention(
        num_heads=H, qkv_features=H * D, attention_fn=GENERALIZED(), deterministic=True
    )
    x = np.random.default_rng(0).normal(size=(B, 5, 6)).astype(np.float32)
    output, params = jax.jit(module.init_with_output)(jax.random.key(0), x)
    dense = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params['params'])
    query, key, value = (
        np.einsum('bni,ihd->bnhd', x, dense[name]['kernel'])[:, None]
        for name in ('query', 'key', 'value')
    )
    features = (generalized_features(y, None, KERNEL_FNS['relu'][1], 1e-3) for y in (query, key))
    heads = contract(*features, value)[:, 0]
    assert_close(output, np.einsum('bnhd,hdo->bno', heads, dense['out']['kernel']))
    with pytest.raises(BadInput, match='mask is given'):
        module.apply(params, x, mask=np.ones((B, 1, 5, 5), bool))


@pytest.mark.parametrize('is_causal', [False, True])
def test_positive_features_that_leave_little_are_no_cancellation(is_causal):
    """Queries and keys opposed: sums a millionth of what they might be, and a mean of ones is one.

    Catches the guard of signed features where a function has none.
    """
    q = np.tile(np.float32([8, -8]), (1, 64, 1, 1))
    attend = make_fast_generalized_attention(
        2, kernel_fn=jnp.exp, kernel_epsilon=0.0, unidirectional=is_causal
    )
    np.testing.assert_allclose(attend(q, -q, np.ones_like(q)), 1, rtol=1e-5)
