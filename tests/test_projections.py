"""The geometry, the distribution and the reproducibility of the random projections."""

import functools
import itertools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from performer_vit import feature_maps, projections
from performer_vit.errors import BadInput

# R below, at, above and not a multiple of D.
SIZES = ((5, 16), (40, 16), (64, 64), (3, 1), (5, 2))

BLOCKS = (projections.orthogonal, projections.simplex, projections.hadamard)


@pytest.mark.parametrize(('num_features', 'dim'), SIZES)
@pytest.mark.parametrize('row_norms', projections.ROW_NORMS)
@pytest.mark.parametrize('draw', BLOCKS)
def test_angles_within_blocks(draw, num_features, dim, row_norms):
    """Rows of a block are orthogonal, or the corners of a simplex, whose cosine is -1/(D-1).

    Catches plain Gaussian rows, blocks cut at the wrong place, columns taken for rows, and a
    simplex that is left orthogonal or off its centre.
    """
    w = np.asarray(draw(jax.random.key(0), num_features, dim, row_norms))
    assert w.shape == (num_features, dim)
    assert w.dtype == np.float32
    directions = w / np.linalg.norm(w, axis=1, keepdims=True)
    cosine = -1 / (dim - 1) if draw is projections.simplex and dim > 1 else 0
    for start in range(0, num_features, dim):
        block = directions[start : start + dim]
        expected = np.where(np.eye(len(block)), 1, cosine)
        np.testing.assert_allclose(block @ block.T, expected, atol=2e-6)


@pytest.mark.parametrize('draw', BLOCKS)
def test_blocks_are_independent(draw):
    """Catches one block repeated, which would add rows but no information."""
    w = np.asarray(draw(jax.random.key(0), 16, 8, 'sqrt_dim'))
    assert np.max(np.abs(w[:8] @ w[8:].T)) < 0.999 * 8


@pytest.mark.parametrize('draw', BLOCKS)
def test_one_dimension_draws_random_signs(draw):
    """Catches the simplex's division by D - 1 = 0, and rows that are all positive.

    The number of positive rows of 400 is binomial: a false alarm once in 10,000 seeds.
    """
    w = np.asarray(draw(jax.random.key(0), 400, 1, 'sqrt_dim'))
    np.testing.assert_allclose(np.abs(w), 1, rtol=1e-6)
    assert stats.binomtest(int(np.sum(w > 0)), 400).pvalue > 1e-4


@pytest.mark.parametrize(('num_features', 'dim'), SIZES)
@pytest.mark.parametrize('draw', BLOCKS)
def test_sqrt_dim_norms(draw, num_features, dim):
    """Catches rows of unit norm."""
    w = draw(jax.random.key(1), num_features, dim, 'sqrt_dim')
    np.testing.assert_allclose(np.linalg.norm(w, axis=1), dim**0.5, rtol=1e-6)


@pytest.mark.parametrize('draw', [*BLOCKS, projections.gaussian])
def test_gaussian_norms_are_chi_distributed(draw):
    """Catches rows of constant norm: Kolmogorov-Smirnov, false alarm once in 10,000 seeds."""
    w = np.asarray(draw(jax.random.key(2), 4000, 8))
    assert stats.kstest(np.sum(w**2, axis=1), stats.chi2(8).cdf).pvalue > 1e-4


@pytest.mark.parametrize('draw', [projections.orthogonal, projections.simplex])
def test_rows_are_gaussian_vectors(draw):
    """Each entry of a row is N(0, 1) over draws; false alarm once in 10,000 seeds per entry.

    Catches QR's signs left as LAPACK chose them, which makes the first row's first entry negative
    in every draw, and a simplex that was not turned.
    """
    keys = jax.random.split(jax.random.key(3), 2000)
    rows = jax.vmap(lambda key: draw(key, 4, 4))(keys)
    for entry in np.asarray(rows)[:, [0, 3]].reshape(2000, 8).T:
        assert stats.kstest(entry, stats.norm.cdf).pvalue > 1e-4


