"""How many clients complete each cipher round: products in float32, as the protocol has them.

Without numpy: every reader of a configuration asks here, and most of them have no other use for it.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

_FLOAT32 = struct.Struct("<f")


class Thresholds(NamedTuple):
    """Clients that complete a round, in the order of the rounds.

    Attributes:
        exchange_keys: X.
        get_keys: K.
        share_secrets: H.
        get_secrets: as K of X, of H.
        client_list: L.
        push_sign: Q; 0 where devices do not sign, which then is no round.
        get_sign: likewise.
        reconstruct: t + 1.
    """

    exchange_keys: int
    get_keys: int
    share_secrets: int
    get_secrets: int
    client_list: int
    push_sign: int
    get_sign: int
    reconstruct: int

    @property
    def enough(self) -> bool:
        """Whether there are as many shares of each secret as reports are needed; a job without must not start."""
        return self.share_secrets >= self.reconstruct


def of(
    start_threshold: int, update_threshold: int, share_secrets_ratio: float, t: int, *, signed: bool
) -> Thresholds:
    """Return the thresholds of a job.

    Args:
        start_threshold: S, clients that startFLJob selects.
        update_threshold: U, clients whose updates make an iteration (core.quorum.update_threshold).
        share_secrets_ratio: r, 0 < r <= 1.
        t: shares that give a secret, ``reconstruct_secrets_threshold``.
        signed: whether devices sign, and sign the list of clients.

    Raises:
        ValueError: a number is out of range.
    """
    in_range = 0 < share_secrets_ratio < 2 and 0 < _single(share_secrets_ratio) <= 1
    if start_threshold < 1 or update_threshold < 1 or t < 1 or not in_range:
        raise ValueError("thresholds must be at least 1, and a ratio above 0 and at most 1")
    exchange = max(_part(start_threshold, share_secrets_ratio), update_threshold)
    get_keys = max(_part(exchange, share_secrets_ratio), update_threshold)
    share = max(_part(get_keys, share_secrets_ratio), update_threshold)
    get_secrets = max(_part(share, share_secrets_ratio), update_threshold)
    client_list = max(_part(update_threshold, share_secrets_ratio), t + 1)
    push = max(_part(client_list, share_secrets_ratio), t + 1) if signed else 0
    get_sign = max(_part(push, share_secrets_ratio), t + 1) if signed else 0
    return Thresholds(exchange, get_keys, share, get_secrets, client_list, push, get_sign, t + 1)


def _part(count: int, ratio: float) -> int:
    """Return the ceiling of a product in float32; in double precision it is exact, so that it is rounded once."""
    return math.ceil(_single(_single(count) * _single(ratio)))


def _single(value: float) -> float:
    """Return the nearest number that float32 has."""
    (rounded,) = _FLOAT32.unpack(_FLOAT32.pack(value))
    return float(rounded)
