"""FAVOR+ attention: projections, feature maps and contractions as one function.

`favor_attention` is the pure function; `FavorAttention` the Flax module that keeps its weights;
`make_attention_fn` makes the `attention_fn` that Flax's own attention modules take. The method is
that of Choromanski et al. 2021, "Rethinking Attention with Performers", arXiv 2009.14794. Letters:
N queries, M keys, H heads, D head dimension, R features; leading axes are batch axes.
"""

import contextlib
import functools
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from performer_vit import exact_attention, feature_maps, linear_attention, projections
from performer_vit.errors import BadInput, choose

KERNELS = ('exact', 'softmax', 'relu', 'gelu', 'elu', 'ftheta', 'ftheta_mixture')

_PROJECTED_MAPS = {
    'relu': feature_maps.relu,
    'gelu': feature_maps.gelu,
    'elu': feature_maps.elu,
}
_LEARNT_MAPS = {
    'ftheta': feature_maps.ftheta,
    'ftheta_mixture': feature_maps.ftheta_mixture,
}


def favor_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    kernel: str,
    projection: jax.Array | None = None,
    mask: jax.Array | None = None,
    theta: feature_maps.Theta | None = None,
) -> jax.Array:
    """Attention by the named kernel: φ(q) (φ(k)ᵀ v) / φ(q) (φ(k)ᵀ 1), or the softmax's for 'exact'.

    A mask whose query and head axes are 1 (or left out) hides keys from everyone, as padding needs:
    it keeps the linear time and memory, and what the hidden positions hold, NaN included, has no
    effect. A mask with a query or head axis of its own, as a causal one, has no such form: it is
    applied exactly to the N×M matrix, at O(N·M) memory, which such a mask costs by itself.

    Kernel 'softmax' is stabilised by c_r = max over unmasked keys of log φ(k)_r, moved from the
    keys to the queries: φ(k)_r e^{-c_r} and φ(q)_r e^{c_r - t}, t = max_r(log φ(q)_r + c_r). The
    factors cancel exactly in the quotient. Every feature is then 1 at some key and every query 1 at
    some feature, so the denominator is at least 1 for inputs of any size, and no ε is needed.
    Under a mask that needs the N×M matrix each key and each query is divided by the largest of its
    own features instead, see `linear_attention.attention_matrix` for what that bounds.

    Args:
      query: [..., N, H, D] floating, with at least one batch axis.
      key: [..., M, H, D], with M ≥ 1.
      value: [..., M, H, D'].
      kernel: one of `KERNELS`.
      projection: W [R, D] shared by the heads; needed by 'softmax', optional (None: W = I) for
        'relu', 'gelu' and 'elu', refused by the others.
      mask: bool, broadcastable to [..., H, N, M] by NumPy's rules (axes aligned from the right),
        True where a query may attend to a key; None for all.
      theta: weights of `feature_maps.init_theta` for 'ftheta' and 'ftheta_mixture' alone.

    Returns:
      [..., N, H, D'] in `value`'s dtype; features, sums and normaliser are in float32. Rows
      that may attend to no key are zeros.

    Raises:
      BadInput: unknown kernel; an argument of the wrong shape or dtype, or missing, or not for this
        kernel.
    """
    _check_weights(kernel, projection, theta, query.shape[-1])
    mask = _check_inputs(query, key, value, mask)
    key_mask = _key_mask(mask, key.shape[-3])
    if key_mask is not None:
        # Before the feature map, or a NaN in the padding would reach θ's gradient as 0 · NaN.
        key, value = (jnp.where(key_mask[..., None, None], x, 0) for x in (key, value))
    if kernel == 'exact':
        return exact_attention.exact_attention(query, key, value, mask)
    if mask is not None and key_mask is None:
        query_features, key_features, key_log_scale = _pairwise_features(
            query, key, kernel, projection, theta
        )
        return linear_attention.quadratic_attention(
            query_features, key_features, value, mask, key_log_scale
        )
    if kernel == 'softmax':
        query_features, key_features = _stabilised_softmax_features(
            query, key, projection, key_mask
        )
    else:
        query_features, key_features = (
            _features(x, kernel, projection, theta) for x in (query, key)
        )
    return linear_attention.linear_attention(query_features, key_features, value, key_mask)


