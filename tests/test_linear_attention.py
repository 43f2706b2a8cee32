"""Linear attention against all pairs in NumPy's float64, whatever the order of its sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from performer_vit import linear_attention as la
from performer_vit.errors import BadInput
from tests.programs import all_gradients, equations, largest_array

# The same few examples on every run. A failing one is not made smaller: every try is compiled.
properties = functools.partial(
    settings, deadline=None, derandomize=True, database=None, phases=[Phase.generate]
)


def project(x, num_features):
    """Wx, in float32 where x is bfloat16."""
    dim = x.shape[-1]
    return x @ np.random.default_rng(dim).normal(size=(dim, num_features)).astype(np.float32)


def half_square(x):
    return (x * x * np.float32(0.5)).sum(axis=-1, keepdims=True)


def positive(x, xp):
    return xp.maximum(project(x, 6), 0) + 0.1


def signed(x, xp):
    """Of both signs, with a product of at least 6 - 5/4 that no rounding cancels."""
    u = xp.sin(project(x, 5)) / 2
    return xp.concatenate([u, xp.full_like(u[..., :1], 6**0.5)], axis=-1)


def log_positive(x, xp):
    return la.LogFeatures(project(x, 6) - half_square(x))


def log_signed(x, xp):
    """As `signed`, with a logarithm of its own for every feature."""
    u = project(x, 5)
    log_value = xp.concatenate([0.5 * xp.cos(u), xp.full_like(u[..., :1], 2)], axis=-1)
    factor = xp.concatenate([xp.sin(u), xp.ones_like(u[..., :1])], axis=-1)
    return la.LogFeatures(log_value, factor)


def trigonometric(x, xp):
    """Signed, with one logarithm for all features of a token."""
    u = 0.1 * project(x, 3)
    return la.LogFeatures(half_square(x), xp.concatenate([xp.cos(u), xp.sin(u)], axis=-1))


def log_itself(x, xp):
    return la.LogFeatures(x)


MAPS = {
    'positive': positive,
    'signed': signed,
    'log_positive': log_positive,
    'log_signed': log_signed,
    'trigonometric': trigonometric,
    'log_itself': log_itself,
}
KINDS = tuple(kind for kind in MAPS if kind != 'log_itself')
SIGNED = ('signed', 'log_signed', 'trigonometric')


def options(kind):
    return {'feature_map': functools.partial(MAPS[kind], xp=jnp), 'signed': kind in SIGNED}


def quadratic(kind, query, key, value, mask, xp=np):
    """[..., N, H, D] from every pair's Σ_r φ(q)_r φ(k)_r, in logarithms; mask [..., N, M]."""
    key, value = (xp.repeat(x, query.shape[-2] // x.shape[-2], axis=-2) for x in (key, value))
    (query_log, query_factor), (key_log, key_factor) = (
        features if isinstance(features, la.LogFeatures) else (0 * features, features)
        for features in (MAPS[kind](x, xp) for x in (query, key))
    )
    mask = mask[..., None]
    logs = query_log[..., :, None, :, :] + key_log[..., None, :, :, :]
    largest = xp.where(mask[..., None], logs, -1e30).max(axis=(-3, -1), keepdims=True)
    terms = xp.exp(xp.minimum(logs - largest, 0))
    if query_factor is not None:
        terms = terms * query_factor[..., :, None, :, :] * key_factor[..., None, :, :, :]
    weights = xp.where(mask, terms.sum(axis=-1), 0)
    total = weights.sum(axis=-2)[..., None]
    numerator = xp.einsum('...nmh,...mhd->...nhd', weights, value)
    return numerator / xp.where(total == 0, 1, total)


def pairs(num_queries, num_keys, key_mask=None, segment_ids=None, causal=False):
    """[..., N, M], True where a query may attend to a key."""
    mask = np.ones((num_queries, num_keys), bool)
    if causal:
        mask = np.tri(num_queries, num_keys, num_keys - num_queries, dtype=bool)
    if segment_ids is not None:
        changes = np.diff(segment_ids, axis=-1, prepend=segment_ids[..., :1]) != 0
        runs = np.cumsum(changes, axis=-1)
        mask = mask & (runs[..., :, None] == runs[..., None, :])
    if key_mask is not None:
        mask = mask & key_mask[..., None, :]
    return mask


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(batch=(2,), num_queries=11, num_keys=11, heads=4, groups=2, dim=3, size=2, seed=0):
    return (
        normal(*batch, num_queries, heads, dim, seed=seed),
        normal(*batch, num_keys, groups, dim, seed=seed + 1),
        normal(*batch, num_keys, groups, size, seed=seed + 2),
    )


def draw_mask(probability, shape, seed=0):
    return np.random.default_rng(seed).random(shape) < probability


def float64(*arrays):
    return tuple(np.asarray(x, np.float64) for x in arrays)


def assert_close(actual, expected, tolerance=2e-5):
    """To float32's rounding of numbers as large as the largest."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max())
        ),
        actual,
        expected,
    )


# Compiled, as they are used, and because a test is faster so.
@functools.cache
def attend(form, kind, block_size=None):
    """(query, key, value, key_mask, segment_ids) ↦ output."""
    function = {'all': la.linear_attention, 'causal': la.causal_linear_attention}[form]
    given = options(kind) | {'block_size': block_size}
    return jax.jit(
        lambda *arrays, key_mask=None, segment_ids=None: function(
            *arrays, key_mask=key_mask, segment_ids=segment_ids, **given
        )
    )


@functools.cache
def with_gradients(form, kind, block_size=None):
    """(cotangent, key_mask, query, key, value) ↦ the output and its pulled back cotangent."""

    @jax.jit
    def run(cotangent, key_mask, *arrays):
        function = functools.partial(attend(form, kind, block_size), key_mask=key_mask)
        output, transpose = jax.vjp(function, *arrays)
        return output, transpose(cotangent)

    return run


# Batch axes, N, M, H, G, D', D: one of everything, unequal everything, and lengths that no block
# size divides.
SHAPES = (
    ((1,), 1, 1, 1, 1, 1, 1),
    ((2,), 7, 20, 4, 2, 3, 5),
    ((2, 3), 20, 20, 2, 1, 3, 2),
    ((3,), 13, 13, 6, 2, 2, 4),
    ((), 5, 9, 3, 3, 4, 1),
)
DTYPES = {'float32': 2e-5, 'bfloat16': 2**-8, 'float64': 1e-11}
CASES = {
    'kind': st.sampled_from(KINDS),
    'block_size': st.sampled_from([None, 1, 3, 8, 64]),
    'dtype': st.sampled_from(list(DTYPES)),
    'masked': st.booleans(),
    'seed': st.integers(0, 99),
}


def compare(form, shape, kind, block_size, dtype, masked, seed, segments=False):
    batch, num_queries, num_keys, heads, groups, dim, size = shape
    with jax.enable_x64(dtype == 'float64'):
        arrays = [
            x.astype(dtype)
            for x in inputs(batch, num_queries, num_keys, heads, groups, dim, size, seed)
        ]
        key_mask = draw_mask(0.6, (*batch, num_keys), seed) if masked else None
        segment_ids = None
        if segments:
            segment_ids = draw_mask(0.3, (*batch, num_keys), seed + 1).astype(np.int32)
        output = attend(form, kind, block_size)(*arrays, key_mask=key_mask, segment_ids=segment_ids)
        assert output.dtype == dtype
    mask = pairs(num_queries, num_keys, key_mask, segment_ids, form == 'causal')
    assert_close(output, quadratic(kind, *float64(*arrays), mask), DTYPES[dtype])


@properties(max_examples=12)
@given(shape=st.sampled_from(SHAPES), **CASES)
def test_bidirectional_equals_the_quadratic_quotient(**case):
    """Catches axes, heads or blocks mixed up, padding that counts, sums in the inputs' dtype."""
    compare('all', **case)


@properties(max_examples=12)
@given(shape=st.sampled_from(SHAPES), **CASES)
def test_causal_equals_the_quadratic_quotient(**case):
    """Catches a chunk that reads itself twice or not at all, and a prefix that is misaligned."""
    compare('causal', **case)


@properties(max_examples=12)
@given(
    form=st.sampled_from(['all', 'causal']),
    shape=st.sampled_from([shape for shape in SHAPES if shape[1] == shape[2]]),
    **CASES,
)
def test_segments_equal_the_quadratic_quotient(**case):
    """Catches a segment that leaks over the edge of a chunk, forwards or backwards."""
    compare(**case, segments=True)


@pytest.mark.parametrize('form', ['all', 'causal'])
def test_segments_are_sequences_run_apart(form):
    """Three runs in one sequence and as three sequences; the third has the first's id.

    Catches segments that meet again, and chunks (of 5) that end where runs do not.
    """
    arrays = inputs((2,), 12, 12)
    segment_ids = np.array([7, 7, 7, 7, -2, -2, -2, -2, 7, 7, 7, 7])
    packed = attend(form, 'log_positive', 5)(*arrays, segment_ids=segment_ids)
    apart = [x.reshape(6, 4, *x.shape[2:]) for x in arrays]
    expected = attend(form, 'log_positive', 5)(*apart)
    assert_close(packed, np.asarray(expected, np.float64).reshape(packed.shape))


runs = jax.jit(la.runs)


@properties(max_examples=50)
@given(st.lists(st.integers(-1, 2), min_size=1, max_size=12))
def test_runs_count_changes(ids):
    """Catches runs that are numbered by their ids."""
    expected = [0]
    for before, after in zip(ids[:-1], ids[1:], strict=True):
        expected.append(expected[-1] + (before != after))
    # Not compiled anew for every length.
    padded = np.array(ids + ids[-1:] * (12 - len(ids)))
    np.testing.assert_array_equal(runs(padded)[: len(ids)], expected)


@pytest.mark.parametrize('form', ['all', 'causal'])
@pytest.mark.parametrize(('batch', 'num_tokens'), [(6, 10), (5, 10), (5, 70)])
def test_default_blocks_of_tokens_and_of_sequences(monkeypatch, form, batch, num_tokens):
    """The paths that only larger inputs take: several sequences at a time, and one by one.

    With 32 tokens (4 heads, 6 features) to a block, 6 sequences of 10 are taken in threes, 5 one by
    one, and 70 tokens in three blocks. Catches a batch that is put together in another order.
    """
    monkeypatch.setattr(la, 'BLOCK_FEATURES', {'cpu': 32 * 4 * 6})
    monkeypatch.setattr(la, 'BLOCK_TOKENS', 32)
    monkeypatch.setattr(la, 'CHUNK', {'cpu': 16})
    arrays = inputs((batch,), num_tokens, num_tokens)
    key_mask = draw_mask(0.6, (batch, num_tokens))
    function = la.linear_attention if form == 'all' else la.causal_linear_attention
    function = functools.partial(function, key_mask=key_mask, **options('log_positive'))
    mask = pairs(num_tokens, num_tokens, key_mask, causal=form == 'causal')
    assert_close(jax.jit(function)(*arrays), quadratic('log_positive', *float64(*arrays), mask))


@pytest.mark.parametrize('form', ['all', 'causal', 'segments', 'prefix', 'states'])
def test_the_feature_map_sees_blocks_alone(form):
    """Catches features of all tokens at once: the feature map never gets more than a block's.

    Blocks are of 8 tokens, of which a map sees those of the 2 heads that share a key head.
    """
    tokens = []

    def feature_map(x):
        tokens.append(x.shape[-2])
        return x

    arrays = inputs((), 64, 64)
    segment_ids = np.arange(64) // 10
    attend = {
        'all': la.linear_attention,
        'causal': la.causal_linear_attention,
        'segments': functools.partial(la.linear_attention, segment_ids=segment_ids),
        'prefix': lambda query, *rest, **given: la.causal_linear_attention(
            query[-24:], *rest, **given
        ),
        'states': functools.partial(decode, prompt=40, tokens=24),
    }[form]
    jax.make_jaxpr(jax.grad(lambda *x: jnp.sum(attend(*x, feature_map=feature_map, block_size=8))))(
        *arrays
    )
    assert max(tokens) == 16


def decode(query, key, value, *, prompt, tokens, key_mask=None, signed=False, **given):
    """Causal attention by states: a prompt of unread keys, then `tokens` at a time.

    Outputs of the prompt, which nobody asked for, are zeros.
    """
    batch_axes = query.ndim - 3
    if key_mask is None:
        key_mask = jnp.ones(key.shape[: batch_axes + 1], bool)
    start, rest = (
        [jax.lax.slice_in_dim(x, *part, axis=batch_axes) for x in (query, key, value, key_mask)]
        for part in ((0, prompt), (prompt, query.shape[batch_axes]))
    )
    state = la.init_state(key, value, given['feature_map'])
    if prompt:
        state = la.absorb(state, *start[1:3], key_mask=start[3], **given)

    def split(x):
        x = x.reshape(*x.shape[:batch_axes], -1, tokens, *x.shape[batch_axes + 1 :])
        return jnp.moveaxis(x, batch_axes, 0)

    def step(state, new):
        *arrays, key_mask = new
        output, state = la.extend(state, *arrays, key_mask=key_mask, signed=signed, **given)
        return state, output

    _, output = jax.lax.scan(step, state, tuple(split(x) for x in rest))
    output = jnp.moveaxis(output, 0, batch_axes)
    output = output.reshape(*query.shape[:batch_axes], -1, *output.shape[-2:])
    padding = [(0, 0)] * output.ndim
    padding[batch_axes] = (prompt, 0)
    return jnp.pad(output, padding)


@pytest.mark.parametrize(
    ('kind', 'prompt', 'tokens'),
    [(kind, 0, 1) for kind in KINDS] + [('positive', 5, 3), ('trigonometric', 5, 3)],
)
def test_decoding_is_causal_attention(kind, prompt, tokens):
    """One token at a time, and a prompt and then three; two batch axes, some keys masked.

    Catches a state that forgets its scale, and a token that does not see itself or sees more.
    """
    arrays = inputs((2, 2))
    key_mask = draw_mask(0.6, (2, 2, 11))
    output = jax.jit(
        functools.partial(decode, prompt=prompt, tokens=tokens, block_size=2, **options(kind))
    )(*arrays, key_mask=key_mask)
    expected = quadratic(kind, *float64(*arrays), pairs(11, 11, key_mask, causal=True))
    assert_close(output[..., prompt:, :, :], expected[..., prompt:, :, :])


@pytest.mark.parametrize('kind', ['signed', 'log_positive', 'trigonometric'])
def test_reading_what_was_absorbed_is_bidirectional_attention(kind):
    """Keys in two parts; the state has the shape and dtype that `init_state` gave it."""
    given = options(kind)
    is_signed = given.pop('signed')
    query, key, value = inputs(num_keys=13)

    @jax.jit
    def attend(query, key, value):
        shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value))
        empty = la.init_state(*shapes, **given)
        state = la.absorb(empty, key[:, :6], value[:, :6], **given)
        state = la.absorb(state, key[:, 6:], value[:, 6:], block_size=3, **given)
        for before, after in zip(jax.tree.leaves(empty), jax.tree.leaves(state), strict=True):
            assert (before.shape, before.dtype) == (after.shape, after.dtype)
        return la.read(state, query, signed=is_signed, dtype=jnp.bfloat16, block_size=4, **given)

    output = attend(query, key, value)
    assert output.dtype == jnp.bfloat16
    expected = quadratic(kind, *float64(query, key, value), np.ones((11, 13), bool))
    assert_close(output, expected, 2**-8)


