"""Performer-ReLU's recipe at a fixed size: rate, decay, smoothing, heads and features.

Its trials take about the same time each, unlike those of a sweep over width and depth.

python run.py --mode=sweep --config=configs/sweeps/recipe.py:cifar10
"""

from ml_collections import ConfigDict

from configs import performer_relu
from configs.sweeps import base


def get_config(arguments: str = '') -> ConfigDict:
    config = performer_relu.get_config(base.small(arguments))
    config.sweep = base.section()
    config.sweep.space = (
        ('optimizer.learning_rate', 'log_uniform', 2e-3, 5e-2),
        ('optimizer.weight_decay', 'log_uniform', 2e-2, 1.0),
        ('label_smoothing', 'uniform', 0.0, 0.2),
        ('model.num_heads', 'choice', (2, 4, 8)),
        ('model.attention.num_features', 'choice', (16, 32, 64, 128)),
    )
    return config
