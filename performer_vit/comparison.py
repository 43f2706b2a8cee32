"""Several runs side by side: mean and spread over seeds, paired differences, what they support.

A run is the content of its `results.json`. A pair is two runs of the same seed: they see the same
images in the same order and, where their weights have the same shapes, begin with the same ones.
"""

import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

from performer_vit import timing, workdir
from performer_vit.errors import BadInput

CONFIDENCE = 0.95
_ROUNDING = 1e-9  # Of a difference: what is smaller beside it is none.
NOTHING = '–'  # In a table, what was not measured or has no spread.

# What runs of one kernel may differ in; those of two kernels also in the fields of the attention,
# which only their own features have.
_FREE = ('seed', 'dataset.data_dir', 'dataset.fallback', 'checkpoint.')
_ATTENTION = 'model.attention.'

_TIMES = ('train_seconds_per_epoch', 'images_per_second', 'inference_seconds')


def check_one_factor(rows: Sequence[Mapping]) -> None:
    """Raises `BadInput` where runs differ in more than kernel and seed.

    Kernels may differ in all of the attention; two runs of one kernel are two seeds of one model.
    """
    firsts: dict[str, Mapping] = {}
    for row in rows:
        first = firsts.setdefault(row['kernel'], row)
        different = _different(first, row, _FREE)
        different |= _different(rows[0], row, (*_FREE, _ATTENTION))
        if different:
            raise BadInput(
                f'a run with kernel {row["kernel"]!r} and seed {row["seed"]} is no part of this '
                'comparison, whose runs differ in the kernel and the seed alone; here also '
                f'{", ".join(f"{name} ({values})" for name, values in different.items())} differ. '
                'Put it into a directory of its own.'
            )


def _different(first: Mapping, row: Mapping, free: tuple[str, ...]) -> dict[str, str]:
    """What two runs differ in, by field, but for the fields that begin so."""
    ours, theirs = (workdir.flatten(run['config']) for run in (first, row))
    different = {
        field: f'{ours.get(field)!r} and {theirs.get(field)!r}'
        for field in sorted({*ours, *theirs})
        if ours.get(field) != theirs.get(field) and not field.startswith(free)
    }
    if first['dataset'] != row['dataset']:
        different['the data'] = f'{first["dataset"]} and {row["dataset"]}'
    return different


