"""Which chains of certificates are trusted: the genuine one, and what is wrong with each other one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID, ObjectIdentifier
from device_pki import Maker, now, pems

from fedcore.identity import pss
from fedcore.identity.chain import Anchors, Chain, signing_key
from fedcore.identity.pem import Untrusted, fl_id_of
from fedcore.identity.revocation import Revocations
from fedcore.pki.authority import (
    Issued,
    KeyKind,
    Revoked,
    Validity,
    certify,
    issue_device,
    key_usage,
    lasting,
    make_authority,
    make_key,
    pem,
    revocation_list,
)

NONE = Revocations()
CA_BITS = ((x509.BasicConstraints(True, None), True), (key_usage("key_cert_sign", "crl_sign"), True))


def name(common: str | None, unit: str = "") -> x509.Name:
    parts = [] if common is None else [x509.NameAttribute(NameOID.COMMON_NAME, common)]
    return x509.Name(
        [*([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit)] if unit else []), *parts]
    )


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker()


@pytest.fixture(scope="module")
def rsa_key() -> Any:
    return make_key(KeyKind.RSA_2048)


@pytest.fixture(scope="module")
def device(maker: Maker) -> Any:
    return maker.device()


def chain_of(device: Any) -> Chain:
    return Chain(*device.chain[:3])


def judged(
    chain: Chain, *roots: Issued, at: datetime | None = None, lists: Revocations = NONE
) -> rsa.RSAPublicKey:
    return signing_key(chain, Anchors([root.certificate for root in roots]), lists, at or now())


class TestGood:
    def test_a_genuine_chain(self, maker: Maker, device: Any) -> None:
        key = judged(chain_of(device), maker.root)
        assert pss.verify(key, pss.sign(device.attestation.key, b"x"), b"x")

    @pytest.mark.parametrize("first", [True, False])
    def test_either_root_will_do(self, maker: Maker, device: Any, first: bool) -> None:
        other = Maker("Other").root
        assert judged(chain_of(device), *((maker.root, other) if first else (other, maker.root)))

    def test_all_of_rsa(self) -> None:
        root = make_authority("R", now(), kind=KeyKind.RSA_3072, path_length=2)
        ca = make_authority("C", now(), kind=KeyKind.RSA_2048, issuer=root, path_length=1)
        device = issue_device(root.certificate, ca, "d", now())
        assert judged(chain_of(device), root)

    def test_equipment_that_is_no_ca(self, maker: Maker) -> None:
        device = issue_device(maker.root.certificate, maker.ca, "d", now(), equipment_signs=False)
        assert judged(chain_of(device), maker.root)

    def test_an_attestation_with_another_issuer_name(self, maker: Maker, device: Any, rsa_key: Any) -> None:
        stranger = Issued(device.equipment.key, replace_subject(device.equipment, maker.ca))
        leaf = certify(name("k"), rsa_key, stranger, lasting(now(), 9), [])
        assert judged(replace(chain_of(device), attestation=leaf), maker.root)

    def test_ten_minutes_before_the_beginning(self, maker: Maker) -> None:
        begin = now().replace(microsecond=0) + timedelta(days=1)
        device = maker.device(validity=Validity(begin, begin + timedelta(days=9)))
        assert judged(chain_of(device), maker.root, at=begin - timedelta(seconds=600))
        with pytest.raises(Untrusted, match="not valid before"):
            judged(chain_of(device), maker.root, at=begin - timedelta(seconds=601))
        assert judged(chain_of(device), maker.root, at=begin + timedelta(days=9))
        with pytest.raises(Untrusted, match="has ended"):
            judged(chain_of(device), maker.root, at=begin + timedelta(days=9, seconds=1))

    def test_a_root_that_another_one_has_signed(self) -> None:
        above = make_authority("Above", now(), path_length=None)
        root = make_authority("Root", now(), issuer=above, path_length=None)
        ca = make_authority("CA", now(), issuer=root, path_length=1)
        assert judged(chain_of(issue_device(root.certificate, ca, "d", now())), root)


def replace_subject(issued: Issued, issuer: Issued) -> x509.Certificate:
    return certify(name("Somebody else"), issued.key, issuer, lasting(now(), 9), [])


def with_ca(maker: Maker, device: Any, ca: Issued) -> Chain:
    """The device's keys below another equipment CA."""
    own = certify(name("d"), device.equipment.key, ca, lasting(now(), 9), [])
    equipment = Issued(device.equipment.key, own)
    leaf = certify(name("k"), device.attestation.key, equipment, lasting(now(), 9), [])
    return Chain(leaf, own, ca.certificate)


