"""Updates that would move the model too far, at a real server: refused, clipped or counted, and always told."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.cluster import WEIGHTS, Cluster, filled, wait_until

from fedcore.wire import codec
from fedcore.wire.messages import FeatureMap, RequestUpdateModel, ResponseUpdateModel

FLOATS = sum(values.size for values in WEIGHTS.values())


def started(tmp_path: Path, **update: Any) -> Cluster:
    cluster = Cluster(tmp_path, fedcore={"update": update})
    cluster.start_redis()
    cluster.start_server()
    return cluster


def test_an_update_beyond_the_bound_is_refused_and_others_go_on(tmp_path: Path) -> None:
    with started(tmp_path, norm_bound=20.0) as cluster:
        assert {cluster.start(fl_id).retcode for fl_id in ("good", "bad")} == {200}
        assert cluster.update("good", 1, filled(2.0)).retcode == 200
        reply = cluster.update("bad", 1, filled(100.0))
        assert reply.retcode == 300
        assert reply.reason.startswith("The update is too far from the model, retry later at time: ")
        assert int(reply.next_req_time) > time.time() * 1000
        assert cluster.metric('fl_updates_refused_total{reason="norm"}') == 1
        assert cluster.metric("fl_update_norm_count") == 2
        # The same device with an update that is near enough: nothing is left of the refusal.
        assert cluster.update("bad", 1, filled(4.0)).retcode == 200
        np.testing.assert_allclose(cluster.weights(1)["b.bias"], [3.0, 3.0])
        # The next one is measured from the new model, not from the first.
        assert cluster.start("good").retcode == cluster.start("bad").retcode == 200
        assert cluster.update("good", 2, filled(9.0)).retcode == 200
        assert cluster.update("bad", 2, filled(11.0)).retcode == 300


def test_an_update_beyond_the_bound_is_clipped(tmp_path: Path) -> None:
    with started(tmp_path, norm_bound=1.0, norm_action="clip") as cluster:
        assert {cluster.start(fl_id).retcode for fl_id in ("good", "bad")} == {200}
        same = {name: values + np.float32(0.1) for name, values in WEIGHTS.items()}
        assert cluster.update("good", 1, same).retcode == 200
        far = {name: values + np.float32(1000.0) for name, values in WEIGHTS.items()}
        assert cluster.update("bad", 1, far).retcode == 200
        model = cluster.weights(1)
        step = (0.1 + 1.0 / np.sqrt(FLOATS)) / 2  # of each value: the far one was brought to a distance of 1
        np.testing.assert_allclose(model["b.bias"], WEIGHTS["b.bias"] + step, rtol=1e-5)
        np.testing.assert_allclose(model["a.weight"], WEIGHTS["a.weight"].reshape(-1) + step, rtol=1e-5)
        assert cluster.metric("fl_updates_clipped_total") == 1


def test_what_is_clipped_is_clipped_in_the_ledger_of_a_killed_server(tmp_path: Path) -> None:
    with started(tmp_path, norm_bound=1.0, norm_action="clip") as cluster:
        assert {cluster.start(fl_id).retcode for fl_id in ("a", "b")} == {200}
        far = {name: values + np.float32(1000.0) for name, values in WEIGHTS.items()}
        assert cluster.update("a", 1, far).retcode == 200
        cluster.kill("server")
        cluster.start_server()
        assert cluster.update("b", 1, WEIGHTS).retcode == 200
        step = 0.5 / np.sqrt(FLOATS)
        np.testing.assert_allclose(cluster.weights(1)["b.bias"], WEIGHTS["b.bias"] + step, rtol=1e-5)


def test_the_bound_only_counts_where_it_is_told_to(tmp_path: Path) -> None:
    with started(tmp_path, norm_bound=1.0, norm_action="count") as cluster:
        cluster.run_iteration(1, {"a": 100.0, "b": 200.0})
        np.testing.assert_allclose(cluster.weights(1)["b.bias"], [150.0, 150.0])
        assert cluster.metric("fl_update_norm_count") == 2


@pytest.mark.parametrize("bound", [0.0, 20.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_with_and_without_a_bound(
    tmp_path: Path, bound: float, bad: float
) -> None:
    with started(tmp_path, norm_bound=bound) as cluster:
        assert cluster.start("a").retcode == 200
        poisoned = filled(1.0)
        poisoned["b.bias"][1] = bad
        reply = cluster.update("a", 1, poisoned)
        assert (reply.retcode, reply.reason[:32]) == (400, "Verify model feature map failed,")
        assert cluster.metric('fl_updates_refused_total{reason="unfit"}') == 1


def test_a_stranger_is_refused_as_one_and_not_measured(tmp_path: Path) -> None:
    with started(tmp_path, norm_bound=1.0) as cluster:
        reply = cluster.update("stranger", 1, filled(1e6))
        assert (reply.retcode, reply.reason) == (
            300,
            "devices_meta for stranger is not set. Please retry later.",
        )
        assert cluster.metric("fl_update_norm_count") == 0


def test_weights_that_share_their_memory_are_not_clipped_but_refused(tmp_path: Path) -> None:
    """Both weights point at the same floats, as no builder does; clipping them one by one would be wrong twice."""
    with started(tmp_path, norm_bound=1.0, norm_action="clip") as cluster:
        assert cluster.start("a", 1).retcode == 200
        six, two = np.full(6, 7777.0, np.float32), np.full(2, 7777.0, np.float32)
        weights = (FeatureMap("b.bias", two), FeatureMap("a.weight", six))
        body = bytearray(codec.encode(RequestUpdateModel("job", "a", 1, weights, "1")))
        own = body.find((2).to_bytes(4, "little") + two.tobytes())  # the shorter vector, its length in front
        place = next(at for at in range(0, own, 4) if at + int.from_bytes(body[at : at + 4], "little") == own)
        shared = body.find((6).to_bytes(4, "little") + six.tobytes()) + 4
        body[shared : shared + 4] = (2).to_bytes(4, "little")  # its length now is the first of the six values
        body[place : place + 4] = (shared - place).to_bytes(4, "little")
        decoded = codec.decode(RequestUpdateModel, bytes(body))
        assert [item.data.size for item in decoded.feature_map] == [2, 6]
        reply = codec.decode(ResponseUpdateModel, cluster.post("/updateModel", bytes(body))[1])
        assert (reply.retcode, cluster.metric("fl_updates_clipped_total")) == (300, 0)


def test_a_data_size_above_the_cap_gets_no_place(tmp_path: Path) -> None:
    with started(tmp_path, max_data_size=100) as cluster:
        reply = cluster.start("greedy", 101)
        assert (reply.retcode, reply.reason) == (300, "FL job data size is too large.")
        assert int(reply.next_req_time) > time.time() * 1000
        assert cluster.start("modest", 100).retcode == 200
        wait_until(lambda: cluster.metric("fl_data_sizes_refused_total") == 1, "the refusal is counted")
