"""A folder of images from a stranger: read right, or refused by the file's name."""

import io
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from performer_vit import crossval, datasets, evaluate, image_folder, inspection, train, workdir
from performer_vit.errors import BadInput
from tests.conftest import make_tiny_config

PIXELS = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (2, 32, 32, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes, eight images of each to train on and two to test on, all noise of its own."""
    random = np.random.Generator(np.random.PCG64(1))
    for split, count in (('train', 8), ('test', 2)):
        for name in ('cat', 'dog'):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f'{i}.png')
    return tmp_path


def only(folder, image, suffix='.png', **options) -> np.ndarray:
    """What is read of an image that takes the place of the first cat."""
    path = folder / 'train' / 'cat' / f'0{suffix}'
    (folder / 'train' / 'cat' / '0.png').unlink()
    image.save(path, **options)
    return image_folder.read(folder, 32)[1][0][0]


def test_order_labels_and_pixels(folder):
    """Catches classes that are swapped between splits, and an order that hangs on the system."""
    names, (images, labels), (test_images, test_labels) = image_folder.read(folder, 32)
    assert names == ('cat', 'dog')
    assert labels.tolist() == [0] * 8 + [1] * 8 and test_labels.tolist() == [0, 0, 1, 1]
    for array, split, count in ((images, 'train', 8), (test_images, 'test', 2)):
        expected = [
            np.asarray(Image.open(folder / split / name / f'{i}.png'))
            for name in names
            for i in range(count)
        ]
        np.testing.assert_array_equal(array, expected)


def test_what_chooses_among_models_needs_no_test_split(folder):
    """Catches a fold, a trial or an ablation that reads the images it must not be judged by."""
    config = make_tiny_config()
    config.dataset.update(name='folder', data_dir=str(folder), image_size=32)
    expected = datasets.load(**config.dataset)
    shutil.rmtree(folder / 'test')
    dataset = crossval.load_fold(config)
    assert dataset.test is None and expected.test is not None
    np.testing.assert_array_equal(dataset.train.images, expected.train.images)
    np.testing.assert_array_equal(dataset.validation.labels, expected.validation.labels)
    with pytest.raises(BadInput, match='test is not a directory'):
        datasets.load(**config.dataset)


def test_what_is_no_image_is_passed_over(folder):
    (folder / 'train' / '.cache').mkdir()
    (folder / 'train' / 'list.txt').write_text('0.png')
    (folder / 'train' / 'cat' / 'Thumbs.db').write_bytes(b'')
    (folder / 'train' / 'cat' / '._0.png').write_bytes(b'')
    assert len(image_folder.read(folder, 32)[1][0]) == 16


def test_grey(folder):
    grey = PIXELS[0, ..., 0]
    read = only(folder, Image.fromarray(grey))
    np.testing.assert_array_equal(read, np.repeat(grey[..., None], 3, -1))


def test_palette(folder):
    image = Image.fromarray(PIXELS[0] // 128 * 255).convert('P', palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(only(folder, image, '.gif'), PIXELS[0] // 128 * 255)


def test_cmyk(folder):
    """Pure cyan is no red, all green and all blue."""
    image = Image.new('CMYK', (32, 32), (255, 0, 0, 0))
    np.testing.assert_array_equal(only(folder, image, '.tif')[5, 5], (0, 255, 255))


def test_sixteen_bits_are_scaled(folder):
    """Catches Pillow's conversion, which makes everything above 255 white."""
    grey = PIXELS[0, ..., 0]
    read = only(folder, Image.fromarray(grey.astype(np.uint16) * 257))
    np.testing.assert_array_equal(read, np.repeat(grey[..., None], 3, -1))


def test_transparency_lies_over_black(folder):
    """Catches the arbitrary colours of what cannot be seen."""
    alpha = np.where(PIXELS[1, ..., :1] < 128, 0, 255).astype(np.uint8)
    read = only(folder, Image.fromarray(np.concatenate([PIXELS[0], alpha], -1)))
    np.testing.assert_array_equal(read, np.where(alpha > 0, PIXELS[0], 0))


def test_images_stand_upright(folder):
    """EXIF's orientation 6: the camera was turned."""
    exif = Image.Exif()
    exif[274] = 6
    read = only(folder, Image.fromarray(PIXELS[0]), exif=exif)
    np.testing.assert_array_equal(read, np.rot90(PIXELS[0], -1))


def test_scaled_by_the_shorter_side_and_cut_in_the_middle(folder):
    """A wide image of three colours: its middle third alone is left."""
    wide = np.repeat(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8), 64, 0)
    read = only(folder, Image.fromarray(np.broadcast_to(wide, (64, 192, 3))))
    np.testing.assert_array_equal(read[:, 1:-1], np.broadcast_to([0, 255, 0], (32, 30, 3)))
    image = Image.fromarray(PIXELS[0]).resize((48, 48))
    (folder / 'train' / 'dog' / '0.png').unlink()
    image.save(folder / 'train' / 'dog' / '0.png')
    expected = np.asarray(ImageOps.fit(image, (32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(image_folder.read(folder, 32)[1][0][8], expected)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:200])


def bomb(path, side=20_000):
    """A PNG of 20,000×20,000 pixels by its header: 1.2 GB of memory from a hundred bytes."""

    def chunk(kind, data):
        checksum = struct.pack('>I', zlib.crc32(kind + data))
        return struct.pack('>I', len(data)) + kind + data + checksum

    header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    content = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + content)


