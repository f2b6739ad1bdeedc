"""The state that all nodes of a job share: each operation, its atomicity, its possible answers.

Every change is one script (one atomic step) that says "if still X, apply Y". Nothing is cached here. A lost
connection is StoreUnavailable; a state that is not there is None or StateMissing, never a default.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from fedcore.core.admission import Acceptance, Selection
from fedcore.core.client_key import client_key
from fedcore.core.iteration import EXCHANGE_ROUNDS, MADE, UNMASK_ROUNDS, Iteration, Phase
from fedcore.core.job import RunningState
from fedcore.errors import StoreError
from fedcore.store import keys
from fedcore.store.redis import Argument, Redis

CIPHER_ROUNDS = (*EXCHANGE_ROUNDS, *UNMASK_ROUNDS)


class StateMissing(StoreError):
    """Redis holds no status of this instance: it lost its data, or the keys expired."""


class IterationMoved(StoreError):
    """Redis is in another iteration, attempt or phase than the caller; ``number`` is Redis' iteration."""

    def __init__(self, number: int) -> None:
        super().__init__(f"the shared state is not where the caller is (now at iteration {number})")
        self.number = number


class LeftOut(IterationMoved):
    """Redis does not take back what a ledger holds: the iteration has gone on without it, or from another model.

    Attributes:
        updates: how many of the ledger's clients have no update that is counted; 0 if Redis does not know any more.
        rebased: whether the iteration is the caller's, but its clients train from another model than the ledger's.
    """

    def __init__(self, updates: int, rebased: bool) -> None:
        super().__init__(0)
        self.updates = updates
        self.rebased = rebased


class OthersAwaited(StoreError):
    """Redis has lost data, and another server may know of what it forgot, as of the client's update: ask again soon."""


class LedgerRevoked(StoreError):
    """The shared state says that the caller's ledger belongs to another server, or to none."""


class LeaseLapsed(StoreError):
    """The shared state has not heard of the caller for too long."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One atomic look at the state of job and iteration.

    Attributes:
        iteration: as core sees it, without its times.
        started_ago: seconds since the first startFLJob, or None.
        first_upload_ago: seconds since the first accepted updateModel, or None.
        sealed_ago: seconds since the iteration was sealed, or None.
        fence: number of the last token.
        epoch: how many instances the job had before this one.
        success: whether the previous iteration was valid.
        result: why it ended.
        clock: when that was, seconds by Redis' clock.
        typical: seconds that the last valid iteration took from its last place to its end, None if none has filled up.
        rounds: the cipher rounds that have begun: name, requests counted, seconds since the first of them.
        run: run id of the Redis that has had all of the iteration since its first place, "" if none is known to.
    """

    iteration: Iteration
    started_ago: float | None
    first_upload_ago: float | None
    sealed_ago: float | None
    fence: int
    epoch: int
    success: bool
    result: str
    clock: float = field(default=0.0, compare=False, repr=False)
    typical: float | None = None
    rounds: tuple[tuple[str, int, float], ...] = ()
    run: str = ""


@dataclass(frozen=True, slots=True)
class Look:
    """One atomic look at a job.

    Attributes:
        instance: name of the job's instance, "" if Redis knows none.
        snapshot: state of the looker's instance, None if there is none.
    """

    instance: str
    snapshot: Snapshot | None


@dataclass(frozen=True, slots=True)
class Roll:
    """Who has answered the call to bring back what Redis has forgotten; both empty if no loss is known.

    Attributes:
        back: servers that have done so, by themselves or through those who took over their ledgers. ANYBODY is back
            once a server has called the others that knows them all.
        awaited: servers that may still do so, maybe ANYBODY.
        all_listed: whether all servers that lived lately are on the list of the living: it was not emptied.
    """

    back: frozenset[str]
    awaited: frozenset[str]
    all_listed: bool = False

    @property
    def complete(self) -> bool:
        """Whether everybody is back after a loss."""
        return bool(self.back) and not self.awaited


class Raised(StrEnum):
    """What became of an attempt to bring the status back; the values are the script's words."""

    NEWER = "newer"  # the job has another, newer instance
    RAISED = "raised"  # Redis had forgotten something, and has it again
    KEPT = "kept"  # Redis was as far or further


class Use(StrEnum):
    """What became of a signature that was shown; the values are the script's words."""

    NEW = "new"
    REPEATED = "repeated"  # the same request came before
    USED = "used"  # another request bore it


