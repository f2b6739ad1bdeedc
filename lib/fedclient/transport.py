"""How a device's bytes travel: HTTP and HTTPS over keep-alive connections, or calls in memory.

A transport knows nothing of the protocol but the names of its rounds. It raises OSError, and nothing else,
when no whole reply arrived; an HTTP reply of any status is a reply.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import os
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from fedcore import __version__
from fedcore.errors import ConfigError
from fedcore.wire.messages import Round

MAX_REPLY = 1 << 30  # bytes; a model of 250 million floats
BLOCK = 1 << 18  # bytes; the time-out applies to each block, not to a whole upload over a slow line
CONNECT_STEP = 0.2  # seconds; how late an attempt to connect notices that it is no longer wanted
READ_PATIENCE = 3  # a reply may take this many time-outs, as with the original device client

Handler = Callable[[Round, bytes], tuple[int, bytes]]


class Transport(Protocol):
    """One client's way to the servers."""

    def post(self, round_: Round, body: bytes) -> tuple[int, bytes]:
        """Send a request.

        Returns:
            HTTP status and whole body.

        Raises:
            OSError: no whole reply arrived.
        """
        ...

    def close(self) -> None:
        """End a running ``post`` with OSError and refuse later ones; may be called from any thread."""
        ...


class MemoryTransport:
    """Calls a function instead of a server."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def post(self, round_: Round, body: bytes) -> tuple[int, bytes]:
        return self._handler(round_, body)

    def close(self) -> None:
        """Do nothing: nothing is open."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go: ``https`` or not, host, port, and what stands before ``/startFLJob`` in the path."""

    secure: bool
    host: str
    port: int
    prefix: str

    @classmethod
    def at(cls, url: str) -> Server:
        """Read a URL such as ``https://fl.example:6668`` or ``http://10.0.0.1:6668/some/prefix``.

        The round's name is appended with exactly one slash, so a prefix may end in one or not.

        Raises:
            ConfigError: not an http or https URL of a host.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"the server URL {url!r} cannot be read: {error}") from error
        if (
            parts.scheme not in ("http", "https")
            or not host
            or parts.query
            or parts.fragment
            or "@" in parts.netloc
        ):
            raise ConfigError(
                f"the server URL is {url!r}", hint="http://host:port or https://host:port[/prefix]"
            )
        secure = parts.scheme == "https"
        return cls(secure, host, port or (443 if secure else 80), parts.path.rstrip("/"))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.prefix}"


class HttpTransport:
    """POSTs to one of several equal servers, changing to the next after an I/O error.

    Args:
        server_urls: one URL or several.
        timeout: seconds for a connection, a TLS handshake and each block sent; three times as long for each
            part of a reply.
        ca_file: PEM file of the authorities that may have signed the servers' certificates; None: those of
            the system. Certificates and host names are always verified.
        rotate: change to the next server after every request.
        first: index of the server to begin with, modulo their number; lets many devices spread.
        max_reply: longest body accepted, in bytes.

    Raises:
        ConfigError: no server, a URL that cannot be used, or an unreadable ``ca_file``.
    """

    def __init__(
        self,
        server_urls: str | Sequence[str],
        timeout: float = 30.0,
        ca_file: str | None = None,
        *,
        rotate: bool = False,
        first: int = 0,
        max_reply: int = MAX_REPLY,
    ) -> None:
        urls = [server_urls] if isinstance(server_urls, str) else list(server_urls)
        if not urls:
            raise ConfigError("no server URL is given")
        self.servers = tuple(Server.at(url) for url in urls)
        self._index = first % len(urls)
        self._rotate = rotate
        self._max_reply = max_reply
        self._closing = threading.Event()
        self._busy = threading.Lock()
        secure = any(server.secure for server in self.servers)
        if ca_file is not None and not secure:
            raise ConfigError("a CA file is given, but no server URL begins with https")
        tls = _tls_context(ca_file) if secure else None
        self._connections = tuple(_Connection(s, timeout, tls, self._closing) for s in self.servers)

    def post(self, round_: Round, body: bytes) -> tuple[int, bytes]:
        with self._busy:
            connection = self._connections[self._index]
            try:
                reply = self._post(connection, round_, body)
            except (OSError, http.client.HTTPException, ValueError) as error:
                connection.close()
                self._advance()
                raise ConnectionError(f"{connection.server}: {type(error).__name__}: {error}") from error
            finally:
                self._close_if_wanted()
            if self._rotate:
                self._advance()
            return reply

    def _post(self, connection: _Connection, round_: Round, body: bytes) -> tuple[int, bytes]:
        reused = connection.sock is not None
        try:
            return connection.exchange(round_, body, self._max_reply)
        except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            if not reused or self._closing.is_set():
                raise
            connection.close()  # the server had closed it while it lay idle
            return connection.exchange(round_, body, self._max_reply)

    def _advance(self) -> None:
        self._index = (self._index + 1) % len(self.servers)

    def close(self) -> None:
        self._closing.set()
        for connection in self._connections:
            connection.interrupt()
        if self._busy.acquire(blocking=False):  # else the running request closes them at its end
            self._close_if_wanted()
            self._busy.release()

    def _close_if_wanted(self) -> None:
        if self._closing.is_set():
            for connection in self._connections:
                connection.close()


class _Connection(http.client.HTTPConnection):
    """A keep-alive connection that another thread can interrupt at any moment."""

    def __init__(
        self, server: Server, timeout: float, tls: ssl.SSLContext | None, closing: threading.Event
    ) -> None:
        super().__init__(server.host, server.port, timeout=timeout, blocksize=BLOCK)
        self.default_port = 443 if server.secure else 80
        self.server = server
        self._timeout = timeout
        self._tls = tls if server.secure else None
        self._closing = closing
        self._open: socket.socket | None = None  # also during the handshake, when self.sock is not yet set

    def connect(self) -> None:
        """Try the host's addresses in turn, and shake hands if the server is secure."""
        error: OSError | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_STREAM
        ):
            try:
                self.sock = self._connected(socket.socket(family, kind, protocol), address)
                return
            except OSError as failed:
                error = failed
                if self._open is not None:
                    self._open.close()
        raise error or ConnectionError("the host has no address")

    def _connected(self, sock: socket.socket, address: tuple[Any, ...]) -> socket.socket:
        self._watch(sock)
        self._reach(sock, address)
        sock.settimeout(self._timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is None:
            return sock
        secured = self._tls.wrap_socket(sock, server_hostname=self.host, do_handshake_on_connect=False)
        self._watch(secured)
        secured.do_handshake()
        return secured

    def _reach(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        """Connect; in short waits, for nothing wakes a socket that is not connected yet."""
        sock.setblocking(False)
        failure = sock.connect_ex(address)
        give_up = time.monotonic() + self._timeout
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_WRITE)
            while failure == errno.EINPROGRESS:
                if time.monotonic() > give_up:
                    raise TimeoutError("timed out")
                if selector.select(CONNECT_STEP):
                    failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                self._watch(sock)
        if failure:
            raise OSError(failure, os.strerror(failure))

    def _watch(self, sock: socket.socket) -> None:
        self._open = sock
        if self._closing.is_set():
            raise ConnectionAbortedError("the transport is closed")

    def exchange(self, round_: Round, body: bytes, max_reply: int) -> tuple[int, bytes]:
        """Send one request and read its whole reply."""
        if self._closing.is_set():
            raise ConnectionAbortedError("the transport is closed")
        whole = self._send_whole(round_, body)
        if self.sock is not None:
            self.sock.settimeout(READ_PATIENCE * self._timeout)
        response = self.getresponse()
        content = _content(response, max_reply)
        if not whole:
            self.close()
        return response.status, content

    def _send_whole(self, round_: Round, body: bytes) -> bool:
        """Send a request; False if the server stopped listening, perhaps after an answer."""
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(len(body)),
            "User-Agent": f"fedclient/{__version__}",
        }
        if self.sock is not None:
            self.sock.settimeout(self._timeout)
        try:
            self.request("POST", f"{self.server.prefix}/{round_}", io.BytesIO(body), headers)
        except (BrokenPipeError, ConnectionResetError):
            if self.sock is None:
                raise  # already the attempt to connect was reset: nobody can have answered
            return False
        return True

    def interrupt(self) -> None:
        """Wake whoever waits on the socket, with an error."""
        if self._open is not None:
            with contextlib.suppress(OSError):
                # not SSLSocket.shutdown, which would pull the TLS state from under the other thread
                socket.socket.shutdown(self._open, socket.SHUT_RDWR)


def _content(response: http.client.HTTPResponse, max_reply: int) -> bytes:
    """Read a whole body, or raise: http.client checks the length only when no amount is given."""
    if response.length is None:
        content = response.read(max_reply + 1)
    elif response.length <= max_reply:
        return response.read()
    if response.length is not None or len(content) > max_reply:
        response.close()
        raise OSError(f"the reply is longer than {max_reply} bytes")
    return content


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise ConfigError(f"the CA file {ca_file!r} cannot be used: {error}", hint="a PEM file") from error