def expected_error(dim, length, cosine):
    """Mean square error, over the kernel's square, of the softmax estimator with R = D features.

    Of w_i + w_j only the norm ρ is not uniformly random, and a vector in a uniformly random
    direction has E exp(ρ u·v) = ₀F₁(D/2; ρ²|v|²/4). ρ² follows from the rows' cosine and their
    norms, which are independent and chi-distributed: two Gauss-Legendre quadratures.
    """
    node, weight = np.polynomial.legendre.leggauss(200)
    largest = math.sqrt(dim) + length + 8
    norm = (node + 1) / 2 * largest
    density = stats.chi(dim).pdf(norm) * weight / 2 * largest
    square = norm[:, None] ** 2 + norm**2 + 2 * cosine * np.outer(norm, norm)
    pair = density @ special.hyp0f1(dim / 2, length**2 * square / 4) @ density
    shared = math.exp(-(length**2))
    return ((math.exp(length**2) - 1) + (dim - 1) * (pair * shared - 1)) / dim


@functools.cache
def blocks_of_16(draw):
    """20,000 independent blocks of D = 16 rows."""
    return draw(jax.random.key(8), 20000 * 16, 16)


@functools.cache
def softmax_estimates(draw, length):
    """20,000 estimates of the kernel, each from a block of D = 16 rows, over their true value.

    Query and key differ, and (q + k)/D^(1/4) has the given length.
    """
    q, k = np.random.default_rng(0).normal(size=(2, 16))
    scale = length * 2 / np.linalg.norm(q + k)
    query, key = (
        feature_maps.softmax(jnp.asarray(x * scale, jnp.float32), blocks_of_16(draw))
        for x in (q, k)
    )
    products = np.asarray(query, np.float64) * np.asarray(key, np.float64)
    truth = math.exp(q @ k * scale**2 / 4)
    return products.reshape(20000, 16).sum(axis=1) * 20000 / truth


@pytest.mark.parametrize('length', [0.5, 1.0])
@pytest.mark.parametrize(
    ('draw', 'cosine'),
    [(projections.gaussian, None), (projections.orthogonal, 0), (projections.simplex, -1 / 15)],
)
def test_softmax_estimator_is_unbiased_and_its_error_that_of_theory(draw, cosine, length):
    """The mean and the mean square error, each within 4 standard errors of their closed forms.

    False alarms about once in 10,000 seeds for each. Catches a simplex whose rows are not
    N(0, I_D) (bias), norms shared within a block, and cosines off the formula's (error).
    """
    deviation = softmax_estimates(draw, length) - 1
    assert abs(np.mean(deviation)) < 4 * stats.sem(deviation)
    independent = math.expm1(length**2) / 16
    expected = independent if cosine is None else expected_error(16, length, cosine)
    assert abs(np.mean(deviation**2) - expected) < 4 * stats.sem(deviation**2)


@pytest.mark.parametrize(('length', 'gain'), [(0.5, 11.9), (1.0, 2.86)])
def test_simplex_errs_less_than_orthogonal_and_that_less_than_gaussian(length, gain):
    """One-sided t-tests of the squared errors, at a level of 1 in 10,000.

    `simplex` and `orthogonal` have the same Haar matrices and norms here, so their difference is
    tested in pairs. Catches the two taken for each other, and a gain that is not the documented.
    """
    gaussian, orthogonal, simplex = (
        (softmax_estimates(draw, length) - 1) ** 2
        for draw in (projections.gaussian, projections.orthogonal, projections.simplex)
    )
    assert stats.ttest_rel(orthogonal, simplex, alternative='greater').pvalue < 1e-4
    assert stats.ttest_ind(gaussian, orthogonal, alternative='greater').pvalue < 1e-4
    theory = expected_error(16, length, 0) / expected_error(16, length, -1 / 15)
    assert theory == pytest.approx(gain, rel=0.005)


@pytest.mark.parametrize('dim', [1, 2, 8, 128])
def test_hadamard_transform_is_the_normalised_matrix(dim):
    """Against SciPy's matrix. Catches another order of rows and a missing or repeated 1/√D."""
    x = np.random.default_rng(0).normal(size=(3, 2, dim)).astype(np.float32)
    expected = x.astype(np.float64) @ scipy.linalg.hadamard(dim) / math.sqrt(dim)
    y = projections.hadamard_transform(x)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    np.testing.assert_allclose(projections.hadamard_transform(y), x, atol=2e-6)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32', 'float64'])
