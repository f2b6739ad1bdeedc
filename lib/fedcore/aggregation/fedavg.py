"""Federated averaging (McMahan et al. 2017, arXiv:1602.05629, algorithm 1).

Devices send every value already multiplied by their data size, so the server adds and divides, nothing else. Sums are
float64: the mean of many float32 products keeps all digits of a float32 result. Each weight has its own total data
size, because an update may carry any subset of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedcore.wire.arrays import Floats, Layout

Doubles = npt.NDArray[np.float64]


class Spans:
    """Where each aggregated weight lies in a vector of sums.

    Attributes:
        names: of the aggregated weights, in the layout's order.
        total: elements of all of them.
    """

    def __init__(self, layout: Layout) -> None:
        self.names = tuple(weight.name for weight in layout.aggregated)
        self._spans: dict[str, slice] = {}
        end = 0
        for weight in layout.aggregated:
            self._spans[weight.name] = slice(end, end + weight.size)
            end += weight.size
        self.total = end

    def __iter__(self) -> Iterator[tuple[str, slice]]:
        return iter(self._spans.items())


class Sums(Protocol):
    """Sums over some updates of one iteration.

    Attributes:
        sums: float64[Spans.total].
        sizes: uint64[len(Spans.names)], total data size of the updates that carried each weight.
    """

    @property
    def sums(self) -> Doubles: ...
    @property
    def sizes(self) -> npt.NDArray[np.uint64]: ...


class RunningSum:
    """Adds partials one after another; their order decides the last bits. A single partial is not copied.

    Attributes:
        sums: float64[spans.total].
        sizes: uint64[len(spans.names)].
    """

    def __init__(self, spans: Spans) -> None:
        self.sums: Doubles = np.zeros(0)
        self.sizes = np.zeros(len(spans.names), np.uint64)
        self._own = False

    def add(self, partial: Sums, *, keep: bool) -> None:
        """Add a partial; ``keep`` says that its arrays stay as they are for as long as this sum is used."""
        if not self.sums.size:
            self.sums, self._own = (partial.sums, False) if keep else (partial.sums.copy(), True)
        elif self._own:
            np.add(self.sums, partial.sums, out=self.sums)
        else:
            self.sums, self._own = self.sums + partial.sums, True
        self.sizes = self.sizes + partial.sizes  # last: where memory was short nothing is added


def mean(
    spans: Spans, sums: Doubles, sizes: npt.NDArray[np.uint64], previous: Mapping[str, Floats]
) -> dict[str, npt.NDArray[np.floating]]:
    """Return the new model: float64 means; weights that nobody sent, or that are not aggregated, stay.

    Args:
        spans: where the weights lie in ``sums``.
        sums: float64[spans.total], sums of value times data size.
        sizes: uint64[len(spans.names)], total data size of the updates that carried each weight.
        previous: the model that the updates were trained from, name -> float32[n].
    """
    model: dict[str, npt.NDArray[np.floating]] = dict(previous)
    for (name, span), size in zip(spans, sizes, strict=True):
        if size:
            model[name] = sums[span] / int(size)
    return model
