"""From predictions to numbers: metrics, the final report, the summary table, `--mode=evaluate`.

The metrics are NumPy and scikit-learn on predictions that a model has already made. Losses are in
nats, accuracies are fractions from 0 to 1; only printed text turns them into percent. Of the
model's weights the report looks at fθ's alone, to say which kernel it has learnt.
"""

import collections
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import jax_utils

from performer_vit import (
    checkpoints,
    datasets,
    environment,
    favor,
    fields,
    figures,
    optimizers,
    predict,
    progress,
    vit,
)
from performer_vit import workdir as run_directory
from performer_vit.errors import BadInput

CALIBRATION_BINS = 15

# Of the learnt kernel: degrees, images that give the norms, and planes over which it is a mean:
# enough that untrained ReLU features, in a figure, lie on the arc-cosine kernel.
PROFILE_ANGLES = np.linspace(0, 180, 37)
PROFILE_IMAGES = 128
PROFILE_PLANES = 2048


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts how often each class was taken for each other: `[i, j]` of true class i, predicted j.

    Args:
        labels: true classes, (n,) integers in 0..K-1.
        predictions: predicted classes, (n,) integers in 0..K-1.
        num_classes: K.

    Returns:
        (K, K) int64; rows are true classes, columns predictions, the sum is n.

    Raises:
        BadInput: if the shapes differ, or a class lies outside 0..K-1.
    """
    labels = _classes('labels', labels, num_classes)
    predictions = _classes('predictions', predictions, num_classes)
    if labels.shape != predictions.shape:
        raise BadInput(
            f'labels have shape {labels.shape} and predictions {predictions.shape}; they must be '
            'equal. Pass one prediction an image.'
        )
    counts = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def per_class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """The share of each true class that was recognised (its recall).

    Args:
        confusion: (K, K) counts, rows true, as `confusion_matrix` returns.

    Returns:
        (K,) float64 in 0..1, NaN for a class without images.
    """
    images = confusion.sum(axis=1)
    return np.where(images > 0, confusion.diagonal() / np.maximum(images, 1), np.nan)


def accuracy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The share of images whose most probable class is the true one.

    Args:
        labels: true classes, (n,) integers in 0..K-1.
        probabilities: (n, K), or anything that orders the classes alike, such as their logarithms.
            Of equal ones the first wins.

    Returns:
        A fraction, 0..1.

    Raises:
        BadInput: if the shapes do not fit, or a label lies outside 0..K-1.
    """
    labels, probabilities = _pair(labels, probabilities)
    return float(np.mean(probabilities.argmax(axis=1) == labels))


def negative_log_likelihood(labels: np.ndarray, log_probabilities: np.ndarray) -> float:
    """The mean of -log p(true class) over the images, in nats: the cross-entropy loss.

    Args:
        labels: true classes, (n,) integers in 0..K-1.
        log_probabilities: natural logarithms, (n, K).

    Returns:
        Nats an image; summed in float64 whatever the input's type.

    Raises:
        BadInput: if the shapes do not fit, or a label lies outside 0..K-1.
    """
    labels, log_probabilities = _pair(labels, log_probabilities)
    chosen = log_probabilities[np.arange(labels.size), labels]
    return float(-chosen.mean(dtype=np.float64))


def top_k_accuracy(labels: np.ndarray, probabilities: np.ndarray, k: int) -> float:
    """The share of images whose true class is among the k most probable ones.

    Args:
        labels: true classes, (n,) integers in 0..K-1.
        probabilities: (n, K), or anything that orders the classes alike. Of equal ones the first
            wins, as in `accuracy`, which is this with k = 1.
        k: how many guesses each image has, at least 1.

    Returns:
        A fraction, 0..1.

    Raises:
        BadInput: if the shapes do not fit, or a label lies outside 0..K-1.
    """
    labels, probabilities = _pair(labels, probabilities)
    best = np.argsort(-probabilities, axis=1, kind='stable')[:, :k]
    return float(np.mean((best == labels[:, None]).any(axis=1)))


