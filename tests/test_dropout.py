"""Dropout by bytes: its probability, its independence, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from performer_vit.dropout import Dropout, drop_mask
from performer_vit.errors import BadInput

KEY = jax.random.key(0)
# Each statistical bound below holds for a right mask in all but one of 10⁹ draws.
Z = stats.norm.isf(0.5e-9)


@pytest.mark.parametrize('rate', [0.0, 1e-3, 0.1, 0.3, 0.5, 0.999, 1.0])
def test_elements_are_dropped_with_the_rate(rate):
    """Catches a rate that is rounded to 1/256 (0.1 → 26/256 is off by 6 of these bounds)."""
    mask = np.asarray(drop_mask(KEY, rate, (4096, 256)))
    assert mask.dtype == bool
    # Of one element, and of the row's threshold, which all of its elements share.
    variance = rate * (1 - rate) / mask.size + 0.25 / 256**2 / len(mask)
    bound = Z * np.sqrt(variance) if 0 < rate < 1 else 0.0
    assert abs(mask.mean() - rate) <= bound


def test_columns_are_dropped_alike():
    """Catches bytes of a word, or its parts, that are not uniform: χ² over the columns."""
    mask = np.asarray(drop_mask(KEY, 0.1, (8192, 64)))
    counts = mask.sum(axis=0)
    expected = 0.1 * len(mask)
    chi_squared = ((counts - expected) ** 2 / (expected * 0.9)).sum()
    assert stats.chi2.isf(1 - 0.5e-9, 64) < chi_squared < stats.chi2.isf(0.5e-9, 64)


def test_elements_are_independent():
    """Catches masks that repeat along a row, from row to row, or between the bytes of a word.

    A product of two centred elements has the standard deviation p(1 − p); one row's share of u
    adds less than 2⁻¹⁸ to the mean of products within a row.
    """
    mask = np.asarray(drop_mask(KEY, 0.3, (2048, 256))) - 0.3
    for shift in (1, 2, 3, 4, 64):
        for a, b in ((mask[:, shift:], mask[:, :-shift]), (mask[shift:], mask[:-shift])):
            bound = Z * 0.21 / np.sqrt(a.size) + 2.0**-18
            assert abs((a * b).mean()) < bound


@pytest.mark.parametrize('shape', [(5,), (3, 1), (2, 3, 6), (0, 4), (2, 0)])
def test_any_shape(shape):
    """Catches rows that are no multiple of a word."""
    assert drop_mask(KEY, 0.5, shape).shape == shape


def test_keys_give_masks_of_their_own():
    """Catches a key that is ignored."""
    masks = [np.asarray(drop_mask(jax.random.key(i), 0.5, (64, 64))) for i in (0, 0, 1)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert 0.4 < (masks[0] == masks[2]).mean() < 0.6


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_what_stays_is_divided_by_its_probability(dtype):
    """Catches a scale that is missing or twice, a changed dtype, and a gradient of dropped ones."""
    x = jnp.full((64, 32), 3.0, dtype)
    module = Dropout(0.25)

    def apply(x):
        return module.apply({}, x, train=True, rngs={'dropout': KEY})

    y, gradient = jax.jit(jax.value_and_grad(lambda x: apply(x).sum().astype(jnp.float32)))(x)
    out = apply(x)
    kept = np.asarray(out != 0)
    assert out.dtype == dtype and 0 < kept.mean() < 1
    assert set(np.unique(np.asarray(out, np.float32))) == {0.0, 4.0}
    np.testing.assert_allclose(np.asarray(gradient, np.float32), kept / 0.75, rtol=4e-3)


def test_nothing_is_dropped_in_inference_or_at_rate_zero():
    """Catches a mask, or a key that is asked for, where there is nothing to drop."""
    x = jnp.ones((4, 4))
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, train=False), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, train=True), x)


@pytest.mark.parametrize('rate', [-0.1, 1.0, float('nan')])
def test_what_is_no_rate_is_refused(rate):
    with pytest.raises(BadInput, match=f'rate is {rate}; it is a probability'):
        Dropout(rate)
