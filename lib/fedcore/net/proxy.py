"""The PROXY protocol, versions 1 and 2: who is behind a connection that a load balancer has passed on.

Connections from the configured networks must begin with a header; all others are served as they are, so nobody else can
say that he is another. Once the header is read, the connection is handed over as if it had begun behind it: the
transport itself goes to the next protocol and only says another peer, so nothing becomes slower than without a
proxy. TLS, where there is some, begins behind the header.

What is wrong with a header ends the connection: whoever sends none cannot be told apart from whoever lies.

Twisted has a wrapper for this. It closes a connection whose header arrives in two pieces, takes any text for an
address, has no bound for time, and stands between protocol and socket for the life of the connection.

Source: "The PROXY protocol, versions 1 & 2", HAProxy's doc/proxy-protocol.txt, 2.1 and 2.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from twisted.internet import address, protocol
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure

from fedcore.errors import PeerError
from fedcore.net.networks import Networks

MAX_V1 = 107  # bytes, the line's end included; the specification's own bound
MAX_V2 = 4096  # bytes; addresses take 52, what a proxy adds about TLS and names some hundreds
QUIET_S = 60.0  # one warning in so much time: a wrong proxy sends thousands of connections
_LINE = b"PROXY "
_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED = 16  # bytes of a header of version 2 before the addresses
_LOCAL, _PROXY = 0x20, 0x21  # version 2 and a command
_FAMILIES = {b"TCP4": IPv4Address, b"TCP6": IPv6Address}
_TCP = {0x11: (IPv4Address, 4), 0x21: (IPv6Address, 16)}  # and the bytes of an address
_NO_ADDRESS = 0x00, 0x31  # unspecified; a Unix socket
_NOWHERE = "0.0.0.0"  # an address of nobody


@dataclass(frozen=True, slots=True)
class Header:
    """A complete header.

    Attributes:
        length: bytes that it takes.
        host: IPv4 or IPv6 address of the client, 0.0.0.0 if the proxy does not know it; None: the proxy speaks for
            itself, to look whether we live.
        port: of the client.
    """

    length: int
    host: str | None = None
    port: int = 0


def read_header(data: bytes) -> Header | None:
    """Read the header at the beginning of a connection.

    Args:
        data: all bytes so far.

    Returns:
        The header, None while bytes are missing.

    Raises:
        PeerError: the bytes begin with no header.
    """
    if data.startswith(_SIGNATURE):
        return _read_v2(data)
    if data.startswith(_LINE):
        return _read_v1(data)
    if _SIGNATURE.startswith(data) or _LINE.startswith(data):
        return None
    raise PeerError("it does not begin with a PROXY header")


def _read_v1(data: bytes) -> Header | None:
    end = data.find(b"\r\n", 0, MAX_V1)
    if end < 0:
        if len(data) >= MAX_V1:
            raise PeerError("the PROXY header has no end")
        return None
    length = end + 2
    family, *rest = data[len(_LINE) : end].split(b" ")
    if family == b"UNKNOWN":
        return Header(length, _NOWHERE)
    try:
        kind = _FAMILIES[family]
        source, destination, port, to_port = (part.decode("ascii") for part in rest)
        kind(destination)
        _port(to_port)
        return Header(length, str(kind(source)), _port(port))
    except (KeyError, ValueError):
        raise PeerError("the PROXY header of version 1 is malformed") from None


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 65535):
        raise ValueError(text)
    return int(text)


def _read_v2(data: bytes) -> Header | None:
    if len(data) < _FIXED:
        return None
    command, family = data[12], data[13]
    length = _FIXED + int.from_bytes(data[14:16], "big")
    if length > MAX_V2:
        raise PeerError(f"the PROXY header has {length} bytes, more than {MAX_V2}")
    if command not in (_LOCAL, _PROXY):
        raise PeerError(f"the PROXY header has an unknown version or command, {command:#04x}")
    if len(data) < length:
        return None
    if command == _LOCAL:
        return Header(length)
    if family in _NO_ADDRESS:
        return Header(length, _NOWHERE)
    if family not in _TCP:
        raise PeerError(f"the PROXY header is about no TCP connection: family and protocol {family:#04x}")
    kind, size = _TCP[family]
    addresses = data[_FIXED:length]
    if len(addresses) < 2 * size + 4:
        raise PeerError("the PROXY header has no room for its addresses")
    return Header(length, str(kind(addresses[:size])), int.from_bytes(addresses[2 * size :][:2], "big"))


def behind_proxies(
    site: Any, context: Any, proxies: Iterable[str], patience: float, reactor: Any
) -> tuple[Any, Any]:
    """Return what a listener needs, the factory and the context of TLS, if proxies may stand before it.

    Args:
        site: factory of those who do the work.
        context: of TLS, None for none.
        proxies: networks in CIDR form, none if there are none.
        patience: seconds for a header to arrive.
        reactor: for that.
    """
    networks = tuple(proxies)
    if not networks:
        return site, context
    inner = site if context is None else TLSMemoryBIOFactory(context, False, site)
    return ProxiedFactory(inner, networks, patience, reactor), None


class ProxiedFactory(protocol.Factory):
    """Reads the headers of proxies, and hands all connections to the factory of those who do the work."""

    log = Logger()
    noisy = False

    def __init__(self, inner: Any, proxies: Iterable[str], patience: float, reactor: Any) -> None:
        """Serve with the protocols of ``inner``.

        Args:
            inner: factory of the listener, with TLS if it has some.
            proxies: networks in CIDR form whose connections begin with a header.
            patience: seconds for a header to arrive.
            reactor: for that.
        """
        self.inner = inner
        self.patience = patience
        self.reactor = reactor
        self._proxies = Networks(proxies)
        self._quiet_until = -1.0

    def startFactory(self) -> None:
        self.inner.doStart()

    def stopFactory(self) -> None:
        self.inner.doStop()

    def buildProtocol(self, addr: Any) -> Any:
        return _BeforeHeader(self) if addr.host in self._proxies else self.inner.buildProtocol(addr)

    def tell(self, proxy: str, reason: str) -> None:
        """Warn of a proxy whose connection is closed, unless it was done a moment ago."""
        now = self.reactor.seconds()
        if now >= self._quiet_until:
            self._quiet_until = now + QUIET_S
            self.log.warn(
                "closed a connection of the proxy {proxy}: {reason}; HAProxy needs send-proxy or send-proxy-v2 on its "
                "server lines, and fedcore.device.proxies only the networks of proxies",
                proxy=proxy,
                reason=reason,
            )


class _BeforeHeader(protocol.Protocol):
    """A proxy's connection until its header is complete."""

    transport: Any

    def __init__(self, site: ProxiedFactory) -> None:
        self._site = site
        self._received = b""
        self._deadline: Any = None

    def connectionMade(self) -> None:
        self._deadline = self._site.reactor.callLater(
            self._site.patience, self._refuse, "the PROXY header does not arrive"
        )

    def connectionLost(self, reason: Failure = protocol.connectionDone) -> None:
        if self._deadline.active():
            self._deadline.cancel()

    def dataReceived(self, data: bytes) -> None:
        self._received += data
        try:
            header = read_header(self._received)
        except PeerError as error:
            self._refuse(str(error))
            return
        if header is not None:
            self._deadline.cancel()
            self._hand_over(header)

    def _hand_over(self, header: Header) -> None:
        transport, rest = self.transport, self._received[header.length :]
        peer = transport.getPeer() if header.host is None else _address(header.host, header.port)
        transport.getPeer = lambda: peer
        transport.protocol = inner = self._site.inner.buildProtocol(peer)
        inner.makeConnection(transport)
        if rest and not transport.disconnecting:
            inner.dataReceived(rest)

    def _refuse(self, reason: str) -> None:
        self._site.tell(self.transport.getPeer().host, reason)
        self.transport.abortConnection()


def _address(host: str, port: int) -> Any:
    kind = address.IPv6Address if ":" in host else address.IPv4Address
    return kind("TCP", host, port)
