"""The public class: a Client drives one device's session with a Trainer, a transport and the clock."""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedclient.identity import DeviceIdentity
from fedclient.protection import PrivacyOptions, Protection
from fedclient.session import Policy, Session
from fedclient.steps import (
    Action,
    Evaluate,
    Evaluated,
    Event,
    Finished,
    Fit,
    Fitted,
    IoFailed,
    IterationDone,
    IterationOutcome,
    Loaded,
    Outcome,
    Replied,
    Resumed,
    Send,
    Sleep,
    Stop,
    TrainerFailed,
)
from fedclient.trainer import FitResult, Trainer, Weights
from fedclient.transport import HttpTransport, Transport
from fedcore.errors import ConfigError

log = logging.getLogger("fedclient")


@dataclass(frozen=True, slots=True)
class IterationReport:
    """One attempt at an iteration.

    Attributes:
        iteration: its number; 0 if refused before any server named one.
        outcome: completed, or restarted after a refusal.
        loss: of the local training; None if it did not come to that.
        accuracy: of the global weights that the iteration began with; None without evaluation data.
        seconds: from startFLJob to the end of the attempt.
        reason: why it was restarted; empty if completed.
    """

    iteration: int
    outcome: IterationOutcome
    loss: float | None
    accuracy: float | None
    seconds: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """A whole run.

    Attributes:
        outcome: completed, job over, stopped or failed.
        reason: in words.
        completed: iterations completed.
        restarted: attempts refused.
        weights: the newest global weights received, name -> float32[n]; empty if there were none.
    """

    outcome: Outcome
    reason: str
    completed: int
    restarted: int
    weights: Weights = field(repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether the job ran to its end, by the plan or by the server's word."""
        return self.outcome in (Outcome.COMPLETED, Outcome.JOB_OVER)


class Client:
    """Takes part in one federated job with one trainer; every object keeps its own state.

    Args:
        trainer: the user's model and data.
        server: a URL, several URLs of equal servers (each client begins with another one), or a transport,
            which the client closes at its end.
        fl_name: name of the job; None: the trainer's class name.
        client_id: identity towards the servers, unique in the job; None: a random UUID, or that of ``identity``.
        policy: waits and limits.
        on_iteration: called after every attempt at an iteration; what it raises ends ``run``.
        timeout: seconds, see HttpTransport.
        ca_file: PEM file, see HttpTransport.
        rotate: change the server at every request.
        clock: milliseconds since the epoch.
        monotonic: seconds, for durations.
        sleep: waits so many seconds; None: until ``stop`` at most.
        chance: random number in 0..1 that spreads repeats.
        session: another way to take part than a device's; made for this ``fl_name`` and ``client_id``.
        identity: key and certificates, for jobs in which devices must sign.
        privacy: what a device adds to the job's protection and compression on its own.
        fit_name: the method that the user wrote for the training, for messages.

    Raises:
        ConfigError: the URLs or the CA file cannot be used, or ``client_id`` is not that of ``identity``.
    """

    def __init__(
        self,
        trainer: Trainer,
        server: str | Sequence[str] | Transport,
        *,
        fl_name: str | None = None,
        client_id: str | None = None,
        policy: Policy | None = None,
        on_iteration: Callable[[IterationReport], object] | None = None,
        timeout: float = 30.0,
        ca_file: str | None = None,
        rotate: bool = False,
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
        chance: Callable[[], float] = random.random,
        session: Session | None = None,
        identity: DeviceIdentity | None = None,
        privacy: PrivacyOptions | None = None,
        fit_name: str = "fit",
    ) -> None:
        self.client_id = _id_of(client_id, identity)
        self.fl_name = fl_name or type(trainer).__name__
        self._trainer = trainer
        self._fit_name = fit_name
        self._transport = (
            HttpTransport(server, timeout, ca_file, rotate=rotate, first=zlib.crc32(self.client_id.encode()))
            if isinstance(server, str | Sequence)
            else server
        )
        self._session = session or Session(
            self.fl_name, self.client_id, policy, identity, Protection(privacy)
        )
        self._on_iteration = on_iteration
        self._clock = clock
        self._monotonic = monotonic
        self._chance = chance
        self._stopping = threading.Event()
        self._sleep = sleep or self._stopping.wait
        self._counts = dict.fromkeys(IterationOutcome, 0)
        self._loss: float | None = None  # of the running attempt
        self._accuracy: float | None = None
        self._began: float | None = None

    def run(self) -> Summary:
        """Take part until the job ends, gives up or is stopped; to be called once.

        An exception of the trainer ends the run as FAILED, one of ``on_iteration`` is passed on.
        """
        try:
            return self._run()
        finally:
            self._transport.close()

    @property
    def stopping(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """End ``run`` soon: at once while it waits or talks to a server, else when the trainer returns.

        May be called from any thread; not from a signal handler, which may interrupt the thread that runs it.
        """
        self._stopping.set()
        self._transport.close()

    def _run(self) -> Summary:
        event = self._attempt("load", self._trainer.load, lambda sizes: Loaded(*map(int, sizes)))
        while True:
            action = self._session.step(event, self._clock(), self._chance())
            if isinstance(action, Finished):
                return self._summary(action)
            if not self._stopping.is_set():
                event = self._perform(action)
            if self._stopping.is_set():
                event = Stop()

    def _perform(self, action: Action) -> Event:
        match action:
            case Send():
                return self._post(action)
            case Sleep():
                log.debug("waiting %.3f s: %s", action.seconds, action.reason)
                self._sleep(action.seconds)
            case Evaluate():
                return self._attempt(
                    "evaluate", lambda: self._trainer.evaluate(action.weights), self._evaluated
                )
            case Fit():
                return self._attempt(
                    self._fit_name, lambda: self._trainer.fit(action.weights, action.config), self._fitted
                )
            case IterationDone():
                self._report(action)
        return Resumed()

    def _post(self, request: Send) -> Event:
        if self._began is None:
            self._began = self._monotonic()
        try:
            return Replied(*self._transport.post(request.round, request.body))
        except OSError as error:
            if not self._stopping.is_set():
                log.warning("%s failed: %s", request.round, error)
            return IoFailed(str(error))

    def _attempt(self, name: str, call: Callable[[], Any], event: Callable[[Any], Event]) -> Event:
        """Call the user's code and make an event of what it returns or raises."""
        try:
            return event(call())
        except Exception as error:
            log.exception("the trainer's %s() failed", name)
            return TrainerFailed(f"{name}(): {type(error).__name__}: {error}")

    def _evaluated(self, accuracy: Any) -> Event:
        self._accuracy = float(accuracy)
        return Evaluated(self._accuracy)

    def _fitted(self, result: Any) -> Event:
        if not isinstance(result, FitResult) or not isinstance(result.weights, Mapping):
            raise TypeError(f"a FitResult of a mapping was expected, not {result!r:.80}")
        self._loss = float(result.loss)
        return Fitted(result)

    def _report(self, done: IterationDone) -> None:
        self._counts[done.outcome] += 1
        seconds = 0.0 if self._began is None else self._monotonic() - self._began
        report = IterationReport(
            done.iteration, done.outcome, self._loss, self._accuracy, seconds, done.reason
        )
        self._loss = self._accuracy = self._began = None
        figures = {"loss": report.loss, "accuracy": report.accuracy}
        told = "".join(f", {name} {value:.4g}" for name, value in figures.items() if value is not None)
        if report.reason:
            log.info("iteration %d: to be tried again: %s", report.iteration, report.reason)
        else:
            log.info(
                "iteration %d: uploaded, and its model received%s, %.1f s",
                report.iteration,
                told,
                report.seconds,
            )
        if self._on_iteration is not None:
            self._on_iteration(report)

    def _summary(self, end: Finished) -> Summary:
        level = logging.ERROR if end.outcome is Outcome.FAILED else logging.INFO
        log.log(level, "%s: %s", end.outcome.value, end.reason)
        completed = self._counts[IterationOutcome.COMPLETED]
        restarted = self._counts[IterationOutcome.RESTARTED]
        return Summary(end.outcome, end.reason, completed, restarted, self._session.model)


def _id_of(client_id: str | None, identity: DeviceIdentity | None) -> str:
    """Return the id of a client: the one that is given, that of its certificate, or a random one."""
    if identity is None:
        return client_id or str(uuid.uuid4())
    if client_id not in (None, identity.fl_id):
        raise ConfigError(
            f"the client id {client_id} is not that of the device's certificate",
            hint=f"it is {identity.fl_id}",
        )
    return identity.fl_id
