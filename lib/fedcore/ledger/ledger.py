"""Where accepted updates live until their iteration has a model.

An update passes four steps: its body is *received* into a slot, *accepted* once the shared state has counted it,
*merged* into the running sum, and the sum is *sealed* when the quorum is reached. The rest of the server knows only
these steps. This ledger keeps slots and sums in the memory of the process: an update is lost with its server.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedcore.aggregation.fedavg import RunningSum, WeightedUpdate
from fedcore.errors import LocalError
from fedcore.wire.arrays import Floats, Layout

MERGE_BATCH = 8  # updates added per pass over the sums; more gain nothing in throughput
_LEAST_SLOTS = 4


@dataclass(eq=False, slots=True)
class Slot:
    """Memory for one body.

    Attributes:
        buffer: writable bytes, as long as the longest body.
        length: bytes of the body that is in it.
    """

    buffer: memoryview
    length: int = 0

    @property
    def body(self) -> memoryview:
        """The received bytes."""
        return self.buffer[: self.length]


@dataclass(frozen=True, slots=True)
class Upload:
    """One accepted update, its arrays still lying in its slot.

    Attributes:
        fl_id: the client.
        weights: name -> float32[n], each value times ``data_size``.
        data_size: training samples, 1..65535.
        eval_data_size: evaluation samples, >= 0.
        loss: the client's training loss.
        accuracy: the client's accuracy of the model that it trained from, 0..1.
    """

    fl_id: str
    weights: Mapping[str, Floats]
    data_size: int
    eval_data_size: int
    loss: float
    accuracy: float


@dataclass(slots=True)
class Totals:
    """What is known of the updates in a sum, beside the sum.

    Attributes:
        count: updates.
        data_size: training samples of all.
        eval_data_size: evaluation samples of all.
        loss: sum of loss times data size.
        accuracy: sum of accuracy times evaluation size.
        fl_ids: the clients.
    """

    count: int = 0
    data_size: int = 0
    eval_data_size: int = 0
    loss: float = 0.0
    accuracy: float = 0.0
    fl_ids: set[str] = field(default_factory=set)

    def include(self, upload: Upload) -> None:
        """Count one more update."""
        self.count += 1
        self.data_size += upload.data_size
        self.eval_data_size += upload.eval_data_size
        self.loss += upload.loss * upload.data_size
        self.accuracy += upload.accuracy * upload.eval_data_size
        self.fl_ids.add(upload.fl_id)


@dataclass(frozen=True, slots=True)
class Partial:
    """A sealed sum: all updates of one ledger in one iteration and attempt."""

    ledger_id: str
    iteration: int
    attempt: int
    sums: RunningSum
    totals: Totals


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """Accepted updates on their way into the sums.

    Attributes:
        sums: where they go; those of the iteration that they were accepted in.
        updates: what is added.
        slots: where they lie.
    """

    sums: RunningSum
    updates: list[WeightedUpdate]
    slots: list[Slot]

    def run(self) -> None:
        """Add them; in any thread."""
        self.sums.add(self.updates)


class Ledger:
    """The updates of one server, in memory.

    One merge may be under way at a time, in a thread of its own; everything else happens in one thread.

    Attributes:
        id: names this ledger in the shared state; new with every process.
        slot_size: bytes of the longest body.
    """

    def __init__(self, layout: Layout, slot_size: int, memory_budget: int) -> None:
        """Make an empty ledger.

        Args:
            layout: the model.
            slot_size: bytes of the longest body.
            memory_budget: bytes that the slots may take together; there are never fewer than four.
        """
        self.id = uuid.uuid4().hex
        self.slot_size = slot_size
        self._slots_left = max(_LEAST_SLOTS, memory_budget // slot_size)
        self._free: list[Slot] = []
        self._accepted: deque[tuple[Slot, Upload]] = deque()
        self._layout = layout
        self._sums = RunningSum(layout)
        self._merge: Merge | None = None
        self._totals = Totals()
        self._iteration = 0
        self._attempt = 0
        self._sealed = True

    def begin(self, iteration: int, attempt: int) -> None:
        """Start an iteration with empty sums; what is left of the one before is forgotten.

        A merge that is still under way ends in the sums of its own iteration, which nobody reads any more.
        """
        while self._accepted:
            self.release(self._accepted.popleft()[0])
        if self._merge is None:
            self._sums.clear()  # fresh memory would cost several times as much
        else:
            self._sums = RunningSum(self._layout)
        self._totals = Totals()
        self._iteration, self._attempt, self._sealed = iteration, attempt, False

    def receive(self) -> Slot | None:
        """Return a slot to receive a body into, or None while all are in use."""
        if self._free:
            return self._free.pop()
        if not self._slots_left:
            return None
        self._slots_left -= 1
        return Slot(memoryview(bytearray(self.slot_size)))

    def release(self, slot: Slot) -> None:
        """Take back a slot whose body was not accepted."""
        slot.length = 0
        self._free.append(slot)

    def accept(self, slot: Slot, upload: Upload) -> None:
        """Keep an update that the shared state has counted; the slot is freed after the merge.

        Raises:
            LocalError: the sums are sealed; the caller let an update in that it may not.
        """
        if self._sealed:
            raise LocalError("an update was accepted into a sealed ledger")
        self._totals.include(upload)
        self._accepted.append((slot, upload))

    def holds(self, fl_id: str) -> bool:
        """Tell whether this client's update of the current iteration is in the ledger."""
        return fl_id in self._totals.fl_ids

    @property
    def unmerged(self) -> int:
        """Accepted updates that are not in the sums yet."""
        return len(self._accepted)

    def start_merge(self) -> Merge:
        """Take up to MERGE_BATCH accepted updates to be added to the sums; ``finish_merge`` gives them back.

        Raises:
            LocalError: another merge is under way.
        """
        if self._merge is not None:
            raise LocalError("a ledger was asked for two merges at a time")
        batch = [self._accepted.popleft() for _ in range(min(MERGE_BATCH, len(self._accepted)))]
        updates = [WeightedUpdate(upload.weights, upload.data_size) for _, upload in batch]
        self._merge = Merge(self._sums, updates, [slot for slot, _ in batch])
        return self._merge

    def finish_merge(self) -> None:
        """Free the slots of the merge that has been run, well or not."""
        merge, self._merge = self._merge, None
        for slot in merge.slots if merge is not None else ():
            self.release(slot)

    def current(self, merge: Merge) -> bool:
        """Tell whether a merge belongs to the current iteration."""
        return merge.sums is self._sums

    def seal(self) -> Partial:
        """Close the iteration and return its sums; they are valid until the next ``begin``.

        Raises:
            LocalError: there are updates left to merge.
        """
        if self._accepted or self._merge is not None:
            raise LocalError("a ledger was sealed before its updates were merged")
        self._sealed = True
        return Partial(self.id, self._iteration, self._attempt, self._sums, self._totals)
