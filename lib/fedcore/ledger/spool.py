"""Room for bodies beyond the slots: an unlinked file that slow senders fill at their own pace."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedcore.ledger.files import NoSpace


@dataclass(eq=False, slots=True)
class Spool:
    """One body in a file that nobody else can see, gone with the process.

    Attributes:
        buffer: writable bytes, as long as the body.
        length: bytes of the body that are in it.
    """

    buffer: memoryview
    length: int = 0


def open_spool(directory: Path, length: int) -> Spool:
    """Make room for a body.

    Raises:
        NoSpace: the directory has less than ``length`` bytes left.
    """
    directory.mkdir(mode=0o750, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            os.posix_fallocate(
                file.fileno(), 0, length
            )  # a full disk must be an error here, not a SIGBUS later
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"an upload needs {length} bytes at {directory}") from error
            raise
        return Spool(memoryview(mmap.mmap(file.fileno(), length)))
