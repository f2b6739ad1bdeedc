"""Several servers, one job: kill one, nothing is lost.

Clients and devices change the server with every request. What they were promised and what they got is judged by
``oracle.py``: each model is the exact mean of all acknowledged updates, the same bytes at every server.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from http.client import HTTPResponse
from pathlib import Path

import pytest
from integration.cluster import Cluster, wait_until
from integration.faults import Fleet, Run, fleet_of
from integration.oracle import (
    MODEL,
    Acknowledged,
)
from integration.roaming import RovingHttp, strict_device, upload_of
from integration.watching import RedisReader, status_of
from strict_device import Status, StrictDevice

from fedcore.models.formats import write_model
from fedcore.wire import codec
from fedcore.wire.messages import ResponseUpdateModel
from fedctl.processes import free_ports

ONE_SERVER, ONE_HOST, TWO_HOSTS = {0: 0}, {0: 0, 1: 0}, {0: 0, 1: 1}
HOSTS = pytest.mark.parametrize("hosts", [ONE_HOST, TWO_HOSTS], ids=["one host", "two hosts"])
ANY_HOSTS = pytest.mark.parametrize(
    "hosts", [ONE_SERVER, ONE_HOST, TWO_HOSTS], ids=["one server", "one host", "two hosts"]
)
PLACES = 10
EVERYBODY = frozenset(range(PLACES))
PROMPT_S = 3.0  # from the last update to its model
WIPED = "The instance status info stored in distributed cache is empty"
LOST = "fl_updates_lost_total"


# ---- clients that change servers


@HOSTS
def test_clients_that_change_servers_get_the_same_models(tmp_path: Path, hosts: dict[int, int]) -> None:
    with fleet_of(tmp_path, hosts, places=PLACES) as fleet, Run(fleet, clients=PLACES) as run:
        run.wait_for_iterations(20, 25)
        run.stop()
        report = run.judge(quorum=PLACES)
        for iteration in range(1, 21):
            assert report.members[iteration] == EVERYBODY
            givers = {entry.server for entry in run.journal.received if entry.iteration == iteration}
            assert givers == set(hosts)


# ---- SIGKILL


@pytest.mark.parametrize("back", [True, False], ids=["restarted", "gone"])
def test_a_killed_server_of_one_host_loses_nothing(tmp_path: Path, back: bool) -> None:
    kill_after_half(tmp_path, ONE_HOST, 1, back=back)


def test_a_killed_server_of_another_host_loses_nothing(tmp_path: Path) -> None:
    kill_after_half(tmp_path, TWO_HOSTS, 1, back=True)


def test_the_only_server_of_a_job_loses_nothing(tmp_path: Path) -> None:
    kill_after_half(tmp_path, ONE_SERVER, 0, back=True)


def kill_after_half(directory: Path, hosts: dict[int, int], victim: int, *, back: bool) -> None:
    """Kill a server when half of the updates are in, spread over all servers; let the others upload elsewhere."""
    with fleet_of(directory, hosts, places=PLACES) as fleet, Run(fleet) as run:
        run.start_all(range(PLACES))
        for client in range(PLACES // 2):
            run.upload([client], server=client % len(hosts))
        killed = time.monotonic()
        fleet.kill(victim)
        if back:
            fleet.start(victim, ready=False)
        run.upload(range(PLACES // 2, PLACES - 1))
        run.upload([0])  # a repeat, of which another server may know as well
        if back:
            fleet.wait_ready(victim)
        run.upload([PLACES - 1])
        complete = time.monotonic()
        run.fetch(range(PLACES))
        assert time.monotonic() - complete < PROMPT_S
        run.see_everywhere(1)
        assert run.judge(quorum=PLACES).members == {1: EVERYBODY}
        if len(hosts) > 1:
            assert run.prober.gap(killed - 0.5) <= 1.0
        assert fleet.metric(LOST) == 0


@HOSTS
@pytest.mark.parametrize("ms", [0, 5, 15, 40])
def test_a_server_killed_while_the_model_is_made(tmp_path: Path, hosts: dict[int, int], ms: int) -> None:
    """The one that got the last update dies at any moment between it and the next iteration."""
    with fleet_of(tmp_path, hosts, places=4) as fleet, Run(fleet) as run:
        run.start_all(range(4))
        for client in range(3):
            run.upload([client], server=client % 2)
        last = threading.Thread(target=run.client(3).upload, args=(1,), daemon=True)
        last.start()
        threading.Event().wait(ms / 1000)
        fleet.kill(1)
        last.join()
        if hosts is TWO_HOSTS:
            fleet.start(1)
        run.fetch(range(4))
        run.see_everywhere(1)
        run.start_all(range(4))
        run.upload(range(4))
        run.fetch(range(4))
        assert run.judge(quorum=4).members == {1: frozenset(range(4)), 2: frozenset(range(4))}


# ---- SIGTERM


class HalfSent:
    """An upload of which half has left."""

    def __init__(self, run: Run, server: int, client: int, iteration: int) -> None:
        self._run, self._server, self._client, self._iteration = run, server, client, iteration
        self._body = codec.encode(upload_of(client, iteration))
        self._connection = socket.create_connection(("127.0.0.1", run.fleet.at(server).http), timeout=20)
        head = b"POST /updateModel HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(self._body)
        self._connection.sendall(head + self._body[: len(self._body) // 2])
        run.journal.send(iteration, client)

    def finish(self) -> None:
        """Send the rest; the answer must be the table of an accepted update."""
        self._connection.sendall(self._body[len(self._body) // 2 :])
        response = HTTPResponse(self._connection)
        response.begin()
        reply = codec.decode(ResponseUpdateModel, response.read())
        self._connection.close()
        assert (reply.retcode, reply.reason) == (200, "success not ready")
        self._run.journal.acknowledge(
            Acknowledged(self._iteration, self._client, self._server, time.monotonic())
        )


@HOSTS
def test_a_stopped_server_finishes_and_hands_over(tmp_path: Path, hosts: dict[int, int]) -> None:
    with fleet_of(tmp_path, hosts, places=PLACES) as fleet, Run(fleet) as run:
        run.start_all(range(PLACES))
        run.upload(range(3), server=1)
        run.upload([3], server=0)
        flying = [HalfSent(run, 1, client, 1) for client in (4, 5, 6)]
        ends: list[int] = []
        stopping = threading.Thread(target=lambda: ends.append(fleet.kill(1, signal.SIGTERM)), daemon=True)
        stopping.start()
        wait_until(lambda: fleet.at(1).get_http(fleet.at(1).admin, "/livez") is None, "it stops listening")
        for upload in flying:
            upload.finish()
        stopping.join(20)
        assert ends == [0]
        run.upload([7, 8, 9])
        complete = time.monotonic()
        run.fetch(range(PLACES))
        assert time.monotonic() - complete < PROMPT_S
        assert run.judge(quorum=PLACES).members == {1: EVERYBODY}
        assert fleet.metric(LOST) == 0


def test_a_stopping_server_holds_a_device_that_was_refused_before(tmp_path: Path) -> None:
    """A second refusal would end an old device."""
    settings = {"device": {"hold_time": 8.0, "retry_margin": 0.2}}
    with (
        fleet_of(tmp_path, {0: 0, 1: 0}, places=2, fedcore=settings) as fleet,
        Run(fleet, probes=False) as run,
    ):
        run.start_all(range(2), server=0)
        assert not run.client(2).start(0)
        got: list[bool] = []
        held = threading.Thread(target=lambda: got.append(run.client(2).start(1)), daemon=True)
        held.start()
        wait_until(lambda: fleet.metric("fl_device_connections", [1]) == 1, "it asks")
        stopping = threading.Thread(target=lambda: fleet.kill(1, signal.SIGTERM), daemon=True)
        stopping.start()
        wait_until(lambda: fleet.at(1).get_http(fleet.at(1).admin, "/livez") is None, "it stops listening")
        assert not got
        run.upload(range(2))
        held.join(8)
        assert got == [True]
        told = run.journal.answered[-1]
        assert (told.server, told.serving, told.placed) == (1, 2, True)
        stopping.join(8)
        assert not stopping.is_alive()


@HOSTS
def test_an_idle_server_stops_soon(tmp_path: Path, hosts: dict[int, int]) -> None:
    with fleet_of(tmp_path, hosts, places=2) as fleet, Run(fleet) as run:
        run.start_all(range(2))
        run.upload(range(2), server=1)
        run.fetch(range(2))
        began = time.monotonic()
        assert fleet.kill(1, signal.SIGTERM) == 0
        assert time.monotonic() - began < 4
        run.start_all(range(2))
        run.upload(range(2))
        run.fetch(range(2))
        assert run.judge(quorum=2).members[2] == {0, 1}


# ---- a host that does not come back


def lose_a_host(fleet: Fleet, run: Run) -> None:
    """Clients 0, 1 upload to the host that stays, 2, 3 to two servers of the other one, which is lost."""
    run.start_all(range(6))
    run.upload([0, 1], server=0)
    run.upload([2], server=1)
    run.upload([3], server=2)
    fleet.kill(1)
    fleet.kill(2)


def test_a_lost_host_opens_its_places_again(tmp_path: Path) -> None:
    with fleet_of(tmp_path, {0: 0, 1: 1, 2: 1}, places=6) as fleet, Run(fleet) as run:
        lose_a_host(fleet, run)
        assert not run.client(6).start()  # all places are taken
        wait_until(lambda: fleet.metric(LOST) == 2, "both ledgers are lost", 26)
        wait_until(lambda: run.client(6).start(), "a place is open again", 5)
        run.start_all([2])  # one of the lost clients comes again
        run.upload([2, 6, 4, 5])
        run.fetch([0, 1, 2, 4, 5, 6])
        report = run.judge(quorum=6, lost=2)
        assert report.members == {1: frozenset({0, 1, 2, 4, 5, 6})}
        assert report.missing == {(1, 3)}
        assert fleet.metric(LOST) == 2


def test_a_lost_host_fails_its_iteration_by_name_without_more_clients(tmp_path: Path) -> None:
    windows = {"update_model_time_window": 4_000}  # it stands still while the iteration is sealed
    with fleet_of(tmp_path, {0: 0, 1: 1, 2: 1}, places=6, **windows) as fleet, Run(fleet) as run:
        lose_a_host(fleet, run)
        run.upload([4, 5])
        wait_until(lambda: run.status.current == 2, "the iteration ends", 35)
        assert fleet.metric(LOST) == 2
        run.start_all(range(6))
        run.upload(range(6))
        run.fetch(range(6))
        report = run.judge(quorum=6, may_fail=bool)
        assert report.failed.keys() == {1}
        assert report.members == {2: frozenset(range(6))}


def test_siblings_that_stop_together_hand_over_to_another_host(tmp_path: Path) -> None:
    """Each of them finds the other one still there, and must not rely on it."""
    with fleet_of(tmp_path, {0: 0, 1: 0, 2: 1}, places=6) as fleet, Run(fleet) as run:
        run.start_all(range(6))
        run.upload([0, 1], server=0)
        run.upload([2, 3], server=1)
        stopping = [fleet.cluster.processes.pop(fleet.cluster.name(n)) for n in (0, 1)]
        for process in stopping:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(30) for process in stopping] == [0, 0]
        run.upload([4, 5], server=2)
        run.fetch(range(6), server=2)
        report = run.judge(quorum=6)
        assert report.members == {1: frozenset(range(6))}
        assert fleet.metric(LOST, [2]) == 0


# ---- newcomers


def test_a_newcomer_takes_the_current_iteration_and_model(tmp_path: Path) -> None:
    older = {name: values + 7 for name, values in MODEL.items()}
    with fleet_of(tmp_path, {0: 0}, places=4) as fleet, Run(fleet) as run:
        write_model(tmp_path / "older.safetensors", older, set(), {})
        for _ in range(3):
            run.start_all(range(4))
            run.upload(range(4))
            run.fetch(range(4))
        run.start_all(range(4))
        run.upload([0, 1])
        fleet.add(1, 1)
        fleet.start(1, "--model", str(tmp_path / "older.safetensors"))
        run.prober.watch()
        run.see_everywhere(3)
        run.start_all([2, 3], server=1)  # repeats
        run.upload([2], server=0)
        run.upload([3], server=1)
        run.fetch(range(4), server=1)
        run.see_everywhere(4)
        run.start_all(range(4))
        run.upload(range(4))
        run.fetch(range(4))
        report = run.judge(quorum=4)
        assert report.members == dict.fromkeys(range(1, 6), frozenset(range(4)))
        given = {entry.iteration for entry in run.journal.received if entry.server == 1}
        assert given >= {3, 4}


# ---- schedulers


@ANY_HOSTS
def test_training_does_not_notice_schedulers(tmp_path: Path, hosts: dict[int, int]) -> None:
    with fleet_of(tmp_path, hosts, places=6) as fleet, Run(fleet, clients=6) as run:
        cluster = fleet.cluster
        cluster.start_scheduler()
        run.wait_for_iterations(3, 20)
        cluster.kill("scheduler")
        run.wait_for_iterations(3, 20)
        manage, admin = free_ports(2)
        addresses = (
            "--scheduler-manage-address",
            f"127.0.0.1:{manage}",
            "--admin-address",
            f"127.0.0.1:{admin}",
        )
        other = (*cluster.command("schedulerd"), "--yaml-config", str(cluster.yaml), *addresses)
        cluster.spawn("other scheduler", *other)
        cluster.start_scheduler()
        for port in (manage, cluster.manage):
            wait_until(
                lambda port=port: serves_all(port, len(hosts)), f"the scheduler at {port} sees all servers"
            )
        run.wait_for_iterations(3, 20)
        run.stop()
        run.judge(quorum=6)


def serves_all(port: int, servers: int) -> bool:
    answer = Cluster.get_http(port, "/state")
    return answer is not None and answer[0] == 200 and answer[1].count(b'"SERVER"') == servers


# ---- Redis


@ANY_HOSTS
@pytest.mark.parametrize("fault", ["restarted", "paused"])
def test_redis_away_in_mid_iteration_loses_nothing(tmp_path: Path, hosts: dict[int, int], fault: str) -> None:
    with fleet_of(tmp_path, hosts, places=PLACES) as fleet, Run(fleet) as run:
        run.start_all(range(PLACES))
        run.upload(range(PLACES // 2))
        if fault == "restarted":
            fleet.restart_redis()
        else:
            with fleet.redis_paused():
                early = threading.Thread(target=run.upload, args=([PLACES // 2],), daemon=True)
                early.start()  # it is held, or told to come again
                threading.Event().wait(3)
            early.join()
        run.upload(range(PLACES))  # half of them repeats
        run.fetch(range(PLACES))
        run.see_everywhere(1)
        assert run.judge(quorum=PLACES).members == {1: EVERYBODY}


@ANY_HOSTS
def test_a_wiped_redis_loses_nothing_without_a_name(tmp_path: Path, hosts: dict[int, int]) -> None:
    """The iteration goes on with all that was acknowledged, or fails by name; the next one is whole."""
    with fleet_of(tmp_path, hosts, places=PLACES) as fleet, Run(fleet) as run:
        for _ in range(2):
            run.start_all(range(PLACES))
            run.upload(range(PLACES))
            run.fetch(range(PLACES))
        run.start_all(range(PLACES))
        run.upload(range(PLACES // 2))
        fleet.wipe_redis()
        with RedisReader(fleet.cluster.redis_port) as redis:
            status = wait_until(lambda: status_of(redis), "the status is restored")
        if int(status["iterationNum"]) == 3:
            run.upload(range(PLACES))
            run.fetch(range(PLACES))
        run.start_all(range(PLACES))
        run.upload(range(PLACES))
        run.fetch(range(PLACES))
        run.see_everywhere(4)
        report = run.judge(quorum=PLACES, may_fail=lambda reason: WIPED in reason)
        assert report.members[4] == EVERYBODY
        assert report.members.keys() | report.failed.keys() == {1, 2, 3, 4}
        assert report.failed.keys() <= {3}


@ANY_HOSTS
@pytest.mark.parametrize("fault", ["cut", "hang", "reset"])
def test_a_server_cut_off_from_redis_loses_nothing(tmp_path: Path, hosts: dict[int, int], fault: str) -> None:
    victim = max(hosts)
    with fleet_of(tmp_path, hosts, places=PLACES) as fleet, Run(fleet) as run:
        run.start_all(range(PLACES))
        for client in range(PLACES // 2):
            run.upload([client], server=client % len(hosts))
        getattr(fleet.links[victim], fault)()
        asked = threading.Thread(target=run.upload, args=([PLACES // 2], victim), daemon=True)
        asked.start()  # it is held, or told to come again
        threading.Event().wait(2)
        fleet.links[victim].restore()
        asked.join()
        run.upload(range(PLACES // 2 + 1, PLACES))
        run.fetch(range(PLACES))
        run.see_everywhere(1)
        assert run.judge(quorum=PLACES).members == {1: EVERYBODY}


def test_a_paused_server_loses_nothing(tmp_path: Path) -> None:
    with fleet_of(tmp_path, TWO_HOSTS, places=PLACES) as fleet, Run(fleet) as run:
        run.start_all(range(PLACES))
        for client in range(PLACES // 2):
            run.upload([client], server=client % 2)
        paused = time.monotonic()
        fleet.pause(1)
        run.upload(range(PLACES // 2, PLACES), server=0)
        threading.Event().wait(3)
        assert run.prober.gap(paused) <= 1.0
        fleet.resume(1)
        run.fetch(range(PLACES))
        run.see_everywhere(1)
        assert run.judge(quorum=PLACES).members == {1: EVERYBODY}


# ---- the strict model of the original device


DEVICES, ITERATIONS = 6, 12
Fault = Callable[[Fleet, Run], None]


def nothing(fleet: Fleet, run: Run) -> None:
    """Let them train."""


def kill_and_restart(fleet: Fleet, run: Run) -> None:
    victim = max(fleet.running())
    fleet.kill(victim)
    fleet.start(victim)


def stop_and_restart(fleet: Fleet, run: Run) -> None:
    victim = max(fleet.running())
    assert fleet.kill(victim, signal.SIGTERM) == 0
    fleet.start(victim)


def join(fleet: Fleet, run: Run) -> None:
    fleet.add(5, 5)
    fleet.start(5)
    run.prober.watch()


def restart_redis(fleet: Fleet, run: Run) -> None:
    fleet.restart_redis()


def pause_redis(fleet: Fleet, run: Run) -> None:
    with fleet.redis_paused():
        threading.Event().wait(1.5)


def wipe_redis(fleet: Fleet, run: Run) -> None:
    fleet.wipe_redis()


def cut_off(fleet: Fleet, run: Run) -> None:
    link = fleet.links[max(fleet.running())]
    link.cut()
    threading.Event().wait(1.5)
    link.restore()


FAULTS: list[Fault] = [
    nothing,
    kill_and_restart,
    stop_and_restart,
    join,
    restart_redis,
    pause_redis,
    wipe_redis,
    cut_off,
]


@pytest.mark.parametrize(
    ("hosts", "fault"),
    [
        pytest.param(hosts, fault, id=f"{fault.__name__}-{name}")
        for name, hosts in (("one server", ONE_SERVER), ("one host", ONE_HOST), ("two hosts", TWO_HOSTS))
        for fault in FAULTS
        if hosts is TWO_HOSTS or fault in (kill_and_restart, stop_and_restart, wipe_redis, cut_off)
    ],
)
def test_strict_devices_train_through(tmp_path: Path, hosts: dict[int, int], fault: Fault) -> None:
    """Every device ends as the original does after its last iteration; any other end is an exception."""
    wiped = fault is wipe_redis
    with (
        fleet_of(tmp_path, hosts, places=DEVICES, fl_iteration_num=ITERATIONS) as fleet,
        Run(fleet) as run,
    ):
        devices = [train_slowly(fleet, run, client) for client in range(DEVICES)]
        ends: dict[int, object] = {}
        threads = [
            threading.Thread(target=keep_end, args=(ends, c, d), daemon=True) for c, d in enumerate(devices)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: any(map(failed, ends.values())) or half_uploaded(devices, 4), "some iterations")
        fault(fleet, run)
        wait_until(lambda: len(ends) == DEVICES or any(map(failed, ends.values())), "they finish", 25)
        assert ends == dict.fromkeys(range(DEVICES), Status.SUCCESS)
        report = run.judge(quorum=DEVICES, may_fail=lambda reason: wiped and WIPED in reason)
        assert len(report.members) >= ITERATIONS - (2 if wiped else 0)


def train_slowly(fleet: Fleet, run: Run, client: int) -> StrictDevice:
    """Make a strict device; they upload one after another."""
    http = RovingHttp(fleet, 100 + client)
    return strict_device(  # patience for 18 polls: 7 s
        http, run.journal, client, seconds=0.04 * (1 + client), time_scale=0.04
    )


def half_uploaded(devices: list[StrictDevice], iteration: int) -> bool:
    """Tell whether half of the devices have uploaded in the same iteration, this one or a later one."""
    newest = max(device.iteration for device in devices)
    there = [device for device in devices if device.iteration == newest and device.exchanges]
    uploaded = sum(device.exchanges[-1].round != "startFLJob" for device in there)
    return newest >= iteration and uploaded == DEVICES // 2


def keep_end(ends: dict[int, object], client: int, device: StrictDevice) -> None:
    """Run a device and keep what it gave, an exception included."""
    try:
        ends[client] = device.run()
    except Exception as error:
        ends[client] = error


def failed(end: object) -> bool:
    """Tell whether a device ended otherwise than it should."""
    return end is not Status.SUCCESS
