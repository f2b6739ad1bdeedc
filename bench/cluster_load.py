"""Load a cluster of its own with whole iterations and check every model: rates, latencies, CPU seconds, memory.

    python bench/cluster_load.py                                   one server, 200 clients, LeNet-5 with 66,404 values
    python bench/cluster_load.py --clients 20 --floats 5000000 --iterations 3
    python bench/cluster_load.py --servers 1,2,4 --clients 2000 --rounds 3
    python bench/cluster_load.py --servers 1,2 --roam              each client goes to another server with each request
    python bench/cluster_load.py --servers 1,2,4 --in-turn         one server works at a time
    python bench/cluster_load.py --fsync --json result.json
    python bench/cluster_load.py --tls --reconnect                 HTTPS, a new connection for each request

Redis and all fl-serverd run as processes of their own on this machine, one YAML for all servers. Trust ratios and CPU
seconds. Each phase (startFLJob, updateModel, getModel) is a burst of all clients, ``--concurrency`` requests under way
at a time, whatever the number of servers. Clusters of the sizes that ``--servers`` names take turns, ``--rounds`` times
each, so that what else the machine does meets all of them; how much that was is the last line. Processes that take
turns on a core find cold caches; ``--in-turn`` shows what several servers cost apart from that.

The mean that is to come out is computed here from the uploads, and every server's model is compared with it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import socket
import ssl
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedcore.models.formats import write_model
from fedcore.pki.authority import KeyKind, Role, issue, make_authority
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
from fedctl.processes import HOST, Child, Family, RedisServer, program, reserved_ports

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
NAME = "client-######"  # and this for the client
SHIFTS, SIZES = 5, 23  # uploads differ in what is added to the weights and in the data size
WARM_UP = 1
PATIENCE_S = 120
KEY = KeyKind.RSA_3072  # as the playbooks make them
PASSWORD = "bench"
CIPHERS = "ECDHE-RSA-AES128-GCM-SHA256"  # TLS 1.2; 1.3 chooses by itself
POLL_S = 0.001  # between two questions for a model that is not there yet
PHASES = ("start", "update", "end", "get")


# ---- the cluster


@dataclass(frozen=True, slots=True)
class Cluster:
    """The processes under load, and the devices' ports of the servers."""

    redis: Child
    servers: list[Child]
    ports: list[int]


@contextmanager
def consecutive_ports(count: int) -> Iterator[int]:
    """Reserve ports of 127.0.0.1 in a row, as ``reserved_ports`` does; give the first."""
    while True:
        with contextlib.ExitStack() as held, contextlib.suppress(OSError, OverflowError):
            first = 0
            for i in range(count):
                reservation = held.enter_context(socket.socket())
                reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                reservation.bind((HOST, first + i if i else 0))
                first = first or reservation.getsockname()[1]
            reserved = held.pop_all()
            break
    with reserved:
        yield first


def tls_settings(directory: Path) -> dict[str, Any]:
    """Make key and certificate of the servers; return the settings that name them."""
    now = datetime.now(UTC)
    authority = make_authority("bench", now)
    made = issue(authority, Role.SERVER, "bench", now, hosts=[HOST], kind=KEY)
    p12, ca = directory / "server.p12", directory / "ca.crt"
    p12.write_bytes(made.p12(PASSWORD.encode()))
    ca.write_bytes(authority.certificate_pem())
    (directory / "password").write_text(PASSWORD)
    paths = {"server_cert_path": str(p12), "client_cert_path": str(p12), "ca_cert_path": str(ca)}
    return {"enable_ssl": True, "ssl": {**paths, "cipher_list": CIPHERS}}


