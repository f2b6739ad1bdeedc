"""Frames and messages between nodes, as bytes and as values.

A frame is a head of 16 bytes, the meta (protobuf) and the data::

    offset  size  field, little-endian
    0       4     kind of the data: 0 raw, 1 protobuf, 2 FlatBuffers
    4       4     m, length of the meta, above 0
    8       8     t, m and the length of the data together; m < t < 2^31-1
    16      m     the meta
    16+m    t-m   the data; "empty" is eight zero bytes of kind raw

Rules kept here:

* ``FrameReader`` gives frames or raises MalformedFrame, whatever the bytes. After a malformed head or meta no byte is
  interpreted any more: the stream is out of step, the connection has to be closed.
* A length that a peer names takes no memory; only bytes that have arrived do, and never more than the reader's limit.
* The data of a frame are not looked at. The messages that may be in them have functions of their own.

Which node may send what, and what is answered, is decided elsewhere (``net/node_listener.py`` and its handlers).

Source: MindSpore Federated 0.1, TCP protocol between nodes; protobuf encoding, proto3.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from fedcore.errors import LocalError, MalformedRequest, PeerError

HEAD = struct.Struct("<IIQ")
META_LIMIT = 1 << 16  # bytes; ours, a meta has a few hundred
TOTAL_LIMIT = (1 << 31) - 1  # bytes of meta and data together; the protocol's, exclusive
MAX_DATA = (
    8 << 20
)  # bytes of data, for most purposes: large things move in pieces of half of that at most; ours
ERROR_LIMIT = 1024  # bytes of an error text in a reply; ours
EMPTY = bytes(8)
"""The data of a frame that has nothing to say."""


class MalformedFrame(PeerError):
    """Bytes of a peer are no frame; nothing after them can be understood."""


class Command(IntEnum):
    """What a frame asks for. Numbers from 100 on are ours."""

    ROUND_REQUEST = 0
    COLLECTIVE_SEND_DATA = 1
    SERVER_BROADCAST_EVENT = 2
    SERVER_PING = 3
    SERVER_PONG = 4
    GET_MODEL_WEIGHT = 5
    BROADCAST_MODEL_WEIGHT = 6
    SERVER_PULL_WEIGHT = 8
    LOCATE_LEDGER = 100
    SEAL_PARTIAL = 101
    READ_PARTIAL = 102
    TAKE_LEDGER = 103
    DESCRIBE_MODEL = 104
    READ_MODEL = 105
    OFFER_MODEL = 106


class PayloadKind(IntEnum):
    """What the data of a frame are."""

    RAW = 0
    PROTOBUF = 1
    FLATBUFFERS = 2


class NodeRole(IntEnum):
    """What a node is."""

    SERVER = 0
    WORKER = 1
    SCHEDULER = 2


@dataclass(frozen=True, slots=True)
class CollectiveMeta:
    """Where a chunk of a collective sum belongs; kept for the sake of the protocol, we send none.

    Attributes:
        enable_flag: whether the rest counts.
        iteration: 0..2^64-1.
        chunk_index: 0..2^32-1, as ``for_index``.
    """

    enable_flag: bool = False
    send_node: str = ""
    recv_node: str = ""
    iteration: int = 0
    weight_name: bytes = b""
    phase: bytes = b""
    chunk_index: int = 0
    for_index: int = 0


@dataclass(frozen=True, slots=True)
class Meta:
    """What a frame is about.

    Attributes:
        cmd: a Command, or a number that is not known here, -2^31..2^31-1.
        request_id: 0..2^64-1; a reply carries that of its request.
        role: of the sender of the request.
        user_cmd: the round of a ROUND_REQUEST, -2^31..2^31-1.
        iteration_num: 0..2^64-1.
        send_node: id of the sender of the request.
        recv_node: id of its receiver, "" for whoever it reaches.
        response_error: why a request was refused; "" in requests and good replies.
    """

    cmd: int
    request_id: int
    role: NodeRole = NodeRole.SERVER
    user_cmd: int = 0
    iteration_num: int = 0
    send_node: str = ""
    recv_node: str = ""
    response_error: str = ""
    collective_meta: CollectiveMeta | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """One request or reply. Without data, eight zero bytes are sent."""

    kind: PayloadKind
    meta: Meta
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class ProtoParam:
    """One weight of a ProtoModel.

    Attributes:
        data: the values as they lie in memory, little-endian.
        shape: sizes as the peer says; nothing is checked against ``data``.
        type: name of the number type, "float32".
        require_aggr: whether the weight takes part in the mean.
    """

    name: str
    data: bytes | memoryview
    shape: tuple[int, ...] = ()
    type: str = ""
    require_aggr: bool = False


@dataclass(frozen=True, slots=True)
class ProtoModel:
    """A model on its way between servers.

    Attributes:
        iteration_num: 0..2^64-1.
        instance_state: as in Redis, 0..3; any number if a peer says so.
    """

    fl_name: str
    instance_name: str
    iteration_num: int
    instance_state: int = 0
    params: tuple[ProtoParam, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerBroadcast:
    """A counter event (``ServerBroadcastMessage``).

    Attributes:
        type: 0 is COUNT_EVENT.
        iteration_num: the sender's current iteration.
    """

    type: int = 0
    iteration_num: int = 0
    count_name: str = ""
    trigger_first: bool = False
    trigger_last: bool = False


# -- frames --


def encode(frame: Frame) -> tuple[bytes, memoryview]:
    """Return a frame as the bytes before its data, and the data, which are not copied.

    Raises:
        LocalError: it is longer than the protocol allows.
    """
    data, kind = memoryview(frame.data), frame.kind
    if not data.nbytes:
        data, kind = memoryview(EMPTY), PayloadKind.RAW
    meta = encode_meta(frame.meta)
    total = len(meta) + data.nbytes
    if total >= TOTAL_LIMIT:
        raise LocalError(f"a frame of {total} bytes cannot be sent", hint="send it in several pieces")
    return HEAD.pack(kind, len(meta), total) + meta, data.cast("B")


def reply_meta(request: Meta, error: str = "") -> Meta:
    """Return the meta of a reply; a long error text is cut."""
    text = error.encode("utf-8", "replace")[:ERROR_LIMIT].decode("utf-8", "ignore")
    return replace(request, response_error=text)


class FrameReader:
    """Cuts a stream into frames; sans-IO.

    Bytes wait in the reader until somebody asks for the next frame, so that a connection with enough to do can leave
    the rest of what it has received unread.
    """

    def __init__(self, max_data: int) -> None:
        """Accept at most ``max_data`` bytes of data in a frame."""
        self._max_data = max_data
        self._unread = bytearray()
        self._data = bytearray()
        self._head: tuple[PayloadKind, int, int] | None = (
            None  # of the frame under way: kind, bytes of meta, of data
        )
        self._meta: Meta | None = None
        self._fault: MalformedFrame | None = None

    @property
    def incomplete(self) -> bool:
        """Whether bytes wait here. If there is no next frame, they are the beginning of one."""
        return bool(self._unread) or self._head is not None

    def receive(self, data: bytes) -> None:
        """Take bytes as they arrive, in pieces of any size."""
        if self._fault is None:
            self._unread += data

    def next_frame(self) -> Frame | None:
        """Return the next whole frame, None if more bytes are needed.

        The data are a read-only view of memory that belongs to the frame alone.

        Raises:
            MalformedFrame: once and for all.
        """
        if self._fault is not None:
            raise MalformedFrame(str(self._fault))
        try:
            return self._next()
        except MalformedFrame as fault:
            self._fault = fault
            self._unread, self._data = bytearray(), bytearray()
            raise

    def _next(self) -> Frame | None:
        if self._head is None:
            if len(self._unread) < HEAD.size:
                return None
            kind, meta_length, total = HEAD.unpack(self._take(HEAD.size))
            self._head = _judge_head(kind, meta_length, total, self._max_data)
        kind, meta_length, data_length = self._head
        if self._meta is None:
            if len(self._unread) < meta_length:
                return None
            self._meta = decode_meta(self._take(meta_length))
        self._data += self._take(min(data_length - len(self._data), len(self._unread)))
        if len(self._data) < data_length:
            return None
        frame = Frame(kind, self._meta, memoryview(self._data).toreadonly())
        self._head, self._meta, self._data = None, None, bytearray()
        return frame

    def _take(self, count: int) -> bytes:
        with memoryview(self._unread) as unread:
            taken = bytes(unread[:count])
        del self._unread[:count]
        return taken


def _judge_head(kind: int, meta: int, total: int, max_data: int) -> tuple[PayloadKind, int, int]:
    """Check a head; return the kind, the length of the meta and the length of the data."""
    if kind > max(PayloadKind):
        raise MalformedFrame(f"a frame of the unknown kind {kind}")
    if not 0 < meta <= META_LIMIT:
        raise MalformedFrame(f"a frame with a meta of {meta} bytes: 1 to {META_LIMIT} are allowed")
    if not meta < total < TOTAL_LIMIT:
        raise MalformedFrame(f"a frame of {total} bytes, {meta} of them meta")
    if total - meta > max_data:
        raise MalformedFrame(f"a frame with {total - meta} bytes of data: {max_data} are allowed")
    return PayloadKind(kind), meta, total - meta


# -- messages --


def encode_meta(meta: Meta) -> bytes:
    """Encode a meta; never empty, because a frame must have one."""
    message = _message("MessageMeta")(
        cmd=meta.cmd,
        request_id=meta.request_id,
        role=meta.role,
        user_cmd=meta.user_cmd,
        iteration_num=meta.iteration_num,
        send_node=meta.send_node,
        recv_node=meta.recv_node,
        response_error=meta.response_error,
    )
    if meta.collective_meta is not None:
        message.collective_meta.SetInParent()
        for name in CollectiveMeta.__slots__:
            setattr(message.collective_meta, name, getattr(meta.collective_meta, name))
    encoded: bytes = message.SerializeToString()
    return encoded or b"\x08\x00"  # proto3 leaves zeros out; "cmd = 0" may be said nevertheless


def decode_meta(data: bytes) -> Meta:
    """Decode a meta.

    Raises:
        MalformedFrame: it is none, or names an unknown role.
    """
    message = _message("MessageMeta")()
    try:
        message.ParseFromString(data)
        role = NodeRole(message.role)
    except (DecodeError, ValueError) as error:
        raise MalformedFrame(f"the meta of a frame cannot be read: {error}") from error
    collective = None
    if message.HasField("collective_meta"):
        collective = CollectiveMeta(
            *(getattr(message.collective_meta, name) for name in CollectiveMeta.__slots__)
        )
    return Meta(
        cmd=message.cmd,
        request_id=message.request_id,
        role=role,
        user_cmd=message.user_cmd,
        iteration_num=message.iteration_num,
        send_node=message.send_node,
        recv_node=message.recv_node,
        response_error=message.response_error,
        collective_meta=collective,
    )


def encode_model(model: ProtoModel) -> bytes:
    """Encode a model; its weights are copied."""
    message = _message("ProtoModel")(
        fl_name=model.fl_name,
        instance_name=model.instance_name,
        iteration_num=model.iteration_num,
        instance_state=model.instance_state,
    )
    for param in model.params:
        message.params.add(
            name=param.name,
            data=bytes(param.data),
            shape=param.shape,
            type=param.type,
            require_aggr=param.require_aggr,
        )
    encoded: bytes = message.SerializeToString()
    return encoded


def decode_model(data: bytes | memoryview) -> ProtoModel:
    """Decode a model; whether its weights fit anything is not checked.

    Raises:
        MalformedRequest: it is no ProtoModel.
    """
    message = _parse("ProtoModel", data)
    return ProtoModel(
        fl_name=message.fl_name,
        instance_name=message.instance_name,
        iteration_num=message.iteration_num,
        instance_state=message.instance_state,
        params=tuple(
            ProtoParam(param.name, param.data, tuple(param.shape), param.type, param.require_aggr)
            for param in message.params
        ),
    )


def decode_broadcast(data: bytes | memoryview) -> ServerBroadcast:
    """Decode a counter event.

    Raises:
        MalformedRequest: it is no ServerBroadcastMessage.
    """
    message = _parse("ServerBroadcastMessage", data)
    return ServerBroadcast(
        type=message.type,
        iteration_num=message.cur_iteration_num,
        count_name=message.count_name,
        trigger_first=message.trigger_first,
        trigger_last=message.trigger_last,
    )


def _parse(name: str, data: bytes | memoryview) -> Any:
    message = _message(name)()
    try:
        message.ParseFromString(bytes(data))
    except DecodeError as error:
        raise MalformedRequest(f"no {name}: {error}") from error
    return message


_of = descriptor_pb2.FieldDescriptorProto
_I32, _U32, _I64, _U64 = _of.TYPE_INT32, _of.TYPE_UINT32, _of.TYPE_INT64, _of.TYPE_UINT64
_BOOL, _TEXT, _BYTES = _of.TYPE_BOOL, _of.TYPE_STRING, _of.TYPE_BYTES

# Field -> number and type; enums are int32 here, which has the same bytes and keeps unknown numbers.
_FIELDS: Mapping[str, Mapping[str, tuple[int, Any]]] = {
    "CollectiveMeta": {
        "enable_flag": (1, _BOOL),
        "send_node": (2, _TEXT),
        "recv_node": (3, _TEXT),
        "iteration": (4, _U64),
        "weight_name": (5, _BYTES),
        "phase": (6, _BYTES),
        "chunk_index": (7, _U32),
        "for_index": (8, _U32),
    },
    "MessageMeta": {
        "cmd": (1, _I32),
        "request_id": (2, _U64),
        "role": (3, _I32),
        "user_cmd": (5, _I32),
        "collective_meta": (6, "CollectiveMeta"),
        "iteration_num": (7, _U64),
        "send_node": (8, _TEXT),
        "recv_node": (9, _TEXT),
        "response_error": (10, _TEXT),
    },
    "ServerBroadcastMessage": {
        "type": (1, _I32),
        "cur_iteration_num": (2, _U64),
        "count_name": (3, _TEXT),
        "trigger_first": (4, _BOOL),
        "trigger_last": (5, _BOOL),
    },
    "ProtoParam": {
        "name": (1, _TEXT),
        "data": (2, _BYTES),
        "shape": (3, _I64),
        "type": (4, _TEXT),
        "require_aggr": (5, _BOOL),
    },
    "ProtoModel": {
        "fl_name": (1, _TEXT),
        "instance_name": (2, _TEXT),
        "iteration_num": (3, _U64),
        "instance_state": (4, _I32),
        "params": (5, "ProtoParam"),
    },
}
_REPEATED = frozenset({("ProtoParam", "shape"), ("ProtoModel", "params")})


@cache
def _message(name: str) -> Any:
    """Return the protobuf class of a message."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"node.{name}"))


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name="node.proto", package="node", syntax="proto3")
    for message_name, fields in _FIELDS.items():
        message = file.message_type.add(name=message_name)
        for name, (number, kind) in fields.items():
            label = _of.LABEL_REPEATED if (message_name, name) in _REPEATED else _of.LABEL_OPTIONAL
            field = message.field.add(name=name, number=number, label=label)
            if isinstance(kind, str):
                field.type, field.type_name = _of.TYPE_MESSAGE, f".node.{kind}"
            else:
                field.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool
