"""Where the images come from: CIFAR by TFDS, the embedded digits, a folder, a user's arrays.

A data set is held in memory as uint8 images and int32 labels, already split. Everything here is
NumPy; TensorFlow, TFDS and scikit-learn are imported only by the functions that need them.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from performer_vit import image_folder
from performer_vit.errors import BadInput, choose, one_line

DATASETS = ('cifar10', 'cifar100', 'digits', 'folder')
FALLBACKS = ('digits', 'none')
_SIZE = 32  # Pixels along a side of the images of CIFAR and, enlarged, of the digits.

_DOWNLOADS = {
    'cifar10': 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
    'cifar100': 'https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz',
}
_NUM_CLASSES = {'cifar10': 10, 'cifar100': 100}
# How long the download host may take to answer before it counts as out of reach.
_PROBE_SECONDS = 10.0
# How long a download may bring nothing before it counts as broken off.
_STALL_SECONDS = 20.0
# The digits have no test split of their own, so one is fixed here, once and for every seed.
_DIGITS_TEST_FRACTION = 0.2
_DIGITS_TEST_SEED = 0
# Images per block when CIFAR is decoded: keeps temporaries to a few MB.
_BLOCK = 500
_BLOCK_NUMBERS = 2**21  # Per block when images of any size are summed: 8 MB of int32.
_UNREAD = (None, None)  # The images and labels of a test set that is not read.


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    Attributes:
        images: (n, h, w, c) uint8, 0 to 255.
        labels: (n,) int32, indices into the data set's `class_names`.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: what was really read, e.g. 'digits' where the run fell back to the digits.
        class_names: one name per class.
        train: the training part.
        validation: the held-out part of the training set, or None where all of it is trained on.
        test: the test set, or None where it is kept away.
        mean: (c,) float32, per-channel mean of train/255.
        std: (c,) float32, per-channel standard deviation of train/255.
        flip: whether a mirrored image keeps its label.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split | None
    mean: np.ndarray
    std: np.ndarray
    flip: bool

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of every image."""
        return self.train.images.shape[1:]


class _Unavailable(Exception):
    """A CIFAR data set can be neither read nor downloaded; the text is the reason."""


def _print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: int = _SIZE,
    fallback: str = 'digits',
    validation_fraction: float = 0.2,
    split_seed: int = 0,
    num_folds: int = 5,
    fold: int = -1,
    read_test: bool = True,
    notify: Callable[[str], None] = _print_to_stderr,
) -> Dataset:
    """Reads a data set into memory and splits its training set.

    CIFAR (Krizhevsky, 2009, "Learning multiple layers of features from tiny images") is looked for
    in `data_dir`, else in the directory that the environment variable TFDS_DATA_DIR names, else in
    TFDS's default directory (~/tensorflow_datasets), else it is downloaded into the latter by TFDS.
    Whether the download host answers is decided within about 10 seconds, before TensorFlow is
    imported, also where connections hang instead of failing; a download that brings nothing for 20
    seconds is given up. Where nothing can be had, `fallback`
    decides. A directory that was named (by argument or variable) is never replaced by anything
    else: where it cannot be read, or has no such data set, that is an error. 'folder' reads images
    of any kind from folders, see `image_folder.read`.

    Args:
        name: one of `DATASETS`.
        data_dir: the directory that holds a prepared data set as NAME/VERSION/dataset_info.json.
            None or '' means that none is named. Unused for the digits. Of 'folder': the
            directory that holds train/CLASS/IMAGE and test/CLASS/IMAGE.
        image_size: pixels along a side, to which images of 'folder' are scaled; others have 32.
        fallback: one of `FALLBACKS`. 'digits': `notify` gets a notice and the digits are returned
            (their `name` says so); 'none': raises instead.
        validation_fraction: part of the training set held out, stratified by class, in [0, 1);
            0 means that all of it is trained on and `validation` is None.
        split_seed: the split is a pure function of it.
        num_folds: so many parts of equal size, each stratified by class, if `fold` is one of them.
        fold: from 0 on: this part of the training set is held out, whatever `validation_fraction`
            is; -1: none.
        read_test: whether the test set is read, or left alone and None.
        notify: gets the notice of the fallback, a text of several lines.

    Returns:
        A `Dataset` of images (image_size, image_size, 3).

    Raises:
        BadInput: unknown name or fallback; a named directory without the data set; a truncated or
            corrupt prepared data set; a fraction, seed or fold out of range, more folds than the
            smallest class has images; no data with `fallback` 'none'; an `image_size` that the data
            set has not; what `image_folder.read` raises.
    """
    choose('dataset.name', name, DATASETS)
    choose('dataset.fallback', fallback, FALLBACKS)
    held_out = {
        'validation_fraction': validation_fraction,
        'split_seed': split_seed,
        'num_folds': num_folds,
        'fold': fold,
    }
    _check_split(**held_out)
    if name == 'folder':
        return _folder(data_dir, image_size, read_test, held_out)
    if image_size != _SIZE:
        raise BadInput(
            f'dataset.image_size is {image_size}; images of {name} have {_SIZE}×{_SIZE} pixels: '
            f"set it to {_SIZE}. Only those of 'folder' are scaled."
        )
    if name == 'digits':
        return _digits(read_test, held_out)
    try:
        directory = _prepared_directory(name, data_dir)
        class_names, train, test = _read_prepared(name, directory, read_test)
    except _Unavailable as reason:
        sentence = _missing(name, reason)
        if fallback == 'none' or _named_directory(data_dir):
            raise BadInput(sentence) from None
        notify(_notice(sentence))
        return _digits(read_test, held_out)
    return from_arrays(name, class_names, *train, *test, flip=True, **held_out)


