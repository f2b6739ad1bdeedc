"""The shared state against a real Redis: what each script answers, changes and refuses to change."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from integration.redis_fixture import PrivateRedis, ReactorThread, redis_client
from twisted.internet import defer
from twisted.internet.endpoints import TCP4ClientEndpoint

from fedcore.core.admission import Acceptance, Selection
from fedcore.core.client_key import client_key
from fedcore.core.iteration import Iteration, Phase
from fedcore.core.job import RunningState
from fedcore.errors import StoreUnavailable
from fedcore.store import keys
from fedcore.store.cluster_state import (
    ClientMeta,
    ClusterState,
    IterationMoved,
    LeaseLapsed,
    LedgerRevoked,
    LeftOut,
    Look,
    Node,
    OthersAwaited,
    Raised,
    Rebased,
    Reserve,
    Roll,
    Snapshot,
    StateMissing,
    claim_instance,
    current_instance,
)
from fedcore.store.instances import hyper_parameters_text
from fedcore.store.notices import Notices
from fedcore.store.redis import Redis
from fedctl.processes import wait_until

WINDOW_MS = 300_999  # of the whole iteration; lifetimes follow from its whole seconds
JOB_TTL, ITERATION_TTL = 300 + 604_800, 300 + 1_800
META = ClientMeta(120, 7, 1_700_000_000_123)
SOON = Reserve(60_000, 120_000, 5_000)  # told to return in a minute, and kept a place from now on
LATER = Reserve(60_000, 1_000, 5_000)  # kept a place only from one second before
OWNERS = {"L1": "node-1", "L2": "node-1", "L0": "node-2"}  # ledger -> server, of ``Shared.accepting``
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Shared:
    """The state of one fresh job, and short words for what a server does with it."""

    loop: ReactorThread
    redis: Redis
    state: ClusterState

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run(work)

    def together(self, works: list[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Start all at once on the one connection; return all results."""

        async def gather() -> list[Any]:
            return list(await defer.gatherResults([defer.Deferred.fromCoroutine(work) for work in works]))

        return self.run(gather())

    def command(self, *words: str | bytes | int) -> Any:
        return self.run(self.redis.command(*words))

    def create(self, number: int = 5, running: RunningState = RunningState.RUNNING) -> bool:
        return self.run(  # type: ignore[no-any-return]
            self.state.create(number, success=True, result="fine", running=running, base="b0")
        )

    def look(self) -> Look:
        return self.run(self.state.read())  # type: ignore[no-any-return]

    def read(self) -> Any:
        return self.look().snapshot

    def another(self, instance: str) -> Shared:
        """The same job, as seen by a server of another instance."""
        return replace(self, state=ClusterState(self.redis, self.state.keys.fl_name, instance, WINDOW_MS))

    def name(self, instance: str = "i_1") -> None:
        """The job has this instance."""
        self.command("SET", keys.instance_name(self.state.keys.fl_name), instance, "EX", 60)

    def selecting(
        self, fl_id: str, number: int = 5, places: int = 3, fit: bool = True, reserve: Reserve = SOON
    ) -> Coroutine[Any, Any, tuple[Selection, int]]:
        return self.state.select_client(number, fl_id, META, places=places, fit=fit, reserve=reserve)

    def select(self, fl_id: str, **given: Any) -> tuple[Selection, int]:
        return self.run(self.selecting(fl_id, **given))  # type: ignore[no-any-return]

    def accepting(
        self,
        fl_id: str,
        number: int = 5,
        attempt: int = 1,
        requested: int = 5,
        quorum: int = 2,
        ledger_id: str = "L1",
        node_id: str | None = None,
        fit: bool = True,
        served: bool = True,
        again: bool = False,
    ) -> Coroutine[Any, Any, tuple[Acceptance, int, ClientMeta | None]]:
        """Ask as ``node_id``, else as the ledger's usual server; if ``served``, that one owns the ledger and lives."""
        node = node_id or OWNERS[ledger_id]

        async def ask() -> tuple[Acceptance, int, ClientMeta | None]:
            if served:
                await self.serving(ledger_id, node)
            asking = {"quorum": quorum, "ledger_id": ledger_id, "node_id": node, "fit": fit, "again": again}
            return await self.state.accept_upload(number, attempt, requested, fl_id, **asking)

        return ask()

    async def serving(self, ledger_id: str, node_id: str) -> None:
        await self.state.own_ledger(ledger_id, node_id)
        await self.state.heartbeat("server", node_id, "address")

    def serve(self, ledger_id: str, node_id: str) -> None:
        """A server lives and has a ledger that nobody else has."""
        self.run(self.serving(ledger_id, node_id))

    def die(self, node_id: str) -> None:
        """A server's heart stands still, for as long as its lease would hold."""
        self.command("PEXPIRE", self.state.keys.heartbeat("server", node_id), 0)

    def own(self, ledger_id: str, node_id: str, before: str = "") -> bool:
        return self.run(self.state.own_ledger(ledger_id, node_id, before))  # type: ignore[no-any-return]

    def owner(self, ledger_id: str) -> str:
        return self.run(self.state.ledger_owner(ledger_id))  # type: ignore[no-any-return]

    def counted(self, ledger_id: str, *fl_ids: str, number: int = 5) -> dict[str, ClientMeta]:
        return self.run(self.state.counted(number, ledger_id, fl_ids))  # type: ignore[no-any-return]

    def accept(self, fl_id: str, **given: Any) -> tuple[Acceptance, int, ClientMeta | None]:
        return self.run(self.accepting(fl_id, **given))  # type: ignore[no-any-return]

    def seal(self, number: int = 5, attempt: int = 1, quorum: int = 0) -> bool:
        return self.run(self.state.seal(number, attempt, quorum))  # type: ignore[no-any-return]

    def record(
        self,
        token: str,
        digest: str = "d1",
        number: int = 5,
        attempt: int = 1,
        updates: int | None = None,
        phase: Phase = Phase.CANDIDATE,
    ) -> bool:
        counted = len(self.run(self.state.uploads(number))) if updates is None else updates
        return self.run(  # type: ignore[no-any-return]
            self.state.record_model(number, attempt, token, digest, counted, phase)
        )

    def push(self, digest: str, aggregate: str = "a1", number: int = 5, attempt: int = 1) -> bool:
        return self.run(self.state.push_weight(number, attempt, aggregate, digest))  # type: ignore[no-any-return]

    def measure(self, number: int = 5, attempt: int = 1) -> bool:
        return self.run(self.state.push_metrics(number, attempt, 0.1, 1 / 3))  # type: ignore[no-any-return]

    def claim(
        self, node_id: str = "node-1", token: str = "", number: int = 5, attempt: int = 1
    ) -> tuple[str, Phase, str, str] | None:
        return self.run(self.state.claim_reduction(number, attempt, token, node_id))  # type: ignore[no-any-return]

    def claimed(self, node_id: str = "node-1") -> str:
        """Go on from collecting until there is a finaliser; return its token."""
        assert self.seal()
        claim = self.claim(node_id)
        assert claim is not None
        return claim[0]

    def reopen(
        self,
        *ledgers: str,
        number: int = 5,
        attempt: int = 1,
        phase: Phase = Phase.COLLECTING,
        token: str = "",
    ) -> int | None:
        return self.run(  # type: ignore[no-any-return]
            self.state.reopen(number, attempt, phase=phase, token=token, ledgers=ledgers)
        )

    def restore(
        self,
        ledger_id: str,
        *fl_ids: str,
        number: int = 5,
        node_id: str = "node-1",
        meta: ClientMeta | None = None,
        base: str = "",
    ) -> int | None:
        clients = {client_key(fl_id): meta or META for fl_id in fl_ids}
        return self.run(  # type: ignore[no-any-return]
            self.state.restore_clients(number, ledger_id, node_id, clients, base)
        )

    def left_out(self, ledger_id: str, *fl_ids: str, **details: Any) -> LeftOut:
        """Why a ledger is not taken back."""
        with pytest.raises(LeftOut) as caught:
            self.restore(ledger_id, *fl_ids, **details)
        return caught.value

    def rebasing(
        self, before: str, after: str, number: int = 5, finishes: bool = False
    ) -> Coroutine[Any, Any, Rebased]:
        return self.state.rebase(number, before, after, result="the model is gone", finishes=finishes)

    def clients(self, number: int = 5) -> dict[str, ClientMeta]:
        """The places as Redis holds them: client key -> what it declared."""
        flat = self.command("HGETALL", self.state.keys.clients(number))
        pairs = zip(flat[::2], flat[1::2], strict=True)
        return {key.decode(): ClientMeta.unpack(meta) for key, meta in pairs}

    def uploads(self, number: int = 5) -> dict[str, str]:
        return self.run(self.state.uploads(number))  # type: ignore[no-any-return]

    def advance(
        self,
        number: int = 5,
        attempt: int = 1,
        phase: Phase = Phase.COLLECTING,
        success: bool = True,
        result: str = "done",
        finishes: bool = False,
        token: str = "",
        base: str = "",
    ) -> bool:
        return self.run(  # type: ignore[no-any-return]
            self.state.advance(
                number,
                attempt,
                success=success,
                result=result,
                finishes=finishes,
                phase=phase,
                token=token,
                base=base,
            )
        )

    def status(self) -> dict[str, str]:
        """The status hash as it is, its moments left out."""
        flat = self.command("HGETALL", self.state.keys.status)
        fields = {key.decode(): value.decode() for key, value in zip(flat[::2], flat[1::2], strict=True)}
        return {key: value for key, value in fields.items() if not key.endswith("Ms")}

    def moments(self) -> dict[str, int]:
        """The moments in the status hash, milliseconds of Redis' clock."""
        names = ("startedMs", "firstUploadMs", "sealedMs")
        found = self.command("HMGET", self.state.keys.status, *names)
        return {name: int(moment) for name, moment in zip(names, found, strict=True) if moment is not None}

    def status_field(self, name: str) -> bytes | None:
        return self.command("HGET", self.state.keys.status, name)  # type: ignore[no-any-return]

    def set_status(self, **fields: str | int) -> None:
        self.command("HSET", self.state.keys.status, *(part for item in fields.items() for part in item))

    def ttl(self, key: str) -> int:
        return self.command("TTL", key)  # type: ignore[no-any-return]

    def names(self) -> set[str]:
        """All keys of this job."""
        return {name.decode() for name in self.command("KEYS", f"ms_fl:{self.state.keys.fl_name}:*")}


def keys_of(*fl_ids: str) -> set[str]:
    return {client_key(fl_id) for fl_id in fl_ids}


def fresh(loop: ReactorThread, redis: Redis) -> Shared:
    return Shared(loop, redis, ClusterState(redis, f"job{next(_numbers)}", "i_1", WINDOW_MS))


@pytest.fixture
def shared(loop: ReactorThread, redis: Redis) -> Shared:
    return fresh(loop, redis)


@pytest.fixture
def open_five(shared: Shared) -> Shared:
    """Iteration 5 has begun."""
    assert shared.create()
    return shared


ELSEWHERE: list[tuple[str, Callable[[Shared], object], int]] = [
    ("a later iteration", lambda shared: shared.set_status(iterationNum=6), 6),
    ("an earlier iteration", lambda shared: shared.set_status(iterationNum=3), 3),
    ("disabled", lambda shared: shared.set_status(runningState=1), 5),
    ("finished", lambda shared: shared.set_status(runningState=2), 5),
    ("stopped", lambda shared: shared.set_status(runningState=3), 5),
]
elsewhere = pytest.mark.parametrize(
    ("move", "number"), [case[1:] for case in ELSEWHERE], ids=[c[0] for c in ELSEWHERE]
)


class TestStatus:
    def test_there_is_none_at_first(self, shared: Shared) -> None:
        assert shared.look() == Look("", None)

    def test_it_is_written_once(self, shared: Shared) -> None:
        assert shared.create(5)
        before = shared.read()
        assert not shared.create(1, RunningState.FINISH)
        assert shared.read() == before
        assert before == Snapshot(Iteration(5, base="b0"), None, None, None, 0, 0, True, "fine")
        assert shared.ttl(shared.state.keys.status) == pytest.approx(JOB_TTL, abs=2)

    @pytest.mark.parametrize("running", RunningState)
    def test_it_tells_whether_the_job_runs(self, shared: Shared, running: RunningState) -> None:
        shared.run(shared.state.create(9, success=False, result="warum nicht: ü", running=running, base=""))
        snapshot = shared.read()
        assert snapshot.iteration == Iteration(9, running=running)
        assert (snapshot.success, snapshot.result) == (False, "warum nicht: ü")

    def test_its_fields_are_those_of_the_protocol_and_ours(self, open_five: Shared) -> None:
        assert open_five.status() == {
            "iterationNum": "5",
            "lastIterationSuccess": "1",
            "lastIterationResult": "fine",
            "runningState": "0",
            "attempt": "1",
            "phase": "collecting",
            "base": "b0",
        }

    def test_one_look_tells_the_name_of_the_instance_too(self, open_five: Shared) -> None:
        assert open_five.look().instance == ""
        open_five.name("i_1")
        assert open_five.look() == Look("i_1", open_five.read())
        newer = open_five.another("i_2")
        assert newer.look() == Look("i_1", None)
        open_five.name("i_2")
        assert open_five.look().instance == "i_2"
        assert open_five.read().iteration.number == 5

    def test_a_look_tells_all_that_is_there(self, open_five: Shared) -> None:
        open_five.set_status(
            attempt=3,
            phase="candidate",
            token="7:n",
            digest="d",
            base="b",
            lost=4,
            disabled=1,
            fence=7,
            epoch=2,
        )
        snapshot = open_five.read()
        assert snapshot.iteration == Iteration(
            5, 3, Phase.CANDIDATE, token="7:n", digest="d", base="b", lost=4, interrupted=True
        )
        assert (snapshot.fence, snapshot.epoch) == (7, 2)

    def test_the_counts_and_clocks_are_those_of_its_iteration(self, open_five: Shared) -> None:
        open_five.select("a")
        open_five.select("b")
        open_five.accept("a")
        snapshot = open_five.read()
        assert snapshot.iteration == Iteration(5, selected=2, uploaded=1, base="b0")
        assert 0 <= snapshot.first_upload_ago <= snapshot.started_ago < 20
        assert snapshot.sealed_ago is None
        open_five.seal()
        snapshot = open_five.read()
        assert 0 <= snapshot.sealed_ago <= snapshot.first_upload_ago
        open_five.advance(phase=Phase.SEALED)
        snapshot = open_five.read()
        assert snapshot.iteration == Iteration(6, base="b0")
        assert (snapshot.started_ago, snapshot.first_upload_ago, snapshot.sealed_ago) == (None, None, None)

    def test_one_of_the_original_is_read_and_served(self, shared: Shared) -> None:
        """Servers of the original write none of our fields; the secret prime is no text."""
        shared.set_status(iterationNum=5, lastIterationSuccess=1, lastIterationResult="", runningState=0)
        shared.command("HSET", shared.state.keys.status, "prime", bytes(range(200, 233)))
        assert shared.read().iteration == Iteration(5)
        assert shared.select("a") == (Selection.SELECTED, 1)
        assert shared.accept("a") == (Acceptance.ACCEPTED, 1, META)
        token = shared.claimed()
        assert shared.advance(phase=Phase.REDUCING, token=token)

    def test_a_state_that_is_not_there_counts_as_running(self, shared: Shared) -> None:
        shared.set_status(iterationNum=5)
        assert shared.read().iteration == Iteration(5)
        assert shared.select("a") == (Selection.SELECTED, 1)
        assert shared.accept("a") == (Acceptance.ACCEPTED, 1, META)
        assert shared.seal()

    def test_a_switch_without_an_iteration_is_no_status(self, shared: Shared) -> None:
        """An operator may switch a job off right after Redis lost its data."""
        shared.set_status(runningState=1)
        assert shared.read() is None
        with pytest.raises(StateMissing):
            shared.select("a")
        with pytest.raises(StateMissing):
            shared.accept("a")
        assert not shared.advance()
        assert not shared.seal()
        assert shared.claim() is None
        assert shared.reopen() is None
        assert shared.create(5)
        assert shared.read().iteration == Iteration(5, base="b0")


