"""Named weights: what a model looks like, and the checks every foreign array must pass.

A model on the wire is a list of (name, float32 values, row-major) without shape or dtype; the ``Layout`` is the
server's knowledge of both. Nothing here copies an array.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedcore.errors import NonFinite, ShapeMismatch

Floats = npt.NDArray[np.float32]


class Values(Protocol):
    """The values of one weight of an update, to be had in blocks: an array, or what has yet to be decoded."""

    @property
    def size(self) -> int:
        """Number of elements."""
        ...

    def __getitem__(self, span: slice, /) -> npt.NDArray[Any]:
        """Return the float32 values of a span; the same ones each time."""
        ...


@dataclass(frozen=True, slots=True)
class Weight:
    """One named weight of a model.

    Attributes:
        name: the wire's ``weight_fullname``.
        shape: row-major shape; ``()`` is a scalar, sent as a vector of one element.
        aggregated: the protocol's ``require_aggr``; False keeps the initial value for the whole job.
    """

    name: str
    shape: tuple[int, ...]
    aggregated: bool = True

    @property
    def size(self) -> int:
        """Number of float32 elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """All weights of a model in bytewise order of their names, the order in which the server emits them."""

    weights: tuple[Weight, ...]
    by_name: Mapping[str, Weight] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.weights, key=lambda weight: weight.name.encode()))
        object.__setattr__(self, "weights", ordered)
        object.__setattr__(self, "by_name", {weight.name: weight for weight in ordered})
        if len(self.by_name) != len(ordered):
            raise ShapeMismatch("a model holds two weights of one name")

    @classmethod
    def of(
        cls, arrays: Mapping[str, npt.NDArray[np.generic]], not_aggregated: Collection[str] = ()
    ) -> Layout:
        """Describe arrays; weights named in ``not_aggregated`` keep their initial value."""
        return cls(
            tuple(Weight(name, tuple(a.shape), name not in not_aggregated) for name, a in arrays.items())
        )

    def __iter__(self) -> Iterator[Weight]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    @cached_property
    def total_floats(self) -> int:
        """Number of float32 elements of the whole model."""
        return sum(weight.size for weight in self.weights)

    @cached_property
    def aggregated(self) -> tuple[Weight, ...]:
        """The weights that take part in the sum (``require_aggr``)."""
        return tuple(weight for weight in self.weights if weight.aggregated)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and flags: equal on all servers of one job."""
        lines = (f"{w.name}\0{','.join(map(str, w.shape))}\0{int(w.aggregated)}\n" for w in self.weights)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def all_finite(values: Floats) -> bool:
    """Tell whether no element is NaN or infinite.

    The dot product is several times faster than an element-wise test; it overflows for large finite values, so a
    non-finite product is looked at again, element by element.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        quick = math.isfinite(float(np.dot(values, values)))
    return quick or bool(np.isfinite(values).all())


def check_update(layout: Layout, update: Mapping[str, Floats]) -> None:
    """Check the weights of an upload against the model (spec: model check of updateModel).

    Raises:
        ShapeMismatch: as ``check_shapes``.
        NonFinite: NaN or infinity anywhere.
    """
    check_shapes(layout, update)
    for name, values in update.items():
        if not all_finite(values):
            raise NonFinite(f"weight {name!r} holds NaN or infinity")


def check_shapes(layout: Layout, update: Mapping[str, Values]) -> None:
    """Check names and sizes of the weights of an upload; their values are not looked at.

    Any non-empty subset of the model's weights is accepted, as the original does.

    Args:
        layout: the model.
        update: name -> float32[n].

    Raises:
        ShapeMismatch: an unknown name, another size, or no value at all.
    """
    total = 0
    for name, values in update.items():
        weight = layout.by_name.get(name)
        if weight is None:
            raise ShapeMismatch(f"weight {name!r} is not in the model")
        if values.size != weight.size:
            raise ShapeMismatch(f"weight {name!r} has {values.size} elements, the model has {weight.size}")
        total += values.size
    if total == 0:
        raise ShapeMismatch("the update holds no value at all")
