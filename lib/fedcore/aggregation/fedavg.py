"""Federated averaging (McMahan et al. 2017, arXiv:1602.05629, algorithm 1) as running sums.

Devices send every value already multiplied by their data size, so the server adds and divides, nothing else. Sums
are float64: the mean of many float32 products keeps all digits of a float32 result. Each weight has its own total
data size, because an update may carry any subset of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedcore.wire.arrays import Floats, Layout

BLOCK = (
    65_536  # elements; a block of float64 sums (512 KiB) stays in the cache while several updates are added
)

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class WeightedUpdate:
    """The weights of one accepted upload.

    Attributes:
        weights: name -> float32[n], already multiplied by ``data_size``; any subset of the model.
        data_size: training samples behind it, 1..65535.
    """

    weights: Mapping[str, Floats]
    data_size: int


class RunningSum:
    """Sums over the aggregated weights of one layout.

    Attributes:
        sums: float64[total aggregated elements], in the layout's order.
        sizes: name -> total data size of the updates that carried this weight.
    """

    def __init__(self, layout: Layout) -> None:
        self._spans: dict[str, slice] = {}
        end = 0
        for weight in layout.aggregated:
            self._spans[weight.name] = slice(end, end + weight.size)
            end += weight.size
        self.sums: Doubles = np.zeros(end, np.float64)
        self.sizes: dict[str, int] = dict.fromkeys(self._spans, 0)

    def clear(self) -> None:
        """Start from zero in the same memory."""
        self.sums.fill(0.0)
        self.sizes = dict.fromkeys(self._spans, 0)

    def add(self, updates: Sequence[WeightedUpdate]) -> None:
        """Add updates, several per pass over each block of sums; weights that are not aggregated are left out."""
        for name, span in self._spans.items():
            carriers = [update for update in updates if name in update.weights]
            sums = self.sums[span]
            for start in range(0, sums.size, BLOCK):
                block = sums[start : start + BLOCK]
                for update in carriers:
                    np.add(block, update.weights[name][start : start + BLOCK], out=block)
            self.sizes[name] += sum(update.data_size for update in carriers)

    def merge(self, other: RunningSum) -> None:
        """Add another server's sums of the same layout."""
        np.add(self.sums, other.sums, out=self.sums)
        for name, size in other.sizes.items():
            self.sizes[name] += size

    def mean(self, previous: Mapping[str, Floats]) -> dict[str, npt.NDArray[np.floating]]:
        """Return the new model: float64 means; weights that nobody sent, or that are not aggregated, stay.

        Args:
            previous: the model that the updates were trained from, name -> float32[n].
        """
        model: dict[str, npt.NDArray[np.floating]] = dict(previous)
        for name, span in self._spans.items():
            if self.sizes[name]:
                model[name] = self.sums[span] / self.sizes[name]
        return model
