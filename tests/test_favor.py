"""FAVOR+ as a function, as a module and as Flax's attention_fn, for every kernel."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from performer_vit import favor, feature_maps, projections
from performer_vit.errors import BadInput
from tests import reference

N, M, H, D, R = 5, 7, 2, 4, 6
MASKS = {
    'none': None,
    'padding': (2, 1, 1, 1, M),
    'one axis': (M,),
    'rows': (2, 3, 1, N, 1),
    'per head': (1, 1, H, 1, M),
    'full': (2, 3, H, N, M),
}
# One kernel of each path that a mask may take; the others differ in the feature map alone.
PATHS = ('exact', 'softmax', 'relu')
INIT_THETA = jax.jit(feature_maps.init_theta, static_argnums=(1, 2, 3), static_argnames='mixture')


def weights(kernel, dtype=jnp.float32, with_projection=True):
    """The keyword arguments that a kernel needs, with fθ's weights away from their zeros."""
    if kernel.startswith('ftheta'):
        mixture = kernel == 'ftheta_mixture'
        theta = INIT_THETA(jax.random.key(5), D, 8, R, mixture=mixture)
        theta = jax.tree.map(lambda leaf: (np.asarray(leaf) + 0.2).astype(dtype), theta)
        return {'kernel': kernel, 'theta': theta}
    if kernel == 'exact' or not with_projection:
        return {'kernel': kernel}
    matrix = np.asarray(projections.orthogonal(jax.random.key(6), R, D)).astype(dtype)
    return {'kernel': kernel, 'projection': matrix}


def inputs(batch=(2, 3), num_queries=N, num_keys=M, scale=1.0):
    rng = np.random.default_rng(0)
    query = scale * rng.normal(size=(*batch, num_queries, H, D))
    key = scale * rng.normal(size=(*batch, num_keys, H, D))
    value = rng.normal(size=(*batch, num_keys, H, D + 1))
    return tuple(x.astype(np.float32) for x in (query, key, value))


def draw_mask(shape):
    return np.random.default_rng(1).random(shape) < 0.6


def compiled(function, kernel, **kwargs):
    """function(query, key, value, mask) with a kernel's weights, compiled."""
    given = weights(kernel, **kwargs)
    return jax.jit(lambda *x, mask=None: function(*x, mask=mask, **given))


@pytest.mark.parametrize(
    ('kernel', 'mask'),
    [
        (kernel, mask)
        for kernel in favor.KERNELS
        for mask in (MASKS if kernel in PATHS else ('none', 'padding', 'full'))
    ],
)
def test_against_the_quadratic_reference(kernel, mask):
    """Two batch axes, N ≠ M; catches a wrong kernel, normaliser, or mask in any path."""
    arrays = inputs()
    shape = MASKS[mask]
    mask = None if shape is None else draw_mask(shape)
    output = compiled(favor.favor_attention, kernel)(*arrays, mask=mask)
    given = weights(kernel)
    expected = reference.attention(given.pop('kernel'), *arrays, mask, **given)
    assert output.shape == (2, 3, N, H, D + 1)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('shape', [(6, 1), (1, 6)])
@pytest.mark.parametrize('kernel', PATHS)
def test_one_query_or_one_key(kernel, shape):
    """Without a projection where the kernel allows; catches axes of length 1 taken for missing."""
    arrays = inputs((2,), *shape)
    with_projection = kernel == 'softmax'
    output = compiled(favor.favor_attention, kernel, with_projection=with_projection)(*arrays)
    given = weights(kernel, with_projection=with_projection)
    expected = reference.attention(given.pop('kernel'), *arrays, **given)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('kernel', 'per_query'),
    [(kernel, False) for kernel in favor.KERNELS] + [(kernel, True) for kernel in PATHS],
)
def test_outputs_stay_among_the_values(kernel, per_query):
    """Inputs to 1e3 and any mask: an average lies between the least and the largest value averaged.

    Catches a negative or overflowing feature, 0/0, and a mask that leaks: masked values are far
    outside the range of the others. Rows that see nothing are zeros.
    """
    attend = compiled(favor.favor_attention, kernel)
    elements = st.one_of(
        st.floats(-5, 5, width=32),
        st.floats(-1e3, 1e3, width=32),
        st.sampled_from([-1e3, 1e3, 0.0]),
    )

    @settings(max_examples=25, deadline=None)
    @given(
        hnp.arrays(np.float32, (1, 3, 1, D), elements=elements),
        hnp.arrays(np.float32, (1, 4, 1, D), elements=elements),
        hnp.arrays(bool, (1, 1, 3 if per_query else 1, 4)),
    )
    def check(query, key, mask):
        value = np.arange(4.0, dtype=np.float32).reshape(1, 4, 1, 1) ** 3 - 5
        output = np.asarray(attend(query, key, value, mask=mask))[0, :, 0, 0]
        for row, seen in zip(output, np.broadcast_to(mask[0, 0], (3, 4)), strict=True):
            allowed = value[0, seen, 0, 0] if seen.any() else np.zeros(1)
            assert allowed.min() - 1e-3 <= row <= allowed.max() + 1e-3

    check()


