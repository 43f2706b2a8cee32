"""The trials of a sweep: a database that any number of workers share, and who works on which trial.

A trial is written with its combination in one transaction, and while a process works on it, the
process holds the lock of the trial's directory. A trial that runs and whose lock can be taken is an
orphan: its process has died, and whoever comes next goes on with it.
"""

import copy
import functools
import os
import pathlib
import secrets
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
# Of a trial: how many processes have begun to work on it since it last came further and have not
# let go of it in good order. Where they all died, the trial may be what kills them.
_BEGUN = 'begun'
_MOST_DEATHS = 5
_FURTHEST = 'furthest'  # Of a trial: the fold and epoch of it that was the last to be new.
_PRUNED_AT = 'pruned_at'  # Of a trial: the step after which it ends.
# In a workdir, and of the study: the same word where the study began in this very directory.
_MARK = '.sweep'
# In the query of a URL, a part of the names of what is a password, or has one in it, to a driver.
_PASSWORDS = ('pass', 'pwd', 'odbc_connect')
_SECONDS = 60  # That a worker waits for another one's transaction in a file.
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
    the same step, once five trials are complete; of running means, the last counts alone.
    'successive_halving' lets at steps 1, 4, 16, … the best quarter pass (Li et al. 2020, "A system
    for massively parallel hyperparameter tuning").
    """
    return {
        'none': optuna.pruners.NopPruner,
        'median': optuna.pruners.MedianPruner,
        # Not Optuna's automatic first step, which an interrupted sweep might find another one for.
        'successive_halving': lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1),
    }[pruner]()


def _url(storage: str) -> URL | None:
    """The URL of a database; None of what is no URL."""
    try:
        return make_url(storage) if storage else None
    except (ArgumentError, ValueError):
        return None


def without_password(storage: str) -> str:
    """The URL of a database as files and messages may have it."""
    url = _url(storage)
    if url is None:
        return storage
    hidden = {name: '***' for name in url.query if any(part in name.lower() for part in _PASSWORDS)}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def check_storage(storage: str) -> None:
    """Raises `BadInput` for what is no URL, or a database that would end with this process."""
    url = _url(storage)
    if storage and url is None:
        raise BadInput(  # It may have a password in it, though nobody knows where.
            'sweep.storage is not the URL of a database: give one, such as sqlite:////DIR/FILE or '
            "postgresql://USER:PASSWORD@HOST/DATABASE, or '' for a file in the workdir."
        )
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
        self._furthest = frozen.user_attrs.get(_FURTHEST, [])
        self._pruned_at = frozen.user_attrs.get(_PRUNED_AT)
        self._study = study
        self._trial = optuna.Trial(study, frozen._trial_id)
        self._trial.set_user_attr(_BEGUN, frozen.user_attrs.get(_BEGUN, 0) + 1)
        self._lock = lock

    def came(self, *place: int) -> None:
        """Notes that the work came to a place, such as (fold, epoch), if none came that far."""
        if list(place) > self._furthest:
            self._furthest = list(place)
            self._trial.set_user_attr(_FURTHEST, self._furthest)
            self._trial.set_user_attr(_BEGUN, 1)

    def is_pruned(self, step: int, value: float, *, last: bool, of_all: bool = False) -> bool:
        """Reports the value of a step, each step once, and tells whether to end the trial there.

        Args:
          step: from 1.
          value: of the step.
          last: whether it is the last step, after which there is nothing to save.
          of_all: whether the value is that of all steps so far, as a running mean is. A better one
            of fewer steps then says nothing for the trial.
        """
        if step not in self._reported:
            self._trial.report(value, step)
            self._reported.add(step)
            self._trial.set_user_attr(_BEGUN, 1)
        # Where a trial goes on, its earlier steps were judged, by what was known then.
        if last or step != max(self._reported):
            return False
        # Successive halving marks what it has judged as passed, before it judges: its verdict must
        # not get lost with the process.
        if self._pruned_at != step and self._judged(of_all):
            self._pruned_at = step
            self._trial.set_user_attr(_PRUNED_AT, step)
        return self._pruned_at == step

    def _judged(self, of_all: bool) -> bool:
        """Whether the pruner would end the trial after its last step."""
        if not of_all:
            return self._trial.should_prune()
        frozen = copy.copy(self._study.get_trials(deepcopy=False)[self.number])
        step = frozen.last_step
        frozen.intermediate_values = {step: frozen.intermediate_values[step]}
        return self._study.pruner.prune(self._study, frozen)

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
      BadInput: the database cannot be used, or its study has another definition or began in another
        directory.
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
                SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, ValueError,
                RuntimeError,  # Of a database that another version of Optuna made.
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
                if storage:
                    mark = secrets.token_hex(8)
                    run_directory.write_text(workdir / _MARK, mark)
                    self._study.set_user_attr(_MARK, mark)
                self._study.set_user_attr('definition', definition)
            elif lines := run_directory.differences(theirs, definition):
                raise BadInput(
                    f'sweep.storage is {told}, whose study {self._study.study_name} searches '
                    'something else:\n' + '\n'.join(lines) + '\nGive this sweep another --workdir='
                    'DIR or another sweep.storage, or repeat the config of that one to continue it.'
                )
            if storage:
                self._check_mark(told)

    def _check_mark(self, told: str) -> None:
        """Raises `BadInput` where the study began in another directory of the same path."""
        path = self.workdir / _MARK
        mark = path.read_text(encoding='utf-8') if path.exists() else None
        if mark != self._study.user_attrs.get(_MARK):
            raise BadInput(
                f'sweep.storage is {told}, whose study {self._study.study_name} began in another '
                f'directory of that path, as {path} says or lacks: one that is lost, or another '
                "machine's. The workers of a sweep keep apart by locks in its directory: give all "
                'of them a --workdir=DIR on one file system, or this one another --workdir=DIR for '
                'a sweep of its own; or restore the directory with that file.'
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

    def orphans(self) -> list[int]:
        """Numbers of the trials that were begun and not finished, and that nobody works on."""
        numbers = []
        for trial in self.all():
            if trial.state == TrialState.RUNNING:
                lock = self._take(trial.number, wait=False)
                if lock is not None:
                    lock.close()
                    numbers.append(trial.number)
        return numbers

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
                        'and no later one came an epoch further than the first: it may need more '
                        'memory than there is, or somebody ended them',
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
        is_file = make_url(storage).get_backend_name() == 'sqlite'
        waits = {'connect_args': {'timeout': _SECONDS}} if is_file else None
        database = optuna.storages.RDBStorage(storage, waits)
    else:
        # Opened here, since a path has characters that mean something else in a URL.
        connect = functools.partial(
            sqlite3.connect, workdir / _DATABASE, timeout=_SECONDS, check_same_thread=False
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
