"""What the driver, and what works for it, do about a Redis that was away, has lost data, or has another clock.

The servers are real, in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from model.cluster import key_of
from model.job_in_memory import TIMEOUTS, Job, in_the_middle
from model.server_in_memory import CLIENTS, HOLD_S, Server
from twisted.logger import globalLogPublisher

from fedcore.core.iteration import Iteration
from fedcore.services.answers import Answer
from fedcore.store.keys import DOUBT_S


@pytest.fixture
def jobs() -> Iterator[Callable[..., Job]]:
    """Makes jobs, and closes them."""
    made: list[Job] = []

    def make(*hosts: int) -> Job:
        made.append(Job(hosts or (1,)))
        made[-1].pass_time(1.0)
        return made[-1]

    yield make
    for job in made:
        job.close()


@pytest.fixture
def errors() -> Iterator[list[str]]:
    """What is logged of updates that were lost."""
    logged: list[str] = []

    def observe(event: Any) -> None:
        if "are lost" in (event.get("log_format") or ""):
            logged.append(event["log_format"].format(**event))

    globalLogPublisher.addObserver(observe)
    yield logged
    globalLogPublisher.removeObserver(observe)


def only(job: Job) -> Server:
    (server,) = job.living
    return server


def lost(server: Server) -> float | None:
    metrics = server.driver._parts.metrics
    return metrics.registry.get_sample_value("fl_updates_lost_total")


def events(server: Server) -> list[str]:
    path = server.host.directory / "event.txt"
    return [line for line in path.read_text().splitlines() if "accepted updates" in line]


def one_update(job: Job, *fl_ids: str) -> None:
    """Devices take part in iteration 1; the first one's update is accepted."""
    for fl_id in fl_ids:
        job.device_starts(fl_id)
    job.settle()
    job.device_uploads(fl_ids[0])
    job.settle()
    assert job.promised[1] == {fl_ids[0]}


class TestHeldRequests:
    def test_go_on_when_redis_is_back(self, jobs: Callable[..., Job]) -> None:
        job = jobs()
        server = only(job)
        server.lose_redis()
        asked = server.start_client("c0")
        job.pass_time(0.5)
        assert not asked.answer.called
        server.redis.come_back()
        job.settle()
        assert asked.answer.called, "no time had to pass"
        assert isinstance(asked.answer.result, Answer) and asked.answer.result.code == 200

    def test_go_on_though_an_effect_was_under_way(self, jobs: Callable[..., Job]) -> None:
        """Which cannot be looked past while it waits for Redis itself."""
        job = jobs()
        server = only(job)
        for fl_id in CLIENTS[:2]:
            job.device_starts(fl_id)
        job.settle()
        server.driver.busy = True
        asked = server.start_client("c2")
        server.lose_redis()
        job.pass_time(0.5)
        assert not asked.answer.called
        server.driver.busy = False
        server.redis.come_back()
        job.settle()
        assert asked.answer.called and asked.answer.result.code == 200

    def test_go_on_when_there_is_a_ledger_again(self, jobs: Callable[..., Job]) -> None:
        job = jobs()
        server = only(job)
        server.ledgers.discard()
        asked = server.start_client("c0")
        job.pass_time(1.0)
        assert asked.answer.called and asked.answer.result.code == 200
        assert HOLD_S > 1.0


class TestAnInstanceThatRedisLost:
    """A new instance was begun, and a fail-over lost that it was: the old one goes on.

    The server has watched for long enough to know that there is no other.
    """

    @pytest.mark.parametrize("moves", range(0, 24, 2))
    def test_nothing_is_lost(self, jobs: Callable[..., Job], moves: int) -> None:
        job = jobs()
        job.pass_time(DOUBT_S + 1.0)
        server = only(job)
        one_update(job, *CLIENTS[:3])
        before = job.store.copy()
        assert job.store.new_instance(job.store.name, "i_new")
        job.moves(moves)
        if server.driver.cluster is not None and server.driver.cluster.keys.instance == "i_new":
            pytest.skip("it has taken part in the new one, which is told to Redis again")
        server.lose_redis()
        job.store.fail_over(before)
        server.redis.come_back()
        job.pass_time(2.0)
        assert job.store.name == "i_001"
        assert server.ledgers.own is not None and server.ledgers.own.clients().keys() == {
            bytes.fromhex(key_of(CLIENTS[0]))
        }
        job.device_uploads(CLIENTS[1])
        job.pass_time(3.0)
        assert job.published == {1: frozenset(CLIENTS[:2])}

    @pytest.mark.parametrize("moves", range(0, 24, 2))
    def test_what_redis_lost_of_the_old_one_as_well_is_there_again(
        self, jobs: Callable[..., Job], moves: int
    ) -> None:
        job = jobs()
        job.pass_time(DOUBT_S + 1.0)
        server = only(job)
        before = job.store.copy()
        one_update(job, *CLIENTS[:3])
        assert job.store.new_instance(job.store.name, "i_new")
        job.moves(moves)
        if server.driver.cluster is not None and server.driver.cluster.keys.instance == "i_new":
            pytest.skip("it has taken part in the new one, which is told to Redis again")
        server.lose_redis()
        job.store.fail_over(before)
        server.redis.come_back()
        job.pass_time(2.0)
        assert set(job.shared.uploads_of(1)) == {key_of(CLIENTS[0])}
        job.device_uploads(CLIENTS[1])
        job.pass_time(3.0)
        assert job.published == {1: frozenset(CLIENTS[:2])}

    def test_one_that_was_taken_part_in_is_told_to_redis_again(self, jobs: Callable[..., Job]) -> None:
        job = jobs()
        server = only(job)
        before = job.store.copy()
        assert job.store.new_instance(job.store.name, "i_new")
        job.pass_time(2.0)
        server.lose_redis()
        job.store.fail_over(before)
        server.redis.come_back()
        job.pass_time(2.0)
        assert job.store.name == "i_new"


