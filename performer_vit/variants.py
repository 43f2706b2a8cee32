"""Variants of a config, each trained with each seed: comparisons, and ablations of one factor each.

A variant is a name and the fields that it changes, as a config of `configs/comparisons/` or
`configs/ablations/` lists them.
"""

import os
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax

from performer_vit import (
    comparison,
    crossval,
    datasets,
    figures,
    interruption,
    progress,
    train,
    typeset,
)
from performer_vit import workdir as run_directory
from performer_vit.errors import BadInput
from performer_vit.fields import OF_THE_TEST

# Fields that decide which images score a run.
_SCORED = {
    'compare': ('dataset.name', 'dataset.data_dir'),
    'ablate': (
        'dataset.name', 'dataset.data_dir', 'dataset.validation_fraction', 'dataset.split_seed',
        'dataset.num_folds', 'dataset.fold',
    ),
}  # fmt: skip
# What variants are compared by, and fields that change nothing of it.
_QUANTITIES = {'compare': 'test_accuracy', 'ablate': 'validation_accuracy'}
# What a series has in its directory beside the variants' own.
_OWN_FILES = ('figures', 'config.json', 'results.json', 'table.md', 'table.tex', 'table.csv')
_IDLE = {'compare': ('flip_averaging',), 'ablate': OF_THE_TEST}


def compare(config, workdir: str | os.PathLike | None = None, run_name: str = 'run') -> dict:
    """Trains and tests every variant of `config.compare` with every seed, and compares them.

    Each run has a directory of its own, VARIANT/seed_S. What is finished is not done again, what
    was interrupted goes on where it stopped, and a run of another config in its place is refused.
    A run that diverged, or needed more memory than there is, counts in no mean and is named.

    Args:
      config: as for `train.train`, with `compare.variants`, pairs of a name and a mapping of fields
        to values, `compare.seeds`, and `compare.baseline`, the name of the variant that the others
        are compared with.
      workdir: the directory of all runs; default `runs/<data set>/<run_name>-compare`.
      run_name: what the run is called in that default.

    Returns:
      The content of `results.json`: in `models` the rows of `comparison.summary` of the test
      accuracy.

    Raises:
      BadInput: something in the config, the data or a workdir cannot be used; all variants are
        checked before one is trained.
    """
    section = config.compare
    _check(section, 'compare', ('variants', 'seeds', 'baseline'))
    for row in section.variants:
        is_pair = isinstance(row, tuple | list) and len(row) == 2
        if not (is_pair and isinstance(row[0], str) and isinstance(row[1], Mapping)):
            raise BadInput(
                f'compare.variants has the row {row!r}; a row is a name and a mapping of fields to '
                "values, such as ('relu', {'model.attention.kernel': 'relu'})."
            )
    variants = {name: _change(config, 'compare', dict(fields)) for name, fields in section.variants}
    if len(variants) < len(section.variants):
        raise BadInput(
            f'compare.variants names one variant twice: {[name for name, _ in section.variants]}. '
            'Give each a name of its own.'
        )
    if section.baseline not in variants:
        raise BadInput(
            f'compare.baseline is {section.baseline!r}; allowed are the names in '
            f'compare.variants: {tuple(variants)}.'
        )
    return _run('compare', variants, section, workdir, run_name)


def ablate(config, workdir: str | os.PathLike | None = None, run_name: str = 'run') -> dict:
    """Trains the config and each change of `config.ablate`, one at a time; validation scores them.

    As `compare`, but the test split is not looked at: `ablate.changes` are mappings of fields to
    values, the variants are called by them, and the unchanged config is `base`.
    """
    section = config.ablate
    _check(section, 'ablate', ('changes', 'seeds'))
    variants = {'base': _change(config, 'ablate', {})}
    for change in section.changes:
        if not isinstance(change, Mapping) or not change:
            raise BadInput(
                f'ablate.changes has {change!r}; a change is a mapping of fields to values, such '
                "as {'model.pooling': 'gap'}."
            )
        name = ','.join(f'{field.split(".")[-1]}={value}' for field, value in change.items())
        if name in variants:
            raise BadInput(f'ablate.changes has {name} twice: take one of them away.')
        variants[name] = _change(config, 'ablate', dict(change))
    return _run('ablate', variants, section, workdir, run_name)


