"""What is timed against each other computes the same: against NumPy, and against other libraries.

`test_attention_speed.py` tests the study that times it.
"""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from performer_vit import attention_contenders, feature_maps, projections
from performer_vit.errors import BadInput
from tests import reference

BATCH, LENGTH, HEADS, DIM, FEATURES = 2, 40, 3, 16, 24

CAUSAL = [False, True]


def make_inputs(scale=1.0):
    keys = jax.random.split(jax.random.key(1), 3)
    query, key, value = (jax.random.normal(k, (BATCH, LENGTH, HEADS, DIM)) for k in keys)
    return scale * query, scale * key, value


def make_projection():
    return projections.draw(0, 0, 0, FEATURES, DIM, 'orthogonal')


def call(name, which, inputs, is_causal):
    """The result of a pass as NumPy arrays [B, N, H, D], PyTorch's turned to that layout."""
    if name in attention_contenders.TORCH:
        pytest.importorskip('performer_pytorch')
    projection = None if name in attention_contenders.EXACT else make_projection()
    result = attention_contenders.make_call(
        name, which, inputs, projection=projection, is_causal=is_causal
    )()
    turn = name in attention_contenders.TORCH

    def to_numpy(x):
        return np.swapaxes(np.asarray(x), 1, 2) if turn else np.asarray(x)

    if which == 'forward':
        return to_numpy(result)
    loss, gradients = result
    return float(loss), [to_numpy(x) for x in gradients]


def causal_mask(is_causal):
    return np.tri(LENGTH, dtype=bool) if is_causal else None


# Everyone computes the attention that its name says


@pytest.mark.parametrize('is_causal', CAUSAL)
@pytest.mark.parametrize('name', ['exact', 'jax_exact', 'torch_exact'])
def test_exact_contenders_are_softmax_attention(name, is_causal):
    """Catches a wrong layout, scale or mask in any, which would compare different work."""
    inputs = make_inputs()
    expected = reference.attention('exact', *inputs, causal_mask(is_causal))
    output = call(name, 'forward', inputs, is_causal)
    np.testing.assert_allclose(output, expected, atol=1e-5)


RELU = [
    ('relu', False),
    ('relu', True),
    ('jax_per_token', True),
    ('performer_pytorch_relu', False),
    ('performer_pytorch_relu', True),
]


@pytest.mark.parametrize(('name', 'is_causal'), RELU)
def test_relu_contenders_are_the_same_linear_attention(name, is_causal):
    """Catches another projection, ε or scale in one of them, and a scan that is off by a token.

    performer-pytorch adds the same ε = 1e-3 and the same D^-¼, and has no 1/√R, which cancels; its
    causal form adds 1e-6 to each sum of key features, of 1e-3 or more a key.
    """
    inputs = make_inputs()
    expected = reference.attention('relu', *inputs, causal_mask(is_causal), make_projection())
    output = call(name, 'forward', inputs, is_causal)
    np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.parametrize(
    ('name', 'is_causal'),
    [*itertools.product(('softmax', 'exact', 'jax_exact', 'torch_exact'), CAUSAL), *RELU],
)
def test_gradients_of_contenders_agree(name, is_causal):
    """Catches a pass that leaves out a gradient, or computes that of another loss.

    What they must agree with is JAX's autodiff of the matrix of weights, formed and masked.
    """
    inputs = make_inputs()
    mask = causal_mask(is_causal)

    def quadratic(query, key, value):
        if name in attention_contenders.EXACT:
            weights = jnp.exp(jnp.einsum('bnhd,bmhd->bhnm', query, key) / DIM**0.5)
        else:
            feature_map = feature_maps.softmax if name == 'softmax' else feature_maps.relu
            query, key = (feature_map(x, make_projection()) for x in (query, key))
            weights = jnp.einsum('bnhr,bmhr->bhnm', query, key)
        weights = weights if mask is None else jnp.where(mask, weights, 0)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return jnp.sum(jnp.einsum('bhnm,bmhd->bnhd', weights, value) ** 2)

    loss, gradients = jax.value_and_grad(quadratic, argnums=(0, 1, 2))(*inputs)
    own_loss, own_gradients = call(name, 'gradient', inputs, is_causal)
    assert own_loss == pytest.approx(float(loss), rel=1e-5)
    for own, expected in zip(own_gradients, gradients, strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-4 * np.max(np.abs(expected)))


