"""The training step and the loop, on a small model and the digits."""

import dataclasses
import errno
import functools
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from flax import jax_utils
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from performer_vit import (
    checkpoints,
    crossval,
    datasets,
    evaluate,
    files,
    input_pipeline,
    interruption,
    muon,
    optimizers,
    train,
    vit,
    workdir,
)
from performer_vit.errors import BadInput
from performer_vit.favor import redraw_projections
from tests.conftest import load_config, make_tiny_config
from tests.test_augment import EVERYTHING

CONFIGS = (
    'vit', 'performer_relu', 'performer_exp', 'performer_gelu', 'performer_elu',
    'performer_ftheta',
)  # fmt: skip


@functools.cache
def digits() -> datasets.Dataset:
    return datasets.load('digits')


def train_for(config, dataset, num_steps: int, num_devices: int = 1):
    """The states before and after each step (one replica), and each step's metrics."""
    training = train.prepare(config, dataset)
    devices = jax.devices()[:num_devices]
    step = jax.pmap(training.step_fn, axis_name='batch', devices=devices)
    state = jax_utils.replicate(training.state, devices, axis_name='batch')
    batches = input_pipeline.train_batches(
        dataset.train, seed=config.seed, batch_size=config.batch_size, first_step=0,
        num_steps=num_steps, devices=devices,
    )  # fmt: skip
    states, metrics = [state], []
    for batch in batches:
        state, values = step(state, batch)
        states.append(state)
        metrics.append({name: train.scalar(value) for name, value in values.items()})
    return [jax.tree.map(lambda x: np.asarray(x)[0], state) for state in states], metrics


def first_images(dataset: datasets.Dataset, count: int) -> datasets.Dataset:
    part = datasets.Split(dataset.train.images[:count], dataset.train.labels[:count])
    return dataclasses.replace(dataset, train=part)


@pytest.mark.parametrize('stem', vit.STEMS)
def test_overfits_32_images(tiny_config, stem):
    """The whole path from pixels to the update can learn: catches a gradient that is cut, a label
    that belongs to another image, a normalisation that loses the image."""
    config = tiny_config
    config.batch_size, config.num_epochs, config.ema_decay = 32, 150, 0.0
    config.augment.crop_padding, config.label_smoothing = 0, 0.0
    config.model.update(width=32, depth=2, patch_size=4)
    config.model.update(stem=stem, stem_channels=((8,), (16,)), stem_blocks=1)
    config.model.pooling = {'patch': 'gap', 'conv': 'conv'}[stem]
    config.optimizer.update(learning_rate=3e-3, warmup_epochs=5.0)
    _, metrics = train_for(config, first_images(digits(), 32), 150)
    assert metrics[-1]['accuracy'] == 1.0
    assert metrics[0]['loss'] == pytest.approx(np.log(10), abs=1e-5)  # The head starts at zero.


@pytest.mark.parametrize(
    'stem, pooling, changes',
    [('patch', 'gap', {}), ('patch', 'conv', EVERYTHING), ('conv', 'conv', {}),
     ('conv', 'gap', EVERYTHING)],
)  # fmt: skip
def test_four_devices_equal_one(tiny_config, stem, pooling, changes):
    """Catches gradients that are summed instead of averaged, and augmentation, order, projections
    or BatchNorm's statistics that depend on the number of devices. Differences are those of
    rounding."""
    tiny_config.augment.update(changes)
    tiny_config.model.update(stem=stem, stem_channels=((4,), (8,)), stem_blocks=1)
    tiny_config.model.pooling = pooling
    # Adam and Muon would bring a gradient that is 0 but for rounding to the size of the others; and
    # of a sum in the place of a mean SGD alone gives another update. Slowly, because at a kink of
    # ReLU or of a maximum rounding decides.
    tiny_config.optimizer.update(name='sgd', learning_rate=0.02, warmup_epochs=0.0)
    tiny_config.model.attention.redraw_every = 2
    (start, *_, one), metrics_one = train_for(tiny_config, digits(), 4, num_devices=1)
    (*_, four), metrics_four = train_for(tiny_config, digits(), 4, num_devices=4)
    for a, b in zip(metrics_one, metrics_four, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for part in ('params', 'batch_stats'):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
            getattr(one, part),
            getattr(four, part),
        )
    assert set(one.batch_stats) == {
        part for part, kind in (('stem', stem), ('pool', pooling)) if kind == 'conv'
    }
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one.params, start.params)
    assert max(jax.tree.leaves(moved)) > 1e-3  # Else the comparison above says nothing.


