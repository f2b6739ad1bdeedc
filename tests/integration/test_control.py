"""What operators do to a job while several servers train: disable and enable it, start it anew, finish and stop it.

A server follows at once: the scheduler's change is published, and every round after it is answered by its rules.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from integration.cluster import INSTANCES, wait_until
from integration.faults import Fleet, Run, fleet_of
from integration.oracle import Journal, digest_of, judge, mean_of, members_of
from integration.roaming import upload_of
from integration.watching import RedisReader, status_of

from fedcore.core.admission import DISABLED_OR_FINISHED
from fedcore.core.iteration import DISABLED
from fedcore.errors import MalformedRequest
from fedcore.wire import codec
from fedcore.wire.messages import (
    RequestFLJob,
    RequestGetModel,
    ResponseGetModel,
    ResponseUpdateModel,
)

ONE_SERVER, ONE_HOST, TWO_HOSTS = {0: 0}, {0: 0, 1: 0}, {0: 0, 1: 1}
HOSTS = pytest.mark.parametrize("hosts", [ONE_HOST, TWO_HOSTS], ids=["one host", "two hosts"])
PLACES = 6
EVERYBODY = frozenset(range(PLACES))
AT_ONCE_S = 1.0  # the aim is 0.2 s; figures are printed
TICK_S = 1.0  # a server's own look at Redis, which finds what nobody published
NEXT = {"start_fl_job_threshold": 9, "update_model_ratio": 1.0}  # of a new instance with more places


@contextmanager
def job_of(directory: Path, hosts: dict[int, int], **settings: Any) -> Iterator[Fleet]:
    """Run servers and a scheduler."""
    with fleet_of(directory, hosts, **{"places": PLACES, **settings}) as fleet:
        fleet.cluster.start_scheduler()
        yield fleet


def operate(fleet: Fleet, path: str, values: dict[str, Any] | None = None) -> float:
    """Have the scheduler do something that it does not refuse; return when its answer was there."""
    status, answer = fleet.cluster.operate(path, values)
    assert (status, answer["code"]) == (200, "0"), answer
    return time.monotonic()


def refused(fleet: Fleet, path: str) -> str:
    """Have the scheduler refuse something; return its text."""
    status, answer = fleet.cluster.operate(path)
    assert status == 400, answer
    return answer["error_message"]


def ask_model(fleet: Fleet, n: int, iteration: int = 0) -> ResponseGetModel | str:
    """Ask a server for a model; return its table, or its text."""
    request = RequestGetModel(fl_name="job", iteration=iteration, timestamp="1")
    _, body = fleet.at(n).post("/getModel", codec.encode(request))
    try:
        return codec.decode(ResponseGetModel, body)
    except MalformedRequest:
        return body.decode()


class Followers:
    """Asks every server all the time, one in each thread, until each gives the answer that is waited for."""

    def __init__(self, fleet: Fleet, follows: Callable[[ResponseGetModel | str], bool]) -> None:
        self._fleet, self._follows = fleet, follows
        self._threads = ThreadPoolExecutor(INSTANCES)
        self._moments = {n: self._threads.submit(self._moment, n) for n in fleet.running()}

    def _moment(self, n: int) -> float:
        limit = time.monotonic() + 20
        while time.monotonic() < limit:
            with suppress(OSError, http.client.HTTPException):
                if self._follows(ask_model(self._fleet, n)):
                    return time.monotonic()
            threading.Event().wait(0.01)
        return float("inf")

    def delays(self, since: float, what: str) -> dict[int, float]:
        """Return how long after a moment each server followed, seconds."""
        delays = {n: max(0.0, moment.result() - since) for n, moment in self._moments.items()}
        self._threads.shutdown()
        print(f"{what}: " + ", ".join(f"server {n} after {1000 * s:.0f} ms" for n, s in delays.items()))
        return delays


def is_disabled(answer: ResponseGetModel | str) -> bool:
    return answer == DISABLED_OR_FINISHED


def serves(iteration: int) -> Callable[[ResponseGetModel | str], bool]:
    """Tell whether a table names an iteration."""
    return lambda answer: not isinstance(answer, str) and answer.iteration == iteration


def status(fleet: Fleet) -> dict[str, str]:
    """Return the status of the job's instance."""
    with RedisReader(fleet.cluster.redis_port) as redis:
        return status_of(redis)


