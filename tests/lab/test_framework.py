"""The lab itself: its faults are real, and each is over when it has been healed."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from lab import cgroups
from lab.commands import wait_until
from lab.controller import read_recap
from lab.errors import CommandFailed, HostDown, LabError
from lab.host import Host
from lab.inventory import controller_address, read_hosts
from lab.lab import Lab
from lab.network import Faults, render_rules
from lab.places import INVENTORY
from lab.supplies import part_of_lock

PORT = 7007
# A service for the tests: says what time it is, once per line that comes in, and keeps what it is told.
CLOCK = f"""\
import contextlib, socket, time
with socket.create_server(("", {PORT})) as server:
    while True:
        with contextlib.suppress(OSError), server.accept()[0] as peer, peer.makefile("rw") as lines:
            for line in lines:
                print(time.time(), flush=True, file=lines)
"""
UNIT = """\
[Service]
ExecStart=/usr/bin/python3 /opt/lab-clock.py
Restart=no
DynamicUser=yes
ProtectSystem=strict
NoNewPrivileges=yes
PrivateTmp=yes
PrivateDevices=yes
SystemCallFilter=@system-service
[Install]
WantedBy=multi-user.target
"""


@pytest.fixture(autouse=True)
def healed(lab: Lab) -> Iterator[None]:
    """Whatever a test breaks is whole for the next one."""
    yield
    for host in lab:
        if host.is_paused:
            host.resume()
    lab.network.heal()
    lab.up()


@pytest.fixture
def server(lab: Lab) -> Host:
    """A host with the clock service."""
    host = lab["server1"]
    host.write("/opt/lab-clock.py", CLOCK)
    host.write("/etc/systemd/system/lab-clock.service", UNIT)
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "enable", "--now", "lab-clock.service")
    wait_until(lambda: answers(host), 10, "the clock service answers")
    return host


class Caller:
    """A connection from the controller to the clock service."""

    def __init__(self, host: Host, seconds: float = 3) -> None:
        self.socket = socket.create_connection((host.address, PORT), timeout=seconds)
        self._lines = self.socket.makefile("rw")

    def ask(self) -> float:
        """What time it is there; raises OSError if nobody answers."""
        self._lines.write("?\n")
        self._lines.flush()
        if not (answer := self._lines.readline()):
            raise ConnectionResetError("the other side has closed")
        return float(answer)

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # what could not be sent before stays unsent
            self._lines.close()
        self.socket.close()


def answers(host: Host) -> bool:
    """Whether a new connection to the clock service works."""
    try:
        with Caller(host, 1) as caller:
            return bool(caller.ask())
    except OSError:
        return False


def reaches(one: Host, address: str) -> bool:
    """Whether one host reaches an address."""
    try:
        one.run("ping", "-c", "2", "-i", "0.1", "-W", "1", address)
    except CommandFailed:
        return False
    return True


# --- pure parts


def test_hosts_and_the_controller_are_in_one_network() -> None:
    hosts = read_hosts(INVENTORY)
    assert {"scheduler", "server1", "server2", "worker1"} <= hosts.keys()
    assert controller_address(hosts) not in hosts.values()


def test_an_inventory_without_an_address_is_refused(tmp_path: Path) -> None:
    inventory = tmp_path / "hosts.yml"
    inventory.write_text("all: {children: {servers: {hosts: {one: {ansible_host: 10.0.0.2}, other: {}}}}}")
    with pytest.raises(LabError, match="no ansible_host for other"):
        read_hosts(inventory)
    inventory.write_text("all: {hosts: {one: {ansible_host: 10.0.0.2}, other: {ansible_host: 10.0.1.2}}}")
    with pytest.raises(LabError, match="one /24 network"):
        read_hosts(inventory)
    inventory.write_text("all: {hosts: {one: {ansible_host: 10.0.0.1}}}")
    with pytest.raises(LabError, match="controller's address"):
        read_hosts(inventory)
    inventory.write_text("all: {hosts: {a: {ansible_host: 10.0.0.9}}, children: {b: {hosts: {a: }}}}")
    assert read_hosts(inventory) == {"a": IPv4Address("10.0.0.9")}


def test_recaps_are_read() -> None:
    output = """\
