"""The commands that we send to Redis: one connection, pipelined; a lost one is an exception, never a wait without end.

What keeps the connection, and what is said on it first, is in link.py. Scripts are loaded before a connection comes
into use and then called by their digest. An error reply that says "not here, not now" (a replica, still loading)
gives the connection up; any other is the failure of the one command that it answers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

import txredisapi
from twisted.application.service import Service
from twisted.internet import defer, task
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.logger import Logger

from fedcore.errors import StoreUnavailable
from fedcore.store.link import Access, Connection, Link, NotServing, Standing, ask, cannot_serve, followers

Argument = str | bytes | int

REFRESH_S = 10.0  # between two looks at the replicas
_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class _Script:
    """A script and the digest by which Redis knows it once it is loaded."""

    text: str
    digest: str


def _read_scripts() -> dict[str, _Script]:
    files = (resources.files("fedcore.store") / "scripts").iterdir()
    texts = {path.name.removesuffix(".lua"): path.read_text() for path in files if path.name.endswith(".lua")}
    shared = texts.pop("shared")
    return {name: _script(shared + text) for name, text in texts.items()}


def _script(text: str) -> _Script:
    return _Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


_SCRIPTS = _read_scripts()


class _ScriptForgotten(Exception):
    """Redis does not know the digest: somebody has flushed its scripts."""


class Commands:
    """Scripts and commands on one connection, before or while it is in use."""

    def __init__(self, connection: Any, name: str) -> None:
        self._connection = connection
        self._name = name

    async def script(self, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """Run a script, see ``Redis.script``."""
        return await ask(self._connection, "EVALSHA", _SCRIPTS[name].digest, len(keys), *keys, *arguments)

    async def command(self, *words: Argument) -> Any:
        """Run one plain command, see ``Redis.command``."""
        return await ask(self._connection, *words)


class Redis(Service):
    """One pipelined connection to the master.

    Attributes:
        replicas: how many replicas follow the master, as it said when the connection began or within the last
            REFRESH_S seconds.
        on_change: each is called with True when the connection has come, with False when it is gone, before anybody
            who waits in ``connected`` goes on.
        before_use: each is awaited with every new connection and the run id of its Redis, before anybody else may
            use it; a StoreError ends the connection.
    """

    log = Logger()

    def __init__(
        self,
        endpoint: IStreamClientEndpoint,
        name: str,
        *,
        reply_timeout: float,
        on_error: Callable[[], None],
        reactor: Any,
        access: Access | None = None,
        moved: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """Keep a connection.

        Args:
            endpoint: how to connect, with its own time-out.
            name: address for messages.
            reply_timeout: seconds until a silent server counts as lost.
            on_error: called for each command that failed.
            reactor: for pauses.
            access: who we are at Redis; None: the default user, database 0.
            moved: tells whether the master is elsewhere now, see SentinelEndpoint.
        """
        self.replicas = 0
        self.on_change: list[Callable[[bool], None]] = []
        self.before_use: list[Callable[[Commands, str], Awaitable[None]]] = []
        self._name = name
        self._reply_timeout = reply_timeout
        self._on_error = on_error
        self._reactor = reactor
        self._link = Link(
            endpoint,
            name,
            access or Access(),
            reactor,
            build=partial(Connection, reply_timeout),
            prepare=self._prepare,
            changed=self._connection_changed,
            moved=moved,
        )
        self._waiting: list[defer.Deferred[None]] = []
        self._refreshing = task.LoopingCall(self._refresh_quietly)
        self._refreshing.clock = reactor
        self._unreplicated: list[tuple[int, defer.Deferred[bool | StoreUnavailable]]] = []
        self._replicating = False
        self._warned_at: float | None = None

    @property
    def available(self) -> bool:
        """Whether the connection stands."""
        return self._link.connection is not None

    @property
    def problem(self) -> str:
        """Why the connection does not stand; "" if it does."""
        if self.available:
            return ""
        refusal = self._link.refusal
        return f"Redis refuses us: {refusal}" if refusal else "no connection to Redis"

    @property
    def run_id(self) -> str:
        """The run id of the process that the connection leads to, or led to last; "" before the first one.

        Another one means that Redis was started anew or that another node is the master now: it may have lost
        writes that it had acknowledged.
        """
        return self._link.standing.run_id

    def startService(self) -> None:
        super().startService()
        self._link.start()
        self._refreshing.start(REFRESH_S, now=False)

    def stopService(self) -> defer.Deferred[Any]:
        super().stopService()
        if self._refreshing.running:
            self._refreshing.stop()
        return self._link.stop()

    async def connected(self) -> None:
        """Wait until the connection stands."""
        if not self.available:
            waiter: defer.Deferred[None] = defer.Deferred()
            self._waiting.append(waiter)
            await waiter

    async def script(self, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """Run the script ``scripts/{name}.lua``; see its head for keys, arguments and answer.

        Commands that are sent before the answer has come may overtake it, if somebody has flushed Redis' scripts.

        Raises:
            StoreUnavailable: no connection, no answer in time, or an error from Redis.
        """
        script, words = _SCRIPTS[name], (len(keys), *keys, *arguments)
        try:
            return await self._say("EVALSHA", script.digest, *words)
        except _ScriptForgotten:
            return await self._say("EVAL", script.text, *words)

    async def command(self, *words: Argument) -> Any:
        """Run one plain command.

        Raises:
            StoreUnavailable: as for ``script``.
        """
        return await self._say(*words)

    async def refresh(self) -> None:
        """Ask how many replicas follow now.

        Raises:
            StoreUnavailable: as for ``script``, or the node is no master any more; then the connection is given up.
        """
        connection = self._link.connection
        answer = await self.command("INFO", "replication")
        try:
            self.replicas = followers(answer)
        except NotServing as problem:
            self._give_up(connection, str(problem))
            raise

    async def replicated(self, timeout_ms: int) -> bool:
        """Wait until a replica has everything that was written on this connection so far.

        One question serves all callers that came before it was sent. Nothing else is answered on the connection
        meanwhile, so the patience should be short. Call it without awaiting anything after the reply to the write:
        a connection that was made in between knows nothing of that write.

        Args:
            timeout_ms: patience, > 0; no more than half of the reply time-out is used.

        Returns:
            True if a replica has it or there are no replicas; False if the time ran out.

        Raises:
            StoreUnavailable: as for ``script``.
        """
        if self.available and not self.replicas:
            return True
        answer: defer.Deferred[bool | StoreUnavailable] = defer.Deferred()
        self._unreplicated.append((timeout_ms, answer))
        if not self._replicating:
            defer.Deferred.fromCoroutine(self._replicate())
        outcome = await answer
        if isinstance(outcome, StoreUnavailable):
            raise StoreUnavailable(str(outcome)) from outcome
        return outcome

    async def _replicate(self) -> None:
        """Ask for one group of callers after the other until there is none."""
        self._replicating = True
        while self._unreplicated:
            group, self._unreplicated = self._unreplicated, []
            patience = min(max(timeout for timeout, _ in group), int(self._reply_timeout * 500))
            outcome: bool | StoreUnavailable
            try:
                outcome = await self.command("WAIT", 1, max(1, patience)) > 0
            except StoreUnavailable as error:
                outcome = error
            if outcome is False:
                self._warn_of_replicas(patience)
            for _, answer in group:
                if not answer.called:  # else its caller has given up waiting
                    answer.callback(outcome)
        self._replicating = False

    def _warn_of_replicas(self, patience: int) -> None:
        now = self._reactor.seconds()
        if self._warned_at is None or now - self._warned_at >= _MINUTE_S:
            self._warned_at = now
            self.log.warn(
                "no replica of Redis at {address} has the last writes after {patience} ms; a fail-over would lose them",
                address=self._name,
                patience=patience,
                replicas=self.replicas,
            )
        defer.Deferred.fromCoroutine(self._refresh_quietly())  # perhaps there are none any more

    async def _refresh_quietly(self) -> None:
        if self.available:
            with contextlib.suppress(StoreUnavailable):  # whoever needs Redis next will hear of it
                await self.refresh()

    async def _say(self, *words: Argument) -> Any:
        connection = self._link.connection
        if connection is None:
            self._on_error()
            raise StoreUnavailable(f"no connection to Redis at {self._name}")
        try:
            return await connection.execute_command(*words)
        except txredisapi.ResponseError as error:
            if words[0] == "EVALSHA" and str(error).startswith("NOSCRIPT"):
                raise _ScriptForgotten from error
            self._on_error()
            if cannot_serve(error):
                self._give_up(connection, str(error))
            else:
                self.log.warn(
                    "Redis at {address} refused a command: {error}", address=self._name, error=str(error)
                )
            raise StoreUnavailable(f"Redis: {error}") from error
        except (txredisapi.RedisError, OSError) as error:
            self._on_error()
            self._link.give_up(connection)
            raise StoreUnavailable(f"Redis: {error}") from error

    def _give_up(self, connection: Any, problem: str) -> None:
        if connection is not None and connection is self._link.connection:
            self.log.warn(
                "Redis at {address} cannot serve us: {problem}", address=self._name, problem=problem
            )
            self._link.give_up(connection, refused=True)

    async def _prepare(self, connection: Any, standing: Standing) -> None:
        await _load_scripts(connection)
        for prepare in self.before_use:
            await prepare(Commands(connection, self._name), standing.run_id)

    def _connection_changed(self, available: bool) -> None:
        if available:
            self.replicas = self._link.standing.replicas
        for listener in self.on_change:
            try:
                listener(available)
            except Exception:
                self.log.failure("whoever follows the connection to Redis has failed")
        if available:
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                waiter.callback(None)


async def _load_scripts(connection: Any) -> None:
    """Have Redis know all scripts."""
    loads = [
        defer.Deferred.fromCoroutine(ask(connection, "SCRIPT", "LOAD", script.text))
        for script in _SCRIPTS.values()
    ]
    for succeeded, result in await defer.DeferredList(loads, consumeErrors=True):
        if not succeeded:
            result.raiseException()