class Rebased(StrEnum):
    """What became of an attempt to rebase the job; the values are the script's words."""

    REBASED = "rebased"
    ENDED = "ended"  # and so did the iteration
    OTHER = "other"  # another iteration or model is named by now


@dataclass(frozen=True, slots=True)
class ClientMeta:
    """What a client declared when it got its place.

    Attributes:
        data_size: training samples, 1..65535.
        eval_data_size: evaluation samples, >= 0.
        start_ms: when it was selected, milliseconds since the epoch, the server's clock.
        key: with which it signs its requests, SubjectPublicKeyInfo in base64; "" while devices need not sign.
    """

    data_size: int
    eval_data_size: int
    start_ms: int
    key: str = field(default="", repr=False)

    def pack(self) -> str:
        """Return the form that Redis holds."""
        declared = f"{self.data_size},{self.eval_data_size},{self.start_ms}"
        return f"{declared},{self.key}" if self.key else declared

    @classmethod
    def unpack(cls, packed: bytes) -> ClientMeta:
        """Read the form that Redis holds."""
        data_size, eval_data_size, start_ms, *key = packed.split(b",")
        return cls(int(data_size), int(eval_data_size), int(start_ms), *(part.decode() for part in key))


class MaskedUpdate(NamedTuple):
    """What the shared state is to know of a masked update.

    Attributes:
        after: the last cipher round before it, which its client must have ended.
        digest: of its bytes: under the same masks it may come again, but not with others.
    """

    after: str
    digest: bytes


class Reserve(NamedTuple):
    """How a refused client's place is kept.

    Attributes:
        returns_ms: when it is told to return, milliseconds from now.
        before_ms: how long before that others must leave it a place.
        after_ms: how long after that.
    """

    returns_ms: int
    before_ms: int
    after_ms: int


@dataclass(frozen=True, slots=True)
class Node:
    """A living member of the cluster."""

    node_id: str
    role: str
    tcp_address: str


async def current_instance(redis: Redis, fl_name: str) -> str | None:
    """Return the name of the job's instance, or None if no server has made one."""
    name = await redis.command("GET", keys.instance_name(fl_name))
    return None if name is None else name.decode()


async def claim_instance(redis: Redis, fl_name: str, proposed: str, ttl: int) -> str:
    """Return the name of the job's instance, making ``proposed`` it if there is none."""
    await redis.command("SET", keys.instance_name(fl_name), proposed, "EX", ttl, "NX")
    return await current_instance(redis, fl_name) or proposed


