"""Data sets: found, read, checked, split; refused or replaced where they cannot be had."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import PIL.Image
import pytest

from performer_vit import datasets
from performer_vit.errors import BadInput

_ROOT = pathlib.Path(__file__).resolve().parents[1]
# Read once, at import: the tests themselves run without it.
_REAL = os.environ.get('TFDS_DATA_DIR', '')
_GZIP = b'\x1f\x8b\x08\x00' + bytes(60)

# ------------------------------------------------------------------ a small prepared CIFAR-10

_FEATURES = {
    'id': {
        'pythonClassName': 'tensorflow_datasets.core.features.text_feature.Text',
        'text': {},
    },
    'image': {
        'pythonClassName': 'tensorflow_datasets.core.features.image_feature.Image',
        'image': {'dtype': 'uint8', 'shape': {'dimensions': ['32', '32', '3']}},
    },
    'label': {
        'pythonClassName': 'tensorflow_datasets.core.features.class_label_feature.ClassLabel',
        'classLabel': {'numClasses': '10'},
    },
}
_SHARDS = {'train': [30, 30], 'test': [20]}


def _arrays(split):
    """The images and labels that the small data set has, in order."""
    rng = np.random.default_rng(len(split))
    count = sum(_SHARDS[split])
    return rng.integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % 10


def _shard_name(split, shard):
    return f'cifar10-{split}.tfrecord-{shard:05d}-of-{len(_SHARDS[split]):05d}'


@pytest.fixture(scope='session')
def prepared_once(tmp_path_factory):
    """A directory with a CIFAR-10 of 80 images of noise, in TFDS's format."""
    import tensorflow as tf

    root = tmp_path_factory.mktemp('tfds')
    directory = root / 'cifar10' / '3.0.2'
    directory.mkdir(parents=True)
    infos = []
    for split, lengths in _SHARDS.items():
        images, labels = _arrays(split)
        index = 0
        for shard, length in enumerate(lengths):
            with tf.io.TFRecordWriter(str(directory / _shard_name(split, shard))) as writer:
                for _ in range(length):
                    image = tf.io.encode_png(images[index]).numpy()
                    feature = {
                        'id': tf.train.Feature(bytes_list=tf.train.BytesList(value=[b'x'])),
                        'image': tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
                        'label': tf.train.Feature(
                            int64_list=tf.train.Int64List(value=[labels[index]])
                        ),
                    }
                    example = tf.train.Example(features=tf.train.Features(feature=feature))
                    writer.write(example.SerializeToString())
                    index += 1
        infos.append(
            {
                'name': split,
                'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
                'numBytes': '1',
                'shardLengths': [str(length) for length in lengths],
            }
        )
    features = {
        'pythonClassName': 'tensorflow_datasets.core.features.features_dict.FeaturesDict',
        'featuresDict': {'features': _FEATURES},
    }
    info = {'name': 'cifar10', 'version': '3.0.2', 'fileFormat': 'tfrecord', 'splits': infos}
    (directory / 'features.json').write_text(json.dumps(features))
    (directory / 'dataset_info.json').write_text(json.dumps(info))
    (directory / 'label.labels.txt').write_text('\n'.join(f'name{i}' for i in range(10)) + '\n')
    return root


