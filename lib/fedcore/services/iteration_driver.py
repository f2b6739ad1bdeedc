"""Drives the iterations of one server: events in, ``core.iteration.step``, effects out.

The driver holds this server's copy of the iteration and performs effects one after another; while it does, events
wait in a queue. Every effect on the shared state is a compare-and-set. One that is lost, or whose outcome a broken
connection hides, is followed by a fresh look at the shared state, from which the machine goes on. A look once a
second repairs whatever was missed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from twisted.application.service import Service
from twisted.internet import defer, task, threads
from twisted.logger import Logger

from fedcore.aggregation import fedavg
from fedcore.aggregation.fedavg import Spans
from fedcore.core import iteration as core
from fedcore.core.iteration import Iteration, Phase, Policy
from fedcore.core.job import RunningState
from fedcore.errors import FedcoreError, StoreError, StoreUnavailable
from fedcore.ledger.layout import Epoch, Totals, sum_of
from fedcore.models import checkpoints
from fedcore.models.history import ModelHistory
from fedcore.observe.metrics import ServerMetrics
from fedcore.services.ledgers import LOSS_S, Ledgers
from fedcore.services.update_intake import UpdateIntake
from fedcore.store.cluster_state import ClusterState, Snapshot, claim_instance
from fedcore.store.keys import job_ttl
from fedcore.store.redis import Redis
from fedcore.wire.arrays import all_finite
from fedcore.wire.image import ImageTemplate, ModelImage

TICK_S = 1.0
_DIGEST = "digest"  # key of a checkpoint's metadata


@dataclass(frozen=True, slots=True)
class Job:
    """What a driver needs to know of its job.

    Attributes:
        fl_name: name of the job.
        policy: thresholds and windows.
        global_window_ms: lifetime of the keys follows from it.
        checkpoint_dir: where models are kept.
        node_id: this server.
        new_instance_name: made on the spot if the job has no instance yet.
        hyper_parameters: what this server's file says, for all to share.
    """

    fl_name: str
    policy: Policy
    global_window_ms: int
    checkpoint_dir: Path
    node_id: str
    new_instance_name: Callable[[], str]
    hyper_parameters: dict[str, object]


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
        checkpoint: file that holds the model, or None if this iteration wrote none.
        totals: what is known of the updates in the model; empty if it is not valid.
        seconds: from the first startFLJob to now, or None if nobody came.
    """

    fl_name: str
    instance: str
    number: int
    valid: bool
    result: str
    model: ModelImage
    checkpoint: Path | None
    totals: Totals
    seconds: float | None


@dataclass(frozen=True, slots=True)
class _Candidate:
    """The model that this server made for the current iteration."""

    number: int
    image: ModelImage
    totals: Totals
    checkpoint: Path | None = None


