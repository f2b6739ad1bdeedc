"""Two servers on one host, their ledgers, and everything that may come between them and the shared state.

The ledgers are real, their files are bytes in memory; ``Shared`` says what the accept script says. Servers are paused
and killed between any two writes, also while they adopt; questions arrive late, replies get lost, leases lapse and
ledgers are revoked. Whatever is published holds exactly the updates that the shared state counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial as bind
from unittest.mock import patch

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from unit.ledger.histories import EVERYTHING, MODEL, SHAPE, Device, assert_holds, body_of, plain_sum, read

from fedcore.aggregation.fedavg import Spans, mean_of
from fedcore.ledger import layout
from fedcore.ledger import ledger as ledger_module
from fedcore.ledger.layout import Damaged, Epoch, SlotState
from fedcore.ledger.ledger import Ledger, Partial, Slot

SOAK = int(os.environ.get("FEDCORE_SOAK", "0"))
QUORUM = 5
REVOKED = "nobody: revoked"


class Died(Exception):
    """The process was killed in the middle of a write."""


@dataclass
class File:
    """A ledger file; ``lock`` is the process that holds it."""

    content: bytearray
    lock: Server | None
    removed: bool = False


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
        return Epoch("instance", self.number, self.attempt, f"{self.number:064x}")

    def accept(self, epoch: Epoch, fl_id: str, ledger_id: str, node: str, refuse: bool) -> str:
        """accept_upload.lua"""
        now = self.epoch.iteration == epoch.iteration
        holder = self.uploads.get(fl_id) if now else None
        if holder is not None and holder != ledger_id:
            return "repeated"
        if self.owners.get(ledger_id) != node:
            return "revoked"
        if node in self.lapsed:
            return "lapsed"
        if self.epoch != epoch:
            return "closed"
        if holder is not None:
            return "accepted"
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

    def revoke(self, ledger_id: str) -> None:
        """Declare a ledger lost: its clients' places are open again."""
        self.owners[ledger_id] = REVOKED
        self.uploads = {fl_id: holder for fl_id, holder in self.uploads.items() if holder != ledger_id}
        self.collecting = True

    def move_on(self) -> None:
        self.number, self.attempt, self.collecting = self.number + 1, 1, True
        self.uploads = {}


# ---- servers


@dataclass(eq=False)
class Question:
    """An update that the shared state was asked about."""

    epoch: Epoch
    device: Device
    slot: Slot
    ledger: Ledger


@dataclass(eq=False)
class Server:
    """One process.

    Attributes:
        fuse: writes until it is killed, None if nobody plans to.
        adopted: sealed sums of dead servers' ledgers.
    """

    node: str
    world: World
    fuse: int | None = None
    alive: bool = True
    paused: bool = False
    epoch: Epoch | None = None
    file: File | None = None
    ledger: Ledger | None = None
    questions: list[Question] = field(default_factory=list)
    adopted: dict[str, Partial] = field(default_factory=dict)
    taken: list[File] = field(default_factory=list)

    def open(self) -> None:
        """Make an own ledger."""
        self.file = File(bytearray(SHAPE.size), self)
        self.world.files.append(self.file)
        self.ledger = Ledger.create(Storage(self.file, self), MODEL, SHAPE)
        assert self.world.shared.own(self.ledger.id, self.node, "")
        self.begin()

    def begin(self) -> None:
        """Serve the epoch that the shared state is in; what was adopted for the same one stays."""
        if self.epoch != self.world.shared.epoch:
            for file in self.taken:
                file.removed, file.lock = True, None
            self.taken.clear()
            self.adopted.clear()
        self.epoch = self.world.shared.epoch
        assert self.ledger is not None
        self.ledger.begin(self.epoch)

    def look(self) -> None:
        """Follow the shared state; a revoked ledger is dropped."""
        if self.ledger is None or self.world.shared.owners[self.ledger.id] != self.node:
            if self.file is not None:
                self.file.removed, self.file.lock = True, None
            self.questions.clear()
            self.open()
        if self.epoch != self.world.shared.epoch:
            for question in list(self.questions):
                self.ask(question)
            self.begin()

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
            update = read(slot.body, device.data_size, device.eval_data_size)
            ledger.record(slot, device.fl_id, update.loss, update.accuracy)
        question = Question(epoch, device, slot, ledger)
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
        return self.world.shared.accept(question.epoch, fl_id, ledger_id, self.node, refuse)

    def ask(self, question: Question, refuse: bool = False) -> None:
        """Ask and hear the answer."""
        word = self.put(question, refuse)
        ledger, device = question.ledger, question.device
        if word == "lapsed":
            return  # asked again later
        self.questions.remove(question)
        if word == "accepted" and not ledger.holds(device.fl_id):
            ledger.accept(question.slot, read(question.slot.body, device.data_size, device.eval_data_size))
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
        """Take over whatever no living process holds."""
        for file in list(self.world.files):
            if file.removed or file.lock is not None:
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
            file.removed = True
            return
        before = shared.owners.get(examined.ledger_id, "")
        if examined.origin != epoch.origin or before == REVOKED:
            file.removed = True
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
        self.taken.append(file)

    def seal(self) -> None:
        """Answer what is open, and merge all, so that the own sum can be read."""
        for question in list(self.questions):
            self.ask(question)
        self.merge(QUORUM)

    def die(self) -> None:
        self.alive = False
        for file in self.world.files:
            if file.lock is self:
                file.lock = None


