"""Parsing the flags of a command, how it says that they are wrong, and what it leaves unsaid."""

import contextlib
import errno
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn, TextIO

from absl import flags
from absl import logging as absl_logging

from performer_vit.errors import one_line


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
        # ml_collections puts the traceback of a config into its message; the last line tells why,
        # behind the kind of the error.
        reason = str(error).strip()
        if 'Traceback' in reason:
            reason = re.sub(r'^[\w.]+: ', '', reason.splitlines()[-1])
        fail(reason)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = str(error).replace('\\n', '\n').replace("\\'", "'").strip('\'"')
        name, _, hint = reason.partition('\n')
        name = name.strip("'")
        if name.isidentifier():
            reason = f'there is no field {name!r} there. {hint}'.strip()
        elif 'get_config' in reason or 'NoneType' in reason:
            reason = (
                'the file has no function get_config that returns a config; see configs/vit.py.'
            )
        fail(f'--config: {reason}\nconfigs/base.py lists every field with its default.')
    except OSError as error:
        fail(f'--config cannot be loaded: {str(error).splitlines()[-1].strip()}')
    except Exception as error:  # Of any kind: the file is the user's.
        where = traceback.extract_tb(error.__traceback__)[-1]
        # The text of a syntax error says where it is.
        place = f' ({where.filename}, line {where.lineno})' * (not isinstance(error, SyntaxError))
        fail(f'--config cannot be loaded: {one_line(error)}{place}')


def fail(reason: object) -> NoReturn:
    """Prints the reason and ends the command with exit code 2."""
    print(f'error: {reason}', file=sys.stderr)
    sys.exit(2)


class _Lasting:
    """A stream of text to somebody who may go away, as the `tee` of a pipe at Ctrl-C does.

    What is written after that goes nowhere, instead of being the end of a training.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        # A letter that the encoding has not is no reason to end either.
        stream.reconfigure(errors='backslashreplace')

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes the text, as far as anybody reads it."""
        with self._lasting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Passes on what was written, as far as anybody reads it."""
        with self._lasting():
            self._stream.flush()

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # The reader of a pipe, or the terminal, that is gone.
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            with open(os.devnull, 'w') as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


def last_to_the_end() -> None:
    """Lets a program go on whose output nobody reads any more, or never did; for its beginning."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:  # Closed from the start.
            setattr(sys, name, open(os.devnull, 'w'))
        elif isinstance(stream, io.TextIOWrapper):  # And no test's or notebook's own.
            setattr(sys, name, _Lasting(stream))


def quiet_libraries() -> None:
    """Leaves out the log of TensorFlow and of JAX's start, which says nothing about a user's run.

    To be called before TensorFlow is imported. What the user's environment says stays.
    """
    absl_logging.set_verbosity(absl_logging.ERROR)
    # Where a disk is full, Orbax raises one error, and asyncio would tell of every array's own.
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    # Else TensorFlow announces, at any level, how it computes; here it only reads files.
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
