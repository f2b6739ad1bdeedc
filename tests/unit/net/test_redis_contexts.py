"""The PEM files of the link to Redis: what cannot be used is told before anything connects."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from fedcore.errors import ConfigError
from fedcore.net.tls import RedisFiles, redis_contexts


def write_key(path: Path, key: ec.EllipticCurvePrivateKey, password: bytes = b"") -> str:
    protection = BestAvailableEncryption(password) if password else NoEncryption()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> RedisFiles:
    """A certificate that is its own CA, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    certificate = builder.sign(key, hashes.SHA256())
    (tmp_path / "ca.crt").write_bytes(certificate.public_bytes(Encoding.PEM) * 2)
    return RedisFiles(
        cacert_filename=str(tmp_path / "ca.crt"),
        cert_filename=str(tmp_path / "ca.crt"),
        private_key_filename=write_key(tmp_path / "own.key", key),
    )


@pytest.mark.parametrize("host", ["redis.example", "10.0.0.1", "::1"])
def test_good_files_make_a_context_for_any_host(files: RedisFiles, host: str) -> None:
    assert redis_contexts(files)(host) is not None


def test_without_a_ca_nothing_is_believed() -> None:
    with pytest.raises(ConfigError, match=r"distributed_cache\.cacert_filename"):
        redis_contexts(RedisFiles())


@pytest.mark.parametrize("name", ["cacert_filename", "cert_filename", "private_key_filename"])
def test_a_file_that_is_not_there_is_named(files: RedisFiles, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read /nowhere: No such file"):
        redis_contexts(replace(files, **{name: "/nowhere"}))


@pytest.mark.parametrize("name", ["cacert_filename", "cert_filename", "private_key_filename"])
def test_a_file_that_holds_something_else_is_named(files: RedisFiles, name: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("-----BEGIN NONSENSE-----\n")
    with pytest.raises(ConfigError, match="other holds no PEM"):
        redis_contexts(replace(files, **{name: str(tmp_path / "other")}))


def test_a_key_must_be_that_of_the_certificate(files: RedisFiles, tmp_path: Path) -> None:
    other = write_key(tmp_path / "other.key", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ConfigError, match=r"private_key_filename is not that of"):
        redis_contexts(replace(files, private_key_filename=other))


def test_a_key_with_a_password_is_told(files: RedisFiles, tmp_path: Path) -> None:
    locked = write_key(tmp_path / "locked.key", ec.generate_private_key(ec.SECP256R1()), b"secret")
    with pytest.raises(ConfigError, match="no PEM private key without a password"):
        redis_contexts(replace(files, private_key_filename=locked))


def test_a_folder_of_hashed_names(files: RedisFiles, tmp_path: Path) -> None:
    folder = tmp_path / "ca"
    for_folder = replace(files, cacert_filename="", capath=str(folder))
    with pytest.raises(ConfigError, match="cannot read the folder"):
        redis_contexts(for_folder)
    folder.mkdir()
    (folder / "ca.crt").write_text("under its own name it is not looked at")
    (folder / "0a1b2c3d.r0").write_text("a revocation list")
    with pytest.raises(ConfigError, match="openssl rehash"):
        redis_contexts(for_folder)
    (folder / "0a1b2c3d.0").write_bytes(Path(files.cacert_filename).read_bytes())
    assert redis_contexts(for_folder)("redis") is not None
