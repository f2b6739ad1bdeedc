"""Random histories of one real server: its driver, intake and rounds, with everything around it breaking.

Its shared state, disk, clock and thread are simulated; nothing of its own code is.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from model.server_in_memory import (
    CLIENTS,
    HOLD_S,
    LAYOUT,
    SLOTS,
    TEMPLATE,
    Disk,
    OpenFiles,
    RecordedState,
    Request,
    Server,
    iteration_told,
    updates_in,
)
from twisted.logger import LogLevel, globalLogPublisher

from fedcore.core.iteration import (
    GLOBAL_TIMEOUT,
    Phase,
    Policy,
    round_timeout,
    server_exited,
    status_lost,
)
from fedcore.core.job import RunningState
from fedcore.models import checkpoints
from fedcore.services.answers import Answer

PATIENCE = 60  # seconds
_graveyard: list[Server | None] = []  # what a killed server was waiting for never comes, not even its end


@contextmanager
def no_failures_logged() -> Iterator[None]:
    """Every exception that only ends in the log is a fault."""
    failures: list[Any] = []

    def observe(event: Any) -> None:
        if event.get("log_level") is LogLevel.critical:
            failures.append(event.get("log_failure") or event.get("log_format"))

    globalLogPublisher.addObserver(observe)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(observe)
    assert not failures, failures


class ServerHistory(RuleBasedStateMachine):
    """One server at a time, devices, and everything that may break."""

    @initialize(last=st.sampled_from([3, 1000]))
    def begin(self, last: int) -> None:
        self.policy = Policy(3, 2, 10.0, 15.0, 20.0, last)
        self.now = 0.0
        self.starts = 0
        self.published: dict[int, frozenset[str]] = {}
        self.failed: dict[int, str] = {}
        self.promised: dict[int, set[str]] = {}
        self.told: dict[str, int] = {}
        self.disk = Disk({0: TEMPLATE.image({"who": np.zeros(LAYOUT.total_floats, np.float32)})})
        self.shared = RecordedState(lambda: self.now * 1000, self.ended)
        self.watch = no_failures_logged()
        self.watch.__enter__()
        self.directory = tempfile.TemporaryDirectory()
        self.files = OpenFiles()
        self.patch = patch.object(checkpoints, "save", self.disk.save)
        self.patch.start()
        self.server: Server | None = None
        self.start()

    def ended(self, number: int, success: bool, result: str) -> None:
        """The shared state went on to the next iteration."""
        assert number not in self.published and number not in self.failed, "an iteration ended twice"
        if not success:
            self.failed[number] = result
            return
        counted = frozenset(self.shared.uploads[number])
        assert len(counted) == self.policy.update_threshold
        assert number in self.disk.models, "published before it was durable"
        assert updates_in(self.disk.models[number]) == counted
        self.published[number] = counted

    def start(self) -> None:
        self.starts += 1
        directory = Path(self.directory.name)
        self.server = Server(
            self.shared, self.disk, directory, self.policy, f"server#{self.starts}", self.now
        )

    # ---- devices

    @precondition(lambda self: self.server is not None)
    @rule(fl_id=st.sampled_from(CLIENTS))
    def device_starts(self, fl_id: str) -> None:
        assert self.server is not None
        request = self.server.start_client(fl_id)

        def answered(answer: Any) -> Any:
            if isinstance(answer, Answer) and answer.code == 200:
                self.told[fl_id] = iteration_told(answer)
            return answer

        request.answer.addCallback(answered)

    @precondition(lambda self: self.server is not None)
    @rule(fl_id=st.sampled_from(CLIENTS))
    def device_uploads(self, fl_id: str) -> None:
        assert self.server is not None
        request = self.server.upload(fl_id, self.told.get(fl_id, self.server.driver.iteration.number))
        if request is not None:
            request.answer.addCallback(self.upload_answered, request)

    def upload_answered(self, answer: Any, request: Request) -> Any:
        if isinstance(answer, Answer) and answer.code == 200:
            self.promised.setdefault(request.iteration, set()).add(request.fl_id)
        return answer

    @precondition(lambda self: self.server is not None)
    @rule(fl_ids=st.lists(st.sampled_from(CLIENTS), unique=True, min_size=2, max_size=3))
    def devices_take_part(self, fl_ids: list[str]) -> None:
        for fl_id in fl_ids:
            self.device_starts(fl_id)
        self.redis_answers(20)
        for fl_id in fl_ids:
            self.device_uploads(fl_id)

    # ---- what is under way goes on

    @precondition(lambda self: self.server is not None)
    @rule(steps=st.integers(1, 6))
    def redis_answers(self, steps: int) -> None:
        assert self.server is not None
        for _ in range(steps):
            self.server.redis.execute()
            self.server.redis.answer()

    @precondition(lambda self: self.server is not None)
    @rule(steps=st.integers(1, 3))
    def redis_executes(self, steps: int) -> None:
        assert self.server is not None
        for _ in range(steps):
            self.server.redis.execute()

    @precondition(lambda self: self.server is not None and self.server.reactor.jobs)
    @rule()
    def the_thread_works(self) -> None:
        assert self.server is not None
        self.server.reactor.work()

    @precondition(lambda self: self.server is not None)
    @rule()
    def all_goes_on(self) -> None:
        assert self.server is not None
        self.server.settle()

    @rule(seconds=st.sampled_from([0.1, 1.0, 1.0, 4.0, 9.0, 16.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        """Redis and the thread take less than half a second."""
        until = self.now + seconds
        while self.now < until:
            step = min(0.5, until - self.now)
            self.now += step
            if self.server is not None:
                self.server.reactor.advance(step)
                if seconds >= 1.0:
                    self.server.settle()

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
        self.server.redis.break_off()
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
        self.files.drop()
        _graveyard.append(self.server)
        self.server = None
        if again:
            self.start()

    @precondition(lambda self: self.server is None)
    @rule()
    def the_server_is_started(self) -> None:
        self.start()

    @precondition(lambda self: self.joined)
    @rule(really=st.sampled_from([True, False, False]))
    def redis_loses_its_data(self, really: bool) -> None:
        """While a server is there to restore them; with both gone, the checkpoint alone says where to go on."""
        if not really:
            return
        assert self.server is not None and self.shared.status is not None
        self.server.redis.break_off()
        self.shared.wipe()
        self.server.redis.come_back()
        self.time_passes(2.0)

    @property
    def joined(self) -> bool:
        return self.server is not None and self.server.driver.joined and self.shared.status is not None

    @rule(full=st.booleans())
    def the_disk_fills_or_empties(self, full: bool) -> None:
        self.disk.full = full

    @precondition(lambda self: self.shared.status is not None and self.shared.status.running < 2)
    @rule(for_long=st.booleans())
    def the_job_is_switched(self, for_long: bool) -> None:
        status = self.shared.status
        assert status is not None
        status.running = RunningState(1 - status.running)
        if not for_long:
            self.time_passes(1.0)
            status = self.shared.status
            if status is not None and status.running is RunningState.DISABLE:
                status.running = RunningState.RUNNING

    # ---- what always holds

    @invariant()
    def every_iteration_ends_exactly_once(self) -> None:
        status = self.shared.status
        ended = set(self.published) | set(self.failed)
        assert ended == set(range(1, 1 if status is None else status.number))

    @invariant()
    def never_beyond_quorum_or_places(self) -> None:
        assert all(len(ids) <= self.policy.update_threshold for ids in self.shared.uploads.values())
        assert all(len(ids) <= self.policy.start_threshold for ids in self.shared.clients.values())

    @invariant()
    def every_promise_is_kept_or_its_iteration_failed_by_name(self) -> None:
        for number, result in self.failed.items():
            timeouts = {GLOBAL_TIMEOUT, round_timeout("startFLJob"), round_timeout("updateModel")}
            assert result in timeouts | {status_lost(number)}, "a ledger that was there was not read"
        for number, updates in self.published.items():
            assert self.promised.get(number, set()) <= updates

    @invariant()
    def every_report_is_true(self) -> None:
        for ended in self.server.ends if self.server is not None else ():
            assert ended.valid is (ended.number in self.published)
            assert updates_in(ended.model) in self.models_of(ended.number)

    @invariant()
    def the_served_model_is_the_last_published(self) -> None:
        if self.server is not None and self.server.driver.cluster is not None:
            driver = self.server.driver
            if not driver._busy:
                assert driver.models.newest == driver.iteration.number - 1
                assert updates_in(driver.models.newest_image) in self.models_of(driver.models.newest)

    def models_of(self, number: int) -> list[frozenset[str]]:
        """What may be in the model of an iteration: its own updates, or those of the last valid one before.

        Where Redis lost its data after a model was durable and before it was published, a server that is
        started again finds the model on its disk and goes on with it.
        """
        last = max((known for known in self.published if known <= number), default=0)
        found = [self.published.get(last, frozenset())]
        for between in range(last + 1, number + 1):
            if self.failed.get(between) == status_lost(between) and between in self.disk.models:
                found.append(updates_in(self.disk.models[between]))
        return found

    # ---- and from wherever it has come

    def teardown(self) -> None:
        if not hasattr(self, "server"):
            return
        try:
            self.come_to_rest()
        finally:
            self.clean_up()

    def clean_up(self) -> None:
        _graveyard.append(self.server)
        self.patch.stop()
        self.files.stop()
        self.directory.cleanup()
        self.watch.__exit__(None, None, None)

    def come_to_rest(self) -> None:
        """With nothing breaking any more, all is answered and the job goes on."""
        self.disk.full = False
        if self.server is None:
            self.start()
        assert self.server is not None
        self.server.redis.come_back()
        self.time_passes(2.0)
        status = self.shared.status
        assert status is not None
        if status.running is RunningState.DISABLE:
            status.running = RunningState.RUNNING
        self.until_next()
        before = len(self.published)
        self.until_next()
        status = self.shared.status
        assert status is not None
        finished = status.running is RunningState.FINISH
        assert finished or len(self.published) == before + 1
        self.time_passes(HOLD_S + 1.0)
        assert all(request.answer.called for request in self.server.requests), "a device hangs"
        self.every_slot_is_free()
        for check in (
            self.every_iteration_ends_exactly_once,
            self.every_promise_is_kept_or_its_iteration_failed_by_name,
            self.every_report_is_true,
            self.the_served_model_is_the_last_published,
        ):
            check()

    def until_next(self) -> None:
        """Let devices come and seconds pass until the iteration is another one."""
        assert self.shared.status is not None
        number = self.shared.status.number
        for _ in range(PATIENCE):
            status = self.shared.status
            assert status is not None
            if status.number > number or status.running is RunningState.FINISH:
                break
            for fl_id in CLIENTS[:4]:
                self.device_starts(fl_id)
            self.time_passes(1.0)
            for fl_id in self.shared.clients.get(number, {}):
                self.device_uploads(fl_id)
            self.time_passes(1.0)
        else:
            raise AssertionError(f"the job hangs in {self.shared.status}")
        self.time_passes(1.0)

    def every_slot_is_free(self) -> None:
        assert self.server is not None and self.server.ledgers.own is not None
        ledger = self.server.ledgers.own
        assert ledger.free_slots + ledger.unmerged == SLOTS, "slots were lost"


TestServerHistory = ServerHistory.TestCase
TestServerHistory.settings = settings(
    max_examples=250,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


STEPS = 24  # requests to Redis of one iteration, with some to spare


def interrupted(after: int, answered: bool) -> ServerHistory:
    """Stop in the middle of an iteration: ``after`` requests to Redis are executed, the last one answered or not."""
    history = ServerHistory()
    history.begin(last=1000)
    history.time_passes(1.0)
    history.until_next()
    assert history.server is not None
    for fl_id in CLIENTS[:3]:
        history.device_starts(fl_id)
    history.all_goes_on()
    for fl_id in CLIENTS[:3]:
        history.device_uploads(fl_id)
    redis, reactor = history.server.redis, history.server.reactor
    for step in range(after):
        while reactor.jobs:
            reactor.work()
        redis.execute()
        if answered or step < after - 1:
            redis.answer()
    return history


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("after", range(STEPS))
def test_a_connection_may_break_at_any_moment_of_an_iteration(after: int, answered: bool) -> None:
    history = interrupted(after, answered)
    assert history.server is not None
    history.server.redis.break_off()
    history.server.redis.come_back()
    history.time_passes(3.0)
    assert set(history.published) == {1, 2}, "an iteration was lost though nobody died"
    history.teardown()


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("after", range(STEPS))
def test_a_server_may_die_at_any_moment_of_an_iteration(after: int, answered: bool) -> None:
    history = interrupted(after, answered)
    counted = len(history.shared.uploads.get(2, ()))
    history.the_server_is_killed(again=True)
    history.time_passes(3.0)
    assert not history.failed, "its ledger was there to be read"
    assert (2 in history.published) is (counted == history.policy.update_threshold)
    history.teardown()


@pytest.mark.parametrize("after", range(STEPS))
def test_redis_may_lose_its_data_at_any_moment_of_an_iteration(after: int) -> None:
    history = interrupted(after, answered=True)
    history.redis_loses_its_data(really=True)
    assert history.failed.get(2, status_lost(2)) == status_lost(2)
    history.teardown()


def reducing() -> ServerHistory:
    """Stop while the server makes the model of iteration 1."""
    history = ServerHistory()
    history.begin(last=1000)
    history.time_passes(1.0)
    history.devices_take_part(CLIENTS[:2])
    assert history.shared.status is not None
    while history.shared.status.phase is not Phase.REDUCING:
        history.redis_answers(1)
    return history


@pytest.mark.parametrize("after", range(STEPS))
def test_who_takes_over_may_be_interrupted_at_any_moment(after: int) -> None:
    """The server died while it made the model; the connection of its successor breaks while that takes over."""
    history = reducing()
    history.the_server_is_killed(again=True)
    assert history.server is not None
    for _ in range(after):
        history.redis_answers(1)
    history.server.redis.break_off()
    history.server.redis.come_back()
    history.time_passes(15.0)
    assert set(history.published) == {1}
    history.teardown()


def test_a_ledger_that_is_gone_fails_its_iteration_by_name() -> None:
    history = reducing()
    history.the_server_is_killed(again=False)
    for path in Path(history.directory.name).iterdir():
        path.unlink()
    history.start()
    history.time_passes(30.0)
    assert history.failed == {1: server_exited(1)}
    history.failed[1] = status_lost(1)  # by a name that the other histories know
    history.teardown()


def test_a_step_back_of_redis_to_a_model_that_is_published_hangs_nothing() -> None:
    """As after a crash of Redis' host: the last second is gone."""
    history = reducing()
    assert history.server is not None and history.shared.status is not None
    while history.shared.status.phase is not Phase.CANDIDATE:
        history.redis_answers(1)
        while history.server.reactor.jobs:
            history.server.reactor.work()
    before = copy.deepcopy((history.shared.status, history.shared.clients, history.shared.uploads))
    history.time_passes(2.0)
    assert set(history.published) == {1}
    history.server.redis.break_off()
    history.shared.status, history.shared.clients, history.shared.uploads = before
    history.published.clear()
    history.server.ends.clear()
    history.server.redis.come_back()
    history.time_passes(15.0)
    assert history.shared.status.number == 2
    history.clean_up()


def test_a_quiet_history_publishes_model_after_model() -> None:
    """The simulation itself works: nothing breaks, and every iteration is valid."""
    history = ServerHistory()
    history.begin(last=1000)
    history.time_passes(1.0)
    for _ in range(10):
        history.until_next()
    for _ in range(10):
        history.devices_take_part(CLIENTS[:3])
        history.all_goes_on()  # no time passes: no iteration waits for a tick
    assert history.failed == {}
    assert sorted(history.published) == list(range(1, 21))
    history.teardown()
