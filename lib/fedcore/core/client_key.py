"""What stands for a client wherever its id itself is not needed: in ledgers and in the shared state."""

from __future__ import annotations

import hashlib


def client_hash(fl_id: str) -> bytes:
    """Return 16 bytes that stand for a client; clients choose their ids, so these are a cryptographic hash."""
    return hashlib.sha256(fl_id.encode()).digest()[:16]


def client_key(fl_id: str) -> str:
    """Return ``client_hash`` as the 32 hex digits that the shared state uses."""
    return client_hash(fl_id).hex()
