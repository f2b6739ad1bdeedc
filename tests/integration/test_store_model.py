"""The simulated shared state of the model tests against the scripts in a real Redis: they answer alike."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from integration.redis_fixture import ReactorThread
from model import cluster as simulated

from fedcore.core.iteration import Iteration, Phase
from fedcore.core.job import RunningState
from fedcore.store.cluster_state import (
    ClientMeta,
    ClusterState,
    IterationMoved,
    LeaseLapsed,
    LedgerRevoked,
    Reserve,
    StateMissing,
)
from fedcore.store.redis import Redis

_jobs = itertools.count(1)
RESERVES = [Reserve(60_000, 120_000, 5_000), Reserve(60_000, 1_000, 5_000)]
CLIENTS = st.sampled_from(["a", "b", "c", "d"])
AROUND = st.sampled_from([0, 0, 0, 0, -1, 1])
COUNTS = st.integers(1, 3)
PHASES = st.sampled_from(Phase)
LEDGERS = st.sampled_from(["L1", "L2"])
NODES = st.sampled_from(["n1", "n2"])
FIRST_OWNERS = {"L1": "n1", "L2": "n2"}


class Both:
    """One job in both worlds, in which at first each of two living servers has a ledger."""

    def __init__(self, loop: ReactorThread, redis: Redis) -> None:
        self.loop = loop
        self.real = ClusterState(redis, f"twin{next(_jobs)}", "i_1", 1000)
        self.simulated = simulated.SharedState(lambda: 0.0)
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
    def phase(self) -> Phase:
        status = self.simulated.status
        return Phase.COLLECTING if status is None else status.phase

    # ---- one operation each, with what both answered

    def create(self, data: st.DataObject) -> tuple[Any, Any]:
        number, running = (
            data.draw(COUNTS),
            data.draw(st.sampled_from([RunningState.RUNNING] * 3 + [*RunningState])),
        )
        real = self.run(self.real.create(number, success=False, result="r", running=running))
        return real, self.simulated.create(number, False, "r", running)

    def read(self, data: st.DataObject) -> tuple[Any, Any]:
        snapshot, seen = self.run(self.real.read()), self.simulated.read()
        if seen is None:
            return snapshot, None
        status, selected, uploaded = seen
        expected = Iteration(
            status.number,
            status.attempt,
            status.phase,
            status.running,
            selected,
            uploaded,
            digest=status.digest,
        )
        real = (
            snapshot.iteration,
            snapshot.started_ago is None,
            snapshot.first_upload_ago is None,
            snapshot.token,
            snapshot.success,
            snapshot.result,
        )
        clocks = (status.started is None, status.first_upload is None)
        return real, (expected, *clocks, status.token, status.success, status.result)

    def select(self, data: st.DataObject) -> tuple[Any, Any]:
        number, fl_id, places = self.number + data.draw(AROUND), data.draw(CLIENTS), data.draw(COUNTS)
        fit, reserve = data.draw(st.sampled_from([True, True, False])), data.draw(st.sampled_from(RESERVES))
        meta = ClientMeta(places, 0, 0)
        real = self.run(self.real.select_client(number, fl_id, meta, places=places, fit=fit, reserve=reserve))
        word, count = self.simulated.select_client(
            number, fl_id, meta.pack(), places, fit, simulated.Reserve(*reserve)
        )
        return real, "missing" if word == "missing" else (word, count)

    def accept(self, data: st.DataObject) -> tuple[Any, Any]:
        number, attempt = (
            self.number + data.draw(AROUND),
            self.attempt + data.draw(st.sampled_from([0, 0, 0, 1])),
        )
        requested = number + data.draw(AROUND)
        fl_id, quorum, ledger = data.draw(CLIENTS), data.draw(COUNTS), data.draw(LEDGERS)
        usual = self.simulated.owners.get(ledger) or FIRST_OWNERS[ledger]
        node = data.draw(st.sampled_from([usual, usual, usual, "n1", "n2"]))
        fit = data.draw(st.sampled_from([True, True, False]))
        real = self.run(
            self.real.accept_upload(
                number, attempt, requested, fl_id, quorum=quorum, ledger_id=ledger, node_id=node, fit=fit
            )
        )
        word, count, text = self.simulated.accept_upload(
            number, attempt, requested, fl_id, quorum, ledger, node, fit
        )
        if word in ("missing", "revoked", "lapsed"):
            return real, word
        if word == "closed":
            return real, (word, count)
        return real, (word, count, ClientMeta.unpack(text.encode()) if word == "accepted" else None)

    def set_phase(self, data: st.DataObject) -> tuple[Any, Any]:
        number, attempt = (
            self.number + data.draw(AROUND),
            self.attempt + data.draw(st.sampled_from([0, 0, 0, 1])),
        )
        before, after = data.draw(st.sampled_from([self.phase, self.phase, *Phase])), data.draw(PHASES)
        fields = data.draw(st.sampled_from([{}, {"token": "n1"}, {"digest": "d1"}]))
        real = self.run(self.real.set_phase(number, attempt, before, after, fields))
        return real, self.simulated.set_phase(number, attempt, before, after, **fields)

    def advance(self, data: st.DataObject) -> tuple[Any, Any]:
        number, attempt = (
            self.number + data.draw(AROUND),
            self.attempt + data.draw(st.sampled_from([0, 0, 0, 1])),
        )
        success, finishes = data.draw(st.booleans()), data.draw(st.sampled_from([False, False, False, True]))
        phase = data.draw(st.sampled_from([self.phase] * 4 + [*Phase]))
        real = self.run(
            self.real.advance(number, attempt, phase=phase, success=success, result="x", finishes=finishes)
        )
        return real, self.simulated.advance(number, attempt, phase, success, "x", finishes)

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
        return self.run(self.real.ledger_owner(ledger)), self.simulated.owners.get(ledger, "")

    def forget(self, data: st.DataObject) -> tuple[Any, Any]:
        ledger = data.draw(LEDGERS)
        self.run(self.real.forget_ledger(ledger))
        self.simulated.owners.pop(ledger, None)
        return None, None

    def live_or_die(self, data: st.DataObject) -> tuple[Any, Any]:
        node = data.draw(NODES)
        if data.draw(st.booleans()):
            self.beat(node)
        else:
            self.run(self.real.leave("server", node))
            self.simulated.leases.discard(node)
        node = data.draw(NODES)
        return self.run(self.real.is_alive("server", node)), node in self.simulated.leases

    def counted(self, data: st.DataObject) -> tuple[Any, Any]:
        number, ledger = self.number + data.draw(AROUND), data.draw(LEDGERS)
        fl_ids = data.draw(st.lists(CLIENTS, max_size=5))
        expected = self.simulated.counted(number, ledger, fl_ids)
        real = self.run(self.real.counted(number, ledger, fl_ids))
        return real, {fl_id: ClientMeta.unpack(text.encode()) for fl_id, text in expected.items()}

    def switch(self, data: st.DataObject) -> tuple[Any, Any]:
        """What the operator and a later undoing of seals write."""
        status = self.simulated.status
        if status is not None:
            status.running = data.draw(st.sampled_from([RunningState.RUNNING] * 3 + [*RunningState]))
            status.attempt = data.draw(st.sampled_from([status.attempt] * 4 + [status.attempt + 1]))
            words = ["runningState", int(status.running), "attempt", status.attempt]
            self.run(self.real.redis.command("HSET", self.real.keys.status, *words))
        return None, None


OPERATIONS = [
    Both.create,
    Both.read,
    Both.select,
    Both.select,
    Both.select,
    Both.accept,
    Both.accept,
    Both.accept,
    Both.set_phase,
    Both.advance,
    Both.count,
    Both.counted,
    Both.own,
    Both.owner,
    Both.forget,
    Both.live_or_die,
    Both.switch,
]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_simulated_state_answers_as_the_scripts_do(
    loop: ReactorThread, redis: Redis, data: st.DataObject
) -> None:
    both = Both(loop, redis)
    for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), min_size=5, max_size=40)):
        real, expected = operation(both, data)
        assert real == expected, operation.__name__