def attention_matrix(
    query: jax.Array,
    key: jax.Array,
    *,
    kernel: str,
    projection: jax.Array | None = None,
    mask: jax.Array | None = None,
    theta: feature_maps.Theta | None = None,
) -> jax.Array:
    """The normalised matrix that `favor_attention` implies, formed at O(N·M) memory per head.

    For looking at attention, and for tests; attention itself does not need it.

    Args:
      query, key, kernel, projection, mask, theta: see `favor_attention`.

    Returns:
      [..., H, N, M] float32: rows sum to 1, or to 0 where `mask` lets no key through.

    Raises:
      BadInput: see `favor_attention`.
    """
    _check_weights(kernel, projection, theta, query.shape[-1])
    mask = _check_inputs(query, key, key, mask)
    key_mask = _key_mask(mask, key.shape[-3])
    if key_mask is not None:
        key = jnp.where(key_mask[..., None, None], key, 0)
    if kernel == 'exact':
        return exact_attention.attention_matrix(query, key, mask)
    query_features, key_features, key_log_scale = _pairwise_features(
        query, key, kernel, projection, theta
    )
    return linear_attention.attention_matrix(query_features, key_features, mask, key_log_scale)


class FavorAttention(nn.Module):
    """`favor_attention` with its weights: a projection in a collection of its own, or fθ's params.

    The projection is the variable `matrix` of the collection `projections`, which no optimiser
    sees: `projections.draw(seed, layer, 0, ...)`, with the layer's number taken from the module's
    path, so that every layer has its own. It is saved with the model, and `redraw_projections`
    draws it anew. One matrix, or one fθ, serves all heads, queries and keys.

    When the collection `intermediates` is mutable, the normalised [..., H, N, M] matrix is sown
    there as `attention_map`; otherwise it is never formed.

    Attributes:
      kernel: one of `KERNELS`.
      num_features: R. 0 means the head dimension, for projection 'none' and for fθ; otherwise an
        integer ≥ 1. Kernel 'exact' has no features and ignores it, as it does `projection`.
      projection: one of `projections.PROJECTIONS`; fθ has none and ignores it.
      row_norms: one of `projections.ROW_NORMS`, for 'orthogonal'.
      hidden: width of fθ's hidden layer.
      seed: the seed of the projections; fθ's weights come from the `params` stream, as usual.
      dtype: the dtype of the computation; None for the inputs' common one. Features, sums and
        normaliser are in float32, and fθ's params float32, whatever it is.
    """

    kernel: str
    num_features: int = 0
    projection: str = 'orthogonal'
    row_norms: str = 'gaussian'
    hidden: int = 128
    seed: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """Attends.

        Args:
          query, key, value, mask: see `favor_attention`.

        Returns:
          [..., N, H, D'] in the computation's dtype.

        Raises:
          BadInput: a field that is not allowed, or see `favor_attention`.
        """
        head_dim = query.shape[-1]
        num_features = _check_fields(
            self.kernel, self.num_features, self.projection, self.row_norms, head_dim
        )
        query, key, value = promote_dtype(query, key, value, dtype=self.dtype)
        weights = {'kernel': self.kernel, 'mask': mask}
        if self.kernel in _LEARNT_MAPS:
            if self.hidden < 1:
                raise BadInput(f'hidden is {self.hidden}; set it to 1 or more.')
            weights['theta'] = self.param(
                'theta',
                functools.partial(feature_maps.init_theta, mixture=self.kernel == 'ftheta_mixture'),
                head_dim,
                self.hidden,
                num_features,
            )
        elif self.kernel != 'exact' and self.projection != 'none':
            weights['projection'] = self.variable(
                'projections',
                'matrix',
                projections.draw,
                self.seed,
                _layer_number(self.path),
                0,
                num_features,
                head_dim,
                self.projection,
                self.row_norms,
            ).value
        if self.is_mutable_collection('intermediates'):
            self.sow('intermediates', 'attention_map', attention_matrix(query, key, **weights))
        return favor_attention(query, key, value, **weights)


