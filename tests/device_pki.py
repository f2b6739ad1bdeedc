"""A maker of devices for tests: root, equipment CA, devices, and the files of `client_verify`.

``sign`` writes RSASSA-PSS down once more, in the words of the protocol, so that tests do not ask the code under
test what it should find.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding

from fedcore.pki.authority import (
    Device,
    Issued,
    KeyKind,
    Revoked,
    Validity,
    issue_device,
    make_device_authority,
    pem,
    revocation_list,
)


def now() -> datetime:
    return datetime.now(UTC)


def stamp(shift_ms: int = 0) -> str:
    """Return a time stamp, so many milliseconds from now."""
    return str(int(now().timestamp() * 1000) + shift_ms)


def sign(key: Any, message: bytes, salt: int = 32) -> bytes:
    return key.sign(message, padding.PSS(padding.MGF1(hashes.SHA256()), salt), hashes.SHA256())


class Maker:
    """A maker of devices."""

    def __init__(self, name: str = "Maker") -> None:
        self.root: Issued
        self.ca: Issued
        self.root, self.ca = make_device_authority(name, now(), kind=KeyKind.EC_P256)
        self.lists = 0

    def device(
        self, name: str = "device", kind: KeyKind = KeyKind.RSA_2048, validity: Validity | None = None
    ) -> Device:
        return issue_device(self.root.certificate, self.ca, name, now(), kind=kind, validity=validity)

    def root_pem(self) -> bytes:
        return self.root.certificate_pem()

    def crl(self, revoked: Iterable[Device] = (), validity: Validity | None = None) -> bytes:
        self.lists += 1
        entries = [Revoked(one.equipment.certificate.serial_number, now()) for one in revoked]
        return revocation_list(self.ca, entries, now(), number=self.lists, validity=validity)

    def client_verify(self, folder: Path, *, crl: bytes | None = None, **more: Any) -> dict[str, Any]:
        """Write the files of a server and return its section of the configuration."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "root.pem").write_bytes(self.root_pem())
        section: dict[str, Any] = {
            "pki_verify": True,
            "root_first_ca_path": str(folder / "root.pem"),
            "root_second_ca_path": str(folder / "root.pem"),
        }
        if crl is not None:
            (folder / "devices.crl").write_bytes(crl)
            section["equip_crl_path"] = str(folder / "devices.crl")
        return section | more


def pems(device: Device) -> list[str]:
    """Return a device's certificates as startFLJob carries them."""
    return [pem(certificate).decode() for certificate in device.chain]


def start_fields(device: Device, timestamp: str | None = None, **changed: Any) -> dict[str, Any]:
    """Return the fields of a good startFLJob, some of them changed."""
    timestamp = timestamp or stamp()
    attestation, equipment, ca, root = pems(device)
    fields: dict[str, Any] = {
        "fl_name": "job",
        "fl_id": device.fl_id,
        "data_size": 10,
        "timestamp": timestamp,
        "sign_data": sign(device.attestation.key, f"{device.fl_id} {timestamp}".encode()),
        "key_attestation": attestation,
        "equip_cert": equipment,
        "equip_ca_cert": ca,
        "root_cert": root,
    }
    return fields | changed


def update_fields(device: Device, iteration: int, timestamp: str | None = None) -> dict[str, Any]:
    """Return the fields of an updateModel that its signature is about."""
    timestamp = timestamp or stamp()
    signature = sign(device.attestation.key, f"{timestamp}{iteration}".encode())
    return {"fl_id": device.fl_id, "iteration": iteration, "timestamp": timestamp, "signature": signature}
