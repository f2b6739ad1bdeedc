"""LeNet-5 in plain numpy, and the Trainer that federates it.

What lives here: the model as functions of values (weights in, weights out) and ``LeNetTrainer``, which joins
them to a shard of data. Nothing knows the protocol, and nothing but ``LeNetTrainer`` holds state.

The model, with the shape of one sample after each step::

    image 1x32x32 -conv1-> 6x28x28 -relu, pool-> 6x14x14 -conv2-> 16x10x10 -relu, pool-> 16x5x5
                  -fc1-> 120 -relu-> -fc2-> 84 -relu-> -fc3-> 10 logits

Convolutions are 5x5 without padding; pools average 2x2. Inside, **the batch is the last axis** ([channel,
row, column, sample] and [feature, sample]): gathering patches and pooling then move long runs of memory, not
five numbers at a time. Names, shapes and orientation of the weights are those of the same model in torch.

The matrices are too small to share among cores: a BLAS of several threads takes ten times the CPU time.
``LeNetTrainer`` holds it to one; who calls the functions alone starts with OPENBLAS_NUM_THREADS=1.

Source: LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition, 1998, section
II.B; with ReLU for tanh, all 6 maps feeding all 16, and softmax cross-entropy for the radial units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from fedclient.trainer import FitConfig, FitResult
from fedcore.errors import NonFinite, ShapeMismatch
from fedexamples import datasets

Floats = npt.NDArray[np.floating[Any]]  # float32 in use; float64 where a test takes finite differences
Labels = npt.NDArray[np.int64]

SHAPES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "conv1.weight": (6, 1, 5, 5),  # output channels, input channels, rows, columns
        "conv1.bias": (6,),
        "conv2.weight": (16, 6, 5, 5),
        "conv2.bias": (16,),
        "fc1.weight": (120, 400),  # outputs, inputs
        "fc1.bias": (120,),
        "fc2.weight": (84, 120),
        "fc2.bias": (84,),
        "fc3.weight": (10, 84),
        "fc3.bias": (10,),
    }
)

# A training plan that suits eight uneven shards of "digits"; the server's configuration has the last word.
EPOCHS = 2
BATCH_SIZE = 16
LEARNING_RATE = 0.02
MOMENTUM = 0.9

KERNEL = 5
PREDICT_BATCH = 64  # samples; bounds the memory for patches to about 5 MB


def initial_weights(seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Draw the weights to start from.

    Args:
        seed: >= 0; same seed, same weights.

    Returns:
        Name -> float32 of ``SHAPES``: weights normal with variance 2 / inputs, biases 0.

    Source:
        He, Zhang, Ren, Sun: Delving Deep into Rectifiers, 2015, section 2.2.
    """
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in SHAPES.items():
        if name.endswith(".bias"):
            weights[name] = np.zeros(shape, dtype=np.float32)
        else:
            spread = np.float32(np.sqrt(2 / np.prod(shape[1:])))
            weights[name] = spread * random.standard_normal(shape, dtype=np.float32)
    return weights


def shaped(weights: Mapping[str, Floats]) -> dict[str, Floats]:
    """Give flat weights, as they come off the wire, the shapes of the model.

    Args:
        weights: name -> array of any shape with the right number of elements.

    Returns:
        Name -> array of ``SHAPES``; views, where numpy can.

    Raises:
        ShapeMismatch: a weight is missing, unknown or of another size.
    """
    if weights.keys() != SHAPES.keys():
        odd = ", ".join(sorted(weights.keys() ^ SHAPES.keys()))
        raise ShapeMismatch(f"not the weights of LeNet: {odd}", hint="does the job train another model?")
    try:
        return {name: weights[name].reshape(shape) for name, shape in SHAPES.items()}
    except ValueError as error:
        raise ShapeMismatch(f"not the weights of LeNet: {error}") from error


def logits(weights: Mapping[str, Floats], images: Floats) -> Floats:
    """Return the ten class scores of each image.

    Args:
        weights: name -> float of ``SHAPES``.
        images: float[n, 1, 32, 32].

    Returns:
        float[n, 10], of the weights' type.
    """
    return _forward(weights, images)["logits"].T


def predict(weights: Mapping[str, Floats], images: Floats) -> Labels:
    """Return the most likely class of each image.

    Args:
        weights: name -> float of ``SHAPES``.
        images: float[n, 1, 32, 32], n >= 1.

    Returns:
        int64[n], 0..9.
    """
    batches = (images[start : start + PREDICT_BATCH] for start in range(0, len(images), PREDICT_BATCH))
    return np.concatenate([logits(weights, batch).argmax(axis=1) for batch in batches])


def accuracy(weights: Mapping[str, Floats], images: Floats, labels: Labels) -> float:
    """Return the share of images whose class is predicted rightly.

    Args:
        weights: name -> float of ``SHAPES``.
        images: float[n, 1, 32, 32], n >= 1.
        labels: int64[n], 0..9.

    Returns:
        0..1.
    """
    return float(np.mean(predict(weights, images) == labels))


