"""The listener of the TCP channel between nodes: frames in, handlers, frames out.

A request is a frame; its reply is a frame on the same connection with the request's meta. Replies leave in the order in
which they are ready.

Rules kept here:

* A malformed frame closes the connection; no byte after it is looked at.
* A peer costs no more than its share: a connection has at most IN_FLIGHT requests, and about max_data bytes of them,
  under way. Beyond that, and while the peer does not read its replies, its requests are left unread.
* Neither a handshake, nor the rest of a frame, nor a peer that does not read is waited for longer than FRAME_TIMEOUT_S.
* Other than that a connection may be idle for ever: workers keep one open.
* With TLS a node is who its certificate says: a request is refused if the host in its sender's id, or where the id
  tells none (workers) the host that it comes from, is not in the certificate. Without TLS an id is only a word.

What the commands mean is for the handlers; what a frame is, for ``wire/node.py``; the other end is in
``node_client.py``.

Source: MindSpore Federated 0.1, TCP protocol between nodes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from twisted.internet import defer, protocol
from twisted.internet.interfaces import IAddress, IHandshakeListener, ISSLTransport
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from fedcore.core.node_id import host_of
from fedcore.errors import FedcoreError
from fedcore.net.outbox import Outbox
from fedcore.net.tls import explain
from fedcore.pki.chain import fits, names_of
from fedcore.wire.node import (
    MAX_DATA,
    Frame,
    FrameReader,
    MalformedFrame,
    Meta,
    PayloadKind,
    encode,
    reply_meta,
)

WRONG_NODE = "expect recv node"  # how the refusal of a request begins that is meant for another node
FOREIGN_CERTIFICATE = (
    "the certificate of this connection is not one of"  # how a refusal of a node's id begins
)
IN_FLIGHT = 16  # requests of one connection under way
FRAME_TIMEOUT_S = 30.0  # for a handshake, the rest of a frame, and a peer to take some of its replies
WARNING_INTERVAL_S = 10.0  # between two warnings about peers


@dataclass(frozen=True, slots=True)
class Request:
    """What a handler is given.

    Attributes:
        data: read-only, the handler's to keep.
        peer: host of the sender.
    """

    meta: Meta
    data: bytes | memoryview
    peer: str
    kind: PayloadKind = PayloadKind.RAW


@dataclass(frozen=True, slots=True)
class Reply:
    """What a handler gives back.

    Attributes:
        data: b"" for an empty acknowledgement. It is not copied and must not change before it has left.
    """

    data: bytes | memoryview = b""
    kind: PayloadKind = PayloadKind.RAW


Handler = Callable[[Request], Awaitable[Reply]]


class NodeListener(protocol.Factory):
    """Serves the requests of other nodes.

    Attributes:
        connections: the open ones, and those whose peer has gone while its requests were still being worked on.
    """

    log = Logger()
    noisy = False

    def __init__(
        self,
        node_id: str,
        handlers: Mapping[int, Handler],
        *,
        max_data: int = MAX_DATA,
        max_connections: int,
        allowed: Callable[[str], bool],
        reactor: Any,
        names_fit: Callable[[frozenset[str], str], bool] = fits,
    ) -> None:
        """Prepare to listen; for TLS, wrap the factory.

        Args:
            node_id: requests for another node are refused.
            handlers: command -> coroutine function. The text of a FedcoreError that it raises, without the hint,
                is the answer; any other exception is logged and answered with "inner error".
            max_data: bytes of data in the longest request.
            max_connections: more are closed at once.
            allowed: peer's host -> whether it may connect.
            reactor: for the time.
            names_fit: whether a certificate with these names, as ``names_of`` gives them, may be used by a host; only
                asked with TLS.
        """
        self.connections: set[_Served] = set()
        self._names_fit = names_fit
        self.reactor = reactor
        self.max_data = max_data
        self._node_id = node_id
        self._handlers = handlers
        self._max_connections = max_connections
        self._allowed = allowed
        self._stopping = False
        self._stopped: defer.Deferred[None] | None = None
        self._quiet_until = float("-inf")
        self._unsaid = 0

    def buildProtocol(self, addr: IAddress | None) -> protocol.Protocol:
        host = getattr(addr, "host", "")
        if not self._allowed(host):
            self.warn("a node that is not allowed", host, "fedcore.node.allow does not name it")
            return _TurnedAway()
        if self._stopping or len(self.connections) >= self._max_connections:
            return _TurnedAway()  # None would do on plain TCP; Twisted's TLS cannot take it
        return _Served(self, host)

    def stop(self, grace: float) -> defer.Deferred[None]:
        """Close every connection: idle ones at once, the others with their last reply or after the grace.

        Args:
            grace: seconds.

        Returns:
            A Deferred that fires when no connection is left and no handler works any more.
        """
        self._stopping = True
        stopped: defer.Deferred[None] = defer.Deferred()
        self._stopped = stopped
        abort = self.reactor.callLater(grace, self._abort_all)
        for connection in list(self.connections):
            connection.finish()
        self._rest()
        return stopped.addCallback(lambda _: abort.cancel() if abort.active() else None)

    def drop(self, unwanted: Callable[[x509.Certificate], bool]) -> None:
        """Close the connections of peers whose certificate is not wanted any more."""
        for connection in list(self.connections):
            if connection.certificate is not None and unwanted(connection.certificate):
                self.warn("a node", connection.peer, "its certificate is revoked")
                connection.abort()

    async def answer(
        self, request: Request, certificate: x509.Certificate | None = None
    ) -> tuple[bytes, memoryview]:
        """Have a request handled; return the reply's frame."""
        meta = request.meta
        if certificate is not None and not self._is_bearer(request, certificate):
            names = ", ".join(sorted(names_of(certificate))) or "no name"
            self.log.warn(
                "refused a request of {node}: its certificate is for {names}, and none of them is in "
                "fedcore.node.tls_names",
                node=meta.send_node,
                names=names,
                peer=request.peer,
            )
            return _error(meta, f"{FOREIGN_CERTIFICATE} {meta.send_node} at {request.peer}")
        if meta.recv_node not in ("", self._node_id):
            return _error(meta, f"{WRONG_NODE} {meta.recv_node} != actual node {self._node_id}")
        handler = self._handlers.get(meta.cmd)
        if handler is None:
            return _error(meta, f"The cmd {meta.cmd} is not supported!")
        try:
            reply = await handler(request)
            return encode(Frame(reply.kind, reply_meta(meta), reply.data))
        except FedcoreError as problem:
            return _error(meta, str(problem.args[0]))  # the protocol's text; the hint is for our own log
        except Exception:
            self.log.failure("a request of a node failed", cmd=meta.cmd)
            return _error(meta, "inner error")

    def _is_bearer(self, request: Request, certificate: x509.Certificate) -> bool:
        """Tell whether a certificate is one of the host in a node's id; workers' ids tell none: of where they are."""
        host = host_of(request.meta.send_node) or request.peer
        return self._names_fit(names_of(certificate), host)

    def warn(self, what: str, peer: str, reason: str) -> None:
        """Log a warning about a peer, not too often."""
        now = self.reactor.seconds()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        self._quiet_until = now + WARNING_INTERVAL_S
        self.log.warn(
            "closed the connection of {what}: {reason}",
            what=what,
            peer=peer,
            reason=reason,
            more_before=self._unsaid,
        )
        self._unsaid = 0

    def forget(self, connection: _Served) -> None:
        """Drop a connection that is over."""
        self.connections.discard(connection)
        self._rest()

    def _abort_all(self) -> None:
        for connection in list(self.connections):
            connection.abort()

    def _rest(self) -> None:
        if self._stopped is not None and not self.connections:
            stopped, self._stopped = self._stopped, None
            stopped.callback(None)


