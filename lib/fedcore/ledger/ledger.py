"""A ledger: the accepted updates of one server in one iteration, in a form that outlives the process.

An update passes these steps, each a few writes whose order is what makes a crash harmless:

    receive   its body goes into a slot
    record    the slot's entry says what is in it             record, RECEIVED
    accept    the shared state has counted it                 meta, ACCEPTED
    merge     it enters the other accumulator                 sums, merged_in, trailer, then the generation
    seal      the sums are read

``record`` comes before the shared state is asked and ``accept`` after its answer; what is RECEIVED and no more after
a crash must be asked about again. The rules for reading are in ``layout.examine``. All writes but those of bodies
go through ``Storage.write``; what lies in a slot is believed only with the checksum that ``record`` took of it.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from fedcore.aggregation.sums import Spans
from fedcore.core.client_key import client_hash
from fedcore.errors import ArrayError, LocalError, PeerError
from fedcore.ledger import layout
from fedcore.ledger.decoding import Decoder
from fedcore.ledger.layout import Damaged, Entry, Epoch, Record, Shape, SlotState, Totals
from fedcore.wire.arrays import Layout, Values

MERGE_BATCH = 8  # updates added per pass over the sums; more gain nothing in throughput
BLOCK = (
    65_536  # elements; a block of float64 sums (512 KiB) stays in the cache while several updates are added
)
_WORD = 8


class Storage(Protocol):
    """Bytes that outlive the process."""

    buffer: memoryview

    def write(self, at: int, data: bytes | memoryview) -> None:
        """Write bytes; eight bytes at a multiple of eight are one store that no crash can tear."""
        ...

    def sync(self) -> None:
        """Return when everything written is as safe as this storage makes it."""
        ...


@dataclass(eq=False, slots=True)
class Slot:
    """Room for one body.

    Attributes:
        number: of the slot.
        buffer: its bytes; whoever receives the body writes here, at any pace, as nothing in a slot is believed
            before ``record`` has said what is in it.
        ledger_id: whose slot it is.
        length: bytes that are in it.
    """

    number: int
    buffer: memoryview
    ledger_id: str
    length: int = 0

    @property
    def body(self) -> memoryview:
        """What was received, read-only."""
        return self.buffer[: self.length].toreadonly()


@dataclass(frozen=True, slots=True)
class Update:
    """One update that the shared state has counted, its arrays still lying in its slot.

    Attributes:
        fl_id: the client.
        weights: name -> float32[n], each value times ``data_size``; any subset of the model. What is not plain is
            decoded when it is added, block by block.
        data_size: training samples, 1..65535.
        eval_data_size: evaluation samples, >= 0.
        loss: the client's training loss.
        accuracy: the client's accuracy, 0..1.
    """

    fl_id: str
    weights: Mapping[str, Values]
    data_size: int
    eval_data_size: int
    loss: float
    accuracy: float


Read = Callable[[memoryview, int, int, int], Update]
"""Body, data size, evaluation size and the record's decoder -> what is in a slot.

