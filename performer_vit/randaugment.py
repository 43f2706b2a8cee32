"""RandAugment: random operations on uint8 images, on the device, inside the jitted step.

Cubuk et al. 2020, "RandAugment: Practical automated data augmentation with a reduced search
space": every layer draws one of 14 operations for each image, all equally likely, and applies it at
a magnitude M that all of them share.

The images of a batch cannot take different branches on a device. But each operation is of one of
three kinds: a look-up table per channel, a blend with another image, or an affine map. So every
image goes through the three kinds, with parameters that change nothing where its operation is of
another kind. A layer therefore takes the same time whatever was drawn: one scatter and two gathers
over the pixels, and arithmetic on them, instead of 14 operations.
"""

import math

import jax
import jax.numpy as jnp

OPERATIONS = (
    'identity', 'autocontrast', 'equalize', 'rotate', 'solarize', 'color', 'posterize', 'contrast',
    'brightness', 'sharpness', 'shear_x', 'shear_y', 'translate_x', 'translate_y',
)  # fmt: skip

MAX_MAGNITUDE = 10  # The scale of magnitudes, of AutoAugment (Cubuk et al. 2019).
MOST_PIXELS = 2**22  # Sums of grey levels of so many are still within int32.
# What the largest magnitude does.
_MAX_DEGREES = 30
_MAX_SHEAR = 0.3
_MAX_SHIFT = 150 / 331  # Of the side: AutoAugment's 150 pixels, of images of 331.
_MAX_ENHANCEMENT = 0.9
_MAX_BITS_LOST = 4

_FILL = 128  # Mid-grey, for pixels that an affine map takes from outside the image.


def randaugment(keys: jax.Array, images: jax.Array, *, layers: int, magnitude: float) -> jax.Array:
    """Applies `layers` random operations, one after the other, to each image.

    Args:
        keys: one key per image: (B,) typed, or (B, 2) uint32.
        images: (B, h, w, c) uint8.
        layers: how many operations, 0 or more.
        magnitude: M, from 0 to 10; see `apply`.

    Returns:
        (B, h, w, c) uint8.
    """

    def draw(key, layer):
        operation_key, sign_key = jax.random.split(jax.random.fold_in(key, layer))
        return (
            jax.random.randint(operation_key, (), 0, len(OPERATIONS)),
            jax.random.rademacher(sign_key, (), jnp.float32),
        )

    def body(layer, images):
        operations, signs = jax.vmap(draw, in_axes=(0, None))(keys, layer)
        return apply(operations, signs, images, magnitude)

    # A loop writes each layer's result. Unrolled, it would be fused into the reads of the next
    # layer, and computed again for each of them.
    return jax.lax.fori_loop(0, layers, body, images)