@pytest.mark.parametrize(
    ('kernel', 'per_query'),
    [(kernel, False) for kernel in favor.KERNELS] + [(kernel, True) for kernel in PATHS],
)
def test_gradients_are_finite_on_extreme_inputs(kernel, per_query):
    """|x| to about 1e3, an empty row; catches inf · 0 behind an exponential or a `where`."""
    arrays = inputs((2,), scale=400.0)
    mask = np.ones((2, 1, N if per_query else 1, M), bool)
    mask[0] = mask[1, ..., 2:] = False
    given = weights(kernel)

    def loss(arrays, given):
        return jnp.sum(favor.favor_attention(*arrays, mask=mask, kernel=kernel, **given) ** 2)

    given.pop('kernel')
    for gradient in jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(arrays, given)):
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    ('kernel', 'masked'),
    [(kernel, 'padding') for kernel in favor.KERNELS] + [(kernel, 'full') for kernel in PATHS],
)
def test_gradients_against_finite_differences(kernel, masked):
    """In float64, inputs and weights; catches a stop_gradient where the result depends on it."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        query, key, value = (rng.normal(size=(1, n, H, D)) for n in (3, 4, 4))
        mask = np.array([True, False, True, True])
        if masked == 'full':
            mask = mask & np.tri(3, 4, dtype=bool)
        given = weights(kernel, np.float64)
        given.pop('kernel')

        @jax.jit
        def attend(arrays, given):
            return favor.favor_attention(*arrays, kernel=kernel, mask=jnp.asarray(mask), **given)

        check_grads(
            attend, ((query, key, value), given), order=1, modes=['rev'], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize('kernel', ['exact', 'softmax', 'relu', 'ftheta'])
def test_padding_may_hold_anything(kernel):
    """Catches NaN in masked keys and values that reaches the output or fθ's gradient."""
    query, key, value = inputs((2,))
    mask = np.arange(M) < 4
    dirty = tuple(np.where(mask[:, None, None], x, np.float32('nan')) for x in (key, value))
    given = weights(kernel)
    given.pop('kernel')

    @jax.jit
    def loss_and_gradient(key, value):
        def loss(arrays, given):
            output = favor.favor_attention(*arrays, mask=mask, kernel=kernel, **given)
            return jnp.sum(output**2)

        return jax.value_and_grad(loss, argnums=(0, 1))((query, key, value), given)

    for one, other in zip(
        jax.tree.leaves(loss_and_gradient(*dirty)),
        jax.tree.leaves(loss_and_gradient(key, value)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_stabiliser_cancels():
    """Logits near ±30, where the plain features span e^±100; catches factors that do not cancel.

    Float32 keeps exponents of some hundreds to 2e-5 each.
    """
    arrays = inputs(scale=8.0)
    given = weights('softmax')
    output = compiled(favor.favor_attention, 'softmax')(*arrays)
    expected = reference.attention('softmax', *arrays, projection=given['projection'])
    np.testing.assert_allclose(output, expected, rtol=2e-3, atol=2e-3)


def test_first_row_of_a_causal_mask_is_the_first_value():
    """Even where no feature is large for both; catches a stabiliser set by keys that are hidden."""
    query, key, value = inputs(num_queries=M, scale=30.0)
    output = compiled(favor.favor_attention, 'softmax')(
        query, key, value, mask=jnp.tri(M, dtype=bool)
    )
    np.testing.assert_allclose(output[..., 0, :, :], value[..., 0, :, :], rtol=1e-6)


def test_many_features_approach_softmax_attention():
    """R = 8,192: within 0.1 of exact attention everywhere, where R = 8 is not.

    Catches any error in the estimator that the same error in the reference would hide.
    """
    arrays = inputs(scale=0.6)
    exact = reference.attention('exact', *arrays)

    def error(num_features):
        w = projections.gaussian(jax.random.key(0), num_features, D)
        attend = jax.jit(functools.partial(favor.favor_attention, kernel='softmax'))
        return np.max(np.abs(attend(*arrays, projection=w) - exact))

    assert error(8192) < 0.1 < error(8)


@pytest.mark.parametrize('kernel', favor.KERNELS)
def test_bfloat16(kernel):
    """Catches features or sums in bfloat16: M = 512 keys, and the error stays at 2 roundings."""
    query, key, value = inputs((1,), num_keys=512)
    arrays = tuple(x.astype(jnp.bfloat16) for x in (query, key, np.abs(value) + 1))
    output = compiled(favor.favor_attention, kernel)(*arrays)
    assert output.dtype == jnp.bfloat16
    rounded = tuple(np.asarray(x, np.float64) for x in arrays)
    given = jax.tree.map(
        lambda w: w if isinstance(w, str) else w.astype(jnp.bfloat16), weights(kernel)
    )
    expected = reference.attention(given.pop('kernel'), *rounded, **given)
    np.testing.assert_allclose(np.asarray(output, np.float64), expected, rtol=2**-6)


class TwoLayers(nn.Module):
    kernel: str = 'relu'
    projection: str = 'orthogonal'
    row_norms: str = 'gaussian'

    @nn.compact
    def __call__(self, x):
        for name in ('first', 'second'):
            x = favor.FavorAttention(
                self.kernel, R, self.projection, self.row_norms, seed=3, name=name
            )(x, x, x)
        return x


@pytest.mark.parametrize('row_norms', projections.ROW_NORMS)
def test_projections_are_a_function_of_seed_layer_and_draw(row_norms):
    """Catches a draw from the params stream, layers that share one, and a redraw that differs."""
    x = inputs()[0]
    model = TwoLayers(row_norms=row_norms)
    variables = model.init(jax.random.key(0), x)
    assert set(variables) == {'projections'}
    collection = variables['projections']
    assert jax.tree.map(jnp.shape, collection) == {
        'first': {'matrix': (R, D)},
        'second': {'matrix': (R, D)},
    }
    assert not np.any(collection['first']['matrix'] == collection['second']['matrix'])
    again = jax.jit(model.init)(jax.random.key(1), x)['projections']
    jax.tree.map(np.testing.assert_array_equal, collection, again)

    @jax.jit
    def redraw(collection, number):
        return favor.redraw_projections(
            collection, seed=3, draw_number=number, projection='orthogonal', row_norms=row_norms
        )

    jax.tree.map(np.testing.assert_array_equal, collection, redraw(collection, 0))
    redrawn = redraw(collection, 1)
    jax.tree.map(np.testing.assert_array_equal, redrawn, redraw(redrawn, 1))
    jax.tree.map(lambda a, b: np.testing.assert_(not np.any(a == b)), collection, redrawn)
    # The redrawn collection is what the model then uses.
    assert np.any(model.apply(variables, x) != model.apply({'projections': redrawn}, x))


@pytest.mark.parametrize('kernel', favor.KERNELS)
def test_module_is_the_function_with_its_weights(kernel):
    """Catches params out of place or not float32, and a sown map that is not the one in use."""
    arrays = inputs((2,))
    mask = draw_mask((2, 1, 1, M))
    module = favor.FavorAttention(kernel, R)
    variables = jax.jit(module.init)(jax.random.key(0), *arrays, mask)
    learnt, projected = kernel.startswith('ftheta'), kernel in ('softmax', 'relu', 'gelu', 'elu')
    assert set(variables) == ({'params'} if learnt else {'projections'} if projected else set())
    output, state = jax.jit(functools.partial(module.apply, mutable=['intermediates']))(
        variables, *arrays, mask
    )
    theta = variables['params']['theta'] if learnt else None
    matrix = variables['projections']['matrix'] if projected else None
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    expected = reference.attention(kernel, *arrays, mask, matrix, theta)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    (attention_map,) = state['intermediates']['attention_map']
    assert attention_map.shape == (2, H, N, M)
    np.testing.assert_allclose(
        np.einsum('bhnm,bmhd->bnhd', attention_map, arrays[2]), output, rtol=1e-4, atol=1e-5
    )


def test_module_computes_in_its_dtype():
    """Catches a dtype that is ignored."""
    arrays = inputs((2,))
    module = favor.FavorAttention('ftheta', R, dtype=jnp.bfloat16)
    output, variables = module.init_with_output(jax.random.key(0), *arrays)
    assert output.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_the_matrix_is_not_formed_unless_asked_for():
    """Catches an N×M array in the ordinary linear path of the module, forward or backward."""
    arrays = inputs((1,), 61, 67)
    module = favor.FavorAttention('softmax', R)
    variables = module.init(jax.random.key(0), *arrays)
    mask = jnp.ones((1, 1, 1, 67), bool)

    def loss(*x):
        return jnp.sum(module.apply(variables, *x, mask))

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arrays))
    assert f'{H},61' in text.replace(' ', '')
    assert '61,67' not in text
    assert '67,61' not in text


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'kernel': 'cosine'}, "kernel is 'cosine'; allowed are 'exact', 'softmax'"),
        ({'kernel': 'relu', 'projection': 'fast'}, "is 'fast'; allowed are 'orthogonal'"),
        ({'kernel': 'relu', 'row_norms': 'one'}, "row_norms is 'one'; allowed are 'gaussian'"),
        ({'kernel': 'relu'}, 'num_features is 0 .* integer ≥ 1'),
        ({'kernel': 'relu', 'num_features': -1}, 'num_features is -1'),
        (
            {'kernel': 'relu', 'projection': 'none', 'num_features': 9},
            'num_features is 9 .* Set num_features to 0 or 4',
        ),
        ({'kernel': 'softmax', 'projection': 'none'}, "'softmax' with projection 'none'"),
    ],
)
def test_bad_fields(fields, message):
    """Catches a field that goes on with another meaning than the one asked for."""
    x = inputs((1,))[0]
    with pytest.raises(BadInput, match=message):
        favor.FavorAttention(**fields).init(jax.random.key(0), x, x, x)


