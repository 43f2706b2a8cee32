"""The Vision Transformer: shapes, references for its pieces, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from performer_vit import favor, vit
from performer_vit.errors import BadInput
from tests.conftest import load_config

IMAGES = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
ATTENTION = functools.partial(favor.FavorAttention, kernel='relu', num_features=8)


def small(**fields) -> vit.VisionTransformer:
    defaults = {
        'num_classes': 10, 'attention': ATTENTION, 'stem': 'patch', 'patch_size': 8, 'width': 16,
        'depth': 2, 'num_heads': 2, 'mlp_dim': 32, 'stem_channels': ((4, 8), (8,)),
    }  # fmt: skip
    return vit.VisionTransformer(**{**defaults, **fields})


def randomised(variables, seed: int = 7):
    """Every parameter replaced by noise: the head starts at zero, which would hide defects."""
    leaves, tree = jax.tree.flatten(variables['params'])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return {**variables, 'params': jax.tree.unflatten(tree, leaves)}


@pytest.mark.parametrize('stem', vit.STEMS)
@pytest.mark.parametrize('patch_size, tokens', [(8, 16), (4, 64), (2, 256), (1, 1024)])
def test_both_stems_give_a_real_token_grid(stem, patch_size, tokens):
    """Catches a stem that flattens the image to one token, or shrinks it by another factor."""
    model = small(stem=stem, patch_size=patch_size, depth=1)
    shapes = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), IMAGES, mutable=True))
    logits, variables = shapes
    side = 32 // patch_size
    assert logits.shape == (2, 10) and logits.dtype == jnp.float32
    assert variables['intermediates']['grid'][0].shape == (2, side, side, 16)
    assert variables['intermediates']['encoded'][0].shape == (2, tokens, 16)
    assert vit.num_tokens(model, (32, 32, 3)) == tokens


@pytest.mark.parametrize('pooling', vit.POOLINGS)
@pytest.mark.parametrize('position', vit.POSITIONS)
def test_poolings_and_positions(pooling, position):
    """Catches a class token that is not added, or a pooling that keeps the token axis."""
    model = small(pooling=pooling, position=position)
    variables = model.init(jax.random.key(0), IMAGES)
    logits, seen = model.apply(randomised(variables), IMAGES, mutable=['intermediates'])
    assert logits.shape == (2, 10) and bool(jnp.isfinite(logits).all())
    extra = 1 if pooling == 'cls' else 0
    assert seen['intermediates']['encoded'][0].shape == (2, 16 + extra, 16)
    assert seen['intermediates']['pooled'][0].shape == (2, 16)
    assert ('position_embedding' in variables['params']) == (position == 'learned')


def test_gap_is_the_mean_over_tokens():
    model = small(pooling='gap')
    variables = randomised(model.init(jax.random.key(0), IMAGES))
    _, seen = model.apply(variables, IMAGES, mutable=['intermediates'])
    seen = seen['intermediates']
    np.testing.assert_allclose(
        seen['pooled'][0], np.mean(seen['encoded'][0], axis=1), rtol=1e-4, atol=1e-5
    )


def test_space_to_depth_against_loops():
    """Catches axes in the wrong order, which would scramble the patches."""
    images = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    expected = np.zeros((2, 2, 3, 12), np.float32)
    for y in range(2):
        for x in range(3):
            block = images[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2, :]
            expected[:, y, x] = block.reshape(2, -1)
    np.testing.assert_array_equal(vit.space_to_depth(jnp.asarray(images), 2), expected)


def test_patch_stem_is_the_strided_convolution():
    """Independent reference: the convolution with stride p that ViTs are usually written with."""
    stem = vit.PatchStem(patch_size=4, width=5, dtype=jnp.float32)
    variables = stem.init(jax.random.key(1), IMAGES)
    kernel = variables['params']['embedding']['kernel'].reshape(4, 4, 3, 5)
    expected = jax.lax.conv_general_dilated(
        IMAGES, kernel, (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    np.testing.assert_allclose(stem.apply(variables, IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_sine_position_closed_form():
    """sin and cos of y·ω and x·ω, and no two places alike."""
    table = vit.sine_position_2d(3, 5, 8)
    y, x = 2, 3
    row = table[y * 5 + x]
    frequency = np.array([1.0, 1e-4])
    expected = np.concatenate(
        [np.sin(y * frequency), np.cos(y * frequency), np.sin(x * frequency), np.cos(x * frequency)]
    )
    np.testing.assert_allclose(row, expected, atol=1e-6)
    assert len(np.unique(table.round(6), axis=0)) == 15


def test_kernel_alone_makes_a_performer_of_a_vit():
    """ViT and Performers start from the same weights, bit for bit: a comparison changes one thing.

    Catches a kernel that changes the names or the order of the other parameters.
    """
    first = {}
    for kernel in ('exact', 'softmax', 'relu', 'gelu', 'elu'):
        model = small(attention=functools.partial(favor.FavorAttention, kernel=kernel,
                                                  num_features=8))  # fmt: skip
        first[kernel] = model.init(jax.random.key(0), IMAGES)['params']
    for kernel, params in first.items():
        assert jax.tree.structure(params) == jax.tree.structure(first['exact']), kernel
        jax.tree.map(np.testing.assert_array_equal, params, first['exact'])


@pytest.mark.parametrize('kernel', ['exact', 'relu', 'softmax'])
def test_attention_maps_are_intermediates(kernel):
    """Every block gives its map by name, (B, H, N, N), and its rows are distributions."""
    model = small(attention=functools.partial(favor.FavorAttention, kernel=kernel, num_features=8))
    variables = randomised(model.init(jax.random.key(0), IMAGES))
    _, seen = model.apply(variables, IMAGES, mutable=['intermediates'])
    for block in ('encoder_0', 'encoder_1'):
        attention = seen['intermediates'][block]['self_attention']['attention']
        (matrix,) = attention['attention_map']
        assert matrix.shape == (2, 2, 16, 16)
        np.testing.assert_allclose(matrix.sum(-1), 1.0, atol=1e-4)
        assert (np.asarray(matrix) >= 0).all()
    assert {'block_0', 'block_1', 'grid', 'encoded', 'pooled'} <= set(seen['intermediates'])


@pytest.mark.parametrize(
    'stem, kernel', [('patch', 'exact'), ('patch', 'relu'), ('patch', 'softmax'), ('conv', 'relu')]
)
def test_bfloat16_computes_in_bfloat16_on_float32_weights(stem, kernel):
    """Catches weights stored in bfloat16, and a computation that is float32 all the same."""
    attention = functools.partial(favor.FavorAttention, kernel=kernel, num_features=8)
    model = small(attention=attention, stem=stem)
    low = model.clone(
        attention=functools.partial(attention, dtype=jnp.bfloat16), dtype=jnp.bfloat16
    )
    variables = randomised(low.init(jax.random.key(0), IMAGES))
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    logits, seen = low.apply(variables, IMAGES, mutable=['intermediates'])
    assert logits.dtype == jnp.float32
    assert not jnp.any(logits == logits.astype(jnp.bfloat16))  # Which would tie.
    for name in ('grid', 'block_1'):
        assert seen['intermediates'][name][0].dtype == jnp.bfloat16
    full = model.apply(variables, IMAGES)
    difference = float(jnp.abs(logits - full).max() / jnp.abs(full).max())
    assert 1e-6 < difference < 0.1


def test_dropout_is_for_training_alone():
    model = small(dropout_rate=0.5, drop_path_rate=0.5)
    variables = randomised(model.init(jax.random.key(0), IMAGES))
    apply = functools.partial(model.apply, variables, IMAGES)
    np.testing.assert_array_equal(apply(), apply())
    one, other = (apply(train=True, rngs={'dropout': jax.random.key(k)}) for k in (1, 2))
    assert float(jnp.abs(one - other).max()) > 1e-3


@pytest.mark.parametrize('depth, rates', [(1, [0.5]), (3, [0.0, 0.25, 0.5])])
def test_the_last_block_has_the_rate(monkeypatch, depth, rates):
    """Catches a rate that does nothing in a model of one block."""
    seen = []

    class Block(vit.EncoderBlock):
        @nn.compact
        def __call__(self, x, *, train):
            seen.append(self.drop_path_rate)
            return x

    monkeypatch.setattr(vit, 'EncoderBlock', Block)
    small(depth=depth, drop_path_rate=0.5).init(jax.random.key(0), IMAGES)
    assert seen == rates


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    """Catches an element-wise dropout, and a missing division by 1 − rate.

    With 4,000 images the mean of the kept ones, 1.0 expected, has a standard deviation of
    sqrt(0.25/0.75/4000) = 0.009: the bound is 5 of them.
    """
    ones = jnp.ones((4000, 3, 2))
    dropped = vit.DropPath(0.25).apply({}, ones, train=True, rngs={'dropout': jax.random.key(0)})
    per_image = np.asarray(dropped).reshape(4000, -1)
    assert (per_image == per_image[:, :1]).all()
    np.testing.assert_allclose(np.unique(per_image), [0.0, 1 / 0.75], rtol=1e-6)
    assert abs(per_image.mean() - 1.0) < 5 * 0.0092
    np.testing.assert_array_equal(vit.DropPath(0.25).apply({}, ones, train=False), ones)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'stem': 'hybrid'}, r"model.stem is 'hybrid'; allowed are 'patch', 'conv'"),
        ({'pooling': 'max'}, r"model.pooling is 'max'; allowed are 'gap', 'cls', 'map', 'conv'"),
        ({'position': 'rope'}, r"model.position is 'rope'; allowed are 'learned', 'sine'"),
        ({'num_heads': 3}, r'model.width 16 is not divisible by model.num_heads 3'),
        ({'patch_size': 5}, r'32×32 pixels are not divisible by model.patch_size 5'),
        ({'conv_norm': 'group'}, r"model.conv_norm is 'group'; allowed are 'batch', 'layer'"),
        ({'stem': 'conv', 'stem_channels': ()}, r'model.stem_channels is \(\)'),
        ({'stem': 'conv', 'stem_channels': (4, 8)}, r'stem_channels is \(4, 8\).*tuple of tuples'),
        ({'stem': 'conv', 'stem_channels': ((), (4,))}, r'model.stem_channels is \(\(\), \(4,\)\)'),
        ({'stem': 'conv', 'stem_channels': ((4, 0),)}, r'model.stem_channels is \(\(4, 0\),\)'),
        ({'stem': 'conv', 'stem_channels': ((True,),)}, r'model.stem_channels is \(\(True,\),\)'),
        ({'stem': 'conv', 'stem_channels': ('abc',)}, r"model.stem_channels is \('abc',\)"),
        ({'depth': 0}, r'model.depth is 0; set it to 1 or more'),
        ({'dropout_rate': 1.0}, r'model.dropout_rate is 1.0'),
        ({'position': 'sine', 'width': 18}, r'divisible by 4, but width is 18'),
    ],
)
def test_bad_input(fields, message):
    with pytest.raises(BadInput, match=message):
        jax.eval_shape(small(**fields).init, jax.random.key(0), IMAGES)


def test_config_builds_the_study_vit():
    """The study's ViT: patch 4, width 256, depth 8, 8 heads, MLP 512; its parameters by hand."""
    config = load_config('vit', 'study')
    model = vit.from_config(config.model, num_classes=10, seed=0)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    width, mlp = 256, 512
    block = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
    assert count == 48 * width + width + 64 * width + 8 * block + 2 * width + 10 * width + 10


