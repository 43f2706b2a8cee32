"""What a command writes to, which may be gone or unable to say it."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import sys
from performer_vit.command_line import last_to_the_end
last_to_the_end()
for number in range(20_000):
    print('θ', number)
    print('…', number, file=sys.stderr, flush=True)
open(sys.argv[1], 'w').write('to the end')
"""


def lasts(path, redirection='', **environment):
    """Runs the program in a shell; its exit code."""
    command = f'"{sys.executable}" -c "$PROGRAM" "{path}" {redirection}; exit "${{PIPESTATUS[0]}}"'
    kept = {**os.environ, 'PROGRAM': PROGRAM, **environment}
    done = subprocess.run(
        ['bash', '-c', command], cwd=ROOT, env=kept, capture_output=True, timeout=120
    )
    assert b'Traceback' not in done.stderr and b'Exception' not in done.stderr
    return done.returncode


@pytest.mark.parametrize(
    'redirection', ['2>&1 | head -1', '| head -1 2>/dev/null', '>&-', '2>&-', '>&- 2>&-']
)
def test_a_program_whose_output_nobody_reads_goes_on(tmp_path, redirection):
    """Catches a training that ends with the `tee` behind it, and has not saved what it did."""
    assert lasts(tmp_path / 'done', redirection) == 0
    assert (tmp_path / 'done').read_text() == 'to the end'


def test_letters_that_an_encoding_has_not(tmp_path):
    """Catches a training that ends at an ellipsis, or at the θ of its model."""
    assert lasts(tmp_path / 'done', PYTHONIOENCODING='ascii') == 0
    assert (tmp_path / 'done').read_text() == 'to the end'


def test_a_full_disk_is_still_an_error(tmp_path):
    """Whoever asked for a log is to know that there is none."""
    if not os.path.exists('/dev/full'):
        pytest.skip('/dev/full is what stands for a full disk here')
    command = f'"{sys.executable}" -c "$PROGRAM" "{tmp_path / "done"}" > /dev/full'
    kept = {**os.environ, 'PROGRAM': PROGRAM}
    done = subprocess.run(
        ['bash', '-c', command], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and 'No space left' in done.stderr
    assert not (tmp_path / 'done').exists()
