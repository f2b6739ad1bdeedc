"""One global iteration as a pure state machine.

    collecting -> sealed -> reducing -> candidate -> collecting of the next iteration
        ^             |         |           |
        +-------------+---------+-----------+   updates are lost: the next attempt of the same iteration

In hybrid training a worker trains the mean of the updates further, between reducing and candidate:

    reducing -> training -> trained -> candidate

With pairwise masks the mean of the updates is masked, and devices help to take the rest of the masks off:

    reducing -> unmasking -> candidate

There are no further attempts from unmasking on: the list of those whose updates count is told to devices once and never
changes, for two lists would have them tell both secrets of one client.

``step(state, event, now, policy)`` gives the next state and the effects to perform; everything that can change the
phase is in TABLE below. Redis holds the authority: an effect such as Seal is a compare-and-set there, and the
machine moves on with the event that reports its success. A lost compare-and-set is reported as Observed, with what
Redis really says.

The same machine runs on every server. One of them, the finaliser, makes the model: it holds the token of the
attempt, and the shared state takes a candidate or a publication only from the holder of the present token. Times
are seconds of the server's monotonic clock; arrays never enter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from fedcore.core.job import RunningState
from fedcore.errors import LocalError

SUCCESS = "Weight aggregation finished! This iteration is valid. Proceed to next iteration."
TRAINED_SUCCESS = "Push metrics finished! This iteration is valid. Proceed to next iteration."
UNMASKED_SUCCESS = "Weight unmask finished! This iteration is valid. Proceed to next iteration."

EXCHANGE_ROUNDS = ("exchangeKeys", "getKeys", "shareSecrets", "getSecrets")  # before the updates
REPORTS_ROUND = "reconstructSecrets"
UNMASK_ROUNDS = ("getClientList", "pushListSign", "getListSign", REPORTS_ROUND)  # after them


def round_timeout(round_name: str) -> str:
    """Result text of an iteration whose round took longer than its window."""
    return f"Round {round_name} timeout! This iteration is invalid. Proceed to next iteration."


GLOBAL_TIMEOUT = "Global timer timeout! This iteration is invalid. Proceed to next iteration."


def aggregation_failed(number: int) -> str:
    """Result text of an iteration whose sum gave no model."""
    return f"Weight aggregation failed, current iteration: {number}"


def server_exited(number: int) -> str:
    """Result text of an iteration that lost accepted updates with their server."""
    return f"Server that processed updateModel requests exited, current iteration: {number}"


DISABLED = "Disable instance"


def base_lost(number: int) -> str:
    """Result text of an iteration whose clients trained from a model that nobody has any more; ours."""
    return f"The model before it is lost, current iteration: {number}"


def trained_lost(number: int) -> str:
    """Result text of an iteration whose worker's model nobody has any more; ours."""
    return f"The model that the worker trained is lost, current iteration: {number}"


def status_lost(number: int) -> str:
    """Result text of an iteration whose shared state vanished."""
    return f"The instance status info stored in distributed cache is empty, current iteration: {number}"


def unmask_failed(number: int) -> str:
    """Result text of an iteration whose devices' reports did not give the masks in time."""
    return f"Failed to unmask, current iteration: {number}"


def exchange_lost(number: int) -> str:
    """Result text of an iteration whose devices' keys and shares may be gone from the shared state; ours."""
    return f"Redis started anew while keys and shares were exchanged, current iteration: {number}"


class Phase(StrEnum):
    """Step within an iteration; the values are what Redis holds."""

    COLLECTING = "collecting"
    SEALED = "sealed"
    REDUCING = "reducing"
    UNMASKING = "unmasking"
    TRAINING = "training"
    TRAINED = "trained"
    CANDIDATE = "candidate"


WITH_WORKER = (Phase.TRAINING, Phase.TRAINED)  # the mean of the updates is with the worker
AWAITING = (Phase.UNMASKING, *WITH_WORKER)  # the mean of the updates waits for devices, or for a worker
MADE = (*AWAITING, Phase.CANDIDATE)  # the updates have become a model
TIMED = (Phase.COLLECTING, *AWAITING)


