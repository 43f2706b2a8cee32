"""The learning-rate schedule and the Optax chain that a config's `optimizer` section describes."""

import jax
import optax

from performer_vit.errors import BadInput, choose
from performer_vit.muon import scale_by_muon

OPTIMIZERS = ('adamw', 'adam', 'sgd', 'muon')
SCHEDULES = ('cosine', 'linear', 'step')


def learning_rate(optimizer, steps_per_epoch: int, num_epochs: int) -> optax.Schedule:
    """Learning rate as a function of the step: a linear warm-up, then a decay.

    Warm-up takes `warmup_epochs` from 0 to `learning_rate`. 'cosine' then falls to what would
    be 0 one step after the last, t = T: rate · (1 + cos(π t / T)) / 2 (Loshchilov & Hutter 2017);
    'linear' as rate · (1 − t / T).
    'step' multiplies the rate by `decay_factor` every `decay_epochs`, counted from the start of
    training.

    Args:
      optimizer: the `optimizer` section of a config.
      steps_per_epoch: optimiser steps in an epoch.
      num_epochs: epochs of the whole training.

    Returns:
      A function of an int32 step, traced or not, to a float32.
    """
    choose('optimizer.schedule', optimizer.schedule, SCHEDULES)
    if optimizer.learning_rate <= 0:
        raise BadInput(
            f'optimizer.learning_rate is {optimizer.learning_rate}; set it to a number above 0.'
        )
    if not 0 <= optimizer.warmup_epochs <= num_epochs:
        raise BadInput(
            f'optimizer.warmup_epochs is {optimizer.warmup_epochs}; set it to a number from 0 to '
            f'num_epochs, which is {num_epochs}.'
        )
    warmup_steps = round(optimizer.warmup_epochs * steps_per_epoch)
    # Optax wants a step of decay, also where the warm-up takes the whole training.
    decay_steps = max(num_epochs * steps_per_epoch - warmup_steps, 1)
    if optimizer.schedule == 'cosine':
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0 if warmup_steps else optimizer.learning_rate,
            peak_value=optimizer.learning_rate,
            warmup_steps=warmup_steps,
            decay_steps=warmup_steps + decay_steps,
        )
    if optimizer.schedule == 'linear':
        warmup = optax.linear_schedule(0.0, optimizer.learning_rate, warmup_steps)
        decay = optax.linear_schedule(optimizer.learning_rate, 0.0, decay_steps)
        return optax.join_schedules([warmup, decay], [warmup_steps])
    if optimizer.decay_epochs <= 0 or not 0 < optimizer.decay_factor <= 1:
        raise BadInput(
            f'optimizer.decay_epochs is {optimizer.decay_epochs} and optimizer.decay_factor is '
            f'{optimizer.decay_factor}; set the first above 0, the second above 0 and at most 1.'
        )
    decay = optax.exponential_decay(
        optimizer.learning_rate,
        transition_steps=max(round(optimizer.decay_epochs * steps_per_epoch), 1),
        decay_rate=optimizer.decay_factor,
        staircase=True,
    )
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, 1.0, warmup_steps)
    return lambda step: warmup(step) * decay(step)


def is_decayed(params) -> object:
    """A tree of booleans: True for the kernels of dense and convolutional layers, fθ's too.

    Biases, norms, embeddings and fθ's scalars are left out of weight decay: they have few values,
    and pulling them to zero changes the function, not its smoothness.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key.endswith('kernel'), params)


def create(
    optimizer, schedule: optax.Schedule, axis_name: str | None = None
) -> optax.GradientTransformation:
    """The Optax chain: clipping by global norm, then AdamW, Adam, SGD with momentum, or Muon.

    AdamW and Muon decouple weight decay from the gradient (Loshchilov & Hutter 2019); Adam and SGD
    add it to the gradient, as the L2 penalty of PyTorch's optimisers of these names. Muon
    (`scale_by_muon`) updates what is not a matrix by Adam in Nesterov's form (Dozat 2016).

    Args:
      optimizer: the `optimizer` section of a config.
      schedule: learning rate by the step.
      axis_name: the axis that the update is mapped over, if any; 'muon' then shares its work out.
    """
    choose('optimizer.name', optimizer.name, OPTIMIZERS)
    if optimizer.clip_norm < 0 or optimizer.weight_decay < 0 or not 0 <= optimizer.momentum < 1:
        raise BadInput(
            f'optimizer.clip_norm is {optimizer.clip_norm}, optimizer.weight_decay is '
            f'{optimizer.weight_decay}, optimizer.momentum is {optimizer.momentum}; the first two '
            'must be 0 or more, the last from 0 to below 1.'
        )
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else None
    penalty = optax.add_decayed_weights(optimizer.weight_decay, mask=is_decayed)
    chains = {
        'adamw': (clip, optax.scale_by_adam(), penalty),
        'adam': (clip, penalty, optax.scale_by_adam()),
        'sgd': (clip, penalty, optax.trace(optimizer.momentum)),
        'muon': (clip, scale_by_muon(optimizer.momentum, axis_name), penalty),
    }
    chain = [transform for transform in chains[optimizer.name] if transform is not None]
    return optax.chain(*chain, optax.scale_by_learning_rate(schedule))
