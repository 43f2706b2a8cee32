"""Performer-ReLU on a small grid of rate, depth and dropout, as the study began its search.

python run.py --mode=sweep --config=configs/sweeps/grid.py:cifar10
"""

from ml_collections import ConfigDict

from configs import performer_relu
from configs.sweeps import base


def get_config(arguments: str = '') -> ConfigDict:
    config = performer_relu.get_config(base.small(arguments))
    config.sweep = base.section()
    config.sweep.space = (
        ('optimizer.learning_rate', 'choice', (3e-3, 1e-2, 3e-2)),
        ('model.depth', 'choice', (1, 2, 4)),
        ('model.dropout_rate', 'choice', (0.0, 0.1)),
    )
    config.sweep.sampler = 'grid'
    config.sweep.pruner = 'none'  # A grid is read as a whole.
    config.sweep.num_trials = 18
    return config
