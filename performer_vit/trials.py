"""The trials of a sweep: a database that any number of workers share, and who works on which trial.

A trial is written with its combination in one transaction, and while a process works on it, the
process holds the lock of the trial's directory. A trial that runs and whose lock can be taken is an
orphan: its process has died, and whoever comes next goes on with it.
"""

import functools
import os
import pathlib
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import IO

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from performer_vit import environment, locks
from performer_vit import workdir as run_directory
from performer_vit.errors import BadInput, one_line

_DATABASE = 'study.sqlite3'
# Of a trial: how many processes have begun to work on it since its last step that was reported and
# have not let go of it in good order. Where they all died, the trial may be what kills them.
_BEGUN = 'begun'
_MOST_DEATHS = 5
PRUNERS = ('none', 'median', 'successive_halving')
STATES = {
    TrialState.COMPLETE: 'complete',
    TrialState.PRUNED: 'pruned',
    TrialState.FAIL: 'failed',
    TrialState.RUNNING: 'running',
}


def make_pruner(pruner: str) -> optuna.pruners.BasePruner:
    """Optuna's pruner of that name.

    'median' ends a trial whose best value so far is below the median of the completed trials' at
    the same step, once five trials are complete. 'successive_halving' lets at steps 1, 4, 16, … the
    best quarter pass (Li et al. 2020, "A system for massively parallel hyperparameter tuning").
    """
    return {
        'none': optuna.pruners.NopPruner,
        'median': optuna.pruners.MedianPruner,
        # Not Optuna's automatic first step, which an interrupted sweep might find another one for.
        'successive_halving': lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1),
    }[pruner]()


def _url(storage: str) -> URL | None:
    """The URL of a database; None where there is none, as the database will say."""
    try:
        return make_url(storage) if storage else None
    except (ArgumentError, ValueError):
        return None


def without_password(storage: str) -> str:
    """The URL of a database as files and messages may have it."""
    url = _url(storage)
    return storage if url is None else url.render_as_string(hide_password=True)


def check_storage(storage: str) -> None:
    """Raises `BadInput` for a database in memory, which would end with this process."""
    url = _url(storage)
    if url and url.get_backend_name() == 'sqlite' and url.database in (None, '', ':memory:'):
        raise BadInput(
            f'sweep.storage is {storage!r}, a database in memory, which would be lost with this '
            "process: give one in a file, such as sqlite:////DIR/FILE, or '' for a file in the "
            'workdir.'
        )


class Trial:
    """A trial that this process works on, until `close`.

    Attributes:
      number: from 0.
      combination: its labels by field, see `space.Space`.
      directory: of its run.
      continued: whether another process began it.
    """

    def __init__(
        self,
        study: optuna.Study,
        frozen: FrozenTrial,
        directory: pathlib.Path,
        lock: IO,
        continued: bool,
    ):
        self.number = frozen.number
        self.combination = dict(frozen.params)
        self.directory = directory
        self.continued = continued
        self._finished = False
        self._reported = set(frozen.intermediate_values)
        self._study = study
        self._trial = optuna.Trial(study, frozen._trial_id)
        self._trial.set_user_attr(_BEGUN, frozen.user_attrs.get(_BEGUN, 0) + 1)
        self._lock = lock

    def is_pruned(self, step: int, value: float, *, last: bool) -> bool:
        """Reports the value of a step, each step once, and tells whether to end the trial there."""
        if step not in self._reported:
            self._trial.report(value, step)
            self._reported.add(step)
            self._trial.set_user_attr(_BEGUN, 1)
        # After the last step there is nothing to save; and where a trial goes on, its earlier steps
        # were judged, by what was known then.
        return not last and step == max(self._reported) and self._trial.should_prune()

    def finish(
        self,
        state: TrialState,
        value: float | None = None,
        *,
        epochs: int | None,
        seconds: float | None,
        message: str | None = None,
    ) -> None:
        """Writes how and where the trial ended; a pruned one keeps its last reported value."""
        notes = {
            'epochs': epochs,
            'seconds': seconds,
            'message': message,
            'device': environment.device(),
            'versions': environment.versions(),
        }
        for name, note in notes.items():
            self._trial.set_user_attr(name, note)
        self._study.tell(self.number, value, state)
        self._finished = True

    def close(self) -> None:
        """Lets go of the trial: if it is not finished, another process may go on with it."""
        try:
            if not self._finished:
                self._trial.set_user_attr(_BEGUN, 0)
        finally:
            self._lock.close()


