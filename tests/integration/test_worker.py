"""fl-workerd with real servers: what it does in order, and what becomes of it when it, they or Redis are gone.

The worker's trainer adds one to every weight in each step, so a model tells how often it was trained, and on what. It
waits while a file is there, so a test can act in the middle of a training.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.cluster import Cluster, wait_until
from integration.faults import Fleet, Run, fleet_of
from integration.links import Link
from integration.oracle import MODEL, mean_of
from integration.watching import RedisReader, status_of

from fedcore.wire import codec
from fedcore.wire.messages import FeatureMap, RequestPushWeight, ResponsePushWeight
from fedctl.processes import free_ports

ONE, TWO, TWO_HOSTS = {0: 0}, {0: 0, 1: 0}, {0: 0, 1: 1}
HOSTS = pytest.mark.parametrize("hosts", [ONE, TWO, TWO_HOSTS], ids=["alone", "one host", "two hosts"])
APART = pytest.mark.parametrize("hosts", [ONE, TWO_HOSTS], ids=["alone", "two hosts"])
PHASES = pytest.mark.parametrize("phase", ["waiting", "training"])
EVERYBODY = range(4)
SUCCESS = "Push metrics finished! This iteration is valid. Proceed to next iteration."
STEPS = 3
EX_CONFIG = 78
TRAINER = """
import pathlib, time
import numpy as np

class Adding:
    def __init__(self, options, device):
        folder = pathlib.Path(options["folder"])
        self.gate, self.diary, self.fails = folder / "gate", folder / "diary", folder / "fails"
        self.arrays = {"whose": np.zeros(SIZE, np.float32), "all": np.zeros((2, 3), np.float32)}

    def weights(self):
        return self.arrays

    def load(self, weights):
        self.arrays = {name: np.array(values) for name, values in weights.items()}

    def train(self, steps):
        with self.diary.open("a") as diary:
            diary.write("training\\n")
        while self.gate.exists():
            time.sleep(0.01)
        if self.fails.exists():
            raise RuntimeError("the trainer is broken")
        self.arrays = {name: values + np.float32(steps) for name, values in self.arrays.items()}
        return 0.25, 0.75
