"""Sweeps: every trial once, whatever is killed; nothing infeasible; nothing that differs unseen."""

import csv
import dataclasses
import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optuna
import pytest
from ml_collections import ConfigDict
from optuna.trial import TrialState
from PIL import Image
from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import (
    api_pb2,
    backend_context,
    get_experiment,
    list_session_groups,
)

from performer_vit import (
    crossval,
    datasets,
    environment,
    interruption,
    locks,
    memory,
    progress,
    proposals,
    space,
    sweep,
    sweep_report,
    train,
    trials,
    workdir,
)
from performer_vit.errors import BadInput
from tests import test_run
from tests.conftest import ROOT, load_config, make_tiny_config

RATE = ('optimizer.learning_rate', 'log_uniform', 1e-4, 1e-1)
DEPTH = ('model.depth', 'integer', 1, 4)
WIDTH = ('model.width', 'choice', (16, 24, 32))
HEADS = ('model.num_heads', 'choice', (2, 4, 5))
DIVISIBLE = ('model.width', 'divisible by', 'model.num_heads')
EPOCHS = 4


def config_of(*rows, conditions=(), **fields):
    """A tiny config with a section `sweep`; fields of the section by their names."""
    config = make_tiny_config()
    config.num_epochs = EPOCHS
    config.sweep = ConfigDict({
        'space': rows or (RATE, DEPTH), 'conditions': conditions, 'sampler': 'tpe', 'seed': 0,
        'pruner': 'none', 'num_trials': 3, 'minutes': 0.0, 'num_folds': 0, 'storage': '',
    })  # fmt: skip
    config.sweep.update(fields)
    return config


class Trainer:
    """Stands for training: an epoch takes no time, and an interrupted run goes on where it was."""

    def __init__(self, accuracy):
        self.accuracy = accuracy  # Of a config.
        self.epochs = []  # What was trained: directory and epoch, in turn.
        self.configs = {}  # By directory.
        self.saved = {}  # Rows of each directory, as its checkpoints would have them.
        self.stop_at = None  # The directory and epoch after which the process dies.

    def validate(self, config, dataset, directory, on_epoch=lambda row: None):
        assert self.configs.setdefault(directory.name, config) == config
        rows = self.saved.setdefault(directory.name, [])
        for row in list(rows):
            on_epoch(row)
        top = self.accuracy(config)
        for epoch in range(len(rows) + 1, config.num_epochs + 1):
            rows.append({
                'epoch': epoch, 'seconds': 30.0, 'validation_accuracy': top * (1 - 2.0**-epoch),
            })  # fmt: skip
            self.epochs.append((directory.name, epoch))
            if (directory.name, epoch) == self.stop_at:
                raise KeyboardInterrupt
            on_epoch(rows[-1])
        return {'validation_accuracy': rows[-1]['validation_accuracy'], 'history': list(rows)}


def data_of(num_train, num_validation):
    """Images of one black pixel."""
    train_split, validation = (
        datasets.Split(np.zeros((n, 1, 1, 3), np.uint8), np.zeros(n, np.int32))
        for n in (num_train, num_validation)
    )
    channels = np.ones(3, np.float32)
    return datasets.Dataset(
        'digits', ('0',), train_split, validation, None, channels, channels, flip=False
    )


def by_rate(config):
    """Best at a learning rate of 1e-2, from 0 to 1."""
    return 0.9 - 0.2 * abs(math.log10(config.optimizer.learning_rate / 1e-2))


@pytest.fixture
def trainer(monkeypatch):
    """No data and no training; combinations are checked for real by those who ask for it."""
    made = Trainer(by_rate)
    monkeypatch.setattr(crossval, 'load_fold', lambda config: data_of(1000, 100))
    monkeypatch.setattr(train, 'validate', made.validate)
    monkeypatch.setattr(train, 'check_scored', lambda config: None)
    return made


def by_number(results):
    return sorted(results['trials'], key=lambda row: row['number'])


def test_what_a_sweep_leaves_behind(tmp_path, trainer):
    """Every trial is a run of the config with its combination; tables and files say the same."""
    config = config_of(num_trials=5)
    results = sweep.sweep(config, tmp_path)
    rows = by_number(results)
    assert [row['number'] for row in rows] == [0, 1, 2, 3, 4]
    assert list(trainer.configs) == [f'trial_000{i}' for i in range(5)]
    for row, trained in zip(rows, trainer.configs.values(), strict=True):
        assert 'sweep' not in trained and trained.dataset.fallback == 'none'
        assert row['params'] == {
            'optimizer.learning_rate': trained.optimizer.learning_rate,
            'model.depth': trained.model.depth,
        }
        np.testing.assert_allclose(row['value'], by_rate(trained) * (1 - 2.0**-EPOCHS))
        assert (row['state'], row['epochs'], row['seconds']) == ('complete', 4, 120.0)
    values = [row['value'] for row in results['trials']]
    assert values == sorted(values, reverse=True)
    assert results['best'] == results['trials'][0]
    saved = workdir.read_json(tmp_path / 'results.json')
    assert (saved['mode'], saved['dataset']) == ('sweep', 'digits')
    assert (saved['sampler'], saved['pruner'], saved['trials']) == (
        'tpe', 'none', results['trials'],
    )  # fmt: skip
    with open(tmp_path / 'table.csv', encoding='utf-8', newline='') as file:
        table = list(csv.DictReader(file))
    assert [float(row['value']) for row in table] == values
    assert [int(row['model.depth']) for row in table] == [
        row['params']['model.depth'] for row in results['trials']
    ]
    lines = (tmp_path / 'table.md').read_text().splitlines()
    assert lines[0].startswith('| trial | validation accuracy | state | epochs | minutes | learn')
    assert f'| {100 * values[0]:.2f} % | complete | 4 | 2.0 |' in lines[2]
    assert r'\toprule' in (tmp_path / 'table.tex').read_text()
    for name in ('history', 'parallel_coordinate', 'param_importances'):
        with Image.open(tmp_path / 'figures' / f'{name}.png') as image:
            assert image.size[0] == 1600


def test_the_best_config_is_the_config_of_the_best_trial(tmp_path, trainer):
    """Catches values that lose digits or types on their way into the file, tuples before all."""
    channels = ('model.stem_channels', 'choice', (((8,), (16,)), ((16,),)))
    results = sweep.sweep(config_of(RATE, channels, num_trials=4), tmp_path)
    scope = {}
    exec((tmp_path / 'best_config.py').read_text(), scope)
    best = scope['get_config']()
    assert best == trainer.configs[f'trial_{results["best"]["number"]:04d}']
    assert isinstance(best.model.stem_channels, tuple) and best.is_type_safe
    with pytest.raises(ValueError, match="argument is 'digits'; this config takes none"):
        scope['get_config']('digits')


