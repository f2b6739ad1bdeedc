"""When one real server tells refused devices to come back, and whether their places are kept until then.

Its shared state, clock and thread are simulated, as for the random histories of test_server_model.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from model.cluster import key_of
from model.job_in_memory import Job, in_the_middle
from model.server_in_memory import CLIENTS, HOLD_S, Asked, Server

from fedcore.ledger.spool import Spool
from fedcore.wire import codec
from fedcore.wire.messages import ResponseFLJob, ResponseUpdateModel

MARGIN_S = 5.0  # fedcore.device.retry_margin
WINDOWS_S = 25.0  # start_window + update_window


@pytest.fixture
def job() -> Iterator[Job]:
    """Three places, two updates complete an iteration; two iterations have ended."""
    job = Job()
    in_the_middle(job, 0)
    job.settle()
    job.pass_time(1.0)
    assert set(job.published) == {1, 2}
    yield job
    job.close()


def server_of(job: Job) -> Server:
    assert job.servers[0] is not None
    return job.servers[0]


def told(job: Job, asked: Asked) -> float:
    """Seconds until a refused device shall come back."""
    assert asked.answer.called, "it hangs"
    kind: Any = ResponseUpdateModel if asked.iteration else ResponseFLJob
    reply = codec.decode(kind, b"".join(asked.answer.result.response.parts))  # type: ignore[attr-defined]
    assert reply.retcode == 300
    return int(reply.next_req_time) / 1000 - job.now


def kept(job: Job, fl_id: str) -> float:
    """Seconds until a device is expected for which a place is kept."""
    return job.shared.waiting[key_of(fl_id)] / 1000 - job.now


def fill(job: Job) -> None:
    """All places of the current iteration are taken."""
    for fl_id in CLIENTS[:3]:
        job.device_starts(fl_id)
    job.settle()


def test_a_server_that_is_started_anew_knows_how_long_iterations_take(job: Job) -> None:
    job.kill(0)
    job.start(0)
    job.pass_time(2.0)
    fill(job)
    late = server_of(job).start_client(CLIENTS[4])
    job.settle()
    assert told(job, late) <= 2 * MARGIN_S + 1.0 < WINDOWS_S


def test_so_it_does_although_redis_has_lost_its_data_since(job: Job) -> None:
    server_of(job).lose_redis()
    job.store.fail_over(None)
    server_of(job).redis.come_back()
    job.pass_time(2.0)
    test_a_server_that_is_started_anew_knows_how_long_iterations_take(job)


def test_an_update_too_many_keeps_a_place(job: Job) -> None:
    fill(job)
    job.hosts[1].full = True  # no model can be kept: the iteration stays where it is
    for fl_id in CLIENTS[:2]:
        job.device_uploads(fl_id)
    job.settle()
    asked = server_of(job).upload(CLIENTS[2], 3)
    job.settle()
    assert told(job, asked) == kept(job, CLIENTS[2])


def test_an_update_of_an_iteration_that_is_over_keeps_a_place(job: Job) -> None:
    asked = server_of(job).upload(CLIENTS[5], 1)
    job.settle()
    assert told(job, asked) == kept(job, CLIENTS[5])


def test_an_update_that_finds_no_slot_keeps_a_place(job: Job) -> None:
    server = server_of(job)
    ledger = server.ledgers.own
    assert ledger is not None
    fill(job)
    while ledger.receive() is not None:
        pass
    assert isinstance(server.intake.receive(1), Spool)
    asked = server.upload(CLIENTS[0], 3)
    job.pass_time(HOLD_S + 1.0)
    assert told(job, asked) <= kept(job, CLIENTS[0])


def test_a_device_that_was_held_in_vain_has_its_place_kept_until_it_comes(job: Job) -> None:
    fill(job)
    job.hosts[1].full = True
    for fl_id in CLIENTS[:2]:
        job.device_uploads(fl_id)
    job.settle()
    late = server_of(job).start_client(CLIENTS[4])
    job.pass_time(HOLD_S - 0.5)
    assert not late.answer.called
    job.pass_time(1.0)
    assert told(job, late) <= kept(job, CLIENTS[4])


def test_a_slow_redis_makes_no_return_a_past_one(job: Job) -> None:
    server = server_of(job)
    asked = server.upload(CLIENTS[5], 1)
    while key_of(CLIENTS[5]) not in job.shared.waiting:
        assert job.move()
    for _ in range(40):
        job.pass_time(0.5)  # nothing goes on meanwhile
    job.settle()
    assert told(job, asked) >= MARGIN_S - 0.001
