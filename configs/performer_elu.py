"""Performer-ELU: FAVOR+ with the features ELU(Wx) + 1.

    python run.py --config=configs/performer_elu.py

The ViT of `configs/vit.py` with another attention kernel, and nothing else changed.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arguments: str = '') -> ConfigDict:
    config = base.get_config(arguments)
    config.model.attention.kernel = 'elu'
    return config
