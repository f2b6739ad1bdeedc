"""One device's side of the protocol, without sockets, clocks or chance.

``Session.step(event, now, jitter)`` takes what happened and gives the one action to perform next (steps.py
lists both). An iteration is startFLJob, evaluate (if there are evaluation data), fit, updateModel, then
getModel until it answers 200; the loop ends after the plan's last one. replies.py says what a reply means.

Where we are kinder than the original device client:

* a refusal (300) may come ``Policy.max_restarts`` times instead of once, and never ends the last iteration;
* a next_req_time that is missing, not a number or past means "after retry_time", growing with every repeat;
* a failed connection or a passing HTTP error repeats the same bytes, all our rounds being idempotent.

How trained weights become an upload, and the chance that this needs, is the part of ``protection.py``; a plan that
asks for what is not known ends the session with that reason. Times are milliseconds since the epoch, durations
seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum, auto
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from fedclient.cipher_session import CipherSigner, Masking, Refused
from fedclient.protection import KNOWN, STABLE_MASKS, Protection, Terms
from fedclient.replies import (
    CIPHER_REPLIES,
    DEVICE_MODES,
    Verdict,
    clip,
    come_back,
    fault_of,
    judge,
    weights_in,
)
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
from fedclient.trainer import FitConfig, Weights
from fedcore.errors import ArrayError, ConfigError, LocalError, MalformedRequest, NonFinite
from fedcore.wire.arrays import Floats, all_finite
from fedcore.wire.codec import encode
from fedcore.wire.messages import (
    CipherReply,
    CipherRound,
    CompressType,
    Reply,
    Request,
    RequestFLJob,
    RequestGetModel,
    RequestUpdateModel,
    ResponseFLJob,
    ResponseGetModel,
    ResponseUpdateModel,
    Round,
    UnsupervisedEvalFlg,
    UnsupervisedEvalItem,
    UnsupervisedEvalItems,
)

MAX_DATA_SIZE = 65_535  # training samples; more is refused by every server
DOWNLOADS = (CompressType.NO_COMPRESS, CompressType.QUANT)  # types in which a device takes a model


@dataclass(frozen=True, slots=True)
class Policy:
    """How patient a device is; all durations in seconds.

    Attributes:
        retry_time: wait after a refusal without a usable next_req_time, and after "not ready" texts.
        max_restarts: refusals in a row, with no finished iteration between them, before the device gives up.
        max_wait: the longest single wait for a next_req_time.
        io_retry_time: wait before the first repeat of a request that met an I/O error.
        max_io_retries: repeats of one request before the device gives up.
        max_backoff: the longest wait that doubling may reach.
        poll_interval: pause between two getModel requests.
        poll_patience: how long an iteration's model is waited for.
    """

    retry_time: float = 10.0
    max_restarts: int = 100
    max_wait: float = 1800.0
    io_retry_time: float = 0.5
    max_io_retries: int = 10
    max_backoff: float = 60.0
    poll_interval: float = 1.0
    poll_patience: float = 1800.0

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, count = getattr(self, setting.name), setting.name in ("max_restarts", "max_io_retries")
            if not (value >= 0 if count else 0 < value < math.inf):
                hint = "0 or more" if count else "a number of seconds above 0"
                raise ConfigError(f"{setting.name} is {value}", hint=hint)

    def backoff(self, base: float, attempt: int, jitter: float) -> float:
        """Return the seconds before a repeat: ``base``, doubled per earlier one, up to half more by chance.

        Args:
            base: seconds before the first repeat.
            attempt: number of this repeat, from 1.
            jitter: chance, 0 <= jitter < 1.
        """
        longest = max(base, self.max_backoff)
        return min(base * 2.0 ** min(attempt - 1, 30), longest) * (1 + jitter / 2)


def evaluation_of(vector: Floats | None) -> UnsupervisedEvalItems | None:
    """Return a trainer's evaluation vector as it travels, None if there is none.

    Raises:
        NonFinite: NaN or infinity.
        TypeError, ValueError: not an array of numbers.
    """
    if vector is None:
        return None
    with np.errstate(over="ignore"):
        values = np.asarray(vector).reshape(-1).astype(np.float32, casting="same_kind")
    if not all_finite(values):
        raise NonFinite("the evaluation vector holds NaN or infinity")
    return UnsupervisedEvalItems((UnsupervisedEvalItem("", values),))


def float32(value: object) -> float | None:
    """Return a number as a finite float32, None if it is none."""
    try:
        with np.errstate(over="ignore"):
            number = float(np.float32(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


class Phase(Enum):
    """What the session waits for."""

    LOADING = auto()
    STARTING = auto()
    EVALUATING = auto()
    EXCHANGING = auto()
    FITTING = auto()
    UPLOADING = auto()
    FETCHING = auto()
    PAUSED = auto()
    OVER = auto()


_WAITS_FOR: Mapping[Round, Phase] = {
    "startFLJob": Phase.STARTING,
    "updateModel": Phase.UPLOADING,
    "getModel": Phase.FETCHING,
    **dict.fromkeys(CIPHER_REPLIES, Phase.EXCHANGING),
}

_Then = Callable[[int], Action]


class Signer(CipherSigner, Protocol):
    """Signs the requests that a device must sign; see ``fedclient.identity``."""

    def signed_start(self, request: RequestFLJob) -> RequestFLJob: ...

    def signed_update(self, request: RequestUpdateModel) -> RequestUpdateModel: ...


def _equal(one: Weights, other: Weights) -> bool:
    """Tell whether two models are the same, bit for bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