@pytest.fixture
def prepared(prepared_once, tmp_path):
    """A copy that a test may break."""
    return pathlib.Path(shutil.copytree(prepared_once, tmp_path / 'data'))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home directory and no network, so that no test finds or fetches a data set."""
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('TFDS_DATA_DIR', raising=False)
    monkeypatch.setattr(
        datasets, '_DOWNLOADS', dict.fromkeys(datasets._DOWNLOADS, 'http://127.0.0.1:9/none')
    )
    return tmp_path / 'home'


@pytest.fixture
def offline(monkeypatch):
    """The download host does not answer; TensorFlow must not be needed to find that out."""
    monkeypatch.setattr(datasets, '_probe', lambda url, seconds: 'did not answer within 0 seconds')
    monkeypatch.setattr(datasets, '_import_tfds', lambda: pytest.fail('imported TensorFlow'))


def _one_line(text):
    return ' '.join(text.split())


# ------------------------------------------------------------------ reading


def test_prepared_directory_is_read_in_order_and_whole(prepared_once):
    """Would catch shuffled shards, images beside the wrong labels, a lost last batch."""
    read = datasets.load('cifar10', data_dir=prepared_once, validation_fraction=0)
    assert (read.name, read.flip, read.validation) == ('cifar10', True, None)
    assert read.class_names == tuple(f'name{i}' for i in range(10))
    assert (read.num_classes, read.image_shape) == (10, (32, 32, 3))
    for split in ('train', 'test'):
        images, labels = _arrays(split)
        part = getattr(read, split)
        assert (part.images.dtype, part.labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(part.images, images)
        np.testing.assert_array_equal(part.labels, labels)
        assert len(part) == len(labels)


def test_where_a_prepared_directory_is_looked_for(prepared_once, home, monkeypatch):
    """Would catch a variable that beats the argument, and a default directory that is missed."""
    (home / 'tensorflow_datasets').parent.mkdir()
    (home / 'tensorflow_datasets').symlink_to(prepared_once)
    found = prepared_once / 'cifar10' / '3.0.2'
    assert datasets._prepared_directory('cifar10', None).samefile(found)
    assert datasets._prepared_directory('cifar10', '').samefile(found)
    assert datasets._prepared_directory('cifar10', '~/tensorflow_datasets').samefile(found)
    monkeypatch.setenv('TFDS_DATA_DIR', str(home))
    assert datasets._prepared_directory('cifar10', prepared_once).samefile(found)
    with pytest.raises(BadInput, match='TFDS_DATA_DIR'):
        datasets._prepared_directory('cifar10', None)


def test_newest_version_wins_and_unfinished_ones_do_not_count(tmp_path):
    """Would catch an order by text, where 3.0.10 is older than 3.0.9."""
    for version in ('3.0.9', '3.0.10', 'incomplete.9.0.0', '4.0.0'):
        (tmp_path / version).mkdir()
        if version != '4.0.0':
            (tmp_path / version / 'dataset_info.json').touch()
    assert datasets._newest_version(tmp_path) == tmp_path / '3.0.10'
    assert datasets._newest_version(tmp_path / 'none') is None


def _cut_short(directory):
    path = directory / _shard_name('train', 1)
    path.write_bytes(path.read_bytes()[:-1000])


def _cut_between_records(directory):
    """Leaves a file of whole records, which no checksum can find fault with."""
    path = directory / _shard_name('train', 1)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], 'little')
    path.write_bytes(content[: 8 + 4 + length + 4])


def _change_one_byte(directory):
    path = directory / _shard_name('test', 0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _empty_info(directory):
    (directory / 'dataset_info.json').write_text('')


def _other_shape(directory):
    path = directory / 'features.json'
    features = json.loads(path.read_text())
    image = features['featuresDict']['features']['image']['image']['shape']
    image['dimensions'] = ['28', '28', '1']
    path.write_text(json.dumps(features))


def _other_pixels(directory):
    """One pixel for an image, which NumPy would spread over all of it."""
    import tensorflow as tf

    pixel = tf.io.encode_png(np.zeros((1, 1, 3), np.uint8)).numpy()
    for shard in range(2):
        path = str(directory / _shard_name('train', shard))
        records = [bytes(record.numpy()) for record in tf.data.TFRecordDataset(path)]
        with tf.io.TFRecordWriter(path) as writer:
            for record in records:
                example = tf.train.Example.FromString(record)
                example.features.feature['image'].bytes_list.value[:] = [pixel]
                writer.write(example.SerializeToString())


def _drop_test_split(directory):
    path = directory / 'dataset_info.json'
    info = json.loads(path.read_text())
    info['splits'] = info['splits'][:1]
    path.write_text(json.dumps(info))


@pytest.mark.parametrize(
    'damage, names',
    [
        (_cut_short, 'cifar10-train.tfrecord'),
        (_cut_between_records, '31 examples, where dataset_info.json says 60'),
        (_change_one_byte, 'cifar10-test.tfrecord'),
        (lambda d: (d / _shard_name('train', 0)).unlink(), 'cifar10-train.tfrecord-00000-of-00002'),
        (lambda d: (d / 'features.json').unlink(), 'features.json'),
        (lambda d: (d / 'label.labels.txt').unlink(), 'label.labels.txt'),
        (lambda d: (d / 'label.labels.txt').write_text('a\nb\n'), '2 class names'),
        (_other_shape, 'images of the shape (28, 28, 1), where cifar10 has (32, 32, 3)'),
        (_other_pixels, 'cifar10-train.tfrecord'),
        (_empty_info, ''),
        (_drop_test_split, 'test'),
    ],
)
def test_damaged_prepared_directory_is_refused(prepared, damage, names):
    """Would catch a training on part of the data, and a fallback or a traceback in its place."""
    directory = prepared / 'cifar10' / '3.0.2'
    damage(directory)
    with pytest.raises(BadInput) as caught:
        datasets.load('cifar10', data_dir=prepared, notify=pytest.fail)
    message = str(caught.value)
    assert str(directory) in message and names in message
    assert 'truncated or corrupt' in message and 'prepare cifar10 with TFDS' in message


def test_a_damaged_test_split_matters_to_who_reads_it(prepared):
    """Catches a cross-validation that reads images which are to be seen once, at the end."""
    _change_one_byte(prepared / 'cifar10' / '3.0.2')
    dataset = datasets.load('cifar10', data_dir=prepared, read_test=False, notify=pytest.fail)
    assert dataset.test is None and len(dataset.train) + len(dataset.validation) == 60
    with pytest.raises(BadInput, match='cifar10-test.tfrecord'):
        datasets.load('cifar10', data_dir=prepared, notify=pytest.fail)


def test_fingerprints_tell_data_apart():
    """Catches processes that train on other pixels, labels, names or splits of one size."""
    base = _images(images=np.zeros((20, 4, 4, 3), np.uint8))
    prints = datasets.fingerprints(base)
    assert prints == json.loads(json.dumps(datasets.fingerprints(_images())))
    assert set(prints) == {
        'name', 'class names', 'training images', 'validation images', 'test images'
    }  # fmt: skip
    for changes in (
        {'images': np.ones((20, 4, 4, 3), np.uint8)},
        {'labels': np.arange(1, 21) % 2},
        {'test_images': np.ones((2, 4, 4, 3), np.uint8)},
        {'fraction': 0.5},
    ):
        assert datasets.fingerprints(_images(**changes)) != prints
    other = dataclasses.replace(base, class_names=('a', 'c'))
    assert datasets.fingerprints(other) != prints


def test_real_cifar10():
    """Would catch channels or splits that are swapped. The statistics are the published ones of the
    whole training set; a copy that went through JPEG, or a part of it, stays within 0.006."""
    if not (_REAL and (pathlib.Path(_REAL) / 'cifar10').is_dir()):
        pytest.skip('TFDS_DATA_DIR names no directory with a prepared cifar10')
    read = datasets.load('cifar10', data_dir=_REAL)
    assert read.class_names[:2] == ('airplane', 'automobile')
    for part, per_class in ((read.train, 4000), (read.validation, 1000), (read.test, 1000)):
        np.testing.assert_array_equal(np.bincount(part.labels), np.full(10, per_class))
    np.testing.assert_allclose(read.mean, [0.4914, 0.4822, 0.4465], atol=6e-3)
    np.testing.assert_allclose(read.std, [0.2470, 0.2435, 0.2616], atol=6e-3)


# ------------------------------------------------------------------ what cannot be had


@pytest.mark.parametrize('through', ['argument', 'variable'])
@pytest.mark.parametrize('exists', [True, False])
def test_named_directory_without_the_data_set(tmp_path, monkeypatch, offline, through, exists):
    """Would catch a run on digits, or a download, although the user said where the data are."""
    directory = tmp_path if exists else tmp_path / 'none'
    if through == 'variable':
        monkeypatch.setenv('TFDS_DATA_DIR', str(directory))
    data_dir = directory if through == 'argument' else None
    with pytest.raises(BadInput) as caught:
        datasets.load('cifar100', data_dir=data_dir, notify=pytest.fail)
    message = str(caught.value)
    assert f'{directory}/cifar100/VERSION/dataset_info.json' in message
    assert ('dataset.data_dir' if through == 'argument' else 'variable TFDS_DATA_DIR') in message


def test_a_user_without_a_home_gets_the_digits(offline, monkeypatch):
    """As in a container. Catches Python's own error, in the place of the notice."""

    def no_home():
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.setattr(datasets.pathlib.Path, 'home', no_home)
    assert datasets.load('cifar10', fallback='digits').name == 'digits'


