"""Batch order, shares of devices and processes, and what arrives on the devices."""

import jax
import numpy as np
import pytest

from performer_vit import augment, input_pipeline
from performer_vit.datasets import Split
from performer_vit.errors import BadInput
from tests.conftest import load_config

_N = 23


@pytest.fixture
def split():
    """Images that tell their index: every pixel of image i is i."""
    index = np.arange(_N)
    images = np.broadcast_to(index[:, None, None, None], (_N, 2, 3, 1)).astype(np.uint8)
    return Split(images, (index * 7 % 5).astype(np.int32))


def _one_device():
    return jax.local_devices()[:1]


def _train(split, **changes):
    arguments = dict(seed=1, batch_size=4, first_step=0, num_steps=12) | changes
    arguments.setdefault('devices', _one_device())
    return list(input_pipeline.train_batches(split, **arguments))


@pytest.mark.parametrize('batch_size', [1, 4, 7, _N])
def test_each_epoch_visits_each_example_at_most_once(batch_size):
    """Would catch repeats within an epoch, a kept remainder, and epochs in the same order."""
    steps = input_pipeline.steps_per_epoch(_N, batch_size)
    assert steps == _N // batch_size
    epochs = [
        np.concatenate(
            [
                input_pipeline.batch_indices(0, epoch * steps + i, batch_size, _N)
                for i in range(steps)
            ]
        )
        for epoch in range(3)
    ]
    for visited in epochs:
        assert len(visited) == len(set(visited.tolist())) == _N // batch_size * batch_size
        assert set(visited.tolist()) <= set(range(_N))
    assert not np.array_equal(epochs[0], epochs[1])


def test_order_is_a_pure_function_of_seed_and_epoch():
    """Would catch hidden state: a generator that moves on, or a cache that forgets an argument."""
    orders = {
        (seed, epoch): input_pipeline.epoch_order(seed, epoch, 1000).copy()
        for seed in range(3)
        for epoch in range(3)
    }
    assert len({order.tobytes() for order in orders.values()}) == 9
    input_pipeline.epoch_order.cache_clear()
    for seed, epoch in reversed(orders):
        np.testing.assert_array_equal(
            input_pipeline.epoch_order(seed, epoch, 1000), orders[seed, epoch]
        )


def test_order_is_pinned():
    """Would catch a change of the order between versions, which would break resumed runs. The
    numbers are those of the first version."""
    assert input_pipeline.epoch_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_first_position_is_uniform_over_epochs():
    """Would catch a permutation that favours some examples, such as a plain shift."""
    firsts = [input_pipeline.epoch_order(0, epoch, 8)[0] for epoch in range(1600)]
    counts = np.bincount(firsts, minlength=8)
    # 7 degrees of freedom: 29.9 is exceeded by one seed in 10,000 if all are equally likely.
    assert np.sum((counts - 200) ** 2 / 200) < 29.9


def test_cached_order_cannot_be_written():
    """Would catch a caller that spoils the order of later batches."""
    with pytest.raises(ValueError, match='read-only'):
        input_pipeline.epoch_order(0, 0, 8)[0] = 1


def test_train_batches_are_the_looked_up_examples(split):
    """Would catch images, labels and indices that drift apart, wrong dtypes, wrong positions."""
    batches = _train(split)
    assert len(batches) == 12
    for step, batch in enumerate(batches):
        chosen = input_pipeline.batch_indices(1, step, 4, _N)
        assert batch['image'].shape == (1, 4, 2, 3, 1)
        assert {k: v.dtype.name for k, v in batch.items()} == {
            'image': 'uint8',
            'label': 'int32',
            'position': 'int32',
            'index': 'int32',
        }
        np.testing.assert_array_equal(np.ravel(batch['image'][..., 1, 2, 0]), chosen)
        np.testing.assert_array_equal(np.ravel(batch['label']), split.labels[chosen])
        np.testing.assert_array_equal(np.ravel(batch['position']), range(4))
        np.testing.assert_array_equal(np.ravel(batch['index']), chosen)


@pytest.mark.parametrize('first_step', [1, 5, 11])
def test_starting_later_equals_skipping(split, first_step):
    """Would catch a resumed run that sees other batches, also across the end of an epoch."""
    resumed = _train(split, first_step=first_step, num_steps=12 - first_step)
    jax.tree.map(np.testing.assert_array_equal, resumed, _train(split)[first_step:])


def test_seeds_differ(split):
    """Would catch a seed that is ignored."""
    one, two = (np.stack([b['image'] for b in _train(split, seed=s)]) for s in (1, 2))
    assert np.any(one != two)


