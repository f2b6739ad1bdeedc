"""What all daemons share: options, the way to Redis, notices to systemd, signals, exit codes."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from twisted.internet import defer, error, reactor, task
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure

from fedcore import __version__
from fedcore.config import Address, Settings
from fedcore.errors import ConfigError, FedcoreError
from fedcore.net.reactor import follow_monotonic_clock
from fedcore.net.sd_notify import Notifier
from fedcore.net.tls import Links
from fedcore.observe.log import complain
from fedcore.observe.metrics import CommonMetrics
from fedcore.services.certificate_watch import CertificateWatch
from fedcore.services.supervision import Supervision
from fedcore.services.to_redis import Moved, way_to_redis
from fedcore.store.link import Access
from fedcore.store.notices import Notices
from fedcore.store.redis import Redis
from fldaemons.configuration import (
    CREDENTIALS_HELP,
    REDIS_PASSWORD,
    SENTINEL_PASSWORD,
    Configuration,
    PasswordFiles,
    password_of,
)

EX_CONFIG = 78  # sysexits.h: the configuration is wrong; systemd shall not restart (RestartPreventExitStatus)
ENDING = (signal.SIGTERM, signal.SIGINT)
TURNS = 3  # of the reactor before a stop: what has arrived is accepted and read first, not reset
EXTENSION_S = 15.0  # that a stop asks for, again and again
# For all of a stop: 10 s for requests, 10 s to hand over, 2 s for other nodes, and Redis' answers.
STOP_LIMIT_S = 90.0

# Whether it can be used is found out by using it: that fault is one of the configuration, and is told to systemd.
FILE = click.Path(path_type=Path, readable=False)

_LISTEN_REMEDIES = {
    errno.EADDRINUSE: "end what uses it (perhaps this daemon, started twice), or choose another address",
    errno.EADDRNOTAVAIL: "this host does not have that address: choose another one",
    errno.EACCES: "a port below 1024 needs a right that the daemon's user lacks: choose a higher one",
}

SIGNALS_HELP = """
\b
Signals:
  SIGTERM, SIGINT   end in order: finish what is under way, hand over what is held
  SIGHUP            read the configuration again: the log's level, certificates, authorities and revocation lists
                    change at once, the rest at the next start; on a terminal it ends the daemon, as SIGTERM does
"""
EXIT_CODES_HELP = """
\b
Exit codes:
  0   it was told to stop
  78  the configuration cannot be used: mend it first
  2   the command line cannot be used: an unknown option, a value of the wrong kind
  1   it could not start or go on: a new start may help
