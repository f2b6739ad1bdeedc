"""What a connection has still to send, handed to its transport piece by piece.

A transport joins and keeps whatever it is given. Here large data stay where they are until there is room for their
next piece, and a peer that takes nothing for too long is noticed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

WRITE_SIZE = 1 << 16  # bytes handed over at a time; as much as Twisted's transports like to hold


@implementer(IPushProducer)
class Outbox:
    """The bytes that one connection has still to send.

    Attributes:
        blocked: whether the peer is behind with reading.
    """

    def __init__(
        self,
        transport: Any,
        reactor: Any,
        stall_timeout: float,
        on_room: Callable[[], None],
        on_stall: Callable[[], None],
    ) -> None:
        """Become the producer of a transport.

        Args:
            transport: of a TCP connection, or TLS over one.
            reactor: for the time.
            stall_timeout: seconds.
            on_room: called when a peer that was behind has caught up.
            on_stall: called when it has taken nothing for so long.
        """
        self.blocked = False
        self._transport = transport
        self._reactor = reactor
        self._stall_timeout = stall_timeout
        self._on_room = on_room
        self._on_stall = on_stall
        self._pieces: deque[memoryview] = deque()
        self._stalled: Any = None
        transport.registerProducer(self, True)

    @property
    def empty(self) -> bool:
        """Whether the transport has everything."""
        return not self._pieces

    def send(self, parts: Iterable[bytes | memoryview]) -> None:
        """Send parts one after the other. They must not change before they have left."""
        self._pieces.extend(memoryview(part) for part in parts)
        self._write()

    def close(self) -> None:
        """Forget what has not left."""
        self._pieces.clear()
        self._stop_waiting()

    def pauseProducing(self) -> None:
        """Write no more for now."""
        self.blocked = True
        self._stop_waiting()
        self._stalled = self._reactor.callLater(self._stall_timeout, self._on_stall)

    def resumeProducing(self) -> None:
        """Go on writing."""
        self.blocked = False
        self._stop_waiting()
        self._write()
        if not self.blocked:
            self._on_room()

    def stopProducing(self) -> None:
        """Stop writing: the connection is gone, and its protocol is about to hear of it."""

    def _write(self) -> None:
        while self._pieces and not self.blocked:
            piece = self._pieces.popleft()
            if len(piece) > WRITE_SIZE:
                self._pieces.appendleft(piece[WRITE_SIZE:])
            self._transport.write(bytes(piece[:WRITE_SIZE]))  # a view kept there would keep its file mapped

    def _stop_waiting(self) -> None:
        if self._stalled is not None and self._stalled.active():
            self._stalled.cancel()
        self._stalled = None