@pytest.mark.parametrize('processes', [1, 2, 3])
@pytest.mark.parametrize('devices', [1, 2, 4])
def test_shares_are_a_partition_of_the_batch_in_order(processes, devices):
    """Would catch shares that overlap, leave examples out, or come in another order."""
    shares = [input_pipeline.shard_positions(24, devices, p, processes) for p in range(processes)]
    for share in shares:
        assert share.shape == (devices, 24 // devices // processes) and share.dtype == np.int32
    np.testing.assert_array_equal(np.concatenate(shares).ravel(), range(24))


def test_processes_together_read_the_global_batch(split):
    """Would catch processes that all read the same share."""
    whole = _train(split, num_steps=6)
    shares = [_train(split, num_steps=6, process_index=p, process_count=2) for p in (0, 1)]
    for step in range(6):
        for field, values in whole[step].items():
            joined = np.concatenate([np.asarray(s[step][field]).ravel() for s in shares])
            np.testing.assert_array_equal(joined, np.asarray(values).ravel())


@pytest.mark.parametrize('batch_size', [1, 4, _N, 30])
def test_eval_covers_each_example_once_in_order(split, batch_size):
    """Would catch a dropped remainder, counted padding, and a second shape to compile."""
    batches = list(input_pipeline.eval_batches(split, batch_size=batch_size, devices=_one_device()))
    assert len({b['image'].shape for b in batches}) == 1
    joined = {k: np.concatenate([np.asarray(b[k]) for b in batches], 1)[0] for k in batches[0]}
    assert joined['weight'].dtype == np.float32
    assert set(np.unique(joined['weight'])) <= {0.0, 1.0}
    real = joined['weight'] == 1
    np.testing.assert_array_equal(joined['image'][real][:, 0, 0, 0], range(_N))
    np.testing.assert_array_equal(joined['label'][real], split.labels)
    assert len(real) == -(-_N // batch_size) * batch_size


def test_eval_processes_together_cover_each_example_once(split):
    """Would catch processes that count an example twice, or that disagree on the batches."""
    seen, lengths = [], []
    for p in (0, 1):
        share = dict(devices=_one_device(), process_index=p, process_count=2)
        batches = list(input_pipeline.eval_batches(split, batch_size=6, **share))
        lengths.append(len(batches))
        for batch in batches:
            real = np.asarray(batch['weight']) == 1
            seen += np.asarray(batch['image'])[real][:, 0, 0, 0].tolist()
    assert sorted(seen) == list(range(_N))
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize(
    'batch_size, devices, n, says',
    [
        (0, 1, 10, 'positive multiples'),
        (-4, 4, 10, 'The nearest is 4'),
        (6, 4, 10, 'The nearest is 8'),
        (12, 4, 10, 'there are 10 images to train on'),
    ],
)
def test_impossible_batch_sizes_are_refused(batch_size, devices, n, says):
    """Would catch an epoch of no batches, or a reshape that fails deep inside."""
    with pytest.raises(BadInput, match=says):
        input_pipeline.check_batch_size(batch_size, devices, n)


def test_possible_batch_sizes_pass():
    """Would catch a check that refuses the limits themselves."""
    input_pipeline.check_batch_size(8, 4, 8)
    input_pipeline.check_batch_size(16, 4)


@pytest.mark.parametrize('changes', [dict(batch_size=_N + 1), dict(seed=-1), dict(seed=2**64)])
def test_bad_input_is_refused_before_the_first_batch(split, changes):
    """Would catch a check inside the generator, which speaks only when training has begun."""
    arguments = dict(seed=1, batch_size=4, first_step=0, num_steps=1) | changes
    arguments['devices'] = _one_device()
    with pytest.raises(BadInput):
        input_pipeline.train_batches(split, **arguments)
    with pytest.raises(BadInput):
        input_pipeline.eval_batches(split, batch_size=0)


def test_four_devices_train_on_what_one_device_trains_on():
    """Would catch shards on the wrong devices, and augmentation that depends on the sharding."""
    everywhere = jax.local_devices()
    assert len(everywhere) >= 4  # The tests' set-up asks JAX for them.
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 8, 8, 3), np.uint8)
    split = Split(images, np.arange(20, dtype=np.int32))
    options = load_config('vit').augment

    def step(batch):
        targets = jax.nn.one_hot(batch['label'], 20)
        return augment.augment(
            options, batch, targets, seed=0, step_key=jax.random.key(0), epoch=1, mirror=True,
            mean=np.full(3, 0.5), std=np.full(3, 0.25),
        )[0]  # fmt: skip

    results = []
    for devices in (everywhere[:4], everywhere[:1], everywhere[2:4]):
        run = jax.pmap(step, devices=devices)
        outputs = []
        for batch in _train(split, batch_size=8, num_steps=3, devices=devices):
            assert [shard.device for shard in batch['image'].addressable_shards] == devices
            assert batch['image'].shape == (len(devices), 8 // len(devices), 8, 8, 3)
            outputs.append(np.asarray(run(batch)).reshape(8, 8, 8, 3))
        results.append(np.stack(outputs))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_all_devices_are_the_default(split):
    """Would catch a default that leaves devices idle."""
    count = jax.local_device_count()
    batches = input_pipeline.train_batches(
        split, seed=0, batch_size=count, first_step=0, num_steps=1
    )
    assert next(batches)['image'].shape[:2] == (count, 1)
    assert next(input_pipeline.eval_batches(split, batch_size=count))['label'].shape == (count, 1)