def test_features_themselves():
    """No feature map: `query` and `key` are features; catches one applied by default."""
    query, key, value = inputs()
    query, key = np.abs(query), np.abs(key)
    weights = np.einsum('bngpr,bmgr->bnmgp', query.reshape(2, 11, 2, 2, 3), key)
    weights /= weights.sum(axis=2, keepdims=True)
    expected = np.einsum('bnmgp,bmgd->bngpd', weights, value).reshape(2, 11, 4, 2)
    assert_close(jax.jit(la.linear_attention)(query, key, value), expected)
    assert_close(jax.jit(la.quadratic_attention)(query, key, value), expected)


def by_head(factor, kind='positive'):
    """A map of [..., G, T, D'] to which vectors of key head g are g + `factor` times as long."""
    return lambda x: MAPS[kind](x * (jnp.arange(x.shape[-3])[:, None, None] + factor), jnp)


@pytest.mark.parametrize(
    ('form', 'kind'),
    [(form, 'positive') for form in ('all', 'causal', 'segments', 'prefix', 'states', 'any mask')]
    + [('all', 'log_positive'), ('causal', 'log_positive')],
)
def test_keys_may_have_a_map_of_their_own(form, kind):
    """Against the features themselves in the place of queries and keys, for which no map is needed.

    Catches the map of one side applied to the other, in any order of the sums, and key heads that
    are not the third axis from the right of what a map sees.
    """
    maps = {'feature_map': by_head(0.5, kind), 'key_feature_map': by_head(2, kind)}
    query, key, value = inputs((2, 3))

    def heads_first(x):
        """[..., N, G·P, D] to [..., G, N·P, D]."""
        x = x.reshape(*x.shape[:-2], 2, -1, x.shape[-1])
        return jnp.moveaxis(x, -3, -4).reshape(*x.shape[:-4], 2, -1, x.shape[-1])

    def heads_last(features):
        features = features.reshape(2, 3, 2, 11, -1, features.shape[-1])
        return jnp.moveaxis(features, -4, -3).reshape(2, 3, 11, -1, features.shape[-1])

    def features(side, x):
        features = maps[side](heads_first(x))
        return heads_last(features if kind == 'positive' else jnp.exp(features.log_value))

    segment_ids = np.arange(11) // 4
    mask = draw_mask(0.6, (2, 3, 4, 11, 11))

    def attend(query, key, value, **given):
        if form == 'all':
            return la.linear_attention(query, key, value, block_size=4, **given)
        if form == 'segments':
            return la.linear_attention(
                query, key, value, segment_ids=segment_ids, block_size=4, **given
            )
        if form == 'any mask':
            return la.quadratic_attention(query, key, value, mask=mask, **given)
        if form == 'states' and given:
            state = la.init_state(key, value, given['key_feature_map'])
            state = la.absorb(state, key[:, :, :5], value[:, :, :5], given['key_feature_map'])
            first = la.read(state, query[:, :, :1], given['feature_map'])
            arrays = (x[:, :, 5:] for x in (query, key, value))
            return jnp.concatenate([first, la.extend(state, *arrays, **given)[0]], axis=2)
        if form == 'states':
            first = la.linear_attention(query[:, :, :1], key[:, :, :5], value[:, :, :5])
            rest = la.causal_linear_attention(query[:, :, 5:], key, value)
            return jnp.concatenate([first, rest], axis=2)
        if form == 'prefix':
            query = query[:, :, 5:]
        return la.causal_linear_attention(query, key, value, block_size=4, **given)

    def loss(with_maps, *arrays):
        if with_maps:
            output = attend(*arrays, **maps)
        else:
            query, key, value = arrays
            sides = (('feature_map', query), ('key_feature_map', key))
            output = attend(*(features(side, x) for side, x in sides), value)
        return jnp.sum(jnp.sin(output)), output

    run = jax.jit(jax.grad(loss, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
    gradients, output = run(True, query, key, value)
    expected_gradients, expected = run(False, query, key, value)
    assert_close(output, expected, 1e-4)
    assert_close(gradients, expected_gradients, 1e-3)


@pytest.mark.parametrize('block_size', [None, 4])
@pytest.mark.parametrize('form', ['all', 'causal'])
def test_feature_maps_may_compute_in_bfloat16(form, block_size):
    """Catches sums in the features' own dtype: 300 keys, where bfloat16 stops counting at 256."""
    query, key, value = (x.astype(jnp.bfloat16) for x in inputs((), 300, 300))
    value = value * 0 + np.arange(300)[:, None, None].astype(jnp.bfloat16)
    attend = la.linear_attention if form == 'all' else la.causal_linear_attention
    output = jax.jit(functools.partial(attend, feature_map=jnp.ones_like, block_size=block_size))(
        query, key, value
    )
    sums = np.cumsum(float64(value)[0][:, 0, 0])
    expected = sums / np.arange(1, 301) if form == 'causal' else np.full(300, sums[-1] / 300)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(output, np.float64),
        np.broadcast_to(expected[:, None, None], output.shape),
        2**-8,
    )


@pytest.mark.parametrize('kind', KINDS)
def test_causality(kind):
    """Later tokens, near or 1,000 times as large, leave earlier outputs and gradients as they are.

    To the last bit, at a position within a chunk. Catches a mask that is off by one, and a scale
    that is taken over keys that a query may not see.
    """
    cut, arrays, cotangent = 6, inputs(), normal(2, 11, 4, 2)
    cotangent[:, cut:] = 0
    early = functools.partial(with_gradients('causal', kind, 4), cotangent, np.ones((2, 11), bool))
    output, gradients = early(*arrays)
    assert all(np.any(gradient[:, :cut] != 0) for gradient in gradients)
    for scale in (1, 1e3):
        others = inputs(seed=10)
        changed = [
            np.concatenate([x[:, :cut], scale * y[:, cut:]], axis=1)
            for x, y in zip(arrays, others, strict=True)
        ]
        new_output, new_gradients = early(*changed)
        np.testing.assert_array_equal(new_output[:, :cut], output[:, :cut])
        for gradient, new_gradient in zip(gradients, new_gradients, strict=True):
            np.testing.assert_array_equal(gradient[:, cut:], 0)
            np.testing.assert_array_equal(new_gradient[:, cut:], 0)
            np.testing.assert_array_equal(new_gradient[:, :cut], gradient[:, :cut])


@properties(max_examples=15)
@given(
    st.sampled_from(['positive', 'trigonometric']),
    st.permutations(range(11)),
    st.permutations(range(11)),
)
def test_permutations(kind, query_order, key_order):
    """Queries permute outputs, keys change nothing; catches blocks that weigh differently."""
    query, key, value = inputs()
    key_mask = draw_mask(0.6, (2, 11))
    output = attend('all', kind, 4)(query, key, value, key_mask=key_mask)
    query_order, key_order = np.array(query_order), np.array(key_order)
    permuted = attend('all', kind, 4)(
        query[:, query_order],
        key[:, key_order],
        value[:, key_order],
        key_mask=key_mask[:, key_order],
    )
    assert_close(permuted, np.asarray(output)[:, query_order])


@pytest.mark.parametrize('kind', ['positive', 'log_positive', 'trigonometric'])
@pytest.mark.parametrize('form', ['all', 'causal'])
@pytest.mark.parametrize('padding', [slice(5), slice(6, None)])
def test_padding_has_no_effect(form, kind, padding):
    """Masked tokens before or after a sequence, their keys and values NaN, change nothing.

    Catches masking by a product, which lets NaN through as 0 · NaN, forwards or backwards.
    """
    arrays, cotangent = inputs(), normal(2, 11, 4, 2)
    key_mask = np.ones((2, 11), bool)
    key_mask[:, padding] = False
    cotangent[:, padding] = 0
    expected = reference_gradients(
        kind, cotangent, pairs(11, 11, key_mask, causal=form == 'causal'), *arrays
    )
    for x in arrays[1:]:
        x[:, padding] = np.nan
    output, gradients = with_gradients(form, kind, 4)(cotangent, key_mask, *arrays)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[:, padding], 0)
    assert_close((output, gradients), expected)


