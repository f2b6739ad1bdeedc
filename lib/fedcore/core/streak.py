"""Iterations in a row that made no model, and when their number deserves an alarm.

Each server counts those that it has seen end; the count is not shared and begins anew with its process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Streak:
    """A run of failed iterations.

    Attributes:
        limit: run that is worth an alarm, >= 1 (``summary.continuous_failure_times``).
        length: failed iterations since the last valid one or the last alarm.
    """

    limit: int
    length: int = 0


def follow(streak: Streak, valid: bool) -> tuple[Streak, int | None]:
    """Take note of an iteration that has ended.

    Args:
        streak: the iterations before it.
        valid: whether it made a model.

    Returns:
        The streak from now on, and the length to report if it calls for an alarm; an alarm begins a new streak.
    """
    if valid:
        return replace(streak, length=0), None
    length = streak.length + 1
    if length < streak.limit:
        return replace(streak, length=length), None
    return replace(streak, length=0), length
