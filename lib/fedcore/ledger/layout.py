"""The bytes of a ledger file: where everything stands, and what may be believed after a crash.

    header         what the file is, written once, and the generation, one aligned 8-byte word
    accumulator 0  trailer, sizes per weight, client list, float64 sums
    accumulator 1  the same
    slot table     one entry per slot
    slots          bodies as they came

The parity of the generation names the live accumulator; the other one is rewritten by the next merge, which ends
with one store of the next generation. A slot's entry says in ``merged_in`` with which generation its update entered
the sum: it counts as merged if and only if ``merged_in <= generation``. So one 8-byte store commits sums, counts,
client list and slots together, and nothing is freed by a second write. An epoch begins with a generation of its own,
which its entries name: what is left of an earlier one never counts.

The words of an entry are written one by one, and a disk may keep any of them when the power fails. Therefore each is
bound to the record it speaks of: ``merged_in`` and ACCEPTED hold a checksum of the record's checksum, and say nothing
once another record stands there. What is neither FREE, merged nor ACCEPTED beyond doubt has to be asked about again,
and a client that is in the sum is not taken a second time.

Everything here is a function of bytes; ``examine`` is the only judge of a file after a crash. Numbers are
little-endian. Parts begin at multiples of 4096 bytes, words at multiples of eight. Checksums are xxh3: they find
accidents, not forgers; the file is as trusted as the directory it lies in. Clients choose their ids, so those are
told apart by SHA-256.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt
import xxhash

from fedcore.core.client_key import client_hash
from fedcore.errors import LocalError
from fedcore.wire.arrays import Layout

MAGIC = b"FLLEDGER"
VERSION = 2
PAGE = 4096
MAX_FL_ID = 384  # bytes; ids are UUIDs or hex digests, 36 or 64
ENTRY = 512  # bytes per slot table entry

_HEADER = struct.Struct("<8sIIQQII16s32s32s")
_TRAILER = struct.Struct("<QQQQ32sQQQddQ")  # the last word is the checksum of the sums
_ENTRY = struct.Struct("<IQffQQH")  # what a slot holds, behind its three words
_WORD = 8
GENERATION = 512  # position of the generation
STATE, MERGED_IN, META, PAYLOAD = 0, 8, 16, 24  # positions within an entry
CLIENT_SIZE = 24  # bytes per client in the list: hash, data size, nothing
_ENTRY_END = ENTRY - _WORD  # the record's own checksum
_COUNTER_BITS = 40  # of a generation; 24 bits of checksum stand above them

Bytes = memoryview


class Damaged(LocalError):
    """A ledger file cannot be believed; the text says which part and why."""


class SlotState(IntEnum):
    """What the first word of a slot's entry says; ACCEPTED stands there as ``accepted_word``."""

    FREE = 0
    RECEIVED = 1  # complete, the shared state has been asked
    ACCEPTED = 2  # the shared state has counted it


