"""Images in folders, a folder a class: read as they come from strangers, and refused by name.

DIR/train/CLASS/IMAGE and DIR/test/CLASS/IMAGE, with the same classes in both. Pillow decodes; it is
imported by the functions that need it.
"""

import pathlib
import warnings

import numpy as np

from performer_vit.errors import BadInput, one_line, shown
from performer_vit.files import is_text

SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.gif', '.webp', '.tif', '.tiff')
# Named to Pillow, which would else hand PostScript in a file called so to Ghostscript.
_FORMATS = ('PNG', 'JPEG', 'BMP', 'GIF', 'WEBP', 'TIFF')
# Pillow itself refuses nothing below 180 million pixels, half a gigabyte of RGB.
MAX_PIXELS = 50_000_000
_NAMED = 5  # So many of the files that cannot be used are named.


def read(
    directory: pathlib.Path, image_size: int, *, read_test: bool = True
) -> tuple[tuple[str, ...], tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray] | None]:
    """Both splits of a directory, or the training split alone.

    Each image is turned as its EXIF data say, scaled so that its shorter side is `image_size`, with
    Pillow's antialiased bilinear filter, and cut to the square in its middle. Grey, palette and
    CMYK images become RGB, 16 bits become 8, of an animation the first frame is taken, transparency
    is laid over black.

    Args:
        directory: which holds `train` and `test`. Files in it that begin with a dot, and what does
            not end like an image, are no images.
        image_size: s, pixels along a side.
        read_test: whether there is a test split to read.

    Returns:
        (class names in the order of the alphabet, (train images (n, s, s, 3) uint8, labels (n,)
        int32), (test images, labels) or None), in the order of class and file name.

    Raises:
        BadInput: no such directory; a split without classes; a class without images, or in one
            split only, or whose name is no UTF-8; a link that leads out of the directory; files
            that cannot be decoded or have more than `MAX_PIXELS` pixels, the first of them named,
            with their number.
    """
    root = directory.resolve()
    found = {split: _classes(root, split) for split in ('train', 'test')[: 1 + read_test]}
    names = tuple(sorted(found['train']))
    apart = sorted(set(names).symmetric_difference(found.get('test', names)))
    if apart:
        raise BadInput(
            f'{root} has {len(apart)} of its classes in one of train and test only, '
            f'{shown(apart)}; both need a folder for each class. Add or remove these.'
        )
    problems = []
    splits = [
        _decode(root, [found[s][name] for name in names], image_size, problems) for s in found
    ]
    if problems:
        first = '; '.join(problems[:_NAMED])
        raise BadInput(
            f'{len(problems)} of the images in {root} cannot be used: {first}'
            f'{" …" if len(problems) > _NAMED else ""}. Repair or remove them.'
        )
    return names, splits[0], splits[1] if read_test else None


def _classes(root: pathlib.Path, split: str) -> dict[str, list[pathlib.Path]]:
    """The image files of a split by class, sorted."""
    if not (root / split).is_dir():
        raise BadInput(
            f'{root / split} is not a directory; images are read from DIR/train/CLASS/IMAGE and '
            'DIR/test/CLASS/IMAGE. Name such a DIR by dataset.data_dir.'
        )
    classes = {}
    for folder in sorted((root / split).iterdir()):
        if folder.name.startswith('.') or not folder.is_dir():
            continue
        files = sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith('.')
        )
        if not files:
            raise BadInput(
                f'the class folder {folder} has no images ({", ".join(SUFFIXES)}): add some, or '
                'remove it.'
            )
        if not is_text(folder.name):
            raise BadInput(
                f'the class folder {str(folder)!r} has a name that is no UTF-8, so that no report '
                'could name the class: rename it.'
            )
        for path in (folder, *files):
            if not path.resolve().is_relative_to(root):
                raise BadInput(
                    f'{path} is a link to {path.resolve()}, outside of {root}: only what lies in '
                    'the directory is read. Copy it there, or remove the link.'
                )
        classes[folder.name] = files
    if len(classes) < 2:
        raise BadInput(
            f'the number of class folders in {root / split} is {len(classes)}; allowed are 2 or '
            'more. Add a folder of images for each class.'
        )
    return classes


def _decode(
    root: pathlib.Path, classes: list[list[pathlib.Path]], size: int, problems: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of a split; what cannot be used is added to `problems`."""
    count = sum(map(len, classes))
    try:
        images = np.empty((count, size, size, 3), np.uint8)
    except MemoryError as error:
        needed = 3 * count * size**2 / 2**30
        raise BadInput(
            f'{count:,} images of {size}×{size} pixels need {needed:,.1f} GiB of memory, '
            'more than there is: lower dataset.image_size, or give fewer images.'
        ) from error
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(files) for files in classes])
    for i, path in enumerate(path for files in classes for path in files):
        try:
            images[i] = _open(path, size)
        except MemoryError:
            raise
        except Exception as error:  # Of any kind: anything may come of a file from a stranger.
            problems.append(f'{path.relative_to(root)} ({one_line(error)})')
    return images, labels


def _open(path: pathlib.Path, size: int) -> np.ndarray:
    """One image as (size, size, 3) uint8."""
    from PIL import Image, ImageOps

    if not path.is_file():  # A named pipe would be waited for without end.
        raise ValueError('it is no file')
    with warnings.catch_warnings():
        # The limit below is lower, and an error.
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)
        image = Image.open(path, formats=_FORMATS)
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f'{width}×{height} pixels; allowed are {MAX_PIXELS:,}')
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I'):
            # Pillow's own conversion would clip all above 255.
            grey = np.asarray(image)
            if grey.min() < 0 or grey.max() >= 2**16:
                raise ValueError(f'pixels from {grey.min()} to {grey.max()}; allowed are 16 bits')
            image = Image.fromarray(np.rint(grey / 257).astype(np.uint8))
        elif image.mode == 'F':
            raise ValueError('floating-point pixels; allowed are 8 or 16 bits')
        if image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'black'), image)
        image = image.convert('RGB')
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
