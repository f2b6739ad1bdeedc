"""The scheduler's listener in memory: status lines, headers, paths, and bodies that are too long."""

from __future__ import annotations

import json
from typing import Any

import pytest
from twisted.internet import task
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.logger import FilteringLogObserver, LogLevel, LogLevelFilterPredicate, globalLogPublisher
from twisted.python.failure import Failure

from fedcore.services.operator_api import BODY_LIMIT, Answer, Body, Refusal
from fedcore.services.operator_http import operator_site

TOO_LONG = b'{"code":"1","error_message":"The post message is bigger than 100mb."}'


class Api:
    """Operations that answer with their names, or refuse."""

    def __init__(self) -> None:
        self.refuse: Exception | None = None
        self.bodies: list[Body] = []

    async def _answer(self, name: str) -> Answer:
        if self.refuse is not None:
            raise self.refuse
        return {"message": name, "b": 1, "a": {"z": "ü", "y": 0.5}}

    async def state(self) -> Answer:
        return await self._answer("state")

    async def query_instance(self) -> Answer:
        return await self._answer("queryInstance")

    async def enable(self) -> Answer:
        return await self._answer("enableFLS")

    async def disable(self) -> Answer:
        return await self._answer("disableFLS")

    async def new_instance(self, body: Body) -> Answer:
        self.bodies.append(body)
        return await self._answer("newInstance")


class Wire:
    """One connection to the listener."""

    def __init__(self, *, integer_code: bool = False) -> None:
        self.api = Api()
        self.clock = task.Clock()
        site = operator_site(self.api, integer_code=integer_code)  # type: ignore[arg-type]
        self.protocol = site.buildProtocol(IPv4Address("TCP", "127.0.0.1", 1))
        self.protocol.callLater = self.clock.callLater
        self.transport = StringTransport()
        self.transport.protocol = self.protocol
        self.protocol.makeConnection(self.transport)

    def send(self, data: bytes) -> bytes:
        """Return what the listener says to these bytes."""
        self.transport.clear()
        self.protocol.dataReceived(data)
        return self.transport.value()

    def request(
        self, path: str, body: bytes = b"", method: str = "GET", *headers: str
    ) -> tuple[str, dict, bytes]:
        """Return status line, headers and body of the answer to a request."""
        lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
        head, _, answer = self.send("\r\n".join(lines).encode() + body).partition(b"\r\n\r\n")
        status, *fields = head.decode().split("\r\n")
        return status, dict(field.lower().split(": ", 1) for field in fields), answer


@pytest.fixture
def wire() -> Wire:
    return Wire()


NAMES = ["state", "queryInstance", "newInstance", "enableFLS", "disableFLS"]


@pytest.mark.parametrize("name", NAMES)
class TestEveryRoute:
    def test_success(self, wire: Wire, name: str) -> None:
        status, headers, answer = wire.request(f"/{name}")
        assert (status, headers["content-type"]) == ("HTTP/1.1 200 Client", "application/json")
        assert answer == f'{{"a":{{"y":0.5,"z":"ü"}},"b":1,"code":"0","message":"{name}"}}'.encode()
        assert headers["content-length"] == str(len(answer))

    def test_a_refusal(self, wire: Wire, name: str) -> None:
        wire.api.refuse = Refusal("Not now, ü.")
        status, headers, answer = wire.request(f"/{name}")
        assert (status, headers["content-type"]) == ("HTTP/1.1 400 Client", "text/html; charset=iso-8859-1")
        assert answer == '{"code":"1","error_message":"Not now, ü."}'.encode()

    def test_integer_codes(self, name: str) -> None:
        wire = Wire(integer_code=True)
        assert json.loads(wire.request(f"/{name}")[2])["code"] == 0
        wire.api.refuse = Refusal("no")
        assert wire.request(f"/{name}")[2] == b'{"code":1,"error_message":"no"}'

    @pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "brew"])
    def test_any_method(self, wire: Wire, name: str, method: str) -> None:
        assert json.loads(wire.request(f"/{name}?a=b", b"{}", method)[2])["message"] == name

    def test_the_exact_path(self, wire: Wire, name: str) -> None:
        for path in (
            f"/{name}/",
            f"/{name}/x",
            f"//{name}",
            f"/x/{name}",
            f"/{name.lower()}_",
            f"/{name.upper()}",
        ):
            assert wire.request(path)[0].startswith("HTTP/1.1 404 "), path

    def test_what_nobody_thought_of_has_a_text(self, wire: Wire, name: str) -> None:
        wire.api.refuse = ZeroDivisionError("surprise")
        status, _, answer = wire.request(f"/{name}")
        assert status == "HTTP/1.1 400 Client"
        text = json.loads(answer)["error_message"]
        assert "inner error" in text
        assert "surprise" not in text


