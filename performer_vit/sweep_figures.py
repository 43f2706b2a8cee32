"""The figures of a sweep, by Optuna from the numbers of its trials, at the width of a README."""

import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as optuna_figures

from performer_vit.figures import NEUTRAL, PIXELS_AN_INCH, legend_below

_VALUE = 'validation accuracy (%)'


def draw(
    trials: Sequence[FrozenTrial], names: Mapping[str, str], title: str, colour: str
) -> tuple[dict[str, Figure], list[str]]:
    """`history`, `parallel_coordinate` and `param_importances`, as far as they can be drawn.

    Args:
      trials: all of a sweep, in their order, with values from 0 to 1.
      names: what each parameter is called.
      title: what was searched, with the data set.
      colour: of the model.

    Returns:
      The figures by name, and a line about each that cannot be drawn.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        return {}, ['No figures: no trial is complete.']
    study = optuna.create_study(direction='maximize')
    study.add_trials(_shown(trial, names) for trial in trials)
    drawn, lines = {}, []
    # Optuna's functions set a style for the whole process, and say that they are experimental.
    with plt.rc_context(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        drawn['history'] = _history(study, title, colour)
        drawn['parallel_coordinate'] = _parallel_coordinate(study, title)
        shares = optuna.importance.get_param_importances(study, evaluator=_evaluator())
        if len({trial.value for trial in complete}) > 1 and len(set(shares.values())) > 1:
            drawn['param_importances'] = _importances(study, title, colour)
        else:
            reason = (
                'a single field was searched'
                if len(names) == 1
                else 'the complete trials are too few or too much alike'
            )
            lines.append(f'No figure param_importances: {reason}.')
    return drawn, lines


def _shown(trial: FrozenTrial, names: Mapping[str, str]) -> FrozenTrial:
    """A trial as it is shown: its value in percent, its parameters by their names."""
    return optuna.trial.create_trial(
        state=trial.state,
        value=None if trial.value is None else 100 * trial.value,
        params={names[field]: value for field, value in trial.params.items()},
        distributions={names[field]: made for field, made in trial.distributions.items()},
    )


def _evaluator() -> optuna.importance.PedAnovaImportanceEvaluator:
    """How far the better half of the trials is from being spread like all of them.

    PED-ANOVA (Watanabe et al. 2023, "PED-ANOVA: efficiently quantifying hyperparameter importance
    in arbitrary subspaces"). Optuna's own choice, the best tenth, is two trials of twenty.
    """
    return optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)


def _history(study: optuna.Study, title: str, colour: str) -> Figure:
    axes = optuna_figures.plot_optimization_history(study, target_name=_VALUE)
    points, line = axes.collections[0], axes.lines[0]
    points.set(color=colour, label='complete', zorder=3)
    line.set(color=NEUTRAL, alpha=1, linewidth=1.8, drawstyle='steps-post', label='best so far')
    # What these reached after some epochs is no accuracy to be compared with: marks on the axis.
    for state, name, marker in (('PRUNED', 'pruned', 'x'), ('FAIL', 'failed', '+')):
        numbers = [trial.number for trial in study.trials if trial.state.name == state]
        if numbers:
            axes.scatter(
                numbers, [0.03] * len(numbers), marker=marker, s=60, color=NEUTRAL,
                label=f'{name}, without a final accuracy',
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
    axes.set(xlabel='trial', ylabel=_VALUE, xlim=(-0.5, len(study.trials) - 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.get_legend().remove()
    figure = _finish(axes, title, height=4.2)
    legend_below(figure, *axes.get_legend_handles_labels(), columns=4)
    return figure


def _parallel_coordinate(study: optuna.Study, title: str) -> Figure:
    axes = optuna_figures.plot_parallel_coordinate(study, target_name=_VALUE)
    _, colour_bar, *scales = axes.figure.axes
    # The first scale says what the colours mean.
    colour_bar.remove()
    (lines,) = axes.collections
    order = np.argsort(lines.get_array())
    lines.set_segments([lines.get_segments()[i] for i in order])
    lines.set_array(lines.get_array()[order])
    lines.set(cmap='cividis_r', linewidth=1.8, clip_on=False)
    trial = study.best_trial
    names = sorted(trial.params)
    for scale, name in zip(scales, names, strict=True):
        distribution = trial.distributions[name]
        if isinstance(distribution, CategoricalDistribution):
            labels = [text.get_text() for text in scale.get_yticklabels()]
            scale.set_yticks(scale.get_yticks(), [textwrap.fill(text, 13) for text in labels])
        elif isinstance(distribution, IntDistribution):
            scale.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        else:
            low, high = scale.get_ylim()
            spaced = np.geomspace if distribution.log else np.linspace
            values = spaced(low, high, 5)
            scale.set_yticks(values, _distinct(values))
            scale.minorticks_off()
        scale.tick_params(labelsize=9, labelcolor='black')
        scale.spines['right'].set(color=NEUTRAL, linewidth=0.8)
        scale.spines['left'].set_visible(False)
        scale.grid(False)
        for label in scale.get_yticklabels():
            label.set_bbox({'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5, 'alpha': 0.85})
    labels = ['validation\naccuracy (%)', *(re.sub(r'(?<=[.])| ', '\n', name) for name in names)]
    axes.set_xticks(range(len(labels)), labels, rotation=0)
    width = max(8, 0.95 * len(labels))  # So that neighbours' names do not touch.
    # Not laid out: that needs axes side by side, and these lie on one another.
    figure = _finish(axes, title, height=4.6, width=width, layout='none')
    axes.set_position((0.09, 0.14, 0.79, 0.7))
    axes.set_title('a line for each complete trial, the darker the better', fontsize=10, pad=10)
    axes.spines['left'].set(color=NEUTRAL, linewidth=0.8)
    axes.grid(False)
    axes.tick_params(axis='x', length=0, pad=13)
    return figure


def _distinct(values: Sequence[float]) -> list[str]:
    """The values with two digits, or so many more that no two are the same text."""
    texts = [[f'{value:.{digits}g}' for value in values] for digits in range(2, 18)]
    return next((text for text in texts if len(set(text)) == len(set(values))), texts[-1])


def _importances(study: optuna.Study, title: str, colour: str) -> Figure:
    axes = optuna_figures.plot_param_importances(study, evaluator=_evaluator())
    axes.get_legend().remove()
    widths = [bar.get_width() for bar in axes.patches]
    for bar, text, width in zip(axes.patches, axes.texts, widths, strict=True):
        bar.set_color(colour)
        text.set(text=f' {100 * width:.0f} %' if width >= 0.005 else ' < 1 %', fontsize=10)
    axes.set_xlim(0, 1.12 * max(widths))
    axes.xaxis.set_major_formatter(lambda value, _: f'{100 * value:.0f}')
    axes.set(xlabel='share in what sets the better half of the trials apart (%)', ylabel='field')
    figure = _finish(axes, title, height=1.4 + 0.36 * len(widths))
    axes.grid(False, axis='y')
    return figure


def _finish(
    axes: Axes, title: str, height: float, width: float = 8, layout: str = 'constrained'
) -> Figure:
    """Optuna's figure in the style and the size of all others."""
    figure = axes.figure
    plt.close(figure)  # So that pyplot forgets it.
    figure.set_size_inches(width, height)
    figure.set_dpi(PIXELS_AN_INCH)
    figure.set_layout_engine(layout)
    figure.set_facecolor('white')
    figure.suptitle(title, fontsize=14, fontweight='bold', parse_math=False)
    for side in ('left', 'center'):
        axes.set_title('', loc=side)
    axes.set_facecolor('white')
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(color='#E0E0E0', linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10, labelcolor='black')
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(size=11, color='black')
    return figure
