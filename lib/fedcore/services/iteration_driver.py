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

from fedcore.config import Settings
from fedcore.core import iteration as core
from fedcore.core.iteration import Iteration, Phase
from fedcore.errors import ConfigError, FedcoreError, StoreError, StoreUnavailable
from fedcore.ledger.layout import Epoch
from fedcore.models.history import ModelHistory
from fedcore.net.reactor import wake_in_turns
from fedcore.observe.metrics import ServerMetrics
from fedcore.services.finaliser import Finaliser
from fedcore.services.guard import UpdateGuard
from fedcore.services.joining import Joined, Joining
from fedcore.services.ledgers import Closed, Ledgers
from fedcore.services.loss import LossJudge
from fedcore.services.opening import Opening
from fedcore.services.peers import Peers
from fedcore.services.publication import Publication
from fedcore.services.recovery import Memory, Recovery
from fedcore.services.reduction import Reduction
from fedcore.services.reporting import Course, Reporter
from fedcore.services.terms import ledger_shape, policy_of
from fedcore.services.unmasking import Unmasking
from fedcore.services.update_intake import UpdateIntake
from fedcore.store import instances
from fedcore.store.cluster_state import ClientMeta, ClusterState, Raised, Reserve
from fedcore.store.keys import job_ttl
from fedcore.store.redis import Commands, Redis