def from_arrays(
    name: str,
    class_names: Sequence[str],
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray | None,
    test_labels: np.ndarray | None,
    *,
    validation_fraction: float = 0.2,
    split_seed: int = 0,
    num_folds: int = 5,
    fold: int = -1,
    flip: bool = False,
) -> Dataset:
    """Makes a `Dataset` of arrays in memory, after checking them.

    Args:
        name: the name that results will carry.
        class_names: one name per class; label i means `class_names[i]`.
        train_images: (n, h, w, c) uint8.
        train_labels: (n,) integers from 0 to len(class_names) - 1.
        test_images: (m, h, w, c) uint8; None where there is no test set.
        test_labels: (m,) integers, as `train_labels`.
        validation_fraction, split_seed, num_folds, fold: see `load`.
        flip: whether a mirrored image keeps its label.

    Returns:
        A `Dataset`. Its mean and std come from the training part alone. A std below 1/255, one
        grey level, is raised to 1/255, so that a constant channel becomes 0 and not NaN.

    Raises:
        BadInput: NaN or infinite values, images that are not uint8 or not (n, h, w, c), no images,
            labels out of range or of another length, train and test images of different shape, a
            class with too few images to split, a fraction, seed or fold out of range.
    """
    class_names = tuple(class_names)
    _check_split(validation_fraction, split_seed, num_folds, fold)
    full = _check('train', train_images, train_labels, len(class_names))
    test = None
    if test_images is not None:
        test = _check('test', test_images, test_labels, len(class_names))
    if test is not None and full.images.shape[1:] != test.images.shape[1:]:
        raise BadInput(
            f'The train images have the shape {full.images.shape[1:]} and the test images '
            f'{test.images.shape[1:]}; both must be the same (h, w, c). Resize one of them.'
        )
    if fold >= 0:
        train, validation = _hold_out_fold(full, class_names, num_folds, fold, split_seed)
    else:
        train, validation = _split(full, class_names, validation_fraction, split_seed)
    mean, std = _statistics(train.images)
    return Dataset(name, class_names, train, validation, test, mean, std, flip)


def fingerprints(dataset: Dataset) -> dict[str, object]:
    """What tells a data set from another one, by name: for JSON, and the same in any process."""
    splits = {'training': dataset.train, 'validation': dataset.validation, 'test': dataset.test}
    prints = {'name': dataset.name, 'class names': list(dataset.class_names)}
    for name, split in splits.items():
        if split is not None:
            prints[f'{name} images'] = fingerprint(split)
    return prints


def fingerprint(split: Split) -> str:
    """The number and the digest of a split's images and labels."""
    digest = hashlib.blake2b(np.ascontiguousarray(split.images), digest_size=8)
    digest.update(np.ascontiguousarray(split.labels))
    return f'{len(split)}, of digest {digest.hexdigest()}'


