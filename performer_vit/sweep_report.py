"""What a sweep leaves behind: `results.json`, tables, the best config, figures, and its words."""

import pathlib
import shlex
from collections.abc import Mapping, Sequence

from optuna.trial import FrozenTrial

from performer_vit import comparison, figures, sweep_figures, typeset
from performer_vit import workdir as run_directory
from performer_vit.space import Space
from performer_vit.trials import STATES, without_password

_KERNEL = 'model.attention.kernel'
_NOTES = ('epochs', 'seconds', 'message', 'device', 'versions')


def write(
    trials: Sequence[FrozenTrial],
    section,
    space: Space,
    base,
    dataset_name: str,
    workdir: pathlib.Path,
) -> dict:
    """Writes `results.json`, the tables and the best config of what there is so far.

    Args:
      trials: all of the sweep, in their order.
      section: the section `sweep` of the config.
      space: what it searches.
      base: the config without the section.
      dataset_name: what was really read.
      workdir: of the sweep.

    Returns:
      The content of `results.json`, with the trials from the best on.
    """
    rows = [
        {
            'number': trial.number,
            'state': STATES[trial.state],
            'params': space.values(trial.params),
            'value': trial.value,
            **{name: trial.user_attrs.get(name) for name in _NOTES},
        }
        for trial in trials
    ]
    rows.sort(key=_rank)
    best = rows[0] if rows and rows[0]['state'] == 'complete' else None
    results = {
        'mode': 'sweep',
        'dataset': dataset_name,
        'kernel': None if _KERNEL in rows[0]['params'] else base.model.attention.kernel,
        'config': base.to_dict(),
        **section.to_dict(),
        'storage': without_password(section.storage),
        'best': best,
        'trials': rows,
    }
    head, lines = table(results)
    text = typeset.markdown(head, lines)
    failed = [row for row in rows if row['message'] is not None]
    notes = [f'{_name(row)} failed: {row["message"]}' for row in failed]
    run_directory.write_text(workdir / 'table.md', '\n\n'.join([text, *notes]) + '\n')
    run_directory.write_text(workdir / 'table.tex', typeset.latex(head, lines) + '\n')
    numbers = [{**row, **row['params']} for row in rows]
    for row in numbers:
        del row['params'], row['versions']
    run_directory.write_text(workdir / 'table.csv', typeset.comma_separated(numbers))
    if best is not None:
        config = base.copy_and_resolve_references()
        config.update_from_flattened_dict(dict(best['params']))
        run_directory.write_text(workdir / 'best_config.py', config_file(config, best))
    run_directory.write_json(workdir / 'results.json', results)
    return results


def _rank(row: Mapping) -> tuple:
    """Complete trials first, then pruned ones, each from the best on."""
    return (
        list(STATES.values()).index(row['state']),
        -(row['value'] if row['value'] is not None else 0),
        row['number'],
    )


def table(results: Mapping) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of trials, in the order of the results."""
    names = short_names([row[0] for row in results['space']])
    head = ['trial', 'validation accuracy', 'state', 'epochs', 'minutes', *names.values()]
    lines = [
        [
            str(row['number']),
            _percent(row['value']),
            row['state'],
            comparison.NOTHING if row['epochs'] is None else str(row['epochs']),
            comparison.NOTHING if row['seconds'] is None else f'{row["seconds"] / 60:.1f}',
            *(_value_text(row['params'][field]) for field in names),
        ]
        for row in results['trials']
    ]
    return head, lines


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """For each field its last word, with spaces; the whole name where that does not tell it."""
    words = [field.rpartition('.')[2] for field in fields]
    return {
        field: word.replace('_', ' ') if words.count(word) == 1 and word != 'name' else field
        for field, word in zip(fields, words, strict=True)
    }


def config_file(config, best: Mapping) -> str:
    """A config file of all values of a config, as Python's literals."""

    def assignments(values: Mapping, prefix: str) -> list[str]:
        lines = []
        for name, value in values.items():
            if isinstance(value, Mapping):
                lines += ['', f'    {prefix}.{name} = ConfigDict()']
                lines += assignments(value, f'{prefix}.{name}')
            else:
                lines.append(f'    {prefix}.{name} = {value!r}')
        return lines

    values = config.to_dict()
    # Fields of the top level first: below them, each section is a paragraph.
    values = dict(sorted(values.items(), key=lambda item: isinstance(item[1], Mapping)))
    lines = '\n'.join(assignments(values, 'config'))
    score = _percent(best['value'])
    return f'''"""The best trial of a sweep, number {best['number']}: {score} on validation.

python run.py --config=DIR/best_config.py --workdir=NEW
"""

from ml_collections import ConfigDict


def get_config(arguments: str = '') -> ConfigDict:
    if arguments:
        raise ValueError(f'the config argument is {{arguments!r}}; this config takes none.')
    config = ConfigDict()
{lines}
    return config
'''


