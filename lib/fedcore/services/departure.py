"""A clean stop: what this server holds of the current iteration goes to whoever goes on with it.

A server of this host, or else one of another host, reads the sums and keeps them. Nobody of this host is relied on to
adopt the files: it may be about to stop as well. What nobody takes stays here for the next server that starts here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from twisted.logger import Logger

from fedcore.core.iteration import MADE, Phase
from fedcore.core.node_id import host_of
from fedcore.errors import FedcoreError, PeerError, StoreError
from fedcore.services.iteration_driver import IterationDriver, Parts
from fedcore.services.ledgers import Closed
from fedcore.store.cluster_state import ClusterState


class Departure:
    """The last things that a server does."""

    log = Logger()

    def __init__(self, driver: IterationDriver, parts: Parts) -> None:
        self._driver = driver
        self._parts = parts

    async def hand_over(self) -> None:
        """Give what this server holds to whoever goes on with the iteration."""
        cluster = self._driver.cluster
        if cluster is None or not self._parts.redis.available:
            return
        try:
            if await self._gave_model():
                return
            held = await self._held_updates(cluster)
            if not held.partials:
                return
            self._driver.stopping = held
            for peer in self._nearest_first(await self._driver.refresh_others()):
                if await self._gave(peer, held):
                    return
        except FedcoreError as error:
            self.log.error("the updates of this server could not be handed over: {error}", error=str(error))

    async def release(self) -> None:
        """Tell the siblings that what this server leaves on the host may be adopted."""
        cluster = self._driver.cluster
        if cluster is not None and self._parts.redis.available:
            with contextlib.suppress(StoreError):
                await cluster.announce_release()

    async def _gave_model(self) -> bool:
        """Give away what a worker trains or has trained, or is masked; tell whether its updates are needed no more."""
        driver, publication = self._driver, self._parts.publication
        await driver.look()
        now = driver.iteration
        if now.phase not in MADE or not now.aggregate:
            return False
        pushed = now.phase is Phase.TRAINED or (now.phase is Phase.CANDIDATE and driver.policy.hybrid)
        made = now.phase in (Phase.TRAINED, Phase.CANDIDATE)
        candidate = publication.nominate(now.digest if made else now.aggregate, now.number)
        if candidate is None:
            return pushed
        takers = await publication.offer(candidate, await driver.refresh_others())
        return pushed or bool(takers)

    async def _held_updates(self, cluster: ClusterState) -> Closed:
        """Seal what this server holds of the current iteration; those that count."""
        number, attempt = self._driver.where
        counted = await cluster.uploads_by_ledger(number)
        own = await self._parts.intake.seal(number, attempt)
        here = [*self._parts.ledgers.adopted.values(), *([] if own is None else [own])]
        counting = [partial for partial in here if partial.ledger_id in counted]
        return Closed((cluster.keys.instance, number, attempt), counting)

    def _nearest_first(self, peers: Sequence[str]) -> list[str]:
        return sorted(peers, key=lambda peer: host_of(peer) != host_of(self._driver.node_id))

    async def _gave(self, peer: str, held: Closed) -> bool:
        instance, _, attempt = held.where
        for partial in list(held.partials):
            try:
                await self._parts.peers.hand_over(peer, partial, instance, attempt)
            except PeerError as error:
                self.log.warn("{peer} does not take the updates: {error}", peer=peer, error=str(error))
                return False
            held.partials.remove(partial)
            self._parts.ledgers.gave_away(partial.ledger_id)
            self.log.info("{updates} updates handed over", updates=partial.totals.count, peer=peer)
        return True