def test_config_of_another_version_is_refused():
    """Catches a field that is given and not used, and one that silently takes a default."""
    model = load_config('vit').model
    with model.unlocked():
        model.stem_norm = model.conv_norm
        del model.conv_norm
    with pytest.raises(BadInput, match=r'has the unknown fields stem_norm and lacks conv_norm'):
        vit.from_config(model, num_classes=10, seed=0)


def test_config_with_an_unknown_dtype():
    config = load_config('vit')
    config.model.dtype = 'float8'
    with pytest.raises(BadInput, match="model.dtype is 'float8'; allowed are 'float32'"):
        vit.from_config(config.model, num_classes=10, seed=0)


def config_of(**attention):
    config = load_config('vit').model
    config.update(stem='patch', patch_size=8, width=16, depth=2, num_heads=2, mlp_dim=32)
    config.pooling = 'gap'
    config.attention.update(num_features=8, **attention)
    return config


def test_mean_in_the_place_of_attention_is_uniform_attention():
    """The reference: attention whose queries are zero weighs all tokens alike."""
    mean = vit.from_config(config_of(kernel='mean'), 10, seed=0)
    exact = vit.from_config(config_of(kernel='exact'), 10, seed=0)
    variables = randomised(mean.init(jax.random.key(0), IMAGES))
    got = mean.apply(variables, IMAGES)
    for i in range(2):
        query = variables['params'][f'encoder_{i}']['self_attention']['query']
        query.update(jax.tree.map(jnp.zeros_like, query))
    np.testing.assert_allclose(got, exact.apply(variables, IMAGES), rtol=1e-4, atol=1e-4)


