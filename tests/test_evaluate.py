"""The metrics against plain loops and closed forms; the report and its files."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from performer_vit import datasets, evaluate, feature_maps, vit
from performer_vit.errors import BadInput


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def fake_predictions(num_classes, num_images, seed=0, sharpness=2.0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num_images) % num_classes)
    logits = rng.normal(size=(num_images, num_classes))
    logits[np.arange(num_images), labels] += sharpness
    return labels, log_softmax(logits)


RESULTS = {
    'dataset': 'digits',
    'kernel': 'relu',
    'num_params': 1234567,
    'num_tokens': 64,
    'epochs': 3,
    'train_seconds_per_epoch': 1.23456,
    'compile_seconds': 4.5,
    'inference_seconds': 0.0123,
    'images_per_second': 1064.2,
    'validation_accuracy': None,
    'test_accuracy': 0.87654,
    'test_loss': 0.4321,
    'seed': 7,
    'device': 'cpu',
    'versions': {'python': '3.11.2', 'jax': '0.10.2', 'git_commit': None},
    'num_features': None,
    'projection': 'none',
}


# Confusion and accuracies


def test_confusion_matrix_counts_each_pair():
    """Catches rows and columns exchanged, and a class that the predictions never name."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    predictions = rng.integers(0, 3, 200)  # class 4 of 5 in neither, class 3 only true
    expected = np.zeros((5, 5), int)
    for label, prediction in zip(labels, predictions, strict=True):
        expected[label, prediction] += 1
    matrix = evaluate.confusion_matrix(labels, predictions, 5)
    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(matrix, expected)


def test_confusion_matrix_of_narrow_integers_does_not_overflow():
    """Catches label * K + prediction computed in the uint8 that data sets come in."""
    labels = np.array([99, 99, 50], np.uint8)
    matrix = evaluate.confusion_matrix(labels, labels, 100)
    assert (matrix[99, 99], matrix[50, 50], matrix.sum()) == (2, 1, 3)


@pytest.mark.parametrize(
    ('labels', 'predictions', 'part'),
    [
        ([0, 3], [0, 1], 'labels lie in 0..3; allowed are 0..2'),
        ([0, 1], [-1, 1], 'predictions lie in -1..1'),
        ([0, 1], [0], 'they must be equal'),
        ([], [], 'not empty'),
        ([0.0, 1.0], [0, 1], 'integers'),
    ],
)
def test_confusion_matrix_refuses_bad_classes(labels, predictions, part):
    """Catches a label outside the classes that would be counted in another cell."""
    with pytest.raises(BadInput, match=part):
        evaluate.confusion_matrix(labels, predictions, 3)


def test_per_class_accuracy_is_the_recall_and_nan_without_images():
    """Catches division by the column sums (precision) and a 0/0 shown as an accuracy of 0."""
    matrix = np.array([[3, 1, 0], [2, 6, 0], [0, 0, 0]])
    with np.errstate(all='raise'):
        result = evaluate.per_class_accuracy(matrix)
    np.testing.assert_allclose(result, [0.75, 0.75, np.nan])


def test_accuracy_and_top_k_against_a_loop():
    """Catches an off-by-one in k and a sort the wrong way round."""
    labels, log_probabilities = fake_predictions(8, 300, sharpness=1.0)
    for k in (1, 2, 5):
        hits = 0
        for label, row in zip(labels, log_probabilities, strict=True):
            hits += sum(row > row[label]) < k
        assert evaluate.top_k_accuracy(labels, log_probabilities, k) == hits / 300
    first = evaluate.top_k_accuracy(labels, log_probabilities, 1)
    assert evaluate.accuracy(labels, log_probabilities) == first
    assert evaluate.accuracy(labels, np.exp(log_probabilities)) == first


def test_a_constant_model_is_right_as_often_as_class_0_occurs():
    """Catches ties counted for the true class, which would give a dead model 100 %."""
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 0])
    uniform = np.full((8, 7), -math.log(7), np.float32)
    assert evaluate.accuracy(labels, uniform) == 2 / 8
    assert evaluate.top_k_accuracy(labels, uniform, 5) == 6 / 8


