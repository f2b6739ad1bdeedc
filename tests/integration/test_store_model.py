"""The simulated shared state of the model tests against the scripts in a real Redis: they answer alike."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from integration.redis_fixture import ReactorThread
from model import cluster as simulated

from fedcore.core.client_key import client_key
from fedcore.core.iteration import Iteration, Phase
from fedcore.core.job import RunningState
from fedcore.store.cluster_state import (
    ClientMeta,
    ClusterState,
    IterationMoved,
    LeaseLapsed,
    LedgerRevoked,
    OthersAwaited,
    Reserve,
    Snapshot,
    StateMissing,
    claim_instance,
)
from fedcore.store.instances import disable, enable, new_instance
from fedcore.store.keys import DOUBT_S, HOLD_OFF_S
from fedcore.store.redis import Redis

_jobs = itertools.count(1)
RESERVES = [Reserve(60_000, 120_000, 5_000), Reserve(60_000, 1_000, 5_000)]
CLIENTS = st.sampled_from(["a", "b", "c", "d", "e", "f"])
AROUND = st.sampled_from([0, 0, 0, 0, -1, 1])
COUNTS = st.integers(1, 3)
PHASES = st.sampled_from(Phase)
LEDGERS = st.sampled_from(["L1", "L2"])
NODES = st.sampled_from(["n1", "n2"])
FIRST_OWNERS = {"L1": "n1", "L2": "n2"}
INSTANCES = st.sampled_from(["i_1", "i_2", "i_3"])
BASES = st.sampled_from(["", "b1", "b2"])
AHEAD = st.sampled_from([0, 0, 0, 1])
LAST_ITERATION = 2
WINDOW_MS = 1000
NEVER_MS = 1 << 42  # a time that does not come


class Both:
    """One job in both worlds, in which at first each of two living servers has a ledger.

    Attributes:
        real: the instance of the job in whose name everything happens.
        simulated: the same one.
        store: all instances, simulated.
    """

    def __init__(self, loop: ReactorThread, redis: Redis) -> None:
        self.loop = loop
        self.redis = redis
        self.fl_name = f"twin{next(_jobs)}"
        self.store = simulated.Store(lambda: 0.0, lambda word: None)
        self.turn_to("i_1")

    def turn_to(self, instance: str) -> None:
        """Act in the name of an instance from now on."""
        self.real = ClusterState(self.redis, self.fl_name, instance, WINDOW_MS)
        self.simulated = self.store.at(instance)
        for ledger, node in FIRST_OWNERS.items():
            self.run(self.real.own_ledger(ledger, node))
            self.simulated.own_ledger(ledger, node)
            self.beat(node)

    def run(self, work: Any) -> Any:
        """Give the answer, as the words of the scripts."""
        try:
            return self.loop.run(work)
        except StateMissing:
            return "missing"
        except IterationMoved as moved:
            return "closed", moved.number
        except LedgerRevoked:
            return "revoked"
        except LeaseLapsed:
            return "lapsed"
        except OthersAwaited:
            return "awaited"

    def beat(self, node: str) -> None:
        """A heart beats, and the lease does not run out by itself."""
        self.run(self.real.heartbeat("server", node, "address"))
        self.run(self.real.redis.command("PERSIST", self.real.keys.heartbeat("server", node)))
        self.simulated.heartbeat(node)

    @property
    def number(self) -> int:
        status = self.simulated.status
        return 1 if status is None else status.number

    @property
    def attempt(self) -> int:
        status = self.simulated.status
        return 1 if status is None else status.attempt

    @property
    def token(self) -> str:
        status = self.simulated.status
        return "" if status is None else status.token

    def draw_place(self, data: st.DataObject) -> tuple[int, int]:
        """Iteration and attempt, most often those that the state is in."""
        return self.number + data.draw(AROUND), self.attempt + data.draw(AHEAD)

    def draw_token(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from([self.token] * 4 + ["", "1:n1"]))  # type: ignore[no-any-return]

    def draw_phase(self, data: st.DataObject) -> Phase:
        return data.draw(st.sampled_from([self.phase] * 4 + [*Phase]))  # type: ignore[no-any-return]

    @property
    def phase(self) -> Phase:
        status = self.simulated.status
        return Phase.COLLECTING if status is None else status.phase

    # ---- one operation each, with what both answered

    def create(self, data: st.DataObject) -> tuple[Any, Any]:
        number, running = (
            data.draw(COUNTS),
            data.draw(st.sampled_from([RunningState.RUNNING] * 3 + [*RunningState])),
        )
        base = data.draw(BASES)
        real = self.run(self.real.create(number, success=False, result="r", running=running, base=base))
        return real, self.simulated.create_status(number, False, "r", running, base)

    def read(self, data: st.DataObject) -> tuple[Any, Any]:
        look, (name, seen) = self.run(self.real.read()), self.store.read(self.real.keys.instance)
        snapshot = look.snapshot
        if seen is None or snapshot is None:
            return (look.instance, snapshot), (name, seen)
        real = (
            look.instance,
            snapshot.iteration,
            [ago is None for ago in (snapshot.started_ago, snapshot.first_upload_ago, snapshot.sealed_ago)],
            (snapshot.fence, snapshot.epoch, snapshot.success, snapshot.result, snapshot.typical is None),
            snapshot.run,
        )
        return real, (
            name,
            seen.iteration,
            [moment is None for moment in (seen.started, seen.first_upload, seen.sealed)],
            (seen.fence, seen.epoch, seen.success, seen.result, seen.typical is None),
            seen.run,
        )

    @property
    def elsewhere(self) -> bool:
        """Whether the job has another instance than the one in whose name everything happens."""
        return self.store.name not in ("", self.real.keys.instance)

    def select(self, data: st.DataObject) -> tuple[Any, Any]:
        number, fl_id, places = self.number + data.draw(AROUND), data.draw(CLIENTS), data.draw(COUNTS)
        fit, reserve = data.draw(st.sampled_from([True, True, False])), data.draw(st.sampled_from(RESERVES))
        meta = ClientMeta(places, 0, 0)
        real = self.run(self.real.select_client(number, fl_id, meta, places=places, fit=fit, reserve=reserve))
        if self.elsewhere:
            return real, "missing"
        word, count = self.simulated.select_client(
            number,
            fl_id,
            meta.pack(),
            places,
            fit,
            simulated.Reserve(*reserve),
            self.redis.run_id,
            HOLD_OFF_S,
        )
        return real, word if word in ("missing", "awaited") else (word, count)

    def reserve(self, data: st.DataObject) -> tuple[Any, Any]:
        fl_id, places, reserve = data.draw(CLIENTS), data.draw(COUNTS), data.draw(st.sampled_from(RESERVES))
        real = self.run(self.real.reserve_place(fl_id, places=places, reserve=reserve))
        return real, self.simulated.reserve_place(fl_id, places, reserve.returns_ms, reserve.after_ms)

    def restore_waiting(self, data: st.DataObject) -> tuple[Any, Any]:
        number, places = self.number + data.draw(AROUND), data.draw(COUNTS)
        known = data.draw(st.dictionaries(CLIENTS, st.sampled_from([20_000, 90_000])))
        waiting = {client_key(fl_id): Reserve(returns, 0, 5_000) for fl_id, returns in known.items()}
        real = self.run(self.real.restore_waiting(number, waiting, places=places))
        kept = {client: (it.returns_ms, it.after_ms) for client, it in waiting.items()}
        return real, self.simulated.restore_waiting(number, kept, places)

    def accept(self, data: st.DataObject) -> tuple[Any, Any]:
        number, attempt = self.draw_place(data)
        requested = number + data.draw(AROUND)
        fl_id, quorum, ledger = data.draw(CLIENTS), data.draw(COUNTS), data.draw(LEDGERS)
        usual = self.simulated.owners.get(ledger) or FIRST_OWNERS[ledger]
        node = data.draw(st.sampled_from([usual, usual, usual, "n1", "n2"]))
        fit, again = data.draw(st.sampled_from([True, True, False])), data.draw(st.booleans())
        given = {"quorum": quorum, "ledger_id": ledger, "node_id": node, "fit": fit, "again": again}
        real = self.run(self.real.accept_upload(number, attempt, requested, fl_id, **given))
        if self.elsewhere:
            return real, "missing"
        word, count, text = self.simulated.accept_upload(
            number,
            attempt,
            requested,
            fl_id,
            quorum,
            ledger,
            node,
            fit,
            again,
            self.redis.run_id,
            HOLD_OFF_S,
        )
        if word in ("missing", "revoked", "lapsed", "awaited"):
            return real, word
        if word == "closed":
            return real, (word, count)
        return real, (word, count, ClientMeta.unpack(text.encode()) if word == "accepted" else None)

    def seal(self, data: st.DataObject) -> tuple[Any, Any]:
        place, quorum = self.draw_place(data), data.draw(st.sampled_from([0, 0, 0, 1, 2]))
        return self.run(self.real.seal(*place, quorum)), self.simulated.seal(*place, quorum)

    def record(self, data: st.DataObject) -> tuple[Any, Any]:
        place, token = self.draw_place(data), self.draw_token(data)
        updates = data.draw(st.integers(0, 3))
        phase = data.draw(st.sampled_from([Phase.CANDIDATE, Phase.TRAINING, Phase.UNMASKING]))
        exchanged = data.draw(st.booleans())
        real = self.run(self.real.record_model(*place, token, "d1", updates, phase, exchanged=exchanged))
        run = self.redis.run_id if exchanged else ""
        return real, self.simulated.record_model(*place, token, "d1", updates, phase, run)

    def push_weight(self, data: st.DataObject) -> tuple[Any, Any]:
        place, digest = self.draw_place(data), data.draw(st.sampled_from(["d2", "d3"]))
        aggregate = data.draw(st.sampled_from(["d1", "d1", "d4"]))
        real = self.run(self.real.push_weight(*place, aggregate, digest))
        done = self.simulated.push_weight(*place, aggregate, digest, self.redis.run_id, DOUBT_S)
        return real, "awaited" if done < 0 else bool(done)

    def push_metrics(self, data: st.DataObject) -> tuple[Any, Any]:
        place = self.draw_place(data)
        return self.run(self.real.push_metrics(*place, 0.5, 0.75)), self.simulated.push_metrics(
            *place, 0.5, 0.75
        )

    def claim(self, data: st.DataObject) -> tuple[Any, Any]:
        place, token, node = self.draw_place(data), self.draw_token(data), data.draw(NODES)
        real = self.run(self.real.claim_reduction(*place, token, node))
        return real, self.simulated.claim_reduction(*place, token, node)

    def reopen(self, data: st.DataObject) -> tuple[Any, Any]:
        place, phase, token = self.draw_place(data), self.draw_phase(data), self.draw_token(data)
        ledgers = data.draw(st.lists(LEDGERS, unique=True))
        real = self.run(self.real.reopen(*place, phase=phase, token=token, ledgers=ledgers))
        return real, self.simulated.reopen(*place, phase, token, ledgers)

    def advance(self, data: st.DataObject) -> tuple[Any, Any]:
        number, attempt = self.draw_place(data)
        success, finishes = data.draw(st.booleans()), data.draw(st.sampled_from([False, False, False, True]))
        phase, token, base = self.draw_phase(data), self.draw_token(data), data.draw(BASES)
        end = {"phase": phase, "success": success, "result": "x", "finishes": finishes}
        real = self.run(self.real.advance(number, attempt, **end, token=token, base=base))
        return real, self.simulated.advance(number, attempt, **end, token=token, base=base)

    def rebase(self, data: st.DataObject) -> tuple[Any, Any]:
        status = self.simulated.status
        named = "" if status is None else status.base
        before, after = data.draw(st.sampled_from([named, named, "b1"])), data.draw(BASES)
        number = self.number + data.draw(AROUND)
        end = {"result": "gone", "finishes": data.draw(st.sampled_from([False, False, True]))}
        real = self.run(self.real.rebase(number, before, after, **end))
        return real, self.simulated.rebase(number, before, after, **end)

    def finish(self, data: st.DataObject) -> tuple[Any, Any]:
        number = self.number + data.draw(AROUND)
        return self.run(self.real.finish(number)), self.simulated.finish(number)

    def forgive(self, data: st.DataObject) -> tuple[Any, Any]:
        if self.simulated.status is not None:
            self.run(self.real.forget_interruption())
            self.simulated.forget_interruption()
        return None, None

    # ---- after a loss

    def raise_to(self, data: st.DataObject) -> tuple[Any, Any]:
        phase = data.draw(PHASES)
        iteration = Iteration(
            self.number + data.draw(AROUND),
            max(1, self.attempt + data.draw(AROUND)),
            phase,
            data.draw(st.sampled_from(RunningState)),
            token="3:n1" if phase in (Phase.REDUCING, Phase.CANDIDATE) else "",
            digest=data.draw(st.sampled_from(["", "d1"])),
            base=data.draw(BASES),
            lost=data.draw(st.integers(0, 2)),
            interrupted=data.draw(st.booleans()),
        )
        moments = [data.draw(st.sampled_from([None, 0.0])) for _ in range(3)]  # now, by both clocks
        rest = (data.draw(st.integers(0, 12)), data.draw(st.integers(0, 2)), data.draw(st.booleans()), "z")
        typical = data.draw(st.sampled_from([None, 2.0]))
        real = self.run(self.real.raise_to(Snapshot(iteration, *moments, *rest, typical=typical)))
        seen = simulated.Seen(iteration, *moments, *rest, typical)
        return real, self.store.raise_status(self.real.keys.instance, seen)

    def restore(self, data: st.DataObject) -> tuple[Any, Any]:
        number, ledger = self.number + data.draw(AROUND), data.draw(st.sampled_from(["", "L1", "L2"]))
        node = data.draw(st.sampled_from([FIRST_OWNERS.get(ledger, "n1")] * 3 + ["n1", "n2"]))
        meta = ClientMeta(9, data.draw(COUNTS), 0)
        clients = {client_key(fl_id): meta for fl_id in data.draw(st.lists(CLIENTS, unique=True))}
        real = self.run(self.real.restore_clients(number, ledger, node, clients))
        packed = {client: meta.pack() for client in clients}
        word, count = self.simulated.restore_clients(number, ledger, node, packed)
        return real, {"closed": ("closed", 0), "revoked": None, "restored": count}[word]

    # ---- instances

    def name(self, data: st.DataObject) -> tuple[Any, Any]:
        proposed = data.draw(INSTANCES)
        real = self.run(claim_instance(self.redis, self.fl_name, proposed, 60))
        return real, self.store.claim_instance(proposed)

    def turn(self, data: st.DataObject) -> tuple[Any, Any]:
        self.turn_to(data.draw(INSTANCES))
        return None, None

    def new_instance(self, data: st.DataObject) -> tuple[Any, Any]:
        current = data.draw(st.sampled_from([self.store.name or "i_3"] * 3 + ["i_1", "i_2"]))
        name = data.draw(INSTANCES)
        real = self.run(new_instance(self.redis, self.fl_name, current, name, {}, 60))
        return real, self.store.new_instance(current, name)

    def disable(self, data: st.DataObject) -> tuple[Any, Any]:
        return self.run(
            disable(self.redis, self.fl_name, self.real.keys.instance, 60)
        ), self.simulated.disable()

    def enable(self, data: st.DataObject) -> tuple[Any, Any]:
        real = self.run(enable(self.redis, self.fl_name, self.real.keys.instance, LAST_ITERATION, 60))
        return real, self.simulated.enable(LAST_ITERATION)

    # ---- what is where

    def uploads(self, data: st.DataObject) -> tuple[Any, Any]:
        number = self.number + data.draw(AROUND)
        return self.run(self.real.uploads(number)), self.simulated.uploads_of(number)

    def count(self, data: st.DataObject) -> tuple[Any, Any]:
        number = self.number + data.draw(AROUND)
        return self.run(self.real.uploads_by_ledger(number)), self.simulated.count_by_ledger(number)

    def own(self, data: st.DataObject) -> tuple[Any, Any]:
        ledger, node = data.draw(LEDGERS), data.draw(NODES)
        before = data.draw(st.sampled_from(["", "n1", "n2", "n3"]))
        real = self.run(self.real.own_ledger(ledger, node, before))
        return real, self.simulated.own_ledger(ledger, node, before)

    def owner(self, data: st.DataObject) -> tuple[Any, Any]:
        ledger = data.draw(LEDGERS)
        return self.run(self.real.ledger_owner(ledger)), self.simulated.ledger_owner(ledger)

    def owners(self, data: st.DataObject) -> tuple[Any, Any]:
        return self.run(self.real.ledgers()), self.simulated.ledgers()

    def forget(self, data: st.DataObject) -> tuple[Any, Any]:
        ledger = data.draw(LEDGERS)
        self.run(self.real.forget_ledger(ledger))
        self.simulated.forget_ledger(ledger)
        return None, None

    def live_or_die(self, data: st.DataObject) -> tuple[Any, Any]:
        node = data.draw(NODES)
        if data.draw(st.booleans()):
            self.beat(node)
        else:
            self.run(self.real.leave("server", node))
            self.simulated.leave(node)
        node = data.draw(NODES)
        return self.run(self.real.is_alive("server", node)), self.simulated.is_alive(node)

    def counted(self, data: st.DataObject) -> tuple[Any, Any]:
        number, ledger = self.number + data.draw(AROUND), data.draw(LEDGERS)
        fl_ids = data.draw(st.lists(CLIENTS, max_size=5))
        expected = self.simulated.counted(number, ledger, fl_ids)
        real = self.run(self.real.counted(number, ledger, fl_ids))
        return real, {fl_id: ClientMeta.unpack(text.encode()) for fl_id, text in expected.items()}

    def lose_and_bring_back(self, data: st.DataObject) -> tuple[Any, Any]:
        """Somebody is awaited until it says that it is back; no clock decides."""
        run_id, node = self.redis.run_id, data.draw(NODES)
        if data.draw(st.booleans()):
            self.run(self.real.redis.command("HSETNX", self.real.keys.awaited(run_id), node, NEVER_MS))
            self.simulated.awaited.setdefault(run_id, {}).setdefault(node, float("inf"))
        else:
            self.run(self.real.nodes_are_back(run_id, node, [node]))
            self.simulated.nodes_are_back(run_id, node, [node])
        roll = self.run(self.real.roll())
        return (roll.back, roll.awaited), self.simulated.roll(run_id)[:2]

    def switch(self, data: st.DataObject) -> tuple[Any, Any]:
        """What somebody writes who knows only the protocol's fields, and attempts that begin elsewhere."""
        status = self.simulated.status
        if status is not None:
            status.running = data.draw(st.sampled_from([RunningState.RUNNING] * 3 + [*RunningState]))
            status.attempt = data.draw(st.sampled_from([status.attempt] * 4 + [status.attempt + 1]))
            words = ["runningState", int(status.running), "attempt", status.attempt]
            self.run(self.real.redis.command("HSET", self.real.keys.status, *words))
        return None, None


