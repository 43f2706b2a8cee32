"""Folds: each image scored once by a model that has not seen it, and what is made of the scores."""

import csv
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from scipy import stats

from performer_vit import crossval, datasets, evaluate, train, workdir
from performer_vit.errors import BadInput
from tests.conftest import load_config


@pytest.fixture(scope='module')
def cross_validated(tmp_path_factory):
    """Three folds of the digits, trained for real."""
    config = load_config('performer_relu', 'digits')
    config.update(num_epochs=2, batch_size=128, log_every_steps=3)
    config.model.update(stem='patch', patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32)
    config.model.pooling = 'gap'
    config.model.attention.num_features = 8
    config.dataset.num_folds = 3
    directory = tmp_path_factory.mktemp('crossval')
    return config, directory, crossval.cross_validate(config, directory)


def test_every_training_image_is_scored_once_by_a_model_that_has_not_seen_it(cross_validated):
    """Catches a fold that is trained on, one that is left out, and predictions of another fold."""
    config, directory, results = cross_validated
    labels = []
    for fold, row in enumerate(results['folds']):
        saved = workdir.read_arrays(directory / f'fold_{fold}' / 'validation_predictions.npz')
        data = crossval.load_fold(crossval.fold_config(config, fold))
        np.testing.assert_array_equal(saved['labels'], data.validation.labels)
        assert len(data.train) + len(data.validation) == 1437
        accuracy = np.mean(saved['log_probabilities'].argmax(-1) == data.validation.labels)
        np.testing.assert_allclose(row['validation_accuracy'], accuracy)
        assert row['validation_accuracy'] == row['history'][-1]['validation_accuracy']
        labels.append(saved['labels'])
    whole = datasets.load('digits', validation_fraction=0.0)
    np.testing.assert_array_equal(
        np.bincount(np.concatenate(labels)), np.bincount(whole.train.labels)
    )


