"""The model of ``fedexamples.lenet`` in torch, and the Trainer that federates it.

Names, shapes, orientation and order of training are the same, so numpy and torch clients can share one
federation and load each other's models. What belongs to no framework (first weights, options, data) comes
from the neighbours; torch is imported in this file only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from fedclient.trainer import FitConfig, FitResult
from fedcore.errors import NonFinite
from fedexamples import datasets, lenet

Weights = Mapping[str, npt.NDArray[np.float32]]
Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class LeNet(nn.Module):
    """LeNet-5 with ReLU and average pools; input float32[n, 1, 32, 32], output float32[n, 10] logits.

    Args:
        weights: name -> float32 of ``lenet.SHAPES``; copied.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)
        self.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = functional.avg_pool2d(torch.relu(self.conv1(images)), 2)
        maps = functional.avg_pool2d(torch.relu(self.conv2(maps)), 2)
        features = maps.flatten(start_dim=1)
        features = torch.relu(self.fc1(features))
        features = torch.relu(self.fc2(features))
        return self.fc3(features)


def logits(weights: Weights, images: Images) -> npt.NDArray[np.float32]:
    """Return the ten class scores of each image (see ``lenet.logits``): float32[n, 10]."""
    with torch.inference_mode():
        return LeNet(weights)(torch.from_numpy(images)).numpy()


def predict(weights: Weights, images: Images) -> Labels:
    """Return the most likely class of each image (see ``lenet.predict``): int64[n], 0..9."""
    return logits(weights, images).argmax(axis=1)


def loss_and_gradients(
    weights: Weights, images: Images, labels: Labels
) -> tuple[float, dict[str, npt.NDArray[np.float32]]]:
    """Return the mean cross-entropy of a batch and its gradient.

    Args:
        weights: name -> float32 of ``lenet.SHAPES``.
        images: float32[n, 1, 32, 32], n >= 1.
        labels: int64[n], 0..9.

    Returns:
        The loss in nats, and name -> float32 of ``lenet.SHAPES``.
    """
    model = LeNet(weights)
    loss = functional.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(labels))
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return loss.item(), {name: gradient.numpy() for name, gradient in zip(names, gradients, strict=True)}


def train_epochs(
    weights: Weights,
    images: Images,
    labels: Labels,
    *,
    epochs: int = lenet.EPOCHS,
    batch_size: int = lenet.BATCH_SIZE,
    learning_rate: float = lenet.LEARNING_RATE,
    momentum: float = lenet.MOMENTUM,
    order: Sequence[int] = (0,),
) -> tuple[dict[str, npt.NDArray[np.float32]], float]:
    """Train by stochastic gradient descent with momentum, from a standstill.

    Args:
        weights: name -> float32 of ``lenet.SHAPES``; left untouched.
        images: float32[n, 1, 32, 32], n >= 1.
        labels: int64[n], 0..9.
        epochs: passes over the data, >= 1.
        batch_size: samples of one step, >= 1; the last step of an epoch takes what is left.
        learning_rate: step size, > 0.
        momentum: share of the last step that is repeated, 0..1.
        order: whole numbers >= 0 that seed the order of the samples, which is that of ``lenet.train_epochs``.

    Returns:
        The new weights, and the mean loss in nats over the last epoch, taken as it went.
    """
    model = LeNet(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    inputs, targets = torch.from_numpy(images), torch.from_numpy(labels)
    random = np.random.default_rng(order)
    mean_loss = 0.0
    for _ in range(epochs):
        mean_loss = 0.0
        for batch in torch.from_numpy(random.permutation(len(labels))).split(batch_size):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs[batch]), targets[batch])
            loss.backward()
            optimizer.step()
            mean_loss += loss.item() * len(batch) / len(labels)
    return {name: value.numpy() for name, value in model.state_dict().items()}, mean_loss


class TorchLeNetTrainer:
    """One client's LeNet in torch: ``fl-client --trainer fedexamples.lenet_torch:TorchLeNetTrainer``.

    Torch is limited to one thread, as the clients of a demo share a machine.

    Args:
        shard: which part of the data this client holds, 0..shards-1.
        shards: number of parts, >= 1.
        data: "digits" or "fashion-mnist".
        seed: >= 0, the same for all clients (see ``lenet.LeNetTrainer``).
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
        torch.set_num_threads(1)
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

    def fit(self, weights: Weights, config: FitConfig) -> FitResult:
        trained, loss = train_epochs(
            lenet.shaped(weights),
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

    def evaluate(self, weights: Weights) -> float:
        predicted = predict(lenet.shaped(weights), self._data.evaluation_images)
        return float(np.mean(predicted == self._data.evaluation_labels))
