"""FedNova (Wang et al. 2020, arXiv:2007.07481, section 5): moves per local step, so that many steps weigh no more.

    d_i = (w_i - w) / tau_i                     what client i sends, tau_i its local steps
    w+  = w + tau_eff sum p_i d_i               p_i = 1/n, tau_eff = sum p_i tau_i = T/n
        = w + T/n sum d_i / n

The paper writes w - tau_eff sum p_i eta d_i with gradients d_i; the move w_i - w is minus eta times their sum, hence
the plus. Clients send tau_i as their data size and d_i not multiplied by anything. Weights p_i are equal, for the data
size has no other place on the wire.

**What n is.** The original divides by (N/ratio)^2, where N clients are asked and N*ratio must answer. With ratio 1
that is the formula above. With a ratio below 1 fewer than N come, and it divides by more: at ratio 0.5 its step is 16
times too short. Here n is the number of updates that came.

**A weight that some leave out.** FedAvg takes the mean of those who sent a weight. Here clients send moves, and who
sends none has not moved: d_i = 0, one of the n all the same. This is the paper's formula with such a d_i, and needs the
number of updates and the sum of all tau_i only, no count for each weight.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedcore.aggregation.arithmetic import Array
from fedcore.aggregation.bounds import Sent
from fedcore.aggregation.rule import Previous, Total
from fedcore.wire.arrays import Layout, Weight


class FedNova:
    """The mean move per step, times the mean number of steps."""

    def keeps(self, layout: Layout) -> tuple[Weight, ...]:
        return ()

    def is_kept(self, name: str) -> bool:
        return False

    def sent(self, name: str) -> Sent:
        return Sent.MOVE_PER_STEP

    def finish(self, total: Total, previous: Previous) -> Iterator[tuple[str, Array]]:
        for name, values, _ in total.sent():
            steps = total.number(total.data_size / total.count)  # tau_eff
            yield name, previous(name) + steps * (values / total.number(total.count))