# A device axis.


def on_devices(how, function):
    """`function` of arrays whose token axis, 1, is split over the four devices."""
    if how == 'shard_map':
        mesh = jax.make_mesh((4,), ('tokens',), axis_types=(jax.sharding.AxisType.Auto,))
        specs = jax.P(None, 'tokens')
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs)
    split = jax.pmap(function, 'tokens', in_axes=1, out_axes=1)

    def run(*arrays):
        arrays = [x.reshape(x.shape[0], 4, -1, *x.shape[2:]) for x in arrays]
        output = split(*arrays)
        return output.reshape(output.shape[0], -1, *output.shape[3:])

    return run


@pytest.mark.parametrize('form', ['all', 'causal'])
@pytest.mark.parametrize(
    ('how', 'kind'),
    [('pmap', 'log_positive'), ('shard_map', 'signed'), ('shard_map', 'trigonometric')],
)
def test_splitting_over_devices(how, form, kind):
    """Outputs and gradients of a sequence on four devices are those of the sequence on one.

    The first device's keys are masked, as those of some others. Catches states that are summed
    with different scales, a device that sees its own keys twice, and gradients that stop there.
    """
    function = la.linear_attention if form == 'all' else la.causal_linear_attention
    arrays, cotangent = inputs((2,), 20, 20), normal(2, 20, 4, 2)
    key_mask = draw_mask(0.6, (2, 20))
    key_mask[:, :5] = False

    def attend(query, key, value, key_mask):
        given = options(kind) | {'axis_name': 'tokens', 'block_size': 3}
        return function(query, key, value, key_mask=key_mask, **given)

    split = on_devices(how, attend)

    @jax.jit
    def run(*arrays):
        output, transpose = jax.vjp(lambda *x: split(*x, key_mask), *arrays)
        return output, transpose(cotangent)

    expected = reference_gradients(
        kind, cotangent, pairs(20, 20, key_mask, causal=form == 'causal'), *arrays
    )
    assert_close(run(*arrays), expected)


