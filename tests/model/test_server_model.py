"""Random histories of one real server: its driver, intake and rounds, with everything around it breaking.

Its shared state, clock and thread are simulated, a full disk is pretended; nothing of its own code is.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from model.job_in_memory import TIMEOUTS, Job, in_the_middle
from model.server_in_memory import CLIENTS, Server

from fedcore.core.iteration import DISABLED, Phase, server_exited
from fedcore.core.job import RunningState

NAMES = TIMEOUTS | {DISABLED}
MOVES = 36  # of one iteration, with some to spare


class ServerHistory(RuleBasedStateMachine):
    """One server at a time, devices, and everything that may break."""

    @initialize(last=st.sampled_from([3, 1000]))
    def begin(self, last: int) -> None:
        self.job = Job(last=last)

    @property
    def server(self) -> Server | None:
        return self.job.servers[0]

    # ---- devices

    @precondition(lambda self: self.server is not None)
    @rule(fl_id=st.sampled_from(CLIENTS))
    def device_starts(self, fl_id: str) -> None:
        self.job.device_starts(fl_id)

    @precondition(lambda self: self.server is not None)
    @rule(fl_id=st.sampled_from(CLIENTS))
    def device_uploads(self, fl_id: str) -> None:
        self.job.device_uploads(fl_id)

    @precondition(lambda self: self.server is not None)
    @rule(fl_ids=st.lists(st.sampled_from(CLIENTS), unique=True, min_size=2, max_size=3))
    def devices_take_part(self, fl_ids: list[str]) -> None:
        for fl_id in fl_ids:
            self.job.device_starts(fl_id)
        self.job.moves(40)
        for fl_id in fl_ids:
            self.job.device_uploads(fl_id)

    # ---- what is under way goes on

    @rule(moves=st.integers(1, 12))
    def something_goes_on(self, moves: int) -> None:
        self.job.moves(moves)

    @precondition(lambda self: self.server is not None)
    @rule(steps=st.integers(1, 3))
    def redis_executes(self, steps: int) -> None:
        assert self.server is not None
        for _ in range(steps):
            self.server.redis.execute()

    @rule()
    def all_goes_on(self) -> None:
        self.job.settle()

    @rule(seconds=st.sampled_from([0.1, 1.0, 1.0, 4.0, 9.0, 16.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.job.pass_time(seconds)

    # ---- faults

    @precondition(lambda self: self.server is not None)
    @rule(executed=st.integers(0, 6), answered=st.integers(0, 6), for_long=st.booleans())
    def the_connection_breaks(self, executed: int, answered: int, for_long: bool) -> None:
        """After some more requests have been executed, and not all of them answered."""
        assert self.server is not None
        for step in range(executed):
            self.server.redis.execute()
            if step < answered:
                self.server.redis.answer()
        self.server.lose_redis()
        if not for_long:
            self.server.redis.come_back()

    @precondition(lambda self: self.server is not None)
    @rule()
    def the_connection_comes_back(self) -> None:
        assert self.server is not None
        self.server.redis.come_back()

    @precondition(lambda self: self.server is not None)
    @rule(again=st.booleans())
    def the_server_is_killed(self, again: bool) -> None:
        self.job.kill(0)
        if again:
            self.job.start(0)

    @precondition(lambda self: self.server is None)
    @rule()
    def the_server_is_started(self) -> None:
        self.job.start(0)

    @precondition(lambda self: self.joined)
    @rule(really=st.sampled_from([True, False, False]))
    def redis_loses_its_data(self, really: bool) -> None:
        """While a server is there to bring them back; with both gone, the checkpoint alone says where to go on."""
        if not really:
            return
        assert self.server is not None
        self.server.lose_redis()
        self.job.store.fail_over(None)
        self.server.redis.come_back()
        self.job.pass_time(2.0)

    @property
    def joined(self) -> bool:
        """Whether the server knows what Redis knows: an end that only Redis knew would be forgotten with it."""
        if self.server is None or not self.server.driver.joined:
            return False
        return self.server.driver.iteration.number == self.job.number

    @rule(full=st.booleans())
    def the_disk_fills_or_empties(self, full: bool) -> None:
        self.job.hosts[1].full = full

    @precondition(lambda self: self.job.shared.status is not None)
    @rule(for_long=st.booleans(), marked=st.booleans())
    def the_job_is_disabled(self, for_long: bool, marked: bool) -> None:
        """By our scheduler, or by an original one that only marks the job."""
        status = self.job.shared.status
        assert status is not None
        if not marked:
            self.job.shared.disable()
        elif status.running is RunningState.RUNNING:
            status.running = RunningState.DISABLE
        if not for_long:
            self.job.pass_time(1.0)
            self.the_job_is_enabled(marked)

    @precondition(lambda self: self.job.shared.status is not None)
    @rule(marked=st.booleans())
    def the_job_is_enabled(self, marked: bool) -> None:
        status = self.job.shared.status
        if not marked:
            self.job.shared.enable(self.job.policy.last_iteration)
        elif status is not None and status.running is RunningState.DISABLE:
            status.running = RunningState.RUNNING

    # ---- what always holds

    @invariant()
    def nothing_is_broken(self) -> None:
        self.job.check(names=NAMES)
        self.job.check_counts()

    def teardown(self) -> None:
        if not hasattr(self, "job"):
            return
        try:
            self.job.come_to_rest(names=NAMES)
        finally:
            self.job.close()


TestServerHistory = ServerHistory.TestCase
TestServerHistory.settings = settings(
    max_examples=120,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def one_server(after: int) -> tuple[Job, Server]:
    """A server, so many moves after the updates of iteration 2 have reached it."""
    job = Job()
    in_the_middle(job, after)
    assert job.servers[0] is not None
    return job, job.servers[0]


def finish(job: Job) -> None:
    job.come_to_rest()
    job.close()


def test_the_moves_cover_a_whole_iteration() -> None:
    job = Job()
    assert in_the_middle(job, 1000) < MOVES
    assert set(job.published) == {1, 2}
    finish(job)


@pytest.mark.parametrize("seconds", [0.0, 12.0])
@pytest.mark.parametrize("after", range(MOVES))
def test_the_connection_may_break_at_any_moment_of_an_iteration(after: int, seconds: float) -> None:
    """For a moment, or for longer than the lease lasts: it alone ends nothing while nobody is there to say so."""
    job, server = one_server(after)
    server.lose_redis()
    if seconds:
        job.pass_time(seconds)
    server.redis.come_back()
    job.pass_time(3.0)
    assert set(job.published) == {1, 2}, "an iteration was lost though nobody died"
    finish(job)


@pytest.mark.parametrize("executed", [1, 2])
@pytest.mark.parametrize("after", range(MOVES))
def test_answers_may_be_lost_at_any_moment_of_an_iteration(after: int, executed: int) -> None:
    """Redis has done what it was asked, and nobody hears of it."""
    job, server = one_server(after)
    for _ in range(executed):
        server.redis.execute()
    server.lose_redis()
    server.redis.come_back()
    job.pass_time(3.0)
    assert set(job.published) == {1, 2}
    finish(job)


@pytest.mark.parametrize("executed", [0, 1])
@pytest.mark.parametrize("after", range(MOVES))
def test_the_server_may_die_at_any_moment_of_an_iteration(after: int, executed: int) -> None:
    job, server = one_server(after)
    for _ in range(executed):
        server.redis.execute()
    counted = len(job.shared.uploads.get(2, ()))
    job.kill(0)
    job.start(0)
    job.pass_time(3.0)
    assert not job.failed, "its ledger was there to be read"
    assert (2 in job.published) is (counted == job.policy.update_threshold)
    finish(job)


@pytest.mark.parametrize("after", range(MOVES))
def test_redis_may_lose_its_data_at_any_moment_of_an_iteration(after: int) -> None:
    """The server knows it all: nothing is lost."""
    job, server = one_server(after)
    server.lose_redis()
    job.store.fail_over(None)
    server.redis.come_back()
    job.pass_time(15.0)
    assert not job.failed
    finish(job)


@pytest.mark.parametrize("replicated", [True, False])
@pytest.mark.parametrize("after", range(0, MOVES, 2))
def test_redis_may_lose_its_last_writes_at_any_moment_of_an_iteration(after: int, replicated: bool) -> None:
    """A replica takes over that has what was waited for; or the master starts again from an old file."""
    job = Job()
    in_the_middle(job, 0)
    before = job.store.copy()
    job.store.standby = before if replicated else None
    job.moves(after)
    server = job.servers[0]
    assert server is not None
    server.lose_redis()
    job.store.fail_over(job.store.standby if replicated else before)
    server.redis.come_back()
    job.pass_time(15.0)
    assert set(job.published) == {1, 2}
    finish(job)


def reducing() -> Job:
    """A server that makes the model of iteration 1."""
    job = Job()
    job.pass_time(1.0)
    for fl_id in CLIENTS[:2]:
        job.device_starts(fl_id)
    job.settle()
    for fl_id in CLIENTS[:2]:
        job.device_uploads(fl_id)
    status = job.shared.status
    assert status is not None
    while status.phase is not Phase.REDUCING:
        assert job.move()
    return job


@pytest.mark.parametrize("after", range(0, MOVES, 2))
def test_who_takes_over_may_be_interrupted_at_any_moment(after: int) -> None:
    """The server died while it made the model; the connection of its successor breaks while that takes over."""
    job = reducing()
    job.kill(0)
    job.start(0)
    job.moves(after)
    successor = job.servers[0]
    assert successor is not None
    successor.lose_redis()
    successor.redis.come_back()
    job.pass_time(15.0)
    assert set(job.published) == {1}
    finish(job)


def test_a_ledger_that_is_gone_fails_its_iteration_by_name() -> None:
    """With nobody there to go on with it, in words that say why."""
    job = reducing()
    job.kill(0)
    for path in job.hosts[1].ledgers.iterdir():
        path.unlink()
    job.start(0)
    job.given_up.update(CLIENTS[:2])
    job.pass_time(60.0)
    assert job.failed == {1: server_exited(1)}
    assert "lost 2 accepted updates" in (job.hosts[1].directory / "event.txt").read_text()
    job.come_to_rest(names=TIMEOUTS | {server_exited(1)})
    job.close()


def test_a_full_disk_holds_a_model_back() -> None:
    """A single server publishes nothing that only its memory holds."""
    job, server = one_server(0)
    job.hosts[1].full = True
    job.pass_time(5.0)
    assert set(job.published) == {1}
    assert "cannot be written" in server.driver.problem
    job.hosts[1].full = False
    job.pass_time(3.0)
    assert set(job.published) == {1, 2}
    finish(job)


def test_a_quiet_history_publishes_model_after_model() -> None:
    """The simulation itself works: nothing breaks, and every iteration is valid."""
    job = Job()
    job.pass_time(1.0)
    for _ in range(10):
        job.until_next()
    for _ in range(10):
        for fl_id in CLIENTS[:3]:
            job.device_starts(fl_id)
        job.settle()
        for fl_id in CLIENTS[:3]:
            job.device_uploads(fl_id)
        job.settle()  # no time passes: no iteration waits for a tick
    assert job.failed == {}
    assert sorted(job.published) == list(range(1, 21))
    finish(job)