def apply(
    operations: jax.Array, signs: jax.Array, images: jax.Array, magnitude: float
) -> jax.Array:
    """Applies one operation to each image; what is not said here is as in Pillow.

    With m = M/10 and s the image's sign:

    - identity;
    - autocontrast: each channel is stretched over 0 to 255;
    - equalize: each channel's histogram is made as flat as a table of values can make it;
    - solarize: values from 256 (1 - m) on become 255 minus themselves;
    - posterize: keeps the highest 8 - round(4m) bits;
    - color, contrast, brightness, sharpness: d + (1 + 0.9 s m)·(x - d), cut off at 0 and 255 and
      rounded down, with d the image in greys, its mean grey, black, or the image smoothed by a
      window of 3×3 pixels;
    - rotate: by 30 s m degrees; shear_x, shear_y: by a slope of 0.3 s m; both about the centre;
    - translate_x, translate_y: by 150/331 s m of the width or the height.

    The last five read the nearest pixel, and grey (128) outside the image. Greys are the luma of
    ITU-R 601-2 for three channels, and the mean for any other number.

    AutoAugment takes factors from 0.1 to 1.9 in place of 1 + 0.9 s m, so that its middle magnitude
    changes nothing, and shears about a corner, which also shifts. Here strength grows with M, and
    at M = 0 autocontrast and equalize alone change an image.

    Args:
        operations: (B,) integers, indices into `OPERATIONS`.
        signs: (B,) float32, each 1 or -1; used by those operations that have an s above.
        images: (B, h, w, c) uint8; h·w below `MOST_PIXELS`.
        magnitude: M, from 0 to 10.

    Returns:
        (B, h, w, c) uint8.
    """
    strength = magnitude / MAX_MAGNITUDE
    size = images.shape[1:3]
    maps = jnp.array(
        [[_map(name, sign * strength, *size) for sign in (1, -1)] for name in OPERATIONS]
    )
    images = _affine(maps[operations, (signs < 0).astype(jnp.int32)], images)
    images = _look_up(_tables(operations, images, strength), images)

    def drawn(name):
        return (operations == OPERATIONS.index(name))[:, None, None, None]

    grey = _grey(images)
    other = jnp.where(drawn('color'), grey, 0)
    other = jnp.where(drawn('contrast'), _rounded_mean(grey, axis=(1, 2)), other)
    other = jnp.where(drawn('sharpness'), _smooth(images), other)
    enhanced = drawn('color') | drawn('contrast') | drawn('brightness') | drawn('sharpness')
    change = jnp.where(enhanced, signs[:, None, None, None], 0) * _MAX_ENHANCEMENT * strength
    return _blend(other, images, 1 + change)


