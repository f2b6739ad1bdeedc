"""A private redis-server that can be stopped, wiped and paused, and a reactor that runs beside the tests.

Tests stay plain functions: ``loop.run(coroutine)`` runs a coroutine on the one reactor of the process, in a thread
of its own, and gives its result or exception; it never waits longer than DEADLINE_S.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from twisted.internet import defer
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.interfaces import IProtocolFactory, IStreamClientEndpoint
from zope.interface import implementer

from fedcore.net.reactor import follow_monotonic_clock
from fedcore.store.redis import Redis
from fedctl.processes import HOST, Child, Family, NoRedis, find_redis_server, reserved_ports, wait_until

DEADLINE_S = 20.0
T = TypeVar("T")


class ReactorThread:
    """The process's reactor, running in a thread until the process ends: Twisted can start it only once."""

    def __init__(self) -> None:
        from twisted.internet import reactor

        self.reactor: Any = reactor
        follow_monotonic_clock(reactor)
        threading.Thread(target=self.reactor.run, args=(False,), name="reactor", daemon=True).start()

    def call(self, function: Callable[[], T]) -> T:
        """Call a function in the reactor's thread; a Deferred that it returns is awaited."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def begin() -> None:
            done: Any = defer.maybeDeferred(function)
            done.addCallbacks(answer.set_result, lambda failure: answer.set_exception(failure.value))

        self.reactor.callFromThread(begin)
        return answer.result(DEADLINE_S)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end."""
        return self.call(lambda: defer.Deferred.fromCoroutine(work))  # type: ignore[return-value]


class PrivateRedis:
    """A redis-server on a port of its own, its data in a folder of its own.

    Args:
        family: takes the process in.
        port: of 127.0.0.1, reserved.
        directory: for its data.
        options: of its configuration, on top of the usual ones.
    """

    def __init__(
        self, family: Family, port: int, directory: Path, options: Mapping[str, str | int] | None = None
    ) -> None:
        self.port = port
        self.directory = directory
        self.options = dict(options or {})
        self._family = family
        self._child: Child | None = None

    def start(self) -> None:
        """Start it with the data that the folder holds, and wait until it answers."""
        self.directory.mkdir(parents=True, exist_ok=True)
        options = {
            "bind": HOST,
            "port": self.port,
            "dir": self.directory,
            "appendonly": "yes",
            "save": "",
            "daemonize": "no",
            **self.options,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split(" "))]
        self._child = self._family.start(f"redis-{self.port}", [str(find_redis_server()), *words])
        self._family.wait_for(self._child, self._answers, "PONG")

    def _answers(self) -> bool:
        """An answer is enough; with a password it is NOAUTH."""
        return self.ask("PING").startswith(("+PONG", "-NOAUTH"))

    def stop(self, *, keep: bool) -> None:
        """End it at once; without ``keep`` its data are gone."""
        assert self._child is not None
        self._child.kill()
        self._child = None
        if not keep:
            shutil.rmtree(self.directory)

    def restart(self, *, keep: bool) -> None:
        """End it at once and start it again."""
        self.stop(keep=keep)
        self.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let it stand still: the kernel goes on accepting connections for it, nobody answers."""
        assert self._child is not None
        self._child.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._child.process.send_signal(signal.SIGCONT)

    def ask(self, *words: str | bytes) -> str:
        """Send one command on a connection of its own; return the first line of the answer."""
        return ask(self.port, *words)

    def info(self, section: str, name: str) -> str:
        """Return one value of INFO."""
        with socket.create_connection((HOST, self.port), timeout=5.0) as connection:
            connection.sendall(b"INFO %b\r\nQUIT\r\n" % section.encode())
            lines = connection.makefile("rb").read().decode().splitlines()
        return next((line.partition(":")[2] for line in lines if line.startswith(f"{name}:")), "")

    def end(self) -> None:
        """End it for good."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()


def ask(port: int, *words: str | bytes) -> str:
    """Send one command to a Redis or Sentinel on a connection of its own; return the first line of the answer."""
    parts = [word.encode() if isinstance(word, str) else word for word in words]
    command = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
    with socket.create_connection((HOST, port), timeout=5.0) as connection:
        connection.sendall(command)
        return connection.makefile("rb").readline().decode().rstrip()


def the_redis_server() -> str:
    """Return the program; where there is none, fail with the line that says how to get one."""
    try:
        return str(find_redis_server())
    except NoRedis as error:
        pytest.fail(str(error), pytrace=False)


@contextmanager
def private_redis(
    directory: Path, *, started: bool = True, options: Mapping[str, str | int] | None = None
) -> Iterator[PrivateRedis]:
    """Run a redis-server; where there is none, fail with the line that says how to get one."""
    the_redis_server()
    with reserved_ports(1) as (port,), Family(directory) as family:
        server = PrivateRedis(family, port, directory / "data", options)
        if started:
            server.start()
        try:
            yield server
        finally:
            server.end()


def start_sentinel(
    family: Family, directory: Path, port: int, master_port: int, name: str = "fl", quorum: int = 1
) -> Child:
    """Start a Sentinel and wait until it answers; its file, which it writes itself later, says whom it watches."""
    file = directory / f"sentinel-{port}.conf"
    if not file.exists():
        file.write_text(
            f"bind {HOST}\nport {port}\ndir {directory}\n"
            f"sentinel monitor {name} {HOST} {master_port} {quorum}\n"
            f"sentinel down-after-milliseconds {name} 1000\n"
            f"sentinel failover-timeout {name} 5000\n"
        )
    child = family.start(f"sentinel-{port}", [the_redis_server(), str(file), "--sentinel"])
    family.wait_for(child, lambda: ask(port, "PING") == "+PONG", "PONG")
    return child


