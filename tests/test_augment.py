"""Crop, flip, cutout, mixing and normalisation against NumPy, and their distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from performer_vit import augment
from performer_vit.errors import BadInput
from tests.conftest import load_config

# All of it at once, with batches mixed in either way.
EVERYTHING = dict(
    crop_padding=4, flip='alternating', randaugment_layers=2, randaugment_magnitude=9.0, cutout=3,
    mixup=0.8, cutmix=1.0,
)  # fmt: skip


def _noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _options(**changes):
    """The config's section with nothing on but what is asked for."""
    options = load_config('vit').augment
    options.update({'crop_padding': 0, 'flip': 'none', **changes})
    return options


def _augment(key, images, *, positions=None, indices=None, targets=None, epoch=0, **changes):
    """Images and targets of the whole augmentation, with pixels from 0 to 1."""
    positions = jnp.arange(len(images)) if positions is None else positions
    indices = 100 + positions if indices is None else indices
    targets = jnp.zeros((len(images), 2)) if targets is None else targets
    batch = {'image': images, 'position': positions, 'index': indices}
    return augment.augment(
        _options(**changes), batch, targets, seed=0, step_key=key, epoch=epoch, mirror=True,
        mean=np.zeros(3), std=np.ones(3),
    )  # fmt: skip


def _pixels(images):
    """Back to integers from 0 to 255."""
    return np.rint(np.asarray(images) * 255).astype(int)


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
    np.testing.assert_array_equal(_pixels(_augment(jax.random.key(0), images)[0]), images)


@pytest.mark.parametrize('padding', [-1, 4])
def test_padding_out_of_range_is_refused(padding):
    """One reflection reaches h - 1 pixels; more would read wrong pixels without an error."""
    with pytest.raises(BadInput, match='allowed are 0 to 3'):
        augment.random_crop(jax.random.split(jax.random.key(0), 2), _noise((2, 4, 6, 3)), padding)


@pytest.mark.parametrize('padding', [0, 2])
def test_flip_mirrors_left_to_right_or_leaves_the_image(padding):
    """Would catch a flip upside down, one decision for the whole batch, and a flip that moves the
    window of the crop."""
    images = _noise((200, 4, 6, 3))
    key = jax.random.key(2)
    result, cropped = (
        _pixels(_augment(key, images, crop_padding=padding, flip=flip)[0])
        for flip in ('random', 'none')
    )
    mirrored = np.all(result == cropped[:, :, ::-1], axis=(1, 2, 3))
    kept = np.all(result == cropped, axis=(1, 2, 3))
    assert np.all(mirrored ^ kept)
    # Fails for one key in 10,000 if each image is mirrored with probability 1/2.
    assert stats.binomtest(int(mirrored.sum()), 200).pvalue > 1e-4


def test_default_draws_are_pinned():
    """Would catch other crops and flips than those of earlier versions, which would change the
    course of resumed runs. The numbers are those of the first version."""
    result, _ = _augment(
        jax.random.key(0), jnp.asarray(_coordinates(8, 12)), crop_padding=2, flip='random'
    )
    assert _pixels(result)[:, 6, 5:7, :2].tolist() == [
        [[5, 6], [5, 5]], [[6, 5], [6, 4]], [[8, 6], [8, 7]], [[4, 7], [4, 8]],
        [[4, 3], [4, 4]], [[7, 4], [7, 5]], [[5, 8], [5, 7]], [[5, 7], [5, 6]],
    ]  # fmt: skip


def test_alternating_sides_follow_from_seed_index_and_epoch():
    """Would catch sides that depend on the step or the position, that stay, or that are drawn anew
    after the first epoch."""
    images = jnp.asarray(_coordinates(400, 12))
    indices = jnp.asarray(np.random.default_rng(0).permutation(400))

    def mirrored(key, indices, epoch):
        result, _ = _augment(key, images, indices=indices, epoch=epoch, flip='alternating')
        return np.asarray(result[:, 0, 0, 1] > result[:, 0, 1, 1])

    first = mirrored(jax.random.key(0), indices, 0)
    # Fails for one seed in 10,000 if half of the images are mirrored.
    assert stats.binomtest(int(first.sum()), 400).pvalue > 1e-4
    for epoch in range(1, 5):
        later = mirrored(jax.random.key(epoch), indices[::-1], epoch)[::-1]
        np.testing.assert_array_equal(later, first ^ (epoch % 2 == 1))
    other = augment.alternating_sides(1, indices, 0)
    assert 100 < np.sum(other != first) < 300


