"""TLS of the link to Redis and the Sentinels: PEM files, certificate and name of the peer always verified."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import crypto
from twisted.internet import ssl
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator

from fedcore.errors import ConfigError

_HASHED_NAME = re.compile(r"[0-9a-f]{8}\.[0-9]+")  # as `openssl rehash` names certificates; lists end in .r0


@dataclass(frozen=True, slots=True)
class RedisFiles:
    """The PEM files of the link to Redis, as section distributed_cache names them; "" for none.

    Attributes:
        cacert_filename: CA certificates.
        capath: folder of CA certificates with hashed names.
        cert_filename: certificate, and its chain, that this node shows.
        private_key_filename: key of that certificate.
        server_name: the name that Redis' certificate must bear; "": the host of its address.
    """

    cacert_filename: str = ""
    capath: str = ""
    cert_filename: str = ""
    private_key_filename: str = ""
    server_name: str = ""


def redis_contexts(
    files: RedisFiles, warn: Callable[[str], None] = lambda sentence: None
) -> Callable[[str], IOpenSSLClientConnectionCreator]:
    """Build what encrypts connections to Redis: TLS 1.2 or newer, certificate and host name verified.

    Args:
        files: read now, and again before a connection if one of them has changed.
        warn: takes the sentence that changed files cannot be used; those of before then stay in force.

    Returns:
        A function of the host of an address (a name or an IP address), for ``wrapClientTLS``.

    Raises:
        ConfigError: a file cannot be used, or there is no CA certificate.
    """
    return _RedisContexts(files, warn)


class _RedisContexts:
    """The contexts of the link to Redis; they follow their files."""

    def __init__(self, files: RedisFiles, warn: Callable[[str], None]) -> None:
        self._files = files
        self._warn = warn
        self._seen = self._look()
        self._build = _contexts(files)

    def __call__(self, host: str) -> IOpenSSLClientConnectionCreator:
        seen = self._look()
        if seen != self._seen:
            self._seen = seen
            try:
                self._build = _contexts(self._files)
            except ConfigError as fault:
                self._warn(f"the certificates for Redis stay as they were: {fault}")
        return self._build(host)

    def _look(self) -> list[tuple[int, int, int]]:
        """Return what tells one content of the files from another."""
        files = self._files
        return [
            _stamp(path)
            for path in (files.cacert_filename, files.capath, files.cert_filename, files.private_key_filename)
            if path
        ]


def _stamp(path: str) -> tuple[int, int, int]:
    try:
        found = Path(path).stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns


def _contexts(files: RedisFiles) -> Callable[[str], IOpenSSLClientConnectionCreator]:
    trusted = _certificates(files.cacert_filename) if files.cacert_filename else []
    if files.capath:
        trusted += _certificates_in(files.capath)
    if not trusted:
        raise ConfigError(
            "the certificate of Redis cannot be verified without a CA",
            hint="give distributed_cache.cacert_filename or distributed_cache.capath",
        )
    root = ssl.trustRootFromCertificates([ssl.Certificate(_openssl(certificate)) for certificate in trusted])
    shown = _shown_to_redis(files) if files.cert_filename else {}

    def context(host: str) -> IOpenSSLClientConnectionCreator:
        return ssl.optionsForClientTLS(
            files.server_name or host,
            root,
            extraCertificateOptions={"raiseMinimumTo": ssl.TLSVersion.TLSv1_2, **shown},
        )

    return context


def _shown_to_redis(files: RedisFiles) -> dict[str, object]:
    """Our own certificate, in the words of CertificateOptions."""
    own, *chain = _certificates(files.cert_filename)
    path = files.private_key_filename
    try:
        key = load_pem_private_key(_read(path), None)
    except (ValueError, TypeError) as error:  # TypeError: it has a password
        raise ConfigError(f"{path} holds no PEM private key without a password: {error}") from error
    if key.public_key() != own.public_key():
        raise ConfigError(
            "the key in distributed_cache.private_key_filename is not that of distributed_cache.cert_filename",
            hint=f"{path} and {files.cert_filename}",
        )
    return {
        "privateKey": crypto.PKey.from_cryptography_key(key),  # type: ignore[arg-type]
        "certificate": _openssl(own),
        "extraCertChain": [_openssl(extra) for extra in chain],
    }


def _openssl(certificate: x509.Certificate) -> crypto.X509:
    return crypto.X509.from_cryptography(certificate)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as problem:
        raise ConfigError(f"cannot read {path}: {problem.strerror}") from problem


def _certificates(path: str) -> list[x509.Certificate]:
    """All certificates of a PEM file, at least one."""
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise ConfigError(f"{path} holds no PEM certificate: {error}") from error


def _certificates_in(folder: str) -> list[x509.Certificate]:
    """The certificates of a folder of hashed names."""
    try:
        paths = sorted(path for path in Path(folder).iterdir() if _HASHED_NAME.fullmatch(path.name))
    except OSError as problem:
        raise ConfigError(f"cannot read the folder {folder}: {problem.strerror}") from problem
    if not paths:
        raise ConfigError(
            f"{folder} holds no certificate with a hashed name", hint="run openssl rehash on it"
        )
    return [certificate for path in paths for certificate in _certificates(str(path))]
