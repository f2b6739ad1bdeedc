"""``fl scale``: real servers that outlive the command, told by their locks; and what goes wrong."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.cluster import Cluster, wait_until

DEADLINE_S = 60.0


def servers_of(yaml: Path) -> dict[int, int]:
    """Return instance -> pid of all servers with a configuration, by the kernel's word and not by locks."""
    found = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (folder / "cmdline").read_text().split("\0")
            if str(yaml) in words and "--instance" in words:
                found[int(words[words.index("--instance") + 1])] = int(folder.name)
    return found


def end(pid: int) -> None:
    """Kill a process that need not be a child, and wait for its end."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            assert select.select([handle], [], [], DEADLINE_S)[0]
        finally:
            os.close(handle)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        try:
            yield cluster
        finally:
            for pid in servers_of(cluster.yaml).values():
                end(pid)


def begin(cluster: Cluster, *options: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedctl", "scale", "--yaml-config", str(cluster.yaml), *options],
        cwd=cwd or cluster.directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "NOTIFY_SOCKET": "/nowhere"},
    )


def scale(cluster: Cluster, *options: str, code: int = 0, cwd: Path | None = None) -> tuple[str, str]:
    """Run the command to its end; return standard output and error."""
    with begin(cluster, *options, cwd=cwd) as process:
        try:
            output, errors = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert process.returncode == code, output + errors
    return output, errors


def log(cluster: Cluster, instance: int) -> str:
    return (cluster.directory / "fl-run" / f"serverd-{instance}.log").read_text()


def test_out_and_in_again(cluster: Cluster) -> None:
    cluster.start_redis()
    assert scale(cluster)[0] == f"no server runs here (run directory {cluster.directory}/fl-run)\n"

    output, _ = scale(cluster, "2")
    first = servers_of(cluster.yaml)
    assert first.keys() == {0, 1}
    for instance, pid in first.items():
        assert f"serverd-{instance}: started, pid {pid}" in output
        assert f"serverd-{instance}: ready after" in output
        assert os.getsid(pid) == pid  # a session of its own: the terminal's end does not reach it
        assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
        assert b"NOTIFY_SOCKET=" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert output.endswith("servers on this host: 2\n")

    # one job, whichever server a device asks
    assert cluster.start("one").retcode == 200
    cluster.http += 1
    assert cluster.start("two").retcode == 200
    cluster.http -= 1
    assert cluster.start("three").retcode == 300  # both places are taken

    shown = scale(cluster)[0].splitlines()
    assert shown == [
        f"serverd-{k}  pid {first[k]}  devices 127.0.0.1:{cluster.http + k}  nodes {cluster.tcp + k}  "
        f"admin 127.0.0.1:{cluster.admin + k}  ready"
        for k in (0, 1)
    ]

    output, _ = scale(cluster, "1")
    assert output.splitlines() == [
        f"serverd-1: asked to end, pid {first[1]}",
        "serverd-1: ended",
        "servers on this host: 1",
    ]
    assert servers_of(cluster.yaml) == {0: first[0]}
    assert json.loads(log(cluster, 1).splitlines()[-1])["message"] == "fl-serverd has stopped"
    assert cluster.ready()

    assert scale(cluster, "1")[0] == "servers on this host: 1\n"
    assert scale(cluster, "0")[0].endswith("servers on this host: 0\n")
    assert servers_of(cluster.yaml) == {}


def test_a_killed_server_is_started_again(cluster: Cluster) -> None:
    cluster.start_redis()
    scale(cluster, "2")
    before = servers_of(cluster.yaml)
    written = log(cluster, 0)
    end(before[0])
    assert "serverd-0" not in scale(cluster)[0]
    output, _ = scale(cluster, "2")
    after = servers_of(cluster.yaml)
    assert after.keys() == {0, 1}
    assert after[1] == before[1]
    assert "serverd-1" not in output
    assert log(cluster, 0).startswith(written)
    assert cluster.ready()


def test_the_highest_are_asked_first(cluster: Cluster) -> None:
    cluster.start_redis()
    scale(cluster, "3")
    asked = [line for line in scale(cluster, "0")[0].splitlines() if "asked" in line]
    assert [line.partition(":")[0] for line in asked] == ["serverd-2", "serverd-1", "serverd-0"]


def test_two_commands_at_once(cluster: Cluster) -> None:
    cluster.start_redis()
    with begin(cluster, "2") as one, begin(cluster, "2") as two:
        told = [process.communicate(timeout=DEADLINE_S) for process in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], told
    both = told[0][0] + told[1][0]
    assert [both.count(f"serverd-{k}: started") for k in (0, 1)] == [1, 1]
    assert servers_of(cluster.yaml).keys() == {0, 1}


def test_the_second_command_says_that_it_waits(cluster: Cluster) -> None:
    folder = cluster.directory / "fl-run"
    folder.mkdir()
    with (folder / "scale.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with begin(cluster, "0") as waiting:
            assert waiting.stdout is not None
            assert (
                waiting.stdout.readline() == f"another fl scale is at work in {folder}: waiting for its end\n"
            )
            assert waiting.poll() is None
            fcntl.flock(held, fcntl.LOCK_UN)
            assert waiting.communicate(timeout=DEADLINE_S) == ("servers on this host: 0\n", "")


def test_looks_do_not_disturb_a_start(cluster: Cluster) -> None:
    cluster.start_redis()
    with begin(cluster, "2") as starting:
        while starting.poll() is None:
            shown = scale(cluster)[0]
            assert shown.startswith(("no server runs here", "serverd-0", "serverd-1"))
        assert starting.returncode == 0, starting.communicate()
    assert servers_of(cluster.yaml).keys() == {0, 1}


def test_a_stale_pid_is_nobodys(cluster: Cluster) -> None:
    cluster.start_redis()
    bystander = cluster.spawn("bystander", "sleep", "600")
    folder = cluster.directory / "fl-run"
    folder.mkdir()
    (folder / "serverd-0.lock").write_text(f"{bystander.pid}\n")
    assert scale(cluster)[0].startswith("no server runs here")
    assert scale(cluster, "0", "--kill")[0] == "servers on this host: 0\n"
    assert bystander.poll() is None
    (folder / "serverd-0.lock").write_text("99999999999\n")  # longer than any pid: nothing of it may stay
    scale(cluster, "1")
    (pid,) = servers_of(cluster.yaml).values()
    assert (folder / "serverd-0.lock").read_text() == f"{pid}\n"
    assert bystander.poll() is None


def test_a_look_is_no_server(cluster: Cluster) -> None:
    lock = cluster.directory / "fl-run" / "serverd-0.lock"
    lock.parent.mkdir()
    lock.write_text("1\n")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # as another command does for an instant
        assert scale(cluster)[0].startswith("no server runs here")


def test_a_lock_that_nobody_signed(cluster: Cluster) -> None:
    lock = cluster.directory / "fl-run" / "serverd-3.lock"
    lock.parent.mkdir()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert f"{lock} is locked, but holds no pid" in scale(cluster, "0", code=1)[1]


def test_servers_outlive_a_killed_command(cluster: Cluster) -> None:
    with begin(cluster, "1") as command:  # without Redis no server gets ready
        assert command.stdout is not None
        assert "started" in command.stdout.readline()
        assert "not ready: no connection to Redis" in command.stdout.readline()
        command.kill()
    (pid,) = servers_of(cluster.yaml).values()
    assert f"pid {pid} " in scale(cluster)[0]
    cluster.start_redis()
    wait_until(cluster.ready, "the server is ready")
    scale(cluster, "0")
    assert servers_of(cluster.yaml) == {}


def test_who_does_not_get_ready_goes_on(cluster: Cluster) -> None:
    output, errors = scale(cluster, "1", "--ready-timeout", "3", code=1)
    assert "serverd-0: not ready: no connection to Redis; not joined to the job yet" in output
    assert errors.startswith(
        "Error: serverd-0 goes on, but is not ready within 3 s: not ready: no connection"
    )
    assert servers_of(cluster.yaml).keys() == {0}


def test_who_does_not_end_is_named_and_killed_only_on_demand(cluster: Cluster) -> None:
    cluster.start_redis()
    scale(cluster, "2")
    pids = servers_of(cluster.yaml)
    os.kill(pids[1], signal.SIGSTOP)
    output, errors = scale(cluster, "0", "--drain-timeout", "3", code=1)
    assert "serverd-0: ended" in output
    assert errors.startswith(f"Error: not ended within 3 s: serverd-1 (pid {pids[1]}); ")
    assert servers_of(cluster.yaml) == {1: pids[1]}
    output, _ = scale(cluster, "0", "--drain-timeout", "0", "--kill")
    assert "serverd-1: killed, it went on after 0 s\nserverd-1: ended\nservers on this host: 0\n" in output
    assert servers_of(cluster.yaml) == {}


# ---- what cannot be done


def test_a_bad_configuration(cluster: Cluster) -> None:
    text = cluster.yaml.read_text()
    cluster.yaml.write_text(text.replace("fl_iteration_num: 100", "fl_iteration_num: 0"))
    for options in (["1"], ["1", "--", "--model", "x"]):
        errors = scale(cluster, *options, code=1)[1]
        assert errors.startswith("Error: Failed to check value of parameter 'fl_iteration_num'")
    assert scale(cluster, "0")[0] == "servers on this host: 0\n"  # to stop needs no configuration


def test_ports_beyond_the_last(cluster: Cluster) -> None:
    text = cluster.yaml.read_text().replace(f"tcp_port: {cluster.tcp}", "tcp_port: 65535")
    cluster.yaml.write_text(text)
    assert "Instance 1 cannot listen on port 65535 + 1" in scale(cluster, "2", code=1)[1]
    assert servers_of(cluster.yaml) == {}


def test_a_server_that_ends_at_its_start(cluster: Cluster) -> None:
    (cluster.directory / "fl-run").mkdir()
    (cluster.directory / "fl-run" / "serverd-0.log").write_text("an old line\n")
    output, errors = scale(cluster, "1", "--", "--model", "nowhere.safetensors", code=1)
    assert "serverd-0: started" in output
    lines = errors.splitlines()
    assert lines[0] == (
        f"Error: serverd-0 ended with exit code 78; {cluster.directory}/fl-run/serverd-0.log ends with:"
    )
    assert "nowhere.safetensors" in errors
    assert "an old line" not in errors
    assert log(cluster, 0).startswith("an old line\n")


def test_what_is_given_to_servers(cluster: Cluster) -> None:
    cluster.start_redis()
    ledgers = cluster.directory / "elsewhere"
    scale(cluster, "1", "--", "--ledger-dir", str(ledgers))
    assert list(ledgers.iterdir())
    for option in ("--instance=3", "--yaml_config", "--admin-address"):
        assert "is not for all servers alike" in scale(cluster, "2", "--", option, "x", code=2)[1]


def test_a_taken_admin_address(cluster: Cluster) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", cluster.admin + 1))
        taken.listen()
        errors = scale(cluster, "2", code=1)[1]
    assert errors.startswith(
        f"Error: 127.0.0.1:{cluster.admin + 1}, the admin address of instance 1, is taken;"
    )
    assert servers_of(cluster.yaml) == {}


def test_servers_of_another_place(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_redis()
    scale(cluster, "1")
    run_dir = ["--run-dir", str(cluster.directory / "fl-run")]
    (tmp_path / "elsewhere").mkdir()
    errors = scale(cluster, "2", *run_dir, code=1, cwd=tmp_path / "elsewhere")[1]
    assert f"serverd-0 runs in {cluster.directory}, where its relative paths begin" in errors
    own = cluster.yaml
    cluster.yaml = own.rename(own.with_name("other.yaml"))
    assert f"serverd-0 runs with {own}: give that one" in scale(cluster, "0", *run_dir, code=1)[1]
    assert servers_of(own).keys() == {0}
    cluster.yaml = cluster.yaml.rename(own)
    scale(cluster, "0")


def test_a_run_directory_that_cannot_be(cluster: Cluster) -> None:
    errors = scale(cluster, "1", "--run-dir", str(cluster.yaml / "x"), code=1)[1]
    assert "cannot be used: Not a directory; choose another: --run-dir" in errors


# ---- fl state --watch beside it


def test_a_watch_follows_servers_and_survives_the_scheduler(cluster: Cluster) -> None:
    cluster.start_redis()
    scale(cluster, "1")
    cluster.start_scheduler()
    options = ["--watch", "--interval", "0.1", "--yaml-config", str(cluster.yaml)]
    with subprocess.Popen(
        [sys.executable, "-m", "fedctl", "state", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        try:
            assert watching.stdout is not None

            def told(text: str) -> str:
                line = next(line for line in watching.stdout if text in line)  # type: ignore[union-attr]
                return line.rstrip("\n").partition(" ")[2]

            assert told("here:").startswith(f"here: SERVER 127.0.0.1:{cluster.tcp} (")
            words = told("serverd-0")
            assert words.startswith("serverd-0: iteration 1")
            assert words.endswith(", startFLJob 0 of 2, updateModel 0 of 2; 0 valid, 0 failed")
            assert cluster.start("one").retcode == 200
            words = told("serverd-0")
            assert words.endswith(", startFLJob 1 of 2, updateModel 0 of 2; 0 valid, 0 failed")
            scale(cluster, "2")
            assert told("joined:").startswith(f"joined: SERVER 127.0.0.1:{cluster.tcp + 1} (")
            cluster.kill("scheduler")
            assert "cannot be asked" in told("the scheduler")
            cluster.start_scheduler()
            assert told("the scheduler answers") == "the scheduler answers again"
            scale(cluster, "1")
            assert told("gone:").startswith(f"gone: SERVER 127.0.0.1:{cluster.tcp + 1} (")
            watching.send_signal(signal.SIGINT)
            assert watching.wait(DEADLINE_S) == 0
            assert watching.stderr is not None and watching.stderr.read() == ""
        finally:
            watching.kill()
