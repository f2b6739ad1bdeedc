"""The partial of a ledger on another host, copied into a ledger file on this one.

The copy is a ledger file without slots: the accumulator stands where it stood, and the head that makes a ledger of it
is written last. So a copy that was not finished is nothing, and a finished one is judged as any other ledger is.
"""

from __future__ import annotations

import os
from pathlib import Path

from fedcore.ledger import layout
from fedcore.ledger.files import create_file
from fedcore.ledger.layout import Damaged, Epoch
from fedcore.ledger.ledger import Ledger, Partial
from fedcore.wire.arrays import Layout


class PartialCopy:
    """A partial on its way into a file.

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
        shape = layout.shape_of(head)
        starts = (shape.accumulator_at(0), shape.accumulator_at(1))
        if len(head) != layout.PAGE or start not in starts or length != shape.accumulator_size:
            raise Damaged("a partial is not where its head says")
        name = f"{os.getpid()}-{os.urandom(6).hex()}"
        spans = ((0, layout.PAGE), (start, length))
        self.file = create_file(directory, name, shape.size, durable, spans)
        self._head = head
        self._start, self._length = start, length

    def fill(self, offset: int, data: bytes | memoryview) -> None:
        """Put bytes of the accumulator in their place."""
        if offset < 0 or offset + len(data) > self._length:
            raise Damaged("a partial is longer than its head says")
        self.file.buffer[self._start + offset : self._start + offset + len(data)] = data

    def finish(self, model: Layout, epoch: Epoch) -> Partial:
        """Make a ledger of the copy and return its sealed sum, every checksum of it verified.

        Raises:
            Damaged: it is not what was sealed, or of another epoch.
        """
        self.file.sync()
        self.file.buffer[: layout.PAGE] = self._head
        self.file.sync()
        ledger, _ = Ledger.recover(self.file, model, epoch)
        return ledger.seal()
