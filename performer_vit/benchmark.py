"""Every claim of speed, memory and error as a command.

    python -m performer_vit.benchmark train_step --config=configs/performer_relu.py
    python -m performer_vit.benchmark train_step --config=FILE --config.optimizer.name=adamw --peers
    python -m performer_vit.benchmark inference --config=configs/performer_relu.py --json=FILE
    python -m performer_vit.benchmark tokens --config=configs/vit.py:cifar10,study --json=FILE
    python -m performer_vit.benchmark attention --lengths=256,1024,4096 --peers --json=FILE
    python -m performer_vit.benchmark approximation --json=FILE

Contenders of one run alternate round by round, because a machine's speed drifts; figures are
medians over the rounds with the lowest and the highest beside them.
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from absl import app, flags
from flax import jax_utils
from ml_collections import config_flags

from performer_vit import (
    approximation,
    attention_speed,
    augment,
    cpu_backend,
    datasets,
    environment,
    figures,
    files,
    flops,
    input_pipeline,
    model_speed,
    predict,
    progress,
    timing,
    train,
    vit,
    workdir,
)
from performer_vit.command_line import fail, last_to_the_end, parse, quiet_libraries
from performer_vit.errors import BadInput

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/.')
_JSON = flags.DEFINE_string('json', None, 'Also write the figures to this file.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'How often each contender has its turn.', 1)
_LENGTHS = flags.DEFINE_list('lengths', ['64', '256', '1024', '4096'], 'Tokens.')
_NUM_FEATURES = flags.DEFINE_list('num_features', ['256'], 'Random features of our kernels.')
_CAUSAL = flags.DEFINE_bool('causal', False, 'Let a token attend to itself and earlier ones alone.')
_PEERS = flags.DEFINE_bool(
    'peers', False, "Also measure PyTorch, and performer-pytorch's attention."
)
_MEMORY = flags.DEFINE_bool('memory', False, 'Also measure the peak memory of each contender.')
_QUADRATIC_LIMIT = flags.DEFINE_integer(
    'quadratic_limit', 4096,
    'The longest sequence for attention in quadratic time, or with a state kept for each token.', 1,
)  # fmt: skip
_DRAWS = flags.DEFINE_integer('draws', 15, 'Independent draws of inputs and projections.', 2)


def _prepare(config):
    train.check(config)
    dataset = datasets.load(**config.dataset)
    training = train.prepare(config, dataset)
    state = jax_utils.replicate(training.state, axis_name='batch')
    return dataset, training, state


def _figures(config, dataset, training, operations: float, measured: Mapping[str, list]) -> dict:
    """What both benchmarks report; `operations` are the FLOPs of one batch."""
    batch_size = config.batch_size
    return {
        'config': config.to_dict(),
        'dataset': dataset.name,
        'kernel': config.model.attention.kernel,
        'num_params': training.num_params,
        'num_tokens': vit.num_tokens(training.model, dataset.image_shape),
        'batch_size': batch_size,
        'gflop_per_image': operations / batch_size / 1e9,
        'peak_gflop_per_second': timing.spread([value / 1e9 for value in measured['peak']]),
        'images_per_second': timing.spread(measured['images_per_second']),
        'gflop_per_second': timing.spread(
            [value * operations / batch_size / 1e9 for value in measured['images_per_second']]
        ),
        'fraction_of_peak': _ratio(
            [value * operations / batch_size for value in measured['images_per_second']],
            measured['peak'],
        ),
        'device': environment.device(),
        'versions': environment.versions(),
    }  # fmt: skip


def train_step(config, rounds: int, peers: bool = False) -> dict:
    """The bare train step on one fixed batch, the whole training loop, and the machine's peak.

    The loop is `train.run_steps` with the real input pipeline, progress and TensorBoard. With
    `peers` the same network, with the same weights, is trained by PyTorch in the same rounds.
    """
    twin = _import_twin() if peers else None
    if twin:
        twin.check(config)
    dataset, training, state = _prepare(config)
    batches = functools.partial(
        input_pipeline.train_batches, dataset.train, seed=config.seed, batch_size=config.batch_size
    )
    fixed = next(batches(first_step=0, num_steps=1))
    operations = flops.count(training.step_fn, state, fixed)
    started = time.perf_counter()
    step = train.compile_step(training, state, fixed)
    compile_seconds = time.perf_counter() - started

    # As many steps a turn as lie between two reports, so that the loop pays for one of each, after
    # one that does not count: what the contender before it left in the caches and the allocator is
    # not this one's fault.
    count = config.log_every_steps
    current = {'state': step(state, fixed)[0], 'step': 1}
    total = 1 + 2 * (1 + count) * rounds
    stream = batches(first_step=1, num_steps=total)

    def turn(source, observe) -> float:
        first = current['step'] + 1
        steps = range(first, first + count)
        state, _ = step(current['state'], next(source))
        jax.block_until_ready(state)
        started = time.perf_counter()
        state, _ = train.run_steps(step, state, source, steps, count, observe)
        jax.block_until_ready(state)
        current.update(state=state, step=steps.stop)
        return count * config.batch_size / (time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as directory:
        shown = progress.Progress(directory, dataset.name, 'benchmark', config, 1, total)
        observe = functools.partial(train.report_steps, shown)
        contenders = {
            'peak': timing.matmul_peak(),
            'images_per_second': lambda: turn(itertools.repeat(fixed), lambda *_: None),
            'loop_images_per_second': lambda: turn(stream, observe),
        }
        if twin:
            contenders['torch_images_per_second'] = _torch_turn(
                twin, config, dataset, training, fixed
            )
        measured = timing.alternate(contenders, rounds)
        shown.close()
    # A training that diverges stops, and its steps that were not made would count as fast ones.
    train.raise_if_bad(config, training, current['state'], batches)
    values = {
        **_figures(config, dataset, training, operations, measured),
        'compile_seconds': compile_seconds,
        'loop_images_per_second': timing.spread(measured['loop_images_per_second']),
        'loop_over_bare_step': _ratio(
            measured['loop_images_per_second'], measured['images_per_second']
        ),
    }
    if twin:
        values |= {
            'torch_images_per_second': timing.spread(measured['torch_images_per_second']),
            'bare_step_over_torch': _ratio(
                measured['images_per_second'], measured['torch_images_per_second']
            ),
            'torch_device': f'cpu, {cpu_backend.num_cores()} threads',
            'included': twin.INCLUDES,
        }
        values['versions']['torch'] = importlib.metadata.version('torch')
    return values


def _ratio(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Of each round, so that both numbers are of the same minute."""
    return timing.spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def _import_twin():
    try:
        from performer_vit import torch_vit
    except ImportError as error:
        raise BadInput(
            f'--peers needs PyTorch, which cannot be imported ({error}). Install it with: '
            "pip install -e '.[bench]'"
        ) from error
    return torch_vit


