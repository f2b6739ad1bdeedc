"""The PROXY protocol: its headers byte by byte, and a device listener behind a proxy, on plain TCP and TLS alike."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address
from twisted.internet.tcp import Server
from twisted.logger import globalLogPublisher
from twisted.protocols.tls import TLSMemoryBIOFactory
from unit.net.rig import PEERS, FakeRoute, Peer, Rig, TlsPeer, post, server_context

from fedcore.errors import PeerError
from fedcore.net.device_http import DeviceProtocol
from fedcore.net.networks import Networks
from fedcore.net.proxy import MAX_V1, MAX_V2, Header, ProxiedFactory, read_header

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
PROXY = "192.0.2.1"  # the host that every Peer of the rig connects from
INSIDER, OUTSIDER = "10.0.0.7", "198.51.100.9"


def v2(command: int, family: int, addresses: bytes, extra: bytes = b"") -> bytes:
    body = addresses + extra
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(body)) + body


def of_tcp(source: str, destination: str = "203.0.113.1", port: int = 40_000, extra: bytes = b"") -> bytes:
    """Return a header of version 2."""
    six = ":" in source
    kind = socket.AF_INET6 if six else socket.AF_INET
    packed = [socket.inet_pton(kind, host) for host in (source, "2001:db8::1" if six else destination)]
    return v2(0x21, 0x21 if six else 0x11, b"".join(packed) + struct.pack("!2H", port, 6600), extra)


LOCAL = v2(0x20, 0x00, b"")
# name -> bytes, what they say
HEADERS: dict[str, tuple[bytes, str | None, int]] = {
    "1 IPv4": (b"PROXY TCP4 10.0.0.7 203.0.113.1 40000 6600\r\n", "10.0.0.7", 40000),
    "1 IPv6": (b"PROXY TCP6 2001:db8::7 2001:db8::1 40000 6600\r\n", "2001:db8::7", 40000),
    "1 IPv6 in full": (
        b"PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n",
        "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe",
        65535,
    ),
    "1 unknown": (b"PROXY UNKNOWN\r\n", "0.0.0.0", 0),
    "1 unknown with words": (b"PROXY UNKNOWN 10.0.0.7 ?\r\n", "0.0.0.0", 0),
    "1 longest": (b"PROXY UNKNOWN ".ljust(MAX_V1 - 2, b"x") + b"\r\n", "0.0.0.0", 0),
    "2 IPv4": (of_tcp("10.0.0.7"), "10.0.0.7", 40000),
    "2 IPv6": (of_tcp("2001:db8::7", port=1), "2001:db8::7", 1),
    "2 with more": (of_tcp("10.0.0.7", extra=b"\x04\0\x05\0\0\0\0\0"), "10.0.0.7", 40000),
    "2 longest": (of_tcp("10.0.0.7", extra=bytes(MAX_V2 - 28)), "10.0.0.7", 40000),
    "2 local": (LOCAL, None, 0),
    "2 local with addresses": (v2(0x20, 0x11, bytes(12)), None, 0),
    "2 unspecified": (v2(0x21, 0x00, b""), "0.0.0.0", 0),
    "2 Unix": (v2(0x21, 0x31, b"/run/x".ljust(108, b"\0") * 2), "0.0.0.0", 0),
}
# name -> bytes that are none, however many more come
FAULTS: dict[str, bytes] = {
    "a request": post(),
    "a TLS record": b"\x16\x03\x01\x02\x00\x01",
    "one letter": b"G",
    "1 without an end": b"PROXY TCP4 " + b"1" * MAX_V1,
    "1 no family": b"PROXY \r\n",
    "1 other family": b"PROXY UDP4 10.0.0.7 203.0.113.1 40000 6600\r\n",
    "1 small letters": b"proxy TCP4 10.0.0.7 203.0.113.1 40000 6600\r\n",
    "1 name for address": b"PROXY TCP4 localhost 203.0.113.1 40000 6600\r\n",
    "1 IPv6 as IPv4": b"PROXY TCP4 2001:db8::7 203.0.113.1 40000 6600\r\n",
    "1 bad destination": b"PROXY TCP4 10.0.0.7 x 40000 6600\r\n",
    "1 octal": b"PROXY TCP4 10.0.0.07 203.0.113.1 40000 6600\r\n",
    "1 port too high": b"PROXY TCP4 10.0.0.7 203.0.113.1 65536 6600\r\n",
    "1 other port too high": b"PROXY TCP4 10.0.0.7 203.0.113.1 40000 65536\r\n",
    "1 too long": b"PROXY UNKNOWN ".ljust(MAX_V1 - 1, b"x") + b"\r\n",
    "1 no port": b"PROXY TCP4 10.0.0.7 203.0.113.1 40000\r\n",
    "1 signed port": b"PROXY TCP4 10.0.0.7 203.0.113.1 +40000 6600\r\n",
    "1 two blanks": b"PROXY  TCP4 10.0.0.7 203.0.113.1 40000 6600\r\n",
    "1 one word more": b"PROXY TCP4 10.0.0.7 203.0.113.1 40000 6600 x\r\n",
    "1 no ASCII": "PROXY TCP4 10.0.0.７ 203.0.113.1 40000 6600\r\n".encode(),
    "2 other signature": b"\r\n\r\n\0\r\nQUIT\r",
    "2 version 1": v2(0x11, 0x11, bytes(12)),
    "2 other command": v2(0x22, 0x11, bytes(12)),
    "2 datagrams": v2(0x21, 0x12, bytes(12)),
    "2 other family": v2(0x21, 0x41, bytes(12)),
    "2 too short for IPv4": v2(0x21, 0x11, bytes(11)),
    "2 too short for IPv6": v2(0x21, 0x21, bytes(35)),
    "2 too long": of_tcp("10.0.0.7", extra=bytes(MAX_V2 - 27)),
    "2 announced 64 KiB": SIGNATURE + b"\x21\x11\xff\xff",
}


# ---- the bytes


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_read_when_its_last_byte_is_there(name: str) -> None:
    data, host, port = HEADERS[name]
    assert [read_header(data[:end]) for end in range(len(data))] == [None] * len(data)
    for rest in (b"", b"\r\n", b"PROXY ", SIGNATURE):
        assert read_header(data + rest) == Header(len(data), host, port)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_and_no_byte_takes_it_back(name: str) -> None:
    data = FAULTS[name]
    for rest in (b"", b"\r\n", bytes(MAX_V2)):
        with pytest.raises(PeerError):
            read_header(data + rest)


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda tail: b"PROXY " + tail + b"\r\n"))
@example(b"PROXY TCP4 \r\n")
def test_any_bytes_are_a_header_or_a_fault_or_too_few(data: bytes) -> None:
    try:
        header = read_header(data)
    except PeerError:
        return
    if header is None:
        assert len(data) < MAX_V1 or data.startswith(SIGNATURE)
    else:
        assert 0 < header.length <= len(data)
        assert header.host is None or ip_address(header.host)


@given(st.binary(min_size=4, max_size=4 + 600))
def test_any_bytes_behind_the_signature(tail: bytes) -> None:
    try:
        header = read_header(SIGNATURE + tail)
    except PeerError:
        return
    assert header is None or header.length == 16 + int.from_bytes(tail[2:4], "big") <= len(tail) + 12


def test_an_ipv4_address_in_ipv6_clothes_is_in_its_network() -> None:
    networks = Networks(["10.0.0.0/24", "2001:db8::/32"])
    assert "::ffff:10.0.0.7" in networks and "2001:db8::7" in networks
    assert "::ffff:10.0.1.7" not in networks


# ---- the listener


class Proxied(Peer):
    """A proxy's connection, or that of somebody who pretends to be one."""

    host = PROXY

    def _protocol(self) -> Any:
        return self.rig.listener.buildProtocol(IPv4Address("TCP", self.host, 1))  # type: ignore[attr-defined]

    @property
    def device(self) -> DeviceProtocol | None:
        """The protocol that serves the device."""
        inner = getattr(self.transport.protocol, "wrappedProtocol", self.transport.protocol)
        return inner if isinstance(inner, DeviceProtocol) else None