@dataclass(frozen=True, slots=True)
class Policy:
    """The numbers that rule an iteration.

    Attributes:
        start_threshold: places in an iteration (N), >= 1.
        update_threshold: updates that complete it (U), 1..N.
        start_window: seconds from the first to the last startFLJob.
        update_window: seconds from the first to the last updateModel.
        global_window: seconds from the first startFLJob to the quorum.
        last_iteration: the job's ``fl_iteration_num``.
        hybrid: whether a worker trains the mean of the updates further before it is published.
        unmask: whether devices help to take masks off the mean of the updates before it is published.
        cipher_window: seconds from the first to the last counted request of each cipher round.
        cipher_rounds: the cipher rounds that there are, and how many requests complete each.
    """

    start_threshold: int
    update_threshold: int
    start_window: float
    update_window: float
    global_window: float
    last_iteration: int
    hybrid: bool = False
    unmask: bool = False
    cipher_window: float = 0.0
    cipher_rounds: tuple[tuple[str, int], ...] = ()

    def completes(self, round_name: str) -> int:
        """Return how many requests complete a cipher round, 0 if there is no such round."""
        return dict(self.cipher_rounds).get(round_name, 0)


@dataclass(frozen=True, slots=True)
class CipherRound:
    """How far a cipher round has come.

    Attributes:
        name: as in the path of its requests.
        count: requests that are counted.
        first: time of the first of these.
    """

    name: str
    count: int
    first: float


@dataclass(frozen=True, slots=True)
class Iteration:
    """What a server knows of the current iteration.

    Attributes:
        number: from 1; ``last_iteration + 1`` once the job is finished.
        attempt: from 1; rises when a seal is undone.
        running: state of the job.
        selected: clients that hold a place.
        uploaded: updates accepted on all servers.
        started: time of the first startFLJob, or None.
        first_upload: time of the first accepted updateModel, or None.
        token: fencing token of the finaliser, or "".
        aggregate: digest of the mean of the updates, which a worker is to train further or masks are to be taken off,
            or "".
        digest: digest of the candidate model, or of the one that a worker has trained, or "".
        base: digest of the model that devices train from, "" if the shared state does not say.
        metrics: loss and accuracy that the worker tells of its model, or None.
        lost: updates of this iteration that were counted and then lost with their servers.
        interrupted: whether the job's being disabled has ended an iteration already.
        rounds: the cipher rounds that have begun.
    """

    number: int
    attempt: int = 1
    phase: Phase = Phase.COLLECTING
    running: RunningState = RunningState.RUNNING
    selected: int = 0
    uploaded: int = 0
    started: float | None = None
    first_upload: float | None = None
    token: str = ""
    aggregate: str = ""
    digest: str = ""
    base: str = ""
    metrics: tuple[float, float] | None = None
    lost: int = 0
    interrupted: bool = False
    rounds: tuple[CipherRound, ...] = ()

    @property
    def changing(self) -> bool:
        """Whether the quorum is reached and the next iteration is on its way."""
        return self.phase is not Phase.COLLECTING

    def round_named(self, name: str) -> CipherRound | None:
        """Return how far a cipher round has come, None if it has not begun."""
        return next((known for known in self.rounds if known.name == name), None)

    @property
    def rank(self) -> tuple[int, int, int]:
        """How far the iteration has come: number, attempt, phase. It never falls."""
        return self.number, self.attempt, list(Phase).index(self.phase)


# ---- events: what happened


@dataclass(frozen=True, slots=True)
class ClientSelected:
    """A startFLJob was granted the ``count``-th place."""

    number: int
    count: int


@dataclass(frozen=True, slots=True)
class UploadCounted:
    """An updateModel was accepted as the ``count``-th of an attempt."""

    number: int
    attempt: int
    count: int


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The clock moved; look at the deadlines."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """The shared state says that no further update of this attempt counts."""


@dataclass(frozen=True, slots=True)
class ReductionClaimed:
    """This server is the finaliser.

    Attributes:
        token: to be shown with everything that it asks of the shared state.
        phase: how far the finaliser before it had come, REDUCING if there was none.
        aggregate: of the iteration, see there.
        digest: of the iteration, see there.
    """

    token: str
    phase: Phase = Phase.REDUCING
    aggregate: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class ModelReduced:
    """The sum of all updates became a model; or what is left of it without the masks."""

    digest: str


@dataclass(frozen=True, slots=True)
class ReductionFailed:
    """The updates gave no usable model."""

    reason: str


@dataclass(frozen=True, slots=True)
class NotUnmasked:
    """The reports that have come do not give the masks yet; further ones may."""


@dataclass(frozen=True, slots=True)
class AggregateRecorded:
    """The shared state names the digest of what a worker is to train further, or masks are to be taken off."""

    digest: str


@dataclass(frozen=True, slots=True)
class CandidateRecorded:
    """The shared state names the digest of the new model."""

    digest: str


@dataclass(frozen=True, slots=True)
class CandidateSpread:
    """The new model survives the loss of this process."""


@dataclass(frozen=True, slots=True)
class UpdatesLost:
    """Accepted updates of this iteration are in ledgers that nobody can read.

    Attributes:
        number: the iteration.
        attempt: in which they were missed.
        ledgers: ids of these ledgers.
    """

    number: int
    attempt: int
    ledgers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Advanced:
    """The shared state went on to the next iteration by this server's doing."""

    success: bool
    result: str


