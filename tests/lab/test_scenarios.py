"""What operators and bad luck do to a cluster while devices train: nothing that was accepted is lost.

Every test begins and ends with two servers on two hosts. Where it matters who holds what, ``devices.held()`` lets all
places of an iteration be given and nobody upload but those whom the test lets through.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from lab.cluster import OPERATOR_PORT, Cluster, endless_job
from lab.commands import wait_until
from lab.devices import Devices
from lab.fixtures import Watch

UPDATES = 3  # accepted by a server before something happens to it


# ---- scaling


def test_scale_out_by_the_playbook(cluster: Cluster, devices: Devices, watch: Watch) -> None:
    with watch("scale.yml: 2 servers to 4") as seen:
        cluster.play("scale.yml", endless_job(), "-e", "servers=4")
        cluster.await_servers({"server1": 2, "server2": 2})
        new = [cluster.number("server1", 1), cluster.number("server2", 1)]
        wait_until(
            lambda: set(new) <= {entry.server for entry in devices.journal.acknowledged},
            60,
            "new servers accept",
        )
        devices.wait_for_iterations(2, 60)
    seen.must_be_harmless()


def test_scale_in_with_updates_in_the_ledgers_of_those_that_go(
    cluster: Cluster, devices: Devices, watch: Watch
) -> None:
    cluster.set_servers(2)
    with (
        watch("4 servers to 1, by `systemctl disable --now` and `fl scale 0`") as seen,
        ThreadPoolExecutor(2) as pool,
    ):
        with devices.held() as iteration:
            devices.let_upload(2, iteration, cluster.number("server1", 1))
            devices.let_upload(2, iteration, cluster.number("server2", 0))
            devices.let_upload(2, iteration, cluster.number("server2", 1))
            first = pool.submit(
                cluster["server1"].run, "systemctl", "disable", "--now", "fl-serverd@1.service"
            )
            others = pool.submit(cluster["server2"].run, "fl", "scale", "0", timeout=120)
            going = [("server1", 1), ("server2", 0), ("server2", 1)]
            wait_until(lambda: not any(cluster.ready(*server) for server in going), 30, "all three stop")
        first.result()
        others.result()
        cluster.await_servers({"server1": 1, "server2": 0})
        devices.wait_for_iterations(3, 60)
    seen.must_be_harmless()


# ---- SIGKILL


def test_a_killed_server_comes_back_with_its_updates(
    cluster: Cluster, devices: Devices, watch: Watch
) -> None:
    unit = "fl-serverd@0.service"
    with watch("SIGKILL of a server, alone on its host") as seen:
        with devices.held() as iteration:
            devices.let_upload(UPDATES, iteration, cluster.number("server2", 0))
            pid = cluster.main_pid("server2", unit)
            cluster.kill("server2", unit)
        cluster.await_another("server2", unit, than=pid)
        cluster.await_servers({"server1": 1, "server2": 1})
        devices.wait_for_iterations(3, 60)
    seen.must_be_harmless()


def test_a_sibling_publishes_the_updates_of_a_killed_server(
    cluster: Cluster, devices: Devices, watch: Watch
) -> None:
    """In the sandbox of the real unit: its own user, private mounts, the shared tmpfs."""
    cluster.set_servers(2)
    drop_in = "/run/systemd/system/fl-serverd@1.service.d/stay-dead.conf"
    cluster["server1"].write(drop_in, "[Service]\nRestart=no\n")
    cluster["server1"].run("systemctl", "daemon-reload")
    with watch("SIGKILL of a server with a sibling, which stays dead") as seen:
        with devices.held() as iteration:
            devices.let_upload(UPDATES, iteration, cluster.number("server1", 1))
            cluster.kill("server1", "fl-serverd@1.service")
            wait_until(
                lambda: (
                    cluster["server1"].units("fl-serverd@1.service") == {"fl-serverd@1.service": "failed"}
                ),
                30,
                "it is dead",
            )
        devices.wait_for_iterations(3, 60)
    seen.must_be_harmless()
    assert "adopt" in cluster["server1"].journal("-u", "fl-serverd@0.service", "--since", "-2min")
    cluster["server1"].run("rm", drop_in)
    cluster["server1"].run("systemctl", "daemon-reload")


def test_a_killed_redis(cluster: Cluster, devices: Devices, watch: Watch) -> None:
    unit = "redis-server.service"
    with watch("SIGKILL of redis-server") as seen:
        pid = cluster.main_pid("scheduler", unit)
        cluster.kill("scheduler", unit)
        cluster.await_another("scheduler", unit, than=pid)
        devices.wait_for_iterations(3, 60)
    seen.must_be_harmless()


def test_a_killed_scheduler_is_missed_by_no_device(cluster: Cluster, devices: Devices, watch: Watch) -> None:
    unit = "fl-schedulerd.service"
    with watch("SIGKILL of the scheduler") as seen:
        pid = cluster.main_pid("scheduler", unit)
        cluster.kill("scheduler", unit)
        devices.wait_for_iterations(3, 60)
        cluster.await_another("scheduler", unit, than=pid)
        wait_until(lambda: "CLUSTER_READY" in state_of(cluster), 60, "the scheduler answers", pause=0.3)
    seen.must_be_harmless()
    assert seen.repeats == 0


def state_of(cluster: Cluster) -> str:
    """Return what /state says to an operator on the controller, "" while nobody answers."""
    url = f"https://{cluster['scheduler'].address}:{OPERATOR_PORT}/state"
    return cluster.lab.controller.sh(f"curl -s --cacert {cluster.ca_file} {url} || true").stdout


# ---- the network


def test_a_partition(cluster: Cluster, devices: Devices, watch: Watch) -> None:
    with watch("one server host cut off from Redis and its peer for 8 s") as seen:
        with devices.held() as iteration:
            devices.let_upload(UPDATES, iteration, cluster.number("server2", 0))
            cluster.lab.network.part("server2", ["server1", "scheduler"])
            time.sleep(8)  # the length of the fault
            cluster.lab.network.heal()
        devices.wait_for_iterations(3, 60)
    seen.must_be_harmless()
