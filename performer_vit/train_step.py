"""One step of training, and where its numbers first went wrong in one that had to be dropped."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from performer_vit import augment, cluster, datasets, vit
from performer_vit.checkpoints import TrainState
from performer_vit.favor import redraw_projections


def make_train_step(
    model: vit.VisionTransformer,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    config,
    dataset: datasets.Dataset,
    steps_per_epoch: int,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """One optimiser step as a function for `jax.pmap(…, axis_name='batch')`.

    The step takes a `TrainState` and a device's share of a batch of
    `input_pipeline.train_batches`, and returns the new state and the step's metrics: `loss`
    (nats), `accuracy` (0 to 1), `grad_norm` (before clipping), `learning_rate`, `bad_step`,
    `skipped_steps`, each a scalar that all devices share. Where images are mixed, accuracy counts
    those whose likeliest class is that of the larger target (of equal ones, the first). Nothing in
    the step depends on how the batch is spread over devices, except for dropout, whose masks are
    drawn on each device.

    A step whose loss, gradient or update is not finite changes no weight, no average and no
    statistic; random projections that it draws anew are kept, since the next draw may be far. The
    first `config.max_skipped_steps` of such steps are counted and passed over. The next is the
    `bad_step`: from it on the state stands still, and is the one that the bad step began with.
    """
    draw = functools.partial(_inputs, config, dataset, steps_per_epoch)
    loss_of = functools.partial(_loss, model.clone(axis_name='batch'))

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        images, targets, projections, key = draw(state, batch)
        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (accuracy, batch_stats)), gradient = value_and_grad(
            state.params, projections, state.batch_stats, images, targets, key
        )
        loss, accuracy, gradient = jax.lax.pmean((loss, accuracy, gradient), 'batch')
        grad_norm = optax.global_norm(gradient)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        finite = jnp.isfinite(loss + grad_norm + optax.global_norm(updates))
        stopped = (state.bad_step >= 0) | (
            ~finite & (state.skipped_steps >= config.max_skipped_steps)
        )
        averaged = {'params': params, 'batch_stats': batch_stats}
        new = {
            **averaged,
            'opt_state': opt_state,
            'ema': _moving_average(state, averaged, config.ema_decay),
        }
        # Selected where each is computed anyway, so that this costs no pass over the weights.
        new = jax.tree.map(
            functools.partial(jnp.where, finite & ~stopped),
            new,
            {name: getattr(state, name) for name in new},
        )
        new['projections'] = jax.tree.map(
            functools.partial(jnp.where, ~stopped), projections, state.projections
        )
        starts_epoch = state.step % steps_per_epoch == 0
        sums = {'loss': loss, 'accuracy': accuracy, 'steps': 1.0}
        bad_step = jnp.where((state.bad_step < 0) & stopped, state.step, state.bad_step)
        skipped_steps = state.skipped_steps + (~finite & ~stopped)
        metrics = {
            'loss': loss,
            'accuracy': accuracy,
            'grad_norm': grad_norm,
            # The optimiser counts the steps that it made.
            'learning_rate': jnp.asarray(schedule(state.step - state.skipped_steps), jnp.float32),
            'bad_step': bad_step,
            'skipped_steps': skipped_steps,
        }
        state = TrainState(
            **new,
            step=state.step + ~stopped,
            epoch_sums={
                name: jnp.where(starts_epoch, 0.0, state.epoch_sums[name])
                + jnp.where(finite, value, 0.0)
                for name, value in sums.items()
            },
            bad_step=bad_step,
            skipped_steps=skipped_steps,
        )
        return state, metrics

    return train_step


def _inputs(
    config, dataset: datasets.Dataset, steps_per_epoch: int, state: TrainState, batch: dict
):
    """What a step's loss is of: images, targets, random projections and dropout's key."""
    attention = config.model.attention
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    augment_key, dropout_key = jax.random.split(key)
    dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index('batch'))
    targets = optax.smooth_labels(
        jax.nn.one_hot(batch['label'], dataset.num_classes), config.label_smoothing
    )
    images, targets = augment.augment(
        config.augment,
        batch,
        targets,
        seed=config.seed,
        step_key=augment_key,
        epoch=state.step // steps_per_epoch,
        mirror=dataset.flip,
        mean=dataset.mean,
        std=dataset.std,
    )
    projections = state.projections
    if projections and attention.redraw_every:
        projections = jax.lax.cond(
            state.step % attention.redraw_every == 0,
            lambda: redraw_projections(
                state.projections,
                seed=config.seed,
                draw_number=state.step // attention.redraw_every,
                projection=attention.projection,
                row_norms=attention.row_norms,
            ),
            lambda: state.projections,
        )
    return images, targets, projections, dropout_key


def _loss(model: vit.VisionTransformer, params, projections, batch_stats, images, targets, key):
    """Mean cross-entropy in nats; with it the accuracy and the statistics of BatchNorm."""
    logits, updated = model.apply(
        {'params': params, 'projections': projections, 'batch_stats': batch_stats},
        images,
        train=True,
        rngs={'dropout': key},
        mutable=['batch_stats'],
    )
    loss = optax.softmax_cross_entropy(logits, targets).mean()
    accuracy = (logits.argmax(-1) == targets.argmax(-1)).mean()
    return loss, (accuracy, updated.get('batch_stats', {}))


def _moving_average(state: TrainState, new: dict, decay: float) -> dict | None:
    """m ← d·m + (1 − d)·new, with d = min(decay, (1 + t)/(10 + t)) so that early weights fade.

    Without the second term the random initial weights would stay in the average of a short run.
    BatchNorm's statistics are averaged as the weights are that they belong to.
    """
    if state.ema is None:
        return None
    step = state.step.astype(jnp.float32)
    rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return optax.incremental_update(new, state.ema, rate)


def make_diagnosis(
    model: vit.VisionTransformer,
    tx: optax.GradientTransformation,
    config,
    dataset: datasets.Dataset,
    steps_per_epoch: int,
) -> Callable[[TrainState, dict], str]:
    """Where the numbers of a step first are not finite.

    The returned function takes the replicated state that the step began with and the step's batch,
    as `pmap` does, does the step again while it looks at everything on the way, and says in words
    what the first thing is that is not finite on some device: in the order of the computation, a
    weight, the images, the output of a layer, the loss, the gradient of a weight, the norm of them
    all, the update of a weight, the norm of them all.
    """
    draw = functools.partial(_inputs, config, dataset, steps_per_epoch)
    loss_of = functools.partial(_loss, model.clone(axis_name='batch'))
    names = {}

    def look(state: TrainState, batch: dict) -> dict[str, jax.Array]:
        images, targets, projections, key = draw(state, batch)
        layers = []

        def with_layers(params):
            finite = []

            def record(call, args, kwargs, context):
                out = call(*args, **kwargs)
                finite.append(_is_finite(out))
                layers.append('/'.join(context.module.path) or 'the whole model')
                return out

            layers.clear()
            with nn.intercept_methods(record):
                loss, _ = loss_of(params, projections, state.batch_stats, images, targets, key)
            return loss, finite

        (loss, finite), gradient = jax.value_and_grad(with_layers, has_aux=True)(state.params)
        gradient = jax.lax.pmean(gradient, 'batch')
        updates, _ = tx.update(gradient, state.opt_state, state.params)
        # Backwards: what came last has its gradient first.
        place = {name: number for number, name in enumerate(layers)}
        gradients = sorted(
            _named(gradient), key=lambda pair: -place.get(pair[0].rpartition('/')[0], -1)
        )
        seen = [
            *((f'the weight {name}', leaf) for name, leaf in _named(state.params)),
            *((f'the projection {name}', leaf) for name, leaf in _named(projections)),
            *((f'the statistic {name}', leaf) for name, leaf in _named(state.batch_stats)),
            ('the images, as augmented', images),
            *((f'the output of {name}', flag) for name, flag in zip(layers, finite, strict=True)),
            ('the loss', loss),
            *((f'the gradient of {name}', leaf) for name, leaf in gradients),
            # Squares overflow from 2e19 on, where the gradients themselves do not.
            ('the norm of the gradient, whose parts are finite', optax.global_norm(gradient)),
            *((f'the update of {name}', leaf) for name, leaf in _named(updates)),
            ('the norm of the update, whose parts are finite', optax.global_norm(updates)),
        ]
        names['seen'] = [name for name, _ in seen]
        flags = jnp.stack([_is_finite(value) for _, value in seen])
        return jax.lax.pmin(flags.astype(jnp.int32), 'batch')

    def diagnose(state: TrainState, batch: dict) -> str:
        mapped = jax.pmap(look, axis_name='batch', devices=cluster.devices())
        flags = cluster.first_replica(mapped(state, batch))
        for name, flag in zip(names['seen'], flags, strict=True):
            if not flag:
                return f'first in {name}'
        return 'but were when the step was done again'

    return diagnose


def _is_finite(tree) -> jax.Array:
    """Whether all floating-point numbers of a tree are finite; a flag of its own is one already."""
    flags = []
    for leaf in jax.tree.leaves(tree):
        if leaf.dtype == bool:
            flags.append(leaf)
        elif jnp.issubdtype(leaf.dtype, jnp.floating):
            flags.append(jnp.isfinite(leaf).all())
    return jnp.stack(flags).all() if flags else jnp.array(True)


def _named(tree) -> list[tuple[str, jax.Array]]:
    """Leaves with names such as encoder_0/mlp/hidden/kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [('/'.join(str(key.key) for key in path), leaf) for path, leaf in leaves]
