"""The scheduler's REST interface: the real process, a real Redis, every route in every state of a job."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from integration.cluster import Cluster, filled, wait_until
from integration.redis_fixture import ReactorThread, redis_client

from fedcore.config import Settings, hyper_parameters
from fedcore.store import instances
from fedcore.store.instances import Disabling, Enabling
from fedcore.store.redis import Redis
from fedctl.processes import free_ports

OLD = "i_2026-01-02-03:04:05.006.007"
P = f"ms_fl:job:{OLD}:"
VALUES = {**hyper_parameters(Settings()), "fl_iteration_num": 25}
ROUTES = ["state", "queryInstance", "newInstance", "enableFLS", "disableFLS"]
NO_STORE = "Failed to access the cache server. Please retry later."
NO_CLUSTER = "Cannot find cluster info for job"
NO_STATE = "Failed to get cluster state because of some inner error."
NO_NODES = "Failed to get nodes because of some inner error. Please retry later."
COUNTED = {"token": "t", "digest": "d", "startedMs": "1", "firstUploadMs": "2", "sealedMs": "3", "lost": "4"}


class Answer(NamedTuple):
    """What came back."""

    status: int
    body: dict[str, Any]

    @property
    def text(self) -> str:
        """Text of a refusal."""
        assert (self.status, set(self.body), self.body["code"]) == (400, {"code", "error_message"}, "1"), self
        return self.body["error_message"]


def call(port: int, path: str, body: bytes | None = None, method: str = "GET") -> Answer:
    """Send a request; check what all answers have in common."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=15)
    try:
        connection.request(method, f"/{path}", body)
        answer = connection.getresponse()
        raw = answer.read()
    finally:
        connection.close()
    kind = "application/json" if answer.status == 200 else "text/html; charset=ISO-8859-1"
    assert (answer.reason, answer.getheader("Content-Type")) == ("Client", kind)
    values = json.loads(raw)
    assert raw == json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return Answer(answer.status, values)


class Job:
    """A scheduler, a Redis, and what a test puts into it."""

    def __init__(self, cluster: Cluster, loop: ReactorThread, redis: Redis) -> None:
        self.cluster = cluster
        self.loop = loop
        self.client = redis

    def __call__(self, path: str, body: bytes | None = None, method: str = "GET") -> Answer:
        """Send a request; newInstance gets an empty object unless told otherwise."""
        return call(
            self.cluster.manage, path, b"{}" if body is None and path == "newInstance" else body, method
        )

    def redis(self, *words: str | bytes | int) -> Any:
        """Run a command."""
        return self.loop.run(self.client.command(*words))

    def run(self, work: Any) -> Any:
        """Run a coroutine."""
        return self.loop.run(work)

    def seed(self, **status: object) -> None:
        """Put a job into Redis as its first server does, without a server."""
        self.redis("SET", "ms_fl:job:InstanceName:String", OLD, "EX", 1000)
        self.redis("SET", P + "hyperParams:String", json.dumps(VALUES), "EX", 1000)
        fields = {
            "iterationNum": 3,
            "lastIterationSuccess": 1,
            "lastIterationResult": "fine",
            "runningState": 0,
            "attempt": 2,
            "phase": "sealed",
            **status,
        }
        for field, value in fields.items():
            self.redis("HSET", P + "status:Hash", field, str(value))

    def instance(self) -> str:
        """Name of the current instance."""
        return self.redis("GET", "ms_fl:job:InstanceName:String").decode()

    def status(self, instance: str = OLD) -> dict[str, str]:
        """The status of an instance."""
        flat = self.redis("HGETALL", f"ms_fl:job:{instance}:status:Hash")
        if isinstance(flat, dict):
            return {field.decode(): value.decode() for field, value in flat.items()}
        return {field.decode(): value.decode() for field, value in zip(flat[::2], flat[1::2], strict=True)}

    def values(self, instance: str) -> dict[str, Any]:
        """The hyper-parameters of an instance."""
        return json.loads(self.redis("GET", f"ms_fl:job:{instance}:hyperParams:String"))

    def ttl(self, key: str) -> int:
        """Lifetime of a key, seconds."""
        return self.redis("TTL", key)

    @contextmanager
    def changes(self) -> Iterator[Callable[[], str]]:
        """Listen to the job's changes; the function returns the next one."""
        with socket.create_connection(("127.0.0.1", self.cluster.redis_port), timeout=10) as connection:
            lines = connection.makefile("rb")
            connection.sendall(b"SUBSCRIBE ms_fl:job:changes\r\n")
            for _ in range(6):
                lines.readline()
            yield lambda: [lines.readline() for _ in range(7)][6].decode().strip()


