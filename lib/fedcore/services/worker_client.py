"""What a worker asks of servers: the three rounds of hybrid training, over the node channel.

Rules kept here:

* The living servers of the job's current instance are asked one after the other, in the order of their node ids, until
  one answers with the round's table. One that cannot be reached in time, refuses, answers nonsense or has only words of
  the gate ("safemode", "disabled or finished") is passed over. The original asks no second server.
* What is told of a failure is whether a server may have done what it was asked: a push may be repeated, for its second
  answer says so, but its sender must know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

from twisted.logger import Logger, LogLevel

from fedcore.core.admission import DISABLED_OR_FINISHED, SAFEMODE
from fedcore.core.worker import Unavailable, Unreachable
from fedcore.errors import MalformedRequest, PeerError, StoreError
from fedcore.net.node_client import NodeClient, PeerRefused, PeerUnreachable
from fedcore.observe.metrics import OUTCOMES, REFUSED, UNAVAILABLE, UNREACHABLE, WorkerMetrics
from fedcore.store.cluster_state import ClusterState, Node
from fedcore.wire import codec
from fedcore.wire.messages import ResponsePullWeight, ResponsePushMetrics, ResponsePushWeight
from fedcore.wire.node import Command

_GATE = {text.encode(): text for text in (SAFEMODE, DISABLED_OR_FINISHED)}
_LONGEST_GATE = max(map(len, _GATE))
_NOT_ALLOWED = "fedcore.node.allow"  # in what servers say to hosts that they do not serve
_ALLOW = "add this worker's address to fedcore.node.allow in the servers' YAML, and start them again"

R = TypeVar("R", ResponsePullWeight, ResponsePushWeight, ResponsePushMetrics)


class Round(IntEnum):
    """The worker's rounds; the values are the user_cmd of a ROUND_REQUEST."""

    pullWeight = 0
    pushWeight = 1
    pushMetrics = 5


@dataclass(frozen=True, slots=True)
class Answer(Generic[R]):
    """A round's table.

    Attributes:
        table: its arrays are views of what has arrived, read-only.
        doubt: whether a server that was asked before may have done what it was asked.
    """

    table: R
    doubt: bool


class WorkerClient:
    """Asks the servers of a job.

    Attributes:
        problem: why no server has answered the last round, "" if one has.
    """

    log = Logger()

    def __init__(
        self,
        client: NodeClient,
        cluster: Callable[[], ClusterState | None],
        metrics: WorkerMetrics,
        timeout: float,
    ) -> None:
        """Prepare.

        Args:
            client: speaks for the worker.
            cluster: gives the job's current instance, None before it is known.
            metrics: counts the rounds.
            timeout: seconds for each server.
        """
        self.problem = "no server was asked yet"
        self._client = client
        self._cluster = cluster
        self._metrics = metrics
        self._timeout = timeout
        self._servers: list[Node] = []
        self._told: dict[str, str] = {}  # server -> what was last logged of it

    async def ask(
        self, round_: Round, request: bytes, table: type[R], iteration: int
    ) -> Answer[R] | Unavailable | Unreachable:
        """Ask one server after the other until one answers.

        Args:
            round_: which round.
            request: its table, encoded.
            table: class of the answer.
            iteration: number of the iteration, told in the frame's meta, too.
        """
        doubt, refused, words = False, False, ""
        servers = await self._living()
        self.problem = "" if servers else "the job has no living server"
        for server in servers:
            try:
                data = await self._ask_one(server, round_, request, iteration)
                if gate := _gate_words(data):
                    words = gate
                    self._pass_over(server, round_, words)
                    continue
                answer = codec.decode(table, data)
            except PeerError as error:
                doubt = doubt or _may_have_acted(error)
                refused = refused or isinstance(error, PeerRefused)
                self._pass_over(server, round_, _with_remedy(error))
                continue
            self.problem = ""
            self._told.pop(server.node_id, None)
            self._metrics.request(round_.name, OUTCOMES.get(answer.retcode, "failed"))
            return Answer(answer, doubt)
        outcome = UNAVAILABLE if words else REFUSED if refused else UNREACHABLE
        self._metrics.request(round_.name, outcome)
        return Unavailable(words, doubt) if words else Unreachable(doubt)

    async def _ask_one(
        self, server: Node, round_: Round, request: bytes, iteration: int
    ) -> bytes | memoryview:
        answer = await self._client.request(
            server.tcp_address,
            server.node_id,
            Command.ROUND_REQUEST,
            request,
            user_cmd=round_,
            iteration=iteration,
            timeout=self._timeout,
        )
        return answer.data

    async def _living(self) -> list[Node]:
        """Return the servers that live, or those that did when Redis could last be asked."""
        cluster = self._cluster()
        if cluster is not None:
            try:
                self._servers = await cluster.nodes("server")
            except (StoreError, ValueError):
                return self._servers
        living = {server.node_id for server in self._servers}
        self._told = {server: reason for server, reason in self._told.items() if server in living}
        return self._servers

    def _pass_over(self, server: Node, round_: Round, reason: str) -> None:
        """Say once why a server is of no use."""
        self.problem = f"{server.node_id}: {reason}"
        if self._told.get(server.node_id) != reason:
            self._told[server.node_id] = reason
            usual = reason == DISABLED_OR_FINISHED  # so every job ends
            self.log.emit(
                LogLevel.info if usual else LogLevel.warn,
                "{server} is no help in {round}: {reason}",
                server=server.node_id,
                round=round_.name,
                reason=reason,
            )


def _gate_words(data: bytes | memoryview) -> str | None:
    """Return the text of the gate that an answer is, None if it is none."""
    return _GATE.get(bytes(data)) if len(data) <= _LONGEST_GATE else None


def _with_remedy(error: PeerError) -> str:
    """Return why a server has refused, and what its operators can do if they have not allowed this worker."""
    if isinstance(error, PeerRefused) and _NOT_ALLOWED in str(error):
        return f"{error}: {_ALLOW}"
    return str(error)


def _may_have_acted(error: PeerError) -> bool:
    """Tell whether the server that this comes from may have done what it was asked."""
    if isinstance(error, PeerRefused):
        return False
    if isinstance(error, PeerUnreachable):
        return not error.refused
    return isinstance(error, MalformedRequest)
