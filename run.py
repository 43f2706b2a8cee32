"""Trains and evaluates: python run.py --config=configs/performer_relu.py [--mode=train]."""

import os

from absl import app, flags, logging
from ml_collections import config_flags

from performer_vit import cpu_backend
from performer_vit.command_line import fail, parse
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


def _main(argv: list[str]) -> None:
    if len(argv) > 1:
        fail(f'unknown arguments {argv[1:]}; all are flags: --config=FILE --workdir=DIR …')
    evaluates = _MODE.value == 'evaluate'
    config_flag = flags.FLAGS['config']
    if evaluates and not _WORKDIR.value:
        fail('--mode=evaluate needs the --workdir=DIR of a run to evaluate.')
    if evaluates and config_flag.present:
        fail(
            '--mode=evaluate takes its config from the workdir: leave --config out, or train it '
            'with --mode=train.'
        )
    if not evaluates and not config_flag.present:
        fail('--config is missing; an example is --config=configs/performer_relu.py')

    # The log of TensorFlow and of JAX's start says nothing about the user's run.
    logging.set_verbosity(logging.ERROR)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    # Orbax, scikit-learn and matplotlib take seconds to import; a mistyped flag should not.
    from performer_vit import evaluate, train, workdir

    try:
        if evaluates:
            evaluate.evaluate_run(_WORKDIR.value)
            return
        path, _, arguments = config_flags.get_config_filename(config_flag).partition(':')
        overrides = config_flags.get_override_values(config_flag)
        train.train(_CONFIG.value, _WORKDIR.value, workdir.run_name(path, arguments, overrides))
    except (BadInput, FloatingPointError) as error:
        fail(error)


if __name__ == '__main__':
    cpu_backend.configure()
    app.run(_main, flags_parser=parse)
