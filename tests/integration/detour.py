"""Starts fl-serverd so that its way to each other server leads over a link of the test's own.

    python detour.py N [options of fl-serverd]

Servers listen, and register, at 127.0.0.H. What server N connects to there leads to 127.(N + 1).0.H instead, the same
port, where nobody listens but a ``links.Link``. So each way from one server to another can be cut alone, and
everything else, the daemon included, is as it ever is.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

LOCAL = "127.0.0.1"  # Redis, devices, operators


def detour(n: int, host: str) -> str:
    """Return where the way of server ``n`` to a host of the tests begins; other hosts are what they are."""
    network, _, number = host.rpartition(".")
    return f"127.{n + 1}.0.{number}" if network == "127.0.0" and host != LOCAL else host


def take_detours(n: int) -> None:
    """Lead all connections that this process makes from now on over the links of server ``n``."""
    connect = socket.socket.connect_ex

    def connect_ex(self: socket.socket, address: Any) -> int:
        if self.family == socket.AF_INET:
            host, port = address
            address = detour(n, host), port
        return connect(self, address)

    socket.socket.connect_ex = connect_ex  # type: ignore[method-assign]  # what Twisted's connections begin with


if __name__ == "__main__":
    from fldaemons.serverd import main

    take_detours(int(sys.argv.pop(1)))
    main()
