"""The train state, and its life on disk by Orbax."""

import collections
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct

from performer_vit import cluster, files
from performer_vit.errors import BadInput, one_line


@struct.dataclass
class TrainState:
    """All that a step reads and writes; what is not here is a function of (seed, step).

    Attributes:
      step: () int32, steps done.
      params: the trained weights, float32.
      projections: FAVOR+'s random matrices (`favor.FavorAttention`), {} where there are none.
      batch_stats: BatchNorm's statistics for evaluation, {} where there are none.
      opt_state: of the Optax chain.
      ema: moving averages of `params` and `batch_stats`, under these names, or None.
      epoch_sums: of the epoch in progress: `loss` and `accuracy`, () float32 sums over those of its
        `steps` that were not skipped.
      bad_step: () int32, the step at which the state stopped, see `train_step`; −1: none.
      skipped_steps: () int32, steps that were passed over because they were not finite.
    """

    step: jax.Array
    params: Any
    projections: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: dict[str, Any] | None
    epoch_sums: dict[str, jax.Array]
    bad_step: jax.Array
    skipped_steps: jax.Array

    @property
    def evaluated(self) -> dict[str, Any]:
        """The variables that evaluation uses: moving averages where they are kept."""
        last = {'params': self.params, 'batch_stats': self.batch_stats}
        return {'projections': self.projections, **(last if self.ema is None else self.ema)}


def create_state(
    model, tx: optax.GradientTransformation, image_shape: tuple[int, ...], seed: int, ema: bool
) -> TrainState:
    """A fresh state, a pure function of the seed; images have the shape (h, w, c)."""
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(seed), images)
    params, batch_stats = variables['params'], variables.get('batch_stats', {})
    averaged = {'params': params, 'batch_stats': batch_stats}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        projections=variables.get('projections', {}),
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        # A copy: the step donates its buffers, and one buffer cannot be given away twice.
        ema=jax.tree.map(jnp.copy, averaged) if ema else None,
        epoch_sums={name: jnp.zeros(()) for name in ('loss', 'accuracy', 'steps')},
        bad_step=jnp.full((), -1, jnp.int32),
        skipped_steps=jnp.zeros((), jnp.int32),
    )


_NEVER = 10**9  # Seconds; `None` would be Orbax's own limit.

Saved = collections.namedtuple('Saved', 'state history scalars seconds')
Saved.__doc__ = """What a checkpoint holds.

One replica of the train state; the rows of the epochs that were finished; TensorBoard's scalars up
to its step, [step, {tag: value}] each; and the seconds that the steps of the epoch in progress
took, 0.0 between epochs.
"""


class _Unusable(BadInput):
    """A checkpoint is damaged, or holds another structure: an earlier one may be better."""