def test_devices_share_muon_out(tiny_config, monkeypatch):
    """Catches a step whose optimiser does not know the axis, which would do everything everywhere:
    the result is the same."""
    devices, share_out = [], muon._share_out
    monkeypatch.setattr(
        muon, '_share_out', lambda costs, count: devices.append(count) or share_out(costs, count)
    )
    train_for(tiny_config, digits(), 1, num_devices=4)
    assert devices == [4]


@pytest.mark.parametrize('share', [1.0, 0.3])
def test_loss_against_numpy(tiny_config, monkeypatch, share):
    """Smoothed cross-entropy of the first step, from the model's own logits, in NumPy. Of mixed
    images it is that to λ·smooth(a) + (1 - λ)·smooth(b), and accuracy counts the larger share."""
    tiny_config.label_smoothing = 0.2
    tiny_config.augment.crop_padding = 0
    if share < 1:
        tiny_config.augment.mixup = 1.0
        monkeypatch.setattr(jax.random, 'beta', lambda *_: jnp.float32(share))
    dataset = digits()
    training = train.prepare(tiny_config, dataset)
    noise = jax.random.normal(jax.random.key(3), training.state.params['head']['kernel'].shape)
    training.state.params['head']['kernel'] = noise
    batches = input_pipeline.train_batches(
        dataset.train, seed=0, batch_size=128, first_step=0, num_steps=1, devices=jax.devices()[:1]
    )
    batch = next(batches)
    state = jax_utils.replicate(training.state, jax.devices()[:1], axis_name='batch')
    step = jax.pmap(training.step_fn, axis_name='batch', devices=jax.devices()[:1])
    _, metrics = step(state, batch)

    partners = np.arange(128) ^ 1
    pixels = (np.asarray(batch['image'][0]) / 255.0 - dataset.mean) / dataset.std
    pixels = share * pixels + (1 - share) * pixels[partners]
    variables = {'params': training.state.params, 'projections': training.state.projections}
    logits = np.asarray(training.model.apply(variables, jnp.asarray(pixels, jnp.float32)))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    labels = np.asarray(batch['label'][0])
    targets = np.full((128, 10), 0.2 / 10)
    targets[np.arange(128), labels] += 0.8
    targets = share * targets + (1 - share) * targets[partners]
    larger = labels if share > 0.5 else labels[partners]
    assert train.scalar(metrics['loss']) == pytest.approx(-(targets * log_p).sum(-1).mean(), 1e-4)
    assert train.scalar(metrics['accuracy']) == pytest.approx((log_p.argmax(-1) == larger).mean())


def test_alternating_flips_change_sides_from_epoch_to_epoch(tiny_config):
    """Weights stand still, so the loss over an epoch returns when all images show the same sides.

    Catches sides that follow the step or the position instead of the epoch and the image.
    """
    config = tiny_config
    config.batch_size = 32
    config.augment.update(crop_padding=0, flip='alternating')
    config.optimizer.learning_rate = 1e-30
    dataset = dataclasses.replace(first_images(digits(), 64), flip=True)
    training = train.prepare(config, dataset)
    noise = jax.random.normal(jax.random.key(3), training.state.params['head']['kernel'].shape)
    training.state.params['head']['kernel'] = noise
    device = jax.devices()[:1]
    step = jax.pmap(training.step_fn, axis_name='batch', devices=device)
    state = jax_utils.replicate(training.state, device, axis_name='batch')
    batches = input_pipeline.train_batches(
        dataset.train, seed=0, batch_size=32, first_step=0, num_steps=8, devices=device
    )
    losses = []
    for number, batch in enumerate(batches):
        state, _ = step(state, batch)
        if number % 2:
            losses.append(train.scalar(state.epoch_sums['loss']))
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_projections_are_redrawn_when_due(tiny_config):
    """Every 2 steps, as the pure function of (seed, layer, draw number)."""
    tiny_config.model.attention.redraw_every = 2
    states, _ = train_for(tiny_config, digits(), 5)
    for number, state in enumerate(states[1:]):
        expected = redraw_projections(
            states[0].projections,
            seed=tiny_config.seed,
            draw_number=number // 2,
            projection='orthogonal',
        )
        jax.tree.map(np.testing.assert_array_equal, state.projections, expected)
    drawn = [jax.tree.leaves(state.projections)[0] for state in states]
    assert np.abs(drawn[3] - drawn[2]).max() > 0.1 and np.abs(drawn[5] - drawn[4]).max() > 0.1