@pytest.mark.parametrize('sampler', ['random', 'tpe', 'grid'])
def test_a_stopped_sweep_is_the_sweep_that_was_never_stopped(tmp_path, trainer, sampler):
    """Stopped in the middle of trials 3 and 12: the same combinations, epochs and values.

    From the eleventh trial on TPE learns. Catches a sampler that draws anew, or on, after a
    restart, a trial that is lost or begun twice, and an epoch that is trained or reported twice.
    """
    rows = (DEPTH, WIDTH, ('optimizer.learning_rate', 'log_uniform', 1e-3, 1e-1))
    if sampler == 'grid':
        rows = (*rows[:2], (*rows[2], 3))
    config = config_of(*rows, num_trials=14, sampler=sampler)
    whole = sweep.sweep(config, tmp_path / 'whole')
    epochs, trainer.epochs = trainer.epochs, []
    trainer.saved.clear()
    for trainer.stop_at in (('trial_0003', 2), ('trial_0012', 1)):
        with pytest.raises(KeyboardInterrupt):
            sweep.sweep(config, tmp_path / 'stopped')
    stopped = sweep.sweep(config, tmp_path / 'stopped')
    assert stopped['trials'] == whole['trials']
    assert trainer.epochs == epochs == [
        (f'trial_{number:04d}', epoch) for number in range(14) for epoch in range(1, EPOCHS + 1)
    ]  # fmt: skip
    reported = optuna.load_study(
        study_name='sweep', storage=f'sqlite:///{tmp_path}/stopped/study.sqlite3'
    )
    for trial in reported.trials:
        assert list(trial.intermediate_values) == [1, 2, 3, 4]


def test_another_seed_searches_elsewhere(tmp_path, trainer):
    found = []
    for seed in (0, 1):
        config = config_of(num_trials=2, sampler='random', seed=seed)
        found.append(sweep.sweep(config, tmp_path / str(seed))['trials'])
        trainer.configs.clear()
        trainer.saved.clear()
    assert found[0] != found[1]


def test_tpe_finds_what_is_good(tmp_path, trainer):
    """The thirty trials after ten at random: uniform draws would be 0.83 ± 0.10 decades off.

    So 0.5 is passed with a chance of one in a thousand. Catches a wrong direction, which ends at
    1.5 or so, and a sampler that forgets what was found.
    """
    rows = by_number(sweep.sweep(config_of(RATE, num_trials=40, seed=3), tmp_path))
    off = [abs(math.log10(row['params']['optimizer.learning_rate'] / 1e-2)) for row in rows]
    assert np.mean(off[10:]) < 0.5


def test_num_trials_may_be_raised(tmp_path, trainer):
    sweep.sweep(config_of(num_trials=2), tmp_path)
    results = sweep.sweep(config_of(num_trials=5), tmp_path)
    assert len(results['trials']) == 5 and len(trainer.epochs) == 5 * EPOCHS
    assert len(sweep.sweep(config_of(num_trials=3), tmp_path)['trials']) == 5
    assert len(trainer.epochs) == 5 * EPOCHS


def test_minutes_end_a_sweep_between_trials(tmp_path, trainer):
    """A process begins one trial at least, and finishes it."""
    config = config_of(num_trials=3, minutes=1e-9)
    for done in (1, 2, 3, 3):
        results = sweep.sweep(config, tmp_path)
        assert [row['state'] for row in results['trials']] == ['complete'] * done


def test_the_median_prunes(tmp_path, trainer, capsys):
    """The first five trials run to their end; then those below the median stop at once.

    Catches accuracies that are minimised, a pruner that never sees an epoch, and a pruned trial
    that is taken for the best.
    """
    trainer.accuracy = lambda config: 0.9 - 0.1 * config.model.depth
    depths = ('model.depth', 'choice', (1, 2, 3, 4, 5, 6, 7, 8))
    config = config_of(depths, sampler='grid', pruner='median', num_trials=8)
    results = sweep.sweep(config, tmp_path)
    rows = by_number(results)
    median = np.median([row['params']['model.depth'] for row in rows[:5]])
    for row in rows[5:]:
        worse = row['params']['model.depth'] > median
        assert row['state'] == ('pruned' if worse else 'complete')
        assert row['epochs'] == (1 if worse else EPOCHS)
    assert 'pruned' in {row['state'] for row in rows}
    assert results['best']['params']['model.depth'] == 1
    pruned = next(row for row in rows if row['state'] == 'pruned')
    assert f'trial_{pruned["number"]:04d} pruned after 1 epoch:' in capsys.readouterr().out


def test_what_was_judged_is_not_judged_again(tmp_path, trainer):
    """A trial that leads at first and falls behind, stopped after its third epoch, goes on.

    Catches earlier epochs, which a run that goes on repeats, judged by what is known now: the trial
    would end at its first epoch, with the accuracy of its third.
    """
    shared = trials.Trials(tmp_path, '', 'median', {})
    searched = space.parse((('x', 'uniform', 0.0, 1.0),), (), {'x': 0.0}, grid=False)

    def claim_one():
        return shared.claim(
            6,
            proposals.distributions(searched),
            lambda seen: proposals.propose(searched, 'random', 0, seen, lambda _: None),
        )

    for _ in range(5):
        trial = claim_one()
        assert not any(trial.is_pruned(step, step / 4, last=step == 4) for step in range(1, 5))
        trial.finish(TrialState.COMPLETE, 1.0, epochs=4, seconds=1.0)
        trial.close()
    values = {1: 0.6, 2: 0.6, 3: 0.6, 4: 0.6}
    trial = claim_one()
    assert not trial.is_pruned(1, values[1], last=False)
    assert not trial.is_pruned(2, values[2], last=False)
    assert trial.is_pruned(3, values[3], last=False)
    trial.close()  # Before anyone wrote that down.
    trial = claim_one()
    assert trial.continued
    assert [trial.is_pruned(step, values[step], last=False) for step in (1, 2)] == [False, False]
    assert trial.is_pruned(3, values[3], last=False)
    trial.close()
    trial = claim_one()
    trial.is_pruned(4, values[4], last=True)
    trial.close()  # After the last epoch: nothing is left to save.
    trial = claim_one()
    assert not any(trial.is_pruned(step, values[step], last=step == 4) for step in values)
    trial.close()


