"""The figures hold the saved numbers, say what they show, and stay legible."""

import functools
import itertools
import json
import subprocess
import sys

import matplotlib
import matplotlib.text
import numpy as np
import pytest
from matplotlib.image import imread

from performer_vit import approximation, favor, figures, model_speed, timing, workdir
from performer_vit.errors import BadInput

TITLE = 'Performer-ReLU on digits'


def history(num_epochs, validation=True):
    rows = []
    for epoch in range(1, num_epochs + 1):
        row = {'dataset': 'digits', 'epoch': epoch, 'step': 10 * epoch}
        row |= {'train_loss': 2 / epoch, 'train_accuracy': 1 - 1 / (epoch + 1)}
        row['validation_loss'] = 2.1 / epoch if validation else ''
        row['validation_accuracy'] = 0.9 - 0.8 / (epoch + 1) if validation else ''
        rows.append(row | {'learning_rate': 1e-3, 'seconds': 1.0})
    return rows


def predictions(num_classes, num_images=400):
    rng = np.random.default_rng(0)
    labels = np.arange(num_images) % num_classes
    logits = rng.normal(size=(num_images, num_classes))
    logits[np.arange(num_images), labels] += 2.5
    return labels, (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def texts(axes):
    return [text.get_text() for text in axes.texts]


def approximation_study():
    """What `approximation.study` returns, with errors that name their setting by their digits."""
    settings = {
        'draws': 4,
        'dim': 16,
        'num_features': 256,
        'length': 4096,
        'compared_scales': [0.5, 1.0],
        'feature_counts': [16, 32, 64, 128, 256, 512, 1024],
        'lengths': [64, 256, 1024, 4096],
        'scales': [0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0],
    }
    cells = {(r, 4096, s) for r in settings['feature_counts'] for s in (0.5, 1.0)}
    cells |= {(256, n, s) for n in settings['lengths'] for s in (0.5, 1.0)}
    cells |= {(256, 4096, s) for s in settings['scales']}
    rows = []
    for (r, n, s), (i, estimator), (j, projection) in itertools.product(
        sorted(cells), enumerate(approximation.ESTIMATORS), enumerate(approximation.PROJECTIONS)
    ):
        row = {'num_features': r, 'length': n, 'scale': s}
        row |= {'estimator': estimator, 'projection': projection}
        for k, error in enumerate(approximation.ERRORS):
            mean = s**2 * r**-0.5 * (1 + i) * (2 - j / 4) * (1 + k) * (1 + n / 1e6)
            row[error] = {'mean': mean, 'std': mean / 5, 'low': mean / 2, 'high': 2 * mean}
        rows.append(row)
    return {'settings': settings, 'rows': rows}


def model_speed_study():
    """What `model_speed.study` returns, with N and N² for times; JAX's ViT stops at 1,024."""
    lengths = [64, 256, 1024, 4096]
    model = {'width': 256, 'depth': 8, 'num_heads': 8}
    rows = []
    for length, which, (i, name) in itertools.product(
        lengths, model_speed.PASS_NAMES, enumerate(model_speed.CONTENDERS)
    ):
        row = {'length': length, 'pass': which, 'contender': name}
        if name == 'jax_exact' and length > 1024:
            rows.append(row | {'not_run': 'no memory'})
            continue
        seconds = (1 + i / 8) * 1e-4 * length * (1 + (name in model_speed.VITS) * length / 1024)
        seconds /= 3 if which == 'inference' else 1
        spread = timing.spread([0.9 * seconds, seconds, 1.2 * seconds])
        rows.append(row | {'seconds_per_image': spread})
    return {'settings': {'lengths': lengths, 'config': {'model': model}}, 'rows': rows}


def learnt_kernel(blocks, heads):
    """What `evaluate.learnt_kernel` returns, with curves that name their block and head."""
    angles = np.linspace(0, 180, 61)
    fall = 1 - angles / 180
    steepness = 1 + np.arange(blocks)[:, None, None] / 4 + np.arange(heads)[:, None] / 16
    return {
        'angles': angles,
        'query_norm': 1 + np.arange(blocks),
        'key_norm': 2.345 + np.arange(blocks),
        'learnt': fall**steepness,
        'initial': np.broadcast_to(fall**2, (blocks, heads, 61)),
        'arc_cosine': fall**2.1,
        'softmax': fall ** (3 + np.arange(blocks)[:, None]),
    }


def inspected(blocks, heads, num_classes=10, errors=20):
    """What `inspection.inspect_run` writes: numbers and arrays that name their block and head."""
    rng = np.random.default_rng(0)
    names = [f'sweet_peppers_{i}' if num_classes > 10 else f'a class {i}' for i in range(10)]
    quantities = {
        'total_variation': 0.25, 'uniform_total_variation': 0.5, 'kl_divergence': 0.75,
        'uniform_kl_divergence': 1, 'entropy': 1.25, 'exact_entropy': 1.5, 'correlation': 1.75,
    }  # fmt: skip
    pairs = [(names[i % 10], names[(i + 1 + i // 10) % 10], 500 - 9 * i) for i in range(12)]
    numbers = {
        'kernel': 'relu',
        'dataset': 'digits',
        'class_names': names,
        'attention': {'split': 'validation', 'images': list(range(10))},
        'gap': {
            'images': 128,
            'uniform_entropy': 2.5,
            'heads': [
                {
                    'block': block + 1,
                    'head': head + 1,
                    'mean': {n: v + block + head / 16 for n, v in quantities.items()},
                    'std': {n: v / 8 for n, v in quantities.items()},
                }
                for block in range(blocks)
                for head in range(heads)
            ],
        },
        'test_images': 10000,
        'test_errors': 1234,
        'misclassified': [
            {'index': i, 'true': names[i % 10], 'predicted': names[-1 - i % 9], 'probability': 1.0}
            for i in range(errors)
        ],
        'confused_pairs': [
            {'true': true, 'predicted': predicted, 'count': count, 'share': count / 1000}
            for true, predicted, count in pairs
        ],
        'left_out': {},
    }
    images = rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    arrays = {
        'images': images,
        'labels': np.arange(10, dtype=np.int32),
        'predicted': np.arange(10, dtype=np.int32)[::-1],
        'probability': np.linspace(0.1, 1, 10),
        'received': np.exp(rng.normal(size=(10, blocks, heads, 8, 8))),
        'rollout': np.exp(rng.normal(size=(10, 8, 8)) / 4),
        'misclassified_images': np.resize(images, (errors, 32, 32, 3)),
    }
    return numbers, arrays


@functools.cache
def visible_texts(name):
    """Every text that is drawn, with its box in pixels."""
    figure = all_figures()[name]
    figures.to_array(figure)
    beyond = set()  # Matplotlib keeps, and does not draw, ticks outside the limits.
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not low <= tick.get_loc() <= high:
                    beyond |= {tick.label1, tick.label2}
    return [
        (text.get_text(), text.get_window_extent(), text)
        for text in figure.findobj(matplotlib.text.Text)
        if text not in beyond and text.get_visible() and text.get_text().strip()
    ]


@functools.cache
def all_figures():
    names10 = [f'a class {i}' for i in range(10)]
    names100 = [f'pickup_truck_{i}' for i in range(100)]
    rng = np.random.default_rng(0)
    made = {
        'curves-1': figures.learning_curves(history(1), TITLE),
        'curves-3': figures.learning_curves(history(3), TITLE),
        'curves-100': figures.learning_curves(history(100), TITLE),
    }
    for names in (names10, names100):
        count = len(names)
        matrix = rng.integers(0, 20, (count, count)) + 100 * np.eye(count, dtype=int)
        labels, log_probabilities = predictions(count)
        made |= {
            f'confusion-{count}': figures.confusion(matrix, names, TITLE),
            f'per-class-{count}': figures.per_class(rng.uniform(size=count), names, TITLE),
            f'confidence-{count}': figures.confidence_histogram(log_probabilities, labels, TITLE),
        }
    rows = [
        {'kernel': kernel, 'dataset': 'digits', 'test_accuracy': accuracy,
         'train_seconds_per_epoch': 12.3, 'seed': seed}
        for kernel, (seed, accuracy) in itertools.product(
            figures.MODEL_COLOURS, enumerate((0.985, 0.993, 0.999))
        )
    ]  # fmt: skip
    made['comparison'] = figures.comparison(rows, 'All kernels on digits')
    trained = [
        run(kernel, 0.9, history=history(5), device=f'cpu (a long name, family {family}, 2 cores)')
        for family, kernel in enumerate(figures.MODEL_COLOURS)
    ]
    made['accuracy-1'] = figures.accuracy_by_time(trained[:1])
    made['accuracy-2'] = figures.accuracy_by_time([*trained[:2], trained[0]])
    for blocks, heads in ((2, 1), (6, 8)):
        made[f'kernels-{blocks}'] = figures.kernel_profiles(learnt_kernel(blocks, heads), TITLE)
    made |= figures.approximation_figures(approximation_study())
    made['model-speed'] = figures.model_speed(model_speed_study())
    models = [*figures.MODEL_COLOURS, 'num_features=16', 'pooling=gap,stem=patch']
    made['bands'] = figures.learning_bands(
        {model: [history(5), history(5)] for model in models}, TITLE
    )
    made['pareto'] = figures.pareto(
        [
            point(model, 100.0 + i, 0.8 + i / 100, (98.0 + i, 103.0 + i), 0.01)
            for i, model in enumerate(models)
        ],
        TITLE,
        'test_accuracy',
    )
    inside = figures.inspection_figures(*inspected(2, 4))
    made |= {f'inspect-{name}': figure for name, figure in inside.items()}
    inside = figures.inspection_figures(*inspected(8, 8, num_classes=100, errors=7))
    made |= {f'inspect-8-{name}': inside[name] for name in INSPECTED_DEEP}
    assert set(made) == set(FIGURES)  # None goes untested.
    return made


INSPECTED_DEEP = ('attention_8', 'rollout', 'attention_gap', 'misclassified', 'confused_pairs')
FIGURES = (
    'curves-1', 'curves-3', 'curves-100', 'confusion-10', 'per-class-10', 'confidence-10',
    'confusion-100', 'per-class-100', 'confidence-100', 'comparison', 'accuracy-1', 'accuracy-2',
    'approximation-features', 'approximation-length', 'approximation-scale',
    'approximation-projections', 'model-speed', 'kernels-2', 'kernels-6', 'bands', 'pareto',
    'inspect-attention_1', 'inspect-rollout',
    'inspect-attention_gap', 'inspect-misclassified', 'inspect-confused_pairs',
    'inspect-8-attention_8', 'inspect-8-rollout', 'inspect-8-attention_gap',
    'inspect-8-misclassified', 'inspect-8-confused_pairs',
)  # fmt: skip


# What holds for every figure


@pytest.mark.parametrize('name', FIGURES)
def test_texts_are_inside_and_do_not_overlap(name):
    """Catches labels that are cut off at the border or drawn over one another."""
    found = visible_texts(name)
    assert len(found) > 8
    width, height = all_figures()[name].bbox.size
    for text, box, _ in found:
        inside = -1 <= box.x0 and box.x1 <= width + 1 and -1 <= box.y0 and box.y1 <= height + 1
        assert inside, text
    upright = [(t, box) for t, box, artist in found if artist.get_rotation() == 0]
    for (one, a), (other, b) in itertools.combinations(upright, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        # Boxes hold some air above and below the letters.
        assert wide <= 0 or high <= 3, f'{one!r} over {other!r}'


@pytest.mark.parametrize('name', FIGURES)
def test_axes_are_labelled_and_letters_large_enough(name):
    """Catches an axis without a label and letters below 8 points: 11 pixels at 800 in width."""
    for axes in all_figures()[name].axes:
        shared = axes.get_shared_x_axes().get_siblings(axes)
        colorbar = axes.get_label() == '<colorbar>'
        assert colorbar or any(other.get_xlabel() for other in shared)
    assert min(text.get_size() for _, _, text in visible_texts(name)) >= 8


@pytest.mark.parametrize('name', FIGURES)
def test_arrays_are_rgb_images_of_readme_width(name):
    """Catches BGR or RGBA arrays, which TensorBoard shows in wrong colours or not at all."""
    image = figures.to_array(all_figures()[name])
    assert image.shape[1:] == (800, 3) and image.dtype == np.uint8
    assert image[0, 0].tolist() == [255, 255, 255] and image.min() < 100


def test_every_kernel_has_a_name_and_a_colour_of_its_own():
    """Catches two models in one colour, and a kernel that could be trained but not drawn."""
    okabe_ito = '000000 E69F00 56B4E9 009E73 F0E442 0072B2 D55E00 CC79A7'.split()
    colours = [colour.lstrip('#') for colour in figures.MODEL_COLOURS.values()]
    assert set(colours[:7]) <= set(okabe_ito)
    kernels = {*favor.KERNELS, 'mean', 'none'}  # The last two are no attention, to compare with.
    assert len(set(colours)) == len(kernels)
    assert list(figures.MODEL_COLOURS) == list(figures.MODEL_NAMES)
    assert set(figures.MODEL_NAMES) == kernels  # Every kernel can be trained.
    assert figures.model_name('exact') == 'ViT'
    assert figures.model_name('softmax') == 'Performer-EXP'
    with pytest.raises(BadInput, match="kernel is 'tanh'; allowed are 'exact', 'relu'"):
        figures.model_name('tanh')


def test_drawing_leaves_pyplot_and_the_backend_alone():
    """Catches a figure that needs a display or stays in pyplot's memory (a leak a run)."""
    code = (
        'import sys\n'
        'from performer_vit import figures\n'
        "rows = [{'epoch': 1, 'train_loss': 1.0, 'train_accuracy': 0.5}]\n"
        "figures.to_array(figures.learning_curves(rows, 'ViT on digits'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, '-c', code], check=True)


# Learning curves


def test_learning_curves_hold_the_history_in_percent_and_nats():
    """Catches the wrong column, a fraction on a percent axis, and epochs counted from 0."""
    rows = history(5)
    as_text = [{key: str(value) for key, value in row.items()} for row in rows]
    for given in (rows, as_text):
        loss, accuracy = figures.learning_curves(given, TITLE).axes
        assert (loss.get_ylabel(), accuracy.get_ylabel()) == ('loss (nats)', 'accuracy (%)')
        for axes, field, unit in ((loss, 'loss', 1), (accuracy, 'accuracy', 100)):
            for line, split in zip(axes.lines, ('train', 'validation'), strict=True):
                np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4, 5])
                expected = [unit * row[f'{split}_{field}'] for row in rows]
                np.testing.assert_allclose(line.get_ydata(), expected)


@pytest.mark.parametrize('absent', ['', None, 'nan'])
def test_learning_curves_without_validation_draw_training_alone(absent):
    """Catches a crash on the empty fields, and a legend for a curve that is not there."""
    rows = history(3)
    for row in rows:
        row['validation_loss'] = row['validation_accuracy'] = absent
    for axes in figures.learning_curves(rows, TITLE).axes:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ['training']


def test_one_epoch_has_one_tick_and_two_marks():
    """Catches a line without markers, invisible for one point, and epochs such as 1.05."""
    for axes in all_figures()['curves-1'].axes:
        ticks = [t for t in axes.get_xticks() if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
        assert ticks == [1]
        assert all(line.get_marker() in 'os' for line in axes.lines)


def test_learning_curves_refuse_an_empty_history():
    """Catches an empty picture for a run that never finished an epoch."""
    with pytest.raises(BadInput, match='at least one epoch'):
        figures.learning_curves([], TITLE)


# Confusion


def test_confusion_shows_shares_of_the_true_class():
    """Catches a normalisation by columns, a transposed image, and 0/0 in an empty row."""
    matrix = np.array([[3, 1, 0], [0, 199, 1], [0, 0, 0]])
    figure = figures.confusion(matrix, ['a', 'b', 'c'], TITLE)
    axes = figure.axes[0]
    shown = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shown, [[75, 25, 0], [0, 99.5, 0.5], [0, 0, 0]])
    cells = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): '75', (1, 0): '25', (1, 1): '100', (2, 1): '<1'}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('predicted class', 'true class')


def test_a_hundred_classes_name_the_most_frequent_confusions():
    """Catches the diagonal among the confusions, and true and predicted exchanged."""
    matrix = 50 * np.eye(100, dtype=int)
    matrix[3, 7] = 50
    matrix[8, 2] = 25
    _, ranking, _ = figures.confusion(matrix, [f'n{i}' for i in range(100)], TITLE).axes
    names = [label.get_text() for label in ranking.get_yticklabels()]
    assert names[:2] == ['n3 → n7', 'n8 → n2']
    assert texts(ranking)[:3] == ['50.0', '33.3', '0.0']


def test_confusion_refuses_names_that_do_not_fit():
    """Catches a matrix labelled with another data set's classes."""
    with pytest.raises(BadInput, match='there are 2 class names'):
        figures.confusion(np.eye(3, dtype=int), ['a', 'b'], TITLE)


def test_names_with_dollars_are_not_mathematics():
    """Catches class names of a user's folder that Matplotlib would parse and fail on."""
    names = ['$x_$', '$', 'a' * 60]
    figures.to_array(figures.confusion(np.eye(3, dtype=int), names, TITLE))
    figures.to_array(figures.per_class([0.5, 1, 0], names, '$ViT on a_folder'))


# Per-class accuracy


def test_per_class_bars_are_sorted_and_keep_their_names():
    """Catches sorted values beside unsorted names, and NaN taken as 0 in the mean."""
    axes = figures.per_class([0.2, np.nan, 0.9], ['low', 'none', 'high'], TITLE).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ['high', 'low', 'none']
    assert texts(axes) == ['90.0', '20.0', 'not measured']
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [90, 20, 0])
    assert '55.0 %' in axes.get_title(loc='left')


def test_per_class_of_a_hundred_shows_every_class_once():
    """Catches classes lost between the two columns."""
    shown = [
        label.get_text()
        for axes in all_figures()['per-class-100'].axes
        for label in axes.get_yticklabels()
    ]
    assert sorted(shown) == sorted(f'pickup_truck_{i}' for i in range(100))


# Confidence


def test_confidence_histogram_counts_right_and_wrong():
    """Catches right and wrong exchanged, and a confidence of 1 that falls out of the last bin."""
    probabilities = np.array([[1.0, 0.0], [0.92, 0.08], [0.42, 0.58], [0.3, 0.7]])
    log_probabilities = np.log(np.maximum(probabilities, 1e-30))
    log_probabilities[0, 0] = 1e-7  # rounding above certainty
    figure = figures.confidence_histogram(log_probabilities, np.array([0, 0, 0, 1]), TITLE)
    right, wrong = ([bar.get_height() for bar in axes.patches] for axes in figure.axes)
    assert (right[19], right[18], sum(right)) == (1, 1, 3)
    assert (wrong[11], sum(wrong)) == (1, 1)
    assert '3 of 4 images' in figure.axes[0].get_title(loc='left')


def test_confidence_histogram_of_a_model_without_mistakes():
    """Catches the mean of nothing: a warning, and NaN in a title."""
    log_probabilities = np.log(np.array([[0.9, 0.1], [0.2, 0.8]]))
    figure = figures.confidence_histogram(log_probabilities, np.array([0, 1]), TITLE)
    assert figure.axes[1].get_title(loc='left') == 'wrong predictions: 0 of 2 images'
    figures.to_array(figure)


# Comparison


def run(kernel, accuracy, seconds=2.0, **more):
    return {'kernel': kernel, 'dataset': 'digits', 'test_accuracy': accuracy,
            'train_seconds_per_epoch': seconds} | more  # fmt: skip


def test_comparison_gives_mean_and_sample_deviation_a_model():
    """Catches models mixed up, the deviation divided by n (0.82) and a mean of the times (4.00)."""
    rows = [run('relu', a, s) for a, s in ((0.90, 1.0), (0.91, 2.0), (0.92, 9.0))]
    rows.insert(1, run('exact', 0.80, 5.0))
    quality, cost = figures.comparison(rows, 'x').axes
    names = [label.get_text() for label in quality.get_yticklabels()]
    assert names == ['Performer-ReLU', 'ViT']
    assert texts(quality) == ['91.00 ± 1.00', '80.00']
    assert texts(cost) == ['2.00', '5.00']
    assert [line.get_xdata().tolist() for line in cost.lines] == [[1.0, 9.0]]
    colours = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in cost.patches]
    assert colours == [figures.MODEL_COLOURS[k].lower() for k in ('relu', 'exact')]


def test_comparison_keeps_settings_of_one_kernel_apart():
    """Catches 64 and 256 features averaged as though they were two seeds of one model."""
    rows = [run('softmax', 0.8 + r / 1e4, num_features=r, projection='iid') for r in (64, 256)]
    quality, _ = figures.comparison(rows, 'x').axes
    names = [label.get_text() for label in quality.get_yticklabels()]
    assert names == ['Performer-EXP\n64 features, iid', 'Performer-EXP\n256 features, iid']
    assert texts(quality) == ['80.64', '82.56']


def test_comparison_of_what_was_not_measured():
    """Catches a missing time or accuracy drawn as a 0."""
    quality, cost = figures.comparison([run('relu', None, None), run('elu', 0.5)], 'x').axes
    assert texts(quality) == ['not measured', '50.00']
    assert texts(cost) == ['not measured', '2.00']
    _, cost = figures.comparison([run('relu', 0.5, None)], 'x').axes
    assert texts(cost) == ['not measured']


def test_comparison_refuses_several_data_sets():
    """Catches digits beside CIFAR-10 in one ranking."""
    rows = [run('relu', 0.9), run('elu', 0.9) | {'dataset': 'cifar10'}]
    with pytest.raises(BadInput, match='cifar10, digits'):
        figures.comparison(rows, 'x')
    with pytest.raises(BadInput, match='none'):
        figures.comparison([], 'x')


def test_comparison_calls_variants_what_they_are_called():
    """Catches two variants of one kernel taken for two seeds of one model."""
    rows = [
        run('relu', 0.8, variant='relu'),
        run('relu', 0.9, variant='pooling=gap', validation_accuracy=0.7),
    ]
    quality, cost = figures.comparison(rows, 'x').axes
    names = [label.get_text() for label in quality.get_yticklabels()]
    assert names == ['Performer-ReLU', 'pooling=gap']
    colours = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in cost.patches]
    assert colours[0] == figures.MODEL_COLOURS['relu'].lower() != colours[1]
    quality, _ = figures.comparison(rows, 'x', 'validation_accuracy').axes
    assert texts(quality) == ['not measured', '70.00']
    assert quality.get_xlabel() == 'validation accuracy (%)'


