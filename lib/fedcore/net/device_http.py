"""The devices' HTTP listener: a thin protocol over a well-kept C parser.

One connection serves one request at a time. The body goes straight into a sink that the route chose after it has judged
the announced length, so no length that a device names makes the server allocate or read more than the route allows.
What arrives behind a request waits unread but for some MAX_HEAD bytes, and no request is looked at before the answer to
the one before it has left: what a connection can hold in memory is bounded whatever its peer does.

A refused peer may still be sending. Closing on it would destroy the answer on its way, so the listener says that
it is done and for a while reads and forgets what comes.

Every state of a connection has a deadline; the site looks at all of them once a second.

When there are as many connections as there may be, a new one takes the place of one that waits for a request, and of a
party that has more than the newcomer's also one that is sending: whoever opens many and is slow keeps nobody out.
What is refused is counted by its reason, see ``Refused``.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Coroutine, Mapping
from email.utils import formatdate
from enum import Enum
from operator import itemgetter
from types import MappingProxyType
from typing import Any

from twisted.internet import defer, protocol, task, tcp
from twisted.internet.interfaces import IAddress, IPushProducer
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from fedcore.errors import BodyTooLarge, PeerError
from fedcore.net.direct_io import DirectIO, unacknowledged
from fedcore.net.http_head import ChunkedBody, HeadFault, RequestHead, parse_head
from fedcore.net.parties import Allowance, Headcount, party_of
from fedcore.net.routes import Limits, Pages, Refused, Response, Route, Sink, text_response

MAX_HEAD = 16_384  # bytes; nginx, Apache and Node.js allow 8 to 16 KiB
WRITE_SIZE = 16_384  # bytes handed to the transport at a time, which copies them; a record of TLS
LINGER_S = 30.0  # as nginx: how long a refused peer may go on sending
LINGER_BYTES = 64 << 20  # and how much
GRACE_S = 1.0  # that every connection has at each step, however many want its place
SWEEP_S = 1.0  # how often deadlines are looked at, and so their precision
_HEAD_END = b"\r\n\r\n"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_WASTE = memoryview(bytearray(1 << 16))  # where bytes go that nobody wants


class Stage(Enum):
    """What a connection is waiting for."""

    IDLE = 1  # the first byte of a request
    HEAD = 2  # the rest of a request head
    ROOM = 3  # a sink
    BODY = 4  # the rest of a body
    ANSWER = 5  # the route's answer
    SEND = 6  # the peer to take the answer
    TURN = 7  # its turn: a request has arrived behind another
    LINGER = 8  # a refused peer to stop sending
    CLOSED = 9  # the transport to be gone


_WAITING = frozenset((Stage.IDLE, Stage.HEAD))
_SLOW = frozenset((Stage.BODY, Stage.SEND, Stage.LINGER))  # at the pace of the peer


@implementer(IPushProducer)
class DeviceProtocol(protocol.Protocol):
    """One connection of a device."""

    log = Logger()
    transport: Any

    def __init__(self, site: DeviceSite, party: str) -> None:
        self.site = site
        self.party = party
        self._direct: DirectIO | None = None  # the socket of a plain connection; there is none with TLS
        self._stage = Stage.IDLE
        self._deadline = float("inf")
        self._entered = 0.0  # when the stage began
        self._pending = b""  # received, not looked at
        self._reading = True
        self._works = 0  # coroutines under way
        self._gone = False

        self._head: RequestHead | None = None
        self._route: Route | None = None
        self._limit = 0  # bytes of the longest body there
        self._sink: Sink | None = None
        self._chunks: ChunkedBody | None = None
        self._received = 0  # bytes of the body

        self._unsent: list[bytes | memoryview] = []
        self._sent = 0  # bytes of the answer that the transport has taken
        self._blocked = False  # whether the transport has too much left to write
        self._keep_alive = False  # after this answer
        self._unread = False  # whether the peer may still be sending what it was refused

        self._checked = 0  # bytes moved at the last look at the rate
        self._waste_left = LINGER_BYTES

    # ---- Twisted's side

    def connectionMade(self) -> None:
        self.site.enter(self)
        self._enter(Stage.IDLE, self.site.limits.header_timeout)
        self.transport.setTcpNoDelay(True)
        self.transport.registerProducer(self, True)
        if type(self.transport) is tcp.Server:
            self._direct = DirectIO(self.transport, self)

    def connectionLost(self, reason: Failure = protocol.connectionDone) -> None:
        self._enter(Stage.CLOSED, None)
        self._drop_sink()
        self._unsent, self._pending = [], b""
        if self._direct is not None:
            self._direct.release()
        self._gone = True
        self._leave()

    def dataReceived(self, data: bytes) -> None:
        match self._stage:
            case Stage.IDLE | Stage.HEAD:
                self._pending = self._pending + data if self._pending else data
                self._take_head()
            case Stage.BODY:
                self._take_body(data) if self._chunks is None else self._take_chunks(self._chunks, data)
            case Stage.LINGER:
                self.filled(len(data))
            case Stage.ROOM | Stage.ANSWER | Stage.SEND | Stage.TURN:
                self._pending += data
                if len(self._pending) > MAX_HEAD:
                    self._read(False)

    def room(self) -> memoryview | None:
        """Return where the bytes belong that come next (DirectIO)."""
        if self._stage is Stage.BODY and self._chunks is None:
            assert self._sink is not None and self._head is not None
            return self._sink.buffer[self._received : self._head.length]
        return _WASTE if self._stage is Stage.LINGER else None

    def filled(self, count: int) -> None:
        """Go on after bytes have arrived where they belong (DirectIO)."""
        if self._stage is Stage.LINGER:
            self._waste_left -= count
            if self._waste_left < 0:
                self.abort()
            return
        assert self._head is not None
        self._received += count
        if self._received == self._head.length:
            self._body_complete()

    def pauseProducing(self) -> None:
        """Write no more for now."""
        self._blocked = True

    def resumeProducing(self) -> None:
        """Go on writing."""
        self._blocked = False
        if self._stage is Stage.SEND:
            self._send()

    def stopProducing(self) -> None:
        """Stop writing: the connection is gone."""

    # ---- head

    def _take_head(self) -> None:
        data = self._pending
        if data[0] in b"\r\n":
            data = data.lstrip(b"\r\n")  # RFC 9112 2.2: empty lines before a request are no fault
        end = data.find(_HEAD_END) + len(_HEAD_END)
        complete = end >= len(_HEAD_END)
        if (end if complete else len(data)) > MAX_HEAD:
            self.site.refused(Refused.LONG_HEAD)
            self._refuse(text_response(431, "The request head is too long."))
        elif complete:
            self._pending = data[end:]
            self._begin(parse_head(data[:end]))
        else:
            self._pending = data
            self._read(True)
            if self._stage is Stage.IDLE:
                self._enter(Stage.HEAD, self.site.limits.header_timeout)

    def _begin(self, head: RequestHead | HeadFault) -> None:
        """Judge a head."""
        if isinstance(head, HeadFault):
            self.site.refused(Refused.BAD_HEAD)
            self._refuse(text_response(head.status, head.text))
            return
        self._head = head
        if not self.site.allowance.take(self.party, self.site.clock()):
            self.site.refused(Refused.RATE)
            self._answer_unread(self.site.pages.too_many())
            return
        route = self.site.route(head.path, self.transport.getPeer().host)
        if route is None:
            self._answer_unread(self.site.pages.not_found())
        elif not head.chunked and head.length == 0:
            self._answer(self.site.pages.empty_body())
        else:
            self._find_room(route, head)

    def _find_room(self, route: Route, head: RequestHead) -> None:
        self._route = route
        try:
            self._limit = limit = route.limit()
            if head.length > limit:
                self.site.refused(Refused.LARGE_BODY)
                raise _too_large(route, f"{head.length} bytes", limit)
            sink = route.sink(limit if head.chunked else head.length)
        except Exception as error:
            self._answer_unread(self.site.pages.error(error))
            return
        if isinstance(sink, defer.Deferred):
            self._enter(Stage.ROOM, None)
            self._run(self._wait_for_room(route, sink))
        else:
            self._receive_into(sink)

    async def _wait_for_room(self, route: Route, room: defer.Deferred[Sink]) -> None:
        try:
            sink = await room
        except Exception as error:
            self._answer_unread(self.site.pages.error(error))
            return
        await self.site.next_turn()  # else requests that wait for each other's room would nest without an end
        if self._stage is Stage.CLOSED:
            route.discard(sink)
        else:
            self._receive_into(sink)

    # ---- body

    def _receive_into(self, sink: Sink) -> None:
        assert self._head is not None
        self._sink = sink
        self._chunks = ChunkedBody(sink.buffer, self._limit) if self._head.chunked else None
        self._received = self._checked = 0
        self._enter(Stage.BODY, self.site.limits.body_timeout)
        if self._pending:
            data, self._pending = self._pending, b""
            self.dataReceived(data)
        elif self._head.expects_continue:
            self.transport.write(_CONTINUE)
        if self._stage is Stage.BODY:
            self._read(True)

    def _take_body(self, data: bytes) -> None:
        assert self._sink is not None and self._head is not None
        end = min(self._received + len(data), self._head.length)
        count = end - self._received
        if count < len(data):
            data, self._pending = data[:count], data[count:]
        self._sink.buffer[self._received : end] = data
        self.filled(count)

    def _take_chunks(self, chunks: ChunkedBody, data: bytes) -> None:
        assert self._route is not None
        try:
            chunks.feed(data)
        except PeerError as error:
            self._drop_sink()
            self.site.refused(Refused.LARGE_BODY if chunks.overflow else Refused.BAD_CHUNKS)
            if chunks.overflow:
                self._refuse(self.site.pages.error(_too_large(self._route, "chunks", self._limit)))
            else:
                self._refuse(text_response(400, str(error)))
            return
        self._received = chunks.length
        if not chunks.complete:
            return
        if self._received:
            self._body_complete()
        else:
            self._drop_sink()
            self._answer(self.site.pages.empty_body())

    def _body_complete(self) -> None:
        assert self._sink is not None and self._route is not None
        sink, self._sink = self._sink, None
        sink.length = self._received
        self._enter(Stage.ANSWER, None)
        self._run(self._handle(self._route, sink))

    def _drop_sink(self) -> None:
        if self._sink is not None and self._route is not None:
            self._route.discard(self._sink)
        self._sink = None

    # ---- answer

    async def _handle(self, route: Route, sink: Sink) -> None:
        try:
            response = await route.handle(sink)
        except Exception as error:
            response = self.site.pages.error(error)
        self._answer(response)

    def _answer_unread(self, response: Response) -> None:
        """Answer before the body is read; if there is one, the connection cannot be used again."""
        assert self._head is not None
        self._answer(response, unread=self._head.chunked or self._head.length > 0)

    def _refuse(self, response: Response) -> None:
        """Answer a peer with whom one cannot go on."""
        self._answer(response, unread=True)

    def _answer(self, response: Response, *, unread: bool = False) -> None:
        if self._stage is Stage.CLOSED:
            return
        head, self._head = self._head, None
        self._unread = unread or (head is not None and head.chunked)
        self._keep_alive = head is not None and head.keep_alive and not (self._unread or self.site.stopping)
        self._unsent = [response.head(self.site.date, self._keep_alive)]
        if head is None or head.method != b"HEAD":
            self._unsent += response.parts
        self._sent = 0
        self._enter(Stage.SEND, self.site.limits.body_timeout)
        self._send()
        if self._stage is Stage.SEND:
            self._checked = self._taken

    def _send(self) -> None:
        """Write what the transport takes; when all has left, go on."""
        while self._unsent and not self._blocked:
            if self._direct is not None:
                self._skip(self._direct.send(self._unsent))
            if self._unsent:
                piece = self._unsent[0][:WRITE_SIZE]
                self.transport.write(bytes(piece))
                self._skip(len(piece))
        if not (self._unsent or self._blocked):
            self._answered()

    def _skip(self, count: int) -> None:
        """Forget so many unsent bytes."""
        self._sent += count
        while self._unsent and count >= len(self._unsent[0]):
            count -= len(self._unsent.pop(0))
        if count:
            self._unsent[0] = memoryview(self._unsent[0])[count:]

    def _answered(self) -> None:
        if self._keep_alive and not self.site.stopping:
            if self._pending:
                self._enter(Stage.TURN, None)  # one request a turn, so that nobody can hold the reactor
                self.site.next_turn().addCallback(self._next_request).addErrback(self._failed)
            else:
                self._sent = 0
                self._enter(Stage.IDLE, self.site.limits.idle_timeout)
                self._read(True)
        elif self._unread or self._pending:
            self._linger()
        else:
            self.close()

    @property
    def _taken(self) -> int:
        """Bytes of the answer that the peer's side has taken, less what it had left to take before."""
        return self._sent - unacknowledged(self.transport)

    def _next_request(self, _: None) -> None:
        if self._stage is Stage.TURN:
            self._enter(Stage.IDLE, self.site.limits.idle_timeout)
            self._take_head()

    # ---- end

    def _linger(self) -> None:
        """Tell the peer that all is said, and hear it out."""
        self._enter(Stage.LINGER, LINGER_S)
        self._pending = b""
        self._read(True)
        self.transport.unregisterProducer()
        if self._direct is not None:
            self.transport.loseWriteConnection()
        else:
            self.transport.loseConnection()  # TLS says that it ends, and reads on until the peer says so too

    def close(self) -> None:
        """Close once everything written has been read."""
        self._enter(Stage.CLOSED, self.site.limits.body_timeout)
        self._checked = self._taken
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def abort(self) -> None:
        """Close at once."""
        self._enter(Stage.CLOSED, None)
        self._drop_sink()
        if not self._gone:
            self.transport.abortConnection()

    def _leave(self) -> None:
        """Leave the site once the peer is gone and nothing is done for it any more."""
        if self._gone and not self._works:
            self.site.forget(self)

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return self._stage is Stage.IDLE

    def may_go(self, now: float) -> int:
        """Tell how well this connection can make room for another one: 0 not at all, 1 if need be, 2 easily."""
        if now - self._entered < GRACE_S:
            return 0
        return 2 if self._stage in _WAITING else int(self._stage in _SLOW)

    @property
    def entered(self) -> float:
        """When its present stage began, monotonic seconds."""
        return self._entered

    @property
    def under_way(self) -> bool:
        """Whether a request is, or an answer that the peer's side has not taken yet.

        A peer that takes its time to agree to the end of a connection, as it may with TLS, waits for nothing.
        """
        if self._works or self._stage not in (Stage.IDLE, Stage.CLOSED):
            return True
        return self._stage is Stage.CLOSED and self._sent > 0 and not self._gone and self._sent > self._taken

    # ---- time

    def _enter(self, stage: Stage, seconds: float | None) -> None:
        """Go to a stage; ``seconds`` is how long it may last, None if somebody else sees to it."""
        self._stage = stage
        self._entered = now = self.site.clock()
        self._deadline = float("inf") if seconds is None else now + seconds

    def check_deadline(self, now: float) -> None:
        """End a stage that lasted too long."""
        if now < self._deadline:
            return
        match self._stage:
            case Stage.IDLE:
                self.close()
            case Stage.HEAD:
                self.site.refused(Refused.SLOW_HEAD)
                self._refuse(text_response(408, "The request head did not arrive in time."))
            case Stage.BODY:
                if not self._fast_enough(self._received):
                    self._drop_sink()
                    self.site.refused(Refused.SLOW_BODY)
                    self._refuse(text_response(408, "The request body arrives too slowly."))
            case Stage.SEND | Stage.CLOSED:
                if not self._fast_enough(self._taken):
                    if self._stage is Stage.SEND:
                        self.site.refused(Refused.SLOW_READER)
                    self.abort()
            case _:
                self.abort()

    def _fast_enough(self, moved: int) -> bool:
        """Tell whether enough of a body has moved since the last look, and let it go on if so."""
        limits = self.site.limits
        enough = moved - self._checked >= max(1, limits.min_body_rate * limits.body_timeout)
        if enough:
            self._checked = moved
            self._enter(self._stage, limits.body_timeout)
        return enough

    # ---- helpers

    def _read(self, wanted: bool) -> None:
        """Read from the socket or leave it unread."""
        if wanted != self._reading:
            self._reading = wanted
            self.transport.resumeProducing() if wanted else self.transport.pauseProducing()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._works += 1
        defer.Deferred.fromCoroutine(work).addBoth(self._ended)

    def _ended(self, result: Any) -> None:
        self._works -= 1
        if isinstance(result, Failure):
            self._failed(result)
        self._leave()

    def _failed(self, failure: Failure) -> None:
        self.log.failure("a device connection failed", failure)
        self.abort()


