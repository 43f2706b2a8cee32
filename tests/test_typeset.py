"""Tables in their three forms, against what other programs read from them."""

import csv
import io

from performer_vit import typeset

HEAD, LINES = ('model', 'accuracy (%)'), [['A & B_1', '98.5 ± 0.1 %'], ['fθ', '–']]


def test_markdown_aligns_numbers_to_the_right():
    assert typeset.markdown(HEAD, LINES) == (
        '| model | accuracy (%) |\n| --- | ---: |\n| A & B_1 | 98.5 ± 0.1 % |\n| fθ | – |'
    )


def test_markdown_keeps_what_is_a_cell_in_a_cell():
    """Catches a name with a bar, which would be two cells, or a line break, which ends the row."""
    assert (
        typeset.markdown(('a|b', 'c'), [['1\n2', '3']])
        == '| a\\|b | c |\n| --- | ---: |\n| 1 2 | 3 |'
    )


def test_latex_escapes_what_latex_would_take_for_its_own():
    """Catches a percent sign that comments out the rest of its line, and numbers made anew."""
    text = typeset.latex(HEAD, LINES)
    assert text.startswith('\\begin{tabular}{lr}') and '\\toprule' in text
    rows = [line for line in text.splitlines() if '&' in line]
    assert len(rows) == 3 and all(line.rstrip().endswith('\\\\') for line in rows)
    assert 'A \\& B\\_1' in rows[1] and '98.5 ± 0.1 \\%' in rows[1]
    # pdfLaTeX knows these two characters beyond ASCII, and ends with an error at a θ in text.
    assert 'f$\\theta$' in rows[2] and {c for c in text if not c.isascii()} == {'±', '–'}
    assert r'$\lambda$=3 $\to$ x' in typeset.latex(['model'], [['λ=3 → x']])


def test_csv_reads_back():
    """Catches a name with a comma that becomes two cells, and None that becomes a word."""
    rows = [{'model': 'a, b', 'accuracy': 0.1 + 0.2}, {'model': 'c', 'accuracy': None}]
    read = list(csv.DictReader(io.StringIO(typeset.comma_separated(rows))))
    assert read[0]['model'] == 'a, b' and float(read[0]['accuracy']) == 0.1 + 0.2
    assert read[1]['accuracy'] == ''
