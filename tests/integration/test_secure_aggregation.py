"""Masked uploads through real servers: the published model is the plain mean of the uploads that count.

What must come of it when servers are killed follows from docs/RELIABILITY.md and ADR 14:

* with a sibling on the host, or if the server comes back, the model is the mean of all updates, whatever the round;
* so it is if a host is lost while its ledger is empty, or after devices were told the list;
* if it is lost in between, its updates are counted as lost, exactly, and their clients send them again; if these do
  not, or are silos, the iteration fails by name and the model stays.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from integration.cluster import Cluster, wait_until
from integration.faults import Fleet, fleet_of
from integration.masked_sums import bound_of_exact
from integration.oracle import MODEL
from integration.oracle import Outcome as Ended
from integration.test_cloud import ITERATIONS, PATIENT, Reference, Silo, Work, cloud
from integration.test_cloud import STEPS as SILO_STEPS
from integration.test_cloud import assert_equal as assert_silos_equal

from fedclient import (
    Client,
    CloudWorker,
    FitConfig,
    FitResult,
    HttpTransport,
    IterationOutcome,
    IterationReport,
    Outcome,
    Policy,
    PrivacyOptions,
    Summary,
)
from fedcore.core.cipher import LIST_LOST, NOT_READY
from fedcore.core.iteration import SUCCESS, UNMASKED_SUCCESS, server_exited
from fedcore.secagg.masks import Layout
from fedcore.wire import codec
from fedcore.wire.messages import ResponseUpdateModel, ReturnClientList, Round

DEVICES = 20
T = 7
DEADLINE_S = 25.0
POLICY = Policy(
    retry_time=0.2,
    max_restarts=1000,
    max_wait=0.3,
    io_retry_time=0.05,
    max_io_retries=200,
    poll_interval=0.05,
    max_backoff=0.5,
)
ONE_SERVER, TWO_SERVERS, TWO_HOSTS = {0: 0}, {0: 0, 1: 0}, {0: 0, 1: 1}


class Silent:
    """A device's way to the servers, which ends before a round; notes whether its update was taken."""

    def __init__(
        self,
        urls: Sequence[str],
        first: int,
        leaves: str | None,
        *,
        twice: bool = False,
        before: Callable[[str], object] = lambda round_: None,
        old: bool = False,
    ) -> None:
        """Go to the servers in turn.

        Args:
            urls: of the servers.
            first: which of them comes first.
            leaves: the round before which the device stops, None for none.
            twice: send every request twice.
            before: is called before each request.
            old: be a device that does not know that an update may be asked for again.
        """
        self._old = old
        self._inner = HttpTransport(urls, 10.0, first=first, rotate=True)
        self._leaves, self._twice, self._before = leaves, twice, before
        self.client: Client | None = None
        self.uploaded = False

    def post(self, round_: Round, body: bytes) -> tuple[int, bytes]:
        if round_ == self._leaves:
            assert self.client is not None
            self.client.stop()
        self._before(round_)
        reply = self._inner.post(round_, body)
        if self._twice:
            reply = self._inner.post(round_, body)
        if round_ == "updateModel" and reply[0] == 200 and b"cluster" not in reply[1]:
            self.uploaded |= codec.decode(ResponseUpdateModel, reply[1]).retcode == 200
        if self._old and LIST_LOST.encode() in reply[1]:
            told = codec.decode(ReturnClientList, reply[1])
            return reply[0], codec.encode(replace(told, reason=NOT_READY))
        return reply

    def close(self) -> None:
        self._inner.close()


class Trainer:
    def __init__(self, number: int) -> None:
        self.number = number

    @property
    def size(self) -> int:
        return 1 + self.number % 5

    def load(self) -> tuple[int, int]:
        return self.size, 0

    def evaluate(self, weights: Mapping[str, np.ndarray]) -> float:
        raise AssertionError("there is nothing to evaluate on")

    def fit(self, weights: Mapping[str, np.ndarray], config: FitConfig) -> FitResult:
        moved = np.float32((self.number + 1) / 8)
        return FitResult({name: values + moved for name, values in weights.items()}, 0.5)


