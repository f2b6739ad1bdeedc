"""A TCP link that can be cut: a proxy on a port of its own, for one server's way to Redis or a device's to a server.

    with Link(redis_port) as link:
        ...          # clients connect to link.port
        link.cut()   # standing connections end, new ones are refused
        link.restore()

``hang`` is a partition without an end in sight: connections are taken, nothing is delivered; ``restore`` delivers
what was held, as TCP does after a short one. ``reset`` is a firewall that forgot: the standing connections are
reset with all that is on its way, the next ones work.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any

HOST = "127.0.0.1"
_CHUNK = 1 << 16
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST and drops what is unsent
_PATIENCE_S = 10.0


class Link:
    """Carries bytes both ways between who connects to ``port`` and the target.

    Attributes:
        port: of 127.0.0.1; stays taken while the link is cut.
        carried: bytes delivered so far.
        accepted: connections taken so far.
    """

    def __init__(self, target: int, host: str = HOST) -> None:
        self.target = (host, target)
        self.carried = 0
        self.accepted = 0
        self._reservation = _bound(0)  # bound but never listening: keeps the port while it is cut
        self.port: int = self._reservation.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"link-{self.port}", daemon=True)
        self._thread.start()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
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
        listening = _bound(self.port)
        self._server = await asyncio.start_server(self._carry, sock=listening)

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._end_all(reset=False)

    async def _end(self) -> None:
        await self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _hang(self) -> None:
        self._flowing.clear()

    async def _restore(self) -> None:
        self._flowing.set()
        if self._server is None:
            await self._listen()

    async def _end_all(self, *, reset: bool) -> None:
        for end in self._ends:
            if reset:
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            end.transport.abort()
        self._ends.clear()

    async def _carry(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        if self._server is None:  # cut after the kernel had accepted it
            near_out.transport.abort()
            return
        self._ends.add(near_out)
        self.accepted += 1
        far_out = None
        try:
            await self._flowing.wait()
            far_in, far_out = await asyncio.open_connection(*self.target)
            self._ends.add(far_out)
            if near_out.transport.is_closing():  # cut meanwhile
                return
            await asyncio.gather(self._pump(near_in, far_out), self._pump(far_in, near_out))
        except (OSError, asyncio.CancelledError):
            return  # the target is not there, one side has gone, or the link ends: the other side learns it below
        finally:
            for end in (near_out, far_out):
                if end is not None:
                    self._ends.discard(end)
                    end.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(_CHUNK):
            await self._flowing.wait()
            sink.write(data)
            await sink.drain()
            self.carried += len(data)
        await self._flowing.wait()
        with contextlib.suppress(OSError):
            sink.write_eof()


def _bound(port: int) -> socket.socket:
    """Bind without listening; several such sockets may share a port while at most one of them listens."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((HOST, port))
    return bound
