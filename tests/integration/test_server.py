"""fl-serverd as devices and operators meet it: real process, real Redis, real HTTP."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from integration.cluster import WEIGHTS, Cluster, filled, wait_until

from fedcore.models.checkpoints import load_newest
from fedcore.wire import codec
from fedcore.wire.messages import (
    FeatureMap,
    RequestFLJob,
    RequestGetModel,
    RequestUpdateModel,
    ResponseFLJob,
    ResponseGetModel,
    ResponseUpdateModel,
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        cluster.start_redis()
        cluster.start_server()
        yield cluster


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def future(text: str | None) -> bool:
    return text is not None and text.isdigit() and int(text) > now_ms()


class TestAnIteration:
    def test_publishes_the_weighted_mean(self, cluster: Cluster) -> None:
        first, second = cluster.start("one", 10), cluster.start("two", 30)
        for reply in (first, second):
            assert (reply.retcode, reply.reason, reply.iteration, reply.is_selected) == (
                200,
                "success",
                1,
                True,
            )
            assert future(reply.next_req_time)
            assert [item.weight_fullname for item in reply.feature_map] == ["a.weight", "b.bias"]
            np.testing.assert_array_equal(reply.feature_map[0].data, WEIGHTS["a.weight"].reshape(-1))
        assert cluster.model(1).retcode == 201
        assert cluster.update("one", 1, filled(1.0), 10).reason == "success not ready"
        assert cluster.update("two", 1, filled(2.0), 30).retcode == 200
        for values in cluster.weights(1).values():
            np.testing.assert_array_equal(values, np.full(values.shape, 1.75, np.float32))

    def test_gives_the_plan(self, cluster: Cluster) -> None:
        plan = cluster.start("one").fl_plan_config
        assert (plan.server_mode, plan.fl_name, plan.iterations) == ("FEDERATED_LEARNING", "job", 100)
        assert (plan.epochs, plan.mini_batch, plan.lr) == (25, 32, pytest.approx(0.001))
        assert plan.cipher.encrypt_type == "NOT_ENCRYPT"
        assert (plan.cipher.pw_params.p, plan.cipher.pw_params.prime) == (bytes(32), bytes(33))

    def test_keeps_weights_that_nobody_sent(self, cluster: Cluster) -> None:
        cluster.start("one"), cluster.start("two")
        part = {"b.bias": np.float32([4, 4])}
        assert cluster.update("one", 1, part).retcode == cluster.update("two", 1, part).retcode == 200
        weights = cluster.weights(1)
        np.testing.assert_array_equal(weights["b.bias"], [4, 4])
        np.testing.assert_array_equal(weights["a.weight"], WEIGHTS["a.weight"].reshape(-1))

    def test_serves_the_three_newest_models(self, cluster: Cluster) -> None:
        for k in range(1, 6):
            cluster.run_iteration(k, {"one": k, "two": k})
            cluster.weights(k)
        for k in (3, 4, 5):
            assert cluster.weights(k)["b.bias"][0] == k
        assert cluster.weights(1)["b.bias"][0] == 5  # no longer kept: the newest
        reply = cluster.model(2)
        assert (reply.reason, reply.iteration) == ("Get model for iteration 2", 6)
        assert cluster.model(-1).reason == "Get model for iteration 18446744073709551615"

    def test_no_iteration_waits_for_a_tick(self, cluster: Cluster) -> None:
        began = time.monotonic()
        for k in range(1, 16):
            cluster.run_iteration(k, {"one": 1, "two": 2})
            cluster.weights(k)
        assert time.monotonic() - began < 15 * 0.5
        assert cluster.metric("fl_publication_duration_seconds_count") == 15
        assert cluster.metric('fl_publication_duration_seconds_bucket{le="0.05"}') >= 14

    def test_ends_when_the_job_is_finished(self, tmp_path: Path) -> None:
        with Cluster(tmp_path, fl_iteration_num=1) as cluster:
            cluster.start_redis()
            cluster.start_server()
            cluster.run_iteration(1, {"one": 3, "two": 3})
            assert cluster.weights(1)["b.bias"][0] == 3
            body = codec.encode(RequestFLJob(fl_name="job", fl_id="x", data_size=1, timestamp="1"))
            text = b"The server's training job is disabled or finished."
            assert cluster.post("/startFLJob", body) == (200, text)
            assert cluster.kill("server", signal.SIGTERM) == 0
            cluster.start_server()
            assert cluster.weights(1)["b.bias"][0] == 3
            assert cluster.post("/startFLJob", body) == (200, text)


class Refusals:
    """Each gets the protocol's own answer and changes nothing else."""

    @pytest.fixture(autouse=True)
    def nothing_else_changes(self, refusing: Cluster) -> Iterator[None]:
        self.cluster = cluster = refusing
        self.now = cluster.model(0).iteration
        yield
        cluster.start("honest-1"), cluster.start("honest-2")
        number = cluster.start("honest-1").iteration
        for fl_id in ("honest-1", "honest-2"):
            assert cluster.update(fl_id, number, filled(5.0)).retcode == 200
        assert cluster.weights(number)["a.weight"][0] == 5.0

    def raw(self, path: str, body: bytes, reply: type) -> object:
        status, answer = self.cluster.post(path, body)
        assert status == 200
        return codec.decode(reply, answer)


