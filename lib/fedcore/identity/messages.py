"""The bytes that are signed, for each kind of request; time stamps and iterations as decimal ASCII."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def of_start(fl_id: str, timestamp: str) -> bytes:
    """Return what startFLJob signs; neither the job nor the iteration is in it."""
    return f"{fl_id} {timestamp}".encode()


def of_round(timestamp: str, iteration: int) -> bytes:
    """Return what updateModel and the rounds of masking sign, all but exchangeKeys."""
    return f"{timestamp}{iteration}".encode()


def of_keys(c_pk: bytes, s_pk: bytes, timestamp: str, iteration: int) -> bytes:
    """Return what exchangeKeys signs."""
    return c_pk + s_pk + of_round(timestamp, iteration)


def of_list(fl_ids: Iterable[str]) -> bytes:
    """Return what pushListSign signs as ``signature``: a hash of the ids, which signing then hashes again.

    Args:
        fl_ids: in the order of ReturnClientList.
    """
    return hashlib.sha256("".join(fl_ids).encode()).digest()
