"""The README's Python runs as it stands."""

import re

import pytest

from tests.conftest import ROOT

BLOCKS = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text('utf-8'), re.DOTALL)


@pytest.mark.parametrize('code', BLOCKS, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_of_the_readme_runs(code):
    exec(compile(code, 'README.md', 'exec'), {'__name__': 'readme'})


def test_there_is_python_to_run():
    assert len(BLOCKS) >= 3