def test_a_trial_that_kills_its_processes_fails_at_last(tmp_path):
    """Catches a sweep that begins the same trial for ever, and that counts orderly ends."""

    def die():
        trial = claim(trials.Trials(tmp_path, '', 'none', {}))
        number, begun = trial.number, trial.continued
        trial._lock.close()  # As the kernel does when a process dies.
        return number, begun

    assert [die() for _ in range(3)] == [(0, False), (0, True), (0, True)]
    trial = claim(trials.Trials(tmp_path, '', 'none', {}))
    trial.is_pruned(1, 0.5, last=False)  # A further step: it can be trained.
    trial._lock.close()
    assert {die() for _ in range(4)} == {(0, True)}
    trial = claim(trials.Trials(tmp_path, '', 'none', {}))
    assert trial.number == 1
    trial.close()
    shared = trials.Trials(tmp_path, '', 'none', {})
    failed, going = shared.all()
    assert (failed.state, going.state) == (TrialState.FAIL, TrialState.RUNNING)
    assert '5 processes in a row died' in failed.user_attrs['message']
    for _ in range(7):  # Let go of in good order, as by Ctrl-C.
        trial = claim(shared)
        assert trial.number == 1
        trial.close()


def test_epochs_of_a_fold_are_steps_too(tmp_path):
    """Catches a cross-validated trial that fails after five kills, though each came further."""

    def work(fold, epoch):
        trial = claim(trials.Trials(tmp_path, '', 'none', {}))
        for earlier in range(1, epoch + 1):  # As a run that goes on repeats those that it has.
            trial.came(fold, earlier)
        trial._lock.close()
        return trial.number

    assert {work(0, epoch) for epoch in range(1, 9)} == {0}
    assert [work(1, 2) for _ in range(5)] == [0] * 5
    assert work(1, 2) == 1  # Four more that came no further: it is given up.


def test_a_verdict_of_successive_halving_is_kept(tmp_path):
    """Catches a trial that was to end, and goes on since its process died before that was told.

    Optuna marks the step as passed before it judges.
    """
    shared = trials.Trials(tmp_path, '', 'successive_halving', {})
    best = claim(shared)
    assert not best.is_pruned(1, 0.9, last=False)
    trial = claim(shared)
    assert trial.is_pruned(1, 0.1, last=False)
    trial.close()
    continued = claim(shared)
    assert continued.number == trial.number and continued.is_pruned(1, 0.1, last=False)


def test_another_directory_of_the_same_path(tmp_path):
    """Catches a worker on another machine's disk, which takes running trials for orphans."""
    storage = f'sqlite:///{tmp_path}/shared.sqlite3'
    workdir_here = tmp_path / 'sweep'
    workdir_here.mkdir()
    for _ in range(2):
        trials.Trials(workdir_here, storage, 'none', {})
    workdir_here.rename(tmp_path / 'there')
    workdir_here.mkdir()
    with pytest.raises(BadInput, match=r'began in another directory of that path.*locks'):
        trials.Trials(workdir_here, storage, 'none', {})


def test_a_database_that_knows_nothing_of_the_trials(tmp_path, trainer):
    """Catches a lost database, after which trials would be numbered and judged anew."""
    config = config_of(num_trials=1)
    sweep.sweep(config, tmp_path)
    (tmp_path / 'study.sqlite3').unlink()
    with pytest.raises(BadInput, match=r'study\.sqlite3, which has no trials of this sweep'):
        sweep.sweep(config_of(num_trials=2), tmp_path)
    assert len(trainer.configs) == 1
    storage = f'sqlite:///{tmp_path}/theirs.sqlite3'
    study = optuna.create_study(storage=storage, study_name=str(tmp_path / 'new'))
    study.ask()
    with pytest.raises(BadInput, match=r'has trials that another program made'):
        sweep.sweep(config_of(storage=storage), tmp_path / 'new')


def test_successive_halving_prunes(tmp_path, trainer):
    """Of equally long trials that get worse, only the first passes the first epoch."""
    trainer.accuracy = lambda config: 0.9 - 0.1 * len(trainer.configs)
    results = sweep.sweep(config_of(pruner='successive_halving', num_trials=4), tmp_path)
    assert [row['epochs'] for row in by_number(results)] == [4, 1, 1, 1]


def test_the_last_epoch_is_never_pruned(tmp_path, trainer):
    """Catches a trial that is thrown away after all of it has been trained."""
    trainer.accuracy = lambda config: 0.9 - 0.1 * len(trainer.configs)
    config = config_of(pruner='successive_halving', num_trials=3)
    config.num_epochs = 1
    results = sweep.sweep(config, tmp_path)
    assert [row['state'] for row in results['trials']] == ['complete'] * 3


def test_a_diverged_trial_is_recorded_and_the_sweep_goes_on(tmp_path, trainer, monkeypatch):
    def validate(config, dataset, directory, on_epoch):
        if directory.name == 'trial_0001':
            raise FloatingPointError('the loss of step 7 is not finite.')
        if directory.name == 'trial_0002':
            raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')
        return trainer.validate(config, dataset, directory, on_epoch)

    monkeypatch.setattr(train, 'validate', validate)
    results = sweep.sweep(config_of(num_trials=4), tmp_path)
    rows = by_number(results)
    assert [row['state'] for row in rows] == ['complete', 'failed', 'failed', 'complete']
    assert rows[1]['message'] == 'the loss of step 7 is not finite.'
    assert 'more memory' in rows[2]['message']
    assert rows[1]['value'] is None and results['best']['number'] in (0, 3)
    assert all(row['device'] == environment.device() for row in rows)
    assert all(row['versions']['jax'] == jax.__version__ for row in rows)
    text = (tmp_path / 'table.md').read_text()
    assert 'trial_0001 failed: the loss of step 7 is not finite.' in text


def test_any_other_error_leaves_the_trial_to_be_continued(tmp_path, trainer, monkeypatch):
    """Catches a full disk that is written down as a bad combination."""

    def validate(config, dataset, directory, on_epoch):
        raise OSError('no space left on device')

    config = config_of(num_trials=1)
    with monkeypatch.context() as broken:
        broken.setattr(train, 'validate', validate)
        with pytest.raises(OSError, match='no space left'):
            sweep.sweep(config, tmp_path)
    assert [row['state'] for row in sweep.sweep(config, tmp_path)['trials']] == ['complete']


def test_a_sweep_in_which_all_diverge_has_no_best(tmp_path, trainer, capsys):
    def diverge(config):
        raise FloatingPointError('not finite')

    trainer.accuracy = diverge
    results = sweep.sweep(config_of(num_trials=2), tmp_path)
    assert results['best'] is None and not (tmp_path / 'best_config.py').exists()
    assert 'there is no best_config.py' in capsys.readouterr().out


def test_a_grid_goes_through_every_feasible_combination_once(tmp_path, trainer, capsys):
    config = config_of(WIDTH, HEADS, conditions=(DIVISIBLE,), sampler='grid', num_trials=100)
    results = sweep.sweep(config, tmp_path)
    found = {tuple(row['params'].values()) for row in results['trials']}
    assert len(results['trials']) == len(found) == 6
    assert found == {(width, heads) for width in (16, 24, 32) for heads in (2, 4)}
    assert 'ends before sweep.num_trials: none of the 9 combinations' in capsys.readouterr().out