class TestSelect:
    def test_gives_each_client_one_place(self, open_five: Shared) -> None:
        assert open_five.select("a") == (Selection.SELECTED, 1)
        assert open_five.select("b") == (Selection.SELECTED, 2)
        assert open_five.select("a")[0] is Selection.KNOWN
        assert open_five.read().iteration.selected == 2
        assert open_five.clients() == dict.fromkeys(keys_of("a", "b"), META)

    def test_a_repeat_keeps_what_was_declared_first(self, open_five: Shared) -> None:
        open_five.select("a")
        other = replace(META, data_size=1)
        answer = open_five.run(open_five.state.select_client(5, "a", other, places=3, fit=True, reserve=SOON))
        assert answer[0] is Selection.KNOWN
        assert open_five.accept("a")[2] == META

    def test_never_gives_more_places_than_there_are(self, open_five: Shared) -> None:
        answers = open_five.together([open_five.selecting(f"c{i}", places=20) for i in range(50)])
        assert sorted(count for word, count in answers if word is Selection.SELECTED) == list(range(1, 21))
        assert sum(word is Selection.FULL for word, _ in answers) == 30
        assert open_five.read().iteration.selected == 20

    def test_an_unfit_request_only_learns_what_it_would_get(self, open_five: Shared) -> None:
        assert open_five.select("a", fit=False)[0] is Selection.UNFIT
        assert open_five.read() == replace(
            open_five.read(), iteration=Iteration(5, base="b0"), started_ago=None
        )
        for fl_id in "bcd":
            open_five.select(fl_id)
        assert open_five.select("a", fit=False)[0] is Selection.FULL
        assert open_five.select("b", fit=False)[0] is Selection.KNOWN

    def test_the_first_place_starts_the_clock_once(self, open_five: Shared) -> None:
        open_five.select("a")
        began = open_five.command("HGET", open_five.state.keys.status, "startedMs")
        open_five.select("b")
        open_five.select("a")
        assert open_five.command("HGET", open_five.state.keys.status, "startedMs") == began
        assert began.isdigit()

    def test_after_its_upload_a_client_is_told_so(self, open_five: Shared) -> None:
        open_five.select("a")
        open_five.accept("a")
        assert open_five.select("a")[0] is Selection.UPLOADED

    def test_a_repeat_is_answered_while_the_iteration_changes_and_nothing_else_is(
        self, open_five: Shared
    ) -> None:
        open_five.select("a")
        assert open_five.seal()
        assert open_five.select("a")[0] is Selection.KNOWN
        with pytest.raises(IterationMoved) as moved:
            open_five.select("b")
        assert moved.value.number == 5

    @elsewhere
    def test_elsewhere_no_place_is_given(
        self, open_five: Shared, move: Callable[[Shared], object], number: int
    ) -> None:
        open_five.select("a")
        move(open_five)
        for fl_id in "ab":
            with pytest.raises(IterationMoved) as moved:
                open_five.select(fl_id)
            assert moved.value.number == number

    def test_without_a_status_the_caller_is_told(self, shared: Shared) -> None:
        with pytest.raises(StateMissing):
            shared.select("a")
        assert shared.names() == set()

    def test_the_places_outlive_the_iteration_only_a_little(self, open_five: Shared) -> None:
        open_five.select("a")
        assert open_five.ttl(open_five.state.keys.clients(5)) == pytest.approx(ITERATION_TTL, abs=2)

    @pytest.mark.parametrize("fl_id", ["", "ü" * 300, "a:b,c", "\0\r\n*1", "{}"])
    def test_any_name_will_do(self, open_five: Shared, fl_id: str) -> None:
        assert open_five.select(fl_id) == (Selection.SELECTED, 1)
        assert open_five.accept(fl_id) == (Acceptance.ACCEPTED, 1, META)
        assert open_five.select(fl_id)[0] is Selection.UPLOADED


class TestReservedPlaces:
    """A client that was refused finds a place around the time for which it was told to return."""

    def refuse(self, shared: Shared, *fl_ids: str, reserve: Reserve = SOON) -> None:
        """Fill iteration 5, let clients be refused, and open iteration 6."""
        for i in range(3):
            assert shared.select(f"early{i}")[0] is Selection.SELECTED
        for fl_id in fl_ids:
            assert shared.select(fl_id, reserve=reserve)[0] is Selection.FULL
        assert shared.advance()

    def reserve(self, shared: Shared, fl_id: str, reserve: Reserve = SOON) -> bool:
        return shared.run(shared.state.reserve_place(fl_id, places=3, reserve=reserve))  # type: ignore[no-any-return]

    def waiting(self, shared: Shared) -> set[str]:
        return {name.decode() for name in shared.command("ZRANGE", shared.state.keys.waiting, 0, -1)}

    def returns(self, shared: Shared, fl_id: str) -> float:
        return float(shared.command("ZSCORE", shared.state.keys.waiting, client_key(fl_id)))

    def test_others_only_get_what_is_not_reserved(self, open_five: Shared) -> None:
        self.refuse(open_five, "late")
        assert open_five.select("x", number=6)[0] is Selection.SELECTED
        assert open_five.select("y", number=6)[0] is Selection.SELECTED
        assert open_five.select("z", number=6)[0] is Selection.FULL
        assert open_five.select("late", number=6) == (Selection.SELECTED, 3)
        assert self.waiting(open_five) == keys_of("z")

    def test_of_many_others_none_gets_a_reserved_place(self, open_five: Shared) -> None:
        self.refuse(open_five, "late")
        others = [open_five.selecting(f"c{i}", number=6) for i in range(50)]
        words = [word for word, _ in open_five.together(others)]
        assert (words.count(Selection.SELECTED), words.count(Selection.FULL)) == (2, 48)
        assert open_five.select("late", number=6)[0] is Selection.SELECTED

    def test_until_shortly_before_its_return_others_may_have_the_place(self, open_five: Shared) -> None:
        self.refuse(open_five, "late", reserve=LATER)
        for fl_id in "xyz":
            assert open_five.select(fl_id, number=6, reserve=LATER)[0] is Selection.SELECTED
        assert open_five.select("late", number=6, reserve=LATER)[0] is Selection.RESERVED

    def test_a_place_is_used_up_by_taking_it(self, open_five: Shared) -> None:
        self.refuse(open_five, "late")
        assert open_five.select("late", number=6)[0] is Selection.SELECTED
        assert self.waiting(open_five) == set()
        for fl_id in "xy":
            assert open_five.select(fl_id, number=6)[0] is Selection.SELECTED

    def test_who_comes_before_its_time_is_served(self, open_five: Shared) -> None:
        self.refuse(open_five, "late", reserve=LATER)
        assert open_five.select("late", number=6, reserve=LATER) == (Selection.SELECTED, 1)

    def test_no_more_wait_than_four_iterations_have_places_for(self, open_five: Shared) -> None:
        fl_ids = [f"l{i}" for i in range(12)]
        self.refuse(open_five, *fl_ids, "too-many")
        assert self.waiting(open_five) == keys_of(*fl_ids)
        assert not self.reserve(open_five, "too-many")
        assert open_five.select("too-many", number=6)[0] is Selection.FULL
        for fl_id in fl_ids[9:]:
            assert open_five.select(fl_id, number=6)[0] is Selection.SELECTED
        assert open_five.select("l0", number=6)[0] is Selection.RESERVED, "it is early for its place"

    def test_a_refused_update_keeps_a_place_too(self, open_five: Shared) -> None:
        for fl_id in "abc":
            open_five.select(fl_id)
        assert [open_five.accept(fl_id)[0] for fl_id in "abc"][2] is Acceptance.FULL
        assert self.reserve(open_five, "c")
        assert open_five.advance()
        for fl_id, word in (("x", Selection.SELECTED), ("y", Selection.SELECTED), ("z", Selection.FULL)):
            assert open_five.select(fl_id, number=6)[0] is word
        assert open_five.select("c", number=6) == (Selection.SELECTED, 3)

    def test_who_has_a_place_kept_already_keeps_it_longer(self, open_five: Shared) -> None:
        assert self.reserve(open_five, "late", Reserve(1_000, 0, 5_000))
        first = self.returns(open_five, "late")
        assert self.reserve(open_five, "late", Reserve(9_000, 0, 5_000))
        assert self.returns(open_five, "late") >= first + 8_000
        lifetime = open_five.command("PTTL", open_five.state.keys.waiting)
        assert lifetime == pytest.approx(14_000, abs=2_000)

    def test_those_who_did_not_come_make_room(self, open_five: Shared) -> None:
        for i in range(12):
            assert self.reserve(open_five, f"gone{i}", Reserve(0, 0, 0))
        assert self.reserve(open_five, "late")
        assert self.waiting(open_five) == keys_of("late")

    def test_a_second_refusal_is_told_apart_and_keeps_the_place_longer(self, open_five: Shared) -> None:
        assert [open_five.select(fl_id)[0] for fl_id in "abc"] == [Selection.SELECTED] * 3
        assert open_five.select("late", reserve=Reserve(1_000, 0, 5_000))[0] is Selection.FULL
        first = self.returns(open_five, "late")
        assert open_five.select("late", reserve=Reserve(9_000, 0, 5_000))[0] is Selection.RESERVED
        assert self.returns(open_five, "late") >= first + 8_000

    def test_a_place_not_taken_in_time_is_free_again(self, open_five: Shared) -> None:
        over = Reserve(0, 0, 0)
        self.refuse(open_five, "late", reserve=over)
        for fl_id in "xyz":
            assert open_five.select(fl_id, number=6, reserve=over)[0] is Selection.SELECTED
        assert open_five.select("late", number=6, reserve=over)[0] is Selection.FULL

    def test_a_little_lateness_is_forgiven(self, open_five: Shared) -> None:
        self.refuse(open_five, "late", reserve=Reserve(0, 0, 60_000))
        for fl_id, word in (("x", Selection.SELECTED), ("y", Selection.SELECTED), ("z", Selection.FULL)):
            assert open_five.select(fl_id, number=6, reserve=Reserve(0, 0, 60_000))[0] is word
        assert open_five.select("late", number=6)[0] is Selection.SELECTED

    def test_an_unfit_request_leaves_the_place_reserved(self, open_five: Shared) -> None:
        self.refuse(open_five, "late")
        assert open_five.select("late", number=6, fit=False)[0] is Selection.UNFIT
        assert self.waiting(open_five) == keys_of("late")

    def test_who_waits_is_brought_back(self, open_five: Shared) -> None:
        """Each server tells whom it has refused, the one earlier than the other, and some have a place since."""

        def tell(**returns_ms: int) -> int:
            waiting = {client_key(fl_id): Reserve(ms, 0, 5_000) for fl_id, ms in returns_ms.items()}
            return open_five.run(open_five.state.restore_waiting(5, waiting, places=3))  # type: ignore[no-any-return]

        open_five.select("placed")
        assert tell(late=9_000, overdue=-2_000, placed=9_000) == 2
        assert self.waiting(open_five) == keys_of("late", "overdue")
        last = self.returns(open_five, "late")
        assert tell(late=3_000) == 0
        assert self.returns(open_five, "late") == last
        assert tell(late=60_000) == 0
        assert self.returns(open_five, "late") > last
        lifetime = open_five.command("PTTL", open_five.state.keys.waiting)
        assert lifetime == pytest.approx(65_000, abs=2_000)
        assert tell(**{f"l{i}": 1_000 for i in range(20)}) == 10, (
            "no more than four iterations have places for"
        )
        assert open_five.select("x")[0] is Selection.FULL
        assert open_five.select("late")[0] is Selection.SELECTED

    def test_the_list_expires_with_its_last_place(self, open_five: Shared) -> None:
        for returns, expected in ((5_000, 6_000), (90_000, 91_000), (7_000, 91_000)):
            for i in range(4):
                open_five.select(f"c{i}", reserve=Reserve(returns, 0, 1_000))
            lifetime = open_five.command("PTTL", open_five.state.keys.waiting)
            assert lifetime == pytest.approx(expected, abs=2_000)


