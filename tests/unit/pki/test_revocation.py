"""Revocation lists, and the file that they follow."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedcore.errors import ConfigError
from fedcore.pki.authority import (
    Issued,
    Revoked,
    Role,
    Validity,
    issue,
    make_authority,
    revocation_list,
)
from fedcore.pki.revocation import RevocationFile, check_form, read_lists

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
CA, OTHER = make_authority("fl CA", NOW), make_authority("other CA", NOW)
GOOD, BAD = (issue(CA, Role.CLIENT, name, NOW) for name in ("good", "bad"))


def listing(
    *revoked: Issued, authority: Issued = CA, begin: datetime = NOW - DAY, end: datetime = NOW + DAY
) -> bytes:
    serials = [Revoked(one.certificate.serial_number, NOW) for one in revoked]
    return revocation_list(authority, serials, NOW, number=1, validity=Validity(begin, end))


def test_who_is_revoked() -> None:
    lists = read_lists(listing(BAD), [CA.certificate], NOW)
    assert lists.revokes(BAD.certificate) and not lists.revokes(GOOD.certificate)
    assert lists.next_update == NOW + DAY


def test_a_list_tells_of_its_issuer_only() -> None:
    twin = issue(OTHER, Role.CLIENT, "twin", NOW, serial=BAD.certificate.serial_number)
    both = read_lists(listing(BAD) + listing(authority=OTHER), [CA.certificate, OTHER.certificate], NOW)
    assert both.revokes(BAD.certificate) and not both.revokes(twin.certificate)
    assert len(both.lists) == 2


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "Verify crl failed."),
        (b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", "Verify crl failed."),
        (CA.certificate_pem(), "Verify crl failed."),
        (listing(authority=OTHER), "Verify crl failed."),
        (listing(authority=make_authority("fl CA", NOW)), "Verify crl failed."),
        (listing(begin=NOW + timedelta(seconds=1), end=NOW + 2 * DAY), "check crl time failed"),
        (listing() + listing(authority=OTHER), "Verify crl failed."),
    ],
    ids=["empty", "damaged", "no list", "of a stranger", "forged", "of tomorrow", "one of a stranger"],
)
def test_lists_that_cannot_be_used(content: bytes, text: str) -> None:
    with pytest.raises(ConfigError) as fault:
        read_lists(content, [CA.certificate], NOW)
    assert fault.value.args == (text,) and fault.value.hint


def test_the_form_is_checked_before_the_authority_is_known(tmp_path: Path) -> None:
    path = tmp_path / "crl"
    with pytest.raises(ConfigError, match=r"Verify crl failed\. \(cannot read .*: No such file"):
        check_form(path, NOW)
    path.write_bytes(listing(authority=OTHER))
    check_form(path, NOW)


class TestFile:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "ca.crl"
        path.write_bytes(listing())
        return path

    def follow(self, path: Path, warnings: list[str], now: datetime = NOW) -> RevocationFile:
        return RevocationFile(path, [CA.certificate], lambda: now, warnings.append)

    @staticmethod
    def put(path: Path, content: bytes) -> None:
        """Put another file in its place, as tools do that never leave a half one."""
        path.with_suffix(".new").write_bytes(content)
        os.replace(path.with_suffix(".new"), path)

    def test_it_is_read_again_when_it_changes(self, path: Path) -> None:
        warnings: list[str] = []
        file = self.follow(path, warnings)
        assert not file.current().revokes(BAD.certificate)
        self.put(path, listing(BAD))
        assert file.current().revokes(BAD.certificate)
        assert not warnings and not file.problem

    @pytest.mark.parametrize("content", [b"nonsense", listing(authority=OTHER), None])
    def test_a_bad_new_one_changes_nothing_and_is_told_once(self, path: Path, content: bytes | None) -> None:
        warnings: list[str] = []
        self.put(path, listing(BAD))
        file = self.follow(path, warnings)
        path.unlink() if content is None else self.put(path, content)
        for _ in range(3):
            assert file.current().revokes(BAD.certificate)
        assert len(warnings) == 1 and "stay as they were: Verify crl failed." in warnings[0]
        assert file.problem
        self.put(path, listing())
        assert not file.current().revokes(BAD.certificate)
        assert not file.problem

    def test_one_past_its_time_is_used_and_told(self, path: Path) -> None:
        warnings: list[str] = []
        file = self.follow(path, warnings, now=NOW + 3 * DAY)
        assert len(file.current().overdue(NOW + 3 * DAY)) == 1 and not file.current().overdue(NOW)
        self.put(path, listing(BAD))
        assert file.current().revokes(BAD.certificate)
        assert len(warnings) == 1 and "goes on being used" in warnings[0]

    def test_it_must_be_good_at_the_start(self, path: Path) -> None:
        path.write_bytes(b"nonsense")
        with pytest.raises(ConfigError, match="Verify crl failed"):
            self.follow(path, [])