@pytest.mark.parametrize('sampler', ['random', 'tpe'])
def test_what_is_infeasible_is_never_tried_and_never_counted(tmp_path, trainer, sampler):
    """And no combination is tried twice: so a small space ends, all of it searched."""
    rows = (WIDTH, HEADS, ('model.depth', 'integer', 1, 2))
    config = config_of(*rows, conditions=(DIVISIBLE,), sampler=sampler, num_trials=100)
    results = sweep.sweep(config, tmp_path)
    found = {tuple(row['params'].values()) for row in results['trials']}
    assert len(results['trials']) == len(found) == 12
    assert all(width % heads == 0 for width, heads, _ in found)


def test_what_the_training_refuses_is_never_tried(tmp_path, trainer, monkeypatch, capsys):
    """The model knows that 5 heads do not go into a width of 16; no condition says so here.

    Catches a slip of the user's in a space, of which a part is never tried, and nobody told.
    """
    monkeypatch.undo()
    monkeypatch.setattr(crossval, 'load_fold', lambda config: data_of(100, 100))
    monkeypatch.setattr(train, 'validate', trainer.validate)
    batch = ('batch_size', 'choice', (64, 128))  # 128 are more than there are images.
    config = config_of(HEADS, batch, sampler='grid', num_trials=9)
    results = sweep.sweep(config, tmp_path)
    found = {tuple(row['params'].values()) for row in results['trials']}
    assert found == {(2, 64), (4, 64)}
    told = [line for line in capsys.readouterr().out.splitlines() if 'Not tried' in line]
    assert len(told) == len(set(told)) == 2  # Whatever the other field is, and once.
    assert any('num heads 5' in line and 'num_heads' in line for line in told), told


def test_what_is_refused_is_looked_at_once(tmp_path, trainer, monkeypatch):
    """Tracing a model takes a third of a second: catches a grid that traces for each proposal."""
    seen = []
    check = train.check_scored
    monkeypatch.setattr(
        train, 'check_scored', lambda config: (seen.append(config.to_json()), check(config))
    )
    sizes = ('batch_size', 'choice', (126, 128))  # Of four devices, no 126th part is whole.
    results = sweep.sweep(config_of(sizes, DEPTH, sampler='grid', num_trials=8), tmp_path)
    assert len(results['trials']) == 4 and len(seen) == len(set(seen)) == 8


def test_early_stopping_is_refused_at_once(tmp_path, trainer, monkeypatch):
    """Else each of a thousand drawn combinations would be refused for it, by a traced model."""
    monkeypatch.setattr(train, 'check_scored', lambda config: pytest.fail('looks at trials'))
    config = config_of()
    config.early_stopping_patience = 3
    with pytest.raises(BadInput, match='early_stopping_patience is 3, but the validation'):
        sweep.sweep(config, tmp_path / 'run')


def test_a_fold_that_fails_has_had_its_epochs(tmp_path, trainer, monkeypatch):
    """Catches 'failed after 0 epochs' of a trial whose second fold diverges in its third."""

    def run_fold(config, fold, directory, on_epoch):
        history = [{'epoch': epoch, 'seconds': 6.0} for epoch in range(1, EPOCHS + 1)]
        if fold == 0:
            return {'validation_accuracy': 0.5, 'history': history}  # It had been finished.
        for row in history[:2]:
            on_epoch(row)
        raise FloatingPointError('not finite')

    monkeypatch.setattr(crossval, 'run_fold', run_fold)
    (row,) = sweep.sweep(config_of(num_folds=3, num_trials=1), tmp_path)['trials']
    assert (row['state'], row['epochs'], row['seconds']) == (
        'failed',
        EPOCHS + 2,
        6.0 * (EPOCHS + 2),
    )


def test_who_goes_on_with_a_trial_that_runs(tmp_path, trainer):
    """Catches 'other processes go on with them' of trials whose processes have died."""
    results = sweep.sweep(config_of(num_trials=3), tmp_path)
    for row in results['trials'][1:]:
        row['state'] = 'running'
    others = 'are those of other processes'
    for orphans, parts in (
        ((), (others,)),
        ((1,), ('by the same command: trial_0001.', others)),
        ((1, 2), ('by the same command: trial_0001, trial_0002.',)),
    ):
        text = sweep_report.ending(results, (), orphans, tmp_path)
        assert all(part in text for part in parts)
        assert (others in text) == (others in parts)
    assert 'colon' not in text
    (tmp_path / 'a:b').mkdir()
    (tmp_path / 'a:b' / 'table.md').write_text('')
    assert 'to a path without a colon' in sweep_report.ending(results, (), (), tmp_path / 'a:b')