def test_offsets_and_flips_are_uniform_and_independent():
    """Would catch a range that is one short, a skewed draw, a flip that follows the offset because
    both use one key, and positions that share a key."""
    padding, size, batch = 2, 12, 5000
    result = _pixels(
        jax.jit(lambda key, images: _augment(key, images, crop_padding=padding, flip='random')[0])(
            jax.random.key(3), _coordinates(batch, size)
        )
    )
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


@pytest.mark.parametrize(
    'make_key, changes',
    [
        (jax.random.key, EVERYTHING),
        (jax.random.PRNGKey, EVERYTHING | {'randaugment_layers': 0}),
        (jax.random.key, {'crop_padding': 4, 'flip': 'random'}),
    ],
)
def test_shards_get_what_the_whole_batch_gets(make_key, changes):
    """Would catch randomness that depends on the device or the size of its share, and partners of
    mixtures that lie in another share."""
    images, positions = _noise((12, 8, 8, 3)), jnp.arange(12)
    targets = jax.nn.one_hot(positions, 12)

    @jax.jit
    def run(positions, images, targets):
        key = make_key(4)
        return _augment(key, images, positions=positions, targets=targets, **changes)

    whole = run(positions, images, targets)
    for size in (6, 2):
        shards = [slice(i, i + size) for i in range(0, 12, size)]
        parts = [run(positions[part], images[part], targets[part]) for part in shards]
        for together, apart in zip(whole, zip(*parts, strict=True), strict=True):
            np.testing.assert_allclose(np.concatenate(apart), together, atol=1e-6)


