"""The life of a training job, shared by all its iterations."""

from __future__ import annotations

from enum import IntEnum


class RunningState(IntEnum):
    """State of an instance as every node reads it in Redis (``runningState``)."""

    RUNNING = 0
    DISABLE = 1
    FINISH = 2
    STOP = 3
