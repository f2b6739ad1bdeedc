"""Slots, acceptance, merging, sealing and settling of one server's updates."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from unit.ledger.histories import MODEL, SHAPE, Device, assert_holds, body_of, read
from unit.ledger.tracing import Held, Tracing

from fedcore.core.client_key import client_hash
from fedcore.errors import LocalError
from fedcore.ledger import layout
from fedcore.ledger import ledger as ledger_module
from fedcore.ledger.layout import MAX_FL_ID, Damaged, Epoch, Shape, SlotState, Totals, sum_of
from fedcore.ledger.ledger import MERGE_BATCH, Ledger, Slot, Update
from fedcore.wire.arrays import Layout, Weight

EPOCH = Epoch("instance", 1, "0" * 64)


def new_ledger(shape: Shape = SHAPE, model: Layout = MODEL) -> Ledger:
    ledger = Ledger.create(Tracing(shape.size), model, shape)
    ledger.begin(EPOCH)
    return ledger


def take(ledger: Ledger) -> Slot:
    slot = ledger.receive()
    assert slot is not None
    return slot


def received(ledger: Ledger, device: Device) -> Slot:
    """Bring a device's update as far as the question to the shared state."""
    slot, body = take(ledger), body_of(device)
    slot.buffer[: len(body)] = body
    slot.length = len(body)
    update = read(slot.body, device.data_size, device.eval_data_size)
    ledger.record(slot, device.fl_id, update.loss, update.accuracy)
    return slot


def accept(ledger: Ledger, *devices: Device) -> None:
    for device in devices:
        slot = received(ledger, device)
        ledger.accept(slot, read(slot.body, device.data_size, device.eval_data_size))


def merge_all(ledger: Ledger) -> None:
    while ledger.unmerged:
        for slot in ledger.merge():
            ledger.reuse(slot)


def devices(count: int) -> list[Device]:
    return [Device(f"client-{i}", i, data_size=i + 1) for i in range(count)]


class TestSlots:
    def test_there_are_as_many_as_the_shape_says(self) -> None:
        ledger = new_ledger()
        slots = [take(ledger) for _ in range(SHAPE.slots)]
        assert ledger.receive() is None
        assert ledger.free_slots == 0
        for slot in slots:
            ledger.release(slot)
        assert ledger.free_slots == SHAPE.slots

    def test_each_has_memory_of_its_own(self) -> None:
        ledger = new_ledger()
        slots = [take(ledger) for _ in range(SHAPE.slots)]
        for i, slot in enumerate(slots):
            slot.buffer[:] = bytes([i]) * SHAPE.slot_size
        assert [set(slot.buffer) for slot in slots] == [{0}, {1}, {2}]

    def test_the_body_is_what_was_received(self) -> None:
        slot = take(new_ledger())
        slot.buffer[:5] = b"hello"
        slot.length = 5
        assert bytes(slot.body) == b"hello"
        assert slot.body.readonly

    def test_a_slot_knows_its_ledger(self) -> None:
        mine, other = new_ledger(), new_ledger()
        assert mine.id != other.id
        assert mine.owns(take(mine))
        assert not mine.owns(take(other))

    def test_a_client_id_that_does_not_fit_is_refused_before_anything_is_written(self) -> None:
        ledger = new_ledger()
        ledger.record(take(ledger), "x" * MAX_FL_ID, 0.0, 0.0)
        slot = take(ledger)
        with pytest.raises(LocalError, match="does not fit"):
            ledger.record(slot, "x" * (MAX_FL_ID + 1), 0.0, 0.0)


class TestAccept:
    def test_an_update_is_held_before_and_after_its_merge(self) -> None:
        ledger = new_ledger()
        assert ledger.idle
        accept(ledger, Device("x", 1))
        assert (ledger.holds("x"), ledger.holds("y"), ledger.unmerged, ledger.idle) == (True, False, 1, False)
        merge_all(ledger)
        assert (ledger.holds("x"), ledger.unmerged, ledger.idle) == (True, 0, False)

    def test_before_the_first_iteration_nothing_is_taken(self) -> None:
        ledger = Ledger.create(Tracing(SHAPE.size), MODEL, SHAPE)
        slot = take(ledger)
        with pytest.raises(LocalError):
            ledger.record(slot, "x", 0.0, 0.0)
        with pytest.raises(LocalError):
            ledger.accept(slot, Update("x", {}, 1, 0, 0.0, 0.0))
        with pytest.raises(LocalError):
            ledger.seal()

    def test_after_the_seal_nothing_is_accepted(self) -> None:
        ledger = new_ledger()
        ledger.seal()
        with pytest.raises(LocalError):
            accept(ledger, Device("x", 1))
        assert not ledger.holds("x")

    def test_nothing_is_accepted_twice(self) -> None:
        ledger = new_ledger()
        accept(ledger, Device("x", 1))
        with pytest.raises(LocalError):
            accept(ledger, Device("x", 1))
        merge_all(ledger)
        with pytest.raises(LocalError):
            accept(ledger, Device("x", 2))
        merge_all(ledger)
        assert_holds(ledger.seal(), {"x": Device("x", 1)})

    def test_no_more_than_the_ledger_lists(self) -> None:
        ledger = new_ledger()
        for device in devices(SHAPE.clients):
            accept(ledger, device)
            merge_all(ledger)
        with pytest.raises(LocalError):
            accept(ledger, Device("one more", 1))