class ProxiedTls(Proxied, TlsPeer):
    """The same with TLS, which begins behind the header."""

    header = b""

    def _outgoing(self) -> bytes:
        header, self.header = self.header, b""
        return header + super()._outgoing()


class ProxiedRig(Rig):
    """A listener for one proxy, with a route for everybody and one for insiders."""

    def __init__(self, kind: str, **limits: float) -> None:
        super().__init__(kind, **limits)
        self.kind = kind
        self.private = FakeRoute("private")
        self.site._private, self.site._insiders = {b"/private": self.private}, Networks(["10.0.0.0/24"])
        inner: Any = self.site
        if kind == "tls":
            inner = TLSMemoryBIOFactory(server_context(), False, inner, self.reactor)
        self.listener = ProxiedFactory(inner, [f"{PROXY}/32"], 10.0, self.reactor)
        self.warnings: list[str] = []

    def __enter__(self) -> ProxiedRig:
        self.listener.doStart()
        globalLogPublisher.addObserver(self._observe)
        return self

    def _observe(self, event: Any) -> None:
        super()._observe(event)
        if event.get("log_level") and event["log_level"].name == "warn":
            self.warnings.append(event["reason"])

    def come(self, header: bytes, host: str = PROXY) -> Peer:
        """Connect from a host, with a header before the rest."""
        peer: Peer
        if self.kind == "tls":
            peer = type("From", (ProxiedTls,), {"host": host, "header": header})(self)
        else:
            peer = type("From", (Proxied,), {"host": host})(self)
            peer.send(header)
        self.peers.append(peer)
        return peer


