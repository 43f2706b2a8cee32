"""The search space: what is refused, what is enumerated, which conditions hold."""

import math

import numpy as np
import pytest

from performer_vit import space
from performer_vit.errors import BadInput

FIELDS = {
    'optimizer.learning_rate': 1e-2,
    'optimizer.name': 'muon',
    'model.width': 128,
    'model.num_heads': 4,
    'model.depth': 2,
    'model.dropout_rate': 0.0,
    'model.stem_channels': ((16,), (32,)),
    'profile': False,
    'dataset.split_seed': 0,
    'test_state': 'best',
    'seed': 0,
    'augment.cutout': 0,
}


def parse(*rows, conditions=(), grid=False):
    return space.parse(rows, conditions, FIELDS, grid=grid)


def test_what_is_read_is_what_was_written():
    """Catches floats that stay integers, ends that swap, and choices that lose their order."""
    made = parse(
        ('optimizer.learning_rate', 'log_uniform', 1e-3, 1),
        ('model.depth', 'integer', 1, 3),
        ['model.width', 'choice', [64, 32]],
    )
    rate, depth, width = made.parameters
    assert (rate.low, rate.high, rate.values) == (1e-3, 1.0, ()) and type(rate.high) is float
    assert depth.values == (1, 2, 3)
    assert width.values == (64, 32) and width.low is None
    assert made.size is None


@pytest.mark.parametrize(
    'row, message',
    [
        (('model.wdith', 'choice', (1,)), r"'model.wdith', which is no field of the config"),
        (('model.width', 'gaussian', 1, 2), r"distribution is 'gaussian'; allowed are 'uniform'"),
        (('model.width', 'uniform', 32, 64), r"'uniform' is for fields of type float.*is 128"),
        (('optimizer.learning_rate', 'integer', 1, 2), r"'integer' is for fields of type int"),
        (('profile', 'integer', 0, 1), r"'integer' is for fields of type int"),
        (('model.depth', 'integer', 1, 2.5), r'2.5 is of type float; the field is 2.*type int'),
        (('model.depth', 'integer', True, 4), r'True is of type bool; the field is 2'),
        (('model.width', 'choice', (64, '128')), r"'128' is of type str; the field is 128"),
        (('optimizer.name', 'choice', ('adam', 1)), r"1 is of type int; the field is 'muon'"),
        (('profile', 'choice', (True, 1)), r'1 is of type int; the field is False'),
        (('model.width', 'choice', ()), r'with one or more'),
        (('model.width', 'choice', 64), r'with one or more'),
        (('model.width', 'choice', (64, 64)), r'64 is there more than once'),
        (('optimizer.learning_rate', 'uniform', 1.0, 1.0), r'low is 1.0 and high is 1.0'),
        (('model.depth', 'integer', 3, 2), r'low is 3 and high is 2'),
        (('seed', 'integer', 0, 2**32 - 1), r'are 4,294,967,296 integers; allowed'),
        (('model.dropout_rate', 'log_uniform', 0, 0.5), r"low is 0.0; 'log_uniform' needs"),
        (('optimizer.learning_rate', 'uniform', 0.1, math.inf), r'inf is not finite'),
        (('optimizer.learning_rate', 'uniform', 0.1), r"should be \(field, 'uniform', low, high\)"),
        (('model.depth', 'integer', 1, 2, 3), r"should be \(field, 'integer', low, high\)\."),
        (('optimizer.learning_rate', 'uniform', 0.1, 0.2, 3), r"is for the sampler 'grid' alone"),
        (('dataset.split_seed', 'integer', 0, 3), r'must be scored on the same images'),
        (('test_state', 'choice', ('best', 'last')), r'changes nothing of the validation accuracy'),
        (('model.depth', 'integer', 0, 3), r"'model.depth': 0; allowed is an integer from 1"),
        (('model.dropout_rate', 'uniform', 0.0, 1.5), r'1.5; allowed is a number from 0 to below'),
        (('model.width', 'choice', (64, -64)), r'-64; allowed is an integer from 1'),
        ((['model.width'], 'choice', (64,)), r'which is no field of the config'),
        ('model.width', r'a row is \(field, distribution'),
    ],
)
def test_bad_rows_name_field_given_and_allowed(row, message):
    with pytest.raises(BadInput, match=r'sweep\.space.*' + message):
        parse(row)


def test_no_rows_and_two_rows_of_a_field():
    with pytest.raises(BadInput, match=r'sweep\.space is empty: give it a row'):
        parse()
    with pytest.raises(BadInput, match=r"has 'model.depth' more than once"):
        parse(('model.depth', 'integer', 1, 2), ('model.depth', 'choice', (3,)))


