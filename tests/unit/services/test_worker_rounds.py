"""The worker's rounds on real servers in memory: what is promised to a worker, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from model import job_in_memory
from model.job_in_memory import Job
from model.server_in_memory import CLIENTS, TEMPLATE, Server, settings_of
from twisted.internet import defer

from fedcore.config import ServerMode
from fedcore.core.iteration import GLOBAL_TIMEOUT, Phase, trained_lost
from fedcore.services.departure import Departure
from fedcore.services.publication import Found
from fedcore.services.worker_rounds import WorkerRounds
from fedcore.wire import codec
from fedcore.wire.arrays import Floats
from fedcore.wire.messages import (
    FeatureMap,
    RequestPullWeight,
    RequestPushMetrics,
    RequestPushWeight,
    ResponsePullWeight,
    ResponsePushMetrics,
    ResponsePushWeight,
)

HOLD_S = 0.5
PUSHED, FINISHED = "PushWeight succeed.", "Model of iteration of {} has finished"


class HybridJob:
    """A job whose servers serve workers.

    Attributes:
        job: its servers.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    def server(self, place: int) -> Server:
        server = self.job.servers[place]
        assert server is not None
        return server

    def rounds(self, place: int) -> WorkerRounds:
        server = self.server(place)
        return WorkerRounds(server.driver, server.publication, TEMPLATE, HOLD_S, server.reactor)

    # ---- what a worker asks

    def push(self, place: int, iteration: int, values: Floats) -> Answering:
        body = codec.encode(RequestPushWeight(iteration, (FeatureMap("who", values),)))
        return Answering(self, self.rounds(place).push_weight(memoryview(body)), ResponsePushWeight)

    def pull(self, place: int, iteration: int) -> Answering:
        body = codec.encode(RequestPullWeight(iteration, ("who",)))
        return Answering(self, self.rounds(place).pull_weight(memoryview(body)), ResponsePullWeight)

    def measure(self, place: int) -> Answering:
        body = codec.encode(RequestPushMetrics(0.5, 0.75))
        return Answering(self, self.rounds(place).push_metrics(memoryview(body)), ResponsePushMetrics)

    # ---- where the job is

    @property
    def status(self) -> Any:
        status = self.job.shared.status
        assert status is not None
        return status

    @property
    def finaliser(self) -> int:
        """Place of the server that makes the model."""
        node_id = self.status.token.partition(":")[2]
        return next(n for n, server in enumerate(self.job.servers) if server and server.node_id == node_id)

    @property
    def places(self) -> list[int]:
        """Where servers live."""
        return [n for n, server in enumerate(self.job.servers) if server is not None]

    def until(self, condition: Callable[[], bool], seconds: int = 30) -> None:
        for _ in range(seconds):
            if condition():
                return
            self.job.pass_time(1.0)
        raise AssertionError(f"it does not come: {self.status}")

    def collect(self) -> None:
        """Let the devices of an iteration come, until the worker may."""
        self.job.pass_time(2.0)
        clients = CLIENTS[: self.job.policy.start_threshold]
        for fl_id in clients:
            self.job.device_starts(fl_id)
        self.job.settle()
        for fl_id in clients:
            self.job.device_uploads(fl_id)
        self.until(lambda: self.status.phase is Phase.TRAINING)
        self.job.pass_time(2.0)

    def until_ended(self, number: int) -> None:
        self.until(lambda: number in self.job.store.ends, 45)
        self.job.pass_time(2.0)

    def result(self, number: int) -> str:
        return self.job.store.ends[number].result

    def model(self, place: int, number: int) -> Floats:
        image = self.server(place).driver.models.get(number)
        assert image is not None
        return image.arrays["who"]

    def holds(self, place: int, digest: str) -> bool:
        return self.server(place).publication.held(digest) is not None


