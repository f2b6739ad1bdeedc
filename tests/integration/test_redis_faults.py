"""Several servers train while Redis fails over, loses writes, loses everything, or allows no more than it must.

An update that was acknowledged counts as long as the ledger that holds it lives, whatever Redis forgets, and never
twice; ``oracle.py`` judges.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from integration.cluster import wait_until
from integration.faults import Fleet, Run, fleet_of
from integration.links import HOST, Link
from integration.oracle import judge
from integration.redis_fixture import PrivateRedis, SentinelGroup, replicated_redis, sentinel_group
from integration.watching import RedisReader, status_of

from fedcore.core.iteration import DISABLED
from fedcore.store.link import RIGHTS
from fedcore.wire import codec
from fedcore.wire.messages import RequestGetModel

ONE_SERVER, ONE_HOST, TWO_HOSTS = {0: 0}, {0: 0, 1: 0}, {0: 0, 1: 1}
HOSTS = pytest.mark.parametrize("hosts", [ONE_HOST, TWO_HOSTS], ids=["one host", "two hosts"])
ANY_HOSTS = pytest.mark.parametrize(
    "hosts", [ONE_SERVER, ONE_HOST, TWO_HOSTS], ids=["one server", "one host", "two hosts"]
)
PLACES = 8
EVERYBODY = frozenset(range(PLACES))
WIPED = "The instance status info stored in distributed cache is empty"
EXITED = "Server that processed updateModel requests exited"
LOST = "fl_updates_lost_total"
PASSWORD = "correct horse battery staple"


def train(run: Run, iterations: int = 1) -> None:
    """Complete iterations."""
    for _ in range(iterations):
        run.start_all(range(PLACES))
        run.upload(range(PLACES))
        run.fetch(range(PLACES))


def spread(run: Run, clients: Iterable[int]) -> None:
    """Let clients upload at the servers in turn."""
    servers = run.fleet.running()
    for client in clients:
        run.upload([client], server=servers[client % len(servers)])


def finish(run: Run, clients: Iterable[int], iteration: int) -> None:
    """Let the rest upload, some of the others again, and check the whole."""
    run.upload([0, 1])
    run.upload(clients)
    run.fetch(range(PLACES))
    run.see_everywhere(iteration)
    train(run)
    run.see_everywhere(iteration + 1)
    assert run.judge(quorum=PLACES).members == dict.fromkeys(range(1, iteration + 2), EVERYBODY)
    assert run.fleet.metric(LOST) == 0


def ask(fleet: Fleet, *words: str) -> Any:
    """Run a command at the job's Redis."""
    with RedisReader(fleet.cluster.redis_port) as redis:
        return redis.ask(*words)


def status(fleet: Fleet) -> dict[str, str]:
    """Return the status of the job's instance."""
    with RedisReader(fleet.cluster.redis_port) as redis:
        return status_of(redis)


def operate(fleet: Fleet, path: str, **values: Any) -> None:
    """Have the scheduler do something, as soon as it can reach Redis."""
    told: list[dict[str, Any]] = []

    def done() -> bool:
        code, answer = fleet.cluster.operate(path, values)
        told.append(answer)
        return code == 200 or "access the cache server" not in answer["error_message"]

    wait_until(done, "the scheduler reaches Redis")
    assert told[-1]["code"] == "0", told


def serves(fleet: Fleet, n: int) -> bool:
    """Tell whether a server has heard that the job is enabled."""
    body = codec.encode(RequestGetModel(fl_name="job", iteration=0, timestamp="1"))
    return not fleet.at(n).post("/getModel", body)[1].startswith(b"The server's training job")


# ---- rights


