"""Ledgers of dead processes: real files, and a shared state that does what the test says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twisted.internet import defer, task
from twisted.python.failure import Failure

from fedcore.core.admission import Acceptance
from fedcore.core.client_key import client_key
from fedcore.errors import StoreUnavailable
from fedcore.ledger.copy import FileCopy
from fedcore.ledger.files import MappedFile, create_file, ledger_files, open_file
from fedcore.ledger.layout import Damaged, Epoch, Shape
from fedcore.ledger.ledger import Ledger, Partial, Read, Update
from fedcore.services.ledgers import Ledgers, Whereabouts
from fedcore.services.update_forms import update_of
from fedcore.services.update_intake import UpdateIntake
from fedcore.store.cluster_state import ClientMeta, LeftOut
from fedcore.store.keys import REVOKED
from fedcore.wire import codec
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.messages import FeatureMap, RequestUpdateModel

MODEL = Layout((Weight("w", (4,)),))
SHAPE = Shape.of(MODEL, "job", 8, 4, 4096)
EPOCH = Epoch("instance", 5, "00" * 32)
NEXT = Epoch("instance", 6, "11" * 32)
GIVER = "10.0.0.2:1::2022-11-22-10:00:00.001.002::69383"
META = ClientMeta(data_size=2, eval_data_size=3, start_ms=0)


class Shared:
    """Stands for ClusterState."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}
        self.uploads: dict[str, str] = {}
        self.restored: list[tuple[str, set[str]]] = []  # ledger id, client keys
        self.away = False
        self.living: set[str] = set()
        self.left_out: LeftOut | None = None
        self.before_counted: Callable[[], None] = lambda: None
        self.redis = self

    async def ledger_owner(self, ledger_id: str) -> str:
        return self.owners.get(ledger_id, "")

    async def is_alive(self, role: str, node_id: str) -> bool:
        return node_id in self.living

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

    async def replicated(self, timeout_ms: int) -> bool:
        return True

    async def restore_clients(
        self, number: int, ledger_id: str, node_id: str, clients: Mapping[str, ClientMeta], base: str = ""
    ) -> int:
        if self.left_out is not None:
            raise self.left_out
        assert (number, base) == (EPOCH.iteration, EPOCH.base)
        self.restored.append((ledger_id, set(clients)))
        return 0

    async def forget_ledger(self, ledger_id: str) -> None:
        if self.away:
            raise StoreUnavailable("gone")
        self.owners.pop(ledger_id, None)


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

    def upload(
        self, fl_id: str, value: float, *, counted: bool = True, accepted: bool = False, decoder: int = 0
    ) -> None:
        slot = self.ledger.receive()
        assert slot is not None
        body = codec.encode(request_of(fl_id, value))
        slot.buffer[: len(body)] = body
        slot.length = len(body)
        self.ledger.record(slot, fl_id, 0.5, 0.25, decoder)
        if counted:
            self.shared.uploads[fl_id] = self.ledger.id
        if accepted:
            self.ledger.accept(slot, Update(fl_id, {"w": np.full(4, value, np.float32)}, 2, 3, 0.5, 0.25))

    def die(self) -> None:
        self.file.close()