class SentinelGroup:
    """A master, a replica and a Sentinel that makes the replica the master when the master is gone.

    Attributes:
        master_name: what the Sentinel calls the master.
        sentinel_port: of the Sentinel.
        first: the redis-server that is the master at first.
        second: the one that is its replica at first.
    """

    master_name = "fl"

    def __init__(self, family: Family, directory: Path, ports: list[int]) -> None:
        self.sentinel_port, first, second = ports
        self.first = PrivateRedis(family, first, directory / "first")
        self.second = PrivateRedis(family, second, directory / "second", {"replicaof": f"{HOST} {first}"})
        self._family = family
        self._directory = directory
        self._sentinel: Child | None = None

    @property
    def sentinels(self) -> str:
        """Their addresses, as fedcore.redis.sentinels takes them."""
        return f"{HOST}:{self.sentinel_port}"

    @property
    def master_port(self) -> int:
        """Port of the node that the Sentinel calls the master now."""
        with socket.create_connection((HOST, self.sentinel_port), timeout=5.0) as connection:
            connection.sendall(b"SENTINEL get-master-addr-by-name %b\r\n" % self.master_name.encode())
            lines = connection.makefile("rb")
            return int([lines.readline() for _ in range(5)][4])

    @property
    def master(self) -> PrivateRedis:
        """The node that the Sentinel calls the master now."""
        return self.first if self.master_port == self.first.port else self.second

    def start(self) -> None:
        """Start all three, and wait until the Sentinel could do its work."""
        self.first.start()
        self.second.start()
        wait_until(lambda: self.second.info("replication", "master_link_status") == "up", "a replica in step")
        self.start_sentinel()
        wait_until(lambda: self._sentinel_knows("num-slaves") == "1", "a Sentinel that knows the replica")

    def start_sentinel(self) -> None:
        """Start the Sentinel with what its file says, which it writes itself after the first time."""
        self._sentinel = start_sentinel(
            self._family, self._directory, self.sentinel_port, self.first.port, self.master_name
        )

    def stop_sentinel(self) -> None:
        """End the Sentinel at once."""
        assert self._sentinel is not None
        self._sentinel.kill()

    def kill_master(self) -> PrivateRedis:
        """End the master at once and return it; a Sentinel needs a second or two to name the other one."""
        master = self.master
        master.stop(keep=True)
        return master

    def fail_over(self) -> None:
        """Let the Sentinel make the replica the master while the master lives."""
        words = (
            "SENTINEL",
            "FAILOVER",
            self.master_name,
        )  # refused until it has looked at the replica closely
        wait_until(lambda: ask(self.sentinel_port, *words) == "+OK", "a fail-over")

    def _sentinel_knows(self, field: str) -> str:
        with socket.create_connection((HOST, self.sentinel_port), timeout=5.0) as connection:
            connection.sendall(b"SENTINEL master %b\r\n" % self.master_name.encode())
            lines = connection.makefile("rb")
            count = int(lines.readline().decode().strip().lstrip("*"))
            words = [lines.readline().decode().strip() for _ in range(2 * count)][1::2]
        return dict(zip(words[::2], words[1::2], strict=True))[field]

    def end(self) -> None:
        """End the servers for good; the family ends the Sentinel."""
        self.first.end()
        self.second.end()


@contextmanager
def sentinel_group(directory: Path) -> Iterator[SentinelGroup]:
    """Run a master, a replica and a Sentinel (quorum 1, down after one second)."""
    the_redis_server()
    directory.mkdir(parents=True, exist_ok=True)
    with reserved_ports(3) as ports, Family(directory) as family:
        group = SentinelGroup(family, directory, ports)
        try:
            group.start()
            yield group
        finally:
            group.end()


@contextmanager
def replicated_redis(directory: Path) -> Iterator[tuple[PrivateRedis, PrivateRedis]]:
    """Run a master and a replica that follows it."""
    with ExitStack() as stack:
        master = stack.enter_context(private_redis(directory / "master"))
        options = {"replicaof": f"{HOST} {master.port}"}
        replica = stack.enter_context(private_redis(directory / "replica", options=options))
        wait_until(lambda: replica.info("replication", "master_link_status") == "up", "a replica in step")
        yield master, replica


@implementer(IStreamClientEndpoint)
class WatchedEndpoint:
    """An endpoint that says when it is used."""

    def __init__(self, endpoint: IStreamClientEndpoint, on_attempt: Callable[[], None]) -> None:
        self._endpoint = endpoint
        self._on_attempt = on_attempt

    def connect(self, factory: IProtocolFactory) -> Any:
        """Connect."""
        self._on_attempt()
        return self._endpoint.connect(factory)


@contextmanager
def redis_client(
    loop: ReactorThread,
    port: int,
    *,
    reply_timeout: float = 5.0,
    errors: list[str] | None = None,
    on_attempt: Callable[[], None] = lambda: None,
) -> Iterator[Redis]:
    """Start the adapter under test towards a port, without waiting for its connection.

    Args:
        loop: the reactor.
        port: of 127.0.0.1.
        reply_timeout: seconds.
        errors: grows with every command that failed.
        on_attempt: called, in the reactor's thread, before each attempt to connect.
    """

    noted = [] if errors is None else errors

    def start() -> Redis:
        endpoint = TCP4ClientEndpoint(loop.reactor, HOST, port, timeout=3)
        redis = Redis(
            WatchedEndpoint(endpoint, on_attempt),
            f"{HOST}:{port}",
            reply_timeout=reply_timeout,
            on_error=partial(noted.append, "failed"),
            reactor=loop.reactor,
        )
        redis.startService()
        return redis

    redis = loop.call(start)
    try:
        yield redis
    finally:
        loop.call(redis.stopService)
