"""Asks the job's Redis for ``fl doctor``, with the daemons' own adapter, and tries the ways to the other nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from twisted.internet import defer, endpoints, error, protocol
from twisted.logger import globalLogPublisher

from fedcore.config import Settings
from fedcore.errors import ConfigError, StoreError
from fedcore.services.to_redis import way_to_redis
from fedcore.store import keys
from fedcore.store.link import Access
from fedcore.store.redis import Redis
from fedctl.doctor.findings import Finding, failed, of_clock, of_nodes, ok
from fedctl.doctor.host import Secrets

REACH_S = 3.0  # for another node
T = TypeVar("T")


async def examine(settings: Settings, secrets: Secrets, reactor: Any) -> list[Finding]:
    """Find out whether Redis serves us, what its clock says, and whether the servers that it lists can be reached."""
    own = settings.fedcore.redis
    try:
        endpoint, name, moved = way_to_redis(settings, secrets.sentinel, reactor)
    except ConfigError as fault:
        return [
            failed("redis", str(fault.args[0]), fault.hint or "check distributed_cache and fedcore.redis")
        ]
    redis = Redis(
        endpoint,
        name,
        reply_timeout=own.reply_timeout,
        on_error=lambda: None,
        reactor=reactor,
        access=Access(own.username, secrets.redis, own.database),
        moved=moved,
    )
    connecting = defer.Deferred.fromCoroutine(redis.connected())
    connecting.addTimeout(own.connect_timeout + own.reply_timeout, reactor)
    with _problems(connecting.cancel) as problems:
        redis.startService()
        try:
            await connecting
            return await _ask(settings, redis, name, reactor)
        except (defer.CancelledError, defer.TimeoutError, StoreError) as problem:
            reason = problems[0] if problems else str(problem) or "no answer"
            return [
                failed(
                    "redis",
                    f"{name}: {reason}",
                    "until then no daemon is ready; check distributed_cache.address, the firewall between the hosts, "
                    "and systemctl status redis-server there",
                )
            ]
        finally:
            await redis.stopService()


@contextmanager
def _problems(heard_one: Callable[[], None]) -> Iterator[list[str]]:
    """Collect what the adapter says about Redis, the first complaint first; it would go on trying."""
    heard: list[str] = []

    def observe(event: Mapping[str, Any]) -> None:
        if event.get("log_namespace", "").startswith("fedcore.store") and "problem" in event:
            heard.append(str(event["problem"]))
            heard_one()

    globalLogPublisher.addObserver(observe)  # type: ignore[arg-type]
    try:
        yield heard
    finally:
        globalLogPublisher.removeObserver(observe)  # type: ignore[arg-type]


async def _ask(settings: Settings, redis: Redis, name: str, reactor: Any) -> list[Finding]:
    replicas = f", {redis.replicas} replicas follow" if redis.replicas else ""
    sent = time.time()
    seconds, micros = await redis.command("TIME")
    heard = time.time()
    offset = int(seconds) + int(micros) / 1e6 - (sent + heard) / 2
    return [
        ok("redis", f"{name} answers as master{replicas}, in {(heard - sent) * 1000:.1f} ms"),
        of_clock(offset, (heard - sent) / 2),
        *of_nodes(await _reach(await _servers(settings, redis), reactor)),
    ]


async def _servers(settings: Settings, redis: Redis) -> list[str]:
    """Return the addresses of all living servers; unlike the daemons' own list this forgets nobody."""
    instance = await redis.command("GET", keys.instance_name(settings.fl_name))
    if instance is None:
        return []
    names = keys.InstanceKeys(settings.fl_name, instance.decode())
    listed = await redis.command("HGETALL", names.nodes("server"))
    alive: list[str] = []
    for node_id, address in zip(listed[::2], listed[1::2], strict=True):
        if await redis.command("EXISTS", names.heartbeat("server", node_id.decode())):
            alive.append(address.decode())
    return sorted(alive)


async def _reach(addresses: list[str], reactor: Any) -> dict[str, str]:
    """Try to connect to nodes; return address -> why not, "" for success."""
    tries = [defer.Deferred.fromCoroutine(_connect(address, reactor)) for address in addresses]
    return dict(zip(addresses, await defer.gatherResults(tries), strict=True))


async def _connect(address: str, reactor: Any) -> str:
    host, _, port = address.rpartition(":")
    endpoint: Any = endpoints.HostnameEndpoint(reactor, host.strip("[]"), int(port), REACH_S)
    try:
        connection = await endpoint.connect(protocol.Factory.forProtocol(protocol.Protocol))
    except (error.ConnectError, OSError) as problem:
        return str(problem)
    connection.transport.abortConnection()
    return ""


def run(work: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine on the process's reactor, which can be done once."""
    from twisted.internet import reactor

    outcome: list[Any] = []
    our: Any = reactor

    def begin() -> None:
        done = defer.Deferred.fromCoroutine(work(our))
        done.addBoth(outcome.append).addBoth(lambda _: our.stop())

    our.callWhenRunning(begin)
    our.run(installSignalHandlers=False)
    (result,) = outcome
    if hasattr(result, "raiseException"):
        result.raiseException()
    found: T = result
    return found
