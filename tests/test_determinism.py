"""What is promised of equal seeds: the same bits; and on other devices, the same training."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from performer_vit import chaos, workdir
from tests.conftest import ROOT


def run(workdir, devices: int, *flags: str) -> None:
    flag = f'--xla_force_host_platform_device_count={devices}'
    done = subprocess.run(
        [sys.executable, 'run.py', *flags, f'--workdir={workdir}'],
        cwd=ROOT, env={**os.environ, 'XLA_FLAGS': flag}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_config_file_alone_reproduces_a_run(tmp_path):
    """On one device, in another process, from config.json alone: every bit of weights, history,
    scalars and predictions. Catches randomness that no seed decides, and flags or an environment
    that a run does not write down.
    """
    run(tmp_path / 'first', 1, *chaos.FLAGS)
    (tmp_path / 'told').mkdir()
    shutil.copy(tmp_path / 'first' / 'config.json', tmp_path / 'told')
    run(tmp_path / 'second', 1, f'--config=configs/rerun.py:{tmp_path / "told"}')
    assert not list(chaos.differences(tmp_path / 'second', tmp_path / 'first'))

    # Another seed is another run: else the above would say nothing.
    run(tmp_path / 'third', 1, *chaos.FLAGS, '--config.seed=1')
    assert list(chaos.differences(tmp_path / 'third', tmp_path / 'first'))

    # On two devices it is the same training: what differs is the order of sums, at first in the
    # last bit, and what Muon makes of that in the 60 steps of this run.
    run(tmp_path / 'fourth', 2, *chaos.FLAGS)
    one, two = (
        workdir.read_history(tmp_path / name / 'history.csv') for name in ('first', 'fourth')
    )
    np.testing.assert_allclose(
        [row['train_loss'] for row in two], [row['train_loss'] for row in one], rtol=1e-3
    )
    assert two[0]['train_loss'] == pytest.approx(one[0]['train_loss'], rel=1e-5)
    other = workdir.read_history(tmp_path / 'third' / 'history.csv')
    assert abs(other[0]['train_loss'] / one[0]['train_loss'] - 1) > 1e-3