class TestAccept:
    @pytest.fixture
    def ready(self, open_five: Shared) -> Shared:
        """Three clients have places; two updates complete the iteration."""
        for fl_id in "abc":
            open_five.select(fl_id)
        return open_five

    def test_nothing_is_counted_until_others_have_told_what_redis_lost(self, ready: Shared) -> None:
        """A client may have its update at one of them, and come again elsewhere."""
        run_id = ready.state.redis.run_id
        ready.run(ready.state.await_nodes(run_id, "node-1", ["node-2", "node-3"]))
        ready.run(ready.state.nodes_are_back(run_id, "node-1", ["node-1", "node-2"]))
        with pytest.raises(OthersAwaited):
            ready.accept("a")
        assert ready.uploads() == {}
        ready.run(
            ready.state.await_nodes(run_id, "node-1", ["node-2"])
        )  # as a third one sees it, which comes later
        ready.run(ready.state.nodes_are_back(run_id, "node-1", ["node-3"]))
        assert ready.accept("a") == (Acceptance.ACCEPTED, 1, META)
        assert 0 < int(ready.command("TTL", ready.state.keys.awaited(run_id))) <= 3600

    def test_no_place_is_given_until_then_either(self, open_five: Shared) -> None:
        """Who was first to come back may have stood still, and know an iteration that is long over."""
        open_five.select("a")
        run_id = open_five.state.redis.run_id
        open_five.run(open_five.state.await_nodes(run_id, "node-1", ["node-2"]))
        open_five.run(open_five.state.nodes_are_back(run_id, "node-1", ["node-1"]))
        for fl_id in ("a", "b"):
            with pytest.raises(OthersAwaited):
                open_five.select(fl_id)
        assert open_five.run(open_five.state.holds_off())
        assert open_five.run(open_five.state.places_taken(5)) == 1
        open_five.run(open_five.state.nodes_are_back(run_id, "node-2", ["node-2"]))
        assert not open_five.run(open_five.state.holds_off())
        assert open_five.select("b") == (Selection.SELECTED, 2)

    def test_places_wait_for_nobody_for_long(self, open_five: Shared) -> None:
        open_five.run(open_five.state.await_nodes(open_five.state.redis.run_id, "node-1", ["node-2"]))
        awaited = open_five.state.keys.awaited(open_five.state.redis.run_id)
        for node in ("node-1", "node-2"):
            open_five.command("HINCRBY", awaited, node, -1600)
        assert open_five.select("a") == (Selection.SELECTED, 1)

    def test_the_roll_tells_who_is_back_and_who_may_still_come(self, ready: Shared) -> None:
        run_id = ready.state.redis.run_id
        assert ready.run(ready.state.roll()) == Roll(frozenset(), frozenset())
        assert not Roll(frozenset(), frozenset()).complete, "no loss is known"
        ready.run(ready.state.await_nodes(run_id, "node-1", ["node-2", "node-3", keys.ANYBODY]))
        ready.run(ready.state.nodes_are_back(run_id, "node-1", ["node-1", "node-2"]))
        there = ready.run(ready.state.roll())
        assert there == Roll(frozenset({"node-1", "node-2"}), frozenset({"node-3", keys.ANYBODY}))
        assert not there.complete
        seconds, micros = ready.command("TIME")
        long_ago = int(seconds) * 1000 + int(micros) // 1000 - 10_100
        ready.command("HSET", ready.state.keys.awaited(run_id), "node-3", long_ago)
        ready.run(ready.state.nodes_are_back(run_id, "node-1", [keys.ANYBODY]))
        assert ready.run(ready.state.roll()).complete, "who does not come in time is awaited no more"

    def test_who_brought_something_back_before_another_loss_is_not_back(self, ready: Shared) -> None:
        run_id = ready.state.redis.run_id
        first = ready.run(ready.state.await_nodes(run_id, "node-1", []))
        ready.command("HSET", ready.state.keys.awaited(run_id), "node-1", int(first) - 1)  # as another call
        ready.run(ready.state.nodes_are_back(run_id, "node-1", ["node-1"], first))
        assert ready.run(ready.state.roll()).awaited == {"node-1"}
        second = ready.run(ready.state.await_nodes(run_id, "node-1", ["node-2"]))
        ready.run(ready.state.nodes_are_back(run_id, "node-1", ["node-1"], second))
        ready.run(ready.state.nodes_are_back(run_id, "node-1", ["node-1"], second))
        assert ready.run(ready.state.roll()) == Roll(frozenset({"node-1"}), frozenset({"node-2"}))

    def test_the_list_tells_all_once_it_is_older_than_a_lease(self, ready: Shared) -> None:
        keys_ = ready.state.keys
        ready.command("DEL", keys_.listed)  # as a loss of data does
        assert not ready.run(ready.state.roll()).all_listed
        ready.run(ready.state.heartbeat("server", "node-1", "10.0.0.1:6000"))
        assert not ready.run(ready.state.roll()).all_listed
        since = int(ready.command("GET", keys_.listed))
        ready.command("SET", keys_.listed, since - 10_000)
        ready.run(ready.state.heartbeat("server", "node-1", "10.0.0.1:6000"))
        assert ready.run(ready.state.roll()).all_listed
        assert int(ready.command("TTL", keys_.listed)) > 10

    def test_updates_do_not_wait_for_servers_that_nobody_can_name(self, ready: Shared) -> None:
        run_id = ready.state.redis.run_id
        ready.run(ready.state.await_nodes(run_id, "node-1", [keys.ANYBODY]))
        with pytest.raises(OthersAwaited):
            ready.accept("a")
        ready.run(ready.state.nodes_are_back(run_id, "node-1", ["node-1"]))
        assert ready.accept("a") == (Acceptance.ACCEPTED, 1, META)

    def test_updates_wait_for_those_who_may_know_an_older_instance(self, ready: Shared) -> None:
        ready.run(ready.state.await_founders())
        with pytest.raises(OthersAwaited):
            ready.accept("a")
        assert ready.run(ready.state.roll()) == Roll(frozenset(), frozenset()), "no judgement waits for them"
        awaited = ready.state.keys.awaited(ready.state.redis.run_id)
        ready.command("HINCRBY", awaited, keys.FOUNDERS, -1600)
        assert ready.accept("a") == (Acceptance.ACCEPTED, 1, META)

    def test_a_sealed_iteration_takes_back_what_redis_forgot(self, ready: Shared) -> None:
        """Asked again by the server whose answer was lost: its client may know by another one that it counts."""
        ready.accept("a")
        assert ready.seal()
        assert ready.accept("b") == (Acceptance.FULL, 1, None)
        assert ready.accept("b", quorum=1, again=True) == (Acceptance.FULL, 1, None), "nothing is missing"
        assert ready.accept("b", again=True) == (Acceptance.ACCEPTED, 2, META)
        assert ready.accept("c", quorum=9) == (Acceptance.FULL, 2, None)

    def test_so_does_one_that_is_being_summed_until_its_model_is_made(self, ready: Shared) -> None:
        ready.accept("a")
        token = ready.claimed()
        assert ready.accept("b", again=True) == (Acceptance.ACCEPTED, 2, META)
        assert not ready.record(token, updates=1), "of the sum that was under way"
        assert ready.record(token, updates=2)
        assert ready.accept("c", quorum=9, again=True) == (Acceptance.FULL, 2, None)

    def test_nobody_may_be_back(self, ready: Shared) -> None:
        """So it is where a ledger is adopted whose owner Redis does not know any more."""
        ready.run(ready.state.nodes_are_back(ready.state.redis.run_id, "node-1", []))
        assert ready.accept("a") == (Acceptance.ACCEPTED, 1, META)

    def test_nobody_is_awaited_for_long(self, ready: Shared) -> None:
        run_id = ready.state.redis.run_id
        ready.run(ready.state.await_nodes(run_id, "node-1", ["node-2"]))
        seconds, micros = ready.command("TIME")
        long_ago = int(seconds) * 1000 + int(micros) // 1000 - 1600
        ready.command("HSET", ready.state.keys.awaited(run_id), "node-1", long_ago, "node-2", long_ago)
        assert ready.accept("a") == (Acceptance.ACCEPTED, 1, META)

    def test_a_counted_update_is_known_meanwhile(self, ready: Shared) -> None:
        assert ready.accept("a") == (Acceptance.ACCEPTED, 1, META)
        ready.run(ready.state.await_nodes(ready.state.redis.run_id, "node-1", ["node-2"]))
        assert ready.accept("a")[0] is Acceptance.ACCEPTED
        assert ready.accept("a", ledger_id="L2")[0] is Acceptance.REPEATED

    def test_counts_and_tells_what_the_client_declared(self, ready: Shared) -> None:
        assert ready.accept("a") == (Acceptance.ACCEPTED, 1, META)
        assert ready.accept("b", ledger_id="L2") == (Acceptance.ACCEPTED, 2, META)
        assert ready.run(ready.state.uploads_by_ledger(5)) == {"L1": 1, "L2": 1}

    def test_never_counts_beyond_the_quorum(self, open_five: Shared) -> None:
        for i in range(50):
            open_five.select(f"c{i}", places=50)
        answers = open_five.together(
            [open_five.accepting(f"c{i}", quorum=20, ledger_id=f"L{i % 3}") for i in range(50)]
        )
        accepted = [count for word, count, _ in answers if word is Acceptance.ACCEPTED]
        assert sorted(accepted) == list(range(1, 21))
        assert sum(word is Acceptance.FULL for word, _, _ in answers) == 30
        assert open_five.read().iteration.uploaded == 20
        assert sum(open_five.run(open_five.state.uploads_by_ledger(5)).values()) == 20

    def test_one_client_counts_once_however_often_it_comes(self, ready: Shared) -> None:
        answers = ready.together([ready.accepting("a") for _ in range(50)])
        assert answers == [(Acceptance.ACCEPTED, 1, META)] * 50
        assert ready.read().iteration.uploaded == 1

    def test_a_repeat_to_another_ledger_is_no_second_update(self, ready: Shared) -> None:
        ready.accept("a")
        assert ready.accept("a", ledger_id="L2")[0] is Acceptance.REPEATED
        assert ready.run(ready.state.uploads_by_ledger(5)) == {"L1": 1}

    @pytest.mark.parametrize("phase", [Phase.SEALED, Phase.REDUCING, Phase.CANDIDATE])
    def test_a_repeat_is_answered_in_every_phase(self, ready: Shared, phase: Phase) -> None:
        """The reply may have been lost just before the seal."""
        ready.accept("a")
        ready.set_status(phase=phase.value)
        assert ready.accept("a") == (Acceptance.ACCEPTED, 1, META)
        assert ready.accept("a", ledger_id="L2")[0] is Acceptance.REPEATED
        assert ready.accept("b")[0] is Acceptance.FULL
        assert ready.read().iteration.uploaded == 1

    def test_a_repeat_after_the_iteration_is_still_known(self, ready: Shared) -> None:
        ready.accept("a")
        ready.advance()
        assert ready.accept("a", number=6)[0] is Acceptance.REPEATED
        assert ready.accept("a", number=6, ledger_id="L2")[0] is Acceptance.REPEATED
        assert ready.accept("b", number=6)[0] is Acceptance.UNKNOWN_CLIENT
        ready.select("b", number=6)
        assert ready.accept("b", number=6)[0] is Acceptance.OTHER_ITERATION

    def test_a_late_question_about_an_ended_iteration_is_not_accepted(self, ready: Shared) -> None:
        """The first reply was lost; meanwhile the iteration ended, with or without this update."""
        ready.accept("a")
        ready.advance()
        with pytest.raises(IterationMoved) as moved:
            ready.accept("a")
        assert moved.value.number == 6

    def test_the_order_of_refusals_is_the_protocols(self, ready: Shared) -> None:
        assert ready.accept("stranger", requested=4, fit=False)[0] is Acceptance.UNKNOWN_CLIENT
        assert ready.accept("a", requested=4, fit=False)[0] is Acceptance.OTHER_ITERATION
        assert ready.accept("a", requested=-1)[0] is Acceptance.OTHER_ITERATION
        assert ready.accept("a", requested=4)[1] == 5  # the number for the text
        assert ready.accept("a", fit=False)[0] is Acceptance.UNFIT
        assert ready.read().iteration.uploaded == 0
        ready.accept("b"), ready.accept("c")
        assert ready.accept("stranger", requested=4, fit=False)[0] is Acceptance.FULL
        assert ready.accept("a")[0] is Acceptance.FULL

    def test_an_unfit_repeat_of_a_counted_update_is_a_repeat(self, ready: Shared) -> None:
        ready.accept("a")
        assert ready.accept("a", fit=False)[0] is Acceptance.ACCEPTED  # the intake knows what it holds

    @elsewhere
    def test_elsewhere_nothing_is_accepted(
        self, ready: Shared, move: Callable[[Shared], object], number: int
    ) -> None:
        move(ready)
        with pytest.raises(IterationMoved) as moved:
            ready.accept("a")
        assert moved.value.number == number
        ready.set_status(iterationNum=5, runningState=0)
        assert ready.read().iteration.uploaded == 0

    @pytest.mark.parametrize("running", [1, 2, 3])
    def test_a_repeat_is_answered_while_the_job_does_not_run(self, ready: Shared, running: int) -> None:
        """It counts; a server that only heard no would lose it, and with it the iteration."""
        ready.accept("a")
        ready.set_status(runningState=running)
        assert ready.accept("a") == (Acceptance.ACCEPTED, 1, META)

    def test_in_another_attempt_nothing_is_accepted(self, ready: Shared) -> None:
        ready.set_status(attempt=2)
        with pytest.raises(IterationMoved) as moved:
            ready.accept("a")
        assert moved.value.number == 5
        assert ready.accept("a", attempt=2)[0] is Acceptance.ACCEPTED

    def test_a_repeat_is_answered_in_a_later_attempt(self, ready: Shared) -> None:
        """The first reply was lost, then another ledger was; the update still counts, so its ledger must keep it."""
        ready.accept("a")
        ready.accept("b", ledger_id="L2")
        assert ready.reopen("L2") == 1
        assert ready.accept("a") == (Acceptance.ACCEPTED, 1, META)
        assert ready.accept("a", attempt=2) == (Acceptance.ACCEPTED, 1, META)
        with pytest.raises(LedgerRevoked):
            ready.accept("b", ledger_id="L2")

    def test_without_a_status_the_caller_is_told(self, shared: Shared) -> None:
        shared.serve("L1", "node-1")
        before = shared.names()
        with pytest.raises(StateMissing):
            shared.accept("a", served=False)
        assert shared.names() == before

    def test_the_first_update_starts_the_clock_once(self, ready: Shared) -> None:
        ready.accept("a")
        began = ready.command("HGET", ready.state.keys.status, "firstUploadMs")
        ready.accept("b")
        assert ready.command("HGET", ready.state.keys.status, "firstUploadMs") == began
        assert ready.ttl(ready.state.keys.uploads(5)) == pytest.approx(ITERATION_TTL, abs=2)