@pytest.fixture(scope="module")
def everything(loop: ReactorThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """One Redis and one scheduler for all tests that do them no harm."""
    with Cluster(tmp_path_factory.mktemp("scheduler")) as cluster:
        cluster.start_redis()
        cluster.start_scheduler()
        with redis_client(loop, cluster.redis_port) as redis:
            loop.run(redis.connected())
            yield Job(cluster, loop, redis)


@pytest.fixture
def job(everything: Job) -> Job:
    """The same, with an empty Redis."""
    everything.redis("FLUSHALL")
    return everything


def prefixed(path: str, text: str) -> str:
    return f"New instance failed: {text}" if path == "newInstance" else text


class TestWithoutAJob:
    @pytest.mark.parametrize("path", ROUTES)
    def test_an_empty_redis(self, job: Job, path: str) -> None:
        assert job(path).text == prefixed(path, NO_CLUSTER)

    @pytest.mark.parametrize("path", ROUTES)
    def test_an_instance_without_hyper_parameters(self, job: Job, path: str) -> None:
        job.redis("SET", "ms_fl:job:InstanceName:String", OLD)
        assert job(path).text == prefixed(path, NO_CLUSTER)

    @pytest.mark.parametrize("path", ROUTES)
    def test_an_empty_name_is_none(self, job: Job, path: str) -> None:
        job.redis("SET", "ms_fl:job:InstanceName:String", "")
        job.redis("SET", "ms_fl:job::hyperParams:String", json.dumps(VALUES))
        assert job(path).text == prefixed(path, NO_CLUSTER)

    def test_bodies_are_judged_first(self, job: Job) -> None:
        assert job("newInstance", b"").text == "The post message size is invalid."
        assert job("newInstance", b"{").text.startswith("Illegal JSON format:")

    def test_other_paths(self, job: Job) -> None:
        for path in ("", "State", "state/", "x/state"):
            assert job.cluster.get_http(job.cluster.manage, f"/{path}")[0] == 404

    def test_an_endless_body_is_refused_at_its_announcement(self, job: Job) -> None:
        with socket.create_connection(("127.0.0.1", job.cluster.manage), timeout=10) as connection:
            connection.sendall(b"POST /newInstance HTTP/1.1\r\nContent-Length: 9999999999999\r\n\r\n{")
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (answer.status, answer.reason) == (400, "Client")
            expected = b'{"code":"1","error_message":"The post message is bigger than 100mb."}'
            assert answer.read() == expected


class TestWithoutServers:
    @pytest.mark.parametrize(
        ("running", "state"), [(0, "CLUSTER_READY"), (1, "CLUSTER_DISABLE"), (2, "CLUSTER_FINISH"), (3, None)]
    )
    def test_state(self, job: Job, running: int, state: str | None) -> None:
        job.seed(runningState=running)
        expected = {"code": "0", "message": "Get cluster state successful."}
        assert job("state") == (200, expected if state is None else {**expected, "cluster_state": state})

    def test_a_missing_state_is_running(self, job: Job) -> None:
        job.seed()
        job.redis("DEL", P + "status:Hash")
        assert job("state").body["cluster_state"] == "CLUSTER_READY"
        assert job("enableFLS").text == "The instance has already been enabled."
        retry = "Failed to disable cluster because of some inner error. Please retry later."
        assert job("disableFLS").text == retry
        assert job.redis("EXISTS", P + "status:Hash") == 0

    def test_query_instance(self, job: Job) -> None:
        job.seed()
        assert job("queryInstance") == (
            200,
            {"code": "0", "message": "Query Instance successful.", "result": VALUES},
        )

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"a":NaN}'])
    def test_hyper_parameters_that_cannot_be_read(self, job: Job, text: str) -> None:
        job.seed()
        job.redis("SET", P + "hyperParams:String", text)
        assert job("state").status == 200
        retry = "Failed to query instance because of some inner error. Please retry later."
        assert job("queryInstance").text == retry
        assert job("newInstance").text == "New instance failed: Failed to parse current hyper params config"
        assert job.instance() == OLD

    def test_a_part_of_the_hyper_parameters_is_shown_but_not_built_on(self, job: Job) -> None:
        job.seed(runningState=1)
        job.redis("SET", P + "hyperParams:String", '{"later":1}')
        assert job("queryInstance").body["result"] == {"later": 1}
        assert job("newInstance").text == "New instance failed: Failed to parse current hyper params config"
        retry = "Failed to enable cluster because of some inner error. Please retry later."
        assert job("enableFLS").text == retry

    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
    def test_any_method(self, job: Job, method: str) -> None:
        job.seed()
        assert job("state?x=1", None, method).status == job("newInstance", b"{}", method).status == 200


