"""Coroutines in simulated time: an agenda of moments, and promises. Nothing here knows what is simulated."""

from __future__ import annotations

import heapq
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Protocol


class Lost(Exception):
    """The connection to the shared state broke, or there is none."""


class PeerGone(Exception):
    """A peer cannot be reached in time, or refuses."""


class Refused(PeerGone):
    """The peer's host answers, and nobody listens there."""


class Answered(PeerGone):
    """The peer answers, and refuses."""


class Replaced(PeerGone):
    """Another process listens at the peer's address."""


class Promise:
    """A value that is still to come."""

    __slots__ = ("done", "error", "value", "waiters")

    def __init__(self, owner: object = None) -> None:
        self.done = False
        self.value: Any = None
        self.error: Exception | None = None
        self.waiters: list[Task] = []

    def succeed(self, value: Any) -> None:
        self._settle(value, None)

    def fail(self, error: Exception) -> None:
        self._settle(None, error)

    def _settle(self, value: Any, error: Exception | None) -> None:
        if not self.done:
            self.done, self.value, self.error = True, value, error
            waiters, self.waiters = self.waiters, []
            for task in waiters:
                task.go_on(value, error)


@types.coroutine
def pause(seconds: float) -> Generator[float, None, None]:
    """Let simulated seconds pass."""
    yield seconds


@types.coroutine
def wait(promise: Promise) -> Generator[Promise, Any, Any]:
    """Wait for a promise."""
    return (yield promise)


class Process(Protocol):
    """Who runs tasks: once dead they never go on; while paused they wait."""

    alive: bool
    paused: bool
    parked: list[tuple[Callable[..., object], tuple[Any, ...]]]


class Task:
    """A coroutine that a process runs."""

    __slots__ = ("agenda", "coroutine", "done", "process")

    def __init__(self, agenda: Agenda, process: Process | None, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.agenda, self.process, self.coroutine, self.done = agenda, process, coroutine, Promise()
        agenda.tasks.setdefault(process, set()).add(self)

    def go_on(self, value: Any = None, error: Exception | None = None) -> None:
        """Run up to the next pause or open promise."""
        if self.process is not None and not self.process.alive:
            return
        while True:
            try:
                awaited = self.coroutine.throw(error) if error is not None else self.coroutine.send(value)
            except StopIteration as end:
                self._end().succeed(end.value)
                return
            except self.agenda.expected as problem:
                self._end().fail(problem)
                return
            if awaited.__class__ is not Promise:
                self.agenda.later(self.process, awaited, self.go_on)
                return
            if not awaited.done:
                awaited.waiters.append(self)
                return
            value, error = awaited.value, awaited.error

    def _end(self) -> Promise:
        self.agenda.tasks[self.process].discard(self)
        return self.done


class Agenda:
    """What happens when.

    Attributes:
        now: simulated seconds.
        steps: how many entries were performed.
        expected: exceptions that may end a task; others end the simulation.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self.tasks: dict[Process | None, set[Task]] = {}  # under way
        self.expected: tuple[type[Exception], ...] = (Lost, PeerGone)
        self._entries: list[tuple[float, int, Process | None, Callable[..., object], tuple[Any, ...]]] = []
        self._number = 0

    def later(
        self, process: Process | None, seconds: float, action: Callable[..., object], *words: Any
    ) -> None:
        """Have a process, or the world (None), do something in so many seconds."""
        self._number += 1
        heapq.heappush(self._entries, (self.now + seconds, self._number, process, action, words))

    def spawn(self, process: Process | None, coroutine: Coroutine[Any, Any, Any]) -> Promise:
        """Run a coroutine up to its first pause; return the promise of its result."""
        task = Task(self, process, coroutine)
        task.go_on()
        return task.done

    def run(self, until: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Perform entries up to a moment, or until it is ``enough``; tell whether it was."""
        entries = self._entries
        while entries and entries[0][0] <= until:
            if enough():
                return True
            self.now, _, process, action, words = heapq.heappop(entries)
            self.steps += 1
            if process is None:
                action(*words)
            elif process.alive:
                if process.paused:
                    process.parked.append((action, words))
                else:
                    action(*words)
        self.now = max(self.now, until)
        return enough()

    def abandon(self, process: Process | None) -> None:
        """End what a dead process had under way; for tidiness only, as it would never go on."""
        for task in self.tasks.pop(process, set()):
            task.coroutine.close()

    def resume(self, process: Process) -> None:
        """Let a paused process go on with what has come meanwhile."""
        process.paused = False
        parked, process.parked = process.parked, []
        for action, words in parked:
            self.later(process, 0.0, action, *words)