def small_bomb(path):
    """One that Pillow lets through: 192 MB."""
    bomb(path, 8_000)


def floats(path):
    content = io.BytesIO()
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(content, 'TIFF')
    path.write_bytes(content.getvalue())


def postscript(path):
    """A program, which Pillow would have Ghostscript run."""
    path.write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n')


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def unreadable(path):
    """A directory, which not even root can read as a file."""
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    'spoil, says',
    [
        (cut_short, 'truncated'),
        (postscript, 'cannot identify'),
        (bomb, 'exceeds limit of 178956970 pixels'),
        (small_bomb, '8000×8000 pixels; allowed are 50,000,000'),
        (floats, 'floating-point pixels'),
        (pipe, 'it is no file'),
        (unreadable, 'it is no file'),
        (lambda path: path.write_bytes(b''), 'cannot identify'),
        (lambda path: path.write_text('<html>not found</html>'), 'cannot identify'),
        (lambda path: path.write_bytes(os.urandom(5000)), 'cannot identify'),
    ],
)
def test_a_file_that_is_no_image_is_named(folder, spoil, says):
    """Catches tracebacks, waiting without end, and images that are left out in silence."""
    spoil(folder / 'train' / 'dog' / '3.png')
    with pytest.raises(
        BadInput, match=rf'1 of the images in .*train/dog/3.png \(.*{says}'
    ) as caught:
        image_folder.read(folder, 32)
    assert 'Repair or remove' in str(caught.value)


def test_many_bad_files_are_counted_and_some_named(folder):
    for path in folder.glob('*/*/*.png'):
        path.write_bytes(b'')
    with pytest.raises(BadInput, match='20 of the images in .* …. Repair') as caught:
        image_folder.read(folder, 32)
    assert len(str(caught.value)) < 1500


def empty_class(folder):
    (folder / 'train' / 'owl').mkdir()


def class_for_training_only(folder):
    (folder / 'train' / 'owl').mkdir()
    (folder / 'train' / 'cat' / '0.png').rename(folder / 'train' / 'owl' / '0.png')


def no_test(folder):
    (folder / 'test').rename(folder / 'Test')


def one_class(folder):
    for split in ('train', 'test'):
        (folder / split / 'cat').rename(folder / f'{split}-cat')


def no_text(folder):
    """As an archive from Latin-1 has it."""
    (folder / 'train' / 'cat').rename(folder / 'train' / os.fsdecode(b'caf\xe9'))


def link(folder):
    (folder / 'train' / 'cat' / '9.png').symlink_to('/etc/hostname')


def link_to_a_folder(folder):
    outside = folder.with_name('outside')
    outside.mkdir()
    Image.fromarray(PIXELS[0]).save(outside / '0.png')
    (folder / 'train' / 'owl').symlink_to(outside)


