"""Notices to systemd: what is sent, and that nothing else depends on it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.net.sd_notify import LONGEST_STATUS, Notifier, one_line, watchdog_of


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A notify socket and its address as $NOTIFY_SOCKET has it."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@fedcore-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + address[1:] if address.startswith("@") else address)
        listener.settimeout(10)
        yield listener, address


def test_each_message_is_one_datagram(systemd: tuple[socket.socket, str]) -> None:
    listener, address = systemd
    notifier = Notifier.of({"NOTIFY_SOCKET": address}, 1)
    notifier.ready("all is well")
    assert listener.recv(1000) == b"READY=1\nSTATUS=all is well"
    notifier.stopping()
    assert listener.recv(1000) == b"STOPPING=1"
    notifier.extend(2.5)
    assert listener.recv(1000) == b"EXTEND_TIMEOUT_USEC=2500000"
    notifier.beat()
    assert listener.recv(1000) == b"WATCHDOG=1"
    notifier.failed("a\nb", 98)
    assert listener.recv(1000) == b"STATUS=a; b\nERRNO=98"
    notifier.failed("c")
    assert listener.recv(1000) == b"STATUS=c"


def test_a_status_is_told_when_it_is_another_one(systemd: tuple[socket.socket, str]) -> None:
    listener, address = systemd
    notifier = Notifier(address)
    notifier.ready("one")
    assert [notifier.status(text) for text in ("one", "two", "two", "one")] == [False, True, False, True]
    notifier.stopping()
    heard = [listener.recv(1000) for _ in range(4)]
    assert heard == [b"READY=1\nSTATUS=one", b"STATUS=two", b"STATUS=one", b"STOPPING=1"]


def test_a_status_that_was_lost_is_told_again(tmp_path: Path) -> None:
    notifier = Notifier(str(tmp_path / "notify"))
    notifier.status("one")  # nobody listens yet
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(10)
        notifier.status("one")
        assert listener.recv(1000) == b"STATUS=one"


def test_nobody_waits_for_a_systemd_that_does_not_read(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        notifier = Notifier(str(tmp_path / "notify"))
        begun = time.monotonic()
        for number in range(1000):  # more than the kernel queues
            notifier.status(str(number))
        assert time.monotonic() - begun < 10
        assert listener.recv(1000) == b"STATUS=0"


def test_outside_systemd_nothing_happens() -> None:
    for environ in ({}, {"NOTIFY_SOCKET": ""}):
        notifier = Notifier.of({**environ, "WATCHDOG_USEC": "1000"}, 1)
        notifier.ready("")
        notifier.beat()
        assert notifier.watchdog is None


def test_a_socket_that_is_not_there_is_no_fault(tmp_path: Path) -> None:
    Notifier(str(tmp_path / "nowhere")).ready("")


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "42"}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "43"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
    ],
)
def test_the_watchdog_is_the_one_of_this_process(environ: dict[str, str], seconds: float | None) -> None:
    assert watchdog_of(environ, 42) == seconds


@given(st.text())
def test_a_status_is_one_line_that_systemd_takes(text: str) -> None:
    line = one_line(text)
    assert len(line.encode()) <= LONGEST_STATUS  # and so it is UTF-8
    assert line.isprintable()


def test_a_long_status_is_cut_at_a_character() -> None:
    for text in ("ä" * LONGEST_STATUS, "x" + "ä" * LONGEST_STATUS):
        assert one_line(text).endswith("ä…")
        assert LONGEST_STATUS - 4 <= len(one_line(text).encode()) <= LONGEST_STATUS
    assert one_line("x" * LONGEST_STATUS) == "x" * LONGEST_STATUS


def test_no_text_can_say_more_than_a_status() -> None:
    assert one_line("bad\r\nREADY=1\n\n WATCHDOG=trigger\0") == "bad; READY=1; WATCHDOG=trigger?"
