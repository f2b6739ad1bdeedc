"""Load a server of its own with whole iterations and check every model: rates, latencies, CPU seconds, memory.

    python bench/cluster_load.py                                   200 clients, LeNet-5 with 66,404 values
    python bench/cluster_load.py --clients 20 --floats 5000000 --iterations 3
    python bench/cluster_load.py --fsync --json result.json

Redis and fl-serverd run as processes of their own on this machine, as does everything that they are compared with;
trust ratios and CPU seconds. Each phase (startFLJob, updateModel, getModel) is a burst of all clients over
``--concurrency`` connections. The mean that is to come out is computed here from the uploads.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedcore.models.formats import write_model
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
from fedctl.processes import Child, Family, RedisServer, program, reserved_ports

LENET = {
    "conv1.weight": (6, 3, 5, 5),
    "conv2.weight": (16, 6, 5, 5),
    "fc1.weight": (120, 400),
    "fc1.bias": (120,),
    "fc2.weight": (84, 120),
    "fc2.bias": (84,),
    "fc3.weight": (62, 84),
    "fc3.bias": (62,),
}
MARK = 0x7BADF00D  # stands for the iteration in a prebuilt upload until it is known
WARM_UP = 1


def used(child: Child) -> tuple[float, float]:
    """Return a process's CPU seconds and the most memory it has had, MiB."""
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{child.pid}/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(peak.split()[1]) / 1024


