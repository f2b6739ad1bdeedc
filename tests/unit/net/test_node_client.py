"""The client between nodes, on pretended sockets under Twisted's own transports; the test is the other node."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
from twisted.internet import defer, error
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import globalLogPublisher
from twisted.python.failure import Failure
from unit.net.rig import Peer

from fedcore.errors import LocalError
from fedcore.net.node_client import (
    CONNECT_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    STALL_TIMEOUT_S,
    Answer,
    NodeClient,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
)
from fedcore.wire.node import (
    EMPTY,
    HEAD,
    Command,
    Frame,
    FrameReader,
    NodeRole,
    PayloadKind,
    encode,
    reply_meta,
)

ADDRESS = "10.0.0.1:9000"
MAX_DATA = 1000
REFUSED = error.ConnectionRefusedError()


class Node(Peer):
    """The node that is asked, at the other end of one connection."""

    def __init__(self, rig: ClientRig, factory: Any) -> None:
        self._factory = factory
        self._reader = FrameReader(1 << 24)
        self._seen = 0
        self.requests: list[Frame] = []
        super().__init__(rig)  # type: ignore[arg-type]

    def _protocol(self) -> Any:
        wrapper = self._factory.buildProtocol(None)  # of Twisted's endpoint
        self.protocol = wrapper._wrappedProtocol
        return wrapper

    def hear(self) -> list[Frame]:
        """Read; return all requests so far."""
        self.pump()
        self._reader.receive(bytes(self.wire.sent[self._seen :]))
        self._seen = len(self.wire.sent)
        self.requests.extend(iter(self._reader.next_frame, None))
        return self.requests

    def reply(self, number: int, data: bytes = b"", refusal: str = "") -> None:
        """Answer the request of that number, from 0."""
        meta = reply_meta(self.hear()[number].meta, refusal)
        self.send(b"".join(encode(Frame(PayloadKind.RAW, meta, data))))


class ClientRig:
    """The client, its clock and the attempts to connect that it has made."""

    def __init__(self) -> None:
        self.reactor: Any = MemoryReactorClock()
        self.client = NodeClient(
            "me", role=NodeRole.WORKER, max_data=MAX_DATA, jitter=lambda: 1.0, reactor=self.reactor
        )
        self.client.startService()

    @property
    def attempts(self) -> list[tuple[str, int]]:
        return [(host, port) for host, port, *_ in self.reactor.tcpClients]

    def ask(self, data: bytes = b"x", *, address: str = ADDRESS, timeout: float = 10.0, **more: Any) -> Ask:
        work = self.client.request(address, "node", Command.GET_MODEL_WEIGHT, data, timeout=timeout, **more)
        return Ask(work)

    def connect(self) -> Node:
        """Let the latest attempt to connect succeed."""
        return Node(self, self.reactor.tcpClients[-1][2])

    def fail(self, why: Exception = REFUSED) -> None:
        """Let the latest attempt to connect fail."""
        factory, connector = self.reactor.tcpClients[-1][2], self.reactor.connectors[-1]
        factory.clientConnectionFailed(connector, Failure(why))


class Ask:
    """A request under way."""

    def __init__(self, work: Coroutine[Any, Any, Answer]) -> None:
        self.results: list[Any] = []
        self.deferred: defer.Deferred[Any] = defer.Deferred.fromCoroutine(work)
        self.deferred.addBoth(self.results.append)

    @property
    def open(self) -> bool:
        return not self.results

    @property
    def answer(self) -> Answer:
        (result,) = self.results
        assert isinstance(result, Answer), result
        return result

    @property
    def fault(self) -> Any:
        (result,) = self.results
        assert isinstance(result, Failure), result
        return result.value


@pytest.fixture
def rig() -> Iterator[ClientRig]:
    failures: list[Any] = []

    def observe(event: Any) -> None:
        if "log_failure" in event:
            failures.append(event["log_failure"])

    globalLogPublisher.addObserver(observe)
    rig = ClientRig()
    yield rig
    rig.client.stopService()
    rig.reactor.advance(0)
    assert not rig.reactor.getDelayedCalls()
    globalLogPublisher.removeObserver(observe)
    assert not failures


def test_a_request_and_its_answer(rig: ClientRig) -> None:
    ask = rig.ask(b"data", user_cmd=3, iteration=7, kind=PayloadKind.FLATBUFFERS)
    node = rig.connect()
    (request,) = node.hear()
    meta = request.meta
    assert (request.kind, request.data) == (PayloadKind.FLATBUFFERS, b"data")
    assert (meta.cmd, meta.role, meta.user_cmd, meta.iteration_num) == (5, NodeRole.WORKER, 3, 7)
    assert (meta.send_node, meta.recv_node) == ("me", "node")
    assert ask.open
    node.reply(0, b"model")
    assert ask.answer == Answer(b"model", meta)


def test_an_empty_request_is_eight_zero_bytes(rig: ClientRig) -> None:
    rig.ask(b"")
    assert [frame.data for frame in rig.connect().hear()] == [EMPTY]


def test_requests_share_a_connection_and_answers_come_in_any_order(rig: ClientRig) -> None:
    asks = [rig.ask(b"%d" % number) for number in range(3)]
    node = rig.connect()
    asks.append(rig.ask(b"3"))
    assert [bytes(frame.data) for frame in node.hear()] == [b"0", b"1", b"2", b"3"]
    assert len({frame.meta.request_id for frame in node.requests}) == 4
    for number in (2, 0, 3, 1):
        node.reply(number, b"answer %d" % number)
    assert [bytes(ask.answer.data) for ask in asks] == [b"answer %d" % number for number in range(4)]
    assert len(rig.attempts) == 1


def test_addresses_have_connections_of_their_own(rig: ClientRig) -> None:
    rig.ask()
    rig.ask(address="10.0.0.2:9000")
    rig.ask(address="[::1]:9001")
    assert rig.attempts == [("10.0.0.1", 9000), ("10.0.0.2", 9000), ("::1", 9001)]


def test_a_host_name_is_resolved(rig: ClientRig) -> None:
    ask = rig.ask(address="localhost:9000")
    assert rig.attempts == [("127.0.0.1", 9000)]
    rig.connect().reply(0, b"here")
    assert ask.answer.data == b"here"


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "host:١", "host:" + "9" * 9999]
)
def test_an_address_that_is_none(rig: ClientRig, address: str) -> None:
    fault = rig.ask(address=address).fault
    assert type(fault) is PeerUnreachable and "no host:port" in str(fault)
    assert not rig.attempts


@pytest.mark.parametrize("address", ["a b:1", "\udcff:1", "..:1", "[::1:1", "x" * 300 + ":1"])
def test_no_address_breaks_the_client(rig: ClientRig, address: str) -> None:
    ask = rig.ask(address=address, timeout=1.0)
    rig.reactor.advance(1.0)
    assert isinstance(ask.fault, PeerUnreachable)


def test_an_error_reply(rig: ClientRig) -> None:
    ask = rig.ask()
    node = rig.connect()
    node.reply(0, refusal="Failed to get model of iteration 7")
    assert type(ask.fault) is PeerRefused
    assert ask.fault.args[0] == "Failed to get model of iteration 7"
    again = rig.ask()
    node.reply(1, b"model")
    assert again.answer.data == b"model"


def test_nobody_listens(rig: ClientRig) -> None:
    asks = [rig.ask(), rig.ask()]
    rig.fail()
    assert [type(ask.fault) for ask in asks] == [PeerUnreachable] * 2
    assert all(ask.fault.refused for ask in asks)


def test_nobody_answers_the_call(rig: ClientRig) -> None:
    ask = rig.ask()
    assert rig.reactor.tcpClients[-1][3] == CONNECT_TIMEOUT_S
    rig.fail(error.TimeoutError())
    assert type(ask.fault) is PeerUnreachable and not ask.fault.refused


def test_an_unreachable_node_is_left_alone_for_a_while(rig: ClientRig) -> None:
    rig.ask()
    rig.fail()
    for delay, attempts in ((0.1, 2), (0.2, 3), (0.4, 4), (0.8, 5), (1.6, 6), (2.0, 7), (2.0, 8)):
        rig.reactor.advance(delay - 0.01)
        fault = rig.ask().fault
        assert fault.refused and len(rig.attempts) == attempts - 1
        rig.reactor.advance(0.02)
        ask = rig.ask()
        assert ask.open and len(rig.attempts) == attempts
        rig.fail()


def test_an_answer_ends_the_memory_of_failures(rig: ClientRig) -> None:
    for _ in range(5):
        rig.ask()
        rig.fail()
        rig.reactor.advance(2.0)
    rig.ask()
    node = rig.connect()
    node.reply(0)
    node.end()
    rig.ask()
    rig.fail()
    rig.reactor.advance(0.11)
    assert rig.ask().open


def test_a_node_that_hangs_up_without_a_word_is_left_alone_too(rig: ClientRig) -> None:
    ask = rig.ask()
    rig.connect().end()
    assert type(ask.fault) is PeerUnreachable and not ask.fault.refused
    assert not rig.ask().open and len(rig.attempts) == 1
    rig.reactor.advance(0.11)
    assert rig.ask().open and len(rig.attempts) == 2


def test_patience_tries_until_it_succeeds(rig: ClientRig) -> None:
    ask = rig.ask(patient=True)
    for attempt in range(1, 6):
        assert len(rig.attempts) == attempt
        rig.fail()
        rig.reactor.advance(1.7)
    assert ask.open
    rig.connect().reply(0, b"at last")
    assert ask.answer.data == b"at last"


def test_patience_ends(rig: ClientRig) -> None:
    ask = rig.ask(patient=True, timeout=1.0)
    rig.fail()
    rig.reactor.advance(1.0)
    assert type(ask.fault) is PeerTimeout


def test_patience_sends_nothing_twice(rig: ClientRig) -> None:
    ask = rig.ask(patient=True)
    node = rig.connect()
    assert len(node.hear()) == 1
    node.end()
    assert type(ask.fault) is PeerUnreachable


def test_a_lost_connection_fails_its_requests_and_the_next_one_connects_again(rig: ClientRig) -> None:
    first = rig.ask()
    node = rig.connect()
    node.reply(0)
    asks = [rig.ask(), rig.ask()]
    node.hear()
    node.end()
    assert first.answer
    assert [type(ask.fault) for ask in asks] == [PeerUnreachable] * 2
    again = rig.ask()
    rig.connect().reply(0, b"back")
    assert again.answer.data == b"back"


@pytest.mark.parametrize(
    "bad", [HEAD.pack(9, 1, 2), HEAD.pack(0, 2, 3 + MAX_DATA), b"HTTP/1.1 400 Bad Request\r\n"]
)
def test_a_malformed_or_too_long_reply_closes(rig: ClientRig, bad: bytes) -> None:
    asks = [rig.ask(), rig.ask()]
    node = rig.connect()
    node.hear()
    node.send(bad)
    assert node.lost
    assert [type(ask.fault) for ask in asks] == [PeerUnreachable] * 2


def test_a_late_answer(rig: ClientRig) -> None:
    ask, other = rig.ask(timeout=1.0), rig.ask()
    node = rig.connect()
    node.hear()
    rig.reactor.advance(1.0)
    assert type(ask.fault) is PeerTimeout and other.open
    following = rig.ask()  # not on a connection that may be dead
    assert len(rig.attempts) == 2
    node.reply(0, b"late")
    node.reply(1, b"in time")
    assert other.answer.data == b"in time" and following.open
    node.pump()
    assert node.lost


def test_the_time_to_connect_counts(rig: ClientRig) -> None:
    ask = rig.ask(timeout=1.0)
    rig.reactor.advance(1.0)
    assert type(ask.fault) is PeerTimeout
    node = rig.connect()
    assert node.hear() == []
    following = rig.ask()
    node.reply(0, b"here")
    assert following.answer.data == b"here"


def test_a_cancelled_request(rig: ClientRig) -> None:
    ask = rig.ask()
    node = rig.connect()
    ask.deferred.cancel()
    assert isinstance(ask.fault, defer.CancelledError)
    node.pump()
    assert node.lost


def test_an_answer_nobody_waits_for_is_ignored(rig: ClientRig) -> None:
    ask = rig.ask()
    node = rig.connect()
    meta = node.hear()[0].meta
    stray = reply_meta(type(meta)(meta.cmd, meta.request_id + 1))
    node.send(b"".join(encode(Frame(PayloadKind.RAW, stray, b"stray"))))
    assert ask.open
    node.reply(0, b"mine")
    assert ask.answer.data == b"mine"


def test_an_unused_connection_is_closed(rig: ClientRig) -> None:
    rig.ask()
    node = rig.connect()
    node.reply(0)
    rig.reactor.advance(IDLE_TIMEOUT_S - 1)
    slow = rig.ask(timeout=1000.0)
    rig.reactor.advance(IDLE_TIMEOUT_S + 1)
    node.reply(1)
    assert slow.answer and not node.lost
    rig.reactor.advance(IDLE_TIMEOUT_S + 1)
    node.pump()
    assert node.lost
    assert rig.ask().open and len(rig.attempts) == 2


def test_a_node_that_does_not_read(rig: ClientRig) -> None:
    rig.ask()
    node = rig.connect()
    node.wire.window = 0
    ask = rig.ask(bytes(1 << 20), timeout=1000.0)
    node.pump()
    rig.reactor.advance(STALL_TIMEOUT_S + 1)
    node.pump()
    assert type(ask.fault) is PeerUnreachable and node.lost


def test_a_large_request_arrives_whole(rig: ClientRig) -> None:
    data = bytes(range(256)) * 20_000
    ask = rig.ask(data)
    node = rig.connect()
    assert [frame.data == data for frame in node.hear()] == [True]
    node.reply(0, b"taken")
    assert ask.answer.data == b"taken"


def test_a_request_too_long_for_a_frame(rig: ClientRig) -> None:
    view = memoryview(np.broadcast_to(np.zeros(1, np.uint8), (2**31,)))
    ask = rig.ask(view)  # type: ignore[arg-type]
    node = rig.connect()
    assert type(ask.fault) is LocalError and not node.lost


def test_forgetting_an_address(rig: ClientRig) -> None:
    ask = rig.ask()
    node = rig.connect()
    rig.client.forget(ADDRESS)
    node.pump()
    assert type(ask.fault) is PeerUnreachable and node.lost
    rig.ask()
    rig.fail()
    rig.client.forget(ADDRESS)
    assert rig.ask().open and len(rig.attempts) == 3
    rig.client.forget("10.9.9.9:1")


def test_stopping_fails_all_that_is_open(rig: ClientRig) -> None:
    asks = [rig.ask(), rig.ask(address="10.0.0.2:9000"), rig.ask(address="10.0.0.3:9000", patient=True)]
    rig.fail()
    node = Node(rig, rig.reactor.tcpClients[0][2])
    done: list[Any] = []
    rig.client.stopService().addCallback(done.append)
    assert [type(ask.fault) for ask in asks] == [PeerUnreachable] * 3
    assert not done
    node.pump()
    assert node.lost and done
    assert type(rig.ask().fault) is PeerUnreachable
    rig.client.startService()
    assert rig.ask().open


def test_stopping_ends_attempts_to_connect(rig: ClientRig) -> None:
    ask = rig.ask()
    rig.client.stopService()
    assert type(ask.fault) is PeerUnreachable
    assert rig.reactor.connectors[-1].stoppedConnecting


def test_a_node_that_is_lost_while_it_does_not_read(rig: ClientRig) -> None:
    ask = rig.ask(bytes(1 << 20))
    factory = rig.reactor.tcpClients[-1][2]

    class Deaf(Node):
        def _protocol(self) -> Any:
            self.wire.window = 0
            return super()._protocol()

    node = Deaf(rig, factory)
    assert ask.open
    node.end()
    assert type(ask.fault) is PeerUnreachable
    assert not rig.reactor.getDelayedCalls()


def test_one_waiter_may_end_the_connection_of_the_next(rig: ClientRig) -> None:
    first = rig.ask(memoryview(np.broadcast_to(np.zeros(1, np.uint8), (2**31,))))  # type: ignore[arg-type]
    first.deferred.addCallback(lambda _: rig.client.forget(ADDRESS))
    second = rig.ask()
    node = rig.connect()
    assert type(second.fault) is PeerUnreachable and node.lost


def test_a_closed_connection_is_not_remembered(rig: ClientRig) -> None:
    rig.ask()
    node = rig.connect()
    node.reply(0)
    connection = weakref.ref(node.protocol)
    node.end()
    del node
    gc.collect()
    assert connection() is None
