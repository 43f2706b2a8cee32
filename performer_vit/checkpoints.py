"""The train state, and its life on disk by Orbax."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct

from performer_vit.errors import BadInput

_policies = ocp.checkpoint_managers


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
      epoch_sums: of the epoch in progress: `loss` and `accuracy`, () float32 sums over its steps.
      first_bad_step: () int32, the first step whose loss or gradient was not finite; −1: none.
    """

    step: jax.Array
    params: Any
    projections: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: dict[str, Any] | None
    epoch_sums: dict[str, jax.Array]
    first_bad_step: jax.Array

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
        epoch_sums={'loss': jnp.zeros(()), 'accuracy': jnp.zeros(())},
        first_bad_step=jnp.full((), -1, jnp.int32),
    )


def _validation_accuracy(metrics: dict) -> float:
    return metrics['validation_accuracy']


def manager(directory: str | os.PathLike, keep: int, has_validation: bool) -> ocp.CheckpointManager:
    """Asynchronous checkpoints in `directory`: the last `keep`, and the best on validation."""
    if keep < 1:
        raise BadInput(f'checkpoint.keep is {keep}; set it to 1 or more.')
    policy = _policies.AnyPreservationPolicy([
        _policies.LatestN(keep),
        _policies.BestN(
            get_metric_fn=_validation_accuracy, n=1, keep_checkpoints_without_metrics=False
        ),
    ])  # fmt: skip
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        # The policy decides what is kept; without best_fn Orbax would forget the metrics of earlier
        # checkpoints when the process ends, and with them which one was the best.
        best_fn=_validation_accuracy if has_validation else None,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager(
        pathlib.Path(directory).absolute(), options=options, item_names=('state', 'history')
    )


def save(checkpoints: ocp.CheckpointManager, state: TrainState, history: list[dict]) -> None:
    """Saves one replica of the state and the history so far, in the background."""
    # A host copy of its own: the step that follows donates the device's buffers.
    state = jax.tree.map(np.array, state)
    accuracy = history[-1]['validation_accuracy']
    checkpoints.save(
        int(state.step),
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), history=ocp.args.JsonSave({'rows': history})
        ),
        metrics=None if accuracy is None else {'validation_accuracy': accuracy},
    )


def restore(
    checkpoints: ocp.CheckpointManager, template: TrainState, step: int | None = None
) -> tuple[TrainState, list[dict]] | None:
    """State and history of a step (default: the latest), or None where there is no checkpoint.

    Args:
      checkpoints: from `manager`.
      template: a state of the same structure, shapes and dtypes.
      step: a step that was saved.

    Raises:
      BadInput: the checkpoint holds another structure.
    """
    step = checkpoints.latest_step() if step is None else step
    if step is None:
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, jax.tree.map(np.asarray, template))
    try:
        restored = checkpoints.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), history=ocp.args.JsonRestore()
            ),
        )
    except ValueError as error:
        if 'tree structures do not match' not in str(error):
            raise
        raise BadInput(
            f'the checkpoint of step {step} in {checkpoints.directory} holds another state than '
            'this version of the code has: go on with the version that wrote it, or train again '
            'in another --workdir.'
        ) from error
    return restored.state, restored.history['rows']


def best(checkpoints: ocp.CheckpointManager, history: list[dict], every_epochs: int) -> dict:
    """The row of the saved epoch with the highest validation accuracy; of equals, the latest.

    Saved is every `every_epochs`-th epoch, and the last. Orbax keeps the best by the same rule.

    Raises:
      BadInput: its checkpoint is gone.
    """
    rows = [row for row in history if row['epoch'] % every_epochs == 0 or row is history[-1]]
    row = max(rows, key=lambda row: (row['validation_accuracy'], row['step']))
    if row['step'] not in checkpoints.all_steps():
        raise BadInput(
            f'the checkpoint of step {row["step"]}, the best on validation, is not in '
            f'{checkpoints.directory}: restore it, or train again in another --workdir.'
        )
    return row
