"""Updates on their way into the sum, with a shared state and a thread that do what the test says, when it says so."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twisted.internet import defer, task
from twisted.logger import capturedLogs, globalLogPublisher
from twisted.python.failure import Failure
from unit.ledger.tracing import Tracing

from fedcore.core.admission import Acceptance
from fedcore.errors import LocalError, StoreUnavailable
from fedcore.ledger import layout
from fedcore.ledger.decoding import Decoder, Reading
from fedcore.ledger.files import NoSpace
from fedcore.ledger.layout import Epoch, Shape, SlotState
from fedcore.ledger.ledger import MERGE_BATCH, Ledger, Partial, Slot
from fedcore.ledger.spool import Spool
from fedcore.services import update_intake
from fedcore.services.evaluation import longest_vector
from fedcore.services.update_intake import INLINE_FLOATS, REPLICATION_MS, RETRY_S, NoRoom, UpdateIntake
from fedcore.store.cluster_state import (
    ClientMeta,
    ClusterState,
    IterationMoved,
    LeaseLapsed,
    LedgerRevoked,
    MaskedUpdate,
    OthersAwaited,
    StateMissing,
)
from fedcore.store.redis import Redis
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.messages import (
    FeatureMap,
    RequestUpdateModel,
    UnsupervisedEvalItem,
    UnsupervisedEvalItems,
)

LAYOUT = Layout((Weight("w", (4,)),))
META = ClientMeta(data_size=2, eval_data_size=3, start_ms=0)
ROOM_TIMEOUT = 8.0
SLOTS = 4
BODY = 16
ACCEPTED, REPEATED = Acceptance.ACCEPTED, Acceptance.REPEATED


# ---- the world around the intake


@dataclass(eq=False)
class Question:
    """One call of accept_upload that waits for its answer."""

    asked: tuple[Any, ...]
    again: bool = False
    vector: bytes = b""
    kept: int = 0
    masked: MaskedUpdate | None = None
    reply: defer.Deferred[tuple[Acceptance, int, ClientMeta | None]] = field(default_factory=defer.Deferred)

    def answer(self, acceptance: Acceptance, count: int = 1) -> None:
        self.reply.callback((acceptance, count, META if acceptance is ACCEPTED else None))

    def fail(self, error: Exception) -> None:
        self.reply.errback(error)

    def lose(self) -> None:
        self.fail(StoreUnavailable("gone"))


class SharedState:
    """Stands for ClusterState and its connection; keeps every question until the test answers it."""

    def __init__(self) -> None:
        self.questions: list[Question] = []
        self.redis = self
        self.replicas = 0
        self.replications: list[defer.Deferred[bool]] = []  # with replicas: asked for, not answered
        self.patience: list[int] = []
        self._back: list[defer.Deferred[None]] | None = None

    async def accept_upload(
        self,
        number: int,
        attempt: int,
        requested: int,
        fl_id: str,
        *,
        quorum: int,
        ledger_id: str,
        node_id: str,
        fit: bool,
        again: bool = False,
        vector: bytes = b"",
        kept: int = 0,
        masked: MaskedUpdate | None = None,
    ) -> tuple[Acceptance, int, ClientMeta | None]:
        asked = (number, attempt, requested, fl_id, quorum, ledger_id, node_id, fit)
        question = Question(asked, again, vector, kept, masked)
        self.questions.append(question)
        return await question.reply

    async def replicated(self, timeout_ms: int) -> bool:
        self.patience.append(timeout_ms)
        if not self.replicas:
            return True
        answer: defer.Deferred[bool] = defer.Deferred()
        self.replications.append(answer)
        return await answer

    async def connected(self) -> None:
        if self._back is not None:
            waiter: defer.Deferred[None] = defer.Deferred()
            self._back.append(waiter)
            await waiter

    def go_away(self) -> None:
        self._back = []

    def come_back(self) -> None:
        back, self._back = self._back or [], None
        for waiter in back:
            waiter.callback(None)


def test_the_shared_state_of_these_tests_has_the_real_one_s_interface() -> None:
    for name, kind in (("accept_upload", ClusterState), ("replicated", Redis), ("connected", Redis)):
        ours, real = (inspect.signature(getattr(each, name)) for each in (SharedState, kind))
        assert ours == real


class Reactor(task.Clock):
    """Time and threads that go on when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: deque[Callable[[], None]] = deque()

    def getThreadPool(self) -> Reactor:
        return self

    def callInThreadWithCallback(
        self, on_result: Callable[[bool, Any], None], function: Callable[[], Any]
    ) -> None:
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
        """Let the thread do its oldest job."""
        self.jobs.popleft()()


def epoch_of(number: int) -> Epoch:
    return Epoch("instance", number, f"{number:064x}")


class Ledgers:
    """Stands for the real one, with one ledger in memory.

    Attributes:
        begun: the epochs that were begun.
    """

    def __init__(self, own: Ledger, durable: bool) -> None:
        self.own: Ledger | None = own
        self.problem = ""
        self.durable = durable
        self.adopted: dict[str, Partial] = {}
        self.begun: list[Epoch] = []

    def begin(self, epoch: Epoch) -> None:
        self.begun.append(epoch)


