"""What a server's reply means for a device: a verdict for any status and any bytes.

Kinder than the original device client in three ways: the texts of an unavailable server are recognised by
equality, so that no model can contain one by accident; a body that is not the round's table is a refusal
(RESTART), not the end; and HTTP errors that may pass ask for the same request again. And it sees more in one answer
than an old device: that an update was lost with its server and is to be sent again (AGAIN).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from fedcore.compression import quant
from fedcore.core.cipher import LIST_LOST
from fedcore.errors import MalformedRequest, NonFinite
from fedcore.wire.arrays import Floats
from fedcore.wire.codec import decode
from fedcore.wire.messages import (
    CipherRound,
    CompressFeatureMap,
    CompressType,
    FeatureMap,
    FLPlan,
    ReconstructSecret,
    Reply,
    ResponseClientListSign,
    ResponseExchangeKeys,
    ResponseFLJob,
    ResponseGetModel,
    ResponseShareSecrets,
    ResponseUpdateModel,
    ReturnAllClientListSign,
    ReturnClientList,
    ReturnExchangeKeys,
    ReturnShareSecrets,
    Round,
)

MAX_TEXT = 512  # bytes; longer bodies are never one of the texts below
MAX_REASON = 200  # characters of foreign text that reach a log
DEVICE_MODES = ("FEDERATED_LEARNING", "HYBRID_TRAINING")
WORKER_MODES = ("CLOUD_TRAINING",)


class Verdict(Enum):
    """What a reply asks the device to do."""

    SUCCESS = auto()  # go on
    WAIT = auto()  # ask the same again a little later
    RESTART = auto()  # begin the iteration anew, later
    AGAIN = auto()  # the same, in a moment: the iteration waits for it
    REPEAT = auto()  # send the same bytes again, as after an I/O error
    FAILED = auto()  # give up
    OVER = auto()  # there is nothing left to do


@dataclass(frozen=True, slots=True)
class Judgement:
    """A reply, understood; ``reply`` is set where the body is the round's table."""

    verdict: Verdict
    reason: str
    reply: Reply | None = None


POLLING: tuple[CipherRound, ...] = ("getKeys", "getSecrets", "getClientList", "getListSign")
CIPHER_REPLIES: Mapping[Round, type[Reply]] = {
    "exchangeKeys": ResponseExchangeKeys,
    "getKeys": ReturnExchangeKeys,
    "shareSecrets": ResponseShareSecrets,
    "getSecrets": ReturnShareSecrets,
    "getClientList": ReturnClientList,
    "pushListSign": ResponseClientListSign,
    "getListSign": ReturnAllClientListSign,
    "reconstructSecrets": ReconstructSecret,
}

_NOT_READY: Mapping[Round, Verdict] = {
    "startFLJob": Verdict.RESTART,
    "updateModel": Verdict.RESTART,
    "getModel": Verdict.WAIT,
    **dict.fromkeys(CIPHER_REPLIES, Verdict.WAIT),  # those who have shared secrets are needed until the end
}
_ALWAYS_OVER = dict.fromkeys(_NOT_READY, Verdict.OVER)
_ALWAYS_RESTART = dict.fromkeys(_NOT_READY, Verdict.RESTART)

TEXTS: Mapping[bytes, Mapping[Round, Verdict]] = {
    b"The cluster is in safemode.": _NOT_READY,
    b"The server's training job is not ready.": _NOT_READY,
    b"The server's training job is disabled or finished.": _ALWAYS_OVER,
    b"An inner error occurred": _ALWAYS_RESTART,
}

CODES: Mapping[Round, Mapping[int, Verdict]] = {  # every other code: FAILED
    "startFLJob": {200: Verdict.SUCCESS, 300: Verdict.RESTART},
    "updateModel": {200: Verdict.SUCCESS, 300: Verdict.RESTART},
    "getModel": {200: Verdict.SUCCESS, 201: Verdict.WAIT, 300: Verdict.RESTART},
    **{
        name: {200: Verdict.SUCCESS, 300: Verdict.RESTART} | ({201: Verdict.WAIT} if name in POLLING else {})
        for name in CIPHER_REPLIES
    },
}

REPLIES: Mapping[Round, type[Reply]] = {
    "startFLJob": ResponseFLJob,
    "updateModel": ResponseUpdateModel,
    "getModel": ResponseGetModel,
    **CIPHER_REPLIES,
}

