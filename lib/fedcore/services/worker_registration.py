"""Keeps a worker on the list of its job's workers, whatever becomes of the job's instance."""

from __future__ import annotations

from typing import Any

from twisted.application.service import Service
from twisted.internet import defer, task
from twisted.logger import Logger

from fedcore.errors import StoreError
from fedcore.store import workers
from fedcore.store.keys import job_ttl
from fedcore.store.redis import Redis

PERIOD_S = 1.0
PATIENCE_S = 60.0  # between two lines that there is no instance yet


class WorkerRegistration(Service):
    """Registers a worker every second with the job's current instance, and takes it off the list at the end.

    MindSpore Federated 0.1 gives up after 900 s without an instance; here the worker waits, says so, and is not ready.

    Attributes:
        instance: the one that the worker is registered with, or was last; "" before the first.
        registered: whether the last registration went well.
    """

    log = Logger()

    def __init__(
        self, redis: Redis, fl_name: str, worker_id: str, global_window_ms: int, reactor: Any
    ) -> None:
        """Speak for ``worker_id``; ``global_window_ms`` sets the lifetime of the list."""
        self.instance = ""
        self.registered = False
        self._redis = redis
        self._fl_name = fl_name
        self._worker_id = worker_id
        self._ttl = job_ttl(global_window_ms)
        self._reactor = reactor
        self._say_again = float("-inf")
        self._loop = task.LoopingCall(self.beat)
        self._loop.clock = reactor

    def startService(self) -> None:
        super().startService()
        self._loop.start(PERIOD_S)

    @defer.inlineCallbacks
    def stopService(self) -> Any:
        super().stopService()
        self._loop.stop()
        yield defer.Deferred.fromCoroutine(self._leave(self.instance))

    def beat(self) -> defer.Deferred[None]:
        """Renew the entry now."""
        return defer.Deferred.fromCoroutine(self._beat())

    async def _beat(self) -> None:
        try:
            current = await self._register(self.instance)
            if current not in ("", self.instance):
                before, self.instance = self.instance, current
                await self._register(current)  # in case it is yet another one by now, the next beat is near
                self.log.info(
                    "registered with instance {instance} as {worker}",
                    instance=current,
                    worker=self._worker_id,
                    before=before or None,
                )
                await self._leave(before)
            self.registered = current != ""
        except StoreError:
            self.registered = False
            return  # counted by the connection; the next beat is a second away
        if not current and self._reactor.seconds() >= self._say_again:
            self._say_again = self._reactor.seconds() + PATIENCE_S
            self.log.info("waiting for a server to make an instance of {name}", name=self._fl_name)

    async def _register(self, instance: str) -> str:
        return await workers.register(self._redis, self._fl_name, instance, self._worker_id, self._ttl)

    async def _leave(self, instance: str) -> None:
        if instance:
            try:
                await workers.deregister(self._redis, self._fl_name, instance, self._worker_id)
            except StoreError:
                return  # the entry expires by itself