@pytest.mark.parametrize('points', [(), (1,), (2.0,), (True,)])
def test_a_grid_needs_its_points(points):
    with pytest.raises(BadInput, match=r'number of points of the grid is'):
        parse(('model.dropout_rate', 'uniform', 0.0, 0.2, *points), grid=True)


def test_points_of_a_grid():
    """Equal distances, or equal ratios; both ends to the last bit, which Optuna insists on."""
    made = parse(
        ('model.dropout_rate', 'uniform', 0.1, 0.3, 5),
        ('optimizer.learning_rate', 'log_uniform', 1e-3, 3e-2, 4),
        grid=True,
    )
    dropout, rate = (parameter.values for parameter in made.parameters)
    np.testing.assert_allclose(dropout, np.linspace(0.1, 0.3, 5), rtol=1e-14)
    np.testing.assert_allclose(rate, np.geomspace(1e-3, 3e-2, 4), rtol=1e-14)
    assert (dropout[0], dropout[-1], rate[0], rate[-1]) == (0.1, 0.3, 1e-3, 3e-2)


def test_every_combination_has_one_number():
    """Catches an enumeration that repeats or leaves out one."""
    made = parse(
        ('model.depth', 'integer', 1, 3),
        ('model.width', 'choice', (64, 32)),
        ('optimizer.name', 'choice', ('adam', 'muon')),
    )
    combinations = [made.combination(number) for number in range(made.size)]
    assert len(combinations) == 12
    assert len({tuple(combination.values()) for combination in combinations}) == 12
    assert combinations[0] == {'model.depth': 1, 'model.width': 64, 'optimizer.name': 'adam'}
    assert combinations[-1] == {'model.depth': 3, 'model.width': 32, 'optimizer.name': 'muon'}
    assert list(combinations[0]) == [parameter.field for parameter in made.parameters]


def test_tuples_are_searched_under_labels():
    """A database holds no tuples: they go by their text, and come back as what they were."""
    channels = (((16, 32), (32,)), ((8,), (16,)))
    made = parse(('model.stem_channels', 'choice', channels), ('model.width', 'choice', (64,)))
    label = made.combination(1)['model.stem_channels']
    assert label == '((8,), (16,))'
    assert made.values(made.combination(1)) == {
        'model.stem_channels': ((8,), (16,)), 'model.width': 64,
    }  # fmt: skip


@pytest.mark.parametrize(
    'condition, holds',
    [
        (('model.width', 'divisible by', 'model.num_heads'), True),
        (('model.width', 'divisible by', 48), False),
        (('model.width', 'at most', 128), True),
        (('model.width', 'at most', 127.5), False),
        (('model.num_heads', 'at least', 'model.depth'), True),
        (('model.depth', 'at least', 'model.num_heads'), False),
    ],
)
def test_conditions(condition, holds):
    made = parse(('model.depth', 'integer', 1, 3), conditions=(condition,))
    unmet = made.unmet(FIELDS)
    assert (unmet is None) == holds
    if not holds:
        assert str(unmet) == ' '.join(str(part) for part in condition)


def test_a_field_that_is_0_divides_nothing():
    """Catches a ZeroDivisionError in the middle of a sweep."""
    made = parse(
        ('augment.cutout', 'integer', 0, 3),
        conditions=(('model.width', 'divisible by', 'augment.cutout'),),
    )
    assert made.unmet({**FIELDS, 'augment.cutout': 0}) is not None


@pytest.mark.parametrize(
    'condition, message',
    [
        (('model.width', 'multiple of', 4), r"relation is 'multiple of'; allowed are 'divisible"),
        (('model.wdith', 'at most', 4), r"'model.wdith', which is no field"),
        (('model.width', 'at most', 'model.wdith'), r"'model.wdith', which is no field"),
        (('optimizer.name', 'at most', 4), r"'muon' is of type str; 'at most' compares int and"),
        (('model.width', 'divisible by', 2.0), r"2.0 is of type float; 'divisible by' compares"),
        (('profile', 'at most', 1), r'False is of type bool'),
        (('model.width', 'divisible by', 0), r'nothing is divisible by 0'),
        (('model.width', 'at most'), r'a row is \(field, relation, field or number\)'),
    ],
)
def test_bad_conditions(condition, message):
    with pytest.raises(BadInput, match=r'sweep\.conditions.*' + message):
        parse(('model.depth', 'integer', 1, 3), conditions=(condition,))
