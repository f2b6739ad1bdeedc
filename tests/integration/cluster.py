"""A real cluster for tests: private Redis, real daemons, and a client that speaks plain messages."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
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
from fedctl.processes import find_redis_server, free_ports

DEADLINE_S = 20.0
INSTANCES = 8  # servers that a test may start beside each other
WEIGHTS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b.bias": np.float32([0.5, -0.5])}


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> Any:
    """Return the condition's first true value; fail with ``what`` after the deadline."""
    limit = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < limit, f"{what}: not within {seconds} s"
        time.sleep(0.01)  # a look at a process of its own; there is no event to wait for


def instance_ports() -> list[int]:
    """Return three ports, each with INSTANCES free ones behind it, outside the range that the kernel hands out."""
    chance = random.SystemRandom()
    while True:
        base = chance.randrange(12_000, 32_000, 3 * INSTANCES)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(base, base + 3 * INSTANCES):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return [base, base + INSTANCES, base + 2 * INSTANCES]


class Cluster:
    """One job: its Redis, one server, one scheduler if asked for."""

    def __init__(
        self, directory: Path, *, fedcore: Mapping[str, Any] | None = None, **overrides: Any
    ) -> None:
        """Prepare a job; ``overrides`` are keys of the YAML's ``round`` section, fl_name or fl_iteration_num."""
        self.directory = directory
        self.redis_port, self.manage, self.scheduler_admin = free_ports(3)
        self.http, self.admin, self.tcp = instance_ports()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        windows = {
            "start_fl_job_threshold": 2,
            "start_fl_job_time_window": 30000,
            "update_model_ratio": 1.0,
            "update_model_time_window": 30000,
            "global_iteration_time_window": 60000,
        }
        settings: dict[str, Any] = {
            "fl_name": overrides.pop("fl_name", "job"),
            "fl_iteration_num": overrides.pop("fl_iteration_num", 100),
            "server_mode": "FEDERATED_LEARNING",
            "enable_ssl": False,
            "distributed_cache": {"type": "redis", "address": f"127.0.0.1:{self.redis_port}"},
            "round": windows | overrides,
            "summary": {"metrics_file": "metrics.json", "failure_event_file": "event.txt"},
            "fedcore": {
                "scheduler": {
                    "manage_address": f"127.0.0.1:{self.manage}",
                    "admin_address": f"127.0.0.1:{self.scheduler_admin}",
                },
                "server": {
                    "http_address": f"127.0.0.1:{self.http}",
                    "admin_address": f"127.0.0.1:{self.admin}",
                    "tcp_port": self.tcp,
                    "checkpoint_dir": str(directory / "checkpoints"),
                    "model": str(directory / "model.safetensors"),
                },
                "device": {"hold_time": 2.0},
            },
        }
        for section, values in (fedcore or {}).items():
            settings["fedcore"].setdefault(section, {}).update(values)
        self.yaml = directory / "fl.yaml"
        self.yaml.write_text(yaml.safe_dump(settings))
        write_model(directory / "model.safetensors", WEIGHTS, set(), {})

    # ---- processes

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def spawn(
        self, name: str, *command: str, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process; its output goes to {name}.log."""
        log = (self.directory / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=self.directory,
            env={**os.environ, **(env or {})},
        )
        log.close()
        return self.processes[name]

    def log(self, name: str = "server") -> str:
        """Return what a process has written so far."""
        return (self.directory / f"{name}.log").read_text()

    def start_redis(self, *, keep: bool = False) -> None:
        """Start Redis; with ``keep`` it loads and saves its data."""
        save = ["--appendonly", "yes"] if keep else ["--save", "", "--appendonly", "no"]
        port = str(self.redis_port)
        self.spawn("redis", str(find_redis_server()), "--port", port, "--bind", "127.0.0.1", *save)
        wait_until(lambda: self.redis("PING") == b"+PONG", "Redis answers")

    def redis(self, *words: str) -> bytes | None:
        """Send one inline command to Redis; return the first line of its answer, None if it is not there."""
        try:
            with socket.create_connection(("127.0.0.1", self.redis_port), timeout=5) as connection:
                connection.sendall(" ".join(words).encode() + b"\r\n")
                return connection.makefile("rb").readline().rstrip(b"\r\n")
        except OSError:
            return None

    def start_server(self, *options: str, ready: bool = True, env: Mapping[str, str] | None = None) -> None:
        """Start fl-serverd; wait until it is ready, or only until it listens."""
        self.spawn("server", *self.command("serverd"), "--yaml-config", str(self.yaml), *options, env=env)
        self.wait_listening(self.admin, "server")
        if ready:
            wait_until(self.ready, "the server is ready")

    def start_scheduler(self, *options: str, ready: bool = True) -> None:
        """Start fl-schedulerd; wait until it is ready, or only until it listens."""
        self.spawn("scheduler", *self.command("schedulerd"), "--yaml-config", str(self.yaml), *options)
        self.wait_listening(self.scheduler_admin, "scheduler")
        if ready:
            wait_until(
                lambda: self.get_http(self.scheduler_admin, "/readyz")[0] == 200, "the scheduler is ready"
            )

    @staticmethod
    def command(daemon: str) -> tuple[str, ...]:
        """Return how to start a daemon with this interpreter."""
        return (sys.executable, "-c", f"from fldaemons.{daemon} import main; main()")

    def wait_listening(self, port: int, name: str) -> None:
        """Wait until a daemon's admin listener is up."""

        def alive() -> bool:
            assert self.processes[name].poll() is None, self.log(name)
            return self.get_http(port, "/livez") is not None

        wait_until(alive, f"{name} listens")

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal and wait for the end; return the exit code."""
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(DEADLINE_S)

    # ---- looking

    @staticmethod
    def get_http(port: int, path: str) -> tuple[int, bytes] | None:
        """GET from loopback; None while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except (OSError, http.client.HTTPException):
            return None

    def ready(self) -> bool:
        """Tell whether the server says that it is ready."""
        answer = self.get_http(self.admin, "/readyz")
        return answer is not None and answer[0] == 200

    def not_ready_because(self) -> dict[str, str]:
        """Return the server's reasons for not being ready."""
        answer = self.get_http(self.admin, "/readyz")
        assert answer is not None
        return json.loads(answer[1])["reasons"]

    def metric(self, line: str) -> float:
        """Return the value of a metric, by its name and labels as written."""
        answer = self.get_http(self.admin, "/metrics")
        assert answer is not None
        for row in answer[1].decode().splitlines():
            if row.startswith(line + " "):
                return float(row.rpartition(" ")[2])
        return 0.0

    # ---- the device side

    def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        """POST a body; return status and answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=30)
        try:
            connection.request("POST", path, body, dict(headers or {}))
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def start(self, fl_id: str, data_size: int = 10, **fields: Any) -> ResponseFLJob:
        """Send startFLJob."""
        request = RequestFLJob(fl_name="job", fl_id=fl_id, data_size=data_size, timestamp="1", **fields)
        return codec.decode(ResponseFLJob, self.post("/startFLJob", codec.encode(request))[1])

    def update(
        self, fl_id: str, iteration: int, weights: Mapping[str, Any], data_size: int = 10, **fields: Any
    ) -> ResponseUpdateModel:
        """Send updateModel with plain weights; they are multiplied by the data size here."""
        request = RequestUpdateModel(
            fl_name="job",
            fl_id=fl_id,
            iteration=iteration,
            feature_map=tuple(
                FeatureMap(name, (np.asarray(values, np.float32) * np.float32(data_size)).reshape(-1))
                for name, values in weights.items()
            ),
            timestamp="1",
            **fields,
        )
        return codec.decode(ResponseUpdateModel, self.post("/updateModel", codec.encode(request))[1])

    def model(self, iteration: int) -> ResponseGetModel:
        """Send getModel."""
        request = RequestGetModel(fl_name="job", iteration=iteration, timestamp="1")
        return codec.decode(ResponseGetModel, self.post("/getModel", codec.encode(request))[1])

    def weights(self, iteration: int) -> dict[str, np.ndarray]:
        """Return a published model, name -> flat values."""
        reply = wait_until(lambda: (r := self.model(iteration)).retcode == 200 and r, f"model {iteration}")
        return {item.weight_fullname: item.data for item in reply.feature_map}

    def run_iteration(self, iteration: int, values: Mapping[str, float], data_size: int = 10) -> None:
        """Let clients start and upload the model filled with a value each."""
        for fl_id in values:
            reply = self.start(fl_id, data_size)
            assert (reply.retcode, reply.iteration) == (200, iteration), reply.reason
        for fl_id, value in values.items():
            reply = self.update(fl_id, iteration, filled(value), data_size)
            assert (reply.retcode, reply.reason) == (200, "success not ready")


def filled(value: float) -> dict[str, np.ndarray]:
    """Return the test model with every value the same."""
    return {name: np.full(array.shape, value, np.float32) for name, array in WEIGHTS.items()}
