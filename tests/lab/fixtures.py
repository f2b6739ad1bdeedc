"""What scenarios share: the cluster, the devices that train on it all the while, and the table of what was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from lab.cluster import SERVER_HOSTS, Cluster, endless_job
from lab.commands import say
from lab.devices import Devices, Seen
from lab.history import HostsHistory
from lab.lab import Lab
from lab.results import Results

Watch = Callable[[str], AbstractContextManager[Seen]]


@pytest.fixture(scope="session")
def cluster(lab: Lab) -> Cluster:
    """The hosts as a cluster, whatever is installed."""
    return Cluster(lab)


@pytest.fixture(scope="session")
def devices(cluster: Cluster) -> Iterator[Devices]:
    """Devices that train all the while, on an endless job of two servers on two hosts."""
    job = endless_job()
    if not cluster.deployed(job):
        cluster.play("site.yml", job, "--limit", "all:!workers")
    cluster.await_servers(dict.fromkeys(SERVER_HOSTS, 1))
    history = HostsHistory(cluster.hosts())
    with Devices(cluster.device_addresses, cluster.tls, history, cluster.balancer) as devices:
        devices.wait_for_iterations(3, 120)
        yield devices
        devices.stop()
        report = devices.judge(may_fail=bool)
        say(
            f"the devices have seen {len(report.members)} iterations and {report.models} models; "
            f"{report.acknowledged} updates were accepted, {len(report.missing)} of them are in no model"
        )


@pytest.fixture(scope="session")
def results(lab: Lab) -> Results:
    """The table of this session."""
    return Results(lab.places.artefacts / "results.md")


@pytest.fixture
def watch(cluster: Cluster, devices: Devices, results: Results) -> Iterator[Watch]:
    """Watch a fault: ``with watch("what happens") as seen``; a row of the table comes of it. All is mended after."""

    @contextmanager
    def watched(what: str) -> Iterator[Seen]:
        with devices.watched(what) as seen:
            yield seen
        results.add(seen)

    yield watched
    devices.turnstile.open()
    cluster.mend()
    cluster.set_servers(1)
