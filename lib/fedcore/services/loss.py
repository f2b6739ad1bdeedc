"""Decides when counted updates are lost, because nobody will ever read the ledger that they are in.

A ledger is lost when its owner's lease has run out, and neither the owner nor any living server of the owner's host
knows of it, for LOSS_S of this server's clock. A paused process is not dead: its host still has its file. Only an
iteration that waits sealed for longer than its global window gives up on such a one, too.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from twisted.internet import defer

from fedcore.core.node_id import host_of
from fedcore.errors import PeerError
from fedcore.services.ledgers import Ledgers, Whereabouts
from fedcore.services.peers import Peers
from fedcore.store.cluster_state import ClusterState
from fedcore.store.keys import REVOKED

LOSS_S = 10.0
STALE_S = 7.0  # a longer pause between two judgements is no watching


@dataclass(frozen=True, slots=True)
class _Suspects:
    """Ledgers that may be out of reach, ledger id -> owner, and the living servers beside this one."""

    owners: dict[str, str]
    living: set[str]

    def __contains__(self, ledger_id: str) -> bool:
        return ledger_id in self.owners

    def __bool__(self) -> bool:
        return bool(self.owners)


class LossJudge:
    """Remembers since when each ledger has been out of reach."""

    def __init__(self, node_id: str, ledgers: Ledgers, peers: Peers, reactor: Any) -> None:
        self._node_id = node_id
        self._ledgers = ledgers
        self._peers = peers
        self._reactor = reactor
        self._missed_since: dict[str, float] = {}
        self._judged_at = float("-inf")

    def forget(self) -> None:
        """Begin anew to count the time that ledgers are out of reach."""
        self._missed_since = {}

    async def lost(
        self, cluster: ClusterState, number: int, had: Collection[str], *, out_of_patience: bool
    ) -> tuple[str, ...]:
        """Return the ids of the ledgers whose updates of an iteration are lost.

        Args:
            cluster: the shared state.
            number: the iteration.
            had: ledgers whose updates are in the sum under way.
            out_of_patience: whether the iteration has been sealed for too long to wait for anybody.
        """
        now = self._reactor.seconds()
        if now - self._judged_at > STALE_S:
            self.forget()  # this server was paused, or cut off: it has not watched meanwhile
        self._judged_at = now
        suspects = await self._suspects(cluster, out_of_patience)
        if not suspects and not self._ledgers.adopted:
            self._missed_since.clear()
            return ()  # by far the most frequent case: every ledger is in living hands
        counted = await cluster.uploads_by_ledger(number)
        short = {
            ledger_id
            for ledger_id, partial in self._ledgers.adopted.items()
            if partial.iteration == number and partial.totals.count < counted.get(ledger_id, 0)
        }
        watched, missed = self._missed_since, {}
        for ledger_id in counted.keys() - self._ledgers.in_hand - set(had):
            if ledger_id in suspects and (out_of_patience or await self._missing(suspects, ledger_id)):
                missed[ledger_id] = watched.get(ledger_id, self._reactor.seconds())
        if self._missed_since is not watched:
            return tuple(sorted(short))  # forgotten meanwhile: Redis has lost data, and all begins anew
        self._missed_since = missed
        late = {i for i, since in missed.items() if self._reactor.seconds() - since >= LOSS_S}
        return tuple(sorted(short | late))

    async def _suspects(self, cluster: ClusterState, everybody: bool) -> _Suspects:
        """Return the ledgers in other hands whose owners do not live, or all of them."""
        owners = await cluster.ledgers()
        living = {node.node_id for node in await cluster.nodes("server")}
        return _Suspects(
            {
                ledger_id: owner
                for ledger_id, owner in owners.items()
                if owner not in (REVOKED, self._node_id) and (everybody or owner not in living)
            },
            living - {self._node_id},
        )

    async def _missing(self, suspects: _Suspects, ledger_id: str) -> bool:
        """Tell whether neither the owner of a ledger nor its host knows of it."""
        owner = suspects.owners[ledger_id]
        neighbours = [peer for peer in suspects.living if host_of(peer) == host_of(owner)]
        asked = [defer.Deferred.fromCoroutine(self._knows(peer, ledger_id)) for peer in (owner, *neighbours)]
        if any(known for _, known in await defer.DeferredList(asked)):
            return False
        here = host_of(owner) == host_of(self._node_id)
        return not here or self._ledgers.locate(ledger_id) is Whereabouts.ABSENT

    async def _knows(self, peer: str, ledger_id: str) -> bool:
        try:
            return await self._peers.locate(peer, ledger_id) is not Whereabouts.ABSENT
        except PeerError:
            return False