@dataclass(frozen=True, slots=True)
class Observed:
    """What the shared state says, read afresh while this server performs no effect.

    Attributes:
        iteration: the state there.
        mine: whether this server is the finaliser.
        success: whether the previous iteration was valid.
        result: why it ended.
        orphaned: whether the finaliser is another server, and gone.
        fresh: whether nothing was counted here since the look: then it is right even where it says less.
        severed: whether what devices exchanged in this iteration may be gone: the shared state may have lost data.
    """

    iteration: Iteration
    mine: bool
    success: bool
    result: str
    orphaned: bool = False
    fresh: bool = False
    severed: bool = False


# ---- effects: what is to be done


@dataclass(frozen=True, slots=True)
class Seal:
    """Stop counting updates, by compare-and-set; report Sealed."""

    number: int
    attempt: int


@dataclass(frozen=True, slots=True)
class ClaimReduction:
    """Try to become the finaliser, by compare-and-set of the token; report ReductionClaimed.

    ``token`` is that of a finaliser that is gone, "" if there was none.
    """

    number: int
    attempt: int
    token: str = ""


@dataclass(frozen=True, slots=True)
class Reduce:
    """Sum the sealed partials of all servers into a model; report ModelReduced, ReductionFailed or UpdatesLost."""

    number: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Unmask:
    """Take the masks off the aggregate by what devices have reported; report ModelReduced or NotUnmasked."""

    number: int
    attempt: int
    aggregate: str


@dataclass(frozen=True, slots=True)
class RecordAggregate:
    """Name the digest of the mean of the updates, no model yet, in the shared state; report AggregateRecorded."""

    number: int
    attempt: int
    token: str
    digest: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Hold what a worker or devices are at work on, or the worker has trained, for as long as that takes."""

    number: int
    attempt: int
    phase: Phase
    digest: str


@dataclass(frozen=True, slots=True)
class RecordCandidate:
    """Name the new model's digest in the shared state; report CandidateRecorded."""

    number: int
    attempt: int
    token: str
    digest: str


@dataclass(frozen=True, slots=True)
class SpreadCandidate:
    """Write the new model's checkpoint and give the model to the other servers; report CandidateSpread."""

    number: int
    attempt: int
    digest: str


@dataclass(frozen=True, slots=True)
class Reopen:
    """Take the clients of lost ledgers off the iteration and collect again, by compare-and-set."""

    number: int
    attempt: int
    phase: Phase
    ledgers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Resume:
    """Take updates again after a seal was undone; nothing of this server's was consumed."""

    number: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Advance:
    """Go to the next iteration in the shared state, by compare-and-set; report Advanced.

    ``phase`` and ``token`` are part of the comparison: a server whose clock runs out must not end an iteration that
    another one has sealed meanwhile, and only the finaliser may publish.
    """

    number: int
    attempt: int
    success: bool
    result: str
    finishes: bool
    phase: Phase
    token: str = ""
    base: str = ""


@dataclass(frozen=True, slots=True)
class Open:
    """Begin to serve iteration ``number``; the iteration before it ended as told.

    ``base`` is the digest of the model that it starts from, "" if this server's newest one will do.
    """

    number: int
    ended: int
    success: bool
    result: str
    base: str = ""


@dataclass(frozen=True, slots=True)
class Interrupt:
    """End the iteration because the job was disabled; the shared state does so once."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Say in the shared state that the last iteration is over."""