class IterationDriver(Service):
    """One server's part in the iterations of a job.

    Attributes:
        iteration: this server's copy of the current iteration.
        cluster: the shared state, None until the server has joined.
        models: the newest models.
        filled: seconds, when all places of the current iteration were taken, or None.
        typical: seconds that the last valid iteration took from then to its end, or None.
    """

    log = Logger()

    def __init__(
        self,
        job: Job,
        redis: Redis,
        ledgers: Ledgers,
        intake: UpdateIntake,
        models: ModelHistory,
        template: ImageTemplate,
        metrics: ServerMetrics,
        reactor: Any,
        wall_clock: Callable[[], datetime],
    ) -> None:
        """Drive ``job`` from the newest of ``models`` on."""
        self.job = job
        self.redis = redis
        self.models = models
        self.cluster: ClusterState | None = None
        self.iteration = Iteration(models.newest + 1)
        self.filled: float | None = None
        self.typical: float | None = None
        self.on_join: list[Callable[[], object]] = []
        self.on_iteration_end: list[Callable[[IterationEnd], None]] = []
        self._ledgers = ledgers
        self._intake = intake
        self._spans = Spans(template.layout)
        self._incomplete: tuple[int, float] | None = None  # iteration, and since when its sums are short
        self._template = template
        self._metrics = metrics
        self._reactor = reactor
        self._wall_clock = wall_clock
        self._events: deque[core.Event] = deque()
        self._effects: deque[core.Effect] = deque()
        self._busy = False
        self._joining = False
        self._guarding = False
        self._candidate: _Candidate | None = None
        self._waiting: list[defer.Deferred[None]] = []
        self._deadline: Any = None
        self._deadline_at = 0.0
        self._started: float | None = None  # first startFLJob of the iteration that is ending
        self._filled_before: float | None = None  # ``filled`` of that iteration
        self._last_upload: float | None = None
        metrics.quorums.labels("startFLJob").set(job.policy.start_threshold)
        metrics.quorums.labels("updateModel").set(job.policy.update_threshold)
        self._tick = task.LoopingCall(self._look_again)
        self._tick.clock = reactor

    def startService(self) -> None:
        super().startService()
        self._tick.start(TICK_S)
        self._run(self._join_when_connected())

    def stopService(self) -> None:
        super().stopService()
        self._tick.stop()
        self._arm_deadline(None)
        self._wake()

    # ---- what the routes ask

    def note(self, event: core.Event) -> None:
        """Take notice of an event."""
        self._events.append(event)
        if not self._busy:
            self._work()

    def upload_counted(self, number: int, count: int) -> None:
        """Take notice of an accepted update."""
        self._last_upload = self._reactor.seconds()
        self.note(core.UploadCounted(number, count))

    async def moved_on(self, number: int, seconds: float) -> bool:
        """Wait until another iteration than ``number`` is served, at most so many seconds; tell whether it is."""
        limit = self._reactor.seconds() + seconds
        while self.iteration.number == number and self.running and self._reactor.seconds() < limit:
            waiter: defer.Deferred[None] = defer.Deferred()
            waiter.addTimeout(limit - self._reactor.seconds(), self._reactor)
            self._waiting.append(waiter)
            try:
                await waiter
            except defer.TimeoutError:
                self._waiting.remove(waiter)
        return self.iteration.number != number

    async def store_back(self, seconds: float) -> bool:
        """Wait until the shared state can be reached, at most so many seconds; tell whether it can."""
        limit = self._reactor.seconds() + seconds
        while not self.joined and self.running and self._reactor.seconds() < limit:
            if self.redis.available:
                waiter: defer.Deferred[None] = defer.Deferred()
                self._waiting.append(waiter)
            else:
                waiter = defer.Deferred.fromCoroutine(self.redis.connected())
            waiter.addTimeout(limit - self._reactor.seconds(), self._reactor)
            try:
                await waiter
            except defer.TimeoutError:
                self._waiting = [other for other in self._waiting if other is not waiter]
        return self.joined

    @property
    def joined(self) -> bool:
        """Whether this server takes part in its job and can reach the shared state."""
        return self.cluster is not None and self.redis.available and self._ledgers.own is not None

    async def look(self) -> None:
        """Compare this server's copy with the shared state now, unless an effect is under way."""
        if not self._busy:
            await self._observe()

    # ---- the machine

    def _work(self) -> None:
        """Step through the queued events; the first effect makes the rest asynchronous."""
        while self._events and not self._effects:
            self._step(self._events.popleft())
        if self._effects:
            self._busy = True
            self._run(self._perform_all())

    def _step(self, event: core.Event) -> None:
        before = self.iteration
        self.iteration, effects = core.step(before, event, self._reactor.seconds(), self.job.policy)
        self._effects.extend(effects)
        if self.iteration != before:
            self._show(before)

    async def _perform_all(self) -> None:
        try:
            while self._effects:
                try:
                    event = await self._perform(self._effects[0])
                except StoreUnavailable:
                    await self.redis.connected()
                    event = await self._observed()
                self._effects.popleft()
                if event is not None:
                    self._step(event)
                while self._events and not self._effects:
                    self._step(self._events.popleft())
        finally:
            self._effects.clear()
            self._busy = False

    async def _perform(self, effect: core.Effect) -> core.Event | None:
        """Do what an effect asks; return the event that reports it, None if there is nothing to report."""
        cluster = self._joined_cluster()
        match effect:
            case core.Seal(number, attempt):
                done = await cluster.set_phase(number, attempt, Phase.COLLECTING, Phase.SEALED)
                return core.Sealed() if done else await self._observed()
            case core.ClaimReduction(number, attempt):
                if not await self._ledgers.hold_updates(cluster, number):
                    return None  # those who hold them make the model; their ledgers are adopted if they die
                token = {"token": self.job.node_id}
                done = await cluster.set_phase(number, attempt, Phase.SEALED, Phase.REDUCING, token)
                return core.ReductionClaimed() if done else await self._observed()
            case core.Reduce(number, attempt):
                return await self._reduce(cluster, number)
            case core.RecordCandidate(number, attempt, digest):
                fields = {"digest": digest}
                done = await cluster.set_phase(number, attempt, Phase.REDUCING, Phase.CANDIDATE, fields)
                return core.CandidateRecorded() if done else await self._observed()
            case core.MakeDurable(number):
                if self._candidate is None or self._candidate.number != number:
                    again = await self._reduce(cluster, number)
                    if again is None:
                        return None
                    if again != core.ModelReduced(self.iteration.digest):
                        return core.UpdatesLost()
                await self._save(number)
                return core.CandidateDurable()
            case core.Advance(number, attempt, success, result, finishes, phase):
                done = await cluster.advance(
                    number, attempt, success=success, result=result, finishes=finishes, phase=phase
                )
                return core.Advanced(success, result) if done else await self._observed()
            case core.Open():
                self._open(effect)
        return None

    async def _reduce(self, cluster: ClusterState, number: int) -> core.Event | None:
        """Make the model of all accepted updates, or say why there is none.

        While a ledger with counted updates is in nobody's hands, None: the next look at the shared state tries again.
        """
        try:
            own = await self._intake.seal()
        except FedcoreError as error:
            self.log.error(
                "the sum of iteration {iteration} is unusable: {error}", iteration=number, error=error
            )
            return core.ReductionFailed(core.aggregation_failed(number))
        await self._ledgers.adopt(cluster, self._epoch(), self.job.node_id)
        known = [*self._ledgers.adopted.values(), *([] if own is None else [own])]
        partials = sorted(known, key=lambda partial: partial.ledger_id)
        held = {partial.ledger_id: partial.totals.count for partial in partials if partial.totals.count}
        counted = await cluster.uploads_by_ledger(number)
        if counted != held:
            now = self._reactor.seconds()
            if self._incomplete is None or self._incomplete[0] != number:
                self._incomplete = (number, now)
            if not counted.keys() <= self._ledgers.in_hand and now - self._incomplete[1] < LOSS_S:
                return None
            self.log.error(
                "iteration {iteration} counted updates that no ledger here holds",
                iteration=number,
                held=sum(held.values()),
                counted=sum(counted.values()),
            )
            return core.ReductionFailed(core.server_exited(number))
        previous = self.models.newest_image.arrays
        image = await self._heavy(
            lambda: self._template.image(fedavg.mean_of(self._spans, partials, previous))
        )
        if not all(all_finite(values) for values in image.arrays.values()):
            return core.ReductionFailed(core.aggregation_failed(number))
        self._candidate = _Candidate(number, image, sum_of([partial.totals for partial in partials]))
        return core.ModelReduced(image.digest)

    async def _save(self, number: int) -> None:
        candidate = self._candidate
        assert candidate is not None and candidate.number == number
        layout = candidate.image.layout
        metadata = {
            "fl_name": self.job.fl_name,
            "instance": self._joined_cluster().keys.instance,
            _DIGEST: candidate.image.digest,
        }
        path = await self._heavy(
            lambda: checkpoints.save(
                self.job.checkpoint_dir,
                self.job.fl_name,
                number,
                candidate.image.shaped(),
                {weight.name for weight in layout if not weight.aggregated},
                metadata,
                self._wall_clock(),
            )
        )
        self._candidate = replace(candidate, checkpoint=path)

    async def _heavy(self, work: Callable[[], Any]) -> Any:
        """Run work that takes long for large models in a thread."""
        return await threads.deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work)

    def _open(self, effect: core.Open) -> None:
        """Serve the next iteration."""
        candidate, self._candidate = self._candidate, None
        made = effect.success and candidate is not None and candidate.number == effect.ended
        if made and candidate is not None:
            self.models.add(effect.ended, candidate.image)
        else:
            self.models.carry_over(effect.ended)
        self._intake.begin(self._epoch())
        ended = IterationEnd(
            self.job.fl_name,
            self._joined_cluster().keys.instance,
            effect.ended,
            effect.success,
            effect.result,
            self.models.newest_image,
            candidate.checkpoint if made and candidate else None,
            candidate.totals if made and candidate else Totals(),
            None if self._started is None else self._reactor.seconds() - self._started,
        )
        self._tell(ended)
        self._wake()

    def _tell(self, ended: IterationEnd) -> None:
        now = self._reactor.seconds()
        if ended.valid and ended.seconds is not None:
            if self._filled_before is not None:
                self.typical = now - self._filled_before
            self._metrics.iteration_duration.observe(ended.seconds)
            if self._last_upload is not None:
                self._metrics.publication.observe(now - self._last_upload)
        self._last_upload = None
        self._metrics.iterations.labels("valid" if ended.valid else "failed").inc()
        report = self.log.info if ended.valid else self.log.warn
        report(
            "iteration {iteration} ended: {result}",
            iteration=ended.number,
            valid=ended.valid,
            result=ended.result,
            updates=ended.totals.count,
            seconds=ended.seconds,
        )
        for callback in self.on_iteration_end:
            try:
                callback(ended)
            except Exception:
                self.log.failure(
                    "a callback failed at the end of iteration {iteration}", iteration=ended.number
                )

    # ---- the shared state

    async def _observe(self) -> None:
        seen = await self._observed()
        if seen is not None and not self._busy:
            self.note(seen)

    async def _observed(self) -> core.Event | None:
        """Look at the shared state; return what differs from this server's copy, None if nothing does."""
        cluster = self._joined_cluster()
        snapshot = await cluster.read()
        if snapshot is None:
            await self._restore(cluster)
            snapshot = await cluster.read()
        if snapshot is None:
            raise StoreUnavailable("Redis forgets the status as soon as it is written")
        seen = self._localise(snapshot)
        mine = snapshot.token == self.job.node_id or await self._inherits(cluster, snapshot)
        if self.iteration.changing or _differ(seen, self.iteration):
            return core.Observed(seen, mine, snapshot.success, snapshot.result)
        return None

    async def _inherits(self, cluster: ClusterState, snapshot: Snapshot) -> bool:
        """Take over the making of the model from a dead server all of whose updates are here; tell whether it is so."""
        now, token = snapshot.iteration, snapshot.token
        if now.phase not in (Phase.REDUCING, Phase.CANDIDATE) or now.number != self.iteration.number:
            return False
        if token not in self._ledgers.inherited:
            if await cluster.is_alive("server", token):
                return False
            counted = await cluster.uploads_by_ledger(now.number)
            if not counted.keys() <= self._ledgers.in_hand:
                return False
        fields = {"token": self.job.node_id}  # or the next one to die would leave a token that nobody knows
        return await cluster.set_phase(now.number, now.attempt, now.phase, now.phase, fields)

    def _localise(self, snapshot: Snapshot) -> Iteration:
        now = self._reactor.seconds()
        started, first = snapshot.started_ago, snapshot.first_upload_ago
        return replace(
            snapshot.iteration,
            started=None if started is None else now - started,
            first_upload=None if first is None else now - first,
        )

    async def _restore(self, cluster: ClusterState) -> None:
        """Write the status again after Redis lost its data; the iteration's updates are lost with it."""
        number = self.iteration.number
        await claim_instance(
            self.redis, self.job.fl_name, cluster.keys.instance, job_ttl(self.job.global_window_ms)
        )
        finished = number > self.job.policy.last_iteration
        running = RunningState.FINISH if finished else self.iteration.running
        restored = number if finished else number + 1
        await cluster.create(restored, success=False, result=core.status_lost(number), running=running)
        await cluster.offer_hyper_parameters(self.job.hyper_parameters)
        self.log.error(
            "Redis lost its data; the status was restored at iteration {iteration}", iteration=restored
        )

    def _look_again(self) -> None:
        """Repair: join, compare with the shared state, look at the clock. Once a second, and at each deadline."""
        self._metrics.redis_up.set(self.redis.available)
        if self.cluster is not None and self.redis.available and not self._busy:
            self._run(self._repair())
        elif self.cluster is None and self.redis.available and not self._joining:
            self._run(self._join())

    async def _repair(self) -> None:
        if self._guarding:
            return
        self._guarding = True
        try:
            await self._guard_updates()  # first, as what it adopts decides what this server can do
            if not self._busy:
                await self._observe()
        finally:
            self._guarding = False
        self.note(
            core.TimePassed()
        )  # last, as a copy that is out of date must not end an iteration by the clock

    async def _join_when_connected(self) -> None:
        await self.redis.connected()
        if self.running and self.cluster is None and not self._joining:
            await self._join()

    async def _join(self) -> None:
        """Find or make the job's instance, and take up its current iteration."""
        job = self.job
        self._joining = True
        try:
            instance = await claim_instance(
                self.redis, job.fl_name, job.new_instance_name(), job_ttl(job.global_window_ms)
            )
            cluster = ClusterState(self.redis, job.fl_name, instance, job.global_window_ms)
            await cluster.offer_hyper_parameters(job.hyper_parameters)
            first = self.models.newest + 1
            running = RunningState.FINISH if first > job.policy.last_iteration else RunningState.RUNNING
            await cluster.create(first, success=True, result="", running=running)
            snapshot = await cluster.read()
        finally:
            self._joining = False
        if snapshot is None:
            raise StoreUnavailable("Redis forgets the status as soon as it is written")
        before, self.iteration = self.iteration, self._localise(snapshot)
        self._stand_in(self.iteration.number - 1)
        self.cluster = cluster
        self._intake.begin(self._epoch())
        self._show(before)
        self.log.info(
            "joined instance {instance} at iteration {iteration}",
            instance=instance,
            iteration=self.iteration.number,
        )
        for callback in self.on_join:
            callback()
        await self._guard_updates()
        self._wake()
        if self._published_before():
            self.note(core.CandidateDurable())
        elif self.iteration.changing:
            await self._observe()

    def _stand_in(self, number: int) -> None:
        """Let the newest model stand for that of an iteration if the latter is not here."""
        newest = self.models.newest
        if newest < number:
            self.log.warn(
                "the newest model is that of iteration {newest}; it stands for iteration {missing}",
                newest=newest,
                missing=number,
            )
            self.models.carry_over(number)

    def _published_before(self) -> bool:
        """Tell whether a process that is gone had written the candidate's checkpoint already."""
        number, image = self.iteration.number, self.models.newest_image
        if self.iteration.phase is not Phase.CANDIDATE or self.models.newest != number:
            return False
        if image.digest != self.iteration.digest:
            return False
        self._candidate = _Candidate(number, image, Totals())
        return True

    # ---- what must not be lost

    async def _guard_updates(self) -> None:
        """See that this server has a ledger, and that every counted update is in one that can be read.

        Ledgers of dead processes on this host are adopted. One that nobody can read counts as lost when its owner's
        lease has been gone for LOSS_S; then the iteration fails by name.
        """
        cluster, number = self._joined_cluster(), self.iteration.number
        await self._own_a_ledger(cluster)
        adopted = await self._ledgers.adopt(cluster, self._epoch(), self.job.node_id)
        if adopted and not self._busy:
            await self._observe()
        if self.iteration.running is not RunningState.RUNNING:
            return
        lost = await self._ledgers.count_lost(cluster, number, self._reactor.seconds())
        if lost and not self._busy and number == self.iteration.number:
            self.log.error(
                "{lost} counted updates are in ledgers that nobody can read", lost=lost, iteration=number
            )
            self.note(core.UpdatesLost())

    async def _own_a_ledger(self, cluster: ClusterState) -> None:
        ledgers = self._ledgers
        if ledgers.own is not None:
            owner = await cluster.ledger_owner(ledgers.own.id)
            if owner == self.job.node_id:
                return
            if owner:
                self.log.error("the update ledger was revoked; a new one is opened", owner=owner)
                ledgers.discard()
        fresh = ledgers.own is None
        if ledgers.open() and ledgers.own is not None:
            if fresh:
                self._intake.begin(self._epoch())  # before anything else can come in between
            await cluster.own_ledger(ledgers.own.id, self.job.node_id)

    def _epoch(self) -> Epoch:
        """Return which updates this server's ledger may take."""
        instance = self._joined_cluster().keys.instance
        return Epoch(instance, self.iteration.number, self.iteration.attempt, self.models.newest_image.digest)

    def _joined_cluster(self) -> ClusterState:
        if self.cluster is None:
            raise StoreUnavailable("this server has not joined its job yet")
        return self.cluster

    # ---- small things

    def _show(self, before: Iteration) -> None:
        """Tell metrics and timers about a change."""
        now = self.iteration
        if now.number != before.number:
            self._started = before.started
            self._filled_before, self.filled = self.filled, None
        if self.filled is None and now.selected >= self.job.policy.start_threshold:
            self.filled = self._reactor.seconds()
        self._metrics.iteration.set(now.number)
        self._metrics.counts.labels("startFLJob").set(now.selected)
        self._metrics.counts.labels("updateModel").set(now.uploaded)
        if now.phase is not before.phase or now.number != before.number:
            self._metrics.show_phase(now.phase)
        due = core.deadline(now, self.job.policy)
        self._arm_deadline(None if due is None else due[0])

    def _arm_deadline(self, at: float | None) -> None:
        if self._deadline is not None and self._deadline.active():
            if at == self._deadline_at:
                return
            self._deadline.cancel()
        self._deadline = None
        if at is not None and self.running:
            delay = max(0.0, at - self._reactor.seconds())
            self._deadline, self._deadline_at = (
                self._reactor.callLater(delay, self._look_again),
                at,
            )

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)

    def _run(self, work: Any) -> None:
        defer.Deferred.fromCoroutine(work).addErrback(self._failed)

    def _failed(self, failure: Any) -> None:
        if failure.check(StoreError):
            self.log.warn("the shared state is out of reach: {error}", error=failure.value)
        elif failure.check(FedcoreError, OSError):
            self.log.error(
                "iteration {iteration}: {error}", iteration=self.iteration.number, error=failure.value
            )
        else:
            self.log.failure(
                "an effect of iteration {iteration} failed", failure, iteration=self.iteration.number
            )


def _differ(seen: Iteration, known: Iteration) -> bool:
    """Tell whether two views of an iteration differ in more than their clocks' rounding."""
    return replace(seen, started=None, first_upload=None) != replace(known, started=None, first_upload=None)
