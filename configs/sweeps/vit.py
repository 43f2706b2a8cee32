"""The ViT: rate, decay, dropout and shape, within what CPUs can search.

python run.py --mode=sweep --config=configs/sweeps/vit.py:cifar10
"""

from ml_collections import ConfigDict

from configs import vit
from configs.sweeps import base

SPACE = (
    ('optimizer.learning_rate', 'log_uniform', 2e-3, 5e-2),
    ('optimizer.weight_decay', 'log_uniform', 2e-2, 1.0),
    ('model.width', 'choice', (64, 96, 128, 192, 256)),
    ('model.depth', 'integer', 1, 5),
    ('model.num_heads', 'choice', (2, 4, 8, 16)),
    ('model.mlp_dim', 'choice', (64, 128, 256, 512)),
    ('model.dropout_rate', 'uniform', 0.0, 0.2),
)
CONDITIONS = (('model.width', 'divisible by', 'model.num_heads'),)


def get_config(arguments: str = '') -> ConfigDict:
    config = vit.get_config(base.small(arguments))
    config.sweep = base.section()
    config.sweep.space = SPACE
    config.sweep.conditions = CONDITIONS
    return config
