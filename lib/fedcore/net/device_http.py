"""The devices' HTTP listener: a thin protocol over a well-kept C parser.

One connection serves one request at a time. The head is parsed by httptools (llhttp); the body then goes straight
into a sink that the route chose after it has judged the announced length, so no length that a device names makes
the server allocate or read more than the route allows. What arrives behind a request waits, at most MAX_HEAD bytes
and then the socket is not read, until the request is answered.

Every state of a connection has a deadline; the site looks at all of them once a second.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from email.utils import formatdate
from enum import Enum
from typing import Any
from typing import Protocol as TypingProtocol

import httptools
from twisted.internet import defer, protocol, task
from twisted.internet.interfaces import IAddress, IPushProducer
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from fedcore.errors import BodyTooLarge, FedcoreError

MAX_HEAD = 16_384  # bytes; nginx, Apache and Node.js allow 8 to 16 KiB
READ_SIZE = 1 << 20  # bytes asked for per recv: large bodies arrive in few turns of the reactor
SWEEP_S = 1.0  # how often deadlines are looked at, and so their precision
_HEAD_END = b"\r\n\r\n"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_PHRASES = {
    200: b"OK",
    400: b"Bad Request",
    404: b"Not Found",
    408: b"Request Timeout",
    413: b"Content Too Large",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    503: b"Service Unavailable",
}


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP answer.

    Attributes:
        parts: the body in pieces, sent as they are, never joined here.
        status: HTTP status.
        content_type: media type.
        phrase: reason phrase, or b"" for the usual one.
    """

    parts: tuple[bytes, ...]
    status: int = 200
    content_type: bytes = b"application/octet-stream"
    phrase: bytes = b""

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return sum(map(len, self.parts))

    def head(self, date: bytes, keep_alive: bool) -> bytes:
        """Return status line and headers."""
        return b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nDate: %s\r\n%s\r\n" % (
            self.status,
            self.phrase or _PHRASES.get(self.status, b"Error"),
            self.content_type,
            self.length,
            date,
            b"" if keep_alive else b"Connection: close\r\n",
        )


def text_response(status: int, text: str) -> Response:
    """Answer in plain words."""
    return Response((text.encode(),), status, b"text/plain; charset=utf-8")


class Sink(TypingProtocol):
    """Room for one body: a writable buffer, and how much of it the body filled."""

    buffer: memoryview
    length: int


class Route(TypingProtocol):
    """One path of the listener."""

    name: str

    def limit(self) -> int:
        """Return the longest acceptable body in bytes."""
        ...

    def sink(self, length: int) -> Any:
        """Return a Sink for a body of ``length`` bytes, or a Deferred of one while there is no room.

        A FedcoreError of the Deferred is answered instead of the request.
        """
        ...

    def discard(self, sink: Any) -> None:
        """Take back a sink whose body never became complete."""
        ...

    def handle(self, sink: Any) -> Awaitable[Response]:
        """Answer a complete body; the sink is the route's again."""
        ...


class Pages(TypingProtocol):
    """How the listener answers what never reaches a route."""

    def empty_body(self) -> Response:
        """Answer a request without a body."""
        ...

    def not_found(self) -> Response:
        """Answer an unknown path."""
        ...

    def error(self, error: BaseException) -> Response:
        """Answer an exception; the one place where an error becomes a reply."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may take.

    Attributes:
        header_timeout: seconds until a request head is complete.
        body_timeout: seconds in which a body must bring ``min_body_rate`` times as many bytes.
        min_body_rate: bytes per second, for bodies in both directions.
        idle_timeout: seconds between an answer and the next request.
    """

    header_timeout: float = 10.0
    body_timeout: float = 60.0
    min_body_rate: float = 1024.0
    idle_timeout: float = 50.0


class Stage(Enum):
    """What a connection is waiting for."""

    IDLE = 1  # the first byte of a request
    HEAD = 2  # the rest of a request head
    ROOM = 3  # a sink
    BODY = 4  # the rest of a body
    ANSWER = 5  # the route's answer
    DRAIN = 6  # the peer to read its answer
    CLOSING = 7