class Crowd:
    """Devices in threads."""

    def __init__(
        self,
        urls: Sequence[str],
        leaving: Mapping[int, str],
        *,
        layout: Layout = Layout.CONTIGUOUS,
        on_iteration: Callable[[IterationReport], object] | None = None,
        **options: Any,
    ) -> None:
        self.ways = [Silent(urls, n, leaving.get(n), **options) for n in range(DEVICES)]
        self.summaries: dict[int, Summary] = {}
        self._threads = []
        for number, way in enumerate(self.ways):
            way.client = Client(
                Trainer(number),
                way,
                fl_name="job",
                client_id=f"device-{number:02}",
                policy=POLICY,
                on_iteration=on_iteration,
                privacy=PrivacyOptions(mask_layout=layout),
            )
            self._threads.append(threading.Thread(target=self._run, args=(number,), daemon=True))

    def _run(self, number: int) -> None:
        client = self.ways[number].client
        assert client is not None
        self.summaries[number] = client.run()

    def finish(self, seconds: float = DEADLINE_S) -> None:
        self.start()
        self.join(seconds)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self, seconds: float = DEADLINE_S) -> None:
        for number, thread in enumerate(self._threads):
            thread.join(seconds)
            assert not thread.is_alive(), f"device {number} does not end"

    def uploaders(self) -> list[int]:
        return [number for number, way in enumerate(self.ways) if way.uploaded]


@contextmanager
def masked(
    directory: Path,
    hosts: Mapping[int, int],
    ratio: float,
    update: float,
    *,
    iterations: int = 1,
    windows: Mapping[str, int] | None = None,
    start: bool = True,
    **more: Any,
) -> Iterator[Fleet]:
    """Start a job of so many iterations whose uploads are masked; ``more`` are sections of ``fedcore``."""
    options = {
        "start": False,
        "fl_iteration_num": iterations,
        "update_model_ratio": update,
        **(windows or {}),
    }
    with fleet_of(directory, hosts, places=DEVICES, fedcore=more, **options) as fleet:
        masks = {
            "share_secrets_ratio": ratio,
            "cipher_time_window": 60_000,
            "reconstruct_secrets_threshold": T,
        }
        cluster = fleet.cluster
        cluster.settings["encrypt"] = {"encrypt_type": "PW_ENCRYPT", "pw_encrypt": masks}
        cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
        if start:
            fleet.start_all()
        yield fleet


def urls_of(fleet: Fleet, hosts: Mapping[int, int]) -> list[str]:
    return [f"http://127.0.0.1:{fleet.at(n).http}" for n in hosts]


def check_model(
    fleet: Fleet,
    uploaders: Sequence[int],
    iteration: int = 1,
    base: Mapping[str, np.ndarray] = MODEL,
) -> Mapping[str, np.ndarray]:
    """Compare an iteration's model with the plain mean, in double precision; return it."""
    sizes = {number: Trainer(number).size for number in uploaders}
    total = sum(sizes.values())
    moved = sum((number + 1) / 8 * size for number, size in sizes.items()) / total
    largest = max(float(np.abs(values).max()) for values in base.values()) + DEVICES / 8
    tolerance = bound_of_exact(DEVICES, list(sizes.values()), largest)
    published = fleet.at(fleet.running()[0]).weights(iteration)
    assert published.keys() == base.keys()
    for name, values in base.items():
        error = np.abs(np.float64(published[name]).reshape(-1) - (np.float64(values).reshape(-1) + moved))
        assert error.max() <= tolerance, name
    return published


@pytest.mark.parametrize("hosts", [ONE_SERVER, TWO_SERVERS, TWO_HOSTS], ids=["one", "two", "two hosts"])
def test_devices_that_leave_after_the_keys(tmp_path: Path, hosts: dict[int, int]) -> None:
    """All have shared their secrets; some do not upload, some do not report."""
    leaving = {
        1: "updateModel",
        2: "updateModel",
        3: "updateModel",
        4: "getClientList",
        5: "reconstructSecrets",
    }
    with masked(tmp_path, hosts, 1.0, 0.85) as fleet:
        crowd = Crowd(urls_of(fleet, hosts), leaving)
        crowd.finish()
        assert set(crowd.uploaders()) == set(range(DEVICES)) - {1, 2, 3}
        check_model(fleet, crowd.uploaders())
        for number, summary in crowd.summaries.items():
            assert number in leaving or summary.outcome is Outcome.COMPLETED, summary.reason


