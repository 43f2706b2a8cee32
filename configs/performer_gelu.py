"""Performer-GELU: FAVOR+ with the features GELU(Wx), shifted by GELU's minimum.

    python run.py --config=configs/performer_gelu.py

The ViT of `configs/vit.py` with another attention kernel, and nothing else changed.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arguments: str = '') -> ConfigDict:
    config = base.get_config(arguments)
    config.model.attention.kernel = 'gelu'
    return config
