"""The partial of another host: the copy is the same sum, or nothing."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
import subprocess
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from unit.ledger.histories import MODEL, SHAPE, Device, assert_holds, body_of, read

from fedcore.ledger import layout
from fedcore.ledger.copy import FileCopy, PartialCopy, copy_in_memory
from fedcore.ledger.files import Held, NoSpace, create_file, ledger_files, open_file
from fedcore.ledger.layout import Damaged, Epoch
from fedcore.ledger.ledger import Ledger, Partial

EPOCH = Epoch("instance", 3, "3" * 64)
DEVICES = {f"client-{i}": Device(f"client-{i}", i, data_size=i + 1) for i in range(5)}
HEADER_SIZE, TRAILER_SIZE = 128, 120  # with their checksums


def partial_of(directory: Path, devices: dict[str, Device], generations: int = 1) -> Partial:
    """Seal a ledger file with these updates, merged in so many batches."""
    ledger = Ledger.create(create_file(directory, "theirs", SHAPE.size), MODEL, SHAPE)
    ledger.begin(EPOCH)
    for number, (fl_id, device) in enumerate(devices.items()):
        slot, body = ledger.receive(), body_of(device)
        assert slot is not None
        slot.buffer[: len(body)] = body
        slot.length = len(body)
        ledger.record(slot, fl_id, 0.5, 0.25)
        ledger.accept(slot, read(slot.body, device.data_size, device.eval_data_size))
        if number < generations or not ledger.free_slots:
            for merged in ledger.merge():
                ledger.reuse(merged)
    while ledger.unmerged:
        for merged in ledger.merge():
            ledger.reuse(merged)
    return ledger.seal()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Partial:
    return partial_of(tmp_path_factory.mktemp("theirs"), dict(list(DEVICES.items())[:3]), 2)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "here"


def begun(directory: Path, partial: Partial, durable: bool = False) -> FileCopy:
    return FileCopy(directory, partial.head, partial.start, len(partial.content), durable)


def fill(copy: PartialCopy, content: bytes | memoryview, step: int = 1000) -> None:
    """Bring the content in pieces, in any order."""
    places = list(range(0, len(content), step))
    random.Random(5).shuffle(places)
    for offset in places:
        copy.fill(offset, content[offset : offset + step])


def alike(copied: Partial, original: Partial) -> bool:
    return (
        copied.sums.tobytes() == original.sums.tobytes()
        and copied.sizes.tolist() == original.sizes.tolist()
        and (copied.ledger_id, copied.iteration, copied.totals, copied.clients)
        == (original.ledger_id, original.iteration, original.totals, original.clients)
    )


@contextmanager
def full_disk(directory: Path, size: str) -> Iterator[None]:
    """A file system of its own that holds little."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "fedcore-test", str(directory)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


class TestCopies:
    @pytest.mark.parametrize("generations", [0, 1, 2])
    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("durable", [True, False])
    def test_are_the_same_sum(
        self, tmp_path: Path, here: Path, count: int, generations: int, durable: bool
    ) -> None:
        devices = dict(list(DEVICES.items())[:count])
        original = partial_of(tmp_path / "there", devices, generations)
        copy = begun(here, original, durable)
        fill(copy, original.content)
        copied = copy.finish(MODEL, EPOCH)
        assert alike(copied, original)
        assert_holds(copied, devices)

    def test_of_nothing_are_nothing(self, tmp_path: Path, here: Path) -> None:
        original = partial_of(tmp_path / "there", {})
        copy = begun(here, original)
        fill(copy, original.content)
        copied = copy.finish(MODEL, EPOCH)
        assert alike(copied, original)
        assert copied.totals.count == 0

    def test_can_be_copied_again(self, tmp_path: Path, here: Path, theirs: Partial) -> None:
        """Who took it over may be about to stop, too."""
        first = begun(here, theirs)
        fill(first, theirs.content)
        between = first.finish(MODEL, EPOCH)
        assert (between.head, between.start, bytes(between.content)) == (
            theirs.head,
            theirs.start,
            bytes(theirs.content),
        )
        second = begun(tmp_path / "elsewhere", between)
        fill(second, between.content)
        assert alike(second.finish(MODEL, EPOCH), theirs)

    def test_are_ledgers_that_a_sibling_can_adopt(self, here: Path, theirs: Partial) -> None:
        copy = begun(here, theirs)
        fill(copy, theirs.content)
        copy.finish(MODEL, EPOCH)
        copy.file.close()  # with its process
        (path,) = ledger_files(here)
        heir, entries = Ledger.recover(open_file(path), MODEL, EPOCH)
        assert entries == ()
        assert heir.receive() is None, "there is no room in it for more"
        assert alike(heir.seal(), theirs)

    def test_live_on_without_their_original(self, tmp_path: Path, here: Path) -> None:
        original = partial_of(tmp_path / "there", DEVICES)
        copy = begun(here, original)
        fill(copy, original.content)
        (tmp_path / "there" / "theirs.ledger").unlink()
        copied = copy.finish(MODEL, EPOCH)
        copy.file.remove()
        assert_holds(copied, DEVICES)

    def test_take_no_room_for_slots(self, here: Path, theirs: Partial) -> None:
        copy = begun(here, theirs)
        room = copy.file.path.stat().st_blocks * 512
        assert room == layout.PAGE + SHAPE.accumulator_size
        fill(copy, theirs.content)
        copy.finish(MODEL, EPOCH)
        assert copy.file.path.stat().st_blocks * 512 == room