class World:
    """An intake, and short words for what happens to it."""

    def __init__(
        self,
        directory: Path,
        *,
        threads: bool = False,
        durable: bool = False,
        slots: int = SLOTS,
        vectors_kept: int = 0,
    ) -> None:
        self.shared = SharedState()
        self.reactor = Reactor()
        shape = Shape.of(LAYOUT, "job", clients=64, slots=slots, slot_size=64)
        self.storage = Tracing(shape.size)
        self.ledger = Ledger.create(self.storage, LAYOUT, shape)
        self.ledgers = Ledgers(self.ledger, durable)
        floats = INLINE_FLOATS + 1 if threads else INLINE_FLOATS
        self.intake = UpdateIntake(
            self.ledgers,  # type: ignore[arg-type]
            directory / "spool",
            "node-1",
            floats,
            ROOM_TIMEOUT,
            self.reactor,
            vectors_kept,
        )
        self.number = 5
        self.intake.begin(epoch_of(5))

    def begin(self, number: int, attempt: int = 1) -> None:
        """The server goes to another iteration, and so do the devices."""
        self.number = number
        self.intake.begin(epoch_of(number), attempt)

    def upload(
        self,
        fl_id: str,
        value: float = 1.0,
        *,
        fit: bool = True,
        slot: Slot | None = None,
        attempt: int = 1,
        evaluation: UnsupervisedEvalItems | None = None,
        reading: Reading | None = None,
        iteration: int | None = None,
        masked: MaskedUpdate | None = None,
    ) -> defer.Deferred[tuple[Acceptance, int]]:
        """A device's update comes in; its question is the newest of ``shared.questions``."""
        slot = slot or self.complete(self.intake.receive(BODY))
        slot.length = BODY
        values = np.frombuffer(slot.buffer[:BODY], np.float32)
        values[:] = value
        request = RequestUpdateModel(
            fl_id=fl_id,
            iteration=self.number if iteration is None else iteration,
            feature_map=(FeatureMap("w", values),),
            timestamp="1",
            upload_loss=0.5,
            upload_accuracy=0.25,
            unsupervised_eval_items=evaluation,
        )
        return start(
            self.intake.accept(
                slot,
                request,
                self.shared,  # type: ignore[arg-type]
                self.number,
                attempt,
                quorum=9,
                fit=fit,
                reading=reading,
                masked=masked,
            )
        )

    def complete(self, room: Slot | Spool) -> Slot:
        """All of a body is there, and there is a slot for it."""
        return result_of(start(self.intake.slot_for(room)))  # type: ignore[no-any-return]

    def accepted(self, fl_id: str, value: float = 1.0, *, slot: Slot | None = None, attempt: int = 1) -> None:
        uploaded = self.upload(fl_id, value, slot=slot, attempt=attempt)
        self.shared.questions[-1].answer(ACCEPTED)
        assert result_of(uploaded) == (ACCEPTED, 1)

    def seal(self, attempt: int = 1) -> defer.Deferred[Partial]:
        return start(self.intake.seal(self.number, attempt))

    @property
    def free_slots(self) -> int:
        return self.ledger.free_slots

    def on_record(self) -> dict[str, SlotState]:
        """What a crash now would leave: client -> state, of updates that are in no sum."""
        _, found = layout.examine(memoryview(bytearray(self.storage.content)))
        return {entry.record.fl_id: entry.state for entry in found.pending}

    def flushes(self) -> int:
        return self.storage.trace.count(None)


def start(work: Coroutine[Any, Any, Any]) -> defer.Deferred[Any]:
    return defer.Deferred.fromCoroutine(work)


def result_of(done: defer.Deferred[Any]) -> Any:
    """Return the result of something that must be over; raise what it raised."""
    assert done.called, "still under way"
    outcome: list[Any] = []
    done.addBoth(outcome.append)
    if isinstance(outcome[0], Failure):
        outcome[0].raiseException()
    return outcome[0]


def sums_of(partial: Partial) -> list[float]:
    return partial.sums.tolist()


def clients(*fl_ids: str) -> set[bytes]:
    return {layout.client_hash(fl_id) for fl_id in fl_ids}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def threaded(tmp_path: Path) -> World:
    return World(tmp_path, threads=True)


@pytest.fixture
def durable(tmp_path: Path) -> World:
    return World(tmp_path, durable=True)


# ---- acceptance


class TestAccept:
    def test_what_is_accepted_is_in_the_sum(self, world: World) -> None:
        world.accepted("a", 1.0)
        world.accepted("b", 10.0)
        partial = result_of(world.seal())
        assert sums_of(partial) == [11.0] * 4
        assert (partial.ledger_id, partial.iteration) == (world.ledger.id, 5)
        totals = partial.totals
        assert (totals.count, totals.data_size, totals.eval_data_size) == (2, 4, 6)
        assert (totals.loss, totals.accuracy) == (2.0, 1.5)
        assert set(partial.clients) == clients("a", "b")
        assert world.free_slots == SLOTS

    def test_asks_with_what_it_was_given(self, world: World) -> None:
        world.upload("a", fit=False)
        assert world.shared.questions[0].asked == (5, 1, 5, "a", 9, world.ledger.id, "node-1", False)

    @pytest.mark.parametrize("word", [word for word in Acceptance if word is not ACCEPTED])
    def test_what_is_refused_leaves_the_slot_to_the_caller(self, world: World, word: Acceptance) -> None:
        uploaded = world.upload("a")
        world.shared.questions[0].answer(word, 7)
        assert result_of(uploaded) == (word, 7)
        assert world.free_slots == SLOTS - 1
        assert sums_of(result_of(world.seal())) == [0.0] * 4

    @pytest.mark.parametrize("error", [IterationMoved(6), StateMissing("none")])
    def test_a_shared_state_elsewhere_is_the_callers_business(self, world: World, error: Exception) -> None:
        uploaded = world.upload("a")
        sealed = world.seal()
        assert not sealed.called
        world.shared.questions[0].reply.errback(error)
        with pytest.raises(type(error)):
            result_of(uploaded)
        assert result_of(sealed).totals.count == 0

    def test_a_lost_reply_is_asked_for_until_it_comes(self, world: World) -> None:
        uploaded = world.upload("a", 3.0)
        for times in range(1, 4):
            world.shared.go_away()
            world.shared.questions[-1].lose()
            world.reactor.advance(RETRY_S)
            assert len(world.shared.questions) == times, "asked without a connection"
            world.shared.come_back()
            assert len(world.shared.questions) == times + 1
        assert len({question.asked for question in world.shared.questions}) == 1
        assert not uploaded.called
        world.shared.questions[-1].answer(ACCEPTED)
        assert result_of(uploaded) == (ACCEPTED, 1)
        assert sums_of(result_of(world.seal())) == [3.0] * 4

    def test_a_question_says_whether_its_first_answer_was_lost(self, world: World) -> None:
        world.upload("a")
        world.shared.questions[0].fail(LeaseLapsed("an answer as well"))
        world.reactor.advance(RETRY_S)
        world.shared.questions[1].lose()
        world.reactor.advance(RETRY_S)
        world.shared.questions[2].lose()
        world.reactor.advance(RETRY_S)
        assert [question.again for question in world.shared.questions] == [False, False, True, True]

    def test_one_that_came_after_the_seal_does_not(self, world: World) -> None:
        """Nobody waits for it: should Redis count it now, the sum would lack it."""
        result_of(world.seal())
        world.upload("a")
        world.shared.questions[0].lose()
        world.reactor.advance(RETRY_S)
        assert [question.again for question in world.shared.questions] == [False, False]

    def test_only_what_may_count_already_stays_open_while_others_are_awaited(self, world: World) -> None:
        first, second = world.upload("a"), world.upload("b")
        world.shared.questions[0].lose()
        world.shared.questions[1].fail(OthersAwaited("not yet"))
        with pytest.raises(OthersAwaited):
            result_of(second)
        sealed = world.seal()
        for _ in range(2):
            world.reactor.advance(RETRY_S)
            world.shared.questions[-1].fail(OthersAwaited("not yet"))
        assert not first.called and not sealed.called
        world.reactor.advance(RETRY_S)
        world.shared.questions[-1].answer(ACCEPTED)
        assert result_of(first) == (ACCEPTED, 1)
        assert result_of(sealed).totals.count == 1

    def test_errors_of_redis_are_not_answered_with_a_storm(self, world: World) -> None:
        world.upload("a")
        world.shared.questions[-1].lose()  # the connection stands all the time
        assert len(world.shared.questions) == 1
        world.reactor.advance(RETRY_S)
        assert len(world.shared.questions) == 2

    def test_a_lost_reply_whose_iteration_is_over_is_the_callers_business(self, world: World) -> None:
        uploaded = world.upload("a")
        world.shared.questions[0].lose()
        world.reactor.advance(RETRY_S)
        world.shared.questions[1].reply.errback(IterationMoved(6))
        with pytest.raises(IterationMoved):
            result_of(uploaded)

    def test_an_iteration_that_is_not_served_is_the_callers_business(self, world: World) -> None:
        world.intake.begin(epoch_of(6))
        with pytest.raises(IterationMoved) as moved:
            result_of(world.upload("a"))
        assert moved.value.number == 6
        world.intake.begin(epoch_of(5), 2)
        with pytest.raises(IterationMoved):
            result_of(world.upload("a"))
        assert not world.shared.questions

    def test_without_a_ledger_nothing_is_asked(self, world: World) -> None:
        slot = world.complete(world.intake.receive(BODY))
        world.ledgers.own, world.ledgers.problem = None, "the disk is full"
        with pytest.raises(StoreUnavailable, match="the disk is full"):
            result_of(world.upload("a", slot=slot))
        assert not world.shared.questions

    def test_a_lapsed_lease_comes_back(self, world: World) -> None:
        uploaded = world.upload("a", 3.0)
        for times in range(1, 101):
            world.shared.questions[-1].fail(LeaseLapsed("late"))
            assert len(world.shared.questions) == times, "asked without a pause"
            world.reactor.advance(RETRY_S)
        assert len({question.asked for question in world.shared.questions}) == 1
        world.shared.questions[-1].answer(ACCEPTED)
        assert result_of(uploaded) == (ACCEPTED, 1)
        assert sums_of(result_of(world.seal())) == [3.0] * 4

    def test_a_ledger_that_is_not_listed_yet_is_asked_for_again(self, world: World) -> None:
        uploaded = world.upload("a", 3.0)
        world.shared.questions[0].fail(LedgerRevoked("not yet"))
        assert len(world.shared.questions) == 1
        world.reactor.advance(RETRY_S)
        world.shared.questions[1].answer(ACCEPTED)
        assert result_of(uploaded) == (ACCEPTED, 1)
        assert sums_of(result_of(world.seal())) == [3.0] * 4

    def test_a_ledger_that_stays_revoked_is_the_callers_business(self, world: World) -> None:
        uploaded = world.upload("a")
        while not uploaded.called:
            assert world.reactor.seconds() < ROOM_TIMEOUT + 2 * RETRY_S
            world.shared.questions[-1].fail(LedgerRevoked("taken"))
            world.reactor.advance(RETRY_S)
        with pytest.raises(LedgerRevoked):
            result_of(uploaded)
        assert result_of(world.seal()).totals.count == 0

    def test_a_revoked_ledger_holds_up_no_seal(self, world: World) -> None:
        uploaded = world.upload("a")
        sealed = world.seal()
        world.shared.questions[0].fail(LedgerRevoked("taken"))
        with pytest.raises(LedgerRevoked):
            result_of(uploaded)
        assert result_of(sealed).totals.count == 0

    def test_of_a_ledger_that_was_dropped_nothing_is_asked_again(self, world: World) -> None:
        uploaded = world.upload("a")
        world.ledgers.own = None
        world.shared.questions[0].fail(LedgerRevoked("taken"))
        with pytest.raises(LedgerRevoked):
            result_of(uploaded)


