"""A cluster in a nutshell: the shared state, servers around ``core.iteration.step``, and what may go wrong.

``SharedState`` says in Python what the scripts of ``fedcore.store`` say in Lua; tests/integration/test_store_model.py
holds the two against each other. ``Server`` is the shell of one server as the machine expects it: it performs effects
one after another, asks again what was not answered, and looks at the shared state when it has lost track.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TypeVar

from fedcore.core import iteration as core
from fedcore.core.iteration import Iteration, Phase, Policy
from fedcore.core.job import RunningState

T = TypeVar("T")


# ---- the shared state


@dataclass
class Status:
    """The status hash."""

    number: int
    attempt: int = 1
    phase: Phase = Phase.COLLECTING
    running: RunningState = RunningState.RUNNING
    success: bool = True
    result: str = ""
    token: str = ""
    digest: str = ""
    started: float | None = None
    first_upload: float | None = None


@dataclass(frozen=True)
class Reserve:
    """How a refused client's place is kept: moments relative to now, in the unit of the clock."""

    returns: float
    before: float
    after: float


class SharedState:
    """What Redis holds of one job; every method is one atomic step.

    Attributes:
        owners: ledger id -> node id.
        leases: ids of the servers whose heartbeat has not run out.
        completed: iteration -> when its quorum was reached; only the tests look at it.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.status: Status | None = None
        self.clients: dict[int, dict[str, str]] = {}
        self.uploads: dict[int, dict[str, str]] = {}
        self.waiting: dict[str, float] = {}
        self.owners: dict[str, str] = {}
        self.leases: set[str] = set()
        self.completed: dict[int, float] = {}

    def create(self, number: int, success: bool, result: str, running: RunningState) -> bool:
        """create_status.lua"""
        if self.status is not None:
            return False
        self.status = Status(number, success=success, result=result, running=running)
        return True

    def read(self) -> tuple[Status, int, int] | None:
        """read_status.lua: the status, the clients and the uploads of its iteration."""
        if self.status is None:
            return None
        number = self.status.number
        return replace(self.status), len(self.clients.get(number, ())), len(self.uploads.get(number, ()))

    def select_client(
        self, number: int, fl_id: str, meta: str, places: int, fit: bool, reserve: Reserve
    ) -> tuple[str, int]:
        """select_client.lua"""
        status = self.status
        if status is None:
            return "missing", 0
        if status.number != number or status.running is not RunningState.RUNNING:
            return "closed", status.number
        clients = self.clients.setdefault(number, {})
        if fl_id in clients:
            return ("uploaded" if fl_id in self.uploads.get(number, ()) else "known"), 0
        if status.phase is not Phase.COLLECTING:
            return "closed", status.number
        now = self.clock()
        self.waiting = {name: due for name, due in self.waiting.items() if due > now - reserve.after}
        mine = fl_id in self.waiting
        expected = sum(due <= now + reserve.before for due in self.waiting.values())
        if len(clients) >= places or (not mine and len(clients) + expected >= places):
            if mine or len(self.waiting) < places:
                self.waiting[fl_id] = now + reserve.returns
            return ("reserved" if mine else "full"), len(clients)
        if not fit:
            return "unfit", len(clients)
        if not clients:
            status.started = now
        clients[fl_id] = meta
        self.waiting.pop(fl_id, None)
        return "selected", len(clients)

    def accept_upload(
        self,
        number: int,
        attempt: int,
        requested: int,
        fl_id: str,
        quorum: int,
        ledger_id: str,
        node_id: str,
        fit: bool,
    ) -> tuple[str, int, str]:
        """accept_upload.lua"""
        holder = self.uploads.get(requested, {}).get(fl_id)
        if holder is not None and (holder != ledger_id or requested != number):
            return "repeated", 0, holder
        if self.owners.get(ledger_id) != node_id:
            return "revoked", 0, ""
        if node_id not in self.leases:
            return "lapsed", 0, ""
        status = self.status
        if status is None:
            return "missing", 0, ""
        if (status.number, status.attempt) != (number, attempt):
            return "closed", status.number, ""
        clients, uploads = self.clients.get(number, {}), self.uploads.setdefault(number, {})
        if holder is not None:
            return "accepted", len(uploads), clients[fl_id]
        if status.running is not RunningState.RUNNING:
            return "closed", status.number, ""
        if len(uploads) >= quorum or status.phase is not Phase.COLLECTING:
            return "full", len(uploads), ""
        if fl_id not in clients:
            return "unknown", len(uploads), ""
        if requested != number:
            return "other", number, ""
        if not fit:
            return "unfit", len(uploads), ""
        if not uploads:
            status.first_upload = self.clock()
        uploads[fl_id] = ledger_id
        if len(uploads) == quorum:
            self.completed[number] = self.clock()
        return "accepted", len(uploads), clients[fl_id]

    def heartbeat(self, node_id: str) -> None:
        """heartbeat.lua, as far as the lease goes."""
        self.leases.add(node_id)

    def own_ledger(self, ledger_id: str, node_id: str, before: str = "") -> bool:
        """own_ledger.lua"""
        if self.owners.get(ledger_id, "") not in (before, node_id):
            return False
        self.owners[ledger_id] = node_id
        return True

    def counted(self, number: int, ledger_id: str, fl_ids: Sequence[str]) -> dict[str, str]:
        """Two HMGETs: what the clients declared whose update lies in this ledger."""
        uploads, clients = self.uploads.get(number, {}), self.clients.get(number, {})
        return {fl_id: clients[fl_id] for fl_id in fl_ids if uploads.get(fl_id) == ledger_id}

    def count_by_ledger(self, number: int) -> dict[str, int]:
        """count_by_ledger.lua"""
        holders = list(self.uploads.get(number, {}).values())
        return {holder: holders.count(holder) for holder in holders}

    def set_phase(self, number: int, attempt: int, before: Phase, after: Phase, **fields: str) -> bool:
        """set_phase.lua"""
        status = self.status
        if status is None or (status.number, status.attempt, status.phase, status.running) != (
            number,
            attempt,
            before,
            RunningState.RUNNING,
        ):
            return False
        self.status = replace(status, phase=after, **fields)  # type: ignore[arg-type]
        return True

    def advance(
        self, number: int, attempt: int, phase: Phase, success: bool, result: str, finishes: bool
    ) -> bool:
        """advance.lua"""
        status = self.status
        if status is None or (status.number, status.attempt, status.phase) != (number, attempt, phase):
            return False
        running = RunningState.FINISH if finishes else status.running
        self.status = Status(number + 1, running=running, success=success, result=result)
        return True


# ---- the connection to it


class Fault(Enum):
    """What happens to a step on a connection."""

    NONE = "none"
    BEFORE = "lost before the shared state heard of it"
    AFTER = "done, but the reply is lost"


class Lost(Exception):
    """The connection broke, or there is none."""


class Line:
    """A server's connection to the shared state.

    Attributes:
        up: whether it stands.
        fault: what happens to the last of the next ``steps`` steps.
    """

    def __init__(self) -> None:
        self.up = True
        self.mend()

    def mend(self) -> None:
        """Nothing is going to break."""
        self.fault, self.steps = Fault.NONE, 0

    def break_at(self, fault: Fault, steps: int) -> None:
        """Break at the ``steps``-th step from now, counted from 1."""
        self.fault, self.steps = fault, steps

    def call(self, step: Callable[[], T]) -> T:
        """Take one atomic step, unless the connection breaks before or after it."""
        self.steps -= 1
        fault = self.fault if self.steps == 0 else Fault.NONE
        if not self.up or fault is Fault.BEFORE:
            self.up = False
            raise Lost
        result = step()
        if fault is Fault.AFTER:
            self.up = False
            raise Lost
        return result


# ---- a server


@dataclass(frozen=True)
class Model:
    """A model is the set of the updates in it."""

    number: int
    updates: frozenset[str]

    @property
    def digest(self) -> str:
        return f"{self.number}:{','.join(sorted(self.updates))}"


@dataclass(frozen=True)
class Question:
    """An update whose acceptance the shared state has not confirmed yet."""

    number: int
    attempt: int
    fl_id: str


@dataclass
class Server:
    """One process. Its id is new with every start; what is in its ledger dies with it."""

    id: str
    host: str
    world: World
    line: Line = field(default_factory=Line)
    iteration: Iteration = field(default_factory=lambda: Iteration(1))
    ledger: set[str] = field(default_factory=set)
    questions: list[Question] = field(default_factory=list)
    candidate: Model | None = None
    joined: bool = False
    opened: list[int] = field(default_factory=list)
    events: deque[core.Event] = field(default_factory=deque)
    effects: deque[core.Effect] = field(default_factory=deque)
    astray: bool = False  # the first effect broke with the connection

    # ---- start

    def join(self) -> None:
        """Find the job, or make it, and take up its iteration; later again if there is no connection."""
        shared = self.world.shared
        try:
            self.line.call(lambda: shared.create(1, True, "", RunningState.RUNNING))
            self.line.call(lambda: shared.heartbeat(self.id))
            self.line.call(lambda: shared.own_ledger(self.id, self.id))
            seen = self.look()
        except Lost:
            return
        self.iteration, self.joined = seen.iteration, True
        kept = self.world.disks[self.host]
        if (
            self.iteration.phase is Phase.CANDIDATE
            and kept is not None
            and kept.digest == self.iteration.digest
        ):
            self.candidate = kept
            self.note(core.CandidateDurable())

    # ---- what devices ask

    def start_client(self, fl_id: str) -> str:
        """startFLJob"""
        if not self.joined or self.iteration.running is not RunningState.RUNNING:
            return "gate"
        number = self.iteration.number
        try:
            word, count = self.line.call(
                lambda: self.world.shared.select_client(
                    number, fl_id, "meta", self.world.policy.start_threshold, True, Reserve(5, 10, 5)
                )
            )
        except Lost:
            return "lost"
        if word == "selected":
            self.note(core.ClientSelected(number, count))
        return word

    def upload(self, fl_id: str) -> None:
        """updateModel"""
        if self.joined and self.iteration.running is RunningState.RUNNING:
            question = Question(self.iteration.number, self.iteration.attempt, fl_id)
            self.questions.append(question)
            self.ask(question)

    def ask(self, question: Question) -> None:
        """Ask for an update to be counted; stays open until there is an answer."""
        number, fl_id = question.number, question.fl_id
        try:
            word, count, _ = self.line.call(
                lambda: self.world.shared.accept_upload(
                    number,
                    question.attempt,
                    number,
                    fl_id,
                    self.world.policy.update_threshold,
                    ledger_id=self.id,
                    node_id=self.id,
                    fit=True,
                )
            )
        except Lost:
            return
        assert word not in ("revoked", "lapsed"), "who has joined owns its ledger and lives"
        self.questions.remove(question)
        if word in ("accepted", "repeated"):
            self.world.promised.setdefault(number, set()).add(fl_id)
        if word == "accepted" and fl_id not in self.ledger:
            assert self.iteration.number == number, (
                "an update was accepted for an iteration that is over here"
            )
            self.ledger.add(fl_id)
            self.note(core.UploadCounted(number, count))

    def ask_again(self) -> None:
        """Ask what has not been answered."""
        for question in list(self.questions):
            self.ask(question)

    # ---- the machine

    @property
    def busy(self) -> bool:
        return bool(self.effects)

    def note(self, event: core.Event) -> None:
        """Take notice of an event; while effects are under way it waits."""
        self.events.append(event)
        self.work()

    def work(self) -> None:
        """Step through the events up to the first effect that takes its time; Open takes none."""
        while True:
            if self.effects and isinstance(self.effects[0], core.Open):
                self.open(self.effects.popleft())
            elif self.events and not self.effects:
                self.step(self.events.popleft())
            else:
                break
        if (
            self.effects
            and not self.line.up
            and not isinstance(self.effects[0], core.Reduce | core.MakeDurable)
        ):
            self.astray = True  # it is tried at once, in vain

    def step(self, event: core.Event) -> None:
        self.iteration, effects = core.step(self.iteration, event, self.world.now, self.world.policy)
        self.effects.extend(effects)

    def perform(self) -> None:
        """Go on with the first effect; after a broken connection look where the shared state is."""
        try:
            event = self.look_again() if self.astray else self.do(self.effects[0])
        except Lost:
            if self.astray:
                self.effects.clear()  # the tick will begin anew
            self.astray = not self.astray
            self.work()
            return
        if isinstance(event, Wait):
            return
        self.astray = False
        self.effects.popleft()
        if event is not None:
            self.step(event)
        self.work()

    def tick(self) -> None:
        """What happens once a second: first a look at the shared state, then at the clock.

        The other way round a copy that is out of date, as after an outage, could end a complete iteration.
        """
        if not self.joined:
            self.join()
            return
        try:
            self.ask_again()
            if not self.busy and (seen := self.look_again()) is not None:
                self.note(seen)
            if not self.busy and self.updates_are_lost():
                self.note(core.UpdatesLost())
        except Lost:
            pass
        self.note(core.TimePassed())

    def look(self) -> core.Observed:
        """Read the shared state, with this server's own clock."""
        answer = self.line.call(self.world.shared.read)
        assert answer is not None
        status, selected, uploaded = answer
        iteration = Iteration(
            status.number,
            status.attempt,
            status.phase,
            status.running,
            selected,
            uploaded,
            status.started,
            status.first_upload,
            status.digest,
        )
        return core.Observed(iteration, status.token == self.id, status.success, status.result)

    def look_again(self) -> core.Observed | None:
        """Read the shared state; None if it holds no news."""
        seen = self.look()
        timeless = [replace(i, started=None, first_upload=None) for i in (seen.iteration, self.iteration)]
        return seen if self.iteration.changing or timeless[0] != timeless[1] else None

    def updates_are_lost(self) -> bool:
        """Whether the current iteration needs a server that is dead."""
        answer = self.line.call(self.world.shared.read)
        assert answer is not None
        status = answer[0]
        if status.number != self.iteration.number or status.running is not RunningState.RUNNING:
            return False
        needed = set(self.world.shared.count_by_ledger(status.number))
        if status.phase in (Phase.REDUCING, Phase.CANDIDATE):
            needed.add(status.token)
        return any(self.world.server(name) is None for name in needed)

    def do(self, effect: core.Effect) -> core.Event | Wait | None:
        """Perform one effect."""
        shared, call = self.world.shared, self.line.call
        match effect:
            case core.Seal(number, attempt):
                done = call(lambda: shared.set_phase(number, attempt, Phase.COLLECTING, Phase.SEALED))
                return core.Sealed() if done else self.look_again()
            case core.ClaimReduction(number, attempt):
                done = call(
                    lambda: shared.set_phase(number, attempt, Phase.SEALED, Phase.REDUCING, token=self.id)
                )
                return core.ReductionClaimed() if done else self.look_again()
            case core.Reduce(number, _):
                return self.reduce(number)
            case core.RecordCandidate(number, attempt, digest):
                done = call(
                    lambda: shared.set_phase(number, attempt, Phase.REDUCING, Phase.CANDIDATE, digest=digest)
                )
                return core.CandidateRecorded() if done else self.look_again()
            case core.MakeDurable(number):
                assert self.candidate is not None and self.candidate.number == number
                self.world.disks[self.host] = self.candidate
                return core.CandidateDurable()
            case core.Advance(number, attempt, success, result, finishes, phase):
                done = call(
                    lambda: self.world.advance(self, number, attempt, phase, success, result, finishes)
                )
                return core.Advanced(success, result) if done else self.look_again()
        raise AssertionError(effect)

    def open(self, effect: core.Effect) -> None:
        """Begin to serve an iteration."""
        assert isinstance(effect, core.Open)
        self.ledger.clear()
        self.candidate = None
        self.opened.append(effect.number)

    def reduce(self, number: int) -> core.Event | Wait:
        """Gather all partial sums; a server gives its own when it has no open question."""
        counted = self.line.call(lambda: self.world.shared.count_by_ledger(number))
        updates: set[str] = set()
        for ledger_id, count in counted.items():
            holder = self.world.server(ledger_id)
            if holder is None:
                return core.ReductionFailed(core.server_exited(number))
            if any(question.number == number for question in holder.questions):
                return Wait()
            if len(holder.ledger) != count or holder.ledger & updates:
                return core.ReductionFailed(core.server_exited(number))
            updates |= holder.ledger
        self.candidate = Model(number, frozenset(updates))
        return core.ModelReduced(self.candidate.digest)


