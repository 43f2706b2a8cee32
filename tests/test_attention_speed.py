"""The study of attention's speed: its arithmetic, what it leaves out, and its words.

No test asserts on a clock. What is timed is tested in `test_attention_contenders.py`.
"""

import json
import math
import subprocess

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from performer_vit import (
    attention_contenders,
    attention_memory,
    attention_speed,
    favor,
    figures,
    timing,
    workdir,
)
from performer_vit.errors import BadInput


@pytest.fixture
def tiny(monkeypatch):
    """64 tokens in all, one call a turn."""
    for module in (attention_contenders, attention_speed):
        monkeypatch.setattr(module, 'NUM_TOKENS', 64)
    monkeypatch.setattr(timing, 'PEAK_SIZE', 64)
    monkeypatch.setattr(timing, 'TURN_SECONDS', 0)
    monkeypatch.setattr(timing, 'PAUSE_SECONDS', 0)


def numbers(value):
    """All numbers in what JSON can hold."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [] if isinstance(value, str | bool | None) else [value]


def find(rows, **wanted):
    (row,) = (row for row in rows if all(row[name] == value for name, value in wanted.items()))
    return row


# The study


def test_figures_are_complete_and_survive_json_and_drawing(tiny, tmp_path):
    """Catches a contender, length or pass that is lost, NaN, and what JSON cannot hold."""
    said = []
    study = attention_speed.study(
        lengths=[32, 16], num_features=[8], rounds=2, quadratic_limit=16, on_progress=said.append
    )
    assert [row['length'] for row in study['rows']] == [16] * 8 + [32] * 8
    assert said[-2:] == ['round 1 of 2', 'round 2 of 2']
    assert all(math.isfinite(number) and number >= 0 for number in numbers(study['rows']))

    # At 32 tokens the linear ones run, exact attention does not, and says so.
    relu = find(study['rows'], length=32, contender='relu', **{'pass': 'gradient'})
    assert 0 < relu['seconds']['low'] <= relu['seconds']['median'] <= relu['seconds']['high']
    assert set(relu['time_ratios']) == {'softmax'}
    exact = find(study['rows'], length=32, contender='exact', **{'pass': 'forward'})
    assert exact['not_run'] == 'longer than --quadratic_limit=16' and 'seconds' not in exact
    relu = find(study['rows'], length=16, contender='relu', **{'pass': 'forward'})
    assert set(relu['time_ratios']) == {'softmax', 'exact', 'jax_exact'}
    assert {tuple(found['lengths']) for found in study['crossovers']} == {(16,)}
    assert study['settings']['lengths'] == [16, 32] and 'torch' not in study['versions']

    text = attention_speed.table(study)
    assert text.count('not run: longer than --quadratic_limit=16') == 2 * 2
    assert 'R = 8, forward and gradient' in text and 'relu, R = 8, forward: ' in text

    workdir.write_json(tmp_path / 'study.json', study)
    read = workdir.read_json(tmp_path / 'study.json')
    assert read == study and attention_speed.table(read) == text
    assert figures.to_array(figures.attention_speed(read)).std() > 10


def test_ratios_and_rates_follow_from_the_seconds(tiny):
    """Catches theirs over ours, or of another R, tokens of one sequence for all, and wrong counts.

    One round, so that every spread is one number. By hand: B·H·N·2·R·D operations a product, 4 of
    them forward, 6 more for the gradient and 2 that are computed twice.
    """
    study = attention_speed.study(lengths=[16], num_features=[8, 4], rounds=1)
    peak = study['peak_gflop_per_second'][0]['median']
    for which, products in (('forward', 4), ('gradient', 10)):
        relu, softmax, exact = (
            find(study['rows'], contender=name, num_features=features, **{'pass': which})
            for name, features in (('relu', 8), ('softmax', 8), ('exact', None))
        )
        seconds = relu['seconds']['median']
        assert relu['batch_size'] == 4
        assert relu['seconds_per_token']['median'] == pytest.approx(seconds / 64)
        rate = relu['gflop_per_second']['median']
        assert rate * seconds * 1e9 == pytest.approx(products * 4 * 8 * 16 * 2 * 8 * 64)
        assert relu['fraction_of_peak']['median'] == pytest.approx(rate / peak)
        for other in (softmax, exact):
            ratio = relu['time_ratios'][other['contender']]['median']
            assert ratio == pytest.approx(seconds / other['seconds']['median'])
        if which == 'gradient':
            twice = relu['fraction_of_peak_recomputing']['median']
            assert twice == pytest.approx(12 / 10 * rate / peak)
        else:
            assert 'fraction_of_peak_recomputing' not in relu


@pytest.mark.parametrize('which', attention_contenders.PASSES)
@pytest.mark.parametrize('num_features', [256, None])
def test_operations_are_those_that_xla_counts(which, num_features):
    """Catches a product too many or too few: XLA counts attention written down plainly.

    It also counts what is element-wise: a few of each 128 operations.
    """
    length, heads, dim = 512, attention_contenders.NUM_HEADS, attention_contenders.HEAD_DIM
    shape = (attention_contenders.batch_size(length), length, heads, dim)
    projection = jnp.ones((num_features or 1, dim))

    def attention(query, key, value):
        if num_features is None:
            logits = jnp.einsum('bnhd,bmhd->bhnm', query, key)
            return jnp.einsum('bhnm,bmhd->bnhd', jax.nn.softmax(logits), value)
        query, key = (jax.nn.relu(x @ projection.T) for x in (query, key))
        state = jnp.einsum('bmhr,bmhd->bhrd', key, value)
        return jnp.einsum('bnhr,bhrd->bnhd', query, state)

    def loss(*inputs):
        return jnp.sum(attention(*inputs) ** 2)

    function = attention if which == 'forward' else jax.value_and_grad(loss, argnums=(0, 1, 2))
    counted = jax.jit(function).lower(*[jax.ShapeDtypeStruct(shape, jnp.float32)] * 3)
    case = attention_speed._Case(length, 'any', num_features)
    ours = attention_speed._flops(case, which, is_causal=False)
    assert ours == pytest.approx(counted.cost_analysis()['flops'], rel=0.04)


def product_operations(jaxpr):
    """Operations of all matrix products, each as often as the loops around it run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            ((contracted, _), _) = equation.params['dimension_numbers']
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        times = equation.params['length'] if equation.primitive.name == 'scan' else 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += times * product_operations(inner)
    return total


