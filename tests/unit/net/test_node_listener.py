"""The listener between nodes, on pretended sockets under Twisted's own transports (see rig.py)."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from twisted.internet import defer
from twisted.internet.address import IPv4Address
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import globalLogPublisher
from twisted.protocols.tls import TLSMemoryBIOFactory
from unit.net.rig import Peer, TlsPeer, server_context

from fedcore.errors import LocalError, PeerError
from fedcore.net.node_listener import (
    FOREIGN_CERTIFICATE,
    FRAME_TIMEOUT_S,
    IN_FLIGHT,
    WARNING_INTERVAL_S,
    NodeListener,
    Reply,
    Request,
)
from fedcore.pki.authority import Role, issue, make_authority
from fedcore.pki.chain import fits
from fedcore.wire.node import EMPTY, ERROR_LIMIT, HEAD, Frame, FrameReader, Meta, PayloadKind, encode

NODE = "10.0.0.1:9000"
HOST = "192.0.2.1"
ECHO, WAIT, FAIL, BREAK, LARGE, ACK, LONG = range(7)
MAX_DATA = 1000
LARGE_REPLY = bytes(range(256)) * 4000  # about 1 MB


class Handlers:
    """Commands of all manners."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.waiting: dict[int, defer.Deferred[bytes]] = {}

    @property
    def table(self) -> dict[int, Any]:
        return {
            ECHO: self.echo,
            WAIT: self.wait,
            FAIL: self.fail,
            BREAK: self.broken,
            LARGE: self.large,
            ACK: self.acknowledge,
            LONG: self.too_long,
        }

    async def echo(self, request: Request) -> Reply:
        self.requests.append(request)
        return Reply(request.data, request.kind)

    async def wait(self, request: Request) -> Reply:
        self.requests.append(request)
        self.waiting[request.meta.request_id] = turn = defer.Deferred()
        return Reply(await turn)

    async def fail(self, request: Request) -> Reply:
        raise PeerError("Failed to get model of iteration 7", hint="not for the peer")

    async def broken(self, request: Request) -> Reply:
        raise ZeroDivisionError("a secret")

    async def large(self, request: Request) -> Reply:
        self.requests.append(request)
        return Reply(LARGE_REPLY)

    async def acknowledge(self, request: Request) -> Reply:
        return Reply()

    async def too_long(self, request: Request) -> Reply:
        raise LocalError("x" * 10_000)


class NodePeer(Peer):
    """Another node on plain TCP."""

    host = HOST

    def _protocol(self) -> Any:
        self.protocol = self.rig.site.buildProtocol(IPv4Address("TCP", self.host, 1))
        return self.protocol

    def ask(self, *requests: tuple[int, int, bytes], recv_node: str = NODE) -> NodePeer:
        """Send requests, (command, id, data) each, in one segment."""
        self.send(b"".join(frame(cmd, number, data, recv_node) for cmd, number, data in requests))
        return self

    @property
    def frames(self) -> list[Frame]:
        """The replies."""
        return frames_of(self.received)

    @property
    def reading(self) -> bool:
        """Whether the listener reads what this node sends."""
        return self.transport in self.rig.reactor.readers


class TlsNodePeer(NodePeer, TlsPeer):
    """Another node on TLS."""

    def _protocol(self) -> Any:
        factory = TLSMemoryBIOFactory(server_context(), False, self.rig.site, self.rig.reactor)
        wrapper = factory.buildProtocol(IPv4Address("TCP", self.host, 1))
        self.protocol = wrapper.wrappedProtocol
        return wrapper


class NodeRig:
    """The listener, its clock and what it has logged."""

    def __init__(self, kind: type[NodePeer], max_connections: int = 3) -> None:
        self.kind = kind
        self.reactor: Any = MemoryReactorClock()
        self.handlers = Handlers()
        self.site = NodeListener(
            NODE,
            self.handlers.table,
            max_data=MAX_DATA,
            max_connections=max_connections,
            allowed=lambda host: host == HOST,
            reactor=self.reactor,
        )
        self.logged: list[dict[str, Any]] = []

    def connect(self) -> NodePeer:
        return self.kind(self)  # type: ignore[arg-type]

    def pass_time(self, seconds: float, *peers: NodePeer) -> None:
        self.reactor.advance(seconds)
        for peer in peers:
            peer.pump()


@pytest.fixture(params=[NodePeer, TlsNodePeer], ids=["tcp", "tls"])
def rig(request: pytest.FixtureRequest) -> Iterator[NodeRig]:
    rig = NodeRig(request.param)
    globalLogPublisher.addObserver(rig.logged.append)
    yield rig
    globalLogPublisher.removeObserver(rig.logged.append)


