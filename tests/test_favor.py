"""FAVOR+ as a function, as a module and as Flax's attention_fn, for every kernel."""

import dataclasses
import functools
import inspect
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
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
LEARNT = ('ftheta', 'ftheta_mixture')
SIGNED = reference.SIGNED
POSITIVE = tuple(kernel for kernel in KERNELS if kernel not in SIGNED)
# One kernel of each path that a mask may take.
PATHS = ('exact', 'softmax', 'relu')
# One of each way through favor.py; the others differ in the feature map alone.
FAMILIES = (*PATHS, 'softmax_optimal', 'softmax_trigonometric', 'identity', 'ftheta', 'cosine')
INIT_THETA = jax.jit(feature_maps.init_theta, static_argnums=(1, 2, 3), static_argnames='mixture')


def weights(kernel, dtype=jnp.float32, with_projection=True, sharing='all'):
    """The keyword arguments that a kernel needs, with fθ's weights away from their zeros.

    Heads and sides that do not share a map have others, for two key heads.
    """
    if kernel in ('ftheta', 'ftheta_mixture'):

        def theta(seed):
            theta = INIT_THETA(jax.random.key(seed), D, 8, R, mixture=kernel == 'ftheta_mixture')
            return jax.tree.map(lambda leaf: (np.asarray(leaf) + 0.2).astype(dtype), theta)

        def side(seed):
            if sharing in ('all', 'heads'):
                return theta(seed)
            return jax.tree.map(lambda *leaves: np.stack(leaves), theta(seed), theta(seed + 1))

        if sharing in ('all', 'sides'):
            return {'kernel': kernel, 'theta': side(5)}
        return {'kernel': kernel, 'theta': {'query': side(5), 'key': side(7)}}
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


def compiled(function, kernel, with_projection=True, sharing='all', **options):
    """function(query, key, value, mask) with a kernel's weights, compiled."""
    given = weights(kernel, with_projection=with_projection, sharing=sharing)
    return jax.jit(lambda *x, mask=None: function(*x, mask=mask, **given, **options))


def expect(kernel, arrays, mask=None, with_projection=True, sharing='all', **options):
    """The reference's output with a kernel's weights."""
    given = weights(kernel, with_projection=with_projection, sharing=sharing)
    return reference.attention(given.pop('kernel'), *arrays, mask, **given, **options)