@pytest.mark.parametrize('form', ['causal', 'prefix', 'segments', 'states'])
def test_whole_sequences_on_each_device(form):
    """Loops under `shard_map`: catches a carry that starts out alike on every device."""
    kind = 'log_positive'
    query, key, value = inputs((4,))
    segment_ids = np.arange(11) // 4

    def attend(query, key, value):
        given = options(kind) | {'block_size': 3}
        if form == 'states':
            return decode(query, key, value, prompt=5, tokens=3, **given)
        if form == 'segments':
            return la.linear_attention(query, key, value, segment_ids=segment_ids, **given)
        start = 7 if form == 'prefix' else 0
        return la.causal_linear_attention(query[:, start:], key, value, **given)

    mesh = jax.make_mesh((4,), ('batch',), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(attend, mesh=mesh, in_specs=jax.P('batch'), out_specs=jax.P('batch'))
    output = jax.jit(split)(query, key, value)
    ids = segment_ids if form == 'segments' else None
    mask = pairs(11, 11, None, ids, form != 'segments')
    expected = quadratic(kind, *float64(query, key, value), mask)
    start = {'prefix': 7, 'states': 5}.get(form, 0)
    assert_close(output[:, -(11 - start) :], expected[:, start:])


@pytest.mark.parametrize('causal', [False, True])
def test_segments_of_each_device(causal):
    """Tokens that all devices have, in runs that only one has: the carry differs nevertheless."""
    kind = 'log_positive'
    arrays = inputs((1,))
    segment_ids = np.arange(11) // np.array([[2], [3], [4], [11]])
    attend = la.causal_linear_attention if causal else la.linear_attention

    def of_one(ids):
        return attend(*arrays, segment_ids=ids, **options(kind), block_size=3)

    mesh = jax.make_mesh((4,), ('batch',), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(of_one, mesh=mesh, in_specs=jax.P('batch'), out_specs=jax.P('batch'))
    for ids, output in zip(segment_ids, jax.jit(split)(segment_ids), strict=True):
        expected = quadratic(kind, *float64(*arrays), pairs(11, 11, None, ids, causal))
        assert_close(output[None], expected)


# Derivatives.


@functools.cache
def _reference_gradients(kind):
    def run(cotangent, mask, *arrays):
        function = functools.partial(quadratic, kind, mask=mask, xp=jnp)
        output, transpose = jax.vjp(function, *arrays)
        return output, transpose(cotangent)

    return jax.jit(run)


def reference_gradients(kind, cotangent, mask, *arrays):
    """The quadratic output and its pulled back cotangent, differentiated in float64."""
    with jax.enable_x64(True):
        cotangent, *arrays = float64(cotangent, *arrays)
        mask = np.broadcast_to(mask, (arrays[0].shape[0], *mask.shape[-2:]))
        result = _reference_gradients(kind)(cotangent, mask, *arrays)
    return jax.tree.map(np.asarray, result)


@pytest.mark.parametrize('form', ['all', 'causal'])
@pytest.mark.parametrize('kind', KINDS)
def test_gradients(form, kind):
    """Catches a stopped gradient that does not cancel, and a backward pass of another function."""
    arrays, cotangent = inputs(), normal(2, 11, 4, 2)
    key_mask = draw_mask(0.6, (2, 11))
    mask = pairs(11, 11, key_mask, causal=form == 'causal')
    expected = reference_gradients(kind, cotangent, mask, *arrays)
    assert_close(with_gradients(form, kind, 4)(cotangent, key_mask, *arrays), expected)


@pytest.mark.parametrize(
    ('form', 'kind', 'block_size'),
    [
        ('prefix', 'log_positive', 4),
        ('states', 'log_positive', 2),
        ('segments', 'log_signed', 4),
        ('causal segments', 'log_positive', 4),
    ],
)
def test_gradients_of_other_orders(form, kind, block_size):
    """Catches a gradient that stops at a prefix, a prompt, or the edge of a chunk."""
    arrays, cotangent = inputs(), normal(2, 11, 4, 2)
    key_mask = draw_mask(0.6, (2, 11))
    unread = {'prefix': 7, 'states': 5}.get(form, 0)
    cotangent[:, :unread] = 0
    given = options(kind) | {'block_size': block_size, 'key_mask': key_mask}
    if 'segments' in form:
        given['segment_ids'] = np.array([[0] * 6 + [1] * 5, [0, 1, 1, 0, 0, 0, 0, 0, 0, 2, 2]])

    def attend(query, key, value):
        if form == 'states':
            return decode(query, key, value, prompt=unread, tokens=3, **given)
        function = la.linear_attention if form == 'segments' else la.causal_linear_attention
        return function(query[:, unread:], key, value, **given)

    @jax.jit
    def run(*arrays):
        output, transpose = jax.vjp(attend, *arrays)
        return transpose(cotangent[:, -output.shape[1] :])

    mask = pairs(11, 11, key_mask, given.get('segment_ids'), form != 'segments')
    assert_close(run(*arrays), reference_gradients(kind, cotangent, mask, *arrays)[1])


def test_derivatives_against_finite_differences():
    """Forward and reverse mode in float64; catches what the reference's derivatives share."""
    with jax.enable_x64(True):
        arrays = float64(*inputs((), 5, 5, 2, 1, 2, 2))
        function = attend('causal', 'log_positive', 2)
        check_grads(function, arrays, order=1, eps=1e-5, atol=1e-7, rtol=1e-7)


def test_second_derivatives():
    """A Hessian times a vector; catches constants of the first derivative that do not cancel."""
    arrays = inputs((1,), 5, 5, 2, 1, 2, 2)
    tangents = inputs((1,), 5, 5, 2, 1, 2, 2, seed=7)

    def product(function, arrays, tangents):
        def gradient(*arrays):
            return jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), argnums=(0, 1, 2))(*arrays)

        return jax.jit(lambda x, y: jax.jvp(gradient, x, y)[1])(arrays, tangents)

    actual = product(attend('causal', 'log_positive', 2), arrays, tangents)
    mask = pairs(5, 5, causal=True)
    with jax.enable_x64(True):
        reference = functools.partial(quadratic, 'log_positive', mask=mask, xp=jnp)
        expected = product(reference, float64(*arrays), float64(*tangents))
        expected = jax.tree.map(np.asarray, expected)
    assert_close(actual, expected, 1e-4)


