"""The two makers of Google's JAX Performer, with their names, arguments and defaults.

Code written for `performer/fast_attention/jax/fast_attention.py` of google-research moves over by
its import: `from performer_vit.fast_attention import make_fast_softmax_attention`. New code has
`FavorAttention`, whose projections differ between layers and are saved and redrawn, and
`make_attention_fn`, whose functions take masks and fit Flax's own attention modules.

Both functions attend as the original's do, but for what follows.

- The projection W has the original's distribution, not its bits: `projections.draw(0, 0, 0, ...)`,
  drawn when the function is made and never again.
- No constant is added to features or to a normaliser. Softmax features are stabilised by factors
  that cancel in the quotient, and a row whose normaliser is 0 is zeros.
- `bias`, and `dropout_rate` in training, are refused; the original ignored them.
- `dtype` is the dtype of inputs and output; the original ignored it.
- Causal attention takes several attention axes, as one sequence in row-major order.

What has no meaning here is accepted with a `UserWarning` that says why. Letters: B batch, N tokens
(M of the keys), H heads, D dimension of a head, R features, D' the values' dimension.
"""

import contextlib
import functools
import math
import numbers
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from performer_vit import favor, feature_maps, linear_attention, projections
from performer_vit.errors import BadInput, choose

ROW_NORMS = {0.0: 'gaussian', 1.0: 'sqrt_dim'}
FEATURES_TYPES = {'ortho': 'orthogonal', 'iid': 'gaussian', 'deterministic': 'none'}

# Tokens of a causal chunk whose numerators are bare: its products take C·(R + D') a token, the
# sums of earlier chunks R·D'/C numbers.
CHUNK = 128


def make_fast_softmax_attention(
    qkv_dim: int,
    renormalize_attention: bool = True,
    numerical_stabilizer: float = 1e-6,
    nb_features: int = 256,
    ortho_features: bool = True,
    ortho_scaling: float = 0.0,
    redraw_features: bool = True,
    unidirectional: bool = False,
    nonnegative_features: bool = True,
    lax_scan_unroll: int = 1,
) -> Callable[..., jax.Array]:
    """Makes a function that attends by random features of the softmax kernel.

    out_n = Σ_m φ(q_n)·φ(k_m) v_m / Σ_m φ(q_n)·φ(k_m), where φ(q)·φ(k) estimates exp(q·k/√D)
    without bias if `ortho_scaling` is 0 (Choromanski et al. 2021, "Rethinking Attention with
    Performers", arXiv 2009.14794). Memory and time are linear in the number of tokens.

    Args:
      qkv_dim: D, the dimension of one head.
      renormalize_attention: False leaves out the division: out_n = Σ_m φ(q_n)·φ(k_m) v_m. The
        original multiplied each such row by its stabiliser's factors, which depend on the data, in
        the causal case on later keys too; here there are none, and float32 overflows where
        ‖q‖²/√D or ‖k‖²/√D nears 100. A warning says so.
      numerical_stabilizer: not used, see above; another value than 1e-6 gives a warning.
      nb_features: rows of W [nb_features, D]. R is as many for positive features, twice as many for
        trigonometric ones.
      ortho_features: True for rows that are orthogonal in blocks of D (`projections.orthogonal`),
        False for independent Gaussian ones.
      ortho_scaling: norms of orthogonal rows: 0.0 those of Gaussian vectors, 1.0 √D. Gaussian rows
        ignore it.
      redraw_features: True gives a warning, because W is kept. The original took the key of a new
        W from the sum of the queries: an example's output then depends on its batch, and a forward
        pass that is recomputed for the gradient may not find the same W.
      unidirectional: whether queries see their own and earlier tokens alone.
      nonnegative_features: True for the positive features exp(w·x' - ‖x'‖²/2), False for the
        trigonometric ones, whose normaliser may be negative.
      lax_scan_unroll: not used; another value than 1 gives a warning. Causal attention goes by
        chunks, with no scan over tokens to unroll.

    Returns:
      attention_fn(query, key, value, dtype=float32, bias=None, axis=None, broadcast_dropout=True,
      dropout_rng=None, dropout_rate=0.0, deterministic=False, precision=None) for arrays
      [B, attention axes…, H, D]. Tokens are all axes between B and H in row-major order, or those
      of `axis`, in its order; the others then act as batch axes. The result is shaped like the
      query, with D' last. The one argument that is new, `mask`, is there to be refused.

    Raises:
      BadInput: here for an argument that is not allowed; from the function for arrays that do not
        fit together, an `axis` that is none between B and H, a `bias`, a `mask`, or a
        `dropout_rate` in training.
    """
    choose('ortho_scaling', ortho_scaling, ROW_NORMS)
    _warn_of_unused(numerical_stabilizer, 1e-6, lax_scan_unroll)
    if redraw_features:
        _warn_of_redrawing()
    matrix = _draw(
        'orthogonal' if ortho_features else 'gaussian',
        nb_features,
        qkv_dim,
        ROW_NORMS[ortho_scaling],
    )
    if renormalize_attention:
        attend = functools.partial(
            favor.favor_attention,
            kernel='softmax' if nonnegative_features else 'softmax_trigonometric',
            projection=matrix,
            is_causal=unidirectional,
        )
    else:
        _warn_of_scale()
        feature_map = feature_maps.softmax if nonnegative_features else _trigonometric
        attend = functools.partial(
            _numerator,
            feature_map=functools.partial(feature_map, projection=matrix),
            is_causal=unidirectional,
        )
    return _make_attention_fn(attend, qkv_dim, unidirectional)


