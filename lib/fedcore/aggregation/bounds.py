"""How far an update is from the model that it was trained from, and how to bring it nearer.

Against poisoned updates: one client among n moves a mean by its share of its own distance, so a bound on the distance
is one on the harm. What clients send differs by rule (``Sent``); the distance is the same in all of them, the L2 norm
of ``w_i - w`` over all aggregated values that the client sent. With Scaffold the moves of the controls are among them.

Values are looked at in blocks that stay in the cache, in float64, and never copied as a whole. A sum of squares is
finite exactly if every value is: who measures need not look for NaN and infinity on their own.

Source of clipping: McMahan et al. 2018, arXiv:1710.06963, section 2, flat clipping; Sun et al. 2019, arXiv:1911.07963,
section 4, norm thresholding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from enum import Enum

import numpy as np
import numpy.typing as npt

from fedcore.wire.arrays import Floats, Values

BLOCK = 8192  # values at a time: 64 KiB in float64, which any second-level cache holds
ROUNDING = (
    1.01  # a clipped update is float32 again, which may put it a little beyond the bound; more is no rounding
)


class Sent(Enum):
    """What a client sends of a weight, w_i being its own values, w the model's and n its data size."""

    PRODUCT = 1  # n w_i
    MOVE = 2  # w_i - w
    MOVE_PER_STEP = 3  # (w_i - w) / n: here n is the number of local steps


Kind = Callable[[str], Sent]
"""Name of a weight -> what clients send of it."""


def distance(
    update: Mapping[str, Values], previous: Mapping[str, Floats], kind: Kind, data_size: int
) -> float:
    """Return the L2 norm of an update's distance to the model that it was trained from.

    Args:
        update: name -> float32[n], as sent.
        previous: that model, name -> float32[n]; holds every name of the update.
        kind: what was sent.
        data_size: that the client declared, >= 1.

    Returns:
        The norm; infinite or NaN if any value is.
    """
    total = 0.0
    scratch = np.empty(BLOCK, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        for name, values in update.items():
            sent = kind(name)
            factor = {Sent.PRODUCT: 1.0 / data_size, Sent.MOVE: 1.0, Sent.MOVE_PER_STEP: float(data_size)}[
                sent
            ]
            for span in _blocks(values.size):
                block = scratch[: span.stop - span.start]
                np.multiply(values[span], factor, out=block, dtype=np.float64)
                if sent is Sent.PRODUCT:
                    np.subtract(block, previous[name][span], out=block)
                total += float(np.dot(block, block))
    return math.sqrt(total) if total >= 0.0 else math.nan


def bring_nearer(
    update: Mapping[str, npt.NDArray[np.float32]],
    previous: Mapping[str, Floats],
    kind: Kind,
    data_size: int,
    factor: float,
) -> None:
    """Multiply the distance of an update by a factor, in the update's own memory.

    Values that lie in each other's memory, as a stranger may arrange it, are changed more than once: measure again.

    Args:
        update: as for ``distance``, writeable; may be changed in part if this fails.
        previous: as for ``distance``.
        kind: as for ``distance``.
        data_size: as for ``distance``.
        factor: 0..1.
    """
    scratch, base = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        for name, values in update.items():
            for span in _blocks(values.size):
                block, own = scratch[: span.stop - span.start], base[: span.stop - span.start]
                np.multiply(values[span], factor, out=block, dtype=np.float64)
                if kind(name) is Sent.PRODUCT:
                    np.multiply(previous[name][span], (1.0 - factor) * data_size, out=own, dtype=np.float64)
                    np.add(block, own, out=block)
                values[span] = block


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))
