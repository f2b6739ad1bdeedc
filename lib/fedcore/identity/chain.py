"""From a request's certificates to the key that signs, by way of the trusted roots.

A device shows three certificates: the key attestation, signed by the key of the equipment certificate, which an
equipment CA has issued, which one of two roots has signed. The roots are files of the operator; what a request
calls its root is not read.

The path from the equipment certificate to a root is validated by OpenSSL as RFC 5280 says, with the roots as
anchors. Its rules for certificates of web servers are not wanted here, which is why
``cryptography.x509.verification`` is not used: it asks for names and usages that these certificates never had.
OpenSSL does not judge dates, as ours have a slack, and not the attestation: an equipment certificate need not be a
CA, and the names of the two need not match. Then the rules of MindSpore Federated 0.1 are applied, all to the one
root that the path ends at; there, two rules may be met by two roots. Stricter than the original: whole names
instead of common names, the roots' own dates, keys from 2048 bits (RSA) or 256 (EC), SHA-2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import NameOID
from OpenSSL import crypto

from fedcore.identity import pss
from fedcore.identity.pem import UNUSABLE, Untrusted, fl_id_of, read_pem
from fedcore.identity.revocation import Revocations

NOT_YET_VALID = timedelta(seconds=600)  # notBefore may lie so far in the future
LONGEST_NAME = 255  # characters of a common name
LEAST_CURVE = 256  # bits
_DIGESTS = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, which pyOpenSSL does not name


@dataclass(frozen=True, slots=True)
class Chain:
    """What a device shows."""

    attestation: x509.Certificate
    equipment: x509.Certificate
    equipment_ca: x509.Certificate

    @classmethod
    def read(cls, fl_id: str, attestation: str, equipment: str, equipment_ca: str) -> Chain:
        """Read the certificates of a startFLJob, all in PEM form.

        Raises:
            Untrusted: one is none, or the id is not that of the equipment certificate.
        """
        if fl_id != fl_id_of(equipment):
            raise Untrusted("the id is not that of the equipment certificate")
        return cls(read_pem(attestation), read_pem(equipment), read_pem(equipment_ca))

    def key(self) -> rsa.RSAPublicKey:
        """Return the key of the attestation, which nobody may trust yet.

        Raises:
            Untrusted: it is not one that devices may sign with.
        """
        try:
            return pss.check_key(self.attestation.public_key())
        except UNUSABLE as error:
            raise Untrusted(f"the attestation's key cannot be used: {error}") from error


class Anchors:
    """The trusted roots.

    Attributes:
        roots: both, or as many as there are.
    """

    def __init__(self, roots: Sequence[x509.Certificate]) -> None:
        self.roots = tuple(roots)
        self._store = crypto.X509Store()
        for root in self.roots:
            self._store.add_cert(crypto.X509.from_cryptography(root))
        # A root in the file is trusted as it is, also if another one has signed it.
        self._store.set_flags(_NO_CHECK_TIME | crypto.X509StoreFlags.PARTIAL_CHAIN)

    def root_of(self, chain: Chain) -> x509.Certificate:
        """Return the root that the path from the equipment certificate over its CA ends at.

        Raises:
            Untrusted: there is no such path.
        """
        context = crypto.X509StoreContext(
            self._store,
            crypto.X509.from_cryptography(chain.equipment),
            [crypto.X509.from_cryptography(chain.equipment_ca)],
        )
        try:
            path = [one.to_cryptography() for one in context.get_verified_chain()]
        except (crypto.X509StoreContextError, crypto.Error) as error:
            raise Untrusted(f"no path to a trusted root: {error}") from error
        # Were the root itself taken as equipment CA, a device could show its equipment certificate as attestation, and
        # be all that its maker's CA is: an id beside its own, which no list of revoked devices names.
        if len(path) != 3 or path[1] != chain.equipment_ca:
            raise Untrusted("there is not exactly the equipment CA between equipment and trusted root")
        return path[-1]


def signing_key(chain: Chain, anchors: Anchors, revocations: Revocations, now: datetime) -> rsa.RSAPublicKey:
    """Return the key that may sign for a device.

    Args:
        chain: what it shows.
        anchors: whom we trust.
        revocations: which equipment certificates are not trusted any more.
        now: with a time zone.

    Raises:
        Untrusted: a certificate is not good.
    """
    try:
        return _validated(chain, anchors, revocations, now)
    except (*UNUSABLE, crypto.Error) as error:
        # What a certificate holds is parsed when it is asked for; what cannot be parsed proves nothing.
        raise Untrusted(f"a certificate cannot be used: {error}") from error


def _validated(chain: Chain, anchors: Anchors, revocations: Revocations, now: datetime) -> rsa.RSAPublicKey:
    key = chain.key()
    for certificate in (chain.equipment, chain.equipment_ca):
        _check_strength(certificate)
    root = anchors.root_of(chain)
    _check_strength(root)
    for certificate in (chain.attestation, chain.equipment, chain.equipment_ca, root):
        _check_dates(certificate, now)
    _check_original_rules(chain, root)
    _check_attestation(chain)
    revocations.check(chain.equipment_ca, root)
    revocations.check(chain.equipment, chain.equipment_ca)
    revocations.check(chain.attestation, chain.equipment)
    revocations.check_age(chain.equipment_ca, now)
    return key


def _check_strength(certificate: x509.Certificate) -> None:
    key = certificate.public_key()
    strong = isinstance(key, rsa.RSAPublicKey) and pss.LEAST_BITS <= key.key_size <= pss.MOST_BITS
    curve = isinstance(key, ec.EllipticCurvePublicKey) and key.key_size >= LEAST_CURVE
    if not strong and not curve:
        raise Untrusted("a key of the chain is neither RSA of 2048 to 8192 bits nor EC of 256 or more")
    if not isinstance(certificate.signature_hash_algorithm, _DIGESTS):
        raise Untrusted("a certificate of the chain is not signed with SHA-2")


def _check_dates(certificate: x509.Certificate, now: datetime) -> None:
    if certificate.not_valid_before_utc > now + NOT_YET_VALID:
        raise Untrusted(f"a certificate is not valid before {certificate.not_valid_before_utc}")
    if certificate.not_valid_after_utc < now:
        raise Untrusted(f"a certificate has ended on {certificate.not_valid_after_utc}")


def _check_original_rules(chain: Chain, root: x509.Certificate) -> None:
    authority = chain.equipment_ca
    if _common_name(authority.subject) != _common_name(chain.equipment.issuer):
        raise Untrusted("the common names of equipment CA and equipment certificate do not match")
    if _common_name(root.subject) != _common_name(authority.issuer):
        raise Untrusted("the common names of root and equipment CA do not match")
    if not authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
        raise Untrusted("the equipment CA is no CA")
    if not authority.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign:
        raise Untrusted("the equipment CA may not sign certificates")
    if _authority_id(authority) != _subject_id(root) or _authority_id(chain.equipment) != _subject_id(
        authority
    ):
        raise Untrusted("the key identifiers of the chain do not match")


def _common_name(name: x509.Name) -> str:
    names = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    text = names[0].value if names else ""
    if not isinstance(text, str) or not 0 < len(text) <= LONGEST_NAME:
        raise Untrusted("a certificate of the chain has no common name")
    return text


def _subject_id(certificate: x509.Certificate) -> bytes:
    return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.key_identifier


def _authority_id(certificate: x509.Certificate) -> bytes | None:
    return certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier


def _check_attestation(chain: Chain) -> None:
    leaf = chain.attestation
    for extension in leaf.extensions:
        if extension.critical and isinstance(extension.value, x509.UnrecognizedExtension):
            raise Untrusted(f"the attestation has a critical extension {extension.oid.dotted_string}")
    if not isinstance(leaf.signature_hash_algorithm, _DIGESTS):
        raise Untrusted("the attestation is not signed with SHA-2")
    key, how = chain.equipment.public_key(), leaf.signature_algorithm_parameters
    try:
        if isinstance(key, rsa.RSAPublicKey) and isinstance(how, padding.PKCS1v15 | padding.PSS):
            key.verify(leaf.signature, leaf.tbs_certificate_bytes, how, leaf.signature_hash_algorithm)
            return
        if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(how, ec.ECDSA):
            key.verify(leaf.signature, leaf.tbs_certificate_bytes, how)
            return
    except InvalidSignature:
        pass
    raise Untrusted("the attestation is not signed by the equipment's key")
