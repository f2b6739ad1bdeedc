"""Keys of X25519 and what two of them agree on (RFC 7748), and the keys of ciphers made of that (RFC 8018).

A private key is kept *clamped*, as the protocol shares it: the three low bits and the top bit are clear and the bit
below the top is set. X25519 itself ignores what these bits were, so a key clamped or not has the same public half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from fedcore.errors import CryptoError

KEY_BYTES = 32
SALT_BYTES = 32
ITERATIONS = 10_000  # of PBKDF2; the protocol's number: one to four ms for each pair of clients


class BadKey(CryptoError):
    """A key, salt or initial counter that cannot be used: a wrong length, or a point all agree on zero with."""


class KeyPair(NamedTuple):
    """A key of X25519.

    Attributes:
        private: 32 bytes, clamped.
        public: 32 bytes.
    """

    private: bytes
    public: bytes

    def __repr__(self) -> str:
        """Show the public half only: pairs end up in logs and tracebacks."""
        return f"KeyPair(public={self.public.hex()})"


def clamp(private: bytes) -> bytes:
    """Return 32 bytes as a private key (RFC 7748, section 5).

    Raises:
        BadKey: there are not 32 of them.
    """
    _must_have(private, KEY_BYTES, "a private key")
    return bytes([private[0] & 0xF8, *private[1:31], (private[31] & 0x7F) | 0x40])


def new_pair(random: Callable[[int], bytes]) -> KeyPair:
    """Make a key of 32 bytes from ``random``, which must be fit for keys (os.urandom)."""
    private = clamp(random(KEY_BYTES))
    return KeyPair(private, public_of(private))


def public_of(private: bytes) -> bytes:
    """Return the public half of a private key of 32 bytes, clamped or not.

    Raises:
        BadKey: it does not have 32 bytes.
    """
    _must_have(private, KEY_BYTES, "a private key")
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes) -> bytes:
    """Return the 32 bytes that the owners of two keys can both compute, and nobody else.

    Raises:
        BadKey: a key does not have 32 bytes, or ``public`` is one of the few with which everybody agrees on zero.
    """
    _must_have(private, KEY_BYTES, "a private key")
    _must_have(public, KEY_BYTES, "a public key")
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError as error:
        raise BadKey(
            "A public key makes no secret: with it everybody agrees on zero",
            hint="its client is broken or hostile; refuse the key when it arrives",
        ) from error


def derive(shared: bytes, salt: bytes = b"") -> bytes:
    """Return the cipher key that a shared secret stands for: PBKDF2-HMAC-SHA256, 10,000 rounds, one to four ms.

    Args:
        shared: of ``agree``, 32 bytes.
        salt: empty for the keys that shares are sealed with, ``pw_salt`` for those of masks.

    Returns:
        32 bytes.

    Raises:
        BadKey: ``shared`` does not have 32 bytes.
    """
    _must_have(shared, KEY_BYTES, "a shared secret")
    return PBKDF2HMAC(hashes.SHA256(), KEY_BYTES, salt, ITERATIONS).derive(shared)


def _must_have(value: bytes, length: int, what: str) -> None:
    if len(value) != length:
        raise BadKey(f"{what[0].upper()}{what[1:]} has {length} bytes, not {len(value)}")