def expected_calibration_error(labels: np.ndarray, log_probabilities: np.ndarray) -> float:
    """How far confidence is from accuracy, on average.

    The confidence of an image is its highest probability. The images are put in 15 bins of equal
    width, bin b holding the confidences in ((b-1)/15, b/15], and

        ECE = sum_b |B_b| / n * |accuracy(B_b) - mean confidence(B_b)|

    (Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599, eq. 3).

    Args:
        labels: true classes, (n,) integers in 0..K-1.
        log_probabilities: natural logarithms, (n, K).

    Returns:
        A fraction, 0 (calibrated) to 1.

    Raises:
        BadInput: if the shapes do not fit, or a label lies outside 0..K-1.
    """
    labels, log_probabilities = _pair(labels, log_probabilities)
    confidence = np.exp(log_probabilities.max(axis=1).astype(np.float64))
    right = log_probabilities.argmax(axis=1) == labels
    # Rounding can leave exp(log p) a hair above 1, which belongs to the last bin.
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    # |B_b| cancels: what remains a bin is the sum of (right - confidence).
    gaps = np.bincount(bins, weights=right - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / labels.size)


def report(labels: np.ndarray, log_probabilities: np.ndarray, class_names: Sequence[str]) -> dict:
    """Everything that is said about a model's predictions, ready for JSON.

    Args:
        labels: true classes, (n,) integers in 0..K-1.
        log_probabilities: natural logarithms that sum to 1 as probabilities, (n, K) float32.
        class_names: the K names, all different.

    Returns:
        A dict of plain Python values:
        `num_images` (n), `accuracy`, `loss` (mean negative log-likelihood, nats),
        `top5_accuracy` (only where K > 5, since below that it is always 1),
        `expected_calibration_error` (15 bins), `per_class` (name -> accuracy, None for a class
        without images), `confusion` (K lists of K counts, rows true), and scikit-learn's
        `classification_report` (dict) and `classification_report_text`.

    Raises:
        BadInput: if shapes, labels or names do not fit together, or if the log-probabilities are
            not finite or not normalised (logits, say).
    """
    # Takes seconds, which a training need not wait for: only its end reports.
    from sklearn.metrics import classification_report

    labels, log_probabilities = _pair(labels, log_probabilities)
    num_classes = log_probabilities.shape[1]
    names = [str(name) for name in class_names]
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise BadInput(
            f'class_names has {len(names)} names, {len(set(names))} of them different; the '
            f'log_probabilities have {num_classes} columns. Give one name of its own to each class.'
        )
    _check_normalised(log_probabilities)

    predictions = log_probabilities.argmax(axis=1)
    confusion = confusion_matrix(labels, predictions, num_classes)
    scikit_learn = {
        'labels': np.arange(num_classes),
        'target_names': names,
        'digits': 4,
        # A class that was never predicted has precision 0 here, without a warning.
        'zero_division': 0,
    }
    result = {
        'num_images': int(labels.size),
        'accuracy': accuracy(labels, log_probabilities),
        'loss': negative_log_likelihood(labels, log_probabilities),
        'expected_calibration_error': expected_calibration_error(labels, log_probabilities),
        'per_class': dict(zip(names, per_class_accuracy(confusion), strict=True)),
        'confusion': confusion,
        'classification_report': classification_report(
            labels, predictions, output_dict=True, **scikit_learn
        ),
        'classification_report_text': classification_report(labels, predictions, **scikit_learn),
    }
    if num_classes > 5:
        result['top5_accuracy'] = top_k_accuracy(labels, log_probabilities, 5)
    return plain(result)


