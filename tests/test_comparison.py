"""Means, intervals and corrections against SciPy's own tests and values worked out by hand."""

import copy

import numpy as np
import pytest
from scipy import stats

from performer_vit import comparison
from performer_vit.errors import BadInput

ROW = {
    'dataset': 'cifar10', 'kernel': 'exact', 'seed': 0, 'test_accuracy': 0.8,
    'config': {
        'seed': 0, 'num_epochs': 3, 'model': {'width': 64, 'attention': {'kernel': 'exact'}},
        'dataset': {'data_dir': ''},
    },
}  # fmt: skip


def row(kernel='exact', seed=0, accuracy=0.8, **config):
    made = copy.deepcopy(ROW)
    made.update(kernel=kernel, seed=seed, test_accuracy=accuracy)
    made['config'].update(seed=seed, **config)
    made['config']['model']['attention']['kernel'] = kernel
    return made


def test_paired_is_the_t_test_of_related_samples():
    """Catches an interval that forgets the pairs, or that takes the normal for Student's t."""
    rng = np.random.default_rng(0)
    ours, baseline = rng.normal(size=(2, 5))
    result = comparison.paired(dict(enumerate(ours)), dict(enumerate(baseline)))
    expected = stats.ttest_rel(ours, baseline)
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose(
        [result['mean'], result['low'], result['high'], result['p']],
        [np.mean(ours - baseline), interval.low, interval.high, expected.pvalue],
    )


def test_pairs_are_made_by_seed():
    """Catches pairs in the order of files: the seeds here come in another order, and one alone."""
    result = comparison.paired({2: 3.0, 1: 1.5, 7: 100.0}, {1: 1.0, 2: 2.0})
    assert result['n'] == 2
    np.testing.assert_allclose(result['mean'], 0.75)


def test_one_pair_supports_nothing():
    assert comparison.paired({0: 0.9}, {0: 0.1, 1: 0.1}) is None
    # As many, or three more, of 360 test images with both seeds: no spread is no certainty.
    assert comparison.paired({0: 0.5, 1: 0.75}, {0: 0.5, 1: 0.75}) is None
    assert comparison.paired({0: 343 / 360, 1: 347 / 360}, {0: 340 / 360, 1: 344 / 360}) is None


def test_holm_by_hand():
    """0.01 × 3, 0.02 × 2, and 0.03 × 1, which may not fall below the one before."""
    corrected = comparison.holm({'a': 0.03, 'b': 0.01, 'c': 0.02})
    assert corrected == pytest.approx({'b': 0.03, 'c': 0.04, 'a': 0.04})
    assert comparison.holm({'a': 0.9, 'b': 0.8}) == {'b': 1.0, 'a': 1.0}


def test_against_corrects_for_the_number_of_kernels():
    rows = [
        row(kernel, seed, accuracy)
        for kernel, accuracies in {
            'exact': (0.80, 0.81, 0.79), 'relu': (0.82, 0.83, 0.812), 'gelu': (0.80, 0.82, 0.78),
        }.items()
        for seed, accuracy in enumerate(accuracies)
    ]  # fmt: skip
    results = comparison.against(comparison.by_seed(rows), 'exact', 'test_accuracy')
    assert list(results) == ['relu', 'gelu']
    assert results['relu']['holm_p'] == pytest.approx(2 * results['relu']['p'])
    assert results['gelu']['holm_p'] == pytest.approx(results['gelu']['p'])
    assert results['relu']['low'] > 0 > results['gelu']['low']


def test_a_tie_counts_among_the_comparisons():
    """Catches p-values that shrink since one of the models happened to score the same."""
    accuracies = {
        'exact': (0.80, 0.81, 0.79), 'relu': (0.82, 0.83, 0.812), 'gelu': (0.80, 0.81, 0.79),
    }  # fmt: skip
    rows = [
        row(kernel, seed, a) for kernel in accuracies for seed, a in enumerate(accuracies[kernel])
    ]
    results = comparison.against(comparison.by_seed(rows), 'exact', 'test_accuracy')
    assert list(results) == ['relu']
    assert results['relu']['holm_p'] == pytest.approx(2 * results['relu']['p'])


def test_a_comparison_changes_one_thing():
    rows = [row(), row('relu', 1), row('relu', 2, num_epochs=4)]
    comparison.check_one_factor(rows[:2])
    with pytest.raises(BadInput, match=r"'relu' and seed 2 .* num_epochs \(3 and 4\) differ"):
        comparison.check_one_factor(rows)
    with pytest.raises(BadInput, match=r'here also the data \(.* and digits\) differ'):
        comparison.check_one_factor([row(), {**row('relu'), 'dataset': 'digits'}])


