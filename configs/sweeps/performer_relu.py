"""Performer-ReLU: the space of the ViT's sweep, and the number of its random features.

python run.py --mode=sweep --config=configs/sweeps/performer_relu.py:cifar10
"""

from ml_collections import ConfigDict

from configs import performer_relu
from configs.sweeps import base, vit


def get_config(arguments: str = '') -> ConfigDict:
    config = performer_relu.get_config(base.small(arguments))
    config.sweep = base.section()
    config.sweep.space = (
        *vit.SPACE,
        ('model.attention.num_features', 'choice', (16, 32, 64, 128, 256)),
    )
    config.sweep.conditions = vit.CONDITIONS
    return config
