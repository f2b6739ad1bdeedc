"""May an update enter the sum? Names, sizes and finiteness always; with a bound also how far it moves the model.

Rules kept here:

* What is measured is what will be added: the declared data size is that of the shared state, which fixes it for one
  attempt of an iteration, and the model is the one that the iteration started from.
* An update is clipped in its slot and before it is put on record there: whoever recovers the ledger reads it clipped.
* Without a bound nothing is asked of the shared state and nothing is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING

from fedcore.aggregation.bounds import ROUNDING, bring_nearer, distance
from fedcore.aggregation.rules import rule_named
from fedcore.config import NormAction, Settings
from fedcore.errors import ArrayError
from fedcore.ledger.ledger import Slot
from fedcore.observe.metrics import ServerMetrics
from fedcore.store.cluster_state import ClusterState, IterationMoved
from fedcore.wire import codec
from fedcore.wire.arrays import Floats, Layout, all_finite, check_shapes, check_update
from fedcore.wire.messages import RequestUpdateModel

if TYPE_CHECKING:
    from fedcore.models.history import ModelHistory
    from fedcore.services.update_intake import UpdateIntake


class Finding(Enum):
    """What an update was found to be."""

    FIT = 1  # it may count
    UNFIT = 2  # it is no update of this model
    TOO_FAR = 3  # it is one, beyond the bound
    UNKNOWN = 4  # its client has no place yet: it cannot be judged, and may not count


class Screening:
    """Judges updates by the settings in force."""

    def __init__(
        self,
        settings: Settings,
        layout: Layout,
        models: ModelHistory,
        intake: UpdateIntake,
        metrics: ServerMetrics,
    ) -> None:
        """Judge updates of a model.

        Args:
            settings: those in force; the aggregation rule among them says what clients send.
            layout: the model.
            models: where the model lies that updates are trained from.
            intake: does long work in a thread.
            metrics: told how far updates were, and of those clipped.
        """
        own, rule = settings.fedcore.update, settings.aggregation
        self.bound = own.norm_bound
        self._action = own.norm_action
        self._kind = rule_named(rule.aggregation_type.value, rule.total_client_num).sent
        self._layout = layout
        self._models = models
        self._intake = intake
        self._metrics = metrics

    def of(self, slot: Slot, request: RequestUpdateModel) -> Screened:
        """Begin to judge the update in a slot."""
        return Screened(self, slot, request)

    def shape(self, update: Mapping[str, Floats]) -> Finding:
        """Judge names and sizes, and all values if no measuring follows that would find bad ones."""
        try:
            check_shapes(self._layout, update) if self.bound else check_update(self._layout, update)
        except ArrayError:
            return Finding.UNFIT
        return Finding.FIT

    async def measure(
        self, slot: Slot, request: RequestUpdateModel, cluster: ClusterState, number: int
    ) -> Finding:
        """Judge the distance of an update that an iteration may take, and clip it where that is asked for.

        Raises:
            IterationMoved: this server does not have the iteration's model in front.
            StoreError: the shared state cannot be asked.
        """
        if request.iteration != number:
            return Finding.FIT  # the shared state refuses it, in words of its own
        meta = await cluster.client_meta(number, request.fl_id or "")
        image = self._models.get(number - 1)
        if image is None:
            raise IterationMoved(number)
        if meta is None:
            return Finding.UNKNOWN
        previous, size = image.arrays, meta.data_size
        return await self._intake.compute(lambda: self._judge(slot, request, previous, size))

    def _judge(
        self, slot: Slot, request: RequestUpdateModel, previous: Mapping[str, Floats], data_size: int
    ) -> Finding:
        update = weights_of(request)
        counted = {name: values for name, values in update.items() if self._layout.by_name[name].aggregated}
        norm = distance(counted, previous, self._kind, data_size)
        if not math.isfinite(norm) or not all(
            all_finite(values) for name, values in update.items() if name not in counted
        ):
            return Finding.UNFIT
        self._metrics.update_norm.observe(norm)
        if norm <= self.bound:
            return Finding.FIT
        match self._action:
            case NormAction.REFUSE:
                return Finding.TOO_FAR
            case NormAction.COUNT:
                return Finding.FIT
        return self._clip(slot, previous, data_size, self.bound / norm)

    def _clip(self, slot: Slot, previous: Mapping[str, Floats], data_size: int, factor: float) -> Finding:
        request = codec.decode(RequestUpdateModel, slot.buffer[: slot.length], writable=True)
        counted = {
            name: values
            for name, values in weights_of(request).items()
            if self._layout.by_name[name].aggregated
        }
        bring_nearer(counted, previous, self._kind, data_size, factor)
        if not distance(counted, previous, self._kind, data_size) <= ROUNDING * self.bound:
            return Finding.TOO_FAR  # its values share memory: nobody's builder does that
        self._metrics.updates_clipped.inc()
        return Finding.FIT


class Screened:
    """One update and what was found; it is measured once in each attempt that may take it."""

    def __init__(self, screening: Screening, slot: Slot, request: RequestUpdateModel) -> None:
        self._screening = screening
        self._slot = slot
        self._request = request
        self._shape = self._finding = screening.shape(weights_of(request))
        self._measured_for: tuple[int, int] | None = None

    async def finding(self, cluster: ClusterState, number: int, attempt: int) -> Finding:
        """Judge the update for an attempt; see ``Screening.measure``."""
        if (
            not self._screening.bound
            or self._shape is Finding.UNFIT
            or self._measured_for == (number, attempt)
        ):
            return self._finding
        self._finding = await self._screening.measure(self._slot, self._request, cluster, number)
        if self._finding is not Finding.UNKNOWN:
            self._measured_for = number, attempt
        return self._finding


def weights_of(request: RequestUpdateModel) -> dict[str, Floats]:
    """Return the weights of an update by name; of two of one name the last counts."""
    named = ((item.weight_fullname, item.data) for item in request.feature_map or ())
    return {name: data for name, data in named if name is not None and data is not None}
