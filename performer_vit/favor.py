"""FAVOR+ attention: projections, feature maps and contractions as one function.

`favor_attention` is the pure function; `FavorAttention` the Flax module that keeps its weights;
`make_attention_fn` makes the `attention_fn` that Flax's own attention modules take. The method is
that of Choromanski et al. 2021, "Rethinking Attention with Performers", arXiv 2009.14794. Letters:
N queries, M keys, H heads, D head dimension, R features; leading axes are batch axes.
"""

import contextlib
import functools
import numbers
import operator
import warnings
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

_ELEMENTWISE = {
    'relu': feature_maps.relu,
    'relu_squared': feature_maps.relu_squared,
    'gelu': feature_maps.gelu,
    'elu': feature_maps.elu,
    'sigmoid': feature_maps.sigmoid,
    'softplus': feature_maps.softplus,
    'exp': feature_maps.exp,
    'identity': feature_maps.identity,
    # Weighed besides by the angles that `_with_angles` appends.
    'cosine': feature_maps.relu,
}
_LEARNT = {
    'ftheta': feature_maps.ftheta,
    'ftheta_mixture': feature_maps.ftheta_mixture,
}
_SOFTMAX_ESTIMATORS = (
    'softmax',
    'softmax_hyperbolic',
    'softmax_optimal',
    'softmax_trigonometric',
)
KERNELS = ('exact', *_SOFTMAX_ESTIMATORS, *_ELEMENTWISE, *_LEARNT)
LEARNT_KERNELS = tuple(_LEARNT)

# What has one fθ in common.
THETA_SHARINGS = ('all', 'sides', 'heads', 'none')
_OWN_HEADS = ('sides', 'none')
_OWN_SIDES = ('heads', 'none')

# A row of W makes two features of these: e^{±w·x}, or the cosine and the sine.
_PAIRED = ('softmax_hyperbolic', 'softmax_trigonometric')
# Features of both signs: what they imply has negative entries, and is no softmax's matrix.
SIGNED_KERNELS = ('softmax_trigonometric', 'identity')

# What a kernel must know of the whole sequence: without it no token can be attended to.
_WHOLE = {
    'exact': 'all keys at once',
    'softmax_optimal': 'all keys at once',
    'cosine': 'the length of the whole sequence',
}

Kernel = str | Callable[[jax.Array], jax.Array]
# One map, or one of 'query' and one of 'key'.
Thetas = feature_maps.Theta | dict[str, feature_maps.Theta]

# More heads than tokens, and more than this: someone has swapped the axes.
MANY_HEADS = 64


