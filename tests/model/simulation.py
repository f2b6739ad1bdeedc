"""A whole cluster in simulated time: hosts, servers, devices, Redis, and whatever may go wrong with them.

``Simulation(seed)`` is one history; the same seed gives the same one. Everything that takes time is an entry of the
agenda, and its delay is drawn from the seed, so the order of all atomic steps is random, but possible: requests on one
connection keep their order, a broken connection may or may not have carried its last requests, and a paused process
finds on waking what came meanwhile. What must always hold is checked where it could be broken; ``calm`` then ends all
faults and sees that the job goes on.

    python -m model.simulation SEED [LINES]         one history with its last actions (from the folder tests)
    python -m model.simulation - SECONDS [FIRST]    histories from a first seed on, for so long (CPU)
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any

from model.cluster import SharedState, Status, Store
from model.kernel import Agenda, Answered, Lost, PeerGone, Promise, Refused, Replaced, pause, wait
from model.simulated_server import (
    DOUBT_S,
    LOSS_S,
    Bug,
    Epoch,
    LedgerFile,
    Moved,
    Server,
    Update,
    address_of,
)

from fedcore.core.client_key import client_key
from fedcore.core.iteration import Phase, Policy, WrongPhase, status_lost
from fedcore.core.job import RunningState
from fedcore.store.keys import HEARTBEAT_TTL_S, REVOKED

INITIAL = "m0"
DEVICES = 7
PATIENCE_S = 130.0  # longest time that a healthy cluster needs for an iteration: all windows and all waits for the lost
CHANGES = frozenset(
    [
        "seal",
        "record_model",
        "claim_reduction",
        "reopen",
        "advance",
        "rebase",
        "disable",
        "raise_status",
        "create_status",
        "restore_clients",
        "finish",
    ]
)
AIMED = CHANGES | {"accept_upload", "own_ledger"}  # steps that faults like to follow
FAULTS = [
    "break_connection",
    "kill",
    "pause",
    "host_lost",
    "stop",
    "start",
    "partition",
    "store_down",
    "step_back",
    "wipe",
    "flush",
    "disable",
    "mark",
    "new_instance",
]


@dataclass
class Host:
    """A machine: what is on it outlives its processes."""

    name: str
    up: bool = True
    files: list[LedgerFile] = field(default_factory=list)
    checkpoints: list[tuple[int, str]] = field(default_factory=lambda: [(0, INITIAL)])  # the newest last


@dataclass(frozen=True)
class Model:
    """What is in a model."""

    base: str
    updates: frozenset[Update]


@dataclass(frozen=True)
class Making:
    """How a model was made.

    Attributes:
        at: when the shared state was asked for the last time which updates count.
        by: the finaliser.
        asked: whom it asked and waited for as Redis may have forgotten something; empty out of doubt.
        since: when the finaliser had joined the instance.
        hands: ledger id -> the living server that had it then.
        ready: servers that could have told Redis long ago what they have.
    """

    at: float
    by: str
    asked: frozenset[str]
    since: float
    hands: dict[str, str]
    ready: frozenset[str]


RARE = frozenset(["host_lost", "wipe", "flush", "step_back", "new_instance"])


class Violation(AssertionError):
    """Something happened that never may."""


class Simulation(Agenda):
    """One history; the world of its servers."""

    every_copy_may_be_lost = True  # of the model that devices train from, together with its host

    def __init__(self, seed: int, faults: frozenset[str] | None = None) -> None:
        super().__init__()
        self.expected = (Lost, PeerGone, Moved)
        self.seed, self.random = seed, random.Random(seed)
        self.chance = self.random.random
        self.trace: deque[tuple[float, str, object]] = deque(maxlen=400)
        draw = self.random
        self.policy = Policy(
            start_threshold=draw.choice((2, 3, 4)),
            update_threshold=draw.choice((1, 2, 2)),
            start_window=draw.choice((5.0, 8.0, 25.0)),
            update_window=draw.choice((5.0, 8.0)),
            global_window=draw.choice((8.0, 12.0, 30.0)),
            last_iteration=draw.choice((4, 1000, 1000, 1000)),
        )
        some = frozenset(f for f in FAULTS if draw.random() < 0.4)
        few = frozenset(draw.sample(FAULTS, 2))
        some = draw.choice((some, few))
        self.faults = faults if faults is not None else some
        self.likely = sorted(self.faults)
        self.break_rate = draw.choice((0.0, 0.003, 0.02)) if "break_connection" in self.faults else 0.0
        self.loss_rate = draw.choice((0.0, 0.02))
        self.pace = draw.choice((0.3, 1.0, 3.0))  # seconds between faults
        self.slowness = draw.choice((0.002, 0.02, 0.1))
        self.aim = draw.choice((0.0, 0.03, 0.1))  # share of the steps that a fault follows at once
        self.company = draw.choice((0.0, 0.3))  # share of the faults that another one follows at once
        self.absence = draw.choice((0.5, 0.5, 7.0))  # longest time to connect anew
        self.impatience = draw.choice((10.0, 10.0, 1.0))  # how long a device waits for an answer
        self.calm = False
        self.store_up = True
        self.store = Store(lambda: self.now, self.told)
        self.hosts = {f"h{i}": Host(f"h{i}") for i in range(draw.randint(1, 3))}
        self.servers: dict[str, Server] = {}
        self.partitions: set[frozenset[str]] = set()
        self.models: dict[Model, str] = {Model("", frozenset()): INITIAL}
        self.contents: dict[str, Model] = {INITIAL: Model("", frozenset())}
        self.acked: dict[tuple[str, int], dict[str, tuple[Update, str]]] = {}
        self.revoked: set[str] = set()
        self.burnt: set[str] = set()  # ledgers that were lost with a host
        self.left: set[tuple[str, str, int]] = (
            set()
        )  # ledger, instance and iteration that its server went away from
        self.forgotten: dict[tuple[tuple[str, int], str], tuple[str, float]] = {}  # update -> ledger, when
        self.excuses: Counter[str] = Counter()
        self.restored: dict[tuple[tuple[str, int], str], float] = {}  # update -> when Redis heard of it again
        self.made: dict[str, Making] = {}  # digest -> how it was first made
        self.ended: dict[tuple[str, int], str | None] = {}
        self.results: Counter[str] = Counter()  # how iterations ended
        self.ranks: dict[str, tuple[int, int, int]] = {}
        self.bases: dict[tuple[str, int], str] = {}
        self.two_bases: set[tuple[str, int]] = set()
        self.accepted: dict[tuple[tuple[str, int], str], float] = {}  # update -> when it was counted first
        self.ended_at: dict[tuple[str, int], float] = {}  # with a model
        self.died: dict[str, float] = {}
        self.tokens: set[tuple[str, object, str]] = set()  # who was told, in which part of it, what
        self.published = 0
        self.forgot = 0  # how often Redis has lost data
        self.forgot_at = float("-inf")
        self.flushed = 0  # how often it has done so with all connections standing
        self._starts = self._ledgers = self._instances = 0
        for name in self.hosts:
            self.start(name)
        while len(self.servers) < 4 and draw.random() < 0.3:
            self.start(draw.choice(list(self.hosts)))
        for i in range(DEVICES):
            self.spawn(None, self.device(f"c{i}"))

    # ---- what servers need

    def log(self, who: str, what: object) -> None:
        self.trace.append((self.now, who, what))

    def delay(self) -> float:
        """Seconds that a message takes: mostly little."""
        drawn = self.chance()
        return drawn * self.slowness * (1.0 if drawn < 0.98 else 10.0)

    @staticmethod
    def host_of(node: str) -> str:
        return node.partition(":")[0]

    def new_instance_name(self) -> str:
        self._instances += 1
        return f"i{self._instances}"

    def newest_checkpoint(self, host: str) -> tuple[int, str]:
        return self.hosts[host].checkpoints[-1]

    def save(self, host: str, number: int, digest: str) -> None:
        kept = [entry for entry in self.hosts[host].checkpoints if entry != (number, digest)]
        self.hosts[host].checkpoints = [*kept, (number, digest)][-3:]

    def files(self, host: str) -> list[LedgerFile]:
        owner = self.hosts[host]
        owner.files = [file for file in owner.files if file.there]
        return owner.files

    def new_ledger(self, server: Server, ledger_id: str = "") -> LedgerFile:
        self._ledgers += 1
        file = LedgerFile(ledger_id or f"L{self._ledgers}", server, self.policy.start_threshold)
        self.hosts[server.host].files.append(file)
        return file

    def removed(self, server: Server, file: LedgerFile, why: str) -> None:
        self.log(server.name, f"removes {file.id} of {file.epoch}: {why}")
        file.there = False
        if file.epoch is None:
            return
        part, number = self.store.at(file.epoch.instance), file.epoch.iteration
        status = part.status
        counted = {client for client, holder in part.uploads_of(number).items() if holder == file.id}
        copies = [
            other for host in self.hosts.values() for other in self.files(host.name) if other.id == file.id
        ]
        ended = status is None or status.number != number or server.iteration.number > number
        if self.forgot and server.follows:
            self.left.add((file.id, file.epoch.instance, number))
            return  # Redis forgot the other instance, and who had taken the ledger over in this one
        if why == "dropped" and self.flushed and not server.former.get(file.id):
            return  # adopted when Redis had forgotten its owner, then Redis stepped back to where it knows it
        if file.id in self.burnt:
            return  # a copy, and its new owner, are lost with their host
        if ended or file.epoch.instance != self.store.name or copies:
            return
        if counted & file.updates.keys() and part.owners.get(file.id) != REVOKED:
            raise Violation(f"{server.name} removes the last copy of counted updates, {file.id}: {why}")

    # ---- the shared state

    def request(self, server: Server, operation: str, words: tuple[Any, ...]) -> Promise:
        """Send a request on a server's connection; requests and replies keep their order."""
        promise = Promise()
        server.pending[promise] = None
        if not server.cut:
            server.sent = max(server.sent, self.now + self.delay())
            conn, run = server.conn, server.run_of_conn
            self.later(
                None, server.sent - self.now, self.execute, server, conn, run, operation, words, promise
            )
            if self.break_rate and self.chance() < self.break_rate:
                self.later(
                    None, self.chance() * 2 * (server.sent - self.now), self.break_connection, server, conn
                )
        return promise

    def execute(
        self, server: Server, conn: int, run: int, operation: str, words: tuple[Any, ...], promise: Promise
    ) -> None:
        broken = server.cut or server.conn != conn or not server.alive
        if not self.store_up or (broken and self.chance() < 0.5):
            return
        if run != self.store.run:
            return  # it was sent to a Redis that is no more
        result = self.apply(server, operation, words)
        if not broken:
            server.heard_back = max(server.heard_back, self.now + self.delay())
            self.later(server, server.heard_back - self.now, self.deliver, server, conn, promise, result)

    @staticmethod
    def deliver(server: Server, conn: int, promise: Promise, result: Any) -> None:
        if server.conn == conn and not server.cut and promise in server.pending:
            del server.pending[promise]
            promise.succeed(result)

    def break_connection(self, server: Server, conn: int | None = None) -> None:
        if not server.cut and conn in (None, server.conn):
            server.cut = True
            self.later(server, self.delay(), server.disconnected, server.conn)

    def told(self, word: str) -> None:
        """Redis publishes a notice; it reaches who is connected, mostly."""
        for server in self.servers.values():
            if not server.cut and self.chance() >= self.loss_rate:
                self.later(server, self.delay(), server.heard, word)

    def apply(self, server: Server | None, operation: str, words: tuple[Any, ...]) -> Any:
        """Take one atomic step of the shared state, and check it."""
        store = self.store
        if operation in AIMED and self.faults and not self.calm and self.chance() < self.aim:
            self.later(None, self.chance() * 5 * self.slowness, self.harm, self.random.choice(self.likely))
        if operation == "read":
            return store.read(*words)
        if operation == "publish":
            return self.told(words[0])
        if operation in ("claim_instance", "raise_status", "new_instance"):
            result: Any = getattr(store, operation)(*words)
            if operation == "raise_status":
                self.log(server.name if server else "", ("raise_status", words[1].iteration, result))
                self.check_rank(words[0])
            return result
        instance, rest = words[0], words[1:]
        part = store.at(instance)
        if operation == "select_client":
            return store.select_client(instance, *rest)
        before = was = None
        if operation in CHANGES and part.status is not None:
            status = part.status
            before = (status.number, status.token, part.uploads_of(status.number))
            was, clients = replace(status), len(part.clients.get(status.number, ()))
        owner = part.owners.get(rest[0], "") if operation == "own_ledger" else ""
        holder = store if operation == "accept_upload" else part
        result = getattr(holder, operation)(*(words if holder is store else rest))
        if operation == "own_ledger" and result and owner not in ("", rest[1], *rest[2:]):
            raise Violation(f"{rest} took a ledger from {owner}")
        if operation == "rebase":
            self.results[f"rebase: {result}"] += 1
        if operation in CHANGES:
            self.log(server.name if server else "operator", (operation, *words, "->", result))
            self.check_rank(instance)
            if before is not None and was is not None:
                self.check_answer(operation, rest, was, clients, result)
            if operation == "disable" and server is not None and result == "disabled":
                self.results["disabled again, as it was marked when a server looked"] += 1
            if operation == "restore_clients":
                counted_before = len(part.uploads.get(rest[0], ())) - result[1]
                made = was is not None and was.phase is Phase.CANDIDATE and counted_before >= was.updates
                if made and result[0] == "restored" and result[1]:
                    raise Violation(f"{rest} was taken back beside a model that was whole")
                self.heard_again(part, instance, rest[0], rest[1])
            if result and before is not None and server is not None:
                self.check_change(server, operation, instance, rest, part, *before)
        elif operation == "accept_upload" and result[0] == "accepted":
            if not part.is_alive(rest[6]) or part.owners.get(rest[5]) != rest[6]:
                raise Violation(f"{rest} was accepted without a lease or a ledger")
            self.accepted.setdefault(((instance, rest[0]), client_key(rest[3])), self.now)
            self.log(server.name if server else "", (operation, *words, "->", result))
            if result[1] > self.policy.update_threshold and not self.forgot:
                raise Violation("counted beyond the quorum")
        return result

    def heard_again(self, part: SharedState, instance: str, number: int, ledger_id: str) -> None:
        """Redis was told what is in a ledger."""
        for client, holder in part.uploads_of(number).items():
            update = ((instance, number), client)
            if holder == ledger_id and update in self.forgotten:
                del self.forgotten[update]
                self.restored[update] = self.now

    # ---- what must hold

    def check_answer(
        self, operation: str, words: tuple[Any, ...], before: Status, clients: int, result: Any
    ) -> None:
        """What a script may say in a state, where nothing else would notice at once."""
        wrong = False
        if operation == "claim_reduction" and result is not None:
            wrong = before.phase is Phase.COLLECTING or before.token != words[2]
        if operation == "rebase" and result == "rebased":
            wrong = clients > 0 or before.phase is not Phase.COLLECTING
        if wrong:
            raise Violation(f"{operation} {words} -> {result} in {before}, {clients} clients")

    def check_rank(self, instance: str) -> None:
        status = self.store.at(instance).status
        if status is not None:
            if status.rank < self.ranks.get(instance, (0, 0, 0)):
                raise Violation(f"the shared state went back from {self.ranks[instance]} to {status.rank}")
            self.ranks[instance] = status.rank

    def check_change(
        self,
        server: Server,
        operation: str,
        instance: str,
        words: tuple[Any, ...],
        part: SharedState,
        number: int,
        token: str,
        uploads: dict[str, str],
    ) -> None:
        mine = token.partition(":")[2] == server.name
        if operation == "record_model" and not mine:
            raise Violation(f"{server.name} recorded a candidate, the token is {token}")
        if operation == "seal" and len(uploads) < self.policy.update_threshold:
            raise Violation(f"{server.name} sealed below the quorum: {uploads}")
        if operation == "reopen":
            self.revoked.update(words[4])
        if operation == "advance":
            success, result, base = words[3], words[4], words[7] if len(words) > 7 else ""
            key = (instance, number)
            if key in self.ended and not self.forgot:
                raise Violation(f"{key} ended twice")
            self.results[result.partition(", current")[0]] += 1
            if not success:
                self.ended[key] = None
                if result == status_lost(number) and self.hasty(server):
                    raise Violation(f"{server.name} gives up an iteration in doubt")
                return
            if not mine:
                raise Violation(f"{server.name} published, the token is {token}")
            if len(self.contents[base].updates) < self.policy.update_threshold:
                raise Violation(f"{server.name} published below the quorum")
            self.published += 1
            self.ended[key] = base
            self.ended_at[key] = self.now
            updates = self.contents[base].updates
            self.check_published(key, {client_key(update.client) for update in updates}, uploads, base)
            for acked, ledger in self.acked.get(key, {}).values():
                self.check_kept(key, acked, ledger)

    def check_published(
        self, key: tuple[str, int], summed: set[str], uploads: dict[str, str], base: str
    ) -> None:
        """A model holds what is counted; but for what Redis forgot, or heard of again, since it was being made."""
        made = self.made[base]
        for client in uploads.keys() - summed:
            if self.restored.get((key, client), made.at - 1.0) < made.at:
                raise Violation(f"{client} of {uploads} is not in the model of {key}")
            self.excuses["brought back while the model was being made"] += 1
        for client in summed - uploads.keys():
            if self.forgotten.get((key, client), ("", made.at - 1.0))[1] < made.at:
                raise Violation(f"{client} is in the model of {key}, counted is {uploads}")

    def hasty(self, server: Server) -> bool:
        """Whether a server does not wait for the others to bring back what Redis has forgotten."""
        others = [s for s in self.servers.values() if s.instance == server.instance and not s.paused]
        witnesses = {s.name for s in others if s.joined_at < self.forgot_at}
        late = self.now - self.forgot_at >= DOUBT_S
        back, _, _ = self.store.at(server.instance).roll(self.store.run)
        return server.name in witnesses and not late and bool(witnesses - back)

    def excuse(self, key: tuple[str, int], client: str, ledger_id: str, base: str) -> str:
        """Return why an acknowledged update may be missing in a model, "" if it may not.

        Either its ledger was given up by name. Or Redis forgot that it counts (R7), and nobody could tell it in time:
        the ledger was in nobody's hands, or its holder was out of reach of Redis and of the finaliser for LOSS_S, or
        the finaliser did not know that Redis had forgotten something, or did not know of the holder.
        """
        if ledger_id in self.revoked:
            return "given up"
        if self.forgot and (ledger_id, *key) in self.left:
            return "its server went to another instance and back"
        if self.forgot and self.accepted.get((key, client), 0.0) > self.ended_at[key]:
            return "counted after the iteration had ended, which Redis and all in reach had forgotten"
        if (key, client) not in self.forgotten:
            back = self.restored.get((key, client), float("-inf"))
            return "told while the model was being made" if back >= self.made[base].at else ""
        made, forgotten_at = self.made[base], self.forgotten[key, client][1]
        holder = made.hands.get(ledger_id)
        if forgotten_at > made.at:
            if self.accepted.get((key, client), 0.0) > made.at:
                return "counted after the model was made, then forgotten by Redis and all in reach"
            return "" if holder is not None else "forgotten after the model was made"
        if holder is None:
            return "in nobody's hands"
        if holder in made.asked or holder == made.by:
            return ""
        if made.at - forgotten_at >= LOSS_S:
            return "" if holder in made.ready else "holder silent for LOSS_S"
        if made.asked:
            return "holder unknown to the finaliser"
        return "" if made.since < forgotten_at else "finaliser came after the loss"

    def in_doubt(self) -> bool:
        """Whether Redis has lost data so lately that not everybody has brought back what it knows."""
        return self.now - self.forgot_at < 30.0

    def acknowledge(self, instance: str, update: Update, ledger_id: str) -> None:
        """A device was told that its update counts; devices do not know which instance they train for."""
        key = (instance, update.number)
        self.acked.setdefault(key, {})[client_key(update.client)] = (update, ledger_id)
        self.check_kept(key, update, ledger_id)

    def check_kept(self, key: tuple[str, int], update: Update, ledger_id: str) -> None:
        base, client = self.ended.get(key), client_key(update.client)
        if base is None or any(update.client == other.client for other in self.contents[base].updates):
            return
        why = self.excuse(key, client, ledger_id, base)
        if update.base != self.contents[base].base and self.split(*key):
            why = why or "trained from another model than the one that the iteration went on from"
        if not why:
            raise Violation(
                f"{update} was acknowledged ({ledger_id}) and is not in the model {base}, {self.made[base]}, "
                f"forgotten: {self.forgotten.get((key, client))}"
            )
        self.excuses[why] += 1

    def reduces(self, server: Server, asked: list[str]) -> Making:
        """A finaliser has asked the shared state which updates count."""
        ready = frozenset(s.name for s in self.servers.values() if self.is_ready(s))
        hands = {i: holder.name for holder in self.servers.values() for i in holder.in_hand}
        return Making(self.now, server.name, frozenset(asked), server.joined_at, hands, ready)

    def is_ready(self, server: Server) -> bool:
        """Whether a server could have told Redis long ago what it has."""
        return server.up and not server.paused and self.now - server.ready_at > 5.0

    def model_of(self, instance: str, previous: str, updates: list[Update], making: Making) -> str:
        """Return the digest of a sum."""
        if len({update.client for update in updates}) != len(updates):
            raise Violation(f"twice in one sum: {updates}")
        # Devices do not know instances, and numbers come again: only those of this one must have its base.
        ours = [update for update in updates if update.instance == instance]
        if len({update.number for update in updates}) != 1 or (
            any(u.base != previous for u in ours) and not self.split(instance, updates[0].number)
        ):
            raise Violation(f"a sum of different origins on {previous}: {updates}")
        model = Model(previous, frozenset(updates))
        digest = self.models.setdefault(model, f"m{len(self.models)}")
        self.contents[digest] = model
        self.made.setdefault(digest, making)
        return digest

    def split(self, instance: str, number: int) -> bool:
        """Whether an iteration was served with two bases: who knew of the first was out of reach when Redis forgot."""
        return bool(self.forgot) and (instance, number) in self.two_bases

    def serves(self, server: Server, number: int, digest: str) -> None:
        """A server puts a model in front."""
        self.log(server.name, f"serves {server.instance}/{number} with {digest}")
        expected = self.bases.setdefault((server.instance, number), digest)
        part = self.store.at(server.instance)
        if digest != expected:
            named = part.status.base if part.status is not None and part.status.number == number else None
            if digest != named and not self.in_doubt() and named is not None:
                raise Violation(
                    f"{server.name} serves {number} with {digest}, others with {expected}, it is {named}"
                )
            self.bases[server.instance, number] = digest
            self.two_bases.add((server.instance, number))

    def wiped(self, server: Server, file: LedgerFile, epoch: Epoch, came_back: bool) -> None:
        """A server begins an epoch with a ledger that has updates.

        One that left an instance for another does so, and one that joined it again: Redis went back from one instance
        to the one before.
        """
        assert file.epoch is not None
        if file.epoch.instance == epoch.instance and file.epoch != epoch:
            return  # its iteration is over, or has begun again with another model
        left = (file.id, file.epoch.instance, file.epoch.iteration)
        if file.epoch != epoch:
            self.left.add(left)
            return
        status = self.store.at(server.instance).status
        held = self.store.at(server.instance).uploads_of(status.number) if status is not None else {}
        if came_back and self.forgot:
            self.left.add(left)
        elif any(holder == file.id for holder in held.values()):
            raise Violation(f"{server.name} forgets counted updates of {file.epoch}")

    def judged(self, server: Server, lost: tuple[str, ...], impatient: bool) -> None:
        """A server gives ledgers up."""
        self.log(server.name, f"gives up {lost}, impatient: {impatient}")
        if impatient:
            return
        if self.now < server.doubt_until and not set(lost) <= server.adopted.keys():
            raise Violation(f"{server.name} gives up {lost} in doubt")
        part = self.store.at(server.instance)
        for ledger_id in lost:
            died = self.died.get(part.owners.get(ledger_id, ""), float("-inf"))
            if ledger_id not in server.adopted and self.now - died < LOSS_S:
                raise Violation(
                    f"{server.name} gives up {ledger_id} {self.now - died} s after its owner died"
                )
            owner = self.servers.get(part.owners.get(ledger_id, ""))
            if owner is not None and not owner.paused and not self.in_doubt():
                file = owner.own if owner.own is not None and owner.own.id == ledger_id else None
                file = file or (owner.taken[ledger_id][1] if ledger_id in owner.taken else None)
                cut = frozenset((owner.host, server.host)) in self.partitions
                back = (
                    part.leases.get(owner.name, 0.0) - HEARTBEAT_TTL_S > self.now - 3.0
                )  # while it was being asked
                if file is not None and not cut and owner.up and part.is_alive(owner.name) and not back:
                    raise Violation(f"{server.name} gives up {ledger_id}, which {owner.name} has")

    def fell_short(self, server: Server, ledgers: tuple[str, ...]) -> None:
        """A finaliser has read ledgers whose holders have fewer updates than are counted in them."""
        place = (server.instance, server.iteration.number)
        if not all((ledger_id, *place) in self.left for ledger_id in ledgers):
            raise Violation(f"{server.name} finds fewer updates than were counted in {ledgers}")

    def failed_reduction(self, server: Server, why: str) -> None:
        self.log(server.name, f"fails the iteration: {why}")
        self.results["reduction: " + why] += 1

    def claimed(self, server: Server, part: object, token: str) -> None:
        """A server was told that it is the finaliser."""
        known = (server.name, part, token) in self.tokens
        if known and not self.flushed:  # who has not noticed that yet has not told its number
            raise Violation(f"the token {token} came twice")
        self.tokens.add((server.name, part, token))

    def brought_back(self, server: Server, losses: int) -> None:
        """A server has told Redis what it knows; meanwhile Redis may have lost it again."""
        status = self.store.at(server.instance).status
        current = self.store.name == server.instance and losses == self.forgot
        if current and status is not None and status.rank < server.iteration.rank:
            raise Violation(f"{server.name} knows {server.iteration.rank}, Redis {status.rank}")

    # ---- peers

    def message(
        self, sender: Server, peer: str, command: str, words: tuple[Any, ...], timeout: float
    ) -> Promise:
        """Send a request to a peer."""
        promise = Promise()
        self.later(sender, timeout, promise.fail, PeerGone(f"{peer} is silent"))
        host = self.hosts[self.host_of(peer)]
        if not self.cut_off(sender, host) and self.chance() >= self.loss_rate:
            target = self.servers.get(peer)
            heirs = [s for s in self.servers.values() if address_of(s.name) == address_of(peer)]
            if target is None and heirs:
                error = Replaced(f"{peer} is replaced by {heirs[0].name}")
                self.later(heirs[0], self.delay(), self.later, sender, self.delay(), promise.fail, error)
            elif target is None:
                self.later(sender, self.delay(), promise.fail, Refused(peer))
            else:
                self.later(target, self.delay(), self.arrive, sender, target, command, words, promise)
        return promise

    def cut_off(self, sender: Server, host: Host) -> bool:
        return not host.up or frozenset((sender.host, host.name)) in self.partitions

    def arrive(
        self, sender: Server, target: Server, command: str, words: tuple[Any, ...], promise: Promise
    ) -> None:
        self.spawn(target, self.answer(sender, target, command, words, promise))

    async def answer(
        self, sender: Server, target: Server, command: str, words: tuple[Any, ...], promise: Promise
    ) -> None:
        failed: Exception | None = None
        result = None
        try:
            if sender.name not in target.others and sender.name not in await target.refresh_others():
                raise PeerGone("not registered")
            result = await getattr(target, command)(sender.name, *words)
        except (Lost, PeerGone, Moved) as error:
            failed = Answered(f"{target.name} refuses: {error!r}")
        if not self.cut_off(sender, self.hosts[target.host]) and self.chance() >= self.loss_rate:
            if failed is None:
                self.later(sender, self.delay(), promise.succeed, result)
            else:
                self.later(sender, self.delay(), promise.fail, failed)

    # ---- devices

    async def device(self, fl_id: str) -> None:
        """Take part again and again, each time at another server; a lost reply is asked for again."""
        while True:
            await pause(self.chance() * (1.0 if self.calm else 2.0))
            place = await self.ask_device(lambda server: server.start_fl_job(fl_id))
            if place is None or (not self.calm and self.chance() < 0.1):
                continue
            await pause(self.chance() * 0.5)
            instance, number, base = place
            update = Update(instance, number, fl_id, base)
            for _ in range(4):
                if await self.ask_device(lambda server: server.update_model(update)):  # noqa: B023
                    break
                await pause(self.chance())

    async def ask_device(self, question: Any) -> Any:
        """Ask a server that listens; None if no answer comes."""
        listening = [s for s in self.servers.values() if not s.stopping]
        if not listening:
            return None
        server, promise = self.random.choice(listening), Promise()

        async def answer() -> None:
            result = await question(server)
            if self.calm or self.chance() >= self.loss_rate:
                self.later(None, self.delay(), promise.succeed, result)

        self.later(server, self.delay(), lambda: self.spawn(server, answer()))
        self.later(None, 10.0 if self.calm else self.impatience, promise.succeed, None)
        return await wait(promise)

    # ---- what goes wrong

    def start(self, host: str) -> None:
        self._starts += 1
        taken = {address_of(server) for server in self.servers}
        port = next(n for n in range(len(taken) + 1) if f"{host}:{n}" not in taken)
        name = f"{host}:{port}#{self._starts}"
        self.servers[name] = Server(self, host, name)
        self.log(name, "starts")

    def kill(self, server: Server) -> None:
        self.log(server.name, "dies")
        server.alive = False
        self.died[server.name] = self.now
        self.servers.pop(server.name, None)
        self.later(None, 0.0, self.abandon, server)
        for file in self.files(server.host):
            if file.lock is server:
                file.lock = None

    def leave(self, server: Server) -> None:
        self.spawn(server, server.stop())

    def restart_later(self, host: str, seconds: float) -> None:
        self.later(None, seconds, self.restart, host)

    def restart(self, host: str) -> None:
        if len(self.servers) < 4:
            self.hosts[host].up = True
            self.start(host)

    def lose_host(self, host: str) -> None:
        for server in [s for s in self.servers.values() if s.host == host]:
            self.kill(server)
        self.log(host, "is lost")
        self.hosts[host].up = False
        for file in self.files(host):
            file.there = False
            self.burnt.add(file.id)
        status = self.store.at(self.store.name).status
        others = [{digest for _, digest in h.checkpoints} for h in self.hosts.values() if h.name != host]
        copied = status is None or any(status.base in checkpoints for checkpoints in others)
        if self.chance() < 0.3 and (copied or self.every_copy_may_be_lost):
            self.hosts[host].checkpoints = [(0, INITIAL)]

    def forget(self, replica: Store, quietly: bool = False) -> None:
        """Redis goes on with what a replica has; quietly: as the same run, and all connections stand."""
        self.log("Redis", f"loses writes, is at {replica.at(replica.name).status}")
        before = self.store
        replica.run = self.store.run + (not quietly)
        self.store = replica
        self.ranks.clear()
        self.forgot, self.forgot_at, self.flushed = self.forgot + 1, self.now, self.flushed + quietly
        for instance, part in before.instances.items():
            for number, uploads in part.uploads.items():
                kept = replica.at(instance).uploads_of(number)
                for client, ledger in uploads.items():
                    if kept.get(client) != ledger:
                        self.forgotten[(instance, number), client] = (ledger, self.now)
        for key in list(self.ended):  # what nobody remembers to have ended comes again
            status = replica.at(key[0]).status
            known = [s.iteration.number for s in self.servers.values() if s.instance == key[0]]
            if key[1] >= max(known, default=0 if status is None else status.number):
                del self.ended[key]
        for server in self.servers.values():
            if not quietly:
                self.break_connection(server)

    def stop_store(self, anew: bool) -> None:
        self.log("Redis", "is away")
        self.store_up = False
        for server in self.servers.values():
            self.break_connection(server)
        self.later(None, 0.2 + self.chance() * 12, self.start_store, anew)

    def start_store(self, anew: bool) -> None:
        self.log("Redis", "is there again")
        self.store_up = True
        if anew:
            self.store.run += 1

    async def nemesis(self, until: float) -> None:
        """Do harm until a moment."""
        draw = self.random
        while self.likely:
            await pause(draw.expovariate(1 / self.pace))
            if self.now >= until:
                return
            self.harm(draw.choice(self.likely))

    def victim(self) -> Server | None:
        """Return a server, often the finaliser."""
        servers = [server for server in self.servers.values() if not server.stopping]
        status = self.store.at(self.store.name).status
        finaliser = "" if status is None else status.token.partition(":")[2]
        holders = [server for server in servers if server.adopted or (server.own and server.own.updates)]
        chosen = [server for server in servers if server.name == finaliser] or holders
        return self.random.choice(chosen if chosen and self.chance() < 0.5 else servers) if servers else None

    def harm(self, fault: str) -> None:
        draw = self.random
        if self.calm or (fault in RARE and draw.random() < 0.5):
            return
        if draw.random() < self.company:
            self.later(
                None, draw.choice((0.1, 1.0, 10.0)) * draw.random(), self.harm, draw.choice(self.likely)
            )
        server = self.victim()
        host = draw.choice(list(self.hosts))
        instance = self.store.name
        part = self.store.at(instance)
        match fault:
            case "break_connection" if server:
                if draw.random() < 0.3:
                    server.barred_until = self.now + 20.0 * draw.random()
                self.break_connection(server)
            case "kill" if server:
                self.kill(server)
                if draw.random() < 0.8:
                    self.restart_later(server.host, draw.choice((0.3, 2.0, 12.0, 25.0)) * draw.random())
            case "pause" if server and not server.paused:
                self.log(server.name, "is paused")
                server.paused = True
                self.later(None, draw.choice((1.0, 5.0, 40.0)) * draw.random(), self.wake, server)
            case "host_lost":
                self.lose_host(host)
                self.restart_later(host, 30.0 * draw.random())
            case "stop" if server and not server.paused:
                self.log(server.name, "is stopped")
                self.spawn(server, server.quiet(server.stop()))
                if draw.random() < 0.8:
                    self.restart_later(server.host, 15.0 * draw.random())
            case "start":
                self.restart(host)
            case "partition" if len(self.hosts) > 1:
                pair = frozenset(draw.sample(list(self.hosts), 2))
                self.log("network", f"cut between {sorted(pair)}")
                self.partitions.add(pair)
                self.later(None, draw.choice((3.0, 30.0)) * draw.random(), self.partitions.discard, pair)
            case "store_down" if self.store_up:
                self.stop_store(draw.random() < 0.5)
            case "step_back" if self.store_up:
                self.later(None, draw.choice((0.1, 1.0, 4.0)) * draw.random(), self.forget, self.store.copy())
            case "wipe" if self.store_up:
                self.forget(Store(self.store.clock, self.store.told))
            case "flush" if self.store_up:
                self.forget(Store(self.store.clock, self.store.told), quietly=True)
            case "disable" if instance:
                self.apply(None, "disable", (instance,))
                self.later(None, draw.choice((0.5, 10.0)) * draw.random(), self.enable)
            case "mark" if part.status is not None and part.status.running is RunningState.RUNNING:
                self.log("operator", "marks the job as disabled")
                part.status.running = RunningState.DISABLE
                enable = draw.choice((self.enable, self.enable_plainly))
                self.later(None, draw.choice((0.5, 10.0)) * draw.random(), enable)
            case "new_instance" if instance and part.status is not None:
                self.log("operator", "makes a new instance")
                self.store.new_instance(instance, self.new_instance_name())

    def enable(self) -> None:
        if self.store.name:
            self.apply(None, "enable", (self.store.name, self.policy.last_iteration))
            self.log("operator", "enables the job")

    def enable_plainly(self) -> None:
        """As somebody does who knows only the protocol's fields."""
        status = self.store.at(self.store.name).status
        if status is not None and status.running is RunningState.DISABLE:
            status.running = RunningState.RUNNING
            self.log("operator", "writes that the job runs")

    def wake(self, server: Server) -> None:
        if server.alive and server.paused:
            self.log(server.name, "goes on")
            server.ready_at = self.now
            self.resume(server)

    # ---- a whole history

    def play(self) -> None:
        """Faults for a while, then none; the job must go on.

        Raises:
            Violation: something happened that never may.
        """
        until = self.random.choice((20.0, 60.0, 100.0))
        self.spawn(None, self.nemesis(until))
        try:
            self.run(until)
            self.heal()
            self.goes_on(False)
            self.goes_on(True)
            self.run(self.now + 5.0)
            self.check_agreement()
        finally:
            self.end()

    def end(self) -> None:
        """End whatever is under way."""
        for process in list(self.tasks):
            if process is not None:
                process.alive = False
            self.abandon(process)

    def heal(self) -> None:
        self.log("", "from here on nothing breaks")
        self.calm, self.break_rate, self.loss_rate = True, 0.0, 0.0
        self.run(self.now + 41.0)  # what was to come back has
        self.partitions.clear()
        for host in self.hosts.values():
            host.up = True
            if not any(s.host == host.name for s in self.servers.values()):
                self.start(host.name)
        self.run(self.now + 5.0)
        if self.store.name:
            self.apply(None, "enable", (self.store.name, self.policy.last_iteration))

    def check_agreement(self) -> None:
        """What every server shows of itself agrees."""
        for server in self.servers.values():
            self.check_server(server)

    def check_server(self, server: Server) -> None:
        """Who serves and does nothing else has the model that is named, and takes updates of that attempt."""
        if server.busy or not server.serving or server.stopping:
            return
        if server.attempt != server.iteration.attempt:
            raise Violation(f"{server.name} takes updates of attempt {server.attempt}: {server.iteration}")
        if server.iteration.base and server.models.newest_digest != server.iteration.base:
            raise Violation(f"{server.name} serves {server.models.newest_digest}: {server.iteration}")

    def goes_on(self, with_model: bool) -> None:
        """See that the current iteration ends, or that one makes a model."""
        before, published = self.standing(), self.published

        def done() -> bool:
            status = self.store.at(self.store.name).status
            if status is not None and status.running is RunningState.FINISH:
                return True
            return self.published > published if with_model else self.standing() > before

        if not self.run(self.now + PATIENCE_S * (2 if with_model else 1), done):
            raise Violation(f"the job hangs: {self.store.at(self.store.name).status}")

    def standing(self) -> int:
        status = self.store.at(self.store.name).status
        return 0 if status is None else status.number

    def story(self, last: int = 60) -> str:
        """Return the last actions, to be printed."""
        lines = [f"{at:8.3f} {who:7} {what}" for at, who, what in list(self.trace)[-last:]]
        return "\n".join([f"seed {self.seed}, {sorted(self.faults)}, {self.policy}", *lines])