class TestNodes:
    def test_servers_then_workers_the_dead_left_out(self, job: Job) -> None:
        job.seed()
        for role, names in (("server", ["b", "a", "dead"]), ("worker", ["0w"])):
            for name in names:
                job.redis("HSET", f"{P}{role}:Hash", name, f"127.0.0.1:{ord(name[0])}")
                if name != "dead":
                    job.redis("SET", f"{P}{role}:heartbeat:{name}:String", "x", "EX", 100)
        nodes = [
            {"node_id": "a", "role": "SERVER", "tcp_address": "127.0.0.1:97"},
            {"node_id": "b", "role": "SERVER", "tcp_address": "127.0.0.1:98"},
            {"node_id": "0w", "role": "WORKER", "tcp_address": ""},
        ]
        assert job("state").body["nodes"] == job("queryInstance").body["nodes"] == nodes
        assert job.redis("HEXISTS", P + "server:Hash", "dead") == 0


class TestDisableAndEnable:
    def test_disabling_ends_the_iteration_in_the_same_step(self, job: Job) -> None:
        job.seed(epoch=4, base=7, **COUNTED)
        for kind in ("clients", "uploads"):
            job.redis("HSET", f"{P}3:{kind}:Hash", "fl", "x")
        with job.changes() as change:
            expected = {"code": "0", "message": "start disabling FL-Server successful."}
            assert job("disableFLS") == (200, expected)
            assert change() == "disable"
        assert job.status() == {
            "iterationNum": "4",
            "lastIterationSuccess": "0",
            "lastIterationResult": "Disable instance",
            "runningState": "1",
            "attempt": "1",
            "phase": "collecting",
            "disabled": "1",
            "epoch": "4",
            "base": "7",
        }
        assert 604_800 < job.ttl(P + "status:Hash") <= 300 + 604_800
        assert all(0 < job.ttl(f"{P}3:{kind}:Hash") <= 60 for kind in ("clients", "uploads"))

    def test_disabling_twice_skips_no_number(self, job: Job) -> None:
        job.seed()
        assert job("disableFLS").status == 200
        before = job.status()
        assert job("disableFLS").text == "The instance has already been disabled."
        assert job.status() == before

    def test_a_state_that_an_original_scheduler_wrote(self, job: Job) -> None:
        """It knows only the one field; whoever disables next ends the iteration, once."""
        job.seed(runningState=1)
        assert job.run(instances.disable(job.client, "job", OLD, 1000)) is Disabling.MARKED
        assert (job.status()["iterationNum"], job.status()["disabled"]) == ("4", "1")
        assert job.run(instances.disable(job.client, "job", OLD, 1000)) is Disabling.ALREADY
        assert job.status()["iterationNum"] == "4"
        assert job("disableFLS").text == "The instance has already been disabled."

    def test_a_mark_that_an_original_scheduler_left_behind(self, job: Job) -> None:
        """It enables by the one field too."""
        job.seed(disabled=1)
        assert job("disableFLS").status == 200
        assert job.status()["iterationNum"] == "4"

    def test_a_missing_field_counts_as_running(self, job: Job) -> None:
        job.seed()
        job.redis("HDEL", P + "status:Hash", "runningState")
        assert job("state").body["cluster_state"] == "CLUSTER_READY"
        assert job("enableFLS").text == "The instance has already been enabled."
        assert job("disableFLS").status == 200

    def test_enabling(self, job: Job) -> None:
        job.seed()
        job("disableFLS")
        before = job.status()
        with job.changes() as change:
            expected = {"code": "0", "message": "start enabling FL-Server successful."}
            assert job("enableFLS") == (200, expected)
            assert change() == "enable"
        after = {field: value for field, value in before.items() if field != "disabled"}
        assert job.status() == {**after, "runningState": "0"}
        assert job("enableFLS").text == "The instance has already been enabled."

    def test_enabling_what_was_disabled_in_its_last_iteration_finishes_it(self, job: Job) -> None:
        job.seed(iterationNum=25)
        assert job("disableFLS").status == 200
        assert job("enableFLS").text == "The instance is completed and cannot be enabled."
        assert (job.status()["runningState"], "disabled" in job.status()) == ("2", False)
        assert job("state").body["cluster_state"] == "CLUSTER_FINISH"

    def test_enabling_what_was_disabled_before_its_last_iteration(self, job: Job) -> None:
        job.seed(iterationNum=24)
        job("disableFLS")
        assert job("enableFLS").status == 200
        assert job.run(instances.enable(job.client, "job", OLD, 25, 1000)) is Enabling.ALREADY

    @pytest.mark.parametrize("running", [2, 3])
    def test_a_completed_instance(self, job: Job, running: int) -> None:
        job.seed(runningState=running)
        before = job.status()
        assert job("enableFLS").text == "The instance is completed and cannot be enabled."
        assert job("disableFLS").text == "The instance is completed and cannot be disabled."
        assert job.status() == before

    def test_many_at_once(self, job: Job) -> None:
        job.seed()
        answers = together(lambda _: job("disableFLS").status, 10)
        assert sorted(answers) == [200] + [400] * 9
        assert job.status()["iterationNum"] == "4"


