"""Performer-ReLU: FAVOR+ with the features ReLU(Wx).

    python run.py --config=configs/performer_relu.py

The ViT of `configs/vit.py` with another attention kernel, and nothing else changed.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arguments: str = '') -> ConfigDict:
    config = base.get_config(arguments)
    config.model.attention.kernel = 'relu'
    return config