def _check_split(validation_fraction: float, split_seed: int, num_folds: int, fold: int) -> None:
    if not 0 <= validation_fraction < 1:
        raise BadInput(
            f'dataset.validation_fraction is {validation_fraction!r}; allowed are numbers from 0 '
            '(train on the whole training set) to below 1. Choose one, such as 0.2.'
        )
    if not 0 <= split_seed < 2**32:
        raise BadInput(
            f'The seed of the split is {split_seed!r}; allowed are integers from 0 to 2**32 - 1. '
            'Choose one of these.'
        )
    if num_folds < 2:
        raise BadInput(
            f'dataset.num_folds is {num_folds}; one fold is held out and the others are trained '
            'on, so set it to 2 or more.'
        )
    if not -1 <= fold < num_folds:
        raise BadInput(
            f'dataset.fold is {fold}; allowed are 0 to {num_folds - 1}, since dataset.num_folds is '
            f'{num_folds}, and -1 for none.'
        )


def _check(what: str, images: np.ndarray, labels: np.ndarray, num_classes: int) -> Split:
    """Returns the arrays as a `Split`, or raises `BadInput`; `what` names the split."""
    images, labels = np.asarray(images), np.asarray(labels)
    for field, values in (('images', images), ('labels', labels)):
        if np.issubdtype(values.dtype, np.inexact) and not np.all(finite := np.isfinite(values)):
            index = tuple(int(i) for i in np.unravel_index(np.argmin(finite), values.shape))
            raise BadInput(
                f'The {what} {field} contain {values[index]}, first at index {index}; only finite '
                'values are allowed. Repair or remove that example.'
            )
    if images.dtype != np.uint8:
        raise BadInput(
            f'The {what} images are {images.dtype}; allowed is uint8, 0 to 255. Scale and convert '
            'them first.'
        )
    if images.ndim != 4 or 0 in images.shape:
        raise BadInput(
            f'The {what} images have the shape {images.shape}; allowed is (n, h, w, c) with no '
            'empty axis. Give at least one image, with an axis of channels.'
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise BadInput(
            f'The {what} labels are {labels.dtype} of shape {labels.shape}; allowed are integers '
            f'of shape {images.shape[:1]}, one per image. Give one class index per image.'
        )
    wrong = (labels < 0) | (labels >= num_classes)
    if np.any(wrong):
        index = int(np.argmax(wrong))
        raise BadInput(
            f'The {what} label at index {index} is {int(labels[index])}; allowed are 0 to '
            f'{num_classes - 1}, for {num_classes} class names. Repair the labels or the names.'
        )
    return Split(images, labels.astype(np.int32))


def _split(
    full: Split, class_names: Sequence[str], fraction: float, seed: int
) -> tuple[Split, Split | None]:
    """Holds out `fraction` of `full`, stratified by class: a pure function of (labels, seed)."""
    if fraction == 0:
        return full, None
    from sklearn.model_selection import train_test_split

    try:
        kept, held_out = train_test_split(
            np.arange(len(full)), test_size=fraction, random_state=seed, stratify=full.labels
        )
    except ValueError as error:
        raise BadInput(_too_few(full, fraction, str(error))) from None
    # Sorted, the split is a set of images: their order in training is the batch order's business.
    parts = [_part(full, indices) for indices in map(np.sort, (kept, held_out))]
    classes = np.unique(full.labels)
    for part in parts:
        missing = np.setdiff1d(classes, part.labels)
        if len(missing):
            name = class_names[missing[0]]
            raise BadInput(_too_few(full, fraction, f'class {name!r} is in one part only'))
    return parts[0], parts[1]


def _part(full: Split, indices: np.ndarray) -> Split:
    return Split(full.images[indices], full.labels[indices])


def _hold_out_fold(
    full: Split, class_names: Sequence[str], num_folds: int, fold: int, seed: int
) -> tuple[Split, Split]:
    """All folds but one, and that one: stratified, a pure function of (labels, folds, seed)."""
    from sklearn.model_selection import StratifiedKFold

    classes, counts = np.unique(full.labels, return_counts=True)
    least = int(counts.min())
    if least < num_folds:
        numbers = '2' if least == 2 else f'a number from 2 to {least}'
        allowed = f'set dataset.num_folds to {numbers}, or ' * (least > 1)
        raise BadInput(
            f'dataset.num_folds is {num_folds}, but each fold needs an image of each class, and '
            f'class {class_names[classes[counts.argmin()]]!r} has {least} for training: '
            f'{allowed}give more images.'
        )
    splitter = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    folds = list(splitter.split(np.zeros(len(full)), full.labels))
    kept, held_out = folds[fold]
    return _part(full, kept), _part(full, held_out)


def _too_few(full: Split, fraction: float, reason: str) -> str:
    smallest = np.unique(full.labels, return_counts=True)[1].min()
    return (
        f'{len(full)} training images, {smallest} in the smallest class, cannot be split by class '
        f'with dataset.validation_fraction {fraction} of them held out: {reason.rstrip(".")}. Each '
        'class must be in both parts. Give more images, or choose another fraction; 0 where '
        'nothing needs a validation split.'
    )


def _statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel of images/255, both (c,) float32."""
    # Integer sums are exact, and blocks spare the float copy of the whole training set. Images are
    # added up first, pixels last: long contiguous rows are several times as fast as rows of c.
    total = np.zeros(images.shape[1:], np.int64)
    squares = np.zeros(images.shape[1:], np.int64)
    block = max(1, _BLOCK_NUMBERS // total.size)
    for start in range(0, len(images), block):
        pixels = images[start : start + block].astype(np.int32)
        total += pixels.sum(axis=0)
        squares += (pixels * pixels).sum(axis=0)
    total, squares = total.sum(axis=(0, 1)), squares.sum(axis=(0, 1))
    count = images.size // images.shape[-1]
    mean = total / count
    # The difference of two numbers below 2**16 in float64: off by 1e-11 at most.
    std = np.sqrt(np.maximum(squares / count - mean * mean, 0))
    return (mean / 255).astype(np.float32), (np.maximum(std, 1) / 255).astype(np.float32)


def _folder(
    data_dir: str | os.PathLike | None, image_size: int, read_test: bool, held_out: dict
) -> Dataset:
    if not data_dir:
        raise BadInput(
            "dataset.name is 'folder', and dataset.data_dir is empty: set it to the directory that "
            'holds train/CLASS/IMAGE and test/CLASS/IMAGE.'
        )
    try:
        class_names, train, test = image_folder.read(
            _expanded(data_dir), image_size, read_test=read_test
        )
    except (OSError, RuntimeError) as error:  # The latter of links in a circle.
        raise BadInput(
            f'dataset.data_dir is {data_dir}, in which not all can be read ({one_line(error)}): '
            'repair it, change its permissions, or name another directory.'
        ) from error
    return from_arrays('folder', class_names, *train, *(test or _UNREAD), flip=True, **held_out)


def _digits(read_test: bool, held_out: dict) -> Dataset:
    """The 1,797 handwritten 8×8 digits embedded in scikit-learn, as 32×32×3.

    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998.
    A fixed, stratified fifth of them is the test set, whatever `held_out` is: what `from_arrays`
    holds out of the others for validation.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(_resize(digits.images * (255 / 16), _SIZE)).astype(np.uint8)
    full = Split(np.repeat(grey[..., None], 3, axis=-1), digits.target.astype(np.int32))
    class_names = [str(digit) for digit in range(10)]
    train, test = _split(full, class_names, _DIGITS_TEST_FRACTION, _DIGITS_TEST_SEED)
    return from_arrays(
        'digits',
        class_names,
        train.images,
        train.labels,
        *((test.images, test.labels) if read_test else _UNREAD),
        flip=False,
        **held_out,
    )


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    """Bilinear enlargement of (n, s, s) float images to (n, size, size).

    Pixel centres lie at half-integers; beyond the outermost centres the edge value goes on.
    """
    old = images.shape[1]
    centre = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
    weights = np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(old)))
    return np.einsum('yi,nij,xj->nyx', weights, images, weights, optimize=True)


