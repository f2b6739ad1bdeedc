"""What a server tells a Redis that has lost data, against the model of the scripts."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from model.cluster import Status
from model.server_in_memory import PromptRedis, RecordedStore
from twisted.internet import defer
from twisted.logger import globalLogPublisher

from fedcore.core.iteration import Iteration, Phase
from fedcore.services.recovery import bring_back
from fedcore.store.cluster_state import ClientMeta, ClusterState, Raised, Snapshot

ME = "10.0.0.1:6000::2026-01-01-00:00:00.000.000::10001"
KNOWN = Snapshot(
    Iteration(5, 2, Phase.COLLECTING, base="b5", lost=3), 4.0, 3.0, None, 7, 0, False, "why the fourth failed"
)
META = ClientMeta(9, 8, 7)


@dataclass
class Held:
    iteration: int
    clients: tuple[bytes, ...]


@dataclass
class Own:
    id: str
    held: dict[bytes, int]

    def clients(self) -> dict[bytes, int]:
        return self.held


@dataclass
class InHand:
    """Stands for Ledgers."""

    adopted: dict[str, Held] = field(default_factory=dict)
    own: Own | None = None
    number: int = 5

    claimed: list[str] = field(default_factory=list)

    def serves(self, number: int) -> bool:
        return number == self.number

    async def claim_again(self, cluster: object, ledger_id: str, node_id: str) -> None:
        self.claimed.append(ledger_id)


@pytest.fixture
def store() -> RecordedStore:
    return RecordedStore(lambda: 100_000.0, lambda word: None)


def result_of(work: Coroutine[Any, Any, Any]) -> Any:
    outcome: list[Any] = []
    defer.Deferred.fromCoroutine(work).addBoth(outcome.append)
    if hasattr(outcome[0], "raiseException"):
        outcome[0].raiseException()
    return outcome[0]


def told(
    store: RecordedStore,
    ledgers: InHand | None = None,
    places: dict[str, ClientMeta] | None = None,
    known: Snapshot = KNOWN,
) -> tuple[Raised, list[Any]]:
    """Bring back; return what became of it, and the warnings."""
    redis: Any = PromptRedis(store)
    in_hand: Any = ledgers or InHand()
    logged: list[Any] = []
    globalLogPublisher.addObserver(logged.append)
    try:
        raised = result_of(
            bring_back(ClusterState(redis, "job", "i_1", 20_000), known, in_hand, ME, places or {})
        )
    finally:
        globalLogPublisher.removeObserver(logged.append)
    return raised, logged


def test_an_empty_redis_hears_the_whole_state(store: RecordedStore) -> None:
    raised, warnings = told(store)
    assert raised is Raised.RAISED
    status = store.at("i_1").status
    assert status is not None and store.name == "i_1"
    assert (status.number, status.attempt, status.phase, status.base) == (5, 2, Phase.COLLECTING, "b5")
    assert (status.started, status.first_upload, status.sealed) == (96_000, 97_000, None)
    assert (status.fence, status.lost, status.success, status.result) == (7, 3, False, KNOWN.result)
    assert warnings[0]["iteration"] == 5


def test_a_redis_that_knows_as_much_is_left_as_it_is(store: RecordedStore) -> None:
    store.claim_instance("i_1")
    store.at("i_1").status = before = Status(5, 2, base="b5", fence=9)
    assert told(store) == (Raised.KEPT, [])
    assert store.at("i_1").status is before


def test_a_newer_instance_is_told_nothing(store: RecordedStore) -> None:
    store.claim_instance("i_2")
    store.at("i_2").status = Status(1, epoch=1)
    ledgers = InHand(own=Own("own", {b"\1": 2}))
    assert told(store, ledgers, {"c": META}) == (Raised.NEWER, [])
    assert store.at("i_1").status is None and not store.at("i_1").owners


def test_updates_of_all_ledgers_and_places_are_there_again(store: RecordedStore) -> None:
    ledgers = InHand({"adopted": Held(5, (b"\2", b"\3"))}, Own("own", {b"\1": 6}))
    raised, warnings = told(store, ledgers, {"c": META})
    state = store.at("i_1")
    assert raised is Raised.RAISED
    assert state.uploads_of(5) == {"02": "adopted", "03": "adopted", "01": "own"}
    assert set(state.clients[5]) == {"01", "02", "03", "c"}
    assert state.clients[5]["c"] == META.pack()
    assert state.owners == {"adopted": ME, "own": ME}
    assert warnings[0]["updates"] == 3


def test_what_a_client_declared_wins_over_what_its_ledger_knows(store: RecordedStore) -> None:
    told(store, InHand(own=Own("own", {b"\1": 6})), {"01": META})
    assert store.at("i_1").clients[5]["01"] == META.pack()


def test_updates_alone_are_a_warning_too(store: RecordedStore) -> None:
    store.claim_instance("i_1")
    store.at("i_1").status = Status(5, 2, base="b5")
    raised, warnings = told(store, InHand(own=Own("own", {b"\1": 6})))
    assert (raised, warnings[0]["updates"]) == (Raised.KEPT, 1)


def test_a_second_time_nothing_is_left_to_do(store: RecordedStore) -> None:
    ledgers = InHand(own=Own("own", {b"\1": 6}))
    told(store, ledgers)
    assert told(store, ledgers) == (Raised.KEPT, [])


def test_ledgers_of_other_iterations_are_not_told(store: RecordedStore) -> None:
    told(store, InHand({"adopted": Held(4, (b"\2",))}, Own("own", {b"\1": 6}), number=4))
    assert store.at("i_1").uploads_of(5) == {}
    assert store.at("i_1").owners == {}


def test_a_ledger_that_is_another_nodes_by_now_brings_nothing_back(store: RecordedStore) -> None:
    store.at("i_1").owners["own"] = "another"
    raised, warnings = told(store, InHand(own=Own("own", {b"\1": 6})))
    assert store.at("i_1").uploads_of(5) == {}
    assert (raised, warnings[0]["updates"]) == (Raised.RAISED, 0)


def test_a_redis_that_is_further_on_hears_no_clients(store: RecordedStore) -> None:
    store.claim_instance("i_1")
    store.at("i_1").status = Status(6)
    ledgers = InHand(own=Own("own", {b"\1": 6}))
    assert told(store, ledgers, {"c": META}) == (Raised.KEPT, [])
    assert not store.at("i_1").owners and not any(store.at("i_1").clients.values())


def test_a_candidate_and_its_finaliser_are_there_again(store: RecordedStore) -> None:
    iteration = replace(KNOWN.iteration, phase=Phase.CANDIDATE, token="7:me", digest="d")
    told(store, known=replace(KNOWN, iteration=iteration, sealed_ago=1.0))
    status = store.at("i_1").status
    assert status is not None
    assert (status.phase, status.token, status.digest, status.sealed) == (
        Phase.CANDIDATE,
        "7:me",
        "d",
        99_000,
    )
