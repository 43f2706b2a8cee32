"""The Vision Transformer of `vit.py` and its training step, as a PyTorch user would write them.

The twin that `python -m performer_vit.benchmark train_step --peers` measures ours against, in eager
PyTorch on the CPU. Only benchmarks import it; PyTorch comes with `pip install -e '.[bench]'`. It
starts from the weights of our model and computes the same function, where `check` lets it: softmax
attention by PyTorch's fused kernel, or linear attention with ReLU features of the same projection.

A step of either side runs forward and backward, clips, takes an AdamW step by the schedule, and
moves the average of the weights. `INCLUDES` says what differs: it makes our step the longer one.

Shapes: B images, h×w pixels, N tokens, C width, H heads, D = C / H, R features, K classes.
"""

import copy
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from performer_vit import cpu_backend, workdir
from performer_vit.errors import BadInput
from performer_vit.feature_maps import EPSILON

INCLUDES = {
    'ours': 'augmentation and normalisation of uint8 images, forward, cross entropy with label '
    'smoothing, backward, clipping, AdamW, schedule, moving average; also accuracy, sums over the '
    'epoch, and whether loss and gradient are finite',
    'torch': 'forward, cross entropy with label smoothing, backward, clipping, AdamW (fused), '
    'schedule, moving average; images are augmented and normalised already',
}

# What the twin was written for; what else it honours; and, by the first letters of their names, the
# fields that do nothing beside these, in our model neither.
_ONLY = {
    'model.stem': ('patch',),
    'model.position': ('learned',),
    'model.pooling': ('gap',),
    'model.drop_path_rate': (0.0,),
    'model.dtype': ('float32',),
    'model.attention.kernel': ('exact', 'relu'),
    'optimizer.name': ('adamw',),
    'optimizer.schedule': ('cosine', 'linear'),
    # Its targets are classes, not mixtures of them.
    'augment.mixup': (0.0,),
    'augment.cutmix': (0.0,),
}
_HONOURED = (
    'model.patch_size', 'model.width', 'model.depth', 'model.num_heads', 'model.mlp_dim',
    'model.dropout_rate', 'model.attention.num_features', 'model.attention.projection',
    'model.attention.row_norms', 'model.attention.redraw_every', 'optimizer.learning_rate',
    'optimizer.warmup_epochs', 'optimizer.weight_decay', 'optimizer.clip_norm',
)  # fmt: skip
_UNUSED = (
    'model.stem_', 'model.pool_', 'model.conv_', 'model.attention.hidden',
    'model.attention.theta_', 'optimizer.decay_', 'optimizer.momentum',
)  # fmt: skip


def check(config) -> None:
    """Raises `BadInput` where the twin would not train the model that the config describes.

    Args:
      config: of a run.
    """
    if jax.default_backend() != 'cpu':
        raise BadInput(
            f'--peers is given and JAX computes on its {jax.default_backend()} backend; the '
            'PyTorch twin computes on the CPU alone. Set JAX_PLATFORMS=cpu, or leave out --peers.'
        )
    allowed = dict(_ONLY)
    attention = config.model.attention
    if attention.kernel != 'exact':
        allowed['model.attention.redraw_every'] = (0,)
        if attention.projection == 'none':
            raise BadInput(
                "model.attention.projection is 'none'; the PyTorch twin has features of a random "
                'matrix alone. Choose another projection, or leave out --peers.'
            )
    for field, value in workdir.flatten(config.to_dict()).items():
        if field in allowed and value not in allowed[field]:
            names = ' or '.join(repr(name) for name in allowed[field])
            raise BadInput(
                f'{field} is {value!r}; the PyTorch twin has {names} alone. Set --config.{field} '
                'to that, or leave out --peers.'
            )
        is_known = field in (*_ONLY, *_HONOURED) or field.startswith(_UNUSED)
        if field.startswith(('model.', 'optimizer.')) and not is_known:
            raise BadInput(
                f'{field} is {value!r}, and the PyTorch twin has nothing of that name. Leave out '
                '--peers.'
            )


def linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, projection: torch.Tensor
) -> torch.Tensor:
    """φ(q) (φ(k)ᵀ v) / φ(q) Σ φ(k) with φ(x) = ReLU(Wx / D^¼) + ε, all tensors (B, H, N, D).

    `projection` is W (R, D). Factors common to all features, such as 1/√R, cancel.
    """
    projection = projection * projection.shape[-1] ** -0.25
    query, key = (
        F.relu(torch.einsum('bhnd,rd->bhnr', x, projection)) + EPSILON for x in (query, key)
    )
    state = torch.einsum('bhnr,bhnd->bhrd', key, value)
    normalizer = torch.einsum('bhnr,bhr->bhn', query, key.sum(dim=2))
    return torch.einsum('bhnr,bhrd->bhnd', query, state) / normalizer[..., None]


class SelfAttention(nn.Module):
    """Multi-head self-attention (B, N, C) → (B, N, C): softmax's, or linear with R features."""

    def __init__(self, width: int, num_heads: int, num_features: int | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        matrix = None if num_features is None else torch.empty(num_features, width // num_heads)
        self.register_buffer('projection', matrix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if self.projection is None:
            x = F.scaled_dot_product_attention(query, key, value)
        else:
            x = linear_attention(query, key, value, self.projection)
        return self.out(x.transpose(1, 2).reshape(batch, tokens, width))


class EncoderBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)); (B, N, C) → (B, N, C)."""

    def __init__(self, model, num_features: int | None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(model.width, eps=1e-6)
        self.attention = SelfAttention(model.width, model.num_heads, num_features)
        self.dropout = nn.Dropout(model.dropout_rate)
        self.mlp_norm = nn.LayerNorm(model.width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(model.width, model.mlp_dim),
            nn.GELU(approximate='tanh'),
            nn.Dropout(model.dropout_rate),
            nn.Linear(model.mlp_dim, model.width),
            nn.Dropout(model.dropout_rate),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nn.Module):
    """Normalised images (B, c, h, w) float32 to logits (B, K); `model` is a config's section."""

    def __init__(self, model, num_channels: int, num_tokens: int, num_classes: int) -> None:
        super().__init__()
        kernel, num_features = model.attention.kernel, model.attention.num_features
        self.stem = nn.Conv2d(num_channels, model.width, model.patch_size, stride=model.patch_size)
        self.position = nn.Parameter(torch.empty(num_tokens, model.width))
        self.dropout = nn.Dropout(model.dropout_rate)
        self.blocks = nn.Sequential(*(
            EncoderBlock(model, None if kernel == 'exact' else num_features)
            for _ in range(model.depth)
        ))  # fmt: skip
        self.norm = nn.LayerNorm(model.width, eps=1e-6)
        self.head = nn.Linear(model.width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        x = self.dropout(x + self.position)
        x = self.norm(self.blocks(x))
        return self.head(x.mean(dim=1))


def from_flax(model, params: Mapping, projections: Mapping) -> VisionTransformer:
    """The twin of a `vit.VisionTransformer`, with copies of its weights.

    Args:
      model: the `model` section of a config that `check` lets pass.
      params, projections: the collections of our model, of one device.
    """
    weights = _state_dict(params, projections, model)
    twin = VisionTransformer(
        model,
        num_channels=weights['stem.weight'].shape[1],
        num_tokens=len(weights['position']),
        num_classes=len(weights['head.bias']),
    )
    twin.load_state_dict(weights)
    return twin


def _state_dict(params: Mapping, projections: Mapping, model) -> dict[str, torch.Tensor]:
    """Flax keeps kernels as (inputs…, outputs…), PyTorch weights as (outputs, inputs…)."""
    width, patch = model.width, model.patch_size
    stem = np.asarray(params['stem']['embedding']['kernel'])
    arrays = {
        # A patch's vector runs over its rows, columns and channels.
        'stem.weight': stem.reshape(patch, patch, -1, width).transpose(3, 2, 0, 1),
        'stem.bias': params['stem']['embedding']['bias'],
        'position': params['position_embedding'],
        **_norm('norm', params['norm']),
        **_linear('head', params['head'], width),
    }
    for i in range(model.depth):
        block = params[f'encoder_{i}']
        attention = block['self_attention']
        qkv = {
            field: np.concatenate(
                [
                    np.reshape(attention[name][field], (-1, width))
                    for name in ('query', 'key', 'value')
                ],
                axis=-1,
            )
            for field in ('kernel', 'bias')
        }
        arrays |= {
            **_norm(f'blocks.{i}.attention_norm', block['attention_norm']),
            **_linear(f'blocks.{i}.attention.qkv', qkv, width),
            **_linear(f'blocks.{i}.attention.out', attention['out'], width),
            **_norm(f'blocks.{i}.mlp_norm', block['mlp_norm']),
            **_linear(f'blocks.{i}.mlp.0', block['mlp']['hidden'], width),
            **_linear(f'blocks.{i}.mlp.3', block['mlp']['out'], model.mlp_dim),
        }
        if projections:
            matrix = projections[f'encoder_{i}']['self_attention']['attention']['matrix']
            arrays[f'blocks.{i}.attention.projection'] = matrix
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def _norm(name: str, params: Mapping) -> dict:
    return {f'{name}.weight': params['scale'], f'{name}.bias': params['bias']}


def _linear(name: str, params: Mapping, num_inputs: int) -> dict:
    weight = np.reshape(params['kernel'], (num_inputs, -1)).T
    return {f'{name}.weight': weight, f'{name}.bias': np.ravel(params['bias'])}


def make_batch(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, h, w, c) float32 and (B,) integers as PyTorch's (B, c, h, w) float32 and (B,) int64."""
    images = np.ascontiguousarray(np.transpose(images, (0, 3, 1, 2)))
    return torch.from_numpy(images), torch.from_numpy(np.array(labels, np.int64))


def rate_factor(schedule: str, step: int, warmup_steps: int, num_steps: int) -> float:
    """A schedule of `optimizers.learning_rate`, as a factor of the highest rate."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == 'cosine' else 1 - progress


def make_average(model: VisionTransformer) -> VisionTransformer:
    """The moving average of the weights before the first step: a copy of them."""
    return copy.deepcopy(model).requires_grad_(False)


def make_train_step(
    model: VisionTransformer, average: VisionTransformer | None, config, steps_per_epoch: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """One optimiser step: a function of a batch of `make_batch` that returns the loss, in nats.

    It trains `model` and moves `average` in place, with all CPU threads.

    Args:
      average: of `make_average`, or None where none is kept.
      config: of a run; `check` lets it pass.
      steps_per_epoch: optimiser steps in an epoch, for the schedule.
    """
    torch.set_num_threads(cpu_backend.num_cores())
    model.train()
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, config.optimizer.weight_decay),
        lr=config.optimizer.learning_rate,
        # A third of the time of the loop and of foreach, on the CPU.
        fused=True,
    )
    warmup_steps = round(config.optimizer.warmup_epochs * steps_per_epoch)
    num_steps = config.num_epochs * steps_per_epoch
    name = config.optimizer.schedule
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(name, step, warmup_steps, num_steps)
    )
    parameters = list(model.parameters())
    averages = [] if average is None else list(average.parameters())
    clip_norm, label_smoothing = config.optimizer.clip_norm, config.label_smoothing
    decay = config.ema_decay

    def train_step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)
        loss.backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(parameters, clip_norm, foreach=True)
        step = schedule.last_epoch
        optimizer.step()
        schedule.step()
        if averages:
            with torch.no_grad():
                rate = 1 - min(decay, (1 + step) / (10 + step))
                torch._foreach_lerp_(averages, parameters, rate)
        return loss.detach()

    return train_step


def _parameter_groups(model: VisionTransformer, weight_decay: float) -> list[dict]:
    """Weights of linear layers and of the stem decay; biases, norms and the position do not."""
    decayed = [
        module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    identities = {id(weight) for weight in decayed}
    others = [weight for weight in model.parameters() if id(weight) not in identities]
    return [
        {'params': decayed, 'weight_decay': weight_decay},
        {'params': others, 'weight_decay': 0.0},
    ]