def by_seed(rows: Sequence[Mapping], field: str = 'kernel') -> dict[str, dict[int, Mapping]]:
    """The runs of each model by seed, models in the order of their first run.

    Args:
      rows: runs.
      field: of a run, the name of its model.

    Raises:
      BadInput: two runs of the same model and seed.
    """
    models: dict[str, dict[int, Mapping]] = {}
    for row in rows:
        seeds = models.setdefault(row[field], {})
        if row['seed'] in seeds:
            raise BadInput(
                f'there are two runs with {field} {row[field]!r} and seed {row["seed"]}: take one '
                'of them away.'
            )
        seeds[row['seed']] = row
    return models


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of the sample (n − 1); None of too few values."""
    return (
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict | None:
    """Student's t of the differences value − baseline over the seeds that both have.

    Args:
      values: a quantity by seed.
      baseline: the same of what is compared with.

    Returns:
      `mean` of the n differences, `low` and `high`: mean ± t · s/√n, the interval that holds the
      expected difference with `CONFIDENCE` where differences are normal, `p`: the two-sided
      probability of a mean as far from 0 where the expectation is 0, and `n`. None where there is
      no spread to judge by: of fewer than two seeds, or of differences that are all the same, as
      those of few test images may be by chance.
    """
    seeds = sorted(set(values) & set(baseline))
    differences = [values[seed] - baseline[seed] for seed in seeds]
    if len(seeds) < 2:
        return None
    mean, deviation = mean_and_deviation(differences)
    if deviation <= _ROUNDING * abs(mean):
        return None
    error = deviation / len(seeds) ** 0.5
    student = stats.t(len(seeds) - 1)
    reach = student.ppf((1 + CONFIDENCE) / 2) * error
    return {
        'mean': mean,
        'low': mean - reach,
        'high': mean + reach,
        'p': 2 * student.sf(abs(mean) / error),
        'n': len(seeds),
    }


def interval_of_folds(values: Sequence[float]) -> tuple[float, float]:
    """The interval of the expected score of a k-fold cross-validation, with `CONFIDENCE`.

    mean ± t_{k-1} · s · √(1/k + 1/(k-1)). Two folds' models share most of their training images, so
    their scores are not independent, and s/√k is too small. The second term, the ratio of scored to
    training images, makes up for that (Nadeau and Bengio 2003, "Inference for the generalization
    error"). No estimate of that variance is unbiased, so the interval is approximate.

    Args:
      values: the score of each of the k ≥ 2 folds.
    """
    k = len(values)
    mean, deviation = mean_and_deviation(values)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, k - 1) * deviation * (1 / k + 1 / (k - 1)) ** 0.5
    return float(mean - reach), float(mean + reach)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number: the chance of one false claim or more stays p.

    Holm 1979: the i-th smallest of m, from 0, times m − i, never below the one before, at most 1.
    """
    corrected, running = {}, 0.0
    ordered = sorted(p_values, key=p_values.get)
    for i, name in enumerate(ordered):
        running = max(running, min(1.0, (len(ordered) - i) * p_values[name]))
        corrected[name] = running
    return corrected


def against(
    models: Mapping[str, Mapping[int, Mapping]], baseline: str, quantity: str
) -> dict[str, dict]:
    """What `paired` says of every other model against `baseline`, with `holm_p` beside `p`.

    Args:
      models: see `by_seed`.
      baseline: the name of a model.
      quantity: a field of `results.json`; runs without it are left out.
    """
    values = {
        name: {seed: row[quantity] for seed, row in seeds.items() if row[quantity] is not None}
        for name, seeds in models.items()
    }
    results = {name: paired(values[name], values[baseline]) for name in values if name != baseline}
    # What has no spread was compared as well: without it, the others would be corrected for less.
    corrected = holm({
        name: 1.0 if result is None else result['p']
        for name, result in results.items()
        if len(set(values[name]) & set(values[baseline])) > 1
    })  # fmt: skip
    return {
        name: {**result, 'holm_p': corrected[name]}
        for name, result in results.items()
        if result is not None
    }


def summary(
    models: Mapping[str, Mapping[int, Mapping]], baseline: str | None, quantity: str
) -> list[dict]:
    """What a comparison says of each model, in numbers.

    Args:
      models: see `by_seed`.
      baseline: the name of the model that the others are compared with, if it is there.
      quantity: the field of `results.json` that is compared, an accuracy from 0 to 1.

    Returns:
      A row for each model: its name as `model`, the number of `runs`; of `quantity` the mean over
      the seeds under its own name and the standard deviation under NAME_deviation; of
      `train_seconds_per_epoch`, `inference_seconds` and `images_per_second` the median, which one
      disturbed run does not move, and the ends under NAME_low and NAME_high; `difference`, the mean
      difference from the baseline over the seeds that both have, with `difference_low`,
      `difference_high` and `holm_p`, see `against`, where these are two or more; `num_params` and
      `train_gflop_per_image`. What was not measured, or has no spread, is None.
    """
    compared = against(models, baseline, quantity) if baseline in models else {}
    rows = []
    for name, seeds in models.items():
        runs, found = list(seeds.values()), compared.get(name, {})
        shared = set() if name == baseline else set(seeds) & set(models.get(baseline, ()))
        differences = [seeds[seed][quantity] - models[baseline][seed][quantity] for seed in shared]
        row = {'model': name, 'runs': len(runs)}
        values = [run[quantity] for run in runs if run.get(quantity) is not None]
        row[quantity], row[f'{quantity}_deviation'] = mean_and_deviation(values)
        for field in _TIMES:
            values = [run[field] for run in runs if run.get(field) is not None]
            measured = timing.spread(values) if values else {}
            row[field] = measured.get('median')
            for end in ('low', 'high'):
                row[f'{field}_{end}'] = measured.get(end) if len(values) > 1 else None
        row |= {
            'difference': mean_and_deviation(differences)[0],
            'difference_low': found.get('low'),
            'difference_high': found.get('high'),
            'holm_p': found.get('holm_p'),
            'num_params': runs[0]['num_params'],
            'train_gflop_per_image': runs[0]['train_gflop_per_image'],
        }
        rows.append(row)
    return rows


def table(
    rows: Sequence[Mapping], names: Mapping[str, str], baseline: str | None, quantity: str
) -> tuple[list[str], list[list[str]]]:
    """The rows of `summary` as the head and the lines of a table to read.

    A column in which nothing was measured is left out.

    Args:
      rows: from `summary`.
      names: what each model is called in the table.
      baseline, quantity: those of `summary`.
    """
    # Digits take a fraction of a second an epoch, where whole seconds would say nothing.
    shortest = min(row['train_seconds_per_epoch'] for row in rows)
    seconds = '{:.0f}' if shortest >= 10 else '{:.2f}'
    inferences = [row['inference_seconds'] for row in rows]
    inference = '{:.1f}' if min(filter(None, inferences), default=1) >= 1 else '{:.3f}'
    minus = f'minus the {names[baseline]}' if baseline in names else 'difference'
    cells = {
        'model': [names[row['model']] for row in rows],
        'seeds': [str(row['runs']) for row in rows],
        quantity.replace('_', ' '): [percent(row, quantity) for row in rows],
        minus: [_text(row['difference'], '{:+z.2f}', 100) for row in rows],
        '95 % interval': [_interval(row) for row in rows],
        'p (Holm)': [_text(row['holm_p'], '{:.2g}') for row in rows],
        's/epoch': [median(row, 'train_seconds_per_epoch', seconds) for row in rows],
        'images/s': [median(row, 'images_per_second', '{:,.0f}') for row in rows],
        'inference s': [median(row, 'inference_seconds', inference) for row in rows],
        'parameters': [f'{row["num_params"]:,}' for row in rows],
        'GFLOP an image': [_text(row['train_gflop_per_image'], '{:.3f}') for row in rows],
    }
    cells = {head: column for head, column in cells.items() if set(column) != {NOTHING}}
    return list(cells), [list(line) for line in zip(*cells.values(), strict=True)]


def median(row: Mapping, field: str, pattern: str) -> str:
    """'median (low to high)' of a time in a row of `summary`, as much of it as there is."""
    low, high = (row[f'{field}_{end}'] for end in ('low', 'high'))
    if low is None:
        return _text(row[field], pattern)
    return timing.spread_text({'median': row[field], 'low': low, 'high': high}, pattern)


def percent(row: Mapping, field: str) -> str:
    """'mean ± standard deviation' of a share from 0 to 1 in a row of `summary`, in percent."""
    mean, deviation = row[field], row[f'{field}_deviation']
    if mean is None:
        return NOTHING
    return (
        f'{100 * mean:.2f} %'
        if deviation is None
        else f'{100 * mean:.2f} ± {100 * deviation:.2f} %'
    )


def verdict(rows: Sequence[Mapping], names: Mapping[str, str], baseline: str) -> str | None:
    """The differences that the rows of `summary` support, as a sentence; None without any."""
    compared = [row for row in rows if row['holm_p'] is not None]
    supported = [
        f'{names[row["model"]]} {"above" if row["difference"] > 0 else "below"} the '
        f'{names[baseline]}'
        for row in compared
        if row['holm_p'] < 1 - CONFIDENCE
    ]
    if not compared:
        return None
    return (
        f'Differences from the {names[baseline]} that the data support (jointly, with '
        f'{CONFIDENCE:.0%} confidence, Holm): {", ".join(supported) or "none"}.'
    ).replace('%', ' %')


def _text(value: float | None, pattern: str, scale: float = 1) -> str:
    return NOTHING if value is None else pattern.format(scale * value)


def _interval(row: Mapping) -> str:
    if row['difference_low'] is None:
        return NOTHING
    return f'{100 * row["difference_low"]:+z.2f} to {100 * row["difference_high"]:+z.2f}'