def test_fallback_gives_notice_and_digits(offline, home):
    """Would catch a silent fallback, results under the wrong name, and TensorFlow imported before
    the decision."""
    notices = []
    read = datasets.load('cifar10', notify=notices.append)
    assert read.name == 'digits' and not read.flip
    (notice,) = notices
    assert len(notice.splitlines()) > 5 and max(map(len, notice.splitlines())) <= 100
    assert '=' * 80 in notice
    for part in (
        'The data set cifar10 cannot be had',
        f'none in {home}/tensorflow_datasets',
        'did not answer within 0 seconds',
        '1,797 handwritten digits',
        '--config.dataset.data_dir=DIR',
        'TFDS_DATA_DIR=DIR',
        '--config.dataset.fallback=none',
    ):
        assert part in _one_line(notice)


def test_fallback_none_fails_with_the_sentence_of_the_notice(offline):
    """Would catch digits in a run that named its data set on purpose."""
    with pytest.raises(BadInput) as caught:
        datasets.load('cifar10', fallback='none', notify=pytest.fail)
    notices = []
    datasets.load('cifar10', notify=notices.append)
    assert str(caught.value) in _one_line(notices[0])


def test_notice_goes_to_stderr_by_default(offline, capsys):
    """Would catch a notice among the results on stdout, or none."""
    datasets.load('cifar10')
    out, err = capsys.readouterr()
    assert out == '' and 'DATA SET MISSING' in err


