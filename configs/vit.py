"""The Vision Transformer: softmax attention, computed exactly.

    python run.py --config=configs/vit.py

The argument `study` (`configs/vit.py:study`) gives it the size of the study's ViT.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arguments: str = '') -> ConfigDict:
    config = base.get_config(arguments)
    config.model.attention.kernel = 'exact'
    return config
