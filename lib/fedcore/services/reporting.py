"""What operators and callbacks hear of the iterations: metrics, one log record each, events in the journal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from twisted.logger import Logger

from fedcore.core.iteration import Iteration, Phase, Policy
from fedcore.core.streak import Streak, follow
from fedcore.ledger.layout import Totals
from fedcore.observe.journal import Journal
from fedcore.observe.metrics import ServerMetrics
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


class Reporter:
    """Tells what happens to iterations.

    Attributes:
        on_iteration_end: called after each iteration, valid or not.
    """

    log = Logger()

    def __init__(self, metrics: ServerMetrics, journal: Journal, failure_limit: int) -> None:
        """Report to ``metrics`` and ``journal``; so many failed iterations in a row are an alarm."""
        self.on_iteration_end: list[Callable[[IterationEnd], None]] = []
        self._metrics = metrics
        self._journal = journal
        self._streak = Streak(failure_limit)
        metrics.show_phase(Phase.COLLECTING)

    def policy(self, policy: Policy) -> None:
        """Tell the numbers that rule iterations from now on."""
        self._metrics.quorums.labels("startFLJob").set(policy.start_threshold)
        self._metrics.quorums.labels("updateModel").set(policy.update_threshold)

    def changed(self, before: Iteration, now: Iteration) -> None:
        """Show the state of the current iteration."""
        self._metrics.iteration.set(now.number)
        self._metrics.counts.labels("startFLJob").set(now.selected)
        self._metrics.counts.labels("updateModel").set(now.uploaded)
        self._metrics.attempt.set(now.attempt)
        if now.phase is not before.phase or now.number != before.number:
            self._metrics.show_phase(now.phase)

    def ended(self, end: IterationEnd, publication_s: float | None) -> None:
        """Tell that an iteration has ended, so many seconds after its last update reached this server."""
        if end.valid and end.seconds is not None:
            self._metrics.iteration_duration.observe(end.seconds)
            if publication_s is not None:
                self._metrics.publication.observe(publication_s)
        self._metrics.iterations.labels("valid" if end.valid else "failed").inc()
        report = self.log.info if end.valid else self.log.warn
        report(
            "iteration {iteration} ended: {result}",
            iteration=end.number,
            valid=end.valid,
            result=end.result,
            updates=end.updates,
            seconds=end.seconds,
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
