"""Schedules and optimisers against their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from performer_vit import muon, optimizers
from performer_vit.errors import BadInput
from tests.conftest import load_config


def section(**fields) -> ConfigDict:
    optimizer = load_config('vit').optimizer
    optimizer.update(fields)
    return optimizer


def test_cosine_closed_form():
    """Linear from 0 to the peak at the end of the warm-up, then half a cosine to exactly 0."""
    schedule = optimizers.learning_rate(
        section(schedule='cosine', learning_rate=0.2, warmup_epochs=1.5), 10, 6
    )
    steps = np.arange(61)
    progress = np.clip((steps - 15) / 45, 0, 1)
    expected = np.where(steps < 15, 0.2 * steps / 15, 0.1 * (1 + np.cos(np.pi * progress)))
    np.testing.assert_allclose([schedule(step) for step in steps], expected, atol=1e-7)


def test_cosine_without_warmup_starts_at_the_peak():
    schedule = optimizers.learning_rate(
        section(schedule='cosine', learning_rate=0.2, warmup_epochs=0.0), 10, 6
    )
    np.testing.assert_allclose(schedule(0), 0.2, rtol=1e-6)
    np.testing.assert_allclose(schedule(30), 0.1, rtol=1e-6)


@pytest.mark.parametrize('warmup', [0.0, 1.5, 6.0])
def test_linear_closed_form(warmup):
    """Catches a decay that does not end at 0, or that begins before the warm-up is over."""
    fields = section(schedule='linear', learning_rate=0.2, warmup_epochs=warmup)
    schedule = optimizers.learning_rate(fields, 10, 6)
    steps, first = np.arange(60), 10 * warmup
    rising = steps / max(first, 1)
    expected = 0.2 * np.where(steps < first, rising, (60 - steps) / max(60 - first, 1))
    np.testing.assert_allclose([schedule(step) for step in steps], expected, atol=1e-7)


@pytest.mark.parametrize('warmup', [0.0, 1.0, 3.0])
def test_step_decay_counts_from_the_start(warmup):
    """Catches a decay whose steps are shifted by the warm-up. StepLR(2 epochs, 0.5)."""
    fields = section(
        schedule='step', learning_rate=0.2, warmup_epochs=warmup, decay_epochs=2, decay_factor=0.5
    )
    schedule = optimizers.learning_rate(fields, 10, 6)
    steps = np.arange(60)
    expected = 0.2 * 0.5 ** (steps // 20)
    if warmup:
        expected = expected * np.minimum(steps / (warmup * 10), 1)
    np.testing.assert_allclose([schedule(step) for step in steps], expected, rtol=1e-5)


PARAMS = {
    'dense': {'kernel': jnp.array([[1.0, -2.0], [0.5, 3.0]]), 'bias': jnp.array([0.3, -0.1])},
    'norm': {'scale': jnp.array([1.0, 2.0])},
    'position_embedding': jnp.array([[0.2, 0.4]]),
}
GRADIENT = jax.tree.map(lambda x: 0.1 * x**2 - 0.3, PARAMS)


def run(tx, steps: int = 3):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADIENT, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def adam_reference(value, gradient, *, rate, decoupled=0.0, penalty=0.0, steps=3):
    """Kingma & Ba's Adam with bias correction, and AdamW's or the L2 form of weight decay."""
    value, gradient = np.asarray(value, np.float64), np.asarray(gradient, np.float64)
    mean, square = 0.0, 0.0
    for t in range(1, steps + 1):
        g = gradient + penalty * value
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        step = (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        value = value - rate * (step + decoupled * value)
    return value


@pytest.mark.parametrize('name', ['adamw', 'adam'])
def test_adam_against_numpy(name):
    """Catches decay on biases, norms or embeddings, and AdamW's decay where Adam's was asked."""
    tx = optimizers.create(section(name=name, weight_decay=0.4, clip_norm=0.0), lambda _: 0.01)
    got = run(tx)
    decay = {'adamw': 'decoupled', 'adam': 'penalty'}[name]
    for path, value in jax.tree_util.tree_leaves_with_path(PARAMS):
        gradient = 0.1 * value**2 - 0.3
        strength = 0.4 if path[-1].key == 'kernel' else 0.0
        expected = adam_reference(value, gradient, rate=0.01, **{decay: strength})
        result = got
        for key in path:
            result = result[key.key]
        np.testing.assert_allclose(result, expected, rtol=1e-5, err_msg=str(path))


def test_sgd_with_momentum_against_numpy():
    fields = section(name='sgd', weight_decay=0.4, clip_norm=0.0, momentum=0.8)
    got = run(optimizers.create(fields, lambda _: 0.01))['dense']
    for name, strength in (('kernel', 0.4), ('bias', 0.0)):
        value, velocity = np.asarray(PARAMS['dense'][name], np.float64), 0.0
        gradient = np.asarray(GRADIENT['dense'][name])
        for _ in range(3):
            velocity = 0.8 * velocity + gradient + strength * value
            value = value - 0.01 * velocity
        np.testing.assert_allclose(got[name], value, rtol=1e-5)


def test_clipping_is_by_the_global_norm():
    """Catches clipping leaf by leaf: the direction over all leaves must not change."""
    fields = section(name='sgd', weight_decay=0.0, momentum=0.0, clip_norm=0.5)
    got = run(optimizers.create(fields, lambda _: 1.0), steps=1)
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(GRADIENT)]
    norm = np.linalg.norm(np.concatenate(leaves))
    assert norm > 0.5
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - g * 0.5 / norm, rtol=1e-5),
        got, PARAMS, GRADIENT,
    )  # fmt: skip


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_muon_is_its_direction_and_weight_decay(momentum):
    """−rate · (direction + decay · value) of kernels, by `scale_by_muon` with its own tests.

    Catches a momentum that is not handed on, a wrong sign, and decay of other parameters.
    """
    tx = muon.scale_by_muon(momentum, None)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        direction, state = tx.update(GRADIENT, state)
        direction['dense']['kernel'] += 0.4 * params['dense']['kernel']
        params = jax.tree.map(lambda value, d: value - 0.01 * d, params, direction)
    fields = section(name='muon', momentum=momentum, weight_decay=0.4, clip_norm=0.0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        run(optimizers.create(fields, lambda _: 0.01)), params,
    )  # fmt: skip


def test_muon_decays_kernels_alone_and_apart_from_the_gradient():
    fields = section(name='muon', weight_decay=0.4, clip_norm=0.0)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = optimizers.create(fields, lambda _: 0.01)
    updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
    kernel = updates['dense'].pop('kernel')
    np.testing.assert_allclose(kernel, -0.01 * 0.4 * PARAMS['dense']['kernel'], rtol=1e-6)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'name': 'lion'}, r"optimizer.name is 'lion'; allowed are 'adamw', 'adam', 'sgd', 'muon'"),
        (
            {'schedule': 'flat'},
            r"optimizer.schedule is 'flat'; allowed are 'cosine', 'linear', 'step'",
        ),
        ({'learning_rate': 0.0}, r'optimizer.learning_rate is 0.0'),
        ({'warmup_epochs': 7.0}, r'optimizer.warmup_epochs is 7.0; .* num_epochs, which is 6'),
        ({'schedule': 'step', 'decay_factor': 0.0}, r'optimizer.decay_factor is 0.0'),
        ({'clip_norm': -1.0}, r'optimizer.clip_norm is -1.0'),
        ({'name': 'sgd', 'momentum': 1.0}, r'optimizer.momentum is 1.0'),
    ],
)
def test_bad_input(fields, message):
    optimizer = section(**fields)
    with pytest.raises(BadInput, match=message):
        optimizers.create(optimizer, optimizers.learning_rate(optimizer, 10, 6))
