"""Frames between nodes: bytes written out by hand, streams cut anywhere, bytes changed anywhere."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import LocalError, MalformedRequest
from fedcore.wire.node import (
    EMPTY,
    ERROR_LIMIT,
    HEAD,
    META_LIMIT,
    CollectiveMeta,
    Command,
    Frame,
    FrameReader,
    MalformedFrame,
    Meta,
    NodeRole,
    PayloadKind,
    ProtoModel,
    ProtoParam,
    ServerBroadcast,
    decode_broadcast,
    decode_meta,
    decode_model,
    encode,
    encode_meta,
    encode_model,
    reply_meta,
)

MAX_DATA = 300

GOLDEN_META = Meta(
    cmd=Command.ROUND_REQUEST,
    request_id=300,
    role=NodeRole.WORKER,
    user_cmd=2,
    iteration_num=5,
    send_node="w",
    recv_node="10.0.0.1:9",
)
GOLDEN = (
    "02000000"  # FlatBuffers
    "18000000"  # 24 bytes of meta
    "1a00000000000000"  # and 2 of data
    "10ac02"  # 2: request_id 300
    "1801"  # 3: role worker
    "2802"  # 5: user_cmd
    "3805"  # 7: iteration_num
    "420177"  # 8: send_node "w"
    "4a0a31302e302e302e313a39"  # 9: recv_node
    "abcd"
)

U64 = st.integers(0, 2**64 - 1)
I32 = st.integers(-(2**31), 2**31 - 1)
U32 = st.integers(0, 2**32 - 1)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
COLLECTIVE = st.builds(
    CollectiveMeta, st.booleans(), TEXT, TEXT, U64, st.binary(max_size=9), st.binary(max_size=9), U32, U32
)
METAS = st.builds(
    Meta, I32, U64, st.sampled_from(NodeRole), I32, U64, TEXT, TEXT, TEXT, st.none() | COLLECTIVE
)
FRAMES = st.builds(Frame, st.sampled_from(PayloadKind), METAS, st.binary(min_size=1, max_size=MAX_DATA))


def stream(*frames: Frame) -> bytes:
    return b"".join(part for frame in frames for part in encode(frame))


def read(data: bytes, cuts: list[int] | None = None, max_data: int = MAX_DATA) -> tuple[list[Frame], bool]:
    """Read a stream in pieces; return the frames, and whether it turned out malformed."""
    reader, frames = FrameReader(max_data), []
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts or [])})
    for start, end in pairwise(places):
        reader.receive(data[start:end])
        try:
            while (frame := reader.next_frame()) is not None:
                frames.append(frame)
        except MalformedFrame:
            return frames, True
    return frames, False


def test_a_frame_written_by_hand() -> None:
    frame = Frame(PayloadKind.FLATBUFFERS, GOLDEN_META, b"\xab\xcd")
    assert stream(frame).hex() == GOLDEN
    assert read(bytes.fromhex(GOLDEN)) == ([frame], False)


def test_an_empty_reply_written_by_hand() -> None:
    golden = "000000000800000010000000000000000801100752026e6f0000000000000000"
    meta = reply_meta(Meta(Command.COLLECTIVE_SEND_DATA, 7), "no")
    assert stream(Frame(PayloadKind.PROTOBUF, meta, b"")).hex() == golden
    assert read(bytes.fromhex(golden)) == ([Frame(PayloadKind.RAW, meta, EMPTY)], False)


def test_a_collective_meta_written_by_hand() -> None:
    meta = Meta(
        1,
        0,
        collective_meta=CollectiveMeta(
            enable_flag=True,
            send_node="a",
            recv_node="b",
            iteration=3,
            weight_name=b"w",
            phase=b"p",
            chunk_index=4,
            for_index=5,
        ),
    )
    encoded = bytes.fromhex("0801321408011201611a016220032a017732017038044005")
    assert encode_meta(meta) == encoded
    assert decode_meta(encoded) == meta


def test_a_meta_is_never_empty() -> None:
    assert encode_meta(Meta(0, 0)) == b"\x08\x00"
    assert decode_meta(b"\x08\x00") == Meta(0, 0)


def test_data_are_not_copied() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    _, data = encode(Frame(PayloadKind.RAW, GOLDEN_META, values.data))
    assert np.shares_memory(values, np.frombuffer(data, np.uint8))
    assert bytes(data) == values.tobytes()


def test_read_data_cannot_be_changed() -> None:
    ((frame,), _) = read(bytes.fromhex(GOLDEN))
    assert isinstance(frame.data, memoryview) and frame.data.readonly


@settings(deadline=None)  # the first one builds the message classes
@given(METAS)
def test_metas_come_back(meta: Meta) -> None:
    assert decode_meta(encode_meta(meta)) == meta


@settings(deadline=None)  # the first one builds the message classes
@given(st.lists(FRAMES, max_size=4), st.lists(st.integers(0, 5000), max_size=12))
def test_a_stream_may_be_cut_anywhere(frames: list[Frame], cuts: list[int]) -> None:
    assert read(stream(*frames), cuts) == (frames, False)


@settings(deadline=None)  # the first one builds the message classes
@given(
    st.lists(FRAMES, min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=5),
    st.lists(st.integers(0, 5000), max_size=6),
)
def test_whatever_is_changed_it_is_frames_or_malformed(
    frames: list[Frame], changes: list[tuple[int, int]], cuts: list[int]
) -> None:
    data = bytearray(stream(*frames))
    for place, value in changes:
        data[place % len(data)] = value
    whole = read(bytes(data))
    assert read(bytes(data), cuts) == whole
    assert all(0 < len(frame.data) <= MAX_DATA for frame in whole[0])


@settings(deadline=None)  # the first one builds the message classes
@given(st.binary(max_size=200), st.lists(st.integers(0, 5000), max_size=6))
def test_any_bytes_are_frames_or_malformed(data: bytes, cuts: list[int]) -> None:
    assert read(data, cuts) == read(data)


@pytest.mark.parametrize(
    ("kind", "meta", "total"),
    [
        (3, 2, 10),
        (2**32 - 1, 2, 10),
        (0, 0, 8),
        (0, META_LIMIT + 1, META_LIMIT + 9),
        (0, 8, 8),
        (0, 8, 0),
        (0, 8, 2**31 - 1),
        (0, 8, 2**64 - 1),
        (0, 2, 2 + MAX_DATA + 1),
    ],
)
def test_heads_that_are_none(kind: int, meta: int, total: int) -> None:
    with pytest.raises(MalformedFrame):
        reader_of(HEAD.pack(kind, meta, total)).next_frame()


@pytest.mark.parametrize(
    ("kind", "meta", "total"), [(2, 1, 2), (0, META_LIMIT, META_LIMIT + MAX_DATA), (1, 2, 2 + MAX_DATA)]
)
def test_heads_at_the_limits(kind: int, meta: int, total: int) -> None:
    assert reader_of(HEAD.pack(kind, meta, total)).next_frame() is None


def test_no_limit_is_above_the_protocols() -> None:
    reader = FrameReader(1 << 40)
    reader.receive(HEAD.pack(0, 2, 2**31 - 2))
    assert reader.next_frame() is None
    reader = FrameReader(1 << 40)
    reader.receive(HEAD.pack(0, 2, 2**31 - 1))
    with pytest.raises(MalformedFrame):
        reader.next_frame()


@pytest.mark.parametrize(
    "meta",
    [
        b"\xff",  # no field
        b"\x12\x01",  # a text beyond the end
        b"\x42\x01\xff",  # send_node is not UTF-8
        b"\x18\x03",  # role 3
    ],
)
def test_metas_that_are_none(meta: bytes) -> None:
    frames, malformed = read(HEAD.pack(0, len(meta), len(meta) + 1) + meta + b"x")
    assert (frames, malformed) == ([], True)


def test_an_unknown_command_is_none_of_the_readers_business() -> None:
    frame = Frame(PayloadKind.RAW, Meta(cmd=77, request_id=1), EMPTY)
    assert read(stream(frame)) == ([frame], False)


def test_nothing_after_a_malformed_head_is_looked_at() -> None:
    good = Frame(PayloadKind.RAW, GOLDEN_META, EMPTY)
    reader = reader_of(stream(good) + HEAD.pack(9, 1, 2) + stream(good))
    assert reader.next_frame() == good
    for _ in range(3):
        with pytest.raises(MalformedFrame, match="kind 9"):
            reader.next_frame()
        reader.receive(stream(good))
    assert not reader.incomplete


def test_a_reader_knows_whether_a_frame_has_begun() -> None:
    data = bytes.fromhex(GOLDEN)
    reader = FrameReader(MAX_DATA)
    assert not reader.incomplete
    for byte in data[:-1]:
        reader.receive(bytes([byte]))
        assert reader.next_frame() is None and reader.incomplete
    reader.receive(data[-1:])
    assert reader.next_frame() is not None and not reader.incomplete


def test_a_named_length_takes_no_memory_and_a_frame_not_much_more_than_its_data() -> None:
    limit, piece = 32 << 20, bytes(1 << 16)
    meta = encode_meta(GOLDEN_META)
    reader = FrameReader(limit)
    tracemalloc.start()
    try:
        reader.receive(HEAD.pack(0, len(meta), len(meta) + limit) + meta)
        assert reader.next_frame() is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        for _ in range(limit // len(piece)):
            reader.receive(piece)
            frame = reader.next_frame()
        assert frame is not None and len(frame.data) == limit
        assert tracemalloc.get_traced_memory()[1] < limit * 1.3
    finally:
        tracemalloc.stop()


def test_a_frame_too_long_for_the_protocol_is_not_sent() -> None:

    view = memoryview(np.broadcast_to(np.zeros(1, np.uint8), (2**31,)))
    with pytest.raises(LocalError, match="cannot be sent"):
        encode(Frame(PayloadKind.RAW, GOLDEN_META, view))


def test_a_long_error_text_is_cut_between_characters() -> None:
    meta = reply_meta(GOLDEN_META, "é" * ERROR_LIMIT + "\udcff")
    assert meta == replace(GOLDEN_META, response_error="é" * (ERROR_LIMIT // 2))
    assert reply_meta(GOLDEN_META, "a\udcffb").response_error == "a?b"


def test_a_model_written_by_hand() -> None:
    model = ProtoModel(
        "job",
        "i_1",
        4,
        2,
        (ProtoParam("w", b"\x00\x00\x80\x3f", (1, 2), "float32", True), ProtoParam("e", b"")),
    )
    weight = "0a017712040000803f1a0201022207666c6f617433322801"
    encoded = bytes.fromhex("0a036a6f621203695f31180420022a18" + weight + "2a030a0165")
    assert encode_model(model) == encoded
    assert decode_model(encoded) == model
    assert decode_model(memoryview(encoded)) == model


def test_a_broadcast_written_by_hand() -> None:
    encoded = bytes.fromhex("10051a016320012801")
    assert decode_broadcast(encoded) == ServerBroadcast(0, 5, "c", True, True)


@pytest.mark.parametrize("decode", [decode_model, decode_broadcast])
def test_payloads_that_are_none(decode: object) -> None:
    with pytest.raises(MalformedRequest):
        decode(b"\xff\xff")  # type: ignore[operator]


def reader_of(data: bytes) -> FrameReader:
    reader = FrameReader(MAX_DATA)
    reader.receive(data)
    return reader
