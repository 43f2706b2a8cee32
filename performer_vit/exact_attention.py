"""Exact softmax attention, softmax(q kᵀ/√D) v (Vaswani et al. 2017, arXiv 1706.03762, eq. (1)).

The opponent that linear attention is measured against, so it is given the same care: heads in
front, the softmax in float32, and memory linear in the number of keys. Letters: N queries, M keys,
H heads, D head dimension; leading axes are batch axes, of any number.
"""

import jax
import jax.numpy as jnp

BLOCK_SIZE = 512


def exact_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    block_size: int | None = None,
) -> jax.Array:
    """softmax(q kᵀ/√D) v, in blocks of queries where there are many.

    With N > `block_size` the blocks run one after the other and the backward pass computes each
    block's weights anew, so that no more than `block_size`·M weights per head exist at a time, in
    either direction. Blocks split rows alone: the arithmetic of a row is the same.

    Args:
      query: [..., N, H, D].
      key: [..., M, H, D].
      value: [..., M, H, D'].
      mask: bool, broadcastable to [..., H, N, M], True where a query may attend to a key; None for
        all.
      block_size: queries per block; None for 512.

    Returns:
      [..., N, H, D'] in `value`'s dtype. Products are in the inputs' dtype with sums in float32,
      the softmax is in float32 (float64 for float64 inputs). Rows that may attend to no key are
      zeros, and so is their gradient.
    """
    if block_size is None:
        block_size = BLOCK_SIZE
    num_queries = query.shape[-3]
    query, key, value = (jnp.swapaxes(x, -3, -2) for x in (query, key, value))
    if num_queries <= block_size:
        output = _attend(query, key, value, mask)
    else:
        output = _attend_in_blocks(query, key, value, mask, block_size)
    return jnp.swapaxes(output, -3, -2)


def attention_matrix(query: jax.Array, key: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The weights softmax(q kᵀ/√D), formed at O(N·M) memory per head.

    Args:
      query, key, mask: see `exact_attention`.

    Returns:
      [..., H, N, M] float32 (float64 for float64 inputs): rows sum to 1, or to 0 where `mask` lets
      no key through.
    """
    return _weights(jnp.swapaxes(query, -3, -2), jnp.swapaxes(key, -3, -2), mask)


def _weights(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum('...nd,...md->...nm', query, key, preferred_element_type=dtype)
    logits = logits * query.shape[-1] ** -0.5
    if mask is None:
        return jax.nn.softmax(logits, axis=-1)
    # With the lowest finite number, not -inf, an empty row stays finite; it is zeroed at the end.
    logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    return jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0)


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
    weights = _weights(query, key, mask)
    output = jnp.einsum(
        '...nm,...md->...nd',
        weights.astype(value.dtype),
        value,
        preferred_element_type=weights.dtype,
    )
    return output.astype(value.dtype)


def _attend_in_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, block_size: int
) -> jax.Array:
    """`_attend` on [..., H, N, D] arrays, one block of rows at a time."""
    num_queries = query.shape[-2]
    query_blocks = _split_rows(query, block_size)
    if mask is None or mask.ndim < 2 or mask.shape[-2] == 1:
        output = jax.lax.map(
            jax.checkpoint(lambda block: _attend(block, key, value, mask)), query_blocks
        )
    else:
        output = jax.lax.map(
            jax.checkpoint(lambda blocks: _attend(blocks[0], key, value, blocks[1])),
            (query_blocks, _split_rows(mask, block_size)),
        )
    output = jnp.moveaxis(output, 0, -3)
    rows = output.reshape(*output.shape[:-3], -1, output.shape[-1])
    return rows[..., :num_queries, :]


def _split_rows(x: jax.Array, block_size: int) -> jax.Array:
    """[..., N, K] to [N/block, ..., block, K], the last block padded with zeros."""
    num_rows, width = x.shape[-2:]
    num_blocks = -(-num_rows // block_size)
    padding = [(0, 0)] * (x.ndim - 2) + [(0, num_blocks * block_size - num_rows), (0, 0)]
    blocks = jnp.pad(x, padding).reshape(*x.shape[:-2], num_blocks, block_size, width)
    return jnp.moveaxis(blocks, -3, 0)
