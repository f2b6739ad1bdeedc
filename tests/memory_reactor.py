"""A reactor whose time and threads go on when the test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from twisted.internet import task
from twisted.python.failure import Failure


class MemoryReactor(task.Clock):
    """Twisted's Clock, and a thread pool that works off its jobs one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: deque[Callable[[], None]] = deque()

    def getThreadPool(self) -> MemoryReactor:
        return self

    def callInThreadWithCallback(
        self, on_result: Callable[[bool, Any], None], function: Callable[[], Any]
    ) -> None:
        """Queue a job."""

        def job() -> None:
            try:
                result = function()
            except Exception:
                on_result(False, Failure())
            else:
                on_result(True, result)

        self.jobs.append(job)

    def callFromThread(self, function: Callable[..., Any], *arguments: Any) -> None:
        function(*arguments)

    def work(self) -> None:
        """Do the oldest job of the thread pool."""
        self.jobs.popleft()()
