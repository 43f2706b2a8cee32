"""Trains, evaluates, compares: python run.py --config=configs/performer_relu.py [--mode=train]."""

import importlib
import os
import signal
import sys

from absl import app, flags
from ml_collections import config_flags

from performer_vit import cluster, cpu_backend, files, interruption, workdir
from performer_vit.command_line import fail, last_to_the_end, parse, quiet_libraries
from performer_vit.errors import BadInput, one_line

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'A file of configs/, with an optional argument after a colon.'
)
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Directory of the run; default: runs/<data set>/<config and its changes>.'
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0, of several that train one model.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many they are.', 1)
_PROCESS_ID = flags.DEFINE_integer('process_id', None, "This one's number, from 0 on.", 0)
_CLUSTER = flags.DEFINE_bool(
    'cluster', False, 'Join the processes that Slurm, Kubernetes, Open MPI or Cloud TPU started.'
)
# What each mode does, and the module and function that do it.
_MODES = {
    'train': ('train, test and report', 'train', 'train'),
    'evaluate': ('test and report again, from a --workdir', 'evaluate', 'evaluate_run'),
    'inspect': (
        'draw what the model of a --workdir attends to and which errors it makes',
        'inspection', 'inspect_run',
    ),
    'crossval': (
        'train and score on each of dataset.num_folds folds in turn',
        'crossval', 'cross_validate',
    ),
    'compare': (
        'train several configs with several seeds, see configs/comparisons/',
        'variants', 'compare',
    ),
    'ablate': (
        'train a config and changes of it, one at a time, see configs/ablations/',
        'variants', 'ablate',
    ),
    'sweep': ('search for hyperparameters, see configs/sweeps/', 'sweep', 'sweep'),
}  # fmt: skip
_READING = ('evaluate', 'inspect')
# Modes whose configs have a section of that name, and where such configs are.
_SECTIONS = {
    'compare': 'configs/comparisons/',
    'ablate': 'configs/ablations/',
    'sweep': 'configs/sweeps/',
}
_MODE = flags.DEFINE_enum(
    'mode',
    'train',
    list(_MODES),
    '. '.join(f'{mode}: {what}' for mode, (what, *_) in _MODES.items()),
)


def _main(argv: list[str]) -> None:
    last_to_the_end()
    mode, config_flag = _MODE.value, flags.FLAGS['config']
    _check_flags(argv, mode, config_flag)

    quiet_libraries()
    try:
        if _joins():
            cluster.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        interruption.listen()
        # Orbax, scikit-learn and Optuna take seconds to import; a mistyped flag should not, nor
        # should one mode pay for another's.
        _, module, function = _MODES[mode]
        action = getattr(importlib.import_module(f'performer_vit.{module}'), function)
        # No shell expands it behind the = of a flag.
        directory = _WORKDIR.value and os.path.expanduser(_WORKDIR.value)
        if mode in _READING:
            action(directory)
            return
        path, _, arguments = config_flags.get_config_filename(config_flag).partition(':')
        overrides = config_flags.get_override_values(config_flag)
        name = workdir.run_name(path, arguments, overrides)
        action(_CONFIG.value, directory, name)
    except (BadInput, FloatingPointError, cluster.OtherFailed) as error:
        fail(error)
    except Exception as error:
        reason = files.no_room(error)
        if reason is None:
            raise
        fail(
            f'a file cannot be written ({reason}): make room where the run writes, or make it '
            f'writable. The same command goes on from what is saved. It was: {one_line(error)}'
        )
    except KeyboardInterrupt as error:
        print(f'{str(error) or "Interrupted."} The same command goes on.', file=sys.stderr)
        sys.exit(interruption.EXIT_CODE)
    finally:
        # What is left is the interpreter's end, where a signal would only spoil the exit code.
        for number in interruption.SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _joins() -> bool:
    """Whether this process is one of several."""
    given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    return _CLUSTER.value or any(value is not None for value in given)


def _check_flags(argv: list[str], mode: str, config_flag) -> None:
    """Ends the command where its flags do not go together."""
    if len(argv) > 1:
        fail(f'unknown arguments {argv[1:]}; all are flags: --config=FILE --workdir=DIR …')
    if _joins() and mode != 'train':
        fail(
            f"--mode={mode} is one process's: leave --coordinator, --num_processes, --process_id "
            'and --cluster out, or give --mode=train.'
        )
    if mode in _READING:
        if not _WORKDIR.value:
            fail(f'--mode={mode} needs the --workdir=DIR of a run to {mode}.')
        if config_flag.present:
            fail(
                f'--mode={mode} takes its config from the workdir: leave --config out, or train it '
                'with --mode=train.'
            )
        return
    if not config_flag.present:
        fail('--config is missing; an example is --config=configs/performer_relu.py')
    sections = [section for section in _SECTIONS if section in _CONFIG.value]
    if mode in _SECTIONS and mode not in sections:
        fail(
            f'--mode={mode} needs a config with a section `{mode}`, such as those of '
            f'{_SECTIONS[mode]}.'
        )
    for section in sections:
        if section != mode:
            fail(f'this config has a section `{section}` and is for --mode={section} alone.')
    overrides = config_flags.get_override_values(config_flag)
    if mode in ('compare', 'ablate') and 'seed' in overrides:
        fail(
            f'--config.seed does nothing in --mode={mode}, whose runs have the seeds of '
            f"--config.{mode}.seeds: give these instead, such as --config.{mode}.seeds='(5,)'."
        )
    if mode != 'train' and overrides.get('dataset.fallback', 'none') != 'none':
        fail(
            f'--mode={mode} never goes on with other data than were named: leave '
            '--config.dataset.fallback out, or name the digits after the colon, as in '
            '--config=FILE:digits.'
        )


if __name__ == '__main__':
    cpu_backend.configure()
    app.run(_main, flags_parser=parse)
