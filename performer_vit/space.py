"""A search space: which fields of a config may take which values, and in which combinations."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from performer_vit.errors import BadInput, choose, shown
from performer_vit.fields import FIELDS, OF_THE_TEST

DISTRIBUTIONS = ('uniform', 'log_uniform', 'integer', 'choice')
RELATIONS = ('divisible by', 'at most', 'at least')

# In a distribution 'integer', whose values are held as a list.
_INTEGERS = 10**6
# Fields that decide which images score a trial.
_FIXED = 'dataset.'


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A field and the values that it may take.

    Attributes:
      field: its dotted name, such as 'optimizer.learning_rate'.
      distribution: one of `DISTRIBUTIONS`.
      low, high: the ends, both included; None for a 'choice'.
      values: all values, where they are a finite number; else ().
    """

    field: str
    distribution: str
    low: float | None
    high: float | None
    values: tuple

    @property
    def labels(self) -> tuple:
        """The values as a database can hold them: what is no plain number or text, as text."""
        return tuple(
            value if isinstance(value, bool | int | float | str) else repr(value)
            for value in self.values
        )

    def value(self, label):
        """The value that has this label; a number of an interval is its own."""
        if self.distribution != 'choice':
            return label
        return dict(zip(self.labels, self.values, strict=True)).get(label, label)


@dataclasses.dataclass(frozen=True)
class Condition:
    """What must hold between a field and another field or a number."""

    left: str
    relation: str
    right: str | int | float

    def holds(self, fields: Mapping[str, object]) -> bool:
        """Whether it holds for these values of all fields."""
        left = fields[self.left]
        right = fields[self.right] if isinstance(self.right, str) else self.right
        if self.relation == 'divisible by':
            return right != 0 and left % right == 0
        return left <= right if self.relation == 'at most' else left >= right

    def __str__(self) -> str:
        return f'{self.left} {self.relation} {self.right}'


@dataclasses.dataclass(frozen=True)
class Space:
    """The parameters of a search, and the conditions on their combinations.

    A combination is a mapping from fields to labels, see `Parameter.labels`.
    """

    parameters: tuple[Parameter, ...]
    conditions: tuple[Condition, ...]

    @property
    def size(self) -> int | None:
        """How many combinations there are, conditions apart; None where they have no number."""
        if any(not parameter.values for parameter in self.parameters):
            return None
        return math.prod(len(parameter.values) for parameter in self.parameters)

    def combination(self, number: int) -> dict:
        """Combination number `number`, from 0 to `size` − 1; the last parameter changes fastest."""
        labels = {}
        for parameter in reversed(self.parameters):
            number, place = divmod(number, len(parameter.values))
            labels[parameter.field] = parameter.labels[place]
        return {parameter.field: labels[parameter.field] for parameter in self.parameters}

    def values(self, combination: Mapping) -> dict:
        """The values of a combination, by field."""
        return {
            parameter.field: parameter.value(combination[parameter.field])
            for parameter in self.parameters
        }

    def unmet(self, fields: Mapping[str, object]) -> Condition | None:
        """The first condition that does not hold for these values of all fields, if any."""
        return next((c for c in self.conditions if not c.holds(fields)), None)


def parse(
    space: Sequence[Sequence],
    conditions: Sequence[Sequence],
    fields: Mapping[str, object],
    *,
    grid: bool,
) -> Space:
    """Reads a search space, and checks all of it.

    Args:
      space: rows of a field, a distribution and its values: (field, 'uniform' or 'log_uniform' or
        'integer', low, high), or (field, 'choice', values). For a grid, 'uniform' and 'log_uniform'
        have a fifth element, the number of points from low to high, at equal distances or ratios.
      conditions: rows (field, relation, field or number), with a relation of `RELATIONS`.
      fields: every field of the config by its dotted name, with its value, whose type is that of
        all other values.
      grid: whether every parameter must have a finite number of values.

    Raises:
      BadInput: something in it is unknown or impossible; the message says what and what to do.
    """
    if not space:
        raise BadInput(
            'sweep.space is empty: give it a row for each field to search, such as '
            "('optimizer.learning_rate', 'log_uniform', 1e-3, 3e-2)."
        )
    parameters = tuple(_parameter(row, fields, grid) for row in space)
    names = [parameter.field for parameter in parameters]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f'sweep.space has {name!r} more than once: keep one of its rows.')
    return Space(parameters, tuple(_condition(row, fields) for row in conditions))