@pytest.mark.parametrize('changes', [
    dict(crop_padding=4), dict(flip='random'), dict(randaugment_layers=1), dict(cutout=3),
    dict(mixup=1.0), dict(cutmix=1.0),
])  # fmt: skip
def test_steps_differ_and_the_same_step_repeats(changes):
    """Would catch an option that does nothing, and one that ignores the step's key."""
    images = _noise((12, 8, 8, 3))
    run = jax.jit(lambda key: _augment(key, images, **changes)[0])
    first, again, other = (np.asarray(run(jax.random.key(seed))) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


@pytest.mark.parametrize('flip', augment.FLIPS)
def test_where_labels_have_sides_no_image_is_mirrored(flip):
    """Would catch digits that are mirrored."""
    images = jnp.asarray(_coordinates(64, 12))
    batch = {'image': images, 'position': jnp.arange(64), 'index': jnp.arange(64)}
    result, _ = augment.augment(
        _options(flip=flip, crop_padding=2), batch, jnp.zeros((64, 2)), seed=0,
        step_key=jax.random.key(7), epoch=0, mirror=False, mean=np.zeros(3), std=np.ones(3),
    )  # fmt: skip
    assert np.all(result[:, 6, 6, 1] > result[:, 6, 5, 1])


def _rectangle(mask):
    """(first row, last row, first column, last column) of a mask that must be a full rectangle."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    edges = rows[0], rows[-1], columns[0], columns[-1]
    assert mask.sum() == len(rows) * len(columns) == mask[np.ix_(rows, columns)].sum()
    return edges


@pytest.mark.parametrize('size', [3, 4])
def test_cutout_erases_a_square_around_a_uniform_centre(size):
    """Would catch a side that is one off, squares that never reach the edge or that wrap around,
    and axes that share a draw."""
    count, height, width = 4000, 5, 8
    images = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (count, height, width, 2)))
    keys = jax.random.split(jax.random.key(8), count)
    result = np.asarray(augment.random_cutout(keys, images, size))
    erased = result == 0
    np.testing.assert_array_equal(result[~erased], np.asarray(images)[~erased])
    np.testing.assert_array_equal(erased[..., 0], erased[..., 1])
    squares = {}
    for y in range(height):
        for x in range(width):
            mask = np.zeros((height + 2 * size, width + 2 * size), bool)
            top, left = y - size // 2 + size, x - size // 2 + size
            mask[top : top + size, left : left + size] = True
            squares[mask[size:-size, size:-size].tobytes()] = y * width + x
    assert len(squares) == height * width
    counts = np.bincount([squares[mask.tobytes()] for mask in erased[..., 0]], minlength=40)
    # Fails for one key in 10,000 if all centres are equally likely.
    assert stats.chisquare(counts).pvalue > 1e-4


def test_cutout_comes_after_normalisation():
    """Would catch squares of black, or of the mean of another scale."""
    images = _noise((8, 12, 12, 3))
    batch = {'image': images, 'position': jnp.arange(8), 'index': jnp.arange(8)}
    mean, std = np.array([0.2, 0.5, 0.8]), np.array([0.1, 0.2, 0.3])
    result, _ = augment.augment(
        _options(cutout=5), batch, jnp.zeros((8, 2)), seed=0, step_key=jax.random.key(0), epoch=0,
        mirror=False, mean=mean, std=std,
    )  # fmt: skip
    kept = (images / 255 - mean) / std
    erased = np.asarray(result) == 0
    assert np.all(erased.sum((1, 2, 3)) >= 3 * 3 * 3) and erased.all(-1).any()
    np.testing.assert_allclose(np.where(erased, kept, result), kept, atol=1e-5)


def _mixed(mixup, cutmix, shape=(400, 6, 9, 2), key=0):
    """Images and targets before and after mixing, targets one-hot over all images."""
    images = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    targets = np.eye(shape[0], dtype=np.float32)
    batch_key, image_key = jax.random.split(jax.random.key(key))
    mixed = augment.mix(
        batch_key, jax.random.split(image_key, shape[0]), images, targets,
        mixup=mixup, cutmix=cutmix,
    )  # fmt: skip
    return images, targets, *map(np.asarray, mixed)


def _partners(x):
    return x[np.arange(len(x)) ^ 1]


def _share(targets, mixed):
    """λ of each image, from targets that must be those of the image and its neighbour."""
    share = mixed[np.arange(len(mixed)), np.arange(len(mixed))].astype(float)
    expected = share[:, None] * targets + (1 - share[:, None]) * _partners(targets)
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    return share


@pytest.mark.parametrize('alpha', [0.2, 1.0, 8.0])
def test_mixup_is_the_formula_with_shares_of_a_beta_distribution(alpha):
    """Would catch images and targets that are mixed in other shares or with other partners, a share
    that the batch has in common, and a wrong parameter of the distribution."""
    images, targets, mixed, mixed_targets = _mixed(alpha, 0.0)
    share = _share(targets, mixed_targets)
    weight = share[:, None, None, None]
    np.testing.assert_allclose(mixed, weight * images + (1 - weight) * _partners(images), atol=1e-5)
    # Fails for one key in 10,000 if they are drawn from it.
    assert stats.kstest(share, stats.beta(alpha, alpha).cdf).pvalue > 1e-4


def test_cutmix_pastes_a_rectangle_whose_share_the_targets_have():
    """Would catch targets that keep the share that was drawn although the rectangle was cut off at
    the edge, rectangles of another shape than the image, and a centre that is not uniform."""
    shape = (2000, 6, 9, 2)
    images, targets, mixed, mixed_targets = _mixed(0.0, 1.0, shape)
    pasted = np.all(mixed == _partners(images), axis=-1)
    np.testing.assert_array_equal(mixed, np.where(pasted[..., None], _partners(images), images))
    share = _share(targets, mixed_targets)
    np.testing.assert_allclose(1 - share, pasted.mean((1, 2)), atol=1e-6)
    # Rectangles that touch no edge were not cut off: their sides are √(1 - λ) of the image's. Two
    # rows mean √(1 - λ) from 1.5/6 to 2.5/6, and so 2.25 to 3.75 columns, rounded.
    sides = set()
    for mask in pasted[pasted.any((1, 2))]:
        top, bottom, left, right = _rectangle(mask)
        if top and left and bottom < 5 and right < 8:
            sides.add((int(bottom - top + 1), int(right - left + 1)))
    assert {columns for rows, columns in sides if rows == 2} == {2, 3, 4}
    # Fails for one key in 10,000 if both are draws of one distribution.
    expected = _cutmix_areas(np.random.default_rng(2), 4000, shape[1:3])
    assert stats.ks_2samp(pasted.sum((1, 2)), expected).pvalue > 1e-4


def _cutmix_areas(rng, count, shape):
    """Pixels of the pasted part for α = 1, drawn one by one."""
    areas = []
    for cut in np.sqrt(1 - rng.uniform(size=count)):
        lengths = []
        for size in shape:
            side, centre = int(np.rint(cut * size)), rng.integers(size)
            first = centre - side // 2
            lengths.append(len(set(range(first, first + side)) & set(range(size))))
        areas.append(np.prod(lengths))
    return areas


def test_with_both_on_each_batch_is_mixed_by_one_of_them():
    """Would catch a choice for each image, a choice that never changes, and the parameter of the
    one that is used for the other: shares of mixup lie near 1/2 here, those of CutMix do not."""
    run = jax.jit(
        lambda key, images: augment.mix(
            key, jax.random.split(key, 8), images, jnp.eye(8), mixup=1e4, cutmix=1.0
        )
    )
    images = np.random.default_rng(1).normal(size=(8, 12, 12, 1)).astype(np.float32)
    cuts = 0
    for key in jax.random.split(jax.random.key(9), 200):
        mixed, targets = run(key, images)
        of_two = np.all((mixed == images) | (mixed == _partners(images)), axis=(1, 2, 3))
        assert of_two.all() or not of_two.any()
        if of_two.any():
            cuts += 1
            assert np.abs(np.diag(targets) - 0.5).max() > 0.05
        else:
            assert np.abs(np.diag(targets) - 0.5).max() < 0.05
    # Fails for one key in 10,000 if both are equally likely.
    assert stats.binomtest(cuts, 200).pvalue > 1e-4


@pytest.mark.parametrize('changes, batch, says', [
    (dict(flip='sometimes'), 4, r"augment.flip is 'sometimes'; allowed are 'random'"),
    (dict(crop_padding=8), 4, r'crop_padding is 8; .* below 8'),
    (dict(cutout=8), 4, r'cutout is 8; .* below 8'),
    (dict(cutout=-1), 4, r'cutout is -1; .* from 0'),
    (dict(mixup=-0.1), 4, r'mixup is -0.1; set it to 0'),
    (dict(cutmix=float('nan')), 4, r'cutmix is nan; set it to 0'),
    (dict(cutmix=float('inf')), 4, r'cutmix is inf; set it to 0'),
    (dict(mixup=0.2), 3, r'gets 3 of a batch: set batch_size to a multiple of twice'),
    (dict(randaugment_layers=-1), 4, r'layers is -1; set it to 0 or more'),
    (dict(randaugment_magnitude=10.5), 4, r'magnitude is 10.5; .* from 0 to 10'),
])  # fmt: skip
def test_impossible_options_are_refused(changes, batch, says):
    """Would catch an option that is accepted and then not honoured."""
    with pytest.raises(BadInput, match=says):
        _augment(jax.random.key(0), _noise((batch, 8, 9, 3)), **changes)


def test_images_too_large_for_sums_are_refused():
    """Would catch a contrast that blends with a mean that has overflowed."""
    with pytest.raises(BadInput, match=r'layers is 1 and images have 2048 × 2048 pixels'):
        augment.check(_options(randaugment_layers=1), (4, 2048, 2048, 3))


@pytest.mark.parametrize('alpha', [1e-6, 1e6])
def test_shares_of_the_most_extreme_parameters_are_numbers(alpha):
    """Would catch shares of 0/0 or ∞/∞ where draws of the Beta distribution leave float32."""
    *_, mixed, targets = _mixed(alpha, 0.0)
    assert np.isfinite(mixed).all() and np.isfinite(targets).all()
