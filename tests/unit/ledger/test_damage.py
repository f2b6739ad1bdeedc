"""Damaged files: every part is named or made up for, and nothing false is ever summed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import pytest
from unit.ledger.histories import MODEL, SHAPE, Device, History, assert_holds, recover
from unit.ledger.tracing import Held

from fedcore.ledger import layout
from fedcore.ledger.layout import Damaged
from fedcore.ledger.ledger import Ledger

HEADER_SIZE, TRAILER_SIZE = 128, 120  # with their checksums


@pytest.fixture(scope="module")
def life() -> History:
    """Two updates merged in two generations, one accepted, one asked about, one slot free; an epoch before."""
    shape = layout.Shape.of(MODEL, "job", clients=8, slots=4, slot_size=600)
    history = History(shape=shape)
    history.upload(Device("of the epoch before", 9), "heard")
    history.began()
    history.upload(Device("merged first", 1), "heard")
    history.merge(1)
    history.upload(Device("merged next", 2, mask=0b0110), "heard")
    history.merge(1)
    history.upload(Device("accepted", 3, data_size=65535), "heard")
    history.upload(Device("asked", 4), "lost")
    history.upload(Device("refused", 5), "refused")
    return history


def flips(content: bytes, places: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """Yield (place, bytes) for every single bit of some bytes."""
    changed = bytearray(content)
    for place in places:
        for bit in range(8):
            changed[place] ^= 1 << bit
            yield place, bytes(changed)
            changed[place] ^= 1 << bit


class Parts:
    """Where things are in a life's file."""

    def __init__(self, life: History) -> None:
        self.shape = shape = life.shape
        self.content = bytes(life.storage.content)
        self.epoch = life.account.epoch
        self.counted = {device.fl_id: device for _, device in life.account.counted}
        self.generation = layout.read_generation(memoryview(self.content))
        _, self.examined = layout.examine(memoryview(self.content))
        self.live = shape.accumulator_at(self.generation)
        self.dead = shape.accumulator_at(self.generation + 1)
        self.slots = {entry.record.fl_id: entry for entry in self.examined.pending}

    def recover(self, content: bytes) -> list[str]:
        """Recover; the sum is that of all counted updates, but for what is said to be lost."""
        partial, lost = recover(Held(content), self.epoch, self.counted)
        if not lost:
            assert_holds(partial, self.counted)
        return lost


@pytest.fixture(scope="module")
def parts(life: History) -> Parts:
    return Parts(life)


def test_the_undamaged_file(parts: Parts) -> None:
    assert sorted(parts.slots) == ["accepted", "asked"]
    assert parts.recover(parts.content) == []


class TestChangedBits:
    def named(self, parts: Parts, places: Iterable[int], reason: str) -> None:
        for place, content in flips(parts.content, places):
            with pytest.raises(Damaged) as caught:
                layout.examine(memoryview(content))
            assert re.search(reason, str(caught.value)), (place, caught.value)
            with pytest.raises(Damaged):
                Ledger.recover(Held(content), MODEL, parts.epoch)

    def harmless(self, parts: Parts, places: Iterable[int]) -> None:
        for place, content in flips(parts.content, places):
            assert parts.recover(content) == [], place

    def test_in_the_header(self, parts: Parts) -> None:
        self.named(parts, range(8), "its magic is wrong")
        self.named(parts, range(8, 12), "a ledger of version")
        self.named(parts, range(12, HEADER_SIZE), "header is torn or changed")

    def test_in_the_generation(self, parts: Parts) -> None:
        self.named(parts, range(layout.GENERATION, layout.GENERATION + 8), "the generation is changed")

    def test_in_trailer_sizes_and_client_list(self, parts: Parts) -> None:
        reason = f"accumulator {parts.generation % 2} (lists|is torn)|trailer of accumulator"
        self.named(parts, range(parts.live, parts.live + TRAILER_SIZE), reason)
        sizes = parts.live + parts.shape.sizes_at
        self.named(parts, range(sizes, sizes + 8 * parts.shape.weights), reason)
        clients = parts.live + parts.shape.clients_at
        self.named(parts, range(clients, clients + layout.CLIENT_SIZE * parts.examined.totals.count), reason)

    def test_in_the_sums(self, parts: Parts) -> None:
        start = parts.live + parts.shape.sums_at
        reason = f"the sums of accumulator {parts.generation % 2} are changed"
        self.named(parts, range(start, start + 8 * parts.shape.floats), reason)

    def test_in_the_record_of_an_accepted_update(self, parts: Parts) -> None:
        slot = parts.slots["accepted"].slot
        at = parts.shape.entry_at(slot)
        reason = f"the entry of slot {slot} is changed"
        self.named(parts, range(at + layout.PAYLOAD, at + layout.ENTRY), reason)

    def test_in_the_words_of_an_accepted_update_it_is_asked_about_again(self, parts: Parts) -> None:
        at = parts.shape.entry_at(parts.slots["accepted"].slot)
        self.harmless(parts, range(at, at + layout.PAYLOAD))

    def test_in_the_body_of_an_accepted_update_it_is_reported_lost(self, parts: Parts) -> None:
        for fl_id in ("accepted", "asked"):
            entry = parts.slots[fl_id]
            at = parts.shape.body_at(entry.slot)
            for _, content in flips(parts.content, range(at, at + entry.record.length)):
                reason = f"the body in slot {entry.slot} is changed: its checksum is wrong"
                assert parts.recover(content) == [reason]

    def test_in_the_entries_of_merged_and_refused_updates_nothing_comes_of_it(self, parts: Parts) -> None:
        pending = {entry.slot for entry in parts.examined.pending}
        others = set(range(parts.shape.slots)) - pending
        assert others
        for slot in others:
            at = parts.shape.entry_at(slot)
            for place, content in flips(parts.content, range(at, at + layout.ENTRY)):
                assert parts.recover(content) == [], place

    def test_in_free_space_or_the_dead_accumulator_nothing_comes_of_it(self, parts: Parts) -> None:
        shape = parts.shape
        step = 61
        self.harmless(parts, range(layout.GENERATION + 8, layout.PAGE, step))
        self.harmless(parts, range(parts.dead, parts.dead + shape.accumulator_size, step))
        behind_sums = range(shape.sums_at + 8 * shape.floats, shape.accumulator_size, step)
        self.harmless(parts, (parts.live + place for place in behind_sums))
        self.harmless(parts, range(shape.table_at + layout.ENTRY * shape.slots, shape.slots_at, step))
        for fl_id, entry in parts.slots.items():
            start = shape.body_at(entry.slot)
            self.harmless(
                parts, range(start + entry.record.length, start + shape.slot_size, 7 * step + len(fl_id))
            )