def below(
    maker: Maker, key: Any, extensions: Any = CA_BITS, subject: x509.Name | None = None, **more: Any
) -> Issued:
    """An equipment CA of another kind."""
    signer = more.pop("issuer", maker.root)
    dates = more.pop("validity", lasting(now(), 9))
    return Issued(key, certify(subject or name("CA"), key, signer, dates, extensions, **more))


def without_ids(
    ca: Issued, key: Any, issuer: Issued, *, authority: bytes | None, subject: bool
) -> x509.Certificate:
    """A certificate with other key identifiers than the right ones."""
    dates = lasting(now(), 9)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name("CA"))
        .issuer_name(issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(dates.begin)
        .not_valid_after(dates.end)
    )
    for extension, critical in CA_BITS:
        builder = builder.add_extension(extension, critical)
    if subject:
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    if authority is not None:
        builder = builder.add_extension(x509.AuthorityKeyIdentifier(authority, None, None), False)
    return builder.sign(issuer.key, hashes.SHA256())


def deeper(maker: Maker, device: Any, key: Any) -> Chain:
    """A device below a CA that the root allows no CAs below, shown as if that were the device's equipment CA."""
    root = make_authority("Strict", now(), path_length=0)
    ca = below(maker, key, issuer=root)
    return with_ca(maker, device, ca)