ok: [server1] => {"msg": "PLAY RECAP"}
PLAY RECAP *********************************************************************
server-1                   : ok=2    changed=1    unreachable=0    failed=0    skipped=3
10.0.0.2                   : ok=0    changed=0    unreachable=1    failed=0    skipped=0
"""
    recap = read_recap(output)
    assert recap["server-1"] == {"ok": 2, "changed": 1, "unreachable": 0, "failed": 0, "skipped": 3}
    assert recap["10.0.0.2"]["unreachable"] == 1
    assert read_recap("ERROR! no such playbook") == {}


def test_both_layouts_of_control_groups_are_known() -> None:
    pure = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"
    assert cgroups.find_hierarchies(pure) == cgroups.Hierarchies(Path("/sys/fs/cgroup"))
    hybrid = (
        "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n"
        "cgroup /sys/fs/cgroup/blkio cgroup rw,blkio 0 0\n"
        "cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0\n"
        "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
    )
    found = cgroups.find_hierarchies(hybrid)
    assert found.unified == Path("/sys/fs/cgroup/unified")
    assert [path.name for path in found.version_1] == ["cpu,cpuacct", "systemd"]
    with pytest.raises(LabError, match="version 2"):
        cgroups.find_hierarchies("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n")


def test_a_network_without_faults_drops_nothing() -> None:
    assert "drop" not in render_rules(Faults())
    assert "drop" not in render_rules(Faults(lossy={"server1": 0.0}))


def test_part_of_a_lock_is_what_some_packages_need() -> None:
    lock = """\
# a comment
numpy==2 \\
    --hash=sha256:1
    # via
    #   lib (setup.py)
    #   scipy
scikit-learn==1 \\
    --hash=sha256:2
    # via lib (setup.py)
scipy==3 \\
    --hash=sha256:3
    # via scikit-learn
other==4 \\
    --hash=sha256:4
    # via numpy-extras
