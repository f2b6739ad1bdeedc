"""Takes the masks off the mean of an iteration's updates, by what devices have reported.

Rules kept here:

* Whose updates count was told to devices and does not change any more, nor do the keys. So whoever does this again,
  with the same reports or with more, gets the same bytes.
* Reports beyond those that are needed tell which of them are bad; their shares are left out. If what is left does not
  give every secret, further reports are waited for.
* Secrets and masks are nowhere but in the memory of this process, for as long as it computes, and are never logged.
* The work is done in threads. It may take minutes where hundreds of clients have dropped out, so nobody watches over it
  as over other work; it waits for nothing. If it fails for want of memory or threads it is tried again, until the
  window of the reports is over.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from twisted.internet import threads
from twisted.logger import Logger

from fedcore.config.settings import MaskLayout
from fedcore.core import iteration as core
from fedcore.errors import FedcoreError, LocalError
from fedcore.observe.metrics import ServerMetrics
from fedcore.secagg import masks, unmask
from fedcore.store.cipher_state import CipherState, Exchanged, Material
from fedcore.store.cluster_state import ClusterState
from fedcore.wire.arrays import Floats, all_finite
from fedcore.wire.image import ImageTemplate, ModelImage

_LAYOUTS = {MaskLayout.CONTIGUOUS: masks.Layout.CONTIGUOUS, MaskLayout.PER_LAYER: masks.Layout.PER_LAYER}
_THREADS = max(1, min(8, (os.cpu_count() or 2) - 1))  # one core stays for the reactor


@dataclass(frozen=True, slots=True)
class Unmasked:
    """A model without masks.

    Attributes:
        image: the model, its digest computed.
        updates: how many are in it.
    """

    image: ModelImage
    updates: int


async def _material_of(cluster: ClusterState, number: int) -> Material:
    return await CipherState(cluster).material(number)


class Unmasking:
    """Makes models of masked ones."""

    log = Logger()

    def __init__(
        self,
        template: ImageTemplate,
        mask_layout: MaskLayout,
        metrics: ServerMetrics,
        reactor: Any,
        material: Callable[[ClusterState, int], Awaitable[Material]] = _material_of,
    ) -> None:
        """Take masks off models of ``template``.

        Args:
            template: makes models.
            mask_layout: which values of a mask go with which weight.
            metrics: of this daemon.
            reactor: for time and threads that nobody watches over.
            material: gets what there is to take them off with from the shared state.
        """
        self._template = template
        self._layout = _LAYOUTS[mask_layout]
        self._sizes = [weight.size for weight in template.layout]
        self._metrics = metrics
        self._reactor = reactor
        self._material = material
        self._in_vain: tuple[str, int, frozenset[str]] | None = None  # which reports did not do
        self._excluded: tuple[str, int, frozenset[str]] | None = None  # whose reports were told to be bad
        self._failed: tuple[str, int, frozenset[str]] | None = None  # with which reports the work failed

    async def unmask(
        self, cluster: ClusterState, number: int, masked: ModelImage, t: int
    ) -> Unmasked | core.NotUnmasked | core.ReductionFailed:
        """Take the masks off the mean of an iteration's updates.

        Args:
            cluster: the shared state.
            number: the iteration.
            masked: the mean.
            t: shares that a secret is made of again.

        Returns:
            The model; NotUnmasked if the reports that are there do not give all secrets; or why there never will be
            a model.
        """
        began = self._reactor.seconds()
        material = await self._material(cluster, number)
        tried = cluster.keys.instance, number, frozenset(material.reports)
        if tried == self._in_vain:
            return core.NotUnmasked()
        uploads = await cluster.uploads(number)
        updates, data_size = await cluster.data_size(number)
        try:
            exchanged = await self._heavy(material.read)
            uploaders = exchanged.of_clients(uploads)
            if not 0 < len(uploads) == len(uploaders) == updates:
                raise LocalError("clients are counted whose keys or data sizes are not known")
            members = {fl_id: masks.Member.of(keys) for fl_id, keys in exchanged.members.items()}
            secrets = await self._recover(tried, exchanged, members, uploaders, t)
            if secrets is None:
                self._in_vain = tried
                return core.NotUnmasked()
            image = await self._without(masked, members, uploaders, secrets, data_size)
        except FedcoreError as error:
            self.log.error(
                "the masks of iteration {iteration} cannot be taken off: {error}",
                iteration=number,
                error=str(error),
            )
            return core.ReductionFailed(core.unmask_failed(number))
        except Exception:
            if self._failed != tried:
                self._failed = tried
                self.log.failure(
                    "taking the masks of iteration {iteration} off failed; it is tried again",
                    iteration=number,
                )
            return core.NotUnmasked()
        if image is None:
            self.log.error(
                "what is left of iteration {iteration} without masks is no model", iteration=number
            )
            return core.ReductionFailed(core.unmask_failed(number))
        self._tell(number, len(material.reports), len(secrets) - len(uploaders), began)
        return Unmasked(image, updates)

    async def _recover(
        self,
        tried: tuple[str, int, frozenset[str]],
        exchanged: Exchanged,
        members: Mapping[str, masks.Member],
        uploaders: list[str],
        t: int,
    ) -> Mapping[str, bytes] | None:
        """Put the secrets together, owner -> secret; None if the reports do not give all of them."""
        recovered = await self._heavy(
            lambda: unmask.recover(exchanged.reports, members, exchanged.sharers, uploaders, t)
        )
        _, number, reporters = tried
        self._exclude(tried, frozenset(recovered.bad))
        if recovered.complete:
            secrets: Mapping[str, bytes] = recovered.secrets
            return secrets
        self.log.warn(
            "{reports} reports do not give the secrets of {lacking} clients of iteration {iteration}; further ones may",
            reports=len(reporters),
            lacking=len(recovered.lacking),
            iteration=number,
        )
        return None

    def _exclude(self, tried: tuple[str, int, frozenset[str]], bad: frozenset[str]) -> None:
        """Tell of reports that do not go with the others, each once."""
        instance, number, _ = tried
        known = self._excluded
        told = known[2] if known is not None and known[:2] == (instance, number) else frozenset()
        if new := bad - told:
            self._metrics.reports_excluded.inc(len(new))
            self.log.warn(
                "{reports} reports of iteration {iteration} do not go with the others and are left out",
                reports=len(new),
                iteration=number,
            )
        self._excluded = instance, number, told | bad

    async def _without(
        self,
        masked: ModelImage,
        members: Mapping[str, masks.Member],
        uploaders: list[str],
        secrets: Mapping[str, bytes],
        data_size: int,
    ) -> ModelImage | None:
        """Return the mean without the masks; None if that is no model."""

        def work() -> ModelImage | None:
            noise = np.zeros(self._layout.length(self._sizes))
            with ThreadPoolExecutor(_THREADS) as pool:
                unmask.noise(members, uploaders, secrets, noise, _in_parts(pool))
            return self._finish(masked, noise, data_size)

        image: ModelImage | None = await self._heavy(work)
        return image

    def _finish(
        self, masked: ModelImage, noise: npt.NDArray[np.float64], data_size: int
    ) -> ModelImage | None:
        """Return the mean with the noise added, which is the masks with the other sign, to what is aggregated."""
        arrays: dict[str, Floats] = dict(masked.arrays)
        for weight, place in zip(self._template.layout, self._layout.slices(self._sizes), strict=True):
            if weight.aggregated:
                bare = masked.arrays[weight.name] + noise[place] / data_size
                arrays[weight.name] = bare.astype(np.float32)
        image = self._template.image(arrays)
        return image if image.digest and all(map(all_finite, image.arrays.values())) else None

    def _tell(self, number: int, reports: int, dropouts: int, began: float) -> None:
        seconds = self._reactor.seconds() - began
        self._metrics.unmasking_duration.observe(seconds)
        self._metrics.cipher_dropouts.inc(dropouts)
        self.log.info(
            "the masks of iteration {iteration} are off",
            iteration=number,
            reports=reports,
            dropouts=dropouts,
            duration_s=seconds,
        )

    async def _heavy(self, work: Callable[[], Any]) -> Any:
        """Run work in a thread."""
        return await threads.deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work)


def _in_parts(pool: Executor) -> Callable[..., Iterable[Any]]:
    """Return what does as ``map``, each thread with a part of the items: there may be many, and each is little work."""

    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
        every = list(items)
        size = max(1, -(-len(every) // _THREADS))
        parts = [every[at : at + size] for at in range(0, len(every), size)]
        return itertools.chain.from_iterable(pool.map(lambda part: [function(item) for item in part], parts))

    return run