def test_what_the_best_config_could_not_do_is_said_first(tmp_path, trainer):
    """Trials are not tested, but the best is to be: catches hours for a config that is refused."""
    config = config_of(num_folds=3)
    config.dataset.validation_fraction = 0.0
    with pytest.raises(BadInput, match=r"test_state is 'best', which needs a validation split"):
        sweep.sweep(config, tmp_path / 'run')
    config = config_of()
    config.flip_averaging = True
    with pytest.raises(BadInput, match=r'images of digits are never mirrored'):
        sweep.sweep(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_stop_is_heard_where_the_trial_ends_by_itself(tmp_path, trainer, monkeypatch):
    """Catches a sweep that goes on with the next trial, since this one was pruned or diverged."""

    def validate(config, dataset, directory, on_epoch):
        with interruption.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            raise FloatingPointError('not finite')

    with monkeypatch.context() as patched:
        patched.setattr(train, 'validate', validate)
        with pytest.raises(interruption.Interrupted):
            sweep.sweep(config_of(num_trials=2), tmp_path)
    rows = by_number(sweep.sweep(config_of(num_trials=2), tmp_path))
    assert [row['state'] for row in rows] == ['failed', 'complete']


def test_nothing_feasible_is_said_before_anything_is_made(tmp_path, trainer):
    impossible = ('model.num_heads', 'at least', 100)
    for sampler, rows in (('grid', (WIDTH, HEADS)), ('tpe', (RATE,)), ('random', (RATE,))):
        config = config_of(*rows, conditions=(impossible,), sampler=sampler)
        with pytest.raises(BadInput, match=r'nothing to try: .* at least 100 does not hold'):
            sweep.sweep(config, tmp_path / 'sweep')
    assert not (tmp_path / 'sweep').exists()


def test_cross_validated_trials(tmp_path, trainer, monkeypatch):
    """The mean over the folds; a trial is pruned by its first folds; all folds are its own runs."""
    scored = []

    def run_fold(config, fold, directory, on_epoch):
        assert config.dataset.num_folds == 3
        scored.append((directory.parent.name, directory.name, fold))
        accuracy = by_rate(config) + 0.01 * fold
        if directory.parent.name >= 'trial_0005':  # Those that may be pruned.
            accuracy = (0.99, 0.1, 0.1)[fold]
        on_epoch({'epoch': 1})
        return {'validation_accuracy': accuracy, 'history': [{'seconds': 6.0}] * EPOCHS}

    monkeypatch.setattr(crossval, 'run_fold', run_fold)
    rates = ('optimizer.learning_rate', 'choice', tuple(1e-2 * 2.0**-i for i in range(8)))
    config = config_of(rates, num_folds=3, num_trials=8, sampler='grid', pruner='median')
    rows = by_number(sweep.sweep(config, tmp_path))
    assert scored[:3] == [('trial_0000', f'fold_{fold}', fold) for fold in range(3)]
    for row in rows[:5]:
        expected = 0.9 - 0.2 * abs(math.log10(row['params']['optimizer.learning_rate'] / 1e-2))
        np.testing.assert_allclose(row['value'], expected + 0.01)
        assert (row['state'], row['epochs'], row['seconds']) == ('complete', 12, 72.0)
    # By the mean of two folds: catches trials that live on the better one of the first alone.
    assert {(row['state'], row['epochs']) for row in rows[5:]} == {('pruned', 8)}
    assert workdir.read_json(tmp_path / 'trial_0000' / 'config.json')['dataset']['num_folds'] == 3


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'space': ()}, r'sweep\.space is empty'),
        ({'sampler': 'annealing'}, r"sweep\.sampler is 'annealing'; allowed are 'grid', 'random'"),
        ({'pruner': 'hyperband'}, r"sweep\.pruner is 'hyperband'; allowed are 'none', 'median'"),
        ({'num_trials': 0}, r'sweep\.num_trials is 0; set it to an integer of 1 or more'),
        ({'num_trials': 2.0}, r'sweep\.num_trials is 2\.0'),
        ({'minutes': -1.0}, r'sweep\.minutes is -1\.0'),
        ({'num_folds': 1}, r'sweep\.num_folds is 1; one fold'),
        ({'num_folds': -2}, r'sweep\.num_folds is -2'),
        ({'seed': -1}, r'sweep\.seed is -1'),
        ({'storage': 'study.db'}, r'sweep\.storage is not the URL of a database'),
        ({'storage': 'mysqlite://nowhere'}, r"sweep\.storage is 'mysqlite://nowhere', a database"),
        ({'storage': 'sqlite:////proc/study'}, r'a database that cannot be used'),
        ({'storage': 'sqlite://'}, r"sweep\.storage is 'sqlite://', a database in memory"),
        ({'storage': 'sqlite:///:memory:'}, r'a database in memory, which would be lost'),
        ({'trials': 5}, r'the unknown fields trials; it needs just these: space, conditions'),
        ({'sampler': 'grid'}, r'the number of points of the grid is None'),
        (
            {'sampler': 'grid', 'space': (('seed', 'integer', 0, 200_000),)},
            r'a grid of 200,001 combinations; allowed are 100,000',
        ),
        ({'space': (('modle.width', 'choice', (1,)),)}, r"'modle\.width', which is no field"),
        ({'conditions': (('model.width', 'like', 4),)}, r"relation is 'like'"),
    ],
)
def test_bad_input_is_refused_before_any_training(tmp_path, trainer, fields, message):
    config = config_of()
    with config.sweep.unlocked(), config.sweep.ignore_type():
        config.sweep.update(fields)
    with pytest.raises(BadInput, match=message):
        sweep.sweep(config, tmp_path)
    assert not trainer.epochs and not (tmp_path / 'config.json').exists()


def test_too_many_folds_are_those_of_the_sweep(tmp_path, trainer, monkeypatch):
    """Catches advice to set dataset.num_folds, which a sweep sets itself."""
    monkeypatch.undo()
    with pytest.raises(
        BadInput, match=r'sweep\.num_folds is 200, .*set sweep\.num_folds to a number from 2 to 139'
    ):
        sweep.sweep(config_of(num_folds=200), tmp_path)


def test_a_trial_that_needs_too_much_memory_fails_and_counts(tmp_path, trainer, monkeypatch):
    """Catches a sweep that ends there, and that the same command can never go on with."""

    def validate(config, *arguments):
        if config.model.depth > 2:
            raise memory.TooLargeError('the training step needs 99.0 GiB on each device')
        return trainer.validate(config, *arguments)

    monkeypatch.setattr(train, 'validate', validate)
    results = sweep.sweep(config_of(num_trials=6), tmp_path)
    depths = [row['params']['model.depth'] for row in results['trials']]
    states = [row['state'] for row in results['trials']]
    assert [state == 'failed' for state in states] == [depth > 2 for depth in depths]
    assert 0 < states.count('failed') < 6
    assert 'needs 99.0 GiB' in (tmp_path / 'table.md').read_text()


