"""Codes and texts of the cipher rounds, and what their requests must hold."""

from __future__ import annotations

import pytest

from fedcore.core import cipher
from fedcore.core.admission import Verdict
from fedcore.core.cipher import Outcome, are_keys, is_for_all, is_public_key, is_report, judge
from fedcore.core.iteration import EXCHANGE_ROUNDS, UNMASK_ROUNDS

KEY, OTHER = bytes(range(32)), bytes(range(50, 82))
IV, SALT = bytes(16), bytes(32)
P = 2**255 - 19


# round, outcome, code, reason: as the specification of the protocol has them
ANSWERS = [
    ("exchangeKeys", "counted", 200, "Success, but the server is not ready yet."),
    ("exchangeKeys", "repeated", 200, "The server has received the request, please do not request again."),
    ("exchangeKeys", "full", 300, "Current amount for exchangeKey is enough. Please retry later."),
    ("exchangeKeys", "other", 300, "iter num is error."),
    ("exchangeKeys", "unknown", 300, "devices_meta for ann is not set. Please retry later."),
    ("exchangeKeys", "unfit", 300, "update key or client failed"),
    ("getKeys", "counted", 200, ""),
    ("getKeys", "repeated", 200, ""),
    ("getKeys", "early", 201, ""),
    ("getKeys", "stranger", 400, ""),
    ("getKeys", "other", 300, ""),
    ("shareSecrets", "counted", 200, "OK"),
    ("shareSecrets", "repeated", 200, "client sharesecret already exists."),
    ("shareSecrets", "full", 300, "Current amount for ShareSecretsKernel is enough."),
    ("shareSecrets", "stranger", 400, "client share secret is not in getkeys list. && client is illegal"),
    ("shareSecrets", "other", 300, "ShareSecretsKernel iteration invalid"),
    ("shareSecrets", "unfit", 300, "update client of shares and shares failed"),
    ("getSecrets", "counted", 200, ""),
    ("getSecrets", "repeated", 200, ""),
    ("getSecrets", "early", 201, ""),
    ("getSecrets", "stranger", 400, ""),
    ("getSecrets", "other", 300, ""),
    ("getClientList", "counted", 200, "send clients_list succeed!"),
    ("getClientList", "repeated", 200, "send clients_list succeed!"),
    ("getClientList", "early", 201, "The server is not ready."),
    ("getClientList", "stranger", 400, "fl_id: ann is not in the update_model_clients"),
    ("getClientList", "other", 300, "iter num is error."),
    ("getClientList", "lost", 201, "The update was lost with its server. Please send it again."),
    (
        "getClientList",
        "late",
        300,
        "The update was lost with its server, and the others are complete. Please retry later.",
    ),
    ("pushListSign", "counted", 200, "send update model client list signature success. "),
    ("pushListSign", "repeated", 200, "The server has received the request, please do not request again."),
    ("pushListSign", "full", 300, "Current amount for PushListSignKernel is enough."),
    (
        "pushListSign",
        "stranger",
        300,
        "client send signature is not in get update model client list. && client is illegal",
    ),
    ("pushListSign", "other", 300, "push list sign iteration number is invalid"),
    ("pushListSign", "unfit", 300, "store client list signature failed"),
    ("getListSign", "counted", 200, "send update model client list signature success. "),
    ("getListSign", "repeated", 200, "send update model client list signature success. "),
    ("getListSign", "early", 201, "The server is not ready."),
    ("getListSign", "stranger", 300, "client not send list signature, && client is illegal"),
    ("getListSign", "other", 300, "iter num is error."),
    (
        "reconstructSecrets",
        "counted",
        200,
        "Success, but the server is not ready to reconstruct secret yet.",
    ),
    ("reconstructSecrets", "repeated", 200, "Client has sended messages."),
    ("reconstructSecrets", "full", 300, "Current amount for ReconstructSecretsKernel is enough."),
    ("reconstructSecrets", "stranger", 400, "The client is not in update model client list."),
    (
        "reconstructSecrets",
        "other",
        300,
        "The iteration round of the client does not match the current iteration.",
    ),
    ("reconstructSecrets", "unfit", 300, "reconstruct update shares or client failed."),
]
# the same, for a client whose update is counted
UPLOADERS = [
    ("pushListSign", "full", "Current amount for PushListSignKernel is enough."),
    (
        "pushListSign",
        "stranger",
        "client send signature is not in get update model client list. && client is illegal",
    ),
    ("getListSign", "stranger", "client not send list signature, but in update model client list."),
    ("reconstructSecrets", "full", "Current amount for ReconstructSecretsKernel is enough."),
    (
        "reconstructSecrets",
        "stranger",
        "The client ann is not in get clients list, but in update model client list.",
    ),
]