class TestNewInstance:
    def test_the_whole_effect(self, job: Job) -> None:
        job.seed(epoch=4, base=7, runningState=2, **COUNTED)
        asked = {"start_fl_job_threshold": 20, "update_model_ratio": 0.8, "encrypt_type": "x"}
        with job.changes() as change:
            expected = {"code": "0", "message": "Start new instance successful."}
            assert job("newInstance", json.dumps(asked).encode()) == (200, expected)
            assert change() == "instance"
        name = job.instance()
        assert (len(name), name[:2], name != OLD) == (len(OLD), "i_", True)
        merged = {**VALUES, "start_fl_job_threshold": 20, "update_model_ratio": 0.800000011920929}
        assert job.values(name) == merged
        assert job.status(name) == {
            "iterationNum": "1",
            "lastIterationSuccess": "1",
            "lastIterationResult": "",
            "runningState": "0",
            "attempt": "1",
            "phase": "collecting",
            "epoch": "5",
            "base": "7",
        }
        prefix = f"ms_fl:job:{name}:"
        for key in ("ms_fl:job:InstanceName:String", f"{prefix}status:Hash", f"{prefix}hyperParams:String"):
            assert 604_800 < job.ttl(key) <= 300 + 604_800
        assert all(0 < job.ttl(P + kind) <= 30 for kind in ("status:Hash", "hyperParams:String"))
        assert job("queryInstance").body["result"] == merged

    def test_lifetimes_follow_the_new_window(self, job: Job) -> None:
        job.seed()
        job("newInstance", b'{"global_iteration_time_window":4000000999}')
        assert 4_604_000 < job.ttl("ms_fl:job:InstanceName:String") <= 4_604_800 + 1

    def test_without_a_status(self, job: Job) -> None:
        job.seed()
        job.redis("DEL", P + "status:Hash")
        assert job("newInstance").status == 200
        status = job.status(job.instance())
        assert (status["epoch"], "base" in status) == ("1", False)

    @pytest.mark.parametrize(
        ("asked", "text"),
        [
            ("[]", "Expect hyper param config to be json object"),
            (
                '{"client_epoch_num":true}',
                "Field client_epoch_num in hyper param config should be unsigned integer number",
            ),
            (
                '{"start_fl_job_threshold":4294967296}',
                "Field start_fl_job_threshold in hyper param config should be unsigned integer number",
            ),
            (
                '{"start_fl_job_threshold":0}',
                "Field start_fl_job_threshold in hyper param config should be larger than 0",
            ),
            (
                '{"client_learning_rate":"1"}',
                "Field client_learning_rate in hyper param config should be float or integer number",
            ),
            (
                '{"client_learning_rate":0}',
                "Field client_learning_rate in hyper param config should be greater than 0",
            ),
            (
                '{"update_model_ratio":1.5,"client_epoch_num":-1}',
                "Field update_model_ratio in hyper param config should be in range of (0,1.0]",
            ),
        ],
    )
    def test_refusals(self, job: Job, asked: str, text: str) -> None:
        job.seed()
        assert job("newInstance", asked.encode()).text == f"New instance failed: {text}"
        assert job.instance() == OLD

    def test_a_name_that_is_taken_or_a_race_that_is_lost(self, job: Job) -> None:
        job.seed()

        def start(current: str, name: str) -> bool:
            return job.run(instances.new_instance(job.client, "job", current, name, VALUES, 1000))

        job.redis("HSET", "ms_fl:job:i_taken:status:Hash", "x", "y")
        assert [start("i_other", "i_new"), start(OLD, OLD), start(OLD, "i_taken")] == [False] * 3
        assert (job.instance(), job.ttl(P + "status:Hash")) == (OLD, -1)
        assert [start(OLD, "i_new"), start(OLD, "i_newer"), start("i_new", "i_newer")] == [True, False, True]
        job.redis("DEL", "ms_fl:job:i_newer:status:Hash", "ms_fl:job:i_newer:hyperParams:String")
        assert start("i_newer", "i_newer") is False

    def test_calls_to_two_schedulers_at_once_make_one_instance_each(self, job: Job) -> None:
        job.seed(epoch=0)
        with second_scheduler(job.cluster) as other:
            ports = [job.cluster.manage, other]
            body = b'{"start_fl_job_threshold":9}'
            answers = together(lambda index: call(ports[index % 2], "newInstance", body).status, 20)
            assert answers == [200] * 20
            assert job.status(job.instance())["epoch"] == "20"
            assert len(job.redis("KEYS", "ms_fl:job:i_*:status:Hash")) == 21
            assert len(job.redis("KEYS", "ms_fl:job:i_*:hyperParams:String")) == 21
            assert call(other, "queryInstance") == job("queryInstance")


