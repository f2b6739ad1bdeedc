"""TLS: files become context factories.

Listeners have a PKCS#12 file and its password; the link to Redis has PEM files. A peer that we connect to is always
verified, its name included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key, pkcs12
from OpenSSL import SSL, crypto
from twisted.internet import ssl
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator

from fedcore.errors import ConfigError

# The suites that MindSpore Federated 0.1 allows; TLS 1.3 has its own and needs no list.
SUITES = (
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-CHACHA20-POLY1305",
    "ECDHE-PSK-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES128-CCM",
    "ECDHE-ECDSA-AES256-CCM",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
)

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


def redis_contexts(files: RedisFiles) -> Callable[[str], IOpenSSLClientConnectionCreator]:
    """Build what encrypts connections to Redis: TLS 1.2 or newer, certificate and host name verified.

    Args:
        files: read once, now.

    Returns:
        A function of the host of an address (a name or an IP address), for ``wrapClientTLS``.

    Raises:
        ConfigError: a file cannot be used, or there is no CA certificate.
    """
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


def listening_context(
    p12: Path, password: bytes, cipher_list: str, now: datetime, warn: Callable[[str], None]
) -> ssl.CertificateOptions:
    """Build the context of an HTTPS listener: TLS 1.2 or newer, no client certificate asked for.

    Args:
        p12: server certificate, key and chain.
        password: of the file.
        cipher_list: any OpenSSL cipher string; suites outside SUITES are dropped with a warning that names them.
        now: for the dates of the certificate, with a time zone.
        warn: takes the sentence about dropped suites.

    Raises:
        ConfigError: the file, its password, its dates or the cipher list cannot be used.
    """
    content = _content(p12)
    if not password:
        raise ConfigError(
            "The client password's value is empty.",
            hint="give --server-password-file, or the credential server-password",
        )
    try:
        key, certificate, chain = pkcs12.load_key_and_certificates(content, password)
    except ValueError as error:
        raise ConfigError("PKCS12_parse failed.", hint=f"{p12}: wrong password or no PKCS#12 file") from error
    if certificate is None:
        raise ConfigError("the cert is nullptr", hint=f"{p12} holds no certificate")
    if key is None:
        raise ConfigError("the key is nullptr", hint=f"{p12} holds no private key")
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        dates = f"{certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}"
        raise ConfigError(
            "Verify Cert Time failed.", hint=f"{p12} is valid from {dates}: renew it, or set the clock"
        )
    return ssl.CertificateOptions(
        privateKey=crypto.PKey.from_cryptography_key(key),  # type: ignore[arg-type]
        certificate=crypto.X509.from_cryptography(certificate),
        extraCertChain=[crypto.X509.from_cryptography(extra) for extra in chain],
        raiseMinimumTo=ssl.TLSVersion.TLSv1_2,
        acceptableCiphers=ssl.AcceptableCiphers.fromOpenSSLCipherString(_allowed(cipher_list, warn)),
        # Without a choice of our own Twisted refuses whoever offers protocols by ALPN, as old devices' OkHttp does.
        acceptableProtocols=[b"http/1.1"],
    )


def _content(p12: Path) -> bytes:
    try:
        return p12.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(
            f"The file path of server_cert_path {p12} is not exist.", hint="set ssl.server_cert_path"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"cannot read {p12}: {error.strerror}",
            hint="let ssl.server_cert_path name a file that the daemon's user may read",
        ) from error


def _allowed(cipher_list: str, warn: Callable[[str], None]) -> str:
    """Keep the suites of an OpenSSL cipher string that are in SUITES."""
    context = SSL.Context(SSL.TLS_METHOD)
    try:
        context.set_cipher_list(cipher_list.encode())
    except SSL.Error as error:
        raise ConfigError(
            "SSL use set cipher list failed!", hint=f"ssl.cipher_list is {cipher_list!r}"
        ) from error
    offered = [suite for suite in SSL.Connection(context).get_cipher_list() if not suite.startswith("TLS_")]
    allowed = [suite for suite in offered if suite in SUITES]
    if not allowed:
        raise ConfigError("The cipher is wrong.", hint="ssl.cipher_list names none of " + ", ".join(SUITES))
    if len(allowed) < len(offered):
        dropped = ", ".join(sorted(set(offered) - set(allowed)))
        warn(f"these suites of ssl.cipher_list are not used: {dropped}")
    return ":".join(allowed)
