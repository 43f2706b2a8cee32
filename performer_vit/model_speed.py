"""How the time of a whole model grows with the number of tokens: the ViT's and the Performers'.

    python -m performer_vit.benchmark tokens --config=configs/vit.py:cifar10,study --json=FILE

Every contender is the model of one config with another attention, and takes whole training steps
and forward passes. The number of tokens alone differs from one length to the next: there are no
convolutions, whose cost changes with the patch size, but the stem 'patch' always, and the pooling
'gap' for 'conv', whatever the config has; and a batch has the same number of tokens, as far as an
image has no more than that. All contenders at one length take turns, on random images, on one
device; one length follows the other, so that no more than the programs of one lie in memory.
Letters: N tokens of an image.
"""

import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import jax_utils
from flax import linen as nn

from performer_vit import (
    attention_speed,
    checkpoints,
    environment,
    flops,
    input_pipeline,
    optimizers,
    predict,
    timing,
    train,
    train_step,
    vit,
)
from performer_vit.datasets import Dataset, Split
from performer_vit.errors import BadInput

# Tokens of a batch, from 64 images of 64 tokens to one of 4,096. With twice as many the gradient
# of the study's ViT at 4,096 tokens would take 28 GiB by JAX's attention.
NUM_TOKENS = 4096

# The ViT by our softmax attention and by JAX's, and the Performers of `configs/`.
VITS = ('exact', 'jax_exact')
PERFORMERS = ('relu', 'gelu', 'softmax', 'elu', 'ftheta')
CONTENDERS = (*VITS, *PERFORMERS)

PASS_NAMES = {'training': 'training step', 'inference': 'inference'}

_IMAGE_SIZE = 32  # Pixels along a side, of images of up to 1,024 tokens.
_NUM_CLASSES = 10
_STEPS_PER_EPOCH = 1000  # For the schedule, whose rates all cost the same.

# Of the free memory, the part that a program may take.
_MEMORY_FRACTION = 0.9


class JaxAttention(nn.Module):
    """`jax.nn.dot_product_attention` as the attention of a `vit.VisionTransformer`."""

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """(B, N, H, D) each to (B, N, H, D)."""
        return jax.nn.dot_product_attention(query, key, value)


class _Case(NamedTuple):
    """A pass of a contender at one number of tokens."""

    length: int
    contender: str
    which: str


class _Program(NamedTuple):
    """A case that is ready to be timed, or why it is not.

    Attributes:
      facts: what its row holds beside times; `not_run` where there is no call.
      call: returns when a batch is done.
    """

    facts: dict
    call: Callable[[], object] | None


