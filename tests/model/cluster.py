"""The shared state of a job in Python: what the scripts of ``fedcore.store`` say in Lua.

tests/integration/test_store_model.py holds the two against each other. Every method is one atomic step and is named
after its script. ``SharedState`` is one instance of a job, ``Store`` all of Redis: the instances, the name of the
current one, and what Redis may do to them (lose its newest writes, or everything).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from fedcore.core.client_key import client_key
from fedcore.core.iteration import MADE, Iteration, Phase
from fedcore.core.job import RunningState
from fedcore.store.keys import DOUBT_S, FOUNDERS, HEARTBEAT_TTL_S, REVOKED

key_of = lru_cache(client_key)
RUNNING = RunningState.RUNNING
Run = int | str  # of Redis: a number in the simulation, a run id for servers in memory


@dataclass(slots=True)
class Status:
    """The status hash; moments by the clock of the shared state."""

    number: int
    attempt: int = 1
    phase: Phase = Phase.COLLECTING
    running: RunningState = RUNNING
    success: bool = True
    result: str = ""
    token: str = ""
    digest: str = ""
    base: str = ""
    fence: int = 0
    epoch: int = 0
    lost: int = 0
    disabled: bool = False
    started: float | None = None
    first_upload: float | None = None
    sealed: float | None = None
    updates: int = 0
    aggregate: str = ""
    metrics: tuple[float, float] | None = None
    filled: float | None = None
    typical: float | None = None
    run: str | None = None  # of Redis, "" if that has lost some of the iteration

    @property
    def rank(self) -> tuple[int, int, int]:
        """How far the iteration has come, as ``core.iteration.Iteration.rank``."""
        return self.number, self.attempt, _RANKS[self.phase]

    def next(self, success: bool, result: str) -> None:
        """Begin the next iteration; what belongs to the one before is forgotten."""
        self.number, self.success, self.result = self.number + 1, success, result
        self.attempt, self.phase = 1, Phase.COLLECTING
        self.token = self.digest = ""
        self.started = self.first_upload = self.sealed = self.filled = None
        self.lost, self.updates, self.aggregate, self.metrics, self.run = 0, 0, "", None, None


_RANKS = {phase: rank for rank, phase in enumerate(Phase)}
_FIELDS = tuple(field.name for field in fields(Status))


@dataclass(frozen=True)
class Reserve:
    """How a refused client's place is kept: moments relative to now, in the unit of the clock."""

    returns: float
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What ``read`` tells: ``fedcore.store.cluster_state.Snapshot`` with moments instead of ages."""

    iteration: Iteration
    started: float | None
    first_upload: float | None
    sealed: float | None
    fence: int
    epoch: int
    success: bool
    result: str
    typical: float | None = None
    run: str = ""
    rounds: tuple[tuple[str, int, float], ...] = ()


class SharedState:
    """What Redis holds of one instance of a job.

    Attributes:
        owners: ledger id -> node id, or "revoked".
        given_up: all ledgers that were ever revoked.
        leases: node id -> when its heartbeat runs out.
        completed: iteration -> when its quorum was reached; only tests look at it.
        told: called with each word that goes over the channel of the job's changes.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        told: Callable[[str], object] = lambda word: None,
        lease: float = 0.0,
    ) -> None:
        """Begin empty.

        Args:
            clock: now, in any unit.
            told: hears the notices.
            lease: lifetime of a heartbeat in that unit; 0: for ever, until the node leaves.
        """
        self.clock = clock
        self.told = told
        self.lease = lease or float("inf")
        self.status: Status | None = None
        self.clients: dict[int, dict[str, str]] = {}
        self.uploads: dict[int, dict[str, str]] = {}
        self.waiting: dict[str, float] = {}
        self.owners: dict[str, str] = {}
        self.given_up: set[str] = set()
        self.leases: dict[str, float] = {}
        self.completed: dict[int, float] = {}
        self.listed: float | None = None  # since when servers have been on the list
        self.awaited: dict[Run, dict[str, float]] = {}  # run of Redis -> who is awaited, since when
        # of cipher rounds, by iteration: how many requests since when, and what was gathered, by client
        self.rounds: dict[int, dict[str, tuple[int, float]]] = {}
        self.gathered: dict[tuple[int, str], dict[str, bytes]] = {}

    def copy(self) -> SharedState:
        """Return the same state, apart."""
        other = copy.copy(self)
        other.status = None if self.status is None else replace(self.status)
        other.clients = {number: dict(clients) for number, clients in self.clients.items()}
        other.uploads = {number: dict(uploads) for number, uploads in self.uploads.items()}
        for name in ("waiting", "owners", "leases", "completed"):
            setattr(other, name, dict(getattr(self, name)))
        other.given_up = set(self.given_up)
        other.awaited = {run: dict(nodes) for run, nodes in self.awaited.items()}
        other.rounds = {number: dict(rounds) for number, rounds in self.rounds.items()}
        other.gathered = {place: dict(held) for place, held in self.gathered.items()}
        return other

    # ---- the whole

    def create_status(
        self,
        number: int,
        success: bool,
        result: str,
        running: RunningState,
        base: str = "",
        epoch: int = 0,
    ) -> bool:
        if self.status is not None:
            return False
        self.status = Status(number, success=success, result=result, running=running, base=base, epoch=epoch)
        return True

    def read_status(self) -> Seen | None:
        """The part of read_status.lua that is about this instance."""
        s = self.status
        if s is None:
            return None
        iteration = Iteration(
            s.number,
            s.attempt,
            s.phase,
            s.running,
            len(self.clients.get(s.number, ())),
            len(self.uploads.get(s.number, ())),
            None,
            None,
            s.token,
            s.aggregate,
            s.digest,
            s.base,
            s.metrics,
            s.lost,
            s.disabled,
        )
        times = (s.started, s.first_upload, s.sealed)
        rounds = tuple((name, *known) for name, known in self.rounds.get(s.number, {}).items())
        rest = (s.fence, s.epoch, s.success, s.result, s.typical, s.run or "", rounds)
        return Seen(iteration, *times, *rest)

    # ---- devices

    def select_client(
        self,
        number: int,
        fl_id: str,
        meta: str,
        places: int,
        fit: bool,
        reserve: Reserve,
        run: Run = "",
        hold_off: float = 0.0,
    ) -> tuple[str, int]:
        status, client = self.status, key_of(fl_id)
        if status is None:
            return "missing", 0
        if status.number != number or status.running is not RUNNING:
            return "closed", status.number
        if self.others_are_awaited(run, hold_off):
            return "awaited", 0
        clients = self.clients.setdefault(number, {})
        if client in clients:
            return ("uploaded" if client in self.uploads.get(number, ()) else "known"), 0
        if status.phase is not Phase.COLLECTING:
            return "closed", status.number
        now = self.clock()
        self.waiting = {name: due for name, due in self.waiting.items() if due > now - reserve.after}
        mine = client in self.waiting
        expected = sum(due <= now + reserve.before for due in self.waiting.values())
        if len(clients) >= places or (not mine and len(clients) + expected >= places):
            if mine or len(self.waiting) < 4 * places:
                self.waiting[client] = now + reserve.returns
            return ("reserved" if mine else "full"), len(clients)
        if not fit:
            return "unfit", len(clients)
        if not clients:
            status.started = now
            status.run = str(run) if status.run is None else status.run
        clients[client] = meta
        self.waiting.pop(client, None)
        if len(clients) >= places:
            status.filled = now
        return "selected", len(clients)

    def reserve_place(self, fl_id: str, places: int, returns: float, after: float) -> bool:
        now, client = self.clock(), key_of(fl_id)
        self.waiting = {name: due for name, due in self.waiting.items() if due > now - after}
        if client not in self.waiting and len(self.waiting) >= 4 * places:
            return False
        self.waiting[client] = now + returns
        return True

    def restore_waiting(self, number: int, waiting: Mapping[str, tuple[float, float]], places: int) -> int:
        now, restored = self.clock(), 0
        for client, (returns, _) in waiting.items():
            known = self.waiting.get(client)
            later = len(self.waiting) < 4 * places if known is None else known < now + returns
            if later and client not in self.clients.get(number, ()):
                self.waiting[client] = now + returns
                restored += known is None
        return restored

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
        again: bool = False,
        run: Run = "",
        hold_off: float = 0.0,
    ) -> tuple[str, int, str]:
        client = key_of(fl_id)
        holder = self.uploads.get(requested, {}).get(client)
        if holder is not None and (holder != ledger_id or requested != number):
            return "repeated", 0, holder
        if self.owners.get(ledger_id) != node_id:
            return "revoked", 0, ""
        if not self.is_alive(node_id):
            return "lapsed", 0, ""
        status = self.status
        if status is None:
            return "missing", 0, ""
        if status.number != number:
            return "closed", status.number, ""
        clients, uploads = self.clients.get(number, {}), self.uploads.setdefault(number, {})
        if holder is not None:
            return "accepted", len(uploads), clients[client]
        if status.attempt != attempt or status.running is not RUNNING:
            return "closed", status.number, ""
        if self.others_are_awaited(run, hold_off):
            return "awaited", 0, ""
        forgotten = again and status.phase in (Phase.SEALED, Phase.REDUCING)
        if len(uploads) >= quorum or not (status.phase is Phase.COLLECTING or forgotten):
            return "full", len(uploads), ""
        if client not in clients:
            return "unknown", len(uploads), ""
        if requested != number:
            return "other", number, ""
        if not fit:
            return "unfit", len(uploads), ""
        if not uploads:
            status.first_upload = self.clock()
        uploads[client] = ledger_id
        if len(uploads) == quorum:
            self.completed[number] = self.clock()
        return "accepted", len(uploads), clients[client]

    def others_are_awaited(self, run: Run, hold_off: float) -> bool:
        """others_are_awaited of shared.lua"""
        return any(
            self.clock() - since < hold_off for node, since in self.awaited.get(run, {}).items() if node
        )

    def await_nodes(self, run: Run, node_id: str, others: Iterable[str]) -> float:
        known = self.awaited.setdefault(run, {})
        for node in (node_id, *others):
            known.setdefault(node, self.clock())
        return known[node_id]

    def nodes_are_back(self, run: Run, node_id: str, nodes: Iterable[str], call: float | None = None) -> bool:
        known = self.awaited.setdefault(run, {})
        if call is not None and known.get(node_id) not in (call, float("-inf")):
            return False
        known.update(dict.fromkeys(nodes, float("-inf")))
        return True

    def roll(
        self, run: Run, doubt: float = DOUBT_S, lease: float = HEARTBEAT_TTL_S
    ) -> tuple[set[str], set[str], bool]:
        """read_awaited.lua: who is back, who is awaited, and whether all are on the list."""
        known = self.awaited.get(run, {})
        back = {node for node, since in known.items() if since == float("-inf")}
        awaited = {node for node, since in known.items() if self.clock() - since < doubt} - {FOUNDERS}
        return back, awaited, self.listed is not None and self.clock() - self.listed >= lease

    # ---- members and ledgers

    def heartbeat(self, node_id: str) -> None:
        self.listed = self.clock() if self.listed is None else self.listed
        self.leases[node_id] = self.clock() + self.lease

    def leave(self, node_id: str) -> None:
        """HDEL and DEL: a node takes itself off the list."""
        self.leases.pop(node_id, None)

    def is_alive(self, node_id: str) -> bool:
        """EXISTS of a heartbeat."""
        return self.leases.get(node_id, float("-inf")) > self.clock()

    def list_nodes(self) -> list[str]:
        return sorted(node for node in self.leases if self.is_alive(node))

    def own_ledger(self, ledger_id: str, node_id: str, before: str = "") -> bool:
        if self.owners.get(ledger_id, "") not in (before, node_id):
            return False
        self.owners[ledger_id] = node_id
        return True

    def ledger_owner(self, ledger_id: str) -> str:
        """HGET of the ledgers."""
        return self.owners.get(ledger_id, "")

    def ledgers(self) -> dict[str, str]:
        """HGETALL of the ledgers."""
        return dict(self.owners)

    def forget_ledger(self, ledger_id: str) -> None:
        """HDEL of the ledgers."""
        self.owners.pop(ledger_id, None)

    def counted(self, number: int, ledger_id: str, fl_ids: Sequence[str]) -> dict[str, str]:
        """Two HMGETs: what the clients declared whose update lies in this ledger."""
        uploads, clients = self.uploads.get(number, {}), self.clients.get(number, {})
        keys = {fl_id: key_of(fl_id) for fl_id in fl_ids}
        return {fl_id: clients[key] for fl_id, key in keys.items() if uploads.get(key) == ledger_id}

    def count_by_ledger(self, number: int) -> dict[str, int]:
        holders = list(self.uploads.get(number, {}).values())
        return {holder: holders.count(holder) for holder in holders}

    def uploads_of(self, number: int) -> dict[str, str]:
        """HGETALL of the uploads: client key -> ledger id."""
        return dict(self.uploads.get(number, ()))

    def restore_clients(
        self, number: int, ledger_id: str, node_id: str, clients: Mapping[str, str], base: str = ""
    ) -> tuple[str, int]:
        status = self.status
        mine = self.owners.get(ledger_id, node_id) == node_id
        word = ""
        whole = status is not None and len(self.uploads.get(number, ())) >= status.updates
        made = status is not None and status.phase in MADE and whole
        if status is None or status.number != number or made:
            word = "closed"
        elif base and status.base not in ("", base):
            word = "rebased"
        if word:
            counted = self.uploads.get(number, {})
            known = word == "rebased" or bool(counted)
            told = ledger_id and mine and known and ledger_id not in self.given_up
            return word, len(clients.keys() - counted.keys()) if told else 0
        if ledger_id:
            if not mine:
                return "revoked", 0
            self.owners[ledger_id] = node_id
        places, uploads, restored = (
            self.clients.setdefault(number, {}),
            self.uploads.setdefault(number, {}),
            0,
        )
        for client, meta in clients.items():
            if client not in places or (ledger_id and client not in uploads):
                status.run = ""
            places.setdefault(client, meta)
            if ledger_id and client not in uploads:
                uploads[client] = ledger_id
                restored += 1
        return "restored", restored

    # ---- the iteration

    def _stands(self, number: int, attempt: int, phase: Phase, token: str | None = None) -> Status | None:
        """Return the status if it is the one that the caller expects; None stands for any token."""
        s = self.status
        if s is None or (s.number, s.attempt, s.phase) != (number, attempt, phase):
            return None
        return s if token in (None, s.token) else None

    def seal(self, number: int, attempt: int, quorum: int) -> bool:
        status = self._stands(number, attempt, Phase.COLLECTING)
        if status is None or status.running is not RUNNING or len(self.uploads.get(number, ())) < quorum:
            return False
        status.phase, status.sealed = Phase.SEALED, self.clock()
        self.told("sealed")
        return True

    def record_model(
        self,
        number: int,
        attempt: int,
        token: str,
        digest: str,
        updates: int,
        phase: Phase = Phase.CANDIDATE,
        run: str = "",
    ) -> bool:
        status = self._stands(number, attempt, Phase.REDUCING, token)
        if phase is Phase.CANDIDATE:
            status = status or self._stands(number, attempt, Phase.UNMASKING, token)
        if status is None or status.running is not RUNNING or (run and run != status.run):
            return False
        if len(self.uploads.get(number, {})) != updates:
            return False
        status.phase, status.updates = phase, updates
        if phase is Phase.CANDIDATE:
            status.digest = digest
        else:
            status.aggregate = digest
            self.told(phase.value)
        return True

    def push_weight(
        self,
        number: int,
        attempt: int,
        aggregate: str,
        digest: str,
        run: Run = "",
        hold_off: float = 0.0,
    ) -> int:
        s = self.status
        if s is None or (s.number, s.attempt, s.running) != (number, attempt, RUNNING):
            return 0
        if s.phase is Phase.TRAINED and s.digest == digest:
            return 1
        if s.phase is not Phase.TRAINING or s.aggregate != aggregate:
            return 0
        if self.others_are_awaited(run, hold_off):
            return -1
        s.phase, s.digest = Phase.TRAINED, digest
        self.told("trained")
        return 1

    def push_metrics(self, number: int, attempt: int, loss: float, accuracy: float) -> bool:
        s = self.status
        if s is None or (s.number, s.attempt, s.running) != (number, attempt, RUNNING):
            return False
        if s.phase is Phase.CANDIDATE:
            return True
        if s.phase is not Phase.TRAINED:
            return False
        s.phase, s.metrics = Phase.CANDIDATE, (loss, accuracy)
        self.told("candidate")
        return True

    def claim_reduction(
        self, number: int, attempt: int, token: str, node_id: str
    ) -> tuple[str, Phase, str, str] | None:
        s = self.status
        if s is None or (s.number, s.attempt, s.running) != (number, attempt, RUNNING):
            return None
        if s.phase is Phase.COLLECTING or s.token != token:
            return None
        s.fence += 1
        s.token = f"{s.fence}:{node_id}"
        if s.phase is Phase.SEALED:
            s.phase = Phase.REDUCING
        return s.token, s.phase, s.aggregate, s.digest

    def reopen(
        self, number: int, attempt: int, phase: Phase, token: str, ledgers: Iterable[str]
    ) -> int | None:
        """reopen.lua; None where it answers {0, 0}."""
        status = self._stands(number, attempt, phase, token)
        if status is None or status.running is not RUNNING or phase is Phase.UNMASKING:
            return None
        gone = set(ledgers)
        self.owners.update(dict.fromkeys(gone, REVOKED))
        self.given_up |= gone
        uploads = self.uploads.get(number, {})
        lost = [client for client, holder in uploads.items() if holder in gone]
        members, freed = self.gathered.get((number, "exchangeKeys"), {}), False
        for client in lost:
            del uploads[client]
            if client not in members:
                freed |= self.clients.get(number, {}).pop(client, None) is not None
        if status.sealed is not None:
            stood = self.clock() - status.sealed
            status.started = None if status.started is None else status.started + stood
            status.first_upload = None if status.first_upload is None else status.first_upload + stood
        if freed:
            status.filled = None
        status.lost += len(lost)
        status.attempt, status.phase = attempt + 1, Phase.COLLECTING
        status.token = status.digest = status.aggregate = ""
        status.sealed, status.updates, status.metrics = None, 0, None
        self.told("reopened")
        return len(lost)

    def advance(
        self,
        number: int,
        attempt: int,
        phase: Phase,
        success: bool,
        result: str,
        finishes: bool,
        token: str = "",
        base: str = "",
    ) -> bool:
        status = self._stands(number, attempt, phase, token)
        if status is None:
            return False
        if success and status.filled is not None:
            status.typical = self.clock() - status.filled
        status.next(success, result)
        if finishes:
            status.running = RunningState.FINISH
        status.base = base or status.base
        self.owners = {ledger: owner for ledger, owner in self.owners.items() if owner != REVOKED}
        self.told("advanced")
        return True

    def rebase(self, number: int, before: str, after: str, result: str, finishes: bool) -> str:
        status = self.status
        if status is None or (status.number, status.base) != (number, before):
            return "other"
        status.base = after
        self.told("rebased")
        if not self.clients.get(number) and status.phase is Phase.COLLECTING:
            return "rebased"
        status.next(False, result)
        if finishes:
            status.running = RunningState.FINISH
        return "ended"

    def forget_interruption(self) -> None:
        """HDEL of the mark."""
        if self.status is not None:
            self.status.disabled = False

    def finish(self, number: int) -> bool:
        status = self.status
        if status is None or status.number != number:
            return False
        suspended = status.running is RunningState.DISABLE and status.disabled
        if status.running in (RunningState.FINISH, RunningState.STOP) or suspended:
            return False
        status.running = RunningState.FINISH
        self.told("finished")
        return True

    # ---- operators

    def disable(self) -> str:
        status = self.status
        if status is None:
            return "missing"
        if status.running in (RunningState.FINISH, RunningState.STOP):
            return "completed"
        if status.running is RunningState.DISABLE and status.disabled:
            return "already"
        word = "marked" if status.running is RunningState.DISABLE else "disabled"
        status.next(False, "Disable instance")
        status.running, status.disabled = RunningState.DISABLE, True
        self.told("disable")
        return word

    def enable(self, last_iteration: int) -> str:
        status = self.status
        if status is None:
            return "missing"
        if status.running in (RunningState.FINISH, RunningState.STOP):
            return "completed"
        if status.running is RUNNING:
            return "already"
        over = status.number > last_iteration
        status.running, status.disabled = (RunningState.FINISH if over else RUNNING), False
        self.told("enable")
        return "finished" if over else "enabled"

    # ---- after a loss

    def raise_status(self, known: Seen) -> str:
        """The part of raise_status.lua that is about this instance; moments of ``known`` by the same clock."""
        now, there = known.iteration, self.status
        if there is not None:
            there.fence = max(there.fence, known.fence)
            if there.rank >= now.rank:
                return "kept"
        self.status = Status(
            now.number,
            now.attempt,
            now.phase,
            now.running,
            known.success,
            known.result,
            now.token,
            now.digest,
            now.base,
            max(known.fence, 0 if there is None else there.fence),
            known.epoch,
            now.lost,
            now.interrupted,
            known.started,
            known.first_upload,
            known.sealed,
            now.uploaded if now.phase in MADE else 0,
            now.aggregate,
            now.metrics,
            typical=(None if there is None else there.typical) if known.typical is None else known.typical,
        )
        return "raised"


