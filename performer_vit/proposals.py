"""Which combination of a search space comes next: a function of a seed and of the trials so far."""

import random
from collections.abc import Callable, Sequence

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from performer_vit.errors import BadInput
from performer_vit.space import Space

SAMPLERS = ('grid', 'random', 'tpe')

# How often a sampler is asked for a combination that may be tried.
ATTEMPTS = 1000
# The largest grid that is gone through.
MOST_COMBINATIONS = 100_000


class NothingLeftError(Exception):
    """There is no further combination to try, or next to none."""


def check(space: Space, sampler: str) -> None:
    """Raises `BadInput` for a grid that nobody could go through."""
    if sampler == 'grid' and space.size > MOST_COMBINATIONS:
        raise BadInput(
            f'sweep.space is a grid of {space.size:,} combinations; allowed are '
            f"{MOST_COMBINATIONS:,}: give fewer values, or set sweep.sampler to 'random' or 'tpe'."
        )


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The parameters as Optuna's distributions, by field."""
    made = {}
    for parameter in space.parameters:
        if parameter.distribution == 'choice':
            made[parameter.field] = CategoricalDistribution(parameter.labels)
        elif parameter.distribution == 'integer':
            made[parameter.field] = IntDistribution(parameter.low, parameter.high)
        else:
            log = parameter.distribution == 'log_uniform'
            made[parameter.field] = FloatDistribution(parameter.low, parameter.high, log=log)
    return made


def propose(
    space: Space,
    sampler: str,
    seed: int,
    trials: Sequence[FrozenTrial],
    refusal: Callable[[dict], str | None],
) -> dict:
    """The combination of the next trial, one that no trial had.

    A training repeats itself to the last digit, so a second trial of one combination would tell
    nothing. 'grid' goes through all combinations in an order drawn by the seed. 'random' draws.
    'tpe' draws as well until ten trials have a value, and then where good trials are denser than
    others (Bergstra et al. 2011, "Algorithms for hyper-parameter optimization"); it keeps away from
    trials that run or failed and, for this proposal, from what was refused. Each proposal has a
    generator of its own, seeded by `seed` and the number of trials.

    Args:
      space: what is searched.
      sampler: one of `SAMPLERS`.
      seed: of the sampler.
      trials: all trials so far, in their order.
      refusal: why a combination cannot be trained; None where it can.

    Returns:
      The combination: labels by field.

    Raises:
      NothingLeftError: no combination is left, or none was found in `ATTEMPTS` draws.
    """
    taken = [trial.params for trial in trials]
    refused = None
    if sampler != 'grid':
        ask = _sampler(space, sampler, seed, trials)
        for _ in range(ATTEMPTS):
            combination = ask()
            if combination not in taken:
                refused = refusal(combination)
                if refused is None:
                    return combination
        if space.size is None or space.size > MOST_COMBINATIONS:
            raise NothingLeftError(
                f'of {ATTEMPTS:,} combinations drawn from sweep.space, none was new and can be '
                f'trained{_because(refused)}'
            )
    # What is left of a grid, or of a space with so few combinations that draws find no new one.
    order = list(range(space.size))
    random.Random(seed).shuffle(order)
    for number in order:
        combination = space.combination(number)
        if combination not in taken:
            refused = refusal(combination)
            if refused is None:
                return combination
    raise NothingLeftError(
        f'none of the {space.size:,} combinations of sweep.space is left that can be trained'
        f'{_because(refused)}'
    )


def _because(refused: str | None) -> str:
    return '' if refused is None else f'; one was refused because {refused}'


def _sampler(
    space: Space, sampler: str, seed: int, trials: Sequence[FrozenTrial]
) -> Callable[[], dict]:
    """A function that draws a combination at each call."""
    seed = int(np.random.SeedSequence((seed, len(trials))).generate_state(1)[0])
    made = {
        'random': lambda: optuna.samplers.RandomSampler(seed=seed),
        # The liar takes what runs for bad: so the draws of several workers keep apart.
        'tpe': lambda: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
    }[sampler]()
    # A copy in memory, so that nothing of a proposal that is refused, or of a process that dies
    # while it makes one, gets into the database. What is asked for and never told stays running.
    study = optuna.create_study(direction='maximize', sampler=made)
    for trial in trials:
        study.add_trial(_running(trial) if trial.state == TrialState.FAIL else trial)
    fixed = distributions(space)
    return lambda: study.ask(fixed).params


def _running(trial: FrozenTrial) -> FrozenTrial:
    return optuna.trial.create_trial(
        state=TrialState.RUNNING, params=trial.params, distributions=trial.distributions
    )
