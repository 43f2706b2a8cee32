"""A table typeset for people and programs: Markdown, LaTeX, CSV."""

import csv
import io
from collections.abc import Mapping, Sequence

import tabulate


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned to the left, the others to the right."""
    lines = [head, ['---'] + ['---:'] * (len(head) - 1), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A LaTeX `tabular` with the rules of the package booktabs, aligned as `markdown` is."""
    text = tabulate.tabulate(
        rows, head, 'latex_booktabs', disable_numparse=True,
        colalign=('left', *['right'] * (len(head) - 1)),
    )  # fmt: skip
    # LaTeX knows – and ± in text, but Greek letters in formulas alone.
    return text.replace('θ', r'$\theta$')


def comma_separated(rows: Sequence[Mapping]) -> str:
    """CSV of numbers as they are: a column for each key of the first row; None is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
