"""RandAugment's operations against Pillow, and what is drawn."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from performer_vit import randaugment
from performer_vit.randaugment import OPERATIONS

_SIGNED = OPERATIONS[9:] + ('rotate', 'color', 'contrast', 'brightness')

# One compilation for each shape and magnitude.
_apply = jax.jit(randaugment.apply, static_argnums=3)


@functools.cache
def _images(height=32, width=32, channels=3):
    """Noise, low contrast, two values, one value, and a photograph's kind: smooth, with edges."""
    rng = np.random.default_rng(0)
    shape = (height, width, channels)
    y, x, c = np.mgrid[:height, :width, :channels]
    smooth = 127 + 90 * np.sin(x / 5 + c) * np.cos(y / 7) + 30 * (x > y)
    return np.stack([
        rng.integers(0, 256, shape),
        rng.integers(100, 131, shape),
        np.where(rng.random(shape) < 0.1, 200, 31),
        np.full(shape, 77),
        smooth,
    ]).astype(np.uint8)  # fmt: skip


def _ours(name, sign, magnitude, images):
    operations = jnp.full(len(images), OPERATIONS.index(name))
    result = _apply(operations, jnp.full(len(images), sign, jnp.float32), images, magnitude)
    assert result.dtype == jnp.uint8 and result.shape == images.shape
    return np.asarray(result)


def _by_pillow(call, images):
    """`call` of each image as Pillow's, which has no last axis where there is one channel."""
    outputs = [
        np.asarray(call(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)))
        for image in images
    ]
    return np.stack(outputs).reshape(images.shape)


def _value_by_pillow(name, sign, magnitude, image):
    m = magnitude / 10
    if name in ('color', 'contrast', 'brightness', 'sharpness'):
        return getattr(ImageEnhance, name.title())(image).enhance(1 + 0.9 * sign * m)
    return {
        'identity': lambda: image,
        'equalize': lambda: ImageOps.equalize(image),
        'solarize': lambda: ImageOps.solarize(image, 256 * (1 - m)),
        'posterize': lambda: ImageOps.posterize(image, 8 - round(4 * m)),
    }[name]()


@pytest.mark.parametrize(
    'shape, magnitude', [((32, 32, 3), 10), ((32, 32, 3), 3.5), ((9, 5, 1), 7)]
)
def test_operations_on_values_are_those_of_pillow(shape, magnitude):
    """Would catch a wrong table, wrong rounding, a wrong grey, a smoothing that touches the edge,
    bits or thresholds that run against the magnitude."""
    images = _images(*shape)
    names = (
        'identity', 'equalize', 'solarize', 'posterize', 'color', 'contrast', 'brightness',
        'sharpness',
    )  # fmt: skip
    for name, sign in itertools.product(names, (1, -1)):
        pillow = functools.partial(_value_by_pillow, name, sign, magnitude)
        ours = _ours(name, sign, magnitude, images)
        np.testing.assert_array_equal(ours, _by_pillow(pillow, images), err_msg=f'{name}, {sign}')


