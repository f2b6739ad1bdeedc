"""Past a transport's buffers: bodies are received where they belong, answers leave without a copy.

Twisted's TCP transport receives every body into fresh bytes and joins what it is given to write: a copy of each
upload, and of each model for each device that is slow to read it. DirectIO reads into a buffer of the protocol's
choice and sends from the answer itself. What the socket does not take at once goes through the transport as usual,
which then says when there is room again.
"""

from __future__ import annotations

import fcntl
import struct
import termios
from collections.abc import Sequence
from typing import Any, Protocol

from twisted.internet import main, tcp

READ_SIZE = 16_384  # bytes asked for when the protocol has no buffer: a head, or a small request as a whole
_MOST_PIECES = 64  # per call; the kernel's limit is 1,024


class DirectProtocol(Protocol):
    """A protocol that may say where bytes go."""

    def room(self) -> memoryview | None:
        """Return where the next bytes belong, None if they are to be handed to dataReceived."""
        ...

    def filled(self, count: int) -> None:
        """Take note that so many bytes have arrived in the room."""
        ...

    def dataReceived(self, data: bytes) -> None:
        """Take received bytes."""
        ...


class DirectIO:
    """The socket of one plain TCP connection."""

    def __init__(self, transport: tcp.Server, protocol: DirectProtocol) -> None:
        """Take over the transport's reads.

        Its buffer size becomes 0: the registered producer is paused while anything at all is left to write, and
        resumed when all of it is gone.
        """
        self._transport = transport
        self._protocol = protocol
        self._socket = transport.getHandle()
        transport.bufferSize = 0
        transport.doRead = self._read  # type: ignore[method-assign]

    def release(self) -> None:
        """Let go of a lost connection."""
        vars(self._transport).pop("doRead", None)  # the transport holds us, we hold it

    def send(self, pieces: Sequence[bytes | memoryview]) -> int:
        """Send what the socket takes at once; return how many bytes that were.

        To be called only while the transport has nothing left to write.
        """
        try:
            if len(pieces) == 1:
                return self._socket.send(pieces[0])
            return self._socket.sendmsg(pieces[:_MOST_PIECES])
        except OSError:
            return 0  # full, or broken: then the transport will find out

    def _read(self) -> Any:
        """Receive once; return why the connection has ended, as a transport tells its reactor."""
        room = self._protocol.room()
        try:
            if room is None:
                data = self._socket.recv(READ_SIZE)
                count = len(data)
            else:
                count = self._socket.recv_into(room)
        except BlockingIOError:
            return None
        except OSError:
            return main.CONNECTION_LOST
        if not count:
            return main.CONNECTION_DONE
        if room is None:
            self._protocol.dataReceived(data)
        else:
            self._protocol.filled(count)
        return None


def unacknowledged(transport: Any) -> int:
    """Return how many of the bytes written to a connection its peer's side has not taken yet.

    They lie in Twisted's buffers and in the kernel's; the latter count as none where the kernel cannot tell.

    Args:
        transport: of a TCP connection, or TLS over one.
    """
    buffered = len(transport.dataBuffer) - transport.offset + transport._tempDataLen
    try:
        answer = fcntl.ioctl(transport.fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):
        return int(buffered)
    return int(buffered + struct.unpack("i", answer)[0])