PASSING_STATUS = (408, 425, 429)  # of the 4xx, those that a repeat may cure


def judge(round_: Round, status: int, body: bytes) -> Judgement:
    """Say what an HTTP reply to a round means; any bytes are understood somehow."""
    if not 200 <= status < 300:
        passing = status >= 500 or status in PASSING_STATUS
        return Judgement(Verdict.REPEAT if passing else Verdict.FAILED, f"HTTP status {status}")
    text = body.strip() if len(body) <= MAX_TEXT else b""
    if text in TEXTS:
        return Judgement(TEXTS[text][round_], text.decode())
    try:
        reply: Reply = decode(REPLIES[round_], body)
    except MalformedRequest as error:
        return Judgement(Verdict.RESTART, f"the body is not a table: {error}")
    verdict = CODES[round_].get(reply.retcode, Verdict.FAILED)
    if isinstance(reply, ReturnClientList) and verdict is Verdict.WAIT and reply.reason == LIST_LOST:
        verdict = Verdict.AGAIN
    return Judgement(verdict, f"{reply.retcode} {clip(getattr(reply, 'reason', None))}", reply)


def clip(text: str | None) -> str:
    """Make foreign text fit for a log: short, on one line, without control characters."""
    return repr((text or "")[:MAX_REASON])[1:-1]


def come_back(reply: Reply | None) -> int | None:
    """Return the next request time that a refusal names, in ms since the epoch, if it names one."""
    text = None
    match reply:
        case None:
            pass
        case ResponseGetModel():
            text = reply.timestamp
        case _:
            text = reply.next_req_time
    usable = text is not None and text.isascii() and text.isdigit() and len(text) < 17
    return int(text) if usable and text else None


def weights_in(reply: ResponseFLJob | ResponseGetModel) -> dict[str, Floats]:
    """Return the weights of a reply by name, in the order received, whichever way they are packed.

    Raises:
        MalformedRequest: as ``weights_of``, or what is packed cannot be read.
    """
    if reply.download_compress_type == CompressType.QUANT:
        return weights_of(tuple(map(_restored, reply.compress_feature_map or ())))
    if reply.download_compress_type == CompressType.NO_COMPRESS:
        return weights_of(reply.feature_map)
    raise MalformedRequest(f"the weights have the compress type {reply.download_compress_type}")


def _restored(item: CompressFeatureMap) -> FeatureMap:
    if item.compress_data is None:
        return FeatureMap(item.weight_fullname)
    try:
        values = quant.restore(item)
    except NonFinite as error:
        raise MalformedRequest(str(error)) from error
    values.flags.writeable = False  # as those that were decoded from a body
    return FeatureMap(item.weight_fullname, values)


def weights_of(items: tuple[FeatureMap, ...] | None) -> dict[str, Floats]:
    """Return a reply's weights by name, in the order received.

    Raises:
        MalformedRequest: no weight at all, one without name or values, or two of one name.
    """
    weights = some_weights_of(items)
    if not weights:
        raise MalformedRequest("the reply holds no weights")
    return weights


def some_weights_of(items: tuple[FeatureMap, ...] | None) -> dict[str, Floats]:
    """Return the weights of a reply that need not hold any.

    Raises:
        MalformedRequest: one is without name or values, or two have one name.
    """
    weights: dict[str, Floats] = {}
    for item in items or ():
        if item.weight_fullname is None or item.data is None or item.weight_fullname in weights:
            raise MalformedRequest("a weight has no name, no values or a name used twice")
        weights[item.weight_fullname] = item.data
    return weights


def fault_of(
    reply: ResponseFLJob,
    plan: FLPlan,
    modes: Collection[str] = DEVICE_MODES,
    downloads: Collection[int] = (CompressType.NO_COMPRESS,),
) -> str:
    """Say why whoever trains in these server modes and reads these types cannot follow a plan; empty if it can."""
    faults = {
        f"the server's mode is {plan.server_mode!r}": plan.server_mode not in modes,
        "the weights are compressed unasked": reply.download_compress_type not in downloads,
        f"the iteration is {reply.iteration}": reply.iteration < 1,
        f"the plan has {plan.epochs} epochs": plan.epochs < 1,
        f"the plan's batch has {plan.mini_batch} samples": plan.mini_batch < 1,
        f"the plan's learning rate is {plan.lr}": not 0 < plan.lr < math.inf,
    }
    return clip("; ".join(text for text, at_fault in faults.items() if at_fault))
