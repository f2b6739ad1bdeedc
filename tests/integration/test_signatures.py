"""What Redis remembers of devices that sign: their keys, and which signatures they have used."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
from integration.redis_fixture import ReactorThread

from fedcore.core.admission import Selection
from fedcore.core.client_key import client_key
from fedcore.core.job import RunningState
from fedcore.store import keys
from fedcore.store.cluster_state import ClientMeta, ClusterState, Reserve, Use
from fedcore.store.redis import Redis

NOW = 1_700_000_000_000
MINUTE = 60_000
_jobs = itertools.count(1)


@dataclass
class Job:
    loop: ReactorThread
    redis: Redis
    state: ClusterState

    def use(
        self, signature: int, request: int, stamp: int = NOW, oldest: int = NOW - MINUTE, who: str = "x"
    ) -> Use:
        marks = signature.to_bytes(16), request.to_bytes(16)
        work = self.state.use_signature(who, *marks, stamp=stamp, oldest=oldest, lifetime_ms=2 * MINUTE)
        return self.loop.run(work)  # type: ignore[no-any-return]

    def command(self, *words: Any) -> Any:
        return self.loop.run(self.redis.command(*words))

    def select(self, key: str) -> Selection:
        meta = ClientMeta(10, 0, NOW, key)
        work = self.state.select_client(5, "x", meta, places=3, fit=True, reserve=Reserve(1, 1, 1))
        return self.loop.run(work)[0]  # type: ignore[no-any-return]

    def meta(self) -> ClientMeta | None:
        return self.loop.run(self.state.client_meta(5, "x"))  # type: ignore[no-any-return]


@pytest.fixture
def job(loop: ReactorThread, redis: Redis) -> Job:
    name = f"signing-{next(_jobs)}"
    job = Job(loop, redis, ClusterState(redis, name, "i_1", 300_000))
    loop.run(job.state.create(5, success=True, result="", running=RunningState.RUNNING, base="b"))
    return job


class TestUses:
    def test_a_signature_serves_one_request(self, job: Job) -> None:
        assert [job.use(1, 1), job.use(1, 1), job.use(1, 2)] == [Use.NEW, Use.REPEATED, Use.USED]
        assert [job.use(2, 2), job.use(1, 1), job.use(2, 1)] == [Use.NEW, Use.REPEATED, Use.USED]

    def test_clients_are_apart(self, job: Job) -> None:
        assert [job.use(1, 1), job.use(1, 2, who="y"), job.use(1, 2)] == [Use.NEW, Use.NEW, Use.USED]

    def test_instances_are_not(self, job: Job) -> None:
        job.use(1, 1)
        job.state = ClusterState(job.redis, job.state.keys.fl_name, "i_2", 300_000)
        assert job.use(1, 2) is Use.USED

    def test_bytes_of_any_value(self, job: Job) -> None:
        """Marks hold zeros, line ends and what looks like part of another record."""
        zero, ones = 0, (1 << 128) - 1
        assert [job.use(zero, ones), job.use(ones, zero)] == [Use.NEW, Use.NEW]
        assert [job.use(zero, ones), job.use(ones, zero)] == [Use.REPEATED, Use.REPEATED]

    def test_what_is_too_old_is_forgotten(self, job: Job) -> None:
        name = keys.signatures(job.state.keys.fl_name, client_key("x"))
        for number in range(50):
            assert (
                job.use(number, number, stamp=NOW + number * MINUTE, oldest=NOW + (number - 3) * MINUTE)
                is Use.NEW
            )
            assert job.command("STRLEN", name) <= 4 * 45
        assert 0 < job.command("PTTL", name) <= 2 * MINUTE
        assert job.use(46, 1, stamp=NOW + 50 * MINUTE, oldest=NOW + 46 * MINUTE) is Use.USED
        assert (
            job.use(45, 1, stamp=NOW + 45 * MINUTE, oldest=NOW + 46 * MINUTE) is Use.NEW
        )  # no server takes it

    def test_memory_is_bounded(self, job: Job) -> None:
        name = keys.signatures(job.state.keys.fl_name, client_key("x"))
        for number in range(keys.SIGNATURES_KEPT + 10):
            assert job.use(number, 1) is Use.NEW
        assert job.command("STRLEN", name) == 45 * keys.SIGNATURES_KEPT
        assert job.use(keys.SIGNATURES_KEPT + 9, 2) is Use.USED
        assert job.use(10, 2) is Use.USED


class TestKeys:
    def test_a_key_is_kept_with_its_place(self, job: Job) -> None:
        assert job.meta() is None
        assert [job.select("K1"), job.select("K1"), job.select("K2"), job.select("")] == [
            Selection.SELECTED,
            Selection.KNOWN,
            Selection.OTHER_KEY,
            Selection.OTHER_KEY,
        ]
        assert job.meta() == ClientMeta(10, 0, NOW, "K1")

    def test_without_keys_all_is_as_before(self, job: Job) -> None:
        assert [job.select(""), job.select("")] == [Selection.SELECTED, Selection.KNOWN]
        assert ClientMeta(10, 0, NOW).pack() == f"10,0,{NOW}"

    def test_a_key_is_brought_back_with_its_place(self, job: Job) -> None:
        places = {client_key("x"): ClientMeta(10, 0, NOW, "K1")}
        job.loop.run(job.state.restore_clients(5, "", "node", places))
        assert [job.select("K1"), job.select("K2")] == [Selection.KNOWN, Selection.OTHER_KEY]
        assert job.meta() == ClientMeta(10, 0, NOW, "K1")

    def test_who_was_brought_back_from_a_ledger_has_uploaded(self, job: Job) -> None:
        job.loop.run(job.state.own_ledger("L", "node"))
        job.loop.run(job.state.restore_clients(5, "L", "node", {client_key("x"): ClientMeta(10, 0, 0)}))
        assert job.select("K1") is Selection.UPLOADED
