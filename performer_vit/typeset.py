"""A table typeset for people and programs: Markdown, LaTeX, CSV."""

import csv
import io
from collections.abc import Mapping, Sequence

import tabulate

# LaTeX knows – and ± in text, but these in formulas alone.
_LATEX = str.maketrans({
    'α': r'$\alpha$', 'β': r'$\beta$', 'γ': r'$\gamma$', 'δ': r'$\delta$', 'ε': r'$\epsilon$',
    'η': r'$\eta$', 'θ': r'$\theta$', 'κ': r'$\kappa$', 'λ': r'$\lambda$', 'μ': r'$\mu$',
    'ν': r'$\nu$', 'π': r'$\pi$', 'ρ': r'$\rho$', 'σ': r'$\sigma$', 'τ': r'$\tau$',
    'φ': r'$\varphi$', 'ψ': r'$\psi$', 'ω': r'$\omega$', '→': r'$\to$', '²': r'\textsuperscript{2}',
    '≤': r'$\le$', '≥': r'$\ge$', '×': r'$\times$',
})  # fmt: skip


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned to the left, the others to the right.

    What would end a cell or a line is escaped; other marks are the caller's, such as `code`.
    """
    lines = [
        [cell.replace('|', r'\|').replace('\n', ' ') for cell in line] for line in (head, *rows)
    ]
    lines.insert(1, ['---'] + ['---:'] * (len(head) - 1))
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A LaTeX `tabular` with the rules of the package booktabs, aligned as `markdown` is."""
    text = tabulate.tabulate(
        rows, head, 'latex_booktabs', disable_numparse=True,
        colalign=('left', *['right'] * (len(head) - 1)),
    )  # fmt: skip
    return text.translate(_LATEX)


def comma_separated(rows: Sequence[Mapping]) -> str:
    """CSV of numbers as they are: a column for each key of the first row; None is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
