"""Weights in 8 bits on their way to devices: a real server, asked by devices that take them and by others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from integration.cluster import WEIGHTS, Cluster, filled, wait_until
from integration.test_devices import strict, together
from strict_device import Status

from fedcore.compression import quant
from fedcore.models.formats import write_model
from fedcore.wire import codec
from fedcore.wire.messages import RequestGetModel, ResponseGetModel

TYPES = np.array([0, 2], np.int8)
FIXED = np.float32([0, 1, 2.5])


def packing(directory: Path, **options: Any) -> Cluster:
    """A job whose server sends 8 bits; one weight of its model is not aggregated."""
    cluster = Cluster(directory, **options)
    cluster.settings["compression"] = {"download_compress_type": "QUANT"}
    cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
    write_model(directory / "model.safetensors", {**WEIGHTS, "min_val": FIXED}, {"min_val"}, {})
    return cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with packing(tmp_path) as cluster:
        cluster.start_redis()
        cluster.start_server()
        yield cluster


def model(cluster: Cluster, iteration: int, types: Any = TYPES) -> ResponseGetModel:
    request = RequestGetModel("job", iteration, "1", types)
    return codec.decode(ResponseGetModel, cluster.post("/getModel", codec.encode(request))[1])


def restored(reply: Any) -> Mapping[str, Any]:
    assert (reply.download_compress_type, reply.feature_map) == (2, ())
    return {item.weight_fullname: quant.restore(item) for item in reply.compress_feature_map}


def test_devices_get_the_type_that_they_take(cluster: Cluster) -> None:
    packed = restored(cluster.start("one", download_compress_types=TYPES))
    assert list(packed) == ["a.weight", "b.bias", "min_val"]
    np.testing.assert_allclose(packed["a.weight"], WEIGHTS["a.weight"].reshape(-1), atol=5 / 255)
    plain = cluster.start("two")
    assert (plain.download_compress_type, plain.compress_feature_map) == (0, ())
    np.testing.assert_array_equal(plain.feature_map[0].data, WEIGHTS["a.weight"].reshape(-1))
    for name, value in (("one", 1.0), ("two", 2.0)):
        assert cluster.update(name, 1, filled(value)).retcode == 200
    reply = wait_until(lambda: (r := model(cluster, 1)).retcode == 200 and r, "model 1")
    weights = restored(reply)
    assert {name: values.tolist() for name, values in weights.items() if name != "min_val"} == {
        "a.weight": [1.5] * 6,
        "b.bias": [1.5] * 2,
    }
    np.testing.assert_allclose(weights["min_val"], FIXED, atol=3 / 255)
    assert sorted(cluster.weights(1)) == ["a.weight", "b.bias"]


def test_earlier_models_are_there_in_8_bits(cluster: Cluster) -> None:
    for iteration in (1, 2, 3):
        cluster.run_iteration(iteration, {"one": iteration, "two": iteration})
        wait_until(lambda i=iteration: model(cluster, i).retcode == 200, f"model {iteration}")
    for iteration in (1, 2, 3):
        reply = model(cluster, iteration)
        assert reply.reason == f"Get model for iteration {iteration}"
        assert restored(reply)["b.bias"].tolist() == [iteration] * 2
    assert model(cluster, 4).retcode == 201


def test_devices_of_the_original_train_on_8_bits(tmp_path: Path) -> None:
    with packing(tmp_path, start_fl_job_threshold=4, fl_iteration_num=6) as cluster:
        cluster.start_redis()
        cluster.start_server()
        devices = {f"device-{i}": strict(cluster, f"device-{i}", 5 + i) for i in range(4)}
        assert together({name: device.run for name, device in devices.items()}, 60) == dict.fromkeys(
            devices, Status.SUCCESS
        )
        for name, values in cluster.weights(6).items():
            np.testing.assert_allclose(values, WEIGHTS[name].reshape(-1) + 6, atol=6 * 5 / 255)
