"""Time stamps, and the one request that a signature is good for.

A time stamp has exactly 13 digits, so that "time stamp, iteration" can be read in one way only. A signature that
was used may come again with the very same request, because HTTP libraries repeat requests on their own; with any
other one it is refused. Who keeps that account is ``store/scripts/use_signature.lua``; here is what it is kept of.
"""

from __future__ import annotations

import hashlib

STAMP_DIGITS = 13  # milliseconds since the epoch, from 2001 to 2286
MARK_BYTES = 16


def read_stamp(text: str) -> int | None:
    """Return a time stamp, milliseconds since the epoch; None if it has not exactly 13 digits."""
    return int(text) if len(text) == STAMP_DIGITS and text.isascii() and text.isdigit() else None


def is_fresh(stamp: int, now_ms: int, window_ms: int) -> bool:
    """Tell whether a time stamp is at most so far from now, to either side; all in milliseconds."""
    return abs(now_ms - stamp) <= window_ms


def mark_of_signature(signature: bytes) -> bytes:
    """Return the 16 bytes that stand for a signature."""
    return hashlib.sha256(signature).digest()[:MARK_BYTES]


def digest_of(body: bytes | memoryview) -> bytes:
    """Return what stands for a request's body in ``mark_of_request``; takes a second for a gigabyte or two."""
    return hashlib.sha256(body).digest()


def mark_of_request(scope: str, path: str, digest: bytes) -> bytes:
    """Return the 16 bytes that stand for a request.

    Args:
        scope: where a repetition of the request is one, such as the job's instance.
        path: name of the round.
        digest: ``digest_of`` its body.
    """
    head = f"{len(scope)}:{scope}{len(path)}:{path}".encode()
    return hashlib.sha256(head + digest).digest()[:MARK_BYTES]