class TestUnfinished:
    @pytest.mark.parametrize("pieces", [0, 1, 99])
    def test_a_copy_is_nothing_before_its_head_is_written(
        self, here: Path, theirs: Partial, pieces: int
    ) -> None:
        copy = begun(here, theirs)
        for offset in list(range(0, len(theirs.content), 1000))[:pieces]:
            copy.fill(offset, theirs.content[offset : offset + 1000])
        copy.file.close()
        left = open_file(copy.file.path)
        assert not any(left.buffer[: layout.PAGE])
        with pytest.raises(Damaged, match="magic"):
            Ledger.recover(left, MODEL, EPOCH)

    def test_on_a_disk_the_head_comes_after_the_content(
        self, here: Path, theirs: Partial, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = begun(here, theirs, durable=True)
        fill(copy, theirs.content)
        synced: list[bool] = []
        monkeypatch.setattr(copy.file, "sync", lambda: synced.append(any(copy.file.buffer[: layout.PAGE])))
        copy.finish(MODEL, EPOCH)
        assert synced[:2] == [False, True]

    def test_a_piece_that_never_came_is_missed(self, here: Path, theirs: Partial) -> None:
        used = TRAILER_SIZE
        copy = begun(here, theirs)
        copy.fill(used, theirs.content[used:])
        with pytest.raises(Damaged):
            copy.finish(MODEL, EPOCH)
        start = SHAPE.sums_at
        copy = begun(here, theirs)
        copy.fill(0, theirs.content[:start])
        with pytest.raises(Damaged, match="sums"):
            copy.finish(MODEL, EPOCH)

    def test_nobody_takes_it_for_left_behind(self, here: Path, theirs: Partial) -> None:
        copy = begun(here, theirs)
        with pytest.raises(Held):
            open_file(copy.file.path)

    def test_another_epoch_is_not_taken(self, here: Path, theirs: Partial) -> None:
        for other in (Epoch("another", 3, "3" * 64), Epoch("instance", 4, "3" * 64)):
            copy = begun(here, theirs)
            fill(copy, theirs.content)
            with pytest.raises(Damaged, match="of iteration 3"):
                copy.finish(MODEL, other)


class TestDamage:
    def outcome(self, here: Path, head: bytes, start: int, content: bytes) -> Partial:
        """Copy what a peer sent, whatever that is."""
        copy = FileCopy(here, head, start, len(content), False)
        try:
            copy.fill(0, content)
            return copy.finish(MODEL, EPOCH)
        finally:
            copy.file.remove()

    def test_a_changed_bit_in_the_head(self, here: Path, theirs: Partial) -> None:
        content, changed = bytes(theirs.content), bytearray(theirs.head)
        for place in (*range(HEADER_SIZE), *range(layout.GENERATION, layout.GENERATION + 8)):
            for bit in range(8):
                changed[place] ^= 1 << bit
                with pytest.raises(Damaged):
                    self.outcome(here, bytes(changed), theirs.start, content)
                changed[place] ^= 1 << bit
        assert alike(self.outcome(here, bytes(changed), theirs.start, content), theirs)

    def test_a_changed_bit_in_trailer_sizes_clients_or_sums(self, here: Path, theirs: Partial) -> None:
        changed = bytearray(theirs.content)
        said = [
            *range(TRAILER_SIZE),
            *range(SHAPE.sizes_at, SHAPE.sizes_at + 8 * SHAPE.weights),
            *range(SHAPE.clients_at, SHAPE.clients_at + layout.CLIENT_SIZE * theirs.totals.count),
            *range(SHAPE.sums_at, SHAPE.sums_at + 8 * SHAPE.floats),
        ]
        for place in said:
            bit = 1 << place % 8
            changed[place] ^= bit
            with pytest.raises(Damaged):
                self.outcome(here, theirs.head, theirs.start, bytes(changed))
            changed[place] ^= bit
        assert alike(self.outcome(here, theirs.head, theirs.start, bytes(changed)), theirs)

    def test_a_changed_bit_where_nothing_is_said_changes_nothing(self, here: Path, theirs: Partial) -> None:
        head, content = bytearray(theirs.head), bytearray(theirs.content)
        head[-1] ^= 1
        content[SHAPE.clients_at + layout.CLIENT_SIZE * theirs.totals.count] ^= 1
        content[-1] ^= 1
        assert alike(self.outcome(here, bytes(head), theirs.start, bytes(content)), theirs)

    def test_a_cut(self, here: Path, theirs: Partial) -> None:
        content = bytes(theirs.content)
        for size in (0, 1, SHAPE.sums_at, len(content) - 1):
            with pytest.raises(Damaged, match="not where its head says"):
                self.outcome(here, theirs.head, theirs.start, content[:size])
        for size in (0, 100, layout.PAGE - 1):
            with pytest.raises(Damaged, match="less than a header"):
                self.outcome(here, theirs.head[:size], theirs.start, content)
        assert not list(here.glob("*")), "nothing was made for what cannot be"

    def test_what_is_longer_than_it_should_be(self, here: Path, theirs: Partial) -> None:
        content = bytes(theirs.content)
        for head, body in ((theirs.head, content + b"\0"), (theirs.head + b"\0", content)):
            with pytest.raises(Damaged, match="not where its head says"):
                self.outcome(here, head, theirs.start, body)

    @pytest.mark.parametrize("start", [0, 1, layout.PAGE + 1, 1 << 80])
    def test_a_place_where_no_accumulator_is(self, here: Path, theirs: Partial, start: int) -> None:
        with pytest.raises(Damaged, match="not where its head says"):
            self.outcome(here, theirs.head, start, bytes(theirs.content))

    def test_the_place_of_the_other_accumulator(self, here: Path, theirs: Partial) -> None:
        (other,) = {SHAPE.accumulator_at(0), SHAPE.accumulator_at(1)} - {theirs.start}
        with pytest.raises(Damaged):
            self.outcome(here, theirs.head, other, bytes(theirs.content))

    @pytest.mark.parametrize(("offset", "length"), [(-1, 1), (-8, 8), (0, 8193), (8192, 1), (1 << 80, 0)])
    def test_bytes_for_another_place_are_not_written(
        self, here: Path, theirs: Partial, offset: int, length: int
    ) -> None:
        assert SHAPE.accumulator_size == 8192
        copy = begun(here, theirs)
        with pytest.raises(Damaged, match="longer than its head says"):
            copy.fill(offset, b"x" * length)
        assert not any(copy.file.buffer)


def test_where_there_is_no_room_nothing_is_left(here: Path, theirs: Partial) -> None:
    with full_disk(here, "8k"):
        with pytest.raises(NoSpace, match=f"needs {layout.PAGE + SHAPE.accumulator_size} bytes at {here}"):
            begun(here, theirs)
        assert list(here.iterdir()) == []


class TestInMemory:
    """As copies in files; what is damaged is judged by the same code."""

    def begun(self, partial: Partial) -> PartialCopy:
        return copy_in_memory(partial.head, partial.start, len(partial.content))

    @pytest.mark.parametrize("generations", [0, 1, 2])
    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_are_the_same_sum(self, tmp_path: Path, count: int, generations: int) -> None:
        devices = dict(list(DEVICES.items())[:count])
        original = partial_of(tmp_path, devices, generations)
        copy = self.begun(original)
        fill(copy, original.content)
        copied = copy.finish(MODEL, EPOCH)
        assert alike(copied, original)
        assert_holds(copied, devices)

    def test_give_their_memory_back_with_the_last_look(self, theirs: Partial) -> None:
        copy = self.begun(theirs)
        fill(copy, theirs.content)
        copied = copy.finish(MODEL, EPOCH)
        memory = weakref.ref(copied.content.obj)
        del copy
        gc.collect()
        assert alike(copied, theirs)
        assert isinstance(memory(), mmap.mmap)
        del copied
        gc.collect()
        assert memory() is None

    def test_are_nothing_before_every_piece_is_there(self, theirs: Partial) -> None:
        copy = self.begun(theirs)
        copy.fill(0, theirs.content[: SHAPE.sums_at])
        with pytest.raises(Damaged, match="sums"):
            copy.finish(MODEL, EPOCH)

    @pytest.mark.parametrize("change", [lambda p: (p.head + b"\0", p.start), lambda p: (p.head, p.start + 1)])
    def test_are_not_begun_where_the_head_says_something_else(
        self, theirs: Partial, change: Callable[[Partial], tuple[bytes, int]]
    ) -> None:
        with pytest.raises(Damaged, match="not where its head says"):
            copy_in_memory(*change(theirs), len(theirs.content))

    def test_that_no_memory_can_hold_are_told(self, theirs: Partial) -> None:
        huge = replace(SHAPE, floats=1 << 50, slots=0)
        head = layout.partial_head(huge, theirs.ledger_id, 1)
        with pytest.raises(
            NoSpace, match=f"needs {huge.accumulator_size} bytes of memory: .*more memory"
        ) as told:
            copy_in_memory(head, huge.accumulator_at(1), huge.accumulator_size)
        assert isinstance(told.value.__cause__, OSError)
        assert told.value.__cause__.errno == errno.ENOMEM