TICK_S = 1.0


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
    unmasking: Unmasking


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
        course: how the current iteration goes, and how the one before it went.
        opening: the iteration that is served.
        busy: whether an effect is under way.
        stopping: the sealed sums of a server that is about to stop, None before.
        letting_go: whether requests are held no more.
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
        # Until it has joined, it is sure of no later one: the newest model may never have been published.
        self.iteration = Iteration(max(1, parts.models.newest), base=parts.models.newest_image.digest)
        self.others: list[str] = []
        self.places: dict[str, ClientMeta] = {}
        self.course = Course()
        self.busy = False
        self.stopping: Closed | None = None
        self.letting_go = False
        self.on_join: list[Callable[[], object]] = []
        self.on_terms: list[Callable[[Settings], object]] = []
        self.on_leave: Callable[[], object] = lambda: None
        self.on_fatal: Callable[[ConfigError], object] = lambda error: None
        self._parts = parts
        self._redis, self._ledgers, self._intake = parts.redis, parts.ledgers, parts.intake
        self._reporter = parts.reporter
        self._reactor = reactor
        self._events: deque[core.Event] = deque()
        self._effects: deque[core.Effect] = deque()
        self._guarding = False
        self._look_wanted = False
        self._looking = False
        self._waiting: dict[defer.Deferred[None], None] = {}  # in their order
        self._deadline: Any = None
        self._deadline_at = 0.0
        self._memory = Memory(reactor)
        self._joining = Joining(self, parts, self._memory, settings, new_instance_name)
        self.opening = Opening(self, parts, reactor)
        self._finaliser = Finaliser(self, parts, self._memory, reactor)
        self._guard = UpdateGuard(self, parts, self._memory)
        self._recovery = Recovery(self, parts, self._memory, reactor)
        self._run_id = ""  # of the Redis that knows all this server knows
        self._reporter.policy(self.policy)
        self._tick = task.LoopingCall(self._look_again)
        self._tick.clock = reactor
        parts.redis.before_use.append(self._before_use)

    def startService(self) -> None:
        super().startService()
        self._tick.start(TICK_S)
        self.run(self._joining.join())

    def stopService(self) -> None:
        super().stopService()
        self._tick.stop()
        self._arm_deadline(None)
        self.wake()

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
        self._memory.has_place(client)
        if cluster is self.cluster:
            if number == self.iteration.number:
                self.places[client] = meta
            self.note(core.ClientSelected(number, count))

    def place_kept(self, client: str, reserve: Reserve) -> None:
        """Take notice of a client that was refused, and for which a place is kept."""
        self._memory.refused(client, reserve, 4 * self.policy.start_threshold)

    def upload_counted(self, cluster: ClusterState, number: int, attempt: int, count: int) -> None:
        """Take notice of an accepted update."""
        if cluster is self.cluster:
            self.course.uploaded(self._reactor.seconds())
            self.note(core.UploadCounted(number, attempt, count))

    async def moved_on(self, seen: tuple[int, int], seconds: float, *, to_the_end: bool = False) -> bool:
        """Wait until another iteration or attempt than ``seen`` is served; tell whether it is, in so many seconds.

        Whoever waits while Redis is away goes on as soon as this server can take part again. A server that is about
        to stop waits no longer, unless ``to_the_end``.
        """
        away = not self._redis.available

        def moved() -> bool:
            return (self.serving and self.where != seen) or (away and self.joined)

        return await (self.until if to_the_end else self.held_until)(moved, seconds)

    async def store_back(self, seconds: float) -> bool:
        """Wait until this server can take part again, at most so many seconds; tell whether it can."""
        return await self.held_until(lambda: self.joined, seconds)

    async def others_back(self, seconds: float) -> None:
        """Hold a request as long as nobody is served, as others are to bring back first what Redis has lost."""
        await self._recovery.others_back(seconds)

    async def held_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Hold a request as ``until`` waits, but not beyond the moment when requests are let go."""
        await self.until(lambda: self.letting_go or condition(), seconds)
        return condition()

    def let_go(self) -> None:
        """Hold no request any more, those included that are held: this server is about to stop."""
        self.letting_go = True
        self.wake()

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until something holds of this server or its iteration; tell whether it does, in so many seconds."""
        limit = self._reactor.seconds() + seconds
        while not condition() and self.running and self._reactor.seconds() < limit:
            waiter: defer.Deferred[None] = defer.Deferred()
            waiter.addTimeout(limit - self._reactor.seconds(), self._reactor)
            self._waiting[waiter] = None
            try:
                await waiter
            except defer.TimeoutError:
                self._waiting.pop(waiter, None)
        return condition()

    @property
    def filled(self) -> float | None:
        """When all places of the current iteration were taken, seconds."""
        return self.course.filled

    @property
    def typical(self) -> float | None:
        """How long the last valid iteration took from then to its end, seconds, as the shared state tells."""
        return self._memory.typical

    @property
    def problem(self) -> str:
        """Why this server does not serve, although it has joined; "" if it does."""
        return self.opening.problem

    @property
    def where(self) -> tuple[int, int]:
        """Iteration and attempt."""
        return self.iteration.number, self.iteration.attempt

    @property
    def serving(self) -> bool:
        """Whether the model that the current iteration starts from is in front."""
        return self.cluster is not None and self.opening.number == self.iteration.number

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
            self.run(self._look_while_wanted())

    def heard(self, message: bytes) -> None:
        """Take notice of a change of the shared state; b"" says that some may have been missed."""
        if self.cluster is None or not self._redis.available:
            return
        if message in (b"", b"released", b"forgotten"):
            if message == b"forgotten":
                self._recovery.others_say_so()
            self.run(self.repair())
        elif message == b"joined":
            self.run(self.refresh_others())
        else:
            self.look_soon()

    async def remind(self) -> None:
        """Tell Redis what it has forgotten of what this server knows; others do so for themselves."""
        cluster = self.joined_cluster()
        if (
            await self._recovery.bring_back(cluster, self._redis.run_id) is Raised.NEWER
            and cluster is self.cluster
        ):
            self._leave_instance()

    async def refresh_others(self) -> list[str]:
        """Look who lives."""
        nodes = await self.joined_cluster().nodes("server")
        self.others = [node.node_id for node in nodes if node.node_id != self.node_id]
        self._memory.saw(self.others)
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
            self.run(self._perform_all())

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
                    event = await self.observed()
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
            case core.Seal():
                return await self._finaliser.seal(effect)
            case core.ClaimReduction():
                return await self._finaliser.claim(effect)
            case core.Reduce():
                return await self._finaliser.reduce()
            case core.RecordCandidate() | core.RecordAggregate():
                return await self._finaliser.record(effect)
            case core.Keep():
                return await self._finaliser.keep(effect)
            case core.Unmask():
                return await self._finaliser.unmask(effect)
            case core.SpreadCandidate():
                return await self._finaliser.spread(effect.digest)
            case core.Reopen():
                return await self._finaliser.reopen(effect)
            case core.Resume(attempt=attempt):
                self._parts.reduction.forget()
                self._intake.resume(attempt)
                self.wake()
                await self._recovery.tell_again()
            case core.Advance():
                self._reporter.ending(cluster, effect.number)
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
                if not done:
                    self._reporter.not_ended()
                return core.Advanced(effect.success, effect.result) if done else await self.observed()
            case core.Open():
                await self.opening.open(effect)
            case core.Interrupt():
                await instances.disable(
                    self._redis, cluster.keys.fl_name, cluster.keys.instance, self._job_ttl
                )
                return await self.observed()
            case core.Finish():
                await cluster.finish(self.iteration.number)
                return await self.observed()
            case core.Leave():
                self.log.warn("the job is stopped: Redis says so")
                self.on_leave()
        return None

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
        seen = await self.observed()
        if seen is not None and not self.busy and cluster is self.cluster:
            self.note(seen)

    async def observed(self) -> core.Event | None:
        """Look at the shared state; return what differs from this server's copy, None if nothing does."""
        cluster, run_id = self.joined_cluster(), self._redis.run_id
        asked, look = self._reactor.seconds(), await cluster.read()
        if cluster is not self.cluster:
            return None  # another instance was joined meanwhile
        snapshot = look.snapshot
        if self._recovery.due(look):
            if await self._recovery.bring_back(cluster, self._redis.run_id) is Raised.NEWER:
                if cluster is self.cluster:
                    self._leave_instance()
                return None
            asked, run_id = self._reactor.seconds(), self._redis.run_id
            snapshot = (await cluster.read()).snapshot
        if cluster is not self.cluster:
            return None
        if snapshot is None:
            raise StoreUnavailable("Redis forgets the status as soon as it is written")
        # Nothing is awaited from here on: a look must not grow old.
        seen = self._memory.localise(snapshot, asked)
        finaliser = seen.token.partition(":")[2]
        severed = run_id == self._redis.run_id and self._is_severed(seen, snapshot.run)
        if seen.changing or severed or _differ(seen, self.iteration):
            gone = self._guard.is_gone(seen.token, finaliser)
            mine = finaliser == self.node_id
            return core.Observed(
                seen, mine, snapshot.success, snapshot.result, gone and not mine, severed=severed
            )
        return None

    def _is_severed(self, seen: Iteration, run: str) -> bool:
        """Tell whether another Redis than this one may have had what devices exchanged in the iteration.

        Nobody but Redis has their keys and shares, so a Redis that started anew, or took the place of one that failed,
        may have lost some that others build on already.

        Args:
            seen: the iteration.
            run: run id of the Redis that has had all of it, "" if none has.
        """
        begun = seen.selected > 0 or seen.started is not None or seen.changing
        return bool(self.policy.cipher_rounds) and begun and run != self._redis.run_id

    def _leave_instance(self) -> None:
        """Let go of an instance that was replaced by a newer one, and join that."""
        self.log.info("the job has a new instance")
        self._joining.leave(self.joined_cluster().keys.instance)
        self.cluster = None
        self.run(self._joining.join())

    async def _before_use(self, commands: Commands, run_id: str) -> None:
        """Bring back what a Redis has forgotten that is not the one of before, before anything else is asked of it."""
        self.opening.be_patient()
        self._parts.judge.forget()  # no lease was renewed while Redis was away
        if self.cluster is not None and run_id != self._run_id:
            window = self.settings.round.global_iteration_time_window
            keys = self.cluster.keys
            cluster = ClusterState(cast(Redis, commands), keys.fl_name, keys.instance, window)
            await self._recovery.bring_back(cluster, run_id)
        self._run_id = run_id
        self.run(self._wake_when_connected())

    async def _wake_when_connected(self) -> None:
        await self._redis.connected()
        self.wake()

    def _look_again(self) -> None:
        """Repair: join, compare with the shared state, look at the clock. Once a second, and at each deadline."""
        if self.cluster is not None and self._redis.available:
            self.run(self.repair())
            self.run(self._watch_clock())
        elif self.cluster is None and self._redis.available:
            self.run(self._joining.join())

    async def repair(self) -> None:
        """See to all that may have been missed, unless that is under way."""
        if self._guarding:
            return
        self._guarding = True
        try:
            await self._guard.watch()  # first, as what it adopts decides what this server can do
            await self.look()
            if not self.busy and not self.serving:
                await self.opening.open_late()
        finally:
            self._guarding = False

    async def _watch_clock(self) -> None:
        """Look at the deadlines, and at the shared state first: an old copy must not end an iteration."""
        await self._observe()
        if (
            not self.busy or self.iteration.phase in core.AWAITING
        ):  # then the finaliser's Keep, or Unmask, is all it does
            self.note(core.TimePassed())

    # ---- joining

    def go_on(self, joined: Joined) -> None:
        """Take up the instance again that was left, for Redis has lost the one after it: nothing is forgotten yet."""
        self._effects.clear()
        self._events.clear()
        self.cluster, self._run_id = joined.cluster, self._redis.run_id
        self.log.warn("Redis has lost the new instance; this server goes on with the one before")

    def take_part(self, joined: Joined) -> None:
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
        self.opening.close()
        number, base = self.iteration.number, self.iteration.base
        if base == self.models.newest_image.digest:
            self.models.carry_over(number - 1)
            self.opening.serve(number)
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
        self.course.changed(before, now, self.policy.start_threshold, self._reactor.seconds())
        if now.phase is Phase.SEALED and before.phase is Phase.COLLECTING:
            self._memory.sealed_at = self._reactor.seconds()
        self._reporter.changed(before, now)
        made = now.phase is not before.phase and now.phase in core.MADE
        if made or [known.count for known in now.rounds] != [known.count for known in before.rounds]:
            self.wake()  # who waits for a sum, or for a cipher round
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

    def wake(self) -> None:
        """Have all who wait look again at what they wait for."""
        waiting, self._waiting = self._waiting, {}
        wake_in_turns(self._reactor, waiting)

    def run(self, work: Coroutine[Any, Any, object]) -> None:
        """Do work that nobody waits for; what goes wrong is logged."""
        defer.Deferred.fromCoroutine(work).addErrback(self._failed)

    def _failed(self, failure: Any) -> None:
        if failure.check(StoreError):
            if self.running:  # else the connection was closed on purpose
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
    return _timeless(seen) != _timeless(known)


def _timeless(iteration: Iteration) -> Iteration:
    rounds = tuple(replace(known, first=0.0) for known in iteration.rounds)
    return replace(iteration, started=None, first_upload=None, rounds=rounds)
