"""Muon against singular value decompositions, Optax's own, and one device's work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from performer_vit import muon, vit
from tests.conftest import load_config


def direction(module: str, kernel_name: str, gradients) -> np.ndarray:
    """The direction of one kernel after the last of these gradients."""
    tree = {module: {kernel_name: jnp.zeros(gradients[0].shape)}}
    tx = muon.scale_by_muon(0.95, None)
    state = tx.init(tree)
    for gradient in gradients:
        tree, state = tx.update({module: {kernel_name: jnp.asarray(gradient)}}, state, tree)
    return np.asarray(tree[module][kernel_name], np.float64)


@pytest.mark.parametrize(
    'module, shape, matrix',
    [
        ('mlp', (24, 16), (24, 16)),
        ('query', (12, 4, 5), (12, 20)),  # [C, H, D] sums over C.
        ('out', (4, 5, 12), (20, 12)),  # [H, D, C] sums over H and D.
        ('conv_0', (3, 3, 4, 10), (36, 10)),
    ],
)
def test_against_the_singular_vectors(module, shape, matrix):
    """0.2 √max(m, n) · U S Vᵀ, where U and V are the singular vectors of g + 0.95 t.

    Catches axes of a kernel joined in a wrong way, and a momentum that is not Nesterov's: the
    direction would have other singular vectors. Newton and Schulz's iteration leaves S near 1 only,
    so its range is checked, not its values.
    """
    gradients = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    trace = np.zeros(matrix)
    for gradient in gradients.reshape(4, *matrix).astype(np.float64):
        trace = gradient + 0.95 * trace
    u, _, vt = np.linalg.svd(gradient + 0.95 * trace, full_matrices=False)
    got = direction(module, 'kernel', gradients).reshape(matrix)
    singular = u.T @ (got / (0.2 * np.sqrt(max(matrix)))) @ vt.T
    values = np.diag(singular)
    assert 0.6 < values.min() and values.max() < 1.3
    np.testing.assert_allclose(singular, np.diag(values), atol=2e-3)


def model_params(name: str = 'performer_ftheta', **model):
    """Shapes of a small model's parameters; fθ's have the most of them, in the most places."""
    config = load_config(name)
    config.model.attention.theta_sharing = 'none'
    config.model.update(width=16, num_heads=2, mlp_dim=24, stem_channels=((4, 8), (8,)))
    config.model.attention.num_features = 8
    config.model.update(model)
    model = vit.from_config(config.model, num_classes=10, seed=0)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)['params']


def noise_like(params, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)


def test_first_direction_is_that_of_optax():
    """`optax.contrib.muon` as a whole; later steps weigh the momentum's start differently."""
    gradient = noise_like(model_params())
    optaxs = optax.contrib.muon(
        learning_rate=1.0, consistent_rms=0.2, muon_weight_dimension_numbers=muon.matrices
    )
    ours = muon.scale_by_muon(0.95, None)
    expected, _ = jax.jit(lambda g: optaxs.update(g, optaxs.init(g), g))(gradient)
    got, _ = jax.jit(lambda g: ours.update(g, ours.init(g)))(gradient)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, -b, rtol=2e-3, atol=2e-4), got, expected
    )


def test_devices_share_the_work_and_get_the_same():
    """Four devices, three steps, of a whole model: the same as one device alone.

    Catches a matrix that no device takes or that two take, and states that drift apart.
    """
    params = model_params()
    gradients = [noise_like(params, seed) for seed in range(3)]

    def run(axis_name):
        def steps(gradients):
            tx = muon.scale_by_muon(0.95, axis_name)
            state = tx.init(gradients[0])
            for gradient in gradients:
                updates, state = tx.update(gradient, state)
            return updates

        return steps

    expected = jax.jit(run(None))(gradients)
    copies = jax.tree.map(lambda x: np.stack(4 * [x]), gradients)
    got = jax.pmap(run('batch'), axis_name='batch')(copies)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, np.broadcast_to(b, a.shape), rtol=1e-4, atol=1e-5
        ),
        got,
        expected,
    )