def study(
    config,
    *,
    lengths: Sequence[int],
    rounds: int,
    quadratic_limit: int = 4096,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict:
    """Times a training step and a forward pass of every contender at every number of tokens.

    Args:
      config: of a run. Kernel, stem, patch size, batch size and data set are the study's own; all
        else is taken from it, for all contenders alike.
      lengths: N, see `image_and_patch_size`.
      rounds: how often each contender has its turn, at least 1.
      quadratic_limit: the longest N at which the ViTs run, whose time grows with N².
      on_progress: hears what is being done.

    Returns:
      What JSON can hold. `rows` has a mapping for each N, pass and contender: `seconds_per_image`,
      `images_per_second`, `gflop_per_second` and `fraction_of_peak` as median, low and high over
      the rounds; `gflop_per_image` by `flops.count`; `working_bytes`, the memory that XLA plans
      beyond weights and batch. Performers have `time_ratios`, their time over each ViT's in the
      same round, and `flop_ratios`, what the operations alone would give. Where a ViT is longer
      than `quadratic_limit`, or the memory of any is not free, the row holds no times and `not_run`
      says why. `crossovers` has `attention_speed.crossover` of each Performer and pass against
      'exact'.

    Raises:
      BadInput: a field of the config or a length that is not allowed.
    """
    lengths = _check_lengths(lengths, config.augment)
    for length in lengths:
        train.check(_config_of(config, length, 'exact'))
    for name in PERFORMERS:
        train.check(_config_of(config, lengths[0], name))
    peak = timing.matmul_peak()
    facts, measured = {}, {}
    for length in lengths:
        own, seconds = _measure(config, length, rounds, quadratic_limit, peak, on_progress)
        facts |= own
        measured |= seconds
    figures = {
        'settings': {
            'lengths': lengths,
            'rounds': rounds,
            'quadratic_limit': quadratic_limit,
            'num_tokens': NUM_TOKENS,
            'num_devices': 1,
            'images': 'random',
            'config': _taken(_config_of(config, lengths[0], 'exact')),
        },
        'device': environment.device(),
        'versions': environment.versions(),
        'peak_gflop_per_second': [
            {'length': length, **timing.spread([peak / 1e9 for peak in measured[length]])}
            for length in lengths
        ],
        'rows': [_row(case, facts, measured) for case in facts],
    }
    figures['crossovers'] = _crossovers(figures['rows'])
    return figures


def image_and_patch_size(length: int) -> tuple[int, int]:
    """Pixels along a side of the images and of the patches that make N = `length` tokens.

    Up to 1,024 tokens they are patches of an image of 32×32 pixels, 64 of 4×4 pixels for example;
    beyond, single pixels of a larger image.

    Raises:
      BadInput: N is the square of no number that divides 32, or that is a larger multiple of 8.
    """
    side = math.isqrt(max(length, 0))
    is_larger = side > _IMAGE_SIZE and side % 8 == 0
    if side < 1 or side**2 != length or not (is_larger or _IMAGE_SIZE % side == 0):
        raise BadInput(
            f'lengths holds {length}; allowed are the squares of 1, 2, 4, 8, 16 and 32, whose '
            'patches fill an image of 32×32 pixels, and those of larger multiples of 8. Give such '
            'numbers, as in --lengths=64,256,1024,4096.'
        )
    patch_size = max(1, _IMAGE_SIZE // side)
    return side * patch_size, patch_size


def batch_size(length: int) -> int:
    """As many images as make `NUM_TOKENS` tokens, at least one."""
    return max(1, NUM_TOKENS // length)


def table(figures: Mapping) -> str:
    """The figures of `study` as aligned text."""
    settings = figures['settings']
    model = settings['config']['model']
    peaks = ', '.join(
        f'{timing.spread_text(peak, "{:,.0f}")} at N = {peak["length"]:,}'
        for peak in figures['peak_gflop_per_second']
    )
    lines = [
        f'Whole models, {model["dtype"]}: width {model["width"]}, depth {model["depth"]}, '
        f'{model["num_heads"]} heads, {model["attention"]["num_features"]} features, always the '
        f"'{model['stem']}' stem; {settings['num_tokens']:,} tokens in a batch or one larger "
        f'image; {settings["num_devices"]} of {figures["device"]}',
        'exact is the ViT by our softmax attention, jax_exact the same by '
        'jax.nn.dot_product_attention; the others are Performers by their kernels.',
        f'Medians of {settings["rounds"]} rounds (lowest to highest). Ratios are times of the '
        "row's model over a ViT's in the same round, below 1 where the row is faster; FLOPs beside "
        'them is what their operations alone would give.',
        f'Matrix-product peak in GFLOP/s: {peaks}',
    ]
    for which, name in PASS_NAMES.items():
        rows = [row for row in figures['rows'] if row['pass'] == which]
        titles = '  '.join(format(title, spec) for title, spec in _COLUMNS.items())
        lines += ['', name, titles.rstrip(), *map(_line, rows)]
    lines += ['', 'From which N a Performer stays faster than exact']
    lines += [_say(found) for found in figures['crossovers']]
    return '\n'.join(lines)


_COLUMNS = {
    'N': '>6', 'contender': '<9', 'ms an image': '>26', 'images/s': '>8', 'GFLOP an image': '>14',
    'of peak': '>7', 'over exact': '>20', 'FLOPs': '>5', 'over jax_exact': '>20', ' FLOPs': '>5',
}  # fmt: skip


def _line(row: Mapping) -> str:
    cells = [f'{row["length"]:,}', row['contender']]
    if 'not_run' in row:
        cells.append(f'not run: {row["not_run"]}')
    else:
        cells += [
            timing.spread_text(row['seconds_per_image'], '{:,.2f}', 1e3),
            f'{row["images_per_second"]["median"]:,.1f}',
            f'{row["gflop_per_image"]:,.3f}',
            f'{row["fraction_of_peak"]["median"]:.0%}',
        ]
        for name in VITS if 'time_ratios' in row else ():
            ratio = row['time_ratios'].get(name)
            cells += [
                timing.spread_text(ratio, '{:.2f}') if ratio else 'not run',
                f'{row["flop_ratios"][name]:.2f}',
            ]
    specs = _COLUMNS.values()
    return '  '.join(format(cell, spec) for cell, spec in zip(cells, specs, strict=False)).rstrip()


def _say(found: Mapping) -> str:
    """One crossover in words."""
    where = attention_speed.crossover_text(found, unknown='exact did not run')
    return f'{found["contender"]}, {PASS_NAMES[found["pass"]]}: {where}'


def _check_lengths(lengths: Sequence[int], augment) -> list[int]:
    if not lengths or len(set(lengths)) < len(lengths):
        raise BadInput(
            f'lengths is {list(lengths)}; allowed are numbers of tokens, each once. Give some, as '
            'in --lengths=64,256,1024,4096.'
        )
    for length in lengths:
        image_and_patch_size(length)
        if batch_size(length) % 2 and (augment.mixup or augment.cutmix):
            raise BadInput(
                f'augment.mixup is {augment.mixup} and augment.cutmix is {augment.cutmix}, which '
                f'mix images in pairs, but of {length} tokens a batch has {batch_size(length)}: '
                f'set both to 0, or leave {length} out of --lengths.'
            )
    return sorted(lengths)


def _config_of(config, length: int, contender: str):
    """The config of a contender at N tokens."""
    config = config.copy_and_resolve_references()
    _, patch_size = image_and_patch_size(length)
    config.model.update(stem='patch', patch_size=patch_size)
    if config.model.pooling == 'conv':
        config.model.pooling = 'gap'
    config.model.attention.kernel = 'exact' if contender in VITS else contender
    # Of as many devices as `train.check` divides a batch by.
    config.batch_size = batch_size(length) * jax.device_count()
    return config


def _taken(config) -> dict:
    """What the study takes from a config; kernel and patch size are the ViT's at the first N."""
    own = ('batch_size', 'dataset')
    return {field: value for field, value in config.to_dict().items() if field not in own}


def _measure(
    config,
    length: int,
    rounds: int,
    quadratic_limit: int,
    peak: Callable[[], float],
    on_progress: Callable[[str], None],
) -> tuple[dict[_Case, dict], dict]:
    """The facts of every case at one length, and what each that ran took, by round."""
    programs = {}
    for name in CONTENDERS:
        on_progress(f'{name} at N = {length:,}: compiling and warming up')
        is_too_long = name in VITS and length > quadratic_limit
        reason = f'longer than --quadratic_limit={quadratic_limit}' if is_too_long else None
        programs |= _programs(config, length, name, reason)
    contenders = {
        case: timing.repeated(program.call)
        for which in PASS_NAMES
        for case, program in programs.items()
        if case.which == which and program.call
    }
    # One a length, so that it is measured in the same seconds as what is divided by it.
    contenders[length] = peak
    measured = timing.alternate(
        contenders,
        rounds,
        lambda number: on_progress(f'N = {length:,}: round {number} of {rounds}'),
    )
    return {case: program.facts for case, program in programs.items()}, measured


def _programs(config, length: int, contender: str, not_run: str | None) -> dict[_Case, _Program]:
    """Both passes of a contender, compiled where `not_run` gives no reason to leave them out."""
    found = {}
    for which, (function, arguments) in _functions(config, length, contender).items():
        operations = flops.count(function, *arguments)
        facts = {'gflop_per_image': operations / batch_size(length) / 1e9}
        reason, call = not_run, None
        if not reason:
            donated = 0 if which == 'training' else ()
            mapped = jax.pmap(function, axis_name='batch', donate_argnums=donated)
            compiled = mapped.lower(*arguments).compile()
            facts['working_bytes'] = _working_bytes(compiled)
            reason = _shortage(facts['working_bytes'])
        if reason:
            facts['not_run'] = reason
        else:
            call = _call(compiled, which, arguments)
        found[_Case(length, contender, which)] = _Program(facts, call)
    return found


def _functions(config, length: int, contender: str) -> dict[str, tuple[Callable, tuple]]:
    """The function of each pass for `pmap`, and its arguments, which lie on the first device."""
    devices = jax.local_devices()[:1]
    config = _config_of(config, length, contender)
    dataset = _random_images(length)
    schedule = optimizers.learning_rate(config.optimizer, _STEPS_PER_EPOCH, config.num_epochs)
    tx = optimizers.create(config.optimizer, schedule, axis_name='batch')
    model = vit.from_config(config.model, dataset.num_classes, config.seed)
    if contender == 'jax_exact':
        model = model.clone(attention=JaxAttention)
    state = checkpoints.create_state(
        model, tx, dataset.image_shape, config.seed, ema=config.ema_decay > 0
    )
    state = jax_utils.replicate(state, devices, axis_name='batch')
    batch = next(
        input_pipeline.train_batches(
            dataset.train,
            seed=config.seed,
            batch_size=batch_size(length),
            first_step=0,
            num_steps=1,
            devices=devices,
        )
    )
    step = train_step.make_train_step(model, tx, schedule, config, dataset, _STEPS_PER_EPOCH)
    # Copies, because the training step takes its state's buffers for the next one.
    variables = jax.tree.map(jnp.copy, state.evaluated)
    forward = predict.make_forward(model, dataset)
    return {'training': (step, (state, batch)), 'inference': (forward, (variables, batch['image']))}


def _random_images(length: int) -> Dataset:
    """One batch of images and labels, the same at every call."""
    size, _ = image_and_patch_size(length)
    rng = np.random.default_rng(0)
    count = batch_size(length)
    split = Split(
        rng.integers(0, 256, (count, size, size, 3), np.uint8),
        rng.integers(0, _NUM_CLASSES, count, np.int32),
    )
    return Dataset(
        name='random',
        class_names=tuple(map(str, range(_NUM_CLASSES))),
        train=split,
        validation=None,
        test=split,
        mean=np.full(3, 1 / 2, np.float32),
        std=np.full(3, 12**-0.5, np.float32),
        flip=True,
    )


def _call(compiled: Callable, which: str, arguments: tuple) -> Callable[[], object]:
    if which == 'inference':
        return lambda: jax.block_until_ready(compiled(*arguments))
    state, batch = arguments
    current = {'state': state}

    def step() -> None:
        current['state'], _ = compiled(current['state'], batch)
        jax.block_until_ready(current['state'])

    return step


def _working_bytes(compiled) -> int:
    planned = compiled.memory_analysis()
    # Outputs that take the place of arguments need no memory of their own.
    outputs = planned.output_size_in_bytes - planned.alias_size_in_bytes
    return planned.temp_size_in_bytes + outputs


def _shortage(num_bytes: int) -> str | None:
    """Says that a program needs more than the free memory; None where it does not."""
    free = _free_bytes()
    if free is None or num_bytes <= _MEMORY_FRACTION * free:
        return None
    needed, free = (f'{number / 2**30:,.1f} GiB' for number in (num_bytes, free))
    return f'it takes {needed} of memory, and {free} are free'


def _free_bytes() -> int | None:
    """Of the device that computes; None where no one says it."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats['bytes_limit'] - stats['bytes_in_use']
    try:
        text = pathlib.Path('/proc/meminfo').read_text()
    except OSError:
        return None  # Not Linux.
    return 1024 * int(re.search(r'MemAvailable: +(\d+)', text)[1])


def _row(case: _Case, facts: Mapping[_Case, dict], measured: Mapping) -> dict:
    own = facts[case]
    image_size, patch_size = image_and_patch_size(case.length)
    row = {
        'length': case.length,
        'contender': case.contender,
        'pass': case.which,
        'batch_size': batch_size(case.length),
        'image_size': image_size,
        'patch_size': patch_size,
        **own,
    }
    vits = {name: case._replace(contender=name) for name in VITS}
    if case.contender in PERFORMERS:
        row['flop_ratios'] = {
            name: own['gflop_per_image'] / facts[vit_]['gflop_per_image']
            for name, vit_ in vits.items()
        }
    if case not in measured:
        return row
    rates = [batch_size(case.length) / seconds for seconds in measured[case]]
    gflops = [own['gflop_per_image'] * rate for rate in rates]
    row |= {
        'seconds_per_image': timing.spread([1 / rate for rate in rates]),
        'images_per_second': timing.spread(rates),
        'gflop_per_second': timing.spread(gflops),
        'fraction_of_peak': timing.spread([
            1e9 * rate / peak for rate, peak in zip(gflops, measured[case.length], strict=True)
        ]),
    }  # fmt: skip
    if case.contender in PERFORMERS:
        row['time_ratios'] = {
            name: timing.spread([
                a / b for a, b in zip(measured[case], measured[vit_], strict=True)
            ])
            for name, vit_ in vits.items()
            if vit_ in measured
        }  # fmt: skip
    return row


def _crossovers(rows: Sequence[Mapping]) -> list[dict]:
    medians = {
        (row['pass'], row['contender'], row['length']): row['seconds_per_image']['median']
        for row in rows
        if 'seconds_per_image' in row
    }
    found = []
    for which in PASS_NAMES:
        for name in PERFORMERS:
            lengths = [
                length
                for pass_, contender, length in medians
                if (pass_, contender) == (which, name) and (which, 'exact', length) in medians
            ]
            linear, exact = (
                [medians[which, contender, length] for length in lengths]
                for contender in (name, 'exact')
            )
            found.append({
                'contender': name,
                'pass': which,
                'lengths': lengths,
                **attention_speed.crossover(lengths, linear, exact),
            })  # fmt: skip
    return found
