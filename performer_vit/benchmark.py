"""Every claim of speed as a command.

    python -m performer_vit.benchmark train_step --config=configs/performer_relu.py
    python -m performer_vit.benchmark inference --config=configs/performer_relu.py --json=FILE

Contenders of one run alternate round by round, because a machine's speed drifts; figures are
medians over the rounds with the lowest and the highest beside them.
"""

import functools
import itertools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from flax import jax_utils
from ml_collections import config_flags

from performer_vit import (
    datasets,
    environment,
    exact_attention,
    input_pipeline,
    predict,
    progress,
    train,
    vit,
    workdir,
)
from performer_vit.command_line import fail, parse
from performer_vit.errors import BadInput

PEAK_SIZE = 4096  # Side of the square float32 product that stands for the machine's peak.

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/.')
_JSON = flags.DEFINE_string('json', None, 'Also write the figures to this file.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'How often each contender has its turn.', 1)


def alternate(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list]:
    """Lets every contender run once a round, in turn, and collects what each returns."""
    measured = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            measured[name].append(contender())
    return measured


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest of repeated measurements."""
    return {'median': statistics.median(values), 'low': min(values), 'high': max(values)}


def matmul_peak() -> Callable[[], float]:
    """A contender that returns the FLOP/s of one dense float32 product of side `PEAK_SIZE`."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (PEAK_SIZE, PEAK_SIZE)) for key in keys)
    product = jax.jit(jnp.matmul).lower(a, b).compile()
    jax.block_until_ready(product(a, b))

    def measure() -> float:
        started = time.perf_counter()
        jax.block_until_ready(product(a, b))
        return 2 * PEAK_SIZE**3 / (time.perf_counter() - started)

    return measure


def count_flops(function: Callable, *arguments) -> float:
    """FLOPs of a function under `pmap`, over all devices: XLA's count before it optimises.

    XLA counts the body of a loop once however often it runs, and exact attention loops over blocks
    of queries; so it is counted in one block, which also leaves out what the backward pass computes
    twice.
    """
    block_size = exact_attention.BLOCK_SIZE
    exact_attention.BLOCK_SIZE = sys.maxsize
    try:
        # A function of its own, or JAX would find the trace of the one with blocks.
        lowered = jax.pmap(lambda *args: function(*args), axis_name='batch').lower(*arguments)
    finally:
        exact_attention.BLOCK_SIZE = block_size
    return lowered.cost_analysis()['flops'] * jax.device_count()


def _prepare(config):
    train.check(config)
    dataset = datasets.load(**config.dataset)
    training = train.prepare(config, dataset)
    state = jax_utils.replicate(training.state, axis_name='batch')
    return dataset, training, state


def _figures(config, dataset, training, flops: float, measured: Mapping[str, list]) -> dict:
    """What both benchmarks report; `flops` are those of one batch."""
    batch_size = config.batch_size
    return {
        'config': config.to_dict(),
        'dataset': dataset.name,
        'kernel': config.model.attention.kernel,
        'num_params': training.num_params,
        'num_tokens': vit.num_tokens(training.model, dataset.image_shape),
        'batch_size': batch_size,
        'gflop_per_image': flops / batch_size / 1e9,
        'peak_gflop_per_second': spread([value / 1e9 for value in measured['peak']]),
        'images_per_second': spread(measured['images_per_second']),
        'gflop_per_second': spread(
            [value * flops / batch_size / 1e9 for value in measured['images_per_second']]
        ),
        # Of each round, so that both numbers are of the same minute.
        'fraction_of_peak': spread([
            images * flops / batch_size / peak
            for images, peak in zip(measured['images_per_second'], measured['peak'], strict=True)
        ]),
        'device': environment.device(),
        'versions': environment.versions(),
    }  # fmt: skip


def train_step(config, rounds: int) -> dict:
    """The bare train step on one fixed batch, the whole training loop, and the machine's peak.

    The loop is `train.run_steps` with the real input pipeline, progress and TensorBoard.
    """
    dataset, training, state = _prepare(config)
    batches = functools.partial(
        input_pipeline.train_batches, dataset.train, seed=config.seed, batch_size=config.batch_size
    )
    fixed = next(batches(first_step=0, num_steps=1))
    flops = count_flops(training.step_fn, state, fixed)
    started = time.perf_counter()
    step = train.compile_step(training, state, fixed)
    compile_seconds = time.perf_counter() - started

    # As many steps a turn as lie between two reports, so that the loop pays for one of each.
    count = config.log_every_steps
    current = {'state': step(state, fixed)[0], 'step': 1}
    total = 1 + 2 * count * rounds
    stream = batches(first_step=1, num_steps=total)

    def turn(source, observe) -> float:
        steps = range(current['step'], current['step'] + count)
        jax.block_until_ready(current['state'])
        started = time.perf_counter()
        state, _ = train.run_steps(step, current['state'], source, steps, count, observe)
        jax.block_until_ready(state)
        current.update(state=state, step=steps.stop)
        return count * config.batch_size / (time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as directory:
        shown = progress.Progress(directory, dataset.name, 'benchmark', config, 1, total)
        observe = functools.partial(train.report_steps, shown)
        contenders = {
            'peak': matmul_peak(),
            'images_per_second': lambda: turn(itertools.repeat(fixed), lambda *_: None),
            'loop_images_per_second': lambda: turn(stream, observe),
        }
        measured = alternate(contenders, rounds)
        shown.close()
    loops = zip(measured['loop_images_per_second'], measured['images_per_second'], strict=True)
    return {
        **_figures(config, dataset, training, flops, measured),
        'compile_seconds': compile_seconds,
        'loop_images_per_second': spread(measured['loop_images_per_second']),
        'loop_over_bare_step': spread([loop / bare for loop, bare in loops]),
    }


def inference(config, rounds: int) -> dict:
    """The forward pass over one fixed batch, again and again, and the machine's peak."""
    dataset, training, state = _prepare(config)
    split = datasets.Split(
        dataset.train.images[: config.batch_size], dataset.train.labels[: config.batch_size]
    )
    batch = next(input_pipeline.eval_batches(split, batch_size=config.batch_size))
    forward = predict.make_forward(training.model, dataset)
    arguments = (state.evaluated_params, state.projections, batch['image'])
    flops = count_flops(forward, *arguments)
    compiled = jax.pmap(forward, axis_name='batch').lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    count = config.log_every_steps

    def turn() -> float:
        started = time.perf_counter()
        outputs = [compiled(*arguments) for _ in range(count)]
        jax.block_until_ready(outputs)
        return count * config.batch_size / (time.perf_counter() - started)

    measured = alternate({'peak': matmul_peak(), 'images_per_second': turn}, rounds)
    return _figures(config, dataset, training, flops, measured)


def table(figures: Mapping) -> str:
    """The figures of a benchmark as aligned lines: median, and the range over the rounds."""
    units = {
        'peak_gflop_per_second': ('matrix-product peak', '{:,.0f} GFLOP/s'),
        'images_per_second': ('bare, one fixed batch', '{:,.1f} images/s'),
        'gflop_per_second': ('', '{:,.1f} GFLOP/s'),
        'fraction_of_peak': ('', '{:.1%} of the peak'),
        'loop_images_per_second': ('whole loop', '{:,.1f} images/s'),
        'loop_over_bare_step': ('', '{:.1%} of the bare step'),
    }
    lines = [
        f'{figures["kernel"]} on {figures["dataset"]}: {figures["num_params"]:,} parameters, '
        f'{figures["num_tokens"]} tokens, batch {figures["batch_size"]}, '
        f'{figures["gflop_per_image"]:.3f} GFLOP an image; {figures["device"]}'
    ]
    for field, (label, unit) in units.items():
        if field in figures:
            value = figures[field]
            low, high = (unit.split(' ')[0].format(value[end]) for end in ('low', 'high'))
            lines.append(f'{label:<23}{unit.format(value["median"])}  ({low} to {high})')
    return '\n'.join(lines)


BENCHMARKS = {'train_step': train_step, 'inference': inference}


def main(argv: list[str]) -> None:
    """Runs the benchmark that the command line names."""
    logging.set_verbosity(logging.ERROR)
    try:
        if len(argv) != 2 or argv[1] not in BENCHMARKS:
            raise BadInput(
                f'the benchmark is {argv[1:]}; give one of {", ".join(BENCHMARKS)}, such as: '
                'python -m performer_vit.benchmark train_step --config=configs/vit.py'
            )
        if not flags.FLAGS['config'].present:
            raise BadInput('--config is missing; an example is --config=configs/performer_relu.py')
        if _JSON.value and not pathlib.Path(_JSON.value).absolute().parent.is_dir():
            raise BadInput(f'the directory of --json={_JSON.value} does not exist; make it first.')
        figures = BENCHMARKS[argv[1]](_CONFIG.value, _ROUNDS.value)
    except (BadInput, FloatingPointError) as error:
        fail(error)
    print(table(figures))
    if _JSON.value:
        workdir.write_json(_JSON.value, figures)


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