class TestUpdatesThatComeBackTooLate:
    def gone_on(self, jobs: Callable[..., Job]) -> Job:
        """Two hosts; A is cut off with an update, Redis loses all, and B goes on with other clients."""
        job = jobs(1, 2)
        one_update(job, "c0", "c1", "c3", "c5")
        a, b = job.living
        a.lose_redis()
        b.lose_redis()
        job.network.silent = True
        job.store.fail_over(None)
        b.redis.come_back()
        job.pass_time(12.0)
        return job

    def test_are_told_with_numbers_once(self, jobs: Callable[..., Job], errors: list[str]) -> None:
        job = self.gone_on(jobs)
        a, b = job.living
        for fl_id in ("c1", "c3", "c5"):
            b.start_client(fl_id)
            job.settle()
            b.upload(fl_id, 1)
            job.settle()
        job.pass_time(2.0)
        assert set(job.published) == {1} and "c0" not in job.published[1]
        job.network.silent = False
        for _ in range(3):
            a.redis.come_back()
            job.pass_time(2.0)
            a.lose_redis()
            job.store.run += 1
        assert lost(a) == 1 and lost(b) == 0
        assert errors == [
            "1 accepted updates of iteration 1 are lost: they came back too late after Redis had lost data"
        ]
        assert len(events(a)) == 1 and "lost 1 accepted updates" in events(a)[0]

    def test_are_not_lost_if_they_are_counted(self, jobs: Callable[..., Job], errors: list[str]) -> None:
        """A server that was away while its updates became part of a model has nothing to tell."""
        job = jobs(1, 2)
        in_the_middle(job, 1000)
        a = job.living[0]
        assert 2 in job.published
        a.lose_redis()
        job.store.run += 1
        a.redis.come_back()
        job.pass_time(3.0)
        assert (lost(a), errors) == (0, [])

    def test_a_notice_makes_them_known_before_the_iteration_is_left(
        self, jobs: Callable[..., Job], errors: list[str]
    ) -> None:
        """FLUSHALL: the connection stands, and the others have gone on."""
        job = jobs(1, 2)
        one_update(job, "c0", "c1", "c3", "c5")
        a = job.living[0]
        status = job.shared.status
        assert status is not None
        job.shared.uploads[1] = {key_of(fl_id): "another" for fl_id in ("c1", "c3", "c5")}
        job.shared.owners.clear()
        status.next(True, "fine")
        job.store.on_end = lambda number, end: None
        a.driver.heard(b"forgotten")
        a.driver.heard(b"advanced")
        job.settle()
        assert a.driver.iteration.number == 2
        assert (lost(a), len(errors)) == (1, 1)


class TestAnotherBase:
    def test_updates_that_were_trained_from_another_model_are_not_taken_back(
        self, jobs: Callable[..., Job], errors: list[str]
    ) -> None:
        job = jobs()
        server = only(job)
        one_update(job, *CLIENTS[:3])
        status = job.shared.status
        assert status is not None
        server.lose_redis()
        status.base = "another"
        job.store.run += 1
        job.shared.uploads.clear()
        job.shared.clients.clear()
        server.redis.come_back()
        job.pass_time(1.0)
        assert job.shared.uploads_of(1) == {} and not job.shared.clients.get(1)
        assert lost(server) == 1
        assert "from another model than theirs" in errors[0]
        assert len(events(server)) == 1

    def test_the_connection_may_stand_meanwhile(self, jobs: Callable[..., Job], errors: list[str]) -> None:
        job = jobs()
        server = only(job)
        one_update(job, *CLIENTS[:3])
        status = job.shared.status
        assert status is not None
        status.base = "another"
        job.shared.uploads.clear()
        job.pass_time(3.0)
        assert (lost(server), len(errors)) == (1, 1)


class TestClocks:
    @pytest.mark.parametrize("jump", [-3600.0, 3600.0])
    def test_a_clock_of_redis_that_is_set_ends_nothing(self, jobs: Callable[..., Job], jump: float) -> None:
        """Nor does it keep the iteration from its end: the deadline stays where it was."""
        job = jobs()
        server = only(job)
        one_update(job, *CLIENTS[:3])
        job.pass_time(1.0)
        started = server.driver.iteration.started
        ahead = [0.0]
        job.store.clock = job.shared.clock = lambda: (job.now + ahead[0]) * 1000
        job.shared.lease = 1e12
        job.shared.heartbeat(server.node_id)
        job.pass_time(3.0)
        ahead[0] = jump
        job.shared.clients[1][key_of("c5")] = "1,0,0"  # by another server: there is something new to see
        job.pass_time(6.0)
        assert server.driver.iteration.selected == 4
        assert server.driver.iteration.started == started
        assert job.number == 1 and not job.failed
        job.pass_time(10.0)
        assert set(job.failed) == {1} and set(job.failed.values()) <= TIMEOUTS


def test_an_iteration_opens_only_with_its_model() -> None:
    """``Opening`` is tried in tests/model, move by move; here only what it says first."""
    job = Job()
    server = only(job)
    assert (server.driver.opening.number, server.driver.problem) == (0, "")
    assert server.driver.iteration == Iteration(1, base=server.driver.models.newest_image.digest)
    job.pass_time(1.0)
    assert (server.driver.opening.number, server.driver.serving) == (1, True)
    job.close()
