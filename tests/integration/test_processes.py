"""Families of real child processes, ports, and the private Redis."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedctl import processes
from fedctl.processes import HOST, ChildFailed, Family, NoRedis, free_ports, redis_server, reserved_ports

DEADLINE_S = 30.0
WAITS = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]
DEAF = [
    sys.executable,
    "-c",
    "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()",
]


def is_up(child: processes.Child) -> bool:
    return "up" in child.tail()


def ends(pid: int) -> bool:
    """Wait for the end of a process that need not be a child."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], DEADLINE_S)[0])
    finally:
        os.close(handle)


def test_a_family_ends_with_its_context(tmp_path: Path) -> None:
    with Family(tmp_path / "logs") as family:
        children = [family.start(f"child-{k}", WAITS) for k in range(3)]
        for child in children:
            family.wait_for(child, lambda child=child: is_up(child), "up")  # type: ignore[misc]
        family.check()
        assert all(os.getpgid(child.pid) == child.pid for child in children)
    assert [child.exit_code for child in children] == [-signal.SIGTERM] * 3
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [f"child-{k}.log" for k in range(3)]


def test_the_deaf_are_killed_and_the_others_do_not_wait_for_them(tmp_path: Path) -> None:
    with Family(tmp_path) as family:
        deaf = [family.start(f"deaf-{k}", DEAF) for k in range(8)]
        for child in deaf:
            family.wait_for(child, lambda child=child: is_up(child), "up")  # type: ignore[misc]
        began = time.monotonic()
        family.stop(grace=0.5)
        assert time.monotonic() - began < 8 * 0.5
    assert [child.exit_code for child in deaf] == [-signal.SIGKILL] * 8


def test_an_end_is_told_with_the_end_of_the_log(tmp_path: Path) -> None:
    with Family(tmp_path) as family:
        words = (
            "import sys; [print('line', k) for k in range(40)]; print('why', file=sys.stderr); sys.exit(3)"
        )
        child = family.start("teller", [sys.executable, "-c", words])
        assert child.wait(DEADLINE_S) == 3
        with pytest.raises(ChildFailed) as failed:
            family.check()
    lines = str(failed.value).splitlines()
    assert lines[0] == f"teller ended with exit code 3; {tmp_path}/teller.log ends with:"
    assert len(lines) == 1 + processes.TAIL_LINES
    assert "why" in lines[1:]


def test_a_silent_end_is_told_too(tmp_path: Path) -> None:
    with Family(tmp_path) as family:
        child = family.start("mute", WAITS, output=tmp_path / "out")
        family.wait_for(child, lambda: "up" in (tmp_path / "out").read_text(), "up")
        child.kill()
        with pytest.raises(ChildFailed, match=r"^mute was ended by SIGKILL$"):
            family.check()


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with Family(tmp_path) as family:
        child = family.start("ghost", ["no-such-program"])
        with pytest.raises(ChildFailed, match="no-such-program: No such file"):
            family.wait_for(child, lambda: False, "anything", DEADLINE_S)
    with pytest.raises(FileNotFoundError):
        processes.program("no-such-program")


def test_who_is_not_ready_in_time_is_named(tmp_path: Path) -> None:
    with Family(tmp_path) as family, reserved_ports(1) as (port,):
        child = family.start("slow", WAITS)
        with pytest.raises(ChildFailed, match=r"^slow is not ready, 200 from http.*: not within 0\.1 s"):
            family.wait_ready(child, f"http://{HOST}:{port}/readyz", 0.1)


def test_a_second_start_replaces_the_dead(tmp_path: Path) -> None:
    with Family(tmp_path) as family:
        first = family.start("same", WAITS)
        first.stop()
        second = family.start("same", WAITS)
        assert family.children == [second]
        family.check()


def test_children_run_where_and_with_what_they_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    names = ["COLOUR", "NOTIFY_SOCKET"]
    words = (
        f"import os, sys; print(os.getcwd(), [os.environ.get(name) for name in {names}], sys.stdin.read())"
    )
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    with Family(tmp_path / "logs", {"COLOUR": "green"}, runs_in=tmp_path / "work") as family:
        child = family.start("child", [sys.executable, "-c", words])
        assert child.wait(DEADLINE_S) == 0
    assert child.tail().rstrip() == f"{tmp_path}/work ['green', None]"


def test_a_killed_parent_takes_its_children_along(tmp_path: Path) -> None:
    words = f"""
import signal
from pathlib import Path
from fedctl.processes import Family
family = Family(Path({str(tmp_path)!r}))
child = family.start("deaf", {DEAF!r})
family.wait_for(child, lambda: "up" in child.tail(), "up")
print(child.pid, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    if not ends(child):
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child outlives its parent")


def test_a_leash_without_its_parent_starts_nothing() -> None:
    leash = Path(processes.__file__).with_name("leash.py")
    command = [sys.executable, "-I", "-S", str(leash), "1", "echo", "free"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "leash: the parent is gone\n"


def test_reserved_ports_are_nobody_elses_but_open_to_daemons() -> None:
    with reserved_ports(3) as ports:
        assert len(set(ports)) == 3
        assert not set(ports) & set(free_ports(200))
        with socket.socket() as daemon, socket.socket() as client:
            daemon.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            daemon.bind((HOST, ports[0]))
            daemon.listen()
            client.connect((HOST, ports[0]))
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect((HOST, ports[1]))


def test_redis(tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis:
        assert redis.address == f"{HOST}:{redis.port}"
        redis.kill()
        with pytest.raises(ChildFailed, match="redis was ended by SIGKILL"):
            redis.family.check()
        redis.start()
        redis.family.check()
        redis.stop()
        assert redis.child.exit_code == 0
        redis.start()
        child = redis.child
    assert not child.running
    assert {path.name for path in tmp_path.iterdir()} == {"redis.log"}


def test_where_redis_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.os, "environ", {**os.environ, "PATH": str(tmp_path)})
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    if processes.shutil.which("redis-server", path="/usr/sbin:/usr/local/sbin") is None:
        with pytest.raises(NoRedis, match="apt-get install redis-server"):
            processes.find_redis_server()
    program = tmp_path / "redis-server"
    program.touch(mode=0o755)
    assert processes.find_redis_server() == program
