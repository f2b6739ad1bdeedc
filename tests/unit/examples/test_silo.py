"""The example of a cloud worker's trainer: its steps are those of the whole training, in numpy and in torch."""

import numpy as np
import pytest

from fedclient.silo import LocalStep
from fedcore.errors import ConfigError
from fedexamples import lenet
from fedexamples.silo import LeNetSilo

OPTIONS = {"shard": 1, "shards": 8, "seed": 3}
FLAT = {name: values.reshape(-1) for name, values in lenet.initial_weights(3).items()}


def step(number, extra=None, rate=0.25):
    return LocalStep(number, 16, rate, 1, extra or {})


def test_an_epoch_of_steps_takes_every_sample_once():
    silo = LeNetSilo(**OPTIONS)
    samples, _ = silo.load()
    seen = []
    silo._gradients = lambda weights, images, labels: (seen.append(labels), (0.5, weights))[1]
    batches = samples // 16
    for number in range(1, 2 * batches + 1):
        silo.step(FLAT, step(number))
    first, second = np.concatenate(seen[:batches]), np.concatenate(seen[batches:])
    assert all(len(labels) == 16 for labels in seen)
    assert len(first) == len(second) == 16 * batches
    assert first.tolist() != second.tolist(), "each epoch has an order of its own"


def test_a_step_is_gradient_descent_with_the_extra_gradient():
    silo = LeNetSilo(**OPTIONS)
    plain = silo.step(FLAT, step(1)).weights
    extra = {name: np.full_like(values, 2) for name, values in FLAT.items()}
    pulled = silo.step(FLAT, step(1, extra)).weights
    still = silo.step(FLAT, step(1, rate=0.0)).weights
    for name, values in FLAT.items():
        np.testing.assert_array_equal(still[name], values)
        np.testing.assert_allclose(plain[name] - pulled[name], np.full_like(values, 0.5), atol=1e-6)


def test_steps_learn():
    silo = LeNetSilo(**OPTIONS)
    weights, losses = FLAT, []
    for number in range(1, 61):
        result = silo.step(weights, step(number, rate=0.05))
        weights = result.weights
        losses.append(result.loss)
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert silo.evaluate(weights) > silo.evaluate(FLAT)


def test_torch_takes_the_same_steps():
    pytest.importorskip("torch")
    numpy_step = LeNetSilo(**OPTIONS).step(FLAT, step(1))
    torch_step = LeNetSilo(framework="torch", **OPTIONS).step(FLAT, step(1))
    assert torch_step.loss == pytest.approx(numpy_step.loss, rel=1e-4)
    for name, values in numpy_step.weights.items():
        np.testing.assert_allclose(torch_step.weights[name], values, atol=1e-5)


def test_other_frameworks_are_not_known():
    with pytest.raises(ConfigError, match="numpy or torch"):
        LeNetSilo(framework="jax")
