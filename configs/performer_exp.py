"""Performer-EXP: FAVOR+ with positive random features, an unbiased estimate of softmax attention.

    python run.py --config=configs/performer_exp.py

The ViT of `configs/vit.py` with another attention kernel, and nothing else changed.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arguments: str = '') -> ConfigDict:
    config = base.get_config(arguments)
    config.model.attention.kernel = 'softmax'
    return config