@dataclass(frozen=True, slots=True)
class Leave:
    """The job is stopped for good: end this server."""


Event = (
    ClientSelected
    | UploadCounted
    | TimePassed
    | Sealed
    | ReductionClaimed
    | ModelReduced
    | ReductionFailed
    | NotUnmasked
    | AggregateRecorded
    | CandidateRecorded
    | CandidateSpread
    | UpdatesLost
    | Advanced
    | Observed
)
Effect = (
    Seal
    | ClaimReduction
    | Reduce
    | Unmask
    | RecordAggregate
    | Keep
    | RecordCandidate
    | SpreadCandidate
    | Reopen
    | Resume
    | Advance
    | Open
    | Interrupt
    | Finish
    | Leave
)
Step = tuple[Iteration, tuple[Effect, ...]]


class WrongPhase(LocalError):
    """An event arrived in a phase in which it cannot happen."""


def step(state: Iteration, event: Event, now: float, policy: Policy) -> Step:
    """Return the next state and the effects to perform.

    Raises:
        WrongPhase: the pair (phase, event) is not in TABLE.
    """
    try:
        rule = TABLE[state.phase, type(event)]
    except KeyError:
        raise WrongPhase(f"{type(event).__name__} cannot happen while {state.phase.value}") from None
    return rule(state, event, now, policy)


def deadline(state: Iteration, policy: Policy) -> tuple[float, str] | None:
    """Return when the iteration fails for want of time, and with which result; None while no clock runs.

    A round's clock runs from its first to its last counted request, the global one from the first startFLJob.
    From the quorum on nothing depends on devices, and only while a worker has the model, or devices help to take masks
    off it, the global clock runs again. Without the updates that it lost an iteration might have been in time, so their
    loss is the reason then.
    """
    if state.started is None or state.phase not in TIMED:
        return None
    clocks = [(state.started + policy.global_window, GLOBAL_TIMEOUT)]
    if state.phase is not Phase.COLLECTING:
        return min(clocks + _cipher_clocks(state, policy, UNMASK_ROUNDS))
    if _complete(state, policy):
        return None
    if state.selected < policy.start_threshold:
        clocks.append((state.started + policy.start_window, round_timeout("startFLJob")))
    if state.first_upload is not None:
        clocks.append((state.first_upload + policy.update_window, round_timeout("updateModel")))
    at, result = min(clocks + _cipher_clocks(state, policy, EXCHANGE_ROUNDS))
    return at, server_exited(state.number) if state.lost else result


def _cipher_clocks(state: Iteration, policy: Policy, names: tuple[str, ...]) -> list[tuple[float, str]]:
    """Return when each of these cipher rounds that has begun and is not complete is over, and with which result."""
    return [
        (known.first + policy.cipher_window, round_timeout(known.name))
        for known in state.rounds
        if known.name in names and known.count < policy.completes(known.name)
    ]


# ---- rules


def _on_selected(state: Iteration, event: ClientSelected, now: float, policy: Policy) -> Step:
    if event.number != state.number:
        return state, ()
    started = now if state.started is None else state.started
    return replace(state, selected=max(state.selected, event.count), started=started), ()


def _on_uploaded(state: Iteration, event: UploadCounted, now: float, policy: Policy) -> Step:
    if (event.number, event.attempt) != (state.number, state.attempt):
        return state, ()
    first = now if state.first_upload is None else state.first_upload
    state = replace(state, uploaded=max(state.uploaded, event.count), first_upload=first)
    return state, _seal_if_complete(state, policy)


def _complete(state: Iteration, policy: Policy) -> bool:
    return state.uploaded >= policy.update_threshold


def _seal_if_complete(state: Iteration, policy: Policy) -> tuple[Effect, ...]:
    return (Seal(state.number, state.attempt),) if _complete(state, policy) else ()


def _on_time(state: Iteration, event: TimePassed, now: float, policy: Policy) -> Step:
    """Look at the clock, and do again what may be lost with a connection without a trace in the shared state."""
    owed = _owed(state, policy)
    if owed or state.running is not RunningState.RUNNING:
        return state, owed
    due = deadline(state, policy)
    if due is None or now < due[0]:
        collecting = state.phase is Phase.COLLECTING
        return state, _seal_if_complete(state, policy) if collecting else ()
    return state, (_advance(state, policy, False, due[1]),)


