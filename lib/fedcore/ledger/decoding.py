"""Updates that are not plain weights: what their bodies say, decoded against the model they were made from.

    SPARSE  DIFF_SPARSE_QUANT: of the difference to the model some values in 8 bits; see ``fedcore.compression``
    SIGN    SIGNDS: a direction for a few elements, all alike

Rules kept here:

* An update is decoded block by block, when it is added: what lies in memory is its body and, once for all updates of
  an iteration, the pattern. The values are those that the original makes, one rounding to float32 per operation.
* What is decoded twice gives the same bytes: nothing enters but body, data size, model and the job's terms.
* Whatever a stranger writes into such a body, the checks here refuse it or every value decoded from it is finite.

Source: the protocol's updateModel; for SIGN Jiang, Zhou and Grossklags, SignDS-FL, ACM TIST 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from fedcore.compression import quant, sparse
from fedcore.compression.sparse import Pattern, Places
from fedcore.errors import NonFinite, ShapeMismatch
from fedcore.wire.arrays import Floats, Layout, Values
from fedcore.wire.messages import CompressFeatureMap, CompressType, RequestUpdateModel

MOST_INDICES = 100  # in an index_array; the protocol's limit
MOST_DATA_SIZE = 65535  # the protocol's; values are judged for the greatest, as the real one is known later
_LARGEST = float(np.finfo(np.float32).max)

Layers = tuple[tuple[str, int], ...]
"""Name and number of elements of each weight, in the order of an update."""


class Decoder(IntEnum):
    """How a body becomes weights; stands in the slot's record."""

    PLAIN = 0
    SPARSE = 1
    SIGN = 2


@dataclass(frozen=True, eq=False, slots=True)
class Reading:
    """How one body is read.

    Attributes:
        decoder: its kind.
        base: digest of the model that it is decoded against.
        weights: data size -> the update, name -> values times data size.
    """

    decoder: Decoder
    base: str
    weights: Callable[[int], Mapping[str, Values]]


@dataclass(frozen=True, eq=False, slots=True)
class SparseWeight:
    """One weight of a sparse update: D times the model's values, and what was sent added in some places.

    Attributes:
        base: float32[n], the model's.
        places: intp[k], ascending.
        steps: int8[k], what was sent for these places.
        scale: of a step.
        low: what stands for -128 steps.
        data_size: D.
    """

    base: Floats
    places: Places
    steps: npt.NDArray[np.int8]
    scale: np.float32
    low: np.float32
    data_size: np.float32

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.base.size

    def __getitem__(self, span: slice, /) -> Floats:
        """Decode a block."""
        block = self.base[span] * self.data_size
        first, last = np.searchsorted(self.places, (span.start, span.stop))
        block[self.places[first:last] - span.start] += quant.spread(
            self.steps[first:last], self.scale, self.low
        )
        return block


@dataclass(frozen=True, eq=False, slots=True)
class SignWeight:
    """One weight of a signed update: D times the model's values, some of them a step away.

    Attributes:
        base: float32[n], the model's.
        places: int64[k], ascending.
        step: what is added there, with its sign.
        data_size: D.
    """

    base: Floats
    places: npt.NDArray[np.int64]
    step: np.float32
    data_size: np.float32

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.base.size

    def __getitem__(self, span: slice, /) -> Floats:
        """Decode a block."""
        block = self.base[span].copy()
        first, last = np.searchsorted(self.places, (span.start, span.stop))
        block[self.places[first:last] - span.start] += self.step
        block *= self.data_size
        return block


def missing(layout: Layout, names: Collection[str]) -> str | None:
    """Return an aggregated weight of the model that is not among some names, or None."""
    return next((weight.name for weight in layout.aggregated if weight.name not in names), None)


# ---- sparse


def sparse_layers(layout: Layout, request: RequestUpdateModel, rate: float) -> Layers:
    """Return which weights a sparse update is of, after all checks that need no pattern.

    Args:
        layout: the model.
        request: the update.
        rate: the job's.

    Raises:
        ShapeMismatch: it is no sparse update of this model and job.
    """
    if request.upload_compress_type != CompressType.DIFF_SPARSE_QUANT:
        raise ShapeMismatch(f"an update has compress type {request.upload_compress_type}")
    if not sparse.same_rate(request.upload_sparse_rate, rate):
        raise ShapeMismatch(f"an update has sparse rate {request.upload_sparse_rate}, the job's is {rate}")
    layers = _layers(layout, request.name_vec or ())
    items = request.compress_feature_map or ()
    if len(items) != len(layers):  # before anybody works out a pattern
        raise ShapeMismatch(f"an update has {len(items)} entries for {len(layers)} weights")
    return layers