def test_styles_tell_models_apart():
    """Catches a variant in the colour of a kernel beside it, and two that look the same."""
    models = ['relu', *(f'variant {i}' for i in range(20)), 'exact']
    styles = figures.model_styles(models)
    assert styles['relu']['color'] == figures.MODEL_COLOURS['relu']
    looks = [tuple(style.values()) for style in styles.values()]
    assert len(set(looks)) == len(models)
    colours = [styles[model]['color'] for model in models[1:-1]]
    assert figures.MODEL_COLOURS['relu'] not in colours


def test_a_variant_may_look_like_a_kernels_model():
    """Catches the base of an ablation of one kernel in the colour of another."""
    kernels = {'base': 'ftheta', 'kernel=relu': 'relu'}
    styles = figures.model_styles(['base', 'kernel=relu', 'other'], kernels)
    colours = [style['color'] for style in styles.values()]
    assert colours[:2] == [figures.MODEL_COLOURS[kernel] for kernel in kernels.values()]
    assert len({tuple(style.values()) for style in styles.values()}) == len(set(colours)) == 3


def test_long_names_of_variants_stay_apart():
    """Catches two legend entries cut to the same letters, and a tick label as wide as a figure."""
    names = [f'kernel=ftheta_mixture,theta_init=softmax,theta_sharing={s}' for s in ('all', 'none')]
    bands = figures.learning_bands({name: [history(2)] for name in names}, 'x')
    front = figures.pareto([point(name, 1.0, 0.5) for name in names], 'x', 'test_accuracy')
    rows = [run('ftheta_mixture', 0.9, variant=name) for name in names]
    ticks = figures.comparison(rows, 'x').axes[0].get_yticklabels()
    for shown in (legend(bands), legend(front)[:2], [tick.get_text() for tick in ticks]):
        assert [''.join(text.split()) for text in shown] == names
        assert max(len(line) for text in shown for line in text.split('\n')) <= 34