def test_negative_log_likelihood_closed_forms():
    """Catches another base of the logarithm, a sum for a mean, and float32 accumulation."""
    uniform = np.full((10, 10), -math.log(10))
    assert evaluate.negative_log_likelihood(np.arange(10), uniform) == pytest.approx(math.log(10))
    labels = np.array([1, 0])
    probabilities = np.array([[0.25, 0.75], [0.5, 0.5]])
    expected = -(math.log(0.75) + math.log(0.5)) / 2
    assert evaluate.negative_log_likelihood(labels, np.log(probabilities)) == pytest.approx(
        expected
    )


# Calibration


def test_calibration_error_against_masks():
    """The formula with explicit bins; catches bins of equal counts and unweighted means."""
    labels, log_probabilities = fake_predictions(10, 2000, sharpness=3.0)
    confidence = np.exp(log_probabilities.astype(np.float64)).max(axis=1)
    right = log_probabilities.argmax(axis=1) == labels
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    result = evaluate.expected_calibration_error(labels, log_probabilities)
    assert result == pytest.approx(expected, abs=1e-12)
    assert expected > 0.01


def test_calibration_error_of_a_sure_model_is_its_error_rate():
    """Catches confidence 1 falling out of the last bin; rounding may even leave it above 1."""
    log_probabilities = np.full((10, 3), -100.0)
    log_probabilities[:, 0] = 1e-7
    labels = np.array([0] * 7 + [1] * 3)
    error = evaluate.expected_calibration_error(labels, log_probabilities)
    assert error == pytest.approx(0.3, abs=1e-6)


def test_a_calibrated_model_has_a_small_calibration_error():
    """Labels drawn from the predicted probabilities: the error is noise alone.

    Each of at most 15 bins adds sqrt(|B_b|) / (2 n) of standard deviation at most, by Cauchy and
    Schwarz sqrt(15 / n) / 2 in all; a mean of absolute values, it stays below 3 times that with a
    confidence far above 99.9 %. A model sharpened by 2 must fail the same bound.
    """
    rng = np.random.default_rng(0)
    n = 20000
    logits = 1.5 * rng.normal(size=(n, 4))
    log_probabilities = log_softmax(logits)
    uniform = rng.uniform(size=(n, 1))
    labels = (uniform > np.exp(log_probabilities.astype(float)).cumsum(axis=1)[:, :3]).sum(axis=1)
    bound = 3 * math.sqrt(15 / n) / 2
    assert evaluate.expected_calibration_error(labels, log_probabilities) < bound
    assert evaluate.expected_calibration_error(labels, log_softmax(2 * logits)) > bound


# The report


def test_report_agrees_with_itself_and_is_json():
    """Catches NumPy types that JSON refuses, and scikit-learn fed other predictions than ours."""
    labels, log_probabilities = fake_predictions(10, 500)
    names = [f'class {i}' for i in range(10)]
    report = evaluate.report(labels, log_probabilities, names)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report['num_images'] == 500
    assert report['accuracy'] == report['classification_report']['accuracy']
    assert np.trace(report['confusion']) / 500 == pytest.approx(report['accuracy'])
    assert report['accuracy'] < report['top5_accuracy'] < 1
    for name in names:
        recall = report['classification_report'][name]['recall']
        assert report['per_class'][name] == pytest.approx(recall)
        assert name in report['classification_report_text']


def test_report_of_few_classes_with_one_of_them_absent():
    """Catches a top-5 accuracy of 5 classes, always 1, and a crash on a class without images."""
    labels, log_probabilities = fake_predictions(4, 100)
    wider = np.concatenate([log_probabilities, np.full((100, 1), -50.0)], axis=1)
    report = evaluate.report(labels, wider, list('abcde'))
    assert 'top5_accuracy' not in report
    assert report['per_class']['e'] is None
    assert report['classification_report']['e']['support'] == 0