def test_transformations():
    """`vmap` of `checkpoint` in a `scan` over layers; catches a shape or a name that is assumed.

    Three layers of self-attention, every layer's output the next one's input, for two batches,
    against the layers one by one.
    """
    x = normal(2, 3, 11, 2, 4)
    weights = normal(3, 4, 4, seed=1)
    kernel = attend('causal', 'log_positive', 4)

    @jax.checkpoint
    def layer(x, weight):
        return x + kernel(x @ weight, x, x), None

    def loss(weights, x):
        return jnp.sum(jax.vmap(lambda x: jax.lax.scan(layer, x, weights)[0])(x) ** 2)

    value, gradient = jax.jit(jax.value_and_grad(loss))(weights, x)

    def expected_loss(weights, x):
        mask = pairs(11, 11, causal=True)
        for weight in weights:
            x = x + quadratic('log_positive', x @ weight, x, x, mask, jnp)
        return jnp.sum(x**2)

    with jax.enable_x64(True):
        expected = jax.jit(jax.value_and_grad(expected_loss))(*float64(weights, x))
        expected = jax.tree.map(np.asarray, expected)
    assert_close((value, gradient), expected, 1e-4)


@pytest.mark.parametrize('value_size', [63, 64])
def test_products_with_tokens_for_columns(value_size):
    """Catches a wrong product where they are turned, or a barrier that stops a transformation.

    One head of 256 tokens and features is turned from 2²² / 2¹⁶ = 64 values and one on.
    """
    query, key = (np.abs(normal(2, 1, 256, 1, 256, seed=seed)) for seed in (0, 1))
    value = normal(2, 1, 256, 1, value_size)
    assert la._is_turned(query[0, 0, :, 0], value_size + 1) == (value_size == 64)

    def quotient(query, key, value, xp=np):
        weights = query @ xp.swapaxes(key, -1, -2)
        return weights @ value / weights.sum(axis=-1, keepdims=True)

    tangents = tuple(normal(*x.shape, seed=7) for x in (query, key, value))
    kernel = jax.vmap(la.linear_attention)

    @jax.jit
    def derivatives(primals, tangents):
        output, tangent = jax.jvp(kernel, primals, tangents)
        return output, tangent, jax.vjp(kernel, *primals)[1](tangents[2])

    with jax.enable_x64(True):
        heads_first = [jnp.asarray(x[..., 0, :], jnp.float64) for x in (query, key, value)]
        directions = tuple(jnp.asarray(x[..., 0, :], jnp.float64) for x in tangents)
        expected, tangent = jax.jvp(
            functools.partial(quotient, xp=jnp), tuple(heads_first), directions
        )
        gradients = jax.vjp(functools.partial(quotient, xp=jnp), *heads_first)[1](directions[2])
        expected = jax.tree.map(
            lambda x: np.asarray(x)[..., None, :], (expected, tangent, gradients)
        )
    assert_close(derivatives((query, key, value), tangents), expected, 1e-5)


