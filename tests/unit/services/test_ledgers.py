"""Ledgers of dead processes: real files, and a shared state that does what the test says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twisted.internet import defer, task
from twisted.python.failure import Failure

from fedcore.core.admission import Acceptance
from fedcore.errors import StoreUnavailable
from fedcore.ledger.files import MappedFile, create_file, ledger_files
from fedcore.ledger.layout import Epoch, Shape
from fedcore.ledger.ledger import Ledger, Update
from fedcore.services.ledgers import Ledgers
from fedcore.services.update_intake import UpdateIntake
from fedcore.store.cluster_state import ClientMeta, LedgerRevoked
from fedcore.wire import codec
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.messages import FeatureMap, RequestUpdateModel

MODEL = Layout((Weight("w", (4,)),))
SHAPE = Shape.of(MODEL, "job", 8, 4, 4096)
EPOCH = Epoch("instance", 5, 1, "00" * 32)
NEXT = Epoch("instance", 6, 1, "11" * 32)
META = ClientMeta(data_size=2, eval_data_size=3, start_ms=0)


class Shared:
    """Stands for ClusterState."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}
        self.uploads: dict[str, str] = {}
        self.away = False
        self.before_counted: Callable[[], None] = lambda: None
        self.redis = self

    async def ledger_owner(self, ledger_id: str) -> str:
        return self.owners.get(ledger_id, "")

    async def own_ledger(self, ledger_id: str, node_id: str, before: str = "") -> bool:
        if self.owners.get(ledger_id, "") not in (node_id, before):
            return False
        self.owners[ledger_id] = node_id
        return True

    async def counted(self, number: int, ledger_id: str, fl_ids: Sequence[str]) -> Mapping[str, ClientMeta]:
        self.before_counted()
        if self.away:
            raise StoreUnavailable("gone")
        return {fl_id: META for fl_id in fl_ids if self.uploads.get(fl_id) == ledger_id}

    async def accept_upload(self, *place: Any, **details: Any) -> tuple[Acceptance, int, ClientMeta]:
        return Acceptance.ACCEPTED, 1, META


class Reactor(task.Clock):
    """A reactor whose thread works when told to, or at once."""

    def __init__(self, at_once: bool = True) -> None:
        super().__init__()
        self.jobs: deque[Callable[[], None]] = deque()
        self.at_once = at_once

    def getThreadPool(self) -> Reactor:
        return self

    def callFromThread(self, function: Callable[..., Any], *arguments: Any) -> None:
        function(*arguments)

    def callInThreadWithCallback(self, done: Callable[[bool, Any], None], work: Callable[[], Any]) -> None:
        def job() -> None:
            try:
                result = work()
            except Exception:
                done(False, Failure())
            else:
                done(True, result)

        self.jobs.append(job)
        if self.at_once:
            self.work()

    def work(self) -> None:
        self.jobs.popleft()()


def result_of(work: Coroutine[Any, Any, Any] | defer.Deferred[Any]) -> Any:
    done = work if isinstance(work, defer.Deferred) else defer.Deferred.fromCoroutine(work)
    assert done.called, "still under way"
    outcome: list[Any] = []
    done.addBoth(outcome.append)
    if isinstance(outcome[0], Failure):
        outcome[0].raiseException()
    return outcome[0]


def request_of(fl_id: str, value: float) -> RequestUpdateModel:
    weights = (FeatureMap("w", np.full(4, value, np.float32)),)
    return RequestUpdateModel(fl_name="job", fl_id=fl_id, iteration=5, feature_map=weights, timestamp="1")


