"""The lab's population of devices, at servers of this machine: it trains, keeps exact accounts and sees faults."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from integration.cluster import wait_until
from integration.faults import Fleet, fleet_of
from integration.oracle import Asked, Outcome
from lab.devices import PLACES, ROVING, STRICT, Devices, End, Loss, Seen, job
from lab.history import ENDED, losses_in


class FleetHistory:
    """What the servers of a fleet tell, as ``lab.history`` reads it of hosts."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def outcomes(self) -> Mapping[int, Outcome]:
        return dict(self._fleet.outcomes())

    def losses(self) -> Sequence[Loss]:
        return losses_in((self._fleet.cluster.directory / "event.txt").read_text().splitlines())


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Three servers on two hosts."""
    round_ = {name: value for name, value in job()["round"].items() if name != "start_fl_job_threshold"}
    quick = {"device": {"hold_time": 8.0, "retry_margin": 0.3}}
    with fleet_of(tmp_path, {0: 0, 1: 0, 2: 1}, places=PLACES, fedcore=quick, **round_) as fleet:
        yield fleet


@pytest.fixture
def devices(fleet: Fleet) -> Iterator[Devices]:
    """The devices; they know of a fourth server that does not exist, and take the first for a balancer."""
    addresses = [("127.0.0.1", fleet.cluster.http + n) for n in range(4)]
    with Devices(addresses, None, FleetHistory(fleet), balancer=addresses[0]) as devices:
        devices.wait_for_iterations(2, 30)
        yield devices


def test_a_device_that_still_ends_by_the_fault_before_is_not_held_against_this_one() -> None:
    """But against that one, unless that was allowed to end devices."""
    asked = Asked("startFLJob", 1, 1.0, 2.0, 0, 0, 300, 5.0)
    end = End("refused twice", [asked])

    def seen(before: Seen | None = None, *, ends: Sequence[End] = (), late: Sequence[End] = ()) -> Seen:
        return Seen("a fault", failed={}, ends=ends, late=late, before=before)

    held = End("refused twice", [Asked("startFLJob", 1, 1.0, 9.0, 0, 0, 300, 5.0)])
    assert held.was_held_since_before(2.0) and not held.was_held_since_before(0.5)
    assert not end.was_held_since_before(2.0), "something has let it go"
    hard, soft, unjudged = seen(), seen(), seen()
    hard.must_be_harmless(devices_may_end=True)
    soft.must_be_harmless()
    for before in (hard, unjudged):
        seen(before, late=[end]).must_be_harmless()
        with pytest.raises(AssertionError):
            seen(before, ends=[end]).must_be_harmless()
    for sparing in (soft, None):
        with pytest.raises(AssertionError, match="by the fault before"):
            seen(sparing, late=[end]).must_be_harmless()


def test_they_train_through_a_killed_server(fleet: Fleet, devices: Devices) -> None:
    with devices.watched("SIGKILL") as seen:
        fleet.kill(1)
        devices.wait_for_iterations(3, 30)
        fleet.start(1)
        devices.wait_for_iterations(3, 30)
    print(seen)
    assert (seen.lost, seen.missing, seen.failed, seen.ends) == (0, 0, {}, [])
    assert seen.iterations >= 6
    assert seen.acknowledged >= 6 * PLACES
    assert seen.silence < 5
    everybody = set(range(ROVING + 1 + STRICT))
    wait_until(
        lambda: {entry.client for entry in devices.journal.acknowledged} == everybody, "all take part", 60
    )


def test_held_updates_are_where_they_were_let_to_and_are_adopted(fleet: Fleet, devices: Devices) -> None:
    with devices.watched("adoption") as seen:
        with devices.held() as iteration:
            devices.let_upload(3, iteration, server=1)
            at = [entry.server for entry in devices.journal.acknowledged if entry.iteration == iteration]
            assert at == [1, 1, 1]
            fleet.kill(1)
        devices.wait_for_iterations(2, 30)
    assert (seen.lost, seen.missing, seen.failed, seen.ends) == (0, 0, {}, [])


def test_a_lost_host_is_counted_to_the_update(fleet: Fleet, devices: Devices) -> None:
    with devices.watched("a host that does not come back") as seen:
        with devices.held() as iteration:
            devices.let_upload(4, iteration, server=2)
            fleet.kill(2)
        devices.wait_for_iterations(2, 60)
    assert seen.lost == seen.missing == 4
    assert seen.failed == {}
    ledger = {json.dumps(loss.reason) for loss in devices.history.losses()}
    assert ledger == {'"the server is gone, and so is its ledger"'}


def test_the_journals_of_hosts_tell_how_iterations_ended() -> None:
    told = (
        "iteration 7 ended: success [valid=true, updates=6, seconds=0.4]\n"
        "the iteration goes on\n"
        "iteration 8 ended: Out of [time], current iteration: 8 [updates=0, valid=false]\n"
    )
    assert ENDED.findall(told) == [
        ("7", "success", "true"),
        ("8", "Out of [time], current iteration: 8", "false"),
    ]