""".replace("SIZE", str(MODEL["whose"].size))


class Works:
    """The workers of a fleet, numbered.

    Attributes:
        fleet: the servers.
        run: the clients.
        links: worker -> its way to Redis.
    """

    def __init__(self, fleet: Fleet, run: Run, stack: ExitStack) -> None:
        self.fleet, self.run = fleet, run
        self.links: dict[int, Link] = {}
        self.admin: dict[int, int] = {}
        self._stack = stack
        (self.cluster.directory / "adding.py").write_text(TRAINER)

    @property
    def cluster(self) -> Cluster:
        return self.fleet.cluster

    def folder(self, w: int) -> Path:
        folder = self.cluster.directory / f"worker-{w}"
        folder.mkdir(exist_ok=True)
        return folder

    def start(self, w: int = 0, *options: str, ready: bool = True) -> None:
        """Start a worker; wait until it is ready."""
        if w not in self.links:
            self.links[w] = self._stack.enter_context(Link(self.cluster.redis_port))
            [self.admin[w]] = free_ports(1)
        self.cluster.spawn(
            self.name(w),
            *self.cluster.command("workerd"),
            *("--yaml-config", str(self.cluster.yaml_of(100 + w, self.links[w].port))),
            *("--trainer", "adding:Adding", "--set", f"folder={self.folder(w)}"),
            *("--sync-frequency", str(STEPS), "--admin-address", f"127.0.0.1:{self.admin[w]}"),
            *options,
        )
        if ready:
            wait_until(lambda: self.ready(w), f"{self.name(w)} is ready")

    @staticmethod
    def name(w: int) -> str:
        return f"worker-{w}"

    def kill(self, w: int = 0, number: int = signal.SIGKILL) -> int:
        return self.cluster.kill(self.name(w), number)

    def ended(self, w: int = 0) -> int | None:
        return self.cluster.processes[self.name(w)].poll()

    def ready(self, w: int = 0) -> bool:
        assert self.ended(w) is None, self.cluster.log(self.name(w))
        answer = self.cluster.get_http(self.admin[w], "/readyz")
        return answer is not None and answer[0] == 200

    def reasons(self, w: int = 0) -> dict[str, str]:
        answer = self.cluster.get_http(self.admin[w], "/readyz")
        return {} if answer is None else json.loads(answer[1])["reasons"]

    def metric(self, line: str, w: int = 0) -> float:
        answer = self.cluster.get_http(self.admin[w], "/metrics")
        assert answer is not None
        rows = [row for row in answer[1].decode().splitlines() if row.startswith(line + " ")]
        return float(rows[0].rpartition(" ")[2]) if rows else 0.0

    def count(self, outcome: str, w: int = 0) -> float:
        return self.metric(f'fl_worker_iterations_total{{outcome="{outcome}"}}', w)

    def hold(self, w: int = 0) -> None:
        """Let the next training wait."""
        (self.folder(w) / "gate").touch()

    def release(self, w: int = 0) -> None:
        """Let a training that waits go on."""
        (self.folder(w) / "gate").unlink()

    def trainings(self, w: int = 0) -> int:
        diary = self.folder(w) / "diary"
        return len(diary.read_text().splitlines()) if diary.exists() else 0

    def devices(self) -> None:
        """Let the devices do their part of an iteration."""
        self.run.start_all(EVERYBODY)
        self.run.upload(EVERYBODY)

    def status(self) -> dict[str, str]:
        with RedisReader(self.cluster.redis_port) as redis:
            return status_of(redis)

    def wait_for(self, iteration: int, seconds: float = 20.0) -> None:
        """Wait until an iteration is the current one."""
        wait_until(
            lambda: int(self.status().get("iterationNum", 0)) >= iteration, f"iteration {iteration}", seconds
        )

    def into(self, phase: str, iteration: int) -> None:
        """Bring worker 0 into a phase of an iteration: waiting for the devices, or training."""
        if phase == "training":
            self.hold()
            before = self.trainings()
            self.devices()
            wait_until(lambda: self.trainings() > before, "the worker trains")
        else:
            wait_until(lambda: self.status()["iterationNum"] == str(iteration), "the iteration")

    def out_of(self, phase: str) -> None:
        """Let what ``into`` has brought to a phase go on."""
        if phase == "training":
            self.release()
        else:
            self.devices()

    def check(self, iteration: int, trained: int = STEPS) -> None:
        """Fail unless every server gives the model of an iteration, trained by so many steps."""
        expected = {name: values + trained for name, values in mean_of(EVERYBODY, iteration).items()}
        for n in self.fleet.running():
            assert wait_until(
                lambda n=n: same(self.fleet.at(n), iteration, expected),
                f"model {iteration} of server {n}",
                10,
            )


def same(server: Cluster, iteration: int, expected: Mapping[str, Any]) -> bool:
    reply = server.model(iteration)
    if isinstance(reply, str) or reply.retcode != 200:
        return False
    found = {item.weight_fullname: np.array(item.data) for item in reply.feature_map}
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    return True


@contextmanager
def works(directory: Path, hosts: Mapping[int, int], **settings: Any) -> Iterator[Works]:
    """Start the servers of a hybrid job."""
    sections = {
        "node": {"worker_http": True},
        "device": {"hold_time": 0.5, "retry_margin": 0.1},
        "worker": {"reply_timeout": 2.0},
    }
    with (
        fleet_of(directory, hosts, places=len(EVERYBODY), fedcore=sections, start=False, **settings) as fleet,
        ExitStack() as stack,
    ):
        fleet.cluster.settings["server_mode"] = "HYBRID_TRAINING"
        fleet.start_all()
        with Run(fleet, probes=False) as run:
            yield Works(fleet, run, stack)
        fleet.check_alive()


@HOSTS
def test_a_worker_trains_each_iteration_until_the_job_is_finished(
    tmp_path: Path, hosts: dict[int, int]
) -> None:
    with works(tmp_path, hosts, fl_iteration_num=3) as job:
        job.start()
        for iteration in (1, 2, 3):
            job.devices()
            job.wait_for(iteration + 1)
            assert job.status()["lastIterationResult"] == SUCCESS
            job.check(iteration)
        wait_until(lambda: job.metric('fl_worker_step{step="finished"}') == 1, "the worker sees it")
        wait_until(job.ready, "it stays, so that its unit is as it should be")
        assert job.trainings() == 3
        log = job.cluster.log("worker-0")
        assert log.count("the job is finished") == 1
        assert job.kill(number=signal.SIGTERM) == 0
        assert "Traceback" not in job.cluster.log("worker-0")


def test_a_worker_goes_on_with_a_new_instance_of_a_finished_job(tmp_path: Path) -> None:
    with works(tmp_path, ONE, fl_iteration_num=1) as job:
        job.start()
        job.devices()
        wait_until(lambda: job.metric('fl_worker_step{step="finished"}') == 1, "the worker sees it")
        job.cluster.start_scheduler()
        assert job.cluster.operate("newInstance", {})[0] == 200
        wait_until(lambda: job.metric('fl_worker_step{step="pulling"}') == 1, "it is at work again")
        assert job.ended() is None


@APART
@PHASES
def test_a_worker_that_is_killed_and_started_again(tmp_path: Path, hosts: dict[int, int], phase: str) -> None:
    with works(tmp_path, hosts) as job:
        job.start()
        job.into(phase, 1)
        job.kill()
        job.start(ready=False)
        job.out_of(phase)
        job.wait_for(2)
        job.check(1)
        job.devices()
        job.wait_for(3)
        job.check(2)


@pytest.mark.parametrize(
    ("hosts", "phase"), [(ONE, "training"), (TWO_HOSTS, "waiting")], ids=["training", "waiting"]
)
def test_a_worker_that_is_paused(tmp_path: Path, hosts: dict[int, int], phase: str) -> None:
    """Longer than its heartbeat lives."""
    with works(tmp_path, hosts) as job:
        job.start()
        job.into(phase, 1)
        job.cluster.pause("worker-0")
        wait_until(lambda: not workers_of(job), "it is off the list", 15)
        job.out_of(phase)
        job.cluster.resume("worker-0")
        job.wait_for(2)
        job.check(1)
        wait_until(lambda: workers_of(job), "it is on the list")


def workers_of(job: Works) -> list[str]:
    with RedisReader(job.cluster.redis_port) as redis:
        instance = redis.ask("GET", "ms_fl:job:InstanceName:String")
        return [str(key) for key in redis.ask("KEYS", f"ms_fl:job:{instance}:worker:heartbeat:*")]


@APART
def test_a_worker_that_comes_back_too_late_costs_one_iteration(tmp_path: Path, hosts: dict[int, int]) -> None:
    with works(tmp_path, hosts, global_iteration_time_window=4000) as job:
        job.start()
        job.into("training", 1)
        job.cluster.pause("worker-0")
        job.wait_for(2)
        assert job.status()["lastIterationResult"].startswith("Global timer timeout!")
        job.release()
        job.cluster.resume("worker-0")
        wait_until(lambda: job.count("discarded") == 1, "the weights are thrown away")
        job.devices()
        job.wait_for(3)
        job.check(2)


@PHASES
@pytest.mark.parametrize(("how", "hosts"), [("cut", ONE), ("hang", TWO_HOSTS)], ids=["cut", "hang"])
def test_a_worker_that_is_cut_off_from_redis(
    tmp_path: Path, hosts: dict[int, int], phase: str, how: str
) -> None:
    with works(tmp_path, hosts) as job:
        job.start()
        job.into(phase, 1)
        getattr(job.links[0], how)()
        job.out_of(phase)
        wait_until(lambda: "redis" in job.reasons(), "it says so")
        assert job.status()["iterationNum"] == "1"
        job.links[0].restore()
        job.wait_for(2)
        job.check(1)


@PHASES
@pytest.mark.parametrize(("fault", "hosts"), [("restart", ONE), ("wipe", TWO_HOSTS)], ids=["restart", "wipe"])
def test_redis_is_lost(tmp_path: Path, hosts: dict[int, int], phase: str, fault: str) -> None:
    with works(tmp_path, hosts) as job:
        job.start()
        job.into(phase, 1)
        (job.fleet.restart_redis if fault == "restart" else job.fleet.wipe_redis)()
        wait_until(lambda: job.status().get("iterationNum") == "1", "the state is back")
        wait_until(lambda: all(job.cluster.ready(n) for n in job.fleet.running()), "the servers are ready")
        job.out_of(phase)
        job.wait_for(2)
        job.check(1)
        assert job.trainings() == 1


@pytest.mark.parametrize(
    ("phase", "fault", "victim"),
    [
        ("waiting", "kill", 0),
        ("waiting", "kill", 1),
        ("waiting", "pause", 0),
        ("training", "kill", 0),
        ("training", "kill", 1),
        ("training", "pause", 1),
    ],
)
def test_a_server_is_lost(tmp_path: Path, phase: str, fault: str, victim: int) -> None:
    """The worker's own or the other one; clients turn to the one that is left."""
    with works(tmp_path, TWO_HOSTS) as job:
        job.start()
        job.into(phase, 1)
        (job.fleet.kill if fault == "kill" else job.fleet.pause)(victim)
        if phase == "training":
            job.release()
        else:
            job.run.start_all(EVERYBODY, 1 - victim)
            job.run.upload(EVERYBODY, 1 - victim)
        if (phase, fault) == ("waiting", "pause"):
            # the finaliser asks the paused server for its part until its lease is over
            wait_until(lambda: job.trainings() == 1, "the worker trains", 25)
        job.wait_for(2, 40)
        if fault == "pause":
            job.fleet.resume(victim)
        else:
            job.fleet.start(victim)
        job.check(1)
        assert job.trainings() == 1


