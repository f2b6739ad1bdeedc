"""A TCP link that can be cut: a proxy on a port of its own, for a server's way to Redis or to another server.

    with Link(redis_port) as link:
        ...          # clients connect to link.port
        link.cut()   # standing connections end, new ones are refused
        link.restore()

``hang`` is a partition without an end in sight: connections are taken, nothing is delivered; ``restore`` delivers
what was held, as TCP does after a short one. ``vanish`` is the same, but whoever connects gets no answer at all.
``mute`` is a way that works in one direction only: what is asked arrives, the answers do not. ``reset`` is a firewall
that forgot: the standing connections are reset with all that is on its way, the next ones work.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

HOST = "127.0.0.1"
_CHUNK = 1 << 16
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST and drops what is unsent
_PATIENCE_S = 10.0
_BACKLOG = 100
_FULL_S = 0.05  # loopback answers a SYN at once, or never


class Link:
    """Carries bytes both ways between who connects to ``port`` and the target.

    Attributes:
        host: where it listens.
        port: of that address; stays taken while the link is cut.
        carried: bytes delivered so far.
        accepted: connections taken so far.
        held: pieces of answers that have come and wait.
    """

    def __init__(self, target: int, host: str = HOST, at: tuple[str, int] = (HOST, 0)) -> None:
        """Carry to a port of ``host``, from who connects to ``at``; port 0 is any free one."""
        self.target = (host, target)
        self.carried = 0
        self.accepted = 0
        self.held = 0
        self._answers_left: int | None = None  # until it becomes mute; None if it does not
        self._reservation = _bound(at)  # bound but never listening: keeps the port while it is cut
        self.host, self.port = self._address = self._reservation.getsockname()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"link-{self.port}", daemon=True)
        self._thread.start()
        self._asking, self._answering = (
            asyncio.Event(),
            asyncio.Event(),
        )  # bytes flow from the near side, to it
        self._asking.set()
        self._answering.set()
        self._listening: socket.socket | None = None  # None while it is cut
        self._server: asyncio.Server | None = None  # None while nothing is accepted
        self._stoppers: list[socket.socket] = []  # connections that fill the queue of those to be accepted
        self._ends: set[asyncio.StreamWriter] = set()
        self._call(self._listen())

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what a test does

    def cut(self) -> None:
        """End all connections and refuse new ones."""
        self._call(self._cut())

    def hang(self) -> None:
        """Deliver nothing any more, in neither direction, but accept everything."""
        self._call(self._hang())

    def vanish(self) -> None:
        """Deliver nothing any more, and leave all who connect without an answer."""
        self._call(self._vanish())

    def mute(self, after: int = 0) -> None:
        """Deliver what comes from the near side; hold the answers, but for so many short ones."""
        self._call(self._mute(after))

    def reset(self) -> None:
        """Reset the standing connections; new ones work."""
        self._call(self._end_all(reset=True))

    def restore(self) -> None:
        """Carry again, whatever was done before."""
        self._call(self._restore())

    def close(self) -> None:
        """End the link for good."""
        if self._thread.is_alive():
            self._call(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_PATIENCE_S)
            self._loop.close()
            self._reservation.close()

    # ---- in the thread

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_PATIENCE_S)

    async def _listen(self) -> None:
        if self._listening is None:
            self._listening = _bound(self._address)
        self._listening.listen(_BACKLOG)
        for stopper in self._stoppers:  # they were the first in the queue
            self._listening.accept()[0].close()
            stopper.close()
        self._stoppers.clear()
        self._server = await asyncio.start_server(self._carry, sock=self._listening.dup())

    async def _cut(self) -> None:
        self._ignore()
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        for stopper in self._stoppers:
            stopper.close()
        self._stoppers.clear()
        await self._end_all(reset=False)

    async def _end(self) -> None:
        await self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _hang(self) -> None:
        self._asking.clear()
        self._answering.clear()

    async def _mute(self, after: int) -> None:
        if after:
            self._answers_left = after
        else:
            self._answering.clear()

    async def _vanish(self) -> None:
        """Stop the flow and fill the queue of new connections: with that full, the kernel answers no SYN."""
        await self._hang()
        if self._server is None or self._listening is None:
            return
        self._ignore()
        self._listening.listen(0)
        while True:
            stopper = socket.socket()
            stopper.settimeout(_FULL_S)
            try:
                stopper.connect(self._address)
            except TimeoutError:
                stopper.close()
                return
            self._stoppers.append(stopper)

    def _ignore(self) -> None:
        """Accept nothing any more; the kernel still does."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _restore(self) -> None:
        self._answers_left = None
        self._asking.set()
        self._answering.set()
        if self._server is None:
            await self._listen()

    async def _end_all(self, *, reset: bool) -> None:
        for end in self._ends:
            if reset:
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            end.transport.abort()
        self._ends.clear()

    async def _carry(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        if self._listening is None:  # cut after the kernel had accepted it
            near_out.transport.abort()
            return
        self._ends.add(near_out)
        self.accepted += 1
        far_out = None
        try:
            await self._asking.wait()
            far_in, far_out = await asyncio.open_connection(*self.target)
            self._ends.add(far_out)
            if near_out.transport.is_closing():  # cut meanwhile
                return
            await asyncio.gather(
                self._pump(near_in, far_out, self._asking.wait),
                self._pump(far_in, near_out, self._may_answer),
            )
        except (OSError, asyncio.CancelledError):
            return  # the target is not there, one side has gone, or the link ends: the other side learns it below
        finally:
            for end in (near_out, far_out):
                if end is not None:
                    self._ends.discard(end)
                    end.close()

    async def _may_answer(self) -> None:
        if self._answers_left is not None and self._answering.is_set():
            if self._answers_left:
                self._answers_left -= 1
            else:
                self._answering.clear()
        self.held += 1
        try:
            await self._answering.wait()
        finally:
            self.held -= 1

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, turn: Callable[[], Awaitable[object]]
    ) -> None:
        while data := await source.read(_CHUNK):
            await turn()
            sink.write(data)
            await sink.drain()
            self.carried += len(data)
        await turn()
        with contextlib.suppress(OSError):
            sink.write_eof()


def _bound(address: tuple[str, int]) -> socket.socket:
    """Bind without listening; several such sockets may share a port while at most one of them listens."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    return bound
