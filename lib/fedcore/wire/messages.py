"""The protocol's tables as frozen dataclasses, one per request and reply.

The order of the fields is the order of the slots in ``schema/*.fbs``; a test keeps the two alike. Field names are
the protocol's own. Scalars that equal their default are not on the wire; ``None`` is an absent string, vector or
table. Vectors of numbers decode to read-only numpy views into the request's buffer, without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt


class Kind(Enum):
    """How a field travels; the codec has one reader and one writer for each."""

    INT = "int"
    FLOAT = "float"
    BOOL = "bool"
    BYTE = "byte"
    STRING = "string"
    UBYTES = "[ubyte]"
    BYTES = "[byte]"
    INTS = "[int]"
    FLOATS = "[float]"
    STRINGS = "[string]"
    TABLE = "table"
    TABLES = "[table]"


Int = Annotated[int, Kind.INT]  # int32
Float = Annotated[float, Kind.FLOAT]  # float32 on the wire
Bool = Annotated[bool, Kind.BOOL]
Byte = Annotated[int, Kind.BYTE]  # int8, the base of the schema's small enums
String = Annotated[str | None, Kind.STRING]  # UTF-8
UBytes = Annotated[bytes | None, Kind.UBYTES]
Bytes = Annotated[npt.NDArray[np.int8] | None, Kind.BYTES]
Ints = Annotated[npt.NDArray[np.int32] | None, Kind.INTS]
Floats = Annotated[npt.NDArray[np.float32] | None, Kind.FLOATS]
Strings = Annotated[tuple[str, ...] | None, Kind.STRINGS]


class ResponseCode(IntEnum):
    """Outcome of a round as devices read it (``retcode``)."""

    SUCCEED = 200
    NOT_READY = 201
    OUT_OF_TIME = 300
    REQUEST_ERROR = 400
    SYSTEM_ERROR = 500


class CompressType(IntEnum):
    """How weights are packed."""

    NO_COMPRESS = 0
    DIFF_SPARSE_QUANT = 1
    QUANT = 2


class UnsupervisedEvalFlg(IntEnum):
    """Whether devices are asked for evaluation vectors."""

    EVAL_DISABLE = 0
    EVAL_ENABLE = 1


# ---- parts of requests and replies


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """One named weight: float32[n], row-major; a scalar is a vector of one element."""

    weight_fullname: String = None
    data: Floats = None


@dataclass(frozen=True, slots=True)
class CompressFeatureMap:
    """One named weight in 8 bits per value, with the range that the 256 steps span."""

    weight_fullname: String = None
    compress_data: Bytes = None
    min_val: Float = 0.0
    max_val: Float = 0.0


@dataclass(frozen=True, slots=True)
class Aggregation:
    """Aggregation rule; never sent by a server."""

    type: Byte = 0
    weights: Floats = None
    iid_rate: Float = 0.0
    total_client_num: Int = 0


@dataclass(frozen=True, slots=True)
class EarlyStop:
    """Early stopping; never sent by a server."""

    early_stop_type: Byte = 0
    weight: Float = 0.0
    rounds: Int = 0


@dataclass(frozen=True, slots=True)
class UnsupervisedEvalItem:
    """One evaluation vector of a device: float32[n]."""

    eval_name: String = None
    eval_data: Floats = None


@dataclass(frozen=True, slots=True)
class UnsupervisedEvalItems:
    """The evaluation vectors of a device."""

    eval_items: tuple[UnsupervisedEvalItem, ...] | None = None


@dataclass(frozen=True, slots=True)
class PWParams:
    """Parameters of pairwise masking: threshold, generator, and the Shamir prime (33 bytes, big-endian)."""

    t: Int = 0
    p: UBytes = None
    g: Int = 0
    prime: UBytes = None


@dataclass(frozen=True, slots=True)
class DPParams:
    """Parameters of local differential privacy."""

    dp_eps: Float = 0.0
    dp_delta: Float = 0.0
    dp_norm_clip: Float = 0.0


@dataclass(frozen=True, slots=True)
class DSParams:
    """Parameters of SignDS."""

    sign_k: Float = 0.0
    sign_eps: Float = 0.0
    sign_thr_ratio: Float = 0.0
    sign_global_lr: Float = 0.0
    sign_dim_out: Int = 0


@dataclass(frozen=True, slots=True)
class CipherPublicParams:
    """The privacy mechanism of the job and its parameters; every table is always sent."""

    encrypt_type: String = None
    pw_params: PWParams | None = None
    dp_params: DPParams | None = None
    ds_params: DSParams | None = None


@dataclass(frozen=True, slots=True)
class FLPlan:
    """What a device is to do; present in every ResponseFLJob, refusals too."""

    server_mode: String = None
    fl_name: String = None
    iterations: Int = 0
    epochs: Int = 0
    early_stop: EarlyStop | None = None
    mini_batch: Int = 0
    shuffle: Bool = False
    lr: Float = 0.0
    aggregation: Aggregation | None = None
    metrics: Bytes = None
    cipher: CipherPublicParams | None = None


# ---- startFLJob


@dataclass(frozen=True, slots=True)
class RequestFLJob:
    """A device asks to take part in the current iteration."""

    fl_name: String = None
    fl_id: String = None
    iteration: Int = 0
    data_size: Int = 0
    timestamp: String = None
    sign_data: UBytes = None
    key_attestation: String = None
    equip_cert: String = None
    equip_ca_cert: String = None
    root_cert: String = None
    download_compress_types: Bytes = None
    eval_data_size: Int = 0


@dataclass(frozen=True, slots=True)
class ResponseFLJob:
    """The plan, the iteration to name in updateModel, and the current weights."""

    retcode: Int = 0
    reason: String = None
    iteration: Int = 0
    is_selected: Bool = False
    next_req_time: String = None
    fl_plan_config: FLPlan | None = None
    feature_map: tuple[FeatureMap, ...] | None = None
    timestamp: String = None
    upload_compress_type: Byte = 0
    upload_sparse_rate: Float = 0.0
    download_compress_type: Byte = 0
    compress_feature_map: tuple[CompressFeatureMap, ...] | None = None
    unsupervised_eval_flg: Byte = 0


# ---- updateModel


@dataclass(frozen=True, slots=True)
class RequestUpdateModel:
    """A device's trained weights, each value already multiplied by the device's data size."""

    fl_name: String = None
    fl_id: String = None
    iteration: Int = 0
    feature_map: tuple[FeatureMap, ...] | None = None
    timestamp: String = None
    signature: UBytes = None
    upload_loss: Float = 0.0
    sign: Int = 0
    index_array: Ints = None
    compress_feature_map: tuple[CompressFeatureMap, ...] | None = None
    upload_compress_type: Byte = 0
    upload_sparse_rate: Float = 0.0
    name_vec: Strings = None
    upload_accuracy: Float = 0.0
    unsupervised_eval_items: UnsupervisedEvalItems | None = None


@dataclass(frozen=True, slots=True)
class ResponseUpdateModel:
    """Whether the update counts."""

    retcode: Int = 0
    reason: String = None
    feature_map: tuple[FeatureMap, ...] | None = None
    next_req_time: String = None
    timestamp: String = None


# ---- getModel


@dataclass(frozen=True, slots=True)
class RequestGetModel:
    """A device asks for the result of an iteration."""

    fl_name: String = None
    iteration: Int = 0
    timestamp: String = None
    download_compress_types: Bytes = None


@dataclass(frozen=True, slots=True)
class ResponseGetModel:
    """The aggregated weights; ``iteration`` is the server's current one, ``timestamp`` the next request time."""

    retcode: Int = 0
    reason: String = None
    iteration: Int = 0
    feature_map: tuple[FeatureMap, ...] | None = None
    timestamp: String = None
    download_compress_type: Byte = 0
    compress_feature_map: tuple[CompressFeatureMap, ...] | None = None


