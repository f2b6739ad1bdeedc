"""May an update enter the sum? Names, sizes and finiteness always; with a bound also how far it moves the model.

Rules kept here:

* What is measured is what will be added: the declared data size is that of the shared state, which fixes it for one
  attempt of an iteration, and the model is the one that the iteration started from.
* An update is clipped in its slot and before it is put on record there: whoever recovers the ledger reads it clipped.
* What is not plain weights is judged as what it will be decoded to, and is decoded against one model only.
* Without a bound nothing is asked of the shared state and nothing is measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

from fedcore.aggregation.bounds import ROUNDING, bring_nearer, distance
from fedcore.aggregation.rules import rule_named
from fedcore.config import NormAction, Settings
from fedcore.errors import ArrayError
from fedcore.ledger.decoding import Decoder, Layers, Reading, missing
from fedcore.ledger.ledger import Slot
from fedcore.observe.metrics import ServerMetrics
from fedcore.services.update_forms import UpdateForms, weights_of
from fedcore.store.cluster_state import ClusterState, IterationMoved
from fedcore.wire import codec
from fedcore.wire.arrays import Floats, Layout, Values, all_finite, check_shapes, check_update
from fedcore.wire.image import ModelImage
from fedcore.wire.messages import RequestUpdateModel

if TYPE_CHECKING:
    from fedcore.models.history import ModelHistory
    from fedcore.services.update_intake import UpdateIntake


_V = TypeVar("_V")


class Finding(Enum):
    """What an update was found to be."""

    FIT = 1  # it may count
    UNFIT = 2  # it is no update of this model
    TOO_FAR = 3  # it is one, beyond the bound
    UNKNOWN = 4  # its client has no place yet: it cannot be judged, and may not count
    INCOMPLETE = 5  # a weight is missing that an update of its form must hold


class Screening:
    """Judges updates by the settings in force.

    Attributes:
        bound: greatest distance of an update to the model, 0 for any.
        forms: reads what is not plain weights.
    """

    def __init__(
        self,
        settings: Settings,
        layout: Layout,
        models: ModelHistory,
        intake: UpdateIntake,
        metrics: ServerMetrics,
        forms: UpdateForms,
    ) -> None:
        """Judge updates of a model.

        Args:
            settings: those in force; the aggregation rule among them says what clients send.
            layout: the model.
            models: where the model lies that updates are trained from.
            intake: does long work in a thread.
            metrics: told how far updates were, and of those clipped.
            forms: reads what is not plain weights; follows the settings by itself.
        """
        own, rule = settings.fedcore.update, settings.aggregation
        self.bound = own.norm_bound
        self.forms = forms
        self._action = own.norm_action
        self._kind = rule_named(rule.aggregation_type.value, rule.total_client_num).sent
        self._layout = layout
        self._models = models
        self._intake = intake
        self._metrics = metrics

    def of(self, slot: Slot, request: RequestUpdateModel) -> Screened:
        """Begin to judge the update in a slot."""
        return Screened(self, slot, request)

    def shape(self, request: RequestUpdateModel) -> tuple[Finding, Layers, str]:
        """Judge what needs no model: names and sizes, and all values if no measuring follows that would find bad ones.

        Returns:
            The finding; the weights of an update that is not plain, else (); and the one that is missing, else "".
        """
        plain = self.forms.decoder_of(request) is Decoder.PLAIN
        layers: Layers = ()
        names: Collection[str]
        try:
            if plain:
                names = self._check_plain(request)
            else:
                layers = self.forms.layers(request)
                names = dict(layers)
        except ArrayError:
            return Finding.UNFIT, (), ""
        lacking = missing(self._layout, names) if self.forms.whole or not plain else None
        return (Finding.FIT, layers, "") if lacking is None else (Finding.INCOMPLETE, (), lacking)

    def _check_plain(self, request: RequestUpdateModel) -> Collection[str]:
        self.forms.check_unsigned()
        update = weights_of(request)
        check_shapes(self._layout, update) if self.bound else check_update(self._layout, update)
        return update

    def model_before(self, number: int) -> ModelImage:
        """Return the model that an iteration started from.

        Raises:
            IterationMoved: this server does not have it in front.
        """
        image = self._models.get(number - 1)
        if image is None:
            raise IterationMoved(number)
        return image

    async def measure(self, screened: Screened, cluster: ClusterState, number: int) -> Finding:
        """Judge the distance of an update that an iteration may take, and clip it where that is asked for.

        Raises:
            IterationMoved: this server does not have the iteration's model in front.
            StoreError: the shared state cannot be asked.
        """
        request = screened.request
        if request.iteration != number:
            return Finding.FIT  # the shared state refuses it, in words of its own
        meta = await cluster.client_meta(number, request.fl_id or "")
        image = self.model_before(number)
        if meta is None:
            return Finding.UNKNOWN
        if screened.reading is not None and screened.reading.base != image.digest:
            raise IterationMoved(number)
        previous, size = image.arrays, meta.data_size
        return await self._intake.compute(lambda: self._judge(screened, previous, size))

    def _judge(self, screened: Screened, previous: Mapping[str, Floats], data_size: int) -> Finding:
        reading = screened.reading
        if reading is None:
            sent = weights_of(screened.request)
            rest = [values for name, values in sent.items() if not self._layout.by_name[name].aggregated]
            update: Mapping[str, Values] = sent
        else:
            update, rest = reading.weights(data_size), []  # whatever it decodes to is finite
        norm = distance(self._counted(update), previous, self._kind, data_size)
        if not math.isfinite(norm) or not all(all_finite(values) for values in rest):
            return Finding.UNFIT
        self._metrics.update_norm.observe(norm)
        if norm <= self.bound:
            return Finding.FIT
        match self._action:
            case NormAction.REFUSE:
                return Finding.TOO_FAR
            case NormAction.COUNT:
                return Finding.FIT
        return self._clip(screened, previous, data_size, self.bound / norm)

    def _counted(self, update: Mapping[str, _V]) -> dict[str, _V]:
        return {name: values for name, values in update.items() if self._layout.by_name[name].aggregated}

    def _clip(
        self, screened: Screened, previous: Mapping[str, Floats], data_size: int, factor: float
    ) -> Finding:
        slot = screened.slot
        clipped: Mapping[str, Values]
        if screened.reading is None:
            request = codec.decode(RequestUpdateModel, slot.buffer[: slot.length], writable=True)
            plain = self._counted(weights_of(request))
            bring_nearer(plain, previous, self._kind, data_size, factor)
            clipped = plain
        elif screened.narrow(factor):
            clipped = self._counted(screened.reading.weights(data_size))
        else:
            return Finding.TOO_FAR
        if not distance(clipped, previous, self._kind, data_size) <= ROUNDING * self.bound:
            return Finding.TOO_FAR  # its values share memory: nobody's builder does that
        self._metrics.updates_clipped.inc()
        return Finding.FIT


class Screened:
    """One update and what was found; it is measured once in each attempt that may take it.

    Attributes:
        slot: where it lies.
        request: what it says; another one once a compressed update was clipped.
        reading: how it is read, None for plain weights.
        missing: the weight that an INCOMPLETE one lacks.
    """

    def __init__(self, screening: Screening, slot: Slot, request: RequestUpdateModel) -> None:
        self.slot = slot
        self.request = request
        self.reading: Reading | None = None
        self._screening = screening
        self._shape, self._layers, self.missing = screening.shape(request)
        self._finding = self._shape
        self._image: ModelImage | None = None  # that the reading is against
        self._measured_for: tuple[int, int, str] | None = None

    async def finding(self, cluster: ClusterState, number: int, attempt: int) -> Finding:
        """Judge the update for an attempt; see ``Screening.measure``."""
        if self._shape is not Finding.FIT or not (self._layers or self._screening.bound):
            return self._shape
        if self._layers and self.request.iteration == number:
            try:
                await self._read(self._screening.model_before(number))
            except ArrayError:
                self._shape = Finding.UNFIT
                return self._shape
        if not self._screening.bound:
            return self._shape
        place = (number, attempt, "" if self.reading is None else self.reading.base)
        if self._measured_for != place:
            self._finding = await self._screening.measure(self, cluster, number)
            if self._finding is not Finding.UNKNOWN:
                self._measured_for = place
        return self._finding

    async def _read(self, image: ModelImage) -> None:
        if self.reading is None or self.reading.base != image.digest:
            self.reading = await self._screening.forms.reading(self.request, self._layers, image)
            self._image = image

    def narrow(self, factor: float) -> bool:
        """Multiply the difference of a sparse update to its model by a factor 0..1, in its slot.

        Returns:
            Whether that was done: a signed update has no factor, and what somebody else has built may need more room
            when it is written anew.
        """
        if self._image is None or self.reading is None or self.reading.decoder is not Decoder.SPARSE:
            return False
        items = self.request.compress_feature_map or ()
        nearer = tuple(
            replace(item, min_val=item.min_val * factor, max_val=item.max_val * factor) for item in items
        )
        body = codec.encode(replace(self.request, compress_feature_map=nearer))
        if len(body) > len(self.slot.buffer):
            return False
        self.slot.buffer[: len(body)] = body
        self.slot.length = len(body)
        self.request = codec.decode(RequestUpdateModel, self.slot.body)
        self.reading = self._screening.forms.read_now(self.request, self._layers, self._image)
        return True