@pytest.mark.parametrize(
    'spoil, says',
    [
        (empty_class, 'train/owl has no images .*: add some, or remove it'),
        (class_for_training_only, r"has 1 of its classes in one of train and test only, \['owl'\]"),
        (no_test, 'test is not a directory; .*DIR/test/CLASS/IMAGE'),
        (one_class, 'class folders in .*/train is 1; allowed are 2 or more'),
        (no_text, r"class folder '.*/train/caf\\udce9' has a name that is no UTF-8, .*: rename it"),
        (link, '9.png is a link to /etc/hostname, outside of'),
        (link_to_a_folder, 'train/owl is a link to .*outside, outside of'),
    ],
)
def test_folders_that_are_no_data_set_are_refused(folder, spoil, says):
    spoil(folder)
    with pytest.raises(BadInput, match=says):
        image_folder.read(folder, 32)


def test_links_within_the_folder_are_read(folder):
    (folder / 'train' / 'cat' / '9.png').symlink_to(folder / 'train' / 'cat' / '0.png')
    images = image_folder.read(folder, 32)[1][0]
    np.testing.assert_array_equal(images[8], images[0])


def test_load_checks_what_belongs_to_folders():
    with pytest.raises(BadInput, match="'folder', and dataset.data_dir is empty"):
        datasets.load('folder')
    with pytest.raises(BadInput, match='image_size is 64; images of digits have 32×32'):
        datasets.load('digits', image_size=64)
    with pytest.raises(BadInput, match='/nowhere/train is not a directory'):
        datasets.load('folder', data_dir='/nowhere')


def test_what_the_system_refuses_is_named(folder, monkeypatch):
    """Catches tracebacks for links in a circle, and for more images than memory holds."""
    (folder / 'circle').symlink_to(folder / 'circle')
    with pytest.raises(BadInput, match='circle.* (in which not all can be read|is not a dir)'):
        datasets.load('folder', data_dir=str(folder / 'circle'))

    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr(image_folder.np, 'empty', refuse)
    with pytest.raises(BadInput, match=r'16 images of 4096×4096 pixels need 0.8 GiB of memory'):
        image_folder.read(folder, 4096)


def test_a_folder_trains(folder, tmp_path_factory, capsys):
    """By the same command as any other data set, and with images of another size.

    Catches results that are shown as those of images that the run has not seen.
    """
    config = make_tiny_config()
    config.dataset.update(name='folder', data_dir=str(folder), image_size=16)
    config.dataset.validation_fraction = 0.25
    config.batch_size = 8
    config.num_epochs = 1
    config.optimizer.warmup_epochs = 0.0
    directory = tmp_path_factory.mktemp('run')
    results = train.train(config, directory)
    assert results['dataset'] == 'folder' and results['num_tokens'] == 4
    assert results['history'][0]['step'] == 1 and 0 <= results['test_accuracy'] <= 1
    data = datasets.fingerprints(datasets.load(**config.dataset))
    assert evaluate.evaluate_run(directory)['evaluation_images'] == data['test images']
    assert 'other data' not in capsys.readouterr().out
    paths = [folder / split / 'cat' / '0.png' for split in ('train', 'test')]
    originals = {path: path.read_bytes() for path in paths}
    for path in paths:
        Image.fromarray(PIXELS[0]).save(path)
    with pytest.raises(BadInput, match=r'of other data:\n  data_read\.(test|training) images: '):
        train.train(config, directory)
    evaluate.evaluate_run(directory)
    assert 'These are other data than those of the training:' in capsys.readouterr().out
    # With the images of the training back in their place, the results are not theirs.
    for path, original in originals.items():
        path.write_bytes(original)
    for use in (lambda: train.train(config, directory), lambda: inspection.inspect_run(directory)):
        with pytest.raises(BadInput, match='tested again, .* are other images .*--mode=evaluate'):
            use()
    evaluate.evaluate_run(directory)
    assert train.train(config, directory)['evaluation_images'] == data['test images']
    # An earlier version noted no images.
    path = directory / 'config.json'
    kept = path.read_text()
    values = workdir.read_json(path)
    del values['data_read']
    workdir.write_json(path, values)
    capsys.readouterr()
    evaluate.evaluate_run(directory)
    assert 'Whether these were the data of the training is not on record' in capsys.readouterr().out
    path.write_text(kept)
    # Tested again once the images are gone, the run says where it looks for them.
    (folder / 'train').rename(folder / 'moved')
    with pytest.raises(BadInput, match=f'{folder}/train is not a directory'):
        datasets.load(**workdir.read_config(directory).dataset)
