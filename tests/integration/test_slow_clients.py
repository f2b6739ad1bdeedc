"""Slow senders take room, but not everybody's."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
from integration.cluster import Cluster, filled

from fedcore.models.formats import write_model
from fedcore.wire import codec
from fedcore.wire.messages import FeatureMap, RequestUpdateModel


def half_sent(cluster: Cluster, body: bytes) -> socket.socket:
    """Send the head and half of an upload; the rest stays away."""
    connection = socket.create_connection(("127.0.0.1", cluster.http))
    connection.sendall(b"POST /updateModel HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
    connection.sendall(body[: len(body) // 2])
    return connection


def test_slow_senders_do_not_stop_fast_ones(tmp_path: Path) -> None:
    """More half-sent bodies than there are slots; complete ones are served, and the slow ones too in the end."""
    with Cluster(
        tmp_path, fedcore={"ledger": {"memory_budget": "1MiB"}}, start_fl_job_threshold=30
    ) as cluster:
        cluster.start_redis()
        cluster.start_server()
        slow = [f"slow-{i}" for i in range(24)]
        fast = [f"fast-{i}" for i in range(6)]
        for fl_id in slow + fast:
            assert cluster.start(fl_id).retcode == 200
        weights = tuple(FeatureMap(name, values.reshape(-1) * 10) for name, values in filled(2.0).items())
        bodies = [codec.encode(RequestUpdateModel("job", fl_id, 1, weights, "1")) for fl_id in slow]
        connections = [half_sent(cluster, body) for body in bodies]
        for fl_id in fast:
            assert cluster.update(fl_id, 1, filled(2.0)).retcode == 200
        for connection, body in zip(connections, bodies, strict=True):
            connection.sendall(body[len(body) // 2 :])
        for connection in connections:
            assert b" 200 OK" in connection.recv(4096)
            connection.close()
        np.testing.assert_array_equal(cluster.weights(1)["b.bias"], np.float32([2, 2]))


def test_a_large_model_through_threads_and_few_slots(tmp_path: Path) -> None:
    """Merges in threads while bodies arrive: 400,000 values, eight slots, 24 clients."""
    with Cluster(
        tmp_path, fedcore={"ledger": {"memory_budget": "1MiB"}}, start_fl_job_threshold=24
    ) as cluster:
        big = {"w": np.zeros(400_000, np.float32)}
        write_model(tmp_path / "model.safetensors", big, set(), {})
        cluster.start_redis()
        cluster.start_server()
        clients = [f"c{i}" for i in range(24)]
        for fl_id in clients:
            assert cluster.start(fl_id, 1).retcode == 200
        for i, fl_id in enumerate(clients):
            assert cluster.update(fl_id, 1, {"w": np.full(400_000, i, np.float32)}, 1).retcode == 200
        np.testing.assert_array_equal(cluster.weights(1)["w"], np.full(400_000, 11.5, np.float32))
