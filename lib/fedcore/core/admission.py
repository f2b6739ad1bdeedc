"""May this request be served now, and with which words: codes and texts are the protocol's own.

A verdict is decided from the request and from what the store answered; nothing that depends on shared state is
refused from a local copy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fedcore.core.job import RunningState

SAFEMODE = "The cluster is in safemode."
DISABLED_OR_FINISHED = "The server's training job is disabled or finished."

MAX_DATA_SIZE = 65535
SELECTED_OK = "success"
UPDATE_OK = "success not ready"
START_FULL = "Current amount for startFLJob has reached the threshold. Please startFLJob later."
UPDATE_FULL = "Current amount for updateModel is enough. Please retry later."
MISSING_UPDATE_PARTS = "Verify flatbuffers schema failed for RequestUpdateModel."
MISSING_START_PARTS = "Verify flatbuffers schema failed for RequestFLJob."
SIGN_DATA_EMPTY = "sign data is empty."
START_UNPROVEN = "startFLJob sign and certificate verify failed."
KEY_KNOWN = "startFLJob: store key attestation failed"


def bad_schema(table: str) -> str:
    """Text for a body that is not the table of its route."""
    return f"The schema of {table} is invalid."


@dataclass(frozen=True, slots=True)
class Verdict:
    """Code and reason of a reply."""

    code: int
    reason: str


def gate(*, round_name: str, stopping: bool, running: RunningState, store_available: bool) -> str | None:
    """Return the text that answers a round while the server cannot take it, or None if it may pass.

    A finished job still hands out its model, and a lost Redis does not hide the model that is in memory.
    """
    if stopping:
        return DISABLED_OR_FINISHED
    if running is RunningState.FINISH and round_name == "getModel":
        return None
    if running is not RunningState.RUNNING:
        return DISABLED_OR_FINISHED
    if not store_available and round_name != "getModel":
        return SAFEMODE
    return None


class Selection(StrEnum):
    """What the store answered to a startFLJob; the values are the script's words."""

    SELECTED = "selected"
    KNOWN = "known"  # a repeat: this client already holds a place
    OTHER_KEY = "other key"  # this client holds a place with another key to sign with
    UPLOADED = "uploaded"  # this client's update of this iteration is already counted
    FULL = "full"
    RESERVED = "reserved"  # full, but this client was refused before: refused again, it may give up
    UNFIT = "unfit"  # there is a place, but the request itself may not have it


class Acceptance(StrEnum):
    """What the store answered to an updateModel; the values are the script's words."""

    ACCEPTED = "accepted"
    REPEATED = "repeated"
    FULL = "full"
    UNKNOWN_CLIENT = "unknown"
    OTHER_ITERATION = "other"
    UNFIT = "unfit"  # everything shared allows it, but its weights may not count
    UNPREPARED = "unprepared"  # it must be masked, and its client did not end the cipher rounds
    CHANGED = "changed"  # it is masked, and is not what its client sent under the same masks before


# Whose sender needs a place when it comes again; OTHER_ITERATION means that it has one in the current iteration.
NEEDS_PLACE = (Acceptance.FULL, Acceptance.UNKNOWN_CLIENT, Acceptance.UNPREPARED)


class Standing(StrEnum):
    """What became of the signature under a request other than startFLJob."""

    PASSED = "passed"
    FAILED = "failed"  # it is missing, or not this client's under this request
    STALE = "stale"  # too old or too new, or used before
    UNKNOWN = "unknown"  # of a client without a place in this iteration


def judge_signature(standing: Standing, fl_id: str | None = None) -> Verdict | None:
    """Refuse a request for its signature; None if that is good.

    Args:
        standing: what became of it.
        fl_id: the client, which only updateModel names in its answer.
    """
    match standing:
        case Standing.FAILED:
            return Verdict(400, f"verify signature failed{_named(fl_id)}")
        case Standing.STALE | Standing.UNKNOWN:
            found = "verify signature timestamp failed or cannot find its key attestation"
            return Verdict(300, f"{found}{_named(fl_id)}")
    return None


def _named(fl_id: str | None) -> str:
    return "." if fl_id is None else f" for fl id {fl_id}"


def data_size_fault(data_size: int, largest: int = MAX_DATA_SIZE) -> str | None:
    """Return why a declared data size is refused, or None; ``largest`` is the greatest that may have a place.

    The original widens a negative size to a huge unsigned one and calls it too large; a test for "not enough"
    comes first there too, so only 0 is not enough.
    """
    if data_size == 0:
        return "FL job data size is not enough."
    if not 0 < data_size <= largest:
        return "FL job data size is too large."
    return None


def judge_start(selection: Selection, fl_id: str, fault: str | None) -> Verdict:
    """Answer a startFLJob from the store's word.

    Args:
        selection: what the store said.
        fl_id: the client, for the text.
        fault: why the request itself is unfit, or None.
    """
    match selection:
        case Selection.SELECTED | Selection.KNOWN:
            return Verdict(200, SELECTED_OK)
        case Selection.OTHER_KEY:
            return Verdict(300, KEY_KNOWN)
        case Selection.UPLOADED:
            return Verdict(300, f"Updating device metadata failed for fl id {fl_id}")
        case Selection.UNFIT:
            return Verdict(300, fault or START_FULL)
        case Selection.FULL | Selection.RESERVED:
            return Verdict(300, START_FULL)


def judge_update(
    acceptance: Acceptance,
    fl_id: str,
    requested: int,
    current: int,
    next_req_time: int,
    *,
    too_far: bool = False,
    missing: str = "",
) -> Verdict:
    """Answer an updateModel from the store's word.

    Args:
        acceptance: what the store said.
        fl_id: the client, for the text.
        requested: iteration named in the request.
        current: the server's iteration.
        next_req_time: milliseconds since the epoch, for the text.
        too_far: the update is unfit only because it is too far from the model. An unmodified device ends for good after
            a 400; it may have trained in good faith, and comes back after a 300.
        missing: the weight that the update is unfit without, "" if that is not the reason.
    """
    match acceptance:
        case Acceptance.ACCEPTED | Acceptance.REPEATED:
            return Verdict(200, UPDATE_OK)
        case Acceptance.FULL:
            return Verdict(300, UPDATE_FULL)
        case Acceptance.UNKNOWN_CLIENT:
            return Verdict(300, f"devices_meta for {fl_id} is not set. Please retry later.")
        case Acceptance.OTHER_ITERATION:
            return Verdict(
                300,
                f"UpdateModel iteration number is invalid:{requested}, current iteration:{current}, "
                f"Retry later at time: {next_req_time}, fl id is {fl_id}",
            )
        case Acceptance.UNPREPARED:
            return Verdict(300, f"fl_id: {fl_id} is not in get_secrets_clients. Please retry later.")
        case Acceptance.CHANGED:
            return Verdict(300, f"Updating metadata of UpdateModelClientList failed for fl id {fl_id}")
        case Acceptance.UNFIT if too_far:
            return Verdict(300, f"The update is too far from the model, retry later at time: {next_req_time}")
        case Acceptance.UNFIT if missing:
            return Verdict(400, f"The updated weight of parameter {missing} is missing, fl id: {fl_id}")
        case Acceptance.UNFIT:
            return Verdict(400, f"Verify model feature map failed, retry later at time: {next_req_time}")
