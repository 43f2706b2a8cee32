"""Looking into a finished run: where it attends, how far from softmax that is, where it errs.

Attention is looked at on images of the validation split (of the training split where there is no
other). Test images are shown only with the predictions that the final test saved: nothing new is
measured on them. Letters: L blocks, H heads, N tokens (with the class token, where there is one),
h×w the grid of the tokens that are regions of the image, K classes, n images.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr, rel_entr

from performer_vit import datasets, evaluate, favor, figures, predict, progress, vit
from performer_vit import workdir as run_directory
from performer_vit.errors import BadInput

SAMPLE_IMAGES = 10  # whose attention is shown
GAP_IMAGES = 128  # over which the gap to softmax attention is a mean, see `num_gap_images`
FEWEST_GAP_IMAGES = 16
GAP_ENTRIES = 2**29  # of their maps, a minute or two of two CPU cores
MISCLASSIFIED = 20  # test images shown
CONFUSED_PAIRS = 12
# Regions of an image. A map has N² entries a head, and one image's maps of all blocks are held at
# once: with 1,024 tokens, 8 blocks and 8 heads some 270 MB, and as much for softmax's.
MOST_TOKENS = 1024


def received_attention(attention: jax.Array) -> jax.Array:
    """How much attention each token gets, in multiples of what it gets from uniform attention.

        r_m = Σ_n A_nm

    which is the mean over the queries n, A_nm averaged, times N.

    Args:
        attention: A [..., N, N], rows (queries) summing to 1.

    Returns:
        [..., N], with the mean 1.
    """
    return attention.sum(axis=-2)


def rollout(attention: Sequence[jax.Array], queries: jax.Array) -> jax.Array:
    """Attention rollout: what each of the first block's tokens contributes to the last's.

        queries · Ã_L ⋯ Ã_1,   Ã = (mean over the heads of A + I) / 2

    (Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", arXiv 2005.00928). I is
    the residual connection. Rows of A sum to 1, and so do those of Ã. It sees attention and
    residuals alone: MLPs, values and norms have no part in it.

    Args:
        attention: A of each block, from the first to the last, [H, N, N] each.
        queries: [N], weights of the last block's tokens that sum to 1, such as 1/N, or 1 for the
            class token.

    Returns:
        [N], which sums to 1.
    """
    weights = queries
    for heads in reversed(attention):
        weights = (weights @ heads.mean(axis=0) + weights) / 2
    return weights


def total_variation(p: jax.Array, q: jax.Array) -> jax.Array:
    """½ Σ_m |p_m - q_m| of distributions [..., M]: 0 of equal ones, 1 of those without overlap."""
    return jnp.abs(p - q).sum(axis=-1) / 2


def kl_divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """Σ_m p_m log(p_m / q_m) of distributions [..., M], in nats.

    A q_m below 1.2e-38, float32's smallest, counts as that: the divergence stays finite.
    """
    return rel_entr(p, jnp.maximum(q, jnp.finfo(jnp.float32).tiny)).sum(axis=-1)


def entropy(p: jax.Array) -> jax.Array:
    """-Σ_m p_m log p_m of distributions [..., M], in nats: log M where p is uniform."""
    return entr(p).sum(axis=-1)


def correlation(p: jax.Array, q: jax.Array) -> jax.Array:
    """Pearson's correlation of the entries of matrices [..., N, M], NaN where one is constant."""
    p, q = (x - x.mean(axis=(-2, -1), keepdims=True) for x in (p, q))
    covariance, *variances = ((x * y).sum(axis=(-2, -1)) for x, y in ((p, q), (p, p), (q, q)))
    return covariance / jnp.sqrt(variances[0] * variances[1])


def gap(implied: jax.Array, exact: jax.Array) -> dict[str, jax.Array]:
    """How far implied attention is from softmax attention on the same queries and keys.

    Args:
        implied: [..., N, N], what a Performer's features imply; not negative, rows summing to 1.
        exact: [..., N, N], softmax attention.

    Returns:
        By name, [...] each: means over the rows of the `total_variation` distance, of the
        `kl_divergence`, Σ exact log(exact / implied), and of `entropy` and `exact_entropy`; the
        `correlation` of the entries; and, to measure these by, `uniform_total_variation` and
        `uniform_kl_divergence`, those of attention that is 1/N everywhere.
    """
    uniform = jnp.full_like(exact, 1 / exact.shape[-1])
    rows = {
        'total_variation': total_variation(implied, exact),
        'kl_divergence': kl_divergence(exact, implied),
        'entropy': entropy(implied),
        'exact_entropy': entropy(exact),
        'uniform_total_variation': total_variation(uniform, exact),
        'uniform_kl_divergence': kl_divergence(exact, uniform),
    }
    means = {name: values.mean(axis=-1) for name, values in rows.items()}
    return means | {'correlation': correlation(implied, exact)}


def one_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """The first image of each class, then the second of each, and so on: `count` indices at most.

    Args:
        labels: (n,) integers.
        count: how many images.
    """
    by_class = np.argsort(labels, kind='stable')
    ordered = labels[by_class]
    turn = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return by_class[np.lexsort((ordered, turn))][:count]


def num_gap_images(num_entries: int) -> int:
    """How many images the gap is a mean over: fewer where their maps are large.

    Args:
        num_entries: of an image's maps, L·H·N².
    """
    return min(GAP_IMAGES, max(FEWEST_GAP_IMAGES, GAP_ENTRIES // num_entries))


def confident_errors(labels: np.ndarray, log_probabilities: np.ndarray) -> np.ndarray:
    """The images whose likeliest class is not the true one, the most confident first: indices."""
    wrong = np.flatnonzero(log_probabilities.argmax(axis=1) != labels)
    return wrong[np.argsort(-log_probabilities[wrong].max(axis=1), kind='stable')]


def confused_pairs(confusion: np.ndarray) -> list[tuple[int, int]]:
    """The pairs (true class, predicted class) that were confused, the most frequent first.

    Args:
        confusion: (K, K) counts, rows true, as `evaluate.confusion_matrix` returns.
    """
    off = confusion - np.diag(confusion.diagonal())
    order = np.argsort(-off, axis=None, kind='stable')[: np.count_nonzero(off)]
    return [divmod(int(index), len(off)) for index in order]


def read_tested(
    workdir: str | os.PathLike, dataset: datasets.Dataset
) -> tuple[np.ndarray, np.ndarray]:
    """The labels (n,) and log-probabilities (n, K) that the final test of a run saved.

    Args:
        workdir: of the run.
        dataset: its data.

    Raises:
        BadInput: the predictions are missing, cannot be read, are no log-probabilities, or are not
            of the data set's test split.
    """
    run_directory.check_tested(workdir, datasets.fingerprint(dataset.test))
    labels, log_probabilities = figures.read_predictions(workdir)
    if not np.array_equal(labels, dataset.test.labels):
        raise BadInput(
            f'{Path(workdir) / "test_predictions.npz"} holds predictions for {labels.size:,} '
            f'images that are not the {len(dataset.test):,} test images of {dataset.name}: write '
            'them again with --mode=evaluate.'
        )
    evaluate.report(labels, log_probabilities, dataset.class_names)  # Refuses what is not right.
    return labels, log_probabilities


def left_out(config, num_tokens: int) -> dict[str, str]:
    """Why figures of attention are not there, by their names; none for a Performer.

    Args:
        config: the config of the run.
        num_tokens: regions of an image.
    """
    kernel = config.model.attention.kernel
    every = ('attention', 'rollout', 'attention_gap')
    if kernel == 'none':
        return dict.fromkeys(every, "kernel 'none' has no attention to look at")
    if kernel == 'mean':
        return dict.fromkeys(every, "kernel 'mean' attends to every token alike, in every image")
    if kernel in favor.SIGNED_KERNELS:
        reason = f'kernel {kernel!r} has features of both signs, so its weights are no shares'
        return dict.fromkeys(every, reason)
    if num_tokens > MOST_TOKENS:
        reason = (
            f'{num_tokens:,} tokens make maps of {num_tokens**2:,} entries a head; looked at are '
            f'up to {MOST_TOKENS:,} tokens'
        )
        return dict.fromkeys(every, reason)
    if kernel == 'exact':
        return {'attention_gap': 'attention is softmax attention itself: the gap is 0'}
    return {}


def inspect_run(workdir: str | os.PathLike) -> dict:
    """Looks into a finished run, and writes what is seen into its workdir.

    The files: `inspection.json`; `inspection.npz`, the arrays that figures need; and
    `figures/inspect/*.png`, which `figures.inspection_figures` draws from these two and from
    `learnt_kernel.npz`. What cannot be there is named with the reason, in the file and in the
    printed summary.

    Args:
        workdir: of a run that `train.train` finished.

    Returns:
        The content of inspection.json: `kernel`, `dataset`, `class_names`; `tested_step`, the
        checkpoint looked at; `num_tokens`; `attention` (`split`, and `images`, the indices of the
        images shown), `gap` (`images`, their number, `uniform_entropy` in nats, and `heads`, a
        list of dicts with `block` and `head`, both from 1, and `mean` and `std`, of the sample,
        over the images of what `gap` returns), each None where it is left out;
        `test_images` and `test_errors`, numbers; `misclassified`, the most confident errors
        (`index` into the test split, `true` and `predicted` class, `probability`);
        `confused_pairs`, the most frequent ones (`true`, `predicted`, `count`, and `share` of the
        true class's images); and `left_out`, reasons by the figure's name.

    Raises:
        BadInput: as `evaluate.restore_run` and `read_tested`, before anything is written.
    """
    workdir = Path(workdir).absolute()
    run = evaluate.restore_run(workdir)
    config, dataset, model = run.config, run.dataset, run.model
    kernel = config.model.attention.kernel
    labels, log_probabilities = read_tested(workdir, dataset)
    num_tokens = vit.num_tokens(model, dataset.image_shape)
    absent = left_out(config, num_tokens)

    numbers: dict[str, Any] = {
        'kernel': kernel,
        'dataset': dataset.name,
        'class_names': list(dataset.class_names),
        'tested_step': run.results['tested_step'],
        'num_tokens': num_tokens,
        'attention': None,
        'gap': None,
    }
    arrays = {}
    if 'attention' not in absent:
        attended, attention_arrays = _attention(run, with_gap='attention_gap' not in absent)
        numbers.update(attended)
        arrays.update(attention_arrays)
    wrong, wrong_arrays = _mistakes(dataset, labels, log_probabilities)
    numbers.update(wrong)
    arrays.update(wrong_arrays)
    if not numbers['misclassified']:
        reason = 'the model recognised every test image'
        absent |= dict.fromkeys(('misclassified', 'confused_pairs'), reason)
    if kernel in favor.LEARNT_KERNELS and not (workdir / 'learnt_kernel.npz').is_file():
        absent['learnt_kernel'] = (
            'learnt_kernel.npz is not there; --mode=evaluate writes it where the kernel has a shape'
        )
    numbers = evaluate.plain(numbers | {'left_out': absent})
    run_directory.write_arrays(workdir / 'inspection.npz', arrays)
    run_directory.write_json(workdir / 'inspection.json', numbers)
    figures.draw_inspection(workdir)
    where = f'Figures are in {workdir}/figures/inspect, numbers in {workdir}/inspection.json'
    progress.say(dataset.name, f'{summary(numbers)}\n{where}')
    return numbers


def summary(numbers: Mapping) -> str:
    """What `inspect_run` found as lines of text, without a newline at the end.

    Args:
        numbers: the content of inspection.json.
    """
    title = figures.run_title(numbers)
    lines = [f'{title}: the checkpoint of step {numbers["tested_step"]:,}']
    if numbers['gap'] is not None:
        lines += _gap_table(numbers['gap'])
    errors, images = numbers['test_errors'], numbers['test_images']
    lines += ['', f'{errors:,} of {images:,} test images misclassified ({errors / images:.2%})']
    if numbers['confused_pairs']:
        lines += ['most confused classes, true → predicted:']
    lines += [
        f'  {pair["count"]:>5,}  {pair["share"]:>6.1%} of the true class  '
        f'{pair["true"]} → {pair["predicted"]}'
        for pair in numbers['confused_pairs']
    ]
    for reason in dict.fromkeys(numbers['left_out'].values()):
        names = [name for name, why in numbers['left_out'].items() if why == reason]
        lines += ['', f'Not drawn: {", ".join(names)}, because {reason}.']
    return '\n'.join(lines)


def _gap_table(gap_numbers: Mapping) -> list[str]:
    """The gap of each block and head as aligned columns."""
    columns = {
        'total_variation': 'total variation',
        'kl_divergence': 'KL (nats)',
        'entropy': 'entropy (nats)',
        'exact_entropy': "softmax's",
        'correlation': 'correlation',
    }
    lines = [
        '',
        'gap to softmax attention on the same queries and keys, mean ± standard deviation over '
        f'{gap_numbers["images"]} images',
        f'(entropy of uniform attention: {gap_numbers["uniform_entropy"]:.3f} nats)',
        'block  head' + ''.join(f'  {name:>15}' for name in columns.values()),
    ]
    for row in gap_numbers['heads']:
        cells = [
            '-' if mean is None else f'{mean:.3f} ± ' + ('-' if std is None else f'{std:.3f}')
            for mean, std in ((row['mean'][name], row['std'][name]) for name in columns)
        ]
        lines.append(f'{row["block"]:>5}  {row["head"]:>4}' + ''.join(f'  {c:>15}' for c in cells))
    return lines


def _mistakes(
    dataset: datasets.Dataset, labels: np.ndarray, log_probabilities: np.ndarray
) -> tuple[dict, dict[str, np.ndarray]]:
    """What inspection.json and inspection.npz say of the test's errors."""
    predicted = log_probabilities.argmax(axis=1)
    errors = confident_errors(labels, log_probabilities)
    shown = errors[:MISCLASSIFIED]
    confusion = evaluate.confusion_matrix(labels, predicted, dataset.num_classes)
    names = dataset.class_names
    numbers = {
        'test_images': len(labels),
        'test_errors': len(errors),
        'misclassified': [
            {
                'index': index,
                'true': names[labels[index]],
                'predicted': names[predicted[index]],
                # Rounding can leave exp(log p) a hair above 1.
                'probability': min(1.0, math.exp(log_probabilities[index, predicted[index]])),
            }
            for index in shown.tolist()
        ],
        'confused_pairs': [
            {
                'true': names[true],
                'predicted': names[other],
                'count': confusion[true, other],
                'share': confusion[true, other] / confusion[true].sum(),
            }
            for true, other in confused_pairs(confusion)[:CONFUSED_PAIRS]
        ],
    }
    return numbers, {'misclassified_images': dataset.test.images[shown]}


def _attention(run: evaluate.Finished, with_gap: bool) -> tuple[dict, dict[str, np.ndarray]]:
    """What inspection.json and inspection.npz say of attention."""
    dataset, model = run.dataset, run.model
    split = evaluate.shown_split(dataset)
    grid = tuple(side // model.patch_size for side in dataset.image_shape[:2])
    tokens = math.prod(grid) + (model.pooling == 'cls')
    compared = num_gap_images(model.depth * model.num_heads * tokens**2)
    indices = one_of_each(split.labels, compared if with_gap else SAMPLE_IMAGES)
    look = _make_look(run, with_gap)
    # One after the other: a map has N² entries a head.
    seen = [jax.device_get(look(run.state.evaluated, split.images[i])) for i in indices]
    shown = indices[:SAMPLE_IMAGES]
    probabilities = np.exp([one['log_probabilities'] for one in seen[: len(shown)]])
    arrays = {
        'images': split.images[shown],
        'labels': split.labels[shown],
        'predicted': probabilities.argmax(axis=1).astype(np.int32),
        'probability': probabilities.max(axis=1).astype(np.float32),
    }
    for name in ('received', 'rollout'):
        values = np.stack([one[name] for one in seen[: len(shown)]])
        arrays[name] = values.reshape(*values.shape[:-1], *grid)
    numbers = {
        'attention': {
            'split': 'training' if dataset.validation is None else 'validation',
            'images': shown,
        }
    }
    if with_gap:
        images = jax.tree.map(lambda *values: np.stack(values), *(one['gap'] for one in seen))
        numbers['gap'] = {
            'images': len(indices),
            'uniform_entropy': math.log(tokens),
            'heads': _heads(images),
        }
    return numbers, arrays


def _heads(images: Mapping[str, np.ndarray]) -> list[dict]:
    """Mean and standard deviation of quantities (n, L, H) over n images, a dict a head."""
    mean = {name: values.mean(axis=0) for name, values in images.items()}
    std = {name: values.std(axis=0, ddof=1) for name, values in images.items()}
    blocks, heads = mean['entropy'].shape
    return [
        {
            'block': block + 1,
            'head': head + 1,
            'mean': {name: values[block, head] for name, values in mean.items()},
            'std': {name: values[block, head] for name, values in std.items()},
        }
        for block in range(blocks)
        for head in range(heads)
    ]


def _make_look(run: evaluate.Finished, with_gap: bool) -> Callable:
    """(variables, image (h, w, c) uint8) → what is seen of its attention, compiled once.

    `log_probabilities` (K,); `received` (L, H, regions) and `rollout` (regions,), in multiples of
    the mean of the tokens and of the regions; `gap`, by name (L, H). The class token, the first,
    is no region: it counts as a token that attends and is attended to. With it, the rollout is the
    one of its own query, from which the model predicts; without it, the mean over all queries.
    """
    attention = predict.make_attention(run.model, run.dataset)
    first_region = int(run.model.pooling == 'cls')
    section = run.config.model.attention
    options = {name: section[name] for name in ('is_causal', 'temperature') if name in section}

    @jax.jit
    def look(variables, image):
        log_probabilities, blocks = attention(variables, image[None])
        maps = [block['attention_map'][0] for block in blocks]
        tokens = maps[0].shape[-1]
        queries = jnp.full(tokens, 1 / tokens)
        if first_region:
            queries = jnp.zeros(tokens).at[0].set(1)
        weights = rollout(maps, queries)[first_region:]
        seen = {
            'log_probabilities': log_probabilities[0],
            'received': jnp.stack([received_attention(one) for one in maps])[..., first_region:],
            'rollout': weights / weights.mean(),
        }
        if with_gap:
            gaps = []
            for implied, block in zip(maps, blocks, strict=True):
                exact = favor.attention_matrix(
                    block['query'], block['key'], kernel='exact', **options
                )
                gaps.append(gap(implied, exact[0]))
            seen['gap'] = jax.tree.map(lambda *heads: jnp.stack(heads), *gaps)
        return seen

    return look
