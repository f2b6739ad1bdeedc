"""The scheduler's REST interface: a stateless window on the shared state.

Answers are compact JSON with keys in bytewise order, ``code`` is the string "0" or "1", the reason phrase is
``Client``, and a failure is a 400 typed text/html, all as MindSpore Federated 0.1 answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet import defer
from twisted.logger import Logger
from twisted.web import resource, server

from fedcore.core.job import RunningState
from fedcore.errors import StoreError, StoreUnavailable
from fedcore.net.web import QuietSite, site_of
from fedcore.store.cluster_state import ClusterState, Node, current_instance
from fedcore.store.redis import Redis

NO_STORE = "Failed to access the cache server. Please retry later."
NO_STATE = "Failed to get cluster state because of some inner error."
NO_NODES = "Failed to get nodes because of some inner error. Please retry later."
_STATES = {
    RunningState.RUNNING: "CLUSTER_READY",
    RunningState.DISABLE: "CLUSTER_DISABLE",
    RunningState.FINISH: "CLUSTER_FINISH",
}


def no_cluster(fl_name: str) -> str:
    """Text for a job that nobody has started."""
    return f"Cannot find cluster info for {fl_name}"


class Refusal(Exception):
    """An operation cannot be done; the text goes to the operator."""


def dump(values: dict[str, object]) -> bytes:
    """Write JSON as the original does."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class OperatorApi:
    """What the routes do."""

    def __init__(self, redis: Redis, fl_name: str, global_window_ms: int) -> None:
        self._redis = redis
        self._fl_name = fl_name
        self._global_window_ms = global_window_ms

    async def state(self) -> dict[str, object]:
        """State of the cluster and its living nodes.

        Raises:
            Refusal: Redis cannot be reached or knows no such job.
        """
        cluster = await self._cluster()
        try:
            snapshot = await cluster.read()
            running = RunningState.RUNNING if snapshot is None else snapshot.iteration.running
        except (StoreError, ValueError) as error:
            raise Refusal(NO_STATE) from error
        try:
            nodes = [*await cluster.nodes("server"), *await cluster.nodes("worker")]
        except StoreError as error:
            raise Refusal(NO_NODES) from error
        answer: dict[str, object] = {"code": "0", "message": "Get cluster state successful."}
        if running in _STATES:
            answer["cluster_state"] = _STATES[running]
        if nodes:
            answer["nodes"] = [_describe(node) for node in nodes]
        return answer

    async def _cluster(self) -> ClusterState:
        try:
            instance = await current_instance(self._redis, self._fl_name)
            if instance is None:
                raise Refusal(no_cluster(self._fl_name))
            cluster = ClusterState(self._redis, self._fl_name, instance, self._global_window_ms)
            if await cluster.hyper_parameters() is None:
                raise Refusal(no_cluster(self._fl_name))
        except StoreUnavailable as error:
            raise Refusal(NO_STORE) from error
        return cluster


def _describe(node: Node) -> dict[str, str]:
    address = node.tcp_address if node.role == "server" else ""
    return {"node_id": node.node_id, "role": node.role.upper(), "tcp_address": address}


def operator_site(api: OperatorApi) -> QuietSite:
    """Build the listener of the scheduler."""
    return site_of({b"state": _Operation(api.state)})


class _Operation(resource.Resource):
    """One path; any method will do, as in the original."""

    isLeaf = True
    log = Logger()

    def __init__(self, operation: Callable[[], Coroutine[Any, Any, dict[str, object]]]) -> None:
        super().__init__()
        self._operation = operation

    def render(self, request: server.Request) -> int:
        if request.postpath:  # a path exactly as given, nothing below it
            request.setResponseCode(404)
            request.finish()
            return server.NOT_DONE_YET
        gone: list[bool] = []
        request.notifyFinish().addErrback(lambda _: gone.append(True))
        work = defer.Deferred.fromCoroutine(self._answer(request, gone))
        work.addErrback(lambda failure: self.log.failure("an operator request failed", failure))
        return server.NOT_DONE_YET

    async def _answer(self, request: server.Request, gone: list[bool]) -> None:
        try:
            body = dump(await self._operation())
            status, content_type = 200, "application/json"
        except Refusal as refusal:
            body = dump({"code": "1", "error_message": str(refusal)})
            status, content_type = 400, "text/html; charset=ISO-8859-1"
        if gone:
            return
        request.setResponseCode(status, b"Client")
        request.setHeader("Content-Type", content_type)
        request.setHeader("Content-Length", str(len(body)))
        request.write(body)
        request.finish()