def summary_table(results: dict) -> str:
    """The table that closes a run: the fields of results.json as two aligned columns.

    Args:
        results: the content of results.json. A field that is missing or None reads '-': nothing
            stands in the table that was not measured.

    Returns:
        Lines of text with units, thousands separators and percent with two decimals; no newline
        at the end.
    """
    kernel = results.get('kernel')
    rows = [
        ('data set', results.get('dataset')),
        ('model', None if kernel is None else figures.model_name(kernel)),
        ('kernel', kernel),
        ('random features', _count(results.get('num_features'))),
        ('projection', results.get('projection')),
        ('parameters', _count(results.get('num_params'))),
        ('tokens', _count(results.get('num_tokens'))),
        ('epochs', _count(results.get('epochs'))),
        ('tested epoch', _count(results.get('tested_epoch'))),
        ('training', _seconds(results.get('train_seconds_per_epoch'), ' s/epoch (median)')),
        ('compilation', _seconds(results.get('compile_seconds'))),
        ('inference', _seconds(results.get('inference_seconds'), ' s (whole test split, warm)')),
        ('throughput', _format(results.get('images_per_second'), '{:,.1f} images/s (training)')),
        ('validation accuracy', _percent(results.get('validation_accuracy'))),
        ('test accuracy', _percent(results.get('test_accuracy'))),
        ('test loss', _format(results.get('test_loss'), '{:.4f} nats')),
        ('seed', results.get('seed')),
        ('device', results.get('device')),
        *(results.get('versions') or {}).items(),
    ]
    if 'flip_averaged_test_accuracy' in results:
        accuracy = _percent(results['flip_averaged_test_accuracy'])
        rows.append(('test accuracy, averaged with mirror images', accuracy))
    width = max(len(name) for name, _ in rows)
    return '\n'.join(f'{name:<{width}}  {"-" if value is None else value}' for name, value in rows)


def write_report(
    workdir: str | os.PathLike,
    results: dict,
    log_probabilities: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    learnt: Mapping[str, np.ndarray] | None = None,
    show: Callable[[float, float, dict[str, np.ndarray]], None] | None = None,
) -> dict:
    """Writes all that is known about a finished run into its workdir.

    The files: `classification_report.txt`, `test_predictions.npz` (`labels` (n,) int32 and
    `log_probabilities` (n, K) float32), `learnt_kernel.npz` where a kernel was learnt,
    `figures/*.png` (with learning curves if `history.csv` is there), and last `results.json`. Each
    file appears whole or not at all.

    Args:
        workdir: the run's directory; made if it does not exist.
        results: what is known of the run; `kernel` and `dataset` are needed, for the titles.
        log_probabilities: natural logarithms of the test split's predictions, (n, K).
        labels: its true classes, (n,).
        class_names: the K names.
        learnt: what `learnt_kernel` returns.
        show: gets, before results.json is written, the loss (nats), the accuracy, and for
            TensorBoard (height, 800, 3) uint8 images by name: `test/confusion_matrix`.

    Returns:
        The content of results.json, which is `results` with the predictions' own `test_accuracy`,
        `test_loss` (nats) and `class_names`.

    Raises:
        BadInput: as `report`, or if the kernel is unknown, before anything is written.
    """
    made = report(labels, log_probabilities, class_names)
    results = {
        **plain(results),
        'test_accuracy': made['accuracy'],
        'test_loss': made['loss'],
        'class_names': list(made['per_class']),
    }
    lines = [
        f'{figures.run_title(results)}: {made["num_images"]:,} test images',
        '',
        f'accuracy                    {_percent(made["accuracy"])}',
        f'top-5 accuracy              {_percent(made["top5_accuracy"])}'
        if 'top5_accuracy' in made
        else None,
        f'loss                        {made["loss"]:.4f} nats',
        f'expected calibration error  {_percent(made["expected_calibration_error"])}',
        '',
        made['classification_report_text'].rstrip('\n'),
    ]
    text = '\n'.join(line for line in lines if line is not None) + '\n'
    predictions = {
        'labels': np.asarray(labels, np.int32),
        'log_probabilities': np.asarray(log_probabilities, np.float32),
    }

    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    history = figures.read_history(workdir)  # Before anything is overwritten: it may be damaged.
    run_directory.write_text(workdir / 'classification_report.txt', text)
    run_directory.write_arrays(workdir / 'test_predictions.npz', predictions)
    if learnt is not None:
        run_directory.write_arrays(workdir / 'learnt_kernel.npz', learnt)
    drawn = figures.draw(
        results, history, np.asarray(log_probabilities), np.asarray(labels), learnt
    )
    figures.save_all(drawn, workdir)
    if show is not None:
        images = {'test/confusion_matrix': figures.to_array(drawn['confusion_matrix'])}
        show(results['test_loss'], results['test_accuracy'], images)
    # Last, since results.json marks a run as finished: a run that was killed above reports again.
    run_directory.write_json(workdir / 'results.json', results)
    return results


