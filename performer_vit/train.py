"""Training, read top to bottom: data, model, step, loop, final test."""

import collections
import contextlib
import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from performer_vit import (
    augment,
    checkpoints,
    cluster,
    datasets,
    environment,
    evaluate,
    fields,
    figures,
    flops,
    input_pipeline,
    interruption,
    memory,
    optimizers,
    progress,
    train_step,
    vit,
)
from performer_vit import predict as prediction
from performer_vit import workdir as run_directory
from performer_vit.checkpoints import Checkpoints, Saved, TrainState
from performer_vit.errors import BadInput, choose

# The fields that make a model large.
_SIZES = (
    'model.width, model.depth, model.mlp_dim, model.stem_channels, model.attention.num_features or '
    'model.attention.hidden, or take a larger model.patch_size'
)
TEST_STATES = ('best', 'last')


def check(config) -> None:
    """Raises `BadInput` for all that can be seen to be wrong in a config before data are read."""
    _check(config)
    check_needs(config)


def check_needs(config) -> None:
    """Raises `BadInput` for fields of the test that need a validation split where there is none."""
    if not config.dataset.validation_fraction and config.dataset.fold < 0:
        needs = {
            "test_state is 'best'": config.test_state == 'best',
            'early_stopping_patience is above 0': config.early_stopping_patience > 0,
        }
        for what, needed in needs.items():
            if needed:
                raise BadInput(
                    f'{what}, which needs a validation split, but dataset.validation_fraction is '
                    "0: set test_state to 'last' and early_stopping_patience to 0, or "
                    'dataset.validation_fraction above 0.'
                )


def check_scored(config) -> None:
    """What `check` does, and `BadInput` for what cannot be where validation is the score."""
    _check(config)
    if not config.dataset.validation_fraction and config.dataset.fold < 0:
        raise BadInput(
            'dataset.validation_fraction is 0, but the validation split is what scores this run: '
            'set it above 0.'
        )
    check_not_stopped(config)


def check_not_stopped(config) -> None:
    """Raises `BadInput` for early stopping, which validation images that score a run cannot do."""
    if config.early_stopping_patience:
        raise BadInput(
            f'early_stopping_patience is {config.early_stopping_patience}, but the validation '
            'split is what scores this run, and must not choose when it stops: set it to 0.'
        )


def _check(config) -> None:
    fields.check(run_directory.flatten(config.to_dict()))
    choose('test_state', config.test_state, TEST_STATES)
    input_pipeline.check_batch_size(config.batch_size, jax.device_count())
    share = config.batch_size // jax.device_count()
    image_shape = (config.dataset.image_size, config.dataset.image_size, 3)
    augment.check(config.augment, (share, *image_shape))
    optimizers.create(
        config.optimizer, optimizers.learning_rate(config.optimizer, 1, config.num_epochs)
    )
    # The model checks its own fields when it is traced; the number of classes does not matter.
    model = vit.from_config(config.model, num_classes=2, seed=config.seed)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        jax.eval_shape(model.init, jax.random.key(0), images)
    except BadInput as error:  # Modules know nothing of configs.
        raise BadInput(f'the section `model` of the config: {error}') from error


def steps_per_epoch(config, num_images: int) -> int:
    """Steps of an epoch of so many training images; `BadInput` where the config does not fit."""
    input_pipeline.check_batch_size(config.batch_size, jax.device_count(), num_images)
    steps = input_pipeline.steps_per_epoch(num_images, config.batch_size)
    if config.max_skipped_steps >= steps:
        raise BadInput(
            f'max_skipped_steps is {config.max_skipped_steps} and an epoch has {steps} '
            'steps: set it lower, so that each epoch has steps that count.'
        )
    lengths = {
        'num_epochs': config.num_epochs, 'optimizer.decay_epochs': config.optimizer.decay_epochs
    }  # fmt: skip
    for field, epochs in lengths.items():
        if epochs * steps >= 2**31:
            raise BadInput(
                f'{field} is {epochs}, of {steps:,} steps each; allowed are less than '
                '2**31 steps in all: set it lower, or batch_size higher.'
            )
    return steps


