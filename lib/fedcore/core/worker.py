"""What a hybrid worker does next: one state machine, from what it has seen to what it is to do.

A worker's life is a circle: look at the job, pull the aggregate of its iteration, train, look again, push the trained
weights, push loss and accuracy, look for the next iteration. ``step`` takes where the worker is and what has happened,
and returns where it is then, the one thing to do, and a remark for the log. It knows no clock and no chance: whoever
calls it brings a number for the jitter, and tells when a wait is over.

Rules kept here:

* What is pulled is trained, at once, for all steps; nothing is trained twice on one pull.
* Weights are pushed only while the job is still at the place (instance, iteration, attempt) whose aggregate they were
  trained from. Trained weights that are not pushed are remarked on.
* Metrics follow only an own push, or one that may be ours since an answer was lost; or the push of another worker that
  has not sent its own for STAND_IN_S, for it may be gone and the iteration waits for them.
* Every repetition comes after a wait. A place is left for good once its work is done or has turned out impossible.
* The end of the job is believed when the shared state says so and no server denies it. A disabled job is waited for,
  and so is a new instance of a finished one.

Source: MindSpore Federated 0.1, hybrid worker; pulling only every second time or never (sync_frequency 1), throwing the
first step of each period away, and asking a finished job for ever are its faults and not repeated here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from fedcore.core.admission import DISABLED_OR_FINISHED
from fedcore.core.job import RunningState
from fedcore.errors import LocalError

STAND_IN_S = 15.0  # of waiting for metrics that another worker owes
IDLE_PAUSE_S = 1.0  # between two looks at a job that has no work
_SHORT = (0.2, 0.5)  # seconds between two questions whether something is ready
_LONG = (0.5, 1.0)  # after a failure
_LATE = "Model of iteration of "  # how the answer to a push begins that comes after another one; the protocol's words


class Step(StrEnum):
    """Where a worker is."""

    LOOKING = "looking"  # for a place to work at
    PROBING = "probing"  # whether a job that is said to be finished is
    PULLING = "pulling"
    TRAINING = "training"
    CHECKING = "checking"  # that the job is still where the weights in hand belong
    PUSHING = "pushing"
    REPORTING = "reporting"
    FINISHED = "finished"  # with the job, unless that begins anew
    ENDED = "ended"


class Remark(StrEnum):
    """What is worth a line in the log."""

    PULLED = "pulled"
    LAST_GOOD = "last_good"  # the aggregate is not finite: the last good weights are trained instead
    SKIPPED = "skipped"  # the aggregate is not finite, and there are no other weights
    MISPLACED = "misplaced"  # the weights of another iteration came
    TRAINED = "trained"
    DIVERGED = "diverged"
    DISCARDED = "discarded"  # trained weights that nobody can use any more
    REFUSED = "refused"
    PUSHED = "pushed"
    LATE = "late"
    PERHAPS_OURS = "perhaps_ours"
    STANDS_IN = "stands_in"
    DONE = "done"
    DISABLED = "disabled"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Place:
    """What an aggregate belongs to.

    Attributes:
        instance: name of the job's instance.
        iteration: from 1.
        attempt: at this iteration, from 1; always 1 with servers that know no attempts.
    """

    instance: str
    iteration: int
    attempt: int = 1

    def follows(self, other: Place) -> bool:
        """Tell whether this place is a later one; those of another instance are."""
        return self.instance != other.instance or (self.iteration, self.attempt) > (
            other.iteration,
            other.attempt,
        )


# ---- events


@dataclass(frozen=True, slots=True)
class Looked:
    """The shared state was seen."""

    place: Place
    running: RunningState


@dataclass(frozen=True, slots=True)
class Blind:
    """The shared state could not be seen, or tells of no job yet."""


@dataclass(frozen=True, slots=True)
class Waited:
    """A wait is over."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """Weights have come, and those of the right names and sizes.

    Attributes:
        iteration: whose they are.
        finite: whether they could be given to the trainer; False: one holds NaN or infinity.
    """

    iteration: int
    finite: bool


@dataclass(frozen=True, slots=True)
class Trained:
    """A training has ended well.

    Attributes:
        loss: finite.
        accuracy: finite, normally 0..1.
    """

    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Diverged:
    """A training has ended with weights, a loss or an accuracy that are not finite."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A server has answered with a table.

    Attributes:
        code: its retcode.
        text: its reason.
        doubt: whether a server that was asked before may have done what it was asked, though its answer is lost.
    """

    code: int
    text: str = ""
    doubt: bool = False


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Servers have answered, but only that they cannot serve now.

    Attributes:
        text: of the last one.
        doubt: as for Answered.
    """

    text: str
    doubt: bool = False