class World:
    """Two places for servers, and what they share."""

    def __init__(self) -> None:
        self.shared = Shared()
        self.files: list[File] = []
        self.under_way: list[Callable[[], str]] = []  # questions that have not reached the shared state
        self.answered: set[tuple[Epoch, str]] = set()
        self.devices: dict[str, Device] = {}  # of this iteration: what each device sends
        self.starts = 0
        self.servers = [self.start(), self.start()]

    def start(self) -> Server:
        self.starts += 1
        server = Server(f"node-{self.starts}", self)
        server.open()
        return server

    def device(self, number: int, mask: int, size: int) -> Device:
        """A device sends one thing in one iteration, however often."""
        seed = 100 * self.shared.number + number
        return self.devices.setdefault(
            f"client-{number}", Device(f"client-{number}", seed, mask, size, number)
        )

    def run(self, server: Server, work: Callable[[], object]) -> None:
        """Let a server do something, unless it dies of it."""
        try:
            work()
        except Died:
            server.die()

    def publish(self) -> None:
        """Seal, wait for everyone, gather all sums and compare them with what was counted."""
        shared = self.shared
        for number, server in enumerate(self.servers):
            server.paused, server.fuse = False, None
            if not server.alive:
                self.servers[number] = self.start()
        shared.lapsed.clear()
        for server in self.servers:
            server.look()
        shared.collecting = False
        partials: dict[str, Partial] = {}
        for server in self.servers:
            server.adopt()
        for server in self.servers:
            server.seal()
            assert server.ledger is not None
            partials[server.ledger.id] = server.ledger.seal()
            partials |= server.adopted
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
        model = mean_of(Spans(MODEL), partials, previous)
        sums, sizes, _ = plain_sum([self.devices[fl_id] for fl_id in self.shared.uploads])
        for (name, span), size in zip(Spans(MODEL), sizes.tolist(), strict=True):
            expected = sums[span] / size if size else previous[name]
            scale = max(1.0, float(abs(sums[span]).max()) / max(size, 1))
            assert float(abs(model[name] - expected).max()) <= 1e-9 * scale

    def move_on(self) -> None:
        self.shared.move_on()
        self.devices.clear()


# ---- the machine

PLACE = st.integers(0, 1)


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
            self.world.servers[place] = self.world.start()

    @rule(place=PLACE, other=st.booleans())
    def killed_and_adopted(self, place: int, other: bool) -> None:
        """By the sibling, or by its own successor."""
        self.kill(place)
        heir = 1 - place if other else place
        self.restart(heir)
        self.look(heir)
        self.adopt(heir)

    @rule(place=PLACE)
    def lease_lapses_or_is_renewed(self, place: int) -> None:
        self.world.shared.lapsed ^= {self.world.servers[place].node}

    @rule(
        place=PLACE,
        what=st.sampled_from(
            ["publish", "seal", "the iteration fails", "another attempt", "a ledger is lost"]
        ),
    )
    def judge(self, place: int, what: str) -> None:
        """The shared state moves on, whether or not the servers have noticed."""
        match what:
            case "publish":
                self.world.publish()
            case "seal":
                self.world.shared.collecting = False
            case "the iteration fails":
                self.world.move_on()
            case "another attempt":
                self.another_attempt()
            case "a ledger is lost":
                self.the_ledger_is_declared_lost(place)

    def the_ledger_is_declared_lost(self, place: int) -> None:
        """Rightly, or because its server was away for long."""
        world, server = self.world, self.world.servers[place]
        if server.ledger is None or server.file is None or server.file.lock not in (server, None):
            return  # a sibling has it and would say so
        lost = {fl_id for fl_id, holder in world.shared.uploads.items() if holder == server.ledger.id}
        world.answered -= {(world.shared.epoch, fl_id) for fl_id in lost}
        world.shared.revoke(server.ledger.id)

    def another_attempt(self) -> None:
        """The judge begins anew; what the ledgers hold is of an attempt that is over."""
        self.world.shared.attempt += 1
        self.world.shared.uploads = {}
        self.world.shared.collecting = True

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


TestLedgers = Ledgers.TestCase
TestLedgers.settings = settings(
    max_examples=1000 * max(SOAK, 1),
    stateful_step_count=40,
    derandomize=not SOAK,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
