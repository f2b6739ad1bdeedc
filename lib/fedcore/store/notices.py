"""Notices: what others publish on one channel of Redis, on a connection of its own.

A notice may be lost: publishing reaches only who is subscribed at that moment. So after each subscription ``heard``
is called with an empty notice, "look for yourself".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import txredisapi
from twisted.application.service import Service
from twisted.internet import defer, task
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.logger import Logger

from fedcore.errors import StoreUnavailable
from fedcore.store.link import Access, Connection, Link, ask

PING_S = 5.0  # a peer that is gone without a word is noticed within this and the reply time-out


class _Subscription(txredisapi.SubscriberProtocol, Connection):
    """A connection on which Redis speaks unasked.

    Attributes:
        channel: what it is subscribed to, b"" for nothing.
    """

    def __init__(self, reply_timeout: float, received: Callable[[bytes, bytes], None]) -> None:
        Connection.__init__(self, reply_timeout)
        self.channel = b""
        self._received = received

    def messageReceived(self, pattern: object, channel: bytes, message: bytes) -> None:
        self._received(channel, message)


class Notices(Service):
    """Follows one channel.

    Attributes:
        subscribed: whether notices are heard now.
    """

    log = Logger()

    def __init__(
        self,
        endpoint: IStreamClientEndpoint,
        name: str,
        heard: Callable[[bytes], None],
        *,
        reply_timeout: float,
        reactor: Any,
        access: Access | None = None,
        moved: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """Keep a connection; which channel is followed is said with ``follow``, before or later.

        Args:
            endpoint: how to connect, with its own time-out.
            name: address for messages.
            heard: called with each notice, and with b"" whenever some may have been missed.
            reply_timeout: seconds until a silent server counts as lost.
            reactor: for pauses.
            access: who we are at Redis; None: the default user.
            moved: tells whether the master is elsewhere now, see SentinelEndpoint.
        """
        self.subscribed = False
        self._heard = heard
        self._channel = b""
        self._changing = False
        self._link = Link(
            endpoint,
            f"{name} (notices)",
            access or Access(),
            reactor,
            build=lambda: _Subscription(reply_timeout, self._received),
            prepare=lambda connection, _: self._subscribe(connection),
            changed=self._connection_changed,
            moved=moved,
        )
        self._pinging = task.LoopingCall(self._ping)
        self._pinging.clock = reactor

    def startService(self) -> None:
        super().startService()
        self._link.start()
        self._pinging.start(PING_S, now=False)

    def stopService(self) -> defer.Deferred[Any]:
        super().stopService()
        if self._pinging.running:
            self._pinging.stop()
        return self._link.stop()

    def follow(self, channel: str) -> None:
        """Hear this channel from now on, and no other; "" for none."""
        self._channel = channel.encode()
        connection = self._link.connection
        if connection is not None and connection.channel != self._channel:
            self.subscribed = False
            if not self._changing:
                defer.Deferred.fromCoroutine(self._change(connection))

    async def _change(self, connection: Any) -> None:
        self._changing = True
        try:
            await self._subscribe(connection)
        except (StoreUnavailable, txredisapi.RedisError) as problem:
            self.log.warn("cannot follow another channel: {problem}", problem=str(problem))
            self._link.give_up(connection, refused=True)
        else:
            if connection is self._link.connection:
                self._begin()
        finally:
            self._changing = False

    async def _subscribe(self, connection: Any) -> None:
        """Bring what the connection hears in line with what is to be heard, which may change meanwhile."""
        while connection.channel != self._channel:
            if connection.channel:
                await ask(connection, "UNSUBSCRIBE", connection.channel)
                connection.channel = b""
            elif self._channel:
                channel = self._channel
                await ask(connection, "SUBSCRIBE", channel)
                connection.channel = channel

    def _connection_changed(self, available: bool) -> None:
        self.subscribed = False
        if available:
            self._begin()

    def _begin(self) -> None:
        if self._channel:
            self.subscribed = True
            self._call(b"")

    def _received(self, channel: bytes, message: bytes) -> None:
        if channel == self._channel:
            self._call(message)

    def _call(self, message: bytes) -> None:
        try:
            self._heard(message)
        except Exception:
            self.log.failure("whoever hears the notices has failed")

    async def _ping(self) -> None:
        connection = self._link.connection
        if connection is not None:
            try:
                await connection.execute_command("PING")
            except (txredisapi.RedisError, OSError):
                self._link.give_up(connection)
