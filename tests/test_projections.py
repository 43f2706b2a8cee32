"""The geometry, the distribution and the reproducibility of the random projections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from performer_vit import projections
from performer_vit.errors import BadInput

# R below, at, above and not a multiple of D.
SIZES = ((5, 16), (16, 16), (40, 16), (3, 1))


@pytest.mark.parametrize(('num_features', 'dim'), SIZES)
@pytest.mark.parametrize('row_norms', projections.ROW_NORMS)
def test_rows_are_orthogonal_within_blocks(num_features, dim, row_norms):
    """Catches plain Gaussian rows, blocks cut at the wrong place, and columns taken for rows."""
    w = np.asarray(projections.orthogonal(jax.random.key(0), num_features, dim, row_norms))
    assert w.shape == (num_features, dim)
    assert w.dtype == np.float32
    directions = w / np.linalg.norm(w, axis=1, keepdims=True)
    for start in range(0, num_features, dim):
        block = directions[start : start + dim]
        np.testing.assert_allclose(block @ block.T, np.eye(len(block)), atol=2e-6)


def test_blocks_are_independent():
    """Catches one block repeated, which would add rows but no information."""
    w = np.asarray(projections.orthogonal(jax.random.key(0), 16, 8, 'sqrt_dim'))
    assert np.max(np.abs(w[:8] @ w[8:].T)) < 0.999 * 8


@pytest.mark.parametrize(('num_features', 'dim'), SIZES)
def test_sqrt_dim_norms(num_features, dim):
    """Catches rows of unit norm."""
    w = projections.orthogonal(jax.random.key(1), num_features, dim, 'sqrt_dim')
    np.testing.assert_allclose(np.linalg.norm(w, axis=1), dim**0.5, rtol=1e-6)


@pytest.mark.parametrize('draw', [projections.orthogonal, projections.gaussian])
def test_gaussian_norms_are_chi_distributed(draw):
    """Catches rows of constant norm: Kolmogorov-Smirnov, false alarm once in 10,000 seeds."""
    w = np.asarray(draw(jax.random.key(2), 4000, 8))
    assert stats.kstest(np.sum(w**2, axis=1), stats.chi2(8).cdf).pvalue > 1e-4


def test_rows_of_orthogonal_are_gaussian_vectors():
    """Each entry of a row is N(0, 1) over draws; false alarm once in 10,000 seeds per entry.

    Catches QR's signs left as LAPACK chose them, which makes the first row's first entry negative
    in every draw.
    """
    keys = jax.random.split(jax.random.key(3), 2000)
    rows = jax.vmap(lambda key: projections.orthogonal(key, 4, 4))(keys)
    for entry in np.asarray(rows)[:, [0, 3]].reshape(2000, 8).T:
        assert stats.kstest(entry, stats.norm.cdf).pvalue > 1e-4


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1))
def test_draw_is_a_pure_function_that_uses_all_of_its_arguments(seed, layer, number):
    """Catches hidden state, and a seed, layer or draw number left out of the key."""

    def draw(*at):
        return np.asarray(projections.draw(*at, 5, 3, 'orthogonal'))

    w = draw(seed, layer, number)
    np.testing.assert_array_equal(w, draw(seed, layer, number))
    neighbours = ((seed ^ 1, layer, number), (seed, layer ^ 1, number), (seed, layer, number ^ 1))
    for neighbour in neighbours:
        assert not np.any(w == draw(*neighbour))


@pytest.mark.parametrize('projection', ['orthogonal', 'gaussian'])
@pytest.mark.parametrize(('num_features', 'dim'), [(5, 16), (100, 24)])
def test_a_traced_draw_number_gives_the_same_bits(projection, num_features, dim):
    """Catches a redraw inside a jitted step that differs from the one outside."""

    def draw(number):
        return projections.draw(7, 5, number, num_features, dim, projection)

    np.testing.assert_array_equal(draw(2), jax.jit(draw)(jnp.int32(2)))
    np.testing.assert_array_equal(draw(2), jax.jit(lambda: draw(2))())


def test_jax_default_generator_has_no_say():
    """Catches a key made by the process-wide default generator."""
    w = projections.draw(0, 0, 0, 5, 3, 'gaussian')
    with jax.default_prng_impl('rbg'):
        np.testing.assert_array_equal(w, projections.draw(0, 0, 0, 5, 3, 'gaussian'))


def test_none_has_no_matrix():
    assert projections.draw(0, 0, 0, 4, 4, 'none') is None


def test_bad_input_names_what_is_allowed():
    """Catches a misspelt name that goes on with some default."""
    with pytest.raises(BadInput, match="'ortho'.*'orthogonal', 'gaussian', 'none'"):
        projections.draw(0, 0, 0, 4, 4, 'ortho')
    for projection in projections.PROJECTIONS:
        with pytest.raises(BadInput, match="'unit'.*'gaussian', 'sqrt_dim'"):
            projections.draw(0, 0, 0, 4, 4, projection, 'unit')
    with pytest.raises(BadInput, match='0 features in 4 dimensions.*num_features'):
        projections.draw(0, 0, 0, 0, 4, 'orthogonal')
