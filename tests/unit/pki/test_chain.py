"""A node's own certificate against its authority, and names."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fedcore.pki import chain
from fedcore.pki.authority import (
    Issued,
    KeyKind,
    Role,
    Validity,
    issue,
    key_usage,
    lasting,
    make_authority,
    make_key,
)

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
CA = make_authority("fl CA", NOW)
DAY = timedelta(days=1)


def leaf(authority: Issued = CA, **details: object) -> Issued:
    return issue(authority, Role.SERVER, "node", NOW, hosts=["10.0.0.5", "fl.example"], **details)  # type: ignore[arg-type]


def signed(subject: str, issuer: Issued, *, ca: bool | None, ids: bool = True, key: object = None) -> Issued:
    """Sign a certificate that lacks what ``issue`` puts in."""
    own = key or make_key(KeyKind.EC_P256)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)])
    dates = lasting(NOW, 10)
    builder = x509.CertificateBuilder(
        issuer.certificate.subject if issuer is not None else name, name, own.public_key(), 7
    )
    builder = builder.not_valid_before(dates.begin).not_valid_after(dates.end)
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, None), True)
    builder = builder.add_extension(key_usage("digital_signature"), True)
    if ids:
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), False)
    signer = issuer.key if issuer is not None else own
    return Issued(own, builder.sign(signer, hashes.SHA256()))


def fault(certificate: Issued, *authorities: Issued, now: datetime = NOW) -> str:
    found = chain.own_chain_fault(certificate.certificate, [one.certificate for one in authorities], now)
    return "" if found is None else found.text


def test_a_good_one() -> None:
    assert fault(leaf(), CA) == ""
    assert fault(leaf(kind=KeyKind.RSA_3072), CA) == ""


def test_each_fault_has_its_text() -> None:
    assert fault(leaf(), make_authority("other", NOW)) == (
        "root CA cert subject cn is not equal with equip CA cert issuer cn."
    )
    assert fault(leaf(), make_authority("fl CA", NOW)) == "Verify Singature failed."
    for ca in (False, None):
        no_authority = signed("plain", None, ca=ca)  # type: ignore[arg-type]
        assert (
            fault(signed("x", no_authority, ca=False), no_authority) == "Verify Extended Attributes failed."
        )
    assert fault(signed("node", CA, ca=False), CA) == "Verify Cert KeyID failed."  # no authorityKeyIdentifier
    bare = signed("bare", None, ca=True, ids=False)  # type: ignore[arg-type]
    assert fault(signed("node", bare, ca=False), bare) == "Verify Cert KeyID failed."


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (NOW - 2 * DAY, "Verify Cert Time failed."),
        (NOW, ""),
        (NOW + 824 * DAY, ""),
        (NOW + 824 * DAY + timedelta(seconds=1), "Verify Cert Time failed."),
    ],
)
def test_dates_have_no_slack(now: datetime, text: str) -> None:
    assert fault(leaf(), CA, now=now) == text


def test_the_authority_must_be_in_force_too() -> None:
    short = make_authority("short", NOW, validity=Validity(NOW - DAY, NOW + DAY))
    long = issue(short, Role.SERVER, "n", NOW, validity=Validity(NOW - DAY, NOW + 9 * DAY))
    assert fault(long, short, now=NOW + 2 * DAY) == "Verify Cert Time failed."


def test_one_good_authority_of_several_will_do_and_else_the_nearest_is_told() -> None:
    other, forged = make_authority("other", NOW), make_authority("fl CA", NOW)
    assert fault(leaf(), other, forged, CA) == ""
    assert fault(leaf(), forged, other) == "Verify Singature failed."
    assert fault(leaf()) == "root CA cert subject cn is not equal with equip CA cert issuer cn."


@pytest.mark.parametrize(
    ("host", "fits"),
    [
        ("10.0.0.5", True),
        ("10.0.0.6", False),
        ("fl.example", True),
        ("FL.Example.", True),
        ("a.fl.example", False),
        ("node", False),  # the common name
        ("", False),
        ("fd00::7", True),
        ("[fd00:0:0::7]", True),
        ("x.wild.example", True),
        ("x.y.wild.example", False),
        ("wild.example", False),
        ("10.0.0.5.", False),
    ],
)
def test_names(host: str, fits: bool) -> None:
    made = issue(CA, Role.SERVER, "node", NOW, hosts=["10.0.0.5", "FL.example", "fd00::7", "*.wild.example"])
    assert chain.fits(chain.names_of(made.certificate), host) is fits


def test_no_names() -> None:
    assert chain.names_of(issue(CA, Role.CLIENT, "node", NOW).certificate) == frozenset()
    assert not chain.fits(frozenset({"*.example"}), "fl.example")  # a whole top level
