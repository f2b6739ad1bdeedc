"""How many clients a phase needs: ratios to counts, in the single precision of the protocol.

Devices and servers of MindSpore Federated 0.1 multiply in float32, so the result may differ from the same sum
in double precision by one client; every count that a peer can notice is computed here and nowhere else.
"""

from __future__ import annotations

import math
import struct

_FLOAT32 = struct.Struct("<f")


def to_float32(value: float) -> float:
    """The float32 nearest to value (ties to even), widened again to a Python float.

    Args:
        value: any float, or an int of at most 53 bits.

    Returns:
        The rounded value; infinity with the sign of value where it is beyond the range of float32.
    """
    try:
        (rounded,) = _FLOAT32.unpack(_FLOAT32.pack(value))
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    return float(rounded)


def update_threshold(n: int, ratio: float) -> int:
    """Number of uploads that complete an iteration: ceil(float32(n) * float32(ratio)) in float32.

    The product of two float32 values is exact in double precision, so rounding it once gives the float32
    product. Above 2**24 clients float32(n) may exceed n, and so may the result; nothing is clamped here.

    Args:
        n: clients that startFLJob selects, 1..4294967295.
        ratio: share of them that must upload, (0, 1].

    Returns:
        The threshold in clients, at least 1.

    Raises:
        ValueError: n or ratio is out of range, or ratio is zero as a float32.
    """
    single = to_float32(ratio)
    if not 1 <= n <= 0xFFFFFFFF or not 0.0 < single <= 1.0:
        raise ValueError(f"no threshold for {n} clients at ratio {ratio}")
    return math.ceil(to_float32(to_float32(n) * single))
