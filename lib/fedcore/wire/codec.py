"""Bytes to messages and back, without trust.

The FlatBuffers runtime for Python has no verifier, and its builder takes several times as long as need be for
a small reply; the format is simple enough to be read and written here (https://flatbuffers.dev/internals/):

* a buffer begins with the u32 position of the root table;
* a table begins with the i32 distance back to its vtable: u16 vtable size, u16 table size, then one u16 per
  slot, 0 for an absent one;
* strings, vectors and tables are reached by u32 distances forward; a string is followed by a zero byte.

Rules of ``decode``, whatever a stranger sends:

* It gives a message or MalformedRequest. Positions are never negative, so ``struct`` and numpy themselves
  refuse every read outside the buffer; ``decode`` translates their errors, once.
* Vectors of numbers are read-only views into the buffer, aligned or not, and are never copied.
* Parts of a buffer may overlap, yet a message has at most MAX_PARTS parts, and its vectors and strings are at
  most SHARING times as long as the buffer. The schema bounds the depth: no table of it holds itself.
* Not looked at: the file identifier, the sizes of tables, slots newer than our schema.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache, lru_cache
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from fedcore.errors import LocalError, MalformedRequest
from fedcore.wire.image import ImageSelection
from fedcore.wire.messages import Kind

MAX_PARTS = 20_000  # tables and strings in vectors; several times the weights of any model that fits a device
SHARING = 4  # bytes in vectors and strings per byte of the buffer; above 1 only where a builder shares parts
MAX_VTABLE = 128  # bytes, so 62 slots; the longest table has 15

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")

_U32, _I32 = struct.Struct("<I"), struct.Struct("<i")
_u16, _u32, _i32 = struct.Struct("<H").unpack_from, _U32.unpack_from, _I32.unpack_from
_SCALARS = {
    Kind.INT: struct.Struct("<i"),
    Kind.FLOAT: struct.Struct("<f"),
    Kind.BOOL: struct.Struct("<?"),
    Kind.BYTE: struct.Struct("<b"),
}
_ELEMENTS: dict[Kind, np.dtype[Any]] = {
    Kind.BYTES: np.dtype("<i1"),
    Kind.INTS: np.dtype("<i4"),
    Kind.FLOATS: np.dtype("<f4"),
}


class Slot(NamedTuple):
    """One field of a table: its name, kind, default, and the message class where it is a table."""

    name: str
    kind: Kind
    default: Any
    table: type | None


@cache
def slots_of(message: type) -> tuple[Slot, ...]:
    """Describe a message class; the slot number is the index."""
    hints = get_type_hints(message, include_extras=True)
    slots = []
    for field in fields(message):
        kind, table = _kind_of(hints[field.name])
        slots.append(Slot(field.name, kind, field.default, table))
    return tuple(slots)


def _kind_of(hint: Any) -> tuple[Kind, type | None]:
    if get_origin(hint) is Annotated:
        return get_args(hint)[1], None
    inner = next(part for part in get_args(hint) if part is not type(None))  # "X | None"
    if is_dataclass(inner) and isinstance(inner, type):
        return Kind.TABLE, inner
    return Kind.TABLES, get_args(inner)[0]  # "tuple[X, ...] | None"


# ---- decoding


def decode(message: type[T], buffer: Buffer, *, writable: bool = False) -> T:
    """Read one message.

    Args:
        message: the dataclass of the expected table.
        buffer: a whole FlatBuffer; the arrays of the result are views into it, so it must not change while
            they are in use.
        writable: whether the arrays may be written to; then the buffer must be writable.

    Raises:
        MalformedRequest: the bytes are not such a table.
    """
    view = buffer if isinstance(buffer, bytes) else memoryview(buffer).cast("B")
    reader = _Reader(view if writable or isinstance(view, bytes) else view.toreadonly())
    try:
        return reader.table(message, 0)  # type: ignore[no-any-return]
    except UnicodeDecodeError as error:
        raise MalformedRequest("a string is not UTF-8") from error
    except (struct.error, IndexError, ValueError) as error:
        raise MalformedRequest("an offset or a length leads outside the buffer") from error


class _Reader:
    """One pass over one buffer. Each method takes the position of the distance to what it reads."""

    __slots__ = ("buffer", "parts_left", "room")

    def __init__(self, buffer: bytes | memoryview) -> None:
        self.buffer = buffer
        self.room = SHARING * len(buffer)
        self.parts_left = MAX_PARTS

    def table(self, message: type, at: int) -> Any:
        """Read a table with all that hangs on it."""
        buffer = self.buffer
        position = at + _u32(buffer, at)[0]
        vtable = position - _i32(buffer, position)[0]
        if vtable < 0:
            raise MalformedRequest("a vtable lies before the buffer")
        size = _u16(buffer, vtable)[0]
        if not 4 <= size <= MAX_VTABLE or size % 2 or vtable + size > len(buffer):
            raise MalformedRequest("a vtable has an impossible length")
        values = []
        for offset, read, default in _layout_of(message, bytes(buffer[vtable + 4 : vtable + size])):
            values.append(read(self, position + offset) if offset else default)
        return message(*values)

    def vector(self, at: int, width: int) -> tuple[int, int]:
        """Return (first byte, number of elements) of a vector, whose end may yet lie outside the buffer."""
        start = at + _u32(self.buffer, at)[0]
        count = _u32(self.buffer, start)[0]
        self.room -= count * width
        if self.room < 0:
            raise MalformedRequest("the vectors are longer than the buffer")
        return start + 4, count

    def parts(self, at: int) -> range:
        """Return the positions of the distances in a vector of tables or strings."""
        first, count = self.vector(at, 4)
        self.parts_left -= count
        if self.parts_left < 0:
            raise MalformedRequest("too many tables or strings")
        return range(first, first + 4 * count, 4)

    def string(self, at: int) -> str:
        first, count = self.vector(at, 1)
        end = first + count
        if self.buffer[end]:
            raise MalformedRequest("a string does not end in a zero byte")
        return str(self.buffer[first:end], "utf-8")

    def ubytes(self, at: int) -> bytes:
        first, count = self.vector(at, 1)
        if first + count > len(self.buffer):
            raise MalformedRequest("a vector is longer than the buffer")
        return bytes(self.buffer[first : first + count])

    def numbers(self, at: int, element: np.dtype[Any]) -> Any:
        first, count = self.vector(at, element.itemsize)
        return np.frombuffer(self.buffer, element, count, first)


_Read = Callable[[_Reader, int], Any]


@lru_cache(1024)  # devices of one kind send the same few vtables over and over
def _layout_of(message: type, vtable: bytes) -> tuple[tuple[int, _Read, Any], ...]:
    """Return (offset in the table or 0, reader, default) of each slot that is in a vtable and known to us.

    The fields of later slots take the defaults of the class.
    """
    slots = slots_of(message)[: len(vtable) // 2]
    offsets = struct.unpack_from(f"<{len(slots)}H", vtable)
    return tuple((at, _reader_of(s.kind, s.table), s.default) for at, s in zip(offsets, slots, strict=True))


def _reader_of(kind: Kind, table: type | None) -> _Read:
    if kind in _SCALARS:
        unpack = _SCALARS[kind].unpack_from
        return lambda reader, at: unpack(reader.buffer, at)[0]
    if kind in _ELEMENTS:
        element = _ELEMENTS[kind]
        return lambda reader, at: reader.numbers(at, element)
    match kind:
        case Kind.STRING:
            return _Reader.string
        case Kind.STRINGS:
            return lambda reader, at: tuple([reader.string(each) for each in reader.parts(at)])
        case Kind.UBYTES:
            return _Reader.ubytes
    assert table is not None
    if kind is Kind.TABLE:
        return lambda reader, at: reader.table(table, at)
    return lambda reader, at: tuple([reader.table(table, each) for each in reader.parts(at)])


# ---- encoding


def encode(message: object) -> bytes:
    """Write one message as a finished FlatBuffer; see encode_parts."""
    return b"".join(encode_parts(message))


def encode_parts(message: object) -> tuple[bytes, ...]:
    """Write one message as a finished FlatBuffer in pieces, to be sent one behind the other.

    A ``feature_map`` or ``compress_feature_map`` may be an ImageSelection instead of a tuple: its tables are then not
    written again, the prebuilt tail of the model image is the last piece, itself and not a copy.

    Raises:
        LocalError: a value does not fit its slot.
    """
    writer = _Writer()
    try:
        writer.table(0, message)
        return writer.finish()
    except (struct.error, OverflowError, UnicodeEncodeError) as error:
        raise LocalError(f"a value of {type(message).__name__} does not fit its slot: {error}") from error


class _Writer:
    """Writes each part behind the one that refers to it, every part at a multiple of four bytes.

    ``place`` is where the distance to a part stands; writing the part fills it in. A scalar takes four bytes
    of its table whatever its type, so that no slot needs padding of its own.
    """

    __slots__ = ("out", "selections", "vtables")

    def __init__(self) -> None:
        self.out = bytearray(4)  # the distance to the root
        self.vtables: dict[bytes, int] = {}
        self.selections: list[tuple[range, ImageSelection]] = []

    def table(self, place: int, message: Any) -> None:
        table: type = type(message)
        inline, offsets, children = bytearray(4), [], []
        for name, kind, default, _ in slots_of(table):
            value = getattr(message, name)
            scalar = _SCALARS.get(kind)
            if value is None or (scalar and value == default):
                offsets.append(0)
                continue
            offsets.append(len(inline))
            if scalar is None:
                children.append((len(inline), kind, value))
            inline += scalar.pack(value).ljust(4, b"\0") if scalar else bytes(4)
        vtable = self.vtable(offsets, len(inline))
        start = len(self.out)
        _I32.pack_into(inline, 0, start - vtable)
        _U32.pack_into(self.out, place, start - place)
        self.out += inline
        for offset, kind, value in children:
            self.child(start + offset, kind, value)

    def vtable(self, offsets: list[int], size: int) -> int:
        """Write a vtable, unless the same one is there already, and return its position."""
        while offsets and not offsets[-1]:
            offsets.pop()
        vtable = struct.pack(f"<{len(offsets) + 2}H", 2 * len(offsets) + 4, size, *offsets)
        position = self.vtables.setdefault(vtable, len(self.out))
        if position == len(self.out):
            self.out += vtable + bytes(-len(vtable) % 4)
        return position

    def child(self, place: int, kind: Kind, value: Any) -> None:
        match kind:
            case Kind.TABLE:
                self.table(place, value)
            case Kind.STRING:
                text = value.encode()
                self.vector(place, len(text), text + b"\0")
            case Kind.UBYTES:
                self.vector(place, len(value), value)
            case Kind.BYTES | Kind.INTS | Kind.FLOATS:
                array = np.ascontiguousarray(value, dtype=_ELEMENTS[kind]).reshape(-1)
                self.vector(place, array.size, array.data)
            case _ if isinstance(value, ImageSelection):
                self.selections.append((self.distances(place, len(value.positions)), value))
            case _:
                part = Kind.STRING if kind is Kind.STRINGS else Kind.TABLE
                for each, item in zip(self.distances(place, len(value)), value, strict=True):
                    self.child(each, part, item)

    def distances(self, place: int, count: int) -> range:
        """Write a vector of distances to be filled in, and return their places."""
        self.vector(place, count, bytes(4 * count))
        return range(len(self.out) - 4 * count, len(self.out), 4)

    def vector(self, place: int, count: int, content: Buffer) -> None:
        _U32.pack_into(self.out, place, len(self.out) - place)
        self.out += _U32.pack(count)
        self.out += content
        self.out += bytes(-len(self.out) % 4)

    def finish(self) -> tuple[bytes, ...]:
        """Return what was written, and behind it the tails of the selected images."""
        end = len(self.out)
        for places, selection in self.selections:
            for place, position in zip(places, selection.positions, strict=True):
                _U32.pack_into(self.out, place, end + position - place)
            end += len(selection.image.tail)
        return (bytes(self.out), *(selection.image.tail for _, selection in self.selections))
