"""The tables and figures of the README, from the published results alone.

    python -m performer_vit.tables

rewrites what stands in README.md between `<!-- begin KIND PATH -->` and `<!-- end -->`, and draws
the figures beside the results. KIND is one of `TABLES`; PATH is a file or directory of `results/`
with the `results.json` of runs, or with what a benchmark measured, each under a name of its own.
"""

import functools
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from performer_vit import (
    chaos,
    comparison,
    crossval,
    figures,
    sweep_report,
    timing,
    typeset,
    workdir,
)
from performer_vit.errors import BadInput, choose

_BLOCK = re.compile(r'(<!-- begin (\S+) (\S+) -->\n).*?(<!-- end -->)', re.DOTALL)

# Test accuracy, seconds a training epoch and seconds for the test images on one NVIDIA A100, as the
# study gives them, and what its recipe was.
STUDY = {
    'exact': (84.79, 56, 5.0, 'width 256, depth 8, MLP 512, Adam'),
    'relu': (87.39, 31, 3.0, 'width 960, depth 4, SGD'),
    'gelu': (88.64, 31.5, 3.05, 'width 768, depth 1, Adam'),
    'softmax': (86.17, 34, 3.02, 'width 768, depth 3, Adam'),
    'elu': (77.48, 13.11, 1.49, 'as GELU'),
    'ftheta': (85.08, 29.85, 2.95, 'width 768, depth 5, SGD'),
}
_BASELINE = 'exact'


def read(path: str | pathlib.Path) -> list[dict]:
    """The results of a directory's `*.json`: the ViT first, in the order of the study's table."""
    rows = [{**workdir.read_json(file), 'name': file.stem} for file in _files(path)]
    kernels = list(figures.MODEL_NAMES)
    return sorted(rows, key=lambda row: (kernels.index(row['kernel']), row['seed']))


def _files(path: str | pathlib.Path) -> list[pathlib.Path]:
    paths = sorted(pathlib.Path(path).glob('*.json'))
    if not paths:
        raise BadInput(
            f'{path} holds no *.json: put the JSON file of each run or measurement there, under a '
            'name of its own.'
        )
    return paths


def runs_table(path: pathlib.Path) -> str:
    """What each run of a directory reached, what it cost, and where: machines may differ."""
    rows = read(path)
    lines = [
        {
            'run': f'`{row["name"]}`',
            'model': figures.model_name(row['kernel']),
            'test accuracy': f'{row["test_accuracy"]:.2%}',
            'minutes of training': f'{_minutes(row):.0f}',
            'epochs': str(row['epochs']),
            'images/s': f'{row["images_per_second"]:,.0f}',
            'parameters': f'{row["num_params"]:,}',
            'tokens': str(row['num_tokens']),
            'GFLOP an image, training': f'{row["train_gflop_per_image"]:.3f}',
            'inference s': f'{row["inference_seconds"]:.1f}',
            'on': row['device'],
        }
        for row in rows
    ]
    table = typeset.markdown(list(lines[0]), [list(line.values()) for line in lines])
    return f'{table}\n\n{_origin(rows)}'


def chaos_table(path: pathlib.Path) -> str:
    """Faults that trainings were to survive, and what each cost."""
    outcome = workdir.read_json(path)
    return f'{chaos.table(outcome)}\n\n{_origin([outcome])}'


def crossval_table(path: pathlib.Path) -> str:
    """A line a fold of a cross-validation, their mean, and its interval."""
    results = workdir.read_json(path)
    return f'{typeset.markdown(*crossval.table_of_folds(results))}\n\n{_origin([results])}'


def sweep_table(path: pathlib.Path) -> str:
    """A line a trial of a sweep, from the best on."""
    results = workdir.read_json(path)
    ended = [row for row in results['trials'] if row['device'] is not None]
    return f'{typeset.markdown(*sweep_report.table(results))}\n\n{_origin(ended)}'


def _compared(path: pathlib.Path) -> list[dict]:
    rows = read(path)
    comparison.check_one_factor(rows)
    return rows


def comparison_table(path: pathlib.Path) -> str:
    """Mean ± standard deviation of each kernel's accuracy, its difference from the ViT, times."""
    rows = _compared(path)
    models = comparison.by_seed(rows)
    summary = comparison.summary(models, _BASELINE, 'test_accuracy')
    table = comparison.table(summary, figures.MODEL_NAMES, _BASELINE, 'test_accuracy')
    verdict = comparison.verdict(summary, figures.MODEL_NAMES, _BASELINE)
    parts = [typeset.markdown(*table), verdict, _origin(rows)]
    return '\n\n'.join(part for part in parts if part)


