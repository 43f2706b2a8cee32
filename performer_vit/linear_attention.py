"""Attention by the features of queries and keys: whatever the feature map, and in linear time.

With A = φ(q) φ(k)ᵀ and D = diag(A 1), attention is D⁻¹ A v. Computed as φ(q) (φ(k)ᵀ v) over
φ(q) (φ(k)ᵀ 1) it never forms A (Choromanski et al. 2021, "Rethinking Attention with Performers",
arXiv 2009.14794, eq. (4)). Features must be non-negative. Letters: N queries, M keys, H heads,
R features, D the values' dimension; leading axes are batch axes, of any number.
"""

import jax
import jax.numpy as jnp


def linear_attention(
    query_features: jax.Array,
    key_features: jax.Array,
    value: jax.Array,
    key_mask: jax.Array | None = None,
) -> jax.Array:
    """Bidirectional attention in O((N + M)·R·D) time and O((N + M)·(R + D) + R·D) memory per head.

    out_n = φ(q_n)·(Σ_m φ(k_m) v_mᵀ) / φ(q_n)·Σ_m φ(k_m), sums over the keys that `key_mask` lets
    through.

    Args:
      query_features: φ(q) [..., N, H, R], non-negative.
      key_features: φ(k) [..., M, H, R], non-negative.
      value: [..., M, H, D].
      key_mask: [..., M] bool, True where a key may be attended to; None for all. What the other
        positions hold, NaN included, has no effect.

    Returns:
      [..., N, H, D] in `value`'s dtype; sums and the quotient are in float32 (float64 for float64
      features). A row whose normaliser is 0, as where every key is masked, is zeros, and so is its
      gradient.
    """
    dtype = _accumulator(query_features)
    output_dtype = value.dtype
    if key_mask is not None:
        keep = key_mask[..., None, None]
        key_features = jnp.where(keep, key_features, 0)
        value = jnp.where(keep, value, 0)
    # XLA's batched products are faster with the head axis in front of the contracted one.
    query_features, key_features, value = (
        jnp.swapaxes(x.astype(dtype), -3, -2) for x in (query_features, key_features, value)
    )
    summary = jnp.einsum('...mr,...md->...rd', key_features, value)
    key_sum = jnp.sum(key_features, axis=-2)
    numerator = jnp.einsum('...nr,...rd->...nd', query_features, summary)
    denominator = jnp.einsum('...nr,...r->...n', query_features, key_sum)[..., None]
    # The numerator is 0 where the denominator is; dividing by 1 there keeps the gradient finite.
    output = numerator / jnp.where(denominator > 0, denominator, 1)
    return jnp.swapaxes(output, -3, -2).astype(output_dtype)


def attention_matrix(
    query_features: jax.Array,
    key_features: jax.Array,
    mask: jax.Array | None = None,
    key_log_scale: jax.Array | None = None,
) -> jax.Array:
    """The normalised attention matrix that the features imply, formed at O(N·M) memory per head.

    P_nm = A_nm e^{s_m} / Σ_m' A_nm' e^{s_m'}, A_nm = φ(q_n)·φ(k_m), sums over the keys that `mask`
    lets through.

    Args:
      query_features: φ(q) [..., N, H, R], non-negative.
      key_features: φ(k) [..., M, H, R], non-negative.
      mask: bool, broadcastable to [..., H, N, M], True where a query may attend to a key; None for
        all.
      key_log_scale: s [..., M, H], for features whose scale would leave float32's range: the
        features of key m are then φ(k_m) e^{s_m}. None for 0.

    Returns:
      [..., H, N, M] float32 (float64 for float64 features): rows sum to 1, or to 0 where `mask`
      lets no key through. A product A_nm below float32's smallest normal number (1.2e-38) counts as
      that number, so a row that may attend to some key never divides by 0.
    """
    dtype = _accumulator(query_features)
    query_features, key_features = (
        jnp.swapaxes(x.astype(dtype), -3, -2) for x in (query_features, key_features)
    )
    products = jnp.einsum('...nr,...mr->...nm', query_features, key_features)
    logits = jnp.log(jnp.maximum(products, jnp.finfo(dtype).tiny))
    if key_log_scale is not None:
        logits = logits + jnp.swapaxes(key_log_scale, -2, -1)[..., None, :]
    if mask is None:
        return jax.nn.softmax(logits, axis=-1)
    # With the lowest finite number, not -inf, an empty row stays finite; it is zeroed at the end.
    logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    return jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0)


def quadratic_attention(
    query_features: jax.Array,
    key_features: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    key_log_scale: jax.Array | None = None,
) -> jax.Array:
    """The quotient of `linear_attention`, exact under any mask, at O(N·M) time and memory per head.

    A mask of N×M entries has no linear form; it costs O(N·M) memory by itself.

    Args:
      query_features, key_features, mask, key_log_scale: see `attention_matrix`.
      value: [..., M, H, D].

    Returns:
      [..., N, H, D] in `value`'s dtype, computed in float32 (float64 for float64 features). Rows
      that may attend to no key are zeros.
    """
    weights = attention_matrix(query_features, key_features, mask, key_log_scale)
    output = jnp.einsum(
        '...nm,...md->...nd', weights, jnp.swapaxes(value, -3, -2).astype(weights.dtype)
    )
    return jnp.swapaxes(output, -3, -2).astype(value.dtype)


def _accumulator(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