def test_tfds_not_installed_is_a_reason_to_fall_back(monkeypatch):
    """Would catch a traceback where the digits could be had, and a probe that serves nothing."""
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
    monkeypatch.setattr(datasets, '_probe', lambda *_: pytest.fail('probed'))
    notices = []
    assert datasets.load('cifar10', notify=notices.append).name == 'digits'
    assert 'tensorflow_datasets is not installed' in _one_line(notices[0])


@pytest.mark.parametrize('module', ['tensorflow', 'tensorflow_datasets'])
def test_prepared_data_without_tensorflow(monkeypatch, prepared_once, home, module):
    """Would catch a traceback; named on purpose, the data set is an error, else a fallback."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadInput, match='cannot be imported'):
        datasets.load('cifar10', data_dir=prepared_once, notify=pytest.fail)
    home.mkdir()
    (home / 'tensorflow_datasets').symlink_to(prepared_once)
    notices = []
    assert datasets.load('cifar10', notify=notices.append).name == 'digits'
    assert 'cannot be imported' in _one_line(notices[0])


class _Builder:
    """Stands for TFDS's builder: makes the small data set, or fails."""

    url_infos = {}

    def __init__(self, data_dir, source):
        self.data_dir, self.source = data_dir, source

    def download_and_prepare(self, download_config):
        assert not download_config.try_download_gcs
        if self.source is None:
            raise OSError('the line went dead')
        shutil.copytree(self.source, self.data_dir)


@pytest.mark.parametrize('works', [True, False])
def test_download(monkeypatch, prepared_once, home, works):
    """Would catch a download that is not read afterwards, or whose failure ends the run."""
    import tensorflow_datasets as tfds

    source = prepared_once if works else None
    monkeypatch.setattr(datasets, '_probe', lambda url, seconds: None)
    monkeypatch.setattr(tfds, 'builder', lambda name, data_dir: _Builder(data_dir, source))
    notices = []
    read = datasets.load('cifar10', notify=notices.append)
    if works:
        assert read.name == 'cifar10' and not notices
        assert (home / 'tensorflow_datasets' / 'cifar10').is_dir()
    else:
        assert read.name == 'digits' and 'the line went dead' in _one_line(notices[0])


def test_a_download_that_stalls_is_given_up(monkeypatch, prepared_once, home):
    """The first bytes come, then nothing: catches a default command that hangs without a word."""
    import tensorflow_datasets as tfds

    class Stalled(_Builder):
        url_infos = {'url': types.SimpleNamespace(size=10)}

        def download_and_prepare(self, download_config):
            downloads = pathlib.Path(self.data_dir) / 'downloads'
            downloads.mkdir(parents=True)
            (downloads / 'part').write_bytes(b'12345')
            never = threading.Event()
            never.wait()

    monkeypatch.setattr(datasets, '_probe', lambda url, seconds: None)
    monkeypatch.setattr(datasets, '_STALL_SECONDS', 0.4)
    monkeypatch.setattr(tfds, 'builder', lambda name, data_dir: Stalled(data_dir, prepared_once))
    notices = []
    assert datasets.load('cifar10', notify=notices.append).name == 'digits'
    assert 'nothing arrived for 0.4 seconds' in _one_line(notices[0])


