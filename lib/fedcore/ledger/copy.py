"""The partial of a ledger on another host, copied to this one: into memory to be added, into a file to be kept.

The copy is a ledger without slots: the accumulator stands where it stood, and the head that makes a ledger of it is
written last. So a copy that was not finished is nothing, and a finished one is judged as any other ledger is.

What is only added to a sum ends with it, so it lies in memory of the process: it takes no room where ledgers are kept,
and a full directory keeps no server from making a model.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from fedcore.ledger import layout
from fedcore.ledger.files import NoSpace, create_file
from fedcore.ledger.layout import Damaged, Epoch, Shape
from fedcore.ledger.ledger import Ledger, Partial, Storage
from fedcore.wire.arrays import Layout


class PartialCopy:
    """A partial on its way into a storage; see ``copy_in_memory`` and ``FileCopy``."""

    def __init__(self, storage: Storage, head: bytes, start: int, length: int) -> None:
        """Fill a storage that is as long as the ledger which ``head`` describes, and empty."""
        self._storage = storage
        self._head = head
        self._start, self._length = start, length

    def fill(self, offset: int, data: bytes | memoryview) -> None:
        """Put bytes of the accumulator in their place."""
        if offset < 0 or offset + len(data) > self._length:
            raise Damaged("a partial is longer than its head says")
        self._storage.buffer[self._start + offset : self._start + offset + len(data)] = data

    def finish(self, model: Layout, epoch: Epoch) -> Partial:
        """Make a ledger of the copy and return its sealed sum, every checksum of it verified.

        Raises:
            Damaged: it is not what was sealed, or of another epoch.
        """
        self._storage.sync()
        self._storage.buffer[: layout.PAGE] = self._head
        self._storage.sync()
        ledger, _ = Ledger.recover(self._storage, model, epoch)
        return ledger.seal()


class FileCopy(PartialCopy):
    """A copy in a ledger file, which outlives the process.

    Attributes:
        file: of the copy.
    """

    def __init__(self, directory: Path, head: bytes, start: int, length: int, durable: bool) -> None:
        """Make room for the partial that ``head`` describes.

        Args:
            directory: of the ledgers.
            head: one page, see ``Partial.head``.
            start: position of the accumulator in the file.
            length: its bytes.
            durable: whether the copy must reach a disk.

        Raises:
            Damaged: head, start and length do not fit each other.
            NoSpace: the directory is full.
        """
        shape = _shape_of(head, start, length)
        name = f"{os.getpid()}-{os.urandom(6).hex()}"
        spans = ((0, layout.PAGE), (start, length))
        self.file = create_file(directory, name, shape.size, durable, spans)
        super().__init__(self.file, head, start, length)


class Memory:
    """A storage that ends with the process, or with the last look at its bytes.

    Attributes:
        buffer: its bytes; a page takes memory once it is written.
    """

    def __init__(self, size: int) -> None:
        """Take so many bytes, all zero.

        Raises:
            OSError: there is no memory for them.
        """
        self.buffer = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def write(self, at: int, data: bytes | memoryview) -> None:
        """Write bytes."""
        self.buffer[at : at + len(data)] = data

    def sync(self) -> None:
        """Return: nothing is ever safe here."""


def copy_in_memory(head: bytes, start: int, length: int) -> PartialCopy:
    """Make room for the partial that ``head`` describes; the memory is free when copy and partial are dropped.

    Args:
        head: one page, see ``Partial.head``.
        start: position of the accumulator in its ledger.
        length: its bytes.

    Raises:
        Damaged: head, start and length do not fit each other.
        NoSpace: there is no memory for it.
    """
    shape = _shape_of(head, start, length)
    try:
        memory = Memory(shape.size)
    except OSError as error:
        raise NoSpace(
            f"the sum of another server needs {length} bytes of memory: {error.strerror}",
            hint="give the daemon more memory; it goes on by itself when there is room",
        ) from error
    return PartialCopy(memory, head, start, length)


def _shape_of(head: bytes, start: int, length: int) -> Shape:
    """Return the measures of the ledger that a head describes.

    Raises:
        Damaged: head, start and length do not fit each other.
    """
    shape = layout.shape_of(head)
    starts = (shape.accumulator_at(0), shape.accumulator_at(1))
    if len(head) != layout.PAGE or start not in starts or length != shape.accumulator_size:
        raise Damaged("a partial is not where its head says")
    return shape
