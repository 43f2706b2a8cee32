"""The README's Python runs as it stands, and its map is that of the code."""

import ast
import re

import pytest

from tests.conftest import ROOT

README = (ROOT / 'README.md').read_text('utf-8')
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
FLOORS = {
    path: int(floor) for floor, path in re.findall(r'^\| (\d) \| `(\S+\.py)` \|', README, re.M)
}


@pytest.mark.parametrize('code', BLOCKS, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_of_the_readme_runs(code):
    exec(compile(code, 'README.md', 'exec'), {'__name__': 'readme'})


def test_there_is_python_to_run():
    assert len(BLOCKS) >= 3


def test_the_map_has_every_file():
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'performer_vit').glob('*.py')}
    assert set(FLOORS) == files - {'performer_vit/__init__.py'} | {'run.py'}


def imported(path: str) -> set[str]:
    """The files of the package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text('utf-8'))):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('performer_vit'):
            names |= {f'{node.module}.{alias.name}' for alias in node.names} | {node.module}
    return {path for path in (f'{name.replace(".", "/")}.py' for name in names) if path in FLOORS}


@pytest.mark.parametrize('path', FLOORS)
def test_arrows_point_down(path):
    above = {other for other in imported(path) if FLOORS[other] > FLOORS[path]}
    assert not above


def test_imports_are_found():
    assert 'performer_vit/checkpoints.py' in imported('performer_vit/train.py')
