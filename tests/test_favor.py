"""FAVOR+ as a function, as a module and as Flax's attention_fn, for every kernel."""

import functools
import inspect
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

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
TEMPERATURE = 0.7  # The default is 2.


def square(u):
    return u * u


KERNELS = (*favor.KERNELS, square)
PAIRED = ('softmax_hyperbolic', 'softmax_trigonometric')
SIGNED = reference.SIGNED
POSITIVE = tuple(kernel for kernel in KERNELS if kernel not in SIGNED)
# One kernel of each path that a mask may take.
PATHS = ('exact', 'softmax', 'relu')
# One of each way through favor.py; the others differ in the feature map alone.
FAMILIES = (*PATHS, 'softmax_optimal', 'softmax_trigonometric', 'identity', 'ftheta')
INIT_THETA = jax.jit(feature_maps.init_theta, static_argnums=(1, 2, 3), static_argnames='mixture')


def weights(kernel, dtype=jnp.float32, with_projection=True):
    """The keyword arguments that a kernel needs, with fθ's weights away from their zeros."""
    if kernel in ('ftheta', 'ftheta_mixture'):
        mixture = kernel == 'ftheta_mixture'
        theta = INIT_THETA(jax.random.key(5), D, 8, R, mixture=mixture)
        theta = jax.tree.map(lambda leaf: (np.asarray(leaf) + 0.2).astype(dtype), theta)
        return {'kernel': kernel, 'theta': theta}
    # 'identity' without a projection: the products of `tame` inputs are then positive.
    if kernel in ('exact', 'identity') or not with_projection:
        return {'kernel': kernel}
    rows = R // 2 if kernel in PAIRED else R
    matrix = np.asarray(projections.orthogonal(jax.random.key(6), rows, D)).astype(dtype)
    return {'kernel': kernel, 'projection': matrix}


def inputs(batch=(2, 3), num_queries=N, num_keys=M, scale=1.0, heads=(H, H)):
    rng = np.random.default_rng(0)
    query = scale * rng.normal(size=(*batch, num_queries, heads[0], D))
    key = scale * rng.normal(size=(*batch, num_keys, heads[1], D))
    value = rng.normal(size=(*batch, num_keys, heads[1], D + 1))
    return tuple(x.astype(np.float32) for x in (query, key, value))


def tame(kernel, arrays):
    """The arrays, changed for a signed kernel so that its normaliser is far from 0.

    Products of 'identity' are positive for positive entries, and those of 'softmax_trigonometric',
    cosines, for vectors near each other. `reference` fails on inputs where this is not enough.
    """
    query, key, value = arrays
    if kernel == 'identity':
        query, key = np.abs(query), np.abs(key)
    elif kernel == 'softmax_trigonometric':
        query, key = (np.float32(0.3) * x for x in (query, key))
    return query, key, value


def draw_mask(shape):
    return np.random.default_rng(1).random(shape) < 0.6


# Three packed sequences; the third has the id of the first, and is another none the less.
LENGTHS = (3, 1, 3)
SEGMENT_IDS = np.repeat([4, 9, 4], LENGTHS)


def draw_pattern(num_queries, is_causal, segmented):
    """[num_queries, M] bool: what `is_causal` and `SEGMENT_IDS` let through."""
    pattern = np.ones((num_queries, M), bool)
    if is_causal:
        pattern = np.tri(num_queries, M, M - num_queries, dtype=bool)
    if segmented:
        sequence = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
        pattern = pattern & (sequence[:, None] == sequence)
    return pattern


def compiled(function, kernel, with_projection=True, **options):
    """function(query, key, value, mask) with a kernel's weights, compiled."""
    given = weights(kernel, with_projection=with_projection)
    return jax.jit(lambda *x, mask=None: function(*x, mask=mask, **given, **options))


def expect(kernel, arrays, mask=None, with_projection=True, **options):
    """The reference's output with a kernel's weights."""
    given = weights(kernel, with_projection=with_projection)
    return reference.attention(given.pop('kernel'), *arrays, mask, **given, **options)


