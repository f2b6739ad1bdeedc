"""A device listener without sockets: Twisted's own transports over a pretended one, and a peer under a test's control.

``Wire`` stands in for the socket, with as much room for answers as the test grants; ``Peer`` is one device, on plain
TCP or TLS; ``Rig`` is the listener with its clock. Transports, TLS and buffering are the real ones.
"""

from __future__ import annotations

import datetime
import errno
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from OpenSSL import SSL, crypto
from twisted.internet import defer, ssl, tcp
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import globalLogPublisher
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure

from fedcore.errors import FedcoreError
from fedcore.net.device_http import DeviceSite
from fedcore.net.routes import Limits, Response, text_response
from fedcore.pki.authority import Role, issue, make_authority

LIMIT = 1000
PLENTY = 1 << 40


class Wire:
    """A connected socket, seen from the server."""

    def __init__(self) -> None:
        self.arrived = bytearray()  # what the server has not read yet
        self.ended = False  # the peer sends no more
        self.sent = bytearray()
        self.pieces: list[Any] = []  # the objects that were sent, as they were given
        self.window = PLENTY  # bytes that may still be sent
        self.finished = False  # the server has said that it sends no more
        self.closed = False
        self.reset = False

    def recv(self, size: int) -> bytes:
        buffer = bytearray(size)
        return bytes(buffer[: self.recv_into(memoryview(buffer))])

    def recv_into(self, buffer: memoryview) -> int:
        if not self.arrived and not self.ended:
            raise BlockingIOError(errno.EAGAIN, "nothing there")
        count = min(len(buffer), len(self.arrived))
        buffer[:count] = self.arrived[:count]
        del self.arrived[:count]
        return count

    def send(self, data: Any) -> int:
        return self.sendmsg([data])

    def sendmsg(self, pieces: list[Any]) -> int:
        assert not (self.finished or self.closed)
        if self.window == 0 and any(pieces):
            raise BlockingIOError(errno.EAGAIN, "full")
        count = 0
        for piece in pieces:
            part = bytes(piece[: self.window])
            self.pieces.append(piece)
            self.sent += part
            self.window -= len(part)
            count += len(part)
        return count

    def shutdown(self, how: int) -> None:
        self.finished = True

    def close(self) -> None:
        self.closed = True

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        self.reset = self.reset or isinstance(value, bytes)  # SO_LINGER is the only one that is no number

    def setblocking(self, blocking: bool) -> None:
        assert not blocking

    def fileno(self) -> int:
        return -1


@dataclass
class Room:
    """A sink."""

    buffer: memoryview
    length: int = 0


Handler = Callable[[bytes], Any]


@dataclass
class FakeRoute:
    """A route that writes down what happens to it.

    Attributes:
        answer: body -> Response or bytes, a Deferred of one, or an exception to raise.
        give: called for every sink; may raise, or return a Deferred in place of the sink.
    """

    name: str = "echo"
    most: int = LIMIT
    answer: Handler = lambda body: body
    give: Callable[[Room], Any] = lambda room: room
    handed: list[Room] = field(default_factory=list)
    handled: list[Room] = field(default_factory=list)
    discarded: list[Room] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def limit(self) -> int:
        return self.most

    def sink(self, length: int) -> Any:
        assert 0 < length <= self.most
        room = Room(memoryview(bytearray(length)))
        given = self.give(room)
        self.handed.append(room)
        return given

    def discard(self, sink: Any) -> None:
        self.discarded.append(sink)

    def handle(self, sink: Any) -> Awaitable[Response]:
        self.handled.append(sink)
        body = bytes(sink.buffer[: sink.length])
        self.bodies.append(body)
        return self._answered(body)

    async def _answered(self, body: bytes) -> Response:
        result = self.answer(body)
        if isinstance(result, defer.Deferred):
            result = await result
        if isinstance(result, Exception):
            raise result
        return Response((result,)) if isinstance(result, bytes) else result

    def assert_settled(self) -> None:
        """Every sink was handled or discarded, once."""
        ends = [id(sink) for sink in self.handled + self.discarded]
        assert sorted(ends) == sorted(map(id, self.handed))