@HOSTS
def test_a_training_needs_no_more_rights_than_are_listed(tmp_path: Path, hosts: dict[int, int]) -> None:
    """Servers die and join, the scheduler does all it can, and Redis has nothing to complain of."""
    secret = tmp_path / "secret"
    secret.write_text(PASSWORD + "\n")
    secret.chmod(0o600)
    access = {"redis": {"username": "fed", "password_file": str(secret)}}
    with fleet_of(tmp_path, hosts, places=PLACES, fedcore=access, start=False) as fleet:
        rights = ("on", f">{PASSWORD}", *RIGHTS.split())
        assert ask(fleet, "ACL", "SETUSER", "fed", *rights) == "OK"
        fleet.start_all()
        fleet.cluster.start_scheduler()
        with Run(fleet) as run:
            train(run)
            run.start_all(range(PLACES))
            spread(run, range(4))
            fleet.kill(1)
            fleet.start(1)
            run.upload(range(4, PLACES))
            run.fetch(range(PLACES))
            run.start_all(range(PLACES))
            operate(fleet, "disableFLS")
            operate(fleet, "enableFLS")
            wait_until(lambda: all(serves(fleet, n) for n in hosts), "all servers have heard of it")
            fleet.wipe_redis()
            assert ask(fleet, "ACL", "SETUSER", "fed", *rights) == "OK"
            fleet.wait_ready()
            train(run)
            run.see_everywhere(4)
            report = run.judge(quorum=PLACES, may_fail=lambda reason: reason == DISABLED)
            assert (report.members.keys(), report.failed) == ({1, 2, 4}, {3: DISABLED})
        operate(fleet, "newInstance", start_fl_job_threshold=PLACES, fl_iteration_num=1)
        for path in ("state", "queryInstance"):
            operate(fleet, path)
        with Run(fleet) as run:
            wait_until(lambda: run.client(0).fetch(0, iteration=0) == 1, "the new instance")
            train(run)
            judge(run.journal, {}, quorum=PLACES)
        users = [line for line in ask(fleet, "CLIENT", "LIST").splitlines() if "user=fed" in line]
        assert len(users) == 2 * len(hosts) + 1
        assert ask(fleet, "ACL", "LOG") == []
        fleet.check_alive()


# ---- Sentinels


@contextmanager
def watched_fleet(directory: Path, hosts: dict[int, int]) -> Iterator[tuple[Fleet, SentinelGroup, Link]]:
    """Run servers that ask Sentinels; the link is how the test itself reaches the master."""
    with sentinel_group(directory / "group") as group, Link(group.first.port) as way:
        sections = {"redis": {"sentinels": group.sentinels, "sentinel_master": group.master_name}}
        with fleet_of(directory / "job", hosts, places=PLACES, fedcore=sections, redis=way.port) as fleet:
            yield fleet, group, way


def follow(group: SentinelGroup, way: Link, before: PrivateRedis) -> None:
    """Wait for the new master and have the test's link lead there."""
    after = group.second if before is group.first else group.first
    wait_until(lambda: group.master_port == after.port, "a new master", 20)
    way.target = (HOST, after.port)
    way.cut()
    way.restore()


@HOSTS
@pytest.mark.parametrize("how", ["asked for", "killed"])
def test_training_goes_on_through_a_fail_over(tmp_path: Path, hosts: dict[int, int], how: str) -> None:
    with watched_fleet(tmp_path, hosts) as (fleet, group, way), Run(fleet, clients=PLACES) as run:
        run.wait_for_iterations(5, 20)
        before = group.master
        if how == "killed":
            group.kill_master()
        else:
            group.fail_over()
        follow(group, way, before)
        run.wait_for_iterations(5, 30)
        run.stop()
        assert run.judge(quorum=PLACES, may_fail=bool).failed == {}
        assert fleet.metric(LOST) == 0


@HOSTS
def test_a_fail_over_that_loses_writes_loses_no_update(tmp_path: Path, hosts: dict[int, int]) -> None:
    with watched_fleet(tmp_path, hosts) as (fleet, group, way), Run(fleet) as run:
        train(run)
        run.start_all(range(4))
        spread(run, range(2))
        before = group.master
        # it stops following, and says so, until the Sentinel sets it right after some eight seconds
        assert group.second.ask("REPLICAOF", HOST, "1") == "+OK"
        run.start_all(range(4, PLACES))
        spread(run, range(2, 6))
        group.kill_master()
        follow(group, way, before)
        finish(run, range(6, PLACES), 2)


def test_an_answer_waits_for_a_replica(tmp_path: Path) -> None:
    with replicated_redis(tmp_path / "redis") as (master, _):
        with (
            fleet_of(tmp_path / "job", TWO_HOSTS, places=PLACES, redis=master.port) as fleet,
            Run(fleet) as run,
        ):
            train(run)
            run.judge(quorum=PLACES)
        calls = dict(part.split("=") for part in master.info("commandstats", "cmdstat_wait").split(","))
        assert int(calls["calls"]) >= 1
        assert calls.get("failed_calls", "0") == "0"


# ---- a fail-over to a node that stopped following at a chosen moment


class Pair:
    """A master and its replica behind one address, which moves; as a load balancer or a cloud's Redis does it."""

    def __init__(self, master: PrivateRedis, replica: PrivateRedis) -> None:
        self.way = Link(master.port)
        self._master, self._replica = master, replica

    def part(self) -> None:
        """What is written from now on is lost with the fail-over."""
        wait_until(
            lambda: self._offset(self._master) == self._offset(self._replica), "the replica is in step"
        )
        assert self._replica.ask("REPLICAOF", "NO", "ONE") == "+OK"

    def fail_over(self) -> None:
        """End the master; its address leads to the other one."""
        self._master.stop(keep=True)
        self.way.target = (HOST, self._replica.port)
        self.way.cut()
        self.way.restore()

    @staticmethod
    def _offset(redis: PrivateRedis) -> str:
        return redis.info("replication", "master_repl_offset")