def test_moving_average_closed_form(tiny_config):
    """m ← d·m + (1 − d)·p with d = min(decay, (1 + t)/(10 + t)), over the visited weights and the
    statistics of BatchNorm; the projections of a run that never redraws stay what they were."""
    tiny_config.model.update(stem='conv', stem_channels=((4,), (8,)))
    tiny_config.ema_decay = 0.15
    tiny_config.optimizer.warmup_epochs = 0.0
    states, _ = train_for(tiny_config, digits(), 3)
    last = states[-1]
    for part, path in (
        ('params', ('head', 'kernel')),
        ('batch_stats', ('stem', 'conv_1', 'norm', 'mean')),
    ):
        visited = [getattr(state, part)[path[0]] for state in states]
        averaged = last.ema[part][path[0]]
        for key in path[1:]:
            visited = [values[key] for values in visited]
            averaged = averaged[key]
        average = visited[0]
        for t, new in enumerate(visited[1:]):
            decay = min(0.15, (1 + t) / (10 + t))
            average = decay * average + (1 - decay) * new
        np.testing.assert_allclose(averaged, average, rtol=1e-4, atol=1e-7)
        assert np.abs(average - visited[-1]).max() > 1e-5
    assert last.evaluated['params'] is last.ema['params']
    jax.tree.map(np.testing.assert_array_equal, last.projections, states[0].projections)


def test_early_stopping_rule():
    """Stops when the last `patience` epochs have brought nothing new, never with patience 0."""

    def history(*losses):
        return [{'validation_loss': loss} for loss in losses]

    assert not train.stops_early(history(3, 2, 1), 2)
    assert not train.stops_early(history(1, 2), 2)
    assert train.stops_early(history(1, 2, 1), 2)
    assert not train.stops_early(history(2, 3, 1), 2)
    assert not train.stops_early(history(1, 2, 3, 4), 0)
    assert not train.stops_early([], 2)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run that was trained to its end once, for the tests that look at what it left."""
    config = load_config('performer_relu', 'digits')
    config.num_epochs, config.batch_size, config.log_every_steps = 3, 128, 3
    config.dataset.validation_fraction = 0.2
    config.model.update(stem_channels=((4,), (8,)), stem_blocks=0, patch_size=8)
    config.model.update(width=16, depth=1, num_heads=2, mlp_dim=32)
    config.model.attention.update(num_features=8, redraw_every=5)
    directory = tmp_path_factory.mktemp('finished') / 'run'
    return config, directory, train.train(config, directory)


def saved_state(config, directory):
    """Latest state and history in a workdir."""
    training = train.prepare(config, digits())
    manager = checkpoints.Checkpoints(directory / 'checkpoints', **config.checkpoint)
    saved = manager.restore(training.state, manager.steps()[-1])
    manager.close()
    return jax.tree.map(np.asarray, saved.state), saved.history


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != 'seconds'} for row in history]


def test_workdir_of_a_run(finished, capsys):
    """All the files that the design promises, with the data set's name in each of the texts."""
    config, directory, results = finished
    for name in ('config.json', 'results.json', 'history.csv', 'classification_report.txt'):
        assert 'digits' in (directory / name).read_text(), name
    for name in ('learning_curves', 'confusion_matrix', 'per_class_accuracy', 'confidence'):
        assert (directory / 'figures' / f'{name}.png').stat().st_size > 5000
    assert not list(directory.rglob('learnt_kernel.*'))
    assert workdir.read_json(directory / 'results.json') == results
    wanted = {
        'dataset', 'kernel', 'num_params', 'num_tokens', 'epochs', 'train_seconds_per_epoch',
        'compile_seconds', 'inference_seconds', 'images_per_second', 'validation_accuracy',
        'test_accuracy', 'test_loss', 'seed', 'device', 'versions',
    }  # fmt: skip
    assert wanted <= set(results)
    assert results['num_tokens'] == 16 and results['kernel'] == 'relu'
    assert set(results['versions']) >= {'python', 'jax', 'flax', 'performer_vit', 'git_commit'}
    history = workdir.read_history(directory / 'history.csv')
    assert [row['epoch'] for row in history] == [1, 2, 3]
    best = max(row['validation_accuracy'] for row in history)
    assert results['validation_accuracy'] == best
    train.train(config, directory)  # Finished: shows the table, trains nothing.
    out = capsys.readouterr().out
    assert 'finished' in out and all(line.startswith('[digits]') for line in out.splitlines())


def test_test_accuracy_is_that_of_the_saved_weights(finished):
    """An independent pass in NumPy's order: model, best checkpoint, test images, one by one batch.

    Catches a report on other weights, other projections, or images in another order.
    """
    config, directory, results = finished
    dataset = digits()
    training = train.prepare(config, dataset)
    manager = checkpoints.Checkpoints(directory / 'checkpoints', **config.checkpoint)
    history = workdir.read_history(directory / 'history.csv')
    best = max(history, key=lambda row: (row['validation_accuracy'], row['epoch']))
    state = manager.restore(training.state, best['step']).state
    manager.close()
    pixels = (dataset.test.images / 255.0 - dataset.mean) / dataset.std
    logits = training.model.apply(
        {
            'params': state.ema['params'],
            'projections': state.projections,
            'batch_stats': state.ema['batch_stats'],
        },
        jnp.asarray(pixels, jnp.float32),
    )
    accuracy = float((np.asarray(logits).argmax(-1) == dataset.test.labels).mean())
    assert results['test_accuracy'] == pytest.approx(accuracy, abs=1e-9)