def _parameter(row: Sequence, fields: Mapping[str, object], grid: bool) -> Parameter:
    if not isinstance(row, tuple | list) or len(row) < 3:
        raise BadInput(
            f'sweep.space has the row {row!r}; a row is (field, distribution, low, high) or '
            "(field, 'choice', values)."
        )
    field, distribution, *rest = row
    _check_field(f'sweep.space has {field!r}', field, fields)
    if field.startswith(_FIXED):
        raise BadInput(
            f'sweep.space has {field!r}, but all trials must be scored on the same images: '
            'search other fields, and set this one in the config.'
        )
    if field in OF_THE_TEST:
        raise BadInput(
            f'sweep.space has {field!r}, which changes nothing of the validation accuracy that '
            'scores a trial: search other fields, and set this one in the config.'
        )
    what = f'sweep.space, {field!r}'
    choose(f'{what}: the distribution', distribution, DISTRIBUTIONS)
    if distribution == 'choice':
        return _choice(what, row, field, fields[field])
    points = rest.pop() if len(rest) == 3 and distribution != 'integer' else None
    if len(rest) != 2:
        raise BadInput(
            f'{what}: {row!r} should be (field, {distribution!r}, low, high)'
            + ('' if distribution == 'integer' else ', with the number of points last for a grid')
            + '.'
        )
    kind = int if distribution == 'integer' else float
    if type(fields[field]) is not kind:
        raise BadInput(
            f'{what}: {distribution!r} is for fields of type {kind.__name__}, and this one is '
            f'{fields[field]!r}: choose another distribution of {DISTRIBUTIONS}.'
        )
    low, high = (_checked(what, value, field, fields[field]) for value in rest)
    if low >= high:
        raise BadInput(f'{what}: low is {low} and high is {high}; low must be below high.')
    if distribution == 'integer':
        if high - low >= _INTEGERS:
            raise BadInput(
                f'{what}: {low} to {high} are {high - low + 1:,} integers; allowed are '
                f"{_INTEGERS:,}. Take fewer, or 'choice' with some of them."
            )
        return Parameter(field, distribution, low, high, tuple(range(low, high + 1)))
    if distribution == 'log_uniform' and low <= 0:
        raise BadInput(f"{what}: low is {low}; 'log_uniform' needs one above 0, or take 'uniform'.")
    if not grid and points is not None:
        raise BadInput(
            f"{what}: the number of points, {points!r}, is for the sampler 'grid' alone: leave it "
            'out, or set sweep.sampler to it.'
        )
    values = _points(what, distribution, low, high, points) if grid else ()
    return Parameter(field, distribution, low, high, values)


def _choice(what: str, row: Sequence, field: str, example: object) -> Parameter:
    values = row[2]
    if len(row) != 3 or not isinstance(values, tuple | list) or not values:
        raise BadInput(f"{what}: {row!r} should be (field, 'choice', values), with one or more.")
    values = tuple(_checked(what, value, field, example) for value in values)
    for value in values:
        if values.count(value) > 1:
            raise BadInput(f'{what}: {value!r} is there more than once: keep one.')
    return Parameter(field, 'choice', None, None, values)


def _points(what: str, distribution: str, low: float, high: float, points: object) -> tuple:
    if type(points) is not int or points < 2:
        raise BadInput(
            f'{what}: the number of points of the grid is {points!r}; give an integer of 2 or more '
            'after low and high.'
        )
    steps = [i / (points - 1) for i in range(1, points - 1)]
    if distribution == 'uniform':
        inner = [low + (high - low) * step for step in steps]
    else:
        inner = [low * (high / low) ** step for step in steps]
    return (low, *inner, high)


def _checked(what: str, value: object, field: str, example: object) -> object:
    """The value, which must be one that the field may hold, and of the type of the example.

    Floats may be written as integers, and tuples as lists.
    """
    if type(example) is float and type(value) is int:
        value = float(value)
    if type(example) is tuple and type(value) is list:
        value = tuple(value)
    if type(value) is not type(example):
        raise BadInput(
            f'{what}: {value!r} is of type {type(value).__name__}; the field is {example!r} in the '
            f'config, of type {type(example).__name__}, and so must be every value of it.'
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f'{what}: {value} is not finite; give a number.')
    kind = FIELDS.get(field)
    if kind is not None and not kind.holds(value):
        raise BadInput(f'{what}: {shown(value)}; allowed is {kind.allowed}. Give no other value.')
    return value


def _condition(row: Sequence, fields: Mapping[str, object]) -> Condition:
    if not isinstance(row, tuple | list) or len(row) != 3:
        raise BadInput(
            f'sweep.conditions has the row {row!r}; a row is (field, relation, field or number).'
        )
    left, relation, right = row
    what = f'sweep.conditions, {row!r}'
    choose(f'{what}: the relation', relation, RELATIONS)
    _check_field(f'{what} has {left!r}', left, fields)
    if isinstance(right, str):
        _check_field(f'{what} has {right!r}', right, fields)
    numbers = (int,) if relation == 'divisible by' else (int, float)
    for side in (fields[left], fields[right] if isinstance(right, str) else right):
        if type(side) not in numbers:
            raise BadInput(
                f'{what}: {side!r} is of type {type(side).__name__}; {relation!r} compares '
                f'{" and ".join(number.__name__ for number in numbers)} alone.'
            )
    if relation == 'divisible by' and right == 0:
        raise BadInput(f'{what}: nothing is divisible by 0; give another number.')
    return Condition(left, relation, right)


def _check_field(what: str, field: object, fields: Mapping[str, object]) -> None:
    if not isinstance(field, str) or field not in fields:
        raise BadInput(f'{what}, which is no field of the config; configs/base.py lists them.')
