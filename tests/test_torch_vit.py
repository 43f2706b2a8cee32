"""The PyTorch twin computes what ours computes: logits, gradients, steps; and refuses the rest."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils

from performer_vit import (
    augment,
    benchmark,
    cpu_backend,
    datasets,
    dropout,
    input_pipeline,
    optimizers,
    train,
    workdir,
)
from performer_vit.errors import BadInput
from tests.conftest import load_config

torch = pytest.importorskip('torch')
torch_vit = pytest.importorskip('performer_vit.torch_vit')

KERNELS = ['exact', 'relu']


@pytest.fixture
def config(tiny_config):
    """Two blocks, nothing random in a step, and a rate that three steps can feel."""
    tiny_config.batch_size = 32
    tiny_config.model.depth = 2
    tiny_config.augment.crop_padding = 0
    tiny_config.ema_decay = 0.999
    tiny_config.optimizer.update(name='adamw', schedule='linear', learning_rate=0.02, clip_norm=0.5)
    return tiny_config


@functools.cache
def digits():
    return datasets.load('digits')


def prepare(config, kernel):
    """A training whose weights are all random: a head of zeros would hide everything before it."""
    config.model.attention.kernel = kernel
    training = train.prepare(config, digits())
    leaves, tree = jax.tree.flatten(training.state.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten(
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    )
    ema = {**training.state.ema, 'params': jax.tree.map(jnp.copy, params)}
    state = training.state.replace(params=params, ema=ema)
    return training, state


def make_twin(config, state):
    return torch_vit.from_flax(config.model, state.params, state.projections)


def make_batch():
    images = augment.normalize(digits().train.images[:32], digits().mean, digits().std)
    return np.asarray(images), digits().train.labels[:32]


def assert_weights_are(twin, config, params, projections, **tolerance):
    """All but softmax attention's key biases: their gradients are rounding, which Adam enlarges."""
    expected = torch_vit.from_flax(config.model, params, projections).state_dict()
    for name, weight in twin.state_dict().items():
        pair = weight, expected[name]
        if config.model.attention.kernel == 'exact' and name.endswith('qkv.bias'):
            pair = (torch.stack(x.chunk(3)[::2]) for x in pair)
        np.testing.assert_allclose(*pair, err_msg=name, **tolerance)


# The same function


@pytest.mark.parametrize('kernel', KERNELS)
def test_logits_and_gradients_are_ours(config, kernel):
    """Catches a weight transposed or in another's place, another GELU, ε, scale, norm or loss."""
    training, state = prepare(config, kernel)
    images, labels = make_batch()

    def loss_of(params):
        variables = {'params': params, 'projections': state.projections}
        logits = training.model.apply(variables, images)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
        return optax.softmax_cross_entropy(logits, targets).mean(), logits

    (loss, logits), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(state.params)
    assert np.std(logits) > 0.1
    twin = make_twin(config, state)
    own_images, own_labels = torch_vit.make_batch(images, labels)
    own_logits = twin(own_images)
    np.testing.assert_allclose(own_logits.detach(), logits, atol=2e-5)
    own_loss = torch.nn.functional.cross_entropy(own_logits, own_labels, label_smoothing=0.1)
    own_loss.backward()
    assert own_loss.item() == pytest.approx(float(loss), abs=1e-5)
    expected = torch_vit.from_flax(config.model, gradients, state.projections)
    for (name, own), theirs in zip(twin.named_parameters(), expected.parameters(), strict=True):
        np.testing.assert_allclose(own.grad, theirs.detach(), atol=2e-6, err_msg=name)


def test_dropout_is_where_ours_is(config, monkeypatch):
    """Catches a mask that is left out, or drawn for fewer numbers: it is a part of the time."""
    config.model.dropout_rate = 0.1
    training, state = prepare(config, 'relu')
    images, labels = make_batch()
    ours, drop_mask = [], dropout.drop_mask

    def record(key, rate, shape):
        assert rate == 0.1
        ours.append(shape)
        return drop_mask(key, rate, shape)

    monkeypatch.setattr(dropout, 'drop_mask', record)
    variables = {'params': state.params, 'projections': state.projections}
    training.model.apply(variables, images, train=True, rngs={'dropout': jax.random.key(0)})

    masks = []
    twin = make_twin(config, state).train()
    for module in twin.modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.1
            module.register_forward_hook(lambda module, x, y: masks.append(tuple(y.shape)))
    twin(torch_vit.make_batch(images, labels)[0])
    assert len(ours) == 1 + 3 * 2 and masks == ours


# The same training


@pytest.mark.parametrize('kernel', KERNELS)
def test_steps_are_those_of_our_train_step(config, kernel):
    """Catches another schedule, clipping, weight decay, order of updates, or moving average.

    Rates grow from 0 at the first of five steps to the highest at the last, by a warm-up of four;
    some gradients are clipped, and weight decay is large. Any one of these left out moves weights
    by more than 0.02.
    """
    config.optimizer.weight_decay = 5.0
    training, state = prepare(config, kernel)
    config.optimizer.warmup_epochs = 4 / training.steps_per_epoch
    training = train.prepare(config, digits())
    twin = make_twin(config, state)
    average = torch_vit.make_average(twin)
    own_step = torch_vit.make_train_step(twin, average, config, training.steps_per_epoch)

    replicated = jax_utils.replicate(state, axis_name='batch')
    batches = list(
        input_pipeline.train_batches(
            digits().train, seed=0, batch_size=config.batch_size, first_step=0, num_steps=5
        )
    )
    step = train.compile_step(training, replicated, batches[0])
    losses, own_losses, norms = [], [], []
    for batch in batches:
        images = np.concatenate(batch['image'])
        images = np.asarray(augment.normalize(images, digits().mean, digits().std))
        own_batch = torch_vit.make_batch(images, np.concatenate(batch['label']))
        own_losses.append(own_step(*own_batch).item())
        replicated, metrics = step(replicated, batch)
        losses.append(train.scalar(metrics['loss']))
        norms.append(train.scalar(metrics['grad_norm']))
    assert min(norms) < config.optimizer.clip_norm < max(norms)
    np.testing.assert_allclose(own_losses, losses, atol=1e-5)
    final = jax_utils.unreplicate(replicated)
    first, last = (params['head']['kernel'] for params in (state.params, final.params))
    assert np.max(np.abs(first - last)) > 0.05
    assert_weights_are(twin, config, final.params, final.projections, atol=2e-4)
    assert_weights_are(average, config, final.ema['params'], final.projections, atol=2e-4)


