"""The cipher rounds' codes and texts, which are the protocol's own, and what a request must hold to be taken.

Differences to MindSpore Federated 0.1, where an old device cannot tell or is only better served: a repeat gets the same
answer again, keys of a wrong kind are refused before anybody relies on them, a member must share with all others, and
reconstructSecrets says what became of the report. getClientList tells a client whose update was lost with its server to
send it again, with the code that lets an old device ask once more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import StrEnum

from fedcore.core.admission import Verdict, bad_schema
from fedcore.core.iteration import REPORTS_ROUND

PUBLIC_KEY_BYTES = 32
SALT_BYTES = 32
IV_BYTES = 16
MOST_SHARE_BYTES = 512  # of a sealed record; those of the protocol have 96
MOST_PLAIN_SHARE_BYTES = 33  # a number below the prime
_P = 2**255 - 19
# Points of small order: with each of them everybody agrees on zero (RFC 7748, section 6.1).
_WEAK_POINTS = frozenset(
    (
        0,
        1,
        _P - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    )
)

KEYS_FULL = "Current amount for exchangeKey is enough. Please retry later."
KEYS_UNFIT = "update key or client failed"
KEYS_OK = "Success, but the server is not ready yet."
RECEIVED = "The server has received the request, please do not request again."
ITERATION = "iter num is error."
SHARES_FULL = "Current amount for ShareSecretsKernel is enough."
SHARES_ITERATION = "ShareSecretsKernel iteration invalid"
SHARES_STRANGER = "client share secret is not in getkeys list. && client is illegal"
SHARES_REPEATED = "client sharesecret already exists."
SHARES_UNFIT = "update client of shares and shares failed"
SHARES_OK = "OK"
NOT_READY = "The server is not ready."
LIST_OK = "send clients_list succeed!"
LIST_LOST = "The update was lost with its server. Please send it again."
LIST_LATE = "The update was lost with its server, and the others are complete. Please retry later."
PUSH_ITERATION = "push list sign iteration number is invalid"
PUSH_FULL = "Current amount for PushListSignKernel is enough."
PUSH_STRANGER = "client send signature is not in get update model client list. && client is illegal"
PUSH_UNFIT = "store client list signature failed"
SIGNS_OK = "send update model client list signature success. "  # the blank is the protocol's
SIGNS_UPLOADER = "client not send list signature, but in update model client list."
SIGNS_STRANGER = "client not send list signature, && client is illegal"
REPORTS_FULL = "Current amount for ReconstructSecretsKernel is enough."
REPORTS_ITERATION = "The iteration round of the client does not match the current iteration."
REPORTS_STRANGER = "The client is not in update model client list."
REPORTS_REPEATED = "Client has sended messages."
REPORTS_UNFIT = "reconstruct update shares or client failed."
REPORTS_WAITING = "Success, but the server is not ready to reconstruct secret yet."
REPORTS_OK = "Success,the secret is reconstructing."

# Type of encryption -> the last cipher round before updateModel.
LAST_BEFORE_UPDATE = {"PW_ENCRYPT": "getSecrets", "STABLE_PW_ENCRYPT": "getKeys"}
# Round -> the table whose schema its requests break; pushListSign names another one than its own.
TABLES = {
    "exchangeKeys": "RequestExchangeKeys",
    "getKeys": "GetExchangeKeys",
    "shareSecrets": "RequestShareSecrets",
    "getSecrets": "GetShareSecrets",
    "getClientList": "GetClientList",
    "pushListSign": "PushClientListSign",
    "getListSign": "RequestAllClientListSign",
    REPORTS_ROUND: "SendReconstructSecret",
}


class Outcome(StrEnum):
    """What the store answered to a request of a cipher round; the values are the scripts' words."""

    COUNTED = "counted"
    REPEATED = "repeated"
    EARLY = "early"  # what it asks for is not gathered yet
    FULL = "full"  # the round has all that it needs
    STRANGER = "stranger"  # the client took no part in a round before
    UNKNOWN = "unknown"  # the client has no place
    OTHER = "other"  # another iteration is the current one
    LOST = "lost"  # the client's update does not count any more, and may come again
    LATE = "late"  # the same, and it is too late for that
    UNFIT = "unfit"  # everything shared allows it, but what it brings may not be stored


def malformed(round_name: str) -> Verdict:
    """Refuse what is no request of a round."""
    return Verdict(400, bad_schema(TABLES[round_name]))


def judge(
    round_name: str, outcome: Outcome, fl_id: str, *, uploader: bool = False, enough: bool = False
) -> Verdict:
    """Answer a request from the store's word.

    Args:
        round_name: of its path.
        outcome: what the store said; OTHER also stands for "it cannot say".
        fl_id: the client, for the text.
        uploader: whether the client's update is counted.
        enough: whether as many reports as are needed are there, for reconstructSecrets.
    """
    if round_name == REPORTS_ROUND and outcome is Outcome.COUNTED:
        return Verdict(200, REPORTS_OK if enough else REPORTS_WAITING)
    if uploader and (round_name, outcome) in _UPLOADERS:
        return Verdict(200, _UPLOADERS[round_name, outcome].format(fl_id=fl_id))
    code, reason = _VERDICTS[round_name, outcome]
    return Verdict(code, reason.format(fl_id=fl_id))


