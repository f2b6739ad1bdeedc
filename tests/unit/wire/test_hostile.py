"""Whatever the bytes, ``decode`` gives a message or MalformedRequest, in bounded work, and no view beyond."""

import struct
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.wire import reference
from unit.wire.samples import MESSAGES, arrays_in, full

from fedcore.errors import MalformedRequest
from fedcore.wire import codec
from fedcore.wire.codec import MAX_PARTS, MAX_VTABLE, SHARING, decode, encode
from fedcore.wire.messages import (
    FeatureMap,
    RequestFLJob,
    RequestPullWeight,
    RequestPushWeight,
    RequestUpdateModel,
    ResponsePushMetrics,
)

every_message = pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)


def survives(message: type, buffer: codec.Buffer) -> bool:
    """Decode; return whether a message came out, after checking that all of it lies in the buffer."""
    try:
        value: Any = decode(message, buffer)
    except MalformedRequest:
        return False
    assert type(value) is message
    start = address(np.frombuffer(buffer, np.uint8)) if buffer else 0
    total = 0
    for array in arrays_in(value):
        assert start <= address(array) <= address(array) + array.nbytes <= start + len(buffer)
        assert not array.flags.writeable
        total += array.nbytes
    assert total <= SHARING * len(buffer)
    return True


def address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


def valid_buffers(message: type) -> list[bytes]:
    """Return a full message as we write it and as the builders of devices do."""
    buffers = [encode(full(message)), reference.write(full(message), share_vtables=False)]
    assert all(survives(message, buffer) for buffer in buffers)
    return buffers


# ---- damage to valid buffers


@every_message
def test_every_truncation(message: type) -> None:
    for buffer in valid_buffers(message):
        outcomes = [survives(message, buffer[:length]) for length in range(len(buffer))]
        assert not any(outcomes[:-8])  # at most the padding can go without harm


@every_message
def test_every_byte_changed(message: type) -> None:
    for buffer in valid_buffers(message):
        for position, byte in enumerate(buffer):
            for changed in {0, 0xFF, byte ^ 1, byte ^ 0x80, byte + 1 & 0xFF} - {byte}:
                survives(message, buffer[:position] + bytes([changed]) + buffer[position + 1 :])


@every_message
def test_every_word_overwritten(message: type) -> None:
    for buffer in valid_buffers(message):
        size = len(buffer)
        for position in range(0, size - 1, 2):
            here = {size - position + by for by in (-5, -4, -3, -2, -1, 0, 1)}
            for word in {1, 4, 6, MAX_VTABLE, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF, size - 1 & 0xFFFF}:
                survives(message, buffer[:position] + struct.pack("<H", word) + buffer[position + 2 :])
            if position % 4 or position + 4 > size:
                continue
            for word in {
                0,
                1,
                0x7FFFFFFF,
                0x80000000,
                0xFFFFFFFC,
                0xFFFFFFFF,
                size,
                size - 1,
                position,
            } | here:
                changed = struct.pack("<I", word & 0xFFFFFFFF)
                survives(message, buffer[:position] + changed + buffer[position + 4 :])


