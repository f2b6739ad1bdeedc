"""Who tells systemd what: time and threads go on when the test says so; the socket is real."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from memory_reactor import MemoryReactor
from twisted.internet import defer, threads

from fedcore.net.sd_notify import Notifier
from fedcore.services.supervision import SPARE_S, Supervision, WatchedThreads, longest_work

LONGEST = 10.0


@pytest.fixture
def reactor() -> MemoryReactor:
    return MemoryReactor()


class TestWatchedThreads:
    @pytest.fixture
    def watched(self, reactor: MemoryReactor) -> WatchedThreads:
        return WatchedThreads(reactor, LONGEST)

    @staticmethod
    def give(watched: WatchedThreads, work: Callable[[], Any]) -> defer.Deferred[Any]:
        return threads.deferToThreadPool(watched, watched.getThreadPool(), work)

    def test_work_is_done_as_by_the_reactor_itself(
        self, watched: WatchedThreads, reactor: MemoryReactor
    ) -> None:
        results: list[Any] = []
        self.give(watched, lambda: 42).addCallback(results.append)
        self.give(watched, lambda: 1 // 0).addErrback(lambda failure: results.append(failure.type))
        reactor.work()
        reactor.work()
        assert results == [42, ZeroDivisionError]
        assert watched.seconds() == reactor.seconds()

    def test_what_comes_back_in_time_may_take_long(
        self, watched: WatchedThreads, reactor: MemoryReactor
    ) -> None:
        self.give(watched, lambda: None)
        assert watched.alive(LONGEST)
        reactor.work()
        assert watched.alive(LONGEST)

    def test_what_does_not_come_back_is_noticed_though_others_do(
        self, watched: WatchedThreads, reactor: MemoryReactor
    ) -> None:
        self.give(watched, lambda: None)
        stuck = reactor.jobs.popleft()
        for _ in range(4):
            assert watched.alive(LONGEST / 4)
            reactor.work()  # the piece that does nothing
        assert not watched.alive(LONGEST / 4)
        assert not watched.alive(0.0)
        stuck()
        assert watched.alive(0.0)

    def test_threads_that_do_nothing_are_noticed_without_any_work(self, watched: WatchedThreads) -> None:
        assert watched.alive(0.0)
        assert watched.alive(LONGEST)
        assert not watched.alive(0.1)

    def test_the_piece_that_does_nothing_is_there_once(
        self, watched: WatchedThreads, reactor: MemoryReactor
    ) -> None:
        for _ in range(3):
            watched.alive(0.0)
        assert len(reactor.jobs) == 1
        reactor.work()
        watched.alive(0.0)
        assert len(reactor.jobs) == 1

    def test_work_that_no_thread_takes_counts_as_stuck(
        self, watched: WatchedThreads, reactor: MemoryReactor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A host may run out of threads; whoever gave the work waits for it."""

        def refuse(*arguments: Any) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(reactor, "callInThreadWithCallback", refuse)
            with pytest.raises(RuntimeError):
                self.give(watched, lambda: None)
            assert watched.alive(1.0)  # the piece that does nothing is refused as well
        assert watched.alive(LONGEST - 1.0)
        reactor.work()
        assert not watched.alive(0.1)

    def test_threads_that_are_refused_for_a_moment_are_forgiven(
        self, watched: WatchedThreads, reactor: MemoryReactor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*arguments: Any) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(reactor, "callInThreadWithCallback", refuse)
            assert watched.alive(0.0)
        for _ in range(5):
            assert watched.alive(LONGEST)
            reactor.work()

    def test_real_threads_come_back_in_the_reactors_thread(self) -> None:
        from twisted.python.threadpool import ThreadPool

        pool = ThreadPool(0, 2)
        pool.start()
        called: list[tuple[Any, ...]] = []
        came = threading.Semaphore(0)

        class Reactor:
            def getThreadPool(self) -> ThreadPool:
                return pool

            def callFromThread(self, *call: Any) -> None:
                called.append(call)
                came.release()

        try:
            gate = threading.Event()
            watched = WatchedThreads(Reactor(), LONGEST)
            watched.callInThreadWithCallback(lambda good, result: None, lambda: gate.wait(20))
            assert watched.alive(LONGEST)
            assert came.acquire(timeout=20)  # the piece that does nothing, by the other thread
            function, *arguments = called.pop()
            function(*arguments)
            assert not watched.alive(0.1)
            gate.set()
            for _ in range(2):  # that work, and the next piece that does nothing, in any order
                assert came.acquire(timeout=20)
            for function, *arguments in called:
                function(*arguments)
            assert watched.alive(0.1)
        finally:
            gate.set()
            pool.stop()


