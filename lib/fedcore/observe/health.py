"""Is this daemon ready, and if not, why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Readiness:
    """Named checks, each giving the reason why it is not ready, or None."""

    checks: Mapping[str, Callable[[], str | None]]

    def reasons(self) -> dict[str, str]:
        """Return check -> reason for all that are not ready."""
        found = ((name, check()) for name, check in self.checks.items())
        return {name: reason for name, reason in found if reason is not None}

    def status(self, doing: str) -> str:
        """Return a line about the daemon: what it is about, and before that why it is not ready, if it is not."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.reasons().items())
        return f"not ready: {reasons}; {doing}" if reasons else f"{doing}; Redis ok"