@contextmanager
def paired_fleet(directory: Path, hosts: dict[int, int], **settings: Any) -> Iterator[tuple[Fleet, Pair]]:
    with replicated_redis(directory / "redis") as (master, replica):
        pair = Pair(master, replica)
        try:
            with fleet_of(directory / "job", hosts, places=PLACES, redis=pair.way.port, **settings) as fleet:
                yield fleet, pair
        finally:
            pair.way.close()


@ANY_HOSTS
@pytest.mark.parametrize("lost", ["all", "places", "updates", "some updates", "no update"])
def test_writes_of_an_iteration_are_lost(tmp_path: Path, hosts: dict[int, int], lost: str) -> None:
    with paired_fleet(tmp_path, hosts) as (fleet, pair), Run(fleet) as run:
        train(run)
        if lost == "all":
            pair.part()
        run.start_all(range(4))
        if lost == "places":
            pair.part()
        run.start_all(range(4, PLACES))
        if lost == "updates":
            pair.part()
        spread(run, range(3))
        if lost == "some updates":
            pair.part()
        spread(run, range(3, 6))
        if lost == "no update":
            pair.part()
        pair.fail_over()
        finish(run, range(6, PLACES), 2)


@HOSTS
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_whole_iterations_are_lost(tmp_path: Path, hosts: dict[int, int], iterations: int) -> None:
    """From before the last update of an iteration on, up to some of the next one."""
    with paired_fleet(tmp_path, hosts) as (fleet, pair), Run(fleet) as run:
        run.start_all(range(PLACES))
        spread(run, range(PLACES - 1))
        pair.part()
        run.upload([PLACES - 1])
        run.fetch(range(PLACES))
        train(run, iterations)
        run.start_all(range(PLACES))
        spread(run, range(4))
        pair.fail_over()
        finish(run, range(4, PLACES), 2 + iterations)


@HOSTS
def test_a_busy_job_loses_writes(tmp_path: Path, hosts: dict[int, int]) -> None:
    with paired_fleet(tmp_path, hosts) as (fleet, pair), Run(fleet, clients=PLACES) as run:
        run.wait_for_iterations(5, 20)
        pair.part()
        run.wait_for_iterations(2, 20)
        pair.fail_over()
        run.wait_for_iterations(5, 30)
        run.stop()
        assert run.judge(quorum=PLACES, may_fail=bool).failed == {}
        assert fleet.metric(LOST) == 0


def test_a_lost_suspension_is_brought_back(tmp_path: Path) -> None:
    with paired_fleet(tmp_path, TWO_HOSTS) as (fleet, pair), Run(fleet) as run:
        fleet.cluster.start_scheduler()
        train(run)
        run.start_all(range(PLACES))
        spread(run, range(4))
        pair.part()
        operate(fleet, "disableFLS")
        wait_until(
            lambda: "iteration 2 ended" in fleet.log(0) and "iteration 2 ended" in fleet.log(1), "it ends"
        )
        pair.fail_over()
        wait_until(lambda: status(fleet).get("iterationNum") == "3", "it is brought back")
        assert status(fleet)["runningState"] == "1"
        operate(fleet, "enableFLS")
        train(run)
        run.see_everywhere(3)
        report = run.judge(quorum=PLACES, may_fail=lambda reason: reason == DISABLED)
        assert (report.members.keys(), report.failed) == ({1, 3}, {2: DISABLED})


@HOSTS
def test_a_lost_new_instance_is_brought_back(tmp_path: Path, hosts: dict[int, int]) -> None:
    with paired_fleet(tmp_path, hosts) as (fleet, pair):
        fleet.cluster.start_scheduler()
        with Run(fleet) as run:
            train(run, 2)
            run.judge(quorum=PLACES)
        pair.part()
        operate(fleet, "newInstance", client_epoch_num=7)
        name = ask(fleet, "GET", "ms_fl:job:InstanceName:String")
        for n in hosts:  # before the probes: until then a server may still answer for the old one
            wait_until(lambda n=n: fleet.at(n).model(0).iteration == 1, "the new instance")
        with Run(fleet) as run:
            run.start_all(range(PLACES))
            spread(run, range(4))
            pair.fail_over()
            run.upload(range(PLACES))
            run.fetch(range(PLACES))
            train(run)
            run.see_everywhere(2)
            assert judge(run.journal, {}, quorum=PLACES).members == {1: EVERYBODY, 2: EVERYBODY}
            assert ask(fleet, "GET", "ms_fl:job:InstanceName:String") == name
            reply = fleet.at(0).start("client-0", 3)
            assert (reply.iteration, reply.fl_plan_config.epochs) == (3, 7)
        fleet.check_alive()