class Forms:
    """Stands for UpdateForms: every update is plain, whatever its record says; notes what was read."""

    def __init__(self, *bases: str) -> None:
        self.bases = set(bases)
        self.read: list[tuple[str, int]] = []  # client, decoder

    def reader(self, base: str) -> Read | None:
        def read(body: memoryview, data_size: int, eval_data_size: int, decoder: int) -> Update:
            update = update_of(codec.decode(RequestUpdateModel, body), data_size, eval_data_size)
            self.read.append((update.fl_id, decoder))
            return update

        return read if base in self.bases else None


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

    def test_tells_the_shared_state_again_what_counts(
        self, tmp_path: Path, shared: Shared, ledgers: Ledgers
    ) -> None:
        """It may have lost data since the owner died."""
        dead = Dead(tmp_path, shared)
        dead.upload("a", 1.0, accepted=True)
        dead.upload("b", 1.0)
        dead.upload("c", 1.0, counted=False)
        dead.die()
        adopt(ledgers, shared)
        assert shared.restored == [(dead.ledger.id, {client_key("a"), client_key("b")})]

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
            (Epoch("instance", 4, "00" * 32), 0),
            (Epoch("instance", 5, "22" * 32), 1),  # this server may be the one that is wrong
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

    def test_waits_for_the_model_that_its_updates_were_made_from(
        self, tmp_path: Path, shared: Shared
    ) -> None:
        forms = Forms()
        ledgers = Ledgers(tmp_path, MODEL, SHAPE, False, Reactor(), forms)
        ledgers.begin(EPOCH)
        dead = Dead(tmp_path, shared)
        dead.upload("a", 1.0, accepted=True)
        dead.die()
        assert (adopt(ledgers, shared), shared.owners) == ([], {dead.ledger.id: "dead"})
        forms.bases.add(EPOCH.base)
        assert adopt(ledgers, shared) == [dead.ledger.id]
        assert ledgers.adopted[dead.ledger.id].sums.tolist() == [1.0] * 4

    @pytest.mark.parametrize("accepted", [False, True])
    def test_decodes_what_is_not_plain_in_a_thread(
        self, tmp_path: Path, shared: Shared, accepted: bool
    ) -> None:
        forms, reactor = Forms(EPOCH.base), Reactor(at_once=False)
        ledgers = Ledgers(tmp_path, MODEL, SHAPE, False, reactor, forms)
        ledgers.begin(EPOCH)
        dead = Dead(tmp_path, shared)
        dead.upload("a", 1.0, accepted=accepted, decoder=1)
        dead.upload("b", 10.0)
        dead.die()
        adopted = defer.Deferred.fromCoroutine(ledgers.adopt(shared, EPOCH, "me"))  # type: ignore[arg-type]
        assert forms.read == []
        while reactor.jobs:
            reactor.work()
        assert result_of(adopted) == [dead.ledger.id]
        assert sorted(forms.read) == [("a", 1), ("b", 0)]
        assert ledgers.adopted[dead.ledger.id].sums.tolist() == [11.0] * 4

    def test_of_nothing_makes_room_at_once(self, tmp_path: Path, shared: Shared, ledgers: Ledgers) -> None:
        dead = Dead(tmp_path, shared)
        dead.die()
        create_file(tmp_path, "unborn", SHAPE.size).close()  # killed before it wrote a word
        assert adopt(ledgers, shared) == [dead.ledger.id]
        assert (ledgers.adopted, ledgers.inherited, ledger_files(tmp_path)) == ({}, {"dead"}, [])


