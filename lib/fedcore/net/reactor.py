"""The reactor: its clock, which nobody can set, and turns that are short whoever waits for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from twisted.internet import defer

SLICE_S = 0.005  # of a turn for those who have waited; a single one takes a millisecond or so


def follow_monotonic_clock(reactor: Any) -> None:
    """Make a reactor's timers follow the monotonic clock; to be called before the first timer is set.

    Twisted's own follow the wall clock: a step forward fires them all, a step back stalls them.
    """
    reactor.seconds = time.monotonic


def wake_in_turns(reactor: Any, waiting: Iterable[defer.Deferred[None]]) -> None:
    """Let all go on who wait, in their order, but for 5 ms at a time: others are served in between.

    Many may wait for one thing, and each has work to do once it is there: an answer of a model's size, say. Nobody is
    left behind while the reactor runs; who gives up waiting meanwhile is passed over.
    """
    left = deque(waiting)
    limit = reactor.seconds() + SLICE_S
    while left:
        waiter = left.popleft()
        if not waiter.called:
            waiter.callback(None)
        if left and reactor.seconds() >= limit:
            reactor.callLater(0, wake_in_turns, reactor, left)
            return