class Dead:
    """A ledger as its process left it."""

    def __init__(self, directory: Path, shared: Shared, epoch: Epoch = EPOCH, owner: str = "dead") -> None:
        self.shared = shared
        self.file: MappedFile = create_file(directory, owner, SHAPE.size)
        self.ledger = Ledger.create(self.file, MODEL, SHAPE)
        self.ledger.begin(epoch)
        shared.owners[self.ledger.id] = owner

    def upload(self, fl_id: str, value: float, *, counted: bool = True, accepted: bool = False) -> None:
        slot = self.ledger.receive()
        assert slot is not None
        body = codec.encode(request_of(fl_id, value))
        slot.buffer[: len(body)] = body
        slot.length = len(body)
        self.ledger.record(slot, fl_id, 0.5, 0.25)
        if counted:
            self.shared.uploads[fl_id] = self.ledger.id
        if accepted:
            self.ledger.accept(slot, Update(fl_id, {"w": np.full(4, value, np.float32)}, 2, 3, 0.5, 0.25))

    def die(self) -> None:
        self.file.close()


@pytest.fixture
def shared() -> Shared:
    return Shared()


@pytest.fixture
def ledgers(tmp_path: Path) -> Ledgers:
    ledgers = Ledgers(tmp_path, MODEL, SHAPE, False, Reactor())
    ledgers.begin(EPOCH)
    return ledgers


def adopt(ledgers: Ledgers, shared: Shared, epoch: Epoch = EPOCH) -> list[str]:
    return result_of(ledgers.adopt(shared, epoch, "me"))  # type: ignore[arg-type]


class TestAdoption:
    @pytest.mark.parametrize("merged", [False, True])
    @pytest.mark.parametrize("accepted", [False, True])
    def test_a_client_that_sent_twice_counts_once(
        self, tmp_path: Path, shared: Shared, ledgers: Ledgers, accepted: bool, merged: bool
    ) -> None:
        dead = Dead(tmp_path, shared)
        dead.upload("a", 1.0, accepted=accepted)
        if accepted and merged:
            dead.ledger.merge()
        dead.upload("a", 1.0)
        dead.upload("b", 10.0, accepted=True)
        dead.upload("c", 100.0, counted=False)
        dead.die()
        assert adopt(ledgers, shared) == [dead.ledger.id]
        partial = ledgers.adopted[dead.ledger.id]
        assert partial.totals.count == 2
        assert partial.sums.tolist() == [11.0] * 4
        assert (shared.owners[dead.ledger.id], ledgers.inherited) == ("me", {"dead"})

    def test_is_tried_again_when_the_shared_state_was_away(
        self, tmp_path: Path, shared: Shared, ledgers: Ledgers
    ) -> None:
        dead = Dead(tmp_path, shared)
        dead.upload("a", 1.0)
        dead.die()
        shared.away = True
        with pytest.raises(StoreUnavailable):
            adopt(ledgers, shared)
        assert ledgers.adopted == {}
        shared.away = False
        assert adopt(ledgers, shared) == [dead.ledger.id]
        assert ledgers.adopted[dead.ledger.id].totals.count == 1

    def test_that_outlives_its_iteration_is_dropped(
        self, tmp_path: Path, shared: Shared, ledgers: Ledgers
    ) -> None:
        dead = Dead(tmp_path, shared)
        dead.upload("a", 1.0)
        dead.die()
        shared.before_counted = lambda: ledgers.begin(NEXT)
        assert adopt(ledgers, shared) == []
        assert (ledgers.adopted, ledger_files(tmp_path)) == ({}, [])

    def test_stays_when_the_same_epoch_begins_again(
        self, tmp_path: Path, shared: Shared, ledgers: Ledgers
    ) -> None:
        """As it does when the own ledger was revoked and another one is opened."""
        dead = Dead(tmp_path, shared)
        dead.upload("a", 1.0)
        dead.die()
        adopt(ledgers, shared)
        ledgers.begin(EPOCH)
        assert ledgers.adopted.keys() == {dead.ledger.id}
        ledgers.begin(NEXT)
        assert (ledgers.adopted, ledgers.inherited, ledger_files(tmp_path)) == ({}, set(), [])

    def test_leaves_alone_what_lives(self, tmp_path: Path, shared: Shared, ledgers: Ledgers) -> None:
        paused = Dead(tmp_path, shared)
        paused.upload("a", 1.0)
        assert ledgers.open()
        assert adopt(ledgers, shared) == []
        assert len(ledger_files(tmp_path)) == 2

    @pytest.mark.parametrize(
        ("epoch", "left"),
        [
            (Epoch("instance", 4, 1, "00" * 32), 0),
            (Epoch("instance", 5, 1, "22" * 32), 1),  # this server may be the one that is wrong
            (NEXT, 1),
        ],
    )
    def test_of_other_epochs(
        self, tmp_path: Path, shared: Shared, ledgers: Ledgers, epoch: Epoch, left: int
    ) -> None:
        dead = Dead(tmp_path, shared, epoch)
        dead.upload("a", 1.0)
        dead.die()
        assert adopt(ledgers, shared) == []
        assert len(ledger_files(tmp_path)) == left
        assert shared.owners[dead.ledger.id] == "dead"

    def test_of_nothing_makes_room_at_once(self, tmp_path: Path, shared: Shared, ledgers: Ledgers) -> None:
        dead = Dead(tmp_path, shared)
        dead.die()
        create_file(tmp_path, "unborn", SHAPE.size).close()  # killed before it wrote a word
        assert adopt(ledgers, shared) == [dead.ledger.id]
        assert (ledgers.adopted, ledgers.inherited, ledger_files(tmp_path)) == ({}, {"dead"}, [])