# Learning curves of several runs, and the front of accuracy and speed


def test_accuracy_is_drawn_against_the_minutes_of_its_machine():
    """Catches seconds, epochs that are not added up, and another machine's name on the axis."""
    rows = [
        run('relu', 0.9, history=[{'seconds': s, 'validation_accuracy': 0.5} for s in (60, 120)]),
        run('exact', 0.8, history=[{'seconds': 90, 'validation_accuracy': None}]),
    ]
    (axes,) = figures.accuracy_by_time([row | {'device': 'this'} for row in rows]).axes
    relu, star, _, other = axes.lines[:4]
    np.testing.assert_allclose(relu.get_xydata(), [[1, 50], [3, 50]])
    np.testing.assert_allclose([star.get_xydata(), other.get_xydata()], [[[3, 90]], [[1.5, 80]]])
    assert axes.get_xlabel() == 'training (minutes on this)'
    devices = [row | {'device': name} for row, name in zip(rows, 'ab', strict=True)]
    (axes,) = figures.accuracy_by_time(devices).axes
    assert axes.get_xlabel() == 'training (minutes on a and b)'


def test_bands_hold_mean_and_sample_deviation():
    """By NumPy. Catches the deviation divided by n, and epochs that only one run has."""
    runs = [history(3), history(4)]
    for epoch, other in zip(*runs, strict=False):
        other['validation_accuracy'] = epoch['validation_accuracy'] + 0.1
    loss, accuracy = figures.learning_bands({'relu': runs}, 'x').axes
    (line,) = accuracy.lines
    first = np.array([epoch['validation_accuracy'] for epoch in runs[0]])
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(line.get_ydata(), 100 * (first + 0.05))
    (band,) = accuracy.collections
    low, high = np.sort(band.get_paths()[0].vertices[:, 1])[[0, -1]]
    deviation = 100 * 0.1 / 2**0.5
    np.testing.assert_allclose(low, 100 * (first.min() + 0.05) - deviation)
    np.testing.assert_allclose(high, 100 * (first.max() + 0.05) + deviation)
    assert loss.get_ylabel() == 'validation loss (nats)'