@pytest.mark.parametrize(
    ('kernel', 'mask'),
    [
        (kernel, mask)
        for kernel in KERNELS
        for mask in (MASKS if kernel in PATHS else ('padding', 'full'))
        if mask != 'full' or kernel in FAMILIES
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


@settings(max_examples=30, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(
    kernel=st.sampled_from(KERNELS),
    num_queries=st.integers(1, 9),
    prefix=st.integers(0, 4),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    masked=st.booleans(),
    is_causal=st.booleans(),
    block_size=st.sampled_from([None, 2]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_every_kernel_in_any_shape(
    kernel, num_queries, prefix, heads, masked, is_causal, block_size, dtype
):
    """Catches what only goes wrong for one kernel in one shape, pattern or dtype.

    The reference has the inputs and the weights as rounded to `dtype`, and so its rounding of what
    lies between: bfloat16 keeps 8 bits, and features are sums of D products.
    """
    if dtype == jnp.bfloat16 and kernel in (*SIGNED, *LEARNT):
        dtype = jnp.float32  # Cancelling and the hidden layer have bounds of their own.
    is_causal = is_causal and kernel != 'softmax_optimal'
    arrays = tame(kernel, inputs((2,), num_queries, num_queries + prefix, heads=heads))
    arrays = tuple(x.astype(dtype) for x in arrays)
    mask = draw_mask((2, 1, 1, num_queries + prefix)) if masked else None
    given = weights(kernel, dtype)
    attend = functools.partial(
        favor.favor_attention, is_causal=is_causal, block_size=block_size, **given
    )
    output = jax.jit(lambda *x: attend(*x[:3], mask=x[3]))(*arrays, mask)
    assert output.dtype == dtype
    pattern = np.ones((num_queries, num_queries + prefix), bool)
    options = {'offset': prefix if is_causal else 0}
    expected = reference.attention(
        given.pop('kernel'),
        *(np.asarray(x, np.float64) for x in arrays),
        mask,
        pattern=np.tril(pattern, prefix) if is_causal else pattern,
        **given,
        **options,
    )
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-4
    np.testing.assert_allclose(
        np.asarray(output, np.float64), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize('shape', [(6, 1), (1, 6)])
@pytest.mark.parametrize('kernel', [*PATHS, 'cosine'])
def test_one_query_or_one_key(kernel, shape):
    """Without a projection where the kernel allows; catches axes of length 1 taken for missing.

    And an L of 'cosine' that is not the longer of the two.
    """
    arrays = inputs((2,), *shape)
    with_projection = kernel == 'softmax'
    output = compiled(favor.favor_attention, kernel, with_projection)(*arrays)
    expected = expect(kernel, arrays, with_projection=with_projection)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('kernel', 'is_causal', 'segmented', 'mask'),
    [
        (kernel, *way)
        for kernel in ('exact', 'softmax', 'cosine')
        for way in (
            (False, False, None),
            (False, False, 'full'),
            (True, False, None),
            (True, True, None),
            (True, True, 'full'),
        )
    ]
    + [(kernel, True, False, 'padding') for kernel in (*PATHS, *SIGNED, 'cosine')]
    + [
        (kernel, False, True, 'padding')
        for kernel in (*PATHS, *SIGNED, 'softmax_optimal', 'cosine')
    ],
)
def test_patterns_with_shared_heads(kernel, is_causal, segmented, mask):
    """Four query heads on two key heads, in blocks of 3 tokens; M > N but for segments, N = M.

    Catches a query head that reads another key head than h // (H / G), a causal pattern aligned at
    the start or one token off, segments that see each other, padding that a pattern brings back,
    any of them lost beside another, and positions of 'cosine' that do not follow the pattern.
    """
    num_queries = M if segmented else N
    arrays = tame(kernel, inputs((2,), num_queries, heads=(4, 2)))
    shape = {None: None, 'padding': (2, 1, 1, M), 'full': (2, 4, num_queries, M)}[mask]
    mask = None if shape is None else draw_mask(shape)
    segment_ids = SEGMENT_IDS if segmented else None
    attend = compiled(
        favor.favor_attention, kernel, is_causal=is_causal, segment_ids=segment_ids, block_size=3
    )
    expected = expect(
        kernel,
        arrays,
        mask,
        pattern=draw_pattern(num_queries, is_causal, segmented),
        offset=M - num_queries if is_causal else 0,
    )
    np.testing.assert_allclose(attend(*arrays, mask=mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('kernel', 'sharing', 'way'),
    [
        ('ftheta', sharing, way)
        for sharing in ('sides', 'heads', 'none')
        for way in ('padding', 'causal', 'segments', 'full')
    ]
    + [('ftheta_mixture', 'none', way) for way in ('padding', 'causal segments')],
)
def test_maps_of_their_own(kernel, sharing, way):
    """Attention and its matrix where heads, or queries and keys, have a map of their own each.

    Four query heads on two key heads, in blocks of 3 tokens. Catches the map of another head or of
    the other side, in any order of the sums.
    """
    is_causal, segmented = 'causal' in way, 'segments' in way
    num_queries = M if segmented else N
    arrays = inputs((2,), num_queries, heads=(4, 2))
    mask = {'padding': draw_mask((2, 1, 1, M)), 'full': draw_mask((2, 4, num_queries, M))}.get(way)
    options = {'is_causal': is_causal, 'segment_ids': SEGMENT_IDS if segmented else None}
    output = compiled(favor.favor_attention, kernel, sharing=sharing, block_size=3, **options)(
        *arrays, mask=mask
    )
    pattern = draw_pattern(num_queries, is_causal, segmented)
    expected = expect(kernel, arrays, mask, sharing=sharing, pattern=pattern)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    matrix = compiled(favor.attention_matrix, kernel, sharing=sharing, **options)
    given = weights(kernel, sharing=sharing)
    expected = reference.attention_matrix(
        given.pop('kernel'), *arrays[:2], mask, **given, pattern=pattern
    )
    np.testing.assert_allclose(matrix(*arrays[:2], mask=mask), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ('kernel', 'way'),
    [(kernel, 'causal') for kernel in FAMILIES if kernel != 'softmax_optimal']
    + [(kernel, 'segments') for kernel in FAMILIES],
)
def test_matrix_of_patterns_with_shared_heads(kernel, way):
    """Catches a matrix for looking at that is not the one attention uses."""
    is_causal, segmented = way == 'causal', way == 'segments'
    num_queries = M if segmented else N
    query, key, _ = tame(kernel, inputs((2,), num_queries, heads=(4, 2)))
    mask = draw_mask((2, 1, 1, M))
    given = weights(kernel)
    options = {'is_causal': is_causal, 'segment_ids': SEGMENT_IDS if segmented else None}
    matrix = compiled(favor.attention_matrix, kernel, temperature=TEMPERATURE, **options)
    expected = reference.attention_matrix(
        given.pop('kernel'),
        query,
        key,
        mask,
        **given,
        temperature=TEMPERATURE,
        pattern=draw_pattern(num_queries, is_causal, segmented),
        offset=M - num_queries if is_causal else 0,
    )
    np.testing.assert_allclose(matrix(query, key, mask=mask), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ('kernel', 'way', 'sharing'),
    [(kernel, 'padding', 'all') for kernel in KERNELS]
    + [
        (kernel, way, 'all')
        for kernel in ('exact', 'softmax')
        for way in ('full', 'causal', 'segments')
    ]
    + [('ftheta', way, 'none') for way in ('padding', 'full', 'causal', 'segments')]
    + [('ftheta_mixture', 'causal', sharing) for sharing in ('sides', 'heads', 'none')],
)
def test_value_and_gradient_in_float64(kernel, way, sharing):
    """Slopes of the reference along a random direction, of inputs and weights; τ is not √D.

    Catches a temperature that is ignored, and a stop_gradient where the result depends on it. The A
    of 'softmax_optimal' is held fixed: the expectation of its features' products has none in it.
    """
    is_causal, segmented = way == 'causal', way == 'segments'
    num_queries = M if segmented else N
    arrays = tame(kernel, inputs((1,), num_queries))
    given = weights(kernel, np.float64, sharing=sharing)
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
    query, key, value = tame(kernel, inputs((2,), M))
    given = weights(kernel)
    c = np.float32((D**0.5 / TEMPERATURE) ** 0.5)
    np.testing.assert_allclose(
        favor.favor_attention(query, key, value, temperature=TEMPERATURE, **given),
        favor.favor_attention(c * query, c * key, value, **given),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize('kernel', ['exact', 'softmax'])
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


@pytest.mark.parametrize(('dtype', 'rtol'), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-6)])
def test_cosine_of_many_tokens_in_closed_form(dtype, rtol):
    """Equal tokens leave the cosines; catches positions rounded to bfloat16, where 1,001 is 1,000.

    Two factors at 2⁻⁸ and a sum: far less than the smallest cosine, π / 2L, would change by.
    """
    num_tokens = 1001
    x = jnp.ones((1, num_tokens, 1, 2), dtype)
    matrix = favor.attention_matrix(x, x, kernel='cosine')[0, 0]
    position = np.arange(num_tokens)
    expected = np.cos(np.pi / 2 * (position[:, None] - position) / num_tokens)
    expected /= np.sum(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(matrix, expected, rtol=rtol)


@pytest.mark.parametrize('kernel', PATHS)
def test_masks_and_segments_may_be_lists(kernel):
    """Catches a list that raises a raw error, or is read as another pattern than its array."""
    arrays = inputs((2,), M)
    mask, full = draw_mask((2, 1, 1, M)), draw_mask((2, H, M, M))
    given = weights(kernel)
    for pattern in (mask, full):
        for function, x in ((favor.favor_attention, arrays), (favor.attention_matrix, arrays[:2])):
            np.testing.assert_array_equal(
                function(*x, mask=pattern.tolist(), segment_ids=SEGMENT_IDS.tolist(), **given),
                function(*x, mask=pattern, segment_ids=SEGMENT_IDS, **given),
            )
    if kernel != 'exact':
        state = favor.init_state(*arrays[1:], **given)
        for one, other in zip(
            jax.tree.leaves(favor.extend(state, *arrays, mask=mask.tolist(), **given)),
            jax.tree.leaves(favor.extend(state, *arrays, mask=mask, **given)),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)


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
        pattern = np.tri(3, 4, 1 if way == 'causal' else 4, dtype=bool)
        mask = np.broadcast_to(mask[0, 0], (3, 4)) & pattern
        for row, seen in zip(output, mask, strict=True):
            allowed = value[0, seen, 0, 0] if seen.any() else np.zeros(1)
            assert allowed.min() - 1e-3 <= row <= allowed.max() + 1e-3

    check()


@pytest.mark.parametrize('way', ['padding', 'full', 'causal'])
@pytest.mark.parametrize('kernel', SIGNED)
def test_signed_kernels_stay_finite(kernel, way):
    """Whatever the signs of a normaliser's terms, to 1e3, and whatever is masked; catches 0/0."""
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


@pytest.mark.parametrize('options', [{'is_causal': True}, {'mask': np.ones((2, 2), bool)}])
def test_normaliser_of_rounding_alone(options):
    """Two keys that are opposite but for one rounding; catches a quotient by that rounding, 1e7.

    The normaliser is lifted to 1e-6 of its terms, so a quotient is at most 1e6 values.
    """
    query = np.float32([[1e3, 0, 0, 0]] * 2).reshape(1, 2, 1, D)
    key = query * np.array([1, -1 + 2**-23], np.float32).reshape(2, 1, 1)
    value = np.array([1, -1], np.float32).reshape(1, 2, 1, 1)
    output = favor.favor_attention(query, key, value, kernel='identity', **options)
    assert 1e5 < np.abs(output[0, 1, 0, 0]) < 1.01e6


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('kernel', KERNELS)
def test_extreme_inputs_stay_finite(kernel, dtype):
    """Entries to 1e3, forward and backward, under padding, a causal pattern and an N×M mask.

    Some rows see nothing. Catches inf · 0 behind an exponential or a `where`.
    """
    query, key, value = inputs((2,), M, scale=400.0)
    query[0, 0], key[0, 0], key[0, 1] = 1e3, -1e3, 0
    arrays = tuple(x.astype(dtype) for x in (query, key, value))
    given = weights(kernel)
    given.pop('kernel')
    padding, full = (np.ones((2, 1, n, M), bool) for n in (1, M))
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
    query, key, value = tame(kernel, inputs((2,), M))
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
    query, key, value = inputs((2,), M)
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
    ('kernel', 'sharing'),
    [
        (kernel, 'all')
        for kernel in ('softmax', 'softmax_hyperbolic', 'softmax_trigonometric', 'relu', 'ftheta')
    ]
    + [('ftheta', 'heads'), ('ftheta_mixture', 'none')],
)
def test_decoding_is_causal_attention(kernel, sharing):
    """Token by token and in pieces, with padding and shared heads.

    Catches a state that forgets its stabiliser, grows, counts padding, or gets τ in one place.
    """
    arrays = tame(kernel, inputs((2,), M, heads=(4, 2)))
    mask = draw_mask((2, 1, 1, M))
    given = weights(kernel, sharing=sharing)
    causal = draw_pattern(M, True, False)
    expected = expect(
        kernel, arrays, mask, sharing=sharing, pattern=causal, temperature=TEMPERATURE
    )

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


@pytest.mark.parametrize(
    ('kernel', 'need'),
    [
        ('exact', 'all keys at once'),
        ('softmax_optimal', 'all keys at once'),
        ('cosine', 'the length of the whole sequence'),
    ],
)
def test_decoding_is_refused_where_a_token_depends_on_later_ones(kernel, need):
    """Catches an A, or an L, of the keys so far alone: later tokens would change the past."""
    given = weights(kernel)
    _, key, value = inputs((2,))
    message = f"kernel is '{kernel}', which needs {need} .* Choose one of softmax, softmax_hyper"
    with pytest.raises(BadInput, match=message):
        favor.init_state(key, value, **given)
    with pytest.raises(BadInput, match=message):
        favor.extend(None, key, key, value, **given)


def sharded(attend):
    """attend(query, key, value, mask) with tokens split over four devices, by `shard_map`."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ('tokens',))
    specs = (*[jax.P(None, 'tokens')] * 3, jax.P(None, None, None, 'tokens'))
    return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=specs[0])


def mapped(attend):
    """The same by `pmap`."""
    split = jax.pmap(attend, 'tokens', in_axes=(1, 1, 1, 3), out_axes=1)

    def run(*arrays):
        pieces = [x.reshape(x.shape[0], 4, -1, *x.shape[2:]) for x in arrays[:3]]
        output = split(*pieces, arrays[3].reshape(*arrays[3].shape[:3], 4, -1))
        return output.reshape(output.shape[0], -1, *output.shape[3:])

    return run


@pytest.mark.parametrize(
    ('split', 'kernel', 'is_causal'),
    [
        (sharded, 'softmax', False),
        (sharded, 'softmax', True),
        (sharded, 'relu', False),
        (sharded, 'relu', True),
        (sharded, 'softmax_optimal', False),
        (sharded, 'cosine', False),
        (sharded, 'cosine', True),
        (mapped, 'softmax', True),
        (mapped, 'relu', False),
        (mapped, 'softmax_optimal', False),
        (mapped, 'cosine', True),
        (sharded, 'ftheta', False),
        (sharded, 'ftheta', True),
    ],
)
def test_tokens_split_over_devices(split, kernel, is_causal):
    """Value and gradient are those of one device; the second device's keys are all padding.

    Catches a sum that is left out or done twice, in either direction, an A of each device or from
    the mean of their means, positions that begin anew on each, and a causal state that has the
    device's own keys in it.
    """
    query, key, value = inputs((1,), 8, 8)
    mask = np.ones((1, 1, 1, 8), bool)
    mask[..., 2:5] = False
    given = weights(kernel, sharing='none')
    cotangent = np.random.default_rng(4).normal(size=value.shape).astype(np.float32)

    def outputs(attend):
        def loss(*arrays):
            output = attend(*arrays, mask)
            return jnp.sum(output * cotangent), output

        gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        return jax.tree.leaves(jax.jit(gradient)(query, key, value))

    def attend(query, key, value, mask, axis_name=None):
        return favor.favor_attention(
            query, key, value, mask=mask, is_causal=is_causal, axis_name=axis_name, **given
        )

    expected = outputs(attend)
    actual = outputs(split(functools.partial(attend, axis_name='tokens')))
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kernel', ['softmax', 'relu'])
def test_jit_and_vmap(kernel):
    """Catches an axis that vmap adds taken for one of the array's, or a shape known only to jit."""
    queries, _, _ = inputs((3, 2))
    _, key, value = inputs((2,))
    attend = functools.partial(favor.favor_attention, **weights(kernel))
    expected = np.stack([expect(kernel, (query, key, value)) for query in queries])
    mapped = jax.jit(jax.vmap(attend, in_axes=(0, None, None)))
    np.testing.assert_allclose(mapped(queries, key, value), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(attend(queries[0], key, value), expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('is_causal', [False, True])
@pytest.mark.parametrize('kernel', ['softmax', 'relu'])
def test_jvp_and_checkpoint(kernel, is_causal):
    """Both directions of derivative and a rematerialised one agree; catches a rule with but one."""
    arrays = inputs((2,), M)
    tangents = inputs((2,), M, scale=0.5)
    attend = functools.partial(favor.favor_attention, is_causal=is_causal, **weights(kernel))

    def loss(*arrays):
        return jnp.sum(jnp.sin(attend(*arrays)))

    @jax.jit
    def derivatives(arrays, tangents):
        _, slope = jax.jvp(loss, arrays, tangents)
        gradient, again = (
            jax.grad(function, argnums=(0, 1, 2))(*arrays)
            for function in (loss, jax.checkpoint(loss))
        )
        return slope, gradient, again

    slope, gradient, again = derivatives(arrays, tangents)
    for one, other in zip(gradient, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    expected = sum(np.vdot(*pair) for pair in zip(gradient, tangents, strict=True))
    assert slope == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('kernel', ['softmax', 'relu'])
def test_scan_over_layers(kernel):
    """Three layers with their own W as one loop; catches W, or its gradient, fixed at tracing."""
    x = inputs((2,), M)[0]
    rng = np.random.default_rng(5)
    matrices, direction = rng.normal(size=(2, 3, R, D)).astype(np.float32)

    def layer(x, w):
        return x + favor.favor_attention(x, x, x, kernel=kernel, projection=w), None

    @jax.jit
    @jax.value_and_grad
    def value_and_gradient(matrices):
        return jnp.sum(jax.lax.scan(layer, x, matrices)[0] ** 2)

    def expected(step):
        y = np.float64(x)
        for w in matrices + step * np.float64(direction):
            y = y + reference.attention(kernel, y, y, y, projection=w)
        return np.sum(y**2)

    value, gradient = value_and_gradient(matrices)
    assert value == pytest.approx(expected(0), rel=1e-5)
    slope = (expected(1e-6) - expected(-1e-6)) / 2e-6
    assert np.vdot(gradient, direction) == pytest.approx(slope, rel=1e-3)


# The module.


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


@pytest.mark.parametrize(
    ('kernel', 'projection', 'row_norms'),
    [
        ('relu', 'orthogonal', 'gaussian'),
        ('relu', 'orthogonal', 'sqrt_dim'),
        ('relu', 'simplex', 'gaussian'),
        ('relu', 'hadamard', 'gaussian'),
        ('cosine', 'orthogonal', 'gaussian'),
        ('softmax_hyperbolic', 'gaussian', 'gaussian'),
    ],
)
def test_projections_are_a_function_of_seed_layer_and_draw(kernel, projection, row_norms):
    """Catches a draw from the params stream, layers that share one, and a redraw that differs."""
    x = inputs((2,), M)[0]
    rows = R // 2 if kernel in PAIRED else R
    model = TwoLayers(kernel, projection, row_norms)
    variables = model.init(jax.random.key(0), x)
    assert set(variables) == {'projections'}
    collection = variables['projections']
    assert jax.tree.map(jnp.shape, collection) == {
        'first': {'matrix': (rows, D)},
        'second': {'matrix': (rows, D)},
    }
    assert not np.any(collection['first']['matrix'] == collection['second']['matrix'])
    again = jax.jit(model.init)(jax.random.key(1), x)['projections']
    jax.tree.map(np.testing.assert_array_equal, collection, again)

    @jax.jit
    def redraw(collection, number):
        return favor.redraw_projections(
            collection, seed=3, draw_number=number, projection=projection, row_norms=row_norms
        )

    jax.tree.map(np.testing.assert_array_equal, collection, redraw(collection, 0))
    redrawn = redraw(collection, 1)
    jax.tree.map(np.testing.assert_array_equal, redrawn, redraw(redrawn, 1))
    jax.tree.map(lambda a, b: np.testing.assert_(not np.any(a == b)), collection, redrawn)
    # The redrawn collection is what the model then uses.
    assert np.any(model.apply(variables, x) != model.apply({'projections': redrawn}, x))


def test_hadamard_projection_warns_of_padding():
    """Catches a head dimension that is no power of two and passes without a word."""
    x = inputs((1,))[0][..., :3]
    module = favor.FavorAttention('relu', R, 'hadamard')
    with pytest.warns(UserWarning, match='dim is 3, which is not a power of two'):
        jax.eval_shape(module.init, jax.random.key(0), x, x, x)


@pytest.mark.parametrize(
    ('kernel', 'options'),
    [
        ('exact', {'is_causal': True, 'temperature': TEMPERATURE}),
        ('softmax', {}),
        ('softmax_hyperbolic', {'is_causal': True}),
        ('softmax_optimal', {'temperature': TEMPERATURE}),
        ('relu', {'is_causal': True, 'temperature': TEMPERATURE}),
        ('cosine', {'is_causal': True, 'temperature': TEMPERATURE}),
        (square, {}),
        ('ftheta', {'temperature': TEMPERATURE}),
        ('ftheta_mixture', {}),
    ],
)
def test_module_is_the_function_with_its_weights(kernel, options):
    """Catches params out of place or not float32, and a sown map that is not the one in use."""
    arrays = inputs((2,))
    mask = draw_mask((2, 1, 1, M))
    module = favor.FavorAttention(kernel, R, **options)
    variables = jax.jit(module.init)(jax.random.key(0), *arrays, mask)
    learnt = kernel in ('ftheta', 'ftheta_mixture')
    projected = not learnt and kernel != 'exact'
    assert set(variables) == ({'params'} if learnt else {'projections'} if projected else set())
    output, state = jax.jit(functools.partial(module.apply, mutable=['intermediates']))(
        variables, *arrays, mask
    )
    theta = variables['params']['theta'] if learnt else None
    matrix = variables['projections']['matrix'] if projected else None
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    pattern = draw_pattern(N, 'is_causal' in options, False)
    temperature = options.get('temperature')
    expected = reference.attention(
        kernel,
        *arrays,
        mask,
        matrix,
        theta,
        pattern=pattern,
        temperature=temperature,
        offset=M - N if 'is_causal' in options else 0,
    )
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    (attention_map,) = state['intermediates']['attention_map']
    assert attention_map.shape == (2, H, N, M)
    np.testing.assert_allclose(
        np.einsum('bhnm,bmhd->bnhd', attention_map, arrays[2]), output, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize('sharing', favor.THETA_SHARINGS)
@pytest.mark.parametrize('options', [{}, {'projection': 'gaussian', 'is_causal': True}])
def test_module_that_starts_as_relu(sharing, options):
    """Equal to the module of kernel 'relu' with the same seed in the same place of a model.

    Two layers, four query heads on two key heads. Catches rows of another layer, seed or
    projection, heads that start from rows of their own, and a dependence on the `params` stream.
    """
    x = inputs((2,), M, heads=(4, 2))[0]

    class Layers(nn.Module):
        kernel: str
        fields: dict

        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = favor.FavorAttention(self.kernel, R, seed=3, **self.fields)(
                    x, x[..., ::2, :], x[..., ::2, :]
                )
            return x

    learnt = {'theta_init': 'relu', 'theta_sharing': sharing, 'hidden': R + 2}
    outputs = [
        jax.jit(Layers(*fields).init_with_output)(jax.random.key(key), x)[0]
        for key, fields in enumerate([('relu', options), ('ftheta', options | learnt)])
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


def test_module_that_starts_as_softmax():
    """Short queries and keys, for which ε and the ReLU's share of 1.8 % are small.

    Catches a start that is another attention.
    """
    arrays = inputs((2,), scale=0.5)
    fields = {'theta_init': 'softmax', 'hidden': 0}
    outputs = [
        jax.jit(favor.FavorAttention(kernel, R, **more).init_with_output)(
            jax.random.key(0), *arrays
        )[0]
        for kernel, more in (('softmax', {}), ('ftheta_mixture', fields))
    ]
    np.testing.assert_allclose(*outputs, atol=0.02)
    uniform = np.broadcast_to(arrays[2].mean(axis=1, keepdims=True), outputs[0].shape)
    assert np.max(np.abs(outputs[0] - uniform)) > 0.1


@pytest.mark.parametrize('sharing', favor.THETA_SHARINGS)
@pytest.mark.parametrize('theta_init', ['lecun', 'relu'])
def test_what_shares_one_map(theta_init, sharing):
    """Shapes, and what is equal at the start; catches heads that are copies of one for good.

    Spare units of heads differ. Queries and keys start alike, and their gradients differ.
    """
    arrays = inputs((2,), heads=(4, 2))
    module = favor.FavorAttention(
        'ftheta_mixture', R, hidden=8, theta_init=theta_init, theta_sharing=sharing
    )
    params = jax.jit(module.init)(jax.random.key(0), *arrays)['params']
    (theta,) = params.values()
    heads = (2,) if sharing in ('sides', 'none') else ()
    shapes = {
        'hidden_kernel': (D, 8), 'hidden_bias': (8,), 'output_kernel': (8, R), 'output_bias': (R,),
        'mixture_logit': (), 'log_temperature': (), 'norm_weight': (),
    }  # fmt: skip
    shapes = {name: (*heads, *shape) for name, shape in shapes.items()}
    if sharing in ('heads', 'none'):
        assert jax.tree.map(jnp.shape, theta) == {'query': shapes, 'key': shapes}
        jax.tree.map(np.testing.assert_array_equal, theta['query'], theta['key'])
        gradient = jax.grad(lambda params: jnp.sum(module.apply({'params': params}, *arrays) ** 2))(
            params
        )['theta']
        assert np.any(gradient['query']['output_kernel'] != gradient['key']['output_kernel'])
        theta = theta['query']
    assert jax.tree.map(jnp.shape, theta) == shapes
    if heads:
        one, other = theta['hidden_kernel']
        needed = R if theta_init == 'relu' else 0
        np.testing.assert_array_equal(one[:, :needed], other[:, :needed])
        assert np.all(one[:, needed:] != other[:, needed:])


@pytest.mark.parametrize(
    ('kernel', 'sharing'),
    [('ftheta', 'all'), ('ftheta', 'none'), ('ftheta_mixture', 'sides'), ('ftheta', 'heads')],
)
def test_learnt_profiles_are_those_of_each_head(kernel, sharing):
    """Against the profile of every head's own maps, for q and k with the default temperature.

    Catches heads or sides exchanged, norms of q' taken for those of q or of k, and heads that share
    a map drawn as many.
    """
    theta = weights(kernel, sharing=sharing)['theta']
    angles, key = np.linspace(0, np.pi, 3), jax.random.key(2)
    found = favor.learnt_profiles(kernel, theta, 0.5, 1.5, angles, key, num_planes=4)
    sides = [theta['query'], theta['key']] if sharing in ('heads', 'none') else [theta, theta]
    heads = range(H) if sharing in ('sides', 'none') else [slice(None)]
    for statistic in ('mean', 'deviation'):
        expected = []
        for head in heads:
            maps = [
                functools.partial(
                    getattr(feature_maps, kernel),
                    theta={name: leaf[head] if leaf.ndim else leaf for name, leaf in one.items()},
                )
                for one in sides
            ]
            profile = feature_maps.kernel_profile(
                maps[0], D, np.array([0.5, 1.5]) * D**0.25, angles, key,
                key_feature_map=maps[1], num_planes=4,
            )  # fmt: skip
            expected.append(getattr(profile, statistic)[0, 1])
        np.testing.assert_allclose(getattr(found, statistic), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(BadInput, match="kernel is 'relu'; allowed are 'ftheta', 'ftheta_mixture'"):
        favor.learnt_profiles('relu', theta, 0.5, 1.5, angles, key)


@pytest.mark.parametrize('own', ['query', 'key'])
def test_learnt_profiles_where_one_side_has_heads(own):
    """As attention takes it. Catches a shared map that is cut up as one of many heads."""
    heads, shared = (weights('ftheta', sharing=sharing)['theta'] for sharing in ('none', 'all'))
    theta = {'query': shared, 'key': shared} | {own: heads[own]}
    repeated = jax.tree.map(lambda leaf: jnp.stack([leaf] * H), shared)
    whole = {'query': repeated, 'key': repeated} | {own: heads[own]}
    angles, key = np.linspace(0, np.pi, 3), jax.random.key(2)
    found, expected = (
        favor.learnt_profiles('ftheta', each, 0.5, 1.5, angles, key, num_planes=4)
        for each in (theta, whole)
    )
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5)


@pytest.mark.parametrize('kernel', ['exact', 'relu'])
def test_module_takes_segments(kernel):
    """Catches an argument that the module does not hand on, or takes for the mask."""
    x = inputs((2,), M)[0]
    module = favor.FavorAttention(kernel, D, 'none')
    output = jax.jit(functools.partial(module.apply, {}, segment_ids=SEGMENT_IDS))(x, x, x)
    pattern = draw_pattern(M, False, True)
    expected = reference.attention(kernel, x, x, x, pattern=pattern)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


def test_module_computes_in_its_dtype():
    """Catches a dtype that is ignored."""
    arrays = inputs((2,))
    module = favor.FavorAttention('ftheta', R, dtype=jnp.bfloat16)
    output, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), *arrays)
    assert output.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_the_matrix_is_not_formed_unless_asked_for():
    """Catches an N×M array in the ordinary linear path of the module, forward or backward."""
    arrays = inputs((1,), 61, 67)
    module = favor.FavorAttention('softmax', R)
    variables = jax.eval_shape(module.init, jax.random.key(0), *arrays)
    mask = np.ones((1, 1, 1, 67), bool)

    def loss(variables, *x):
        return jnp.sum(module.apply(variables, *x, mask))

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(1, 2, 3)))(variables, *arrays))
    assert f'{H},61' in text.replace(' ', '')
    assert '61,67' not in text
    assert '67,61' not in text


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'kernel': 'tanh'}, "kernel is 'tanh'; allowed are 'exact', 'softmax'"),
        ({'kernel': 'relu', 'projection': 'fast'}, "is 'fast'; allowed are 'orthogonal'"),
        ({'kernel': 'relu', 'row_norms': 'one'}, "row_norms is 'one'; allowed are 'gaussian'"),
        ({'kernel': 'relu'}, 'num_features is 0 .* integer ≥ 1'),
        ({'kernel': 'relu', 'num_features': -1}, 'num_features is -1'),
        (
            {'kernel': 'softmax_hyperbolic', 'num_features': 7},
            "num_features is 7; kernel 'softmax_hyperbolic' .* an even number, to 8",
        ),
        ({'kernel': 3}, "kernel is 3; allowed are 'exact', 'softmax'"),
        ({'kernel': 'relu', 'num_features': 4, 'temperature': 0.0}, 'temperature is 0.0'),
        ({'kernel': 'ftheta', 'hidden': -1}, 'hidden is -1; .* needs 1 or more'),
        ({'kernel': 'ftheta', 'theta_init': 'softmax'}, "Set it to 'relu' or 'lecun', or the ker"),
        (
            {'kernel': 'ftheta', 'theta_init': 'relu', 'num_features': 129},
            'hidden is 128; .* needs 129 or more',
        ),
        (
            {'kernel': 'ftheta', 'theta_init': 'relu', 'projection': 'none'},
            "projection is missing, .* for theta_init 'relu'",
        ),
        (
            {'kernel': 'relu', 'num_features': 4, 'theta_init': 'zeros'},
            "theta_init is 'zeros'; allowed are 'lecun'",
        ),
        (
            {'kernel': 'relu', 'num_features': 4, 'theta_sharing': 'queries'},
            "theta_sharing is 'queries'; allowed are 'all', 'sides', 'heads', 'none'",
        ),
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
        {'kernel': 'cosine', 'projection': 'none'},
        {'kernel': 'ftheta'},
        {'kernel': 'exact'},
    ],
)
def test_num_features_may_be_left_out(fields):
    """Catches a required R where the head dimension gives it."""
    x = inputs((1,))[0]
    module = favor.FavorAttention(**fields)
    output, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), x, x, x)
    assert output.shape == x.shape