def favor_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    kernel: Kernel,
    projection: jax.Array | None = None,
    mask: jax.Array | None = None,
    theta: Thetas | None = None,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
    temperature: float | None = None,
    axis_name: Any = None,
    block_size: int | None = None,
) -> jax.Array:
    """Attention by the named kernel: φ(q) (φ(k)ᵀ v) / φ(q) (φ(k)ᵀ 1), or the softmax's for 'exact'.

    The kernels 'softmax', 'softmax_hyperbolic', 'softmax_optimal' (FAVOR++) and
    'softmax_trigonometric' estimate softmax attention without bias in its kernel; their error falls
    as 1/√R and grows with the norms of q and k, as the docstrings of `feature_maps` give in closed
    form. The A of 'softmax_optimal' is that of all queries, padded ones too, and all keys that a
    mask of keys leaves; of packed sequences, that of all of them together. The other kernels define
    attentions of their own: W only samples their features.

    'cosine' multiplies the products of 'relu' by cos(π (i - j) / (2L)), so that near tokens count
    more (cosFormer: Qin et al. 2022, "cosFormer: Rethinking Softmax in Attention", arXiv
    2202.08791): 2R features of R rows. L is max(N, M); key m is at j = m, and query n at i = n, or
    at i = n + M - N with `is_causal`. With `axis_name` N and M count the tokens of all devices,
    which must hold consecutive stretches in the axis's order. For bfloat16 inputs each of the two
    factors that make a product's cosine is rounded, by 2⁻⁸ of itself.

    A mask whose query and head axes are 1 (or left out) hides keys from everyone, as padding needs:
    it keeps the linear time and memory, and what the hidden positions hold, NaN included, has no
    effect (but as queries of 'softmax_optimal', whose A they enter). `is_causal` and `segment_ids`
    keep them too, but hide no NaN: a weight of 0 times NaN is NaN. A mask with a query or head axis
    of its own has no such form: it is applied exactly to the N×M matrix, at O(N·M) memory, which
    such a mask costs by itself.

    Features of softmax estimators leave float32's range; `linear_attention` says how they are
    stabilised without changing the quotient; with `is_causal`, `segment_ids` or a mask that has a
    query axis, products of features below `linear_attention.SMALLEST` of the largest count as that.
    Features, sums and normaliser are in float32 whatever the inputs are: with bfloat16 inputs the
    products W·x' have bfloat16 factors, and the output differs from that of float32 by their
    rounding, 2⁻⁸ of |w||x'|.

    Large batches are attended to in blocks, one after the other. Under `jax.jit` with arrays that
    are sharded over the batch, XLA would gather all of it on every device: wrap the call in
    `jax.shard_map` there.

    Args:
      query: [batch…, N, H, D] floating, with at least one batch axis.
      key: [batch…, M, G, D], with M ≥ 1; G divides H, and query head h attends to key head
        h // (H / G).
      value: [batch…, M, G, D'].
      kernel: one of `KERNELS`, or a function f of arrays, applied to each element of u = Wx' for
        the features (f(u) + 1e-3) / √R: it must not be negative. 'identity' and
        'softmax_trigonometric' have features of both signs, whose normaliser may cancel.
      projection: W [R, D] shared by the heads ([R/2, D] for 'softmax_hyperbolic' and
        'softmax_trigonometric'); needed by the softmax estimators, optional (None: W = I) for the
        kernels that apply a function to each element, refused by 'exact' and fθ.
      mask: bool, an array or nested lists, broadcastable to [batch…, H, N, M] by NumPy's rules
        (axes aligned from the right), True where a query may attend to a key; None for all.
      theta: weights of `feature_maps.init_theta` for 'ftheta' and 'ftheta_mixture' alone. With a
        leading axis of G on every array, each key head has its own map, and so have the query heads
        that attend to it. {'query': theta, 'key': theta} has one for queries and one for keys.
      is_causal: whether query n attends to the keys m ≤ n + (M - N) alone; M ≥ N.
      segment_ids: [batch…, N] integers of packed sequences, an array or nested lists, N = M: tokens
        attend within their run of equal ids.
      temperature: τ > 0 where the kernel is one of q·k/τ; None for √D.
      axis_name: of a `pmap` or `shard_map` axis along which the tokens are split, see
        `linear_attention`; not for 'exact'.
      block_size: tokens of a block; None for the backend's default.

    Returns:
      [batch…, N, H, D'] in `value`'s dtype. Rows that may attend to no key are zeros.

    Raises:
      BadInput: unknown kernel; an argument of the wrong shape or dtype, or missing, or not for this
        kernel, or not together with another.
    """
    projection = _as_array('projection', projection)
    _check_weights(kernel, projection, theta, query.shape[-1], key.shape[-2:-1])
    mask = _check_inputs(query, key, value, mask)
    # Of NumPy, float64 becomes what JAX's own arrays have.
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    if not query.shape[-3]:
        return jnp.zeros((*query.shape[:-1], value.shape[-1]), value.dtype)
    warn_of_many_heads(*query.shape[-3:-1])
    segment_ids = _as_array('segment_ids', segment_ids)
    key_mask = _key_mask(mask, key.shape[-3])
    if kernel == 'exact' or (mask is not None and key_mask is None):
        _refuse_axis(axis_name, kernel)
    if kernel == 'exact':
        if key_mask is not None:
            # A NaN in the padding would come through the product with a weight of 0.
            key, value = (jnp.where(key_mask[..., None, None], x, 0) for x in (key, value))
        return exact_attention.exact_attention(
            query,
            key,
            value,
            mask,
            block_size,
            is_causal=is_causal,
            segment_ids=segment_ids,
            temperature=temperature,
        )
    query, key, options = _prepare(
        query, key, key_mask, kernel, projection, theta, is_causal, temperature, axis_name
    )
    if mask is not None and key_mask is None:
        mask = _with_patterns(mask, query, key, is_causal, segment_ids)
        return linear_attention.quadratic_attention(query, key, value, mask=mask, **options)
    attend = linear_attention.linear_attention
    if is_causal:
        attend = linear_attention.causal_linear_attention
    return attend(
        query,
        key,
        value,
        key_mask=key_mask,
        segment_ids=segment_ids,
        axis_name=axis_name,
        block_size=block_size,
        **options,
    )


def attention_matrix(
    query: jax.Array,
    key: jax.Array,
    *,
    kernel: Kernel,
    projection: jax.Array | None = None,
    mask: jax.Array | None = None,
    theta: Thetas | None = None,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
    temperature: float | None = None,
) -> jax.Array:
    """The normalised matrix that `favor_attention` implies, formed at O(N·M) memory per head.

    For looking at attention, and for tests; attention itself does not need it.

    Args:
      query, key, kernel, projection, mask, theta, is_causal, segment_ids, temperature: see
        `favor_attention`.

    Returns:
      [batch…, H, N, M] float32: rows sum to 1, or to 0 where no key may be attended to.

    Raises:
      BadInput: see `favor_attention`.
    """
    _check_weights(kernel, projection, theta, query.shape[-1], key.shape[-2:-1])
    mask = _check_inputs(query, key, key, mask)
    warn_of_many_heads(*query.shape[-3:-1])
    segment_ids = _as_array('segment_ids', segment_ids)
    key_mask = _key_mask(mask, key.shape[-3])
    if key_mask is not None:
        key = jnp.where(key_mask[..., None, None], key, 0)
    mask = _with_patterns(mask, query, key, is_causal, segment_ids)
    if kernel == 'exact':
        return exact_attention.attention_matrix(query, key, mask, temperature=temperature)
    query, key, options = _prepare(
        query, key, key_mask, kernel, projection, theta, is_causal, temperature, None
    )
    return linear_attention.attention_matrix(query, key, mask=mask, **options)