Make = Callable[[Maker, Any, Any], Chain]
BAD: dict[str, tuple[Make, str]] = {
    "another root": (
        lambda m, d, k: with_ca(m, d, below(m, k, issuer=Maker().root)),
        "no path to a trusted root",
    ),
    "a CA that signed itself": (lambda m, d, k: with_ca(m, d, make_authority("CA", now())), "no path"),
    "a root of the same name": (
        lambda m, d, k: with_ca(m, d, below(m, k, issuer=Maker("Maker").root)),
        "no path",
    ),
    "no CA": (
        lambda m, d, k: with_ca(m, d, below(m, k, [(x509.BasicConstraints(False, None), True), CA_BITS[1]])),
        "no path",
    ),
    "no basic constraints": (lambda m, d, k: with_ca(m, d, below(m, k, [CA_BITS[1]])), "no path"),
    "no right to sign certificates": (
        lambda m, d, k: with_ca(m, d, below(m, k, [CA_BITS[0], (key_usage("crl_sign"), True)])),
        "no path",
    ),
    "no key usage": (lambda m, d, k: with_ca(m, d, below(m, k, [CA_BITS[0]])), "cannot be used"),
    "a CA without a common name": (
        lambda m, d, k: with_ca(m, d, below(m, k, subject=name(None, "unit"))),
        "no common name",
    ),
    "a CA with an unknown critical extension": (
        lambda m, d, k: with_ca(
            m,
            d,
            below(m, k, [*CA_BITS, (x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\5\0"), True)]),
        ),
        "no path",
    ),
    "an expired CA": (
        lambda m, d, k: with_ca(
            m, d, below(m, k, validity=Validity(now() - timedelta(days=9), now() - timedelta(days=1)))
        ),
        "has ended",
    ),
    "a CA for less than this path": (
        deeper,
        "no path",
    ),
    "no authority key identifier in the CA": (
        lambda m, d, k: with_ca(m, d, Issued(k, without_ids(m.ca, k, m.root, authority=None, subject=True))),
        "AuthorityKeyIdentifier",
    ),
    "another authority key identifier in the CA": (
        lambda m, d, k: with_ca(
            m, d, Issued(k, without_ids(m.ca, k, m.root, authority=b"x" * 20, subject=True))
        ),
        "no path",
    ),
    "a short key of the CA": (
        lambda m, d, k: with_ca(m, d, below(m, rsa.generate_private_key(65537, 1024))),
        "neither RSA",
    ),
    "a small curve of the CA": (
        lambda m, d, k: with_ca(m, d, below(m, ec.generate_private_key(ec.SECP224R1()))),
        "neither RSA",
    ),
    "equipment of another CA": (
        lambda m, d, k: replace(with_ca(m, d, below(m, k)), equipment_ca=m.ca.certificate),
        "no path",
    ),
    "an attestation of another device": (
        lambda m, d, k: replace(chain_of(d), attestation=m.device("e").attestation.certificate),
        "not signed by the equipment",
    ),
    "an attestation of the CA": (
        lambda m, d, k: replace(chain_of(d), attestation=certify(name("k"), k, m.ca, lasting(now(), 9), [])),
        "not signed by the equipment",
    ),
    "an attestation that signed itself": (
        lambda m, d, k: replace(chain_of(d), attestation=certify(name("k"), k, None, lasting(now(), 9), [])),
        "not signed by the equipment",
    ),
    "an attestation of a curve": (
        lambda m, d, k: replace(
            chain_of(d),
            attestation=certify(name("k"), make_key(KeyKind.EC_P256), d.equipment, lasting(now(), 9), []),
        ),
        "no RSA key",
    ),
    "an attestation of 1024 bits": (
        lambda m, d, k: replace(
            chain_of(d),
            attestation=certify(
                name("k"), rsa.generate_private_key(65537, 1024), d.equipment, lasting(now(), 9), []
            ),
        ),
        "1024 bits",
    ),
    "an expired attestation": (
        lambda m, d, k: replace(
            chain_of(d),
            attestation=certify(
                name("k"), k, d.equipment, Validity(now() - timedelta(days=9), now() - timedelta(days=1)), []
            ),
        ),
        "has ended",
    ),
    "an attestation with an unknown critical extension": (
        lambda m, d, k: replace(
            chain_of(d),
            attestation=certify(
                name("k"),
                k,
                d.equipment,
                lasting(now(), 9),
                [(x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\5\0"), True)],
            ),
        ),
        "critical extension",
    ),
    "the equipment CA as equipment": (
        lambda m, d, k: Chain(d.equipment.certificate, m.ca.certificate, m.root.certificate),
        "not exactly the equipment CA",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_not_trusted(fault: str, maker: Maker, device: Any, rsa_key: Any) -> None:
    make, why = BAD[fault]
    chain = make(maker, device, rsa_key)
    with pytest.raises(Untrusted, match=why):
        judged(chain, maker.root)


def test_dates_of_the_root(maker: Maker) -> None:
    begin = now().replace(microsecond=0) - timedelta(days=9)
    root = make_authority("R", now(), validity=Validity(begin, begin + timedelta(days=8)), path_length=None)
    ca = make_authority("C", now(), issuer=root, path_length=1)
    with pytest.raises(Untrusted, match="has ended"):
        judged(chain_of(issue_device(root.certificate, ca, "d", now())), root)


def test_the_id_is_that_of_the_equipment(maker: Maker, device: Any) -> None:
    attestation, equipment, ca, _ = pems(device)
    assert Chain.read(device.fl_id, attestation, equipment, ca) == chain_of(device)
    for other in ("", "x", device.fl_id.upper(), device.fl_id[:-1]):
        with pytest.raises(Untrusted, match="id"):
            Chain.read(other, attestation, equipment, ca)


def test_anything_else_is_untrusted(maker: Maker, device: Any) -> None:
    """Any damage of any byte is Untrusted, or hits what nobody looks at; it is never another exception."""
    anchors = Anchors([maker.root.certificate])
    for index in range(3):
        good = pem(device.chain[index])
        for position in range(28, len(good) - 26, 29):
            damaged = bytearray(good)
            damaged[position] = ord("A") if damaged[position] != ord("A") else ord("B")
            texts = pems(device)[:3]
            texts[index] = damaged.decode()
            fl_id = device.fl_id
            if index == 1:
                fl_id = fl_id_of(texts[1])
            with pytest.raises(Untrusted):
                signing_key(Chain.read(fl_id, *texts), anchors, NONE, now())


class TestRevocations:
    def check(
        self, maker: Maker, device: Any, content: bytes, at: datetime | None = None, **more: Any
    ) -> None:
        judged(chain_of(device), maker.root, at=at, lists=Revocations.read(content, **more))

    def test_a_revoked_device(self, maker: Maker, device: Any) -> None:
        with pytest.raises(Untrusted, match="revoked"):
            self.check(maker, device, maker.crl([device]))
        self.check(maker, device, maker.crl([maker.device("other")]))

    def test_a_revoked_maker(self, maker: Maker, device: Any) -> None:
        entry = Revoked(maker.ca.certificate.serial_number, now())
        with pytest.raises(Untrusted, match="revoked"):
            self.check(maker, device, revocation_list(maker.root, [entry], now(), number=1))

    def test_a_revoked_attestation(self, maker: Maker, device: Any) -> None:
        entry = Revoked(device.attestation.certificate.serial_number, now())
        with pytest.raises(Untrusted, match="revoked"):
            self.check(maker, device, revocation_list(device.equipment, [entry], now(), number=1))

    def test_a_list_of_another_maker_says_nothing(self, maker: Maker, device: Any) -> None:
        other = Maker("Other")
        self.check(maker, device, other.crl([device]))
        with pytest.raises(Untrusted, match="no revocation list"):
            self.check(maker, device, other.crl([device]), required=True)
        with pytest.raises(Untrusted, match="revoked"):
            self.check(maker, device, other.crl() + maker.crl([device]))

    def test_a_forged_list(self, maker: Maker, device: Any) -> None:
        forged = Maker("Maker")  # another key under the same name
        self.check(maker, device, forged.crl([device]))  # it names its own key
        content = x509.load_pem_x509_crl(maker.crl())
        builder = x509.CertificateRevocationListBuilder(
            content.issuer, content.last_update_utc, content.next_update_utc
        )
        unsigned = builder.sign(forged.ca.key, hashes.SHA256())
        with pytest.raises(Untrusted, match="not signed"):
            judged(chain_of(device), maker.root, lists=Revocations([unsigned]))

    def test_a_list_signed_by_the_device_itself(self, maker: Maker, device: Any) -> None:
        """The only list that the original looks at."""
        content = x509.load_pem_x509_crl(maker.crl())
        builder = x509.CertificateRevocationListBuilder(
            content.issuer, content.last_update_utc, content.next_update_utc
        )
        own = builder.sign(device.equipment.key, hashes.SHA256())
        with pytest.raises(Untrusted, match="not signed"):
            judged(chain_of(device), maker.root, lists=Revocations([own]))

    def test_an_old_list_goes_on_revoking(self, maker: Maker, device: Any) -> None:
        dates = Validity(now() - timedelta(days=9), now() - timedelta(days=1))
        with pytest.raises(Untrusted, match="is revoked"):
            self.check(maker, device, maker.crl([device], dates))
        self.check(maker, device, maker.crl([], dates))
        with pytest.raises(Untrusted, match="in force"):
            self.check(maker, device, maker.crl([], dates), required=True)
        self.check(maker, device, maker.crl([]), required=True)

    def test_no_list_where_one_is_required(self, maker: Maker, device: Any) -> None:
        judged(chain_of(device), maker.root, lists=Revocations())
        with pytest.raises(Untrusted, match="in force"):
            judged(chain_of(device), maker.root, lists=Revocations(required=True))

    @pytest.mark.parametrize(
        "content", [b"", b"x", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"]
    )
    def test_what_is_no_list(self, content: bytes) -> None:
        with pytest.raises(ValueError):
            Revocations.read(content)

    def test_a_list_of_changes_only(self, maker: Maker) -> None:
        content = x509.load_pem_x509_crl(maker.crl())
        builder = x509.CertificateRevocationListBuilder(
            content.issuer, content.last_update_utc, content.next_update_utc
        )
        delta = builder.add_extension(x509.DeltaCRLIndicator(3), True).sign(maker.ca.key, hashes.SHA256())
        with pytest.raises(ValueError, match="critical"):
            Revocations([delta])

    def test_der(self, maker: Maker, device: Any) -> None:
        der = x509.load_pem_x509_crl(maker.crl([device])).public_bytes(Encoding.DER)
        with pytest.raises(Untrusted, match="revoked"):
            self.check(maker, device, der)