def _on_sealed(state: Iteration, event: Sealed, now: float, policy: Policy) -> Step:
    return replace(state, phase=Phase.SEALED), (ClaimReduction(state.number, state.attempt),)


def _on_claimed(state: Iteration, event: ReductionClaimed, now: float, policy: Policy) -> Step:
    state = replace(
        state, phase=event.phase, token=event.token, aggregate=event.aggregate, digest=event.digest
    )
    return state, _finalise(state, policy)


def _finalise(state: Iteration, policy: Policy) -> tuple[Effect, ...]:
    """Return what the finaliser has to do."""
    match state.phase:
        case Phase.REDUCING:
            return (Reduce(state.number, state.attempt),)
        case Phase.UNMASKING:
            keep = Keep(state.number, state.attempt, state.phase, state.aggregate)
            if not _enough_reports(state, policy):
                return (keep,)
            return keep, Unmask(state.number, state.attempt, state.aggregate)
        case Phase.TRAINING:
            return (Keep(state.number, state.attempt, state.phase, state.aggregate),)
        case Phase.TRAINED:
            return (Keep(state.number, state.attempt, state.phase, state.digest),)
        case Phase.CANDIDATE:
            return (SpreadCandidate(state.number, state.attempt, state.digest),)
    return ()


def _enough_reports(state: Iteration, policy: Policy) -> bool:
    reports = state.round_named(REPORTS_ROUND)
    return reports is not None and reports.count >= policy.completes(REPORTS_ROUND)


def _on_reduced(state: Iteration, event: ModelReduced, now: float, policy: Policy) -> Step:
    further = state.phase is Phase.REDUCING and (policy.hybrid or policy.unmask)
    record = RecordAggregate if further else RecordCandidate
    return state, (record(state.number, state.attempt, state.token, event.digest),)


def _on_aggregate(state: Iteration, event: AggregateRecorded, now: float, policy: Policy) -> Step:
    phase = Phase.UNMASKING if policy.unmask else Phase.TRAINING
    state = replace(state, phase=phase, aggregate=event.digest)
    return state, _finalise(state, policy)


def _on_not_unmasked(state: Iteration, event: NotUnmasked, now: float, policy: Policy) -> Step:
    """Wait for further reports until the round is over; only the finaliser knows that they are needed."""
    reports = state.round_named(REPORTS_ROUND)
    if reports is None or now < reports.first + policy.cipher_window:
        return state, ()
    return state, (_advance(state, policy, False, unmask_failed(state.number)),)


def _on_reduction_failed(state: Iteration, event: ReductionFailed, now: float, policy: Policy) -> Step:
    return state, (_advance(state, policy, False, event.reason),)


def _on_recorded(state: Iteration, event: CandidateRecorded, now: float, policy: Policy) -> Step:
    state = replace(state, phase=Phase.CANDIDATE, digest=event.digest)
    return state, _finalise(state, policy)


def _on_spread(state: Iteration, event: CandidateSpread, now: float, policy: Policy) -> Step:
    result = TRAINED_SUCCESS if policy.hybrid else UNMASKED_SUCCESS if policy.unmask else SUCCESS
    return state, (_advance(state, policy, True, result),)


def _on_lost(state: Iteration, event: UpdatesLost, now: float, policy: Policy) -> Step:
    if (event.number, event.attempt) != (state.number, state.attempt):
        return state, ()
    if _is_frozen(state, policy):
        return state, (_advance(state, policy, False, server_exited(state.number)),)
    return state, (Reopen(state.number, state.attempt, state.phase, event.ledgers),)


def _is_frozen(state: Iteration, policy: Policy) -> bool:
    """Tell whether an iteration cannot go on without updates that it has counted.

    Devices may know the list of those that count; and masks that nobody can take off cancel only if all are there.
    """
    if policy.unmask:
        return state.phase in (Phase.UNMASKING, Phase.CANDIDATE)
    return bool(policy.cipher_rounds)


def _advance(state: Iteration, policy: Policy, success: bool, result: str) -> Advance:
    return Advance(
        state.number,
        state.attempt,
        success,
        result,
        finishes=state.number >= policy.last_iteration,
        phase=state.phase,
        token=state.token,
        base=state.digest if success else "",
    )


