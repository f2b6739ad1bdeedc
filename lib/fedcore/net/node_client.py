"""The client of the TCP channel between nodes: one connection per address, requests pipelined on it.

Rules kept here:

* Every request ends: with an answer, or with PeerTimeout, PeerUnreachable or PeerRefused.
* Replies come in any order and are matched by request_id.
* Nothing is sent twice. Whoever repeats a request whose connection was lost must have one that may be repeated.
* A reply that is too long or malformed closes the connection and fails what was under way on it.
* A node that cannot be reached is left alone for a while (``core.backoff.reconnect_delay``).

What a frame is, is in ``wire/node.py``; the other end is in ``node_listener.py``.

Source: MindSpore Federated 0.1, TCP protocol between nodes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from cryptography import x509
from twisted.application.service import Service
from twisted.internet import defer, error, protocol, task
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.endpoints import (
    HostnameEndpoint,
    TCP4ClientEndpoint,
    TCP6ClientEndpoint,
    wrapClientTLS,
)
from twisted.internet.interfaces import IHandshakeListener
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from fedcore.core.backoff import reconnect_delay
from fedcore.errors import PeerError
from fedcore.net.outbox import Outbox
from fedcore.net.tls import explain
from fedcore.wire.node import (
    MAX_DATA,
    Frame,
    FrameReader,
    MalformedFrame,
    Meta,
    NodeRole,
    PayloadKind,
    encode,
)

CONNECT_TIMEOUT_S = 3.0
IDLE_TIMEOUT_S = 60.0  # how long a connection is kept that nobody needs
STALL_TIMEOUT_S = 30.0  # for a node to take some of what it is sent


_TLS_REMEDY = "There was no TLS: enable_ssl and fedcore.node.tls must be the same on all nodes."


class PeerUnreachable(PeerError):
    """No connection to a node, or it was lost before the answer came.

    Attributes:
        refused: whether the node's host answers and nobody listens there.
    """

    wire_code = 300
    http_status = 503
    retry_after = 1.0

    def __init__(self, message: str, *, refused: bool = False, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.refused = refused


class PeerTimeout(PeerUnreachable):
    """A node did not answer in time; whether it did what it was asked is not known."""


class PeerRefused(PeerError):
    """A node answered with an error; ``args[0]`` is its text, as it came."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request of the client has brought.

    Attributes:
        data: read-only.
    """

    data: bytes | memoryview
    meta: Meta
    kind: PayloadKind = PayloadKind.RAW


class NodeClient(Service):
    """Asks other nodes; keeps one connection per address while it is in use."""

    log = Logger()

    def __init__(
        self,
        node_id: str,
        *,
        role: NodeRole = NodeRole.SERVER,
        max_data: int = MAX_DATA,
        jitter: Callable[[], float],
        reactor: Any,
        encrypt: Callable[[str], Any] | None = None,
        connect_timeout: float = CONNECT_TIMEOUT_S,
        idle_timeout: float = IDLE_TIMEOUT_S,
    ) -> None:
        """Prepare; nothing is connected before it is needed.

        Args:
            node_id: ours, told in every request.
            role: ours.
            max_data: bytes of data in the longest reply.
            jitter: gives 0..1, for the time between attempts to connect.
            reactor: for connections and time.
            encrypt: given the host of an address, makes the creator of TLS connections to it; None for plain TCP.
            connect_timeout: seconds.
            idle_timeout: seconds after which an unused connection is closed.
        """
        self.reactor = reactor
        self.max_data = max_data
        self.jitter = jitter
        self.encrypt = encrypt
        self.connect_timeout = connect_timeout
        self.idle_timeout = idle_timeout
        self._node_id = node_id
        self._role = role
        self._request_ids = count(1)
        self._links: dict[str, _Link] = {}
        self._works: set[defer.Deferred[Frame]] = set()

    async def request(
        self,
        address: str,
        recv_node: str,
        cmd: int,
        data: bytes | memoryview = b"",
        *,
        user_cmd: int = 0,
        iteration: int = 0,
        timeout: float,
        kind: PayloadKind = PayloadKind.RAW,
        patient: bool = False,
    ) -> Answer:
        """Send one request and wait for its reply.

        After a failed attempt to connect, requests to the address fail at once, with the same reason, until the time
        of ``core.backoff.reconnect_delay`` is over: an unreachable node costs the first caller the time-out, not all.

        Args:
            address: ``host:port``, an IPv6 host in brackets.
            recv_node: id of the node expected there, "" for any.
            cmd: see ``wire.node.Command``.
            data: not copied, must not change meanwhile; b"" becomes eight zero bytes.
            user_cmd: the round of a ROUND_REQUEST.
            iteration: number of the iteration that the request is about.
            timeout: seconds for all of it.
            kind: of the data.
            patient: try to connect again and again until the time is over, instead of failing with the first attempt.
                A request that has been sent is not repeated.

        Raises:
            PeerUnreachable: not connected, or the connection was lost before the reply came.
            PeerTimeout: no reply in time.
            PeerRefused: the reply is an error.
            LocalError: the request is longer than a frame may be.
        """
        if not self.running:
            raise _stopped(address)
        meta = Meta(
            cmd,
            next(self._request_ids),
            self._role,
            user_cmd,
            iteration,
            send_node=self._node_id,
            recv_node=recv_node,
        )
        reply = await self._in_time(address, self._ask(address, Frame(kind, meta, data), patient), timeout)
        if reply.meta.response_error:
            raise PeerRefused(reply.meta.response_error)
        return Answer(reply.data, reply.meta, reply.kind)

    def drop(self, unwanted: Callable[[x509.Certificate], bool]) -> None:
        """Close the connections to nodes whose certificate is not wanted any more."""
        for link in self._links.values():
            link.drop(unwanted)

    def forget(self, address: str) -> None:
        """Drop the connection to an address, what is under way on it, and the memory of failures."""
        link = self._links.pop(address, None)
        if link is not None:
            link.close()

    def stopService(self) -> defer.Deferred[Any]:
        """Fail what is under way and close all connections; fires when they are closed."""
        super().stopService()
        for work in list(self._works):
            work.cancel()
        links, self._links = self._links, {}
        return defer.DeferredList([link.close() for link in links.values()])

    async def _in_time(self, address: str, work: Any, timeout: float) -> Frame:
        """Give a coroutine so much time, and end it with the service."""

        def late(_: Any, seconds: float) -> None:
            raise PeerTimeout(f"node at {address} did not answer within {seconds:g} s")

        under_way: defer.Deferred[Frame] = defer.Deferred.fromCoroutine(work)
        self._works.add(under_way)
        under_way.addTimeout(timeout, self.reactor, late)
        try:
            return await under_way
        except defer.CancelledError:
            if self.running:
                raise
            raise _stopped(address) from None
        finally:
            self._works.discard(under_way)

    async def _ask(self, address: str, frame: Frame, patient: bool) -> Frame:
        while True:
            link = self._links.get(address)
            if link is None:
                link = self._links[address] = _Link(self, address)
            try:
                connection = await link.connection()
                break
            except PeerUnreachable:
                if not patient:
                    raise
            await task.deferLater(self.reactor, link.pause)
        return await connection.ask(frame)


class _Link:
    """How to reach one address: its connection, the attempt to make one, the failures so far."""

    def __init__(self, client: NodeClient, address: str) -> None:
        self.client = client
        self.address = address
        self._endpoint, self._creator = _endpoint(client, address)
        self._connection: _Asked | None = None
        self._attempt: defer.Deferred[Any] | None = None
        self._waiters: list[defer.Deferred[_Asked]] = []
        self._open: set[_Asked] = set()
        self._failures = 0
        self._next_attempt = float("-inf")
        self._fault = ("", False)

    @property
    def pause(self) -> float:
        """Seconds until the next attempt is allowed."""
        now: float = self.client.reactor.seconds()
        return max(0.0, self._next_attempt - now)

    async def connection(self) -> _Asked:
        """Return the connection; make one if there is none.

        Raises:
            PeerUnreachable: the attempt failed, or an earlier one did not long ago.
        """
        if self._connection is not None:
            return self._connection
        if self.pause > 0:
            raise self.unreachable(*self._fault)
        waiter: defer.Deferred[_Asked] = defer.Deferred()
        self._waiters.append(waiter)
        if self._attempt is None:
            self._connect()
        return await waiter

    def close(self) -> defer.Deferred[Any]:
        """Close everything; fires when it is closed."""
        if self._attempt is not None:
            self._attempt.cancel()
        connections = list(self._open)
        for connection in connections:
            connection.end("it was closed here")
        return defer.DeferredList([connection.gone for connection in connections])

    def drop(self, unwanted: Callable[[x509.Certificate], bool]) -> None:
        """Close the connections on which the node has shown a certificate that is not wanted any more."""
        for connection in list(self._open):
            if connection.certificate is not None and unwanted(connection.certificate):
                connection.end("its certificate is revoked", failed=True)

    def retire(self, connection: _Asked) -> None:
        """Begin no other request on a connection."""
        if self._connection is connection:
            self._connection = None

    def heard(self) -> None:
        """Take note that the node answers."""
        self._failures = 0

    def lost(self, connection: _Asked, reason: str, *, failed: bool) -> None:
        """Take note that a connection is over.

        Args:
            connection: which.
            reason: why.
            failed: whether the node has closed it without a word, which is as good as not reachable.
        """
        self.retire(connection)
        if failed:
            self._note_failure(reason, refused=False)

    def closed(self, connection: _Asked) -> None:
        """Take note that a connection is closed."""
        self._open.discard(connection)

    def explain(self, reason: Failure, shaken: bool) -> str:
        """Say why a connection is over, given whether a handshake of TLS was done."""
        if self._creator is None or shaken:
            return explain(reason.value) or reason.getErrorMessage()
        fault = explain(reason.value, getattr(self._creator, "refusal", ""))
        return fault or f"{reason.getErrorMessage()} {_TLS_REMEDY}"

    def unreachable(self, reason: str, refused: bool = False) -> PeerUnreachable:
        """Make the exception."""
        hint = "is it running, and is this its address?" if refused else ""
        return PeerUnreachable(
            f"node at {self.address} cannot be reached: {reason}", refused=refused, hint=hint
        )

    def _connect(self) -> None:
        factory: Any = protocol.Factory.forProtocol(lambda: _Asked(self))
        factory.noisy = False
        self._attempt = attempt = (
            self._endpoint.connect(factory) if self._endpoint else defer.fail(ValueError("no host:port"))
        )
        attempt.addCallbacks(self._connected, self._failed)

    def _connected(self, connection: _Asked) -> None:
        self._attempt = None
        self._connection = connection
        self._open.add(connection)
        self._release(lambda waiter: waiter.callback(connection))

    def _failed(self, failure: Failure) -> None:
        self._attempt = None
        refused = failure.check(error.ConnectionRefusedError) is not None
        self._note_failure(failure.getErrorMessage(), refused=refused)
        self._release(lambda waiter: waiter.errback(self.unreachable(*self._fault)))

    def _note_failure(self, reason: str, *, refused: bool) -> None:
        self._failures += 1
        self._fault = (reason, refused)
        delay = reconnect_delay(self._failures, self.client.jitter())
        self._next_attempt = self.client.reactor.seconds() + delay

    def _release(self, end: Callable[[defer.Deferred[_Asked]], None]) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.called:  # else its request has timed out
                end(waiter)


@implementer(IHandshakeListener)
class _Asked(protocol.Protocol):
    """A connection to another node.

    Attributes:
        usable: whether requests can be sent on it.
        gone: fires when it is closed.
    """

    transport: Any

    def __init__(self, link: _Link) -> None:
        self.usable = False
        self.gone: defer.Deferred[None] = defer.Deferred()
        self._link = link
        self._reader = FrameReader(link.client.max_data)
        self._outbox: Outbox
        self._pending: dict[int, defer.Deferred[Frame]] = {}
        self.certificate: x509.Certificate | None = None  # that the node has shown, verified
        self._shaken = False  # whether the handshake of TLS is done
        self._heard = False
        self._retired = False
        self._idle: Any = None

    def connectionMade(self) -> None:
        self.usable = True
        self.transport.setTcpNoDelay(True)
        self.transport.setTcpKeepAlive(True)
        reactor = self._link.client.reactor
        self._outbox = Outbox(self.transport, reactor, STALL_TIMEOUT_S, lambda: None, self._stalled)
        self._rest()

    def connectionLost(self, reason: Failure = protocol.connectionDone) -> None:
        self._end(self._link.explain(reason, self._shaken), failed=not self._heard)
        self._link.closed(self)
        self.gone.callback(None)

    def handshakeCompleted(self) -> None:
        """Know that both sides speak TLS, and who the node is."""
        self._shaken = True
        shown = self.transport.getPeerCertificate()
        self.certificate = None if shown is None else shown.to_cryptography()

    def dataReceived(self, data: bytes) -> None:
        self._reader.receive(data)
        try:
            while (frame := self._reader.next_frame()) is not None:
                self._take(frame)
        except MalformedFrame as fault:
            self._link.client.log.warn(
                "closed the connection to a node that sends no frames: {reason}",
                address=self._link.address,
                reason=str(fault),
            )
            self.end(str(fault), failed=not self._heard)

    def ask(self, frame: Frame) -> defer.Deferred[Frame]:
        """Send a request; the Deferred fires with the reply, or PeerUnreachable if the connection is lost."""
        if not self.usable:  # ended by whoever else waited for it
            return defer.fail(self._link.unreachable("the connection was lost"))
        parts = encode(frame)
        request_id = frame.meta.request_id
        reply: defer.Deferred[Frame] = defer.Deferred(lambda _: self._give_up(request_id))
        self._pending[request_id] = reply
        self._rest()
        self._outbox.send(parts)
        return reply

    def end(self, reason: str, *, failed: bool = False) -> None:
        """Close at once and fail what is under way."""
        self._end(reason, failed=failed)
        self.transport.abortConnection()

    def _take(self, frame: Frame) -> None:
        if not self._heard:
            self._heard = True
            self._link.heard()
        reply = self._pending.pop(frame.meta.request_id, None)
        if reply is not None:  # else its request has timed out
            self._rest()
            reply.callback(frame)

    def _give_up(self, request_id: int) -> None:
        """Forget a request that has timed out.

        The node may be gone without a word, so nothing else is sent here: the next request gets a connection of its
        own. Those that wait on this one may go on.
        """
        self._pending.pop(request_id, None)
        self._retired = True
        self._link.retire(self)
        self._rest()

    def _rest(self) -> None:
        """Look whether the connection is still needed."""
        if self._idle is not None and self._idle.active():
            self._idle.cancel()
        if not self.usable or self._pending:
            return
        if self._retired:
            self.end("a request timed out")
        else:
            client = self._link.client
            self._idle = client.reactor.callLater(client.idle_timeout, self.end, "it was idle")

    def _stalled(self) -> None:
        self.end("it does not read what it is sent", failed=not self._heard)

    def _end(self, reason: str, *, failed: bool) -> None:
        if not self.usable:
            return
        self.usable = False
        if self._idle is not None and self._idle.active():
            self._idle.cancel()
        self._outbox.close()
        self._link.lost(self, reason, failed=failed)
        pending, self._pending = self._pending, {}
        for reply in pending.values():
            if not reply.called:
                reply.errback(self._link.unreachable(reason))


def _stopped(address: str) -> PeerUnreachable:
    return PeerUnreachable(f"node at {address} is not asked: this node is stopping")


def _endpoint(client: NodeClient, address: str) -> tuple[Any, Any]:
    """Return how to connect to ``host:port``, None if the address is none, and what makes the TLS, None for none."""
    host, _, digits = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (host and re.fullmatch("[0-9]{1,5}", digits) and 0 < int(digits) < 65536):
        return None, None
    port, reactor, timeout = int(digits), client.reactor, client.connect_timeout
    endpoint: Any
    if isIPAddress(host):  # no need to ask the resolver, which uses threads
        endpoint = TCP4ClientEndpoint(reactor, host, port, timeout)
    elif isIPv6Address(host):
        endpoint = TCP6ClientEndpoint(reactor, host, port, timeout)
    else:
        endpoint = HostnameEndpoint(reactor, host, port, timeout)
    if client.encrypt is None:
        return endpoint, None
    creator = client.encrypt(host)
    return wrapClientTLS(creator, endpoint, reactor), creator
