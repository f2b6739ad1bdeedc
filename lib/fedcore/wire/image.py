"""The model as the bytes that every answer carries.

The weights of a model live in memory exactly once, as the tail of a FlatBuffer: the FeatureMap tables with their
names and values, built once per layout. An answer is a small new head (return code, reason, plan, and the vector
of offsets that selects the weights to show) in front of that tail; FlatBuffers offsets point forward, so a head of
any length fits. The arrays of a model are read-only views into the tail. A packed image is the same for the
CompressFeatureMap tables of a model in 8 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import flatbuffers
import numpy as np
import numpy.typing as npt

from fedcore.errors import ShapeMismatch
from fedcore.wire.arrays import Floats, Layout, Weight
from fedcore.wire.messages import CompressFeatureMap


@dataclass(frozen=True, eq=False)
class ModelImage:
    """An immutable model in wire form.

    Attributes:
        layout: names, shapes and flags.
        tail: the encoded FeatureMap tables.
        tables: name -> position of its FeatureMap table in the tail.
        arrays: name -> float32[n], flat read-only view into the tail.
    """

    layout: Layout
    tail: bytes
    tables: Mapping[str, int]
    arrays: Mapping[str, Floats]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights; equal models of one layout have equal digests."""
        return hashlib.sha256(self.tail).hexdigest()

    def shaped(self) -> dict[str, Floats]:
        """Return the weights in their own shapes, as views."""
        return {weight.name: self.arrays[weight.name].reshape(weight.shape) for weight in self.layout}

    def select(self, shown: Callable[[Weight], bool] = lambda weight: True) -> ImageSelection:
        """Choose the weights that an answer shows."""
        return ImageSelection(self, tuple(self.tables[w.name] for w in self.layout if shown(w)))


@dataclass(frozen=True, eq=False)
class ImageSelection:
    """Some weights of an image, in the layout's order.

    Stands for a ``feature_map``, or if the image is packed for a ``compress_feature_map``, when encoding.
    """

    image: ModelImage | PackedImage
    positions: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PackedImage:
    """An immutable model in 8 bits per value, in wire form.

    Attributes:
        layout: names, shapes and flags.
        tail: the encoded CompressFeatureMap tables.
        tables: name -> position of its table in the tail.
    """

    layout: Layout
    tail: bytes
    tables: Mapping[str, int]

    @classmethod
    def of(cls, layout: Layout, items: Iterable[CompressFeatureMap]) -> PackedImage:
        """Write the tables of a model's weights.

        Args:
            layout: the model's.
            items: one of each weight, in any order.
        """
        builder = flatbuffers.Builder(layout.total_floats + 128 * len(layout))
        tables: dict[str, int] = {}
        for item in items:
            assert item.weight_fullname is not None
            name = builder.CreateString(item.weight_fullname)
            data = builder.CreateNumpyVector(item.compress_data)
            builder.StartObject(4)
            builder.PrependUOffsetTRelativeSlot(0, name, 0)
            builder.PrependUOffsetTRelativeSlot(1, data, 0)
            builder.PrependFloat32Slot(2, item.min_val, 0.0)
            builder.PrependFloat32Slot(3, item.max_val, 0.0)
            tables[item.weight_fullname] = builder.EndObject()
        builder.Prep(8, 0)
        tail = bytes(builder.Bytes[builder.Head() :])
        return cls(layout, tail, {name: len(tail) - offset for name, offset in tables.items()})

    def select(self, shown: Callable[[Weight], bool] = lambda weight: True) -> ImageSelection:
        """Choose the weights that an answer shows."""
        return ImageSelection(self, tuple(self.tables[w.name] for w in self.layout if shown(w)))


class ImageTemplate:
    """Builds the images of one layout: the frame is made once, later models only copy their floats in."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        size = layout.total_floats * 4 + sum(len(weight.name) + 48 for weight in layout)
        builder = flatbuffers.Builder(size)
        tables: dict[str, int] = {}
        vectors: dict[str, int] = {}
        for weight in reversed(
            layout.weights
        ):  # the builder fills from the end: the first weight comes first
            name = builder.CreateString(weight.name)
            vectors[weight.name] = data = builder.CreateNumpyVector(np.zeros(weight.size, np.float32))
            builder.StartObject(2)
            builder.PrependUOffsetTRelativeSlot(0, name, 0)
            builder.PrependUOffsetTRelativeSlot(1, data, 0)
            tables[weight.name] = builder.EndObject()
        builder.Prep(8, 0)
        self._blank = bytes(builder.Bytes[builder.Head() :])
        end = len(self._blank)
        self._tables = {name: end - offset for name, offset in tables.items()}
        self._floats = {name: end - offset + 4 for name, offset in vectors.items()}

    def image(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> ModelImage:
        """Make an image of arrays of any float dtype and any shape with the right number of elements.

        Args:
            arrays: name -> values; every weight of the layout must be there.

        Raises:
            ShapeMismatch: a weight is missing or of another size.
        """
        tail = bytearray(self._blank)
        for name, values in self._views(tail).items():
            if name not in arrays or arrays[name].size != values.size:
                raise ShapeMismatch(f"weight {name!r} is missing or does not have {values.size} elements")
            values[:] = arrays[name].reshape(-1)
        frozen = bytes(tail)
        return ModelImage(self.layout, frozen, self._tables, self._views(frozen))

    @property
    def size(self) -> int:
        """Bytes of every image's tail."""
        return len(self._blank)

    def restore(self, tail: bytes | bytearray, digest: str) -> ModelImage:
        """Make an image of another server's tail.

        Raises:
            ShapeMismatch: it is not the image with that digest, or not one of this layout.
        """
        if len(tail) != len(self._blank):
            raise ShapeMismatch(f"a model of {len(tail)} bytes does not fit, this one has {len(self._blank)}")
        image = self.image(self._views(tail))
        if image.digest != digest:
            raise ShapeMismatch("a model of another server is not what its digest says")
        return image

    def _views(self, tail: bytes | bytearray) -> dict[str, Floats]:
        return {w.name: np.frombuffer(tail, "<f4", w.size, self._floats[w.name]) for w in self.layout}