@pytest.mark.parametrize("hosts", [ONE_SERVER, TWO_HOSTS], ids=["one", "two hosts"])
def test_devices_that_leave_before_each_round(tmp_path: Path, hosts: dict[int, int]) -> None:
    leaving = {1: "exchangeKeys", 6: "getKeys", 11: "shareSecrets", 16: "getSecrets"}
    with masked(tmp_path, hosts, 0.8, 0.5) as fleet:
        crowd = Crowd(urls_of(fleet, hosts), leaving)
        crowd.finish()
        assert len(crowd.uploaders()) >= DEVICES // 2
        check_model(fleet, crowd.uploaders())


def test_the_layout_of_old_devices(tmp_path: Path) -> None:
    layout = {"secure_aggregation": {"mask_layout": "per_layer"}}
    with masked(tmp_path, ONE_SERVER, 1.0, 0.9, **layout) as fleet:
        crowd = Crowd(urls_of(fleet, ONE_SERVER), {3: "updateModel"}, layout=Layout.PER_LAYER)
        crowd.finish()
        check_model(fleet, crowd.uploaders())


# ---- silos

SILO_MASKS = {
    "encrypt_type": "STABLE_PW_ENCRYPT",
    "pw_encrypt": {
        "share_secrets_ratio": 1.0,
        "cipher_time_window": 60_000,
        "reconstruct_secrets_threshold": 1,
    },
}


# ---- servers that die

ROUNDS = (
    "startFLJob",
    "exchangeKeys",
    "getKeys",
    "shareSecrets",
    "getSecrets",
    "updateModel",
    "getClientList",
    "reconstructSecrets",
    "getModel",
)
SILO_ROUNDS = ("startFLJob", "exchangeKeys", "getKeys", "updateModel", "getModel")  # one less than ITERATIONS
NTH = {"reconstructSecrets": T, "getModel": 1}  # T reports are one too few
LOSS_S = 90.0  # devices wait for a lost host: its lease, ten seconds more, and a busy machine


class Stages:
    """Holds a crowd between iterations, and has things done at the n-th requests of rounds of each."""

    def __init__(self, devices: int) -> None:
        self._devices = devices
        self._changed = threading.Condition()
        self._stage = self._waiting = 0
        self._acts: dict[str, Callable[[], object]] = {}
        self._left: dict[str, int] = {}

    def play(self, **faults: tuple[int, Callable[[], object]]) -> None:
        """Let everybody begin the next iteration; round -> at which request of it to do what."""
        with self._changed:
            self._left = {round_: nth for round_, (nth, _) in faults.items()}
            self._acts = {round_: act for round_, (_, act) in faults.items()}
            self._waiting = 0
            self._stage += 1
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until everybody has ended this one; what was to be done must have been done."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._waiting == self._devices, LOSS_S), self._waiting
            assert all(left <= 0 for left in self._left.values()), self._left

    def completed(self, report: IterationReport) -> None:
        """Hold a device that has ended an iteration."""
        if report.outcome is IterationOutcome.COMPLETED:
            with self._changed:
                stage, self._waiting = self._stage, self._waiting + 1
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: self._stage > stage, 2 * LOSS_S)

    def __call__(self, round_: str) -> None:
        with self._changed:
            if round_ in self._left:
                self._left[round_] -= 1
                if self._left[round_] == 0:
                    self._acts[round_]()


class Killer:
    """Kills a server at the n-th request of a round; without a number one in whose ledger updates are counted.

    Attributes:
        victim: the server.
    """

    def __init__(self, fleet: Fleet, victim: int | None, round_: str, nth: int) -> None:
        self.victim = victim
        self._fleet, self._round, self._left = fleet, round_, nth
        self._lock, self._dead = threading.Lock(), threading.Event()

    @property
    def done(self) -> bool:
        return self._left <= 0

    def __call__(self, round_: str) -> None:
        with self._lock:
            if round_ != self._round:
                return
            self._left -= 1
            if self._left == 0:
                self._kill()

    def _kill(self) -> None:
        while self.victim is None:
            self.victim = next((n for n in self._fleet.hosts if counted_in(self._fleet, n)), None)
        self._fleet.kill(self.victim)
        self._dead.set()

    def wait(self) -> int:
        """Wait until the server is dead; return how many updates are counted in its ledger."""
        assert self._dead.wait(LOSS_S), "nobody dies"
        assert self.victim is not None
        return counted_in(self._fleet, self.victim)