def study_table(path: pathlib.Path) -> str:
    """The study's figures beside ours, for the models that both have."""
    head = (
        'model', "the study's test accuracy", 'its recipe', 'its s/epoch, A100', 'ours',
        'our s/epoch', 'difference from the ViT: the study', 'ours',
    )  # fmt: skip
    summary = comparison.summary(comparison.by_seed(_compared(path)), _BASELINE, 'test_accuracy')
    ours = {row['model']: row for row in summary}
    lines = []
    for kernel in (kernel for kernel in STUDY if kernel in ours):
        accuracy, seconds, _, recipe = STUDY[kernel]
        difference = 0.0 if kernel == _BASELINE else ours[kernel]['difference']
        lines.append([
            figures.model_name(kernel),
            f'{accuracy:.2f} %',
            recipe,
            f'{seconds:.0f}',
            comparison.percent(ours[kernel], 'test_accuracy'),
            comparison.median(ours[kernel], 'train_seconds_per_epoch', '{:.0f}'),
            f'{accuracy - STUDY[_BASELINE][0]:+z.2f}',
            comparison.NOTHING if difference is None else f'{100 * difference:+z.2f}',
        ])  # fmt: skip
    return typeset.markdown(head, lines)


def ablation_table(path: pathlib.Path) -> str:
    """One change of `base.json` a row, named by the fields in which the configs differ.

    What a change costs is said in operations: the runs may come from machines of different speed.
    """
    base = workdir.read_json(path / 'base.json')
    head = ('change', 'validation accuracy', 'difference', 'parameters', 'GFLOP an image')
    rows = [row for row in read(path) if row['name'] != 'base']
    rows.sort(key=lambda row: _change(base, row))
    lines = []
    for row in [base, *rows]:
        difference = 100 * (row['validation_accuracy'] - base['validation_accuracy'])
        lines.append([
            'nothing' if row is base else _change(base, row),
            f'{row["validation_accuracy"]:.2%}',
            '–' if row is base else f'{difference:+z.2f}',
            f'{row["num_params"]:,}',
            f'{row["train_gflop_per_image"]:.3f}',
        ])  # fmt: skip
    return f'{typeset.markdown(head, lines)}\n\n{_origin([base, *rows])}'


def train_step_table(path: pathlib.Path) -> str:
    """What `benchmark train_step` measured of each config, PyTorch's step beside it where it ran.

    Medians and, in brackets, the lowest and highest of the rounds.
    """
    head = (
        'config', 'parameters', 'GFLOP an image', 'images/s', 'GFLOP/s', 'of the peak',
        "whole loop's images/s", "PyTorch's images/s", 'times as fast as PyTorch',
    )  # fmt: skip
    peers = ('torch_images_per_second', '{:.1f}'), ('bare_step_over_torch', '{:.2f}')
    rows = [(file, workdir.read_json(file)) for file in _files(path)]
    lines = []
    for file, row in rows:
        lines.append([
            f'`{file.stem}`',
            f'{row["num_params"]:,}',
            f'{row["gflop_per_image"]:.3f}',
            timing.spread_text(row['images_per_second'], '{:.1f}'),
            f'{row["gflop_per_second"]["median"]:.0f}',
            f'{row["fraction_of_peak"]["median"]:.0%}',
            timing.spread_text(row['loop_images_per_second'], '{:.1f}'),
            *(timing.spread_text(row[name], p) if name in row else '–' for name, p in peers),
        ])  # fmt: skip
    return f'{typeset.markdown(head, lines)}\n\n{_origin([row for _, row in rows])}'


def tokens_table(path: pathlib.Path) -> str:
    """Milliseconds of an image by its tokens, and how many times as fast as a ViT Performers are.

    The second by the clock and, in brackets, as operations alone would have it.
    """
    study = workdir.read_json(path)
    passes = list(dict.fromkeys(row['pass'] for row in study['rows']))
    lengths = study['settings']['lengths']
    contenders = list(dict.fromkeys(row['contender'] for row in study['rows']))
    rows = {(row['pass'], row['length'], row['contender']): row for row in study['rows']}
    columns = [(which, length) for which in passes for length in lengths]
    head = [f'{which}, {length:,} tokens' for which, length in columns]

    def milliseconds(row: Mapping) -> str:
        if 'not_run' in row:
            return 'not run'
        return f'{1e3 * row["seconds_per_image"]["median"]:,.1f}'

    def speed(row: Mapping, vit: str) -> str:
        """The ratios of the study are of times."""
        found = row.get('time_ratios', {}).get(vit)
        clock = f'{1 / found["median"]:.2f}' if found else 'not run'
        return f'{clock} ({1 / row["flop_ratios"][vit]:.2f})'

    def lines(cell: Callable[[Mapping], str], names: Sequence[str]) -> list[list[str]]:
        return [
            [figures.MODEL_LINES[name][3], *(cell(rows[*column, name]) for column in columns)]
            for name in names
        ]

    performers = [name for name in contenders if 'flop_ratios' in rows[*columns[0], name]]
    vits = [name for name in contenders if name not in performers]
    parts = [
        'Milliseconds an image:',
        typeset.markdown(['model', *head], lines(milliseconds, contenders)),
    ]
    for vit in vits:
        parts += [
            f'Times as fast as {figures.MODEL_LINES[vit][3]} (by operations alone):',
            typeset.markdown(
                ['model', *head], lines(functools.partial(speed, vit=vit), performers)
            ),
        ]
    return '\n\n'.join([*parts, _origin([study])])


