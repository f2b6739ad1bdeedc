"""8 bits for a value of a weight: the 256 steps from its smallest value to its largest one.

Both directions of the download, ``QUANT``: the server compresses a model, devices restore it. And what the upload's
``sparse.py`` shares with it. Everything is computed in float32 and step by step as the original computes it, because
two sides that differ in the last bit of a scale train different models.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedcore.errors import NonFinite
from fedcore.wire.arrays import Floats
from fedcore.wire.messages import CompressFeatureMap

STEPS = np.float32(255)
LOWEST = np.float32(-128)  # of an int8: what stands for the smallest value
TINY = np.float32(1e-10)  # keeps the scale of equal values from being zero


def compress(name: str, values: Floats) -> CompressFeatureMap:
    """Compress one weight of a model as servers do.

    An empty weight has an empty range around zero; the original cannot compress a model that holds one. A value is
    rounded to the nearest step, halves away from zero.

    Args:
        name: its full name.
        values: float32[n], finite.

    Raises:
        NonFinite: a value is not finite, or the range is too wide for a float32.
    """
    low, high = range_of(name, values) if values.size else (np.float32(0), np.float32(0))
    steps = (values - low) / scale(low, high) + LOWEST
    rounded = np.trunc(steps)
    rounded += np.trunc((steps - rounded) * np.float32(2))
    return CompressFeatureMap(name, rounded.astype(np.int8), float(low), float(high))


def restore(item: CompressFeatureMap) -> Floats:
    """Restore one weight of a downloaded model as devices do: their scale is summed in double.

    Returns:
        float32[n].

    Raises:
        NonFinite: the range is none.
    """
    low, high = np.float32(item.min_val), np.float32(item.max_val)
    if not is_range(low, high):
        raise NonFinite(f"weight {item.weight_fullname!r} lies between {low} and {high}, which is no range")
    return spread(item.compress_data, np.float32(float((high - low) / STEPS) + 1e-10), low)


def spread(steps: npt.NDArray[np.int8] | None, scale: np.float32, low: np.float32) -> Floats:
    """Return the values that steps of a scale stand for."""
    assert steps is not None, "a weight without values was let through"
    values = steps.astype(np.float32)
    values -= LOWEST
    values *= scale
    values += low
    return values


def scale(low: np.float32, high: np.float32) -> np.float32:
    """Return how far two steps are apart, all in float32."""
    return (high - low) / STEPS + TINY


def range_of(name: str, values: Floats) -> tuple[np.float32, np.float32]:
    """Return the smallest and the largest of some values.

    Raises:
        NonFinite: a value is not finite, or they are too far apart for a float32.
    """
    low, high = np.float32(values.min()), np.float32(values.max())
    if not is_range(low, high):
        raise NonFinite(f"weight {name!r} cannot be compressed: its values lie between {low} and {high}")
    return low, high


def is_range(low: np.float32, high: np.float32) -> bool:
    """Tell whether values can lie between two others: finite, in order, and a finite distance apart."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(low <= high) and math.isfinite(high - low)