def test_the_report_is_of_all_folds(cross_validated):
    """Mean and n - 1 deviation by NumPy; per-class accuracy over the out-of-fold predictions."""
    _, directory, results = cross_validated
    accuracies = [fold['validation_accuracy'] for fold in results['folds']]
    np.testing.assert_allclose(results['validation_accuracy'], np.mean(accuracies))
    np.testing.assert_allclose(results['validation_accuracy_deviation'], np.std(accuracies, ddof=1))
    # The folds' dependence makes the half-width √(1 + 3/2) times that of independent scores.
    independent = stats.t.interval(0.95, 2, np.mean(accuracies), stats.sem(accuracies))
    low, high = np.mean(accuracies) + 2.5**0.5 * (independent - np.mean(accuracies))
    np.testing.assert_allclose(results['validation_accuracy_low'], low)
    np.testing.assert_allclose(results['validation_accuracy_high'], high)
    text = (directory / 'table.md').read_text()
    assert f'| 95 % interval of the mean | {100 * low:.2f} to {100 * high:.2f} % |' in text
    assert workdir.read_json(directory / 'results.json') == json.loads(json.dumps(results))
    right = {}
    for fold in range(3):
        saved = workdir.read_arrays(directory / f'fold_{fold}' / 'validation_predictions.npz')
        for label, prediction in zip(
            saved['labels'], saved['log_probabilities'].argmax(-1), strict=True
        ):
            right.setdefault(str(label), []).append(label == prediction)
    expected = {name: np.mean(values) for name, values in right.items()}
    assert results['per_class_accuracy'] == pytest.approx(expected)
    with open(directory / 'table.csv', encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [float(row['validation_accuracy']) for row in rows] == accuracies
    for name in ('learning_curves', 'confusion_matrix', 'per_class_accuracy'):
        assert (directory / 'figures' / f'{name}.png').stat().st_size > 10_000


def test_nothing_is_done_again(cross_validated, monkeypatch, capfd):
    """Catches finished folds that are trained anew, here the test's end, or promised time."""
    config, directory, results = cross_validated
    monkeypatch.setattr(train, 'compile_step', lambda *_: pytest.fail('trains again'))
    assert crossval.cross_validate(config, directory) == results
    said = [line for line in capfd.readouterr().out.splitlines() if '] Fold ' in line]
    assert said == [f'[digits] Fold {fold} of 3' for fold in (1, 2, 3)]


def test_the_directories_know_their_images(cross_validated):
    """Catches folds of other images that count as those of this data set."""
    config, directory, _ = cross_validated
    for place in (directory, directory / 'fold_0'):
        data = datasets.fingerprints(crossval.load_fold(crossval.fold_config(config, 0)))
        assert workdir.other_data(place, data) == []
        data['training images'] = '958, of digest 0123456789abcdef'
        assert '0123456789abcdef' in workdir.other_data(place, data)[0]


def test_a_directory_of_another_cross_validation_is_refused(cross_validated):
    config, directory, _ = cross_validated
    config = config.copy_and_resolve_references()
    config.dataset.num_folds = 4
    with pytest.raises(BadInput, match=r'dataset\.num_folds: 3 there, 4 here'):
        crossval.cross_validate(config, directory)


def test_the_test_split_is_kept_away(cross_validated):
    """The data of a fold have none, so that nothing below can read it by mistake."""
    config, directory, _ = cross_validated
    assert crossval.load_fold(crossval.fold_config(config, 0)).test is None
    results = workdir.read_json(directory / 'fold_0' / 'results.json')
    assert 'test_accuracy' not in results and 'test_loss' not in results
    assert re.search(r'^test accuracy +-$', evaluate.summary_table(results), re.MULTILINE)


def test_a_scored_run_is_no_tested_run(cross_validated):
    """Catches a fold that passes for a finished training, of which no test was made."""
    config, directory, _ = cross_validated
    with pytest.raises(BadInput, match=r'was scored on validation images and not tested; this one'):
        train.train(crossval.fold_config(config, 0), directory / 'fold_0')


def test_predictions_of_a_fold_that_are_lost(cross_validated, tmp_path):
    """Catches a traceback, and advice that does not help: what it says brings them back."""
    config, directory, results = cross_validated
    shutil.copytree(directory, tmp_path / 'run')
    fold = tmp_path / 'run' / 'fold_1'
    for spoil in (pathlib.Path.unlink, pathlib.Path.touch):
        spoil(fold / 'validation_predictions.npz')
        with pytest.raises(BadInput, match=r'fold_1/validation_pred.*npz is missing or damaged'):
            crossval.cross_validate(config, tmp_path / 'run')
    (fold / 'results.json').unlink()
    again = crossval.cross_validate(config, tmp_path / 'run')
    assert again['validation_accuracy'] == results['validation_accuracy']


def test_statistics_are_those_of_the_training_part():
    """The ramp of the images makes every fold's mean another one."""
    images = np.arange(60, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    labels = np.tile(np.arange(2), 30)
    for fold in range(3):
        data = datasets.from_arrays(
            'ramp', ('a', 'b'), images, labels, images[:2], labels[:2], num_folds=3, fold=fold
        )
        np.testing.assert_allclose(data.mean, data.train.images.mean() / 255, rtol=1e-6)
        assert len(data.validation) == 20
        assert np.bincount(data.validation.labels).tolist() == [10, 10]
        seen = {*data.train.images[:, 0, 0, 0], *data.validation.images[:, 0, 0, 0]}
        assert len(seen) == 60


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'num_folds': 1}, r'dataset\.num_folds is 1'),
        ({'num_folds': 0}, r'dataset\.num_folds is 0'),
        (
            {'num_folds': 200},
            r"num_folds is 200.*class '8' has 139 for training: set.*from 2 to 139",
        ),
        ({'fold': 2}, r'takes every fold in turn'),
    ],
)
def test_bad_folds_end_before_anything_is_written(tiny_config, tmp_path, fields, message):
    tiny_config.dataset.update(fields)
    with pytest.raises(BadInput, match=message):
        crossval.cross_validate(tiny_config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_what_does_not_fit_the_folds_ends_before_anything_is_written(tiny_config, tmp_path):
    """Catches a config.json that holds a mistake, so that the mended command is refused."""
    tiny_config.batch_size = 1200
    with pytest.raises(BadInput, match='batch_size is 1200 and there are 1149 images to train on'):
        crossval.cross_validate(tiny_config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_folds_need_no_validation_fraction(tiny_config, tmp_path, monkeypatch):
    """Nor a last state: both are about the validation split, in whose place the folds are."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(crossval, 'run_fold', stop)
    tiny_config.dataset.validation_fraction = 0.0
    assert tiny_config.test_state == 'best'
    with pytest.raises(KeyboardInterrupt):
        crossval.cross_validate(tiny_config, tmp_path / 'run')


@pytest.mark.parametrize('fold', [5, -2])
def test_a_fold_that_does_not_exist(fold):
    with pytest.raises(BadInput, match=rf'dataset\.fold is {fold}; allowed are 0 to 4'):
        datasets.load('digits', num_folds=5, fold=fold)


def test_a_choice_by_the_scoring_fold_is_refused(tiny_config, tmp_path):
    tiny_config.early_stopping_patience = 1
    with pytest.raises(BadInput, match='early_stopping_patience is 1'):
        crossval.cross_validate(tiny_config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
