"""A slow, lossy cable as a program: ``python -m lab.slow_cable PORT NEW_PORT SETTINGS``.

It takes every frame that comes out of PORT (the bridge's end of a host's cable), waits, and hands it on to
NEW_PORT, which it makes and which takes PORT's place at the bridge; and the same in the other direction. The host
keeps its interface and its connections. SETTINGS is a file with a network.Slowness as JSON, read again at SIGHUP.
NEW_PORT goes when the program ends.

Frames travel with the kernel's notes about them (struct virtio_net_hdr): which checksum is still to be filled in,
for instance, since between two hosts on one machine nobody does so before the last moment.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from lab.network import Slowness

# linux/if_tun.h
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
# linux/if_packet.h, linux/if_ether.h
SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = (
    263,
    1,
    1,
    15,
    23,
)
ETH_P_ALL = 3

LARGEST = 65536 + 64
BATCH = 64  # frames read from one side before the other has its turn
IN_FLIGHT = 20_000  # a real queue is finite, too: what comes on top is lost


class Frame(NamedTuple):
    """A frame on its way; they sort by when they arrive, then by when they came in."""

    arrives: float
    number: int
    data: bytes
    deliver: Callable[[bytes], object]


class Direction:
    """One of the two ways through the cable.

    Args:
        read: gives the next frame that came in, or raises OSError.
        deliver: puts a frame out at the other end.
        numbers: gives each frame, of both directions, another number.
    """

    def __init__(
        self, read: Callable[[], bytes], deliver: Callable[[bytes], object], numbers: Iterator[int]
    ) -> None:
        self._read = read
        self._deliver = deliver
        self._numbers = numbers
        self._last = 0.0

    def frames(self, now: float, slowness: Slowness) -> Iterator[Frame]:
        """Read what has come in, and say when each frame that is not lost arrives."""
        for _ in range(BATCH):
            try:
                data = self._read()
            except OSError:  # nothing more, or the cable is unplugged
                return
            if random.random() * 100 < slowness.loss_percent:
                continue
            wait_ms = slowness.delay_ms + random.random() * slowness.jitter_ms
            self._last = max(now + wait_ms / 1000, self._last)
            yield Frame(self._last, next(self._numbers), data, self._deliver)


def open_port(name: str) -> socket.socket:
    """A socket for all frames that come out of an existing interface."""
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    port.bind((name, ETH_P_ALL))
    promiscuous = struct.pack("iHH8s", socket.if_nametoindex(name), PACKET_MR_PROMISC, 0, b"")
    port.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, promiscuous)
    return port


def make_port(name: str) -> int:
    """A new interface whose frames this process reads and writes."""
    port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(port, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    return port


def run(port: socket.socket, new_port: int, settings: Path) -> None:
    """Carry frames until SIGTERM."""
    slowness = Slowness(**json.loads(settings.read_text()))

    def reread(number: int, frame: FrameType | None) -> None:
        nonlocal slowness
        slowness = Slowness(**json.loads(settings.read_text()))

    signal.signal(signal.SIGHUP, reread)
    numbers = itertools.count()
    directions = {
        port.fileno(): Direction(lambda: port.recv(LARGEST), lambda data: os.write(new_port, data), numbers),
        new_port: Direction(lambda: os.read(new_port, LARGEST), port.send, numbers),
    }
    poll = select.epoll()
    for side in directions:
        poll.register(side, select.EPOLLIN)
    print("ready", os.getpid(), flush=True)
    on_the_way: list[Frame] = []
    while True:
        wait = max(0.0, on_the_way[0].arrives - time.monotonic()) if on_the_way else None
        for side, _ in poll.poll(wait):
            for frame in directions[side].frames(time.monotonic(), slowness):
                if len(on_the_way) < IN_FLIGHT:
                    heapq.heappush(on_the_way, frame)
        now = time.monotonic()
        while on_the_way and on_the_way[0].arrives <= now:
            frame = heapq.heappop(on_the_way)
            try:
                frame.deliver(frame.data)
            except OSError:  # unplugged, or the queue is full: lost, as on a wire
                continue


if __name__ == "__main__":
    old, new, file = sys.argv[1:]
    run(open_port(old), make_port(new), Path(file))