class TestWrongTypes:
    """Keys of another type than they should have: somebody else's, or a mistake."""

    def spoil(self, job: Job, key: str) -> None:
        job.redis("DEL", key)
        job.redis("SADD", key, "x")

    @pytest.mark.parametrize("path", ROUTES)
    def test_the_name(self, job: Job, path: str) -> None:
        job.seed()
        self.spoil(job, "ms_fl:job:InstanceName:String")
        assert job(path).text == prefixed(path, NO_STORE)

    @pytest.mark.parametrize("path", ROUTES)
    def test_a_name_that_is_no_text(self, job: Job, path: str) -> None:
        job.redis("SET", "ms_fl:job:InstanceName:String", b"\xff")
        assert job(path).text == prefixed(path, NO_STORE)

    @pytest.mark.parametrize("path", ROUTES)
    def test_the_hyper_parameters(self, job: Job, path: str) -> None:
        job.seed()
        self.spoil(job, P + "hyperParams:String")
        text = "Failed to get current hyper params config" if path == "newInstance" else NO_STORE
        assert job(path).text == prefixed(path, text)

    def test_the_status(self, job: Job) -> None:
        job.seed()
        self.spoil(job, P + "status:Hash")
        assert [job(path).text for path in ("state", "enableFLS", "disableFLS")] == [NO_STATE] * 3
        assert job("queryInstance").status == 200
        failed = "Failed to new instance because of some inner error. Please retry later."
        assert job("newInstance").text == failed
        assert (job.instance(), len(job.redis("KEYS", "ms_fl:job:i_*"))) == (OLD, 2)

    @pytest.mark.parametrize("fields", [{"iterationNum": "x"}, {"runningState": "9"}, {"phase": "\xff"}])
    def test_a_status_that_makes_no_sense(self, job: Job, fields: dict[str, str]) -> None:
        job.seed(**fields)
        assert [job(path).text for path in ("state", "enableFLS", "disableFLS")] == [NO_STATE] * 3

    @pytest.mark.parametrize("role", ["server", "worker"])
    def test_the_nodes(self, job: Job, role: str) -> None:
        job.seed()
        self.spoil(job, f"{P}{role}:Hash")
        assert job("state").text == job("queryInstance").text == NO_NODES