OPERATIONS = [
    Both.name,
    Both.turn,
    Both.new_instance,
    Both.disable,
    Both.enable,
    Both.enable,
    Both.seal,
    Both.seal,
    Both.claim,
    Both.claim,
    Both.push_weight,
    Both.push_metrics,
    Both.reopen,
    Both.rebase,
    Both.rebase,
    Both.finish,
    Both.forgive,
    Both.owners,
    Both.raise_to,
    Both.restore,
    Both.uploads,
    Both.create,
    Both.read,
    Both.select,
    Both.select,
    Both.select,
    Both.reserve,
    Both.restore_waiting,
    Both.accept,
    Both.accept,
    Both.accept,
    Both.record,
    Both.record,
    Both.advance,
    Both.count,
    Both.counted,
    Both.own,
    Both.owner,
    Both.forget,
    Both.live_or_die,
    Both.lose_and_bring_back,
    Both.switch,
]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_simulated_state_answers_as_the_scripts_do(
    loop: ReactorThread, redis: Redis, data: st.DataObject
) -> None:
    both = Both(loop, redis)
    if data.draw(st.sampled_from([True, True, True, False])):
        assert all(both.create(data))
    for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), min_size=10, max_size=60)):
        real, expected = operation(both, data)
        assert real == expected, operation.__name__
