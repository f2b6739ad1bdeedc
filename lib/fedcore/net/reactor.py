"""The reactor's clock: one that nobody can set."""

from __future__ import annotations

import time
from typing import Any


def follow_monotonic_clock(reactor: Any) -> None:
    """Make a reactor's timers follow the monotonic clock; to be called before the first timer is set.

    Twisted's own follow the wall clock: a step forward fires them all, a step back stalls them.
    """
    reactor.seconds = time.monotonic