class TestOwners:
    """A ledger has one owner, and changes hands by compare-and-set."""

    def test_nobody_owns_a_ledger_at_first(self, shared: Shared) -> None:
        assert shared.owner("L1") == ""
        assert not shared.own("L1", "node-1", before="node-2")
        assert shared.names() == set()

    def test_what_has_no_owner_can_be_had(self, shared: Shared) -> None:
        assert shared.own("L1", "node-1")
        assert (shared.owner("L1"), shared.owner("L2")) == ("node-1", "")
        assert shared.ttl(shared.state.keys.ledgers) == pytest.approx(JOB_TTL, abs=2)

    def test_what_somebody_owns_goes_only_to_who_names_him(self, shared: Shared) -> None:
        assert shared.own("L1", "node-1")
        for before in ("", "node-3", "node-2"):
            assert not shared.own("L1", "node-2", before=before)
        assert shared.owner("L1") == "node-1"
        assert shared.own("L1", "node-2", before="node-1")
        assert shared.owner("L1") == "node-2"
        assert not shared.own("L1", "node-1"), "the one who lost it may not claim it back"

    @pytest.mark.parametrize("before", ["", "node-1", "node-3"])
    def test_a_repeat_is_answered_as_before(self, shared: Shared, before: str) -> None:
        """The first reply may have been lost."""
        assert shared.own("L1", "node-1")
        assert shared.own("L1", "node-1", before=before)
        assert shared.owner("L1") == "node-1"

    def test_each_claim_renews_the_list(self, shared: Shared) -> None:
        shared.own("L1", "node-1")
        shared.command("EXPIRE", shared.state.keys.ledgers, 60)
        assert not shared.own("L1", "node-2")
        assert shared.ttl(shared.state.keys.ledgers) <= 60
        assert shared.own("L1", "node-1")
        assert shared.ttl(shared.state.keys.ledgers) == pytest.approx(JOB_TTL, abs=2)

    def test_of_many_heirs_only_one_wins(self, shared: Shared) -> None:
        shared.own("L1", "dead")
        won = shared.together([shared.state.own_ledger("L1", f"n{i}", "dead") for i in range(50)])
        assert won.count(True) == 1
        assert shared.owner("L1") == f"n{won.index(True)}"

    def test_all_are_told(self, shared: Shared) -> None:
        assert shared.run(shared.state.ledgers()) == {}
        shared.own("L1", "node-1")
        shared.own("L2", keys.REVOKED)
        assert shared.run(shared.state.ledgers()) == {"L1": "node-1", "L2": keys.REVOKED}

    def test_a_forgotten_one_is_like_a_new_one(self, shared: Shared) -> None:
        shared.own("L1", "node-1")
        shared.own("L2", "node-1")
        for _ in range(2):
            shared.run(shared.state.forget_ledger("L1"))
        assert (shared.owner("L1"), shared.owner("L2")) == ("", "node-1")
        assert shared.own("L1", "node-2")

    def test_a_lease_lasts_as_long_as_the_heart_beats(self, shared: Shared) -> None:
        assert not shared.run(shared.state.is_alive("server", "n"))
        shared.run(shared.state.heartbeat("server", "n", "addr"))
        assert shared.run(shared.state.is_alive("server", "n"))
        assert not shared.run(shared.state.is_alive("worker", "n"))
        assert not shared.run(shared.state.is_alive("server", "m"))
        shared.die("n")
        assert not shared.run(shared.state.is_alive("server", "n"))
        shared.run(shared.state.heartbeat("server", "n", "addr"))
        shared.run(shared.state.leave("server", "n"))
        assert not shared.run(shared.state.is_alive("server", "n"))


class TestWhoMayHaveUpdatesCounted:
    @pytest.fixture
    def ready(self, open_five: Shared) -> Shared:
        """Two clients have places; node-1 owns L1, node-2 owns L2."""
        for fl_id in "ab":
            open_five.select(fl_id)
        open_five.serve("L1", "node-1")
        open_five.serve("L2", "node-2")
        return open_five

    def ask(self, shared: Shared, fl_id: str, ledger_id: str, node_id: str) -> Acceptance:
        """Ask as a server that does nothing for its ownership and its lease."""
        return shared.accept(fl_id, ledger_id=ledger_id, node_id=node_id, served=False)[0]

    def refused(self, shared: Shared, error: type[Exception], ledger_id: str, node_id: str) -> None:
        """Nothing is counted, whatever is asked."""
        before = shared.read().iteration
        for details in ({}, {"fit": False}, {"requested": 4}, {"number": 6}, {"attempt": 2}):
            with pytest.raises(error):
                shared.accept("b", ledger_id=ledger_id, node_id=node_id, served=False, **details)
        assert shared.read().iteration == before

    def test_the_owner_while_its_lease_holds(self, ready: Shared) -> None:
        assert self.ask(ready, "a", "L1", "node-1") is Acceptance.ACCEPTED
        assert self.ask(ready, "b", "L2", "node-2") is Acceptance.ACCEPTED

    def test_not_another_server(self, ready: Shared) -> None:
        self.refused(ready, LedgerRevoked, "L1", "node-2")

    def test_not_one_whose_ledger_is_not_on_the_list(self, ready: Shared) -> None:
        self.refused(ready, LedgerRevoked, "L3", "node-1")
        ready.run(ready.state.forget_ledger("L1"))
        self.refused(ready, LedgerRevoked, "L1", "node-1")
        ready.serve("L1", "node-1")
        assert self.ask(ready, "b", "L1", "node-1") is Acceptance.ACCEPTED

    def test_not_one_whose_ledger_was_taken_over(self, ready: Shared) -> None:
        """From the moment of the takeover the heir may rely on what is counted: nothing comes after it."""
        assert self.ask(ready, "a", "L1", "node-1") is Acceptance.ACCEPTED
        assert ready.own("L1", "node-2", before="node-1")
        self.refused(ready, LedgerRevoked, "L1", "node-1")
        with pytest.raises(LedgerRevoked):
            self.ask(ready, "a", "L1", "node-1")  # not even a repeat: the update is the heir's
        assert set(ready.counted("L1", "a", "b")) == {"a"}

    def test_not_one_whose_lease_has_run_out(self, ready: Shared) -> None:
        assert self.ask(ready, "a", "L1", "node-1") is Acceptance.ACCEPTED
        ready.die("node-1")
        self.refused(ready, LeaseLapsed, "L1", "node-1")
        with pytest.raises(LeaseLapsed):
            self.ask(ready, "a", "L1", "node-1")
        ready.run(ready.state.heartbeat("server", "node-1", "address"))
        for fl_id in "ab":
            assert self.ask(ready, fl_id, "L1", "node-1") is Acceptance.ACCEPTED

    def test_that_a_ledger_was_revoked_is_said_before_that_the_lease_has_run_out(self, ready: Shared) -> None:
        """A lapsed lease comes back with the next heartbeat; a revoked ledger does not."""
        ready.die("node-1")
        assert ready.own("L1", "node-2", before="node-1")
        self.refused(ready, LedgerRevoked, "L1", "node-1")

    def test_a_worker_s_heart_is_no_server_s_lease(self, ready: Shared) -> None:
        ready.die("node-1")
        ready.run(ready.state.heartbeat("worker", "node-1", "address"))
        self.refused(ready, LeaseLapsed, "L1", "node-1")

    def test_a_repeat_to_another_server_is_known_whoever_that_is(self, ready: Shared) -> None:
        assert self.ask(ready, "a", "L1", "node-1") is Acceptance.ACCEPTED
        assert self.ask(ready, "a", "L2", "node-2") is Acceptance.REPEATED
        assert self.ask(ready, "a", "L3", "node-3") is Acceptance.REPEATED, "neither owner nor alive"
        ready.die("node-1")  # the update counts all the same
        assert self.ask(ready, "a", "L2", "node-2") is Acceptance.REPEATED
        assert ready.run(ready.state.uploads_by_ledger(5)) == {"L1": 1}

    def test_a_repeat_to_the_heir_of_the_ledger_is_known_there(self, ready: Shared) -> None:
        assert self.ask(ready, "a", "L1", "node-1") is Acceptance.ACCEPTED
        assert ready.own("L1", "node-2", before="node-1")
        assert self.ask(ready, "a", "L1", "node-2") is Acceptance.ACCEPTED  # it knows what it holds
        assert ready.read().iteration.uploaded == 1

    def test_of_what_a_ledger_recorded_the_counted_are_told(self, ready: Shared) -> None:
        self.ask(ready, "a", "L1", "node-1")
        self.ask(ready, "b", "L2", "node-2")
        assert ready.counted("L1", "a", "b", "stranger") == {"a": META}
        assert ready.counted("L2", "stranger", "b", "a", "b") == {"b": META}
        assert ready.counted("L3", "a", "b") == {}
        assert ready.counted("L1") == {}
        assert ready.counted("L1", "a", number=6) == {}

    def test_what_was_counted_is_told_while_the_ended_iteration_is_remembered(self, ready: Shared) -> None:
        self.ask(ready, "a", "L1", "node-1")
        ready.advance()
        assert ready.counted("L1", "a") == {"a": META}


class TestSeal:
    def test_is_done_once(self, open_five: Shared) -> None:
        assert open_five.seal()
        assert open_five.read().iteration == Iteration(5, phase=Phase.SEALED, base="b0")
        assert not open_five.seal()

    def test_needs_the_quorum(self, open_five: Shared) -> None:
        for fl_id in "ab":
            open_five.select(fl_id)
        assert not open_five.seal(quorum=1)
        open_five.accept("a")
        assert not open_five.seal(quorum=2)
        assert open_five.read().iteration.phase is Phase.COLLECTING
        open_five.accept("b")
        assert open_five.seal(quorum=2)

    def test_more_than_the_quorum_will_do(self, open_five: Shared) -> None:
        """More may be counted after Redis has lost data."""
        open_five.restore("L1", *"abc")
        assert open_five.seal(quorum=2)

    def test_notes_its_moment(self, open_five: Shared) -> None:
        open_five.seal()
        sealed = open_five.moments()["sealedMs"]
        seconds, micros = (int(part) for part in open_five.command("TIME"))
        assert 0 <= seconds * 1000 + micros // 1000 - sealed < 20_000

    def test_of_many_only_one_wins(self, open_five: Shared) -> None:
        assert open_five.together([open_five.state.seal(5, 1, 0) for _ in range(50)]).count(True) == 1

    @pytest.mark.parametrize("other", [{"number": 4}, {"number": 6}, {"attempt": 2}, {"attempt": 0}])
    def test_from_another_state_nothing_changes(self, open_five: Shared, other: dict[str, int]) -> None:
        before = open_five.status()
        assert not open_five.seal(**other)
        assert open_five.status() == before

    @pytest.mark.parametrize("phase", [Phase.REDUCING, Phase.CANDIDATE])
    def test_there_is_no_way_back(self, open_five: Shared, phase: Phase) -> None:
        open_five.set_status(phase=phase.value)
        assert not open_five.seal()
        assert open_five.read().iteration.phase is phase

    @pytest.mark.parametrize("running", [1, 2, 3])
    def test_a_job_that_does_not_run_stays_where_it_is(self, open_five: Shared, running: int) -> None:
        open_five.set_status(runningState=running)
        assert not open_five.seal()

    def test_without_a_status_nothing_is_written(self, shared: Shared) -> None:
        assert not shared.seal()
        assert not shared.record("1:node-1")
        assert shared.claim() is None
        assert shared.reopen("L1") is None
        assert not shared.advance()
        assert shared.names() == set()


class TestCandidate:
    def test_is_named_once(self, open_five: Shared) -> None:
        token = open_five.claimed()
        assert open_five.read().iteration == Iteration(5, phase=Phase.REDUCING, token=token, base="b0")
        assert open_five.record(token, "d1")
        assert not open_five.record(token, "d2")
        assert open_five.read().iteration == Iteration(
            5, phase=Phase.CANDIDATE, token=token, digest="d1", base="b0"
        )

    def test_only_by_the_finaliser(self, open_five: Shared) -> None:
        token = open_five.claimed()
        before = open_five.status()
        for other in ("", token.replace("node-1", "node-2"), f"{token} ", "0:node-1"):
            assert not open_five.record(other)
        assert open_five.status() == before
        successor, *_ = open_five.claim("node-2", token) or ("",)
        assert not open_five.record(token), "it was succeeded"
        assert open_five.record(successor, "d2")

    def test_not_before_there_is_a_finaliser(self, open_five: Shared) -> None:
        for token in ("", "1:node-1"):
            assert not open_five.record(token)
        open_five.seal()
        before = open_five.status()
        for token in ("", "1:node-1"):
            assert not open_five.record(token)
        assert open_five.status() == before

    @pytest.mark.parametrize("other", [{"number": 4}, {"number": 6}, {"attempt": 2}, {"attempt": 0}])
    def test_not_of_another_iteration_or_attempt(self, open_five: Shared, other: dict[str, int]) -> None:
        token = open_five.claimed()
        before = open_five.status()
        assert not open_five.record(token, "d1", **other)
        assert open_five.status() == before

    @pytest.mark.parametrize("running", [1, 2, 3])
    def test_not_of_a_job_that_does_not_run(self, open_five: Shared, running: int) -> None:
        token = open_five.claimed()
        open_five.set_status(runningState=running)
        assert not open_five.record(token)


