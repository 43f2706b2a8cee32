"""Exact softmax attention, softmax(q kᵀ/√D) v (Vaswani et al. 2017, arXiv 1706.03762, eq. (1)).

The opponent that linear attention is measured against, so it is given the same care: blocks of
queries and keys that stay in the cache, memory linear in the number of tokens, nothing computed
that a causal mask hides, and key heads that several query heads share without a copy. Letters: N
queries, M keys, H heads, G key heads, D head dimension, D' the values'; leading axes are batch
axes, of any number.

A row's softmax is taken over its blocks of keys one after the other, with the largest logit so far
and the sums relative to it (Rabe and Staats 2021, "Self-attention Does Not Need O(n²) Memory",
arXiv 2112.05682; Dao et al. 2022, "FlashAttention", arXiv 2205.14135). The derivative keeps the
output, the largest logit and the normaliser of each row, and computes each block of weights anew.
It is defined as a forward derivative, which JAX transposes: so `jax.jvp` and derivatives of any
order are there too.
"""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from performer_vit.errors import BadInput
from performer_vit.linear_attention import varying_like

# Queries of a block, and keys. Of the sizes 256, 512 and 1,024 the fastest forward and backward for
# 512 to 4,096 tokens on a CPU. `BLOCK_SIZE = sys.maxsize` makes one block, without loops, of any
# number of tokens.
BLOCK_SIZE = 512
KEY_BLOCK_SIZE = 1024


def exact_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    block_size: int | None = None,
    *,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
    temperature: float | None = None,
    key_block_size: int | None = None,
) -> jax.Array:
    """softmax(q kᵀ/τ) v in O(N·M·(D + D')) time and, forward and backward, O(N + M) memory.

    Up to N·M = (`block_size`/2)² a head's weights are one block, kept for the backward pass, which
    is faster for so few. Beyond, all that exists at a time is one block of weights, of one head
    after the other on a CPU and of all heads elsewhere, and the backward pass computes it anew.

    Args:
      query: [..., N, H, D].
      key: [..., M, G, D]; G divides H, and query head h attends to key head h // (H / G).
      value: [..., M, G, D'].
      mask: bool, broadcastable to [..., H, N, M], True where a query may attend to a key; None for
        all. It is read block by block, and only where it must be padded to whole blocks is it
        copied.
      block_size: queries per block; None for `BLOCK_SIZE`. Blocks are made as even as possible.
      is_causal: whether query n attends to the keys m ≤ n + (M - N) alone; M ≥ N. Blocks of which
        no query sees a key are left out: half of the work for many blocks.
      segment_ids: [..., N] integers of packed sequences, N = M: tokens attend within their run of
        equal ids alone.
      temperature: τ > 0, known at compilation; None for √D.
      key_block_size: keys per block; None for `KEY_BLOCK_SIZE`, or `block_size` if causal.

    Returns:
      [..., N, H, D'] in `value`'s dtype. The softmax is in float32 (float64 for float64 inputs); so
      are the products between blocks, while those of one block are in the inputs' dtype with sums
      in float32. Rows that may attend to no key are zeros, and so is their gradient.

    Raises:
      BadInput: shapes that do not fit together, M < N with `is_causal`, or a temperature or block
        size that is not positive.
    """
    scale = _scale(query.shape[-1], temperature)
    _check_inputs(query, key, mask, is_causal, segment_ids)
    if value.shape[:-1] != key.shape[:-1]:
        raise BadInput(
            f'value has shape {value.shape}, key {key.shape}; they must agree in all axes but the '
            'last. Give a value for every key.'
        )
    if block_size is None:
        block_size = BLOCK_SIZE
    if key_block_size is None:
        key_block_size = block_size if is_causal else KEY_BLOCK_SIZE
    _check_size('block_size', block_size)
    _check_size('key_block_size', key_block_size)
    num_queries, num_keys = query.shape[-3], key.shape[-3]
    query, key, value = (jnp.swapaxes(x, -3, -2) for x in (query, key, value))
    if num_queries * num_keys <= (block_size // 2) ** 2 or not query.size:
        mask = _with_patterns(mask, num_queries, num_keys, is_causal, segment_ids)
        output = _attend(query, key, value, mask, scale)
    else:
        blocks = _Blocks(
            num_queries,
            num_keys,
            _even_size(num_queries, block_size),
            _even_size(num_keys, key_block_size),
            is_causal,
        )
        output = _attend_in_blocks(query, key, value, mask, segment_ids, scale, blocks)
    return jnp.swapaxes(output, -3, -2)


def attention_matrix(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None = None,
    *,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
    temperature: float | None = None,
) -> jax.Array:
    """The weights softmax(q kᵀ/τ), formed at O(N·M) memory per head.

    Args:
      query, key, mask, is_causal, segment_ids, temperature: see `exact_attention`.

    Returns:
      [..., H, N, M] float32 (float64 for float64 inputs): rows sum to 1, or to 0 where no key may
      be attended to.

    Raises:
      BadInput: see `exact_attention`.
    """
    scale = _scale(query.shape[-1], temperature)
    _check_inputs(query, key, mask, is_causal, segment_ids)
    mask = _with_patterns(mask, query.shape[-3], key.shape[-3], is_causal, segment_ids)
    query, key = (jnp.swapaxes(x, -3, -2) for x in (query, key))
    weights, total = _exponentials(query, key, mask, scale)
    return weights / total


# One block


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, scale: float
) -> jax.Array:
    """[..., H, N, D'] of [..., H, N, D], [..., G, M, D] and [..., G, M, D']."""
    weights, total = _exponentials(query, key, mask, scale)
    output = _product('...nm,...md->...nd', weights.astype(value.dtype), value, weights.dtype)
    # Rows of D' numbers are divided, not rows of M.
    return (output / total).astype(value.dtype)


