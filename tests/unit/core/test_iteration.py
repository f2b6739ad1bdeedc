"""The table of the iteration, cell by cell: what each event does in each phase, and what it may not do."""

from dataclasses import replace

import pytest

from fedcore.core.iteration import (
    TABLE,
    Advance,
    Advanced,
    CandidateDurable,
    CandidateRecorded,
    ClaimReduction,
    ClientSelected,
    Effect,
    Event,
    Iteration,
    MakeDurable,
    ModelReduced,
    Observed,
    Open,
    Phase,
    Policy,
    RecordCandidate,
    Reduce,
    ReductionClaimed,
    ReductionFailed,
    Seal,
    Sealed,
    TimePassed,
    UpdatesLost,
    UploadCounted,
    WrongPhase,
    aggregation_failed,
    deadline,
    round_timeout,
    server_exited,
    status_lost,
    step,
)
from fedcore.core.job import RunningState
from fedcore.errors import LocalError

COLLECTING, SEALED, REDUCING, CANDIDATE = Phase

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
    return Iteration(**{"number": 5, "phase": phase, **known})  # type: ignore[arg-type]


def seen(iteration: Iteration, *, mine: bool = False, success: bool = True, result: str = VALID) -> Observed:
    return Observed(iteration, mine, success, result)


def fails(result: str, phase: Phase = COLLECTING, **changes: object) -> Advance:
    return replace(Advance(5, 1, False, result, False, phase), **changes)  # type: ignore[arg-type]


# ---- which pairs there are

EVENTS: dict[type[Event], Event] = {
    ClientSelected: ClientSelected(5, 1),
    UploadCounted: UploadCounted(5, 1),
    TimePassed: TimePassed(),
    Sealed: Sealed(),
    ReductionClaimed: ReductionClaimed(),
    ModelReduced: ModelReduced("d1"),
    ReductionFailed: ReductionFailed("why"),
    CandidateRecorded: CandidateRecorded(),
    CandidateDurable: CandidateDurable(),
    UpdatesLost: UpdatesLost(),
    Advanced: Advanced(True, VALID),
    Observed: seen(at()),
}

