"""How the time of attention grows with the number of tokens: ours and others'.

    python -m performer_vit.benchmark attention --lengths=256,1024,4096 --peers --json=FILE

All contenders at all lengths take turns within one run. The number of tokens in all stays the same,
as far as sequences are not longer than it, so a linear attention takes the same time at every
length. Letters: B batch, N tokens of a sequence, H heads, D head dimension, R features.
"""

import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from performer_vit import (
    attention_contenders,
    attention_memory,
    cpu_backend,
    environment,
    timing,
)
from performer_vit.attention_contenders import (
    EXACT,
    HEAD_DIM,
    NUM_HEADS,
    NUM_TOKENS,
    OURS,
    PASSES,
    batch_size,
)
from performer_vit.errors import BadInput

PASS_NAMES = {'forward': 'forward', 'gradient': 'forward and gradient'}

# Products of 2·N·R·D operations that the algorithm takes for a sequence and head. Linear attention:
# project q, project k, sum the state, read it; two for the gradient of each read, state and
# projection. Exact attention, of 2·N·M·D: the logits and the sum of the values; two for each.
_PRODUCTS = {
    'linear': {'forward': 4, 'gradient': 10},
    'exact': {'forward': 2, 'gradient': 6},
}
# What our blocks compute again in the backward pass instead of keeping it: both projections, or
# the logits.
_RECOMPUTED = {'linear': 2, 'exact': 1}


class _Case(NamedTuple):
    """A contender at one length; exact ones have no features."""

    length: int
    contender: str
    num_features: int | None


