"""Masked uploads through real servers: the published model is the plain mean of the uploads that count."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from integration.cluster import wait_until
from integration.faults import Fleet, fleet_of
from integration.oracle import MODEL
from integration.test_cloud import ITERATIONS, Reference, Silo, Work, cloud
from integration.test_cloud import STEPS as SILO_STEPS
from integration.test_cloud import assert_equal as assert_silos_equal

from fedclient import Client, FitConfig, FitResult, HttpTransport, Outcome, Policy, PrivacyOptions, Summary
from fedcore.secagg.masks import Layout
from fedcore.wire import codec
from fedcore.wire.messages import ResponseUpdateModel, Round

DEVICES = 20
T = 7
DEADLINE_S = 25.0
POLICY = Policy(
    retry_time=0.2, max_restarts=1000, max_wait=0.3, io_retry_time=0.05, poll_interval=0.05, max_backoff=0.5
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
    ) -> None:
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
                privacy=PrivacyOptions(mask_layout=layout),
            )
            self._threads.append(threading.Thread(target=self._run, args=(number,), daemon=True))

    def _run(self, number: int) -> None:
        client = self.ways[number].client
        assert client is not None
        self.summaries[number] = client.run()

    def finish(self) -> None:
        for thread in self._threads:
            thread.start()
        for number, thread in enumerate(self._threads):
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), f"device {number} does not end"

    def uploaders(self) -> list[int]:
        return [number for number, way in enumerate(self.ways) if way.uploaded]


@contextmanager
def masked(
    directory: Path, hosts: Mapping[int, int], ratio: float, update: float, **more: Any
) -> Iterator[Fleet]:
    """Start a job of one iteration whose uploads are masked."""
    options = {"start": False, "fl_iteration_num": 1, "update_model_ratio": update}
    with fleet_of(directory, hosts, places=DEVICES, fedcore=more, **options) as fleet:
        masks = {
            "share_secrets_ratio": ratio,
            "cipher_time_window": 20_000,
            "reconstruct_secrets_threshold": T,
        }
        cluster = fleet.cluster
        cluster.settings["encrypt"] = {"encrypt_type": "PW_ENCRYPT", "pw_encrypt": masks}
        cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
        fleet.start_all()
        yield fleet


def urls_of(fleet: Fleet, hosts: Mapping[int, int]) -> list[str]:
    return [f"http://127.0.0.1:{fleet.at(n).http}" for n in hosts]


def check_model(fleet: Fleet, uploaders: Sequence[int]) -> None:
    """Compare with the plain mean, in double precision.

    A mask is a sum of at most DEVICES streams below 1, and is rounded once per stream; so is the sum with the weights.
    """
    sizes = {number: Trainer(number).size for number in uploaders}
    total = sum(sizes.values())
    moved = sum((number + 1) / 8 * size for number, size in sizes.items()) / total
    largest = max(float(np.abs(values).max()) for values in MODEL.values()) + DEVICES / 8
    unit = 2.0**-24
    tolerance = len(uploaders) * (DEVICES**2 + 5 * largest + DEVICES) * unit / total + largest * 2 * unit
    published = fleet.at(0).weights(1)
    assert published.keys() == MODEL.keys()
    for name, values in MODEL.items():
        error = np.abs(np.float64(published[name]).reshape(-1) - (np.float64(values).reshape(-1) + moved))
        assert error.max() <= tolerance, name


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


def test_every_request_comes_twice(tmp_path: Path) -> None:
    with masked(tmp_path, TWO_SERVERS, 1.0, 1.0) as fleet:
        crowd = Crowd(urls_of(fleet, TWO_SERVERS), {}, twice=True)
        crowd.finish()
        assert crowd.uploaders() == list(range(DEVICES))
        check_model(fleet, crowd.uploaders())


def test_the_layout_of_old_devices(tmp_path: Path) -> None:
    layout = {"secure_aggregation": {"mask_layout": "per_layer"}}
    with masked(tmp_path, ONE_SERVER, 1.0, 0.9, **layout) as fleet:
        crowd = Crowd(urls_of(fleet, ONE_SERVER), {3: "updateModel"}, layout=Layout.PER_LAYER)
        crowd.finish()
        check_model(fleet, crowd.uploaders())


# ---- servers that die


class Killer:
    """Kills a server at the n-th request of a round."""

    def __init__(self, fleet: Fleet, victim: int, round_: str, nth: int) -> None:
        self._fleet, self._victim, self._round, self._left = fleet, victim, round_, nth
        self._lock = threading.Lock()

    @property
    def done(self) -> bool:
        return self._left <= 0

    def __call__(self, round_: str) -> None:
        with self._lock:
            if round_ != self._round:
                return
            self._left -= 1
            if self._left == 0:
                self._fleet.kill(self._victim)


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


def check_outcome(fleet: Fleet, uploaders: Sequence[int]) -> None:
    """The model is the mean, or the iteration has failed by name and the model is the old one."""
    told = wait_until(lambda: {one for number, one in fleet.outcomes() if number == 1}, "the iteration ended")
    assert len(told) == 1, told
    (outcome,) = told
    if outcome.valid:
        check_model(fleet, uploaders)
        return
    assert outcome.result
    for name, values in fleet.at(0).weights(1).items():
        assert np.array_equal(values.reshape(-1), MODEL[name].reshape(-1))


@pytest.mark.parametrize("round_", ROUNDS)
def test_a_server_killed_in_each_round(tmp_path: Path, round_: str) -> None:
    with masked(tmp_path, TWO_SERVERS, 1.0, 1.0) as fleet:
        killer = Killer(fleet, 1, round_, DEVICES // 2)
        crowd = Crowd(urls_of(fleet, TWO_SERVERS), {}, before=killer)
        crowd.finish()
        assert killer.done
        check_outcome(fleet, crowd.uploaders())


def test_a_host_lost_after_the_list_is_frozen(tmp_path: Path) -> None:
    with masked(tmp_path, TWO_HOSTS, 1.0, 1.0) as fleet:
        killer = Killer(fleet, 1, "reconstructSecrets", 1)  # who reports has been told the list
        crowd = Crowd(urls_of(fleet, TWO_HOSTS), {}, before=killer)
        crowd.finish()
        assert killer.done
        check_outcome(fleet, crowd.uploaders())


# ---- silos


@pytest.mark.parametrize("servers", [1, 2])
def test_silos_that_mask_their_updates(tmp_path: Path, servers: int) -> None:
    masks = {"share_secrets_ratio": 1.0, "cipher_time_window": 20_000, "reconstruct_secrets_threshold": 1}
    encrypt = {"encrypt_type": "STABLE_PW_ENCRYPT", "pw_encrypt": masks}
    silos = [Silo(number) for number in range(3)]
    reference = Reference("FedAvg", silos, SILO_STEPS)
    with cloud(tmp_path / "job", "FedAvg", servers, encrypt=encrypt) as cluster, Work() as work:
        for silo in silos:
            work.start(cluster, servers, "FedAvg", silo, encrypt_mode="STABLE_PW_ENCRYPT")
        summaries = work.finish()
        for _ in range(ITERATIONS):
            reference.iterate()
        for summary in summaries:
            assert (summary.completed, summary.restarted) == (ITERATIONS, 0)
            assert_silos_equal(summary.weights, reference.x, "the last model")
