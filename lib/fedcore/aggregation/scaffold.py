"""Scaffold (Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1, last two lines): control variates against drift.

    w+ = sum n_i w_i / sum n_i                  (the paper: global step size 1, equal n_i)
    c+ = c + 1/N sum (c_i+ - c_i)               over those who took part, N the whole population

The control of weight ``X`` is the weight ``control.X`` of the model, zero at first. Clients send w_i times n_i, and of
their controls the difference, not multiplied by anything; N is ``aggregation.total_client_num``.

The paper's factor |S|/N times the mean over S is 1/N times the sum, so neither needs the number of updates. Who sends
no difference for a control has not moved it. The control of a weight that is not aggregated is there, because clients
may send it, but is not aggregated either.

A model that is read from a checkpoint has its controls already; ``keeps`` makes no controls of controls, and they are
taken as they are. (The original adds them once more, so that it finds another number of weights, or zeros.)
"""

from __future__ import annotations

from collections.abc import Iterator

from fedcore.aggregation.arithmetic import Array
from fedcore.aggregation.bounds import Sent
from fedcore.aggregation.rule import Previous, Total
from fedcore.errors import ShapeMismatch
from fedcore.wire.arrays import Layout, Weight

PREFIX = "control."


class Scaffold:
    """The mean of weights, and the sum of moves of controls over the whole population."""

    def __init__(self, total_client_num: int) -> None:
        """Divide by ``total_client_num``, the clients that there are, >= 1."""
        self._population = total_client_num

    def keeps(self, layout: Layout) -> tuple[Weight, ...]:
        plain = [weight for weight in layout if not self.is_kept(weight.name)]
        controls = tuple(Weight(PREFIX + each.name, each.shape, each.aggregated) for each in plain)
        own = {each.name for each in controls}
        stray = [each.name for each in layout if self.is_kept(each.name) and each.name not in own]
        if stray:
            raise ShapeMismatch(
                f"weight {stray[0]!r} has the name of a control of Scaffold, and there is no weight "
                f"{stray[0].removeprefix(PREFIX)!r}",
                hint="rename it, or take another aggregation_type",
            )
        return controls

    def is_kept(self, name: str) -> bool:
        return name.startswith(PREFIX)

    def sent(self, name: str) -> Sent:
        return Sent.MOVE if self.is_kept(name) else Sent.PRODUCT

    def finish(self, total: Total, previous: Previous) -> Iterator[tuple[str, Array]]:
        for name, values, size in total.sent():
            if self.is_kept(name):
                yield name, previous(name) + values / total.number(self._population)
            else:
                yield name, values / total.number(size)
