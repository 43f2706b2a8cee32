"""Exact attention against NumPy, in one block and in many."""

import functools
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from performer_vit import exact_attention as ea
from performer_vit.errors import BadInput
from tests import reference
from tests.programs import all_gradients, equations, largest_array

H, D = 4, 4
ONE_BLOCK = (sys.maxsize, None)


class Case(NamedTuple):
    """The sizes of one call, the shape of its mask, and its patterns."""

    num_queries: int = 10
    num_keys: int = 7
    num_groups: int = H
    batch: tuple[int, ...] = (2,)
    mask: tuple[int, ...] | None = None
    is_causal: bool = False
    segments: bool = False
    temperature: float | None = None


CASES = {
    'plain': Case(),
    'no batch axis': Case(batch=()),
    'temperature': Case(temperature=3.0),
    'one query': Case(num_queries=1, mask=(2, H, 1, 7)),
    'padding': Case(mask=(2, 1, 1, 7)),
    'every mask its own': Case(mask=(2, H, 10, 7)),
    'per query': Case(mask=(10, 7)),
    'per head': Case(mask=(H, 1, 7), num_groups=2),
    'one axis': Case(mask=(7,)),
    'rows': Case(mask=(2, 1, 10, 1)),
    'shared key heads': Case(num_groups=2),
    'one key head': Case(num_groups=1, batch=(2, 3), mask=(2, 1, H, 10, 7)),
    'batch of masks': Case(batch=(2, 3), mask=(3, 1, 10, 7)),
    'causal': Case(num_keys=10, is_causal=True),
    'causal, more keys': Case(num_queries=6, num_keys=13, is_causal=True, num_groups=2),
    'causal and masked': Case(num_keys=11, is_causal=True, mask=(2, 1, 1, 11), num_groups=2),
    'segments': Case(num_keys=10, segments=True, num_groups=2),
    'everything': Case(
        11, 11, 2, (2, 2), (2, 1, H, 11, 11), is_causal=True, segments=True, temperature=0.5
    ),
}
# Queries and keys of a block: even, with a remainder, and larger than the axis.
SIZES = [(4, 3), (3, 100), (100, 2)]


