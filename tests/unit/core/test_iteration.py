"""The table of the iteration, cell by cell: what each event does in each phase, and what it may not do."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from fedcore.core.iteration import (
    DISABLED,
    TABLE,
    Advance,
    Advanced,
    AggregateRecorded,
    CandidateRecorded,
    CandidateSpread,
    CipherRound,
    ClaimReduction,
    ClientSelected,
    Effect,
    Event,
    Finish,
    Interrupt,
    Iteration,
    Keep,
    Leave,
    ModelReduced,
    NotUnmasked,
    Observed,
    Open,
    Phase,
    Policy,
    RecordAggregate,
    RecordCandidate,
    Reduce,
    ReductionClaimed,
    ReductionFailed,
    Reopen,
    Resume,
    Seal,
    Sealed,
    SpreadCandidate,
    TimePassed,
    Unmask,
    UpdatesLost,
    UploadCounted,
    WrongPhase,
    aggregation_failed,
    deadline,
    exchange_lost,
    round_timeout,
    server_exited,
    status_lost,
    step,
    unmask_failed,
)
from fedcore.core.job import RunningState
from fedcore.errors import LocalError

COLLECTING, SEALED, REDUCING, UNMASKING, TRAINING, TRAINED, CANDIDATE = Phase
RUNNING, DISABLE, FINISH, STOP = RunningState
MINE, THEIRS = "7:me", "6:you"  # tokens

POLICY = Policy(
    start_threshold=3,
    update_threshold=2,
    start_window=10.0,
    update_window=20.0,
    global_window=25.0,
    last_iteration=9,
)

VALID = "Weight aggregation finished! This iteration is valid. Proceed to next iteration."
START_LATE = "Round startFLJob timeout! This iteration is invalid. Proceed to next iteration."
UPDATE_LATE = "Round updateModel timeout! This iteration is invalid. Proceed to next iteration."
ALL_LATE = "Global timer timeout! This iteration is invalid. Proceed to next iteration."
EXITED_5 = "Server that processed updateModel requests exited, current iteration: 5"


def at(phase: Phase = COLLECTING, **known: object) -> Iteration:
    return Iteration(**{"number": 5, "phase": phase, "base": "b0", **known})  # type: ignore[arg-type]


def seen(
    iteration: Iteration,
    *,
    mine: bool = False,
    success: bool = True,
    result: str = VALID,
    orphaned: bool = False,
) -> Observed:
    return Observed(iteration, mine, success, result, orphaned)


def fails(result: str, phase: Phase = COLLECTING, **changes: object) -> Advance:
    return replace(Advance(5, 1, False, result, False, phase), **changes)  # type: ignore[arg-type]


# ---- which pairs there are

EVENTS: dict[type[Event], Event] = {
    ClientSelected: ClientSelected(5, 1),
    UploadCounted: UploadCounted(5, 1, 1),
    TimePassed: TimePassed(),
    Sealed: Sealed(),
    ReductionClaimed: ReductionClaimed(MINE),
    ModelReduced: ModelReduced("d1"),
    ReductionFailed: ReductionFailed("why"),
    NotUnmasked: NotUnmasked(),
    AggregateRecorded: AggregateRecorded("a1"),
    CandidateRecorded: CandidateRecorded("d1"),
    CandidateSpread: CandidateSpread(),
    UpdatesLost: UpdatesLost(5, 1, ("L1",)),
    Advanced: Advanced(True, VALID),
    Observed: seen(at()),
}

ANYWHERE = {ClientSelected, UploadCounted, TimePassed, UpdatesLost, Advanced, Observed}
POSSIBLE = {
    COLLECTING: ANYWHERE | {Sealed},
    SEALED: ANYWHERE | {ReductionClaimed},
    REDUCING: ANYWHERE
    | {ReductionClaimed, ModelReduced, ReductionFailed, AggregateRecorded, CandidateRecorded},
    UNMASKING: ANYWHERE | {ReductionClaimed, ModelReduced, NotUnmasked, ReductionFailed, CandidateRecorded},
    TRAINING: ANYWHERE | {ReductionClaimed, ReductionFailed},
    TRAINED: ANYWHERE | {ReductionClaimed, ReductionFailed},
    CANDIDATE: ANYWHERE | {ReductionClaimed, ReductionFailed, CandidateSpread},
}


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", EVENTS.values(), ids=lambda event: type(event).__name__)
def test_every_pair_is_in_the_table_or_refused(phase: Phase, event: Event) -> None:
    state = at(phase, selected=1, uploaded=1, started=0.0, first_upload=0.0)
    if type(event) in POSSIBLE[phase]:
        assert (phase, type(event)) in TABLE
        step(state, event, 1.0, POLICY)
    else:
        assert (phase, type(event)) not in TABLE
        with pytest.raises(WrongPhase) as refusal:
            step(state, event, 1.0, POLICY)
        assert str(refusal.value) == f"{type(event).__name__} cannot happen while {phase.value}"


def test_the_table_holds_nothing_else() -> None:
    assert set(TABLE) == {(phase, event) for phase, events in POSSIBLE.items() for event in events}
    assert set(EVENTS) == {event for _, event in TABLE}


def test_a_wrong_phase_is_our_own_fault() -> None:
    assert issubclass(WrongPhase, LocalError)


# ---- the way of an iteration


def test_an_iteration_from_its_first_device_to_the_next_one() -> None:
    full = {"selected": 2, "started": 100.0, "uploaded": 2, "first_upload": 102.0}
    way: list[tuple[float, Event, Iteration, tuple[Effect, ...]]] = [
        (100.0, ClientSelected(5, 1), at(selected=1, started=100.0), ()),
        (101.0, ClientSelected(5, 2), at(selected=2, started=100.0), ()),
        (102.0, UploadCounted(5, 1, 1), at(selected=2, started=100.0, uploaded=1, first_upload=102.0), ()),
        (103.0, UploadCounted(5, 1, 2), at(**full), (Seal(5, 1),)),
        (103.1, Sealed(), at(SEALED, **full), (ClaimReduction(5, 1),)),
        (103.2, ReductionClaimed(MINE), at(REDUCING, token=MINE, **full), (Reduce(5, 1),)),
        (
            103.3,
            ModelReduced("d1"),
            at(REDUCING, token=MINE, **full),
            (RecordCandidate(5, 1, MINE, "d1"),),
        ),
        (
            103.4,
            CandidateRecorded("d1"),
            at(CANDIDATE, token=MINE, digest="d1", **full),
            (SpreadCandidate(5, 1, "d1"),),
        ),
        (
            103.5,
            CandidateSpread(),
            at(CANDIDATE, token=MINE, digest="d1", **full),
            (Advance(5, 1, True, VALID, False, CANDIDATE, MINE, "d1"),),
        ),
        (103.6, Advanced(True, VALID), Iteration(6, base="d1"), (Open(6, 5, True, VALID, "d1"),)),
    ]
    state = at()
    ranks = []
    for now, event, expected, effects in way:
        state, performed = step(state, event, now, POLICY)
        assert (state, performed) == (expected, effects), event
        assert state.changing is (state.phase is not COLLECTING)
        ranks.append(state.rank)
    assert ranks == sorted(ranks)


def test_the_phases_are_what_the_shared_state_holds() -> None:
    assert [phase.value for phase in Phase] == [
        "collecting",
        "sealed",
        "reducing",
        "unmasking",
        "training",
        "trained",
        "candidate",
    ]


def test_the_rank_rises_with_number_then_attempt_then_phase() -> None:
    way = [
        at(),
        at(SEALED),
        at(REDUCING),
        at(UNMASKING),
        at(TRAINING),
        at(TRAINED),
        at(CANDIDATE),
        at(attempt=2),
        at(CANDIDATE, attempt=2),
        at(number=6),
        at(SEALED, number=6),
    ]
    assert [state.rank for state in way] == sorted({state.rank for state in way})


# ---- counts


@pytest.mark.parametrize("phase", [SEALED, REDUCING, CANDIDATE])
@pytest.mark.parametrize("late", [ClientSelected(5, 3), UploadCounted(5, 1, 2), TimePassed()])
def test_late_news_of_a_phase_that_is_over_changes_nothing(phase: Phase, late: Event) -> None:
    state = at(phase, uploaded=1, started=0.0, first_upload=0.0)
    assert step(state, late, 1e9, POLICY) == (state, ())


@pytest.mark.parametrize("other", [4, 6])
def test_news_of_another_iteration_changes_nothing(other: int) -> None:
    assert step(at(), ClientSelected(other, 9), 1.0, POLICY) == (at(), ())
    assert step(at(), UploadCounted(other, 1, 9), 1.0, POLICY) == (at(), ())


@pytest.mark.parametrize("attempt", [1, 3])
def test_a_count_of_another_attempt_changes_nothing(attempt: int) -> None:
    """What was counted before a reopening is not what counts after it."""
    assert step(at(attempt=2), UploadCounted(5, attempt, 2), 1.0, POLICY) == (at(attempt=2), ())


def test_counts_only_rise_and_clocks_start_once() -> None:
    state = at(selected=3, uploaded=1, started=1.0, first_upload=2.0)
    assert step(state, ClientSelected(5, 2), 9.0, POLICY) == (state, ())
    assert step(state, UploadCounted(5, 1, 1), 9.0, POLICY) == (state, ())


def test_an_upload_beyond_the_quorum_still_asks_for_the_seal() -> None:
    state = at(uploaded=2, started=1.0, first_upload=2.0)
    assert step(state, UploadCounted(5, 1, 2), 3.0, POLICY) == (state, (Seal(5, 1),))


def test_the_seal_names_the_attempt() -> None:
    _, effects = step(at(attempt=3), UploadCounted(5, 3, 2), 3.0, POLICY)
    assert effects == (Seal(5, 3),)


# ---- time

NOBODY = at()
ONE = at(selected=1, started=100.0)
ALL = at(selected=3, started=100.0)
FIRST = at(selected=3, started=100.0, uploaded=1, first_upload=104.0)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (NOBODY, None),  # with no device at all nothing ever times out
        (ONE, (110.0, START_LATE)),
        (ALL, (125.0, ALL_LATE)),  # the last place stops the clock of startFLJob
        (FIRST, (124.0, UPDATE_LATE)),
        (replace(FIRST, selected=2), (110.0, START_LATE)),
        (replace(FIRST, first_upload=105.5), (125.0, ALL_LATE)),
        (replace(FIRST, first_upload=105.0), (125.0, ALL_LATE)),  # both at once: one of the texts
        (replace(FIRST, uploaded=2), None),  # the quorum stops every clock: the seal is on its way
        (replace(FIRST, uploaded=2, selected=2), None),
        (replace(FIRST, phase=SEALED), None),
        (replace(FIRST, phase=REDUCING), None),
        (replace(FIRST, phase=CANDIDATE), None),
        (at(first_upload=104.0, uploaded=1), None),
    ],
)
def test_deadlines(state: Iteration, expected: tuple[float, str] | None) -> None:
    assert deadline(state, POLICY) == expected


@pytest.mark.parametrize("state", [ONE, ALL, FIRST])
def test_an_iteration_that_lost_updates_fails_for_that_at_the_same_moment(state: Iteration) -> None:
    due, after = deadline(state, POLICY), deadline(replace(state, lost=1, attempt=2), POLICY)
    assert due is not None and after is not None
    assert after == (due[0], EXITED_5)


def test_an_iteration_that_lost_updates_and_made_up_for_them_has_no_deadline() -> None:
    assert deadline(replace(FIRST, lost=2, uploaded=2), POLICY) is None


@pytest.mark.parametrize("state", [ONE, ALL, FIRST, replace(FIRST, lost=1)])
def test_an_iteration_fails_at_its_deadline_and_not_before(state: Iteration) -> None:
    due = deadline(state, POLICY)
    assert due is not None
    moment, result = due
    assert step(state, TimePassed(), moment - 0.001, POLICY) == (state, ())
    assert step(state, TimePassed(), moment, POLICY) == (state, (fails(result),))
    assert step(state, TimePassed(), moment + 1e6, POLICY) == (state, (fails(result),))


def test_time_does_not_fail_a_complete_iteration_but_seals_it() -> None:
    """The seal may have been lost with the connection; nothing else would ask for it again."""
    complete = replace(FIRST, uploaded=2)
    assert step(complete, TimePassed(), 105.0, POLICY) == (complete, (Seal(5, 1),))
    assert step(complete, TimePassed(), 1e9, POLICY) == (complete, (Seal(5, 1),))


@pytest.mark.parametrize(
    "gone",
    [{"running": DISABLE, "interrupted": True}, {"running": FINISH}, {"running": STOP}],
)
@pytest.mark.parametrize("state", [ONE, FIRST, replace(FIRST, uploaded=2)])
def test_no_time_passes_for_a_job_that_does_not_run(state: Iteration, gone: dict[str, Any]) -> None:
    state = replace(state, **gone)
    assert step(state, TimePassed(), 1e9, POLICY) == (state, ())


@pytest.mark.parametrize(
    ("state", "owed"),
    [
        (replace(FIRST, running=DISABLE), Interrupt()),
        (replace(FIRST, number=POLICY.last_iteration + 1), Finish()),
        (replace(FIRST, number=POLICY.last_iteration + 1, running=DISABLE), Finish()),
    ],
)
def test_what_the_end_of_a_job_asks_for_is_asked_for_again(state: Iteration, owed: Effect) -> None:
    """It may have been lost with a Redis that says no more than this server knows already."""
    assert step(state, TimePassed(), 105.0, POLICY) == (state, (owed,))


# ---- the finaliser


@pytest.mark.parametrize("phase", [SEALED, REDUCING])
def test_who_has_the_token_sums(phase: Phase) -> None:
    expected = at(REDUCING, token=MINE, attempt=2)
    assert step(at(phase, token=THEIRS, attempt=2), ReductionClaimed(MINE), 1.0, POLICY) == (
        expected,
        (Reduce(5, 2),),
    )


@pytest.mark.parametrize("phase", [SEALED, REDUCING, CANDIDATE])
def test_who_succeeds_a_finaliser_with_a_candidate_spreads_that_one(phase: Phase) -> None:
    event = ReductionClaimed(MINE, CANDIDATE, digest="d1")
    expected = at(CANDIDATE, token=MINE, digest="d1", attempt=3)
    before = at(phase, token=THEIRS, attempt=3)
    assert step(before, event, 1.0, POLICY) == (expected, (SpreadCandidate(5, 3, "d1"),))


def test_a_candidate_is_recorded_and_published_under_the_own_token() -> None:
    reducing = at(REDUCING, token=MINE, attempt=2)
    assert step(reducing, ModelReduced("d1"), 1.0, POLICY)[1] == (RecordCandidate(5, 2, MINE, "d1"),)
    candidate, _ = step(reducing, CandidateRecorded("d1"), 1.0, POLICY)
    _, effects = step(candidate, CandidateSpread(), 1.0, POLICY)
    assert effects == (Advance(5, 2, True, VALID, False, CANDIDATE, MINE, "d1"),)


@pytest.mark.parametrize("phase", [REDUCING, UNMASKING, TRAINING, TRAINED, CANDIDATE])
def test_a_failed_reduction_fails_the_iteration_and_leaves_the_model(phase: Phase) -> None:
    state = at(phase, attempt=2, token=MINE, digest="d1")
    expected = fails("out of luck", phase, attempt=2, token=MINE, base="")
    assert step(state, ReductionFailed("out of luck"), 1.0, POLICY) == (state, (expected,))


@pytest.mark.parametrize(("number", "finishes"), [(8, False), (9, True), (10, True)])
def test_the_last_iteration_finishes_the_job(number: int, finishes: bool) -> None:
    state = at(CANDIDATE, number=number, token=MINE, digest="d1")
    _, effects = step(state, CandidateSpread(), 1.0, POLICY)
    assert effects == (Advance(number, 1, True, VALID, finishes, CANDIDATE, MINE, "d1"),)
    after, _ = step(state, Advanced(True, VALID), 1.0, POLICY)
    assert after.running is (FINISH if finishes else RUNNING)


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(("success", "base"), [(True, "d1"), (False, "b0")])
def test_the_next_iteration_begins_empty(phase: Phase, success: bool, base: str) -> None:
    known = {
        "attempt": 4,
        "selected": 3,
        "uploaded": 2,
        "started": 1.0,
        "first_upload": 2.0,
        "token": MINE,
        "digest": "d1",
        "lost": 3,
    }
    event = Advanced(success, "why")
    expected = (Iteration(6, base=base), (Open(6, 5, success, "why", base),))
    assert step(at(phase, **known), event, 3.0, POLICY) == expected


def test_a_disabled_job_stays_disabled_when_an_iteration_ends() -> None:
    after, _ = step(at(running=DISABLE), Advanced(False, EXITED_5), 1.0, POLICY)
    assert after == Iteration(6, running=DISABLE, base="b0")


# ---- hybrid training

HYBRID = replace(POLICY, hybrid=True)
TRAINED_VALID = "Push metrics finished! This iteration is valid. Proceed to next iteration."


def test_with_a_worker_the_mean_goes_to_it_before_it_is_a_candidate() -> None:
    state = at(REDUCING, token=MINE, uploaded=2, started=100.0)
    state, effects = step(state, ModelReduced("a1"), 101.0, HYBRID)
    assert effects == (RecordAggregate(5, 1, MINE, "a1"),)
    state, effects = step(state, AggregateRecorded("a1"), 101.1, HYBRID)
    assert (state, effects) == (
        at(TRAINING, token=MINE, uploaded=2, started=100.0, aggregate="a1"),
        (Keep(5, 1, TRAINING, "a1"),),
    )
    pushed = replace(state, phase=TRAINED, digest="d1")
    state, effects = step(state, seen(pushed, mine=True), 102.0, HYBRID)
    assert (state, effects) == (pushed, (Keep(5, 1, TRAINED, "d1"),))
    measured = replace(state, phase=CANDIDATE, metrics=(0.5, 0.9))
    state, effects = step(state, seen(measured, mine=True), 103.0, HYBRID)
    assert (state, effects) == (measured, (SpreadCandidate(5, 1, "d1"),))
    _, effects = step(state, CandidateSpread(), 104.0, HYBRID)
    assert effects == (Advance(5, 1, True, TRAINED_VALID, False, CANDIDATE, MINE, "d1"),)
    assert step(state, Advanced(True, TRAINED_VALID), 105.0, HYBRID)[0] == Iteration(6, base="d1")


def test_the_finaliser_keeps_the_mean_while_the_worker_trains() -> None:
    there = at(TRAINING, token=MINE, aggregate="a1")
    assert step(there, seen(there, mine=True), 1.0, HYBRID) == (there, (Keep(5, 1, TRAINING, "a1"),))
    assert step(there, seen(there), 1.0, HYBRID) == (there, ())


@pytest.mark.parametrize(("phase", "digest"), [(TRAINING, "a1"), (TRAINED, "d1")])
@pytest.mark.parametrize("before", [SEALED, REDUCING, TRAINING, TRAINED])
def test_who_succeeds_a_finaliser_keeps_what_the_worker_works_on(
    before: Phase, phase: Phase, digest: str
) -> None:
    model = "d1" if phase is TRAINED else ""
    event = ReductionClaimed(MINE, phase, "a1", model)
    expected = at(phase, token=MINE, aggregate="a1", digest=model)
    assert step(at(before, token=THEIRS), event, 1.0, HYBRID) == (expected, (Keep(5, 1, phase, digest),))


@pytest.mark.parametrize("phase", [TRAINING, TRAINED])
def test_a_worker_has_time_until_the_global_window_is_over(phase: Phase) -> None:
    state = at(phase, token=MINE, aggregate="a1", selected=1, uploaded=1, started=100.0, first_upload=101.0)
    assert deadline(state, HYBRID) == (125.0, ALL_LATE)
    assert step(state, TimePassed(), 124.9, HYBRID) == (state, ())
    assert step(state, TimePassed(), 125.0, HYBRID) == (state, (fails(ALL_LATE, phase, token=MINE),))
    suspended = replace(state, running=DISABLE, interrupted=True)
    assert step(suspended, TimePassed(), 125.0, HYBRID) == (suspended, ())


@pytest.mark.parametrize("phase", [TRAINING, TRAINED])
def test_an_orphan_with_a_worker_is_taken_over(phase: Phase) -> None:
    there = at(phase, token=THEIRS, aggregate="a1")
    assert step(there, seen(there, orphaned=True), 1.0, HYBRID)[1] == (ClaimReduction(5, 1, THEIRS),)


# ---- masks

MASKED = replace(
    POLICY,
    unmask=True,
    cipher_window=6.0,
    cipher_rounds=(
        ("exchangeKeys", 3),
        ("getKeys", 3),
        ("shareSecrets", 3),
        ("getSecrets", 2),
        ("getClientList", 2),
        ("reconstructSecrets", 2),
    ),
)
MASKED_FOREVER = replace(MASKED, unmask=False, cipher_rounds=MASKED.cipher_rounds[:2])
UNMASKED_VALID = "Weight unmask finished! This iteration is valid. Proceed to next iteration."


def late(name: str) -> str:
    return f"Round {name} timeout! This iteration is invalid. Proceed to next iteration."


def reported(count: int, first: float = 103.0) -> tuple[CipherRound, ...]:
    return (CipherRound("getClientList", 2, 102.5), CipherRound("reconstructSecrets", count, first))


def test_masks_are_taken_off_the_mean_before_it_is_a_candidate() -> None:
    full: dict[str, Any] = {"token": MINE, "uploaded": 2, "started": 100.0}
    state = at(REDUCING, **full)
    state, effects = step(state, ModelReduced("a1"), 101.0, MASKED)
    assert effects == (RecordAggregate(5, 1, MINE, "a1"),)
    state, effects = step(state, AggregateRecorded("a1"), 101.1, MASKED)
    masked = at(UNMASKING, aggregate="a1", **full)
    keep = Keep(5, 1, UNMASKING, "a1")
    assert (state, effects) == (masked, (keep,))
    few = replace(masked, rounds=reported(1))
    state, effects = step(state, seen(few, mine=True), 103.0, MASKED)
    assert (state, effects) == (few, (keep,))
    enough = replace(masked, rounds=reported(2))
    state, effects = step(state, seen(enough, mine=True), 103.5, MASKED)
    assert (state, effects) == (enough, (keep, Unmask(5, 1, "a1")))
    state, effects = step(state, ModelReduced("d1"), 104.0, MASKED)
    assert (state, effects) == (enough, (RecordCandidate(5, 1, MINE, "d1"),))
    state, effects = step(state, CandidateRecorded("d1"), 104.1, MASKED)
    assert (state, effects) == (
        replace(enough, phase=CANDIDATE, digest="d1"),
        (SpreadCandidate(5, 1, "d1"),),
    )
    _, effects = step(state, CandidateSpread(), 104.2, MASKED)
    assert effects == (Advance(5, 1, True, UNMASKED_VALID, False, CANDIDATE, MINE, "d1"),)
    assert step(state, Advanced(True, UNMASKED_VALID), 105.0, MASKED)[0] == Iteration(6, base="d1")


def test_masks_that_cancel_by_themselves_make_a_plain_candidate() -> None:
    state = at(REDUCING, token=MINE)
    assert step(state, ModelReduced("d1"), 1.0, MASKED_FOREVER)[1] == (RecordCandidate(5, 1, MINE, "d1"),)
    candidate = at(CANDIDATE, token=MINE, digest="d1")
    _, effects = step(candidate, CandidateSpread(), 1.0, MASKED_FOREVER)
    assert effects == (Advance(5, 1, True, VALID, False, CANDIDATE, MINE, "d1"),)


def test_who_succeeds_a_finaliser_unmasks_what_that_one_had_recorded() -> None:
    before = at(UNMASKING, token=THEIRS, aggregate="a1", rounds=reported(2))
    expected = replace(before, token=MINE)
    assert step(before, ReductionClaimed(MINE, UNMASKING, "a1"), 1.0, MASKED) == (
        expected,
        (Keep(5, 1, UNMASKING, "a1"), Unmask(5, 1, "a1")),
    )


def test_only_the_finaliser_unmasks() -> None:
    there = at(UNMASKING, token=THEIRS, aggregate="a1", rounds=reported(2))
    assert step(there, seen(there), 1.0, MASKED) == (there, ())
    assert step(there, seen(there, orphaned=True), 1.0, MASKED) == (there, (ClaimReduction(5, 1, THEIRS),))


BEGUN = at(selected=3, started=100.0)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (BEGUN, (125.0, ALL_LATE)),
        (replace(BEGUN, rounds=(CipherRound("exchangeKeys", 1, 101.0),)), (107.0, late("exchangeKeys"))),
        (replace(BEGUN, rounds=(CipherRound("exchangeKeys", 3, 101.0),)), (125.0, ALL_LATE)),
        (
            replace(BEGUN, rounds=(CipherRound("exchangeKeys", 3, 101.0), CipherRound("getKeys", 2, 102.0))),
            (108.0, late("getKeys")),
        ),
        (
            replace(BEGUN, rounds=(CipherRound("getKeys", 2, 102.0), CipherRound("shareSecrets", 1, 101.5))),
            (107.5, late("shareSecrets")),
        ),
        (replace(BEGUN, rounds=(CipherRound("getSecrets", 1, 120.0),)), (125.0, ALL_LATE)),
        (replace(BEGUN, rounds=(CipherRound("getSecrets", 1, 101.0),), lost=1), (107.0, EXITED_5)),
        # with the quorum the exchange is over, whoever has not asked for secrets
        (replace(BEGUN, rounds=(CipherRound("getSecrets", 1, 101.0),), uploaded=2), None),
        (replace(BEGUN, phase=REDUCING, rounds=(CipherRound("getSecrets", 1, 101.0),)), None),
        (
            replace(BEGUN, phase=UNMASKING, rounds=(CipherRound("getSecrets", 1, 101.0),)),
            (125.0, ALL_LATE),
        ),
        (
            replace(BEGUN, phase=UNMASKING, rounds=(CipherRound("getClientList", 1, 104.0),)),
            (110.0, late("getClientList")),
        ),
        (replace(BEGUN, phase=UNMASKING, rounds=reported(1)), (109.0, late("reconstructSecrets"))),
        # whether the reports are good for anything only the finaliser knows
        (replace(BEGUN, phase=UNMASKING, rounds=reported(2)), (125.0, ALL_LATE)),
        (replace(BEGUN, phase=CANDIDATE, rounds=reported(1)), None),
        # a round that this job does not have
        (replace(BEGUN, rounds=(CipherRound("pushListSign", 1, 101.0),)), (125.0, ALL_LATE)),
    ],
)
def test_deadlines_of_cipher_rounds(state: Iteration, expected: tuple[float, str] | None) -> None:
    assert deadline(state, MASKED) == expected
    if expected is None:
        return
    moment, result = expected
    assert step(state, TimePassed(), moment - 0.001, MASKED) == (state, ())
    assert step(state, TimePassed(), moment, MASKED)[1] == (fails(result, state.phase),)


def test_reports_that_give_no_masks_fail_the_iteration_when_their_round_is_over() -> None:
    state = at(UNMASKING, token=MINE, started=100.0, rounds=reported(2, 103.0))
    assert step(state, NotUnmasked(), 108.9, MASKED) == (state, ())
    failed = fails("Failed to unmask, current iteration: 5", UNMASKING, token=MINE)
    assert step(state, NotUnmasked(), 109.0, MASKED) == (state, (failed,))
    nobody = replace(state, rounds=())
    assert step(nobody, NotUnmasked(), 1e9, MASKED) == (nobody, ())


LOST = UpdatesLost(5, 1, ("L1",))


@pytest.mark.parametrize("phase", [UNMASKING, CANDIDATE])
def test_no_list_is_made_twice_whatever_is_lost(phase: Phase) -> None:
    """Devices may have told which secret goes with the first one."""
    state = at(phase, token=MINE, aggregate="a1")
    assert step(state, LOST, 1.0, MASKED) == (state, (fails(EXITED_5, phase, token=MINE),))


@pytest.mark.parametrize("phase", [COLLECTING, SEALED, REDUCING])
def test_before_there_is_a_list_lost_clients_count_as_gone(phase: Phase) -> None:
    state = at(phase)
    assert step(state, LOST, 1.0, MASKED) == (state, (Reopen(5, 1, phase, ("L1",)),))


@pytest.mark.parametrize("phase", [COLLECTING, SEALED, REDUCING, CANDIDATE])
def test_masks_that_nobody_can_take_off_need_every_update(phase: Phase) -> None:
    state = at(phase)
    assert step(state, LOST, 1.0, MASKED_FOREVER) == (state, (fails(EXITED_5, phase),))


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("mine", [False, True])
def test_an_iteration_whose_keys_may_be_lost_fails_at_once(phase: Phase, mine: bool) -> None:
    there = at(phase, uploaded=2, token=MINE, aggregate="a1")
    event = replace(seen(there, mine=mine, orphaned=not mine), severed=True)
    lost = "Redis started anew while keys and shares were exchanged, current iteration: 5"
    assert step(at(), event, 1.0, MASKED) == (there, (fails(lost, phase, token=MINE),))


@pytest.mark.parametrize(
    "gone", [{"running": DISABLE, "interrupted": True}, {"running": FINISH}, {"number": 10}]
)
def test_nothing_is_failed_for_its_keys_in_a_job_that_does_not_run(gone: dict[str, Any]) -> None:
    there = at(UNMASKING, **gone)
    _, effects = step(there, replace(seen(there), severed=True), 1.0, MASKED)
    assert not [effect for effect in effects if isinstance(effect, Advance)]


def test_a_round_that_there_is_not_is_complete_with_nobody() -> None:
    assert POLICY.completes("reconstructSecrets") == 0
    assert MASKED.completes("reconstructSecrets") == 2


# ---- lost updates


@pytest.mark.parametrize("phase", Phase)
def test_lost_updates_undo_the_seal_of_their_attempt(phase: Phase) -> None:
    state = at(phase, attempt=2)
    event = UpdatesLost(5, 2, ("L1", "L2"))
    assert step(state, event, 1.0, POLICY) == (state, (Reopen(5, 2, phase, ("L1", "L2")),))


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(("number", "attempt"), [(4, 2), (6, 2), (5, 1), (5, 3)])
def test_what_was_lost_in_another_attempt_is_no_news(phase: Phase, number: int, attempt: int) -> None:
    state = at(phase, attempt=2)
    assert step(state, UpdatesLost(number, attempt, ("L1",)), 1.0, POLICY) == (state, ())


@pytest.mark.parametrize("before", Phase)
def test_another_attempt_there_makes_the_ledgers_take_updates_again(before: Phase) -> None:
    there = at(attempt=2, uploaded=1, selected=1, lost=1)
    assert step(at(before), seen(there), 1.0, POLICY) == (there, (Resume(5, 2),))


def test_an_attempt_that_is_complete_again_is_resumed_and_sealed() -> None:
    there = at(attempt=3, uploaded=2)
    assert step(at(), seen(there), 1.0, POLICY) == (there, (Resume(5, 3), Seal(5, 3)))


def test_an_attempt_that_is_sealed_again_already_is_resumed_first() -> None:
    there = at(SEALED, attempt=3)
    assert step(at(CANDIDATE, attempt=2), seen(there), 1.0, POLICY) == (
        there,
        (Resume(5, 3), ClaimReduction(5, 3)),
    )


# ---- what the shared state says


@pytest.mark.parametrize("before", Phase)
@pytest.mark.parametrize("there", [6, 7, 400])
@pytest.mark.parametrize("phase", [COLLECTING, REDUCING, CANDIDATE])
def test_a_later_number_there_is_adopted(before: Phase, there: int, phase: Phase) -> None:
    iteration = Iteration(there, attempt=2, phase=phase, selected=1, base="b9")
    event = seen(iteration, success=False, result="why")
    part = (Finish(),) if there > POLICY.last_iteration else ()
    effects = (Open(there, there - 1, False, "why", "b9"), *part)
    assert step(at(before), event, 1.0, POLICY) == (iteration, effects)


KNOWN = at(REDUCING, attempt=2, token=MINE, uploaded=2)


@pytest.mark.parametrize(
    "behind",
    [
        at(number=4, phase=CANDIDATE, attempt=9),
        at(CANDIDATE, attempt=1),
        at(SEALED, attempt=2, uploaded=2),
        at(COLLECTING, attempt=2, uploaded=2),
        at(COLLECTING, running=DISABLE),
        at(COLLECTING, running=STOP),
    ],
)
@pytest.mark.parametrize(("mine", "orphaned"), [(False, False), (True, False), (False, True)])
def test_a_look_that_was_overtaken_is_not_believed(behind: Iteration, mine: bool, orphaned: bool) -> None:
    assert step(KNOWN, seen(behind, mine=mine, orphaned=orphaned), 1.0, POLICY) == (KNOWN, ())


@pytest.mark.parametrize("phase", [COLLECTING, CANDIDATE])
def test_another_base_there_is_opened_anew(phase: Phase) -> None:
    """After a loss two servers may have ended an iteration differently; the shared state decides."""
    there = at(phase, base="b1", token=THEIRS)
    assert step(at(), seen(there), 1.0, POLICY) == (there, (Open(5, 4, True, VALID, "b1"),))
    assert step(at(base=""), seen(there), 1.0, POLICY) == (there, ())


def test_counts_do_not_fall_within_an_attempt() -> None:
    known, there = at(selected=3, uploaded=1), at(selected=2)
    assert step(known, seen(there), 1.0, POLICY) == (known, ())


def test_counts_fall_with_the_next_attempt() -> None:
    there = at(attempt=2, selected=1)
    assert step(at(selected=3, uploaded=2), seen(there), 1.0, POLICY)[0] == there


@pytest.mark.parametrize("before", Phase)
def test_a_server_that_comes_late_opens_first_and_then_takes_up_its_part(before: Phase) -> None:
    there = Iteration(7, phase=SEALED, base="b9")
    assert step(at(before), seen(there), 1.0, POLICY) == (
        there,
        (Open(7, 6, True, VALID, "b9"), ClaimReduction(7, 1)),
    )


@pytest.mark.parametrize("earlier", range(4))
@pytest.mark.parametrize(
    ("there", "mine", "effects"),
    [
        (at(uploaded=1), False, ()),
        (at(uploaded=2), False, (Seal(5, 1),)),  # counted elsewhere, or the seal was lost
        (at(SEALED), False, (ClaimReduction(5, 1),)),
        (at(SEALED), True, (ClaimReduction(5, 1),)),
        (at(REDUCING, token=MINE), True, (Reduce(5, 1),)),
        (at(REDUCING, token=THEIRS), False, ()),
        (at(CANDIDATE, token=MINE, digest="d1"), True, (SpreadCandidate(5, 1, "d1"),)),
        (at(CANDIDATE, token=THEIRS, digest="d1"), False, ()),
    ],
)
def test_the_phase_there_is_adopted_and_this_servers_part_taken_up(
    earlier: int, there: Iteration, mine: bool, effects: tuple[Effect, ...]
) -> None:
    before = list(Phase)[: list(Phase).index(there.phase) + 1][
        -1 - min(earlier, list(Phase).index(there.phase))
    ]
    assert step(at(before), seen(there, mine=mine), 1.0, POLICY) == (there, effects)


@pytest.mark.parametrize("phase", [REDUCING, CANDIDATE])
def test_a_dead_finaliser_is_succeeded_in_the_name_of_its_token(phase: Phase) -> None:
    there = at(phase, token=THEIRS, digest="d1" if phase is CANDIDATE else "", attempt=2)
    effects = (ClaimReduction(5, 2, THEIRS),)
    assert step(replace(there, phase=SEALED), seen(there, orphaned=True), 1.0, POLICY) == (there, effects)


@pytest.mark.parametrize("phase", [COLLECTING, SEALED])
def test_before_there_is_a_finaliser_none_is_succeeded(phase: Phase) -> None:
    there = at(phase)
    expected = (ClaimReduction(5, 1),) if phase is SEALED else ()
    assert step(at(), seen(there, orphaned=True), 1.0, POLICY) == (there, expected)


# ---- a job that is disabled, finished or stopped


@pytest.mark.parametrize("phase", Phase)
def test_who_sees_a_job_only_marked_as_disabled_ends_its_iteration(phase: Phase) -> None:
    there = at(phase, running=DISABLE, uploaded=2, token=MINE)
    assert step(at(), seen(there, mine=True), 1.0, POLICY) == (there, (Interrupt(),))


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("known", [{"running": DISABLE, "interrupted": True}, {"running": FINISH}])
def test_nothing_is_done_for_a_job_that_does_not_run(phase: Phase, known: dict[str, object]) -> None:
    there = at(phase, uploaded=2, selected=3, **known)
    for orphaned in (False, True):
        assert step(at(), seen(there, mine=True, orphaned=orphaned), 1.0, POLICY) == (there, ())


@pytest.mark.parametrize("phase", Phase)
def test_a_stopped_job_is_left(phase: Phase) -> None:
    there = at(phase, running=STOP, uploaded=2)
    assert step(at(), seen(there, mine=True), 1.0, POLICY) == (there, (Leave(),))


def test_the_iteration_that_a_disabling_ended_is_reported_before_the_job_rests() -> None:
    there = at(number=6, running=DISABLE, interrupted=True)
    event = seen(there, success=False, result=DISABLED)
    assert step(at(SEALED), event, 1.0, POLICY) == (there, (Open(6, 5, False, DISABLED, "b0"),))


@pytest.mark.parametrize("phase", Phase)
def test_a_job_beyond_its_last_iteration_is_finished(phase: Phase) -> None:
    there = at(phase, number=10, uploaded=2)
    assert step(at(number=10), seen(there, mine=True), 1.0, POLICY) == (there, (Finish(),))


def test_the_last_iteration_itself_is_played() -> None:
    there = at(number=9, uploaded=2)
    assert step(at(number=9), seen(there), 1.0, POLICY) == (there, (Seal(9, 1),))


def test_a_job_that_runs_again_goes_on_where_it_is() -> None:
    disabled = at(running=DISABLE, interrupted=True)
    assert step(disabled, seen(at(SEALED)), 1.0, POLICY) == (at(SEALED), (ClaimReduction(5, 1),))


# ---- words


def test_the_results_are_the_protocols_own_words() -> None:
    assert round_timeout("startFLJob") == START_LATE
    assert round_timeout("updateModel") == UPDATE_LATE
    assert aggregation_failed(7) == "Weight aggregation failed, current iteration: 7"
    assert server_exited(5) == EXITED_5
    assert DISABLED == "Disable instance"
    assert unmask_failed(7) == "Failed to unmask, current iteration: 7"
    assert exchange_lost(7) == (
        "Redis started anew while keys and shares were exchanged, current iteration: 7"
    )
    assert status_lost(7) == (
        "The instance status info stored in distributed cache is empty, current iteration: 7"
    )


def test_an_iteration_names_only_what_the_shared_state_holds_and_two_moments() -> None:
    """Whoever adds a field must bring it back after a loss, too: see ``cluster_state.raise_to``."""
    assert [field.name for field in fields(Iteration)] == [
        "number",
        "attempt",
        "phase",
        "running",
        "selected",
        "uploaded",
        "started",
        "first_upload",
        "token",
        "aggregate",
        "digest",
        "base",
        "metrics",
        "lost",
        "interrupted",
        "rounds",  # not brought back: an iteration whose devices had exchanged anything fails instead
    ]