def _exponentials(
    query: jax.Array, key: jax.Array, mask: jax.Array | None, scale: float
) -> tuple[jax.Array, jax.Array]:
    """exp(logit - largest of its row) [..., H, N, M], and their sums [..., H, N, 1] or 1 for 0."""
    dtype = _accumulator(query)
    logits = _product('...nd,...md->...nm', query, key, dtype) * scale
    if mask is not None:
        logits = jnp.where(mask, logits, _lowest(dtype))
    # The quotient does not depend on it, so neither does the gradient.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - _finite(largest))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights, _or_one(total)


def _product(subscripts: str, rows: jax.Array, shared: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """einsum of [..., H, N, K] with [..., G, ...], the rows of H / G heads behind each other."""
    *batch, num_heads, num_rows, width = rows.shape
    num_groups = shared.shape[-3]
    # No -1 for a size: where another one is 0, JAX would divide by it.
    rows = rows.reshape(*batch, num_groups, num_heads // num_groups * num_rows, width)
    product = jnp.einsum(subscripts, rows, shared, preferred_element_type=dtype)
    return product.reshape(*product.shape[:-3], num_heads, num_rows, product.shape[-1])


def _with_patterns(
    mask: jax.Array | None,
    num_queries: int,
    num_keys: int,
    is_causal: bool,
    segment_ids: jax.Array | None,
) -> jax.Array | None:
    """The mask with the causal and the segments' pattern in it, [..., H or 1, N, M]."""
    patterns = [] if mask is None else [mask]
    if is_causal:
        patterns.append(jnp.tri(num_queries, num_keys, num_keys - num_queries, dtype=bool))
    if segment_ids is not None:
        runs = _runs(segment_ids)
        patterns.append((runs[..., :, None] == runs[..., None, :])[..., None, :, :])
    return functools.reduce(jnp.logical_and, patterns) if patterns else None


# Many blocks


class _Blocks(NamedTuple):
    """How the matrix of logits is cut. The last block of each axis may stand over."""

    num_queries: int
    num_keys: int
    queries: int
    keys: int
    is_causal: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of blocks."""
        return -(-self.num_queries // self.queries), -(-self.num_keys // self.keys)

    @property
    def whole(self) -> tuple[int, int]:
        """Queries and keys with what stands over."""
        return self.shape[0] * self.queries, self.shape[1] * self.keys

    def pairs(self, repeats: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks of which something may be seen, as (repeat, block of queries, block of keys).

        Those that may be seen as a whole first, for whom no pattern need be computed; then those
        with an edge in them. Every number of `range(repeats)` has the same blocks.
        """
        pairs = np.indices((repeats, *self.shape), np.int32).reshape(3, -1).T
        first_query, first_key = pairs[:, 1] * self.queries, pairs[:, 2] * self.keys
        last_query = np.minimum(first_query + self.queries, self.num_queries) - 1
        last_key = first_key + self.keys - 1
        if self.is_causal:
            offset = self.num_keys - self.num_queries
            seen = first_key <= last_query + offset
            has_edge = last_key > first_query + offset
        else:
            seen = np.full(len(pairs), True)
            has_edge = last_key >= self.num_keys
        return pairs[seen & ~has_edge], pairs[seen & has_edge]


class _Sight(NamedTuple):
    """What one key head's queries may see, beside the patterns that `_Blocks` knows."""

    mask: jax.Array | None  # [B or 1, G or 1, H/G or 1, N or 1, M or 1], in whole blocks
    runs: jax.Array | None  # [B, N], in whole blocks
    batch: jax.Array  # index along B
    head: jax.Array  # and along G


def _attend_in_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    segment_ids: jax.Array | None,
    scale: float,
    blocks: _Blocks,
) -> jax.Array:
    """`_attend` by blocks."""
    *batch, num_heads, _, _ = query.shape
    num_groups = key.shape[-3]
    dtype, value_dtype = _accumulator(query), value.dtype
    # The heads that share a key head are further blocks of rows. With the tokens of a block of keys
    # in the last axis no product of the backward pass transposes a block of weights.
    query = _split_rows(query.astype(dtype) * scale, blocks.queries)
    key, value = (
        jnp.swapaxes(_split_rows(x.astype(dtype), blocks.keys), -1, -2) for x in (key, value)
    )
    rows_of_heads = (math.prod(batch) * num_groups, -1)
    query, key, value = (x.reshape(*rows_of_heads, *x.shape[-2:]) for x in (query, key, value))
    if mask is not None:
        mask = _mask_in_blocks(mask, batch, (num_groups, num_heads // num_groups), blocks)
    runs = None
    if segment_ids is not None:
        runs = jnp.broadcast_to(_runs(segment_ids), (*batch, blocks.num_queries))
        runs = runs.reshape(-1, blocks.num_queries)
        runs = jnp.pad(runs, ((0, 0), (0, max(blocks.whole) - blocks.num_queries)))
    indices = jnp.indices((math.prod(batch), num_groups), jnp.int32).reshape(2, -1)

    def attend(query, key, value, batch, head):
        return _attend_head(query, key, value, _Sight(mask, runs, batch, head), blocks)[0]

    output = _over_heads(attend, query, key, value, *indices)
    output = output.reshape(*batch, num_heads, blocks.whole[0], -1)
    return output[..., : blocks.num_queries, :].astype(value_dtype)


def _over_heads(attend: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """One head after the other leaves a CPU's cache to its blocks; an accelerator is filled."""
    if jax.default_backend() == 'cpu':
        return jax.lax.map(lambda slices: attend(*slices), arrays)
    return jax.vmap(attend)(*arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _attend_head(
    query: jax.Array, key: jax.Array, value: jax.Array, sight: _Sight, blocks: _Blocks
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of the query heads of one key head.

    Args:
      query: q/τ in blocks [blocks of rows, rows, D]: `blocks` for each query head.
      key: [blocks, D, keys].
      value: [blocks, D', keys].

    Returns:
      The output [blocks of rows, rows, D'] and, [blocks of rows, rows, 1], the largest logit m of
      each row and its normaliser Σ exp(logit - m); 0 and 1 where a row sees nothing. The derivative
      takes m for a constant: the output does not depend on it.
    """
    dtype = query.dtype

    def add(carry, pair, has_edge):
        row, column = _places(pair, blocks)
        largest, total, output = (_block(x, row) for x in carry)
        logits = _logits(query, key, sight, blocks, pair, has_edge)
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.exp(logits - new_largest)
        shrink = jnp.exp(largest - new_largest)
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        output = output * shrink + weights @ _block(value, column).T
        new = (new_largest, total, output)
        return tuple(
            jax.lax.dynamic_update_index_in_dim(x, y, row, 0)
            for x, y in zip(carry, new, strict=True)
        )

    statistics = (*query.shape[:-1], 1)
    carry = (
        jnp.full(statistics, _lowest(dtype), dtype),
        jnp.zeros(statistics, dtype),
        jnp.zeros((*query.shape[:-1], value.shape[-2]), dtype),
    )
    carry = varying_like(carry, query, key, value, sight.mask, sight.runs)
    largest, total, output = _over_pairs(add, carry, query, blocks)
    # A row that saw nothing has summed hidden keys with weight exp(lowest - lowest) = 1.
    empty = largest == _lowest(dtype)
    total = jnp.where(empty, 1, total)
    return jnp.where(empty, 0, output / total), _finite(largest), total


@_attend_head.defjvp
def _attend_head_jvp(blocks, primals, tangents):
    """d out_n = (Σ_m w_nm (dl_nm v_m + dv_m) - out_n Σ_m w_nm dl_nm) / Σ_m w_nm, w_nm = exp(l_nm).

    The logits l_nm are taken relative to the row's largest. A sum over blocks, linear in the
    tangents of each: its transpose keeps no carry.
    """
    query, key, value, sight = primals
    query_dot, key_dot, value_dot, _ = tangents
    output, largest, total = _attend_head(query, key, value, sight, blocks)

    def contribution(pair, has_edge):
        row, column = _places(pair, blocks)
        logits = _logits(query, key, sight, blocks, pair, has_edge)
        weights = jnp.exp(logits - _block(largest, row))
        logits_dot = _block(query_dot, row) @ _block(key, column)
        logits_dot += _block(query, row) @ _block(key_dot, column)
        weights_dot = weights * logits_dot
        output_dot = weights_dot @ _block(value, column).T
        output_dot += weights @ _block(value_dot, column).T
        return output_dot, jnp.sum(weights_dot, axis=-1, keepdims=True)

    def add(carry, pair, has_edge):
        # In a loop no other computation of the weights is near that could be shared.
        again = jax.checkpoint(contribution, prevent_cse=False, static_argnums=1)
        row, _ = _places(pair, blocks)
        return tuple(x.at[row].add(y) for x, y in zip(carry, again(pair, has_edge), strict=True))

    carry = (jnp.zeros_like(output), jnp.zeros_like(total))
    output_dot, total_dot = _over_pairs(add, carry, query, blocks)
    output_dot = (output_dot - output * total_dot) / total
    return (output, largest, total), (output_dot, jnp.zeros_like(largest), total_dot)


def _over_pairs(add: Callable[..., Any], carry: Any, query: jax.Array, blocks: _Blocks) -> Any:
    """carry after `carry = add(carry, pair, has_edge)` for all pairs of blocks.

    What depends on no input that changes, as a mask, JAX takes out of a loop over heads or layers
    that it differentiates, and computes for all pairs in advance: at O(N·M) memory. So the indices
    of blocks are made to depend on the query.
    """
    first = jax.lax.stop_gradient(query[0, 0, 0])
    _, zero = jax.lax.optimization_barrier((first, np.int32(0)))
    all_pairs = blocks.pairs(query.shape[0] // blocks.shape[0])
    for pairs, has_edge in zip(all_pairs, (False, True), strict=True):
        if len(pairs):
            step = functools.partial(add, has_edge=has_edge)
            carry, _ = jax.lax.scan(
                lambda carry, pair, step=step: (step(carry, pair + zero), None), carry, pairs
            )
    return carry


def _logits(
    query: jax.Array,
    key: jax.Array,
    sight: _Sight,
    blocks: _Blocks,
    pair: jax.Array,
    has_edge: bool,
) -> jax.Array:
    """[rows, keys] of a pair of blocks, the lowest number where nothing may be seen."""
    row, column = _places(pair, blocks)
    logits = _block(query, row) @ _block(key, column)
    patterns = _patterns(sight, blocks, pair, has_edge)
    if not patterns:
        return logits
    # With the lowest finite number, not -inf, an empty row stays finite.
    return jnp.where(functools.reduce(jnp.logical_and, patterns), logits, _lowest(logits.dtype))


def _patterns(sight: _Sight, blocks: _Blocks, pair: jax.Array, has_edge: bool) -> list[jax.Array]:
    """Of bool [rows or 1, keys or 1], True where a query may see a key."""
    first_query, first_key = pair[1] * blocks.queries, pair[2] * blocks.keys
    patterns = []
    if sight.mask is not None:
        shared = [size == 1 for size in sight.mask.shape]
        places = (sight.batch, sight.head, pair[0], first_query, first_key)
        places = [np.int32(0) if one else x for one, x in zip(shared, places, strict=True)]
        sizes = (1, 1, 1, blocks.queries, blocks.keys)
        sizes = [1 if one else size for one, size in zip(shared, sizes, strict=True)]
        patterns.append(jax.lax.dynamic_slice(sight.mask, places, sizes)[0, 0, 0])
    if sight.runs is not None:
        query_runs, key_runs = (
            jax.lax.dynamic_slice(sight.runs, (sight.batch, first), (1, size))[0]
            for first, size in ((first_query, blocks.queries), (first_key, blocks.keys))
        )
        patterns.append(query_runs[:, None] == key_runs[None, :])
    if has_edge:
        keys = first_key + jnp.arange(blocks.keys)[None, :]
        last = blocks.num_keys - 1
        if blocks.is_causal:
            queries = first_query + jnp.arange(blocks.queries)[:, None]
            last = queries + (blocks.num_keys - blocks.num_queries)
        patterns.append(keys <= last)
    return patterns


def _places(pair: jax.Array, blocks: _Blocks) -> tuple[jax.Array, jax.Array]:
    """Of a pair, its index among all blocks of rows and among the blocks of keys."""
    return pair[0] * blocks.shape[0] + pair[1], pair[2]


def _block(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _split_rows(x: jax.Array, size: int) -> jax.Array:
    """[..., N, K] to [..., blocks, size, K], the last block padded with zeros."""
    *batch, num_rows, width = x.shape
    padding = [(0, 0)] * len(batch) + [(0, -num_rows % size), (0, 0)]
    return jnp.pad(x, padding).reshape(*batch, -1, size, width)


def _mask_in_blocks(
    mask: jax.Array, batch: list[int], heads: tuple[int, int], blocks: _Blocks
) -> jax.Array:
    """[B or 1, G or 1, H/G or 1, N or 1, M or 1], padded to whole blocks; axes of 1 stay so."""
    mask = mask.reshape((1,) * (len(batch) + 3 - mask.ndim) + mask.shape)
    if any(size > 1 for size in mask.shape[:-3]):
        mask = jnp.broadcast_to(mask, (*batch, *mask.shape[-3:]))
    shared = mask.shape[-3] == 1
    mask = mask.reshape(-1, *((1, 1) if shared else heads), *mask.shape[-2:])
    padding = [
        (0, 0 if size == 1 else whole - size)
        for size, whole in zip(mask.shape[-2:], blocks.whole, strict=True)
    ]
    return jnp.pad(mask, [(0, 0)] * 3 + padding)


def _runs(segment_ids: jax.Array) -> jax.Array:
    """[..., N] numbers that differ between runs of equal ids."""
    changes = segment_ids != jnp.roll(segment_ids, 1, axis=-1)
    return jnp.cumsum(changes, axis=-1, dtype=jnp.int32)


def _even_size(length: int, largest: int) -> int:
    """Of as few blocks as there can be, the size that leaves least over."""
    return -(-length // -(-length // largest))


# Numbers


def _accumulator(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _lowest(dtype: jnp.dtype) -> float:
    return float(jnp.finfo(dtype).min)


def _finite(largest: jax.Array) -> jax.Array:
    """0 for rows that see nothing, so that exp(lowest - largest) is 0 there too."""
    return jnp.where(largest == _lowest(largest.dtype), 0, largest)


def _or_one(total: jax.Array) -> jax.Array:
    return jnp.where(total > 0, total, 1)


# Checks


def _scale(head_dim: int, temperature: float | None) -> float:
    if temperature is None:
        return head_dim**-0.5
    if not isinstance(temperature, numbers.Real) or not 0 < temperature < math.inf:
        raise BadInput(
            f'temperature is {temperature!r}; allowed is a finite number > 0, known at '
            'compilation. Set one, or None for the square root of the head dimension.'
        )
    return 1 / float(temperature)


def _check_size(name: str, size: int) -> None:
    if not isinstance(size, numbers.Integral) or size < 1:
        raise BadInput(f'{name} is {size!r}; allowed is an integer ≥ 1. Set one, or None.')


def _check_inputs(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None,
    is_causal: bool,
    segment_ids: jax.Array | None,
) -> None:
    *batch, num_queries, num_heads, _ = query.shape
    num_keys, num_groups = key.shape[-3:-1]
    if list(key.shape[:-3]) != batch or num_heads % num_groups:
        raise BadInput(
            f'key has shape {key.shape}, query {query.shape}; both are [batch…, tokens, heads, D] '
            'with the same batch axes, and the number of heads of query is a multiple of that of '
            'key. Reshape one of them.'
        )
    if is_causal and num_keys < num_queries:
        raise BadInput(
            f'is_causal is True with {num_queries} queries and {num_keys} keys; the last query '
            'sees the last key, so there must be at least as many keys as queries. Leave out the '
            'queries that would see nothing.'
        )
    shape = (*batch, num_heads, num_queries, num_keys)
    if mask is not None and (mask.dtype != bool or not _broadcasts(mask, shape)):
        raise BadInput(
            f'mask has shape {mask.shape} and dtype {mask.dtype}; allowed is bool that broadcasts '
            f'to [batch…, heads, queries, keys] = {shape}. A padding mask is [batch…, 1, 1, keys].'
        )
    if segment_ids is not None and (
        num_keys != num_queries
        or not jnp.issubdtype(segment_ids.dtype, jnp.integer)
        or segment_ids.shape[-1:] != (num_queries,)
        or not _broadcasts(segment_ids, (*batch, num_queries))
    ):
        raise BadInput(
            f'segment_ids has shape {segment_ids.shape} and dtype {segment_ids.dtype}; allowed are '
            f'integers of shape {(*batch, num_queries)}, one for each token of query, with as many '
            f'keys, of which there are {num_keys}. Use a mask for other patterns.'
        )


def _broadcasts(x: jax.Array, shape: tuple[int, ...]) -> bool:
    sizes = zip(reversed(x.shape), reversed(shape), strict=False)
    return x.ndim <= len(shape) and all(a in (1, b) for a, b in sizes)