class TestMasks:
    """What the scripts do for an iteration whose devices exchange keys, and help to take masks off."""

    @pytest.fixture
    def masked(self, open_five: Shared) -> Shared:
        open_five.select("a")
        open_five.select("b")
        open_five.accept("a")
        assert self.record(open_five, open_five.claimed(), "a1", Phase.UNMASKING)
        return open_five

    @staticmethod
    def record(shared: Shared, token: str, digest: str, phase: Phase) -> bool:
        counted = len(shared.run(shared.state.uploads(5)))
        return shared.run(  # type: ignore[no-any-return]
            shared.state.record_model(5, 1, token, digest, counted, phase, exchanged=True)
        )

    def test_the_masked_mean_is_named_before_the_model(self, masked: Shared) -> None:
        now = masked.read().iteration
        assert (now.phase, now.aggregate, now.digest) == (Phase.UNMASKING, "a1", "")
        token, *named = masked.claim("node-2", now.token) or ("",)
        assert named == [Phase.UNMASKING, "a1", ""]
        assert not self.record(masked, now.token, "d1", Phase.CANDIDATE), "its finaliser is another one"
        assert self.record(masked, token, "d1", Phase.CANDIDATE)
        now = masked.read().iteration
        assert (now.phase, now.aggregate, now.digest) == (Phase.CANDIDATE, "a1", "d1")

    @pytest.mark.parametrize("phase", [Phase.UNMASKING, Phase.TRAINING])
    def test_only_a_candidate_comes_after_it(self, masked: Shared, phase: Phase) -> None:
        before = masked.status()
        assert not self.record(masked, masked.read().iteration.token, "d1", phase)
        assert masked.status() == before

    def test_nothing_is_counted_or_taken_back_any_more(self, masked: Shared) -> None:
        assert masked.accept("b", quorum=9)[0] is Acceptance.FULL
        assert masked.accept("b", quorum=9, again=True)[0] is Acceptance.FULL
        assert set(masked.run(masked.state.uploads(5))) == keys_of("a")

    def test_it_is_never_reopened(self, masked: Shared) -> None:
        before = masked.status()
        token = masked.read().iteration.token
        reopening = masked.state.reopen(5, 1, phase=Phase.UNMASKING, token=token, ledgers=["L1"])
        assert masked.run(reopening) is None
        assert masked.status() == before
        assert masked.owner("L1") == "node-1"

    def test_the_next_iteration_knows_nothing_of_it(self, masked: Shared) -> None:
        token = masked.read().iteration.token
        ending = masked.state.advance(
            5, 1, phase=Phase.UNMASKING, success=False, result="why", finishes=False, token=token
        )
        assert masked.run(ending)
        assert masked.read().iteration == Iteration(6, base="b0")
        assert masked.read().run == ""

    def test_the_first_place_says_which_redis_has_all_of_it(self, open_five: Shared) -> None:
        assert open_five.read().run == ""
        open_five.select("a")
        assert open_five.read().run == open_five.redis.run_id != ""
        open_five.set_status(run="of another one")
        open_five.select("b")
        assert open_five.read().run == "of another one"

    def test_an_iteration_begun_with_another_redis_gets_no_model(self, open_five: Shared) -> None:
        open_five.select("a")
        open_five.accept("a")
        token = open_five.claimed()
        open_five.set_status(run="of another one")
        for phase in (Phase.UNMASKING, Phase.CANDIDATE):
            assert not self.record(open_five, token, "a1", phase)
        assert open_five.record(token, "d1"), "where nothing was exchanged it does not matter"

    def test_another_redis_may_not_go_on_with_one_that_was_brought_back(self, open_five: Shared) -> None:
        """What devices exchanged is not brought back with it."""
        open_five.select("a")
        assert open_five.restore("L1", "a", "b") == 2
        assert open_five.read().run == ""
        open_five.select("c")
        assert open_five.read().run == ""

    def test_what_nobody_had_forgotten_does_not_matter(self, open_five: Shared) -> None:
        open_five.select("a")
        open_five.accept("a")
        assert open_five.restore("L1", "a") == 0
        assert open_five.read().run == open_five.redis.run_id

    def test_a_raised_status_does_not_say_which_redis_it_is_of(self, open_five: Shared) -> None:
        open_five.select("a")
        remembered = known(Iteration(5, phase=Phase.UNMASKING, aggregate="a1", base="b0"), started_ago=1.0)
        assert open_five.run(open_five.state.raise_to(remembered)) is Raised.RAISED
        now = open_five.read()
        assert (now.iteration.phase, now.iteration.aggregate, now.run) == (Phase.UNMASKING, "a1", "")

    def test_unmasking_is_further_than_reducing_and_a_candidate_than_both(self, open_five: Shared) -> None:
        for phase in (Phase.REDUCING, Phase.UNMASKING, Phase.CANDIDATE):
            assert open_five.run(open_five.state.raise_to(known(Iteration(5, phase=phase)))) is Raised.RAISED
        for phase in (Phase.REDUCING, Phase.UNMASKING):
            assert open_five.run(open_five.state.raise_to(known(Iteration(5, phase=phase)))) is Raised.KEPT

    def test_every_look_tells_how_far_the_rounds_are(self, open_five: Shared) -> None:
        assert open_five.read().rounds == ()
        seconds, micros = open_five.command("TIME")
        now = int(seconds) * 1000 + int(micros) // 1000
        rounds = open_five.state.keys.rounds(5)
        open_five.command("HSET", rounds, "getKeys", 1, "getKeys:ms", now - 2_000)
        open_five.command("HSET", rounds, "exchangeKeys", 3, "exchangeKeys:ms", now - 5_000)
        (first, count, ago), (second, fewer, since) = open_five.read().rounds
        assert (first, count, second, fewer) == ("exchangeKeys", 3, "getKeys", 1)
        assert 5.0 <= ago < 60.0 and 2.0 <= since < 57.0


class TestWorker:
    """push_weight.lua and push_metrics.lua: what a worker of hybrid training moves on."""

    @pytest.fixture
    def training(self, open_five: Shared) -> Shared:
        assert open_five.record(open_five.claimed(), "a1", phase=Phase.TRAINING)
        return open_five

    def test_the_mean_is_named_before_the_model(self, training: Shared) -> None:
        now = training.read().iteration
        assert (now.phase, now.aggregate, now.digest, now.metrics) == (Phase.TRAINING, "a1", "", None)
        assert not training.measure(), "nothing was pushed"
        assert training.push("d1")
        now = training.read().iteration
        assert (now.phase, now.aggregate, now.digest) == (Phase.TRAINED, "a1", "d1")
        assert training.measure()
        now = training.read().iteration
        assert (now.phase, now.digest, now.metrics) == (Phase.CANDIDATE, "d1", (0.1, 1 / 3))

    def test_the_first_push_counts_and_may_be_repeated(self, training: Shared) -> None:
        answers = training.together([training.state.push_weight(5, 1, "a1", f"d{i}") for i in range(20)])
        assert sum(answers) == 1
        digest = training.read().iteration.digest
        assert training.push(digest)
        assert training.measure()
        assert training.measure(), "its answer may have been lost"
        assert training.read().iteration.digest == digest

    @pytest.mark.parametrize(
        "other", [{"aggregate": "a2"}, {"number": 4}, {"number": 6}, {"attempt": 2}, {"aggregate": ""}]
    )
    def test_a_push_of_anything_else_changes_nothing(self, training: Shared, other: dict[str, Any]) -> None:
        before = training.status()
        assert not training.push("d1", **other)
        assert training.status() == before

    @pytest.mark.parametrize("running", [1, 2, 3])
    def test_nothing_is_pushed_to_a_job_that_does_not_run(self, training: Shared, running: int) -> None:
        training.set_status(runningState=running)
        assert not training.push("d1")
        training.set_status(phase=Phase.TRAINED.value)
        assert not training.measure()

    @pytest.mark.parametrize("phase", [Phase.COLLECTING, Phase.SEALED, Phase.REDUCING, Phase.CANDIDATE])
    def test_a_push_waits_for_the_mean(self, open_five: Shared, phase: Phase) -> None:
        open_five.set_status(phase=phase.value, aggregate="a1")
        assert not open_five.push("d1")

    def test_the_next_iteration_knows_nothing_of_it(self, training: Shared) -> None:
        assert training.push("d1")
        assert training.measure()
        token = training.read().iteration.token
        assert training.advance(phase=Phase.CANDIDATE, token=token, base="d1")
        assert training.read().iteration == Iteration(6, base="d1")


class TestFinaliser:
    @pytest.fixture
    def sealed(self, open_five: Shared) -> Shared:
        assert open_five.seal()
        return open_five

    def test_of_many_only_one_becomes_it(self, sealed: Shared) -> None:
        answers = sealed.together([sealed.state.claim_reduction(5, 1, "", f"n{i}") for i in range(50)])
        (winner,) = [i for i, answer in enumerate(answers) if answer is not None]
        assert answers[winner] == (f"1:n{winner}", Phase.REDUCING, "", "")
        assert sealed.read().iteration == Iteration(5, phase=Phase.REDUCING, token=f"1:n{winner}", base="b0")

    def test_who_takes_over_names_the_one_who_is_gone(self, sealed: Shared) -> None:
        first, *_ = sealed.claim("node-1") or ("",)
        for wrong in ("", "1:node-2", "2:node-1", "node-1", "01:node-1"):
            assert sealed.claim("node-2", wrong) is None
        assert sealed.read().iteration.token == first
        second, *_ = sealed.claim("node-2", first) or ("",)
        assert sealed.read().iteration == Iteration(5, phase=Phase.REDUCING, token=second, base="b0")
        assert sealed.claim("node-3", first) is None, "somebody else was faster"

    def test_of_many_heirs_only_one_takes_over(self, sealed: Shared) -> None:
        first, *_ = sealed.claim("node-1") or ("",)
        answers = sealed.together([sealed.state.claim_reduction(5, 1, first, f"n{i}") for i in range(50)])
        assert sum(answer is not None for answer in answers) == 1

    def test_fencing_numbers_never_come_again(self, sealed: Shared) -> None:
        """Neither after a take-over by the same node, nor in a later attempt or iteration."""
        tokens = [(sealed.claim("n") or ("", ""))[0]]
        tokens.append((sealed.claim("n", tokens[-1]) or ("", ""))[0])
        assert sealed.reopen("L1", phase=Phase.REDUCING, token=tokens[-1]) == 0
        assert sealed.seal(attempt=2)
        tokens.append((sealed.claim("n", attempt=2) or ("", ""))[0])
        assert sealed.advance(attempt=2, phase=Phase.REDUCING, token=tokens[-1])
        assert sealed.seal(number=6)
        tokens.append((sealed.claim("n", number=6) or ("", ""))[0])
        assert tokens == ["1:n", "2:n", "3:n", "4:n"]
        assert sealed.read().fence == 4

    def test_the_successor_learns_of_the_candidate(self, sealed: Shared) -> None:
        first, *known = sealed.claim("node-1") or ("",)
        assert known == [Phase.REDUCING, "", ""]
        assert sealed.record(first, "d1")
        second, *known = sealed.claim("node-2", first) or ("",)
        assert known == [Phase.CANDIDATE, "", "d1"]
        assert sealed.read().iteration == Iteration(
            5, phase=Phase.CANDIDATE, token=second, digest="d1", base="b0"
        )

    def test_the_successor_learns_what_the_worker_is_about(self, sealed: Shared) -> None:
        first, *_ = sealed.claim("node-1") or ("",)
        assert sealed.record(first, "a1", phase=Phase.TRAINING)
        second, *known = sealed.claim("node-2", first) or ("",)
        assert known == [Phase.TRAINING, "a1", ""]
        assert sealed.push("d1")
        _, *known = sealed.claim("node-3", second) or ("",)
        assert known == [Phase.TRAINED, "a1", "d1"]

    def test_while_updates_are_collected_there_is_none(self, open_five: Shared) -> None:
        before = open_five.status()
        assert open_five.claim() is None
        assert open_five.status() == before

    @pytest.mark.parametrize("other", [{"number": 4}, {"number": 6}, {"attempt": 2}, {"attempt": 0}])
    def test_not_of_another_iteration_or_attempt(self, sealed: Shared, other: dict[str, int]) -> None:
        before = sealed.status()
        assert sealed.claim(**other) is None  # type: ignore[arg-type]
        assert sealed.status() == before

    @pytest.mark.parametrize("running", [1, 2, 3])
    def test_not_of_a_job_that_does_not_run(self, sealed: Shared, running: int) -> None:
        sealed.set_status(runningState=running)
        before = sealed.status()
        assert sealed.claim() is None
        assert sealed.status() == before


class TestReopen:
    """An iteration goes on without the updates of lost ledgers."""

    @pytest.fixture
    def ready(self, open_five: Shared) -> Shared:
        """a and b are counted in L1, c in L2; d has only a place."""
        for fl_id in "abcd":
            open_five.select(fl_id, places=4)
        for fl_id, ledger_id in (("a", "L1"), ("b", "L1"), ("c", "L2")):
            assert open_five.accept(fl_id, ledger_id=ledger_id, quorum=3)[0] is Acceptance.ACCEPTED
        return open_five

    def test_the_clients_of_lost_ledgers_are_taken_off(self, ready: Shared) -> None:
        assert ready.reopen("L1") == 2
        assert ready.clients().keys() == keys_of("c", "d")
        assert ready.uploads() == {client_key("c"): "L2"}
        seen = ready.read().iteration
        assert (seen.attempt, seen.phase, seen.selected, seen.uploaded) == (2, Phase.COLLECTING, 2, 1)

    def test_they_may_come_again_and_the_others_need_not(self, ready: Shared) -> None:
        ready.seal()
        assert ready.reopen("L1", phase=Phase.SEALED) == 2
        assert ready.accept("a", attempt=2, ledger_id="L2")[0] is Acceptance.UNKNOWN_CLIENT
        assert ready.select("a", places=4) == (Selection.SELECTED, 3)
        assert ready.accept("a", attempt=2, ledger_id="L2", quorum=3) == (Acceptance.ACCEPTED, 2, META)
        assert ready.select("c", places=4)[0] is Selection.UPLOADED
        assert ready.select("d", places=4)[0] is Selection.KNOWN

    def test_an_iteration_that_lost_some_is_to_fill_up_anew(self, ready: Shared) -> None:
        filled = ready.status_field("filledMs")
        assert filled is not None
        assert ready.reopen("L3") == 0
        assert ready.status_field("filledMs") == filled
        assert ready.reopen("L1", attempt=2) == 2
        assert ready.status_field("filledMs") is None

    def test_several_ledgers_at_once(self, ready: Shared) -> None:
        assert ready.reopen("L1", "L2", "L3") == 3
        assert ready.clients().keys() == keys_of("d")
        assert ready.uploads() == {}
        assert {ready.owner(ledger_id) for ledger_id in ("L1", "L2", "L3")} == {keys.REVOKED}

    def test_what_is_lost_is_counted_until_the_iteration_ends(self, ready: Shared) -> None:
        assert ready.reopen("L1") == 2
        assert ready.read().iteration.lost == 2
        assert ready.reopen("L2", attempt=2) == 1
        assert ready.read().iteration.lost == 3
        assert ready.advance(attempt=3)
        assert ready.read().iteration.lost == 0

    def test_an_empty_ledger_costs_nothing(self, ready: Shared) -> None:
        assert ready.reopen("L3") == 0
        seen = ready.read().iteration
        assert (seen.attempt, seen.lost, seen.selected, seen.uploaded) == (2, 0, 4, 3)

    def test_a_revoked_ledger_cannot_be_used_any_more(self, ready: Shared) -> None:
        ready.reopen("L1")
        for node_id, before in (("node-1", ""), ("node-1", "node-1"), ("node-2", "node-1"), ("node-2", "")):
            assert not ready.own("L1", node_id, before)
        assert ready.owner("L1") == keys.REVOKED
        assert ready.select("a", places=4)[0] is Selection.SELECTED
        for attempt in (1, 2):
            with pytest.raises(LedgerRevoked):
                ready.accept("a", attempt=attempt, served=False)
            with pytest.raises(LedgerRevoked):
                ready.accept("d", attempt=attempt, served=False)
        assert ready.uploads() == {client_key("c"): "L2"}
        assert ready.accept("c", attempt=2, ledger_id="L2")[0] is Acceptance.ACCEPTED, "the other one stays"

    def test_the_clocks_stood_still_while_it_was_sealed(self, ready: Shared) -> None:
        assert ready.seal()
        sealed = ready.moments()["sealedMs"] - 100_000
        ready.set_status(startedMs=sealed - 50_000, firstUploadMs=sealed - 20_000, sealedMs=sealed)
        assert ready.reopen("L1", phase=Phase.SEALED) == 2
        snapshot = ready.read()
        assert snapshot.started_ago == pytest.approx(50, abs=10)
        assert snapshot.first_upload_ago == pytest.approx(20, abs=10)
        assert snapshot.sealed_ago is None
        moments = ready.moments()
        assert moments["firstUploadMs"] - moments["startedMs"] == 30_000

    def test_the_clocks_of_a_collecting_one_go_on(self, ready: Shared) -> None:
        before = ready.moments()
        assert before.keys() == {"startedMs", "firstUploadMs"}
        ready.reopen("L1")
        assert ready.moments() == before

    def test_a_clock_that_did_not_run_does_not_begin(self, open_five: Shared) -> None:
        open_five.seal()
        assert open_five.reopen("L1", phase=Phase.SEALED) == 0
        assert open_five.moments() == {}

    def test_the_finaliser_and_its_candidate_are_forgotten(self, ready: Shared) -> None:
        token = ready.claimed()
        ready.record(token, "d1")
        assert ready.reopen("L1", phase=Phase.CANDIDATE, token=token) == 2
        assert ready.status() == {
            "iterationNum": "5",
            "lastIterationSuccess": "1",
            "lastIterationResult": "fine",
            "runningState": "0",
            "attempt": "2",
            "phase": "collecting",
            "base": "b0",
            "fence": "1",
            "lost": "2",
            "run": ready.redis.run_id,
        }
        assert not ready.advance(phase=Phase.CANDIDATE, token=token, base="d1"), "it is too late"
        assert not ready.advance(attempt=2, phase=Phase.CANDIDATE, token=token)

    def test_of_many_only_one_wins(self, ready: Shared) -> None:
        works = [
            ready.state.reopen(5, 1, phase=Phase.COLLECTING, token="", ledgers=["L1"]) for _ in range(50)
        ]
        assert sorted(ready.together(works), key=str) == [2, *[None] * 49]
        assert ready.read().iteration.attempt == 2

    @pytest.mark.parametrize(
        "other",
        [
            {"number": 4},
            {"number": 6},
            {"attempt": 2},
            {"phase": Phase.COLLECTING},
            {"phase": Phase.SEALED},
            {"token": ""},
            {"token": "2:node-1"},
        ],
    )
    def test_from_another_state_nothing_changes(self, ready: Shared, other: dict[str, Any]) -> None:
        token = ready.claimed()
        before = ready.status(), ready.clients(), ready.uploads()
        assert ready.reopen("L1", **{"phase": Phase.REDUCING, "token": token, **other}) is None
        assert (ready.status(), ready.clients(), ready.uploads()) == before
        assert ready.owner("L1") == "node-1"

    @pytest.mark.parametrize("running", [1, 2, 3])
    def test_not_of_a_job_that_does_not_run(self, ready: Shared, running: int) -> None:
        ready.set_status(runningState=running)
        assert ready.reopen("L1") is None
        assert ready.owner("L1") == "node-1"

    def test_the_list_of_owners_does_not_stay_for_ever(self, open_five: Shared) -> None:
        """Redis may have forgotten the list."""
        assert open_five.reopen("L1") == 0
        assert open_five.ttl(open_five.state.keys.ledgers) == pytest.approx(JOB_TTL, abs=2)


