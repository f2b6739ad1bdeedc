"""What the user of a cloud worker implements: a SiloTrainer takes single steps, and never sees the protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedclient.rules import corrected, proximal_gradient
from fedclient.trainer import FitConfig, FitResult, Weights
from fedcore.errors import LocalError, NonFinite, ShapeMismatch
from fedcore.wire.arrays import Floats, all_finite


@dataclass(frozen=True, slots=True)
class LocalStep:
    """One local step.

    Attributes:
        number: from 1, over the whole job; a good seed for what to train on.
        batch_size: samples of the step, as the server's plan says, >= 1.
        learning_rate: step size of the server's plan, > 0.
        iteration: number of the global iteration, from 1.
        extra_gradient: name -> float32[n], flat, to be added to the gradient of the loss: FedProx's term; empty for
            the other rules.
    """

    number: int
    batch_size: int
    learning_rate: float
    iteration: int
    extra_gradient: Weights


class SiloTrainer(Protocol):
    """The user's side of a cloud worker; `fl-client --rule FedAvg --trainer module:Class` makes one and drives it."""

    def load(self) -> tuple[int, int]:
        """Load the data.

        Returns:
            Number of training samples (1..65535) and number of evaluation samples (0 = no evaluation).
        """
        ...

    def step(self, weights: Weights, step: LocalStep) -> FitResult:
        """Take one step of training.

        Args:
            weights: name -> float32[n], flat as on the wire, read-only; those of the step before, or the global ones.
            step: which one. Add ``step.extra_gradient`` to the gradient. Scaffold's correction is not yours to do.

        Returns:
            The new weights, all of them, and the loss.
        """
        ...

    def evaluate(self, weights: Weights) -> float:
        """Return the accuracy (0..1) of the global weights on the local evaluation data."""
        ...


@dataclass(frozen=True, slots=True)
class LocalRun(FitConfig):
    """All local steps between two synchronisations.

    Attributes:
        first_step: number of the first one.
        steps: how many, >= 1.
        iid_rate: FedProx's share of the distance to the global weights, 0 for the other rules.
        drift: Scaffold's global minus own control, name -> float32[n]; empty for the other rules.
    """

    first_step: int
    steps: int
    iid_rate: float
    drift: Weights


class Steps:
    """A Trainer that takes a SiloTrainer's steps, and adds to each what the rule asks for."""

    def __init__(self, trainer: SiloTrainer, stopping: Callable[[], bool] = lambda: False) -> None:
        """Drive ``trainer``; once ``stopping`` says so, no further step is begun."""
        self._trainer = trainer
        self._stopping = stopping

    def load(self) -> tuple[int, int]:
        return self._trainer.load()

    def evaluate(self, weights: Weights) -> float:
        return self._trainer.evaluate(weights)

    def fit(self, weights: Weights, config: FitConfig) -> FitResult:
        """Take the steps of a LocalRun from the global weights; the loss is the mean over them.

        Raises:
            ShapeMismatch: a step returned other weights than it was given.
            NonFinite: training diverged.
        """
        if not isinstance(config, LocalRun):
            raise LocalError("a cloud worker was given no run of steps")
        base, losses = weights, 0.0
        for number in range(config.first_step, config.first_step + config.steps):
            if self._stopping():
                break
            extra = proximal_gradient(config.iid_rate, weights, base) if config.iid_rate else {}
            step = LocalStep(number, config.batch_size, config.learning_rate, config.iteration, extra)
            result = self._trainer.step(weights, step)
            weights = corrected(_read_only(result.weights, base, number), config.drift, config.learning_rate)
            losses += float(result.loss)
        return FitResult(weights, losses / config.steps)


def _read_only(result: Weights, base: Weights, number: int) -> dict[str, Floats]:
    """Return a step's weights flat, float32 and read-only, once they are found to be those of the model."""
    if result.keys() != base.keys():
        odd = ", ".join(sorted(result.keys() ^ base.keys()))
        raise ShapeMismatch(f"step {number} did not return the weights that it was given: {odd}")
    weights = {}
    for name, values in result.items():
        flat = np.asarray(values).astype(np.float32, casting="same_kind", copy=False).reshape(-1)
        if flat.size != base[name].size:
            raise ShapeMismatch(
                f"step {number} returned {flat.size} elements of {name!r}, not {base[name].size}"
            )
        if not all_finite(flat):
            raise NonFinite(
                f"training diverged: {name!r} is not finite after step {number}",
                hint="lower the learning rate",
            )
        flat = flat.view()
        flat.flags.writeable = False
        weights[name] = flat
    return weights
