"""Makes keys, certificates, PKCS#12 files and revocation lists; for `fl certs`, tests and demonstrations.

Everything is a value: the clock is an argument, nothing is read or written. Chance comes from OpenSSL, for keys, serial
numbers and what encrypts a file.

    authority = make_authority("fl CA", now)
    server = issue(authority, Role.SERVER, "server1", now, hosts=["10.0.0.5", "server1"])
    server.p12(b"password"), authority.certificate_pem()
    revocation_list(authority, [Revoked(server.certificate.serial_number, now)], now, number=1)

    root, maker = make_device_authority("Example", now)                     # maker: its equipment CA
    device = issue_device(root.certificate, maker, "device-1", now)         # equipment and key attestation certificate

What is made passes the checks of MindSpore Federated 0.1 (common names, signature, basic constraints, key identifiers,
dates) and those of RFC 5280. A node is both ends of TLS, so its certificate is for servers and clients; an operator's
is for clients only, which tells it from a node's. The subject is OU=role, CN=name.

Certificates that are no good come from the same functions: give ``validity``, ``kind``, ``usages`` or another
authority. ``certify`` signs whatever it is told to.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    pkcs12,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from fedcore.errors import ConfigError

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
Usages: TypeAlias = Sequence[ObjectIdentifier]

CA_DAYS = 3650  # a new authority means a visit to every device
# The longest that Apple's TLS accepts below a private authority, since 2019, so that iPhones can be devices.
LEAF_DAYS = 825
# A list is handed to hosts when it changes, nobody fetches it on a schedule; a short life would only be one more clock
# that can run out.
CRL_DAYS = 365
BACKDATE = timedelta(days=1)  # for hosts and devices whose clock is slow, or that take local time for UTC
CN_LENGTH = 64  # RFC 5280, ub-common-name

FOR_NODES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
FOR_OPERATORS = (ExtendedKeyUsageOID.CLIENT_AUTH,)


class KeyKind(StrEnum):
    """Kind and length of a key. TLS at security level 3 takes the first two; devices sign with RSA-2048."""

    EC_P256 = "ec-p256"
    RSA_3072 = "rsa-3072"
    RSA_2048 = "rsa-2048"


class Role(StrEnum):
    """Whom a certificate is for; the OU of its subject.

    SERVER is what fl-serverd's listeners show, CLIENT what any node shows to another one, SCHEDULER what the listener
    of fl-schedulerd shows, OPERATOR a person or script at the operator API.
    """

    SERVER = "server"
    CLIENT = "client"
    SCHEDULER = "scheduler"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Validity:
    """From ``begin`` to ``end``, both included, whole seconds, with a time zone."""

    begin: datetime
    end: datetime


def lasting(now: datetime, days: float) -> Validity:
    """Return the dates of a certificate that is made now: ``days`` in all, the first of them already over."""
    begin = now.replace(microsecond=0) - BACKDATE
    return Validity(begin, begin + timedelta(days=days))


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its private key."""

    key: PrivateKey
    certificate: x509.Certificate

    def certificate_pem(self) -> bytes:
        """Return the certificate."""
        return pem(self.certificate)

    def key_pem(self, password: bytes = b"") -> bytes:
        """Return the key as PKCS#8, encrypted unless the password is empty."""
        encryption = BestAvailableEncryption(password) if password else NoEncryption()
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)

    def p12(self, password: bytes, chain: Iterable[x509.Certificate] = ()) -> bytes:
        """Return a PKCS#12 file.

        Key and certificates are encrypted by PBES2 with AES-256, the file is sealed by HMAC-SHA-256. OpenSSL reads it
        from 1.1 on, and 3 without its legacy provider; Java from 8u301, 11.0.12 and 16. Older Java 8 would ask for
        triple DES and SHA-1; old devices, the only ones that run it, read PEM and no PKCS#12.

        Args:
            password: not empty, and better long and random: the seal costs a guesser only some 2,000 hashes.
            chain: more certificates. Leave it empty for listeners: old devices check each certificate that they are
                sent against their one authority.

        Raises:
            ConfigError: the password is empty.
        """
        if not password:
            raise ConfigError("a PKCS#12 file needs a password")
        encryption = (
            PrivateFormat.PKCS12.encryption_builder()
            .key_cert_algorithm(pkcs12.PBES.PBESv2SHA256AndAES256CBC)
            .hmac_hash(hashes.SHA256())
            .build(password)
        )
        name = common_name(self.certificate).encode()
        return pkcs12.serialize_key_and_certificates(
            name, self.key, self.certificate, list(chain) or None, encryption
        )


def pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as OpenSSL writes it, in lines of 64 characters."""
    return certificate.public_bytes(Encoding.PEM)


def common_name(certificate: x509.Certificate) -> str:
    """Return the first CN of the subject, "" without one."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def load_issued(key_pem: bytes, certificate_pem: bytes, password: bytes = b"") -> Issued:
    """Read key and certificate.

    Raises:
        ConfigError: one cannot be read, they do not belong together, or the key is neither EC nor RSA.
    """
    try:
        key = load_pem_private_key(key_pem, password or None)
        certificate = x509.load_pem_x509_certificate(certificate_pem)
    except (ValueError, TypeError) as error:  # TypeError: a password is missing, or given for nothing
        raise ConfigError(f"key or certificate cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise ConfigError("the key is neither EC nor RSA")
    if key.public_key() != certificate.public_key():
        raise ConfigError("the key is not that of the certificate")
    return Issued(key, certificate)


def make_key(kind: KeyKind) -> PrivateKey:
    """Make a private key; RSA takes some tenths of a second."""
    if kind is KeyKind.EC_P256:
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(65537, {KeyKind.RSA_2048: 2048, KeyKind.RSA_3072: 3072}[kind])


def make_authority(
    name: str,
    now: datetime,
    *,
    kind: KeyKind = KeyKind.EC_P256,
    validity: Validity | None = None,
    key: PrivateKey | None = None,
    issuer: Issued | None = None,
    path_length: int | None = 0,
) -> Issued:
    """Make a certificate authority.

    Args:
        name: common name, at most 64 characters.
        now: with a time zone.
        kind: of its key; EC P-256 signs faster and makes shorter certificates, RSA-3072 is what the original came with.
        validity: default: ten years.
        key: one that is there; default: a new one.
        issuer: who signs it; default: itself.
        path_length: authorities that may stand below it in a chain; None for any number.
    """
    own = key or make_key(kind)
    certificate = certify(
        _subject(name),
        own,
        issuer,
        validity or lasting(now, CA_DAYS),
        [
            (x509.BasicConstraints(True, path_length), True),
            (key_usage("key_cert_sign", "crl_sign"), True),
        ],
    )
    return Issued(own, certificate)


def issue(
    authority: Issued,
    role: Role,
    name: str,
    now: datetime,
    *,
    hosts: Iterable[str] = (),
    kind: KeyKind = KeyKind.EC_P256,
    validity: Validity | None = None,
    days: float | None = None,
    key: PrivateKey | None = None,
    usages: Usages | None = None,
    serial: int | None = None,
) -> Issued:
    """Make the certificate of a node or an operator.

    Args:
        authority: who signs it.
        role: whom it is for.
        name: common name, at most 64 characters.
        now: with a time zone.
        hosts: names and IP addresses under which it is reached, for the subject alternative names.
        kind: of its key.
        validity: whatever the authority's dates; default: ``days``.
        days: how long it lasts, at most until the authority's end; default: 825.
        key: one that is there; default: a new one.
        usages: extended key usages; default: those of the role.
        serial: default: a random one of 159 bits.

    Raises:
        ConfigError: a name cannot be used.
    """
    own = key or make_key(kind)
    if validity is None:
        validity = lasting(now, LEAF_DAYS if days is None else days)
        validity = replace(validity, end=min(validity.end, authority.certificate.not_valid_after_utc))
    if usages is None:
        usages = FOR_OPERATORS if role is Role.OPERATOR else FOR_NODES
    # RSA keys may also carry a secret, for TLS 1.2 clients that insist; all our suites have forward secrecy.
    bits = ["digital_signature", *(["key_encipherment"] if isinstance(own, rsa.RSAPrivateKey) else [])]
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(False, None), True),
        (key_usage(*bits), True),
        (x509.ExtendedKeyUsage(usages), False),
    ]
    names = [_general_name(host) for host in dict.fromkeys(hosts)]
    if names:
        extensions.append((x509.SubjectAlternativeName(names), False))
    certificate = certify(_subject(name, role), own, authority, validity, extensions, serial=serial)
    return Issued(own, certificate)


def certify(
    subject: x509.Name,
    key: PrivateKey,
    issuer: Issued | None,
    validity: Validity,
    extensions: Iterable[tuple[x509.ExtensionType, bool]],
    *,
    serial: int | None = None,
) -> x509.Certificate:
    """Sign a certificate, with SHA-256, and both key identifiers in it.

    Args:
        subject: whose it is.
        key: theirs; only the public half gets into the certificate.
        issuer: who signs; None: the key itself.
        validity: its dates.
        extensions: all but the key identifiers, each with whether it is critical.
        serial: default: a random one.

    Raises:
        ConfigError: the dates are the wrong way round.
    """
    own_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    if issuer is None:
        name, signer, signer_id = subject, key, own_id
    else:
        name, signer = issuer.certificate.subject, issuer.key
        signer_id = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = x509.CertificateBuilder(
        name, subject, key.public_key(), serial or x509.random_serial_number(), extensions=[]
    )
    try:
        builder = builder.not_valid_before(validity.begin).not_valid_after(validity.end)
    except ValueError as error:
        raise ConfigError(f"a certificate cannot be valid from {validity.begin} to {validity.end}") from error
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    builder = builder.add_extension(own_id, False).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer_id), False
    )
    return builder.sign(signer, hashes.SHA256())


