"""The linear and the quadratic quotient against loops, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from performer_vit import linear_attention as la

N, M, H, R, D = 5, 7, 2, 3, 4


def inputs(batch=(2,), dtype=np.float32, num_queries=N, num_keys=M):
    rng = np.random.default_rng(0)
    query_features = rng.random((*batch, num_queries, H, R))
    key_features = rng.random((*batch, num_keys, H, R))
    value = rng.normal(size=(*batch, num_keys, H, D))
    return tuple(x.astype(dtype) for x in (query_features, key_features, value))


def draw_mask(probability, shape):
    return np.random.default_rng(1).random(shape) < probability


# Compiled, as they are used, and because a test is faster so.
linear_attention = jax.jit(la.linear_attention)
quadratic_attention = jax.jit(la.quadratic_attention)
attention_matrix = jax.jit(la.attention_matrix)


def loops(query_features, key_features, value, mask):
    """The quotient entry by entry in float64; mask [..., H, N, M]."""
    query_features, key_features, value = (
        np.asarray(x, np.float64) for x in (query_features, key_features, value)
    )
    output = np.zeros((*query_features.shape[:-1], value.shape[-1]))
    for *batch, n, h in np.ndindex(output.shape[:-1]):
        denominator = 0.0
        for m in range(value.shape[-3]):
            if mask[(*batch, h, n, m)]:
                weight = query_features[(*batch, n, h)] @ key_features[(*batch, m, h)]
                output[(*batch, n, h)] += weight * value[(*batch, m, h)]
                denominator += weight
        if denominator > 0:
            output[(*batch, n, h)] /= denominator
    return output


@pytest.mark.parametrize('batch', [(), (2,), (2, 3)])
@pytest.mark.parametrize('masked', [False, True])
def test_linear_against_loops(batch, masked):
    """Catches axes mixed up (N, M, H, R, D all differ), heads mixed, a mask on the wrong axis."""
    arrays = inputs(batch)
    key_mask = draw_mask(0.6, (*batch, M)) if masked else None
    output = linear_attention(*arrays, key_mask)
    mask = np.ones(1, bool) if key_mask is None else np.asarray(key_mask)[..., None, None, :]
    expected = loops(*arrays, np.broadcast_to(mask, (*batch, H, N, M)))
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    'shape', [(2, H, N, M), (1, 1, N, M), (N, M), (H, 1, M), (2, 1, 1, M), (2, 1, N, 1)]
)
def test_quadratic_against_loops(shape):
    """Catches a mask broadcast along the wrong axis."""
    arrays = inputs()
    mask = draw_mask(0.5, shape)
    expected = loops(*arrays, np.broadcast_to(mask, (2, H, N, M)))
    np.testing.assert_allclose(quadratic_attention(*arrays, mask), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(bool, (2, M)))
def test_linear_equals_quadratic_under_any_padding(key_mask):
    """Catches either path treating a mask, or an empty row, in its own way."""
    arrays = inputs()
    np.testing.assert_allclose(
        linear_attention(*arrays, key_mask),
        quadratic_attention(*arrays, key_mask[:, None, None, :]),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize('function', [linear_attention, quadratic_attention])
def test_nothing_to_attend_gives_zeros(function):
    """Catches 0/0 in the output, and in the gradient, where `where` hides it from the output."""
    arrays = inputs()
    key_mask = np.array([[False] * M, [True] * M])
    mask = key_mask if function is linear_attention else key_mask[:, None, None, :]
    output = function(*arrays, mask)
    np.testing.assert_array_equal(output[0], 0)
    assert np.all(output[1] != 0)
    gradients = jax.grad(lambda *x: jnp.sum(function(*x, mask) ** 2), argnums=(0, 1, 2))(*arrays)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[0], 0)
        assert np.all(np.isfinite(gradient[1]))
        assert np.any(gradient[1] != 0)


def test_masked_positions_have_no_effect():
    """Catches masking by a product, which lets NaN through as 0 · NaN."""
    query_features, key_features, value = inputs()
    key_mask = np.array([[True] * 4 + [False] * 3, [True] * 6 + [False]])
    clean = linear_attention(query_features, key_features, value, key_mask)
    keep = key_mask[..., None, None]
    dirty = (
        query_features,
        np.where(keep, key_features, np.float32('nan')),
        np.where(keep, value, np.float32('inf')),
    )
    np.testing.assert_array_equal(linear_attention(*dirty, key_mask), clean)
    gradients = jax.grad(
        lambda *x: jnp.sum(linear_attention(*x, key_mask) ** 2), argnums=(0, 1, 2)
    )(*dirty)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_sums_are_float32_whatever_the_inputs():
    """4,096 keys in bfloat16, where a bfloat16 sum of ones stops growing at 256.

    What is left is the rounding of the output to bfloat16, 2^-8.
    """
    arrays = inputs((1,), jnp.bfloat16, num_keys=4096)
    arrays = (*arrays[:2], np.abs(arrays[2]) + arrays[2].dtype.type(1))
    output = linear_attention(*arrays)
    assert output.dtype == jnp.bfloat16
    matrix = np.einsum('bnhr,bmhr->bhnm', *(np.asarray(x, np.float64) for x in arrays[:2]))
    matrix /= matrix.sum(axis=-1, keepdims=True)
    expected = np.einsum('bhnm,bmhd->bnhd', matrix, np.asarray(arrays[2], np.float64))
    np.testing.assert_allclose(np.asarray(output, np.float64), expected, rtol=2**-8)
    jaxpr = jax.make_jaxpr(la.linear_attention)(*arrays)
    products = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == 'dot_general']
    assert products
    assert all(eqn.outvars[0].aval.dtype == jnp.float32 for eqn in products)


def test_linear_attention_never_forms_the_matrix():
    """Catches a contraction in the wrong order: no array has both a query and a key axis."""
    arrays = inputs(num_queries=61, num_keys=67)
    jaxpr = jax.make_jaxpr(jax.grad(lambda *x: jnp.sum(la.linear_attention(*x))))(*arrays)
    shapes = [v.aval.shape for eqn in jaxpr.jaxpr.eqns for v in eqn.outvars]
    assert any(61 in shape for shape in shapes)
    assert not any(61 in shape and 67 in shape for shape in shapes)


def test_attention_matrix_is_what_attention_multiplies_by():
    """Catches rows that do not sum to 1, and a matrix that is not the one in use."""
    query_features, key_features, value = inputs((2, 3))
    mask = draw_mask(0.7, (2, 3, 1, 1, M))
    matrix = attention_matrix(query_features, key_features, mask)
    assert matrix.shape == (2, 3, H, N, M)
    np.testing.assert_allclose(matrix.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.where(mask, 0, matrix), 0)
    np.testing.assert_allclose(
        np.einsum('...hnm,...mhd->...nhd', matrix, value),
        linear_attention(query_features, key_features, value, mask[..., 0, 0, :]),
        rtol=1e-5,
        atol=1e-6,
    )


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float32, (2, M, H), elements=st.floats(-8, 8, width=32)))
def test_key_log_scale_scales_key_features(log_scale):
    """Catches a scale left out, inverted, or on the wrong axis."""
    query_features, key_features, value = inputs()
    mask = draw_mask(0.7, (2, H, N, M))
    np.testing.assert_allclose(
        quadratic_attention(query_features, key_features, value, mask, log_scale),
        quadratic_attention(
            query_features, key_features * np.exp(log_scale)[..., None], value, mask
        ),
        rtol=1e-4,
        atol=1e-5,
    )


def test_key_log_scale_beyond_float32():
    """Scales of e^±10,000: each query takes the largest key that it may see, exactly.

    Catches a scale that is multiplied in before the maximum is taken out.
    """
    query_features, key_features, value = inputs()
    log_scale = np.broadcast_to(np.linspace(-1e4, 1e4, M, dtype=np.float32)[:, None], (2, M, H))
    mask = np.tri(N, M, dtype=bool)
    output = quadratic_attention(query_features, key_features, value, mask, log_scale)
    np.testing.assert_allclose(output, value[:, :N], rtol=1e-6)