def point(model, speed, accuracy, ends=(None, None), deviation=None):
    return {
        'model': model, 'images_per_second': speed, 'test_accuracy': accuracy,
        'images_per_second_low': ends[0], 'images_per_second_high': ends[1],
        'test_accuracy_deviation': deviation,
    }  # fmt: skip


def test_the_pareto_front_is_what_nothing_beats():
    """By hand. Catches a front of the slow and bad, and a point that an equal speed beats."""
    rows = [
        point('exact', 100, 0.90, (90, 130), 0.02), point('relu', 200, 0.80),
        point('gelu', 150, 0.70), point('elu', 200, 0.75), point('softmax', 150, 0.85),
        point('none', 300, None),
    ]  # fmt: skip
    (axes,) = figures.pareto(rows, 'x', 'test_accuracy').axes
    front = next(line for line in axes.lines if line.get_linestyle() == '--')
    np.testing.assert_allclose(front.get_xydata(), [[100, 90], [150, 85], [200, 80]])
    across, up = (bar.get_segments()[0] for bar in axes.containers[0][2])
    np.testing.assert_allclose(across, [[90, 90], [130, 90]])
    np.testing.assert_allclose(up, [[100, 88], [100, 92]])


# Errors of the estimators of softmax attention


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    ('name', 'field'),
    [
        ('approximation-features', 'num_features'),
        ('approximation-length', 'length'),
        ('approximation-scale', 'scale'),
    ],
)
def test_approximation_lines_hold_the_means_and_bands_the_standard_errors(name, field):
    """Catches a line of another estimator, projection, scale or error, and a wrong band."""
    study = approximation_study()
    figure = all_figures()[name]
    panels = [('attention_error', 0.5), ('attention_error', 1.0)]
    if field == 'scale':
        panels = [(error, None) for error in approximation.ERRORS]
    for axes, (error, scale) in zip(figure.axes, panels, strict=True):
        values, rows = approximation.varied(study, field, scale)
        drawn = itertools.product(approximation.ESTIMATORS, ('gaussian', 'orthogonal'))
        for (estimator, projection), line, band in zip(
            drawn, axes.lines, axes.collections, strict=True
        ):
            means = {
                row[field]: row[error]['mean']
                for row in rows
                if (row['estimator'], row['projection']) == (estimator, projection)
            }
            np.testing.assert_array_equal(line.get_xdata(), values)
            np.testing.assert_allclose(line.get_ydata(), [means[value] for value in values])
            assert line.get_color() == figures.MODEL_COLOURS[estimator]
            assert line.get_linestyle() == ('--' if projection == 'gaussian' else '-')
            heights = band.get_paths()[0].vertices[:, 1]
            # std / √draws = mean / 5 / 2.
            last = means[values[-1]]
            assert any(np.isclose(heights, 0.9 * last)) and any(np.isclose(heights, 1.1 * last))
        assert axes.get_xscale() == axes.get_yscale() == 'log'


