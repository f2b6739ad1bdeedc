"""Shares on their way from one client to another: the record with a share of each secret, and how it is sealed.

    plain   [length of s share][length of b share][length of s index][length of b index]    one byte each
            s index, b index, s share, b share           big-endian, without zeros in front; a share of 0 has no bytes
    sealed  IV of 16 bytes, then AES-256-CBC with PKCS#7

The seal hides; it does not authenticate (docs/SECURE_AGGREGATION.md): whoever changes a sealed share is found out
when secrets are recovered, not here.
"""

from __future__ import annotations

from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.padding import PKCS7

from fedcore.secagg.keys import KEY_BYTES, BadKey
from fedcore.secagg.shamir import PRIME, BadShare

IV_BYTES = 16
_LENGTHS = 4
_MOST_INDEX_BYTES = 4  # the protocol's field for an index is an int32
MAX_SHARE_BYTES = 33


class PlainShares(NamedTuple):
    """What one client gives another to keep.

    Attributes:
        s_share: of the private s key.
        b_share: of the key of its own stream.
        s_index: where on its polynomial, from 1 on.
        b_index: likewise; the same number.
    """

    s_share: int
    b_share: int
    s_index: int
    b_index: int


def to_bytes(number: int) -> bytes:
    """Return a number big-endian without zeros in front; 0 has no bytes. So do shares travel.

    Raises:
        OverflowError: it is negative.
    """
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def share_of(content: bytes, prime: int = PRIME) -> int:
    """Read a share of a report; zeros in front do not matter.

    Raises:
        BadShare: it is longer than any, or no number of the field.
    """
    if len(content) > MAX_SHARE_BYTES:
        raise BadShare("A share is longer than 33 bytes")
    number = int.from_bytes(content, "big")
    if number >= prime:
        raise BadShare("A share is no number of the field")
    return number


def pack(shares: PlainShares) -> bytes:
    """Return the plain record.

    Raises:
        OverflowError: a number is negative or a part longer than its length can say.
    """
    s_share, b_share, s_index, b_index = map(to_bytes, shares)
    parts = s_share, b_share, s_index, b_index
    if max(map(len, parts)) > 127:
        raise OverflowError("a part of a record has at most 127 bytes")  # devices read lengths with a sign
    return bytes(map(len, parts)) + s_index + b_index + s_share + b_share


def unpack(record: bytes) -> PlainShares:
    """Read a plain record.

    Raises:
        BadShare: lengths do not add up, an index is 0 or too long, a share is too long.
    """
    lengths = record[:_LENGTHS]
    if len(lengths) != _LENGTHS or len(record) != _LENGTHS + sum(lengths):
        raise BadShare("A record of shares has not the length that it says")
    s_long, b_long, s_index_long, b_index_long = lengths
    if max(s_long, b_long) > MAX_SHARE_BYTES or max(s_index_long, b_index_long) > _MOST_INDEX_BYTES:
        raise BadShare("A part of a record of shares is too long")
    numbers, at = [], _LENGTHS
    for length in (s_index_long, b_index_long, s_long, b_long):
        numbers.append(int.from_bytes(record[at : at + length], "big"))
        at += length
    s_index, b_index, s_share, b_share = numbers
    if not 1 <= s_index < 2**31 or not 1 <= b_index < 2**31:
        raise BadShare("A share has no index")
    return PlainShares(s_share, b_share, s_index, b_index)


def seal(key: bytes, record: bytes, iv: bytes) -> bytes:
    """Encrypt a record for one recipient.

    Args:
        key: ``keys.derive`` of what sender and recipient agree on with their c keys, without salt.
        record: of ``pack``.
        iv: 16 random bytes, fresh for each record.

    Raises:
        BadKey: key or IV have a wrong length.
    """
    if len(key) != KEY_BYTES or len(iv) != IV_BYTES:
        raise BadKey("Shares are sealed with a key of 32 bytes and an IV of 16")
    padder, cipher = PKCS7(128).padder(), Cipher(AES256(key), CBC(iv)).encryptor()
    return iv + cipher.update(padder.update(record) + padder.finalize()) + cipher.finalize()


def unseal(key: bytes, sealed: bytes) -> bytes:
    """Decrypt a record.

    Raises:
        BadKey: the key has a wrong length.
        BadShare: this was not sealed with this key, or was changed.
    """
    if len(key) != KEY_BYTES:
        raise BadKey("Shares are sealed with a key of 32 bytes")
    if len(sealed) < 2 * IV_BYTES or len(sealed) % IV_BYTES:
        raise BadShare("A sealed share has a length that no seal gives")
    cipher, padding = Cipher(AES256(key), CBC(sealed[:IV_BYTES])).decryptor(), PKCS7(128).unpadder()
    padded = cipher.update(sealed[IV_BYTES:]) + cipher.finalize()
    try:
        return padding.update(padded) + padding.finalize()
    except ValueError as error:
        raise BadShare("A sealed share cannot be opened with the key of its pair") from error
