"""The training augmentation and normalisation, on the device, inside the jitted step.

Pure functions of keys. An image's randomness depends on the run's seed, the step's key, the
image's position in the global batch and its index in the split alone, and images are mixed in pairs
that lie on one device; so the result is the same however the batch is spread over devices.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from performer_vit.errors import BadInput, choose
from performer_vit.randaugment import MAX_MAGNITUDE, MOST_PIXELS, randaugment

FLIPS = ('random', 'alternating', 'none')

# What an image's key is folded with, so that no two draws share a key.
_CROP, _FLIP, _OPERATIONS, _CUTOUT, _MIX = range(5)
_APART = 2**32 - 1  # A number that no step and no position has.


def check(options, shape: tuple[int, int, int, int]) -> None:
    """Raises `BadInput` unless images can be augmented so.

    Args:
        options: the `augment` section of a config.
        shape: (B, h, w, c), of a device's share of a batch.
    """
    batch, *sides, _ = shape
    shortest = min(sides)
    choose('augment.flip', options.flip, FLIPS)
    if not 0 <= options.crop_padding < shortest:
        raise BadInput(
            f'augment.crop_padding is {options.crop_padding}; a reflection is smaller than the '
            f'image: set it to a number from 0 to below {shortest}, or dataset.image_size higher.'
        )
    if not 0 <= options.cutout < shortest:
        raise BadInput(
            f'augment.cutout is {options.cutout}; the square is smaller than the image: set it to '
            f'a number from 0 to below {shortest}, or dataset.image_size higher.'
        )
    for field in ('mixup', 'cutmix'):
        # Far beyond these, draws of a Beta distribution leave the range of float32.
        if options[field] != 0 and not 1e-6 <= options[field] <= 1e6:
            raise BadInput(
                f'augment.{field} is {options[field]}; set it to 0 or to a number from 1e-6 to 1e6.'
            )
    if batch % 2 and (options.mixup or options.cutmix):
        raise BadInput(
            f'augment.mixup is {options.mixup} and augment.cutmix is {options.cutmix}, which mix '
            f'the images of a device in pairs, but it gets {batch} of a batch: set batch_size to a '
            'multiple of twice the number of devices, or both to 0.'
        )
    if options.randaugment_layers < 0:
        raise BadInput(
            f'augment.randaugment_layers is {options.randaugment_layers}; set it to 0 or more.'
        )
    if options.randaugment_layers and math.prod(sides) >= MOST_PIXELS:
        raise BadInput(
            f'augment.randaugment_layers is {options.randaugment_layers} and images have '
            f'{sides[0]} × {sides[1]} pixels, of which its operations take less than '
            f'{MOST_PIXELS:,}: set it to 0, or dataset.image_size lower.'
        )
    if not 0 <= options.randaugment_magnitude <= MAX_MAGNITUDE:
        raise BadInput(
            f'augment.randaugment_magnitude is {options.randaugment_magnitude}; set it to a number '
            f'from 0 to {MAX_MAGNITUDE}.'
        )


def augment(
    options,
    batch: Mapping[str, jax.Array],
    targets: jax.Array,
    *,
    seed: int,
    step_key: jax.Array,
    epoch: jax.Array | int,
    mirror: bool,
    mean: jax.Array,
    std: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Crop, flip and RandAugment of uint8 images; then normalisation, cutout and mixing.

    What is drawn for an image comes from fold_in(step_key, position); the sides of 'alternating'
    flips come from (seed, index).

    Args:
        options: the `augment` section of a config.
        batch: of B images, a device's share or the whole, as `input_pipeline.train_batches` makes
            it: `image` (B, h, w, c) uint8, `position` (B,) and `index` (B,) integers.
        targets: (B, K) float32, the probability of each class.
        seed: of the run.
        step_key: the key of this step, the same on every device.
        epoch: () integer, from 0.
        mirror: whether a mirrored image keeps its label; otherwise `options.flip` counts as 'none'.
        mean: (c,); see `normalize`.
        std: (c,); see `normalize`.

    Returns:
        (B, h, w, c) float32 images, and their targets (B, K) float32.

    Raises:
        BadInput: an option out of range; B odd where images are mixed.
    """
    images = batch['image']
    check(options, images.shape)
    image_keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(batch['position'])

    def keys(draw):
        return jax.vmap(lambda key: jax.random.fold_in(key, draw))(image_keys)

    mirrored = None
    if mirror and options.flip == 'random':
        mirrored = jax.vmap(jax.random.bernoulli)(keys(_FLIP))
    elif mirror and options.flip == 'alternating':
        mirrored = alternating_sides(seed, batch['index'], epoch)
    images = random_crop(keys(_CROP), images, options.crop_padding, mirrored)
    if options.randaugment_layers:
        images = randaugment(
            keys(_OPERATIONS),
            images,
            layers=options.randaugment_layers,
            magnitude=options.randaugment_magnitude,
        )
    images = normalize(images, mean, std)
    if options.cutout:
        images = random_cutout(keys(_CUTOUT), images, options.cutout)
    if options.mixup or options.cutmix:
        images, targets = mix(
            jax.random.fold_in(step_key, _APART),
            keys(_MIX),
            images,
            targets,
            mixup=options.mixup,
            cutmix=options.cutmix,
        )
    return images, targets


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """(images/255 - mean) / std, per channel.

    Args:
        images: (B, h, w, c) uint8.
        mean: (c,) mean of images/255.
        std: (c,) standard deviation of images/255, positive.

    Returns:
        (B, h, w, c) float32.
    """
    mean = jnp.asarray(mean, jnp.float32)
    std = jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