@pytest.mark.parametrize(
    ('kernel', 'num_features'), [('relu', 256), ('softmax', 256), ('exact', None)]
)
def test_our_blocks_compute_again_what_the_table_says(kernel, num_features):
    """Catches a claim about the backward pass that is no longer true of the code.

    Normalisers are one more column of the values: a 64th of some products.
    """
    length = 4096
    inputs = [jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32)] * 3
    projection = None if num_features is None else jnp.ones((num_features, 64))

    def loss(*inputs):
        return jnp.sum(favor.favor_attention(*inputs, kernel=kernel, projection=projection) ** 2)

    done = product_operations(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*inputs).jaxpr)
    case = attention_speed._Case(length, kernel, num_features)
    kind = attention_speed._kind(case)
    needed = attention_speed._PRODUCTS[kind]['gradient']
    again = 1 + attention_speed._RECOMPUTED[kind] / needed
    assert done == pytest.approx(again * attention_speed._flops(case, 'gradient', False), rel=0.03)


def test_causal_exact_attention_needs_half_the_products():
    """Catches a rate that counts what a causal mask hides: of N² pairs N (N + 1) / 2 remain."""
    case = attention_speed._Case(100, 'exact', None)
    whole, half = (attention_speed._flops(case, 'forward', is_causal) for is_causal in (0, 1))
    assert half / whole == pytest.approx(101 / 200)


def test_what_grows_too_fast_is_left_out_where_it_is_causal(tiny):
    """Catches performer-pytorch's causal form, with a state for each token, run out of memory."""
    pytest.importorskip('performer_pytorch')
    arguments = {'lengths': [32], 'num_features': [4], 'rounds': 1, 'peers': True}
    ran = {}
    for is_causal in (False, True):
        study = attention_speed.study(**arguments, is_causal=is_causal, quadratic_limit=16)
        ran[is_causal] = {row['contender'] for row in study['rows'] if 'seconds' in row}
        assert study['torch_device'].startswith('cpu, ')
        assert set(study['versions']) >= {'torch', 'performer-pytorch'}
    linear_peers = {'performer_pytorch_relu', 'performer_pytorch_softmax'}
    assert ran == {
        False: {'relu', 'softmax', *linear_peers},
        True: {'relu', 'softmax', 'jax_per_token'},
    }
    assert {found['verdict'] for found in study['crossovers']} == {'unknown'}
    assert 'no exact attention ran' in attention_speed.table(study)
    assert figures.to_array(figures.attention_speed(study)).std() > 10


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'lengths': []}, r'lengths is \[\]; allowed are integers ≥ 1'),
        ({'lengths': [64, 0]}, r'lengths is \[64, 0\]'),
        ({'num_features': [8, 8]}, r'num_features is \[8, 8\].*each once'),
    ],
)
def test_numbers_that_are_not_allowed(arguments, message):
    """Catches a division by zero, and a contender measured twice under one name."""
    with pytest.raises(BadInput, match=message):
        attention_speed.study(**({'lengths': [16], 'num_features': [4], 'rounds': 1} | arguments))


# Where linear attention becomes faster


def test_crossover_of_power_laws_is_exact():
    """Log-log interpolation is exact for power laws: c N against N² meet at N = c.

    Catches interpolation in seconds or in N, or between the wrong two lengths.
    """
    lengths = [16, 64, 1000, 5000]
    linear, exact = [300.0 * n for n in lengths], [float(n) ** 2 for n in lengths]
    found = attention_speed.crossover(lengths, linear, exact)
    assert found['verdict'] == 'from' and found['length'] == pytest.approx(300)


