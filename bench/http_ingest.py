"""Compare ways to receive uploads over HTTP by the server's CPU time per request.

    python bench/http_ingest.py [--json FILE]

Three servers answer the same requests with the same trivial handler, which sees the whole body in memory:

    fedcore   our device listener: the body goes straight into a preallocated sink
    sink      twisted.web with its own Request, which does the same as far as twisted.web allows
    stock     twisted.web as it comes: bodies of 100,000 bytes and more pass through a temporary file

Each is a process of its own that reads its CPU time with getrusage; this process is the client. The servers take
turns, several rounds long, and the medians are compared, so that a busy machine disturbs all alike. Everything stays
on the loopback and ends within a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

SIZES = {"200 B": 200, "256 KB": 256 << 10, "20 MB": 20 << 20}
REQUESTS = {"200 B": 2000, "256 KB": 400, "20 MB": 16}  # per round: some tenths of a second each
KINDS = ("fedcore", "sink", "stock")
ROUNDS = 9
BUDGET_S = 45.0  # no round starts later than this
CONNECTIONS = 4
PATH = b"/updateModel"
ANSWER = b"a" * 200
LIMIT = 32 << 20  # bytes of the longest body, and of every sink
SOCKET_TIMEOUT_S = 10.0


# ---- the three servers


POOL: list[Sink] = []  # sinks to use again and again: fresh memory costs more than the copy into it


class Sink:
    """Preallocated room for one body; also the file that twisted.web believes to write to."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(LIMIT))
        self.length = 0

    @staticmethod
    def take() -> Sink:
        """Return a sink from the pool."""
        return POOL.pop() if POOL else Sink()

    def write(self, data: bytes) -> None:
        self.buffer[self.length : self.length + len(data)] = data
        self.length += len(data)

    def tell(self) -> int:
        return self.length

    def seek(self, *_: int) -> None:
        """Stay: nobody reads a sink like a file."""

    def close(self) -> None:
        """Go back into the pool."""
        self.length = 0
        POOL.append(self)


def answer_to(body: Any) -> bytes:
    """The trivial handler."""
    return ANSWER if len(body) and body[-1] == ord("z") else b""


def fedcore_site(reactor: Any) -> Any:
    from fedcore.net.device_http import DeviceSite
    from fedcore.net.routes import Limits, Response, text_response

    class Upload:
        name = "updateModel"

        def limit(self) -> int:
            return LIMIT

        def sink(self, length: int) -> Sink:
            return Sink.take()

        def discard(self, sink: Sink) -> None:
            sink.close()

        async def handle(self, sink: Sink) -> Response:
            answer = answer_to(sink.buffer[: sink.length])
            sink.close()
            return Response((answer,))

    class Pages:
        def empty_body(self) -> Response:
            return text_response(500, "empty")

        def not_found(self) -> Response:
            return text_response(404, "no such path")

        def too_many(self) -> Response:
            return text_response(200, "too many")

        def error(self, error: BaseException) -> Response:
            return text_response(500, str(error))

    return DeviceSite({PATH: Upload()}, Pages(), Limits(), 64, reactor)


def web_site(own_request: bool) -> Any:
    from twisted.web import resource as web_resource
    from twisted.web import server

    class SinkRequest(server.Request):
        def gotLength(self, length: int | None) -> None:
            self.content = Sink.take()

        def process(self) -> None:
            answer = answer_to(self.content.buffer[: self.content.length])
            self.setHeader(b"Content-Length", b"%d" % len(answer))
            self.write(answer)
            self.finish()

    class Upload(web_resource.Resource):
        isLeaf = True

        def render_POST(self, request: Any) -> bytes:
            return answer_to(request.content.read())

    root = web_resource.Resource()
    root.putChild(PATH[1:], Upload())
    site = server.Site(root, requestFactory=SinkRequest) if own_request else server.Site(root)
    site.log = lambda request: None  # no access log: it is not what is compared
    return site