@contextmanager
def cluster(
    count: int, shapes: dict[str, tuple[int, ...]], arguments: argparse.Namespace
) -> Iterator[Cluster]:
    """Run Redis and so many servers with one configuration."""
    with tempfile.TemporaryDirectory() as name, Family(Path(name)) as family:
        directory = Path(name)
        with reserved_ports(1) as (redis_port,), consecutive_ports(3 * count) as first:
            http, admin, tcp = first, first + count, first + 2 * count
            settings = {
                "fl_name": "bench",
                "fl_iteration_num": 1_000_000,
                "server_mode": "FEDERATED_LEARNING",
                "enable_ssl": False,
                "distributed_cache": {"type": "redis", "address": f"{HOST}:{redis_port}"},
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
                        "http_address": f"{HOST}:{http}",
                        "admin_address": f"{HOST}:{admin}",
                        "tcp_port": tcp,
                        "checkpoint_dir": str(directory / "checkpoints"),
                        "ledger_dir": arguments.ledger_dir or str(directory / "ledgers"),
                    },
                    "ledger": {"fsync": arguments.fsync},
                    "redis": {"tls": "off"},
                },
            }
            if arguments.tls:
                settings |= tls_settings(directory)
            (directory / "fl.yaml").write_text(yaml.safe_dump(settings))
            zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
            write_model(directory / "model.safetensors", zeros, set(), {})
            redis = RedisServer(family, redis_port)
            redis.start()
            command = [*shlex.split(arguments.under), *program("fl-serverd")]
            command += ["--yaml-config", str(directory / "fl.yaml")]
            if arguments.tls:
                for which in ("server", "client"):
                    command += [f"--{which}-password-file", str(directory / "password")]
            command += ["--model", str(directory / "model.safetensors"), "--instance"]
            servers = [family.start(f"serverd-{i}", [*command, str(i)]) for i in range(count)]
            for i, server in enumerate(servers):
                family.wait_ready(server, f"http://{HOST}:{admin + i}/readyz")
        yield Cluster(redis.child, servers, [http + i for i in range(count)])
        family.check()


# ---- what it costs


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process, all threads, to the nanosecond.

    Source: clock_getcpuclockid(3); this is the number that the C library makes of a pid.
    """
    return time.clock_gettime((~pid << 3) | 2)


def peak_mib(pid: int) -> float:
    """Return the most memory that a process has had, MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def machine_seconds() -> float:
    """Return the CPU seconds that all processes and the hypervisor have taken from this machine."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # less idle and waiting


class Meter:
    """Reads clocks."""

    def __init__(self, cluster: Cluster) -> None:
        self._pids = [server.pid for server in cluster.servers]
        self._redis = cluster.redis.pid

    def servers(self) -> list[float]:
        """Return the CPU seconds of each server."""
        return [cpu_seconds(pid) for pid in self._pids]

    def all(self) -> dict[str, Any]:
        """Return CPU seconds of servers, Redis, generator and machine, and the time."""
        return {
            "servers": self.servers(),
            "redis": cpu_seconds(self._redis),
            "generator": time.process_time(),
            "machine": machine_seconds(),
            "wall": time.perf_counter(),
        }


def spent(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return what was used between two readings of ``Meter.all``."""
    used = {key: after[key] - before[key] for key in before if key != "servers"}
    used["split"] = [late - early for early, late in zip(before["servers"], after["servers"], strict=True)]
    used["servers"] = sum(used["split"])
    used["others"] = max(0.0, used["machine"] - used["servers"] - used["redis"] - used["generator"])
    return used


# ---- the clients


class Device:
    """One connection; without TLS, or with TLS whose certificate is not looked at."""

    def __init__(self, port: int, tls: bool = False) -> None:
        self._socket = socket.create_connection((HOST, port))
        patience = struct.pack("ll", PATIENCE_S, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self._socket = context.wrap_socket(self._socket)

    def post(self, path: str, *body: bytes | memoryview) -> bytes | bytearray:
        """Send a request whose body is in pieces; return the answer's body."""
        length = sum(map(len, body))
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {length}\r\n\r\n".encode()
        if isinstance(self._socket, ssl.SSLSocket):
            self._socket.sendall(b"".join((head, *body)))
        else:
            sent = self._socket.sendmsg([head, *body])
            assert sent == len(head) + length, "the server has stopped reading"
        return self._answer()

    def _answer(self) -> bytes | bytearray:
        received = self._socket.recv(1 << 16)
        while b"\r\n\r\n" not in received:
            more = self._socket.recv(1 << 16)
            assert more, (received, "the server has hung up")
            received += more
        head, _, begun = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), received[:400]
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(begun) == length:
            return begun
        body = bytearray(length)
        body[: len(begun)] = begun
        rest = memoryview(body)[len(begun) :]
        wait = 0 if isinstance(self._socket, ssl.SSLSocket) else socket.MSG_WAITALL
        while len(rest):
            read = self._socket.recv_into(rest, len(rest), wait)
            assert read, "the server has hung up"
            rest = rest[read:]
        return body

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