@pytest.mark.parametrize('schedule', ['cosine', 'linear'])
@pytest.mark.parametrize(('warmup_epochs', 'num_epochs'), [(0.0, 2), (0.5, 3), (2.0, 2)])
def test_rates_are_those_of_our_schedule(config, schedule, warmup_epochs, num_epochs):
    """Catches a warm-up that is a step too long, and a decay that ends early."""
    config.optimizer.update(warmup_epochs=warmup_epochs, schedule=schedule)
    ours = optimizers.learning_rate(config.optimizer, 20, num_epochs)
    steps = np.arange(20 * num_epochs + 3)
    own = [
        torch_vit.rate_factor(schedule, int(n), round(20 * warmup_epochs), 20 * num_epochs)
        for n in steps
    ]
    highest = config.optimizer.learning_rate
    np.testing.assert_allclose(highest * np.array(own), jax.vmap(ours)(steps), atol=1e-8)


def test_no_average_is_kept_where_there_is_none(config):
    """Catches a step that needs an average, which --config.ema_decay=0 does without."""
    _, state = prepare(config, 'relu')
    config.optimizer.warmup_epochs = 0.0
    twin = make_twin(config, state)
    step = torch_vit.make_train_step(twin, None, config, 10)
    batch = torch_vit.make_batch(*make_batch())
    assert step(*batch).item() > step(*batch).item()
    assert torch.get_num_threads() == cpu_backend.num_cores()


# What is refused


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('model.stem', 'conv', "model.stem is 'conv'; the PyTorch twin has 'patch' alone"),
        ('model.position', 'sine', "model.position is 'sine'"),
        ('model.pooling', 'cls', "model.pooling is 'cls'; the PyTorch twin has 'gap' alone"),
        ('model.pooling', 'map', "model.pooling is 'map'"),
        ('model.pooling', 'conv', "model.pooling is 'conv'"),
        ('model.drop_path_rate', 0.1, 'model.drop_path_rate is 0.1'),
        ('model.dtype', 'bfloat16', "model.dtype is 'bfloat16'"),
        ('model.attention.kernel', 'gelu', "kernel is 'gelu'.*'exact' or 'relu' alone"),
        ('model.attention.projection', 'none', "projection is 'none'; the PyTorch twin has"),
        ('model.attention.redraw_every', 10, 'redraw_every is 10'),
        ('augment.mixup', 0.8, 'augment.mixup is 0.8'),
        ('optimizer.name', 'sgd', "optimizer.name is 'sgd'; the PyTorch twin has 'adamw' alone"),
        ('optimizer.name', 'muon', "optimizer.name is 'muon'"),
        ('optimizer.schedule', 'step', "schedule is 'step'.*'cosine' or 'linear' alone"),
    ],
)
def test_what_the_twin_has_not_is_refused(config, field, value, message):
    """Catches another network or another optimiser timed under the name of ours."""
    torch_vit.check(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(BadInput, match=f'{message}.*leave out --peers|{message}.*Leave out'):
        torch_vit.check(config)


def test_a_field_that_is_not_known_is_refused(config):
    """Catches a field that our model gets one day and the twin ignores."""
    config.model.unlock()
    config.model.registers = 4
    with pytest.raises(BadInput, match='model.registers is 4, and the PyTorch twin has nothing'):
        torch_vit.check(config)


def test_every_field_of_a_config_is_known():
    """Catches a new field of a model or optimiser for which no one has said what the twin does."""
    config = load_config('vit', 'cifar10,study')
    config.optimizer.name = 'adamw'
    torch_vit.check(config)
    fields = set(workdir.flatten(config.to_dict()))
    assert fields > {*torch_vit._ONLY, *torch_vit._HONOURED}
    for start in torch_vit._UNUSED:
        assert any(field.startswith(start) for field in fields), start


def test_a_gpu_is_refused(config, monkeypatch):
    """Catches a comparison of JAX on a GPU with PyTorch on a CPU."""
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    with pytest.raises(BadInput, match='its gpu backend.*JAX_PLATFORMS=cpu'):
        torch_vit.check(config)


def test_without_pytorch_one_is_told_how_to_install_it(config, monkeypatch):
    """Catches a bare ImportError, and a benchmark that leaves the peer out without a word."""
    monkeypatch.setitem(sys.modules, 'torch', None)
    monkeypatch.delitem(sys.modules, 'performer_vit.torch_vit')
    monkeypatch.delattr('performer_vit.torch_vit')
    with pytest.raises(BadInput, match=r"--peers needs PyTorch.*pip install -e '\.\[bench\]'"):
        benchmark.train_step(config, 1, peers=True)


def test_the_config_is_refused_before_data_are_read(config, monkeypatch):
    """Catches a refusal after minutes of work."""
    monkeypatch.setattr(benchmark, '_prepare', lambda config: pytest.fail('too late'))
    config.model.stem = 'conv'
    with pytest.raises(BadInput, match='model.stem'):
        benchmark.train_step(config, 1, peers=True)