def test_hadamard_dtypes(dtype):
    """Catches low precision within the sums, and float64 lost on the way.

    The transform is rounded once: half a unit in the last place. The projection is not rounded,
    even where its signs were cast along with a model's weights.
    """
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), dtype)
        exact = np.asarray(x, np.float64)
        y = projections.hadamard_transform(x)
        assert y.dtype == dtype
        accurate = 1e-13 if dtype == 'float64' else 2e-6
        expected = exact @ scipy.linalg.hadamard(64) / 8
        rounding = float(jnp.finfo(dtype).eps) / 2
        np.testing.assert_allclose(np.asarray(y, np.float64), expected, rounding, accurate)

        signs = projections.hadamard_signs(jax.random.key(0), 70, 64)
        z = projections.hadamard_project(x, signs.astype(dtype), 70)
        assert z.dtype == ('float64' if dtype == 'float64' else 'float32')
        expected = exact @ structured(signs)[:70].T
        np.testing.assert_allclose(z, expected, rtol=0, atol=20 * accurate)


def structured(signs):
    """√D' H S₁ H S₂ H S₃ of every block, multiplied out in float64: [blocks D', D']."""
    padded = signs.shape[-1]
    h = scipy.linalg.hadamard(padded) / math.sqrt(padded)
    blocks = [
        h @ np.diag(s1) @ h @ np.diag(s2) @ h @ np.diag(s3)
        for s1, s2, s3 in np.asarray(signs, np.float64)
    ]
    return math.sqrt(padded) * np.concatenate(blocks)


@pytest.mark.filterwarnings('ignore:dim is 24')
@pytest.mark.parametrize(('num_features', 'dim'), [*SIZES, (100, 24), (7, 24)])
def test_hadamard_is_the_product_of_its_signs(num_features, dim):
    """Dense matrix, fast projection and the factors multiplied out agree to 1e-5.

    Catches the signs in another order, the padding at the wrong end, a block's rows and columns
    exchanged, and norms that turn or mix rows.
    """
    key = jax.random.key(4)
    signs = projections.hadamard_signs(key, num_features, dim)
    padded = 2 ** math.ceil(math.log2(dim))
    assert signs.shape == (math.ceil(num_features / padded), 3, padded)
    assert signs.dtype == np.float32
    np.testing.assert_array_equal(np.abs(signs), 1)

    expected = structured(signs)[:num_features, :dim]
    w = projections.hadamard(key, num_features, dim, 'sqrt_dim')
    np.testing.assert_allclose(w, expected, atol=1e-5)
    x = np.random.default_rng(0).normal(size=(2, 3, dim)) / math.sqrt(dim)
    fast = projections.hadamard_project(x.astype(np.float32), signs, num_features)
    np.testing.assert_allclose(fast, x @ expected.T, atol=1e-5)
    np.testing.assert_allclose(fast, x @ np.asarray(w, np.float64).T, atol=1e-5)

    ratio = projections.hadamard(key, num_features, dim, 'gaussian') / np.where(w == 0, 1, w)
    norms = np.max(ratio, axis=1)
    assert np.all(norms > 0)
    np.testing.assert_allclose(ratio, np.where(w == 0, 0, norms[:, None]), rtol=1e-5)


def test_hadamard_project_never_forms_the_matrix():
    """Catches a dense product: no contraction, and no intermediate as large as W."""
    signs = projections.hadamard_signs(jax.random.key(0), 512, 64)
    program = projections.hadamard_project.lower(jnp.ones(64), signs, 512).as_text()
    assert 'dot_general' not in program
    shapes = re.findall(r'tensor<((?:\d+x)+)f32>', program)
    assert max(math.prod(map(int, shape[:-1].split('x'))) for shape in shapes) == signs.size


