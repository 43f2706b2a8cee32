"""A run of 200 epochs needs no more of the machine than one of ten."""

import collections
import concurrent.futures
import logging
import multiprocessing
import os
import pathlib
import threading
import time

import jax
import pytest

from performer_vit import datasets, train
from tests.conftest import make_tiny_config

# Of epochs whose row is the last before a measurement.
EARLY, LATE = 10, 200


def measured() -> dict[str, int]:
    """Of this process, by the kernel's tables."""
    own = pathlib.Path('/proc/self')
    pages = int((own / 'statm').read_text().split()[1])
    return {
        'memory': pages * os.sysconf('SC_PAGE_SIZE'),
        'threads': len(list((own / 'task').iterdir())),
        'python_threads': threading.active_count(),
        'files': len(list((own / 'fd').iterdir())),
    }


class Compilations(logging.Handler):
    """The programs that JAX compiles, by its own log: name, and shapes of the arguments."""

    def __init__(self):
        super().__init__()
        self.programs = []

    def emit(self, record):
        text = record.getMessage()
        if text.startswith('Compiling '):
            self.programs.append(text.removeprefix('Compiling '))


def long_run(workdir: str) -> tuple[dict, dict, list[str], int]:
    """What a run needs after `EARLY` and after `LATE` epochs, and what it compiled."""
    config = make_tiny_config()
    config.num_epochs = LATE
    config.batch_size = 512
    compilations = Compilations()
    logger = logging.getLogger('jax')
    logger.addHandler(compilations)
    logger.propagate = False
    seen = {}

    def on_epoch(row):
        if row['epoch'] in (EARLY, LATE):
            time.sleep(3)  # The epoch's checkpoint is being written, in files and threads.
            seen[row['epoch']] = (measured(), len(compilations.programs))

    with jax.log_compiles():
        train.validate(config, datasets.load(**config.dataset), workdir, on_epoch)
    (early, compiled), (late, _) = seen[EARLY], seen[LATE]
    return early, late, compilations.programs, compiled


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='measures by /proc of Linux')
def test_nothing_grows(tmp_path):
    """In a process of its own. Catches a list that is never emptied, a writer that is opened anew
    for every epoch, and a shape or a Python number in a traced place that compiles a step again.
    """
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        early, late, programs, compiled = pool.submit(long_run, str(tmp_path / 'run')).result()
    assert late['memory'] <= 1.05 * early['memory']
    for what in ('python_threads', 'files'):
        assert late[what] <= early[what], what
    # Pools of the C++ libraries start their threads when these are first needed, up to a number of
    # their own. One thread more for every checkpoint would be hundreds.
    assert late['threads'] <= early['threads'] + 4
    assert len(programs) == compiled > 2, programs[compiled:]
    # The log does not tell the shapes that arrays are filled to.
    told = collections.Counter(name for name in programs if 'broadcast_in_dim' not in name)
    assert len(told) > 2 and set(told.values()) == {1}, told
