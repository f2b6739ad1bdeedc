"""Models in 8 bits per value, for devices that want them so: each made once, in a thread."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from twisted.internet import defer, threads
from twisted.logger import Logger

from fedcore.compression import quant
from fedcore.errors import NonFinite
from fedcore.wire.image import ModelImage, PackedImage


def pack(image: ModelImage) -> PackedImage:
    """Compress a model.

    Raises:
        NonFinite: a weight holds values that are not finite, or too far apart.
    """
    weights = image.arrays.items()
    return PackedImage.of(image.layout, (quant.compress(name, values) for name, values in weights))


class PackedModels:
    """The packed form of the models that are in memory; it goes when its model goes."""

    log = Logger()

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._packed: WeakKeyDictionary[ModelImage, PackedImage | None] = WeakKeyDictionary()
        self._packing: WeakKeyDictionary[ModelImage, defer.Deferred[None]] = WeakKeyDictionary()

    def get(self, image: ModelImage) -> PackedImage | None:
        """Return a model packed; None if it is not packed yet, or cannot be."""
        return self._packed.get(image)

    def is_due(self, image: ModelImage) -> bool:
        """Tell whether a model is still to be packed."""
        return image not in self._packed

    async def make(self, image: ModelImage) -> None:
        """Pack a model, or wait until whoever has begun to is done. Afterwards it is not due any more."""
        if image not in self._packing:
            self._packing[image] = defer.Deferred.fromCoroutine(self._make(image))
        waiter: defer.Deferred[None] = defer.Deferred()
        self._packing[image].addBoth(waiter.callback)
        await waiter

    async def _make(self, image: ModelImage) -> None:
        packed: PackedImage | None = None
        try:
            packed = await threads.deferToThreadPool(
                self._reactor, self._reactor.getThreadPool(), lambda: pack(image)
            )
        except NonFinite as error:
            self.log.warn("devices get this model in full, not in 8 bits: {error}", error=str(error))
        except Exception:
            self.log.failure("devices get this model in full, not in 8 bits")
        self._packed[image] = packed
