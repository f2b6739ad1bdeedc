"""Uploads as ``DIFF_SPARSE_QUANT``: of the difference to the model, a part of the elements, 8 bits each.

A device sends D·(w - w0) of the elements that ``mask.draw`` chooses, D being its data size, w0 the model it began
with; a server adds D·w0 of its own model again. Elements that are not chosen count as unchanged. The mask lies over
all weights of an update one behind the other, in the order of the request's ``name_vec``; the range of the 256 steps
is each weight's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedcore.compression import quant
from fedcore.errors import NonFinite, ShapeMismatch
from fedcore.wire.arrays import Floats
from fedcore.wire.messages import CompressFeatureMap

Places = npt.NDArray[np.intp]
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which elements of which weights travel.

    Attributes:
        places: weight -> intp[k], the positions within it that travel, ascending; in the order of the update.
        sizes: weight -> its number of elements.
    """

    places: Mapping[str, Places]
    sizes: Mapping[str, int]

    @property
    def names(self) -> tuple[str, ...]:
        """The weights in the order of the update."""
        return tuple(self.places)

    @property
    def total(self) -> int:
        """Elements of all weights together."""
        return sum(self.sizes.values())


def pattern(layers: Iterable[tuple[str, int]], mask: npt.NDArray[np.bool_]) -> Pattern:
    """Lay a mask over weights.

    Args:
        layers: name and number of elements of each weight, in the order of the update; each name once.
        mask: bool[n], n elements in all.

    Raises:
        ShapeMismatch: a name comes twice, or the sizes do not add up to the mask's.
    """
    places: dict[str, Places] = {}
    sizes: dict[str, int] = {}
    start = 0
    for name, size in layers:
        if name in places:
            raise ShapeMismatch(f"weight {name!r} is named twice")
        places[name] = np.flatnonzero(mask[start : start + size])
        sizes[name] = size
        start += size
    if start != len(mask):
        raise ShapeMismatch(f"the weights have {start} elements, their mask has {len(mask)}")
    return Pattern(places, sizes)


# ---- device


def compress(
    pattern: Pattern, trained: Mapping[str, Floats], model: Mapping[str, Floats], data_size: int
) -> tuple[CompressFeatureMap, ...]:
    """Compress an update as devices do.

    Args:
        pattern: of this iteration, in the order in which the weights were received.
        trained: weight -> float32[n] after training, times ``data_size``.
        model: weight -> float32[n] before training.
        data_size: training samples.

    Returns:
        One entry per weight, in the pattern's order; one without chosen elements has an empty range, upside down.

    Raises:
        NonFinite: a difference is not finite, or they are too far apart for a float32.
    """
    return tuple(
        _compress(name, trained[name][places] - model[name][places] * np.float32(data_size))
        for name, places in pattern.places.items()
    )


def _compress(name: str, values: Floats) -> CompressFeatureMap:
    """Round to the nearest step, halves upwards."""
    if not values.size:
        return CompressFeatureMap(name, np.empty(0, np.int8), _LARGEST, -_LARGEST)
    low, high = quant.range_of(name, values)
    steps = (values - low) / quant.scale(low, high) + quant.LOWEST
    rounded = np.floor(steps)
    rounded += steps - rounded >= np.float32(0.5)
    return CompressFeatureMap(name, rounded.astype(np.int8), float(low), float(high))


# ---- server


def same_rate(one: float, other: float) -> bool:
    """Tell whether two rates are the same float32."""
    return bool(np.float32(one) == np.float32(other))


def fault(pattern: Pattern, items: Sequence[CompressFeatureMap]) -> str | None:
    """Say what is wrong with the entries of an update, or None.

    The original ignores the entries' names and lets one entry borrow values of the next; here each entry must be its
    weight's, with as many values as the mask has chosen there.
    """
    if len(items) != len(pattern.places):
        return f"{len(items)} entries for {len(pattern.places)} weights"
    for item, (name, places) in zip(items, pattern.places.items(), strict=True):
        if item.weight_fullname != name:
            return f"the entry of weight {name!r} has another name"
        if item.compress_data is None or item.compress_data.size != places.size:
            return f"weight {name!r} does not have the {places.size} values that the mask has chosen"
        if places.size and not quant.is_range(np.float32(item.min_val), np.float32(item.max_val)):
            return f"the range of weight {name!r} is none"
    return None


def restore(item: CompressFeatureMap) -> Floats:
    """Restore the values of an entry as servers do: their scale is summed in float32.

    Args:
        item: an entry in which ``fault`` finds none.

    Returns:
        float32[k]: D times the difference, at the places that the pattern has for the weight.
    """
    low, high = np.float32(item.min_val), np.float32(item.max_val)
    if not quant.is_range(low, high):  # of an entry without values
        low = high = np.float32(0)
    return quant.spread(item.compress_data, quant.scale(low, high), low)


def restore_weight(places: Places, item: CompressFeatureMap, base: Floats, data_size: int) -> Floats:
    """Restore one weight of an update as if it had come uncompressed.

    Args:
        places: the pattern's, for this weight.
        item: its entry.
        base: float32[n], the weight before the iteration.
        data_size: D of the client.

    Returns:
        float32[n]: D·(base + difference), times nothing else.

    Raises:
        NonFinite: D times the model is too large for a float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        weight = base * np.float32(data_size)
        weight[places] += restore(item)
    if not np.isfinite(weight).all():
        raise NonFinite(
            f"weight {item.weight_fullname!r} is not finite any more with a data size of {data_size}"
        )
    return weight