class FakePages:
    """Plain answers for what reaches no route."""

    def empty_body(self) -> Response:
        return text_response(500, "empty")

    def not_found(self) -> Response:
        return text_response(404, "nothing here")

    def too_many(self) -> Response:
        return text_response(200, "too many")

    def error(self, error: BaseException) -> Response:
        return text_response(error.http_status if isinstance(error, FedcoreError) else 500, str(error))


@dataclass(frozen=True)
class Reply:
    """One answer as the peer saw it."""

    status: int
    body: bytes
    headers: dict[bytes, bytes] = field(default_factory=dict, compare=False)

    @property
    def closing(self) -> bool:
        return self.headers.get(b"connection") == b"close"


def replies(data: bytes, *, to_head: bool = False) -> list[Reply]:
    """Read a stream of answers; the last one must be whole."""
    found = []
    while data:
        head, separator, data = data.partition(b"\r\n\r\n")
        assert separator, head
        first, *lines = head.split(b"\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}
        assert len(headers) == len(lines)
        length = 0 if to_head else int(headers.get(b"content-length", b"0"))
        assert len(data) >= length
        found.append(Reply(int(first.split()[1]), data[:length], headers))
        data = data[length:]
    return found


class Peer:
    """One device and the server's end of its connection."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.wire = Wire()
        self.transport = tcp.Server(self.wire, self._protocol(), ("192.0.2.1", 1), None, 0, rig.reactor)
        self.transport.protocol.makeConnection(self.transport)
        self.pump()

    def _protocol(self) -> Any:
        self.protocol = self.rig.site.buildProtocol(None)
        return self.protocol

    # ---- what a device does

    def send(self, *segments: bytes) -> Peer:
        """Send segments, each in a turn of its own."""
        for segment in segments:
            self.wire.arrived += self.seal(segment)
            self.pump()
        return self

    def end(self) -> Peer:
        """Send no more."""
        self.wire.ended = True
        self.pump()
        return self

    def read(self, count: int) -> None:
        """Let the server send so many bytes more."""
        self.wire.window += count
        self.pump()

    @property
    def received(self) -> bytes:
        """All that the server has sent."""
        return bytes(self.wire.sent)

    @property
    def replies(self) -> list[Reply]:
        return replies(self.received)

    @property
    def statuses(self) -> list[int]:
        return [reply.status for reply in self.replies]

    @property
    def lost(self) -> bool:
        """Whether the connection is gone."""
        return not hasattr(self.transport, "socket")

    @property
    def told_end(self) -> bool:
        """Whether the server has said that it sends no more."""
        return self.wire.finished or self.wire.closed

    def seal(self, data: bytes) -> bytes:
        """Return what goes over the wire for ``data``."""
        return data

    # ---- what the reactor does

    def pump(self, turns: int = 10_000) -> None:
        """Turn the reactor until nothing moves."""
        for _ in range(turns):
            if not self.turn():
                return
        raise AssertionError("never comes to rest")

    def turn(self) -> bool:
        """Turn the reactor once; tell whether anything moved."""
        before = self._state()
        reactor = self.rig.reactor
        due = [call for call in reactor.getDelayedCalls() if call.getTime() <= reactor.seconds()]
        for call in due:  # those that they add wait for the next turn, as in a real reactor
            reactor.calls.remove(call)
            call.called = 1
            call.func(*call.args, **call.kw)
        if self.transport in self.rig.reactor.readers and (self.wire.arrived or self.wire.ended):
            self._end_if(self.transport.doRead())
        if self.transport in self.rig.reactor.writers and self.wire.window:
            self._end_if(self.transport.doWrite())
        return bool(due) or before != self._state()

    def _state(self) -> tuple[Any, ...]:
        writing, reading = (
            self.transport in those for those in (self.rig.reactor.writers, self.rig.reactor.readers)
        )
        return len(self.wire.arrived), len(self.wire.sent), self.lost, writing, reading

    def _end_if(self, why: Any) -> None:
        if why is not None:
            self.rig.reactor.removeReader(self.transport)
            self.rig.reactor.removeWriter(self.transport)
            self.transport.connectionLost(Failure(why))


class TlsPeer(Peer):
    """A device that speaks TLS."""

    def __init__(self, rig: Rig) -> None:
        self._tls = SSL.Connection(SSL.Context(SSL.TLS_METHOD), None)
        self._tls.set_connect_state()
        self._clear = bytearray()
        self._taken = 0
        super().__init__(rig)
        while not self._shaken():
            self.wire.arrived += self._outgoing()
            self.pump()
            self._take()
        self.wire.arrived += self._outgoing()
        self.pump()

    def _protocol(self) -> Any:
        factory = TLSMemoryBIOFactory(server_context(), False, self.rig.site, self.rig.reactor)
        wrapper = factory.buildProtocol(None)
        self.protocol = wrapper.wrappedProtocol
        return wrapper

    def _shaken(self) -> bool:
        try:
            self._tls.do_handshake()
        except SSL.WantReadError:
            return self.lost
        return True

    def _outgoing(self) -> bytes:
        try:
            return self._tls.bio_read(1 << 24)
        except SSL.WantReadError:
            return b""

    def _take(self) -> None:
        self._tls.bio_write(bytes(self.wire.sent[self._taken :])) if self._taken < len(
            self.wire.sent
        ) else None
        self._taken = len(self.wire.sent)

    def seal(self, data: bytes) -> bytes:
        while data:
            data = data[self._tls.send(data[: 1 << 14]) :]
        return self._outgoing()

    @property
    def received(self) -> bytes:
        self._take()
        while True:
            try:
                self._clear += self._tls.recv(1 << 16)
            except (SSL.WantReadError, SSL.ZeroReturnError):
                return bytes(self._clear)

    @property
    def told_end(self) -> bool:
        _ = self.received
        return bool(self._tls.get_shutdown() & SSL.RECEIVED_SHUTDOWN) or self.wire.closed


@functools.cache
def server_context() -> ssl.CertificateOptions:
    """A server's context with a certificate of its own making."""
    now = datetime.datetime.now(datetime.UTC)
    made = issue(make_authority("test", now), Role.SERVER, "test", now)
    return ssl.CertificateOptions(
        privateKey=crypto.PKey.from_cryptography_key(made.key),
        certificate=crypto.X509.from_cryptography(made.certificate),
    )


PEERS: dict[str, type[Peer]] = {"tcp": Peer, "tls": TlsPeer}


class Rig:
    """The listener, its one route and its clock. A context manager: nothing may be logged as a failure meanwhile."""

    def __init__(self, kind: str = "tcp", *, max_connections: int = 10, **limits: float) -> None:
        self.reactor: Any = MemoryReactorClock()
        self.route = FakeRoute()
        self.site = DeviceSite(
            {b"/echo": self.route}, FakePages(), Limits(**limits), max_connections, self.reactor
        )
        self.peers: list[Peer] = []
        self.failures: list[Any] = []
        self._kind = kind

    def __enter__(self) -> Rig:
        self.site.doStart()
        globalLogPublisher.addObserver(self._observe)
        return self

    def __exit__(self, *_: object) -> None:
        globalLogPublisher.removeObserver(self._observe)
        assert not self.failures

    def _observe(self, event: Any) -> None:
        if "log_failure" in event:
            self.failures.append(event["log_failure"])

    def connect(self) -> Peer:
        """Connect a device."""
        peer = PEERS[self._kind](self)
        self.peers.append(peer)
        return peer

    def pass_time(self, seconds: float) -> None:
        """Let time go by, half a second after the other."""
        for _ in range(round(seconds * 2)):
            self.reactor.advance(0.5)
            for peer in self.peers:
                peer.pump()


def post(body: bytes = b"hello", target: bytes = b"/echo", **headers: str) -> bytes:
    """Return a request; underscores in the names of headers become hyphens."""
    lines = b"".join(
        b"%s: %s\r\n" % (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
    )
    return b"POST %s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n" % (target, lines, len(body)) + body


def chunked(*chunks: bytes, trailers: bytes = b"") -> bytes:
    """Return a request whose body comes in chunks."""
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n" + trailers + b"\r\n"