def init_state(
    key: Any,
    value: Any,
    *,
    kernel: Kernel,
    projection: jax.Array | None = None,
    theta: Thetas | None = None,
    temperature: float | None = None,
) -> linear_attention.State:
    """The state of a generation before its first token, for `extend`.

    Args:
      key, value: arrays or `jax.ShapeDtypeStruct`s of the shapes [batch…, M, G, D] and
        [batch…, M, G, D'] that will come, M being anything.
      kernel, projection, theta, temperature: see `favor_attention`; not 'exact', whose state would
        be all keys, not 'softmax_optimal', whose A depends on all of them, and not 'cosine', whose
        L is the length that the sequence will have.

    Returns:
      Zeros: R×(D'+1) numbers a key head, and the stabiliser of a softmax estimator.

    Raises:
      BadInput: a kernel that has no state, or see `favor_attention`.
    """
    options = _decoding_options(kernel, projection, theta, key, temperature)
    feature_map = options['key_feature_map'] or options['feature_map']
    return linear_attention.init_state(key, value, feature_map)


def extend(
    state: linear_attention.State,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    kernel: Kernel,
    projection: jax.Array | None = None,
    mask: jax.Array | None = None,
    theta: Thetas | None = None,
    temperature: float | None = None,
    block_size: int | None = None,
) -> tuple[jax.Array, linear_attention.State]:
    """Causal attention of the next tokens, one or many, given the state of those before.

    Time and memory do not grow with the number of tokens before.

    Args:
      state: from `init_state`, or from this function.
      query, key, value: [batch…, N, H, D], [batch…, N, G, D], [batch…, N, G, D'].
      mask: [batch…, 1, 1, N] bool, False for tokens to leave out; None for none.
      kernel, projection, theta, temperature, block_size: those of `init_state`, see
        `favor_attention`.

    Returns:
      [batch…, N, H, D'], what causal attention over the whole sequence has at these positions, and
      the state after them.

    Raises:
      BadInput: see `init_state` and `favor_attention`; also a state of other shapes than these
        arrays and this kernel have.
    """
    options = _decoding_options(kernel, projection, theta, key, temperature)
    mask = _check_inputs(query, key, value, mask)
    key_mask = _key_mask(mask, key.shape[-3])
    if mask is not None and key_mask is None:
        raise BadInput(
            f'mask has shape {mask.shape}; a state takes a mask of keys alone, [batch…, 1, 1, N]. '
            'Use favor_attention for other patterns.'
        )
    return linear_attention.extend(
        state, query, key, value, key_mask=key_mask, block_size=block_size, **options
    )