def draw(results: Mapping, trials: Sequence[FrozenTrial], workdir: pathlib.Path) -> list[str]:
    """Writes the figures that can be drawn, and returns lines about those that cannot."""
    dataset = figures.DATASET_NAMES.get(results['dataset'], results['dataset'])
    what = f'kernels on {dataset}' if results['kernel'] is None else figures.run_title(results)
    names = short_names([row[0] for row in results['space']])
    title = f'{_count(len(trials), "trial")} of {what}'
    colour = figures.MODEL_COLOURS.get(results['kernel'], figures.NEUTRAL)
    drawn, lines = sweep_figures.draw(trials, names, title, colour)
    figures.save_all(drawn, workdir)
    return lines


def combination(values: Mapping) -> str:
    """A combination in a line."""
    names = short_names(list(values))
    return ', '.join(f'{names[field]} {_value_text(value)}' for field, value in values.items())


def trial_ending(results: Mapping, number: int) -> str:
    """A line about how a trial ended, and the best so far."""
    (row,) = [row for row in results['trials'] if row['number'] == number]
    text = f'{_name(row)} {row["state"]} after {_count(row["epochs"], "epoch")}'
    if row['value'] is not None:
        text += f': {_percent(row["value"])}'
    if row['message'] is not None:
        text += f': {row["message"]}'
    best = results['best']
    if best is not None:
        text += f'; best so far {_percent(best["value"])}, {_name(best)}'
    return text


def ending(
    results: Mapping, undrawn: Sequence[str], orphans: Sequence[int], workdir: pathlib.Path
) -> str:
    """The table and what there is to know about a sweep that ends, or whose process does.

    Args:
      results: from `write`.
      undrawn: from `draw`.
      orphans: from `Trials.orphans`.
      workdir: of the sweep.
    """
    states = [row['state'] for row in results['trials']]
    counts = [f'{states.count(state)} {state}' for state in STATES.values() if state in states]
    lines = [
        (workdir / 'table.md').read_text(encoding='utf-8'),
        f'{len(states)} of {results["num_trials"]} trials: {", ".join(counts)}.',
        *undrawn,
    ]
    if orphans:
        names = ', '.join(_name({'number': number}) for number in orphans)
        lines.append(f'Interrupted, to be gone on with by the same command: {names}.')
    if states.count('running') > len(orphans):
        lines.append('Trials that run are those of other processes, which go on with them.')
    if results['best'] is None:
        lines.append('No trial is complete, so there is no best_config.py.')
    else:
        best = _name(results['best'])
        path = str(workdir / 'best_config.py')
        lines.append(
            f'Best: {best}, {_percent(results["best"]["value"])}. To train and test it: '
            f'python run.py --config={shlex.quote(path)} '
            f'--workdir={shlex.quote(f"{workdir}-{best}")}'
        )
        if ':' in path:
            lines.append('First copy that file to a path without a colon, which ends a --config.')
    return '\n'.join([*lines, f'Everything is in {workdir}'])


def _value_text(value: object) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def _count(number: int, what: str) -> str:
    return f'{number} {what}' if number == 1 else f'{number} {what}s'


def _name(row: Mapping) -> str:
    return f'trial_{row["number"]:04d}'


def _percent(value: float | None) -> str:
    return comparison.NOTHING if value is None else f'{100 * value:.2f} %'
