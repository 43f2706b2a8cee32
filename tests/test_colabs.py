"""The notebooks: each is executed from its first to its last cell, at a tiny budget.

What a text says of the numbers below it, their cell asserts; nothing else is said here about what
is printed. What they printed on a real run is stored. Catches a notebook that no longer fits the
library, and a cell that needs one above it which is gone.
"""

import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / 'colabs').glob('*.ipynb'))
# Most of a tiny training, and of looking into it, is compilation; this model compiles fast.
TRAINING = """
DATASET = 'digits'
EPOCHS = 1
CHANGES = {
    'model.stem': 'patch', 'model.patch_size': 8, 'model.pooling': 'gap', 'model.width': 16,
    'model.depth': 1, 'model.num_heads': 2, 'model.mlp_dim': 32, 'model.attention.num_features': 8,
}
"""
# In the place of what stands in the cell tagged `parameters`, as papermill has it: after it.
PARAMETERS = {
    'favor_anatomy': 'FEATURES = (8, 32)\nDRAWS = 4\n',
    'performer_exp': f'{TRAINING}DRAWS = 4\nFEATURES = (16, 32)\n',
    'performer_ftheta': TRAINING,
    'performer_gelu_elu': TRAINING,
    'performer_relu': TRAINING,
    'vit': f'{TRAINING}LENGTHS = (16, 64)\n',
    'your_own_model': 'STEPS = 3\nBATCH_SIZE = 4\n',
}


def name_of(path):
    return path.stem


def outputs(notebook):
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            yield from cell.outputs


def test_all_notebooks_are_here():
    assert [path.stem for path in NOTEBOOKS] == sorted(PARAMETERS)


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
def test_executes(path, tmp_path, monkeypatch):
    """As a reader does in a checkout, but that its `runs/` is somewhere else."""
    for name in ('configs', 'results', 'performer_vit'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'colabs').mkdir()
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if 'parameters' in cell.metadata.get('tags', ()))
    cell.source += '\n' + PARAMETERS[path.stem]
    monkeypatch.setenv('PYTHONPATH', os.fspath(ROOT))
    client = NotebookClient(
        notebook, timeout=600, resources={'metadata': {'path': os.fspath(tmp_path / 'colabs')}}
    )
    # What answers the sliders' output widget sends on the socket that the cell's reply is awaited
    # on, which may never be noticed then (https://github.com/jupyter/nbclient/issues/312).
    client.comm_open_handlers.clear()
    client.execute()
    assert all(output.output_type != 'error' for output in outputs(notebook))
    trains = 'DATASET' in PARAMETERS[path.stem]
    assert (
        len(list((tmp_path / 'runs').glob('digits/*/results.json')))
        == (2 if 'gelu' in path.stem else 1) * trains
    )


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
def test_the_badge_opens_this_notebook(path):
    text = path.read_text(encoding='utf-8')
    assert f'/blob/main/colabs/{path.name})' in text
    (address,) = set(
        re.findall(r"address = '(https://github\.com/[^']+)'", text.replace('\\"', '"'))
    )
    assert f'/github/{address.removeprefix("https://github.com/")}/blob/' in text


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
def test_stored_outputs_are_those_of_a_whole_run(path):
    """In order and without errors, with pictures, small, on CIFAR-10 where it trains on images."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    stored = list(outputs(notebook))
    assert all(output.output_type != 'error' for output in stored)
    assert sum('image/png' in output.get('data', {}) for output in stored) >= 3
    text = path.read_text(encoding='utf-8')
    assert len(text) < 2_000_000
    assert not re.search(r'/(home|root|work|tmp|Users|usr)/', text)
    if 'DATASET' in PARAMETERS[path.stem]:
        assert 'test accuracy' in text and '[cifar10]' in text