def _named_directory(data_dir: str | os.PathLike | None) -> pathlib.Path | None:
    named = data_dir or os.environ.get('TFDS_DATA_DIR')
    return _expanded(named) if named else None


def _expanded(directory: str | os.PathLike) -> pathlib.Path:
    try:
        return pathlib.Path(directory).expanduser()
    except RuntimeError as error:
        raise BadInput(
            f'{directory} begins with a home directory that there is not ({one_line(error)}): give '
            'the whole path.'
        ) from error


def _default_directory() -> pathlib.Path:
    try:
        return pathlib.Path.home() / 'tensorflow_datasets'
    except RuntimeError as error:  # Of a user without a home.
        raise _Unavailable(one_line(error)) from error


def _prepared_directory(name: str, data_dir: str | os.PathLike | None) -> pathlib.Path:
    """The directory of the newest prepared version of `name`, downloaded where it must be.

    Raises `BadInput` for a named directory without the data set, else `_Unavailable`.
    """
    named = _named_directory(data_dir)
    root = named or _default_directory()
    source = 'dataset.data_dir' if data_dir else 'the environment variable TFDS_DATA_DIR'
    try:
        found = _newest_version(root / name)
    except OSError as error:
        raise BadInput(
            f'{root}{f", named by {source}," * bool(named)} cannot be read ({one_line(error)}): '
            'change its permissions, or name another directory by dataset.data_dir.'
        ) from error
    if found:
        return found
    if named:
        state = 'is not a directory' if not root.is_dir() else f'has no {name} prepared by TFDS'
        raise BadInput(
            f'{root}, named by {source}, {state}: no {root / name}/VERSION/dataset_info.json was '
            f'found. Name the directory that holds {name}/, or leave both dataset.data_dir and '
            f'TFDS_DATA_DIR empty to look in {_default_directory()} and else download.'
        )
    _download(name, root)
    if found := _newest_version(root / name):
        return found
    raise _Unavailable(f'the download ended without a prepared data set in {root / name}')


