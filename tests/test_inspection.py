"""Numbers of the inspection against plain NumPy; what it writes of small finished runs."""

import collections
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from performer_vit import (
    datasets,
    evaluate,
    favor,
    figures,
    inspection,
    predict,
    train,
    vit,
    workdir,
)
from performer_vit.errors import BadInput
from tests import reference
from tests.conftest import make_tiny_config

ATTENTION_FIGURES = {'attention', 'rollout', 'attention_gap'}


def matrices(*shape, seed=0):
    """Random attention: [..., N, N] with rows that sum to 1, far from uniform."""
    weights = np.random.default_rng(seed).exponential(size=shape) ** 3
    return weights / weights.sum(axis=-1, keepdims=True)


def float32(x):
    return jnp.asarray(x, jnp.float32)


# Rollout and received attention


@pytest.mark.parametrize('queries', ['class token', 'mean'])
def test_rollout_is_the_product_of_all_blocks(queries):
    """The N×N matrices multiplied; catches blocks in the wrong order, a residual left out, a
    transposed product, and the rows of another token.
    """
    attention = matrices(3, 2, 6, 6)
    product = np.eye(6)
    for block in attention:
        product = (block.mean(axis=0) + np.eye(6)) / 2 @ product
    if queries == 'class token':
        weights, expected = np.eye(6)[0], product[0]
    else:
        weights, expected = np.full(6, 1 / 6), product.mean(axis=0)
    found = inspection.rollout(list(float32(attention)), float32(weights))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.sum() == pytest.approx(1, abs=1e-6)


def test_rollout_closed_forms():
    """Catches a rollout that adds something to attention that stays where it is, or goes to one."""
    stays = [jnp.eye(4)[None]] * 3
    queries = jnp.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(inspection.rollout(stays, queries), queries, rtol=1e-6)
    to_the_last = [jnp.zeros((2, 4, 4)).at[..., -1].set(1)] * 3
    found = inspection.rollout(to_the_last, jnp.array([1.0, 0, 0, 0]))
    np.testing.assert_allclose(found, [1 / 8, 0, 0, 7 / 8], rtol=1e-6)


def test_received_attention_counts_columns_in_multiples_of_uniform_attention():
    """Catches rows summed in the place of columns, which are 1 always."""
    attention = matrices(2, 3, 5, 5)
    expected = np.zeros((2, 3, 5))
    for query in range(5):
        for key in range(5):
            expected[..., key] += attention[..., query, key] / 5 / (1 / 5)
    np.testing.assert_allclose(
        inspection.received_attention(float32(attention)), expected, rtol=1e-5
    )
    assert np.ptp(expected) > 0.5
    uniform = inspection.received_attention(jnp.full((7, 7), 1 / 7))
    np.testing.assert_allclose(uniform, 1, rtol=1e-6)


# The gap


def loops(p, q):
    """Total variation, KL(p‖q) and entropy of p of two distributions, term by term."""
    variation = divergence = entropy = 0.0
    for a, b in zip(p.tolist(), q.tolist(), strict=True):
        variation += abs(a - b) / 2
        if a > 0:
            divergence += a * math.log(a / b)
            entropy -= a * math.log(a)
    return variation, divergence, entropy


def test_distances_against_loops():
    """Catches a missing ½, bits for nats, p and q exchanged, and 0 log 0."""
    p, q = matrices(4, 8, seed=1), matrices(4, 8, seed=2)
    p[0, :3] = 0
    p /= p.sum(axis=-1, keepdims=True)
    expected = np.array([loops(*rows) for rows in zip(p, q, strict=True)]).T
    given = float32(p), float32(q)
    np.testing.assert_allclose(inspection.total_variation(*given), expected[0], rtol=1e-5)
    np.testing.assert_allclose(inspection.kl_divergence(*given), expected[1], rtol=1e-4)
    np.testing.assert_allclose(inspection.entropy(given[0]), expected[2], rtol=1e-5)