def test_approximation_legends_name_every_estimator_and_projection():
    """Catches a colour or a line style that no one can read."""
    for name in ('approximation-features', 'approximation-length', 'approximation-scale'):
        names = legend(all_figures()[name])
        assert set(approximation.ESTIMATORS.values()) < set(names)
        assert names[4:] == ['orthogonal rows', 'independent rows', '± standard error']
    figure = all_figures()['approximation-projections']
    assert len(legend(figure)) == len(approximation.PROJECTIONS)
    titles = [axes.get_title(loc='left') for axes in figure.axes]
    assert titles == [f'{name} features' for name in approximation.ESTIMATORS.values()]
    assert set(figures.ESTIMATOR_MARKERS) == set(approximation.ESTIMATORS)
    assert len(set(figures.ESTIMATOR_MARKERS.values())) == len(approximation.ESTIMATORS)
    assert tuple(figures.PROJECTION_STYLES) == approximation.PROJECTIONS


def test_projections_are_drawn_as_ratios_to_independent_rows():
    """Catches a ratio upside down, or to another estimator's independent rows."""
    for axes in all_figures()['approximation-projections'].axes:
        for j, line in enumerate(axes.lines):
            np.testing.assert_allclose(line.get_ydata(), (2 - j / 4) / 2)


def test_approximation_writes_its_figures_small(tmp_path):
    """Catches a figure that is not written, of the wrong width, or too long for a repository."""
    paths = figures.approximation(approximation_study(), tmp_path)
    assert sorted(paths) == sorted(tmp_path.iterdir()) and len(paths) == 4
    for path in paths:
        assert path.suffix == '.png' and path.stem.startswith('approximation-')
        assert imread(path).shape[1] == 1600 and path.stat().st_size < 150_000