def test_the_longest_work_grows_with_the_ledger() -> None:
    assert longest_work(0) == SPARE_S
    assert longest_work(1 << 30) > longest_work(1 << 20) + 60


class Heard:
    """A notify socket."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.setblocking(False)

    def take(self) -> list[str]:
        """What has come since the last call."""
        messages = []
        try:
            while True:
                messages.append(self._socket.recv(4096).decode())
        except BlockingIOError:
            return messages

    def close(self) -> None:
        self._socket.close()


class TestSupervision:
    @pytest.fixture
    def heard(self, tmp_path: Path) -> Iterator[Heard]:
        heard = Heard(tmp_path / "notify")
        yield heard
        heard.close()

    @pytest.fixture
    def state(self) -> dict[str, Any]:
        return {"text": "a", "alive": True, "asked": []}

    @pytest.fixture
    def supervision(
        self, reactor: MemoryReactor, heard: Heard, state: dict[str, Any]
    ) -> Iterator[Supervision]:
        def alive(seconds: float) -> bool:
            state["asked"].append(seconds)
            return bool(state["alive"])

        notifier = Notifier(heard.address, 30.0)
        supervision = Supervision(notifier, lambda: state["text"], alive, reactor)
        supervision.startService()
        yield supervision
        supervision.stopService()
        assert not reactor.getDelayedCalls()

    def test_beats_at_half_of_the_time(
        self, supervision: Supervision, reactor: MemoryReactor, heard: Heard
    ) -> None:
        assert heard.take() == ["STATUS=a", "WATCHDOG=1"]
        reactor.pump([1.0] * 14)
        assert heard.take() == []
        reactor.advance(1.0)
        assert heard.take() == ["WATCHDOG=1"]

    def test_does_not_beat_for_what_does_not_live(
        self, supervision: Supervision, reactor: MemoryReactor, heard: Heard, state: dict[str, Any]
    ) -> None:
        heard.take()
        state["alive"] = False
        reactor.pump([1.0] * 60)
        assert heard.take() == []
        state["alive"] = True
        reactor.pump([1.0] * 15)
        assert heard.take() == ["WATCHDOG=1"]

    def test_a_pause_counts_as_no_more_than_the_time_between_two_beats(
        self, supervision: Supervision, reactor: MemoryReactor, state: dict[str, Any]
    ) -> None:
        reactor.advance(15.0)
        reactor.advance(1000.0)
        assert state["asked"] == [0.0, 15.0, 15.0]

    def test_a_change_is_told_at_once_and_the_next_one_a_second_later(
        self, supervision: Supervision, reactor: MemoryReactor, heard: Heard, state: dict[str, Any]
    ) -> None:
        reactor.pump([0.5, 0.5, 0.25])
        heard.take()
        state["text"] = "b"
        supervision.changed()
        assert heard.take() == ["STATUS=b"]
        for number in range(7):
            reactor.advance(0.125)  # a look, too, is in this time
            state["text"] = f"c{number}"
            supervision.changed()
        assert heard.take() == []
        reactor.advance(0.125)
        supervision.changed()
        assert heard.take() == ["STATUS=c6"]

    def test_what_tells_nobody_is_seen_by_looking(
        self, supervision: Supervision, reactor: MemoryReactor, heard: Heard, state: dict[str, Any]
    ) -> None:
        heard.take()
        state["text"] = "b"
        reactor.advance(0.5)
        assert heard.take() == []
        reactor.advance(0.5)
        assert heard.take() == ["STATUS=b"]

    def test_nothing_is_told_after_the_end(
        self, supervision: Supervision, reactor: MemoryReactor, heard: Heard, state: dict[str, Any]
    ) -> None:
        supervision.stopService()
        heard.take()
        state["text"] = "b"
        reactor.advance(100.0)
        supervision.changed()
        assert heard.take() == []

    def test_without_a_watchdog_nothing_beats(self, reactor: MemoryReactor, heard: Heard) -> None:
        supervision = Supervision(Notifier(heard.address), lambda: "a", lambda seconds: True, reactor)
        supervision.startService()
        reactor.pump([1.0] * 60)
        supervision.stopService()
        assert heard.take() == ["STATUS=a"]