def test_report_refuses_what_is_not_log_probabilities():
    """Catches logits, probabilities or NaN that would be reported as a loss."""
    labels, log_probabilities = fake_predictions(3, 30)
    names = list('abc')
    with pytest.raises(BadInput, match='log_softmax'):
        evaluate.report(labels, 3 * log_probabilities, names)
    with pytest.raises(BadInput, match='log_softmax'):
        evaluate.report(labels, np.exp(log_probabilities), names)
    with pytest.raises(BadInput, match='log_softmax'):
        evaluate.report(labels, 1000 + log_probabilities, names)
    spoilt = log_probabilities.copy()
    spoilt[4, 1] = np.nan
    with pytest.raises(BadInput, match='1 of 30 images hold NaN'):
        evaluate.report(labels, spoilt, names)
    with pytest.raises(BadInput, match='class_names has 2 names'):
        evaluate.report(labels, log_probabilities, ['a', 'b'])
    with pytest.raises(BadInput, match='2 of them different'):
        evaluate.report(labels, log_probabilities, ['a', 'b', 'a'])
    with pytest.raises(BadInput, match='one row of predictions an image'):
        evaluate.report(labels[:-1], log_probabilities, names)


def test_report_takes_log_probabilities_of_bfloat16_precision():
    """Catches a test of the sum so strict that half-precision models have no report."""
    labels, log_probabilities = fake_predictions(100, 500)
    # Eight bits of mantissa: the lower 16 of float32 dropped.
    coarse = (log_probabilities.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert np.abs(np.exp(coarse).sum(axis=1) - 1).max() > 1e-3
    evaluate.report(labels, coarse, [str(i) for i in range(100)])


# The learnt kernel


def test_learnt_kernel_starts_as_relu_and_is_that_of_the_trained_weights(tiny_config):
    """The untrained kernel is that of ReLU features with the rows that fθ starts from.

    The first block's norms are computed again in NumPy; queries and keys of the second are
    constants. Catches blocks exchanged, trained and initial weights exchanged, norms of other
    images, of q instead of q', or of their means, and degrees taken for radians.

    By Cho and Saul 2009 the mean over all planes is proportional to the arc-cosine kernel; the mean
    over some is within 5 standard errors, and ε adds less than 0.01.
    """
    tiny_config.model.depth = 2
    tiny_config.model.attention.kernel = 'ftheta'
    dataset = datasets.load('digits')
    model = vit.from_config(tiny_config.model, 10, tiny_config.seed)
    initial = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
    trained = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1, initial)
    for side, value in (('query', 0.25), ('key', 0.5)):
        dense = trained['encoder_1']['self_attention'][side]
        dense.update(kernel=0 * dense['kernel'], bias=0 * dense['bias'] + value)
    saved = evaluate.learnt_kernel(tiny_config, dataset, model, {'params': trained}, initial)

    pixels = (dataset.validation.images[:128] / 255 - dataset.mean) / dataset.std
    patches = pixels.reshape(128, 4, 8, 4, 8, 3).swapaxes(2, 3).reshape(128, 16, 192)
    stem, block = trained['stem']['embedding'], trained['encoder_0']
    x = patches @ stem['kernel'] + stem['bias'] + trained['position_embedding']
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * block['attention_norm']['scale'] + block['attention_norm']['bias']
    for side, value in (('query', 0.25), ('key', 0.5)):
        dense = block['self_attention'][side]
        heads = np.einsum('bnc,chd->bnhd', x, dense['kernel']) + dense['bias']
        first = np.sqrt(np.mean(np.sum(heads**2, axis=-1)))
        expected = np.array([first, value * 8**0.5]) / 8**0.25
        np.testing.assert_allclose(saved[f'{side}_norm'], expected, rtol=1e-4)

    for block in range(2):
        norms = np.array([saved[f'{side}_norm'][block] for side in ('query', 'key')])
        rows, theta = (
            weights[f'encoder_{block}']['self_attention']['attention']['theta']
            for weights in (initial, trained)
        )
        for name, feature_map in (
            ('initial', functools.partial(feature_maps.relu, projection=rows['hidden_kernel'].T)),
            ('learnt', functools.partial(feature_maps.ftheta, theta=theta)),
        ):
            profile = feature_maps.kernel_profile(
                feature_map, 8, norms * 8**0.25, np.deg2rad(evaluate.PROFILE_ANGLES),
                jax.random.key(0), num_planes=evaluate.PROFILE_PLANES,
            )  # fmt: skip
            mean, deviation = (values[0, 1] / profile.mean[0, 1, 0] for values in profile)
            np.testing.assert_allclose(saved[name][block, 0], mean, rtol=1e-3, atol=1e-6)
            found = saved[f'{name}_deviation'][block, 0]
            np.testing.assert_allclose(found, deviation, rtol=1e-3, atol=1e-6)
        arc_cosine, deviation = saved['arc_cosine'], saved['initial_deviation'][block, 0]
        bound = 5 * (deviation + arc_cosine * deviation[0]) / evaluate.PROFILE_PLANES**0.5 + 0.01
        assert np.all(np.abs(saved['initial'][block, 0] - arc_cosine) < bound)
        assert np.max(np.abs(saved['learnt'][block, 0] - arc_cosine) / bound) > 1
        np.testing.assert_allclose(saved['softmax'][block, -1], np.exp(-2 * np.prod(norms)), 1e-4)
    assert saved['angles'].tolist() == evaluate.PROFILE_ANGLES.tolist()
    assert saved['angles'][[0, -1]].tolist() == [0, 180]
    middle = list(saved['angles']).index(90)
    np.testing.assert_allclose(saved['arc_cosine'][[0, middle, -1]], [1, 1 / np.pi, 0], atol=1e-6)
    np.testing.assert_allclose(saved['softmax'][:, middle] ** 2, saved['softmax'][:, -1], 1e-4)


