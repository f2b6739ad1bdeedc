"""The one thread in which a worker's trainer runs.

A thread of Twisted's pool would hold up the end of the process until a training of minutes is over. This one does not:
what it still does when the process ends is lost, and nothing is missed, for all that counts is with the servers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet import defer
from twisted.python.failure import Failure

T = TypeVar("T")
_Job = tuple[Callable[[], Any], "defer.Deferred[Any]"]


class WorkerThread:
    """Runs functions one after the other, in the order in which they are given."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="trainer", daemon=True)

    @property
    def busy(self) -> bool:
        """Whether a function is still running."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Take nothing more; the function that is running goes on."""
        self._jobs.put(None)

    def run(self, function: Callable[[], T]) -> defer.Deferred[T]:
        """Run a function; the Deferred fires in the reactor's thread. Cancelling it does not end the function."""
        done: defer.Deferred[T] = defer.Deferred()
        self._jobs.put((function, done))
        return done

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, done = job
            try:
                result: Any = function()
            except BaseException:
                result = Failure()
            self._reactor.callFromThread(_fire, done, result)
            del job, function, done, result  # the next job may be long in coming


def _fire(done: defer.Deferred[Any], result: Any) -> None:
    if not done.called:  # else it was cancelled
        done.callback(result)