class TestRefusals(Refusals):
    """One server refuses all, an iteration each."""

    @pytest.fixture(scope="class")
    @classmethod
    def refusing(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
        with Cluster(tmp_path_factory.mktemp("refusals")) as cluster:
            cluster.start_redis()
            cluster.start_server()
            yield cluster

    @pytest.mark.parametrize("body", [b"\0", b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n"])
    def test_bodies_that_are_no_tables(self, body: bytes) -> None:
        reply = self.raw("/startFLJob", body, ResponseFLJob)
        assert (reply.retcode, reply.reason) == (400, "The schema of RequestFLJob is invalid.")
        assert reply.fl_plan_config is not None and future(reply.next_req_time)
        reply = self.raw("/updateModel", body, ResponseUpdateModel)
        assert (reply.retcode, reply.reason) == (400, "The schema of RequestUpdateModel is invalid.")
        reply = self.raw("/getModel", body, ResponseGetModel)
        assert (reply.retcode, reply.reason) == (400, "The schema of RequestGetModel is invalid.")

    @pytest.mark.parametrize("missing", ["fl_id", "fl_name", "timestamp"])
    def test_start_without_a_part(self, missing: str) -> None:
        fields = {"fl_name": "job", "fl_id": "x", "timestamp": "1", "data_size": 3, missing: None}
        reply = self.raw("/startFLJob", codec.encode(RequestFLJob(**fields)), ResponseFLJob)
        assert (reply.retcode, reply.reason) == (400, "Verify flatbuffers schema failed for RequestFLJob.")

    @pytest.mark.parametrize(
        ("size", "reason"),
        [
            (0, "FL job data size is not enough."),
            (-1, "FL job data size is too large."),
            (65536, "FL job data size is too large."),
            (2**31 - 1, "FL job data size is too large."),
        ],
    )
    def test_data_sizes(self, size: int, reason: str) -> None:
        reply = self.cluster.start("x", size)
        assert (reply.retcode, reply.reason, reply.is_selected) == (300, reason, False)
        assert future(reply.next_req_time)
        assert self.cluster.metric('fl_iteration_clients{round="startFLJob"}') == 0

    @pytest.mark.parametrize(
        "weights",
        [
            {"unknown": [1.0]},
            {**filled(1.0), "unknown": [1.0]},
            {"b.bias": [1.0, 2.0, 3.0]},
            {"b.bias": [1.0]},
            {"b.bias": [float("nan"), 0.0]},
            {"b.bias": [float("inf"), 0.0]},
            {},
        ],
    )
    def test_weights_that_do_not_fit(self, weights: dict) -> None:
        self.cluster.start("honest-1")
        reply = self.cluster.update("honest-1", self.now, weights)
        assert reply.retcode == 400
        assert reply.reason == f"Verify model feature map failed, retry later at time: {reply.next_req_time}"
        assert future(reply.next_req_time)

    @pytest.mark.parametrize(
        "fields",
        [
            {"fl_id": None},
            {"timestamp": None},
            {"feature_map": None},
            {"feature_map": (FeatureMap("b.bias", None),)},
            {"feature_map": (FeatureMap(None, np.float32([1, 1])),)},
            {"upload_loss": float("nan")},
            {"upload_accuracy": float("inf")},
            {"upload_compress_type": 1},
        ],
    )
    def test_updates_without_a_part(self, fields: dict) -> None:
        self.cluster.start("honest-1")
        whole = {
            "fl_name": "job",
            "fl_id": "honest-1",
            "iteration": self.now,
            "timestamp": "1",
            "feature_map": (FeatureMap("b.bias", np.float32([1, 1])),),
        }
        reply = self.raw(
            "/updateModel", codec.encode(RequestUpdateModel(**whole | fields)), ResponseUpdateModel
        )
        assert (reply.retcode, reply.reason) == (
            400,
            "Verify flatbuffers schema failed for RequestUpdateModel.",
        )


class TestRefusedClients(Refusals):
    """They may have a place kept for the next iteration, so each has a server of its own."""

    @pytest.fixture
    def refusing(self, cluster: Cluster) -> Cluster:
        return cluster

    def test_more_clients_than_places(self) -> None:
        assert [self.cluster.start(fl_id).retcode for fl_id in ("a", "b")] == [200, 200]
        reply = self.cluster.start("c")
        full = "Current amount for startFLJob has reached the threshold. Please startFLJob later."
        assert (reply.retcode, reply.reason) == (300, full)
        assert future(reply.next_req_time) and reply.fl_plan_config is not None
        assert reply.feature_map == ()
        assert self.cluster.start("d", 0).reason == full  # the first check that fails answers
        for fl_id in ("a", "b"):
            assert self.cluster.update(fl_id, 1, filled(1.0)).retcode == 200
        self.cluster.weights(1)
        assert self.cluster.start("c").retcode == 200  # its place was reserved
        self.cluster.start("d")
        for fl_id in ("c", "d"):
            assert self.cluster.update(fl_id, 2, filled(1.0)).retcode == 200
        self.cluster.weights(2)

    def test_a_client_that_never_started(self) -> None:
        reply = self.cluster.update("stranger", 1, filled(1.0))
        assert (reply.retcode, reply.reason) == (
            300,
            "devices_meta for stranger is not set. Please retry later.",
        )
        assert future(reply.next_req_time)

    def test_another_iteration(self) -> None:
        self.cluster.start("honest-1")
        reply = self.cluster.update("honest-1", 7, filled(1.0))
        assert reply.retcode == 300
        start = "UpdateModel iteration number is invalid:7, current iteration:1, Retry later at time: "
        assert reply.reason.startswith(start)
        assert reply.reason.endswith(f"{reply.next_req_time}, fl id is honest-1")

    def test_late_uploads(self) -> None:
        self.cluster.start("a"), self.cluster.start("b")
        for fl_id in ("a", "b"):
            self.cluster.update(fl_id, 1, filled(1.0))
        self.cluster.weights(1)
        assert (
            self.cluster.update("late", 1, filled(9.0)).reason
            == "devices_meta for late is not set. Please retry later."
        )
        self.cluster.start("late")
        assert self.cluster.update("late", 1, filled(9.0)).reason.startswith(
            "UpdateModel iteration number is invalid:1,"
        )
        assert self.cluster.update("late", 2, filled(1.0)).retcode == 200
        self.cluster.start("b")
        self.cluster.update("b", 2, filled(1.0))
        self.cluster.weights(2)


class TestRepeats:
    def test_get_the_first_answer_again(self, cluster: Cluster) -> None:
        first, again = cluster.start("one", 10), cluster.start("one", 10)
        assert (first.retcode, again.retcode, again.iteration) == (200, 200, 1)
        np.testing.assert_array_equal(first.feature_map[0].data, again.feature_map[0].data)
        assert cluster.metric('fl_iteration_clients{round="startFLJob"}') == 1
        cluster.start("two", 10)
        for _ in range(3):
            assert cluster.update("one", 1, filled(1.0)).reason == "success not ready"
        assert cluster.start("one").reason == "Updating device metadata failed for fl id one"
        assert cluster.metric("fl_updates_accepted_total") == 1
        cluster.update("two", 1, filled(3.0))
        assert cluster.weights(1)["b.bias"][0] == 2.0
        assert cluster.update("one", 1, filled(1.0)).reason == "success not ready"  # also when it is over

    def test_of_many_at_once_count_once(self, cluster: Cluster) -> None:
        cluster.start("one"), cluster.start("two")
        replies = []
        threads = [
            threading.Thread(target=lambda: replies.append(cluster.update("one", 1, filled(1.0))))
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [reply.retcode for reply in replies] == [200] * 16
        assert cluster.metric("fl_updates_accepted_total") == 1


class TestTime:
    def test_an_iteration_without_enough_clients_fails_by_name(self, tmp_path: Path) -> None:
        with Cluster(tmp_path, start_fl_job_time_window=300) as cluster:
            cluster.start_redis()
            cluster.start_server()
            assert cluster.start("one").iteration == 1
            wait_until(lambda: cluster.metric("fl_iteration") == 2, "the next iteration")
            assert "Round startFLJob timeout! This iteration is invalid." in cluster.log()
            assert cluster.start("one").iteration == 2

    def test_an_iteration_without_enough_updates_keeps_the_model(self, tmp_path: Path) -> None:
        with Cluster(tmp_path, update_model_time_window=300) as cluster:
            cluster.start_redis()
            cluster.start_server()
            cluster.start("one"), cluster.start("two")
            assert cluster.update("one", 1, filled(9.0)).retcode == 200
            wait_until(lambda: cluster.metric("fl_iteration") == 2, "the next iteration")
            assert "Round updateModel timeout!" in cluster.log()
            np.testing.assert_array_equal(cluster.weights(1)["a.weight"], WEIGHTS["a.weight"].reshape(-1))

    def test_the_global_window(self, tmp_path: Path) -> None:
        with Cluster(tmp_path, global_iteration_time_window=300) as cluster:
            cluster.start_redis()
            cluster.start_server()
            cluster.start("one"), cluster.start("two")
            wait_until(lambda: cluster.metric("fl_iteration") == 2, "the next iteration")
            assert "Global timer timeout!" in cluster.log()

    def test_a_get_model_at_the_change_is_held(self, cluster: Cluster) -> None:
        for k in range(1, 6):
            cluster.start("one"), cluster.start("two")
            cluster.update("one", k, filled(1.0))
            cluster.update("two", k, filled(1.0))
            assert cluster.model(k).retcode == 200  # asked at once, while the model is being made


class TestRestart:
    def test_continues_at_the_right_iteration_with_the_right_weights(self, cluster: Cluster) -> None:
        for k in (1, 2):
            cluster.run_iteration(k, {"one": k, "two": k})
            cluster.weights(k)
        cluster.kill("server")
        cluster.start_server()
        reply = cluster.start("one")
        assert (reply.retcode, reply.iteration) == (200, 3)
        assert reply.feature_map[0].data[0] == 2.0

    def test_without_redis_data_goes_on_behind_the_newest_checkpoint(self, cluster: Cluster) -> None:
        cluster.run_iteration(1, {"one": 4, "two": 4})
        cluster.weights(1)
        cluster.kill("server")
        cluster.redis("FLUSHALL")
        cluster.start_server()
        reply = cluster.start("one")
        assert (reply.iteration, reply.feature_map[0].data[0]) == (2, 4.0)

    def test_names_no_iteration_that_may_not_have_begun_before_it_has_joined(self, cluster: Cluster) -> None:
        """Its newest model may be a candidate that nobody has published, and its iteration the current one."""
        for number in (1, 2):
            cluster.run_iteration(number, {"one": 1, "two": 1})
            cluster.weights(number)
        cluster.kill("server")
        cluster.pause("redis")
        cluster.start_server(ready=False)
        wait_until(lambda: cluster.get_http(cluster.admin, "/livez") is not None, "it listens")
        early = cluster.model(0)
        assert (early.retcode, early.iteration) == (201, 2)
        cluster.resume("redis")
        wait_until(cluster.ready, "it has joined")
        assert cluster.model(0).iteration == 3

    @pytest.mark.parametrize("refusal", ["startFLJob", "updateModel"])
    def test_without_redis_data_a_refused_client_is_not_refused_again(
        self, tmp_path: Path, refusal: str
    ) -> None:
        """Another refusal would end an old device: it is held until there is a place."""
        with Cluster(tmp_path, fedcore={"device": {"hold_time": 30.0}}) as cluster:
            cluster.start_redis()
            cluster.start_server()
            cluster.start("one"), cluster.start("two")
            refused = cluster.start("c") if refusal == "startFLJob" else cluster.update("c", 1, filled(1.0))
            assert refused.retcode == 300
            cluster.redis("FLUSHALL")
            again: list[Any] = []
            thread = threading.Thread(target=lambda: again.append(cluster.start("c")), daemon=True)
            for number in (1, 2):
                cluster.run_iteration(number, {"one": 1})
                cluster.start("two")
                if number == 2:
                    thread.start()
                    wait_until(lambda: cluster.metric("fl_device_connections") == 1, "it has come again")
                assert cluster.update("two", number, filled(1.0)).retcode == 200
                cluster.weights(number)
            thread.join(20)
            assert [(reply.retcode, reply.iteration) for reply in again] == [(200, 3)]

    def test_in_mid_iteration_loses_nothing(self, cluster: Cluster) -> None:
        cluster.start("one", 30), cluster.start("two", 10)
        assert cluster.update("one", 1, filled(9.0), 30).retcode == 200
        cluster.kill("server")
        cluster.start_server()
        assert (
            cluster.update("one", 1, filled(9.0)).retcode == 200
        )  # a repeat, though another process took it
        assert cluster.update("two", 1, filled(1.0)).retcode == 200
        assert cluster.weights(1)["a.weight"][0] == 7.0
        assert cluster.metric('fl_iterations_total{outcome="valid"}') == 1

    def test_without_the_ledger_fails_that_iteration_by_name(self, cluster: Cluster) -> None:
        cluster.start("one"), cluster.start("two")
        assert cluster.update("one", 1, filled(9.0)).retcode == 200
        cluster.kill("server")
        for ledger in (cluster.directory / "checkpoints" / "ledgers").iterdir():
            ledger.unlink()
        cluster.start_server()
        wait_until(lambda: cluster.metric("fl_iteration") == 2, "the next iteration", 40)
        assert "Server that processed updateModel requests exited, current iteration: 1" in cluster.log()
        cluster.run_iteration(2, {"one": 1, "two": 1})
        assert cluster.weights(2)["a.weight"][0] == 1.0

    def test_keeps_the_three_newest_checkpoints(self, cluster: Cluster) -> None:
        for k in range(1, 6):
            cluster.run_iteration(k, {"one": k, "two": k})
            cluster.weights(k)
        names = sorted(path.name for path in (cluster.directory / "checkpoints").glob("job_*"))
        assert [name.split("_")[3] for name in names] == ["3", "4", "5"]
        newest = load_newest(cluster.directory / "checkpoints", "job")
        assert newest.iteration == 5
        np.testing.assert_array_equal(newest.model.weights["b.bias"], [5, 5])
        assert newest.model.weights["a.weight"].shape == (2, 3)

    def test_stops_cleanly_on_sigterm(self, cluster: Cluster) -> None:
        began = time.monotonic()
        assert cluster.kill("server", signal.SIGTERM) == 0
        assert time.monotonic() - began < 2
        assert cluster.redis("HLEN", "nothing") == b":0"


class TestRedisAway:
    def test_at_start(self, tmp_path: Path) -> None:
        with Cluster(tmp_path, fedcore={"device": {"hold_time": 0.2}}) as cluster:
            cluster.start_server(ready=False)
            assert cluster.not_ready_because()["redis"] == "no connection to Redis"
            body = codec.encode(RequestFLJob(fl_name="job", fl_id="x", data_size=1, timestamp="1"))
            assert cluster.post("/startFLJob", body) == (200, b"The cluster is in safemode.")
            assert cluster.model(0).retcode == 201  # it cannot know where the job is
            cluster.start_redis()
            wait_until(cluster.ready, "the server joins")
            assert cluster.weights(0)["b.bias"][0] == 0.5
            assert cluster.start("one").retcode == 200

    def test_in_between_with_its_data(self, tmp_path: Path) -> None:
        with Cluster(tmp_path, fedcore={"device": {"hold_time": 0.2}}) as cluster:
            cluster.start_redis(keep=True)
            cluster.start_server()
            cluster.start("one"), cluster.start("two")
            assert cluster.update("one", 1, filled(1.0)).retcode == 200
            cluster.kill("redis", signal.SIGTERM)
            wait_until(lambda: not cluster.ready(), "the server notices")
            body = codec.encode(RequestGetModel(fl_name="job", iteration=0, timestamp="1"))
            assert codec.decode(ResponseGetModel, cluster.post("/getModel", body)[1]).retcode == 200
            body = codec.encode(RequestFLJob(fl_name="job", fl_id="x", data_size=1, timestamp="1"))
            assert cluster.post("/startFLJob", body) == (200, b"The cluster is in safemode.")
            cluster.start_redis(keep=True)
            wait_until(cluster.ready, "the server is back")
            assert cluster.update("two", 1, filled(3.0)).retcode == 200
            assert cluster.weights(1)["b.bias"][0] == 2.0  # nothing was lost

    def test_a_request_in_between_is_held(self, tmp_path: Path) -> None:
        with Cluster(tmp_path, fedcore={"device": {"hold_time": 15.0}}) as cluster:
            cluster.start_redis(keep=True)
            cluster.start_server()
            cluster.kill("redis", signal.SIGTERM)
            wait_until(lambda: not cluster.ready(), "the server notices")
            replies: list[ResponseFLJob] = []
            waiting = threading.Thread(target=lambda: replies.append(cluster.start("one")))
            waiting.start()
            cluster.start_redis(keep=True)
            waiting.join(20)
            assert [reply.retcode for reply in replies] == [200]

    def test_without_its_data_gets_them_back_from_the_server(self, cluster: Cluster) -> None:
        cluster.run_iteration(1, {"one": 7, "two": 7})
        cluster.weights(1)
        cluster.start("one")
        cluster.start("two")
        cluster.update("one", 2, filled(1))
        cluster.kill("redis")
        cluster.start_redis()
        wait_until(cluster.ready, "the server is ready again")
        assert "Redis had lost data of iteration 2" in cluster.log()
        reply = cluster.update("two", 2, filled(3))
        assert (reply.retcode, reply.reason) == (200, "success not ready")
        assert cluster.weights(2)["a.weight"][0] == 2.0
        assert cluster.weights(1)["a.weight"][0] == 7.0

    def test_without_its_data_a_disabled_job_stays_disabled(self, cluster: Cluster) -> None:
        disable = "return redis.call('HSET', redis.call('KEYS', '*status:Hash')[1], 'runningState', '1')"
        assert cluster.redis("EVAL", f'"{disable}"', "0") == b":0"
        body = codec.encode(RequestFLJob(fl_name="job", fl_id="x", data_size=1, timestamp="1"))
        answer = (200, b"The server's training job is disabled or finished.")
        wait_until(lambda: cluster.post("/startFLJob", body) == answer, "the server notices")
        cluster.kill("redis")
        cluster.start_redis()
        wait_until(lambda: cluster.ready() and cluster.metric("fl_iteration") == 2, "it is back")
        assert cluster.post("/startFLJob", body) == answer

    def test_a_paused_redis_costs_no_update(self, tmp_path: Path) -> None:
        with Cluster(tmp_path, fedcore={"redis": {"reply_timeout": 0.5}}) as cluster:
            cluster.start_redis()
            cluster.start_server()
            cluster.start("one"), cluster.start("two")
            replies: dict[str, int] = {}
            cluster.processes["redis"].send_signal(signal.SIGSTOP)

            def upload(fl_id: str) -> None:
                replies[fl_id] = cluster.update(fl_id, 1, filled(2.0)).retcode

            threads = [threading.Thread(target=upload, args=(fl_id,)) for fl_id in ("one", "two")]
            for thread in threads:
                thread.start()
            wait_until(lambda: cluster.metric("fl_redis_errors_total") >= 2, "the time-outs")
            cluster.processes["redis"].send_signal(signal.SIGCONT)
            for thread in threads:
                thread.join(20)
            assert replies == {"one": 200, "two": 200}
            assert cluster.weights(1)["a.weight"][0] == 2.0
            assert cluster.metric("fl_updates_accepted_total") == 2


class TestStop:
    def test_held_requests_are_answered_at_once(self, tmp_path: Path) -> None:
        """An iteration that waits for a worker holds them; they are told to come again, to whoever serves then."""
        with Cluster(tmp_path, fedcore={"device": {"hold_time": 30.0}}) as cluster:
            cluster.settings["server_mode"] = "HYBRID_TRAINING"
            cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
            cluster.start_redis()
            cluster.start_server()
            cluster.run_iteration(1, {"one": 1, "two": 1})
            replies: dict[str, Any] = {}

            def ask(name: str, round_: Callable[[], Any]) -> threading.Thread:
                thread = threading.Thread(target=lambda: replies.update({name: round_()}), daemon=True)
                thread.start()
                return thread

            asked = [
                ask("getModel", lambda: cluster.model(1)),
                ask("startFLJob", lambda: cluster.start("three")),
            ]
            with socket.create_connection(("127.0.0.1", cluster.http), timeout=20) as idle:
                idle.sendall(b"POST /getModel HTTP/1.1\r\nContent-Length: 4\r\n\r\nhalf")
                assert idle.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")
                wait_until(lambda: cluster.metric("fl_device_connections") == 3, "all are connected")
                began = time.monotonic()
                assert cluster.kill("server", signal.SIGTERM) == 0
                assert time.monotonic() - began < 6
            for thread in asked:
                thread.join(10)
            assert {name: reply.retcode for name, reply in replies.items()} == {
                "getModel": 201,
                "startFLJob": 300,
            }


class TestHttp:
    def test_a_body_beyond_the_limit_is_refused_unread(self, cluster: Cluster) -> None:
        for length in (10**7, 2**32, 2**63 - 1):
            with socket.create_connection(("127.0.0.1", cluster.http), timeout=10) as connection:
                connection.sendall(
                    b"POST /updateModel HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length
                )
                answer = connection.makefile("rb").read()
            assert b"413 Content Too Large" in answer
            assert f"a body of {length} bytes is too large for updateModel: the limit is ".encode() in answer

    def test_empty_bodies_and_unknown_paths(self, cluster: Cluster) -> None:
        assert cluster.post("/startFLJob", b"") == (
            500,
            b'{"code":"1","error_message":"Get post message failed"}',
        )
        assert cluster.post("/nothing", b"x")[0] == 404
        assert cluster.get_http(cluster.http, "/startFLJob")[0] == 500

    def test_a_prefix_goes_before_the_round_as_it_is(self, tmp_path: Path) -> None:
        with Cluster(tmp_path) as cluster:
            text = cluster.yaml.read_text() + "client:\n  http_url_prefix: /fl/\n"
            cluster.yaml.write_text(text)
            cluster.start_redis()
            cluster.start_server()
            body = codec.encode(RequestFLJob(fl_name="job", fl_id="x", data_size=1, timestamp="1"))
            assert cluster.post("/startFLJob", body)[0] == 404
            assert codec.decode(ResponseFLJob, cluster.post("/fl/startFLJob?a=b", body)[1]).retcode == 200


class TestScheduler:
    def test_tells_the_state(self, cluster: Cluster) -> None:
        cluster.start_scheduler()
        status, body = cluster.get_http(cluster.manage, "/state")
        state = json.loads(body)
        assert (status, state["code"], state["cluster_state"]) == (200, "0", "CLUSTER_READY")
        assert state["message"] == "Get cluster state successful."
        (node,) = state["nodes"]
        assert (node["role"], node["tcp_address"]) == ("SERVER", f"127.0.0.1:{cluster.tcp}")
        assert node["node_id"].startswith(f"127.0.0.1:{cluster.tcp}::")
        assert body == json.dumps(state, sort_keys=True, separators=(",", ":")).encode()
        cluster.kill("server", signal.SIGTERM)
        assert "nodes" not in json.loads(cluster.get_http(cluster.manage, "/state")[1])

    def test_without_a_job(self, tmp_path: Path) -> None:
        with Cluster(tmp_path) as cluster:
            cluster.start_scheduler(ready=False)
            away = b'{"code":"1","error_message":"Failed to access the cache server. Please retry later."}'
            assert cluster.get_http(cluster.manage, "/state") == (400, away)
            cluster.start_redis()
            nobody = b'{"code":"1","error_message":"Cannot find cluster info for job"}'
            wait_until(lambda: cluster.get_http(cluster.manage, "/state") == (400, nobody), "Redis is seen")
            assert cluster.get_http(cluster.manage, "/state/below")[0] == 404
            assert cluster.get_http(cluster.manage, "/other")[0] == 404