@implementer(IPushProducer)
class DeviceProtocol(protocol.Protocol):
    """One connection of a device."""

    log = Logger()

    def __init__(self, site: DeviceSite) -> None:
        self.site = site
        self._deadline = site.now + site.limits.header_timeout
        self._stage = Stage.IDLE
        self._pending = bytearray()  # received, not looked at
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._parser: Any = None
        self._keep_alive = True
        self._route: Route | None = None
        self._sink: Sink | None = None
        self._chunked = False
        self._complete = False  # of a chunked body
        self._length = 0  # announced bytes of the body
        self._received = 0
        self._checked = 0  # bytes of the body at the last look at its rate

    # ---- Twisted's side

    def connectionMade(self) -> None:
        self.site.connections.add(self)
        self.transport.setTcpNoDelay(True)
        self.transport.bufferSize = READ_SIZE
        self.transport.registerProducer(self, True)

    def connectionLost(self, reason: Failure = protocol.connectionDone) -> None:
        self._stage = Stage.CLOSING
        self._drop_sink()
        self.site.connections.discard(self)

    def dataReceived(self, data: bytes) -> None:
        if self._stage is Stage.BODY:
            self._take_chunks(data) if self._chunked else self._take_body(data)
            return
        self._pending += data
        if self._stage in (Stage.IDLE, Stage.HEAD):
            self._take_head()
        elif len(self._pending) > MAX_HEAD:
            self.transport.pauseProducing()

    def pauseProducing(self) -> None:
        """Wait until the peer has read its answer before the next request is looked at."""
        if self._stage is Stage.IDLE:
            self._stage = Stage.DRAIN
            self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """Go on: the peer has read its answer."""
        if self._stage is Stage.DRAIN:
            self._await_request()

    def stopProducing(self) -> None:
        """Stop writing: the connection is gone."""

    # ---- head

    def on_url(self, url: bytes) -> None:
        """Collect the request target (httptools)."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect one header (httptools)."""
        self._headers[name.lower()] = value

    def _take_head(self) -> None:
        end = self._pending.find(_HEAD_END) + len(_HEAD_END)
        if end < len(_HEAD_END):
            if len(self._pending) > MAX_HEAD:
                self._refuse(text_response(431, "The request head is too long."))
            elif self._stage is Stage.IDLE:
                self._enter(Stage.HEAD, self.site.limits.header_timeout)
            return
        if end > MAX_HEAD:
            self._refuse(text_response(431, "The request head is too long."))
            return
        head = bytes(self._pending[:end])
        del self._pending[:end]
        self._url, self._headers, self._complete = b"", {}, False
        self._parser = httptools.HttpRequestParser(self)
        try:
            self._parser.feed_data(head)
            path = httptools.parse_url(self._url).path
        except httptools.HttpParserUpgrade:
            self._refuse(text_response(400, "This listener upgrades to nothing."))
            return
        except httptools.HttpParserError as error:
            self._refuse(text_response(400, f"Bad request: {error}"))
            return
        self._keep_alive = (
            self._parser.should_keep_alive()
            and self._parser.get_http_version() == "1.1"
            and self._parser.get_method() != b"HEAD"
        )
        self._begin(path)

    def _begin(self, path: bytes) -> None:
        """Judge the head and find room for the body."""
        route = self.site.routes.get(path)
        self._chunked = b"transfer-encoding" in self._headers
        self._length = int(self._headers.get(b"content-length", 0))
        self._received = self._checked = 0
        if route is None:
            self._answer_unread(self.site.pages.not_found())
            return
        if not self._chunked and self._length == 0:
            self._answer(self.site.pages.empty_body())
            return
        limit = route.limit()
        if self._length > limit:
            self._answer_unread(self.site.pages.error(_too_large(route, f"{self._length} bytes", limit)))
            return
        self._route = route
        sink = route.sink(limit if self._chunked else self._length)
        if isinstance(sink, defer.Deferred):
            self._enter(Stage.ROOM, None)
            self._run(self._wait_for_room(route, sink))
        else:
            self._receive_into(sink)

    async def _wait_for_room(self, route: Route, room: defer.Deferred[Sink]) -> None:
        try:
            sink = await room
        except FedcoreError as error:
            self._answer_unread(self.site.pages.error(error))
            return
        if self._stage is Stage.CLOSING:
            route.discard(sink)
        else:
            self._receive_into(sink)

    def _receive_into(self, sink: Sink) -> None:
        self._sink = sink
        self._enter(Stage.BODY, self.site.limits.body_timeout)
        if self._headers.get(b"expect", b"").lower() == b"100-continue":
            self.transport.write(_CONTINUE)
        if self._pending:
            data, self._pending = bytes(self._pending), bytearray()
            self.dataReceived(data)
        self.transport.resumeProducing()

    # ---- body

    def _take_body(self, data: bytes) -> None:
        assert self._sink is not None
        end = self._received + len(data)
        if end > self._length:
            used = self._length - self._received
            self._pending += data[used:]
            data, end = data[:used], self._length
        self._sink.buffer[self._received : end] = data
        self._received = end
        if end == self._length:
            self._body_complete()

    def _take_chunks(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._drop_sink()
            too_large = isinstance(cause, BodyTooLarge)
            self._refuse(
                self.site.pages.error(cause) if too_large else text_response(400, f"Bad request: {error}")
            )
            return
        if self._complete:
            self._keep_alive = False  # the parser has swallowed whatever followed in the same read
            if self._received:
                self._body_complete()
            else:
                self._drop_sink()
                self._answer(self.site.pages.empty_body())

    def on_body(self, data: bytes) -> None:
        """Move the content of a chunk into the sink (httptools)."""
        assert self._sink is not None and self._route is not None
        end = self._received + len(data)
        if end > self._route.limit():
            raise _too_large(self._route, "chunks", self._route.limit())
        self._sink.buffer[self._received : end] = data
        self._received = end

    def on_message_complete(self) -> None:
        """Note the end of a chunked body (httptools)."""
        self._complete = True

    def _body_complete(self) -> None:
        assert self._sink is not None and self._route is not None
        sink, self._sink = self._sink, None
        sink.length = self._received
        self._enter(Stage.ANSWER, None)
        self._run(self._handle(self._route, sink))

    # ---- answer

    async def _handle(self, route: Route, sink: Sink) -> None:
        try:
            response = await route.handle(sink)
        except Exception as error:
            response = self.site.pages.error(error)
        self._answer(response)

    def _answer(self, response: Response) -> None:
        if self._stage is Stage.CLOSING:
            return
        keep_alive = self._keep_alive and not self.site.stopping
        limits = self.site.limits
        reading = limits.body_timeout + response.length / max(limits.min_body_rate, 1.0)
        self._enter(Stage.IDLE if keep_alive else Stage.CLOSING, reading)
        self.transport.writeSequence((response.head(self.site.date(), keep_alive), *response.parts))
        if not keep_alive:
            self.transport.unregisterProducer()
            self.transport.loseConnection()
        elif self._stage is Stage.IDLE:
            self._await_request()

    def _await_request(self) -> None:
        self._enter(Stage.IDLE, self.site.limits.idle_timeout)
        self.transport.resumeProducing()
        if self._pending:  # a pipelined request gets a turn of its own, so that nobody can hold the reactor
            self.site.call_soon(self._next_request)

    def _next_request(self) -> None:
        if self._stage is Stage.IDLE and self._pending:
            self._take_head()

    def _answer_unread(self, response: Response) -> None:
        """Answer before the body is read; the connection cannot be used again if there is one."""
        if self._chunked or self._length:
            self._keep_alive = False
        self._answer(response)

    def _refuse(self, response: Response) -> None:
        self._keep_alive = False
        self._answer(response)

    # ---- time

    def _enter(self, stage: Stage, seconds: float | None) -> None:
        """Go to a stage; ``seconds`` is how long it may last, None if the route sees to it."""
        self._stage = stage
        self._deadline = float("inf") if seconds is None else self.site.now + seconds

    def check_deadline(self, now: float) -> None:
        """End a stage that lasted too long."""
        if now < self._deadline:
            return
        match self._stage:
            case Stage.IDLE:
                self.close()
            case Stage.HEAD:
                self._refuse(text_response(408, "The request head did not arrive in time."))
            case Stage.BODY:
                self._check_rate()
            case _:
                self.transport.abortConnection()

    def _check_rate(self) -> None:
        limits = self.site.limits
        if self._received - self._checked < limits.min_body_rate * limits.body_timeout:
            self._drop_sink()
            self._refuse(text_response(408, "The request body arrives too slowly."))
            return
        self._checked = self._received
        self._enter(Stage.BODY, limits.body_timeout)

    def close(self) -> None:
        """Close once everything written has been read."""
        self._enter(Stage.CLOSING, self.site.limits.body_timeout)
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return self._stage in (Stage.IDLE, Stage.DRAIN)

    # ---- helpers

    def _drop_sink(self) -> None:
        if self._sink is not None and self._route is not None:
            self._route.discard(self._sink)
        self._sink = None

    def _run(self, work: Any) -> None:
        defer.Deferred.fromCoroutine(work).addErrback(self._failed)

    def _failed(self, failure: Failure) -> None:
        self.log.failure("a device connection failed", failure)
        self.transport.abortConnection()


def _too_large(route: Route, size: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"a body of {size} is too large for {route.name}: the limit is {limit} bytes")


class DeviceSite(protocol.Factory):
    """The listener: its routes, limits and open connections.

    Attributes:
        connections: the open ones.
        now: the reactor's clock at the last sweep, seconds.
        stopping: True makes every connection close with its answer.
    """

    noisy = False

    def __init__(
        self, routes: dict[bytes, Route], pages: Pages, limits: Limits, max_connections: int, reactor: Any
    ) -> None:
        """Serve ``routes`` (path -> route) to at most ``max_connections`` at a time."""
        self.routes = routes
        self.pages = pages
        self.limits = limits
        self.connections: set[DeviceProtocol] = set()
        self.now = reactor.seconds()
        self.stopping = False
        self._max_connections = max_connections
        self._reactor = reactor
        self._date = b""
        self._sweeper = task.LoopingCall(self._sweep)
        self._sweeper.clock = reactor

    def startFactory(self) -> None:
        self._sweeper.start(SWEEP_S)

    def stopFactory(self) -> None:
        if self._sweeper.running:
            self._sweeper.stop()

    def buildProtocol(self, addr: IAddress) -> DeviceProtocol | None:
        if self.stopping or len(self.connections) >= self._max_connections:
            return None
        return DeviceProtocol(self)

    def call_soon(self, function: Any) -> None:
        """Call a function in the next turn of the reactor."""
        self._reactor.callLater(0, function)

    def date(self) -> bytes:
        """Return the Date header, made once a second."""
        return self._date

    def _sweep(self) -> None:
        self.now = self._reactor.seconds()
        self._date = formatdate(usegmt=True).encode()
        for connection in list(self.connections):
            connection.check_deadline(self.now)

    def stop(self) -> None:
        """Close idle connections; the others close with their answer."""
        self.stopping = True
        for connection in list(self.connections):
            if connection.idle:
                connection.close()
