"""Servers on two hosts, their ledgers, and everything that may come between them and the shared state.

The ledgers are real, their files are bytes in memory; ``Shared`` says what the scripts say. Servers are paused and
killed between any two writes, also while they adopt or take over the sum of one that stops; questions arrive late,
replies get lost, leases lapse, ledgers are revoked and seals undone. Whatever is published holds exactly the updates
that the shared state counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial as bind
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from unit.ledger.histories import EVERYTHING, MODEL, SHAPE, Device, assert_holds, body_of, plain_sum, read

from fedcore.aggregation.fedavg import FedAvg
from fedcore.aggregation.rule import Total
from fedcore.aggregation.sums import RunningSum, Spans
from fedcore.ledger import layout
from fedcore.ledger import ledger as ledger_module
from fedcore.ledger.decoding import Decoder
from fedcore.ledger.layout import Damaged, Epoch, SlotState
from fedcore.ledger.ledger import Ledger, Partial, Slot
from fedcore.store.keys import REVOKED

SOAK = int(os.environ.get("FEDCORE_SOAK", "0"))
QUORUM = 5
HOSTS = ("A", "A", "B")


class Died(Exception):
    """The process was killed in the middle of a write."""


@dataclass
class File:
    """A ledger file.

    Attributes:
        host: on whose disk it is.
        lock: the process that holds it.
    """

    content: bytearray
    host: str
    lock: Server | None
    removed: bool = False

    def remove(self) -> None:
        self.removed, self.lock = True, None


class Storage:
    """A process's view of a file: its writes stop with the process."""

    def __init__(self, file: File, process: Server) -> None:
        self.buffer = memoryview(file.content)
        self._process = process

    def write(self, at: int, data: bytes | memoryview) -> None:
        fuse = self._process.fuse
        if fuse == 0:
            if len(data) != 8 or at % 8:
                half = len(data) // 2
                self.buffer[at : at + half] = data[:half]
            raise Died
        if fuse is not None:
            self._process.fuse = fuse - 1
        self.buffer[at : at + len(data)] = data

    def sync(self) -> None:
        pass


# ---- the shared state


class Shared:
    """What Redis holds; every method is one script."""

    def __init__(self) -> None:
        self.number = 1
        self.attempt = 1
        self.collecting = True
        self.uploads: dict[str, str] = {}  # client -> ledger id
        self.owners: dict[str, str] = {}  # ledger id -> node
        self.lapsed: set[str] = set()

    @property
    def epoch(self) -> Epoch:
        return Epoch("instance", self.number, f"{self.number:064x}")

    def accept(self, place: tuple[int, int], fl_id: str, ledger_id: str, node: str, refuse: bool) -> str:
        """accept_upload.lua; ``place``: iteration and attempt."""
        now = self.number == place[0]
        holder = self.uploads.get(fl_id) if now else None
        if holder is not None and holder != ledger_id:
            return "repeated"
        if self.owners.get(ledger_id) != node:
            return "revoked"
        if node in self.lapsed:
            return "lapsed"
        if not now:
            return "closed"
        if holder is not None:
            return "accepted"
        if self.attempt != place[1]:
            return "closed"
        if refuse or len(self.uploads) >= QUORUM or not self.collecting:
            return "full"
        self.uploads[fl_id] = ledger_id
        return "accepted"

    def own(self, ledger_id: str, node: str, before: str) -> bool:
        """own_ledger.lua"""
        if self.owners.get(ledger_id, "") not in (before, node):
            return False
        self.owners[ledger_id] = node
        return True

    def reopen(self, lost: set[str]) -> None:
        """reopen.lua: collect again; the places of the lost ledgers' clients are free again."""
        self.owners |= dict.fromkeys(lost, REVOKED)
        self.uploads = {fl_id: holder for fl_id, holder in self.uploads.items() if holder not in lost}
        self.attempt, self.collecting = self.attempt + 1, True

    def move_on(self) -> None:
        """advance.lua"""
        self.number, self.attempt, self.collecting = self.number + 1, 1, True
        self.uploads = {}
        self.owners = {ledger_id: node for ledger_id, node in self.owners.items() if node != REVOKED}


# ---- servers


