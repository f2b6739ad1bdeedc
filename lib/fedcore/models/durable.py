"""Files that a crash leaves either as they were or complete: never half written, never missing.

The rule is the usual one: write a temporary file beside the target, fsync it, rename it over the target,
fsync the directory. A temporary file is locked (flock) by its writer until it is renamed, so that a sweep can
tell the leftover of a crash from the work of a live process, and a paused process blocks nobody but itself.

Faults are ``OSError`` with the system's errno: a full disk is neither a bug nor a bad configuration, and a
restart may cure it. The text is completed by what to do about it.

Source: POSIX fsync(2), rename(2); Linux flock(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FILE_MODE = 0o640
"""Mode of new files before the umask: weights are read by the daemons' group, never by the world."""
DIRECTORY_MODE = 0o750

_TEMPORARY = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
TEMPORARY_EXTRA_BYTES = 14
"""What the name of a temporary file is longer than its target's."""

_REMEDIES = {
    errno.ENOSPC: "free space there or choose another directory",
    errno.EDQUOT: "free space there or raise the quota",
    errno.EACCES: "let the daemon's user write to the directory",
    errno.EPERM: "let the daemon's user write to the directory",
    errno.EROFS: "mount it writable or choose another directory",
    errno.ENOENT: "the directory is gone: create it or choose another",
    errno.ENOTDIR: "a part of the path is a file: choose another directory",
    errno.EIO: "the disk reports errors: choose another one and check this",
}


def replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file so that at every moment its path names the old content or the complete new one.

    Args:
        path: the target; its directory exists.
        chunks: the content, in order.

    Raises:
        OSError: nothing was changed and no temporary file remains; or, if only the last step (fsync of the
            directory) failed, the new file is in place but may not survive a power loss.
    """
    with _explained(path):
        descriptor, temporary = _create_temporary(path)
        try:
            try:
                for chunk in chunks:
                    _write_all(descriptor, chunk)
                os.fsync(descriptor)
                os.replace(temporary, path)
            finally:
                os.close(descriptor)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_directory(path.parent)


def make_directory(directory: Path) -> None:
    """Create a directory and its missing parents, durably, with ``DIRECTORY_MODE`` less the umask.

    Raises:
        OSError: it cannot be created, or a file is in its place.
    """
    with _explained(directory):
        _make_directory(directory)


def sync_directory(directory: Path) -> None:
    """Make renames and removals in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path, belongs: Callable[[str], bool]) -> None:
    """Remove temporary files whose writers are dead.

    Where the file system knows no locks, nothing is removed.

    Args:
        directory: where to look; subdirectories are not entered.
        belongs: tells by the target's file name whether the leftover is the caller's to remove.

    Raises:
        OSError: the directory cannot be listed.
    """
    with _explained(directory):
        names = os.listdir(directory)
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        if match and belongs(match["target"]):
            with suppress(OSError):
                _remove_if_dead(directory / name)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Complete an ``OSError`` by the path and the remedy; errno and class stay."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "see the system's log")
        raise OSError(error.errno, f"cannot write: {error.strerror}; {remedy}", str(path)) from error


def _make_directory(directory: Path) -> None:
    if directory.is_dir():
        return
    if directory.parent != directory:
        _make_directory(directory.parent)
    try:
        os.mkdir(directory, DIRECTORY_MODE)
    except FileExistsError:  # somebody else was faster, or it is a file
        if not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    sync_directory(directory.parent)


def _create_temporary(path: Path) -> tuple[int, Path]:
    """Open a new, locked temporary file for a target; return its descriptor and path."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        with suppress(OSError):  # no locks on this file system: no sweep removes anything there either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)  # a sweep came between open and lock


def _write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _remove_if_dead(temporary: Path) -> None:
    """Remove a temporary file unless a live process holds its lock."""
    descriptor = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(temporary)
    finally:
        os.close(descriptor)