class ClusterState:
    """The shared state of one instance of a job."""

    def __init__(self, redis: Redis, fl_name: str, instance: str, global_window_ms: int) -> None:
        """Bind to an instance; ``global_window_ms`` sets the lifetimes of the keys."""
        self.redis = redis
        self.keys = keys.InstanceKeys(fl_name, instance)
        self._job_ttl = keys.job_ttl(global_window_ms)
        self.iteration_ttl = keys.iteration_ttl(global_window_ms)
        self._evaluation_ttl = keys.evaluation_ttl(global_window_ms)
        self._channel = keys.changes(fl_name)

    async def read(self) -> Look:
        """Return the name of the job's instance and the state of this one."""
        names = [self.keys.status, keys.instance_name(self.keys.fl_name)]
        instance, *answer = await self.redis.script("read_status", names, [self.keys.prefix])
        return Look(instance.decode(), _snapshot(answer) if answer else None)

    async def create(
        self, number: int, *, success: bool, result: str, running: RunningState, base: str, epoch: int = 0
    ) -> bool:
        """Write the first state; False if there already is one."""
        arguments: list[Argument] = [self._job_ttl, number, int(success), result, int(running), base]
        arguments += [epoch] if epoch else []
        return bool(await self.redis.script("create_status", [self.keys.status], arguments))

    async def raise_to(self, known: Snapshot) -> Raised:
        """Bring back what Redis has forgotten, if ``known`` is further on than what it says.

        Args:
            known: the furthest state that the caller has seen; its times are from now.
        """
        now = known.iteration
        start, _, end = keys.InstanceKeys(self.keys.fl_name, "\0").status.partition("\0")
        arguments: list[Argument] = [self.keys.instance, known.epoch, self._job_ttl, start, end]
        arguments += [now.number, now.attempt, now.phase.value, known.fence]
        for ago in (known.started_ago, known.first_upload_ago, known.sealed_ago):
            arguments.append("" if ago is None else int(ago * 1000))
        arguments += ["lastIterationSuccess", int(known.success), "lastIterationResult", known.result]
        arguments += ["runningState", int(now.running), "base", now.base, "lost", now.lost]
        for name, value in (("token", now.token), ("aggregate", now.aggregate), ("digest", now.digest)):
            arguments += [name, value] if value else []
        for name, figure in zip(("loss", "accuracy"), now.metrics or (), strict=False):
            arguments += [name, repr(figure)]
        arguments += ["updates", now.uploaded] if now.phase in MADE else []
        arguments += ["disabled", 1] if now.interrupted else []
        arguments += [] if known.typical is None else ["typicalMs", int(known.typical * 1000)]
        names = [keys.instance_name(self.keys.fl_name), self.keys.status]
        return Raised((await self.redis.script("raise_status", names, arguments)).decode())

    async def restore_clients(
        self, number: int, ledger_id: str, node_id: str, clients: Mapping[str, ClientMeta], base: str = ""
    ) -> int | None:
        """Bring back clients of an iteration, and the updates that a ledger holds, where Redis has forgotten them.

        Args:
            number: the iteration.
            ledger_id: the ledger, "" for clients that have only a place.
            node_id: owner of the ledger.
            clients: client key -> what it declared.
            base: digest of the model that they train from, "" if nobody said.

        Returns:
            How many updates Redis had forgotten; None if the ledger may not be used any more.

        Raises:
            LeftOut: Redis is in another iteration, has its model, or names another model to train from.
        """
        names = [self.keys.status, self.keys.clients(number), self.keys.uploads(number)]
        names += [self.keys.ledgers, self.keys.revoked]
        pairs = [part for key, meta in clients.items() for part in (key, meta.pack())]
        arguments: list[Argument] = [
            number,
            ledger_id,
            node_id,
            self.iteration_ttl,
            base,
            *pairs,
        ]
        word, updates = await self.redis.script("restore_clients", names, arguments)
        if word in (b"closed", b"rebased"):
            raise LeftOut(int(updates), word == b"rebased")
        return None if word == b"revoked" else int(updates)

    async def restore_waiting(self, number: int, waiting: Mapping[str, Reserve], *, places: int) -> int:
        """Bring back clients that were refused and wait for a place, where Redis has forgotten them.

        Args:
            number: the current iteration; who has a place in it waits no more.
            waiting: client key -> how its place is kept; ``returns_ms`` is less than 0 for one that should be back.
            places: start_fl_job_threshold; four times as many may wait.

        Returns:
            How many Redis had forgotten.
        """
        kept = [part for key, it in waiting.items() for part in (key, it.returns_ms, it.after_ms)]
        names = [self.keys.waiting, self.keys.clients(number)]
        return int(await self.redis.script("restore_waiting", names, [places, *kept]))

    async def await_nodes(self, run_id: str, node_id: str, others: Iterable[str]) -> str:
        """Have nobody served until all have brought back what this Redis has forgotten, or HOLD_OFF_S are over.

        No place is given and no update counted: a server that stood still may know an iteration that is long over, or a
        client's update may lie with one that has not told yet.

        Args:
            run_id: of this Redis.
            node_id: the server that calls.
            others: further ones that may hold updates, ANYBODY for those that cannot be named; those that are back
                already are not awaited, and no client waits for ANYBODY.

        Returns:
            What tells this call from one after another loss of data.
        """
        arguments: list[Argument] = [keys.AWAITED_TTL_S, node_id, *others]
        word: bytes = await self.redis.script("await_nodes", [self.keys.awaited(run_id)], arguments)
        return word.decode()

    async def await_founders(self) -> None:
        """Have nobody served in this instance for HOLD_OFF_S: living servers may know an older one.

        For a server that makes an instance of a job that is under way. Redis has lost its data; who lives still brings
        the older instance back, and a place or an update that was counted in this one would be lost with it.
        """
        await self.await_nodes(self.redis.run_id, keys.FOUNDERS, ())

    async def nodes_are_back(
        self, run_id: str, node_id: str, node_ids: Iterable[str], call: str = ""
    ) -> None:
        """Say that servers have brought back to this Redis what they know.

        Args:
            run_id: of this Redis.
            node_id: the server that says so.
            node_ids: those of whom it says so.
            call: what ``await_nodes`` returned before it did so; nothing is said if Redis was emptied since then.
        """
        arguments: list[Argument] = [keys.AWAITED_TTL_S, node_id, call, *node_ids]
        if len(arguments) > 3:
            await self.redis.script("nodes_are_back", [self.keys.awaited(run_id)], arguments)

    async def holds_off(self) -> bool:
        """Tell whether nobody is served, as ``await_nodes`` has asked for."""
        names, arguments = [self.keys.awaited(self.redis.run_id)], [int(keys.HOLD_OFF_S * 1000)]
        return bool(await self.redis.script("holds_off", names, arguments))

    async def roll(self) -> Roll:
        """Return who has brought back what this Redis had forgotten, and who may still do so, for DOUBT_S."""
        names = [self.keys.awaited(self.redis.run_id), self.keys.listed]
        arguments: list[Argument] = [int(keys.DOUBT_S * 1000), keys.HEARTBEAT_TTL_S * 1000]
        back, awaited, all_listed = await self.redis.script("read_awaited", names, arguments)
        return Roll(
            frozenset(node.decode() for node in back),
            frozenset(node.decode() for node in awaited),
            bool(all_listed),
        )

    async def select_client(
        self, number: int, fl_id: str, meta: ClientMeta, *, places: int, fit: bool, reserve: Reserve
    ) -> tuple[Selection, int]:
        """Give a client a place.

        Args:
            number: the iteration that the caller serves.
            fl_id: the client.
            meta: what it declared.
            places: start_fl_job_threshold.
            fit: False only asks what the answer would be.
            reserve: the place of a refused client in a later iteration.

        Returns:
            The outcome, and the count of selected clients where it is SELECTED.

        Raises:
            IterationMoved: no place is given in that iteration now.
            OthersAwaited: Redis has lost data, and not everybody has brought back yet what it knows.
            StateMissing: Redis holds no state.
        """
        names = [self.keys.status, self.keys.clients(number), self.keys.uploads(number), self.keys.waiting]
        names += [keys.instance_name(self.keys.fl_name), self.keys.awaited(self.redis.run_id)]
        arguments: list[Argument] = [
            number,
            client_key(fl_id),
            meta.pack(),
            places,
            int(fit),
            self.iteration_ttl,
            *reserve,
            self.keys.instance,
            self.redis.run_id,
            int(keys.HOLD_OFF_S * 1000),
        ]
        word, count = await self.redis.script("select_client", names, arguments)
        self._raise_if_elsewhere(word, count)
        return Selection(word.decode()), int(count)

    async def places_taken(self, number: int) -> int:
        """Return how many clients hold a place in an iteration."""
        return int(await self.redis.command("HLEN", self.keys.clients(number)))

    async def use_signature(
        self, fl_id: str, signature: bytes, request: bytes, *, stamp: int, oldest: int, lifetime_ms: int
    ) -> Use:
        """Take note of a client's signature, which is good for one request.

        Args:
            fl_id: the client.
            signature: 16 bytes that stand for it.
            request: 16 bytes that stand for the request that bears it.
            stamp: the request's time stamp, milliseconds, 13 digits.
            oldest: time stamps before this are not taken any more, by no server.
            lifetime_ms: how long it may be of interest that the signature was used.
        """
        arguments: list[Argument] = [signature, request, stamp, oldest, keys.SIGNATURES_KEPT, lifetime_ms]
        names = [keys.signatures(self.keys.fl_name, client_key(fl_id))]
        return Use((await self.redis.script("use_signature", names, arguments)).decode())

    async def reserve_place(self, fl_id: str, *, places: int, reserve: Reserve) -> bool:
        """Keep a place of a later iteration for a client whose update is refused, as for one that gets no place.

        Args:
            fl_id: the client.
            places: start_fl_job_threshold; four times as many may wait.
            reserve: its place; how long before its return it is kept is for those to say who ask for places then.

        Returns:
            False if too many wait already.
        """
        arguments: list[Argument] = [client_key(fl_id), places, reserve.returns_ms, reserve.after_ms]
        return bool(await self.redis.script("reserve_place", [self.keys.waiting], arguments))

    async def accept_upload(
        self,
        number: int,
        attempt: int,
        requested: int,
        fl_id: str,
        *,
        quorum: int,
        ledger_id: str,
        node_id: str,
        fit: bool,
        again: bool = False,
        vector: bytes = b"",
        kept: int = 0,
        masked: MaskedUpdate | None = None,
    ) -> tuple[Acceptance, int, ClientMeta | None]:
        """Count an update; the answer ACCEPTED is the only permission to say 200.

        Args:
            number: the iteration that the caller serves.
            attempt: its attempt.
            requested: the iteration that the request names.
            fl_id: the client.
            quorum: updates that complete the iteration.
            ledger_id: where the update lies.
            node_id: the server, which must own that ledger and hold a lease.
            fit: False only asks what the answer would be.
            again: whether this was asked before, and the answer lost: then a sealed iteration that lacks updates, as
                Redis has forgotten some, takes it back.
            vector: the client's evaluation vector, kept in the same step if the update is counted now; b"" for none.
            kept: of how many clients the vectors are kept, the newest of each.
            masked: what is to be known of a masked update, None for others.

        Returns:
            The outcome, the count of accepted updates and the client's meta where it is ACCEPTED. An update that
            this ledger had accepted before is ACCEPTED again; the caller knows whether it has it.

        Raises:
            IterationMoved: nothing is accepted in that iteration and attempt now.
            LedgerRevoked: the ledger belongs to another server.
            LeaseLapsed: the server's heartbeat has run out.
            OthersAwaited: Redis has lost data, and not everybody has brought back yet what it knows.
            StateMissing: Redis holds no state.
        """
        names = [
            self.keys.status,
            self.keys.clients(number),
            self.keys.uploads(number),
            self.keys.uploads(requested),
            self.keys.ledgers,
            self.keys.heartbeat("server", node_id),
            keys.instance_name(self.keys.fl_name),
            self.keys.awaited(self.redis.run_id),
        ]
        arguments: list[Argument] = [
            number,
            attempt,
            requested,
            client_key(fl_id),
            quorum,
            ledger_id,
            int(fit),
            self.iteration_ttl,
            node_id,
            self.keys.instance,
            int(keys.HOLD_OFF_S * 1000),
            int(again),
        ]
        if (vector and kept) or masked is not None:
            names += [self.keys.evaluated, self.keys.evaluation]
            arguments += [vector if kept else b"", kept, self._evaluation_ttl]
        if masked is not None:
            names += [self.keys.cipher_round(number, masked.after), self.keys.masked(number)]
            arguments.append(masked.digest)
        word, count, text = await self.redis.script("accept_upload", names, arguments)
        self._raise_if_elsewhere(word, count)
        acceptance = Acceptance(word.decode())
        meta = ClientMeta.unpack(text) if acceptance is Acceptance.ACCEPTED else None
        return acceptance, int(count), meta

    async def vectors(self) -> list[bytes]:
        """Return the newest evaluation vector of each of the clients whose vectors are kept, in no order."""
        return [bytes(vector) for vector in await self.redis.command("HVALS", self.keys.evaluation)]

    async def own_ledger(self, ledger_id: str, node_id: str, before: str = "") -> bool:
        """Make a node the owner of a ledger by compare-and-set; False if neither it nor ``before`` owns it."""
        arguments: list[Argument] = [ledger_id, node_id, before, self._job_ttl]
        return bool(await self.redis.script("own_ledger", [self.keys.ledgers], arguments))

    async def ledger_owner(self, ledger_id: str) -> str:
        """Return the node that owns a ledger, "" if none does."""
        owner = await self.redis.command("HGET", self.keys.ledgers, ledger_id)
        return "" if owner is None else owner.decode()

    async def forget_ledger(self, ledger_id: str) -> None:
        """Take a ledger off the list."""
        await self.redis.command("HDEL", self.keys.ledgers, ledger_id)

    async def is_alive(self, role: str, node_id: str) -> bool:
        """Tell whether a node's lease holds."""
        return bool(await self.redis.command("EXISTS", self.keys.heartbeat(role, node_id)))

    async def client_meta(self, number: int, fl_id: str) -> ClientMeta | None:
        """Return what a client declared when it got its place in an iteration, None if it has none."""
        meta = await self.redis.command("HGET", self.keys.clients(number), client_key(fl_id))
        return None if meta is None else ClientMeta.unpack(meta)

    async def data_size(self, number: int) -> tuple[int, int]:
        """Return of how many clients an update of an iteration is counted, and how many training samples they declared.

        A client of whom that is not known is left out.
        """
        counted = [client.decode() for client in await self.redis.command("HKEYS", self.keys.uploads(number))]
        metas = await self.redis.command("HMGET", self.keys.clients(number), *counted) if counted else []
        sizes = [ClientMeta.unpack(meta).data_size for meta in metas if meta is not None]
        return len(sizes), sum(sizes)

    async def counted(self, number: int, ledger_id: str, fl_ids: Sequence[str]) -> dict[str, ClientMeta]:
        """Return those of the clients whose update of an iteration is counted in this ledger."""
        if not fl_ids:
            return {}
        clients = [client_key(fl_id) for fl_id in fl_ids]
        holders = await self.redis.command("HMGET", self.keys.uploads(number), *clients)
        metas = await self.redis.command("HMGET", self.keys.clients(number), *clients)
        found = zip(fl_ids, holders, metas, strict=True)
        return {
            fl_id: ClientMeta.unpack(meta) for fl_id, holder, meta in found if holder == ledger_id.encode()
        }

    async def uploads_by_ledger(self, number: int) -> dict[str, int]:
        """Return how many accepted updates of an iteration lie in each ledger."""
        answer = await self.redis.script("count_by_ledger", [self.keys.uploads(number)], [])
        return {ledger.decode(): int(count) for ledger, count in zip(answer[::2], answer[1::2], strict=True)}

    async def uploads(self, number: int) -> dict[str, str]:
        """Return the accepted updates of an iteration: client key -> ledger id."""
        answer = await self.redis.command("HGETALL", self.keys.uploads(number))
        return {
            client.decode(): ledger.decode() for client, ledger in zip(answer[::2], answer[1::2], strict=True)
        }

    async def ledgers(self) -> dict[str, str]:
        """Return the ledgers and who owns each: ledger id -> node id, or REVOKED."""
        answer = await self.redis.command("HGETALL", self.keys.ledgers)
        return {
            ledger.decode(): owner.decode() for ledger, owner in zip(answer[::2], answer[1::2], strict=True)
        }

    async def seal(self, number: int, attempt: int, quorum: int) -> bool:
        """Stop counting updates of an iteration that has its quorum, by compare-and-set."""
        names = [self.keys.status, self.keys.uploads(number)]
        return bool(await self.redis.script("seal", names, [self._channel, number, attempt, quorum]))

    async def record_model(
        self,
        number: int,
        attempt: int,
        token: str,
        digest: str,
        updates: int,
        phase: Phase,
        *,
        exchanged: bool = False,
    ) -> bool:
        """Name the model that the finaliser has made of the updates, by compare-and-set.

        Args:
            number: the iteration.
            attempt: its attempt.
            token: of the finaliser.
            digest: of the model.
            updates: how many are in it.
            phase: what follows, CANDIDATE, TRAINING if a worker is to train it further, or UNMASKING if devices are to
                help to take masks off it.
            exchanged: whether devices have exchanged keys for it, which no other Redis may have had than this one.

        Returns:
            False if the state or the token is another one, or more or fewer updates are counted by now.
        """
        names = [self.keys.status, self.keys.uploads(number)]
        arguments: list[Argument] = [number, attempt, token, digest, updates, phase.value, self._channel]
        arguments.append(self.redis.run_id if exchanged else "")
        return bool(await self.redis.script("record_model", names, arguments))

    async def push_weight(self, number: int, attempt: int, aggregate: str, digest: str) -> bool:
        """Name the model that a worker has trained from the aggregate, by compare-and-set; the first one counts.

        Args:
            number: the iteration.
            attempt: its attempt.
            aggregate: digest of what the worker has trained further.
            digest: of the model.

        Returns:
            False if the state is another one. A repetition is True again.

        Raises:
            OthersAwaited: Redis has lost data, and not everybody has brought back yet what it knows.
        """
        names = [
            self.keys.status,
            self.keys.awaited(self.redis.run_id),
            keys.instance_name(self.keys.fl_name),
        ]
        arguments: list[Argument] = [self._channel, number, attempt, aggregate, digest]
        arguments += [int(keys.DOUBT_S * 1000), self.keys.instance]
        done = await self.redis.script("push_weight", names, arguments)
        if done < 0:
            raise OthersAwaited("other servers are to bring back first what Redis has lost")
        return bool(done)

    async def push_metrics(self, number: int, attempt: int, loss: float, accuracy: float) -> bool:
        """Note what a worker says of the model that it has pushed, and let that be published, by compare-and-set.

        Returns:
            False if nothing was pushed or the state is another one. A repetition is True again.
        """
        arguments: list[Argument] = [self._channel, number, attempt, repr(loss), repr(accuracy)]
        return bool(await self.redis.script("push_metrics", [self.keys.status], arguments))

    async def claim_reduction(
        self, number: int, attempt: int, token: str, node_id: str
    ) -> tuple[str, Phase, str, str] | None:
        """Make a node the finaliser of a sealed iteration.

        Args:
            number: the iteration.
            attempt: its attempt.
            token: of the finaliser that is gone, "" if there was none.
            node_id: the node.

        Returns:
            Its token, the phase, and the digests of aggregate and candidate as recorded, or ""; None if the state is
            another one.
        """
        arguments: list[Argument] = [number, attempt, token, node_id]
        answer = await self.redis.script("claim_reduction", [self.keys.status], arguments)
        if not answer:
            return None
        claimed, phase, aggregate, digest = (part.decode() for part in answer)
        return claimed, Phase(phase), aggregate, digest

    async def reopen(
        self, number: int, attempt: int, *, phase: Phase, token: str, ledgers: Sequence[str]
    ) -> int | None:
        """Collect again without the updates of lost ledgers, by compare-and-set.

        Returns:
            How many updates were lost with them; None if the state is another one.
        """
        names = [self.keys.status, self.keys.clients(number), self.keys.uploads(number)]
        names += [self.keys.ledgers, self.keys.revoked, self.keys.cipher_round(number, EXCHANGE_ROUNDS[0])]
        arguments: list[Argument] = [
            self._channel,
            number,
            attempt,
            phase.value,
            token,
            self._job_ttl,
            *ledgers,
        ]
        done, lost = await self.redis.script("reopen", names, arguments)
        return int(lost) if done else None

    async def advance(
        self,
        number: int,
        attempt: int,
        *,
        phase: Phase,
        success: bool,
        result: str,
        finishes: bool,
        token: str = "",
        base: str = "",
    ) -> bool:
        """End iteration ``number`` and open the next by compare-and-set; False if the state is another one.

        Args:
            number: the iteration that ends.
            attempt: its attempt.
            phase: the phase it must be in.
            success: whether it made a model.
            result: why it ended.
            finishes: whether the job ends with it.
            token: of the finaliser, "" before there is one.
            base: digest of the new model, "" if the one before stays.
        """
        names = [self.keys.status, self.keys.clients(number), self.keys.uploads(number), self.keys.ledgers]
        arguments: list[Argument] = [self._channel, number, attempt, phase.value, token, number + 1]
        arguments += [int(success), result, int(finishes), base, self._job_ttl, keys.RELEASE_TTL_S]
        return bool(await self.redis.script("advance", names, arguments))

    async def forget_interruption(self) -> None:
        """Let the next time that the job is disabled end an iteration again."""
        await self.redis.command("HDEL", self.keys.status, "disabled")

    async def finish(self, number: int) -> bool:
        """Say that the job's last iteration, the one before ``number``, is over; False if the state is another one."""
        return bool(await self.redis.script("finish", [self.keys.status], [self._channel, number]))

    async def rebase(self, number: int, before: str, after: str, *, result: str, finishes: bool) -> Rebased:
        """Make another model the one that devices train from, by compare-and-set of its digest.

        For a cluster in which nobody has the model any more that the shared state names. An iteration whose clients
        have begun with that one ends as failed.

        Args:
            number: the iteration.
            before: digest that is named now.
            after: digest of the model that takes its place.
            result: why the iteration ends, if it does.
            finishes: whether the job ends with it.
        """
        names = [self.keys.status, self.keys.clients(number), self.keys.uploads(number)]
        arguments: list[Argument] = [self._channel, number, before, after, number + 1, result]
        arguments += [int(finishes), keys.RELEASE_TTL_S]
        return Rebased((await self.redis.script("rebase", names, arguments)).decode())

    async def offer_hyper_parameters(self, values: Mapping[str, object]) -> None:
        """Write the hyper-parameters unless another server has."""
        text = json.dumps(values, sort_keys=True)
        await self.redis.command("SET", self.keys.hyper_params, text, "EX", self._job_ttl, "NX")

    async def offer_model_info(self, text: str) -> bytes:
        """Write the description of the model unless another server has; return the one that counts."""
        key = keys.model_info(self.keys.fl_name)
        await self.redis.command("SET", key, text, "EX", self._job_ttl, "NX")
        shared = await self.redis.command("GET", key)
        return text.encode() if shared is None else bytes(shared)

    async def heartbeat(self, role: str, node_id: str, address: str) -> None:
        """Say that a node lives; to be repeated well within ten seconds."""
        names = [
            self.keys.nodes(role),
            self.keys.heartbeat(role, node_id),
            keys.instance_name(self.keys.fl_name),
            self.keys.status,
            self.keys.hyper_params,
            self.keys.listed,
        ]
        await self.redis.script("heartbeat", names, [node_id, address, keys.HEARTBEAT_TTL_S, self._job_ttl])

    async def announce_release(self) -> None:
        """Tell the siblings of this server that its ledger may be adopted."""
        await self.redis.command("PUBLISH", self._channel, "released")

    async def announce_join(self) -> None:
        """Tell the other servers that there is one more."""
        await self.redis.command("PUBLISH", self._channel, "joined")

    async def announce_loss(self) -> None:
        """Tell the other servers that Redis has forgotten what they may hold, too."""
        await self.redis.command("PUBLISH", self._channel, "forgotten")

    async def leave(self, role: str, node_id: str) -> None:
        """Take a node off the list."""
        await self.redis.command("HDEL", self.keys.nodes(role), node_id)
        await self.redis.command("DEL", self.keys.heartbeat(role, node_id))

    async def nodes(self, role: str) -> list[Node]:
        """Return the living nodes of a role in bytewise order of their ids; forget the dead ones."""
        start, _, end = self.keys.heartbeat(role, "\0").partition("\0")
        listed = await self.redis.script("list_nodes", [self.keys.nodes(role)], [start, end])
        pairs = sorted(zip(listed[::2], listed[1::2], strict=True))
        return [Node(node_id.decode(), role, address.decode()) for node_id, address in pairs]

    @staticmethod
    def _raise_if_elsewhere(word: bytes, number: bytes | int) -> None:
        if word == b"missing":
            raise StateMissing("Redis holds no status of this instance")
        if word == b"closed":
            raise IterationMoved(int(number))
        if word == b"revoked":
            raise LedgerRevoked("the ledger belongs to another server")
        if word == b"awaited":
            raise OthersAwaited("other servers are to bring back first what Redis has lost")
        if word == b"lapsed":
            raise LeaseLapsed("the server's heartbeat has run out")


