"""Hybrid training as a worker sees it: the three rounds, spoken plainly to real servers, with faults between them."""

from __future__ import annotations

import http.client
import signal
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.cluster import wait_until
from integration.faults import Fleet, Run, fleet_of
from integration.oracle import MODEL, Weights, mean_of
from integration.watching import RedisReader, status_of

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

ONE, TWO, TWO_HOSTS = {0: 0}, {0: 0, 1: 0}, {0: 0, 1: 1}
HOSTS = pytest.mark.parametrize("hosts", [ONE, TWO, TWO_HOSTS], ids=["alone", "one host", "two hosts"])
PLACES = 4
EVERYBODY = range(PLACES)
HYBRID = {"server_mode": "HYBRID_TRAINING"}
NOT_YET = "The aggregation for the weights is not done yet."
SUCCESS = "Push metrics finished! This iteration is valid. Proceed to next iteration."
SOON_S = 6.0


@contextmanager
def hybrid(directory: Path, hosts: Mapping[int, int], **settings: Any) -> Any:
    """Start a job of hybrid training whose worker rounds are served over HTTP."""
    node = {"node": {"worker_http": True}, "device": {"hold_time": 0.5, "retry_margin": 0.1}}
    with fleet_of(directory, hosts, places=PLACES, fedcore=node, start=False, **settings) as fleet:
        fleet.cluster.settings |= HYBRID
        fleet.start_all()
        with Run(fleet) as run:
            yield fleet, run


def ask(fleet: Fleet, n: int, round_: str, request: Any, answer: type[Any]) -> Any:
    """Post a round to a server; return its table, or its text."""
    connection = http.client.HTTPConnection("127.0.0.1", fleet.cluster.http + n, timeout=15)
    try:
        connection.request("POST", f"/{round_}", b"".join(codec.encode_parts(request)))
        reply = connection.getresponse()
        body = reply.read()
        assert reply.status == 200, (reply.status, body)
        return (
            body.decode() if reply.headers["Content-Type"].startswith("text/") else codec.decode(answer, body)
        )
    finally:
        connection.close()


def pull(fleet: Fleet, n: int, iteration: int, names: Any = ("whose", "all")) -> Any:
    return ask(fleet, n, "pullWeight", RequestPullWeight(iteration, tuple(names)), ResponsePullWeight)


def push(fleet: Fleet, n: int, iteration: int, weights: Weights) -> Any:
    maps = tuple(FeatureMap(name, np.ravel(values)) for name, values in weights.items())
    return ask(fleet, n, "pushWeight", RequestPushWeight(iteration, maps), ResponsePushWeight)


def measure(fleet: Fleet, n: int, loss: float = 0.5, accuracy: float = 0.75) -> Any:
    return ask(fleet, n, "pushMetrics", RequestPushMetrics(loss, accuracy), ResponsePushMetrics)


def weights_of(reply: Any) -> dict[str, np.ndarray]:
    return {item.weight_fullname: np.array(item.data) for item in reply.feature_map}


def same(one: Weights, other: Weights) -> bool:
    names = one.keys() == other.keys()
    return names and all(np.array_equal(np.ravel(one[name]), np.ravel(other[name])) for name in one)


def trained(number: int) -> dict[str, np.ndarray]:
    """Return what the worker makes of an iteration's mean."""
    return {"all": np.full(6, 100.0 + number, np.float32)}


def model_of(fleet: Fleet, n: int, iteration: int) -> dict[str, np.ndarray]:
    """Return the model of an iteration as a device gets it from a server."""
    reply = wait_until(lambda: _model(fleet, n, iteration), f"server {n} has model {iteration}", SOON_S)
    return {item.weight_fullname: np.array(item.data) for item in reply.feature_map}


def _model(fleet: Fleet, n: int, iteration: int) -> Any:
    reply = fleet.at(n).model(iteration)
    return reply if not isinstance(reply, str) and reply.retcode == 200 else None


def phase(fleet: Fleet) -> str:
    with RedisReader(fleet.cluster.redis_port) as redis:
        return status_of(redis).get("phase", "collecting")


def collect(fleet: Fleet, run: Run, iteration: int) -> dict[str, np.ndarray]:
    """Let the devices upload; return the mean that the worker is to get."""
    run.start_all(EVERYBODY)
    run.upload(EVERYBODY)
    wait_until(lambda: phase(fleet) == "training", "the mean is ready", SOON_S)
    return mean_of(EVERYBODY, iteration)


