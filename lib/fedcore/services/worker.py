"""One worker of hybrid training: what ``core.worker`` decides, done with real servers, Redis and trainer.

The circle itself is in core/worker.py; here each of its effects is carried out and each of its remarks is logged. All
that the trainer does, and reading and writing whole models, happens in a thread of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime
from typing import Any

from twisted.application.service import Service
from twisted.internet import defer, task
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from fedcore.config import ServerMode, Settings
from fedcore.core import worker as core
from fedcore.core.worker import Event, Remark, Step
from fedcore.errors import ArrayError, ConfigError, FedcoreError, NonFinite, StoreError
from fedcore.net.node_client import NodeClient
from fedcore.net.tls import Links
from fedcore.observe.metrics import WorkerMetrics
from fedcore.services.worker_client import Answer, Round, WorkerClient
from fedcore.services.worker_registration import WorkerRegistration
from fedcore.services.worker_thread import WorkerThread
from fedcore.services.worker_trainer import CheckedTrainer, TrainerFailed, Training
from fedcore.store.cluster_state import ClusterState, current_instance
from fedcore.store.redis import Redis
from fedcore.store.workers import worker_id_at
from fedcore.wire import codec
from fedcore.wire.messages import (
    RequestPullWeight,
    RequestPushMetrics,
    RequestPushWeight,
    ResponsePullWeight,
    ResponsePushMetrics,
    ResponsePushWeight,
)
from fedcore.wire.node import MAX_DATA, NodeRole

STATUS_PERIOD_S = 1.0
PATIENCE_S = 60.0  # between two lines that a training goes on
_PER_WEIGHT = 1 << 10  # bytes of an answer beside the values: name, tables, padding
_HEAD = 1 << 16

_WORDS = {
    Remark.PULLED: (LogLevel.info, "pulled the aggregate of iteration {iteration}"),
    Remark.LAST_GOOD: (
        LogLevel.error,
        "the aggregate of iteration {iteration} holds NaN or infinity and is refused; training goes on from the last "
        "good weights: {detail}",
    ),
    Remark.SKIPPED: (
        LogLevel.error,
        "the aggregate of iteration {iteration} holds NaN or infinity and is refused; there are no good weights to use "
        "instead, so this worker leaves the iteration alone: {detail}",
    ),
    Remark.MISPLACED: (LogLevel.warn, "a server gave the weights of another iteration than {iteration}"),
    Remark.TRAINED: (
        LogLevel.info,
        "trained {steps} steps for iteration {iteration}: loss {loss:.4f}, accuracy {accuracy:.4f}",
    ),
    Remark.DIVERGED: (
        LogLevel.error,
        "training for iteration {iteration} has diverged, so nothing is pushed: {detail}",
    ),
    Remark.DISCARDED: (
        LogLevel.warn,
        "the {steps} steps trained for iteration {iteration} are thrown away: the job went on before they could be "
        "pushed",
    ),
    Remark.REFUSED: (LogLevel.error, "the servers refuse the weights of iteration {iteration}: {detail}"),
    Remark.PUSHED: (LogLevel.info, "pushed the weights of iteration {iteration}"),
    Remark.LATE: (
        LogLevel.info,
        "another worker was faster in iteration {iteration}, its weights count; waiting for the next one",
    ),
    Remark.PERHAPS_OURS: (
        LogLevel.warn,
        "the weights of iteration {iteration} are there; whether they are ours is not known, as an answer was lost",
    ),
    Remark.STANDS_IN: (
        LogLevel.warn,
        "the worker that was faster in iteration {iteration} tells no loss and accuracy; pushing our own for it",
    ),
    Remark.DONE: (LogLevel.info, "done with iteration {iteration}"),
    Remark.DISABLED: (LogLevel.info, "the job is disabled; waiting until it goes on"),
    Remark.FINISHED: (LogLevel.info, "the job is finished"),
}
_OUTCOMES = (
    Remark.DONE,
    Remark.LATE,
    Remark.DISCARDED,
    Remark.DIVERGED,
    Remark.SKIPPED,
    Remark.REFUSED,
)


def require_hybrid(settings: Settings) -> None:
    """Check that the servers of a job serve workers.

    Raises:
        ConfigError: they do not.
    """
    if settings.server_mode is not ServerMode.HYBRID_TRAINING:
        raise ConfigError(
            f"server_mode is {settings.server_mode}: its servers take no weights from fl-workerd",
            hint=f"set it to {ServerMode.HYBRID_TRAINING} for all servers and workers of the job",
        )


class Worker(Service):
    """Trains each aggregate of a job; once the job is finished it waits for a new instance of it.

    Attributes:
        services: what it needs, itself among them, to be started in this order.
        on_end: called once, with the reason, when the worker cannot go on.
    """

    log = Logger()

    def __init__(
        self,
        settings: Settings,
        sync_frequency: int,
        trainer: CheckedTrainer,
        redis: Redis,
        metrics: WorkerMetrics,
        reactor: Any,
        status: Callable[[str], None] = lambda text: None,
        links: Links | None = None,
    ) -> None:
        """Build a worker; nothing is started.

        Args:
            settings: the job's.
            sync_frequency: training steps from a pull to a push, at least 1.
            trainer: who trains.
            redis: the connection.
            metrics: of this daemon.
            reactor: for time and connections.
            status: is told every second, in a few words, what the worker is about.
            links: TLS of the node channel, None if it has none.

        Raises:
            ConfigError: servers of this job serve no workers.
        """
        require_hybrid(settings)
        self.on_end: Callable[[FedcoreError], None] = lambda fault: None
        self._settings = settings
        self._trainer = trainer
        self._redis = redis
        self._metrics = metrics
        self._reactor = reactor
        self._status = status
        worker_id = worker_id_at(datetime.now(), random.SystemRandom().randint(10000, 99999))
        longest = 4 * trainer.total_floats + _PER_WEIGHT * len(trainer.names) + _HEAD
        client = NodeClient(
            worker_id,
            role=NodeRole.WORKER,
            max_data=max(MAX_DATA, longest),
            jitter=random.random,
            reactor=reactor,
            encrypt=links.node_connecting if links is not None else None,
        )
        window = settings.round.global_iteration_time_window
        self.registration = WorkerRegistration(redis, settings.fl_name, worker_id, window, reactor)
        self._client = WorkerClient(
            client, lambda: self._cluster, metrics, settings.fedcore.worker.reply_timeout
        )
        self._thread = WorkerThread(reactor)
        self._cluster: ClusterState | None = None
        self._progress, self._effect = core.Progress(sync_frequency), core.begin(sync_frequency).effect
        self._request = b""  # the trained weights, encoded
        self._detail = ""  # of what went wrong last
        self._said: Remark | None = None
        self._began = 0.0  # the last training
        self._say_again = 0.0  # that it goes on
        self._life: defer.Deferred[None] = defer.succeed(None)
        self._telling = task.LoopingCall(self._tell)
        self._telling.clock = reactor
        self.services: list[Any] = [redis, client, self.registration, self]
        metrics.redis_up.set_function(lambda: redis.available)
        metrics.registered.set_function(lambda: self.registration.registered)

    @property
    def training(self) -> bool:
        """Whether the trainer's thread lives, be it that it cannot be stopped."""
        return self._thread.busy

    @property
    def _finished(self) -> bool:
        return self._progress.step is Step.FINISHED

    def checks(self) -> dict[str, Callable[[], str | None]]:
        """Return what must hold for the worker to be ready."""
        return {
            "redis": lambda: self._redis.problem or None,
            "membership": lambda: None if self.registration.registered else "not on the list of workers yet",
            "servers": lambda: None if self._finished else self._client.problem or None,
        }

    def startService(self) -> None:
        super().startService()
        self._thread.start()
        self._telling.start(STATUS_PERIOD_S)
        self._life = defer.Deferred.fromCoroutine(self._live())
        self._life.addErrback(self._broken)

    def stopService(self) -> Any:
        super().stopService()
        self._telling.stop()
        self._thread.stop()
        self._life.cancel()
        return self._life

    # ---- the circle

    async def _live(self) -> None:
        while not isinstance(self._effect, core.End):
            event = await self._do(self._effect)
            before = self._progress
            turn = core.step(before, event, random.random())
            self._progress, self._effect = turn.progress, turn.effect
            self._show(before, turn)
        hint = "the trainer and the servers must mean one model"
        self.on_end(ConfigError(self._effect.fault, hint=hint))

    def _broken(self, failure: Any) -> None:
        if failure.check(defer.CancelledError) and not self.running:
            return
        error = failure.value
        if isinstance(error, TrainerFailed) and error.__cause__ is not None:
            self.log.failure("the trainer has failed", failure=Failure(error.__cause__))
        elif not isinstance(error, FedcoreError):
            self.log.failure("the worker has failed", failure=failure)
        self.on_end(
            error if isinstance(error, FedcoreError) else FedcoreError(f"the worker has failed: {error}")
        )

    async def _do(self, effect: core.Effect) -> Event:
        match effect:
            case core.Look():
                return await self._look()
            case core.Pull(place):
                return await self._pull(place)
            case core.Train(steps, from_last_good):
                return await self._train(steps, from_last_good)
            case core.Push(place):
                answer = await self._client.ask(
                    Round.pushWeight, self._request, ResponsePushWeight, place.iteration
                )
                return self._event(answer)
            case core.PushMetrics(place, loss, accuracy):
                request = codec.encode(RequestPushMetrics(loss, accuracy))
                told = await self._client.ask(
                    Round.pushMetrics, request, ResponsePushMetrics, place.iteration
                )
                return self._event(told)
            case core.Wait(seconds):
                await task.deferLater(self._reactor, seconds)
                return core.Waited()
        raise AssertionError(effect)

    async def _look(self) -> Event:
        fl_name, window = self._settings.fl_name, self._settings.round.global_iteration_time_window
        try:
            if self._cluster is None:
                instance = await current_instance(self._redis, fl_name)
                if not instance:
                    return core.Blind()
                self._cluster = ClusterState(self._redis, fl_name, instance, window)
            look = await self._cluster.read()
        except (StoreError, ValueError) as problem:
            self._detail = str(problem)
            return core.Blind()
        own = self._cluster.keys.instance
        if look.instance != own:
            self._cluster = None  # the next look finds the new one, if there is one yet
            return core.Blind()
        if look.snapshot is None:
            return core.Blind()
        now = look.snapshot.iteration
        return core.Looked(core.Place(own, now.number, now.attempt), now.running)

    async def _pull(self, place: core.Place) -> Event:
        request = codec.encode(RequestPullWeight(place.iteration, self._trainer.names))
        answer = await self._client.ask(Round.pullWeight, request, ResponsePullWeight, place.iteration)
        if not isinstance(answer, Answer) or answer.table.retcode != 200:
            return self._event(answer)
        table = answer.table
        if table.iteration != place.iteration or self._progress.step is not Step.PULLING:
            return core.Pulled(table.iteration, finite=True)  # of no use, so the trainer does not get them
        try:
            await self._thread.run(lambda: self._trainer.take(table.feature_map or ()))
        except NonFinite as problem:
            self._detail = str(problem)
            return core.Pulled(table.iteration, finite=False)
        except ArrayError as problem:
            raise ConfigError(
                f"the trainer does not fit the job's model: {problem}",
                hint="the trainer and the servers must mean one model",
            ) from problem
        return core.Pulled(table.iteration, finite=True)

    async def _train(self, steps: int, from_last_good: bool) -> Event:
        iteration = 0 if self._progress.place is None else self._progress.place.iteration

        def work() -> tuple[Training, bytes]:
            if from_last_good:
                self._trainer.take_last_good()
            done = self._trainer.train(steps)
            return done, codec.encode(RequestPushWeight(iteration, done.weights))

        self._began = self._reactor.seconds()
        self._say_again = self._began + PATIENCE_S
        try:
            training, self._request = await self._thread.run(work)
        except NonFinite as problem:
            self._detail = str(problem)
            return core.Diverged()
        self._metrics.training_duration.observe(self._reactor.seconds() - self._began)
        self._metrics.training_steps.inc(steps)
        self._metrics.loss.set(training.loss)
        self._metrics.accuracy.set(training.accuracy)
        return core.Trained(training.loss, training.accuracy)

    def _event(self, answer: Any) -> Event:
        if isinstance(answer, core.Unavailable | core.Unreachable):
            return answer
        table = answer.table
        self._detail = getattr(table, "reason", None) or f"retcode {table.retcode}"
        return core.Answered(table.retcode, self._detail, answer.doubt)

    # ---- what others see

    def _show(self, before: core.Progress, turn: core.Turn) -> None:
        """Log a turn and count it; what is said while waiting is said once."""
        now, remark = turn.progress, turn.remark
        self._metrics.show_step(now.step)
        if now.place is not None:
            self._metrics.iteration.set(now.place.iteration)
        if remark is None or (remark is self._said and remark in (Remark.DISABLED, Remark.MISPLACED)):
            return
        self._said = remark
        if remark in _OUTCOMES:
            self._metrics.end_iteration(remark.value)
        level, words = _WORDS[remark]
        place = before.place or now.place
        fields = {
            "iteration": 0 if place is None else place.iteration,
            "steps": now.steps,
            "loss": now.loss,
            "accuracy": now.accuracy,
            "detail": self._detail,
        }
        self.log.emit(level, words, **{name: fields[name] for name in fields if f"{{{name}" in words})
        if self._finished:
            self._tell()

    def _tell(self) -> None:
        """Say what the worker is about, and from time to time that a long training goes on."""
        step, place = self._progress.step, self._progress.place
        number = 0 if place is None else place.iteration
        if self._finished:
            self._status("the job is finished")
        else:
            self._status(f"{step.value}, iteration {number}" if number else step.value)
        if step is Step.TRAINING and self._reactor.seconds() >= self._say_again:
            self._say_again += PATIENCE_S
            self.log.info(
                "still training for iteration {iteration}, {seconds} s by now",
                iteration=number,
                seconds=int(self._reactor.seconds() - self._began),
            )
