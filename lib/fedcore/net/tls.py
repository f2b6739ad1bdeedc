"""TLS for listeners: a PKCS#12 file and its password become a context factory."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.serialization import pkcs12
from OpenSSL import SSL, crypto
from twisted.internet import ssl

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
    if not p12.is_file():
        raise ConfigError(f"The file path of server_cert_path {p12} is not exist.")
    if not password:
        raise ConfigError("The client password's value is empty.", hint="give --server-password-file")
    try:
        key, certificate, chain = pkcs12.load_key_and_certificates(p12.read_bytes(), password)
    except ValueError as error:
        raise ConfigError("PKCS12_parse failed.", hint=f"{p12}: wrong password or no PKCS#12 file") from error
    if certificate is None:
        raise ConfigError("the cert is nullptr", hint=f"{p12} holds no certificate")
    if key is None:
        raise ConfigError("the key is nullptr", hint=f"{p12} holds no private key")
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        dates = f"{certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}"
        raise ConfigError("Verify Cert Time failed.", hint=f"{p12} is valid from {dates}")
    return ssl.CertificateOptions(
        privateKey=crypto.PKey.from_cryptography_key(key),  # type: ignore[arg-type]
        certificate=crypto.X509.from_cryptography(certificate),
        extraCertChain=[crypto.X509.from_cryptography(extra) for extra in chain],
        raiseMinimumTo=ssl.TLSVersion.TLSv1_2,
        acceptableCiphers=ssl.AcceptableCiphers.fromOpenSSLCipherString(_allowed(cipher_list, warn)),
    )


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