class TestOwners:
    """What the shared state says of a dead process's ledger decides what becomes of its file."""

    def test_a_revoked_one_is_removed(self, tmp_path: Path, shared: Shared, ledgers: Ledgers) -> None:
        """Its clients were told to come again."""
        dead = Dead(tmp_path, shared)
        dead.upload("a", 1.0)
        dead.die()
        shared.owners[dead.ledger.id] = REVOKED
        assert adopt(ledgers, shared) == []
        assert (ledgers.adopted, ledger_files(tmp_path)) == ({}, [])
        assert shared.owners[dead.ledger.id] == REVOKED

    ME = "10.0.0.1:7777::2022-11-22-10:00:00.001.002::12345"

    @pytest.mark.parametrize("lives", [True, False])
    @pytest.mark.parametrize("host", ["10.0.0.1", "10.0.0.2"])
    def test_one_of_another_host_is_adopted_once_its_owner_does_not_live(
        self, tmp_path: Path, shared: Shared, ledgers: Ledgers, host: str, lives: bool
    ) -> None:
        """It was handed over, or this host has had another address; the lock of its file is free."""
        dead = Dead(tmp_path, shared)
        dead.upload("a", 1.0)
        dead.die()
        shared.owners[dead.ledger.id] = owner = f"{host}:6666::2022-11-22-10:00:00.001.002::69383"
        shared.living = {owner} if lives else set()
        waits = lives and host == "10.0.0.2"
        for _ in range(2):
            adopted = result_of(ledgers.adopt(shared, EPOCH, self.ME))  # type: ignore[arg-type]
            assert ledger_files(tmp_path) == [dead.file.path]
            if waits:
                assert (adopted, shared.owners[dead.ledger.id]) == ([], owner)
                assert ledgers.locate(dead.ledger.id) is Whereabouts.HELD
            else:
                assert (list(ledgers.adopted), shared.owners[dead.ledger.id]) == ([dead.ledger.id], self.ME)
        shared.living.clear()
        result_of(ledgers.adopt(shared, EPOCH, self.ME))  # type: ignore[arg-type]
        assert ledgers.adopted[dead.ledger.id].totals.count == 1

    @pytest.mark.parametrize(
        ("owner", "lives", "kept", "is_ours"),
        [
            ("", False, True, True),
            ("10.0.0.1:6667", True, True, True),
            ("10.0.0.2:6666", False, True, True),
            ("10.0.0.2:6666", True, True, False),
            (REVOKED, False, False, False),
        ],
    )
    def test_one_that_redis_gives_back_to_a_former_owner_is_claimed_again(
        self,
        tmp_path: Path,
        shared: Shared,
        ledgers: Ledgers,
        owner: str,
        lives: bool,
        kept: bool,
        is_ours: bool,
    ) -> None:
        """After a fail-over that lost the adoption; whoever Redis names on this host cannot have the file's lock.

        One of another host may have given it to the one that gave it to us, and Redis forgot both.
        """
        dead = Dead(tmp_path, shared)
        dead.upload("a", 1.0)
        dead.die()
        shared.owners.clear()  # Redis had lost its data when it was adopted
        result_of(ledgers.adopt(shared, EPOCH, self.ME))  # type: ignore[arg-type]
        shared.owners[dead.ledger.id] = before = (
            f"{owner}::2022-11-22-10:00:00.001.002::69383" if ":" in owner else owner
        )
        shared.living = {before} if lives else set()
        claimed = result_of(ledgers.claim_again(shared, dead.ledger.id, self.ME))  # type: ignore[arg-type]
        assert (claimed, shared.owners[dead.ledger.id]) == (kept, self.ME if is_ours else before)

    def test_a_copy_that_was_not_removed_goes_with_its_iteration(
        self, tmp_path: Path, shared: Shared, ledgers: Ledgers
    ) -> None:
        dead = Dead(tmp_path, shared)
        dead.upload("a", 1.0)
        dead.die()
        shared.owners[dead.ledger.id] = GIVER
        shared.living = {GIVER}
        result_of(ledgers.adopt(shared, EPOCH, self.ME))  # type: ignore[arg-type]
        ledgers.begin(NEXT)
        result_of(ledgers.adopt(shared, NEXT, self.ME))  # type: ignore[arg-type]
        assert (ledger_files(tmp_path), shared.owners[dead.ledger.id]) == ([], GIVER)

    def test_what_the_shared_state_does_not_take_back_is_told(
        self, tmp_path: Path, shared: Shared, ledgers: Ledgers
    ) -> None:
        told: list[Any] = []
        ledgers.on_left_out = lambda *news: told.append(news)
        dead = Dead(tmp_path, shared)
        dead.upload("a", 1.0)
        dead.die()
        shared.left_out = LeftOut(1, rebased=False)
        adopt(ledgers, shared)
        assert told == [(dead.ledger.id, EPOCH, shared.left_out)]

    def test_what_is_gone_is_taken_off_the_list(
        self, tmp_path: Path, shared: Shared, ledgers: Ledgers
    ) -> None:
        empty, used = Dead(tmp_path, shared), Dead(tmp_path, shared, owner="used")
        used.upload("a", 1.0)
        empty.die(), used.die()
        adopt(ledgers, shared)
        assert shared.owners.keys() == {empty.ledger.id, used.ledger.id}
        shared.away = True
        with pytest.raises(StoreUnavailable):
            adopt(ledgers, shared)
        shared.away = False
        adopt(ledgers, shared)
        assert shared.owners.keys() == {used.ledger.id}
        ledgers.begin(NEXT)
        adopt(ledgers, shared, NEXT)
        assert shared.owners == {}


class TestWhereabouts:
    def test_of_a_ledger(self, tmp_path: Path, shared: Shared, ledgers: Ledgers) -> None:
        dead, foreign = Dead(tmp_path, shared), Dead(tmp_path, shared, NEXT, owner="foreign")
        dead.upload("a", 1.0)
        assert ledgers.open() and ledgers.own is not None
        assert ledgers.locate(ledgers.own.id) is Whereabouts.HERE
        assert ledgers.locate(dead.ledger.id) is Whereabouts.HELD, "its process lives"
        dead.die()
        assert ledgers.locate(dead.ledger.id) is Whereabouts.HELD, "it is about to be adopted"
        adopt(ledgers, shared)
        assert ledgers.locate(dead.ledger.id) is Whereabouts.HERE
        assert ledgers.in_hand == {ledgers.own.id, dead.ledger.id}
        assert ledgers.locate(foreign.ledger.id) is Whereabouts.HELD
        for nothing in ("", "00" * 16):
            assert ledgers.locate(nothing) is Whereabouts.ABSENT

    def test_of_what_was_passed_over(self, tmp_path: Path, shared: Shared, ledgers: Ledgers) -> None:
        later = Dead(tmp_path, shared, NEXT)
        later.die()
        adopt(ledgers, shared)
        assert ledgers.locate(later.ledger.id) is Whereabouts.ABSENT
        ledgers.begin(NEXT)
        assert ledgers.locate(later.ledger.id) is Whereabouts.HELD

    def test_files_that_are_none_are_no_ledgers(self, tmp_path: Path, ledgers: Ledgers) -> None:
        (tmp_path / "empty.ledger").touch()
        (tmp_path / "text.ledger").write_text("hello" * 1000)
        (tmp_path / "folder.ledger").mkdir()
        assert ledgers.locate("00" * 16) is Whereabouts.ABSENT

    def test_what_they_hold_updates_of(self, ledgers: Ledgers) -> None:
        assert ledgers.epoch == EPOCH
        ledgers.begin(NEXT)
        assert ledgers.epoch == NEXT


