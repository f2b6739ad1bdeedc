"""Lives of a ledger: a server that takes updates, the shared state that counts them, and what a crash leaves.

``History`` performs steps on a real ``Ledger`` over a traced storage and keeps account of what the shared state had
counted, and what the server had answered with 200, before each write. ``check`` recovers the bytes of one moment as
an adopter would and holds them against the account of that moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import count
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from unit.ledger.tracing import Held, Tracing, Written

from fedcore.compression import mask as masks
from fedcore.compression import sparse
from fedcore.errors import LocalError
from fedcore.ledger import layout
from fedcore.ledger import ledger as ledger_module
from fedcore.ledger.decoding import (
    Decoder,
    Reading,
    sign_layers,
    sign_reading,
    sparse_layers,
    sparse_reading,
)
from fedcore.ledger.layout import Damaged, Epoch, Shape, SlotState, Totals
from fedcore.ledger.ledger import Ledger, Partial, Slot, Update
from fedcore.wire import codec
from fedcore.wire.arrays import Floats, Layout, Values, Weight
from fedcore.wire.messages import CompressType, FeatureMap, RequestUpdateModel

MODEL = Layout(
    (Weight("a", (2,)), Weight("b", (3,)), Weight("c", ()), Weight("kept", (2,), aggregated=False))
)
NAMES = tuple(weight.name for weight in MODEL)
SHAPE = Shape.of(MODEL, "job", clients=8, slots=3, slot_size=600)
EVERYTHING = (1 << len(NAMES)) - 1
BASE = {weight.name: np.full(weight.size, 0.1, np.float32) * (i + 1) for i, weight in enumerate(MODEL)}
RATE, STEP = float(np.float32(0.4)), 0.125  # of sparse and of signed updates


# ---- updates


@dataclass(frozen=True)
class Device:
    """One device's upload in one epoch.

    Attributes:
        fl_id: the device.
        seed: of its values.
        mask: bit i says whether it sends weight i.
        data_size: 1..65535.
        eval_data_size: from 0.
        form: in which it sends them.
    """

    fl_id: str
    seed: int
    mask: int = EVERYTHING
    data_size: int = 7
    eval_data_size: int = 3
    form: Decoder = Decoder.PLAIN


@cache
def body_of(device: Device) -> bytes:
    chance = np.random.default_rng(device.seed)
    values = {weight.name: chance.standard_normal(weight.size).astype(np.float32) for weight in MODEL}
    sent = [name for i, name in enumerate(NAMES) if device.mask >> i & 1]
    figures = np.float32(chance.random(2)).tolist()
    return codec.encode(
        RequestUpdateModel(
            fl_name="job",
            fl_id=device.fl_id,
            iteration=1,
            timestamp="1",
            upload_loss=figures[0],
            upload_accuracy=figures[1],
            **_sent(device, {name: values[name] * np.float32(device.data_size) for name in sent}, chance),
        )
    )


def _sent(device: Device, values: dict[str, Floats], chance: np.random.Generator) -> dict[str, Any]:
    """The fields of an update that say how the model moves."""
    if device.form is Decoder.SPARSE:
        layers = [(name, each.size) for name, each in values.items()]
        pattern = sparse.pattern(layers, masks.draw(1, RATE, sum(size for _, size in layers)))
        return {
            "compress_feature_map": sparse.compress(pattern, values, BASE, device.data_size),
            "upload_compress_type": CompressType.DIFF_SPARSE_QUANT,
            "upload_sparse_rate": RATE,
            "name_vec": tuple(values),
        }
    if device.form is Decoder.SIGN:
        total = sum(each.size for each in values.values())
        chosen = np.flatnonzero(chance.random(total) < 0.5) if total > 1 else np.zeros(1)
        return {
            "feature_map": tuple(FeatureMap(name, np.empty(0, np.float32)) for name in values),
            "sign": 1 if chance.random() < 0.5 else -1,
            "index_array": (chosen if chosen.size else np.zeros(1)).astype(np.int32),
        }
    return {"feature_map": tuple(FeatureMap(name, each) for name, each in values.items())}


def read(
    body: memoryview | bytes, data_size: int, eval_data_size: int, decoder: int = Decoder.PLAIN
) -> Update:
    """Make an update of a body, as the server does."""
    request = codec.decode(RequestUpdateModel, body)
    plain = {item.weight_fullname or "": item.data for item in request.feature_map or ()}
    weights: Mapping[str, Values] = {name: data for name, data in plain.items() if data is not None}
    if decoder != Decoder.PLAIN:
        weights = reading_of(request, decoder).weights(data_size)
    return Update(
        request.fl_id or "",
        weights,
        data_size,
        eval_data_size,
        request.upload_loss,
        request.upload_accuracy,
    )


def reading_of(request: RequestUpdateModel, decoder: int) -> Reading:
    """Read an update that is not plain, against BASE."""
    if decoder == Decoder.SIGN:
        return sign_reading(request, sign_layers(MODEL, request), STEP, BASE, "", 1.0)
    if decoder != Decoder.SPARSE:
        raise Damaged(f"there is no decoder {decoder}")
    layers = sparse_layers(MODEL, request, RATE)
    total = sum(size for _, size in layers)
    pattern = sparse.pattern(layers, masks.draw(request.iteration, RATE, total))
    return sparse_reading(request, pattern, BASE, "", 1.0)


@cache
def meant(device: Device) -> Mapping[str, Floats]:
    """What a device's update stands for, worked out value by value: name -> float32[n], times the data size."""
    request = codec.decode(RequestUpdateModel, body_of(device))
    size = np.float32(device.data_size)
    if device.form is Decoder.SPARSE:
        names = request.name_vec or ()
        marks = iter(masks.draw(1, RATE, sum(BASE[name].size for name in names)).tolist())
        values = iter(np.concatenate([sparse.restore(item) for item in request.compress_feature_map or ()]))
        return {
            name: np.float32(
                [next(values) + each * size if next(marks) else each * size for each in BASE[name]]
            )
            for name in names
        }
    named = [(item.weight_fullname or "", item.data) for item in request.feature_map or ()]
    if device.form is Decoder.SIGN:
        assert request.index_array is not None
        chosen, step, position = set(request.index_array.tolist()), np.float32(request.sign * STEP), count()
        return {
            name: np.float32(
                [(each + step if next(position) in chosen else each) * size for each in BASE[name]]
            )
            for name, _ in named
        }
    return {name: data for name, data in named if data is not None}


