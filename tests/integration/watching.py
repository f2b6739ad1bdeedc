"""Those who watch a run from outside: probes of every server, and the job's status in Redis."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Collection
from typing import Any

from integration.cluster import Cluster
from integration.oracle import (
    Answered,
    Journal,
    Outcome,
    longest_gap,
)
from integration.roaming import REPLY_S, Servers

from fedcore.errors import MalformedRequest
from fedcore.wire import codec
from fedcore.wire.messages import (
    RequestGetModel,
    ResponseGetModel,
)

HOST = "127.0.0.1"
PROBE_S = 0.05  # between two questions to one server
POLL_S = 0.02  # between two looks at Redis


class Prober:
    """Asks every server for its newest model every 50 ms, or as often as told, and keeps when anybody answered."""

    def __init__(self, servers: Servers, journal: Journal, every: float = PROBE_S) -> None:
        self._servers, self._journal, self._every = servers, journal, every
        self._over = threading.Event()
        self._threads: dict[int, threading.Thread] = {}
        self.began = time.monotonic()
        self.answers: list[tuple[float, int]] = []  # when, who

    def watch(self) -> None:
        """Probe every server that is known by now."""
        for n in self._servers.known() - self._threads.keys():
            self._threads[n] = threading.Thread(target=self._probe, args=(n,), name=f"probe-{n}", daemon=True)
            self._threads[n].start()

    def stop(self) -> None:
        """Probe no more."""
        self._over.set()
        for thread in self._threads.values():
            thread.join(REPLY_S + 1)

    def gap(self, since: float, until: float | None = None, servers: Collection[int] | None = None) -> float:
        """Return the longest time within which no server, or none of these, answered, seconds."""
        moments = (at for at, n in list(self.answers) if servers is None or n in servers)
        return longest_gap(moments, since, until or time.monotonic())

    def _probe(self, n: int) -> None:
        body = codec.encode(RequestGetModel(fl_name="job", iteration=0, timestamp="1"))
        while not self._over.wait(self._every):
            life, asked = self._servers.life(n), time.monotonic()
            try:
                reply = self._ask(n, body)
            except (OSError, http.client.HTTPException, MalformedRequest) as error:
                self._servers.told(n, answered=isinstance(error, MalformedRequest))
                continue
            now = time.monotonic()
            self._servers.told(n, answered=True)
            self.answers.append((now, n))
            self._journal.answer(Answered(n, life, asked, now, reply.iteration, False))

    def _ask(self, n: int, body: bytes) -> ResponseGetModel:
        """Ask over a connection of its own, so that an answer means that the server takes connections."""
        with contextlib.closing(self._servers.connect(n)) as connection:
            connection.request("POST", "/getModel", body)
            return codec.decode(ResponseGetModel, connection.getresponse().read())


class StatusWatch:
    """Reads the job's status from Redis every 20 ms, and keeps how each iteration ended."""

    def __init__(self, cluster: Cluster) -> None:
        self._port = cluster.redis_port
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="status", daemon=True)
        self.outcomes: list[tuple[int, Outcome]] = []
        self.current = 0

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._over.set()
        self._thread.join(10)

    def _watch(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError, ValueError), RedisReader(self._port) as redis:
                while not self._over.wait(POLL_S):
                    self._look(redis)
            self._over.wait(POLL_S)

    def _look(self, redis: RedisReader) -> None:
        status = status_of(redis)
        if status and (number := int(status["iterationNum"])) != self.current:
            valid = status["lastIterationSuccess"] == "1"
            self.outcomes.append((number - 1, Outcome(valid, status["lastIterationResult"])))
            self.current = number


class RedisReader:
    """One plain connection to Redis."""

    def __init__(self, port: int) -> None:
        self._connection = socket.create_connection((HOST, port), timeout=5)
        self._file = self._connection.makefile("rb")

    def __enter__(self) -> RedisReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._connection.close()

    def ask(self, *words: str) -> Any:
        """Run a command; strings come as str, arrays as lists.

        Raises:
            OSError: the connection is gone.
            ValueError: Redis reports an error.
        """
        parts = b"".join(b"$%d\r\n%b\r\n" % (len(word.encode()), word.encode()) for word in words)
        self._connection.sendall(b"*%d\r\n%b" % (len(words), parts))
        return self._read()

    def _read(self) -> Any:
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("Redis closed the connection")
        kind, rest = line[:1], line[1:-2]
        match kind:
            case b"-":
                raise ValueError(rest.decode())
            case b":":
                return int(rest)
            case b"$":
                return (
                    None if rest == b"-1" else self._file.read(int(rest) + 2)[:-2].decode("utf-8", "replace")
                )
            case b"*":
                return [self._read() for _ in range(int(rest))]
        return rest.decode()


def status_of(redis: RedisReader, fl_name: str = "job") -> dict[str, str]:
    """Return the status hash of the job's instance, {} if there is none."""
    instance = redis.ask("GET", f"ms_fl:{fl_name}:InstanceName:String")
    flat = redis.ask("HGETALL", f"ms_fl:{fl_name}:{instance}:status:Hash") if instance else []
    return dict(zip(flat[::2], flat[1::2], strict=True))
