"""A run once more, by what its directory says of it: the config.json alone is read.

    python run.py --config=configs/rerun.py:DIR --workdir=NEW

DIR is the workdir of the other run, or one with its config.json. On the same machine, with the same
versions and the same number of devices, the results are the same bits.
"""

from ml_collections import ConfigDict

from performer_vit import workdir


def get_config(directory: str = '') -> ConfigDict:
    if not directory:
        raise ValueError('name the run, as in --config=configs/rerun.py:runs/digits/performer_relu')
    return workdir.read_config(directory)
