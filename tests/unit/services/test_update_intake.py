"""Updates on their way into the sum, with a shared state and a thread that do what the test says, when it says so."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from twisted.internet import defer, task
from twisted.logger import capturedLogs
from twisted.python.failure import Failure

from fedcore.core.admission import Acceptance
from fedcore.errors import LocalError, StoreUnavailable
from fedcore.ledger.ledger import MERGE_BATCH, Ledger, Partial, Slot
from fedcore.services.update_intake import INLINE_FLOATS, RETRY_S, NoRoom, UpdateIntake
from fedcore.store.cluster_state import ClientMeta, ClusterState, IterationMoved, StateMissing
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.messages import FeatureMap, RequestUpdateModel

LAYOUT = Layout((Weight("w", (4,)),))
META = ClientMeta(data_size=2, eval_data_size=3, start_ms=0)
ROOM_TIMEOUT = 8.0
SLOTS = 4
ACCEPTED, REPEATED = Acceptance.ACCEPTED, Acceptance.REPEATED


# ---- the world around the intake


@dataclass(eq=False)
class Question:
    """One call of accept_upload that waits for its answer."""

    asked: tuple[Any, ...]
    reply: defer.Deferred[tuple[Acceptance, int, ClientMeta | None]] = field(default_factory=defer.Deferred)

    def answer(self, acceptance: Acceptance, count: int = 1) -> None:
        self.reply.callback((acceptance, count, META if acceptance is ACCEPTED else None))

    def lose(self) -> None:
        self.reply.errback(StoreUnavailable("gone"))


class SharedState:
    """Stands for ClusterState and its connection; keeps every question until the test answers it."""

    def __init__(self) -> None:
        self.questions: list[Question] = []
        self.redis = self
        self._back: list[defer.Deferred[None]] | None = None

    async def accept_upload(
        self, number: int, attempt: int, requested: int, fl_id: str, *, quorum: int, ledger_id: str, fit: bool
    ) -> tuple[Acceptance, int, ClientMeta | None]:
        question = Question((number, attempt, requested, fl_id, quorum, ledger_id, fit))
        self.questions.append(question)
        return await question.reply

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
    ours, real = (inspect.signature(kind.accept_upload) for kind in (SharedState, ClusterState))
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


class World:
    """An intake, and short words for what happens to it."""

    def __init__(self, *, threads: bool = False, slots: int = SLOTS) -> None:
        self.shared = SharedState()
        self.reactor = Reactor()
        self.ledger = Ledger(LAYOUT, 64, 64 * slots)
        floats = INLINE_FLOATS + 1 if threads else INLINE_FLOATS
        self.intake = UpdateIntake(self.ledger, floats, ROOM_TIMEOUT, self.reactor)
        self.intake.begin(5, 1)

    def upload(
        self, fl_id: str, value: float = 1.0, *, fit: bool = True, slot: Slot | None = None
    ) -> defer.Deferred[tuple[Acceptance, int]]:
        """A device's update comes in; its question is the newest of ``shared.questions``."""
        slot = slot or self.intake.receive()
        assert slot is not None
        slot.length = 16
        values = np.frombuffer(slot.buffer[:16], np.float32)
        values[:] = value
        request = RequestUpdateModel(
            fl_id=fl_id,
            iteration=5,
            feature_map=(FeatureMap("w", values),),
            timestamp="1",
            upload_loss=0.5,
            upload_accuracy=0.25,
        )
        accepting = self.intake.accept(slot, request, self.shared, 5, 1, quorum=9, fit=fit)  # type: ignore[arg-type]
        return defer.Deferred.fromCoroutine(accepting)

    def accepted(self, fl_id: str, value: float = 1.0) -> None:
        uploaded = self.upload(fl_id, value)
        self.shared.questions[-1].answer(ACCEPTED)
        assert result_of(uploaded) == (ACCEPTED, 1)

    def seal(self) -> defer.Deferred[Partial]:
        return start(self.intake.seal())

    def free_slots(self) -> int:
        """Take all free slots and put them back."""
        slots = []
        while (slot := self.ledger.receive()) is not None:
            slots.append(slot)
        for slot in slots:
            self.ledger.release(slot)
        return len(slots)


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
    return partial.sums.sums.tolist()


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def threaded() -> World:
    return World(threads=True)