def redis(fleet: Fleet, *words: str) -> Any:
    """Run a command."""
    with RedisReader(fleet.cluster.redis_port) as reader:
        return reader.ask(*words)


def instance_of(fleet: Fleet) -> str:
    return redis(fleet, "GET", "ms_fl:job:InstanceName:String")


def status_key(fleet: Fleet) -> str:
    return f"ms_fl:job:{instance_of(fleet)}:status:Hash"


def train(run: Run, clients: Iterable[int] = range(PLACES)) -> None:
    """Complete an iteration."""
    clients = list(clients)
    run.start_all(clients)
    run.upload(clients)
    run.fetch(clients)


def ends(fleet: Fleet, iteration: int) -> dict[int, list[str]]:
    """Return with which results each server reported the end of an iteration."""
    told: dict[int, list[str]] = {}
    for n in fleet.lives:
        for line in fleet.log(n).splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                if record.get("message", "").startswith(f"iteration {iteration} ended: "):
                    told.setdefault(n, []).append(record["result"])
    return told


def upload_again(fleet: Fleet, server: int, client: int, iteration: int) -> ResponseUpdateModel:
    """Send a client's update once more, to one server."""
    body = codec.encode(upload_of(client, iteration))
    return codec.decode(ResponseUpdateModel, fleet.at(server).post("/updateModel", body)[1])


# ---- disable and enable


@HOSTS
def test_disabling_ends_the_iteration_everywhere_at_once(tmp_path: Path, hosts: dict[int, int]) -> None:
    with job_of(tmp_path, hosts) as fleet, Run(fleet) as run:
        train(run)
        run.start_all(range(PLACES))
        run.upload([0], server=0)
        run.upload([1], server=1)
        followers = Followers(fleet, is_disabled)
        delays = followers.delays(operate(fleet, "disableFLS"), "disabled")
        assert max(delays.values()) < AT_ONCE_S
        assert refused(fleet, "disableFLS") == "The instance has already been disabled."
        for n in hosts:
            wait_until(lambda n=n: ends(fleet, 2).get(n), f"server {n} reports the end")
            for round_, body in rounds(2):
                assert fleet.at(n).post(f"/{round_}", body)[1].decode() == DISABLED_OR_FINISHED
        threading.Event().wait(2.5 * TICK_S)  # nor does a later look end another one
        assert ends(fleet, 2) == {n: [DISABLED] for n in hosts}
        now = status(fleet)
        assert (now["iterationNum"], now["lastIterationSuccess"], now["runningState"]) == ("3", "0", "1")

        followers = Followers(fleet, serves(3))
        delays = followers.delays(operate(fleet, "enableFLS"), "enabled")
        assert max(delays.values()) < AT_ONCE_S
        for n in hosts:
            for client in (0, 1):
                reply = upload_again(fleet, n, client, 2)
                assert (reply.retcode, reply.reason) == (200, "success not ready")
            assert upload_again(fleet, n, 2, 2).retcode == 300
        train(run)
        report = run.judge(quorum=PLACES, may_fail=lambda reason: reason == DISABLED)
        assert report.members == {1: EVERYBODY, 3: EVERYBODY}
        assert report.failed == {2: DISABLED}


def rounds(iteration: int) -> list[tuple[str, bytes]]:
    """Return a request of each round."""
    return [
        ("startFLJob", codec.encode(RequestFLJob(fl_name="job", fl_id="x", data_size=1, timestamp="1"))),
        ("updateModel", codec.encode(upload_of(0, iteration))),
        ("getModel", codec.encode(RequestGetModel(fl_name="job", iteration=iteration, timestamp="1"))),
    ]


@HOSTS
def test_each_suspension_of_a_busy_job_ends_one_iteration(tmp_path: Path, hosts: dict[int, int]) -> None:
    """It may come in any phase; what was being made then is not published."""
    suspensions = 12
    with job_of(tmp_path, hosts) as fleet, Run(fleet, clients=PLACES) as run:
        for k in range(suspensions):
            run.wait_for_iterations(1, 20)
            threading.Event().wait(0.013 * k)
            operate(fleet, "disableFLS")
            number = status(fleet)["iterationNum"]
            threading.Event().wait(0.3)
            assert status(fleet)["iterationNum"] == number
            operate(fleet, "enableFLS")
        run.wait_for_iterations(3, 20)
        run.stop()
        report = run.judge(quorum=PLACES, may_fail=lambda reason: reason == DISABLED)
        assert len(report.failed) == suspensions
        numbers = report.members.keys() | report.failed.keys()
        assert numbers >= set(range(1, run.journal.newest() + 1))