class TestRoomForMore:
    def test_a_ledger_that_lists_too_few_makes_room(self, tmp_path: Path, ledgers: Ledgers) -> None:
        assert ledgers.open() and ledgers.own is not None
        before = ledgers.own.id
        for clients in (SHAPE.clients, SHAPE.clients - 1):
            ledgers.reshape(replace(SHAPE, clients=clients))
            assert ledgers.own.id == before
        ledgers.reshape(replace(SHAPE, clients=100))
        assert ledgers.own.id != before
        assert ledgers.own.shape.clients == 100
        assert len(ledger_files(tmp_path)) == 1


class TestHandOver:
    """The sealed sum of a server that stops goes to another host."""

    def sealed(self, directory: Path, shared: Shared) -> Dead:
        giver = Dead(directory / "there", shared, owner=GIVER)
        giver.upload("a", 1.0, accepted=True)
        giver.upload("b", 10.0, accepted=True)
        giver.ledger.merge()
        return giver

    def read(self, ledgers: Ledgers, partial: Partial) -> FileCopy:
        copy = ledgers.copy(partial.head, partial.start, len(partial.content))
        copy.fill(0, partial.content)
        return copy

    def keep(self, ledgers: Ledgers, copy: FileCopy, shared: Shared, epoch: Epoch = EPOCH) -> Partial | None:
        return result_of(ledgers.keep(copy, epoch, shared, GIVER, "me"))  # type: ignore[arg-type,no-any-return]

    def test_is_kept_as_an_adopted_one_is(self, tmp_path: Path, shared: Shared, ledgers: Ledgers) -> None:
        giver = self.sealed(tmp_path, shared)
        partial = self.keep(ledgers, self.read(ledgers, giver.ledger.seal()), shared)
        assert partial is not None
        assert partial.sums.tolist() == [11.0] * 4
        assert shared.owners == {giver.ledger.id: "me"}
        assert ledgers.adopted == {giver.ledger.id: partial}
        assert len(ledger_files(tmp_path)) == 1
        assert adopt(ledgers, shared) == [], "it is in hand already"
        ledgers.begin(NEXT)
        assert (ledgers.adopted, ledger_files(tmp_path)) == ({}, [])

    def test_outlives_who_kept_it(self, tmp_path: Path, shared: Shared, ledgers: Ledgers) -> None:
        giver = self.sealed(tmp_path, shared)
        copy = self.read(ledgers, giver.ledger.seal())
        self.keep(ledgers, copy, shared)
        copy.file.close()  # with the process
        sibling = Ledgers(tmp_path, MODEL, SHAPE, False, Reactor())
        sibling.begin(EPOCH)
        assert adopt(sibling, shared) == [giver.ledger.id]
        assert sibling.adopted[giver.ledger.id].sums.tolist() == [11.0] * 4

    @pytest.mark.parametrize("owner", [REVOKED, "another heir"])
    def test_that_was_given_up_is_not_kept(
        self, tmp_path: Path, shared: Shared, ledgers: Ledgers, owner: str
    ) -> None:
        giver = self.sealed(tmp_path, shared)
        copy = self.read(ledgers, giver.ledger.seal())
        shared.owners[giver.ledger.id] = owner
        with pytest.raises(Damaged, match="not the giver's"):
            self.keep(ledgers, copy, shared)
        assert shared.owners == {giver.ledger.id: owner}
        assert (ledgers.adopted, ledger_files(tmp_path)) == ({}, [])

    @pytest.mark.parametrize("begins", [NEXT, Epoch("instance", 5, "44" * 32)])
    def test_of_an_epoch_that_is_over_is_dropped(
        self, tmp_path: Path, shared: Shared, ledgers: Ledgers, begins: Epoch
    ) -> None:
        giver = self.sealed(tmp_path, shared)
        copy = self.read(ledgers, giver.ledger.seal())
        ledgers.begin(begins)
        assert self.keep(ledgers, copy, shared) is None
        assert (ledgers.adopted, ledger_files(tmp_path)) == ({}, [])

    def test_that_is_damaged_leaves_nothing(self, tmp_path: Path, shared: Shared, ledgers: Ledgers) -> None:
        giver = self.sealed(tmp_path, shared)
        partial = giver.ledger.seal()
        copy = ledgers.copy(partial.head, partial.start, len(partial.content))
        with pytest.raises(Damaged):
            self.keep(ledgers, copy, shared)
        assert shared.owners[giver.ledger.id] == GIVER
        assert (ledgers.adopted, ledger_files(tmp_path)) == ({}, [])

    def test_of_another_job_or_model_is_refused(
        self, tmp_path: Path, shared: Shared, ledgers: Ledgers
    ) -> None:
        partial = self.sealed(tmp_path, shared).ledger.seal()
        for shape in (
            Shape.of(MODEL, "other", 8, 4, 4096),
            Shape.of(Layout((Weight("x", (4,)),)), "job", 8, 4, 4096),
        ):
            elsewhere = Ledgers(tmp_path, MODEL, shape, False, Reactor())
            for copy in (elsewhere.copy, elsewhere.copy_in_memory):
                with pytest.raises(Damaged, match="another job or model"):
                    copy(partial.head, partial.start, len(partial.content))
        assert ledger_files(tmp_path) == []

    def test_who_gave_it_away_lets_go(self, tmp_path: Path, shared: Shared, ledgers: Ledgers) -> None:
        dead = Dead(tmp_path, shared)
        dead.upload("a", 1.0)
        dead.die()
        assert ledgers.open() and ledgers.own is not None
        adopt(ledgers, shared)
        ledgers.gave_away(dead.ledger.id)
        assert ledgers.adopted == {}
        assert len(ledger_files(tmp_path)) == 1
        ledgers.gave_away("of nobody")
        assert ledgers.own is not None
        ledgers.gave_away(ledgers.own.id)
        assert (ledgers.own, ledgers.in_hand, ledger_files(tmp_path)) == (None, set(), [])