# performer-pytorch's softmax features, which have an ε of their own


def torch_inputs(inputs):
    torch = pytest.importorskip('torch')
    return [torch.from_numpy(np.swapaxes(np.asarray(x), 1, 2).copy()) for x in inputs]


def test_softmax_is_that_of_performer_pytorch_without_its_epsilon():
    """Catches another projection or scale: with ε = 0 all other factors of theirs cancel."""
    inputs = make_inputs()
    query, key, value = torch_inputs(inputs)
    peer = pytest.importorskip('performer_pytorch.performer_pytorch')
    projection = peer.torch.from_numpy(np.array(make_projection()))
    query_features, key_features = (
        peer.softmax_kernel(x, projection_matrix=projection, is_query=is_query, eps=0.0)
        for x, is_query in ((query, True), (key, False))
    )
    theirs = peer.linear_attention(query_features, key_features, value)
    ours = call('softmax', 'forward', inputs, False)
    np.testing.assert_allclose(ours, np.swapaxes(theirs.numpy(), 1, 2), atol=1e-5)


@pytest.mark.parametrize('scale', [0.25, 1.0])
def test_the_softmax_contender_of_performer_pytorch_adds_1e_4_to_each_feature(scale):
    """Says what is timed under that name, by its formula in float64.

    φ(q) = exp(u - ‖q'‖²/2 - max_r u) + 1e-4, and for keys the maximum is over all keys of a head as
    well; so the ε is not small beside features far below the largest.
    """
    inputs = make_inputs(scale)
    query, key = (np.swapaxes(np.asarray(x, np.float64), 1, 2) for x in inputs[:2])
    projection = np.asarray(make_projection(), np.float64)

    def features(x, axes):
        x = x / DIM**0.25
        u = x @ projection.T
        half_square = 0.5 * np.sum(x**2, axis=-1, keepdims=True)
        return np.exp(u - half_square - np.max(u, axis=axes, keepdims=True)) + 1e-4

    weights = features(query, -1) @ np.swapaxes(features(key, (-2, -1)), -1, -2)
    weights /= np.sum(weights, axis=-1, keepdims=True)
    expected = np.einsum('bhnm,bmhd->bnhd', weights, np.asarray(inputs[2], np.float64))
    output = call('performer_pytorch_softmax', 'forward', inputs, False)
    np.testing.assert_allclose(output, expected, atol=1e-5)


# Who takes part


def test_the_scan_is_causal_alone_and_peers_are_asked_for():
    """Catches a causal contender among bidirectional ones, which would do half the work."""
    assert attention_contenders.chosen(is_causal=False, peers=False) == (
        'relu', 'softmax', 'exact', 'jax_exact',
    )  # fmt: skip
    assert 'jax_per_token' in attention_contenders.chosen(is_causal=True, peers=False)
    pytest.importorskip('performer_pytorch')
    assert attention_contenders.chosen(is_causal=True, peers=True) == attention_contenders.NAMES


def test_peers_that_are_missing_get_the_command_that_installs_them(monkeypatch):
    """Catches a bare ImportError, and peers that are left out without a word."""
    monkeypatch.setitem(sys.modules, 'performer_pytorch', None)
    with pytest.raises(BadInput, match=r"--peers needs .*pip install -e '\.\[bench\]'"):
        attention_contenders.chosen(is_causal=False, peers=True)


def test_unknown_contenders_are_refused():
    with pytest.raises(BadInput, match="the contender is 'linformer'; allowed are 'relu'"):
        attention_contenders.make_call(
            'linformer', 'forward', make_inputs(), projection=None, is_causal=False
        )


@pytest.mark.parametrize(('length', 'batch'), [(256, 16), (4096, 1), (16384, 1), (3000, 1)])
def test_inputs_have_the_same_number_of_tokens(length, batch):
    """Catches a batch that shrinks or grows the work from one length to the next."""
    assert attention_contenders.batch_size(length) == batch
