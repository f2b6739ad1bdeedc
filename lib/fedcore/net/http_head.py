"""Heads of HTTP requests and bodies in chunks, no more of HTTP than devices use.

llhttp, through httptools, finds lines, fields and chunks. It refuses whatever two readers could read in two ways: a
length beside chunks, two lengths, folded fields, bare line feeds, signs and blanks in sizes. What it leaves open is
decided here: versions, methods, transfer codings, paths, and how much wrapping chunks may have.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_to_bytes

import httptools

from fedcore.errors import PeerError

METHODS = frozenset((b"POST", b"GET", b"HEAD", b"PUT", b"DELETE"))  # libevent's; devices use POST
CHUNK_WRAPPING = 8  # bytes of wrapping allowed per byte of content; a chunk of one byte has five
CHUNK_SLACK = 16_384  # bytes of wrapping allowed beyond that: extensions, trailers
_CHUNKS_FOLLOW = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True, slots=True)
class RequestHead:
    """What the head of a request says.

    Attributes:
        method: one of METHODS.
        path: without query, percent-decoded.
        length: bytes of the body, 0 if it comes in chunks.
        chunked: whether the body comes in chunks.
        keep_alive: whether the peer means to use the connection again.
        expects_continue: whether the peer waits for 100 Continue before it sends the body.
    """

    method: bytes
    path: bytes
    length: int = 0
    chunked: bool = False
    keep_alive: bool = True
    expects_continue: bool = False


@dataclass(frozen=True, slots=True)
class HeadFault:
    """Why a head cannot be served: an HTTP status and a sentence."""

    status: int
    text: str


@lru_cache(maxsize=512)
def parse_head(data: bytes) -> RequestHead | HeadFault:
    """Read a head, from its first line to the empty line that ends it.

    The devices of one job send the same few heads again and again, byte for byte: most are read once.
    """
    fields = _Fields()
    fields.parser = parser = httptools.HttpRequestParser(fields)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # RFC 9110 7.8: an upgrade may be ignored; CONNECT is refused below
    except httptools.HttpParserError as error:
        return HeadFault(400, f"Bad request: {error}")
    finally:
        fields.parser = None  # parser and fields hold each other
    version, method = parser.get_http_version(), parser.get_method()
    if version not in ("1.1", "1.0"):
        return HeadFault(505, "This listener speaks HTTP/1.1 and HTTP/1.0.")
    if method not in METHODS:
        return HeadFault(501, "This method is not known here.")
    coding = fields.coding.strip().lower()
    if coding and version == "1.0":
        return HeadFault(400, "Bad request: HTTP/1.0 has no chunks")
    if coding and coding != b"chunked":
        return HeadFault(501, "Of all transfer codings only chunked is known here.")
    path = _path_of(fields.target)
    if path is None:
        return HeadFault(400, "Bad request: the target is no URL")
    return RequestHead(
        method,
        path,
        fields.length,
        bool(coding),
        fields.keep_alive and version == "1.1",
        version == "1.1" and fields.expect.strip().lower() == b"100-continue",
    )


class _Fields:
    """Takes from the parser what is of interest."""

    __slots__ = ("coding", "expect", "keep_alive", "length", "parser", "target")

    def __init__(self) -> None:
        self.target = self.coding = self.expect = b""
        self.length = 0
        self.keep_alive = False
        self.parser: httptools.HttpRequestParser | None = None

    def on_url(self, part: bytes) -> None:
        self.target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-length":
            self.length = int(value)
        elif name == b"transfer-encoding":  # several fields are one list
            self.coding = b"%s, %s" % (self.coding, value) if self.coding else value
        elif name == b"expect":
            self.expect = value

    def on_headers_complete(self) -> None:
        assert self.parser is not None
        self.keep_alive = self.parser.should_keep_alive()  # forgotten by the parser once the request is over


def _path_of(target: bytes) -> bytes | None:
    """Return the path of a request's target, None if it is no URL."""
    if target.startswith(b"/") and not (b"?" in target or b"%" in target or b"#" in target):
        return target
    try:
        path: bytes | None = httptools.parse_url(target).path
    except httptools.HttpParserInvalidURLError:
        return None
    return unquote_to_bytes(path or b"/")


class ChunkedBody:
    """Moves the content of chunks into a buffer.

    The parser goes on past the end of the body into whatever follows in the same read. That is lost, so the
    connection cannot serve another request.

    Attributes:
        length: bytes of content so far.
        complete: whether the last chunk and the trailers have arrived.
        overflow: whether there is more content than the limit.
    """

    def __init__(self, buffer: memoryview, limit: int) -> None:
        """Fill ``buffer`` with at most ``limit`` bytes."""
        self.length = 0
        self.complete = False
        self.overflow = False
        self._buffer = buffer
        self._limit = limit
        self._received = 0
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(_CHUNKS_FOLLOW)

    def feed(self, data: bytes) -> None:
        """Take received bytes.

        Raises:
            PeerError: they are no chunks, hold too much (see ``overflow``) or are wrapped in too much.
        """
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.complete:  # else it is about what follows the body
                raise PeerError(f"Bad request: {error}") from error
        if not self.complete and self._received > CHUNK_SLACK + (1 + CHUNK_WRAPPING) * self.length:
            raise PeerError("Bad request: chunks with little in them")

    def on_body(self, data: bytes) -> None:
        """Take the content of a chunk, or a part of it (httptools)."""
        if self.complete:
            return
        end = self.length + len(data)
        if end > self._limit:
            self.overflow = True
            raise PeerError("the chunks hold too much")
        self._buffer[self.length : end] = data
        self.length = end

    def on_message_complete(self) -> None:
        """Note the end of the body (httptools)."""
        self.complete = True
