"""When a cloud worker synchronises: which local steps begin and end a run, and how long the next run is.

Steps are counted from 1 over the whole job. A run is the steps between two synchronisations: startFLJob before its
first one, updateModel and getModel after its last one. With fixed synchronisation every run has ``frequency`` steps;
with adaptive synchronisation runs grow shorter once the workers no longer pull the same way.

Source of the adaptive kind: Chen et al., Communication-Efficient Federated Learning with Adaptive Parameter Freezing
(ICDCS 2021), which measures as ``|ema(g)| / ema(|g|)`` how much of the movement is progress rather than wandering.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from fedclient.trainer import Weights
from fedcore.errors import ConfigError
from fedcore.wire.arrays import Floats

MAX_FREQUENCY = 65_535  # FedNova declares it as its data size, and no server takes more


@dataclass(frozen=True, slots=True)
class Schedule:
    """The run that is due.

    Attributes:
        frequency: its local steps, 1..65535.
        next_begin: number of its first step, from 1.
    """

    frequency: int
    next_begin: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.frequency <= MAX_FREQUENCY:
            raise ConfigError(f"sync_frequency is {self.frequency}", hint=f"steps, 1 to {MAX_FREQUENCY}")

    @property
    def next_end(self) -> int:
        """Number of its last step."""
        return self.next_begin + self.frequency - 1

    def synchronised(self, frequency: int) -> Schedule:
        """Return the run after this one."""
        return Schedule(frequency, self.next_end + 1)


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Parameters of adaptive synchronisation.

    Attributes:
        min_consistent_rate: where the least rate seen begins; above 1, so that the first rate is always less.
        min_consistent_rate_at_round: the synchronisation at which that counts as seen.
        ema_alpha: share of the old value in a moving average, 0..1.
        observation_window_size: synchronisations without a new least rate, before runs are cut.
        frequency_increase_ratio: by this, above 1, runs are shortened and the window is lengthened.
        unchanged_round: up to this synchronisation nothing changes.
    """

    min_consistent_rate: float = 1.1
    min_consistent_rate_at_round: int = 0
    ema_alpha: float = 0.5
    observation_window_size: float = 5
    frequency_increase_ratio: float = 2.0
    unchanged_round: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "min_consistent_rate": self.min_consistent_rate > 0,
            "min_consistent_rate_at_round": self.min_consistent_rate_at_round >= 0,
            "ema_alpha": 0 < self.ema_alpha < 1,
            "observation_window_size": self.observation_window_size > 0,
            "frequency_increase_ratio": 1 < self.frequency_increase_ratio < math.inf,
            "unchanged_round": self.unchanged_round >= 0,
        }
        for name, good in ranges.items():
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)}, which is out of range")


@dataclass(frozen=True, slots=True, eq=False)
class Consistency:
    """What adaptive synchronisation has seen so far.

    Attributes:
        frequency: steps of the next run.
        minimum: the least rate since runs were last cut.
        minimum_at: the synchronisation that had it.
        window: how many without a new minimum end in a cut.
        round: number of the last synchronisation, 0 at first.
        change: moving average of the global model's changes, name -> float32[n]; empty: zero.
        absolute: moving average of what the workers moved, all directions alike.
    """

    frequency: int
    minimum: float
    minimum_at: int
    window: float
    round: int = 0
    change: Weights = field(default_factory=dict)
    absolute: Weights = field(default_factory=dict)

    @classmethod
    def at_first(cls, frequency: int, policy: Adaptive) -> Consistency:
        """Return what there is before the first synchronisation."""
        return cls(
            frequency,
            policy.min_consistent_rate,
            policy.min_consistent_rate_at_round,
            policy.observation_window_size,
        )


def observe(seen: Consistency, policy: Adaptive, change: Weights, absolute: Weights) -> Consistency:
    """Take in one synchronisation and say how long the next run is.

    The protocol multiplies both arguments by the number of updates; it cancels out, so that a worker need not know it.

    Args:
        seen: so far.
        policy: parameters.
        change: name -> float32[n], new minus old global model.
        absolute: name -> float32[n], the workers' mean ``as_abs_grad.*``, >= 0.
    """
    now = replace(
        seen,
        round=seen.round + 1,
        change=_moved(seen.change, change, policy.ema_alpha),
        absolute=_moved(seen.absolute, absolute, policy.ema_alpha),
    )
    rate = consistent_rate(now.change, now.absolute)
    if rate < now.minimum:
        return replace(now, minimum=rate, minimum_at=now.round)
    waited = now.round - now.minimum_at > now.window
    if not (waited and now.frequency > 1 and now.round > policy.unchanged_round):
        return now
    return replace(
        now,
        frequency=math.ceil(now.frequency / policy.frequency_increase_ratio),
        minimum=policy.min_consistent_rate,
        window=now.window * policy.frequency_increase_ratio,
        change={},
        absolute={},
    )


def consistent_rate(change: Weights, absolute: Weights) -> float:
    """Return the mean of ``|change| / absolute`` over all elements; where ``absolute`` is 0, it counts as 1."""
    total, count = 0.0, 0
    for name, values in change.items():
        below = absolute[name]
        total += float(np.sum(np.abs(values) / np.where(below == 0, np.float32(1), below), dtype=np.float64))
        count += values.size
    return total / count if count else 0.0


def _moved(average: Weights, values: Weights, alpha: float) -> Mapping[str, Floats]:
    """Return a moving average one value later; an empty one counts as zero."""
    old, new = np.float32(alpha), np.float32(1 - alpha)
    return {
        name: old * average[name] + new * array if average else new * array for name, array in values.items()
    }