@cache
def _sent_by(device: Device) -> Update:
    """A device's update, as the server reads it."""
    return read(body_of(device), device.data_size, device.eval_data_size, device.form)


@lru_cache(maxsize=4096)
def plain_sum(
    devices: tuple[Device, ...],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint64], Totals]:
    """The definition of what a ledger holds: updates added one after another, in float64."""
    sums = {weight.name: np.zeros(weight.size, np.float64) for weight in MODEL.aggregated}
    sizes = dict.fromkeys(sums, 0)
    data, evaluated, loss, accuracy = 0, 0, 0.0, 0.0
    for device in devices:
        update = _sent_by(device)
        for name, values in meant(device).items():
            if name in sums:
                sums[name] = sums[name] + values.astype(np.float64)
                sizes[name] += device.data_size
        data += device.data_size
        evaluated += device.eval_data_size
        loss += update.loss * device.data_size
        accuracy += update.accuracy * device.eval_data_size
    totals = Totals(len(devices), data, evaluated, loss, accuracy)
    return np.concatenate(list(sums.values())), np.array(list(sizes.values()), np.uint64), totals


def assert_holds(partial: Partial, expected: Mapping[str, Device]) -> None:
    """Hold a sum, to the last bit, against the devices that should be in it; the client list tells the order."""
    by_hash = {layout.client_hash(fl_id): device for fl_id, device in expected.items()}
    assert len(set(partial.clients)) == len(partial.clients), "a client is in the sum twice"
    assert set(partial.clients) == set(by_hash)
    sums, sizes, totals = plain_sum(tuple(by_hash[client] for client in partial.clients))
    assert partial.sums.tobytes() == sums.tobytes()
    assert partial.sizes.tolist() == sizes.tolist()
    assert partial.totals == totals