"""
COMMON_HELP = CREDENTIALS_HELP + SIGNALS_HELP

log = Logger()


@dataclass
class Listener:
    """One listening socket.

    Attributes:
        purpose: for logs.
        address: where.
        factory: Twisted protocol factory.
        context: makes the TLS of new connections; None for plain TCP.
        stays: whether it listens until the drain is over; others close before it.
        shut: tells whether who connects would be served badly yet; then nobody listens, so that balancers and clients
            go elsewhere. Asked once everything listens, and once a second until it is False for the first time.
        is_open: whether it listens.
    """

    purpose: str
    address: Address
    factory: Any
    context: Any = None
    stays: bool = False
    shut: Callable[[], bool] = lambda: False
    is_open: bool = False

    def listen(self, reactor: Any) -> IListeningPort:
        """Open the socket.

        Raises:
            FedcoreError: the address cannot be listened at.
        """
        factory = self.factory
        if self.context is not None:
            factory = TLSMemoryBIOFactory(self.context, False, factory)
        try:
            port: IListeningPort = reactor.listenTCP(
                self.address.port, factory, interface=self.address.host, backlog=1024
            )
        except error.CannotListenError as problem:
            cause = problem.socketError
            raise FedcoreError(
                f"cannot listen at {self.address} ({self.purpose}): {cause.strerror or cause}",
                hint=_LISTEN_REMEDIES.get(cause.errno, "choose another address"),
            ) from cause
        log.info("{purpose} at {address}", purpose=self.purpose, address=str(self.address))
        self.is_open = True
        return port


@dataclass
class Daemon:
    """A daemon, built but not started.

    Attributes:
        configuration: what it was told.
        listeners: opened in this order.
        services: started in this order, stopped in reverse.
        status: gives what it is about, in a line.
        follow: given a function that is to be called whenever the status may have changed; what calls nobody is seen
            within a second.
        alive: tells, given the seconds in which the process ran since the last question, whether all is well that a new
            process would mend; asked for systemd's watchdog.
        started: called once all listen, before anybody is served.
        drain: awaited before anything is stopped.
        last_work: gives the seconds that work in threads may still take once everything is stopped.
        fault: why it ended by itself, None if it did not.
        stopping: whether its end has begun.
    """

    configuration: Configuration
    listeners: list[Listener]
    services: list[Any]
    status: Callable[[], str]
    follow: Callable[[Callable[[], None]], None] = lambda changed: None
    alive: Callable[[float], bool] = lambda seconds: True
    started: Callable[[], None] = lambda: None
    drain: Callable[[], Awaitable[None]] | None = None
    last_work: Callable[[], float] = lambda: EXTENSION_S
    fault: FedcoreError | None = None
    stopping: bool = False
    _ports: list[tuple[Listener, IListeningPort]] = field(default_factory=list)

    def status_line(self) -> str:
        """Return what systemd shows: what the daemon is about, and whether it follows another configuration."""
        problem = self.configuration.problem
        return f"{self.status()}; NOT RELOADED: {problem}" if problem else self.status()

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
            both_spellings("--yaml-config", required=True, type=FILE, help="Configuration file."),
            both_spellings("--admin-address", help="host:port of /metrics, /livez and /readyz."),
            both_spellings(
                "--server-password-file",
                type=FILE,
                help="File with the password of ssl.server_cert_path; see Passwords.",
            ),
            both_spellings(
                "--client-password-file",
                type=FILE,
                help="File with the password of ssl.client_cert_path; see Passwords.",
            ),
            both_spellings("--check-config", is_flag=True, help="Check the configuration and exit."),
            click.version_option(__version__, message="%(prog)s %(version)s"),
        )
    ):
        command = option(command)
    return command


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


def links_of(configuration: Configuration, options: Mapping[str, Any], reactor: Any) -> Links | None:
    """Return the TLS of a daemon's links, None if it has none, given the options of its command line.

    Raises:
        ConfigError: a certificate, password, authority, revocation list or the cipher list cannot be used.
    """
    files = PasswordFiles(options["server_password_file"], options["client_password_file"])
    return configuration.links(files, reactor.seconds)


def certificate_watch(
    configuration: Configuration, links: Links | None, metrics: CommonMetrics, reactor: Any
) -> list[CertificateWatch]:
    """Return the service that warns of certificates that end, if there are any."""
    if links is None:
        return []
    return [CertificateWatch(links, lambda: configuration.warning_days, metrics, reactor)]


def _redis_access(settings: Settings) -> Access:
    own = settings.fedcore.redis
    return Access(own.username, _password(own.password_file, REDIS_PASSWORD), own.database)


def _way_to_redis(settings: Settings, reactor: Any) -> tuple[Any, str, Moved]:
    return way_to_redis(
        settings, _password(settings.fedcore.redis.sentinel_password_file, SENTINEL_PASSWORD), reactor
    )


def _password(named: str, name: str) -> bytes:
    return password_of(Path(named) if named else None, name)


def _warn_if_others_can_read(path: str) -> None:
    # systemd's LoadCredential gives access by an ACL, whose mask looks like a right of the group
    if path and not Path(path).absolute().is_relative_to("/run/credentials"):
        try:
            open_to_others = Path(path).stat().st_mode & 0o077
        except OSError:
            return  # whoever reads it says so
        if open_to_others:
            log.warn("others can read the password file {path}: chmod 600 it", path=path)


def run(name: str, build: Callable[[Any, Notifier], Daemon | None]) -> int:
    """Build a daemon and run it until it is told to stop.

    Args:
        name: for messages.
        build: given the reactor and the way to systemd, returns the daemon, or None if there is nothing to run.

    Returns:
        The exit code: 0 after a clean stop, 78 for a bad configuration, 1 if it could not start or go on.
    """
    follow_monotonic_clock(reactor)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nothing is in force yet that could be old
    notifier = Notifier.of(os.environ, os.getpid())
    notifier.status("starting")
    try:
        daemon = build(reactor, notifier)
        if daemon is None:
            return 0
        _start(daemon, reactor)
    except Exception as problem:
        return _failed(name, notifier, problem)
    supervision = Supervision(notifier, daemon.status_line, daemon.alive, reactor)
    signal.signal(signal.SIGHUP, _on_hangup(daemon, notifier, reactor))
    reactor.addSystemEventTrigger("before", "shutdown", _stop, daemon, notifier, supervision, reactor)  # type: ignore[attr-defined]
    set_apart_what_stays()
    notifier.ready(daemon.status_line())
    supervision.startService()
    daemon.follow(supervision.changed)
    reactor.callWhenRunning(_let_signals_end, daemon, reactor)  # type: ignore[attr-defined]
    reactor.run()  # type: ignore[attr-defined]
    for number in (signal.SIGHUP, *ENDING):  # one more would kill an interpreter that is ending in order
        signal.signal(number, signal.SIG_IGN)
    log.info("{name} has stopped", name=name)
    return 0 if daemon.fault is None else _failed(name, notifier, daemon.fault)


def set_apart_what_stays() -> None:
    """Have garbage collections pass over all that is there now, modules and their contents above all.

    A full collection would look through it, which takes 40 ms and more, in whatever thread it comes upon: the
    reactor's as well, and with the interpreter's lock. What comes later is looked through in one or two.
    """
    gc.collect()
    gc.freeze()


def _failed(name: str, notifier: Notifier, problem: Exception) -> int:
    """Tell everybody why a daemon ends; return its exit code."""
    text = str(problem) if isinstance(problem, FedcoreError | OSError) else repr(problem)
    if not isinstance(problem, FedcoreError | OSError):
        complain(sys.stderr, "".join(traceback.format_exception(problem)))
        text += " (this is a bug: please report it with the log)"
    complain(sys.stderr, f"{name}: {text}")
    notifier.failed(text, errno_of(problem))
    return EX_CONFIG if isinstance(problem, ConfigError) else 1


def errno_of(problem: BaseException | None) -> int | None:
    """Return the system's error number behind an exception, None if there is none."""
    while problem is not None:
        if isinstance(problem, OSError) and (problem.errno or 0) > 0:  # below 0 are those of getaddrinfo
            return problem.errno
        problem = problem.__cause__
    return None


