"""Which equipment certificates are revoked: the lists of ``client_verify.equip_crl_path``.

A list counts for a certificate if it is of that certificate's issuer and signed by it. Which equipment CAs there
are is not known before a device shows one, so a list is verified when it is first needed, once per issuer. A list
past its nextUpdate goes on being used, as what it revokes stays revoked, unless a list is required.

MindSpore Federated 0.1 looks up no serial number, and verifies the list under the device's own certificate.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedcore.identity.pem import UNUSABLE, Untrusted

CLOCK_SLACK = timedelta(seconds=600)  # a list may begin so far in the future
_MOST_ISSUERS = 64  # of which it is remembered whether they have signed a list
_BEGIN, _END = b"-----BEGIN X509 CRL-----", b"-----END X509 CRL-----"


class _List:
    """One list, its serial numbers ready to be looked up."""

    def __init__(self, content: x509.CertificateRevocationList) -> None:
        for extension in content.extensions:
            if (
                extension.critical
            ):  # such as a delta or an indirect list: it says another thing than it seems to
                raise ValueError(f"it has the critical extension {extension.oid.dotted_string}")
        self.content = content
        self.serials = frozenset(entry.serial_number for entry in content)
        self._signed_by: dict[bytes, bool] = {}

    def is_of(self, issuer: x509.Certificate) -> bool:
        """Tell whether the list names this issuer, and this one's key if it names one."""
        if self.content.issuer != issuer.subject:
            return False
        try:
            named = self.content.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
            held = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        except x509.ExtensionNotFound:
            return True
        return named.key_identifier in (None, held.key_identifier)

    def is_signed_by(self, issuer: x509.Certificate) -> bool:
        """Tell whether this issuer has signed the list; found out once."""
        name = issuer.fingerprint(issuer.signature_hash_algorithm)  # type: ignore[arg-type]  # checked by the caller
        if name not in self._signed_by:
            if len(self._signed_by) >= _MOST_ISSUERS:
                self._signed_by.clear()
            self._signed_by[name] = self._verify(issuer)
        return self._signed_by[name]

    def _verify(self, issuer: x509.Certificate) -> bool:
        try:
            return self.content.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]  # else TypeError
        except (*UNUSABLE, InvalidSignature):
            return False


class Revocations:
    """Revocation lists.

    Attributes:
        required: whether each equipment CA must have a list that is in force.
    """

    def __init__(
        self, contents: Iterable[x509.CertificateRevocationList] = (), *, required: bool = False
    ) -> None:
        """Take the lists.

        Raises:
            ValueError: one cannot be used.
        """
        self.required = required
        self._lists = tuple(_List(content) for content in contents)

    @classmethod
    def read(cls, content: bytes, *, required: bool = False) -> Revocations:
        """Read a file of one or more lists in PEM form, or one in DER.

        Raises:
            ValueError: there is no list, or one cannot be used.
        """
        parts = [part.partition(_END)[0] for part in content.split(_BEGIN)[1:]]
        if not parts:
            return cls([x509.load_der_x509_crl(content)], required=required)
        lists = [x509.load_pem_x509_crl(_BEGIN + part + _END + b"\n") for part in parts]
        return cls(lists, required=required)

    @property
    def next_update(self) -> datetime | None:
        """When the first of the lists should be followed by another one, None if none says so."""
        return min(
            (each for one in self._lists if (each := one.content.next_update_utc) is not None), default=None
        )

    def check(self, certificate: x509.Certificate, issuer: x509.Certificate) -> None:
        """Make sure that a certificate is not revoked.

        Args:
            certificate: signed by ``issuer``, as was verified before.
            issuer: itself trusted.

        Raises:
            Untrusted: it is revoked, or a list of its issuer is forged.
        """
        own = [one for one in self._lists if one.is_of(issuer)]
        if not all(one.is_signed_by(issuer) for one in own):
            raise Untrusted("a revocation list of this issuer is not signed by it")
        if any(certificate.serial_number in one.serials for one in own):
            raise Untrusted("a certificate is revoked")

    def check_age(self, issuer: x509.Certificate, now: datetime) -> None:
        """Make sure that an issuer has a list in force at a moment with a time zone, if that is required.

        Raises:
            Untrusted: it has none.
        """
        lists = (one for one in self._lists if one.is_of(issuer))
        if self.required and not any(_in_force(one.content, now) for one in lists):
            raise Untrusted("there is no revocation list of this issuer that is in force")


def _in_force(content: x509.CertificateRevocationList, now: datetime) -> bool:
    begins, ends = content.last_update_utc, content.next_update_utc
    return begins <= now + CLOCK_SLACK and (ends is None or now <= ends)