def _change(base: Mapping, row: Mapping) -> str:
    ours, others = (workdir.flatten(run['config']) for run in (base, row))
    changes = [
        f'`{field}` {others.get(field)}, not {ours.get(field)}'
        for field in sorted({*ours, *others})
        if ours.get(field) != others.get(field)
    ]
    if not changes:
        raise BadInput(f'{row["name"]}.json has the config of base.json: an ablation changes it.')
    return '; '.join(changes)


def _minutes(row: Mapping) -> float:
    return sum(epoch['seconds'] for epoch in row['history']) / 60


def _origin(rows: Sequence[Mapping]) -> str:
    """Where the numbers come from: machine, versions and commits."""
    devices = ', '.join(sorted({row['device'] for row in rows}))
    jax = ', '.join(sorted({row['versions']['jax'] for row in rows}))
    commits = sorted({str(row['versions']['git_commit'])[:7] for row in rows})
    return f'Measured on {devices}, JAX {jax}, commit {", ".join(commits)}.'


def _draw_runs(path: pathlib.Path) -> None:
    """A figure each: minutes of different machines do not go on one axis. KERNEL-SIZE.json."""
    for file in _files(path):
        figure = figures.accuracy_by_time([workdir.read_json(file)], file.stem.partition('-')[2])
        figures.save(figure, file.with_suffix('.png'))


def _draw_crossval(path: pathlib.Path) -> None:
    figure = crossval.learning_curves(workdir.read_json(path))
    figures.save(figure, path.with_suffix('.png'))


def _draw_comparison(path: pathlib.Path) -> None:
    rows = _compared(path)
    epochs = ', '.join(sorted({str(row['epochs']) for row in rows}))
    dataset = figures.DATASET_NAMES.get(rows[0]['dataset'], rows[0]['dataset'])
    title = f'ViT and Performers on {dataset}, {epochs} epochs'
    figures.save(figures.comparison(rows, title), path / 'comparison.png')
    histories = {
        kernel: [run['history'] for run in runs.values()]
        for kernel, runs in comparison.by_seed(rows).items()
    }
    figures.save(figures.learning_bands(histories, title), path / 'learning_curves.png')
    learnt = path / 'learnt_kernel.npz'
    if learnt.exists():
        colour = figures.MODEL_COLOURS['ftheta']
        title = f'{figures.MODEL_NAMES["ftheta"]} on {dataset}: the learnt kernel'
        figure = figures.kernel_profiles(workdir.read_arrays(learnt), title, colour=colour)
        figures.save(figure, learnt.with_suffix('.png'))


def _draw_tokens(path: pathlib.Path) -> None:
    study = workdir.read_json(path)
    if len(study['settings']['lengths']) > 1:  # One length makes no curve.
        figures.save_model_speed(study, path)


def _draw_nothing(path: pathlib.Path) -> None:
    """The table says it all."""


TABLES = {
    'runs': (runs_table, _draw_runs),
    'comparison': (comparison_table, _draw_comparison),
    'study': (study_table, _draw_nothing),
    'ablations': (ablation_table, _draw_nothing),
    'chaos': (chaos_table, _draw_nothing),
    'crossval': (crossval_table, _draw_crossval),
    'sweep': (sweep_table, _draw_nothing),
    'train_step': (train_step_table, _draw_nothing),
    'tokens': (tokens_table, _draw_tokens),
}


def blocks(text: str, root: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    """Kind and path of every generated block of a Markdown text; paths are relative to `root`."""
    found = [(kind, root / path) for _, kind, path, _ in _BLOCK.findall(text)]
    for kind, _ in found:
        choose('the kind of a generated table', kind, TABLES)
    return found


def rewrite(text: str, root: pathlib.Path) -> str:
    """A Markdown text with every generated block made anew from the results under `root`."""
    blocks(text, root)
    return _BLOCK.sub(
        lambda match: f'{match[1]}{TABLES[match[2]][0](root / match[3])}\n{match[4]}', text
    )


def main(argv: list[str]) -> None:
    """Rewrites the README of this directory, or the Markdown file that is given, and draws."""
    if len(argv) > 2:
        sys.exit('error: give no argument, or one Markdown file')
    path = pathlib.Path(argv[1] if len(argv) == 2 else 'README.md')
    try:
        if not path.is_file():
            raise BadInput(f'{path} is not a file: run this where README.md is, or name one.')
        text = path.read_text(encoding='utf-8')
        for kind, results in blocks(text, path.parent):
            TABLES[kind][1](results)
            print(f'{kind:<12}{results}')
        workdir.write_text(path, rewrite(text, path.parent))
    except BadInput as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main(sys.argv)
