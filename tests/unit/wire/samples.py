"""Messages to test with: a full one and arbitrary ones of every class, and how to compare them."""

import dataclasses
import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fedcore.wire import messages
from fedcore.wire.codec import Slot, slots_of
from fedcore.wire.messages import Kind

DTYPES = {Kind.BYTES: "<i1", Kind.INTS: "<i4", Kind.FLOATS: "<f4"}
MESSAGES: list[type] = [
    value
    for value in vars(messages).values()
    if dataclasses.is_dataclass(value) and isinstance(value, type) and value.__module__ == messages.__name__
]


def full(message: type) -> Any:
    """Return a message with every slot present and different from its default."""
    return message(*(_full_value(slot, number) for number, slot in enumerate(slots_of(message))))


def _full_value(slot: Slot, number: int) -> Any:
    match slot.kind:
        case Kind.INT:
            return 1000 + number
        case Kind.FLOAT:
            return 0.5 + number
        case Kind.BOOL:
            return True
        case Kind.BYTE:
            return number - 9 or 1
        case Kind.STRING:
            return f"{slot.name} é"
        case Kind.UBYTES:
            return bytes(range(250, 255))
        case Kind.STRINGS:
            return ("", "α", slot.name)
        case Kind.BYTES | Kind.INTS | Kind.FLOATS:
            return np.arange(-1, 4).astype(DTYPES[slot.kind])
    assert slot.table is not None
    return full(slot.table) if slot.kind is Kind.TABLE else (full(slot.table), slot.table(), full(slot.table))


def arbitrary(message: type) -> st.SearchStrategy[Any]:
    """Return a strategy for every message of a class that can be sent."""
    return st.builds(message, *(_values(slot) for slot in slots_of(message)))


def _values(slot: Slot) -> st.SearchStrategy[Any]:
    match slot.kind:
        case Kind.INT:
            return st.integers(-(2**31), 2**31 - 1)
        case Kind.FLOAT:
            return st.floats(width=32)
        case Kind.BOOL:
            return st.booleans()
        case Kind.BYTE:
            return st.integers(-128, 127)
        case Kind.STRING:
            present: st.SearchStrategy[Any] = st.text(max_size=12)
        case Kind.UBYTES:
            present = st.binary(max_size=12)
        case Kind.STRINGS:
            present = st.lists(st.text(max_size=12), max_size=4).map(tuple)
        case Kind.BYTES | Kind.INTS | Kind.FLOATS:
            dtype = np.dtype(DTYPES[slot.kind])
            present = st.binary(max_size=24).map(
                lambda raw: np.frombuffer(raw, dtype, len(raw) // dtype.itemsize)
            )
        case Kind.TABLE:
            assert slot.table is not None
            present = arbitrary(slot.table)
        case Kind.TABLES:
            assert slot.table is not None
            present = st.lists(arbitrary(slot.table), max_size=3).map(tuple)
    return st.none() | present


def plain(value: Any) -> Any:
    """Return something comparable with ``==``: arrays by type and bytes, floats by their four bytes."""
    if dataclasses.is_dataclass(value):
        return type(value), [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("<f", value + 0.0)  # -0.0 is 0.0, hence not sent
    return value


def arrays_in(value: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Yield every array of a message."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from arrays_in(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from arrays_in(getattr(value, field.name))
