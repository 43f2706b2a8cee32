"""Parsing the flags of a command, how it says that they are wrong, and what it leaves unsaid."""

import os
import sys
from typing import NoReturn

from absl import flags, logging


def parse(argv: list[str]) -> list[str]:
    """A `flags_parser` for `app.run`: mistakes in flags and configs get one clear error.

    Returns:
      What is left of the arguments when the flags are taken out.
    """
    try:
        rest = flags.FLAGS(argv)
        if flags.FLAGS['config'].present:
            _ = flags.FLAGS.config.seed  # A file that cannot be loaded is reported only here.
        return rest
    except flags.Error as error:
        # ml_collections puts the traceback of a config into its message; the last line tells why.
        reason = str(error).strip()
        fail(reason.splitlines()[-1] if 'Traceback' in reason else reason)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = str(error).strip('\'"').replace('\\n', '\n').replace("\\'", "'")
        fail(f'--config: {reason}\nconfigs/base.py lists every field with its default.')
    except OSError as error:
        fail(f'--config cannot be loaded: {str(error).splitlines()[-1].strip()}')


def fail(reason: object) -> NoReturn:
    """Prints the reason and ends the command with exit code 2."""
    print(f'error: {reason}', file=sys.stderr)
    sys.exit(2)


def quiet_libraries() -> None:
    """Leaves out the log of TensorFlow and of JAX's start, which says nothing about a user's run.

    To be called before TensorFlow is imported. What the user's environment says stays.
    """
    logging.set_verbosity(logging.ERROR)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    # Else TensorFlow announces, at any level, how it computes; here it only reads files.
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