def redraw_projections(
    collection: Any,
    *,
    seed: int,
    draw_number: int | jax.Array,
    projection: str,
    row_norms: str = 'gaussian',
) -> Any:
    """Draws every `matrix` of a `projections` collection anew, as a pure function of its arguments.

    Training on several draws keeps a network from fitting itself to one (Choromanski et al. 2021,
    section 4.2, "redrawing"). Draw 0 gives back the initial matrices.

    Args:
      collection: the `projections` collection of a whole model, as its `init` returned it: a
        layer's number is made from its path, so a subtree would be drawn differently.
      seed, projection, row_norms: the fields of the model's `FavorAttention` modules.
      draw_number: see `projections.draw`; may be traced.

    Returns:
      The same tree with new matrices [R, D] float32.

    Raises:
      BadInput: projection 'none' or an unknown one, or a matrix that has not two axes.
    """
    choose('projection', projection, ('orthogonal', 'gaussian'))

    def redraw(path: tuple[Any, ...], matrix: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        if matrix.ndim != 2:
            raise BadInput(
                f'the projection {"/".join(names)} has shape {matrix.shape}; redrawing takes '
                '[R, D] matrices. Redraw inside pmap, or before replicating the state.'
            )
        layer = _layer_number(names[:-1])
        return projections.draw(seed, layer, draw_number, *matrix.shape, projection, row_norms)

    return jax.tree.map_with_path(redraw, collection)


def make_attention_fn(
    kernel: str = 'softmax',
    num_features: int = 256,
    projection: str = 'orthogonal',
    seed: int = 0,
    layer: int = 0,
    row_norms: str = 'gaussian',
) -> Callable[..., jax.Array]:
    """Makes an `attention_fn` for `nn.MultiHeadDotProductAttention` and `nnx.MultiHeadAttention`.

    The function has the signature of `flax.linen.dot_product_attention`, and of
    `flax.nnx.dot_product_attention`. Its projection is a constant, `projections.draw(seed, layer,
    0, ...)`: give every layer its own number. `FavorAttention` is the module whose projections are
    saved and redrawn.

    It differs from Flax's function where FAVOR+ does. Attention weights are never formed, so
    dropout of them is refused, and so is `bias`. Rows that may attend to no key are zeros, not the
    mean of the values. As with Flax, a mask's non-zero entries let keys through, whatever its
    dtype; a mask with a query axis, as `nn.make_attention_mask` makes, costs O(N·M) memory, where a
    padding mask [..., 1, 1, M] costs nothing. `sow_weights=True` sows the matrix that the features
    imply.

    Args:
      kernel: one of `KERNELS` except fθ's, which have parameters to train.
      num_features: R; with projection 'none' 0 or the head dimension. Ignored for 'exact'.
      projection: one of `projections.PROJECTIONS`.
      seed, layer: see `projections.draw`.
      row_norms: one of `projections.ROW_NORMS`.

    Returns:
      The function of (query [..., N, H, D], key [..., M, H, D], value [..., M, H, D'], bias, mask,
      ...) that gives [..., N, H, D'].

    Raises:
      BadInput: here for an unknown name or fθ; from the function as `favor_attention` does, and for
        an option that cannot be honoured.
    """
    _check_names(kernel, projection, row_norms)
    if kernel in _LEARNT_MAPS:
        raise BadInput(
            f'kernel {kernel!r} has parameters to train, which an attention_fn cannot hold. Use '
            'the module FavorAttention, or another kernel.'
        )

    @functools.cache
    def matrix(head_dim: int) -> np.ndarray | None:
        resolved = _check_fields(kernel, num_features, projection, row_norms, head_dim)
        if kernel == 'exact' or projection == 'none':
            return None
        # Drawn once and for all, even when first called under a trace.
        with jax.ensure_compile_time_eval():
            return np.asarray(
                projections.draw(seed, layer, 0, resolved, head_dim, projection, row_norms)
            )

    def attention_fn(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        *,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable[..., jax.Array] | None = None,
        qk_attn_weights_einsum: Callable[..., jax.Array] | None = None,
        attn_weights_value_einsum: Callable[..., jax.Array] | None = None,
    ) -> jax.Array:
        """Attends; `make_attention_fn` and `flax.linen.dot_product_attention` say how."""
        # Nothing is dropped, and float32 is what the softmax has in any case.
        del broadcast_dropout, dropout_rng, force_fp32_for_softmax
        if dropout_rate > 0 and not deterministic:
            raise BadInput(
                f'dropout_rate is {dropout_rate} in training, but the attention weights that it '
                'would drop are never formed. Set dropout_rate=0, or deterministic=True.'
            )
        for name, given in (
            ('bias', bias),
            ('einsum_dot_general', einsum_dot_general),
            ('qk_attn_weights_einsum', qk_attn_weights_einsum),
            ('attn_weights_value_einsum', attn_weights_value_einsum),
        ):
            if given is not None:
                raise BadInput(
                    f'{name} is given, but it acts on attention weights, which this attention '
                    f'never forms. Leave {name} as None.'
                )
        query, key, value = promote_dtype(query, key, value, dtype=dtype)
        if mask is not None:
            mask = jnp.asarray(mask) != 0
        if is_causal:
            causal = jnp.tri(query.shape[-3], key.shape[-3], dtype=bool)
            mask = causal if mask is None else causal & mask
        weights = {'kernel': kernel, 'projection': matrix(query.shape[-1]), 'mask': mask}
        # None leaves the caller's precision alone, where the context manager would reset it.
        name = _precision_name(precision)
        with jax.default_matmul_precision(name) if name else contextlib.nullcontext():
            if module is not None:
                _sow_weights(module, attention_matrix(query, key, **weights))
            return favor_attention(query, key, value, **weights)

    return attention_fn


def _features(
    x: jax.Array,
    kernel: str,
    projection: jax.Array | None,
    theta: feature_maps.Theta | None,
) -> jax.Array:
    if kernel in _LEARNT_MAPS:
        return _LEARNT_MAPS[kernel](x, theta)
    return _PROJECTED_MAPS[kernel](x, projection)


def _stabilised_softmax_features(
    query: jax.Array, key: jax.Array, projection: jax.Array, key_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """φ(q) [..., N, H, R] and φ(k) [..., M, H, R], stabilised as `favor_attention` says."""
    query_log = feature_maps.softmax_log_features(query, projection)
    key_log = feature_maps.softmax_log_features(key, projection)
    if key_mask is not None:
        # A masked key may exceed the maximum of the others, so it goes before exp, not after.
        key_log = jnp.where(key_mask[..., None, None], key_log, -jnp.inf)
    # Constants to the gradient, because the quotient does not depend on them.
    key_max = jax.lax.stop_gradient(jnp.max(key_log, axis=-3, keepdims=True))
    key_max = jnp.where(jnp.isneginf(key_max), 0, key_max)
    query_log = query_log + key_max
    query_max = jax.lax.stop_gradient(jnp.max(query_log, axis=-1, keepdims=True))
    return jnp.exp(query_log - query_max), jnp.exp(key_log - key_max)


def _pairwise_features(
    query: jax.Array,
    key: jax.Array,
    kernel: str,
    projection: jax.Array | None,
    theta: feature_maps.Theta | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """φ(q), φ(k) and the keys' logarithmic scale [..., M, H], for the N×M form under any mask.

    The keys that set the maximum of `_stabilised_softmax_features` may be hidden from some query,
    whose sums would then underflow. So each key has a scale of its own here.
    """
    if kernel != 'softmax':
        query_features, key_features = (
            _features(x, kernel, projection, theta) for x in (query, key)
        )
        return query_features, key_features, None
    query_log = feature_maps.softmax_log_features(query, projection)
    key_log = feature_maps.softmax_log_features(key, projection)
    query_max, key_max = (
        jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True)) for x in (query_log, key_log)
    )
    return jnp.exp(query_log - query_max), jnp.exp(key_log - key_max), key_max[..., 0]


def _layer_number(path: tuple[str, ...] | list[str]) -> int:
    return zlib.crc32('/'.join(path).encode())


def _sow_weights(module: Any, weights: jax.Array) -> None:
    from flax import nnx

    collection = nnx.Intermediate if isinstance(module, nnx.Module) else 'intermediates'
    module.sow(collection, 'attention_weights', weights)


def _precision_name(precision: Any) -> str | None:
    """Flax's `precision` as the name that JAX's context manager takes."""
    if isinstance(precision, tuple) and len(set(precision)) == 1:
        precision = precision[0]
    if isinstance(precision, jax.lax.Precision):
        return precision.name.lower()
    if precision is None or isinstance(precision, str):
        return precision
    raise BadInput(
        f'precision is {precision!r}; allowed are None, a name and a jax.lax.Precision, one for '
        'both operands. Set one of these.'
    )


def _check_names(kernel: str, projection: str, row_norms: str) -> None:
    choose('kernel', kernel, KERNELS)
    choose('projection', projection, projections.PROJECTIONS)
    choose('row_norms', row_norms, projections.ROW_NORMS)
    if kernel == 'softmax' and projection == 'none':
        raise BadInput(
            "kernel 'softmax' with projection 'none' estimates nothing: its features need random "
            "rows. Set projection to 'orthogonal' or 'gaussian', or choose another kernel."
        )


def _check_fields(
    kernel: str, num_features: int, projection: str, row_norms: str, head_dim: int
) -> int:
    """Checks a model's fields and returns R."""
    _check_names(kernel, projection, row_norms)
    if num_features == 0 and (projection == 'none' or kernel in (*_LEARNT_MAPS, 'exact')):
        return head_dim
    if num_features < 1:
        raise BadInput(
            f'num_features is {num_features} with projection {projection!r} and kernel {kernel!r}; '
            'allowed is an integer ≥ 1. Set num_features, to 256 for example.'
        )
    if projection == 'none' and kernel in _PROJECTED_MAPS and num_features != head_dim:
        raise BadInput(
            f"num_features is {num_features} with projection 'none', which makes as many features "
            f'as the head dimension, {head_dim}. Set num_features to 0 or {head_dim}, or '
            "projection to 'orthogonal' or 'gaussian'."
        )
    return num_features


def _check_weights(
    kernel: str,
    projection: jax.Array | None,
    theta: feature_maps.Theta | None,
    head_dim: int,
) -> None:
    choose('kernel', kernel, KERNELS)
    if (theta is not None) != (kernel in _LEARNT_MAPS):
        raise BadInput(
            f'theta is {"missing" if theta is None else "given"} for kernel {kernel!r}; it belongs '
            'to ftheta and ftheta_mixture alone. Make it with feature_maps.init_theta.'
        )
    if projection is None:
        if kernel == 'softmax':
            raise BadInput(
                "projection is None; kernel 'softmax' needs a matrix [R, D]. Draw one with "
                'projections.draw.'
            )
        return
    if kernel != 'softmax' and kernel not in _PROJECTED_MAPS:
        raise BadInput(f'projection is given, but kernel {kernel!r} has none. Leave it as None.')
    if projection.ndim != 2 or projection.shape[1] != head_dim:
        raise BadInput(
            f'projection has shape {projection.shape}; allowed is [R, D] with the head dimension '
            f'D = {head_dim}. Draw it for that dimension.'
        )


def _check_inputs(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array | None:
    """Checks the arrays and returns the mask with as many axes as they have."""
    layout = '[batch…, tokens, heads, head_dim]'
    for name, x in (('query', query), ('key', key), ('value', value)):
        if x.ndim < 4:
            raise BadInput(
                f'{name} has shape {x.shape}; allowed is {layout}, with at least one batch axis. '
                'Add the axis that is missing.'
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise BadInput(f'{name} has dtype {x.dtype}; allowed is a floating one. Convert it.')
        if x.shape[:-3] != query.shape[:-3] or x.shape[-2] != query.shape[-2]:
            raise BadInput(
                f'{name} has shape {x.shape}, query {query.shape}; both are {layout} and must '
                'agree in their batch axes and heads. Reshape or repeat one of them.'
            )
    if key.shape[-1] != query.shape[-1]:
        raise BadInput(
            f'key has head dimension {key.shape[-1]}, query {query.shape[-1]}; both are {layout} '
            'and must agree there. Project both to one dimension.'
        )
    if value.shape[-3] != key.shape[-3] or key.shape[-3] < 1:
        raise BadInput(
            f'value has {value.shape[-3]} tokens, key {key.shape[-3]}; both are {layout} and must '
            'have the same number of tokens, at least 1. Give a value for every key.'
        )
    if mask is None:
        return None
    if mask.dtype != bool:
        raise BadInput(
            f'mask has dtype {mask.dtype}; allowed is bool, True where a query may attend to a '
            'key. Compare it with what it means, as in mask != 0.'
        )
    target = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    padded = (1,) * (len(target) - mask.ndim) + mask.shape
    if len(padded) != len(target) or any(
        m not in (1, t) for m, t in zip(padded, target, strict=True)
    ):
        raise BadInput(
            f'mask has shape {mask.shape}; allowed is what broadcasts to [batch…, heads, queries, '
            f'keys] = {target}. A padding mask is [batch…, 1, 1, keys].'
        )
    return mask.reshape(padded)


def _key_mask(mask: jax.Array | None, num_keys: int) -> jax.Array | None:
    """[..., M] of a mask that hides keys from every query and head alike; None for any other."""
    if mask is None or mask.shape[-3] != 1 or mask.shape[-2] != 1:
        return None
    return jnp.broadcast_to(mask[..., 0, 0, :], (*mask.shape[:-3], num_keys))