class TestFaults:
    @pytest.fixture
    def cluster(self, tmp_path: Path) -> Iterator[Cluster]:
        with Cluster(tmp_path) as cluster:
            yield cluster

    def test_redis_away_back_and_empty(self, cluster: Cluster) -> None:
        cluster.start_scheduler(ready=False)
        for path in ROUTES:
            assert call(cluster.manage, path, b"{}").text == prefixed(path, NO_STORE)
        cluster.start_redis()
        wait_until(lambda: call(cluster.manage, "state").text == NO_CLUSTER, "Redis is seen")
        cluster.kill("redis")
        for path in ROUTES:
            assert call(cluster.manage, path, b"{}").text == prefixed(path, NO_STORE)
        cluster.start_redis()
        wait_until(lambda: call(cluster.manage, "state").text == NO_CLUSTER, "Redis is seen again")

    def test_redis_stands_still(self, cluster: Cluster) -> None:
        """Every call is answered within seconds, and all goes on afterwards."""
        cluster.start_redis()
        cluster.start_scheduler()
        cluster.processes["redis"].send_signal(signal.SIGSTOP)
        texts = together(lambda index: call(cluster.manage, ROUTES[index], b"{}").text, len(ROUTES))
        assert texts == [prefixed(path, NO_STORE) for path in ROUTES]
        cluster.processes["redis"].send_signal(signal.SIGCONT)
        wait_until(lambda: call(cluster.manage, "state").text == NO_CLUSTER, "Redis is seen again")

    def test_redis_has_no_memory_left(self, cluster: Cluster) -> None:
        cluster.start_redis()
        cluster.start_scheduler()
        cluster.start_server()
        cluster.redis("CONFIG", "SET", "maxmemory", "1")
        retry = "because of some inner error. Please retry later."
        assert call(cluster.manage, "disableFLS").text == f"Failed to disable cluster {retry}"
        assert call(cluster.manage, "newInstance", b"{}").text == f"Failed to new instance {retry}"
        cluster.redis("CONFIG", "SET", "maxmemory", "0")
        assert call(cluster.manage, "newInstance", b"{}").status == 200

    def test_redis_becomes_a_replica_and_a_master_again(self, cluster: Cluster) -> None:
        """In a fail-over no operation hangs or does half of its work."""
        cluster.start_redis()
        cluster.start_scheduler()
        cluster.start_server()
        name = cluster.redis("GET", "ms_fl:job:InstanceName:String")
        cluster.redis("REPLICAOF", "127.0.0.1", "1")
        for path in ("disableFLS", "enableFLS", "newInstance"):
            assert call(cluster.manage, path, b"{}").status == 400
        cluster.redis("REPLICAOF", "NO", "ONE")
        assert cluster.redis("GET", "ms_fl:job:InstanceName:String") == name
        wait_until(
            lambda: call(cluster.manage, "newInstance", b"{}").status == 200, "Redis takes writes again"
        )

    def test_killed_and_restarted(self, cluster: Cluster) -> None:
        cluster.start_redis()
        cluster.start_server()
        cluster.start_scheduler()
        before = call(cluster.manage, "queryInstance")
        assert (before.status, before.body["result"]["start_fl_job_threshold"]) == (200, 2)
        assert call(cluster.manage, "disableFLS").status == 200
        cluster.kill("scheduler")
        cluster.start_scheduler()
        assert call(cluster.manage, "queryInstance") == before
        assert call(cluster.manage, "disableFLS").text == "The instance has already been disabled."

    def test_integer_codes(self, tmp_path: Path) -> None:
        with Cluster(tmp_path, fedcore={"scheduler": {"integer_code": True}}) as cluster:
            cluster.start_redis()
            cluster.start_scheduler()
            assert call(cluster.manage, "state").body == {"code": 1, "error_message": NO_CLUSTER}
            cluster.start_server()
            assert call(cluster.manage, "state").body["code"] == 0