def _snapshot(answer: Sequence[bytes | int]) -> Snapshot:
    """Read the state that read_status.lua tells, its name taken off."""
    now_ms, selected, uploaded = (int(part) for part in answer[:3])
    raw = dict(zip(answer[3::2], answer[4::2], strict=True))  # others' fields need not be text

    def text(field: str, default: str = "") -> str:
        value = raw.get(field.encode())
        return default if value is None else value.decode()  # type: ignore[union-attr]

    def ago(field: str) -> float | None:
        moment = text(field)
        return (now_ms - int(moment)) / 1000 if moment else None

    iteration = Iteration(
        number=int(text("iterationNum")),
        attempt=int(text("attempt", "1")),
        phase=Phase(text("phase", Phase.COLLECTING)),
        running=RunningState(int(text("runningState", "0"))),
        selected=selected,
        uploaded=uploaded,
        token=text("token"),
        aggregate=text("aggregate"),
        metrics=(float(text("loss")), float(text("accuracy"))) if text("loss") and text("accuracy") else None,
        digest=text("digest"),
        base=text("base"),
        lost=int(text("lost", "0")),
        interrupted=text("disabled") == "1",
    )
    return Snapshot(
        iteration,
        ago("startedMs"),
        ago("firstUploadMs"),
        ago("sealedMs"),
        int(text("fence", "0")),
        int(text("epoch", "0")),
        text("lastIterationSuccess") == "1",
        text("lastIterationResult"),
        now_ms / 1000,
        int(text("typicalMs")) / 1000 if text("typicalMs") else None,
        tuple((name, int(text(name)), ago(f"{name}:ms") or 0.0) for name in CIPHER_ROUNDS if text(name)),
        text("run"),
    )