class Answering:
    """A round on its way."""

    def __init__(self, job: HybridJob, work: Coroutine[Any, Any, Any], table: type[Any]) -> None:
        self._job = job
        self._table = table
        self._found: list[Any] = []
        defer.Deferred.fromCoroutine(work).addBoth(self._found.append)

    def moved_until(self, condition: Callable[[], bool]) -> None:
        """Let things go on, one after the other, until something holds."""
        while not condition():
            assert self._job.job.move(), "nothing goes on any more"

    @property
    def answer(self) -> Any:
        for _ in range(20):
            self._job.job.settle()
            if self._found:
                break
            self._job.job.pass_time(1.0)
        assert self._found, "no answer"
        if hasattr(self._found[0], "raiseException"):
            self._found[0].raiseException()
        if isinstance(self._found[0], str):
            return self._found[0]
        return codec.decode(self._table, b"".join(self._found[0].response.parts))


@contextmanager
def hybrid(monkeypatch: pytest.MonkeyPatch, hosts: Sequence[int], last: int = 1000) -> Iterator[HybridJob]:
    monkeypatch.setattr(
        job_in_memory,
        "settings_of",
        lambda *given: replace(settings_of(*given), server_mode=ServerMode.HYBRID_TRAINING),
    )
    job = Job(hosts, last=last)
    monkeypatch.setattr(job.store, "on_end", lambda number, end: None)  # a worker's model is no mean
    try:
        yield HybridJob(job)
    finally:
        job.close()


def weights(value: float) -> Floats:
    return np.full(len(CLIENTS), value, np.float32)


def digest_of(value: float) -> str:
    return TEMPLATE.image({"who": weights(value)}).digest