# ---- histories


@dataclass
class Served:
    """The account of one epoch.

    Attributes:
        epoch: which.
        since: position in the trace of the store that began it.
        counted: (position, device): the shared state has counted its update.
        answered: (position, device): the server has said 200.
        sent: what each device sends in this epoch; a repeat brings the same.
    """

    epoch: Epoch
    since: int
    counted: list[tuple[int, Device]] = field(default_factory=list)
    answered: list[tuple[int, Device]] = field(default_factory=list)
    sent: dict[str, Device] = field(default_factory=dict)

    def counts(self, fl_id: str) -> bool:
        return any(device.fl_id == fl_id for _, device in self.counted)


class History:
    """One ledger file from its making on."""

    def __init__(self, durable: bool = False, shape: Shape = SHAPE) -> None:
        self.shape = shape
        self.storage = Tracing(shape.size)
        self.durable = durable
        self.ledger = Ledger.create(self.storage, MODEL, shape)
        self.served: list[Served] = []
        self.open: deque[tuple[Slot, Device, bool, Served]] = deque()  # asked, reply lost; whether it counts
        self.unused: list[Slot] = []  # merged, not given back yet
        self.proved: set[tuple[bytes, Epoch, frozenset[Device]]] = (
            set()
        )  # what need not be recovered once more
        self.began()

    @property
    def now(self) -> int:
        return len(self.storage.trace)

    @property
    def account(self) -> Served:
        return self.served[-1]

    # ---- steps

    def began(self, *, failed: bool = False, again: bool = False) -> None:
        """A new epoch; ``failed``: with updates left over; ``again``: the same, forgotten by Redis."""
        if not failed and self.served:
            self.seal()
        number = len(self.served) + 1
        epoch = Epoch("instance", 1 + number // 2, f"{number:064x}")
        if again and self.served:
            epoch = self.account.epoch
        start = self.now
        self.ledger.begin(epoch)
        stores = [
            position
            for position, written in enumerate(self.storage.trace[start:], start)
            if isinstance(written, Written) and written.at == layout.GENERATION
        ]
        self.served.append(Served(epoch, stores[-1]))

    def upload(self, device: Device, reply: str) -> None:
        """A device uploads; ``reply``: heard, lost, or refused for a reason of the shared state's; cut: no end came."""
        slot = self.ledger.receive()
        if slot is None:
            return
        device = self.account.sent.setdefault(device.fl_id, device)
        body = body_of(device)
        half = len(body) // 2
        for start, part in ((0, body[:half]), (half, body[half:] if reply != "cut" else b"")):
            slot.buffer[start : start + len(part)] = part
            self.storage.note(self.shape.body_at(slot.number) + start, part)
        slot.length = len(body)
        if reply == "cut" or self.ledger.holds(device.fl_id):
            self.ledger.release(slot)
            return
        update = read(slot.body, device.data_size, device.eval_data_size, device.form)
        self.ledger.record(slot, device.fl_id, update.loss, update.accuracy, device.form)
        if self.durable:
            self.ledger.sync()
        counts = self.account.counts(device.fl_id)
        if reply != "refused" and not counts and len(self.account.counted) < self.shape.clients:
            self.account.counted.append((self.now, device))
            counts = True
        if reply == "lost":
            self.open.append((slot, device, counts, self.account))
        else:
            self.heard(slot, device, counts, self.account)

    def heard(self, slot: Slot, device: Device, counts: bool, asked_in: Served) -> None:
        """The answer of the shared state is here; it refuses what was asked in an epoch that is over."""
        if asked_in is not self.account or not counts or self.ledger.holds(device.fl_id):
            self.ledger.release(slot)
            return
        mine = read(slot.body, device.data_size, device.eval_data_size, device.form)
        self.ledger.accept(slot, mine)
        self.account.answered.append((self.now, device))

    def ask_again(self) -> None:
        if self.open:
            self.heard(*self.open.popleft())

    def merge(self, batch: int, keep: bool = False) -> None:
        """Merge; ``keep``: the slots are given back only later."""
        if not self.ledger.unmerged:
            return
        with patch.object(ledger_module, "MERGE_BATCH", batch):
            self.unused += self.ledger.merge()
        if not keep:
            self.reuse()

    def reuse(self) -> None:
        while self.unused:
            self.ledger.reuse(self.unused.pop())

    def seal(self) -> None:
        """The end of an iteration that made a model."""
        while self.open:
            self.ask_again()
        while self.ledger.unmerged:
            self.merge(8)
        self.reuse()
        partial = self.ledger.seal()
        assert_holds(partial, {device.fl_id: device for _, device in self.account.counted})

    # ---- judgement

    def account_at(self, done: int) -> Served | None:
        """The epoch that the file is in after that many writes."""
        return next((served for served in reversed(self.served) if served.since < done), None)

    def check(self, content: bytes | bytearray, moments: Sequence[int], served: Served | None) -> None:
        """Recover what a crash left.

        A recovery depends on the bytes, the epoch and the counted devices alone: the same three are tried once.

        Args:
            content: of the file.
            moments: positions in the account that the crash may have come at.
            served: the epoch that the file must be in; None before the first.
        """
        if served is None:
            try:
                _, examined = layout.examine(memoryview(bytes(content)))
                assert examined.generation == 0
            except Damaged:
                pass  # the header is not there yet
            return
        for moment in moments:
            counted = {device.fl_id: device for position, device in served.counted if position < moment}
            answered = {device.fl_id for position, device in served.answered if position < moment}
            assert answered <= set(counted)
            case = (bytes(content), served.epoch, frozenset(counted.values()))
            if case in self.proved:
                continue
            partial, lost = recover(Held(content), served.epoch, counted)
            assert not lost
            assert_holds(partial, counted)
            self.proved.add(case)


def recover(storage: Tracing, epoch: Epoch, counted: Mapping[str, Device]) -> tuple[Partial, list[str]]:
    """Do what an adopter does; ``counted`` is what the shared state says."""
    ledger, entries = Ledger.recover(storage, MODEL, epoch)
    asked = {entry.record.fl_id for entry in entries if entry.state is SlotState.RECEIVED}
    sizes = {
        fl_id: (device.data_size, device.eval_data_size)
        for fl_id, device in counted.items()
        if fl_id in asked
    }
    lost = ledger.settle(entries, sizes, read)
    while ledger.unmerged:
        ledger.merge()
    return ledger.seal(), lost


def step(history: History, what: tuple[object, ...]) -> None:
    """Perform a step that was written down as a tuple."""
    match what:
        case ("upload", int(client), int(seed), int(mask), int(size), str(reply)):
            form = Decoder(seed % len(Decoder))
            device = Device(f"client-{client}", seed * 16 + client, mask, size, client * 2, form)
            history.upload(device, reply)
        case ("merge", int(batch), bool(keep)):
            history.merge(batch, keep)
        case ("reuse",):
            history.reuse()
        case ("ask",):
            history.ask_again()
        case ("next",):
            history.began()
        case ("fail",):
            history.began(failed=True)
        case ("again",):
            history.began(failed=True, again=True)
        case _:
            raise LocalError(f"no step {what}")
