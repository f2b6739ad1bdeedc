"""Three silos train through real servers, by every rule, and get what the papers' formulas give.

The reference below is plain numpy in double precision, written from the papers; it shares no line with what it checks.
Each silo fits a line of its own to points of its own, a few points in each step, so that a step that is taken twice,
left out or taken from other weights shows in the result.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from integration.cluster import Cluster, wait_until

from fedclient import (
    Adaptive,
    CloudWorker,
    FitResult,
    HttpTransport,
    LocalStep,
    Outcome,
    Policy,
    Summary,
    with_absolute_changes,
)
from fedcore.models.formats import write_model
from fedcore.wire import codec
from fedcore.wire.messages import RequestFLJob, ResponseFLJob

RATE = 2.0**-5
BATCH = 6
IID_RATE = 0.5
STEPS = (3, 5, 4)  # of each silo between two synchronisations
ITERATIONS = 6
DEADLINE_S = 90.0
README = Path(__file__).parents[2] / "README.md"
PATIENT = Policy(retry_time=0.2, io_retry_time=0.05, poll_interval=0.02, poll_patience=60.0, max_backoff=1.0)
MODEL = {"line": np.float32([0.5, -1.0, 0.25, 0.0]), "offset": np.float32([2.0])}
RULES = ("FedAvg", "FedProx", "Scaffold", "FedNova")
UPDATES = 'fl_iteration_clients{round="updateModel"}'

Doubles = Mapping[str, np.ndarray]


class Silo:
    """Points of one silo, and the trainer that fits a line to them.

    Attributes:
        before: called before each step.
    """

    def __init__(self, number: int) -> None:
        random = np.random.default_rng(number)
        self.number = number
        self.size = 20 + 15 * number
        self.points = random.normal(number - 1, 1, (self.size, 4))
        self.values = self.points @ random.normal(0, 1, 4) + 3 * number
        self.before: Callable[[LocalStep], object] = lambda step: None

    def rows(self, step: int) -> np.ndarray:
        return (step * 7 + np.arange(BATCH) * (1 + self.number)) % self.size

    def load(self) -> tuple[int, int]:
        return self.size, 0

    def evaluate(self, weights: Mapping[str, np.ndarray]) -> float:
        raise AssertionError("there is nothing to evaluate on")

    def step(self, weights: Mapping[str, np.ndarray], step: LocalStep) -> FitResult:
        self.before(step)
        assert (step.batch_size, step.learning_rate) == (BATCH, RATE)
        rows = self.rows(step.number)
        error = self.points[rows] @ weights["line"] + weights["offset"] - self.values[rows]
        gradient = {"line": self.points[rows].T @ error / BATCH, "offset": np.array([error.mean()])}
        new = {
            name: w - RATE * (gradient[name] + step.extra_gradient.get(name, 0))
            for name, w in weights.items()
        }
        return FitResult(new, float(error @ error))


# ---- the reference


def slope(silo: Silo, y: Doubles, step: int) -> dict[str, np.ndarray]:
    """Return the gradient of half the mean squared error over the points of a step."""
    rows = silo.rows(step)
    line, offset = np.zeros(4), 0.0
    for point, value in zip(silo.points[rows], silo.values[rows], strict=True):
        error = float(point @ y["line"]) + float(y["offset"][0]) - value
        line, offset = line + error * point / BATCH, offset + error / BATCH
    return {"line": line, "offset": np.array([offset])}


class Reference:
    """The job as the papers write it: x the global model, y a local one, c the controls, tau the numbers of steps."""

    def __init__(self, rule: str, silos: Sequence[Silo], steps: Sequence[int]) -> None:
        self.rule, self.silos, self.tau = rule, silos, list(steps)
        self.x = {name: np.float64(values) for name, values in MODEL.items()}
        self.c = {name: np.zeros(values.size) for name, values in MODEL.items()}
        self.own = [dict(self.c) for _ in silos]
        self.taken = [0] * len(silos)

    def local(self, i: int) -> dict[str, np.ndarray]:
        """Let silo i take its steps from x."""
        y = dict(self.x)
        for _ in range(self.tau[i]):
            self.taken[i] += 1
            g = slope(self.silos[i], y, self.taken[i])
            stepped = {}
            for name, value in y.items():
                step = g[name]
                if self.rule == "FedProx":  # gradient of h(w) = F(w) + mu/2 |w - w_t|^2
                    step = step + IID_RATE * (value - self.x[name])
                if self.rule == "Scaffold":  # y <- y - eta (g - c_i + c)
                    step = step - self.own[i][name] + self.c[name]
                stepped[name] = value - RATE * step
            y = stepped
        return y

    def iterate(self) -> None:
        ys = [self.local(i) for i in range(len(self.silos))]
        sizes, count = [silo.size for silo in self.silos], len(self.silos)
        self.moves = {
            name: sum(n * np.abs(y[name] - self.x[name]) for n, y in zip(sizes, ys, strict=True)) / sum(sizes)
            for name in self.x
        }
        if (
            self.rule == "FedNova"
        ):  # x <- x + tau_eff sum p_i (y_i - x) / tau_i, p_i = 1/n, tau_eff = sum p_i tau_i
            effective = sum(self.tau) / count
            for name in self.x:
                moves = [(y[name] - self.x[name]) / tau for y, tau in zip(ys, self.tau, strict=True)]
                self.x = self.x | {name: self.x[name] + effective * sum(moves) / count}
            return
        if self.rule == "Scaffold":
            moved = []
            for i, y in enumerate(ys):  # option II: c_i+ = c_i - c + (x - y_i) / (K eta)
                new = {
                    name: c_i - self.c[name] + (self.x[name] - y[name]) / (self.tau[i] * RATE)
                    for name, c_i in self.own[i].items()
                }
                moved.append({name: new[name] - self.own[i][name] for name in new})
                self.own[i] = new
            self.c = {name: c + sum(delta[name] for delta in moved) / count for name, c in self.c.items()}
        self.x = {
            name: sum(n * y[name] for n, y in zip(sizes, ys, strict=True)) / sum(sizes) for name in self.x
        }


def assert_equal(weights: Mapping[str, np.ndarray], expected: Doubles, what: str) -> None:
    assert weights.keys() == expected.keys(), what
    for name, values in expected.items():
        np.testing.assert_allclose(weights[name], values, rtol=2e-5, atol=2e-6, err_msg=f"{name} of {what}")


# ---- the job


@contextmanager
def cloud(
    directory: Path,
    rule: str,
    servers: int = 1,
    *,
    hosts: int = 3,
    model: Mapping[str, np.ndarray] = MODEL,
    encrypt: Mapping[str, Any] | None = None,
    **windows: int,
) -> Iterator[Cluster]:
    """Run the servers of a job: one by itself, or several, spread over some hosts."""
    directory.mkdir(exist_ok=True)
    fedcore = {"device": {"hold_time": 2.0, "retry_margin": 0.1}}
    with Cluster(
        directory, start_fl_job_threshold=3, fl_iteration_num=ITERATIONS, fedcore=fedcore, **windows
    ) as cluster:
        cluster.settings["server_mode"] = "CLOUD_TRAINING"
        cluster.settings["aggregation"] = {
            "aggregation_type": rule,
            "iid_rate": IID_RATE,
            "total_client_num": 3,
        }
        if encrypt is not None:
            cluster.settings["encrypt"] = dict(encrypt)
        cluster.settings["client"] = {
            "client_epoch_num": 1,
            "client_batch_size": BATCH,
            "client_learning_rate": RATE,
        }
        cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
        write_model(directory / "model.safetensors", model, set(), {})
        cluster.start_redis()
        if servers == 1:
            cluster.start_server()
        for n in range(servers if servers > 1 else 0):
            cluster.start_server_on(cluster.host(n % hosts), n)
        yield cluster


class Work:
    """Cloud workers, each in a thread of its own."""

    def __init__(self) -> None:
        self.workers: list[CloudWorker] = []
        self.summaries: dict[int, Summary] = {}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.stop()
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def start(self, cluster: Cluster, servers: int, rule: str, silo: Silo, **options: Any) -> CloudWorker:
        """Start the worker of a silo; it begins with the server of its own number."""
        urls = [f"http://127.0.0.1:{cluster.http + n}" for n in range(servers)]
        usual = {
            "sync_frequency": STEPS[silo.number],
            "iid_rate": IID_RATE if rule == "FedProx" else 0.0,
            "fl_name": "job",
            "worker_id": f"silo-{silo.number}",
            "policy": PATIENT,
        }
        transport = HttpTransport(urls, 10.0, first=silo.number)
        worker = CloudWorker(silo, transport, rule=rule, **(usual | options))
        number = len(self.workers)

        def run() -> None:
            self.summaries[number] = worker.run()

        self.workers.append(worker)
        self._threads.append(threading.Thread(target=run, name=f"silo-{silo.number}", daemon=True))
        self._threads[-1].start()
        return worker

    def finish(self) -> list[Summary]:
        """Wait until all have ended, well."""
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), f"{thread.name} does not end"
        summaries = [self.summaries[number] for number in range(len(self.workers))]
        for summary in summaries:
            assert summary.outcome is Outcome.COMPLETED, summary.reason
        return summaries


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_what_its_paper_says(tmp_path: Path, rule: str, servers: int) -> None:
    silos = [Silo(number) for number in range(3)]
    reference = Reference(rule, silos, STEPS)
    with cloud(tmp_path / "job", rule, servers) as cluster, Work() as work:
        for silo in silos:
            work.start(cluster, servers, rule, silo)
        for summary in work.finish():
            assert (summary.completed, summary.restarted) == (ITERATIONS, 0)
        for iteration in range(1, ITERATIONS + 1):
            reference.iterate()
            if iteration > ITERATIONS - 3:
                assert_equal(cluster.weights(iteration), reference.x, f"iteration {iteration}")
        for summary in work.summaries.values():
            assert_equal(summary.weights, reference.x, "what a worker received last")
        if rule == "Scaffold":
            for worker, own in zip(work.workers, reference.own, strict=True):
                assert_equal(worker.control, own, f"the control of {worker.worker_id}")
        late = Work()
        with late:
            late.start(cluster, servers, rule, Silo(0))
            for thread in late._threads:
                thread.join(DEADLINE_S)
        assert late.summaries[0].outcome is Outcome.JOB_OVER, "who comes after the end is told so"


@pytest.mark.parametrize("rule", RULES)
def test_a_server_killed_in_mid_iteration_costs_nothing(tmp_path: Path, rule: str) -> None:
    silos = [Silo(number) for number in range(3)]
    reference = Reference(rule, silos, STEPS)
    with cloud(tmp_path / "job", rule, servers=3, hosts=2) as cluster, Work() as work:
        killed = threading.Event()

        def kill(step: LocalStep) -> None:
            if step.iteration == 3 and not killed.is_set():
                wait_until(lambda: cluster.metric(UPDATES, 1) == 2, "the other silos have uploaded")
                cluster.kill("server-0")  # it has silo 0's update; server 2 is on its host
                killed.set()

        silos[1].before = kill
        for silo in silos:
            work.start(cluster, 3, rule, silo)
        summaries = work.finish()
        assert killed.is_set()
        assert all(summary.completed == ITERATIONS for summary in summaries)
        for _ in range(ITERATIONS):
            reference.iterate()
        for summary in summaries:
            assert_equal(summary.weights, reference.x, "the last model")


def test_a_silo_that_comes_late_costs_failed_iterations_and_no_drift(tmp_path: Path) -> None:
    silos = [Silo(number) for number in range(3)]
    reference = Reference("Scaffold", silos, STEPS)
    short = {"start_fl_job_time_window": 2000, "update_model_time_window": 2000}
    with cloud(tmp_path / "job", "Scaffold", **short) as cluster, Work() as work:
        for silo in silos[:2]:
            work.start(cluster, 1, "Scaffold", silo)
        wait_until(
            lambda: cluster.metric('fl_iterations_total{outcome="failed"}') >= 1, "an iteration failed"
        )
        work.start(cluster, 1, "Scaffold", silos[2])
        summaries = work.finish()
        completed = min(summary.completed for summary in summaries)
        assert 1 <= completed < ITERATIONS
        for _ in range(completed):
            reference.iterate()
        for summary, worker, own in zip(summaries, work.workers, reference.own, strict=True):
            assert summary.completed == completed
            assert_equal(summary.weights, reference.x, "the last model")
            assert_equal(worker.control, own, f"the control of {worker.worker_id}")


def test_adaptive_synchronisation(tmp_path: Path) -> None:
    silos = [Silo(number) for number in range(3)]
    first = 12
    adaptive = Adaptive(observation_window_size=0.5, frequency_increase_ratio=2, ema_alpha=0.25)
    reference, steps = Reference("FedAvg", silos, [first] * 3), []
    # ema(g), ema(|g|); a cut when no new minimum of mean |ema(g)| / ema(|g|) came for longer than the window
    ema, absolute, minimum, minimum_at, window = 0.0, 0.0, 1.1, 0, 0.5
    for round_ in range(1, ITERATIONS + 1):
        steps.append(reference.tau[0])
        before = np.concatenate([reference.x["line"], reference.x["offset"]])
        reference.iterate()
        change = np.concatenate([reference.x["line"], reference.x["offset"]]) - before
        moves = np.concatenate([reference.moves["line"], reference.moves["offset"]])
        ema, absolute = 0.25 * ema + 0.75 * change, 0.25 * absolute + 0.75 * moves
        rate = float(np.mean(np.abs(ema) / absolute))
        if rate < minimum:
            minimum, minimum_at = rate, round_
        elif round_ - minimum_at > window and reference.tau[0] > 1:
            reference.tau = [-(-reference.tau[0] // 2)] * 3
            minimum, window, ema, absolute = 1.1, window * 2, 0.0, 0.0
    assert min(steps) < first, "the job has a cut in it"
    model = with_absolute_changes(MODEL)
    with cloud(tmp_path / "job", "FedAvg", servers=3, model=model) as cluster, Work() as work:
        seen: list[int] = []
        silos[0].before = lambda step: seen.append(step.iteration)
        for silo in silos:
            options = {"sync_frequency": first, "sync_type": "adaptive", "adaptive": adaptive}
            work.start(cluster, 3, "FedAvg", silo, **options)
        summaries = work.finish()
        assert [seen.count(iteration) for iteration in range(1, ITERATIONS + 1)] == steps
        for summary in summaries:
            assert_equal(summary.weights, reference.x, "the last model")


def test_a_server_that_knows_no_moves_is_told_apart(tmp_path: Path) -> None:
    with cloud(tmp_path / "job", "FedAvg") as cluster, Work() as work:
        work.start(cluster, 1, "FedAvg", Silo(0), sync_type="adaptive")
        wait_until(lambda: work.summaries, "the worker gives up")
        assert work.summaries[0].outcome is Outcome.FAILED
        assert "as_abs_grad" in work.summaries[0].reason


def test_the_readmes_worker_learns(tmp_path: Path) -> None:
    """The README's own trainer, as it stands there, trains against a server."""
    (code,) = re.findall(r"```py\n(.*?)```", README.read_text(), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    zeros = {"w": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
    with cloud(tmp_path / "job", "FedAvg", model=zeros) as cluster:
        workers = [
            CloudWorker(
                namespace["Line"](),
                f"http://127.0.0.1:{cluster.http}",
                sync_frequency=40,
                fl_name="job",
                policy=PATIENT,
            )
            for _ in range(3)
        ]
        threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        weights = cluster.weights(ITERATIONS)
    assert 2 < weights["w"][0] < 4 and 0.5 < weights["b"][0] < 1.5


def test_workers_of_the_original_know_no_prefix(tmp_path: Path) -> None:
    asked = codec.encode(RequestFLJob(fl_name="job", fl_id="worker_fl_1::2", data_size=3, timestamp="1"))
    for mode, plain in (("CLOUD_TRAINING", 200), ("FEDERATED_LEARNING", 404)):
        with Cluster(tmp_path) as cluster:
            cluster.settings |= {"server_mode": mode, "client": {"http_url_prefix": "/fl/"}}
            cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
            cluster.start_redis()
            cluster.start_server()
            assert cluster.post("/fl/startFLJob", asked)[0] == 200
            status, body = cluster.post("/startFLJob", asked)
            assert status == plain
            if plain == 200:
                reply = codec.decode(ResponseFLJob, body)
                assert (reply.retcode, reply.feature_map) == (200, ())