def study(
    *,
    lengths: Sequence[int],
    num_features: Sequence[int],
    rounds: int,
    is_causal: bool = False,
    peers: bool = False,
    memory: bool = False,
    quadratic_limit: int = 4096,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict:
    """Times every contender at every length, forward and with the gradients of q, k and v.

    Args:
      lengths: N, each at least 1.
      num_features: R, each at least 1. Exact contenders have none, and run once for all.
      rounds: how often each contender has its turn, at least 1.
      is_causal: whether token n sees tokens m ≤ n alone, in all contenders.
      peers: whether PyTorch's attention and performer-pytorch's take part, on the CPU.
      memory: whether `attention_memory.peak_memory` is measured too, before the times.
      quadratic_limit: the longest N at which contenders run whose time grows with N², or which keep
        R·D numbers for every token. Beyond, their rows hold no numbers and `not_run` says why.
      on_progress: hears what is being done.

    Returns:
      What JSON can hold. `rows` has a mapping for each contender, R, length and pass: `seconds` of
      a call, `seconds_per_token`, `gflop_per_second` and `fraction_of_peak` as median, low and high
      over the rounds; for our kernels `time_ratios`, our time over another's in the same round.
      Operations are those of the algorithm without masks, even where a kernel multiplies in another
      order or more than that; `fraction_of_peak_recomputing` also counts those that our kernels do
      twice where they work in blocks, as they do at all but the smallest sizes. `crossovers` has
      `crossover` of each of our linear kernels, R and pass against the fastest exact attention.
      `memory` has `peak_bytes` of the pass 'gradient'.

    Raises:
      BadInput: a number that is not allowed or is there twice; `peers` that are not installed;
        `memory` where it cannot be measured.
    """
    lengths = _check_integers('lengths', lengths)
    num_features = _check_integers('num_features', num_features)
    names = attention_contenders.chosen(is_causal=is_causal, peers=peers)
    if memory:
        attention_memory.check()
    cases = [
        _Case(length, name, features)
        for length in lengths
        for name in names
        for features in ((None,) if name in EXACT else num_features)
    ]
    left_out = [
        case
        for case in cases
        if case.length > quadratic_limit and _grows(case.contender, is_causal)
    ]
    running = [case for case in cases if case not in left_out]
    reason = {'not_run': f'longer than --quadratic_limit={quadratic_limit}'}
    figures = {
        'settings': {
            'lengths': lengths,
            'num_features': num_features,
            'rounds': rounds,
            'is_causal': is_causal,
            'quadratic_limit': quadratic_limit,
            'num_heads': NUM_HEADS,
            'head_dim': HEAD_DIM,
            'num_tokens': NUM_TOKENS,
            'dtype': 'float32',
            'projection': 'orthogonal',
        },
        'device': environment.device(),
        'torch_device': f'cpu, {cpu_backend.num_cores()} threads' if peers else None,
        'versions': environment.versions() | (_peer_versions() if peers else {}),
    }
    if memory:
        figures['memory'] = []
        for case in running:
            on_progress(f'memory of {_label(case)} at N = {case.length:,}')
            peak = attention_memory.peak_memory(
                case.contender, case.length, case.num_features, is_causal
            )
            figures['memory'].append({**_row(case), 'peak_bytes': peak})
        figures['memory'] += [{**_row(case), **reason} for case in left_out]
    measured = _measure(running, rounds, is_causal, on_progress)
    figures['peak_gflop_per_second'] = [
        {'length': length, **timing.spread([flops / 1e9 for flops in measured[length]])}
        for length in lengths
    ]
    figures['rows'] = [
        {**_row(case), 'pass': which, **reason}
        if case in left_out
        else _measured_row(case, which, running, measured, is_causal)
        for case in cases
        for which in PASSES
    ]
    figures['crossovers'] = _crossovers(figures)
    return figures


def crossover(
    lengths: Sequence[int], linear: Sequence[float], exact: Sequence[float]
) -> dict[str, object]:
    """The length from which a linear attention stays faster than an exact one.

    Between two measured lengths log seconds is taken for a straight line in log N.

    Args:
      lengths: N, ascending.
      linear, exact: seconds at each N.

    Returns:
      `verdict`: 'always' (faster at every N), 'never' (not faster at the last N), 'unknown' (there
      is no N) or 'from'; and `length`, N in that last case and None in the others.
    """
    if not lengths:
        return {'verdict': 'unknown', 'length': None}
    logs = [math.log(a / b) for a, b in zip(linear, exact, strict=True)]
    if logs[-1] >= 0:
        return {'verdict': 'never', 'length': None}
    slower = [index for index, log in enumerate(logs) if log >= 0]
    if not slower:
        return {'verdict': 'always', 'length': None}
    last = slower[-1]
    fraction = logs[last] / (logs[last] - logs[last + 1])
    step = math.log(lengths[last + 1] / lengths[last])
    return {'verdict': 'from', 'length': lengths[last] * math.exp(fraction * step)}


def table(figures: Mapping) -> str:
    """The figures of `study` as aligned text."""
    settings = figures['settings']
    kind = 'Causal' if settings['is_causal'] else 'Bidirectional'
    torch = f'; PyTorch on {figures["torch_device"]}' if figures['torch_device'] else ''
    peaks = ', '.join(
        f'{timing.spread_text(peak, "{:,.0f}")} at N = {peak["length"]:,}'
        for peak in figures['peak_gflop_per_second']
    )
    lines = [
        f'{kind} attention, {settings["dtype"]}, {settings["num_heads"]} heads of '
        f'{settings["head_dim"]}, {settings["num_tokens"]:,} tokens in all or one longer sequence; '
        f'{figures["device"]}{torch}',
        f'Medians of {settings["rounds"]} rounds (lowest to highest). Ratios are times of our '
        "kernel over the row's in the same round: below 1 ours is faster.",
        "GFLOP/s and share of the peak count the algorithm's products; 'twice' also those that our "
        'blocks compute again.',
        f'Matrix-product peak in GFLOP/s: {peaks}',
    ]
    for features in settings['num_features']:
        for which, name in PASS_NAMES.items():
            rows = [
                row
                for row in figures['rows']
                if row['pass'] == which and row['num_features'] in (None, features)
            ]
            lines += ['', f'R = {features}, {name}', *_align(_time_cells(rows, which))]
    lines += ['', 'Where our linear attention is faster than the fastest exact one that ran']
    lines += [_say(found) for found in figures['crossovers']]
    if 'memory' in figures:
        limit = settings['quadratic_limit']
        lines += ['', 'Peak resident memory of forward and gradient, beyond the inputs']
        lines += [f'(not run: longer than --quadratic_limit={limit})']
        lines += _align(_memory_cells(figures['memory'], settings['lengths']))
    return '\n'.join(lines)


def _check_integers(name: str, values: Sequence[int]) -> list[int]:
    if not values or min(values) < 1 or len(set(values)) < len(values):
        raise BadInput(
            f'{name} is {list(values)}; allowed are integers ≥ 1, each once. Give some, as in '
            f'--{name}=256,1024.'
        )
    return sorted(values)


def _grows(contender: str, is_causal: bool) -> bool:
    """Whether N is limited, by time that grows with N² or by a state kept for every token."""
    return contender in EXACT or (is_causal and contender.startswith('performer_pytorch'))


def _peer_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ('torch', 'performer-pytorch')}