_COMEBACK = (300, "")
_VERDICTS: dict[tuple[str, Outcome], tuple[int, str]] = {
    ("exchangeKeys", Outcome.COUNTED): (200, KEYS_OK),
    ("exchangeKeys", Outcome.REPEATED): (200, RECEIVED),
    ("exchangeKeys", Outcome.FULL): (300, KEYS_FULL),
    ("exchangeKeys", Outcome.OTHER): (300, ITERATION),
    ("exchangeKeys", Outcome.UNKNOWN): (300, "devices_meta for {fl_id} is not set. Please retry later."),
    ("exchangeKeys", Outcome.UNFIT): (300, KEYS_UNFIT),
    ("getKeys", Outcome.COUNTED): (200, ""),
    ("getKeys", Outcome.REPEATED): (200, ""),
    ("getKeys", Outcome.EARLY): (201, ""),
    ("getKeys", Outcome.STRANGER): (400, ""),
    ("getKeys", Outcome.OTHER): _COMEBACK,
    ("shareSecrets", Outcome.COUNTED): (200, SHARES_OK),
    ("shareSecrets", Outcome.REPEATED): (200, SHARES_REPEATED),
    ("shareSecrets", Outcome.FULL): (300, SHARES_FULL),
    ("shareSecrets", Outcome.STRANGER): (400, SHARES_STRANGER),
    ("shareSecrets", Outcome.OTHER): (300, SHARES_ITERATION),
    ("shareSecrets", Outcome.UNFIT): (300, SHARES_UNFIT),
    ("getSecrets", Outcome.COUNTED): (200, ""),
    ("getSecrets", Outcome.REPEATED): (200, ""),
    ("getSecrets", Outcome.EARLY): (201, ""),
    ("getSecrets", Outcome.STRANGER): (400, ""),
    ("getSecrets", Outcome.OTHER): _COMEBACK,
    ("getClientList", Outcome.COUNTED): (200, LIST_OK),
    ("getClientList", Outcome.REPEATED): (200, LIST_OK),
    ("getClientList", Outcome.EARLY): (201, NOT_READY),
    ("getClientList", Outcome.STRANGER): (400, "fl_id: {fl_id} is not in the update_model_clients"),
    ("getClientList", Outcome.OTHER): (300, ITERATION),
    ("getClientList", Outcome.LOST): (201, LIST_LOST),
    ("getClientList", Outcome.LATE): (300, LIST_LATE),
    ("pushListSign", Outcome.COUNTED): (200, SIGNS_OK),
    ("pushListSign", Outcome.REPEATED): (200, RECEIVED),
    ("pushListSign", Outcome.FULL): (300, PUSH_FULL),
    ("pushListSign", Outcome.STRANGER): (300, PUSH_STRANGER),
    ("pushListSign", Outcome.OTHER): (300, PUSH_ITERATION),
    ("pushListSign", Outcome.UNFIT): (300, PUSH_UNFIT),
    ("getListSign", Outcome.COUNTED): (200, SIGNS_OK),
    ("getListSign", Outcome.REPEATED): (200, SIGNS_OK),
    ("getListSign", Outcome.EARLY): (201, NOT_READY),
    ("getListSign", Outcome.STRANGER): (300, SIGNS_STRANGER),
    ("getListSign", Outcome.OTHER): (300, ITERATION),
    (REPORTS_ROUND, Outcome.REPEATED): (200, REPORTS_REPEATED),
    (REPORTS_ROUND, Outcome.FULL): (300, REPORTS_FULL),
    (REPORTS_ROUND, Outcome.STRANGER): (400, REPORTS_STRANGER),
    (REPORTS_ROUND, Outcome.OTHER): (300, REPORTS_ITERATION),
    (REPORTS_ROUND, Outcome.UNFIT): (300, REPORTS_UNFIT),
}
# What those are told instead whose update is counted: they have done their part.
_UPLOADERS: dict[tuple[str, Outcome], str] = {
    ("pushListSign", Outcome.FULL): PUSH_FULL,
    ("pushListSign", Outcome.STRANGER): PUSH_STRANGER,
    ("getListSign", Outcome.STRANGER): SIGNS_UPLOADER,
    (REPORTS_ROUND, Outcome.FULL): REPORTS_FULL,
    (
        REPORTS_ROUND,
        Outcome.STRANGER,
    ): "The client {fl_id} is not in get clients list, but in update model client list.",
}


# ---- what requests must hold


def is_public_key(key: bytes | None) -> bool:
    """Tell whether a key can be agreed with: X25519's 32 bytes, not a point of small order in any of its spellings."""
    if key is None or len(key) != PUBLIC_KEY_BYTES:
        return False
    return (int.from_bytes(key, "little") & (2**255 - 1)) % _P not in _WEAK_POINTS


def are_keys(
    c_pk: bytes | None,
    s_pk: bytes | None,
    ind_iv: bytes | None,
    pw_iv: bytes | None,
    pw_salt: bytes | None,
    *,
    stable: bool,
) -> bool:
    """Tell whether a client may be listed with these; the stable kind has neither ``c_pk`` nor ``ind_iv``."""
    shared = is_public_key(s_pk) and len(pw_iv or b"") == IV_BYTES and len(pw_salt or b"") == SALT_BYTES
    return shared and (stable or (is_public_key(c_pk) and c_pk != s_pk and len(ind_iv or b"") == IV_BYTES))


def is_for_all(members: Sequence[str], sender: str, recipients: Sequence[str]) -> bool:
    """Tell whether shares are for every member but their sender, one for each."""
    return len(recipients) == len(members) - 1 and set(recipients) == set(members) - {sender}


def is_report(sharers: Collection[str], sender: str, owners: Sequence[str]) -> bool:
    """Tell whether a report names only owners whose shares it can have, each once, and at least one."""
    named = set(owners)
    return bool(owners) and len(named) == len(owners) and sender not in named and named <= set(sharers)
