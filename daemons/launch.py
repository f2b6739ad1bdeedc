"""What all daemons share: options, logging, readiness notice, signals, exit codes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from twisted.internet import defer, endpoints, error, reactor
from twisted.internet.interfaces import IListeningPort, IStreamClientEndpoint
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOFactory

from fedcore import __version__
from fedcore.config import (
    Address,
    Role,
    Settings,
    UnixAddress,
    load_settings,
    unsupported,
)
from fedcore.config.crosscheck import redis_has_tls
from fedcore.config.keys import plain_text
from fedcore.errors import ConfigError, FedcoreError
from fedcore.net import sd_notify, tls
from fedcore.net.reactor import follow_monotonic_clock
from fedcore.observe.log import start_logging
from fedcore.store.link import Access
from fedcore.store.notices import Notices
from fedcore.store.redis import Redis
from fedcore.store.sentinel import Sentinel, SentinelEndpoint

EX_CONFIG = 78  # sysexits.h: the configuration is wrong; systemd shall not restart (RestartPreventExitStatus)
SENTINEL_TIMEOUT_S = 2.0  # for each; a dead one shall not hold up the fail-over that it is part of

log = Logger()


@dataclass
class Listener:
    """One listening socket.

    Attributes:
        purpose: for logs.
        address: where.
        factory: Twisted protocol factory.
        context: TLS context factory, or None for plain TCP.
        stays: whether it listens until the drain is over; others close before it.
    """

    purpose: str
    address: Address
    factory: Any
    context: Any = None
    stays: bool = False


@dataclass
class Daemon:
    """A daemon, built but not started.

    Attributes:
        listeners: opened in this order.
        services: started in this order, stopped in reverse.
        started: called once all listen.
        drain: awaited before anything is stopped.
        fault: why it ended by itself, None if it did not.
    """

    listeners: list[Listener]
    services: list[Any]
    started: Callable[[], None] = lambda: None
    drain: Callable[[], Awaitable[None]] | None = None
    fault: FedcoreError | None = None
    _ports: list[IListeningPort] = field(default_factory=list)

    def give_up(self, fault: FedcoreError) -> None:
        """End because of a fault that turned up after the start and that waiting does not mend.

        A ConfigError is for somebody to mend; after any other fault a new start may help.
        """
        self.fault = fault
        self.leave()

    def leave(self) -> None:
        """End as after SIGTERM."""
        with contextlib.suppress(error.ReactorNotRunning):
            reactor.stop()  # type: ignore[attr-defined]


def both_spellings(*names: str, **kwargs: Any) -> Callable[[Any], Any]:
    """Declare an option in both spellings: --yaml-config and --yaml_config."""
    spellings = [
        spelling for name in names for spelling in dict.fromkeys((name, "--" + name[2:].replace("-", "_")))
    ]
    return click.option(*spellings, **kwargs)


def common_options(command: Any) -> Any:
    """Add the options that every daemon has."""
    for option in reversed(
        (
            both_spellings(
                "--yaml-config", required=True, type=click.Path(path_type=Path), help="Configuration file."
            ),
            both_spellings("--admin-address", help="host:port of /metrics, /livez and /readyz."),
            both_spellings(
                "--server-password-file",
                type=click.Path(path_type=Path),
                help="File with the password of ssl.server_cert_path.",
            ),
            both_spellings(
                "--client-password-file",
                type=click.Path(path_type=Path),
                help="File with the password of ssl.client_cert_path.",
            ),
            both_spellings("--check-config", is_flag=True, help="Check the configuration and exit."),
            click.version_option(__version__, message="%(prog)s %(version)s"),
        )
    ):
        command = option(command)
    return command


def configure(path: Path, role: Role) -> Settings:
    """Read the configuration and start the log.

    Raises:
        ConfigError: it cannot be used.
    """
    loaded = load_settings(path, role)
    faults = unsupported(loaded.settings, role)
    if faults:
        raise ConfigError("\n".join(faults))
    start_logging(sys.stderr, loaded.settings.fedcore.log.level.value)
    for warning in loaded.warnings:
        log.warn("{warning}", warning=warning)
    return loaded.settings


def read_password(path: Path | None) -> bytes:
    """Return the first line of a password file, b"" if there is none.

    Raises:
        ConfigError: the file cannot be read.
    """
    if path is None:
        return b""
    try:
        return path.read_bytes().split(b"\n", 1)[0].rstrip(b"\r")
    except OSError as problem:
        raise ConfigError(f"cannot read the password file {path}: {problem.strerror}") from problem


def listening_context(settings: Settings, password_file: Path | None) -> Any:
    """Return the TLS context of a listener, None while enable_ssl is off.

    Raises:
        ConfigError: certificate, password or cipher list cannot be used.
    """
    if not settings.enable_ssl:
        return None
    return tls.listening_context(
        Path(settings.ssl.server_cert_path),
        read_password(password_file),
        settings.ssl.cipher_list,
        datetime.now(UTC),
        lambda sentence: log.warn("{warning}", warning=sentence),
    )


def redis_of(settings: Settings, on_error: Callable[[], None], reactor: Any) -> Redis:
    """Build the connection to the job's Redis.

    Raises:
        ConfigError: a password or PEM file cannot be used.
    """
    own = settings.fedcore.redis
    for path in (own.password_file, own.sentinel_password_file):
        _warn_if_others_can_read(path)
    endpoint, name, moved = _way_to_redis(settings, reactor)
    return Redis(
        endpoint,
        name,
        reply_timeout=own.reply_timeout,
        on_error=on_error,
        reactor=reactor,
        access=_redis_access(settings),
        moved=moved,
    )


def notices_of(settings: Settings, heard: Callable[[bytes], None], reactor: Any) -> Notices:
    """Build the connection on which Redis tells what the job's nodes publish.

    Args:
        settings: the same as for ``redis_of``.
        heard: see Notices.
        reactor: the reactor.

    Raises:
        ConfigError: as for ``redis_of``.
    """
    endpoint, name, moved = _way_to_redis(settings, reactor)
    return Notices(
        endpoint,
        name,
        heard,
        reply_timeout=settings.fedcore.redis.reply_timeout,
        reactor=reactor,
        access=_redis_access(settings),
        moved=moved,
    )


def _redis_access(settings: Settings) -> Access:
    own = settings.fedcore.redis
    return Access(own.username, _password_of(own.password_file), own.database)


_Moved = Callable[[], Awaitable[bool]] | None


def _way_to_redis(settings: Settings, reactor: Any) -> tuple[IStreamClientEndpoint, str, _Moved]:
    """Return how to connect to the job's Redis, its name for messages, and who tells that the master is elsewhere."""
    own, address = settings.fedcore.redis, settings.distributed_cache.address
    to_host = _to_host(settings, reactor)
    if own.sentinels:
        sentinels = [Sentinel(str(one), to_host(one.host, one.port)) for one in own.sentinels]
        endpoint = SentinelEndpoint(
            sentinels,
            own.sentinel_master,
            to_host,
            access=Access(own.sentinel_username, _password_of(own.sentinel_password_file)),
            timeout=min(own.connect_timeout, SENTINEL_TIMEOUT_S),
            reactor=reactor,
        )
        return endpoint, f"{own.sentinel_master} of the Sentinels {plain_text(own.sentinels)}", endpoint.moved
    if isinstance(address, UnixAddress):
        return endpoints.UNIXClientEndpoint(reactor, address.path, own.connect_timeout), str(address), None
    return to_host(address.host, address.port), str(address), None