# ---- cipher rounds


@dataclass(frozen=True, slots=True)
class ClientPublicKeys:
    """The public keys of a member, as the others see them; the last four only where devices must sign."""

    fl_id: String = None
    c_pk: UBytes = None
    s_pk: UBytes = None
    pw_iv: UBytes = None
    pw_salt: UBytes = None
    timestamp: String = None
    iteration: Int = 0
    signature: UBytes = None
    certificate_chain: Strings = None


@dataclass(frozen=True, slots=True)
class ClientShare:
    """A share: towards the server ``fl_id`` is who it is for, or whose secret it is of; from it, whose secret."""

    fl_id: String = None
    share: UBytes = None
    index: Int = 0


@dataclass(frozen=True, slots=True)
class RequestExchangeKeys:
    """A client's public keys: 32 bytes each, as the salt is; 16 bytes each initial counter block."""

    fl_id: String = None
    c_pk: UBytes = None
    s_pk: UBytes = None
    iteration: Int = 0
    timestamp: String = None
    ind_iv: UBytes = None
    pw_iv: UBytes = None
    pw_salt: UBytes = None
    signature: UBytes = None
    certificate_chain: Strings = None


@dataclass(frozen=True, slots=True)
class ResponseExchangeKeys:
    """Whether the client's keys are in the list."""

    retcode: Int = 0
    reason: String = None
    next_req_time: String = None
    iteration: Int = 0


@dataclass(frozen=True, slots=True)
class GetExchangeKeys:
    """A client asks for everybody's keys."""

    fl_id: String = None
    iteration: Int = 0
    timestamp: String = None
    signature: UBytes = None


@dataclass(frozen=True, slots=True)
class ReturnExchangeKeys:
    """Everybody's keys, the caller's own among them."""

    retcode: Int = 0
    iteration: Int = 0
    remote_publickeys: tuple[ClientPublicKeys, ...] | None = None
    next_req_time: String = None


@dataclass(frozen=True, slots=True)
class RequestShareSecrets:
    """A client's shares of its two secrets, one sealed record for each other member."""

    fl_id: String = None
    encrypted_shares: tuple[ClientShare, ...] | None = None
    iteration: Int = 0
    timestamp: String = None
    signature: UBytes = None