class TestOtherFiles:
    def test_a_file_cut_anywhere(self, parts: Parts) -> None:
        for size in range(0, len(parts.content), 37):
            with pytest.raises(Damaged, match=r"less than a header|the file is cut"):
                layout.examine(memoryview(parts.content[:size]))
        with pytest.raises(Damaged, match="the file is cut"):
            layout.examine(memoryview(parts.content[:-1]))

    def test_a_longer_file_is_none_the_worse(self, parts: Parts) -> None:
        assert parts.recover(parts.content + bytes(4096)) == []

    def test_a_foreign_version_says_what_this_server_reads(self, parts: Parts) -> None:
        content = bytearray(parts.content)
        content[8:12] = (1).to_bytes(4, "little")
        with pytest.raises(Damaged, match="a ledger of version 1, this server reads version 2"):
            layout.examine(memoryview(content))

    def test_what_a_first_page_tells_without_the_rest(self, parts: Parts) -> None:
        page = parts.content[: layout.PAGE]
        assert layout.shape_of(page) == parts.shape
        assert layout.ledger_id_of(page) == layout.ledger_id_of(parts.content) == parts.examined.ledger_id
        with pytest.raises(Damaged, match="less than a header"):
            layout.shape_of(page[:-1])
        for place, changed in flips(page, range(HEADER_SIZE)):
            with pytest.raises(Damaged):
                layout.shape_of(changed)
            assert (layout.ledger_id_of(changed) is None) is (place < 8), "only a foreign file has no id"
        for nothing in (b"", page[:100], bytes(layout.PAGE)):
            assert layout.ledger_id_of(nothing) is None

    def test_zeros(self) -> None:
        with pytest.raises(Damaged, match="magic"):
            layout.examine(memoryview(bytes(SHAPE.size)))

    def test_another_epoch(self, parts: Parts) -> None:
        other = layout.Epoch("instance", 99, "0" * 64)
        with pytest.raises(Damaged, match="the ledger holds updates of iteration"):
            Ledger.recover(Held(parts.content), MODEL, other)

    def test_a_trailer_of_another_generation(self, parts: Parts) -> None:
        """The store of the generation came through alone, which no order of our writes allows."""
        content = bytearray(parts.content)
        word = layout.generation_word(parts.generation + 1)
        content[layout.GENERATION : layout.GENERATION + 8] = word.to_bytes(8, "little")
        with pytest.raises(Damaged, match=f"belongs to generation {parts.generation - 1}"):
            layout.examine(memoryview(content))


def test_an_entry_whose_client_is_no_text_damages_the_file(parts: Parts) -> None:
    """Nobody writes one; whoever forges one, its checksum right, is not followed any further."""
    content = bytearray(parts.content)
    at = parts.shape.entry_at(parts.slots["asked"].slot)
    fl_id = content.index(b"asked", at)
    content[fl_id] = 0xFF
    payload = bytes(content[at + layout.PAYLOAD : at + layout.ENTRY - 8])
    content[at + layout.ENTRY - 8 : at + layout.ENTRY] = layout.checksum(payload).to_bytes(8, "little")
    with pytest.raises(Damaged, match="names no client"):
        layout.examine(memoryview(content))
