"""Listener and client between nodes on real sockets, plain and with TLS."""

from __future__ import annotations

import datetime
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from integration.redis_fixture import DEADLINE_S, ReactorThread
from OpenSSL import crypto
from twisted.internet import defer, ssl
from twisted.protocols.tls import TLSMemoryBIOFactory

from fedcore.net.node_client import Answer, NodeClient, PeerRefused, PeerTimeout, PeerUnreachable
from fedcore.net.node_listener import NodeListener, Reply, Request
from fedcore.pki.authority import Role, issue, make_authority
from fedcore.wire.node import EMPTY, HEAD, Command
from fedctl.processes import HOST, reserved_ports

NODE = "server-0"
MAX_DATA = 8 << 20
PIECE = bytes(range(256)) * (4 << 12)  # 4 MiB
ECHO, HANG, PARTIAL = Command.ROUND_REQUEST, Command.SEAL_PARTIAL, Command.READ_PARTIAL


class Certified:
    """A certificate for HOST, and the authority that has signed it and no other."""

    def __init__(self) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self._authority = make_authority("test", now)
        made = issue(self._authority, Role.SERVER, "test", now, hosts=[HOST])
        self.listening = ssl.CertificateOptions(
            privateKey=crypto.PKey.from_cryptography_key(made.key),
            certificate=crypto.X509.from_cryptography(made.certificate),
        )

    @property
    def connecting(self) -> Any:
        """What a client needs that trusts this authority and no other."""
        root = ssl.Certificate.loadPEM(self._authority.certificate_pem())
        return ssl.optionsForClientTLS(HOST, trustRoot=root)


class Nodes:
    """One node that listens and one that asks, on the reactor of the process."""

    def __init__(self, loop: ReactorThread, port: int, certified: Certified | None) -> None:
        self.loop = loop
        self.port = port
        self.address = f"{HOST}:{port}"
        self.hung: list[defer.Deferred[None]] = []
        self._certified = certified
        self._clients: list[NodeClient] = []
        self.client = self.new_client(certified.connecting if certified else None)
        self._listening: Any = None
        self.listener: NodeListener

    def new_client(self, creator: Any) -> NodeClient:
        client = NodeClient(
            "me",
            max_data=MAX_DATA,
            jitter=lambda: 0.0,
            reactor=self.loop.reactor,
            encrypt=None if creator is None else lambda host: creator,
        )
        self.loop.call(client.startService)
        self._clients.append(client)
        return client

    def start(self) -> None:
        self.listener = listener = NodeListener(
            NODE,
            {ECHO: self._echo, HANG: self._hang, PARTIAL: self._partial},
            max_data=MAX_DATA,
            max_connections=10,
            allowed=lambda host: host == HOST,
            reactor=self.loop.reactor,
        )
        factory: Any = listener
        if self._certified is not None:
            factory = TLSMemoryBIOFactory(self._certified.listening, False, listener)
        self._listening = self.loop.call(
            lambda: self.loop.reactor.listenTCP(self.port, factory, interface=HOST)
        )

    def stop(self) -> None:
        """Stop listening and close all connections."""

        async def stop() -> None:
            await self._listening.stopListening()
            for turn in self.hung:
                if not turn.called:
                    turn.callback(None)
            await self.listener.stop(1.0)

        if self._listening is not None:
            self.loop.run(stop())
        self._listening = None

    def ask(self, cmd: int = ECHO, data: bytes = b"x", *, timeout: float = DEADLINE_S, **more: Any) -> Answer:
        """Send one request and wait."""
        return self.loop.run(self.client.request(self.address, NODE, cmd, data, timeout=timeout, **more))

    def end(self) -> None:
        self.stop()
        for client in self._clients:
            self.loop.call(client.stopService)

    async def _echo(self, request: Request) -> Reply:
        return Reply(request.data)

    async def _hang(self, request: Request) -> Reply:
        turn: defer.Deferred[None] = defer.Deferred()
        self.hung.append(turn)
        await turn
        return Reply()

    async def _partial(self, request: Request) -> Reply:
        return Reply(PIECE)


