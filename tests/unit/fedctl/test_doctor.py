"""``fl doctor``: what measured facts mean, and what is looked at."""

from __future__ import annotations

import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedcore.config import Address, Role, Settings
from fedctl.doctor import findings, host
from fedctl.doctor.findings import Daemon, Level, Port, Seen, Volume, of_daemon

NOW = datetime(2026, 5, 1, tzinfo=UTC)
GIB = 1 << 30
ADMIN, DEVICES = Address("127.0.0.1", 6866), Address("127.0.0.1", 6666)
SERVER = Daemon("fl-serverd@0", ADMIN, {"devices": DEVICES})


@pytest.mark.parametrize(
    ("offset", "doubt", "level", "words"),
    [
        (0.0, 0.001, Level.OK, "0.000 s ahead of"),
        (4.9, 0.0, Level.OK, "4.900 s behind"),
        (-4.9, 0.0, Level.OK, "4.900 s ahead of"),
        (5.1, 0.0, Level.WARNING, "5.100 s behind"),
        (-600.0, 0.1, Level.WARNING, "600.000 s ahead of"),
        (5.1, 0.2, Level.OK, "give or take 0.200 s"),  # may be the way
    ],
)
def test_a_clock(offset: float, doubt: float, level: Level, words: str) -> None:
    found = findings.of_clock(offset, doubt)
    assert found.level is level and words in found.text
    assert bool(found.remedy) == (level is not Level.OK)


@pytest.mark.parametrize(
    ("begins", "ends", "level", "words"),
    [
        (-1, 365, Level.OK, "is valid until 2027-05-01"),
        (-1, 90, Level.OK, "is valid until"),
        (-1, 89, Level.WARNING, "expires on 2026-07-29, in 89 days"),
        (-1, -0.5, Level.FAILED, "has expired on 2026-04-30"),
        (1, 365, Level.FAILED, "is valid only from 2026-05-02"),
    ],
)
def test_a_certificate(begins: float, ends: float, level: Level, words: str) -> None:
    dates = NOW + timedelta(days=begins), NOW + timedelta(days=ends)
    found = findings.of_certificate("x", *dates, NOW, 90)
    assert found.level is level and words in found.text


@pytest.mark.parametrize(
    ("total", "instances", "levels"),
    [
        (3 * GIB, 2, [Level.OK]),
        (3 * GIB - 1, 2, [Level.WARNING]),
        (2 * GIB, 2, [Level.WARNING]),
        (2 * GIB - 1, 2, [Level.FAILED]),
        (9 * GIB, 2, [Level.OK, Level.WARNING]),  # more than the host's memory can hold
    ],
)
def test_the_room_for_ledgers(total: int, instances: int, levels: list[Level]) -> None:
    found = findings.of_ledgers("/x", Volume(total, 0, True, True), GIB, instances, 10 * GIB)
    assert [finding.level for finding in found] == levels


def test_ledgers_on_a_disk_do_not_take_memory() -> None:
    (found,) = findings.of_ledgers("/x", Volume(100 * GIB, 0), GIB, 2, 10 * GIB)
    assert (found.level, found.text) == (Level.OK, "/x: 100 GiB for 2 ledgers of 1 GiB")
    (found,) = findings.of_ledgers("/x", Volume(GIB // 2, 0), 3 * GIB // 2, 1, 10 * GIB)
    assert found.text == "/x: 512 MiB for 1 ledger of 1.5 GiB"
    assert "ledger_dir" in found.remedy


def test_a_mount_of_its_own() -> None:
    assert findings.of_mount("/x", Volume(1, 1, own=True)) == []
    assert findings.of_mount("/x", Volume(1, 1))[0].level is Level.WARNING


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (252 * GIB + 1, "252 GiB"), (5 << 50, "5120 TiB")],
)
def test_sizes_in_words(count: int, words: str) -> None:
    assert findings._size(count) == words


@pytest.mark.parametrize(
    ("free", "level"), [(400, Level.OK), (399, Level.WARNING), (100, Level.WARNING), (99, Level.FAILED)]
)
def test_the_room_for_models(free: int, level: Level) -> None:
    assert findings.of_checkpoints("/x", Volume(1000, free), 100).level is level


@pytest.mark.parametrize(
    ("seen", "awaited", "expected"),
    [
        (Seen(True, "", {ADMIN: Port.LISTENS, DEVICES: Port.LISTENS}), True, [("daemons", Level.OK)]),
        (
            Seen(True, "no connection to Redis", {ADMIN: Port.LISTENS, DEVICES: Port.LISTENS}),
            True,
            [("daemons", Level.WARNING)],
        ),
        (
            Seen(True, "", {ADMIN: Port.LISTENS, DEVICES: Port.FREE}),
            True,
            [("ports", Level.FAILED), ("daemons", Level.OK)],
        ),
        (Seen(False, "", {ADMIN: Port.FREE, DEVICES: Port.FREE}), False, [("ports", Level.OK)]),
        (
            Seen(False, "", {ADMIN: Port.FREE, DEVICES: Port.FREE}),
            True,
            [("ports", Level.OK), ("daemons", Level.WARNING)],
        ),
        (Seen(False, "", {ADMIN: Port.LISTENS, DEVICES: Port.FREE}), False, [("ports", Level.FAILED)]),
        (
            Seen(False, "", {ADMIN: Port.TAKEN, DEVICES: Port.NO_ADDRESS}),
            False,
            [("ports", Level.FAILED)] * 2,
        ),
        (Seen(False, "", {ADMIN: Port.FREE, DEVICES: Port.REFUSED}), False, [("ports", Level.FAILED)]),
    ],
)
def test_a_daemon(seen: Seen, awaited: bool, expected: list[tuple[str, Level]]) -> None:
    found = of_daemon(SERVER, seen, awaited=awaited)
    assert [(finding.check, finding.level) for finding in found] == expected
    assert all(finding.remedy for finding in found if finding.level is not Level.OK)