"""
    part = part_of_lock(lock, ["scikit-learn"])
    assert [line.split("==")[0] for line in part.splitlines() if "==" in line] == [
        "numpy",
        "scikit-learn",
        "scipy",
    ]
    assert part.count("--hash") == 3


# --- power


def test_a_cut_host_falls_silent_and_returns_with_its_disk(lab: Lab, server: Host) -> None:
    server.sh("echo kept >/root/disk; echo lost >/run/memory")
    with Caller(server) as caller:
        caller.ask()
        server.cut()
        assert not server.is_up
        with pytest.raises(HostDown):
            server.run("true")
        with pytest.raises(TimeoutError):  # neither FIN nor RST: it cannot say goodbye
            caller.ask()
    server.up()
    assert server.read("/root/disk") == "kept\n"
    with pytest.raises(CommandFailed, match="No such file"):
        server.read("/run/memory")
    assert "Power" not in server.journal("-u", "lab-clock")
    wait_until(lambda: answers(server), 10, "the enabled service answers again")


def test_a_host_whose_processes_die_closes_its_connections(lab: Lab, server: Host) -> None:
    with Caller(server) as caller:
        caller.ask()
        server.die()
        with pytest.raises(ConnectionResetError):
            caller.ask()


@pytest.mark.full
def test_a_host_that_is_switched_off_in_order_stops_its_services(lab: Lab, server: Host) -> None:
    server.poweroff()
    assert not server.is_up
    assert "Stopped lab-clock.service" in server.journal("_PID=1")


@pytest.mark.full
def test_a_host_reboots_by_itself(lab: Lab, server: Host) -> None:
    server.sh("echo lost >/run/memory")
    server.reboot()
    assert server.sh("test ! -e /run/memory && echo gone") == "gone\n"
    wait_until(lambda: answers(server), 10, "the enabled service answers again")


def test_a_paused_host_takes_connections_and_answers_when_it_goes_on(lab: Lab, server: Host) -> None:
    server.pause()
    assert server.is_paused
    with Caller(server, 1) as caller:
        with pytest.raises(TimeoutError):
            caller.ask()
        server.resume()
    with Caller(server, 10) as caller:
        caller.ask()


@pytest.mark.full
def test_a_new_host_has_nothing_of_the_old_one(lab: Lab, server: Host) -> None:
    server.sh("echo old >/root/disk")
    lab.renew("server1")
    with pytest.raises(CommandFailed, match="No such file"):
        server.read("/root/disk")
    assert lab.controller.sh(f"ssh deploy@{server.address} sudo id -un").stdout == "root\n"


# --- network


def test_a_partition_parts_these_hosts_and_no_others(lab: Lab) -> None:
    one, other, third = lab["server1"], lab["server2"], lab["scheduler"]
    assert reaches(one, other.address)
    lab.network.part("server1", ["server2", "controller"])
    assert not reaches(one, other.address)
    assert not reaches(other, one.address)
    assert not reaches(one, lab.controller.address)
    assert reaches(one, third.address)
    assert reaches(other, third.address)
    lab.network.heal()
    assert reaches(one, other.address)


def test_an_unplugged_host_notices(lab: Lab) -> None:
    host = lab["server2"]
    host.unplug()
    assert host.read("/sys/class/net/host0/carrier") == "0\n"
    assert not reaches(lab["server1"], host.address)
    host.plug()
    wait_until(lambda: reaches(lab["server1"], host.address), 10, "the host is reached again")


def test_loss_is_random(lab: Lab) -> None:
    lab.network.lose("server2", 30)
    ping = lab["server1"].sh("ping -q -c 300 -i 0.002 -W 1 server2 || true")
    received = int(ping.split(" received")[0].split()[-1])
    assert 90 < received < 205, ping  # of 300, half get through both ways: 147 on average


def test_a_slow_cable_delays_and_keeps_connections(lab: Lab, server: Host) -> None:
    with Caller(server, 10) as caller:
        assert round_trip(caller) < 0.05
        lab.network.slow("server1", delay_ms=50)
        assert 0.1 <= round_trip(caller) < 0.5
        lab.network.slow("server1", delay_ms=100)
        assert 0.2 <= round_trip(caller) < 0.7
        lab.network.heal()
        assert round_trip(caller) < 0.05


@pytest.mark.full
def test_a_slow_cable_carries_bulk_and_stays_over_a_power_cut(lab: Lab, server: Host) -> None:
    lab.network.slow("server1", delay_ms=5, loss_percent=1)
    payload = 8 * 1024 * 1024
    with sink(lab.controller.address) as received:
        send = f"import socket; socket.create_connection(('controller', {PORT})).sendall(bytes({payload}))"
        server.run("python3", "-c", send, timeout=60)
        wait_until(lambda: received[0] == payload, 30, "all bytes have come")
    server.cut()
    server.up()
    with Caller(server, 10) as caller:
        assert round_trip(caller) >= 0.01


def round_trip(caller: Caller) -> float:
    """Seconds from a question to its answer, the best of three."""
    times = []
    for _ in range(3):
        started = time.monotonic()
        caller.ask()
        times.append(time.monotonic() - started)
    return min(times)


@contextmanager
def sink(address: str) -> Iterator[list[int]]:
    """A listener on the controller that counts what one peer sends it."""
    received = [0]

    def take(listener: socket.socket) -> None:
        with listener.accept()[0] as peer:
            while data := peer.recv(65536):
                received[0] += len(data)

    with socket.create_server((address, PORT)) as listener:
        listener.settimeout(60)
        thread = threading.Thread(target=take, args=(listener,))
        thread.start()
        yield received
        thread.join(60)


# --- clock


def test_a_services_clock_is_wrong_and_steps_while_it_runs(lab: Lab, server: Host) -> None:
    server.skew(600, prefix="lab-")
    wait_until(lambda: answers(server), 10, "the clock service answers")
    with Caller(server) as caller:
        assert offset(caller) == pytest.approx(600, abs=5)
        server.step_clock(-30)
        assert offset(caller) == pytest.approx(-30, abs=5)
    assert float(server.run("date", "+%s")) == pytest.approx(time.time(), abs=5)
    server.unskew(prefix="lab-")
    wait_until(lambda: answers(server), 10, "the clock service answers")
    with Caller(server) as caller:
        assert offset(caller) == pytest.approx(0, abs=5)


def offset(caller: Caller) -> float:
    """How many seconds the service's clock is ahead of ours."""
    return caller.ask() - time.time()