def _on_advanced(state: Iteration, event: Advanced, now: float, policy: Policy) -> Step:
    number = state.number + 1
    running = RunningState.FINISH if number > policy.last_iteration else state.running
    base = state.digest if event.success else state.base
    opened = Open(number, state.number, event.success, event.result, base)
    return Iteration(number, running=running, base=base), (opened,)


def _on_observed(state: Iteration, event: Observed, now: float, policy: Policy) -> Step:
    """Adopt what the shared state says, and take up this server's part in it.

    The shared state never falls behind for long: what it forgets is brought back. So a look that is behind is an old
    one, overtaken by this server's own doing while its answer was on the way, and so may its counts be.
    """
    seen = event.iteration
    if seen.rank < state.rank:
        return state, ()
    if not event.fresh and (seen.number, seen.attempt) == (state.number, state.attempt):
        selected, uploaded = max(seen.selected, state.selected), max(seen.uploaded, state.uploaded)
        seen = replace(seen, selected=selected, uploaded=uploaded)
    effects: tuple[Effect, ...] = ()
    rebased = (
        seen.base != state.base != ""
    )  # by somebody who missed the old one, or after a loss of Redis' data
    if seen.number != state.number or rebased:
        effects = (Open(seen.number, seen.number - 1, event.success, event.result, seen.base),)
    elif seen.attempt != state.attempt:
        effects = (Resume(seen.number, seen.attempt),)
    return seen, (*effects, *_part_in(seen, event, policy))


def _part_in(seen: Iteration, event: Observed, policy: Policy) -> tuple[Effect, ...]:
    """Return what this server has to do for the iteration as the shared state shows it."""
    if seen.running is RunningState.STOP:
        return (Leave(),)
    owed = _owed(seen, policy)
    if owed or seen.running is not RunningState.RUNNING:
        return owed
    if event.severed:
        return (_advance(seen, policy, False, exchange_lost(seen.number)),)
    match seen.phase:
        case Phase.COLLECTING:
            return _seal_if_complete(seen, policy)
        case Phase.SEALED:
            return (ClaimReduction(seen.number, seen.attempt),)
    if event.mine:
        return _finalise(seen, policy)
    return (ClaimReduction(seen.number, seen.attempt, seen.token),) if event.orphaned else ()


def _owed(state: Iteration, policy: Policy) -> tuple[Effect, ...]:
    """Return what a job that is over or was disabled still has to have done to it."""
    if state.running in (RunningState.FINISH, RunningState.STOP):
        return ()
    if state.running is RunningState.DISABLE and state.interrupted:
        return ()  # whoever enables it sees that its last iteration is over, if it is
    if state.number > policy.last_iteration:
        return (Finish(),)
    return (Interrupt(),) if state.running is RunningState.DISABLE else ()


def _ignore(state: Iteration, event: Event, now: float, policy: Policy) -> Step:
    """Late news of a phase that is over; the shared state has counted it already."""
    return state, ()


Rule = Callable[..., Step]
TABLE: dict[tuple[Phase, type[Event]], Rule] = {
    (Phase.COLLECTING, ClientSelected): _on_selected,
    (Phase.COLLECTING, UploadCounted): _on_uploaded,
    (Phase.COLLECTING, Sealed): _on_sealed,
    **{(phase, ReductionClaimed): _on_claimed for phase in Phase if phase is not Phase.COLLECTING},
    (Phase.REDUCING, ModelReduced): _on_reduced,
    (Phase.UNMASKING, ModelReduced): _on_reduced,
    (Phase.UNMASKING, NotUnmasked): _on_not_unmasked,
    **{(phase, ReductionFailed): _on_reduction_failed for phase in (Phase.REDUCING, *MADE)},
    (Phase.REDUCING, AggregateRecorded): _on_aggregate,
    (Phase.REDUCING, CandidateRecorded): _on_recorded,
    (Phase.UNMASKING, CandidateRecorded): _on_recorded,
    (Phase.CANDIDATE, CandidateSpread): _on_spread,
    **{(phase, UpdatesLost): _on_lost for phase in Phase},
    **{(phase, Advanced): _on_advanced for phase in Phase},
    **{(phase, Observed): _on_observed for phase in Phase},
    **{
        (phase, late): _ignore
        for phase in Phase
        if phase is not Phase.COLLECTING
        for late in (ClientSelected, UploadCounted, TimePassed)
    },
    **{(phase, TimePassed): _on_time for phase in TIMED},
}
