"""The files of TLS: a node's certificate and key in PKCS#12, authorities in PEM.

What cannot be used is refused in the words of MindSpore Federated 0.1, with the remedy in ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import pkcs12

from fedcore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Identity:
    """What a node shows to its peers.

    Attributes:
        file: where it was read.
        key: private key of the certificate, of `cryptography`.
        certificate: the node's.
        chain: shown behind it.
    """

    file: Path
    key: Any
    certificate: x509.Certificate
    chain: tuple[x509.Certificate, ...] = ()


def read_identity(path: Path, password: bytes, kind: str) -> Identity:
    """Read a PKCS#12 file.

    Args:
        path: of the file.
        password: of the file.
        kind: "server" or "client": the settings of the file and its password are named after it.

    Raises:
        ConfigError: the file or its password cannot be used.
    """
    content = _content(path, f"{kind}_cert_path")
    if not password:
        raise ConfigError(
            "The client password's value is empty.",  # the original's words for either file
            hint=f"give --{kind}-password-file, or the credential {kind}-password",
        )
    try:
        key, certificate, chain = pkcs12.load_key_and_certificates(content, password)
    except (ValueError, x509.InvalidVersion) as error:
        raise ConfigError(
            "PKCS12_parse failed.", hint=f"{path}: wrong password or no PKCS#12 file"
        ) from error
    if certificate is None:
        raise ConfigError("the cert is nullptr", hint=f"{path} holds no certificate")
    if key is None:
        raise ConfigError("the key is nullptr", hint=f"{path} holds no private key")
    return Identity(path, key, certificate, tuple(chain))


def read_authorities(path: Path, setting: str = "ca_cert_path") -> tuple[x509.Certificate, ...]:
    """Read the certificates that peers' ones must be signed by, at least one.

    Raises:
        ConfigError: the file cannot be used.
    """
    content = _content(path, setting)
    try:
        return tuple(x509.load_pem_x509_certificates(content))
    except (ValueError, x509.InvalidVersion) as error:
        raise ConfigError(
            "Read CA cert file failed.", hint=f"{path} holds no PEM certificate: {error}"
        ) from error


def _content(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(
            f"The file path of {setting} {path} is not exist.", hint=f"set ssl.{setting}"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}",
            hint=f"let ssl.{setting} name a file that the daemon's user may read",
        ) from error
