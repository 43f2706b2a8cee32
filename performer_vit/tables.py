"""Tables and figures of several runs, from their results alone.

    python -m performer_vit.tables results/cifar10-3-epochs

prints a Markdown table of the `*.json` files in a directory (each the `results.json` of a run) and
draws `comparison.png` beside them.
"""

import pathlib
import sys

from performer_vit import figures, workdir
from performer_vit.errors import BadInput


def read(directory: str | pathlib.Path) -> list[dict]:
    """The results in a directory, the ViT first, in the order of the study's table."""
    paths = sorted(pathlib.Path(directory).glob('*.json'))
    if not paths:
        raise BadInput(
            f'{directory} holds no *.json: put the results.json of each run there, under a name '
            'of its own.'
        )
    rows = [workdir.read_json(path) for path in paths]
    kernels = list(figures.MODEL_NAMES)
    return sorted(rows, key=lambda row: (kernels.index(row['kernel']), row['seed']))


def markdown(rows: list[dict]) -> str:
    """A Markdown table, a row a run: accuracy, seconds, size. Nothing in it was not measured."""
    lines = [
        '| model | test accuracy | validation accuracy | s/epoch | inference s | parameters |',
        '| --- | ---: | ---: | ---: | ---: | ---: |',
    ]
    for row in rows:
        validation = row['validation_accuracy']
        cells = (
            figures.model_name(row['kernel']),
            f'{row["test_accuracy"]:.2%}',
            '–' if validation is None else f'{validation:.2%}',
            f'{row["train_seconds_per_epoch"]:.0f}',
            f'{row["inference_seconds"]:.1f}',
            f'{row["num_params"]:,}',
        )
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def main(argv: list[str]) -> None:
    """Prints the table of a directory and draws its figure."""
    if len(argv) != 2:
        sys.exit('error: give one directory: python -m performer_vit.tables DIRECTORY')
    try:
        rows = read(argv[1])
        epochs = ', '.join(sorted({str(row['epochs']) for row in rows}))
        title = f'ViT and Performers on {rows[0]["dataset"]}, {epochs} epochs'
        figures.save(figures.comparison(rows, title), pathlib.Path(argv[1]) / 'comparison.png')
    except BadInput as error:
        sys.exit(f'error: {error}')
    print(markdown(rows))


if __name__ == '__main__':
    main(sys.argv)
