"""What is in a file of certificates: PEM, DER, PKCS#12 or a revocation list; for people and for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import NameOID

from fedcore.errors import ConfigError
from fedcore.identity.pem import fl_id_of, pem_form
from fedcore.pki.chain import is_authority, names_of
from fedctl.certs.folder import hexadecimal

_LIST = b"-----BEGIN X509 CRL-----"
_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_DER = b"\x30"


@dataclass(frozen=True, slots=True)
class Found:
    """What a file holds.

    Attributes:
        certificates: in its order; of PKCS#12 the one that the key belongs to first.
        lists: revocation lists.
        has_key: whether a private key is with them; PKCS#12 only.
    """

    certificates: list[x509.Certificate]
    lists: list[x509.CertificateRevocationList]
    has_key: bool = False

    @property
    def is_device_chain(self) -> bool:
        """Whether this looks like the certificates of a device: two of its own, its maker's, a root."""
        return len(self.certificates) == 4 and all(is_authority(each) for each in self.certificates[2:])


def parse(content: bytes, password: Callable[[], bytes]) -> Found:
    """Find out what a file holds.

    Args:
        content: of the file.
        password: called if it is PKCS#12.

    Raises:
        ConfigError: it holds neither certificates nor a list, or the password is wrong.
    """
    try:
        if _CERTIFICATE in content:
            return Found(x509.load_pem_x509_certificates(content), [])
        if _LIST in content:
            return Found([], [x509.load_pem_x509_crl(content)])
    except ValueError as error:
        raise ConfigError(f"its PEM is damaged: {error}") from error
    if content[:1] == _DER:
        for form in (_der_certificate, _der_list):
            try:
                return form(content)
            except ValueError:
                continue
        return _pkcs12(content, password())
    raise ConfigError("it holds neither certificates, nor PKCS#12, nor a revocation list")


def _der_certificate(content: bytes) -> Found:
    return Found([x509.load_der_x509_certificate(content)], [])


def _der_list(content: bytes) -> Found:
    return Found([], [x509.load_der_x509_crl(content)])


def _pkcs12(content: bytes, password: bytes) -> Found:
    try:
        key, own, others = pkcs12.load_key_and_certificates(content, password)
    except ValueError as error:
        raise ConfigError("it cannot be opened: wrong password, or no PKCS#12 file") from error
    return Found([*([own] if own else []), *others], [], key is not None)


def key_of(certificate: x509.Certificate) -> tuple[str, int]:
    """Return kind ("RSA", "EC" or another name) and length in bits of a certificate's key."""
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        return "RSA", key.key_size
    if isinstance(key, ec.EllipticCurvePublicKey):
        return "EC", key.key_size
    return type(key).__name__.removesuffix("PublicKey").strip("_"), 0


def certificate_facts(certificate: x509.Certificate, is_equipment: bool = False) -> dict[str, str]:
    """Return what people want to know of a certificate, name -> value; what it does not have is not there.

    Args:
        certificate: any.
        is_equipment: whether it gives a device its fl_id.
    """
    kind, bits = key_of(certificate)
    units = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    facts = {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "role": "authority" if is_authority(certificate) else ", ".join(str(unit.value) for unit in units),
        "names": ", ".join(sorted(names_of(certificate))),
        "from": certificate.not_valid_before_utc.isoformat(),
        "until": certificate.not_valid_after_utc.isoformat(),
        "serial": hexadecimal(certificate.serial_number),
        "key": f"{kind} {bits}" if bits else kind,
        "usage": ", ".join(_usages(certificate)),
        "SHA-256": certificate.fingerprint(hashes.SHA256()).hex(":").upper(),
        "fl_id": fl_id_of(pem_form(certificate)) if is_equipment else "",
    }
    return {name: value for name, value in facts.items() if value}


def _usages(certificate: x509.Certificate) -> Iterator[str]:
    """Yield the names of key usages and extended key usages."""
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.ExtendedKeyUsage):
            yield from (usage._name for usage in extension.value)
        if isinstance(extension.value, x509.KeyUsage):
            usage = extension.value
            bits = {
                "digitalSignature": usage.digital_signature,
                "nonRepudiation": usage.content_commitment,
                "keyEncipherment": usage.key_encipherment,
                "dataEncipherment": usage.data_encipherment,
                "keyAgreement": usage.key_agreement,
                "keyCertSign": usage.key_cert_sign,
                "cRLSign": usage.crl_sign,
            }
            yield from (name for name, given in bits.items() if given)


def list_facts(found: x509.CertificateRevocationList) -> dict[str, str]:
    """Return what people want to know of a revocation list."""
    end = found.next_update_utc
    revoked = [
        f"{hexadecimal(each.serial_number)} since {each.revocation_date_utc.isoformat()}" for each in found
    ]
    return {
        "revocation list of": found.issuer.rfc4514_string(),
        "from": found.last_update_utc.isoformat(),
        **({"next": end.isoformat()} if end else {}),
        "revoked": "; ".join(revoked) or "nothing",
    }


def lines(facts: Mapping[str, str]) -> Iterator[str]:
    """Yield facts as lines."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        yield f"{name:{width}}  {value}"


def remark(certificate: x509.Certificate, now: datetime) -> str:
    """Say in a few words how long a certificate lasts."""
    if now < certificate.not_valid_before_utc:
        return "not valid yet"
    left = certificate.not_valid_after_utc - now
    return f"{left.days} days left" if left.days >= 0 else f"expired {-left.days} days ago"
