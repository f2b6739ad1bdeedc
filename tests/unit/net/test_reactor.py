"""Those who wait go on, and do not keep the reactor for themselves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from twisted.internet import defer
from twisted.internet.task import Clock

from fedcore.net.reactor import SLICE_S, wake_in_turns


class Waiters:
    """Each takes some time once it goes on."""

    def __init__(self, clock: Clock, count: int, seconds: float) -> None:
        self.woken: list[int] = []
        self.all: list[defer.Deferred[None]] = []
        for number in range(count):
            waiter: defer.Deferred[None] = defer.Deferred()
            waiter.addCallback(self._go_on, number, clock, seconds)
            self.all.append(waiter)

    def _go_on(self, _: None, number: int, clock: Clock, seconds: float) -> None:
        self.woken.append(number)
        clock.rightNow += seconds  # without what is due meanwhile: the reactor has no turn


def test_all_go_on_at_once_if_that_is_quick() -> None:
    clock = Clock()
    waiters = Waiters(clock, 50, SLICE_S / 100)
    wake_in_turns(clock, waiters.all)
    assert waiters.woken == list(range(50))
    assert not clock.getDelayedCalls()


def test_the_reactor_has_a_turn_in_between() -> None:
    clock = Clock()
    waiters = Waiters(clock, 7, SLICE_S / 2)
    turns = []

    def put_off(delay: float, function: Callable[..., None], *arguments: Any) -> None:
        turns.append((delay, len(waiters.woken)))
        clock.callLater(delay, function, *arguments)

    wake_in_turns(SimpleNamespace(seconds=clock.seconds, callLater=put_off), waiters.all)
    assert waiters.woken == [0, 1]
    clock.advance(0)
    assert turns == [(0, 2), (0, 4), (0, 6)]
    assert waiters.woken == list(range(7))


def test_who_takes_longer_than_that_has_a_turn_of_its_own() -> None:
    clock = Clock()
    waiters = Waiters(clock, 2, 3 * SLICE_S)
    wake_in_turns(clock, waiters.all)
    assert waiters.woken == [0]
    clock.advance(0)
    assert waiters.woken == [0, 1]
    assert not clock.getDelayedCalls()


def test_who_has_given_up_meanwhile_is_passed_over() -> None:
    clock = Clock()
    waiters = Waiters(clock, 3, SLICE_S)
    wake_in_turns(clock, waiters.all)
    waiters.all[1].addErrback(lambda failure: failure.trap(defer.CancelledError))
    waiters.all[1].cancel()
    while clock.getDelayedCalls():
        clock.advance(0)
    assert waiters.woken == [0, 2]


def test_nobody_waits() -> None:
    clock = Clock()
    wake_in_turns(clock, [])
    assert not clock.getDelayedCalls()