def model_and_noise(config, scale):
    """A model, and weights from N(0, scale²)."""
    model = vit.from_config(config.model, 10, config.seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: scale * rng.normal(size=leaf.shape), shapes)


def test_learnt_kernel_of_heads_and_sides_apart(tiny_config):
    """A curve a head where heads have maps of their own, the key's map used where there is one; the
    norms are of training images where there are no others, and of the config's temperature.
    """
    attention = tiny_config.model.attention
    attention.update(kernel='ftheta_mixture', theta_sharing='none')
    model, initial = model_and_noise(tiny_config, 0.5)
    trained = jax.tree.map(np.copy, initial)
    theta = trained['encoder_0']['self_attention']['attention']['theta']
    theta['key']['hidden_bias'][1] += 1  # Of the second head alone.
    dataset = datasets.load('digits')
    saved = evaluate.learnt_kernel(tiny_config, dataset, model, {'params': trained}, initial)
    assert saved['learnt'].shape == saved['initial'].shape == (1, 2, saved['angles'].size)
    np.testing.assert_array_equal(saved['learnt'][0, 0], saved['initial'][0, 0])
    assert np.max(np.abs(saved['learnt'][0, 1] - saved['initial'][0, 1])) > 0.05

    swapped = dataclasses.replace(dataset, train=dataset.validation, validation=None)
    with tiny_config.unlocked():
        attention.temperature = 2 * 8**0.5
    colder = evaluate.learnt_kernel(tiny_config, swapped, model, {'params': trained}, initial)
    np.testing.assert_allclose(colder['query_norm'], saved['query_norm'] / 2**0.5, rtol=1e-5)


@pytest.mark.parametrize(
    ('kernel', 'num_heads'),
    [('relu', 2), ('exact', 2), ('none', 2), ('ftheta', 16), ('ftheta', 2)],
)
def test_no_learnt_kernel(tiny_config, kernel, num_heads):
    """Catches a run that fails at its end where there is no learnt kernel, or no angle: in one
    dimension, or where all weights are 0, and so queries and keys.
    """
    tiny_config.model.num_heads = num_heads
    tiny_config.model.attention.kernel = kernel
    model, params = model_and_noise(tiny_config, 0)
    dataset = datasets.load('digits')
    variables = {'params': params}
    assert evaluate.learnt_kernel(tiny_config, dataset, model, variables, params) is None