def serve(kind: str) -> None:
    """Serve until standard input ends; print the port first, then the CPU seconds used at every line read."""
    from twisted.internet import reactor, stdio
    from twisted.protocols.basic import LineReceiver

    class Control(LineReceiver):
        delimiter = b"\n"

        def lineReceived(self, line: bytes) -> None:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            self.sendLine(b"%.6f" % (usage.ru_utime + usage.ru_stime))

        def connectionLost(self, reason: Any = None) -> None:
            if reactor.running:
                reactor.stop()

    site = fedcore_site(reactor) if kind == "fedcore" else web_site(own_request=kind == "sink")
    port = reactor.listenTCP(0, site, interface="127.0.0.1")
    print(port.getHost().port, flush=True)
    stdio.StandardIO(Control())
    reactor.run()


# ---- the client


class Server:
    """One server process and the connections to it."""

    def __init__(self, process: subprocess.Popen[bytes], stack: ExitStack) -> None:
        self._process = process
        port = int(self._line())
        self._sockets = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), SOCKET_TIMEOUT_S))
            for _ in range(CONNECTIONS)
        ]

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a server ended early")
        return line

    def cpu_s(self) -> float:
        """CPU seconds used so far, user and system."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return float(self._line())

    def ms_per_request(self, request: bytes, requests: int) -> float:
        """Make requests on all connections in turn; return CPU milliseconds for each."""
        before = self.cpu_s()
        for _ in range(requests // CONNECTIONS):
            for connection in self._sockets:
                connection.sendall(request)
            for connection in self._sockets:
                read_answer(connection)
        return (self.cpu_s() - before) * 1000 / (requests // CONNECTIONS * CONNECTIONS)


def read_answer(connection: socket.socket) -> None:
    received = b""
    while not received.endswith(ANSWER):
        data = connection.recv(65536)
        if not data:
            raise RuntimeError(f"the server closed after {received!r}")
        received += data
    if not received.startswith(b"HTTP/1.1 200 OK\r\n"):
        raise RuntimeError(f"unexpected answer: {received[:200]!r}")


def request_of(size: int) -> bytes:
    head = (
        b"POST %s HTTP/1.1\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n"
        b"Host: 127.0.0.1:6666\r\nConnection: Keep-Alive\r\nAccept-Encoding: gzip\r\nUser-Agent: okhttp/3.14.9\r\n\r\n"
    )
    return head % (PATH, size) + b"x" * (size - 1) + b"z"


@contextmanager
def running(kind: str) -> Iterator[Server]:
    command = [sys.executable, os.fspath(Path(__file__).resolve()), "--serve", kind]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
        ExitStack() as stack,
    ):
        try:
            yield Server(process, stack)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


def measure() -> dict[str, dict[str, list[float]]]:
    """Return size -> server -> CPU milliseconds per request, one figure per round."""
    figures: dict[str, dict[str, list[float]]] = {size: {kind: [] for kind in KINDS} for size in SIZES}
    started = time.monotonic()
    with ExitStack() as stack:
        servers = {kind: stack.enter_context(running(kind)) for kind in KINDS}
        requests = {size: request_of(length) for size, length in SIZES.items()}
        for request in requests.values():
            for server in servers.values():
                server.ms_per_request(request, 2 * CONNECTIONS)  # warm up
        for _ in range(ROUNDS):
            if time.monotonic() - started > BUDGET_S:
                break
            for size, request in requests.items():
                for kind, server in servers.items():
                    figures[size][kind].append(server.ms_per_request(request, REQUESTS[size]))
    return figures


def report(figures: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Print the table; return it for --json."""
    rows: dict[str, Any] = {}
    print(
        f"server CPU ms per request, median of {len(figures['200 B']['fedcore'])} rounds (ratio to fedcore)"
    )
    print(f"{'body':>8}" + "".join(f"{kind:>20}" for kind in KINDS))
    for size, by_kind in figures.items():
        medians = {kind: statistics.median(values) for kind, values in by_kind.items()}
        ratios = {kind: value / medians["fedcore"] for kind, value in medians.items()}
        print(
            f"{size:>8}" + "".join(f"{medians[kind]:>13.3f} {f'({ratios[kind]:.1f})':>6}" for kind in KINDS)
        )
        rows[size] = {
            kind: {
                "cpu_ms": round(medians[kind], 4),
                "ratio": round(ratios[kind], 2),
                "rounds": by_kind[kind],
            }
            for kind in KINDS
        }
    return {"python": platform.python_version(), "cpu_ms_per_request": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    table = report(measure())
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