class TestALedgerThatIsLost:
    """Revoked, or taken over: a new one is opened, and bodies that are here already count in that."""

    def lose(self, world: World, slots: int = SLOTS) -> Ledger:
        """The driver drops the ledger and opens another."""
        shape = Shape.of(LAYOUT, "job", clients=64, slots=slots, slot_size=64)
        world.ledgers.own = fresh = Ledger.create(Tracing(shape.size), LAYOUT, shape)
        world.intake.begin(epoch_of(5))
        return fresh

    def test_a_body_in_it_counts_in_the_next(self, world: World) -> None:
        slot = world.complete(world.intake.receive(BODY))
        fresh = self.lose(world)
        uploaded = world.upload("a", 3.0, slot=slot)
        assert world.shared.questions[0].asked[5] == fresh.id
        world.shared.questions[0].answer(ACCEPTED)
        assert result_of(uploaded) == (ACCEPTED, 1)
        assert (fresh.owns(slot), fresh.free_slots) == (True, SLOTS - 1)
        assert sums_of(result_of(world.seal())) == [3.0] * 4

    def test_so_does_one_whose_question_was_open(self, world: World) -> None:
        uploaded = world.upload("a", 3.0)
        fresh = self.lose(world)
        world.shared.questions[0].fail(LedgerRevoked("taken"))
        assert world.shared.questions[1].asked[5] == fresh.id
        world.shared.questions[1].answer(ACCEPTED)
        assert result_of(uploaded) == (ACCEPTED, 1)
        assert sums_of(result_of(world.seal())) == [3.0] * 4

    def test_a_body_that_does_not_count_leaves_no_slot_taken(self, world: World) -> None:
        slot = world.complete(world.intake.receive(BODY))
        fresh = self.lose(world)
        uploaded = world.upload("a", slot=slot)
        world.shared.questions[0].answer(Acceptance.FULL)
        assert result_of(uploaded)[0] is Acceptance.FULL
        world.intake.release(slot)
        assert fresh.free_slots == SLOTS

    def test_where_there_is_no_room_the_caller_hears_it(self, world: World) -> None:
        slot = world.complete(world.intake.receive(BODY))
        fresh = self.lose(world)
        while fresh.receive() is not None:
            pass
        with pytest.raises(LedgerRevoked):
            result_of(world.upload("a", slot=slot))


class TestGoingOn:
    """What the own ledger holds of the very epoch that begins again is not to be emptied."""

    def test_a_ledger_is_known_by_its_epoch(self, world: World) -> None:
        assert world.intake.holds(epoch_of(5))
        assert not world.intake.holds(epoch_of(6))

    def test_a_new_ledger_holds_nothing_yet(self, world: World) -> None:
        shape = world.ledger.shape
        world.ledgers.own = Ledger.create(Tracing(shape.size), LAYOUT, shape)
        assert not world.intake.holds(epoch_of(5))
        world.ledgers.own = None
        assert not world.intake.holds(epoch_of(5))

    def test_one_that_is_about_to_begin_another_holds_nothing(self, threaded: World) -> None:
        for fl_id in map(str, range(SLOTS)):
            threaded.accepted(fl_id)
        threaded.begin(6)
        assert not threaded.intake.holds(epoch_of(5))


