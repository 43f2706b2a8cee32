"""Thousands of configs with wrong types and extreme values: each trains, or one error names why."""

import collections
import functools
import random
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from performer_vit import (
    augment,
    cluster,
    datasets,
    feature_maps,
    fields,
    input_pipeline,
    optimizers,
    projections,
    train,
    vit,
)
from performer_vit import workdir as run_directory
from performer_vit.errors import BadInput
from tests.conftest import make_tiny_config

CASES = 4000
TRACED = 40  # Of those that are accepted, so many are traced, which takes half a second each…
TRAINED = 16  # …and so many do a step, which takes several.

WRONG = [
    None, True, False, '', 'x', 'NaN', '1', '\0', '💥' * 5000, b'relu', (), (1,), [[]], {},
    object(), 1 + 2j, np.float64(0.5), np.int64(3), np.zeros(3), float('nan'), float('inf'),
    -float('inf'), print,
]  # fmt: skip
INTEGERS = [
    -(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 64, 100, 101, 1438, 65536,
    65537, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 10**30, 10**400, 10**5000,
]  # fmt: skip
NUMBERS = [
    -1e300, -1.0, -1e-9, -0.0, 0.0, 5e-324, 1e-300, 1e-45, 1e-40, 1e-9, 1e-6, 0.1, 0.5, 1.0,
    0.99999999, 0.999999999999, 1.0000001, 2.0, 10.0, 10.1, 1e6, 1e7, 1e30, 1e38, 3.5e38, 1e300,
]  # fmt: skip
NAMES = {
    'augment.flip': augment.FLIPS,
    'model.stem': vit.STEMS,
    'model.position': vit.POSITIONS,
    'model.pooling': vit.POOLINGS,
    'model.conv_norm': vit.CONV_NORMS,
    'model.dtype': vit.DTYPES,
    'model.attention.kernel': (*vit.KERNELS, *vit.NO_ATTENTION),
    'model.attention.projection': projections.PROJECTIONS,
    'model.attention.row_norms': projections.ROW_NORMS,
    'model.attention.theta_init': feature_maps.THETA_INITS,
    'model.attention.theta_sharing': ('all', 'sides', 'heads', 'none'),
    'optimizer.name': optimizers.OPTIMIZERS,
    'optimizer.schedule': optimizers.SCHEDULES,
    'test_state': train.TEST_STATES,
}
TEXTS = sorted({name for names in NAMES.values() for name in names} | {'/nowhere', 'RELU', ' relu'})
GRIDS = [
    ((8,),), ((4, 8), (8,)), [[4, 8], [8]], ((),), (8,), ((0,),), ((-1,),), ((2**40,),), ((8.0,),),
    ((True,),), (('8',),), ((8,),) * 5, ((8,),) * 101, ((8,) * 101,), ((8,), 8), 'conv', (((8,),),),
]  # fmt: skip
# The digits are the data of all cases: what is not there is another error, tested elsewhere.
DATA = ('dataset.name', 'dataset.fallback', 'dataset.data_dir')


def flat(config) -> dict:
    return run_directory.flatten(config.to_dict())


def changed(changes: dict) -> ConfigDict:
    """A config made anew: one that is changed would refuse other types by itself."""
    values = make_tiny_config().to_dict()
    for field, value in changes.items():
        *sections, last = field.split('.')
        functools.reduce(dict.__getitem__, sections, values)[last] = value
    return ConfigDict(values)


def draw(random_: random.Random, base: dict) -> dict:
    """One to three fields, each with a value of its own kind, or of the others."""
    changes = {}
    for field in random_.sample(sorted(set(base) - set(DATA)), random_.choice((1, 1, 2, 3))):
        default = base[field]
        kinds = [WRONG, INTEGERS, NUMBERS, TEXTS, GRIDS]
        own = {bool: WRONG, int: INTEGERS, float: NUMBERS, str: TEXTS, tuple: GRIDS}[type(default)]
        own = random_.choice((own, NAMES.get(field, own)))
        changes[field] = random_.choice(own if random_.random() < 0.7 else random_.choice(kinds))
    return changes


def names_a_field(message: str, changes: dict, base: dict) -> bool:
    """Whether a field that is changed is in the message, and no more than one screen of text."""
    short = {field.split('.')[-1] for field in changes}
    return len(message) < 1200 and any(re.search(rf'\b{name}\b', message) for name in short)


@functools.cache
def digits() -> datasets.Dataset:
    return datasets.load(**make_tiny_config().dataset)


def prepared(config) -> tuple[train.Training, datasets.Dataset]:
    """All that `train.train` does before it makes the workdir, without reading data anew."""
    train.check(config)
    plain = make_tiny_config().dataset.to_dict()
    theirs = config.dataset.to_dict()
    dataset = digits() if theirs == plain else datasets.load(**theirs)
    if config.flip_averaging:
        raise BadInput('flip_averaging, of the digits')
    return train.prepare(config, dataset), dataset


def batch_of(config, dataset: datasets.Dataset) -> dict:
    return next(
        input_pipeline.train_batches(
            dataset.train,
            seed=config.seed, batch_size=config.batch_size, first_step=0, num_steps=1,
        )
    )  # fmt: skip


def trace(config) -> None:
    training, dataset = prepared(config)
    state, batch = cluster.replicate(training.state), batch_of(config, dataset)
    jax.eval_shape(jax.pmap(training.step_fn, axis_name='batch'), state, batch)


def train_a_step(config) -> None:
    training, dataset = prepared(config)
    state, batch = cluster.replicate(training.state), batch_of(config, dataset)
    state, metrics = train.compile_step(training, state, batch)(state, batch)
    assert np.isfinite(train.scalar(metrics['loss']))
    assert train.scalar(state.bad_step) == -1 and train.scalar(state.step) == 1


@functools.cache
def drawn() -> tuple[dict, list[dict]]:
    """The base config's fields, and all cases: the same in every process, by one seed."""
    base, random_ = flat(make_tiny_config()), random.Random(0)
    return base, [draw(random_, base) for _ in range(CASES)]


def told(changes: dict, error: Exception) -> str | None:
    """What is wrong with the error that a case got, or None."""
    if not isinstance(error, BadInput):
        return f'{sorted(changes)} got {type(error).__name__}: {error}'
    if not names_a_field(str(error), changes, drawn()[0]):
        return f'{sorted(changes)} got a message that names none of them: {error}'
    return None


@pytest.mark.slow
def test_what_is_refused_is_refused_by_name():
    """Catches tracebacks from JAX, Optax, NumPy or Python, and messages about something else."""
    accepted, refused, wrong = [], [], []
    for changes in drawn()[1]:
        try:
            train.check(changed(changes))
        except Exception as error:
            refused.append(changes)
            wrong.append(told(changes, error))
        else:
            accepted.append(changes)
            if len(accepted) % 50 == 0:
                jax.clear_caches()  # JAX keeps what it traced: gigabytes, of so many models.
    wrong = [text for text in wrong if text]
    assert not wrong, f'{len(wrong)} of {len(refused)}:\n' + '\n'.join(wrong[:20])
    # Both outcomes are common, and each field had both: else the test would say little.
    assert len(refused) > CASES / 3 and len(accepted) > CASES / 10
    fields_of = [{f for c in cases for f in c} for cases in (accepted, refused)]
    assert fields_of[0] == fields_of[1] == set(fields.FIELDS) - set(DATA)


@pytest.mark.slow
@pytest.mark.parametrize('act, count', [(trace, TRACED), (train_a_step, TRAINED)])
def test_what_is_accepted_trains(act, count):
    """Or is refused by name, once the data are known. Catches overflows, hangs, and lost memory."""
    wrong, results = [], collections.Counter()
    for changes in random.Random(1).sample(drawn()[1], CASES):
        try:
            train.check(changed(changes))
        except BadInput:
            continue
        try:
            act(changed(changes))
        except Exception as error:
            results['refused'] += 1
            wrong.append(told(changes, error))
        else:
            results['trained'] += 1
        if sum(results.values()) == count:
            break
        if sum(results.values()) % 10 == 9:
            jax.clear_caches()
    wrong = [text for text in wrong if text]
    assert not wrong, f'{len(wrong)} of {count}:\n' + '\n'.join(wrong[:20])
    assert results['trained'] > count / 2, results