@pytest.mark.parametrize(
    'fields',
    [
        {'kernel': 'relu', 'projection': 'none'},
        {'kernel': 'relu', 'projection': 'none', 'num_features': D},
        {'kernel': 'ftheta'},
        {'kernel': 'exact'},
    ],
)
def test_num_features_may_be_left_out(fields):
    """Catches a required R where the head dimension gives it."""
    x = inputs((1,))[0]
    output, _ = favor.FavorAttention(**fields).init_with_output(jax.random.key(0), x, x, x)
    assert output.shape == x.shape


Q, K, V = jnp.ones((2, 5, 2, 4)), jnp.ones((2, 7, 2, 4)), jnp.ones((2, 7, 2, 4))


@pytest.mark.parametrize(
    ('arrays', 'more', 'message'),
    [
        ((Q[0], K, V), {}, r'query has shape \(5, 2, 4\); allowed is \[batch…, tokens, heads, h'),
        ((Q, K[:1], V), {}, 'key has shape .* batch axes and heads'),
        ((Q, K, V[:, :, :1]), {}, 'value has shape .* batch axes and heads'),
        ((Q, K[..., :3], V), {}, 'key has head dimension 3, query 4'),
        ((Q, K, V[:, :6]), {}, 'value has 6 tokens, key 7'),
        ((Q, K[:, :0], V[:, :0]), {}, 'value has 0 tokens, key 0'),
        ((Q.astype(int), K, V), {}, 'query has dtype int32; allowed is a floating'),
        ((Q, K, V), {'mask': jnp.ones((2, 1, 1, 7))}, 'mask has dtype float32; allowed is bool'),
        ((Q, K, V), {'mask': jnp.ones((2, 7), bool)}, r'mask has shape \(2, 7\); .*5, 7\)'),
        ((Q, K, V), {'mask': jnp.ones((1, 2, 1, 1, 7), bool)}, 'mask has shape'),
        ((Q, K, V), {'projection': jnp.ones((6, 3))}, r'projection has shape \(6, 3\)'),
        ((Q, K, V), {'kernel': 'softmax'}, "projection is None; kernel 'softmax' needs"),
        ((Q, K, V), {'kernel': 'exact', 'projection': jnp.ones((6, 4))}, "'exact' has none"),
        ((Q, K, V), {'kernel': 'ftheta'}, "theta is missing for kernel 'ftheta'"),
        ((Q, K, V), {'theta': {}}, "theta is given for kernel 'relu'"),
    ],
)
@pytest.mark.parametrize('matrix', [False, True])
def test_bad_arrays(arrays, more, message, matrix):
    """Catches shapes that broadcast by accident, and float masks taken for additive ones."""
    more = {'kernel': 'relu'} | more
    with pytest.raises(BadInput, match=message):
        if matrix and arrays[2] is V:
            favor.attention_matrix(*arrays[:2], **more)
        favor.favor_attention(*arrays, **more)


