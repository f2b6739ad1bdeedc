"""Where the master is: an endpoint that asks the Sentinels before each connection.

A user at the Sentinels needs one right: -@all +sentinel|get-master-addr-by-name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import txredisapi
from twisted.internet import defer, error
from twisted.internet.interfaces import IProtocolFactory, IStreamClientEndpoint
from twisted.internet.protocol import Factory
from zope.interface import implementer

from fedcore.errors import StoreUnavailable
from fedcore.store.link import Access, Connection, ask, authenticate

_AWAY = (StoreUnavailable, txredisapi.RedisError, OSError, error.ConnectError, error.TimeoutError)
_SHORT_S = 5.0  # a connection that is asked for again so soon led to the wrong node


@dataclass(frozen=True, slots=True)
class Sentinel:
    """One Sentinel.

    Attributes:
        name: address for messages.
        endpoint: how to connect.
    """

    name: str
    endpoint: IStreamClientEndpoint


@implementer(IStreamClientEndpoint)
class SentinelEndpoint:
    """Connects to the node that the Sentinels call the master.

    They are asked in turn, first the one whose answer was good last. Whether that node agrees is for the caller to
    find out, who then simply connects again.
    """

    def __init__(
        self,
        sentinels: Sequence[Sentinel],
        master_name: str,
        to_master: Callable[[str, int], IStreamClientEndpoint],
        *,
        access: Access,
        timeout: float,
        reactor: Any,
    ) -> None:
        """Bind to a group of Sentinels.

        Args:
            sentinels: at least one.
            master_name: what they call our Redis.
            to_master: makes the endpoint for the host and port that they tell.
            access: who we are at the Sentinels; they have no databases.
            timeout: seconds for each of them, connection and answer together.
            reactor: for time-outs.
        """
        self._sentinels = list(sentinels)
        self._master_name = master_name
        self._to_master = to_master
        self._access = access
        self._timeout = timeout
        self._reactor = reactor
        self._told: tuple[str, int] | None = None
        self._told_at: float | None = None

    def connect(self, factory: IProtocolFactory) -> defer.Deferred[Any]:
        """Connect to the master; fails with ConnectError if nobody knows it or it cannot be reached."""
        return defer.Deferred.fromCoroutine(self._connect(factory))

    async def moved(self) -> bool:
        """Tell whether the Sentinels name another master than the one connected to last; False if all are away."""
        try:
            return await self._find() != self._told
        except error.ConnectError:
            return False

    async def _connect(self, factory: IProtocolFactory) -> Any:
        now = self._reactor.seconds()
        if self._told_at is not None and now - self._told_at < _SHORT_S:
            self._sentinels.append(self._sentinels.pop(0))  # it may be cut off from the others
        self._told_at = None
        self._told = await self._find()
        endpoint: Any = self._to_master(*self._told)
        connection = await endpoint.connect(factory)
        self._told_at = self._reactor.seconds()
        return connection

    async def _find(self) -> tuple[str, int]:
        """Ask one Sentinel after the other; the first to know the master goes to the front."""
        problems = []
        for sentinel in list(self._sentinels):
            asked = defer.Deferred.fromCoroutine(self._ask(sentinel))
            asked.addTimeout(self._timeout, self._reactor, _too_late)
            try:
                found = await asked
            except _AWAY as problem:
                problems.append(f"{sentinel.name}: {problem}")
            else:
                self._sentinels.remove(sentinel)
                self._sentinels.insert(0, sentinel)
                return found
        raise error.ConnectError(
            string=f"no Sentinel knows the master {self._master_name}: " + "; ".join(problems)
        )

    async def _ask(self, sentinel: Sentinel) -> tuple[str, int]:
        factory = Factory.forProtocol(partial(Connection, self._timeout))
        factory.noisy = False
        endpoint: Any = sentinel.endpoint
        connection = await endpoint.connect(factory)
        try:
            await authenticate(connection, self._access)
            answer = await ask(connection, "SENTINEL", "get-master-addr-by-name", self._master_name)
        finally:
            connection.transport.abortConnection()
        if answer is None:
            raise StoreUnavailable(
                f"it does not know {self._master_name}", hint="check fedcore.redis.sentinel_master"
            )
        host, port = answer
        return host.decode(), int(port)


def _too_late(outcome: object, seconds: float) -> None:
    raise error.TimeoutError(f"no answer within {seconds:g} s")