def _measure(
    cases: Sequence[_Case], rounds: int, is_causal: bool, on_progress: Callable[[str], None]
) -> dict:
    """Seconds of every (case, pass), and FLOP/s of the machine's peak for every length."""
    contenders = {}
    for length in sorted({case.length for case in cases}):
        on_progress(f'N = {length:,}: compiling and warming up')
        inputs = attention_contenders.make_inputs(length)
        for case in cases:
            if case.length != length:
                continue
            projection = attention_contenders.make_projection(case.num_features)
            for which in PASSES:
                call = attention_contenders.make_call(
                    case.contender, which, inputs, projection=projection, is_causal=is_causal
                )
                contenders[case, which] = timing.repeated(call)
        # One a length, so that it is measured in the same seconds as what is divided by it.
        contenders[length] = timing.matmul_peak()
    return timing.alternate(
        contenders, rounds, lambda number: on_progress(f'round {number} of {rounds}')
    )


def _row(case: _Case) -> dict:
    return {**case._asdict(), 'batch_size': batch_size(case.length)}


def _measured_row(
    case: _Case, which: str, cases: Sequence[_Case], measured: Mapping, is_causal: bool
) -> dict:
    seconds = measured[case, which]
    flops = _flops(case, which, is_causal)
    peak_seconds = [flops / peak for peak in measured[case.length]]
    fractions = [best / second for best, second in zip(peak_seconds, seconds, strict=True)]
    num_tokens = case.length * batch_size(case.length)
    row = {
        **_row(case),
        'pass': which,
        'seconds': timing.spread(seconds),
        'seconds_per_token': timing.spread([second / num_tokens for second in seconds]),
        'gflop_per_second': timing.spread([flops / second / 1e9 for second in seconds]),
        'fraction_of_peak': timing.spread(fractions),
    }
    if case.contender in OURS:
        row['time_ratios'] = {
            other.contender: timing.spread(
                [a / b for a, b in zip(seconds, measured[other, which], strict=True)]
            )
            for other in cases
            if _are_compared(case, other)
        }
        if which == 'gradient':
            kind = _kind(case)
            factor = 1 + _RECOMPUTED[kind] / _PRODUCTS[kind][which]
            row['fraction_of_peak_recomputing'] = timing.spread(
                [factor * fraction for fraction in fractions]
            )
    return row


def _kind(case: _Case) -> str:
    return 'exact' if case.num_features is None else 'linear'


def _flops(case: _Case, which: str, is_causal: bool) -> float:
    """Operations of the algorithm, without what is computed twice, for all sequences and heads."""
    if case.num_features is not None:
        product = 2 * case.length * case.num_features * HEAD_DIM
    elif is_causal:
        product = case.length * (case.length + 1) * HEAD_DIM
    else:
        product = 2 * case.length**2 * HEAD_DIM
    return _PRODUCTS[_kind(case)][which] * product * batch_size(case.length) * NUM_HEADS


def _are_compared(ours: _Case, other: _Case) -> bool:
    if other.length != ours.length or other == ours:
        return False
    return other.num_features is None or other.num_features == ours.num_features


def _crossovers(figures: Mapping) -> list[dict]:
    rows = [row for row in figures['rows'] if 'seconds' in row]
    found = []
    for which in PASSES:
        exact = {}  # Of the fastest at each length.
        for name in EXACT:
            for length, seconds in _medians(rows, name, None, which).items():
                exact[length] = min(seconds, exact.get(length, math.inf))
        for features in figures['settings']['num_features']:
            for name in (name for name in OURS if name not in EXACT):
                linear = _medians(rows, name, features, which)
                compared = sorted(exact)
                found.append({
                    'contender': name,
                    'num_features': features,
                    'pass': which,
                    'lengths': compared,
                    **crossover(
                        compared, [linear[n] for n in compared], [exact[n] for n in compared]
                    ),
                })  # fmt: skip
    return found