class TestAdvance:
    @pytest.mark.parametrize("success", [True, False])
    def test_opens_the_next_iteration(self, open_five: Shared, success: bool) -> None:
        open_five.select("a")
        open_five.accept("a")
        token = open_five.claimed()
        open_five.record(token, "d1")
        open_five.command("EXPIRE", open_five.state.keys.status, 9)
        assert open_five.advance(phase=Phase.CANDIDATE, success=success, result="why", token=token)
        assert open_five.status() == {
            "iterationNum": "6",
            "lastIterationSuccess": "1" if success else "0",
            "lastIterationResult": "why",
            "runningState": "0",
            "attempt": "1",
            "phase": "collecting",
            "base": "b0",
            "fence": "1",
        }
        assert open_five.moments() == {}
        assert open_five.ttl(open_five.state.keys.status) == pytest.approx(JOB_TTL, abs=2)
        for key in (open_five.state.keys.clients(5), open_five.state.keys.uploads(5)):
            assert open_five.ttl(key) == pytest.approx(keys.RELEASE_TTL_S, abs=2)

    def test_what_the_iteration_took_from_its_last_place_on_is_remembered(self, open_five: Shared) -> None:
        for fl_id in "ab":
            open_five.select(fl_id, places=2)
        open_five.set_status(filledMs=self.filled(open_five) - 7_000)
        assert open_five.read().typical is None
        assert open_five.advance()
        assert open_five.read().typical == pytest.approx(7.0, abs=2.0)
        assert open_five.status_field("filledMs") is None

    @pytest.mark.parametrize(("success", "places"), [(True, 3), (False, 2)])
    def test_one_that_did_not_fill_up_or_failed_changes_nothing_of_that(
        self, open_five: Shared, success: bool, places: int
    ) -> None:
        open_five.set_status(typicalMs=1_500)
        for fl_id in "ab":
            open_five.select(fl_id, places=places)
        assert open_five.advance(success=success)
        assert open_five.read().typical == 1.5

    def test_a_clock_that_was_set_back_says_nothing(self, open_five: Shared) -> None:
        open_five.select("a", places=1)
        open_five.set_status(filledMs=self.filled(open_five) + 3_600_000)
        assert open_five.advance()
        assert open_five.read().typical is None

    def filled(self, shared: Shared) -> int:
        """When the last place was taken."""
        return int(shared.status_field("filledMs") or 0)

    def test_of_many_only_one_wins(self, open_five: Shared) -> None:
        works = [
            open_five.state.advance(
                5, 1, success=False, result=f"{i}", finishes=False, phase=Phase.COLLECTING
            )
            for i in range(50)
        ]
        won = open_five.together(works)
        assert won.count(True) == 1
        snapshot = open_five.read()
        assert (snapshot.iteration.number, snapshot.result) == (6, f"{won.index(True)}")

    @pytest.mark.parametrize("other", [{"number": 4}, {"number": 6}, {"attempt": 2}])
    def test_another_iteration_is_left_alone(self, open_five: Shared, other: dict[str, int]) -> None:
        before = open_five.status()
        assert not open_five.advance(**other)  # type: ignore[arg-type]
        assert open_five.status() == before

    @pytest.mark.parametrize("phase", [Phase.SEALED, Phase.REDUCING, Phase.CANDIDATE])
    def test_a_clock_that_ran_out_elsewhere_does_not_end_a_sealed_iteration(
        self, open_five: Shared, phase: Phase
    ) -> None:
        open_five.set_status(phase=phase.value)
        before = open_five.status()
        assert not open_five.advance(phase=Phase.COLLECTING, success=False)
        assert open_five.status() == before
        assert open_five.advance(phase=phase, success=False)

    def test_only_the_finaliser_may_publish(self, open_five: Shared) -> None:
        token = open_five.claimed()
        before = open_five.status()
        for other in ("", "1:node-2", f"{token}0"):
            assert not open_five.advance(phase=Phase.REDUCING, token=other, base="b1")
        assert open_five.status() == before
        assert open_five.advance(phase=Phase.REDUCING, token=token, base="b1")

    def test_without_a_finaliser_no_token_is_one(self, open_five: Shared) -> None:
        assert not open_five.advance(token="1:node-1")
        assert open_five.advance()

    def test_the_new_model_is_named_or_the_one_before_stays(self, open_five: Shared) -> None:
        assert open_five.advance(success=False)
        assert open_five.read().iteration.base == "b0"
        assert open_five.advance(number=6, base="b1")
        assert open_five.read().iteration.base == "b1"
        assert open_five.advance(number=7, success=False)
        assert open_five.read().iteration.base == "b1"

    def test_revoked_ledgers_are_forgotten_and_no_others(self, open_five: Shared) -> None:
        for ledger_id in ("L1", "L2"):
            open_five.serve(ledger_id, OWNERS[ledger_id])
        open_five.reopen("L1", "L3")
        assert open_five.advance(attempt=2)
        assert [open_five.owner(ledger_id) for ledger_id in ("L1", "L2", "L3")] == ["", "node-1", ""]

    def test_the_last_one_finishes_the_job(self, open_five: Shared) -> None:
        assert open_five.advance(finishes=True)
        assert open_five.read().iteration == Iteration(6, running=RunningState.FINISH, base="b0")

    def test_a_disabled_job_stays_disabled(self, open_five: Shared) -> None:
        open_five.set_status(runningState=1)
        assert open_five.advance(success=False)
        assert open_five.read().iteration == Iteration(6, running=RunningState.DISABLE, base="b0")


def known(iteration: Iteration, **details: Any) -> Snapshot:
    """What a server remembers of the shared state."""
    given = {"started_ago": None, "first_upload_ago": None, "sealed_ago": None, "fence": 0, "epoch": 0}
    return Snapshot(iteration, **{**given, "success": True, "result": "fine", **details})


class TestRaise:
    """A server brings back what Redis has forgotten, and never anything else."""

    def bring(self, shared: Shared, snapshot: Snapshot) -> Raised:
        return shared.run(shared.state.raise_to(snapshot))  # type: ignore[no-any-return]

    def test_all_of_it(self, shared: Shared) -> None:
        iteration = Iteration(
            5, 2, Phase.CANDIDATE, token="7:node-1", digest="d1", base="b0", lost=3, interrupted=True
        )
        remembered = known(iteration, fence=7, epoch=2, success=False, result="why: ü", typical=1.5)
        assert self.bring(shared, remembered) is Raised.RAISED
        assert shared.look() == Look("i_1", remembered)
        for key in (keys.instance_name(shared.state.keys.fl_name), shared.state.keys.status):
            assert shared.ttl(key) == pytest.approx(JOB_TTL, abs=2)
        assert self.bring(shared, remembered) is Raised.KEPT, "again, it changes nothing"
        assert shared.look() == Look("i_1", remembered)

    @pytest.mark.parametrize("running", RunningState)
    def test_whether_the_job_runs(self, shared: Shared, running: RunningState) -> None:
        assert self.bring(shared, known(Iteration(5, running=running))) is Raised.RAISED
        assert shared.read().iteration == Iteration(5, running=running)

    def test_what_was_not_known_is_not_made_up(self, shared: Shared) -> None:
        self.bring(shared, known(Iteration(5)))
        assert shared.status() == {
            "iterationNum": "5",
            "attempt": "1",
            "phase": "collecting",
            "epoch": "0",
            "fence": "0",
            "lastIterationSuccess": "1",
            "lastIterationResult": "fine",
            "runningState": "0",
            "base": "",
            "lost": "0",
        }
        assert shared.moments() == {}

    def test_how_long_ago_things_were(self, shared: Shared) -> None:
        remembered = known(
            Iteration(5, phase=Phase.SEALED), started_ago=100.0, first_upload_ago=60.5, sealed_ago=30.25
        )
        assert self.bring(shared, remembered) is Raised.RAISED
        snapshot = shared.read()
        assert snapshot.started_ago == pytest.approx(100, abs=10)
        assert snapshot.first_upload_ago == pytest.approx(60, abs=10)
        assert snapshot.sealed_ago == pytest.approx(30, abs=10)
        moments = shared.moments()
        assert moments["sealedMs"] - moments["startedMs"] == 69_750
        assert moments["firstUploadMs"] - moments["startedMs"] == 39_500

    @pytest.mark.parametrize(
        ("there", "here", "outcome"),
        [
            ((5, 1, Phase.COLLECTING), (5, 1, Phase.COLLECTING), Raised.KEPT),
            ((5, 1, Phase.COLLECTING), (6, 1, Phase.COLLECTING), Raised.RAISED),
            ((5, 1, Phase.COLLECTING), (10, 1, Phase.COLLECTING), Raised.RAISED),
            ((5, 1, Phase.COLLECTING), (5, 2, Phase.COLLECTING), Raised.RAISED),
            ((5, 1, Phase.COLLECTING), (5, 1, Phase.SEALED), Raised.RAISED),
            ((5, 1, Phase.SEALED), (5, 1, Phase.REDUCING), Raised.RAISED),
            ((5, 1, Phase.REDUCING), (5, 1, Phase.CANDIDATE), Raised.RAISED),
            ((5, 9, Phase.CANDIDATE), (6, 1, Phase.COLLECTING), Raised.RAISED),
            ((5, 9, Phase.CANDIDATE), (5, 10, Phase.COLLECTING), Raised.RAISED),
            ((6, 1, Phase.COLLECTING), (5, 9, Phase.CANDIDATE), Raised.KEPT),
            ((10, 1, Phase.COLLECTING), (9, 1, Phase.COLLECTING), Raised.KEPT),
            ((5, 10, Phase.COLLECTING), (5, 9, Phase.CANDIDATE), Raised.KEPT),
            ((5, 1, Phase.SEALED), (5, 1, Phase.COLLECTING), Raised.KEPT),
            ((5, 1, Phase.CANDIDATE), (5, 1, Phase.REDUCING), Raised.KEPT),
            ((5, 1, Phase.CANDIDATE), (5, 1, Phase.CANDIDATE), Raised.KEPT),
        ],
    )
    def test_who_is_further_on_counts(
        self,
        open_five: Shared,
        there: tuple[int, int, Phase],
        here: tuple[int, int, Phase],
        outcome: Raised,
    ) -> None:
        number, attempt, phase = there
        open_five.set_status(iterationNum=number, attempt=attempt, phase=phase.value)
        before = open_five.read()
        remembered = known(Iteration(*here, base="b7"), fence=3)
        assert (replace(remembered.iteration, base="b0").rank > before.iteration.rank) is (
            outcome is Raised.RAISED
        )
        assert self.bring(open_five, remembered) is outcome
        assert open_five.read() == (remembered if outcome is Raised.RAISED else replace(before, fence=3))
        assert open_five.look().instance == "i_1", "the name is there again in any case"

    def test_of_what_was_behind_nothing_is_left(self, open_five: Shared) -> None:
        """A digest and a token of an attempt that is over would be taken for those of the next."""
        token = open_five.claimed()
        open_five.record(token, "d1")
        assert open_five.moments()
        assert self.bring(open_five, known(Iteration(6, base="d1"), fence=1)) is Raised.RAISED
        assert open_five.read() == known(Iteration(6, base="d1"), fence=1)
        assert open_five.moments() == {}

    @pytest.mark.parametrize(("there", "here", "after"), [(3, 9, 9), (9, 3, 9), (0, 0, 0), (10, 9, 10)])
    def test_the_number_of_tokens_never_falls(
        self, open_five: Shared, there: int, here: int, after: int
    ) -> None:
        open_five.set_status(fence=there)
        assert self.bring(open_five, known(Iteration(6), fence=here)) is Raised.RAISED
        assert open_five.read().fence == after
        assert open_five.seal(number=6)
        assert (open_five.claim(number=6) or ("",))[0] == f"{after + 1}:node-1"

    def test_a_status_of_the_original_is_judged_by_its_number(self, shared: Shared) -> None:
        shared.set_status(iterationNum=5, lastIterationSuccess=1, lastIterationResult="", runningState=0)
        assert self.bring(shared, known(Iteration(5))) is Raised.KEPT
        assert self.bring(shared, known(Iteration(5, phase=Phase.SEALED))) is Raised.RAISED

    # ---- other instances

    @pytest.mark.parametrize("epoch", [3, 11])
    def test_a_newer_instance_counts(self, open_five: Shared, epoch: int) -> None:
        newer = open_five.another("i_2")
        newer.create(1)
        newer.set_status(epoch=epoch)
        newer.name("i_2")
        before = open_five.status(), newer.status()
        assert self.bring(open_five, known(Iteration(9), epoch=2)) is Raised.NEWER
        assert (open_five.status(), newer.status()) == before
        assert open_five.look().instance == "i_2"

    @pytest.mark.parametrize("epoch", [None, 0, 1])
    def test_an_older_one_does_not_count(self, shared: Shared, epoch: int | None) -> None:
        """It came up again because Redis had forgotten what came after it."""
        older = shared.another("i_0")
        older.create(99)
        if epoch is not None:
            older.set_status(epoch=epoch)
        older.name("i_0")
        assert self.bring(shared, known(Iteration(2), epoch=2)) is Raised.RAISED
        assert shared.look() == Look("i_1", known(Iteration(2), epoch=2))
        assert older.read().iteration.number == 99

    def test_of_two_made_at_the_same_time_the_one_that_is_named_first_stays(self, shared: Shared) -> None:
        """Else their servers would take the name from each other for ever."""
        first, second = shared.another("i_1"), shared.another("i_2")
        for instance, named in ((first, "i_2"), (second, "i_1")):
            instance.create(5)
            instance.name(named)
        assert self.bring(second, known(Iteration(9))) is Raised.NEWER
        first.name("i_2")
        assert self.bring(first, known(Iteration(5))) is Raised.KEPT
        assert shared.look().instance == "i_1"
        assert self.bring(second, known(Iteration(9))) is Raised.NEWER
        assert shared.look().instance == "i_1"

    def test_a_name_without_a_status_is_a_newer_one(self, open_five: Shared) -> None:
        """So a scheduler of the original begins one: its servers write the status afterwards."""
        open_five.name("i_2")
        assert self.bring(open_five, known(Iteration(9), epoch=2)) is Raised.NEWER
        assert open_five.look().instance == "i_2"
        open_five.another("i_2").set_status(runningState=1)
        assert self.bring(open_five, known(Iteration(9), epoch=2)) is Raised.NEWER

    def test_a_name_that_is_missing_is_brought_back_with_or_without_the_status(
        self, open_five: Shared
    ) -> None:
        assert open_five.look().instance == ""
        before = open_five.status()
        assert self.bring(open_five, known(Iteration(5))) is Raised.KEPT
        assert open_five.look().instance == "i_1"
        assert open_five.status() == before

    def test_the_order_in_which_servers_do_it_does_not_matter(
        self, loop: ReactorThread, redis: Redis
    ) -> None:
        steps = [
            known(Iteration(5, attempt, phase), fence=attempt)
            for attempt in (1, 2)
            for phase in list(Phase)[:2]
        ]
        ends = set()
        for order in itertools.permutations(steps):
            shared = fresh(loop, redis)
            shared.together([shared.state.raise_to(step) for step in order])
            ends.add(repr(shared.look()))
        assert ends == {repr(Look("i_1", steps[-1]))}


