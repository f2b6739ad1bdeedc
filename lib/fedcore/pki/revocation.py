"""Revoked certificates: what a revocation list says, and a file of lists that is read again when it has changed.

Rules kept here:

* A list counts only if one of our authorities has signed it; whoever writes the file cannot forge one.
* A list past its nextUpdate goes on being used: what it revokes stays revoked. That is told.
* A new file that cannot be used changes nothing: the lists of before stay in force. That is told, too.

MindSpore Federated 0.1 accepts a list that its own certificate has *not* signed, and looks up no serial number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedcore.errors import ConfigError

NOT_IN_FORCE = "check crl time failed"
UNUSABLE = "Verify crl failed."
_BEGIN, _END = b"-----BEGIN X509 CRL-----", b"-----END X509 CRL-----"


@dataclass(frozen=True, slots=True)
class RevocationLists:
    """The lists of a file, one for each authority that has one.

    Attributes:
        lists: signed by the authorities.
    """

    lists: tuple[x509.CertificateRevocationList, ...] = ()

    def revokes(self, certificate: x509.Certificate) -> bool:
        """Tell whether a certificate is revoked by the list of its issuer."""
        serial = certificate.serial_number
        return any(
            one.get_revoked_certificate_by_serial_number(serial) is not None
            for one in self.lists
            if one.issuer == certificate.issuer
        )

    @property
    def next_update(self) -> datetime | None:
        """When the first of the lists should have a successor, None if none says so."""
        moments = [one.next_update_utc for one in self.lists if one.next_update_utc is not None]
        return min(moments, default=None)

    def overdue(self, now: datetime) -> list[str]:
        """Return a sentence for each list whose successor should be here, at a moment with a time zone."""
        return [
            f"the revocation list of {one.issuer.rfc4514_string()} should have been followed by another one on "
            f"{one.next_update_utc}; it goes on being used"
            for one in self.lists
            if one.next_update_utc is not None and one.next_update_utc < now
        ]


def read_lists(content: bytes, authorities: Sequence[x509.Certificate], now: datetime) -> RevocationLists:
    """Read the PEM lists of a file.

    Args:
        content: of the file.
        authorities: one of them must have signed each list.
        now: with a time zone.

    Raises:
        ConfigError: there is no list, one begins in the future, or no authority has signed it.
    """
    found = _parse(content, now)
    for one in found.lists:
        if not any(_signed(one, authority) for authority in authorities):
            raise ConfigError(
                UNUSABLE,
                hint=f"no certificate of ssl.ca_cert_path has signed the list of {one.issuer.rfc4514_string()}",
            )
    return found


def check_form(path: Path, now: datetime) -> None:
    """Check what can be checked of a file of lists before the authorities are known, as the original does.

    Raises:
        ConfigError: it cannot be read, there is no list, or one begins in the future.
    """
    _parse(_content(path), now)


def _parse(content: bytes, now: datetime) -> RevocationLists:
    parts = [part.partition(_END)[0] for part in content.split(_BEGIN)[1:]]
    if not parts:
        raise ConfigError(UNUSABLE, hint="ssl.crl_path holds no revocation list in PEM form")
    try:
        lists = tuple(x509.load_pem_x509_crl(_BEGIN + part + _END + b"\n") for part in parts)
        # Parts are read when they are asked for, which must not be in the midst of a handshake.
        for one in lists:
            _ = one.issuer, one.last_update_utc, one.next_update_utc, one.extensions
    except (ValueError, x509.InvalidVersion, x509.DuplicateExtension) as fault:
        raise ConfigError(UNUSABLE, hint=f"a list in ssl.crl_path is damaged: {fault}") from fault
    for one in lists:
        if one.last_update_utc > now:
            raise ConfigError(
                NOT_IN_FORCE, hint=f"the list begins on {one.last_update_utc}: set the clock, or make it anew"
            )
    return RevocationLists(lists)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise ConfigError(UNUSABLE, hint=f"cannot read {path}: {problem.strerror}") from problem


def _signed(found: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    if found.issuer != authority.subject:
        return False
    try:
        return found.is_signature_valid(authority.public_key())  # type: ignore[arg-type]  # TypeError for others
    except (TypeError, ValueError, InvalidSignature):
        return False


class RevocationFile:
    """The lists of a file; they follow the file.

    Attributes:
        problem: why the file, as it is now, is not used; "" if it is.
    """

    def __init__(
        self,
        path: Path,
        authorities: Sequence[x509.Certificate],
        now: Callable[[], datetime],
        warn: Callable[[str], None],
    ) -> None:
        """Read the file.

        Args:
            path: of the file.
            authorities: see ``read_lists``.
            now: gives the time, with a time zone.
            warn: takes a sentence.

        Raises:
            ConfigError: the file cannot be used.
        """
        self.problem = ""
        self._path = path
        self._authorities = tuple(authorities)
        self._now = now
        self._warn = warn
        self._seen = self._look()
        self._lists = self._read()  # whether they are overdue is for whoever watches dates

    @property
    def path(self) -> str:
        """Where the file is."""
        return str(self._path)

    def current(self) -> RevocationLists:
        """Return the lists, those of the file if it has changed and can be used."""
        seen = self._look()
        if seen != self._seen:
            self._seen = seen
            try:
                self._lists = self._read()
                self.problem = ""
                for remark in self._lists.overdue(self._now()):
                    self._warn(remark)
            except ConfigError as fault:
                self.problem = str(fault)
                self._warn(f"the revocation lists of {self._path} stay as they were: {fault}")
        return self._lists

    def _look(self) -> tuple[int, int, int]:
        """Return what tells one content of the file from another; zeros if it cannot be looked at."""
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0, 0
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _read(self) -> RevocationLists:
        return read_lists(_content(self._path), self._authorities, self._now())
