"""Every aggregation rule with real servers: SIGKILL in mid-iteration, then of all, and the model is the paper's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from integration.cluster import Cluster, wait_until
from unit.aggregation import reference
from unit.aggregation.reference import Client

from fedcore.models.formats import write_model
from fedcore.wire import codec
from fedcore.wire.arrays import Floats
from fedcore.wire.messages import FeatureMap, RequestUpdateModel, ResponseUpdateModel

CLIENTS = 6
POPULATION = 20
PLAIN = {"conv": (3, 2), "bias": (4,)}
UPLOADS = {
    "FedAvg": reference.upload_fedavg,
    "FedProx": reference.upload_fedavg,
    "Scaffold": reference.upload_scaffold,
    "FedNova": reference.upload_fednova,
}


@contextmanager
def job(directory: Path, rule: str, hosts: Mapping[int, int]) -> Iterator[Cluster]:
    """Run servers, number -> number of its host, that aggregate by a rule."""
    with Cluster(directory, start_fl_job_threshold=CLIENTS) as cluster:
        chance = np.random.default_rng(1)
        model = {name: chance.standard_normal(shape).astype(np.float32) for name, shape in PLAIN.items()}
        write_model(directory / "model.safetensors", model, set(), {})
        cluster.settings["aggregation"] = {"aggregation_type": rule, "total_client_num": POPULATION}
        cluster.start_redis()
        for n, host in hosts.items():
            cluster.start_server_on(cluster.host(host), n)
        yield cluster


def trained(model: Mapping[str, Floats], number: int, iteration: int) -> Client:
    """A client after its training; every third one leaves a weight out."""
    chance = np.random.default_rng(100 * iteration + number)
    names = [name for name in PLAIN if name != "bias" or number % 3]

    def noise(name: str) -> Floats:
        return (0.1 * chance.standard_normal(model[name].size)).astype(np.float32)

    weights = {name: model[name] + noise(name) for name in names}
    return Client(weights, 10 + 7 * number, 1 + number, {name: noise(name) for name in names})


def expected(rule: str, clients: list[Client], model: Mapping[str, Floats]) -> dict[str, np.ndarray]:
    if rule == "FedNova":
        return reference.fednova(clients, model)
    if rule == "Scaffold":
        return reference.scaffold(clients, model, POPULATION)
    return reference.fedavg(clients, model)


def start_all(cluster: Cluster, hosts: Mapping[int, int], rule: str, iteration: int) -> dict[str, Floats]:
    """Have all clients start, each at another server; return the model that they all get."""
    models = []
    for number in range(CLIENTS):
        size = 1 + number if rule == "FedNova" else 10 + 7 * number
        reply = cluster.at(number % len(hosts)).start(f"client-{number}", size)
        assert (reply.retcode, reply.iteration) == (200, iteration), reply.reason
        models.append({item.weight_fullname: item.data for item in reply.feature_map})
    first = models[0]
    assert all(m.keys() == first.keys() and all((m[n] == first[n]).all() for n in m) for m in models)
    return first


def upload(cluster: Cluster, number: int, iteration: int, values: Mapping[str, Floats]) -> None:
    maps = tuple(FeatureMap(name, array) for name, array in values.items())
    request = RequestUpdateModel("job", f"client-{number}", iteration, maps, "1")
    reply = codec.decode(ResponseUpdateModel, cluster.post("/updateModel", codec.encode(request))[1])
    assert (reply.retcode, reply.reason) == (200, "success not ready")


@pytest.mark.parametrize("hosts", [{0: 0}, {0: 0, 1: 0, 2: 1}], ids=["one server", "three servers"])
@pytest.mark.parametrize("rule", UPLOADS)
def test_a_rule_survives_its_servers(rule: str, hosts: dict[int, int], tmp_path: Path) -> None:
    with job(tmp_path, rule, hosts) as cluster:
        wanted: dict[str, np.ndarray] = {}
        for iteration in (1, 2, 3):
            model = start_all(cluster, hosts, rule, iteration)
            assert sum(name.startswith("control.") for name in model) == (2 if rule == "Scaffold" else 0)
            for name, values in wanted.items():
                np.testing.assert_allclose(model[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
            clients = [trained(model, number, iteration) for number in range(CLIENTS)]
            wanted = expected(rule, clients, model)
            sent = [UPLOADS[rule](client, model)[0] for client in clients]
            for number in range(CLIENTS // 2):
                upload(cluster.at(number % len(hosts)), number, iteration, sent[number])
            victim = iteration % len(hosts)
            cluster.kill(cluster.name(victim))
            cluster.start_server_on(cluster.host(hosts[victim]), victim)
            for number in range(CLIENTS // 2, CLIENTS):
                upload(cluster.at(number % len(hosts)), number, iteration, sent[number])
            wait_until(lambda k=iteration: cluster.model(k).retcode == 200, f"the model of {iteration}")
            if iteration == 2:  # then everything is as the checkpoints have it
                for n in hosts:
                    cluster.kill(cluster.name(n))
                for (
                    n,
                    host,
                ) in hosts.items():  # at once: one of the hosts alone may have the newest checkpoint
                    cluster.start_server_on(cluster.host(host), n, ready=False)
                for n in hosts:
                    wait_until(lambda n=n: cluster.ready(n), f"server {n} is ready")
