"""Ledger files: made whole, mapped, locked by their owner.

A file is allocated completely before it is used, so that a full directory is an error with a remedy at the start and
never a SIGBUS in the middle. Its owner holds an exclusive lock (flock) on it; the kernel drops the lock with the
process, however it ends, and keeps it while the process is only paused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedcore.errors import FedcoreError
from fedcore.ledger.layout import PAGE, Damaged

SUFFIX = ".ledger"
_WORD = 8


class NoSpace(FedcoreError):
    """There is no room for a ledger, a copy or a body; the text says how much is needed and where."""

    retry_after = 5.0


class Held(FedcoreError):
    """Another living process owns this ledger."""


class MappedFile:
    """A storage in a memory-mapped file.

    Attributes:
        path: of the file.
        buffer: its bytes.
        durable: whether ``sync`` waits for the disk. If not, the content survives the process but not the host.
    """

    def __init__(self, path: Path, descriptor: int, size: int, durable: bool) -> None:
        """Use ``create_file`` or ``open_file``."""
        self.path = path
        self.durable = durable
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, size)
        self.buffer = memoryview(self._map)
        self._words: Any = self.buffer.cast("Q") if size % _WORD == 0 else None

    def write(self, at: int, data: bytes | memoryview) -> None:
        """Write bytes; eight bytes at a multiple of eight are one aligned store."""
        if len(data) == _WORD and at % _WORD == 0:
            self._words[at // _WORD] = struct.unpack("=Q", data)[0]
        else:
            self.buffer[at : at + len(data)] = data

    def sync(self) -> None:
        """Return when everything written is on the disk; at once on tmpfs."""
        if self.durable:
            self._map.flush()

    @property
    def linked(self) -> bool:
        """Whether the file still stands under its name."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        return False

    def remove(self) -> None:
        """Delete the file and drop the lock; the bytes stay readable until nobody looks at them."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Drop the lock, at once: the mapping has a copy of the descriptor and would keep it."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


def create_file(
    directory: Path,
    name: str,
    size: int,
    durable: bool = False,
    spans: Sequence[tuple[int, int]] = (),
) -> MappedFile:
    """Allocate, map and lock a new file.

    Args:
        directory: made if missing.
        name: of the file, without SUFFIX.
        size: in bytes.
        durable: whether ``sync`` waits for the disk.
        spans: positions and lengths that will be written, the rest stays a hole; none for all of it.

    Raises:
        NoSpace: the directory has less room left than that.
        OSError: it cannot be written, or a sibling looked at it before it was locked; may be tried again.
    """
    directory.mkdir(mode=0o750, parents=True, exist_ok=True)
    path = directory / (name + SUFFIX)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, size)
        for at, length in spans or ((0, size),):
            os.posix_fallocate(descriptor, at, length)
        file = MappedFile(path, descriptor, size, durable)
        if durable:
            _sync_directory(directory)
        return file
    except (OSError, OverflowError) as error:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = sum(length for _, length in spans) or size
            raise NoSpace(
                f"the update ledger needs {needed} bytes at {directory}",
                hint="free or add space there; it goes on by itself when there is room",
            ) from error
        raise


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_file(path: Path, durable: bool = False) -> MappedFile:
    """Map and lock an existing file.

    Raises:
        Held: its owner lives.
        Damaged: it vanished, cannot be opened, or is no regular file with bytes in it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise Damaged(f"{path} is gone") from error
    except OSError as error:
        raise Damaged(f"{path} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            raise Damaged(f"{path} is empty, or no regular file")
        file = MappedFile(path, descriptor, status.st_size, durable)
        if not file.linked:
            raise Damaged(f"{path} was removed while it was opened")
        return file
    except BlockingIOError as error:
        os.close(descriptor)
        raise Held(f"{path} belongs to a living process") from error
    except BaseException:
        os.close(descriptor)
        raise


def first_page(path: Path) -> bytes:
    """Return the first bytes of a file, b"" if it cannot be read; takes no lock."""
    try:
        with path.open("rb") as file:
            return file.read(PAGE)
    except OSError:
        return b""


def ledger_files(directory: Path) -> list[Path]:
    """Return the ledger files of a directory, sorted."""
    return sorted(directory.glob("*" + SUFFIX)) if directory.is_dir() else []
