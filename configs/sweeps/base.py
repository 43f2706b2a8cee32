"""What every sweep has: how it searches, with the defaults that the sweeps here share."""

from ml_collections import ConfigDict

from configs import base


def small(arguments: str) -> str:
    """The argument of a config, with the size `small` where it names none: trials are many."""
    words = [word.strip() for word in arguments.split(',')]
    return arguments if any(word in base.SIZES for word in words) else f'{arguments},small'


def section() -> ConfigDict:
    """The section `sweep` of a config, whose space is still to be filled in."""
    sweep = ConfigDict()
    # Rows of a field, a distribution and its values:
    # ('optimizer.learning_rate', 'log_uniform', 1e-3, 3e-2), 'uniform' and 'integer' likewise, and
    # ('model.width', 'choice', (64, 128)). For the sampler 'grid', 'uniform' and 'log_uniform' have
    # a fifth element, the number of points.
    sweep.space = ()
    # Rows that a combination must fulfil: ('model.width', 'divisible by', 'model.num_heads'), also
    # 'at most' and 'at least', of another field or of a number.
    sweep.conditions = ()
    sweep.sampler = 'tpe'  # Or 'random', or 'grid'.
    sweep.seed = 0  # Of the sampler.
    # Ends trials that fall behind: 'none', 'median', or 'successive_halving'.
    sweep.pruner = 'median'
    sweep.num_trials = 40  # Of all processes together; may be raised later.
    sweep.minutes = 0.0  # After which a process begins no further trial; 0: no limit.
    sweep.num_folds = 0  # Folds of a cross-validation of each trial; 0: the validation split.
    # URL of a database, whose password is written nowhere; '': study.sqlite3 in the workdir, which
    # all workers share, whichever database they use.
    sweep.storage = ''
    return sweep
