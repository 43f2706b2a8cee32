"""Performer-ReLU, one factor at a time: what attention, features, stem, pooling and tokens bring.

python run.py --mode=ablate --config=configs/ablations/performer_relu.py:cifar10,small
"""

from ml_collections import ConfigDict

from configs import performer_relu


def get_config(arguments: str = '') -> ConfigDict:
    config = performer_relu.get_config(arguments)
    config.ablate = ConfigDict()
    config.ablate.seeds = (0,)
    # The fields that each variant changes.
    config.ablate.changes = (
        {'model.attention.kernel': 'none'},
        {'model.attention.kernel': 'mean'},
        *({'model.attention.num_features': features} for features in (16, 32, 128, 256)),
        {'model.attention.projection': 'gaussian'},
        # As many features as a head has dimensions: there is no other number without a projection.
        {'model.attention.projection': 'none', 'model.attention.num_features': 0},
        {'model.attention.redraw_every': 100},
        {'model.attention.redraw_every': 1},
        {'model.stem': 'patch'},
        *({'model.pooling': pooling} for pooling in ('gap', 'map', 'cls')),
        {'model.patch_size': 2},
    )
    return config
