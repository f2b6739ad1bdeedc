"""The failure event file: one line per event that an operator should know of.

    nodeRole:SERVER,10.0.0.7:6766,currentTime:2022-11-01 10:00:02.120,event:Iteration failed 10 times continuously;

Rules kept here:

* Several servers may share the file: it is only ever appended to, and a line is one write(2).
* It is opened for each line, so it may be renamed or removed (logrotate) while servers run.
* Events are rare, so the write is done on the spot. One that fails is logged; it never stops a training.
* A text cannot break the form: what would is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from twisted.logger import Logger

from fedcore.errors import ConfigError

_FILE_MODE = 0o640
_DIRECTORY_MODE = 0o750


class Journal:
    """Writes to the failure event file.

    Args:
        path: the file (``summary.failure_event_file``); a relative one begins at the working directory of now.
        node_address: ``ip:port`` under which other nodes know this server.
        now: gives the local time.

    Raises:
        ConfigError: the file or its directory cannot be made.
    """

    log = Logger()

    def __init__(self, path: Path, node_address: str, now: Callable[[], datetime]) -> None:
        self._path = path.absolute()
        self._node_address = node_address
        self._now = now
        _create(path)

    def failed_continuously(self, times: int) -> None:
        """Tell that so many iterations in a row made no model."""
        self.write(f"Iteration failed {times} times continuously")

    def updates_lost(
        self, iteration: int, attempt: int, updates: int, ledger_owner: str, reason: str
    ) -> None:
        """Tell that updates which devices were told are accepted are in no model.

        Args:
            iteration: they belonged to.
            attempt: of that iteration.
            updates: how many.
            ledger_owner: node that had accepted them.
            reason: why they are lost.
        """
        self.write(
            f"Iteration {iteration} attempt {attempt} lost {updates} accepted updates "
            f"in the ledger of {ledger_owner}: {reason}"
        )

    def write(self, text: str) -> None:
        """Append an event; backslash, semicolon and what cannot be printed are escaped."""
        line = _line(self._node_address, self._now(), text).encode()
        try:
            written = _append(self._path, line)
        except OSError as error:
            self.log.error(
                "an event cannot be written to {path}: {why}", path=str(self._path), why=str(error)
            )
            return
        if written < len(line):
            self.log.error("an event is cut in {path}: the disk is full", path=str(self._path))


def _line(node_address: str, now: datetime, text: str) -> str:
    time = f"{now:%Y-%m-%d %H:%M:%S}.{now.microsecond // 1000:03}"
    return f"nodeRole:SERVER,{node_address},currentTime:{time},event:{_escaped(text)};\n"


def _escaped(text: str) -> str:
    return "".join(_escape(char) for char in text)


def _escape(char: str) -> str:
    if char == ";":
        return "\\x3b"
    return char if char.isprintable() and char != "\\" else repr(char)[1:-1]


def _create(path: Path) -> None:
    """Make the file and its directory.

    Raises:
        ConfigError: in the words of MindSpore Federated 0.1.
    """
    try:
        path.parent.mkdir(_DIRECTORY_MODE, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Failed to create directory for event file {path}", hint=_remedy(error)) from error
    try:
        _append(path, b"")
    except OSError as error:
        raise ConfigError(f"Failed to open event txt file {path}", hint=_remedy(error)) from error


def _remedy(error: OSError) -> str:
    return f"{error.strerror}: set summary.failure_event_file to a file that this server may write"


def _append(path: Path, line: bytes) -> int:
    """Append to a file, made if need be, and return how much of the line it took."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
    try:
        return os.write(descriptor, line) if line else 0
    finally:
        os.close(descriptor)