class TestBodies:
    def test_a_body_arrives_whole_in_pieces(self, wire: Wire) -> None:
        wire.send(b"POST /newInstance HTTP/1.1\r\nContent-Length: 6\r\n\r\n{}")
        assert wire.api.bodies == []
        assert wire.send(b"    ").startswith(b"HTTP/1.1 200 Client\r\n")
        assert wire.api.bodies == [Body(6, b"{}    ")]

    def test_chunks(self, wire: Wire) -> None:
        wire.send(
            b"POST /newInstance HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"
        )
        assert wire.api.bodies == [Body(2, b"{}")]

    @pytest.mark.parametrize(
        "kind", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "x"]
    )
    def test_the_type_does_not_matter(self, wire: Wire, kind: str) -> None:
        wire.request("/newInstance", b'{"a":1}', "POST", f"Content-Type: {kind}")
        assert wire.api.bodies == [Body(7, b'{"a":1}')]

    def test_one_beyond_use_is_counted_and_not_kept(self, wire: Wire) -> None:
        wire.request("/newInstance", b"x" * 3_000_000, "POST")
        assert wire.api.bodies == [Body(3_000_000, b"")]
        wire.request("/newInstance", b"{}", "POST")
        assert wire.api.bodies[1:] == [Body(2, b"{}")]

    def test_one_announced_too_long_is_refused_unread(self, wire: Wire) -> None:
        head = (
            f"POST /newInstance HTTP/1.1\r\nContent-Length: {BODY_LIMIT + 1}\r\nExpect: 100-continue\r\n\r\n"
        )
        answer = wire.send(head.encode())
        assert answer.startswith(b"HTTP/1.1 400 Client\r\nContent-Type: text/html; charset=ISO-8859-1\r\n")
        assert b"\r\nConnection: close\r\n" in answer
        assert answer.endswith(b"\r\n\r\n" + TOO_LONG)
        assert wire.send(b"x" * 1_000_000) == b""
        assert not wire.transport.disconnecting
        wire.clock.advance(5.0)
        assert (wire.transport.disconnecting, wire.api.bodies) == (True, [])

    def test_one_of_just_the_limit_is_asked_for(self, wire: Wire) -> None:
        head = f"POST /newInstance HTTP/1.1\r\nContent-Length: {BODY_LIMIT}\r\nExpect: 100-continue\r\n\r\n"
        assert wire.send(head.encode()) == b"HTTP/1.1 100 Continue\r\n\r\n"

    def test_one_that_turns_out_too_long_is_refused_once(self, wire: Wire) -> None:
        wire.send(b"POST /newInstance HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        answers = [wire.send(chunk) for _ in range(102)]
        assert answers[:100] == [b""] * 100
        assert (answers[100].endswith(TOO_LONG), answers[101]) == (True, b"")
        assert wire.send(b"0\r\n\r\n") == b""
        assert (wire.transport.disconnecting, wire.api.bodies) == (True, [])

    def test_a_refused_peer_may_go(self, wire: Wire) -> None:
        wire.send(f"POST /newInstance HTTP/1.1\r\nContent-Length: {BODY_LIMIT + 1}\r\n\r\n".encode())
        wire.protocol.connectionLost(gone())
        assert [call for call in wire.clock.getDelayedCalls() if call.active()] == []


def test_a_peer_that_goes_before_its_answer(wire: Wire) -> None:
    """The operation goes on, its answer is for nobody."""
    waiting: Any = None

    async def slow() -> Answer:
        nonlocal waiting
        waiting = Deferred()
        return await waiting

    wire.api.state = slow  # type: ignore[method-assign]
    assert wire.send(b"GET /state HTTP/1.1\r\n\r\n") == b""
    wire.protocol.connectionLost(gone())
    faults: list[Any] = []
    watch = FilteringLogObserver(faults.append, [LogLevelFilterPredicate(LogLevel.warn)])
    globalLogPublisher.addObserver(watch)
    try:
        waiting.callback({})
    finally:
        globalLogPublisher.removeObserver(watch)
    assert (wire.transport.value(), faults) == (b"", [])


def gone() -> Any:
    return Failure(ConnectionDone())