@pytest.mark.parametrize("phase", ["waiting", "training"])
def test_the_only_server_is_killed_and_started_again(tmp_path: Path, phase: str) -> None:
    with works(tmp_path, ONE) as job:
        job.start()
        job.into(phase, 1)
        job.fleet.kill(0)
        if phase == "training":
            job.release()
            wait_until(lambda: "servers" in job.reasons(), "it says so")
        job.fleet.start(0)
        if phase == "waiting":
            job.out_of(phase)
        job.wait_for(2, 40)
        job.check(1)


def test_of_two_workers_the_faster_one_counts(tmp_path: Path) -> None:
    with works(tmp_path, TWO_HOSTS) as job:
        for w in (0, 1):
            job.start(w)
            job.hold(w)
        job.devices()
        wait_until(lambda: job.trainings(0) and job.trainings(1), "both train")
        job.release(1)
        job.wait_for(2)
        job.check(1)
        job.release(0)
        wait_until(lambda: job.count("late", 0) + job.count("discarded", 0) == 1, "the slow one is told")
        assert job.count("done", 1) == 1
        job.hold(1)
        job.devices()
        job.wait_for(3)
        job.check(2)
        assert job.count("done", 0) == 1


def test_a_worker_that_dies_after_its_push_is_stood_in_for(tmp_path: Path) -> None:
    """Its weights count, the metrics are those of the one that is left."""
    with works(tmp_path, ONE) as job:
        job.start()
        job.hold()
        job.devices()
        wait_until(lambda: job.trainings() == 1, "the worker trains")
        maps = (FeatureMap("all", np.full(6, 50.0, np.float32)),)
        status, body = job.cluster.post("/pushWeight", codec.encode(RequestPushWeight(1, maps)))
        assert (status, codec.decode(ResponsePushWeight, body).retcode) == (200, 200)
        job.release()
        wait_until(lambda: job.count("late") == 1, "the worker is told")
        assert job.status()["iterationNum"] == "1"
        job.wait_for(2, 30)
        assert job.status()["lastIterationResult"] == SUCCESS
        assert same(job.cluster, 1, {"all": np.full(6, 50.0)})
        assert "tells no loss and accuracy" in job.cluster.log("worker-0")


