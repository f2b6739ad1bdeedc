"""Watches over the updates of the current iteration, once a second.

This server has a ledger of its own; ledgers of dead processes on this host are adopted; a finaliser that died is
noticed; ledgers that nobody can read are given up in the end, so that the iteration goes on without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.logger import Logger

from fedcore.core import iteration as core
from fedcore.core.iteration import Iteration, Phase
from fedcore.core.job import RunningState
from fedcore.core.node_id import replaced
from fedcore.errors import PeerError
from fedcore.net.node_client import PeerUnreachable
from fedcore.services.peers import PeerReplaced
from fedcore.services.recovery import Memory
from fedcore.store.cluster_state import ClusterState
from fedcore.store.keys import REVOKED

if TYPE_CHECKING:
    from fedcore.services.iteration_driver import IterationDriver, Parts


class UpdateGuard:
    """The watch of one server; it reports to the driver."""

    log = Logger()

    def __init__(self, driver: IterationDriver, parts: Parts, memory: Memory) -> None:
        self._driver = driver
        self._parts = parts
        self._memory = memory
        self._ledgers = parts.ledgers
        self._orphan = ""  # token of a finaliser that is gone
        self._owned = ""  # the own ledger, once Redis has said that it is ours

    def is_gone(self, token: str, finaliser: str) -> bool:
        """Tell whether the finaliser that holds a token is known to be gone."""
        return token != "" and (token == self._orphan or finaliser in self._ledgers.inherited)

    async def watch(self) -> None:
        """See that this server has a ledger, and that every counted update is in one that can be read.

        Ledgers of dead processes on this host are adopted. Those that nobody can read are given up in the end: the
        iteration goes on without them.
        """
        driver = self._driver
        cluster, now = driver.joined_cluster(), driver.iteration
        await self._driver.refresh_others()
        await self._own_a_ledger(cluster)
        if now.token:
            await self._watch_finaliser(cluster)
        if now.interrupted and now.running is RunningState.RUNNING:
            await cluster.forget_interruption()  # an original scheduler has enabled the job
        if not self._driver.serving:
            return
        adopted = await self._ledgers.adopt(cluster, self._driver.epoch(), self._driver.node_id)
        told = self._ledgers.inherited if adopted else set()
        if self._memory.is_new:
            roll = await cluster.roll()
            self._memory.called(roll)
            told = told | replaced(roll.awaited, [driver.node_id])
        await cluster.nodes_are_back(cluster.redis.run_id, driver.node_id, told)
        if adopted and not self._driver.busy:
            await self._driver.look()
        for ledger_id in list(self._ledgers.adopted):
            if not await self._ledgers.claim_again(cluster, ledger_id, driver.node_id):
                self._ledgers.drop(ledger_id)
        if now.running is not RunningState.RUNNING:
            return
        finaliser = now.token.partition(":")[2] == self._driver.node_id
        if self._are_in_a_model(now):
            return
        if now.phase is Phase.COLLECTING or finaliser:
            await self._give_up_lost(cluster, now)

    def _are_in_a_model(self, now: Iteration) -> bool:
        """Tell whether the updates are needed no more, as the model that was made of them is safe."""
        publication = self._parts.publication
        if now.phase in (Phase.UNMASKING, Phase.TRAINING):
            return publication.held(now.aggregate) is not None
        if now.phase is Phase.CANDIDATE and not self._driver.policy.hybrid:
            masked = now.aggregate and publication.held(now.aggregate)  # its masks can be taken off again
            return bool(masked) or publication.candidate(now.digest) is not None
        return now.phase in (Phase.TRAINED, Phase.CANDIDATE)  # a worker's model cannot be made again

    async def _give_up_lost(self, cluster: ClusterState, now: Iteration) -> None:
        known = now.changing and self._memory.sealed_at is not None
        impatient = known and self._memory.sealed_for() > self._driver.policy.global_window
        lost = await self._parts.judge.lost(
            cluster, now.number, self._parts.reduction.had, out_of_patience=impatient
        )
        if lost and cluster is self._driver.cluster:  # it waits until the effect under way has ended
            self._driver.note(core.UpdatesLost(now.number, now.attempt, lost))

    async def _own_a_ledger(self, cluster: ClusterState) -> None:
        ledgers = self._ledgers
        if ledgers.own is not None:
            owner = await cluster.ledger_owner(ledgers.own.id)
            if ledgers.own is not None and owner == self._driver.node_id:
                self._owned = ledgers.own.id
                return
            if ledgers.own is not None and not owner and ledgers.own.id == self._owned:
                await self._driver.remind()  # Redis has lost data, though the connection stands
                # It is put on record below all the same: a Redis that has a candidate takes no updates back.
            if owner:
                self.log.error(
                    "the update ledger was {how}; a new one is opened",
                    how="given up by the others" if owner == REVOKED else "taken over",
                    owner=owner,
                )
                ledgers.discard()
        fresh = ledgers.own is None
        if ledgers.open() and ledgers.own is not None:
            if fresh:  # before anything else can come in between
                self._parts.intake.begin(self._driver.epoch(), self._driver.iteration.attempt)
            ledger_id = ledgers.own.id
            if await cluster.own_ledger(ledger_id, self._driver.node_id):
                self._owned = ledger_id
            self._driver.wake()  # requests may have waited for it

    async def _watch_finaliser(self, cluster: ClusterState) -> None:
        """Notice that the finaliser is gone; to take over from one that is not would only cost time."""
        token = self._driver.iteration.token
        finaliser = token.partition(":")[2]
        if finaliser in ("", self._driver.node_id):
            return
        gone = not await cluster.is_alive("server", finaliser)
        if not gone:
            try:
                await self._parts.peers.locate(finaliser, "")
            except PeerError as error:
                refused = isinstance(error, PeerUnreachable) and error.refused
                gone = refused or isinstance(error, PeerReplaced)
        self._orphan = token if gone else ""
