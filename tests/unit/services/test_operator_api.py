"""What the scheduler makes of a newInstance body, and what it answers while there is no Redis."""

from __future__ import annotations

import gc
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from twisted.internet import defer, task
from twisted.logger import globalLogPublisher

from fedcore.errors import StoreUnavailable
from fedcore.services.operator_api import (
    BODY_LIMIT,
    KEPT_BODY,
    NO_STORE,
    Body,
    OperatorApi,
    Refusal,
    requested_values,
)
from fedcore.store.instances import instance_name_at


def body(content: bytes) -> Body:
    return Body(len(content), content)


def refusal(value: Body) -> str:
    with pytest.raises(Refusal) as caught:
        requested_values(value)
    return str(caught.value)


class TestBody:
    @pytest.mark.parametrize(
        ("content", "values"),
        [
            (b"{}", {}),
            (b' {"a": 1, "a": 2.5}\n', {"a": 2.5}),
            (b"\xef\xbb\xbf[null]", [None]),
            ('{"ü": true}'.encode(), {"ü": True}),
            (b"0", 0),
        ],
    )
    def test_json(self, content: bytes, values: object) -> None:
        assert requested_values(body(content)) == values

    def test_empty(self) -> None:
        assert refusal(body(b"")) == "The post message size is invalid."

    def test_the_longest(self) -> None:
        assert refusal(Body(BODY_LIMIT + 1, b"")) == "The post message is bigger than 100mb."
        too_much = f"Illegal JSON format:{BODY_LIMIT} bytes are more than hyper-parameters can take"
        assert (BODY_LIMIT, refusal(Body(BODY_LIMIT, b""))) == (104857600, too_much)
        padded = b"{}".ljust(KEPT_BODY)
        assert requested_values(body(padded)) == {}
        assert refusal(body(padded + b" ")).startswith("Illegal JSON format:1048577 bytes ")

    @pytest.mark.parametrize(
        "content",
        [
            b" ",
            b"{",
            b"{'a':1}",
            b"a=1&b=2",
            b'{"a":NaN}',
            b'{"a":Infinity}',
            b'{"a":-Infinity}',
            b'{"a":1e999}',
            b"\xff",
            "{}".encode("utf-16"),
            b"[" * KEPT_BODY,
            b'{"a":' * 100_000,
            b"1" * 5000,
        ],
    )
    def test_no_json(self, content: bytes) -> None:
        text = refusal(body(content))
        assert text.startswith("Illegal JSON format:")
        assert len(text) > len("Illegal JSON format:")

    def test_the_reason_is_the_parsers(self) -> None:
        assert refusal(body(b"{,}")).startswith("Illegal JSON format:Expecting property name")


OPERATIONS: dict[str, Callable[[OperatorApi], Any]] = {
    "state": lambda api: api.state(),
    "queryInstance": lambda api: api.query_instance(),
    "enableFLS": lambda api: api.enable(),
    "disableFLS": lambda api: api.disable(),
    "newInstance": lambda api: api.new_instance(body(b"{}")),
}


@pytest.mark.parametrize("name", OPERATIONS)
class TestWithoutRedis:
    def test_no_connection(self, name: str) -> None:
        assert self.outcome(name, Gone(), task.Clock()) == [expected(name)]

    def test_a_silent_one(self, name: str) -> None:
        """Patience ends after some seconds; an answer that comes later hurts nobody."""
        silent, clock = Silent(), task.Clock()
        seen = self.outcome(name, silent, clock)
        clock.advance(3.9)
        assert seen == []
        clock.advance(0.2)
        assert seen == [expected(name)]
        faults: list[Any] = []
        globalLogPublisher.addObserver(faults.append)
        try:
            silent.reply.errback(StoreUnavailable("too late"))
            gc.collect()  # Twisted tells of unhandled errors when their Deferred goes
        finally:
            globalLogPublisher.removeObserver(faults.append)
        assert (faults, seen, clock.getDelayedCalls()) == ([], [expected(name)], [])

    @staticmethod
    def outcome(name: str, redis: Any, clock: task.Clock) -> list[str]:
        """Start the operation; the list gets the text of its refusal."""
        api = OperatorApi(redis, "job", 300_000, clock=clock, now=datetime.now)
        seen: list[str] = []
        work = defer.Deferred.fromCoroutine(OPERATIONS[name](api))
        work.addErrback(
            lambda failure: seen.append(str(failure.value)) if failure.check(Refusal) else failure
        )
        return seen


class Gone:
    """No connection."""

    available = False

    async def command(self, *_: object) -> Any:
        raise StoreUnavailable("gone")


class Silent:
    """A connection on which no reply has come yet."""

    available = True

    def __init__(self) -> None:
        self.reply: defer.Deferred[Any] = defer.Deferred()

    async def command(self, *_: object) -> Any:
        return await self.reply


def expected(name: str) -> str:
    return ("New instance failed: " if name == "newInstance" else "") + NO_STORE


@pytest.mark.parametrize(
    ("microsecond", "end"), [(0, "000.000"), (7, "000.007"), (1_002, "001.002"), (999_999, "999.999")]
)
def test_names_of_instances(microsecond: int, end: str) -> None:
    assert instance_name_at(datetime(2026, 1, 2, 3, 4, 5, microsecond)) == f"i_2026-01-02-03:04:05.{end}"
