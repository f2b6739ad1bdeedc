"""Every fault that docs/RELIABILITY.md speaks of, on real hosts under load: ``make lab-full``.

What may be lost, and nothing else: the accepted updates of a server host that lost power, its ledgers being on tmpfs,
or that nobody could reach for longer than the lease (10 s) and loss_time (10 s). They are counted to the update.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from lab import supplies
from lab.cluster import SERVER_HOSTS, Cluster, endless_job
from lab.commands import wait_until
from lab.devices import Devices
from lab.fixtures import Watch

pytestmark = pytest.mark.full

UPDATES = 3  # accepted by server2 before the fault
BOTH = dict.fromkeys(SERVER_HOSTS, 1)
LOSS_S = 20  # lease and loss_time
CHECKPOINTS = "/var/lib/fl/checkpoints"
TINY_DISK = "size=64k,mode=0750,uid=fl,gid=fl"


def go_on(cluster: Cluster, devices: Devices, iterations: int = 3) -> None:
    """Wait until all servers are ready and training goes on."""
    cluster.await_servers(BOTH, 120)
    devices.wait_for_iterations(iterations, 120)


# ---- power


def test_power_cut_of_a_server_host(cluster: Cluster, devices: Devices, watch: Watch) -> None:
    with watch("power cut of a server host, back at once; 3 accepted updates in its ledger on tmpfs") as seen:
        with devices.held() as iteration:
            devices.let_upload(UPDATES, iteration, cluster.number("server2", 0))
            cluster["server2"].cut()
            cluster["server2"].up()
        go_on(cluster, devices)
    assert (seen.lost, seen.missing, seen.failed) == (UPDATES, UPDATES, {}), seen


def test_power_cut_of_a_server_host_for_a_minute(cluster: Cluster, devices: Devices, watch: Watch) -> None:
    with watch("power cut of a server host for a minute; 3 accepted updates in its ledger on tmpfs") as seen:
        with devices.held() as iteration:
            devices.let_upload(UPDATES, iteration, cluster.number("server2", 0))
            cluster["server2"].cut()
        began = time.monotonic()
        devices.wait_for_iterations(3, 90)
        time.sleep(max(0.0, began + 60 - time.monotonic()))
        cluster["server2"].up()
        go_on(cluster, devices)
    assert (seen.lost, seen.missing, seen.failed) == (UPDATES, UPDATES, {}), seen


def test_power_cut_of_the_host_of_redis(cluster: Cluster, devices: Devices, watch: Watch) -> None:
    with watch("power cut of the host of Redis, scheduler and balancer, back at once") as seen:
        with devices.held() as iteration:
            devices.let_upload(UPDATES, iteration, cluster.number("server2", 0))
            cluster["scheduler"].cut()
            cluster["scheduler"].up()
        go_on(cluster, devices)
    seen.must_be_harmless(devices_may_end=True)


def test_power_cut_of_the_worker_host(cluster: Cluster, devices: Devices, watch: Watch) -> None:
    with watch("power cut of the worker host (of a job without worker)") as seen:
        cluster["worker1"].cut()
        devices.wait_for_iterations(3, 60)
        cluster["worker1"].up()
    seen.must_be_harmless()
    assert seen.repeats == 0


def test_reboot_of_the_host_of_redis(cluster: Cluster, devices: Devices, watch: Watch) -> None:
    with watch("reboot of the host of Redis, scheduler and balancer") as seen:
        cluster["scheduler"].reboot()
        go_on(cluster, devices)
    seen.must_be_harmless(devices_may_end=True)


def test_reboot_of_a_server_host(cluster: Cluster, devices: Devices, watch: Watch) -> None:
    with watch("reboot of a server host: its ledger goes to the other host") as seen:
        with ThreadPoolExecutor(1) as pool:
            with devices.held() as iteration:
                devices.let_upload(UPDATES, iteration, cluster.number("server2", 0))
                reboot = pool.submit(cluster["server2"].reboot)
                wait_until(lambda: not cluster.ready("server2", 0), 30, "the server stops")
            reboot.result()  # the server holds whom a refusal would end until the iteration goes on
        go_on(cluster, devices)
    seen.must_be_harmless()


# ---- the network


@pytest.mark.parametrize("seconds", [5, 15, 60])
def test_partition(cluster: Cluster, devices: Devices, watch: Watch, seconds: int) -> None:
    with watch(
        f"a server host cut off from Redis and its peer for {seconds} s; 3 accepted updates there"
    ) as seen:
        with devices.held() as iteration:
            devices.let_upload(UPDATES, iteration, cluster.number("server2", 0))
            cluster.lab.network.part("server2", ["server1", "scheduler"])
        time.sleep(seconds)
        cluster.lab.network.heal()
        go_on(cluster, devices)
    if seconds < LOSS_S:
        seen.must_be_harmless(devices_may_end=True)
    else:
        assert (seen.lost, seen.missing, seen.failed) == (UPDATES, UPDATES, {}), seen


@pytest.mark.parametrize("seconds", [5, 15, 60])
def test_partition_from_redis(cluster: Cluster, devices: Devices, watch: Watch, seconds: int) -> None:
    with watch(f"both server hosts cut off from Redis for {seconds} s") as seen:
        with devices.held() as iteration:
            devices.let_upload(UPDATES, iteration, cluster.number("server2", 0))
            cluster.lab.network.part("scheduler", SERVER_HOSTS)
        time.sleep(seconds)
        cluster.lab.network.heal()
        go_on(cluster, devices)
    seen.must_be_harmless(devices_may_end=True)


def test_slow_and_lossy_network(cluster: Cluster, devices: Devices, watch: Watch) -> None:
    with watch("50 ms delay and 1 % loss on the way to each host, for 40 s") as seen:
        for host in ("scheduler", *SERVER_HOSTS):
            cluster.lab.network.slow(host, delay_ms=50, loss_percent=1)
        time.sleep(40)
        devices.wait_for_iterations(3, 120)
        cluster.lab.network.heal()
        go_on(cluster, devices)
    seen.must_be_harmless(devices_may_end=True)


# ---- hosts that stand still, clocks that do not


@pytest.mark.parametrize("seconds", [8, 40])
def test_paused_host(cluster: Cluster, devices: Devices, watch: Watch, seconds: int) -> None:
    with watch(f"a server host stands still for {seconds} s; 3 accepted updates there") as seen:
        with devices.held() as iteration:
            devices.let_upload(UPDATES, iteration, cluster.number("server2", 0))
            cluster["server2"].pause()
        time.sleep(seconds)
        cluster["server2"].resume()
        go_on(cluster, devices)
    if seconds < LOSS_S:
        seen.must_be_harmless(devices_may_end=True)
    else:
        assert (seen.lost, seen.missing, seen.failed) == (UPDATES, UPDATES, {}), seen


def test_a_clock_ten_minutes_ahead(cluster: Cluster, devices: Devices, watch: Watch) -> None:
    try:
        with watch("a server host's clock 10 minutes ahead, for 30 s") as seen:
            cluster["server2"].skew(600)
            go_on(cluster, devices)
            time.sleep(30)
            devices.wait_for_iterations(3, 60)
    finally:
        cluster["server2"].unskew()
    seen.must_be_harmless(devices_may_end=True)


@pytest.mark.parametrize("host", ["server2", "scheduler"])
def test_a_clock_steps_back(cluster: Cluster, devices: Devices, watch: Watch, host: str) -> None:
    cluster[host].skew(0)
    try:
        cluster.await_servers(BOTH, 120)
        with watch(f"the clock of {host} steps back by 10 minutes") as seen:
            cluster[host].step_clock(-600)
            devices.wait_for_iterations(5, 60)
    finally:
        cluster[host].unskew()
    seen.must_be_harmless()


# ---- full disks


def test_full_disk_for_checkpoints(cluster: Cluster, devices: Devices, watch: Watch) -> None:
    """While two servers hold each model, disks may be full; one alone waits until it can write."""
    with watch(
        "the disks for checkpoints full on both server hosts, one server alone for 15 s of it"
    ) as seen:
        for host in SERVER_HOSTS:
            fill_checkpoints(cluster, host)
            devices.wait_for_iterations(3, 60)
        cluster["server2"].run("systemctl", "stop", "fl-serverd@0")
        wait_until(
            lambda: "the new model cannot be written" in cluster.reasons("server1"),
            60,
            "/readyz tells of the full disk",
        )
        time.sleep(15)
        for host in SERVER_HOSTS:
            cluster[host].run("rm", f"{CHECKPOINTS}/filling")
        cluster["server2"].run("systemctl", "start", "fl-serverd@0")
        go_on(cluster, devices)
    seen.must_be_harmless(devices_may_end=True)
    said = [cluster[host].journal("-u", "fl-serverd@0", "-b") for host in SERVER_HOSTS]
    assert any("has no checkpoint, 1 other servers hold it" in text for text in said)
    for host in SERVER_HOSTS:
        cluster[host].run("umount", CHECKPOINTS)


def fill_checkpoints(cluster: Cluster, host: str) -> None:
    """Put a small file system in the place of the checkpoints, and leave no room in it."""
    cluster[host].run("mount", "-t", "tmpfs", "-o", TINY_DISK, "tiny", CHECKPOINTS)
    cluster[host].sh(f"cat /dev/zero >{CHECKPOINTS}/filling", check=False)


# ---- certificates and upgrades


@pytest.mark.parametrize("renew", ["certificates", "passwords"])
def test_certificates_are_renewed_under_load(
    cluster: Cluster, devices: Devices, watch: Watch, renew: str
) -> None:
    cluster["worker1"].run(
        "systemctl", "stop", "fl-workerd", check=False
    )  # of an earlier job without servers now
    before = processes(cluster)
    with watch(f"rotate_certs.yml, new {renew} for all hosts") as seen:
        cluster.play("rotate_certs.yml", endless_job(), "-e", f"renew={renew}")
        go_on(cluster, devices)
    seen.must_be_harmless()
    again = {host for host, process in processes(cluster).items() if process != before[host]}
    assert again == ({"scheduler", *SERVER_HOSTS} if renew == "passwords" else set())


def processes(cluster: Cluster) -> dict[str, int]:
    """Return the daemon's process of each host that has one."""
    units = {"scheduler": "fl-schedulerd", **dict.fromkeys(SERVER_HOSTS, "fl-serverd@0")}
    return {host: cluster.main_pid(host, unit) for host, unit in units.items()}


def test_rolling_update_under_load(cluster: Cluster, devices: Devices, watch: Watch) -> None:
    wheel = supplies.wheel("0.1.1")
    with watch("rolling_update.yml to another version") as seen:
        cluster.play(
            "rolling_update.yml", endless_job(), "-e", f"fl_wheel={wheel}", "--limit", "all:!workers"
        )
        go_on(cluster, devices)
    seen.must_be_harmless()
    for host in SERVER_HOSTS:
        assert cluster[host].run("readlink", "/opt/fl/current").strip().endswith("0.1.1")