# ---- all data are lost, Redis lives


@ANY_HOSTS
def test_flushall_in_mid_iteration_loses_nothing(tmp_path: Path, hosts: dict[int, int]) -> None:
    """No connection breaks, so nobody is told."""
    with fleet_of(tmp_path, hosts, places=PLACES) as fleet, Run(fleet) as run:
        train(run)
        run.start_all(range(PLACES))
        spread(run, range(6))
        assert ask(fleet, "FLUSHALL") == "OK"
        wait_until(lambda: updates_known(fleet, 2) == 6, "all updates are known again", 10)
        finish(run, range(6, PLACES), 2)


@HOSTS
def test_flushall_and_clients_that_come_again_at_once(tmp_path: Path, hosts: dict[int, int]) -> None:
    """Another server than the one that holds an update may count it again: then the iteration fails by name."""
    with fleet_of(tmp_path, hosts, places=PLACES) as fleet, Run(fleet) as run:
        train(run)
        run.start_all(range(PLACES))
        spread(run, range(6))
        assert ask(fleet, "FLUSHALL") == "OK"
        for client in range(PLACES):
            while not run.client(client).upload(server=(client + 1) % 2) and run.client(client).start():
                pass
        wait_until(lambda: run.status.current >= 3, "the iteration ends", 30)
        for _ in range(2):
            train(run)
        report = run.judge(quorum=PLACES, may_fail=lambda reason: EXITED in reason)
        assert report.failed.keys() <= {2}


@HOSTS
def test_flushall_that_nobody_meets_for_a_while(tmp_path: Path, hosts: dict[int, int]) -> None:
    with fleet_of(tmp_path, hosts, places=PLACES) as fleet, Run(fleet, probes=False) as run:
        train(run)
        run.start_all(range(PLACES))
        spread(run, range(6))
        assert ask(fleet, "FLUSHALL") == "OK"
        assert ask(fleet, "SCRIPT", "FLUSH") == "OK"
        wait_until(lambda: updates_known(fleet, 2) == 6, "all updates are known again", 10)
        finish(run, range(6, PLACES), 2)


def test_who_stood_still_gives_no_place_in_what_is_over_though_it_comes_first(tmp_path: Path) -> None:
    with fleet_of(tmp_path, TWO_HOSTS, places=PLACES) as fleet, Run(fleet, probes=False) as run:
        train(run)
        run.see_everywhere(1)
        wait_until(lambda: fleet.metric("fl_peers") == 2, "they know each other")
        fleet.pause(0)
        for _ in range(2):
            run.start_all(range(PLACES), server=1)
            run.upload(range(PLACES), server=1)
            run.fetch(range(PLACES), server=1)
        fleet.pause(1)
        assert ask(fleet, "FLUSHALL") == "OK"
        early = [threading.Thread(target=run.client(client).start, args=[0]) for client in range(PLACES)]
        for thread in early:
            thread.start()
        fleet.resume(0)
        wait_until(lambda: status(fleet).get("iterationNum") == "2", "it has told what it knows", 10)
        fleet.resume(1)
        for thread in early:
            thread.join(10)
        assert {run.client(client).iteration for client in range(PLACES)} == {4}
        run.upload(range(PLACES))
        run.fetch(range(PLACES))
        assert run.judge(quorum=PLACES).members == dict.fromkeys(range(1, 5), EVERYBODY)


def updates_known(fleet: Fleet, iteration: int) -> int:
    """Return how many updates of an iteration Redis counts."""
    instance = ask(fleet, "GET", "ms_fl:job:InstanceName:String")
    return ask(fleet, "HLEN", f"ms_fl:job:{instance}:{iteration}:uploads:Hash")


@HOSTS
def test_flushall_again_and_again(tmp_path: Path, hosts: dict[int, int]) -> None:
    with fleet_of(tmp_path, hosts, places=PLACES) as fleet, Run(fleet, clients=PLACES) as run:
        for k in range(6):
            run.wait_for_iterations(2, 25)
            threading.Event().wait(0.017 * k)
            assert ask(fleet, "FLUSHALL") == "OK"
        run.wait_for_iterations(3, 25)
        run.stop()
        report = run.judge(may_fail=lambda reason: WIPED in reason)
        assert not report.missing