@HOSTS
def test_a_suspension_finds_a_server_that_stood_still(tmp_path: Path, hosts: dict[int, int]) -> None:
    with job_of(tmp_path, hosts) as fleet, Run(fleet) as run:
        train(run)
        run.start_all(range(PLACES))
        run.upload([0], server=1)
        fleet.pause(1)
        operate(fleet, "disableFLS")
        threading.Event().wait(1)
        fleet.resume(1)
        Followers(fleet, is_disabled).delays(time.monotonic(), "resumed")
        operate(fleet, "enableFLS")
        wait_until(lambda: serves(3)(ask_model(fleet, 1)), "server 1 goes on")
        train(run)
        report = run.judge(quorum=PLACES, may_fail=lambda reason: reason == DISABLED)
        assert (report.members.keys(), report.failed) == ({1, 3}, {2: DISABLED})


# ---- an original scheduler


@HOSTS
def test_an_original_scheduler_disables_and_enables(tmp_path: Path, hosts: dict[int, int]) -> None:
    """It writes one field and publishes nothing: servers follow with their next look."""
    with job_of(tmp_path, hosts) as fleet, Run(fleet) as run:
        for iteration in (1, 3):
            train(run)
            run.start_all(range(PLACES))
            run.upload([0, 1])
            followers = Followers(fleet, is_disabled)
            redis(fleet, "HSET", status_key(fleet), "runningState", "1")
            followers.delays(time.monotonic(), "disabled by the field")
            for n in hosts:
                wait_until(lambda n=n, k=iteration + 1: ends(fleet, k).get(n), f"server {n} reports the end")
            threading.Event().wait(2.5 * TICK_S)
            assert status(fleet)["iterationNum"] == str(iteration + 2)
            redis(fleet, "HSET", status_key(fleet), "runningState", "0")
            for n in hosts:
                wait_until(lambda n=n, k=iteration + 2: serves(k)(ask_model(fleet, n)), "it goes on")
            wait_until(lambda: "disabled" not in status(fleet), "the mark is gone")
        train(run)
        report = run.judge(quorum=PLACES, may_fail=lambda reason: reason == DISABLED)
        assert report.members == {1: EVERYBODY, 3: EVERYBODY, 5: EVERYBODY}
        assert report.failed == {2: DISABLED, 4: DISABLED}


@pytest.mark.parametrize(
    "hosts", [ONE_SERVER, ONE_HOST, TWO_HOSTS], ids=["one server", "one host", "two hosts"]
)
@pytest.mark.parametrize("before", ["first instance", "later instance"])
def test_an_original_scheduler_starts_a_new_instance(
    tmp_path: Path, hosts: dict[int, int], before: str
) -> None:
    """It writes the hyper-parameters and the name, and leaves the status to the servers."""
    with job_of(tmp_path, hosts) as fleet:
        if before == "later instance":
            operate(fleet, "newInstance", {})
            for n in hosts:
                wait_until(lambda n=n: serves(1)(ask_model(fleet, n)), "the second instance")
        with Run(fleet) as run:
            for _ in range(3):
                train(run)
            run.start_all(range(PLACES))
            run.upload([0, 1])
            run.judge(quorum=PLACES)
            newest = model_of(fleet, 0, 3)
        name = "i_2999-01-02-03:04:05.006.007"
        old = instance_of(fleet)
        values = json.loads(redis(fleet, "GET", f"ms_fl:job:{old}:hyperParams:String")) | NEXT
        redis(fleet, "SET", f"ms_fl:job:{name}:hyperParams:String", json.dumps(values), "EX", "100000")
        redis(fleet, "SET", "ms_fl:job:InstanceName:String", name, "EX", "100000")
        for n in hosts:
            wait_until(lambda n=n: serves(1)(ask_model(fleet, n)), f"server {n} follows", 5)
        threading.Event().wait(2.5 * TICK_S)
        assert instance_of(fleet) == name
        assert {n: model_of(fleet, n, 0) for n in hosts} == dict.fromkeys(hosts, newest)
        with Run(fleet) as run:
            for _ in range(2):
                train(run, range(9))
            run.see_everywhere(2)
            report = judge(run.journal, {}, quorum=9)
            assert report.members.keys() == {1, 2}
        fleet.check_alive()