def frame(cmd: int, number: int, data: bytes, recv_node: str = NODE) -> bytes:
    meta = Meta(cmd, number, send_node="other", recv_node=recv_node)
    return b"".join(encode(Frame(PayloadKind.PROTOBUF, meta, data)))


def frames_of(data: bytes) -> list[Frame]:
    reader = FrameReader(2 * len(LARGE_REPLY))
    reader.receive(data)
    frames = list(iter(reader.next_frame, None))
    assert not reader.incomplete
    return frames


def warnings(rig: NodeRig) -> list[dict[str, Any]]:
    return [event for event in rig.logged if event["log_level"].name == "warn"]


def test_a_request_is_answered_with_its_own_meta(rig: NodeRig) -> None:
    peer = rig.connect().ask((ECHO, 5, b"hello"))
    meta = Meta(ECHO, 5, send_node="other", recv_node=NODE)
    assert peer.frames == [Frame(PayloadKind.PROTOBUF, meta, b"hello")]
    assert rig.handlers.requests == [Request(meta, b"hello", HOST, PayloadKind.PROTOBUF)]


def test_an_acknowledgement_is_eight_zero_bytes(rig: NodeRig) -> None:
    (reply,) = rig.connect().ask((ACK, 5, b"hello")).frames
    assert (reply.kind, reply.data, reply.meta.response_error) == (PayloadKind.RAW, EMPTY, "")


def test_a_request_may_come_byte_by_byte(rig: NodeRig) -> None:
    peer = rig.connect()
    peer.send(*(bytes([byte]) for byte in frame(ECHO, 5, b"hello")))
    assert [reply.data for reply in peer.frames] == [b"hello"]


@pytest.mark.parametrize(
    ("cmd", "recv_node", "text"),
    [
        (ECHO, "10.0.0.2:9000", f"expect recv node 10.0.0.2:9000 != actual node {NODE}"),
        (99, NODE, "The cmd 99 is not supported!"),
        (99, "", "The cmd 99 is not supported!"),
        (-1, NODE, "The cmd -1 is not supported!"),
        (FAIL, NODE, "Failed to get model of iteration 7"),
        (LONG, NODE, "x" * ERROR_LIMIT),
    ],
)
def test_a_refusal_is_a_text_and_the_connection_goes_on(
    rig: NodeRig, cmd: int, recv_node: str, text: str
) -> None:
    peer = rig.connect().ask((cmd, 5, b"hello"), recv_node=recv_node)
    peer.ask((ECHO, 6, b"again"), recv_node="")
    refusal, reply = peer.frames
    assert refusal == Frame(
        PayloadKind.RAW, Meta(cmd, 5, send_node="other", recv_node=recv_node, response_error=text), EMPTY
    )
    assert reply.data == b"again"


def test_a_broken_handler_is_logged_and_tells_nothing(rig: NodeRig) -> None:
    (reply,) = rig.connect().ask((BREAK, 5, b"hello")).frames
    assert (reply.meta.response_error, reply.data) == ("inner error", EMPTY)
    (failure,) = [event["log_failure"] for event in rig.logged if "log_failure" in event]
    failure.trap(ZeroDivisionError)


def test_replies_leave_in_the_order_in_which_they_are_ready(rig: NodeRig) -> None:
    peer = rig.connect().ask((WAIT, 1, b"a"), (WAIT, 2, b"b"), (ECHO, 3, b"c"))
    for number in (2, 1):
        rig.handlers.waiting[number].callback(b"%d" % number)
        peer.pump()
    assert [(reply.meta.request_id, bytes(reply.data)) for reply in peer.frames] == [
        (3, b"c"),
        (2, b"2"),
        (1, b"1"),
    ]


def test_many_requests_in_one_segment_are_all_answered(rig: NodeRig) -> None:
    peer = rig.connect().ask(*((ECHO, number, b"x") for number in range(1000)))
    assert [reply.meta.request_id for reply in peer.frames] == list(range(1000))


@pytest.mark.parametrize(
    "bad",
    [HEAD.pack(9, 1, 2), HEAD.pack(0, 2, 3 + MAX_DATA), HEAD.pack(0, 1, 2) + b"\xff", b"GET / HTTP/1.1\r\n"],
)
def test_a_malformed_frame_closes_the_connection(rig: NodeRig, bad: bytes) -> None:
    peer = rig.connect().ask((ECHO, 1, b"before"))
    peer.send(bad + frame(ECHO, 2, b"after"))
    assert peer.lost and not rig.site.connections
    assert [bytes(request.data) for request in rig.handlers.requests] == [b"before"]
    assert len(warnings(rig)) == 1


