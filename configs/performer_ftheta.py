"""Performer-fθ: linear attention with features that a small network learns.

    python run.py --config=configs/performer_ftheta.py

The ViT of `configs/vit.py` with another attention kernel, and nothing else changed. It starts as
`configs/performer_relu.py` and learns its features from there. The mixture of a ReLU and an
exponential branch is `--config.model.attention.kernel=ftheta_mixture`; it may start as softmax
features too, with `--config.model.attention.theta_init=softmax`.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arguments: str = '') -> ConfigDict:
    config = base.get_config(arguments)
    config.model.attention.kernel = 'ftheta'
    return config