def test_stop_ends_all_servers_in_order(tmp_path: Path) -> None:
    with job_of(tmp_path, TWO_HOSTS) as fleet, Run(fleet) as run:
        train(run)
        run.start_all(range(PLACES))
        run.upload([0, 1])
        run.prober.stop()
        redis(fleet, "HSET", status_key(fleet), "runningState", "3")
        for n in fleet.hosts:
            assert fleet.cluster.processes[fleet.cluster.name(n)].wait(20) == 0
            assert "Traceback" not in fleet.log(n)
        assert fleet.cluster.processes["scheduler"].poll() is None


# ---- a new instance


def model_of(fleet: Fleet, n: int, iteration: int) -> str:
    """Return the digest of a model as a server gives it."""
    answer = wait_until(
        lambda: None if isinstance(told := ask_model(fleet, n, iteration), str) else told,
        "the server has heard that it may answer",
    )
    assert answer.retcode == 200, answer.reason
    return digest_of({item.weight_fullname: item.data for item in answer.feature_map or ()})


@HOSTS
def test_a_new_instance_is_in_force_everywhere(tmp_path: Path, hosts: dict[int, int]) -> None:
    with job_of(tmp_path, hosts, places=4) as fleet:
        with Run(fleet) as run:
            for _ in range(3):
                train(run, range(4))
            run.start_all(range(4))
            run.upload([0, 1])
            run.judge(quorum=4)
            newest = model_of(fleet, 0, 3)
        values = {
            "start_fl_job_threshold": 20,
            "update_model_ratio": 0.8,
            "start_fl_job_time_window": 400_000,
            "update_model_time_window": 450_000,
            "global_iteration_time_window": 500_000,
            "client_epoch_num": 7,
            "client_batch_size": 11,
            "client_learning_rate": 0.25,
            "fl_iteration_num": 33,
        }
        followers = Followers(fleet, serves(1))
        delays = followers.delays(operate(fleet, "newInstance", values), "new instance")
        assert max(delays.values()) < AT_ONCE_S
        assert {n: model_of(fleet, n, 0) for n in hosts} == dict.fromkeys(hosts, newest)
        assert {n: model_of(fleet, n, 3) for n in hosts} == dict.fromkeys(hosts, newest)
        for n in hosts:
            reply = fleet.at(n).start(f"client-{n}", 3 + 7 * n)
            plan = reply.fl_plan_config
            assert (reply.retcode, reply.iteration) == (200, 1)
            assert (plan.iterations, plan.epochs, plan.mini_batch, plan.lr) == (33, 7, 11, 0.25)
            given = {item.weight_fullname: item.data for item in reply.feature_map}
            assert digest_of(given) == newest
        with Run(fleet) as run:
            run.start_all(range(20))
            assert not run.client(20).start(0)
            assert not run.client(20).start(1)
            run.upload(range(16), server=1)  # one ledger takes them all
            run.fetch(range(16))
            run.see_everywhere(1)
            train(run, range(16))
            report = judge(run.journal, {}, quorum=16)
            assert report.members == {1: frozenset(range(16)), 2: frozenset(range(16))}
            newest = model_of(fleet, 0, 2)
        followers = Followers(fleet, serves(1))
        smaller = {"start_fl_job_threshold": 3, "update_model_ratio": 0.5}
        followers.delays(operate(fleet, "newInstance", smaller), "a smaller one")
        assert {n: model_of(fleet, n, 0) for n in hosts} == dict.fromkeys(hosts, newest)
        with Run(fleet) as run:
            run.start_all(range(3))
            assert not run.client(3).start()
            run.upload([0], server=0)
            run.upload([1], server=1)
            run.fetch([0, 1])
            run.see_everywhere(1)
            assert judge(run.journal, {}, quorum=2).members == {1: frozenset({0, 1})}
        fleet.check_alive()


def test_the_windows_of_a_new_instance_are_in_force(tmp_path: Path) -> None:
    with job_of(tmp_path, TWO_HOSTS) as fleet, Run(fleet) as run:
        train(run)
        run.stop()
        followers = Followers(fleet, serves(1))
        followers.delays(operate(fleet, "newInstance", {"update_model_time_window": 2000}), "new instance")
        reply = fleet.at(0).start("client-0", 3)
        assert (reply.retcode, reply.iteration) == (200, 1)
        assert upload_again(fleet, 0, 0, 1).retcode == 200
        began = time.monotonic()
        wait_until(lambda: serves(2)(ask_model(fleet, 1)), "the iteration fails", 6)
        assert time.monotonic() - began > 1
        assert status(fleet)["lastIterationResult"] == (
            "Round updateModel timeout! This iteration is invalid. Proceed to next iteration."
        )
        fleet.check_alive()


