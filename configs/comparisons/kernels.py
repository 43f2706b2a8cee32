"""The ViT and all Performers, three seeds each: the kernel changes and nothing else.

python run.py --mode=compare --config=configs/comparisons/kernels.py:cifar10,small
"""

from ml_collections import ConfigDict

from configs import base

KERNELS = ('exact', 'relu', 'gelu', 'softmax', 'elu', 'ftheta')


def get_config(arguments: str = '') -> ConfigDict:
    config = base.get_config(arguments)
    config.compare = ConfigDict()
    config.compare.seeds = (0, 1, 2)
    config.compare.baseline = 'exact'  # The variant that the others are compared with.
    # Pairs of a name and the fields that a variant changes; the name of a kernel gets the model's
    # name and colour.
    config.compare.variants = (
        *((kernel, {'model.attention.kernel': kernel}) for kernel in KERNELS),
        # Of the two, the mixture can start as softmax features.
        (
            'ftheta_mixture',
            {
                'model.attention.kernel': 'ftheta_mixture',
                'model.attention.theta_init': 'softmax',
            },
        ),
    )
    return config