class Upload:
    """A prebuilt updateModel in which the client and the iteration are still open."""

    def __init__(self, weights: dict[str, np.ndarray[Any, Any]]) -> None:
        maps = tuple(FeatureMap(name, values) for name, values in weights.items())
        body = codec.encode(RequestUpdateModel("bench", NAME, MARK, maps, "1", upload_loss=0.5))
        self._whole = memoryview(body)
        self._name, self._mark = body.index(NAME.encode()), body.index(struct.pack("<i", MARK))

    def pieces(self, client: str, number: int) -> list[bytes | memoryview]:
        """Return the body of a client's request, not copied."""
        fillings = {self._name: client.encode(), self._mark: struct.pack("<i", number)}
        pieces: list[bytes | memoryview] = []
        begin = 0
        for at, filling in sorted(fillings.items()):
            pieces += [self._whole[begin:at], filling]
            begin = at + len(filling)
        return [*pieces, self._whole[begin:]]


class Load:
    """Clients, their prebuilt uploads, and the mean that they must give."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], clients: int) -> None:
        rng = np.random.default_rng(1)
        base = {name: rng.standard_normal(shape, np.float32).reshape(-1) for name, shape in shapes.items()}
        self.names = [f"client-{i:06}" for i in range(clients)]
        self.kinds = [(i % SHIFTS, 1 + (7 * i) % SIZES) for i in range(clients)]
        self.uploads: dict[tuple[int, int], Upload] = {}
        sums = dict.fromkeys(shapes, 0.0)
        for kind in sorted(set(self.kinds)):
            shift, size = kind
            weights = {name: (values + np.float32(shift)) * np.float32(size) for name, values in base.items()}
            for name, values in weights.items():
                sums[name] = sums[name] + self.kinds.count(kind) * values.astype(np.float64)
            self.uploads[kind] = Upload(weights)
        total = sum(size for _, size in self.kinds)
        self.expected = {name: values / total for name, values in sums.items()}

    def check(self, number: int, server: int, reply: ResponseGetModel) -> None:
        """Compare a model with the mean."""
        got = {item.weight_fullname: item.data for item in reply.feature_map or ()}
        assert got.keys() == self.expected.keys(), (number, server, sorted(map(str, got)))
        for name, values in self.expected.items():
            error = np.abs(got[name] - values).max()
            assert error < 1e-4, f"iteration {number}, server {server}: {name} is off by {error}"


class Crowd:
    """The clients of a load at the servers of a cluster."""

    def __init__(self, load: Load, cluster: Cluster, arguments: argparse.Namespace) -> None:
        self._load = load
        self._ports = cluster.ports
        self._meter = Meter(cluster)
        self._roam, self._in_turn = arguments.roam, arguments.in_turn
        self._tls, self._reconnect = arguments.tls, arguments.reconnect
        self._pool = ThreadPoolExecutor(max(arguments.concurrency, len(cluster.ports)))
        self._local = threading.local()
        self._devices: list[Device] = []

    def close(self) -> None:
        """Hang up."""
        self._pool.shutdown()
        for device in self._devices:
            device.close()

    def _device(self, client: int, request: int) -> Device:
        """Return this thread's connection to the server that a client asks with one of its requests."""
        servers = len(self._ports)
        if self._in_turn:
            return self._device_at(client * servers // len(self._load.names))
        return self._device_at((client + (request if self._roam else 0)) % servers)

    def _device_at(self, server: int) -> Device:
        mine: dict[int, Device] = self._local.__dict__.setdefault("devices", {})
        if self._reconnect and server in mine:
            mine.pop(server).close()
        if server not in mine:
            mine[server] = Device(self._ports[server], self._tls)
            if not self._reconnect:
                self._devices.append(mine[server])
        return mine[server]

    def _burst(self, one: Callable[[int], None]) -> tuple[float, list[float]]:
        """Let all clients do one thing; return the seconds of all and of each."""

        def timed(i: int) -> float:
            began = time.perf_counter()
            one(i)
            return time.perf_counter() - began

        began = time.perf_counter()
        each = list(self._pool.map(timed, range(len(self._load.names))))
        return time.perf_counter() - began, each

    def _served(self, server: int, asked: bytes) -> tuple[float, ResponseGetModel]:
        """Wait until a server serves a model; return when, and the model."""
        limit = time.perf_counter() + PATIENCE_S
        while time.perf_counter() < limit:
            reply = codec.decode(ResponseGetModel, self._device_at(server).post("/getModel", asked))
            if reply.retcode == 200:
                return time.perf_counter(), reply
            time.sleep(POLL_S)
        raise AssertionError(f"server {server} does not serve the new model: {reply.reason}")

    def iterate(self, number: int) -> dict[str, Any]:
        """Run one iteration; return its figures."""
        load = self._load

        def start(i: int) -> None:
            request = RequestFLJob("bench", load.names[i], data_size=load.kinds[i][1], timestamp="1")
            reply = codec.decode(ResponseFLJob, self._device(i, 0).post("/startFLJob", codec.encode(request)))
            assert (reply.retcode, reply.iteration) == (200, number), (reply.iteration, reply.reason)

        def update(i: int) -> None:
            body = load.uploads[load.kinds[i]].pieces(load.names[i], number)
            reply = codec.decode(ResponseUpdateModel, self._device(i, 1).post("/updateModel", *body))
            assert reply.retcode == 200, reply.reason

        asked = codec.encode(RequestGetModel("bench", number, "1"))

        def fetch(i: int) -> None:
            reply = codec.decode(ResponseGetModel, self._device(i, 2).post("/getModel", asked))
            assert reply.retcode == 200, reply.reason

        before = self._meter.all()
        marks = [sum(before["servers"])]
        starting, _ = self._burst(start)
        marks.append(sum(self._meter.servers()))
        updating, each = self._burst(update)
        uploaded = time.perf_counter()
        marks.append(sum(self._meter.servers()))
        models = list(self._pool.map(lambda server: self._served(server, asked), range(len(self._ports))))
        marks.append(sum(self._meter.servers()))
        fetching, _ = self._burst(fetch)
        after = self._meter.all()
        marks.append(sum(after["servers"]))
        for server, (_, reply) in enumerate(models):
            load.check(number, server, reply)
        return {
            **spent(before, after),
            "start": starting,
            "update": updating,
            "served": max(moment for moment, _ in models) - uploaded,
            "get": fetching,
            "each": each,
            "phases": [late - early for early, late in itertools.pairwise(marks)],
        }


# ---- measuring


def run(count: int, load: Load, shapes: dict[str, tuple[int, ...]], arguments: argparse.Namespace) -> Any:
    """Load a cluster of ``count`` servers; return the figures of its iterations, and what it uses at rest."""
    with cluster(count, shapes, arguments) as running:
        crowd = Crowd(load, running, arguments)
        try:
            for number in range(1, WARM_UP + 1):
                crowd.iterate(number)
            runs = [crowd.iterate(WARM_UP + 1 + k) for k in range(arguments.iterations)]
            meter = Meter(running)
            before = meter.all()
            time.sleep(max(arguments.rest, 0.1))
            rest = spent(before, meter.all())
            peaks = [peak_mib(server.pid) for server in running.servers]
        finally:
            crowd.close()
    return {"runs": runs, "rest": rest["servers"] / rest["wall"], "peaks": peaks}


def figures(count: int, rounds: list[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of all clusters of one size: medians over their iterations."""
    runs = [one for each in rounds for one in each["runs"]]
    clients = arguments.clients

    def median(key: str) -> float:
        return float(statistics.median(one[key] for one in runs))

    each = sorted(seconds for one in runs for seconds in one["each"])
    cpu = [one["servers"] for one in runs]
    phases = [statistics.median(one["phases"][k] for one in runs) for k in range(len(PHASES))]
    shares = [statistics.median(one["split"][i] for one in runs) for i in range(count)]
    return {
        "servers": count,
        "iterations": len(runs),
        "iteration_s": round(median("wall"), 4),
        "startFLJob_per_s": round(clients / median("start")),
        "updateModel_per_s": round(clients / median("update"), 1),
        "getModel_per_s": round(clients / median("get")),
        "updateModel_p50_ms": round(1e3 * each[len(each) // 2], 2),
        "updateModel_p99_ms": round(1e3 * each[int(0.99 * (len(each) - 1))], 2),
        "last_update_to_model_ms": round(1e3 * median("served"), 2),
        "last_update_to_model_max_ms": round(1e3 * max(one["served"] for one in runs), 2),
        "server_cpu_s_per_iteration": round(median("servers"), 4),
        "server_cpu_spread": f"{min(cpu):.3f}..{max(cpu):.3f}",
        "server_cpu_split_s": " ".join(f"{share:.3f}" for share in shares),
        "server_cpu_ms_per_update": round(1e3 * median("servers") / clients, 4),
        **{
            f"server_cpu_{name}_us": round(1e6 * seconds / clients, 1)
            for name, seconds in zip(PHASES, phases, strict=True)
        },
        "redis_cpu_s_per_iteration": round(median("redis"), 4),
        "generator_cpu_s_per_iteration": round(median("generator"), 4),
        "all_cpu_s_per_iteration": round(
            statistics.median(one["servers"] + one["redis"] + one["generator"] for one in runs), 4
        ),
        "servers_at_rest_cpu_ms_per_s": round(1e3 * statistics.median(one["rest"] for one in rounds), 2),
        "server_peak_rss_mib": round(max(peak for one in rounds for peak in one["peaks"]), 1),
        "models_checked": count * (len(runs) + WARM_UP * len(rounds)),
        "others_cpu_per_s": round(sum(one["others"] for one in runs) / sum(one["wall"] for one in runs), 3),
    }


def compare(
    table: dict[int, dict[str, Any]], rounds: dict[int, list[Any]], first: int
) -> dict[int, dict[str, Any]]:
    """Return how each size compares with the first: ratios of the medians, and the range over the rounds."""

    def ratio(count: int, key: str) -> str:
        def middle(runs: list[dict[str, Any]]) -> float:
            return float(statistics.median(one[key] for one in runs))

        def total(size: int) -> list[dict[str, Any]]:
            return [one for each in rounds[size] for one in each["runs"]]

        whole = middle(total(count)) / middle(total(first))
        singles = [
            middle(mine["runs"]) / middle(theirs["runs"])
            for mine, theirs in zip(rounds[count], rounds[first], strict=True)
        ]
        return f"{whole:.3f} ({min(singles):.3f}..{max(singles):.3f})"

    return {
        count: {
            "servers_cpu_ratio": ratio(count, "servers"),
            "redis_cpu_ratio": ratio(count, "redis"),
            "wall_ratio": ratio(count, "wall"),
        }
        for count in table
    }


def measure(arguments: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Measure clusters of all sizes; return size -> figures."""
    shapes: dict[str, tuple[int, ...]] = dict(LENET)
    if arguments.floats is not None:
        shapes = {f"w{i}": (arguments.floats // 10,) for i in range(10)}
    load = Load(shapes, arguments.clients)
    rounds: dict[int, list[Any]] = {count: [] for count in arguments.servers}
    for _ in range(arguments.rounds):
        for count in arguments.servers:
            rounds[count].append(run(count, load, shapes, arguments))
    table = {count: figures(count, rounds[count], arguments) for count in arguments.servers}
    if len(table) > 1:
        for count, ratios in compare(table, rounds, arguments.servers[0]).items():
            table[count].update(ratios)
            table[count]["others_cpu_per_s"] = table[count].pop("others_cpu_per_s")  # stays the last line
    return table


def sizes(text: str) -> list[int]:
    """Read the numbers of servers."""
    counts = [int(word) for word in text.split(",")]
    if min(counts) < 1 or len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError("give different numbers of at least 1")
    return counts


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--servers",
        type=sizes,
        default=[1],
        help="numbers of servers, e.g. 1,2,4; ratios are to the first (default: 1)",
    )
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--roam", action="store_true", help="clients change servers with each request")
    ways.add_argument(
        "--in-turn",
        action="store_true",
        help="in each burst come first all clients of one server, then the next's",
    )
    parser.add_argument("--rounds", type=int, default=1, help="clusters of each size, in turn")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--floats", type=int, help="values of the model, in ten weights (default: LeNet-5)")
    parser.add_argument("--iterations", type=int, default=10, help="of each cluster, beside the first")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time, over all servers")
    parser.add_argument("--rest", type=float, default=1.0, help="seconds to watch the servers at rest")
    parser.add_argument(
        "--fsync", action="store_true", help="updates reach the disk before they are answered"
    )
    parser.add_argument("--tls", action="store_true", help=f"HTTPS with a key of kind {KEY}")
    parser.add_argument("--reconnect", action="store_true", help="a new connection for each request")
    parser.add_argument("--ledger-dir", help="e.g. a folder on tmpfs (default: a temporary one)")
    parser.add_argument("--under", default="", help="command that runs fl-serverd, e.g. 'chrt --batch 0'")
    parser.add_argument("--json", type=Path, help="write the figures")
    arguments = parser.parse_args()
    shapes = LENET.values() if arguments.floats is None else [(arguments.floats // 10 * 10,)]
    print(f"{arguments.clients} clients, {sum(int(np.prod(shape)) for shape in shapes)} values")
    table = measure(arguments)
    for key in next(iter(table.values())):
        print(f"{key:30}", *(f"{column[key]!s:>24}" for column in table.values()))
    if arguments.json:
        arguments.json.write_text(json.dumps(list(table.values()), indent=1) + "\n")


if __name__ == "__main__":
    main()