def describe(config, dataset: datasets.Dataset, model, num_params: int) -> dict:
    """What results.json says of a run before anything is measured.

    Fields of the config that the kernel does not use are None: they describe nothing.

    Args:
        config: the config of the run.
        dataset: what was really read.
        model: its `vit.VisionTransformer`.
        num_params: trained parameters of the model.
    """
    attention = config.model.attention
    featureless = ('exact', *vit.NO_ATTENTION)
    # fθ has a projection where its first weights are made of one.
    random = attention.kernel in favor.LEARNT_KERNELS and attention.theta_init == 'lecun'
    projected = not random and attention.kernel not in featureless
    return {
        'config': config.to_dict(),
        'dataset': dataset.name,
        'kernel': attention.kernel,
        'num_features': None if attention.kernel in featureless else attention.num_features,
        'projection': attention.projection if projected else None,
        'num_params': num_params,
        'num_tokens': vit.num_tokens(model, dataset.image_shape),
        'train_images': len(dataset.train),
        'batch_size': config.batch_size,
        'seed': config.seed,
        'device': environment.device(),
        'versions': environment.versions(),
    }


def learnt_kernel(
    config, dataset: datasets.Dataset, model: vit.VisionTransformer, variables: Any, initial: Any
) -> dict[str, np.ndarray] | None:
    """The kernel that fθ has learnt in each block, beside the one that it started from.

    K(α) / K(0) for queries and keys at the angle α, a mean over planes of all directions; see
    `favor.learnt_profiles`. ‖q'‖ and ‖k'‖ are the root mean squares over the heads and tokens of
    some images: the map is not homogeneous, so its shape depends on them, and there it is used.
    One pair serves all curves of a block, so that they differ in their maps alone. The images are
    the first of the validation split, because the weights have not seen them and the test split is
    for the test; of the training split where there is no other.

    Args:
        config: the config of the run.
        dataset: its data.
        model: its model, of L blocks.
        variables: the trained model's, as `TrainState.evaluated` has them.
        initial: the weights (`params`) that it started from.

    Returns:
        Arrays by name, float32, for G heads with maps of their own, or G = 1: `angles` (t,) in
        degrees; `query_norm` and `key_norm` (L,), ‖q'‖ and ‖k'‖; `learnt` and `initial` (L, G, t),
        K(α) / K(0), and `learnt_deviation` and `initial_deviation` (L, G, t), the standard
        deviation of K(α) over the planes in the same unit, 0 for a kernel that knows only the
        angle; `arc_cosine` (t,), the kernel of ReLU features in the limit of many, (sin α + (π - α)
        cos α) / π (Cho and Saul 2009, "Kernel Methods for Deep Learning"); `softmax` (L, t),
        exp(‖q'‖ ‖k'‖ (cos α - 1)).

        None for a kernel that is not learnt, and where there are no angles: in one dimension, or
        where queries or keys of a block have no length, or none that is finite.
    """
    attention = config.model.attention
    head_dim = model.width // model.num_heads
    if attention.kernel not in favor.LEARNT_KERNELS or head_dim < 2:
        return None
    temperature = attention.get('temperature') or math.sqrt(head_dim)
    norms = _query_and_key_norms(model, variables, dataset) / math.sqrt(temperature)
    if not np.all(np.isfinite(norms) & (norms > 0)):
        return None

    angles = np.deg2rad(PROFILE_ANGLES)
    arrays = {
        'angles': PROFILE_ANGLES,
        'query_norm': norms[:, 0],
        'key_norm': norms[:, 1],
        'arc_cosine': (np.sin(angles) + (np.pi - angles) * np.cos(angles)) / np.pi,
        'softmax': np.exp(norms.prod(axis=1, keepdims=True) * (np.cos(angles) - 1)),
    }
    for name, weights in (('learnt', variables['params']), ('initial', initial)):
        profiles = [
            favor.learnt_profiles(
                attention.kernel,
                weights[f'encoder_{block}']['self_attention']['attention']['theta'],
                *norms[block],
                angles,
                jax.random.key(0),
                num_planes=PROFILE_PLANES,
            )
            for block in range(model.depth)
        ]
        mean, deviation = (np.stack(values) for values in zip(*profiles, strict=True))
        arrays[name] = mean / mean[..., :1]
        arrays[f'{name}_deviation'] = deviation / mean[..., :1]
    return {name: values.astype(np.float32) for name, values in arrays.items()}


