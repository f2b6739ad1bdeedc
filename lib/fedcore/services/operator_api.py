"""What operators may ask of the scheduler and do to a job: a stateless window on the shared state.

The texts are those of MindSpore Federated 0.1. An operation returns the body of its answer without the code, or
raises Refusal with the text for the operator. No operation waits longer than PATIENCE_S for one look at Redis, or
one change of it. How answers travel is in ``operator_http``.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from twisted.internet import defer
from twisted.logger import Logger

from fedcore.config.hyper import BadRequest, merge, parse_json, parse_object, parse_shared
from fedcore.core.job import RunningState
from fedcore.errors import StoreError
from fedcore.store import instances, keys
from fedcore.store.cluster_state import ClusterState, Node, current_instance
from fedcore.store.instances import Disabling, Enabling
from fedcore.store.redis import Redis

PATIENCE_S = 4.0
BODY_LIMIT = 100 << 20  # bytes; the original's
KEPT_BODY = 1 << 20  # bytes of a body that are kept and read; JSON may take thirty times its length in memory

NO_STORE = "Failed to access the cache server. Please retry later."
NO_STATE = "Failed to get cluster state because of some inner error."
NO_NODES = "Failed to get nodes because of some inner error. Please retry later."
NO_QUERY = "Failed to query instance because of some inner error. Please retry later."
NO_NEW_INSTANCE = "Failed to new instance because of some inner error. Please retry later."
NO_ENABLING = "Failed to enable cluster because of some inner error. Please retry later."
NO_DISABLING = "Failed to disable cluster because of some inner error. Please retry later."
EMPTY_BODY = "The post message size is invalid."
LONG_BODY = "The post message is bigger than 100mb."
_NOT_NEW = "New instance failed: "

_STATES = {
    RunningState.RUNNING: "CLUSTER_READY",
    RunningState.DISABLE: "CLUSTER_DISABLE",
    RunningState.FINISH: "CLUSTER_FINISH",
}
_NOT_ENABLED = {
    Enabling.ALREADY: "The instance has already been enabled.",
    Enabling.MISSING: "The instance has already been enabled.",  # a missing state counts as running
    Enabling.COMPLETED: "The instance is completed and cannot be enabled.",
    Enabling.FINISHED: "The instance is completed and cannot be enabled.",
}
_NOT_DISABLED = {
    Disabling.ALREADY: "The instance has already been disabled.",
    Disabling.MARKED: "The instance has already been disabled.",
    Disabling.COMPLETED: "The instance is completed and cannot be disabled.",
    Disabling.MISSING: NO_DISABLING,  # a server writes the state again within a second
}

T = TypeVar("T")
Answer = dict[str, object]


def no_cluster(fl_name: str) -> str:
    """Text for a job that nobody has started."""
    return f"Cannot find cluster info for {fl_name}"


class Refusal(Exception):
    """An operation cannot be done; the text goes to the operator."""


@dataclass(frozen=True, slots=True)
class Body:
    """What came with a request.

    Attributes:
        length: bytes.
        content: the bytes, if there are no more than KEPT_BODY of them.
    """

    length: int
    content: bytes


def requested_values(body: Body) -> object:
    """Read the body of newInstance as JSON.

    Raises:
        Refusal: it is empty, too long or not JSON.
    """
    if body.length == 0:
        raise Refusal(EMPTY_BODY)
    if body.length > BODY_LIMIT:
        raise Refusal(LONG_BODY)
    if body.length > KEPT_BODY:
        raise Refusal(f"Illegal JSON format:{body.length} bytes are more than hyper-parameters can take")
    try:
        return parse_json(body.content)
    except ValueError as fault:
        raise Refusal(f"Illegal JSON format:{fault}") from fault


class OperatorApi:
    """What the routes do."""

    log = Logger()

    def __init__(
        self,
        redis: Redis,
        fl_name: str,
        global_window_ms: int,
        *,
        clock: Any,
        now: Callable[[], datetime],
    ) -> None:
        """Look at a job.

        Args:
            redis: the connection.
            fl_name: the job.
            global_window_ms: sets the lifetime of keys whose hyper-parameters are not at hand.
            clock: Twisted's, for the patience.
            now: the local wall clock, for the names of instances.
        """
        self._redis = redis
        self._fl_name = fl_name
        self._global_window_ms = global_window_ms
        self._clock = clock
        self._now = now

    async def state(self) -> Answer:
        """State of the cluster and its living nodes."""
        return await self._soon(self._state())

    async def query_instance(self) -> Answer:
        """Hyper-parameters of the current instance and its living nodes."""
        return await self._soon(self._query_instance())

    async def enable(self) -> Answer:
        """Let a suspended job go on."""
        return await self._soon(self._enable())

    async def disable(self) -> Answer:
        """Suspend a job."""
        return await self._soon(self._disable())

    async def new_instance(self, body: Body) -> Answer:
        """Start the job anew, with the hyper-parameters that the body names in place of the current ones."""
        requested = requested_values(body)
        end = self._clock.seconds() + PATIENCE_S
        while self._clock.seconds() < end:
            try:
                current, merged = await self._soon(self._merged(requested))
            except Refusal as refusal:
                raise Refusal(_NOT_NEW + str(refusal)) from refusal.__cause__
            name = instances.instance_name_at(self._now())
            if await self._soon(self._replace(current, name, merged)):
                self.log.info("an operator started the new instance {instance}", instance=name)
                return {"message": "Start new instance successful."}
        raise Refusal(NO_NEW_INSTANCE)  # others were faster again and again

    async def _state(self) -> Answer:
        instance, _ = await self._current()
        cluster = self._cluster(instance)
        running = await self._running(cluster)
        answer: Answer = {"message": "Get cluster state successful.", **await self._nodes(cluster)}
        if running in _STATES:
            answer["cluster_state"] = _STATES[running]
        return answer

    async def _query_instance(self) -> Answer:
        instance, text = await self._current()
        try:
            values = parse_object(text)
        except StoreError as error:
            raise Refusal(NO_QUERY) from error
        nodes = await self._nodes(self._cluster(instance))
        return {"message": "Query Instance successful.", "result": values, **nodes}

    async def _enable(self) -> Answer:
        instance, text = await self._current()
        await self._running(self._cluster(instance))
        try:
            last = parse_shared(text)["fl_iteration_num"]
            if not isinstance(last, int):
                raise StoreError(f"fl_iteration_num is {last!r} in the cluster")
            outcome = await instances.enable(self._redis, self._fl_name, instance, last, self._ttl())
        except StoreError as error:
            raise self._failed(NO_ENABLING) from error
        if outcome in _NOT_ENABLED:
            raise Refusal(_NOT_ENABLED[outcome])
        self.log.info("an operator enabled the instance {instance}", instance=instance)
        return {"message": "start enabling FL-Server successful."}

    async def _disable(self) -> Answer:
        instance, _ = await self._current()
        await self._running(self._cluster(instance))
        try:
            outcome = await instances.disable(self._redis, self._fl_name, instance, self._ttl())
        except StoreError as error:
            raise self._failed(NO_DISABLING) from error
        if outcome in _NOT_DISABLED:
            raise Refusal(_NOT_DISABLED[outcome])
        self.log.info("an operator disabled the instance {instance}", instance=instance)
        return {"message": "start disabling FL-Server successful."}

    async def _merged(self, requested: object) -> tuple[str, dict[str, object]]:
        """The current instance, and the hyper-parameters of the one that shall follow it."""
        instance, text = await self._current("Failed to get current hyper params config")
        try:
            current = parse_shared(text)
        except StoreError as error:
            raise Refusal("Failed to parse current hyper params config") from error
        try:
            return instance, merge(current, requested)
        except BadRequest as fault:
            raise Refusal(str(fault)) from None

    async def _replace(self, current: str, name: str, values: dict[str, object]) -> bool:
        window = values["global_iteration_time_window"]
        ttl = keys.job_ttl(window) if isinstance(window, int) else self._ttl()
        try:
            return await instances.new_instance(self._redis, self._fl_name, current, name, values, ttl)
        except StoreError as error:
            raise self._failed(NO_NEW_INSTANCE) from error

    async def _current(self, unreadable: str = NO_STORE) -> tuple[str, bytes]:
        """The current instance and its hyper-parameters.

        Raises:
            Refusal: Redis cannot be reached or knows no such job; ``unreadable`` if it refuses to show the latter.
        """
        try:
            instance = await current_instance(self._redis, self._fl_name)
        except (StoreError, ValueError) as error:
            raise Refusal(NO_STORE) from error
        if not instance:
            raise Refusal(no_cluster(self._fl_name))
        try:
            text = await instances.hyper_parameters_text(self._redis, self._fl_name, instance)
        except StoreError as error:
            raise self._failed(unreadable) from error
        if text is None:
            raise Refusal(no_cluster(self._fl_name))
        return instance, text

    async def _running(self, cluster: ClusterState) -> RunningState:
        try:
            snapshot = (await cluster.read()).snapshot
        except (StoreError, ValueError) as error:
            raise self._failed(NO_STATE) from error
        return RunningState.RUNNING if snapshot is None else snapshot.iteration.running

    async def _nodes(self, cluster: ClusterState) -> Answer:
        """The entry of the living nodes; none if there is no node."""
        try:
            nodes = [*await cluster.nodes("server"), *await cluster.nodes("worker")]
        except (StoreError, ValueError) as error:
            raise self._failed(NO_NODES) from error
        return {"nodes": [_describe(node) for node in nodes]} if nodes else {}

    def _cluster(self, instance: str) -> ClusterState:
        return ClusterState(self._redis, self._fl_name, instance, self._global_window_ms)

    def _ttl(self) -> int:
        return keys.job_ttl(self._global_window_ms)

    def _failed(self, text: str) -> Refusal:
        """The refusal after a failed step: Redis has gone, or it is there and ``text`` says what went wrong."""
        return Refusal(text if self._redis.available else NO_STORE)

    async def _soon(self, work: Coroutine[Any, Any, T]) -> T:
        """Await work, but give up waiting after PATIENCE_S.

        The work itself goes on: what has been sent to Redis cannot be called back, and its reply has to be read.

        Raises:
            Refusal: it took too long, or as the work does.
        """
        outcome: defer.Deferred[T] = defer.Deferred()
        impatience = self._clock.callLater(PATIENCE_S, outcome.errback, Refusal(NO_STORE))

        def done(result: Any) -> None:
            if impatience.active():
                impatience.cancel()
                outcome.callback(result)

        defer.Deferred.fromCoroutine(work).addBoth(done)
        return await outcome


def _describe(node: Node) -> dict[str, str]:
    address = node.tcp_address if node.role == "server" else ""
    return {"node_id": node.node_id, "role": node.role.upper(), "tcp_address": address}
