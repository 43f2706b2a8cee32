"""Exact attention against NumPy, with and without blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from performer_vit import exact_attention as ea
from tests import reference

N, M, H, D = 10, 7, 2, 4
MASKS = {
    'none': None,
    'padding': (2, 1, 1, M),
    'full': (2, H, N, M),
    'per query': (N, M),
    'per head': (H, 1, M),
    'one axis': (M,),
    'rows': (2, 1, N, 1),
}


def inputs(batch=(2,), scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(0)
    query = scale * rng.normal(size=(*batch, N, H, D))
    key = scale * rng.normal(size=(*batch, M, H, D))
    value = rng.normal(size=(*batch, M, H, D + 1))
    return tuple(x.astype(dtype) for x in (query, key, value))


def draw_mask(name):
    shape = MASKS[name]
    return None if shape is None else np.random.default_rng(3).random(shape) < 0.5


# Compiled, as it is used, and because a test is faster so.
exact_attention = jax.jit(ea.exact_attention, static_argnames='block_size')
attention_matrix = jax.jit(ea.attention_matrix)


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('block_size', [None, 4, 5])
def test_against_numpy(mask, block_size):
    """Blocks with a remainder and without; catches a block that takes another's mask."""
    arrays, mask = inputs(), draw_mask(mask)
    output = exact_attention(*arrays, mask, block_size=block_size)
    expected = reference.attention('exact', *arrays, mask)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('batch', [(), (2, 3)])
@pytest.mark.parametrize('block_size', [None, 4])
def test_any_number_of_batch_axes(batch, block_size):
    """Catches axes counted from the left."""
    arrays = inputs(batch)
    mask = np.random.default_rng(3).random((*batch, 1, N, M)) < 0.7
    output = exact_attention(*arrays, mask, block_size=block_size)
    expected = reference.attention('exact', *arrays, mask)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        attention_matrix(*arrays[:2], mask),
        reference.attention_matrix('exact', *arrays[:2], mask),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize('mask', ['none', 'padding', 'full'])
def test_blocks_have_the_same_gradient(mask):
    """Catches a gradient of k or v that takes in one block alone, or the padded rows."""
    arrays, mask = inputs(), draw_mask(mask)
    target = np.random.default_rng(4).normal(size=(2, N, H, D + 1)).astype(np.float32)

    def gradient(block_size):
        def loss(*x):
            return jnp.sum((ea.exact_attention(*x, mask, block_size) - target) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    for blocked, whole in zip(gradient(4), gradient(N), strict=True):
        np.testing.assert_allclose(blocked, whole, rtol=1e-4, atol=1e-5)


def sizes(jaxpr):
    """Elements of every array in a program, inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for parameter in jax.tree.leaves(eqn.params):
            inner = getattr(parameter, 'jaxpr', parameter)
            if hasattr(inner, 'eqns'):
                yield from sizes(inner)


@pytest.mark.parametrize('masked', [False, True])
def test_no_more_than_a_block_of_weights_exists(masked):
    """Forward and backward; catches blocks that are all kept for the backward pass."""
    query, key = (jnp.ones((1, n, 1, 2)) for n in (512, 256))
    mask = jnp.ones((1, 1, 1, 256), bool) if masked else None

    def largest(block_size):
        def loss(q, k, v):
            return jnp.sum(ea.exact_attention(q, k, v, mask, block_size))

        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(query, key, key)
        return max(sizes(jaxpr.jaxpr))

    assert largest(512) == 512 * 256
    assert largest(32) == 32 * 256


@pytest.mark.parametrize('block_size', [None, 4])
def test_nothing_to_attend_gives_zeros(block_size):
    """Catches NaN from a softmax over nothing, in the output or in the gradient."""
    arrays = inputs()
    mask = np.ones((2, 1, N, M), bool)
    mask[0] = mask[1, :, 3] = False

    def attend(*x):
        return exact_attention(*x, mask, block_size=block_size)

    output = attend(*arrays)
    np.testing.assert_array_equal(output[0], 0)
    np.testing.assert_array_equal(output[1, 3], 0)
    assert np.all(output[1, 4:] != 0)
    gradients = jax.grad(lambda *x: jnp.sum(attend(*x) ** 2), argnums=(0, 1, 2))(*arrays)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[0], 0)
        assert np.all(np.isfinite(gradient))


def test_extreme_inputs():
    """|x| to 1e3 and more; catches an exponential without its maximum taken out."""
    query, key, value = inputs(scale=1e3)
    output = exact_attention(query, key, value)
    expected = reference.attention('exact', query, key, value)
    np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-3)


def test_bfloat16():
    """Catches a softmax in bfloat16, whose logits near 30 would be off by 0.1, and the wrong dtype.

    What is left is the rounding of weights and output to 8 bits.
    """
    arrays = inputs(scale=4.0, dtype=jnp.bfloat16)
    output = exact_attention(*arrays)
    assert output.dtype == jnp.bfloat16
    assert ea.attention_matrix(*arrays[:2]).dtype == jnp.float32
    expected = reference.attention('exact', *(np.asarray(x, np.float64) for x in arrays))
    np.testing.assert_allclose(np.asarray(output, np.float64), expected, atol=0.02)
    np.testing.assert_allclose(
        ea.attention_matrix(*arrays[:2]),
        reference.attention_matrix('exact', *arrays[:2]),
        atol=1e-5,
    )
