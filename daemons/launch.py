"""What all daemons share: options, logging, readiness notice, signals, exit codes."""

from __future__ import annotations

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
from fedcore.errors import ConfigError
from fedcore.net import sd_notify, tls
from fedcore.net.reactor import follow_monotonic_clock
from fedcore.observe.log import start_logging
from fedcore.store.redis import Redis

EX_CONFIG = 78  # sysexits.h: the configuration is wrong; systemd shall not restart (RestartPreventExitStatus)

log = Logger()


@dataclass
class Listener:
    """One listening socket.

    Attributes:
        purpose: for logs.
        address: where.
        factory: Twisted protocol factory.
        context: TLS context factory, or None for plain TCP.
    """

    purpose: str
    address: Address
    factory: Any
    context: Any = None


@dataclass
class Daemon:
    """A daemon, built but not started.

    Attributes:
        listeners: opened in this order.
        services: started in this order, stopped in reverse.
        started: called once all listen.
        drain: awaited before anything is stopped.
    """

    listeners: list[Listener]
    services: list[Any]
    started: Callable[[], None] = lambda: None
    drain: Callable[[], Awaitable[None]] | None = None
    _ports: list[IListeningPort] = field(default_factory=list)


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
    """Build the connection to the job's Redis."""
    address = settings.distributed_cache.address
    if settings.enable_ssl:
        log.warn(
            "enable_ssl does not cover the link to Redis at {address} in this version", address=str(address)
        )
    timeouts = settings.fedcore.redis
    endpoint: IStreamClientEndpoint
    if isinstance(address, UnixAddress):
        endpoint = endpoints.UNIXClientEndpoint(reactor, address.path, timeouts.connect_timeout)
    else:
        endpoint = endpoints.HostnameEndpoint(reactor, address.host, address.port, timeouts.connect_timeout)
    return Redis(endpoint, str(address), reply_timeout=timeouts.reply_timeout, on_error=on_error)


def run(name: str, build: Callable[[Any], Daemon | None]) -> int:
    """Build a daemon and run it until it is told to stop.

    Args:
        name: for messages.
        build: given the reactor, returns the daemon, or None if there is nothing to run.

    Returns:
        The exit code: 0 after a clean stop, 78 for a bad configuration, 1 if it could not start.
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
    for port in daemon._ports:
        yield port.stopListening()
    if daemon.drain is not None:
        yield defer.Deferred.fromCoroutine(daemon.drain())  # type: ignore[arg-type]
    for service in reversed(daemon.services):
        yield service.stopService()