def test_no_host_turns_this_machines_clock(lab: Lab) -> None:
    with pytest.raises(CommandFailed, match="not permitted"):
        lab["server1"].run("date", "-s", f"@{time.time():.0f}")  # harmless, should it work after all


# --- limits and rights in a host


def test_a_memory_limit_holds(lab: Lab) -> None:
    eat = ("python3", "-c", "x = bytearray(80 << 20); print('ate it')")
    limited = ("systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--property=MemorySwapMax=0")
    host = lab["worker1"]
    assert "ate it" in host.run(*limited, "--property=MemoryMax=160M", *eat)
    with pytest.raises(CommandFailed):
        host.run(*limited, "--property=MemoryMax=40M", *eat)


def test_a_task_limit_holds(lab: Lab) -> None:
    fork = ("sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 1 & done; wait")
    with pytest.raises(CommandFailed):
        lab["worker1"].run(
            "systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--property=TasksMax=5", *fork
        )


def test_a_host_sets_up_its_own_network(lab: Lab) -> None:
    one, other = lab["server1"], lab["server2"]
    one.run("sysctl", "-w", "net.ipv4.icmp_echo_ignore_all=1")
    assert not reaches(other, one.address)
    one.run("sysctl", "-w", "net.ipv4.icmp_echo_ignore_all=0")
    assert reaches(other, one.address)


# --- supplies and the controller


@pytest.mark.full
def test_hosts_install_what_roles_need(lab: Lab) -> None:
    host = lab["worker1"]
    host.sh(
        "apt-get -qq update && apt-get -qq install -y --no-install-recommends python3-venv nftables",
        timeout=120,
    )
    host.sh("nft add table inet probe && nft list tables && nft delete table inet probe")
    host.sh("python3 -m venv /root/venv && /root/venv/bin/pip -q install numpy", timeout=120)
    with pytest.raises(CommandFailed, match="No matching distribution"):
        host.run("/root/venv/bin/pip", "install", "no-such-thing")
    lab.renew("worker1")


PLAYBOOK = """\
- hosts: all
  gather_facts: false
  become: true
  tasks:
    - ansible.builtin.raw: touch /run/played
      changed_when: inventory_hostname == "server1"
    - ansible.builtin.raw: "false"
      when: fail | default(false)
"""


@pytest.fixture
def playbook(tmp_path: Path) -> str:
    """A playbook that changes something on server1, and fails if it shall."""
    path = tmp_path / "probe.yml"
    path.write_text(PLAYBOOK)
    return str(path)


def test_a_playbook_reports_what_it_changed(lab: Lab, playbook: str) -> None:
    played = lab.controller.play(playbook)
    assert played.changed == {"server1": 1}
    assert played.failed == {}
    assert played.recap.keys() == {host.name for host in lab}
    assert lab["server2"].sh("stat -c %U /run/played") == "root\n"


@pytest.mark.full
def test_a_playbook_that_fails_is_an_error(lab: Lab, playbook: str) -> None:
    with pytest.raises(CommandFailed, match=r"probe\.yml"):
        lab.controller.play(playbook, "-e", "{fail: true}")
    lab["server2"].cut()
    played = lab.controller.play(playbook, "--limit", "server2", check=False)
    assert played.failed == {"server2": 1}
    assert played.code != 0


def test_nothing_outside_is_reached(lab: Lab) -> None:
    with pytest.raises(OSError, match="unreachable"):
        socket.create_connection(("198.51.100.1", 80), timeout=2)
    assert "unreachable" in lab["server1"].sh("ping -c 1 -W 1 198.51.100.1 || true")