def check_data(config, dataset: datasets.Dataset) -> None:
    """Raises `BadInput` where the config of a run that is tested does not fit to the data."""
    steps_per_epoch(config, len(dataset.train))
    check_flips(config, dataset)


def check_flips(config, dataset: datasets.Dataset) -> None:
    """Raises `BadInput` where mirror images are asked for and show something else."""
    if config.flip_averaging and not dataset.flip:
        raise BadInput(
            f'flip_averaging is True, but images of {dataset.name} are never mirrored: mirror '
            'images show something else there. Set flip_averaging to False.'
        )


def own_failure(error: Exception) -> str | None:
    """Why a run failed by its own config, so that a series goes on with the next; else None."""
    return str(error) if isinstance(error, FloatingPointError) else memory.exceeded(error)


def scalar(value: jax.Array) -> float:
    """The first replica of a replicated scalar, on the host; waits until it is computed."""
    return np.asarray(value.addressable_shards[0].data).item()


def run_steps(
    step_fn: Callable,
    state: TrainState,
    batches: Iterator[dict],
    steps: range,
    log_every: int,
    observe: Callable[[int, dict], bool | None],
    stop: Callable[[], bool] = lambda: False,
) -> tuple[TrainState, dict]:
    """The hot loop: runs `steps`, and hands the metrics of every `log_every`-th to `observe`.

    Metrics are read only after the next step has been dispatched, so that the device never waits
    for the host. Where `observe` says so, the steps that are left are not done; before each step
    `stop` is asked the same.

    Returns:
      The new state, and the metrics of the last step; {} where there was none.
    """
    pending = None
    metrics = {}
    for step in steps:
        if stop():
            break
        state, metrics = step_fn(state, next(batches))
        if pending and observe(*pending):
            return state, metrics
        pending = None
        if (step + 1) % log_every == 0:
            pending = (step + 1, metrics)
    if pending:
        observe(*pending)
    return state, metrics


def report_steps(shown: progress.Progress, step: int, metrics: dict) -> bool:
    """Reads a step's replicated metrics, and shows them, or says that there is a bad step."""
    values = {name: scalar(value) for name, value in metrics.items()}
    if values.pop('bad_step') >= 0:
        return True
    shown.steps_done(step, values)
    return False


def raise_if_bad(
    config, training: 'Training', state: TrainState, batches: Callable[..., Iterator[dict]]
) -> None:
    """Raises `FloatingPointError` where the state, replicated, has stopped at a bad step.

    The step is done again to find out where its numbers went wrong.
    """
    step = scalar(state.bad_step)
    if step < 0:
        return
    where = training.diagnose(state, next(batches(first_step=step, num_steps=1)))
    skipped = scalar(state.skipped_steps)
    raise FloatingPointError(
        f'the numbers of step {step} (counted from 0) are not finite, {where}. '
        + (
            f'{skipped} such steps were skipped before it, which max_skipped_steps allows. '
            * bool(skipped)
        )
        + 'Nothing of it was kept: the checkpoints in the workdir are from before. Lower '
        'optimizer.learning_rate or optimizer.clip_norm, lengthen optimizer.warmup_epochs, or '
        'set max_skipped_steps higher to pass over more such steps, in a new --workdir.'
    )


def raise_if_not_finite(row: dict) -> None:
    """Raises `FloatingPointError` where an epoch's validation loss is not finite.

    Weights may be finite and yet so large that the forward pass overflows.
    """
    if not math.isfinite(row['validation_loss']):
        raise FloatingPointError(
            f'the validation loss after epoch {row["epoch"]} is not finite. That epoch was not '
            'saved: the checkpoints in the workdir are from before. Lower '
            'optimizer.learning_rate, in a new --workdir.'
        )


def stops_early(history: list[dict], patience: int) -> bool:
    """Whether the last `patience` epochs brought no validation loss below the earlier lowest."""
    losses = [row['validation_loss'] for row in history]
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])


