"""A real cluster for tests: private Redis, real daemons, and a client that speaks plain messages."""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from fedctl.processes import find_redis_server

DEADLINE_S = 20.0
DETOUR = Path(__file__).with_name("detour.py")
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
    """Return six ports that the kernel does not hand out; the first three have INSTANCES free ones behind them."""
    chance = random.SystemRandom()
    while True:
        base = chance.randrange(12_000, 32_000, 3 * INSTANCES + 3)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(base, base + 3 * INSTANCES + 3):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            single = base + 3 * INSTANCES
            return [base, base + INSTANCES, base + 2 * INSTANCES, single, single + 1, single + 2]


@dataclass(frozen=True)
class Host:
    """A machine of a test: what its servers share, and servers elsewhere do not see.

    Attributes:
        address: of the loopback network; other nodes reach its servers there.
        checkpoints: folder of models.
        ledgers: folder of update ledgers.
    """

    address: str
    checkpoints: Path
    ledgers: Path


class Cluster:
    """One job: its Redis, one server, one scheduler if asked for; or several servers, numbered, on hosts.

    A numbered server listens for devices and operators on the configured ports + its number, all of 127.0.0.1, and
    for other nodes at its host's address. ``at(n)`` is the cluster as a device sees it that talks to server n.
    """

    def __init__(
        self, directory: Path, *, fedcore: Mapping[str, Any] | None = None, **overrides: Any
    ) -> None:
        """Prepare a job; ``overrides`` are keys of the YAML's ``round`` section, fl_name or fl_iteration_num."""
        self.directory = directory
        self.http, self.admin, self.tcp, *others = instance_ports()
        self.redis_port, self.manage, self.scheduler_admin = others
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.own: dict[int, Mapping[str, Any]] = {}  # number of a server -> sections where its file differs
        self.tls: ssl.SSLContext | None = None  # of devices and operators, see tls_files.py
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
        self.settings = settings
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
        """Start Redis; with ``keep`` it loads and saves its data: stop it with SIGTERM to lose nothing."""
        save = ["--appendonly", "yes"] if keep else ["--save", "", "--appendonly", "no"]
        port = str(self.redis_port)
        self.spawn("redis", str(find_redis_server()), "--port", port, "--bind", "127.0.0.1", *save)
        wait_until(lambda: self.redis("PING") == b"+PONG", "Redis answers")

    def use_redis(self, port: int) -> None:
        """Let the job have a Redis that runs already."""
        self.redis_port = port
        self.settings["distributed_cache"]["address"] = f"127.0.0.1:{port}"
        self.yaml.write_text(yaml.safe_dump(self.settings))

    def redis(self, *words: str) -> bytes | None:
        """Send one inline command to Redis; return the first line of its answer, None if it is not there."""
        try:
            with socket.create_connection(("127.0.0.1", self.redis_port), timeout=5) as connection:
                connection.sendall(" ".join(words).encode() + b"\r\n")
                return connection.makefile("rb").readline().rstrip(b"\r\n")
        except OSError:
            return None

    def wipe_redis(self) -> None:
        """End Redis at once and start it empty; it saves its data from then on."""
        self.kill("redis")
        shutil.rmtree(self.directory / "appendonlydir", ignore_errors=True)
        for name in ("appendonly.aof", "dump.rdb"):
            (self.directory / name).unlink(missing_ok=True)
        self.start_redis(keep=True)

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

    # ---- several servers

    def host(self, number: int) -> Host:
        """Return a machine of its own, number 0 to 199."""
        folder = self.directory / f"host-{number}"
        return Host(f"127.0.0.{2 + number}", folder / "checkpoints", folder / "ledgers")

    def start_server_on(
        self,
        host: Host,
        n: int,
        *options: str,
        redis_port: int | None = None,
        ready: bool = True,
        env: Mapping[str, str] | None = None,
        detour: bool = False,
    ) -> str:
        """Start server ``n``, 0 to INSTANCES - 1, on a host; return the name of its process and its log.

        Args:
            host: where; servers of one host share its folders.
            n: number in the whole cluster.
            options: more of the command line, such as ``--model FILE``.
            redis_port: where this server looks for Redis, if not at its own port.
            ready: wait until it is ready.
            env: more environment.
            detour: whether its ways to other servers begin elsewhere, see detour.py.
        """
        assert 0 <= n < INSTANCES
        host.checkpoints.mkdir(parents=True, exist_ok=True)
        name = self.name(n)
        self.spawn(
            name,
            *((sys.executable, str(DETOUR), str(n)) if detour else self.command("serverd")),
            *("--yaml-config", str(self.yaml_of(n, redis_port or self.redis_port)), "--instance", str(n)),
            *("--tcp-server-ip", host.address, "--ledger-dir", str(host.ledgers)),
            *("--checkpoint-dir", str(host.checkpoints)),
            *options,
            env=env,
        )
        if ready:
            self.wait_listening(self.admin + n, name)
            wait_until(lambda: self.ready(n), f"{name} is ready")
        return name

    @staticmethod
    def name(n: int) -> str:
        """Return the name of a numbered server's process and log."""
        return f"server-{n}"

    def yaml_of(self, n: int, redis_port: int) -> Path:
        """Write the configuration of a server that sees Redis at a port of its own."""
        path = self.directory / f"fl-{n}.yaml"
        cache = self.settings["distributed_cache"] | {"address": f"127.0.0.1:{redis_port}"}
        settings = copy.deepcopy(self.settings | {"distributed_cache": cache})
        for section, values in self.own.get(n, {}).items():
            merged = settings.get(section, {}) | values if isinstance(values, dict) else values
            settings[section] = merged
        path.write_text(yaml.safe_dump(settings))
        return path

    def at(self, n: int) -> Cluster:
        """Return this cluster as seen by who talks to server ``n``: requests, readiness and metrics are its own."""
        view = copy.copy(self)
        view.http, view.admin, view.tcp = self.http + n, self.admin + n, self.tcp + n
        return view

    @staticmethod
    def command(daemon: str) -> tuple[str, ...]:
        """Return how to start a daemon with this interpreter.

        Garbage is collected from the first line of the daemon's own on: what looks through modules while they are
        imported finds nothing, and is a sixth of the time that a start takes. A test run starts hundreds of daemons.
        """
        start = (
            f"import gc; gc.disable(); from fldaemons.{daemon} import main; gc.freeze(); gc.enable(); main()"
        )
        return (sys.executable, "-c", start)

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

    def pause(self, name: str) -> None:
        """Let a process stand still; the kernel goes on taking connections for it."""
        self.processes[name].send_signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """Let a paused process go on."""
        self.processes[name].send_signal(signal.SIGCONT)

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

    def connect(self, port: int, timeout: float) -> http.client.HTTPConnection:
        """Return a connection to a listener of devices or operators."""
        if self.tls is None:
            return http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
        return http.client.HTTPSConnection("127.0.0.1", port, timeout=timeout, context=self.tls)

    def operate(self, path: str, values: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Ask the scheduler to do something; return the status and the answer."""
        connection = self.connect(self.manage, 15)
        try:
            connection.request("POST", f"/{path}", None if values is None else json.dumps(values))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def ready(self, n: int = 0) -> bool:
        """Tell whether the server, or server ``n``, says that it is ready."""
        answer = self.get_http(self.admin + n, "/readyz")
        return answer is not None and answer[0] == 200

    def not_ready_because(self) -> dict[str, str]:
        """Return the server's reasons for not being ready."""
        answer = self.get_http(self.admin, "/readyz")
        assert answer is not None
        return json.loads(answer[1])["reasons"]

    def metric(self, line: str, n: int = 0) -> float:
        """Return the value of a metric of the server, or of server ``n``, by its name and labels as written."""
        answer = self.get_http(self.admin + n, "/metrics")
        assert answer is not None
        for row in answer[1].decode().splitlines():
            if row.startswith(line + " "):
                return float(row.rpartition(" ")[2])
        return 0.0

    # ---- the device side

    def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        """POST a body; return status and answer."""
        connection = self.connect(self.http, 30)
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