Q, K, V = np.ones((2, 5, 2, 4)), np.ones((2, 7, 2, 4)), np.ones((2, 7, 2, 4))
W = np.ones((6, 4))


@pytest.mark.parametrize(
    ('arrays', 'more', 'message'),
    [
        ((Q[0], K, V), {}, r'query has shape \(5, 2, 4\); allowed is \[batch…, tokens, heads, h'),
        ((Q, K[0], V), {}, r'key has shape \(7, 2, 4\); allowed is \[batch…, tokens, heads, head'),
        ((Q, K, V[0]), {}, r'value has shape \(7, 2, 4\); allowed is \[batch…, tokens, heads, h'),
        ((Q, K[:1], V), {}, 'key has shape .* must agree in their batch axes'),
        ((Q, np.ones((2, 7, 3, 4)), V), {}, 'key has shape .* must divide those of query'),
        ((Q, K[:, :, :1], V), {}, 'value has 2 heads, key 1; .* same number of heads'),
        ((Q, K[..., :3], V), {}, 'key has head dimension 3, query 4'),
        ((Q, K, V[:, :6]), {}, 'value has 6 tokens, key 7'),
        ((Q, K[:, :0], V[:, :0]), {}, 'value has 0 tokens, key 0'),
        ((Q.astype(int), K, V), {}, 'query has dtype int64; allowed is a floating'),
        ((Q, K, V), {'mask': np.ones((2, 1, 1, 7))}, 'mask has dtype float64; allowed is bool'),
        ((Q, K, V), {'mask': np.ones((2, 7), bool)}, r'mask has shape \(2, 7\); .*5, 7\)'),
        ((Q, K, V), {'mask': np.ones((1, 2, 1, 1, 7), bool)}, 'mask has shape'),
        ((Q, K, V), {'mask': [[1.0] * 7]}, 'mask has dtype float32; allowed is bool'),
        ((Q, K, V), {'mask': [[True], [True] * 2]}, 'mask is a list that makes no array'),
        ((Q, K, V), {'mask': 'padding'}, 'mask is a str that makes no array'),
        ((Q, K, V), {'kernel': 'tanh'}, "kernel is 'tanh'; allowed are 'exact', 'softmax'"),
        ((Q, K, V), {'projection': W[:, :3]}, r'projection has shape \(6, 3\)'),
        ((Q, K, V), {'projection': W[:0]}, r'projection has shape \(0, 4\); .* R ≥ 1'),
        ((Q, K, V), {'kernel': 'softmax'}, "projection is None; kernel 'softmax' needs"),
        ((Q, K, V), {'kernel': 'exact', 'projection': W}, "'exact' has none"),
        ((Q, K, V), {'kernel': 'ftheta'}, "theta is missing for kernel 'ftheta'"),
        ((Q, K, V), {'theta': {}}, "theta is given for kernel 'relu'"),
        ((Q, K, V), {'kernel': 'ftheta', 'theta': {}}, 'theta has the shapes {} .*hidden_kernel'),
        (
            (Q, K, V),
            weights('ftheta') | {'kernel': 'ftheta_mixture'},
            "theta has the shapes .* kernel 'ftheta_mixture'; allowed are .*norm_weight",
        ),
        (
            (Q, K, V),
            {'kernel': 'ftheta', 'theta': INIT_THETA(jax.random.key(0), 3, 8, R, mixture=False)},
            r"theta has the shapes .*allowed are .*'hidden_kernel': \(4, 8\)",
        ),
        (
            (np.ones((2, 5, 3, 4)), np.ones((2, 7, 3, 4)), np.ones((2, 7, 3, 4))),
            weights('ftheta', sharing='none'),
            r'theta has the shapes .*\(2, 4, 8\).* leading axis \(3,\) of the key heads',
        ),
        ((Q, K, V), {'temperature': 0}, 'temperature is 0; allowed is a finite number > 0'),
        ((Q, K, V), {'temperature': float('nan')}, 'temperature is nan'),
        ((Q, K, V), {'kernel': 'exact', 'temperature': -1.0}, 'temperature is -1.0'),
        ((Q, K, V), {'kernel': 'exact', 'temperature': '1'}, "temperature is '1'"),
        ((Q, K, V), {'segment_ids': SEGMENT_IDS}, r'segment_ids has shape \(7,\) .*\(2, 5\)'),
        ((K, K, V), {'segment_ids': SEGMENT_IDS[:6]}, r'segment_ids has shape \(6,\)'),
        ((K, K, V), {'segment_ids': SEGMENT_IDS * 1.0}, 'segment_ids has .* dtype float64'),
        ((K, K, V), {'segment_ids': [0.5] * 7}, 'segment_ids has .* dtype float32'),
        ((K, K, V), {'segment_ids': [[0], [0, 1]]}, 'segment_ids is a list that makes no array'),
        ((K, K, V), {'segment_ids': 3}, r'segment_ids has shape \(\) and dtype int32'),
        (
            (K, K, V),
            {'kernel': 'exact', 'segment_ids': SEGMENT_IDS[:6]},
            r'segment_ids has shape \(6,\)',
        ),
        (
            (Q, K, V),
            {'kernel': 'softmax_optimal', 'projection': W, 'is_causal': True},
            "'softmax_optimal' and is_causal is True; its A is computed from all keys",
        ),
    ],
)
@pytest.mark.parametrize('matrix', [False, True])
def test_bad_arrays(arrays, more, message, matrix):
    """Catches shapes that broadcast by accident, and float masks taken for additive ones."""
    more = {'kernel': 'relu'} | more
    with pytest.raises(BadInput, match=message):
        if matrix and arrays[2] is V and 'value' not in message:
            favor.attention_matrix(*arrays[:2], **more)
        else:
            favor.favor_attention(*arrays, **more)


