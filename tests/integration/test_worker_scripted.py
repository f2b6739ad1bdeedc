"""A worker with a real Redis and real connections, and servers whose rounds a test decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from integration.cluster import wait_until
from integration.redis_fixture import PrivateRedis, ReactorThread, redis_client
from twisted.logger import LogLevel, capturedLogs

from fedcore.config import Role, Settings, load_settings
from fedcore.core.admission import DISABLED_OR_FINISHED, SAFEMODE
from fedcore.core.job import RunningState
from fedcore.core.worker import Step
from fedcore.errors import ConfigError, NonFinite, PeerError
from fedcore.net.node_listener import NodeListener, Reply, Request
from fedcore.observe.metrics import WorkerMetrics
from fedcore.services.worker import Worker
from fedcore.services.worker_trainer import CheckedTrainer, TrainerFailed
from fedcore.store.cluster_state import ClusterState
from fedcore.store.keys import InstanceKeys, instance_name
from fedcore.store.redis import Redis
from fedcore.wire import codec
from fedcore.wire.messages import (
    FeatureMap,
    RequestPullWeight,
    RequestPushMetrics,
    RequestPushWeight,
    ResponsePullWeight,
    ResponsePushMetrics,
    ResponsePushWeight,
)
from fedcore.wire.node import Command, PayloadKind

NEVER = 10_000
Arrays = dict[str, np.ndarray]


def model(value: float) -> Arrays:
    return {"a.weight": np.full((2, 3), value, np.float32), "b.bias": np.full(2, -value, np.float32)}


class Job:
    """A hybrid job in Redis and in memory; its aggregate of iteration k is ``model(10 * k)``.

    Attributes:
        number: current iteration.
        ready: whether its aggregate is there.
        pushed: iteration -> weights that count, in the order in which they came.
        metrics: iteration -> what was told of them.
        pulls: iterations of the pulls that were answered with weights.
        words: (round, server) -> answers that come before any other: text, bytes or an exception.
    """

    def __init__(self, loop: ReactorThread, redis: Redis, name: str, last: int) -> None:
        self.loop, self.redis, self.name, self.last = loop, redis, name, last
        self.number = 1
        self.ready = True
        self.aggregate: Callable[[int], Arrays] = lambda number: model(10.0 * number)
        self.pushed: dict[int, Arrays] = {}
        self.metrics: dict[int, tuple[float, float]] = {}
        self.pulls: list[int] = []
        self.words: dict[tuple[int, int], list[Any]] = {}
        self.asked: list[tuple[int, int]] = []
        self.begin("i_1")

    # ---- what a test does

    def begin(self, instance: str) -> None:
        """Start an instance in iteration 1."""
        self.cluster = ClusterState(self.redis, self.name, instance, 60_000)
        self.number = 1
        self.loop.run(self.cluster.create(1, success=True, result="", running=RunningState.RUNNING, base=""))
        self.command("SET", instance_name(self.name), instance)

    def command(self, *words: Any) -> Any:
        return self.loop.run(self.redis.command(*words))

    def run_state(self, state: RunningState) -> None:
        self.command("HSET", self.cluster.keys.status, "runningState", int(state))

    def workers(self) -> list[str]:
        return [node.node_id for node in self.loop.run(self.cluster.nodes("worker"))]

    @contextmanager
    def server(self, n: int, port: int = 0) -> Iterator[Any]:
        """Run server ``n``; its id begins with its number, so that they are asked in that order."""
        handlers = {Command.ROUND_REQUEST: lambda request: self._round(n, request)}
        listening: dict[str, Any] = {}

        def open_() -> int:
            port_ = self.loop.reactor.listenTCP(
                port, SimpleFactory(lambda: listening["factory"]), interface=f"127.0.0.{10 + n}"
            )
            listening["port"] = port_
            number: int = port_.getHost().port
            return number

        number = self.loop.call(open_)
        node_id = f"127.0.0.{10 + n}:{number}::2022-10-01-00:00:00.000.000::{10000 + n}"
        listening["factory"] = factory = NodeListener(
            node_id, handlers, max_connections=10, allowed=lambda host: True, reactor=self.loop.reactor
        )
        address = f"127.0.0.{10 + n}:{number}"
        for instance in ("i_1", "i_2"):
            keys = InstanceKeys(self.name, instance)
            self.command("HSET", keys.nodes("server"), node_id, address)
            self.command("SET", keys.heartbeat("server", node_id), address)
        view = SimpleNamespace(node_id=node_id)

        def close() -> Any:
            listening["port"].stopListening()
            return factory.stop(0.0)

        view.close = lambda: self.loop.call(close)
        try:
            yield view
        finally:
            view.close()

    # ---- what the servers do

    async def _round(self, n: int, request: Request) -> Reply:
        number = request.meta.user_cmd
        self.asked.append((number, n))
        for key in ((number, n), (number, -1)):
            if self.words.get(key):
                word = self.words[key].pop(0)
                if isinstance(word, Exception):
                    raise word
                if callable(word):
                    word = word()
                if word is not None:
                    return Reply(word.encode() if isinstance(word, str) else word)
        rounds = {0: self._pull, 1: self._push, 5: self._metrics}
        return Reply(codec.encode(await rounds[number](request)), PayloadKind.FLATBUFFERS)

    async def _pull(self, request: Request) -> ResponsePullWeight:
        asked = codec.decode(RequestPullWeight, request.data)
        arrays = self.aggregate(self.number)
        assert asked.weight_names is not None
        unknown = set(asked.weight_names) - set(arrays)
        if unknown:
            return ResponsePullWeight(
                400, f"Parameter {unknown.pop()} is not registered in server.", self.number
            )
        if asked.iteration != self.number or not self.ready:
            return ResponsePullWeight(201, "The aggregation for the weights is not done yet.", self.number)
        self.pulls.append(self.number)
        weights = tuple(FeatureMap(name, arrays[name].reshape(-1)) for name in asked.weight_names)
        return ResponsePullWeight(200, "", self.number, weights)

    async def _push(self, request: Request) -> ResponsePushWeight:
        asked = codec.decode(RequestPushWeight, request.data)
        if asked.iteration != self.number:
            return ResponsePushWeight(201, "PushWeight iteration number is invalid", self.number)
        if asked.iteration in self.pushed:
            return ResponsePushWeight(200, f"Model of iteration of {self.number} has finished", self.number)
        assert asked.feature_map is not None
        self.pushed[asked.iteration] = {
            str(item.weight_fullname): np.array(item.data) for item in asked.feature_map
        }
        return ResponsePushWeight(200, "PushWeight succeed.", self.number)

    async def _metrics(self, request: Request) -> ResponsePushMetrics:
        asked = codec.decode(RequestPushMetrics, request.data)
        if self.number not in self.pushed:
            return ResponsePushMetrics(300)
        self.metrics[self.number] = (asked.loss, asked.accuracy)
        await self.advance()
        return ResponsePushMetrics(200)

    async def advance(self) -> None:
        """Go on to the next iteration; finish the job after the last one."""
        self.number += 1
        state = RunningState.FINISH if self.number > self.last else RunningState.RUNNING
        await self.redis.command(
            "HSET", self.cluster.keys.status, "iterationNum", self.number, "runningState", int(state)
        )
        if state is RunningState.FINISH:
            self.words[0, -1] = [DISABLED_OR_FINISHED] * NEVER


class SimpleFactory:
    """A factory that is known only once its port is."""

    noisy = False

    def __init__(self, factory: Callable[[], NodeListener]) -> None:
        self._factory = factory

    def doStart(self) -> None:
        """Nothing to do."""

    def doStop(self) -> None:
        """Nothing to do."""

    def buildProtocol(self, address: Any) -> Any:
        return self._factory().buildProtocol(address)


class AddingTrainer:
    """Adds one to each weight in each step."""

    def __init__(self, value: float = 0.0) -> None:
        self.arrays = model(value)
        self.steps: list[int] = []
        self.loaded: list[float] = []
        self.problem: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()

    def weights(self) -> Arrays:
        return self.arrays

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        self.loaded.append(float(weights["a.weight"][0, 0]))
        self.arrays = {name: np.array(values) for name, values in weights.items()}

    def train(self, steps: int) -> tuple[float, float]:
        self.began.set()
        assert self.gate.wait(30)
        self.steps.append(steps)
        if self.problem is not None:
            problem, self.problem = self.problem, None
            raise problem
        for values in self.arrays.values():
            np.add(values, steps, out=values)
        return 0.5, 0.75


class Running:
    """A worker under way.

    Attributes:
        ends: why it cannot go on; None when the job is finished.
    """

    def __init__(
        self, loop: ReactorThread, settings: Settings, redis: Redis, trainer: Any, frequency: int
    ) -> None:
        self.loop = loop
        self.trainer = trainer
        self.ends: list[Any] = []
        self.metrics = WorkerMetrics()
        self.statuses: list[str] = []

        def start() -> Worker:
            worker = Worker(
                settings,
                frequency,
                CheckedTrainer(trainer),
                redis,
                self.metrics,
                loop.reactor,
                self._told,
            )
            worker.on_end = self.ends.append
            for service in worker.services[1:]:  # Redis is shared
                service.startService()
            return worker

        self.worker: Worker = loop.call(start)
        self.stopped = False

    def _told(self, status: str) -> None:
        if status == "the job is finished" and status not in self.statuses[-1:]:
            self.ends.append(None)
        self.statuses.append(status)

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            for service in reversed(self.worker.services[1:]):
                self.loop.call(service.stopService)

    def count(self, outcome: str) -> float:
        value = self.metrics.registry.get_sample_value("fl_worker_iterations_total", {"outcome": outcome})
        return value or 0.0

    def reasons(self) -> dict[str, str]:
        found = {name: check() for name, check in self.worker.checks().items()}
        return {name: reason for name, reason in found.items() if reason is not None}


class Rig:
    """A job, and how to run workers for it."""

    def __init__(self, loop: ReactorThread, redis: Redis, folder: Path, name: str, stack: ExitStack) -> None:
        self.loop, self.redis, self.name = loop, redis, name
        self._stack = stack
        file = folder / "fl.yaml"
        self._values: dict[str, Any] = {
            "fl_name": name,
            "fl_iteration_num": 3,
            "server_mode": "HYBRID_TRAINING",
            "enable_ssl": False,
            "distributed_cache": {"type": "redis", "address": "127.0.0.1:6379"},
            "round": {
                "start_fl_job_threshold": 1,
                "start_fl_job_time_window": 30000,
                "update_model_ratio": 1.0,
                "update_model_time_window": 30000,
                "global_iteration_time_window": 60000,
            },
            "summary": {"metrics_file": "metrics.json", "failure_event_file": "event.txt"},
            "fedcore": {"worker": {"reply_timeout": 2.0}},
        }
        file.write_text(yaml.safe_dump(self._values))
        self.settings = load_settings(file, Role.WORKER).settings

    def job(self, last: int = 3) -> Job:
        return Job(self.loop, self.redis, self.name, last)

    def worker(self, trainer: Any = None, frequency: int = 1) -> Running:
        running = Running(self.loop, self.settings, self.redis, trainer or AddingTrainer(), frequency)
        self._stack.callback(running.stop)
        self._stack.callback(running.trainer.gate.set)
        return running


@pytest.fixture
def rig(loop: ReactorThread, redis: Redis, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(loop, redis, tmp_path, f"worker-{request.node.name}", stack)


def first(weights: Arrays) -> float:
    return float(weights["a.weight"].reshape(-1)[0])


@pytest.mark.parametrize("frequency", [1, 4])
def test_each_aggregate_is_trained_once_and_the_worker_ends_with_the_job(rig: Rig, frequency: int) -> None:
    job = rig.job()
    with job.server(0):
        worker = rig.worker(frequency=frequency)
        wait_until(lambda: worker.ends, "the end")
    assert worker.ends == [None]
    assert job.pulls == [1, 2, 3]
    assert worker.trainer.steps == [frequency] * 3
    assert {number: first(weights) for number, weights in job.pushed.items()} == {
        number: 10.0 * number + frequency for number in (1, 2, 3)
    }
    assert job.pushed[1]["b.bias"].tolist() == [-10.0 + frequency] * 2
    assert job.metrics == dict.fromkeys((1, 2, 3), (0.5, 0.75))
    assert worker.count("done") == 3
    assert worker.metrics.registry.get_sample_value("fl_worker_training_steps_total") == 3 * frequency


def test_what_is_not_ready_is_asked_for_again(rig: Rig) -> None:
    job = rig.job(last=1)
    job.ready = False
    with job.server(0):
        worker = rig.worker()
        wait_until(lambda: job.asked.count((0, 0)) >= 2, "two questions")
        assert worker.trainer.steps == []
        assert worker.reasons() == {}
        job.ready = True
        wait_until(lambda: worker.ends, "the end")
    assert first(job.pushed[1]) == 11.0


@pytest.mark.parametrize(
    "word",
    [
        SAFEMODE,
        DISABLED_OR_FINISHED,
        "An inner error occurred",
        b"\x07",
        PeerError("not in fedcore.node.allow"),
    ],
    ids=["safemode", "stopping", "nonsense", "short", "refused"],
)
def test_a_server_that_is_no_help_is_passed_over(rig: Rig, word: Any) -> None:
    job = rig.job(last=2)
    for number in (0, 1, 5):
        job.words[number, 0] = [word] * NEVER
    with job.server(0), job.server(1):
        worker = rig.worker()
        wait_until(lambda: worker.ends, "the end")
    assert sorted(job.metrics) == [1, 2]
    assert {n for _, n in job.asked} == {0, 1}


def test_a_worker_that_is_not_allowed_is_told_the_remedy(rig: Rig) -> None:
    job = rig.job()
    job.words[0, 0] = [PeerError("10.9.9.9 is not in fedcore.node.allow")] * NEVER
    refused = {"round": "pullWeight", "outcome": "refused"}
    with job.server(0):
        worker = rig.worker()
        wait_until(lambda: rounds_of(worker, refused), "a refusal")
        assert "in the servers' YAML" in worker.reasons()["servers"]
        assert not rounds_of(worker, refused | {"outcome": "unreachable"})


def rounds_of(worker: Running, labels: dict[str, str]) -> float:
    return worker.metrics.registry.get_sample_value("fl_worker_requests_total", labels) or 0.0


def test_the_end_of_the_job_is_no_warning(rig: Rig) -> None:
    job = rig.job(last=1)
    job.words[0, 0] = [DISABLED_OR_FINISHED]
    with job.server(0), capturedLogs() as events:
        worker = rig.worker()
        wait_until(lambda: worker.ends, "the end")
    told = {event["log_level"] for event in events if event.get("reason") == DISABLED_OR_FINISHED}
    assert told == {LogLevel.info}


def test_a_server_that_has_gone_is_passed_over(rig: Rig) -> None:
    job = rig.job(last=2)
    with job.server(0) as gone, job.server(1):
        gone.close()
        worker = rig.worker()
        wait_until(lambda: worker.ends, "the end")
    assert sorted(job.metrics) == [1, 2]


def test_a_push_whose_answer_was_lost_is_followed_by_metrics(rig: Rig) -> None:
    """The second server knows of the weights that the first one has taken; nobody else has pushed any."""
    job = rig.job(last=1)
    job.words[1, 0] = [lambda: _take_and_lose(job)] * NEVER
    with job.server(0), job.server(1):
        worker = rig.worker()
        wait_until(lambda: worker.ends, "the end")
    assert job.metrics == {1: (0.5, 0.75)}
    assert worker.count("late") == 0


def _take_and_lose(job: Job) -> str:
    """Take a push as the server would, and answer with what cannot be read."""
    job.pushed.setdefault(job.number, model(11.0))
    return "lost"


def test_of_two_workers_the_faster_one_counts_and_the_other_tells_no_metrics(rig: Rig) -> None:
    job = rig.job(last=2)
    slow = AddingTrainer()
    slow.gate.clear()
    with job.server(0):
        late = rig.worker(slow)
        wait_until(slow.began.is_set, "the slow one trains")
        job.pushed[1] = model(12.0)
        slow.gate.set()
        wait_until(lambda: late.count("late") == 1, "the slow one is told")
        assert job.metrics == {}
        slow.gate.clear()
        job.loop.run(job.advance())
        wait_until(lambda: job.pulls == [1, 2], "the next pull")
        slow.gate.set()
        wait_until(lambda: late.ends, "the end")
    assert first(job.pushed[1]) == 12.0
    assert list(job.metrics) == [2]


def test_weights_of_an_iteration_that_is_over_are_not_pushed(rig: Rig) -> None:
    job = rig.job(last=2)
    trainer = AddingTrainer()
    trainer.gate.clear()
    with job.server(0):
        worker = rig.worker(trainer)
        wait_until(trainer.began.is_set, "training")
        job.loop.run(job.advance())
        trainer.gate.set()
        wait_until(lambda: worker.ends, "the end")
    assert list(job.pushed) == [2]
    assert first(job.pushed[2]) == 21.0
    assert worker.count("discarded") == 1


def test_a_new_instance_is_followed(rig: Rig) -> None:
    job = rig.job(last=2)
    trainer = AddingTrainer()
    with job.server(0):
        trainer.gate.clear()
        worker = rig.worker(trainer)
        wait_until(trainer.began.is_set, "training")
        wait_until(lambda: len(job.workers()) == 1, "on the list")
        before = job.cluster
        job.begin("i_2")
        trainer.gate.set()
        wait_until(lambda: worker.ends, "the end")
        wait_until(lambda: len(job.workers()) == 1, "on the new list")
        assert job.loop.run(before.nodes("worker")) == []
    assert list(job.pushed) == [1, 2]
    assert worker.count("discarded") == 1


def test_an_aggregate_with_nan_is_refused_and_the_last_good_weights_are_trained(rig: Rig) -> None:
    job = rig.job(last=2)
    job.aggregate = lambda number: model(10.0) if number == 1 else model(float("nan"))
    with job.server(0):
        worker = rig.worker()
        wait_until(lambda: worker.ends, "the end")
    assert worker.trainer.loaded == [10.0, 11.0]
    assert first(job.pushed[2]) == 12.0


def test_without_good_weights_an_iteration_with_nan_is_left_alone(rig: Rig) -> None:
    job = rig.job(last=2)
    job.aggregate = lambda number: model(float("inf")) if number == 1 else model(20.0)
    with job.server(0):
        worker = rig.worker()
        wait_until(lambda: worker.count("skipped") == 1, "it is left alone")
        job.loop.run(job.advance())
        wait_until(lambda: worker.ends, "the end")
    assert list(job.pushed) == [2]
    assert worker.trainer.loaded == [20.0]


@pytest.mark.parametrize("how", ["raises", "loss", "weights"])
def test_a_training_that_diverges_is_not_pushed(rig: Rig, how: str) -> None:
    class Diverging(AddingTrainer):
        def train(self, steps: int) -> tuple[float, float]:
            if self.loaded == [10.0]:
                if how == "raises":
                    raise NonFinite("diverged")
                if how == "loss":
                    return float("nan"), 0.5
                self.arrays["b.bias"][1] = np.inf
            return super().train(steps)

    job = rig.job(last=2)
    with job.server(0):
        worker = rig.worker(Diverging())
        wait_until(lambda: worker.count("diverged") == 1, "it is told")
        job.loop.run(job.advance())
        wait_until(lambda: worker.ends, "the end")
    assert list(job.pushed) == [2]


def test_a_disabled_job_is_waited_for(rig: Rig) -> None:
    job = rig.job(last=1)
    job.run_state(RunningState.DISABLE)
    job.words[0, 0] = [DISABLED_OR_FINISHED]
    with job.server(0):
        worker = rig.worker()
        wait_until(lambda: any("looking" in status for status in worker.statuses), "a second")
        assert not worker.ends
        assert job.asked == []
        job.run_state(RunningState.RUNNING)
        wait_until(lambda: worker.ends, "the end")
    assert worker.ends == [None]
    assert list(job.metrics) == [1]


def test_a_finished_job_leaves_nothing_to_do_even_if_its_servers_have_gone(rig: Rig) -> None:
    job = rig.job()
    job.run_state(RunningState.FINISH)
    worker = rig.worker()
    wait_until(lambda: worker.ends, "the end")
    assert worker.ends == [None]
    wait_until(lambda: not worker.reasons(), "it is ready all the same")


def test_a_job_of_another_model_ends_the_worker_with_the_reason(rig: Rig) -> None:
    job = rig.job()
    job.aggregate = lambda number: {"a.weight": np.zeros((2, 3), np.float32)}
    with job.server(0):
        worker = rig.worker()
        wait_until(lambda: worker.ends, "the end")
    assert isinstance(worker.ends[0], ConfigError)
    assert "Parameter b.bias is not registered" in str(worker.ends[0])


def test_weights_of_another_size_end_the_worker_with_the_reason(rig: Rig) -> None:
    job = rig.job()
    job.aggregate = lambda number: model(1.0) | {"b.bias": np.zeros(3, np.float32)}
    with job.server(0):
        worker = rig.worker()
        wait_until(lambda: worker.ends, "the end")
    assert isinstance(worker.ends[0], ConfigError)
    assert "the servers sent 3 values of 'b.bias', the trainer has 2" in str(worker.ends[0])


def test_an_exception_of_the_trainer_ends_the_worker_with_the_reason(rig: Rig) -> None:
    job = rig.job()
    trainer = AddingTrainer()
    trainer.problem = RuntimeError("CUDA out of memory")
    with job.server(0), capturedLogs() as events:
        worker = rig.worker(trainer)
        wait_until(lambda: worker.ends, "the end")
    assert isinstance(worker.ends[0], TrainerFailed)
    assert "RuntimeError: CUDA out of memory" in str(worker.ends[0])
    tracebacks = [event["log_failure"].getTraceback() for event in events if "log_failure" in event]
    assert len(tracebacks) == 1
    assert "in train\n" in tracebacks[0], "the line of the user's code"
    assert job.pushed == {}


def test_a_worker_is_on_the_list_until_it_stops(rig: Rig) -> None:
    job = rig.job()
    worker = rig.worker()
    [worker_id] = wait_until(job.workers, "on the list")
    assert worker_id.startswith("worker_fl_20")
    hash_, beat = job.cluster.keys.nodes("worker"), job.cluster.keys.heartbeat("worker", worker_id)
    assert job.command("HGET", hash_, worker_id) == job.command("GET", beat) == worker_id.encode()
    assert 8 <= job.command("TTL", beat) <= 10
    assert job.command("TTL", hash_) > 600_000
    assert worker.reasons() == {"servers": "the job has no living server"}
    worker.stop()
    assert job.workers() == []
    assert job.command("EXISTS", beat) == 0


def test_a_worker_waits_for_the_job(rig: Rig) -> None:
    worker = rig.worker()
    wait_until(lambda: worker.statuses, "it runs")
    assert worker.reasons()["membership"] == "not on the list of workers yet"
    job = rig.job(last=1)
    with job.server(0):
        wait_until(lambda: worker.ends, "the end")
    assert list(job.metrics) == [1]


def test_a_stop_does_not_wait_for_a_training(rig: Rig) -> None:
    job = rig.job()
    trainer = AddingTrainer()
    trainer.gate.clear()
    with job.server(0):
        worker = rig.worker(trainer)
        wait_until(trainer.began.is_set, "training")
        worker.stop()
        assert worker.worker.training
        assert worker.ends == []
        trainer.gate.set()
        wait_until(lambda: not worker.worker.training, "the thread ends")
    assert job.pushed == {}


def test_a_lost_redis_is_waited_for(
    loop: ReactorThread, own_server: PrivateRedis, tmp_path: Path, rig: Rig
) -> None:
    with redis_client(loop, own_server.port) as redis, ExitStack() as stack:
        loop.run(redis.connected())
        own = Rig(loop, redis, tmp_path, "lost", stack)
        job = own.job(last=2)
        trainer = AddingTrainer()
        trainer.gate.clear()
        with job.server(0):
            worker = own.worker(trainer)
            wait_until(trainer.began.is_set, "training")
            own_server.stop(keep=True)
            trainer.gate.set()
            wait_until(lambda: worker.worker._progress.step is Step.CHECKING, "it is done")
            wait_until(lambda: worker.reasons().keys() == {"redis", "membership"}, "it says so")
            assert job.pushed == {}
            own_server.start()
            loop.run(redis.connected())
            wait_until(lambda: worker.ends, "the end")
        assert worker.ends == [None]
        assert {number: first(weights) for number, weights in job.pushed.items()} == {1: 11.0, 2: 21.0}
        assert job.pulls == [1, 2]
