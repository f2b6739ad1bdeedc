"""What a user implements: a Trainer knows the model and the data, never the protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Weights = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class FitConfig:
    """The server's training plan for one iteration.

    Attributes:
        epochs: passes over the local data, >= 1.
        batch_size: samples of one step, >= 1.
        learning_rate: step size, > 0.
        iteration: number of the global iteration, from 1; a good seed for shuffling.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    iteration: int


@dataclass(frozen=True, slots=True)
class FitResult:
    """What one local training gave.

    Attributes:
        weights: name -> float32 array, plain weights (the client multiplies by the data size itself).
        loss: last training loss, finite.
        evaluation: float32[k], mean of the model's outputs (such as soft-max) over the local data, for the server's
            evaluation without labels; None sends none. It is sent only if the server asks for it.
    """

    weights: Weights
    loss: float
    evaluation: npt.NDArray[np.float32] | None = None


class Trainer(Protocol):
    """The user's side of a federated training; `fl-client --trainer module:Class` makes one and drives it."""

    def load(self) -> tuple[int, int]:
        """Load the data.

        Returns:
            Number of training samples (1..65535) and number of evaluation samples (0 = no evaluation).
        """
        ...

    def fit(self, weights: Weights, config: FitConfig) -> FitResult:
        """Train from the global weights.

        Args:
            weights: name -> float32[n], flat as on the wire, read-only; reshape to your model's shapes.
            config: the server's plan.
        """
        ...

    def evaluate(self, weights: Weights) -> float:
        """Return the accuracy (0..1) of the global weights on the local evaluation data."""
        ...