class FavorAttention(nn.Module):
    """`favor_attention` with its weights: a projection in a collection of its own, or fθ's params.

    The projection is the variable `matrix` of the collection `projections`, which no optimiser
    sees: `projections.draw(seed, layer, 0, ...)`, with the layer's number taken from the module's
    path, so that every layer has its own; the layers that `nn.scan` or `nn.vmap` makes of one
    module have one path, and one matrix. It is saved with the model, and `redraw_projections`
    draws it anew. One matrix serves all heads, queries and keys; `theta_sharing` says what one fθ
    serves. fθ's weights are the params `theta`, as `favor_attention` takes them.

    When the collection `intermediates` is mutable, the normalised [..., H, N, M] matrix is sown
    there as `attention_map`; otherwise it is never formed.

    Attributes:
      kernel: see `favor_attention`.
      num_features: R. 0 means the head dimension, for projection 'none' and for fθ; otherwise an
        integer ≥ 1, even for 'softmax_hyperbolic' and 'softmax_trigonometric', whose W has half as
        many rows. Kernel 'exact' has no features and ignores it, as it does `projection`.
      projection: one of `projections.PROJECTIONS`; of fθ, what it starts from, see `theta_init`.
      row_norms: one of `projections.ROW_NORMS`; 'gaussian' rows have their own.
      is_causal, temperature: see `favor_attention`.
      hidden: width of fθ's hidden layer; 0 for as many units as `theta_init` needs: R, or 2R for
        'softmax'.
      theta_init: what fθ is at the start, see `feature_maps.init_theta`. 'relu' is kernel 'relu'
        with the projection that it would have in this place, 'softmax' nearly kernel 'softmax', of
        'ftheta_mixture' alone; 'lecun' is random weights, and ignores `projection`.
      theta_sharing: what has one fθ in common: 'all' heads, queries and keys, so that the kernel is
        symmetric; the two 'sides', queries and keys, of a head, and each head has its own; the
        'heads', and queries have one, keys another; or 'none' of them. Query heads that share a key
        head share its fθ in any case. The maps of queries and keys start with equal weights.
      seed: the seed of the projections; fθ's other weights come from the `params` stream, as usual.
      dtype: the dtype of the computation; None for the inputs' common one. Features, sums and
        normaliser are in float32, and fθ's params float32, whatever it is.
    """

    kernel: Kernel
    num_features: int = 0
    projection: str = 'orthogonal'
    row_norms: str = 'gaussian'
    is_causal: bool = False
    temperature: float | None = None
    hidden: int = 128
    seed: int = 0
    dtype: Any = None
    theta_init: str = 'lecun'
    theta_sharing: str = 'all'

    @nn.compact
    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Attends.

        Args:
          query, key, value, mask, segment_ids: see `favor_attention`.

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
        weights = {
            'kernel': self.kernel,
            'mask': mask,
            'is_causal': self.is_causal,
            'segment_ids': segment_ids,
            'temperature': self.temperature,
        }
        draw = functools.partial(
            projections.draw,
            self.seed,
            _layer_number(self.path),
            0,
            _num_rows(self.kernel, num_features),
            head_dim,
            self.projection,
            self.row_norms,
        )
        choose('theta_init', self.theta_init, feature_maps.THETA_INITS)
        choose('theta_sharing', self.theta_sharing, THETA_SHARINGS)
        if self.kernel in LEARNT_KERNELS:

            def init(random_key: jax.Array) -> feature_maps.Theta:
                return feature_maps.init_theta(
                    random_key,
                    head_dim,
                    self.hidden,
                    num_features,
                    mixture=self.kernel == 'ftheta_mixture',
                    theta_init=self.theta_init,
                    projection=None if self.theta_init == 'lecun' else draw(),
                )

            weights['theta'] = self.param(
                'theta', _init_thetas, init, key.shape[-2], self.theta_sharing
            )
        elif self.kernel != 'exact' and self.projection != 'none':
            weights['projection'] = self.variable('projections', 'matrix', draw).value
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
    random = [name for name in projections.PROJECTIONS if name != 'none']
    choose('projection', projection, random)

    def redraw(path: tuple[Any, ...], matrix: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        if matrix.ndim != 2:
            raise BadInput(
                f'the projection {"/".join(names)} has shape {matrix.shape}; redrawing takes '
                '[R, D] matrices. Redraw inside pmap, or before replicating the state; what '
                'nn.scan or nn.vmap has stacked is one matrix, which cannot be redrawn.'
            )
        layer = _layer_number(names[:-1])
        return projections.draw(seed, layer, draw_number, *matrix.shape, projection, row_norms)

    return jax.tree.map_with_path(redraw, collection)


def learnt_profiles(
    kernel: str,
    theta: Thetas,
    query_norm: float,
    key_norm: float,
    angles: Any,
    random_key: jax.Array,
    *,
    num_planes: int = 64,
) -> feature_maps.KernelProfile:
    """The kernel φ(q)·ψ(k) of each of fθ's maps against the angle, at one norm of q' and one of k'.

    It is `feature_maps.kernel_profile`, ψ being φ unless keys have a map of their own.

    Args:
      kernel: 'ftheta' or 'ftheta_mixture'.
      theta: its weights, see `favor_attention`.
      query_norm, key_norm: ‖q'‖ and ‖k'‖, numbers > 0; x' = x/√τ.
      angles: [t] numbers from 0 to π, in radians.
      random_key: a JAX random key, of the planes; every map is looked at in the same ones.
      num_planes: ≥ 1.

    Returns:
      NumPy arrays: `mean` and `deviation`, both [G, t] float32 for G key heads with maps of their
      own, [1, t] where the heads share one.

    Raises:
      BadInput: another kernel, a head dimension below 2, or a number out of its range.
    """
    choose('kernel', kernel, LEARNT_KERNELS)
    # A temperature of 1, so that norms are those of x'.
    feature_map = functools.partial(_LEARNT[kernel], temperature=1.0)
    sides = _sides(theta)
    shapes = [theta['hidden_kernel'].shape for theta in sides]
    dim = shapes[0][-2]
    # A side may have a map for each head where the other one has one for all.
    num_heads = max(shape[0] if len(shape) == 3 else 1 for shape in shapes)
    heads = [
        [
            jax.tree.map(operator.itemgetter(head), theta) if len(shape) == 3 else theta
            for theta, shape in zip(sides, shapes, strict=True)
        ]
        for head in range(num_heads)
    ]
    profiles = [
        feature_maps.kernel_profile(
            functools.partial(feature_map, theta=thetas[0]),
            dim,
            [query_norm, key_norm],
            angles,
            random_key,
            key_feature_map=functools.partial(feature_map, theta=thetas[-1]),
            num_planes=num_planes,
        )
        for thetas in heads
    ]
    return jax.tree.map(lambda *values: np.stack(values)[:, 0, 1], *profiles)


def make_attention_fn(
    kernel: Kernel = 'softmax',
    num_features: int = 256,
    projection: str = 'orthogonal',
    seed: int = 0,
    layer: int = 0,
    row_norms: str = 'gaussian',
    temperature: float | None = None,
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
    padding mask [..., 1, 1, M] costs nothing. In Flax's `decode=True` every query comes alone, and
    so to kernel 'cosine' as position 0, which is not where it was in training: use another kernel
    there. `sow_weights=True` sows the matrix that the features
    imply.

    Args:
      kernel: see `favor_attention`; not fθ's, which have parameters to train.
      num_features: R, see `FavorAttention`; with projection 'none' 0 or the head dimension.
      projection: one of `projections.PROJECTIONS`.
      seed, layer: see `projections.draw`.
      row_norms: one of `projections.ROW_NORMS`.
      temperature: see `favor_attention`.

    Returns:
      The function of (query [..., N, H, D], key [..., M, H, D], value [..., M, H, D'], bias, mask,
      ...) that gives [..., N, H, D'].

    Raises:
      BadInput: here for an unknown name or fθ; from the function as `favor_attention` does, and for
        an option that cannot be honoured.
    """
    _check_names(kernel, projection, row_norms)
    if kernel in LEARNT_KERNELS:
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
                projections.draw(
                    seed,
                    layer,
                    0,
                    _num_rows(kernel, resolved),
                    head_dim,
                    projection,
                    row_norms,
                )
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
        is_one = query.ndim == key.ndim == value.ndim == 3  # Of Flax's layers on x of [N, C].
        if is_one:
            query, key, value = query[None], key[None], value[None]
        if mask is not None:
            mask = _as_array('mask', mask) != 0
        weights = {
            'kernel': kernel,
            'projection': matrix(query.shape[-1]),
            'mask': mask,
            'temperature': temperature,
        }
        if is_causal and query.shape[-3] == key.shape[-3]:
            weights['is_causal'] = True
        elif is_causal:
            _refuse_causal(kernel)  # Of a mask it would not be known.
            # Flax aligns the first query with the first key, not the last with the last.
            causal = jnp.tri(query.shape[-3], key.shape[-3], dtype=bool)
            weights['mask'] = causal if mask is None else causal & mask
        # None leaves the caller's precision alone, where the context manager would reset it.
        name = precision_name(precision)
        with jax.default_matmul_precision(name) if name else contextlib.nullcontext():
            if module is not None:
                seen = attention_matrix(query, key, **weights)
                _sow_weights(module, seen[0] if is_one else seen)
            output = favor_attention(query, key, value, **weights)
            return output[0] if is_one else output

    return attention_fn


def _prepare(
    query: jax.Array,
    key: jax.Array,
    key_mask: jax.Array | None,
    kernel: Kernel,
    projection: jax.Array | None,
    theta: Thetas | None,
    is_causal: bool,
    temperature: float | None,
    axis_name: Any,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """What `linear_attention`'s functions take in place of queries, keys and the kernel's name."""
    options = _options(kernel, projection, theta, temperature)
    if kernel == 'cosine':
        return *_with_angles(query, key, is_causal, axis_name), options
    if kernel != 'softmax_optimal':
        return query, key, options
    if is_causal:
        _refuse_causal(kernel)
    # A travels in both, and must be one number there.
    query, key = promote_dtype(query, key)
    groups, copies = key.shape[-2], query.shape[-2] // key.shape[-2]
    # The query heads of a group share the key head's features, and so its A.
    grouped = query.reshape(*query.shape[:-2], groups, copies, query.shape[-1])
    grouped = jnp.moveaxis(grouped, -2, -4)
    grouped = jax.lax.collapse(grouped, grouped.ndim - 4, grouped.ndim - 2)
    mean = feature_maps.mean_square_sum(
        grouped, key, key_mask, temperature=temperature, axis_name=axis_name
    )
    # The expectation of the estimate does not depend on A: it is a setting, not a part of the
    # function.
    a = jax.lax.stop_gradient(feature_maps.optimal_a(mean, query.shape[-1]))
    # Of float16, -A may be beyond the largest number; any A ≤ 0 is unbiased.
    a = jnp.maximum(a, jnp.finfo(query.dtype).min)
    # It travels as one more coordinate, because maps see one block of tokens at a time.
    query, key = (
        jnp.concatenate([x, jnp.broadcast_to(a, (*x.shape[:-1], 1)).astype(x.dtype)], axis=-1)
        for x, a in ((query, jnp.repeat(a, copies, axis=-2)), (key, a))
    )
    return query, key, options


def _refuse_causal(kernel: Kernel) -> None:
    if kernel == 'softmax_optimal':
        raise BadInput(
            "kernel is 'softmax_optimal' and is_causal is True; its A is computed from all keys, "
            "so that outputs would depend on later ones. Choose 'softmax' or 'softmax_hyperbolic'."
        )


def _with_angles(
    query: jax.Array, key: jax.Array, is_causal: bool, axis_name: Any
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys with two more coordinates: the cosine and the sine of their positions.

    Not the positions themselves: bfloat16 has no integers beyond 256 without gaps.
    """
    num_queries, num_keys = query.shape[-3], key.shape[-3]
    shard, num_shards = 0, 1
    if axis_name is not None:
        shard, num_shards = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    horizon = num_shards * max(num_queries, num_keys)

    def append(x: jax.Array, first: int) -> jax.Array:
        x = jnp.asarray(x)
        positions = first + shard * x.shape[-3] + jnp.arange(x.shape[-3])
        angles = feature_maps.cosine_reweight(jnp.ones_like(x[..., :1]), positions, horizon)
        return jnp.concatenate([x, angles.astype(x.dtype)], axis=-1)

    return append(query, num_keys - num_queries if is_causal else 0), append(key, 0)


def _init_thetas(
    random_key: jax.Array,
    init: Callable[[jax.Array], feature_maps.Theta],
    num_heads: int,
    sharing: str,
) -> Thetas:
    """The maps that `init` makes, in the layout of `favor_attention`."""
    if sharing in _OWN_HEADS:
        theta = jax.vmap(init)(jax.random.split(random_key, num_heads))
    else:
        theta = init(random_key)
    if sharing in _OWN_SIDES:
        # Equal: features of two maps that have nothing to do with each other make no kernel.
        return {'query': theta, 'key': jax.tree.map(jnp.copy, theta)}
    return theta


def _options(
    kernel: Kernel,
    projection: jax.Array | None,
    theta: Thetas | None,
    temperature: float | None,
) -> dict[str, Any]:
    """The kernel as `linear_attention`'s functions take it."""
    query_theta, *key_theta = _sides(theta)
    return {
        'feature_map': _feature_map(kernel, projection, query_theta, temperature),
        'key_feature_map': (
            _feature_map(kernel, projection, *key_theta, temperature) if key_theta else None
        ),
        'signed': kernel in SIGNED_KERNELS,
    }


def _sides(theta: Thetas | None) -> tuple[feature_maps.Theta | None, ...]:
    """The map of queries and keys, or that of queries and that of keys."""
    if theta is not None and theta.keys() == {'query', 'key'}:
        return theta['query'], theta['key']
    return (theta,)


def _feature_map(
    kernel: Kernel,
    projection: jax.Array | None,
    theta: feature_maps.Theta | None,
    temperature: float | None,
) -> linear_attention.FeatureMap:
    def softmax(x: jax.Array) -> linear_attention.LogFeatures:
        if kernel == 'softmax':
            logs = feature_maps.softmax_log_features(x, projection, temperature=temperature)
        elif kernel == 'softmax_hyperbolic':
            logs = feature_maps.hyperbolic_log_features(x, projection, temperature=temperature)
        elif kernel == 'softmax_optimal':
            x, a = x[..., :-1], x[..., -1:]
            logs = feature_maps.optimal_log_features(x, projection, a, temperature=temperature)
        else:
            factor, logs = feature_maps.trigonometric(x, projection, temperature=temperature)
            return linear_attention.LogFeatures(logs[..., None], factor)
        return linear_attention.LogFeatures(logs)

    def cosine(x: jax.Array) -> jax.Array:
        features = _ELEMENTWISE[kernel](x[..., :-2], projection, temperature=temperature)
        return jnp.concatenate([features * x[..., -2:-1], features * x[..., -1:]], axis=-1)

    def learnt(x: jax.Array, theta: feature_maps.Theta) -> jax.Array:
        return _LEARNT[kernel](x, theta, temperature=temperature)

    if callable(kernel):
        return lambda x: feature_maps.elementwise(x, projection, kernel, temperature=temperature)
    if kernel in LEARNT_KERNELS and theta['hidden_kernel'].ndim == 3:
        # Each map for its head: maps see [..., G, T, D].
        return lambda x: jax.vmap(learnt, (-3, 0), -3)(x, theta)
    if kernel in LEARNT_KERNELS:
        return lambda x: learnt(x, theta)
    if kernel == 'cosine':
        return cosine
    if kernel in _ELEMENTWISE:
        return lambda x: _ELEMENTWISE[kernel](x, projection, temperature=temperature)
    return softmax


def _with_patterns(
    mask: jax.Array | None,
    query: jax.Array,
    key: jax.Array,
    is_causal: bool,
    segment_ids: jax.Array | None,
) -> jax.Array | None:
    """The mask with the causal and the segments' pattern in it, [..., H or 1, N, M]."""
    num_queries, num_keys = query.shape[-3], key.shape[-3]
    patterns = [] if mask is None else [mask]
    if is_causal:
        linear_attention.check_causal(num_queries, num_keys)
        patterns.append(jnp.tri(num_queries, num_keys, num_keys - num_queries, dtype=bool))
    if segment_ids is not None:
        linear_attention.check_segments(segment_ids, query, key, None)
        runs = linear_attention.runs(segment_ids)
        patterns.append((runs[..., :, None] == runs[..., None, :])[..., None, :, :])
    return functools.reduce(jnp.logical_and, patterns) if patterns else None


def _decoding_options(
    kernel: Kernel,
    projection: jax.Array | None,
    theta: Thetas | None,
    key: Any,
    temperature: float | None,
) -> dict[str, Any]:
    _check_weights(kernel, projection, theta, key.shape[-1], key.shape[-2:-1])
    if kernel in _WHOLE:
        others = ', '.join(name for name in KERNELS if name not in _WHOLE)
        raise BadInput(
            f'kernel is {kernel!r}, which needs {_WHOLE[kernel]} and has no state to continue '
            f'from. Choose one of {others}.'
        )
    return _options(kernel, projection, theta, temperature)


def _refuse_axis(axis_name: Any, kernel: Kernel) -> None:
    if axis_name is not None:
        raise BadInput(
            f"axis_name is {axis_name!r} with kernel {kernel!r}; neither 'exact' nor a mask with a "
            'query or head axis can be split over devices. Leave axis_name as None.'
        )


def _layer_number(path: tuple[str, ...] | list[str]) -> int:
    return zlib.crc32('/'.join(path).encode())


def _sow_weights(module: Any, weights: jax.Array) -> None:
    from flax import nnx

    collection = nnx.Intermediate if isinstance(module, nnx.Module) else 'intermediates'
    module.sow(collection, 'attention_weights', weights)


def precision_name(precision: Any) -> str | None:
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


def _check_names(kernel: Kernel, projection: str, row_norms: str) -> None:
    if not callable(kernel):
        choose('kernel', kernel, KERNELS)
    choose('projection', projection, projections.PROJECTIONS)
    choose('row_norms', row_norms, projections.ROW_NORMS)
    if kernel in _SOFTMAX_ESTIMATORS and projection == 'none':
        raise BadInput(
            f"kernel {kernel!r} with projection 'none' estimates nothing: its features need random "
            "rows. Set projection to 'orthogonal', for example, or choose another kernel."
        )


def _check_fields(
    kernel: Kernel, num_features: int, projection: str, row_norms: str, head_dim: int
) -> int:
    """Checks a model's fields and returns R."""
    _check_names(kernel, projection, row_norms)
    if num_features == 0 and (projection == 'none' or kernel in (*_LEARNT, 'exact')):
        return head_dim
    if not isinstance(num_features, numbers.Integral) or num_features < 1:
        raise BadInput(
            f'num_features is {num_features!r} with projection {projection!r} and kernel '
            f'{kernel!r}; allowed is an integer ≥ 1. Set num_features, to 256 for example.'
        )
    if kernel in _PAIRED and num_features % 2:
        raise BadInput(
            f'num_features is {num_features}; kernel {kernel!r} has features in pairs. Set '
            f'num_features to an even number, to {num_features + 1} for example.'
        )
    elementwise = callable(kernel) or kernel in _ELEMENTWISE
    if projection == 'none' and elementwise and num_features != head_dim:
        raise BadInput(
            f"num_features is {num_features} with projection 'none', which makes as many features "
            f'as the head dimension, {head_dim}. Set num_features to 0 or {head_dim}, or '
            "projection to 'orthogonal', for example."
        )
    return num_features


def _num_rows(kernel: Kernel, num_features: int) -> int:
    return num_features // 2 if kernel in _PAIRED else num_features


def _check_weights(
    kernel: Kernel,
    projection: jax.Array | None,
    theta: Thetas | None,
    head_dim: int,
    heads: tuple[int, ...],
) -> None:
    if callable(kernel):
        _check_positive(kernel)
    else:
        choose('kernel', kernel, KERNELS)
    if (theta is not None) != (kernel in LEARNT_KERNELS):
        raise BadInput(
            f'theta is {"missing" if theta is None else "given"} for kernel {kernel!r}; it belongs '
            'to ftheta and ftheta_mixture alone. Make it with feature_maps.init_theta.'
        )
    if theta is not None:
        for one in _sides(theta):
            _check_theta(kernel, one, head_dim, heads)
    if projection is None:
        if kernel in _SOFTMAX_ESTIMATORS:
            raise BadInput(
                f'projection is None; kernel {kernel!r} needs a matrix [R, D]. Draw one with '
                'projections.draw.'
            )
        return
    if kernel == 'exact' or kernel in LEARNT_KERNELS:
        raise BadInput(f'projection is given, but kernel {kernel!r} has none. Leave it as None.')
    if projection.ndim != 2 or projection.shape[1] != head_dim or projection.shape[0] < 1:
        raise BadInput(
            f'projection has shape {projection.shape}; allowed is [R, D] with R ≥ 1 and the head '
            f'dimension D = {head_dim}. Draw it for that dimension.'
        )


def _check_theta(
    kernel: Kernel, theta: feature_maps.Theta, head_dim: int, heads: tuple[int, ...]
) -> None:
    init = functools.partial(feature_maps.init_theta, mixture=kernel == 'ftheta_mixture')
    given = {name: jnp.shape(array) for name, array in theta.items()}
    hidden, num_features = (
        (given.get(name) or (1,))[-1] for name in ('hidden_bias', 'output_bias')
    )
    allowed = jax.eval_shape(lambda: init(jax.random.key(0), head_dim, hidden, num_features))
    allowed = {name: leaf.shape for name, leaf in allowed.items()}
    if given not in (allowed, {name: (*heads, *shape) for name, shape in allowed.items()}):
        raise BadInput(
            f'theta has the shapes {given} for kernel {kernel!r}; allowed are {allowed}, all of '
            f'them with a leading axis {heads} of the key heads or none without it. Make it with '
            'feature_maps.init_theta, and stack the maps of heads.'
        )


def least_on_grid(function: Callable[[jax.Array], jax.Array]) -> tuple[float, float] | None:
    """A point from -30 to 30 where an elementwise function is least, or NaN, and its value there.

    None where that cannot be known: the values are complex, or of another shape than the points, or
    made of arrays that are traced, or depend on a point's place among the others.
    """
    grid = np.linspace(-30, 30, 481, dtype=np.float32)
    with jax.ensure_compile_time_eval():
        values, reversed_values = (function(jnp.asarray(points)) for points in (grid, grid[::-1]))
    if isinstance(values, jax.core.Tracer) or jnp.shape(values) != grid.shape:
        return None
    values, reversed_values = np.asarray(values), np.asarray(reversed_values)
    if np.iscomplexobj(values) or not np.allclose(values[::-1], reversed_values, equal_nan=True):
        return None
    place = int(np.argmin(values))  # NaN before all.
    return float(grid[place]), float(values[place])


def _check_positive(function: Callable[[jax.Array], jax.Array]) -> None:
    """Refuses a function that is negative somewhere, as far as that can be seen from a grid."""
    least = least_on_grid(function)
    # What cannot be known here, `elementwise` checks.
    if least is None or least[1] + feature_maps.EPSILON >= 0:
        return
    raise BadInput(
        f'kernel is a function with f({least[0]:g}) = {least[1]:g}; features must not be NaN, nor '
        'negative, or the normaliser may cancel. Shift or square it; of signed kernels '
        "'identity' can be had by its name."
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
                'Add the axis that is missing: x[:, :, None] makes (batch, tokens, dim) one head, '
                'x[None] makes (tokens, heads, dim) a batch of one.'
            )
        # What has less than 16 bits is not promoted with anything else.
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
            raise BadInput(
                f'{name} has dtype {x.dtype}; allowed is a floating one of 16, 32 or 64 bits. '
                'Convert it.'
            )
        if x.shape[:-3] != query.shape[:-3] or x.shape[-2] < 1 or query.shape[-2] % x.shape[-2]:
            raise BadInput(
                f'{name} has shape {x.shape}, query {query.shape}; both are {layout} and must '
                'agree in their batch axes; the heads of key and value must divide those of '
                'query. Reshape one of them.'
            )
    if key.shape[-1] != query.shape[-1]:
        raise BadInput(
            f'key has head dimension {key.shape[-1]}, query {query.shape[-1]}; both are {layout} '
            'and must agree there. Project both to one dimension.'
        )
    if value.shape[-2] != key.shape[-2]:
        raise BadInput(
            f'value has {value.shape[-2]} heads, key {key.shape[-2]}; both are {layout} and must '
            'have the same number of heads. Reshape one of them.'
        )
    if value.shape[-3] != key.shape[-3] or key.shape[-3] < 1:
        raise BadInput(
            f'value has {value.shape[-3]} tokens, key {key.shape[-3]}; both are {layout} and must '
            'have the same number of tokens, at least 1. Give a value for every key.'
        )
    mask = _as_array('mask', mask)
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


def warn_of_many_heads(num_tokens: int, num_heads: int) -> None:
    """Warns where there are more heads than there ever are: someone has swapped the axes."""
    if num_heads > max(num_tokens, MANY_HEADS):
        warnings.warn(
            f'query is read as [batch…, tokens, heads, head_dim]: {num_tokens} tokens in '
            f'{num_heads} heads. If tokens and heads are swapped, attention runs over the heads; '
            'swap the axes.',
            stacklevel=3,
        )


def _as_array(name: str, x: Any) -> jax.Array | None:
    """Lists as an array; arrays of JAX and NumPy as they are."""
    if x is None or hasattr(x, 'dtype'):
        return x
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadInput(
            f'{name} is a {type(x).__name__} that makes no array ({error}); allowed are arrays, '
            'nested lists of equal lengths, and None. Give one of these.'
        ) from error


def _key_mask(mask: jax.Array | None, num_keys: int) -> jax.Array | None:
    """[..., M] of a mask that hides keys from every query and head alike; None for any other."""
    if mask is None or mask.shape[-3] != 1 or mask.shape[-2] != 1:
        return None
    return jnp.broadcast_to(mask[..., 0, 0, :], (*mask.shape[:-3], num_keys))
