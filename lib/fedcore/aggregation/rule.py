"""Aggregation rules: how the sums of an iteration become its model.

All rules work on the same sums (see ``sums``), so the ledger, its recovery and the exchange between servers know
nothing of rules. A rule is two pure functions: ``keeps`` names the arrays that it carries from one iteration to the
next, and ``finish`` makes new values of sums and old values. Kept arrays are further weights of the model: so they are
in its image, digest and checkpoints, and crash recovery and several servers need nothing more. A rule has no other
state.

What nobody sent keeps its value, in every rule; what ``finish`` does not yield is as it was.

Room for later rules, none of which is built:

* Server optimisers (FedAdam: Reddi et al., arXiv:2003.00295). The step from the old weights to the mean is the
  gradient; the moments are kept arrays that ``finish`` yields beside the weights. They are not aggregated, and devices
  must not see them: answers would leave out what ``is_kept`` names, and updates that carry them would be refused.
* Central differential privacy. Updates are clipped by the intake, in their slots and before they are put on record
  (``bounds``); noise belongs to the end of ``finish``. A second computation
  must not draw it anew: the finaliser's digest is compared, so its seed is to be shared, and secret.
* Robust rules (median, trimmed mean, Krum) need every single update. **Sums are not enough**, and no ``finish`` of this
  kind can do it. Such a rule would say so in an attribute (``needs = UPDATES``); the ledger would have to keep each
  body until the end, quorum times model of memory, and a start that cannot give it would be refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fedcore.aggregation.arithmetic import NUMPY, Arithmetic, Array
from fedcore.aggregation.bounds import Sent
from fedcore.aggregation.sums import Sizes, Spans
from fedcore.wire.arrays import Floats, Layout, Weight


class WeightSum(NamedTuple):
    """What clients sent of one weight.

    Attributes:
        name: of the weight.
        values: float64[n], sum of what they sent.
        size: total data size of those who sent it, 0 if nobody did.
    """

    name: str
    values: Array
    size: int


@dataclass(frozen=True, eq=False)
class Total:
    """What a rule makes a model of.

    Attributes:
        spans: where the weights lie in ``sums``.
        sums: float64[spans.total], an array of the arithmetic.
        sizes: uint64[len(spans.names)], total data size of the updates that carried each weight.
        count: updates.
        data_size: of all updates.
        arithmetic: what computes.
    """

    spans: Spans
    sums: Array
    sizes: Sizes
    count: int
    data_size: int
    arithmetic: Arithmetic = NUMPY

    def sent(self) -> Iterator[WeightSum]:
        """Yield the weights that somebody sent."""
        for (name, span), size in zip(self.spans, self.sizes.tolist(), strict=True):
            if size:
                yield WeightSum(name, self.sums[span], size)

    def number(self, value: float) -> Array:
        """Return a number as an operand; see ``arithmetic`` for why."""
        return self.arithmetic.number(value)


Previous = Callable[[str], Array]
"""Name of a weight -> its values in the model that the updates were trained from, float64[n]."""


class Rule(Protocol):
    """How sums become a model."""

    def keeps(self, layout: Layout) -> tuple[Weight, ...]:
        """Return all arrays that the rule carries along with a model, those that are in the layout already included.

        They begin with zeros.

        Raises:
            ShapeMismatch: a weight of the model has a name that the rule needs for itself.
        """
        ...

    def is_kept(self, name: str) -> bool:
        """Tell whether a weight of a model is the rule's own."""
        ...

    def sent(self, name: str) -> Sent:
        """Tell what clients send of a weight."""
        ...

    def finish(self, total: Total, previous: Previous) -> Iterator[tuple[str, Array]]:
        """Yield name and new values, float64[n], of each weight that changes."""
        ...


def new_model(rule: Rule, total: Total, previous: Mapping[str, Floats]) -> dict[str, Floats]:
    """Make a model; it is not checked whether its values are finite.

    Args:
        rule: makes it.
        total: of the updates.
        previous: the model that they were trained from, name -> float32[n]; what does not change is shared with it.

    Raises:
        AcceleratorFailed: the total's arithmetic has no memory for it, or broke.
    """
    model = dict(previous)
    arithmetic = total.arithmetic
    for name, values in rule.finish(total, lambda name: arithmetic.doubles(previous[name])):
        model[name] = arithmetic.floats(values)
    return model