def _to_host(settings: Settings, reactor: Any) -> Callable[[str, int], IStreamClientEndpoint]:
    """Return the function that makes an endpoint for a host and port, with TLS if it is to be."""
    timeout = settings.fedcore.redis.connect_timeout

    def plain(host: str, port: int) -> IStreamClientEndpoint:
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
        )
    )
    return lambda host, port: endpoints.wrapClientTLS(context(host), plain(host, port))


def _password_of(path: str) -> bytes:
    """Return the password in a file, b"" if no file is named.

    Raises:
        ConfigError: the file cannot be read, or its first line is empty.
    """
    password = read_password(Path(path) if path else None)
    if path and not password:
        raise ConfigError(
            f"the first line of the password file {path} is empty", hint="put the password there"
        )
    return password


def _warn_if_others_can_read(path: str) -> None:
    # systemd's LoadCredential gives access by an ACL, whose mask looks like a right of the group
    if path and not Path(path).absolute().is_relative_to("/run/credentials"):
        try:
            open_to_others = Path(path).stat().st_mode & 0o077
        except OSError:
            return  # whoever reads it says so
        if open_to_others:
            log.warn("others can read the password file {path}: chmod 600 it", path=path)


def run(name: str, build: Callable[[Any], Daemon | None]) -> int:
    """Build a daemon and run it until it is told to stop.

    Args:
        name: for messages.
        build: given the reactor, returns the daemon, or None if there is nothing to run.

    Returns:
        The exit code: 0 after a clean stop, 78 for a bad configuration, 1 if it could not start or go on.
    """
    follow_monotonic_clock(reactor)
    try:
        daemon = build(reactor)
    except ConfigError as problem:
        print(f"{name}: {problem}", file=sys.stderr)
        return EX_CONFIG
    if daemon is None:
        return 0
    try:
        _start(daemon, reactor)
    except error.CannotListenError as problem:
        where = f"{problem.interface or '*'}:{problem.port}"
        cause = problem.socketError.strerror or problem.socketError
        print(
            f"{name}: cannot listen at {where}: {cause}; choose another address or end what uses it",
            file=sys.stderr,
        )
        return 1
    notify_socket = os.environ.get("NOTIFY_SOCKET")
    reactor.addSystemEventTrigger("before", "shutdown", _stop, daemon, notify_socket)  # type: ignore[attr-defined]
    sd_notify.notify(notify_socket, "READY=1")
    daemon.started()
    reactor.run()  # type: ignore[attr-defined]
    log.info("{name} has stopped", name=name)
    if daemon.fault is not None:
        print(f"{name}: {daemon.fault}", file=sys.stderr)
        return EX_CONFIG if isinstance(daemon.fault, ConfigError) else 1
    return 0


def _start(daemon: Daemon, reactor: Any) -> None:
    for listener in daemon.listeners:
        factory = listener.factory
        if listener.context is not None:
            factory = TLSMemoryBIOFactory(listener.context, False, factory)
        host = listener.address.host
        daemon._ports.append(reactor.listenTCP(listener.address.port, factory, interface=host, backlog=1024))
        log.info("{purpose} at {address}", purpose=listener.purpose, address=str(listener.address))
    for service in daemon.services:
        service.startService()


@defer.inlineCallbacks
def _stop(daemon: Daemon, notify_socket: str | None) -> Any:
    sd_notify.notify(notify_socket, "STOPPING=1")
    for listener, port in zip(daemon.listeners, daemon._ports, strict=True):
        if not listener.stays:
            yield port.stopListening()
    if daemon.drain is not None:
        yield defer.Deferred.fromCoroutine(daemon.drain())  # type: ignore[arg-type]
    for listener, port in zip(daemon.listeners, daemon._ports, strict=True):
        if listener.stays:
            yield port.stopListening()
    for service in reversed(daemon.services):
        yield service.stopService()