def random_crop(
    keys: jax.Array, images: jax.Array, padding: int = 4, mirrored: jax.Array | None = None
) -> jax.Array:
    """Pads by reflection, crops back to the old size at a random offset, and mirrors.

    With x̂ the image padded by p on each side (the edge pixel is not repeated), the result is
    x̂[dy : dy + h, dx : dx + w], with dy and dx uniform and independent on {0, …, 2p}.

    Args:
        keys: one key per image: (B,) typed, or (B, 2) uint32.
        images: (B, h, w, c), uint8 or any other dtype.
        padding: p in pixels, from 0 (no crop) to min(h, w) - 1.
        mirrored: (B,) bool, which of the results are mirrored left to right; None: none.

    Returns:
        As `images`.

    Raises:
        BadInput: padding out of range.
    """
    size = images.shape[1:3]
    if not 0 <= padding < min(size):
        raise BadInput(
            f'The padding of the random crop is {padding!r}; allowed are 0 to {min(size) - 1}, '
            f'for images of {size[0]}×{size[1]} pixels. Choose one of these.'
        )
    if padding == 0 and mirrored is None:
        return images
    if padding == 0:
        return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    offsets = jax.vmap(lambda key: jax.random.randint(key, (2,), -padding, padding + 1))(keys)
    rows = _reflect(jnp.arange(size[0]) + offsets[:, :1], size[0])
    columns = _reflect(jnp.arange(size[1]) + offsets[:, 1:], size[1])
    if mirrored is not None:
        # Of the index, not of the pixels: it is the smaller by far.
        columns = jnp.where(mirrored[:, None], columns[:, ::-1], columns)
    # Two gathers by index: no padded copy is made, and the first one moves whole rows.
    images = jnp.take_along_axis(images, rows[:, :, None, None], axis=1, mode='promise_in_bounds')
    return jnp.take_along_axis(images, columns[:, None, :, None], axis=2, mode='promise_in_bounds')


def _reflect(index: jax.Array, size: int) -> jax.Array:
    """Maps indices from -(size - 1) to 2 (size - 1) into 0 to size - 1 by mirrors at both edges."""
    return size - 1 - jnp.abs(size - 1 - jnp.abs(index))