def test_a_tested_run_is_no_scored_run(finished):
    config, directory, _ = finished
    with pytest.raises(BadInput, match=r'was tested; this one is to be scored on validation'):
        train.validate(config, digits(), directory)


def test_evaluate_mode_reports_the_same(finished, tmp_path):
    _, original, results = finished
    directory = shutil.copytree(original, tmp_path / 'copy')
    before = (directory / 'classification_report.txt').read_text()
    again = evaluate.evaluate_run(directory)
    assert again['test_accuracy'] == results['test_accuracy']
    assert again['test_loss'] == pytest.approx(results['test_loss'], rel=1e-6)
    assert again['train_seconds_per_epoch'] == results['train_seconds_per_epoch']
    assert (directory / 'classification_report.txt').read_text() == before


def shown(directory) -> list[tuple]:
    """Every value in TensorBoard's files but measured times: tag, step, and the value itself."""
    return sorted(
        (value.tag, event.step, value.SerializeToString())
        for path in directory.glob('*tfevents*')
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
        if 'second' not in value.tag and 'hparams' not in value.tag
    )


def test_tensorboard_files_read_back(finished):
    """Scalars of steps and epochs, hyperparameters, and the confusion matrix as an image."""
    config, directory, results = finished
    events = EventAccumulator(str(directory), size_guidance={'tensors': 0})
    events.Reload()

    def values(tag: str) -> list[float]:
        return [float(make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]

    tags = set(events.Tags()['tensors'])
    steps = {'loss', 'accuracy', 'grad_norm', 'learning_rate', 'images_per_second'}
    assert {f'train/{name}' for name in steps} <= tags
    history = workdir.read_history(directory / 'history.csv')
    for name in ('train_loss', 'train_accuracy', 'validation_loss', 'validation_accuracy'):
        np.testing.assert_allclose(values(f'epoch/{name}'), [row[name] for row in history], 1e-6)
    assert [event.step for event in events.Tensors('train/loss')] == list(range(3, 25, 3))
    assert values('test/accuracy') == [pytest.approx(results['test_accuracy'])]
    assert events.Tensors('test/confusion_matrix')[0].tensor_proto.string_val[2][:4] == b'\x89PNG'
    assert any('hparams' in tag for tag in tags)


@pytest.mark.parametrize('how', ['dropped', 'SIGTERM'])
def test_interrupted_and_continued_is_the_uninterrupted_run(finished, tmp_path, monkeypatch, how):
    """Bit for bit: weights, optimiser, averages, projections, statistics, history. Stops inside
    epoch 2, where a signal saves, and the rest of the epoch alone is done again."""
    config, directory, results = finished
    report, run_steps = train.report_steps, train.run_steps
    first_steps = []

    def stop_at_step_12(shown, step, metrics):
        if step == 12:
            if how == 'dropped':
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return report(shown, step, metrics)

    def run(step_fn, state, batches, steps, *arguments):
        first_steps.append(steps.start)
        return run_steps(step_fn, state, batches, steps, *arguments)

    monkeypatch.setattr(train, 'report_steps', stop_at_step_12)
    message = None if how == 'dropped' else 'has saved step 1[0-6]'
    with pytest.raises(KeyboardInterrupt, match=message):
        train.train(config, tmp_path / 'run')
    monkeypatch.undo()
    assert len(workdir.read_history(tmp_path / 'run' / 'history.csv')) == 1
    monkeypatch.setattr(train, 'run_steps', run)
    again = train.train(config, tmp_path / 'run')
    assert (first_steps[0] == 8) == (how == 'dropped') and first_steps[1:] == [16]

    state, history = saved_state(config, directory)
    resumed, resumed_history = saved_state(config, tmp_path / 'run')
    jax.tree.map(np.testing.assert_array_equal, resumed, state)
    assert without_seconds(resumed_history) == without_seconds(history)
    assert again['test_loss'] == results['test_loss']
    assert shown(tmp_path / 'run') == shown(directory)


def test_a_signal_at_the_end_of_an_epoch_comes_before_who_ends_the_run(tmp_path, monkeypatch):
    """Catches a sweep that is stopped while a trial's epoch is validated, prunes, and goes on."""
    config = make_tiny_config()
    dataset = crossval.load_fold(config)
    check = train.raise_if_not_finite

    def stop(row):
        os.kill(os.getpid(), signal.SIGTERM)
        check(row)

    monkeypatch.setattr(train, 'raise_if_not_finite', stop)
    with pytest.raises(interruption.Interrupted, match='has saved step 8'):
        train.validate(config, dataset, tmp_path / 'run', lambda row: pytest.fail('pruned'))
    monkeypatch.undo()
    rows = []
    train.validate(config, dataset, tmp_path / 'run', rows.append)
    assert [row['epoch'] for row in rows] == [1, 2]


def test_a_checkpoint_of_another_version_is_named(finished):
    """Catches Orbax's listing of two trees, which says nothing of what to do."""
    config, directory, _ = finished
    template = train.prepare(config, digits()).state.replace(ema=None)
    manager = checkpoints.Checkpoints(directory / 'checkpoints', 1, 1)
    with pytest.raises(BadInput, match='holds another state.*train again in another --workdir'):
        manager.restore_latest(template, warn=pytest.fail)
    manager.close()


def test_the_best_of_a_continued_run_is_the_best_of_all(tiny_config, tmp_path, monkeypatch):
    """The best epoch lies before the interruption and is not among the last that are kept.

    Catches metrics of checkpoints that are forgotten when the process ends: another state would be
    tested than without the interruption.
    """
    tiny_config.num_epochs = 4
    tiny_config.checkpoint.keep = 1
    epochs = iter([0.9, 0.5])

    def validation(labels, log_probabilities):
        accuracy = next(epochs, None)
        if accuracy is None:
            raise KeyboardInterrupt
        return accuracy

    monkeypatch.setattr(evaluate, 'accuracy', validation)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny_config, tmp_path / 'run')
    epochs = iter([0.4, 0.3, 0.8])  # The last is the report's on the test split.
    results = train.train(tiny_config, tmp_path / 'run')
    assert results['tested_epoch'] == 1 and results['validation_accuracy'] == 0.9
    kept = sorted(int(path.name) for path in (tmp_path / 'run' / 'checkpoints').glob('[0-9]*'))
    assert kept == [8, 32]


