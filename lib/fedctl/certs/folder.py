"""The folder of an authority.

    ca.crt       its certificate: for every node, and for devices
    ca.key       its key, 0600. Whoever reads it can be any node; keep a copy in a safe place
    ca.crl       the list of what it has revoked: for every node
    index.json   what it has issued and revoked, see below; written by fl certs alone
    root.*       of an authority for devices, whose ca.* is the maker's equipment CA: the root above it
    hosts/NAME/  what was issued, unless fl certs was told another place: ROLE.p12, ROLE.crt, ROLE-password
    devices/NAME/   chain.pem, key.pem

index.json is an object: ``crl_number``, the number of ca.crl, and ``certificates``, a list in the order of their making
of objects with ``serial`` (hexadecimal), ``role``, ``name``, ``hosts``, ``until`` and ``revoked``, the latter two times
as 2026-11-22T23:30:00Z, ``revoked`` null for what is good. A certificate is in the index before its file is written.

A folder with ca.crt and ca.key that others have made, such as that of the Ansible role, is as good: what is missing is
made when it is needed. One command at a time changes a folder; others wait.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from fedcore.errors import ConfigError
from fedcore.pki.authority import (
    CRL_DAYS,
    Device,
    Issued,
    Revoked,
    common_name,
    lasting,
    load_issued,
    revocation_list,
)
from fedcore.pki.chain import names_of, signed_by
from fedctl.certs.files import PRIVATE, PUBLIC, make_folder, read, refuse_existing, write

DEVICE = "device"
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True)
class Entry:
    """A certificate in the index; see above."""

    serial: str
    role: str
    name: str
    hosts: list[str]
    until: str
    revoked: str | None = None


@dataclass(frozen=True, slots=True)
class Index:
    """What an authority has issued and revoked."""

    crl_number: int = 0
    certificates: list[Entry] = field(default_factory=list)

    def find(self, serial: int) -> Entry | None:
        """Return the entry of a certificate."""
        return next((entry for entry in self.certificates if int(entry.serial, 16) == serial), None)

    def with_entry(self, entry: Entry) -> Index:
        """Return an index with one more certificate, or with another state of it."""
        others = [each for each in self.certificates if each.serial != entry.serial]
        if len(others) == len(self.certificates):
            return replace(self, certificates=[*others, entry])
        changed = [entry if each.serial == entry.serial else each for each in self.certificates]
        return replace(self, certificates=changed)


def entry_of(certificate: x509.Certificate, role: str = "") -> Entry:
    """Return what the index says of a good certificate."""
    units = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    return Entry(
        serial=hexadecimal(certificate.serial_number),
        role=role or (str(units[0].value) if units else ""),
        name=common_name(certificate),
        hosts=sorted(names_of(certificate)),
        until=certificate.not_valid_after_utc.strftime(_TIME),
    )


def hexadecimal(serial: int) -> str:
    """Return a serial number as openssl prints it: pairs of digits."""
    digits = f"{serial:X}"
    return digits.zfill(len(digits) + len(digits) % 2)


class AuthorityFolder:
    """An authority in a folder.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def certificate(self) -> Path:
        """File of the authority's certificate."""
        return self.path / "ca.crt"

    @property
    def crl(self) -> Path:
        """File of the list of what is revoked."""
        return self.path / "ca.crl"

    @property
    def _key(self) -> Path:
        return self.path / "ca.key"

    @property
    def _index(self) -> Path:
        return self.path / "index.json"

    def create(self, authority: Issued, now: datetime, root: Issued | None = None) -> None:
        """Write a new authority, with a list that revokes nothing.

        Args:
            authority: whose folder it becomes.
            now: with a time zone.
            root: who has signed it, if it is not itself.

        Raises:
            ConfigError: one is there already.
            OSError: it cannot be written.
        """
        make_folder(self.path)
        pairs = [(authority, self._key, self.certificate)]
        if root is not None:
            pairs.append((root, self.path / "root.key", self.path / "root.crt"))
        refuse_existing(*(file for _, key, crt in pairs for file in (key, crt)), self.crl, self._index)
        with self._alone():
            for issued, key, crt in pairs:
                write(key, issued.key_pem(), PRIVATE)
                write(crt, issued.certificate_pem(), PUBLIC)
            self._save(Index())
            self._sign_list(authority, Index(), now, CRL_DAYS)

    def authority(self) -> Issued:
        """Read the authority.

        Raises:
            ConfigError: it is not there, or cannot be used.
        """
        if not self.certificate.exists():
            raise ConfigError(f"there is no authority in {self.path}", hint=f"fl certs ca {self.path}")
        try:
            return load_issued(read(self._key), read(self.certificate))
        except ConfigError as fault:
            raise ConfigError(
                f"the authority in {self.path} cannot be used: {fault}", hint="bring ca.key and ca.crt back"
            ) from fault

    def device_root(self) -> x509.Certificate:
        """Read the root above an authority for devices; its key is better kept elsewhere.

        Raises:
            ConfigError: there is none.
        """
        file = self.path / "root.crt"
        if not file.exists():
            raise ConfigError(
                f"the authority in {self.path} is none of devices", hint="fl certs ca DIR --devices makes one"
            )
        try:
            return x509.load_pem_x509_certificate(read(file))
        except ValueError as error:
            raise ConfigError(f"{file} holds no certificate", hint="bring it back from your copy") from error

    def index(self) -> Index:
        """Read the index; an empty one if there is none.

        Raises:
            ConfigError: it cannot be read.
        """
        if not self._index.exists():
            return Index()
        try:
            found = json.loads(read(self._index))
            entries = [Entry(**entry) for entry in found["certificates"]]
            return Index(int(found["crl_number"]), entries)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._index} cannot be used: {error!r}", hint="bring it back from your copy"
            ) from error

    def remember(self, certificates: Iterable[x509.Certificate], role: str = "") -> None:
        """Put new certificates into the index."""
        with self._alone():
            index = self.index()
            for certificate in certificates:
                index = index.with_entry(entry_of(certificate, role))
            self._save(index)

    def write_node(
        self,
        made: Issued,
        into: Path,
        role: str,
        password: bytes,
        *,
        with_key: bool = False,
        replace: bool = False,
    ) -> None:
        """Write a node's or operator's ROLE.p12, ROLE.crt and, if wanted, ROLE.key; and put it into the index.

        Args:
            made: issued by this authority.
            into: a folder; made if it is not there.
            role: what the files are called.
            password: of the PKCS#12 file.
            with_key: whether the key is written, too, without a password.
            replace: whether files of these names may be there.

        Raises:
            ConfigError: they are there, and may not be.
        """
        crt, p12, key = (into / f"{role}.{suffix}" for suffix in ("crt", "p12", "key"))
        if not replace:
            refuse_existing(crt, p12, *([key] if with_key else []))
        make_folder(into)
        self.remember([made.certificate])
        if with_key or key.exists():  # one that is there would not fit the new certificate
            write(key, made.key_pem(), PRIVATE, replace=replace)
        write(p12, made.p12(password), PRIVATE, replace=replace)
        write(crt, made.certificate_pem(), PUBLIC, replace=replace)

    def write_device(self, device: Device, into: Path) -> None:
        """Write a device's chain and key, and put it into the index.

        Raises:
            ConfigError: they are there already.
        """
        chain, key = into / "chain.pem", into / "key.pem"
        refuse_existing(chain, key)
        make_folder(into)
        self.remember([device.equipment.certificate], DEVICE)
        write(key, device.attestation.key_pem(), PRIVATE)
        write(chain, device.chain_pem(), PUBLIC)

    def revoke(self, what: x509.Certificate | int, now: datetime, *, unknown: bool = False) -> Entry:
        """Revoke a certificate and sign the list anew.

        Args:
            what: the certificate, or its serial number.
            now: with a time zone.
            unknown: whether a serial number may be one that the index does not have.

        Returns:
            Its entry in the index; one that was revoked before keeps its date.

        Raises:
            ConfigError: it is none of this authority.
        """
        authority = self.authority()
        with self._alone():
            index = self.index()
            entry = self._entry(index, authority, what, unknown)
            if entry.revoked is None:
                entry = replace(entry, revoked=now.astimezone(UTC).strftime(_TIME))
            self._sign_list(authority, index.with_entry(entry), now, CRL_DAYS)
        return entry

    @staticmethod
    def _entry(index: Index, authority: Issued, what: x509.Certificate | int, unknown: bool) -> Entry:
        if isinstance(what, int):
            entry = index.find(what)
            if entry is None and not unknown:
                raise ConfigError(
                    f"this authority's index knows no certificate {hexadecimal(what)}",
                    hint="give the certificate's file, or --unknown if you are sure of the number",
                )
            return entry or Entry(hexadecimal(what), "", "", [], "")
        if not signed_by(what, authority.certificate):
            raise ConfigError(
                f"{what.subject.rfc4514_string()!r} was not issued by this authority",
                hint=f"only {what.issuer.rfc4514_string()!r} can revoke it",
            )
        return index.find(what.serial_number) or entry_of(what)

    def renew_list(self, now: datetime, days: float) -> datetime:
        """Sign the list anew, and return the time of its end."""
        authority = self.authority()
        with self._alone():
            return self._sign_list(authority, self.index(), now, days)

    def _sign_list(self, authority: Issued, index: Index, now: datetime, days: float) -> datetime:
        index = replace(index, crl_number=index.crl_number + 1)
        dates = lasting(now, days)
        revoked = [
            Revoked(int(entry.serial, 16), datetime.strptime(entry.revoked, _TIME).replace(tzinfo=UTC))
            for entry in index.certificates
            if entry.revoked
        ]
        signed = revocation_list(authority, revoked, now, number=index.crl_number, validity=dates)
        self._save(index)  # first: a number is never used twice, and what is to be revoked is not forgotten
        write(self.crl, signed, PUBLIC, replace=True)
        return dates.end

    def _save(self, index: Index) -> None:
        text = json.dumps(asdict(index), indent=1) + "\n"
        write(self._index, text.encode(), PRIVATE, replace=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other commands from changing the folder meanwhile."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
