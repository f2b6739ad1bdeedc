"""The configuration of a daemon: read at its start, and again at SIGHUP.

Rules kept here:

* What is read again is applied whole or not at all: a bad file, certificate or password changes nothing, and is told.
* Applied are the log's level and the listeners' certificate; connections that stand keep the one they began with. All
  else takes effect at the next start, and is named.
* A password comes from the file that an option or the configuration names, else from the credential that systemd has
  put into $CREDENTIALS_DIRECTORY. systemd fills that folder at a start only, so a changed credential needs one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

from OpenSSL import SSL
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from twisted.internet.ssl import CertificateOptions
from twisted.logger import Logger
from zope.interface import implementer

from fedcore.config import KEYS, LoadedSettings, Role, Settings, load_settings, unsupported
from fedcore.errors import ConfigError
from fedcore.net import tls
from fedcore.observe.log import Log, start_logging

SERVER_PASSWORD = "server-password"
CLIENT_PASSWORD = "client-password"
REDIS_PASSWORD = "redis-password"
SENTINEL_PASSWORD = "sentinel-password"
CREDENTIALS_HELP = f"""
\b
Passwords: where no file is named for one, it is the credential of systemd (LoadCredential=) called
  {SERVER_PASSWORD}, {CLIENT_PASSWORD}, {REDIS_PASSWORD} or {SENTINEL_PASSWORD},
a file in $CREDENTIALS_DIRECTORY; one that is missing or empty means that there is no password.
"""
_LEVEL = "fedcore.log.level"
_CERTIFICATE = ("ssl.server_cert_path", "ssl.cipher_list")

log = Logger()


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
        raise ConfigError(
            f"cannot read the password file {path}: {problem.strerror}",
            hint="check the path, and that the daemon's user may read it",
        ) from problem


def credential(name: str, environ: Mapping[str, str] = os.environ) -> bytes:
    """Return the password that systemd gives under a name, b"" if there is none.

    Raises:
        ConfigError: it is there and cannot be read.
    """
    directory = environ.get("CREDENTIALS_DIRECTORY", "")
    path = Path(directory) / name
    return read_password(path) if directory and path.exists() else b""


def password_of(named: Path | None, name: str) -> bytes:
    """Return the password in the file that is named, or the credential where none is.

    Raises:
        ConfigError: the file cannot be read, or its first line is empty.
    """
    if named is None:
        return credential(name)
    password = read_password(named)
    if not password:
        raise ConfigError(
            f"the first line of the password file {named} is empty", hint="put the password there"
        )
    return password


@implementer(IOpenSSLServerConnectionCreator)
class RenewableContext:
    """The TLS context of listeners; it may be exchanged while they listen.

    Attributes:
        current: the one that new connections get.
    """

    def __init__(self, current: CertificateOptions) -> None:
        self.current = current

    def serverConnectionForTLS(self, protocol: Any) -> SSL.Connection:
        """Make what encrypts a new connection."""
        return SSL.Connection(self.current.getContext(), None)


class Configuration:
    """What a daemon was told.

    Attributes:
        settings: those of the start.
        problem: why the last reading was refused, in a line; "" if it was not.
    """

    def __init__(self, path: Path, role: Role, loaded: LoadedSettings, its_log: Log) -> None:
        """Use ``read``."""
        self.settings = loaded.settings
        self.problem = ""
        self._path = path
        self._role = role
        self._log = its_log
        self._in_force = _values(loaded.settings)
        self._context: RenewableContext | None = None
        self._password_file: Path | None = None

    @classmethod
    def read(cls, path: Path, role: Role) -> Configuration:
        """Read the file and start the log.

        Raises:
            ConfigError: it cannot be used.
        """
        loaded = _load(path, role)
        its_log = start_logging(sys.stderr, loaded.settings.fedcore.log.level.value)
        _warn(loaded)
        return cls(path, role, loaded, its_log)

    def listening_context(self, password_file: Path | None) -> RenewableContext | None:
        """Return the TLS context of the listeners, None while enable_ssl is off.

        Raises:
            ConfigError: certificate, password or cipher list cannot be used.
        """
        if self.settings.enable_ssl:
            self._password_file = password_file
            self._context = RenewableContext(_certificate(self.settings, password_file))
        return self._context

    def read_again(self) -> None:
        """Read the file and the certificate again, and apply what can be applied now; nothing is raised."""
        try:
            loaded = _load(self._path, self._role)
            values, renewed = _values(loaded.settings), None
            if self._context is not None and loaded.settings.enable_ssl:
                renewed = _certificate(loaded.settings, self._password_file)
        except ConfigError as fault:
            first, *others = str(fault).splitlines()
            self.problem = f"{first} (and {len(others)} more, see the log)" if others else first
            log.error("not reloaded, what was in force stays in force: {problem}", problem=str(fault))
            return
        except Exception:
            self.problem = "see the log"
            log.failure("not reloaded, what was in force stays in force")
            return
        self.problem = ""
        _warn(loaded)
        applied = [_LEVEL]
        self._log.show(loaded.settings.fedcore.log.level.value)
        if self._context is not None and renewed is not None:
            self._context.current = renewed
            applied += _CERTIFICATE
        self._in_force |= {path: values[path] for path in applied}
        later = [path for path, value in values.items() if value != self._in_force[path]]
        if later:
            log.warn("takes effect at the next start: {keys}", keys=", ".join(later))
        log.info("reloaded {path}", path=str(self._path), certificate=renewed is not None)


def _load(path: Path, role: Role) -> LoadedSettings:
    loaded = load_settings(path, role)
    faults = unsupported(loaded.settings, role)
    if faults:
        raise ConfigError("\n".join(faults))
    return loaded


def _warn(loaded: LoadedSettings) -> None:
    for warning in loaded.warnings:
        log.warn("{warning}", warning=warning)


def _values(settings: Settings) -> dict[str, object]:
    return {key.path: attrgetter(key.path)(settings) for key in KEYS}


def _certificate(settings: Settings, password_file: Path | None) -> CertificateOptions:
    password = credential(SERVER_PASSWORD) if password_file is None else read_password(password_file)
    return tls.listening_context(
        Path(settings.ssl.server_cert_path),
        password,
        settings.ssl.cipher_list,
        datetime.now(UTC),
        lambda sentence: log.warn("{warning}", warning=sentence),
    )
