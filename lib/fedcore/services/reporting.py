"""What is told of the iterations: metrics, one log record each, events in the journal, callbacks.

An iteration is told of once its evaluation is there, and after those before it; nothing else waits for that.
``Course`` remembers meanwhile what is to be told at an iteration's end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from twisted.internet import defer
from twisted.logger import Logger

from fedcore.core.iteration import Iteration, Phase, Policy
from fedcore.core.streak import Streak, follow
from fedcore.ledger.layout import Totals
from fedcore.observe.journal import Journal
from fedcore.observe.metrics import ServerMetrics
from fedcore.services.evaluation import Evaluation
from fedcore.store.cluster_state import ClusterState
from fedcore.wire.image import ModelImage


@dataclass(frozen=True, slots=True)
class IterationEnd:
    """How an iteration ended, for those who follow the training.

    Attributes:
        fl_name: the job.
        instance: its instance.
        number: the iteration that ended.
        valid: whether it made a model.
        result: why it ended.
        model: the model that now counts.
        checkpoint: file that holds the model, or None if this server wrote none.
        totals: what is known of the updates in the model, None if another server made it or there is none.
        updates: updates that the iteration had counted, as far as this server knows.
        seconds: from the first startFLJob to now, or None if nobody came.
        evaluation: score of the clients' vectors, 0.0 if there are too few; None if that is off, failed, or for another
            server to tell.
        metrics: loss and accuracy that a worker told of the model, None if none did, or this server has not heard.
    """

    fl_name: str
    instance: str
    number: int
    valid: bool
    result: str
    model: ModelImage
    checkpoint: Path | None
    totals: Totals | None
    updates: int
    seconds: float | None
    evaluation: float | None = None
    metrics: tuple[float, float] | None = None


class Course:
    """How the current iteration goes, and how the one before it went; times are seconds of the server's clock.

    Attributes:
        filled: when all places of the current iteration were taken, or None.
        updates_before: updates that the iteration before had counted.
        metrics_before: what a worker told of the iteration before, or None.
    """

    def __init__(self) -> None:
        self.filled: float | None = None
        self.updates_before = 0
        self.metrics_before: tuple[float, float] | None = None
        self._started_before: float | None = None  # first startFLJob of the iteration before
        self._last_upload: float | None = None

    def uploaded(self, now: float) -> None:
        """Take notice of an update that was accepted here."""
        self._last_upload = now

    def changed(self, before: Iteration, after: Iteration, places: int, now: float) -> None:
        """Take notice of a change of the iteration, which has so many places."""
        if after.number != before.number:
            self._started_before, self.updates_before = before.started, before.uploaded
            self.metrics_before = before.metrics
            self.filled = None
        if self.filled is None and after.selected >= places:
            self.filled = now

    def seconds_until(self, now: float) -> float | None:
        """Return how long the iteration before took, None if nobody came."""
        return None if self._started_before is None else now - self._started_before

    def end(self, now: float) -> float | None:
        """Close the account of the iteration before; return the seconds since its last update reached this server."""
        last, self._last_upload = self._last_upload, None
        return None if last is None else now - last


class Reporter:
    """Tells what happens to iterations.

    Attributes:
        on_iteration_end: called after each iteration, valid or not.
    """

    log = Logger()

    def __init__(
        self,
        metrics: ServerMetrics,
        journal: Journal,
        failure_limit: int,
        evaluation: Evaluation | None = None,
    ) -> None:
        """Report to ``metrics`` and ``journal``; so many failed iterations in a row are an alarm."""
        self.on_iteration_end: list[Callable[[IterationEnd], None]] = []
        self._metrics = metrics
        self._journal = journal
        self._streak = Streak(failure_limit)
        self._evaluation = evaluation
        self._turn = defer.DeferredLock()  # iterations are told of in their order
        self._cipher_rounds: tuple[str, ...] = ()
        metrics.show_phase(Phase.COLLECTING)

    def policy(self, policy: Policy) -> None:
        """Tell the numbers that rule iterations from now on."""
        self._metrics.quorums.labels("startFLJob").set(policy.start_threshold)
        self._metrics.quorums.labels("updateModel").set(policy.update_threshold)
        for name, threshold in policy.cipher_rounds:
            self._metrics.quorums.labels(name).set(threshold)
        self._cipher_rounds = tuple(name for name, _ in policy.cipher_rounds)

    def changed(self, before: Iteration, now: Iteration) -> None:
        """Show the state of the current iteration."""
        self._metrics.iteration.set(now.number)
        self._metrics.counts.labels("startFLJob").set(now.selected)
        self._metrics.counts.labels("updateModel").set(now.uploaded)
        for name in self._cipher_rounds:
            known = now.round_named(name)
            self._metrics.counts.labels(name).set(0 if known is None else known.count)
        self._metrics.attempt.set(now.attempt)
        if now.phase is not before.phase or now.number != before.number:
            self._metrics.show_phase(now.phase)

    def ending(self, cluster: ClusterState, number: int) -> None:
        """Take notice that this server is about to end an iteration: its evaluation is this server's to tell.

        To be called before the shared state is asked to end it, in the same turn of the reactor: so the vectors of
        the next iteration's clients come later.
        """
        if self._evaluation is not None:
            self._evaluation.begin(cluster, number)

    def not_ended(self) -> None:
        """Take notice that somebody else has ended that iteration."""
        if self._evaluation is not None:
            self._evaluation.forget()

    def ended(self, end: IterationEnd, publication_s: float | None) -> None:
        """Tell that an iteration has ended, so many seconds after its last update reached this server."""
        if end.valid and end.seconds is not None:
            self._metrics.iteration_duration.observe(end.seconds)
            if publication_s is not None:
                self._metrics.publication.observe(publication_s)
        self._metrics.iterations.labels("valid" if end.valid else "failed").inc()
        told = defer.Deferred.fromCoroutine(self._evaluate_and_tell(end))
        told.addErrback(lambda failure: self.log.failure("the end of an iteration cannot be told", failure))

    async def _evaluate_and_tell(self, end: IterationEnd) -> None:
        evaluation = self._evaluation
        score = None if evaluation is None else evaluation.take(end.number)
        await self._turn.acquire()
        try:
            if evaluation is not None:
                value = None if score is None else await score
                self._metrics.show_evaluation(evaluation.eval_type, value)
                end = replace(end, evaluation=value)
            self._tell(end)
        finally:
            self._turn.release()

    def _tell(self, end: IterationEnd) -> None:
        report = self.log.info if end.valid else self.log.warn
        told = {} if end.evaluation is None else {"evaluation": end.evaluation}
        if end.valid and end.metrics is not None:
            told |= dict(zip(("loss", "accuracy"), end.metrics, strict=True))
            self._metrics.show_worker_metrics(*end.metrics)
        report(
            "iteration {iteration} ended: {result}",
            iteration=end.number,
            valid=end.valid,
            result=end.result,
            updates=end.updates,
            seconds=end.seconds,
            **told,
        )
        self._streak, run = follow(self._streak, end.valid)
        if run is not None:
            self._journal.failed_continuously(run)
            self.log.error("{times} iterations in a row made no model", times=run)
        for callback in self.on_iteration_end:
            try:
                callback(end)
            except Exception:
                self.log.failure(
                    "a callback failed at the end of iteration {iteration}", iteration=end.number
                )

    def left_out(self, number: int, attempt: int, updates: int, rebased: bool, node_id: str) -> None:
        """Tell that updates of this server came back after a loss of Redis' data, and were not taken."""
        if rebased:
            reason = "since Redis lost data, the iteration goes on from another model than theirs"
        else:
            reason = "they came back too late after Redis had lost data"
        self._metrics.updates_lost.inc(updates)
        self._journal.updates_lost(number, attempt, updates, node_id, reason)
        self.log.error(
            "{updates} accepted updates of iteration {iteration} are lost: {reason}",
            updates=updates,
            iteration=number,
            attempt=attempt,
            reason=reason,
        )

    def lost(self, number: int, attempt: int, updates: int, owner: str) -> None:
        """Tell that counted updates are lost."""
        self._metrics.updates_lost.inc(updates)
        reason = "the server is gone, and so is its ledger"
        self._journal.updates_lost(number, attempt, updates, owner, reason)
        self.log.error(
            "{updates} accepted updates of iteration {iteration} are lost with {owner}; their clients may come again",
            updates=updates,
            iteration=number,
            attempt=attempt,
            owner=owner,
        )