@HOSTS
def test_a_new_instance_in_the_midst_of_training(tmp_path: Path, hosts: dict[int, int]) -> None:
    with job_of(tmp_path, hosts) as fleet, Run(fleet, clients=12) as run:
        wait_until(lambda: run.faults or run.journal.newest() >= 60, "60 iterations", 60)
        run.check_clients()
        followers = Followers(fleet, lambda answer: not isinstance(answer, str) and answer.iteration < 50)
        before = time.monotonic()
        at = operate(fleet, "newInstance", NEXT)
        assert max(followers.delays(at, "new instance").values()) < AT_ONCE_S
        wait_until(lambda: run.faults or served_since(run, at + 1.5) >= 4, "4 more iterations", 40)
        run.stop()
        run.check_clients()
        fleet.check_alive()
        first, second, across = split(run.journal, before, at + 1, 50)
        judge(first, {}, quorum=PLACES)
        report = judge(second, {}, quorum=9)
        assert len(report.members) >= 3
        start = {entry.digest for entry in second.received if entry.iteration == 0}
        newest = max(entry.iteration for entry in first.received if entry.serving == entry.iteration + 1)
        last = {entry.digest for entry in first.received if entry.iteration == newest}
        assert len(start) == 1
        members = members_of(run.journal.models[next(iter(start))])
        last.add(digest_of(mean_of(members, newest + 1)))  # which nobody may have fetched in time
        assert start <= last
        assert {entry.digest for entry in across} <= {entry.digest for entry in second.received}


def served_since(run: Run, at: float) -> int:
    """Return the newest iteration that anybody was given a place in since then."""
    return max((entry.serving for entry in run.journal.answered if entry.at > at), default=0)


def split(journal: Journal, moment: float, settled: float, limit: int) -> tuple[Journal, Journal, list[Any]]:
    """Divide what was seen between two instances.

    Args:
        journal: of both.
        moment: before the change. What was seen until then is the first instance's.
        settled: when nobody waits for an answer from before the change any more. What is seen then is the second's.
        limit: in between, iterations from here on are the first instance's.

    Returns:
        The first instance's, the second's, and models that were asked for in the one and came from the other.
    """
    first, second = Journal(), Journal()
    first.models = second.models = journal.models
    first.sent = second.sent = journal.sent
    across = []

    def side(at: float, number: int) -> Journal:
        return first if at < moment or (at < settled and number >= limit) else second

    for entry in journal.received:
        into = side(entry.at, entry.serving)
        if into is second and entry.iteration >= entry.serving:
            across.append(entry)
        else:
            into.received.append(entry)
    for entry in journal.answered:
        side(entry.at, entry.serving).answered.append(entry)
    for entry in journal.acknowledged:
        side(entry.at, entry.iteration).acknowledged.append(entry)
    ended = max(entry.serving for entry in first.answered)
    first.acknowledged = [entry for entry in first.acknowledged if entry.iteration < ended]
    return first, second, across


@pytest.mark.parametrize("fault", ["pause", "cut", "restart"])
def test_a_server_that_was_away_follows_a_new_instance(tmp_path: Path, fault: str) -> None:
    with job_of(tmp_path, TWO_HOSTS) as fleet:
        with Run(fleet) as run:
            for _ in range(2):
                train(run)
            run.start_all(range(PLACES))
            run.upload([0, 1], server=1)
            run.judge(quorum=PLACES)
            newest = model_of(fleet, 0, 2)
        match fault:
            case "pause":
                fleet.pause(1)
            case "cut":
                fleet.links[1].cut()
            case "restart":
                fleet.kill(1)
        operate(fleet, "newInstance", NEXT)
        wait_until(lambda: serves(1)(ask_model(fleet, 0)), "server 0 follows")
        threading.Event().wait(2)
        match fault:
            case "pause":
                fleet.resume(1)
            case "cut":
                fleet.links[1].restore()
            case "restart":
                fleet.start(1)
        wait_until(lambda: serves(1)(ask_model(fleet, 1)), "server 1 follows")
        assert model_of(fleet, 1, 0) == newest
        threading.Event().wait(2.5 * TICK_S)
        with Run(fleet) as run:
            run.start_all(range(9))
            run.upload(range(9))
            run.fetch(range(9))
            run.see_everywhere(1)
            assert judge(run.journal, {}, quorum=9).members == {1: frozenset(range(9))}
        fleet.check_alive()