def test_who_listens_at_a_port_of_a_daemon_that_does_not_run_has_taken_it() -> None:
    found = of_daemon(SERVER, Seen(False, "", {ADMIN: Port.LISTENS, DEVICES: Port.FREE}), awaited=False)
    assert found[0].text == "127.0.0.1:6866, admin of fl-serverd@0: taken"
    assert "ss -ltnp" in found[0].remedy


def test_the_ways_to_other_servers() -> None:
    assert [f.level for f in findings.of_nodes({})] == [Level.OK]
    found = findings.of_nodes({"10.0.0.1:6766": "", "10.0.0.2:6766": "timed out", "10.0.0.3:6766": ""})
    assert [finding.level for finding in found] == [Level.OK, Level.FAILED]
    assert found[0].text == "reachable: 10.0.0.1:6766, 10.0.0.3:6766"
    assert "10.0.0.2:6766 is alive, but cannot be reached from here: timed out" in found[1].text


# ---- this host


def test_roles_follow_from_enabled_units() -> None:
    assert host.roles_of([]) == (set(), [])
    links = [
        "fl-serverd@10.service",
        "fl-schedulerd.service",
        "fl-serverd@2.service",
        "x",
        "fl-serverd@x.service",
    ]
    assert host.roles_of(links) == ({Role.SCHEDULER, Role.SERVER}, [2, 10])
    assert host.roles_of(["fl-workerd.service"]) == ({Role.WORKER}, [])


def test_what_is_used_is_listed_once(tmp_path: Path) -> None:
    settings = dict.fromkeys((Role.SCHEDULER, Role.SERVER), Settings())
    needs = host.needs_of(tmp_path / "fl.yaml", settings, tmp_path)
    assert [(str(need.path.relative_to(tmp_path)), need.write) for need in needs] == [
        ("fl.yaml", False),
        ("fl_ckpt", True),
        ("fl_ckpt/ledgers", True),
    ]


def test_files_that_are_not_there_or_not_ours(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    needs = [
        host.Need(tmp_path / "there", "a"),
        host.Need(tmp_path / "missing", "b"),
        host.Need(tmp_path / "new" / "folder", "c", True),
        host.Need(tmp_path / "there" / "new", "d", True),
    ]
    found = host.files(needs, "")
    assert [finding.text.partition(": ")[2] for finding in found] == [
        "it is not there",
        "permission denied",
    ]
    assert "(b)" in found[0].text and "(d)" in found[1].text
    assert host.files(needs[:1], "")[0].level is Level.OK


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look with another user's eyes")
def test_files_are_seen_with_the_daemons_eyes(tmp_path: Path) -> None:
    secret, folder = tmp_path / "secret", tmp_path / "closed"
    folder.mkdir(0o700)
    (folder / "file").touch()
    secret.touch(0o600)
    needs = [host.Need(secret, "a"), host.Need(folder / "file", "b"), host.Need(folder / "new", "c", True)]
    assert host.files(needs, "")[0].level is Level.OK
    found = host.files(needs, "nobody")
    assert [finding.level for finding in found] == [Level.FAILED] * 3
    assert all("user nobody cannot" in f.text and "permission denied" in f.text for f in found)


def test_ports_are_tried() -> None:
    with socket.socket() as bound, socket.socket() as listening:
        bound.bind(("127.0.0.1", 0))
        listening.bind(("127.0.0.1", 0))
        assert host._port(Address(*listening.getsockname())) is Port.TAKEN  # bound without SO_REUSEADDR
        listening.listen()
        assert host._port(Address(*listening.getsockname())) is Port.LISTENS
        free = Address(*bound.getsockname())
    assert host._port(free) is Port.FREE
    assert host._port(Address("192.0.2.1", 6666)) is Port.NO_ADDRESS


def test_a_port_that_was_in_use_a_moment_ago_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = Address(*listening.getsockname())
        with socket.create_connection(listening.getsockname()) as client:
            listening.accept()[0].close()  # who closes first keeps the port's memory of it
            client.recv(1)
    assert host._port(address) is Port.FREE


def test_a_volume(tmp_path: Path) -> None:
    volume = host.volume_of(tmp_path / "not" / "there")
    facts = os.statvfs(tmp_path)
    assert volume.total == facts.f_blocks * facts.f_frsize and 0 < volume.free <= volume.total
    assert not volume.own and host.volume_of(Path("/")).own
    if os.path.ismount("/dev/shm"):
        assert host.volume_of(Path("/dev/shm")).memory
    assert not host.volume_of(Path("/proc")).memory
    assert host.host_memory() > 1 << 20
