"""Every field of a run, with its default. The other configs change a line or two of it.

The argument after the colon picks the data set and, after a comma, another size of the model:

    python run.py --config=configs/vit.py:cifar100
    python run.py --config=configs/performer_relu.py:cifar10,large
"""

from ml_collections import ConfigDict

DATASETS = ('cifar10', 'cifar100', 'digits', 'folder')

# What a size changes of the fields below.
SIZES = {
    # Twenty minutes on one CPU core: what kernels and other choices are compared with.
    'small': {
        'num_epochs': 6,
        'model.stem_channels': ((16, 32), (32,)),
        'model.stem_blocks': 0,
        'model.width': 128,
        'model.mlp_dim': 128,
    },
    # Eighty minutes on two CPU cores: deeper, longer, and nearly all images are for training.
    'large': {
        'num_epochs': 17,
        'dataset.validation_fraction': 0.02,
        'model.stem_blocks': 2,
        'augment.cutout': 8,
        'test_state': 'last',
    },
    # For a GPU: as large as the small transformers that reach the most on CIFAR, and as long.
    'gpu': {
        'num_epochs': 300,
        'batch_size': 512,
        'model.stem_channels': ((64, 128), (128,)),
        'model.stem_blocks': 2,
        'model.width': 384,
        'model.depth': 7,
        'model.num_heads': 6,
        'model.mlp_dim': 1152,
        'model.pooling': 'gap',
        'model.drop_path_rate': 0.1,
        'model.dtype': 'bfloat16',
        'augment.flip': 'random',
        'augment.randaugment_layers': 2,
        'augment.randaugment_magnitude': 9.0,
        'augment.mixup': 0.8,
        'augment.cutmix': 1.0,
        'optimizer.learning_rate': 6e-3,
        'optimizer.warmup_epochs': 10.0,
        'optimizer.weight_decay': 0.05,
        'optimizer.schedule': 'cosine',
        'ema_decay': 0.999,
    },
    # The model of the study that this project reimplements: its ViT's, for every kernel.
    'study': {
        'num_epochs': 31,
        'model.stem': 'patch',
        'model.width': 256,
        'model.depth': 8,
        'model.num_heads': 8,
        'model.mlp_dim': 512,
        'model.pooling': 'gap',
        'model.dropout_rate': 0.1,
        'augment.flip': 'random',
        'optimizer.name': 'adamw',
        'optimizer.learning_rate': 5e-4,
        'optimizer.schedule': 'cosine',
        'optimizer.warmup_epochs': 1.0,
        'optimizer.weight_decay': 0.05,
    },
}