@given(
    st.sampled_from(MESSAGES),
    st.lists(
        st.tuples(
            st.integers(0, 200),
            st.one_of(
                st.sampled_from([struct.pack("<I", word) for word in (0, 1, 4, 8, 2**31, 2**32 - 1)]),
                st.integers(-64, 64).map(lambda word: struct.pack("<i", word)),
                st.integers(0, 64).map(lambda word: struct.pack("<H", word)),
            ),
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_several_words_overwritten(message: type, changes: list[tuple[int, bytes]]) -> None:
    buffer = bytearray(encode(full(message)))
    for place, word in changes:
        position = 2 * place % (len(buffer) - 4)
        buffer[position : position + len(word)] = word
    assert survives(message, bytes(buffer)) is survives(message, buffer)


@every_message
def test_every_buffer_as_every_other_message(message: type) -> None:
    for buffer in valid_buffers(message):
        for other in MESSAGES:
            survives(other, buffer)


# ---- bytes from nowhere


@given(st.sampled_from(MESSAGES), st.binary(max_size=300))
def test_random_bytes(message: type, buffer: bytes) -> None:
    assert survives(message, buffer) is survives(message, memoryview(buffer))


@given(st.sampled_from(MESSAGES), st.lists(st.integers(0, 40), max_size=60))
def test_random_bytes_that_look_like_offsets(message: type, words: list[int]) -> None:
    survives(message, struct.pack(f"<I{len(words)}H", 4, *words))


@pytest.mark.parametrize(
    "buffer", [b"", b"\0", bytes(4), bytes(64), b"\xff" * 64, b"The cluster is in safemode."], ids=repr
)
@every_message
def test_what_is_no_table(message: type, buffer: bytes) -> None:
    assert not survives(message, buffer)


# ---- built with intent


def with_vector(count: int, content: bytes) -> bytes:
    """Return a table whose slot 1 is a vector; ``content`` begins at CONTENT."""
    return struct.pack("<I4Hi2I", 12, 8, 8, 0, 4, 8, 4, count) + content


CONTENT = 24


def pointing(count: int, target: Callable[[int], int], content: bytes) -> bytes:
    """Return a table with a vector of tables or strings in slot 1.

    Args:
        count: length of the vector.
        target: number -> position of the part in ``content``.
        content: what follows the vector.
    """
    distances = (4 * (count - number) + target(number) for number in range(count))
    return with_vector(count, struct.pack(f"<{count}I", *distances) + content)


def calls_in(action: Callable[[], object]) -> int:
    """Count the functions called, in Python and in C: a measure of work that no clock disturbs."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


def peak_memory_of(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


EMPTY_TABLE = struct.pack("<2Hi", 4, 4, 4)  # the table is at 4


def test_a_million_offsets_to_one_table_are_refused_unread() -> None:
    buffer = pointing(1_000_000, lambda number: 4, EMPTY_TABLE)
    assert calls_in(lambda: survives(RequestPushWeight, buffer)) < 100


def test_the_number_of_tables_is_bounded() -> None:
    most = pointing(MAX_PARTS, lambda number: 4, EMPTY_TABLE)
    assert decode(RequestPushWeight, most).feature_map == (FeatureMap(),) * MAX_PARTS
    assert calls_in(lambda: decode(RequestPushWeight, most)) < 10 * MAX_PARTS
    assert not survives(RequestPushWeight, pointing(MAX_PARTS + 1, lambda number: 4, EMPTY_TABLE))


def test_the_number_of_strings_is_bounded() -> None:
    most = pointing(MAX_PARTS, lambda number: 0, bytes(5))
    assert decode(RequestPullWeight, most).weight_names == ("",) * MAX_PARTS
    assert calls_in(lambda: decode(RequestPullWeight, most)) < 10 * MAX_PARTS
    assert not survives(RequestPullWeight, pointing(MAX_PARTS + 1, lambda number: 0, bytes(5)))


def test_tables_and_strings_count_together() -> None:
    tables = (FeatureMap(),) * (MAX_PARTS // 2)
    names = ("",) * (MAX_PARTS // 2)
    assert survives(RequestUpdateModel, encode(RequestUpdateModel(feature_map=tables, name_vec=names)))
    assert not survives(
        RequestUpdateModel, encode(RequestUpdateModel(feature_map=tables, name_vec=(*names, "one more")))
    )


def test_a_vtable_for_each_of_many_tables() -> None:
    """Each table has its own vtable, none like another, so that nothing can be remembered."""
    content = b"".join(
        struct.pack("<2H2Hi", 8, 4, 4, 100 + number, 8) + bytes(4) for number in range(MAX_PARTS)
    )
    buffer = pointing(MAX_PARTS, lambda number: 16 * number + 8, content + bytes(MAX_PARTS + 200))
    assert calls_in(lambda: survives(RequestPushWeight, buffer)) < 100 * MAX_PARTS
    assert codec._layout_of.cache_info().maxsize is not None


def test_long_vtables_are_refused() -> None:
    """Without a limit each of many overlapping vtables would cost 64 KiB."""
    content = struct.pack("<2Hi", 0xFFFE, 4, 4) * MAX_PARTS + bytes(0x10000)
    buffer = pointing(MAX_PARTS, lambda number: 8 * number + 4, content)
    assert calls_in(lambda: survives(RequestPushWeight, buffer)) < 100


def test_the_longest_vtable_is_read() -> None:
    def buffer(size: int) -> bytes:
        return struct.pack("<I2HH", 4 + size, size, 8, 4) + bytes(size - 6) + struct.pack("<iI", size, 200)

    assert decode(ResponsePushMetrics, buffer(MAX_VTABLE)) == ResponsePushMetrics(200)
    assert not survives(ResponsePushMetrics, buffer(MAX_VTABLE + 2))


def test_overlapping_strings_do_not_multiply() -> None:
    """Each word of the content is the length of a string, 64 KiB, that overlaps the others: 1.3 GB in all."""
    content = struct.pack("<I", 0x10000) * (MAX_PARTS + 0x5000)
    buffer = pointing(MAX_PARTS, lambda number: 4 * number, content)
    assert decode(RequestPullWeight, pointing(1, lambda number: 0, content)).weight_names
    assert not survives(RequestPullWeight, buffer)
    assert peak_memory_of(lambda: survives(RequestPullWeight, buffer)) < (SHARING + 2) * len(buffer)


def test_overlapping_arrays_do_not_multiply() -> None:
    """Views cost nothing here, but whoever unpacks them would pay."""

    def buffer(tables: int) -> bytes:
        table = struct.pack("<4Hi2I", 8, 8, 0, 4, 8, 4, 10_000) + bytes(40_000)
        return pointing(tables, lambda number: 8, table)

    assert survives(RequestPushWeight, buffer(SHARING))
    assert not survives(RequestPushWeight, buffer(SHARING + 1))


def test_byte_vectors_do_not_leave_the_buffer() -> None:
    value = RequestFLJob(sign_data=b"12345678")
    buffer = encode(value)
    longer = buffer.replace(struct.pack("<I", 8) + b"1234", struct.pack("<I", 9) + b"1234")
    assert decode(RequestFLJob, buffer) == value
    assert longer != buffer
    assert not survives(RequestFLJob, longer)


@pytest.mark.parametrize("message", [RequestPushWeight, RequestPullWeight])
@pytest.mark.parametrize("count", [2, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_vectors_longer_than_the_buffer(message: type, count: int) -> None:
    assert not survives(message, with_vector(count, bytes(4)))


@pytest.mark.parametrize("count", [0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_arrays_longer_than_the_buffer(count: int) -> None:
    assert survives(FeatureMap, with_vector(1, bytes(4)))
    assert not survives(FeatureMap, with_vector(2, bytes(4)))
    assert not survives(FeatureMap, with_vector(count, bytes(64)))


@pytest.mark.parametrize("distance", [0, 1, 2, 3, 4, 0x7FFFFFFF, 0x80000000, 0xFFFFFFE8, 0xFFFFFFFF])
def test_tables_and_strings_that_lead_to_themselves(distance: int) -> None:
    """A distance of 2**32 - n is far ahead, not n bytes back: nothing can lead back to what holds it."""
    here = struct.pack("<I", distance)
    for content in (here, here * 2, here + bytes(8), here * 8):
        buffer = with_vector(1, content)
        outcomes = survives(RequestPushWeight, buffer), survives(RequestPullWeight, buffer)
        assert distance <= 4 or outcomes == (False, False)


@pytest.mark.parametrize("back", [0, 1, -1, 4, -4, 12, 13, 2**31 - 1, -(2**31)])
def test_vtables_anywhere(back: int) -> None:
    buffer = bytearray(with_vector(0, bytes(8)))
    buffer[12:16] = struct.pack("<i", back)
    survives(RequestPushWeight, bytes(buffer))


def test_vtables_before_the_buffer_are_refused() -> None:
    """Python would take a negative position for one that counts from the end."""
    vtable = struct.pack("<3H", 6, 8, 4)
    assert survives(ResponsePushMetrics, struct.pack("<IiI", 4, -8, 200) + vtable)
    assert not survives(ResponsePushMetrics, struct.pack("<IiI", 4, 10, 200) + vtable)


def test_vtables_that_the_buffer_cuts_are_refused() -> None:
    vtable = struct.pack("<4H", 8, 8, 4, 0)
    assert survives(ResponsePushMetrics, struct.pack("<IiI", 4, -8, 200) + vtable)
    assert not survives(ResponsePushMetrics, struct.pack("<IiI", 4, -8, 200) + vtable[:-1])


def test_a_table_that_is_its_own_vtable_and_child() -> None:
    """The first bytes of the table are distance, vtable and slots at once."""
    for back in range(-8, 9):
        for words in ((4, 8, 4, 4), (6, 4, 4, 0), (8, 8, 8, 8), (12, 12, 4, 4)):
            buffer = struct.pack("<Ii4H", 4, back, *words) * 4
            for message in MESSAGES:
                survives(message, buffer)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 7, 9, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF])
def test_vtables_of_impossible_length(size: int) -> None:
    buffer = bytearray(encode(ResponsePushMetrics(200)))
    assert buffer[4:6] == b"\x06\0"
    buffer[4:6] = struct.pack("<H", size)
    assert not survives(ResponsePushMetrics, bytes(buffer))


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (b"ok\0", True),
        (b"ok", False),  # the buffer ends
        (b"okX", False),
        (b"\xff\xfe\0", False),
        (b"\xc0\x80\0", False),  # zero in two bytes
        (b"\xed\xa0\x80\0", False),  # half a surrogate pair
        (b"\xe2\x82\0", False),  # half a character
        ("é".encode() + b"\0", True),
        (b"a\0b\0", True),  # the length counts, not the first zero
    ],
)
def test_strings(text: bytes, good: bool) -> None:
    length = len(text) - 1 if len(text) > 2 else 2
    buffer = pointing(1, lambda number: 0, struct.pack("<I", length) + text)
    assert survives(RequestPullWeight, buffer) is good


def test_the_error_says_what_is_wrong() -> None:
    def reason(message: type, buffer: bytes) -> str:
        with pytest.raises(MalformedRequest) as caught:
            decode(message, buffer)
        return str(caught.value)

    assert "UTF-8" in reason(RequestPullWeight, pointing(1, lambda number: 0, b"\1\0\0\0\xff\0"))
    assert "zero byte" in reason(RequestPullWeight, pointing(1, lambda number: 0, b"\1\0\0\0ab"))
    assert "vtable" in reason(RequestPullWeight, bytes(64))
    assert "outside" in reason(RequestPullWeight, b"\xff" * 64)
    assert "too many" in reason(RequestPullWeight, pointing(MAX_PARTS + 1, lambda number: 0, bytes(5)))
