"""The fields of a config: which there are, and what each may hold by itself.

What hangs on other fields, on the data or on the devices is checked where it is used, in words of
its own. The upper bounds here are far beyond use; without them a slip of the keyboard would let a
command compile for hours, or compute with what float32 and int32 cannot hold.
"""

import collections
import math
from collections.abc import Mapping

import numpy as np

from performer_vit.errors import BadInput, shown, unlike
from performer_vit.files import is_text

_LARGEST = 2**31 - 1  # Of int32, in which devices count.
_UNITS = 2**16
_CONVOLUTIONS = 100

_Kind = collections.namedtuple('_Kind', 'allowed holds')
_Kind.__doc__ = """What a field may hold: in words, and as a function of a value to a boolean."""


def _integer(low: int = -_LARGEST, high: int = _LARGEST) -> _Kind:
    def holds(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return _Kind(f'an integer from {low:,} to {high:,}', holds)


def _number(
    low: float = -1e30, high: float = 1e30, *, above: bool = False, below: bool = False
) -> _Kind:
    """Of the real numbers that float32 rounds into the range; without its ends where so said."""

    def holds(value: object) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        if not (abs(value) < 2**100 and math.isfinite(value)):  # An int may be beyond any float.
            return False
        rounded = float(np.float32(value))
        return (low < rounded if above else low <= rounded) and (
            rounded < high if below else rounded <= high
        )

    ends = f'{"above " * above}{low:g} to {"below " * below}{high:g}'
    return _Kind(f'a number from {ends}, in float32', holds)


def _are_grids(value: object) -> bool:
    """Whether they are at most so many channels; `vit` looks at the rest."""
    grids = value if isinstance(value, (tuple, list)) else ()
    channels = [c for grid in grids if isinstance(grid, (tuple, list)) for c in grid]
    return (
        isinstance(value, (tuple, list))
        and len(channels) <= _CONVOLUTIONS
        and all(not isinstance(c, int) or c <= _UNITS for c in channels)
    )


_TEXT = _Kind('a text in UTF-8 without NUL characters', is_text)
_BOOLEAN = _Kind('True or False', lambda value: isinstance(value, bool))

FIELDS = {
    'seed': _integer(0, 2**32 - 1),
    'num_epochs': _integer(1, 10**6),
    'batch_size': _integer(1),
    'dataset.name': _TEXT,
    'dataset.data_dir': _TEXT,
    'dataset.image_size': _integer(1, 4096),
    'dataset.fallback': _TEXT,
    'dataset.validation_fraction': _number(0, 1, below=True),
    'dataset.split_seed': _integer(0, 2**32 - 1),
    'dataset.num_folds': _integer(2),
    'dataset.fold': _integer(-1),
    'augment.crop_padding': _integer(0),
    'augment.flip': _TEXT,
    'augment.randaugment_layers': _integer(0, 100),
    'augment.randaugment_magnitude': _number(0, 10),
    'augment.cutout': _integer(0),
    'augment.mixup': _number(0, 10**6),
    'augment.cutmix': _number(0, 10**6),
    'model.stem': _TEXT,
    'model.patch_size': _integer(1),
    'model.stem_channels': _Kind(
        f"a tuple of tuples, '((32, 64), (64,))' with its quotes on a command line, of at most "
        f'{_CONVOLUTIONS} integers up to {_UNITS:,}',
        _are_grids,
    ),
    'model.stem_blocks': _integer(0, _CONVOLUTIONS),
    'model.width': _integer(1, _UNITS),
    'model.depth': _integer(1, 200),
    'model.num_heads': _integer(1, _UNITS),
    'model.mlp_dim': _integer(1, _UNITS),
    'model.position': _TEXT,
    'model.pooling': _TEXT,
    'model.pool_blocks': _integer(0, _CONVOLUTIONS),
    'model.conv_norm': _TEXT,
    'model.dropout_rate': _number(0, 1, below=True),
    'model.drop_path_rate': _number(0, 1, below=True),
    'model.dtype': _TEXT,
    'model.attention.kernel': _TEXT,
    'model.attention.num_features': _integer(0, _UNITS),
    'model.attention.projection': _TEXT,
    'model.attention.row_norms': _TEXT,
    'model.attention.redraw_every': _integer(0),
    'model.attention.hidden': _integer(0, _UNITS),
    'model.attention.theta_init': _TEXT,
    'model.attention.theta_sharing': _TEXT,
    'optimizer.name': _TEXT,
    'optimizer.learning_rate': _number(0, 1000, above=True),
    'optimizer.schedule': _TEXT,
    'optimizer.warmup_epochs': _number(0, 10**6),
    'optimizer.decay_epochs': _number(0, 10**6, above=True),
    'optimizer.decay_factor': _number(0, 1, above=True),
    'optimizer.momentum': _number(0, 1, below=True),
    'optimizer.weight_decay': _number(0, 1000),
    'optimizer.clip_norm': _number(0),
    'label_smoothing': _number(0, 1, below=True),
    'ema_decay': _number(0, 1, below=True),
    'max_skipped_steps': _integer(0),
    'early_stopping_patience': _integer(0),
    'test_state': _TEXT,
    'flip_averaging': _BOOLEAN,
    'checkpoint.every_epochs': _integer(1),
    'checkpoint.keep': _integer(1),
    'log_every_steps': _integer(1),
    'profile': _BOOLEAN,
}
# Fields that do nothing where a run is scored on validation images and not tested.
OF_THE_TEST = ('test_state', 'flip_averaging')


def check(values: Mapping[str, object]) -> None:
    """Raises `BadInput` unless there are all fields and no other, each with what it may hold.

    Args:
      values: of a config by dotted name, as `workdir.flatten` makes them.
    """
    unknown, missing = sorted(values.keys() - FIELDS), sorted(FIELDS.keys() - values)
    if unknown or missing:
        raise BadInput(
            f'the config {unlike(unknown, missing)}: set what configs/base.py sets. The config of '
            'a run of another version is for that version, whose commit the results.json of the '
            'run names.'
        )
    for field, kind in FIELDS.items():
        value = values[field]
        if not kind.holds(value):
            raise BadInput(f'{field} is {shown(value)}; allowed is {kind.allowed}. Set it so.')