def test_distances_closed_forms():
    """Catches infinity, which is no JSON, where the second distribution has a zero."""
    one, other = jnp.array([0.5, 0.5, 0, 0]), jnp.array([0, 0, 0.5, 0.5])
    assert inspection.total_variation(one, one) == inspection.kl_divergence(one, one) == 0
    assert inspection.total_variation(one, other) == 1
    least = float(np.finfo(np.float32).tiny)
    found = inspection.kl_divergence(one, other)
    assert found == pytest.approx(math.log(0.5 / least), rel=1e-5)
    assert inspection.entropy(jnp.full(64, 1 / 64)) == pytest.approx(math.log(64), rel=1e-6)
    assert inspection.entropy(jnp.eye(3)[0]) == 0


def test_correlation_is_pearsons_over_all_entries():
    """Catches a correlation a row, and one of what is not centred: positive for any shares."""
    p, q = matrices(2, 6, 6, seed=3), matrices(2, 6, 6, seed=4)
    q[1] = 0.7 * p[1] + 0.3 * q[1]
    expected = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(inspection.correlation(float32(p), float32(q)), expected, atol=1e-5)
    assert expected[1] > 0.5 > abs(expected[0])
    assert np.isnan(inspection.correlation(jnp.full((4, 4), 0.25), float32(p[0, :4, :4])))


def test_gap_measures_from_softmax_attention():
    """Catches the divergence the other way round, means over another axis, and a baseline of the
    implied attention.
    """
    implied, exact = matrices(2, 3, 6, 6, seed=5), matrices(2, 3, 6, 6, seed=6)
    found = inspection.gap(float32(implied), float32(exact))
    uniform = np.full(6, 1 / 6)
    for index in np.ndindex(2, 3):
        rows = list(zip(implied[index], exact[index], strict=True))
        expected = {
            'total_variation': [loops(p, q)[0] for p, q in rows],
            'kl_divergence': [loops(q, p)[1] for p, q in rows],
            'entropy': [loops(p, q)[2] for p, q in rows],
            'exact_entropy': [loops(q, p)[2] for p, q in rows],
            'uniform_total_variation': [loops(q, uniform)[0] for _, q in rows],
            'uniform_kl_divergence': [loops(q, uniform)[1] for _, q in rows],
        }
        assert found.keys() == expected.keys() | {'correlation'}
        for name, values in expected.items():
            assert found[name][index] == pytest.approx(np.mean(values), rel=1e-4), name


# What is shown


def test_one_of_each_takes_turns():
    """Catches a sample of one class, and images that are not the first of their class."""
    labels = np.array([2, 2, 0, 2, 1, 0, 0, 2], np.int32)
    assert inspection.one_of_each(labels, 99).tolist() == [2, 4, 0, 5, 1, 6, 3, 7]
    assert inspection.one_of_each(labels, 4).tolist() == [2, 4, 0, 5]


@pytest.mark.parametrize(
    ('blocks', 'heads', 'tokens', 'expected'),
    [(2, 4, 64, 128), (8, 8, 256, 128), (2, 4, 1024, 64), (8, 8, 1024, 16)],
)
def test_the_gap_of_large_maps_is_of_fewer_images(blocks, heads, tokens, expected):
    """Catches an inspection of a quarter of an hour, and one of too few images to have a spread."""
    assert inspection.num_gap_images(blocks * heads * tokens**2) == expected


