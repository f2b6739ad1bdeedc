"""The two forms in which certificates travel, and the client's id that follows from one.

PEM form (startFLJob): as OpenSSL writes it, lines of 64 characters, each ended by a line feed. Bare form
(exchangeKeys): base64 of the DER encoding in one line. Only these very characters are taken: one certificate has
one id.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from fedcore.errors import CryptoError

# What cryptography raises for certificates that it cannot make sense of, at first or when a part is asked for.
UNUSABLE = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)
LONGEST_PEM = 64 * 1024  # characters; a genuine certificate has some 2,000


class Untrusted(CryptoError):
    """Certificates, a signature or a time stamp do not prove what they should."""


def pem_form(certificate: x509.Certificate) -> str:
    """Return a certificate as startFLJob carries it."""
    return certificate.public_bytes(Encoding.PEM).decode("ascii")


def bare_form(certificate: x509.Certificate) -> str:
    """Return a certificate as exchangeKeys carries it."""
    return base64.b64encode(certificate.public_bytes(Encoding.DER)).decode("ascii")


def fl_id_of(pem: str) -> str:
    """Return the id of the client whose equipment certificate this is: SHA-256 of the PEM form, in hexadecimal."""
    return hashlib.sha256(pem.encode()).hexdigest()


def read_pem(text: str) -> x509.Certificate:
    """Read a certificate in PEM form.

    Raises:
        Untrusted: it is none, or is written in another way.
    """
    if len(text) > LONGEST_PEM:
        raise Untrusted(f"a certificate of {len(text)} characters")
    try:
        certificate = x509.load_pem_x509_certificate(text.encode())
    except UNUSABLE as error:
        raise Untrusted(f"no certificate in PEM form: {error}") from error
    return _canonical(certificate, pem_form(certificate) == text)


def read_bare(text: str) -> x509.Certificate:
    """Read a certificate in bare form.

    Raises:
        Untrusted: it is none, or is written in another way.
    """
    if len(text) > LONGEST_PEM:
        raise Untrusted(f"a certificate of {len(text)} characters")
    try:
        certificate = x509.load_der_x509_certificate(base64.b64decode(text, validate=True))
    except (*UNUSABLE, binascii.Error) as error:
        raise Untrusted(f"no certificate in bare form: {error}") from error
    return _canonical(certificate, bare_form(certificate) == text)


def _canonical(certificate: x509.Certificate, same: bool) -> x509.Certificate:
    if not same:
        raise Untrusted("the certificate is not written as OpenSSL writes it: another id for the same device")
    return certificate