def _check(section, mode: str, fields: Sequence[str]) -> None:
    """Raises `BadInput` for a section with other fields, and for seeds that are none."""
    if set(section) != set(fields):
        raise BadInput(
            f'the section `{mode}` of the config has the fields {sorted(section)}; it needs just '
            f'these: {", ".join(fields)}.'
        )
    for field in set(fields) - {'baseline'}:
        if not isinstance(section[field], tuple | list):
            raise BadInput(
                f'{mode}.{field} is {section[field]!r}; it is a tuple, such as those in configs/.'
            )
    seeds = section.seeds
    if not seeds or any(type(seed) is not int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise BadInput(
            f'{mode}.seeds is {tuple(seeds)}; give one integer or more, each once, such as '
            f"--config.{mode}.seeds='(0, 1, 2)'."
        )


def _change(config, section: str, fields: Mapping[str, object]):
    """A copy of the config with some fields changed, without the section, on named data or none."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        del config[section]
    known = run_directory.flatten(config.to_dict())
    for field, value in fields.items():
        if field == 'seed':
            raise BadInput(
                f'{section}: a variant changes the seed; set {section}.seeds, which are those of '
                'every variant, instead.'
            )
        if field in _SCORED[section]:
            raise BadInput(
                f'{section}: a variant changes {field!r}, but all variants must be scored on the '
                'same images: change other fields, and set this one in the config.'
            )
        if field in _IDLE[section]:
            raise BadInput(
                f'{section}: a variant changes {field!r}, which changes nothing of the '
                f'{_QUANTITIES[section]} that variants are compared by: take it away.'
            )
        if field not in known:
            raise BadInput(
                f'{section}: a variant changes {field!r}, which is no field of the config; '
                'configs/base.py lists them.'
            )
        try:
            config.update_from_flattened_dict({field: value})
        except (TypeError, ValueError) as error:
            raise BadInput(
                f'{section}: a variant sets {field} to {value!r}; it is {known[field]!r} in the '
                f'config, of type {type(known[field]).__name__}, and so must be any other value.'
            ) from error
    config.dataset.fallback = 'none'
    return config


def _run(
    mode: str,
    variants: Mapping[str, object],
    section,
    workdir: str | os.PathLike | None,
    run_name: str,
) -> dict:
    """All variants with all seeds, then the report."""
    check, train_one = {
        'compare': (train.check, train.train),
        'ablate': (train.check_scored, _score),
    }[mode]
    if len(variants) < 2:
        field = {
            'compare': 'compare.variants has less than two',
            'ablate': 'ablate.changes is empty',
        }
        raise BadInput(f'{field[mode]}, so that there is nothing to compare: add one.')
    configs, directories = {}, {}
    for name, config in variants.items():
        twin = configs.setdefault(config.to_json(), name)
        if twin != name:
            raise BadInput(
                f'{mode}: the variants {twin!r} and {name!r} are the same config: take one away.'
            )
        directory = run_directory.directory_name(name)
        if not directory.strip('.') or directory in _OWN_FILES:
            raise BadInput(
                f'{mode}: the variant {name!r} would have the directory {directory!r}, which is '
                'no place for its runs: give it another name.'
            )
        # Some file systems take a and A for one.
        twin = directories.setdefault(directory.casefold(), name)
        if twin != name:
            raise BadInput(
                f'{mode}: the variants {twin!r} and {name!r} would be one directory: name them '
                'apart by letters, digits and - _ = . ,'
            )
        try:
            for seed in section.seeds:
                config.seed = seed
                check(config)
        except BadInput as error:
            raise BadInput(f'{mode}: variant {name!r}: {error}') from error
    name = f'{run_name}-{mode}'
    run_directory.check_writable(workdir or run_directory.default_workdir(name, ''))
    data = _check_data(mode, variants)
    dataset_name = next(iter(data.values()))['name']
    workdir = run_directory.claim(
        workdir or run_directory.default_workdir(name, dataset_name),
        # Variants and seeds may be added later; each run guards its own directory.
        run_directory.definition({'mode': mode}, {'name': dataset_name}),
    )
    runs = {}
    for seed in section.seeds:
        for variant in variants:
            config = variants[variant].copy_and_resolve_references()
            config.seed = seed
            directory = workdir / run_directory.directory_name(variant) / f'seed_{seed}'
            # All of them before the first is trained.
            run_directory.check_same(
                directory, run_directory.definition(config.to_dict(), data[variant])
            )
            if mode == 'compare':
                run_directory.check_tested(directory, data[variant]['test images'])
            runs[variant, seed] = config, directory
    open_runs = [not run_directory.is_finished(directory) for _, directory in runs.values()]
    rows, failed, started = [], [], time.perf_counter()
    for place, ((variant, seed), (config, directory)) in enumerate(runs.items()):
        left = progress.remaining(started, sum(open_runs[:place]), sum(open_runs))
        progress.say(dataset_name, f'Run {place + 1} of {len(runs)}: {variant}, seed {seed}{left}')
        try:
            rows.append({**train_one(config, directory), 'variant': variant})
        except Exception as error:
            message = train.own_failure(error)
            if message is None:
                raise
            failed.append({'variant': variant, 'seed': seed, 'error': message})
            progress.say(dataset_name, f'{variant}, seed {seed}, failed: {message}')
            interruption.end_series(interruption.was_asked(error))
        jax.clear_caches()
    if not rows:
        raise BadInput(f'{mode}: every run failed; the first: {failed[0]["error"]}')
    results = _report(mode, section, rows, failed, workdir)
    progress.say(dataset_name, (workdir / 'table.md').read_text(encoding='utf-8'))
    progress.say(dataset_name, f'Everything is in {workdir}')
    return results


def _check_data(mode: str, variants: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """Each variant's data as fingerprints; `BadInput` where a variant does not fit to them."""

    def load(config) -> datasets.Dataset:
        return datasets.load(**config.dataset) if mode == 'compare' else crossval.load_fold(config)

    def check(config, dataset: datasets.Dataset) -> None:
        if mode == 'compare':
            train.check_data(config, dataset)
        else:
            train.steps_per_epoch(config, len(dataset.train))

    prints, last = {}, None
    for name, config in variants.items():
        which = config.dataset.to_json()
        if which != last:
            dataset, last = load(config), which  # One at a time in memory.
            data = datasets.fingerprints(dataset)
        try:
            check(config, dataset)
        except BadInput as error:
            raise BadInput(f'{mode}: variant {name!r}: {error}') from error
        prints[name] = data
    return prints


def _score(config, workdir: pathlib.Path) -> dict:
    return train.validate(config, crossval.load_fold(config), workdir)


def _report(
    mode: str,
    section,
    rows: Sequence[Mapping],
    failed: Sequence[Mapping],
    workdir: pathlib.Path,
) -> dict:
    """Table, figures and `results.json` of the runs that did not fail."""
    quantity = _QUANTITIES[mode]
    baseline = section.baseline if mode == 'compare' else 'base'
    models = comparison.by_seed(rows, 'variant')
    summary = comparison.summary(models, baseline, quantity)
    names = {name: figures.variant_name(name) for name in models}
    table = comparison.table(summary, names, baseline, quantity)
    lines = [typeset.markdown(*table)]
    if baseline in models:
        lines.append(comparison.verdict(summary, names, baseline))
    lines += [
        f'{run["variant"]}, seed {run["seed"]}, failed and counts nowhere: {run["error"]}'
        for run in failed
    ]
    run_directory.write_text(workdir / 'table.md', '\n\n'.join(filter(None, lines)) + '\n')
    run_directory.write_text(workdir / 'table.tex', typeset.latex(*table) + '\n')
    run_directory.write_text(workdir / 'table.csv', typeset.comma_separated(summary))
    dataset = figures.DATASET_NAMES.get(rows[0]['dataset'], rows[0]['dataset'])
    what = {'compare': 'Comparison', 'ablate': 'One factor at a time'}[mode]
    title = f'{what} on {dataset}'
    histories = {name: [run['history'] for run in runs.values()] for name, runs in models.items()}
    # What an ablation changes nothing of, or the kernel alone, is a kernel's model.
    kernels = {
        row['variant']: row['kernel']
        for row in rows
        if mode == 'ablate' and row['variant'] in ('base', f'kernel={row["kernel"]}')
    }
    styles = figures.model_styles(list(models), kernels)
    drawn = {
        'comparison': figures.comparison(rows, title, quantity, styles),
        'learning_curves': figures.learning_bands(histories, title, styles),
        'pareto': figures.pareto(summary, title, quantity, styles),
    }
    if mode == 'compare':
        drawn['accuracy'] = figures.accuracy_by_time(rows)
    figures.save_all(drawn, workdir)
    results = {
        'mode': mode,
        'dataset': rows[0]['dataset'],
        'baseline': baseline,
        'quantity': quantity,
        'models': summary,
        'runs': [dict(row) for row in rows],
        'failed': list(failed),
    }
    run_directory.write_json(workdir / 'results.json', results)
    return results
