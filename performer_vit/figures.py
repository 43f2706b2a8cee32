"""Every figure of the project, drawn from saved numbers alone.

A figure is 800 pixels wide, the width of a README, and is saved at twice that resolution. Colours
are those of Okabe and Ito (2008, "Color Universal Design", https://jfly.uni-koeln.de/color), which
people with any colour vision tell apart: a model has the same one in every figure, and what differs
within a model (training and validation, right and wrong) differs in line, marker or hatching.

Figures are built as `Figure` objects on the Agg canvas, so that drawing needs no display and leaves
no global state behind.
"""

import itertools
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image

from performer_vit import files
from performer_vit import workdir as run_directory
from performer_vit.approximation import ERRORS, ESTIMATORS, varied
from performer_vit.errors import BadInput, choose

# The study's models in the colours of Okabe and Ito, the other kernels in those of Tol's muted
# scheme; both are told apart by colour-blind readers.
MODEL_COLOURS = {
    'exact': '#000000',
    'relu': '#0072B2',
    'gelu': '#E69F00',
    'softmax': '#D55E00',
    'elu': '#009E73',
    'ftheta': '#CC79A7',
    'ftheta_mixture': '#56B4E9',
    'softmax_hyperbolic': '#44AA99',
    'softmax_optimal': '#882255',
    'softmax_trigonometric': '#332288',
    'relu_squared': '#AA4499',
    'sigmoid': '#999933',
    'softplus': '#CC6677',
    'exp': '#DDCC77',
    'identity': '#777777',
    'cosine': '#117733',
    'mean': '#A6761D',
    'none': '#B0B0B0',
}
MODEL_NAMES = {
    'exact': 'ViT',
    'relu': 'Performer-ReLU',
    'gelu': 'Performer-GELU',
    'softmax': 'Performer-EXP',
    'elu': 'Performer-ELU',
    'ftheta': 'Performer-fθ',
    'ftheta_mixture': 'Performer-fθ-mixture',
    'softmax_hyperbolic': 'Performer-EXP±',
    'softmax_optimal': 'Performer-FAVOR++',
    'softmax_trigonometric': 'Performer-trigonometric',
    'relu_squared': 'Performer-ReLU²',
    'sigmoid': 'Performer-sigmoid',
    'softplus': 'Performer-softplus',
    'exp': 'Performer-exp(Wx)',
    'identity': 'Performer-identity',
    'cosine': 'Performer-cosine',
    'mean': 'Mean pooling for attention',
    'none': 'No attention',
}
# The study's models have a marker of their own too, since their lines may be close.
MODEL_MARKERS = dict(zip(MODEL_COLOURS, itertools.cycle('os^DvPX'), strict=False))
# For what is no kernel: the same colours, in an order that sets neighbours apart.
VARIANT_COLOURS = (
    '#0072B2', '#E69F00', '#009E73', '#D55E00', '#56B4E9', '#CC79A7', '#332288', '#999933',
)  # fmt: skip
VARIANT_STYLES = (('o', '-'), ('s', '--'), ('^', ':'), ('D', '-.'))
# For figures of no model in particular: a grey that no model has.
NEUTRAL = '#595959'

DATASET_NAMES = {'cifar10': 'CIFAR-10', 'cifar100': 'CIFAR-100'}

# Estimators of the softmax kernel.
ESTIMATOR_MARKERS = {
    'softmax_trigonometric': 's',
    'softmax': 'o',
    'softmax_hyperbolic': 'v',
    'softmax_optimal': '^',
}
PROJECTION_STYLES = {
    'gaussian': ('--', 'o'),
    'orthogonal': ('-', 'o'),
    'simplex': (':', 's'),
    'hadamard': ('-.', '^'),
}
PROJECTION_NAMES = {
    'gaussian': 'independent rows',
    'orthogonal': 'orthogonal rows',
    'simplex': 'simplex rows',
    'hadamard': 'Hadamard rows',
}

PIXELS_AN_INCH = 100  # 8 inches are the width of a README
LONGEST_NAME = 20
MOST_ANNOTATED = 12  # classes whose confusions fit into the cells as numbers
MOST_NAMED = 30  # classes whose names fit along the axes of a confusion matrix
ROWS_A_COLUMN = 50  # bars of one column of the per-class figure
BAND = 0.12  # opacity of a band
# Keeps a line visible where it crosses black bars.
RIM = (withStroke(linewidth=3, foreground='white'),)
MOST_ERROR = 30  # where the errors of estimators leave their figure
MOST_PANELS = 4  # blocks of a model beside one another
LONGEST_LINE = 34  # Characters of a variant's name in a line of a legend.
MOST_CONFUSED = 12  # pairs named beside a confusion matrix without names


def model_name(kernel: str) -> str:
    """The name of the model with this attention kernel, such as 'Performer-ReLU' for 'relu'.

    Raises:
        BadInput: if the kernel is unknown.
    """
    choose('kernel', kernel, MODEL_NAMES)
    return MODEL_NAMES[kernel]


def variant(row: Mapping) -> str:
    """What a run is a run of: its variant in a comparison of configs, else its kernel."""
    return row.get('variant', row['kernel'])


def variant_name(name: str) -> str:
    """The model's name for the name of a kernel; other variants are called what they are."""
    return MODEL_NAMES.get(name, name)


def _wrapped(name: str) -> str:
    """The name of a variant in lines of a legend, which end behind commas where they can."""
    text = _short(variant_name(name).replace(',', ', '), 4 * LONGEST_LINE)
    return '\n'.join(textwrap.wrap(text, LONGEST_LINE, break_on_hyphens=False))


def model_styles(
    models: Sequence[str], kernels: Mapping[str, str] | None = None
) -> dict[str, dict[str, str]]:
    """Colour, marker and line style of each model: of a kernel's name its own colour and no others.

    What is no kernel gets colours that no kernel among the models has and, where there are none
    left, used ones with another marker and line.

    Args:
        models: the names of kernels or variants.
        kernels: of variants which look like the model of a kernel, that kernel.
    """
    kernels = {model: model for model in models if model in MODEL_COLOURS} | dict(kernels or {})
    taken = [MODEL_COLOURS[kernel].lower() for kernel in kernels.values()]
    free = [colour for colour in VARIANT_COLOURS if colour.lower() not in taken]
    looks = [(colour, *style) for style in VARIANT_STYLES for colour in free]
    looks += [(colour, *style) for style in VARIANT_STYLES[1:] for colour in VARIANT_COLOURS]
    others = itertools.cycle(dict.fromkeys(looks))
    styles = {}
    for model in models:
        if model in kernels:
            kernel = kernels[model]
            colour, marker, line = MODEL_COLOURS[kernel], MODEL_MARKERS[kernel], '-'
        else:
            colour, marker, line = next(others)
        styles[model] = {'color': colour, 'marker': marker, 'linestyle': line}
    return styles