class _TurnedAway(protocol.Protocol):
    """A connection too many."""

    transport: Any

    def connectionMade(self) -> None:
        self.transport.abortConnection()


@implementer(IHandshakeListener)
class _Served(protocol.Protocol):
    """A connection that another node has opened."""

    transport: Any

    def __init__(self, listener: NodeListener, peer: str) -> None:
        self.peer = peer
        self.certificate: x509.Certificate | None = None  # that the peer has shown, verified
        self._listener = listener
        self._reader = FrameReader(listener.max_data)
        self._outbox: Outbox
        self._requests = 0  # under way
        self._bytes = 0  # of their data
        self._reading = True
        self._starting = False
        self._finishing = False
        self._gone = False
        self._shaken = False  # whether the handshake of TLS is done
        self._late: Any = None

    def connectionMade(self) -> None:
        self._listener.connections.add(self)
        self.transport.setTcpNoDelay(True)
        self.transport.setTcpKeepAlive(True)
        self._outbox = Outbox(
            self.transport, self._listener.reactor, FRAME_TIMEOUT_S, self._go_on, self._stalled
        )
        if ISSLTransport.providedBy(self.transport):
            self._late = self._listener.reactor.callLater(FRAME_TIMEOUT_S, self._frame_is_late)

    def handshakeCompleted(self) -> None:
        """Know that the peer speaks TLS, and who it is; from now on it may be idle."""
        self._shaken = True
        shown = self.transport.getPeerCertificate()
        self.certificate = None if shown is None else shown.to_cryptography()
        self._stop_waiting()

    def connectionLost(self, reason: Failure = protocol.connectionDone) -> None:
        self._gone = True
        self._outbox.close()
        self._stop_waiting()
        fault = "" if self._shaken else explain(reason.value)
        if fault:
            self._listener.warn("a node without a good handshake", self.peer, fault)
        self._leave()

    def dataReceived(self, data: bytes) -> None:
        self._reader.receive(data)
        self._go_on()

    def finish(self) -> None:
        """Close once the requests under way are answered; begin no other."""
        self._finishing = True
        self._go_on()

    def abort(self) -> None:
        """Close at once."""
        self._finishing = True
        if not self._gone:
            self.transport.abortConnection()

    # ---- requests

    @property
    def _busy(self) -> bool:
        """Whether there is enough to do already."""
        full = self._requests >= IN_FLIGHT or self._bytes >= self._listener.max_data
        return full or self._outbox.blocked

    def _go_on(self) -> None:
        """Begin requests while there is room, then see what to wait for."""
        if self._starting or self._gone:
            return  # a reply that was there at once: the loop below is still running
        self._starting = True
        try:
            begun = self._begin_requests()
        except MalformedFrame as fault:
            self._listener.warn("a node that sends no frames", self.peer, str(fault))
            self.abort()
            return
        finally:
            self._starting = False
        if self._finishing:
            self._finish()
        else:
            self._wait(begun)

    def _begin_requests(self) -> int:
        """Begin requests while there is room; return how many."""
        begun = 0
        while not (self._busy or self._finishing or self._gone):
            frame = self._reader.next_frame()
            if frame is None:
                break
            begun += 1
            self._begin(frame)
        return begun

    def _begin(self, frame: Frame) -> None:
        self._requests += 1
        self._bytes += len(frame.data)
        defer.Deferred.fromCoroutine(self._serve(frame)).addErrback(self._failed)

    async def _serve(self, frame: Frame) -> None:
        try:
            request = Request(frame.meta, frame.data, self.peer, frame.kind)
            parts = await self._listener.answer(request, self.certificate)
        finally:
            self._requests -= 1
            self._bytes -= len(frame.data)
        if self._gone:
            self._leave()
            return
        self._outbox.send(parts)
        self._go_on()

    def _failed(self, failure: Failure) -> None:
        self._listener.log.failure("a connection of a node failed", failure)
        self.abort()
        self._leave()

    # ---- waiting

    def _wait(self, begun: int) -> None:
        """Read on or leave the rest unread; let a frame that has begun not take forever."""
        reading = not self._busy
        if reading != self._reading:
            self._reading = reading
            self.transport.resumeProducing() if reading else self.transport.pauseProducing()
        if begun or not (reading and self._reader.incomplete):
            self._stop_waiting()
        if reading and self._reader.incomplete and self._late is None:
            self._late = self._listener.reactor.callLater(FRAME_TIMEOUT_S, self._frame_is_late)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            if self._late.active():
                self._late.cancel()
            self._late = None

    def _frame_is_late(self) -> None:
        self._listener.warn("a slow node", self.peer, "what it had begun did not arrive in time")
        self.abort()

    def _stalled(self) -> None:
        self._listener.warn("a node that does not read", self.peer, "it takes no replies")
        self.abort()

    def _finish(self) -> None:
        self._stop_waiting()
        if not self._requests and self._outbox.empty:
            if not self._reading:  # TLS has to hear that the peer closes too
                self._reading = True
                self.transport.resumeProducing()
            self.transport.unregisterProducer()
            self.transport.loseConnection()

    def _leave(self) -> None:
        if self._gone and not self._requests:
            self._listener.forget(self)


def _error(meta: Meta, text: str) -> tuple[bytes, memoryview]:
    return encode(Frame(PayloadKind.RAW, reply_meta(meta, text), b""))