def test_redraw_refuses_what_it_cannot_redraw():
    """Catches a replicated state drawn as one matrix, and a model without projections."""
    replicated = {'layer': {'matrix': jnp.ones((2, R, D))}}
    with pytest.raises(BadInput, match=r'layer/matrix has shape \(2, 6, 4\)'):
        favor.redraw_projections(replicated, seed=0, draw_number=1, projection='gaussian')
    with pytest.raises(BadInput, match="projection is 'none'"):
        favor.redraw_projections({}, seed=0, draw_number=1, projection='none')


# The drop-in. Exact attention in Flax is the independent reference for what the modules do.


def linen(attention_fn=nn.dot_product_attention, **fields):
    return nn.MultiHeadDotProductAttention(num_heads=H, attention_fn=attention_fn, **fields)


def nnx_module(attention_fn=nnx.dot_product_attention, **fields):
    return nnx.MultiHeadAttention(
        num_heads=H,
        in_features=8,
        decode=False,
        attention_fn=attention_fn,
        rngs=nnx.Rngs(0),
        **fields,
    )


X = np.random.default_rng(2).normal(size=(2, 5, 8)).astype(np.float32)
VALID = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
FLAX_MASKS = {
    'none': None,
    'padding': VALID[:, None, None, :] > 0,
    # As Flax makes it: float32, with a query axis.
    'causal': np.asarray(nn.make_causal_mask(X[..., 0])),
}


