"""Real servers of one job, and around each of them Redis, node channel, clock and thread that go on when told to.

A server is put together as ``services.server`` does it: driver, ledgers, intake, device rounds, reduction, publication
and what it does for its peers are real, and so are the ledgers' and checkpoints' files. A request to Redis is first
sent, then executed, then answered; one to a peer is sent, delivered, handled and answered. At any of these moments
something may break. What Redis executes is ``cluster.SharedState``, which tests/integration/test_store_model.py holds
against the scripts. A peer's frames are those of ``net.node_listener``.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from memory_reactor import MemoryReactor
from model.cluster import Reserve, Seen, SharedState, Store, key_of
from twisted.internet import defer

from fedcore.config import Settings
from fedcore.config.settings import MaskLayout
from fedcore.core.iteration import Iteration, Phase
from fedcore.core.job import RunningState
from fedcore.core.node_id import address_of, host_of
from fedcore.errors import StoreUnavailable
from fedcore.ledger.files import MappedFile
from fedcore.models import checkpoints
from fedcore.models.history import ModelHistory
from fedcore.net.networks import Networks
from fedcore.net.node_client import Answer, PeerRefused, PeerTimeout, PeerUnreachable
from fedcore.net.node_listener import NodeListener, Request
from fedcore.observe.journal import Journal
from fedcore.observe.metrics import ServerMetrics
from fedcore.services.client_api import ClientApi
from fedcore.services.heartbeat import Heartbeat
from fedcore.services.iteration_driver import IterationDriver, Parts
from fedcore.services.ledgers import Ledgers
from fedcore.services.loss import LossJudge
from fedcore.services.node_api import NodeApi
from fedcore.services.peers import Peers
from fedcore.services.publication import Publication
from fedcore.services.reduction import Reduction
from fedcore.services.reporting import IterationEnd, Reporter
from fedcore.services.terms import ledger_shape
from fedcore.services.unmasking import Unmasking
from fedcore.services.update_intake import UpdateIntake
from fedcore.store.cluster_state import CIPHER_ROUNDS
from fedcore.store.redis import Argument
from fedcore.wire import codec
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.image import ImageTemplate, ModelImage
from fedcore.wire.messages import FeatureMap, RequestFLJob, RequestUpdateModel, ResponseFLJob
from fedcore.wire.node import FrameReader, Meta, PayloadKind

CLIENTS = [f"c{i}" for i in range(6)]
LAYOUT = Layout((Weight("who", (len(CLIENTS),)),))
TEMPLATE = ImageTemplate(LAYOUT)
FIRST_MODEL = TEMPLATE.image({"who": np.zeros(len(CLIENTS), np.float32)})
HOLD_S = 8.0
_LEASE_MS = 10_000
_BIRTH = datetime(2026, 1, 1)
_MAX_FRAME = 1 << 20
_TIMES = ("startedMs", "firstUploadMs", "sealedMs")


def trained(fl_id: str, iteration: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What a client trains: a vector of its own, as long as the iteration's number."""
    vector = np.zeros(len(CLIENTS), np.float32)
    vector[CLIENTS.index(fl_id)] = iteration
    return vector


def content_of(model: ModelImage) -> tuple[int, frozenset[str]]:
    """Tell of which iteration a model is, and whose updates are in it: each of them once, and nothing else."""
    values = model.arrays["who"]
    inside = np.flatnonzero(values)
    if not len(inside):
        return 0, frozenset()
    number = round(float(values[inside[0]]) * len(inside))
    expected = np.zeros(len(CLIENTS), np.float32)
    expected[inside] = number / len(inside)
    assert np.array_equal(values, expected), f"some update is in the model twice, or of another one: {values}"
    return number, frozenset(CLIENTS[i] for i in inside)


# ---- Redis


@dataclass(frozen=True)
class End:
    """How an iteration ended in Redis.

    Attributes:
        counted: keys of the clients whose updates were counted.
        base: digest of the model that counts afterwards.
    """

    success: bool
    result: str
    counted: frozenset[str]
    base: str


