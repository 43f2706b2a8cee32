"""Random crop, horizontal flip and normalisation, on the device, inside the jitted step.

Pure functions of a key. An image's randomness depends on the step's key and on the image's
position in the global batch alone, so it is the same however the batch is spread over devices.
"""

import jax
import jax.numpy as jnp

from performer_vit.errors import BadInput


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


def random_crop(keys: jax.Array, images: jax.Array, padding: int = 4) -> jax.Array:
    """Pads by reflection and crops back to the old size at a random offset.

    With x̂ the image padded by p on each side (the edge pixel is not repeated), the result is
    x̂[dy : dy + h, dx : dx + w], with dy and dx uniform and independent on {0, …, 2p}.

    Args:
        keys: one key per image: (B,) typed, or (B, 2) uint32.
        images: (B, h, w, c), uint8 or any other dtype.
        padding: p in pixels, from 0 (no crop) to min(h, w) - 1.

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
    if padding == 0:
        return images
    offsets = jax.vmap(lambda key: jax.random.randint(key, (2,), -padding, padding + 1))(keys)
    rows = _reflect(jnp.arange(size[0]) + offsets[:, :1], size[0])
    columns = _reflect(jnp.arange(size[1]) + offsets[:, 1:], size[1])
    # Two gathers by index: no padded copy is made, and the first one moves whole rows.
    images = jnp.take_along_axis(images, rows[:, :, None, None], axis=1, mode='promise_in_bounds')
    return jnp.take_along_axis(images, columns[:, None, :, None], axis=2, mode='promise_in_bounds')


def _reflect(index: jax.Array, size: int) -> jax.Array:
    """Maps indices from -(size - 1) to 2 (size - 1) into 0 to size - 1 by mirrors at both edges."""
    return size - 1 - jnp.abs(size - 1 - jnp.abs(index))


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2.

    Args:
        keys: one key per image: (B,) typed, or (B, 2) uint32.
        images: (B, h, w, c), any dtype.

    Returns:
        As `images`.
    """
    flipped = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)


def augment(
    step_key: jax.Array, positions: jax.Array, images: jax.Array, *, padding: int, flip: bool
) -> jax.Array:
    """The training augmentation: random crop, then, if `flip`, random flip.

    Image i uses keys derived from fold_in(step_key, positions[i]), and nothing else.

    Args:
        step_key: the key of this step, the same on every device.
        positions: (B,) integers, each image's position in the global batch.
        images: (B, h, w, c) uint8; B may be a device's share of the global batch.
        padding: of the crop, in pixels; 0 means no crop.
        flip: whether images may be mirrored; never for digits.

    Returns:
        (B, h, w, c) uint8.

    Raises:
        BadInput: padding out of range.
    """

    def keys_of(draw):
        return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(step_key, i), draw))

    images = random_crop(keys_of(0)(positions), images, padding)
    return random_flip(keys_of(1)(positions), images) if flip else images