@pytest.mark.parametrize(("round_name", "outcome", "code", "reason"), ANSWERS)
def test_answers_are_the_protocols(round_name: str, outcome: str, code: int, reason: str) -> None:
    assert judge(round_name, Outcome(outcome), "ann") == Verdict(code, reason)


@pytest.mark.parametrize(("round_name", "outcome", "reason"), UPLOADERS)
def test_whoever_has_done_its_part_is_told_so(round_name: str, outcome: str, reason: str) -> None:
    assert judge(round_name, Outcome(outcome), "ann", uploader=True) == Verdict(200, reason)


def test_an_uploader_gets_the_usual_answer_elsewhere() -> None:
    assert judge("reconstructSecrets", Outcome.OTHER, "ann", uploader=True).code == 300
    assert judge("getListSign", Outcome.EARLY, "ann", uploader=True).code == 201


def test_the_report_that_is_enough_is_told_so() -> None:
    told = judge("reconstructSecrets", Outcome.COUNTED, "ann", enough=True)
    assert told == Verdict(200, "Success,the secret is reconstructing.")


def test_braces_in_an_id_are_only_braces() -> None:
    assert (
        judge("getClientList", Outcome.STRANGER, "{0}").reason
        == "fl_id: {0} is not in the update_model_clients"
    )


def test_schema_faults_name_the_protocols_tables() -> None:
    assert {name: cipher.malformed(name).reason for name in (*EXCHANGE_ROUNDS, *UNMASK_ROUNDS)} == {
        "exchangeKeys": "The schema of RequestExchangeKeys is invalid.",
        "getKeys": "The schema of GetExchangeKeys is invalid.",
        "shareSecrets": "The schema of RequestShareSecrets is invalid.",
        "getSecrets": "The schema of GetShareSecrets is invalid.",
        "getClientList": "The schema of GetClientList is invalid.",
        "pushListSign": "The schema of PushClientListSign is invalid.",
        "getListSign": "The schema of RequestAllClientListSign is invalid.",
        "reconstructSecrets": "The schema of SendReconstructSecret is invalid.",
    }


# ---- keys


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_public_key_has_32_bytes(size: int) -> None:
    assert is_public_key(KEY)
    assert not is_public_key(bytes(range(1, size + 1)))
    assert not is_public_key(None)


@pytest.mark.parametrize(
    "number",
    [
        0,
        1,
        P - 1,
        P,
        P + 1,
        2**255,
        2**255 + 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    ],
)
def test_a_key_with_which_everybody_agrees_on_zero_is_refused(number: int) -> None:
    assert not is_public_key(number.to_bytes(32, "little"))


def test_what_agrees_on_zero_is_just_what_is_refused() -> None:
    """Held against the real key agreement, which fails on an all-zero secret."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    private = X25519PrivateKey.from_private_bytes(bytes(range(32)))
    for number in (*range(12), P - 2, P - 1, P, P + 1, P + 2):
        raw = number.to_bytes(32, "little")
        try:
            private.exchange(X25519PublicKey.from_public_bytes(raw))
            agreed = True
        except ValueError:
            agreed = False
        assert is_public_key(raw) == agreed, number


def test_lengths_of_what_goes_with_the_keys() -> None:
    assert are_keys(KEY, OTHER, IV, IV, SALT, stable=False)
    assert not are_keys(KEY, OTHER, None, IV, SALT, stable=False)
    assert not are_keys(KEY, OTHER, IV, bytes(15), SALT, stable=False)
    assert not are_keys(KEY, OTHER, IV, IV, bytes(33), stable=False)
    assert not are_keys(None, OTHER, IV, IV, SALT, stable=False)
    assert not are_keys(KEY, None, IV, IV, SALT, stable=False)
    assert not are_keys(KEY, KEY, IV, IV, SALT, stable=False)


def test_the_stable_kind_has_one_key() -> None:
    assert are_keys(None, KEY, None, IV, SALT, stable=True)
    assert not are_keys(None, None, None, IV, SALT, stable=True)
    assert not are_keys(None, KEY, None, None, SALT, stable=True)


# ---- shares and reports


def test_shares_are_for_every_other_member_once() -> None:
    members = ("a", "b", "c")
    assert is_for_all(members, "b", ["c", "a"])
    assert not is_for_all(members, "b", ["a"])
    assert not is_for_all(members, "b", ["a", "a"])
    assert not is_for_all(members, "b", ["a", "c", "b"])
    assert not is_for_all(members, "b", ["a", "x"])


def test_a_report_names_sharers_once_and_never_its_sender() -> None:
    assert is_report({"a", "b", "c"}, "b", ["c", "a"])
    assert is_report({"a", "b", "c"}, "b", ["c"])
    assert not is_report({"a", "b", "c"}, "b", [])
    assert not is_report({"a", "b", "c"}, "b", ["b"])
    assert not is_report({"a", "b", "c"}, "b", ["a", "a"])
    assert not is_report({"a", "b", "c"}, "b", ["a", "x"])
