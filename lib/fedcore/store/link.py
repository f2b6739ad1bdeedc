"""One connection to Redis that comes back by itself.

Here live: who we are at Redis (Access), what it must allow us (RIGHTS), the first words on a connection (introduce),
and the link, which connects, introduces itself, waits for the end and begins again. What is then said on the
connection is up to its owner: commands in redis.py, notices in notices.py.

Rules: nothing is said on a connection before Redis has answered as a master that can serve us. Every reason why it
cannot is logged once with its remedy, then rarely. A password is never logged.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import txredisapi
from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet import defer, task
from twisted.internet.error import ConnectionRefusedError as NobodyListens
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from fedcore.errors import StoreUnavailable

FIRST_RETRY_S = 0.1
LONGEST_RETRY_S = 1.0
MOVED_S = 2.0  # between two questions whether the master has moved
_CLOSE_S = 1.0  # then a peer that does not answer our goodbye is left alone

# What an ACL user needs, as ACL SETUSER takes it: no more than what the scripts and the adapters use. `select` only
# with fedcore.redis.database, `wait` only with replicas.
RIGHTS = (
    "resetkeys ~ms_fl:* resetchannels &ms_fl:* -@all +ping +select +info +wait +script|load +eval +evalsha +time "
    "+exists +expire +pexpire +pttl +del +get +set +hget +hset +hsetnx +hincrby +hdel "
    "+hgetall +hexists +hkeys +hlen +hmget +hvals +append +unlink "
    "+zadd +zcard +zcount +zpopmin +zrem +zremrangebyscore +zscore +publish +subscribe +unsubscribe"
)

# Error replies that say "not here, not now": the connection is given up and another one is made, perhaps elsewhere.
# Redis 6 wraps what a script was told: "Error running script (call to f_...): ...: -READONLY You can't ...".
_NOT_HERE = re.compile(r"(?:^|: -)(READONLY|LOADING|MASTERDOWN|NOAUTH|NOREPLICAS|BUSY|UNBLOCKED)\b")
_REMEDIES = {
    "WRONGPASS": "check fedcore.redis.username and the first line of fedcore.redis.password_file, or of the credential "
    "redis-password; a new start reads it",
    "NOAUTH": "Redis asks for a password: give fedcore.redis.password_file or the credential redis-password",
    "NOPERM": f"the user lacks a right, it needs: {RIGHTS}",
    "AUTH": "if Redis has no password, remove fedcore.redis.username and password_file, or the credential",
    "SELECT": "fedcore.redis.database must be below `databases` of Redis' configuration",
}
_TLS_REMEDY = (
    "check distributed_cache.cacert_filename, capath and server_name against the certificate of Redis, and give "
    "cert_filename if it asks for one"
)
_CLOSED_REMEDY = (
    "a port of Redis that has TLS closes what is not TLS, and the other way round: see fedcore.redis.tls"
)
_REFUSED_REMEDY = "is it running, and is distributed_cache.address right?"


@dataclass(frozen=True, slots=True)
class Access:
    """Who we are at Redis, and where in it.

    Attributes:
        username: ACL user, "" for the default one.
        password: b"" for none.
        database: number.
    """

    username: str = ""
    password: bytes = field(default=b"", repr=False)
    database: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """What a Redis says of itself.

    Attributes:
        run_id: another one after each start of the process.
        replicas: how many replicas follow it now.
    """

    run_id: str
    replicas: int


class NotServing(StoreUnavailable):
    """This Redis answers, but cannot or will not serve us.

    Attributes:
        lasting: somebody has to do something about it.
    """

    def __init__(self, message: str, *, hint: str = "", lasting: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.lasting = lasting


class Connection(txredisapi.RedisProtocol):
    """txredisapi's protocol: bytes in and out, nothing decoded; tells when and why it ends."""

    def __init__(self, reply_timeout: float) -> None:
        super().__init__(charset=None, replyTimeout=reply_timeout, convertNumbers=False)
        self.why: Failure | None = None
        self._waiting: list[defer.Deferred[None]] = []

    def connectionLost(self, why: Failure) -> None:
        self.why = why
        super().connectionLost(why)
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)

    async def lost(self) -> None:
        """Wait for the end of the connection."""
        if self.why is None:
            waiter: defer.Deferred[None] = defer.Deferred()
            self._waiting.append(waiter)
            await waiter


def cannot_serve(error: Exception) -> bool:
    """Tell whether an error reply means that this Redis cannot serve us now."""
    return _NOT_HERE.search(str(error)) is not None