ANYWHERE = {ClientSelected, UploadCounted, TimePassed, UpdatesLost, Advanced, Observed}
POSSIBLE = {
    COLLECTING: ANYWHERE | {Sealed},
    SEALED: ANYWHERE | {ReductionClaimed},
    REDUCING: ANYWHERE | {ModelReduced, ReductionFailed, CandidateRecorded},
    CANDIDATE: ANYWHERE | {CandidateDurable},
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
    way: list[tuple[float, Event, Iteration, tuple[Effect, ...]]] = [
        (100.0, ClientSelected(5, 1), at(selected=1, started=100.0), ()),
        (101.0, ClientSelected(5, 2), at(selected=2, started=100.0), ()),
        (102.0, UploadCounted(5, 1), at(selected=2, started=100.0, uploaded=1, first_upload=102.0), ()),
        (
            103.0,
            UploadCounted(5, 2),
            at(selected=2, started=100.0, uploaded=2, first_upload=102.0),
            (Seal(5, 1),),
        ),
        (
            103.1,
            Sealed(),
            at(SEALED, selected=2, started=100.0, uploaded=2, first_upload=102.0),
            (ClaimReduction(5, 1),),
        ),
        (
            103.2,
            ReductionClaimed(),
            at(REDUCING, selected=2, started=100.0, uploaded=2, first_upload=102.0),
            (Reduce(5, 1),),
        ),
        (
            103.3,
            ModelReduced("d1"),
            at(REDUCING, selected=2, started=100.0, uploaded=2, first_upload=102.0),
            (RecordCandidate(5, 1, "d1"),),
        ),
        (
            103.4,
            CandidateRecorded(),
            at(CANDIDATE, selected=2, started=100.0, uploaded=2, first_upload=102.0),
            (MakeDurable(5),),
        ),
        (
            103.5,
            CandidateDurable(),
            at(CANDIDATE, selected=2, started=100.0, uploaded=2, first_upload=102.0),
            (Advance(5, 1, True, VALID, False, CANDIDATE),),
        ),
        (103.6, Advanced(True, VALID), Iteration(6), (Open(6, 5, True, VALID),)),
    ]
    state = at()
    for now, event, expected, effects in way:
        state, performed = step(state, event, now, POLICY)
        assert (state, performed) == (expected, effects), event
        assert state.changing is (state.phase is not COLLECTING)


def test_the_phases_are_what_redis_holds() -> None:
    assert [phase.value for phase in Phase] == ["collecting", "sealed", "reducing", "candidate"]


# ---- counts


@pytest.mark.parametrize("phase", [SEALED, REDUCING, CANDIDATE])
@pytest.mark.parametrize("late", [ClientSelected(5, 3), UploadCounted(5, 2), TimePassed()])
def test_late_news_of_a_phase_that_is_over_changes_nothing(phase: Phase, late: Event) -> None:
    state = at(phase, uploaded=1, started=0.0, first_upload=0.0)
    assert step(state, late, 1e9, POLICY) == (state, ())


@pytest.mark.parametrize("other", [4, 6])
def test_news_of_another_iteration_changes_nothing(other: int) -> None:
    assert step(at(), ClientSelected(other, 9), 1.0, POLICY) == (at(), ())
    assert step(at(), UploadCounted(other, 9), 1.0, POLICY) == (at(), ())


def test_counts_only_rise_and_clocks_start_once() -> None:
    state = at(selected=3, uploaded=1, started=1.0, first_upload=2.0)
    assert step(state, ClientSelected(5, 2), 9.0, POLICY) == (state, ())
    assert step(state, UploadCounted(5, 1), 9.0, POLICY) == (state, ())


def test_an_upload_beyond_the_quorum_still_asks_for_the_seal() -> None:
    state = at(uploaded=2, started=1.0, first_upload=2.0)
    assert step(state, UploadCounted(5, 2), 3.0, POLICY) == (state, (Seal(5, 1),))


def test_the_seal_names_the_attempt() -> None:
    _, effects = step(at(attempt=3), UploadCounted(5, 2), 3.0, POLICY)
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


@pytest.mark.parametrize("running", [RunningState.DISABLE, RunningState.FINISH, RunningState.STOP])
@pytest.mark.parametrize("state", [ONE, FIRST, replace(FIRST, uploaded=2)])
def test_no_time_passes_for_a_job_that_does_not_run(state: Iteration, running: RunningState) -> None:
    state = replace(state, running=running)
    assert step(state, TimePassed(), 1e9, POLICY) == (state, ())


# ---- ends


@pytest.mark.parametrize("phase", Phase)
def test_lost_updates_fail_the_iteration_in_every_phase(phase: Phase) -> None:
    state = at(phase)
    assert step(state, UpdatesLost(), 1.0, POLICY) == (state, (fails(EXITED_5, phase),))


def test_a_failed_reduction_fails_the_iteration_with_its_reason() -> None:
    state = at(REDUCING, attempt=2)
    expected = fails("out of luck", REDUCING, attempt=2)
    assert step(state, ReductionFailed("out of luck"), 1.0, POLICY) == (state, (expected,))


@pytest.mark.parametrize(("number", "finishes"), [(8, False), (9, True), (10, True)])
def test_the_last_iteration_finishes_the_job(number: int, finishes: bool) -> None:
    state = at(CANDIDATE, number=number)
    _, effects = step(state, CandidateDurable(), 1.0, POLICY)
    assert effects == (Advance(number, 1, True, VALID, finishes, CANDIDATE),)
    after, _ = step(state, Advanced(True, VALID), 1.0, POLICY)
    assert after.running is (RunningState.FINISH if finishes else RunningState.RUNNING)


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(("success", "result"), [(True, VALID), (False, ALL_LATE)])
def test_the_next_iteration_begins_empty(phase: Phase, success: bool, result: str) -> None:
    state = at(phase, attempt=4, selected=3, uploaded=2, started=1.0, first_upload=2.0, digest="d1")
    expected = (Iteration(6), (Open(6, 5, success, result),))
    assert step(state, Advanced(success, result), 3.0, POLICY) == expected


def test_a_disabled_job_stays_disabled_when_an_iteration_ends() -> None:
    state = at(running=RunningState.DISABLE)
    after, _ = step(state, Advanced(False, EXITED_5), 1.0, POLICY)
    assert after == Iteration(6, running=RunningState.DISABLE)


# ---- what the shared state says


@pytest.mark.parametrize("before", Phase)
@pytest.mark.parametrize("there", [1, 3, 4, 6, 7, 400])
@pytest.mark.parametrize("phase", Phase)
def test_another_number_there_is_adopted_forward_or_backward(before: Phase, there: int, phase: Phase) -> None:
    iteration = Iteration(there, attempt=2, phase=phase, selected=1)
    effects = (Open(there, there - 1, False, "why"),)
    event = seen(iteration, mine=True, success=False, result="why")
    assert step(at(before), event, 1.0, POLICY) == (iteration, effects)


@pytest.mark.parametrize("before", Phase)
@pytest.mark.parametrize(
    ("there", "mine", "effects"),
    [
        (at(uploaded=1), False, ()),
        (at(uploaded=2), False, (Seal(5, 1),)),  # counted elsewhere, or the seal was lost
        (at(uploaded=2, attempt=3), True, (Seal(5, 3),)),
        (at(SEALED, attempt=2), False, (ClaimReduction(5, 2),)),
        (at(SEALED), True, (ClaimReduction(5, 1),)),
        (at(REDUCING, attempt=2), True, (Reduce(5, 2),)),
        (at(REDUCING), False, ()),
        (at(CANDIDATE, digest="d1"), True, (MakeDurable(5),)),
        (at(CANDIDATE, digest="d1"), False, ()),
    ],
)
def test_the_phase_there_is_adopted_and_this_servers_part_taken_up(
    before: Phase, there: Iteration, mine: bool, effects: tuple[Effect, ...]
) -> None:
    assert step(at(before), seen(there, mine=mine), 1.0, POLICY) == (there, effects)


@pytest.mark.parametrize("running", [RunningState.DISABLE, RunningState.FINISH, RunningState.STOP])
@pytest.mark.parametrize("phase", Phase)
def test_nothing_is_done_for_a_job_that_does_not_run(phase: Phase, running: RunningState) -> None:
    there = at(phase, running=running, uploaded=2, selected=3)
    assert step(at(), seen(there, mine=True), 1.0, POLICY) == (there, ())


def test_a_job_that_runs_again_goes_on_where_it_was() -> None:
    disabled = at(SEALED, running=RunningState.DISABLE)
    assert step(disabled, seen(at(SEALED)), 1.0, POLICY) == (at(SEALED), (ClaimReduction(5, 1),))


# ---- words


def test_the_results_are_the_protocols_own_words() -> None:
    assert round_timeout("startFLJob") == START_LATE
    assert round_timeout("updateModel") == UPDATE_LATE
    assert aggregation_failed(7) == "Weight aggregation failed, current iteration: 7"
    assert server_exited(5) == EXITED_5
    assert status_lost(7) == (
        "The instance status info stored in distributed cache is empty, current iteration: 7"
    )