def _torch_turn(twin, config, dataset, training, batch: dict) -> Callable[[], float]:
    """Steps of the PyTorch twin on the fixed batch, as many as ours: images/s."""
    model = twin.from_flax(config.model, training.state.params, training.state.projections)
    average = twin.make_average(model) if config.ema_decay else None
    step = twin.make_train_step(model, average, config, training.steps_per_epoch)
    images = augment.normalize(batch['image'], dataset.mean, dataset.std)
    images = np.asarray(images).reshape(-1, *dataset.image_shape)
    batch = twin.make_batch(images, np.ravel(batch['label']))
    step(*batch)
    count = config.log_every_steps

    def turn() -> float:
        step(*batch).item()  # As with ours, the first does not count.
        started = time.perf_counter()
        for _ in range(count):
            loss = step(*batch)
        loss.item()
        return count * config.batch_size / (time.perf_counter() - started)

    return turn


def inference(config, rounds: int) -> dict:
    """The forward pass over one fixed batch, again and again, and the machine's peak."""
    dataset, training, state = _prepare(config)
    split = datasets.Split(
        dataset.train.images[: config.batch_size], dataset.train.labels[: config.batch_size]
    )
    batch = next(input_pipeline.eval_batches(split, batch_size=config.batch_size))
    forward = predict.make_forward(training.model, dataset)
    arguments = (state.evaluated, batch['image'])
    operations = flops.count(forward, *arguments)
    compiled = jax.pmap(forward, axis_name='batch').lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    count = config.log_every_steps

    def turn() -> float:
        started = time.perf_counter()
        outputs = [compiled(*arguments) for _ in range(count)]
        jax.block_until_ready(outputs)
        return count * config.batch_size / (time.perf_counter() - started)

    measured = timing.alternate({'peak': timing.matmul_peak(), 'images_per_second': turn}, rounds)
    return _figures(config, dataset, training, operations, measured)