@pytest.fixture(params=["tcp", "tls"])
def nodes(request: pytest.FixtureRequest, loop: ReactorThread) -> Iterator[Nodes]:
    certified = Certified() if request.param == "tls" else None
    with reserved_ports(1) as (port,):
        nodes = Nodes(loop, port, certified)
        nodes.start()
        try:
            yield nodes
        finally:
            nodes.end()


def test_a_request_and_its_answer(nodes: Nodes) -> None:
    assert nodes.ask(data=b"hello").data == b"hello"
    assert nodes.ask(data=b"").data == EMPTY
    with pytest.raises(PeerRefused, match=r"The cmd 8 is not supported!"):
        nodes.ask(Command.SERVER_PULL_WEIGHT)


def test_pieces_of_4_mib_both_ways(nodes: Nodes) -> None:
    async def all_at_once() -> list[Answer]:
        asks = [
            nodes.client.request(nodes.address, NODE, cmd, PIECE, timeout=DEADLINE_S)
            for cmd in (ECHO, PARTIAL) * 4
        ]
        return [result for _, result in await defer.DeferredList(map(defer.Deferred.fromCoroutine, asks))]  # type: ignore[misc]

    answers = nodes.loop.run(all_at_once())
    assert [answer.data == PIECE for answer in answers] == [True] * 8


def test_a_short_answer_overtakes_a_long_wait(nodes: Nodes) -> None:
    async def both() -> Answer:
        waiting = defer.Deferred.fromCoroutine(
            nodes.client.request(nodes.address, NODE, HANG, timeout=DEADLINE_S)
        )
        answer = await nodes.client.request(nodes.address, NODE, ECHO, b"quick", timeout=DEADLINE_S)
        assert not waiting.called
        nodes.hung[0].callback(None)
        await waiting
        return answer

    assert nodes.loop.run(both()).data == b"quick"
    assert len(nodes.listener.connections) == 1


def test_no_answer_in_time(nodes: Nodes) -> None:
    with pytest.raises(PeerTimeout):
        nodes.ask(HANG, timeout=0.5)
    assert nodes.ask(data=b"next").data == b"next"


def test_nobody_listens_and_then_somebody_does(nodes: Nodes) -> None:
    assert nodes.ask()
    nodes.stop()
    with pytest.raises(PeerUnreachable) as caught:
        nodes.ask()
    assert caught.value.refused
    nodes.start()
    assert nodes.ask(data=b"back", patient=True).data == b"back"


def test_a_malformed_frame_closes_the_connection(nodes: Nodes) -> None:
    with socket.create_connection((HOST, nodes.port), timeout=DEADLINE_S) as stranger:
        stranger.sendall(HEAD.pack(9, 1, 2) + bytes(100))
        assert until_the_end(stranger) is not None
    assert nodes.ask(data=b"unharmed").data == b"unharmed"


def test_a_listener_that_speaks_something_else(loop: ReactorThread) -> None:
    with reserved_ports(1) as (port,), socket.create_server((HOST, port)) as other:
        other.settimeout(DEADLINE_S)
        nodes = Nodes(loop, port, None)

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(1)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                until_the_end(connection)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with pytest.raises(PeerUnreachable, match="unknown kind"):
                nodes.ask()
        finally:
            nodes.end()
            thread.join(DEADLINE_S)


def test_a_node_with_another_certificate_is_not_asked(loop: ReactorThread) -> None:
    with reserved_ports(1) as (port,):
        nodes = Nodes(loop, port, Certified())
        nodes.start()
        nodes.client = nodes.new_client(Certified().connecting)
        try:
            with pytest.raises(PeerUnreachable, match="certificate verify failed") as caught:
                nodes.ask(HANG)
            assert not caught.value.refused and not nodes.hung
        finally:
            nodes.end()


def until_the_end(connection: socket.socket) -> bytes:
    """Read until the other side closes."""
    received = b""
    try:
        while data := connection.recv(1 << 16):
            received += data
    except ConnectionError:
        pass
    return received