def asked(cluster: Cluster, script: str) -> str:
    """Return what a Lua script in one line, without double quotes, says of the shared state."""
    answer = cluster.redis("EVAL", f'"{script}"', "0")
    assert answer is not None and answer[:1] in b":+", answer
    return answer[1:].decode()


def counted_in(fleet: Fleet, n: int) -> int:
    """Return how many updates of iteration 1 are counted in the ledgers of a server."""
    script = (
        "local n, u, l = 0, redis.call('KEYS', '*:1:uploads:Hash')[1], redis.call('KEYS', '*ledgers:Hash')[1] "
        "for _, id in ipairs(u and redis.call('HVALS', u) or {}) do "
        f"if redis.call('HGET', l, id):find('{fleet.hosts[n].address}:{fleet.cluster.tcp + n}:', 1, true) "
        "then n = n + 1 end end return n"
    )
    return int(asked(fleet.cluster, script))


def finaliser(fleet: Fleet) -> int | None:
    """Return the server that makes the model of this iteration, None if the iteration is over."""
    token = asked(
        fleet.cluster, "return {ok=redis.call('HGET', redis.call('KEYS', '*status:Hash')[1], 'token') or ''}"
    )
    named = (n for n, host in fleet.hosts.items() if f":{host.address}:{fleet.cluster.tcp + n}:" in token)
    return next(named, None)


def ended(fleet: Fleet, iteration: int = 1) -> Ended:
    """Return how an iteration ended; all servers that tell it say the same."""
    told = wait_until(lambda: {one for number, one in fleet.outcomes() if number == iteration}, "it ended")
    assert len(told) == 1, told
    (outcome,) = told
    return outcome


def lost(fleet: Fleet) -> int:
    """Return how many updates are told to be lost; metrics, logs and the failure event file say the same."""
    logged = []
    for n in fleet.lives:
        records = [json.loads(line) for line in fleet.log(n).splitlines() if line.startswith("{")]
        logged += [record["updates"] for record in records if " are lost" in record["message"]]
    events = (fleet.cluster.directory / "event.txt").read_text()
    noted = [int(count) for count in re.findall(r"lost (\d+) accepted updates", events)]
    assert sorted(noted) == sorted(logged)
    assert fleet.metric("fl_updates_lost_total") == sum(logged)
    return sum(logged)