class Checkpoints:
    """The checkpoints of a run: the latest, and the best on validation; written in the background.

    Of several processes, process 0 alone reads and writes, and the others need not see its
    directory; but all call each method, and get the same.

    The best is that with the highest validation accuracy of those that are saved after every
    `every_epochs`-th epoch and after the last; of equals, the latest. The history decides this, so
    that no file beside a checkpoint's own needs to be whole.

    Args:
      directory: where they are, or will be.
      keep: how many of the latest to keep; for each of them also the best as of then.
      every_epochs: after how many epochs there is one.
    """

    def __init__(self, directory: str | os.PathLike, keep: int, every_epochs: int):
        if keep < 1:
            raise BadInput(f'checkpoint.keep is {keep}; set it to 1 or more.')
        self.directory = pathlib.Path(directory).absolute()
        self._every_epochs = every_epochs
        self._preserved = _Preserved(keep)
        self._manager = None
        cluster.from_main(self._open)

    def _open(self) -> None:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._preserved,
            create=False,  # Which would have to be asked of all processes.
            # With a single one Orbax has no barriers, at which the others would wait for ever where
            # this one fails.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes={0}
            ),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            # Orbax measures by the wall clock, which jumps when a laptop wakes up, say.
            async_options=ocp.AsyncOptions(
                timeout_secs=_NEVER, create_directories_asynchronously=False
            ),
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_names=('state', 'history')
            )
        except OSError as error:
            reason = files.no_access(error)
            if reason is None:
                raise
            raise _unreadable(f'the checkpoints in {self.directory}', reason) from error

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, in their order."""
        return cluster.from_main(self._steps)

    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Until all is written."""
        cluster.from_main(lambda: self._manager.wait_until_finished())

    def close(self) -> None:
        """Waits, and ends the threads that write; of no other process."""
        if self._manager:
            self._manager.close()

    def save(
        self,
        state: TrainState,
        history: list[dict],
        scalars: list,
        seconds: float | None = None,
    ) -> None:
        """Saves one replica of the state and what there is beside it, in the background.

        Args:
          state, history, scalars: see `Saved`.
          seconds: spent on the steps of an epoch in progress; None after an epoch's end, where the
            state is that of the history's last row.
        """
        cluster.from_main(lambda: self._save(state, history, scalars, seconds))

    def _save(self, state, history, scalars, seconds) -> None:
        # A host copy of its own: the step that follows donates the device's buffers.
        state = jax.tree.map(np.array, state)
        # Copies of the lists as well: they grow while Orbax writes them.
        progress = {'rows': list(history), 'scalars': list(scalars), 'seconds': seconds or 0.0}
        rows = self._saved_rows(history, ends_run=seconds is None)
        # Also the best as of the checkpoints before, down to the oldest that is kept: where the
        # newest one turns out to be damaged, the run goes on from there, and may end otherwise.
        self._preserved.best = {
            _best_row(rows[:count])['step']
            for count in range(max(1, len(rows) - self._preserved.keep + 1), len(rows) + 1)
        }
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                history=ocp.args.JsonSave({**progress, 'digest': _digest(state, progress)}),
            ),
        )

    def restore(self, template: TrainState, step: int) -> Saved:
        """What was saved after a step.

        Args:
          template: a state of the same structure, shapes and dtypes.
          step: one that was saved.

        Raises:
          BadInput: the checkpoint is damaged, holds another structure, or cannot be read.
        """
        return _shared(template, lambda: self._restore(template, step))

    def _restore(self, template: TrainState, step: int) -> Saved:
        template = jax.tree.map(np.asarray, template)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), history=ocp.args.JsonRestore()
                ),
            )
            progress = restored.history
            digest = progress.pop('digest', None)
            if digest is None:
                raise ValueError('it has no fingerprint; earlier versions wrote none')
            state = jax.tree.map(np.asarray, restored.state)
            if digest != _digest(state, progress):
                raise ValueError('its content is not what was written')
            # Orbax fits arrays of other shapes into the template without a word.
            for leaf, wanted in zip(*map(jax.tree.leaves, (state, template)), strict=True):
                if (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
                    raise _other_state(step, self.directory)
            # Earlier versions kept no scalars.
            scalars = progress.get('scalars', [])
            return Saved(restored.state, progress['rows'], scalars, progress['seconds'])
        except (MemoryError, _Unusable):
            raise
        except Exception as error:  # Of any kind: anything may come of a damaged file.
            directory = self.directory / f'{step}'
            reason = files.no_access(error) or files.kept_from_reading(directory)
            if reason:
                what = f'the checkpoint of step {step} in {self.directory}'
                raise _unreadable(what, reason) from error
            if 'tree structures do not match' in str(error):
                raise _other_state(step, self.directory) from error
            raise _Unusable(
                f'the checkpoint of step {step} in {self.directory} is damaged '
                f'({one_line(error)}): restore it from a copy, or train again in another '
                f'--workdir, or in this one, from the start, once {self.directory} is moved away.'
            ) from error

    def restore_latest(self, template: TrainState, warn: Callable[[str], None]) -> Saved | None:
        """The latest that is whole, or None where there is no checkpoint at all.

        Those after it are damaged. They are moved to `damaged_checkpoints` beside the directory,
        since the run will come to their steps again; nothing is deleted.

        Args:
          template: a state of the same structure, shapes and dtypes.
          warn: gets a line about each that is moved, in process 0.

        Raises:
          BadInput: all are damaged, or hold another structure; or one cannot be read. None is
            moved.
        """
        return _shared(template, lambda: self._restore_latest(template, warn))

    def _restore_latest(self, template, warn) -> Saved | None:
        damaged = {}
        for step in reversed(self._steps()):
            try:
                saved = self._restore(template, step)
            except _Unusable as error:
                damaged[step] = error
                continue
            for bad, error in damaged.items():
                target = _move_away(self.directory, bad)
                warn(
                    f'the checkpoint of step {bad} in {self.directory} cannot be used '
                    f'({one_line(error.__cause__)}). It is in {target} now, and the one of step '
                    f'{step} is used.'
                )
            if damaged:
                self._manager.reload()
            return saved
        if damaged:
            raise damaged[max(damaged)]
        return None

    def best(self, history: list[dict]) -> dict:
        """The row of the best checkpoint of a run that has ended.

        Raises:
          BadInput: its checkpoint is gone.
        """
        row = _best_row(self._saved_rows(history, ends_run=True))
        if row['step'] not in self.steps():
            raise BadInput(
                f'the checkpoint of step {row["step"]}, the best on validation, is not in '
                f'{self.directory}: restore it, or train again in another --workdir.'
            )
        return row

    def _saved_rows(self, history: list[dict], ends_run: bool) -> list[dict]:
        """The validated rows that have a checkpoint; the last has one if the run ends there."""
        return [
            row
            for row in history
            if row['validation_accuracy'] is not None
            and (row['epoch'] % self._every_epochs == 0 or (ends_run and row is history[-1]))
        ]


def _shared(template: TrainState, read: Callable[[], Saved | None]) -> Saved | None:
    """What process 0 reads, in every process."""
    saved = None

    def beside_the_state() -> dict | None:
        nonlocal saved
        saved = read()
        return saved and saved._replace(state=None)._asdict()

    rest = cluster.from_main(beside_the_state)
    if rest is None:
        return None
    state = saved.state if cluster.is_main() else template
    state = cluster.arrays_from_main(jax.tree.map(np.asarray, state))
    return Saved(**rest)._replace(state=state)


def _best_row(rows: list[dict]) -> dict:
    """That with the highest validation accuracy; of equals, the latest."""
    return max(rows, key=lambda row: (row['validation_accuracy'], row['step']))


class _Preserved:
    """What Orbax asks about which checkpoints to keep: the latest ones and the best of each."""

    def __init__(self, keep: int):
        self.keep = keep
        self.best = set()  # Steps.

    def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
        del context
        latest = sorted(checkpoint.step for checkpoint in checkpoints)[-self.keep :]
        return [checkpoint.step in {*latest, *self.best} for checkpoint in checkpoints]


def _digest(state: TrainState, progress: Mapping) -> str:
    """A fingerprint of all that a checkpoint holds: Orbax would not notice a flipped bit."""
    digest = hashlib.blake2b(json.dumps(progress, sort_keys=True).encode(), digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f'{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}'.encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _unreadable(what: str, reason: str) -> BadInput:
    """The error for what the operating system does not let be read, for a reason of its own."""
    return BadInput(
        f'{what} cannot be read ({reason}), but may well be whole: mend that (rights, open files, '
        'memory, the file server), and give the same command again.'
    )


def _other_state(step: int, directory: pathlib.Path) -> _Unusable:
    return _Unusable(
        f'the checkpoint of step {step} in {directory} holds another state than the model has '
        'here: it is of another version of the code, with which to go on, or of data with other '
        'classes, which are to be restored; or train again in another --workdir.'
    )


def _move_away(directory: pathlib.Path, step: int) -> pathlib.Path:
    directory = directory.resolve()  # A link may lead to another disk, to which nothing is moved.
    target = directory.with_name('damaged_checkpoints')
    target.mkdir(exist_ok=True)
    taken = {path.name for path in target.iterdir()}
    names = itertools.chain([f'{step}'], (f'{step}-{number}' for number in itertools.count(2)))
    return (directory / f'{step}').rename(
        target / next(name for name in names if name not in taken)
    )