It raises PeerError, ArrayError or Damaged if the body is not what its record says.
"""


@dataclass(frozen=True, slots=True)
class Partial:
    """A sealed sum: all updates of one ledger in one iteration.

    Attributes:
        ledger_id: the ledger.
        iteration: of the updates.
        totals: of the updates.
        sums: float64[aggregated elements], valid until the ledger begins another epoch.
        sizes: uint64[aggregated weights], data size per weight.
        clients: client hashes.
        head: page that makes ``content`` a ledger file again, see ``layout.partial_head``.
        content: the accumulator as it stands in the file, from ``start`` on; read-only, valid as ``sums``.
        start: its position in the file.
    """

    ledger_id: str
    iteration: int
    totals: Totals
    sums: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.uint64]
    clients: tuple[bytes, ...]
    head: bytes
    content: memoryview
    start: int


class Ledger:
    """One ledger in one storage.

    ``merge`` may run in another thread, one call at a time, while ``receive``, ``record``, ``accept``, ``release`` and
    ``clients`` go on; ``begin``, ``seal`` and ``reuse`` wait for its end.

    Attributes:
        id: 32 hex digits, the ledger's name in the shared state.
        shape: its measures.
    """

    def __init__(self, storage: Storage, model: Layout, ledger_id: str, shape: Shape) -> None:
        """Use ``create`` or ``recover``."""
        self.id = ledger_id
        self.shape = shape
        self._storage = storage
        self._spans = Spans(model)
        self._generation = layout.read_generation(storage.buffer)
        self._epoch: Epoch | None = None
        self._begun = 0  # generation with which the epoch began
        self._totals = Totals()
        self._empty = True
        self._lines = b""  # the client list
        self._listed = [0, 0]  # how much of it stands in each accumulator
        self._sizes = np.zeros(shape.weights, np.uint64)
        self._held: set[bytes] = set()  # client hashes
        self._free = list(range(shape.slots))[::-1]
        self._accepted: deque[tuple[Slot, Update]] = deque()
        self._scratch = np.empty(BLOCK, np.float64)
        self._sealed = True

    @classmethod
    def create(cls, storage: Storage, model: Layout, shape: Shape) -> Ledger:
        """Make an empty ledger in a storage of ``shape.size`` bytes."""
        ledger_id = uuid.uuid4()
        storage.write(0, layout.header_bytes(shape, ledger_id.bytes))
        storage.sync()
        return cls(storage, model, ledger_id.hex, shape)

    @classmethod
    def recover(cls, storage: Storage, model: Layout, epoch: Epoch) -> tuple[Ledger, tuple[Entry, ...]]:
        """Take up what another process left of an epoch.

        Returns:
            The ledger, to be settled, merged and sealed, and its entries that ``settle`` asks for.

        Raises:
            Damaged: nothing of it can be believed, or it is of another epoch.
        """
        shape, found = layout.examine(storage.buffer)
        if found.origin != epoch.origin:
            raise Damaged(f"the ledger holds updates of iteration {found.iteration}")
        ledger = cls(storage, model, found.ledger_id, shape)
        ledger._epoch, ledger._begun = epoch, found.begun
        ledger._totals, ledger._empty = found.totals, found.empty
        start = shape.accumulator_at(found.generation)
        listed = layout.CLIENT_SIZE * found.totals.count
        ledger._lines = bytes(storage.buffer[start + shape.clients_at :][:listed])
        ledger._listed[found.generation % 2] = listed
        ledger._sizes = layout.sizes_of(storage.buffer, shape, found.generation).copy()
        ledger._held = set(found.clients)
        pending = {entry.slot for entry in found.pending}
        ledger._free = [number for number in ledger._free if number not in pending]
        ledger._sealed = False
        return ledger, found.pending

    # ---- an epoch

    def begin(self, epoch: Epoch) -> None:
        """Start an iteration with empty sums; what is left of the one before is forgotten."""
        generation = self._generation + 1
        for slot, _ in self._accepted:
            self._merged_in(slot, generation)  # in no sum, but as final
        self._epoch, self._begun = epoch, generation
        self._listed = [0, 0]
        self._commit(None, Totals(), b"", np.zeros(self.shape.weights, np.uint64))
        while self._accepted:
            self._free.append(self._accepted.popleft()[0].number)
        self._held.clear()
        self._sealed = False

    def seal(self) -> Partial:
        """Close the epoch and return its sums.

        Raises:
            LocalError: there are updates left to merge.
        """
        if self._accepted or self._epoch is None:
            raise LocalError("a ledger was sealed before its updates were merged")
        self._sealed = True
        if self._empty:
            sums = np.zeros(self.shape.floats, np.float64)
        else:
            sums = layout.sums_of(self._storage.buffer, self.shape, self._generation)
        step = layout.CLIENT_SIZE
        clients = tuple(self._lines[i : i + 16] for i in range(0, len(self._lines), step))
        start = self.shape.accumulator_at(self._generation)
        return Partial(
            self.id,
            self._epoch.iteration,
            self._totals,
            sums,
            self._sizes,
            clients,
            layout.partial_head(self.shape, self.id, self._generation),
            self._storage.buffer[start : start + self.shape.accumulator_size].toreadonly(),
            start,
        )

    def unseal(self) -> None:
        """Take updates again; the sums that ``seal`` returned must not be used any more."""
        self._sealed = False

    def clients(self) -> dict[bytes, int]:
        """Return the clients in the ledger, client hash -> data size, merged or not."""
        accepted, lines = (
            self._accepted.copy(),
            self._lines,
        )  # in this order: a merge moves from one to the other
        step = layout.CLIENT_SIZE
        merged = (lines[i : i + step] for i in range(0, len(lines), step))
        clients = {line[:16]: int.from_bytes(line[16:20], "little") for line in merged}
        return clients | {client_hash(update.fl_id): update.data_size for _, update in accepted}

    # ---- one update

    @property
    def free_slots(self) -> int:
        """Slots that can be had."""
        return len(self._free)

    @property
    def idle(self) -> bool:
        """Whether the ledger holds no update."""
        return not self._totals.count and not self._accepted

    def owns(self, slot: Slot) -> bool:
        """Tell whether a slot is one of this ledger's."""
        return slot.ledger_id == self.id

    def receive(self) -> Slot | None:
        """Return a slot, or None while all are in use."""
        return self._slot(self._free.pop()) if self._free else None

    def _slot(self, number: int, length: int = 0) -> Slot:
        at = self.shape.body_at(number)
        return Slot(number, self._storage.buffer[at : at + self.shape.slot_size], self.id, length)

    def record(
        self, slot: Slot, fl_id: str, loss: float, accuracy: float, decoder: int = Decoder.PLAIN
    ) -> None:
        """Say in the file what is in a slot, and how it is read, before the shared state is asked to count it."""
        if self._epoch is None:
            raise LocalError("an update came before the ledger had an iteration")
        body = layout.checksum(slot.body)
        record = Record(decoder, slot.length, loss, accuracy, self._begun, body, fl_id)
        payload = layout.record_bytes(record)
        self._storage.write(self.shape.entry_at(slot.number) + layout.PAYLOAD, payload)
        self._word(slot, layout.STATE, SlotState.RECEIVED)

    def sync(self) -> None:
        """Return when the recorded updates are safe; nothing to do but on a disk."""
        self._storage.sync()

    def accept(self, slot: Slot, update: Update) -> None:
        """Keep an update that the shared state has counted; its slot is the ledger's until it is merged.

        Raises:
            LocalError: the sums are sealed, the client's update is here already, or the ledger lists no more
                clients; the caller let an update in that it may not.
        """
        client = client_hash(update.fl_id)
        if self._sealed or client in self._held or len(self._held) >= self.shape.clients:
            raise LocalError("an update was accepted into a ledger that is sealed, full or has it already")
        meta = layout.meta_word(update.data_size, update.eval_data_size)
        self._word(slot, layout.META, meta)
        self._word(slot, layout.STATE, layout.accepted_word(self._record_sum(slot), meta))
        self._held.add(client)
        self._accepted.append((slot, update))

    def release(self, slot: Slot) -> None:
        """Take back a slot whose body does not count."""
        self._word(slot, layout.STATE, SlotState.FREE)
        self._free.append(slot.number)

    def release_entry(self, entry: Entry) -> None:
        """Free the slot of an entry that ``recover`` found and that was never counted."""
        self.release(self._slot(entry.slot))

    def settle(
        self,
        entries: Sequence[Entry],
        counted: Mapping[str, tuple[int, int]],
        read: Read,
    ) -> list[str]:
        """Take up or free what ``recover`` found.

        Args:
            entries: all that it found.
            counted: client -> (data size, evaluation size), of those clients of RECEIVED entries whose update the
                shared state has counted in this ledger.
            read: makes an update of what is in a slot.

        Returns:
            For each counted update that cannot be read, why; these are lost.
        """
        lost: dict[str, str] = {}
        for (
            entry
        ) in entries:  # those ACCEPTED first: of a client that sent twice, this is the copy that counts
            fl_id = entry.record.fl_id
            known = (entry.data_size, entry.eval_data_size) if entry.state is SlotState.ACCEPTED else None
            sizes = known or counted.get(fl_id)
            if sizes is None or self.holds(fl_id):
                self.release_entry(entry)
                continue
            try:
                slot = self.slot_of(entry)
                update = read(slot.body, *sizes, entry.record.decoder)
            except (Damaged, PeerError, ArrayError) as error:
                lost[fl_id] = str(error)
                continue
            if update.fl_id != fl_id:
                lost[fl_id] = "the record of an update names another client than its body"
                continue
            self.accept(slot, update)
        return [reason for fl_id, reason in lost.items() if not self.holds(fl_id)]

    def holds(self, fl_id: str) -> bool:
        """Tell whether this client's update of the current epoch is in the ledger."""
        return client_hash(fl_id) in self._held

    def slot_of(self, entry: Entry) -> Slot:
        """Return the slot of an entry that ``recover`` found, for ``accept`` or ``release``.

        Raises:
            Damaged: the body is not what was received.
        """
        layout.body(self._storage.buffer, self.shape, entry)
        return self._slot(entry.slot, entry.record.length)

    # ---- the sum

    @property
    def unmerged(self) -> int:
        """Accepted updates that are not in the sums yet."""
        return len(self._accepted)

    def merge(self) -> list[Slot]:
        """Add up to MERGE_BATCH accepted updates to the sums; return their slots, to be given to ``reuse``."""
        batch = [self._accepted[i] for i in range(min(MERGE_BATCH, len(self._accepted)))]
        updates = [update for _, update in batch]
        sums = self._add([update.weights for update in updates])
        totals, sizes, lines = self._totals, self._sizes.copy(), [self._lines]
        for update in updates:
            totals = _include(totals, update)
            lines.append(layout.client_bytes(update.fl_id, update.data_size))
            for index, name in enumerate(self._spans.names):
                if name in update.weights:
                    sizes[index] += np.uint64(update.data_size)
        for slot, _ in batch:
            self._merged_in(slot, self._generation + 1)
        self._commit(sums, totals, b"".join(lines), sizes)
        for _ in batch:
            self._accepted.popleft()
        return [slot for slot, _ in batch]

    def reuse(self, slot: Slot) -> None:
        """Make a merged slot available; nothing is written, its entry counts as merged."""
        self._free.append(slot.number)

    def _add(self, updates: list[Mapping[str, Values]]) -> int:
        """Write live sums plus updates into the other accumulator; return the checksum of what is there then."""
        before, after = self._generation, self._generation + 1
        target = self.shape.accumulator_at(after) + self.shape.sums_at
        live = None if self._empty else layout.sums_of(self._storage.buffer, self.shape, before)
        digest = xxhash.xxh3_64()
        for name, span in self._spans:
            carriers = [update[name] for update in updates if name in update]
            for start in range(span.start, span.stop, BLOCK):
                stop = min(start + BLOCK, span.stop)
                block = self._scratch[: stop - start]
                block[:] = 0.0 if live is None else live[start:stop]
                for values in carriers:
                    np.add(block, values[start - span.start : stop - span.start], out=block)
                content = block.data.cast("B")
                digest.update(content)
                self._storage.write(target + _WORD * start, content)
        return digest.intdigest()

    def _commit(self, sums: int | None, totals: Totals, lines: bytes, sizes: npt.NDArray[np.uint64]) -> None:
        """Finish the other accumulator and make it the live one; what failed before that may be tried again."""
        assert self._epoch is not None
        generation = self._generation + 1
        start = self.shape.accumulator_at(generation)
        known = self._listed[generation % 2]
        self._storage.write(start + self.shape.sizes_at, sizes.tobytes())
        if known < len(lines):
            self._storage.write(start + self.shape.clients_at + known, lines[known:])
        trailer = layout.trailer_bytes(generation, self._begun, self._epoch, totals, sizes, lines, sums)
        self._storage.write(start, trailer)
        self._storage.sync()
        self._storage.write(layout.GENERATION, layout.generation_word(generation).to_bytes(_WORD, "little"))
        self._generation, self._totals, self._lines, self._sizes = generation, totals, lines, sizes
        self._listed[generation % 2] = len(lines)
        self._empty = sums is None
        self._storage.sync()

    def _merged_in(self, slot: Slot, generation: int) -> None:
        self._word(slot, layout.MERGED_IN, layout.generation_word(generation, self._record_sum(slot)))

    def _record_sum(self, slot: Slot) -> int:
        return layout.record_sum(self._storage.buffer, self.shape, slot.number)

    def _word(self, slot: Slot, word: int, value: int) -> None:
        self._storage.write(self.shape.entry_at(slot.number) + word, int(value).to_bytes(_WORD, "little"))


def _include(totals: Totals, update: Update) -> Totals:
    return replace(
        totals,
        count=totals.count + 1,
        data_size=totals.data_size + update.data_size,
        eval_data_size=totals.eval_data_size + update.eval_data_size,
        loss=totals.loss + update.loss * update.data_size,
        accuracy=totals.accuracy + update.accuracy * update.eval_data_size,
    )