@pytest.fixture(params=PEERS)
def rig(request: pytest.FixtureRequest) -> Iterator[ProxiedRig]:
    with ProxiedRig(request.param) as rig:
        yield rig
        for peer in rig.peers:
            peer.end()
        rig.pass_time(1)
        assert all(peer.lost for peer in rig.peers)
        assert not rig.site.connections
        rig.listener.doStop()
        assert not rig.reactor.getDelayedCalls()


PRIVATE = post(target=b"/private")


@pytest.mark.parametrize("header", ["1 IPv4", "2 IPv4", "2 with more"])
def test_the_address_of_the_header_counts(rig: ProxiedRig, header: str) -> None:
    data = HEADERS[header][0]
    assert rig.come(data).send(PRIVATE, post()).statuses == [200, 200]
    stranger = data.replace(b"10.0.0.7", b"10.0.1.7").replace(bytes([10, 0, 0, 7]), bytes([10, 0, 1, 7]))
    assert rig.come(stranger).send(post(), PRIVATE).statuses == [200, 404]
    assert not rig.warnings


@pytest.mark.parametrize("header", ["1 unknown", "2 unspecified", "2 Unix", "2 local"])
def test_who_is_not_named_is_no_insider(rig: ProxiedRig, header: str) -> None:
    assert rig.come(HEADERS[header][0]).send(post(), PRIVATE).statuses == [200, 404]


def test_a_proxy_that_speaks_for_itself_has_its_own_address(rig: ProxiedRig) -> None:
    rig.site._insiders = Networks([PROXY])
    assert rig.come(LOCAL).send(PRIVATE).statuses == [200]
    assert rig.come(HEADERS["2 unspecified"][0]).send(PRIVATE).statuses == [404]


@pytest.mark.parametrize("header", ["1 IPv6", "2 IPv4"])
def test_a_header_in_any_two_pieces(header: str) -> None:
    data = HEADERS[header][0]
    with ProxiedRig("tcp") as rig:
        for cut in range(len(data) + 1):
            peer = rig.come(data[:cut]).send(data[cut:] + post(b"one")[:9], post(b"one")[9:])
            assert [reply.body for reply in peer.replies] == [b"one"]
            peer.end()