def learning_curves(history: Sequence[dict], title: str, *, colour: str = NEUTRAL) -> Figure:
    """Loss (nats) and accuracy (%) of training and validation against the epoch.

    Args:
        history: the rows of history.csv, as numbers or as text: `epoch`, `train_loss`,
            `train_accuracy` and, where there is a validation split, `validation_loss` and
            `validation_accuracy`. Accuracies are fractions. A value that is missing, None, '' or
            NaN leaves a gap.
        title: what the figure is about, the model and the data set.
        colour: the model's, from `MODEL_COLOURS`.

    Raises:
        BadInput: if there is no row.
    """
    if not history:
        raise BadInput('the history has no rows; a learning curve needs at least one epoch.')
    figure = _figure(title, height=3.7)
    epochs = [int(row['epoch']) for row in history]
    marks = len(epochs) <= 30  # beyond, markers run into one another
    panels = (
        ('loss', 1, 'loss (nats)'),
        ('accuracy', 100, 'accuracy (%)'),
    )
    for axes, (quantity, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for split, line, marker in (('train', '--', 'o'), ('validation', '-', 's')):
            values = [unit * _number(row.get(f'{split}_{quantity}')) for row in history]
            if all(map(math.isnan, values)):
                continue
            axes.plot(
                epochs,
                values,
                line,
                color=colour,
                marker=marker if marks else None,
                markersize=5,
                # Hollow for training: told apart even where both lines are one point.
                markerfacecolor='white' if split == 'train' else colour,
                linewidth=1.8,
                label='training' if split == 'train' else 'validation',
            )
        axes.set_xlabel('epoch')
        axes.set_ylabel(label)
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axes.legend(frameon=False, fontsize=10)
        _tidy(axes)
    return figure


def learning_bands(
    histories: Mapping[str, Sequence[Sequence[dict]]],
    title: str,
    styles: Mapping[str, Mapping] | None = None,
) -> Figure:
    """Validation loss (nats) and accuracy (%) an epoch: means over runs, and their spread.

    Args:
        histories: for each model the histories of its runs, seeds or folds. A line is their mean, a
            band ± their standard deviation (n - 1), both as far as all runs of a model came.
        title: what was run, with the data set.
        styles: from `model_styles`, which are found here where they are not given.
    """
    labels = [_wrapped(model) for model in histories]
    # Three names a row below the panels.
    figure = _figure(title, height=4 + sum(label.count('\n') + 1 for label in labels) / 12)
    loss, accuracy = figure.subplots(1, 2)
    styles = styles or model_styles(list(histories))
    numbers = [len(runs) for runs in histories.values()]
    most = max(numbers)
    for model, runs in histories.items():
        common = min(len(run) for run in runs)
        epochs = np.arange(1, common + 1)
        for axes, field, scale in (
            (loss, 'validation_loss', 1),
            (accuracy, 'validation_accuracy', 100),
        ):
            values = scale * np.array([
                [_number(epoch[field]) for epoch in run[:common]] for run in runs
            ])  # fmt: skip
            mean = values.mean(axis=0)
            axes.plot(epochs, mean, **styles[model], markersize=4.5, linewidth=1.4)
            if len(runs) > 1:
                spread = values.std(axis=0, ddof=1)
                axes.fill_between(
                    epochs, mean - spread, mean + spread,
                    color=styles[model]['color'], alpha=BAND, linewidth=0,
                )  # fmt: skip
    loss.set_ylabel('validation loss (nats)')
    accuracy.set_ylabel('validation accuracy (%)')
    for axes in (loss, accuracy):
        axes.set_xlabel('epoch')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _tidy(axes)
    handles = [Line2D([], [], **styles[model], linewidth=2, markersize=5) for model in histories]
    if most > 1:
        handles.append(Patch(color=NEUTRAL, alpha=2 * BAND))
        runs = f'{most} runs' if min(numbers) == most else f'up to {most} runs'
        labels.append(f'± standard deviation of {runs}')
    legend_below(figure, handles, labels, columns=3)
    return figure


def confusion(
    matrix: np.ndarray,
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """The confusion matrix, each row as shares of its true class (%).

    The colour scale goes with the square root of the share, so that rare confusions can be seen
    beside the diagonal. Up to 12 classes the cells hold their numbers, up to 30 the axes hold the
    names. Beyond, names would not be legible: the axes count classes and a second panel names the
    most frequent confusions.

    Args:
        matrix: (K, K) counts, rows true classes, columns predicted ones.
        class_names: the K names.
        title: what the figure is about, the model and the data set.

    Raises:
        BadInput: if the matrix is not (K, K).
    """
    matrix = np.asarray(matrix)
    names = [_short(name) for name in class_names]
    count = len(names)
    if matrix.shape != (count, count):
        raise BadInput(
            f'the confusion matrix has shape {matrix.shape} and there are {count} class names; '
            'allowed is one row and one column a name. Pass the names of the same classes.'
        )
    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)

    named = count <= MOST_NAMED
    figure = _figure(title, height=6.6 if named else 10)
    if named:
        axes = figure.subplots()
    else:
        axes, ranking = figure.subplots(2, 1, height_ratios=(2.1, 1))
        _most_confused(ranking, share, names)
    image = axes.imshow(share, cmap='Blues', norm=PowerNorm(0.5, 0, 100), interpolation='nearest')
    bar = figure.colorbar(image, ax=axes, ticks=(0, 1, 5, 10, 25, 50, 75, 100), shrink=0.9)
    bar.set_label('share of the true class (%)', fontsize=11)
    bar.outline.set_visible(False)
    axes.set_title(f'confusion matrix, {matrix.sum():,} images', fontsize=11)
    if named:
        size = 10 if count <= 20 else 8
        axes.set_xticks(
            range(count), names, rotation=45, ha='right', rotation_mode='anchor', parse_math=False
        )
        axes.set_yticks(range(count), names, parse_math=False)
        axes.tick_params(labelsize=size, length=0)
        axes.set_xlabel('predicted class', fontsize=11)
        axes.set_ylabel('true class', fontsize=11)
    else:
        axes.set_xlabel('predicted class (its number, from 0)', fontsize=11)
        axes.set_ylabel('true class (its number, from 0)', fontsize=11)
        axes.tick_params(labelsize=10)
    if count <= MOST_ANNOTATED:
        for row, column in np.argwhere(matrix > 0):
            value = share[row, column]
            axes.text(
                column,
                row,
                f'{value:.0f}' if value >= 1 else '<1',
                ha='center',
                va='center',
                fontsize=10,
                color='white' if value > 35 else 'black',
            )
    axes.spines[:].set_visible(False)
    return figure


def _most_confused(axes: Axes, share: np.ndarray, names: list[str]) -> None:
    """Bars of the largest shares off the diagonal, by the names of their classes."""
    off = share - np.diag(share.diagonal())
    order = np.argsort(-off, axis=None, kind='stable')[:MOST_CONFUSED]
    pairs = [np.unravel_index(index, off.shape) for index in order]
    values = [off[pair] for pair in pairs]
    _bars(
        axes,
        [f'{names[true]} → {names[predicted]}' for true, predicted in pairs],
        values,
        NEUTRAL,
        limit=1.15 * max(*values, 1),
    )
    axes.set_title('most frequent confusions, true → predicted', fontsize=11)
    axes.set_xlabel('share of the true class (%)')


def per_class(
    accuracies: np.ndarray,
    class_names: Sequence[str],
    title: str,
    *,
    split: str = 'test',
    colour: str = NEUTRAL,
) -> Figure:
    """The accuracy (%) of each class as bars, the best on top.

    A dashed line marks the mean over the classes. More than 50 classes go into two columns.

    Args:
        accuracies: (K,) fractions; NaN or None for a class without images, which is left out of
            the mean.
        class_names: the K names.
        title: what the figure is about, the model and the data set.
        split: whose accuracies they are.
        colour: the model's, from `MODEL_COLOURS`.

    Raises:
        BadInput: if there is not one name a class.
    """
    percent = 100 * np.array([_number(value) for value in accuracies])
    names = [_short(name) for name in class_names]
    if len(names) != len(percent):
        raise BadInput(
            f'there are {len(percent)} accuracies and {len(names)} class names; allowed is one '
            'name an accuracy. Pass the names of the same classes.'
        )
    order = np.argsort(-percent, kind='stable')  # NaN comes last
    columns = 1 if len(names) <= ROWS_A_COLUMN else 2
    parts = np.array_split(order, columns)
    known = percent[~np.isnan(percent)]

    figure = _figure(title, height=1.5 + 0.17 * len(parts[0]) + (1 if columns == 1 else 0))
    for axes, part in zip(figure.subplots(1, columns, squeeze=False)[0], parts, strict=True):
        _bars(axes, [names[i] for i in part], percent[part], colour, limit=112)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel(f'{split} accuracy (%)')
        axes.set_ylabel('class')
        if known.size:
            _mark_mean(axes, known.mean())
    if known.size:
        figure.axes[0].set_title(
            f'per-class accuracy; dashed: mean of the classes, {known.mean():.1f} %',
            fontsize=11,
            loc='left',
        )
    return figure


def confidence_histogram(
    log_probabilities: np.ndarray, labels: np.ndarray, title: str, *, colour: str = NEUTRAL
) -> Figure:
    """How confident a model is where it is right and where it is wrong.

    The confidence of an image is its highest probability. Two histograms of 20 bins, right
    predictions above and wrong ones below, each with a scale of its own since their numbers may
    differ a hundredfold, and each with its mean.

    Args:
        log_probabilities: natural logarithms, (n, K).
        labels: true classes, (n,).
        title: what the figure is about, the model and the data set.
        colour: the model's, from `MODEL_COLOURS`.
    """
    log_probabilities = np.asarray(log_probabilities)
    confidence = 100 * np.exp(log_probabilities.max(axis=1).astype(np.float64)).clip(max=1)
    right = log_probabilities.argmax(axis=1) == np.asarray(labels)

    figure = _figure(title, height=5)
    styles = (
        ('right', right, {'facecolor': colour, 'edgecolor': 'white'}),
        ('wrong', ~right, {'facecolor': 'white', 'edgecolor': colour, 'hatch': '////'}),
    )
    for axes, (what, chosen, style) in zip(figure.subplots(2, 1, sharex=True), styles, strict=True):
        axes.hist(confidence[chosen], bins=np.linspace(0, 100, 21), linewidth=0.8, **style)
        described = f'{what} predictions: {chosen.sum():,} of {len(labels):,} images'
        if chosen.any():
            mean = confidence[chosen].mean()
            _mark_mean(axes, mean)
            described += f'; dashed: their mean confidence, {mean:.1f} %'
        axes.set_title(described, fontsize=11, loc='left')
        axes.set_ylabel('images')
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
        _tidy(axes)
    axes.set_xlim(0, 100)
    axes.set_xlabel('confidence: probability of the predicted class (%)')
    return figure


def kernel_profiles(
    learnt: Mapping[str, np.ndarray], title: str, *, colour: str = NEUTRAL
) -> Figure:
    """The kernel that fθ has learnt against the angle of query and key, a panel a block.

    Every curve is divided by its value at 0°, so that shapes compare: the learnt kernels, a line a
    head where heads have maps of their own; those that they started from; and the closed forms of
    ReLU and softmax features.

    Args:
        learnt: the arrays of learnt_kernel.npz, as `evaluate.learnt_kernel` describes them.
        title: what the figure is about, the model and the data set.
        colour: the model's, from `MODEL_COLOURS`.
    """
    blocks, heads, _ = learnt['learnt'].shape
    columns = min(blocks, MOST_PANELS)
    rows = -(-blocks // columns)
    figure = _figure(title, height=1.4 + 2.6 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    curves = {
        'learnt' if heads == 1 else 'learnt, a line a head': (
            learnt['learnt'],
            {'color': colour, 'linewidth': 2.2 if heads == 1 else 1, 'zorder': 3},
        ),
        'at the start': (
            learnt['initial'],
            {'color': NEUTRAL, 'linewidth': 1.6, 'linestyle': ':', 'zorder': 4},
        ),
        'ReLU: arc-cosine kernel': (
            np.broadcast_to(learnt['arc_cosine'], (blocks, 1, learnt['angles'].size)),
            {'color': MODEL_COLOURS['relu'], 'linewidth': 1.4, 'linestyle': '--'},
        ),
        "softmax: exp(q'·k')": (
            learnt['softmax'][:, None],
            {'color': MODEL_COLOURS['exact'], 'linewidth': 1.4, 'linestyle': '-.'},
        ),
    }
    for block, axes in enumerate(panels.flat):
        if block >= blocks:
            axes.set_visible(False)
            continue
        for values, style in curves.values():
            axes.plot(learnt['angles'], values[block].T, **style)
        norms = (learnt[f'{side}_norm'][block] for side in ('query', 'key'))
        described = "block {}\n‖q'‖ {:.2g}, ‖k'‖ {:.2g}".format(block + 1, *norms)
        axes.set_title(described, fontsize=10, loc='left')
        axes.set_xlim(0, 180)
        axes.set_xticks(range(0, 181, 45 if columns < MOST_PANELS else 90))
        axes.set_ylim(bottom=0)
        _tidy(axes)
        if block + columns >= blocks:  # The lowest of its column.
            axes.set_xlabel('angle of q and k (°)')
            axes.tick_params(labelbottom=True)
    for row in panels:
        row[0].set_ylabel('kernel, relative to 0°')
    handles = [Line2D([], [], **style) for _, style in curves.values()]
    legend_below(figure, handles, list(curves), columns=4)
    return figure


def comparison(
    rows: Sequence[dict],
    title: str,
    quantity: str = 'test_accuracy',
    styles: Mapping[str, Mapping] | None = None,
) -> Figure:
    """An accuracy (%) and the training time (s/epoch) of several models, a row each.

    Runs of one variant or, where they have none, of the same kernel, projection and number of
    features are one model with several seeds or folds: each run is a dot and the mean a bar in the
    accuracy panel, the label gives mean ± standard deviation (of the sample, n - 1). The time is
    the median of the runs, which one disturbed run does not move, with a line from the shortest to
    the longest.

    Args:
        rows: the contents of several results.json, in the order in which they are drawn, the first
            on top. `variant`, if it is there, `kernel`, `dataset`, the quantity and
            `train_seconds_per_epoch` are used.
        title: what is compared, with the data set.
        quantity: the accuracy, 'test_accuracy' or 'validation_accuracy'.
        styles: from `model_styles`, which are found here where they are not given.

    Raises:
        BadInput: if there are no rows, or they are of different data sets.
    """
    datasets = sorted({str(row['dataset']) for row in rows})
    if len(datasets) != 1:
        raise BadInput(
            f'the runs are of these data sets: {", ".join(datasets) or "none"}; a comparison is of '
            'one. Pass runs of the same data set.'
        )
    models: dict[tuple, list[dict]] = {}
    for row in rows:
        settings = (variant(row),)
        if 'variant' not in row:
            settings = (row['kernel'], row.get('num_features'), row.get('projection'))
        models.setdefault(settings, []).append(row)
    variants = [settings[0] for settings in models]
    names = []
    for name, *features in models:
        label = _wrapped(name)
        if variants.count(name) > 1:
            label += '\n{} features, {}'.format(*features)
        names.append(label)
    styles = styles or model_styles(variants)
    colours = [styles[name]['color'] for name in variants]

    lines = [name.count('\n') + 1 for name in names]
    figure = _figure(title, height=1.7 + sum(max(0.5, 0.2 * count) for count in lines))
    quality, cost = figure.subplots(1, 2, sharey=True)
    measured = [_known(runs, 'train_seconds_per_epoch') for runs in models.values()]
    seconds = [np.median(values) if values.size else math.nan for values in measured]
    longest = max((value for values in measured for value in values), default=0)
    # Three significant digits at the long end; short ones lose some, in proportion.
    decimals = 2 if longest < 10 else 1 if longest < 100 else 0
    _bars(cost, names, seconds, colours, limit=1.25 * (longest or 1), pattern=f'{{:,.{decimals}f}}')
    cost.set_xlabel('training time (s/epoch)')
    if any(values.size > 1 for values in measured):
        cost.set_title('bar: median; line: all runs', fontsize=10)
        for position, values in enumerate(measured):
            if values.size > 1:
                # At the foot of the bar, so that it does not strike the number through.
                ends = [values.min(), values.max()]
                cost.plot(ends, [position + 0.3] * 2, '|-', color=NEUTRAL, linewidth=1.4,
                          markersize=6, path_effects=RIM)  # fmt: skip
    for position, (runs, colour) in enumerate(zip(models.values(), colours, strict=True)):
        accuracies = 100 * _known(runs, quantity)
        if not accuracies.size:
            left = ('axes fraction', 'data')
            quality.annotate('not measured', (0.03, position), xycoords=left, va='center')
            continue
        mean = accuracies.mean()
        label = f'{mean:.2f}'
        if accuracies.size > 1:
            quality.plot([mean, mean], [position - 0.22, position + 0.22], color=colour, lw=2.5)
            label += f' ± {accuracies.std(ddof=1):.2f}'
            quality.set_title('dots: runs; bar: mean ± standard deviation', fontsize=10)
        heights = np.full(accuracies.size, position)
        quality.plot(accuracies, heights, 'o', color=colour, markersize=7, alpha=0.8)
        quality.annotate(
            label,
            (accuracies.max(), position),
            xytext=(9, 0),
            textcoords='offset points',
            va='center',
            fontsize=10,
        )
    # Room on the right for the label of the best model, which no automatic limit knows of.
    low, high = quality.get_xlim()
    quality.set_xlim(low, high + 0.55 * (high - low))
    ticks = quality.get_xticks()
    quality.set_xticks(ticks[(ticks >= low) & (ticks <= 100)])
    quality.tick_params(axis='y', length=0)
    for label in quality.get_yticklabels():  # Whose texts are those of the other panel.
        label.set_parse_math(False)
    quality.set_xlabel(f'{quantity.replace("_", " ")} (%)')
    _tidy(quality, grid='x')
    return figure


def accuracy_by_time(rows: Sequence[dict], size: str = '') -> Figure:
    """Validation accuracy (%) against minutes of training, a line a run; a star is the test's.

    Args:
        rows: the contents of several results.json. `variant`, if it is there, `kernel`, `dataset`,
            `test_accuracy`, `device` and `history` are used, and of an epoch of the history its
            `seconds` and its `validation_accuracy`, None where there is no validation split.
        size: of the models, if it has a name.

    Raises:
        BadInput: if there are no rows.
    """
    if not rows:
        raise BadInput('there are no runs; a curve of accuracy against time needs one or more.')
    variants = list(dict.fromkeys(variant(row) for row in rows))
    styles = model_styles(variants)
    subject = variant_name(variants[0]) if len(variants) == 1 else 'Comparison'
    dataset = DATASET_NAMES.get(rows[0]['dataset'], rows[0]['dataset'])
    figure = _figure(f'{subject}{size and f", {size},"} on {dataset}', height=4.2)
    axes = figure.subplots()
    for row in rows:
        style = styles[variant(row)]
        minutes = np.cumsum([epoch['seconds'] for epoch in row['history']]) / 60
        values = [100 * _number(epoch['validation_accuracy']) for epoch in row['history']]
        axes.plot(minutes, values, **style, markersize=4, linewidth=1.6)
        axes.plot(
            minutes[-1], 100 * row['test_accuracy'], '*', color=style['color'], markersize=15,
            markeredgecolor='white', zorder=3,
        )  # fmt: skip
    if len(rows) == 1:
        axes.annotate(
            f'{rows[0]["test_accuracy"]:.2%} on the test images',
            # Above all of the curve, which it would hide.
            (minutes[-1], np.nanmax([*values, 100 * rows[0]['test_accuracy']])),
            xytext=(8, 10), textcoords='offset points', ha='right',
            bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1},
        )  # fmt: skip
    axes.set_xlim(0, None)
    axes.margins(y=0.16)
    devices = ' and '.join(dict.fromkeys(row['device'] for row in rows))
    axes.set_xlabel(textwrap.fill(f'training (minutes on {devices})', 80))
    axes.set_ylabel('accuracy (%)')
    _tidy(axes)
    handles = [Line2D([], [], **styles[name], linewidth=2, markersize=5) for name in variants]
    names = [_wrapped(name) for name in variants]
    handles += [
        Line2D([], [], color=NEUTRAL),
        Line2D([], [], color=NEUTRAL, marker='*', markersize=12, linestyle='none'),
    ]
    legend_below(figure, handles, [*names, 'validation', 'test, once at the end'], columns=4)
    return figure


def pareto(
    rows: Sequence[Mapping],
    title: str,
    quantity: str,
    styles: Mapping[str, Mapping] | None = None,
) -> Figure:
    """An accuracy (%) against the speed of training (images/s); a line joins what nothing beats.

    A model is on the line, the Pareto front, where no other is at least as accurate and as fast,
    and better in one of the two. Bars are ± one standard deviation over runs, of the accuracy, and
    the range of the speed.

    Args:
        rows: of `comparison.summary`, with `images_per_second` and the quantity.
        title: what is compared, with the data set.
        quantity: the accuracy, 'test_accuracy' or 'validation_accuracy'.
        styles: from `model_styles`, which are found here where they are not given.
    """
    rows = [row for row in rows if row[quantity] is not None]
    names = [_wrapped(row['model']) for row in rows]
    figure = _figure(title, height=4 + sum(name.count('\n') + 1 for name in names) / 12)
    axes = figure.subplots()
    styles = styles or model_styles([row['model'] for row in rows])
    # Points; the line is the front's.
    styles = {model: {**style, 'linestyle': 'none'} for model, style in styles.items()}
    points = [(row['images_per_second'], 100 * row[quantity]) for row in rows]
    front = sorted(
        (speed, accuracy)
        for speed, accuracy in points
        if not any(
            other[0] >= speed and other[1] >= accuracy and other != (speed, accuracy)
            for other in points
        )
    )
    axes.plot(*zip(*front, strict=True), '--', color=NEUTRAL, linewidth=1.2, zorder=1)
    for row, (speed, accuracy) in zip(rows, points, strict=True):
        ends = [row[f'images_per_second_{end}'] or speed for end in ('low', 'high')]
        axes.errorbar(
            speed, accuracy,
            xerr=[[speed - ends[0]], [ends[1] - speed]],
            yerr=100 * (row[f'{quantity}_deviation'] or 0),
            **styles[row['model']], markersize=8, capsize=3,
        )  # fmt: skip
    axes.margins(0.12)
    axes.set_xlabel('training speed (images/s)')
    axes.set_ylabel(f'{quantity.replace("_", " ")} (%)')
    _tidy(axes)
    handles = [Line2D([], [], **styles[row['model']]) for row in rows]
    handles.append(Line2D([], [], color=NEUTRAL, linestyle='--'))
    names.append('Pareto front')
    if any(row[f'{quantity}_deviation'] for row in rows):
        handles += [_range_handle(), Line2D([], [], color=NEUTRAL)]
        names += ['± standard deviation', 'slowest to fastest run']
    legend_below(figure, handles, names, columns=3)
    return figure


def approximation_figures(figures: dict) -> dict[str, Figure]:
    """The errors of the estimators of softmax attention, from the numbers of `approximation.study`.

    Lines are means over the draws, bands the standard error of these means.

    Args:
        figures: what the study returned.

    Returns:
        By name: `approximation-features`, `-length` and `-scale`, errors against R, N and the
        scale of the inputs for independent and orthogonal rows; `approximation-projections`, the
        kernel's error by projection over that of independent rows, against the scale.
    """
    settings = figures['settings']
    dim, length, features = (
        f'{letter} = {settings[name]:,}'
        for letter, name in (('D', 'dim'), ('N', 'length'), ('R', 'num_features'))
    )
    return {
        'approximation-features': _errors_at_scales(
            figures, 'num_features', 'features R', f'{dim}, {length}'
        ),
        'approximation-length': _errors_at_scales(
            figures, 'length', 'tokens N', f'{dim}, {features}'
        ),
        'approximation-scale': _errors_by_scale(figures, f'{dim}, {length}, {features}'),
        'approximation-projections': _errors_by_projection(figures, f'{dim}, {features}'),
    }


def approximation(figures: dict, directory: str | os.PathLike) -> list[Path]:
    """Writes `approximation_figures` as NAME.png into a directory, and returns their paths."""
    paths = []
    for name, figure in approximation_figures(figures).items():
        paths.append(Path(directory) / f'{name}.png')
        save(figure, paths[-1], num_colours=128)
    return paths


def save(figure: Figure, path: str | os.PathLike, *, num_colours: int | None = None) -> None:
    """Writes the figure as a PNG of 1600 pixels in width, whole or not at all.

    `num_colours` limits it to the colours that serve it best: a figure of lines and flat areas does
    not miss the others, and its file is a third as long.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format='png', dpi=2 * PIXELS_AN_INCH)
        if num_colours is not None:
            with Image.open(temporary) as image:
                reduced = image.convert('RGB').quantize(num_colours, dither=Image.Dither.NONE)
            reduced.save(temporary, format='png', optimize=True)


def to_array(figure: Figure) -> np.ndarray:
    """The figure as an image, (height, 800, 3) uint8 RGB, such as TensorBoard takes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def draw(
    results: dict,
    history: Sequence[dict],
    log_probabilities: np.ndarray,
    labels: np.ndarray,
    learnt: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Figure]:
    """The figures of a finished run, from its numbers.

    Args:
        results: `kernel`, `dataset` and `class_names` are used.
        history: the rows of history.csv; without any there are no learning curves.
        log_probabilities: natural logarithms of the test split's predictions, (n, K).
        labels: its true classes, (n,).
        learnt: the arrays of learnt_kernel.npz, if a kernel was learnt.

    Returns:
        `confusion_matrix`, `per_class_accuracy`, `confidence`, `learning_curves` and
        `learnt_kernel`, by name.

    Raises:
        BadInput: if the kernel is unknown, or the names do not fit the predictions.
    """
    from sklearn.metrics import confusion_matrix  # Takes seconds to import.

    title = run_title(results)
    names = results['class_names']
    colour = MODEL_COLOURS[results['kernel']]
    matrix = confusion_matrix(labels, log_probabilities.argmax(axis=1), labels=range(len(names)))
    images = matrix.sum(axis=1)
    accuracies = np.where(images > 0, matrix.diagonal() / np.maximum(images, 1), np.nan)
    drawn = {
        'confusion_matrix': confusion(matrix, names, title),
        'per_class_accuracy': per_class(accuracies, names, title, colour=colour),
        'confidence': confidence_histogram(log_probabilities, labels, title, colour=colour),
    }
    if history:
        drawn['learning_curves'] = learning_curves(history, title, colour=colour)
    if learnt is not None:
        named = f'{title}: the learnt kernel'
        drawn['learnt_kernel'] = kernel_profiles(learnt, named, colour=colour)
    return drawn


def draw_all(workdir: str | os.PathLike) -> None:
    """Draws the figures of a finished run again, from the files in its workdir.

    Reads `results.json`, `test_predictions.npz` and, if they are there, `history.csv` and
    `learnt_kernel.npz`; writes `figures/confusion_matrix.png`, `per_class_accuracy.png`,
    `confidence.png`, `learning_curves.png` and `learnt_kernel.png`.

    Raises:
        BadInput: if the results or the predictions are missing, or as `draw`.
    """
    workdir = Path(workdir)
    results = run_directory.read_json(workdir / 'results.json')
    labels, log_probabilities = read_predictions(workdir)
    drawn = draw(
        results, read_history(workdir), log_probabilities, labels, read_learnt_kernel(workdir)
    )
    save_all(drawn, workdir)


def read_predictions(workdir: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """The labels (n,) and log-probabilities (n, K) of a workdir's test_predictions.npz.

    Raises:
        BadInput: the file is missing, or it is not what a finished run wrote.
    """
    path = Path(workdir) / 'test_predictions.npz'
    if not path.is_file():
        raise BadInput(
            f'{path} does not exist; figures are drawn from the predictions of a finished '
            'run. Give the --workdir of a run that has reached its final test; if this one has, '
            '--mode=evaluate writes the file again.'
        )
    try:
        tested = run_directory.read_arrays(path)
        return tested['labels'], tested['log_probabilities']
    except KeyError as error:
        raise BadInput(
            f'{path} has no array {error}: restore it, or write it again with --mode=evaluate.'
        ) from error


def read_learnt_kernel(workdir: str | os.PathLike) -> dict[str, np.ndarray] | None:
    """The arrays of a workdir's learnt_kernel.npz; None where there is no such file."""
    path = Path(workdir) / 'learnt_kernel.npz'
    return run_directory.read_arrays(path) if path.is_file() else None


def read_history(workdir: str | os.PathLike) -> list[dict]:
    """The rows of a workdir's history.csv; none where there is no such file."""
    path = Path(workdir) / 'history.csv'
    return run_directory.read_history(path) if path.is_file() else []


def save_all(drawn: dict[str, Figure], workdir: str | os.PathLike) -> None:
    """Writes figures as `figures/NAME.png` into a workdir."""
    for name, figure in drawn.items():
        save(figure, Path(workdir) / 'figures' / f'{name}.png')


def run_title(results: dict) -> str:
    """What a run is about, such as 'Performer-ReLU on CIFAR-10', from the content of results.json.

    Raises:
        BadInput: if the kernel is unknown.
    """
    dataset = results['dataset']
    return f'{model_name(results["kernel"])} on {DATASET_NAMES.get(dataset, dataset)}'


def _figure(title: str, height: float) -> Figure:
    figure = Figure(figsize=(8, height), dpi=PIXELS_AN_INCH, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.03)
    figure.suptitle(_short(title, 70), fontsize=14, fontweight='bold', parse_math=False)
    return figure


def _errors_at_scales(figures: dict, field: str, label: str, setting: str) -> Figure:
    scales = figures['settings']['compared_scales']
    figure = _figure(f'Error of attention by random features, {setting}', height=5)
    panels = figure.subplots(1, len(scales), squeeze=False)[0]
    for axes, scale in zip(panels, scales, strict=True):
        values, rows = varied(figures, field, scale)
        _error_lines(axes, rows, field, 'attention_error', figures['settings']['draws'])
        axes.set_title(f'inputs of scale s = {scale:g}', fontsize=11, loc='left')
        axes.set_xlabel(label)
        axes.set_xticks(values, [f'{value:,}' for value in values])
    panels[0].set_ylabel('relative error of the output')
    _estimator_legend(figure)
    return figure


def _errors_by_scale(figures: dict, setting: str) -> Figure:
    titles = {
        'attention_error': 'attention output',
        'kernel_error': 'kernel, median of all pairs',
        'kernel_error_small': 'kernel, pairs with small q·k',
        'kernel_error_large': 'kernel, pairs with large q·k',
    }
    _, rows = varied(figures, 'scale')
    figure = _figure(f'Errors against the scale of the inputs, {setting}', height=7)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, error in zip(panels.flat, ERRORS, strict=True):
        _error_lines(axes, rows, 'scale', error, figures['settings']['draws'])
        axes.set_title(titles[error], fontsize=11, loc='left')
    # The trigonometric estimator's goes on to 1e9, beside which no other could be read off.
    axes.set_ylim(top=MOST_ERROR)
    for axes in panels[1]:
        _scale_axis(axes, figures)
    for axes in panels[:, 0]:
        axes.set_ylabel('relative error')
    _estimator_legend(figure)
    return figure


def _errors_by_projection(figures: dict, setting: str) -> Figure:
    _, rows = varied(figures, 'scale')
    figure = _figure(f"The kernel's error by projection, {setting}", height=6.2)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, (estimator, name) in zip(panels.flat, ESTIMATORS.items(), strict=True):
        lines = {
            projection: _line(rows, 'scale', 'kernel_error', estimator, projection)
            for projection in PROJECTION_STYLES
        }
        for projection, (values, means, _) in lines.items():
            line, marker = PROJECTION_STYLES[projection]
            axes.plot(
                values,
                means / lines['gaussian'][1],
                line,
                marker=None if projection == 'gaussian' else marker,
                color=NEUTRAL if projection == 'gaussian' else MODEL_COLOURS[estimator],
                linewidth=1.6,
                markersize=5,
            )
        axes.set_xscale('log')
        axes.set_ylim(0, 1.15)
        axes.set_title(f'{name} features', fontsize=11, loc='left')
        _tidy(axes)
    for axes in panels[1]:
        _scale_axis(axes, figures)
    for axes in panels[:, 0]:
        axes.set_ylabel('error / independent rows')
    handles = [
        Line2D([], [], color=NEUTRAL, linestyle=line, marker=None if name == 'gaussian' else marker)
        for name, (line, marker) in PROJECTION_STYLES.items()
    ]
    legend_below(figure, handles, list(PROJECTION_NAMES.values()), columns=4)
    return figure


def _line(rows: Sequence[dict], field: str, error: str, estimator: str, projection: str):
    """The values of a setting, and the error's mean and standard deviation at each, as arrays."""
    chosen = sorted(
        (row[field], *(row[error][number] for number in ('mean', 'std')))
        for row in rows
        if (row['estimator'], row['projection']) == (estimator, projection)
    )
    return tuple(np.array(column) for column in zip(*chosen, strict=True))


def _error_lines(axes: Axes, rows: Sequence[dict], field: str, error: str, draws: int) -> None:
    """Independent and orthogonal rows of every estimator, on logarithmic axes."""
    for estimator, marker in ESTIMATOR_MARKERS.items():
        colour = MODEL_COLOURS[estimator]
        for projection in ('gaussian', 'orthogonal'):
            values, means, deviations = _line(rows, field, error, estimator, projection)
            uncertainty = deviations / math.sqrt(draws)
            line, _ = PROJECTION_STYLES[projection]
            axes.plot(
                values,
                means,
                line,
                marker=marker,
                color=colour,
                markerfacecolor='white' if projection == 'gaussian' else colour,
                # The hyperbolic estimator's line, drawn later, would hide FAVOR+'s, which it meets.
                linewidth=3.2 if estimator == 'softmax' else 1.5,
                markersize=4.5,
            )
            low, high = means - uncertainty, means + uncertainty
            axes.fill_between(values, low, high, color=colour, alpha=BAND, linewidth=0)
    axes.set_xscale('log')
    axes.set_yscale('log')
    low, high = axes.get_ylim()
    if high < 100 * low:  # Two ticks or fewer at the powers of ten.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, position: f'{value:,g}')
    axes.minorticks_off()
    _tidy(axes)


def _scale_axis(axes: Axes, figures: dict) -> None:
    axes.set_xlabel('scale s of queries and keys')
    values = figures['settings']['scales']
    axes.set_xticks(values, [f'{value:g}' for value in values], minor=False)
    axes.minorticks_off()


def _estimator_legend(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=MODEL_COLOURS[estimator], marker=marker, markersize=5, linewidth=2)
        for estimator, marker in ESTIMATOR_MARKERS.items()
    ]
    names = [ESTIMATORS[estimator] for estimator in ESTIMATOR_MARKERS]
    for projection in ('orthogonal', 'gaussian'):
        line, marker = PROJECTION_STYLES[projection]
        face = NEUTRAL if projection == 'orthogonal' else 'white'
        handles.append(
            Line2D([], [], color=NEUTRAL, linestyle=line, marker=marker, markerfacecolor=face)
        )
        names.append(PROJECTION_NAMES[projection])
    handles.append(Patch(color=NEUTRAL, alpha=2 * BAND, linewidth=0))
    names.append('± standard error')
    legend_below(figure, handles, names, columns=4)


def legend_below(figure: Figure, handles: list, names: list[str], columns: int) -> None:
    """Names below the panels, in fewer columns where these would be wider than the figure."""
    heights = []
    for count in range(columns, 0, -1):
        legend = figure.legend(
            handles, names, loc='outside lower center', ncols=count, frameon=False, fontsize=10
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        extent = legend.get_window_extent()
        heights.append(extent.height)
        if extent.width <= figure.bbox.width or count == 1:
            break
        legend.remove()
    # The panels keep their height.
    figure.set_figheight(figure.get_figheight() + (heights[-1] - heights[0]) / figure.dpi)


def _tidy(axes: Axes, grid: str = 'y') -> None:
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis=grid, color='#E0E0E0', linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10)
    axes.xaxis.label.set_size(11)
    axes.yaxis.label.set_size(11)


def _bars(
    axes: Axes,
    names: list[str],
    values,
    colours,
    *,
    limit: float,
    pattern: str = '{:.1f}',
    labels: list[str] | None = None,
) -> None:
    """Horizontal bars from the top down, each with its name and its value, or with `labels`."""
    bars = axes.barh(range(len(names)), np.nan_to_num(values), color=colours, height=0.75)
    labels = labels or [
        'not measured' if math.isnan(value) else pattern.format(value) for value in values
    ]
    size = 10 if len(names) <= 20 else 8.5
    # On white, since a mean's line may pass behind the number.
    box = {'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.6}
    axes.bar_label(bars, labels, padding=4, fontsize=size, bbox=box, zorder=3)
    axes.set_xlim(0, limit)
    axes.set_ylim(len(names) - 0.4, -0.6)
    _tidy(axes, grid='x')
    axes.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)
    axes.tick_params(axis='y', length=0)


def _mark_mean(axes: Axes, mean: float) -> None:
    axes.axvline(mean, color=NEUTRAL, linestyle='--', linewidth=1.3, path_effects=RIM, zorder=2)


def _number(value) -> float:
    """A saved value as a number; NaN where there is none."""
    return math.nan if value is None or value == '' else float(value)


def _known(rows: Sequence[dict], field: str) -> np.ndarray:
    """The values of a field, without those that are missing."""
    values = np.array([_number(row.get(field)) for row in rows])
    return values[~np.isnan(values)]


def _short(text: str, longest: int = LONGEST_NAME) -> str:
    text = ' '.join(str(text).split())
    return text if len(text) <= longest else text[: longest - 1] + '…'


# Attention: seconds against the number of tokens

# Colours are kernels', lines and markers programs'.
ATTENTION_LINES = {
    'relu': ('relu', '-', 'o', 'ReLU, ours'),
    'softmax': ('softmax', '-', 'o', 'softmax, ours'),
    'exact': ('exact', '-', 'o', 'exact, ours'),
    'jax_exact': ('exact', ':', 's', 'exact, jax.nn'),
    'jax_per_token': ('relu', ':', 's', 'ReLU, scan per token'),
    'torch_exact': ('exact', '--', '^', 'exact, PyTorch'),
    'performer_pytorch_relu': ('relu', '--', '^', 'ReLU, performer-pytorch'),
    'performer_pytorch_softmax': ('softmax', '--', '^', 'softmax, performer-pytorch'),
}


def attention_speed(measured: dict) -> Figure:
    """Seconds of a call against the number of tokens, both axes logarithmic, a line a contender.

    A row of panels for each number of features, forward on the left and with gradients on the
    right. Rings mark where our linear attention becomes faster than the fastest exact one.

    Args:
        measured: what `attention_speed.study` returns.
    """
    settings = measured['settings']
    counts = settings['num_features']
    kind = 'Causal' if settings['is_causal'] else 'Bidirectional'
    figure = _figure(f'{kind} attention: time of a call', height=2.2 + 3.2 * len(counts))
    panels = figure.subplots(len(counts), 2, sharex=True, sharey='row', squeeze=False)
    names = {'forward': 'forward', 'gradient': 'forward and gradient'}
    for features, pair in zip(counts, panels, strict=True):
        for (which, name), axes in zip(names.items(), pair, strict=True):
            rows = [
                row
                for row in measured['rows']
                if row['pass'] == which and row['num_features'] in (None, features)
            ]
            axes.set(xscale='log', yscale='log')
            _time_lines(axes, [row for row in rows if 'seconds' in row])
            found = [
                crossing
                for crossing in measured['crossovers']
                if (crossing['pass'], crossing['num_features']) == (which, features)
            ]
            for crossing in found:
                if crossing['verdict'] == 'from':
                    _mark_crossing(axes, crossing['contender'], rows, crossing['length'])
            lines = [f'R = {features}, {name}', *map(_where_faster, found)]
            axes.set_title('\n'.join(lines), fontsize=10)
            axes.set_xlim(settings['lengths'][0] / 1.2, settings['lengths'][-1] * 1.2)
            axes.set_xticks(settings['lengths'], [f'{n:,}' for n in settings['lengths']])
            axes.minorticks_off()
            _tidy(axes, grid='both')
            if len(settings['lengths']) > 4:
                axes.tick_params(axis='x', rotation=45)
    for axes in panels[-1]:
        axes.set_xlabel(
            f'tokens of a sequence, N\n({settings["num_tokens"]:,} in all, or one longer sequence)'
        )
    for axes in panels[:, 0]:
        axes.set_ylabel('seconds of a call')
    handles, names = panels[0, 0].get_legend_handles_labels()
    if any(crossing['verdict'] == 'from' for crossing in measured['crossovers']):
        ring = {'marker': 'o', 'markersize': 13, 'markerfacecolor': 'none', 'linestyle': 'none'}
        handles.append(Line2D([], [], color=NEUTRAL, **ring))
        names.append('faster than exact from here')
    legend_below(figure, [*handles, _range_handle()], [*names, RANGE], columns=3)
    return figure


def _time_lines(
    axes: Axes, rows: Sequence[dict], lines: dict = ATTENTION_LINES, field: str = 'seconds'
) -> None:
    """A line for each contender, with bars from the lowest to the highest time."""
    for contender, (kernel, line, marker, label) in lines.items():
        own = [row for row in rows if row['contender'] == contender]
        if not own:
            continue
        seconds = np.array([[row[field][end] for row in own] for end in ('median', 'low', 'high')])
        axes.errorbar(
            [row['length'] for row in own],
            seconds[0],
            yerr=np.abs(seconds[1:] - seconds[0]),
            color=MODEL_COLOURS[kernel],
            linestyle=line,
            marker=marker,
            markersize=5,
            markerfacecolor=MODEL_COLOURS[kernel] if line == '-' else 'white',
            linewidth=1.6,
            elinewidth=1,
            label=label,
        )


RANGE = 'shortest to longest'


def _range_handle() -> Line2D:
    return Line2D([], [], color=NEUTRAL, marker='|', markersize=14, linestyle='none')


def _where_faster(crossing: dict) -> str:
    if crossing['verdict'] == 'from':
        where = f'from N ≈ {crossing["length"]:,.0f}'
    elif crossing['verdict'] == 'never':
        where = f'not at N = {crossing["lengths"][-1]:,}'
    else:
        where = {'always': 'at every N', 'unknown': 'not measured'}[crossing['verdict']]
    name = ATTENTION_LINES[crossing['contender']][3].partition(',')[0]
    return f'{name} faster than exact: {where}'


def _mark_crossing(axes: Axes, contender: str, rows: Sequence[dict], length: float) -> None:
    """A ring on the line of a contender, between two lengths that were measured."""
    own = [row for row in rows if row['contender'] == contender]
    lengths = np.log([row['length'] for row in own])
    seconds = np.log([row['seconds']['median'] for row in own])
    height = np.exp(np.interp(np.log(length), lengths, seconds))
    colour = MODEL_COLOURS[ATTENTION_LINES[contender][0]]
    axes.plot(
        length, height, 'o', markersize=13, markerfacecolor='none', markeredgecolor=colour, zorder=4
    )


# Whole models: seconds of an image against the number of tokens

# Colours and markers are models'.
MODEL_LINES = {
    'exact': ('exact', '-', MODEL_MARKERS['exact'], MODEL_NAMES['exact']),
    'jax_exact': ('exact', ':', MODEL_MARKERS['exact'], 'ViT, attention of jax.nn'),
    **{
        kernel: (kernel, '-', MODEL_MARKERS[kernel], MODEL_NAMES[kernel])
        for kernel in ('relu', 'gelu', 'softmax', 'elu', 'ftheta')
    },
}


def model_speed(measured: dict) -> Figure:
    """Seconds of an image against its number of tokens, both axes logarithmic, a line a model.

    Training steps on the left and inference on the right.

    Args:
        measured: what `model_speed.study` returns.
    """
    lengths = measured['settings']['lengths']
    model = measured['settings']['config']['model']
    figure = _figure(
        f'Time of an image: width {model["width"]}, depth {model["depth"]}, '
        f'{model["num_heads"]} heads',
        height=4.8,
    )
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    names = {'training': 'training step', 'inference': 'inference'}
    for (which, name), axes in zip(names.items(), panels, strict=True):
        axes.set(xscale='log', yscale='log')
        rows = [
            row for row in measured['rows'] if row['pass'] == which and 'seconds_per_image' in row
        ]
        _time_lines(axes, rows, MODEL_LINES, 'seconds_per_image')
        axes.set_title(name, fontsize=11)
        axes.set_xlabel('tokens of an image, N')
        axes.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)
        axes.set_xticks(lengths, [f'{n:,}' for n in lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, position: f'{value:,g}')
        _tidy(axes, grid='both')
    panels[0].set_ylabel('seconds of an image')
    drawn = {}  # A model may have run in one of the panels alone.
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        drawn |= dict(zip(labels, handles, strict=True))
    legend_below(figure, [*drawn.values(), _range_handle()], [*drawn, RANGE], columns=4)
    return figure


def save_model_speed(measured: dict, path: str | os.PathLike) -> None:
    """Writes `model_speed` as a PNG beside the JSON file `path` of the study."""
    save(model_speed(measured), Path(path).with_suffix('.png'), num_colours=128)


# Looking into a model: attention, its gap to softmax's, errors

ATTENTION_COLOURS = 'RdBu_r'  # White where attention is that of uniform attention.
LEAST_ATTENTION = 1e-6  # What is less is drawn as this, since 0 has no logarithm.
MOST_HEAD_ROWS = 12  # of attention maps below one another
MOST_NUMBERED = 16  # heads whose numbers fit along an axis
CELL = 0.94  # of its place that a picture fills
CAPTION = 0.37  # of a place that two lines of text above a picture take
PICTURES_A_ROW = 5
CELL_INCHES = 1.53  # of a place of five


def draw_inspection(workdir: str | os.PathLike) -> None:
    """Draws `inspection_figures` from the files in a workdir, as `figures/inspect/NAME.png`.

    Reads `inspection.json`, `inspection.npz` and, if it is there, `learnt_kernel.npz`.

    Raises:
        BadInput: inspection.json is missing, or its kernel is unknown.
    """
    workdir = Path(workdir)
    numbers = run_directory.read_json(workdir / 'inspection.json')
    arrays = run_directory.read_arrays(workdir / 'inspection.npz')
    drawn = inspection_figures(numbers, arrays, read_learnt_kernel(workdir))
    save_all({f'inspect/{name}': figure for name, figure in drawn.items()}, workdir)


def inspection_figures(
    numbers: Mapping,
    arrays: Mapping[str, np.ndarray],
    learnt: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Figure]:
    """What is seen inside a run, from the numbers of `inspection.inspect_run`.

    Args:
        numbers: the content of inspection.json.
        arrays: those of inspection.npz: S shown `images` (S, h, w, c) uint8 with their `labels`,
            `predicted` classes and these classes' `probability`; `received` (S, L, H, h', w') and
            `rollout` (S, h', w'), attention in multiples of uniform attention's; and
            `misclassified_images`.
        learnt: the arrays of learnt_kernel.npz, if a kernel was learnt.

    Returns:
        By name, without those that inspection.json says are left out: `attention_1` and so on,
        the attention that regions receive from each head, numbered by the first block drawn;
        `rollout`; `attention_gap`; `learnt_kernel`; `misclassified`; `confused_pairs`.

    Raises:
        BadInput: if the kernel is unknown.
    """
    title = run_title(numbers)
    colour = MODEL_COLOURS[numbers['kernel']]
    drawn = {}
    if numbers['attention'] is not None:
        blocks, heads = arrays['received'].shape[1:3]
        step = max(1, MOST_HEAD_ROWS // heads)
        for first in range(0, blocks, step):
            drawn[f'attention_{first + 1}'] = received_attention(
                numbers, arrays, range(first, min(first + step, blocks)), title
            )
        drawn['rollout'] = attention_rollout(numbers, arrays, title)
    if numbers['gap'] is not None:
        drawn['attention_gap'] = attention_gap(numbers, title)
    if learnt is not None:
        named = f'{title}: the learnt kernel'
        drawn['learnt_kernel'] = kernel_profiles(learnt, named, colour=colour)
    if numbers['misclassified']:
        drawn['misclassified'] = misclassified(numbers, arrays['misclassified_images'], title)
        drawn['confused_pairs'] = confusions(numbers, title, colour=colour)
    return drawn


def received_attention(
    numbers: Mapping, arrays: Mapping[str, np.ndarray], blocks: range, title: str
) -> Figure:
    """The attention that each region of some images receives, a row a head, a column an image.

    In multiples of what it receives from uniform attention; see `_around_one` for the scale.

    Args:
        numbers, arrays: see `inspection_figures`.
        blocks: those that are drawn, counted from 0.
        title: what the figure is about, the model and the data set.
    """
    received = np.maximum(arrays['received'][:, blocks], LEAST_ATTENTION)
    images, _, heads = received.shape[:3]
    rows = 1 + len(blocks) * heads
    figure = _figure(f'{title}: attention received', height=1.6 + 0.66 * rows)
    axes = figure.subplots()
    norm = _around_one(received)
    for column in range(images):
        _picture(axes, column, 0, arrays['images'][column])
        for row, attention in enumerate(received[column].reshape(-1, *received.shape[3:])):
            shown = _picture(axes, column, row + 1, attention, cmap=ATTENTION_COLOURS, norm=norm)
    names = [_short(numbers['class_names'][label], 14) for label in arrays['labels']]
    slanted = max(map(len, names)) > 10
    _mosaic(axes, images, rows)
    axes.set_xticks(
        np.arange(images) + CELL / 2, names, fontsize=8.5, parse_math=False,
        rotation=30 if slanted else 0, ha='left' if slanted else 'center', rotation_mode='anchor',
    )  # fmt: skip
    axes.xaxis.tick_top()
    axes.set_xlabel(f'{numbers["attention"]["split"]} images, by their class')
    labels = [f'block {block + 1}, head {head + 1}' for block in blocks for head in range(heads)]
    axes.set_yticks(np.arange(rows) + CELL / 2, ['image', *labels], fontsize=9)
    _scale_of_attention(figure, shown, axes)
    return figure


def attention_rollout(numbers: Mapping, arrays: Mapping[str, np.ndarray], title: str) -> Figure:
    """Images, and below each the same with its attention rollout over it.

    Args:
        numbers, arrays: see `inspection_figures`.
        title: what the figure is about, the model and the data set.
    """
    images, names = arrays['images'], numbers['class_names']
    rows, place = _places(len(images), 2)
    figure = _figure(f'{title}: attention rollout', height=1.3 + CELL_INCHES * rows)
    axes = figure.subplots()
    norm = _around_one(arrays['rollout'])
    for i, image in enumerate(images):
        column, top = place(i)
        true, predicted = (names[arrays[name][i]] for name in ('labels', 'predicted'))
        _caption(axes, column, top, true, predicted, arrays['probability'][i])
        _picture(axes, column, top, image)
        grey = image.mean(axis=-1)
        _picture(axes, column, top + 1, grey, cmap='gray', vmin=0, vmax=255)
        shown = _picture(
            axes, column, top + 1, np.maximum(arrays['rollout'][i], LEAST_ATTENTION),
            cmap=_see_through(), norm=norm, interpolation='bilinear',
        )  # fmt: skip
    _mosaic(axes, PICTURES_A_ROW, rows)
    axes.set_xlabel(f'{numbers["attention"]["split"]} images: true class → predicted class')
    _scale_of_attention(figure, shown, axes)
    return figure


def attention_gap(numbers: Mapping, title: str) -> Figure:
    """How far implied attention is from softmax attention on the same queries and keys, by head.

    Four panels: total variation distance and KL divergence, beside those of uniform attention; the
    entropy of all three; the correlation. Bars are standard deviations over images.

    Args:
        numbers: the content of inspection.json.
        title: what the figure is about, the model and the data set.
    """
    rows, kernel = numbers['gap']['heads'], numbers['kernel']
    blocks, heads = (max(row[part] for row in rows) for part in ('block', 'head'))
    numbered = len(rows) <= MOST_NUMBERED
    size = 5.5 if numbered else 3.5
    styles = {
        'own': {'color': MODEL_COLOURS[kernel], 'marker': 'o', 'markersize': size},
        'exact': {'color': MODEL_COLOURS['exact'], 'marker': 's', 'markersize': size},
        'uniform': {
            'color': NEUTRAL, 'marker': 'D', 'markersize': size, 'markerfacecolor': 'white',
        },
    }  # fmt: skip
    panels = {
        'total variation distance': {
            'own': 'total_variation', 'uniform': 'uniform_total_variation',
        },
        'KL divergence (nats)': {'own': 'kl_divergence', 'uniform': 'uniform_kl_divergence'},
        'entropy (nats)': {'own': 'entropy', 'exact': 'exact_entropy'},
        'correlation': {'own': 'correlation'},
    }  # fmt: skip
    figure = _figure(f'{title}: gap to softmax attention', height=6)
    # A place for each head, and one between blocks.
    places = np.array([row['block'] * (heads + 1) + row['head'] for row in rows])
    grid = figure.subplots(2, 2, sharex=True)
    grid[1, 0].axhline(numbers['gap']['uniform_entropy'], color=NEUTRAL, linestyle='--')
    for axes, (label, quantities) in zip(grid.flat, panels.items(), strict=True):
        for i, (style, name) in enumerate(quantities.items()):
            means, deviations = (
                np.array([_number(row[kind][name]) for row in rows]) for kind in ('mean', 'std')
            )
            shift = 0.24 * (i - (len(quantities) - 1) / 2)
            bars = axes.errorbar(
                places + shift, means, yerr=deviations,
                linestyle='none', elinewidth=1.2, **styles[style],
            )  # fmt: skip
            bars.lines[0].set_zorder(3)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if label == 'correlation' else 0)
        _tidy(axes)
        axes.tick_params(axis='x', which='both', length=0, labelsize=10)
    for axes in grid[1]:
        axes.set_xlim(heads + 1, (blocks + 1) * (heads + 1))
        axes.set_xticks(places if numbered else [], [row['head'] for row in rows if numbered])
        centres = (np.arange(blocks) + 1.5) * (heads + 1)
        prefix = 'block ' if numbered else ''
        axes.set_xticks(centres, [f'{prefix}{n + 1}' for n in range(blocks)], minor=True)
        axes.tick_params(axis='x', which='minor', pad=19 if numbered else 4)
        axes.set_xlabel('head' if numbered else f'block, its {heads} heads beside one another')
    legend = {
        f'{model_name(kernel)}, implied': {'linestyle': 'none', **styles['own']},
        'softmax attention': {'linestyle': 'none', **styles['exact']},
        'uniform attention': {'linestyle': '--', **styles['uniform']},
        f'± standard deviation over {numbers["gap"]["images"]} images': {
            'color': NEUTRAL, 'linestyle': 'none', 'marker': '|', 'markersize': 14,
        },
    }  # fmt: skip
    handles = [Line2D([], [], **style) for style in legend.values()]
    legend_below(figure, handles, list(legend), columns=2)
    return figure


def misclassified(numbers: Mapping, images: np.ndarray, title: str) -> Figure:
    """The most confident errors on the test images: each with its true and its predicted class.

    Args:
        numbers: the content of inspection.json.
        images: (n, h, w, c) uint8, those of `misclassified` in their order.
        title: what the figure is about, the model and the data set.
    """
    rows, place = _places(len(images), 1)
    figure = _figure(f'{title}: the most confident errors', height=0.75 + CELL_INCHES * rows)
    axes = figure.subplots()
    for i, (error, image) in enumerate(zip(numbers['misclassified'], images, strict=True)):
        column, top = place(i)
        _caption(axes, column, top, error['true'], error['predicted'], error['probability'])
        _picture(axes, column, top, image)
    _mosaic(axes, PICTURES_A_ROW, rows)
    axes.set_xlabel(
        f'{len(images)} of {numbers["test_errors"]:,} errors on {numbers["test_images"]:,} test '
        'images: true class → predicted class'
    )
    return figure


def confusions(numbers: Mapping, title: str, *, colour: str = NEUTRAL) -> Figure:
    """The pairs of classes that are confused the most, true → predicted, as bars.

    Args:
        numbers: the content of inspection.json.
        title: what the figure is about, the model and the data set.
        colour: the model's, from `MODEL_COLOURS`.
    """
    pairs = numbers['confused_pairs']
    counts = [pair['count'] for pair in pairs]
    figure = _figure(f'{title}: the most confused classes', height=1.5 + 0.3 * len(pairs))
    axes = figure.subplots()
    _bars(
        axes,
        [f'{_short(pair["true"])} → {_short(pair["predicted"])}' for pair in pairs],
        counts,
        colour,
        limit=1.25 * max(counts),
        labels=[f'{pair["count"]:,} ({pair["share"]:.1%})' for pair in pairs],
    )
    axes.set_xlabel('test images (in brackets: share of the true class)')
    return figure


def _picture(axes: Axes, column: float, top: float, pixels: np.ndarray, **options):
    """Pixels, or values with a colour map, in a place of a mosaic."""
    extent = (column, column + CELL, top + CELL, top)
    return axes.imshow(pixels, **{'extent': extent, 'interpolation': 'nearest'} | options)


def _places(count: int, pictures: int) -> tuple[float, Callable[[int], tuple[float, float]]]:
    """Rows of a mosaic with a caption above each stack of pictures, and where the i-th begins."""
    band = pictures + CAPTION

    def place(i: int) -> tuple[float, float]:
        row, column = divmod(i, PICTURES_A_ROW)
        return column, band * row + CAPTION - (1 - CELL)

    return -(-count // PICTURES_A_ROW) * band, place


def _caption(
    axes: Axes, column: float, top: float, true: str, predicted: str, probability: float
) -> None:
    """Two lines above a picture of a mosaic."""
    middle, style = column + CELL / 2, {'ha': 'center', 'fontsize': 8.5, 'parse_math': False}
    second = f'→ {_short(predicted, 12)}, {probability:.0%}'
    axes.text(middle, top - 0.16, _short(true, 18), fontweight='bold', **style)
    axes.text(middle, top - 0.05, second, **style)


def _mosaic(axes: Axes, columns: float, rows: float) -> None:
    """Axes that hold nothing but pictures, columns from the left and rows from the top."""
    axes.set_xlim(0, columns - (1 - CELL))
    axes.set_ylim(rows - (1 - CELL), 0)
    axes.set_aspect('equal')
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _see_through() -> ListedColormap:
    """The colours of attention, the clearer the nearer to that of uniform attention."""
    places = np.linspace(0, 1, 256)
    colours = colormaps[ATTENTION_COLOURS](places)
    # Smooth, and not 0 in the middle: else it would stand out as a line.
    colours[:, 3] = np.hypot(0.3, 0.9 * (2 * places - 1))
    return ListedColormap(colours)


def _around_one(values: np.ndarray) -> LogNorm:
    """A logarithmic scale, as far from 1 up as down, whose upper end is the 99.5th percentile.

    Attention goes down to 0, which would leave nothing of the scale for what is more than uniform.
    """
    reach = max(1.02, np.quantile(values, 0.995))
    return LogNorm(1 / reach, reach)


def _scale_of_attention(figure: Figure, shown, axes: Axes) -> None:
    bar = figure.colorbar(
        shown, ax=axes, orientation='horizontal', extend='both', shrink=0.6, aspect=40
    )
    low, high = shown.norm.vmin, shown.norm.vmax
    ticks = [low, low**0.5, 1, high**0.5, high]
    pattern = '{:.2g}' if high > 1.5 else '{:.3f}'
    bar.set_ticks(ticks, labels=[pattern.format(tick) for tick in ticks])
    bar.minorticks_off()
    bar.set_label('attention, in multiples of uniform attention', fontsize=11)
    bar.outline.set_visible(False)
