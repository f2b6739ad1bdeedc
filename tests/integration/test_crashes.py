"""What a 200 promises, put to the test with real processes: kill, pause and starve servers, then count.

Every client trains a weight of its own, so a published model tells who is in it and how often; all values are small
integers, so their float64 sums are exact. A model is right if it is the weighted mean of a set of updates that
contains every acknowledged one.
"""

from __future__ import annotations

import contextlib
import copy
import mmap
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.cluster import Cluster, wait_until

from fedcore.errors import MalformedRequest
from fedcore.ledger import layout
from fedcore.models.checkpoints import load_newest
from fedcore.models.formats import write_model
from fedctl.processes import HOST, free_ports

SOAK_S = float(os.environ.get("FEDCORE_SOAK", "16"))
PLACES = 8
LEASE_S = 10.0
MODEL = {"whose": np.zeros(PLACES, np.float32), "all": np.zeros((2, 3), np.float32)}
LOST = "Server that processed updateModel requests exited"


def weights_of(client: int, iteration: int) -> dict[str, np.ndarray]:
    """Return what a client trains: its place in one weight, and its number everywhere in the other."""
    whose = np.zeros(PLACES, np.float32)
    whose[client] = 1 + iteration % 100
    return {"whose": whose, "all": np.full(6, client + 1, np.float32)}


def data_size_of(client: int) -> int:
    return 3 + 7 * client


def mean_of(clients: set[int], iteration: int) -> dict[str, np.ndarray]:
    """Return the exact mean of these clients' updates, each weighted by its data size."""
    total = sum(data_size_of(client) for client in clients)
    sums = {name: np.zeros(values.size) for name, values in MODEL.items()}
    for client in clients:
        for name, values in weights_of(client, iteration).items():
            sums[name] += np.float64(values) * data_size_of(client)
    return {name: np.float32(values / total) for name, values in sums.items()}


def members(model: Mapping[str, np.ndarray]) -> set[int]:
    return {int(client) for client in np.flatnonzero(model["whose"])}


def check_model(model: Mapping[str, np.ndarray], acknowledged: set[int], iteration: int) -> None:
    """Fail unless a model is the exact mean of the acknowledged updates, and maybe of more, each once."""
    there = members(model)
    assert there >= acknowledged, f"iteration {iteration} lost updates of {acknowledged - there}"
    for name, values in mean_of(there, iteration).items():
        np.testing.assert_array_equal(model[name], values, f"{name} of iteration {iteration}")


@contextmanager
def cluster_of(directory: Path, places: int = PLACES, **settings: Any) -> Iterator[Cluster]:
    """Prepare a job whose model is MODEL, and start its Redis."""
    fedcore = {"device": {"hold_time": 2.0, "retry_margin": 0.1}} | settings.pop("fedcore", {})
    windows = dict.fromkeys(
        ("start_fl_job_time_window", "update_model_time_window", "global_iteration_time_window"), 600_000
    )
    directory.mkdir(exist_ok=True)
    with Cluster(
        directory,
        start_fl_job_threshold=places,
        fl_iteration_num=1_000_000,
        fedcore=fedcore,
        **windows | settings,
    ) as cluster:
        write_model(directory / "model.safetensors", MODEL, set(), {})
        cluster.start_redis()
        yield cluster


def sibling_of(cluster: Cluster) -> Cluster:
    """Return another server of the same job on the same host, named "sibling"; start it with ``start_sibling``."""
    sibling = copy.copy(cluster)
    sibling.http, sibling.admin = free_ports(2)
    return sibling


def start_sibling(sibling: Cluster) -> None:
    sibling.spawn(
        "sibling",
        *sibling.command("serverd"),
        *("--yaml-config", str(sibling.yaml), "--instance", "1"),
        *("--http-server-address", f"127.0.0.1:{sibling.http}"),
        *("--admin-address", f"127.0.0.1:{sibling.admin}"),
    )
    wait_until(sibling.ready, "the sibling is ready")


def start_all(cluster: Cluster, iteration: int = 1, places: int = PLACES) -> None:
    for client in range(places):
        reply = cluster.start(f"client-{client}", data_size_of(client))
        assert (reply.retcode, reply.iteration) == (200, iteration), reply.reason


