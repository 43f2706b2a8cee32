"""Performer-fθ, one factor at a time: what it starts as, and what shares one map.

python run.py --mode=ablate --config=configs/ablations/performer_ftheta.py:cifar10,small
"""

from ml_collections import ConfigDict

from configs import performer_ftheta


def get_config(arguments: str = '') -> ConfigDict:
    config = performer_ftheta.get_config(arguments)
    config.ablate = ConfigDict()
    config.ablate.seeds = (0,)
    # The fields that each variant changes.
    config.ablate.changes = (
        {'model.attention.theta_init': 'lecun'},
        *({'model.attention.theta_sharing': shared} for shared in ('sides', 'heads', 'none')),
        {'model.attention.kernel': 'ftheta_mixture'},
        *(
            {
                'model.attention.kernel': 'ftheta_mixture',
                'model.attention.theta_init': 'softmax',
                'model.attention.theta_sharing': shared,
            }
            for shared in ('all', 'none')
        ),
    )
    return config
