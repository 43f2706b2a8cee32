"""What the study searched, for each of its six models: optimiser, batch and shape, over patches.

    python run.py --mode=sweep --config=configs/sweeps/study.py:cifar10
    python run.py --mode=sweep --config=configs/sweeps/study.py:cifar10,ftheta

Behind the colon, the model ('relu' where none is named), a data set, and another size than `study`.
The ranges hold what the study found best for any of its models. Its Performers attended over one
token; here each has the tokens of the ViT. It stopped early; here, trials that fall behind are
pruned. Written for a GPU: a trial is 31 epochs of a model up to four times as wide as its ViT.
"""

from ml_collections import ConfigDict

from configs import (
    base,
    performer_elu,
    performer_exp,
    performer_ftheta,
    performer_gelu,
    performer_relu,
    vit,
)
from configs.sweeps import base as sweeps
from configs.sweeps import vit as vit_sweep

MODELS = {
    'vit': vit,
    'relu': performer_relu,
    'gelu': performer_gelu,
    'exp': performer_exp,
    'elu': performer_elu,
    'ftheta': performer_ftheta,
}
SPACE = (
    ('optimizer.name', 'choice', ('adam', 'sgd')),
    ('optimizer.learning_rate', 'log_uniform', 3e-4, 3e-2),
    ('optimizer.schedule', 'choice', ('step', 'cosine')),
    ('optimizer.weight_decay', 'log_uniform', 1e-5, 1e-3),
    ('batch_size', 'choice', (64, 128, 256, 512)),
    ('model.width', 'choice', (128, 256, 512, 768, 960)),
    ('model.depth', 'integer', 1, 8),
    ('model.num_heads', 'choice', (4, 8, 16)),
    ('model.mlp_dim', 'choice', (256, 512, 1024)),
    ('model.dropout_rate', 'uniform', 0.0, 0.2),
)
FEATURES = ('model.attention.num_features', 'choice', (64, 128, 256, 512))
HIDDEN = ('model.attention.hidden', 'choice', (64, 128, 256))


def get_config(arguments: str = '') -> ConfigDict:
    words = [word.strip() for word in arguments.split(',') if word.strip()]
    models = [word for word in words if word in MODELS]
    words = [word for word in words if word not in MODELS]
    if len(models) > 1 or not {*base.DATASETS, *base.SIZES}.issuperset(words):
        raise ValueError(
            f'the config argument is {arguments!r}; allowed are at most one model of '
            f'{tuple(MODELS)}, one data set of {base.DATASETS} and one size of '
            f'{tuple(base.SIZES)}, separated by commas.'
        )
    model = models[0] if models else 'relu'
    if not any(word in base.SIZES for word in words):
        words.append('study')
    config = MODELS[model].get_config(','.join(words))
    config.optimizer.momentum = 0.9
    config.label_smoothing = 0.0
    config.ema_decay = 0.0
    if model == 'ftheta':
        # As the study's: features that start as ReLU's need as many hidden units as there are.
        config.model.attention.theta_init = 'lecun'
    config.sweep = sweeps.section()
    features = {'vit': (), 'ftheta': (FEATURES, HIDDEN)}
    config.sweep.space = (*SPACE, *features.get(model, (FEATURES,)))
    config.sweep.conditions = vit_sweep.CONDITIONS
    return config