def test_new_instances_one_after_the_other(tmp_path: Path) -> None:
    with job_of(tmp_path, TWO_HOSTS) as fleet:
        with Run(fleet) as run:
            train(run)
            newest = model_of(fleet, 0, 1)
        for places in (9, 3, 5, 8):
            operate(fleet, "newInstance", {"start_fl_job_threshold": places})
        operate(fleet, "disableFLS")
        operate(fleet, "newInstance", {"start_fl_job_threshold": 7})  # of a suspended job: it runs again
        name = instance_of(fleet)
        threading.Event().wait(2.5 * TICK_S)
        assert instance_of(fleet) == name
        assert {n: model_of(fleet, n, 0) for n in fleet.hosts} == dict.fromkeys(fleet.hosts, newest)
        with Run(fleet) as run:
            train(run, range(7))
            assert judge(run.journal, {}, quorum=7).members == {1: frozenset(range(7))}
        fleet.check_alive()


# ---- the end of a job


@HOSTS
def test_a_finished_job_goes_on_as_a_new_instance(tmp_path: Path, hosts: dict[int, int]) -> None:
    with job_of(tmp_path, hosts, fl_iteration_num=2) as fleet:
        with Run(fleet) as run:
            for _ in range(2):
                train(run)
            run.see_everywhere(2)
            run.judge(quorum=PLACES)
            newest = model_of(fleet, 0, 2)
        for n in hosts:
            assert ask_model(fleet, n, 2).retcode == 200
            for round_, body in rounds(2)[:2]:
                assert fleet.at(n).post(f"/{round_}", body)[1].decode() == DISABLED_OR_FINISHED
        assert status(fleet)["runningState"] == "2"
        assert refused(fleet, "disableFLS") == "The instance is completed and cannot be disabled."
        assert refused(fleet, "enableFLS") == "The instance is completed and cannot be enabled."
        followers = Followers(fleet, serves(1))
        followers.delays(operate(fleet, "newInstance", {"fl_iteration_num": 3}), "a new instance")
        assert {n: model_of(fleet, n, 0) for n in hosts} == dict.fromkeys(hosts, newest)
        with Run(fleet) as run:
            for _ in range(3):
                train(run)
            assert judge(run.journal, {}, quorum=PLACES).members.keys() == {1, 2, 3}
        wait_until(lambda: status(fleet)["runningState"] == "2", "finished again")
        fleet.check_alive()


@pytest.mark.parametrize("state", ["0", "1"])
def test_what_overwrites_the_end_of_a_job_is_corrected(tmp_path: Path, state: str) -> None:
    with job_of(tmp_path, TWO_HOSTS, fl_iteration_num=1) as fleet, Run(fleet) as run:
        train(run)
        run.see_everywhere(1)
        newest = model_of(fleet, 0, 1)
        redis(fleet, "HSET", status_key(fleet), "runningState", state)
        wait_until(lambda: status(fleet)["runningState"] == "2", "it is written again", 5)
        assert status(fleet)["iterationNum"] == "2"
        assert {n: model_of(fleet, n, 1) for n in fleet.hosts} == dict.fromkeys(fleet.hosts, newest)
        run.judge(quorum=PLACES)


def test_the_last_iteration_may_end_by_suspension(tmp_path: Path) -> None:
    with job_of(tmp_path, TWO_HOSTS, fl_iteration_num=2) as fleet, Run(fleet) as run:
        train(run)
        newest = model_of(fleet, 0, 1)
        run.start_all(range(PLACES))
        run.upload([0, 1])
        operate(fleet, "disableFLS")
        assert refused(fleet, "enableFLS") == "The instance is completed and cannot be enabled."
        for n in fleet.hosts:
            wait_until(lambda n=n: not isinstance(ask_model(fleet, n, 2), str), "it hands out its model")
            assert model_of(fleet, n, 2) == newest
        report = run.judge(quorum=PLACES, may_fail=lambda reason: reason == DISABLED)
        assert (report.members.keys(), report.failed) == ({1}, {2: DISABLED})
