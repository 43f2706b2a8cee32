"""The small files of a run, and whose a workdir is."""

import os
import pathlib
import pickle

import numpy as np
import pytest

from performer_vit import errors, workdir
from performer_vit.errors import BadInput

ROW = {
    'dataset': 'digits', 'epoch': 1, 'step': 9, 'train_loss': 0.1 + 0.2, 'train_accuracy': 0.5,
    'validation_loss': None, 'validation_accuracy': None, 'learning_rate': 1e-3, 'seconds': 2.0,
}  # fmt: skip
CONFIG = {
    'seed': 0,
    'model': {'width': 16, 'stem_channels': ((32,), (64,))},
    'dataset': {'data_dir': ''},
}


def test_history_comes_back_as_it_was(tmp_path):
    """Catches floats that lose digits, and a missing validation that turns into 0 or 'None'."""
    rows = [ROW, {**ROW, 'epoch': 2, 'validation_loss': 1 / 3, 'validation_accuracy': 0.25}]
    workdir.write_history(tmp_path / 'history.csv', rows)
    assert workdir.read_history(tmp_path / 'history.csv') == rows


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'results.json'
    workdir.write_json(path, {'a': 1})
    with pytest.raises(TypeError):
        workdir.write_json(path, {'a': object()})
    assert workdir.read_json(path) == {'a': 1}


def run(config, dataset_name='digits'):
    return workdir.definition(config, {'name': dataset_name})


def test_claiming_twice_is_going_on(tmp_path):
    workdir.claim(tmp_path / 'run', run(CONFIG))
    workdir.claim(tmp_path / 'run', run(CONFIG))


def test_another_place_of_the_data_is_no_other_run(tmp_path):
    data = {'name': 'folder', 'class names': ['cat'], 'training images': '9, of digest a'}
    workdir.claim(tmp_path, workdir.definition(CONFIG, data))
    elsewhere = {**CONFIG, 'dataset': {'data_dir': '/data'}}
    workdir.claim(tmp_path, workdir.definition(elsewhere, data))


def test_other_images_in_a_place_of_the_same_name_are_another_run(tmp_path):
    """Catches results of one folder of images that are shown as those of another folder."""
    data = {'name': 'folder', 'class names': ['cat'], 'training images': '9, of digest a'}
    workdir.claim(tmp_path, workdir.definition(CONFIG, data))
    other = {**data, 'training images': '9, of digest b'}
    with pytest.raises(BadInput, match=r'data_read.training images: .*digest a.*digest b'):
        workdir.claim(tmp_path, workdir.definition(CONFIG, other))


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Its config.json says nothing of its images."""
    workdir.claim(tmp_path, run(CONFIG))
    data = {'name': 'digits', 'training images': '9, of digest a'}
    workdir.claim(tmp_path, workdir.definition(CONFIG, data))
    assert workdir.other_data(tmp_path, data) is None


def test_of_long_lists_the_first_difference_is_shown():
    """Catches a message that is two lists of a thousand names."""
    ours = [f'class {number}' for number in range(1000)]
    theirs = [*ours[:700], 'another', *ours[701:]]
    (line,) = workdir.differences({'names': theirs}, {'names': ours})
    assert line == "  names, number 701: 'another' there, 'class 700' here"
    for name, their in [('names, number 1001', [*ours, None]), ('names', [*ours[:999], 1.0])]:
        here = [*ours[:999], 1] if name == 'names' else ours
        assert errors.first_difference(name.partition(',')[0], here, their)[0] == name


def test_another_config_is_refused_with_the_difference(tmp_path):
    """Catches a run that goes on from the checkpoints of another one."""
    workdir.claim(tmp_path, run(CONFIG))
    other = {**CONFIG, 'model': {'width': 32, 'stem_channels': ((32,), (64,))}}
    with pytest.raises(BadInput, match=r'model.width: 16 there, 32 here(?s:.*)--workdir'):
        workdir.claim(tmp_path, run(other))
    with pytest.raises(BadInput, match=r"dataset_read: 'digits' there, 'cifar10' here"):
        workdir.claim(tmp_path, run(CONFIG, 'cifar10'))
    with pytest.raises(BadInput, match=r'model.depth: absent there, 2 here'):
        workdir.claim(tmp_path, run({**CONFIG, 'model': {**CONFIG['model'], 'depth': 2}}))
    # Equal numbers are no difference; a field that is None is not one that is missing.
    assert not workdir.differences({'rate': 1}, {'rate': 1.0})
    assert workdir.differences({}, {'rate': None}) == ['  rate: absent there, None here']


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(BadInput, match=r'cannot be written .*--workdir=DIR'):
        workdir.claim(tmp_path / 'file' / 'run', run(CONFIG))
    with pytest.raises(BadInput, match=r'cannot be written'):
        workdir.claim('/proc/performer_vit', run(CONFIG))
    with pytest.raises(BadInput, match=r'cannot be written .File name too long'):
        workdir.check_writable(tmp_path / ('x' * 300))


def test_a_workdir_that_cannot_be_locked(tmp_path):
    """Such as one whose lock another user has made."""
    (tmp_path / '.training.lock').mkdir()
    with pytest.raises(BadInput, match='cannot be locked against a second training'):
        with workdir.alone(tmp_path):
            pass


def test_broken_files_are_named(tmp_path):
    with pytest.raises(BadInput, match=r'config.json does not exist: give the directory'):
        workdir.read_json(tmp_path / 'config.json')
    with pytest.raises(BadInput, match=r'cannot be read .IsADirectoryError'):
        workdir.read_json(tmp_path)
    (tmp_path / 'config.json').write_bytes(b'\xff\xfe')
    with pytest.raises(BadInput, match=r'config.json cannot be read .UnicodeDecodeError'):
        workdir.read_json(tmp_path / 'config.json')
    (tmp_path / 'config.json').write_text('{"a":')
    with pytest.raises(BadInput, match=r'config.json is not valid JSON'):
        workdir.read_json(tmp_path / 'config.json')


@pytest.mark.parametrize('text', ['dataset,epoch\ndigits,1.5\n', 'dataset,step\ndigits,x\n'])
def test_a_damaged_history_is_named(tmp_path, text):
    (tmp_path / 'history.csv').write_text(text)
    with pytest.raises(BadInput, match='history.csv is damaged .ValueError.*remove it'):
        workdir.read_history(tmp_path / 'history.csv')


class Runs:
    """What a pickle would run when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def save_objects(path, ran):
    np.savez(path, labels=np.array([Runs(ran)], object))


