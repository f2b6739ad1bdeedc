"""Evaluation without labels: vectors in a real Redis, and the score that real servers tell."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from integration.cluster import Cluster, filled, wait_until
from integration.redis_fixture import PrivateRedis, ReactorThread, redis_client

from fedcore.aggregation import clustering
from fedcore.core.admission import Acceptance
from fedcore.core.job import RunningState
from fedcore.services.evaluation import longest_vector
from fedcore.store.cluster_state import ClientMeta, ClusterState, IterationMoved, Reserve
from fedcore.store.link import RIGHTS
from fedcore.store.redis import Redis
from fedcore.wire.messages import UnsupervisedEvalFlg, UnsupervisedEvalItem, UnsupervisedEvalItems

WINDOW_MS = 60_000
DAY_S = 86_400
VECTORS = {
    "a": [0.9, 0.1, 0.0],
    "b": [0.8, 0.1, 0.1],
    "c": [0.1, 0.7, 0.2],
    "d": [0.3, 0.6, 0.1],
    "e": [0.1, 0.9, 0.3],
}
_numbers = count()

# ---- what Redis keeps


class Kept:
    """The shared state of a job at iteration 5, with one server."""

    def __init__(self, loop: ReactorThread, redis: Redis) -> None:
        self.loop, self.redis = loop, redis
        self.state = ClusterState(redis, f"evaluated{next(_numbers)}", "i_1", WINDOW_MS)
        self.run(self.state.create(5, success=True, result="", running=RunningState.RUNNING, base="b"))
        self.run(self.state.own_ledger("L", "n"))
        self.run(self.state.heartbeat("server", "n", "address"))

    def run(self, work: Any) -> Any:
        return self.loop.run(work)

    def start(self, *fl_ids: str, number: int = 5) -> None:
        for fl_id in fl_ids:
            meta, reserve = ClientMeta(2, 0, 0), Reserve(0, 0, 0)
            self.run(self.state.select_client(number, fl_id, meta, places=99, fit=True, reserve=reserve))

    def accept(
        self, fl_id: str, vector: Sequence[float], *, kept: int = 3, number: int = 5, **details: Any
    ) -> Acceptance:
        given = {"quorum": 99, "ledger_id": "L", "node_id": "n", "fit": True} | details
        packed = np.float32(vector).tobytes()
        accepting = self.state.accept_upload(number, 1, number, fl_id, vector=packed, kept=kept, **given)
        acceptance, _, _ = self.run(accepting)
        return acceptance

    @property
    def vectors(self) -> list[list[float]]:
        return sorted(np.frombuffer(vector, "<f4").tolist() for vector in self.run(self.state.vectors()))

    def command(self, *words: str) -> Any:
        return self.run(self.redis.command(*words))

    def key_names(self) -> list[bytes]:
        return sorted(self.command("KEYS", f"{self.state.keys.prefix}evaluat*"))


@pytest.fixture
def kept(loop: ReactorThread, redis: Redis) -> Kept:
    kept = Kept(loop, redis)
    kept.start("a", "b", "c", "d")
    return kept


def test_a_counted_update_s_vector_is_kept(kept: Kept) -> None:
    assert kept.accept("a", [1, 2]) is Acceptance.ACCEPTED
    assert kept.vectors == [[1, 2]]
    for key in kept.key_names():
        assert WINDOW_MS // 1000 + DAY_S - 60 < kept.command("TTL", key) <= WINDOW_MS // 1000 + DAY_S
    assert len(kept.key_names()) == 2


def test_a_repeat_changes_nothing(kept: Kept) -> None:
    kept.accept("a", [1, 2])
    assert kept.accept("a", [3, 4]) is Acceptance.ACCEPTED, "as its ledger may have lost the reply"
    assert kept.vectors == [[1, 2]]


@pytest.mark.parametrize(
    ("fl_id", "details", "outcome"),
    [
        ("a", {"fit": False}, Acceptance.UNFIT),
        ("a", {"quorum": 0}, Acceptance.FULL),
        ("stranger", {}, Acceptance.UNKNOWN_CLIENT),
    ],
)
def test_what_does_not_count_is_not_kept(
    kept: Kept, fl_id: str, details: dict[str, Any], outcome: Acceptance
) -> None:
    assert kept.accept(fl_id, [1, 2], **details) is outcome
    with pytest.raises(IterationMoved):
        kept.accept("a", [1, 2], number=4)
    assert kept.key_names() == []


def test_without_evaluation_nothing_is_kept(kept: Kept) -> None:
    assert kept.accept("a", [1, 2], kept=0) is Acceptance.ACCEPTED
    assert kept.accept("b", []) is Acceptance.ACCEPTED
    assert kept.key_names() == []


def test_the_newest_clients_push_out_the_oldest(kept: Kept) -> None:
    for place, fl_id in enumerate("abcd"):
        kept.accept(fl_id, [place])
    assert kept.vectors == [[1], [2], [3]]
    assert [
        kept.command(word, key) for word, key in zip(("ZCARD", "HLEN"), kept.key_names(), strict=True)
    ] == [
        3,
        3,
    ]


def test_vectors_stay_over_iterations_and_each_client_has_one(kept: Kept) -> None:
    for place, fl_id in enumerate("abc"):
        kept.accept(fl_id, [place])
    state = kept.state
    snapshot = kept.run(state.read()).snapshot
    assert kept.run(
        state.advance(5, 1, phase=snapshot.iteration.phase, success=False, result="", finishes=False)
    )
    kept.start("a", "d", number=6)
    kept.accept("a", [9], number=6)
    assert kept.vectors == [[1], [2], [9]]
    kept.accept("d", [8], number=6)
    assert kept.vectors == [[2], [8], [9]], "b's is the oldest, for a has sent a new one"


def test_fewer_are_kept_once_the_configuration_says_so(kept: Kept) -> None:
    for place, fl_id in enumerate("abc"):
        kept.accept(fl_id, [place])
    kept.accept("d", [3], kept=1)
    assert kept.vectors == [[3]]


def test_the_documented_rights_are_enough(loop: ReactorThread, own_server: PrivateRedis) -> None:
    assert own_server.ask("ACL", "SETUSER", "default", "reset", "on", "nopass", *RIGHTS.split()) == "+OK"
    with redis_client(loop, own_server.port) as redis:
        loop.run(redis.connected())
        kept = Kept(loop, redis)
        kept.start("a", "b")
        for place, fl_id in enumerate("ab"):
            assert kept.accept(fl_id, [place], kept=1) is Acceptance.ACCEPTED
        assert kept.vectors == [[1]]


# ---- what servers tell


def evaluating(directory: Path, *, places: int, clients: int, eval_type: str, **windows: Any) -> Cluster:
    """Prepare a job that evaluates vectors."""
    cluster = Cluster(directory, start_fl_job_threshold=places, **windows)
    cluster.settings["unsupervised"] = {"eval_type": eval_type, "cluster_client_num": clients}
    cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
    return cluster


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Cluster]:
    with evaluating(tmp_path, places=5, clients=5, eval_type="SILHOUETTE_SCORE") as cluster:
        cluster.start_redis()
        yield cluster


def start(cluster: Cluster, iteration: int, *fl_ids: str) -> None:
    for fl_id in fl_ids:
        reply = cluster.start(fl_id)
        assert (reply.retcode, reply.iteration) == (200, iteration), reply.reason
        assert reply.unsupervised_eval_flg == UnsupervisedEvalFlg.EVAL_ENABLE


def upload(cluster: Cluster, iteration: int, fl_id: str, *vectors: list[float]) -> None:
    items = tuple(UnsupervisedEvalItem("", np.float32(vector)) for vector in vectors)
    reply = cluster.update(
        fl_id, iteration, filled(1), unsupervised_eval_items=UnsupervisedEvalItems(items) if items else None
    )
    assert (reply.retcode, reply.reason) == (200, "success not ready")


def shown(cluster: Cluster, *servers: int, eval_type: str = "SILHOUETTE_SCORE") -> list[float]:
    """The scores that servers show."""
    found = []
    for n in servers or (0,):
        answer = cluster.get_http(cluster.admin + n, "/metrics")
        rows = [] if answer is None else answer[1].decode().splitlines()
        start = f'fl_evaluation_score{{eval_type="{eval_type}"}} '
        found += [float(row.removeprefix(start)) for row in rows if row.startswith(start)]
    return found


def ends(cluster: Cluster, name: str) -> dict[int, dict[str, Any]]:
    """What a server has logged of the iterations that ended."""
    records = [json.loads(line) for line in cluster.log(name).splitlines() if line.startswith("{")]
    return {r["iteration"]: r for r in records if "ended: " in str(r.get("message", r.get("event", "")))}


def expected(*fl_ids: str, measure: clustering.Measure = clustering.silhouette) -> float:
    return clustering.score(measure, [np.float32(VECTORS[fl_id]) for fl_id in fl_ids]).value


@pytest.mark.parametrize(
    ("eval_type", "measure"),
    [
        ("SILHOUETTE_SCORE", clustering.silhouette),
        ("CALINSKI_HARABASZ_SCORE", clustering.calinski_harabasz),
        ("DAVIES_BOULDIN_SCORE", clustering.davies_bouldin),
    ],
)
def test_each_score_is_in_the_metrics_and_the_log(
    tmp_path: Path, eval_type: str, measure: clustering.Measure
) -> None:
    """Vectors carry over: the third iteration is the first that has five clients'."""
    with evaluating(tmp_path, places=2, clients=5, eval_type=eval_type) as cluster:
        cluster.start_redis()
        cluster.start_server()
        assert shown(cluster, eval_type=eval_type) == []
        for iteration, pair in enumerate(["ab", "cd", "ea"], 1):
            start(cluster, iteration, *pair)
            for fl_id in pair:
                upload(cluster, iteration, fl_id, VECTORS[fl_id][:1], VECTORS[fl_id][1:])
            cluster.weights(iteration)
            told = wait_until(lambda: ends(cluster, "server").get(iteration), "the end is logged")  # noqa: B023
            score = expected(*"abcde", measure=measure) if iteration == 3 else 0.0
            assert told["evaluation"] == pytest.approx(score)
            assert shown(cluster, eval_type=eval_type) == [pytest.approx(score)]
        assert score != 0.0