@pytest.mark.parametrize(
    ('arrays', 'more', 'message'),
    [
        ((K, Q, V[:, :5]), {'is_causal': True}, 'key has 5 tokens, fewer than the 7 of query; ca'),
        ((K, Q, V[:, :5]), {'is_causal': True, 'kernel': 'exact'}, 'is_causal is True with 7 que'),
        (
            (K, Q, V[:, :5]),
            {'is_causal': True, 'mask': np.ones((7, 5), bool)},
            'key has 5 tokens, fewer than the 7 of query; ca',
        ),
        ((Q, K, V), {'block_size': 0}, 'block_size is 0'),
        ((Q, K, V), {'block_size': 0, 'kernel': 'exact'}, 'block_size is 0'),
        (
            (Q, K, V),
            {'kernel': 'exact', 'axis_name': 'i'},
            "axis_name is 'i' with kernel 'exact'; neither",
        ),
        (
            (Q, K, V),
            {'mask': np.ones((5, 7), bool), 'axis_name': 'i'},
            "axis_name is 'i' with kernel 'relu'; neither",
        ),
        (
            (K, K, V),
            {'segment_ids': SEGMENT_IDS, 'axis_name': 'i'},
            'segment_ids and axis_name are given',
        ),
        ((Q, K, V), {'is_causal': True, 'axis_name': 'i'}, 'key has 2 tokens more .* axis_name'),
    ],
)
def test_bad_patterns(arrays, more, message):
    """Catches a pattern that is dropped where it has no meaning, and blocks of nothing."""
    with pytest.raises(BadInput, match=message):
        favor.favor_attention(*arrays, **{'kernel': 'relu'} | more)