@dataclass(eq=False)
class Question:
    """An update that the shared state was asked about."""

    epoch: Epoch
    attempt: int
    device: Device
    slot: Slot
    ledger: Ledger


@dataclass(eq=False)
class Server:
    """One process.

    Attributes:
        host: where it runs.
        fuse: writes until it is killed, None if nobody plans to.
        adopted: sealed sums of other servers' ledgers.
        taken: their files.
    """

    node: str
    host: str
    world: World
    fuse: int | None = None
    alive: bool = True
    paused: bool = False
    epoch: Epoch | None = None
    attempt: int = 1
    file: File | None = None
    ledger: Ledger | None = None
    questions: list[Question] = field(default_factory=list)
    adopted: dict[str, Partial] = field(default_factory=dict)
    taken: dict[str, File] = field(default_factory=dict)

    def open(self) -> None:
        """Make an own ledger."""
        self.file = File(bytearray(SHAPE.size), self.host, self)
        self.world.files.append(self.file)
        self.ledger = Ledger.create(Storage(self.file, self), MODEL, SHAPE)
        assert self.world.shared.own(self.ledger.id, self.node, "")
        self.begin()

    def begin(self) -> None:
        """Serve the epoch that the shared state is in; what was adopted for the same one stays."""
        if self.epoch != self.world.shared.epoch:
            for ledger_id in list(self.taken):
                self.drop(ledger_id)
        self.epoch, self.attempt = self.world.shared.epoch, self.world.shared.attempt
        assert self.ledger is not None
        self.ledger.begin(self.epoch)

    def drop(self, ledger_id: str) -> None:
        """Let go of an adopted ledger."""
        self.taken.pop(ledger_id).remove()
        del self.adopted[ledger_id]

    def look(self) -> None:
        """Follow the shared state; revoked ledgers are dropped, after an undone seal updates are taken again."""
        shared = self.world.shared
        if self.ledger is None or shared.owners.get(self.ledger.id) != self.node:
            if self.file is not None:
                self.file.remove()
            self.questions.clear()
            self.open()
        for ledger_id in [i for i in self.taken if shared.owners.get(i) != self.node]:
            self.drop(ledger_id)
        if self.epoch != shared.epoch:
            for question in list(self.questions):
                self.ask(question)
            self.begin()
        elif self.attempt != shared.attempt:
            assert self.ledger is not None
            self.ledger.unseal()
            self.attempt = shared.attempt

    def upload(self, device: Device, fate: str) -> None:
        """A device uploads; ``fate`` of the question: heard, refused, late, or its reply is lost."""
        ledger, epoch = self.ledger, self.epoch
        assert ledger is not None and epoch is not None
        slot = ledger.receive()
        if slot is None:
            return
        body = body_of(device)
        slot.buffer[: len(body)] = body
        slot.length = len(body)
        if not ledger.holds(device.fl_id):
            update = read(slot.body, device.data_size, device.eval_data_size, device.form)
            ledger.record(slot, device.fl_id, update.loss, update.accuracy, device.form)
        question = Question(epoch, self.attempt, device, slot, ledger)
        self.questions.append(question)
        if fate == "late":
            self.world.under_way.append(bind(self.put, question))
        elif fate == "lost":
            self.put(question)
        else:
            self.ask(question, refuse=fate == "refused")

    def put(self, question: Question, refuse: bool = False) -> str:
        """The question reaches the shared state, whether or not the server still lives."""
        fl_id, ledger_id = question.device.fl_id, question.ledger.id
        place = (question.epoch.iteration, question.attempt)
        return self.world.shared.accept(place, fl_id, ledger_id, self.node, refuse)

    def ask(self, question: Question, refuse: bool = False) -> None:
        """Ask and hear the answer."""
        word = self.put(question, refuse)
        ledger, device = question.ledger, question.device
        if word == "lapsed":
            return  # asked again later
        self.questions.remove(question)
        if word == "accepted" and not ledger.holds(device.fl_id):
            sizes = device.data_size, device.eval_data_size
            ledger.accept(question.slot, read(question.slot.body, *sizes, device.form))
        else:
            ledger.release(question.slot)
        if word in ("accepted", "repeated"):
            self.world.answered.add((question.epoch, device.fl_id))

    def merge(self, batch: int) -> None:
        if self.ledger is not None and self.ledger.unmerged:
            with patch.object(ledger_module, "MERGE_BATCH", batch):
                for slot in self.ledger.merge():
                    self.ledger.reuse(slot)

    def adopt(self) -> None:
        """Take over whatever no living process of this host holds."""
        for file in list(self.world.files):
            if file.removed or file.lock is not None or file.host != self.host:
                continue
            file.lock = self
            self.take_over(file)

    def take_over(self, file: File) -> None:
        """Adopt one file whose lock we hold."""
        shared, epoch = self.world.shared, self.world.shared.epoch
        try:
            _, examined = layout.examine(memoryview(file.content))
        except Damaged:
            assert not any(file.content[layout.GENERATION : layout.PAGE]), "only a header may be half done"
            file.remove()
            return
        before = shared.owners.get(examined.ledger_id, "")
        elsewhere = before != "" and self.world.hosts.get(before) != self.host
        if examined.origin != epoch.origin or before == REVOKED or elsewhere:
            file.remove()
            return
        assert shared.own(examined.ledger_id, self.node, before)
        ledger, entries = Ledger.recover(Storage(file, self), MODEL, epoch)
        asked = {entry.record.fl_id for entry in entries if entry.state is SlotState.RECEIVED}
        sizes = {
            fl_id: (self.world.devices[fl_id].data_size, self.world.devices[fl_id].eval_data_size)
            for fl_id, holder in shared.uploads.items()
            if holder == ledger.id and fl_id in asked
        }
        assert not ledger.settle(entries, sizes, read)
        while ledger.unmerged:
            ledger.merge()
        self.adopted[ledger.id] = ledger.seal()
        self.taken[ledger.id] = file

    def seal(self) -> Partial | None:
        """Answer what is open, merge all and close the own sum; None if the shared state does not answer."""
        for question in list(self.questions):
            self.ask(question)
        if self.questions or self.ledger is None:
            return None
        self.merge(SHAPE.clients)
        return self.ledger.seal()

    def keep(self, partial: Partial) -> bool:
        """Take over the sealed sum of a server of another host; False if it cannot be had."""
        shared = self.world.shared
        if self.epoch != shared.epoch:
            return False
        file = File(bytearray(layout.shape_of(partial.head).size), self.host, self)
        self.world.files.append(file)
        storage, half = Storage(file, self), len(partial.content) // 2
        for start, part in ((half, partial.content[half:]), (0, partial.content[:half])):
            storage.write(partial.start + start, part)
        storage.write(0, partial.head)
        ledger, entries = Ledger.recover(storage, MODEL, shared.epoch)
        assert not entries
        copied = ledger.seal()
        before = shared.owners.get(copied.ledger_id, "")
        if before == REVOKED or not shared.own(copied.ledger_id, self.node, before):
            file.remove()
            return False
        self.adopted[copied.ledger_id], self.taken[copied.ledger_id] = copied, file
        return True

    def stop(self, heir: Server | None) -> None:
        """Stop in good order: a server of another host keeps the sums, or a sibling finds the files."""
        self.look()
        own = self.seal()
        if own is not None and heir is not None:
            for partial in (own, *self.adopted.values()):
                if not heir.alive or not self.world.run(heir, lambda: heir.keep(partial)):  # noqa: B023
                    continue
                if partial is own:
                    assert self.file is not None
                    self.file.remove()
                else:
                    self.taken[partial.ledger_id].remove()
        self.die()

    def die(self) -> None:
        self.alive = False
        for file in self.world.files:
            if file.lock is self:
                file.lock = None