def play(seed: int) -> Simulation:
    """Play one history; a failure tells the seed and what happened last."""
    simulation = Simulation(seed)
    try:
        simulation.play()
    except (Violation, Bug, WrongPhase, AssertionError) as failure:
        raise Violation(f"{type(failure).__name__}: {failure}\n{simulation.story()}") from failure
    return simulation


def soak(seconds: float, first: int) -> dict[str, list[int]]:
    """Play histories for so long; print what was reached, return the seeds of each kind of failure."""
    begun, seed, steps, models = time.process_time(), first, 0, 0
    failures: dict[str, list[int]] = {}
    results: Counter[str] = Counter()
    excuses: Counter[str] = Counter()
    while time.process_time() - begun < seconds:
        simulation = Simulation(seed)
        try:
            simulation.play()
        except Exception as failure:
            kind = re.sub(r"[0-9]+", "N", f"{type(failure).__name__}: {failure}")[:90]
            failures.setdefault(kind, []).append(seed)
        seed, steps, models = seed + 1, steps + simulation.steps, models + simulation.published
        results.update(simulation.results)
        excuses.update(simulation.excuses)
    passed = time.process_time() - begun
    print(f"{seed - first} histories, {steps} steps, {steps / passed:.0f} a second, {models} models")
    for result, count in results.most_common():
        print(f"{count:8} {result}")
    for excuse, count in excuses.most_common():
        print(f"{count:8} excused: {excuse}")
    for kind, seeds in sorted(failures.items(), key=lambda item: -len(item[1])):
        print(f"{len(seeds):8} {kind} {seeds[:8]}")
    return failures


def main() -> None:
    """Play what the command line says."""
    if sys.argv[1] == "-":
        sys.exit(1 if soak(float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0) else 0)
    simulation = Simulation(int(sys.argv[1]))
    try:
        simulation.play()
    finally:
        print(simulation.story(int(sys.argv[2]) if len(sys.argv) > 2 else 100))


if __name__ == "__main__":
    main()
