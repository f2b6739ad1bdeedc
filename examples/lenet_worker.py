"""The LeNet of ``fedexamples.lenet_torch``, trained by a worker on central, labelled data.

    fl-workerd --yaml-config fl.yaml --trainer fedexamples.lenet_worker:LeNetWorker --set central=200

Options and data are those of ``fedexamples.lenet_worker_numpy``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedcore.services.torch_trainer import TorchTrainer
from fedexamples import lenet
from fedexamples.lenet_torch import LeNet
from fedexamples.lenet_worker_numpy import WorkerOptions, shuffled


class LeNetWorker(TorchTrainer):
    """LeNet-5 on central data, by stochastic gradient descent with momentum.

    Accuracy is that on about one in eight of the worker's own samples, which it does not train on.

    Args:
        options: see ``WorkerOptions``.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: an option is unknown, malformed or out of range.
    """

    def __init__(self, options: Mapping[str, Any], device: str) -> None:
        told = WorkerOptions.parse(options, type(self).__name__)
        torch.set_num_threads(told.threads)
        part, data = told.part, told.load()
        images, labels = torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels)
        order = shuffled(len(labels), told.batch_size, (part.seed, part.shard))
        self._images = torch.from_numpy(data.evaluation_images)
        self._labels = torch.from_numpy(data.evaluation_labels)
        super().__init__(
            LeNet(lenet.initial_weights(part.seed)),
            optimizer=lambda parameters: torch.optim.SGD(
                parameters, lr=told.learning_rate, momentum=told.momentum
            ),
            batches=((images[batch], labels[batch]) for batch in map(torch.from_numpy, order)),
            loss=functional.cross_entropy,
            accuracy=self._judge,
            device=device,
        )

    def _judge(self, module: nn.Module) -> float:
        predicted = module(self._images.to(self.device)).argmax(dim=1).cpu()
        return float((predicted == self._labels).float().mean())