def test_hadamard_rows_have_covariance_one():
    """Over all 2¹² signs of D = 4, exactly. Catches signs that do not reach one of the factors."""
    signs = np.array(list(itertools.product([-1, 1], repeat=12)), np.float32).reshape(-1, 3, 4)
    rows = projections.hadamard_project(jnp.eye(4), signs, 4 * len(signs)).T.reshape(-1, 4, 4)
    np.testing.assert_allclose(jnp.mean(rows, axis=0), 0, atol=1e-5)
    second = jnp.einsum('nrd,nre->rde', rows, rows) / len(rows)
    np.testing.assert_allclose(second, np.broadcast_to(np.eye(4), (4, 4, 4)), atol=1e-5)


@pytest.mark.parametrize(
    ('v', 'bias'),
    [
        ((1, 0, 0, 0, 0, 0, 0, 0), -0.004),
        ((1, 1, 1, 1, 1, 1, 1, 1), 0.001),
        ((2, 0, 0, 0, 0, 0, 0, 0), -0.034),
        ((2, 2, 2, 2, 2, 2, 2, 2), 0.041),
    ],
)
def test_hadamard_bias_of_the_softmax_estimator_is_the_documented(v, bias):
    """E exp(w·v) over all signs of D = 8, by the norm's quadrature. Catches a better or worse W.

    All rows have the distribution of the first; the mean over S₃, which sets the signs of its
    entries, is a product of hyperbolic cosines.
    """
    length = max(v)
    v = length * np.array(v) / np.linalg.norm(v)
    free = np.array(list(itertools.product([-1, 1], repeat=16)), np.float32).reshape(-1, 2, 8)
    signs = np.concatenate([free, np.ones_like(free[:, :1])], axis=1)
    rows = projections.hadamard_project(jnp.eye(8), signs, 8 * len(signs)).T[::8]
    directions, counts = np.unique(
        np.round(np.abs(np.asarray(rows, np.float64)), 5), axis=0, return_counts=True
    )
    directions /= math.sqrt(8)
    node, weight = np.polynomial.legendre.leggauss(100)
    largest = math.sqrt(8) + length + 8
    norm = (node + 1) / 2 * largest
    density = stats.chi(8).pdf(norm) * weight / 2 * largest
    means = np.prod(np.cosh(norm[:, None, None] * directions * v), axis=-1) @ counts / len(free)
    assert density @ means / math.exp(length**2 / 2) - 1 == pytest.approx(bias, abs=6e-4)


def test_hadamard_estimates_the_softmax_kernel():
    """Bias within 0.1% and 4 standard errors at D = 16, |v| = 1, and less error than `gaussian`.

    A false alarm once in 10,000 seeds. Catches rows that are right each alone but wrong together.
    """
    deviation = softmax_estimates(projections.hadamard, 1.0) - 1
    assert abs(np.mean(deviation)) < 0.001 + 4 * stats.sem(deviation)
    gaussian = (softmax_estimates(projections.gaussian, 1.0) - 1) ** 2
    assert stats.ttest_ind(gaussian, deviation**2, alternative='greater').pvalue < 1e-4


def test_hadamard_warns_of_a_size_that_is_no_power_of_two():
    """Catches a warning that only the first, compiling call gives, or that a good size gives."""
    draws = (
        lambda dim: projections.hadamard(jax.random.key(0), 5, dim),
        lambda dim: projections.hadamard_signs(jax.random.key(0), 5, dim),
        lambda dim: projections.draw(0, 0, 0, 5, dim, 'hadamard'),
    )
    for draw in draws:
        for _ in range(2):
            with pytest.warns(UserWarning, match='dim is 24.*to 32.*24 columns') as caught:
                draw(24)
            assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            draw(16)
            draw(1)


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


@pytest.mark.filterwarnings('ignore:dim is 24')
@pytest.mark.parametrize('row_norms', projections.ROW_NORMS)
@pytest.mark.parametrize('name', ['orthogonal', 'gaussian', 'simplex', 'hadamard'])
def test_draw_calls_the_function_of_the_name(name, row_norms):
    """Catches a name that draws another projection, and arguments that are lost on the way."""
    key = jax.random.key(3, impl='threefry2x32')
    key = jax.random.fold_in(jax.random.fold_in(key, 1), 4)
    norms = () if name == 'gaussian' else (row_norms,)
    w = projections.draw(3, 1, 4, 30, 24, name, row_norms)
    np.testing.assert_array_equal(w, getattr(projections, name)(key, 30, 24, *norms))


