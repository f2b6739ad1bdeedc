"""The identity of a device, for jobs in which devices must sign: its key, and the certificates that vouch for it.

A device has four certificates: that of its signing key (the key attestation), that of the equipment, that of the
equipment CA, and the root. Its id in the protocol follows from the second one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key, pkcs12

from fedcore.errors import ConfigError
from fedcore.identity import messages, pss
from fedcore.identity.pem import Untrusted, bare_form, fl_id_of, pem_form, read_bare
from fedcore.wire.messages import (
    CipherRequest,
    ClientPublicKeys,
    RequestExchangeKeys,
    RequestFLJob,
    RequestUpdateModel,
    SendClientListSign,
)

CHAIN_LENGTH = 4
R = TypeVar("R", bound=CipherRequest)
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

    # ---- cipher rounds

    def signed_keys(self, request: RequestExchangeKeys) -> RequestExchangeKeys:
        """Return an exchangeKeys with signature and the two certificates that others verify it with."""
        message = messages.of_keys(
            request.c_pk or b"", request.s_pk or b"", request.timestamp or "", request.iteration
        )
        chain = tuple(map(bare_form, self.chain[:2]))
        return replace(request, signature=pss.sign(self.key, message), certificate_chain=chain)

    def signed_round(self, request: R) -> R:
        """Return the request of another cipher round with its signature, which covers time stamp and iteration."""
        signature = pss.sign(self.key, messages.of_round(request.timestamp or "", request.iteration))
        if isinstance(request, SendClientListSign):
            return replace(request, req_signature=signature)
        return replace(request, signature=signature)

    def list_signature(self, fl_ids: Sequence[str]) -> bytes:
        """Sign the list of uploads."""
        return pss.sign(self.key, messages.of_list(fl_ids))

    def check_keys(self, peer: ClientPublicKeys, now: int) -> None:
        """Verify that another device's keys are its own.

        Its id must be that of its equipment, whose certificate our own equipment CA has signed.

        Args:
            peer: entry of the list of keys.
            now: milliseconds since the epoch.

        Raises:
            Untrusted: they are not, or it cannot be told.
        """
        attestation, equipment = _pair_of(peer)
        if fl_id_of(pem_form(equipment)) != peer.fl_id:
            raise Untrusted("a client's id is not that of its equipment")
        if not _signed(equipment, self.chain[2]) or not _signed(attestation, equipment):
            raise Untrusted("a client's certificates are not of this device's authority")
        moment = datetime.fromtimestamp(now / 1000, UTC)
        for certificate in (attestation, equipment):
            if not certificate.not_valid_before_utc <= moment <= certificate.not_valid_after_utc:
                raise Untrusted("a client's certificate is not valid now")
        message = messages.of_keys(peer.c_pk or b"", peer.s_pk or b"", peer.timestamp or "", peer.iteration)
        _verify(attestation, peer.signature or b"", message)

    def check_list(self, peer: ClientPublicKeys, signature: bytes, fl_ids: Sequence[str]) -> None:
        """Verify a device's signature under the list of uploads.

        Args:
            peer: its entry of the list of keys, verified.
            signature: of this device.
            fl_ids: the list, in the order in which it was told.

        Raises:
            Untrusted: the device has signed something else.
        """
        _verify(_pair_of(peer)[0], signature, messages.of_list(fl_ids))


def _pair_of(peer: ClientPublicKeys) -> tuple[x509.Certificate, x509.Certificate]:
    """Return another device's key attestation and equipment certificate."""
    chain = peer.certificate_chain or ()
    if len(chain) < 2:
        raise Untrusted("a client shows no certificates")
    return read_bare(chain[0]), read_bare(chain[1])


def _verify(certificate: x509.Certificate, signature: bytes, message: bytes) -> None:
    if not pss.verify(pss.check_key(certificate.public_key()), signature, message):
        raise Untrusted("a client's signature is wrong")


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