@pytest.mark.parametrize('kernel', ['relu', 'exact'])
def test_a_matrix_of_fewer_keys_than_queries(kernel):
    """Catches rows of zeros where attention itself refuses."""
    with pytest.raises(BadInput, match='key has 5 tokens, fewer than the 7 of query; ca'):
        favor.attention_matrix(K, Q, kernel=kernel, is_causal=True)


@pytest.mark.parametrize('tokens', [16, 300])  # Of 300, exact attention goes by blocks.
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('kernel', KERNELS)
def test_an_empty_batch(kernel, masked, tokens):
    """As the last one of a pipeline may be. Catches a size that is worked out by dividing by 0."""
    x = jnp.zeros((0, tokens, H, D))
    mask = np.tri(tokens, dtype=bool) if masked else None
    assert favor.favor_attention(x, x, x, mask=mask, **weights(kernel)).shape == x.shape


@pytest.mark.parametrize('key_dtype', [jnp.float16, jnp.bfloat16, jnp.float32])
def test_large_float16_with_an_a_of_its_own(key_dtype):
    """Catches an A beyond float16's largest number, which made every output NaN."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(2000 * rng.normal(size=(1, 8, 2, 64)), jnp.float16)
    matrix = projections.draw(0, 0, 0, 16, 64, 'orthogonal')
    out = favor.favor_attention(
        x, x.astype(key_dtype), x / 1000, kernel='softmax_optimal', projection=matrix
    )
    assert out.dtype == jnp.float16 and np.all(np.isfinite(np.asarray(out, np.float32)))


def test_one_a_for_queries_and_keys_of_unlike_dtypes():
    """Catches an A that bfloat16 rounds for the queries alone, which is no estimate of softmax."""
    given = weights('softmax_optimal')
    query, key, value = (jnp.asarray(x) for x in inputs((2,), M))
    query = query.astype(jnp.bfloat16)
    out = favor.favor_attention(query, key, value, **given)
    expected = favor.favor_attention(query.astype(jnp.float32), key, value, **given)
    np.testing.assert_array_equal(out, expected)


def test_an_attention_fn_hides_later_keys_from_a():
    """Catches 'softmax_optimal' let through where the numbers of queries and keys differ."""
    attend = favor.make_attention_fn('softmax_optimal', num_features=8)
    for query in (K, Q):
        with pytest.raises(BadInput, match="'softmax_optimal' and is_causal is True"):
            attend(query, K, V, is_causal=True)


def test_bad_pieces_of_a_generation():
    """Catches a mask that a state cannot honour, and keys without queries."""
    state = favor.init_state(K, V, kernel='relu')
    with pytest.raises(BadInput, match=r'mask has shape \(1, 1, 7, 7\); a state takes'):
        favor.extend(state, K, K, V, kernel='relu', mask=np.ones((7, 7), bool))
    with pytest.raises(BadInput, match='key has 7 tokens, query 5; extend takes'):
        favor.extend(state, Q, K, V, kernel='relu')
    with pytest.raises(BadInput, match="kernel is 'tanh'"):
        favor.init_state(K, V, kernel='tanh')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'batch': (3,)}, r'state has sums \(3, 2, 6, 6\) and log_scale None; key'),
        ({'heads': (4, 4)}, r'sums \(2, 4, 6, 6\) .* have \(2, 2, 6, 6\) and None: sums are'),
        ({'value': np.ones((2, 7, 2, 3))}, r'sums \(2, 2, 4, 6\) .* have \(2, 2, 6, 6\)'),
        ({'projection': np.ones((5, D))}, r'sums \(2, 2, 6, 5\) .* have \(2, 2, 6, 6\)'),
        ({'kernel': 'softmax'}, r'log_scale \(2, 2, 6\); .* have \(2, 2, 6, 6\) and None'),
        ({'state': None}, 'state is a NoneType.*; allowed is a State'),
        ({'state': (1, 2)}, 'state is a tuple.*; allowed is a State'),
    ],
)
@pytest.mark.parametrize('num_tokens', [1, M])
def test_state_of_something_else(change, message, num_tokens):
    """Catches a state that broadcasts against other arrays, or fails deep within a contraction."""
    arrays = inputs((2,), M)
    given = weights('relu')
    _, key, value = inputs(change.get('batch', (2,)), M, heads=change.get('heads', (H, H)))
    changed = {name: change.get(name, given[name]) for name in given}
    state = favor.init_state(key, change.get('value', value), **changed)
    state = change.get('state', state)
    with pytest.raises(BadInput, match=message):
        favor.extend(state, *(x[:, :num_tokens] for x in arrays), **given)


@pytest.mark.parametrize(('num_tokens', 'heads', 'warns'), [(4, 128, True), (256, 100, False)])
def test_heads_in_the_place_of_tokens_are_warned_of(num_tokens, heads, warns):
    """Catches attention over the heads, whose output has the right shape all the same."""
    x = jax.ShapeDtypeStruct((2, num_tokens, heads, D), jnp.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        jax.eval_shape(functools.partial(favor.favor_attention, kernel='relu'), x, x, x)
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert len(messages) == warns
    if warns:
        assert 'read as [batch…, tokens, heads, head_dim]: 4 tokens in 128 heads' in messages[0]


def test_one_token_of_many_heads_is_no_mistake():
    """Catches a warning at every step of a generation."""
    x = jnp.ones((2, 1, 100, D))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        favor.extend(favor.init_state(x, x, kernel='relu'), x, x, x, kernel='relu')


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        (lambda u: u, r'f\(-30\) = -30'),
        (jnp.sin, "kernel is a function with f.* 'identity' can be had by its name"),
        (lambda u: jnp.where(u == 0, -1, 1), r'f\(0\) = -1'),
    ],
)
def test_functions_that_are_negative_are_refused(function, message):
    """Catches a normaliser that may cancel, also under `jit`."""
    arrays = inputs((2,))
    with pytest.raises(BadInput, match=message):
        jax.jit(functools.partial(favor.favor_attention, kernel=function))(*arrays)


def test_functions_of_traced_arrays_are_taken():
    """Catches a check that asks for the value of a weight that is being trained."""
    arrays = inputs((2,))

    @jax.jit
    def attend(power):
        return favor.favor_attention(*arrays, kernel=lambda u: jnp.abs(u) ** power)

    expected = favor.favor_attention(*arrays, kernel=lambda u: jnp.abs(u) ** 1.5)
    np.testing.assert_allclose(attend(1.5), expected, rtol=1e-5)


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


@pytest.mark.parametrize('kernel', ['softmax', 'softmax_hyperbolic', 'relu', square])
def test_drop_in_attends_with_its_matrix(kernel):
    """First called under a trace, then outside; catches a leaked tracer and a matrix per call."""
    arrays = inputs((2,))
    fn = favor.make_attention_fn(kernel, R, 'gaussian', 4, 9, temperature=TEMPERATURE)
    mask = np.arange(M) < 5
    w = projections.draw(4, 9, 0, R // 2 if kernel in PAIRED else R, D, 'gaussian')
    expected = reference.attention(kernel, *arrays, mask, w, temperature=TEMPERATURE)
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
    """Catches is_causal swallowed, alone or with a mask, and another alignment than Flax's."""
    fn = favor.make_attention_fn('exact')
    for mask in (None, FLAX_MASKS['padding']):
        causal = nnx_module(fn)(X, mask=mask, is_causal=True)
        both = FLAX_MASKS['causal'] * (1 if mask is None else mask)
        np.testing.assert_allclose(causal, nnx_module()(X, mask=both), rtol=1e-5, atol=1e-6)
    query, key, value = inputs((2,))
    arrays = query, key, value[..., :D]
    np.testing.assert_allclose(
        fn(*arrays, is_causal=True),
        nnx.dot_product_attention(*arrays, is_causal=True),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize('kernel', ['softmax', 'relu', 'cosine'])
def test_causal_drop_in_is_linear(kernel):
    """Catches is_causal as a mask of N×N, forward or backward, or padding lost beside it."""
    fn = favor.make_attention_fn(kernel, R)
    padding = FLAX_MASKS['padding']
    np.testing.assert_allclose(
        nnx_module(fn)(X, mask=padding, is_causal=True),
        nnx_module(fn)(X, mask=FLAX_MASKS['causal'] * padding),
        rtol=1e-4,
        atol=1e-5,
    )
    module = nnx_module(fn)
    x = jax.ShapeDtypeStruct((2, 130, 8), jnp.float32)
    text = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(module(x, is_causal=True))))(x))
    assert f'130,{H}' in text.replace(' ', '')
    assert '130,130' not in text.replace(' ', '')


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
    arrays = inputs((1,))
    with pytest.raises(BadInput, match='num_features is 7; .* an even number'):
        favor.make_attention_fn('softmax_trigonometric', 7)(*arrays)
    with pytest.raises(BadInput, match='num_features is 0'):
        favor.make_attention_fn('softmax', 0)(*arrays)
    with pytest.raises(BadInput, match='temperature is -1'):
        favor.make_attention_fn('relu', R, temperature=-1)(*arrays)


