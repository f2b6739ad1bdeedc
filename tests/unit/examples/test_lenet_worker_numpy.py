"""The example worker in plain numpy learns, and says what is wrong with its options."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")

from fedcore.errors import ConfigError, NonFinite
from fedcore.services.worker_trainer import load_trainer
from fedcore.wire.messages import FeatureMap
from fedexamples import datasets, lenet
from fedexamples.lenet_worker_numpy import NumpyLeNetWorker, WorkerOptions, shuffled

PATH = "fedexamples.lenet_worker_numpy:NumpyLeNetWorker"


def test_it_learns_from_the_weights_that_it_is_given():
    trainer = load_trainer(PATH, {"central": 300, "seed": 3, "learning_rate": 0.01}, "cpu")
    given = lenet.initial_weights(7)
    trainer.take(tuple(FeatureMap(name, values.reshape(-1)) for name, values in given.items()))
    first = trainer.train(1)
    for _ in range(3):
        last = trainer.train(40)
    assert last.loss < 0.5 * first.loss
    assert last.accuracy > 0.75
    np.testing.assert_array_equal(given["fc1.weight"], lenet.initial_weights(7)["fc1.weight"])


def test_two_short_trainings_are_one_long_one():
    """Data and momentum go on where they stopped."""
    apart, whole = (NumpyLeNetWorker({"central": 100}, "cpu") for _ in range(2))
    apart.train(4)
    apart.load(apart.weights())
    apart.train(5)
    whole.train(9)
    for name, values in whole.weights().items():
        np.testing.assert_array_equal(values, apart.weights()[name])


def test_it_does_as_torch_does():
    pytest.importorskip("torch")
    from fedexamples.lenet_worker import LeNetWorker

    told = {"central": 100, "seed": 2, "learning_rate": 0.005}
    both = [NumpyLeNetWorker(told, "cpu"), LeNetWorker(told, "cpu")]
    losses = [worker.train(5)[0] for worker in both]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, values in both[0].weights().items():
        np.testing.assert_allclose(values, both[1].weights()[name], rtol=1e-3, atol=1e-4)


def test_after_a_divergence_it_begins_without_the_old_momentum():
    trainer = NumpyLeNetWorker({"central": 100, "learning_rate": 1e6}, "cpu")
    with np.errstate(all="ignore"), pytest.raises(NonFinite):
        trainer.train(20)
    assert not any(values.any() for values in trainer._velocity.values())


def test_each_epoch_takes_every_sample_once():
    batches = shuffled(10, 4, (1,))
    epochs = [np.concatenate([next(batches) for _ in range(3)]) for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert list(epochs[0]) != list(epochs[1])


def test_without_central_samples_it_takes_a_clients():
    shard = datasets.load_shard(datasets.ShardOptions(1, 4, "digits", 0, 100.0))
    held = WorkerOptions.parse({"shard": 1, "shards": 4}, "test").load()
    np.testing.assert_array_equal(held.train_images, shard.train_images)


@pytest.mark.parametrize(
    ("options", "device", "words"),
    [
        ({"rate": 1}, "cpu", "rate is no option of NumpyLeNetWorker"),
        ({"central": -1}, "cpu", "central=-1 is out of range"),
        ({"momentum": True}, "cpu", "momentum=True is out of range"),
        ({}, "cuda", "numpy does not compute on cuda"),
    ],
)
def test_options_are_checked(options, device, words):
    with pytest.raises(ConfigError) as refused:
        load_trainer(PATH, options, device)
    assert words in str(refused.value)