def _newest_version(directory: pathlib.Path) -> pathlib.Path | None:
    """The subdirectory of `directory` with the highest version number that TFDS prepared."""
    versions = {}
    for info in directory.glob('*/dataset_info.json'):
        numbers = info.parent.name.split('.')
        # TFDS prepares in a directory called incomplete.…, which is no version.
        if all(number.isdecimal() for number in numbers):
            versions[tuple(map(int, numbers))] = info.parent
    return versions[max(versions)] if versions else None


def _download(name: str, root: pathlib.Path) -> None:
    """Lets TFDS download and prepare `name` in `root`; raises `_Unavailable` where it cannot."""
    if importlib.util.find_spec('tensorflow_datasets') is None:
        raise _Unavailable(f'there is none in {root}, and tensorflow_datasets is not installed')
    problem = _probe(_DOWNLOADS[name], _PROBE_SECONDS)
    if problem:
        raise _Unavailable(f'there is none in {root}, and {_DOWNLOADS[name]} {problem}')
    tfds = _import_tfds()
    # CIFAR comes from its own host; TFDS's bucket would be one more connection that may hang.
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    errors = []

    def prepare():
        try:
            builder.download_and_prepare(download_config=config)
        except Exception as error:  # Network, disk, checksum, TFDS: for the user all the same.
            errors.append(error)

    try:
        builder = tfds.builder(name, data_dir=str(root))
        archive_size = sum(int(info.size) for info in builder.url_infos.values())
        # In a thread that can be left behind: TFDS waits for a silent server without end.
        thread = threading.Thread(target=prepare, daemon=True)
        thread.start()
        if not _goes_on(thread, root / 'downloads', archive_size, _STALL_SECONDS):
            errors.append(TimeoutError(f'nothing arrived for {_STALL_SECONDS:g} seconds'))
    except Exception as error:
        errors.append(error)
    if errors:
        reason = f'there is none in {root}, and its download failed ({one_line(errors[0])})'
        raise _Unavailable(reason) from errors[0]


def _goes_on(
    thread: threading.Thread, downloads: pathlib.Path, archive_size: int, seconds: float
) -> bool:
    """Waits for a thread that downloads; False if the archive is not all there and stops growing.

    Once `archive_size` bytes lie in `downloads` there is no limit: unpacking takes what it takes.
    """
    size, since = -1, time.monotonic()
    while thread.is_alive():
        thread.join(min(1.0, seconds / 4))
        # A file may be renamed or removed while it is looked at.
        with contextlib.suppress(OSError):
            arrived = sum(path.stat().st_size for path in downloads.rglob('*') if path.is_file())
            if arrived != size:
                size, since = arrived, time.monotonic()
        if size < archive_size and time.monotonic() - since > seconds:
            return False
    return True


def _probe(url: str, seconds: float) -> str | None:
    """None if a gzip file begins to arrive from `url` within `seconds`, else what is wrong.

    The attempt runs in a thread that is left behind: neither a hanging look-up of the host's name
    nor a server that sends a byte now and then can be bounded by a socket's timeout.
    """
    outcome = []

    def attempt():
        try:
            # What TFDS downloads with, so that proxies and certificates are treated alike.
            import requests

            with requests.get(url, stream=True, timeout=seconds) as response:
                response.raise_for_status()
                # The first two bytes of gzip; a proxy's page of explanation begins otherwise.
                genuine = response.raw.read(2) == b'\x1f\x8b'
            outcome.append(None if genuine else 'sends something else than the data set')
        except Exception as error:  # Reported below, not lost in a thread.
            # The innermost error says it shortest: 'Name or service not known'.
            while error.__context__ is not None:
                error = error.__context__
            outcome.append(f'cannot be reached ({one_line(error)})')

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f'did not answer within {seconds:g} seconds'