def key_usage(*bits: str) -> x509.KeyUsage:
    """Return a key usage with these bits, in the words of ``x509.KeyUsage``, and no others."""
    every = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{bit: bit in bits for bit in every})


def _subject(name: str, role: Role | None = None) -> x509.Name:
    if not 0 < len(name) <= CN_LENGTH:
        raise ConfigError(f"a common name has 1 to {CN_LENGTH} characters, not {len(name)}: {name!r}")
    unit = [] if role is None else [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role.value)]
    return x509.Name([*unit, x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or not host.isascii() or any(not (sign.isalnum() or sign in "-._*") for sign in host):
        raise ConfigError(
            f"{host!r} is neither an IP address nor a host name", hint="write other scripts as xn--…"
        )
    return x509.DNSName(host)


@dataclass(frozen=True, slots=True)
class Revoked:
    """A certificate that is no longer good, from a moment on."""

    serial: int
    since: datetime


def revocation_list(
    authority: Issued,
    revoked: Iterable[Revoked],
    now: datetime,
    *,
    number: int,
    validity: Validity | None = None,
) -> bytes:
    """Sign a list of revoked certificates.

    Args:
        authority: of the certificates.
        revoked: all of them, however old.
        now: with a time zone.
        number: larger than that of each list before.
        validity: last and next update; default: a year.

    Returns:
        The list as PEM.
    """
    dates = validity or lasting(now, CRL_DAYS)
    builder = x509.CertificateRevocationListBuilder(
        authority.certificate.subject, dates.begin, dates.end, extensions=[], revoked_certificates=[]
    )
    for each in revoked:
        entry = x509.RevokedCertificateBuilder(each.serial, each.since.replace(microsecond=0)).build()
        builder = builder.add_revoked_certificate(entry)
    own_id = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    signed = (
        builder.add_extension(x509.CRLNumber(number), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own_id), False)
        .sign(authority.key, hashes.SHA256())
    )
    return signed.public_bytes(Encoding.PEM)


@dataclass(frozen=True, slots=True)
class Device:
    """A device's two certificates, below those of its maker.

    Attributes:
        attestation: with the key that signs requests.
        equipment: with the key that signed ``attestation``; its certificate gives the device its name.
        equipment_ca: certificate of the maker.
        root: certificate that servers trust.
    """

    attestation: Issued
    equipment: Issued
    equipment_ca: x509.Certificate
    root: x509.Certificate

    @property
    def chain(self) -> tuple[x509.Certificate, x509.Certificate, x509.Certificate, x509.Certificate]:
        """The four certificates in the order of a device's key store."""
        return self.attestation.certificate, self.equipment.certificate, self.equipment_ca, self.root

    def chain_pem(self) -> bytes:
        """Return the four certificates in that order."""
        return b"".join(pem(certificate) for certificate in self.chain)

    @property
    def fl_id(self) -> str:
        """The device's name in the protocol: SHA-256 of the PEM of its equipment certificate, in hexadecimal."""
        return hashlib.sha256(self.equipment.certificate_pem()).hexdigest()


def make_device_authority(
    name: str, now: datetime, *, kind: KeyKind = KeyKind.RSA_3072, validity: Validity | None = None
) -> tuple[Issued, Issued]:
    """Make who vouches for devices: the root that servers trust, and the maker's equipment CA below it."""
    root = make_authority(f"{name} root", now, kind=kind, validity=validity, path_length=2)
    maker = make_authority(
        f"{name} equipment CA", now, kind=kind, validity=validity, issuer=root, path_length=1
    )
    return root, maker


def issue_device(
    root: x509.Certificate,
    maker: Issued,
    name: str,
    now: datetime,
    *,
    kind: KeyKind = KeyKind.RSA_2048,
    validity: Validity | None = None,
    equipment_signs: bool = True,
) -> Device:
    """Make the certificates of a device.

    Args:
        root: what servers trust; its key is not needed.
        maker: the equipment CA.
        name: common name of the equipment certificate.
        now: with a time zone.
        kind: of both keys. RSA-2048 is the only one whose signatures the original can take.
        validity: of both; default: as long as the maker's.
        equipment_signs: whether the equipment certificate says that it may sign others, as RFC 5280 wants it and
            the original does not.
    """
    dates = validity or Validity(lasting(now, 0).begin, maker.certificate.not_valid_after_utc)
    bits = ["digital_signature", *(["key_cert_sign"] if equipment_signs else [])]
    constraints = x509.BasicConstraints(equipment_signs, 0 if equipment_signs else None)
    key = make_key(kind)
    own = certify(_subject(name), key, maker, dates, [(constraints, True), (key_usage(*bits), True)])
    equipment = Issued(key, own)
    key = make_key(kind)
    leaf: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(False, None), True),
        (key_usage("digital_signature"), True),
    ]
    attestation = Issued(key, certify(_subject(f"{name} key"), key, equipment, dates, leaf))
    return Device(attestation, equipment, maker.certificate, root)