def test_header_and_request_in_one_piece(rig: ProxiedRig) -> None:
    if rig.kind == "tcp":
        assert rig.come(of_tcp(INSIDER) + PRIVATE).statuses == [200]


@pytest.mark.parametrize("name", FAULTS)
def test_a_proxy_without_a_proper_header_is_cut_off(name: str) -> None:
    with ProxiedRig("tcp") as rig:
        peer = rig.come(FAULTS[name])
        assert peer.lost and peer.wire.reset and not peer.wire.sent
        assert len(rig.warnings) == 1
        assert not rig.site.connections


def test_a_handshake_without_a_header_is_cut_off() -> None:
    with ProxiedRig("tls") as rig:
        peer = rig.come(b"")
        assert peer.lost and not peer.wire.sent
        assert rig.warnings == ["it does not begin with a PROXY header"]


def test_nobody_else_can_give_himself_an_address(rig: ProxiedRig) -> None:
    """Elsewhere a header is what it looks like: no HTTP, and no TLS."""
    for header in (of_tcp(INSIDER), HEADERS["1 IPv4"][0]):
        peer = rig.come(header, OUTSIDER)
        if rig.kind == "tcp":
            peer.send(PRIVATE)
            assert [status for status in peer.statuses if status == 200] == []
        else:
            assert peer.lost
    assert not rig.private.handled


def test_others_are_served_as_they_are(rig: ProxiedRig) -> None:
    assert rig.come(b"", OUTSIDER).send(post(), PRIVATE).statuses == [200, 404]
    assert rig.come(b"", INSIDER).send(post()).statuses == [200]


@pytest.mark.parametrize("begun", [b"", b"PROXY TCP4", SIGNATURE + b"\x21"])
def test_a_header_that_does_not_arrive_is_not_waited_for(begun: bytes) -> None:
    with ProxiedRig("tcp") as rig:
        peer = rig.come(begun)
        rig.pass_time(9)
        assert not peer.lost
        rig.pass_time(1.5)
        assert peer.lost and rig.warnings == ["the PROXY header does not arrive"]


def test_a_header_one_byte_at_a_time_is_late_as_well() -> None:
    with ProxiedRig("tcp") as rig:
        peer = rig.come(b"")
        for byte in of_tcp(INSIDER)[:15]:
            peer.send(bytes([byte]))
            rig.pass_time(1)
        assert peer.lost


def test_a_wrong_proxy_is_told_of_once_a_minute() -> None:
    with ProxiedRig("tcp") as rig:
        for _ in range(3):
            rig.come(post())
        assert len(rig.warnings) == 1
        rig.pass_time(61)
        rig.come(post())
        assert len(rig.warnings) == 2


def test_a_proxy_that_only_knocks_is_not_told_of(rig: ProxiedRig) -> None:
    peer = Proxied(rig).end()
    assert peer.lost and not rig.warnings


def test_the_socket_is_the_device_protocols_own(rig: ProxiedRig) -> None:
    """No byte of a body or an answer takes a longer way than without a proxy."""
    peer: Any = rig.come(of_tcp(INSIDER))
    assert peer.device is not None
    if rig.kind == "tcp":
        assert type(peer.device.transport) is Server
        assert peer.device._direct is not None
    assert peer.device.transport.getPeer().host == INSIDER


def test_one_connection_too_many_is_turned_away(rig: ProxiedRig) -> None:
    rig.site._max_connections = 1
    first = rig.come(of_tcp(INSIDER))
    assert rig.come(of_tcp(INSIDER)).lost
    assert first.send(post()).statuses == [200]


def test_a_device_that_says_nothing_behind_its_header_is_closed(rig: ProxiedRig) -> None:
    peer = rig.come(of_tcp(INSIDER))
    rig.pass_time(12)
    assert peer.told_end