class Device:
    """All clients' connection of one thread."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def post(self, path: str, body: bytes | bytearray) -> bytes:
        self._connection.request("POST", path, body)
        answer = self._connection.getresponse()
        content = answer.read()
        assert answer.status == 200, (answer.status, content[:200])
        return content


class Load:
    """Clients, their prebuilt uploads, and the mean that they must give."""

    def __init__(self, port: int, shapes: dict[str, tuple[int, ...]], clients: int, concurrency: int) -> None:
        rng = np.random.default_rng(1)
        base = {name: rng.standard_normal(shape, np.float32).reshape(-1) for name, shape in shapes.items()}
        self.sizes = [1 + (7 * i) % 23 for i in range(clients)]
        self.expected = dict.fromkeys(shapes, 0.0)
        self.uploads: list[tuple[bytearray, int]] = []
        for i, size in enumerate(self.sizes):
            weights = {name: (values + np.float32(i % 5)) * np.float32(size) for name, values in base.items()}
            for name, values in weights.items():
                self.expected[name] = self.expected[name] + values.astype(np.float64)
            maps = tuple(FeatureMap(name, values) for name, values in weights.items())
            body = bytearray(
                codec.encode(RequestUpdateModel("bench", f"client-{i}", MARK, maps, "1", upload_loss=0.5))
            )
            self.uploads.append((body, body.index(struct.pack("<i", MARK))))
        self.expected = {name: sums / sum(self.sizes) for name, sums in self.expected.items()}
        self._pool = ThreadPoolExecutor(concurrency)
        self._local = threading.local()
        self._port = port

    def _device(self) -> Device:
        device = getattr(self._local, "device", None)
        if device is None:
            device = self._local.device = Device(self._port)
        return device

    def burst(self, one: Callable[[int], None]) -> tuple[float, list[float]]:
        """Let all clients do one thing; return the seconds of all and of each."""

        def timed(i: int) -> float:
            began = time.perf_counter()
            one(i)
            return time.perf_counter() - began

        began = time.perf_counter()
        each = list(self._pool.map(timed, range(len(self.sizes))))
        return time.perf_counter() - began, each

    def iterate(self, number: int) -> dict[str, Any]:
        """Run one iteration; return its figures."""

        def start(i: int) -> None:
            request = RequestFLJob("bench", f"client-{i}", data_size=self.sizes[i], timestamp="1")
            reply = codec.decode(ResponseFLJob, self._device().post("/startFLJob", codec.encode(request)))
            assert (reply.retcode, reply.iteration) == (200, number), reply.reason

        def update(i: int) -> None:
            body, at = self.uploads[i]
            struct.pack_into("<i", body, at, number)
            reply = codec.decode(ResponseUpdateModel, self._device().post("/updateModel", body))
            assert reply.retcode == 200, reply.reason

        asked = codec.encode(RequestGetModel("bench", number, "1"))

        def fetch(i: int) -> None:
            reply = codec.decode(ResponseGetModel, self._device().post("/getModel", asked))
            assert reply.retcode == 200, reply.reason
            if i == 0:
                for item in reply.feature_map or ():
                    error = np.abs(item.data - self.expected[item.weight_fullname]).max()
                    assert error < 1e-4, f"iteration {number}: {item.weight_fullname} is off by {error}"

        began = time.perf_counter()
        starting, _ = self.burst(start)
        updating, each = self.burst(update)
        uploaded = time.perf_counter()
        fetch(0)
        served = time.perf_counter() - uploaded
        fetching, _ = self.burst(fetch)
        wall = time.perf_counter() - began
        return {
            "wall": wall,
            "start": starting,
            "update": updating,
            "served": served,
            "get": fetching,
            "each": each,
        }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start a cluster, load it, and return the figures."""
    shapes = LENET if arguments.floats is None else {f"w{i}": (arguments.floats // 10,) for i in range(10)}
    with tempfile.TemporaryDirectory() as name, Family(Path(name)) as family:
        directory = Path(name)
        with reserved_ports(4) as (redis_port, http, admin, tcp):
            settings = {
                "fl_name": "bench",
                "fl_iteration_num": 1_000_000,
                "server_mode": "FEDERATED_LEARNING",
                "enable_ssl": False,
                "distributed_cache": {"type": "redis", "address": f"127.0.0.1:{redis_port}"},
                "round": {
                    "start_fl_job_threshold": arguments.clients,
                    "start_fl_job_time_window": 300_000,
                    "update_model_ratio": 1.0,
                    "update_model_time_window": 300_000,
                    "global_iteration_time_window": 900_000,
                },
                "summary": {"metrics_file": "metrics.json", "failure_event_file": "event.txt"},
                "fedcore": {
                    "server": {
                        "http_address": f"127.0.0.1:{http}",
                        "admin_address": f"127.0.0.1:{admin}",
                        "tcp_port": tcp,
                        "checkpoint_dir": str(directory / "checkpoints"),
                        "ledger_dir": arguments.ledger_dir or str(directory / "ledgers"),
                    },
                    "ledger": {"fsync": arguments.fsync},
                },
            }
            (directory / "fl.yaml").write_text(yaml.safe_dump(settings))
            zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
            write_model(directory / "model.safetensors", zeros, set(), {})
            redis = RedisServer(family, redis_port)
            redis.start()
            options = [
                "--yaml-config",
                str(directory / "fl.yaml"),
                "--model",
                str(directory / "model.safetensors"),
            ]
            server = family.start("serverd", [*program("fl-serverd"), *options])
            family.wait_ready(server, f"http://127.0.0.1:{admin}/readyz")
        load = Load(http, shapes, arguments.clients, arguments.concurrency)
        for number in range(1, WARM_UP + 1):
            load.iterate(number)
        before = used(server)[0], used(redis.child)[0]
        runs = [load.iterate(WARM_UP + 1 + k) for k in range(arguments.iterations)]
        (cpu, peak), redis_cpu = used(server), used(redis.child)[0]
    median = {
        key: statistics.median(run[key] for run in runs)
        for key in ("wall", "start", "update", "served", "get")
    }
    each = sorted(seconds for run in runs for seconds in run["each"])
    return {
        "clients": arguments.clients,
        "floats": sum(int(np.prod(shape)) for shape in shapes.values()),
        "iterations": arguments.iterations,
        "iteration_s": round(median["wall"], 4),
        "startFLJob_per_s": round(arguments.clients / median["start"]),
        "updateModel_per_s": round(arguments.clients / median["update"], 1),
        "getModel_per_s": round(arguments.clients / median["get"]),
        "updateModel_p50_ms": round(1e3 * each[len(each) // 2], 2),
        "updateModel_p99_ms": round(1e3 * each[int(0.99 * (len(each) - 1))], 2),
        "last_update_to_model_ms": round(1e3 * median["served"], 2),
        "server_cpu_s_per_iteration": round((cpu - before[0]) / arguments.iterations, 4),
        "redis_cpu_s_per_iteration": round((redis_cpu - before[1]) / arguments.iterations, 4),
        "server_peak_rss_mib": round(peak, 1),
        "models_checked": arguments.iterations + WARM_UP,
    }


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--floats", type=int, help="values of the model, in ten weights (default: LeNet-5)")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--concurrency", type=int, default=16, help="connections at a time")
    parser.add_argument(
        "--fsync", action="store_true", help="updates reach the disk before they are answered"
    )
    parser.add_argument("--ledger-dir", help="e.g. a folder on tmpfs (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the figures")
    arguments = parser.parse_args()
    figures = measure(arguments)
    for key, value in figures.items():
        print(f"{key:28} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