def make_fast_generalized_attention(
    qkv_dim: int,
    renormalize_attention: bool = True,
    numerical_stabilizer: float = 0.0,
    nb_features: int = 256,
    features_type: str = 'deterministic',
    kernel_fn: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    kernel_epsilon: float = 0.001,
    redraw_features: bool = False,
    unidirectional: bool = False,
    lax_scan_unroll: int = 1,
) -> Callable[..., jax.Array]:
    """Makes a function that attends by the features φ(x) = f(W x) + ε, or f(x) + ε, of any f.

    out_n = Σ_m φ(q_n)·φ(k_m) v_m / Σ_m φ(q_n)·φ(k_m): the generalised attention of Choromanski et
    al. 2021, arXiv 2009.14794. As in the original x is not divided by D^(1/4), as it is by
    `favor_attention`, and features not by √R.

    Args:
      qkv_dim: D, the dimension of one head; ignored for 'deterministic', which draws nothing.
      renormalize_attention: False leaves out the division: out_n = Σ_m φ(q_n)·φ(k_m) v_m.
      numerical_stabilizer: not used, see the module; another value than 0.0 gives a warning.
      nb_features: rows of W [nb_features, D]; ignored for 'deterministic'.
      features_type: 'ortho' for rows of W that are orthogonal in blocks of D, 'iid' for independent
        Gaussian ones, 'deterministic' for no W.
      kernel_fn: f, from a float32 array [..., R] to a real one [..., R']. It sees tokens in blocks,
        so it must treat each by itself.
      kernel_epsilon: ε. Signed features are allowed; their normaliser may be negative.
      redraw_features: see `make_fast_softmax_attention`; without effect for 'deterministic'.
      unidirectional, lax_scan_unroll: see `make_fast_softmax_attention`.

    Returns:
      See `make_fast_softmax_attention`.

    Raises:
      BadInput: see `make_fast_softmax_attention`.
    """
    choose('features_type', features_type, FEATURES_TYPES)
    if not callable(kernel_fn):
        raise BadInput(
            f'kernel_fn is {kernel_fn!r}; allowed is a callable of one array. Give one, such as '
            'jax.nn.relu.'
        )
    _warn_of_unused(numerical_stabilizer, 0.0, lax_scan_unroll)
    matrix = None
    if features_type != 'deterministic':
        if redraw_features:
            _warn_of_redrawing()
        matrix = _draw(FEATURES_TYPES[features_type], nb_features, qkv_dim, 'gaussian')

    def feature_map(x: jax.Array) -> jax.Array:
        return kernel_fn(_project(x, matrix)) + kernel_epsilon

    if not renormalize_attention:
        attend = functools.partial(_numerator, feature_map=feature_map, is_causal=unidirectional)
    else:
        contract = (
            linear_attention.causal_linear_attention
            if unidirectional
            else linear_attention.linear_attention
        )
        # The guard against cancelling would also act where features that are positive leave less
        # than a millionth of their product.
        least = favor.least_on_grid(kernel_fn)
        positive = least is not None and least[1] + kernel_epsilon >= 0
        attend = functools.partial(contract, feature_map=feature_map, signed=not positive)
    return _make_attention_fn(attend, None if matrix is None else qkv_dim, unidirectional)