def test_fewer_colours_change_a_figure_little(tmp_path):
    """Catches a palette that loses a line's colour, and one that is not applied."""
    figure = all_figures()['approximation-features']
    figures.save(figure, tmp_path / 'all.png')
    figures.save(figure, tmp_path / 'few.png', num_colours=128)
    every, few = (imread(tmp_path / f'{name}.png')[..., :3] for name in ('all', 'few'))
    assert every.shape == few.shape and np.abs(every - few).mean() < 0.002
    weights = [65536, 256, 1]
    assert len(np.unique(few @ weights)) <= 128 < len(np.unique(every @ weights))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['all.png', 'few.png']


# The learnt kernel


@pytest.mark.parametrize(('blocks', 'heads'), [(2, 1), (6, 8)])
def test_panels_hold_the_kernels_of_their_block(blocks, heads):
    """Catches blocks exchanged, heads left out, and trained and initial kernels in one style."""
    saved = learnt_kernel(blocks, heads)
    figure = all_figures()[f'kernels-{blocks}']
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == blocks
    for block, axes in enumerate(shown):
        expected = [
            *saved['learnt'][block], *saved['initial'][block], saved['arc_cosine'],
            saved['softmax'][block],
        ]  # fmt: skip
        for line, values in zip(axes.lines, expected, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), saved['angles'])
            np.testing.assert_array_equal(line.get_ydata(), values)
        styles = [line.get_linestyle() for line in axes.lines]
        assert styles == ['-'] * heads + [':'] * heads + ['--', '-.']
        described = f"block {block + 1}\n‖q'‖ {block + 1}, ‖k'‖ {block + 2.345:.2g}"
        assert axes.get_title(loc='left') == described
    names = legend(figure)
    assert names[0] == ('learnt' if heads == 1 else 'learnt, a line a head')
    assert len(names) == 4


# Time of whole models