class RecordedState(SharedState):
    """The shared state of one instance, which tells how its iterations end."""

    on_end: Callable[[int, End], None]
    on_raise: Callable[[int], None]

    def _ended(self, number: int, success: bool, result: str) -> None:
        assert self.status is not None
        self.on_end(number, End(success, result, frozenset(self.uploads_of(number)), self.status.base))

    def advance(self, number: int, *given: Any, **named: Any) -> bool:
        done = super().advance(number, *given, **named)
        if done:
            assert self.status is not None
            self._ended(number, self.status.success, self.status.result)
        return done

    def disable(self) -> str:
        number = 0 if self.status is None else self.status.number
        word = super().disable()
        if word in ("marked", "disabled"):
            self._ended(number, False, "Disable instance")
        return word

    def raise_status(self, known: Seen) -> str:
        word = super().raise_status(known)
        if word == "raised":
            self.on_raise(known.iteration.number)
        return word

    def rebase(self, number: int, *given: Any) -> str:
        word = super().rebase(number, *given)
        if word == "ended":
            assert self.status is not None
            self._ended(number, self.status.success, self.status.result)
        return word


class RecordedStore(Store):
    """All of Redis, asked as Redis is asked; and a standby that has what it had at some moment.

    Attributes:
        run: number of the process; another one after a fail-over.
        texts: plain keys, but the instance's name.
        ends: iteration -> how it ended.
        forgotten: iterations whose end Redis has lost and was not told again.
        standby: what the replica has, None if there is none; it catches up when somebody waits for it.
        on_end: called with each iteration that ends.
    """

    def __init__(self, clock: Callable[[], float], told: Callable[[str], object]) -> None:
        super().__init__(clock, told, _LEASE_MS)
        self.texts: dict[str, str] = {}
        self.ends: dict[int, End] = {}
        self.forgotten: set[int] = set()
        self.standby: RecordedStore | None = None
        self.on_end: Callable[[int, End], None] = lambda number, end: None

    def at(self, instance: str) -> RecordedState:
        found = self.instances.get(instance)
        if found is None:
            found = RecordedState(self.clock, self.told, self.lease)
            found.on_end, found.on_raise = self._ended, self._raised
            self.instances[instance] = found
        assert isinstance(found, RecordedState)
        return found

    @property
    def now(self) -> RecordedState:
        """The current instance."""
        return self.at(self.name)

    def _ended(self, number: int, end: End) -> None:
        assert number not in self.ends or number in self.forgotten, f"iteration {number} ended twice"
        self.forgotten.discard(number)
        self.ends[number] = end
        self.on_end(number, end)

    def _raised(self, number: int) -> None:
        """What was forgotten up to there is known again."""
        self.forgotten = {lost for lost in self.forgotten if lost >= number}

    def copy(self) -> RecordedStore:
        other = super().copy()
        assert isinstance(other, RecordedStore)
        other.texts = dict(self.texts)
        return other

    def wait(self) -> bool:
        """WAIT: have the replica catch up."""
        self.standby = self.copy()
        return True

    def fail_over(self, standby: RecordedStore | None) -> None:
        """Go on as the standby knows it; None: with nothing at all."""
        self.run, self.standby = self.run + 1, None
        kept = RecordedStore(self.clock, self.told) if standby is None else standby.copy()
        self.name, self.texts, self.instances = kept.name, kept.texts, kept.instances
        status = self.now.status if self.name else None
        number = 0 if status is None else status.number
        self.forgotten |= {ended for ended in self.ends if ended >= number}

    # ---- scripts

    def script(self, name: str, keys: Sequence[str], words: Sequence[Argument]) -> Any:
        """Run a script and answer as Redis does."""
        if name == "read_status":
            return self._read_status(str(words[0]).split(":")[2])
        if name == "raise_status":
            return self.raise_status(str(words[0]), self._known(words)).encode()
        state = self.at(keys[0].split(":")[2])
        plain = [word.decode() if isinstance(word, bytes) else word for word in words]
        return getattr(self, f"_{name}")(state, keys, plain)

    def _read_status(self, instance: str) -> list[bytes | int]:
        name, seen = self.read(instance)
        if seen is None:
            return [name.encode()]
        now = seen.iteration
        fields: dict[str, object] = {
            "iterationNum": now.number,
            "attempt": now.attempt,
            "phase": now.phase.value,
            "runningState": int(now.running),
            "lastIterationSuccess": int(seen.success),
            "lastIterationResult": seen.result,
            "token": now.token,
            "aggregate": now.aggregate,
            "digest": now.digest,
            "base": now.base,
            "lost": now.lost,
            "disabled": int(now.interrupted),
            "fence": seen.fence,
            "epoch": seen.epoch,
        }
        if now.metrics is not None:
            fields |= dict(zip(("loss", "accuracy"), now.metrics, strict=True))
        for field, moment in zip(_TIMES, (seen.started, seen.first_upload, seen.sealed), strict=True):
            fields |= {} if moment is None else {field: int(moment)}
        if seen.typical is not None:
            fields["typicalMs"] = int(seen.typical)
        fields["run"] = seen.run
        for round_name, requests, first in seen.rounds:
            fields |= {round_name: requests, f"{round_name}:ms": int(first)}
        flat = [part for item in fields.items() for part in (item[0].encode(), str(item[1]).encode())]
        return [name.encode(), int(self.clock()), now.selected, now.uploaded, *flat]

    def _known(self, words: Sequence[Argument]) -> Seen:
        """Read what raise_status.lua is told."""
        _, epoch, _, _, _, number, attempt, phase, fence, started, first, sealed, *pairs = words
        fields = dict(zip(pairs[::2], pairs[1::2], strict=True))

        def moment(ago: Argument) -> float | None:
            return None if ago == "" else self.clock() - int(ago)

        iteration = Iteration(
            int(number),
            int(attempt),
            Phase(phase),
            RunningState(int(fields["runningState"])),
            token=str(fields.get("token", "")),
            aggregate=str(fields.get("aggregate", "")),
            digest=str(fields.get("digest", "")),
            metrics=(float(fields["loss"]), float(fields["accuracy"])) if "loss" in fields else None,
            base=str(fields["base"]),
            lost=int(fields["lost"]),
            uploaded=int(fields.get("updates", 0)),
            interrupted="disabled" in fields,
        )
        times = (moment(started), moment(first), moment(sealed))
        success, result = fields["lastIterationSuccess"] == 1, str(fields["lastIterationResult"])
        typical = int(fields["typicalMs"]) if "typicalMs" in fields else None
        return Seen(iteration, *times, int(fence), int(epoch), success, result, typical)

    def _create_status(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> int:
        _, number, success, result, running, base, *epoch = words
        return int(state.create_status(number, success == 1, result, RunningState(running), base, *epoch))

    def _select_client(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> list[Any]:
        number, client, meta, places, fit, _, *reserve, _, run, ms = words
        word, taken = state.select_client(
            number, self._id(client), meta, places, fit == 1, Reserve(*reserve), run, ms
        )
        return [word.encode(), taken]

    def _reserve_place(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> int:
        client, places, returns, after = words
        return int(state.reserve_place(self._id(client), places, returns, after))

    def _restore_waiting(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> int:
        places, *rest = words
        waiting = dict(zip(rest[::3], zip(rest[1::3], rest[2::3], strict=True), strict=True))
        return state.restore_waiting(int(keys[1].split(":")[3]), waiting, places)

    def _accept_upload(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> list[Any]:
        number, attempt, requested, client, quorum, ledger_id, fit, _, node_id, _, ms, again = words
        word, counted, text = state.accept_upload(
            number,
            attempt,
            requested,
            self._id(client),
            quorum,
            ledger_id,
            node_id,
            fit == 1,
            again == 1,
            self._run(keys[7]),
            ms,
        )
        return [word.encode(), counted, text.encode()]

    @staticmethod
    def _id(client: str) -> str:
        return next(fl_id for fl_id in CLIENTS if key_of(fl_id) == client)

    def _count_by_ledger(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> list[Any]:
        counts = state.count_by_ledger(int(keys[0].split(":")[3]))
        return [part for ledger, updates in counts.items() for part in (ledger.encode(), updates)]

    def _seal(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> int:
        return int(state.seal(*words[1:]))

    def _claim_reduction(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> list[bytes]:
        return [part.encode() for part in state.claim_reduction(*words) or ()]

    def _record_model(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> int:
        *given, phase, _, run = words
        return int(state.record_model(*given, Phase(phase), run))

    def _push_weight(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> int:
        _, number, attempt, aggregate, digest, ms, instance = words
        if self.name not in ("", instance):
            return 0
        return state.push_weight(number, attempt, aggregate, digest, self._run(keys[1]), ms)

    def _push_metrics(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> int:
        _, number, attempt, loss, accuracy = words
        return int(state.push_metrics(number, attempt, float(loss), float(accuracy)))

    def _reopen(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> list[int]:
        _, number, attempt, phase, token, _, *ledgers = words
        lost = state.reopen(number, attempt, Phase(phase), token, ledgers)
        return [0, 0] if lost is None else [1, lost]

    def _advance(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> int:
        _, number, attempt, phase, token, _, success, result, finishes, base, _, _ = words
        done = state.advance(
            number, attempt, Phase(phase), success == 1, result, finishes == 1, token=token, base=base
        )
        return int(done)

    def _finish(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> int:
        return int(state.finish(words[1]))

    def _release_cipher(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> int:
        return int(state.rounds.pop(int(words[0]), None) is not None)

    def _rebase(self, state: RecordedState, keys: Sequence[str], words: Sequence[Any]) -> bytes:
        _, number, before, after, _, result, finishes, _ = words
        return state.rebase(number, before, after, result, finishes == 1).encode()

    def _restore_clients(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> list[Any]:
        number, ledger_id, node_id, _, base, *pairs = words
        metas = dict(zip(pairs[::2], pairs[1::2], strict=True))
        word, restored = state.restore_clients(number, ledger_id, node_id, metas, base)
        return [word.encode(), restored]

    @staticmethod
    def _run(awaited: str) -> str:
        """The run id in the name of an awaited hash."""
        return awaited.split(":")[3]

    def _holds_off(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> int:
        return int(state.others_are_awaited(self._run(keys[0]), words[0]))

    def _read_awaited(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> list[Any]:
        back, awaited, all_listed = state.roll(self._run(keys[0]), *words)
        return [[node.encode() for node in back], [node.encode() for node in awaited], int(all_listed)]

    def _await_nodes(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> bytes:
        _, node_id, *others = words
        return repr(state.await_nodes(self._run(keys[0]), node_id, others)).encode()

    def _nodes_are_back(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> int:
        _, node_id, call, *nodes = words
        since = float(call) if call else None
        return int(state.nodes_are_back(self._run(keys[0]), node_id, nodes, since))

    def _own_ledger(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> int:
        return int(state.own_ledger(*words[:3]))

    def _heartbeat(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> int:
        state.heartbeat(words[0])
        return 1

    def _list_nodes(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> list[bytes]:
        return [part.encode() for node in state.list_nodes() for part in (node, address_of(node))]

    def _disable(self, state: SharedState, keys: Sequence[str], words: Sequence[Any]) -> bytes:
        return state.disable().encode()

    # ---- plain commands

    def command(self, *words: Argument) -> Any:
        """Execute a plain command and answer as Redis does."""
        key = str(words[1])
        kind = key.split(":")[-2]
        match words[0], kind:
            case "PUBLISH", _:
                return self.told(str(words[2]))
            case "SET", "InstanceName":
                return self.claim_instance(str(words[2])) and None
            case "GET", "InstanceName":
                return self.name.encode() or None
            case "SET", _:
                return self.texts.setdefault(key, str(words[2])) and None
            case "GET", _:
                return self.texts[key].encode() if key in self.texts else None
        return self._hash(self.at(key.split(":")[2]), key, *words)

    def _hash(self, state: SharedState, key: str, verb: Argument, _: Argument, *fields: Argument) -> Any:
        parts = key.split(":")
        match verb, parts[-2]:
            case "EXISTS", _:
                return int(state.is_alive(key.partition(":heartbeat:")[2].removesuffix(":String")))
            case "HGET", "ledgers":
                return state.ledger_owner(str(fields[0])).encode() or None
            case "HDEL", "ledgers":
                return state.forget_ledger(str(fields[0]))
            case "HGETALL", "ledgers":
                return [part.encode() for item in state.owners.items() for part in item]
            case "HGETALL", "uploads":
                return [part.encode() for item in state.uploads_of(int(parts[3])).items() for part in item]
            case "HKEYS", "uploads":
                return [client.encode() for client in state.uploads_of(int(parts[3]))]
            case (("HVALS" | "HKEYS" | "HGETALL"), round_name) if round_name in CIPHER_ROUNDS:
                gathered = state.gathered.get((int(parts[3]), round_name), {})
                named = {client.encode(): what for client, what in gathered.items()}
                whole = [part for item in named.items() for part in item]
                return {"HVALS": list(named.values()), "HKEYS": list(named), "HGETALL": whole}[str(verb)]
            case "HMGET", ("clients" | "uploads") as kind:
                held = {"clients": state.clients, "uploads": state.uploads}[kind].get(int(parts[3]), {})
                return [held[str(client)].encode() if client in held else None for client in fields]
            case "HDEL", "server":
                return state.leave(str(fields[0]))
            case "DEL", _:
                return 0
            case "HDEL", "status":
                assert state.status is not None
                state.status.disabled = False
                return 1
        raise AssertionError((verb, key, fields))


class _Line:
    """One pipelined connection to Redis; also what is given to those who use it before all others."""

    def __init__(self, store: RecordedStore) -> None:
        self._store = store
        self.sent: deque[tuple[defer.Deferred[Any], Callable[[], Any]]] = deque()
        self.done: deque[tuple[defer.Deferred[Any], Any]] = deque()
        self.lost = False

    async def script(self, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        return await self.send(lambda: self._store.script(name, keys, arguments))

    async def command(self, *words: Argument) -> Any:
        return await self.send(lambda: self._store.command(*words))

    async def send(self, step: Callable[[], Any]) -> Any:
        if self.lost:
            raise StoreUnavailable("the connection is lost")
        reply: defer.Deferred[Any] = defer.Deferred()
        self.sent.append((reply, step))
        return await reply

    def end(self) -> None:
        """Lose the connection, with all requests and answers on their way."""
        self.lost = True
        under_way = [reply for reply, _ in (*self.done, *self.sent)]
        self.done.clear()
        self.sent.clear()
        for reply in under_way:
            reply.errback(StoreUnavailable("the connection is lost"))


class SimulatedRedis:
    """Stands for ``store.redis.Redis``: a connection that is prepared before it is used.

    Attributes:
        reachable: False while no new connection can be made.
    """

    def __init__(self, store: RecordedStore) -> None:
        self.before_use: list[Callable[[Any, str], Awaitable[None]]] = []
        self.on_use: Callable[[], None] = lambda: None
        self.run_id = ""
        self.reachable = False
        self._store = store
        self._line: _Line | None = None
        self._in_use = False
        self._waiting: list[defer.Deferred[None]] = []

    @property
    def available(self) -> bool:
        return self._in_use

    async def connected(self) -> None:
        if not self._in_use:
            waiter: defer.Deferred[None] = defer.Deferred()
            self._waiting.append(waiter)
            await waiter

    async def script(self, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        return await self._used().script(name, keys, arguments)

    async def command(self, *words: Argument) -> Any:
        return await self._used().command(*words)

    async def replicated(self, timeout_ms: int) -> bool:
        """WAIT, where there is a replica."""
        if self.available and self._store.standby is None:
            return True
        return bool(await self._used().send(self._store.wait))

    def _used(self) -> _Line:
        if self._line is None or not self._in_use:
            raise StoreUnavailable("no connection")
        return self._line

    # ---- what the test does

    def execute(self) -> bool:
        """Execute the oldest request."""
        if self._line is None or not self._line.sent:
            return False
        reply, step = self._line.sent.popleft()
        self._line.done.append((reply, step()))
        return True

    def answer(self) -> bool:
        """Deliver the oldest answer."""
        if self._line is None or not self._line.done:
            return False
        reply, answer = self._line.done.popleft()
        reply.callback(answer)
        return True

    def break_off(self) -> None:
        """Lose the connection; none comes back before ``come_back``."""
        self.reachable = False
        self._end()

    def _end(self) -> None:
        line, self._line, self._in_use = self._line, None, False
        if line is not None:
            line.end()

    def come_back(self) -> None:
        """Connect again, and prepare the connection."""
        if not self.reachable:
            self.reachable = True
            self._line = line = _Line(self._store)
            defer.Deferred.fromCoroutine(self._prepare(line, str(self._store.run)))

    async def _prepare(self, line: _Line, run_id: str) -> None:
        for prepare in self.before_use:
            try:
                await prepare(line, run_id)
            except StoreUnavailable:
                assert line.lost, "a connection that stands is refused"
                return
        if line.lost:
            return
        self._in_use, self.run_id = True, run_id
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)
        self.on_use()


# ---- the node channel


@dataclass(eq=False)
class _Asked:
    """A request on its way to a node, or its reply on the way back."""

    asker: str
    address: str
    request: Request
    reply: defer.Deferred[Any]

    def fail(self, error: Exception) -> None:
        if not self.reply.called:
            self.reply.errback(error)


class NodeNetwork:
    """What lies between the nodes.

    Attributes:
        listening: address -> who listens there.
        silent: whether requests vanish: nothing comes of them but a time-out.
        closed: whether connections break at once.
        lossy: whether requests are handled and their replies lost.
    """

    def __init__(self) -> None:
        self.listening: dict[str, NodeListener] = {}
        self.silent = self.closed = self.lossy = False
        self._sent: deque[_Asked] = deque()
        self._handled: list[_Asked] = []
        self._done: deque[tuple[_Asked, tuple[bytes, memoryview]]] = deque()
        self._ids = count(1)

    async def ask(self, asked: _Asked) -> Answer:
        """Send a request and wait for what becomes of it."""
        self._sent.append(asked)
        answer: Answer = await asked.reply
        return answer

    def deliver(self) -> bool:
        """Let the oldest request arrive."""
        if not self._sent:
            return False
        asked = self._sent.popleft()
        listener = self.listening.get(asked.address)
        if asked.reply.called or self.silent:
            return True
        if self.closed:
            asked.fail(PeerUnreachable("the connection broke"))
        elif listener is None:
            asked.fail(PeerUnreachable("nobody listens there", refused=True))
        else:
            self._handled.append(asked)
            handled = defer.Deferred.fromCoroutine(listener.answer(asked.request))
            handled.addCallback(lambda frame: self._done.append((asked, frame)))
        return True

    def reply(self) -> bool:
        """Let the oldest reply arrive."""
        if not self._done:
            return False
        asked, frame = self._done.popleft()
        if asked not in self._handled:
            return True  # its connection is gone
        self._handled.remove(asked)
        if self.silent or asked.reply.called:
            return True
        if self.closed or self.lossy:
            asked.fail(PeerUnreachable("the connection broke"))
            return True
        reader = FrameReader(_MAX_FRAME)
        reader.receive(frame[0] + bytes(frame[1]))
        answer = reader.next_frame()
        assert answer is not None
        if answer.meta.response_error:
            asked.fail(PeerRefused(answer.meta.response_error))
        else:
            asked.reply.callback(Answer(answer.data, answer.meta, answer.kind))
        return True

    def break_off(self, concerned: Callable[[_Asked], bool] = lambda asked: True) -> None:
        """Lose connections, with what is under way on them."""
        lost = [asked for asked in (*self._sent, *self._handled) if concerned(asked)]
        self._sent = deque(asked for asked in self._sent if asked not in lost)
        self._handled = [asked for asked in self._handled if asked not in lost]
        for asked in lost:
            asked.fail(PeerUnreachable("the connection broke"))

    def node_died(self, node_id: str) -> None:
        """Nobody listens at a node any more, and nobody waits there for an answer."""
        self.listening.pop(address_of(node_id), None)
        self._sent = deque(asked for asked in self._sent if asked.asker != node_id)
        self._handled = [asked for asked in self._handled if asked.asker != node_id]
        self.break_off(lambda asked: asked.address == address_of(node_id))

    def next_id(self) -> int:
        return next(self._ids)


class NodeStandIn:
    """Stands for ``net.node_client.NodeClient``."""

    def __init__(self, node_id: str, network: NodeNetwork, reactor: MemoryReactor) -> None:
        self._node_id = node_id
        self._network = network
        self._reactor = reactor

    async def request(
        self, address: str, recv_node: str, cmd: int, data: bytes = b"", *, timeout: float
    ) -> Answer:
        meta = Meta(cmd, self._network.next_id(), send_node=self._node_id, recv_node=recv_node)
        request = Request(meta, memoryview(bytes(data)).toreadonly(), host_of(self._node_id), PayloadKind.RAW)
        reply: defer.Deferred[Answer] = defer.Deferred()

        def late(_: object, seconds: float) -> None:
            raise PeerTimeout(f"node at {address} did not answer within {seconds:g} s")

        reply.addTimeout(timeout, self._reactor, late)  # type: ignore[arg-type]
        return await self._network.ask(_Asked(self._node_id, address, request, reply))


# ---- what outlives a process


class OpenFiles:
    """The ledger files that processes have open; when one dies, the kernel drops its locks on them."""

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

    def drop(self, directory: Path | None = None) -> None:
        """Drop all locks of the process that knows the ledgers under this name, as the kernel does at its end."""
        for file in list(self._open):
            if directory in (None, file.path.parent):
                file.close()

    def stop(self) -> None:
        """Stop watching."""
        self.drop()
        for each in self._patches:
            each.stop()


class Host:
    """A machine: its directories outlive the servers on it.

    Attributes:
        full: whether no checkpoint can be written.
    """

    def __init__(self, directory: Path, number: int) -> None:
        self.ip = f"10.0.0.{number}"
        self.directory = directory / self.ip
        self.checkpoints = self.directory / "checkpoints"
        self.ledgers = self.directory / "ledgers"
        self.full = False
        for each in (self.checkpoints, self.ledgers):
            each.mkdir(parents=True)

    def ledgers_of(self, process: str) -> Path:
        """The host's directory of ledgers under a name that only one process uses: so its files are told apart."""
        name = self.directory / process
        name.symlink_to(self.ledgers)
        return name

    def newest_model(self) -> tuple[int, ModelImage]:
        """The newest checkpoint, or the initial model."""
        found = checkpoints.load_newest(self.checkpoints, "job")
        return (0, FIRST_MODEL) if found is None else (found.iteration, TEMPLATE.image(found.model.weights))

    def models(self) -> ModelHistory:
        """What a server starts from: the newest model, and the initial one as long as that is the one before it."""
        iteration, newest = self.newest_model()
        if iteration != 1:
            return ModelHistory(iteration, newest)
        both = ModelHistory(0, FIRST_MODEL)
        both.add(1, newest)
        return both


@contextmanager
def full_disks(hosts: Sequence[Host]) -> Iterator[None]:
    """Refuse checkpoints on hosts that are full."""
    save = checkpoints.save

    def saved(directory: Path, *given: Any) -> Path:
        if any(host.full and host.checkpoints == directory for host in hosts):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(directory, *given)

    with patch.object(checkpoints, "save", saved):
        yield


# ---- a server


def settings_of(places: int, quorum: int, last: int) -> Settings:
    """Return the settings of a job with so many places and updates per iteration."""
    base = Settings(fl_name="job", fl_iteration_num=last)
    return replace(
        base,
        round=replace(
            base.round,
            start_fl_job_threshold=places,
            update_model_ratio=(quorum - 0.5) / places,
            start_fl_job_time_window=10_000,
            update_model_time_window=15_000,
            global_iteration_time_window=20_000,
        ),
        fedcore=replace(base.fedcore, device=replace(base.fedcore.device, hold_time=HOLD_S)),
    )


@dataclass(eq=False)
class Asked:
    """What a device has asked, and where."""

    fl_id: str
    iteration: int
    answer: defer.Deferred[Any]


class Server:
    """One process: built as ``services.server`` builds it, but for the sockets."""

    def __init__(
        self,
        store: RecordedStore,
        network: NodeNetwork,
        host: Host,
        settings: Settings,
        port: int,
        start: int,
        now: float,
    ) -> None:
        """Start on a host; ``start`` counts all starts of servers, so that no two node ids are the same."""
        self.host = host
        self.reactor = reactor = MemoryReactor()
        reactor.advance(now)
        self.node_id = node_id = f"{host.ip}:{port}::2026-01-01-00:00:00.000.000::{10000 + start}"
        self.redis = SimulatedRedis(store)
        self.network = network
        self.notices: deque[bytes] = deque()
        self.ends: list[IterationEnd] = []
        self.requests: list[Asked] = []
        self.ledger_dir = host.ledgers_of(f"process-{start}")
        redis: Any = self.redis
        client: Any = NodeStandIn(node_id, network, reactor)
        history = host.models()
        peers = Peers(client)
        shape = ledger_shape(settings, LAYOUT)
        self.ledgers = Ledgers(self.ledger_dir, LAYOUT, shape, False, reactor)
        self.intake = UpdateIntake(
            self.ledgers, host.directory, node_id, LAYOUT.total_floats, HOLD_S, reactor
        )
        self.publication = Publication(
            "job", host.checkpoints, history, TEMPLATE, peers, reactor, self._local_time
        )
        journal = Journal(host.directory / "event.txt", address_of(node_id), self._local_time)
        metrics = ServerMetrics()
        reporter = Reporter(metrics, journal, 10)
        reporter.on_iteration_end.append(self.ends.append)
        parts = Parts(
            redis,
            self.ledgers,
            self.intake,
            history,
            Reduction(node_id, self.ledgers, self.intake, peers, TEMPLATE, reactor),
            self.publication,
            peers,
            LossJudge(node_id, self.ledgers, peers, reactor),
            reporter,
            metrics,
            Unmasking(TEMPLATE, MaskLayout.CONTIGUOUS, metrics, reactor),
        )
        self.driver = IterationDriver(node_id, settings, parts, lambda: f"i_{start:03d}", reactor)
        self.driver.on_fatal = self._fatal
        self.api = ClientApi(
            settings, LAYOUT, self.driver, self.intake, metrics, reactor, self._now_ms, lambda: 0.5
        )
        self.heartbeat = Heartbeat(
            lambda: self.driver.cluster, "server", node_id, address_of(node_id), reactor
        )
        self.driver.on_join.append(self.heartbeat.beat)
        node_api = NodeApi(
            self.driver, self.api, self.intake, self.ledgers, self.publication, peers, Networks(())
        )
        network.listening[address_of(node_id)] = NodeListener(
            node_id,
            node_api.handlers(),
            max_data=_MAX_FRAME,
            max_connections=9,
            allowed=lambda host: True,
            reactor=reactor,
        )
        self.redis.on_use = lambda: self.notices.append(b"")
        self.driver.startService()
        self.heartbeat.startService()
        self.redis.come_back()

    def _local_time(self) -> datetime:
        return _BIRTH + timedelta(seconds=self.reactor.seconds())

    def _now_ms(self) -> int:
        return int(self.reactor.seconds() * 1000)

    @staticmethod
    def _fatal(error: Exception) -> None:
        raise AssertionError(error)

    # ---- devices

    def start_client(self, fl_id: str) -> Asked:
        """A device asks for a place."""
        body = codec.encode(RequestFLJob(fl_name="job", fl_id=fl_id, data_size=1, timestamp="1"))
        answer = defer.Deferred.fromCoroutine(self.api.start_fl_job(memoryview(body)))
        self.requests.append(Asked(fl_id, 0, answer))
        return self.requests[-1]

    def upload(self, fl_id: str, iteration: int) -> Asked:
        """A device sends its update."""
        request = RequestUpdateModel(
            fl_name="job",
            fl_id=fl_id,
            iteration=iteration,
            feature_map=(FeatureMap("who", trained(fl_id, iteration)),),
            timestamp="1",
        )
        body = codec.encode(request)
        room = self.intake.receive(len(body))
        room.buffer[: len(body)] = body
        room.length = len(body)
        answer = defer.Deferred.fromCoroutine(self.api.update_model(room))
        self.requests.append(Asked(fl_id, iteration, answer))
        return self.requests[-1]

    # ---- what goes on

    def work(self) -> bool:
        """Let the thread do its oldest job."""
        if not self.reactor.jobs:
            return False
        self.reactor.work()
        return True

    def hear(self) -> bool:
        """Hear the oldest notice of Redis."""
        if not self.notices or not self.redis.available:
            return False
        self.driver.heard(self.notices.popleft())
        return True

    def lose_redis(self) -> None:
        """Lose both connections to Redis."""
        self.notices.clear()
        self.redis.break_off()


def iteration_told(answer: Any) -> int:
    """The iteration that the answer to a startFLJob names."""
    return codec.decode(ResponseFLJob, b"".join(answer.response.parts)).iteration  # type: ignore[no-any-return]


class PromptRedis:
    """Stands for ``store.redis.Redis`` where nothing is to go wrong: it answers at once.

    Attributes:
        run_id: as Redis'.
    """

    def __init__(self, store: RecordedStore) -> None:
        self.run_id = "1"
        self._store = store

    async def script(self, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        return self._store.script(name, keys, arguments)

    async def command(self, *words: Argument) -> Any:
        return self._store.command(*words)