# The summary table


def test_summary_table_has_units_separators_and_dashes():
    """Catches a fraction printed as a percentage, and None printed as a number or a crash."""
    lines = dict(line.split('  ', 1) for line in evaluate.summary_table(RESULTS).splitlines())
    values = {name.strip(): value.strip() for name, value in lines.items()}
    assert values['model'] == 'Performer-ReLU'
    assert values['data set'] == 'digits'
    assert values['parameters'] == '1,234,567'
    assert values['training'] == '1.23 s/epoch (median)'
    assert values['inference'] == '0.0123 s (whole test split, warm)'
    assert values['throughput'] == '1,064.2 images/s (training)'
    assert values['validation accuracy'] == '-'
    assert values['test accuracy'] == '87.65 %'
    assert values['test loss'] == '0.4321 nats'
    assert values['git_commit'] == '-'


def test_flip_averaging_means_probabilities():
    """Catches a mean of log-probabilities, which prefers class 1 for the first image here."""
    own = np.log(np.array([[0.9, 0.1, 0.0001], [0.2, 0.7, 0.1]]))
    mirror = np.log(np.array([[0.001, 0.4, 0.599], [0.6, 0.3, 0.1]]))
    labels = np.array([0, 1])
    got = evaluate.flip_averaged(own, mirror, labels)
    means = (np.exp(own) + np.exp(mirror)) / 2
    np.testing.assert_allclose(
        got['flip_averaged_test_loss'], -np.log(means[[0, 1], labels]).mean()
    )
    assert got['flip_averaged_test_accuracy'] == 1.0
    assert ((own + mirror).argmax(axis=1) == labels).mean() < 1.0


def test_summary_table_names_flip_averaging_where_it_was_done():
    table = evaluate.summary_table({**RESULTS, 'flip_averaged_test_accuracy': 0.9312})
    assert table.endswith('test accuracy, averaged with mirror images  93.12 %')
    assert 'mirror' not in evaluate.summary_table(RESULTS)


def test_summary_table_is_aligned_and_survives_an_empty_result():
    """Catches columns that a long field name pushes apart, and a missing key as a KeyError."""
    lines = evaluate.summary_table(RESULTS).splitlines()
    start = lines[0].index('digits')
    assert all(line[start - 1] == ' ' and line[start] != ' ' for line in lines)
    empty = evaluate.summary_table({'versions': None}).splitlines()
    assert len(empty) > 10 and all(line.endswith('  -') for line in empty)


# The files


def test_write_report_writes_every_file_and_the_numbers_come_back(tmp_path):
    """Catches a lost file, predictions that change on disk, and temporary files left behind."""
    labels, log_probabilities = fake_predictions(10, 400)
    names = [str(i) for i in range(10)]
    workdir = tmp_path / 'run'
    given = {**RESULTS, 'test_accuracy': None, 'num_tokens': np.int64(64)}
    shown = []

    def show(*values):
        assert not (workdir / 'results.json').exists(), 'the run is marked as finished too early'
        shown.append(values)

    results = evaluate.write_report(workdir, given, log_probabilities, labels, names, show=show)

    found = {str(path.relative_to(workdir)) for path in workdir.rglob('*') if path.is_file()}
    assert found == {
        'results.json',
        'classification_report.txt',
        'test_predictions.npz',
        'figures/confusion_matrix.png',
        'figures/per_class_accuracy.png',
        'figures/confidence.png',
    }
    with np.load(workdir / 'test_predictions.npz') as saved:
        np.testing.assert_array_equal(saved['labels'], labels)
        np.testing.assert_array_equal(saved['log_probabilities'], log_probabilities)
        assert saved['log_probabilities'].dtype == np.float32

    right = np.mean(log_probabilities.argmax(axis=1) == labels)
    loss = -np.mean(log_probabilities[np.arange(400), labels])
    assert results['test_accuracy'] == pytest.approx(right)
    assert results['test_loss'] == pytest.approx(loss, rel=1e-5)
    own = {'test_accuracy', 'test_loss', 'class_names'}
    assert {k: v for k, v in results.items() if k not in own} == {
        k: v for k, v in RESULTS.items() if k not in own
    }
    assert json.loads((workdir / 'results.json').read_text()) == results
    assert results['class_names'] == names

    text = (workdir / 'classification_report.txt').read_text()
    assert text.startswith('Performer-ReLU on digits: 400 test images\n')
    assert f'{100 * right:.2f} %' in text and text.endswith('\n')
    made = evaluate.report(labels, log_probabilities, names)
    assert made['classification_report_text'].rstrip() in text
    (shown_loss, shown_accuracy, images), = shown  # fmt: skip
    assert (shown_loss, shown_accuracy) == (results['test_loss'], results['test_accuracy'])
    (name, image), = images.items()  # fmt: skip
    assert name == 'test/confusion_matrix'
    assert image.shape[1:] == (800, 3) and image.dtype == np.uint8