def test_models_keep_their_colours_and_lines_hold_the_medians():
    """Catches the fastest round drawn, passes exchanged, and a model in another's colour."""
    study = model_speed_study()
    figure = all_figures()['model-speed']
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == list(model_speed.PASS_NAMES.values())
    for which, axes in zip(model_speed.PASS_NAMES, figure.axes, strict=True):
        assert axes.get_xscale() == axes.get_yscale() == 'log'
        lines = [container.lines[0] for container in axes.containers]
        for name, line in zip(model_speed.CONTENDERS, lines, strict=True):
            expected = [
                (row['length'], row['seconds_per_image']['median'])
                for row in study['rows']
                if (row['pass'], row['contender']) == (which, name) and 'not_run' not in row
            ]
            np.testing.assert_allclose(line.get_xydata(), expected)
            kernel = 'exact' if name == 'jax_exact' else name
            assert line.get_color() == figures.MODEL_COLOURS[kernel]
    assert tuple(figures.MODEL_LINES) == model_speed.CONTENDERS
    styles = {(line, marker) for _, line, marker, _ in figures.MODEL_LINES.values()}
    assert len(styles) == len(figures.MODEL_LINES)  # Told apart without colours too.
    assert legend(figure)[:3] == ['ViT', 'ViT, attention of jax.nn', 'Performer-ReLU']


def test_a_model_of_one_panel_is_in_the_legend():
    """Catches a line that no one can name, of a model whose training did not fit in memory."""
    study = model_speed_study()
    study['rows'] = [
        row for row in study['rows'] if (row['pass'], row['contender']) != ('training', 'jax_exact')
    ]
    assert 'ViT, attention of jax.nn' in legend(figures.model_speed(study))


# Looking into a model


def pictures(axes):
    """The images of a mosaic by (row, column) of its place."""
    extents = [image.get_extent() for image in axes.images]
    places = [(top, left) for left, _, _, top in extents]
    return dict(zip(places, axes.images, strict=True))


def test_attention_maps_lie_at_their_head_and_image():
    """Catches images, blocks or heads exchanged, and pages that leave blocks out or draw two."""
    numbers, arrays = inspected(3, 5)
    drawn = figures.inspection_figures(numbers, arrays)
    assert [name for name in drawn if name.startswith('attention_')] == [
        'attention_1', 'attention_3', 'attention_gap',
    ]  # fmt: skip
    for page, blocks in (('attention_1', (0, 1)), ('attention_3', (2,))):
        axes, bar = drawn[page].axes
        shown = pictures(axes)
        assert len(shown) == 10 * (1 + 5 * len(blocks))
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels[0] == 'image' and labels[-1] == f'block {blocks[-1] + 1}, head 5'
        for image in range(10):
            np.testing.assert_array_equal(shown[0, image].get_array(), arrays['images'][image])
            for row, (block, head) in enumerate(itertools.product(blocks, range(5))):
                expected = arrays['received'][image, block, head]
                np.testing.assert_array_equal(shown[row + 1, image].get_array(), expected)
        assert 'multiples of uniform attention' in bar.get_xlabel()


def test_attention_of_nothing_is_drawn_as_little_and_uniform_attention_is_white():
    """Catches zeros left blank, which read as uniform attention, and a scale not centred on 1."""
    numbers, arrays = inspected(1, 1)
    arrays['received'][0] = 0
    arrays['received'][1] = 1
    axes, _ = figures.inspection_figures(numbers, arrays)['attention_1'].axes
    nothing, uniform = (pictures(axes)[1, column] for column in (0, 1))
    colours = [image.cmap(image.norm(image.get_array())) for image in (nothing, uniform)]
    assert colours[0].min() < 0.1 and colours[1].min() > 0.95
    assert not np.ma.is_masked(nothing.norm(nothing.get_array()))


def test_rollouts_lie_over_their_images_and_name_the_prediction():
    """Catches a heat map over another image, and true and predicted class exchanged."""
    numbers, arrays = inspected(2, 4)
    axes, _ = figures.inspection_figures(numbers, arrays)['rollout'].axes
    colour, grey, heat = (axes.images[start::3] for start in range(3))
    for i in range(10):
        np.testing.assert_array_equal(colour[i].get_array(), arrays['images'][i])
        np.testing.assert_allclose(grey[i].get_array(), arrays['images'][i].mean(axis=-1))
        np.testing.assert_array_equal(heat[i].get_array(), arrays['rollout'][i])
        assert heat[i].get_extent() == grey[i].get_extent()
        assert texts(axes)[2 * i : 2 * i + 2] == [f'a class {i}', f'→ a class {9 - i}, {i + 1}0%']
    # Clear where attention is uniform: the image is seen.
    assert heat[0].cmap(0.5)[3] < 0.35 < 0.9 < heat[0].cmap(0.0)[3]


@pytest.mark.parametrize(('blocks', 'heads'), [(2, 4), (8, 8)])
def test_the_gap_holds_the_means_and_deviations_of_each_head(blocks, heads):
    """Catches quantities in the wrong panel, heads exchanged, and colours of another model."""
    numbers, arrays = inspected(blocks, heads)
    figure = figures.inspection_figures(numbers, arrays)['attention_gap']
    rows = numbers['gap']['heads']
    panels = [
        ('total variation distance', ['total_variation', 'uniform_total_variation']),
        ('KL divergence (nats)', ['kl_divergence', 'uniform_kl_divergence']),
        ('entropy (nats)', ['entropy', 'exact_entropy']),
        ('correlation', ['correlation']),
    ]
    for axes, (label, names) in zip(figure.axes, panels, strict=True):
        assert axes.get_ylabel() == label
        places = []
        for bars, name in zip(axes.containers, names, strict=True):
            points, _, (lines,) = bars.lines
            np.testing.assert_allclose(points.get_ydata(), [row['mean'][name] for row in rows])
            low, high = np.array([segment[:, 1] for segment in lines.get_segments()]).T
            np.testing.assert_allclose((high - low) / 2, [row['std'][name] for row in rows])
            assert np.all(np.diff(points.get_xdata()) > 0)
            places.append(points.get_xdata())
        assert axes.containers[0].lines[0].get_color() == figures.MODEL_COLOURS['relu']
    entropies = figure.axes[2]
    assert entropies.containers[1].lines[0].get_color() == figures.MODEL_COLOURS['exact']
    (uniform,) = (line for line in entropies.lines if line.get_linestyle() == '--')
    assert uniform.get_ydata()[0] == 2.5 < entropies.get_ylim()[1]
    assert legend(figure)[:2] == ['Performer-ReLU, implied', 'softmax attention']