def test_a_slow_download_and_a_slow_preparation_are_waited_for(tmp_path):
    """Catches a limit on the whole download, and one on what comes after it."""

    def work():
        for number in range(8):
            time.sleep(0.1)
            (tmp_path / str(number)).write_bytes(b'x')
        time.sleep(0.8)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert datasets._goes_on(thread, tmp_path, 8, 0.4)
    assert not thread.is_alive()


# ------------------------------------------------------------------ the probe


@contextlib.contextmanager
def _server(reply):
    """The URL of a server that hands each connection to `reply` in a thread of its own."""
    with socket.create_server(('127.0.0.1', 0)) as listener:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=reply, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f'http://127.0.0.1:{listener.getsockname()[1]}/cifar.tar.gz'


def _answer(status, body):
    def reply(connection):
        with connection:
            connection.recv(4096)
            head = f'HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n'
            connection.sendall(head.encode() + body)

    return reply


def _swallow(connection):
    """Takes the request and never answers, as some proxies do."""
    time.sleep(60)


def _trickle(connection):
    """A byte now and then: each one restarts a socket's timeout."""
    with contextlib.suppress(OSError), connection:
        connection.recv(4096)
        for _ in range(600):
            connection.sendall(b'H')
            time.sleep(0.1)


@pytest.fixture
def no_proxy(monkeypatch):
    for variable in ('http_proxy', 'https_proxy', 'all_proxy'):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)


@pytest.mark.parametrize(
    'reply, says',
    [
        (_answer('200 OK', _GZIP), None),
        (_answer('200 OK', b'<html>Please log in</html>'), 'sends something else'),
        (_answer('404 Not Found', _GZIP), '404'),
    ],
)
def test_probe_tells_the_data_from_other_answers(no_proxy, reply, says):
    """Would catch a log-in page or an error page that counts as the data set."""
    with _server(reply) as url:
        problem = datasets._probe(url, 30)
    assert problem is None if says is None else says in problem


@pytest.mark.parametrize('reply', [_swallow, _trickle])
def test_probe_gives_up_on_a_server_that_hangs(no_proxy, reply):
    """Would catch a wait without an end. Had the probe waited for the server's last word, after 60
    seconds, its answer would be another one."""
    with _server(reply) as url:
        assert _gave_up(datasets._probe(url, 0.5))


def test_probe_goes_through_the_proxy_and_gives_up_on_it(no_proxy, monkeypatch):
    """Would catch a probe that ignores the proxy, or hangs where the proxy does."""
    with _server(_swallow) as url, _server(_answer('200 OK', _GZIP)) as honest:
        monkeypatch.setenv('http_proxy', honest)
        assert datasets._probe('http://nowhere.invalid/cifar.tar.gz', 30) is None
        monkeypatch.setenv('http_proxy', url)
        assert _gave_up(datasets._probe('http://nowhere.invalid/cifar.tar.gz', 0.5))


def test_probe_gives_up_on_a_name_that_hangs(no_proxy, monkeypatch):
    """Would catch a limit on the connection alone: looking up a host's name has none."""

    def hang(*_, **__):
        time.sleep(60)
        raise OSError('too late')

    monkeypatch.setattr(socket, 'getaddrinfo', hang)
    assert datasets._probe('http://nowhere.invalid/', 0.2) == 'did not answer within 0.2 seconds'


def test_probe_says_why_a_connection_is_refused(no_proxy):
    """Would catch a reason that is lost in the thread."""
    with socket.socket() as closed:
        # Bound but not listening: nobody else can take the port, and connections are refused.
        closed.bind(('127.0.0.1', 0))
        problem = datasets._probe(f'http://127.0.0.1:{closed.getsockname()[1]}/', 30)
    assert 'cannot be reached' in problem and 'refused' in problem


def _gave_up(problem):
    # Whether the thread's own timeout or the deadline on the thread comes first is left to chance.
    return 'did not answer' in problem or 'timed out' in problem


