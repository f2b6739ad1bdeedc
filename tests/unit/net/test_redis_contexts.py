"""The PEM files of the link to Redis: what cannot be used is told before anything connects."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import StringTransport
from twisted.protocols.tls import TLSMemoryBIOFactory

from fedcore.errors import ConfigError
from fedcore.net.tls import RedisFiles, redis_contexts
from fedcore.pki.authority import Issued, make_authority


@pytest.fixture
def own() -> Issued:
    """A certificate that is its own CA, and its key."""
    return make_authority("redis", datetime.now(UTC))


@pytest.fixture
def files(tmp_path: Path, own: Issued) -> RedisFiles:
    (tmp_path / "ca.crt").write_bytes(own.certificate_pem() * 2)
    (tmp_path / "own.key").write_bytes(own.key_pem())
    return RedisFiles(
        cacert_filename=str(tmp_path / "ca.crt"),
        cert_filename=str(tmp_path / "ca.crt"),
        private_key_filename=str(tmp_path / "own.key"),
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
    other = tmp_path / "other.key"
    other.write_bytes(make_authority("other", datetime.now(UTC)).key_pem())
    with pytest.raises(ConfigError, match=r"private_key_filename is not that of"):
        redis_contexts(replace(files, private_key_filename=str(other)))


def test_a_key_with_a_password_is_told(files: RedisFiles, own: Issued, tmp_path: Path) -> None:
    locked = tmp_path / "locked.key"
    locked.write_bytes(own.key_pem(b"secret"))
    with pytest.raises(ConfigError, match="no PEM private key without a password"):
        redis_contexts(replace(files, private_key_filename=str(locked)))


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


def test_changed_files_are_read_before_the_next_connection_and_bad_ones_change_nothing(
    files: RedisFiles, tmp_path: Path
) -> None:
    warnings: list[str] = []
    contexts = redis_contexts(files, warnings.append)

    def shown() -> object:
        factory: Any = TLSMemoryBIOFactory(contexts("redis.example"), True, Factory.forProtocol(Protocol))
        wrapper = factory.buildProtocol(None)
        wrapper.makeConnection(StringTransport())
        return wrapper.getHandle().get_certificate().to_cryptography()

    first = shown()
    (tmp_path / "ca.crt").write_text("nonsense")
    assert shown() == first == shown()
    assert len(warnings) == 1 and "the certificates for Redis stay as they were: " in warnings[0]
    new = make_authority("redis", datetime.now(UTC))
    (tmp_path / "own.key").write_bytes(new.key_pem())
    (tmp_path / "ca.crt").write_bytes(new.certificate_pem())
    assert shown() == new.certificate != first
    assert len(warnings) == 1