class TestAPush:
    def test_equal_to_the_model_before_is_published(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with hybrid(monkeypatch, (1, 2)) as run:
            for number in (1, 2, 3):
                run.collect()
                assert run.push(1 - run.finaliser, number, weights(7)).answer.reason == PUSHED
                run.job.pass_time(3.0)
                assert run.measure(0).answer.retcode == 200
                run.until_ended(number)
                assert run.job.store.ends[number].success, run.result(number)
                assert np.array_equal(run.model(0, number), weights(7))
                assert np.array_equal(run.model(1, number), weights(7))

    def test_that_counts_stays_on_disk_though_another_one_comes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two workers push at the same moment."""
        with hybrid(monkeypatch, (1,)) as run:
            run.collect()
            pushes = [run.push(0, 1, weights(value)) for value in (7, 8)]
            reasons = [push.answer.reason for push in pushes]
            assert sorted(reasons) == sorted([PUSHED, FINISHED.format(1)])
            value = (7, 8)[reasons.index(PUSHED)]
            run.job.kill(0)
            run.job.start(0)
            run.job.pass_time(2.0)
            assert run.measure(0).answer.retcode == 200
            run.until_ended(1)
            assert run.job.store.ends[1].success, run.result(1)
            assert np.array_equal(run.model(0, 1), weights(value))
            assert np.array_equal(run.job.hosts[1].newest_model()[1].arrays["who"], weights(value))

    def test_of_a_failed_iteration_is_no_checkpoint_and_costs_none(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whose worker never tells how good its model is does not push the published one off the disk."""
        with hybrid(monkeypatch, (1,)) as run:
            run.collect()
            assert run.push(0, 1, weights(7)).answer.retcode == 200
            assert run.measure(0).answer.retcode == 200
            run.until_ended(1)
            for number in (2, 3, 4, 5):
                run.collect()
                assert run.push(0, number, weights(100 + number)).answer.retcode == 200
                run.until_ended(number)
                assert run.result(number) == GLOBAL_TIMEOUT
            iteration, model = run.job.hosts[1].newest_model()
            assert iteration == 1 and np.array_equal(model.arrays["who"], weights(7))
            run.job.kill(0)
            run.job.start(0)
            run.job.pass_time(2.0)
            assert run.server(0).driver.serving
            assert np.array_equal(run.model(0, 5), weights(7))
            kept = list(run.job.hosts[1].checkpoints.rglob("*.safetensors"))
            assert len(kept) == 1, "what was pushed in vain is still there"

    def test_whose_answer_was_lost_is_200_again_though_nobody_has_the_aggregate(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with hybrid(monkeypatch, (1,)) as run:
            run.collect()
            assert run.push(0, 1, weights(7)).answer.retcode == 200
            run.job.kill(0)
            run.job.start(0)
            run.job.pass_time(3.0)
            again = run.push(0, 1, weights(7)).answer
            assert again.retcode == 200

    def test_is_not_taken_while_another_server_may_bring_back_an_earlier_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Redis has lost all; who took the first push is a moment later than who did not."""
        with hybrid(monkeypatch, (1, 2)) as run:
            run.collect()
            run.server(0).lose_redis()
            assert run.push(1, 1, weights(7)).answer.reason == PUSHED
            run.server(1).lose_redis()
            run.job.store.fail_over(None)
            run.server(0).redis.come_back()
            run.job.settle()
            assert run.status.phase is Phase.TRAINING
            other = run.push(0, 1, weights(8))
            run.job.settle()
            run.server(1).redis.come_back()
            assert other.answer.retcode in (200, 201)
            run.job.pass_time(2.0)
            assert run.status.phase is Phase.TRAINED and run.status.digest == digest_of(7)

    def test_is_known_here_before_it_is_acknowledged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Otherwise this server could not bring it back when Redis loses it."""
        with hybrid(monkeypatch, (1, 2)) as run:
            run.collect()
            place, seen = run.finaliser, []
            driver = run.server(place).driver
            push = run.push(place, 1, weights(7))
            push.moved_until(lambda: run.status.phase is Phase.TRAINED)
            driver.busy = True  # with something else
            run.job.settle()
            assert not push._found
            driver.busy = False
            driver.look_soon()
            assert push.answer.retcode == 200
            assert driver.iteration.digest == digest_of(7), seen

    def test_to_an_instance_that_has_just_been_replaced_is_not_acknowledged(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with hybrid(monkeypatch, (1,)) as run:
            run.collect()
            assert run.push(0, 1, weights(7)).answer.retcode == 200
            assert run.measure(0).answer.retcode == 200
            run.until_ended(1)
            run.collect()
            push = run.push(0, 2, weights(8))
            push.moved_until(lambda: any(run.job.hosts[1].checkpoints.rglob("2_*.safetensors")))
            assert run.job.store.new_instance(run.job.store.name, "i_new")
            run.server(0).notices.append(b"instance")
            assert not ok(push.answer)

    def test_of_the_iteration_before_does_not_lend_its_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same weights are pushed again after an iteration that failed."""
        with hybrid(monkeypatch, (1,)) as run:
            run.collect()
            assert run.push(0, 1, weights(7)).answer.retcode == 200
            run.until_ended(1)
            run.collect()
            assert run.push(0, 2, weights(7)).answer.retcode == 200
            assert run.measure(0).answer.retcode == 200
            run.until_ended(2)
            iteration, model = run.job.hosts[1].newest_model()
            assert iteration == 2 and np.array_equal(model.arrays["who"], weights(7))


FAULTS = (
    "the pusher loses Redis",
    "the finaliser loses Redis",
    "the pusher dies",
    "the finaliser dies",
    "a wipe",
)


class TestWhateverBreaks:
    """Once a worker was told 200, or asks again, its model is published, and nothing is logged as a failure."""

    @pytest.mark.parametrize("fault", FAULTS)
    @pytest.mark.parametrize("hosts", [(1, 2), (1, 1)], ids=["two hosts", "one host"])
    @pytest.mark.parametrize("at_finaliser", [False, True], ids=["", "at the finaliser"])
    def test_while_it_pushes(
        self, monkeypatch: pytest.MonkeyPatch, fault: str, hosts: tuple[int, ...], at_finaliser: bool
    ) -> None:
        for after in range(0, 30, 2):
            with hybrid(monkeypatch, hosts) as run:
                run.collect()
                pusher = run.finaliser if at_finaliser else 1 - run.finaliser
                concerned = pusher if "pusher" in fault else run.finaliser
                run.push(pusher, 1, weights(7))
                run.job.moves(after)
                happen(run, fault, concerned)
                self.worker_ends(run)

    @pytest.mark.parametrize("fault", FAULTS)
    @pytest.mark.parametrize("at_finaliser", [False, True], ids=["", "at the finaliser"])
    def test_while_it_tells_how_good_it_is(
        self, monkeypatch: pytest.MonkeyPatch, fault: str, at_finaliser: bool
    ) -> None:
        for after in range(0, 45, 3):
            with hybrid(monkeypatch, (1, 2)) as run:
                run.collect()
                pusher = run.finaliser if at_finaliser else 1 - run.finaliser
                assert run.push(pusher, 1, weights(7)).answer.retcode == 200
                concerned = pusher if "pusher" in fault else run.finaliser
                run.measure(pusher)
                run.job.moves(after)
                happen(run, fault, concerned)
                self.worker_ends(run, pushed=True)

    def worker_ends(self, run: HybridJob, *, pushed: bool = False) -> None:
        """Ask on as a worker does."""
        if not pushed:
            run.until(lambda: any(ok(run.push(place, 1, weights(7)).answer) for place in run.places))
        run.until(lambda: 1 in run.job.store.ends or any(ok(run.measure(n).answer) for n in run.places))
        run.until_ended(1)
        assert run.job.store.ends[1].success, run.result(1)
        for place in run.places:
            assert np.array_equal(run.model(place, 1), weights(7))

    @pytest.mark.parametrize("end", ["time", "disabled", "new instance"])
    @pytest.mark.parametrize("step", ["push", "metrics"])
    def test_nor_when_the_iteration_is_ended_meanwhile(
        self, monkeypatch: pytest.MonkeyPatch, end: str, step: str
    ) -> None:
        """Either it had come so far, or it fails by name; and the next one is like any other."""
        for after in range(0, 34, 2):
            with hybrid(monkeypatch, (1, 2)) as run:
                run.collect()
                if step == "metrics":
                    assert run.push(1, 1, weights(7)).answer.retcode == 200
                asked = run.push(0, 1, weights(7)) if step == "push" else run.measure(0)
                late = run.status.started / 1000 + run.job.policy.global_window - run.job.now
                run.job.moves(after)
                self.end(run, end, late)
                run.job.pass_time(3.0)
                assert asked.answer is not None
                if end == "new instance":
                    assert run.job.number == 1
                    run.job.store.ends.clear()  # of the instance before
                else:
                    run.until_ended(1)
                    published = run.job.store.ends[1].success
                    assert published or run.result(1) in (GLOBAL_TIMEOUT, "Disable instance")
                    for server in run.job.living:
                        newest = server.driver.models.newest_image.arrays["who"]
                        assert np.array_equal(newest, weights(7 if published else 0))
                number = run.job.number
                run.collect()
                assert run.push(0, number, weights(9)).answer.retcode == 200
                assert run.measure(1).answer.retcode == 200
                run.until(lambda run=run, number=number: run.job.number == number + 1)  # type: ignore[misc]
                run.job.pass_time(2.0)
                for place in (0, 1):
                    assert np.array_equal(run.model(place, number), weights(9))

    @staticmethod
    def end(run: HybridJob, how: str, late: float) -> None:
        match how:
            case "time":
                run.job.now += late
                for server in run.job.living:
                    server.reactor.advance(late)
            case "disabled":
                run.job.shared.disable()
                run.job.settle()
                run.job.shared.enable(run.job.policy.last_iteration)
            case "new instance":
                assert run.job.store.new_instance(run.job.store.name, "i_new")
                for server in run.job.living:
                    server.notices.append(b"instance")


def ok(answer: Any) -> bool:
    return not isinstance(answer, str) and answer.retcode == 200


def happen(run: HybridJob, fault: str, concerned: int) -> None:
    """Break something; what lives has Redis again a moment later."""
    job = run.job
    match fault.rpartition(" ")[2]:
        case "Redis":
            run.server(concerned).lose_redis()
        case "dies":
            job.kill(concerned)
        case "wipe":
            for server in job.living:
                server.lose_redis()
            job.store.fail_over(None)
    job.settle()
    for server in job.living:
        server.redis.come_back()


class TestWhoHoldsIt:
    def test_a_server_that_comes_later_gets_what_the_worker_has_pushed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with hybrid(monkeypatch, (1, 2)) as run:
            run.job.pass_time(2.0)
            run.job.kill(1)
            run.job.pass_time(12.0)
            run.collect()
            assert run.push(0, 1, weights(7)).answer.retcode == 200
            run.job.start(1)
            run.job.pass_time(3.0)
            assert run.holds(1, digest_of(7))
            run.job.kill(0)
            run.until(lambda: run.measure(1).answer.retcode == 200)
            run.until_ended(1)
            assert run.job.store.ends[1].success, run.result(1)

    def test_a_server_that_is_busy_takes_what_is_offered_once_it_has_seen_its_name(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with hybrid(monkeypatch, (1, 2)) as run:
            run.collect()
            other = run.server(1 - run.finaliser).driver
            other.busy = True
            push = run.push(run.finaliser, 1, weights(7))
            run.job.settle()
            other.busy = False
            other.look_soon()
            assert push.answer.retcode == 200
            assert run.holds(1 - run.finaliser, digest_of(7))

    @pytest.mark.parametrize("phase", [Phase.TRAINING, Phase.TRAINED])
    def test_what_did_not_arrive_is_offered_again(
        self, monkeypatch: pytest.MonkeyPatch, phase: Phase
    ) -> None:
        with hybrid(monkeypatch, (1, 2)) as run:
            if phase is Phase.TRAINED:
                run.collect()
                run.job.network.silent = True
                assert run.push(run.finaliser, 1, weights(7)).answer.retcode == 200
                run.job.pass_time(3.0)
                wanted = digest_of(7)
            else:
                offered = run.server(0).publication._peers.offer_model
                run.job.pass_time(1.0)
                refuse_offers(run, monkeypatch)
                run.collect()
                wanted = run.status.aggregate
                assert offered
            other = 1 - run.finaliser
            assert not run.holds(other, wanted)
            run.job.network.silent = False
            monkeypatch.undo()
            run.job.pass_time(4.0)
            assert run.holds(other, wanted)

    def test_two_servers_that_ask_each_other_do_not_wait_for_each_other(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with hybrid(monkeypatch, (1, 2)) as run:
            run.job.pass_time(2.0)
            ids = [server.node_id for server in run.job.living]
            digest = digest_of(99)
            for server in run.job.living:
                server.driver.iteration = replace(server.driver.iteration, digest=digest)
            found: list[Any] = []
            for server, other in zip(run.job.living, reversed(ids), strict=True):
                work = server.publication.obtain(digest, 1, [other])
                defer.Deferred.fromCoroutine(work).addBoth(found.append)
            run.job.settle()
            assert found == [Found.NOWHERE, Found.NOWHERE]

    def test_a_model_that_nobody_has_is_waited_for_and_then_told_by_name(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with hybrid(monkeypatch, (1, 2)) as run:
            run.collect()
            run.job.network.silent = True
            pusher = 1 - run.finaliser
            assert run.push(pusher, 1, weights(7)).answer.retcode == 200
            run.job.kill(pusher)
            run.job.network.silent = False
            run.until_ended(1)
            assert run.result(1) == trained_lost(1)


def refuse_offers(run: HybridJob, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcore.errors import PeerError

    async def refused(*given: Any) -> None:
        raise PeerError("not now")

    for server in run.job.living:
        monkeypatch.setattr(server.publication._peers, "offer_model", refused)


class TestAPull:
    def test_after_the_push_and_a_restart_of_all_gives_the_mean_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So that a worker which was started again, too, can take the place of the one before."""
        with hybrid(monkeypatch, (1, 2)) as run:
            run.collect()
            mean = np.array(run.pull(0, 1).answer.feature_map[0].data)
            assert run.push(0, 1, weights(7)).answer.retcode == 200
            for place in (0, 1):
                run.job.kill(place)
            for place in (0, 1):
                run.job.start(place)
            run.until(lambda: ok(run.pull(1, 1).answer))
            assert np.array_equal(run.pull(0, 1).answer.feature_map[0].data, mean)
            assert run.push(1, 1, weights(8)).answer.reason == FINISHED.format(1)
            assert run.measure(1).answer.retcode == 200
            run.until_ended(1)
            assert np.array_equal(run.model(1, 1), weights(7))


class TestTheOperator:
    @pytest.mark.parametrize("phase", [Phase.TRAINING, Phase.TRAINED])
    def test_disables_and_enables(self, monkeypatch: pytest.MonkeyPatch, phase: Phase) -> None:
        with hybrid(monkeypatch, (1, 2)) as run:
            run.collect()
            if phase is Phase.TRAINED:
                assert run.push(0, 1, weights(7)).answer.retcode == 200
            run.job.shared.disable()
            run.job.pass_time(2.0)
            assert isinstance(run.push(1, 1, weights(8)).answer, str)
            assert isinstance(run.measure(1).answer, str)
            assert run.result(1) == "Disable instance"
            run.job.shared.enable(run.job.policy.last_iteration)
            run.collect()
            assert run.push(1, 1, weights(8)).answer.retcode == 201
            assert run.push(1, 2, weights(9)).answer.retcode == 200
            assert run.measure(0).answer.retcode == 200
            run.until_ended(2)
            assert run.job.store.ends[2].success
            for place in (0, 1):
                assert not run.model(place, 1).any()
                assert np.array_equal(run.model(place, 2), weights(9))

    @pytest.mark.parametrize("phase", [Phase.TRAINING, Phase.TRAINED, Phase.CANDIDATE])
    def test_starts_a_new_instance(self, monkeypatch: pytest.MonkeyPatch, phase: Phase) -> None:
        with hybrid(monkeypatch, (1, 2)) as run:
            run.collect()
            if phase is not Phase.TRAINING:
                assert run.push(0, 1, weights(7)).answer.retcode == 200
            if phase is Phase.CANDIDATE:
                pushed = run.measure(0)
                pushed.moved_until(lambda: run.status.phase is Phase.CANDIDATE)
            assert run.job.store.new_instance(run.job.store.name, "i_new")
            for server in run.job.living:
                server.notices.append(b"instance")
            run.job.pass_time(3.0)
            assert run.status.phase is Phase.COLLECTING and run.job.number == 1
            assert run.push(1, 1, weights(8)).answer.retcode == 201
            run.collect()
            assert run.push(1, 1, weights(9)).answer.retcode == 200
            assert run.measure(0).answer.retcode == 200
            run.until_ended(1)
            for place in (0, 1):
                assert np.array_equal(run.model(place, 1), weights(9))


class TestAStop:
    """A server that stops in order leaves nothing behind that only it has."""

    @pytest.mark.parametrize("phase", [Phase.TRAINING, Phase.TRAINED])
    def test_gives_its_model(self, monkeypatch: pytest.MonkeyPatch, phase: Phase) -> None:
        with hybrid(monkeypatch, (1, 2)) as run:
            run.collect()
            place, wanted = run.finaliser, run.status.aggregate
            if phase is Phase.TRAINED:
                run.job.network.silent = True
                assert run.push(place, 1, weights(7)).answer.retcode == 200
                run.job.network.silent = False
                wanted = digest_of(7)
            leaving, other = run.server(place), run.server(1 - place)
            if phase is Phase.TRAINING:
                other.publication.take("")
            assert not run.holds(1 - place, wanted)
            departure = Departure(leaving.driver, leaving.driver._parts)
            stopped: list[Any] = []
            defer.Deferred.fromCoroutine(departure.hand_over()).addBoth(stopped.append)
            run.job.settle()
            assert stopped == [None]
            assert run.holds(1 - place, wanted)
            assert not other.ledgers.adopted, "the ledger is needed no more"