def inputs(case=CASES['plain'], scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(0)
    query = scale * rng.normal(size=(*case.batch, case.num_queries, H, D))
    key = scale * rng.normal(size=(*case.batch, case.num_keys, case.num_groups, D))
    value = rng.normal(size=(*case.batch, case.num_keys, case.num_groups, D + 1))
    return tuple(x.astype(dtype) for x in (query, key, value))


def options(case):
    """Keyword arguments of `exact_attention`, and the mask that the reference needs for them."""
    rng = np.random.default_rng(3)
    mask = None if case.mask is None else rng.random(case.mask) < 0.6
    pattern, ids = True, None
    if case.is_causal:
        queries, keys = np.ogrid[: case.num_queries, : case.num_keys]
        pattern = keys <= queries + (case.num_keys - case.num_queries)
    if case.segments:
        # An id that comes back is another run.
        ids = np.broadcast_to([0, 0, 0, 7, 7, 0, 0, 2, 2, 2, 2], (*case.batch, 11))
        runs = np.broadcast_to([0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3], (*case.batch, 11))
        ids, runs = ids[..., : case.num_keys], runs[..., : case.num_keys]
        pattern = pattern & (runs[..., :, None] == runs[..., None, :])[..., None, :, :]
    keywords = {
        'mask': mask,
        'is_causal': case.is_causal,
        'segment_ids': ids,
        'temperature': case.temperature,
    }
    return keywords, {'mask': mask, 'pattern': pattern, 'temperature': case.temperature}


# Compiled, as it is used, and because a test is faster so.
@functools.partial(
    jax.jit, static_argnames=('block_size', 'key_block_size', 'is_causal', 'temperature')
)
def attend(query, key, value, **keywords):
    return ea.exact_attention(query, key, value, **keywords)


def gradient(arrays, **keywords):
    """Of a square loss with targets, so that every output has a cotangent of its own."""
    shape = jax.eval_shape(lambda *x: attend(*x, **keywords), *arrays)
    target = np.random.default_rng(4).normal(size=shape.shape).astype(shape.dtype)
    return jax.grad(lambda *x: jnp.sum((attend(*x, **keywords) - target) ** 2), argnums=(0, 1, 2))(
        *arrays
    )


def sized(sizes):
    return dict(zip(('block_size', 'key_block_size'), sizes, strict=True))


# Values


@pytest.mark.parametrize('sizes', [ONE_BLOCK, *SIZES])
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_against_numpy(case, sizes):
    """Catches a block that takes another's rows, mask or ids, or counts the keys of the padding."""
    arrays = inputs(case)
    keywords, expected = options(case)
    output = attend(*arrays, **keywords, **sized(sizes))
    expected = reference.attention('exact', *arrays, **expected)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_blocks_have_the_gradient_of_one_block(case):
    """That one is JAX's own. Catches a gradient of k or v that takes in one block or head alone."""
    arrays = inputs(case)
    keywords, _ = options(case)
    whole = gradient(arrays, **keywords, **sized(ONE_BLOCK))
    for blocked, expected in zip(gradient(arrays, **keywords, **sized((4, 3))), whole, strict=True):
        np.testing.assert_allclose(blocked, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('sizes', [ONE_BLOCK, (3, 2)])
def test_derivatives_against_finite_differences(sizes):
    """Forward and reverse, first and second. Catches a normaliser or a maximum held fixed."""
    case = Case(4, 5, 2, (), is_causal=True, mask=(H, 4, 5))
    keywords, _ = options(case)
    with jax.enable_x64(True):
        function = functools.partial(attend, **keywords, **sized(sizes))
        check_grads(function, inputs(case, dtype=np.float64), order=2, eps=1e-4, rtol=1e-6)


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_matrix_against_numpy(case):
    query, key, _ = inputs(case)
    keywords, expected = options(case)
    np.testing.assert_allclose(
        ea.attention_matrix(query, key, **keywords),
        reference.attention_matrix('exact', query, key, **expected),
        rtol=1e-5,
        atol=1e-6,
    )


def test_default_blocks_against_numpy():
    """Catches the sizes that are used when none are given, where they cut and leave over."""
    case = Case(600, 1100, 2, ())
    arrays = inputs(case)
    expected = reference.attention('exact', *arrays)
    np.testing.assert_allclose(attend(*arrays), expected, rtol=1e-4, atol=1e-6)
    causal = case._replace(is_causal=True)
    keywords, patterns = options(causal)
    expected = reference.attention('exact', *arrays, **patterns)
    np.testing.assert_allclose(attend(*arrays, **keywords), expected, rtol=1e-4, atol=1e-6)


def test_all_heads_at_once_elsewhere(monkeypatch):
    """What runs on an accelerator; catches indices of a mask or run that take one head for all."""
    case = CASES['everything']
    arrays = inputs(case)
    keywords, expected = options(case)
    alone = gradient(arrays, **keywords, **sized((4, 3)))
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    jax.clear_caches()
    expected = reference.attention('exact', *arrays, **expected)
    together = attend(*arrays, **keywords, **sized((4, 3)))
    np.testing.assert_allclose(together, expected, rtol=1e-5, atol=1e-6)
    for x, y in zip(gradient(arrays, **keywords, **sized((4, 3))), alone, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    jax.clear_caches()


# Numbers at the edge


@pytest.mark.parametrize('sizes', [ONE_BLOCK, (4, 3)])
def test_nothing_to_attend_gives_zeros(sizes):
    """Catches NaN from a softmax over nothing, in the output or in the gradient.

    Also a row whose first blocks of keys are hidden, and which must forget them.
    """
    arrays = inputs()
    mask = np.ones((2, 1, 10, 7), bool)
    mask[0] = mask[1, :, 3] = False
    mask[1, :, 5, :5] = False
    output = attend(*arrays, mask=mask, **sized(sizes))
    np.testing.assert_array_equal(output[0], 0)
    np.testing.assert_array_equal(output[1, 3], 0)
    expected = reference.attention('exact', *arrays, mask)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    gradients = gradient(arrays, mask=mask, **sized(sizes))
    np.testing.assert_array_equal(gradients[0][1, 3], 0)
    for x in gradients:
        np.testing.assert_array_equal(x[0], 0)
        assert np.all(np.isfinite(x))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('sizes', [ONE_BLOCK, (4, 3)])
def test_extreme_inputs(dtype, sizes):
    """|x| to 1e3 and more: logits of 1e6. Catches an exponential without its maximum taken out."""
    arrays = inputs(scale=1e3, dtype=dtype)
    mask = np.random.default_rng(3).random((10, 7)) < 0.5
    output = attend(*arrays, mask=mask, **sized(sizes))
    expected = reference.attention('exact', *(np.asarray(x, np.float64) for x in arrays), mask)
    tolerance = 1e-3 if dtype == jnp.float32 else 0.02
    np.testing.assert_allclose(
        np.asarray(output, np.float64), expected, rtol=tolerance, atol=tolerance
    )
    for x in gradient(arrays, mask=mask, **sized(sizes)):
        assert np.all(np.isfinite(np.asarray(x, np.float32)))


def test_weights_of_large_logits_sum_to_one_in_the_gradient():
    """Catches log Σ exp kept as one number: near 1e6 float32 has steps of 0.06, weights of 6 %.

    With equal keys every weight is 1/M, and the gradient of the sum of outputs is N/M for each
    value.
    """
    query, key, value = (np.ones((1, 6, 1, 64), np.float32) for _ in range(3))
    function = functools.partial(attend, 350 * query, 350 * key, **sized((4, 3)))
    gradients = jax.grad(lambda x: jnp.sum(function(x)))(value)
    np.testing.assert_allclose(gradients, 1, rtol=1e-6)


@pytest.mark.parametrize('sizes', [ONE_BLOCK, (4, 3)])
def test_bfloat16(sizes):
    """Catches a softmax in bfloat16, whose logits near 30 would be off by 0.1, and the wrong dtype.

    What is left is the rounding of weights and output to 8 bits.
    """
    arrays = inputs(scale=4.0, dtype=jnp.bfloat16)
    output = attend(*arrays, **sized(sizes))
    assert output.dtype == jnp.bfloat16
    assert ea.attention_matrix(*arrays[:2]).dtype == jnp.float32
    expected = reference.attention('exact', *(np.asarray(x, np.float64) for x in arrays))
    np.testing.assert_allclose(np.asarray(output, np.float64), expected, atol=0.02)
    np.testing.assert_allclose(
        ea.attention_matrix(*arrays[:2]),
        reference.attention_matrix('exact', *arrays[:2]),
        atol=1e-5,
    )
    for x in gradient(arrays, **sized(sizes)):
        assert x.dtype == jnp.bfloat16


@pytest.mark.parametrize('sizes', [ONE_BLOCK, (4, 3)])
def test_float64(sizes):
    """Catches a sum that falls back to float32."""
    with jax.enable_x64(True):
        arrays = inputs(dtype=np.float64)
        output = attend(*arrays, **sized(sizes))
        assert output.dtype == np.float64
        expected = reference.attention('exact', *arrays)
        np.testing.assert_allclose(output, expected, rtol=1e-12, atol=1e-13)


# Causality


@pytest.mark.parametrize('sizes', [ONE_BLOCK, (4, 3), (3, 4)])
def test_the_future_changes_nothing(sizes):
    """Bit for bit, in the output and in the gradient; catches an edge that is off by one."""
    case = CASES['causal, more keys']
    query, key, value = inputs(case)
    seen = 4 + 7  # Keys of the first four queries, of 6 and 13.

    def run(key, value):
        function = functools.partial(attend, is_causal=True, **sized(sizes))

        def first(*x):
            return function(*x)[:, :4]

        return first(query, key, value), *all_gradients(first)(query, key, value)

    noise = np.random.default_rng(5).normal(size=key.shape).astype(np.float32)
    noise[:, :seen] = 0
    changed = run(key + noise, value + noise[..., :1])
    for x, y in zip(run(key, value), changed, strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(changed[2][:, seen:], 0)
    noise[:, seen - 1] = 1
    assert not np.allclose(run(key + noise, value)[0], changed[0])


@pytest.mark.parametrize(
    ('num_queries', 'num_keys', 'sizes', 'whole', 'causal'),
    [
        (64, 64, (8, 8), 64, 36),
        (64, 64, (8, 16), 32, 20),
        (64, 128, (8, 16), 64, 52),
        (60, 60, (16, 16), 16, 10),
        (64, 64, (8, None), 8, 36),
    ],
)
def test_blocks_of_the_future_are_left_out(num_queries, num_keys, sizes, whole, causal):
    """Counted in the program, forward and backward; catches time spent on what is hidden.

    A pair of blocks takes two products, and five in the backward pass. Of n×n pairs n (n + 1) / 2
    have something to see.
    """
    query, key = (jnp.ones((1, n, 1, 4)) for n in (num_queries, num_keys))

    def products(function):
        jaxpr = jax.make_jaxpr(function)(query, key, key).jaxpr
        return sum(n for eqn, n in equations(jaxpr) if eqn.primitive.name == 'dot_general')

    for is_causal, pairs in ((False, whole), (True, causal)):
        function = functools.partial(ea.exact_attention, is_causal=is_causal, **sized(sizes))
        assert products(function) == 2 * pairs
        assert products(all_gradients(function)) == 7 * pairs


# Memory


@pytest.mark.parametrize('masked', [False, True])
def test_no_more_than_a_block_of_weights_exists(masked):
    """Forward and backward; catches blocks that are all kept for the backward pass."""
    query, key = (jnp.ones((1, n, 1, 2)) for n in (512, 256))
    mask = jnp.ones((1, 1, 1, 256), bool) if masked else None

    def largest(*sizes):
        function = functools.partial(ea.exact_attention, mask=mask, **sized(sizes))
        return largest_array(all_gradients(function), query, key, key)

    assert largest(512, None) == 512 * 256
    assert largest(32, None) == 32 * 256
    assert largest(32, 64) == 32 * 64


@pytest.mark.parametrize(
    ('is_causal', 'axes'),
    [(False, None), (True, None), (False, (1, 1, 1, -1)), (True, (1, 1, -1, -1))],
)
def test_memory_is_linear(is_causal, axes):
    """What two layers' compiled gradient needs beside its arguments; catches what grows with N².

    A mask of N² entries is an argument; nothing like it may be there once more, though the layers,
    which are a loop, and the heads all see the same one.
    """

    def needs(n):
        query = jax.ShapeDtypeStruct((1, n, 2, 4), jnp.float32)
        shape = None if axes is None else [n if size == -1 else size for size in axes]
        masks = () if axes is None else (jax.ShapeDtypeStruct(shape, bool),)

        def loss(q, k, v, *masks):
            def layer(x, _):
                x = ea.exact_attention(x, k, v, *masks, is_causal=is_causal, **sized((64, 64)))
                return x, None

            return jnp.sum(jax.lax.scan(layer, q, length=2)[0] ** 2)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, query, query, *masks)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    small, large, larger = needs(512), needs(1024), needs(2048)
    # A term in N² would add four times as much at the second doubling as it does at the first.
    assert larger - large < 2.5 * (large - small)
    assert larger < 2048 * 2048


def test_shared_key_heads_are_not_copied():
    """Catches keys that are repeated for each of their query heads, in one block or in many."""
    query, key = jnp.ones((1, 4, 8, 16)), jnp.ones((1, 256, 1, 16))
    for sizes in (ONE_BLOCK, (2, 32)):
        function = functools.partial(ea.exact_attention, **sized(sizes))
        assert largest_array(all_gradients(function), query, key, key) <= 8 * 4 * 256


def test_a_mask_is_not_copied_for_heads_or_batch():
    """Catches a mask that is broadcast before it is cut."""
    query = jnp.ones((3, 64, 8, 2))
    function = functools.partial(
        ea.exact_attention, mask=jnp.ones((1, 1, 64, 64), bool), **sized((16, 16))
    )
    assert largest_array(all_gradients(function), query, query, query) == 64 * 64


def test_one_block_has_no_loops(monkeypatch):
    """FLOPs are counted so: XLA counts a loop's body once."""
    query = jnp.ones((1, 2048, 1, 2))

    def loops():
        jaxpr = jax.make_jaxpr(all_gradients(ea.exact_attention))(query, query, query).jaxpr
        return [eqn for eqn, _ in equations(jaxpr) if eqn.primitive.name in ('scan', 'while')]

    assert loops()
    monkeypatch.setattr(ea, 'BLOCK_SIZE', sys.maxsize)
    assert not loops()


# Transformations


@pytest.mark.parametrize('transform', ['vmap', 'pmap', 'shard_map', 'checkpoint', 'jvp'])
def test_transformations(transform):
    """Catches a derivative that is lost, or an axis that is mixed up, under a transformation.

    With `shard_map`, also a loop's carry that starts out alike on every device.
    """
    case = Case(10, 10, 2, (2,), is_causal=True, segments=True)
    arrays = inputs(case)
    keywords, _ = options(case)
    ids = keywords.pop('segment_ids')
    keywords |= sized((4, 3))

    def function(query, key, value, ids):
        return ea.exact_attention(query, key, value, segment_ids=ids, **keywords)

    def derivative(function, query, key, value, ids):
        def loss(*x):
            return jnp.sum(function(*x, ids) ** 2)

        return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)

    plain = functools.partial(derivative, function)
    expected = jax.jit(plain)(*arrays, ids)
    if transform == 'vmap':
        found = jax.jit(jax.vmap(plain))(*arrays, ids)
    elif transform == 'pmap':
        split = [np.stack([x, x + 1]) for x in (*arrays, ids)]
        found = [x[0] for x in jax.pmap(plain, devices=jax.devices()[:2])(*split)]
    elif transform == 'shard_map':
        mesh = jax.make_mesh((2,), ('batch',), axis_types=(jax.sharding.AxisType.Auto,))
        specs = jax.P('batch')
        found = jax.jit(jax.shard_map(plain, mesh=mesh, in_specs=specs, out_specs=specs))(
            *arrays, ids
        )
    elif transform == 'checkpoint':
        found = jax.jit(functools.partial(derivative, jax.checkpoint(function)))(*arrays, ids)
    else:
        # <gradient, direction> is the derivative of the loss along it.
        directions = tuple(np.cos(np.arange(x.size)).reshape(x.shape).astype('f') for x in arrays)
        output, tangent = jax.jvp(lambda *x: function(*x, ids), arrays, directions)
        found = [np.sum(2 * output * tangent)]
        products = [np.sum(x * y) for x, y in zip(expected, directions, strict=True)]
        expected = [np.sum(products)]
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


# Refusals


@pytest.mark.parametrize(
    ('case', 'keywords', 'message'),
    [
        (Case(10, 7), {'is_causal': True}, 'is_causal is True with 10 queries and 7 keys'),
        (Case(10, 7, num_groups=3), {}, r'key has shape \(2, 7, 3, 4\), query \(2, 10, 4, 4\)'),
        (Case(10, 7), {'mask': np.ones((3, 7), bool)}, r'mask has shape \(3, 7\)'),
        (Case(10, 7), {'mask': np.zeros((10, 7))}, 'mask .* dtype float64; allowed is bool'),
        (Case(10, 7), {'segment_ids': np.zeros((2, 10), int)}, 'of which there are 7'),
        (Case(10, 10), {'segment_ids': np.zeros((2, 10))}, 'dtype float64; allowed are integers'),
        (Case(10, 10), {'segment_ids': np.zeros((3, 10), int)}, r'shape \(3, 10\)'),
        (Case(10, 7), {'temperature': 0.0}, 'temperature is 0.0'),
    ],
)
def test_what_does_not_fit_is_refused(case, keywords, message):
    """By both functions; catches shapes that broadcast to what nobody meant."""
    query, key, value = inputs(case)
    with pytest.raises(BadInput, match=message):
        ea.exact_attention(query, key, value, **keywords)
    with pytest.raises(BadInput, match=message):
        ea.attention_matrix(query, key, **keywords)


@pytest.mark.parametrize('name', ['block_size', 'key_block_size'])
@pytest.mark.parametrize('size', [0, 2.0])
def test_block_sizes_are_positive_integers(name, size):
    with pytest.raises(BadInput, match=f'{name} is {size}'):
        ea.exact_attention(*inputs(), **{name: size})


def test_value_must_fit_key():
    """Catches a value that broadcasts over the keys, or over their heads."""
    x = np.ones((1, 5, 2, 3), np.float32)
    for value in (x[:, :1], x[:, :, :1]):
        with pytest.raises(BadInput, match='value has shape'):
            ea.exact_attention(x, x, value)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
def test_narrow_inputs_in_64_bit_mode(dtype):
    """More keys than a block has. Catches statistics that become float64 for floats of others."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 300, 1, 8), dtype)
    expected = ea.exact_attention(q, k, v)
    with jax.enable_x64(True):
        out = ea.exact_attention(q, k, v)
        gradient = jax.grad(lambda q: ea.exact_attention(q, k, v).sum())(q)
    assert out.dtype == gradient.dtype == jnp.dtype(dtype)
    tolerance = 1e-6 if dtype == 'float32' else 1e-2
    np.testing.assert_allclose(*(x.astype(np.float32) for x in (out, expected)), atol=tolerance)