class World:
    """Places for servers, two on one host and one on another, and what they share."""

    def __init__(self) -> None:
        self.hosts: dict[str, str] = {}  # node -> host
        self.shared = Shared()
        self.files: list[File] = []
        self.under_way: list[Callable[[], str]] = []  # questions that have not reached the shared state
        self.answered: set[tuple[Epoch, str]] = set()
        self.devices: dict[str, Device] = {}  # of this iteration: what each device sends
        self.starts = 0
        self.servers = [self.start(host) for host in HOSTS]

    def start(self, host: str) -> Server:
        self.starts += 1
        server = Server(f"node-{self.starts}", host, self)
        self.hosts[server.node] = host
        server.open()
        return server

    def device(self, number: int, mask: int, size: int) -> Device:
        """A device sends one thing in one iteration, however often."""
        seed = 100 * self.shared.number + number
        form = Decoder(seed % len(Decoder))
        return self.devices.setdefault(
            f"client-{number}", Device(f"client-{number}", seed, mask, size, number, form)
        )

    def run(self, server: Server, work: Callable[[], object]) -> object:
        """Let a server do something, unless it dies of it."""
        try:
            return work()
        except Died:
            server.die()
            return None

    def publish(self) -> None:
        """Seal, wait for everyone, gather all sums and compare them with what was counted."""
        shared = self.shared
        for place, server in enumerate(self.servers):
            server.paused, server.fuse = False, None
            if not server.alive:
                self.servers[place] = self.start(HOSTS[place])
        shared.lapsed.clear()
        for server in self.servers:
            server.look()
        shared.collecting = False
        partials: dict[str, Partial] = {}
        for server in self.servers:
            server.adopt()
        for server in self.servers:
            own = server.seal()
            assert own is not None
            assert partials.keys().isdisjoint({own.ledger_id, *server.adopted}), "two have one ledger"
            partials |= {own.ledger_id: own} | server.adopted
        held = {ledger_id: [c for c, h in shared.uploads.items() if h == ledger_id] for ledger_id in partials}
        assert set(shared.uploads.values()) <= set(partials), "a ledger is gone"
        for ledger_id, partial in partials.items():
            assert_holds(partial, {fl_id: self.devices[fl_id] for fl_id in held[ledger_id]})
        self.compare_mean([partials[ledger_id] for ledger_id in sorted(partials)])
        assert {fl_id for epoch, fl_id in self.answered if epoch == shared.epoch} <= set(shared.uploads)
        self.move_on()
        for server in self.servers:
            server.look()

    def compare_mean(self, partials: list[Partial]) -> None:
        previous = {weight.name: np.full(weight.size, 0.5, np.float32) for weight in MODEL}
        total = RunningSum(Spans(MODEL))
        for partial in partials:
            total.add(partial, keep=True)
        made = FedAvg().finish(Total(Spans(MODEL), total.sums, total.sizes, 0, 0), previous.__getitem__)
        model = {**previous, **dict(made)}
        sums, sizes, _ = plain_sum(tuple(self.devices[fl_id] for fl_id in self.shared.uploads))
        for (name, span), size in zip(Spans(MODEL), sizes.tolist(), strict=True):
            expected = sums[span] / size if size else previous[name]
            scale = max(1.0, float(abs(sums[span]).max()) / max(size, 1))
            assert float(abs(model[name] - expected).max()) <= 1e-9 * scale

    def move_on(self) -> None:
        self.shared.move_on()
        self.devices.clear()