# Rows without keys, extreme features, and cancelled normalisers.


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('form', ['all', 'causal'])
def test_rows_without_keys_are_zeros(form, kind):
    """Catches 0/0 in the output, and in the gradient, where `where` hides it from the output.

    The first sequence has no key at all; of the second causal queries before its first key.
    """
    arrays, cotangent = inputs(), normal(2, 11, 4, 2)
    key_mask = np.arange(11) >= np.array([11, 6])[:, None]
    empty = ~pairs(11, 11, key_mask, causal=form == 'causal').any(axis=-1)
    output, gradients = with_gradients(form, kind, 4)(cotangent, key_mask, *arrays)
    np.testing.assert_array_equal(np.asarray(output)[empty], 0)
    assert np.all(np.asarray(output)[~empty] != 0)
    np.testing.assert_array_equal(np.asarray(gradients[0])[empty], 0)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[0], 0)
        assert np.all(np.isfinite(gradient))
        assert np.any(gradient[1] != 0)


@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('form', ['all', 'causal'])
def test_queries_without_features_are_zeros(form, signed):
    """A normaliser of 0 without a mask: features that are all 0, as a ReLU's without its ε.

    Catches a gradient that passes where the output is a constant.
    """
    query, key, value = (np.abs(x) for x in inputs())
    query[:, 3] = 0
    function = la.linear_attention if form == 'all' else la.causal_linear_attention
    function = functools.partial(function, signed=signed, block_size=4)

    @jax.jit
    def run(*arrays):
        output, transpose = jax.vjp(function, *arrays)
        return output, transpose(10 * output + 10)

    output, gradients = run(query, key, value)
    np.testing.assert_array_equal(output[:, 3], 0)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
    np.testing.assert_array_equal(gradients[0][:, 3], 0)


@pytest.mark.parametrize('kind', ['positive', 'log_positive', 'trigonometric'])
def test_reading_an_empty_state_gives_zeros(kind):
    query, key, value = inputs()
    given = options(kind)
    state = la.init_state(key, value, given['feature_map'])
    output = jax.jit(functools.partial(la.read, **given))(state, query)
    np.testing.assert_array_equal(output, np.zeros((2, 11, 4, 2)))


def extreme_inputs(scale):
    """Log features that float32 adds without rounding: multiples of 1/64 below 2^17 / 64."""
    rng = np.random.default_rng(3)
    query, key = (
        np.round(64 * rng.uniform(-scale, scale, (2, 11, heads, 6))) / 64 for heads in (4, 2)
    )
    value = rng.normal(size=(2, 11, 2, 2))
    return tuple(x.astype(np.float32) for x in (query, key, value))


@pytest.mark.parametrize('form', ['quadratic', 'all', 'states'])
def test_extreme_features_are_exact(monkeypatch, form):
    """|log φ| up to 10⁵ where float32 ends at e^88, forward and backward.

    Catches an exponential that is taken before the largest logarithm, or one that is the largest
    over too much: over all keys, say, and not those of one feature.
    """
    cotangent = normal(2, 11, 4, 2)
    given = options('log_itself') | {'block_size': None if form == 'quadratic' else 4}
    function = la.linear_attention
    if form == 'quadratic':
        monkeypatch.setattr(la, '_quadratic_is_cheaper', lambda inputs: True)
    elif form == 'states':
        function = functools.partial(decode, prompt=0, tokens=1)

    @jax.jit
    def run(*arrays):
        output, transpose = jax.vjp(functools.partial(function, **given), *arrays)
        return output, transpose(cotangent)

    mask = pairs(11, 11, causal=form == 'states')
    for scale in (30, 1e3, 1e5):
        arrays = extreme_inputs(scale)
        expected = reference_gradients('log_itself', cotangent, mask, *arrays)
        assert_close(run(*arrays), expected)


@pytest.mark.parametrize('size', [1.0, 1e6])
@pytest.mark.parametrize('scale', [30, 1e3, 1e5])
def test_extreme_features_in_chunks(scale, size):
    """Finite and causal at any size, of the features and of the cotangent; exact for 30.

    Catches the derivative of a logarithm of what has underflowed.
    """
    cut, arrays = 6, extreme_inputs(scale)
    cotangent = size * normal(2, 11, 4, 2)
    mask = np.ones((2, 11), bool)
    output, gradients = with_gradients('causal', 'log_itself', 4)(cotangent, mask, *arrays)
    value = arrays[2]
    for n in range(11):
        # Averages of the values so far.
        seen = np.repeat(value[:, : n + 1], 2, axis=2)
        assert np.all(output[:, n] <= seen.max(axis=1) + 1e-5)
        assert np.all(output[:, n] >= seen.min(axis=1) - 1e-5)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
    changed = [x.copy() for x in arrays]
    for x in changed:
        x[:, cut:] = -x[:, cut:]
    new_output, _ = with_gradients('causal', 'log_itself', 4)(cotangent, mask, *changed)
    np.testing.assert_array_equal(new_output[:, :cut], output[:, :cut])
    if scale == 30:
        expected = reference_gradients('log_itself', cotangent, pairs(11, 11, causal=True), *arrays)
        assert_close((output, gradients), expected)


def test_the_gradient_of_products_that_underflow():
    """The smallest case: both of a query's products are e^-200 of what they were divided by.

    Catches infinity times zero in the derivative of their logarithm.
    """
    query = np.array([[0, -200], [0, -200]], np.float32)[:, None]
    key = np.array([[-200, 0], [-200, 0]], np.float32)[:, None]
    value = np.array([[1], [-1]], np.float32)[:, None]
    given = {'feature_map': la.LogFeatures}
    for attend in (
        functools.partial(la.causal_linear_attention, **given),
        functools.partial(la.quadratic_attention, mask=np.tri(2, dtype=bool), **given),
    ):
        loss = jax.jit(jax.grad(lambda *x, attend=attend: 10 * jnp.sum(attend(*x)), (0, 1, 2)))
        assert all(np.all(np.isfinite(gradient)) for gradient in loss(query, key, value))


@pytest.mark.parametrize(('form', 'shift'), [('all', 1e4), ('states', 1e4), ('causal', 8)])
def test_scales_cancel(form, shift):
    """A feature's logarithm moved from keys to queries, and a factor for a query, change nothing.

    Catches a scale that is left out, inverted, or on the wrong axis. Chunks divide tokens by their
    own largest feature, and lose the others where that is more than e^87 times as large.
    """
    query, key, value = extreme_inputs(2)
    rng = np.random.default_rng(5)
    by_feature = np.round(rng.uniform(-shift, shift, (2, 1, 2, 6)))
    by_query = np.round(rng.uniform(-shift, shift, (2, 11, 4, 1)))
    given = options('log_itself') | {'block_size': 4}
    function = {
        'all': la.linear_attention,
        'states': functools.partial(decode, prompt=5, tokens=1),
        'causal': la.causal_linear_attention,
    }[form]
    function = jax.jit(functools.partial(function, **given))
    moved = (query + by_query - np.repeat(by_feature, 2, axis=2), key + by_feature)
    moved = [x.astype(np.float32) for x in moved]
    assert_close(function(*moved, value), np.asarray(function(query, key, value), np.float64))