def _medians(
    rows: Sequence[Mapping], contender: str, num_features: int | None, which: str
) -> dict[int, float]:
    return {
        row['length']: row['seconds']['median']
        for row in rows
        if (row['contender'], row['num_features'], row['pass']) == (contender, num_features, which)
    }


def _time_cells(rows: Sequence[Mapping], which: str) -> list[list[str]]:
    kernels = [name for name in OURS if name not in EXACT]
    titles = ['N', 'contender', 'ms', 'µs/token', 'GFLOP/s', 'of peak']
    titles += ['twice'] if which == 'gradient' else []
    cells = [titles + [f'{name} / it' for name in kernels]]
    ratios = {
        (row['length'], row['contender']): row['time_ratios']
        for row in rows
        if 'time_ratios' in row
    }
    for row in rows:
        start = [f'{row["length"]:,}', row['contender']]
        if 'not_run' in row:
            cells.append([*start, f'not run: {row["not_run"]}'])
            continue
        line = [
            *start,
            timing.spread_text(row['seconds'], '{:,.1f}', 1e3),
            f'{1e6 * row["seconds_per_token"]["median"]:,.2f}',
            f'{row["gflop_per_second"]["median"]:,.1f}',
            f'{row["fraction_of_peak"]["median"]:.0%}',
        ]
        if which == 'gradient':
            twice = row.get('fraction_of_peak_recomputing')
            line.append(f'{twice["median"]:.0%}' if twice else '')
        for name in kernels:
            ratio = ratios[row['length'], name].get(row['contender'])
            line.append(timing.spread_text(ratio, '{:.2f}') if ratio else '')
        cells.append(line)
    return cells


def _memory_cells(rows: Sequence[Mapping], lengths: Sequence[int]) -> list[list[str]]:
    cells = [['R', 'contender', *(f'N = {length:,}' for length in lengths)]]
    for name, features in dict.fromkeys((row['contender'], row['num_features']) for row in rows):
        line = [str(features or ''), name]
        for length in lengths:
            (row,) = (
                row
                for row in rows
                if (row['contender'], row['num_features'], row['length'])
                == (name, features, length)
            )
            line.append(
                f'{row["peak_bytes"] / 2**20:,.0f} MiB' if 'peak_bytes' in row else 'not run'
            )
        cells.append(line)
    return cells


def crossover_text(found: Mapping, unknown: str) -> str:
    """Where `crossover` found one contender the faster, in words; `unknown` where nothing ran."""
    lengths = ', '.join(f'{length:,}' for length in found['lengths'])
    if found['verdict'] == 'from':
        return f'from N ≈ {found["length"]:,.0f} on (interpolated; measured at {lengths})'
    return {
        'always': f'at every N measured ({lengths})',
        'never': f'not at the longest N measured ({lengths})',
        'unknown': unknown,
    }[found['verdict']]


def _say(found: Mapping) -> str:
    """One crossover in words."""
    where = crossover_text(found, unknown='no exact attention ran')
    name = PASS_NAMES[found['pass']]
    return f'{found["contender"]}, R = {found["num_features"]}, {name}: {where}'


def _label(case: _Case) -> str:
    features = '' if case.num_features is None else f', R = {case.num_features}'
    return f'{case.contender}{features}'


def _align(cells: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, to the right, but for names, which are the second.

    A line with fewer cells than the first ends in a remark, which may be as long as it likes.
    """
    count = len(cells[0])
    widths = [
        max(len(line[column]) for line in cells if len(line) == count) for column in range(count)
    ]
    lines = []
    for line in cells:
        padded = [cell.rjust(width) for cell, width in zip(line, widths, strict=False)]
        padded[1] = line[1].ljust(widths[1])
        lines.append('  '.join(padded).rstrip())
    return lines