def test_no_tensorflow_on_import():
    """Would catch an import at the top, which costs every run seconds and half a gigabyte."""
    program = (
        'import sys, performer_vit.datasets, performer_vit.input_pipeline; '
        'sys.exit(any(m.split(".")[0] in ("tensorflow", "tensorflow_datasets", "sklearn") '
        'for m in sys.modules))'
    )
    environment = os.environ | {'PYTHONPATH': str(_ROOT)}
    done = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


# ------------------------------------------------------------------ digits, splits, checks


def test_digits_are_all_there_and_of_three_equal_channels():
    """Would catch digits lost between the splits, and grey levels that overflow or stay dark."""
    from sklearn.datasets import load_digits

    read = datasets.load('digits', validation_fraction=0.2)
    parts = (read.train, read.validation, read.test)
    images = np.concatenate([part.images for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    assert images.shape == (1797, 32, 32, 3) and images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    np.testing.assert_array_equal(images[..., 0], images[..., 1])
    np.testing.assert_array_equal(images[..., 0], images[..., 2])
    assert len(read.test) == 360 and len(read.validation) == 288
    # The mean of each 4×4 block of the enlargement stays near the pixel that it came from, and
    # tells almost all digits apart: so each must be there once, with its own label.
    digits = load_digits()
    small = images[..., 0].reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64) * (16 / 255)
    given = digits.images.reshape(-1, 64)
    distance = (small**2).sum(1)[:, None] - 2 * small @ given.T + (given**2).sum(1)
    nearest = distance.argmin(1)
    assert len(set(nearest.tolist())) > 1700
    assert np.mean(digits.target[nearest] == labels) > 0.99
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(digits.target))
    assert read.class_names == tuple('0123456789') and not read.flip


def test_digits_keep_their_test_split_for_every_seed():
    """Would catch test images that another seed trains on."""
    one, two = (datasets.load('digits', split_seed=seed) for seed in (1, 2))
    np.testing.assert_array_equal(one.test.images, two.test.images)
    assert np.any(one.train.labels != two.train.labels)


def test_resize_is_the_bilinear_resize_of_pillow():
    """Would catch corners aligned instead of centres, swapped axes, a wrong edge."""
    image = np.random.default_rng(0).uniform(0, 255, (8, 8)).astype(np.float32)
    reference = PIL.Image.fromarray(image).resize((32, 32), PIL.Image.Resampling.BILINEAR)
    np.testing.assert_allclose(
        datasets._resize(image[None], 32)[0], np.asarray(reference), rtol=1e-5, atol=1e-3
    )