@HOSTS
def test_a_worker_trains_the_mean_further(tmp_path: Path, hosts: dict[int, int]) -> None:
    with hybrid(tmp_path, hosts) as (fleet, run):
        servers = sorted(hosts)
        for number in (1, 2, 3):
            mean = collect(fleet, run, number)
            for n in servers:
                assert same(weights_of(pull(fleet, n, number)), mean)
            reply = push(fleet, servers[-1], number, trained(number))
            assert (reply.retcode, reply.reason, reply.iteration) == (200, "PushWeight succeed.", number)
            assert measure(fleet, 0).retcode == 200
            for n in servers:
                assert same(model_of(fleet, n, number), {**mean, **trained(number)})
        with RedisReader(fleet.cluster.redis_port) as redis:
            assert status_of(redis)["lastIterationResult"] == SUCCESS
        assert not {"aggregate", "loss", "accuracy"} & status_of_job(fleet).keys()
        assert fleet.metric('fl_trained_model{figure="loss"}', servers) >= 0.5
        assert fleet.metric('fl_trained_model{figure="accuracy"}', servers) >= 0.75


def status_of_job(fleet: Fleet) -> dict[str, str]:
    with RedisReader(fleet.cluster.redis_port) as redis:
        return status_of(redis)


def test_the_words_of_the_rounds(tmp_path: Path) -> None:
    with hybrid(tmp_path, ONE) as (fleet, run):
        early = pull(fleet, 0, 1)
        assert (early.retcode, early.reason, early.iteration) == (201, NOT_YET, 1)
        assert (push(fleet, 0, 1, trained(1)).retcode, measure(fleet, 0).retcode) == (201, 300)
        mean = collect(fleet, run, 1)
        other = pull(fleet, 0, 7)
        assert (other.retcode, other.iteration) == (201, 1)
        assert other.reason == "PullWeight iteration 7 is invalid. Server current iteration: 1"
        assert pull(fleet, 0, 1, []).reason == "weights_names_fbs is nullptr."
        unknown = pull(fleet, 0, 1, ["all", "nowhere"])
        assert (unknown.retcode, unknown.reason) == (400, "Parameter nowhere is not registered in server.")
        good = pull(fleet, 0, 1, ["whose", "all", "whose"])
        assert good.reason == "Pulling weight by weight names for iteration 1 success."
        assert [item.weight_fullname for item in good.feature_map] == ["whose", "all", "whose"]
        assert measure(fleet, 0).retcode == 300  # nothing was pushed yet
        late = push(fleet, 0, 9, trained(1))
        assert (late.retcode, late.reason) == (
            201,
            "PushWeight iteration number is invalid:9, current iteration:1",
        )
        assert push(fleet, 0, 1, {}).reason == "PushWeight feature map is empty."
        for bad in ({"all": np.zeros(5, np.float32)}, {"all": np.full(6, np.nan, np.float32)}):
            assert push(fleet, 0, 1, bad).reason == "Pushing weight failed."
        assert push(fleet, 0, 1, {**trained(1), "nowhere": np.ones(3, np.float32)}).retcode == 200
        assert push(fleet, 0, 1, trained(1)).reason == "PushWeight succeed."  # its answer may have been lost
        second = push(fleet, 0, 1, trained(50))
        assert (second.retcode, second.reason) == (200, "Model of iteration of 1 has finished")
        assert measure(fleet, 0, loss=float("nan")).retcode == 400
        assert measure(fleet, 0).retcode == 200
        assert same(model_of(fleet, 0, 1), {**mean, **trained(1)})


def test_a_worker_that_does_not_come_costs_the_iteration_and_nothing_else(tmp_path: Path) -> None:
    with hybrid(tmp_path, TWO_HOSTS, global_iteration_time_window=3000) as (fleet, run):
        collect(fleet, run, 1)
        wait_until(lambda: status_of_job(fleet)["iterationNum"] == "2", "the iteration ends", 8)
        status = status_of_job(fleet)
        assert status["lastIterationResult"].startswith("Global timer timeout!")
        late = "PushWeight iteration number is invalid:1, current iteration:2"
        wait_until(lambda: push(fleet, 0, 1, trained(1)).reason == late, "the server has heard of it", SOON_S)
        for n in (0, 1):
            assert same(model_of(fleet, n, 1), MODEL)
        mean = collect(fleet, run, 2)
        assert same(weights_of(pull(fleet, 1, 2)), mean)