# ---- all data are lost with Redis


Moment = Callable[[Fleet, Run], None]


def places_given(fleet: Fleet, run: Run) -> None:
    """No update has come."""


def half_uploaded(fleet: Fleet, run: Run) -> None:
    spread(run, range(4))


def sealed(fleet: Fleet, run: Run) -> None:
    """The last update has just been counted."""
    spread(run, range(PLACES - 1))
    with notices(fleet) as heard:
        run.upload([PLACES - 1])
        heard(b"sealed")


def reducing(fleet: Fleet, run: Run) -> None:
    """The finaliser waits for the sum of a server that stands still."""
    run.upload(range(4), server=1)
    run.upload(range(4, PLACES - 1), server=0)
    fleet.pause(1)
    run.upload([PLACES - 1], server=0)
    wait_until(lambda: status(fleet)["phase"] == "reducing", "the sums are fetched")


def candidate(fleet: Fleet, run: Run) -> None:
    """The finaliser waits for a server that stands still to read the model."""
    run.upload(range(PLACES - 1), server=0)
    fleet.pause(1)
    run.upload([PLACES - 1], server=0)
    wait_until(lambda: status(fleet)["phase"] == "candidate", "the model is spread")


def advanced(fleet: Fleet, run: Run) -> None:
    """The next iteration has just been opened."""
    spread(run, range(PLACES - 1))
    with notices(fleet) as heard:
        run.upload([PLACES - 1])
        heard(b"advanced")


@contextmanager
def notices(fleet: Fleet) -> Iterator[Callable[[bytes], None]]:
    """Listen to the job's changes; the function waits for one."""
    with socket.create_connection((HOST, fleet.cluster.redis_port), timeout=10) as connection:
        lines = connection.makefile("rb")
        connection.sendall(b"SUBSCRIBE ms_fl:job:changes\r\n")
        for _ in range(6):
            lines.readline()

        def heard(word: bytes) -> None:
            while lines.readline().strip() != word:
                pass

        yield heard


@pytest.mark.parametrize("moment", [places_given, half_uploaded, sealed, reducing, candidate, advanced])
@HOSTS
def test_redis_dies_and_comes_back_empty(tmp_path: Path, hosts: dict[int, int], moment: Moment) -> None:
    with fleet_of(tmp_path, hosts, places=PLACES) as fleet, Run(fleet) as run:
        train(run)
        run.start_all(range(PLACES))
        moment(fleet, run)
        fleet.wipe_redis()
        for n in hosts:
            fleet.resume(n)
        if moment in (places_given, half_uploaded):
            run.upload(range(PLACES))
        run.fetch(range(PLACES))
        run.see_everywhere(2)
        train(run)
        run.see_everywhere(3)
        assert run.judge(quorum=PLACES).members == dict.fromkeys(range(1, 4), EVERYBODY)
        assert fleet.metric(LOST) == 0


@pytest.mark.parametrize("moment", [reducing, candidate])
def test_redis_and_the_finaliser_die(tmp_path: Path, moment: Moment) -> None:
    """The other server was paused meanwhile, and goes on with what it finds."""
    with fleet_of(tmp_path, TWO_HOSTS, places=PLACES) as fleet, Run(fleet) as run:
        train(run)
        run.start_all(range(PLACES))
        moment(fleet, run)
        fleet.kill(0)
        fleet.wipe_redis()
        fleet.resume(1)
        fleet.start(0)
        run.fetch(range(PLACES))
        run.see_everywhere(2)
        train(run)
        run.see_everywhere(3)
        assert run.judge(quorum=PLACES).members == dict.fromkeys(range(1, 4), EVERYBODY)


@HOSTS
def test_updates_of_a_server_that_stands_still_count_after_a_loss(
    tmp_path: Path, hosts: dict[int, int]
) -> None:
    """Without them Redis counts its quorum again; they were acknowledged all the same."""
    with fleet_of(tmp_path, hosts, places=PLACES, update_model_ratio=0.5) as fleet, Run(fleet) as run:
        wait_until(lambda: fleet.metric("fl_peers") == 2, "they know each other")
        run.start_all(range(PLACES))
        run.upload([0, 1], server=1)
        run.upload([2], server=0)
        fleet.pause(1)
        fleet.wipe_redis()
        run.start_all(range(3, PLACES), server=0)
        run.upload([3, 4, 5], server=0)
        threading.Event().wait(1)
        fleet.resume(1)
        run.fetch(range(PLACES))
        run.see_everywhere(1)
        report = run.judge()
        assert report.members[1] >= {0, 1, 2, 3, 4, 5}
