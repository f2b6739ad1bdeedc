"""Drives the iterations of one server: events in, ``core.iteration.step``, effects out.

The driver holds this server's copy of the iteration and performs effects one after another; while it does, events
wait in a queue. Every effect on the shared state is a compare-and-set. One that is lost, or whose outcome a broken
connection hides, is followed by a fresh look at the shared state, from which the machine goes on. Changes by others
are heard of at once; a look once a second repairs whatever was missed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, cast

from twisted.application.service import Service
from twisted.internet import defer, task
from twisted.logger import Logger

from fedcore.config import Settings, hyper_parameters
from fedcore.core import iteration as core
from fedcore.core import model_info
from fedcore.core.iteration import Iteration, Phase
from fedcore.errors import ConfigError, FedcoreError, StoreError, StoreUnavailable
from fedcore.ledger.layout import Epoch
from fedcore.ledger.ledger import Partial
from fedcore.models.history import ModelHistory
from fedcore.observe.metrics import ServerMetrics
from fedcore.services.guard import UpdateGuard
from fedcore.services.joining import Joined, join
from fedcore.services.ledgers import Ledgers
from fedcore.services.loss import LossJudge
from fedcore.services.peers import Peers
from fedcore.services.publication import Candidate, Found, Publication
from fedcore.services.recovery import Memory, bring_back
from fedcore.services.reduction import Reduced, Reduction
from fedcore.services.reporting import IterationEnd, Reporter
from fedcore.services.terms import ledger_shape, policy_of
from fedcore.services.update_intake import UpdateIntake
from fedcore.store import instances
from fedcore.store.cluster_state import ClientMeta, ClusterState, Raised, Rebased, Snapshot
from fedcore.store.keys import job_ttl
from fedcore.store.redis import Commands, Redis

TICK_S = 1.0
CLAIM_PAUSE_S = 0.5  # the server that sealed an iteration makes its model, unless it dies first
REBASE_S = 10.0  # how long a model that nobody has is waited for, until the newest one here takes its place


@dataclass(frozen=True, slots=True)
class Parts:
    """What the driver works with; each is described where it lives."""

    redis: Redis
    ledgers: Ledgers
    intake: UpdateIntake
    models: ModelHistory
    reduction: Reduction
    publication: Publication
    peers: Peers
    judge: LossJudge
    reporter: Reporter
    metrics: ServerMetrics


class IterationDriver(Service):
    """One server's part in the iterations of a job.

    Attributes:
        node_id: this server.
        settings: those in force: the file's, with the values that the cluster shares.
        policy: the numbers that rule an iteration.
        iteration: this server's copy of the current iteration.
        cluster: the shared state, None until the server has joined.
        models: the newest models.
        others: node ids of the other servers that live, as of the last look.
        places: clients that this server gave a place in the current iteration, client key -> what they declared.
        filled: seconds, when all places of the current iteration were taken, or None.
        typical: seconds that the last valid iteration took from then to its end, or None.
        busy: whether an effect is under way.
        problem: why this server does not serve, although it has joined; "" if it does.
        stopping_partials: the sealed sums of a server that is about to stop, None before.
    """

    log = Logger()

    def __init__(
        self,
        node_id: str,
        settings: Settings,
        parts: Parts,
        new_instance_name: Callable[[], str],
        reactor: Any,
    ) -> None:
        """Drive the job of ``settings`` from the newest of the models on."""
        self.node_id = node_id
        self.settings = settings
        self.policy = policy_of(settings)
        self.models = parts.models
        self.cluster: ClusterState | None = None
        self.iteration = Iteration(parts.models.newest + 1, base=parts.models.newest_image.digest)
        self.others: list[str] = []
        self.places: dict[str, ClientMeta] = {}
        self.filled: float | None = None
        self.typical: float | None = None
        self.problem = ""
        self.busy = False
        self.stopping_partials: list[Partial] | None = None
        self.on_join: list[Callable[[], object]] = []
        self.on_terms: list[Callable[[Settings], object]] = []
        self.on_leave: Callable[[], object] = lambda: None
        self.on_fatal: Callable[[ConfigError], object] = lambda error: None
        self._file_settings = settings
        self._parts = parts
        self._redis, self._ledgers, self._intake = parts.redis, parts.ledgers, parts.intake
        self._publication, self._reporter = parts.publication, parts.reporter
        self._new_instance_name = new_instance_name
        self._reactor = reactor
        self._events: deque[core.Event] = deque()
        self._effects: deque[core.Effect] = deque()
        self._joining = False
        self._guarding = False
        self._opened = 0  # the iteration whose model is in front
        self._look_wanted = False
        self._looking = False
        self._waiting: list[defer.Deferred[None]] = []
        self._deadline: Any = None
        self._deadline_at = 0.0
        self._started: float | None = None  # first startFLJob of the iteration that is ending
        self._filled_before: float | None = None  # ``filled`` of that iteration
        self._counted_before = 0  # updates of that iteration
        self._last_upload: float | None = None
        self._sealed_here: tuple[int, int] | None = None  # iteration and attempt that this server sealed
        self._follows = False  # whether this server was in an instance before the one that it is to join
        self._memory = Memory(reactor)
        self._guard = UpdateGuard(self, parts, self._memory)
        self._run_id = ""  # of the Redis that knows all this server knows
        self._baseless_since: float | None = None
        self._reporter.policy(self.policy)
        self._tick = task.LoopingCall(self._look_again)
        self._tick.clock = reactor
        parts.redis.before_use.append(self._before_use)

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
        if not self.busy:
            self._work()

    def place_given(
        self, cluster: ClusterState, number: int, count: int, client: str, meta: ClientMeta
    ) -> None:
        """Take notice of a client that got a place."""
        if cluster is self.cluster:
            if number == self.iteration.number:
                self.places[client] = meta
            self.note(core.ClientSelected(number, count))

    def upload_counted(self, cluster: ClusterState, number: int, attempt: int, count: int) -> None:
        """Take notice of an accepted update."""
        if cluster is self.cluster:
            self._last_upload = self._reactor.seconds()
            self.note(core.UploadCounted(number, attempt, count))

    async def moved_on(self, seen: tuple[int, int], seconds: float) -> bool:
        """Wait until another iteration or attempt than ``seen`` is served; tell whether it is, in so many seconds."""
        return await self._wait(lambda: self.serving and self.where != seen, seconds)

    async def store_back(self, seconds: float) -> bool:
        """Wait until this server can take part again, at most so many seconds; tell whether it can."""
        return await self._wait(lambda: self.joined, seconds)

    async def _wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        limit = self._reactor.seconds() + seconds
        while not condition() and self.running and self._reactor.seconds() < limit:
            waiter: defer.Deferred[None] = defer.Deferred()
            waiter.addTimeout(limit - self._reactor.seconds(), self._reactor)
            self._waiting.append(waiter)
            try:
                await waiter
            except defer.TimeoutError:
                self._waiting = [other for other in self._waiting if other is not waiter]
        return condition()

    @property
    def where(self) -> tuple[int, int]:
        """Iteration and attempt."""
        return self.iteration.number, self.iteration.attempt

    @property
    def serving(self) -> bool:
        """Whether the model that the current iteration starts from is in front."""
        return self.cluster is not None and self._opened == self.iteration.number

    @property
    def joined(self) -> bool:
        """Whether this server takes part in its job and can reach the shared state."""
        ready = self.cluster is not None and self._redis.available and self._ledgers.own is not None
        return ready and self.serving

    async def look(self) -> None:
        """Compare this server's copy with the shared state now, unless an effect is under way."""
        if not self.busy:
            await self._observe()

    def look_soon(self) -> None:
        """Compare this server's copy with the shared state as soon as no effect is under way."""
        self._look_wanted = True
        if not self.busy and not self._looking:
            self._run(self._look_while_wanted())

    def heard(self, message: bytes) -> None:
        """Take notice of a change of the shared state; b"" says that some may have been missed."""
        if self.cluster is None or not self._redis.available:
            return
        if message in (b"", b"released", b"forgotten"):
            self._run(self._repair())
        elif message == b"joined":
            self._run(self.refresh_others())
        else:
            self.look_soon()

    async def remind(self) -> None:
        """Tell Redis what it has forgotten of what this server knows; others do so for themselves."""
        if await self._bring_back(self.joined_cluster()) is Raised.NEWER:
            self._leave_instance()

    async def refresh_others(self) -> list[str]:
        """Look who lives."""
        nodes = await self.joined_cluster().nodes("server")
        self.others = [node.node_id for node in nodes if node.node_id != self.node_id]
        self._parts.metrics.peers.set(len(self.others))
        return self.others

    def epoch(self) -> Epoch:
        """Return which updates this server's ledger may take."""
        instance = self.joined_cluster().keys.instance
        return Epoch(instance, self.iteration.number, self.models.newest_image.digest)

    # ---- the machine

    def _work(self) -> None:
        """Step through the queued events; the first effect makes the rest asynchronous."""
        while self._events and not self._effects:
            self._step(self._events.popleft())
        if self._effects:
            self.busy = True
            self._run(self._perform_all())

    def _step(self, event: core.Event) -> None:
        before = self.iteration
        self.iteration, effects = core.step(before, event, self._reactor.seconds(), self.policy)
        self._effects.extend(effects)
        match event:
            case core.Observed(seen, _, success, result) if seen.rank >= before.rank:
                self._memory.ended = (success, result)
            case core.Advanced(success, result):
                self._memory.ended = (success, result)
        if self.iteration != before:
            self._show(before)

    async def _perform_all(self) -> None:
        try:
            while self._effects:
                cluster = self.cluster
                try:
                    event = await self._perform(self._effects[0])
                except StoreUnavailable:
                    await self._redis.connected()
                    event = await self._observed()
                if self.cluster is not cluster:
                    return  # another instance: nothing of this matters any more
                self._effects.popleft()
                if isinstance(event, core.Observed):
                    event = replace(event, fresh=True)  # what was counted meanwhile waits in the queue
                if event is not None:
                    self._step(event)
                while self._events and not self._effects:
                    self._step(self._events.popleft())
        finally:
            self._effects.clear()
            self.busy = False
            if self._look_wanted:
                self.look_soon()

    async def _perform(self, effect: core.Effect) -> core.Event | None:
        """Do what an effect asks; return the event that reports it, None if there is nothing to report."""
        cluster = self.joined_cluster()
        match effect:
            case core.Seal(number, attempt):
                self._sealed_here = (number, attempt)
                done = await cluster.seal(number, attempt, self.policy.update_threshold)
                return core.Sealed() if done else await self._observed()
            case core.ClaimReduction(number, attempt, token):
                return await self._claim(cluster, number, attempt, token)
            case core.Reduce():
                return await self._reduce()
            case core.RecordCandidate(number, attempt, token, digest):
                candidate = self._publication.candidate(digest)
                updates = 0 if candidate is None or candidate.totals is None else candidate.totals.count
                done = await cluster.record_candidate(number, attempt, token, digest, updates)
                return core.CandidateRecorded(digest) if done else await self._observed()
            case core.SpreadCandidate(digest=digest):
                return await self._spread(digest)
            case core.Reopen():
                await self._reopen(cluster, effect)
                return await self._observed()
            case core.Resume(attempt=attempt):
                self._parts.reduction.forget()
                self._intake.resume(attempt)
                self._wake()
            case core.Advance():
                done = await cluster.advance(
                    effect.number,
                    effect.attempt,
                    phase=effect.phase,
                    success=effect.success,
                    result=effect.result,
                    finishes=effect.finishes,
                    token=effect.token,
                    base=effect.base,
                )
                return core.Advanced(effect.success, effect.result) if done else await self._observed()
            case core.Open():
                await self._open(effect)
            case core.Interrupt():
                await instances.disable(
                    self._redis, cluster.keys.fl_name, cluster.keys.instance, self._job_ttl
                )
                return await self._observed()
            case core.Finish():
                await cluster.finish(self.iteration.number)
                return await self._observed()
            case core.Leave():
                self.log.warn("the job is stopped: Redis says so")
                self.on_leave()
        return None

    async def _claim(self, cluster: ClusterState, number: int, attempt: int, token: str) -> core.Event | None:
        """Become the finaliser; the server that sealed goes first, one without the model not at all."""
        if not self.serving:
            return None
        waits = self._sealed_here != (number, attempt) and self._memory.sealed_for() < CLAIM_PAUSE_S
        if not token and waits:
            return None  # the next look comes within a second
        claimed = await cluster.claim_reduction(number, attempt, token, self.node_id)
        if claimed is None:
            return await self._observed()
        return core.ReductionClaimed(*claimed)

    async def _reduce(self) -> core.Event | None:
        """Make the model of all counted updates."""
        outcome = await self._parts.reduction.reduce(
            self.joined_cluster(),
            self.iteration,
            self.epoch(),
            self.models.newest_image,
            self.policy.update_threshold,
            lambda: [peer for peer in self._memory.in_doubt(self.others) if peer != self.node_id],
        )
        if not isinstance(outcome, Reduced):
            return outcome
        self._publication.hold(Candidate(self.iteration.number, outcome.image, outcome.totals))
        return core.ModelReduced(outcome.image.digest)

    async def _spread(self, digest: str) -> core.Event | None:
        """Make the candidate safe; one that died with its finaliser is made again."""
        others = await self.refresh_others()
        if self._publication.candidate(digest) is None:
            await self._publication.obtain(digest, self.iteration.number, others)
        if self._publication.candidate(digest) is None:
            again = await self._reduce()
            if not isinstance(again, core.ModelReduced):
                return again
            if again.digest != digest:
                self.log.error(
                    "the model of iteration {iteration} came out different the second time",
                    iteration=self.iteration.number,
                )
                return core.ReductionFailed(core.server_exited(self.iteration.number))
        candidate = self._publication.candidate(digest)
        if candidate is None:
            return None  # another instance has begun meanwhile
        try:
            await self._publication.spread(candidate, self.joined_cluster().keys.instance, others)
        except OSError as error:
            self.problem = f"the new model cannot be written: {error}"
            raise
        return core.CandidateSpread()

    async def _reopen(self, cluster: ClusterState, effect: core.Reopen) -> None:
        owners = {ledger_id: await cluster.ledger_owner(ledger_id) for ledger_id in effect.ledgers}
        uploads = await cluster.uploads_by_ledger(effect.number)
        lost = await cluster.reopen(
            effect.number,
            effect.attempt,
            phase=effect.phase,
            token=self.iteration.token,
            ledgers=effect.ledgers,
        )
        if lost is None:
            return
        for ledger_id in effect.ledgers:
            self._reporter.lost(
                effect.number, effect.attempt, uploads.get(ledger_id, 0), owners[ledger_id] or "nobody"
            )
            self._ledgers.drop(ledger_id)

    async def _open(self, effect: core.Open) -> None:
        """Serve the next iteration."""
        again, self._opened = self._opened == effect.number, 0
        candidate = self._publication.take(effect.base) if effect.success else None
        made = candidate is not None and candidate.number == effect.ended
        if made and candidate is not None:
            self.models.add(effect.ended, candidate.image)
        elif not effect.base or effect.base == self.models.newest_image.digest:
            self.models.carry_over(effect.ended)
        elif not await self._catch_up(effect.ended, effect.base):
            return  # the next tick tries again
        if self.iteration.number != effect.number:
            return  # another instance has begun meanwhile
        self._serve(effect.number)
        now = self._reactor.seconds()
        end = IterationEnd(
            self.settings.fl_name,
            self.joined_cluster().keys.instance,
            effect.ended,
            effect.success,
            effect.result,
            self.models.newest_image,
            candidate.checkpoint if made and candidate else None,
            candidate.totals if made and candidate else None,
            self._counted_before,
            None if self._started is None else now - self._started,
        )
        if end.valid and self._filled_before is not None:
            self.typical = now - self._filled_before
        if again:
            return  # it was only rebased
        self._reporter.ended(end, None if self._last_upload is None else now - self._last_upload)
        self._last_upload = None
        if made and candidate and candidate.checkpoint is None:
            self._run(self._publication.save_behind(candidate, self.joined_cluster().keys.instance))

    def _serve(self, number: int) -> None:
        """Put the newest model in front."""
        self._opened, self.problem, self._baseless_since = number, "", None
        self.places.clear()
        self._parts.reduction.forget()
        self._intake.begin(self.epoch(), self.iteration.attempt)
        self._wake()

    async def _catch_up(self, ended: int, base: str) -> bool:
        """Get the model that an iteration starts from; tell whether it is here.

        After REBASE_S without anybody who has it, the newest model of this server takes its place for all.
        """
        cluster = self.joined_cluster()
        found = await self._publication.obtain(base, ended, await self.refresh_others())
        if cluster is not self.cluster or (self.iteration.number, self.iteration.base) != (ended + 1, base):
            return False  # that was long ago
        image = self._publication.held(base)
        if image is not None:
            self.models.add(ended, image)
            return True
        now = self._reactor.seconds()
        if found is Found.UNKNOWN:
            self._baseless_since = None
            self.problem = f"the model of iteration {ended} is at servers that cannot be reached from here"
            return False
        if self._baseless_since is None:
            self._baseless_since = now
            self.log.warn("no living server has the model of iteration {iteration}", iteration=ended)
        self.problem = f"the model of iteration {ended} is at no server that lives"
        if now - self._baseless_since < REBASE_S:
            return False
        newest = self.models.newest
        self._baseless_since = None
        number = ended + 1
        done = await cluster.rebase(
            number,
            base,
            self.models.newest_image.digest,
            result=core.base_lost(number),
            finishes=number >= self.policy.last_iteration,
        )
        if done is not Rebased.OTHER:
            self.log.error(
                "the model of iteration {missing} is lost; that of iteration {newest} stands for it",
                missing=ended,
                newest=newest,
            )
        self.look_soon()
        return False  # the shared state may name another server's model by now

    # ---- the shared state

    async def _look_while_wanted(self) -> None:
        self._looking = True
        try:
            while self._look_wanted and not self.busy:
                self._look_wanted = False
                await self._observe()
        finally:
            self._looking = False

    async def _observe(self) -> None:
        cluster = self.cluster
        seen = await self._observed()
        if seen is not None and not self.busy and cluster is self.cluster:
            self.note(seen)

    async def _observed(self) -> core.Event | None:
        """Look at the shared state; return what differs from this server's copy, None if nothing does."""
        cluster = self.joined_cluster()
        look = await cluster.read()
        if cluster is not self.cluster:
            return None  # another instance was joined meanwhile
        snapshot = look.snapshot
        behind = snapshot is None or self._behind(snapshot)
        if look.instance != cluster.keys.instance or behind:
            if await self._bring_back(cluster) is Raised.NEWER:
                self._leave_instance()
                return None
            snapshot = (await cluster.read()).snapshot
        if cluster is not self.cluster:
            return None
        if snapshot is None:
            raise StoreUnavailable("Redis forgets the status as soon as it is written")
        seen = self._memory.localise(snapshot)  # nothing is awaited from here on: a look must not grow old
        finaliser = seen.token.partition(":")[2]
        if seen.changing or _differ(seen, self.iteration):
            gone = self._guard.is_gone(seen.token, finaliser)
            mine = finaliser == self.node_id
            return core.Observed(seen, mine, snapshot.success, snapshot.result, gone and not mine)
        return None

    def _behind(self, snapshot: Snapshot) -> bool:
        """Tell whether Redis has forgotten what this server knows."""
        return self.cluster is not None and snapshot.iteration.rank < self.iteration.rank

    def _leave_instance(self) -> None:
        """Let go of an instance that was replaced by a newer one, and join that."""
        self.log.info("the job has a new instance")
        self.cluster, self._follows = None, True
        self._memory.epoch += 1  # for a status that whoever named the instance has left to the servers
        if not self._joining:
            self._run(self._join())

    async def _bring_back(self, cluster: ClusterState) -> Raised:
        """Tell Redis what it has forgotten."""
        self._memory.begin_doubt(self.others)
        self._baseless_since = None  # who is not back yet may have it
        self._parts.judge.forget()
        raised = await bring_back(
            cluster, self._memory.known(self.iteration), self._ledgers, self.node_id, self.places
        )
        if raised is not Raised.NEWER:
            await cluster.offer_hyper_parameters(hyper_parameters(self.settings))
            await cluster.offer_model_info(model_info.describe(self.models.newest_image.layout))
        return raised

    async def _before_use(self, commands: Commands, run_id: str) -> None:
        """Bring back what a Redis has forgotten that is not the one of before, before anything else is asked of it."""
        self._baseless_since = None
        self._parts.judge.forget()  # no lease was renewed while Redis was away
        if self.cluster is not None and run_id != self._run_id:
            window = self.settings.round.global_iteration_time_window
            keys = self.cluster.keys
            cluster = ClusterState(cast(Redis, commands), keys.fl_name, keys.instance, window)
            await self._bring_back(cluster)
        self._run_id = run_id

    def _look_again(self) -> None:
        """Repair: join, compare with the shared state, look at the clock. Once a second, and at each deadline."""
        if self.cluster is not None and self._redis.available:
            self._run(self._repair())
            self._run(self._watch_clock())
        elif self.cluster is None and self._redis.available and not self._joining:
            self._run(self._join())

    async def _repair(self) -> None:
        if self._guarding:
            return
        self._guarding = True
        try:
            await self._guard.watch()  # first, as what it adopts decides what this server can do
            await self.look()
            if not self.busy and not self.serving:
                await self._open_late()
        finally:
            self._guarding = False

    async def _watch_clock(self) -> None:
        """Look at the deadlines, and at the shared state first: an old copy must not end an iteration."""
        await self._observe()
        if not self.busy:
            self.note(core.TimePassed())

    async def _open_late(self) -> None:
        """Try again to get the model that the current iteration starts from."""
        number, base = self.iteration.number, self.iteration.base
        if await self._catch_up(number - 1, base) and number == self.iteration.number and not self.busy:
            self._serve(number)

    # ---- joining

    async def _join_when_connected(self) -> None:
        await self._redis.connected()
        if self.running and self.cluster is None and not self._joining:
            await self._join()

    async def _join(self) -> None:
        """Find or make the job's instance, and take up its current iteration."""
        self._joining = True
        models = self.models
        try:
            joined = await join(
                self._redis,
                self._file_settings,
                models.newest_image.layout,
                self._new_instance_name(),
                1 if self._follows else models.newest + 1,
                models.newest_image.digest,
                self._memory.epoch,
            )
            self._take_part(joined)
        except ConfigError as error:
            self.on_fatal(error)
            return
        finally:
            self._joining = False
        for callback in self.on_join:
            callback()
        await self._repair()

    def _take_part(self, joined: Joined) -> None:
        """Take up an instance's current iteration; its model is seen to afterwards."""
        self._effects.clear()
        self._events.clear()
        self.settings, self.policy = joined.settings, policy_of(joined.settings)
        self._reporter.policy(self.policy)
        self._ledgers.reshape(ledger_shape(self.settings, self.models.newest_image.layout))
        for callback in self.on_terms:
            callback(self.settings)
        self._memory.begin_instance()
        before, self.iteration = self.iteration, self._memory.localise(joined.snapshot)
        self._memory.ended = (joined.snapshot.success, joined.snapshot.result)
        self.cluster, self._run_id = joined.cluster, self._redis.run_id
        self._opened = 0
        number, base = self.iteration.number, self.iteration.base
        if base == self.models.newest_image.digest:
            self.models.carry_over(number - 1)
            self._serve(number)
        self._show(before)

    @property
    def _job_ttl(self) -> int:
        return job_ttl(self.settings.round.global_iteration_time_window)

    def joined_cluster(self) -> ClusterState:
        """Return the shared state of the instance that this server has joined.

        Raises:
            StoreUnavailable: it has joined none.
        """
        if self.cluster is None:
            raise StoreUnavailable("this server has not joined its job yet")
        return self.cluster

    # ---- small things

    def _show(self, before: Iteration) -> None:
        """Tell reporter and timers about a change."""
        now = self.iteration
        if now.number != before.number:
            self._started, self._counted_before = before.started, before.uploaded
            self._filled_before, self.filled = self.filled, None
        if self.filled is None and now.selected >= self.policy.start_threshold:
            self.filled = self._reactor.seconds()
        if now.phase is Phase.SEALED and before.phase is Phase.COLLECTING:
            self._memory.sealed_at = self._reactor.seconds()
        self._reporter.changed(before, now)
        due = core.deadline(now, self.policy)
        self._arm_deadline(None if due is None else due[0])

    def _arm_deadline(self, at: float | None) -> None:
        if self._deadline is not None and self._deadline.active():
            if at == self._deadline_at:
                return
            self._deadline.cancel()
        self._deadline = None
        if at is not None and self.running:
            delay = max(0.0, at - self._reactor.seconds())
            self._deadline, self._deadline_at = self._reactor.callLater(delay, self._look_again), at

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)

    def _run(self, work: Coroutine[Any, Any, object]) -> None:
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
