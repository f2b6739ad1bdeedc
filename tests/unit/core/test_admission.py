"""Codes and texts, letter by letter as old devices look for them."""

from itertools import product

import pytest

from fedcore.core.admission import (
    MISSING_START_PARTS,
    MISSING_UPDATE_PARTS,
    Acceptance,
    Selection,
    Standing,
    Verdict,
    bad_schema,
    data_size_fault,
    gate,
    judge_signature,
    judge_start,
    judge_update,
)
from fedcore.core.job import RunningState

SAFEMODE = "The cluster is in safemode."
GONE = "The server's training job is disabled or finished."
ROUNDS = ["startFLJob", "updateModel", "getModel"]


def expected_gate(round_name: str, stopping: bool, running: RunningState, available: bool) -> str | None:
    """The protocol's order, one line each."""
    if stopping:
        return GONE
    if running is RunningState.FINISH and round_name == "getModel":
        return None
    if running in (RunningState.DISABLE, RunningState.FINISH, RunningState.STOP):
        return GONE
    if not available and round_name != "getModel":
        return SAFEMODE
    return None


@pytest.mark.parametrize(
    ("round_name", "stopping", "running", "available"),
    list(product(ROUNDS, (False, True), RunningState, (False, True))),
)
def test_the_gate(round_name: str, stopping: bool, running: RunningState, available: bool) -> None:
    text = gate(round_name=round_name, stopping=stopping, running=running, store_available=available)
    assert text == expected_gate(round_name, stopping, running, available)


@pytest.mark.parametrize(
    ("data_size", "fault"),
    [
        (1, None),
        (65535, None),
        (0, "FL job data size is not enough."),
        (65536, "FL job data size is too large."),
        (2**31 - 1, "FL job data size is too large."),
        # the original widens the int32 to an unsigned 64-bit number
        (-1, "FL job data size is too large."),
        (-(2**31), "FL job data size is too large."),
    ],
)
def test_data_sizes(data_size: int, fault: str | None) -> None:
    assert data_size_fault(data_size) == fault


FULL = "Current amount for startFLJob has reached the threshold. Please startFLJob later."


@pytest.mark.parametrize(
    ("selection", "verdict"),
    [
        (Selection.SELECTED, Verdict(200, "success")),
        (Selection.KNOWN, Verdict(200, "success")),  # a lost reply is sent again
        (Selection.UPLOADED, Verdict(300, "Updating device metadata failed for fl id {x}")),
        (Selection.FULL, Verdict(300, FULL)),
        (Selection.UNFIT, Verdict(300, "FL job data size is not enough.")),
    ],
)
def test_start_fl_job(selection: Selection, verdict: Verdict) -> None:
    assert judge_start(selection, "{x}", "FL job data size is not enough.") == verdict


def test_an_unfit_start_without_a_reason_is_refused_all_the_same() -> None:
    assert judge_start(Selection.UNFIT, "x", None).code == 300


@pytest.mark.parametrize(
    ("acceptance", "verdict"),
    [
        (Acceptance.ACCEPTED, Verdict(200, "success not ready")),
        (Acceptance.REPEATED, Verdict(200, "success not ready")),
        (Acceptance.FULL, Verdict(300, "Current amount for updateModel is enough. Please retry later.")),
        (
            Acceptance.UNKNOWN_CLIENT,
            Verdict(300, "devices_meta for {x} is not set. Please retry later."),
        ),
        (
            Acceptance.OTHER_ITERATION,
            Verdict(
                300,
                "UpdateModel iteration number is invalid:-3, current iteration:5, "
                "Retry later at time: 1700000000123, fl id is {x}",
            ),
        ),
        (
            Acceptance.UNFIT,
            Verdict(400, "Verify model feature map failed, retry later at time: 1700000000123"),
        ),
    ],
)
def test_update_model(acceptance: Acceptance, verdict: Verdict) -> None:
    assert judge_update(acceptance, "{x}", -3, 5, 1700000000123) == verdict


def test_the_words_of_the_store_are_all_judged() -> None:
    """A new word without an answer would fall through to None."""
    for selection in Selection:
        assert isinstance(judge_start(selection, "x", None), Verdict)
    for acceptance in Acceptance:
        assert isinstance(judge_update(acceptance, "x", 1, 1, 1), Verdict)


def test_texts_of_bodies_that_are_no_requests() -> None:
    assert bad_schema("RequestFLJob") == "The schema of RequestFLJob is invalid."
    assert bad_schema("RequestUpdateModel") == "The schema of RequestUpdateModel is invalid."
    assert bad_schema("RequestGetModel") == "The schema of RequestGetModel is invalid."
    assert MISSING_START_PARTS == "Verify flatbuffers schema failed for RequestFLJob."
    assert MISSING_UPDATE_PARTS == "Verify flatbuffers schema failed for RequestUpdateModel."


@pytest.mark.parametrize(
    ("standing", "verdict", "of_update"),
    [
        (Standing.PASSED, None, None),
        (
            Standing.FAILED,
            Verdict(400, "verify signature failed."),
            Verdict(400, "verify signature failed for fl id x"),
        ),
        (
            Standing.STALE,
            Verdict(300, "verify signature timestamp failed or cannot find its key attestation."),
            Verdict(300, "verify signature timestamp failed or cannot find its key attestation for fl id x"),
        ),
    ],
)
def test_signatures(standing: Standing, verdict: Verdict | None, of_update: Verdict | None) -> None:
    assert judge_signature(standing) == verdict
    assert judge_signature(standing, "x") == of_update


def test_who_has_no_place_is_told_the_same() -> None:
    assert judge_signature(Standing.UNKNOWN, "x") == judge_signature(Standing.STALE, "x")


def test_another_key() -> None:
    told = judge_start(Selection.OTHER_KEY, "x", None)
    assert told == Verdict(300, "startFLJob: store key attestation failed")