# ---- acceptance


class TestAccept:
    def test_what_is_accepted_is_in_the_sum(self, world: World) -> None:
        world.accepted("a", 1.0)
        world.accepted("b", 10.0)
        partial = result_of(world.seal())
        assert sums_of(partial) == [11.0] * 4
        assert (partial.ledger_id, partial.iteration, partial.attempt) == (world.ledger.id, 5, 1)
        totals = partial.totals
        assert (totals.count, totals.data_size, totals.eval_data_size) == (2, 4, 6)
        assert (totals.loss, totals.accuracy) == (2.0, 1.5)
        assert totals.fl_ids == {"a", "b"}
        assert world.free_slots() == SLOTS

    def test_asks_with_what_it_was_given(self, world: World) -> None:
        world.upload("a", fit=False)
        assert world.shared.questions[0].asked == (5, 1, 5, "a", 9, world.ledger.id, False)

    @pytest.mark.parametrize("word", [word for word in Acceptance if word is not ACCEPTED])
    def test_what_is_refused_leaves_the_slot_to_the_caller(self, world: World, word: Acceptance) -> None:
        uploaded = world.upload("a")
        world.shared.questions[0].answer(word, 7)
        assert result_of(uploaded) == (word, 7)
        assert world.free_slots() == SLOTS - 1
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


class TestRepeats:
    def test_two_updates_of_one_client_at_once_count_once(self, world: World) -> None:
        """The shared state cannot tell a second upload from a repeated question of the same ledger."""
        first, second = world.upload("a", 1.0), world.upload("a", 100.0)
        for question in world.shared.questions:
            question.answer(ACCEPTED)
        assert result_of(first) == (ACCEPTED, 1)
        assert result_of(second) == (REPEATED, 1)
        assert world.free_slots() == SLOTS - 1  # the second one's is the caller's
        partial = result_of(world.seal())
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

    def test_waits_for_the_merge(self, threaded: World) -> None:
        threaded.accepted("a", 1.0)
        threaded.accepted("b", 10.0)
        sealed = threaded.seal()
        threaded.reactor.work()  # the first went alone
        assert not sealed.called
        threaded.reactor.work()
        assert sums_of(result_of(sealed)) == [11.0] * 4
        assert threaded.free_slots() == SLOTS

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


# ---- merging


def break_sums(world: World) -> None:
    """Let the next addition fail, as for want of memory."""

    def fail(updates: object) -> None:
        raise MemoryError("no room for the sums")

    world.ledger._sums.add = fail  # type: ignore[method-assign]


class TestMerge:
    def test_small_models_need_no_thread(self, world: World, threaded: World) -> None:
        world.accepted("a")
        assert not world.reactor.jobs
        threaded.accepted("a")
        assert len(threaded.reactor.jobs) == 1

    def test_only_one_at_a_time_and_several_updates_each(self) -> None:
        world = World(threads=True, slots=2 * MERGE_BATCH + 2)
        for i in range(2 * MERGE_BATCH + 2):
            world.accepted(f"c{i}", 1.0)
        for merged in (1, 1 + MERGE_BATCH, 1 + 2 * MERGE_BATCH, 2 + 2 * MERGE_BATCH):
            assert len(world.reactor.jobs) == 1
            world.reactor.work()
            assert world.free_slots() == merged
        assert not world.reactor.jobs
        assert sums_of(result_of(world.seal())) == [2.0 * MERGE_BATCH + 2] * 4

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
        assert world.free_slots() == 1  # of the failed merge; the others were not tried
        world.intake.begin(6, 1)
        assert world.free_slots() == SLOTS

    def test_a_failure_ends_with_its_iteration(self, world: World) -> None:
        break_sums(world)
        world.accepted("a")
        del world.ledger._sums.add  # type: ignore[method-assign]
        world.intake.begin(6, 1)
        world.accepted("b", 2.0)
        assert sums_of(result_of(world.seal())) == [2.0] * 4

    def test_one_that_outlives_its_iteration_stays_out_of_the_next(self, threaded: World) -> None:
        """The iteration may fail by its deadline while a thread is still adding to its sums."""
        threaded.accepted("a", 1000.0)
        threaded.accepted("b", 1000.0)
        threaded.intake.begin(6, 1)
        threaded.accepted("c", 1.0)
        sealed = threaded.seal()
        threaded.reactor.work()
        assert not sealed.called
        threaded.reactor.work()
        partial = result_of(sealed)
        assert (sums_of(partial), partial.totals.fl_ids, partial.iteration) == ([1.0] * 4, {"c"}, 6)
        assert threaded.free_slots() == SLOTS

    def test_one_that_outlives_its_iteration_and_fails_harms_nobody(self, threaded: World) -> None:
        break_sums(threaded)
        threaded.accepted("a")
        threaded.intake.begin(6, 1)
        threaded.accepted("c", 1.0)
        while threaded.reactor.jobs:
            threaded.reactor.work()
        assert sums_of(result_of(threaded.seal())) == [1.0] * 4

    def test_sums_begin_at_zero(self, world: World) -> None:
        world.accepted("a", 5.0)
        world.intake.begin(6, 2)
        world.accepted("a", 1.0)
        partial = result_of(world.seal())
        assert (sums_of(partial), partial.totals.count, partial.attempt) == ([1.0] * 4, 1, 2)


