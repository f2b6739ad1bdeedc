"""What a server tells a Redis that has lost data, against the model of the scripts."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model.cluster import Status
from model.server_in_memory import PromptRedis, RecordedStore
from twisted.internet import defer, task
from twisted.logger import globalLogPublisher

from fedcore.config import Settings
from fedcore.core.iteration import Iteration, Phase
from fedcore.ledger.layout import Epoch
from fedcore.services.recovery import (
    DOUBT_S,
    JUMP_S,
    LIST_S,
    LOOK_S,
    Memory,
    Moment,
    Recovery,
    bring_back,
    placed,
)
from fedcore.store.cluster_state import ClientMeta, ClusterState, LeftOut, Raised, Reserve, Roll, Snapshot
from fedcore.store.keys import ANYBODY
from fedcore.wire.arrays import Layout

ME = "10.0.0.1:6000::2026-01-01-00:00:00.000.000::10001"
KNOWN = Snapshot(
    Iteration(5, 2, Phase.COLLECTING, base="b5", lost=3),
    4.0,
    3.0,
    None,
    7,
    0,
    False,
    "why the fourth failed",
    typical=1.5,
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
    base: str = "b5"
    instance: str = "i_1"

    claimed: list[str] = field(default_factory=list)

    @property
    def epoch(self) -> Epoch:
        return Epoch(self.instance, self.number, self.base)

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
    assert status.typical == 1_500
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


def test_each_ledger_that_redis_does_not_take_back_is_told(store: RecordedStore) -> None:
    """One that is left out keeps none of the others back."""
    answers: dict[str, int | LeftOut] = {"": 0, "adopted": LeftOut(2, rebased=False), "own": 1}
    bases: set[str] = set()

    class Shared(ClusterState):
        async def restore_clients(
            self,
            number: int,
            ledger_id: str,
            node_id: str,
            clients: Mapping[str, ClientMeta],
            base: str = "",
        ) -> int | None:
            bases.add(base)
            answer = answers[ledger_id]
            if isinstance(answer, LeftOut):
                raise answer
            return answer

    ledgers: Any = InHand({"adopted": Held(5, (b"\2", b"\3"))}, Own("own", {b"\1": 6}), base="another")
    told: list[Any] = []
    redis: Any = PromptRedis(store)
    shared = Shared(redis, "job", "i_1", 20_000)
    result_of(bring_back(shared, KNOWN, ledgers, ME, {"c": META}, lambda *news: told.append(news)))
    assert told == [("adopted", ledgers.epoch, answers["adopted"])]
    assert bases == {"another"}, "what the ledgers' updates were trained from, not what is to come"


def test_what_is_of_another_instance_is_not_told(store: RecordedStore) -> None:
    """Both may be at the same number."""
    told(store, InHand(own=Own("own", {b"\1": 6}), instance="i_0"), {"c": META})
    assert not store.at("i_1").owners and not any(store.at("i_1").clients.values())


def test_places_of_the_iteration_before_are_not_given_in_the_next(store: RecordedStore) -> None:
    told(store, InHand(number=4), {"c": META})
    assert not any(store.at("i_1").clients.values())


def test_whom_a_ledger_that_was_given_up_held_too_counts_again(store: RecordedStore) -> None:
    ledgers = InHand(own=Own("own", {b"\1": 6}))
    told(store, ledgers)
    state = store.at("i_1")
    state.uploads[5].clear()  # as Redis had counted this client in the other ledger
    state.clients[5].clear()
    cluster = ClusterState(PromptRedis(store), "job", "i_1", 20_000)
    driver = SimpleNamespace(joined_cluster=lambda: cluster, iteration=Iteration(5), node_id=ME)
    parts: Any = SimpleNamespace(ledgers=ledgers)
    result_of(Recovery(driver, parts, Memory(task.Clock()), task.Clock()).tell_again())
    assert state.uploads_of(5) == {"01": "own"}
    driver.iteration = Iteration(6)
    state.uploads[5].clear()
    result_of(Recovery(driver, parts, Memory(task.Clock()), task.Clock()).tell_again())
    assert state.uploads_of(5) == {}, "of the iteration before"


class TestHoldOff:
    """Requests that wait until others have brought back what Redis lost."""

    def test_one_asks_for_all_who_wait(self, store: RecordedStore) -> None:
        clock, asked, held = task.Clock(), [0], [True]

        class Cluster:
            async def holds_off(self) -> bool:
                asked[0] += 1
                return held[0]

        class Driver:
            joined = True
            waiting: ClassVar[list[defer.Deferred[None]]] = []

            def joined_cluster(self) -> Cluster:
                return Cluster()

            def run(self, work: Coroutine[Any, Any, object]) -> None:
                defer.Deferred.fromCoroutine(work)

            def wake(self) -> None:
                for waiter in self.waiting:
                    waiter.callback(None)

            async def held_until(self, condition: Callable[[], bool], seconds: float) -> None:
                if not condition():
                    self.waiting.append(defer.Deferred())
                    await self.waiting[-1]
                assert condition()

        parts: Any = SimpleNamespace(ledgers=InHand())
        recovery = Recovery(Driver(), parts, Memory(clock), clock)  # type: ignore[arg-type]
        waiting = [defer.Deferred.fromCoroutine(recovery.others_back(8.0)) for _ in range(100)]
        clock.pump([0.02] * 9)
        assert asked == [10] and not any(waiter.called for waiter in waiting)
        held[0] = False
        clock.advance(0.02)
        assert asked == [11] and all(waiter.called for waiter in waiting)
        assert defer.Deferred.fromCoroutine(recovery.others_back(8.0)).called and asked == [12]


class TestWaiting:
    """Whom this server has refused, and told when to return."""

    @pytest.fixture
    def clock(self) -> task.Clock:
        return task.Clock()

    @pytest.fixture
    def memory(self, clock: task.Clock) -> Memory:
        return Memory(clock)

    def test_a_place_is_kept_until_it_is_taken_or_nobody_comes(
        self, clock: task.Clock, memory: Memory
    ) -> None:
        memory.refused("early", Reserve(1_000, 9, 500), most=4)
        memory.refused("late", Reserve(5_000, 9, 500), most=4)
        clock.advance(1.25)
        assert memory.waiting == {"early": Reserve(-250, 0, 500), "late": Reserve(3_750, 0, 500)}
        clock.advance(0.25)
        assert set(memory.waiting) == {"late"}
        memory.has_place("late")
        memory.has_place("somebody else")
        assert memory.waiting == {}

    def test_a_further_refusal_counts_from_then_on(self, clock: task.Clock, memory: Memory) -> None:
        memory.refused("a", Reserve(1_000, 0, 500), most=4)
        clock.advance(1)
        memory.refused("a", Reserve(2_000, 0, 500), most=4)
        assert memory.waiting == {"a": Reserve(2_000, 0, 500)}

    def test_no_more_are_remembered_than_redis_keeps_places_for(
        self, clock: task.Clock, memory: Memory
    ) -> None:
        for client in "abcde":
            memory.refused(client, Reserve(1_000, 0, 500), most=4)
        assert set(memory.waiting) == set("abcd")
        clock.advance(1.5)
        memory.refused("f", Reserve(1_000, 0, 500), most=4)
        assert set(memory.waiting) == {"f"}


class TestRoll:
    """Who is called to bring back what Redis has forgotten, and who says so."""

    OTHER = "10.0.0.2:6000::2026-01-01-00:00:00.000.000::10002"

    def brought_back(self, store: RecordedStore, memory: Memory) -> tuple[list[Roll], Roll]:
        """Return the roll at each step on the ledgers, and in the end."""
        redis: Any = PromptRedis(store)
        cluster = ClusterState(redis, "job", "i_1", 20_000)
        rolls: list[Roll] = []

        class Watched(Own):
            def clients(self) -> dict[bytes, int]:
                rolls.append(result_of(cluster.roll()))
                return super().clients()

        ledgers = InHand(own=Watched("own", {b"\1": 6}))
        ledgers.inherited = {"adopted"}  # type: ignore[attr-defined]
        nothing = SimpleNamespace(be_patient=lambda: None, forget=lambda: None)
        parts: Any = SimpleNamespace(ledgers=ledgers, reduction=nothing, judge=nothing)
        driver: Any = SimpleNamespace(
            node_id=ME,
            others=[self.OTHER],
            opening=nothing,
            iteration=KNOWN.iteration,
            places={},
            settings=Settings(),
            models=SimpleNamespace(newest_image=SimpleNamespace(layout=Layout(()))),
        )
        store.at("i_1").own_ledger("own", ME)
        result_of(Recovery(driver, parts, memory, task.Clock()).bring_back(cluster, "1"))
        return rolls, result_of(cluster.roll())

    def test_a_server_awaits_itself_too_until_its_ledger_is_told(self, store: RecordedStore) -> None:
        """Or another update could take the place of one that its ledger holds."""
        during, after = self.brought_back(store, Memory(task.Clock()))
        assert during == [Roll(frozenset(), frozenset({ME, self.OTHER}))]
        assert after == Roll(frozenset({ME, "adopted", ANYBODY}), frozenset({self.OTHER}))

    def test_who_may_not_know_everybody_does_not_answer_for_all(self, store: RecordedStore) -> None:
        memory = Memory(task.Clock())
        memory.begin_instance()
        _, after = self.brought_back(store, memory)
        assert after == Roll(frozenset({ME, "adopted"}), frozenset({self.OTHER, ANYBODY}))


class TestClocks:
    """Redis' clock may be set, this server's may not."""

    moments = st.floats(0, 1e9)
    seconds = st.floats(0, 1e5)

    @given(moments, seconds, st.floats(-1e6, 1e6), seconds)
    def test_a_moment_stays_however_redis_clock_is_set(
        self, happened: float, ago: float, jump: float, later: float
    ) -> None:
        now = 1e6
        clock = happened + ago
        first = placed(None, happened, clock, now, now)
        again = placed(first, happened, clock + later + jump, now + later, now + later)
        assert again.here == pytest.approx(first.here, abs=JUMP_S + 1e-3)

    @given(moments, seconds, seconds)
    def test_without_a_jump_redis_clock_is_followed(self, happened: float, ago: float, later: float) -> None:
        now = 1e6
        first = placed(None, happened, happened + ago, now, now)
        drift = JUMP_S / 2
        again = placed(first, happened, happened + ago + later + drift, now + later, now + later)
        assert again.here == pytest.approx(first.here - drift, abs=1e-3)

    @pytest.mark.parametrize(
        ("known", "by_redis", "clock", "asked", "here"),
        [
            (None, 990, 1000, 100, 90),  # news
            (Moment(990, 90), 990, 1000, 100, 90),  # the same again
            (Moment(990, 90), 990, 4600, 100, 90),  # the clock was set forward
            (Moment(990, 90), 990, 500, 100, 90),  # and back
            (Moment(990, 90), 4590, 4600, 100, 90),  # another moment: only Redis can say
            (Moment(990, 90), 480, 500, 100, 80),
            (Moment(990, 95, sure=False), 990, 1000, 100, 90),  # what was not sure is put right
            (None, 1010, 1000, 100, 100),  # nothing happens in the future
        ],
    )
    def test_when_it_was_here(
        self, known: Moment | None, by_redis: float, clock: float, asked: float, here: float
    ) -> None:
        assert placed(known, by_redis, clock, asked, 100).here == here

    def test_what_was_asked_long_ago_is_not_sure(self) -> None:
        assert not placed(None, 990, 1000, 100 - JUMP_S - 1, 100).sure
        assert placed(None, 990, 1000, 100 - JUMP_S, 100).sure

    def test_a_memory_keeps_the_moments_of_an_iteration(self) -> None:
        clock = task.Clock()
        clock.advance(100)
        memory = Memory(clock)
        look = Snapshot(Iteration(5, phase=Phase.SEALED), 10.0, 8.0, 1.0, 0, 0, True, "", 1000.0)
        before = memory.localise(look)
        assert (before.started, before.first_upload, memory.sealed_at) == (90, 92, 99)
        clock.advance(2)
        hour = 3600
        jumped = replace(
            look,
            started_ago=12.0 + hour,
            first_upload_ago=10.0 + hour,
            sealed_ago=3.0 + hour,
            clock=1002.0 + hour,
        )
        for _ in range(2):
            assert memory.localise(jumped) == before
            assert memory.sealed_at == 99
        known = memory.known(replace(before, phase=Phase.SEALED))
        assert (known.started_ago, known.first_upload_ago, known.sealed_ago) == (12, 10, 3)
        after = memory.localise(
            replace(jumped, iteration=Iteration(6), started_ago=0.5, first_upload_ago=None, sealed_ago=None)
        )
        assert (after.started, after.first_upload, memory.sealed_at) == (101.5, None, None)

    def test_how_long_iterations_take_outlives_a_redis_that_does_not_know(self) -> None:
        memory = Memory(task.Clock())
        look = Snapshot(Iteration(5), None, None, None, 0, 0, True, "", typical=1.5)
        memory.localise(look)
        memory.begin_instance()
        memory.localise(replace(look, typical=None))
        assert memory.known(Iteration(5)).typical == memory.typical == 1.5

    def test_one_that_is_gone_is_not_waited_for_anew_after_each_loss(self) -> None:
        clock = task.Clock()
        memory = Memory(clock)
        memory.saw(["gone", "there"])
        for _ in range(6):
            for _ in range(4):
                clock.advance(1)
                memory.saw(["there"])
            memory.begin_doubt(["there"])
        assert memory.in_doubt([]) == ["there"], "24 s after it was listed last, half of them told"

    def test_others_may_have_come_back_while_it_did_not_look(self) -> None:
        clock = task.Clock()
        memory = Memory(clock)
        memory.saw(["other"])
        for _ in range(8):
            clock.advance(1)
            memory.saw([])
        clock.advance(LOOK_S + 0.1)  # cut off, and Redis is emptied meanwhile
        memory.begin_doubt([])
        clock.advance(DOUBT_S - 0.1)
        assert memory.in_doubt([]) == ["other"]

    def test_a_list_that_was_just_emptied_tells_of_nobody_that_it_is_gone(self) -> None:
        clock = task.Clock()
        memory = Memory(clock)
        memory.saw(["other"])
        for _ in range(4):
            clock.advance(4)
            memory.begin_doubt([])
            memory.saw([])  # it may not have come back to this Redis yet
        assert memory.in_doubt([]) == ["other"]

    def test_who_stood_still_has_not_seen_the_others_go(self) -> None:
        clock = task.Clock()
        memory = Memory(clock)
        memory.saw(["a", "b"])
        clock.advance(60)  # paused, and then Redis is empty
        memory.saw([])
        memory.begin_doubt([])
        assert memory.in_doubt([]) == [ANYBODY, "a", "b"], "nor whom else they have got company of"

    def test_a_new_server_waits_for_those_that_it_never_saw(self) -> None:
        """Redis may have been emptied just before it looked, and is emptied again."""
        clock = task.Clock()
        memory = Memory(clock)
        memory.begin_instance()
        for _ in range(int(DOUBT_S) // 2):
            clock.advance(1)
            memory.saw([])
        clock.advance(60)  # cut off
        memory.begin_doubt([])
        assert memory.in_doubt([]) == [ANYBODY]
        clock.advance(DOUBT_S / 2 + 2)
        assert memory.in_doubt([]) == []

    def test_a_new_server_that_reads_that_all_were_called_waits_for_those_alone(self) -> None:
        clock = task.Clock()
        memory = Memory(clock)
        clock.advance(1_000)
        memory.begin_instance()
        memory.saw(["a"])
        memory.called(Roll(frozenset({ANYBODY, "a"}), frozenset({"cut off"})))
        clock.advance(1)
        memory.saw(["a"])
        memory.begin_doubt(["a"])
        assert memory.in_doubt([]) == ["a", "cut off"]

    def test_so_does_one_that_finds_a_list_that_is_older_than_a_lease(self) -> None:
        """As after an ordinary restart: Redis was emptied by nobody."""
        memory = Memory(task.Clock())
        memory.begin_instance()
        memory.saw(["a"])
        memory.called(Roll(frozenset(), frozenset(), all_listed=True))
        memory.begin_doubt([])
        assert memory.in_doubt([]) == ["a"]

    def test_not_all_are_on_a_list_that_was_just_emptied(self) -> None:
        clock = task.Clock()
        memory = Memory(clock)
        memory.begin_instance()
        memory.begin_doubt([])
        memory.saw([])
        memory.called(Roll(frozenset({ANYBODY, "a"}), frozenset()))
        memory.begin_doubt([])
        assert memory.in_doubt([]) == [ANYBODY]

    def test_the_roll_matters_to_a_new_server_and_to_one_that_may_not_know_all(self) -> None:
        clock = task.Clock()
        memory = Memory(clock)
        memory.saw([])
        assert memory.is_new
        for _ in range(21):
            clock.advance(1)
            memory.saw([])
        assert not memory.is_new
        clock.advance(LIST_S + 1)
        memory.saw([])
        assert memory.is_new, "it was away"

    def test_a_short_absence_hides_nobody(self) -> None:
        """Whoever has come and gone meanwhile is on the list for as long as its lease runs."""
        clock = task.Clock()
        memory = Memory(clock)
        memory.saw(["a"])
        clock.advance(LIST_S)
        memory.saw(["a", "b"])
        memory.begin_doubt([])
        assert memory.in_doubt([]) == ["a", "b"]

    def test_who_has_watched_the_list_knows_that_there_is_nobody_else(self) -> None:
        clock = task.Clock()
        memory = Memory(clock)
        memory.begin_instance()
        for _ in range(int(DOUBT_S) + 2):
            clock.advance(1)
            memory.saw([])
        memory.begin_doubt([])
        memory.saw([])
        memory.begin_doubt([])
        assert memory.in_doubt([]) == []

    def test_the_doubt_is_over_after_a_while(self) -> None:
        clock = task.Clock()
        memory = Memory(clock)
        memory.begin_doubt(["b"])
        assert memory.in_doubt(["a"]) == ["a", "b"]
        clock.advance(DOUBT_S)
        assert memory.in_doubt(["a"]) == []
