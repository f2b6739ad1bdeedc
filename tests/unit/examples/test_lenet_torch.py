"""LeNet in torch is the same function as LeNet in numpy: scores, gradients, training, refusals."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedclient.trainer import FitConfig, Weights
from fedcore.errors import ConfigError, NonFinite, ShapeMismatch
from fedexamples import lenet

pytest.importorskip("torch")
from fedexamples import lenet_torch

Batch = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
PLAN = FitConfig(epochs=1, batch_size=16, learning_rate=0.02, iteration=3)


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Weights with biases off zero, as after some training."""
    random = np.random.default_rng(4)
    drawn = lenet.initial_weights(0)
    return {
        name: value + np.float32(0.05) * random.standard_normal(value.shape, dtype=np.float32)
        for name, value in drawn.items()
    }


@pytest.fixture(scope="module")
def batch() -> Batch:
    random = np.random.default_rng(1)
    return random.standard_normal((7, 1, 32, 32), dtype=np.float32), random.integers(0, 10, 7)


def read_only(weights: Weights) -> Weights:
    flat = {name: value.reshape(-1).copy() for name, value in weights.items()}
    for value in flat.values():
        value.flags.writeable = False
    return flat


def close(ours: Weights, theirs: Weights) -> bool:
    assert ours.keys() == theirs.keys()
    return all(np.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5) for name in ours)


def test_scores_are_equal(weights: Weights, batch: Batch) -> None:
    images, _ = batch
    ours, theirs = lenet.logits(weights, images), lenet_torch.logits(weights, images)
    assert theirs.dtype == np.float32
    assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert np.array_equal(lenet.predict(weights, images), lenet_torch.predict(weights, images))


def test_gradients_are_equal(weights: Weights, batch: Batch) -> None:
    loss, gradients = lenet.loss_and_gradients(weights, *batch)
    their_loss, their_gradients = lenet_torch.loss_and_gradients(weights, *batch)
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert close(gradients, their_gradients)


def test_training_takes_the_same_path(weights: Weights, batch: Batch) -> None:
    options: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 3,
        "learning_rate": 0.01,
        "momentum": 0.9,
        "order": (1, 2, 3),
    }
    ours, loss = lenet.train_epochs(weights, *batch, **options)
    theirs, their_loss = lenet_torch.train_epochs(weights, *batch, **options)
    assert loss == pytest.approx(their_loss, rel=1e-4)
    assert close(ours, theirs)


@pytest.mark.filterwarnings("error")
def test_trainers_of_both_kinds_give_the_same_update(weights: Weights) -> None:
    pytest.importorskip("sklearn")
    options = {"shard": "1", "shards": "8", "data": "digits", "seed": "5", "alpha": "0.5"}
    ours, theirs = lenet.LeNetTrainer(**options), lenet_torch.TorchLeNetTrainer(**options)
    assert ours.load() == theirs.load()
    start = read_only(weights)
    result, their_result = ours.fit(start, PLAN), theirs.fit(start, PLAN)
    assert result.loss == pytest.approx(their_result.loss, rel=1e-3)
    assert their_result.weights.keys() == lenet.SHAPES.keys()
    for name, shape in lenet.SHAPES.items():
        assert their_result.weights[name].shape == shape
        assert their_result.weights[name].dtype == np.float32
        assert np.allclose(result.weights[name], their_result.weights[name], rtol=1e-2, atol=1e-3)
    assert theirs.evaluate(start) == pytest.approx(ours.evaluate(start))


def test_the_torch_trainer_refuses_what_the_other_refuses(weights: Weights) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(ConfigError, match="shards=0"):
        lenet_torch.TorchLeNetTrainer(shards="0")
    trainer = lenet_torch.TorchLeNetTrainer(shard="0", shards="8")
    with pytest.raises(ShapeMismatch):
        trainer.fit({"fc": np.zeros(3, dtype=np.float32)}, PLAN)
    with pytest.raises(NonFinite, match="lower the learning rate"):
        trainer.fit(read_only(weights), FitConfig(epochs=2, batch_size=16, learning_rate=1e9, iteration=1))
