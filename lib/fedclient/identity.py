"""The identity of a device, for jobs in which devices must sign: its key, and the certificates that vouch for it.

A device has four certificates: that of its signing key (the key attestation), that of the equipment, that of the
equipment CA, and the root. Its id in the protocol follows from the second one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key, pkcs12

from fedcore.errors import ConfigError
from fedcore.identity import messages, pss
from fedcore.identity.pem import Untrusted, fl_id_of, pem_form
from fedcore.wire.messages import RequestFLJob, RequestUpdateModel

CHAIN_LENGTH = 4
_P12_SUFFIXES = (".p12", ".pfx")


@dataclass(frozen=True, slots=True)
class DeviceIdentity:
    """Signs requests.

    Attributes:
        key: RSA; the original's servers take 2048 bits only.
        chain: key attestation, equipment, equipment CA, root.
    """

    key: rsa.RSAPrivateKey
    chain: tuple[x509.Certificate, ...]

    def __post_init__(self) -> None:
        if len(self.chain) != CHAIN_LENGTH:
            raise ConfigError(
                f"a device has {CHAIN_LENGTH} certificates, here are {len(self.chain)}",
                hint="key attestation, equipment, equipment CA, root",
            )
        try:
            public = pss.check_key(self.key.public_key())
        except Untrusted as why:
            raise ConfigError(f"the device's key cannot be used: {why}") from why
        if public != self.chain[0].public_key():
            raise ConfigError("the device's key is not that of its first certificate")

    @property
    def fl_id(self) -> str:
        """The client's id: SHA-256 of the equipment certificate in PEM form, in hexadecimal."""
        return fl_id_of(pem_form(self.chain[1]))

    def signed_start(self, request: RequestFLJob) -> RequestFLJob:
        """Return a startFLJob with signature and certificates; its id must be ours."""
        attestation, equipment, equipment_ca, root = map(pem_form, self.chain)
        return replace(
            request,
            sign_data=pss.sign(self.key, messages.of_start(request.fl_id or "", request.timestamp or "")),
            key_attestation=attestation,
            equip_cert=equipment,
            equip_ca_cert=equipment_ca,
            root_cert=root,
        )

    def signed_update(self, request: RequestUpdateModel) -> RequestUpdateModel:
        """Return an updateModel with its signature, which covers time stamp and iteration."""
        message = messages.of_round(request.timestamp or "", request.iteration)
        return replace(request, signature=pss.sign(self.key, message))


def load_identity(chain: Path, key: Path | None = None, password: bytes = b"") -> DeviceIdentity:
    """Read a device's identity.

    Args:
        chain: PKCS#12 with key and certificates (.p12, .pfx), or PEM with the four certificates,
            from that of the key to the root.
        key: PEM of the key, if it is not in ``chain``.
        password: of the PKCS#12 file, or of the key; b"" for none.

    Raises:
        ConfigError: a file cannot be read, or they do not make an identity.
    """
    content = _read(chain)
    try:
        if chain.suffix in _P12_SUFFIXES:
            found, first, others = pkcs12.load_key_and_certificates(content, password or None)
            certificates = _in_order([*([] if first is None else [first]), *others])
        else:
            certificates = x509.load_pem_x509_certificates(content)
            found = load_pem_private_key(content if key is None else _read(key), password or None)
    except (ValueError, TypeError) as error:  # TypeError: a password is missing, or given for nothing
        raise ConfigError(
            f"{chain} holds no identity of a device: {error}",
            hint="a wrong password, or another kind of file",
        ) from error
    if not isinstance(found, rsa.RSAPrivateKey):
        raise ConfigError(f"the key of {chain} is no RSA key", hint="devices sign with RSA-2048")
    return DeviceIdentity(found, tuple(certificates))


def _in_order(certificates: list[x509.Certificate]) -> list[x509.Certificate]:
    """Return certificates from the first one, that of the key, up to the root; a PKCS#12 file may mix the others."""
    chain, left = certificates[:1], certificates[1:]
    while left:
        following = next((one for one in left if _signed(chain[-1], one)), left[0])
        left.remove(following)
        chain.append(following)
    return chain


def _signed(certificate: x509.Certificate, by: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise ConfigError(f"cannot read {path}: {problem.strerror}") from problem
