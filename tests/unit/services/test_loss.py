"""When counted updates are given up: who is asked, for how long, and what keeps them from being given up."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
from twisted.internet import defer, task

from fedcore.errors import PeerError
from fedcore.services.ledgers import Whereabouts
from fedcore.services.loss import LOSS_S, STALE_S, LossJudge
from fedcore.store.cluster_state import Node
from fedcore.store.keys import REVOKED


def node(host: int, number: int) -> str:
    return f"10.0.0.{host}:{6000 + number}::2026-01-01-00:00:00.000.000::{10000 + number}"


ME, NEIGHBOUR = node(1, 1), node(1, 2)
DEAD, NEAR_DEAD, ELSEWHERE = node(2, 3), node(2, 4), node(3, 5)
DEAD_HERE = node(1, 6)


@dataclass
class Sum:
    iteration: int
    totals: Any


@dataclass
class Counted:
    count: int


@dataclass
class World:
    """What the judge can see; it stands for shared state, ledgers and peers."""

    owners: dict[str, str] = field(default_factory=dict)
    living: set[str] = field(default_factory=lambda: {ME})
    uploads: dict[str, int] = field(default_factory=dict)
    adopted: dict[str, Sum] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    here: Whereabouts = Whereabouts.ABSENT
    answers: dict[str, Whereabouts] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    async def ledgers(self) -> dict[str, str]:
        return self.owners

    async def nodes(self, role: str) -> list[Node]:
        assert role == "server"
        return [Node(node_id, role, "") for node_id in sorted(self.living)]

    async def uploads_by_ledger(self, number: int) -> dict[str, int]:
        return self.uploads if number == 5 else {}

    @property
    def in_hand(self) -> set[str]:
        return self.own | set(self.adopted)

    # of Ledgers and Peers both
    def locate(self, *where: str) -> Any:
        if len(where) == 1:
            return self.here
        return self._ask(where[0])

    async def _ask(self, peer: str) -> Whereabouts:
        self.asked.append(peer)
        if peer not in self.answers:
            raise PeerError("gone")
        return self.answers[peer]


class Judged:
    """A judge whose world is looked at once a second."""

    def __init__(self, world: World) -> None:
        self.world: Any = world
        self.clock = task.Clock()
        self.judge = LossJudge(ME, self.world, self.world, self.clock)

    def now(self, *, had: Collection[str] = (), impatient: bool = False) -> tuple[str, ...]:
        outcome: list[Any] = []
        work = self.judge.lost(self.world, 5, had, out_of_patience=impatient)
        defer.Deferred.fromCoroutine(work).addBoth(outcome.append)
        assert isinstance(outcome[0], tuple), outcome[0]
        return outcome[0]

    def after(self, seconds: float, **how: Any) -> tuple[str, ...]:
        """Judge once a second from now on; return the last judgement."""
        found = self.now(**how)
        for _ in range(int(seconds)):
            self.clock.advance(1.0)
            found = self.now(**how)
        return found


def dead_ledger(**more: Any) -> World:
    """Ledger ``l`` of a host that is gone holds two updates."""
    return World(owners={"l": DEAD}, uploads={"l": 2}, **more)


def test_a_ledger_is_lost_once_it_was_out_of_reach_for_long_enough() -> None:
    judged = Judged(dead_ledger())
    assert judged.after(LOSS_S - 1) == ()
    assert judged.after(1) == ("l",)


def test_several_are_told_in_order() -> None:
    world = World(owners={"b": DEAD, "a": DEAD}, uploads={"a": 1, "b": 1})
    assert Judged(world).after(LOSS_S) == ("a", "b")


def test_nobody_is_asked_while_all_owners_live() -> None:
    world = dead_ledger(living={ME, DEAD})
    assert Judged(world).after(2 * LOSS_S) == ()
    assert world.asked == []


def test_a_ledger_without_counted_updates_is_no_loss() -> None:
    world = World(owners={"l": DEAD})
    assert Judged(world).after(2 * LOSS_S) == ()
    assert world.asked == []


@pytest.mark.parametrize("owner", [REVOKED, ME])
def test_a_ledger_that_was_given_up_or_is_ours_is_no_suspect(owner: str) -> None:
    assert Judged(World(owners={"l": owner}, uploads={"l": 2})).after(2 * LOSS_S) == ()


def test_a_ledger_that_nobody_owns_is_no_suspect() -> None:
    assert Judged(World(uploads={"l": 2})).after(2 * LOSS_S) == ()


def test_a_ledger_in_hand_is_no_loss() -> None:
    assert Judged(dead_ledger(own={"l"})).after(2 * LOSS_S) == ()


def test_a_ledger_that_is_in_the_sum_already_is_no_loss() -> None:
    assert Judged(dead_ledger()).after(2 * LOSS_S, had={"l"}) == ()


@pytest.mark.parametrize("known", [Whereabouts.HERE, Whereabouts.HELD])
def test_an_owner_that_answers_is_not_dead_though_its_lease_is(known: Whereabouts) -> None:
    assert Judged(dead_ledger(answers={DEAD: known})).after(2 * LOSS_S) == ()


@pytest.mark.parametrize("known", [Whereabouts.HERE, Whereabouts.HELD])
def test_a_neighbour_of_the_owner_that_sees_its_file_keeps_it(known: Whereabouts) -> None:
    world = dead_ledger(living={ME, NEAR_DEAD}, answers={NEAR_DEAD: known})
    assert Judged(world).after(2 * LOSS_S) == ()


def test_a_neighbour_that_does_not_see_it_says_so() -> None:
    world = dead_ledger(living={ME, NEAR_DEAD}, answers={NEAR_DEAD: Whereabouts.ABSENT})
    assert Judged(world).after(LOSS_S) == ("l",)
    assert set(world.asked) == {DEAD, NEAR_DEAD}


def test_hosts_that_cannot_have_the_file_are_not_asked() -> None:
    world = dead_ledger(living={ME, NEIGHBOUR, ELSEWHERE}, answers={ELSEWHERE: Whereabouts.HERE})
    assert Judged(world).after(LOSS_S) == ("l",)
    assert set(world.asked) == {DEAD}


@pytest.mark.parametrize(
    ("here", "lost"), [(Whereabouts.ABSENT, ("l",)), (Whereabouts.HELD, ()), (Whereabouts.HERE, ())]
)
def test_a_file_on_this_host_is_looked_for(here: Whereabouts, lost: tuple[str, ...]) -> None:
    world = World(owners={"l": DEAD_HERE}, uploads={"l": 2}, here=here)
    assert Judged(world).after(LOSS_S) == lost


def test_a_file_on_this_host_says_nothing_of_another_hosts_ledger() -> None:
    assert Judged(dead_ledger(here=Whereabouts.HELD)).after(LOSS_S) == ("l",)


def test_one_answer_in_between_begins_the_time_anew() -> None:
    world = dead_ledger()
    judged = Judged(world)
    judged.after(LOSS_S - 1)
    world.answers[DEAD] = Whereabouts.HELD
    judged.now()
    del world.answers[DEAD]
    assert judged.after(LOSS_S - 1) == ()
    assert judged.after(1) == ("l",)


def test_an_owner_that_lived_again_in_between_begins_the_time_anew() -> None:
    """Even if nothing else was suspected meanwhile."""
    world = dead_ledger()
    judged = Judged(world)
    judged.after(LOSS_S - 1)
    world.living = {ME, DEAD}
    judged.now()
    world.living = {ME}
    assert judged.after(LOSS_S - 1) == ()


def test_forgetting_begins_the_time_anew() -> None:
    judged = Judged(dead_ledger())
    judged.after(LOSS_S - 1)
    judged.judge.forget()
    assert judged.after(LOSS_S - 1) == ()


def test_a_judge_that_was_paused_has_not_watched() -> None:
    judged = Judged(dead_ledger())
    judged.after(LOSS_S - 1)
    judged.clock.advance(STALE_S + 1)
    assert judged.now() == ()
    assert judged.after(LOSS_S - 1) == ()
    assert judged.after(1) == ("l",)


def test_a_short_pause_is_watching_still() -> None:
    judged = Judged(dead_ledger())
    judged.after(LOSS_S - STALE_S)
    judged.clock.advance(STALE_S)
    assert judged.now() == ("l",)


def test_out_of_patience_even_the_living_are_given_up_and_nobody_is_asked() -> None:
    world = dead_ledger(living={ME, DEAD}, answers={DEAD: Whereabouts.HELD})
    judged = Judged(world)
    assert judged.after(LOSS_S - 1, impatient=True) == ()
    assert judged.after(1, impatient=True) == ("l",)
    assert world.asked == []


def test_an_adopted_ledger_that_holds_less_than_was_counted_is_lost_at_once() -> None:
    adopted = {"s": Sum(5, Counted(1)), "w": Sum(5, Counted(2)), "old": Sum(4, Counted(0))}
    judged = Judged(World(uploads={"s": 2, "w": 2, "old": 1}, adopted=adopted))
    assert judged.now() == ("s",)


def test_an_adopted_ledger_of_which_nothing_was_counted_is_no_loss() -> None:
    assert Judged(World(adopted={"s": Sum(5, Counted(0))})).now() == ()