def test_a_new_instance_is_followed(tmp_path: Path) -> None:
    with works(tmp_path, ONE) as job:
        job.cluster.start_scheduler()
        job.start()
        job.devices()
        job.wait_for(2)
        job.into("training", 2)
        assert job.cluster.operate("newInstance", {})[0] == 200
        wait_until(lambda: job.status().get("iterationNum") == "1", "the new instance")
        job.release()
        wait_until(lambda: job.count("discarded") == 1, "the weights are thrown away")
        wait_until(lambda: len(workers_of(job)) == 1, "registered anew")
        wait_until(job.cluster.ready, "the server is there, too")
        job.devices()
        job.wait_for(2)
        job.check(1)


def test_a_disabled_job_is_waited_for(tmp_path: Path) -> None:
    with works(tmp_path, ONE) as job:
        job.cluster.start_scheduler()
        job.start()
        assert job.cluster.operate("disableFLS")[0] == 200
        wait_until(lambda: "the job is disabled" in job.cluster.log("worker-0"), "the worker says so")
        assert job.ended() is None
        assert job.cluster.operate("enableFLS")[0] == 200
        wait_until(job.cluster.ready, "the server is ready")
        iteration = int(job.status()["iterationNum"])
        job.devices()
        job.wait_for(iteration + 1)
        job.check(iteration)


