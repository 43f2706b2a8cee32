"""Crop, flip and normalisation against NumPy, and their distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from performer_vit import augment
from performer_vit.errors import BadInput


def _noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _coordinates(batch, size):
    """Images whose channels 0 and 1 are the row and the column of each pixel."""
    rows, columns = np.mgrid[:size, :size]
    image = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
    return np.broadcast_to(image, (batch, size, size, 3))


def test_normalize_is_the_formula_in_float64():
    """Would catch a wrong scale, a wrong channel axis, and arithmetic in uint8."""
    images = _noise((4, 5, 6, 3))
    mean, std = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.3, 0.05])
    result = augment.normalize(jnp.asarray(images), mean, std)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, (images / 255.0 - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'shape, padding', [((64, 8, 11, 3), 4), ((64, 8, 11, 1), 7), ((64, 5, 5, 3), 1)]
)
def test_crop_is_a_window_of_the_image_padded_by_numpy(shape, padding):
    """Would catch symmetric instead of reflected padding, swapped axes, a window out of place."""
    images = _noise(shape)
    keys = jax.random.split(jax.random.key(1), shape[0])
    result = np.asarray(jax.jit(augment.random_crop, static_argnums=2)(keys, images, padding))
    assert result.dtype == np.uint8 and result.shape == shape
    height, width = shape[1:3]
    offsets = range(2 * padding + 1)
    for image, cropped in zip(images, result, strict=True):
        padded = np.pad(image, [(padding, padding), (padding, padding), (0, 0)], mode='reflect')
        assert any(
            np.array_equal(padded[dy : dy + height, dx : dx + width], cropped)
            for dy in offsets
            for dx in offsets
        )


def test_padding_zero_is_the_identity():
    """Would catch a crop that shifts although it has no room to."""
    images = jnp.asarray(_noise((3, 4, 4, 3)))
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_array_equal(augment.random_crop(keys, images, 0), images)
    augmented = augment.augment(jax.random.key(0), jnp.arange(3), images, padding=0, flip=False)
    np.testing.assert_array_equal(augmented, images)


@pytest.mark.parametrize('padding', [-1, 4])
def test_padding_out_of_range_is_refused(padding):
    """One reflection reaches h - 1 pixels; more would read wrong pixels without an error."""
    with pytest.raises(BadInput, match='allowed are 0 to 3'):
        augment.random_crop(jax.random.split(jax.random.key(0), 2), _noise((2, 4, 6, 3)), padding)


def test_flip_mirrors_left_to_right_or_leaves_the_image():
    """Would catch a flip upside down, or one decision for the whole batch."""
    images = _noise((200, 4, 6, 3))
    keys = jax.random.split(jax.random.key(2), 200)
    result = np.asarray(augment.random_flip(keys, images))
    mirrored = np.all(result == images[:, :, ::-1], axis=(1, 2, 3))
    kept = np.all(result == images, axis=(1, 2, 3))
    assert np.all(mirrored ^ kept)
    # Fails for one key in 10,000 if each image is mirrored with probability 1/2.
    assert stats.binomtest(int(mirrored.sum()), 200).pvalue > 1e-4


def test_offsets_and_flips_are_uniform_and_independent():
    """Would catch a range that is one short, a skewed draw, a flip that follows the offset because
    both use one key, and positions that share a key."""
    padding, size, batch = 2, 12, 5000
    result = np.asarray(
        jax.jit(
            lambda key, images: augment.augment(
                key, jnp.arange(batch), images, padding=padding, flip=True
            )
        )(jax.random.key(3), _coordinates(batch, size))
    ).astype(int)
    # At the centre nothing is reflected, so the pixels tell where they came from.
    middle = size // 2
    flipped = result[:, middle, middle, 1] < result[:, middle, middle - 1, 1]
    dy = result[:, middle, middle, 0] - middle
    dx = result[:, middle, middle, 1] - np.where(flipped, size - 1 - middle, middle)
    counts = np.zeros((2, 2 * padding + 1, 2 * padding + 1), int)
    np.add.at(counts, (flipped.astype(int), dy + padding, dx + padding), 1)
    assert counts.sum() == batch
    # 50 cells, 100 expected in each. Fails for one key in 10,000 if they are equally likely.
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4


@pytest.mark.parametrize('make_key', [jax.random.key, jax.random.PRNGKey])
def test_shards_get_what_the_whole_batch_gets(make_key):
    """Would catch randomness that depends on the device or the size of its share."""
    images, positions = _noise((12, 8, 8, 3)), jnp.arange(12)

    @jax.jit
    def run(positions, images):
        return augment.augment(make_key(4), positions, images, padding=4, flip=True)

    whole = np.asarray(run(positions, images))
    for size in (6, 3):
        parts = [run(positions[i : i + size], images[i : i + size]) for i in range(0, 12, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_steps_differ_and_the_same_step_repeats():
    """Would catch an augmentation that ignores the step's key."""
    images, positions = _noise((12, 8, 8, 3)), jnp.arange(12)
    run = jax.jit(lambda key: augment.augment(key, positions, images, padding=4, flip=True))
    first, again, other = (np.asarray(run(jax.random.key(seed))) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_without_flip_no_image_is_mirrored():
    """Would catch digits that are mirrored."""
    result = augment.augment(
        jax.random.key(7), jnp.arange(64), _coordinates(64, 12), padding=2, flip=False
    )
    assert np.all(result[:, 6, 6, 1] > result[:, 6, 5, 1])