class TestRestoreClients:
    def test_places_and_updates_come_back(self, open_five: Shared) -> None:
        assert open_five.restore("L1", "a", "b") == 2
        assert open_five.clients() == dict.fromkeys(keys_of("a", "b"), META)
        assert open_five.uploads() == dict.fromkeys(keys_of("a", "b"), "L1")
        assert open_five.owner("L1") == "node-1"
        seen = open_five.read().iteration
        assert (seen.selected, seen.uploaded) == (2, 2)
        for key in (open_five.state.keys.clients(5), open_five.state.keys.uploads(5)):
            assert open_five.ttl(key) == pytest.approx(ITERATION_TTL, abs=2)
        assert open_five.ttl(open_five.state.keys.ledgers) == pytest.approx(JOB_TTL, abs=2)

    def test_then_they_count_as_before(self, open_five: Shared) -> None:
        open_five.restore("L1", "a")
        assert open_five.select("a")[0] is Selection.UPLOADED
        assert open_five.accept("a") == (Acceptance.ACCEPTED, 1, META)
        assert open_five.accept("a", ledger_id="L0")[0] is Acceptance.REPEATED
        assert open_five.counted("L1", "a") == {"a": META}

    def test_a_place_alone(self, open_five: Shared) -> None:
        assert open_five.restore("", "a", "b") == 0
        assert open_five.clients().keys() == keys_of("a", "b")
        assert open_five.uploads() == {}
        assert not open_five.command("EXISTS", open_five.state.keys.ledgers)
        assert open_five.select("a")[0] is Selection.KNOWN
        assert open_five.accept("a")[0] is Acceptance.ACCEPTED

    def test_what_is_known_never_changes(self, open_five: Shared) -> None:
        for fl_id in "ab":
            open_five.select(fl_id)
        open_five.accept("a")
        other = ClientMeta(1, 1, 1)
        assert open_five.restore("L1", "a", "b", "c", meta=other) == 2
        assert open_five.clients() == {
            client_key("a"): META,
            client_key("b"): META,
            client_key("c"): other,
        }
        assert open_five.restore("L0", "a", "b", "c", "d", node_id="node-2", meta=other) == 1
        assert open_five.uploads() == {
            **dict.fromkeys(keys_of("a", "b", "c"), "L1"),
            client_key("d"): "L0",
        }
        assert open_five.restore("L1", "a", "b", "c") == 0, "again, it changes nothing"

    def test_of_nobody(self, open_five: Shared) -> None:
        assert open_five.restore("L1") == 0
        assert open_five.owner("L1") == "node-1"
        assert open_five.restore("") == 0

    def test_beyond_the_quorum_and_the_places(self, open_five: Shared) -> None:
        """They were counted, and devices know it."""
        fl_ids = [f"c{i}" for i in range(50)]
        assert open_five.restore("L1", *fl_ids) == 50
        assert open_five.read().iteration.uploaded == 50
        assert open_five.select("x")[0] is Selection.FULL

    @pytest.mark.parametrize("number", [4, 6])
    def test_of_another_iteration_nothing_comes_back(self, open_five: Shared, number: int) -> None:
        before = open_five.names()
        for ledger_id in ("L1", ""):
            with pytest.raises(IterationMoved):
                open_five.restore(ledger_id, "a", number=number)
        assert open_five.names() == before

    def test_without_a_status_nothing_comes_back(self, shared: Shared) -> None:
        with pytest.raises(IterationMoved):
            shared.restore("L1", "a")
        assert shared.names() == set()

    @pytest.mark.parametrize("owner", ["node-2", keys.REVOKED])
    def test_of_a_ledger_that_is_another_s_or_nobody_s(self, open_five: Shared, owner: str) -> None:
        open_five.own("L1", owner)
        assert open_five.restore("L1", "a") is None
        assert (open_five.clients(), open_five.uploads(), open_five.owner("L1")) == ({}, {}, owner)

    @pytest.mark.parametrize("phase", [Phase.COLLECTING, Phase.SEALED, Phase.REDUCING])
    def test_as_long_as_there_is_no_model(self, open_five: Shared, phase: Phase) -> None:
        open_five.set_status(phase=phase.value, runningState=1, attempt=4)
        assert open_five.restore("L1", "a") == 1

    def test_not_once_the_model_is_made(self, open_five: Shared) -> None:
        """What counts then is what is in it."""
        open_five.set_status(phase=Phase.CANDIDATE.value, updates=0)
        for ledger_id in ("L1", ""):
            with pytest.raises(IterationMoved):
                open_five.restore(ledger_id, "a")
        assert (open_five.clients(), open_five.uploads(), open_five.owner("L1")) == ({}, {}, "")

    def test_the_ledgers_live_on_with_the_status(self, open_five: Shared) -> None:
        open_five.command("PERSIST", open_five.state.keys.status)
        assert open_five.restore("L1", "a") == 1
        assert open_five.owner("L1") == "node-1"

    @pytest.mark.parametrize(("base", "taken"), [("b0", True), ("", True), ("b1", False)])
    @pytest.mark.parametrize("ledger_id", ["L1", ""])
    def test_only_what_was_trained_from_this_model(
        self, open_five: Shared, ledger_id: str, base: str, taken: bool
    ) -> None:
        if taken:
            assert open_five.restore(ledger_id, "a", base=base) == len(ledger_id) // 2
            return
        before = open_five.names()
        why = open_five.left_out(ledger_id, "a", base=base)
        assert (why.updates, why.rebased) == (len(ledger_id) // 2, True)
        assert open_five.names() == before

    def test_a_status_without_a_model_takes_all(self, open_five: Shared) -> None:
        open_five.set_status(base="")
        assert open_five.restore("L1", "a", base="b1") == 1

    def test_of_another_model_those_are_not_lost_that_count_elsewhere(self, open_five: Shared) -> None:
        open_five.restore("L0", "a", node_id="node-2")
        assert open_five.left_out("L1", "a", "b", "c", base="b1").updates == 2

    @pytest.mark.parametrize("advanced", [True, False])
    def test_those_who_come_too_late_are_counted(self, open_five: Shared, advanced: bool) -> None:
        """Redis knows for a while who was counted in an iteration that is over, or has its model."""
        open_five.restore("L0", "a", "b", node_id="node-2")
        if advanced:
            assert open_five.advance()
        else:
            open_five.set_status(phase=Phase.CANDIDATE.value, updates=2)
        why = open_five.left_out("L1", "b", "c", "d", base="b0")
        assert (why.updates, why.rebased) == (2, False)
        assert open_five.left_out("L0", "a", "b", node_id="node-2").updates == 0, "they count"
        assert open_five.left_out("", "x").updates == 0, "a place is no update"

    def test_of_an_iteration_that_is_forgotten_nobody_can_say(self, open_five: Shared) -> None:
        open_five.restore("L0", "a", node_id="node-2")
        assert open_five.advance()
        open_five.command("DEL", open_five.state.keys.uploads(5))
        assert open_five.left_out("L1", "b").updates == 0

    def test_of_a_ledger_of_another_node_nothing_is_lost(self, open_five: Shared) -> None:
        open_five.restore("L0", "a", node_id="node-2")
        open_five.own("L1", "node-2")
        assert open_five.advance()
        assert open_five.left_out("L1", "b").updates == 0

    def test_of_a_ledger_that_was_given_up_nothing_is_lost_again(self, open_five: Shared) -> None:
        """Who gave it up has told so, and once the iteration is over the list of owners does not know it any more."""
        open_five.restore("L1", "a")
        open_five.restore("L0", "b", node_id="node-2")
        assert open_five.reopen("L1") == 1
        assert open_five.advance(attempt=2)
        assert open_five.owner("L1") == ""
        assert open_five.left_out("L1", "a").updates == 0
        assert open_five.ttl(open_five.state.keys.revoked) == pytest.approx(JOB_TTL, abs=2)


def test_an_interruption_can_be_forgotten(open_five: Shared) -> None:
    open_five.set_status(disabled=1, runningState=1)
    assert open_five.read().iteration.interrupted
    for _ in range(2):
        open_five.run(open_five.state.forget_interruption())
        assert open_five.read().iteration == Iteration(5, running=RunningState.DISABLE, base="b0")


class TestRebase:
    """Nobody has the model any more that the shared state names."""

    def rebase(
        self, shared: Shared, before: str, after: str, number: int = 5, finishes: bool = False
    ) -> Rebased:
        return shared.run(shared.rebasing(before, after, number, finishes))  # type: ignore[no-any-return]

    def test_one_of_many_names_another(self, open_five: Shared) -> None:
        words = open_five.together([open_five.rebasing("b0", f"b{i}") for i in range(1, 51)])
        assert (words.count(Rebased.REBASED), words.count(Rebased.OTHER)) == (1, 49)
        assert open_five.read().iteration == Iteration(5, base=f"b{words.index(Rebased.REBASED) + 1}")

    def test_who_knows_an_older_one_does_not(self, open_five: Shared) -> None:
        for before in ("", "b", "b1"):
            assert self.rebase(open_five, before, "b9") is Rebased.OTHER
        assert open_five.read().iteration == Iteration(5, base="b0")

    @pytest.mark.parametrize("number", [4, 6])
    def test_in_another_iteration_it_stays(self, open_five: Shared, number: int) -> None:
        assert self.rebase(open_five, "b0", "b1", number) is Rebased.OTHER
        assert open_five.read().iteration == Iteration(5, base="b0")

    @pytest.mark.parametrize("finishes", [False, True])
    def test_an_iteration_whose_clients_train_from_it_ends(self, open_five: Shared, finishes: bool) -> None:
        open_five.select("a")
        open_five.accept("a")
        open_five.reopen("L2")
        token = (open_five.seal(attempt=2), open_five.claim(attempt=2))[1]
        assert token is not None
        assert open_five.record(token[0], attempt=2)
        assert self.rebase(open_five, "b0", "b1", finishes=finishes) is Rebased.ENDED
        assert open_five.status() == {
            "iterationNum": "6",
            "lastIterationSuccess": "0",
            "lastIterationResult": "the model is gone",
            "runningState": "2" if finishes else "0",
            "attempt": "1",
            "phase": "collecting",
            "base": "b1",
            "fence": "1",
        }
        assert open_five.moments() == {}

    def test_a_sealed_iteration_without_clients_ends_too(self, open_five: Shared) -> None:
        """Its finaliser sums for the model that is gone."""
        open_five.seal()
        assert self.rebase(open_five, "b0", "b1") is Rebased.ENDED
        assert open_five.read().iteration == Iteration(6, base="b1")

    def test_without_a_status_nothing_is_written(self, shared: Shared) -> None:
        assert self.rebase(shared, "", "b1") is Rebased.OTHER
        assert shared.names() == set()

    def test_where_none_is_named(self, shared: Shared) -> None:
        shared.set_status(iterationNum=5)
        assert self.rebase(shared, "", "b1") is Rebased.REBASED
        assert shared.read().iteration.base == "b1"
        assert self.rebase(shared, "", "b2") is Rebased.OTHER


class TestNotices:
    """Every change of the status is told at once."""

    @pytest.fixture
    def heard(self, open_five: Shared, shared_server: PrivateRedis) -> Iterator[list[bytes]]:
        words: list[bytes] = []
        endpoint = TCP4ClientEndpoint(open_five.loop.reactor, "127.0.0.1", shared_server.port, timeout=3)

        def start() -> Notices:
            notices = Notices(
                endpoint, "redis", words.append, reply_timeout=5.0, reactor=open_five.loop.reactor
            )
            notices.follow(keys.changes(open_five.state.keys.fl_name))
            notices.startService()
            return notices

        notices = open_five.loop.call(start)
        wait_until(lambda: words == [b""], "a subscription", 20.0)
        words.clear()
        yield words
        open_five.loop.call(notices.stopService)

    def after(self, shared: Shared, heard: list[bytes]) -> list[bytes]:
        """What was heard so far."""
        shared.command("PUBLISH", keys.changes(shared.state.keys.fl_name), "the end")
        wait_until(lambda: b"the end" in heard, "the last notice", 20.0)
        words = heard[: heard.index(b"the end")]
        heard.clear()
        return words

    def test_of_a_whole_iteration(self, open_five: Shared, heard: list[bytes]) -> None:
        token = open_five.claimed()
        assert open_five.record(token, "d1")
        assert open_five.advance(phase=Phase.CANDIDATE, token=token, base="d1")
        assert self.after(open_five, heard) == [b"sealed", b"advanced"]

    def test_of_what_goes_wrong(self, open_five: Shared, heard: list[bytes]) -> None:
        assert open_five.reopen("L1") == 0
        assert open_five.run(open_five.rebasing("b0", "b1")) is Rebased.REBASED
        open_five.run(open_five.state.announce_release())
        assert self.after(open_five, heard) == [b"reopened", b"rebased", b"released"]

    def test_what_did_not_happen_is_not_told(self, open_five: Shared, heard: list[bytes]) -> None:
        assert not open_five.seal(quorum=1)
        assert open_five.reopen("L1", attempt=2) is None
        assert not open_five.advance(number=6)
        assert open_five.run(open_five.rebasing("b1", "b2")) is Rebased.OTHER
        assert self.after(open_five, heard) == []

    def test_other_jobs_are_not_heard(
        self, open_five: Shared, heard: list[bytes], loop: ReactorThread, redis: Redis
    ) -> None:
        other = fresh(loop, redis)
        other.create()
        assert other.advance()
        assert self.after(open_five, heard) == []


class TestNodes:
    def test_the_living_are_listed_in_order(self, shared: Shared) -> None:
        for node_id in ("b", "a", "c"):
            shared.run(shared.state.heartbeat("server", node_id, f"10.0.0.1:{ord(node_id)}"))
        shared.run(shared.state.heartbeat("worker", "w", "w"))
        assert shared.run(shared.state.nodes("server")) == [
            Node("a", "server", "10.0.0.1:97"),
            Node("b", "server", "10.0.0.1:98"),
            Node("c", "server", "10.0.0.1:99"),
        ]
        assert shared.run(shared.state.nodes("worker")) == [Node("w", "worker", "w")]

    def test_a_heart_beats_for_ten_seconds(self, shared: Shared) -> None:
        shared.create()
        shared.run(shared.state.offer_hyper_parameters({"x": 1}))
        shared.run(claim_instance(shared.redis, shared.state.keys.fl_name, "i_1", 100))
        lasting = [
            shared.state.keys.nodes("server"),
            keys.instance_name(shared.state.keys.fl_name),
            shared.state.keys.status,
            shared.state.keys.hyper_params,
        ]
        for key in lasting[1:]:
            shared.command("EXPIRE", key, 60)
        shared.run(shared.state.heartbeat("server", "n", "addr"))
        assert 9 <= shared.ttl(shared.state.keys.heartbeat("server", "n")) <= 10
        for key in lasting:
            assert shared.ttl(key) == pytest.approx(JOB_TTL, abs=2)

    def test_the_dead_are_forgotten(self, shared: Shared) -> None:
        for node_id in "ab":
            shared.run(shared.state.heartbeat("server", node_id, "addr"))
        shared.command("PEXPIRE", shared.state.keys.heartbeat("server", "a"), 0)  # as after ten seconds
        assert [node.node_id for node in shared.run(shared.state.nodes("server"))] == ["b"]
        assert shared.command("HKEYS", shared.state.keys.nodes("server")) == [b"b"]
        shared.run(shared.state.heartbeat("server", "a", "addr2"))
        assert [node.node_id for node in shared.run(shared.state.nodes("server"))] == ["a", "b"]

    def test_who_leaves_is_gone_at_once(self, shared: Shared) -> None:
        shared.run(shared.state.heartbeat("server", "a", "addr"))
        shared.run(shared.state.leave("server", "a"))
        assert shared.run(shared.state.nodes("server")) == []
        assert shared.names() == {shared.state.keys.listed}

    def test_real_node_ids(self, shared: Shared) -> None:
        node_id = "127.0.0.1:6766::2022-11-22-10:00:00.001.002::69383"
        shared.run(shared.state.heartbeat("server", node_id, "127.0.0.1:6766"))
        assert shared.run(shared.state.nodes("server")) == [Node(node_id, "server", "127.0.0.1:6766")]


class TestJob:
    def test_the_first_server_names_the_instance(self, shared: Shared) -> None:
        job = shared.state.keys.fl_name
        assert shared.run(current_instance(shared.redis, job)) is None
        names = shared.together([claim_instance(shared.redis, job, f"i_{i}", 77) for i in range(50)])
        assert len(set(names)) == 1
        assert shared.run(current_instance(shared.redis, job)) == names[0]
        assert shared.ttl(keys.instance_name(job)) == pytest.approx(77, abs=2)

    def test_the_first_server_names_the_hyper_parameters(self, shared: Shared) -> None:
        def text() -> Any:
            return shared.run(hyper_parameters_text(shared.redis, shared.state.keys.fl_name, "i_1"))

        assert text() is None
        shared.run(shared.state.offer_hyper_parameters({"b": 0.1, "a": "ü"}))
        shared.run(shared.state.offer_hyper_parameters({"b": 2}))
        assert json.loads(text()) == {"a": "ü", "b": 0.1}
        assert shared.ttl(shared.state.keys.hyper_params) == pytest.approx(JOB_TTL, abs=2)

    def test_the_first_server_describes_the_model(self, shared: Shared) -> None:
        texts = shared.together([shared.state.offer_model_info(f"model {i}") for i in range(50)])
        assert set(texts) == {texts[0]}
        assert texts[0].startswith(b"model ")
        assert shared.another("i_2").run(shared.state.offer_model_info("other")) == texts[0], (
            "it is the job's"
        )
        assert shared.ttl(keys.model_info(shared.state.keys.fl_name)) == pytest.approx(JOB_TTL, abs=2)

    def test_every_key_is_one_of_the_documented(self, shared: Shared) -> None:
        job = shared.state.keys.fl_name
        shared.run(claim_instance(shared.redis, job, "i_1", 100))
        shared.create()
        shared.run(shared.state.offer_hyper_parameters({}))
        shared.run(shared.state.offer_model_info("[]"))
        shared.run(shared.state.heartbeat("server", "n", "addr"))
        shared.run(shared.state.heartbeat("worker", "w", "w"))
        shared.select("a", places=1)
        shared.select("b", places=1)
        shared.accept("a", node_id="n")
        assert shared.names() == {
            f"ms_fl:{job}:InstanceName:String",
            f"ms_fl:{job}:ModelInfo:String",
            f"ms_fl:{job}:i_1:status:Hash",
            f"ms_fl:{job}:i_1:hyperParams:String",
            f"ms_fl:{job}:i_1:server:Hash",
            f"ms_fl:{job}:i_1:server:heartbeat:n:String",
            f"ms_fl:{job}:i_1:listed:String",
            f"ms_fl:{job}:i_1:worker:Hash",
            f"ms_fl:{job}:i_1:worker:heartbeat:w:String",
            f"ms_fl:{job}:i_1:waiting:ZSet",
            f"ms_fl:{job}:i_1:ledgers:Hash",
            f"ms_fl:{job}:i_1:5:clients:Hash",
            f"ms_fl:{job}:i_1:5:uploads:Hash",
        }

    def test_no_key_stays_for_ever(self, shared: Shared) -> None:
        self.test_every_key_is_one_of_the_documented(shared)
        assert [name for name in shared.names() if shared.ttl(name) < 0] == []


# ---- the connection


class TestConnection:
    def test_a_redis_that_is_not_there_is_said_at_once(
        self, loop: ReactorThread, own_server: PrivateRedis
    ) -> None:
        own_server.stop(keep=False)
        errors: list[str] = []
        with redis_client(loop, own_server.port, errors=errors) as redis:
            with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{own_server.port}"):
                loop.run(redis.command("PING"))
            assert not redis.available
            assert errors == ["failed"]
            own_server.start()
            loop.run(redis.connected())
            assert redis.available
            assert loop.run(redis.command("PING")) == b"PONG"

    def test_data_survive_a_restart(self, loop: ReactorThread, own_server: PrivateRedis) -> None:
        with redis_client(loop, own_server.port) as redis:
            loop.run(redis.connected())
            shared = fresh(loop, redis)
            shared.create()
            shared.select("a")
            shared.accept("a")
            shared.seal()
            before = shared.read()
            own_server.restart(keep=True)
            with pytest.raises(StoreUnavailable):
                while True:  # the loss of the connection may not have been noticed yet
                    shared.read()
            loop.run(redis.connected())
            after = shared.read()
            assert (
                after.iteration
                == before.iteration
                == Iteration(5, 1, Phase.SEALED, selected=1, uploaded=1, base="b0")
            )
            assert after.started_ago >= before.started_ago
            assert shared.accept("a") == (Acceptance.ACCEPTED, 1, META)

    def test_lost_data_are_noticed_as_lost(self, loop: ReactorThread, own_server: PrivateRedis) -> None:
        with redis_client(loop, own_server.port) as redis:
            loop.run(redis.connected())
            shared = fresh(loop, redis)
            shared.create()
            shared.select("a")
            own_server.stop(keep=False)
            self.wait_for_loss(loop, redis)
            own_server.start()
            loop.run(redis.connected())
            assert shared.read() is None
            with pytest.raises(StateMissing):
                shared.accept("a")
            assert shared.create(6)
            assert shared.read().iteration == Iteration(6, base="b0")

    def test_forgotten_scripts_are_sent_again(self, loop: ReactorThread, own_server: PrivateRedis) -> None:
        with redis_client(loop, own_server.port) as redis:
            loop.run(redis.connected())
            shared = fresh(loop, redis)
            shared.create()
            assert shared.select("a") == (Selection.SELECTED, 1)
            shared.command("SCRIPT", "FLUSH")
            assert shared.select("b") == (Selection.SELECTED, 2)
            assert shared.select("c") == (Selection.SELECTED, 3)

    def test_a_paused_redis_is_given_up_after_the_reply_time_out(
        self, loop: ReactorThread, own_server: PrivateRedis
    ) -> None:
        errors: list[str] = []
        with redis_client(loop, own_server.port, reply_timeout=0.3, errors=errors) as redis:
            loop.run(redis.connected())
            shared = fresh(loop, redis)
            shared.create()
            with own_server.paused():
                for failure in self.outcomes(loop, [shared.state.read() for _ in range(20)]):
                    assert isinstance(failure, StoreUnavailable)
                assert len(errors) == 20
                assert not redis.available
            loop.run(redis.connected())
            assert shared.read().iteration == Iteration(5, base="b0")

    def test_who_asks_until_it_is_answered_does_not_block_the_reactor(
        self, loop: ReactorThread, own_server: PrivateRedis
    ) -> None:
        """A repeat must wait for a new connection, not go down the one that has just timed out."""
        with redis_client(loop, own_server.port, reply_timeout=0.3) as redis:
            loop.run(redis.connected())
            shared = fresh(loop, redis)
            shared.create()
            shared.select("a")
            asked: list[None] = []

            async def persist() -> Any:
                while True:
                    asked.append(None)
                    try:
                        return await shared.accepting("a")
                    except StoreUnavailable:
                        await redis.connected()

            with own_server.paused():
                pending = loop.run(self.begin(*(persist() for _ in range(10))))
                failures = self.outcomes(loop, [redis.command("PING")])
                assert isinstance(failures[0], StoreUnavailable)
                assert len(asked) <= 20
            answers = loop.call(lambda: defer.gatherResults(pending))
            assert answers == [(Acceptance.ACCEPTED, 1, META)] * 10

    def test_a_paused_redis_is_not_taken_for_connected(
        self, loop: ReactorThread, own_server: PrivateRedis
    ) -> None:
        """The kernel accepts connections in the name of a process that stands still."""
        third: defer.Deferred[None] = defer.Deferred()
        attempts = itertools.count(1)

        def attempted() -> None:
            if next(attempts) == 3:
                third.callback(None)

        with (
            own_server.paused(),
            redis_client(loop, own_server.port, reply_timeout=0.2, on_attempt=attempted) as redis,
        ):
            (connected,) = loop.run(self.begin(redis.connected()))
            loop.call(lambda: third)  # two connections have come and gone
            assert not redis.available
            assert not connected.called

    def test_a_connection_cut_in_a_burst(self, loop: ReactorThread, own_server: PrivateRedis) -> None:
        errors: list[str] = []
        with redis_client(loop, own_server.port, errors=errors) as redis:
            loop.run(redis.connected())
            shared = fresh(loop, redis)
            burst = [redis.command("INCR", "n") for _ in range(100)]
            burst.append(redis.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no"))
            burst += [redis.command("INCR", "n") for _ in range(100)]
            outcomes = self.outcomes(loop, burst)
            assert outcomes[:100] == list(range(1, 101))
            assert all(isinstance(outcome, StoreUnavailable) for outcome in outcomes[101:])
            assert len(errors) >= 100
            loop.run(redis.connected())
            assert shared.command("GET", "n") == b"100"

    def test_an_error_of_redis_is_one_of_ours_and_harms_nobody_else(self, shared: Shared) -> None:
        shared.command("SET", shared.state.keys.status, "no hash", "EX", 60)
        with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
            shared.select("a")
        assert shared.redis.available
        assert shared.command("PING") == b"PONG"

    def test_stopping_ends_what_is_under_way(self, loop: ReactorThread, own_server: PrivateRedis) -> None:
        with redis_client(loop, own_server.port) as redis:
            loop.run(redis.connected())
            with own_server.paused():
                (pending,) = loop.run(self.begin(redis.command("PING")))
                loop.call(redis.stopService)
                with pytest.raises(StoreUnavailable):
                    loop.call(lambda: pending)
            assert not redis.available

    # ---- helpers

    @staticmethod
    async def begin(*works: Coroutine[Any, Any, Any]) -> list[defer.Deferred[Any]]:
        """Start all; what becomes of them is up to the test."""
        return [defer.Deferred.fromCoroutine(work) for work in works]

    @staticmethod
    def outcomes(loop: ReactorThread, works: list[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Start all at once; return results and exceptions."""

        async def gather() -> list[Any]:
            all_done = defer.DeferredList(
                [defer.Deferred.fromCoroutine(work) for work in works], consumeErrors=True
            )
            return [result if success else result.value for success, result in await all_done]

        return loop.run(gather())

    @staticmethod
    def wait_for_loss(loop: ReactorThread, redis: Redis) -> None:
        """Wait until the adapter knows that its connection is gone."""

        async def ask_until_refused() -> None:
            try:
                while True:
                    await redis.command("PING")
            except StoreUnavailable:
                return

        loop.run(ask_until_refused())
