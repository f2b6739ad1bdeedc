"""Updates that are not plain weights, at real servers with a real Redis: compressed ones and signed ones.

Published models are held to the last bit against what the updates stand for, also where a server was killed before it
had merged them.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from integration.cluster import WEIGHTS, Cluster, filled, wait_until

from fedcore.compression import mask, sparse
from fedcore.wire import codec
from fedcore.wire.messages import (
    CompressFeatureMap,
    CompressType,
    FeatureMap,
    RequestUpdateModel,
    ResponseFLJob,
    ResponseUpdateModel,
)

Arrays = dict[str, np.ndarray]
RATE = 0.4
STEP = 0.125
FIRST: Arrays = {name: values.reshape(-1) for name, values in WEIGHTS.items()}
TRAINED: dict[str, Arrays] = {
    "a": {"a.weight": np.float32([0.5, 1.5, 2.25, 2.0, 4.5, 6.0]), "b.bias": np.float32([1.0, 0.0])},
    "b": {"a.weight": np.float32([-1.0, 3.0, 2.0, 5.0, 3.0, 4.0]), "b.bias": np.float32([0.25, -2.0])},
    "c": {"a.weight": np.float32([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), "b.bias": np.float32([0.7, 0.8])},
}
SIZES = {"a": 7, "b": 10, "c": 3}
SCHEMA = "Verify flatbuffers schema failed for RequestUpdateModel."
SPARSE = {"compression": {"upload_compress_type": "DIFF_SPARSE_QUANT", "upload_sparse_rate": RATE}}
SIGNDS = {"encrypt": {"encrypt_type": "SIGNDS", "signds": {"sign_global_lr": STEP}}}


def job(tmp_path: Path, sections: Mapping[str, Any], **overrides: Any) -> Cluster:
    """A job whose Redis runs."""
    cluster = Cluster(tmp_path, fedcore=overrides.pop("fedcore", None), **overrides)
    cluster.settings.update(sections)
    cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
    cluster.start_redis()
    return cluster


def send(cluster: Cluster, request: RequestUpdateModel) -> ResponseUpdateModel:
    return codec.decode(ResponseUpdateModel, cluster.post("/updateModel", codec.encode(request))[1])


def told(reply: ResponseUpdateModel) -> tuple[int, str]:
    """The code, and the reason without the moment that some end with."""
    return reply.retcode, (reply.reason or "").partition(", retry later at time: ")[0]


GOOD = (200, "success not ready")
BAD = (400, "Verify model feature map failed")


@dataclass
class Account:
    """What clients sent that counts: name -> sum of float32 values times data size, and the data size of all."""

    sums: dict[str, Any] = field(
        default_factory=lambda: {name: np.zeros(v.size) for name, v in FIRST.items()}
    )
    size: int = 0

    def add(self, weights: Mapping[str, Any], data_size: int) -> None:
        for name, values in weights.items():
            self.sums[name] = self.sums[name] + values.astype(np.float64)
        self.size += data_size

    def mean(self) -> Arrays:
        return {name: (values / self.size).astype(np.float32) for name, values in self.sums.items()}


def assert_equal(model: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert {name: values.tolist() for name, values in model.items()} == {
        name: values.tolist() for name, values in expected.items()
    }


# ---- compressed


def compressed(
    fl_id: str, iteration: int = 1, base: Arrays = FIRST, trained: Arrays | None = None
) -> RequestUpdateModel:
    """What a device sends, its weights in the order in which the server sends them."""
    size = SIZES[fl_id]
    mine = {name: values * np.float32(size) for name, values in (trained or TRAINED[fl_id]).items()}
    pattern = sparse.pattern([(name, v.size) for name, v in base.items()], mask.draw(iteration, RATE, 8))
    return RequestUpdateModel(
        fl_name="job",
        fl_id=fl_id,
        iteration=iteration,
        timestamp="1",
        compress_feature_map=sparse.compress(pattern, mine, base, size),
        upload_compress_type=CompressType.DIFF_SPARSE_QUANT,
        upload_sparse_rate=float(np.float32(RATE)),
        name_vec=tuple(base),
    )


def stands_for(request: RequestUpdateModel, base: Arrays = FIRST) -> Arrays:
    """What a compressed update is worth to a server."""
    pattern = sparse.pattern([(n, v.size) for n, v in base.items()], mask.draw(request.iteration, RATE, 8))
    return {
        item.weight_fullname: sparse.restore_weight(
            pattern.places[item.weight_fullname], item, base[item.weight_fullname], SIZES[request.fl_id]
        )
        for item in request.compress_feature_map
    }


def begin(cluster: Cluster, *fl_ids: str) -> list[ResponseFLJob]:
    replies = [cluster.start(fl_id, SIZES[fl_id]) for fl_id in fl_ids]
    assert {reply.retcode for reply in replies} == {200}
    return replies


def test_devices_are_told_to_compress_and_the_mean_is_exact(tmp_path: Path) -> None:
    with job(tmp_path, SPARSE) as cluster:
        cluster.start_server()
        for reply in begin(cluster, "a", "b"):
            assert reply.upload_compress_type == CompressType.DIFF_SPARSE_QUANT
            assert np.float32(reply.upload_sparse_rate) == np.float32(RATE)
            assert [item.weight_fullname for item in reply.feature_map] == ["a.weight", "b.bias"]
        refused = cluster.start("c", SIZES["c"])
        assert (refused.retcode, refused.upload_compress_type) == (300, CompressType.DIFF_SPARSE_QUANT)
        account = Account()
        for fl_id in ("a", "b"):
            request = compressed(fl_id)
            account.add(stands_for(request), SIZES[fl_id])
            assert told(send(cluster, request)) == GOOD
        model = cluster.weights(1)
        assert_equal(model, account.mean())
        # The next iteration has a mask of its own and starts from the new model; one may also send all.
        begin(cluster, "a", "b")
        account, request = Account(), compressed("a", 2, model)
        account.add(stands_for(request, model), SIZES["a"])
        account.add({n: v * np.float32(SIZES["b"]) for n, v in TRAINED["b"].items()}, SIZES["b"])
        assert told(send(cluster, request)) == GOOD
        assert told(cluster.update("b", 2, TRAINED["b"], SIZES["b"])) == GOOD
        assert_equal(cluster.weights(2), account.mean())


@pytest.mark.parametrize("heir", ["itself", "its sibling"])
def test_a_killed_server_loses_no_unmerged_update(tmp_path: Path, heir: str) -> None:
    """Whoever takes up its ledger decodes to the same bytes; plain and compressed ones lie side by side."""
    with job(tmp_path, SPARSE, start_fl_job_threshold=3) as cluster:
        host = cluster.host(0)
        cluster.start_server_on(host, 0)
        if heir == "its sibling":
            cluster.start_server_on(host, 1)
        first = cluster.at(0)
        begin(first, "a", "b", "c")
        for fl_id in ("a", "b", "c"):
            assert told(send(first, compressed(fl_id))) == GOOD
        base = first.weights(1)  # what the next updates are made from, and read against
        begin(first, "a", "b", "c")
        account = Account()
        request = compressed("a", 2, base)
        account.add(stands_for(request, base), SIZES["a"])
        assert told(send(first, request)) == GOOD
        account.add({n: v * np.float32(SIZES["b"]) for n, v in TRAINED["b"].items()}, SIZES["b"])
        assert told(first.update("b", 2, TRAINED["b"], SIZES["b"])) == GOOD
        cluster.kill("server-0")
        last = cluster.at(1)
        if heir == "itself":
            cluster.start_server_on(host, 0)
            last = first
        request = compressed("c", 2, base)
        account.add(stands_for(request, base), SIZES["c"])
        assert told(wait_until(lambda: (r := send(last, request)).retcode == 200 and r, "c counts")) == GOOD
        assert_equal(last.weights(2), account.mean())


def test_a_stopped_server_hands_over_what_was_compressed(tmp_path: Path) -> None:
    with job(tmp_path, SPARSE, start_fl_job_threshold=2) as cluster:
        for n in (0, 1):
            cluster.start_server_on(cluster.host(n), n)
        begin(cluster.at(0), "a", "b")
        account = Account()
        for n, fl_id in ((0, "a"), (1, "b")):
            request = compressed(fl_id)
            account.add(stands_for(request), SIZES[fl_id])
            if n:
                assert cluster.kill("server-0", signal.SIGTERM) == 0
            assert told(send(cluster.at(n), request)) == GOOD
        assert_equal(cluster.at(1).weights(1), account.mean())


def changed(**fields: Any) -> RequestUpdateModel:
    return replace(compressed("a"), **fields)


def entries(index: int, **fields: Any) -> RequestUpdateModel:
    items = list(compressed("a").compress_feature_map)
    items[index] = replace(items[index], **fields)
    return changed(compress_feature_map=tuple(items))


def test_what_is_not_as_it_should_be_is_refused(tmp_path: Path) -> None:
    good = compressed("a")
    items = good.compress_feature_map
    steps = [item.compress_data for item in items]
    full = max(range(2), key=lambda i: steps[i].size)
    moved = np.concatenate(steps)
    assert steps[1 - full].size, "each weight has a value, so that one can borrow from the other"
    borrowed = tuple(
        replace(item, compress_data=part)
        for item, part in zip(items, np.split(moved, [steps[0].size + (1 if full else -1)]), strict=True)
    )
    hostile = {
        "another rate": changed(upload_sparse_rate=0.5),
        "no rate": changed(upload_sparse_rate=0.0),
        "no names": changed(name_vec=None),
        "no name": changed(name_vec=()),
        "an unknown name": changed(name_vec=("a.weight", "c")),
        "one name twice": changed(name_vec=("a.weight", "a.weight")),
        "names in another order": changed(name_vec=("b.bias", "a.weight")),
        "no entry": changed(compress_feature_map=()),
        "one entry": changed(compress_feature_map=items[:1]),
        "QUANT": changed(upload_compress_type=CompressType.QUANT),
        "an upside-down range": entries(full, min_val=2.0, max_val=1.0),
        "a range that is not a number": entries(full, min_val=float("nan")),
        "an infinite range": entries(full, max_val=float("inf")),
        "the widest range": entries(full, min_val=-3e38, max_val=3e38),
        "a surplus value": entries(full, compress_data=np.append(steps[full], np.int8(1))),
        "a value too few": entries(full, compress_data=steps[full][1:]),
        "a borrowed value": changed(compress_feature_map=borrowed),
    }
    incomplete = {
        "no entries at all": changed(compress_feature_map=None),
        "an entry without values": entries(0, compress_data=None),
        "an entry without a name": entries(0, weight_fullname=None),
    }
    with job(tmp_path, SPARSE) as cluster:
        cluster.start_server()
        begin(cluster, "a", "b")
        assert {why: told(send(cluster, request)) for why, request in hostile.items()} == dict.fromkeys(
            hostile, BAD
        )
        assert {why: told(send(cluster, request)) for why, request in incomplete.items()} == dict.fromkeys(
            incomplete, (400, SCHEMA)
        )
        late = told(send(cluster, changed(iteration=7)))
        assert (late[0], late[1][:38]) == (300, "UpdateModel iteration number is invali")
        part = mask.draw(1, RATE, 6)
        only = CompressFeatureMap("a.weight", np.zeros(int(part.sum()), np.int8), 0.0, 0.0)
        lacking = send(cluster, changed(name_vec=("a.weight",), compress_feature_map=(only,)))
        assert told(lacking) == (400, "The updated weight of parameter b.bias is missing, fl id: a")
        assert cluster.metric("fl_updates_accepted_total") == 0
        # None of them has left anything behind.
        account = Account()
        for fl_id in ("a", "b"):
            account.add(stands_for(compressed(fl_id)), SIZES[fl_id])
            assert told(send(cluster, compressed(fl_id))) == GOOD
        assert_equal(cluster.weights(1), account.mean())


@pytest.mark.parametrize("kind", [1, 2, -1])
def test_nobody_compresses_where_it_was_not_asked_for(tmp_path: Path, kind: int) -> None:
    """The original reads weights that are not there, and dies of it."""
    with job(tmp_path, {}) as cluster:
        cluster.start_server()
        begin(cluster, "a", "b")
        for request in (compressed("a"), changed(compress_feature_map=None)):
            assert told(send(cluster, replace(request, upload_compress_type=kind))) == (400, SCHEMA)
        assert told(cluster.update("a", 1, TRAINED["a"], SIZES["a"])) == GOOD


@pytest.mark.parametrize("kill", [False, True])
def test_a_compressed_update_is_measured_as_what_it_stands_for(tmp_path: Path, kill: bool) -> None:
    """It is clipped in its slot: whoever recovers the ledger reads it clipped."""
    bound = {"update": {"norm_bound": 1.0, "norm_action": "clip"}}
    with job(tmp_path, SPARSE, fedcore=bound) as cluster:
        cluster.start_server()
        begin(cluster, "a", "b")
        far = {name: values + np.float32(1000.0) for name, values in FIRST.items()}
        assert told(send(cluster, compressed("a", trained=far))) == GOOD
        assert cluster.metric("fl_updates_clipped_total") == 1
        if kill:
            cluster.kill("server")
            cluster.start_server()
        assert told(send(cluster, compressed("b", trained=FIRST))) == GOOD
        model = cluster.weights(1)
        moves = np.concatenate([model[name] - FIRST[name] for name in FIRST])
        marks = mask.draw(1, RATE, 8)
        share = SIZES["a"] / (SIZES["a"] + SIZES["b"])
        np.testing.assert_allclose(
            moves, np.where(marks, share / np.sqrt(marks.sum()), 0.0), rtol=1e-4, atol=1e-6
        )


def test_a_compressed_update_beyond_the_bound_is_refused(tmp_path: Path) -> None:
    with job(tmp_path, SPARSE, fedcore={"update": {"norm_bound": 20.0}}) as cluster:
        cluster.start_server()
        begin(cluster, "a", "b")
        far = {name: values + np.float32(1000.0) for name, values in FIRST.items()}
        assert told(send(cluster, compressed("a", trained=far))) == (
            300,
            "The update is too far from the model",
        )
        assert told(send(cluster, compressed("a"))) == GOOD


def test_the_values_of_the_cluster_are_in_force(tmp_path: Path) -> None:
    """A server whose file says otherwise takes them over, and asks for and reads what they say."""
    with job(tmp_path, SPARSE) as cluster:
        cluster.start_server_on(cluster.host(0), 0)
        cluster.own[1] = {
            "compression": {"upload_compress_type": "NO_COMPRESS", "upload_sparse_rate": 1.0},
        }
        cluster.start_server_on(cluster.host(1), 1)
        other = cluster.at(1)
        reply = begin(other, "a", "b")[0]
        assert reply.upload_compress_type == CompressType.DIFF_SPARSE_QUANT
        account = Account()
        for fl_id in ("a", "b"):
            account.add(stands_for(compressed(fl_id)), SIZES[fl_id])
            assert told(send(other, compressed(fl_id))) == GOOD
        assert_equal(other.weights(1), account.mean())


# ---- signed


def signed(
    fl_id: str, indices: list[int], sign: int = 1, iteration: int = 1, **fields: Any
) -> RequestUpdateModel:
    features = tuple(FeatureMap(name, np.empty(0, np.float32)) for name in FIRST)
    request = RequestUpdateModel(
        fl_name="job",
        fl_id=fl_id,
        iteration=iteration,
        timestamp="1",
        feature_map=features,
        sign=sign,
        index_array=np.int32(indices),
    )
    return replace(request, **fields)


def worth(fl_id: str, indices: list[int], sign: int = 1) -> Arrays:
    """What a signed update stands for."""
    flat = np.concatenate(list(FIRST.values()))
    flat[indices] += np.float32(sign * STEP)
    flat *= np.float32(SIZES[fl_id])
    return {"a.weight": flat[:6], "b.bias": flat[6:]}


@pytest.mark.parametrize("kill", [False, True])
def test_signed_updates_move_the_model_by_steps(tmp_path: Path, kill: bool) -> None:
    with job(tmp_path, SIGNDS, start_fl_job_threshold=3) as cluster:
        cluster.start_server()
        reply = begin(cluster, "a", "b", "c")[0]
        params = reply.fl_plan_config.cipher
        assert (params.encrypt_type, params.ds_params.sign_global_lr) == ("SIGNDS", STEP)
        account = Account()
        for fl_id, indices, sign in (("a", [0, 2, 7], 1), ("b", [2, 3], -1)):
            account.add(worth(fl_id, indices, sign), SIZES[fl_id])
            assert told(send(cluster, signed(fl_id, indices, sign))) == GOOD
        if kill:
            cluster.kill("server")
            cluster.start_server()
        # One that has no sign is plain, as the original takes it.
        account.add({n: v * np.float32(SIZES["c"]) for n, v in TRAINED["c"].items()}, SIZES["c"])
        assert told(cluster.update("c", 1, TRAINED["c"], SIZES["c"])) == GOOD
        assert_equal(cluster.weights(1), account.mean())


def test_a_signed_update_that_is_not_as_it_should_be_is_refused(tmp_path: Path) -> None:
    def named(*names: str) -> tuple[FeatureMap, ...]:
        return tuple(FeatureMap(name, np.empty(0, np.float32)) for name in names)

    hostile = {
        "a large sign": signed("a", [1], 1000),
        "sign 2": signed("a", [1], 2),
        "sign -2": signed("a", [1], -2),
        "no indices": signed("a", [1], index_array=None),
        "no index": signed("a", []),
        "unsorted": signed("a", [3, 1]),
        "repeated": signed("a", [3, 3]),
        "negative": signed("a", [-1, 3]),
        "beyond the model": signed("a", [3, 8]),
        "too many": signed("a", list(range(101))),
        "an unknown name": signed("a", [1], feature_map=named("a.weight", "x")),
        "a name twice": signed("a", [1], feature_map=named("a.weight", "a.weight", "b.bias")),
        "no weight": signed("a", [1], feature_map=()),
    }
    with job(tmp_path, SIGNDS, fedcore={"update": {"unsigned_signds": False}}) as cluster:
        cluster.start_server()
        begin(cluster, "a", "b")
        assert {why: told(send(cluster, request)) for why, request in hostile.items()} == dict.fromkeys(
            hostile, BAD
        )
        lacking = send(cluster, signed("a", [1], feature_map=named("b.bias")))
        assert told(lacking) == (400, "The updated weight of parameter a.weight is missing, fl id: a")
        assert told(send(cluster, signed("a", [1], upload_compress_type=1))) == (400, SCHEMA)
        assert told(cluster.update("a", 1, filled(1.0), SIZES["a"])) == BAD, "this job takes only signed ones"
        account = Account()
        for fl_id in ("a", "b"):
            account.add(worth(fl_id, [0, 7]), SIZES[fl_id])
            assert told(send(cluster, signed(fl_id, [0, 7]))) == GOOD
        assert_equal(cluster.weights(1), account.mean())


def test_a_sign_means_nothing_where_nobody_was_asked_for_one(tmp_path: Path) -> None:
    with job(tmp_path, {}) as cluster:
        cluster.start_server()
        begin(cluster, "a", "b")
        fields = {"sign": 1000, "index_array": np.int32([1])}
        for fl_id in ("a", "b"):
            assert told(cluster.update(fl_id, 1, filled(3.0), SIZES[fl_id], **fields)) == GOOD
        assert_equal(cluster.weights(1), {n: v.reshape(-1) for n, v in filled(3.0).items()})