class Session:
    """The state of one device in one job.

    Attributes:
        iteration: the number last named by a server, 0 at first.
        model: the newest global weights, name -> float32[n], flat, read-only; empty at first.
    """

    MODES: ClassVar[Collection[str]] = DEVICE_MODES  # of servers, in which this is how one takes part
    PROTECTIONS: ClassVar[Collection[str]] = KNOWN  # encrypt types that can be followed
    DOWNLOADS: ClassVar[Collection[CompressType]] = DOWNLOADS

    def __init__(
        self,
        fl_name: str,
        fl_id: str,
        policy: Policy | None = None,
        signer: Signer | None = None,
        protection: Protection | None = None,
    ) -> None:
        self.iteration = 0
        self.model: dict[str, Floats] = {}
        self._fl_name = fl_name
        self._fl_id = fl_id
        self._policy = policy or Policy()
        self._signer = signer
        self._protection = protection or Protection()
        self._terms = Terms(0)  # of the iteration's upload
        self._masking: Masking | None = None  # of the iteration, if its uploads are masked
        self._masked_from: Weights = {}  # weights that the masking's iteration began with
        self._due: list[CipherRound] = []  # the first of them is being asked
        self._after_rounds: _Then | None = None
        self._sizes = Loaded(0)
        self._last_iteration = 1  # the plan's
        self._accuracy = 0.0  # stays so without evaluation data
        self._config: FitConfig | None = None
        self._vector_wanted = False  # whether the server asks for evaluation vectors
        self._poll_until = 0  # ms since the epoch
        self._restarts = 0  # since the last finished iteration
        self._undated = 0  # of these, the latest in a row without a usable time
        self._io_failures = 0  # since the last reply
        self._request: Send | None = None
        self._then: _Then | None = None  # what follows the pause
        self._phase = Phase.LOADING
        self._end: Finished | None = None

    def step(self, event: Event, now: int, jitter: float = 0.0) -> Action:
        """Take an event and return the action to perform next.

        Args:
            event: what came of the previous action, or ``Stop``.
            now: milliseconds since the epoch.
            jitter: chance that spreads the repeats, 0 <= jitter < 1.

        Raises:
            LocalError: the event does not answer the previous action; always a bug of the caller.
        """
        if self._end is not None:
            return self._end
        if isinstance(event, Stop):
            return self._finish(Outcome.STOPPED, "stopped on request")
        try:
            rule = self.TABLE[self._phase, type(event)]
        except KeyError:
            raise LocalError(f"{type(event).__name__} does not belong to {self._phase.name}") from None
        return rule(self, event, now, jitter)

    # -- rules: what follows each event

    def _loaded(self, event: Loaded, now: int, jitter: float) -> Action:
        if not 1 <= event.data_size <= MAX_DATA_SIZE or event.eval_data_size < 0:
            sizes = f"{event.data_size} training and {event.eval_data_size} evaluation samples"
            return self._finish(Outcome.FAILED, f"{sizes}: 1 to {MAX_DATA_SIZE} and 0 or more are possible")
        self._sizes = event
        return self._ask_start(now)

    def _replied(self, event: Replied, now: int, jitter: float) -> Action:
        assert self._request is not None
        judgement = judge(self._request.round, event.status, event.body)
        reason = f"{self._request.round}: {judgement.reason}"
        if judgement.verdict is Verdict.REPEAT:
            return self._repeat(reason, now, jitter)
        self._io_failures = 0
        match judgement.verdict:
            case Verdict.SUCCESS:
                try:
                    return self._succeeded(judgement.reply, now)
                except MalformedRequest as error:
                    return self._restart(f"{reason}: {error}", None, now, jitter)
                except Refused as error:
                    self._masking = None
                    return self._restart(f"{reason}: {error}", None, now, jitter)
            case Verdict.WAIT:
                return self._poll(reason, now)
            case Verdict.RESTART:
                return self._restart(reason, judgement.reply, now, jitter)
            case Verdict.AGAIN:
                return self._restart(reason, None, now, jitter)
            case Verdict.OVER:
                return self._finish(Outcome.JOB_OVER, judgement.reason)
        return self._finish(Outcome.FAILED, reason)

    def _succeeded(self, reply: Reply | None, now: int) -> Action:
        match reply:
            case ResponseFLJob():
                return self._started(reply, now)
            case ResponseUpdateModel():
                self._protection.taken()
                after = self._masking.after if self._masking else ()
                return self._go_through(after, self._ask_first_model, now)
            case ResponseGetModel():
                return self._received(reply, now)
            case None:
                raise MalformedRequest("no table")
        return self._exchanged(reply, now)

    def _started(self, reply: ResponseFLJob, now: int) -> Action:
        plan = reply.fl_plan_config
        if plan is None:
            raise MalformedRequest("the reply holds no plan")
        terms = Terms.of(reply)
        faults = fault_of(reply, plan, self.MODES, self.DOWNLOADS), self._fault_of(terms)
        if any(faults):
            return self._finish(Outcome.FAILED, clip("; ".join(filter(None, faults))))
        if reason := self._protection.exhausted(terms):
            return self._finish(Outcome.STOPPED, reason)
        self._terms = terms
        self._take(reply)
        self.iteration = reply.iteration
        self._last_iteration = plan.iterations
        self._vector_wanted = reply.unsupervised_eval_flg == UnsupervisedEvalFlg.EVAL_ENABLE
        self._config = FitConfig(plan.epochs, plan.mini_batch, plan.lr, reply.iteration)
        return self._begin(now)

    def _fault_of(self, terms: Terms) -> str:
        """Say why an upload cannot be made under these terms; empty if it can."""
        return terms.fault(self.PROTECTIONS)

    def _take(self, reply: ResponseFLJob) -> None:
        """Keep what the answer to startFLJob brings."""
        self.model = weights_in(reply)

    def _begin(self, now: int) -> Action:
        """Go on from the global weights in ``model``."""
        if self._sizes.eval_data_size == 0:
            return self._prepare(now)
        self._phase = Phase.EVALUATING
        return Evaluate(self.model)

    def _evaluated(self, event: Evaluated, now: int, jitter: float) -> Action:
        accuracy = float32(event.accuracy)
        if accuracy is None:
            return self._finish(Outcome.FAILED, f"the accuracy is {clip(str(event.accuracy))}")
        self._accuracy = accuracy
        return self._prepare(now)

    # -- cipher rounds

    def _prepare(self, now: int) -> Action:
        """Go through the rounds that come before the training, if there are any."""
        self._masking = self._masking_of_iteration() if self._terms.is_masked else None
        if self._masking is None:
            return self._fit()
        return self._go_through(self._masking.before, self._fit_once, now)

    def _masking_of_iteration(self) -> Masking:
        """Return what an earlier attempt at the same iteration has begun, or begin."""
        known, terms = self._masking, self._terms
        if known is not None and known.iteration == terms.iteration and _equal(self._masked_from, self.model):
            return known
        self._masked_from = self.model
        return Masking(
            self._fl_id,
            terms.iteration,
            terms.masks,
            self._protection.random,
            stable=terms.encrypt_type == STABLE_MASKS,
            layout=self._protection.options.mask_layout,
            least_threshold=self._protection.options.least_threshold,
            signer=self._signer,
        )

    def _fit_once(self, now: int) -> Action:
        """Train, or send again what was made under the same mask: two uploads under one mask would tell a lot."""
        assert self._masking is not None
        if self._masking.upload is None:
            return self._fit()
        return self._send_update(replace(self._masking.upload, timestamp=str(now)))

    def _go_through(self, rounds: Iterable[CipherRound], then: _Then, now: int) -> Action:
        """Go through cipher rounds one after the other."""
        self._due, self._after_rounds = list(rounds), then
        return self._next_round(now)

    def _next_round(self, now: int) -> Action:
        if not self._due:
            assert self._after_rounds is not None
            return self._after_rounds(now)
        self._be_patient(now)
        return self._ask_round(now)

    def _ask_round(self, now: int) -> Action:
        assert self._masking is not None
        return self._send(self._due[0], self._masking.request(self._due[0], now))

    def _exchanged(self, reply: CipherReply, now: int) -> Action:
        assert self._masking is not None
        self._masking.take(reply, now)
        del self._due[0]
        return self._next_round(now)

    # -- training and upload

    def _fit(self) -> Action:
        assert self._config is not None
        self._phase = Phase.FITTING
        return Fit(self.model, self._config)

    def _fitted(self, event: Fitted, now: int, jitter: float) -> Action:
        loss = float32(event.result.loss)
        if loss is None:
            return self._finish(Outcome.FAILED, f"the loss is {clip(str(event.result.loss))}")
        try:
            upload = self._upload(event.result.weights)
        except (ArrayError, AttributeError, TypeError, ValueError) as error:
            return self._finish(Outcome.FAILED, f"the trained weights cannot be sent: {error}")
        try:
            evaluation = evaluation_of(event.result.evaluation) if self._vector_wanted else None
        except (ArrayError, TypeError, ValueError) as error:
            return self._finish(Outcome.FAILED, f"the evaluation vector cannot be sent: {error}")
        request = replace(
            upload,
            fl_name=self._fl_name,
            fl_id=self._fl_id,
            iteration=self.iteration,
            timestamp=str(now),
            upload_loss=loss,
            upload_accuracy=self._accuracy,
            unsupervised_eval_items=evaluation,
        )
        if self._masking is not None:
            self._masking.upload = request
        return self._send_update(request)

    def _send_update(self, request: RequestUpdateModel) -> Action:
        return self._send("updateModel", self._signer.signed_update(request) if self._signer else request)

    def _upload(self, trained: Weights) -> RequestUpdateModel:
        """Return the fields of an updateModel that carry weights; what it raises says that they cannot be sent."""
        mask = None
        if self._masking is not None:  # of all weights: the others' masks must find their counterparts
            trained = {**self.model, **trained}
            mask = self._masking.mask(list(self.model), self.model)
        return self._protection.protect(self._terms, self.model, trained, self._sizes.data_size, mask)

    def _received(self, reply: ResponseGetModel, now: int) -> Action:
        weights = weights_in(reply)  # those not aggregated may be absent: they keep their values
        if any(name not in self.model or self.model[name].size != weights[name].size for name in weights):
            raise MalformedRequest("the new model is not that of startFLJob")
        self._protection.completed(self._terms, self.model, weights)
        self.model = {**self.model, **weights}
        self._restarts = self._undated = 0
        self._masking = None
        return self._pause(IterationDone(self.iteration, IterationOutcome.COMPLETED), self._next)

    def _io_failed(self, event: IoFailed, now: int, jitter: float) -> Action:
        return self._repeat(clip(event.error), now, jitter)

    def _trainer_failed(self, event: TrainerFailed, now: int, jitter: float) -> Action:
        return self._finish(Outcome.FAILED, f"the trainer failed: {event.error}")

    def _resumed(self, event: Resumed, now: int, jitter: float) -> Action:
        assert self._then is not None
        return self._then(now)

    # -- requests

    @property
    def _declared_size(self) -> int:
        """The data size that startFLJob names."""
        return self._sizes.data_size

    def _next(self, now: int) -> Action:
        if self.iteration >= self._last_iteration:
            return self._finish(Outcome.COMPLETED, f"iteration {self.iteration} was the last")
        if reason := self._protection.exhausted(self._terms):  # before a place is taken
            return self._finish(Outcome.STOPPED, reason)
        return self._ask_start(now)

    def _ask_start(self, now: int) -> Action:
        request = RequestFLJob(
            fl_name=self._fl_name,
            fl_id=self._fl_id,
            iteration=self.iteration,
            data_size=self._declared_size,
            timestamp=str(now),
            download_compress_types=self._offered(),
            eval_data_size=self._sizes.eval_data_size,
        )
        return self._send("startFLJob", self._signer.signed_start(request) if self._signer else request)

    def _ask_first_model(self, now: int) -> Action:
        self._be_patient(now)
        return self._ask_model(now)

    def _ask_model(self, now: int) -> Action:
        request = RequestGetModel(self._fl_name, self.iteration, str(now), self._offered())
        return self._send("getModel", request)

    def _offered(self) -> npt.NDArray[np.int8]:
        return np.array(self.DOWNLOADS, np.int8)

    def _send(self, round_: Round, message: Request) -> Action:
        return self._dispatch(Send(round_, encode(message)))

    def _dispatch(self, request: Send) -> Action:
        self._request = request
        self._phase = _WAITS_FOR[request.round]
        return request

    # -- detours

    def _be_patient(self, now: int) -> None:
        """Begin to wait for what a round asks for."""
        self._poll_until = now + round(self._policy.poll_patience * 1000)

    def _poll(self, reason: str, now: int) -> Action:
        assert self._request is not None
        fetching = self._request.round == "getModel"
        if now >= self._poll_until:
            wanted = "no model" if fetching else f"no answer to {self._request.round}"
            waited = f"iteration {self.iteration} gave {wanted} in {self._policy.poll_patience:g} s"
            return self._finish(Outcome.FAILED, f"{waited}: {reason}")
        again = self._ask_model if fetching else self._ask_round
        return self._pause(Sleep(self._policy.poll_interval, reason), again)

    def _repeat(self, reason: str, now: int, jitter: float) -> Action:
        """Send the same bytes again after a pause."""
        assert self._request is not None
        request = self._request
        self._io_failures += 1
        if self._io_failures > self._policy.max_io_retries:
            return self._finish(
                Outcome.FAILED, f"{self._io_failures} tries without answer; the last: {reason}"
            )
        seconds = self._policy.backoff(self._policy.io_retry_time, self._io_failures, jitter)
        return self._pause(Sleep(seconds, reason), lambda now: self._dispatch(request))

    def _restart(self, reason: str, reply: Reply | None, now: int, jitter: float) -> Action:
        """Report the refusal, wait as long as the server wishes, and begin with startFLJob."""
        self._restarts += 1
        if self._restarts > self._policy.max_restarts:
            return self._finish(
                Outcome.FAILED, f"refused {self._restarts} times in a row; the last: {reason}"
            )
        if isinstance(reply, ResponseFLJob) and reply.iteration > 0:
            self.iteration = reply.iteration
        sleep = Sleep(self._wait(come_back(reply), now, jitter), reason)
        done = IterationDone(self.iteration, IterationOutcome.RESTARTED, reason)
        return self._pause(done, lambda now: self._pause(sleep, self._ask_start))

    def _wait(self, until: int | None, now: int, jitter: float) -> float:
        """Return the seconds until the time that a refusal names; a growing pause if it names none ahead."""
        if until is not None and until > now:
            self._undated = 0
            return min((until - now) / 1000, self._policy.max_wait)
        self._undated += 1
        return self._policy.backoff(self._policy.retry_time, self._undated, jitter)

    def _pause(self, action: Sleep | IterationDone, then: _Then) -> Action:
        self._phase = Phase.PAUSED
        self._then = then
        return action

    def _finish(self, outcome: Outcome, reason: str) -> Finished:
        self._phase = Phase.OVER
        self._request = self._then = None
        self._end = Finished(outcome, reason)
        return self._end

    TABLE: ClassVar[Mapping[tuple[Phase, type[Any]], Callable[..., Action]]] = {
        (Phase.LOADING, Loaded): _loaded,
        (Phase.LOADING, TrainerFailed): _trainer_failed,
        (Phase.STARTING, Replied): _replied,
        (Phase.STARTING, IoFailed): _io_failed,
        (Phase.EVALUATING, Evaluated): _evaluated,
        (Phase.EVALUATING, TrainerFailed): _trainer_failed,
        (Phase.FITTING, Fitted): _fitted,
        (Phase.FITTING, TrainerFailed): _trainer_failed,
        (Phase.EXCHANGING, Replied): _replied,
        (Phase.EXCHANGING, IoFailed): _io_failed,
        (Phase.UPLOADING, Replied): _replied,
        (Phase.UPLOADING, IoFailed): _io_failed,
        (Phase.FETCHING, Replied): _replied,
        (Phase.FETCHING, IoFailed): _io_failed,
        (Phase.PAUSED, Resumed): _resumed,
    }