class Wait:
    """An effect cannot be done yet."""


# ---- all of it


class World:
    """Servers, their disks, the clock, and the record of how iterations ended."""

    def __init__(self, hosts: int, policy: Policy) -> None:
        self.policy = policy
        self.now = 0.0
        self.shared = SharedState(lambda: self.now)
        self.disks: dict[str, Model | None] = {f"host{i}": None for i in range(hosts)}
        self.servers: dict[str, Server] = {}
        self.promised: dict[int, set[str]] = {}
        self.published: dict[int, Model] = {}
        self.failed: dict[int, str] = {}
        self.started: dict[int, float | None] = {}
        self._starts = 0
        for host in self.disks:
            self.start(host)

    def start(self, host: str) -> None:
        """Start a server on a host that has none."""
        self._starts += 1
        self.servers[host] = Server(f"{host}#{self._starts}", host, self)
        self.servers[host].join()

    def server(self, name: str) -> Server | None:
        """The living server of that id."""
        return next((server for server in self.servers.values() if server.id == name), None)

    def advance(
        self,
        by: Server,
        number: int,
        attempt: int,
        phase: Phase,
        success: bool,
        result: str,
        finishes: bool,
    ) -> bool:
        """Advance the shared state, and keep the record of it."""
        status = self.shared.status
        done = self.shared.advance(number, attempt, phase, success, result, finishes)
        if done:
            assert status is not None
            self.started[number] = status.started
            assert number not in self.published and number not in self.failed, "an iteration ended twice"
            if success:
                assert by.candidate is not None and by.candidate.number == number
                self.published[number] = by.candidate
            else:
                self.failed[number] = result
            if "timeout" in result:
                assert status.phase is Phase.COLLECTING, "a clock ended a sealed iteration"
            if result == core.server_exited(number):
                needed = {status.token, *self.shared.uploads.get(number, {}).values()} - {""}
                assert any(self.server(name) is None for name in needed), "nobody died"
        return done