def test_two_servers_and_a_kill_in_mid_iteration_lose_no_vector(job: Cluster) -> None:
    host = job.host(0)
    model = ("--model", str(job.directory / "model.safetensors"))
    for n in (0, 1):
        job.start_server_on(host, n, *model)
    start(job.at(0), 1, *"abcde")
    for fl_id, n in (("a", 0), ("b", 1), ("c", 1)):
        upload(job.at(n), 1, fl_id, VECTORS[fl_id])
    job.kill(job.name(1), signal.SIGKILL)
    upload(job.at(0), 1, "b", [9.0, 9.0, 9.0])  # a repeat changes nothing
    upload(job.at(0), 1, "d", VECTORS["d"])
    upload(job.at(0), 1, "e", VECTORS["e"])
    job.at(0).weights(1)
    assert wait_until(lambda: shown(job), "the score is shown") == [pytest.approx(expected(*"abcde"))]
    assert ends(job, job.name(0))[1]["evaluation"] == pytest.approx(expected(*"abcde"))

    job.start_server_on(host, 1, *model)
    start(job.at(1), 2, *"abcde")
    for fl_id in "abcde":
        upload(job.at(1), 2, fl_id, VECTORS[fl_id])
    job.at(0).weights(2)
    wait_until(lambda: ends(job, job.name(0)).get(2) and ends(job, job.name(1)).get(2), "both tell the end")
    assert shown(job, 0, 1) == [pytest.approx(expected(*"abcde"))], "one server tells it"