def table(measured: Mapping) -> str:
    """The figures of `train_step` or `inference` as lines: median, and range over the rounds."""
    units = {
        'peak_gflop_per_second': ('matrix-product peak', '{:,.0f} GFLOP/s'),
        'images_per_second': ('bare, one fixed batch', '{:,.1f} images/s'),
        'gflop_per_second': ('', '{:,.1f} GFLOP/s'),
        'fraction_of_peak': ('', '{:.1%} of the peak'),
        'loop_images_per_second': ('whole loop', '{:,.1f} images/s'),
        'loop_over_bare_step': ('', '{:.1%} of the bare step'),
        'torch_images_per_second': ('PyTorch, one fixed batch', '{:,.1f} images/s'),
        'bare_step_over_torch': ("ours over PyTorch's", '{:.2f} times the speed'),
    }
    lines = [
        f'{measured["kernel"]} on {measured["dataset"]}: {measured["num_params"]:,} parameters, '
        f'{measured["num_tokens"]} tokens, batch {measured["batch_size"]}, '
        f'{measured["gflop_per_image"]:.3f} GFLOP an image; {measured["device"]}'
    ]
    for field, (label, unit) in units.items():
        if field in measured:
            value = measured[field]
            low, high = (unit.split(' ')[0].format(value[end]) for end in ('low', 'high'))
            lines.append(f'{label:<26}{unit.format(value["median"])}  ({low} to {high})')
    return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark of the command line.

    Attributes:
      flags: the flags that it honours, `json` apart; any other that is set is an error.
      run: measures, by the flags' values, and returns what JSON can hold.
      table: its figures as text.
      draw: writes figures beside the JSON file, given the figures and its path.
    """

    flags: tuple[str, ...]
    run: Callable[[], dict]
    table: Callable[[dict], str]
    draw: Callable[[dict, pathlib.Path], None] = lambda figures, path: None


def _attention() -> dict:
    return attention_speed.study(
        lengths=_integers('lengths', _LENGTHS.value),
        num_features=_integers('num_features', _NUM_FEATURES.value),
        rounds=_ROUNDS.value,
        is_causal=_CAUSAL.value,
        peers=_PEERS.value,
        memory=_MEMORY.value,
        quadratic_limit=_QUADRATIC_LIMIT.value,
        on_progress=_say,
    )


def _draw_attention(values: dict, path: pathlib.Path) -> None:
    figures.save(figures.attention_speed(values), path.with_suffix('.png'), num_colours=128)


def _approximation() -> dict:
    return approximation.study(draws=_DRAWS.value, on_progress=_say)


def _draw_approximation(values: dict, path: pathlib.Path) -> None:
    figures.approximation(values, path.parent)


def _tokens() -> dict:
    return model_speed.study(
        _CONFIG.value,
        lengths=_integers('lengths', _LENGTHS.value),
        rounds=_ROUNDS.value,
        quadratic_limit=_QUADRATIC_LIMIT.value,
        on_progress=_say,
    )


BENCHMARKS = {
    'train_step': Benchmark(
        ('config', 'rounds', 'peers'),
        lambda: train_step(_CONFIG.value, _ROUNDS.value, _PEERS.value),
        table,
    ),
    'inference': Benchmark(
        ('config', 'rounds'), lambda: inference(_CONFIG.value, _ROUNDS.value), table
    ),
    'tokens': Benchmark(
        ('config', 'lengths', 'quadratic_limit', 'rounds'),
        _tokens,
        model_speed.table,
        figures.save_model_speed,
    ),
    'attention': Benchmark(
        ('lengths', 'num_features', 'causal', 'peers', 'memory', 'quadratic_limit', 'rounds'),
        _attention,
        attention_speed.table,
        _draw_attention,
    ),
    'approximation': Benchmark(
        ('draws',), _approximation, approximation.table, _draw_approximation
    ),
}


def _integers(name: str, words: list[str]) -> list[int]:
    try:
        return [int(word) for word in words]
    except ValueError as error:
        raise BadInput(
            f'--{name} is {",".join(words)}; allowed are integers with commas between them, as in '
            f'--{name}=256,1024.'
        ) from error


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _check_flags(name: str) -> None:
    """Refuses flags of other benchmarks, a config that is missing, and a --json nowhere."""
    own = (*BENCHMARKS[name].flags, 'json')
    known = {'config', *(flag for benchmark in BENCHMARKS.values() for flag in benchmark.flags)}
    for flag in sorted(known - set(own)):
        if flags.FLAGS[flag].present:
            raise BadInput(
                f'--{flag} is given, but {name} has no use for it; its flags are '
                f'{", ".join(f"--{flag}" for flag in own)}. Leave --{flag} out.'
            )
    if 'config' in own and not flags.FLAGS['config'].present:
        raise BadInput('--config is missing; an example is --config=configs/performer_relu.py')
    if _JSON.value is None:
        return
    path = pathlib.Path(_JSON.value)
    if not path.absolute().parent.is_dir():
        raise BadInput(f'the directory of --json={path} does not exist; make it first.')
    if path.is_dir():
        raise BadInput(f'--json={path} is a directory; give a file, such as {path / "FILE.json"}.')
    try:
        files.try_to_write(path.absolute().parent)
    except OSError as error:
        raise BadInput(
            f'nothing can be written beside --json={path} ({error.strerror or error}): give '
            'another directory, or change its permissions.'
        ) from error
    if path.suffix == '.png':
        raise BadInput(f'--json={path} is the name of a figure; give one that ends in .json.')


def main(argv: list[str]) -> None:
    """Runs the benchmark that the command line names."""
    last_to_the_end()
    quiet_libraries()
    try:
        if len(argv) != 2 or argv[1] not in BENCHMARKS:
            raise BadInput(
                f'the benchmark is {argv[1:]}; give one of {", ".join(BENCHMARKS)}, such as: '
                'python -m performer_vit.benchmark train_step --config=configs/vit.py'
            )
        _check_flags(argv[1])
        benchmark = BENCHMARKS[argv[1]]
        environment.versions()  # Those that begin the benchmark.
        values = benchmark.run()
    except (BadInput, FloatingPointError) as error:
        fail(error)
    if _JSON.value:  # First of all: the measurements are not to be lost with the output.
        workdir.write_json(_JSON.value, values)
        benchmark.draw(values, pathlib.Path(_JSON.value))
    print(benchmark.table(values))


if __name__ == '__main__':
    cpu_backend.configure()
    app.run(main, flags_parser=parse)
