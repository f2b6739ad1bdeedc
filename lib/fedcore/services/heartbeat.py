"""Keeps this node on the list of the living."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.application.service import Service
from twisted.internet import defer, task

from fedcore.errors import StoreError
from fedcore.store.cluster_state import ClusterState

PERIOD_S = 1.0


class Heartbeat(Service):
    """Renews the node's entry every second while it has a cluster, and takes it off the list at the end.

    Attributes:
        registered: whether the node is on the list.
    """

    def __init__(
        self, cluster: Callable[[], ClusterState | None], role: str, node_id: str, address: str, reactor: Any
    ) -> None:
        """Speak for ``node_id``; ``cluster`` gives the instance it belongs to, or None before it has joined one."""
        self.registered = False
        self._cluster = cluster
        self._node = (role, node_id, address)
        self._loop = task.LoopingCall(self.beat)
        self._loop.clock = reactor

    def startService(self) -> None:
        super().startService()
        self._loop.start(PERIOD_S)

    @defer.inlineCallbacks
    def stopService(self) -> Any:
        super().stopService()
        self._loop.stop()
        cluster = self._cluster()
        if cluster is not None:
            try:
                yield defer.Deferred.fromCoroutine(cluster.leave(*self._node[:2]))
            except StoreError:
                return  # the entry expires by itself

    def beat(self) -> defer.Deferred[None]:
        """Renew the entry now."""
        return defer.Deferred.fromCoroutine(self._beat())

    async def _beat(self) -> None:
        cluster = self._cluster()
        if cluster is not None:
            try:
                await cluster.heartbeat(*self._node)
                if not self.registered:
                    self.registered = True
                    await cluster.announce_join()
            except StoreError:
                return  # counted by the connection; the next beat is a second away
