"""The connection to Redis: one, pipelined, reconnecting; a lost one is an exception, never a wait without end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import txredisapi
from twisted.application.service import Service
from twisted.internet import defer
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.logger import Logger

from fedcore.errors import StoreUnavailable

Argument = str | bytes | int

_SCRIPTS = {
    path.name.removesuffix(".lua"): path.read_text()
    for path in (resources.files("fedcore.store") / "scripts").iterdir()
    if path.name.endswith(".lua")
}


class _Factory(txredisapi.RedisFactory):
    """txredisapi's factory, quicker to come back, telling when the connection comes and goes."""

    initialDelay = 0.1
    maxDelay = 1.0

    def __init__(
        self, changed: Callable[[bool], None], failed: Callable[[int], None], reply_timeout: float
    ) -> None:
        super().__init__(
            None, None, 1, isLazy=True, charset=None, replyTimeout=reply_timeout, convertNumbers=False
        )
        self._changed = changed
        self._failed = failed

    def retryDelay(self, attempt: int) -> float:
        self._failed(attempt)
        return float(super().retryDelay(attempt))

    def addConnection(self, conn: Any) -> None:
        """Take a connection into use once Redis has answered on it: a paused or loading one accepts them too."""
        if conn.connected:
            conn.ping().addCallbacks(lambda _: self._use(conn), lambda _: conn.transport.loseConnection())

    def _use(self, conn: Any) -> None:
        super().addConnection(conn)
        self._changed(bool(self.pool))

    def delConnection(self, conn: Any) -> None:
        super().delConnection(conn)
        self._changed(bool(self.pool))


class Redis(Service):
    """One pipelined connection.

    Attributes:
        available: whether the connection stands.
    """

    log = Logger()

    def __init__(
        self,
        endpoint: IStreamClientEndpoint,
        name: str,
        *,
        reply_timeout: float,
        on_error: Callable[[], None],
    ) -> None:
        """Keep a connection.

        Args:
            endpoint: how to connect, with its own time-out.
            name: address for messages.
            reply_timeout: seconds until a silent server counts as lost.
            on_error: called for each command that failed.
        """
        self.available = False
        self._endpoint = endpoint
        self._name = name
        self._factory = _Factory(self._connection_changed, self._attempt_failed, reply_timeout)
        self._on_error = on_error
        self._waiting: list[defer.Deferred[None]] = []

    def startService(self) -> None:
        super().startService()
        self._factory.startConnecting(self._endpoint)

    def stopService(self) -> defer.Deferred[Any]:
        super().stopService()
        return self._factory.disconnect()  # type: ignore[no-any-return]

    async def connected(self) -> None:
        """Wait until the connection stands."""
        if not self.available:
            waiter: defer.Deferred[None] = defer.Deferred()
            self._waiting.append(waiter)
            await waiter

    async def script(self, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """Run the script ``scripts/{name}.lua``; see its head for keys, arguments and answer.

        Raises:
            StoreUnavailable: no connection, no answer in time, or an error from Redis.
        """
        return await self._run("eval", _SCRIPTS[name], list(keys), list(arguments))

    async def command(self, *words: Argument) -> Any:
        """Run one plain command.

        Raises:
            StoreUnavailable: as for ``script``.
        """
        return await self._run("execute_command", *words)

    async def _run(self, method: str, *arguments: Any) -> Any:
        if not self.available:
            self._on_error()
            raise StoreUnavailable(f"no connection to Redis at {self._name}")
        try:
            return await getattr(self._factory.pool[0], method)(*arguments)
        except (txredisapi.RedisError, OSError) as error:
            self._on_error()
            if isinstance(error, txredisapi.ResponseError):
                self.log.warn(
                    "Redis at {address} refused a command: {error}", address=self._name, error=str(error)
                )
            else:
                self._give_up_connection()
            raise StoreUnavailable(f"Redis: {error}") from error

    def _attempt_failed(self, attempt: int) -> None:
        if attempt in (1, 10) or attempt % 60 == 0:
            self.log.warn(
                "cannot connect to Redis at {address}; trying on", address=self._name, attempt=attempt
            )

    def _give_up_connection(self) -> None:
        """Send nothing more on a connection that is late or out of step, and make a new one."""
        self._connection_changed(False)
        for connection in self._factory.pool:
            connection.transport.abortConnection()

    def _connection_changed(self, available: bool) -> None:
        if available == self.available:
            return
        self.available = available
        if available:
            self.log.info("connected to Redis at {address}", address=self._name)
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                waiter.callback(None)
        elif self.running:
            self.log.warn("lost the connection to Redis at {address}", address=self._name)
