"""Tell systemd how the daemon is: one datagram per message (sd_notify(3)).

Rules kept here:

* Outside systemd nothing is sent, and nothing else is different.
* Nobody waits for systemd: a message that its socket has no room for is lost. Only the few that decide over the
  daemon's life (READY, RELOADING, STOPPING, a fault) are given PATIENCE_S.
* A message that cannot be sent does not end the daemon: whether it may live without is for systemd to decide.
* A status is one line, whatever the text was made of, and short enough for systemd to take.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping

from twisted.logger import Logger

PATIENCE_S = 2.0
LONGEST_STATUS = 1024  # bytes; systemd drops messages of more than 4096
_FULL = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOBUFS)


class Notifier:
    """The way to whoever supervises this process.

    Attributes:
        watchdog: seconds after which a daemon that says nothing is killed; None: nobody waits for it.
    """

    log = Logger()

    def __init__(self, address: str | None, watchdog: float | None = None) -> None:
        """Send to a socket.

        Args:
            address: value of $NOTIFY_SOCKET: a path, or an abstract name after ``@``; None or "" outside systemd.
            watchdog: see the class.
        """
        self.watchdog = watchdog if address else None
        self._target = _target(address) if address else None
        self._status = ""
        self._complained = False

    @classmethod
    def of(cls, environ: Mapping[str, str], pid: int) -> Notifier:
        """Make the one that the environment of process ``pid`` asks for."""
        return cls(environ.get("NOTIFY_SOCKET"), watchdog_of(environ, pid))

    def ready(self, status: str) -> None:
        """Say that the daemon listens, or that it has read its configuration again."""
        self._status = one_line(status)
        self._send("READY=1", f"STATUS={self._status}", patience=PATIENCE_S)

    def reloading(self) -> None:
        """Say that the configuration is being read again; ``ready`` is to follow."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", patience=PATIENCE_S)

    def stopping(self) -> None:
        """Say that the daemon is about to end."""
        self._send("STOPPING=1", patience=PATIENCE_S)

    def failed(self, text: str, number: int | None = None) -> None:
        """Say why the daemon ends, with the system's error number where it is one."""
        numbers = [] if number is None else [f"ERRNO={number}"]
        self._send(f"STATUS={one_line(text)}", *numbers, patience=PATIENCE_S)

    def status(self, text: str) -> bool:
        """Say what the daemon is about, unless that was the last that was said; tell whether it was said now."""
        text = one_line(text)
        if text == self._status or not self._send(f"STATUS={text}"):
            return False
        self._status = text
        return True

    def extend(self, seconds: float) -> None:
        """Ask for so many seconds from now on, whatever the limit of a start or a stop is."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def beat(self) -> None:
        """Say that the daemon lives."""
        self._send("WATCHDOG=1")

    def _send(self, *assignments: str, patience: float = 0.0) -> bool:
        """Send a message; False if it is lost."""
        if self._target is None:
            return True
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(patience)
                sender.sendto("\n".join(assignments).encode(), self._target)
        except OSError as error:
            if not self._complained and error.errno not in _FULL:
                self._complained = True
                self.log.warn(
                    "systemd cannot be told anything at {address}: {error}",
                    address=os.fsdecode(self._target),
                    error=str(error),
                )
            return False
        return True


def watchdog_of(environ: Mapping[str, str], pid: int) -> float | None:
    """Return the seconds of $WATCHDOG_USEC if they concern process ``pid`` (sd_watchdog_enabled(3)), else None."""
    text = environ.get("WATCHDOG_USEC", "")
    concerned = environ.get("WATCHDOG_PID", str(pid)) == str(pid)
    return int(text) / 1e6 if concerned and text.isascii() and text.isdigit() and int(text) > 0 else None


def one_line(text: str) -> str:
    """Make a status of any text: its lines after each other, nothing that cannot be printed, at most LONGEST_STATUS."""
    lines = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    plain = "".join(char if char.isprintable() else "?" for char in lines)
    content = plain.encode(errors="replace")
    if len(content) <= LONGEST_STATUS:
        return content.decode()
    return content[: LONGEST_STATUS - 3].decode(errors="ignore") + "…"


def _target(address: str) -> bytes:
    name = os.fsencode(address)
    return b"\0" + name[1:] if name.startswith(b"@") else name
