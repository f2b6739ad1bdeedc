"""The real driver, ledgers, intake and device rounds of one server; Redis, clock and thread are simulated.

Ledgers are real files in a directory of the test, checkpoints are kept in memory. A request to Redis is first sent,
then executed, then answered; the connection may break at any of these moments. What is executed is
``cluster.SharedState``, which tests/integration/test_store_model.py holds against the scripts.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from memory_reactor import MemoryReactor
from model.cluster import Reserve, SharedState
from twisted.internet import defer

from fedcore.config import Settings
from fedcore.core.iteration import Phase, Policy, status_lost
from fedcore.core.job import RunningState
from fedcore.errors import StoreUnavailable
from fedcore.ledger.files import MappedFile
from fedcore.ledger.layout import Shape
from fedcore.ledger.ledger import Slot
from fedcore.models.history import ModelHistory
from fedcore.observe.metrics import ServerMetrics
from fedcore.services.client_api import ClientApi
from fedcore.services.heartbeat import Heartbeat
from fedcore.services.iteration_driver import IterationDriver, IterationEnd, Job
from fedcore.services.ledgers import Ledgers
from fedcore.services.update_intake import UpdateIntake
from fedcore.store.redis import Argument
from fedcore.wire import codec
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.image import ImageTemplate, ModelImage
from fedcore.wire.messages import FeatureMap, RequestFLJob, RequestUpdateModel, ResponseFLJob

CLIENTS = [f"c{i}" for i in range(6)]
LAYOUT = Layout((Weight("who", (len(CLIENTS),)),))
TEMPLATE = ImageTemplate(LAYOUT)
LEASE_MS = 10_000
SLOTS = 8
BODY = 1024  # bytes; more than an update of this model takes
HOLD_S = 8.0


def updates_in(model: ModelImage) -> frozenset[str]:
    """Each client's update is a vector of its own, so the mean tells whose updates are in it."""
    return frozenset(CLIENTS[i] for i in np.flatnonzero(model.arrays["who"]))


# ---- Redis


class RecordedState(SharedState):
    """The shared state of one job, and how its iterations ended.

    Attributes:
        names: plain keys.
        beats: node id -> when its heart last beat.
        lost: whether the data were lost and nobody has written a status since.
    """

    def __init__(self, clock: Callable[[], float], on_end: Callable[[int, bool, str], None]) -> None:
        super().__init__(clock)
        self.names: dict[str, str] = {}
        self.beats: dict[str, float] = {}
        self.lost = False
        self._on_end = on_end

    def heartbeat(self, node_id: str) -> None:
        self.beats[node_id] = self.clock()

    def expire(self) -> None:
        """Let leases run out."""
        self.leases = {node for node, beat in self.beats.items() if self.clock() < beat + LEASE_MS}

    def create(self, number: int, success: bool, result: str, running: RunningState) -> bool:
        done = super().create(number, success, result, running)
        if done and self.lost and result == status_lost(number - 1):
            self._on_end(number - 1, success, result)
        self.lost = self.lost and not done
        return done

    def advance(
        self, number: int, attempt: int, phase: Phase, success: bool, result: str, finishes: bool
    ) -> bool:
        done = super().advance(number, attempt, phase, success, result, finishes)
        if done:
            self._on_end(number, success, result)
        return done

    def wipe(self) -> None:
        """Lose everything."""
        self.status, self.lost = None, True
        for kept in (self.clients, self.uploads, self.waiting, self.names, self.owners, self.beats):
            kept.clear()  # type: ignore[attr-defined]

    def run(self, name: str, keys: Sequence[str], words: Sequence[Argument]) -> Any:
        """Run a script and answer as Redis does."""
        self.expire()
        match name:
            case "read_status":
                return self._read()
            case "create_status":
                _, number, success, result, running = words
                return int(self.create(int(number), success == 1, str(result), RunningState(int(running))))
            case "select_client":
                number, fl_id, meta, places, fit, _, *reserve = words
                word, count = self.select_client(
                    int(number),
                    str(fl_id),
                    str(meta),
                    int(places),
                    fit == 1,
                    Reserve(*(float(part) for part in reserve)),
                )
                return [word.encode(), count]
            case "accept_upload":
                number, attempt, requested, fl_id, quorum, ledger_id, fit, _, node_id = words
                word, count, text = self.accept_upload(
                    int(number),
                    int(attempt),
                    int(requested),
                    str(fl_id),
                    int(quorum),
                    str(ledger_id),
                    str(node_id),
                    fit == 1,
                )
                return [word.encode(), count, text.encode()]
            case "count_by_ledger":
                counts = self.count_by_ledger(int(keys[0].split(":")[-3]))
                return [part for ledger, count in counts.items() for part in (ledger.encode(), count)]
            case "set_phase":
                number, attempt, before, after, *fields = words
                named = {str(key): str(value) for key, value in zip(fields[::2], fields[1::2], strict=True)}
                return int(self.set_phase(int(number), int(attempt), Phase(before), Phase(after), **named))
            case "advance":
                number, attempt, _, success, result, finishes, _, _, phase = words
                return int(
                    self.advance(
                        int(number), int(attempt), Phase(phase), success == 1, str(result), finishes == 1
                    )
                )
            case "own_ledger":
                ledger_id, node_id, before, _ = words
                return int(self.own_ledger(str(ledger_id), str(node_id), str(before)))
            case "heartbeat":
                self.heartbeat(str(words[0]))
                return 1
        raise AssertionError(name)

    def _read(self) -> list[bytes | int]:
        seen = self.read()
        if seen is None:
            return []
        status, clients, uploads = seen
        fields = {
            "iterationNum": status.number,
            "attempt": status.attempt,
            "phase": status.phase.value,
            "runningState": int(status.running),
            "lastIterationSuccess": int(status.success),
            "lastIterationResult": status.result,
            "token": status.token,
            "digest": status.digest,
        }
        if status.started is not None:
            fields["startedMs"] = int(status.started)
        if status.first_upload is not None:
            fields["firstUploadMs"] = int(status.first_upload)
        flat = [part for item in fields.items() for part in (item[0].encode(), str(item[1]).encode())]
        return [int(self.clock()), clients, uploads, *flat]

    def execute(self, *words: Argument) -> Any:
        """Execute a plain command and answer as Redis does."""
        self.expire()
        match words:
            case ("HGET", _, field):
                owner = self.owners.get(str(field))
                return None if owner is None else owner.encode()
            case ("HDEL", _, field):
                return int(self.owners.pop(str(field), None) is not None)
            case ("EXISTS", key):
                return int(any(str(key).endswith(f":heartbeat:{node}:String") for node in self.leases))
            case ("HMGET", key, *fl_ids):
                *_, number, kind, _ = str(key).split(":")
                held = {"clients": self.clients, "uploads": self.uploads}[kind].get(int(number), {})
                return [held[str(fl_id)].encode() if fl_id in held else None for fl_id in fl_ids]
            case ("GET", name):
                value = self.names.get(str(name))
                return None if value is None else value.encode()
            case ("SET", name, value, "EX", _, "NX"):
                self.names.setdefault(str(name), str(value))
                return None
        raise AssertionError(words)