class TestCloseAtACleanStop:
    def test_keeps_a_body_whose_question_is_open(
        self, tmp_path: Path, shared: Shared, ledgers: Ledgers
    ) -> None:
        assert ledgers.open() and ledgers.own is not None
        ledger_id, slot = ledgers.own.id, ledgers.own.receive()
        assert slot is not None
        ledgers.close()
        assert (ledgers.own, ledgers.problem) == (None, "the server is stopping")
        assert ledgers.locate(ledger_id) is Whereabouts.HELD
        open_file(ledger_files(tmp_path)[0]).close()  # nobody holds it any more
        ledgers.close()

    def test_keeps_updates_for_a_sibling(self, tmp_path: Path, shared: Shared, ledgers: Ledgers) -> None:
        assert ledgers.open() and ledgers.own is not None
        ledgers.own.begin(EPOCH)
        slot = ledgers.own.receive()
        assert slot is not None
        body = codec.encode(request_of("a", 3.0))
        slot.buffer[: len(body)] = body
        slot.length = len(body)
        ledgers.own.record(slot, "a", 0.5, 0.25)
        ledgers.own.accept(slot, Update("a", {"w": np.full(4, 3.0, np.float32)}, 2, 3, 0.5, 0.25))
        ledger_id = ledgers.own.id
        shared.owners[ledger_id] = "stopped"
        ledgers.close()
        sibling = Ledgers(tmp_path, MODEL, SHAPE, False, Reactor())
        sibling.begin(EPOCH)
        assert adopt(sibling, shared) == [ledger_id]
        assert sibling.adopted[ledger_id].sums.tolist() == [3.0] * 4

    def test_leaves_no_empty_one(self, tmp_path: Path, ledgers: Ledgers) -> None:
        assert ledgers.open()
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

    def test_a_body_in_a_slot_of_a_lost_ledger_moves_into_the_next(self) -> None:
        slot = self.intake.receive(100)
        self.ledgers.discard()
        assert self.ledgers.open()
        self.intake.begin(EPOCH)
        request = request_of("a", 1.0)
        accepting = self.intake.accept(slot, request, self.shared, 5, 1, quorum=8, fit=True)  # type: ignore[arg-type]
        uploaded = defer.Deferred.fromCoroutine(accepting)
        self.reactor.work()
        assert result_of(uploaded) == (Acceptance.ACCEPTED, 1)
        assert self.ledgers.own is not None and self.ledgers.own.owns(slot) and self.ledgers.own.holds("a")
