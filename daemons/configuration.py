"""The configuration of a daemon: read at its start, and again at SIGHUP.

Rules kept here:

* What is read again is applied whole or not at all: a bad file, certificate or password changes nothing, and is told.
* Applied are the log's level and all certificates, authorities and revocation lists; connections that stand keep those
  they began with, but for nodes whose certificate is revoked by now. All else takes effect at the next start, and is
  named.
* A password comes from the file that an option or the configuration names, else from the credential that systemd has
  put into $CREDENTIALS_DIRECTORY. systemd fills that folder at a start only, so a changed credential needs one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path

from twisted.logger import Logger

from fedcore.config import KEYS, LoadedSettings, Role, Settings, load_settings, unsupported
from fedcore.config.crosscheck import redis_has_tls
from fedcore.errors import ConfigError
from fedcore.net import tls
from fedcore.observe.log import Log, start_logging
from fedcore.pki.expiry import Use

SERVER_PASSWORD = "server-password"
CLIENT_PASSWORD = "client-password"
REDIS_PASSWORD = "redis-password"
SENTINEL_PASSWORD = "sentinel-password"
OPERATOR_TOKEN = "operator-token"
CREDENTIALS_HELP = f"""
\b
Passwords: where no file is named for one, it is the credential of systemd (LoadCredential=) called
  {SERVER_PASSWORD}, {CLIENT_PASSWORD}, {REDIS_PASSWORD} or {SENTINEL_PASSWORD},
a file in $CREDENTIALS_DIRECTORY; one that is missing or empty means that there is no password. fl-schedulerd looks
there for the {OPERATOR_TOKEN} too, which requests must carry that change the job.
"""
_LEVEL = "fedcore.log.level"
# What new contexts follow: files and their contents, who is trusted.
_RENEWED = (
    "ssl.server_cert_path",
    "ssl.client_cert_path",
    "ssl.ca_cert_path",
    "ssl.crl_path",
    "ssl.cipher_list",
    "ssl.cert_expire_warning_time_in_day",
    "fedcore.node.tls_names",
    "fedcore.device.client_certificates",
    "fedcore.device.client_ca_path",
    "fedcore.scheduler.client_certificates",
    "fedcore.scheduler.client_ca_path",
)

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


@dataclass(frozen=True, slots=True)
class PasswordFiles:
    """Where the passwords of the PKCS#12 files are; None: systemd's credentials.

    Attributes:
        server: of ssl.server_cert_path.
        client: of ssl.client_cert_path.
    """

    server: Path | None
    client: Path | None


class Configuration:
    """What a daemon was told.

    Attributes:
        settings: those of the start.
        problem: why the last reading was refused, in a line; "" if it was not.
        warning_days: how long before the end of a certificate to warn.
    """

    def __init__(self, path: Path, role: Role, loaded: LoadedSettings, its_log: Log) -> None:
        """Use ``read``."""
        self.settings = loaded.settings
        self.problem = ""
        self._path = path
        self._role = role
        self._log = its_log
        self._in_force = _values(loaded.settings)
        self._links: tls.Links | None = None
        self._passwords = PasswordFiles(None, None)
        self.warning_days = loaded.settings.ssl.cert_expire_warning_time_in_day

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

    def links(self, passwords: PasswordFiles, seconds: Callable[[], float]) -> tls.Links | None:
        """Return the TLS of all links but that to Redis, None while enable_ssl is off.

        Args:
            passwords: of the certificates.
            seconds: gives the time.

        Raises:
            ConfigError: a certificate, password, authority, revocation list or the cipher list cannot be used.
        """
        self._passwords = passwords
        if self.settings.enable_ssl:
            self._links = tls.Links(self._material(self.settings), seconds)
        return self._links

    def _material(self, settings: Settings) -> tls.Material:
        """Read all files of TLS."""
        sources = _sources(settings, self._role, self._passwords, self.settings.fedcore.node.tls)
        return tls.make(sources, _now, lambda sentence: log.warn("{warning}", warning=sentence))

    def read_again(self) -> None:
        """Read the file and the certificates again, and apply what can be applied now; nothing is raised."""
        try:
            loaded = _load(self._path, self._role)
            values, renewed = _values(loaded.settings), None
            if self._links is not None and loaded.settings.enable_ssl:
                renewed = self._material(loaded.settings)
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
        if self._links is not None and renewed is not None:
            self.warning_days = loaded.settings.ssl.cert_expire_warning_time_in_day
            self._links.renew(renewed)
            applied += _RENEWED
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


def _now() -> datetime:
    return datetime.now(UTC)


def _sources(settings: Settings, role: Role, passwords: PasswordFiles, node_tls: bool) -> tls.Sources:
    """Return what a daemon's TLS is made of; whether the node channel has some is fixed at the start."""
    own, given = settings.fedcore, settings.ssl
    http = None
    if role is not Role.WORKER:
        section = own.device if role is Role.SERVER else own.scheduler
        authorities = Path(section.client_ca_path) if section.client_ca_path else None
        http = tls.HttpListener(section.client_certificates, authorities)
    node = None
    if node_tls and role is not Role.SCHEDULER:
        node = tls.NodeLinks(role is Role.SERVER, frozenset(own.node.tls_names))
    return tls.Sources(
        server_cert_path=Path(given.server_cert_path),
        client_cert_path=Path(given.client_cert_path),
        ca_cert_path=Path(given.ca_cert_path),
        crl_path=Path(given.crl_path) if given.crl_path else None,
        cipher_list=given.cipher_list,
        server_password=lambda: _password_of_p12(passwords.server, SERVER_PASSWORD),
        client_password=lambda: _password_of_p12(passwords.client, CLIENT_PASSWORD),
        node=node,
        http=http,
        others=_others(settings, role),
    )


def _others(settings: Settings, role: Role) -> tuple[tuple[Path, Use], ...]:
    """Return the files of certificates in use elsewhere: to Redis, and to know devices by."""
    used: list[tuple[str, Use]] = []
    if redis_has_tls(settings):
        cache = settings.distributed_cache
        used += [(cache.cacert_filename, Use.CA), (cache.cert_filename, Use.CLIENT)]
    devices = settings.client_verify
    if devices.pki_verify and role is Role.SERVER:
        used += [(devices.root_first_ca_path, Use.CA), (devices.root_second_ca_path, Use.CA)]
    return tuple((Path(path), use) for path, use in used if path)


def _password_of_p12(named: Path | None, name: str) -> bytes:
    return credential(name) if named is None else read_password(named)