class _TurnedAway(protocol.Protocol):
    """A connection too many."""

    transport: Any

    def connectionMade(self) -> None:
        self.transport.abortConnection()


def _too_large(route: Route, size: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"a body of {size} is too large for {route.name}: the limit is {limit} bytes")


class DeviceSite(protocol.Factory):
    """The listener: its routes, limits and open connections.

    Attributes:
        connections: the open ones, and those whose device has gone while its request was still being worked on.
        clock: the reactor's, seconds.
        date: the Date header of now.
        stopping: True makes every connection close with its answer.
    """

    log = Logger()
    noisy = False

    def __init__(
        self,
        routes: Mapping[bytes, Route],
        pages: Pages,
        limits: Limits,
        max_connections: int,
        reactor: Any,
        *,
        private: Mapping[bytes, Route] = MappingProxyType({}),
        insiders: Container[str] = (),
        refused: Callable[[Refused], None] = lambda reason: None,
    ) -> None:
        """Serve ``routes`` (path -> route), ``private`` ones to ``insiders``, to at most so many at a time.

        ``refused`` is told of each connection or request that is turned away or cut off.
        """
        self._routes = routes
        self._private = private
        self._insiders = insiders
        self.pages = pages
        self.limits = limits
        self.connections: set[DeviceProtocol] = set()
        self.refused = refused
        self.allowance = Allowance(limits.request_rate, limits.request_burst)
        self._headcount = Headcount(limits.connections_per_address)
        self._victims: list[DeviceProtocol] = []  # who may have to make room, the first one last
        self._victims_until = float("-inf")
        self.clock = reactor.seconds
        self.date = b""
        self.stopping = False
        self._max_connections = max_connections
        self._reactor = reactor
        self._listening = False
        self._sweeper = task.LoopingCall(self._sweep)
        self._sweeper.clock = reactor

    def startFactory(self) -> None:
        self._listening = True
        if not self._sweeper.running:
            self._sweeper.start(SWEEP_S)

    def stopFactory(self) -> None:
        self._listening = False
        self._rest()

    def buildProtocol(self, addr: IAddress | None) -> protocol.Protocol:
        party = party_of(getattr(addr, "host", ""))
        if self.stopping:
            return _TurnedAway()  # None would do on plain TCP; Twisted's TLS cannot take it
        if self._headcount.full(party):
            self.refused(Refused.PARTY_FULL)
            return _TurnedAway()
        if len(self.connections) >= self._max_connections and not self._make_room(party):
            self.refused(Refused.FULL)
            return _TurnedAway()
        return DeviceProtocol(self, party)

    def enter(self, connection: DeviceProtocol) -> None:
        """Count a connection that is made."""
        self.connections.add(connection)
        self._headcount.enter(connection.party)

    def _make_room(self, party: str) -> bool:
        """Cut off a connection in favour of a newcomer's; False if none has to make room for it.

        Those that wait go first, then those of the party that has most. Who they are is looked up once a second only,
        so that a flood of newcomers costs no more than that.
        """
        now = self.clock()
        if not self._victims and now >= self._victims_until:
            self._victims_until = now + SWEEP_S
            ranked = [
                (each.may_go(now), self._headcount[each.party], -each.entered) for each in self.connections
            ]
            order = sorted(zip(ranked, self.connections, strict=True), key=itemgetter(0))
            self._victims = [each for rank, each in order if rank[0]]
        while self._victims:
            victim = self._victims.pop()
            ease = victim.may_go(now)
            if ease == 2 or (ease and self._headcount[victim.party] > self._headcount[party] + 1):
                self.refused(Refused.MADE_ROOM)
                victim.abort()
                return True
        return False

    def route(self, path: bytes, host: str) -> Route | None:
        """Return what answers a path to a host; None if there is nothing for it."""
        route = self._routes.get(path)
        if route is None and path in self._private and host in self._insiders:
            return self._private[path]
        return route

    def forget(self, connection: DeviceProtocol) -> None:
        """Drop a connection that is over."""
        if connection in self.connections:
            self.connections.remove(connection)
            self._headcount.leave(connection.party)
        self._rest()

    def next_turn(self) -> defer.Deferred[None]:
        """Return a Deferred that fires in the next turn of the reactor."""
        turn: defer.Deferred[None] = defer.Deferred()
        self._reactor.callLater(0, turn.callback, None)
        return turn

    @property
    def under_way(self) -> bool:
        """Whether any request is, or an answer to one."""
        return any(connection.under_way for connection in self.connections)

    def stop(self) -> None:
        """Close idle connections; the others close with their answer."""
        self.stopping = True
        for connection in list(self.connections):
            if connection.idle:
                connection.close()

    def _sweep(self) -> None:
        now = self.clock()
        self.date = formatdate(usegmt=True).encode()
        self.allowance.forget(now)
        self._victims.clear()  # nobody is held on to
        for connection in list(self.connections):
            try:
                connection.check_deadline(now)
            except Exception:  # one connection's fault must not end the deadlines of all
                self.log.failure("a device connection failed")
                connection.abort()

    def _rest(self) -> None:
        """Stop looking at deadlines once there is nothing left that has one."""
        if self._sweeper.running and not (self._listening or self.connections):
            self._sweeper.stop()
