"""The example worker learns, on the processor and, where there is one, on a CUDA device."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from fedcore.errors import ConfigError, NonFinite  # noqa: E402
from fedcore.services.worker_trainer import load_trainer  # noqa: E402
from fedcore.wire.messages import FeatureMap  # noqa: E402
from fedexamples import lenet  # noqa: E402
from fedexamples.lenet_worker import LeNetWorker  # noqa: E402

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
PATH = "fedexamples.lenet_worker:LeNetWorker"


def flat(weights):
    return tuple(FeatureMap(name, values.reshape(-1)) for name, values in weights.items())


@DEVICES
def test_it_learns_from_the_weights_that_it_is_given(device):
    trainer = load_trainer(PATH, {"shards": 4, "seed": 1, "learning_rate": 0.01}, device)
    assert {name: trainer._shapes[name] for name in trainer.names} == lenet.SHAPES
    trainer.take(flat(lenet.initial_weights(7)))
    first = trainer.train(1)
    for _ in range(5):
        last = trainer.train(40)
    assert last.loss < 0.5 * first.loss
    assert last.accuracy > 0.8


@DEVICES
def test_a_step_is_that_of_the_formula(device):
    """One step of descent by hand, on the batch that the worker takes first, with numpy's LeNet."""
    trainer = LeNetWorker({"shards": 4, "momentum": 0.0}, device)
    given = lenet.initial_weights(7)
    trainer.load(given)
    images, labels = next(LeNetWorker({"shards": 4}, "cpu")._batches)
    loss, gradients = lenet.loss_and_gradients(given, images.numpy(), labels.numpy())
    told, _ = trainer.train(1)
    assert told == pytest.approx(loss, rel=1e-4)
    for name, values in trainer.weights().items():
        expected = given[name] - np.float32(lenet.LEARNING_RATE) * gradients[name]
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5)


@DEVICES
def test_after_a_divergence_it_begins_without_the_old_momentum(device):
    trainer = LeNetWorker({"shards": 4, "learning_rate": 1e6}, device)
    with pytest.raises(NonFinite):
        trainer.train(20)
    for group in trainer._optimizer.param_groups:
        group["lr"] = 0.02
    trainer.load(lenet.initial_weights(7))
    loss, _ = trainer.train(5)
    assert np.isfinite(loss)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": 1}, "rate is no option of LeNetWorker"),
        ({"batch_size": 0}, "batch_size=0 is out of range"),
        ({"learning_rate": "fast"}, "learning_rate='fast' is out of range"),
        ({"momentum": 2}, "momentum=2 is out of range"),
        ({"data": "letters"}, "data='letters' is not a known data set"),
        ({"shard": 4, "shards": 4}, "shard=4 is out of range"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ConfigError) as refused:
        load_trainer(PATH, options, "cpu")
    assert words in str(refused.value)
