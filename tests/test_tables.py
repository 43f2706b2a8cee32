"""The published table says what the results say."""

import pytest

from performer_vit import tables, workdir
from performer_vit.errors import BadInput

ROW = {
    'dataset': 'cifar10', 'kernel': 'relu', 'seed': 0, 'epochs': 3, 'num_features': 64,
    'projection': 'orthogonal', 'num_params': 370634, 'test_accuracy': 0.70125,
    'validation_accuracy': None, 'train_seconds_per_epoch': 109.4, 'inference_seconds': 9.96,
    'images_per_second': 366.0,
}  # fmt: skip


def test_table_and_figure(tmp_path, capsys):
    """Catches rounding up, columns in another order, and a ViT that is not the first row."""
    workdir.write_json(tmp_path / 'a.json', ROW)
    vit = {**ROW, 'kernel': 'exact', 'validation_accuracy': 0.5, 'test_accuracy': 0.6}
    workdir.write_json(tmp_path / 'b.json', vit)
    tables.main(['tables', str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == '| ViT | 60.00% | 50.00% | 109 | 10.0 | 370,634 |'
    assert lines[3] == '| Performer-ReLU | 70.12% | – | 109 | 10.0 | 370,634 |'
    assert (tmp_path / 'comparison.png').stat().st_size > 5000


def test_an_empty_directory(tmp_path):
    with pytest.raises(BadInput, match=r'holds no \*.json'):
        tables.read(tmp_path)