def alternating_sides(seed: int, indices: jax.Array, epoch: jax.Array | int) -> jax.Array:
    """Which images are mirrored: one side in even epochs, the other side in odd ones.

    In epoch 0 each image is mirrored with probability 1/2, so any two epochs in a row show both of
    its sides (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU").

    Args:
        seed: of the run, from 0 to 2**32 - 1.
        indices: (B,) integers, each image's index in the split.
        epoch: () integer, from 0.

    Returns:
        (B,) bool, a pure function of (seed, index, whether the epoch is even).
    """
    key = jax.random.fold_in(jax.random.key(seed), _APART)
    first = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i)))(indices)
    return first ^ (epoch % 2 == 1)


def random_cutout(keys: jax.Array, images: jax.Array, size: int) -> jax.Array:
    """Sets a random square of each image to 0, which is the mean once images are normalised.

    DeVries & Taylor 2017, "Improved regularization of convolutional neural networks with cutout".
    The centre is uniform over the pixels; what lies outside the image is cut off.

    Args:
        keys: one key per image: (B,) typed, or (B, 2) uint32.
        images: (B, h, w, c), normalised.
        size: side of the square in pixels.

    Returns:
        As `images`.
    """
    sides = jnp.full((len(images), 2), size)
    return jnp.where(_rectangles(keys, sides, images.shape[1:3])[..., None], 0, images)


def _rectangles(keys: jax.Array, sides: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """(B, h, w) bool: True inside rectangles of `sides` (B, 2), their centres uniform."""
    centres = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, jnp.array(shape)))(keys)
    first = centres - sides // 2
    rows, columns = (
        (first[:, axis, None] <= jnp.arange(size))
        & (jnp.arange(size) < first[:, axis, None] + sides[:, axis, None])
        for axis, size in enumerate(shape)
    )
    return rows[:, :, None] & columns[:, None, :]


def mix(
    batch_key: jax.Array,
    keys: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    *,
    mixup: float,
    cutmix: float,
) -> tuple[jax.Array, jax.Array]:
    """Mixup or CutMix of images 0 and 1, 2 and 3, …, and of their targets in the same shares.

    With x' an image's partner, and its share λ ~ Beta(α, α) drawn for each image,

    - mixup: λ x + (1 - λ) x' (Zhang et al. 2018, "mixup: Beyond empirical risk minimization");
    - CutMix: x outside and x' inside a rectangle of sides √(1 - λ) h and √(1 - λ) w, rounded, its
      centre uniform over the pixels; what lies outside the image is cut off, and λ becomes the
      share of pixels that x keeps (Yun et al. 2019, "CutMix: Regularization strategy to train
      strong classifiers with localizable features");
    - the targets: λ y + (1 - λ) y'.

    Partners are neighbours, so they are the same ones wherever a batch is cut in even shares; since
    batches are in random order, neighbours are random partners. With both on, all images of a
    batch are mixed by one of the two, each with probability 1/2.

    Args:
        batch_key: for the choice between the two, the same on every device.
        keys: one key per image: (B,) typed, or (B, 2) uint32.
        images: (B, h, w, c) float32, B even.
        targets: (B, K) float32.
        mixup: α of mixup, 0 or more; 0: off.
        cutmix: α of CutMix, 0 or more; 0: off. One of the two must be on.

    Returns:
        The mixed images and targets, of the same shapes.
    """
    keys = jax.vmap(jax.random.split)(keys)
    cuts = jax.random.bernoulli(batch_key) if mixup and cutmix else cutmix > 0
    alpha = jnp.where(cuts, cutmix, mixup)
    share = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys[:, 0])
    kept = share[:, None, None]
    if cutmix:
        shape = images.shape[1:3]
        sides = jnp.round(jnp.sqrt(1 - share)[:, None] * jnp.array(shape)).astype(jnp.int32)
        outside = 1.0 - _rectangles(keys[:, 1], sides, shape)
        kept = jnp.where(cuts, outside, kept)
        share = jnp.where(cuts, outside.mean(axis=(1, 2)), share)
    return _mix_pairs(kept[..., None], images), _mix_pairs(share[:, None], targets)


def _mix_pairs(kept: jax.Array, x: jax.Array) -> jax.Array:
    partners = x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
    return kept * x + (1 - kept) * partners