Training = collections.namedtuple(
    'Training', 'model step_fn diagnose state steps_per_epoch num_params'
)
Training.__doc__ = """What a training consists of before it is compiled: see `prepare`."""


def prepare(config, dataset: datasets.Dataset) -> Training:
    """Model, step and first state of a config on a data set; all input is checked."""
    steps = steps_per_epoch(config, len(dataset.train))
    schedule = optimizers.learning_rate(config.optimizer, steps, config.num_epochs)
    tx = optimizers.create(config.optimizer, schedule, axis_name='batch')
    model = vit.from_config(config.model, dataset.num_classes, config.seed)
    create = functools.partial(
        checkpoints.create_state,
        model, tx, dataset.image_shape, config.seed, ema=config.ema_decay > 0,
    )  # fmt: skip
    memory.check('the train state', memory.size(jax.eval_shape(create)), _SIZES)
    state = create()
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    step_fn = train_step.make_train_step(model, tx, schedule, config, dataset, steps)
    diagnose = train_step.make_diagnosis(model, tx, config, dataset, steps)
    return Training(model, step_fn, diagnose, state, steps, num_params)


def compile_step(training: Training, state: TrainState, batch: dict) -> Callable:
    """The step compiled for this replicated state and this batch; the state is donated."""
    step = jax.pmap(
        training.step_fn, axis_name='batch', devices=cluster.devices(), donate_argnums=0
    )
    compiled = step.lower(state, batch).compile()
    needs = compiled.memory_analysis()
    if needs is not None:  # Not every backend tells.
        needed = needs.argument_size_in_bytes + needs.temp_size_in_bytes
        memory.check('the training step', needed, f'batch_size, {_SIZES}, in another --workdir')
    return compiled


def train(config, workdir: str | os.PathLike | None = None, run_name: str = 'run') -> dict:
    """Trains, tests and reports what `config` describes; goes on where it stopped.

    Args:
      config: an `ml_collections.ConfigDict` as `configs/base.py` makes it.
      workdir: the directory of the run; default `runs/<data set>/<run_name>`.
      run_name: what the run is called in that default.

    Returns:
      The content of `results.json`.

    Raises:
      BadInput: something in the config, the data or the workdir cannot be used.
      FloatingPointError: a loss or gradient was not finite; the message names the step.
    """
    cluster.everywhere(lambda: check(config))
    cluster.from_main(
        lambda: run_directory.check_writable(workdir or run_directory.default_workdir(run_name, ''))
    )

    def load() -> datasets.Dataset:
        dataset = datasets.load(**config.dataset)
        check_data(config, dataset)
        return dataset

    dataset = cluster.everywhere(load)
    workdir = workdir or run_directory.default_workdir(run_name, dataset.name)
    return _fit(config, dataset, workdir, _test, lambda row: None)


def validate(
    config,
    dataset: datasets.Dataset,
    workdir: str | os.PathLike,
    on_epoch: Callable[[dict], None] = lambda row: None,
) -> dict:
    """Trains as `train` does, and scores the last epoch on the validation split instead of testing.

    The best epoch would be a choice made on the images that judge it, and so would early stopping.

    Args:
      config: of the run; `fields.OF_THE_TEST` do nothing.
      dataset: with a validation split; its test split is not read and may be None.
      workdir: the directory of the run.
      on_epoch: gets each row of the history after its epoch, and where a run goes on, first those
        that it has. What it raises ends the training, which goes on there when called again.

    Returns:
      The content of `results.json`, with the validation's accuracy and loss. The predictions are
      in `validation_predictions.npz`.

    Raises:
      BadInput, FloatingPointError: as `train`.
    """
    check_scored(config)
    if dataset.validation is None:
        raise BadInput(
            'the data set has no validation split to be scored on: set '
            'dataset.validation_fraction above 0.'
        )
    return _fit(config, dataset, workdir, _score, on_epoch)