class SimulatedRedis:
    """Stands for ``store.redis.Redis``: one pipelined connection to a RecordedState."""

    def __init__(self, state: RecordedState) -> None:
        self.available = True
        self._state = state
        self._sent: deque[tuple[defer.Deferred[Any], Callable[[], Any]]] = deque()
        self._done: deque[tuple[defer.Deferred[Any], Any]] = deque()
        self._waiting: list[defer.Deferred[None]] = []

    async def connected(self) -> None:
        if not self.available:
            waiter: defer.Deferred[None] = defer.Deferred()
            self._waiting.append(waiter)
            await waiter

    async def script(self, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        return await self._send(lambda: self._state.run(name, keys, arguments))

    async def command(self, *words: Argument) -> Any:
        return await self._send(lambda: self._state.execute(*words))

    async def _send(self, step: Callable[[], Any]) -> Any:
        if not self.available:
            raise StoreUnavailable("no connection")
        reply: defer.Deferred[Any] = defer.Deferred()
        self._sent.append((reply, step))
        return await reply

    # ---- what the test does

    @property
    def busy(self) -> bool:
        return bool(self._sent or self._done)

    def execute(self) -> None:
        """Execute the oldest request."""
        if self._sent:
            reply, step = self._sent.popleft()
            self._done.append((reply, step()))

    def answer(self) -> None:
        """Deliver the oldest answer."""
        if self._done:
            reply, answer = self._done.popleft()
            reply.callback(answer)

    def break_off(self) -> None:
        """Lose the connection, with all requests and answers on their way."""
        if self.available:
            self.available = False
            lost = [reply for reply, _ in (*self._done, *self._sent)]
            self._done.clear()
            self._sent.clear()
            for reply in lost:
                reply.errback(StoreUnavailable("the connection is lost"))

    def come_back(self) -> None:
        """Connect again."""
        if not self.available:
            self.available = True
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                waiter.callback(None)


# ---- a server


class OpenFiles:
    """The ledger files that a process has open; when it dies, the kernel drops its locks on them."""

    def __init__(self) -> None:
        self._open: set[MappedFile] = set()
        opened, closed = MappedFile.__init__, MappedFile.close

        def open_and_note(file: MappedFile, *given: Any) -> None:
            opened(file, *given)
            self._open.add(file)

        def close_and_note(file: MappedFile) -> None:
            self._open.discard(file)
            closed(file)

        self._patches = [
            patch.object(MappedFile, "__init__", open_and_note),
            patch.object(MappedFile, "close", close_and_note),
        ]
        for each in self._patches:
            each.start()

    def drop(self) -> None:
        """Drop all locks, as the kernel does at the end of a process."""
        for file in list(self._open):
            file.close()

    def stop(self) -> None:
        """Stop watching."""
        self.drop()
        for each in self._patches:
            each.stop()


@dataclass
class Disk:
    """Checkpoints; outlives the server."""

    models: dict[int, ModelImage]
    full: bool = False

    def save(
        self,
        directory: Path,
        fl_name: str,
        iteration: int,
        weights: Mapping[str, Any],
        not_aggregated: object,
        metadata: object,
        now: datetime,
    ) -> Path:
        """Stands for ``models.checkpoints.save``."""
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.models[iteration] = TEMPLATE.image(weights)
        return directory / str(iteration)


@dataclass(eq=False)
class Request:
    """What a device has asked, and the server that it asked."""

    fl_id: str
    iteration: int
    answer: defer.Deferred[Any]


class Server:
    """One process: built as ``services.server`` builds it, but for the sockets."""

    def __init__(
        self, state: RecordedState, disk: Disk, directory: Path, policy: Policy, name: str, now: float
    ) -> None:
        self.reactor = MemoryReactor()
        self.reactor.advance(now)
        self.redis = SimulatedRedis(state)
        self.ends: list[IterationEnd] = []
        self.requests: list[Request] = []
        newest = max(disk.models)
        shape = Shape.of(LAYOUT, "job", policy.update_threshold, SLOTS, BODY)
        self.ledgers = Ledgers(directory, LAYOUT, shape, False, self.reactor)
        self.intake = UpdateIntake(self.ledgers, directory, name, LAYOUT.total_floats, HOLD_S, self.reactor)
        metrics = ServerMetrics()
        job = Job("job", policy, 20_000, Path("checkpoints"), name, lambda: "i_1", {})
        self.driver = IterationDriver(
            job,
            self.redis,  # type: ignore[arg-type]
            self.ledgers,
            self.intake,
            ModelHistory(newest, disk.models[newest]),
            TEMPLATE,
            metrics,
            self.reactor,
            lambda: datetime(2026, 1, 1),
        )
        self.driver.on_iteration_end.append(self.ends.append)
        base = Settings(fl_name="job", fl_iteration_num=policy.last_iteration)
        settings = replace(
            base,
            round=replace(
                base.round,
                start_fl_job_threshold=policy.start_threshold,
                update_model_ratio=policy.update_threshold / policy.start_threshold,
                start_fl_job_time_window=int(policy.start_window * 1000),
                update_model_time_window=int(policy.update_window * 1000),
            ),
        )
        self.api = ClientApi(
            settings,
            LAYOUT,
            self.driver,
            self.intake,
            metrics,
            self.reactor,
            lambda: int(self.reactor.seconds() * 1000),
            lambda: 0.5,
        )
        self.heartbeat = Heartbeat(lambda: self.driver.cluster, "server", name, "address", self.reactor)
        self.driver.on_join.append(self.heartbeat.beat)
        self.driver.startService()
        self.heartbeat.startService()

    def start_client(self, fl_id: str) -> Request:
        """A device asks for a place."""
        body = codec.encode(RequestFLJob(fl_name="job", fl_id=fl_id, data_size=1, timestamp="1"))
        answer = defer.Deferred.fromCoroutine(self.api.start_fl_job(memoryview(body)))
        self.requests.append(Request(fl_id, 0, answer))
        return self.requests[-1]

    def upload(self, fl_id: str, iteration: int) -> Request | None:
        """A device sends its update, if there is a slot for it."""
        slot = self.intake.receive(BODY)
        if not isinstance(slot, Slot):
            return None
        vector = np.zeros(len(CLIENTS), np.float32)
        vector[CLIENTS.index(fl_id)] = 1.0
        request = RequestUpdateModel(
            fl_name="job",
            fl_id=fl_id,
            iteration=iteration,
            feature_map=(FeatureMap("who", vector),),
            timestamp="1",
        )
        body = codec.encode(request)
        slot.buffer[: len(body)] = body
        slot.length = len(body)
        answer = defer.Deferred.fromCoroutine(self.api.update_model(slot))
        self.requests.append(Request(fl_id, iteration, answer))
        return self.requests[-1]

    def settle(self) -> None:
        """Let Redis and the thread answer until nothing is under way."""
        while self.redis.busy or self.reactor.jobs:
            self.redis.execute()
            self.redis.answer()
            if self.reactor.jobs:
                self.reactor.work()


def iteration_told(answer: Any) -> int:
    """The iteration that the answer to a startFLJob names."""
    return codec.decode(ResponseFLJob, b"".join(answer.response.parts)).iteration  # type: ignore[no-any-return]