@pytest.mark.parametrize("hosts", [TWO, TWO_HOSTS], ids=["one host", "two hosts"])
@pytest.mark.parametrize("moment", ["pulled", "pushed"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_server_that_is_killed_while_the_worker_trains(
    tmp_path: Path, hosts: dict[int, int], moment: str, victim: int
) -> None:
    """Whichever it is, finaliser or not: what the worker does is neither lost nor done twice."""
    with hybrid(tmp_path, hosts) as (fleet, run):
        mean = collect(fleet, run, 1)
        for n in (0, 1):
            assert same(weights_of(pull(fleet, n, 1)), mean)
        survivor = 1 - victim
        if moment == "pushed":
            assert push(fleet, victim, 1, trained(1)).retcode == 200
        fleet.kill(victim)
        if moment == "pulled":
            reply = wait_until(lambda: taken(push(fleet, survivor, 1, trained(1))), "the push is taken", 8)
            assert reply.retcode == 200
        wait_until(lambda: measure(fleet, survivor).retcode == 200, "the metrics are taken", 8)
        expected = {**mean, **trained(1)}
        wait_until(lambda: status_of_job(fleet)["iterationNum"] == "2", "the model is published", 15)
        assert status_of_job(fleet)["lastIterationResult"] == SUCCESS
        fleet.start(victim)
        for n in (0, 1):
            assert same(model_of(fleet, n, 1), expected)
        mean = collect(fleet, run, 2)
        assert same(weights_of(pull(fleet, victim, 2)), mean)


def taken(reply: Any) -> Any:
    return None if isinstance(reply, str) or reply.retcode == 201 else reply


@pytest.mark.parametrize("moment", ["training", "trained"])
@pytest.mark.parametrize("fault", ["restart", "wipe"])
def test_redis_is_lost_while_the_worker_trains(tmp_path: Path, moment: str, fault: str) -> None:
    with hybrid(tmp_path, TWO_HOSTS) as (fleet, run):
        mean = collect(fleet, run, 1)
        if moment == "trained":
            assert push(fleet, 1, 1, trained(1)).retcode == 200
        (fleet.restart_redis if fault == "restart" else fleet.wipe_redis)()
        if moment == "training":
            reply = wait_until(lambda: taken(push(fleet, 0, 1, trained(1))), "the push is taken", 20)
            assert reply.retcode == 200
        wait_until(lambda: accepted(measure(fleet, 0)), "the metrics are taken", 20)
        wait_until(lambda: status_of_job(fleet).get("iterationNum") == "2", "the model is published", 20)
        for n in (0, 1):
            assert same(model_of(fleet, n, 1), {**mean, **trained(1)})


def accepted(reply: Any) -> bool:
    return not isinstance(reply, str) and reply.retcode == 200


def test_everybody_is_killed_while_the_worker_trains(tmp_path: Path) -> None:
    """The mean is made again from the ledgers; what was pushed is in a checkpoint."""
    with hybrid(tmp_path, TWO_HOSTS) as (fleet, run):
        mean = collect(fleet, run, 1)
        for n in (0, 1):
            fleet.kill(n)
        fleet.start_all()
        reply = wait_until(lambda: pulled(fleet, 0, 1), "the mean is there again", 8)
        assert same(weights_of(reply), mean)
        assert push(fleet, 1, 1, trained(1)).retcode == 200
        for n in (0, 1):
            fleet.kill(n, signal.SIGKILL)
        fleet.start_all()
        wait_until(lambda: accepted(measure(fleet, 0)), "the metrics are taken", 8)
        for n in (0, 1):
            assert same(model_of(fleet, n, 1), {**mean, **trained(1)})


def pulled(fleet: Fleet, n: int, iteration: int) -> Any:
    reply = pull(fleet, n, iteration)
    return reply if accepted(reply) else None


def test_strangers_get_no_worker_round(tmp_path: Path) -> None:
    with hybrid(tmp_path, ONE) as (fleet, _):
        fleet.kill(0)
        fleet.cluster.settings["fedcore"]["node"] = {"worker_http": True, "allow": "10.1.2.0/24"}
        fleet.start(0)
        connection = http.client.HTTPConnection("127.0.0.1", fleet.cluster.http, timeout=5)
        connection.request("POST", "/pushMetrics", b"".join(codec.encode_parts(RequestPushMetrics(0.5, 0.5))))
        assert connection.getresponse().status == 404
        connection.close()


@pytest.mark.parametrize("moment", ["pulled", "pushed"])
@pytest.mark.parametrize("leaver", [0, 1])
def test_a_server_that_is_stopped_while_the_worker_trains(tmp_path: Path, moment: str, leaver: int) -> None:
    """It gives away the model, if only it has it; its ledger is needed by nobody any more."""
    with hybrid(tmp_path, TWO_HOSTS) as (fleet, run):
        mean = collect(fleet, run, 1)
        for n in (0, 1):  # then both have the mean
            assert same(weights_of(pull(fleet, n, 1)), mean)
        if moment == "pushed":
            assert push(fleet, leaver, 1, trained(1)).retcode == 200
        assert fleet.kill(leaver, signal.SIGTERM) == 0
        stayer = 1 - leaver
        assert "updates handed over" not in fleet.log(leaver)
        if moment == "pulled":
            assert same(weights_of(pull(fleet, stayer, 1)), mean)
            assert push(fleet, stayer, 1, trained(1)).retcode == 200
        assert measure(fleet, stayer).retcode == 200
        assert same(model_of(fleet, stayer, 1), {**mean, **trained(1)})
        fleet.start(leaver)
        assert same(model_of(fleet, leaver, 1), {**mean, **trained(1)})
        mean = collect(fleet, run, 2)
        assert push(fleet, leaver, 2, trained(2)).retcode == 200
        assert measure(fleet, leaver).retcode == 200
        for n in (0, 1):
            assert same(model_of(fleet, n, 2), {**mean, **trained(2)})
        wait_until(lambda: not list(tmp_path.rglob("*_pushed/*")), "what was pushed is cleared up", SOON_S)


@pytest.mark.parametrize("moment", ["pulled", "pushed"])
def test_redis_is_away_for_a_moment_while_a_worker_asks(tmp_path: Path, moment: str) -> None:
    """Requests on their way meet no Redis: the gate refuses them, and nothing is logged as a bug."""
    with hybrid(tmp_path, ONE) as (fleet, run):
        mean = collect(fleet, run, 1)
        if moment == "pushed":
            assert push(fleet, 0, 1, trained(1)).retcode == 200
        fleet.links[0].cut()
        for _ in range(3):
            assert isinstance(push(fleet, 0, 1, trained(1)), str)
            assert isinstance(measure(fleet, 0), str)
        fleet.links[0].restore()
        wait_until(lambda: taken(push(fleet, 0, 1, trained(1))), "the push is taken", 15)
        wait_until(lambda: accepted(measure(fleet, 0)), "the metrics are taken", 15)
        assert same(model_of(fleet, 0, 1), {**mean, **trained(1)})
        fleet.check_alive()


def test_no_push_counts_while_another_server_may_bring_back_an_earlier_one(tmp_path: Path) -> None:
    with hybrid(tmp_path, ONE) as (fleet, run):
        mean = collect(fleet, run, 1)
        with RedisReader(fleet.cluster.redis_port) as redis:
            run_id = next(
                line.partition(":")[2]
                for line in redis.ask("INFO", "server").splitlines()
                if line.startswith("run_id:")
            )
            instance = redis.ask("GET", "ms_fl:job:InstanceName:String")
            awaited = f"ms_fl:job:{instance}:{run_id}:awaited:Hash"
            seconds, _ = redis.ask("TIME")
            redis.ask("HSET", awaited, "somebody", str(int(seconds) * 1000))
            reply = push(fleet, 0, 1, trained(1))
            assert (reply.retcode, reply.reason) == (201, NOT_YET)
            redis.ask("HSET", awaited, "somebody", "back")
        assert push(fleet, 0, 1, trained(1)).retcode == 200
        assert measure(fleet, 0).retcode == 200
        assert same(model_of(fleet, 0, 1), {**mean, **trained(1)})