def test_warnings_about_foreign_bytes_are_few(rig: NodeRig) -> None:
    for _ in range(20):
        rig.connect().send(b"GET / HTTP/1.1\r\n")
    assert len(warnings(rig)) == 1
    rig.pass_time(WARNING_INTERVAL_S)
    rig.connect().send(b"GET / HTTP/1.1\r\n")
    rig.pass_time(WARNING_INTERVAL_S)
    rig.connect().send(b"GET / HTTP/1.1\r\n")
    assert [warning["more_before"] for warning in warnings(rig)] == [0, 19, 0]


def test_the_17th_request_waits_unread(rig: NodeRig) -> None:
    peer = rig.connect().ask(*((WAIT, number, b"x") for number in range(IN_FLIGHT)))
    assert not peer.reading
    peer.wire.arrived += peer.seal(frame(WAIT, IN_FLIGHT, b"x"))
    peer.pump()
    assert peer.wire.arrived and len(rig.handlers.waiting) == IN_FLIGHT
    rig.handlers.waiting[3].callback(b"done")
    peer.pump()
    assert not peer.wire.arrived and len(rig.handlers.waiting) == IN_FLIGHT + 1
    assert not peer.reading
    for number in (0, 1):
        rig.handlers.waiting[number].callback(b"done")
    peer.pump()
    assert peer.reading


def test_what_arrived_behind_the_16th_request_waits_too(rig: NodeRig) -> None:
    peer = rig.connect().ask(*((WAIT, number, b"x") for number in range(40)))
    assert len(rig.handlers.waiting) == IN_FLIGHT and not peer.reading
    for number in range(40):
        rig.handlers.waiting[number].callback(b"done")
    peer.pump()
    assert len(peer.frames) == 40 and peer.reading