def upload(cluster: Cluster, client: int, iteration: int = 1) -> None:
    """Upload and get a 200."""
    reply = cluster.update(f"client-{client}", iteration, weights_of(client, iteration), data_size_of(client))
    assert (reply.retcode, reply.reason) == (200, "success not ready")


def published(cluster: Cluster, iteration: int = 1) -> dict[str, np.ndarray]:
    """Return the model of an iteration once it is there and the next one has begun."""

    def look() -> Any:
        reply = cluster.model(iteration)
        return reply.retcode == 200 and reply

    reply = wait_until(look, f"the model of iteration {iteration}", 40)
    return {item.weight_fullname: item.data for item in reply.feature_map}


def ledgers_of(cluster: Cluster) -> list[Path]:
    return sorted((cluster.directory / "checkpoints" / "ledgers").glob("*.ledger"))


# ---- under load


class Device(threading.Thread):
    """A client that takes part in every iteration and repeats each request until it is answered."""

    def __init__(self, load: Load, client: int) -> None:
        super().__init__(daemon=True)
        self.load, self.client, self.fl_id = load, client, f"client-{client}"
        self.newest = 0  # iteration; must never go back

    def run(self) -> None:
        try:
            while not self.load.over.is_set():
                self.take_part()
        except Exception as error:
            self.load.faults.append(error)
            self.load.over.set()

    def ask(self, question: Callable[[], Any]) -> Any:
        """Ask until a table comes back; None if the load is over before."""
        while not self.load.over.is_set():
            try:
                reply = question()
            except (
                OSError,
                HTTPException,
                MalformedRequest,
            ):  # nobody there, cut off, or no table but a text
                self.load.over.wait(0.01)
                continue
            self.load.answered.release()
            return reply
        return None

    def take_part(self) -> None:
        """Start, upload, fetch the model."""
        load, size = self.load, data_size_of(self.client)
        begun = self.ask(lambda: load.cluster.start(self.fl_id, size))
        if begun is None or begun.retcode != 200:
            load.over.wait(0.02)
            return
        k = begun.iteration
        assert k >= self.newest, f"iteration {k} after {self.newest}"
        self.newest = k
        sent = self.ask(lambda: load.cluster.update(self.fl_id, k, weights_of(self.client, k), size))
        if sent is None:
            return
        if sent.retcode == 200:
            with load.lock:
                load.acknowledged[k].add(self.client)
        else:
            assert sent.retcode == 300, (sent.retcode, sent.reason)
        model = self.ask(lambda: load.cluster.model(k))
        while model is not None and model.retcode != 200:
            load.over.wait(0.005)
            model = self.ask(lambda: load.cluster.model(k))
        if model is None:
            return
        assert model.iteration > k
        if model.iteration == k + 1:  # later, a server that was started again serves a newer model instead
            with load.lock:
                load.models[k].append({item.weight_fullname: item.data for item in model.feature_map})