@dataclass(frozen=True, slots=True)
class ResponseShareSecrets:
    """Whether the shares are stored."""

    retcode: Int = 0
    reason: String = None
    next_req_time: String = None
    iteration: Int = 0


@dataclass(frozen=True, slots=True)
class GetShareSecrets:
    """A client asks for the shares that are addressed to it."""

    fl_id: String = None
    iteration: Int = 0
    timestamp: String = None
    signature: UBytes = None


@dataclass(frozen=True, slots=True)
class ReturnShareSecrets:
    """The shares that others have addressed to the caller."""

    retcode: Int = 0
    iteration: Int = 0
    encrypted_shares: tuple[ClientShare, ...] | None = None
    next_req_time: String = None


@dataclass(frozen=True, slots=True)
class GetClientList:
    """A client asks whose updates count."""

    fl_id: String = None
    iteration: Int = 0
    timestamp: String = None
    signature: UBytes = None


@dataclass(frozen=True, slots=True)
class ReturnClientList:
    """The ids of those whose updates count."""

    retcode: Int = 0
    reason: String = None
    clients: Strings = None
    iteration: Int = 0
    next_req_time: String = None


@dataclass(frozen=True, slots=True)
class ClientListSign:
    """A client's signature under the list that it was told."""

    fl_id: String = None
    signature: UBytes = None


@dataclass(frozen=True, slots=True)
class SendClientListSign:
    """A client's signature under the list that it was told; ``req_signature`` is that of the request itself."""

    fl_id: String = None
    iteration: Int = 0
    timestamp: String = None
    signature: UBytes = None
    req_signature: UBytes = None


@dataclass(frozen=True, slots=True)
class ResponseClientListSign:
    """Whether the signature is stored."""

    retcode: Int = 0
    reason: String = None
    iteration: Int = 0
    next_req_time: String = None


@dataclass(frozen=True, slots=True)
class RequestAllClientListSign:
    """A client asks what the others have signed."""

    fl_id: String = None
    iteration: Int = 0
    timestamp: String = None
    signature: UBytes = None


@dataclass(frozen=True, slots=True)
class ReturnAllClientListSign:
    """Everybody's signatures under the list."""

    retcode: Int = 0
    reason: String = None
    client_list_sign: tuple[ClientListSign, ...] | None = None
    iteration: Int = 0
    next_req_time: String = None


@dataclass(frozen=True, slots=True)
class SendReconstructSecret:
    """A client's report: for each owner whose record it could open, one share in plain."""

    fl_id: String = None
    reconstruct_secret_shares: tuple[ClientShare, ...] | None = None
    iteration: Int = 0
    timestamp: String = None
    signature: UBytes = None


@dataclass(frozen=True, slots=True)
class ReconstructSecret:
    """Whether the report is taken."""

    retcode: Int = 0
    reason: String = None
    iteration: Int = 0
    next_req_time: String = None


# ---- worker rounds


@dataclass(frozen=True, slots=True)
class RequestPushWeight:
    """A worker's trained weights, not multiplied by anything."""

    iteration: Int = 0
    feature_map: tuple[FeatureMap, ...] | None = None


@dataclass(frozen=True, slots=True)
class ResponsePushWeight:
    """Whether the worker's weights became the model."""

    retcode: Int = 0
    reason: String = None
    iteration: Int = 0


@dataclass(frozen=True, slots=True)
class RequestPullWeight:
    """A worker asks for aggregated weights by name."""

    iteration: Int = 0
    weight_names: Strings = None


@dataclass(frozen=True, slots=True)
class ResponsePullWeight:
    """The aggregated weights in the order asked for."""

    retcode: Int = 0
    reason: String = None
    iteration: Int = 0
    feature_map: tuple[FeatureMap, ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestPushMetrics:
    """A worker's loss and accuracy; ends the iteration in hybrid mode."""

    loss: Float = 0.0
    accuracy: Float = 0.0


@dataclass(frozen=True, slots=True)
class ResponsePushMetrics:
    """Whether the metrics were taken."""

    retcode: Int = 0


CipherRequest = (
    RequestExchangeKeys
    | GetExchangeKeys
    | RequestShareSecrets
    | GetShareSecrets
    | GetClientList
    | SendClientListSign
    | RequestAllClientListSign
    | SendReconstructSecret
)
CipherReply = (
    ResponseExchangeKeys
    | ReturnExchangeKeys
    | ResponseShareSecrets
    | ReturnShareSecrets
    | ReturnClientList
    | ResponseClientListSign
    | ReturnAllClientListSign
    | ReconstructSecret
)
CipherRound = Literal[
    "exchangeKeys",
    "getKeys",
    "shareSecrets",
    "getSecrets",
    "getClientList",
    "pushListSign",
    "getListSign",
    "reconstructSecrets",
]
Request = RequestFLJob | RequestUpdateModel | RequestGetModel | CipherRequest
Reply = ResponseFLJob | ResponseUpdateModel | ResponseGetModel | CipherReply
Round = Literal["startFLJob", "updateModel", "getModel"] | CipherRound