# ---- the machine

PLACE = st.integers(0, len(HOSTS) - 1)


class Ledgers(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    def server(self, place: int) -> Server | None:
        """The server in a place, if it can do anything."""
        server = self.world.servers[place]
        return server if server.alive and not server.paused else None

    def let(self, place: int, work: Callable[[Server], object]) -> None:
        server = self.server(place)
        if server is not None:
            self.world.run(server, lambda: work(server))

    @rule(
        place=PLACE,
        number=st.integers(0, 6),
        mask=st.integers(1, EVERYTHING),
        size=st.sampled_from([1, 7, 65535]),
        fate=st.sampled_from(["heard", "heard", "refused", "late", "lost"]),
    )
    def upload(self, place: int, number: int, mask: int, size: int, fate: str) -> None:
        device = self.world.device(number, mask, size)
        self.let(place, lambda server: server.upload(device, fate))

    @rule(place=PLACE, which=st.integers(0, 2))
    def ask_again(self, place: int, which: int) -> None:
        server = self.server(place)
        if server is not None and len(server.questions) > which:
            self.let(place, lambda server: server.ask(server.questions[which]))

    @precondition(lambda self: self.world.under_way)
    @rule(which=st.integers(0, 3))
    def a_question_arrives_late(self, which: int) -> None:
        under_way = self.world.under_way
        under_way.pop(which % len(under_way))()

    @rule(place=PLACE, batch=st.integers(1, 3))
    def merge(self, place: int, batch: int) -> None:
        self.let(place, lambda server: server.merge(batch))

    @rule(place=PLACE)
    def look(self, place: int) -> None:
        self.let(place, lambda server: server.look())

    @rule(place=PLACE)
    def adopt(self, place: int) -> None:
        server = self.server(place)
        if server is not None and server.epoch == self.world.shared.epoch:
            self.let(place, lambda server: server.adopt())

    @rule(place=PLACE)
    def pause_or_go_on(self, place: int) -> None:
        server = self.world.servers[place]
        server.paused = not server.paused

    @rule(place=PLACE)
    def kill(self, place: int) -> None:
        server = self.world.servers[place]
        if server.alive:
            server.die()

    @rule(place=PLACE, writes=st.integers(0, 15))
    def kill_in_the_middle_of_a_write(self, place: int, writes: int) -> None:
        self.world.servers[place].fuse = writes

    @rule(place=PLACE)
    def restart(self, place: int) -> None:
        if not self.world.servers[place].alive:
            self.world.servers[place] = self.world.start(HOSTS[place])

    @rule(place=PLACE, other=st.booleans())
    def killed_and_adopted(self, place: int, other: bool) -> None:
        """By the sibling, or by its own successor."""
        self.kill(place)
        heir = 1 - place if other and place < 2 else place
        self.restart(heir)
        self.look(heir)
        self.adopt(heir)

    @rule(place=PLACE, heir=st.none() | PLACE)
    def stop(self, place: int, heir: int | None) -> None:
        """A clean stop; the sums go to a server of another host, if there is one."""
        other = None if heir is None or HOSTS[heir] == HOSTS[place] else self.server(heir)
        self.let(place, lambda server: server.stop(other))

    @rule(place=PLACE)
    def seal(self, place: int) -> None:
        """A finaliser asks for the sum."""
        server, shared = self.server(place), self.world.shared
        here = server is not None and (server.epoch, server.attempt) == (shared.epoch, shared.attempt)
        if here and not shared.collecting:
            self.let(place, lambda server: server.seal())

    @rule(place=PLACE)
    def lease_lapses_or_is_renewed(self, place: int) -> None:
        self.world.shared.lapsed ^= {self.world.servers[place].node}

    @rule(what=st.sampled_from(["publish", "seal", "the iteration fails"]))
    def judge(self, what: str) -> None:
        """The shared state moves on, whether or not the servers have noticed."""
        match what:
            case "publish":
                self.world.publish()
            case "seal":
                self.world.shared.collecting = False
            case "the iteration fails":
                self.world.move_on()

    @rule(lost=st.sets(st.integers(0, 5), max_size=2))
    def collect_again(self, lost: set[int]) -> None:
        """Ledgers are declared lost: rightly, or because their servers were away for long."""
        shared = self.world.shared
        known = [ledger_id for ledger_id, owner in shared.owners.items() if owner != REVOKED]
        gone = {known[which % len(known)] for which in lost if known}
        clients = {fl_id for fl_id, holder in shared.uploads.items() if holder in gone}
        self.world.answered -= {(shared.epoch, fl_id) for fl_id in clients}
        shared.reopen(gone)

    @invariant()
    def a_lock_belongs_to_a_living_process(self) -> None:
        assert all(file.lock is None or file.lock.alive for file in self.world.files)

    @invariant()
    def what_was_answered_is_counted(self) -> None:
        shared = self.world.shared
        now = {fl_id for epoch, fl_id in self.world.answered if epoch == shared.epoch}
        assert now <= set(shared.uploads)

    def teardown(self) -> None:
        self.world.publish()


# ---- some histories by hand


@pytest.fixture
def history() -> Iterator[Ledgers]:
    """A history that ends with a publication. Server 0 has the first ledger, server 1 the second, 2 the third."""
    machine = Ledgers()
    yield machine
    machine.a_lock_belongs_to_a_living_process()
    machine.what_was_answered_is_counted()
    machine.teardown()


def upload(history: Ledgers, place: int, number: int, fate: str = "heard") -> None:
    history.upload(place, number, EVERYTHING, 7, fate)


def ledger_of(history: Ledgers, place: int) -> str:
    ledger = history.world.servers[place].ledger
    assert ledger is not None
    return ledger.id


def kept_by(history: Ledgers, ledger_id: str) -> list[int]:
    """The places of the living servers that have the sum of another one's ledger."""
    servers = enumerate(history.world.servers)
    return [place for place, server in servers if server.alive and ledger_id in server.adopted]


class TestHistories:
    @pytest.mark.parametrize("sealed", [False, True])
    def test_a_counted_update_whose_reply_was_lost_stays_when_the_iteration_opens_again(
        self, history: Ledgers, sealed: bool
    ) -> None:
        upload(history, 0, 1, "lost")
        upload(history, 1, 2)
        if sealed:
            history.judge("seal")
        history.collect_again({1})
        history.look(0)
        assert history.world.shared.uploads.keys() == {"client-1"}

    def test_updates_come_again_after_an_undone_seal(self, history: Ledgers) -> None:
        upload(history, 0, 1)
        upload(history, 1, 2)
        history.judge("seal")
        history.seal(0)
        history.collect_again({1})
        for number in (1, 2, 3):
            history.look(0)
            upload(history, 0, number)
        assert history.world.shared.uploads.keys() == {"client-1", "client-2", "client-3"}

    def test_a_question_of_an_attempt_that_is_over_counts_nothing(self, history: Ledgers) -> None:
        upload(history, 0, 1, "late")
        history.judge("seal")
        history.seal(0)  # it asks again, and is told that it came too late
        history.collect_again(set())
        history.a_question_arrives_late(0)
        assert history.world.shared.uploads == {}

    def test_the_file_of_a_dead_server_that_was_given_up_is_not_summed(self, history: Ledgers) -> None:
        upload(history, 0, 1)
        history.kill(0)
        history.collect_again({0})
        history.look(1)
        history.adopt(1)
        upload(history, 1, 1)
        assert history.world.servers[1].adopted == {}

    def test_an_adopted_ledger_that_was_given_up_is_dropped(self, history: Ledgers) -> None:
        upload(history, 0, 1)
        history.kill(0)
        history.adopt(1)
        assert len(history.world.servers[1].adopted) == 1
        history.collect_again({0})
        history.look(1)
        upload(history, 1, 1)

    @pytest.mark.parametrize("last", ["goes on", "stops", "dies"])
    def test_the_sums_of_a_server_that_stops_are_kept_elsewhere(self, history: Ledgers, last: str) -> None:
        upload(history, 0, 1)
        upload(history, 0, 2, "lost")
        upload(history, 1, 3)
        both = ledger_of(history, 0), ledger_of(history, 1)
        history.killed_and_adopted(1, other=True)
        history.stop(0, 2)
        assert [kept_by(history, ledger_id) for ledger_id in both] == [[2], [2]]
        if last == "stops":
            history.restart(1)
            history.look(1)
            history.stop(2, 1)
            assert [kept_by(history, ledger_id) for ledger_id in both] == [[1], [1]]
        elif last == "dies":
            history.kill(2)

    @pytest.mark.parametrize("writes", range(4))
    def test_who_dies_while_it_takes_them_over_has_taken_nothing(self, history: Ledgers, writes: int) -> None:
        upload(history, 0, 1)
        given = ledger_of(history, 0)
        history.kill_in_the_middle_of_a_write(2, writes)
        history.stop(0, 2)
        history.killed_and_adopted(2, other=False)
        history.adopt(1)
        assert kept_by(history, given) == ([1] if writes < 3 else [2])

    def test_who_dies_after_they_were_taken_over_leaves_nothing_that_counts(self, history: Ledgers) -> None:
        upload(history, 0, 1)
        giver, heir = history.world.servers[0], history.world.servers[2]
        own = giver.seal()
        assert own is not None
        assert heir.keep(own)
        giver.die()
        history.adopt(1)
        assert history.world.servers[1].adopted == {}

    def test_sums_that_were_given_up_are_not_kept(self, history: Ledgers) -> None:
        upload(history, 0, 1)
        giver, heir = history.world.servers[0], history.world.servers[2]
        own = giver.seal()
        assert own is not None
        history.collect_again({0})
        assert not heir.keep(own)


TestLedgers = Ledgers.TestCase
TestLedgers.settings = settings(
    max_examples=1000 * max(SOAK, 1),
    stateful_step_count=40,
    derandomize=not SOAK,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
