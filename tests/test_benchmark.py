"""The benchmarks' arithmetic; no test asserts on a clock."""

import pytest

from performer_vit import benchmark


def test_contenders_alternate():
    """Catches contenders that run one after the other, which drift would favour."""
    order = []

    def contender(name):
        return lambda: order.append(name) or float(len(order))

    measured = benchmark.alternate({'a': contender('a'), 'b': contender('b')}, rounds=3)
    assert order == ['a', 'b'] * 3
    assert measured == {'a': [1.0, 3.0, 5.0], 'b': [2.0, 4.0, 6.0]}
    assert benchmark.spread([3.0, 1.0, 2.0]) == {'median': 2.0, 'low': 1.0, 'high': 3.0}


@pytest.mark.parametrize('name', ['train_step', 'inference'])
def test_figures_agree_with_each_other(tiny_config, monkeypatch, name):
    """GFLOP/s = images/s × GFLOP an image, and the FLOPs are those of the matrix products.

    The forward pass by hand, in multiply-adds per image: the stem, three projections, two products
    of FAVOR+ with their features, the output, the MLP, the head; a training step is three times
    that. XLA also counts what is element-wise, and leaves out the gradients of the pixels: here,
    where the width is tiny, it may say from 0.8 times to twice as much.
    """
    monkeypatch.setattr(benchmark, 'PEAK_SIZE', 256)
    figures = benchmark.BENCHMARKS[name](tiny_config, 2)
    rate = figures['images_per_second']['median'] * figures['gflop_per_image']
    assert figures['gflop_per_second']['median'] == pytest.approx(rate, rel=1e-9)
    tokens, width, mlp, features, heads, dim = 16, 16, 32, 8, 2, 8
    macs = tokens * width * (8 * 8 * 3 + 4 * width + 2 * mlp)
    macs += tokens * heads * (2 * dim * features + 2 * features * (dim + 1)) + width * 10
    by_hand = 2e-9 * macs * (3 if name == 'train_step' else 1)
    assert 0.8 * by_hand < figures['gflop_per_image'] < 2.0 * by_hand
    assert figures['dataset'] == 'digits' and figures['num_tokens'] == 16
    text = benchmark.table(figures)
    assert 'of the peak' in text and 'images/s' in text
    assert ('whole loop' in text) == (name == 'train_step')