async def ask(connection: Any, *words: str | bytes | int) -> Any:
    """Say one of the first commands on a connection.

    Raises:
        NotServing: Redis answers with an error.
        txredisapi.RedisError: no answer.
    """
    try:
        return await connection.execute_command(*words)
    except txredisapi.ResponseError as error:
        raise refusal(error, str(words[0])) from error


def refusal(error: Exception, command: str) -> NotServing:
    """Make the exception that says what Redis refused, and what to do about it."""
    code = str(error).partition(" ")[0]
    remedy = _REMEDIES.get(code) or _REMEDIES.get(command, "")
    return NotServing(f"{command} was answered with {error}", hint=remedy, lasting=bool(remedy))


async def authenticate(connection: Any, access: Access) -> None:
    """Say who we are, if we are anybody.

    Raises:
        NotServing: Redis refuses us.
        txredisapi.RedisError: no answer.
    """
    if access.username:
        await ask(connection, "AUTH", access.username, access.password)
    elif access.password:
        await ask(connection, "AUTH", access.password)


async def introduce(connection: Any, access: Access) -> Standing:
    """Say who we are and learn whom we talk to.

    Raises:
        NotServing: it is no master, or refuses us.
        txredisapi.RedisError: no answer.
    """
    await authenticate(connection, access)
    if access.database:
        await ask(connection, "SELECT", access.database)
    await ask(connection, "PING")  # unlike INFO, refused by a Redis that is still loading its data
    run_id = info(await ask(connection, "INFO", "server")).get("run_id", "")
    return Standing(run_id, followers(await ask(connection, "INFO", "replication")))


