"""Evaluation without labels: what of the clients' vectors is kept, and the score at each iteration's end.

The vectors of the last ``cluster_client_num`` clients that sent one with a counted update are in Redis, one of each
client: they stay over iterations until newer clients' push them out. The server that ends an iteration reads them and
scores them, in a thread if they are many, while the next iteration runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from twisted.internet import defer, threads
from twisted.logger import Logger

from fedcore.aggregation import clustering
from fedcore.aggregation.clustering import Score
from fedcore.config import EvalType, Settings
from fedcore.errors import StoreError
from fedcore.store.cluster_state import ClusterState
from fedcore.wire.messages import UnsupervisedEvalItems

MOST_VALUES = 1 << 12  # of one client: many more than the classes of a model
MOST_KEPT_VALUES = 1 << 22  # of all clients: 16 MiB, what a job may take of Redis for this
INLINE_VALUES = 1 << 16  # steps of a silhouette that take about as long as a hop to a thread and back
MEASURES: dict[EvalType, clustering.Measure] = {
    EvalType.SILHOUETTE_SCORE: clustering.silhouette,
    EvalType.CALINSKI_HARABASZ_SCORE: clustering.calinski_harabasz,
    EvalType.DAVIES_BOULDIN_SCORE: clustering.davies_bouldin,
}


def longest_vector(clients: int) -> int:
    """Return how many values one client's vector may have, if those of so many clients (>= 1) are kept; >= 1."""
    return max(1, min(MOST_VALUES, MOST_KEPT_VALUES // clients))


def vector_of(items: UnsupervisedEvalItems, longest: int) -> bytes | None:
    """Return all vectors of an update as one, as the shared state holds it: float32, little-endian.

    Returns:
        b"" if there is no value in them, None if there are more than ``longest``.
    """
    vectors = [item.eval_data for item in items.eval_items or () if item.eval_data is not None]
    if sum(vector.size for vector in vectors) > longest:
        return None
    return b"".join(vector.astype("<f4", copy=False).tobytes() for vector in vectors)


def evaluation_of(settings: Settings, reactor: Any) -> Evaluation | None:
    """Return what scores the vectors as the settings say, None if they say nothing."""
    evaluation = settings.unsupervised
    if evaluation.eval_type is EvalType.NOT_EVAL:
        return None
    return Evaluation(evaluation.eval_type, evaluation.cluster_client_num, reactor)


class Evaluation:
    """Scores the clients' vectors for the iterations that this server ends.

    Attributes:
        eval_type: the score.
        clients: how many clients' vectors are kept and scored.
    """

    log = Logger()

    def __init__(self, eval_type: EvalType, clients: int, reactor: Any) -> None:
        """Score the vectors of so many clients; fewer have the score 0."""
        self.eval_type = eval_type
        self._measure = MEASURES[eval_type]
        self.clients = clients
        self._reactor = reactor
        self._busy = False
        self._number = 0
        self._score: defer.Deferred[float | None] | None = None  # of that iteration

    def begin(self, cluster: ClusterState, number: int) -> None:
        """Begin to score the vectors that are there now, for an iteration that ends.

        One score is worked on at a time. An iteration that ends meanwhile has none: scores must not pile up.
        """
        self._number, self._score = number, None
        if self._busy:
            self.log.warn(
                "iteration {iteration} is not evaluated: the score of an earlier one takes too long; "
                "lower unsupervised.cluster_client_num",
                iteration=number,
            )
            return
        self._busy = True
        self._score = defer.Deferred.fromCoroutine(self._evaluate(cluster, number))

    def forget(self) -> None:
        """Drop what was begun."""
        self._score = None

    def take(self, number: int) -> defer.Deferred[float | None] | None:
        """Return the score of an iteration, to come; None if it was not begun here."""
        score, self._score = self._score, None
        return score if number == self._number else None

    async def _evaluate(self, cluster: ClusterState, number: int) -> float | None:
        try:
            score = await self._score_of(await cluster.vectors())
        except StoreError as error:
            self.log.warn(
                "iteration {iteration} is not evaluated: {error}", iteration=number, error=str(error)
            )
            return None
        except Exception:
            self.log.failure("iteration {iteration} is not evaluated", iteration=number)
            return None
        finally:
            self._busy = False
        if score.left_out:
            self.log.warn(
                "the evaluation vectors of {left_out} of {vectors} clients have another length than most, and do not "
                "count",
                left_out=score.left_out,
                vectors=score.left_out + score.vectors,
                iteration=number,
            )
        return score.value

    async def _score_of(self, packed: Sequence[bytes]) -> Score:
        """Score vectors as the shared state holds them."""
        if len(packed) < self.clients:
            return Score(0.0, len(packed), 0)

        def work() -> Score:
            vectors = [np.frombuffer(vector, "<f4") for vector in packed]
            return clustering.score(self._measure, vectors)

        if len(packed) * sum(map(len, packed)) // 4 <= INLINE_VALUES:
            return work()
        score: Score = await threads.deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work)
        return score
