"""One server of the simulated cluster: the shell around ``core.iteration.step``, function by function.

What the real shell awaits is awaited here: each request to the shared state, each message to a peer, each file. The
names are those of ``fedcore.services``, so that a schedule found here can be replayed there by eye. Left out is what
cannot change the outcome of an iteration: bytes, merges, texts, metrics.

A model is the set of updates in it and the model it was made from; its digest is a short name for that.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, NamedTuple

from model.cluster import Reserve, Seen, key_of
from model.kernel import Answered, Lost, PeerGone, Promise, Refused, Replaced, pause, wait

from fedcore.core import iteration as core
from fedcore.core.iteration import Iteration, Phase
from fedcore.core.job import RunningState
from fedcore.store.keys import ANYBODY, FOUNDERS, REVOKED

if TYPE_CHECKING:
    from model.simulation import Making
    from model.simulation import Simulation as World

TICK_S, CLAIM_PAUSE_S, REBASE_S, LOSS_S, DOUBT_S, STALE_S, SPREAD_S = 1.0, 0.5, 10.0, 10.0, 10.0, 7.0, 2.0
HOLD_OFF_S, LOOK_S, LIST_S = 1.5, 2.0, 8.0
PING_TIMEOUT_S, PEER_TIMEOUT_S, TAKE_TIMEOUT_S = 2.0, 5.0, 30.0
ROOM_TIMEOUT_S, HOLD_S, RETRY_S, DRAIN_S = 8.0, 8.0, 0.1, 10.0
TRIES, KEPT = 3, 3
RESERVE = Reserve(1.0, 0.0, 0.5)
NEVER = float("-inf")


def address_of(node: str) -> str:
    """Return where a server listens; the next process takes the place of one that is gone."""
    return node.partition("#")[0]


def replaced(nodes: set[str], living: set[str]) -> set[str]:
    """node_id.replaced"""
    heirs = {address_of(node): node for node in living}
    return {node for node in nodes if node and heirs.get(address_of(node), node) != node}


class Moved(Exception):
    """IterationMoved: the shared state is not where the server is."""


class Revoked(Moved):
    """LedgerRevoked: the ledger is another server's, or nobody's."""


class Awaited(Moved):
    """OthersAwaited: other servers are to bring back first what Redis has lost."""


class Missing(Moved):
    """StateMissing: there is no shared state."""


class Bug(Exception):
    """LocalError, or an exception that the real code does not expect."""


class Update(NamedTuple):
    """One client's update, unlike any other."""

    instance: str
    number: int
    client: str  # fl_id
    base: str


class Epoch(NamedTuple):
    """fedcore.ledger.layout.Epoch"""

    instance: str
    iteration: int
    base: str


class Partial(NamedTuple):
    """A sealed sum."""

    ledger_id: str
    epoch: Epoch
    updates: dict[str, Update]  # client key -> update

    @property
    def iteration(self) -> int:
        return self.epoch.iteration


@dataclass(eq=False)
class Slot:
    """A body in a ledger."""

    update: Update
    ledger: LedgerFile | None = None  # that it lies in
    begun: int = -1  # generation of the ledger in which it was recorded


@dataclass(eq=False)
class LedgerFile:
    """A ledger on a host: it outlives its process, but not its host.

    Attributes:
        lock: the process that has it open, None if nobody has.
        begun: generation with which the epoch began.
        recorded: bodies about which the shared state is, or was, being asked.
        updates: what is accepted.
        there: whether the file still has a name.
    """

    id: str
    lock: Server | None
    places: int
    epoch: Epoch | None = None
    begun: int = 0
    recorded: list[Slot] = field(default_factory=list)
    updates: dict[str, Update] = field(default_factory=dict)
    sealed: bool = True
    there: bool = True

    def begin(self, epoch: Epoch) -> None:
        self.epoch, self.begun, self.updates, self.sealed = epoch, self.begun + 1, {}, False

    def record(self, slot: Slot) -> None:
        slot.begun = self.begun
        self.recorded.append(slot)

    def release(self, slot: Slot) -> None:
        if slot in self.recorded:
            self.recorded.remove(slot)

    def accept(self, slot: Slot) -> None:
        key = key_of(slot.update.client)
        if self.sealed or key in self.updates or len(self.updates) >= self.places:
            raise Bug("an update was accepted into a ledger that is sealed, full or has it already")
        self.updates[key] = slot.update
        self.release(slot)

    def seal(self) -> Partial:
        assert self.epoch is not None
        self.sealed = True
        return Partial(self.id, self.epoch, dict(self.updates))


class Models:
    """fedcore.models.history"""

    def __init__(self, iteration: int, digest: str) -> None:
        self._models = {iteration: digest}
        self.newest = iteration

    @property
    def newest_digest(self) -> str:
        return self._models[self.newest]

    def find(self, digest: str) -> bool:
        return digest in self._models.values()

    def add(self, iteration: int, digest: str) -> None:
        kept = {number: model for number, model in self._models.items() if number < iteration}
        kept[iteration] = digest
        self._models = dict(sorted(kept.items())[-3:])
        self.newest = iteration

    def carry_over(self, iteration: int) -> None:
        self.add(iteration, self.newest_digest)


class Candidate(NamedTuple):
    number: int
    digest: str
    durable: bool = False
    updates: int = 0  # that are in it, as far as it is known


class Found(Enum):
    """What became of the search for a model."""

    HERE = auto()
    NOWHERE = auto()
    UNKNOWN = auto()


class Reduced(NamedTuple):
    digest: str
    updates: int


class Membership(NamedTuple):
    """ClusterState: a part in an instance, unlike any other, even one in the same instance."""

    instance: str
    number: int


@dataclass(eq=False)
class Sum:
    """What of an attempt's partials is added already."""

    attempt: tuple[str, int, int]
    partials: dict[str, Partial] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)


