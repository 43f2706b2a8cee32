"""The forward pass over a whole split: images → log-probabilities on the host."""

import functools
import time
from collections.abc import Callable

import jax
import numpy as np

from performer_vit import augment, cluster, input_pipeline
from performer_vit.checkpoints import TrainState
from performer_vit.datasets import Dataset, Split


def make_forward(model, dataset: Dataset) -> Callable:
    """(variables, images (B, h, w, c) uint8) → natural log-probabilities (B, K) float32.

    Images are normalised with the statistics of the training part; nothing is random.
    """

    def forward(variables, images):
        images = augment.normalize(images, dataset.mean, dataset.std)
        logits = model.apply(variables, images, train=False)
        return jax.nn.log_softmax(logits)

    return forward


def make_attention(model, dataset: Dataset) -> Callable:
    """(variables, images (B, h, w, c) uint8) → log-probabilities (B, K), and what attention is of.

    The second is a list with a dict for each block: `query` and `key` (B, N, H, D), as attention
    receives them, and `attention_map` (B, H, N, N), see `favor.FavorAttention`, which the kernels
    of `vit.NO_ATTENTION` do not have.
    """

    def attention(variables, images):
        images = augment.normalize(images, dataset.mean, dataset.std)
        logits, seen = model.apply(
            variables,
            images,
            train=False,
            capture_intermediates=lambda module, _: module.name in ('query', 'key'),
            mutable=['intermediates'],
        )
        blocks = []
        for i in range(model.depth):
            block = seen['intermediates'][f'encoder_{i}']['self_attention']
            blocks.append({
                'query': block['query']['__call__'][0],
                'key': block['key']['__call__'][0],
                'attention_map': block['attention']['attention_map'][0],
            })  # fmt: skip
        return jax.nn.log_softmax(logits), blocks

    return attention


def compile_forward(
    model, dataset: Dataset, state: TrainState, batch_size: int
) -> Callable[[TrainState, Split], np.ndarray]:
    """Compiles the forward pass for `pmap`, once for splits of any size.

    Args:
      model: a `vit.VisionTransformer`.
      dataset: gives the statistics, and the shape of an image.
      state: replicated; its shapes and placement are those that the result will be called with.
      batch_size: over all devices; the last batch of a split is padded to it.

    Returns:
      A function of a replicated state and a split of n images to log-probabilities (n, K) float32
      in the split's order, computed with `state.evaluated`.
    """
    split = Split(dataset.train.images[:1], dataset.train.labels[:1])
    image = next(input_pipeline.eval_batches(split, batch_size=batch_size))['image']
    forward = jax.pmap(make_forward(model, dataset), axis_name='batch', devices=cluster.devices())
    compiled = forward.lower(state.evaluated, image).compile()
    return functools.partial(_predict, compiled, batch_size)


def _predict(compiled: Callable, batch_size: int, state: TrainState, split: Split) -> np.ndarray:
    outputs = [
        compiled(state.evaluated, batch['image'])
        for batch in input_pipeline.eval_batches(split, batch_size=batch_size)
    ]
    # The batches are contiguous and cut into consecutive runs over the processes and their devices,
    # so their order is the split's; the padding is at the very end.
    local = np.stack([cluster.local(output) for output in outputs])
    gathered = np.moveaxis(cluster.gather(local), 0, 1)
    return gathered.reshape(-1, gathered.shape[-1])[: len(split)]


def mirrored(split: Split) -> Split:
    """The split with every image mirrored left to right."""
    return Split(split.images[:, :, ::-1], split.labels)


def timed(
    predict: Callable[[TrainState, Split], np.ndarray], state: TrainState, split: Split
) -> tuple[np.ndarray, float]:
    """The predictions for a split, and the seconds of a pass that follows a first, warm one."""
    predict(state, Split(split.images[:1], split.labels[:1]))
    started = time.perf_counter()
    log_probabilities = predict(state, split)
    return log_probabilities, time.perf_counter() - started
