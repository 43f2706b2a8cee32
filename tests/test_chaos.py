"""Each fault is survived, and what would not be a survival is told."""

import shutil

import numpy as np
import pytest
from clu import metric_writers

from performer_vit import chaos, workdir


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    return chaos.undisturbed_run(tmp_path_factory.mktemp('chaos'))


@pytest.mark.slow
@pytest.mark.parametrize('name', chaos.FAULTS)
def test_a_training_survives(name, undisturbed, tmp_path):
    """The same command ends in the bits of a run that nothing happened to.

    Moments are random, with a seed; what must hold does not depend on them.
    """
    if chaos.FAULTS[name].needs_mounts and not chaos.may_mount():
        pytest.skip('this system does not let its users mount')
    chaos.survive(name, tmp_path / 'run', 0, undisturbed)


def spoil_nothing(directory):
    pass


def lose_a_row(directory):
    rows = workdir.read_history(directory / 'history.csv')
    workdir.write_history(directory / 'history.csv', rows[:2] + rows[3:])


def double_a_row(directory):
    rows = workdir.read_history(directory / 'history.csv')
    workdir.write_history(directory / 'history.csv', rows + rows[-1:])


def change_a_number(directory):
    rows = workdir.read_history(directory / 'history.csv')
    rows[1]['train_loss'] = np.nextafter(rows[1]['train_loss'], 9)
    workdir.write_history(directory / 'history.csv', rows)


def double_a_scalar(directory):
    writer = metric_writers.SummaryWriter(str(directory))
    writer.write_scalars(3, {'train/loss': 1.0})
    writer.close()


def lose_the_scalars(directory):
    for path in directory.glob('*tfevents*'):
        path.unlink()


def flip_a_prediction(directory):
    path = directory / 'test_predictions.npz'
    arrays = workdir.read_arrays(path)
    arrays['log_probabilities'][7, 3] = np.nextafter(arrays['log_probabilities'][7, 3], 9)
    workdir.write_arrays(path, arrays)


def train_less(directory):
    newest = max((directory / 'checkpoints').glob('[0-9]*'), key=lambda path: int(path.name))
    shutil.rmtree(newest)


def lose_the_results(directory):
    (directory / 'results.json').unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    'spoil, said',
    [
        (spoil_nothing, []),
        (lose_a_row, ['history.csv misses', 'history.csv has other']),
        (double_a_row, ['history.csv has more']),
        (change_a_number, ['history.csv has other ["(1, \'train_loss\')"], 1 in all']),
        (double_a_scalar, ['TensorBoard has more ["(\'train/loss\', 3, 2)"], 1 in all']),
        (lose_the_scalars, ['TensorBoard misses']),
        (flip_a_prediction, ["the predictions has other ['log_probabilities'], 1 in all"]),
        (train_less, ['the final train state has other']),
        (lose_the_results, ['results.json cannot be read']),
    ],
)
def test_what_is_lost_is_told(spoil, said, undisturbed, tmp_path):
    """Catches a comparison that finds all runs equal."""
    shutil.copytree(undisturbed.workdir, tmp_path / 'run')
    spoil(tmp_path / 'run')
    differences = list(chaos.differences(tmp_path / 'run', undisturbed.workdir))
    assert len(differences) == len(said), differences
    for text, start in zip(differences, said, strict=True):
        assert text.startswith(start)


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([], 'required: --workdir'),
        (['--workdir=.'], 'exists already: give a new directory'),
        (['--workdir=new', '--kills=0'], '--kills and --jobs are 1 or more'),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        chaos.main(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err