def test_none_leaves_the_branch_of_attention_out():
    """Every token goes its own way: changing one leaves the others as they were.

    The rest of the parameters has the same names, shapes and first values as with attention.
    """
    model = vit.from_config(config_of(kernel='none'), 10, seed=0)
    with_attention = vit.from_config(config_of(kernel='relu'), 10, seed=0)
    params = model.init(jax.random.key(0), IMAGES)['params']
    expected = with_attention.init(jax.random.key(0), IMAGES)['params']
    for i in range(2):
        for name in ('attention_norm', 'self_attention'):
            del expected[f'encoder_{i}'][name]
    jax.tree.map(np.testing.assert_array_equal, params, expected)

    variables = randomised({'params': params})
    changed = IMAGES.at[:, :8, :8].add(1.0)  # The first patch.
    outputs = [
        model.apply(variables, images, mutable=['intermediates'])[1]['intermediates']['encoded'][0]
        for images in (IMAGES, changed)
    ]
    assert float(jnp.abs(outputs[0][:, 0] - outputs[1][:, 0]).max()) > 0.1
    np.testing.assert_array_equal(outputs[0][:, 1:], outputs[1][:, 1:])


def test_an_unknown_kernel_of_a_config_is_refused_with_all_names():
    with pytest.raises(
        BadInput, match=r"model.attention.kernel is 'max'; .*'relu'.*'mean', 'none'"
    ):
        vit.from_config(config_of(kernel='max'), 10, seed=0)


