"""Slots, acceptance, merging and sealing of one server's updates."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from fedcore.errors import LocalError
from fedcore.ledger.ledger import MERGE_BATCH, Ledger, Slot, Upload
from fedcore.wire.arrays import Layout, Weight

LAYOUT = Layout((Weight("a", (2,)), Weight("b", (2, 2)), Weight("fixed", (3,), aggregated=False)))


def ledger(budget_slots: int = 4) -> Ledger:
    made = Ledger(LAYOUT, 100, 100 * budget_slots)
    made.begin(5, 1)
    return made


def upload(fl_id: str, value: float = 1.0, data_size: int = 2, **figures: float) -> Upload:
    weights = {"a": np.full(2, value, np.float32), "b": np.full(4, 2 * value, np.float32)}
    known = {"eval_data_size": 4, "loss": 0.5, "accuracy": 0.75, **figures}
    return Upload(fl_id, weights, data_size, **known)  # type: ignore[arg-type]


def take(of: Ledger) -> Slot:
    slot = of.receive()
    assert slot is not None
    return slot


def accept(into: Ledger, *fl_ids: str, value: float = 1.0) -> None:
    for fl_id in fl_ids:
        into.accept(take(into), upload(fl_id, value))


def merge_all(of: Ledger) -> None:
    while of.unmerged:
        of.start_merge().run()
        of.finish_merge()


def free_slots(of: Ledger) -> int:
    slots = []
    while (slot := of.receive()) is not None:
        slots.append(slot)
    for slot in slots:
        of.release(slot)
    return len(slots)


class TestSlots:
    @pytest.mark.parametrize(
        ("budget", "slots"), [(0, 4), (399, 4), (400, 4), (500, 5), (599, 5), (1000, 10)]
    )
    def test_there_are_as_many_as_the_memory_allows_and_never_fewer_than_four(
        self, budget: int, slots: int
    ) -> None:
        assert free_slots(Ledger(LAYOUT, 100, budget)) == slots

    def test_each_has_memory_of_its_own(self) -> None:
        made = ledger()
        slots = [take(made) for _ in range(4)]
        for i, slot in enumerate(slots):
            assert len(slot.buffer) == made.slot_size == 100
            slot.buffer[:] = bytes([i]) * 100
        assert [slot.buffer[50] for slot in slots] == [0, 1, 2, 3]
        assert made.receive() is None

    def test_memory_is_used_again(self) -> None:
        made = ledger()
        slots = [take(made) for _ in range(4)]
        slots[2].length = 7
        made.release(slots[2])
        again = take(made)
        assert again is slots[2]
        assert again.length == 0

    def test_the_body_is_what_was_received(self) -> None:
        slot = take(ledger())
        slot.buffer[:5] = b"hello"
        slot.length = 5
        assert bytes(slot.body) == b"hello"

    def test_every_ledger_has_a_name_of_its_own(self) -> None:
        assert len({ledger().id for _ in range(50)}) == 50


class TestAccept:
    def test_an_update_is_held_before_and_after_its_merge(self) -> None:
        made = ledger()
        accept(made, "x")
        assert (made.holds("x"), made.holds("y"), made.unmerged) == (True, False, 1)
        merge_all(made)
        assert (made.holds("x"), made.unmerged) == (True, 0)

    def test_before_the_first_iteration_nothing_is_accepted(self) -> None:
        made = Ledger(LAYOUT, 100, 400)
        with pytest.raises(LocalError):
            accept(made, "x")

    def test_after_the_seal_nothing_is_accepted(self) -> None:
        made = ledger()
        made.seal()
        with pytest.raises(LocalError):
            accept(made, "x")
        assert not made.holds("x")

    def test_totals(self) -> None:
        made = ledger()
        made.accept(take(made), upload("x", data_size=10, eval_data_size=3, loss=2.0, accuracy=0.5))
        made.accept(take(made), upload("y", data_size=30, eval_data_size=0, loss=1.0, accuracy=0.9))
        merge_all(made)
        totals = made.seal().totals
        assert (totals.count, totals.data_size, totals.eval_data_size) == (2, 40, 3)
        assert (totals.loss, totals.accuracy) == (50.0, 1.5)
        assert totals.fl_ids == {"x", "y"}


class TestMerge:
    def test_adds_up(self) -> None:
        made = ledger()
        accept(made, "x", "y", value=3.0)
        merge_all(made)
        partial = made.seal()
        assert partial.sums.sums.tolist() == [6.0, 6.0, 12.0, 12.0, 12.0, 12.0]
        assert partial.sums.sizes == {"a": 4, "b": 4}
        assert (partial.ledger_id, partial.iteration, partial.attempt) == (made.id, 5, 1)

    def test_takes_the_oldest_and_not_too_many(self) -> None:
        made = ledger(MERGE_BATCH + 2)
        slots = [take(made) for _ in range(MERGE_BATCH + 2)]
        for i, slot in enumerate(slots):
            made.accept(slot, upload(f"c{i}"))
        merge = made.start_merge()
        assert merge.slots == slots[:MERGE_BATCH]
        assert made.unmerged == 2
        assert made.receive() is None, "a slot was given away while its update was being read"
        merge.run()
        made.finish_merge()
        assert free_slots(made) == MERGE_BATCH

    def test_only_one_at_a_time(self) -> None:
        made = ledger()
        accept(made, "x", "y")
        made.start_merge()
        with pytest.raises(LocalError):
            made.start_merge()
        made.finish_merge()
        made.start_merge()

    def test_of_nothing_does_nothing(self) -> None:
        made = ledger()
        made.start_merge().run()
        made.finish_merge()
        made.finish_merge()
        assert made.seal().sums.sums.tolist() == [0.0] * 6

    def test_updates_are_accepted_while_one_is_under_way(self) -> None:
        """In real threads: the one that merges stands still in the middle."""
        made = ledger()
        accept(made, "x")
        merge = made.start_merge()
        begun, go_on = threading.Event(), threading.Event()

        def run() -> None:
            begun.set()
            assert go_on.wait(10)
            merge.run()

        thread = threading.Thread(target=run)
        thread.start()
        assert begun.wait(10)
        accept(made, "y")
        assert made.unmerged == 1
        go_on.set()
        thread.join(10)
        made.finish_merge()
        merge_all(made)
        assert made.seal().totals.count == 2


class TestSeal:
    @pytest.mark.parametrize("under_way", [False, True])
    def test_not_before_all_is_merged(self, under_way: bool) -> None:
        made = ledger()
        accept(made, "x")
        if under_way:
            made.start_merge()
        with pytest.raises(LocalError):
            made.seal()

    def test_may_be_repeated(self) -> None:
        made = ledger()
        accept(made, "x")
        merge_all(made)
        assert made.seal() == made.seal()


class TestBegin:
    def test_forgets_the_iteration_before(self) -> None:
        made = ledger()
        accept(made, "merged")
        merge_all(made)
        before = made.seal()
        made.begin(6, 2)
        accept(made, "x", value=1.0)
        merge_all(made)
        partial = made.seal()
        assert not made.holds("merged")
        assert (partial.iteration, partial.attempt, partial.totals.count) == (6, 2, 1)
        assert partial.sums.sums.tolist() == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
        assert before.totals.fl_ids == {"merged"}, "the account of the iteration before was overwritten"

    def test_frees_what_was_not_merged(self) -> None:
        made = ledger()
        for fl_id in "wxyz":
            slot = take(made)
            slot.length = 9
            made.accept(slot, upload(fl_id))
        assert made.receive() is None
        made.begin(6, 1)
        assert (made.unmerged, free_slots(made)) == (0, 4)
        assert take(made).length == 0
        assert made.seal().sums.sums.tolist() == [0.0] * 6

    def test_the_memory_of_the_sums_is_used_again(self) -> None:
        made = ledger()
        sums = made.seal().sums
        made.begin(6, 1)
        assert made.seal().sums is sums

    def test_a_merge_under_way_ends_in_its_own_sums(self) -> None:
        made = ledger()
        accept(made, "old", value=1000.0)
        old = made.start_merge()
        assert made.current(old)
        made.begin(6, 1)
        assert not made.current(old)
        accept(made, "new", value=1.0)
        old.run()
        made.finish_merge()
        merge_all(made)
        partial = made.seal()
        assert partial.sums.sums.tolist() == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
        assert partial.totals.fl_ids == {"new"}
        assert free_slots(made) == 4
