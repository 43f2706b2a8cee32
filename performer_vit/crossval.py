"""Cross-validation: each fold of the training set held out once, and scored by a run of its own."""

import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from performer_vit import (
    comparison,
    datasets,
    evaluate,
    figures,
    progress,
    train,
    typeset,
)
from performer_vit import workdir as run_directory
from performer_vit.errors import BadInput


def cross_validate(config, workdir: str | os.PathLike | None = None, run_name: str = 'run') -> dict:
    """Trains on all folds but one, for each in turn, and scores it on the one it has not seen.

    The folds are stratified by class, a function of `dataset.split_seed`. Each has its own
    directory `fold_I`, and statistics for normalisation from its own training part. What is
    finished is not done again, and a fold that was interrupted goes on where it stopped. The test
    split is not looked at.

    Args:
      config: as for `train.train`, with the number of folds in `dataset.num_folds`.
      workdir: the directory of all folds; default `runs/<data set>/<run_name>-crossval`.
      run_name: what the run is called in that default.

    Returns:
      The content of `results.json`: `validation_accuracy` is the mean over the folds of the last
      epoch's, `validation_accuracy_deviation` their standard deviation (n − 1), and
      `validation_accuracy_low` and `_high` the interval of `comparison.interval_of_folds`.

    Raises:
      BadInput: something in the config, the data or the workdir cannot be used.
      FloatingPointError: a fold's training diverged.
    """
    if config.dataset.fold != -1:
        raise BadInput(
            f'dataset.fold is {config.dataset.fold}, but cross-validation takes every fold in '
            'turn: set it to -1, or train that fold alone with --mode=train.'
        )
    num_folds = config.dataset.num_folds
    config = fold_config(config, -1)
    train.check_scored(fold_config(config, 0))
    name = f'{run_name}-crossval'
    run_directory.check_writable(workdir or run_directory.default_workdir(name, ''))
    dataset = load_fold(fold_config(config, 0))
    train.steps_per_epoch(config, len(dataset.train))
    workdir = run_directory.claim(
        workdir or run_directory.default_workdir(name, dataset.name),
        run_directory.definition(
            {**config.to_dict(), 'mode': 'crossval'}, datasets.fingerprints(dataset)
        ),
    )
    directories = [workdir / f'fold_{fold}' for fold in range(num_folds)]
    open_folds = [not run_directory.is_finished(directory) for directory in directories]
    folds, started = [], time.perf_counter()
    for fold, directory in enumerate(directories):
        left = progress.remaining(started, sum(open_folds[:fold]), sum(open_folds))
        progress.say(dataset.name, f'Fold {fold + 1} of {num_folds}{left}')
        folds.append(run_fold(config, fold, directory))
    results = _report(config, dataset.class_names, folds, workdir)
    progress.say(dataset.name, typeset.markdown(*table_of_folds(results)))
    progress.say(dataset.name, f'Everything is in {workdir}')
    return results


def run_fold(
    config,
    fold: int,
    workdir: str | os.PathLike,
    on_epoch: Callable[[dict], None] = lambda row: None,
) -> dict:
    """Trains on all folds but number `fold` and scores that one; see `train.validate`."""
    config = fold_config(config, fold)
    return train.validate(config, load_fold(config), workdir, on_epoch)


def fold_config(config, fold: int):
    """A copy of the config that holds out that fold, of the data set that it names or none."""
    config = config.copy_and_resolve_references()
    config.dataset.update(fold=fold, fallback='none')
    return config


def load_fold(config) -> datasets.Dataset:
    """The data of a config without the test split, which is not for choosing among models."""
    return datasets.load(**config.dataset, read_test=False)


def _report(
    config, class_names: Sequence[str], folds: Sequence[Mapping], workdir: pathlib.Path
) -> dict:
    accuracies = [fold['validation_accuracy'] for fold in folds]
    mean, deviation = comparison.mean_and_deviation(accuracies)
    low, high = comparison.interval_of_folds(accuracies)
    same = (
        'dataset', 'kernel', 'num_features', 'projection', 'num_params', 'num_tokens', 'seed',
        'device', 'versions',
    )  # fmt: skip
    own = (
        'validation_accuracy', 'validation_loss', 'epochs', 'train_images', 'images_per_second',
        'train_seconds_per_epoch', 'history',
    )  # fmt: skip
    predictions = [_read_predictions(workdir / f'fold_{fold}') for fold in range(len(folds))]
    labels, log_probabilities = (
        np.concatenate([arrays[name] for arrays in predictions])
        for name in ('labels', 'log_probabilities')
    )
    report = evaluate.report(labels, log_probabilities, class_names)
    results = {
        'mode': 'crossval',
        'config': config.to_dict(),
        **{field: folds[0][field] for field in same},
        'num_folds': len(folds),
        'validation_accuracy': mean,
        'validation_accuracy_deviation': deviation,
        'validation_accuracy_low': low,
        'validation_accuracy_high': high,
        'per_class_accuracy': report['per_class'],
        'folds': [{field: fold[field] for field in own} for fold in folds],
    }
    title = _title(results)
    colour = figures.MODEL_COLOURS[results['kernel']]
    confusion, per_class = np.array(report['confusion']), list(report['per_class'].values())
    figures.save_all(
        {
            'learning_curves': learning_curves(results),
            'confusion_matrix': figures.confusion(confusion, class_names, title),
            'per_class_accuracy': figures.per_class(
                np.array(per_class), class_names, title, split='validation', colour=colour
            ),
        },
        workdir,
    )
    table = table_of_folds(results)
    run_directory.write_text(workdir / 'table.md', typeset.markdown(*table) + '\n')
    run_directory.write_text(workdir / 'table.tex', typeset.latex(*table) + '\n')
    numbers = [{k: v for k, v in fold.items() if k != 'history'} for fold in results['folds']]
    run_directory.write_text(workdir / 'table.csv', typeset.comma_separated(numbers))
    run_directory.write_json(workdir / 'results.json', results)
    return results


def _read_predictions(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return run_directory.read_arrays(workdir / 'validation_predictions.npz')
    except (BadInput, FileNotFoundError) as error:
        raise BadInput(
            f'{workdir}/validation_predictions.npz is missing or damaged: restore it, or remove '
            'the results.json beside it and give the same command again, which scores that fold '
            'anew.'
        ) from error


def _title(results: Mapping) -> str:
    return f'{figures.run_title(results)}, {results["num_folds"]} folds'


def learning_curves(results: Mapping) -> Figure:
    """The folds' losses and accuracies over the epochs, as one band."""
    histories = {results['kernel']: [fold['history'] for fold in results['folds']]}
    return figures.learning_bands(histories, _title(results))


def table_of_folds(results: Mapping) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the folds' table; last mean ± standard deviation, and the interval."""
    head = ['fold', 'validation accuracy', 'loss (nats)', 'epochs', 's/epoch']
    lines = [
        [
            str(number),
            f'{100 * fold["validation_accuracy"]:.2f} %',
            f'{fold["validation_loss"]:.4f}',
            str(fold['epochs']),
            f'{fold["train_seconds_per_epoch"]:.1f}',
        ]
        for number, fold in enumerate(results['folds'])
    ]
    low, high = (100 * results[f'validation_accuracy_{end}'] for end in ('low', 'high'))
    of_all = {
        'mean': comparison.percent(results, 'validation_accuracy'),
        '95 % interval of the mean': f'{low:.2f} to {high:.2f} %',
    }
    return head, [*lines, *([name, text, '', '', ''] for name, text in of_all.items())]