def test_write_report_checks_before_it_writes(tmp_path):
    """Catches a workdir whose good report is half replaced by one of a diverged model."""
    labels, log_probabilities = fake_predictions(3, 30)
    evaluate.write_report(tmp_path, RESULTS, log_probabilities, labels, list('abc'))
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    with pytest.raises(BadInput):
        spoilt = log_probabilities * np.nan
        evaluate.write_report(tmp_path, {**RESULTS, 'seed': 8}, spoilt, labels, list('abc'))
    (tmp_path / 'history.csv').write_text('dataset,epoch\ndigits,1.5\n')
    with pytest.raises(BadInput, match='history.csv is damaged'):
        other = log_probabilities[::-1]
        evaluate.write_report(tmp_path, {**RESULTS, 'seed': 8}, other, labels, list('abc'))
    (tmp_path / 'history.csv').unlink()
    after = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    assert after == before


def test_results_that_are_not_finite_become_null(tmp_path):
    """Catches NaN in results.json, which is no JSON: other programs could not read the file."""
    labels, log_probabilities = fake_predictions(3, 30)
    given = {**RESULTS, 'compile_seconds': math.nan, 'inference_seconds': np.float32(np.inf)}
    evaluate.write_report(tmp_path, given, log_probabilities, labels, list('abc'))

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / 'results.json').read_text()
    written = json.loads(text, parse_constant=refuse)
    assert written['compile_seconds'] is None and written['inference_seconds'] is None
    assert text.endswith('}\n') and list(written) == sorted(written)


def test_a_failed_write_leaves_the_old_predictions(tmp_path, monkeypatch):
    """Catches writing in place: a run that is killed would destroy its last predictions."""
    labels, log_probabilities = fake_predictions(3, 30)
    evaluate.write_report(tmp_path, RESULTS, log_probabilities, labels, list('abc'))
    before = (tmp_path / 'test_predictions.npz').read_bytes()

    replace = evaluate.os.replace

    def fail(source, target):
        if str(target).endswith('.npz'):
            raise OSError('killed')
        replace(source, target)

    monkeypatch.setattr('os.replace', fail)
    labels, other = fake_predictions(3, 30, seed=1)
    with pytest.raises(OSError, match='killed'):
        evaluate.write_report(tmp_path, RESULTS, other, labels, list('abc'))
    assert (tmp_path / 'test_predictions.npz').read_bytes() == before


def test_results_are_written_when_all_else_is(tmp_path, monkeypatch):
    """Catches a run that counts as finished, and is never reported again, without its figures."""

    def fail(*_):
        raise OSError('killed')

    monkeypatch.setattr(evaluate.figures, 'save', fail)
    labels, log_probabilities = fake_predictions(3, 30)
    with pytest.raises(OSError, match='killed'):
        evaluate.write_report(tmp_path, RESULTS, log_probabilities, labels, list('abc'))
    assert (tmp_path / 'test_predictions.npz').exists()
    assert not (tmp_path / 'results.json').exists()