class Load:
    """Devices at work, what they were promised, and the models that they got."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.over = threading.Event()
        self.answered = threading.Semaphore(0)
        self.lock = threading.Lock()
        self.acknowledged: defaultdict[int, set[int]] = defaultdict(set)
        self.models: defaultdict[int, list[dict[str, np.ndarray]]] = defaultdict(list)
        self.faults: list[Exception] = []
        self.devices = [Device(self, client) for client in range(PLACES)]

    def __enter__(self) -> Load:
        for device in self.devices:
            device.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for device in self.devices:
            device.join(60)

    def wait_for_answers(self, count: int, seconds: float = 3.0) -> None:
        """Return when so many more answers have come, or in any case after some time."""
        limit = time.monotonic() + seconds
        while count and self.answered.acquire(timeout=max(0.0, limit - time.monotonic())):
            count -= 1

    def drain(self) -> None:
        while self.answered.acquire(blocking=False):
            pass

    def check(self) -> int:
        """Fail unless every model is right; return how many there were."""
        assert not self.faults, self.faults
        finished = sorted(self.models)
        assert finished == list(range(1, len(finished) + 1))  # none was left out
        for k in finished:
            for model in self.models[k]:
                check_model(model, self.acknowledged[k], k)
                assert len(members(model)) == PLACES * 3 // 4
        return len(finished)


def test_kills_under_load(tmp_path: Path) -> None:
    chance = random.Random(20)
    kills = 0
    with cluster_of(tmp_path, update_model_ratio=0.75) as cluster:
        cluster.start_server()
        with Load(cluster) as load:
            limit = time.monotonic() + SOAK_S
            while time.monotonic() < limit and not load.over.is_set():
                if chance.random() < 0.8:  # at work; otherwise while it starts, joins or adopts
                    load.drain()
                    load.wait_for_answers(chance.randrange(1, 60))
                else:
                    load.over.wait(chance.uniform(0.2, 1.5))
                load.over.wait(chance.choice((0.0, chance.uniform(0.0, 0.02))))
                cluster.kill("server")
                kills += 1
                cluster.spawn("server", *cluster.command("serverd"), "--yaml-config", str(cluster.yaml))
            wait_until(lambda: load.faults or cluster.ready(), "the server is ready")
            newest = max(device.newest for device in load.devices)
            wait_until(lambda: load.faults or load.models[newest + 2], "two more iterations", 60)
        iterations = load.check()
        assert LOST not in cluster.log()
        assert "This iteration is invalid" not in cluster.log()
        assert "aggregation failed" not in cluster.log()
        assert '"level": "critical"' not in cluster.log()
        assert not list((cluster.directory / "checkpoints" / "ledgers").glob("*.damaged"))
        adopted = cluster.log().count("adopted a ledger")
    print(f"{kills} kills survived in {iterations} iterations; {adopted} ledgers adopted")
    assert kills >= SOAK_S / 8
    assert iterations >= kills / 4


# ---- one server after another


def test_a_server_killed_while_it_adopts_loses_nothing(tmp_path: Path) -> None:
    chance = random.Random(4)
    with cluster_of(tmp_path) as cluster:
        cluster.start_server()
        start_all(cluster)
        for client in range(PLACES - 1):
            upload(cluster, client)
        cluster.kill("server")
        once = time.monotonic()
        cluster.start_server()
        start_up = time.monotonic() - once
        for _ in range(8):
            cluster.kill("server")
            cluster.spawn("server", *cluster.command("serverd"), "--yaml-config", str(cluster.yaml))
            threading.Event().wait(chance.uniform(0.6, 1.1) * start_up)  # a random moment around the adoption
        cluster.kill("server")
        cluster.start_server()
        upload(cluster, 0)  # a repeat
        upload(cluster, PLACES - 1)
        model = published(cluster)
        assert members(model) == set(range(PLACES))
        check_model(model, set(range(PLACES)), 1)
        assert LOST not in cluster.log()


@pytest.mark.parametrize("fsync", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_stopped_in_mid_iteration_loses_nothing(tmp_path: Path, number: int, fsync: bool) -> None:
    with cluster_of(tmp_path, fedcore={"ledger": {"fsync": fsync}}) as cluster:
        cluster.start_server()
        for iteration in (1, 2):
            start_all(cluster, iteration)
            for client in range(PLACES):
                upload(cluster, client, iteration)
                if client % 3 == 2:
                    assert cluster.kill("server", number) == (0 if number == signal.SIGTERM else -number)
                    cluster.start_server()
            model = published(cluster, iteration)
            assert members(model) == set(range(PLACES))
            check_model(model, set(range(PLACES)), iteration)
        assert LOST not in cluster.log()
        assert len(ledgers_of(cluster)) == 1  # what was adopted is removed with its iteration


def test_a_stopped_server_without_updates_leaves_no_ledger(tmp_path: Path) -> None:
    with cluster_of(tmp_path) as cluster:
        cluster.start_server()
        assert len(ledgers_of(cluster)) == 1
        assert cluster.kill("server", signal.SIGTERM) == 0
        assert ledgers_of(cluster) == []


# ---- two servers of one host


@pytest.mark.parametrize("at_once", [False, True], ids=["in time", "at once"])
def test_a_sibling_adopts_what_a_dead_server_holds(tmp_path: Path, at_once: bool) -> None:
    with cluster_of(tmp_path) as cluster:
        cluster.start_server()
        sibling = sibling_of(cluster)
        start_sibling(sibling)
        start_all(cluster)
        for client in range(PLACES // 2):
            upload(cluster, client)
        cluster.kill("server")
        if not at_once:
            wait_until(lambda: "adopted a ledger" in cluster.log("sibling"), "the sibling adopts")
        upload(sibling, 0)  # a repeat
        for client in range(PLACES // 2, PLACES):
            upload(sibling, client)
        model = published(sibling)
        assert members(model) == set(range(PLACES))
        check_model(model, set(range(PLACES)), 1)
        assert LOST not in cluster.log("sibling")


@pytest.mark.parametrize("ms", [0, 3, 6, 12, 25])
def test_a_sibling_finishes_what_a_dead_server_began(tmp_path: Path, ms: int) -> None:
    """It dies at any moment between the last update and the next iteration."""
    with cluster_of(tmp_path) as cluster:
        cluster.start_server()
        sibling = sibling_of(cluster)
        start_sibling(sibling)
        start_all(cluster)
        for client in range(PLACES - 1):
            upload(cluster, client)

        def upload_last() -> None:
            with contextlib.suppress(OSError, HTTPException):
                upload(cluster, PLACES - 1)

        last = threading.Thread(target=upload_last)
        last.start()
        threading.Event().wait(ms / 1000)
        cluster.kill("server")
        last.join()
        upload(sibling, PLACES - 1)
        check_model(checkpointed(cluster, 1), set(range(PLACES)), 1)


def test_a_paused_server_keeps_its_ledger(tmp_path: Path) -> None:
    with cluster_of(tmp_path) as cluster:
        cluster.start_server()
        sibling = sibling_of(cluster)
        start_sibling(sibling)
        start_all(cluster)
        for client in range(PLACES // 2):
            upload(cluster, client)
        cluster.processes["server"].send_signal(signal.SIGSTOP)
        asked = threading.Thread(target=lambda: upload(cluster, PLACES - 1))
        asked.start()  # the kernel takes its connection and its body
        assert leases(cluster) == 2
        wait_until(lambda: leases(cluster) == 1, "the lease of the paused server lapses", LEASE_S + 5)
        upload(sibling, 0)  # a repeat
        cluster.processes["server"].send_signal(signal.SIGCONT)
        for client in range(PLACES // 2, PLACES):
            upload(cluster, client)
        asked.join()
        model = published(cluster)
        assert members(model) == set(range(PLACES))
        check_model(model, set(range(PLACES)), 1)
        assert "adopted" not in cluster.log() + cluster.log("sibling")


def leases(cluster: Cluster) -> int:
    """Return how many servers Redis believes to be alive."""
    count = "return #redis.call('KEYS','*server:heartbeat*')"
    return int((cluster.redis("EVAL", f'"{count}"', "0") or b":0").removeprefix(b":"))


def checkpointed(cluster: Cluster, iteration: int) -> dict[str, np.ndarray]:
    """Return the weights of a checkpoint once it is there."""

    def look() -> Any:
        newest = load_newest(cluster.directory / "checkpoints", "job")
        return newest if newest is not None and newest.iteration == iteration else None

    weights = wait_until(look, f"the checkpoint of iteration {iteration}", 40).model.weights
    return {name: np.asarray(values).reshape(-1) for name, values in weights.items()}


# ---- a directory without room


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    place = tmp_path / "small"
    place.mkdir()
    if not mount or not umount or os.geteuid() != 0:
        pytest.skip("only root can mount a tmpfs")
    if run(mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)):
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        yield place
    finally:
        run(umount, "-l", str(place))


def run(*command: str) -> int:
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode


def resize(place: Path, size: int) -> None:
    assert run("mount", "-o", f"remount,size={size}", str(place)) == 0


def test_a_full_ledger_directory_is_told_and_recovers(tmp_path: Path, small_tmpfs: Path) -> None:
    with cluster_of(tmp_path / "job", fedcore={"device": {"hold_time": 0.5}}) as cluster:
        cluster.start_server("--ledger-dir", str(small_tmpfs), ready=False)
        problem = wait_until(lambda: "needs" in (text := ledger_problem(cluster)) and text, "the problem")
        begin, end = "the update ledger needs ", f" bytes at {small_tmpfs} (free or add space there"
        assert problem.startswith(begin) and end in problem
        size = int(problem.removeprefix(begin).partition(end)[0])
        with pytest.raises(ConnectionRefusedError):  # so that clients go to another server
            socket.create_connection((HOST, cluster.http), 5)
        assert list(small_tmpfs.iterdir()) == []
        resize(small_tmpfs, size + (1 << 16))
        wait_until(cluster.ready, "the server is ready")
        start_all(cluster)
        for client in range(PLACES - 1):
            upload(cluster, client)

        cluster.kill("server")  # there is room for one ledger, and the dead process's one takes it
        cluster.start_server("--ledger-dir", str(small_tmpfs), ready=False)
        wait_until(lambda: ledger_problem(cluster) == problem, "the problem")
        resize(small_tmpfs, 2 * size + (1 << 17))
        wait_until(cluster.ready, "the server is ready")
        upload(cluster, PLACES - 1)
        model = published(cluster)
        assert members(model) == set(range(PLACES))
        check_model(model, set(range(PLACES)), 1)

        cluster.kill("server")
        resize(small_tmpfs, size + (1 << 16))  # what the dead process leaves holds no update: it makes room
        cluster.start_server("--ledger-dir", str(small_tmpfs), ready=False)
        wait_until(cluster.ready, "the server is ready")
        assert LOST not in cluster.log()


def test_models_are_made_while_no_ledger_directory_has_room(tmp_path: Path, small_tmpfs: Path) -> None:
    """The ledgers that are there take updates, and who makes the model reads the other host's sum all the same."""
    filling = small_tmpfs / "filling"
    with cluster_of(tmp_path / "job") as cluster:
        resize(small_tmpfs, 1 << 26)
        for n in range(2):
            cluster.start_server_on(cluster.host(n), n, "--ledger-dir", str(small_tmpfs / str(n)))
        fill_up(filling)
        for iteration in (1, 2):
            start_all(cluster, iteration)
            for client in range(
                PLACES
            ):  # the last one's server seals, and makes the model: once the one, once the other
                upload(cluster.at((client + iteration) % 2), client, iteration)
            for n in range(2):
                model = published(cluster.at(n), iteration)
                check_model(model, set(range(PLACES)), iteration)
        assert os.statvfs(small_tmpfs).f_bavail == 0
        told = cluster.log("server-0") + cluster.log("server-1")
        assert "cannot be taken" not in told and LOST not in told


