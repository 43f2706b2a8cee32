"""The Vision Transformer (ViT): stem, encoder, pooling, head. The attention is an argument.

A ViT and a Performer are the same module here. They differ in what `attention` builds: softmax
attention or FAVOR+ with one of its kernels. Shapes: B images, h×w pixels, N tokens, C width,
H heads, D = C / H.

Sources: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (the encoder); Xiao et al. 2021,
"Early Convolutions Help Transformers See Better" (the `conv` stem); Zhai et al. 2022, "Scaling
Vision Transformers" (`map` pooling); Huang et al. 2016, "Deep Networks with Stochastic Depth".
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from performer_vit.convolution import Conv3x3
from performer_vit.dropout import Dropout
from performer_vit.errors import BadInput, choose, unlike
from performer_vit.favor import KERNELS, FavorAttention

STEMS = ('patch', 'conv')
CONV_NORMS = ('batch', 'layer')
POSITIONS = ('learned', 'sine')
POOLINGS = ('gap', 'cls', 'map', 'conv')
DTYPES = ('float32', 'bfloat16')


def space_to_depth(images: jax.Array, block: int) -> jax.Array:
    """(B, h, w, c) → (B, h/block, w/block, block²·c): every block of pixels becomes one vector.

    Convolutions on few channels waste a machine that multiplies matrices; this turns pixels into
    channels first.
    """
    if block == 1:
        return images
    batch, height, width, channels = images.shape
    grid = images.reshape(batch, height // block, block, width // block, block, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(
        batch, height // block, width // block, block * block * channels
    )


def sine_position_2d(height: int, width: int, channels: int) -> np.ndarray:
    """Fixed 2-D sine-cosine position embedding, (height·width, channels) float32.

    A quarter of the channels each for sin(y·ω), cos(y·ω), sin(x·ω), cos(x·ω), with the frequencies
    ω_i = 10000^(−i/(channels/4 − 1)), as in MoCo v3 (Chen et al. 2021).
    """
    if channels % 4:
        raise BadInput(
            f"position 'sine' needs a width that is divisible by 4, but width is {channels}: "
            "choose another width, or position 'learned'."
        )
    count = channels // 4
    frequency = 10_000.0 ** (-np.arange(count) / max(count - 1, 1))
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing='ij')
    angles = [axis.reshape(-1, 1) * frequency for axis in (y, x)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def maximum_2x2(x: jax.Array) -> jax.Array:
    """The largest of every 2×2 places: (B, h, w, c) → (B, h/2, w/2, c).

    Of slices, because on CPUs the gradients of a windowed pooling and of a reduction are slower.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return functools.reduce(jnp.maximum, (x[:, :, i, :, j] for i in (0, 1) for j in (0, 1)))


def largest(x: jax.Array) -> jax.Array:
    """The largest over all places: (B, h, w, c) → (B, c).

    By halves, and not by `max`: its gradient goes where x equals the maximum, and compiled code
    that computes x once more may round it otherwise and find it nowhere.
    """
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    while x.shape[1] > 1:
        half = (x.shape[1] + 1) // 2
        # Of an odd number of places the one in the middle is in both halves.
        x = jnp.maximum(x[:, :half], x[:, -half:])
    return x[:, 0]


class PatchStem(nn.Module):
    """Non-overlapping patches, each projected to the width: (B, h, w, c) → (B, h/p, w/p, C)."""

    patch_size: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        patches = space_to_depth(images, self.patch_size)
        return nn.Dense(self.width, dtype=self.dtype, name='embedding')(patches)


def _norm(kind: str, axis_name: str | None, dtype: jnp.dtype, *, train: bool) -> nn.Module:
    """The norm before a ReLU, as the part `norm` of the module that calls this."""
    if kind == 'layer':
        return nn.LayerNorm(dtype=dtype, name='norm')
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, axis_name=axis_name, dtype=dtype, name='norm'
    )


