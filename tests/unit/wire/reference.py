"""The same format by other hands: written and read with the FlatBuffers runtime, by slot number only."""

from typing import Any

import flatbuffers
import flatbuffers.table
import numpy as np
from flatbuffers import number_types as numbers
from unit.wire.samples import DTYPES

from fedcore.wire.codec import Slot, slots_of
from fedcore.wire.messages import Kind

_PREPEND = {
    Kind.INT: "PrependInt32Slot",
    Kind.FLOAT: "PrependFloat32Slot",
    Kind.BOOL: "PrependBoolSlot",
    Kind.BYTE: "PrependInt8Slot",
}
_FLAGS: dict[Kind, Any] = {
    Kind.INT: numbers.Int32Flags,
    Kind.FLOAT: numbers.Float32Flags,
    Kind.BOOL: numbers.BoolFlags,
    Kind.BYTE: numbers.Int8Flags,
    Kind.BYTES: numbers.Int8Flags,
    Kind.INTS: numbers.Int32Flags,
    Kind.FLOATS: numbers.Float32Flags,
}


# ---- writing


def write(
    message: Any,
    *,
    identifier: bytes | None = None,
    defaults: bool = False,
    share_vtables: bool = True,
    share_strings: bool = False,
) -> bytes:
    """Write a message as the generated code of any language would.

    Args:
        message: what to write.
        identifier: four bytes after the root offset.
        defaults: also write scalars that equal their default.
        share_vtables: let equal tables use one vtable.
        share_strings: write equal strings once.
    """
    builder = flatbuffers.Builder(16)
    builder.ForceDefaults(defaults)
    text = builder.CreateSharedString if share_strings else builder.CreateString
    builder.Finish(_write_table(builder, message, text, share_vtables), identifier)
    return bytes(builder.Output())


def _write_table(builder: Any, message: Any, text: Any, share_vtables: bool) -> int:
    def child(slot: Slot, value: Any) -> int:
        match slot.kind:
            case Kind.STRING:
                return int(text(value))
            case Kind.UBYTES:
                return int(builder.CreateByteVector(value))
            case Kind.BYTES | Kind.INTS | Kind.FLOATS:
                return int(builder.CreateNumpyVector(np.asarray(value, DTYPES[slot.kind])))
            case Kind.TABLE:
                return _write_table(builder, value, text, share_vtables)
            case Kind.STRINGS:
                parts = [text(item) for item in value]
            case _:
                parts = [_write_table(builder, item, text, share_vtables) for item in value]
        builder.StartVector(4, len(parts), 4)
        for part in reversed(parts):
            builder.PrependUOffsetTRelative(part)
        return int(builder.EndVector())

    class_: type = type(message)
    slots = slots_of(class_)
    values = [getattr(message, slot.name) for slot in slots]
    children = {
        number: child(slot, value)
        for number, (slot, value) in enumerate(zip(slots, values, strict=True))
        if value is not None and slot.kind not in _PREPEND
    }
    builder.StartObject(len(slots))
    for number, (slot, value) in enumerate(zip(slots, values, strict=True)):
        if slot.kind in _PREPEND:
            getattr(builder, _PREPEND[slot.kind])(number, value, slot.default)
        elif number in children:
            builder.PrependUOffsetTRelativeSlot(number, children[number], 0)
    if not share_vtables:
        builder.vtables.clear()
    return int(builder.EndObject())


# ---- reading


def read(message: type, buffer: bytes) -> Any:
    """Read a message as generated code would, without a check; assert that all its parts are aligned."""
    root = int.from_bytes(buffer[:4], "little")
    return _read_table(message, flatbuffers.table.Table(buffer, root))


def _read_table(message: type, table: Any) -> Any:
    assert table.Pos % 4 == 0
    values = []
    for number, slot in enumerate(slots_of(message)):
        offset = table.Offset(4 + 2 * number)
        values.append(_read_slot(slot, table, table.Pos + offset) if offset else slot.default)
    return message(*values)


def _read_slot(slot: Slot, table: Any, at: int) -> Any:
    if slot.kind in _PREPEND:
        assert at % _FLAGS[slot.kind].bytewidth == 0
        return table.Get(_FLAGS[slot.kind], at)
    assert at % 4 == 0
    if slot.kind is Kind.TABLE:
        assert slot.table is not None
        return _read_table(slot.table, flatbuffers.table.Table(table.Bytes, table.Indirect(at)))
    if slot.kind is Kind.STRING:
        return _read_string(table, at)
    first, count = table.Vector(at - table.Pos), table.VectorLen(at - table.Pos)
    assert first % 4 == 0
    match slot.kind:
        case Kind.UBYTES:
            return table.Bytes[first : first + count]
        case Kind.STRINGS:
            return tuple(_read_string(table, first + 4 * each) for each in range(count))
        case Kind.TABLES:
            assert slot.table is not None
            tables = (table.Indirect(first + 4 * each) for each in range(count))
            return tuple(
                _read_table(slot.table, flatbuffers.table.Table(table.Bytes, each)) for each in tables
            )
    return table.GetVectorAsNumpy(_FLAGS[slot.kind], at - table.Pos)


def _read_string(table: Any, at: int) -> str:
    start = table.Indirect(at)
    assert start % 4 == 0
    text: bytes = table.String(at)
    assert table.Bytes[start + 4 + len(text)] == 0
    return text.decode()