def _fit(
    config,
    dataset: datasets.Dataset,
    workdir: str | os.PathLike,
    finish: Callable[['_Fitted'], dict],
    on_epoch: Callable[[dict], None],
) -> dict:
    """The training itself, which `finish` ends: `_test` or `_score`."""
    environment.versions()  # Those that begin the run.
    cluster.check_agreement(
        'their config',
        run_directory.flatten(config.to_dict()),
        'Start all of them with the same flags and the same files of configs/.',
    )
    data = datasets.fingerprints(dataset)
    if jax.process_count() > 1:
        cluster.check_agreement(
            'the data set that they read',
            data,
            "Give all of them the same files; with dataset.fallback='none', one that lacks the "
            'data set ends instead of reading another.',
        )
    training = cluster.everywhere(lambda: prepare(config, dataset))
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(interruption.deferred())

        def claim() -> str:
            stack.enter_context(run_directory.alone(workdir))
            claimed = run_directory.claim(workdir, run_directory.definition(config.to_dict(), data))
            # Not only after an epoch, where the directory is another user's, say.
            if not run_directory.is_finished(claimed):
                run_directory.check_writable(claimed / 'checkpoints')
            return str(claimed)

        claimed = pathlib.Path(cluster.from_main(claim))
        return _run(config, dataset, claimed, training, finish, on_epoch, asked)


def _run(
    config,
    dataset: datasets.Dataset,
    workdir: pathlib.Path,
    training: 'Training',
    finish: Callable[['_Fitted'], dict],
    on_epoch: Callable[[dict], None],
    asked: Callable[[], bool],
) -> dict:
    say = functools.partial(progress.say, dataset.name)
    results = _finished(dataset, workdir, is_tested=finish is _test)
    if results is not None:
        return results
    say(_description(training, dataset, workdir))

    saved = Checkpoints(workdir / 'checkpoints', **config.checkpoint)
    start = saved.restore_latest(training.state, warn=say)
    state, history, scalars, seconds = start or Saved(training.state, [], [], 0.0)
    first_step, last_step = int(state.step), config.num_epochs * training.steps_per_epoch
    if start:
        say(f'Going on after step {first_step:,} of {last_step:,}, from a checkpoint.')
        cluster.from_main(lambda: run_directory.write_history(workdir / 'history.csv', history))
    batches = functools.partial(
        input_pipeline.train_batches,
        dataset.train,
        seed=config.seed,
        batch_size=config.batch_size,
    )

    say('Compiling the training step and the forward pass …')
    started = time.perf_counter()
    state = cluster.replicate(state)
    first_batch = next(batches(first_step=0, num_steps=1))
    step_fn = compile_step(training, state, first_batch)
    predict = prediction.compile_forward(training.model, dataset, state, config.batch_size)
    compile_seconds = time.perf_counter() - started
    step_flops = flops.count(training.step_fn, state, first_batch)

    stream = batches(first_step=first_step, num_steps=last_step - first_step)
    title = figures.model_name(config.model.attention.kernel)
    shown = progress.Progress(workdir, dataset.name, title, config, first_step, last_step, scalars)

    observe = functools.partial(report_steps, shown)
    asked_to_stop = cluster.together(
        lambda: asked() or shown.failure is not None, config.log_every_steps
    )
    try:
        for row in history:
            on_epoch(row)
        for epoch in range(len(history), config.num_epochs):
            if stops_early(history, config.early_stopping_patience):
                break
            end = (epoch + 1) * training.steps_per_epoch
            steps = range(max(first_step, end - training.steps_per_epoch), end)
            started = time.perf_counter()
            state, metrics = run_steps(
                step_fn, state, stream, steps, config.log_every_steps, observe, asked_to_stop
            )
            raise_if_bad(config, training, state, batches)
            seconds += time.perf_counter() - started
            if scalar(state.step) < end:
                cluster.from_main(shown.flush)
                _save_and_stop(saved, state, history, shown.scalars, seconds)
            skipped = scalar(state.skipped_steps)
            if skipped:
                say(f'{skipped} steps so far were skipped: their numbers were not finite.')
            row = _row(dataset, epoch + 1, end, state, metrics, seconds, predict)
            seconds = 0.0
            history.append(row)
            is_last = epoch + 1 == config.num_epochs or stops_early(
                history, config.early_stopping_patience
            )
            cluster.from_main(functools.partial(_tell, workdir, history, shown))
            if is_last or (epoch + 1) % config.checkpoint.every_epochs == 0:
                saved.save(cluster.first_replica(state), history, shown.scalars)
            # First: where `on_epoch` ends this run, the run after it would not hear of the signal.
            if asked_to_stop() and not is_last:
                _save_and_stop(saved, state, history, shown.scalars, seconds)
            on_epoch(row)
            shown.resume(end)
        saved.wait()

        epoch_seconds = float(np.median([row['seconds'] for row in history]))
        results = {
            **evaluate.describe(config, dataset, training.model, training.num_params),
            'epochs': len(history),
            'train_seconds_per_epoch': epoch_seconds,
            'images_per_second': training.steps_per_epoch * config.batch_size / epoch_seconds,
            'compile_seconds': compile_seconds,
            'train_gflop_per_image': step_flops / config.batch_size / 1e9,
            'skipped_steps': scalar(state.skipped_steps),
            'history': history,
        }
        results = finish(
            _Fitted(config, dataset, workdir, training, state, saved, predict, shown, results)
        )
    except (FloatingPointError, interruption.Interrupted):
        # All processes come here, and none may leave while process 0 still writes.
        saved.wait()
        raise
    finally:
        try:
            saved.close()
        finally:
            shown.close()
    say(evaluate.summary_table(results))
    say(f'Everything is in {workdir}')
    return results


