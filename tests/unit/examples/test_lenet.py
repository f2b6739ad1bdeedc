"""LeNet in numpy: gradients against finite differences, learning, repeatability, the Trainer's promises."""

from collections.abc import Mapping

import numpy as np
import pytest

from fedclient.trainer import FitConfig
from fedcore.errors import ConfigError, NonFinite, ShapeMismatch
from fedexamples import lenet
from fedexamples.lenet import Floats, Labels, LeNetTrainer

PLAN = FitConfig(epochs=1, batch_size=16, learning_rate=0.02, iteration=1)


def blobs(samples: int, seed: int = 0) -> tuple[Floats, Labels]:
    """Ten kinds of images, each one bright square in a place of its own, under noise."""
    random = np.random.default_rng(seed)
    labels = np.arange(samples) % 10
    images = random.standard_normal((samples, 1, 32, 32), dtype=np.float32) * np.float32(0.3)
    for image, label in zip(images, labels, strict=True):
        row, column = 4 + 12 * (label // 5), 1 + 6 * (label % 5)
        image[0, row : row + 8, column : column + 5] += 2
    return images, labels


def in_float64(weights: Mapping[str, Floats]) -> dict[str, Floats]:
    return {name: value.astype(np.float64) for name, value in weights.items()}


def flat_and_read_only(weights: Mapping[str, Floats]) -> dict[str, Floats]:
    """Weights as the client hands them over: views of a reply."""
    flat = {name: value.reshape(-1).copy() for name, value in weights.items()}
    for value in flat.values():
        value.flags.writeable = False
    return flat


@pytest.fixture
def trainer() -> LeNetTrainer:
    pytest.importorskip("sklearn")
    return LeNetTrainer(shard="2", shards="8", data="digits", seed="1", alpha="0.5")


def test_the_first_weights_are_lenet_5_and_a_function_of_the_seed() -> None:
    weights = lenet.initial_weights(3)
    assert {name: value.shape for name, value in weights.items()} == dict(lenet.SHAPES)
    assert sum(value.size for value in weights.values()) == 61_706
    assert all(value.dtype == np.float32 for value in weights.values())
    assert np.array_equal(weights["fc1.weight"], lenet.initial_weights(3)["fc1.weight"])
    assert not np.array_equal(weights["fc1.weight"], lenet.initial_weights(4)["fc1.weight"])


@pytest.mark.parametrize("name", lenet.SHAPES)
def test_gradients_equal_central_differences(name: str) -> None:
    images, labels = blobs(3)
    images = images.astype(np.float64)
    weights = in_float64(lenet.initial_weights(1))
    random = np.random.default_rng(2)
    for key in weights:  # biases off zero, so that no neuron sits on the kink of its ReLU
        weights[key] += 0.05 * random.standard_normal(weights[key].shape)
    _, gradients = lenet.loss_and_gradients(weights, images, labels)
    values, step = weights[name].reshape(-1), 1e-6
    for index in random.choice(values.size, min(values.size, 12), replace=False):
        original, losses = values[index], []
        for change in (step, -step):
            values[index] = original + change
            losses.append(lenet.loss_and_gradients(weights, images, labels)[0])
        values[index] = original
        difference = (losses[0] - losses[1]) / (2 * step)
        assert gradients[name].reshape(-1)[index] == pytest.approx(difference, rel=1e-5, abs=1e-8)


def test_a_convolution_is_the_sum_that_its_definition_says() -> None:
    images, _ = blobs(2)
    weights = lenet.initial_weights(0)
    maps = lenet._apply(weights, "conv1", lenet._patches(images.transpose(1, 2, 3, 0))).reshape(6, 28, 28, 2)
    kernel = weights["conv1.weight"][4, 0]
    expected = np.sum(images[1, 0, 10:15, 7:12] * kernel) + weights["conv1.bias"][4]
    assert maps[4, 10, 7, 1] == pytest.approx(expected, rel=1e-5)


def test_everything_stays_float32() -> None:
    images, labels = blobs(4)
    weights = lenet.initial_weights(0)
    assert lenet.logits(weights, images).dtype == np.float32
    _, gradients = lenet.loss_and_gradients(weights, images, labels)
    trained, _ = lenet.train_epochs(weights, images, labels, epochs=1, batch_size=2, order=(0,))
    for name, shape in lenet.SHAPES.items():
        assert gradients[name].dtype == trained[name].dtype == np.float32
        assert gradients[name].shape == trained[name].shape == shape


def test_the_gradient_of_a_batch_is_the_mean_over_its_samples() -> None:
    images, labels = blobs(5)
    weights = in_float64(lenet.initial_weights(0))
    _, together = lenet.loss_and_gradients(weights, images, labels)
    alone = [lenet.loss_and_gradients(weights, images[i : i + 1], labels[i : i + 1])[1] for i in range(5)]
    for name, gradient in together.items():
        assert np.allclose(gradient, np.mean([one[name] for one in alone], axis=0))


def test_the_loss_survives_huge_scores() -> None:
    images, labels = blobs(2)
    weights = {name: value * 50 for name, value in lenet.initial_weights(0).items()}
    loss, gradients = lenet.loss_and_gradients(weights, images, labels)
    assert np.isfinite(loss)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_training_learns() -> None:
    images, labels = blobs(100)
    weights = lenet.initial_weights(0)
    before, _ = lenet.loss_and_gradients(weights, images, labels)
    trained, _ = lenet.train_epochs(
        weights, images, labels, epochs=4, batch_size=16, learning_rate=0.02, momentum=0.9, order=(0,)
    )
    after, _ = lenet.loss_and_gradients(trained, images, labels)
    assert after < before / 4
    fresh_images, fresh_labels = blobs(150, seed=9)  # more than one batch of predict
    assert lenet.accuracy(trained, fresh_images, fresh_labels) > 0.9
    assert lenet.predict(trained, fresh_images).dtype == np.int64


def test_training_leaves_its_arguments_alone_and_repeats_exactly() -> None:
    images, labels = blobs(20)
    weights = flat_and_read_only(lenet.initial_weights(0))
    first, again, other = (
        lenet.train_epochs(lenet.shaped(weights), images, labels, epochs=1, batch_size=8, order=order)
        for order in ((1, 2, 3), (1, 2, 3), (1, 2, 4))
    )
    assert np.array_equal(weights["fc1.weight"], lenet.initial_weights(0)["fc1.weight"].reshape(-1))
    assert first[1] == again[1]
    assert all(np.array_equal(first[0][name], again[0][name]) for name in lenet.SHAPES)
    assert not np.array_equal(first[0]["fc1.weight"], other[0]["fc1.weight"])


def test_shaping_refuses_the_weights_of_another_model() -> None:
    weights = flat_and_read_only(lenet.initial_weights(0))
    assert lenet.shaped(weights)["conv2.weight"].base is not None
    with pytest.raises(ShapeMismatch, match=r"fc9\.bias"):
        lenet.shaped({**weights, "fc9.bias": np.zeros(3, dtype=np.float32)})
    with pytest.raises(ShapeMismatch, match=r"fc3\.bias"):
        lenet.shaped({name: value for name, value in weights.items() if name != "fc3.bias"})
    with pytest.raises(ShapeMismatch, match=r"size 11"):
        lenet.shaped({**weights, "fc3.bias": np.zeros(11, dtype=np.float32)})


def test_the_trainer_counts_fits_and_evaluates(trainer: LeNetTrainer) -> None:
    samples, held_out = trainer.load()
    assert 35 <= samples <= 1437
    assert held_out >= 5
    weights = flat_and_read_only(lenet.initial_weights(0))
    result = trainer.fit(weights, PLAN)
    assert np.isfinite(result.loss)
    assert result.weights.keys() == lenet.SHAPES.keys()
    assert 0 <= trainer.evaluate(weights) <= 1
    later = trainer.fit(flat_and_read_only(result.weights), PLAN)
    assert later.loss < result.loss


def test_two_trainers_of_equal_options_agree_and_iterations_differ(trainer: LeNetTrainer) -> None:
    weights = flat_and_read_only(lenet.initial_weights(0))
    twin = LeNetTrainer(shard=2, shards=8, data="digits", seed=1, alpha=0.5)
    trained, same = trainer.fit(weights, PLAN), twin.fit(weights, PLAN)
    assert trained.loss == same.loss
    assert all(np.array_equal(trained.weights[name], same.weights[name]) for name in lenet.SHAPES)
    second = trainer.fit(weights, FitConfig(epochs=1, batch_size=16, learning_rate=0.02, iteration=2))
    assert not np.array_equal(trained.weights["fc3.weight"], second.weights["fc3.weight"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_training_that_explodes_says_so(trainer: LeNetTrainer) -> None:
    weights = flat_and_read_only(lenet.initial_weights(0))
    with pytest.raises(NonFinite, match="lower the learning rate"):
        trainer.fit(weights, FitConfig(epochs=2, batch_size=16, learning_rate=1e9, iteration=1))


def test_a_malformed_option_is_refused_before_any_data_is_read() -> None:
    with pytest.raises(ConfigError, match="shard=8"):
        LeNetTrainer(shard="8", shards="8")
    with pytest.raises(ConfigError, match="alpha='x'"):
        LeNetTrainer(alpha="x")


def test_a_trainer_keeps_blas_to_one_thread() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        LeNetTrainer()
        threads = [
            pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"
        ]
    assert set(threads) <= {1}
