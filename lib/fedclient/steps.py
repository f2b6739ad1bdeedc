"""What happens to a device and what it does: the events and actions of ``session.Session``, as plain values.

    action                 is answered by
    Send                   Replied | IoFailed
    Evaluate               Evaluated | TrainerFailed
    Fit                    Fitted | TrainerFailed
    Sleep, IterationDone   Resumed
    Finished               nothing: the end

``Loaded`` is the first event; ``Stop`` may stand in for any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from fedclient.trainer import FitConfig, FitResult, Weights
from fedcore.wire.messages import Round


class Outcome(Enum):
    """How a session ended."""

    COMPLETED = "completed"  # the plan's last iteration was taken part in
    JOB_OVER = "job over"  # the server says that the job is disabled or finished
    STOPPED = "stopped"  # on request
    FAILED = "failed"


class IterationOutcome(Enum):
    """How one attempt at an iteration ended."""

    COMPLETED = "completed"  # uploaded, and the new model received
    RESTARTED = "restarted"  # refused; the device comes back later


# ---- events


@dataclass(frozen=True, slots=True)
class Loaded:
    """The data are there: numbers of training (1..65535) and evaluation samples (0 = no evaluation)."""

    data_size: int
    eval_data_size: int = 0


@dataclass(frozen=True, slots=True)
class Replied:
    """A whole HTTP reply arrived."""

    status: int
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class IoFailed:
    """No reply: the connection failed, broke or timed out."""

    error: str


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The accuracy of the weights of the last Evaluate."""

    accuracy: float


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """The result of the last Fit."""

    result: FitResult


@dataclass(frozen=True, slots=True)
class TrainerFailed:
    """The user's code raised."""

    error: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """The sleep is over, or the iteration was reported."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The user wants no more."""


Event = Loaded | Replied | IoFailed | Evaluated | Fitted | TrainerFailed | Resumed | Stop


# ---- actions


@dataclass(frozen=True, slots=True)
class Send:
    """POST this body to this round."""

    round: Round
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait; the reason is for the log."""

    seconds: float
    reason: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class Evaluate:
    """Evaluate the global weights: name -> float32[n], flat, read-only."""

    weights: Weights


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Train from the global weights: name -> float32[n], flat, read-only."""

    weights: Weights
    config: FitConfig


@dataclass(frozen=True, slots=True)
class IterationDone:
    """Report how an attempt at an iteration ended; ``iteration`` is 0 while no server named one."""

    iteration: int
    outcome: IterationOutcome
    reason: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Finished:
    """The session is over."""

    outcome: Outcome
    reason: str = field(default="", compare=False)


Action = Send | Sleep | Evaluate | Fit | IterationDone | Finished
