"""Hyperparameter search: trials of a config, each a run of its own, that Optuna chooses.

A config of `configs/sweeps/` says in its section `sweep` what is searched and how.
"""

import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import optuna
from optuna.trial import FrozenTrial, TrialState

from performer_vit import (
    crossval,
    datasets,
    interruption,
    progress,
    proposals,
    sweep_report,
    train,
)
from performer_vit import space as search_space
from performer_vit import workdir as run_directory
from performer_vit.errors import BadInput, choose, unlike
from performer_vit.space import Space
from performer_vit.trials import PRUNERS, Trial, Trials, check_storage, without_password

_FIELDS = (
    'space', 'conditions', 'sampler', 'pruner', 'num_trials', 'minutes', 'num_folds', 'seed',
    'storage',
)  # fmt: skip

# Reasons for which combinations are not tried: more of them are not shown.
_MOST_TOLD = 10


def sweep(config, workdir: str | os.PathLike | None = None, run_name: str = 'run') -> dict:
    """Searches the space of `config.sweep` for the highest validation accuracy of the last epoch.

    Each trial is a run in a directory of its own, `trial_0007`. The same command goes on where a
    sweep was stopped, however it was: a trial that was interrupted has its number, its combination
    and its checkpoints. Given several times at once, each process takes trials of its own, until
    all together have had `num_trials`. The test split is not looked at.

    Combinations that break a condition, or that the model or the training refuses, are not tried
    and do not count. Trials that diverged, or needed more memory than there is, are recorded as
    failed, and count.

    Args:
      config: as for `train.train`, with the section `sweep`:
        `space`, `conditions`: what is searched, see `space.parse`;
        `sampler`: one of `proposals.SAMPLERS`, and its `seed`;
        `pruner`: one of `trials.PRUNERS`, which sees the validation accuracy of each epoch or, in a
        cross-validation, the mean over the folds so far after each fold;
        `num_trials`: of all processes, however they end;
        `minutes`: after so many of training a process starts no further trial, and finishes the one
        that it works on; 0: no limit;
        `num_folds`: of a cross-validation, whose mean is a trial's value; 0: the validation split;
        `storage`: the URL of a database, '' for a file in the workdir; a password in it is used and
        written nowhere.
      workdir: the directory of the sweep; default `runs/<data set>/<run_name>-sweep`.
      run_name: what the run is called in that default.

    Returns:
      The content of `results.json`: `trials`, and the `best` of those that are complete, or None.

    Raises:
      BadInput: something in the config, the data or a workdir cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    section = config.sweep
    _check(config)
    base = base_config(config)
    fields = run_directory.flatten(base.to_dict())
    space = search_space.parse(
        section.space, section.conditions, fields, grid=section.sampler == 'grid'
    )
    proposals.check(space, section.sampler)
    name = f'{run_name}-sweep'
    run_directory.check_writable(workdir or run_directory.default_workdir(name, ''))
    try:
        dataset = crossval.load_fold(_scored(base, section.num_folds))
    except BadInput as error:
        if not section.num_folds:
            raise
        raise BadInput(str(error).replace('dataset.num_folds', 'sweep.num_folds')) from error
    if dataset.validation is None:
        raise BadInput(
            'the data set has no validation split to score trials on: set '
            'dataset.validation_fraction above 0, or sweep.num_folds to 2 or more.'
        )
    if 'early_stopping_patience' not in {parameter.field for parameter in space.parameters}:
        train.check_not_stopped(base)  # Else every combination would be refused, one by one.
    told_of, refusals = set(), {}

    def refusal(combination: Mapping) -> str | None:
        # Tracing a model takes a third of a second, and a grid begins anew with each proposal.
        key = frozenset(combination.items())
        if key not in refusals:
            refusals[key] = look_at(combination)
        return refusals[key]

    def look_at(combination: Mapping) -> str | None:
        values = space.values(combination)
        unmet = space.unmet({**fields, **values})
        if unmet is not None:
            return f'{unmet} does not hold'
        trial_config = _scored(_changed(base, values), section.num_folds)
        try:
            train.check_scored(trial_config)
            train.steps_per_epoch(trial_config, len(dataset.train))
        except BadInput as error:
            reason = str(error).rstrip('.')
            # No condition of the user's: it may be a slip, and part of the space is never tried.
            if reason not in told_of and len(told_of) < _MOST_TOLD:
                told_of.add(reason)
                tried = sweep_report.combination(values)
                progress.say(dataset.name, f'Not tried, nor others like it: {tried}: {reason}.')
            return reason
        return None

    def propose(trials: Sequence[FrozenTrial]) -> dict:
        try:
            return proposals.propose(space, section.sampler, section.seed, trials, refusal)
        except proposals.NothingLeftError as error:
            if trials:
                raise
            raise BadInput(
                f'there is nothing to try: {error}. Change sweep.space, sweep.conditions or '
                'the config.'
            ) from error

    directory = pathlib.Path(workdir or run_directory.default_workdir(name, dataset.name))
    is_new = not (directory / 'config.json').exists()
    if is_new:
        _check_best(base, dataset)
        propose([])  # Where nothing can be tried, before there is a directory.
    told = {**config.to_dict(), 'mode': 'sweep'}
    told['sweep'] |= {'storage': without_password(section.storage)}
    # Not what is read there: another sweep may begin in the same directory in the same moment.
    definition = run_directory.definition(told, datasets.fingerprints(dataset))
    directory = run_directory.claim(directory, definition)
    try:
        trials = Trials(directory, section.storage, section.pruner, definition)
    except BadInput:
        # Else the config, once mended, would be another one's there; what another sweep has put
        # there in the meantime stays.
        if is_new and run_directory.read_json(directory / 'config.json') == definition:
            (directory / 'config.json').unlink(missing_ok=True)
        raise
    _work(trials, section, space, base, dataset, propose)
    with trials.alone():
        results = sweep_report.write(trials.all(), section, space, base, dataset.name, directory)
        undrawn = sweep_report.draw(results, trials.all(), directory)
        orphans = trials.orphans()
    progress.say(dataset.name, sweep_report.ending(results, undrawn, orphans, directory))
    return results


def _check_best(base, dataset: datasets.Dataset) -> None:
    """Raises `BadInput` for what trials do not mind, but the test of their best would."""
    try:
        train.check_needs(base)
        train.check_flips(base, dataset)
    except BadInput as error:
        raise BadInput(f'the best config of this sweep could not be tested: {error}') from error


def base_config(config):
    """A copy of the config without the section, on the data set that it names or none."""
    base = config.copy_and_resolve_references()
    with base.unlocked():
        del base['sweep']
    base.dataset.fallback = 'none'
    if config.sweep.num_folds:
        base.dataset.num_folds = config.sweep.num_folds
    return base


def _check(config) -> None:
    """Raises `BadInput` for what is wrong in the section but for the space."""
    section = config.sweep
    unknown = [field for field in section if field not in _FIELDS]
    missing = [field for field in _FIELDS if field not in section]
    if unknown or missing:
        raise BadInput(
            f'the section `sweep` of the config {unlike(unknown, missing)}; it needs just these: '
            f'{", ".join(_FIELDS)}.'
        )
    choose('sweep.sampler', section.sampler, proposals.SAMPLERS)
    choose('sweep.pruner', section.pruner, PRUNERS)
    for field, least in {'num_trials': 1, 'num_folds': 0, 'seed': 0}.items():
        if type(section[field]) is not int or section[field] < least:
            raise BadInput(
                f'sweep.{field} is {section[field]!r}; set it to an integer of {least} or more.'
            )
    if section.num_folds == 1:
        raise BadInput(
            'sweep.num_folds is 1; one fold is held out and the others are trained on: set it to 2 '
            'or more, or to 0 for the validation split.'
        )
    if section.num_folds and config.dataset.fold != -1:
        raise BadInput(
            f'dataset.fold is {config.dataset.fold}, but sweep.num_folds takes every fold in turn: '
            'set dataset.fold to -1, or sweep.num_folds to 0 for that fold alone.'
        )
    if type(section.minutes) not in (int, float) or not section.minutes >= 0:
        raise BadInput(
            f'sweep.minutes is {section.minutes!r}; set it to a number of 0 or more; 0: no limit.'
        )
    if not isinstance(section.storage, str):
        raise BadInput(
            f"sweep.storage is {section.storage!r}; set it to the URL of a database, or to ''."
        )
    check_storage(section.storage)


def _changed(base, values: Mapping):
    config = base.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(values))
    return config


def _scored(config, num_folds: int):
    """The config of a trial, or that of the first fold of its cross-validation."""
    return crossval.fold_config(config, 0) if num_folds else config


def _work(
    trials: Trials,
    section,
    space: Space,
    base,
    dataset: datasets.Dataset,
    propose: Callable[[Sequence[FrozenTrial]], dict],
) -> None:
    """Takes one trial after the other, as long as there are any."""

    def say(text: str) -> None:
        progress.say(dataset.name, text)

    done_before = sum(trial.state.is_finished() for trial in trials.all())
    started = time.perf_counter()
    fixed = proposals.distributions(space)
    while True:
        try:
            trial = trials.claim(section.num_trials, fixed, propose)
        except proposals.NothingLeftError as error:
            say(f'The sweep ends before sweep.num_trials: {error}.')
            return
        if trial is None:
            return
        try:
            done = sum(other.state.is_finished() for other in trials.all())
            left = progress.remaining(started, done - done_before, section.num_trials - done_before)
            if section.minutes:
                budget = section.minutes - (time.perf_counter() - started) / 60
                left += f', {budget:.0f} of {section.minutes:g} minutes to begin trials in'
            values = space.values(trial.combination)
            continued = ', continued' if trial.continued else ''
            say(
                f'{trial.directory.name}, {trial.number + 1} of {section.num_trials}{continued}: '
                f'{sweep_report.combination(values)}{left}'
            )
            _run(trial, _changed(base, values), dataset, section.num_folds)
        finally:
            trial.close()
        jax.clear_caches()
        with trials.alone():
            results = sweep_report.write(
                trials.all(), section, space, base, dataset.name, trials.workdir
            )
        say(sweep_report.trial_ending(results, trial.number))
        if 0 < 60 * section.minutes <= time.perf_counter() - started:
            say(f'The {section.minutes:g} minutes of sweep.minutes are over.')
            return


def _run(trial: Trial, config, dataset: datasets.Dataset, num_folds: int) -> None:
    """Trains and scores a trial, and writes how it ended."""
    history = []

    def on_epoch(row: dict) -> None:
        history.append(row)
        last = row['epoch'] == config.num_epochs
        if trial.is_pruned(row['epoch'], row['validation_accuracy'], last=last):
            raise optuna.TrialPruned

    state, value, message, asked = TrialState.COMPLETE, None, None, False
    try:
        if num_folds:
            value = _cross_validate(trial, config, dataset, num_folds, history)
        else:
            results = train.validate(config, dataset, trial.directory, on_epoch)
            value, history = results['validation_accuracy'], results['history']
    except optuna.TrialPruned as error:
        state, asked = TrialState.PRUNED, interruption.was_asked(error)
    except Exception as error:
        message = train.own_failure(error)
        if message is None:
            raise
        state, asked = TrialState.FAIL, interruption.was_asked(error)
    trial.finish(
        state,
        value,
        epochs=len(history),
        seconds=sum(row['seconds'] for row in history),
        message=message,
    )
    interruption.end_series(asked)


def _cross_validate(
    trial: Trial, config, dataset: datasets.Dataset, num_folds: int, history: list[dict]
) -> float:
    """The mean over the folds; `history` gets the epochs of all of them."""
    run_directory.claim(
        trial.directory,
        run_directory.definition(config.to_dict(), datasets.fingerprints(dataset)),
    )
    values = []

    def on_epoch(row: dict) -> None:
        trial.came(fold, row['epoch'])
        history.append(row)

    for fold in range(num_folds):
        before = len(history)
        results = crossval.run_fold(config, fold, trial.directory / f'fold_{fold}', on_epoch)
        history[before:] = results['history']  # All epochs of a fold that had been finished.
        values.append(results['validation_accuracy'])
        last = fold + 1 == num_folds
        if trial.is_pruned(fold + 1, statistics.fmean(values), last=last, of_all=True):
            raise optuna.TrialPruned
    return statistics.fmean(values)