def get_config(arguments: str = '') -> ConfigDict:
    """The base config: the ViT. `arguments` is '', a data set, a size, or both with a comma."""
    words = [word.strip() for word in arguments.split(',') if word.strip()]
    datasets = [word for word in words if word in DATASETS]
    sizes = [word for word in words if word in SIZES]
    if len(datasets) > 1 or len(sizes) > 1 or len(datasets) + len(sizes) < len(words):
        raise ValueError(
            f'the config argument is {arguments!r}; allowed is at most one data set of '
            f'{DATASETS} and at most one size of {tuple(SIZES)}, separated by a comma.'
        )

    config = ConfigDict()
    config.seed = 0  # Of the weights, the projections, the order of images, and augmentation.
    config.num_epochs = 8
    config.batch_size = 128  # Over all devices.

    config.dataset = ConfigDict()
    config.dataset.name = datasets[0] if datasets else 'cifar10'
    # A prepared TFDS directory; '': $TFDS_DATA_DIR, or download. Of 'folder': the directory with
    # train/CLASS/IMAGE and test/CLASS/IMAGE.
    config.dataset.data_dir = ''
    config.dataset.image_size = 32  # Pixels along a side; images of 'folder' are scaled to it.
    # What to do where the data set cannot be had: train on 'digits', or fail ('none'). Whoever
    # names a data set wants that one.
    config.dataset.fallback = 'none' if datasets else 'digits'
    config.dataset.validation_fraction = 0.1  # Of the training set, stratified; 0.0: none.
    config.dataset.split_seed = 0
    # Cross-validation (--mode=crossval) holds out one of so many stratified parts in turn instead;
    # to train on all but one of them by itself, set `fold` to its number, from 0 on.
    config.dataset.num_folds = 5
    config.dataset.fold = -1

    config.augment = ConfigDict()
    config.augment.crop_padding = 4  # Pixels of reflection around a random crop; 0: no crop.
    # Mirror images: 'alternating' sides from epoch to epoch, or 'random', or 'none'. Digits never.
    config.augment.flip = 'alternating'
    config.augment.randaugment_layers = 0  # Random operations on each image; 0: none.
    config.augment.randaugment_magnitude = 5.0  # Of all of these operations, from 0 to 10.
    config.augment.cutout = 0  # Pixels along a square that is erased; 0: none.
    config.augment.mixup = 0.0  # α of Beta(α, α), the share of an image in a mixture; 0.0: off.
    config.augment.cutmix = 0.0  # The same for pasted rectangles; with both on, either, by batch.

    config.model = ConfigDict()
    config.model.stem = 'conv'  # Or 'patch'.
    config.model.patch_size = 4  # Pixels along a token: 4, 2, 1 give 64, 256, 1,024 tokens.
    # Of the 'conv' stem: channels of its convolutions on each grid from the finest on, with
    # patch_size 4 that of the pixels and one half as fine; one to the width ends the last grid.
    config.model.stem_channels = ((32, 64), (64,))
    config.model.stem_blocks = 1  # More of its convolutions, on the tokens' grid.
    config.model.width = 256
    config.model.depth = 2
    config.model.num_heads = 4
    config.model.mlp_dim = 256
    config.model.position = 'learned'  # Or 'sine'.
    config.model.pooling = 'conv'  # Or 'gap', 'cls', 'map'.
    config.model.pool_blocks = 2  # Convolutions of 'conv' pooling, on half the tokens' grid.
    config.model.conv_norm = 'batch'  # Or 'layer', in 'conv' stem and 'conv' pooling.
    config.model.dropout_rate = 0.0
    config.model.drop_path_rate = 0.0  # Stochastic depth of the last block.
    config.model.dtype = 'float32'  # Of the computation, or 'bfloat16'; weights are float32.

    # The kernel is what makes a Performer of a ViT. The fields below it belong to the kernels that
    # have random features; 'exact' uses none of them, and 'ftheta' and 'ftheta_mixture', whose
    # features are learnt, start from a projection but never redraw it.
    config.model.attention = ConfigDict()
    config.model.attention.kernel = 'exact'
    config.model.attention.num_features = 64
    config.model.attention.projection = 'orthogonal'  # 'gaussian', 'simplex', …, 'none'.
    config.model.attention.row_norms = 'gaussian'  # Or 'sqrt_dim'; of orthogonal rows.
    config.model.attention.redraw_every = 0  # Steps between new projections; 0: never.
    # Units of fθ's hidden layer; 0: num_features, or twice as many for theta_init 'softmax'.
    config.model.attention.hidden = 0
    # What fθ is at the start: random weights ('lecun'), kernel 'relu', or nearly kernel 'softmax',
    # which 'ftheta_mixture' alone can be.
    config.model.attention.theta_init = 'relu'
    # What has one fθ in common: 'all', or the 'sides' (queries and keys) of each head, or the
    # 'heads', queries and keys apart, or 'none'.
    config.model.attention.theta_sharing = 'all'

    config.optimizer = ConfigDict()
    config.optimizer.name = 'muon'  # Or 'adamw', 'adam', 'sgd'.
    config.optimizer.learning_rate = 1e-2  # The highest that the schedule reaches.
    config.optimizer.schedule = 'linear'  # Or 'cosine', 'step'.
    config.optimizer.warmup_epochs = 0.5
    config.optimizer.decay_epochs = 5.0  # 'step': every so many epochs…
    config.optimizer.decay_factor = 0.5  # …the rate is multiplied by this.
    config.optimizer.momentum = 0.95  # Of 'muon' and 'sgd'.
    # Not of biases, norms and embeddings. This one and the learning rate are Muon's; 'adamw', and
    # 'adam' and 'sgd', which add it to the gradient, want others.
    config.optimizer.weight_decay = 0.2
    config.optimizer.clip_norm = 5.0  # Largest global norm of a gradient; 0.0: no clipping.

    config.label_smoothing = 0.1
    config.ema_decay = 0.99  # Of the moving average of the state, which is evaluated; 0.0: none.
    # Steps whose loss, gradient or update is not finite, to be passed over in all before the run
    # ends with an error that names the layer; 0: it ends at the first.
    config.max_skipped_steps = 0
    config.early_stopping_patience = 0  # Epochs without a lower validation loss; 0: never stop.
    config.test_state = 'best'  # Which state meets the test split: 'best' on validation, or 'last'.

    # Test a second time, each image averaged with its mirror image; reported apart.
    config.flip_averaging = False

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1
    config.checkpoint.keep = 2  # So many of the latest are kept and, as of each, the best.

    config.log_every_steps = 20
    config.profile = False  # Trace some steps, from the first report on, for TensorBoard.

    for size in sizes:
        config.update_from_flattened_dict(SIZES[size])
    return config
