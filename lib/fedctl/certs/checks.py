"""Is a certificate good for what it is to be used for? One check after the other, each with its remedy.

These are the questions that daemons put: of the own certificate at their start (fedcore.pki.chain), of others during a
handshake. Here they are answered beforehand, in plain words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from itertools import pairwise

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from fedcore.errors import ConfigError
from fedcore.pki.chain import dates, fits, in_force, is_authority, names_of, own_chain_fault
from fedcore.pki.revocation import read_lists
from fedctl.certs.display import key_of, remark
from fedctl.certs.folder import hexadecimal

# Security level 3 of OpenSSL: 128 bits.
TLS_BITS = {"RSA": 3072, "EC": 256}
DEVICE_BITS = {"RSA": 2048, "EC": 256}


class Purpose(StrEnum):
    """What a certificate is to be used for."""

    NODE = "node"
    OPERATOR = "operator"
    DEVICE = "device"


_USAGES: dict[Purpose, dict[ObjectIdentifier, str]] = {
    Purpose.NODE: {
        ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth",
        ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth",
    },
    Purpose.OPERATOR: {ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth"},
    Purpose.DEVICE: {},
}


@dataclass(frozen=True, slots=True)
class Check:
    """The answer to one question.

    Attributes:
        name: of the question.
        text: what was found.
        remedy: what helps; "" if all is well.
    """

    name: str
    text: str
    remedy: str = ""

    @property
    def good(self) -> bool:
        """Whether all is well."""
        return not self.remedy


def purpose_of(certificates: Sequence[x509.Certificate]) -> Purpose:
    """Guess what certificates are for: devices show a chain, operators say so in their OU."""
    units = certificates[0].subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    if any(unit.value == "operator" for unit in units):
        return Purpose.OPERATOR
    makers = [certificate for certificate in certificates[1:] if is_authority(certificate)]
    return Purpose.DEVICE if len(makers) >= 2 and not units else Purpose.NODE


def check(
    certificates: Sequence[x509.Certificate],
    authorities: Sequence[x509.Certificate],
    purpose: Purpose,
    now: datetime,
    *,
    crl: bytes | None = None,
    host: str = "",
) -> Iterator[Check]:
    """Put all questions to a certificate.

    Args:
        certificates: the certificate, and those between it and the authority, in order; at least one.
        authorities: what is trusted; at least one.
        purpose: what it is to be used for.
        now: with a time zone.
        crl: content of a file of revocation lists, None for none.
        host: name or address under which it is reached, "" if that does not matter.
    """
    leaf = certificates[0]
    chain = [each for each in certificates if each not in authorities]
    yield from _dates(certificates, now)
    yield _chain(chain, authorities, now)
    yield _strength(leaf, DEVICE_BITS if purpose is Purpose.DEVICE else TLS_BITS)
    yield _usage(leaf, purpose)
    if host:
        yield _host(leaf, host)
    if crl is not None:
        yield from _revocation(chain, [*authorities, *chain[1:]], crl, now)


def _dates(certificates: Sequence[x509.Certificate], now: datetime) -> Iterator[Check]:
    for certificate in certificates:
        text = f"{certificate.subject.rfc4514_string()} is valid {dates(certificate)}, {remark(certificate, now)}"
        good = in_force(certificate, now)
        yield Check(
            "dates", text, "" if good else "renew it (fl certs issue … --replace), or set this host's clock"
        )


def _chain(
    chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate], now: datetime
) -> Check:
    if not chain:
        return Check("chain", "it is the authority itself")
    for lower, upper in pairwise(chain):
        fault = own_chain_fault(lower, [upper], now)
        if fault:
            return Check("chain", f"{fault.text} {fault.remedy}", _order(lower))
    fault = own_chain_fault(chain[-1], authorities, now)
    if fault:
        return Check(
            "chain",
            f"{fault.text} {fault.remedy}",
            "give --ca the certificate of its issuer, or issue it anew with this authority",
        )
    return Check("chain", f"leads to {chain[-1].issuer.rfc4514_string()}")


def _order(certificate: x509.Certificate) -> str:
    return (
        f"the certificate of {certificate.issuer.rfc4514_string()!r} belongs below that of "
        f"{certificate.subject.rfc4514_string()!r} in the file"
    )


def _strength(leaf: x509.Certificate, least: dict[str, int]) -> Check:
    kind, bits = key_of(leaf)
    if bits >= least.get(kind, 1 << 30):
        return Check("key", f"{kind} of {bits} bits")
    wanted = " or ".join(f"{name} of {length} bits" for name, length in least.items())
    return Check("key", f"{kind} of {bits} bits is too weak, or not known", f"issue it with {wanted} or more")


def _usage(leaf: x509.Certificate, purpose: Purpose) -> Check:
    missing = []
    try:
        if not leaf.extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature:
            missing.append("digitalSignature")
    except x509.ExtensionNotFound:
        pass  # no restriction
    try:
        usages = list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        missing += [name for usage, name in _USAGES[purpose].items() if usage not in usages]
    except x509.ExtensionNotFound:
        pass
    if missing:
        text = f"it may not be used for {' and '.join(missing)}, which a {purpose} needs"
        return Check("usage", text, "issue it for the right role: fl certs issue --help")
    return Check(
        "usage", f"fit for a {purpose}" if purpose is not Purpose.OPERATOR else "fit for an operator"
    )


def _host(leaf: x509.Certificate, host: str) -> Check:
    names = names_of(leaf)
    if fits(names, host):
        return Check("host", f"{host} is among its names")
    having = ", ".join(sorted(names)) or "none"
    return Check("host", f"{host} is not among its names: {having}", f"issue it with --host {host}")


def _revocation(
    chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate], crl: bytes, now: datetime
) -> Iterator[Check]:
    try:
        lists = read_lists(crl, authorities, now)
    except ConfigError as fault:
        yield Check("revocation", str(fault), "make the list anew: fl certs crl")
        return
    for text in lists.overdue(now):
        yield Check("revocation", text, "make it anew: fl certs crl, and give it to all hosts")
    for certificate in chain:
        if lists.revokes(certificate):
            serial = hexadecimal(certificate.serial_number)
            text = f"{certificate.subject.rfc4514_string()}, serial {serial}, is revoked"
            yield Check("revocation", text, "issue another one: fl certs issue")
            return
    issuers = {one.issuer for one in lists.lists}
    if chain and not any(certificate.issuer in issuers for certificate in chain):
        yield Check(
            "revocation",
            "the list is one of another authority than those of the chain",
            "give --crl the list of its issuer",
        )
        return
    yield Check("revocation", "not revoked")