@pytest.mark.parametrize('kernel', ['exact', 'softmax', 'softmax_optimal', 'cosine', 'relu'])
def test_no_queries_are_no_rows(kernel):
    """As of softmax in NumPy. Catches a refusal that names shapes which nobody has passed."""
    k, v = jnp.ones((2, 3, 2, 4)), jnp.ones((2, 3, 2, 5))
    matrix = None if kernel == 'exact' else jnp.ones((6, 4))
    out = favor.favor_attention(jnp.ones((2, 0, 4, 4)), k, v, kernel=kernel, projection=matrix)
    assert out.shape == (2, 0, 4, 5)


def test_an_attention_fn_takes_what_flax_has_without_a_batch():
    """A layer on (tokens, width), beside the same one on a batch of one, with a mask."""
    x = jax.random.normal(jax.random.key(0), (6, 8))
    mask = jnp.arange(6)[None, None] < 4
    for kernel in ('exact', 'softmax'):
        layer = nn.MultiHeadDotProductAttention(
            num_heads=2, attention_fn=favor.make_attention_fn(kernel, 16)
        )
        variables = layer.init(jax.random.key(1), x)
        out, seen = layer.apply(
            variables, x, mask=mask, sow_weights=True, mutable=['intermediates']
        )
        batched = layer.apply(variables, x[None], mask=mask[None])
        np.testing.assert_allclose(out, batched[0], atol=1e-6)
        (weights,) = seen['intermediates']['attention_weights']
        assert weights.shape == (2, 6, 6)
    exact = nn.MultiHeadDotProductAttention(num_heads=2)
    layer = nn.MultiHeadDotProductAttention(
        num_heads=2, attention_fn=favor.make_attention_fn('exact')
    )
    np.testing.assert_allclose(
        layer.apply(variables, x, mask=mask), exact.apply(variables, x, mask=mask), atol=1e-6
    )