def test_a_gap_that_is_not_known_leaves_a_hole():
    """Catches a correlation with a constant, which is none, drawn as 0 or as a crash."""
    numbers, arrays = inspected(1, 2)
    numbers['gap']['heads'][1]['mean']['correlation'] = None
    numbers['gap']['heads'][1]['std']['correlation'] = None
    figure = figures.inspection_figures(numbers, arrays)['attention_gap']
    (bars,) = figure.axes[3].containers
    assert np.isnan(bars.lines[0].get_ydata()).tolist() == [False, True]
    figures.to_array(figure)


def test_errors_keep_their_images_and_names():
    """Catches images beside the names of others, and bars with the counts of other pairs."""
    numbers, arrays = inspected(2, 4, errors=7)
    drawn = figures.inspection_figures(numbers, arrays)
    (axes,) = drawn['misclassified'].axes
    for i, image in enumerate(axes.images):
        np.testing.assert_array_equal(image.get_array(), arrays['misclassified_images'][i])
        error = numbers['misclassified'][i]
        found = texts(axes)[2 * i : 2 * i + 2]
        assert found == [error['true'], f'→ {error["predicted"]}, 100%']
    assert len(axes.images) == 7
    assert axes.get_xlabel().startswith('7 of 1,234 errors on 10,000 test images')
    (axes,) = drawn['confused_pairs'].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == 'a class 0 → a class 1' and texts(axes)[0] == '500 (50.0%)'
    assert [bar.get_width() for bar in axes.patches] == [500 - 9 * i for i in range(12)]


def test_what_is_left_out_is_not_drawn():
    """Catches a crash, or an empty figure, where there is no attention and no error."""
    numbers, _ = inspected(2, 4, errors=0)
    numbers |= {'attention': None, 'gap': None, 'confused_pairs': []}
    assert figures.inspection_figures(numbers, {}) == {}
    drawn = figures.inspection_figures(numbers | {'kernel': 'ftheta'}, {}, learnt_kernel(2, 1))
    assert list(drawn) == ['learnt_kernel']


# Files


def test_draw_all_draws_from_the_saved_files(tmp_path, monkeypatch):
    """Catches a figure that is not written, is empty, or is of the wrong width, and a learnt kernel
    that is not drawn or is not the saved one.
    """
    labels, log_probabilities = predictions(10)
    results = {'dataset': 'cifar10', 'kernel': 'elu', 'class_names': [str(i) for i in range(10)]}
    (tmp_path / 'results.json').write_text(json.dumps(results))
    np.savez(tmp_path / 'test_predictions.npz', labels=labels, log_probabilities=log_probabilities)
    workdir.write_history(tmp_path / 'history.csv', history(2, validation=False))
    figures.draw_all(tmp_path)
    paths = list((tmp_path / 'figures').iterdir())
    names = {'confusion_matrix', 'per_class_accuracy', 'confidence', 'learning_curves'}
    assert {path.stem for path in paths} == names
    for path in paths:
        assert path.suffix == '.png'
        image = imread(path)
        assert image.shape[1] == 1600 and image.std() > 0.05
    assert figures.run_title(results) == 'Performer-ELU on CIFAR-10'

    (tmp_path / 'results.json').write_text(json.dumps({**results, 'kernel': 'ftheta'}))
    saved, drawn = learnt_kernel(2, 1), {}
    workdir.write_arrays(tmp_path / 'learnt_kernel.npz', saved)
    monkeypatch.setattr(figures, 'save_all', lambda made, _: drawn.update(made))
    figures.draw_all(tmp_path)
    assert drawn.keys() == names | {'learnt_kernel'}
    first, _ = drawn['learnt_kernel'].axes
    np.testing.assert_array_equal(first.lines[0].get_ydata(), saved['learnt'][0, 0])
    assert first.lines[0].get_color() == figures.MODEL_COLOURS['ftheta']
    assert drawn['learnt_kernel'].get_suptitle().startswith('Performer-fθ on CIFAR-10')


def test_draw_all_says_what_is_missing(tmp_path):
    """Catches a bare FileNotFoundError for the workdir of an unfinished run."""
    with pytest.raises(BadInput, match='results.json does not exist.*give the directory'):
        figures.draw_all(tmp_path)
    (tmp_path / 'results.json').write_text('{}')
    with pytest.raises(BadInput, match='test_predictions.npz does not exist.*final test'):
        figures.draw_all(tmp_path)


def test_names_that_do_not_fit_beside_one_another():
    """Catches a legend cut off at both ends, and a name with $ set as mathematics, or refused."""
    names = [f'a variant of {i} words and $x^{{$ more' for i in range(7)]
    figure = figures.Figure(figsize=(8, 4), dpi=100, layout='constrained')
    figures.FigureCanvasAgg(figure)
    axes = figure.subplots()
    handles = [figures.Line2D([], []) for _ in names]
    figures.legend_below(figure, handles, names, columns=4)
    figures.to_array(figure)
    (legend,) = figure.legends
    extent = legend.get_window_extent()
    assert 0 <= extent.x0 and extent.x1 <= 800
    assert [text.get_text() for text in legend.get_texts()] == names
    # As high as with four columns, which leaves the panel its height.
    assert figure.get_figheight() > 4 and axes.get_window_extent().height > 250