def _finished(dataset: datasets.Dataset, workdir: pathlib.Path, is_tested: bool) -> dict | None:
    """The results of a run that is done, which are shown; None where it is not."""
    say = functools.partial(progress.say, dataset.name)
    path = workdir / 'results.json'
    results = cluster.from_main(lambda: run_directory.read_json(path) if path.exists() else None)
    if results is None:
        return None
    was_tested = 'test_accuracy' in results
    if was_tested != is_tested:
        kinds = {True: 'tested', False: 'scored on validation images and not tested'}
        raise BadInput(
            f'the workdir {workdir} holds a finished run that was {kinds[was_tested]}; this one is '
            f'to be {kinds[is_tested]}: give it another --workdir=DIR.'
        )
    if is_tested:
        images = datasets.fingerprint(dataset.test)
        cluster.from_main(lambda: run_directory.check_tested(workdir, images))
    say(f'This run is finished, and nothing of it is done again. It is in {workdir}')
    history = workdir / 'history.csv'
    cluster.from_main(
        lambda: history.exists() or run_directory.write_history(history, results['history'])
    )
    say(evaluate.summary_table(results))
    return results


def _tell(workdir: pathlib.Path, history: list[dict], shown: progress.Progress) -> None:
    """Writes the history and shows its last row, all of it before there is a checkpoint of it."""
    run_directory.write_history(workdir / 'history.csv', history)
    shown.epoch_done(history[-1])
    shown.flush()


def _row(
    dataset: datasets.Dataset,
    epoch: int,
    step: int,
    state: TrainState,
    metrics: dict,
    seconds: float,
    predict: Callable,
) -> dict:
    """The row of the history of an epoch that has ended, validated where there are images for it.

    Args:
      dataset, predict: of the run.
      epoch, step: how many are done.
      state, metrics: replicated, those of the last step.
      seconds: that the steps of the epoch took.
    """
    counted = scalar(state.epoch_sums['steps'])
    row = {
        'dataset': dataset.name,
        'epoch': epoch,
        'step': step,
        'train_loss': scalar(state.epoch_sums['loss']) / counted,
        'train_accuracy': scalar(state.epoch_sums['accuracy']) / counted,
        'validation_loss': None,
        'validation_accuracy': None,
        'learning_rate': scalar(metrics['learning_rate']),
        'seconds': seconds,
    }
    if dataset.validation is not None:
        log_probabilities = predict(state, dataset.validation)
        labels = dataset.validation.labels
        row['validation_loss'] = evaluate.negative_log_likelihood(labels, log_probabilities)
        row['validation_accuracy'] = evaluate.accuracy(labels, log_probabilities)
        raise_if_not_finite(row)
    return row


