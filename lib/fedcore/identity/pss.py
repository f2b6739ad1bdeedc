"""Signatures of devices: RSASSA-PSS with SHA-256 and MGF1 of SHA-256.

Devices sign with RSA-2048 and a salt of 32 bytes. Verified are any salt length, as the original does, and keys from
2048 to 8192 bits: the original takes no longer ones than 2048 bits, and its buffer overflows with them.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from fedcore.identity.pem import UNUSABLE, Untrusted

SALT_BYTES = 32
LEAST_BITS = 2048
MOST_BITS = 8192  # a verification takes a fraction of a millisecond up to here
_MOST_EXPONENT = 1 << 33  # genuine keys have 65537; a huge one makes verifying slow on purpose


def check_key(key: object) -> rsa.RSAPublicKey:
    """Return a key that devices may sign with.

    Raises:
        Untrusted: it is no RSA key, or too short or too costly.
    """
    if not isinstance(key, rsa.RSAPublicKey):
        raise Untrusted("the signing key is no RSA key")
    if not LEAST_BITS <= key.key_size <= MOST_BITS:
        raise Untrusted(f"the signing key has {key.key_size} bits, not {LEAST_BITS} to {MOST_BITS}")
    if key.public_numbers().e > _MOST_EXPONENT:
        raise Untrusted("the signing key has a huge exponent")
    return key


def pack_key(key: rsa.RSAPublicKey) -> bytes:
    """Return a key as SubjectPublicKeyInfo, DER: 294 bytes for RSA-2048."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def unpack_key(packed: bytes) -> rsa.RSAPublicKey:
    """Read what ``pack_key`` returned.

    Raises:
        Untrusted: these are other bytes.
    """
    try:
        return check_key(load_der_public_key(packed))
    except UNUSABLE as error:
        raise Untrusted(f"no public key: {error}") from error


def verify(key: rsa.RSAPublicKey, signature: bytes, message: bytes) -> bool:
    """Tell whether this is a signature of the message; a wrong length is told before any calculation."""
    if len(signature) != (key.key_size + 7) // 8:
        return False
    try:
        key.verify(signature, message, _padding(padding.PSS.AUTO), hashes.SHA256())
    except InvalidSignature:
        return False
    return True


def sign(key: rsa.RSAPrivateKey, message: bytes) -> bytes:
    """Sign a message as a device does; its salt makes each signature another one."""
    return key.sign(message, _padding(SALT_BYTES), hashes.SHA256())


def _padding(salt_length: object) -> padding.PSS:
    return padding.PSS(padding.MGF1(hashes.SHA256()), salt_length)  # type: ignore[arg-type]