class TestCloseAtACleanStop:
    def test_keeps_a_body_whose_question_is_open(self, tmp_path: Path, ledgers: Ledgers) -> None:
        assert ledgers.open() and ledgers.own is not None
        slot = ledgers.own.receive()
        ledgers.close()
        assert len(ledger_files(tmp_path)) == 1
        assert slot is not None
        ledgers.own.release(slot)
        ledgers.close()
        assert ledger_files(tmp_path) == []


class TestOnADisk:
    @pytest.fixture(autouse=True)
    def world(self, tmp_path: Path, shared: Shared) -> None:
        self.shared, self.reactor = shared, Reactor(at_once=False)
        self.ledgers = Ledgers(tmp_path, MODEL, SHAPE, True, self.reactor)
        assert self.ledgers.open()
        self.intake = UpdateIntake(self.ledgers, tmp_path, "me", 4, 8.0, self.reactor)
        self.intake.begin(EPOCH)

    def upload(self, fl_id: str) -> defer.Deferred[tuple[Acceptance, int]]:
        body = codec.encode(request_of(fl_id, 1.0))
        slot = self.intake.receive(len(body))
        slot.buffer[: len(body)] = body
        slot.length = len(body)
        request = codec.decode(RequestUpdateModel, slot.buffer[: len(body)])
        accepting = self.intake.accept(slot, request, self.shared, 5, 1, quorum=8, fit=True)  # type: ignore[arg-type]
        return defer.Deferred.fromCoroutine(accepting)

    def test_one_flush_serves_all_that_wait_when_it_begins(self) -> None:
        first, second, third = self.upload("a"), self.upload("b"), self.upload("c")
        assert (len(self.reactor.jobs), first.called) == (1, False)
        self.reactor.work()
        assert (first.called, second.called) == (True, False)
        assert len(self.reactor.jobs) == 1
        self.reactor.work()
        assert second.called and third.called
        assert not self.reactor.jobs

    def test_nothing_is_accepted_that_could_not_be_flushed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ledger = self.ledgers.own
        assert ledger is not None

        def fail() -> None:
            raise OSError("the disk is gone")

        monkeypatch.setattr(ledger, "sync", fail)
        upload = self.upload("a")
        self.reactor.work()
        with pytest.raises(OSError, match="the disk is gone"):
            result_of(upload)
        assert ledger.idle

    def test_a_slot_of_a_revoked_ledger_is_not_taken_for_one_of_the_next(self) -> None:
        slot = self.intake.receive(100)
        self.ledgers.discard()
        assert self.ledgers.open()
        self.intake.begin(EPOCH)
        request = request_of("a", 1.0)
        accepting = self.intake.accept(slot, request, self.shared, 5, 1, quorum=8, fit=True)  # type: ignore[arg-type]
        with pytest.raises(LedgerRevoked):
            result_of(accepting)