def conv(x, params):
    """A 3×3 convolution, zeros beyond the borders: a sum over windows, in float64."""
    window = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), axis=(1, 2)
    )
    return np.einsum('bhwcij,ijcd->bhwd', window, np.asarray(params['kernel'], np.float64))


def relu_of_norm(x, kind, params, stats, train):
    """ReLU of LayerNorm, or of BatchNorm, and the statistics of the batch."""
    axes = (-1,) if kind == 'layer' else (0, 1, 2)
    batch = {'mean': x.mean(axes), 'var': x.var(axes)}
    use = batch
    if kind == 'layer':
        use = {part: value[..., None] for part, value in batch.items()}
    elif not train:
        use = {part: np.asarray(value) for part, value in stats.items()}
    y = (x - use['mean']) / np.sqrt(use['var'] + {'layer': 1e-6, 'batch': 1e-5}[kind])
    return np.maximum(y * np.asarray(params['scale']) + np.asarray(params['bias']), 0), batch


def corners(x, block):
    return [x[:, i::block, j::block] for i in range(block) for j in range(block)]


def residual_conv(x, kind, params, stats, train):
    y, batch = relu_of_norm(x, kind, params['norm'], stats.get('norm'), train)
    y = conv(y, params['conv'])
    return (x + y if x.shape == y.shape else y), batch


def check_convolutions(module, by_hand, x, norm):
    """`module` is by_hand(x, params, stats, train) in evaluation and in training, its averages too.

    `by_hand` gives the output, and the statistics of the batch by the names that they have.
    """
    variables = randomised(module.init(jax.random.key(0), x, train=False))
    # Between 0.5 and 1.5, and everywhere another.
    rng = np.random.default_rng(0)
    stats = jax.tree.map(lambda x: rng.random(x.shape) + 0.5, variables.get('batch_stats', {}))
    for train in (False, True):
        expected, batch = by_hand(np.asarray(x, np.float64), variables['params'], stats, train)
        found, updated = module.apply(
            {**variables, 'batch_stats': stats}, x, train=train, mutable=['batch_stats']
        )
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
        after = updated.get('batch_stats', {})
        if norm == 'batch' and train:
            moved = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, stats, batch)
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), after, moved
            )
        else:
            jax.tree.map(np.testing.assert_array_equal, after, stats)


# The convolutions in order: channels, whether the input is added, whether a maximum follows.
@pytest.mark.parametrize('norm', vit.CONV_NORMS)
@pytest.mark.parametrize(
    'patch_size, channels, block, convolutions',
    [
        (4, ((3, 6, 6), (6,)), 1, '3 6 6+max 6+ 16max 16+ 16+'),
        (4, ((6, 4),), 2, '6 4 16max 16+ 16+'),
        (2, ((6,), (16,)), 1, '6max 16 16+ 16+ 16+'),
        (3, ((6,),), 3, '6 16 16+ 16+'),
        (8, ((6,), (6,)), 2, '6max 6+ 16max 16+ 16+'),
        (4, ((6,), (6,), (16,)), 1, '6max 6+max 16 16+ 16+ 16+'),
    ],
)
def test_conv_stem_by_hand(norm, patch_size, channels, block, convolutions):
    """NumPy and one plain convolution, in the order of the docstring.

    Catches a maximum or a norm in another place, pixels that space-to-depth mixes up, and a
    convolution that forgets its input, or adds the pixels.
    """

    def by_hand(pixels, params, stats, train):
        batch = {}
        x = np.concatenate(corners(pixels, block), axis=-1)
        for i, words in enumerate(convolutions.split()):
            name = f'conv_{i}'
            before = x
            if i:
                x, normed = residual_conv(x, norm, params[name], stats.get(name, {}), train)
                batch[name] = {'norm': normed}
            else:
                x = conv(x, params[name])
            assert x.shape[-1] == int(words.strip('+max'))
            assert ('+' in words) == (i > 0 and x.shape == before.shape)
            x = np.max(corners(x, 2), axis=0) if 'max' in words else x
        return x, batch

    stem = vit.ConvStem(patch_size, channels, 2, 16, norm, None, jnp.float32)
    check_convolutions(stem, by_hand, IMAGES[:, :24, :24], norm)