@pytest.mark.parametrize(
    ('kernel', 'mask'),
    [
        (kernel, mask)
        for kernel in KERNELS
        for mask in (MASKS if kernel in PATHS else ('none', 'padding', 'full'))
    ],
)
def test_against_the_quadratic_reference(kernel, mask):
    """Two batch axes, N ≠ M; catches a wrong kernel, normaliser, or mask in any path."""
    arrays = tame(kernel, inputs())
    shape = MASKS[mask]
    mask = None if shape is None else draw_mask(shape)
    output = compiled(favor.favor_attention, kernel)(*arrays, mask=mask)
    assert output.shape == (2, 3, N, H, D + 1)
    np.testing.assert_allclose(output, expect(kernel, arrays, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('shape', [(6, 1), (1, 6)])
@pytest.mark.parametrize('kernel', PATHS)
def test_one_query_or_one_key(kernel, shape):
    """Without a projection where the kernel allows; catches axes of length 1 taken for missing."""
    arrays = inputs((2,), *shape)
    with_projection = kernel == 'softmax'
    output = compiled(favor.favor_attention, kernel, with_projection)(*arrays)
    expected = expect(kernel, arrays, with_projection=with_projection)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('kernel', 'is_causal', 'segmented', 'mask'),
    [
        (kernel, *way)
        for kernel in PATHS
        for way in (
            (False, False, None),
            (False, False, 'full'),
            (True, False, None),
            (True, False, 'padding'),
            (False, True, 'padding'),
            (True, True, None),
            (True, True, 'full'),
        )
    ]
    + [(kernel, False, True, 'padding') for kernel in FAMILIES if kernel not in PATHS]
    + [('softmax_trigonometric', True, False, 'padding'), ('identity', True, False, 'padding')],
)
def test_patterns_with_shared_heads(kernel, is_causal, segmented, mask):
    """Four query heads on two key heads, in blocks of 3 tokens; M > N but for segments, N = M.

    Catches a query head that reads another key head than h // (H / G), a causal pattern aligned at
    the start or one token off, segments that see each other, padding that a pattern brings back,
    and any of them lost beside another.
    """
    num_queries = M if segmented else N
    arrays = tame(kernel, inputs((2,), num_queries, heads=(4, 2)))
    shape = {None: None, 'padding': (2, 1, 1, M), 'full': (2, 4, num_queries, M)}[mask]
    mask = None if shape is None else draw_mask(shape)
    segment_ids = SEGMENT_IDS if segmented else None
    attend = compiled(
        favor.favor_attention, kernel, is_causal=is_causal, segment_ids=segment_ids, block_size=3
    )
    expected = expect(kernel, arrays, mask, pattern=draw_pattern(num_queries, is_causal, segmented))
    np.testing.assert_allclose(attend(*arrays, mask=mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('way', ['bidirectional', 'causal', 'segments'])
@pytest.mark.parametrize('kernel', FAMILIES)
def test_matrix_of_patterns_with_shared_heads(kernel, way):
    """Catches a matrix for looking at that is not the one attention uses."""
    if way == 'causal' and kernel == 'softmax_optimal':
        way = 'bidirectional'
    is_causal, segmented = way == 'causal', way == 'segments'
    num_queries = M if segmented else N
    query, key, _ = tame(kernel, inputs((2,), num_queries, heads=(4, 2)))
    mask = draw_mask((2, 1, 1, M))
    given = weights(kernel)
    matrix = favor.attention_matrix(
        query,
        key,
        mask=mask,
        is_causal=is_causal,
        segment_ids=SEGMENT_IDS if segmented else None,
        temperature=TEMPERATURE,
        **given,
    )
    expected = reference.attention_matrix(
        given.pop('kernel'),
        query,
        key,
        mask,
        **given,
        temperature=TEMPERATURE,
        pattern=draw_pattern(num_queries, is_causal, segmented),
    )
    np.testing.assert_allclose(matrix, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ('kernel', 'way'),
    [(kernel, 'padding') for kernel in KERNELS]
    + [(kernel, way) for kernel in PATHS for way in ('full', 'causal', 'segments')],
)
def test_value_and_gradient_in_float64(kernel, way):
    """Slopes of the reference along a random direction, of inputs and weights; τ is not √D.

    Catches a temperature that is ignored, and a stop_gradient where the result depends on it. The A
    of 'softmax_optimal' is held fixed: the expectation of its features' products has none in it.
    """
    is_causal, segmented = way == 'causal', way == 'segments'
    num_queries = M if segmented else N
    arrays = tame(kernel, inputs((1,), num_queries))
    given = weights(kernel, np.float64)
    given.pop('kernel')
    mask = {'padding': draw_mask((1, 1, 1, M)), 'full': draw_mask((1, H, N, M))}.get(way)
    rng = np.random.default_rng(3)
    point = jax.tree.map(np.float64, (arrays, given))
    direction = jax.tree.map(lambda leaf: rng.normal(size=np.shape(leaf)), point)
    cotangent = rng.normal(size=(1, num_queries, H, D + 1))

    with jax.enable_x64(True):

        def loss(point):
            output = favor.favor_attention(
                *point[0],
                kernel=kernel,
                mask=mask,
                is_causal=is_causal,
                segment_ids=SEGMENT_IDS if segmented else None,
                temperature=TEMPERATURE,
                **point[1],
            )
            return jnp.sum(output * cotangent)

        value, gradient = jax.jit(jax.value_and_grad(loss))(point)

    a = None
    if kernel == 'softmax_optimal':
        a = reference.optimal_a(*point[0][:2], mask, TEMPERATURE)

    def expected(step):
        arrays, given = jax.tree.map(lambda leaf, d: leaf + step * d, point, direction)
        output = reference.attention(
            kernel,
            *arrays,
            mask,
            **given,
            temperature=TEMPERATURE,
            pattern=draw_pattern(num_queries, is_causal, segmented),
            a=a,
        )
        return np.sum(output * cotangent)

    slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
    assert value == pytest.approx(expected(0), rel=1e-9)
    assert slope == pytest.approx((expected(1e-6) - expected(-1e-6)) / 2e-6, rel=1e-6)


@pytest.mark.parametrize('kernel', FAMILIES)
def test_temperature_scales_queries_and_keys(kernel):
    """q·k/τ is (cq)·(ck)/√D with c² = √D/τ; catches a τ that only one of them, or ‖x'‖², gets."""
    query, key, value = tame(kernel, inputs((2,)))
    given = weights(kernel)
    c = np.float32((D**0.5 / TEMPERATURE) ** 0.5)
    np.testing.assert_allclose(
        favor.favor_attention(query, key, value, temperature=TEMPERATURE, **given),
        favor.favor_attention(c * query, c * key, value, **given),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize('kernel', PATHS)
def test_block_size_changes_nothing(kernel):
    """Blocks of 3 in 7 keys and 5 queries; catches a last block that counts its filling."""
    arrays = inputs((2,))
    given = weights(kernel)
    given.pop('kernel')

    def loss_and_gradient(block_size):
        def loss(arrays, given):
            output = favor.favor_attention(*arrays, kernel=kernel, block_size=block_size, **given)
            return jnp.sum(output**2)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(arrays, given)

    for one, other in zip(
        jax.tree.leaves(loss_and_gradient(3)), jax.tree.leaves(loss_and_gradient(None)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# Numbers that floating point holds badly.

ELEMENTS = st.one_of(
    st.floats(-5, 5, width=32),
    st.floats(-1e3, 1e3, width=32),
    st.sampled_from([-1e3, 1e3, 0.0]),
)
EXTREMES = (
    hnp.arrays(np.float32, (1, 3, 1, D), elements=ELEMENTS),
    hnp.arrays(np.float32, (1, 4, 1, D), elements=ELEMENTS),
)


@pytest.mark.parametrize(
    ('kernel', 'way'),
    [(kernel, 'padding') for kernel in POSITIVE]
    + [(kernel, way) for kernel in PATHS for way in ('full', 'causal')],
)
def test_outputs_stay_among_the_values(kernel, way):
    """Inputs to 1e3 and any mask: an average lies between the least and the largest value averaged.

    Catches a negative or overflowing feature, 0/0, and a mask that leaks: masked values are far
    outside the range of the others. Rows that see nothing are zeros. Signed kernels are left out:
    with weights of both signs a quotient is no average.
    """
    attend = compiled(favor.favor_attention, kernel, is_causal=way == 'causal')

    @settings(max_examples=25, deadline=None)
    @given(*EXTREMES, hnp.arrays(bool, (1, 1, 3 if way == 'full' else 1, 4)))
    def check(query, key, mask):
        value = np.arange(4.0, dtype=np.float32).reshape(1, 4, 1, 1) ** 3 - 5
        output = np.asarray(attend(query, key, value, mask=mask))[0, :, 0, 0]
        mask = np.broadcast_to(mask[0, 0], (3, 4)) & np.tri(3, 4, 1 if way == 'causal' else 3, dtype=bool)
        for row, seen in zip(output, mask, strict=True):
            allowed = value[0, seen, 0, 0] if seen.any() else np.zeros(1)
            assert allowed.min() - 1e-3 <= row <= allowed.max() + 1e-3

    check()


@pytest.mark.parametrize('way', ['padding', 'full', 'causal'])
@pytest.mark.parametrize('kernel', SIGNED)
def test_signed_kernels_stay_finite(kernel, way):
    """Whatever the signs of a normaliser's terms, to 1e3; catches a quotient by their rounding."""
    attend = compiled(favor.favor_attention, kernel, is_causal=way == 'causal')

    @jax.jit
    def output_and_gradient(*arrays, mask):
        def loss(*arrays):
            output = attend(*arrays, mask=mask)
            return jnp.sum(output**2), output

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    @settings(max_examples=25, deadline=None)
    @given(*EXTREMES, hnp.arrays(bool, (1, 1, 3 if way == 'full' else 1, 4)))
    def check(query, key, mask):
        value = np.arange(4.0, dtype=np.float32).reshape(1, 4, 1, 1)
        for x in jax.tree.leaves(output_and_gradient(query, key, value, mask=mask)):
            assert np.all(np.isfinite(x))

    check()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('kernel', KERNELS)
def test_extreme_inputs_stay_finite(kernel, dtype):
    """Entries to 1e3, forward and backward, under padding, a causal pattern and an N×M mask.

    Some rows see nothing. Catches inf · 0 behind an exponential or a `where`.
    """
    query, key, value = inputs((2,), scale=400.0)
    query[0, 0], key[0, 0], key[0, 1] = 1e3, -1e3, 0
    arrays = tuple(x.astype(dtype) for x in (query, key, value))
    given = weights(kernel)
    given.pop('kernel')
    padding, full = (np.ones((2, 1, n, M), bool) for n in (1, N))
    for mask in (padding, full):
        mask[0] = mask[1, ..., 2:] = False

    for options in ({'mask': padding}, {'mask': padding, 'is_causal': True}, {'mask': full}):
        if kernel == 'softmax_optimal' and 'is_causal' in options:
            continue

        def loss(arrays, given, options=options):
            output = favor.favor_attention(*arrays, kernel=kernel, **options, **given)
            return jnp.sum(output.astype(jnp.float32) ** 2)

        for x in jax.tree.leaves(jax.value_and_grad(loss, argnums=(0, 1))(arrays, given)):
            assert np.all(np.isfinite(x)), options


@pytest.mark.parametrize(
    ('kernel', 'is_causal'),
    [(kernel, False) for kernel in FAMILIES] + [(kernel, True) for kernel in PATHS],
)
def test_padding_may_hold_anything(kernel, is_causal):
    """Catches NaN in masked keys and values that reaches the output or a gradient, fθ's too."""
    query, key, value = tame(kernel, inputs((2,)))
    mask = np.arange(M) < 4
    dirty = tuple(np.where(mask[:, None, None], x, np.float32('nan')) for x in (key, value))
    given = weights(kernel)
    given.pop('kernel')

    def loss_and_gradient(key, value):
        def loss(arrays, given):
            output = favor.favor_attention(
                *arrays, mask=mask, is_causal=is_causal, kernel=kernel, **given
            )
            return jnp.sum(output**2)

        return jax.value_and_grad(loss, argnums=(0, 1))((query, key, value), given)

    for one, other in zip(
        jax.tree.leaves(loss_and_gradient(*dirty)),
        jax.tree.leaves(loss_and_gradient(key, value)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ('kernel', 'scale', 'spread'),
    [
        ('softmax', 30, 1 / 30),
        ('softmax', 300, 1 / 300),
        ('softmax_hyperbolic', 300, 1 / 300),
        ('softmax_optimal', 30, 1 / 900),
    ],
)
def test_stabiliser_cancels(kernel, scale, spread):
    """|q| = |k| = 300: features are about e^-22,500, and still the quotient is that of their logs.

    Keys lie so close together that several of them count. Float32 rounds logarithms to 2⁻²⁴ of
    their size, in a handful of steps. Catches a stabiliser that changes the quotient, or an ε.
    """
    query, key, value = inputs((2,))
    query, key = (
        (scale * x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
        for x in (query, key[:, :1] + spread * key)
    )
    given = weights(kernel)
    output = favor.favor_attention(query, key, value, **given)
    matrix = reference.attention_matrix(given.pop('kernel'), query, key, **given)
    assert np.median(np.max(matrix, axis=-1)) < 0.9
    expected = np.einsum('bhnm,bmhd->bnhd', matrix, value)
    largest = scale**2 / D**0.5
    np.testing.assert_allclose(output, expected, rtol=0, atol=8 * 2**-24 * largest * np.ptp(value))


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


@pytest.mark.parametrize('kernel', KERNELS)
def test_bfloat16_rounds_nothing_but_the_weights_and_the_output(kernel):
    """Catches features or sums in bfloat16: 512 of them would add up to several roundings.

    The reference gets the weights as rounded, and A too. All values are positive, so the rounding
    of the output, 2⁻⁸ of it, is all that is left; 'exact' also rounds its probabilities by 2⁻⁸
    each, and fθ its hidden layer, whose features have a few times its error.
    """
    query, key, value = tame(kernel, inputs((1,), num_keys=512))
    arrays = tuple(x.astype(jnp.bfloat16) for x in (query, key, np.abs(value) + 1))
    output = compiled(favor.favor_attention, kernel)(*arrays)
    assert output.dtype == jnp.bfloat16
    rounded = tuple(np.asarray(x, np.float64) for x in arrays)
    given = weights(kernel, jnp.bfloat16)
    if kernel == 'softmax_optimal':
        given['a'] = np.asarray(reference.optimal_a(*rounded[:2]).astype(jnp.bfloat16), np.float64)
    expected = reference.attention(given.pop('kernel'), *rounded, **given)
    roundings = {'exact': 2, 'ftheta': 4, 'ftheta_mixture': 4}.get(kernel, 1)
    np.testing.assert_allclose(
        np.asarray(output, np.float64), expected, rtol=roundings * 2**-8 + 1e-4
    )


@pytest.mark.parametrize('kernel', ['softmax', 'relu'])
def test_bfloat16_is_within_its_roundings_of_float32(kernel):
    """The same inputs in both, W rounded in one; catches more error than the docstring owns up to.

    Rounding W by 2⁻⁸ changes w·x' by at most e = 2⁻⁸ Σ|w_d x'_d|, a feature exp(u) by (exp(e) - 1)
    of it and ReLU by e. Hence bounds δ of the products A, and Σ_m A_nm (v_m - out_n) = 0 gives
    |Σ_m δ_nm (v_m - out_n)| / (Σ_m A_nm - δ_nm) for the output, which is itself rounded by 2⁻⁸.
    """
    arrays = tuple(x.astype(jnp.bfloat16) for x in inputs((1,)))
    query, key, value = (np.asarray(x, np.float32) for x in arrays)
    given = weights(kernel)
    output = np.asarray(favor.favor_attention(*arrays, **given), np.float64)
    expected = np.asarray(favor.favor_attention(query, key, value, **given), np.float64)

    features, errors = [], []
    for x in (query, key):
        features.append(np.exp(reference.log_features(kernel, x, given['projection'])))
        error = 2**-8 * np.abs(reference.scaled(x, None)) @ np.abs(given['projection']).T
        errors.append(features[-1] * np.expm1(error) if kernel == 'softmax' else error)
    products, upper = (
        np.einsum('bnhr,bmhr->bhnm', *x)
        for x in (features, [f + e for f, e in zip(features, errors, strict=True)])
    )
    change = upper - products
    distance = np.abs(value[:, None] - expected[:, :, None])  # [B, N, M, H, D]
    bound = np.einsum('bhnm,bnmhd->bnhd', change, distance)
    bound = bound / np.moveaxis(np.sum(products - change, axis=-1), 1, -1)[..., None]
    assert np.all(np.abs(output - expected) <= 1.001 * bound + 2**-8 * np.abs(expected) + 1e-5)
    # It is a bound that something can exceed.
    assert np.median(bound) < 0.1


# Generation, devices and transformations.


@pytest.mark.parametrize(
    'kernel', ['softmax', 'softmax_hyperbolic', 'softmax_trigonometric', 'relu', 'ftheta']
)
def test_decoding_is_causal_attention(kernel):
    """Token by token and in pieces, with padding and shared heads.

    Catches a state that forgets its stabiliser, grows, counts padding, or gets τ in one place.
    """
    arrays = tame(kernel, inputs((2,), M, heads=(4, 2)))
    mask = draw_mask((2, 1, 1, M))
    given = weights(kernel)
    causal = draw_pattern(M, True, False)
    expected = expect(kernel, arrays, mask, pattern=causal, temperature=TEMPERATURE)

    @jax.jit
    def extend(state, arrays, mask):
        return favor.extend(state, *arrays, mask=mask, temperature=TEMPERATURE, **given)

    key, value = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[1:])
    empty = favor.init_state(key, value, temperature=TEMPERATURE, **given)
    for lengths in ((1,) * M, (4, 1, 1, 1)):
        state, outputs, start = empty, [], 0
        for length in lengths:
            piece = slice(start, start + length)
            output, state = extend(state, [x[:, piece] for x in arrays], mask[..., piece])
            outputs.append(output)
            start += length
        np.testing.assert_allclose(np.concatenate(outputs, 1), expected, rtol=1e-4, atol=1e-5)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, empty)


@pytest.mark.parametrize('kernel', ['exact', 'softmax_optimal'])
def test_decoding_is_refused_without_a_state_of_fixed_size(kernel):
    """Catches an A from the keys so far alone, under which later tokens would change the past."""
    given = weights(kernel)
    _, key, value = inputs((2,))
    with pytest.raises(BadInput, match=f"kernel is '{kernel}', which needs all keys"):
        favor.init_state(key, value, **given)
    with pytest.raises(BadInput, match=f"kernel is '{kernel}', which needs all keys"):
        favor.extend(None, key, key, value, **given)


def sharded(attend):
    """attend(query, key, value, mask) with tokens split over four devices, by `shard_map`."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ('tokens',))
    specs = (*[jax.P(None, 'tokens')] * 3, jax.P(None, None, None, 'tokens'))
    return jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=specs[0]))


def mapped(attend):
    """The same by `pmap`."""
    split = jax.pmap(attend, 'tokens', in_axes=(1, 1, 1, 3), out_axes=1)

    def run(*arrays):
        pieces = [x.reshape(x.shape[0], 4, -1, *x.shape[2:]) for x in arrays[:3]]
        output = split(*pieces, arrays[3].reshape(*arrays[3].shape[:3], 4, -1))
        return output.reshape(output.shape[0], -1, *output.shape[3:])

    return run


@pytest.mark.parametrize('split', [sharded, mapped])
@pytest.mark.parametrize(
    ('kernel', 'is_causal'),
    [
        ('softmax', False),
        ('softmax', True),
        ('relu', False),
        ('relu', True),
        ('softmax_optimal', False),
    ],
)
def test_tokens_split_over_devices(kernel, is_causal, split):
    """Value and gradient are those of one device; the second device's keys are all padding.

    The mean over all pairs of tokens, which A of 'softmax_optimal' needs, is that of the devices'
    means where all have the same queries, keys and padding, as here. Catches a sum that is left
    out or done twice in either direction, and a causal state that has its own device's keys in it.
    """
    query, key, value = inputs((1,), 8, 8)
    mask = np.ones((1, 1, 1, 8), bool)
    mask[..., 2:5] = False
    if kernel == 'softmax_optimal':
        query, key = (np.tile(x[:, :2], (1, 4, 1, 1)) for x in (query, key))
        mask = np.tile([True, False], 4).reshape(mask.shape)
    given = weights(kernel)
    cotangent = np.random.default_rng(4).normal(size=value.shape).astype(np.float32)

    def outputs(attend):
        def loss(*arrays):
            output = attend(*arrays, mask)
            return jnp.sum(output * cotangent), output

        gradient, output = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)
        return output, *gradient

    def attend(query, key, value, mask, axis_name=None):
        return favor.favor_attention(
            query, key, value, mask=mask, is_causal=is_causal, axis_name=axis_name, **given
        )

    expected = outputs(attend)
    actual = outputs(split(functools.partial(attend, axis_name='tokens')))
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