def _save_and_stop(
    saved: Checkpoints,
    state: TrainState,
    history: list[dict],
    scalars: list,
    seconds: float,
) -> NoReturn:
    """Saves a replicated state in the middle of an epoch, and raises `Interrupted`."""
    step = scalar(state.step)
    if not step:
        raise interruption.Interrupted('Asked to stop, this run has not done a step.')
    # Between epochs there may be a checkpoint of this very step.
    if step not in saved.steps():
        saved.save(cluster.first_replica(state), history, scalars, seconds)
    raise interruption.Interrupted(f'Asked to stop, this run has saved step {step:,}.')


_Fitted = collections.namedtuple(
    '_Fitted', 'config dataset workdir training state saved predict shown results'
)
_Fitted.__doc__ = """A training that is done but for its report; `state` is the last, replicated."""


def _test(fitted: _Fitted) -> dict:
    """The final test, the only time that a training reads the test split, and the report."""
    config, dataset, workdir, training, state, saved, predict, shown, results = fitted
    history = results['history']
    tested = history[-1]
    if config.test_state == 'best':
        tested = saved.best(history)
        state = saved.restore(training.state, tested['step']).state
        state = cluster.replicate(state)
    log_probabilities, inference_seconds = prediction.timed(predict, state, dataset.test)
    results = {
        **results,
        'tested_epoch': tested['epoch'],
        'tested_step': tested['step'],
        'validation_accuracy': tested['validation_accuracy'],
        'inference_seconds': inference_seconds,
    }
    if config.flip_averaging:
        mirrored = predict(state, prediction.mirrored(dataset.test))
        labels = dataset.test.labels
        results |= evaluate.flip_averaged(log_probabilities, mirrored, labels)
    variables = cluster.first_replica(state.evaluated)
    learnt = evaluate.learnt_kernel(
        config, dataset, training.model, variables, training.state.params
    )
    return cluster.from_main(
        lambda: evaluate.write_report(
            workdir,
            results,
            log_probabilities,
            dataset.test.labels,
            dataset.class_names,
            learnt,
            show=functools.partial(shown.tested, tested['step']),
        )
    )


def _score(fitted: _Fitted) -> dict:
    """The report of the last epoch on the validation split."""
    validation, last = fitted.dataset.validation, fitted.results['history'][-1]
    log_probabilities = fitted.predict(fitted.state, validation).astype(np.float32)
    results = {
        **fitted.results,
        'validation_accuracy': last['validation_accuracy'],
        'validation_loss': last['validation_loss'],
    }

    def write() -> dict:
        run_directory.write_arrays(
            fitted.workdir / 'validation_predictions.npz',
            {'labels': validation.labels, 'log_probabilities': log_probabilities},
        )
        # Last, since results.json marks a run as finished.
        run_directory.write_json(fitted.workdir / 'results.json', results)
        return results

    return cluster.from_main(write)


def _description(training: Training, dataset: datasets.Dataset, workdir: pathlib.Path) -> str:
    """What is going to be trained, on what, where to: lines for the start of a run."""
    from clu import parameter_overview  # Imports TensorFlow, which takes seconds.

    parts = {
        'training': dataset.train, 'validation': dataset.validation, 'test': dataset.test
    }  # fmt: skip
    sizes = [f'{len(split):,} {name}' for name, split in parts.items() if split is not None]
    tokens = vit.num_tokens(training.model, dataset.image_shape)
    table = parameter_overview.get_parameter_overview(training.state.params, include_stats=False)
    return (
        f'Data: {", ".join(sizes)} images of {dataset.name}\n'
        f'Model: {training.num_params:,} parameters, {tokens} tokens an image\n'
        f'{table}\n'
        f'Workdir: {workdir}'
    )
