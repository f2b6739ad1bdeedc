"""A WorkerTrainer for torch modules: give it a module, an optimizer, batches and a way to judge the result.

Torch is imported in this file only; nobody imports it who does not train with torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedcore.errors import NonFinite

Batch = tuple[torch.Tensor, torch.Tensor]


class TorchTrainer:
    """Trains a torch module step by step.

    A subclass has the constructor ``(options, device)`` of WorkerTrainer and hands its parts on. The weights are the
    module's parameters that require a gradient, under torch's names. The optimizer keeps its state (momentum) from one
    training to the next, unless training has diverged.

    Args:
        module: moved to the device here.
        optimizer: makes the optimizer of the moved module's parameters.
        batches: inputs and targets of one step after the other, without an end; on any device.
        loss: of outputs and targets, a scalar to be minimised.
        accuracy: judges the module after a training, 0..1; called with gradients off and the module in evaluation mode.
        device: "cpu", "cuda" or "cuda:N".
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
        batches: Iterator[Batch],
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        accuracy: Callable[[nn.Module], float],
        device: str,
    ) -> None:
        self.device = torch.device(device)
        self.module = module.to(self.device)
        self._optimizer = optimizer(self.module.parameters())
        self._batches = batches
        self._loss = loss
        self._accuracy = accuracy

    def weights(self) -> dict[str, npt.NDArray[np.float32]]:
        return {
            name: parameter.detach().to("cpu", torch.float32).numpy()
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad
        }

    def load(self, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
        parameters = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, values in weights.items():
                parameters[name].copy_(torch.tensor(values))

    def train(self, steps: int) -> tuple[float, float]:
        self.module.train()
        total: Any = torch.zeros((), device=self.device)
        for _ in range(steps):
            inputs, targets = next(self._batches)
            self._optimizer.zero_grad()
            loss = self._loss(self.module(inputs.to(self.device)), targets.to(self.device))
            loss.backward()
            self._optimizer.step()
            total += loss.detach()  # read once at the end: reading waits for the device
        mean = float(total) / steps
        if not math.isfinite(mean):
            self._optimizer.state.clear()
            raise NonFinite(f"training diverged: the loss is {mean}", hint="lower the learning rate")
        self.module.eval()
        with torch.inference_mode():
            return mean, self._accuracy(self.module)