def test_an_iteration_that_fails_is_evaluated_too(tmp_path: Path) -> None:
    job = evaluating(
        tmp_path, places=3, clients=2, eval_type="SILHOUETTE_SCORE", update_model_time_window=1500
    )
    with job:
        job.start_redis()
        job.start_server()
        start(job, 1, "a", "c", "d")
        upload(job, 1, "a", VECTORS["a"])
        told = wait_until(lambda: ends(job, "server").get(1), "the end is logged")
        assert (told["valid"], told["evaluation"]) == (False, 0.0)


def test_what_hostile_clients_send(job: Cluster) -> None:
    """NaN is refused; too much is not kept; another length does not count. No update is lost for it."""
    job.start_server()
    start(job, 1, *"abcde")
    items = UnsupervisedEvalItems((UnsupervisedEvalItem("", np.float32([1, np.nan])),))
    assert job.update("a", 1, filled(1), unsupervised_eval_items=items).retcode == 400
    upload(job, 1, "a", [1.0] * (longest_vector(5) + 1))
    upload(job, 1, "b")
    for fl_id in "cde":
        upload(job, 1, fl_id, VECTORS[fl_id])
    job.weights(1)
    assert wait_until(lambda: ends(job, "server").get(1), "the end is logged")["evaluation"] == 0.0
    wait_until(lambda: f"have more than {longest_vector(5)} values" in job.log(), "it is told")
    start(job, 2, *"abcde")
    for fl_id in "cde":
        upload(job, 2, fl_id, VECTORS[fl_id])
    upload(job, 2, "a", VECTORS["a"])
    upload(job, 2, "b", [3e38, -3e38])
    job.weights(2)
    told = wait_until(lambda: ends(job, "server").get(2), "the end is logged")
    assert told["evaluation"] == pytest.approx(expected(*"acde"))
    assert "have another length than most" in job.log()