@pytest.mark.parametrize('shape', [(32, 32, 3), (9, 5, 1)])
def test_autocontrast_is_the_formula_and_pillow_but_for_its_rounding(shape):
    """Would catch channels that share their extremes, and an image of one value that is divided by
    zero. Pillow's float64 may fall short of a whole number, and so be 1 lower."""
    images = _images(*shape)
    ours = _ours('autocontrast', 1, 10, images).astype(int)
    low, high = (f(images.astype(int), axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    stretched, rest = np.divmod(255 * (images - low), np.maximum(high - low, 1))
    np.testing.assert_array_equal(ours, np.where(high > low, stretched, images))
    excess = ours - _by_pillow(ImageOps.autocontrast, images)
    assert np.all((excess == 0) | ((excess == 1) & (rest == 0)))


@pytest.mark.parametrize(
    'shape, magnitude', [((32, 32, 3), 10), ((32, 32, 3), 3.5), ((9, 14, 1), 7)]
)
@pytest.mark.parametrize('sign', [1, -1])
def test_affine_operations_are_those_of_pillow(shape, magnitude, sign):
    """Would catch swapped axes, a centre that is off by half a pixel, a shift in pixels of another
    image size, a wrong fill. Pillow's coordinates have 16 bits after the point, so that a pixel
    half-way between two may differ."""
    images = _images(*shape)
    height, width = shape[:2]
    m = sign * magnitude / 10
    x, y = width / 2, height / 2
    slope, shift = 0.3 * m, 150 / 331 * m
    rows = {
        'shear_x': (1, slope, -slope * y, 0, 1, 0),
        'shear_y': (1, 0, 0, slope, 1, -slope * x),
        'translate_x': (1, 0, shift * width, 0, 1, 0),
        'translate_y': (1, 0, 0, 0, 1, shift * height),
    }
    fill = (128,) * 3 if shape[2] == 3 else 128

    def rotate(image):
        return image.rotate(30 * m, Image.Resampling.NEAREST, fillcolor=fill)

    def transform(image, row):
        method, nearest = Image.Transform.AFFINE, Image.Resampling.NEAREST
        return image.transform(image.size, method, row, nearest, fillcolor=fill)

    calls = {name: functools.partial(transform, row=row) for name, row in rows.items()}
    for name, call in {**calls, 'rotate': rotate}.items():
        ours, theirs = _ours(name, sign, magnitude, images), _by_pillow(call, images)
        assert np.mean(ours != theirs) < 0.002, name
        assert np.mean(ours != images) > 0.1, name  # Else the comparison above says nothing.


@pytest.mark.parametrize('shape', [(6, 7, 2), (1, 1, 3), (2, 3, 5)])
def test_any_size_and_number_of_channels(shape):
    """Would catch a luma that takes three channels for granted, and windows larger than the image.
    Two channels are grey at their mean, halves upwards."""
    images = _images(*shape)
    for name in OPERATIONS:
        _ours(name, 1, 10, images)
    if shape[2] != 3:
        grey = np.floor(images.mean(-1, keepdims=True) + 0.5)
        expected = np.clip(grey + 0.1 * (images - grey), 0, 255)
        assert np.abs(_ours('color', -1, 10, images) - np.floor(expected + 1e-4)).max() <= 1


def test_magnitude_zero_changes_nothing_but_by_autocontrast_and_equalize():
    """Would catch an operation whose strength does not start at nothing."""
    images = _images()
    for name, sign in itertools.product(OPERATIONS, (1, -1)):
        same = np.array_equal(_ours(name, sign, 0, images), images)
        assert same == (name not in ('autocontrast', 'equalize')), name


def test_images_of_a_batch_get_their_own_operations():
    """Would catch a table or a map that is applied to another image than it was made for."""
    image = _images()[4]
    pairs = list(itertools.product(range(len(OPERATIONS)), (1, -1)))
    operations, signs = map(np.array, zip(*pairs, strict=True))
    batch = np.broadcast_to(image, (len(pairs), *image.shape))
    together = _apply(jnp.array(operations), jnp.array(signs, jnp.float32), batch, 10)
    for (operation, sign), result in zip(pairs, together, strict=True):
        alone = _ours(OPERATIONS[operation], sign, 10, _images())[4]
        np.testing.assert_array_equal(result, alone)


def test_operations_and_signs_are_uniform_and_layers_draw_anew():
    """Would catch an operation that is never drawn, a sign that follows the operation, and layers
    or images that share their draws."""
    image, count = _images(20, 20, 3)[0], 2800
    keys = jax.random.split(jax.random.key(0), count)
    images = np.broadcast_to(image, (count, *image.shape))
    run = jax.jit(randaugment.randaugment, static_argnames=('layers', 'magnitude'))
    once, twice = (np.asarray(run(keys, images, layers=n, magnitude=9.0)) for n in (1, 2))

    pairs = list(itertools.product(range(len(OPERATIONS)), (1, -1)))
    operations, signs = (jnp.array(values) for values in zip(*pairs, strict=True))

    def all_of(image):
        batch = np.broadcast_to(image, (len(pairs), *image.shape))
        return np.asarray(_apply(operations, signs.astype(jnp.float32), batch, 9.0))

    def drawn(result, candidates):
        return [pairs[i] for i in np.flatnonzero((candidates == result).all((1, 2, 3)))]

    candidates = all_of(image)
    first = [drawn(result, candidates) for result in once]
    counts = np.zeros((len(OPERATIONS), 2), int)
    for found in first:
        name = OPERATIONS[found[0][0]]
        assert len(found) == (1 if name in _SIGNED else 2), found
        counts[found[0][0], int(found[0][1] < 0)] += 1
    # Each fails for one key in 10,000 if all are equally likely: 14 operations; the two signs.
    assert stats.chisquare(counts.sum(1)).pvalue > 1e-4
    for name in _SIGNED:
        signs_of = counts[OPERATIONS.index(name)]
        assert stats.binomtest(int(signs_of[0]), int(signs_of.sum())).pvalue > 1e-4 / 9

    equal = 0
    for i in range(100):
        second = {operation for operation, _ in drawn(twice[i], all_of(once[i]))}
        assert second
        equal += first[i][0][0] in second
    assert equal < 40  # A 14th of them by chance, and some more where an operation is void.