def with_bad_steps(monkeypatch, *bad):
    """Lets the learning rate of some steps be infinite, by the optimiser's own count."""

    def learning_rate(optimizer, steps_per_epoch, num_epochs):
        return lambda step: jnp.where(jnp.isin(step, jnp.array(bad)), jnp.inf, 1e-3)

    monkeypatch.setattr(optimizers, 'learning_rate', learning_rate)


def test_not_finite_stops_names_the_step_and_keeps_the_checkpoint(
    tiny_config, tmp_path, monkeypatch
):
    """Catches a step that is told late, and weights that it spoilt."""
    with_bad_steps(monkeypatch, 13)
    message = r'step 13 \(counted from 0\) are not finite, first in the update of .*learning_rate'
    with pytest.raises(FloatingPointError, match=message):
        train.train(tiny_config, tmp_path / 'run')
    state, history = saved_state(tiny_config, tmp_path / 'run')
    assert len(history) == 1 and int(state.step) == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert not (tmp_path / 'run' / 'results.json').exists()


def poisoned(training, name: str, number: int = 0):
    """The state with one infinite number in the weight of that name."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(training.state.params)
    found = [i for i, (path, _) in enumerate(leaves) if jax.tree_util.keystr(path) == name]
    values = [leaf for _, leaf in leaves]
    (place,) = found
    values[place] = values[place].at[(0,) * values[place].ndim].set(jnp.inf)
    return training.state.replace(params=jax.tree.unflatten(tree, values))


def diagnosis(training, state, batch) -> str:
    return training.diagnose(jax_utils.replicate(state, axis_name='batch'), batch)


def first_batch(config):
    return next(
        input_pipeline.train_batches(
            digits().train, seed=0, batch_size=config.batch_size, first_step=0, num_steps=1
        )
    )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_first_layer_that_is_not_finite_is_named(tiny_config, dtype):
    """By weights that are finite, but whose product overflows in one layer.

    Catches a search that names the loss, in which every infinity ends, or the whole model.
    """
    tiny_config.model.dtype = dtype
    training = train.prepare(tiny_config, digits())
    params = jax.tree.map(jnp.copy, training.state.params)
    hidden = params['encoder_0']['mlp']['hidden']
    hidden['kernel'] = jnp.full_like(hidden['kernel'], 3e38)
    hidden['bias'] = jnp.full_like(hidden['bias'], 3e38)
    state = training.state.replace(params=params)
    batch = first_batch(tiny_config)
    assert diagnosis(training, state, batch) == 'first in the output of encoder_0/mlp/hidden'
    # And so the run says it, at its first step.
    step = jax.pmap(training.step_fn, axis_name='batch')
    after, metrics = step(jax_utils.replicate(state, axis_name='batch'), batch)
    assert train.scalar(metrics['bad_step']) == 0
    with pytest.raises(FloatingPointError, match='step 0 .*, first in the output of encoder_0/mlp'):
        batches = lambda **_: iter([batch])  # noqa: E731
        train.raise_if_bad(tiny_config, training, after, batches)


def test_a_weight_that_is_not_finite_is_named(tiny_config):
    training = train.prepare(tiny_config, digits())
    state = poisoned(training, "['head']['kernel']")
    batch = first_batch(tiny_config)
    assert diagnosis(training, state, batch) == 'first in the weight head/kernel'


def test_images_that_are_not_finite_are_named(tiny_config):
    """As a channel whose standard deviation is 0 makes them."""
    dataset = dataclasses.replace(digits(), std=(1.0, 0.0, 1.0))
    training = train.prepare(tiny_config, dataset)
    batch = first_batch(tiny_config)
    said = diagnosis(training, training.state, batch)
    assert said == 'first in the images, as augmented'


def test_a_gradient_that_is_not_finite_is_named(tiny_config, monkeypatch):
    """Of a finite loss, by the derivative of √x at 0; the layers after it have finite gradients."""
    from performer_vit import vit as models

    @jax.custom_jvp
    def identity(x):
        return x

    identity.defjvp(lambda x, tangents: (x[0], tangents[0] * jnp.inf))
    original = models.nn.LayerNorm.__call__

    def broken(self, x, **arguments):
        out = original(self, x, **arguments)
        return identity(out) if self.name == 'mlp_norm' else out

    monkeypatch.setattr(models.nn.LayerNorm, '__call__', broken)
    training = train.prepare(tiny_config, digits())
    said = diagnosis(training, training.state, first_batch(tiny_config))
    assert said.startswith('first in the gradient of encoder_0/mlp_norm/')


def test_a_norm_that_is_not_finite_is_named(tiny_config, monkeypatch):
    """Of gradients that are finite, but whose squares overflow.

    Catches a step that was dropped, of which it is said that nothing is wrong with it.
    """
    original = train.train_step._loss

    def scaled(*arguments):
        loss, rest = original(*arguments)
        return loss * 1e25, rest

    monkeypatch.setattr(train.train_step, '_loss', scaled)
    training = train.prepare(tiny_config, digits())
    said = diagnosis(training, training.state, first_batch(tiny_config))
    assert said == 'first in the norm of the gradient, whose parts are finite'


def test_nothing_wrong_is_said_so(tiny_config):
    training = train.prepare(tiny_config, digits())
    said = diagnosis(training, training.state, first_batch(tiny_config))
    assert said == 'but were when the step was done again'


def test_a_bad_step_changes_nothing_and_the_state_stands_still(tiny_config, monkeypatch):
    """Catches an average, a momentum or a statistic that takes the infinity in."""
    with_bad_steps(monkeypatch, 2)
    tiny_config.model.update(stem='conv', stem_channels=((4,), (8,)), stem_blocks=0)
    states, metrics = train_for(tiny_config, digits(), 5)
    assert [row['bad_step'] for row in metrics] == [-1, -1, 2, 2, 2]
    assert [int(state.step) for state in states] == [0, 1, 2, 2, 2, 2]
    for state in states[3:]:
        stopped = state.replace(bad_step=states[2].bad_step)
        jax.tree.map(np.testing.assert_array_equal, stopped, states[2])


def test_bad_steps_are_passed_over_as_if_they_had_not_been(tiny_config, monkeypatch):
    """Two are allowed: the third stops. The sums of the epoch leave them out.

    The optimiser counts its own steps, so that its rate stays infinite: all three come in a row.
    """
    with_bad_steps(monkeypatch, 2)
    tiny_config.max_skipped_steps = 2
    states, metrics = train_for(tiny_config, digits(), 6)
    assert [row['skipped_steps'] for row in metrics] == [0, 0, 1, 2, 2, 2]
    assert [row['bad_step'] for row in metrics] == [-1, -1, -1, -1, 4, 4]
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4, 4, 4]
    jax.tree.map(np.testing.assert_array_equal, states[4].params, states[2].params)
    jax.tree.map(np.testing.assert_array_equal, states[4].opt_state, states[2].opt_state)
    jax.tree.map(np.testing.assert_array_equal, states[4].ema, states[2].ema)
    sums = {name: float(value) for name, value in states[4].epoch_sums.items()}
    assert sums['steps'] == 2
    assert sums['loss'] == pytest.approx(metrics[0]['loss'] + metrics[1]['loss'])


def test_a_draw_that_is_due_in_a_skipped_step_is_kept(tiny_config, monkeypatch):
    """Catches projections that stay the old ones until the next draw; weights do not change."""
    with_bad_steps(monkeypatch, 2)
    tiny_config.max_skipped_steps = 1
    tiny_config.model.attention.redraw_every = 2
    states, metrics = train_for(tiny_config, digits(), 4)
    assert [row['skipped_steps'] for row in metrics] == [0, 0, 1, 1]
    jax.tree.map(np.testing.assert_array_equal, states[3].params, states[2].params)
    expected = redraw_projections(
        states[0].projections, seed=tiny_config.seed, draw_number=1, projection='orthogonal'
    )
    jax.tree.map(np.testing.assert_array_equal, states[3].projections, expected)


def test_a_run_that_skips_ends_and_says_how_many(tiny_config, tmp_path, monkeypatch, capsys):
    """The images of step 5 alone are not finite, and its epoch's means are of the other steps."""
    original = train.train_step._inputs

    def inputs(config, dataset, steps_per_epoch, state, batch):
        images, *rest = original(config, dataset, steps_per_epoch, state, batch)
        return jnp.where(state.step == 5, jnp.nan, images), *rest

    monkeypatch.setattr(train.train_step, '_inputs', inputs)
    tiny_config.max_skipped_steps = 1
    results = train.train(tiny_config, tmp_path / 'run')
    assert results['skipped_steps'] == 1
    assert '1 steps so far were skipped' in capsys.readouterr().out
    history = workdir.read_history(tmp_path / 'run' / 'history.csv')
    assert all(np.isfinite(row['train_loss']) for row in history)
    # Random guesses have a loss of ln 10; a sum over 7 steps divided by 8 would be far below.
    assert 2.1 < history[0]['train_loss'] < 2.5