def test_orthogonal_keeps_its_draws():
    """Catches a change of the keys' use, after which published runs could not be repeated."""
    expected = [[0.213625, -0.987510], [-1.416148, -0.306351], [1.931429, 0.807504]]
    w = projections.draw(1, 2, 3, 3, 2, 'orthogonal')
    np.testing.assert_allclose(w, expected, atol=1e-5)


@pytest.mark.filterwarnings('ignore:dim is 24')
@pytest.mark.parametrize('projection', ['orthogonal', 'gaussian', 'simplex', 'hadamard'])
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
    with pytest.raises(BadInput, match="'ortho'.*'orthogonal', 'gaussian', 'simplex', 'had"):
        projections.draw(0, 0, 0, 4, 4, 'ortho')
    for projection in projections.PROJECTIONS:
        with pytest.raises(BadInput, match="'unit'.*'gaussian', 'sqrt_dim'"):
            projections.draw(0, 0, 0, 4, 4, projection, 'unit')
    with pytest.raises(BadInput, match='0 features in 4 dimensions.*num_features'):
        projections.draw(0, 0, 0, 0, 4, 'orthogonal')
    for draw in BLOCKS:
        with pytest.raises(BadInput, match='3 features in 0 dimensions'):
            draw(jax.random.key(0), 3, 0)
        with pytest.raises(BadInput, match="'unit'.*'gaussian', 'sqrt_dim'"):
            draw(jax.random.key(0), 3, 4, 'unit')
    with pytest.raises(BadInput, match='0 features in 4 dimensions'):
        projections.hadamard_signs(jax.random.key(0), 0, 4)


def test_bad_input_of_the_fast_projection():
    """Catches shapes that broadcast to something, and integers that are cut to integers."""
    signs = projections.hadamard_signs(jax.random.key(0), 5, 4)
    for shape in ((2, 6), (2, 0)):
        with pytest.raises(BadInput, match=f'{shape[-1]} entries.*power of two'):
            projections.hadamard_transform(jnp.ones(shape))
    for x in (jnp.ones(4, int), jnp.ones(4, complex), jnp.float32(1)):
        with pytest.raises(BadInput, match=rf'{x.dtype} of shape .*hadamard_transform'):
            projections.hadamard_transform(x)
        with pytest.raises(BadInput, match=rf'{x.dtype} of shape .*hadamard_project'):
            projections.hadamard_project(x, signs, 5)
    for dim, num_features in ((8, 5), (2, 5), (4, 4), (4, 9)):
        with pytest.raises(BadInput, match=r'\(2, 3, 4\).*hadamard_signs'):
            projections.hadamard_project(jnp.ones(dim), signs, num_features)
    with pytest.raises(BadInput, match='0 features in 4 dimensions'):
        projections.hadamard_project(jnp.ones(4), signs, 0)


@pytest.mark.parametrize('projection', ['gaussian', 'orthogonal', 'simplex', 'hadamard'])
def test_64_bit_mode_draws_the_same(projection):
    """Catches a model whose matrix is another one where somebody else enables 64 bits."""
    drawn = projections.draw(3, 1, 2, 24, 8, projection)
    with jax.enable_x64(True):
        again = projections.draw(3, 1, 2, 24, 8, projection)
    assert drawn.dtype == again.dtype == jnp.float32
    np.testing.assert_array_equal(drawn, again)


@pytest.mark.parametrize('seed', [-1, 2**32])
def test_seeds_that_jax_would_take_for_others(seed):
    with pytest.raises(BadInput, match=f'seed is {seed}; allowed are'):
        projections.draw(seed, 0, 0, 4, 4, 'gaussian')
    projections.draw(2**32 - 1, 0, 0, 4, 4, 'gaussian')
