"""From empty hosts to a finished training, by the playbooks and nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.cluster import Cluster, lenet_job
from lab.commands import wait_until

from fedcore.models import checkpoints
from fedexamples import datasets, lenet

SILOS, ITERATIONS = 4, 4
LEARNED = 0.75  # of the test digits; guessing is 0.1
JOB = lenet_job("HYBRID_TRAINING", ITERATIONS, SILOS)


@pytest.fixture(scope="module")
def empty(cluster: Cluster) -> Cluster:
    """Hosts that nothing is installed on."""
    if (cluster["scheduler"].root / "opt/fl").exists():
        cluster.lab.renew()
    return cluster


@pytest.fixture(scope="module")
def deployed(cluster: Cluster) -> Cluster:
    """The hosts with all that site.yml makes of them."""
    cluster.play("site.yml", JOB)
    cluster.await_servers({"server1": 1, "server2": 1})
    return cluster


class Silos:
    """fl-client processes on the controller, as the silos' operators start them."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._files = [folder / f"silo-{n}.jsonl" for n in range(SILOS)]
        servers = [f"https://{cluster[host].address}:6666" for host in ("server1", "server2")]
        self.processes = [
            cluster.lab.controller.spawn(self._command(n, servers, cluster.ca_file), self._files[n])
            for n in range(SILOS)
        ]

    @staticmethod
    def _command(n: int, servers: list[str], ca_file: Path) -> list[str]:
        where = [word for server in servers for word in ("--server", server)]
        what = ["--fl-name", JOB.name, "--trainer", "fedexamples.lenet:LeNetTrainer"]
        part = ["--set", f"shard={n}", "--set", f"shards={SILOS}", "--json"]
        return [sys.executable, "-m", "fedclient", *where, "--ca-file", str(ca_file), *what, *part]

    def said(self) -> str:
        return "\n".join(file.read_text() for file in self._files)

    def iterations(self) -> set[int]:
        """Return the iterations that somebody has completed."""
        lines = [line for line in self.said().splitlines() if line.startswith("{")]
        ended = [json.loads(line) for line in lines]
        return {line["iteration"] for line in ended if line.get("outcome") == "completed"}

    def wait(self, seconds: float) -> None:
        """Wait until all have come to their end."""
        codes = [process.wait(seconds) for process in self.processes]
        assert codes == [0] * SILOS, self.said()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def silos(deployed: Cluster, tmp_path: Path) -> Iterator[Silos]:
    """Silos that train until the job ends."""
    silos = Silos(deployed, tmp_path)
    yield silos
    silos.end()


def test_check_mode_fails_nowhere_on_empty_hosts(empty: Cluster) -> None:
    played = empty.play("site.yml", JOB, "--check")
    assert not played.failed
    assert not (empty["server1"].root / "opt/fl").exists()


def test_a_second_run_changes_nothing(deployed: Cluster) -> None:
    again = deployed.play("site.yml", JOB)
    assert (again.changed, again.failed) == ({}, {})


def test_hybrid_training_learns_to_read_though_its_worker_is_killed(silos: Silos, deployed: Cluster) -> None:
    wait_until(
        lambda: silos.iterations() or any(process.poll() for process in silos.processes), 120, "a model"
    )
    worker = deployed.main_pid("worker1", "fl-workerd.service")
    deployed.kill("worker1", "fl-workerd.service")
    deployed.await_another("worker1", "fl-workerd.service", than=worker)
    silos.wait(240)
    assert silos.iterations() == set(range(1, ITERATIONS + 1))
    assert accuracy_of(deployed, "server1") == accuracy_of(deployed, "server2") > LEARNED


def accuracy_of(cluster: Cluster, host: str) -> float:
    """Return the share of test digits that the newest model of a host reads rightly."""
    newest = checkpoints.load_newest(cluster[host].root / "var/lib/fl/checkpoints", JOB.name)
    assert newest is not None, f"{host} has no model"
    assert newest.iteration == ITERATIONS
    weights = lenet.shaped(newest.model.weights)
    digits = datasets.load("digits")
    return lenet.accuracy(weights, digits.test_images, digits.test_labels)