class TestWithAServer:
    def test_the_life_of_a_job(self, tmp_path: Path) -> None:
        with Cluster(tmp_path, fl_iteration_num=1) as cluster:
            cluster.start_redis()
            cluster.start_scheduler()
            cluster.start_server()
            state = call(cluster.manage, "state").body
            assert state["cluster_state"] == "CLUSTER_READY"
            (node,) = state["nodes"]
            assert (node["role"], node["tcp_address"]) == ("SERVER", f"127.0.0.1:{cluster.tcp}")
            query = call(cluster.manage, "queryInstance").body
            assert (query["nodes"], len(query["result"])) == ([node], 31)
            for client in ("one", "two"):
                assert cluster.start(client).retcode == 200
                assert cluster.update(client, 1, filled(1.0)).retcode == 200
            wait_until(
                lambda: call(cluster.manage, "state").body["cluster_state"] == "CLUSTER_FINISH",
                "the job is finished",
            )
            assert (
                call(cluster.manage, "disableFLS").text == "The instance is completed and cannot be disabled."
            )
            cluster.kill("server", signal.SIGTERM)
            assert "nodes" not in call(cluster.manage, "state").body


@contextmanager
def second_scheduler(cluster: Cluster) -> Iterator[int]:
    """Run another scheduler of the job; yield its port."""
    manage, admin = free_ports(2)
    options = ["--scheduler-manage-address", f"127.0.0.1:{manage}", "--admin-address", f"127.0.0.1:{admin}"]
    cluster.spawn("second", *cluster.command("schedulerd"), "--yaml-config", str(cluster.yaml), *options)
    cluster.wait_listening(admin, "second")
    wait_until(lambda: cluster.get_http(admin, "/readyz")[0] == 200, "the second scheduler is ready")
    yield manage
    cluster.kill("second")


def together(work: Callable[[int], Any], count: int) -> list[Any]:
    """Do something for 0..count-1 at the same moment; return all results."""
    barrier = threading.Barrier(count)

    def one(index: int) -> Any:
        barrier.wait(10)
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
