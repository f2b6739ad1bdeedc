"""Streams of pseudo-random floats, and the masks that are sums of them.

A stream is AES-256-CTR over zeros; each four bytes are a little-endian int32, rounded to float32 and divided by 2**31:
floats from -1 to 1, both included. Two clients derive the same stream and add it with opposite signs, by the order of
their ids; each adds one of its own besides. The sum of all masks is then the sum of the clients' own streams.

Orders are the protocol's, because float32 sums depend on them: pairs in the order in which the client got their shares,
its own stream last. Ids are compared by code points, as UTF-8 compares bytewise; UTF-16 gives the same order but
for ids beyond the basic plane.

Streams are made and added in blocks that stay in the cache, into what the caller gives: nothing of a model's size is
made. All of it but a few microseconds per block runs without the interpreter's lock. What is added is made in one pass
in C (``_stream.c``, built where there is a compiler), or in three of NumPy, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fedcore.secagg import keys
from fedcore.secagg.keys import BadKey

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
_Add = Callable[[Floats, bytearray, int], None]

IV_BYTES = 16
SCALE = np.float32(2.0**-31)  # the original divides by float32(2**31 - 1), which is 2**31
_BLOCK = 1 << 15  # floats: 128 KiB of zeros, of stream and of sums fit into the second cache
_ZEROS = bytes(4 * _BLOCK)
_WORDS_IN_AES_BLOCK = 4


class Layout(Enum):
    """Which floats of a mask belong to which weight; all clients of an iteration and the server must have the same."""

    CONTIGUOUS = "contiguous"  # one weight behind the other, as the server of the original takes it
    PER_LAYER = "per_layer"  # each weight from the first float on, as devices of the original do by mistake

    def length(self, sizes: Sequence[int]) -> int:
        """Return how many floats of a mask are used by weights of these sizes."""
        return sum(sizes) if self is Layout.CONTIGUOUS else max(sizes, default=0)

    def slices(self, sizes: Iterable[int]) -> list[slice]:
        """Return which part of a mask belongs to each weight, in the order of the weights."""
        parts, start = [], 0
        for size in sizes:
            parts.append(slice(start, start + size))
            if self is Layout.CONTIGUOUS:
                start += size
        return parts


class Published(Protocol):
    """What of a client's exchangeKeys request masks are made of."""

    @property
    def s_pk(self) -> bytes | None: ...
    @property
    def pw_iv(self) -> bytes | None: ...
    @property
    def pw_salt(self) -> bytes | None: ...


class Member(NamedTuple):
    """What a client has made known for masks.

    Attributes:
        s_pk: public key that seeds the streams of its pairs, 32 bytes.
        pw_iv: initial counter of those where its id is the smaller one, 16 bytes.
        pw_salt: of the keys of the same, 32 bytes.
        ind_iv: initial counter of its own stream, 16 bytes; known to itself and the server only, else empty.
    """

    s_pk: bytes
    pw_iv: bytes
    pw_salt: bytes
    ind_iv: bytes = b""

    @classmethod
    def of(cls, published: Published) -> Member:
        """Take from a request, or from an entry of the list of keys, what masks are made of.

        Raises:
            BadKey: a part is missing or has a wrong length.
        """
        member = cls(
            published.s_pk or b"",
            published.pw_iv or b"",
            published.pw_salt or b"",
            getattr(published, "ind_iv", None) or b"",
        )
        lengths = len(member.s_pk), len(member.pw_iv), len(member.pw_salt)
        if lengths != (keys.KEY_BYTES, IV_BYTES, keys.SALT_BYTES) or len(member.ind_iv) not in {0, IV_BYTES}:
            raise BadKey(
                "A client's key, counter or salt has a wrong length", hint="refuse it when the keys arrive"
            )
        return member


class Stream(NamedTuple):
    """A stream with the sign it is added with.

    Attributes:
        key: 32 bytes.
        iv: initial counter, 16 bytes, big-endian.
        sign: 1 or -1.
    """

    key: bytes
    iv: bytes
    sign: int

    def __repr__(self) -> str:
        """Keep the key out of logs and tracebacks."""
        return f"Stream(sign={self.sign})"


def pair_sign(own_id: str, other_id: str) -> int:
    """Return the sign with which a client adds the stream that it shares with another: 1 for the greater id, else -1.

    Raises:
        ValueError: it is the same client.
    """
    if own_id == other_id:
        raise ValueError("a client makes no pair with itself")
    return 1 if own_id > other_id else -1