@pytest.mark.parametrize('form', ['quadratic', 'all', 'causal', 'chunks'])
def test_cancelled_normalisers(monkeypatch, form):
    """Products 1 and -1 - excess: their sum is taken for 1e-6 of its terms, with its sign.

    Catches a division by 0 or by what rounding left, and a floor that changes the sign.
    """
    monkeypatch.setattr(la, '_quadratic_is_cheaper', lambda inputs: form == 'quadratic')
    query = np.ones((2, 1, 2), np.float32)
    value = np.array([1, -1], np.float32).reshape(2, 1, 1)
    attend = la.linear_attention if form in ('quadratic', 'all') else la.causal_linear_attention
    attend = functools.partial(attend, signed=True, block_size=1 if form == 'chunks' else None)

    @jax.jit
    def run(*arrays):
        output, transpose = jax.vjp(attend, *arrays)
        return output[-1, 0, 0], transpose(jnp.ones_like(output))

    for excess, sign in ((0, 1), (2**-23, -1)):
        key = np.array([[[2, -1]], [[-1 - excess, 0]]], np.float32)
        output, gradients = run(query, key, value)
        # The terms are 2, or the products of the norms, up to √2·√5 + 1.
        assert 2 / 4.2e-6 <= sign * output <= 2 / 1.9e-6
        assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
        weights = la.attention_matrix(query, key, signed=True)
        np.testing.assert_allclose(weights[0, -1], [sign * 5e5, -sign * 5e5], rtol=1e-5)


# Cost.


