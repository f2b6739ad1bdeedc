"""What each rule of aggregation asks of a cloud worker: arrays in, arrays out.

Lives here: the values that are uploaded, the terms that a rule adds to each local step, and Scaffold's control.
Does not live here: when any of it happens (``fedclient.schedule``) and how it travels.

``w`` are the local weights, ``base`` the global ones that the run of local steps began with, tau the number of steps,
n the data size; all arrays are flat float32, named alike. The server divides the sums by the total of n.

=========  ====================================  ===================================  ==================
rule       uploaded for each weight              in each local step                   data size declared
=========  ====================================  ===================================  ==================
FedAvg     w * n                                 nothing                              n
FedProx    w * n                                 gradient += iid_rate * (w - base)    n
Scaffold   w * n, and control.* = new - old      w -= lr * (control - own control)    n
FedNova    (w - base) / tau                      nothing                              tau
=========  ====================================  ===================================  ==================

Sources: McMahan et al., arXiv:1602.05629; Li et al., arXiv:1812.06127 (FedProx, equation 2); Karimireddy et al.,
arXiv:1910.06378 (Scaffold, algorithm 1, option II); Wang et al., arXiv:2007.07481 (FedNova, section 4).
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np

from fedclient.trainer import Weights
from fedcore.aggregation.scaffold import PREFIX as CONTROL
from fedcore.errors import ConfigError
from fedcore.wire.arrays import Floats

ABS_CHANGE = "as_abs_grad."  # before the name of a weight: how far it moved, for adaptive synchronisation


class Rule(StrEnum):
    """How uploads become the next model; the same word as the server's aggregation_type."""

    FEDAVG = "FedAvg"
    FEDPROX = "FedProx"
    SCAFFOLD = "Scaffold"
    FEDNOVA = "FedNova"

    @classmethod
    def named(cls, name: str) -> Rule:
        """Return the rule of a name, in any case.

        Raises:
            ConfigError: there is none.
        """
        for rule in cls:
            if rule.lower() == name.lower():
                return rule
        raise ConfigError(f"aggregation_type must be in {tuple(map(str, cls))}, but got {name}.")


def declared_size(rule: Rule, samples: int, steps: int) -> int:
    """Return the data size that startFLJob declares: what the server takes for the update's weight."""
    return steps if rule is Rule.FEDNOVA else samples


def uploaded(rule: Rule, weights: Weights, base: Weights, samples: int, steps: int) -> dict[str, Floats]:
    """Return the values that stand for local weights in an updateModel.

    Args:
        rule: of the job.
        weights: name -> float32[n], after the last local step.
        base: name -> float32[n], the global weights that the steps began with.
        samples: local data size, >= 1.
        steps: number of local steps, >= 1.
    """
    if rule is Rule.FEDNOVA:
        factor = np.float32(steps)
        return {name: (values - base[name]) / factor for name, values in weights.items()}
    return weighted(weights, samples)


def weighted(values: Weights, samples: int) -> dict[str, Floats]:
    """Return values times the data size, for whatever the server is to average."""
    with np.errstate(over="ignore"):  # what is no longer finite is refused where it is checked
        return {name: array * np.float32(samples) for name, array in values.items()}


def absolute_changes(weights: Weights, base: Weights) -> dict[str, Floats]:
    """Return ``as_abs_grad.*``: how far each element moved since the last synchronisation."""
    return {ABS_CHANGE + name: np.abs(values - base[name]) for name, values in weights.items()}


def proximal_gradient(iid_rate: float, weights: Weights, base: Weights) -> dict[str, Floats]:
    """Return the gradient of ``iid_rate / 2 * |w - base|^2``, FedProx's term of the local loss."""
    rate = np.float32(iid_rate)
    return {name: rate * (values - base[name]) for name, values in weights.items()}


def corrected(weights: Weights, drift: Weights, learning_rate: float) -> Weights:
    """Return weights after Scaffold's part of a step; unchanged without a drift.

    Args:
        weights: name -> float32[n], after the optimiser's part.
        drift: name -> float32[n], see ``drift``; empty for the other rules.
        learning_rate: of the step, > 0.
    """
    if not drift:
        return weights
    rate = np.float32(learning_rate)
    return {name: values - rate * drift[name] for name, values in weights.items()}


def drift(control: Weights, own: Weights) -> dict[str, Floats]:
    """Return global minus own control, which a step of Scaffold adds to its gradient."""
    return {name: control[name] - values for name, values in own.items()}


def new_control(
    own: Weights, control: Weights, base: Weights, weights: Weights, steps: int, learning_rate: float
) -> dict[str, Floats]:
    """Return Scaffold's own control after a run: ``own - control + (base - w) / (steps * learning_rate)``.

    Args:
        own: name -> float32[n], own control before the run, of every weight.
        control: the global one that the run used.
        base: the weights that it began with.
        weights: those that it ended with.
        steps: its steps, >= 1.
        learning_rate: of each step, > 0.
    """
    length = np.float32(steps * learning_rate)
    return {name: old - control[name] + (base[name] - weights[name]) / length for name, old in own.items()}


def control_changes(new: Weights, old: Weights) -> dict[str, Floats]:
    """Return ``control.*`` = new minus old own control; it is not multiplied by anything."""
    return {CONTROL + name: values - old[name] for name, values in new.items()}


def named_controls(received: Weights) -> dict[str, Floats]:
    """Pick the global control out of an answer to startFLJob: weight's name -> values."""
    return {
        name.removeprefix(CONTROL): values for name, values in received.items() if name.startswith(CONTROL)
    }


def with_absolute_changes(weights: Weights) -> dict[str, Floats]:
    """Return an initial model for a job with adaptive synchronisation: its weights, and an ``as_abs_grad.*`` of each.

    A server knows the names of its initial model and refuses all others, so this is how it is told.
    """
    more = {ABS_CHANGE + name: np.zeros_like(values, np.float32) for name, values in weights.items()}
    return {**weights, **more}