@pytest.mark.parametrize(
    ('linear', 'verdict', 'low', 'high'),
    [
        ([0.5, 0.5, 0.5], 'always', None, None),
        ([2.0, 2.0, 2.0], 'never', None, None),
        ([0.5, 0.5, 2.0], 'never', None, None),
        ([0.5, 2.0, 0.5], 'from', 200, 400),
        ([2.0, 1.0, 0.5], 'from', 200, 200),
    ],
)
def test_crossover_is_where_it_stays_faster(linear, verdict, low, high):
    """Catches the first crossing taken for the last, and a number where there is none."""
    found = attention_speed.crossover([100, 200, 400], linear, [1.0, 1.0, 1.0])
    assert found['verdict'] == verdict
    if low is None:
        assert found['length'] is None
    else:
        assert low - 1e-9 <= found['length'] <= high


# The figure


def made_up_study():
    """Of relu, softmax and exact attention whose times are N and N² for six lengths."""
    lengths = [4**power for power in range(4, 10)]
    rows = [
        {
            'contender': name,
            'num_features': None if name == 'exact' else 256,
            'length': length,
            'pass': which,
            'seconds': timing.spread([second, 2 * second, 0.5 * second]),
        }
        for length in lengths
        for which in attention_contenders.PASSES
        for name, second in (
            ('relu', 11_585.0 * length),
            ('softmax', 23_170.0 * length),
            ('exact', float(length) ** 2),
        )
    ]
    study = {
        'settings': {
            'lengths': lengths, 'num_features': [256], 'is_causal': False, 'num_tokens': 4096,
        },
        'rows': rows,
    }  # fmt: skip
    return study | {'crossovers': attention_speed._crossovers(study)}


def test_lines_are_the_medians_and_rings_where_they_cross():
    """Catches a ring beside its line, and a line of the lowest times."""
    study = made_up_study()
    figure = figures.attention_speed(study)
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        assert labels == ['ReLU, ours', 'softmax, ours', 'exact, ours']
        (line, *_) = handles[1]
        expected = [(length, 23_170.0 * length) for length in study['settings']['lengths']]
        np.testing.assert_allclose(line.get_xydata(), expected)
        rings = [line.get_xydata()[0] for line in axes.lines if line.get_markersize() > 10]
        np.testing.assert_allclose(rings, [(11_585, 11_585.0**2), (23_170, 23_170.0**2)])
        assert 'ReLU faster than exact: from N ≈ 11,585' in axes.get_title()


def test_texts_are_inside_and_do_not_overlap():
    """Catches long titles that run into one another, and lengths that do so along the axis."""
    figure = figures.attention_speed(made_up_study())
    figures.to_array(figure)
    texts = [axes.title for axes in figure.axes] + figure.legends[0].get_texts()
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    width, height = figure.bbox.size
    for index, box in enumerate(boxes):
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[:index])


# Memory


@pytest.mark.slow
def test_peak_memory_is_of_the_call_alone():
    """Catches the peak of the process that asks, memory of imports, and a call not counted.

    Of 4 sequences of 1,024 tokens, with 8 heads, JAX's exact attention forms at least one matrix of
    128 MiB, and not many. Three gradients of 8 MiB are the least for linear attention.
    """
    peak_of_this_process = np.ones(2**27)  # 1 GiB
    exact = attention_memory.peak_memory('jax_exact', 1024, None, False)
    linear = attention_memory.peak_memory('relu', 1024, 16, False)
    del peak_of_this_process
    assert 128 * 2**20 <= exact <= 16 * 128 * 2**20
    assert 24 * 2**20 <= linear <= 128 * 2**20


def test_memory_is_part_of_the_table(tiny, monkeypatch):
    """Catches memory asked for and not shown, and a contender that was not run shown as 0."""
    monkeypatch.setattr(attention_memory, 'peak_memory', lambda *case: 3 * 2**20)
    study = attention_speed.study(
        lengths=[16, 32], num_features=[4], rounds=1, memory=True, quadratic_limit=16
    )
    assert len(study['memory']) == 8
    assert sum('peak_bytes' in row for row in study['memory']) == 6
    lines = attention_speed.table(json.loads(json.dumps(study))).splitlines()
    title = lines.index('Peak resident memory of forward and gradient, beyond the inputs')
    assert lines[title + 3].split() == ['4', 'relu', '3', 'MiB', '3', 'MiB']
    assert lines[title + 5].split() == ['exact', '3', 'MiB', 'not', 'run']


def test_running_out_of_memory_is_said(monkeypatch):
    """Catches a traceback, or a number, where the system has killed the measurement."""
    killed = subprocess.CompletedProcess([], -9, stdout='')
    monkeypatch.setattr(subprocess, 'run', lambda *arguments, **settings: killed)
    with pytest.raises(BadInput, match='jax_exact at N = 65,536 ended with exit code -9'):
        attention_memory.peak_memory('jax_exact', 65536, None, False)


def test_memory_is_refused_where_it_would_not_be_the_devices(monkeypatch):
    """Catches a GPU's study that reports the memory of the host."""
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    with pytest.raises(BadInput, match='--memory is given on .* its gpu backend'):
        attention_speed.study(lengths=[16], num_features=[4], rounds=1, memory=True)
