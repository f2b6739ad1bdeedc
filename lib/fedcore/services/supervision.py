"""What systemd is told of a daemon while it runs: its status, and whether it lives.

The watchdog is for faults that a new process mends: a reactor that does not turn, a thread that does not come back
with the work it was given. It knows nothing of Redis, of other servers or of devices: those are waited for.

How long work in a thread may take depends on how much of it there can be, so it is measured by the bytes that it may
touch: on the slowest disk that we mean to run on, and with SPARE_S for what no size explains. What is measured is the
time in which this process runs: while it is paused, nothing grows older.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.application.service import Service
from twisted.internet import task
from twisted.logger import Logger

from fedcore.net.sd_notify import Notifier

LOOK_S = 1.0  # between two looks at the status, and at least between two messages about it
SLOWEST = 10e6  # bytes/s: a busy disk with fsync, or memory that is swapped out
SPARE_S = 60.0  # on top: the first use of an accelerator, a host whose cores are taken


def longest_work(size: int) -> float:
    """Return the seconds that work on so many bytes may take."""
    return SPARE_S + size / SLOWEST


class WatchedThreads:
    """A reactor whose work in threads is watched; to be given to the parts whose work it is, in the reactor's place.

    Attributes:
        longest: seconds after which work counts as stuck.
    """

    log = Logger()

    def __init__(self, reactor: Any, longest: float) -> None:
        self.longest = longest
        self._reactor = reactor
        self._ages: dict[object, float] = {}  # seconds of each piece of work that has not come back
        self._probe: object | None = None  # the piece that does nothing
        self._stuck = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def getThreadPool(self) -> WatchedThreads:
        """Return what ``deferToThreadPool`` is to use."""
        return self

    def callInThreadWithCallback(
        self, on_result: Callable[[bool, Any], object], function: Callable[[], Any]
    ) -> None:
        """Do work in a thread of the reactor's pool; see twisted.python.threadpool.ThreadPool.

        Raises:
            RuntimeError: no thread can be started. The work counts as stuck some day: whoever gave it waits for it.
        """
        self._give(object(), on_result, function)

    def alive(self, seconds: float) -> bool:
        """Tell whether all work comes back, after so many seconds in which this process ran since the last question.

        A piece of work that does nothing is always under way, so that this is known before there is any other.
        """
        for work in self._ages:
            self._ages[work] += seconds
        oldest = max(self._ages.values(), default=0.0)
        if oldest > self.longest and not self._stuck:
            self.log.critical(
                "work in a thread has not come back for {seconds} s; systemd's watchdog is left to end this process",
                seconds=round(oldest),
            )
        self._stuck = oldest > self.longest
        if self._probe is None:
            self._send_probe()
        return not self._stuck

    def _give(
        self, work: object, on_result: Callable[[bool, Any], object], function: Callable[[], Any]
    ) -> None:
        def done(good: bool, result: Any) -> None:
            self._reactor.callFromThread(self._came_back, work)
            on_result(good, result)

        self._ages[work] = 0.0
        self._reactor.getThreadPool().callInThreadWithCallback(done, function)

    def _came_back(self, work: object) -> None:
        del self._ages[work]
        if work is self._probe:
            self._probe = None

    def _send_probe(self) -> None:
        self._probe = object()
        try:
            self._give(self._probe, lambda good, result: None, lambda: None)
        except RuntimeError as error:  # a limit of the unit or the host, which may be gone the next time
            self.log.error("no thread can be started: {error}; raise TasksMax of the unit", error=str(error))
            self._came_back(self._probe)


class Supervision(Service):
    """Tells systemd the daemon's status and that it lives, as long as the reactor turns.

    The status is told when it has changed, and not twice within LOOK_S. A change without an event is seen by looking
    every LOOK_S.
    """

    def __init__(
        self,
        notifier: Notifier,
        status: Callable[[], str],
        alive: Callable[[float], bool],
        reactor: Any,
    ) -> None:
        """Report to a notifier.

        Args:
            notifier: the way to systemd.
            status: gives what the daemon is about, in a line.
            alive: tells, given the seconds in which the process ran since the last question, whether all is well that
                a new process would mend.
            reactor: for time.
        """
        self._notifier = notifier
        self._status = status
        self._alive = alive
        self._reactor = reactor
        self._told = float("-inf")
        self._asked = 0.0
        self._looking = task.LoopingCall(self._look)
        self._beating = task.LoopingCall(self._beat)
        self._looking.clock = self._beating.clock = reactor

    def startService(self) -> None:
        super().startService()
        self._looking.start(LOOK_S)
        self._asked = self._reactor.seconds()
        if self._period:
            self._beating.start(self._period)

    def stopService(self) -> None:
        super().stopService()
        for loop in (self._looking, self._beating):
            if loop.running:
                loop.stop()

    def changed(self) -> None:
        """Take notice of an event that may have changed the status."""
        if self.running:
            self._look()

    @property
    def _period(self) -> float:
        return (self._notifier.watchdog or 0.0) / 2

    def _look(self) -> None:
        now = self._reactor.seconds()
        if now - self._told >= LOOK_S and self._notifier.status(self._status()):
            self._told = now

    def _beat(self) -> None:
        now = self._reactor.seconds()
        ran, self._asked = min(now - self._asked, self._period), now
        if self._alive(ran):
            self._notifier.beat()