def test_early_stopping_ends_a_run(tiny_config, tmp_path, monkeypatch):
    """Validation loss that never falls: patience 2 ends the run after 3 of 8 epochs."""
    tiny_config.num_epochs = 8
    tiny_config.early_stopping_patience = 2
    tiny_config.test_state = 'last'
    tiny_config.checkpoint.every_epochs = 5
    monkeypatch.setattr(evaluate, 'negative_log_likelihood', lambda *_: 1.0)
    results = train.train(tiny_config, tmp_path / 'run')
    assert results['epochs'] == 3 and results['tested_epoch'] == 3
    _, history = saved_state(tiny_config, tmp_path / 'run')
    assert len(history) == 3  # The last state is saved although 3 is no multiple of 5.


def test_profile_on_request(tiny_config, tmp_path):
    """Catches a hook that waits for a step which it is never told of."""
    tiny_config.profile = True
    tiny_config.num_epochs = 2
    train.train(tiny_config, tmp_path / 'run')
    assert list((tmp_path / 'run').glob('plugins/profile/*/*'))


@pytest.mark.parametrize('stem', vit.STEMS)
def test_training_a_learnt_kernel_on_everything(tiny_config, tmp_path, stem):
    """Without a validation split there is none in the results, and the last state is tested.

    The run says what it has learnt, and so does its evaluation, in the same bits. Catches initial
    weights that training has overwritten, weights other than the tested ones, and a file or figure
    that is not made anew.
    """
    tiny_config.dataset.validation_fraction = 0.0
    tiny_config.test_state = 'last'
    tiny_config.num_epochs = 1
    tiny_config.optimizer.warmup_epochs = 0.0
    tiny_config.model.attention.kernel = 'ftheta'
    tiny_config.model.update(stem=stem, stem_channels=((4,), (8,)), stem_blocks=0)
    results = train.train(tiny_config, tmp_path / 'run')
    assert results['validation_accuracy'] is None
    assert workdir.read_history(tmp_path / 'run' / 'history.csv')[0]['validation_loss'] is None
    assert 0 <= results['test_accuracy'] <= 1
    paths = [tmp_path / 'run' / name for name in ('learnt_kernel.npz', 'figures/learnt_kernel.png')]
    saved = workdir.read_arrays(paths[0])
    assert saved['learnt'].shape == (1, 1, saved['angles'].size)
    assert np.max(np.abs(saved['learnt'] - saved['initial'])) > 1e-3
    drawn = paths[1].read_bytes()
    for path in paths:
        path.unlink()
    evaluate.evaluate_run(tmp_path / 'run')
    assert paths[1].read_bytes() == drawn
    jax.tree.map(np.testing.assert_array_equal, workdir.read_arrays(paths[0]), saved)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_trains_two_steps(name):
    """The shipped configs as they are, but for the batch: finite losses that move the weights."""
    config = load_config(name, 'digits')
    config.batch_size = 8
    config.optimizer.warmup_epochs = 0.0
    (*_, state), metrics = train_for(config, first_images(digits(), 16), 2)
    assert [row['bad_step'] for row in metrics] == [-1, -1]
    assert all(np.isfinite(row['loss']) and row['grad_norm'] > 0 for row in metrics)
    assert int(state.step) == 2
    assert state.projections.keys() == (set() if name in ('vit', 'performer_ftheta') else
                                        {'encoder_0', 'encoder_1'})  # fmt: skip