class ResidualConv(nn.Module):
    """conv(ReLU(norm(x))), and x added where the channels stay the same: (B, h, w, c → channels).

    The residual units of He et al. 2016, "Identity Mappings in Deep Residual Networks", of one 3×3
    convolution each, without biases: the norms that follow have them.

    norm 'layer' is LayerNorm, the same in training and in evaluation. norm 'batch' is BatchNorm
    (Ioffe & Szegedy 2015): in training with the statistics of the batch, of all devices where
    `axis_name` names the axis that they are mapped over, in evaluation with their moving averages,
    m ← 0.9·m + 0.1·new, which are the collection `batch_stats`.
    """

    channels: int
    norm: str
    axis_name: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = nn.relu(_norm(self.norm, self.axis_name, self.dtype, train=train)(x))
        y = Conv3x3(self.channels, dtype=self.dtype, name='conv')(y)
        return x + y if x.shape == y.shape else y


class ConvStem(nn.Module):
    """3×3 convolutions that shrink an image to the same grid as patches of `patch_size` would.

    `channels` lists the convolutions on each of its grids, the first of them that of the pixels;
    one more, to the width, ends the last grid. Every grid ends with a 2×2 maximum, which halves it,
    and `blocks` convolutions of the width follow on the grid of the tokens. The first convolution
    sees the pixels, every other one is a `ResidualConv` with `norm`.

    Where patch_size asks for less shrinking, the last grids are not halved; where it asks for more,
    space-to-depth makes the difference before the first convolution.
    """

    patch_size: int
    channels: tuple[tuple[int, ...], ...]
    blocks: int
    width: int
    norm: str
    axis_name: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        maxima = sum(self.patch_size % 2 ** (i + 1) == 0 for i in range(len(self.channels)))
        x = space_to_depth(images, self.patch_size // 2**maxima)
        *fine, last = self.channels
        count = 0
        for i, grid in enumerate([*fine, (*last, self.width), self.blocks * (self.width,)]):
            for channels in grid:
                name = f'conv_{count}'
                if count:
                    conv = ResidualConv(channels, self.norm, self.axis_name, self.dtype, name=name)
                    x = conv(x, train=train)
                else:
                    x = Conv3x3(channels, dtype=self.dtype, name=name)(x)
                count += 1
            if i < maxima:
                x = maximum_2x2(x)
        return x


class Mlp(nn.Module):
    """Dense to `mlp_dim`, GELU, dense back to the width, with dropout after each: [..., C]."""

    mlp_dim: int
    dropout_rate: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        width = x.shape[-1]
        x = nn.gelu(nn.Dense(self.mlp_dim, dtype=self.dtype, name='hidden')(x))
        x = Dropout(self.dropout_rate)(x, train=train)
        x = nn.Dense(width, dtype=self.dtype, name='out')(x)
        return Dropout(self.dropout_rate)(x, train=train)


class SelfAttention(nn.Module):
    """Multi-head self-attention (B, N, C) → (B, N, C) around any attention module.

    `attention(name=…)` builds a module that maps query, key and value, each (B, N, H, D), to
    (B, N, H, D).
    """

    num_heads: int
    attention: Callable[..., nn.Module]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        # Three products rather than one fused one: on CPUs the gradient of the fused product pays
        # for a concatenation and a transposition that the larger product does not win back.
        query, key, value = (
            nn.DenseGeneral(heads, dtype=self.dtype, name=name)(x)
            for name in ('query', 'key', 'value')
        )
        x = self.attention(name='attention')(query, key, value)
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name='out')(x)


class MeanAttention(nn.Module):
    """Attention that looks at nothing: every token gets the mean of all values, (B, N, H, D).

    What a network loses with it, beside one without any such branch, is what it owes to choosing
    where to look.
    """

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        del query, key
        return jnp.broadcast_to(value.mean(axis=1, keepdims=True), value.shape)