# ---- room


class TestRoom:
    def fill(self, world: World) -> list[Slot]:
        slots = [world.intake.receive() for _ in range(SLOTS)]
        assert all(slot is not None for slot in slots)
        assert world.intake.receive() is None
        return slots  # type: ignore[return-value]

    def test_first_come_first_served(self, world: World) -> None:
        slots = self.fill(world)
        waiting = [start(world.intake.wait_for_room()) for _ in range(3)]
        for i, slot in enumerate(slots[:3]):
            assert [waiter.called for waiter in waiting] == [j < i for j in range(3)]
            world.intake.release(slot)
            assert result_of(waiting[i]) is slot

    def test_nobody_overtakes_who_waits(self, world: World) -> None:
        slots = self.fill(world)
        waiting = start(world.intake.wait_for_room())
        world.ledger.release(slots[0])
        assert world.intake.receive() is None
        world.intake.release(slots[1])
        assert waiting.called
        assert world.intake.receive() is not None

    def test_no_room_in_time_is_said(self, world: World) -> None:
        slots = self.fill(world)
        waiting = start(world.intake.wait_for_room())
        world.reactor.advance(ROOM_TIMEOUT - 0.1)
        assert not waiting.called
        world.reactor.advance(0.2)
        with pytest.raises(NoRoom) as refusal:
            result_of(waiting)
        assert (refusal.value.http_status, refusal.value.retry_after) == (503, 5.0)
        world.intake.release(slots[0])
        assert world.intake.receive() is slots[0], "a slot was given to one who has left"

    def test_who_leaves_the_queue_takes_no_slot_along(self, world: World) -> None:
        slots = self.fill(world)
        waiting = [start(world.intake.wait_for_room()) for _ in range(2)]
        waiting[0].cancel()
        with pytest.raises(defer.CancelledError):
            result_of(waiting[0])
        world.intake.release(slots[0])
        assert result_of(waiting[1]) is slots[0]

    def test_merged_slots_go_to_those_who_wait(self, threaded: World) -> None:
        slots = self.fill(threaded)
        uploaded = threaded.upload("a", slot=slots[0])
        threaded.shared.questions[0].answer(ACCEPTED)
        assert result_of(uploaded)[0] is ACCEPTED
        waiting = start(threaded.intake.wait_for_room())
        assert not waiting.called
        threaded.reactor.work()
        assert result_of(waiting) is slots[0]
        assert slots[0].length == 0

    def test_slots_of_a_forgotten_iteration_go_to_those_who_wait(self, threaded: World) -> None:
        slots = self.fill(threaded)
        for fl_id, slot in zip("ab", slots, strict=False):
            threaded.upload(fl_id, slot=slot)
            threaded.shared.questions[-1].answer(ACCEPTED)
        waiting = start(threaded.intake.wait_for_room())
        threaded.intake.begin(6, 1)  # one of them is being merged
        assert result_of(waiting) is slots[1]
        assert slots[1].length == 0