def test_what_does_not_fit_the_data_is_not_tried(tmp_path, trainer):
    """Catches an error in the middle of a sweep, which no command would get over."""
    config = config_of(num_trials=4)
    config.max_skipped_steps = 7  # Of 1,000 images, batches of 128 make 7 steps.
    with pytest.raises(
        BadInput, match='nothing to try: .*max_skipped_steps is 7 and an epoch has 7'
    ):
        sweep.sweep(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_damaged_database_is_named(tmp_path, trainer):
    sweep.sweep(config_of(num_trials=1), tmp_path)
    (tmp_path / 'study.sqlite3').write_bytes(b'no database' * 1000)
    with pytest.raises(
        BadInput, match=r'study\.sqlite3 cannot be used .*: restore it, or'
    ) as error:
        sweep.sweep(config_of(num_trials=2), tmp_path)
    assert '\n' not in str(error.value)


def test_a_password_is_written_nowhere(tmp_path, trainer, monkeypatch):
    """Catches one in config.json, in the name of the directory, and in a message."""
    url = 'nosuch://me:secret@host/studies'
    with monkeypatch.context() as patched:
        patched.setattr(trials, '_open', lambda *_: optuna.create_study(direction='maximize'))
        sweep.sweep(config_of(storage=url, num_trials=1), tmp_path)
    with pytest.raises(BadInput, match=r"sweep\.storage is 'nosuch://me:\*\*\*@host") as error:
        sweep.sweep(config_of(storage=url), tmp_path)
    assert 'secret' not in str(error.value)
    written = [path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()]
    assert sum(b'me:***@host' in text for text in written) >= 2
    assert not any(b'secret' in text for text in written)
    assert workdir.other_data(tmp_path, datasets.fingerprints(data_of(1000, 100))) == []
    assert workdir.other_data(tmp_path, datasets.fingerprints(data_of(1000, 99)))
    assert workdir.run_name('configs/sweeps/vit.py', '', {'sweep.storage': url}) == 'vit'
    with pytest.raises(BadInput, match=r'sweep\.storage is not the URL of a database') as error:
        sweep.sweep(config_of(storage='me:secret@host'), tmp_path / 'new')
    assert 'secret' not in str(error.value) and not (tmp_path / 'new').exists()
    query = 'postgresql://host/db?user=me&password=secret'
    assert trials.without_password(query) == 'postgresql://host/db?password=%2A%2A%2A&user=me'


def test_a_missing_field_and_a_fold_of_its_own(tmp_path, trainer):
    config = config_of()
    del config.sweep['pruner']
    with pytest.raises(BadInput, match=r'lacks pruner; it needs'):
        sweep.sweep(config, tmp_path)
    config = config_of(num_folds=5)
    config.dataset.fold = 2
    with pytest.raises(BadInput, match=r'dataset\.fold is 2, but sweep\.num_folds takes every'):
        sweep.sweep(config, tmp_path)


def test_data_without_a_validation_split(tmp_path, trainer, monkeypatch):
    data = dataclasses.replace(data_of(1000, 0), validation=None)
    monkeypatch.setattr(crossval, 'load_fold', lambda config: data)
    with pytest.raises(BadInput, match=r'no validation split to score trials on: set'):
        sweep.sweep(config_of(), tmp_path)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'sweep.space': (DEPTH,)}, r'sweep\.space: .* there, .* here'),
        ({'sweep.conditions': (('seed', 'at most', 3),)}, r'sweep\.conditions: \[\] there'),
        ({'sweep.sampler': 'random'}, r"sweep\.sampler: 'tpe' there, 'random' here"),
        ({'sweep.pruner': 'median'}, r"sweep\.pruner: 'none' there, 'median' here"),
        ({'sweep.num_folds': 2}, r'sweep\.num_folds: 0 there, 2 here'),
        ({'sweep.storage': 'sqlite:///x'}, r"sweep\.storage: '' there, 'sqlite:///x' here"),
        ({'num_epochs': 9}, r'num_epochs: 4 there, 9 here'),
        ({'dataset.name': 'cifar10'}, r"dataset\.name: 'digits' there, 'cifar10' here"),
    ],
)
def test_the_workdir_of_another_sweep(tmp_path, trainer, change, message):
    sweep.sweep(config_of(num_trials=1), tmp_path)
    config = config_of(num_trials=2)
    config.update_from_flattened_dict(change)
    with pytest.raises(BadInput, match=message):
        sweep.sweep(config, tmp_path)
    assert len(trainer.configs) == 1


def test_the_database_of_another_sweep(tmp_path, trainer):
    """One database holds several sweeps, by workdir; the directory alone may get lost."""
    storage = f'sqlite:///{tmp_path}/shared.sqlite3'
    for name in ('a', 'b'):
        sweep.sweep(config_of(num_trials=1, storage=storage), tmp_path / name)
    assert len(optuna.get_all_study_names(storage)) == 2
    (tmp_path / 'a' / 'config.json').unlink()
    config = config_of(num_trials=2, storage=storage)
    config.num_epochs = 9
    with pytest.raises(BadInput, match=r'searches something else:\n  num_epochs: 4 there, 9 here'):
        sweep.sweep(config, tmp_path / 'a')


@pytest.mark.parametrize('name', ['a b', 'a?b=1', 'a{x}', 'a%20b', 'a#b', 'ä'])
def test_the_database_lies_in_the_workdir(tmp_path, name):
    """Catches a path that is read as a part of a URL, and a database that is made elsewhere."""
    (tmp_path / name).mkdir()
    assert trials.Trials(tmp_path / name, '', 'none', {}).all() == []
    assert [path.name for path in tmp_path.rglob('*.sqlite3')] == ['study.sqlite3']
    assert (tmp_path / name / 'study.sqlite3').exists()
    with pytest.raises(BadInput, match=r'study.sqlite3, whose study.*\n  a: absent there, 1 here'):
        trials.Trials(tmp_path / name, '', 'none', {'a': 1})


def test_how_far_a_sweep_goes_is_no_part_of_its_name():
    """Catches a raised num_trials that begins another sweep in a directory of its own."""
    changes = {'sweep.num_trials': 99, 'sweep.minutes': 5.0, 'num_epochs': 3}
    assert workdir.run_name('configs/sweeps/vit.py', '', changes) == 'vit-num_epochs=3'
    changes = {'compare.seeds': (0, 1), 'compare.baseline': 'relu', 'ablate.seeds': (7,)}
    assert workdir.run_name('configs/comparisons/kernels.py', '', changes) == 'kernels'


def claim(shared):
    """One of at most two trials."""
    searched = space.parse((('x', 'uniform', 0.0, 1.0),), (), {'x': 0.0}, grid=False)
    return shared.claim(
        2,
        proposals.distributions(searched),
        lambda seen: proposals.propose(searched, 'tpe', 0, seen, lambda _: None),
    )


def test_a_trial_that_is_worked_on_is_nobody_elses(tmp_path):
    """Until its lock is let go; then the next worker goes on with it before it begins another."""
    first, second = (trials.Trials(tmp_path, '', 'none', {}) for _ in range(2))
    ours, theirs = claim(first), claim(second)
    assert (ours.number, theirs.number) == (0, 1)
    assert ours.combination != theirs.combination
    assert claim(first) is None and claim(second) is None
    assert first.orphans() == []
    ours.close()
    assert first.orphans() == [0]
    continued = claim(second)
    assert continued.number == 0 and continued.continued and not theirs.continued
    assert continued.combination == ours.combination
    continued.finish(TrialState.COMPLETE, 0.5, epochs=1, seconds=1.0)
    continued.close()
    assert claim(first) is None
    assert [trial.state for trial in first.all()] == [TrialState.COMPLETE, TrialState.RUNNING]


def test_a_trial_that_is_finished_while_another_worker_looks_is_no_orphan(tmp_path, monkeypatch):
    """Catches a worker that goes by a state from before it had the lock."""
    first, second = (trials.Trials(tmp_path, '', 'none', {}) for _ in range(2))
    ours, take = claim(first), locks.take

    def finished_first(path, *, wait):
        if not wait:
            monkeypatch.setattr(locks, 'take', take)
            ours.finish(TrialState.COMPLETE, 0.5, epochs=1, seconds=1.0)
            ours.close()
        return take(path, wait=wait)

    monkeypatch.setattr(locks, 'take', finished_first)
    theirs = claim(second)
    assert theirs.number == 1 and not theirs.continued
    assert [trial.state for trial in first.all()] == [TrialState.COMPLETE, TrialState.RUNNING]