def info(answer: bytes) -> dict[str, str]:
    """Read an answer to INFO."""
    lines = (line.partition(":") for line in answer.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


def followers(answer: bytes) -> int:
    """Return how many replicas follow, from INFO replication.

    Raises:
        NotServing: this is a replica itself.
    """
    facts = info(answer)
    if facts.get("role") != "master":
        raise NotServing(
            f"it is a {facts.get('role', 'node without a role')}, not the master",
            hint="give the master's address, or fedcore.redis.sentinels",
        )
    return sum(_online(name, value) for name, value in facts.items())


def _online(name: str, value: str) -> bool:
    return re.fullmatch(r"slave[0-9]+", name) is not None and "state=online" in value.split(",")


class Link:
    """A connection that comes back.

    Attributes:
        connection: the one in use, None while there is none.
        standing: what its Redis said of itself at first; that of the last one while there is none.
        running: between ``start`` and ``stop``.
        refusal: what the Redis that answered last had against us, and the remedy; "" if there is a connection, or
            nobody answers.
    """

    log = Logger()

    def __init__(
        self,
        endpoint: IStreamClientEndpoint,
        name: str,
        access: Access,
        reactor: Any,
        *,
        build: Callable[[], Connection],
        prepare: Callable[[Any, Standing], Awaitable[None]],
        changed: Callable[[bool], None],
        moved: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """Keep a connection from ``start`` to ``stop``.

        Args:
            endpoint: how to connect, with its own time-out.
            name: address for messages.
            access: who we are.
            reactor: for pauses.
            build: makes the protocol.
            prepare: awaited with each new connection once it is introduced, and with what its Redis said of itself;
                its exceptions end the connection.
            changed: called with True when a connection has come into use, with False when it is gone.
            moved: asked every MOVED_S while a connection is in use; True: the master is elsewhere now.
        """
        self.connection: Any = None
        self.standing = Standing("", 0)
        self.running = False
        self.refusal = ""
        self._endpoint: Any = endpoint
        self._name = name
        self._access = access
        self._reactor = reactor
        self._factory = Factory.forProtocol(build)
        self._factory.noisy = False
        self._prepare = prepare
        self._changed = changed
        self._moved = moved
        self._looking = task.LoopingCall(self._look_for_master)
        self._looking.clock = reactor
        self._failures = 0
        self._refused = False
        self._last_problem = ""
        self._life: defer.Deferred[None] = defer.succeed(None)

    def start(self) -> None:
        """Begin to connect."""
        self.running = True
        if self._moved is not None:
            self._looking.start(MOVED_S, now=False)
        self._life = defer.Deferred.fromCoroutine(self._live())

    def stop(self) -> defer.Deferred[None]:
        """Close the connection and make no other; fires when it is closed."""
        self.running = False
        if self._looking.running:
            self._looking.stop()
        self._life.cancel()
        return self._life

    def give_up(self, connection: Any, *, refused: bool = False) -> None:
        """Send nothing more on a connection, and make a new one.

        Args:
            connection: if it is no more in use, nothing happens.
            refused: its Redis answers, but not as it should: it is left alone for a moment.
        """
        if connection is not None and connection is self.connection:
            self._refused = refused
            self._leave(connection)
            connection.transport.abortConnection()

    async def _look_for_master(self) -> None:
        """Leave a master that has been replaced: it may live on for a while and take writes that nobody will see."""
        connection = self.connection
        if connection is not None and self._moved is not None and await self._moved():
            self.log.warn("Redis at {address} has another master now", address=self._name)
            self.give_up(connection)

    async def _live(self) -> None:
        with contextlib.suppress(defer.CancelledError):
            while self.running:
                try:
                    await self._serve(await self._connect())
                except StoreUnavailable as problem:
                    self._note(problem)
                except defer.CancelledError:
                    raise
                except Exception:  # a bug must not be the end of the connection for good
                    self.log.failure("the connection to Redis at {address} broke down", address=self._name)
                    self._refused = True
                await self._pause()

    async def _connect(self) -> Any:
        try:
            return await self._endpoint.connect(self._factory)
        except Exception as error:
            if not self.running:
                raise defer.CancelledError from error
            wrong_address = isinstance(error, NobodyListens) and self._moved is None
            raise StoreUnavailable(
                str(error) or type(error).__name__, hint=_REFUSED_REMEDY if wrong_address else ""
            ) from error

    async def _serve(self, connection: Any) -> None:
        """See a connection through, from its first word to its end."""
        try:
            try:
                standing = await introduce(connection, self._access)
                await self._prepare(connection, standing)
            except txredisapi.RedisError as error:
                raise _explained(connection, error) from error
            self._take(connection, standing)
            await connection.lost()
        finally:
            self._leave(connection)
            await self._close(connection)

    def _take(self, connection: Any, standing: Standing) -> None:
        peer = connection.transport.getPeer()
        self.log.info(
            "connected to Redis at {address}", address=self._name, peer=str(peer), run_id=standing.run_id
        )
        self.connection, self.standing = connection, standing
        self._failures, self._refused, self._last_problem, self.refusal = 0, False, "", ""
        self._tell(True)

    def _leave(self, connection: Any) -> None:
        if connection is self.connection:
            self.connection = None
            if self.running:
                self.log.warn("lost the connection to Redis at {address}", address=self._name)
            self._tell(False)

    def _tell(self, available: bool) -> None:
        try:
            self._changed(available)
        except Exception:
            self.log.failure("whoever follows the connection to Redis has failed")

    async def _close(self, connection: Any) -> None:
        if connection.why is not None:
            return
        if self.running:
            connection.transport.abortConnection()
        else:  # what was said is still sent, but a peer that stands still is not waited for
            connection.transport.loseConnection()
        deadline = self._reactor.callLater(_CLOSE_S, connection.transport.abortConnection)
        await connection.lost()
        if deadline.active():
            deadline.cancel()

    async def _pause(self) -> None:
        """Wait before the next attempt: the longer the more have failed, and with chance in it."""
        delay = min(FIRST_RETRY_S * 2 ** min(self._failures, 10), LONGEST_RETRY_S)
        if self._refused:
            delay = LONGEST_RETRY_S
        if self.running:
            await task.deferLater(self._reactor, delay * random.uniform(0.8, 1.0))

    def _note(self, problem: StoreUnavailable) -> None:
        """Log why an attempt failed: at once if it is news, else rarely."""
        self._failures += 1
        self._refused = isinstance(problem, NotServing)
        text = str(problem)
        self.refusal = text if self._refused else ""
        if text != self._last_problem or self._failures == 10 or self._failures % 60 == 0:
            lasting = isinstance(problem, NotServing) and problem.lasting
            self.log.emit(
                LogLevel.error if lasting else LogLevel.warn,
                "cannot use Redis at {address}, trying on: {problem}",
                address=self._name,
                problem=text,
                attempt=self._failures,
            )
        self._last_problem = text


def _explained(connection: Any, error: Exception) -> StoreUnavailable:
    """Say why the first words on a connection were not answered."""
    why = None if connection.why is None else connection.why.value
    if isinstance(why, SSL.Error):
        reasons = "; ".join(str(entry[-1]) for entry in why.args[0]) if why.args else "closed"
        return NotServing(f"TLS failed: {reasons}", hint=_TLS_REMEDY, lasting=True)
    if isinstance(why, VerificationError):
        return NotServing(
            f"its certificate is for another host: {why.errors}", hint=_TLS_REMEDY, lasting=True
        )
    if isinstance(error, txredisapi.TimeoutError) or why is None:
        return StoreUnavailable(f"it does not answer: {error}")
    return StoreUnavailable(f"it closed the connection: {why}", hint=_CLOSED_REMEDY)