def _import_tfds():
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except Exception as error:  # Besides ImportError: versions of protobuf that do not fit.
        raise _Unavailable(
            'tensorflow and tensorflow_datasets, which read it, cannot be imported '
            f'({one_line(error)}); install them'
        ) from error
    try:
        # TensorFlow only decodes files here; by default it would take all the GPU's memory.
        tf.config.set_visible_devices([], 'GPU')
    except RuntimeError:
        pass  # The user's program started TensorFlow before, and decided this itself.
    return tfds


def _read_prepared(name: str, directory: pathlib.Path, read_test: bool):
    """(class names, (train images, labels), (test images, labels)) of a prepared directory."""
    tfds = _import_tfds()
    try:
        # Without its file of names, TFDS would call the classes '0', '1', … and say nothing.
        for file in ('features.json', 'label.labels.txt'):
            if not (directory / file).is_file():
                raise ValueError(f'{file} is missing')
        builder = tfds.builder_from_directory(str(directory))
        class_names = tuple(builder.info.features['label'].names)
        if len(class_names) != _NUM_CLASSES[name]:
            raise ValueError(f'{len(class_names)} class names for {_NUM_CLASSES[name]} classes')
        shape = builder.info.features['image'].shape
        if shape != (_SIZE, _SIZE, 3):
            raise ValueError(f'images of the shape {shape}, where {name} has ({_SIZE}, {_SIZE}, 3)')
        train = _read_split(tfds, builder, 'train')
        test = _read_split(tfds, builder, 'test') if read_test else _UNREAD
    except MemoryError:
        raise
    except Exception as error:  # Whatever goes wrong while reading is the directory's fault.
        raise BadInput(
            f'The prepared data set in {directory} cannot be used as {name}; it may be truncated '
            f'or corrupt: {one_line(error).rstrip(".")}. Restore it from a copy, or prepare {name} '
            'with TFDS in another directory and name that by dataset.data_dir.'
        ) from error
    return class_names, train, test


def _read_split(tfds, builder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a split, in the order of its files."""
    info = builder.info
    files = ', '.join(sorted(info.splits[split].filenames))
    count = info.splits[split].num_examples
    # Filled block by block: batches joined at the end would need twice the memory.
    images = np.empty((count, *info.features['image'].shape), np.uint8)
    labels = np.empty(count, np.int32)
    done = 0
    examples = builder.as_dataset(
        split=split,
        shuffle_files=False,
        decoders=tfds.decode.PartialDecoding({'image': True, 'label': True}),
        # One file after the other: by default TFDS takes 16 examples of each in turn. The count is
        # checked below, in plainer words.
        read_config=tfds.ReadConfig(
            try_autocache=False, interleave_cycle_length=1, assert_cardinality=False
        ),
    )
    try:
        for block in examples.batch(_BLOCK).as_numpy_iterator():
            stop = done + len(block['label'])
            images[done:stop] = block['image']
            labels[done:stop] = block['label']
            done = stop
    except Exception as error:
        raise ValueError(f'{files}: {one_line(error)}') from error
    if done != count:
        raise ValueError(f'{files}: {done} examples, where dataset_info.json says {count}')
    return images, labels


def _missing(name: str, reason: object) -> str:
    return (
        f'The data set {name} cannot be had: {reason}. To use a copy that TFDS prepared, name the '
        f'directory that holds {name}/: --config.dataset.data_dir=DIR, or TFDS_DATA_DIR=DIR in the '
        'environment.'
    )


def _notice(sentence: str) -> str:
    paragraphs = (
        sentence,
        'THIS RUN GOES ON WITH OTHER DATA: the 1,797 handwritten digits embedded in scikit-learn. '
        "Its results are labelled 'digits' and say nothing about the data set that is missing.",
        'To stop here instead, give --config.dataset.fallback=none.',
    )
    line = '=' * 100
    # Paths and URLs stay whole, so that they can be copied.
    filled = [
        textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
        for text in paragraphs
    ]
    body = '\n\n'.join(['NOTICE: DATA SET MISSING', *filled])
    return f'\n{line}\n{body}\n{line}\n'