def test_a_device_orthogonalises_its_share_alone():
    """Of eight equal matrices on four devices, every branch multiplies two.

    Catches work that all devices do, which would give the same result.
    """
    gradient = {f'dense_{i}': {'kernel': jnp.ones((6, 5))} for i in range(8)}

    def step(axis_name, gradient):
        tx = muon.scale_by_muon(0.95, axis_name)
        return tx.update(gradient, tx.init(gradient))[0]

    on_four = jax.make_jaxpr(functools.partial(step, 'batch'), axis_env=[('batch', 4)])
    jaxpr = on_four(gradient)
    (switch,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'cond']
    products = [str(branch).count('dot_general') for branch in switch.params['branches']]
    alone = str(jax.make_jaxpr(functools.partial(step, None))(gradient)).count('dot_general')
    assert products == [alone // 4] * 4 and alone > 0
    assert str(jaxpr).count('dot_general') == alone


@pytest.mark.parametrize(
    'costs, devices, owners',
    [
        ([5], 1, [0]),
        ([1, 8, 3, 4], 2, [1, 0, 1, 1]),
        ([2, 2], 4, [0, 1]),
        ([3, 3, 2, 2, 2], 2, [0, 1, 0, 1, 0]),
    ],
)
def test_shares_by_hand(costs, devices, owners):
    assert muon._share_out(costs, devices) == owners


@pytest.mark.parametrize('name', ['hidden_kernel', 'output_kernel'])
@pytest.mark.parametrize('module', ['theta', 'query'])
def test_each_head_of_ftheta_is_a_matrix(name, module):
    """Catches [H, D, R] taken for the [C, H, D] or [H, D, C] of a multi-head layer."""
    gradient = np.random.default_rng(0).normal(size=(3, 6, 10)).astype(np.float32)
    together = direction(module, name, [gradient])
    apart = [direction(module, name, [one]) for one in gradient]
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-6)
    assert direction('query', 'kernel', [gradient]) != pytest.approx(together, rel=0.1)


@pytest.mark.parametrize('module, name', [('head', 'kernel'), ('norm', 'scale'), ('mlp', 'bias')])
def test_all_but_inner_matrices_are_adams(module, name):
    """The first update of Adam, in Nesterov's form, is the gradient's sign, whatever its size.

    The mean after the step and a step ahead, both corrected for their start at 0, weigh
    0.9 · 0.1 / (1 − 0.9²) and 0.1 / (1 − 0.9).
    """
    gradient = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    rate = 0.9 * 0.1 / (1 - 0.9**2) + 1
    got = direction(module, name, [gradient])
    np.testing.assert_allclose(got, rate * np.sign(gradient), rtol=1e-4)


@pytest.mark.parametrize(
    'name, pooling', [('vit', 'conv'), ('performer_relu', 'map'), ('performer_ftheta', 'conv')]
)
def test_every_parameter_of_every_model(name, pooling):
    """Sides of every matrix by its name; width 16, 2 heads of 8, MLP 24, fθ with 8 features.

    Catches a kernel that is taken for a matrix of other axes, or left to Adam.
    """
    sides = {
        'query': (16, 16), 'key': (16, 16), 'value': (16, 16), 'out': (16, 16),
        'mlp/hidden': (16, 24), 'mlp/out': (24, 16), 'hidden_kernel': (8, 8),
        'output_kernel': (8, 8), 'stem/conv_0': (27, 4), 'stem/conv_1': (36, 8),
        'stem/conv_2': (72, 8), 'stem/conv_3': (72, 16), 'stem/conv_4': (144, 16),
        'pool/conv_0': (144, 16), 'pool/conv_1': (144, 16),
    }  # fmt: skip
    params = model_params(name, pooling=pooling)
    chosen = jax.tree.leaves(muon.matrices(params), is_leaf=lambda x: x is None or (
        isinstance(x, optax.contrib.MuonDimensionNumbers)))  # fmt: skip
    seen = set()
    for (path, value), axes in zip(jax.tree.leaves_with_path(params), chosen, strict=True):
        words = '/'.join(key.key for key in path)
        if axes is None:
            assert not words.endswith('kernel') or words == 'head/kernel'
            continue
        words = words.replace('/conv/kernel', '/kernel').removesuffix('/kernel')
        # The longest name that fits: 'mlp/out' is no 'out'.
        end = max((end for end in sides if words.endswith(end)), key=len)
        assert muon._sides(value, axes) == sides[end], words
        # The trailing axes are those of the output: in row-major order nothing is exchanged.
        order = [*axes.reduction_axis, *axes.output_axis]
        assert order == list(range(value.ndim - len(order), value.ndim)), words
        seen.add(end)
    assert {'query', 'out', 'mlp/hidden', 'mlp/out', 'stem/conv_0', 'stem/conv_4'} <= seen
    assert ('hidden_kernel' in seen) == (name == 'performer_ftheta')
    assert ('pool/conv_1' in seen) == (pooling == 'conv')