@dataclass(frozen=True, slots=True)
class Unreachable:
    """No server has given an answer that could be read.

    Attributes:
        doubt: as for Answered.
    """

    doubt: bool = False


Event = Looked | Blind | Waited | Pulled | Trained | Diverged | Answered | Unavailable | Unreachable


# ---- effects


@dataclass(frozen=True, slots=True)
class Look:
    """Look at the shared state: Looked or Blind."""


@dataclass(frozen=True, slots=True)
class Pull:
    """Ask for the aggregate: Pulled, Answered, Unavailable or Unreachable."""

    place: Place


@dataclass(frozen=True, slots=True)
class Train:
    """Train from what was pulled: Trained or Diverged.

    Attributes:
        steps: how many, at least 1.
        from_last_good: begin with the last good weights instead of those that have just come.
    """

    steps: int
    from_last_good: bool = False


@dataclass(frozen=True, slots=True)
class Push:
    """Offer the trained weights: Answered, Unavailable or Unreachable."""

    place: Place


@dataclass(frozen=True, slots=True)
class PushMetrics:
    """Tell loss and accuracy: Answered, Unavailable or Unreachable."""

    place: Place
    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Let time go by: Waited.

    Attributes:
        seconds: > 0.
    """

    seconds: float


@dataclass(frozen=True, slots=True)
class End:
    """Stop working; nothing follows.

    Attributes:
        fault: what somebody has to mend first.
    """

    fault: str


Effect = Look | Pull | Train | Push | PushMetrics | Wait | End


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a worker is.

    Attributes:
        steps: of one training, at least 1.
        step: what it is about.
        place: what the weights in hand belong to, or what is asked for.
        done: the last place where nothing is left to do, None before the first.
        loss: of the last training.
        accuracy: of the last training.
        has_good: whether there are finite weights of the job to go back to.
        pushed: whether the weights in hand are with the servers.
        doubt: whether they may be, since an answer was lost.
        late: whether another worker was faster at ``done``.
        pause: seconds of the last wait.
        waited: seconds waited since ``done`` was.
    """

    steps: int
    step: Step = Step.LOOKING
    place: Place | None = None
    done: Place | None = None
    loss: float = 0.0
    accuracy: float = 0.0
    has_good: bool = False
    pushed: bool = False
    doubt: bool = False
    late: bool = False
    pause: float = 0.0
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class Turn:
    """What follows from an event.

    Attributes:
        progress: where the worker is now.
        effect: what it is to do.
        remark: what to log, None for nothing.
    """

    progress: Progress
    effect: Effect
    remark: Remark | None = None


def begin(steps: int) -> Turn:
    """Return the first turn of a worker.

    Args:
        steps: the worker's sync_frequency, training steps from a pull to a push, at least 1.
    """
    if steps < 1:
        raise LocalError(f"a training has {steps} steps")
    return Turn(Progress(steps), Look())


