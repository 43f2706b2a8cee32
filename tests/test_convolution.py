"""The convolution of the stem against Flax's own, and its gradients against XLA's and numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from performer_vit import convolution, flops
from performer_vit.convolution import Conv3x3, convolve

KEY = jax.random.key(0)


def arrays(batch: int = 6, height: int = 8, width: int = 4, channels: int = 5, out: int = 128):
    keys = jax.random.split(KEY, 3)
    return (
        jax.random.normal(keys[0], (batch, height, width, channels)),
        jax.random.normal(keys[1], (3, 3, channels, out)),
        jax.random.normal(keys[2], (batch, height, width, out)),
    )


def test_is_flax_conv():
    """The same parameters, first values, output and gradients. Catches a turned window."""
    images, _, gradient = arrays(out=7)
    ours, theirs = Conv3x3(7), nn.Conv(7, (3, 3), use_bias=False)
    variables = ours.init(KEY, images)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(KEY, images))
    np.testing.assert_array_equal(ours.apply(variables, images), theirs.apply(variables, images))
    found, expected = (
        jax.vjp(module.apply, variables, images)[1](gradient) for module in (ours, theirs)
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected
    )


# A prime batch has no blocks but single images, and an image may be larger than a block.
@pytest.mark.parametrize('batch, places', [(6, 64), (6, 96), (7, 200), (4, 16), (6, 10**9)])
def test_gradient_by_blocks_is_that_of_plain_sums(batch, places):
    """Σ over images and places of shifted pixel × gradient. Catches lost or repeated images."""
    images, _, gradient = arrays(batch)
    padded = np.pad(np.asarray(images, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.stack([
        np.stack([
            np.einsum('bhwc,bhwd->cd', padded[:, i : i + 8, j : j + 4], np.asarray(gradient))
            for j in range(3)
        ])
        for i in range(3)
    ])  # fmt: skip
    found = convolution._by_blocks(images, gradient, places)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        convolution._by_convolution(images, gradient), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize('out', [8, 128])
def test_second_derivatives(out):
    """Of both ways to the gradient of the weights, against plain JAX."""
    images, weights, _ = arrays(2, 4, 4, 3, out)

    def plain(images, weights):
        return jax.lax.conv_general_dilated(
            images, weights, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )

    def twice(conv):
        def norm(images, weights):
            slopes = jax.grad(lambda *args: jnp.sin(conv(*args)).sum(), argnums=(0, 1))
            return sum(jnp.sum(slope**2) for slope in slopes(images, weights))

        return jax.grad(norm, argnums=(0, 1))(images, weights)

    for found, expected in zip(twice(convolve), twice(plain), strict=True):
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, atol=1e-4 * scale)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_narrow_types_are_summed_in_float32(dtype):
    """Catches a sum over 256 blocks that loses bits at each of them."""
    images, _, gradient = (jnp.abs(x).astype(dtype) for x in arrays(256, 2, 2, 3))
    found = convolution._by_blocks(images, gradient, block_places=4)
    assert found.dtype == dtype
    expected = convolution._by_blocks(
        *(x.astype(jnp.float32) for x in (images, gradient)), block_places=4
    )
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=rounding)


def test_blocks_do_not_change_the_count_of_operations(monkeypatch):
    """Catches a loop over blocks whose body is counted once, however often it runs.

    Whether or not the same function was traced before, with blocks or without.
    """
    monkeypatch.setattr(convolution, 'BLOCK_PLACES', 32)
    images, weights, _ = arrays()

    def loss(weights, images):
        return jnp.sum(convolve(images, weights) ** 2)

    def in_blocks() -> float:
        return (
            jax.jit(lambda *args: jax.grad(loss)(*args))
            .lower(weights, images)
            .cost_analysis()['flops']
        )

    # Forward, and the gradient of the weights: two multiply-adds of 6·8·4·9·5·128.
    expected = pytest.approx(2 * 2 * 6 * 8 * 4 * 9 * 5 * 128, rel=0.2)
    assert in_blocks() < 0.8 * expected.expected
    assert flops.count(jax.grad(loss), weights[None], images[None]) == expected
    assert in_blocks() < 0.8 * expected.expected