def temporary_bytes(function, *shapes):
    """What the compiled gradient of `function` holds beyond its arguments and results."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    gradient = jax.grad(lambda *x: jnp.sum(function(*x) ** 2), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_no_loop_over_single_tokens():
    """Catches a scan of N steps, which is what the slow causal forms are."""
    x = jnp.ones((1, 1024, 2, 4))
    for attend in (la.linear_attention, la.causal_linear_attention):
        jaxpr = jax.make_jaxpr(all_gradients(attend))(x, x, x).jaxpr
        steps = [times for _, times in equations(jaxpr)]
        assert max(steps) <= 1024 // la.CHUNK['cpu']


@pytest.mark.parametrize('attend', [la.linear_attention, la.causal_linear_attention])
def test_shared_key_heads_are_not_copied(attend):
    """Catches keys, or their features, that are repeated for each of their 16 query heads."""
    query, key = jnp.ones((1, 2, 16, 4)), jnp.ones((1, 512, 1, 4))
    if attend is la.causal_linear_attention:
        attend = functools.partial(attend, block_size=64)
    assert largest_array(all_gradients(attend), query, key, key) < 2 * key.size


@pytest.mark.parametrize('is_causal', [False, True])
def test_only_states_pass_between_devices(is_causal):
    """Catches keys, values or features that are sent, and more than one sum of states."""
    attend = la.causal_linear_attention if is_causal else la.linear_attention
    attend = functools.partial(attend, **options('log_positive'), axis_name='devices')
    x = jnp.ones((4, 100, 2, 3))
    jaxpr = jax.make_jaxpr(attend, axis_env=[('devices', 4)])(x[0], x[0], x[0]).jaxpr
    sent = [
        (eqn.primitive.name, sum(v.aval.size for v in eqn.invars))
        for eqn, _ in equations(jaxpr)
        if eqn.primitive.name in ('psum', 'psum_invariant', 'pmax', 'all_gather', 'ppermute')
    ]
    state, scale = 2 * (3 + 1) * 6, 2 * 6
    kinds = ['all_gather', 'all_gather'] if is_causal else ['pmax', 'psum']
    assert sorted(sent) == sorted(zip(kinds, (scale, state), strict=True))


@pytest.mark.parametrize('form', ['all', 'causal', 'many sequences'])
def test_memory_of_the_gradient(monkeypatch, form):
    """Linear in the tokens, and below half of what their features alone would take.

    R is 64 times D', so that features are what counts. Catches features of all tokens at once, a
    matrix of N×M, and a backward pass that keeps a state a token.
    """
    dim, num_features = 4, 256
    matrix = normal(dim, num_features)
    num_tokens, batches, given = 8192, (1, 1), {'block_size': 128}
    if form == 'many sequences':
        monkeypatch.setattr(la, 'BLOCK_FEATURES', {'cpu': 2**14})
        num_tokens, batches, given = 64, (64, 128), {}
    attend = la.causal_linear_attention if form == 'causal' else la.linear_attention
    sizes = []
    for factor, batch in zip((1, 2), batches, strict=True):
        length = num_tokens * (factor if batch == 1 else 1)
        function = functools.partial(
            attend, feature_map=lambda x: la.LogFeatures(x @ matrix), **given
        )
        sizes.append(temporary_bytes(function, *[(batch, length, 1, dim)] * 3))
    assert sizes[0] < num_tokens * batches[0] * num_features * 4 / 2
    assert sizes[1] < 2.1 * sizes[0]


@pytest.mark.parametrize(
    ('is_cheaper', 'kind'),
    [(True, kind) for kind in KINDS] + [(False, 'signed'), (False, 'log_positive')],
)
def test_both_orders_give_the_same(monkeypatch, is_cheaper, kind):
    """Catches a mask, a scale or a bound that one order of the products treats differently."""
    monkeypatch.setattr(la, '_quadratic_is_cheaper', lambda inputs: is_cheaper)
    arrays, cotangent = inputs(), normal(2, 11, 4, 2)
    key_mask = draw_mask(0.6, (2, 11))
    key_mask[0] = False

    @jax.jit
    def run(*arrays):
        function = functools.partial(la.linear_attention, key_mask=key_mask, **options(kind))
        output, transpose = jax.vjp(function, *arrays)
        return output, transpose(cotangent)

    expected = reference_gradients(kind, cotangent, pairs(11, 11, key_mask), *arrays)
    actual = run(*arrays)
    assert_close(actual, expected)
    assert all(np.all(x[0] == 0) for x in jax.tree.leaves(actual))


@pytest.mark.parametrize(
    ('num_tokens', 'num_features', 'quadratic'),
    [(8, 64, True), (64, 8, False), (19, 24, True), (20, 24, False)],
)
def test_the_cheaper_order_is_taken(num_tokens, num_features, quadratic):
    """D = 16, by counting products: N²(R + D + 1) against 2N·R·(D + 1) a head.

    Catches a comparison that is the wrong way round: only one of them has an N×N array.
    """
    size = 16
    counted = num_tokens**2 * (num_features + size + 1) < 2 * num_tokens * num_features * (size + 1)
    assert counted == quadratic
    query = np.ones((num_tokens, 1, num_features), np.float32)
    value = np.ones((num_tokens, 1, size), np.float32)
    jaxpr = str(jax.make_jaxpr(la.linear_attention)(query, query, value))
    is_quadratic = f'{num_tokens},{num_tokens}]' in jaxpr
    assert is_quadratic == quadratic


# Under any mask.


@functools.cache
def under_mask(function, kind):
    return jax.jit(
        lambda query, key, *rest, mask=None: function(query, key, *rest, mask=mask, **options(kind))
    )


@pytest.mark.parametrize(
    ('kind', 'shape'),
    [(kind, (2, 4, 5, 7)) for kind in KINDS]
    + [('log_positive', shape) for shape in ((1, 1, 5, 7), (5, 7), (4, 1, 7), (2, 1, 5, 1))],
)
def test_quadratic_attention_under_any_mask(kind, shape):
    """Every head of its own; catches a mask on the wrong axis, and the matrix of another call."""
    arrays, mask = inputs((2,), 5, 7), draw_mask(0.5, shape)
    output = under_mask(la.quadratic_attention, kind)(*arrays, mask=mask)
    matrix = np.asarray(under_mask(la.attention_matrix, kind)(*arrays[:2], mask=mask))
    query, key, value = float64(*arrays)
    key, value = (np.repeat(x, 2, axis=-2) for x in (key, value))
    by_head = np.moveaxis(np.broadcast_to(mask, (2, 4, 5, 7)), 1, 0)
    for head in range(4):
        one = slice(head, head + 1)
        expected = quadratic(
            kind, query[:, :, one], key[:, :, one], value[:, :, one], by_head[head]
        )
        assert_close(output[:, :, one], expected)
    assert matrix.shape == (2, 4, 5, 7)
    np.testing.assert_allclose(
        matrix.sum(axis=-1), np.broadcast_to(mask, matrix.shape).any(axis=-1), atol=1e-5
    )
    np.testing.assert_array_equal(np.where(mask, 0, matrix), 0)
    assert_close(np.einsum('bhnm,bmhd->bnhd', matrix, value), np.asarray(output, np.float64))


@pytest.mark.parametrize('kind', ['positive', 'log_signed'])
def test_rows_without_keys_under_any_mask(kind):
    """Catches 0/0, and gradients of rows that are constants."""
    arrays, mask = inputs((2,), 5, 7), draw_mask(0.6, (2, 1, 5, 7))
    mask[:, :, 2] = False

    @jax.jit
    def run(*arrays):
        function = functools.partial(la.quadratic_attention, mask=mask, **options(kind))
        output, transpose = jax.vjp(function, *arrays)
        return output, transpose(output + 1)

    output, gradients = run(*arrays)
    np.testing.assert_array_equal(output[:, 2], 0)
    np.testing.assert_array_equal(gradients[0][:, 2], 0)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


# Bad input.

QUERY, KEY, VALUE = (
    np.zeros(shape, np.float32) for shape in ((2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 1))
)
LONG = np.zeros((2, 8, 4, 3), np.float32)
ALL, CAUSAL = la.linear_attention, la.causal_linear_attention


def extend(query, key, value, **given):
    return la.extend(la.init_state(key, value), query, key, value, **given)


BAD = {
    'key has shape': (ALL, (QUERY, KEY[:1], VALUE), {}),
    'value has shape': (ALL, (QUERY, KEY, VALUE[0]), {}),
    'query has shape': (ALL, (QUERY[0, 0], KEY[0, 0], VALUE[0, 0]), {}),
    'key has shape .*no empty axis': (ALL, (QUERY, KEY[:, :0], VALUE[:, :0]), {}),
    'query has 3 heads, key 2': (ALL, (QUERY[:, :, :3], KEY, VALUE), {}),
    'value has the shape': (ALL, (QUERY, KEY, VALUE[:, :6]), {}),
    'query has the last axis 2, key 3': (ALL, (QUERY[..., :2], KEY, VALUE), {}),
    'block_size is 0': (ALL, (QUERY, KEY, VALUE), {'block_size': 0}),
    'key_mask .*float32': (ALL, (QUERY, KEY, VALUE), {'key_mask': np.ones((2, 7), np.float32)}),
    'key_mask .*5': (CAUSAL, (QUERY, KEY, VALUE), {'key_mask': np.ones((2, 5), bool)}),
    'segment_ids .*7': (ALL, (QUERY, KEY, VALUE), {'segment_ids': np.zeros((2, 7), int)}),
    'segment_ids .*float': (ALL, (LONG, LONG, LONG), {'segment_ids': np.zeros((2, 8))}),
    'segment_ids .*6': (CAUSAL, (LONG, LONG, LONG), {'segment_ids': np.zeros((2, 6), int)}),
    r'segment_ids has shape \(\)': (ALL, (LONG, LONG, LONG), {'segment_ids': np.array(0)}),
    'segment_ids and axis_name': (
        ALL,
        (LONG, LONG, LONG),
        {'segment_ids': np.zeros((2, 8), int), 'axis_name': 'tokens'},
    ),
    'key has 7 tokens, fewer than the 8': (CAUSAL, (LONG, KEY, VALUE), {}),
    'key has 2 tokens more than query; with axis_name': (
        CAUSAL,
        (QUERY, KEY, VALUE),
        {'axis_name': 'tokens'},
    ),
    'key has 7 tokens, query 5; extend': (extend, (QUERY, KEY, VALUE), {}),
    'state is a tuple': (la.absorb, ((1, 2), KEY, VALUE), {}),
    r'state has sums \(2, 2, 2, 3\).*have \(2, 2, 4, 3\)': (
        la.absorb,
        (la.init_state(KEY, VALUE), KEY, KEY),
        {},
    ),
    r'state has sums \(2, 2, 2, 3\) and log_scale None.* \(2, 2, 3\)': (
        la.extend,
        (la.init_state(KEY, VALUE), KEY, KEY, VALUE, lambda x: la.LogFeatures(x)),
        {},
    ),
    r'state has sums \(1, 2, 2, 3\).*have \(2, 2, 2, 3\)': (
        la.read,
        (la.init_state(KEY[:1], VALUE[:1]), QUERY),
        {},
    ),
    'query has 3 heads, key 2, and': (la.read, (la.init_state(KEY, VALUE), QUERY[:, :, :3]), {}),
    'feature_map gives .*key_feature_map': (
        ALL,
        (QUERY, KEY, VALUE),
        {'key_feature_map': lambda x: x[..., :2]},
    ),
    'feature_map gives .*key_feature_map .*LogFeatures': (
        la.attention_matrix,
        (QUERY, KEY),
        {'key_feature_map': lambda x: la.LogFeatures(x)},
    ),
}


@pytest.mark.parametrize('message', BAD)
def test_bad_input_names_the_argument(message):
    function, arrays, given = BAD[message]
    with pytest.raises(BadInput, match=message):
        function(*arrays, **given)
