"""Passwords: from a file that is named, or from systemd."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcore.errors import ConfigError
from fldaemons.configuration import credential, password_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("content", "password"),
    [(b"", b""), (b"\n", b""), (b"a b\n", b"a b"), (b"a\r\nb", b"a"), (b"\xff", b"\xff")],
)
def test_a_credential_is_its_first_line(folder: Path, content: bytes, password: bytes) -> None:
    (folder / "redis-password").write_bytes(content)
    assert credential("redis-password") == password
    assert password_of(None, "redis-password") == password


def test_a_missing_one_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert credential("redis-password") == b""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    assert credential("redis-password") == b""


def test_one_that_cannot_be_read_is_a_fault(folder: Path) -> None:
    (folder / "redis-password").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read the password file .*redis-password: Is a directory"):
        credential("redis-password")


def test_a_named_file_goes_first_and_must_not_be_empty(folder: Path, tmp_path: Path) -> None:
    (folder / "redis-password").write_text("one")
    named = tmp_path / "named"
    named.write_text("two")
    assert password_of(named, "redis-password") == b"two"
    named.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        password_of(named, "redis-password")