@pytest.mark.parametrize(
    'field, value, message',
    [
        ('model.attention.kernel', 'tanh', r"kernel is 'tanh'; allowed are 'exact', 'softmax'"),
        ('model.attention.projection', 'fourier', r"is 'fourier'; allowed are 'orthogonal'"),
        ('model.stem', 'hybrid', r"model.stem is 'hybrid'"),
        ('model.pooling', 'max', r"model.pooling is 'max'"),
        ('model.num_heads', 3, r'model.width 16 is not divisible by model.num_heads 3'),
        ('model.patch_size', 5, r'not divisible by model.patch_size 5'),
        ('optimizer.name', 'lion', r"optimizer.name is 'lion'"),
        ('dataset.name', 'mnist', r"dataset.name is 'mnist'; allowed are 'cifar10'"),
        ('dataset.fallback', 'noise', r"dataset.fallback is 'noise'"),
        ('batch_size', 130, r'batch_size is 130; .* number of devices, 4'),
        ('batch_size', 2000, r'2000 and there are 1\d{3} images to train on'),
        ('num_epochs', 0, r'num_epochs is 0; allowed is an integer from 1 to 1,000,000'),
        ('label_smoothing', 1.0, r'label_smoothing is 1.0'),
        ('test_state', 'worst', r"test_state is 'worst'; allowed are 'best', 'last'"),
        ('dataset.validation_fraction', 0.0, r"set test_state to 'last'"),
        ('checkpoint.keep', 0, r'checkpoint.keep is 0'),
        ('augment.crop_padding', 32, r'crop_padding is 32; .* below 32'),
        ('augment.flip', 'False', r"augment.flip is 'False'; allowed are 'random', 'alternating'"),
        ('augment.cutout', 32, r'augment.cutout is 32; .* below 32'),
        ('augment.mixup', float('nan'), r'augment.mixup is nan; allowed is a number'),
        ('augment.mixup', -1.0, r'augment.mixup is -1.0; allowed is a number from 0 to'),
        ('augment.randaugment_layers', -1, r'randaugment_layers is -1'),
        ('augment.randaugment_magnitude', 11.0, r'randaugment_magnitude is 11.0; .* 0 to 10'),
        ('model.attention.hidden', -1, r'hidden is -1'),
        ('seed', 2**40, r'seed is 1099511627776; .* to 4,294,967,295'),
        ('optimizer.warmup_epochs', 9.0, r'warmup_epochs is 9.0'),
        ('model.attention.redraw_every', -1, r'redraw_every is -1'),
        ('dataset.data_dir', 'caf\udce9', r"dataset\.data_dir is 'caf\\udce9'"),
        ('max_skipped_steps', -1, r'max_skipped_steps is -1; .* integer from 0 to'),
    ],
)
def test_bad_config_is_refused_before_the_workdir_is_made(
    tiny_config, tmp_path, monkeypatch, field, value, message
):
    """A message with what was given and what is allowed, and nothing on disk."""
    with tiny_config.unlocked():
        tiny_config.update_from_flattened_dict({field: value})
    if field not in ('dataset.name', 'dataset.fallback') and value != 2000:
        monkeypatch.setattr(datasets, 'load', lambda **_: pytest.fail('data were read first'))
    with pytest.raises(BadInput, match=message):
        train.train(tiny_config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_another_config_on_a_workdir_is_refused(finished):
    config, directory, _ = finished
    other = config.copy_and_resolve_references()
    other.seed = 1
    with pytest.raises(BadInput, match='seed: 0 there, 1 here'):
        train.train(other, directory)


def test_checkpoints_that_cannot_be_written_are_told_before_any_work(
    tiny_config, tmp_path, monkeypatch
):
    """Such as another user's in a workdir of one's own. Catches an epoch that is lost."""

    def try_to_write(path):
        if path == tmp_path / 'checkpoints':
            raise PermissionError(errno.EACCES, 'Permission denied')

    (tmp_path / 'checkpoints').mkdir()
    monkeypatch.setattr(files, 'try_to_write', try_to_write)
    with pytest.raises(BadInput, match=r'checkpoints cannot be written \(Permission denied\)'):
        train.train(tiny_config, tmp_path)
