"""The one error that a user's input can raise."""

import itertools
import textwrap
from collections.abc import Iterable

LONGEST = 200  # Characters of a value in a message.


class _Absent:
    def __repr__(self) -> str:
        return 'absent'


ABSENT = _Absent()  # In a message, what one side has and the other has not.


class BadInput(ValueError):
    """The user's input cannot be honoured.

    The message says what was given, what is allowed and what to do. `run.py` prints it without a
    traceback; library users may catch it as the `ValueError` that it is.
    """


def choose(what: str, given: object, allowed) -> None:
    """Raises `BadInput` unless `given` is one of the names `allowed` for the field `what`."""
    if given not in tuple(allowed):
        names = ', '.join(repr(name) for name in allowed)
        raise BadInput(f'{what} is {shown(given)}; allowed are {names}. Choose one of these names.')


def shown(value: object) -> str:
    """`repr` of a value, of bounded length, to be part of a message."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write out integers of thousands of digits.
        return f'a large {type(value).__name__}'
    return text if len(text) <= LONGEST else f'{text[: LONGEST - 3]} …'


def first_difference(name: str, ours: object, theirs: object) -> tuple[str, object, object]:
    """Two values that differ, to be shown under a name; of two lists, the first entry that does."""
    if not (isinstance(ours, list) and isinstance(theirs, list)):
        return name, ours, theirs
    pairs = enumerate(itertools.zip_longest(ours, theirs, fillvalue=ABSENT), start=1)
    return next(
        ((f'{name}, number {place}', *pair) for place, pair in pairs if pair[0] != pair[1]),
        (name, ours, theirs),  # As 1 and 1.0, which JSON tells apart and Python does not.
    )


def unlike(unknown: Iterable[str], missing: Iterable[str]) -> str:
    """What a section with other fields than it should have, has and lacks: a part of a message."""
    parts = {'has the unknown fields': sorted(unknown), 'lacks': sorted(missing)}
    return ' and '.join(f'{what} {", ".join(names)}' for what, names in parts.items() if names)


def one_line(error: Exception) -> str:
    """Kind and text of an error in one line of bounded length, to be part of a message."""
    return textwrap.shorten(f'{type(error).__name__}: {error}', 300, placeholder=' …')