class Server:
    """One process.

    Attributes:
        name: node id; new with every start.
        host: where it runs.
        alive, paused, stopping: state of the process.
        up: whether the connection to the shared state stands and may be used.
        conn: number of the connection.
        pending: requests on it that have no answer yet.
    """

    def __init__(self, world: World, host: str, name: str) -> None:
        self.world, self.host, self.name = world, host, name
        self.alive, self.paused, self.stopping = True, False, False
        self.parked: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self.up, self.cut, self.conn, self.sent, self.heard_back = False, True, 0, 0.0, 0.0
        self.run_of_conn = 0  # the Redis that the connection leads to
        self.pending: dict[Promise, None] = {}  # in the order in which they were sent
        self.reconnecting = False
        self.ready_at = 0.0  # when it could go on with all that it is to do
        self.barred_until = NEVER  # nothing leads to Redis before
        self.waiting: list[Promise] = []  # for the connection
        self.policy = world.policy
        self.models = Models(*world.newest_checkpoint(host))
        self.cluster: Membership | None = None
        self.joinings = self.joined_with = 0  # the latter: when an iteration began last
        self.iteration = Iteration(self.models.newest + 1, base=self.models.newest_digest)
        self.others: list[str] = []
        self.places: dict[str, str] = {}
        self.refused: dict[str, float] = {}  # client -> when it returns
        # driver
        self.events: deque[core.Event] = deque()
        self.effects: deque[core.Effect] = deque()
        self.busy = self.joining = self.guarding = self.look_wanted = self.looking = False
        self.opened = 0
        self.sealed_here: tuple[int, int] | None = None
        self.sealed_at: float | None = None
        self.fence = self.epoch_number = self.run_id = 0
        self.ended = (True, "")
        self.orphan = ""  # token of a finaliser that is gone
        self.owned = ""  # the own ledger, once Redis has said that it is ours
        self.begun_in: LedgerFile | None = None  # the ledger that takes the updates of the epoch
        self.follows = self.registered = self.warned = False
        self.left = ""  # the instance whose state is still held
        self.contradicted: Epoch | None = None
        self.missed: dict[str, float] = {}  # who was on the list; seconds for which it has not been
        self.unlisted: set[str] = set()
        self.unlisted_for = 0.0
        self.saw_at = 0.0
        self.lost_at = float("-inf")
        self.others_before: dict[str, float] = {}
        self.doubt_until = NEVER
        self.baseless_since: float | None = None
        self.deadline_at: float | None = None
        self.waiters: list[Promise] = []
        self.closed_here: tuple[tuple[str, int, int], list[Partial]] | None = None
        # intake
        self.asking: set[object] = set()
        self.intake_epoch: Epoch | None = None
        self.attempt, self.sealing = 1, False
        self.settled: list[Promise] = []
        # ledgers
        self.own: LedgerFile | None = None
        self.closed = False
        self.joined_at = NEVER
        self.adopted: dict[str, Partial] = {}
        self.taken: dict[str, tuple[Epoch, LedgerFile]] = {}
        self.former: dict[str, str] = {}  # adopted ledger -> who owned it before
        self.dropped: list[str] = []
        self.inherited: set[str] = set()
        self.born = world.now
        self.ledgers_epoch: Epoch | None = None
        self.passed: set[LedgerFile] = set()
        self.elsewhere: dict[LedgerFile, str] = {}  # files whose ledger a living node of another host owns
        self.adopting = False
        self.adopters: list[Promise] = []
        # judge, reduction, publication
        self.missed_since: dict[str, float] = {}
        self.judged_at = NEVER
        self.sum: Sum | None = None
        self.short: tuple[tuple[str, int, int], float] | None = None
        self.candidates: dict[str, Candidate] = {}
        self.shown: tuple[tuple[str, int, int], dict[str, Partial]] = (("", 0, 0), {})
        self.reading: dict[str, Promise] = {}
        world.spawn(self, self.reconnect())
        world.spawn(self, self.beat())
        world.spawn(self, self.tick())

    # ---- the connection to the shared state

    async def ask(self, operation: str, *words: Any, preparing: bool = False) -> Any:
        """Have the shared state take one step of this instance.

        Raises:
            Lost: the connection broke; the step may have been taken, or may still be.
        """
        if not self.up and not preparing:
            raise Lost
        return await wait(self.world.request(self, operation, words))

    def disconnected(self, conn: int) -> None:
        """The process notices that its connection is broken."""
        if conn != self.conn:
            return
        self.up = False
        pending, self.pending = self.pending, {}
        for promise in list(pending):
            promise.fail(Lost())
        if not self.reconnecting:
            self.reconnecting = True
            self.world.spawn(self, self.reconnect())

    async def reconnect(self) -> None:
        self.reconnecting = True
        while True:
            await pause(self.world.chance() * (0.5 if self.world.calm else self.world.absence))
            if not self.world.store_up or self.world.now < self.barred_until:
                continue
            self.conn, self.cut, self.run_of_conn = self.conn + 1, False, self.world.store.run
            try:
                await self.before_use()
            except Lost:
                continue
            if not self.cut:
                break
        self.reconnecting, self.up, self.ready_at = False, True, self.world.now
        waiting, self.waiting = self.waiting, []
        for promise in waiting:
            promise.succeed(None)
        self.awaken()
        self.world.later(self, self.world.delay(), self.heard, "")

    async def before_use(self) -> None:
        run = self.run_of_conn
        self.baseless_since = None
        self.forget_missed()  # no lease was renewed while Redis was away
        if self.cluster is not None and run != self.run_id:
            losses = self.world.forgot
            await self.bring_back(self.cluster, preparing=True)
            self.world.brought_back(self, losses)
        self.run_id = run

    async def connected(self) -> None:
        if not self.up:
            promise = Promise(self)
            self.waiting.append(promise)
            await wait(promise)

    def run_quietly(self, work: Any) -> None:
        """_run: errors of the shared state and of peers end the work, nothing else may."""
        if self.alive:
            self.world.spawn(self, self.quiet(work))
        else:
            work.close()

    async def quiet(self, work: Any) -> None:
        with contextlib.suppress(Lost, PeerGone, Refused, Moved):
            await work

    # ---- what devices ask

    @property
    def instance(self) -> str:
        """Name of the instance that this server takes part in, "" if in none."""
        return "" if self.cluster is None else self.cluster.instance

    @property
    def serving(self) -> bool:
        return self.cluster is not None and self.opened == self.iteration.number

    @property
    def joined(self) -> bool:
        return self.cluster is not None and self.up and self.own is not None and self.serving

    @property
    def open_for_rounds(self) -> bool:
        return not self.stopping and self.iteration.running is RunningState.RUNNING

    @property
    def where(self) -> tuple[int, int]:
        return self.iteration.number, self.iteration.attempt

    async def wait_until(self, condition: Callable[[], bool], until: float) -> bool:
        """driver._wait"""
        while not condition() and self.world.now < until:
            promise = Promise(self)
            self.waiters.append(promise)
            self.world.later(self, min(until - self.world.now, TICK_S), promise.succeed, None)
            await wait(promise)
        return condition()

    def awaken(self) -> None:
        waiters, self.waiters = self.waiters, []
        for promise in waiters:
            promise.succeed(None)

    async def pass_gate(self, until: float) -> bool:
        while self.open_for_rounds:
            if self.joined:
                return True
            if not await self.wait_until(lambda: self.joined, until):
                return False
        return False

    async def settled_at(self, error: Exception, seen: tuple[int, int], until: float) -> bool:
        """client_api._settled"""
        if self.world.now >= until:
            return False
        try:
            await self.look()
        except (Lost, Moved):
            return await self.wait_until(lambda: self.joined, until)
        if isinstance(error, Missing) or self.where != seen:
            return True
        if isinstance(error, Awaited | Revoked):
            until = min(until, self.world.now + RETRY_S)
            await self.wait_until(lambda: self.serving and self.where != seen, until)
            return True
        return await self.wait_until(lambda: self.serving and self.where != seen, until)

    async def start_fl_job(self, fl_id: str) -> tuple[str, int, str] | None:
        """Return instance, iteration and base for a client that got a place."""
        until = self.world.now + HOLD_S
        while await self.pass_gate(until):
            cluster, seen = self.cluster, self.where
            assert cluster is not None
            number, places = seen[0], self.policy.start_threshold
            try:
                word, count = await self.ask(
                    "select_client",
                    cluster.instance,
                    number,
                    fl_id,
                    "1",
                    places,
                    True,
                    RESERVE,
                    self.run_of_conn,
                    HOLD_OFF_S,
                )
                if word in ("missing", "closed", "awaited"):
                    raise {"missing": Missing, "closed": Moved, "awaited": Awaited}[word]
            except (Lost, Moved) as error:
                if await self.settled_at(error, seen, until):
                    continue
                return None
            if word == "selected" and cluster is self.cluster:
                self.refused.pop(key_of(fl_id), None)
                if number == self.iteration.number:
                    self.places[key_of(fl_id)] = "1"
                self.note(core.ClientSelected(number, count))
            if word in ("full", "reserved"):
                self.refused[key_of(fl_id)] = self.world.now + RESERVE.returns
            if word not in ("selected", "known"):
                return None
            if number == self.iteration.number and self.serving:
                return self.instance, number, self.models.newest_digest
            if self.world.now >= until:
                return None
        return None

    async def update_model(self, update: Update) -> bool:
        """Take an update; True is the 200."""
        slot = Slot(update)
        until, word, holder = self.world.now + HOLD_S, "", ""
        while await self.pass_gate(until):
            cluster, (number, attempt) = self.cluster, self.where
            assert cluster is not None
            try:
                word, count, holder = await self.accept(slot, cluster.instance, number, attempt)
            except (Lost, Moved) as error:
                word = ""
                if await self.settled_at(error, (number, attempt), until):
                    continue
                break
            if word == "accepted" and cluster is self.cluster:
                self.note(core.UploadCounted(number, attempt, count))
            break
        if word != "accepted" and slot.ledger is not None:
            slot.ledger.release(slot)
        counts = word in ("accepted", "repeated")
        if counts and cluster is not None:
            self.world.acknowledge(cluster.instance, update, holder)
        return counts

    # ---- update_intake

    async def accept(self, slot: Slot, instance: str, number: int, attempt: int) -> tuple[str, int, str]:
        question = object()
        self.asking.add(question)
        try:
            while True:
                if self.own is None:
                    raise Lost
                self.check_attempt(number, attempt)
                if slot.ledger not in (None, self.own):
                    slot.ledger.release(slot)  # it moves into the present one
                slot.ledger = ledger = self.own
                try:
                    return await self.count(ledger, slot, instance, number, attempt)
                except Revoked:
                    if self.sealing or self.own in (ledger, None):
                        raise
        finally:
            self.asking.discard(question)
            self.settle()

    async def count(
        self, ledger: LedgerFile, slot: Slot, instance: str, number: int, attempt: int
    ) -> tuple[str, int, str]:
        epoch, key = self.intake_epoch, key_of(slot.update.client)
        if slot.update.number == number and key not in ledger.updates:
            ledger.release(slot)
            ledger.record(slot)
        word, count, holder = await self.ask_to_count(ledger, slot.update, instance, number, attempt)
        if word != "accepted":
            return word, count, holder
        if self.intake_epoch != epoch:
            raise Moved
        if key in ledger.updates:
            return "repeated", count, ledger.id
        ledger.accept(slot)
        await pause(self.world.delay())  # a replica is given a moment
        return "accepted", count, ledger.id

    async def ask_to_count(
        self, ledger: LedgerFile, update: Update, instance: str, number: int, attempt: int
    ) -> tuple[str, int, str]:
        limit, epoch = self.world.now + ROOM_TIMEOUT_S, self.intake_epoch
        late, again = self.sealing, False
        while True:
            try:
                word, count, holder = await self.ask(
                    "accept_upload",
                    instance,
                    number,
                    attempt,
                    update.number,
                    update.client,
                    0 if late else self.policy.update_threshold,
                    ledger.id,
                    self.name,
                    True,
                    again,
                    self.run_of_conn,
                    HOLD_OFF_S,
                )
            except Lost:
                word, again = "lapsed", not late
            if word == "revoked":
                if self.sealing or self.own is not ledger or self.world.now >= limit:
                    raise Revoked
            elif word in ("missing", "closed"):
                raise Missing if word == "missing" else Moved
            elif word == "awaited":
                if not again:
                    raise Awaited
            elif word != "lapsed":
                return word, count, holder
            await pause(RETRY_S)
            await self.connected()
            if self.intake_epoch != epoch:
                raise Moved  # the answer does not matter any more, and may never come

    def begin(self, epoch: Epoch, attempt: int) -> None:
        self.attempt, self.intake_epoch, self.sealing = attempt, epoch, False
        for ledger_id, (adopted_for, file) in list(self.taken.items()):
            if adopted_for != epoch:
                self.world.removed(self, file, "of another epoch")
                del self.taken[ledger_id], self.adopted[ledger_id]
                self.dropped.append(ledger_id)
        if epoch != self.ledgers_epoch:
            self.inherited.clear()
            self.former.clear()
        self.passed.clear()
        self.elsewhere.clear()
        self.ledgers_epoch, self.begun_in = epoch, self.own
        if self.own is not None:
            if self.own.updates:
                self.world.wiped(self, self.own, epoch, self.joinings > self.joined_with)
            self.own.begin(epoch)
        self.joined_with = self.joinings
        self.settle()

    def resume(self, attempt: int) -> None:
        self.attempt, self.sealing = attempt, False
        if self.own is not None:
            self.own.sealed = False
        self.settle()

    def check_attempt(self, number: int, attempt: int) -> None:
        epoch = self.intake_epoch
        if epoch is None or (epoch.iteration, self.attempt) != (number, attempt):
            raise Moved

    async def seal(self, number: int, attempt: int) -> Partial | None:
        self.check_attempt(number, attempt)
        questions, epoch = set(self.asking), self.intake_epoch
        self.sealing = True
        while not self.asking.isdisjoint(questions):
            promise = Promise(self)
            self.settled.append(promise)
            await wait(promise)
        self.check_attempt(number, attempt)
        if self.intake_epoch != epoch:
            raise Moved
        return None if self.own is None else self.own.seal()

    def settle(self) -> None:
        settled, self.settled = self.settled, []
        for promise in settled:
            promise.succeed(None)

    # ---- ledgers

    def open_ledger(self) -> bool:
        if self.own is None and not self.closed:
            self.own = self.world.new_ledger(self)
        return self.own is not None

    def discard(self) -> None:
        if self.own is not None:
            self.world.removed(self, self.own, "not ours any more")
            self.own.lock, self.own = None, None

    @property
    def in_hand(self) -> set[str]:
        return set(self.adopted) | (set() if self.own is None else {self.own.id})

    def locate(self, ledger_id: str) -> str:
        if ledger_id in self.in_hand:
            return "here"
        files = self.world.files(self.host)
        return "held" if any(f.id == ledger_id and f not in self.passed for f in files) else "absent"

    def drop(self, ledger_id: str) -> None:
        if ledger_id in self.taken:
            _, file = self.taken.pop(ledger_id)
            self.world.removed(self, file, "dropped")
            del self.adopted[ledger_id]

    async def adopt(self, instance: str, epoch: Epoch) -> bool:
        while self.adopting:
            promise = Promise(self)
            self.adopters.append(promise)
            await wait(promise)
        self.adopting, found = True, False
        try:
            while self.dropped:
                await self.ask("forget_ledger", instance, self.dropped[-1])
                self.dropped.pop()
            for file in self.world.files(self.host):
                mine = (
                    file is self.own or file in self.passed or any(file is f for _, f in self.taken.values())
                )
                if mine or file.lock is not None or not file.there:
                    continue
                if file in self.elsewhere and await self.ask("is_alive", instance, self.elsewhere[file]):
                    continue
                if file.lock is not None or not file.there:
                    continue
                file.lock = self
                try:
                    found = await self.adopt_file(file, instance, epoch) or found
                except Lost:
                    file.lock = None
                    raise
        finally:
            self.adopting = False
            adopters, self.adopters = self.adopters, []
            for promise in adopters:
                promise.succeed(None)
        return found

    def pass_over(self, file: LedgerFile) -> None:
        self.passed.add(file)
        file.lock = None

    async def adopt_file(self, file: LedgerFile, instance: str, epoch: Epoch) -> bool:
        if file.epoch != epoch:
            if file.epoch is None or file.epoch.iteration < epoch.iteration:
                self.world.removed(self, file, "older")
            else:
                self.pass_over(file)
            return False
        before = await self.ask("ledger_owner", instance, file.id)
        if before == REVOKED:
            self.world.removed(self, file, "revoked")
            return False
        foreign = before != "" and self.world.host_of(before) != self.host
        if foreign and await self.ask("is_alive", instance, before):
            self.elsewhere[file], file.lock = before, None
            return False
        if not await self.ask("own_ledger", instance, file.id, self.name, before):
            self.pass_over(file)
            return False
        pending = [slot for slot in file.recorded if slot.begun == file.begun]
        asked = [slot.update.client for slot in pending]
        counted = await self.ask("counted", instance, epoch.iteration, file.id, asked)
        file.sealed = False
        for slot in pending:
            if slot.update.client in counted and key_of(slot.update.client) not in file.updates:
                file.updates[key_of(slot.update.client)] = slot.update
        file.recorded.clear()
        await pause(self.world.delay())
        if self.ledgers_epoch is not None and self.ledgers_epoch.iteration > epoch.iteration:
            self.world.removed(self, file, "ended meanwhile")
            return False
        partial = file.seal()
        if before:
            self.inherited.add(before)
        if not partial.updates:
            self.world.removed(self, file, "empty")
            self.dropped.append(file.id)
            return True
        await self.tell_again(instance, epoch, partial)
        self.keep(file, epoch, partial, before)
        return True

    def keep(self, file: LedgerFile, epoch: Epoch, partial: Partial, before: str) -> None:
        self.taken[file.id], self.adopted[file.id] = (epoch, file), partial
        self.former[file.id] = before

    async def tell_again(self, instance: str, epoch: Epoch, partial: Partial) -> None:
        """The shared state may have lost data since the owner died."""
        clients = dict.fromkeys(partial.updates, "1")
        words = (instance, epoch.iteration, partial.ledger_id, self.name, clients, epoch.base)
        await self.ask("restore_clients", *words)

    # ---- the machine

    def note(self, event: core.Event) -> None:
        self.events.append(event)
        if not self.busy:
            self.work()

    def work(self) -> None:
        while self.events and not self.effects:
            self.step(self.events.popleft())
        if self.effects:
            self.busy = True
            self.run_quietly(self.perform_all())

    def step(self, event: core.Event) -> None:
        before = self.iteration
        self.iteration, effects = core.step(before, event, self.world.now, self.policy)
        self.effects.extend(effects)
        match event:
            case core.Observed(seen, _, success, result) if seen.rank >= before.rank:
                self.ended = (success, result)
            case core.Advanced(success, result):
                self.ended = (success, result)
        if self.iteration.rank < before.rank:
            raise Bug(f"{self.name} went back from {before.rank} to {self.iteration.rank}")
        if self.iteration != before:
            self.show(before)

    def show(self, before: Iteration) -> None:
        now = self.iteration
        if now.phase is Phase.SEALED and before.phase is Phase.COLLECTING:
            self.sealed_at = self.world.now
        due = core.deadline(now, self.policy)
        at = None if due is None else due[0]
        if at != self.deadline_at:
            self.deadline_at = at
            if at is not None:
                self.world.later(self, max(0.0, at - self.world.now), self.deadline_passed, at)

    def deadline_passed(self, at: float) -> None:
        if at == self.deadline_at:
            self.deadline_at = None
            self.look_again()

    async def perform_all(self) -> None:
        try:
            while self.effects:
                cluster = self.cluster
                try:
                    event = await self.perform(self.effects[0])
                except Lost:
                    await self.connected()
                    event = await self.observed()
                if self.cluster is not cluster:
                    return  # another instance: nothing of this matters any more
                self.effects.popleft()
                if isinstance(event, core.Observed):
                    event = replace(event, fresh=True)
                if event is not None:
                    self.step(event)
                while self.events and not self.effects:
                    self.step(self.events.popleft())
        finally:
            self.effects.clear()
            self.busy = False
            if self.look_wanted:
                self.look_soon()

    async def perform(self, effect: core.Effect) -> core.Event | None:
        self.world.log(self.name, effect)
        instance = self.joined_instance()
        match effect:
            case core.Seal(number, attempt):
                self.sealed_here = (number, attempt)
                done = await self.ask("seal", instance, number, attempt, self.policy.update_threshold)
                return core.Sealed() if done else await self.observed()
            case core.ClaimReduction(number, attempt, token):
                return await self.claim(instance, number, attempt, token)
            case core.Reduce():
                return await self.reduce_now()
            case core.RecordCandidate(number, attempt, token, digest):
                updates = self.candidates[digest].updates if digest in self.candidates else 0
                done = await self.ask("record_model", instance, number, attempt, token, digest, updates)
                return core.CandidateRecorded(digest) if done else await self.observed()
            case core.SpreadCandidate(digest=digest):
                return await self.spread_now(digest)
            case core.Reopen(number, attempt, phase, ledgers):
                await self.ask("count_by_ledger", instance, number)  # for its report
                done = await self.ask(
                    "reopen", instance, number, attempt, phase, self.iteration.token, ledgers
                )
                if done is not None:
                    for ledger_id in ledgers:
                        self.drop(ledger_id)
                return await self.observed()
            case core.Resume(attempt=attempt):
                self.sum = None
                self.resume(attempt)
                self.awaken()
                if (epoch := self.ledgers_epoch) is not None and epoch.iteration == self.iteration.number:
                    await self.bring_back_ledgers(self.cluster, epoch, preparing=False)
            case core.Advance():
                done = await self.ask(
                    "advance",
                    instance,
                    effect.number,
                    effect.attempt,
                    effect.phase,
                    effect.success,
                    effect.result,
                    effect.finishes,
                    effect.token,
                    effect.base,
                )
                return core.Advanced(effect.success, effect.result) if done else await self.observed()
            case core.Open():
                await self.open(effect)
            case core.Interrupt():
                await self.ask("disable", instance)
                return await self.observed()
            case core.Finish():
                await self.ask("finish", instance, self.iteration.number)
                return await self.observed()
            case core.Leave():
                self.world.leave(self)
        return None

    async def claim(self, instance: str, number: int, attempt: int, token: str) -> core.Event | None:
        if not self.serving:
            return None
        sealed = self.sealed_at if self.sealed_at is not None else NEVER
        waits = self.sealed_here != (number, attempt) and self.world.now - sealed < CLAIM_PAUSE_S
        if not token and waits:
            return None
        cluster = self.cluster
        claimed = await self.ask("claim_reduction", instance, number, attempt, token, self.name)
        if claimed is None:
            return await self.observed()
        self.fence = max(self.fence, int(claimed[0].partition(":")[0]))
        self.world.claimed(self, cluster, claimed[0])
        if replace(self.iteration, phase=claimed[1]).rank < self.iteration.rank:
            return await self.observed()
        return core.ReductionClaimed(*claimed)

    async def open(self, effect: core.Open) -> None:
        again, self.opened = self.opened == effect.number, 0  # with another base
        candidate = self.take_candidate(effect.base) if effect.success else None
        made = candidate is not None and candidate.number == effect.ended
        if made and candidate is not None:
            self.models.add(effect.ended, candidate.digest)
        elif not effect.base or effect.base == self.models.newest_digest:
            self.models.carry_over(effect.ended)
        elif not await self.catch_up(effect.ended, effect.base):
            return
        if self.iteration.number != effect.number:
            return
        self.serve(effect.number)
        if made and candidate is not None and not candidate.durable and not again:
            self.run_quietly(self.save(candidate.number, candidate.digest))

    def epoch(self) -> Epoch:
        return Epoch(self.joined_instance(), self.iteration.number, self.models.newest_digest)

    def serve(self, number: int) -> None:
        self.opened, self.baseless_since = number, None
        self.sum = self.short = None
        if self.own is not None and self.own is self.begun_in and self.intake_epoch == self.epoch():
            self.resume(self.iteration.attempt)  # this server is back where it was
        else:
            self.places.clear()
            self.begin(self.epoch(), self.iteration.attempt)
        self.world.serves(self, number, self.models.newest_digest)
        self.awaken()

    async def catch_up(self, ended: int, base: str) -> bool:
        cluster, instance = self.cluster, self.joined_instance()
        found = await self.obtain(base, ended, await self.refresh_others())
        if cluster is not self.cluster or (self.iteration.number, self.iteration.base) != (ended + 1, base):
            return False  # that was long ago
        if self.held(base):
            self.models.add(ended, base)
            return True
        if found is Found.UNKNOWN:
            self.baseless_since = None
            return False
        if self.baseless_since is None:
            self.baseless_since = self.world.now
        if self.world.now - self.baseless_since < REBASE_S:
            return False
        self.baseless_since = None
        number = ended + 1
        finishes = number >= self.policy.last_iteration
        await self.ask(
            "rebase", instance, number, base, self.models.newest_digest, core.base_lost(number), finishes
        )
        self.look_soon()
        return False

    # ---- looking

    async def look(self) -> None:
        if not self.busy:
            await self.observe()

    def look_soon(self) -> None:
        self.look_wanted = True
        if not self.busy and not self.looking:
            self.run_quietly(self.look_while_wanted())

    def heard(self, message: str) -> None:
        if self.cluster is None or not self.up:
            return
        if message in ("", "released", "forgotten"):
            self.warned = self.warned or message == "forgotten"
            self.run_quietly(self.repair())
        elif message == "joined":
            self.run_quietly(self.refresh_others())
        else:
            self.look_soon()

    async def remind(self) -> None:
        cluster = self.cluster
        if cluster is None:
            raise Lost
        if await self.bring_back(cluster) == "newer" and cluster is self.cluster:
            self.leave_instance()

    async def look_while_wanted(self) -> None:
        self.looking = True
        try:
            while self.look_wanted and not self.busy:
                self.look_wanted = False
                await self.observe()
        finally:
            self.looking = False

    async def observe(self) -> None:
        cluster = self.cluster
        seen = await self.observed()
        if seen is not None and not self.busy and cluster is self.cluster:
            self.note(seen)

    async def observed(self) -> core.Event | None:
        instance, cluster = self.joined_instance(), self.cluster
        name, seen = await self.ask("read", instance)
        if cluster is not self.cluster or cluster is None:
            return None
        if self.due(name, seen):
            if await self.bring_back(cluster) == "newer":
                if cluster is self.cluster:
                    self.leave_instance()
                return None
            seen = (await self.ask("read", instance))[1]
        if cluster is not self.cluster:
            return None
        if seen is None:
            raise Lost
        now = self.localise(seen)
        finaliser = now.token.partition(":")[2]
        if now.changing or _timeless(now) != _timeless(self.iteration):
            gone = now.token != "" and (now.token == self.orphan or finaliser in self.inherited)
            mine = finaliser == self.name
            return core.Observed(now, mine, seen.success, seen.result, gone and not mine)
        return None

    def due(self, name: str, seen: Seen | None) -> bool:
        """Recovery.due"""
        warned, self.warned = self.warned, False
        if seen is None or name != self.instance or warned:
            return True
        return self.contradicts(seen.iteration) or seen.iteration.rank < self.iteration.rank

    def contradicts(self, seen: Iteration) -> bool:
        held = self.ledgers_epoch
        idle = not self.adopted and (self.own is None or not self.own.updates)
        if held is None or held == self.contradicted or idle:
            return False
        if seen.number != held.iteration or seen.base in ("", held.base):
            return False
        self.contradicted = held
        return True

    def joined_instance(self) -> str:
        if self.cluster is None:
            raise Lost
        return self.cluster.instance

    def leave_instance(self) -> None:
        self.left, self.cluster, self.follows = self.instance, None, True
        self.run_quietly(self.join())

    async def bring_back(self, cluster: Membership, preparing: bool = False) -> str:
        self.begin_doubt()
        self.baseless_since = None  # who is not back yet may have it
        self.short = None
        self.forget_missed()
        instance, run = cluster.instance, self.run_of_conn

        async def ask(*words: Any) -> Any:
            return await self.ask(*words, preparing=preparing)

        others = self.in_doubt()
        call = await ask("await_nodes", instance, run, self.name, others)
        raised = await self.bring_back_all(ask, cluster, preparing)
        vouched = () if ANYBODY in others else (ANYBODY,)
        await ask("nodes_are_back", instance, run, self.name, (self.name, *vouched, *self.inherited), call)
        return raised

    async def bring_back_all(self, ask: Any, cluster: Membership, preparing: bool) -> str:
        """recovery.bring_back"""
        known, number, instance = self.known(), self.iteration.number, cluster.instance
        raised: str = await ask("raise_status", instance, known)
        if raised == "newer":
            return raised
        if raised == "raised":
            await ask("publish", "forgotten")
        epoch = self.ledgers_epoch
        if epoch is not None and epoch.iteration == number:
            places = dict.fromkeys(self.places, "1")
            await ask("restore_clients", instance, number, "", self.name, places, epoch.base)
            await self.bring_back_ledgers(cluster, epoch, preparing)
        back = {client: returns - self.world.now for client, returns in self.refused.items()}
        waiting = {client: (ms, RESERVE.after) for client, ms in back.items() if ms > -RESERVE.after}
        await ask("restore_waiting", instance, number, waiting, self.policy.start_threshold)
        return raised

    async def bring_back_ledgers(self, cluster: Membership, epoch: Epoch, preparing: bool) -> None:
        async def ask(*words: Any) -> Any:
            return await self.ask(*words, preparing=preparing)

        held = {i: p.updates for i, p in self.adopted.items() if p.iteration == epoch.iteration}
        for ledger_id, updates in held.items():
            await self.claim_again(ask, cluster.instance, ledger_id)
            await self.restore(ask, cluster, epoch, ledger_id, updates)
        if self.own is not None:
            await self.restore(ask, cluster, epoch, self.own.id, self.own.updates)

    async def claim_again(self, ask: Any, instance: str, ledger_id: str) -> bool:
        """Ledgers.claim_again"""
        owner = await ask("ledger_owner", instance, ledger_id)
        if owner in (self.name, REVOKED):
            return bool(owner == self.name)
        stranger = owner not in ("", self.former.get(ledger_id)) and self.world.host_of(owner) != self.host
        if not stranger or not await ask("is_alive", instance, owner):
            await ask("own_ledger", instance, ledger_id, self.name, owner)
        return True

    async def restore(
        self, ask: Any, cluster: Membership, epoch: Epoch, ledger_id: str, clients: Mapping[str, object]
    ) -> None:
        declared = dict.fromkeys(clients, "1")
        words = (
            "restore_clients",
            cluster.instance,
            epoch.iteration,
            ledger_id,
            self.name,
            declared,
            epoch.base,
        )
        await ask(*words)

    def known(self) -> Seen:
        now = self.iteration
        return Seen(
            now,
            now.started,
            now.first_upload,
            self.sealed_at if now.changing else None,
            self.fence,
            self.epoch_number,
            *self.ended,
        )

    async def watch_finaliser(self, instance: str) -> None:
        token = self.iteration.token
        finaliser = token.partition(":")[2]
        if finaliser in ("", self.name):
            return
        gone = not await self.ask("is_alive", instance, finaliser)
        if not gone:
            try:
                await self.call(finaliser, "locate_ledger", "", timeout=PING_TIMEOUT_S)
            except PeerGone as error:
                gone = isinstance(error, Refused | Replaced)
        self.orphan = token if gone else ""

    def localise(self, seen: Seen) -> Iteration:
        self.fence, self.epoch_number = max(self.fence, seen.fence), max(self.epoch_number, seen.epoch)
        self.sealed_at = seen.sealed
        return replace(seen.iteration, started=seen.started, first_upload=seen.first_upload)

    async def tick(self) -> None:
        await pause(self.world.chance())
        while True:
            self.world.check_server(self)
            self.look_again()
            await pause(TICK_S)

    def look_again(self) -> None:
        if self.cluster is not None and self.up:
            self.run_quietly(self.repair())
            self.run_quietly(self.watch_clock())
        elif self.cluster is None and self.up and not self.joining:
            self.run_quietly(self.join())

    async def repair(self) -> None:
        if self.guarding:
            return
        self.guarding = True
        try:
            await self.guard_updates()
            await self.look()
            if not self.busy and not self.serving:
                await self.open_late()
        finally:
            self.guarding = False

    async def watch_clock(self) -> None:
        await self.observe()
        if not self.busy:
            self.note(core.TimePassed())

    async def open_late(self) -> None:
        number, base = self.iteration.number, self.iteration.base
        if await self.catch_up(number - 1, base) and number == self.iteration.number and not self.busy:
            self.serve(number)

    async def join(self) -> None:
        if self.joining:
            return
        self.joining = True
        models = self.models
        first = 1 if self.follows else models.newest + 1
        try:
            await self.connected()
            if self.cluster is not None:
                return
            proposed = self.world.new_instance_name()
            instance = await self.ask("claim_instance", proposed)
            if instance == proposed and first > 1:
                await self.ask("await_nodes", instance, self.run_of_conn, FOUNDERS, ())
            await self.ask(
                "create_status",
                instance,
                first,
                True,
                "",
                RunningState.FINISH if first > self.policy.last_iteration else RunningState.RUNNING,
                models.newest_digest,
                self.epoch_number + 1 if self.follows else 0,
            )
            _, seen = await self.ask("read", instance)
            if seen is None:
                raise Lost
            back, self.left = instance == self.left, ""
            if back:
                self.go_on(instance)
            else:
                self.take_part(instance, seen)
        finally:
            self.joining = False
        self.run_quietly(self.beat_once())
        if back:
            await self.remind()
        await self.repair()

    def go_on(self, instance: str) -> None:
        self.effects.clear()
        self.events.clear()
        self.joinings += 1
        self.cluster, self.run_id = Membership(instance, self.joinings), self.run_of_conn

    def take_part(self, instance: str, seen: Seen) -> None:
        self.effects.clear()
        self.events.clear()
        self.fence = self.epoch_number = 0
        self.missed[ANYBODY] = 0.0
        before, self.iteration = self.iteration, self.localise(seen)
        self.ended = (seen.success, seen.result)
        self.joinings, self.joined_at = self.joinings + 1, self.world.now
        self.cluster, self.run_id = Membership(instance, self.joinings), self.run_of_conn
        self.opened = 0
        number = self.iteration.number
        if self.iteration.base == self.models.newest_digest:
            self.models.carry_over(number - 1)
            self.serve(number)
        self.show(before)

    async def beat(self) -> None:
        while True:
            await self.quiet(self.beat_once())
            await pause(TICK_S)

    async def beat_once(self) -> None:
        if self.cluster is not None:
            await self.ask("heartbeat", self.cluster.instance, self.name)
            if not self.registered:
                self.registered = True
                await self.ask("publish", "joined")

    # ---- what must not be lost

    async def refresh_others(self) -> list[str]:
        nodes = await self.ask("list_nodes", self.joined_instance())
        self.others = [node for node in nodes if node != self.name]
        self.saw(self.others)
        return self.others

    async def guard_updates(self) -> None:
        instance, cluster, now = self.joined_instance(), self.cluster, self.iteration
        await self.refresh_others()
        await self.own_a_ledger(instance)
        if now.phase in (Phase.REDUCING, Phase.CANDIDATE):
            await self.watch_finaliser(instance)
        if now.interrupted and now.running is RunningState.RUNNING:
            await self.ask("forget_interruption", instance)
        if not self.serving:
            return
        adopted = await self.adopt(instance, self.epoch())
        run, told = self.run_of_conn, self.inherited if adopted else set()
        if ANYBODY in self.missed or self.world.now - self.born < 2 * DOUBT_S:
            back, awaited, all_listed = await self.ask("roll", instance, run)
            if (all_listed or ANYBODY in back) and self.world.now - self.lost_at >= HOLD_OFF_S:
                self.missed.pop(ANYBODY, None)
                self.unlisted.discard(ANYBODY)
                self.missed.update(dict.fromkeys(awaited - self.missed.keys(), 0.0))
            told = told | replaced(awaited, {self.name})
        if told:
            await self.ask("nodes_are_back", instance, run, self.name, sorted(told))
        if adopted and not self.busy:
            await self.observe()
        for ledger_id in list(self.adopted):
            if not await self.claim_again(self.ask, instance, ledger_id):
                self.drop(ledger_id)
        if now.running is not RunningState.RUNNING:
            return
        if now.phase is Phase.CANDIDATE and now.digest in self.candidates:
            return  # the updates are in the model
        if now.phase is Phase.COLLECTING or now.token.partition(":")[2] == self.name:
            sealed = self.world.now - self.sealed_at if self.sealed_at is not None else 0.0
            impatient = now.changing and sealed > self.policy.global_window
            lost = await self.lost(instance, now.number, impatient)
            if lost and cluster is self.cluster:
                self.world.judged(self, lost, impatient)
                self.note(core.UpdatesLost(now.number, now.attempt, lost))

    async def own_a_ledger(self, instance: str) -> None:
        if self.own is not None:
            owner = await self.ask("ledger_owner", instance, self.own.id)
            if self.own is not None and owner == self.name:
                self.owned = self.own.id
                return
            if self.own is not None and not owner and self.own.id == self.owned:
                await self.remind()
            if owner:
                self.discard()
        fresh = self.own is None
        if self.open_ledger() and self.own is not None:
            if fresh:
                self.begin(self.epoch(), self.iteration.attempt)
            ledger_id = self.own.id
            if await self.ask("own_ledger", instance, ledger_id, self.name):
                self.owned = ledger_id

    def forget_missed(self) -> None:
        """LossJudge.forget"""
        self.missed_since = {}

    async def lost(self, instance: str, number: int, impatient: bool) -> tuple[str, ...]:
        if self.world.now - self.judged_at > STALE_S:
            self.missed_since.clear()  # this server was paused, or cut off: it has not watched meanwhile
        self.judged_at = self.world.now
        owners = await self.ask("ledgers", instance)
        living = await self.ask("list_nodes", instance)
        suspects = {
            ledger_id: owner
            for ledger_id, owner in owners.items()
            if owner not in (REVOKED, self.name) and (impatient or owner not in living)
        }
        if not suspects and not self.adopted:
            self.missed_since.clear()
            return ()
        counted = await self.ask("count_by_ledger", instance, number)
        short = {
            i for i, p in self.adopted.items() if p.iteration == number and len(p.updates) < counted.get(i, 0)
        }
        watched, missed = self.missed_since, {}
        for ledger_id in sorted(counted.keys() - self.in_hand - self.had):
            if ledger_id in suspects and (
                impatient or await self.missing(suspects[ledger_id], living, ledger_id)
            ):
                missed[ledger_id] = watched.get(ledger_id, self.world.now)
        if self.missed_since is not watched:
            return tuple(sorted(short))  # forgotten meanwhile
        self.missed_since = missed
        return tuple(sorted(short | {i for i, since in missed.items() if self.world.now - since >= LOSS_S}))

    async def missing(self, owner: str, living: list[str], ledger_id: str) -> bool:
        host = self.world.host_of(owner)
        neighbours = [peer for peer in living if self.world.host_of(peer) == host and peer != self.name]
        asked = [self.world.spawn(self, self.knows(peer, ledger_id)) for peer in (owner, *neighbours)]
        if any([await wait(promise) for promise in asked]):
            return False
        return host != self.host or self.locate(ledger_id) == "absent"

    async def knows(self, peer: str, ledger_id: str) -> bool:
        try:
            return await self.call(peer, "locate_ledger", ledger_id, timeout=PING_TIMEOUT_S) != "absent"
        except PeerGone:
            return False

    # ---- reduction

    @property
    def had(self) -> frozenset[str]:
        return frozenset() if self.sum is None else frozenset(self.sum.partials)

    def saw(self, others: Sequence[str]) -> None:
        """Memory.saw"""
        now = self.world.now
        for peer in self.unlisted:
            self.missed[peer] += self.unlisted_for
        self.missed = {peer: missed for peer, missed in self.missed.items() if missed < DOUBT_S}
        emptied = now - self.lost_at < HOLD_OFF_S
        if now - self.saw_at > LIST_S and not emptied:
            self.missed[ANYBODY] = 0.0
        self.unlisted = self.missed.keys() - set(others)
        self.unlisted_for = 0.0 if emptied else min(now - self.saw_at, LOOK_S)
        self.missed.update(dict.fromkeys(others, 0.0))
        self.saw_at = now

    def begin_doubt(self) -> None:
        """Memory.begin_doubt"""
        now = self.lost_at = self.world.now
        away = now - self.saw_at > LOOK_S
        self.doubt_until = now + DOUBT_S
        self.unlisted = set()
        for peer, missed in self.missed.items():
            lived = now if away and peer != ANYBODY else now - missed
            self.others_before[peer] = max(lived, self.others_before.get(peer, lived))
        self.others_before.update(dict.fromkeys(self.others, now))

    def in_doubt(self) -> list[str]:
        """Memory.in_doubt"""
        now = self.world.now
        if now >= self.doubt_until:
            self.others_before.clear()
            return []
        recent = {peer for peer, lived in self.others_before.items() if now - lived < DOUBT_S}
        return sorted({*self.others, *recent} - {self.name})

    async def reduce_now(self) -> core.Event | None:
        if not self.iteration.changing:
            return None  # another instance was joined while this was on its way
        instance, now = self.joined_instance(), self.iteration
        outcome = await self.reduce(instance, now, self.epoch(), self.models.newest_digest)
        if not isinstance(outcome, Reduced):
            return outcome
        self.hold(Candidate(self.iteration.number, outcome.digest, updates=outcome.updates))
        return core.ModelReduced(outcome.digest)

    async def reduce(
        self, instance: str, now: Iteration, epoch: Epoch, previous: str
    ) -> Reduced | core.ReductionFailed | core.UpdatesLost | None:
        number = now.number
        try:
            own = await self.seal(number, now.attempt)
        except (Lost, Moved):
            return None
        await self.adopt(instance, epoch)
        everybody = self.in_doubt()
        found, silent = await self.find(instance, now, own, everybody)
        vouched = (await self.ask("roll", instance, self.run_of_conn))[0] & {ANYBODY} if everybody else set()
        uploads = await self.ask("uploads_of", instance, number)
        making = self.world.reduces(self, list(everybody))
        if self.in_doubt() != everybody:
            return None  # Redis was lost meanwhile
        counted: dict[str, set[str]] = {}
        for client, ledger_id in uploads.items():
            counted.setdefault(ledger_id, set()).add(client)
        uncounted = {i for i, (partial, _) in found.items() if partial.updates} - counted.keys()
        if everybody and (uncounted or (silent & set(everybody)) - vouched):
            return None  # they bring back what Redis has forgotten, or the doubt ends
        held = {i for i, (partial, _) in found.items() if partial.updates} | self.had
        if not counted.keys() <= held:
            missing = counted.keys() - self.had
            empty = tuple(sorted(i for i in missing if i in found and not found[i][0].updates))
            return core.UpdatesLost(number, now.attempt, empty) if empty else None
        if len(uploads) < self.policy.update_threshold:
            lasting = self.is_short((instance, number, now.attempt)) and not everybody
            if not lasting and not await self.is_told(instance, now, own):
                return None
            self.world.failed_reduction(self, "below the quorum")
            return core.ReductionFailed(core.status_lost(number))
        self.short = None
        return await self.add_all(now, epoch, previous, found, counted, making)

    async def is_told(self, instance: str, now: Iteration, own: Partial | None) -> bool:
        """Reduction._is_told"""
        back, awaited, _ = await self.ask("roll", instance, self.run_of_conn)
        if awaited or not back:
            return False
        before = await self.ask("count_by_ledger", instance, now.number)
        living = await self.ask("list_nodes", instance)
        found, silent = await self.find(instance, now, own, living)
        counted = await self.ask("count_by_ledger", instance, now.number)
        uncounted = {i for i, (partial, _) in found.items() if partial.updates} - counted.keys()
        back, awaited, _ = await self.ask("roll", instance, self.run_of_conn)
        return counted == before and not uncounted and not silent - {ANYBODY} and back and not awaited

    def is_short(self, attempt: tuple[str, int, int]) -> bool:
        """Reduction._is_short"""
        if self.short is None or self.short[0] != attempt:
            self.short = attempt, self.world.now
        return self.world.now - self.short[1] >= DOUBT_S

    async def find(
        self, instance: str, now: Iteration, own: Partial | None, everybody: Sequence[str]
    ) -> tuple[dict[str, tuple[Partial, str]], set[str]]:
        """Return where each partial is, and who did not answer."""
        found: dict[str, tuple[Partial, str]] = {
            p.ledger_id: (p, "") for p in [*self.adopted.values(), *([] if own is None else [own])]
        }
        counted = await self.ask("count_by_ledger", instance, now.number)
        elsewhere = counted.keys() - found.keys() - self.had
        owners = await self.ask("ledgers", instance) if elsewhere else {}
        wanted = {owners.get(i, "") for i in elsewhere} | set(everybody)
        asked = sorted(wanted - replaced(wanted, {self.name}) - {"", REVOKED, self.name})
        offers = [
            self.world.spawn(self, self.offers_of(peer, instance, now.number, now.attempt)) for peer in asked
        ]
        silent = {ANYBODY}
        for peer, promise in zip(asked, offers, strict=True):
            answer = await wait(promise)
            if answer is None:
                silent.add(peer)
            for partial in answer or ():
                found.setdefault(partial.ledger_id, (partial, peer))
        return found, silent - replaced(silent, {self.name, *asked} - silent)

    async def offers_of(self, peer: str, instance: str, number: int, attempt: int) -> list[Partial] | None:
        try:
            offers: list[Partial] = await self.call(
                peer, "seal_partials", instance, number, attempt, timeout=PEER_TIMEOUT_S
            )
        except Replaced:
            return []  # the next process at its address answers for itself
        except PeerGone:
            return None
        return offers

    async def add_all(
        self,
        now: Iteration,
        epoch: Epoch,
        previous: str,
        found: dict[str, tuple[Partial, str]],
        counted: dict[str, set[str]],
        making: Making,
    ) -> Reduced | core.ReductionFailed | core.UpdatesLost | None:
        attempt = (epoch.instance, now.number, now.attempt)
        if self.sum is None or self.sum.attempt != attempt or not self.had <= counted.keys():
            self.sum = Sum(attempt)
        total = self.sum
        for ledger_id in sorted(counted):
            if ledger_id in total.partials:
                continue
            if ledger_id not in found:
                return None
            added = await self.add(total, *found[ledger_id], attempt, epoch)
            if added is None:
                return None
            if not added:
                tries = total.tries[ledger_id] = total.tries.get(ledger_id, 0) + 1
                return core.UpdatesLost(now.number, now.attempt, (ledger_id,)) if tries >= TRIES else None
        wrong = self.mismatch(total, counted, now)
        if wrong is not None:
            self.sum = None
            return wrong
        updates = [update for i in total.partials for update in total.partials[i].updates.values()]
        await pause(self.world.delay())
        if self.sum is total:
            self.sum = None
        model = self.world.model_of(epoch.instance, previous, updates, making)
        return Reduced(model, len(updates))

    async def add(
        self, total: Sum, partial: Partial, peer: str, attempt: tuple[str, int, int], epoch: Epoch
    ) -> bool | None:
        if peer:
            try:
                partial = await self.call(
                    peer, "read_partial", *attempt, partial.ledger_id, timeout=PEER_TIMEOUT_S
                )
            except PeerGone:
                return None
            if partial.epoch != epoch:
                return False  # Damaged
        await pause(self.world.delay())
        total.partials[partial.ledger_id] = partial
        return True

    def mismatch(
        self, total: Sum, counted: dict[str, set[str]], now: Iteration
    ) -> core.ReductionFailed | core.UpdatesLost | None:
        have = total.partials
        short = tuple(sorted(i for i, clients in counted.items() if clients - have[i].updates.keys()))
        if short:
            self.world.fell_short(self, short)
            return core.UpdatesLost(now.number, now.attempt, short)
        if any(have[i].updates.keys() != clients for i, clients in counted.items()):
            self.world.failed_reduction(
                self, "ledgers hold updates that are counted elsewhere, or not at all"
            )
            return core.ReductionFailed(core.server_exited(now.number))
        return None

    # ---- publication

    def hold(self, candidate: Candidate) -> None:
        self.candidates.pop(candidate.digest, None)
        self.candidates[candidate.digest] = candidate
        while len(self.candidates) > KEPT:
            del self.candidates[next(iter(self.candidates))]

    def held(self, digest: str) -> bool:
        return digest in self.candidates or self.models.find(digest)

    def take_candidate(self, digest: str) -> Candidate | None:
        candidate = self.candidates.get(digest)
        self.candidates.clear()
        return candidate

    async def spread_now(self, digest: str) -> core.Event | None:
        others = await self.refresh_others()
        if digest not in self.candidates:
            await self.obtain(digest, self.iteration.number, others)
        if digest not in self.candidates:
            again = await self.reduce_now()
            if not isinstance(again, core.ModelReduced):
                return again
            if again.digest != digest:
                self.world.failed_reduction(self, "the model came out different the second time")
                return core.ReductionFailed(core.server_exited(self.iteration.number))
        candidate = self.candidates.get(digest)
        if candidate is None:
            return None  # another instance has begun meanwhile
        offers = [self.world.spawn(self, self.offer(peer, candidate)) for peer in others]
        saving = self.world.spawn(self, self.save(candidate.number, candidate.digest))
        for promise in (*offers, saving):
            await wait(promise)
        if self.candidates.get(digest) is candidate:
            self.hold(candidate._replace(durable=True))
        return core.CandidateSpread()

    async def offer(self, peer: str, candidate: Candidate) -> None:
        with contextlib.suppress(PeerGone):
            await self.call(peer, "offer_model", candidate.number, candidate.digest, timeout=SPREAD_S)

    async def save(self, number: int, digest: str) -> None:
        await pause(self.world.delay())
        self.world.save(self.host, number, digest)

    async def obtain(self, digest: str, number: int, others: Sequence[str]) -> Found:
        while digest in self.reading:
            await wait(self.reading[digest])
        if self.held(digest):
            return Found.HERE
        done = self.reading[digest] = Promise(self)
        try:
            await pause(self.world.delay())
            if any(digest == kept for _, kept in self.world.hosts[self.host].checkpoints):
                self.hold(Candidate(number, digest, durable=True))
                return Found.HERE
            return await self.read_model(digest, number, others)
        finally:
            del self.reading[digest]
            done.succeed(None)

    async def read_model(self, digest: str, number: int, others: Sequence[str]) -> Found:
        everybody_refused = True
        for peer in others:
            try:
                await self.call(peer, "give_model", digest, timeout=PING_TIMEOUT_S)
            except PeerGone as error:
                everybody_refused = everybody_refused and isinstance(error, Answered | Replaced)
                continue
            self.hold(Candidate(number, digest))
            return Found.HERE
        return Found.NOWHERE if everybody_refused else Found.UNKNOWN

    # ---- a clean stop

    async def stop(self) -> None:
        """server.drain, and the end of the heartbeat."""
        self.stopping = True
        limit = self.world.now + DRAIN_S
        while self.asking and self.world.now < limit:
            await pause(0.02)
        await self.quiet(self.hand_over(self.world.now + DRAIN_S))
        self.closed = True
        if self.own is not None:
            file, self.own = self.own, None
            if not file.updates and not file.recorded:
                self.world.removed(self, file, "empty at the end")
            file.lock = None
        await self.quiet(self.release())
        await pause(self.world.chance())
        await self.quiet(self.leave())
        self.world.kill(self)

    async def release(self) -> None:
        if self.instance:
            await self.ask("publish", "released")

    async def leave(self) -> None:
        if self.instance:
            await self.ask("leave", self.instance, self.name)

    async def hand_over(self, until: float) -> None:
        if not self.instance or not self.up:
            return
        instance, (number, attempt) = self.instance, self.where
        counted = await self.ask("count_by_ledger", instance, number)
        own = await self.seal(number, attempt)
        here = [*self.adopted.values(), *([] if own is None else [own])]
        held = [partial for partial in here if partial.ledger_id in counted]
        if not held:
            return
        self.closed_here = (instance, number, attempt), held
        for peer in sorted(
            await self.refresh_others(), key=lambda peer: self.world.host_of(peer) != self.host
        ):
            for partial in list(held):
                try:
                    await self.call(
                        peer,
                        "take_ledger",
                        instance,
                        partial.iteration,
                        attempt,
                        partial.ledger_id,
                        timeout=min(TAKE_TIMEOUT_S, max(0.0, until - self.world.now)),
                    )
                except PeerGone:
                    break
                held.remove(partial)
                if self.own is not None and partial.ledger_id == self.own.id:
                    self.discard()
                self.drop(partial.ledger_id)
            if not held:
                return

    # ---- what peers ask

    async def call(self, peer: str, command: str, *words: Any, timeout: float) -> Any:
        """Ask a peer.

        Raises:
            PeerGone: it cannot be reached in time, or refuses.
            Refused: its host answers, and nobody listens there.
        """
        return await wait(self.world.message(self, peer, command, words, timeout))

    async def locate_ledger(self, sender: str, ledger_id: str) -> str:
        return self.locate(ledger_id)

    async def seal_partials(self, sender: str, instance: str, number: int, attempt: int) -> list[Partial]:
        return await self.sealed(instance, number, attempt)

    def is_at(self, instance: str, number: int, attempt: int) -> bool:
        same = self.instance == instance and self.where == (number, attempt)
        return same and self.iteration.changing

    async def sealed(self, instance: str, number: int, attempt: int) -> list[Partial]:
        if self.closed_here is not None and self.closed_here[0] == (instance, number, attempt):
            return list(self.closed_here[1])
        if not self.is_at(instance, number, attempt):
            await self.look()
        if not self.is_at(instance, number, attempt):
            raise PeerGone
        own = await self.seal(number, attempt)
        here = [p for p in self.adopted.values() if p.iteration == number]
        return here if own is None else [*here, own]

    async def read_partial(
        self, sender: str, instance: str, number: int, attempt: int, ledger_id: str
    ) -> Partial:
        where = (instance, number, attempt)
        if self.shown[0] != where or not self.is_at(*where):
            self.shown = where, {partial.ledger_id: partial for partial in await self.sealed(*where)}
        if ledger_id not in self.shown[1]:
            raise PeerGone
        return self.shown[1][ledger_id]

    async def take_ledger(
        self, sender: str, instance: str, number: int, attempt: int, ledger_id: str
    ) -> None:
        cluster = self.cluster
        if cluster is None or self.stopping:
            raise PeerGone
        if number != self.iteration.number:
            await self.look()
        epoch = self.epoch()
        if epoch[:2] != (instance, number):
            raise PeerGone
        partial: Partial = await self.call(
            sender, "read_partial", instance, number, attempt, ledger_id, timeout=PEER_TIMEOUT_S
        )
        if partial.epoch != epoch:
            raise PeerGone
        file = self.world.new_ledger(self, ledger_id)
        file.epoch, file.updates = epoch, dict(partial.updates)
        try:
            mine = await self.ask("own_ledger", cluster.instance, ledger_id, self.name, sender)
        except Lost:
            file.lock = None  # it may be ours: whoever adopts it finds out
            raise
        if not mine or self.ledgers_epoch != epoch:
            self.world.removed(self, file, "not taken over")
        if not mine:
            raise PeerGone
        if file.there:
            self.keep(file, epoch, partial, sender)
        self.look_soon()

    async def offer_model(self, sender: str, number: int, digest: str) -> None:
        if self.iteration.digest != digest:
            await self.look()
        if (self.iteration.number, self.iteration.digest) != (number, digest):
            raise PeerGone
        if await self.obtain(digest, number, [sender]) is not Found.HERE:
            raise PeerGone

    async def give_model(self, sender: str, digest: str) -> None:
        if not self.held(digest):
            raise PeerGone


def _timeless(iteration: Iteration) -> tuple[Any, ...]:
    i = iteration
    return (
        i.number,
        i.attempt,
        i.phase,
        i.running,
        i.selected,
        i.uploaded,
        i.token,
        i.digest,
        i.base,
        i.lost,
        i.interrupted,
    )