class TestMerge:
    @pytest.mark.parametrize("batch", [1, 2, 3, MERGE_BATCH])
    def test_the_sum_is_that_of_all_whatever_the_batches(
        self, monkeypatch: pytest.MonkeyPatch, batch: int
    ) -> None:
        monkeypatch.setattr(ledger_module, "MERGE_BATCH", batch)
        ledger, all_of_them = new_ledger(), devices(7)
        for start in range(0, 7, 3):
            accept(ledger, *all_of_them[start : start + 3])
            merge_all(ledger)
        assert_holds(ledger.seal(), {device.fl_id: device for device in all_of_them})

    @pytest.mark.parametrize("size", [1, 6, 7, 8, 14, 15, 20])
    def test_a_weight_longer_than_a_block_loses_no_element(
        self, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        monkeypatch.setattr(ledger_module, "BLOCK", 7)
        model = Layout((Weight("a", (3,)), Weight("w", (size,)), Weight("z", (3,))))
        shape = Shape.of(model, "job", 8, 3, 600)
        ledger = new_ledger(shape, model)
        sent = [{name: np.arange(n, dtype=np.float32) + i for name, n in zip("awz", (3, size, 3), strict=True)}
                for i in range(5)]  # fmt: skip
        for i, weights in enumerate(sent):
            slot = take(ledger)
            ledger.record(slot, str(i), 0.0, 0.0)
            ledger.accept(slot, Update(str(i), weights, 2, 0, 0.0, 0.0))
            if i % 2:
                merge_all(ledger)
        merge_all(ledger)
        expected = sum(np.concatenate(list(weights.values())).astype(np.float64) for weights in sent)
        np.testing.assert_array_equal(ledger.seal().sums, expected)

    def test_updates_may_come_while_another_thread_merges(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ledger = new_ledger()
        accept(ledger, Device("x", 1))
        inside, go_on = threading.Event(), threading.Event()
        add = ledger._add

        def slow(updates: list[dict[str, np.ndarray]]) -> int:
            inside.set()
            assert go_on.wait(30)
            return add(updates)

        monkeypatch.setattr(ledger, "_add", slow)
        worker = threading.Thread(target=ledger.merge)
        worker.start()
        assert inside.wait(30)
        accept(ledger, Device("y", 2))
        ledger.release(received(ledger, Device("refused", 3)))
        go_on.set()
        worker.join()
        assert (ledger.unmerged, ledger.holds("y")) == (1, True)
        monkeypatch.undo()
        merge_all(ledger)
        assert_holds(ledger.seal(), {"x": Device("x", 1), "y": Device("y", 2)})

    @pytest.mark.parametrize("step", ["_add", "_merged_in", "_commit"])
    def test_a_merge_that_fails_changes_nothing_and_can_be_repeated(
        self, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        ledger = new_ledger()
        accept(ledger, Device("x", 1))
        merge_all(ledger)
        accept(ledger, Device("y", 2))

        def broken(*_: object) -> None:
            raise OSError("the disk is gone")

        monkeypatch.setattr(ledger, step, broken)
        with pytest.raises(OSError):
            ledger.merge()
        with pytest.raises(LocalError):
            ledger.seal()
        monkeypatch.undo()
        merge_all(ledger)
        assert_holds(ledger.seal(), {"x": Device("x", 1), "y": Device("y", 2)})
        assert ledger.free_slots == SHAPE.slots


class TestEpochs:
    def test_an_empty_one_is_zeros(self) -> None:
        partial = new_ledger().seal()
        assert_holds(partial, {})
        assert partial.iteration == 1

    def test_the_next_one_starts_anew_and_gets_all_slots_back(self) -> None:
        ledger = new_ledger()
        accept(ledger, Device("x", 1))
        merge_all(ledger)
        accept(ledger, Device("y", 2))
        ledger.begin(Epoch("instance", 2, "1" * 64))
        assert (ledger.idle, ledger.holds("x"), ledger.free_slots) == (True, False, SHAPE.slots)
        accept(ledger, Device("y", 3))
        merge_all(ledger)
        partial = ledger.seal()
        assert_holds(partial, {"y": Device("y", 3)})
        assert partial.iteration == 2

    def test_a_partial_stays_as_it_is(self) -> None:
        ledger = new_ledger()
        accept(ledger, Device("x", 1))
        merge_all(ledger)
        partial = ledger.seal()
        assert_holds(partial, {"x": Device("x", 1)})
        ledger.begin(Epoch("instance", 2, "1" * 64))
        assert partial.sizes.tolist() == [7, 7, 7]
        assert partial.totals.count == 1

    def test_nothing_is_sealed_before_it_is_merged(self) -> None:
        ledger = new_ledger()
        accept(ledger, Device("x", 1))
        with pytest.raises(LocalError, match="before its updates were merged"):
            ledger.seal()


class TestUnseal:
    def test_what_was_there_stays_and_more_comes(self) -> None:
        ledger = new_ledger()
        accept(ledger, Device("x", 1))
        merge_all(ledger)
        ledger.seal()
        ledger.unseal()
        accept(ledger, Device("y", 2))
        merge_all(ledger)
        assert_holds(ledger.seal(), {"x": Device("x", 1), "y": Device("y", 2)})

    def test_what_is_in_is_not_taken_twice(self) -> None:
        ledger = new_ledger()
        accept(ledger, Device("x", 1))
        merge_all(ledger)
        ledger.seal()
        ledger.unseal()
        with pytest.raises(LocalError):
            accept(ledger, Device("x", 1))

    def test_sealed_again_nothing_is_accepted(self) -> None:
        ledger = new_ledger()
        ledger.seal()
        ledger.unseal()
        ledger.seal()
        with pytest.raises(LocalError):
            accept(ledger, Device("x", 1))


class TestClients:
    """Who is in a ledger, for a shared state that has forgotten it."""

    def test_are_told_by_their_hashes_merged_or_not(self) -> None:
        ledger = new_ledger()
        assert ledger.clients() == {}
        accept(ledger, Device("x", 1, data_size=65535), Device("y", 2, data_size=1))
        merge_all(ledger)
        accept(ledger, Device("z", 3, data_size=9))
        received(ledger, Device("asked", 4))
        sizes = {"x": 65535, "y": 1, "z": 9}
        assert ledger.clients() == {client_hash(fl_id): size for fl_id, size in sizes.items()}
        assert all(len(client) == 16 for client in ledger.clients())

    def test_of_an_epoch_that_is_over_are_none(self) -> None:
        ledger = new_ledger()
        accept(ledger, Device("x", 1))
        merge_all(ledger)
        accept(ledger, Device("y", 2))
        ledger.begin(Epoch("instance", 2, "1" * 64))
        assert ledger.clients() == {}

    def test_are_those_of_the_partial(self) -> None:
        ledger = new_ledger()
        accept(ledger, *devices(3))
        merge_all(ledger)
        assert ledger.seal().clients == tuple(ledger.clients())

    def test_are_there_after_a_crash(self) -> None:
        owner = new_ledger()
        accept(owner, Device("x", 1, data_size=5))
        merge_all(owner)
        heir, _ = Ledger.recover(Held(owner._storage.buffer), MODEL, EPOCH)  # type: ignore[arg-type]
        assert heir.clients() == {client_hash("x"): 5}

    def test_none_is_missed_while_another_thread_merges(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between two looks, one at the merged and one at the others, the updates may go from these to those."""
        ledger = new_ledger()
        accept(ledger, *devices(2))
        everybody = {client_hash(device.fl_id): device.data_size for device in devices(2)}
        seen: list[dict[bytes, int]] = []

        def look(fl_id: str) -> bytes:
            merge_all(ledger)
            return client_hash(fl_id)

        monkeypatch.setattr(ledger_module, "client_hash", look)
        seen.append(ledger.clients())
        monkeypatch.undo()
        assert ledger.unmerged == 0
        assert seen == [everybody]


class TestPartialsAreFiles:
    """What a partial says of itself makes a ledger file of it again, see test_copy.py."""

    def test_its_content_is_the_live_accumulator(self) -> None:
        ledger = new_ledger()
        for merges in range(4):
            partial = ledger.seal()
            assert (partial.start, len(partial.content)) == (
                SHAPE.accumulator_at(layout.read_generation(ledger._storage.buffer)),
                SHAPE.accumulator_size,
            )
            assert partial.content.readonly
            ledger.unseal()
            accept(ledger, Device(f"client-{merges}", merges))
            merge_all(ledger)
            assert partial.start != ledger.seal().start
            ledger.unseal()

    def test_its_head_has_no_slots(self) -> None:
        ledger = new_ledger()
        head = ledger.seal().head
        assert len(head) == layout.PAGE
        assert layout.shape_of(head) == replace(SHAPE, slots=0)
        assert layout.ledger_id_of(head) == ledger.id
        assert layout.read_generation(memoryview(head)) == 1


class TestSettle:
    """What an adopter does with updates that were not in the sum when their server died."""

    def left(self, *, counted: tuple[str, ...] = ()) -> tuple[Ledger, list[str]]:
        owner = new_ledger()
        received(owner, Device("asked", 1))
        accept(owner, Device("accepted", 2))
        heir, entries = Ledger.recover(Held(owner._storage.buffer), MODEL, EPOCH)  # type: ignore[arg-type]
        assert [entry.state for entry in entries] == [SlotState.ACCEPTED, SlotState.RECEIVED]
        sizes = dict.fromkeys(counted, (7, 3))
        return heir, heir.settle(entries, sizes, read)

    def test_what_the_shared_state_counted_is_taken_up(self) -> None:
        heir, lost = self.left(counted=("asked",))
        merge_all(heir)
        assert not lost
        assert_holds(heir.seal(), {"asked": Device("asked", 1), "accepted": Device("accepted", 2)})

    def test_what_it_did_not_count_is_freed(self) -> None:
        heir, lost = self.left()
        merge_all(heir)
        assert not lost
        assert heir.free_slots == SHAPE.slots
        assert_holds(heir.seal(), {"accepted": Device("accepted", 2)})

    def test_of_two_copies_the_readable_one_counts(self) -> None:
        for broken in (0, 1):
            owner = new_ledger()
            slots = [received(owner, Device("x", 1)) for _ in range(2)]
            slots[broken].buffer[40] ^= 1
            heir, entries = Ledger.recover(Held(owner._storage.buffer), MODEL, EPOCH)  # type: ignore[arg-type]
            assert heir.settle(entries, {"x": (7, 3)}, read) == []
            merge_all(heir)
            assert_holds(heir.seal(), {"x": Device("x", 1)})

    def test_a_counted_body_that_is_no_request_is_lost(self) -> None:
        owner = new_ledger()
        slot = take(owner)
        slot.buffer[:4] = b"\xff" * 4
        slot.length = 4
        owner.record(slot, "x", 0.0, 0.0)
        heir, entries = Ledger.recover(Held(owner._storage.buffer), MODEL, EPOCH)  # type: ignore[arg-type]
        assert len(heir.settle(entries, {"x": (7, 3)}, read)) == 1

    def test_a_body_of_another_client_than_its_record_is_lost(self) -> None:
        """Damage that a checksum was made for again; the other client's update may be in the ledger already."""
        owner = new_ledger()
        accept(owner, Device("x", 1))
        owner.record(received(owner, Device("x", 1)), "y", 0.0, 0.0)
        heir, entries = Ledger.recover(Held(owner._storage.buffer), MODEL, EPOCH)  # type: ignore[arg-type]
        (why,) = heir.settle(entries, {"y": (7, 3)}, read)
        assert "another client" in why
        merge_all(heir)
        assert_holds(heir.seal(), {"x": Device("x", 1)})

    def test_the_wrong_epoch_is_not_taken_over(self) -> None:
        owner = new_ledger()
        for other in (
            Epoch("another", 1, "0" * 64),
            Epoch("instance", 2, "0" * 64),
            Epoch("instance", 1, "1" * 64),
        ):
            with pytest.raises(Damaged, match="the ledger holds updates of iteration 1"):
                Ledger.recover(Held(owner._storage.buffer), MODEL, other)  # type: ignore[arg-type]


def test_totals_of_several_ledgers_add_up() -> None:
    assert sum_of([]) == Totals()
    assert sum_of([Totals(1, 2, 3, 0.5, 0.25), Totals(10, 20, 30, 5.0, 2.5)]) == Totals(11, 22, 33, 5.5, 2.75)


def test_every_ledger_has_a_name_of_its_own() -> None:
    assert len({new_ledger().id for _ in range(20)}) == 20
