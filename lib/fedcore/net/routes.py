"""What the device listener and its routes hand each other: room for bodies, answers, limits."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

_PHRASES = {
    200: b"OK",
    400: b"Bad Request",
    404: b"Not Found",
    408: b"Request Timeout",
    413: b"Content Too Large",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    503: b"Service Unavailable",
    505: b"HTTP Version Not Supported",
}


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP answer.

    Attributes:
        parts: the body in pieces, sent as they are, never joined; the same bytes may be on their way to many.
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


class Sink(Protocol):
    """Room for one body: a writable buffer, and how much of it the body filled."""

    buffer: memoryview
    length: int


class Route(Protocol):
    """One path of the listener."""

    name: str

    def limit(self) -> int:
        """Return the longest acceptable body in bytes."""
        ...

    def sink(self, length: int) -> Any:
        """Return a Sink for a body of ``length`` bytes, or a Deferred of one while there is no room.

        An error is answered instead of the request. If the device goes away, its Deferred is not cancelled:
        the sink comes back through ``discard``.
        """
        ...

    def discard(self, sink: Any) -> None:
        """Take back a sink whose body never became complete."""
        ...

    def handle(self, sink: Any) -> Awaitable[Response]:
        """Answer a complete body; the sink is the route's again."""
        ...


class Pages(Protocol):
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

    def too_many(self) -> Response:
        """Answer a request beyond the rate of its party."""
        ...


class Refused(StrEnum):
    """Why a connection was turned away or cut off, or a request not read; the values are labels of a metric."""

    FULL = "connections"  # there are as many as there may be
    PARTY_FULL = "address_connections"  # its address has as many as it may have
    MADE_ROOM = "made_room"  # cut off in favour of another one
    RATE = "rate"  # more requests than its address may send
    SLOW_HEAD = "slow_head"
    LONG_HEAD = "long_head"
    BAD_HEAD = "bad_head"
    SLOW_BODY = "slow_body"
    LARGE_BODY = "large_body"
    BAD_CHUNKS = "bad_chunks"
    SLOW_READER = "slow_reader"  # does not take its answer


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may take.

    Attributes:
        header_timeout: seconds until a request head is complete.
        body_timeout: seconds in which a body must bring ``min_body_rate`` times as many bytes.
        min_body_rate: bytes per second, for bodies in both directions.
        idle_timeout: seconds between an answer and the next request.
        connections_per_address: at a time, 0 for any number.
        request_rate: requests per second and address, 0 for any number.
        request_burst: requests of an address that may come at once, if there is a rate.
    """

    header_timeout: float = 10.0
    body_timeout: float = 60.0
    min_body_rate: float = 1024.0
    idle_timeout: float = 50.0
    connections_per_address: int = 0
    request_rate: float = 0.0
    request_burst: int = 20
