"""Attention by the features of queries and keys: whatever the feature map, and in linear time.

With A = φ(q) φ(k)ᵀ and D = diag(A 1), attention is D⁻¹ A v. Computed as φ(q) (φ(k)ᵀ v) over
φ(q) (φ(k)ᵀ 1) it never forms A (Choromanski et al. 2021, "Rethinking Attention with Performers",
arXiv 2009.14794, eq. (4)). Letters: N queries, M keys, H query heads, G key heads, R features,
D the values' dimension, C tokens of a block; leading axes are batch axes, of any number.

Keys are absorbed into a `State` of R×(D+1) numbers a head, from which queries read. Bidirectional
attention absorbs all keys, then reads; causal attention, decoding and sequences that are split over
devices are other orders of the same two steps.

The feature map is an argument, and is applied block by block. N×R features would be most of the
time and memory of linear attention: a block of them stays in a CPU's caches, and the backward pass
computes it anew, so that what is kept for it is of the size of q, k and v. Blocks have the key
heads in front, [..., G, T, D'] with T keys of one or T queries of the heads that share it, so that
a map may treat every key head in its own way. Keys may have another map than queries.

Maps whose features leave float32's range give `LogFeatures`. The state then holds
Σ_m φ(k_m)_r e^{-c_r} v_m with c_r the largest log φ(k_m)_r that was absorbed, and a query reads
with φ(q)_r e^{c_r - t}, t = max_r(log φ(q)_r + c_r). The factors cancel in the quotient whatever
their values, positive features have a normaliser of at least 1, and no ε is needed.

Heads may be shared: with G < H key heads, G dividing H, query head h attends to key head
h // (H / G), and no key is copied.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from performer_vit.errors import BadInput

# Stands for log 0. Finite, so that the difference of two of them is 0 and not NaN.
LOWEST = -1e30

# Signed features can cancel in the normaliser. What is smaller than this part of the terms that
# were summed is float32's rounding of 0, and is replaced by that part, with its sign. Where keys
# are read from a state, its sum is one term: what cancelled between keys before is not seen.
CANCELLED = 1e-6

# Products of two tokens' positive `LogFeatures` are at least this within a causal chunk and in the
# quadratic forms: the gradient divides by them, and must stay within float32 too.
SMALLEST = 1e-30

# Features of a block, in numbers, unless `BLOCK_TOKENS` are more: on a CPU 2 MiB of float32 stay in
# the caches. Elsewhere a block only bounds memory, and must fill the device.
BLOCK_FEATURES = {'cpu': 2**19}
BLOCK_FEATURES_ELSEWHERE = 2**26

# Tokens of a block at the least: XLA's CPU backend leaves a small product of a head to one thread,
# and 512 tokens of 256 features are large enough.
BLOCK_TOKENS = 512

# Tokens of a causal chunk. Its C×C products cost C·(R + D) a token where the state costs 2·R·D;
# the measured best on a CPU, and a width that fills the matrix units of accelerators.
CHUNK = {'cpu': 64}
CHUNK_ELSEWHERE = 128

_SAVED = 'performer_vit_saved'


class LogFeatures(NamedTuple):
    """Features factor · e^log_value, kept apart because they leave float32's range.

    Attributes:
      log_value: [..., R], or [..., 1] where all features of a token share it.
      factor: [..., R], of order 1 and of any sign; None for 1.
    """

    log_value: jax.Array
    factor: jax.Array | None = None


FeatureMap = Callable[[jax.Array], jax.Array | LogFeatures]


class State(NamedTuple):
    """What queries need to know of the keys so far; its size does not grow with their number.

    Attributes:
      sums: [..., G, D+1, R]: Σ_m v_m φ(k_m)ᵀ in the first D rows, Σ_m φ(k_m) in the last; float32
        (float64 for float64 features).
      log_scale: c [..., G, R or 1] where features are `LogFeatures`, whose `sums` are multiplied by
        e^{-c}; None for others.
    """

    sums: jax.Array
    log_scale: jax.Array | None


class _Part(NamedTuple):
    """Unfinished output of some keys: all of it is to be multiplied by e^log_scale."""

    values: jax.Array  # [..., G, T, D+1]: numerators, and the normaliser in the last column.
    log_scale: jax.Array | None  # [..., G, T]
    bound: jax.Array | None  # [..., G, T], at least |normaliser|; only for signed features.


def linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    feature_map: FeatureMap | None = None,
    *,
    key_feature_map: FeatureMap | None = None,
    key_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    signed: bool = False,
    axis_name: Any = None,
    block_size: int | None = None,
) -> jax.Array:
    """Bidirectional attention in O((N + M)·R·D) time; memory of the size of its inputs and output.

    out_n = φ(q_n)·(Σ_m φ(k_m) v_mᵀ) / φ(q_n)·Σ_m φ(k_m), sums over the keys that `key_mask` lets
    through. Where N and M are so small that φ(q) φ(k)ᵀ costs less, it is multiplied first.

    Args:
      query: [..., N, H, D'].
      key: [..., M, G, D'], G dividing H.
      value: [..., M, G, D].
      feature_map: the map of [..., G, T, D'] to features [..., G, T, R], or `LogFeatures`, that is
        applied to blocks of queries and keys; None where `query` and `key` are features themselves.
        Features must be non-negative unless `signed`.
      key_feature_map: that of keys, to as many features of the same kind; None for `feature_map`.
      key_mask: [..., M] bool, True where a key may be attended to; None for all. What the other
        positions hold, NaN included, has no effect.
      segment_ids: [..., N] integers for packed sequences, N = M: tokens attend within their run of
        equal ids alone. Time is then that of two causal passes.
      signed: whether features may be negative. The normaliser may then cancel, see `CANCELLED`.
      axis_name: of an axis of `pmap` or `shard_map` along which the tokens are split: every device
        has its queries and its keys, all keys are attended to, and one sum of the R×(D+1) states
        passes between devices.
      block_size: tokens of a block; None for the backend's default.

    Returns:
      [..., N, H, D] in `value`'s dtype; sums and the quotient are in float32 (float64 for float64
      features). A row whose normaliser is 0, as where every key is masked, is zeros, and so is its
      gradient.

    Raises:
      BadInput: arrays or feature maps that do not fit together, or a block size below 1.
    """
    inputs = _prepare(query, key, value, feature_map, key_feature_map, key_mask, signed, block_size)
    if segment_ids is not None:
        check_segments(segment_ids, query, key, axis_name)
        segments = runs(inputs.flat(segment_ids))
        return inputs.shaped(
            _attend_in_chunks(inputs, _empty_state(inputs), segments, causal=False)[0]
        )
    if axis_name is not None:
        state = _sum_over_axis(_absorb_all(inputs), axis_name)
        return inputs.shaped(_read_all(inputs, state))
    return inputs.shaped(_attend_all(inputs))


def causal_linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    feature_map: FeatureMap | None = None,
    *,
    key_feature_map: FeatureMap | None = None,
    key_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    signed: bool = False,
    axis_name: Any = None,
    block_size: int | None = None,
) -> jax.Array:
    """Attention of query n to the keys m ≤ n + (M - N), in linear time, by chunks of tokens.

    Within a chunk of C tokens φ(q) φ(k)ᵀ is masked; what came before is read from the running
    state. The backward pass keeps one state a chunk, (N/C)·R·(D+1) numbers a head, the outputs and
    their normalisers, and computes the rest anew. With more keys than queries the first M - N keys
    are a prefix that every query sees.

    For `LogFeatures` within a chunk, a key and a query are divided by the largest of their own
    features; a product of the rest below `SMALLEST` counts as that (as itself for signed features).
    With 256 softmax features of D = 64, q and k of unrelated directions have none that small up to
    |q| = |k| of about 50. Where k = -q that begins at about 30, and from 40 on it is so for half of
    the draws of W: weights among such keys are then too even.

    Args:
      query, key, value, feature_map, key_feature_map, key_mask, signed: see `linear_attention`;
        M ≥ N.
      segment_ids: [..., N], N = M: tokens attend to their own and the earlier ones of their run of
        equal ids.
      axis_name: see `linear_attention`; devices hold consecutive stretches of one sequence in the
        axis's order, N = M, and read the states of those before them.
      block_size: tokens of a chunk; None for `CHUNK`.

    Returns:
      See `linear_attention`.

    Raises:
      BadInput: see `linear_attention`; also fewer keys than queries.
    """
    inputs = _prepare(query, key, value, feature_map, key_feature_map, key_mask, signed, block_size)
    check_causal(query.shape[-3], key.shape[-3])
    prefix = inputs.key.shape[1] - inputs.query.shape[1]
    segments = None
    if segment_ids is not None:
        check_segments(segment_ids, query, key, axis_name)
        segments = runs(inputs.flat(segment_ids))
    if axis_name is not None and prefix:
        raise BadInput(
            f'key has {prefix} tokens more than query; with axis_name every device must hold as '
            'many keys as queries. Split both alike.'
        )
    state = _empty_state(inputs)
    if axis_name is not None:
        state = _states_before(_absorb_all(inputs), axis_name)
    elif prefix:
        state = _absorb_all(inputs.keys(slice(prefix)), state)
        inputs = inputs.keys(slice(prefix, None))
    return inputs.shaped(_attend_in_chunks(inputs, state, segments, causal=True)[0])


def init_state(key: Any, value: Any, feature_map: FeatureMap | None = None) -> State:
    """The state before any key.

    Args:
      key, value: arrays or `jax.ShapeDtypeStruct`s of the shapes [..., M, G, D'] and [..., M, G, D]
        that will be absorbed; M may be anything.
      feature_map: that of keys, see `linear_attention`.

    Returns:
      A `State` for `absorb`, `read` and `extend`: zeros, and a scale of `LOWEST` for log 0.
    """
    shapes = _feature_shapes(_in_float32(feature_map), key)
    return _zeros(value, shapes)


def absorb(
    state: State,
    key: jax.Array,
    value: jax.Array,
    feature_map: FeatureMap | None = None,
    *,
    key_mask: jax.Array | None = None,
    block_size: int | None = None,
) -> State:
    """The state after the keys `key` too, as of a prompt or a prefix whose outputs nobody needs.

    Args:
      state: of the keys so far, as `init_state` or this function made it.
      key, value, key_mask, block_size: see `linear_attention`.
      feature_map: that of keys.

    Returns:
      The new state.

    Raises:
      BadInput: see `linear_attention`; also a state of other arrays or features than these.
    """
    inputs = _prepare(key, key, value, feature_map, None, key_mask, False, block_size)
    _check_state(state, key, value, feature_map)
    return inputs.shaped(_absorb_all(inputs, inputs.flat_state(state)))


def read(
    state: State,
    query: jax.Array,
    feature_map: FeatureMap | None = None,
    *,
    signed: bool = False,
    dtype: Any = None,
    block_size: int | None = None,
) -> jax.Array:
    """Attention of every query to all keys of `state`.

    Args:
      state: of the keys so far.
      query, signed, block_size: see `linear_attention`.
      feature_map: that of queries.
      dtype: of the result; None for `query`'s.

    Returns:
      [..., N, H, D].

    Raises:
      BadInput: see `absorb`.
    """
    _check_is_state(state)
    groups, rows = state.sums.shape[-3:-1]
    like = jnp.zeros((*query.shape[:-3], 1, groups, 1), query.dtype)
    key = jnp.broadcast_to(like, (*like.shape[:-1], query.shape[-1]))
    value = jnp.broadcast_to(like, (*like.shape[:-1], rows - 1)).astype(dtype or query.dtype)
    inputs = _prepare(query, key, value, feature_map, None, None, signed, block_size)
    _check_state(state, key, value, feature_map)
    return inputs.shaped(_read_all(inputs, inputs.flat_state(state)))


def extend(
    state: State,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    feature_map: FeatureMap | None = None,
    *,
    key_feature_map: FeatureMap | None = None,
    key_mask: jax.Array | None = None,
    signed: bool = False,
    block_size: int | None = None,
) -> tuple[jax.Array, State]:
    """Continues causal attention: one token of a generation, or many at once.

    Args:
      state: of the keys so far.
      query, key, value, feature_map, key_feature_map, key_mask, signed, block_size: see
        `causal_linear_attention`, with N = M.

    Returns:
      [..., N, H, D], as the causal attention of the whole sequence has at these positions, but for
      rounding, `SMALLEST` and what signed features cancel; and the state after them.

    Raises:
      BadInput: see `causal_linear_attention` and `absorb`; also another number of keys than of
        queries.
    """
    inputs = _prepare(query, key, value, feature_map, key_feature_map, key_mask, signed, block_size)
    if inputs.key.shape[1] != inputs.query.shape[1]:
        raise BadInput(
            f'key has {key.shape[-3]} tokens, query {query.shape[-3]}; extend takes the same new '
            'tokens of both. Enter earlier keys with absorb.'
        )
    _check_state(state, key, value, key_feature_map or feature_map)
    state = inputs.flat_state(state)
    if inputs.query.shape[1] == 1:
        state = _absorb_all(inputs, state)
        output = _read_all(inputs, state)
    else:
        output, state = _attend_in_chunks(inputs, state, None, causal=True)
    return inputs.shaped(output), inputs.shaped(state)


def attention_matrix(
    query: jax.Array,
    key: jax.Array,
    feature_map: FeatureMap | None = None,
    *,
    key_feature_map: FeatureMap | None = None,
    mask: jax.Array | None = None,
    signed: bool = False,
) -> jax.Array:
    """The normalised attention matrix that the features imply, formed at O(N·M) memory per head.

    P_nm = A_nm / Σ_m' A_nm', A_nm = φ(q_n)·φ(k_m), sums over the keys that `mask` lets through.

    Args:
      query, key, feature_map, key_feature_map, signed: see `linear_attention`.
      mask: bool, broadcastable to [..., H, N, M], True where a query may attend to a key; None for
        all.

    Returns:
      [..., H, N, M] float32 (float64 for float64 features): rows sum to 1, or to 0 where `mask`
      lets no key through or all products are 0. For `LogFeatures` that are not `signed`, a product
      below `SMALLEST`, after dividing each token by the largest of its own features, counts as
      that.
    """
    feature_map, key_feature_map = _both_in_float32(feature_map, key_feature_map, key)
    groups = key.shape[-2]
    queries = feature_map(_heads_first(query, groups))
    keys = key_feature_map(_heads_first(key, groups))
    products, scales = _products(queries, keys)
    # [..., G, T, M] to [..., H, N, M]: the heads of a group are next to each other.
    shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    if scales is not None:
        scales = jnp.repeat(scales, shape[-3] // groups, axis=-3)
    mask = jnp.ones((), bool) if mask is None else mask
    weights, _ = _weights(products.reshape(shape), scales, mask, signed)
    normaliser = jnp.sum(weights, axis=-1, keepdims=True)
    if signed:
        bound = jnp.sum(jnp.abs(weights), axis=-1, keepdims=True)
        normaliser = _away_from_zero(normaliser, bound)
    return _divide(weights, normaliser)


def quadratic_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    feature_map: FeatureMap | None = None,
    *,
    key_feature_map: FeatureMap | None = None,
    mask: jax.Array | None = None,
    signed: bool = False,
) -> jax.Array:
    """The quotient of `linear_attention`, exact under any mask, at O(N·M) time and memory per head.

    A mask of N×M entries has no linear form; it costs O(N·M) memory by itself.

    Args:
      query, key, feature_map, key_feature_map, mask, signed: see `attention_matrix`.
      value: [..., M, G, D].

    Returns:
      [..., N, H, D] in `value`'s dtype, computed in float32 (float64 for float64 features). Rows
      that may attend to no key are zeros.
    """
    weights = attention_matrix(
        query, key, feature_map, key_feature_map=key_feature_map, mask=mask, signed=signed
    )
    heads, groups = query.shape[-2], key.shape[-2]
    weights = weights.reshape(*weights.shape[:-3], groups, heads // groups, *weights.shape[-2:])
    output = jnp.einsum('...gpnm,...mgd->...ngpd', weights, value.astype(weights.dtype))
    return output.reshape(*output.shape[:-3], heads, output.shape[-1]).astype(value.dtype)


def runs(segment_ids: jax.Array) -> jax.Array:
    """[..., N] int32 numbers 0, 1, … of the runs of equal ids."""
    changes = segment_ids[..., 1:] != segment_ids[..., :-1]
    changes = jnp.pad(changes, [(0, 0)] * (segment_ids.ndim - 1) + [(1, 0)])
    return jnp.cumsum(changes, axis=-1, dtype=jnp.int32)


def check_causal(num_queries: int, num_keys: int) -> None:
    """Raises `BadInput` where queries would stand before the first key."""
    if num_keys < num_queries:
        raise BadInput(
            f'key has {num_keys} tokens, fewer than the {num_queries} of query; causal '
            'attention aligns their ends. Give a key for every query.'
        )


def check_segments(
    segment_ids: jax.Array, query: jax.Array, key: jax.Array, axis_name: Any
) -> None:
    """Raises `BadInput` unless `segment_ids` [..., N] fits self-attention on one device."""
    if axis_name is not None:
        raise BadInput(
            'segment_ids and axis_name are given; segments are not split over devices. Put whole '
            'sequences on each device.'
        )
    shape = query.shape[:-2]
    if (
        not jnp.issubdtype(segment_ids.dtype, jnp.integer)
        or key.shape[:-2] != shape
        or not _broadcasts(segment_ids, shape)
        or segment_ids.shape[-1:] != shape[-1:]
    ):
        raise BadInput(
            f'segment_ids has shape {segment_ids.shape} and dtype {segment_ids.dtype}; allowed are '
            f'integers of shape {shape}, one for each token of query, with as many keys. Use a '
            'mask for other patterns.'
        )


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """Checked arrays with one batch axis, and what is common to all steps of a call."""

    query: jax.Array  # [B, N, H, D']
    key: jax.Array  # [B, M, G, D']
    value: jax.Array  # [B, M, G, D]
    key_mask: jax.Array | None  # [B, M]
    feature_map: FeatureMap
    key_feature_map: FeatureMap
    signed: bool
    block_size: int | None
    batch_shape: tuple[int, ...]

    def flat(self, x: jax.Array) -> jax.Array:
        """[batch…, N] to [B, N], broadcasting over the batch."""
        x = jnp.broadcast_to(x, (*self.batch_shape, x.shape[-1]))
        return x.reshape(-1, x.shape[-1])

    def flat_state(self, state: State) -> State:
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(self.batch_shape) :]), state)

    def shaped(self, x: Any) -> Any:
        """[B, ...] to [batch…, ...], of an output or of a state."""
        return jax.tree.map(lambda leaf: leaf.reshape(*self.batch_shape, *leaf.shape[1:]), x)

    def keys(self, part: slice) -> '_Inputs':
        """The same with some of the keys."""
        mask = None if self.key_mask is None else self.key_mask[:, part]
        return dataclasses.replace(
            self, key=self.key[:, part], value=self.value[:, part], key_mask=mask
        )


class _Plan(NamedTuple):
    """How a call is cut into blocks."""

    group: int | None  # Batch elements at a time; None for one by one, without a batch axis.
    query_tokens: int  # Tokens at a time.
    key_tokens: int


def _in_float32(feature_map: FeatureMap | None) -> FeatureMap:
    """The map, None being the identity, with features in float32 or wider."""

    def wide(x: jax.Array) -> jax.Array | LogFeatures:
        features = x if feature_map is None else feature_map(x)
        return jax.tree.map(lambda leaf: leaf.astype(_accumulator(leaf)), features)

    return wide


def _both_in_float32(
    feature_map: FeatureMap | None, key_feature_map: FeatureMap | None, key: jax.Array
) -> tuple[FeatureMap, FeatureMap]:
    """The maps of queries and of keys, one object where keys have none of their own."""
    feature_map = _in_float32(feature_map)
    if key_feature_map is None:
        return feature_map, feature_map
    key_feature_map = _in_float32(key_feature_map)
    shapes, key_shapes = (_feature_shapes(f, key) for f in (feature_map, key_feature_map))
    if _num_features(shapes) != _num_features(key_shapes) or type(shapes) is not type(key_shapes):
        raise BadInput(
            f'feature_map gives {shapes}, key_feature_map {key_shapes}; allowed are as many '
            'features of both, either arrays or LogFeatures. Give two maps of one kind.'
        )
    return feature_map, key_feature_map


def _feature_shapes(feature_map: FeatureMap, x: Any) -> Any:
    return jax.eval_shape(feature_map, jax.ShapeDtypeStruct((x.shape[-2], 1, x.shape[-1]), x.dtype))


def _num_features(shapes: Any) -> int:
    if isinstance(shapes, LogFeatures):
        shapes = shapes.log_value if shapes.factor is None else shapes.factor
    return shapes.shape[-1]


def _zeros(value: Any, shapes: Any) -> State:
    """An empty state for values [..., M, G, D] and features of `shapes`."""
    batch_shape, groups, dim = value.shape[:-3], value.shape[-2], value.shape[-1]
    dtype = jax.tree.leaves(shapes)[0].dtype
    rows = (*batch_shape, groups, dim + 1, _num_features(shapes))
    dtype = jax.dtypes.canonicalize_dtype(jnp.promote_types(dtype, value.dtype))
    sums = jnp.zeros(rows, dtype)
    if not isinstance(shapes, LogFeatures):
        return State(sums, None)
    size = shapes.log_value.shape[-1]
    return State(sums, jnp.full((*batch_shape, groups, size), LOWEST, dtype))


def _empty_state(inputs: _Inputs) -> State:
    return _zeros(inputs.value, _feature_shapes(inputs.key_feature_map, inputs.key))


def _plan(inputs: _Inputs) -> _Plan:
    """Blocks of `BLOCK_FEATURES` numbers, or `BLOCK_TOKENS`: many sequences, or a part of one."""
    batch, num_queries, heads, _ = inputs.query.shape
    num_keys, groups = inputs.key.shape[1:3]
    num_features = _num_features(_feature_shapes(inputs.key_feature_map, inputs.key))
    limits = [inputs.block_size or _block_tokens(h * num_features) for h in (heads, groups)]
    tokens = [
        _even(n, inputs.block_size or max(limit, BLOCK_TOKENS))
        for n, limit in zip((num_queries, num_keys), limits, strict=True)
    ]
    if tokens[0] < num_queries or tokens[1] < num_keys:
        return _Plan(None, *tokens)
    group = min(limit // n for limit, n in zip(limits, tokens, strict=True))
    return _Plan(_group(batch, group, batch), *tokens)


def _chunk_plan(inputs: _Inputs) -> _Plan:
    batch, num_tokens, heads, _ = inputs.query.shape
    num_features = _num_features(_feature_shapes(inputs.key_feature_map, inputs.key))
    tokens = _even(num_tokens, inputs.block_size or _by_backend(CHUNK, CHUNK_ELSEWHERE))
    unlooped = batch if tokens == num_tokens else None
    group = _block_tokens(heads * num_features) // tokens
    return _Plan(_group(batch, group, unlooped), tokens, tokens)


def _block_tokens(features_per_token: int) -> int:
    return _by_backend(BLOCK_FEATURES, BLOCK_FEATURES_ELSEWHERE) // features_per_token


def _by_backend(sizes: dict[str, int], elsewhere: int) -> int:
    return sizes.get(jax.default_backend(), elsewhere)


def _even(num_tokens: int, limit: int) -> int:
    """Tokens of a block, so that blocks of at most `limit` are as equal as can be."""
    num_blocks = -(-num_tokens // limit)
    return -(-num_tokens // num_blocks)


def _group(batch: int, limit: int, whole: int | None) -> int | None:
    """The largest divisor of `batch` up to `limit`; None for 1, unless that is the `whole` batch.

    A loop over single elements drops the batch axis: XLA's CPU backend copies blocks of a loop
    whose leading axis is 1.
    """
    size = next(size for size in range(max(1, min(batch, limit)), 0, -1) if batch % size == 0)
    return size if size > 1 or size == whole else None


def _over_batch(function: Callable, group: int | None, arrays: tuple) -> Any:
    batch = jax.tree.leaves(arrays)[0].shape[0]
    if group == batch:
        return function(*arrays)
    if group is None:
        return jax.lax.map(lambda element: function(*element), arrays)
    arrays = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), arrays)
    results = jax.lax.map(lambda elements: function(*elements), arrays)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)


# Outputs, normalisers and scales of blocks are small, and save the backward pass two products.
_recomputed = functools.partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_only_these_names(_SAVED),
)


def _attend_all(inputs: _Inputs) -> jax.Array:
    """[B, N, H, D] of bidirectional attention."""
    plan = _plan(inputs)
    whole = plan.key_tokens == inputs.key.shape[1] and plan.query_tokens == inputs.query.shape[1]

    def attend(query, key, value, key_mask):
        state = _absorb_blocks(inputs, plan, None, key, value, key_mask)
        state = jax.tree.map(lambda x: checkpoint_name(x, _SAVED), state)
        return _read_blocks(inputs, plan, state, query)

    if whole and _quadratic_is_cheaper(inputs):
        attend = functools.partial(_attend_quadratically, inputs)
    if plan.group != inputs.query.shape[0]:
        attend = _recomputed(attend)
    arrays = (inputs.query, inputs.key, inputs.value, inputs.key_mask)
    return _over_batch(attend, plan.group, arrays)


def _absorb_all(inputs: _Inputs, state: State | None = None) -> State:
    plan = _plan(inputs)
    function = functools.partial(_absorb_blocks, inputs, plan)
    if plan.group != inputs.key.shape[0] and plan.key_tokens == inputs.key.shape[1]:
        function = _recomputed(function)
    return _over_batch(function, plan.group, (state, inputs.key, inputs.value, inputs.key_mask))


def _read_all(inputs: _Inputs, state: State) -> jax.Array:
    plan = _plan(inputs)
    function = functools.partial(_read_blocks, inputs, plan)
    if plan.group != inputs.query.shape[0] and plan.query_tokens == inputs.query.shape[1]:
        function = _recomputed(function)
    return _over_batch(function, plan.group, (state, inputs.query))


def _absorb_blocks(
    inputs: _Inputs,
    plan: _Plan,
    state: State | None,
    key: jax.Array,
    value: jax.Array,
    key_mask: jax.Array | None,
) -> State:
    """Absorbs [..., M, G, D'] keys, `plan.key_tokens` at a time; state None for an empty one."""
    if state is None:
        state = _zeros(value, _feature_shapes(inputs.key_feature_map, key))
    state = varying_like(state, key, value, key_mask)
    contribution = functools.partial(_contribution, inputs.key_feature_map)
    num_keys = key.shape[-3]
    if plan.key_tokens == num_keys:
        return _add(state, *contribution(state.log_scale, key, value, key_mask))
    if key_mask is None and num_keys % plan.key_tokens:
        key_mask = jnp.ones((*key.shape[:-3], num_keys), bool)
    # Only what a block adds is computed anew: the sum itself is linear, and needs no memory.
    contribution = _recomputed(contribution)
    blocks = (
        _split(key, -3, plan.key_tokens),
        _split(value, -3, plan.key_tokens),
        None if key_mask is None else _split(key_mask, -1, plan.key_tokens),
    )

    def step(state, block):
        return _add(state, *contribution(state.log_scale, *block)), None

    return jax.lax.scan(step, state, blocks)[0]


def _read_blocks(inputs: _Inputs, plan: _Plan, state: State, query: jax.Array) -> jax.Array:
    """[..., N, H, D] of [..., N, H, D'] queries, `plan.query_tokens` at a time."""

    def read_block(state, query):
        features = inputs.feature_map(_heads_first(query, state.sums.shape[-3]))
        part = _read(state, features, inputs.signed)
        return _quotient(part, query.shape[-3:-1], inputs.value.dtype)

    num_queries = query.shape[-3]
    if plan.query_tokens == num_queries:
        return read_block(state, query)
    read_block = functools.partial(_recomputed(read_block), state)
    return _join(jax.lax.map(read_block, _split(query, -3, plan.query_tokens)), num_queries)


def _attend_quadratically(
    inputs: _Inputs,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_mask: jax.Array | None,
) -> jax.Array:
    """φ(q) φ(k)ᵀ first: the same quotient for fewer operations where sequences are short."""
    features, values, log_scale = _key_features(inputs.key_feature_map, None, key, value, key_mask)
    queries = inputs.feature_map(_heads_first(query, key.shape[-2]))
    queries, query_scale = _query_features(queries, log_scale)
    products = jnp.einsum('...gtr,...gcr->...gtc', queries, features)
    values = jnp.einsum('...gtc,...gcd->...gtd', products, values)
    bound = jnp.sum(jnp.abs(products), axis=-1) if inputs.signed else None
    part = _Part(values, query_scale, bound)
    return _quotient(part, query.shape[-3:-1], inputs.value.dtype)


def _quadratic_is_cheaper(inputs: _Inputs) -> bool:
    num_queries, heads = inputs.query.shape[1:3]
    num_keys, groups = inputs.key.shape[1:3]
    num_features = _num_features(_feature_shapes(inputs.key_feature_map, inputs.key))
    rows = inputs.value.shape[-1] + 1
    quadratic = heads * num_queries * num_keys * (num_features + rows)
    return quadratic < (heads * num_queries + groups * num_keys) * num_features * rows


def _attend_in_chunks(
    inputs: _Inputs, state: State, runs: jax.Array | None, causal: bool
) -> tuple[jax.Array, State]:
    """Attention to the state, to the chunk, and without `causal` to what comes after it.

    Args:
      inputs: with as many keys as queries.
      state: of the keys before.
      runs: [B, N] numbers of the segments, counting up; None for one segment. Needed without
        `causal`, where what comes after is read up to the end of the segment alone.

    Returns:
      [B, N, H, D], and the state after all keys.
    """
    plan = _chunk_plan(inputs)
    num_tokens = inputs.query.shape[1]
    looped = plan.query_tokens < num_tokens
    key_mask = inputs.key_mask
    if key_mask is None and num_tokens % plan.query_tokens:
        key_mask = jnp.ones(inputs.key.shape[:2], bool)

    def chunk(carry, query, key, value, key_mask, runs, following):
        state, open_run = carry
        features = inputs.key_feature_map(_heads_first(key, key.shape[-2]))
        queries = inputs.feature_map(_heads_first(query, key.shape[-2]))
        values = _values(value, key_mask)
        parts = [_visible(_read(state, queries, inputs.signed), open_run, runs)]
        mask = _chunk_mask(query.shape, key.shape[-2], key_mask, runs, causal)
        parts.append(_pairwise(queries, features, values, mask, inputs.signed))
        if following is not None:
            state_after, run_after = following
            part = _read(state_after, queries, inputs.signed)
            parts.append(_visible(part, run_after, runs))
        output = _quotient(_merge(parts), query.shape[-3:-1], inputs.value.dtype)
        return _absorb_run(state, open_run, features, values, key_mask, runs, -1), output

    def absorb_backwards(carry, key, value, key_mask, runs):
        features = inputs.key_feature_map(_heads_first(key, key.shape[-2]))
        return _absorb_run(*carry, features, _values(value, key_mask), key_mask, runs, 0), carry

    def attend(state, query, key, value, key_mask, runs):
        if key_mask is not None:
            key = jnp.where(key_mask[..., None, None], key, 0)
        closed = None if runs is None else jnp.full_like(runs[..., 0], -1)
        arrays = (query, key, value, key_mask, runs)
        if not looped:
            carry, output = chunk((state, closed), *arrays, None)
            return output, carry[0]
        axes = (-3, -3, -3, -1, -1)
        # Padding belongs to no segment, and its keys are masked.
        fills = (0, 0, 0, False, -1)
        chunks = tuple(
            None if x is None else _split(x, axis, plan.query_tokens, fill)
            for x, axis, fill in zip(arrays, axes, fills, strict=True)
        )
        following = None
        if not causal:
            step = _recomputed(absorb_backwards)
            following = jax.lax.scan(
                lambda carry, x: step(carry, *x), (state, closed), chunks[1:], reverse=True
            )[1]
        step = _recomputed(chunk)
        carry, output = jax.lax.scan(
            lambda carry, x: step(carry, *x), (state, closed), (*chunks, following)
        )
        return _join(output, num_tokens), carry[0]

    state = varying_like(state, inputs.query, inputs.key, inputs.value, key_mask, runs)
    arrays = (state, inputs.query, inputs.key, inputs.value, key_mask, runs)
    if plan.group != inputs.query.shape[0] and not looped:
        attend = _recomputed(attend)
    return _over_batch(attend, plan.group, arrays)


def _values(value: jax.Array, key_mask: jax.Array | None) -> jax.Array:
    """[..., C, G, D] to [..., G, C, D+1] with a column of ones behind; masked tokens are zeros.

    The column makes the normaliser one more numerator.
    """
    value = jnp.swapaxes(value.astype(_accumulator(value)), -3, -2)
    value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
    if key_mask is None:
        return value
    return jnp.where(key_mask[..., None, :, None], value, 0)


def _key_features(
    feature_map: FeatureMap,
    log_scale: jax.Array | None,
    key: jax.Array,
    value: jax.Array,
    key_mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Features [..., G, C, R] and values [..., G, C, D+1] of a block, and the new scale."""
    if key_mask is not None:
        key = jnp.where(key_mask[..., None, None], key, 0)
    features = feature_map(_heads_first(key, key.shape[-2]))
    features, log_scale = _scale_keys(features, log_scale, key_mask)
    return features, _values(value, key_mask), log_scale


def _scale_keys(
    features: jax.Array | LogFeatures, log_scale: jax.Array | None, key_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """φ(k) e^{-c} with c the largest logarithm so far, and c."""
    if not isinstance(features, LogFeatures):
        return features, None
    logs = features.log_value
    if key_mask is not None:
        logs = jnp.where(key_mask[..., None, :, None], logs, LOWEST)
    largest = jnp.max(logs, axis=-2)
    log_scale = largest if log_scale is None else jnp.maximum(largest, log_scale)
    # The quotient does not depend on it, so neither does the gradient.
    log_scale = checkpoint_name(jax.lax.stop_gradient(log_scale), _SAVED)
    scaled = jnp.exp(logs - log_scale[..., None, :])
    return _times(scaled, features.factor), log_scale


def _contribution(
    feature_map: FeatureMap,
    log_scale: jax.Array | None,
    key: jax.Array,
    value: jax.Array,
    key_mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """What a block adds to the sums, times e^{-c}, and the new c."""
    features, values, log_scale = _key_features(feature_map, log_scale, key, value, key_mask)
    return _sums(values, features), log_scale


def _sums(values: jax.Array, features: jax.Array) -> jax.Array:
    """Σ_c v_c φ_cᵀ [..., G, D+1, R] of values [..., G, C, D+1] and features [..., G, C, R]."""
    if _is_turned(features, values.shape[-1]):
        values = jax.lax.optimization_barrier(jnp.swapaxes(values, -1, -2))
        return jnp.einsum('...gdc,...gcr->...gdr', values, features)
    return jnp.einsum('...gcd,...gcr->...gdr', values, features)


def _numerators(features: jax.Array, sums: jax.Array) -> jax.Array:
    """φ_t·sums [..., G, T, D+1] of features [..., G, T, R] and sums [..., G, D+1, R]."""
    if _is_turned(features, sums.shape[-2]):
        products = jnp.einsum('...gdr,...gtr->...gdt', sums, features)
        return jnp.swapaxes(jax.lax.optimization_barrier(products), -1, -2)
    return jnp.einsum('...gtr,...gdr->...gtd', features, sums)


def _is_turned(features: jax.Array, rows: int) -> bool:
    """Whether products take the tokens for columns instead of rows.

    XLA's CPU backend shares a product between threads from 2²² multiplications a head on, by rows,
    of which a thread takes about 2¹⁶ / R. Where that leaves all tokens to one thread, the values
    are the better rows: twice as fast, less their transposition, which many features outweigh. It
    is undone without the barrier.
    """
    tokens, num_features = features.shape[-2:]
    one_thread = tokens * num_features <= 2**16 and tokens * num_features * rows > 2**22
    return jax.default_backend() == 'cpu' and one_thread and num_features > 2 * rows


def _add(state: State, sums: jax.Array, log_scale: jax.Array | None) -> State:
    if log_scale is None:
        return State(state.sums + sums, None)
    decay = jnp.exp(state.log_scale - log_scale)[..., None, :]
    return State(state.sums * decay + sums, log_scale)


def _query_features(
    features: jax.Array | LogFeatures, log_scale: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """φ(q) e^{c - t} of order 1 [..., G, T, R], and t [..., G, T]; c None for 0."""
    if not isinstance(features, LogFeatures):
        return features, None
    logs = features.log_value
    if log_scale is not None:
        logs = logs + log_scale[..., None, :]
    largest = jax.lax.stop_gradient(jnp.max(logs, axis=-1, keepdims=True))
    return _times(jnp.exp(logs - largest), features.factor), largest[..., 0]


def _times(scale: jax.Array, factor: jax.Array | None) -> jax.Array:
    return scale if factor is None else scale * factor


def _read(state: State, queries: jax.Array | LogFeatures, signed: bool) -> _Part:
    features, log_scale = _query_features(queries, state.log_scale)
    values = _numerators(features, state.sums)
    bound = None
    if signed:
        norms = jnp.sqrt(jnp.sum(features * features, axis=-1))
        key_sum = state.sums[..., -1, :]
        # At zero the norm has no gradient; nothing is to be learnt through a bound anyway.
        bound = norms * jnp.sqrt(jnp.sum(key_sum * key_sum, axis=-1, keepdims=True))
        bound = jax.lax.stop_gradient(bound)
    return _Part(values, log_scale, bound)


def _products(
    queries: jax.Array | LogFeatures, keys: jax.Array | LogFeatures
) -> tuple[jax.Array, jax.Array | None]:
    """φ(q)·φ(k) [..., G, T, C], and the logarithms [..., G, 1, C] of what keys were divided by.

    What queries were divided by cancels, except against other parts: see `_pairwise`.
    """
    query_features, _ = _query_features(queries, None)
    key_features, key_scale = _query_features(keys, None)
    products = jnp.einsum('...gtr,...gcr->...gtc', query_features, key_features)
    return products, None if key_scale is None else key_scale[..., None, :]


def _weights(
    products: jax.Array, scales: jax.Array | None, mask: jax.Array, signed: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Masked products times e^scales, up to e^largest of each row [..., T, 1]; and that."""
    if scales is None:
        return jnp.where(mask, products, 0), None
    if signed:
        largest = jnp.max(jnp.where(mask, scales, LOWEST), axis=-1, keepdims=True)
        # Masked scales may be larger than the largest of the others.
        weights = products * jnp.exp(jnp.minimum(scales - largest, 0))
        return jnp.where(mask, weights, 0), largest
    logs = jnp.log(jnp.maximum(products, SMALLEST)) + scales
    logs = jnp.where(mask, logs, LOWEST)
    largest = jax.lax.stop_gradient(jnp.max(logs, axis=-1, keepdims=True))
    return jnp.where(mask, jnp.exp(logs - largest), 0), largest


def _pairwise(
    queries: jax.Array | LogFeatures,
    keys: jax.Array | LogFeatures,
    values: jax.Array,
    mask: jax.Array,
    signed: bool,
) -> _Part:
    """The part of the keys of one chunk, by the T×C products under a mask [..., 1, T, C]."""
    weights, largest = _weights(*_products(queries, keys), mask, signed)
    log_scale = None if largest is None else _query_features(queries, None)[1] + largest[..., 0]
    bound = jnp.sum(jnp.abs(weights), axis=-1) if signed else None
    return _Part(jnp.einsum('...gtc,...gcd->...gtd', weights, values), log_scale, bound)


def _merge(parts: list[_Part]) -> _Part:
    if parts[0].log_scale is None:
        factors = [1] * len(parts)
        log_scale = None
    else:
        log_scale = functools.reduce(jnp.maximum, [part.log_scale for part in parts])
        factors = [jnp.exp(part.log_scale - log_scale) for part in parts]
    values = sum(
        part.values * (factor if log_scale is None else factor[..., None])
        for part, factor in zip(parts, factors, strict=True)
    )
    bound = None
    if parts[0].bound is not None:
        bound = sum(part.bound * factor for part, factor in zip(parts, factors, strict=True))
    return _Part(values, log_scale, bound)


def _quotient(part: _Part, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """[..., C, H, D] for `shape` (C, H): numerators over the normaliser, 0 where that is 0."""
    normaliser = part.values[..., -1:]
    if part.bound is not None:
        normaliser = _away_from_zero(normaliser, part.bound[..., None])
    numerator, normaliser = (_tokens_first(x, shape) for x in (part.values[..., :-1], normaliser))
    return _divide(numerator, normaliser).astype(dtype)


def _away_from_zero(normaliser: jax.Array, bound: jax.Array) -> jax.Array:
    floor = CANCELLED * bound
    signed_floor = jnp.where(normaliser < 0, -floor, floor)
    return jnp.where(jnp.abs(normaliser) > floor, normaliser, signed_floor)


@jax.custom_jvp
def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """numerator / denominator; 0 where the latter is, and so is the gradient."""
    empty = denominator == 0
    return jnp.where(empty, 0, numerator / jnp.where(empty, 1, denominator))


@_divide.defjvp
def _divide_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # The derivative of x / y that JAX takes has y⁻² in it, which leaves float32's range long before
    # the quotient does.
    denominator = checkpoint_name(primals[1], _SAVED)
    output = checkpoint_name(_divide(primals[0], denominator), _SAVED)
    return output, _divide(tangents[0] - output * tangents[1], denominator)


def _heads_first(x: jax.Array, groups: int) -> jax.Array:
    """[..., C, H, D] to [..., G, T, D], T = H/G·C: heads that share a key head are more queries."""
    *batch, tokens, heads, dim = x.shape
    x = x.reshape(*batch, tokens, groups, heads // groups, dim)
    return jnp.moveaxis(x, -4, -2).reshape(*batch, groups, heads // groups * tokens, dim)


def _tokens_first(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[..., G, T, D] to [..., C, H, D] for `shape` (C, H)."""
    *batch, groups, _, dim = x.shape
    tokens, heads = shape
    x = x.reshape(*batch, groups, heads // groups, tokens, dim)
    return jnp.moveaxis(x, -2, -4).reshape(*batch, tokens, heads, dim)


def _split(x: jax.Array, axis: int, tokens: int, fill: Any = 0) -> jax.Array:
    """Blocks of `tokens` along `axis` in front of x, the last one filled up."""
    axis += x.ndim
    num_blocks = -(-x.shape[axis] // tokens)
    missing = num_blocks * tokens - x.shape[axis]
    if missing:
        padding = [(0, missing if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, padding, constant_values=fill)
    x = x.reshape(*x.shape[:axis], num_blocks, tokens, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(blocks: jax.Array, num_tokens: int) -> jax.Array:
    """[n, ..., C, H, D] to [..., N, H, D]."""
    x = jnp.moveaxis(blocks, 0, -4)
    x = x.reshape(*x.shape[:-4], -1, *x.shape[-2:])
    return x[..., :num_tokens, :, :]


def _chunk_mask(
    query_shape: tuple[int, ...],
    groups: int,
    key_mask: jax.Array | None,
    runs: jax.Array | None,
    causal: bool,
) -> jax.Array:
    """[..., 1, T, C], True where a query of the chunk may attend to a key of it."""
    tokens, heads = query_shape[-3:-1]
    mask = jnp.ones((tokens, tokens), bool)
    if causal:
        mask = jnp.tril(mask)
    if runs is not None:
        mask = mask & (runs[..., :, None] == runs[..., None, :])
    if key_mask is not None:
        mask = mask & key_mask[..., None, :]
    mask = jnp.concatenate([mask] * (heads // groups), axis=-2)
    return mask[..., None, :, :]


def _visible(part: _Part, open_run: jax.Array | None, runs: jax.Array | None) -> _Part:
    """The part for the queries that belong to the segment `open_run`, nothing for the others."""
    if runs is None:
        return part
    copies = part.values.shape[-2] // runs.shape[-1]
    visible = jnp.concatenate([runs == open_run[..., None]] * copies, axis=-1)[..., None, :]
    values = jnp.where(visible[..., None], part.values, 0)
    log_scale, bound = part.log_scale, part.bound
    if log_scale is not None:
        log_scale = jnp.where(visible, log_scale, LOWEST)
    if bound is not None:
        bound = jnp.where(visible, bound, 0)
    return _Part(values, log_scale, bound)


def _absorb_run(
    state: State,
    open_run: jax.Array | None,
    features: jax.Array | LogFeatures,
    values: jax.Array,
    key_mask: jax.Array | None,
    runs: jax.Array | None,
    edge: int,
) -> tuple[State, jax.Array | None]:
    """The state of the segment at the chunk's `edge`, 0 or -1, and that segment."""
    new_run = None
    if runs is not None:
        new_run = runs[..., edge]
        within = runs == new_run[..., None]
        key_mask = within if key_mask is None else within & key_mask
        values = jnp.where(within[..., None, :, None], values, 0)
        goes_on = (open_run == new_run)[..., None, None]
        log_scale = state.log_scale
        if log_scale is not None:
            log_scale = jnp.where(goes_on, log_scale, LOWEST)
        state = State(jnp.where(goes_on[..., None], state.sums, 0), log_scale)
    features, log_scale = _scale_keys(features, state.log_scale, key_mask)
    sums = _sums(values, features)
    return _add(state, sums, log_scale), new_run


def _sum_over_axis(state: State, axis_name: Any) -> State:
    """The state of all devices' keys, by one sum."""
    if state.log_scale is None:
        return State(jax.lax.psum(state.sums, axis_name), None)
    log_scale = jax.lax.pmax(jax.lax.stop_gradient(state.log_scale), axis_name)
    decay = jnp.exp(state.log_scale - log_scale)[..., None, :]
    return State(jax.lax.psum(state.sums * decay, axis_name), log_scale)


def _states_before(state: State, axis_name: Any) -> State:
    """The state of the keys of all devices before this one: an exclusive scan over the axis."""
    states = jax.lax.all_gather(state, axis_name)
    before = jnp.arange(states.sums.shape[0]) < jax.lax.axis_index(axis_name)
    before = before.reshape(-1, *[1] * (state.sums.ndim - 1))
    if state.log_scale is None:
        return State(jnp.sum(jnp.where(before[..., None], states.sums, 0), axis=0), None)
    logs = jnp.where(before, jax.lax.stop_gradient(states.log_scale), LOWEST)
    log_scale = jnp.max(logs, axis=0)
    decay = jnp.where(before, jnp.exp(logs - log_scale), 0)[..., None, :]
    return State(jnp.sum(states.sums * decay, axis=0), log_scale)


def varying_like(carry: Any, *arrays: jax.Array | None) -> Any:
    """A loop's carry as `shard_map` wants it: marked as different between devices as arrays are."""
    # The sum of no entries of an array is 0, and as different between devices as the array is.
    nothing = sum(
        jnp.sum(jax.lax.stop_gradient(x[..., :0]), dtype=jnp.float32)
        for x in arrays
        if x is not None
    )
    return jax.tree.map(lambda x: x + nothing.astype(x.dtype), carry)


def _prepare(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    feature_map: FeatureMap | None,
    key_feature_map: FeatureMap | None,
    key_mask: jax.Array | None,
    signed: bool,
    block_size: int | None,
) -> _Inputs:
    """Checks the arrays and flattens their batch axes."""
    layout = '[batch…, tokens, heads, dim]'
    for name, x in (('query', query), ('key', key), ('value', value)):
        if x.ndim < 3 or x.shape[:-3] != query.shape[:-3] or 0 in x.shape[-3:]:
            raise BadInput(
                f'{name} has shape {x.shape}, query {query.shape}; allowed is {layout} with equal '
                'batch axes and no empty axis. Reshape them.'
            )
    heads, groups = query.shape[-2], key.shape[-2]
    if heads % groups or value.shape[-3:-1] != key.shape[-3:-1]:
        raise BadInput(
            f'query has {heads} heads, key {groups}, and value has the shape {value.shape}; the '
            'heads of key must divide those of query, and value must have the tokens and heads of '
            f'key, {key.shape[-3:-1]}. Reshape them.'
        )
    if query.shape[-1] != key.shape[-1]:
        raise BadInput(
            f'query has the last axis {query.shape[-1]}, key {key.shape[-1]}; feature maps take '
            'vectors of one dimension. Give them the same.'
        )
    if block_size is not None and not (isinstance(block_size, numbers.Integral) and block_size > 0):
        raise BadInput(f'block_size is {block_size!r}; give an integer ≥ 1, or None.')
    batch_shape = query.shape[:-3]
    if key_mask is not None:
        if key_mask.dtype != bool or not _broadcasts(key_mask, (*batch_shape, key.shape[-3])):
            raise BadInput(
                f'key_mask has shape {key_mask.shape} and dtype {key_mask.dtype}; allowed is bool '
                f'of shape {(*batch_shape, key.shape[-3])}, True where a key may be attended to.'
            )
        key_mask = jnp.broadcast_to(key_mask, (*batch_shape, key.shape[-3]))
        key_mask = key_mask.reshape(-1, key.shape[-3])
    maps = _both_in_float32(feature_map, key_feature_map, key)
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    return _Inputs(query, key, value, key_mask, *maps, signed, block_size, batch_shape)


def _check_is_state(state: Any) -> None:
    if not isinstance(state, State) or state.sums.ndim < 3:
        raise BadInput(
            f'state is a {type(state).__name__}, shapes {jax.tree.map(jnp.shape, state)}; '
            'allowed is a State. Take it from init_state, or from the call before.'
        )


def _check_state(state: Any, key: Any, value: Any, feature_map: FeatureMap | None) -> None:
    _check_is_state(state)
    allowed = jax.eval_shape(functools.partial(init_state, feature_map=feature_map), key, value)
    given, allowed = (tuple(None if x is None else x.shape for x in s) for s in (state, allowed))
    if given != allowed:
        raise BadInput(
            f'state has sums {given[0]} and log_scale {given[1]}; key {key.shape}, value '
            f'{value.shape} and the feature map have {allowed[0]} and {allowed[1]}: sums are '
            '[batch…, key heads, values + 1, features]. Take the state from init_state for the '
            'same arrays and features.'
        )


def _broadcasts(x: jax.Array, shape: tuple[int, ...]) -> bool:
    padded = (1,) * (len(shape) - x.ndim) + x.shape
    return len(padded) == len(shape) and all(
        a in (1, b) for a, b in zip(padded, shape, strict=True)
    )


def _accumulator(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