def _query_and_key_norms(
    model: vit.VisionTransformer, variables: Any, dataset: datasets.Dataset
) -> np.ndarray:
    """The root mean squares of ‖q‖ and ‖k‖ in each block, (L, 2) float32."""

    def root_mean_square(x):
        return jnp.sqrt(jnp.mean(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)))

    attention = predict.make_attention(model, dataset)

    @jax.jit
    def norms(variables, images):
        # The attention maps that come besides are not returned, so XLA leaves them out.
        _, blocks = attention(variables, images)
        return jnp.array([
            [root_mean_square(block[side]) for side in ('query', 'key')] for block in blocks
        ])  # fmt: skip

    return np.asarray(norms(variables, shown_split(dataset).images[:PROFILE_IMAGES]))


def shown_split(dataset: datasets.Dataset) -> datasets.Split:
    """The split that a trained model is looked at with: the validation split, or the training one.

    The weights have not seen the former, and the test split is for the test; the latter is for data
    sets without a validation split.
    """
    return dataset.train if dataset.validation is None else dataset.validation


def flip_averaged(
    log_probabilities: np.ndarray, mirrored: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Accuracy and loss where an image's probabilities are the mean of its own and its mirror's.

    Args:
        log_probabilities: (n, K), natural logarithm.
        mirrored: (n, K), of the mirror images.
        labels: (n,) integers.
    """
    averaged = np.logaddexp(log_probabilities, mirrored) - math.log(2)
    return {
        'flip_averaged_test_accuracy': accuracy(labels, averaged),
        'flip_averaged_test_loss': negative_log_likelihood(labels, averaged),
    }


Finished = collections.namedtuple('Finished', 'config results dataset model state initial')
Finished.__doc__ = """A finished run, as `restore_run` brings it back.

Attributes:
    config: the run's, with the data set that it really read.
    results: the content of results.json.
    dataset: its data.
    model: its `vit.VisionTransformer`.
    state: the `checkpoints.TrainState` that the run had tested.
    initial: the weights (`params`) that it started from.
"""


def restore_run(workdir: str | os.PathLike) -> Finished:
    """Brings back a finished run: its config, data and model, and the state that was tested.

    Args:
        workdir: of a run that `train.train` finished.

    Raises:
        BadInput: the workdir cannot be written or holds no finished run, or one that was not
            tested, or its data set or checkpoint is not there.
    """
    workdir = Path(workdir).absolute()
    run_directory.check_writable(workdir)
    config = run_directory.read_config(workdir)
    fields.check(run_directory.flatten(config.to_dict()))
    if not run_directory.is_finished(workdir):
        raise BadInput(
            f'{workdir}/results.json does not exist: the run there is not finished. Give the '
            'command that started it once more, or the --workdir of a finished run.'
        )
    results = run_directory.read_json(workdir / 'results.json')
    if 'tested_step' not in results:
        raise BadInput(
            f'{workdir}/results.json has no tested state: it is that of a fold, a trial or an '
            'ablation, which validation images score, or damaged. Give the --workdir of a run of '
            '--mode=train; those of a comparison are in VARIANT/seed_S.'
        )
    dataset = datasets.load(**config.dataset)
    lines = run_directory.other_data(workdir, datasets.fingerprints(dataset))
    if lines is None:
        progress.say(dataset.name, 'Whether these were the data of the training is not on record.')
    elif lines:
        progress.say(
            dataset.name, '\n'.join(['These are other data than those of the training:', *lines])
        )
    model = vit.from_config(config.model, dataset.num_classes, config.seed)
    tx = optimizers.create(config.optimizer, lambda step: 0.0)
    template = checkpoints.create_state(
        model, tx, dataset.image_shape, config.seed, ema=config.ema_decay > 0
    )
    saved = checkpoints.Checkpoints(workdir / 'checkpoints', **config.checkpoint)
    step = results['tested_step']
    if step not in saved.steps():
        raise BadInput(
            f'{workdir} has no checkpoint of step {step}, which the run had tested: restore it, or '
            'train again in another --workdir.'
        )
    state = saved.restore(template, step).state
    saved.close()
    return Finished(config, results, dataset, model, state, template.params)


def evaluate_run(workdir: str | os.PathLike) -> dict:
    """Tests the checkpoint of a finished run again, and writes its report and figures anew.

    What training measured stays as it is in results.json, and so do the machine and the versions
    that belong to it. The test's accuracy, loss and time are those of this evaluation, and so are
    `evaluation_device`, `evaluation_versions` and `evaluation_images`, the number and digest of
    the test's, which may be others than when the run was trained: then that is said.

    Args:
        workdir: of a run that `train.train` finished.

    Returns:
        The content of results.json.

    Raises:
        BadInput: as `restore_run`.
    """
    config, results, dataset, model, state, initial = restore_run(workdir)
    learnt = learnt_kernel(config, dataset, model, state.evaluated, initial)
    state = jax_utils.replicate(state, axis_name='batch')
    # The run may have had another number of devices; here, a batch is filled up for them.
    devices = jax.device_count()
    batch_size = math.ceil(config.batch_size / devices) * devices
    forward = predict.compile_forward(model, dataset, state, batch_size)
    log_probabilities, seconds = predict.timed(forward, state, dataset.test)
    if config.flip_averaging:
        mirrored = forward(state, predict.mirrored(dataset.test))
        results.update(flip_averaged(log_probabilities, mirrored, dataset.test.labels))
    results.update(
        inference_seconds=seconds,
        evaluation_device=environment.device(),
        evaluation_versions=environment.versions(),
        evaluation_images=datasets.fingerprint(dataset.test),
    )
    results = write_report(
        workdir, results, log_probabilities, dataset.test.labels, dataset.class_names, learnt
    )
    progress.say(dataset.name, summary_table(results))
    return results


def plain(value):
    """`value` in the types that JSON knows."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _classes(what: str, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """`classes` as a checked (n,) int64 array."""
    classes = np.asarray(classes)
    if classes.ndim != 1 or classes.size == 0 or not np.issubdtype(classes.dtype, np.integer):
        raise BadInput(
            f'{what} have shape {classes.shape} and type {classes.dtype}; allowed is a vector of '
            'integers, not empty. Pass the number of the class of each image.'
        )
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or high >= num_classes:
        raise BadInput(
            f'{what} lie in {low}..{high}; allowed are 0..{num_classes - 1}. '
            'Number the classes from 0 and check that the data and the model have the same ones.'
        )
    return classes.astype(np.int64)


def _pair(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and scores (n, K), checked against one another."""
    scores = np.asarray(scores)
    if scores.ndim != 2 or len(scores) != len(labels):
        raise BadInput(
            f'labels have shape {np.shape(labels)} and the predictions {scores.shape}; allowed are '
            '(n,) and (n, classes). Pass one row of predictions an image.'
        )
    return _classes('labels', labels, scores.shape[1]), scores


def _check_normalised(log_probabilities: np.ndarray) -> None:
    if not np.isfinite(log_probabilities).all():
        bad = int((~np.isfinite(log_probabilities)).any(axis=1).sum())
        raise BadInput(
            f'log_probabilities of {bad:,} of {len(log_probabilities):,} images hold NaN or '
            'infinity; allowed are finite numbers. The model has probably diverged: train it with '
            'a lower learning rate.'
        )
    with np.errstate(over='ignore'):
        sums = np.exp(log_probabilities.astype(np.float64)).sum(axis=1)
    # Wide enough for log-probabilities that were computed in bfloat16.
    if np.abs(sums - 1).max() > 0.05:
        worst = sums[np.abs(sums - 1).argmax()]
        raise BadInput(
            f'the probabilities of an image sum to {worst:.4g}; allowed is 1. Pass the log_softmax '
            'of the logits, not logits or probabilities.'
        )


def _format(value, pattern: str) -> str | None:
    return None if value is None else pattern.format(value)


def _count(value) -> str | None:
    return _format(value, '{:,}')


def _percent(value) -> str | None:
    return None if value is None else f'{100 * value:.2f} %'


def _seconds(value, unit: str = ' s') -> str | None:
    # Two decimals would make a zero of a millisecond.
    return _format(value, ('{:,.2f}' if value is None or value >= 1 else '{:.3g}') + unit)