def _on_hangup(daemon: Daemon, notifier: Notifier, reactor: Any) -> Callable[[int, Any], None]:
    """Return what a SIGHUP does: it has the configuration read again, or says that the daemon's terminal is gone."""

    def reload() -> None:
        if not daemon.stopping:
            notifier.reloading()
            daemon.configuration.read_again()
            notifier.ready(daemon.status_line())

    then = daemon.leave if sys.stderr.isatty() else reload
    return lambda number, frame: reactor.callFromThread(then)


def _let_signals_end(daemon: Daemon, reactor: Any) -> None:
    """Let SIGTERM and SIGINT end a daemon that runs, however often they come.

    Twisted's own handlers, in whose place these are put, take a second signal for a fault of the program.
    """

    def end(number: int, frame: Any) -> None:
        reactor.callFromThread(daemon.leave)

    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's "&" leaves SIGINT to others
            signal.signal(number, end)


def _start(daemon: Daemon, reactor: Any) -> None:
    """Open the listeners and start the services.

    Raises:
        FedcoreError: an address cannot be listened at.
    """
    daemon._ports = [(listener, listener.listen(reactor)) for listener in daemon.listeners]
    for service in daemon.services:
        service.startService()
    daemon.started()
    for entry in list(daemon._ports):
        if entry[0].shut():
            _shut(daemon, entry, reactor)


def _shut(daemon: Daemon, entry: tuple[Listener, IListeningPort], reactor: Any) -> None:
    """Close a listener until who connects is served well."""
    listener, port = entry
    log.warn(
        "{purpose} at {address} is shut for now", purpose=listener.purpose, address=str(listener.address)
    )
    daemon._ports.remove(entry)
    port.stopListening()
    listener.is_open = False

    def look() -> None:
        if daemon.stopping:
            looking.stop()
        elif not listener.shut():
            looking.stop()
            daemon._ports.append((listener, listener.listen(reactor)))

    def failed(failure: Failure) -> None:
        problem = failure.value
        daemon.give_up(problem if isinstance(problem, FedcoreError) else FedcoreError(str(problem)))

    looking = task.LoopingCall(look)
    looking.clock = reactor
    looking.start(1.0, now=False).addErrback(failed)


@defer.inlineCallbacks
def _stop(daemon: Daemon, notifier: Notifier, supervision: Supervision, reactor: Any) -> Any:
    """Stop in order; systemd is asked for time as long as the steps take, but not for longer than STOP_LIMIT_S."""
    daemon.stopping = True
    notifier.stopping()
    limit = reactor.seconds() + STOP_LIMIT_S
    renewing = task.LoopingCall(
        lambda: notifier.extend(EXTENSION_S) if reactor.seconds() < limit else renewing.stop()
    )
    renewing.clock = reactor
    renewing.start(EXTENSION_S / 3)
    for _ in range(TURNS):
        yield task.deferLater(reactor, 0, lambda: None)
    for listener, port in daemon._ports:
        if not listener.stays:
            yield port.stopListening()
    if daemon.drain is not None:
        yield defer.Deferred.fromCoroutine(daemon.drain())  # type: ignore[arg-type]
    for listener, port in daemon._ports:
        if listener.stays:
            yield port.stopListening()
    for service in reversed(daemon.services):
        yield service.stopService()
    if renewing.running:
        renewing.stop()
    notifier.extend(daemon.last_work())
    supervision.stopService()