@pytest.mark.parametrize('mask', FLAX_MASKS)
def test_exact_drop_in_equals_flax(mask):
    """Catches arguments passed in another order or meaning than Flax's, in both APIs."""
    mask = FLAX_MASKS[mask]
    fn = favor.make_attention_fn('exact')
    variables = linen().init(jax.random.key(0), X)
    np.testing.assert_allclose(
        jax.jit(linen(fn).apply)(variables, X, mask=mask),
        linen().apply(variables, X, mask=mask),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        nnx.jit(nnx_module(fn))(X, mask=mask), nnx_module()(X, mask=mask), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize('kernel', ['softmax', 'relu', 'gelu', 'elu'])
def test_drop_in_attends_with_its_matrix(kernel):
    """First called under a trace, then outside; catches a leaked tracer and a matrix per call."""
    arrays = inputs((2,))
    fn = favor.make_attention_fn(kernel, R, 'gaussian', seed=4, layer=9)
    mask = np.arange(M) < 5
    w = projections.draw(4, 9, 0, R, D, 'gaussian')
    expected = reference.attention(kernel, *arrays, mask, w)
    traced = jax.jit(jax.value_and_grad(lambda *x: jnp.sum(fn(*x, mask=mask))))(*arrays)[0]
    np.testing.assert_allclose(traced, expected.sum(), rtol=1e-4)
    np.testing.assert_allclose(fn(*arrays, mask=mask), expected, rtol=1e-4, atol=1e-5)


def test_drop_in_approximates_flax():
    """R = 4,096 in Flax's modules, jitted, is within 0.05 of their own attention."""
    fn = favor.make_attention_fn('softmax', 4096)
    x, mask = 0.5 * X, FLAX_MASKS['padding']
    variables = linen().init(jax.random.key(0), x)
    difference = jax.jit(linen(fn).apply)(variables, x, mask=mask) - linen().apply(
        variables, x, mask=mask
    )
    assert np.max(np.abs(difference)) < 0.05
    difference = nnx.jit(nnx_module(fn))(x, mask=mask) - nnx_module()(x, mask=mask)
    assert np.max(np.abs(difference)) < 0.05


def test_causal_option_of_nnx():
    """Catches is_causal swallowed, alone or together with a mask."""
    fn = favor.make_attention_fn('exact')
    for mask in (None, FLAX_MASKS['padding']):
        causal = nnx_module(fn)(X, mask=mask, is_causal=True)
        both = FLAX_MASKS['causal'] * (1 if mask is None else mask)
        np.testing.assert_allclose(causal, nnx_module()(X, mask=both), rtol=1e-5, atol=1e-6)


def test_weights_are_sown_on_request():
    """Catches sow_weights swallowed; rows of the sown matrix sum to 1."""
    fn = favor.make_attention_fn('relu', R)
    variables = linen().init(jax.random.key(0), X)
    _, state = linen(fn).apply(variables, X, sow_weights=True, mutable=['intermediates'])
    module = nnx_module(fn)
    module(X, sow_weights=True)
    for sown in (
        state['intermediates']['attention_weights'][0],
        nnx.pop(module, nnx.Intermediate)['attention_weights'].get_value()[0],
    ):
        assert sown.shape == (2, H, 5, 5)
        np.testing.assert_allclose(np.sum(sown, axis=-1), 1, rtol=1e-5)


def test_dropout_of_weights_is_refused_in_training_alone():
    """Catches dropout that silently does nothing."""
    fn = favor.make_attention_fn('relu', R)
    module = linen(fn, dropout_rate=0.1)
    variables = module.init(jax.random.key(0), X, deterministic=True)
    rngs = {'dropout': jax.random.key(1)}
    with pytest.raises(BadInput, match='dropout_rate is 0.1'):
        module.apply(variables, X, deterministic=False, rngs=rngs)
    with pytest.raises(BadInput, match='dropout_rate is 0.1'):
        nnx_module(fn, dropout_rate=0.1)(X, deterministic=False)
    nnx_module(fn, dropout_rate=0.1)(X, deterministic=True)


def test_options_that_cannot_be_honoured_are_refused():
    """Catches an option that Flax would filter out of the call, because the function lacks it."""
    arrays = inputs((1,))
    fn = favor.make_attention_fn('relu', R)
    parameters = set(inspect.signature(fn).parameters)
    assert parameters >= set(inspect.signature(nn.dot_product_attention).parameters)
    own = {'promote_dtype'}  # Flax's modules never pass it.
    assert parameters >= set(inspect.signature(nnx.dot_product_attention).parameters) - own
    for name in (
        'bias',
        'einsum_dot_general',
        'qk_attn_weights_einsum',
        'attn_weights_value_einsum',
    ):
        with pytest.raises(BadInput, match=f'{name} is given'):
            fn(*arrays, **{name: jnp.ones(1)})
    with pytest.raises(BadInput, match='precision is 3'):
        fn(*arrays, precision=3)
    with pytest.raises(TypeError, match='window'):
        fn(*arrays, window=3)


@pytest.mark.parametrize(
    'precision',
    ['highest', jax.lax.Precision.HIGHEST, (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)],
)
def test_precision_reaches_the_products(precision):
    """Catches a precision that is taken and ignored."""
    fn = favor.make_attention_fn('relu', R)
    jaxpr = str(jax.make_jaxpr(lambda *x: fn(*x, precision=precision))(*inputs((1,))))
    assert jaxpr.count('Precision.HIGHEST, Precision.HIGHEST') == jaxpr.count('dot_general[') > 0


def test_bad_drop_in():
    """Catches an error that comes only at the first call, and fθ without its weights."""
    with pytest.raises(BadInput, match='FavorAttention'):
        favor.make_attention_fn('ftheta')
    with pytest.raises(BadInput, match="kernel is 'Softmax'"):
        favor.make_attention_fn('Softmax')
    with pytest.raises(BadInput, match="'softmax' with projection 'none'"):
        favor.make_attention_fn('softmax', projection='none')
