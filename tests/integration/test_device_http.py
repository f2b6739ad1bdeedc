"""The device listener on real sockets: what pretended ones cannot show. See tests/unit/net for the rest."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import pytest
from integration.echo_listener import LIMIT, MODEL

from fedcore.net.device_http import LINGER_BYTES
from fedcore.pki.authority import Role, issue, make_authority

HOST = "127.0.0.1"
DEADLINE_S = 20.0
PASSWORD = b"secret"
PROGRAM = Path(__file__).with_name("echo_listener.py")
OFFER = b"POST /echo HTTP/1.1\r\nHost: server\r\nContent-Length: %d\r\n\r\n"


class Listener:
    """A running listener."""

    def __init__(self, process: subprocess.Popen[bytes], context: ssl.SSLContext | None) -> None:
        assert process.stdout is not None
        self.port = int(process.stdout.readline())
        self._pid = process.pid
        self._context = context

    def connect(self, *, receive_buffer: int = 0) -> socket.socket:
        """Connect; nothing waits longer than the deadline."""
        connection = socket.socket()
        connection.settimeout(DEADLINE_S)
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect((HOST, self.port))
        if self._context is None:
            return connection
        return self._context.wrap_socket(connection, server_hostname=HOST)

    def http(self) -> http.client.HTTPConnection:
        """Return a well-behaved client."""
        if self._context is None:
            return http.client.HTTPConnection(HOST, self.port, timeout=DEADLINE_S)
        return http.client.HTTPSConnection(HOST, self.port, timeout=DEADLINE_S, context=self._context)

    def memory(self) -> int:
        """Return the bytes of memory that the process has in use."""
        pages = int(Path(f"/proc/{self._pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def listening(context: ssl.SSLContext | None, *arguments: str) -> Iterator[Listener]:
    command = [sys.executable, os.fspath(PROGRAM), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield Listener(process, context)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(DEADLINE_S)
            process.kill()
    assert process.returncode == 0


def certificate(directory: Path) -> tuple[Path, str]:
    """Write a PKCS#12 file for 127.0.0.1; return it and the PEM of its authority."""
    now = datetime.now(UTC)
    authority = make_authority("test", now)
    path = directory / "server.p12"
    path.write_bytes(issue(authority, Role.SERVER, "test", now, hosts=[HOST]).p12(PASSWORD))
    return path, authority.certificate_pem().decode()


@pytest.fixture(scope="module", params=["tcp", "tls"])
def listener(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listener]:
    if request.param == "tcp":
        with listening(None) as running:
            yield running
        return
    p12, pem = certificate(tmp_path_factory.mktemp("tls"))
    context = ssl.create_default_context(cadata=pem)
    with listening(context, os.fspath(p12), PASSWORD.decode()) as running:
        yield running


def read_reply(answers: BinaryIO) -> tuple[int, bytes]:
    """Read one answer."""
    status = int(answers.readline().split()[1])
    fields = dict(line.rstrip().split(b": ", 1) for line in iter(answers.readline, b"\r\n"))
    length = int(fields[b"Content-Length"])
    body = answers.read(length)
    assert len(body) == length, "the server closed before the answer was whole"
    return status, body


def test_large_bodies_arrive_whole(listener: Listener) -> None:
    body = os.urandom(LIMIT)
    client = listener.http()
    for length in (LIMIT, 1, 65_536, 65_537, LIMIT - 1):
        client.request("POST", "/digest", body[:length])
        assert client.getresponse().read() == hashlib.sha256(body[:length]).digest()
    client.close()


def test_large_body_in_chunks(listener: Listener) -> None:
    body = os.urandom(3_000_000)
    client = listener.http()
    pieces = (body[at : at + 70_001] for at in range(0, len(body), 70_001))
    client.request("POST", "/digest", pieces, encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    assert client.getresponse().read() == hashlib.sha256(body).digest()
    client.close()


def test_large_answers_arrive_whole(listener: Listener) -> None:
    client = listener.http()
    for _ in range(2):
        client.request("POST", "/model", b"x")
        assert client.getresponse().read() == b"head" + bytes(range(256)) * (MODEL // 256)
    client.close()


def test_thousands_of_pipelined_requests(listener: Listener) -> None:
    with listener.connect() as connection, connection.makefile("rb") as answers:
        connection.sendall(b"".join(OFFER % 4 + b"%04d" % number for number in range(2000)))
        for number in range(2000):
            assert read_reply(answers) == (200, b"%04d" % number)


@pytest.mark.parametrize("announced", [LIMIT + 1, 1 << 32])
def test_refusal_is_readable_though_the_peer_goes_on_sending(listener: Listener, announced: int) -> None:
    """The peer sends far more than sockets buffer before it looks at the answer."""
    with listener.connect() as connection, connection.makefile("rb") as answers:
        connection.sendall(OFFER % announced)
        for _ in range(min(announced, LINGER_BYTES // 2) >> 20):
            connection.sendall(bytes(1 << 20))
        status, body = read_reply(answers)
        assert answers.read() == b""  # the server has said that it sends no more
    assert status == 413
    assert f"the limit is {LIMIT} bytes".encode() in body


def test_refusal_reaches_an_ordinary_client(listener: Listener) -> None:
    client = listener.http()
    client.request("POST", "/echo", bytes(LIMIT + 1))
    response = client.getresponse()
    assert (response.status, response.will_close) == (413, True)
    assert str(LIMIT).encode() in response.read()
    client.close()


def test_refused_peer_cannot_send_forever(listener: Listener) -> None:
    with listener.connect() as connection, pytest.raises(OSError, match=r"(?i)reset|broken|eof|abort"):
        connection.sendall(OFFER % (1 << 40))
        for _ in range(4 * LINGER_BYTES >> 20):
            connection.sendall(bytes(1 << 20))


def test_peers_that_do_not_read_cost_little_memory(listener: Listener) -> None:
    """Forty times a model of 32 MB is on its way, and forty peers have read one byte of it."""
    request = OFFER.replace(b"/echo", b"/model") % 1 + b"x"
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(listener.connect())
        answers = stack.enter_context(reader.makefile("rb"))
        reader.sendall(request)
        read_reply(answers)
        before = listener.memory()
        for _ in range(40):
            peer = stack.enter_context(listener.connect(receive_buffer=4096))
            peer.sendall(request)
            assert peer.recv(1) == b"H"  # its answer is on the way
        assert listener.memory() - before < 40 << 20
        reader.sendall(OFFER % 2 + b"ok")
        assert read_reply(answers) == (200, b"ok")


def test_peers_that_vanish_leave_nothing(listener: Listener) -> None:
    for _ in range(30):
        with listener.connect() as connection:
            connection.sendall(OFFER % LIMIT + bytes(100_000))
    with listener.connect() as connection, connection.makefile("rb") as answers:
        connection.sendall(OFFER % 2 + b"ok")
        assert read_reply(answers) == (200, b"ok")