class TestReplication:
    """An update that a replica of Redis has, too, survives a fail-over; one that none has, the ledger brings back."""

    def test_is_waited_for_before_the_answer(self, world: World) -> None:
        world.shared.replicas = 1
        uploaded = world.upload("a", 3.0)
        world.shared.questions[0].answer(ACCEPTED)
        assert (uploaded.called, world.shared.patience) == (False, [REPLICATION_MS])
        world.shared.replications[0].callback(True)
        assert result_of(uploaded) == (ACCEPTED, 1)

    def test_that_comes_too_late_is_not_needed(self, world: World) -> None:
        world.shared.replicas = 1
        uploaded = world.upload("a", 3.0)
        world.shared.questions[0].answer(ACCEPTED)
        world.shared.replications[0].callback(False)
        assert result_of(uploaded) == (ACCEPTED, 1)
        assert sums_of(result_of(world.seal())) == [3.0] * 4

    def test_that_is_cut_off_costs_no_update(self, world: World) -> None:
        world.shared.replicas = 1
        uploaded = world.upload("a", 3.0)
        world.shared.questions[0].answer(ACCEPTED)
        assert world.ledger.holds("a"), "whatever comes now, it is safe"
        world.shared.replications[0].errback(StoreUnavailable("gone"))
        assert result_of(uploaded) == (ACCEPTED, 1)
        assert sums_of(result_of(world.seal())) == [3.0] * 4

    def test_of_what_was_refused_or_counted_before_is_not_asked_for(self, world: World) -> None:
        world.accepted("a")
        asked = len(world.shared.patience)
        for word in (ACCEPTED, Acceptance.FULL):
            repeated = world.upload("a")
            world.shared.questions[-1].answer(word)
            result_of(repeated)
        assert len(world.shared.patience) == asked == 1


# ---- on record