def _make_attention_fn(
    attend: Callable[..., jax.Array], qkv_dim: int | None, unidirectional: bool
) -> Callable[..., jax.Array]:
    """Gives `attend`, of arrays [..., N, H, D], the original's signature and layout."""

    def attention_fn(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        dtype: Any = jnp.float32,
        bias: jax.Array | None = None,
        axis: int | Iterable[int] | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        precision: Any = None,
        *,
        # Flax's modules leave out what a function does not take: without this one a model would
        # attend to its padding, and nobody would know.
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Attends; `make_fast_softmax_attention` says how."""
        del broadcast_dropout, dropout_rng  # Nothing is dropped.
        if dropout_rate > 0 and not deterministic:
            raise BadInput(
                f'dropout_rate is {dropout_rate} in training, but the attention weights that it '
                'would drop are never formed. Set dropout_rate=0, or deterministic=True.'
            )
        for name, given in (('bias', bias), ('mask', mask)):
            if given is not None:
                raise BadInput(
                    f'{name} is given, but this function has no use for it. Leave it as None; '
                    'functions of favor.make_attention_fn take masks.'
                )
        axes = _attention_axes(axis, query)
        _check_arrays(query, key, value, axes, qkv_dim, unidirectional)
        favor.warn_of_many_heads(math.prod(query.shape[i] for i in axes), query.shape[-2])
        shape = query.shape
        query, key, value = promote_dtype(query, key, value, dtype=dtype)
        query, key, value = (_merge_tokens(x, axes) for x in (query, key, value))
        # None leaves the caller's precision alone, where the context manager would reset it.
        name = favor.precision_name(precision)
        with jax.default_matmul_precision(name) if name else contextlib.nullcontext():
            return _split_tokens(attend(query, key, value), axes, shape)

    return attention_fn


def _draw(projection: str, nb_features: int, qkv_dim: int, row_norms: str) -> np.ndarray:
    for name, given in (('nb_features', nb_features), ('qkv_dim', qkv_dim)):
        if not isinstance(given, numbers.Integral) or given < 1:
            raise BadInput(f'{name} is {given!r}; allowed is an integer ≥ 1. Set {name} to one.')
    # A constant, even where the function is made under a trace.
    with jax.ensure_compile_time_eval():
        return np.asarray(projections.draw(0, 0, 0, nb_features, qkv_dim, projection, row_norms))


def _project(x: jax.Array, matrix: np.ndarray | None) -> jax.Array:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if matrix is None:
        return x.astype(dtype)
    return jnp.einsum('...d,rd->...r', x, matrix.astype(x.dtype), preferred_element_type=dtype)


def _trigonometric(x: jax.Array, projection: np.ndarray) -> jax.Array:
    features, log_scale = feature_maps.trigonometric(x, projection)
    return features * jnp.exp(log_scale)[..., None]


def _numerator(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    feature_map: Callable[[jax.Array], jax.Array],
    is_causal: bool,
) -> jax.Array:
    """Σ_m φ(q_n)·φ(k_m) v_m [..., N, H, D'], over m ≤ n if `is_causal`; sums in float32."""
    query, key = feature_map(query), feature_map(key)
    dtype, value = value.dtype, value.astype(key.dtype)
    if not is_causal:
        sums = jnp.einsum('...mhr,...mhd->...hrd', key, value)
        return jnp.einsum('...nhr,...hrd->...nhd', query, sums).astype(dtype)
    num_tokens = query.shape[-3]
    query, key, value = (_split_chunks(x) for x in (query, key, value))
    sums = jnp.einsum('...cmhr,...cmhd->...chrd', key, value)
    # One chunk on: a chunk reads what came before it.
    sums = jnp.pad(sums, [(0, 0)] * (sums.ndim - 4) + [(1, 0)] + [(0, 0)] * 3)
    earlier = jnp.cumsum(sums, axis=-4)[..., :-1, :, :, :]
    products = jnp.einsum('...cnhr,...cmhr->...chnm', query, key)
    within = jnp.where(jnp.tri(products.shape[-1], dtype=bool), products, 0)
    output = jnp.einsum('...cnhr,...chrd->...cnhd', query, earlier)
    output += jnp.einsum('...chnm,...cmhd->...cnhd', within, value)
    return _join_chunks(output)[..., :num_tokens, :, :].astype(dtype)


def _split_chunks(x: jax.Array) -> jax.Array:
    """[..., N, H, K] to [..., chunks, C, H, K], the last one padded with zeros."""
    num_tokens = x.shape[-3]
    chunk = min(num_tokens, CHUNK)
    num_chunks = -(-num_tokens // chunk)
    padding = [(0, 0)] * (x.ndim - 3) + [(0, num_chunks * chunk - num_tokens), (0, 0), (0, 0)]
    return jnp.pad(x, padding).reshape(*x.shape[:-3], num_chunks, chunk, *x.shape[-2:])


def _join_chunks(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-4], x.shape[-4] * x.shape[-3], *x.shape[-2:])


def _merge_tokens(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """[B, axes…, H, K] to [B, other axes…, N, H, K]."""
    x = jnp.moveaxis(x, axes, _token_axes(x.ndim, axes))
    first = x.ndim - 2 - len(axes)
    return x.reshape(*x.shape[:first], math.prod(x.shape[first:-2]), *x.shape[-2:])


def _split_tokens(x: jax.Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """Undoes `_merge_tokens` of an array that had `shape`, but for its last axis."""
    x = x.reshape(*x.shape[:-3], *(shape[axis] for axis in axes), *x.shape[-2:])
    return jnp.moveaxis(x, _token_axes(x.ndim, axes), axes)


def _token_axes(ndim: int, axes: tuple[int, ...]) -> range:
    return range(ndim - 2 - len(axes), ndim - 2)


def _attention_axes(axis: int | Iterable[int] | None, query: jax.Array) -> tuple[int, ...]:
    if query.ndim < 4:
        raise BadInput(
            f'query has shape {query.shape}; allowed is [batch, attention axes…, heads, dim], at '
            'least four axes. Add the axis that is missing.'
        )
    allowed = range(1, query.ndim - 2)
    if axis is None:
        return tuple(allowed)
    axes = tuple(axis) if isinstance(axis, Iterable) else (axis,)
    if not axes or len(set(axes)) < len(axes) or any(entry not in allowed for entry in axes):
        raise BadInput(
            f'axis is {axis!r} for a query of shape {query.shape}; allowed are None and different '
            f'axes between the batch and the heads, {tuple(allowed)}. Choose among them.'
        )
    return axes


def _check_arrays(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    axes: tuple[int, ...],
    qkv_dim: int | None,
    unidirectional: bool,
) -> None:
    shapes = f'query {query.shape}, key {key.shape}, value {value.shape}'
    if key.shape[:-1] != value.shape[:-1]:
        raise BadInput(
            f'key and value must agree in all axes but the last: {shapes}. Give a value for every '
            'key.'
        )
    if query.ndim != key.ndim or any(
        query.shape[i] != key.shape[i] for i in range(query.ndim) if i not in axes
    ):
        raise BadInput(
            f'query and key must agree in all axes but those attended along, {axes}: {shapes}. '
            'Reshape or repeat one of them.'
        )
    if unidirectional and query.shape != key.shape:
        raise BadInput(
            f'unidirectional attention is of a sequence to itself: {shapes}. Give as many keys as '
            'queries, or set unidirectional=False.'
        )
    if qkv_dim is not None and query.shape[-1] != qkv_dim:
        raise BadInput(
            f'qkv_dim is {qkv_dim}, but the last axis of query has {query.shape[-1]}. Set qkv_dim '
            'to the dimension of one head.'
        )


def _warn_of_unused(numerical_stabilizer: float, default: float, lax_scan_unroll: int) -> None:
    if numerical_stabilizer != default:
        _warn(
            f'numerical_stabilizer={numerical_stabilizer} has no effect: softmax features are '
            'stabilised by factors that cancel in the quotient, and rows whose normaliser is 0 are '
            f'zeros. Leave it at {default}.'
        )
    if lax_scan_unroll != 1:
        _warn(
            f'lax_scan_unroll={lax_scan_unroll} has no effect: unidirectional attention goes by '
            'chunks, with no scan over tokens to unroll. Leave it at 1.'
        )


def _warn_of_redrawing() -> None:
    _warn(
        'redraw_features=True has no effect: one projection is drawn when the function is made. A '
        'pure function could take a new one only from its inputs, and outputs would depend on the '
        'batch. Set redraw_features=False, or train with FavorAttention and redraw_projections.'
    )


def _warn_of_scale() -> None:
    _warn(
        'renormalize_attention=False gives the bare sums of φ(q)·φ(k) v, which estimate those of '
        "exp(q·k/√D) v, without the original's factors that depend on the data. Check the scale "
        'of what follows, or set renormalize_attention=True.'
    )


def _warn(message: str) -> None:
    # The line that calls the maker: `_warn` < `_warn_of_…` < the maker < it.
    warnings.warn(message, UserWarning, stacklevel=4)
