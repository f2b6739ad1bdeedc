"""In which form an update comes, and how it is read: as the job's terms say, and as the record of its slot says later.

Rules kept here:

* A form is decided once, by the terms in force, when the update arrives; from then on its slot's record tells it.
* What takes long is done once for all updates of an iteration, in a thread: the pattern of a sparse update, and how
  large the model's values are.
* Without the model that an update was made from nothing is read; whoever recovers a ledger waits for it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial as bind
from typing import Any, Protocol, TypeVar

from twisted.internet import threads

from fedcore.compression import mask, sparse
from fedcore.compression.sparse import Pattern
from fedcore.config import EncryptType, Settings, UploadCompressType
from fedcore.errors import ShapeMismatch
from fedcore.ledger.decoding import (
    Decoder,
    Layers,
    Reading,
    sign_layers,
    sign_reading,
    sparse_layers,
    sparse_reading,
)
from fedcore.ledger.layout import Damaged
from fedcore.ledger.ledger import Read, Update
from fedcore.models.history import ModelHistory
from fedcore.wire import codec
from fedcore.wire.arrays import Floats, Layout
from fedcore.wire.image import ModelImage
from fedcore.wire.messages import RequestUpdateModel

_KEPT = 3  # patterns, masks and peaks: those of an iteration, of the one before, and one more
T = TypeVar("T")


class _Kept:
    """Remembers the newest results of long work; several threads may ask."""

    def __init__(self) -> None:
        self._results: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, key: Hashable) -> Any:
        """Return a result, None if it is not known."""
        return self._results.get(key)

    def of(self, key: Hashable, work: Callable[[], T]) -> T:
        """Return a result, working it out if need be; whoever asks meanwhile waits."""
        with self._lock:
            if key not in self._results:
                self._results[key] = work()
                while len(self._results) > _KEPT:
                    self._results.popitem(last=False)
            self._results.move_to_end(key)
            result: T = self._results[key]
            return result


class Forms(Protocol):
    """What reads recovered updates."""

    def reader(self, base: str) -> Read | None:
        """Return what reads updates that were made from the model with a digest; None while that is not here."""
        ...


class PlainForms:
    """Reads updates that are plain weights, with no model at hand."""

    def reader(self, base: str) -> Read | None:
        """Return what reads plain updates."""
        return _read_plain


def _read_plain(body: memoryview, data_size: int, eval_data_size: int, decoder: int) -> Update:
    if decoder != Decoder.PLAIN:
        raise Damaged(f"an update needs decoder {decoder}, and only plain ones are expected")
    return update_of(codec.decode(RequestUpdateModel, body), data_size, eval_data_size)


class UpdateForms:
    """Reads updates by the terms in force.

    Attributes:
        compressed: whether updates may be compressed.
        whole: whether an update must hold every aggregated weight, whatever its form.
    """

    def __init__(self, settings: Settings, layout: Layout, models: ModelHistory, reactor: Any) -> None:
        """Read updates of a model.

        Args:
            settings: those in force; ``follow_terms`` tells of others.
            layout: of the model.
            models: where the models lie that updates are made from.
            reactor: for threads.
        """
        self._layout = layout
        self._models = models
        self._reactor = reactor
        self._masks, self._patterns, self._peaks = _Kept(), _Kept(), _Kept()
        self.follow_terms(settings)

    def follow_terms(self, settings: Settings) -> None:
        """Read updates as the settings say that are in force now."""
        protection, compression = settings.encrypt, settings.compression
        self.compressed = compression.upload_compress_type is UploadCompressType.DIFF_SPARSE_QUANT
        self.whole = protection.encrypt_type in (EncryptType.PW_ENCRYPT, EncryptType.STABLE_PW_ENCRYPT)
        self._signed = protection.encrypt_type is EncryptType.SIGNDS
        self._unsigned_count = settings.fedcore.update.unsigned_signds
        self._rate = compression.upload_sparse_rate
        self._step = protection.signds.sign_global_lr

    # ---- what arrives

    def decoder_of(self, request: RequestUpdateModel) -> Decoder:
        """Tell in which form an update comes; a compressed one comes only where ``compressed`` holds."""
        if self._signed:
            return Decoder.SIGN if request.sign else Decoder.PLAIN
        return Decoder.SPARSE if self.compressed and request.upload_compress_type else Decoder.PLAIN

    def layers(self, request: RequestUpdateModel) -> Layers:
        """Return the weights of an update that is not plain, after the checks that need no model.

        Raises:
            ArrayError: it is no update of this model and job.
        """
        if self.decoder_of(request) is Decoder.SIGN:
            return sign_layers(self._layout, request)
        return sparse_layers(self._layout, request, self._rate)

    def check_unsigned(self) -> None:
        """Make sure that an update without a sign may count.

        Raises:
            ShapeMismatch: the job takes none.
        """
        if self._signed and not self._unsigned_count:
            raise ShapeMismatch("an update has no sign, and the job takes only signed ones")

    async def reading(self, request: RequestUpdateModel, layers: Layers, image: ModelImage) -> Reading:
        """Return how an update is read that ``layers`` has passed.

        Args:
            request: the update.
            layers: its weights.
            image: the model that it was made from.

        Raises:
            ArrayError: it is no update of this model and job after all.
        """
        decoder = self.decoder_of(request)
        known = self._peaks.known(image.digest) is not None
        if decoder is Decoder.SPARSE:
            known = known and self._patterns.known(_key(request, layers)) is not None
        if known:
            return self.read_now(request, layers, image)
        pool = self._reactor.getThreadPool()
        work = bind(self.read_now, request, layers, image)
        done = threads.deferToThreadPool(self._reactor, pool, work)
        reading: Reading = await done
        return reading

    def read_now(self, request: RequestUpdateModel, layers: Layers, image: ModelImage) -> Reading:
        """Do as ``reading`` does, which may take long."""
        return self._reading(self.decoder_of(request), request, layers, image)

    # ---- what is on record

    def reader(self, base: str) -> Read | None:
        """Return what reads recovered updates that were made from the model with a digest; it may take long.

        None while that model is not here.
        """
        image = self._models.find(base)
        if image is None:
            return None

        def read(body: memoryview, data_size: int, eval_data_size: int, decoder: int) -> Update:
            request = codec.decode(RequestUpdateModel, body)
            reading = self._recorded(request, decoder, image)
            return update_of(request, data_size, eval_data_size, reading)

        return read

    def _recorded(self, request: RequestUpdateModel, decoder: int, image: ModelImage) -> Reading | None:
        if decoder == Decoder.PLAIN:
            return None
        if decoder == Decoder.SPARSE:
            layers = sparse_layers(self._layout, request, request.upload_sparse_rate)
        elif decoder == Decoder.SIGN:
            layers = sign_layers(self._layout, request)
        else:
            raise Damaged(f"an update needs decoder {decoder}, which this version does not know")
        return self._reading(Decoder(decoder), request, layers, image)

    # ---- long work

    def _reading(
        self, decoder: Decoder, request: RequestUpdateModel, layers: Layers, image: ModelImage
    ) -> Reading:
        peak = self._peaks.of(image.digest, lambda: _peak(image))
        if decoder is Decoder.SIGN:
            return sign_reading(request, layers, self._step, image.arrays, image.digest, peak)
        pattern = self._patterns.of(_key(request, layers), lambda: self._pattern(request, layers))
        return sparse_reading(request, pattern, image.arrays, image.digest, peak)

    def _pattern(self, request: RequestUpdateModel, layers: Layers) -> Pattern:
        seed, rate, total = request.iteration, request.upload_sparse_rate, sum(size for _, size in layers)
        marks = self._masks.of((seed, rate, total), lambda: mask.draw(seed, rate, total))
        return sparse.pattern(layers, marks)


def _key(request: RequestUpdateModel, layers: Layers) -> Hashable:
    return request.iteration, request.upload_sparse_rate, layers


def _peak(image: ModelImage) -> float:
    """Return the greatest magnitude among a model's values."""
    return max(
        (
            max(abs(float(values.min())), abs(float(values.max())))
            for values in image.arrays.values()
            if values.size
        ),
        default=0.0,
    )


def weights_of(request: RequestUpdateModel) -> dict[str, Floats]:
    """Return the weights of a plain update by name; of two of one name the last counts."""
    named = ((item.weight_fullname, item.data) for item in request.feature_map or ())
    return {name: data for name, data in named if name is not None and data is not None}


def update_of(
    request: RequestUpdateModel, data_size: int, eval_data_size: int, reading: Reading | None = None
) -> Update:
    """Return what a ledger keeps of a counted updateModel; ``reading``: of one that is not plain."""
    return Update(
        request.fl_id or "",
        weights_of(request) if reading is None else reading.weights(data_size),
        data_size,
        eval_data_size,
        request.upload_loss,
        request.upload_accuracy,
    )