class Trials:
    """The trials of the sweep in a workdir.

    Args:
      workdir: the directory of the sweep, which exists.
      storage: URL of a database; '' for a SQLite file in the workdir. There the trials are a study
        of Optuna's, whose name is the workdir's, so that several sweeps may share a database.
      pruner: one of `PRUNERS`.
      definition: of the sweep, as JSON has it: what must be the same when it goes on.

    Raises:
      BadInput: the database cannot be used, or its study has another definition.
    """

    def __init__(self, workdir: pathlib.Path, storage: str, pruner: str, definition: Mapping):
        self.workdir = workdir
        told = repr(without_password(storage))
        if not storage:
            told += f', so {workdir / _DATABASE}'
        with self.alone():
            try:
                self._study = _open(workdir, storage, pruner)
            except (
                SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, ValueError
            ) as error:  # fmt: skip
                reason = one_line(error).rstrip('.')
                if not storage:
                    raise BadInput(
                        f'{workdir / _DATABASE} cannot be used ({reason}): restore it, or give '
                        'the sweep another --workdir=DIR.'
                    ) from error
                raise BadInput(
                    f'sweep.storage is {told}, a database that cannot be used: {reason}. Give '
                    "the URL of one that can, such as sqlite:////DIR/FILE, or '' for a file in the "
                    'workdir.'
                ) from error
            theirs = self._study.user_attrs.get('definition')
            if theirs is None:
                self._check_new(told)
                self._study.set_user_attr('definition', definition)
            elif lines := run_directory.differences(theirs, definition):
                raise BadInput(
                    f'sweep.storage is {told}, whose study {self._study.study_name} searches '
                    'something else:\n' + '\n'.join(lines) + '\nGive this sweep another --workdir='
                    'DIR or another sweep.storage, or repeat the config of that one to continue it.'
                )

    def _check_new(self, told: str) -> None:
        """Raises `BadInput` where a study without a definition is not that of a new sweep."""
        if any(self.workdir.glob('trial_[0-9]*')):
            raise BadInput(
                f'sweep.storage is {told}, which has no trials of this sweep, though some are in '
                f'{self.workdir}: give the database that has them, and the --workdir by the path '
                'that the sweep began with; or give it another --workdir=DIR.'
            )
        if self.all():
            raise BadInput(
                f'sweep.storage is {told}, whose study {self._study.study_name} has trials that '
                'another program made: give the sweep another --workdir=DIR or sweep.storage.'
            )

    def alone(self) -> IO:
        """The lock of the whole sweep, for what one worker does at a time; a context manager."""
        return locks.take(self.workdir / '.lock', wait=True)

    def all(self) -> list[FrozenTrial]:
        """All trials, in their order."""
        return self._study.get_trials(deepcopy=False)

    def directory(self, number: int) -> pathlib.Path:
        """Where the run of a trial is."""
        return self.workdir / f'trial_{number:04d}'

    def claim(
        self,
        num_trials: int,
        distributions: Mapping[str, BaseDistribution],
        propose: Callable[[Sequence[FrozenTrial]], dict],
    ) -> Trial | None:
        """A trial for this process: an orphan before all, else a new one.

        Args:
          num_trials: no trial is added to so many, of all workers and however they ended.
          distributions: of the parameters, by field.
          propose: gets all trials and returns the combination of a new one; what it raises is
            raised.

        Returns:
          The trial, or None where there are enough trials and each one is finished or somebody's.
        """
        with self.alone():
            trials = self.all()
            for trial in trials:
                if trial.state == TrialState.RUNNING:
                    lock = self._take(trial.number, wait=False)
                    if lock is None:
                        continue
                    # Its worker may have finished it and let go of it since it was read.
                    trial = self.all()[trial.number]
                    if trial.state != TrialState.RUNNING:
                        lock.close()
                        continue
                    orphan = self._trial(trial, lock, continued=True)
                    if trial.user_attrs.get(_BEGUN, 0) < _MOST_DEATHS:
                        return orphan
                    orphan.finish(
                        TrialState.FAIL, epochs=None, seconds=None,
                        message=f'{_MOST_DEATHS} processes in a row died while they worked on it, '
                        'and no later one came an epoch (in a cross-validation: a fold) further '
                        'than the first: it may need more memory than there is, or somebody ended '
                        'them',
                    )  # fmt: skip
                    orphan.close()
            if len(trials) >= num_trials:
                return None
            new = optuna.trial.create_trial(
                state=TrialState.RUNNING, params=propose(trials), distributions=dict(distributions)
            )
            # Nobody else can see it before the lock of the sweep is let go.
            self._study.add_trial(new)
            lock = self._take(len(trials), wait=True)
            return self._trial(self.all()[len(trials)], lock, continued=False)

    def _take(self, number: int, *, wait: bool) -> IO | None:
        directory = self.directory(number)
        directory.mkdir(exist_ok=True)
        return locks.take(directory / '.lock', wait=wait)

    def _trial(self, frozen: FrozenTrial, lock: IO, continued: bool) -> Trial:
        return Trial(self._study, frozen, self.directory(frozen.number), lock, continued)


def _open(workdir: pathlib.Path, storage: str, pruner: str) -> optuna.Study:
    """The study in the database; both are made where they are missing."""
    if storage:
        database = optuna.storages.RDBStorage(storage)
    else:
        # Opened here, since a path has characters that mean something else in a URL; it waits
        # seconds for another worker's transaction.
        connect = functools.partial(
            sqlite3.connect, workdir / _DATABASE, timeout=60, check_same_thread=False
        )
        database = optuna.storages.RDBStorage(f'sqlite:///{_DATABASE}', {'creator': connect})
    return optuna.create_study(
        storage=database,
        study_name=os.fspath(workdir) if storage else 'sweep',
        direction='maximize',
        load_if_exists=True,
        # Combinations come from `proposals`; this sampler is never asked for one.
        sampler=optuna.samplers.RandomSampler(),
        pruner=make_pruner(pruner),
    )