def _own(count=100, num_classes=10, **options):
    """A data set of arrays whose images tell their index."""
    images = np.zeros((count, 2, 3, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    images[:, 1, :, 1] = np.arange(count)[:, None] * 7 % 256
    labels = np.arange(count) % num_classes
    names = [str(i) for i in range(num_classes)]
    return datasets.from_arrays('own', names, images, labels, images, labels, **options)


@pytest.mark.parametrize('fraction', [0.2, 0.3])
def test_split_is_stratified_and_a_partition(fraction):
    """Would catch an image in both parts or in none, and classes in other proportions."""
    read = _own(validation_fraction=fraction)
    parts = [part.images[:, 0, 0, 0].tolist() for part in (read.train, read.validation)]
    assert sorted(parts[0] + parts[1]) == list(range(100))
    np.testing.assert_array_equal(
        np.bincount(read.validation.labels), np.full(10, round(10 * fraction))
    )
    for part in (read.train, read.validation):
        np.testing.assert_array_equal(part.images[:, 0, 0, 0] % 10, part.labels)


def test_split_is_a_pure_function_of_the_seed():
    """Would catch a split that depends on NumPy's global state, or ignores its seed."""
    chosen = []
    for seed in (3, 3, 4):
        np.random.seed(len(chosen))
        chosen.append(_own(split_seed=seed).validation.images[:, 0, 0, 0].tolist())
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize('numbers', [1, 10**4, 10**9])  # Of a block: an image, some, all.
def test_statistics_are_those_of_the_training_part(monkeypatch, numbers):
    """Would catch statistics that see the validation part, sums that overflow, a lost block."""
    monkeypatch.setattr(datasets, '_BLOCK_NUMBERS', numbers)
    read = _own(count=250)
    pixels = read.train.images.astype(np.float64) / 255
    np.testing.assert_allclose(read.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    # The last channel is constant: its std is one grey level, so that it is divided by no zero.
    expected = np.append(pixels.std((0, 1, 2))[:2], 1 / 255)
    np.testing.assert_allclose(read.std, expected, rtol=1e-6)
    assert read.mean.dtype == read.std.dtype == np.float32


def test_no_validation_trains_on_everything():
    """Would catch images that are held out although nobody asked."""
    read = _own(validation_fraction=0)
    assert read.validation is None and len(read.train) == 100


def _images(**changes):
    arguments = (
        dict(
            images=np.zeros((20, 4, 4, 3), np.uint8),
            labels=np.arange(20) % 2,
            test_images=np.zeros((2, 4, 4, 3), np.uint8),
            test_labels=np.arange(2),
        )
        | changes
    )
    return datasets.from_arrays(
        'own',
        ['a', 'b'],
        arguments['images'],
        arguments['labels'],
        arguments['test_images'],
        arguments['test_labels'],
        validation_fraction=arguments.get('fraction', 0.2),
    )


def _with_nan():
    images = np.zeros((20, 4, 4, 3), np.float32)
    images[5, 1, 2, 0] = images[7] = np.nan
    return images


@pytest.mark.parametrize(
    'changes, says',
    [
        (dict(images=_with_nan()), r'train images contain nan, first at index \(5, 1, 2, 0\)'),
        (dict(test_images=np.full((2, 4, 4, 3), np.inf)), r'test images contain inf'),
        (dict(labels=np.where(np.arange(20) == 3, np.nan, 0)), r'labels contain nan.*\(3,\)'),
        (dict(images=np.zeros((20, 4, 4, 3), np.float32)), 'images are float32; allowed is uint8'),
        (dict(images=np.zeros((20, 4, 4), np.uint8)), r'shape \(20, 4, 4\)'),
        (dict(images=np.zeros((0, 4, 4, 3), np.uint8), labels=np.zeros(0, int)), 'at least one'),
        (dict(labels=np.zeros(20)), 'labels are float64'),
        (dict(labels=np.zeros(19, int)), r'labels are int64 of shape \(19,\)'),
        (dict(labels=np.arange(20)), 'train label at index 2 is 2; allowed are 0 to 1'),
        (dict(test_labels=np.array([0, -1])), 'test label at index 1 is -1'),
        (dict(test_images=np.zeros((2, 5, 4, 3), np.uint8)), r'\(5, 4, 3\)'),
        (dict(labels=np.arange(20) // 19), '1 in the smallest class'),
        (dict(labels=np.arange(20) // 18), "class 'b' is in one part only"),
        (dict(fraction=0.01), 'with dataset.validation_fraction 0.01 of them held out'),
        (dict(fraction=1.0), 'validation_fraction is 1.0'),
        (dict(fraction=float('nan')), 'validation_fraction is nan'),
    ],
)
def test_bad_arrays_are_refused(changes, says):
    """Would catch bad data that are trained on, each kind by its own message."""
    with pytest.raises(BadInput, match=says):
        _images(**changes)


def test_bad_arguments_are_refused_before_any_work(offline):
    """Would catch a download or a notice before the arguments are looked at."""
    with pytest.raises(BadInput, match="'cifar11'.*'cifar10', 'cifar100', 'digits', 'folder'"):
        datasets.load('cifar11', notify=pytest.fail)
    with pytest.raises(BadInput, match="fallback is 'zeros'.*'digits', 'none'"):
        datasets.load('cifar10', fallback='zeros', notify=pytest.fail)
    with pytest.raises(BadInput, match='validation_fraction is -0.1'):
        datasets.load('cifar10', validation_fraction=-0.1, notify=pytest.fail)
    with pytest.raises(BadInput, match='seed of the split is -1'):
        datasets.load('cifar10', split_seed=-1, notify=pytest.fail)
    with pytest.raises(BadInput, match='~nobodyatall/x begins with a home directory that there is'):
        datasets.load('cifar10', data_dir='~nobodyatall/x', notify=pytest.fail)


def test_the_probe_leaves_room_in_thirty_seconds():
    """Would catch a deadline raised beyond what the notice promises: a decision within 30 s, of
    which importing this package takes a few."""
    assert datasets._PROBE_SECONDS <= 15