class DropPath(nn.Module):
    """Stochastic depth: zeroes the whole branch of an image with probability `rate`, (B, N, C).

    A branch that stays is divided by 1 − rate, so that its expectation is unchanged.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        dropout = nn.Dropout(self.rate, broadcast_dims=(1, 2), deterministic=not train)
        return dropout(x)


class EncoderBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)); (B, N, C) → (B, N, C).

    Without attention (None) the first of the two is left out.
    """

    num_heads: int
    mlp_dim: int
    attention: Callable[..., nn.Module] | None
    dropout_rate: float
    drop_path_rate: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if self.attention is not None:
            y = nn.LayerNorm(dtype=self.dtype, name='attention_norm')(x)
            y = SelfAttention(self.num_heads, self.attention, self.dtype, name='self_attention')(y)
            y = Dropout(self.dropout_rate)(y, train=train)
            x = x + DropPath(self.drop_path_rate)(y, train=train)
        y = nn.LayerNorm(dtype=self.dtype, name='mlp_norm')(x)
        y = Mlp(self.mlp_dim, self.dropout_rate, self.dtype, name='mlp')(y, train=train)
        return x + DropPath(self.drop_path_rate)(y, train=train)


class MapPool(nn.Module):
    """Multi-head attention pooling: one learned query attends to all tokens, (B, N, C) → (B, C).

    Its attention is exact: one query costs N scores, which is linear already.
    """

    num_heads: int
    mlp_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        probe = self.param('probe', nn.initializers.xavier_uniform(), (1, 1, width))
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, width)).astype(x.dtype)
        x = nn.MultiHeadDotProductAttention(
            self.num_heads, dtype=self.dtype, deterministic=True, name='attention'
        )(probe, x)
        y = nn.LayerNorm(dtype=self.dtype, name='norm')(x)
        x = x + Mlp(self.mlp_dim, 0.0, self.dtype, name='mlp')(y, train=False)
        return x[:, 0]


class ConvPool(nn.Module):
    """Convolutions on half the tokens' grid, then the largest over places: (B, h, w, C) → (B, C).

    A 2×2 maximum, `blocks` times a `ResidualConv` of the same width, and max ReLU(norm(x)) over all
    places: the last stage of a convolutional network.
    """

    blocks: int
    norm: str
    axis_name: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, grid: jax.Array, *, train: bool) -> jax.Array:
        width = grid.shape[-1]
        x = maximum_2x2(grid)
        for i in range(self.blocks):
            conv = ResidualConv(width, self.norm, self.axis_name, self.dtype, name=f'conv_{i}')
            x = conv(x, train=train)
        x = nn.relu(_norm(self.norm, self.axis_name, self.dtype, train=train)(x))
        return largest(x)