class Store:
    """All of Redis: the instances of one job.

    Attributes:
        name: of the job's current instance, "" if there is none.
        run: which run of Redis this is; every loss begins another.
    """

    def __init__(
        self, clock: Callable[[], float], told: Callable[[str], object], lease: float = HEARTBEAT_TTL_S
    ):
        self.clock, self.told, self.lease = clock, told, lease
        self.name = ""
        self.run = 1
        self.instances: dict[str, SharedState] = {}

    def at(self, instance: str) -> SharedState:
        """Return an instance's part, empty if nothing was ever written to it."""
        found = self.instances.get(instance)
        if found is None:
            found = self.instances[instance] = SharedState(self.clock, self.told, self.lease)
        return found

    def copy(self) -> Store:
        """Return the same state, apart: what a replica has."""
        other = copy.copy(self)
        other.instances = {name: part.copy() for name, part in self.instances.items()}
        return other

    def claim_instance(self, proposed: str) -> str:
        """SET NX and GET of the instance's name."""
        self.name = self.name or proposed
        return self.name

    def select_client(self, instance: str, *words: Any) -> tuple[str, int]:
        """select_client.lua"""
        return ("missing", 0) if self._elsewhere(instance) else self.at(instance).select_client(*words)

    def accept_upload(self, instance: str, *words: Any) -> tuple[str, int, str]:
        """accept_upload.lua"""
        return ("missing", 0, "") if self._elsewhere(instance) else self.at(instance).accept_upload(*words)

    def _elsewhere(self, instance: str) -> bool:
        return self.name not in ("", instance)

    def read(self, instance: str) -> tuple[str, Seen | None]:
        """read_status.lua"""
        return self.name, self.at(instance).read_status()

    def raise_status(self, instance: str, known: Seen) -> str:
        """raise_status.lua"""
        if self.name and self.name != instance:
            other = self.at(self.name).status
            if other is None or (-other.epoch, self.name) < (-known.epoch, instance):
                return "newer"
        self.name = instance
        return self.at(instance).raise_status(known)

    def new_instance(self, current: str, name: str) -> bool:
        """new_instance.lua"""
        if self.name != current or current == name or self.at(name).status is not None:
            return False
        before = self.at(current).status
        epoch, base, typical = (
            (0, "", None) if before is None else (before.epoch, before.base, before.typical)
        )
        self.at(name).status = Status(1, epoch=epoch + 1, base=base, typical=typical)
        self.name = name
        self.told("instance")
        return True