def loss_and_gradients(
    weights: Mapping[str, Floats], images: Floats, labels: Labels
) -> tuple[float, dict[str, Floats]]:
    """Return the mean cross-entropy of a batch and its gradient.

    Args:
        weights: name -> float of ``SHAPES``.
        images: float[n, 1, 32, 32], n >= 1.
        labels: int64[n], 0..9.

    Returns:
        The loss in nats, and name -> float of ``SHAPES``.
    """
    seen = _forward(weights, images)
    loss, error = _cross_entropy(seen["logits"], labels)
    return loss, _backward(weights, seen, error)


def train_epochs(
    weights: Mapping[str, Floats],
    images: Floats,
    labels: Labels,
    *,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    momentum: float = MOMENTUM,
    order: Sequence[int] = (0,),
) -> tuple[dict[str, Floats], float]:
    """Train by stochastic gradient descent with momentum, from a standstill.

    Args:
        weights: name -> float of ``SHAPES``; left untouched.
        images: float[n, 1, 32, 32], n >= 1.
        labels: int64[n], 0..9.
        epochs: passes over the data, >= 1.
        batch_size: samples of one step, >= 1; the last step of an epoch takes what is left.
        learning_rate: step size, > 0.
        momentum: share of the last step that is repeated, 0..1.
        order: whole numbers >= 0 that seed the order of the samples.

    Returns:
        The new weights, and the mean loss in nats over the last epoch, taken as it went.
    """
    weights = {name: value.copy() for name, value in weights.items()}
    velocity = {name: np.zeros_like(value) for name, value in weights.items()}
    random = np.random.default_rng(order)
    mean_loss = 0.0
    for _ in range(epochs):
        samples = random.permutation(len(labels))
        mean_loss = 0.0
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            loss, gradients = loss_and_gradients(weights, images[batch], labels[batch])
            mean_loss += loss * len(batch) / len(samples)
            descend(weights, velocity, gradients, learning_rate, momentum)
    return weights, mean_loss


def descend(
    weights: Mapping[str, Floats],
    velocity: Mapping[str, Floats],
    gradients: Mapping[str, Floats],
    learning_rate: float,
    momentum: float,
) -> None:
    """Take one step of gradient descent with momentum, in place.

    Args:
        weights: name -> float of ``SHAPES``; changed.
        velocity: the same names and shapes, zeros before the first step; changed.
        gradients: of the loss by the weights.
        learning_rate: step size, > 0.
        momentum: share of the last step that is repeated, 0..1.
    """
    for name, gradient in gradients.items():
        velocity[name][...] *= momentum
        velocity[name][...] += gradient
        weights[name][...] -= learning_rate * velocity[name]


class LeNetTrainer:
    """One client's LeNet: ``fl-client --trainer fedexamples.lenet:LeNetTrainer``.

    Options may be strings, as a command line gives them. Where threadpoolctl is installed (scikit-learn
    brings it), making a trainer limits the process's BLAS to one thread.

    Args:
        shard: which part of the data this client holds, 0..shards-1.
        shards: number of parts, >= 1.
        data: "digits" or "fashion-mnist".
        seed: >= 0, the same for all clients; decides the division of the data and, with shard and iteration,
            the order of training, so that a run can be repeated.
        alpha: concentration of the Dirichlet distribution that divides the data, > 0.
        central: samples that a worker holds and no client, >= 0, the same for all clients.
        labelled: samples that this client has labels for, 0 for all of its part.

    Raises:
        ConfigError: an option is malformed or out of range.
    """

    def __init__(
        self,
        *,
        shard: int | str = 0,
        shards: int | str = 1,
        data: str = "digits",
        seed: int | str = 0,
        alpha: float | str = 0.5,
        central: int | str = 0,
        labelled: int | str = 0,
    ) -> None:
        with contextlib.suppress(ImportError):
            from threadpoolctl import threadpool_limits

            threadpool_limits(1, user_api="blas")
        self._options = datasets.ShardOptions.parse(
            shard=shard,
            shards=shards,
            data=data,
            seed=seed,
            alpha=alpha,
            central=central,
            labelled=labelled,
        )

    @cached_property
    def _data(self) -> datasets.Shard:
        return datasets.load_shard(self._options)

    def load(self) -> tuple[int, int]:
        return len(self._data.train_labels), len(self._data.evaluation_labels)

    def fit(self, weights: Mapping[str, npt.NDArray[np.float32]], config: FitConfig) -> FitResult:
        trained, loss = train_epochs(
            shaped(weights),
            self._data.train_images,
            self._data.train_labels,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            order=(self._options.seed, self._options.shard, config.iteration),
        )
        if not np.isfinite(loss):
            raise NonFinite(f"training diverged: the loss is {loss}", hint="lower the learning rate")
        return FitResult(trained, loss)

    def evaluate(self, weights: Mapping[str, npt.NDArray[np.float32]]) -> float:
        return accuracy(shaped(weights), self._data.evaluation_images, self._data.evaluation_labels)


