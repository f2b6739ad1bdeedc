"""What a scheduler knows of its job without being asked: a look every few seconds, for its status."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from twisted.application.service import Service
from twisted.internet import defer, task

from fedcore.services.operator_api import Answer, OperatorApi, Refusal

PERIOD_S = 5.0  # each look is a few questions to Redis


class JobWatch(Service):
    """Looks at a job.

    Attributes:
        state: of the cluster and its living nodes, in a few words.
        changed: called when the state is another one.
    """

    def __init__(self, api: OperatorApi, fl_name: str, reactor: Any) -> None:
        """Look through ``api`` at the job ``fl_name``."""
        self.state = f"job {fl_name}"
        self.changed: Callable[[], None] = lambda: None
        self._api = api
        self._fl_name = fl_name
        self._under_way = False
        self._loop = task.LoopingCall(self.look)
        self._loop.clock = reactor

    def startService(self) -> None:
        super().startService()
        self._loop.start(PERIOD_S)

    def stopService(self) -> None:
        super().stopService()
        self._loop.stop()

    def look(self) -> None:
        """Look now, unless a look is under way."""
        if not self._under_way:
            self._under_way = True
            defer.Deferred.fromCoroutine(self._look())

    async def _look(self) -> None:
        try:
            found = in_words(await self._api.state())
        except Refusal as refusal:
            found = str(refusal)
        finally:
            self._under_way = False
        text = f"job {self._fl_name}: {found}"
        if text != self.state:
            self.state = text
            self.changed()


def in_words(answer: Answer) -> str:
    """Return an answer of ``OperatorApi.state`` in a few words, such as "CLUSTER_READY, 2 servers, 1 worker"."""
    nodes = answer.get("nodes", [])
    assert isinstance(nodes, list)
    roles = Counter(str(node["role"]).lower() for node in nodes)
    counts = [f"{count} {role}{'' if count == 1 else 's'}" for role, count in sorted(roles.items())]
    return ", ".join([str(answer.get("cluster_state", "state unknown")), *(counts or ["no node"])])