@pytest.mark.parametrize('norm', vit.CONV_NORMS)
@pytest.mark.parametrize('blocks', [0, 2])
def test_conv_pool_by_hand(norm, blocks):
    """Catches a mean for the maximum, a norm that is left out, and another grid."""

    def by_hand(x, params, stats, train):
        batch = {}
        x = np.max(corners(x, 2), axis=0)
        for name in [f'conv_{i}' for i in range(blocks)]:
            x, normed = residual_conv(x, norm, params[name], stats.get(name, {}), train)
            batch[name] = {'norm': normed}
        x, batch['norm'] = relu_of_norm(x, norm, params['norm'], stats.get('norm'), train)
        return x.max((1, 2)), batch

    grid = jax.random.normal(jax.random.key(1), (3, 4, 6, 5))
    check_convolutions(vit.ConvPool(blocks, norm, None, jnp.float32), by_hand, grid, norm)


@pytest.mark.parametrize('field', ['stem_blocks', 'pool_blocks'])
def test_a_negative_number_of_residual_convolutions_is_refused(field):
    with pytest.raises(BadInput, match=f'model.{field} is -1; set it to 0 or more'):
        small(**{field: -1}).init(jax.random.key(0), IMAGES)


def test_conv_pooling_sees_the_grid_of_the_tokens():
    """Of an image that is wider than high. Catches rows and columns that are exchanged."""
    model = small(pooling='conv', pool_blocks=1)
    images = IMAGES[:, :16]
    variables = randomised(model.init(jax.random.key(0), images))
    _, seen = model.apply(variables, images, mutable=['intermediates'])
    grid = np.reshape(seen['intermediates']['encoded'][0], (2, 2, 4, 16))
    part = {name: variables[name]['pool'] for name in ('params', 'batch_stats')}
    expected = vit.ConvPool(1, 'batch', None, jnp.float32).apply(part, grid, train=False)
    np.testing.assert_allclose(seen['intermediates']['pooled'][0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('shape', [(2, 1, 1, 3), (2, 2, 3, 3), (3, 5, 5, 2), (2, 8, 8, 1)])
def test_largest_and_its_gradient(shape):
    """Against NumPy; the gradient is 1 at the largest of each image and channel, 0 elsewhere."""
    x = np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape).astype(np.float32)
    np.testing.assert_array_equal(vit.largest(x), x.max((1, 2)))
    gradient = jax.grad(lambda x: vit.largest(x).sum())(x)
    np.testing.assert_array_equal(gradient, x == x.max((1, 2), keepdims=True))


@pytest.mark.parametrize('pooling', vit.POOLINGS)
def test_compiled_gradient_is_that_of_single_operations(pooling):
    """Catches code whose gradient depends on how XLA rounds: the gradient of a maximum over places
    by `max` was another, in all parameters, once it was compiled."""
    model = small(stem='conv', stem_channels=((4,), (8,)), stem_blocks=1, pooling=pooling)
    images = jax.random.normal(jax.random.key(3), (32, 32, 32, 3))
    variables = randomised(model.init(jax.random.key(0), images))
    weights = jax.random.normal(jax.random.key(4), (32, 10))

    def loss(params):
        logits, _ = model.apply(
            {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
        )
        return (weights * logits).mean()

    gradient = jax.grad(loss)
    compiled, single = jax.jit(gradient)(variables['params']), gradient(variables['params'])
    # Of the largest of all, because some are 0 but for rounding, such as a key's bias.
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(single))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * scale),
        compiled,
        single,
    )


def test_conv_pooling_of_an_odd_grid_is_refused():
    with pytest.raises(BadInput, match="'conv' halves the grid of the tokens, which is 3×3 for"):
        small(pooling='conv').init(jax.random.key(0), IMAGES[:, :24, :24])
