"""What the codec reads and writes when both sides behave."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.wire import reference
from unit.wire.samples import MESSAGES, arbitrary, arrays_in, full, plain

from fedcore.errors import LocalError
from fedcore.wire.codec import decode, encode
from fedcore.wire.messages import (
    CompressFeatureMap,
    CompressType,
    FeatureMap,
    FLPlan,
    RequestFLJob,
    RequestGetModel,
    RequestPullWeight,
    RequestPushMetrics,
    RequestPushWeight,
    RequestUpdateModel,
    ResponseFLJob,
    ResponsePushMetrics,
    ResponsePushWeight,
    ResponseUpdateModel,
)

every_message = pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
some_message = st.sampled_from(MESSAGES).flatmap(arbitrary)

# ---- bytes of a real device client (Java, built by the FlatBuffers runtime of that language)

DEVICE_START_FL_JOB = bytes.fromhex(
    "2000000000001a0018001400100000000c0008000000000000000000000004001a000000140000002400000003000000"
    "100000002c0000000200000000020000050000006369642d310000000d00000031373935333337373735383931000000"
    "0f00000064656d6f2e44656d6f436c69656e7400"
)
DEVICE_UPDATE_MODEL = bytes.fromhex(
    "18000000000012001c00180014000c000800100000000400120000000000c03f14000000010000007800000068000000"
    "84000000020000003400000004000000dcffffff1400000004000000020000000000374100007341070000006c617965"
    "722e620008000c00040008000800000018000000040000000300000000001c400000c64000001f41070000006c617965"
    "722e6100050000006369642d310000000d000000313739353333373737363132330000000f00000064656d6f2e44656d"
    "6f436c69656e7400"
)
DEVICE_GET_MODEL = bytes.fromhex(
    "100000000c00140010000c00080004000c0000001000000014000000010000002000000002000000000200000d000000"
    "313739353333373737363133390000000f00000064656d6f2e44656d6f436c69656e7400"
)


def test_start_fl_job_of_a_real_device() -> None:
    assert plain(decode(RequestFLJob, DEVICE_START_FL_JOB)) == plain(
        RequestFLJob(
            fl_name="demo.DemoClient",
            fl_id="cid-1",
            iteration=0,
            data_size=3,
            timestamp="1795337775891",
            download_compress_types=np.array([CompressType.NO_COMPRESS, CompressType.QUANT], np.int8),
        )
    )


def test_update_model_of_a_real_device() -> None:
    assert plain(decode(RequestUpdateModel, DEVICE_UPDATE_MODEL)) == plain(
        RequestUpdateModel(
            fl_name="demo.DemoClient",
            fl_id="cid-1",
            iteration=1,
            feature_map=(
                FeatureMap("layer.a", np.array([2.4375, 6.1875, 9.9375], np.float32)),
                FeatureMap("layer.b", np.array([11.4375, 15.1875], np.float32)),
            ),
            timestamp="1795337776123",
            upload_loss=1.5,
        )
    )


def test_get_model_of_a_real_device() -> None:
    assert plain(decode(RequestGetModel, DEVICE_GET_MODEL)) == plain(
        RequestGetModel(
            fl_name="demo.DemoClient",
            iteration=1,
            timestamp="1795337776139",
            download_compress_types=np.array([0, 2], np.int8),
        )
    )


# ---- there and back


@every_message
def test_a_full_message_survives(message: type) -> None:
    assert plain(decode(message, encode(full(message)))) == plain(full(message))


@every_message
def test_an_empty_message_survives(message: type) -> None:
    assert decode(message, encode(message())) == message()
    assert len(encode(message())) == 12  # root offset, vtable without slots, table without fields


@given(some_message)
def test_any_message_survives(value: Any) -> None:
    assert plain(decode(type(value), encode(value))) == plain(value)


@given(some_message)
def test_other_readers_understand_us(value: Any) -> None:
    assert plain(reference.read(type(value), encode(value))) == plain(value)


@given(
    some_message, st.booleans(), st.booleans(), st.booleans(), st.sampled_from([None, b"FLJ0", b"?\0\xff!"])
)
def test_we_understand_other_writers(
    value: Any, defaults: bool, share_vtables: bool, share_strings: bool, identifier: bytes | None
) -> None:
    buffer = reference.write(
        value,
        identifier=identifier,
        defaults=defaults,
        share_vtables=share_vtables,
        share_strings=share_strings,
    )
    assert plain(decode(type(value), buffer)) == plain(value)


# ---- freedoms of the format


def test_scalars_that_equal_their_default_are_not_sent() -> None:
    shortest = encode(ResponsePushMetrics())
    assert encode(ResponsePushMetrics(0)) == shortest
    assert encode(RequestPushMetrics(0.0, -0.0)) == shortest
    assert len(reference.write(RequestPushMetrics(0.0, 0.0), defaults=True)) > len(shortest)


def test_absent_strings_and_empty_strings_differ() -> None:
    assert decode(ResponseUpdateModel, encode(ResponseUpdateModel(reason=""))).reason == ""
    assert decode(ResponseUpdateModel, encode(ResponseUpdateModel(feature_map=()))).feature_map == ()
    assert decode(ResponseUpdateModel, encode(ResponseUpdateModel())).reason is None


def test_equal_vtables_are_written_once() -> None:
    tables = tuple(FeatureMap(f"w{number}", np.zeros(1, np.float32)) for number in range(11))
    one, eleven = (len(encode(RequestPushWeight(1, tables[:count]))) for count in (1, 11))
    # each further weight: its distance, its table, its name of two or three bytes, its vector of one float
    assert eleven - one == 9 * (4 + 12 + 8 + 8) + (4 + 12 + 8 + 8)


def test_a_builder_may_share_strings() -> None:
    names = tuple(f"network.backbone.layer{number}.weight" for number in range(50))
    empty = np.zeros(0, np.int8)
    update = RequestUpdateModel(
        fl_name=names[0],
        fl_id=names[0],
        compress_feature_map=tuple(CompressFeatureMap(name, empty) for name in names),
        name_vec=names,
    )
    buffer = reference.write(update, share_strings=True)
    assert len(buffer) < len(encode(update))
    assert plain(decode(RequestUpdateModel, buffer)) == plain(update)


@pytest.mark.parametrize("shift", range(1, 8))
@every_message
def test_misaligned_parts_are_read(message: type, shift: int) -> None:
    buffer = encode(full(message))
    root = int.from_bytes(buffer[:4], "little") + shift
    shifted = root.to_bytes(4, "little") + bytes(shift) + buffer[4:]
    assert plain(decode(message, shifted)) == plain(full(message))


@pytest.mark.parametrize("shift", range(8))
def test_buffers_at_any_address_are_read(shift: int) -> None:
    buffer = memoryview(bytes(shift) + DEVICE_UPDATE_MODEL)[shift:]
    assert plain(decode(RequestUpdateModel, buffer)) == plain(decode(RequestUpdateModel, DEVICE_UPDATE_MODEL))


def test_slots_of_a_newer_schema_are_ignored() -> None:
    newer = ResponseUpdateModel(200, "fine", None, "1", "2")
    assert decode(ResponsePushWeight, encode(replace(newer, feature_map=None))) == ResponsePushWeight(
        200, "fine"
    )


def test_what_follows_the_message_is_ignored() -> None:
    assert decode(ResponsePushMetrics, encode(ResponsePushMetrics(200)) + b"more") == ResponsePushMetrics(200)


# ---- arrays are views


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, ">f4"])
def test_arrays_of_any_type_and_order_are_written(dtype: Any) -> None:
    rows: Any = np.arange(12).reshape(3, 4).astype(dtype)
    for source in (rows, np.asfortranarray(rows), rows[:, ::2], rows[::-1].T, rows[0, 0], rows[:0]):
        (weight,) = (
            decode(RequestPushWeight, encode(RequestPushWeight(1, (FeatureMap("w", source),)))).feature_map
            or ()
        )
        assert plain(weight.data) == plain(source.astype("<f4").reshape(-1))


@pytest.mark.parametrize("kind", [bytes, bytearray, lambda raw: memoryview(bytearray(raw)), memoryview])
@every_message
def test_arrays_are_read_only_views_into_the_buffer(message: type, kind: Any) -> None:
    buffer = kind(encode(full(message)))
    whole = np.frombuffer(buffer, np.uint8)
    for array in arrays_in(decode(message, buffer)):
        assert np.shares_memory(array, whole)
        assert not array.flags.owndata
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True


def test_empty_vectors_at_the_very_end_are_read() -> None:
    buffer = encode(FeatureMap(None, np.zeros(0, np.float32)))
    assert buffer.endswith(bytes(4))
    assert plain(decode(FeatureMap, buffer).data) == plain(np.zeros(0, np.float32))


def test_a_large_model_is_not_copied() -> None:
    values = np.arange(1_000_000, dtype=np.float32)
    buffer = encode(RequestPushWeight(1, (FeatureMap("a", values), FeatureMap("b", values))))
    for weight in decode(RequestPushWeight, buffer).feature_map or ():
        assert weight.data is not None
        assert np.shares_memory(weight.data, np.frombuffer(buffer, np.uint8))
        assert np.array_equal(weight.data, values)


# ---- our own mistakes


@pytest.mark.parametrize(
    "value",
    [
        ResponsePushMetrics(2**31),
        ResponsePushMetrics("200"),  # type: ignore[arg-type]
        ResponseFLJob(download_compress_type=128),
        FLPlan(lr=1e39),
        ResponsePushWeight(reason="\ud800"),
        RequestPullWeight(1, ("\udfff",)),
        RequestPushWeight(1, (FeatureMap("\ud800"),)),
    ],
)
def test_values_that_fit_no_slot_are_our_fault(value: Any) -> None:
    with pytest.raises(LocalError, match=type(value).__name__):
        encode(value)


def test_enums_are_sent_as_their_numbers() -> None:
    reply = ResponseFLJob(download_compress_type=CompressType.QUANT)
    assert decode(ResponseFLJob, encode(reply)).download_compress_type == 2


def test_numpy_scalars_are_sent() -> None:
    low, high = np.array([0.1, 0.2], np.float32)
    packed = CompressFeatureMap("w", np.array([1], np.int8), low, high)
    assert decode(CompressFeatureMap, encode(packed)).max_val == float(np.float32(0.2))
