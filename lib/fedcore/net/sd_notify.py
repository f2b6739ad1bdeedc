"""Tell systemd how the daemon is: one datagram per message (sd_notify(3))."""

from __future__ import annotations

import socket


def notify(address: str | None, *assignments: str) -> None:
    """Send assignments such as ``READY=1`` to a notification socket.

    Args:
        address: value of $NOTIFY_SOCKET: a path, or an abstract name after ``@``; None outside systemd.
        assignments: the lines of the message.
    """
    if not address:
        return
    target = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto("\n".join(assignments).encode(), target)
