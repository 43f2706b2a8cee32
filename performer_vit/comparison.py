"""Several runs side by side: mean and spread over seeds, paired differences, what they support.

A run is the content of its `results.json`. Runs of one comparison differ in the attention kernel
and in the seed alone. A pair is two runs of the same seed: they begin with the same weights and see
the same images in the same order.
"""

import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

from performer_vit import workdir
from performer_vit.errors import BadInput

CONFIDENCE = 0.95

# What runs of one comparison may differ in: the kernel with the fields that only its own features
# have, the seed, and where files lie.
_FREE = ('model.attention.', 'seed', 'dataset.data_dir', 'dataset.fallback', 'checkpoint.')


def check_one_factor(rows: Sequence[Mapping]) -> None:
    """Raises `BadInput` where two runs differ in more than the attention and the seed."""
    first = workdir.flatten(rows[0]['config'])
    for row in rows[1:]:
        other = workdir.flatten(row['config'])
        different = [
            f'{field} ({first.get(field)!r} and {other.get(field)!r})'
            for field in sorted({*first, *other})
            if first.get(field) != other.get(field) and not field.startswith(_FREE)
        ]
        if different or row['dataset'] != rows[0]['dataset']:
            different += [row['dataset']] if row['dataset'] != rows[0]['dataset'] else []
            raise BadInput(
                f'a run with kernel {row["kernel"]!r} and seed {row["seed"]} is no part of this '
                f'comparison, whose runs differ in the attention and the seed alone; here also '
                f'{", ".join(different)} differ. Put it into a directory of its own.'
            )


def by_kernel(rows: Sequence[Mapping]) -> dict[str, dict[int, Mapping]]:
    """The runs of each kernel by seed, kernels in the order of their first run.

    Raises:
      BadInput: two runs of the same kernel and seed.
    """
    models: dict[str, dict[int, Mapping]] = {}
    for row in rows:
        seeds = models.setdefault(row['kernel'], {})
        if row['seed'] in seeds:
            raise BadInput(
                f'there are two runs with kernel {row["kernel"]!r} and seed {row["seed"]}: take '
                'one of them away.'
            )
        seeds[row['seed']] = row
    return models


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation of the sample (n − 1); None of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict | None:
    """Student's t of the differences value − baseline over the seeds that both have.

    Args:
      values: a quantity by seed.
      baseline: the same of what is compared with.

    Returns:
      `mean` of the n differences, `low` and `high`: mean ± t · s/√n, the interval that holds the
      expected difference with `CONFIDENCE` where differences are normal, `p`: the two-sided
      probability of a mean as far from 0 where the expectation is 0, and `n`. None with fewer than
      two seeds, which have no spread.
    """
    seeds = sorted(set(values) & set(baseline))
    differences = [values[seed] - baseline[seed] for seed in seeds]
    if len(seeds) < 2:
        return None
    mean, deviation = mean_and_deviation(differences)
    error = deviation / len(seeds) ** 0.5
    if not error:
        return {'mean': mean, 'low': mean, 'high': mean, 'p': float(mean == 0), 'n': len(seeds)}
    student = stats.t(len(seeds) - 1)
    reach = student.ppf((1 + CONFIDENCE) / 2) * error
    return {
        'mean': mean,
        'low': mean - reach,
        'high': mean + reach,
        'p': 2 * student.sf(abs(mean) / error),
        'n': len(seeds),
    }


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
    """What `paired` says of every other kernel against `baseline`, with `holm_p` beside `p`.

    Args:
      models: see `by_kernel`.
      baseline: a kernel.
      quantity: a field of `results.json`; runs without it are left out.
    """
    values = {
        kernel: {seed: row[quantity] for seed, row in seeds.items() if row[quantity] is not None}
        for kernel, seeds in models.items()
    }
    results = {
        kernel: paired(values[kernel], values[baseline]) for kernel in values if kernel != baseline
    }
    results = {kernel: result for kernel, result in results.items() if result is not None}
    corrected = holm({kernel: result['p'] for kernel, result in results.items()})
    return {kernel: {**result, 'holm_p': corrected[kernel]} for kernel, result in results.items()}