def check_valid(fleet: Fleet, iteration: int, base: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Demand the mean of the updates of all devices; return it."""
    assert ended(fleet, iteration) == Ended(True, UNMASKED_SUCCESS), iteration
    return check_model(fleet, range(DEVICES), iteration, base)


def kills_in_each_round(
    hosts: Mapping[int, int], iterations: int, stays_away: Sequence[str], directory: Path
) -> None:
    """Kill a server in each round, spread over so many iterations; it comes at once, or stays away until the end."""
    with masked(directory, hosts, 1.0, 1.0, iterations=iterations) as fleet:
        stages = Stages(DEVICES)
        crowd = Crowd(urls_of(fleet, hosts), {}, before=stages, on_iteration=stages.completed)
        base: Mapping[str, np.ndarray] = MODEL

        def kill(round_: str, victim: int) -> None:
            maker = finaliser(fleet)
            if maker is not None and round_ in ROUNDS[-2:]:  # a host that is lost must not be its
                victim = maker if len(set(hosts.values())) == 1 else 1 - maker
            fleet.kill(victim)
            if round_ not in stays_away:
                fleet.start(victim, ready=False)

        for iteration in range(1, iterations + 1):
            faults = {
                round_: (NTH.get(round_, DEVICES // 2), partial(kill, round_, iteration % len(hosts)))
                for round_ in ROUNDS[iteration - 1 :: iterations]
            }
            stages.play(**faults)
            if iteration == 1:
                crowd.start()
            stages.wait()
            for n in hosts.keys() - set(fleet.running()):
                fleet.start(n, ready=False)
            fleet.wait_ready(*hosts)
            base = check_valid(fleet, iteration, base)
        stages.play()
        crowd.join()
        for summary in crowd.summaries.values():
            assert summary.outcome is Outcome.COMPLETED, summary.reason
        assert lost(fleet) == 0
        fleet.check_alive()


def a_host_is_lost(round_: str, nth: int, directory: Path) -> None:
    """Its updates are counted as lost if their sum was not recorded yet; their clients send them again."""
    with masked(directory, TWO_HOSTS, 1.0, 1.0) as fleet:
        killer = Killer(fleet, None, round_, nth)
        crowd = Crowd(urls_of(fleet, TWO_HOSTS), {}, before=killer)
        crowd.start()
        there = killer.wait()
        crowd.join(LOSS_S)
        check_valid(fleet, 1, MODEL)
        assert crowd.uploaders() == list(range(DEVICES))
        assert lost(fleet) in ((there,) if round_ == "updateModel" else (0, there))
        for summary in crowd.summaries.values():
            assert summary.outcome is Outcome.COMPLETED, summary.reason


def a_host_is_lost_with_what_old_devices_sent(directory: Path) -> None:
    """They do not send it again, and nobody else has their keys: the window of updateModel ends the iteration."""
    windows = {"update_model_time_window": 15_000}  # its clock stands still while the iteration is sealed
    with masked(directory, TWO_HOSTS, 1.0, 1.0, windows=windows) as fleet:
        killer = Killer(fleet, None, "updateModel", DEVICES // 2)
        crowd = Crowd(urls_of(fleet, TWO_HOSTS), {}, before=killer, old=True)
        crowd.start()
        there = killer.wait()
        crowd.join(LOSS_S)
        assert ended(fleet) == Ended(False, server_exited(1))
        assert lost(fleet) == there
        for name, values in fleet.at(fleet.running()[0]).weights(1).items():
            assert np.array_equal(values.reshape(-1), MODEL[name].reshape(-1))


def the_finaliser_ends_while_it_takes_masks_off(directory: Path) -> None:
    """Killed, stopped, out of memory, and killed together with the only other server."""
    with masked(directory, TWO_HOSTS, 1.0, 1.0, iterations=4, start=False) as fleet:
        folders = {n: directory / f"unmasking-{n}" for n in TWO_HOSTS}
        program = str(Path(__file__).with_name("slow_unmasking.py"))

        def start(*servers: int) -> None:
            for n in servers:
                folders[n].mkdir(exist_ok=True)
                words = (sys.executable, program, str(folders[n]))
                fleet.cluster.command = lambda daemon, words=words: words  # type: ignore[method-assign]
                fleet.start(n, ready=False)
            fleet.wait_ready(*servers)

        def at_work() -> int:
            wait_until(lambda: any((f / "begun").exists() for f in folders.values()), "masks are taken off")
            (at_it,) = (n for n, folder in folders.items() if (folder / "begun").exists())
            assert at_it == finaliser(fleet)
            return at_it

        def begin() -> None:
            for folder in folders.values():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            stages.play()

        start(*TWO_HOSTS)
        stages = Stages(DEVICES)
        crowd = Crowd(urls_of(fleet, TWO_HOSTS), {}, on_iteration=stages.completed)

        begin()
        crowd.start()
        dead = at_work()
        (folders[1 - dead] / "go").touch()
        fleet.kill(dead)
        stages.wait()
        base = check_valid(fleet, 1, MODEL)
        start(dead)

        begin()
        leaving = at_work()
        (folders[1 - leaving] / "go").touch()
        fleet.cluster.processes[fleet.cluster.name(leaving)].send_signal(signal.SIGTERM)
        stages.wait()  # while the thread of the one that leaves stands still
        (folders[leaving] / "go").touch()
        assert fleet.kill(leaving, signal.SIGTERM) == 0
        base = check_valid(fleet, 2, base)
        start(leaving)

        begin()
        for folder in folders.values():
            (folder / "fail").touch()
            (folder / "go").touch()
        stages.wait()
        assert sum((folder / "fail").exists() for folder in folders.values()) == 1, "it failed, once"
        base = check_valid(fleet, 3, base)
        failed = [log for n in TWO_HOSTS if "it is tried again" in (log := fleet.log(n))]
        assert len(failed) == 1 and failed[0].count("it is tried again") == 1

        begin()
        at_work()
        for n in TWO_HOSTS:
            fleet.kill(n)
        for folder in folders.values():
            (folder / "go").touch()
        start(*TWO_HOSTS)
        stages.wait()
        check_valid(fleet, 4, base)
        stages.play()
        crowd.join()
        assert lost(fleet) == 0


# ---- silos whose servers die


class SilosAtWork(Work):
    """Silos that mask their updates, and change the server with every request."""

    def begin(self, cluster: Cluster, servers: int, silo: Silo, before: Stages | Killer) -> None:
        urls = [f"http://127.0.0.1:{cluster.http + n}" for n in range(servers)]
        way = Silent(urls, silo.number, None, before=before)
        worker = way.client = CloudWorker(  # type: ignore[assignment]
            silo,
            way,
            rule="FedAvg",
            sync_frequency=SILO_STEPS[silo.number],
            encrypt_mode="STABLE_PW_ENCRYPT",
            fl_name="job",
            worker_id=f"silo-{silo.number}",
            policy=PATIENT,
            on_iteration=before.completed if isinstance(before, Stages) else None,
        )

        def run() -> None:
            self.summaries[silo.number] = worker.run()

        self.workers.append(worker)
        self._threads.append(threading.Thread(target=run, name=f"silo-{silo.number}", daemon=True))
        self._threads[-1].start()


def silos_lose_servers(directory: Path) -> None:
    """A server is killed in each of their rounds, in an iteration each: nothing is missed."""
    silos = [Silo(number) for number in range(3)]
    reference, stages = Reference("FedAvg", silos, SILO_STEPS), Stages(3)
    with cloud(directory, "FedAvg", 2, hosts=1, encrypt=SILO_MASKS) as cluster, SilosAtWork() as work:
        for iteration, round_ in enumerate(SILO_ROUNDS, 1):
            n = iteration % 2
            stages.play(**{round_: (2, partial(cluster.kill, cluster.name(n)))})
            for silo in silos if iteration == 1 else ():
                work.begin(cluster, 2, silo, stages)
            stages.wait()
            cluster.start_server_on(cluster.host(0), n)
        stages.play()  # the last iteration
        stages.wait()
        stages.play()
        summaries = work.finish()
        for _ in range(ITERATIONS):
            reference.iterate()
        for summary in summaries:
            assert (summary.completed, summary.restarted) == (ITERATIONS, 0)
            assert_silos_equal(summary.weights, reference.x, "the last model")


def silos_lose_a_host(directory: Path) -> None:
    """Without what it had taken no mask cancels: the iteration fails by name, and the next goes on."""
    silos = [Silo(number) for number in range(3)]
    reference = Reference("FedAvg", silos, SILO_STEPS)
    with cloud(directory, "FedAvg", 2, hosts=2, encrypt=SILO_MASKS) as cluster, SilosAtWork() as work:
        fleet = Fleet(cluster, {0: 0, 1: 1})
        fleet.lives = {0: 0, 1: 0}
        killer = Killer(fleet, None, "updateModel", 3)
        for silo in silos:
            work.begin(cluster, 2, silo, killer)
        summaries = work.finish()
        assert killer.done and ended(fleet) == Ended(False, server_exited(1))
        assert {ended(fleet, number) for number in range(2, ITERATIONS + 1)} == {Ended(True, SUCCESS)}
        for _ in range(ITERATIONS - 1):
            reference.iterate()
        for summary in summaries:
            assert summary.completed == ITERATIONS - 1
            assert_silos_equal(summary.weights, reference.x, "the last model")


WITHOUT_UPDATES = tuple(round_ for round_ in ROUNDS if round_ not in ("updateModel", "getClientList"))
FAULTS: dict[str, Callable[[Path], None]] = {
    "host lost at updateModel": partial(a_host_is_lost, "updateModel", DEVICES // 2),
    "host lost at getClientList": partial(a_host_is_lost, "getClientList", 1),
    "host lost with old devices": a_host_is_lost_with_what_old_devices_sent,
    "silos lose a host": silos_lose_a_host,
    "one server": partial(kills_in_each_round, ONE_SERVER, 3, ()),
    "two servers": partial(kills_in_each_round, TWO_SERVERS, len(ROUNDS), ROUNDS),
    "two hosts": partial(kills_in_each_round, TWO_HOSTS, len(ROUNDS), WITHOUT_UPDATES),
    "finaliser": the_finaliser_ends_while_it_takes_masks_off,
    "silos": silos_lose_servers,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_no_more_than_it_must(fault: str, tmp_path: Path) -> None:
    FAULTS[fault](tmp_path)