def sparse_reading(
    request: RequestUpdateModel, pattern: Pattern, base: Mapping[str, Floats], digest: str, peak: float
) -> Reading:
    """Read a sparse update that ``sparse_layers`` has passed.

    Args:
        request: the update.
        pattern: of its iteration, laid over its layers.
        base: the model, name -> float32[n].
        digest: the model's.
        peak: the greatest magnitude in the model.

    Raises:
        ShapeMismatch: entries and pattern contradict each other.
        NonFinite: a value could become too large for a float32.
    """
    items = request.compress_feature_map or ()
    why = sparse.fault(pattern, items)
    if why is not None:
        raise ShapeMismatch(why)
    for item in items:
        if item.compress_data is not None and item.compress_data.size:
            _check_reach(max(abs(item.min_val), abs(item.max_val)), peak)

    def weights(data_size: int) -> Mapping[str, Values]:
        named = zip(pattern.places.items(), items, strict=True)
        return {
            name: _sparse_weight(item, places, base[name], np.float32(data_size))
            for (name, places), item in named
        }

    return Reading(Decoder.SPARSE, digest, weights)


def _sparse_weight(
    item: CompressFeatureMap, places: Places, base: Floats, data_size: np.float32
) -> SparseWeight:
    steps = item.compress_data
    assert steps is not None, "an entry without values was let through"
    low, high = (np.float32(item.min_val), np.float32(item.max_val)) if steps.size else (np.float32(0),) * 2
    return SparseWeight(base, places, steps, quant.scale(low, high), low, data_size)


# ---- sign


def sign_layers(layout: Layout, request: RequestUpdateModel) -> Layers:
    """Return which weights a signed update is of, after all checks.

    The original takes any number for a sign, and silently drops what follows an index out of order.

    Raises:
        ShapeMismatch: it is no signed update of this model.
    """
    if request.sign not in (-1, 1):
        raise ShapeMismatch(f"an update has sign {request.sign}")
    names = [item.weight_fullname or "" for item in request.feature_map or ()]
    layers = _layers(layout, names)
    indices = request.index_array
    if indices is None or not 1 <= indices.size <= MOST_INDICES:
        raise ShapeMismatch(f"an update has not 1 to {MOST_INDICES} indices")
    total = sum(size for _, size in layers)
    if indices[0] < 0 or indices[-1] >= total or not bool(np.all(indices[1:] > indices[:-1])):
        raise ShapeMismatch("the indices of an update are not ascending, or outside of the model")
    return layers


def sign_reading(
    request: RequestUpdateModel,
    layers: Layers,
    step: float,
    base: Mapping[str, Floats],
    digest: str,
    peak: float,
) -> Reading:
    """Read a signed update that ``sign_layers`` has passed.

    Args:
        request: the update.
        layers: its weights.
        step: the job's ``sign_global_lr``.
        base: the model, name -> float32[n].
        digest: the model's.
        peak: the greatest magnitude in the model.

    Raises:
        NonFinite: a value could become too large for a float32.
    """
    _check_reach(MOST_DATA_SIZE * step, peak)
    signed = np.float32(request.sign) * np.float32(step)
    places: dict[str, npt.NDArray[np.int64]] = {}
    start = 0
    assert request.index_array is not None, "an update without indices was let through"
    indices = request.index_array.astype(np.int64)
    for name, size in layers:
        first, last = np.searchsorted(indices, (start, start + size))
        places[name] = indices[first:last] - start
        start += size

    def weights(data_size: int) -> Mapping[str, Values]:
        size = np.float32(data_size)
        return {name: SignWeight(base[name], own, signed, size) for name, own in places.items()}

    return Reading(Decoder.SIGN, digest, weights)


# ---- both


def _layers(layout: Layout, names: Collection[str]) -> Layers:
    """Return some weights of a model with their sizes.

    Raises:
        ShapeMismatch: one is unknown or comes twice, or there is no element at all.
    """
    if len(set(names)) != len(names):
        raise ShapeMismatch("an update names a weight twice")
    unknown = next((name for name in names if name not in layout.by_name), None)
    if unknown is not None:
        raise ShapeMismatch(f"weight {unknown!r} is not in the model")
    layers = tuple((name, layout.by_name[name].size) for name in names)
    if not any(size for _, size in layers):
        raise ShapeMismatch("the update holds no value at all")
    return layers


def _check_reach(move: float, peak: float) -> None:
    """Make sure that no value of an update leaves float32, whatever the data size.

    Args:
        move: greatest magnitude of what is added to D times the model.
        peak: greatest magnitude in the model.

    Raises:
        NonFinite: one might. Those that come so near to the end of the numbers are no trained weights.
    """
    if not 2 * move + MOST_DATA_SIZE * peak < _LARGEST:
        raise NonFinite("a value of an update is too large for a float32")