def fill_up(file: Path) -> None:
    """Write until the file system is full."""
    with file.open("wb", buffering=0) as filling, pytest.raises(OSError, match="No space"):
        while True:
            filling.write(bytes(mmap.PAGESIZE))


def ledger_problem(cluster: Cluster) -> str:
    return "" if cluster.ready() else cluster.not_ready_because().get("ledger", "")


# ---- damage


def damage_body(file: bytearray) -> None:
    shape, found = layout.examine(memoryview(file))
    entry = found.pending[1]
    file[shape.body_at(entry.slot) + entry.record.length // 2] ^= 0x10


def damage_trailer(file: bytearray) -> None:
    shape, found = layout.examine(memoryview(file))
    file[shape.accumulator_at(found.generation) + 40] ^= 0x10


@pytest.mark.parametrize("damage", [damage_body, damage_trailer])
def test_the_clients_of_a_damaged_ledger_may_come_again(
    tmp_path: Path, damage: Callable[[bytearray], None]
) -> None:
    with cluster_of(tmp_path) as cluster:
        cluster.start_server()
        start_all(cluster)
        for client in range(3):
            upload(cluster, client)
        cluster.kill("server")
        (path,) = ledgers_of(cluster)
        content = bytearray(path.read_bytes())
        damage(content)
        path.write_bytes(content)
        cluster.start_server()
        wait_until(lambda: cluster.metric("fl_updates_lost_total") == 3, "the loss", LEASE_S + 15)
        told = "a counted update is unreadable" if damage is damage_body else "a damaged ledger is set aside"
        assert told in cluster.log()
        assert "lost 3 accepted updates" in (cluster.directory / "event.txt").read_text()
        start_all(cluster)
        for client in range(PLACES):
            upload(cluster, client)
        check_model(published(cluster), set(range(PLACES)), 1)