def pair(own_id: str, private: bytes, other_id: str, members: Mapping[str, Member]) -> Stream:
    """Derive the stream of two clients with the private key of the first; one to four ms.

    Args:
        own_id: the first.
        private: its s key, 32 bytes.
        other_id: the second.
        members: of both at least. Counter and salt are those of the smaller id.

    Raises:
        BadKey: a key cannot be used.
    """
    sign = pair_sign(own_id, other_id)
    smaller = members[other_id if sign > 0 else own_id]
    shared = keys.agree(private, members[other_id].s_pk)
    return Stream(keys.derive(shared, smaller.pw_salt), smaller.pw_iv, sign)


def pair_mask(
    own_id: str, private: bytes, members: Mapping[str, Member], others: Iterable[str], size: int
) -> npt.NDArray[np.float32]:
    """Return the sum of a client's pairs: the mask of STABLE_PW_ENCRYPT.

    Args:
        own_id: the client.
        private: its s key, 32 bytes.
        members: who has published what; the client's own entry too.
        others: whom it makes pairs with, in the order in which the server named them; itself is left out.
        size: floats.

    Raises:
        BadKey: a key cannot be used.
    """
    mask = np.zeros(size, np.float32)
    for other in others:
        if other != own_id:
            add_stream(mask, *pair(own_id, private, other, members))
    return mask


def client_mask(
    own_id: str,
    private: bytes,
    b: bytes,
    members: Mapping[str, Member],
    sources: Iterable[str],
    size: int,
) -> npt.NDArray[np.float32]:
    """Return a client's mask for PW_ENCRYPT, to the last bit as the original makes it.

    Args:
        own_id: the client.
        private: its s key, 32 bytes.
        b: key of its own stream, 32 bytes.
        members: who has published what; the client's own entry, with ``ind_iv``, too.
        sources: whose shares it got, in the order in which it got them; itself is left out.
        size: floats.

    Raises:
        BadKey: a key or counter cannot be used.
    """
    mask = pair_mask(own_id, private, members, sources, size)
    add_stream(mask, b, members[own_id].ind_iv, 1)
    return mask


def add_stream(into: Floats, key: bytes, iv: bytes, sign: int, start: int = 0) -> None:
    """Add a stream to floats, or take it off.

    Args:
        into: float32 or float64, one behind the other; what is added is rounded to float32 first, in both cases.
        key: 32 bytes.
        iv: initial counter, 16 bytes, big-endian.
        sign: 1 or -1.
        start: which float of the stream comes first, a multiple of 4.

    Raises:
        BadKey: key or counter have a wrong length.
        ValueError: ``start`` or ``sign`` is none.
    """
    if len(key) != keys.KEY_BYTES or len(iv) != IV_BYTES:
        raise BadKey("A stream has a key of 32 bytes and a counter of 16")
    if start < 0 or start % _WORDS_IN_AES_BLOCK or sign not in {1, -1}:
        raise ValueError(f"a stream starts at a multiple of 4, not {start}, and has a sign, not {sign}")
    cipher = Cipher(AES256(key), CTR(_counter(iv, start // _WORDS_IN_AES_BLOCK))).encryptor()
    stream = bytearray(4 * min(_BLOCK, len(into)))
    for at in range(0, len(into), _BLOCK):
        part = into[at : at + _BLOCK]
        cipher.update_into(memoryview(_ZEROS)[: 4 * len(part)], stream)
        _add(part, stream, sign)


def add_plainly(into: Floats, stream: bytearray, sign: int) -> None:
    """Add a piece of a stream to as many floats without the C extension: the same bytes, later."""
    values = np.frombuffer(stream, "<i4", len(into)).astype(np.float32)  # rounds, as the original does
    values *= SCALE * np.float32(sign)  # exact: a power of two
    np.add(into, values, out=into)


def _counter(iv: bytes, blocks: int) -> bytes:
    """Return the counter that a stream has reached after so many blocks of 16 bytes."""
    return ((int.from_bytes(iv, "big") + blocks) % (1 << 128)).to_bytes(IV_BYTES, "big")


_add: _Add = add_plainly
try:
    from fedcore.secagg._stream import add as _add
except ImportError:
    COMPILED = False
else:
    COMPILED = True