def _forward(weights: Mapping[str, Floats], images: Floats) -> dict[str, Floats]:
    """Run the model, batch last, and keep what the way back needs."""
    seen: dict[str, Floats] = {}
    seen["patches1"] = _patches(np.ascontiguousarray(images.transpose(1, 2, 3, 0)))
    seen["conv1"] = _relu(_apply(weights, "conv1", seen["patches1"])).reshape(6, 28, 28, -1)
    seen["patches2"] = _patches(_pool(seen["conv1"]))
    seen["conv2"] = _relu(_apply(weights, "conv2", seen["patches2"])).reshape(16, 10, 10, -1)
    seen["features"] = _pool(seen["conv2"]).reshape(400, -1)
    seen["fc1"] = _relu(_apply(weights, "fc1", seen["features"]))
    seen["fc2"] = _relu(_apply(weights, "fc2", seen["fc1"]))
    seen["logits"] = _apply(weights, "fc3", seen["fc2"])
    return seen


def _backward(weights: Mapping[str, Floats], seen: Mapping[str, Floats], error: Floats) -> dict[str, Floats]:
    """Carry the gradient by the logits, float[10, n], back to every weight, last layer first."""
    gradients: dict[str, Floats] = {}
    _note(gradients, "fc3", seen["fc2"], error)
    error = _carry_back(weights, "fc3", error) * (seen["fc2"] > 0)
    _note(gradients, "fc2", seen["fc1"], error)
    error = _carry_back(weights, "fc2", error) * (seen["fc1"] > 0)
    _note(gradients, "fc1", seen["features"], error)
    error = _carry_back(weights, "fc1", error).reshape(16, 5, 5, -1)
    error = (_unpool(error) * (seen["conv2"] > 0)).reshape(16, -1)
    _note(gradients, "conv2", seen["patches2"], error)
    error = _unpatch(_carry_back(weights, "conv2", error), channels=6, side=14)
    error = (_unpool(error) * (seen["conv1"] > 0)).reshape(6, -1)
    _note(gradients, "conv1", seen["patches1"], error)
    return gradients


def _apply(weights: Mapping[str, Floats], layer: str, inputs: Floats) -> Floats:
    """Return weight @ inputs + bias; a convolution is the same thing over its patches."""
    weight, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
    outputs = weight.reshape(len(weight), -1) @ inputs
    outputs += bias[:, np.newaxis]
    return outputs


def _note(gradients: dict[str, Floats], layer: str, inputs: Floats, error: Floats) -> None:
    """Store the gradients of a layer's weights, given its inputs and the gradient by its outputs."""
    gradients[f"{layer}.weight"] = (error @ inputs.T).reshape(-1, *SHAPES[f"{layer}.weight"][1:])
    gradients[f"{layer}.bias"] = error.sum(axis=1)


def _carry_back(weights: Mapping[str, Floats], layer: str, error: Floats) -> Floats:
    """Return the gradient by a layer's inputs, given the one by its outputs."""
    weight = weights[f"{layer}.weight"]
    return weight.reshape(len(weight), -1).T @ error


def _relu(values: Floats) -> Floats:
    return np.maximum(values, 0, out=values)


def _patches(maps: Floats) -> Floats:
    """Lay out a 5x5 patch per position: [channel, row, column, n] -> [channel * 25, position * n]."""
    windows = sliding_window_view(maps, (KERNEL, KERNEL), axis=(1, 2))  # [channel, row, column, n, 5, 5]
    return windows.transpose(0, 4, 5, 1, 2, 3).reshape(len(maps) * KERNEL * KERNEL, -1)


def _unpatch(error: Floats, channels: int, side: int) -> Floats:
    """Sum the gradients by patches into those by maps: the transpose of ``_patches``."""
    inner = side - KERNEL + 1
    error = error.reshape(channels, KERNEL, KERNEL, inner, inner, -1)
    maps = np.zeros((channels, side, side, error.shape[-1]), dtype=error.dtype)
    for row in range(KERNEL):
        for column in range(KERNEL):
            maps[:, row : row + inner, column : column + inner] += error[:, row, column]
    return maps


def _pool(maps: Floats) -> Floats:
    """Average 2x2 squares: [channel, row, column, n] -> [channel, row / 2, column / 2, n]."""
    rows = maps[:, ::2] + maps[:, 1::2]
    pooled = rows[:, :, ::2] + rows[:, :, 1::2]
    pooled *= 0.25
    return pooled


def _unpool(error: Floats) -> Floats:
    """Give each corner of a square a quarter of its gradient: the transpose of ``_pool``."""
    return (error * 0.25).repeat(2, axis=1).repeat(2, axis=2)


def _cross_entropy(scores: Floats, labels: Labels) -> tuple[float, Floats]:
    """Return the mean loss of float[10, n] scores, and its gradient by them."""
    shifted = scores - scores.max(axis=0)
    exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=0)
    samples = np.arange(len(labels))
    loss = np.mean(np.log(totals) - shifted[labels, samples])
    error = exponentials / totals
    error[labels, samples] -= 1
    error /= len(labels)
    return float(loss), error