def test_seeds_of_a_kernel_are_of_one_model():
    """Catches a mean over seeds that is one over numbers of features; kernels may differ there."""
    rows = [row('exact'), row('relu', 0), row('relu', 1)]
    for other in rows[1:]:
        other['config']['model']['attention']['num_features'] = 64
    comparison.check_one_factor(rows)
    rows[2]['config']['model']['attention']['num_features'] = 256
    with pytest.raises(BadInput, match=r"'relu' and seed 1 .*num_features \(64 and 256\) differ"):
        comparison.check_one_factor(rows)


def test_the_same_run_twice_is_refused():
    with pytest.raises(BadInput, match="two runs with kernel 'relu' and seed 1"):
        comparison.by_seed([row('relu', 1), row('relu', 1)])


def test_interval_of_folds_covers_dependent_scores():
    """Catches an interval that takes the folds for independent.

    With the correlation ρ = 1/k that the correction supposes, the interval must hold the
    expectation in 95 % of 4,000 repetitions; 0.95 ± 0.014 is four standard errors. Student's plain
    interval does so in 86 %.
    """
    rng = np.random.default_rng(0)
    k, repetitions = 5, 4000
    correlation = 1 / k  # The share of images that two folds' scores are made of: n_test / n.
    shared = rng.normal(size=(repetitions, 1)) * correlation**0.5
    scores = shared + rng.normal(size=(repetitions, k)) * (1 - correlation) ** 0.5
    intervals = np.array([comparison.interval_of_folds(row.tolist()) for row in scores])
    held = np.mean((intervals[:, 0] < 0) & (intervals[:, 1] > 0))
    assert abs(held - 0.95) < 0.014
    low, high = comparison.interval_of_folds([0.8, 0.9])
    # By hand: s = 0.0707…, √(1/2 + 1/1) = 1.2247…, t of one degree of freedom 12.706…
    np.testing.assert_allclose((high - low) / 2, 12.7062047 * 0.1 / 2**0.5 * 1.5**0.5, rtol=1e-6)


def measured(kernel, seed, accuracy, **fields):
    return {
        **row(kernel, seed, accuracy), 'train_seconds_per_epoch': 20.0, 'images_per_second': 50.0,
        'inference_seconds': 2.0, 'num_params': 1234, 'train_gflop_per_image': 0.25, **fields,
    }  # fmt: skip


def test_summary_and_table():
    """By hand. Catches a difference of means over other seeds than those that both have."""
    rows = [
        measured('exact', seed, 0.8 + seed / 100, train_seconds_per_epoch=seconds)
        for seed, seconds in enumerate((19.0, 90.0, 21.0))
    ]
    rows += [measured('relu', seed, accuracy) for seed, accuracy in ((1, 0.82), (2, 0.84))]
    rows += [measured('elu', 2, 0.72, inference_seconds=None)]
    summary = comparison.summary(comparison.by_seed(rows), 'exact', 'test_accuracy')
    vit, relu, elu = summary
    assert vit['difference'] is None and vit['runs'] == 3
    np.testing.assert_allclose(relu['difference'], (0.01 + 0.02) / 2)
    np.testing.assert_allclose(relu['test_accuracy_deviation'], 0.02 / 2**0.5)
    np.testing.assert_allclose(elu['difference'], -0.1)
    assert elu['difference_low'] is None and elu['inference_seconds'] is None

    names = {'exact': 'ViT', 'relu': 'ReLU', 'elu': 'ELU'}
    head, lines = comparison.table(summary, names, 'exact', 'test_accuracy')
    cells = [dict(zip(head, line, strict=True)) for line in lines]
    assert cells[0]['test accuracy'] == '81.00 ± 1.00 %' and cells[0]['minus the ViT'] == '–'
    assert cells[2]['minus the ViT'] == '-10.00' and cells[2]['95 % interval'] == '–'
    assert cells[2]['inference s'] == '–' and cells[2]['s/epoch'] == '20'
    # A run that something disturbed leaves the time where it was.
    assert cells[0]['s/epoch'] == '21 (19 to 90)'
    # What no run measured has no column.
    for measurement in summary:
        measurement['inference_seconds'] = measurement['inference_seconds_low'] = None
    assert 'inference s' not in comparison.table(summary, names, 'exact', 'test_accuracy')[0]