@PHASES
def test_a_clean_stop_takes_the_worker_off_the_list_at_once(tmp_path: Path, phase: str) -> None:
    with works(tmp_path, ONE) as job:
        job.start()
        job.into(phase, 1)
        assert workers_of(job)
        began = time.monotonic()
        assert job.kill(number=signal.SIGTERM) == 0
        assert time.monotonic() - began < 10  # though the training goes on for ever
        assert workers_of(job) == []
        assert "has stopped" in job.cluster.log("worker-0")


def test_a_trainer_that_fails_ends_the_worker_with_1(tmp_path: Path) -> None:
    with works(tmp_path, ONE) as job:
        job.start()
        (job.folder(0) / "fails").touch()
        job.devices()
        assert wait_until(lambda: job.ended() is not None, "the worker ends")
        assert job.ended() == 1
        assert "training has failed: RuntimeError: the trainer is broken" in job.cluster.log("worker-0")


def test_a_trainer_of_another_model_ends_the_worker_with_78(tmp_path: Path) -> None:
    with works(tmp_path, ONE) as job:
        trainer = job.cluster.directory / "adding.py"
        trainer.write_text(TRAINER.replace('"whose"', '"theirs"'))
        job.start(ready=False)
        assert wait_until(lambda: job.ended() is not None, "the worker ends, though no device has begun")
        assert job.ended() == EX_CONFIG
        assert "Parameter theirs is not registered in server." in job.cluster.log("worker-0")


# ---- the command line


def run_alone(directory: Path, *options: str, mode: str = "HYBRID_TRAINING") -> tuple[int, str]:
    """Run fl-workerd without a job; return its exit code and what it said."""
    (directory / "adding.py").write_text(TRAINER)
    with Cluster(directory) as cluster:
        cluster.settings["server_mode"] = mode
        path = cluster.yaml_of(0, cluster.redis_port)
        process = cluster.spawn(
            "worker", *cluster.command("workerd"), "--yaml-config", str(path), "--check-config", *options
        )
        return process.wait(30), cluster.log("worker")


def test_a_good_configuration(tmp_path: Path) -> None:
    code, said = run_alone(tmp_path, "--trainer", "adding:Adding", "--device", "cpu")
    assert code == 0, said
    assert "the configuration is good" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "the trainer '' is not written as module:Class"),
        (("--trainer", "nowhere:Adding"), "the trainer nowhere:Adding cannot be had"),
        (("--trainer", "adding:Adding", "--set", "folder"), "folder is not written as key=value"),
        (("--trainer", "adding:Adding", "--device", "gpu"), "expected to be auto, cpu, cuda or cuda:N"),
        (("--trainer", "adding:Adding", "--sync-frequency", "0"), "--sync-frequency 0 is out of range"),
    ],
)
def test_a_bad_command_line(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    code, said = run_alone(tmp_path, *options)
    assert code == EX_CONFIG
    assert words in said
    assert "Traceback" not in said


def test_a_job_whose_servers_serve_no_workers(tmp_path: Path) -> None:
    code, said = run_alone(tmp_path, "--trainer", "adding:Adding", mode="FEDERATED_LEARNING")
    assert code == EX_CONFIG
    assert "server_mode is FEDERATED_LEARNING" in said
