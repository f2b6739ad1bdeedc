"""The reactor of every daemon: epoll, with a clock that nobody can set."""

from __future__ import annotations

import time

from twisted.internet import epollreactor, main


class MonotonicReactor(epollreactor.EPollReactor):
    """Timers follow the monotonic clock: a step of the wall clock neither fires nor stalls them."""

    seconds = staticmethod(time.monotonic)


def install() -> None:
    """Make it the process's reactor; to be called before anything imports ``twisted.internet.reactor``."""
    main.installReactor(MonotonicReactor())
