"""Brings back what Redis has forgotten: after a fail-over that lost writes, or after the loss of all its data.

Every server brings back the furthest state of the iteration that it has seen, the clients whose updates its ledgers
hold, and those that it gave a place. The scripts only ever raise, so the order in which servers do so does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from twisted.logger import Logger

from fedcore.core.iteration import Iteration
from fedcore.services.ledgers import Ledgers
from fedcore.store.cluster_state import ClientMeta, ClusterState, IterationMoved, Raised, Snapshot

DOUBT_S = 10.0  # how long after a loss of data others may still bring back what they hold
log = Logger()


class Memory:
    """What a server remembers of the shared state, beside its copy of the iteration.

    Attributes:
        ended: success and result of the iteration before.
        epoch: how many instances the job had before this one.
        sealed_at: seconds, when the current iteration was sealed, or None.
    """

    def __init__(self, reactor: Any) -> None:
        self.ended = (True, "")
        self.sealed_at: float | None = None
        self._reactor = reactor
        self._fence = 0  # highest number of a token that was seen
        self.epoch = 0
        self._doubt_until = float("-inf")
        self._others_before: dict[str, float] = {}  # who lived when Redis may have forgotten them, and when

    def sealed_for(self) -> float:
        """Return for how many seconds the iteration has been sealed; infinite if nobody said when."""
        return float("inf") if self.sealed_at is None else float(self._reactor.seconds() - self.sealed_at)

    def localise(self, snapshot: Snapshot) -> Iteration:
        """Take note of what the shared state says; return the iteration with its times by this server's clock."""
        now = self._reactor.seconds()
        self._fence = max(self._fence, snapshot.fence)
        self.epoch = max(self.epoch, snapshot.epoch)
        sealed, started, first = snapshot.sealed_ago, snapshot.started_ago, snapshot.first_upload_ago
        self.sealed_at = None if sealed is None else now - sealed
        return replace(
            snapshot.iteration,
            started=None if started is None else now - started,
            first_upload=None if first is None else now - first,
        )

    def known(self, iteration: Iteration) -> Snapshot:
        """Return the furthest state that this server has seen; ``iteration`` is its copy."""
        now = self._reactor.seconds()

        def ago(moment: float | None) -> float | None:
            return None if moment is None else now - moment

        sealed = ago(self.sealed_at) if iteration.changing else None
        return Snapshot(
            iteration,
            ago(iteration.started),
            ago(iteration.first_upload),
            sealed,
            self._fence,
            self.epoch,
            *self.ended,
        )

    def begin_instance(self) -> None:
        """Forget what was known of another instance."""
        self._fence = self.epoch = 0

    def begin_doubt(self, others: Iterable[str]) -> None:
        """From now on Redis may not know yet what the others know, for DOUBT_S."""
        now = self._reactor.seconds()
        self._doubt_until = now + DOUBT_S
        self._others_before.update(dict.fromkeys(others, now))

    def in_doubt(self, others: Iterable[str]) -> list[str]:
        """Return the servers that may hold what Redis has forgotten; nobody once the doubt is over."""
        now = self._reactor.seconds()
        if now >= self._doubt_until:
            self._others_before.clear()
            return []
        recent = {peer for peer, lived in self._others_before.items() if now - lived < DOUBT_S}
        return sorted({*others, *recent})


async def bring_back(
    cluster: ClusterState,
    known: Snapshot,
    ledgers: Ledgers,
    node_id: str,
    places: Mapping[str, ClientMeta],
) -> Raised:
    """Make Redis know what this server knows; what Redis knows better stays.

    Args:
        cluster: the shared state.
        known: the furthest state that this server has seen.
        ledgers: those in its hands.
        node_id: this server.
        places: the clients that it gave a place in the current iteration, client key -> what they declared.

    Returns:
        What became of the status. NEWER: nothing was changed, the job has another instance.

    Raises:
        StoreError: the shared state cannot be reached.
    """
    raised = await cluster.raise_to(known)
    if raised is Raised.NEWER:
        return raised
    if raised is Raised.RAISED:
        await cluster.announce_loss()
    number, restored = known.iteration.number, 0
    held = {i: p.clients for i, p in ledgers.adopted.items() if p.iteration == number}
    try:
        await cluster.restore_clients(number, "", node_id, places)  # first: these say what was declared
        for ledger_id, clients in held.items():
            await ledgers.claim_again(cluster, ledger_id, node_id)
            metas = {client.hex(): ClientMeta(0, 0, 0) for client in clients}
            restored += await cluster.restore_clients(number, ledger_id, node_id, metas) or 0
        own = ledgers.own
        if own is not None and ledgers.serves(number):
            metas = {client.hex(): ClientMeta(size, 0, 0) for client, size in own.clients().items()}
            restored += await cluster.restore_clients(number, own.id, node_id, metas) or 0
    except IterationMoved:
        return raised  # Redis is further on than this server
    if raised is Raised.RAISED or restored:
        log.warn(
            "Redis had lost data of iteration {iteration}; what this server knows is there again",
            iteration=number,
            attempt=known.iteration.attempt,
            phase=known.iteration.phase.value,
            updates=restored,
        )
    return raised