def save_a_pickle(path, ran):
    path.write_bytes(pickle.dumps(Runs(ran)))


def save_one_array_of_objects(path, ran):
    with open(path, 'wb') as file:
        np.save(file, np.array([Runs(ran)], object), allow_pickle=True)


def cut_short(path, ran):
    workdir.write_arrays(path, {'labels': np.arange(1000)})
    path.write_bytes(path.read_bytes()[:-30])


def flip_a_bit(path, ran):
    np.savez(path, labels=np.arange(1000))
    content = bytearray(path.read_bytes())
    content[2000] ^= 4
    path.write_bytes(content)


def leave_empty(path, ran):
    path.write_bytes(b'')


@pytest.mark.parametrize(
    'save',
    [
        save_objects, save_a_pickle, save_one_array_of_objects, cut_short, flip_a_bit, leave_empty,
    ],
)  # fmt: skip
def test_arrays_of_a_stranger_run_nothing(tmp_path, save):
    """Catches a reader that unpickles, and tracebacks for files that are damaged."""
    save(tmp_path / 'a.npz', tmp_path / 'ran')
    with pytest.raises(BadInput, match='a.npz is damaged, or no .npz file of arrays without'):
        workdir.read_arrays(tmp_path / 'a.npz')
    assert not (tmp_path / 'ran').exists()


def test_run_names_are_readable_and_safe():
    changes = {'num_epochs': 3, 'dataset.data_dir': '/secret', 'model.stem_channels': ((8,), (16,))}
    name = workdir.run_name('configs/performer_relu.py', 'cifar10,study', changes)
    assert name == 'performer_relu-study-model.stem_channels=__8,_,__16,__-num_epochs=3'
    # Two sizes must not meet in one directory.
    assert workdir.run_name('configs/vit.py', ' small, cifar10', {}) == 'vit-small'
    assert workdir.run_name('configs/vit.py', '', {}) == 'vit'
    assert str(workdir.default_workdir('vit', 'digits')) == 'runs/digits/vit'
    # Longer than file systems take, and apart in its last letter alone.
    one, two = (workdir.run_name('vit.py', '', {'field': 'x' * 300 + end}) for end in 'ab')
    assert len(one) == len(two) == 200 and one != two and one.startswith('vit-field=xxx')
    # 255 are bytes; a character may take three.
    one, two = (workdir.directory_name('幅' * 100 + end) for end in 'ab')
    assert one != two and max(len(name.encode()) for name in (one, two)) <= 200


def test_one_training_at_a_time(tmp_path):
    """Catches a lock that outlives its run, and one that another run's directory shares."""
    with workdir.alone(tmp_path / 'a' / 'run'):
        with pytest.raises(BadInput, match=r'another process trains in the workdir .*a/run: wait'):
            with workdir.alone(tmp_path / 'a' / 'run'):
                pass
        with workdir.alone(tmp_path / 'b'):
            pass
    with workdir.alone(tmp_path / 'a' / 'run'):
        pass


def test_a_history_of_data_with_a_comma_in_its_name(tmp_path):
    """Catches one that is called damaged, since the name is two cells."""
    row = dict.fromkeys(workdir.HISTORY_COLUMNS, 0.5) | {
        'dataset': 'a, "b"', 'epoch': 1, 'step': 2, 'validation_loss': None,
    }  # fmt: skip
    workdir.write_history(tmp_path / 'history.csv', [row | {'more': 3}])
    assert workdir.read_history(tmp_path / 'history.csv') == [row]


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('x[1', r'has \[ in it'),
        ('x]/y', r'has \] in it'),
        ('a**b', r'has \*\* in it'),
        pytest.param(
            'a\\b', 'in it', marks=pytest.mark.skipif(os.name == 'nt', reason='a separator')
        ),
        ('a\udcff', 'is no UTF-8'),
    ],
)
def test_paths_from_which_no_checkpoint_could_be_read(tmp_path, name, message):
    """Catches a run that is trained to its end, and whose best state is then called damaged."""
    with pytest.raises(BadInput, match=message):
        workdir.claim(tmp_path / name, {})
    assert not list(tmp_path.iterdir())
    workdir.check_writable(tmp_path / "a b #?%*{}'ü$")


def test_an_address_is_no_directory():
    """Catches a directory named gs: that is made in this one."""
    with pytest.raises(BadInput, match='gs://bucket/x, an address'):
        workdir.check_writable('gs://bucket/x')