def step(now: Progress, event: Event, jitter: float) -> Turn:
    """Return what follows from an event.

    Args:
        now: where the worker is.
        event: what the last effect has brought.
        jitter: 0..1, spreads waits.

    Raises:
        LocalError: the event is none that the last effect can bring.
    """
    turn = _STEPS[now.step](now, event, jitter) if now.step in _STEPS else None
    if turn is None:
        raise LocalError(f"{type(event).__name__} came to a worker that is {now.step}")
    return turn


# ---- steps: each returns None for an event that cannot come in it


def _looking(now: Progress, event: Event, jitter: float) -> Turn | None:
    match event:
        case Waited():
            return Turn(replace(now, waited=now.waited + now.pause), Look())
        case Blind():
            return _wait(now, Step.LOOKING, _LONG, jitter)
        case Looked(place, running):
            return _seen(now, place, running, jitter)
    return None


def _seen(now: Progress, place: Place, running: RunningState, jitter: float) -> Turn:
    """Go on from where the job is; there are no weights in hand."""
    if running is RunningState.DISABLE:
        return _disabled(now, Step.LOOKING)
    if running is not RunningState.RUNNING:
        return Turn(replace(now, step=Step.PROBING, place=place), Pull(place))
    if now.done is not None and not place.follows(now.done):
        if now.late and place == now.done and now.waited >= STAND_IN_S:
            return _report(replace(now, late=False), place, Remark.STANDS_IN)
        return _wait(now, Step.LOOKING, _SHORT, jitter)
    fresh = replace(now, step=Step.PULLING, place=place, pushed=False, doubt=False, late=False)
    return Turn(fresh, Pull(place))


def _probing(now: Progress, event: Event, jitter: float) -> Turn | None:
    match event:
        case Unavailable(text=text) if text == DISABLED_OR_FINISHED:
            return _finished(now, Remark.FINISHED)
        case Unreachable():  # the servers of a finished job may have left
            return _finished(now, Remark.FINISHED)
        case Unavailable() | Answered() | Pulled():
            return _wait(now, Step.LOOKING, _LONG, jitter)
    return None


def _resting(now: Progress, event: Event, jitter: float) -> Turn | None:
    match event:
        case Waited():
            return Turn(now, Look())
        case Blind():
            return _finished(now)
        case Looked(place, running) if running in (RunningState.RUNNING, RunningState.DISABLE):
            return _seen(replace(now, step=Step.LOOKING, waited=0.0), place, running, jitter)
        case Looked():
            return _finished(now)
    return None


def _pulling(now: Progress, event: Event, jitter: float) -> Turn | None:
    place = _held(now)
    match event:
        case Pulled(iteration=iteration) if iteration != place.iteration:
            return _wait(now, Step.LOOKING, _SHORT, jitter, Remark.MISPLACED)
        case Pulled(finite=True):
            good = replace(now, step=Step.TRAINING, has_good=True)
            return Turn(good, Train(now.steps), Remark.PULLED)
        case Pulled() if now.has_good:
            return Turn(replace(now, step=Step.TRAINING), Train(now.steps, True), Remark.LAST_GOOD)
        case Pulled():
            return _leave(now, jitter, Remark.SKIPPED)
        case Answered(code=400, text=text):
            ended = replace(now, step=Step.ENDED)
            return Turn(ended, End(f"the servers do not know what the trainer trains: {text}"))
        case Answered():
            return _wait(now, Step.LOOKING, _SHORT, jitter)
        case Unavailable() | Unreachable():
            return _wait(now, Step.LOOKING, _LONG, jitter)
    return None


def _training(now: Progress, event: Event, jitter: float) -> Turn | None:
    match event:
        case Trained(loss, accuracy):
            after = replace(now, step=Step.CHECKING, loss=loss, accuracy=accuracy)
            return Turn(after, Look(), Remark.TRAINED)
        case Diverged():
            return _leave(now, jitter, Remark.DIVERGED)
    return None