def _up(size: int, unit: int = PAGE) -> int:
    return -(-size // unit) * unit


def checksum(*parts: bytes | memoryview) -> int:
    """Return the xxh3 of parts as if they were one."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.intdigest()


def generation_word(generation: int, record: int = 0) -> int:
    """Return a generation as it stands in the file: a changed bit makes it invalid instead of another one.

    Args:
        generation: 1..2**40 - 1.
        record: checksum of the record that it speaks of, 0 for the file's own.
    """
    return generation | checksum(struct.pack("<QQ", generation, record)) >> _COUNTER_BITS << _COUNTER_BITS


def _generation_of(word: int, record: int = 0) -> int | None:
    """Return the generation in a word; None if the word is no generation, or one of another record."""
    generation = word & (1 << _COUNTER_BITS) - 1
    return generation if generation and word == generation_word(generation, record) else None


def accepted_word(record: int, meta: int) -> int:
    """Return the state of a slot whose record and meta word are known to count."""
    return checksum(struct.pack("<QQ", record, meta))


@dataclass(frozen=True)
class Epoch:
    """Which updates a ledger may hold.

    Attributes:
        instance: name of the job's instance.
        iteration: number of the iteration, from 1.
        base: digest of the model that the updates were trained from, hex, 64 digits.
    """

    instance: str
    iteration: int
    base: str

    @cached_property
    def origin(self) -> bytes:
        """32 bytes that stand for all of it; an update of another origin is never summed."""
        text = f"{self.instance}\0{self.iteration}\0{self.base}"
        return hashlib.sha256(text.encode()).digest()


@dataclass(frozen=True)
class Shape:
    """The measures of a ledger file; all positions follow from them.

    Attributes:
        floats: float64 sums: elements of all aggregated weights.
        weights: aggregated weights.
        clients: updates that one iteration may bring, the quorum.
        slots: bodies that may lie in the file at a time.
        slot_size: bytes of the longest body.
        job: sha256 of the job's name.
        layout: digest of the model's layout.
    """

    floats: int
    weights: int
    clients: int
    slots: int
    slot_size: int
    job: bytes
    layout: bytes

    @classmethod
    def of(cls, layout: Layout, fl_name: str, clients: int, slots: int, slot_size: int) -> Shape:
        """Measure a ledger for a job."""
        return cls(
            sum(weight.size for weight in layout.aggregated),
            len(layout.aggregated),
            clients,
            slots,
            _up(slot_size),
            hashlib.sha256(fl_name.encode()).digest(),
            bytes.fromhex(layout.digest),
        )

    # ---- positions

    @cached_property
    def sizes_at(self) -> int:
        """Sizes per weight, from the start of an accumulator."""
        return _up(_TRAILER.size + _WORD, 64)

    @cached_property
    def clients_at(self) -> int:
        """Client list, from the start of an accumulator."""
        return self.sizes_at + _up(_WORD * self.weights, 64)

    @cached_property
    def sums_at(self) -> int:
        """Sums, from the start of an accumulator."""
        return _up(self.clients_at + CLIENT_SIZE * self.clients)

    @cached_property
    def accumulator_size(self) -> int:
        """Bytes of one accumulator."""
        return self.sums_at + _up(_WORD * self.floats)

    @cached_property
    def table_at(self) -> int:
        """Slot table, from the start of the file."""
        return PAGE + 2 * self.accumulator_size

    @cached_property
    def slots_at(self) -> int:
        """First slot, from the start of the file."""
        return self.table_at + _up(ENTRY * self.slots)

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        return self.slots_at + self.slots * self.slot_size

    def accumulator_at(self, generation: int) -> int:
        """Accumulator that is live in a generation."""
        return PAGE + (generation % 2) * self.accumulator_size

    def entry_at(self, slot: int) -> int:
        """Entry of a slot."""
        return self.table_at + ENTRY * slot

    def body_at(self, slot: int) -> int:
        """Bytes of a slot."""
        return self.slots_at + self.slot_size * slot


@dataclass(frozen=True, slots=True)
class Totals:
    """What is known of the updates in a sum, beside the sum.

    Attributes:
        count: updates.
        data_size: training samples of all.
        eval_data_size: evaluation samples of all.
        loss: sum of loss times data size.
        accuracy: sum of accuracy times evaluation size.
    """

    count: int = 0
    data_size: int = 0
    eval_data_size: int = 0
    loss: float = 0.0
    accuracy: float = 0.0


def sum_of(totals: Iterable[Totals]) -> Totals:
    """Add up what is known of several ledgers' updates."""
    fields = zip(*((t.count, t.data_size, t.eval_data_size, t.loss, t.accuracy) for t in totals), strict=True)
    return Totals(*(sum(values) for values in fields))


@dataclass(frozen=True, slots=True)
class Record:
    """What a slot's entry says of its body.

    Attributes:
        decoder: how the body becomes weights, see ``decoding.Decoder``; 0 is plain weights.
        length: bytes of the body.
        loss: the client's training loss.
        accuracy: the client's accuracy.
        begun: generation with which the epoch it belongs to began.
        body: checksum of the body.
        fl_id: the client.
    """

    decoder: int
    length: int
    loss: float
    accuracy: float
    begun: int
    body: int
    fl_id: str


# ---- writing: values to bytes


def header_bytes(shape: Shape, ledger_id: bytes) -> bytes:
    """Return the page that begins a file; its generation is 0, its accumulators are empty."""
    fixed = _HEADER.pack(
        MAGIC,
        VERSION,
        shape.slots,
        shape.slot_size,
        shape.floats,
        shape.weights,
        shape.clients,
        ledger_id,
        shape.job,
        shape.layout,
    )
    return (fixed + checksum(fixed).to_bytes(_WORD, "little")).ljust(PAGE, b"\0")


def partial_head(shape: Shape, ledger_id: str, generation: int) -> bytes:
    """Return the page that makes a live accumulator, put where it stood, a ledger file again: one without slots."""
    page = bytearray(header_bytes(replace(shape, slots=0), bytes.fromhex(ledger_id)))
    page[GENERATION : GENERATION + _WORD] = generation_word(generation).to_bytes(_WORD, "little")
    return bytes(page)


def trailer_bytes(
    generation: int,
    begun: int,
    epoch: Epoch,
    totals: Totals,
    sizes: npt.NDArray[np.uint64],
    clients: bytes,
    sums: int | None,
) -> bytes:
    """Return an accumulator's trailer.

    Args:
        generation: with which it becomes live.
        begun: generation with which the epoch began.
        epoch: which updates are in it.
        totals: of these updates.
        sizes: uint64[weights], data size per weight.
        clients: the client list as it stands in the file.
        sums: checksum of the sums, None if there are none yet and the bytes there mean nothing.
    """
    fixed = _TRAILER.pack(
        generation,
        begun,
        epoch.iteration,
        int(sums is None),
        epoch.origin,
        totals.count,
        totals.data_size,
        totals.eval_data_size,
        totals.loss,
        totals.accuracy,
        0 if sums is None else sums,
    )
    return fixed + checksum(fixed, sizes.tobytes(), clients).to_bytes(_WORD, "little")


def record_bytes(record: Record) -> bytes:
    """Return the payload of a slot's entry, behind its three words."""
    fl_id = record.fl_id.encode()
    if len(fl_id) > MAX_FL_ID:
        raise LocalError(f"a client id of {len(fl_id)} bytes does not fit the ledger")
    fixed = _ENTRY.pack(
        record.decoder,
        record.length,
        record.loss,
        record.accuracy,
        record.begun,
        record.body,
        len(fl_id),
    )
    payload = (fixed + fl_id).ljust(_ENTRY_END - PAYLOAD, b"\0")
    return payload + checksum(payload).to_bytes(_WORD, "little")


def client_bytes(fl_id: str, data_size: int) -> bytes:
    """Return one line of a client list."""
    return client_hash(fl_id) + struct.pack("<II", data_size, 0)


def meta_word(data_size: int, eval_data_size: int) -> int:
    """Return the word that says what the shared state knows of a client."""
    return data_size | eval_data_size << 32


# ---- reading: bytes to what may be believed


@dataclass(frozen=True, slots=True)
class Entry:
    """A slot that may hold an update.

    Attributes:
        slot: its number.
        state: RECEIVED or ACCEPTED.
        record: what it holds.
        data_size: the client's, known once ACCEPTED.
        eval_data_size: the client's, known once ACCEPTED.
    """

    slot: int
    state: SlotState
    record: Record
    data_size: int
    eval_data_size: int


@dataclass(frozen=True, slots=True)
class Examined:
    """What a file says that can be believed.

    Attributes:
        ledger_id: 32 hex digits.
        generation: the newest.
        begun: generation with which the epoch began.
        iteration: of the live accumulator; 0 if the ledger never served one.
        origin: of its epoch, 32 bytes.
        totals: of the updates in the sum.
        empty: whether there is no sum yet.
        clients: client hashes in the sum.
        pending: slots whose update is not known to be in the sum, those ACCEPTED first.
    """

    ledger_id: str
    generation: int
    begun: int
    iteration: int
    origin: bytes
    totals: Totals
    empty: bool
    clients: tuple[bytes, ...]
    pending: tuple[Entry, ...]


def read_word(buffer: Bytes, at: int) -> int:
    """Return the 8-byte word at a position."""
    return int.from_bytes(buffer[at : at + _WORD], "little")


def read_generation(buffer: Bytes) -> int:
    """Return the generation, 0 in a new file.

    Raises:
        Damaged: the word is changed.
    """
    word = read_word(buffer, GENERATION)
    generation = _generation_of(word) if word else 0
    if generation is None:
        raise Damaged("the generation is changed: its checksum is wrong")
    return generation


def read_shape(buffer: Bytes) -> tuple[str, Shape]:
    """Return a file's ledger id and measures.

    Raises:
        Damaged: it is no ledger of this version, its header is torn, or it is cut.
    """
    ledger_id, shape = _read_header(buffer)
    if len(buffer) < shape.size:
        raise Damaged(f"the file is cut: {len(buffer)} of {shape.size} bytes")
    return ledger_id, shape


def shape_of(head: bytes) -> Shape:
    """Return the measures that a file's first page tells.

    Raises:
        Damaged: it is no ledger of this version, or its header is torn.
    """
    return _read_header(memoryview(head))[1]


def _read_header(buffer: Bytes) -> tuple[str, Shape]:
    if len(buffer) < PAGE:
        raise Damaged(f"the file has {len(buffer)} bytes, less than a header")
    if bytes(buffer[:8]) != MAGIC:
        raise Damaged("the file is no ledger: its magic is wrong")
    fixed = bytes(buffer[: _HEADER.size])
    _, version, slots, slot_size, floats, weights, clients, ledger_id, job, layout = _HEADER.unpack(fixed)
    if version != VERSION:
        raise Damaged(f"the file is a ledger of version {version}, this server reads version {VERSION}")
    if checksum(fixed) != read_word(buffer, _HEADER.size):
        raise Damaged("the header is torn or changed: its checksum is wrong")
    return ledger_id.hex(), Shape(floats, weights, clients, slots, slot_size, job, layout)


def ledger_id_of(page: bytes) -> str | None:
    """Return the ledger id in a file's first page, without judging the rest; None if it is no ledger of ours."""
    if len(page) < _HEADER.size or page[:8] != MAGIC:
        return None
    return _HEADER.unpack_from(page)[7].hex()  # type: ignore[no-any-return]


def examine(buffer: Bytes) -> tuple[Shape, Examined]:
    """Judge a file after a crash; nothing is believed without its checksum.

    Raises:
        Damaged: the file says nothing that can be believed. A damaged body is not the file's damage; see ``body``.
    """
    ledger_id, shape = read_shape(buffer)
    generation = read_generation(buffer)
    if generation == 0:
        nothing = Examined(ledger_id, 0, 0, 0, bytes(32), Totals(), True, (), ())
        return shape, nothing
    start = shape.accumulator_at(generation)
    fixed = bytes(buffer[start : start + _TRAILER.size])
    fields = _TRAILER.unpack(fixed)
    written, begun, iteration, empty, origin, count, data_size, evaluated, loss, accuracy, sums = fields
    if count > shape.clients:
        raise Damaged(f"accumulator {generation % 2} lists {count} clients, more than fit")
    sizes = bytes(buffer[start + shape.sizes_at : start + shape.sizes_at + _WORD * shape.weights])
    listed_at = start + shape.clients_at
    listed = bytes(buffer[listed_at : listed_at + CLIENT_SIZE * count])
    if checksum(fixed, sizes, listed) != read_word(buffer, start + _TRAILER.size):
        raise Damaged(
            f"the trailer of accumulator {generation % 2} is torn or changed: its checksum is wrong"
        )
    if written != generation:
        raise Damaged(f"accumulator {generation % 2} belongs to generation {written}, not {generation}")
    sums_at = start + shape.sums_at
    if not empty and checksum(buffer[sums_at : sums_at + _WORD * shape.floats]) != sums:
        raise Damaged(f"the sums of accumulator {generation % 2} are changed: their checksum is wrong")
    step = CLIENT_SIZE
    clients = tuple(listed[i : i + 16] for i in range(0, len(listed), step))
    pending = [entry for entry in _entries(buffer, shape, generation) if entry.record.begun == begun]
    pending.sort(key=lambda entry: entry.state is not SlotState.ACCEPTED)
    totals = Totals(count, data_size, evaluated, loss, accuracy)
    examined = Examined(
        ledger_id,
        generation,
        begun,
        iteration,
        origin,
        totals,
        bool(empty),
        clients,
        tuple(pending),
    )
    return shape, examined


def _entries(buffer: Bytes, shape: Shape, generation: int) -> Iterator[Entry]:
    """Yield the slots that are neither free nor merged, of any epoch."""
    for slot in range(shape.slots):
        at = shape.entry_at(slot)
        word, merged_in, meta = (read_word(buffer, at + position) for position in (STATE, MERGED_IN, META))
        if word == SlotState.FREE:
            continue
        payload = bytes(buffer[at + PAYLOAD : at + _ENTRY_END])
        written, actual = read_word(buffer, at + _ENTRY_END), checksum(payload)
        if any(_merged(merged_in, record, generation) for record in (written, actual)):
            continue
        accepted = any(word == accepted_word(record, meta) for record in (written, actual))
        if written != actual:
            if accepted:
                raise Damaged(f"the entry of slot {slot} is changed: its checksum is wrong")
            continue  # on a disk that lost power before the shared state was asked
        decoder, length, loss, accuracy, begun, body_sum, length_of_id = _ENTRY.unpack_from(payload)
        try:
            fl_id = payload[_ENTRY.size : _ENTRY.size + length_of_id].decode()
        except UnicodeDecodeError:
            raise Damaged(f"the entry of slot {slot} names no client, and its checksum is right") from None
        yield Entry(
            slot,
            SlotState.ACCEPTED if accepted else SlotState.RECEIVED,
            Record(decoder, length, loss, accuracy, begun, body_sum, fl_id),
            meta & 0xFFFFFFFF,
            meta >> 32,
        )


def _merged(word: int, record: int, generation: int) -> bool:
    """Tell whether a record is in the sums of a generation, by its ``merged_in``."""
    merged_in = _generation_of(word, record)
    return merged_in is not None and merged_in <= generation


def record_sum(buffer: Bytes, shape: Shape, slot: int) -> int:
    """Return the checksum of the record that stands in a slot's entry."""
    return read_word(buffer, shape.entry_at(slot) + _ENTRY_END)


def body(buffer: Bytes, shape: Shape, entry: Entry) -> memoryview:
    """Return the body in a slot.

    Raises:
        Damaged: its bytes are not those that were received.
    """
    at = shape.body_at(entry.slot)
    if entry.record.length > shape.slot_size:
        raise Damaged(f"slot {entry.slot} claims {entry.record.length} bytes, more than a slot")
    content = buffer[at : at + entry.record.length]
    if checksum(content) != entry.record.body:
        raise Damaged(f"the body in slot {entry.slot} is changed: its checksum is wrong")
    return content


def sums_of(buffer: Bytes, shape: Shape, generation: int) -> npt.NDArray[np.float64]:
    """Return the sums that are live in a generation, float64[floats], as a view."""
    return np.frombuffer(buffer, "<f8", shape.floats, shape.accumulator_at(generation) + shape.sums_at)


def sizes_of(buffer: Bytes, shape: Shape, generation: int) -> npt.NDArray[np.uint64]:
    """Return the data size per aggregated weight, uint64[weights], as a view."""
    return np.frombuffer(buffer, "<u8", shape.weights, shape.accumulator_at(generation) + shape.sizes_at)
