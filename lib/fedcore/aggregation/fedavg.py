"""Federated averaging (McMahan et al. 2017, arXiv:1602.05629, algorithm 1), on the server also FedProx.

    w+ = sum n_i w_i / sum n_i

Clients send every value already multiplied by their data size n_i, so the server adds and divides, nothing else. The
sums go over those who sent the weight.

FedProx (Li et al. 2020, arXiv:1812.06127, algorithm 2) changes what clients minimise: they add mu/2 |w - w_global|^2 to
their loss. The server's step is that of FedAvg. (The paper draws clients with probability n_i/n and takes their plain
mean; here clients come by themselves and are weighted by n_i, which has the same expectation.)
"""

from __future__ import annotations

from collections.abc import Iterator

from fedcore.aggregation.arithmetic import Array
from fedcore.aggregation.bounds import Sent
from fedcore.aggregation.rule import Previous, Total
from fedcore.wire.arrays import Layout, Weight


class FedAvg:
    """The mean, weighted by data sizes."""

    def keeps(self, layout: Layout) -> tuple[Weight, ...]:
        return ()

    def is_kept(self, name: str) -> bool:
        return False

    def sent(self, name: str) -> Sent:
        return Sent.PRODUCT

    def finish(self, total: Total, previous: Previous) -> Iterator[tuple[str, Array]]:
        for name, values, size in total.sent():
            yield name, values / total.number(size)