def test_confident_errors_are_wrong_and_sorted():
    """Catches right predictions among the errors, and an order by the true class's probability."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(300, 5))
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    labels = rng.integers(0, 5, 300)
    found = inspection.confident_errors(labels, log_probabilities)
    expected = sorted(
        (-max(row), i)
        for i, (label, row) in enumerate(zip(labels, log_probabilities.tolist(), strict=True))
        if row.index(max(row)) != label
    )
    assert found.tolist() == [i for _, i in expected] and len(found) > 100


def test_confused_pairs_leave_out_the_diagonal_and_zeros():
    """Catches true and predicted exchanged, and pairs that never occurred."""
    confusion = np.array([[90, 0, 7], [3, 95, 0], [0, 8, 80]])
    assert inspection.confused_pairs(confusion) == [(2, 1), (0, 2), (1, 0)]
    assert inspection.confused_pairs(np.diag([5, 6])) == []


@pytest.mark.parametrize(
    ('kernel', 'tokens', 'absent', 'part'),
    [
        ('relu', 1024, set(), ''),
        ('ftheta_mixture', 64, set(), ''),
        ('exact', 64, {'attention_gap'}, 'the gap is 0'),
        ('none', 64, ATTENTION_FIGURES, 'has no attention'),
        ('mean', 64, ATTENTION_FIGURES, 'every token alike'),
        ('identity', 64, ATTENTION_FIGURES, 'features of both signs'),
        ('softmax_trigonometric', 64, ATTENTION_FIGURES, 'features of both signs'),
        ('relu', 4096, ATTENTION_FIGURES, '4,096 tokens make maps of 16,777,216 entries'),
    ],
)
def test_what_cannot_be_seen_is_named_with_its_reason(kernel, tokens, absent, part):
    """Catches a rollout of weights that are no shares, and a figure that is missing in silence."""
    config = make_tiny_config()
    config.model.attention.kernel = kernel
    found = inspection.left_out(config, tokens)
    assert set(found) == absent
    assert all(part in reason for reason in found.values())


# What a model's attention is


def weights(kernel, variables, block):
    """The projection or fθ of a block, as `favor_attention` takes it."""

    def attention(collection):
        return variables[collection][f'encoder_{block}']['self_attention']['attention']

    if kernel == 'exact':
        return {}
    if kernel == 'ftheta':
        return {'theta': attention('params')['theta']}
    return {'projection': attention('projections')['matrix']}


@pytest.mark.parametrize('kernel', ['exact', 'relu', 'ftheta'])
def test_attention_maps_are_what_the_model_attends_by(kernel):
    """map @ values is what `favor_attention` gives on the captured queries and keys, in each block.

    Catches blocks exchanged, queries taken before their projection, and a map that is not the
    attention's own.
    """
    config = make_tiny_config()
    config.model.depth = 2
    config.model.attention.kernel = kernel
    dataset = datasets.load('digits')
    model = vit.from_config(config.model, 10, config.seed)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape), variables['params']
    )
    variables = {**variables, 'params': params}
    images = dataset.validation.images[:3]
    makers = (predict.make_attention, predict.make_forward)
    both = jax.jit(lambda *given: [make(model, dataset)(*given) for make in makers])
    (log_probabilities, blocks), expected = both(variables, images)
    np.testing.assert_allclose(log_probabilities, expected, atol=1e-5)
    attend = jax.jit(functools.partial(favor.favor_attention, kernel=kernel))
    value = float32(rng.normal(size=(3, 16, 2, 8)))
    found = []
    for i, block in enumerate(blocks):
        options = weights(kernel, variables, i)
        expected = attend(block['query'], block['key'], value, **options)
        out = np.einsum('bhnm,bmhd->bnhd', block['attention_map'], value)
        np.testing.assert_allclose(out, expected, atol=1e-4)
        np.testing.assert_allclose(block['attention_map'].sum(axis=-1), 1, atol=1e-5)
        found.append(out)
    assert np.abs(found[0] - found[1]).max() > 1e-2


# Finished runs


Inspected = collections.namedtuple('Inspected', 'kernel directory numbers run')


@pytest.fixture(scope='module')
def inspect(tmp_path_factory):
    """A function of the kernel that trains a run once, and gives it with what its inspection says.

    The ViT has a class token.
    """

    @functools.cache
    def inspect(kernel):
        config = make_tiny_config()
        config.num_epochs = 1
        config.model.update(depth=2, pooling='cls' if kernel == 'exact' else 'gap')
        config.model.attention.kernel = kernel
        directory = tmp_path_factory.mktemp(kernel) / 'run'
        train.train(config, directory)
        results = (directory / 'results.json').read_bytes()
        numbers = inspection.inspect_run(directory)
        assert (directory / 'results.json').read_bytes() == results
        return Inspected(kernel, directory, numbers, evaluate.restore_run(directory))

    return inspect


@pytest.fixture(params=['relu', 'exact', 'ftheta'])
def finished(request, inspect):
    return inspect(request.param)


@pytest.fixture(params=['relu', 'ftheta'])
def performer(request, inspect):
    return inspect(request.param)


def test_a_run_is_inspected_into_files(finished):
    """Catches a figure or file that is not written, and numbers that change on disk."""
    kernel, directory, numbers, _ = finished
    names = {path.stem for path in (directory / 'figures' / 'inspect').iterdir()}
    expected = {'attention_1', 'rollout', 'misclassified', 'confused_pairs'}
    expected |= {'relu': {'attention_gap'}, 'exact': set()}.get(
        kernel, {'attention_gap', 'learnt_kernel'}
    )
    assert names == expected
    assert json.loads((directory / 'inspection.json').read_text()) == numbers
    assert numbers['kernel'] == kernel and numbers['dataset'] == 'digits'
    assert set(numbers['left_out']) == ({'attention_gap'} if kernel == 'exact' else set())
    assert (numbers['gap'] is None) == (kernel == 'exact')
    assert not [path for path in directory.rglob('*.unfinished')]


def captured(run, indices):
    """Log-probabilities, queries, keys and maps of validation images, all in one batch."""
    attention = jax.jit(predict.make_attention(run.model, run.dataset))
    images = run.dataset.validation.images[indices]
    return jax.device_get(attention(run.state.evaluated, images))


def test_saved_maps_are_those_of_the_shown_validation_images(finished):
    """Rollout as a product of matrices, with and without a class token, of the tested weights.

    Catches test images looked at, normalised pixels saved, the class token shown as a region, and
    the rollout of another query.
    """
    kernel, directory, numbers, run = finished
    shown = numbers['attention']['images']
    assert numbers['attention']['split'] == 'validation'
    log_probabilities, blocks = captured(run, shown)
    saved = workdir.read_arrays(directory / 'inspection.npz')
    split = run.dataset.validation
    np.testing.assert_array_equal(saved['images'], split.images[shown])
    np.testing.assert_array_equal(saved['labels'], split.labels[shown])
    assert sorted(saved['labels'].tolist()) == list(range(10))
    np.testing.assert_array_equal(saved['predicted'], log_probabilities.argmax(axis=1))
    largest = np.exp(log_probabilities).max(axis=1)
    np.testing.assert_allclose(saved['probability'], largest, rtol=1e-4)

    maps = np.stack([block['attention_map'] for block in blocks], axis=1)  # S, L, H, N, N
    tokens = maps.shape[-1]
    assert tokens == (17 if kernel == 'exact' else 16)
    regions = slice(tokens - 16, None)
    received = maps.sum(axis=-2)[..., regions]
    np.testing.assert_allclose(saved['received'].reshape(received.shape), received, rtol=1e-3)
    product = np.broadcast_to(np.eye(tokens), (len(shown), tokens, tokens))
    for block in range(2):
        product = (maps[:, block].mean(axis=1) + np.eye(tokens)) / 2 @ product
    rollout = product[:, 0] if kernel == 'exact' else product.mean(axis=1)
    rollout = rollout[:, regions]
    rollout = 16 * rollout / rollout.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(saved['rollout'].reshape(-1, 16), rollout, rtol=1e-3)
    assert saved['rollout'].shape == (10, 4, 4) and saved['received'].shape == (10, 2, 2, 4, 4)


def test_the_gap_is_that_of_the_references(performer):
    """Both attentions from the captured queries and keys, by plain NumPy in float64.

    Catches queries and keys of two blocks compared, another temperature, the deviation of n in the
    place of n - 1, and exact attention compared with itself.
    """
    kernel, _, numbers, run = performer
    indices = inspection.one_of_each(run.dataset.validation.labels, inspection.GAP_IMAGES)
    assert numbers['gap']['images'] == len(indices) == 128
    assert numbers['gap']['uniform_entropy'] == pytest.approx(math.log(16))
    _, blocks = captured(run, indices)
    for row in numbers['gap']['heads']:
        block, head = blocks[row['block'] - 1], row['head'] - 1
        options = weights(kernel, run.state.evaluated, row['block'] - 1)
        query, key = block['query'], block['key']
        p = reference.attention_matrix(kernel, query, key, **options)[:, head]
        q = reference.attention_matrix('exact', query, key)[:, head]
        images = {
            'total_variation': np.abs(p - q).sum(axis=-1).mean(axis=-1) / 2,
            'kl_divergence': (q * np.log(q / p)).sum(axis=-1).mean(axis=-1),
            'entropy': -(p * np.log(p)).sum(axis=-1).mean(axis=-1),
            'exact_entropy': -(q * np.log(q)).sum(axis=-1).mean(axis=-1),
            'correlation': [
                np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(p, q, strict=True)
            ],
            'uniform_total_variation': np.abs(1 / 16 - q).sum(axis=-1).mean(axis=-1) / 2,
            'uniform_kl_divergence': (q * np.log(q * 16)).sum(axis=-1).mean(axis=-1),
        }
        for name, values in images.items():
            assert row['mean'][name] == pytest.approx(np.mean(values), rel=2e-3, abs=1e-5), name
            deviation = np.std(values, ddof=1)
            assert row['std'][name] == pytest.approx(deviation, rel=1e-2, abs=1e-5), name
    assert [(row['block'], row['head']) for row in numbers['gap']['heads']] == [
        (1, 1), (1, 2), (2, 1), (2, 2),
    ]  # fmt: skip


def test_errors_are_those_of_the_saved_predictions(finished):
    """Catches images of other errors, counts of other pairs, and a second test of the model."""
    _, directory, numbers, run = finished
    saved = workdir.read_arrays(directory / 'test_predictions.npz')
    labels, probabilities = saved['labels'], np.exp(saved['log_probabilities'])
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    assert (numbers['test_errors'], numbers['test_images']) == (len(wrong), len(labels))
    shown = numbers['misclassified']
    assert len(shown) == min(len(wrong), inspection.MISCLASSIFIED) > 5
    confidences = sorted(probabilities[wrong].max(axis=1), reverse=True)[: len(shown)]
    np.testing.assert_allclose([error['probability'] for error in shown], confidences, rtol=1e-5)
    for error in shown:
        index = error['index']
        assert error['true'] == str(labels[index]) != error['predicted'] == str(predicted[index])
    images = run.dataset.test.images[[error['index'] for error in shown]]
    arrays = workdir.read_arrays(directory / 'inspection.npz')
    np.testing.assert_array_equal(arrays['misclassified_images'], images)
    counts = [pair['count'] for pair in numbers['confused_pairs']]
    assert counts == sorted(counts, reverse=True) and len(counts) <= inspection.CONFUSED_PAIRS
    for pair in numbers['confused_pairs']:
        of_class = labels == int(pair['true'])
        count = np.sum(predicted[of_class] == int(pair['predicted']))
        assert pair['count'] == count > 0
        assert pair['share'] == pytest.approx(count / of_class.sum())


def test_the_summary_says_what_was_found(finished):
    """Catches numbers of other heads, and a figure whose absence nobody is told."""
    kernel, _, numbers, _ = finished
    text = inspection.summary(numbers)
    errors, images = numbers['test_errors'], numbers['test_images']
    assert f'{errors} of {images} test images misclassified ({errors / images:.2%})' in text
    pair = numbers['confused_pairs'][0]
    assert f'{pair["true"]} → {pair["predicted"]}' in text
    if kernel == 'exact':
        assert 'Not drawn: attention_gap, because attention is softmax attention itself' in text
        return
    assert 'Not drawn' not in text
    rows = [line.split() for line in text.splitlines() if line.strip()[:1] in ('1', '2')]
    rows = [row for row in rows if '±' in row]
    for row, head in zip(rows, numbers['gap']['heads'], strict=True):
        assert row[:2] == [str(head['block']), str(head['head'])]
        assert row[2] == f'{head["mean"]["total_variation"]:.3f}'
        assert row[4] == f'{head["std"]["total_variation"]:.3f}'


@pytest.fixture
def spoilt(inspect, tmp_path):
    """A copy of a finished run and its inspection, to be spoilt."""
    shutil.copytree(inspect('relu').directory, tmp_path / 'run')
    return tmp_path / 'run'


def spoil_labels(path):
    saved = workdir.read_arrays(path)
    workdir.write_arrays(path, {**saved, 'labels': saved['labels'][::-1]})


def spoil_normalisation(path):
    saved = workdir.read_arrays(path)
    doubled = 2 * saved['log_probabilities']
    workdir.write_arrays(path, {**saved, 'log_probabilities': doubled})


@pytest.mark.parametrize(
    ('spoil', 'part'),
    [
        (lambda path: path.unlink(), 'npz does not exist'),
        (lambda path: path.write_bytes(b''), 'npz is damaged'),
        (lambda path: path.write_bytes(b'text'), 'npz is damaged'),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), 'npz is damaged'),
        (
            lambda path: workdir.write_arrays(path, {'labels': np.zeros(3)}),
            "has no array 'log_probabilities'",
        ),
        (spoil_labels, '360 images that are not the 360 test images of digits'),
        (spoil_normalisation, 'sum to'),
    ],
)
def test_predictions_that_cannot_be_used_are_refused(spoilt, inspect, spoil, part):
    """Catches a traceback, and figures of one run's predictions over another's images."""
    spoil(spoilt / 'test_predictions.npz')
    with pytest.raises(BadInput, match=part):
        inspection.read_tested(spoilt, inspect('relu').run.dataset)


@pytest.mark.parametrize(
    ('file', 'content', 'part'),
    [
        ('results.json', None, 'results.json does not exist: the run there is not finished'),
        ('results.json', '{}', 'has no tested state'),
        ('results.json', 'null', 'holds None and not the fields'),
        ('config.json', '{"dataset_read": "digits"}', 'not the config of a training'),
        ('test_predictions.npz', 'text', 'npz is damaged'),
    ],
)
def test_a_run_that_cannot_be_used_is_refused(spoilt, file, content, part):
    """Catches figures that are half written before the run is found to be unfinished."""
    shutil.rmtree(spoilt / 'figures' / 'inspect')
    (spoilt / file).unlink()
    if content is not None:
        (spoilt / file).write_text(content)
    with pytest.raises(BadInput, match=part):
        inspection.inspect_run(spoilt)
    assert not (spoilt / 'figures' / 'inspect').exists()


def test_a_run_without_attention_and_without_errors(spoilt, inspect, monkeypatch, capsys):
    """What is not there is named once, in the file and in what is printed, and nothing is drawn."""
    run = inspect('relu').run
    config = run.config.copy_and_resolve_references()
    config.model.attention.kernel = 'none'
    monkeypatch.setattr(evaluate, 'restore_run', lambda _: run._replace(config=config))
    labels = run.dataset.test.labels
    sure = np.where(np.eye(10)[labels] == 1, 0.0, -50.0).astype(np.float32)
    saved = {'labels': labels, 'log_probabilities': sure}
    workdir.write_arrays(spoilt / 'test_predictions.npz', saved)
    shutil.rmtree(spoilt / 'figures' / 'inspect')
    numbers = inspection.inspect_run(spoilt)
    assert not (spoilt / 'figures' / 'inspect').exists()
    errors = {'misclassified', 'confused_pairs'}
    assert set(numbers['left_out']) == ATTENTION_FIGURES | errors
    assert numbers['attention'] is numbers['gap'] is None
    printed = capsys.readouterr().out
    assert 'Not drawn: attention, rollout, attention_gap, because kernel' in printed
    assert 'because the model recognised every test image' in printed


def test_figures_are_drawn_again_from_the_files_alone(spoilt, monkeypatch):
    """Catches a figure that needs the model or the data."""
    monkeypatch.setattr(evaluate, 'restore_run', None)
    monkeypatch.setattr(datasets, 'load', None)
    drawn = spoilt / 'figures' / 'inspect'
    names = {path.name for path in drawn.iterdir()}
    shutil.rmtree(drawn)
    figures.draw_inspection(spoilt)
    assert {path.name for path in drawn.iterdir()} == names
