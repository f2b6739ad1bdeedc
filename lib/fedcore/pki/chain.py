"""What is asked of a certificate before it is used: does it come from our authority, does it bear a name?

Rules kept here:

* Everything is a function of its arguments; files are read elsewhere.
* A node's own certificate is checked in the order, and refused in the words, of MindSpore Federated 0.1, spelling
  included.
* Only subjectAltName tells whom a certificate is for; the common name of a leaf is never looked at.

Whether a *peer's* certificate leads to the authority is for OpenSSL, during the handshake.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address, ip_address

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID

OTHER_AUTHORITY = "root CA cert subject cn is not equal with equip CA cert issuer cn."
WRONG_SIGNATURE = "Verify Singature failed."  # spelt so in the original
NO_AUTHORITY = "Verify Extended Attributes failed."
OTHER_KEY = "Verify Cert KeyID failed."
NOT_IN_FORCE = "Verify Cert Time failed."
_STEPS = (OTHER_AUTHORITY, WRONG_SIGNATURE, NO_AUTHORITY, OTHER_KEY, NOT_IN_FORCE)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a certificate must not be used.

    Attributes:
        text: in the words of the original.
        remedy: what is wrong in ours, and what helps.
    """

    text: str
    remedy: str


def own_chain_fault(
    leaf: x509.Certificate, authorities: Sequence[x509.Certificate], now: datetime
) -> Fault | None:
    """Check that one of the authorities has signed a node's own certificate, and that both are in force.

    Args:
        leaf: the node's certificate.
        authorities: those that its peers trust, at least one; several while an authority is exchanged.
        now: with a time zone.

    Returns:
        None if all is well with one authority, else the fault of the one that fits best.

    Source: MindSpore Federated 0.1: names, signature, basicConstraints, key identifiers, dates, in this order.
    """
    faults = [_fault(leaf, authority, now) for authority in authorities]
    if not faults or None in faults:
        return None if faults else Fault(OTHER_AUTHORITY, "the CA file holds no certificate")
    return max((fault for fault in faults if fault), key=lambda fault: _STEPS.index(fault.text))


def _fault(leaf: x509.Certificate, authority: x509.Certificate, now: datetime) -> Fault | None:
    if _common_name(authority.subject) != _common_name(leaf.issuer):
        return Fault(
            OTHER_AUTHORITY,
            f"the certificate was issued by {leaf.issuer.rfc4514_string()!r}, the CA file has "
            f"{authority.subject.rfc4514_string()!r}",
        )
    if not signed_by(leaf, authority):
        return Fault(WRONG_SIGNATURE, "the certificate was signed by another key than that of the CA file")
    if not is_authority(authority):
        return Fault(
            NO_AUTHORITY, "the certificate in the CA file is none of an authority: CA:TRUE is missing"
        )
    wanted, named = _subject_key(authority), _authority_key(leaf)
    if wanted is None or wanted != named:
        return Fault(
            OTHER_KEY,
            "subjectKeyIdentifier of the CA and authorityKeyIdentifier of the certificate are missing or differ",
        )
    for certificate, what in ((leaf, "the certificate"), (authority, "the CA's certificate")):
        if not in_force(certificate, now):
            return Fault(NOT_IN_FORCE, f"{what} is valid {dates(certificate)}: renew it, or set the clock")
    return None


def signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Tell whether an authority's key has signed a certificate, and its subject is the certificate's issuer."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):  # other names, keys that sign nothing, another key
        return False
    return True


def is_authority(certificate: x509.Certificate) -> bool:
    """Tell whether a certificate says that it may sign others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def in_force(certificate: x509.Certificate, now: datetime) -> bool:
    """Tell whether a moment, with a time zone, is within a certificate's dates."""
    return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


def dates(certificate: x509.Certificate) -> str:
    """Return a certificate's dates for a message."""
    return f"from {certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}"


def names_of(certificate: x509.Certificate) -> frozenset[str]:
    """Return what a certificate's subjectAltName holds: DNS names in lower case, IP addresses as Python writes them."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return frozenset()
    addresses = names.get_values_for_type(x509.IPAddress)
    hosts = {str(one) for one in addresses if isinstance(one, IPv4Address | IPv6Address)}
    dns = {name.lower() for name in names.get_values_for_type(x509.DNSName)}
    return frozenset(hosts | {name for name in dns if not _is_address(name)})  # an address is no name


def fits(names: Iterable[str], host: str) -> bool:
    """Tell whether a certificate is one of a host.

    Args:
        names: of its subjectAltName, as ``names_of`` gives them; ``*.example.org`` is good for one more label.
        host: IPv4, IPv6 (brackets do not matter) or host name; "" fits nothing.
    """
    bare = host.removeprefix("[").removesuffix("]")
    if _is_address(bare):
        return str(ip_address(bare)) in names
    name = bare.lower().removesuffix(".")
    if _is_address(name):
        return False
    _, dot, rest = name.partition(".")
    return bool(name) and (name in names or (bool(dot) and "." in rest and f"*.{rest}" in names))


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _common_name(name: x509.Name) -> list[str]:
    return [str(part.value) for part in name.get_attributes_for_oid(NameOID.COMMON_NAME)]


def _subject_key(certificate: x509.Certificate) -> bytes | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    except (x509.ExtensionNotFound, ValueError):
        return None


def _authority_key(certificate: x509.Certificate) -> bytes | None:
    try:
        return certificate.extensions.get_extension_for_class(
            x509.AuthorityKeyIdentifier
        ).value.key_identifier
    except (x509.ExtensionNotFound, ValueError):
        return None
