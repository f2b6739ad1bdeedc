"""Floods and slow peers on real sockets: who opens many connections, or is slow on them, keeps nobody out.

Peers of different loopback addresses are different parties.
"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest
from integration.cluster import Cluster, wait_until

from fedcore.wire import codec
from fedcore.wire.messages import RequestFLJob

ATTACKER = "127.0.0.66"
HALF_HEAD = b"POST /startFLJob HTTP/1.1\r\nHost: x\r\n"
HALF_BODY = b"POST /updateModel HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n\r\n" + bytes(100)
REFUSALS = 'fl_device_refusals_total{{reason="{}"}}'


def started(tmp_path: Path, **device: Any) -> Cluster:
    cluster = Cluster(tmp_path, fedcore={"device": device}, start_fl_job_threshold=100)
    cluster.start_redis()
    cluster.start_server()
    return cluster


def connect(cluster: Cluster, content: bytes = b"", source: str = ATTACKER) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", cluster.http), 10, (source, 0))
    with contextlib.suppress(ConnectionResetError):  # turned away before it could say anything
        connection.sendall(content)
    return connection


def start_request(fl_id: str) -> bytes:
    body = codec.encode(RequestFLJob(fl_name="job", fl_id=fl_id, data_size=1, timestamp="1"))
    return b"POST /startFLJob HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def closed(connection: socket.socket) -> bool:
    """Tell whether the server has cut a connection off without a word."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def served(cluster: Cluster, fl_id: str, source: str) -> bool:
    """Tell whether a device gets a place, over a connection of its own."""
    with contextlib.suppress(OSError), connect(cluster, start_request(fl_id), source) as connection:
        return b" 200 OK" in connection.recv(4096)
    return False


@pytest.mark.parametrize("content", [b"", HALF_HEAD, HALF_BODY], ids=["silent", "half a head", "half a body"])
def test_who_takes_all_connections_keeps_nobody_out(tmp_path: Path, content: bytes) -> None:
    with contextlib.ExitStack() as stack, started(tmp_path, max_connections=40) as cluster:
        for _ in range(60):
            stack.enter_context(connect(cluster, content))
        wait_until(lambda: cluster.metric(REFUSALS.format("connections")) == 20, "the listener is full")
        wait_until(lambda: served(cluster, "honest", "127.0.0.1"), "an honest device is served")
        for i in range(10):  # and others, one after the other, whatever the attacker goes on to do
            with contextlib.suppress(OSError):
                stack.enter_context(connect(cluster, content))
            wait_until(lambda i=i: served(cluster, f"honest-{i}", f"127.0.0.{10 + i}"), "others are served")
        assert cluster.metric(REFUSALS.format("made_room")) >= 1
        assert cluster.metric("fl_device_connections") <= 40


def test_one_address_has_its_share_of_connections(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack, started(tmp_path, connections_per_address=5) as cluster:
        attackers = [stack.enter_context(connect(cluster)) for _ in range(5)]
        for _ in range(3):
            with connect(cluster) as sixth:
                assert closed(sixth)
        assert served(cluster, "honest", "127.0.0.1")
        assert cluster.metric(REFUSALS.format("address_connections")) == 3
        attackers[0].close()  # then there is room for another one
        wait_until(lambda: served(cluster, "attacker", ATTACKER), "the place of who has left is free")


def test_one_address_has_its_share_of_requests(tmp_path: Path) -> None:
    """Beyond it comes the one text that makes an unmodified device wait instead of giving up."""
    with started(tmp_path, request_rate=0.01, request_burst=3) as cluster:
        for i in range(3):
            assert served(cluster, f"a{i}", ATTACKER)
        with connect(cluster, start_request("a3")) as connection:
            answer = b""
            while part := connection.recv(4096):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\nThe cluster is in safemode.")
        assert served(cluster, "honest", "127.0.0.1")
        assert cluster.metric(REFUSALS.format("rate")) == 1


def test_behind_a_proxy_the_address_in_its_header_counts(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(
            started(
                tmp_path,
                connections_per_address=2,
                proxies="127.0.0.9/32",
                request_rate=0.01,
                request_burst=1,
            )
        )

        def proxied(host: str, content: bytes = b"") -> socket.socket:
            header = f"PROXY TCP4 {host} 192.0.2.1 4000 6666\r\n".encode()
            return stack.enter_context(connect(cluster, header + content, "127.0.0.9"))

        one, two = (proxied("198.51.100.1", start_request(f"d{i}")) for i in range(2))
        texts = one.recv(4096), two.recv(4096)
        assert sum(b"safemode" in text for text in texts) == 1  # one request each
        three = proxied("198.51.100.1")
        assert closed(three) or closed(one) or closed(two)
        others = [proxied(f"198.51.100.{i}", start_request(f"e{i}")) for i in range(2, 8)]
        for other in others:
            assert b"safemode" not in other.recv(4096)


def test_slow_heads_and_bodies_are_ended_and_counted(tmp_path: Path) -> None:
    with started(tmp_path, header_timeout=1.0, body_timeout=1.0, min_body_rate=100000) as cluster:
        with connect(cluster, HALF_HEAD) as head, connect(cluster, HALF_BODY) as body:
            assert head.recv(4096).startswith(b"HTTP/1.1 408 ")
            assert body.recv(4096).startswith(b"HTTP/1.1 408 ")
        with connect(cluster, b"GET /" + b"x" * 20000) as long:
            assert long.recv(4096).startswith(b"HTTP/1.1 431 ")
        with connect(cluster, b"POST /updateModel HTTP/1.1\r\nContent-Length: 9999999999\r\n\r\n") as large:
            assert large.recv(4096).startswith(b"HTTP/1.1 413 ")
        with connect(cluster, b"nonsense\r\n\r\n") as bad:
            assert bad.recv(4096).startswith(b"HTTP/1.1 400 ")
        for reason in ("slow_head", "slow_body", "long_head", "large_body", "bad_head"):
            assert cluster.metric(REFUSALS.format(reason)) == 1, reason