class VisionTransformer(nn.Module):
    """Images (B, h, w, c), normalised floats, to logits (B, num_classes) in float32.

    Attributes:
      num_classes: number of classes, K.
      attention: builds the attention module of a block when called with `name`; see
        `SelfAttention`. `functools.partial(FavorAttention, kernel='relu', num_features=64)` is one.
        None leaves attention out of the blocks.
      stem: 'patch' or 'conv'; both give h/patch_size × w/patch_size tokens.
      patch_size: pixels along one side of a token.
      stem_channels: of the 'conv' stem, the channels of its convolutions on each grid, from the
        finest on; see `ConvStem`. 'patch' has none.
      stem_blocks: residual convolutions of the 'conv' stem on the grid of the tokens; 'patch' has
        none.
      width, depth, num_heads, mlp_dim: C, number of blocks, H, hidden units of a block's MLP.
      position: 'learned' or 'sine' (2-D) embedding, added to the tokens.
      pooling: 'gap' (mean over tokens), 'cls' (one more, learned token), 'map' (`MapPool`), 'conv'
        (`ConvPool`).
      pool_blocks: residual convolutions of 'conv' pooling; the others have none.
      conv_norm: 'batch' or 'layer', in the 'conv' stem and in 'conv' pooling; others have none.
      dropout_rate: after the position embedding, and in every block.
      drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
      dtype: of the computation, float32 or bfloat16; parameters and logits are float32 always.
      axis_name: the axis that training is mapped over (`jax.pmap`), if any: conv_norm 'batch' has
        the statistics of all its devices.

    Intermediates by name, with `apply(…, mutable=['intermediates'])`: `grid` (B, h/p, w/p, C),
    `block_0` … (B, N, C), `encoded` (B, N, C), `pooled` (B, C), and every block's
    `self_attention/attention/attention_map` (B, H, N, N).

    With `train=True`, a `dropout` key is needed where a rate is above 0, and conv_norm 'batch'
    needs `mutable=['batch_stats']` where stem or pooling is 'conv'.
    """

    num_classes: int
    attention: Callable[..., nn.Module] | None
    stem: str = 'conv'
    patch_size: int = 4
    stem_channels: tuple[tuple[int, ...], ...] = ((16, 32), (32,))
    stem_blocks: int = 0
    width: int = 128
    depth: int = 2
    num_heads: int = 4
    mlp_dim: int = 256
    position: str = 'learned'
    pooling: str = 'gap'
    pool_blocks: int = 2
    conv_norm: str = 'batch'
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        self._check(images.shape)
        images = images.astype(self.dtype)
        if self.stem == 'patch':
            grid = PatchStem(self.patch_size, self.width, self.dtype, name='stem')(images)
        else:
            grid = ConvStem(
                self.patch_size,
                self.stem_channels,
                self.stem_blocks,
                self.width,
                self.conv_norm,
                self.axis_name,
                self.dtype,
                name='stem',
            )(images, train=train)
        self.sow('intermediates', 'grid', grid)
        batch, height, width, _ = grid.shape
        x = grid.reshape(batch, height * width, self.width)

        if self.position == 'learned':
            position = self.param(
                'position_embedding',
                nn.initializers.normal(0.02),
                (height * width, self.width),
            )
        else:
            position = jnp.asarray(sine_position_2d(height, width, self.width))
        x = x + position.astype(x.dtype)
        if self.pooling == 'cls':
            token = self.param('class_embedding', nn.initializers.normal(0.02), (self.width,))
            token = jnp.broadcast_to(token.astype(x.dtype), (batch, 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        x = Dropout(self.dropout_rate)(x, train=train)

        for i in range(self.depth):
            x = EncoderBlock(
                self.num_heads,
                self.mlp_dim,
                self.attention,
                self.dropout_rate,
                self.drop_path_rate * i / (self.depth - 1)
                if self.depth > 1
                else self.drop_path_rate,
                self.dtype,
                name=f'encoder_{i}',
            )(x, train=train)
            self.sow('intermediates', f'block_{i}', x)
        x = nn.LayerNorm(dtype=self.dtype, name='norm')(x)
        self.sow('intermediates', 'encoded', x)

        if self.pooling == 'gap':
            x = x.mean(axis=1)
        elif self.pooling == 'cls':
            x = x[:, 0]
        elif self.pooling == 'conv':
            x = ConvPool(self.pool_blocks, self.conv_norm, self.axis_name, self.dtype, name='pool')(
                x.reshape(grid.shape), train=train
            )
        else:
            x = MapPool(self.num_heads, self.mlp_dim, self.dtype, name='pool')(x)
        self.sow('intermediates', 'pooled', x)
        # Zero, so that the first loss is log K and no class is preferred at the start. In float32:
        # logits of bfloat16 have three digits, and classes that tie.
        head = nn.Dense(
            self.num_classes, dtype=jnp.float32, kernel_init=nn.initializers.zeros, name='head'
        )
        return head(x)

    def _check(self, shape: tuple[int, ...]) -> None:
        choose('model.stem', self.stem, STEMS)
        choose('model.conv_norm', self.conv_norm, CONV_NORMS)
        choose('model.position', self.position, POSITIONS)
        choose('model.pooling', self.pooling, POOLINGS)
        for name in ('patch_size', 'width', 'depth', 'num_heads', 'mlp_dim', 'num_classes'):
            if getattr(self, name) < 1:
                raise BadInput(f'model.{name} is {getattr(self, name)}; set it to 1 or more.')
        for name in ('stem_blocks', 'pool_blocks'):
            if getattr(self, name) < 0:
                raise BadInput(f'model.{name} is {getattr(self, name)}; set it to 0 or more.')
        for name in ('dropout_rate', 'drop_path_rate'):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise BadInput(
                    f'model.{name} is {getattr(self, name)}; it is a probability: set it to a '
                    'number from 0 to below 1.'
                )
        if self.width % self.num_heads:
            raise BadInput(
                f'model.width {self.width} is not divisible by model.num_heads {self.num_heads}: '
                'each head takes an equal share of the width. Change one of the two.'
            )
        if len(shape) != 4:
            raise BadInput(
                f'images have the shape {shape}; a ViT takes (batch, height, width, channels).'
            )
        if shape[1] % self.patch_size or shape[2] % self.patch_size:
            raise BadInput(
                f'images of {shape[1]}×{shape[2]} pixels are not divisible by model.patch_size '
                f'{self.patch_size}: choose a patch size that divides both sides, or another '
                'dataset.image_size.'
            )
        height, width = (side // self.patch_size for side in shape[1:3])
        if self.pooling == 'conv' and (height % 2 or width % 2):
            raise BadInput(
                f"model.pooling 'conv' halves the grid of the tokens, which is {height}×{width} "
                f'for images of {shape[1]}×{shape[2]} pixels and model.patch_size '
                f'{self.patch_size}: choose another patch size or dataset.image_size, or pooling '
                "'gap', 'cls' or 'map'."
            )
        if self.stem == 'conv':
            grids = self.stem_channels
            fit = [
                isinstance(g, tuple) and g and all(type(c) is int and c > 0 for c in g)
                for g in grids
            ]
            if not fit or not all(fit):
                raise BadInput(
                    f"model.stem_channels is {grids}; stem 'conv' needs the channels of one or "
                    'more convolutions on each of one or more grids: set it to a tuple of tuples '
                    "of positive integers, on a command line '((16, 32), (32,))' with its quotes."
                )


# What a config may name in the place of a kernel, to measure what attention adds.
NO_ATTENTION = {'mean': MeanAttention, 'none': None}


def from_config(model, num_classes: int, seed: int) -> VisionTransformer:
    """The model that a config's `model` section describes (see `configs/base.py`).

    Args:
      model: an `ml_collections.ConfigDict` (or any mapping) with the fields of
        `VisionTransformer`, an `attention` section with the fields of `FavorAttention`, and dtype
        by name. Two more kernels are no attention, to compare with: 'mean' is `MeanAttention`,
        'none' leaves the branch out.
      num_classes: number of classes, K.
      seed: of the random projections.

    Raises:
      BadInput: a field that there is not, or one that is missing: a config of another version.
    """
    fields = dict(model)
    given = set(fields) - {'attention'}
    known = {field.name for field in dataclasses.fields(VisionTransformer)} - {
        'num_classes', 'attention', 'axis_name', 'parent', 'name'
    }  # fmt: skip
    if given != known:
        raise BadInput(
            f'the model section of the config {unlike(given - known, known - given)}: it is not of '
            'this version of performer_vit. Set what configs/base.py sets, or use the version that '
            'wrote the config: the results.json of a run names its commit.'
        )
    choose('model.dtype', fields['dtype'], DTYPES)
    dtype = jnp.dtype(fields.pop('dtype'))
    attention = dict(fields.pop('attention'))
    attention.pop('redraw_every')  # When to redraw is the training loop's to decide.
    fields['stem_channels'] = tuple(
        tuple(grid) if isinstance(grid, (tuple, list)) else grid for grid in fields['stem_channels']
    )
    kernel = attention['kernel']
    choose('model.attention.kernel', kernel, (*KERNELS, *NO_ATTENTION))
    if kernel in NO_ATTENTION:
        build = NO_ATTENTION[kernel]
    else:
        build = functools.partial(FavorAttention, seed=seed, dtype=dtype, **attention)
    return VisionTransformer(
        num_classes=num_classes,
        attention=build,
        dtype=dtype,
        **fields,
    )


def num_tokens(model: VisionTransformer, image_shape: tuple[int, ...]) -> int:
    """Number of tokens on the grid that the stem makes of an image of shape (h, w, c)."""
    return (image_shape[0] // model.patch_size) * (image_shape[1] // model.patch_size)