def _checking(now: Progress, event: Event, jitter: float) -> Turn | None:
    place = _held(now)
    match event:
        case Waited():
            return Turn(now, Look())
        case Blind():
            return _wait(now, Step.CHECKING, _LONG, jitter)
        case Looked(seen, running) if seen == place and running is RunningState.RUNNING:
            if now.pushed:
                return _report(now, place, None)
            return Turn(replace(now, step=Step.PUSHING), Push(place))
        case Looked(seen, running) if seen == place and running is RunningState.DISABLE:
            return _disabled(now, Step.CHECKING)
        case Looked(seen, running) if seen != place and not seen.follows(place):
            # Redis has forgotten something, which the servers will bring back
            return _wait(now, Step.CHECKING, _SHORT, jitter)
        case Looked(seen, running):
            remark = Remark.DONE if now.pushed else Remark.DISCARDED
            left = replace(now, step=Step.LOOKING, done=place, waited=0.0)
            return replace(_seen(left, seen, running, jitter), remark=remark)
    return None


def _pushing(now: Progress, event: Event, jitter: float) -> Turn | None:
    if not isinstance(event, Answered | Unavailable | Unreachable):
        return None
    place = _held(now)
    now = replace(now, doubt=now.doubt or event.doubt)
    match event:
        case Answered(code=200, text=text) if text.startswith(_LATE) and not now.doubt:
            return _leave(replace(now, late=True), jitter, Remark.LATE)
        case Answered(code=200, text=text):
            remark = Remark.PERHAPS_OURS if text.startswith(_LATE) else Remark.PUSHED
            return _report(replace(now, pushed=True), place, remark)
        case Answered(code=400):
            return _leave(now, jitter, Remark.REFUSED)
        case Answered():
            return _wait(now, Step.CHECKING, _SHORT, jitter)
    return _wait(now, Step.CHECKING, _LONG, jitter)


def _reporting(now: Progress, event: Event, jitter: float) -> Turn | None:
    match event:
        case Answered(code=200):
            return _leave(now, jitter, Remark.DONE)
        case Answered():
            return _wait(now, Step.CHECKING, _SHORT, jitter)
        case Unavailable() | Unreachable():
            return _wait(now, Step.CHECKING, _LONG, jitter)
    return None


_STEPS = {
    Step.LOOKING: _looking,
    Step.PROBING: _probing,
    Step.FINISHED: _resting,
    Step.PULLING: _pulling,
    Step.TRAINING: _training,
    Step.CHECKING: _checking,
    Step.PUSHING: _pushing,
    Step.REPORTING: _reporting,
}


# ---- what several steps end with


def _held(now: Progress) -> Place:
    if now.place is None:
        raise LocalError(f"a worker that is {now.step} has no place")
    return now.place


def _wait(
    now: Progress, then: Step, between: tuple[float, float], jitter: float, remark: Remark | None = None
) -> Turn:
    shortest, longest = between
    seconds = shortest + (longest - shortest) * jitter
    return Turn(replace(now, step=then, pause=seconds), Wait(seconds), remark)


def _disabled(now: Progress, then: Step) -> Turn:
    return Turn(replace(now, step=then, pause=IDLE_PAUSE_S), Wait(IDLE_PAUSE_S), Remark.DISABLED)


def _leave(now: Progress, jitter: float, remark: Remark) -> Turn:
    """Have nothing left to do at this place."""
    return _wait(replace(now, done=now.place, waited=0.0), Step.LOOKING, _SHORT, jitter, remark)


def _report(now: Progress, place: Place, remark: Remark | None) -> Turn:
    reporting = replace(now, step=Step.REPORTING, place=place, pushed=True)
    return Turn(reporting, PushMetrics(place, now.loss, now.accuracy), remark)


def _finished(now: Progress, remark: Remark | None = None) -> Turn:
    """Have nothing to do until the job begins anew."""
    return Turn(replace(now, step=Step.FINISHED, pause=IDLE_PAUSE_S), Wait(IDLE_PAUSE_S), remark)