def _tables(operations: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """What each value becomes: (B, 256, c) float32, whole numbers from 0 to 255."""
    values = jnp.arange(256)[:, None]
    lost = round(_MAX_BITS_LOST * strength)
    tables = {
        'autocontrast': _autocontrast(images),
        'equalize': _equalize(images),
        'solarize': jnp.where(values < 256 * (1 - strength), values, 255 - values),
        'posterize': values >> lost << lost,
    }
    # A product instead of a select, which would be fused into the look-up, and so be computed for
    # every pixel instead of every value. It is exact: numbers of 8 bits, and one of them a sum.
    shape = (len(images), 256, images.shape[-1])
    changes = [jnp.broadcast_to(table - values, shape) for table in tables.values()]
    drawn = operations[:, None] == jnp.array([OPERATIONS.index(name) for name in tables])
    return values + jnp.einsum(
        'bt,btvc->bvc', drawn.astype(jnp.float32), jnp.stack(changes, 1).astype(jnp.float32)
    )


def _autocontrast(images: jax.Array) -> jax.Array:
    """⌊255 (v - low) / (high - low)⌋ for each channel's lowest and highest value."""
    values = jnp.arange(256)[:, None]
    low, high = (
        extreme(images, axis=(1, 2))[:, None].astype(jnp.int32) for extreme in (jnp.min, jnp.max)
    )
    stretched = 255 * (values - low) // jnp.maximum(high - low, 1)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), values)


def _equalize(images: jax.Array) -> jax.Array:
    """⌊(⌊q/2⌋ + pixels below v) / q⌋, at most 255, with 255 q ≈ pixels below the highest value."""
    batch, height, width, channels = images.shape
    values = jnp.arange(256)[:, None]
    # One index instead of three makes the scatter twice as fast.
    rows = 256 * jnp.arange(batch)[:, None, None, None] + images.astype(jnp.int32)
    index = rows * channels + jnp.arange(channels)
    counts = jnp.zeros(batch * 256 * channels, jnp.int32)
    counts = counts.at[index.ravel()].add(1, mode='promise_in_bounds', wrap_negative_indices=False)
    counts = counts.reshape(batch, 256, channels)
    below = jnp.cumsum(counts, axis=1) - counts
    highest = images.max(axis=(1, 2))[:, None]
    # Up to the highest value `below` only grows, so its maximum is the number of pixels below it.
    quantum = jnp.max(jnp.where(values <= highest, below, 0), axis=1, keepdims=True) // 255
    equal = jnp.minimum((quantum // 2 + below) // jnp.maximum(quantum, 1), 255)
    return jnp.where(quantum > 0, equal, values)


def _look_up(tables: jax.Array, images: jax.Array) -> jax.Array:
    batch, height, width, channels = images.shape
    pixels = images.reshape(batch, height * width, channels).astype(jnp.int32)
    pixels = jnp.take_along_axis(tables.astype(jnp.uint8), pixels, axis=1, mode='promise_in_bounds')
    return pixels.reshape(images.shape)


def _grey(images: jax.Array) -> jax.Array:
    """(B, h, w, 1) int32."""
    images = images.astype(jnp.int32)
    if images.shape[-1] != 3:
        return _rounded_mean(images, axis=-1)
    # ITU-R 601-2 in 16 bits: 0.299, 0.587, 0.114.
    luma = jnp.sum(images * jnp.array([19595, 38470, 7471]), axis=-1, keepdims=True)
    return (luma + 2**15) >> 16


def _rounded_mean(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """The mean of integers that are not negative, to the nearest integer, halves upwards."""
    total = jnp.sum(x, axis, keepdims=True)
    count = x.size // total.size
    return (2 * total + count) // (2 * count)


def _smooth(images: jax.Array) -> jax.Array:
    """The mean of a pixel (5 times) and its 8 neighbours; pixels of the edge stay as they are."""
    x = images.astype(jnp.float32)
    padded = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    window = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    height, width = images.shape[1:3]
    row, column = jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]
    edge = (row == 0) | (row == height - 1) | (column == 0) | (column == width - 1)
    return jnp.where(edge, x, jnp.floor((window + 4 * x) / 13 + 0.5))


def _blend(other: jax.Array, images: jax.Array, factors: jax.Array) -> jax.Array:
    """other + factor·(image - other), cut off at 0 and 255 and rounded down."""
    blended = other + factors * (images.astype(jnp.int32) - other)
    return jnp.clip(blended, 0, 255).astype(jnp.uint8)


def _map(operation: str, strength: float, height: int, width: int) -> list[list[float]]:
    """Where a pixel at (row, column), from the centre, takes its value from: [matrix, shift]."""
    angle = math.radians(_MAX_DEGREES * strength)
    slope, shift = _MAX_SHEAR * strength, _MAX_SHIFT * strength
    maps = {
        'rotate': [[math.cos(angle), math.sin(angle), 0], [-math.sin(angle), math.cos(angle), 0]],
        'shear_x': [[1, 0, 0], [slope, 1, 0]],
        'shear_y': [[1, slope, 0], [0, 1, 0]],
        'translate_x': [[1, 0, 0], [0, 1, shift * width]],
        'translate_y': [[1, 0, shift * height], [0, 1, 0]],
    }
    return maps.get(operation, [[1, 0, 0], [0, 1, 0]])


def _affine(maps: jax.Array, images: jax.Array) -> jax.Array:
    """Reads the pixel that is nearest to where each one comes from; maps (B, 2, 3): see `_map`."""
    batch, height, width, channels = images.shape
    y = (jnp.arange(height) - (height - 1) / 2)[:, None]
    x = jnp.arange(width) - (width - 1) / 2

    def source(axis, size):
        from_y, from_x, shift = (maps[:, axis, i, None, None] for i in range(3))
        return jnp.floor(from_y * y + from_x * x + shift + size / 2)

    rows, columns = source(0, height), source(1, width)
    inside = (0 <= rows) & (rows < height) & (0 <= columns) & (columns < width)
    index = jnp.where(inside, rows * width + columns, 0).astype(jnp.int32)
    pixels = jnp.take_along_axis(
        images.reshape(batch, height * width, channels),
        index.reshape(batch, height * width, 1),
        axis=1,
        mode='promise_in_bounds',
    )
    return jnp.where(inside[..., None], pixels.reshape(images.shape), jnp.uint8(_FILL))
