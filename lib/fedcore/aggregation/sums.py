"""Sums of updates: the same ones whatever the rule is that makes a model of them.

A ledger adds what clients send, value by value in float64, and the data size of those who sent each weight. Here the
sums of several ledgers become one. They are float64: a mean of many float32 products keeps all digits of a float32
result. Each weight has its own total data size, because an update may carry any subset of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedcore.aggregation.arithmetic import NUMPY, Arithmetic, Array, Doubles
from fedcore.wire.arrays import Layout

Sizes = npt.NDArray[np.uint64]


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
    def sizes(self) -> Sizes: ...


class RunningSum:
    """Adds partials one after another; their order decides the last bits. A single partial is not copied.

    Attributes:
        sums: float64[spans.total] of the arithmetic.
        sizes: uint64[len(spans.names)].
        arithmetic: what adds.
    """

    def __init__(self, spans: Spans, arithmetic: Arithmetic = NUMPY) -> None:
        self.arithmetic = arithmetic
        self.sums: Array = arithmetic.take(np.zeros(0), share=True)[0]
        self.sizes: Sizes = np.zeros(len(spans.names), np.uint64)
        self._begun = False
        self._own = False

    def add(self, partial: Sums, *, keep: bool) -> None:
        """Add a partial; ``keep`` says that its arrays stay as they are for as long as this sum is used.

        Where memory is short nothing is added, and the caller may try again.

        Raises:
            MemoryError: the computer has no memory for it.
            AcceleratorFailed: the accelerator has none, or broke.
        """
        if not self._begun:
            self.sums, self._own = self.arithmetic.take(partial.sums, share=keep)
        elif self._own:
            self.arithmetic.add(self.sums, partial.sums)
        else:
            own, _ = self.arithmetic.take(self.arithmetic.host(self.sums), share=False)
            self.arithmetic.add(own, partial.sums)
            self.sums, self._own = own, True
        self._begun = True
        self.sizes = self.sizes + partial.sizes

    def move(self, arithmetic: Arithmetic) -> None:
        """Go on with another arithmetic.

        Raises:
            AcceleratorFailed: what was added cannot be read any more.
        """
        self.sums = arithmetic.take(self.arithmetic.host(self.sums), share=True)[0]
        self.arithmetic = arithmetic