def test_kernels_of_ones_own_may_be_objects():
    """Catches a look-up by hash of what a dataclass makes unhashable, and NaN let through."""

    @dataclasses.dataclass
    class Power:
        exponent: int

        def __call__(self, u):
            return u**self.exponent

    q = jax.random.normal(jax.random.key(0), (1, 5, 1, 4))
    out = favor.favor_attention(q, q, q, kernel=Power(2), projection=None)
    assert bool(jnp.isfinite(out).all())
    favor.FavorAttention(kernel=Power(2), num_features=8).init(jax.random.key(0), q, q, q)
    favor.make_attention_fn(Power(2), 8)(q, q, q)
    with pytest.raises(BadInput, match=r'with f\(-30\) = nan; features must not be NaN'):
        favor.favor_attention(q, q, q, kernel=jnp.sqrt)


def test_numbers_of_other_widths():
    """NumPy's float64 without a warning; eight bits, which JAX promotes with nothing, refused."""
    q = np.random.default_rng(0).normal(size=(1, 5, 1, 4))
    matrix = np.ones((6, 4)).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        out = favor.favor_attention(q, q, q, kernel='softmax', projection=matrix)
    assert out.dtype == jnp.float32
    narrow = jnp.asarray(q, jnp.float8_e4m3fn)
    with pytest.raises(BadInput, match='float8_e4m3fn; allowed is a floating one of 16'):
        favor.favor_attention(narrow, narrow, narrow, kernel='relu')