def test_large_requests_under_way_are_few(rig: NodeRig) -> None:
    peer = rig.connect().ask(*((WAIT, number, bytes(MAX_DATA // 2)) for number in range(4)))
    assert len(rig.handlers.waiting) == 2 and not peer.reading
    rig.handlers.waiting[0].callback(b"done")
    peer.pump()
    assert len(rig.handlers.waiting) == 3


def test_while_a_peer_does_not_read_its_requests_are_left_unread(rig: NodeRig) -> None:
    peer = rig.connect()
    peer.wire.window = 0
    for number in range(50):
        peer.wire.arrived += peer.seal(frame(LARGE, number, b"x"))
        peer.pump()
    begun = len(rig.handlers.requests)
    assert begun < 5 and not peer.reading
    peer.read(1 << 40)
    assert [reply.data == LARGE_REPLY for reply in peer.frames] == [True] * 50


def test_a_peer_that_never_reads_is_closed(rig: NodeRig) -> None:
    peer = rig.connect()
    peer.wire.window = 0
    peer.ask((LARGE, 1, b"x"))
    rig.pass_time(FRAME_TIMEOUT_S - 1, peer)
    assert not peer.lost
    peer.read(len(LARGE_REPLY) // 2)
    rig.pass_time(FRAME_TIMEOUT_S - 1, peer)
    assert not peer.lost
    rig.pass_time(2, peer)
    assert peer.lost and not rig.site.connections and not rig.reactor.getDelayedCalls()


def test_a_peer_that_has_caught_up_stays(rig: NodeRig) -> None:
    peer = rig.connect()
    peer.wire.window = 0
    peer.ask((LARGE, 1, b"x"))
    peer.read(1 << 40)
    rig.pass_time(10 * FRAME_TIMEOUT_S, peer)
    peer.ask((ECHO, 2, b"x"))
    assert len(peer.frames) == 2


def test_a_connection_that_never_says_anything_stays(rig: NodeRig) -> None:
    peer = rig.connect()
    rig.pass_time(1e6, peer)
    assert len(peer.ask((ECHO, 1, b"x")).frames) == 1


def test_an_idle_connection_stays(rig: NodeRig) -> None:
    peer = rig.connect().ask((ECHO, 1, b"x"))
    rig.pass_time(1e6, peer)
    peer.ask((ECHO, 2, b"x"))
    assert len(peer.frames) == 2


def test_half_a_frame_does_not_stay(rig: NodeRig) -> None:
    peer = rig.connect()
    whole = frame(ECHO, 1, b"x" * 100)
    peer.send(whole[:20])
    rig.pass_time(FRAME_TIMEOUT_S - 1, peer)
    peer.send(whole[20:40])  # a byte now and then is not enough
    assert not peer.lost
    rig.pass_time(2, peer)
    assert peer.lost and not rig.site.connections


def test_a_handshake_does_not_take_forever() -> None:
    class Silent(NodePeer):
        _protocol = TlsNodePeer._protocol  # type: ignore[assignment]

    rig = NodeRig(Silent)
    peer = rig.connect()
    rig.pass_time(FRAME_TIMEOUT_S + 1, peer)
    assert peer.lost and not rig.site.connections


def test_each_frame_has_its_own_time(rig: NodeRig) -> None:
    peer = rig.connect()
    whole = frame(ECHO, 1, b"x" * 100)
    peer.send(whole[:20])
    for _ in range(3):
        rig.pass_time(FRAME_TIMEOUT_S - 1, peer)
        peer.send(whole[20:] + whole[:20])
    assert len(peer.frames) == 3 and not peer.lost


def test_half_a_frame_is_not_late_while_it_is_left_unread(rig: NodeRig) -> None:
    peer = rig.connect()
    whole = frame(ECHO, 77, b"x")
    peer.ask(*((WAIT, number, b"x") for number in range(IN_FLIGHT - 1)))
    peer.send(whole[:20])
    peer.send(whole[20:] + frame(WAIT, IN_FLIGHT, b"x") + whole[:20])
    assert not peer.reading
    rig.pass_time(10 * FRAME_TIMEOUT_S, peer)
    assert not peer.lost
    rig.handlers.waiting[0].callback(b"done")
    peer.pump()
    rig.pass_time(FRAME_TIMEOUT_S - 1, peer)
    peer.send(whole[20:])
    assert [reply.meta.request_id for reply in peer.frames] == [77, 0, 77]


def test_half_a_frame_is_not_late_while_the_peer_is_behind(rig: NodeRig) -> None:
    peer = rig.connect().ask((WAIT, 1, b"x"))
    whole = frame(ECHO, 2, b"x")
    peer.send(whole[:20])
    rig.pass_time(FRAME_TIMEOUT_S - 10, peer)
    peer.wire.window = 0
    rig.handlers.waiting[1].callback(LARGE_REPLY)
    peer.pump()
    assert not peer.reading
    rig.pass_time(FRAME_TIMEOUT_S - 10, peer)
    peer.read(1 << 40)
    rig.pass_time(FRAME_TIMEOUT_S - 10, peer)
    peer.send(whole[20:])
    assert [reply.meta.request_id for reply in peer.frames] == [1, 2]


def test_connections_too_many_are_closed_at_once(rig: NodeRig) -> None:
    peers = [rig.connect() for _ in range(3)]
    assert rig.connect().lost
    peers[0].end()
    late = rig.connect()
    assert not late.lost and late.ask((ECHO, 1, b"x")).frames


def test_nodes_that_are_not_allowed_are_closed_at_once(rig: NodeRig) -> None:
    rig.kind = type("Stranger", (rig.kind,), {"host": "192.0.2.66"})
    assert rig.connect().lost
    (warning,) = warnings(rig)
    assert warning["peer"] == "192.0.2.66"


def test_a_connection_counts_until_its_requests_are_over(rig: NodeRig) -> None:
    peer = rig.connect().ask((WAIT, 1, b"x"))
    peer.end()
    assert peer.lost and len(rig.site.connections) == 1
    rig.handlers.waiting[1].callback(b"done")
    assert not rig.site.connections


def test_stopping_lets_requests_end(rig: NodeRig) -> None:
    idle, busy = rig.connect(), rig.connect().ask((WAIT, 1, b"x"))
    done: list[Any] = []
    rig.site.stop(5.0).addCallback(done.append)
    idle.pump()
    assert idle.told_end and not busy.told_end and rig.connect().lost
    busy.send(frame(ECHO, 2, b"too late"))
    rig.handlers.waiting[1].callback(b"done")
    busy.pump()
    assert [bytes(reply.data) for reply in busy.frames] == [b"done"]
    for peer in (idle, busy):
        assert peer.told_end
        peer.end()
    assert done == [None] and not rig.reactor.getDelayedCalls()


def test_stopping_lets_replies_leave(rig: NodeRig) -> None:
    peer = rig.connect()
    peer.wire.window = 0
    peer.ask((LARGE, 1, b"x"))
    rig.site.stop(5.0)
    peer.read(1 << 40)
    assert [reply.data == LARGE_REPLY for reply in peer.frames] == [True]
    assert peer.told_end
    peer.end()
    rig.pass_time(6.0, peer)
    assert peer.lost


def test_stopping_hears_the_end_of_a_peer_that_was_left_unread(rig: NodeRig) -> None:
    peer = rig.connect().ask(*((WAIT, number, b"x") for number in range(IN_FLIGHT)))
    done: list[Any] = []
    rig.site.stop(5.0).addCallback(done.append)
    assert not peer.reading
    for number in range(IN_FLIGHT):
        rig.handlers.waiting[number].callback(b"done")
    peer.pump()
    assert len(peer.frames) == IN_FLIGHT and peer.told_end
    peer.end()
    assert peer.lost and done


def test_stopping_does_not_wait_forever(rig: NodeRig) -> None:
    peer = rig.connect().ask((WAIT, 1, b"x"))
    done: list[Any] = []
    rig.site.stop(5.0).addCallback(done.append)
    rig.pass_time(6.0, peer)
    assert peer.lost and not done
    rig.handlers.waiting[1].callback(b"done")
    assert done == [None]


def test_stopping_without_connections_is_done_at_once(rig: NodeRig) -> None:
    done: list[Any] = []
    rig.site.stop(5.0).addCallback(done.append)
    assert done == [None] and not rig.reactor.getDelayedCalls()


class TestBearers:
    """Who may speak under which id with which certificate."""

    CA = make_authority("fl CA", datetime.now(UTC))

    def answer(self, sender: str, peer: str, *hosts: str, names: frozenset[str] = frozenset()) -> str:
        """Return the error of the answer to who shows a certificate for these hosts."""
        shown = issue(self.CA, Role.CLIENT, "node", datetime.now(UTC), hosts=hosts).certificate
        rig = NodeRig(NodePeer)
        listener = NodeListener(
            NODE,
            {ECHO: rig.handlers.table[ECHO]},
            max_connections=1,
            allowed=lambda host: True,
            reactor=rig.reactor,
            names_fit=lambda own, host: fits(own, host) or not own.isdisjoint(names),
        )
        request = Request(Meta(ECHO, 1, send_node=sender), b"", peer)
        answered = defer.Deferred.fromCoroutine(listener.answer(request, shown))
        reader = FrameReader(MAX_DATA)
        for part in self.result_of(answered):
            reader.receive(bytes(part))
        frame = reader.next_frame()
        assert frame is not None
        return frame.meta.response_error

    @staticmethod
    def result_of(answered: Any) -> Any:
        results: list[Any] = []
        answered.addCallback(results.append)
        return results[0]

    @pytest.mark.parametrize(
        ("sender", "peer", "hosts"),
        [
            ("10.0.0.5:6766::2026-01-01::1", "10.0.0.5", ["10.0.0.5"]),
            ("10.0.0.5:6766::2026-01-01::1", "127.0.0.1", ["10.0.0.5"]),  # a server is where its id says
            ("[fd00::5]:6766::2026-01-01::1", "fd00::5", ["fd00::5"]),
            ("fl1.example:6766::2026-01-01::1", "10.0.0.5", ["FL1.example"]),
            ("worker_fl_2026::1", "10.0.0.7", ["10.0.0.7"]),
        ],
    )
    def test_those_whose_host_is_in_their_certificate(self, sender: str, peer: str, hosts: list[str]) -> None:
        assert not self.answer(sender, peer, *hosts)

    @pytest.mark.parametrize(
        ("sender", "peer", "hosts"),
        [
            ("10.0.0.5:6766::2026-01-01::1", "10.0.0.6", ["10.0.0.6"]),  # a node that poses as another one
            ("10.0.0.5:6766::2026-01-01::1", "10.0.0.5", []),
            ("worker_fl_2026::1", "10.0.0.7", ["10.0.0.8"]),
            ("worker_fl_2026::1", "10.0.0.7", []),  # an operator's or a device's certificate
            ("", "10.0.0.7", []),
        ],
    )
    def test_nobody_else(self, sender: str, peer: str, hosts: list[str]) -> None:
        assert self.answer(sender, peer, *hosts) == f"{FOREIGN_CERTIFICATE} {sender} at {peer}"

    def test_one_certificate_for_all(self) -> None:
        sender, names = "10.0.0.5:6766::2026-01-01::1", frozenset({"mindsporefederated"})
        assert not self.answer(sender, "10.0.0.5", "MindSporeFederated", names=names)
        assert self.answer(sender, "10.0.0.5", "MindSporeFederated")
