"""Who may change a job: every way in, and every way that is none."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cryptography import x509

from fedcore.errors import ConfigError
from fedcore.pki.authority import Role, issue, make_authority
from fedcore.services import operator_access
from fedcore.services.operator_access import Access, Caller, Denial, check_token, is_loopback

TOKEN = b"0123456789abcdefABCDEF=="
NOBODY = Caller()
HOLDER = Caller(b"Bearer " + TOKEN)
NOW = datetime(2026, 11, 22, tzinfo=UTC)


def certificate_of(role: Role) -> x509.Certificate:
    return issue(make_authority("CA", NOW), role, "someone", NOW, hosts=["127.0.0.1"]).certificate


OPERATOR, NODE = (Caller(certificate=certificate_of(role)) for role in (Role.OPERATOR, Role.CLIENT))


def status(denial: Denial | None) -> int:
    return 200 if denial is None else denial.status


@pytest.mark.parametrize("loopback", [True, False])
def test_with_a_token_only_who_has_it_changes_the_job(loopback: bool) -> None:
    access = Access(loopback=loopback, token=lambda: TOKEN)
    assert access.denial(HOLDER) is None
    assert access.denial(Caller(b"bearer   " + TOKEN + b" ")) is None
    assert access.denial(Caller(b"Bearer " + TOKEN, browser=True)) is None
    for wrong in (
        b"",
        b"Bearer",
        b"Bearer " + TOKEN[:-1],
        b"Bearer " + TOKEN + b"=",
        b"Basic " + TOKEN,
        TOKEN,
    ):
        assert access.denial(Caller(wrong)) == Denial(401, operator_access.WRONG_TOKEN, "wrong_token")
    for caller in (NOBODY, OPERATOR, NODE):  # certificates that nobody has asked for prove nothing
        assert access.denial(caller) == Denial(401, operator_access.NEEDS_OPERATOR, "no_token")


@pytest.mark.parametrize("loopback", [True, False])
def test_with_certificates_an_operators_will_do_and_a_nodes_will_not(loopback: bool) -> None:
    access = Access(loopback=loopback, certificates=True)
    assert access.denial(OPERATOR) is None
    assert (
        status(access.denial(NODE)) == status(access.denial(NOBODY)) == status(access.denial(HOLDER)) == 401
    )


def test_an_authority_of_operators_signs_for_nobody_else() -> None:
    assert Access(loopback=False, certificates=True, own_authority=True).denial(NODE) is None


def test_token_or_certificate_will_do() -> None:
    access = Access(loopback=False, certificates=True, token=lambda: TOKEN)
    assert access.denial(OPERATOR) is access.denial(HOLDER) is None
    assert status(access.denial(NODE)) == 401


def test_without_either_a_loopback_address_is_open_but_to_browsers() -> None:
    access = Access(loopback=True)
    assert access.denial(NOBODY) is access.denial(HOLDER) is None
    assert access.denial(Caller(browser=True)) == Denial(403, operator_access.FROM_A_BROWSER, "browser")


def test_without_either_any_other_address_changes_nothing() -> None:
    expected = Denial(403, operator_access.NO_ACCESS_SET, "not_configured")
    for caller in (NOBODY, HOLDER, OPERATOR):
        assert Access(loopback=False).denial(caller) == expected


def test_the_switch_lets_everybody_in() -> None:
    for access in (
        Access(loopback=False, unauthenticated=True),
        Access(loopback=False, unauthenticated=True, token=lambda: TOKEN),
    ):
        assert access.denial(Caller(b"Bearer nonsense", browser=True)) is None


def test_a_token_that_cannot_be_read_lets_nobody_in() -> None:
    def read() -> bytes:
        raise ConfigError("the file is gone")

    access = Access(loopback=True, token=read)
    assert access.denial(HOLDER) == Denial(500, operator_access.UNREADABLE_TOKEN, "unreadable_token")


@pytest.mark.parametrize(
    "token", [b"", b"short", b"0123456789abcde", b"with a blank in it all", b"umlaut-\xc3\xa4-0123456789"]
)
def test_a_token_that_is_no_secret_is_refused(token: bytes) -> None:
    with pytest.raises(ConfigError, match="openssl rand"):
        check_token(token, "/etc/fl/token")


def test_a_good_token_is_taken_as_it_is() -> None:
    assert check_token(TOKEN, "") == TOKEN


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.5", False),
        ("scheduler.example", False),
    ],
)
def test_loopback_addresses(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