# Epochs that take a moment, with a file for a checkpoint.
WORKER = """
import pathlib, sys, time
from optuna.trial import TrialState
from performer_vit import proposals, space, trials

searched = space.parse((('x', 'uniform', 0.0, 1.0),), (), {'x': 0.0}, grid=False)
shared = trials.Trials(pathlib.Path(sys.argv[1]), '', 'none', {})
print('ready', flush=True)

def propose(before):
    return proposals.propose(searched, 'tpe', 0, before, lambda combination: None)

while trial := shared.claim(12, proposals.distributions(searched), propose):
    log = trial.directory / 'epochs.txt'
    done = len(log.read_text().splitlines()) if log.exists() else 0
    for epoch in range(1, 5):
        # As a run that goes on: it first repeats what it has, which may not have been reported.
        if epoch > done:
            time.sleep(0.05)
            with open(log, 'a') as file:
                file.write(f'{epoch} {trial.combination["x"]!r}\\n')
        trial.is_pruned(epoch, epoch / 10, last=epoch == 4)
    trial.finish(TrialState.COMPLETE, trial.combination['x'], epochs=4, seconds=1.0)
    trial.close()
"""


@pytest.mark.slow
def test_workers_that_are_killed_at_any_moment(tmp_path):
    """Three at a time on one file, killed again and again: 12 trials, each epoch of each once.

    What must hold does not depend on the moments. Catches a trial that is created by halves, that
    two workers take, that nobody takes up again, or that counts twice.
    """
    moments = random.Random(0)

    def start():
        process = subprocess.Popen(
            [sys.executable, '-c', WORKER, str(tmp_path)],
            cwd=ROOT, env=test_run.environment(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return process

    for _ in range(3):
        workers = [start() for _ in range(3)]
        for worker in workers:
            worker.stdout.readline()
            time.sleep(moments.uniform(0.0, 0.3))
            worker.send_signal(signal.SIGKILL)
            worker.wait()
    workers = [start() for _ in range(3)]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    found = trials.Trials(tmp_path, '', 'none', {}).all()
    assert [trial.number for trial in found] == list(range(12))
    assert {trial.state for trial in found} == {TrialState.COMPLETE}
    for trial in found:
        lines = (tmp_path / f'trial_{trial.number:04d}' / 'epochs.txt').read_text().splitlines()
        assert lines == [f'{epoch} {trial.params["x"]!r}' for epoch in range(1, 5)]
        assert trial.value == trial.params['x']
        assert list(trial.intermediate_values) == [1, 2, 3, 4]
    assert len({trial.params['x'] for trial in found}) == 12


CONFIG = """
from ml_collections import ConfigDict

from configs import performer_relu
from configs.sweeps import base


def get_config(arguments: str = '') -> ConfigDict:
    config = performer_relu.get_config('digits')
    config.sweep = base.section()
    config.sweep.space = (
        ('optimizer.learning_rate', 'log_uniform', 1e-3, 3e-2),
        ('model.mlp_dim', 'choice', (16, 32)),
    )
    config.sweep.num_trials = 6
    return config
"""


@pytest.mark.slow
def test_kill_9_and_two_workers_by_the_command_line(tmp_path):
    """Killed in its third trial and continued by two processes at once: six trials, each once.

    Then the best config trains, and TensorBoard can compare the trials.
    """
    path, directory = tmp_path / 'small.py', tmp_path / 'sweep'
    path.write_text(CONFIG)
    flags = [flag for flag in test_run.SMALL[1:] if 'mlp_dim' not in flag]
    # What compiles soon, by a compiler that does not try hard: there are seven trainings.
    flags += ['--config.model.pooling=gap', '--config.optimizer.name=adamw']
    quick = {**test_run.environment(), 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
    run = [sys.executable, 'run.py']
    command = [*run, '--mode=sweep', f'--config={path}', f'--workdir={directory}', *flags]

    def start(*command):
        return subprocess.Popen(
            command, cwd=ROOT, env=quick,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    process = start(*command)
    for line in process.stdout:
        if line.startswith('[digits] trial_0002'):
            break
    third = directory / 'trial_0002'
    deadline = time.monotonic() + 60
    # The first checkpoint that is complete: its epoch need not be trained again.
    while not list((third / 'checkpoints').glob('[0-9]*[0-9]')) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (third / 'results.json').exists()
    before = optuna.load_study(study_name='sweep', storage=f'sqlite:///{directory}/study.sqlite3')
    before = before.trials
    assert [trial.state.name for trial in before] == ['COMPLETE', 'COMPLETE', 'RUNNING']
    finished = {
        file: file.stat().st_mtime_ns
        for number in range(2)
        for file in (directory / f'trial_{number:04d}').rglob('*')
    }

    workers = [start(*command), start(*command)]
    outputs = [worker.communicate(timeout=600) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    text = ''.join(output for output, _ in outputs)
    assert all(line.startswith('[digits]') for line in text.splitlines())
    assert text.count('trial_0002, 3 of 6, continued: ') == 1
    for number in (3, 4, 5):
        assert text.count(f'[digits] trial_{number:04d}, {number + 1} of 6: ') == 1
    assert text.count('Going on after step') == 1
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    results = workdir.read_json(directory / 'results.json')
    rows = by_number(results)
    assert [row['number'] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert rows[2]['params'] == before[2].params
    assert {row['state'] for row in rows} <= {'complete', 'pruned'}
    for row in rows:
        trial = directory / f'trial_{row["number"]:04d}'
        history = workdir.read_history(trial / 'history.csv')
        assert [epoch['epoch'] for epoch in history] == list(range(1, row['epochs'] + 1))
        assert row['value'] == history[-1]['validation_accuracy']
        assert row['epochs'] == 4 or row['state'] == 'pruned'
        config = workdir.flatten(workdir.read_json(trial / 'config.json'))
        assert {field: config[field] for field in row['params']} == row['params']
        if row['state'] == 'complete':
            assert 'test_accuracy' not in workdir.read_json(trial / 'results.json')

    process = start(
        *run, f'--config={directory / "best_config.py"}', f'--workdir={tmp_path / "best"}'
    )
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    best = workdir.read_json(tmp_path / 'best' / 'results.json')
    last = best['history'][-1]['validation_accuracy']
    np.testing.assert_allclose(last, results['best']['value'], atol=0.01)
    names, sessions = hyperparameters(directory)
    assert {'optimizer.learning_rate', 'model.mlp_dim'} <= set(names)
    assert {session['name'] for session in sessions} == {f'trial_{i:04d}' for i in range(6)}
    for session in sessions:
        row = rows[int(session['name'][-4:])]
        np.testing.assert_allclose(session['epoch/validation_accuracy'], row['value'], rtol=1e-6)


def hyperparameters(directory):
    """What TensorBoard's HParams tab shows: the hyperparameters that differ, and the runs."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(directory))
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    asked = context.RequestContext()
    experiment = get_experiment.Handler(
        asked, backend, 'x', api_pb2.GetExperimentRequest(include_metrics=True)
    ).run()
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=100, allowed_statuses=[api_pb2.STATUS_UNKNOWN]
    )
    groups = list_session_groups.Handler(asked, backend, 'x', request).run().session_groups
    sessions = []
    for group in groups:
        (session,) = group.sessions
        values = {value.name.tag: value.value for value in session.metric_values}
        hparams = {
            name: getattr(value, value.WhichOneof('kind')) for name, value in group.hparams.items()
        }
        sessions.append({'name': session.name, **values, **hparams})
    # TensorBoard has them in the order in which the file system lists their directories.
    sessions.sort(key=lambda session: session['name'])
    return [info.name for info in experiment.hparam_infos if info.differs], sessions


def test_tensorboard_compares_runs_by_their_last_numbers(tmp_path):
    """Read by TensorBoard's own backend: what differs, and the last value of each metric."""
    for number, rate in enumerate((1e-3, 1e-2)):
        config = make_tiny_config()
        config.optimizer.learning_rate = rate
        shown = progress.Progress(tmp_path / f'trial_{number}', 'digits', 'tiny', config, 0, 18)
        for epoch in (1, 2):
            shown.epoch_done({
                'dataset': 'digits', 'epoch': epoch, 'step': 9 * epoch, 'train_loss': 1.0,
                'train_accuracy': 0.5, 'validation_loss': 2.0 / epoch + number,
                'validation_accuracy': 0.25 * epoch, 'learning_rate': rate, 'seconds': 1.0,
            })  # fmt: skip
        if number:
            shown.tested(18, 0.75, 0.625, {})
        shown.close()
    names, sessions = hyperparameters(tmp_path)
    assert names == ['optimizer.learning_rate']
    assert [session['name'] for session in sessions] == ['trial_0', 'trial_1']
    for number, session in enumerate(sessions):
        assert session['optimizer.learning_rate'] == (1e-3, 1e-2)[number]
        assert session['model.attention.kernel'] == 'relu'
        assert session['epoch/validation_accuracy'] == 0.5
        assert session['epoch/validation_loss'] == 1.0 + number
        assert session.get('test/accuracy') == (0.625 if number else None)


@pytest.mark.parametrize(
    ('path', 'arguments'),
    [
        *itertools.product(
            ['vit', 'performer_relu', 'recipe', 'grid'], ['', 'cifar100', 'cifar10,study']
        ),
        *(('study', model) for model in ('', 'vit', 'gelu', 'exp', 'elu', 'ftheta,cifar100')),
    ],
)
def test_the_shipped_sweeps_begin(tmp_path, monkeypatch, path, arguments):
    """Their spaces are checked for real and have a first trial, which is not trained here."""
    config = load_config(f'sweeps/{path}', arguments)
    assert (
        f'--mode=sweep --config=configs/sweeps/{path}.py'
        in (ROOT / 'configs' / 'sweeps' / f'{path}.py').read_text()
    )
    assert config.num_epochs == (31 if 'study' in (path, *arguments.split(',')) else 6)
    data = dataclasses.replace(data_of(45_000, 5_000), name='cifar10')
    monkeypatch.setattr(crossval, 'load_fold', lambda config: data)
    begun = []

    def validate(config, dataset, directory, on_epoch):
        begun.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, 'validate', validate)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(config, tmp_path)
    train.check_scored(begun[0])
    assert begun[0].dataset.fallback == 'none'


@pytest.mark.parametrize(
    ('model', 'winner'),
    [
        ('vit', (256, 8, 8, 'adam', 5e-4, 128)),
        ('relu', (960, 4, 16, 'sgd', 1.7e-2, 128)),
        ('gelu', (768, 1, 16, 'adam', 5e-4, 128, 128)),
        ('elu', (768, 1, 16, 'adam', 5e-4, 128, 128)),
        ('exp', (768, 3, 16, 'adam', 1e-3, 64, 512)),
        ('ftheta', (768, 5, 16, 'sgd', 3e-3, 512, 512, 128)),
    ],
)
def test_the_studys_sweep_has_its_winners(model, winner):
    """Catches a space that leaves out what the study found best, or a model that refuses it."""
    fields = ('model.width', 'model.depth', 'model.num_heads', 'optimizer.name',
              'optimizer.learning_rate', 'batch_size', 'model.attention.num_features',
              'model.attention.hidden')  # fmt: skip
    config = load_config('sweeps/study', model)
    rows = {field: (kind, *given) for field, kind, *given in config.sweep.space}
    values = dict(zip(fields, winner, strict=False))
    for field, value in values.items():
        kind, *given = rows[field]
        assert value in given[0] if kind == 'choice' else given[0] <= value <= given[1]
    config = sweep.base_config(config)
    config.update_from_flattened_dict(values)
    train.check_scored(config)


def test_a_word_that_the_studys_sweep_does_not_know():
    """Catches a message that leaves out the models."""
    for arguments in ('cifar10,softmax', 'gelu,elu'):
        with pytest.raises(ValueError, match=f"'{arguments}'; .*'vit', 'relu', .*'cifar10'"):
            load_config('sweeps/study', arguments)


@pytest.mark.parametrize(
    'flags, message',
    [
        (
            ('--mode=sweep', '--config=configs/vit.py:digits'),
            'needs a config with a section `sweep`, such as those of configs/sweeps/',
        ),
        (
            ('--mode=train', '--config=configs/sweeps/vit.py:digits'),
            'has a section `sweep` and is for --mode=sweep alone',
        ),
        (
            ('--mode=sweep', '--config=configs/sweeps/vit.py:digits', '--config.sweep.sampler=x'),
            "sweep.sampler is 'x'; allowed are",
        ),
    ],
)
def test_mistakes_on_the_command_line(flags, message):
    done = test_run.run(*flags)
    assert done.returncode == 2 and message in done.stderr
    assert 'Traceback' not in done.stderr


def test_a_trial_pruned_while_it_goes_on_closes_its_checkpoints(tmp_path, tiny_config, monkeypatch):
    """`train.validate` tells of the epochs that a run has; ending it there must leave nothing open.

    Catches threads of Orbax that outlive their trial.
    """
    data = crossval.load_fold(tiny_config)

    def stop(row):
        if row['epoch'] == 1:
            raise optuna.TrialPruned

    opened = []
    real = train.Checkpoints

    def manager(*arguments, **more):
        made = real(*arguments, **more)
        close = made.close
        opened.append(made)
        monkeypatch.setattr(made, 'close', lambda: (close(), opened.remove(made)))
        return made

    monkeypatch.setattr(train, 'Checkpoints', manager)
    for _ in range(2):
        with pytest.raises(optuna.TrialPruned):
            train.validate(tiny_config, data, tmp_path, stop)
        assert not opened
