"""Trains and evaluates: python run.py --config=configs/performer_relu.py [--mode=train]."""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from performer_vit.errors import BadInput

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'A file of configs/, with an optional argument after a colon.'
)
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Directory of the run; default: runs/<data set>/<config and its changes>.'
)
_MODE = flags.DEFINE_enum(
    'mode', 'train', ['train', 'evaluate'],
    'train: train, test and report. evaluate: test and report again, from a --workdir.',
)  # fmt: skip


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if flags.FLAGS['config'].present:
            _ = _CONFIG.value.seed  # A file that cannot be loaded is reported only here.
        return rest
    except flags.Error as error:
        # ml_collections puts the traceback of a config into its message; the last line tells why.
        reason = str(error).strip()
        _fail(reason.splitlines()[-1] if 'Traceback' in reason else reason)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip('\'"').replace('\\n', '\n').replace("\\'", "'")
        _fail(f'--config: {reason}\nconfigs/base.py lists every field with its default.')
    except OSError as error:
        _fail(f'--config cannot be loaded: {str(error).splitlines()[-1].strip()}')


def _fail(reason: object) -> None:
    print(f'error: {reason}', file=sys.stderr)
    sys.exit(2)


def _main(argv: list[str]) -> None:
    if len(argv) > 1:
        _fail(f'unknown arguments {argv[1:]}; all are flags: --config=FILE --workdir=DIR …')
    evaluates = _MODE.value == 'evaluate'
    config_flag = flags.FLAGS['config']
    if evaluates and not _WORKDIR.value:
        _fail('--mode=evaluate needs the --workdir=DIR of a run to evaluate.')
    if evaluates and config_flag.present:
        _fail(
            '--mode=evaluate takes its config from the workdir: leave --config out, or train it '
            'with --mode=train.'
        )
    if not evaluates and not config_flag.present:
        _fail('--config is missing; an example is --config=configs/performer_relu.py')

    # The log of TensorFlow and of JAX's start says nothing about the user's run.
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    # JAX and Flax take seconds to import; a mistyped flag should not.
    from performer_vit import evaluate, train, workdir

    try:
        if evaluates:
            evaluate.evaluate_run(_WORKDIR.value)
            return
        path, _, arguments = config_flags.get_config_filename(config_flag).partition(':')
        overrides = config_flags.get_override_values(config_flag)
        train.train(_CONFIG.value, _WORKDIR.value, workdir.run_name(path, arguments, overrides))
    except (BadInput, FloatingPointError) as error:
        _fail(error)


if __name__ == '__main__':
    app.run(_main, flags_parser=_parse)
