"""How a server joins a job that others train: whose values and whose model count, and who must not join at all."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.cluster import wait_until
from integration.faults import Fleet, Run, fleet_of
from integration.links import Link
from integration.oracle import MODEL, members_of
from integration.test_daemons import make_p12
from integration.watching import RedisReader, status_of

from fedcore.models.formats import write_model

ONE_SERVER, ONE_HOST, TWO_HOSTS = {0: 0}, {0: 0, 1: 0}, {0: 0, 1: 1}
HOSTS = pytest.mark.parametrize("hosts", [ONE_HOST, TWO_HOSTS], ids=["one host", "two hosts"])
SAME_OR_OTHER = pytest.mark.parametrize("host", [0, 1], ids=["same host", "other host"])
PLACES = 4
EVERYBODY = frozenset(range(PLACES))
EX_CONFIG = 78


def train(run: Run, iterations: int = 1) -> None:
    """Complete iterations."""
    for _ in range(iterations):
        run.start_all(range(PLACES))
        run.upload(range(PLACES))
        run.fetch(range(PLACES))


def messages(fleet: Fleet, n: int, level: str) -> list[str]:
    """Return what a server has logged at a level."""
    told = []
    for line in fleet.log(n).splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if record.get("level") == level:
                told.append(record["message"])
    return told


# ---- whose values count


@SAME_OR_OTHER
def test_a_newcomer_takes_the_clusters_values_over(tmp_path: Path, host: int) -> None:
    with fleet_of(tmp_path, {0: 0}, places=PLACES) as fleet, Run(fleet) as run:
        train(run)
        fleet.cluster.own[1] = {
            "round": {
                "start_fl_job_threshold": 2,
                "update_model_ratio": 0.5,
                "update_model_time_window": 1000,
            },
            "client": {"client_epoch_num": 9, "client_batch_size": 99, "client_learning_rate": 0.75},
            "fl_iteration_num": 1,
        }
        fleet.add(1, host)
        fleet.start(1)
        run.prober.watch()
        ours = {
            "start_fl_job_threshold": "2",
            "update_model_ratio": "0.5",
            "update_model_time_window": "1000",
        }
        ours |= {"client_epoch_num": "9", "client_batch_size": "99", "client_learning_rate": "0.75"}
        ours |= {"fl_iteration_num": "1"}
        told = [text for text in messages(fleet, 1, "warn") if "the cluster's value is used" in text]
        assert sorted(text.partition(" ")[0] for text in told) == sorted(ours)
        for text in told:
            name, _, rest = text.partition(" is ")
            assert rest.startswith(f"{ours[name]} here, "), text
        assert "start_fl_job_threshold is 2 here, 4 in the cluster; the cluster's value is used" in told
        assert not [text for text in messages(fleet, 0, "warn") if "in the cluster" in text]
        run.start_all(range(PLACES), server=1)
        plans = [fleet.at(n).start("client-0", 3).fl_plan_config for n in (0, 1)]
        assert plans[0] == plans[1]
        run.upload(range(PLACES), server=1)
        run.fetch(range(PLACES))
        assert run.judge(quorum=PLACES).members == {1: EVERYBODY, 2: EVERYBODY}


def refused(fleet: Fleet, n: int, *options: str, text: str) -> None:
    """Start a server that must end by itself as a wrong configuration does, and say why."""
    fleet.start(n, *options, ready=False)
    name = fleet.cluster.name(n)
    assert fleet.cluster.processes.pop(name).wait(20) == EX_CONFIG, fleet.log(n)
    assert text in fleet.log(n)
    assert "Traceback" not in fleet.log(n)


def goes_on(fleet: Fleet, run: Run, iterations: Mapping[int, frozenset[int]]) -> None:
    """Check that the others have noticed nothing."""
    run.upload(range(PLACES // 2, PLACES))
    run.fetch(range(PLACES))
    train(run)
    assert run.judge(quorum=PLACES).members == iterations
    nodes = fleet.cluster.redis("HLEN", f"ms_fl:job:{instance_of(fleet)}:server:Hash")
    assert nodes == b":%d" % len(fleet.running())


def instance_of(fleet: Fleet) -> str:
    with RedisReader(fleet.cluster.redis_port) as redis:
        return redis.ask("GET", "ms_fl:job:InstanceName:String")


def address_of(fleet: Fleet, n: int) -> str:
    """Return where a server that is to be started will look for Redis."""
    fleet.links[n] = Link(fleet.cluster.redis_port)
    return f"127.0.0.1:{fleet.links[n].port}"


def conflict(name: str, here: int, there: int, address: str) -> str:
    return (
        f"Context '{name}' {here} of local != that {there} declared in distributed cache.\n"
        f"Sync hyper params with distributed cache failed, distributed_cache_address: {address}"
    )


def test_a_newcomer_with_tls_must_not_join_a_cluster_without(tmp_path: Path) -> None:
    with fleet_of(tmp_path, TWO_HOSTS, places=PLACES) as fleet, Run(fleet) as run:
        run.start_all(range(PLACES))
        run.upload(range(PLACES // 2))
        make_p12(tmp_path / "server.p12", b"secret")
        (tmp_path / "password").write_text("secret\n")
        fleet.cluster.own[2] = {
            "enable_ssl": True,
            "ssl": {
                "server_cert_path": str(tmp_path / "server.p12"),
                "client_cert_path": str(tmp_path / "server.p12"),
                "ca_cert_path": str(tmp_path / "ca.crt"),
                "cipher_list": "ECDHE-ECDSA-AES256-GCM-SHA384",
            },
            "fedcore": {"redis": {"tls": "off"}, "node": {"tls": False}},
        }
        fleet.add(2, 2)
        options = ("--server-password-file", str(tmp_path / "password"))
        refused(fleet, 2, *options, text=conflict("enable_ssl", 1, 0, address_of(fleet, 2)))
        goes_on(fleet, run, {1: EVERYBODY, 2: EVERYBODY})


@pytest.mark.parametrize("name", ["enable_ssl", "pki_verify"])
def test_a_newcomer_without_must_not_join_a_cluster_with(tmp_path: Path, name: str) -> None:
    """The shared value is written as another version's server would have."""
    with fleet_of(tmp_path, TWO_HOSTS, places=PLACES) as fleet, Run(fleet) as run:
        run.start_all(range(PLACES))
        run.upload(range(PLACES // 2))
        key = f"ms_fl:job:{instance_of(fleet)}:hyperParams:String"
        with RedisReader(fleet.cluster.redis_port) as redis:
            values = json.loads(redis.ask("GET", key)) | {name: True}
            redis.ask("SET", key, json.dumps(values), "KEEPTTL")
        fleet.add(2, 2)
        refused(fleet, 2, text=conflict(name, 0, 1, address_of(fleet, 2)))
        goes_on(fleet, run, {1: EVERYBODY, 2: EVERYBODY})


# ---- whose model counts

IN_CACHE = "declared in the distributed cache, feature:"


@pytest.mark.parametrize(
    ("weights", "plain", "text"),
    [
        (
            {**MODEL, "third": np.zeros(1, np.float32)},
            set(),
            "The number 3 of local features != the number 2 declared in the the distributed cache",
        ),
        (
            {"whose": MODEL["whose"], "al": MODEL["all"]},
            set(),
            "The features are inconsistent with that declared in distributed cache: cannot find feature all in local",
        ),
        (
            {**MODEL, "all": np.zeros((2, 4), np.float32)},
            set(),
            f"The feature size 32 of local != that 24 {IN_CACHE} all",
        ),
        (MODEL, {"all"}, f"The feature require_aggr 0 of local != that 1 {IN_CACHE} all"),
    ],
    ids=["number", "name", "size", "require_aggr"],
)
@SAME_OR_OTHER
def test_a_newcomer_with_another_model_must_not_join(
    tmp_path: Path, host: int, weights: Mapping[str, Any], plain: set[str], text: str
) -> None:
    with fleet_of(tmp_path, ONE_SERVER, places=PLACES) as fleet, Run(fleet) as run:
        run.start_all(range(PLACES))
        run.upload(range(PLACES // 2))
        write_model(tmp_path / "other.safetensors", weights, plain, {})
        fleet.add(1, host)
        refused(fleet, 1, "--model", str(tmp_path / "other.safetensors"), text=text)
        goes_on(fleet, run, {1: EVERYBODY, 2: EVERYBODY})


@SAME_OR_OTHER
def test_a_newcomer_with_another_initial_model_serves_the_clusters(tmp_path: Path, host: int) -> None:
    """No iteration has ended yet, so the clusters' model is in no checkpoint."""
    other = {name: values + 7 for name, values in MODEL.items()}
    with fleet_of(tmp_path, ONE_SERVER, places=PLACES) as fleet, Run(fleet) as run:
        run.start_all([0, 1])
        write_model(tmp_path / "other.safetensors", other, set(), {})
        fleet.add(1, host)
        fleet.start(1, "--model", str(tmp_path / "other.safetensors"))
        run.prober.watch()
        run.start_all([2, 3], server=1)
        run.upload([0, 2], server=1)
        run.upload([1, 3], server=0)
        run.fetch(range(PLACES), server=1)
        train(run)
        run.see_everywhere(2)
        assert run.judge(quorum=PLACES).members == {1: EVERYBODY, 2: EVERYBODY}
        begun = {entry.digest for entry in run.journal.received if entry.iteration == 0}
        assert len(begun) == 1
        assert not members_of(run.journal.models[begun.pop()])


@HOSTS
def test_a_server_that_missed_iterations_serves_the_newest_model(
    tmp_path: Path, hosts: dict[int, int]
) -> None:
    with fleet_of(tmp_path, hosts, places=PLACES) as fleet, Run(fleet) as run:
        train(run, 2)
        fleet.kill(1)
        train(run, 4)
        run.start_all([0, 1])
        fleet.start(1)
        run.start_all([2, 3], server=1)
        run.upload(range(PLACES), server=1)
        run.fetch(range(PLACES))
        run.see_everywhere(7)
        assert run.judge(quorum=PLACES).members == dict.fromkeys(range(1, 8), EVERYBODY)


# ---- all of them at once


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
@pytest.mark.parametrize("redis", ["kept", "lost"])
@HOSTS
def test_all_servers_go_on_where_they_were(
    tmp_path: Path, hosts: dict[int, int], redis: str, number: signal.Signals
) -> None:
    with fleet_of(tmp_path, hosts, places=PLACES) as fleet, Run(fleet) as run:
        train(run, 3)
        run.see_everywhere(3)
        for n in hosts:
            wait_until(lambda n=n: list(fleet.hosts[n].checkpoints.glob("*_iteration_3_*")), "a checkpoint")
        instance = instance_of(fleet)
        for n in hosts:
            fleet.kill(n, number)
        if redis == "lost":
            fleet.wipe_redis()
        fleet.start_all()
        with RedisReader(fleet.cluster.redis_port) as reader:
            assert status_of(reader)["iterationNum"] == "4"
        assert (instance_of(fleet) == instance) is (redis == "kept")
        run.start_all(range(PLACES))  # the journal knows the model that this comes with
        run.see_everywhere(3)
        run.upload(range(PLACES))
        run.fetch(range(PLACES))
        train(run)
        run.see_everywhere(5)
        assert run.judge(quorum=PLACES).members == dict.fromkeys(range(1, 6), EVERYBODY)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
@HOSTS
def test_all_servers_go_on_within_an_iteration(
    tmp_path: Path, hosts: dict[int, int], number: signal.Signals
) -> None:
    with fleet_of(tmp_path, hosts, places=PLACES) as fleet, Run(fleet) as run:
        train(run, 2)
        run.start_all(range(PLACES))
        run.upload([0], server=0)
        run.upload([1], server=1)
        for n in hosts:
            fleet.kill(n, number)
        fleet.start_all()
        run.upload([2], server=1)
        run.upload([3], server=0)
        run.fetch(range(PLACES))
        run.see_everywhere(3)
        assert run.judge(quorum=PLACES).members == dict.fromkeys(range(1, 4), EVERYBODY)


def test_a_host_whose_checkpoints_are_gone_gets_the_model_from_the_other(tmp_path: Path) -> None:
    with fleet_of(tmp_path, TWO_HOSTS, places=PLACES) as fleet, Run(fleet) as run:
        train(run, 2)
        for n in (0, 1):
            fleet.kill(n, signal.SIGTERM)
        shutil.rmtree(fleet.hosts[0].checkpoints)
        fleet.start_all()
        run.see_everywhere(2)
        train(run)
        run.see_everywhere(3)
        assert run.judge(quorum=PLACES).members == dict.fromkeys(range(1, 4), EVERYBODY)
