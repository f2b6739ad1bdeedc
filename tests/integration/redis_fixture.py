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
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
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
from fedctl.processes import HOST, Child, Family, NoRedis, find_redis_server, reserved_ports

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
    """A redis-server on a port of its own, its data in a folder of its own."""

    def __init__(self, family: Family, port: int, directory: Path) -> None:
        self.port = port
        self.directory = directory
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
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self._child = self._family.start(f"redis-{self.port}", [str(find_redis_server()), *words])
        self._family.wait_for(self._child, lambda: self.ask("PING") == "+PONG", "PONG")

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
        parts = [word.encode() if isinstance(word, str) else word for word in words]
        command = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        with socket.create_connection((HOST, self.port), timeout=5.0) as connection:
            connection.sendall(command)
            return connection.makefile("rb").readline().decode().rstrip()

    def end(self) -> None:
        """End it for good."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()


@contextmanager
def private_redis(directory: Path, *, started: bool = True) -> Iterator[PrivateRedis]:
    """Run a redis-server; where there is none, fail with the line that says how to get one."""
    try:
        find_redis_server()
    except NoRedis as error:
        pytest.fail(str(error), pytrace=False)
    with reserved_ports(1) as (port,), Family(directory) as family:
        server = PrivateRedis(family, port, directory / "data")
        if started:
            server.start()
        try:
            yield server
        finally:
            server.end()


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
        )
        redis.startService()
        return redis

    redis = loop.call(start)
    try:
        yield redis
    finally:
        loop.call(redis.stopService)
