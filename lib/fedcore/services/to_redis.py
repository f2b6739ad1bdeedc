"""The way to the job's Redis, as the configuration describes it: address or Sentinels, plain or TLS."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from twisted.internet import endpoints
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.logger import Logger
from zope.interface import implementer

from fedcore.config import Settings, UnixAddress
from fedcore.config.crosscheck import redis_has_tls
from fedcore.config.keys import plain_text
from fedcore.net import tls
from fedcore.store.link import Access
from fedcore.store.sentinel import Sentinel, SentinelEndpoint

SENTINEL_TIMEOUT_S = 2.0  # for each; a dead one shall not hold up the fail-over that it is part of
log = Logger()

Moved = Callable[[], Awaitable[bool]] | None


def way_to_redis(settings: Settings, sentinel_password: bytes, reactor: Any) -> tuple[Any, str, Moved]:
    """Return how to connect to the job's Redis, its name for messages, and who tells that the master is elsewhere.

    Raises:
        ConfigError: a PEM file cannot be used.
    """
    own, address = settings.fedcore.redis, settings.distributed_cache.address
    to_host = _to_host(settings, reactor)
    if own.sentinels:
        sentinels = [Sentinel(str(one), to_host(one.host, one.port)) for one in own.sentinels]
        endpoint = SentinelEndpoint(
            sentinels,
            own.sentinel_master,
            to_host,
            access=Access(own.sentinel_username, sentinel_password),
            timeout=min(own.connect_timeout, SENTINEL_TIMEOUT_S),
            reactor=reactor,
        )
        return endpoint, f"{own.sentinel_master} of the Sentinels {plain_text(own.sentinels)}", endpoint.moved
    if isinstance(address, UnixAddress):
        return endpoints.UNIXClientEndpoint(reactor, address.path, own.connect_timeout), str(address), None
    return to_host(address.host, address.port), str(address), None


def _to_host(settings: Settings, reactor: Any) -> Callable[[str, int], Any]:
    """Return the function that makes an endpoint for a host and port, with TLS if it is to be."""
    timeout = settings.fedcore.redis.connect_timeout

    def plain(host: str, port: int) -> Any:
        return endpoints.HostnameEndpoint(reactor, host, port, timeout)

    if not redis_has_tls(settings):
        return plain
    cache = settings.distributed_cache
    context = tls.redis_contexts(
        tls.RedisFiles(
            cache.cacert_filename,
            cache.capath,
            cache.cert_filename,
            cache.private_key_filename,
            cache.server_name,
        ),
        lambda sentence: log.warn("{warning}", warning=sentence),
    )
    # the context is asked for at each connection, as its files may have been exchanged
    return lambda host, port: _Encrypted(context, host, plain(host, port))


@implementer(IStreamClientEndpoint)
class _Encrypted:
    """An endpoint with TLS whose certificates are those of the moment."""

    def __init__(self, context: Callable[[str], Any], host: str, plain: Any) -> None:
        self._context = context
        self._host = host
        self._plain = plain

    def connect(self, factory: Any) -> Any:
        endpoint: Any = endpoints.wrapClientTLS(self._context(self._host), self._plain)
        return endpoint.connect(factory)
