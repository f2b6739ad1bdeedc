"""Whoever has both secrets of a client can read its update: nothing that reaches Redis ever gives both.

Honest devices do all they may, in any order, drop out, ask again and come back; servers lose ledgers, reopen, make the
sum, end iterations, die; Redis loses data and is told again. The scripts are the real ones, in a real Redis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from integration.redis_fixture import ReactorThread

from fedcore.core.cipher import Outcome
from fedcore.core.client_key import client_key
from fedcore.core.iteration import Iteration, Phase
from fedcore.core.job import RunningState
from fedcore.errors import StoreError
from fedcore.store.cipher_state import CipherState, Members, Share, unpack_shares
from fedcore.store.cluster_state import ClientMeta, ClusterState, Reserve, Snapshot
from fedcore.store.redis import Redis
from fedcore.wire.messages import RequestExchangeKeys

_jobs = itertools.count(1)
CLIENTS = ("a", "b", "c", "d", "e", "f")
LEDGERS = {"L1": "n1", "L2": "n2"}
PLACES, QUORUM, KEYS, SHARERS, T = 6, 3, 5, 4, 2
NO_WAIT = Reserve(60_000, 0, 60_000)
OWN, PAIRS = b"b", b"s"  # a share of the secret of a client's own mask, and of the key of its pairs


@dataclass
class Device:
    """One client in one iteration, with one set of keys; all that it was told and has told."""

    number: int
    keys: bytes
    members: tuple[str, ...] = ()
    sources: frozenset[str] | None = None
    lists: set[tuple[str, ...]] = field(default_factory=set)


class World:
    """A job: its shared state, what servers remember of it, and its devices."""

    def __init__(self, loop: ReactorThread, redis: Redis) -> None:
        self.loop, self.redis = loop, redis
        self.cluster = ClusterState(redis, f"secrets{next(_jobs)}", "i_1", 60_000)
        self.cipher = CipherState(self.cluster)
        self.devices: dict[str, Device] = {}
        self.held: dict[str, set[str]] = {}  # ledger -> clients whose updates are in it
        self.reports: dict[tuple[int, str, bytes], set[bytes]] = {}  # of whose keys, which secrets were told
        self.lists: dict[int, set[tuple[str, ...]]] = {}
        self.unmasked = self.reopened = 0
        self._fresh = itertools.count(1)
        self.run(self.cluster.create(1, success=True, result="", running=RunningState.RUNNING, base="b"))
        self.ledgers = {node: ledger for ledger, node in LEDGERS.items()}
        for node, ledger in self.ledgers.items():
            self.run(self.cluster.own_ledger(ledger, node))
            self.run(self.cluster.heartbeat("server", node, "address"))

    def run(self, work: Any) -> Any:
        """Return what is answered, None if the shared state refuses to."""
        try:
            return self.loop.run(work)
        except StoreError:
            return None

    @property
    def now(self) -> Snapshot:
        snapshot: Snapshot = self.run(self.cluster.read()).snapshot
        return snapshot

    def device(self, fl_id: str) -> Device:
        number = self.now.iteration.number
        if fl_id not in self.devices or self.devices[fl_id].number != number:
            self.renew(fl_id)
        return self.devices[fl_id]

    # ---- devices

    def renew(self, fl_id: str) -> None:
        """A device starts again: it has other keys, and has forgotten all of the ones before."""
        self.devices[fl_id] = Device(self.now.iteration.number, b"%032d" % next(self._fresh))

    def select(self, fl_id: str) -> None:
        number, meta = self.device(fl_id).number, ClientMeta(1, 0, 0)
        self.run(self.cluster.select_client(number, fl_id, meta, places=PLACES, fit=True, reserve=NO_WAIT))

    def exchange(self, fl_id: str) -> None:
        device = self.device(fl_id)
        request = RequestExchangeKeys(
            fl_id=fl_id,
            c_pk=device.keys,
            s_pk=device.keys,
            iteration=device.number,
        )
        self.run(self.cipher.exchange_keys(request, completes=KEYS, fit=True))

    def get_keys(self, fl_id: str) -> None:
        device = self.device(fl_id)
        told = self.run(self.cipher.get_keys(device.number, fl_id, listed=KEYS, completes=KEYS))
        if told is not None and told.outcome in (Outcome.COUNTED, Outcome.REPEATED):
            members = Members(self.run(self.cipher.members(device.number)))
            mine = bytes(members.entries[members.places[fl_id]].s_pk)
            if mine == device.keys:  # else others would seal for keys that it has no more
                device.members = members.ids

    def share(self, fl_id: str) -> None:
        device = self.device(fl_id)
        if device.members:
            place = device.members.index(fl_id)
            shares = {other: Share(place, 1, device.keys) for other in device.members if other != fl_id}
            self.run(self.cipher.share_secrets(device.number, fl_id, shares, completes=SHARERS))

    def get_secrets(self, fl_id: str) -> None:
        device = self.device(fl_id)
        told = self.run(self.cipher.get_secrets(device.number, fl_id, shared=SHARERS, completes=QUORUM))
        if device.members and told is not None and told.outcome in (Outcome.COUNTED, Outcome.REPEATED):
            shares = unpack_shares(self.run(self.cipher.shares_for(device.number, fl_id)))
            device.sources = frozenset(device.members[share.member] for share in shares)

    def upload(self, fl_id: str, node: str) -> None:
        device, now, ledger = self.device(fl_id), self.now.iteration, self.ledgers[node]
        if device.sources is None:
            return  # an honest device has no mask yet
        accepted = self.run(
            self.cluster.accept_upload(
                now.number,
                now.attempt,
                device.number,
                fl_id,
                quorum=QUORUM,
                ledger_id=ledger,
                node_id=node,
                fit=True,
            )
        )
        if accepted is not None and accepted[0].value == "accepted":
            self.held.setdefault(ledger, set()).add(fl_id)

    def ask_list(self, fl_id: str) -> None:
        device = self.device(fl_id)
        answer = self.run(self.cipher.client_list(device.number, fl_id, completes=T + 1))
        if answer is not None and answer[0].outcome in (Outcome.COUNTED, Outcome.REPEATED):
            listed = tuple(sorted(answer[1]))
            device.lists.add(listed)
            self.lists.setdefault(device.number, set()).add(listed)

    def report(self, fl_id: str) -> None:
        """Tell for each source a share of one secret, as the newest list says."""
        device = self.device(fl_id)
        for listed in sorted(device.lists):
            shares = []
            for source in device.sources or ():
                kind = OWN if client_key(source) in listed else PAIRS
                shares.append(Share(device.members.index(source), 1, kind))
            told = self.run(self.cipher.report_secrets(device.number, fl_id, shares, completes=T + 1))
            if told is not None and told.outcome is Outcome.COUNTED:
                self.remember(device.number)

    # ---- servers

    def remember(self, number: int) -> None:
        """Look at all that Redis holds, as whoever reads it from now on may."""
        exchanged = self.run(self.cipher.material(number)).read()
        for report in exchanged.reports.values():
            for owner, (kind, _) in report.items():
                keys = bytes(exchanged.members[owner].s_pk)
                self.reports.setdefault((number, owner, keys), set()).add(kind)
        self.unmasked += len(exchanged.reports) > T

    def seal_and_sum(self) -> None:
        """The quorum is there: the sum is made and recorded."""
        now = self.now.iteration
        if self.run(self.cluster.seal(now.number, now.attempt, QUORUM)) or now.phase is Phase.SEALED:
            self.run(self.cluster.claim_reduction(now.number, now.attempt, "", "n1"))
        self.record(Phase.UNMASKING)

    def record(self, phase: Phase) -> None:
        now = self.now.iteration
        counted = len(self.run(self.cluster.uploads(now.number)))
        self.run(
            self.cluster.record_model(now.number, now.attempt, now.token, "d", counted, phase, exchanged=True)
        )

    def candidate(self) -> None:
        self.record(Phase.CANDIDATE)

    def succeed(self) -> None:
        now = self.now.iteration
        self.run(self.cluster.claim_reduction(now.number, now.attempt, now.token, "n2"))

    def reopen(self, node: str) -> None:
        """A ledger is lost, as far as servers know; what core forbids is not asked for."""
        now, ledger = self.now.iteration, self.ledgers[node]
        if now.phase is Phase.CANDIDATE:
            return
        asked = self.cluster.reopen(
            now.number, now.attempt, phase=now.phase, token=now.token, ledgers=[ledger]
        )
        if self.run(asked) is not None:
            self.reopened += 1
            self.held.pop(ledger, None)
            self.ledgers[node] = f"{ledger}+"
            self.run(self.cluster.own_ledger(self.ledgers[node], node))

    def advance(self) -> None:
        now = self.now.iteration
        ended = self.cluster.advance(
            now.number,
            now.attempt,
            phase=now.phase,
            success=now.phase is Phase.CANDIDATE,
            result="",
            finishes=False,
            token=now.token,
        )
        if self.run(ended):
            self.run(self.cipher.release(now.number))
            self.held.clear()

    # ---- Redis

    def lose(self, keep: int) -> None:
        """Redis forgets all, or the uploads, or one of them; servers bring back what they know."""
        known, number = self.now, self.now.iteration.number
        if keep == 0:
            pattern = f"{self.cluster.keys.prefix}*"
            for key in self.run(self.redis.command("KEYS", pattern)):
                self.run(self.redis.command("DEL", key))
        elif keep == 1:
            self.run(self.redis.command("DEL", self.cluster.keys.uploads(number)))
        else:
            for client in list(self.run(self.cluster.uploads(number)))[:1]:
                self.run(self.redis.command("HDEL", self.cluster.keys.uploads(number), client))
        self.run(self.cluster.raise_to(known))
        for node, ledger in self.ledgers.items():
            self.run(self.cluster.heartbeat("server", node, "address"))
            clients = {client_key(fl_id): ClientMeta(1, 0, 0) for fl_id in self.held.get(ledger, ())}
            self.run(self.cluster.restore_clients(number, ledger, node, clients, "b"))

    def check(self) -> None:
        for number, lists in self.lists.items():
            assert len(lists) == 1, f"devices were told of two lists in iteration {number}"
        for (number, owner, _), kinds in self.reports.items():
            assert len(kinds) == 1, f"both secrets of {owner} were told in iteration {number}"


def everybody(*steps: str) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    """Some of the clients do these things, one after the other, step by step."""
    clients = st.lists(st.sampled_from(CLIENTS), min_size=3, max_size=6, unique=True)
    return clients.map(lambda chosen: [(step, fl_id) for step in steps for fl_id in chosen])


CLIENT = st.sampled_from(CLIENTS)
NODE = st.sampled_from(["n1", "n2"])
EXCHANGE = everybody("select", "exchange", "get_keys", "share", "get_secrets")
UPLOADS = st.lists(st.tuples(st.just("upload"), CLIENT, NODE), min_size=1, max_size=6)
REPORTS = everybody("ask_list", "report")
SINGLE = st.one_of(
    st.tuples(
        st.sampled_from(
            ["renew", "select", "exchange", "get_keys", "share", "get_secrets", "ask_list", "report"]
        ),
        CLIENT,
    ),
    st.tuples(st.just("upload"), CLIENT, NODE),
    st.tuples(st.sampled_from(["seal_and_sum", "candidate", "succeed", "advance"])),
    st.tuples(st.just("reopen"), NODE),
    st.tuples(st.just("lose"), st.integers(0, 2)),
).map(lambda step: [step])
SUM = st.just([("seal_and_sum",)])
HISTORIES = st.lists(
    st.one_of(EXCHANGE, UPLOADS, SUM, REPORTS, SINGLE, SINGLE), min_size=3, max_size=25
) | st.tuples(EXCHANGE, UPLOADS, UPLOADS, SUM, REPORTS, SINGLE, REPORTS, SINGLE, REPORTS).map(list)
HISTORIES |= st.tuples(EXCHANGE, UPLOADS, UPLOADS, SUM, REPORTS, SINGLE, UPLOADS, SUM, REPORTS).map(list)


def play(loop: ReactorThread, redis: Redis, history: list[list[tuple[Any, ...]]]) -> World:
    world = World(loop, redis)
    for step, *given_ in itertools.chain.from_iterable(history):
        act: Callable[..., None] = getattr(world, step)
        act(*given_)
        world.check()
    return world


@settings(max_examples=60, deadline=None)
@given(history=HISTORIES)
def test_both_secrets_of_a_client_never_reach_the_servers(
    loop: ReactorThread, redis: Redis, history: list[list[tuple[Any, ...]]]
) -> None:
    play(loop, redis, history)


def test_such_a_history_can_come_to_an_end(loop: ReactorThread, redis: Redis) -> None:
    """A client drops out after it has shared, a ledger is lost, two clients go on; all of it in order."""
    steps: list[tuple[Any, ...]] = [
        (step, fl_id)
        for step in ("select", "exchange", "get_keys", "share", "get_secrets")
        for fl_id in CLIENTS
    ]
    steps += [("upload", "a", "n1"), ("upload", "b", "n2"), ("reopen", "n1")]
    steps += [("upload", "c", "n2"), ("upload", "d", "n2"), ("seal_and_sum",), ("reopen", "n2")]
    steps += [(step, fl_id) for step in ("ask_list", "report", "report") for fl_id in "abcd"]
    world = play(loop, redis, [steps])
    assert world.now.iteration.phase is Phase.UNMASKING and world.reopened == 1 and world.unmasked
    assert world.reports.keys() >= {(1, fl_id, world.devices[fl_id].keys) for fl_id in "abcd"}
    told = {owner: kinds for (_, owner, _), kinds in world.reports.items()}
    assert told["a"] == {PAIRS}, "its update is lost"
    assert told["b"] == told["c"] == told["d"] == {OWN}
    assert world.now.iteration == Iteration(
        1,
        attempt=2,
        phase=Phase.UNMASKING,
        selected=world.now.iteration.selected,
        uploaded=3,
        token=world.now.iteration.token,
        aggregate="d",
        base="b",
        lost=1,
    )