class TestRecord:
    def test_comes_before_the_question(self, world: World) -> None:
        uploaded = world.upload("a", 3.0)
        assert len(world.shared.questions) == 1
        assert world.on_record() == {"a": SlotState.RECEIVED}
        assert not world.ledger.holds("a")
        world.shared.questions[0].answer(ACCEPTED)
        assert result_of(uploaded) == (ACCEPTED, 1)
        assert world.on_record() == {"a": SlotState.ACCEPTED}
        result_of(world.seal())
        assert world.on_record() == {}

    def test_of_unfit_weights_there_is_none(self, world: World) -> None:
        world.upload("a", fit=False)
        assert world.on_record() == {}

    def test_ends_with_the_release(self, world: World) -> None:
        slot = world.complete(world.intake.receive(BODY))
        world.upload("a", slot=slot)
        world.shared.questions[0].answer(Acceptance.FULL)
        world.intake.release(slot)
        assert world.on_record() == {}
        assert world.free_slots == SLOTS

    def test_in_memory_needs_no_flush(self, world: World) -> None:
        flushes = world.flushes()
        world.accepted("a")
        assert (world.flushes(), len(world.reactor.jobs)) == (flushes, 0)

    def test_is_on_the_disk_before_the_question(self, durable: World) -> None:
        flushes = durable.flushes()
        uploaded = durable.upload("a", 3.0)
        assert durable.on_record() == {"a": SlotState.RECEIVED}
        assert (durable.flushes(), durable.shared.questions) == (flushes, [])
        sealed = durable.seal()
        durable.reactor.work()
        assert durable.flushes() == flushes + 1
        assert not sealed.called
        durable.shared.questions[0].answer(ACCEPTED)
        assert result_of(uploaded) == (ACCEPTED, 1)
        durable.reactor.work()  # what flushes merges in a thread as well
        assert sums_of(result_of(sealed)) == [3.0] * 4

    def test_those_that_come_during_a_flush_share_the_next(self, durable: World) -> None:
        flushes = durable.flushes()
        for fl_id in "abc":
            durable.upload(fl_id)
        assert len(durable.reactor.jobs) == 1
        durable.reactor.work()
        assert [question.asked[3] for question in durable.shared.questions] == ["a"]
        assert len(durable.reactor.jobs) == 1
        durable.reactor.work()
        assert [question.asked[3] for question in durable.shared.questions] == ["a", "b", "c"]
        assert durable.flushes() == flushes + 2
        assert not durable.reactor.jobs

    def test_a_flush_that_fails_fails_only_those_it_was_for(
        self, durable: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail() -> None:
            raise OSError("the disk is gone")

        first = durable.upload("a")
        monkeypatch.setattr(durable.storage, "sync", fail)
        second = durable.upload("b")
        durable.reactor.work()
        monkeypatch.undo()
        with pytest.raises(OSError, match="the disk is gone"):
            result_of(first)
        assert not second.called
        durable.reactor.work()
        assert [question.asked[3] for question in durable.shared.questions] == ["b"]


class TestForms:
    """Updates that are not plain weights."""

    def reading(self, base: str = epoch_of(5).base) -> Reading:
        return Reading(Decoder.SIGN, base, lambda data_size: {"w": np.full(4, 10.0 * data_size, np.float32)})

    def test_what_is_read_is_in_the_sum_and_how_on_record(self, world: World) -> None:
        uploaded = world.upload("a", 1.0, reading=self.reading())
        _, found = layout.examine(memoryview(world.storage.content))
        assert [entry.record.decoder for entry in found.pending] == [Decoder.SIGN]
        world.shared.questions[-1].answer(ACCEPTED)
        assert result_of(uploaded) == (ACCEPTED, 1)
        assert sums_of(result_of(world.seal())) == [10.0 * META.data_size] * 4

    def test_a_masked_update_tells_the_shared_state_what_it_is(self, world: World) -> None:
        masked = MaskedUpdate("getSecrets", bytes(32))
        uploaded = world.upload("a", 1.0, masked=masked)
        world.shared.questions[-1].lose()
        world.reactor.advance(RETRY_S)
        assert [question.masked for question in world.shared.questions] == [masked, masked]
        world.shared.questions[-1].answer(ACCEPTED)
        assert result_of(uploaded) == (ACCEPTED, 1)

    def test_nothing_is_asked_for_what_was_read_against_another_model(self, world: World) -> None:
        uploaded = world.upload("a", 1.0, reading=self.reading(epoch_of(4).base))
        with pytest.raises(IterationMoved):
            result_of(uploaded)
        assert (world.shared.questions, world.on_record()) == ([], {})

    def test_what_is_of_another_iteration_is_not_put_on_record(self, world: World) -> None:
        """It is never counted; and after a crash it might be taken for the one that is."""
        uploaded = world.upload("a", 1.0, iteration=4)
        assert world.on_record() == {}
        world.shared.questions[-1].answer(Acceptance.OTHER_ITERATION)
        assert result_of(uploaded)[0] is Acceptance.OTHER_ITERATION


class TestRepeats:
    def test_two_updates_of_one_client_at_once_count_once(self, world: World) -> None:
        """The shared state cannot tell a second upload from a repeated question of the same ledger."""
        first, second = world.upload("a", 1.0), world.upload("a", 100.0)
        for question in world.shared.questions:
            question.answer(ACCEPTED)
        assert result_of(first) == (ACCEPTED, 1)
        assert result_of(second) == (REPEATED, 1)
        partial = result_of(world.seal())
        assert world.free_slots == SLOTS - 1  # the second one's is the caller's
        assert (sums_of(partial), partial.totals.count) == ([1.0] * 4, 1)

    def test_a_later_repeat_is_known(self, world: World) -> None:
        world.accepted("a", 1.0)
        repeated = world.upload("a", 100.0)
        world.shared.questions[-1].answer(ACCEPTED)
        assert result_of(repeated) == (REPEATED, 1)
        assert sums_of(result_of(world.seal())) == [1.0] * 4

    def test_whichever_is_answered_first_is_kept(self, world: World) -> None:
        """A lost reply is asked for again a little later; meanwhile the device itself repeats its upload."""
        first = world.upload("a", 1.0)
        world.shared.questions[0].lose()
        second = world.upload("a", 1.0)
        world.shared.questions[1].answer(ACCEPTED)
        assert result_of(second) == (ACCEPTED, 1)
        world.reactor.advance(RETRY_S)
        world.shared.questions[2].answer(ACCEPTED)
        assert result_of(first) == (REPEATED, 1)
        assert sums_of(result_of(world.seal())) == [1.0] * 4

    def test_unfit_weights_never_enter_on_the_ticket_of_fit_ones(self, world: World) -> None:
        first = world.upload("a", 1.0)
        world.shared.questions[0].lose()  # though it was counted
        second = world.upload("a", float("nan"), fit=False)
        sealed = world.seal()
        world.shared.questions[1].answer(ACCEPTED)
        assert result_of(second) == (REPEATED, 1)
        assert not sealed.called
        world.reactor.advance(RETRY_S)
        world.shared.questions[2].answer(ACCEPTED)
        assert result_of(first) == (ACCEPTED, 1)
        assert sums_of(result_of(sealed)) == [1.0] * 4


# ---- sealing


class TestSeal:
    def test_waits_for_every_open_question(self, world: World) -> None:
        world.upload("a", 1.0), world.upload("b", 10.0)
        sealed = world.seal()
        world.shared.questions[1].answer(ACCEPTED)
        assert not sealed.called
        world.shared.questions[0].answer(ACCEPTED)
        assert sums_of(result_of(sealed)) == [11.0] * 4

    def test_waits_for_a_lost_reply(self, world: World) -> None:
        world.upload("a", 1.0)
        world.shared.go_away()
        world.shared.questions[0].lose()
        sealed = world.seal()
        world.reactor.advance(60)
        assert not sealed.called
        world.shared.come_back()
        world.shared.questions[1].answer(ACCEPTED)
        assert sums_of(result_of(sealed)) == [1.0] * 4

    def test_does_not_wait_for_questions_that_came_later(self, world: World) -> None:
        """Otherwise a stream of late uploads, each refused in time, would hold up the iteration for ever."""
        open_before = world.upload("a", 1.0)
        sealed = world.seal()
        late = world.upload("b")
        world.shared.questions[0].answer(ACCEPTED)
        assert result_of(open_before)[0] is ACCEPTED
        assert sums_of(result_of(sealed)) == [1.0] * 4
        world.shared.questions[1].answer(Acceptance.FULL)
        assert result_of(late)[0] is Acceptance.FULL

    def test_what_comes_later_must_not_count_even_if_redis_has_gone_back(self, world: World) -> None:
        """After a loss of data it may say for a moment that the iteration is collecting: no sum would hold it."""
        world.upload("a")
        world.seal()
        world.upload("b")
        before, after = (question.asked[4] for question in world.shared.questions)
        assert (before > 0, after) == (True, 0), "the quorum"

    def test_waits_for_the_merge(self, threaded: World) -> None:
        threaded.accepted("a", 1.0)
        threaded.accepted("b", 10.0)
        sealed = threaded.seal()
        assert len(threaded.reactor.jobs) == 1
        assert not sealed.called
        threaded.reactor.work()
        assert sums_of(result_of(sealed)) == [11.0] * 4
        assert threaded.free_slots == SLOTS

    def test_waits_for_all_batches(self, tmp_path: Path) -> None:
        world = World(tmp_path, threads=True, slots=2 * MERGE_BATCH)
        for i in range(MERGE_BATCH + 1):
            world.accepted(f"c{i}")
        sealed = world.seal()
        world.reactor.work()
        assert not sealed.called
        world.reactor.work()
        assert sums_of(result_of(sealed)) == [MERGE_BATCH + 1.0] * 4

    def test_without_a_ledger_there_are_no_sums(self, world: World) -> None:
        world.ledgers.own = None
        assert result_of(world.seal()) is None

    def test_can_be_repeated(self, world: World) -> None:
        """A lost connection between seal and publication lets the reduction begin again."""
        world.accepted("a", 1.0)
        first = result_of(world.seal())
        assert sums_of(result_of(world.seal())) == sums_of(first) == [1.0] * 4

    def test_an_update_after_the_seal_is_our_own_fault(self, world: World) -> None:
        result_of(world.seal())
        uploaded = world.upload("a")
        world.shared.questions[0].answer(ACCEPTED)
        with pytest.raises(LocalError):
            result_of(uploaded)


class TestAttempts:
    """A seal may be undone, because updates were lost with other servers; those of this server stay."""

    def test_updates_are_taken_again_and_the_sums_stay(self, world: World) -> None:
        world.accepted("a", 1.0)
        assert sums_of(result_of(world.seal())) == [1.0] * 4
        world.intake.resume(2)
        world.accepted("b", 10.0, attempt=2)
        partial = result_of(world.seal(2))
        assert (sums_of(partial), set(partial.clients)) == ([11.0] * 4, clients("a", "b"))

    def test_the_questions_name_the_attempt(self, world: World) -> None:
        world.intake.resume(3)
        world.upload("a", attempt=3)
        assert world.shared.questions[0].asked[:3] == (5, 3, 5)

    @pytest.mark.parametrize("attempt", [1, 3])
    def test_another_attempt_is_the_callers_business(self, world: World, attempt: int) -> None:
        world.intake.resume(2)
        for work in (world.upload("a", attempt=attempt), world.seal(attempt)):
            with pytest.raises(IterationMoved) as moved:
                result_of(work)
            assert moved.value.number == 5
        assert not world.shared.questions

    def test_another_iteration_is_not_sealed(self, world: World) -> None:
        for number in (4, 6):
            with pytest.raises(IterationMoved) as moved:
                result_of(start(world.intake.seal(number, 1)))
            assert moved.value.number == 5
        world.accepted("a")

    def test_a_seal_that_was_undone_meanwhile_gives_no_sums(self, world: World) -> None:
        """They would lack what the next attempt brings."""
        uploaded = world.upload("a", 1.0)
        sealed = world.seal()
        world.intake.resume(2)
        world.shared.questions[0].answer(ACCEPTED)
        assert result_of(uploaded) == (ACCEPTED, 1)
        world.accepted("b", 10.0, attempt=2)
        assert sums_of(result_of(world.seal(2))) == [11.0] * 4
        with pytest.raises(IterationMoved):
            result_of(sealed)

    def test_a_question_of_the_attempt_before_may_still_be_answered(self, world: World) -> None:
        """The update was counted, its reply was lost, the seal was undone: the shared state says that it counts."""
        uploaded = world.upload("a", 1.0)
        world.shared.questions[0].lose()
        world.intake.resume(2)
        sealed = world.seal(2)
        world.reactor.advance(RETRY_S)
        assert not sealed.called
        world.shared.questions[1].answer(ACCEPTED)
        assert result_of(uploaded) == (ACCEPTED, 1)
        assert sums_of(result_of(sealed)) == [1.0] * 4

    def test_updates_wait_for_a_batch_again(self, tmp_path: Path) -> None:
        world = World(tmp_path, slots=2 * MERGE_BATCH)
        result_of(world.seal())
        world.intake.resume(2)
        world.accepted("a", attempt=2)
        assert world.ledger.unmerged == 1

    def test_without_a_ledger_there_is_nothing_to_resume(self, world: World) -> None:
        world.ledgers.own = None
        world.intake.resume(2)
        assert result_of(world.seal(2)) is None

    def test_a_fault_is_not_forgotten(self, world: World) -> None:
        break_sums(world)
        world.accepted("a")
        with pytest.raises(LocalError):
            result_of(world.seal())
        mend_sums(world)
        world.intake.resume(2)
        with pytest.raises(StoreUnavailable, match="broken"):
            result_of(world.upload("b", attempt=2))
        with pytest.raises(LocalError):
            result_of(world.seal(2))

    def test_a_seal_waits_for_the_iteration_that_waits_for_a_merge(self, threaded: World) -> None:
        for fl_id in "abcd":
            threaded.accepted(fl_id, 1000.0)
        threaded.begin(6)
        sealed = threaded.seal()
        assert not sealed.called
        threaded.reactor.work()
        partial = result_of(sealed)
        assert (sums_of(partial), partial.iteration) == ([0.0] * 4, 6)

    def test_a_new_iteration_is_in_its_first_attempt_or_in_the_one_that_is_named(self, world: World) -> None:
        world.intake.resume(4)
        world.begin(6)
        world.accepted("a")
        world.begin(7, 3)
        world.accepted("a", 2.0, attempt=3)
        assert sums_of(result_of(world.seal(3))) == [2.0] * 4


# ---- merging


def break_sums(world: World) -> None:
    """Let the next addition fail, as for want of memory."""

    def fail(updates: object) -> None:
        raise MemoryError("no room for the sums")

    world.ledger._add = fail  # type: ignore[assignment,method-assign]


def mend_sums(world: World) -> None:
    del world.ledger._add


class TestMerge:
    def test_small_models_need_no_thread(self, world: World, threaded: World) -> None:
        for each in (world, threaded):
            for fl_id in "abcd":
                each.accepted(fl_id)
        assert (world.free_slots, len(world.reactor.jobs)) == (SLOTS, 0)
        assert (threaded.free_slots, len(threaded.reactor.jobs)) == (0, 1)

    def test_what_waits_for_a_disk_needs_one(self, durable: World) -> None:
        for fl_id in "abcd":
            uploaded = durable.upload(fl_id)
            durable.reactor.work()
            durable.shared.questions[-1].answer(ACCEPTED)
            assert result_of(uploaded)[0] is ACCEPTED
        assert (durable.free_slots, len(durable.reactor.jobs)) == (0, 1)

    def test_waits_for_a_batch(self, tmp_path: Path) -> None:
        world = World(tmp_path, slots=2 * MERGE_BATCH)
        for i in range(MERGE_BATCH - 1):
            world.accepted(f"c{i}")
        assert (world.ledger.unmerged, world.free_slots) == (MERGE_BATCH - 1, MERGE_BATCH + 1)
        world.accepted("last")
        assert (world.ledger.unmerged, world.free_slots) == (0, 2 * MERGE_BATCH)

    def test_does_not_wait_when_room_is_short(self, world: World) -> None:
        for fl_id in "abc":
            world.accepted(fl_id)
        assert (world.ledger.unmerged, world.free_slots) == (3, 1)
        world.accepted("d")
        assert (world.ledger.unmerged, world.free_slots) == (0, SLOTS)

    def test_only_one_at_a_time_and_several_updates_each(self, tmp_path: Path) -> None:
        world = World(tmp_path, threads=True, slots=2 * MERGE_BATCH + 2)
        for i in range(2 * MERGE_BATCH + 2):
            world.accepted(f"c{i}", 1.0)
        for merged in (MERGE_BATCH, 2 * MERGE_BATCH):
            assert len(world.reactor.jobs) == 1
            world.reactor.work()
            assert world.free_slots == merged
        assert not world.reactor.jobs
        sealed = world.seal()
        assert len(world.reactor.jobs) == 1
        world.reactor.work()
        assert sums_of(result_of(sealed)) == [2.0 * MERGE_BATCH + 2] * 4
        assert world.free_slots == 2 * MERGE_BATCH + 2

    def test_updates_are_accepted_meanwhile(self, tmp_path: Path) -> None:
        world = World(tmp_path, threads=True, slots=2 * MERGE_BATCH)
        for i in range(MERGE_BATCH + 2):
            world.accepted(f"c{i}", 1.0)
        world.reactor.work()
        assert (world.ledger.unmerged, len(world.reactor.jobs)) == (2, 0)

    def test_a_failure_makes_the_seal_fail(self, threaded: World) -> None:
        break_sums(threaded)
        threaded.accepted("a")
        sealed = threaded.seal()
        threaded.accepted("b")
        with capturedLogs() as logs:
            threaded.reactor.work()
        assert [event["log_level"].name for event in logs] == ["critical"]
        with pytest.raises(LocalError, match="no room for the sums"):
            result_of(sealed)
        with pytest.raises(LocalError):
            result_of(threaded.seal())

    def test_a_failure_loses_no_slot(self, world: World) -> None:
        break_sums(world)
        for fl_id in "abcd":
            world.accepted(fl_id)
        assert world.free_slots == 0  # what could not be added stays where it is safe
        assert world.on_record() == dict.fromkeys("abcd", SlotState.ACCEPTED)
        world.begin(6)
        assert world.free_slots == SLOTS

    def test_a_failure_ends_with_its_iteration(self, world: World) -> None:
        break_sums(world)
        for fl_id in "abcd":
            world.accepted(fl_id)
        mend_sums(world)
        world.begin(6)
        world.accepted("b", 2.0)
        assert sums_of(result_of(world.seal())) == [2.0] * 4

    def test_one_that_outlives_its_iteration_stays_out_of_the_next(self, threaded: World) -> None:
        """The iteration may fail by its deadline while a thread is still adding to its sums."""
        for fl_id in "abcd":
            threaded.accepted(fl_id, 1000.0)
        threaded.begin(6)
        assert threaded.ledgers.begun == [epoch_of(5)], "a thread is at the ledger"
        threaded.reactor.work()
        assert threaded.ledgers.begun == [epoch_of(5), epoch_of(6)]
        assert threaded.free_slots == SLOTS
        threaded.accepted("c", 1.0)
        sealed = threaded.seal()
        threaded.reactor.work()
        partial = result_of(sealed)
        assert (sums_of(partial), set(partial.clients), partial.iteration) == ([1.0] * 4, clients("c"), 6)
        assert threaded.free_slots == SLOTS

    def test_an_update_waits_for_the_iteration_that_waits_for_a_merge(self, threaded: World) -> None:
        slots = [threaded.complete(threaded.intake.receive(BODY)) for _ in range(SLOTS)]
        threaded.accepted("a", 1000.0, slot=slots[0])
        waiting = start(threaded.intake.wait_for_room())  # room is short: a merge begins
        threaded.begin(6)
        uploaded = threaded.upload("c", 1.0, slot=slots[1])
        questions = len(threaded.shared.questions)
        threaded.reactor.work()
        assert waiting.called
        assert len(threaded.shared.questions) == questions + 1
        threaded.shared.questions[-1].answer(ACCEPTED)
        assert result_of(uploaded) == (ACCEPTED, 1)
        sealed = threaded.seal()
        threaded.reactor.work()
        assert sums_of(result_of(sealed)) == [1.0] * 4

    def test_of_several_iterations_that_wait_only_the_last_begins(self, threaded: World) -> None:
        for fl_id in "abcd":
            threaded.accepted(fl_id)
        threaded.begin(6)
        threaded.begin(7)
        threaded.reactor.work()
        assert threaded.ledgers.begun == [epoch_of(5), epoch_of(7)]
        threaded.accepted("a", 2.0)

    def test_one_that_outlives_its_iteration_and_fails_harms_nobody(self, threaded: World) -> None:
        break_sums(threaded)
        for fl_id in "abcd":
            threaded.accepted(fl_id)
        threaded.begin(6)
        threaded.reactor.work()
        mend_sums(threaded)
        threaded.accepted("c", 1.0)
        sealed = threaded.seal()
        threaded.reactor.work()
        assert sums_of(result_of(sealed)) == [1.0] * 4

    def test_sums_begin_at_zero(self, world: World) -> None:
        world.accepted("a", 5.0)
        world.begin(6, 2)
        world.accepted("a", 1.0, attempt=2)
        partial = result_of(world.seal(attempt=2))
        assert (sums_of(partial), partial.totals.count) == ([1.0] * 4, 1)


# ---- room


class TestRoom:
    def fill(self, world: World) -> list[Slot]:
        """Take all slots."""
        slots = [world.complete(world.intake.receive(BODY)) for _ in range(SLOTS)]
        assert world.free_slots == 0
        return slots

    def test_the_last_quarter_is_for_complete_bodies(self, world: World) -> None:
        rooms = [world.intake.receive(BODY) for _ in range(SLOTS + 1)]
        assert [type(room) for room in rooms] == [Slot, Slot, Slot, Spool, Spool]
        assert world.free_slots == 1
        assert world.complete(rooms[0]) is rooms[0]
        world.complete(rooms[3])
        assert world.free_slots == 0

    def test_what_was_spooled_counts_like_the_rest(self, world: World) -> None:
        for _ in range(SLOTS - 1):
            world.intake.receive(BODY)
        spool = world.intake.receive(BODY)
        assert isinstance(spool, Spool)
        assert len(spool.buffer) == BODY
        body = np.full(4, 3.0, np.float32).tobytes()
        spool.buffer[:BODY] = body
        spool.length = BODY
        slot = world.complete(spool)
        assert (bytes(slot.body), slot.length) == (body, BODY)
        spool.buffer[:BODY] = bytes(BODY)  # a copy
        assert bytes(slot.body) == body

    def test_a_spool_may_have_to_wait_for_a_slot(self, world: World) -> None:
        slots = self.fill(world)
        spool = world.intake.receive(BODY)
        assert isinstance(spool, Spool)
        spool.buffer[:] = b"x" * BODY
        spool.length = BODY
        waiting = start(world.intake.slot_for(spool))
        assert not waiting.called
        world.intake.release(slots[2])
        slot = result_of(waiting)
        assert (slot.number, bytes(slot.body)) == (slots[2].number, b"x" * BODY)

    def test_a_spool_is_no_slot_to_take_back(self, world: World) -> None:
        self.fill(world)
        waiting = start(world.intake.wait_for_room())
        world.intake.release(world.intake.receive(BODY))
        assert (world.free_slots, waiting.called) == (0, False)
        waiting.cancel()
        waiting.addErrback(lambda _: None)

    def test_a_slot_of_another_ledger_is_not_taken_back(self, world: World, threaded: World) -> None:
        """The one it came from was revoked meanwhile."""
        slot = world.complete(world.intake.receive(BODY))
        world.ledgers.own = threaded.ledger
        world.intake.release(slot)
        assert threaded.free_slots == SLOTS
        world.ledgers.own = None
        world.intake.release(slot)
        assert world.free_slots == SLOTS - 1

    def test_a_full_spool_directory_is_said(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(directory: Path, length: int) -> Spool:
            raise NoSpace(f"an upload needs {length} bytes at {directory}")

        monkeypatch.setattr(update_intake, "open_spool", full)
        self.fill_slots_only(world)
        with pytest.raises(NoSpace, match=f"needs {BODY} bytes"):
            world.intake.receive(BODY)

    def fill_slots_only(self, world: World) -> None:
        for _ in range(SLOTS - 1):
            assert isinstance(world.intake.receive(BODY), Slot)

    def test_first_come_first_served(self, world: World) -> None:
        slots = self.fill(world)
        waiting = [start(world.intake.wait_for_room()) for _ in range(3)]
        for i, slot in enumerate(slots[:3]):
            assert [waiter.called for waiter in waiting] == [j < i for j in range(3)]
            world.intake.release(slot)
            assert result_of(waiting[i]).number == slot.number

    def test_nobody_overtakes_who_waits(self, world: World) -> None:
        slots = self.fill(world)
        first = start(world.intake.wait_for_room())
        for slot in slots[:3]:
            world.ledger.release(slot)
        spool = world.intake.receive(BODY)
        assert isinstance(spool, Spool)
        second = start(world.intake.slot_for(spool))
        assert not first.called and not second.called
        world.intake.release(slots[3])
        assert first.called and second.called
        assert result_of(first).number == slots[3].number
        assert isinstance(world.intake.receive(BODY), Slot)

    def test_no_room_in_time_is_said(self, world: World) -> None:
        slots = self.fill(world)
        waiting = start(world.intake.slot_for(world.intake.receive(BODY)))
        world.reactor.advance(ROOM_TIMEOUT - 0.1)
        assert not waiting.called
        world.reactor.advance(0.2)
        with pytest.raises(NoRoom) as refusal:
            result_of(waiting)
        assert (refusal.value.http_status, refusal.value.retry_after) == (503, 5.0)
        world.intake.release(slots[0])
        assert world.free_slots == 1, "a slot was given to one who has left"

    def test_without_a_ledger_the_reason_is_said(self, world: World) -> None:
        world.ledgers.own, world.ledgers.problem = None, "the disk is full"
        spool = world.intake.receive(BODY)
        assert isinstance(spool, Spool)
        waiting = start(world.intake.slot_for(spool))
        world.reactor.advance(ROOM_TIMEOUT + 0.1)
        with pytest.raises(NoRoom, match="the disk is full"):
            result_of(waiting)

    def test_a_ledger_that_is_opened_serves_those_who_wait(self, world: World) -> None:
        world.ledgers.own = None
        waiting = start(world.intake.slot_for(world.intake.receive(BODY)))
        world.ledgers.own = world.ledger
        world.intake.begin(epoch_of(5))
        assert waiting.called

    def test_who_leaves_the_queue_takes_no_slot_along(self, world: World) -> None:
        slots = self.fill(world)
        waiting = [start(world.intake.wait_for_room()) for _ in range(2)]
        waiting[0].cancel()
        with pytest.raises(defer.CancelledError):
            result_of(waiting[0])
        world.intake.release(slots[0])
        assert result_of(waiting[1]).number == slots[0].number

    def test_merged_slots_go_to_those_who_wait(self, threaded: World) -> None:
        slots = self.fill(threaded)
        threaded.accepted("a", slot=slots[0])
        waiting = start(threaded.intake.wait_for_room())
        assert not waiting.called
        threaded.reactor.work()
        slot = result_of(waiting)
        assert (slot.number, slot.length) == (slots[0].number, 0)

    def test_an_update_is_merged_at_once_while_somebody_waits(self, threaded: World) -> None:
        slots = self.fill(threaded)
        waiting = start(threaded.intake.wait_for_room())
        assert not threaded.reactor.jobs
        threaded.accepted("a", slot=slots[0])
        threaded.reactor.work()
        assert result_of(waiting).number == slots[0].number

    def test_slots_of_a_forgotten_iteration_go_to_those_who_wait(self, threaded: World) -> None:
        slots = self.fill(threaded)
        break_sums(threaded)
        for fl_id, slot in zip("ab", slots, strict=False):
            threaded.accepted(fl_id, slot=slot)
        waiting = [start(threaded.intake.wait_for_room()) for _ in range(3)]
        threaded.begin(6)  # they are being merged
        assert not waiting[0].called
        threaded.reactor.work()
        assert [waiter.called for waiter in waiting] == [True, True, False]
        numbers = {result_of(waiter).number for waiter in waiting[:2]}
        assert numbers == {slot.number for slot in slots[:2]}
        waiting[2].cancel()
        waiting[2].addErrback(lambda _: None)


class TestEvaluationVectors:
    @pytest.fixture
    def evaluating(self, tmp_path: Path) -> World:
        return World(tmp_path, vectors_kept=2000)

    @staticmethod
    def items(*vectors: list[float]) -> UnsupervisedEvalItems:
        return UnsupervisedEvalItems(tuple(UnsupervisedEvalItem("", np.float32(v)) for v in vectors))

    def asked(self, world: World) -> tuple[list[float], int]:
        question = world.shared.questions[-1]
        return np.frombuffer(question.vector, "<f4").tolist(), question.kept

    def test_a_vector_goes_with_its_update(self, evaluating: World) -> None:
        evaluating.upload("a", evaluation=self.items([1, 2], [3]))
        assert self.asked(evaluating) == ([1, 2, 3], 2000)

    def test_a_question_that_is_asked_again_brings_it_again(self, evaluating: World) -> None:
        evaluating.upload("a", evaluation=self.items([1, 2]))
        evaluating.shared.questions[0].lose()
        evaluating.reactor.advance(RETRY_S)
        assert len(evaluating.shared.questions) == 2
        assert self.asked(evaluating) == ([1, 2], 2000)

    def test_an_update_without_one_brings_none(self, evaluating: World) -> None:
        evaluating.upload("a")
        assert self.asked(evaluating) == ([], 2000)

    def test_an_update_that_may_not_count_brings_none(self, evaluating: World) -> None:
        evaluating.upload("a", fit=False, evaluation=self.items([1, 2]))
        assert self.asked(evaluating) == ([], 2000)

    def test_without_evaluation_none_is_kept(self, world: World) -> None:
        world.upload("a", evaluation=self.items([1, 2]))
        assert self.asked(world) == ([], 0)

    def test_one_that_is_too_long_is_left_out_and_told(self, evaluating: World) -> None:
        logged: list[Any] = []
        globalLogPublisher.addObserver(logged.append)
        try:
            evaluating.upload("a", evaluation=self.items([1] * (1 + longest_vector(2000))))
            assert self.asked(evaluating) == ([], 2000)
            evaluating.shared.questions[0].answer(ACCEPTED)
            assert logged == []
            evaluating.begin(6)
            evaluating.begin(7)
            (record,) = logged
            assert (record["vectors"], record["longest"]) == (1, longest_vector(2000))
        finally:
            globalLogPublisher.removeObserver(logged.append)
