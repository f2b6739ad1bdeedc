"""Load a server with iterations whose uploads are masked, and see how long its reactor is busy at a stretch.

    python bench/cipher_load.py                            100 devices, 66,404 values, 30 % leave before they upload
    python bench/cipher_load.py --floats 1000000 --json result.json

Redis and fl-serverd (under reactor_turns.py) run as processes of their own. Devices send what real ones send, with
keys and shares that belong together, but no masks, which a server cannot tell from masks: so each round is a burst of
all devices, and the server's work is what it always is. What it takes off is then noise, and the models are too.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from cluster_load import Cluster, Device, Meter, consecutive_ports, spent

from fedcore.models.formats import write_model
from fedcore.wire import codec
from fedcore.wire import messages as wire
from fedctl.bench.secagg import Group
from fedctl.processes import HOST, Child, Family, RedisServer, reserved_ports

HERE = Path(__file__).parent
SEALED = bytes(96)  # nobody opens it here
WINDOW_MS = 300_000
SLOW_US = 1000
SHOWN, WIDTH = 8, 400
PATIENCE_S = 120.0
T = TypeVar("T")


@contextmanager
def server_with_redis(
    arguments: argparse.Namespace, group: Group, turns: Path
) -> Iterator[tuple[Cluster, int]]:
    """Run both; give them and the port of Redis."""
    uploads = len(group.uploaders(arguments.dropout))
    masks = {
        "share_secrets_ratio": 1.0,
        "cipher_time_window": WINDOW_MS,
        "reconstruct_secrets_threshold": group.t,
    }
    with tempfile.TemporaryDirectory() as name, Family(Path(name)) as family:
        directory = Path(name)
        with reserved_ports(1) as (redis_port,), consecutive_ports(3) as first:
            settings = {
                "fl_name": "bench",
                "fl_iteration_num": 1_000_000,
                "server_mode": "FEDERATED_LEARNING",
                "enable_ssl": False,
                "distributed_cache": {"type": "redis", "address": f"{HOST}:{redis_port}"},
                "round": {
                    "start_fl_job_threshold": len(group.ids),
                    "start_fl_job_time_window": WINDOW_MS,
                    "update_model_ratio": uploads / len(group.ids),
                    "update_model_time_window": WINDOW_MS,
                    "global_iteration_time_window": 3 * WINDOW_MS,
                },
                "encrypt": {"encrypt_type": "PW_ENCRYPT", "pw_encrypt": masks},
                "summary": {"metrics_file": "metrics.json", "failure_event_file": "event.txt"},
                "fedcore": {
                    "server": {
                        "http_address": f"{HOST}:{first}",
                        "admin_address": f"{HOST}:{first + 1}",
                        "tcp_port": first + 2,
                        "checkpoint_dir": str(directory / "checkpoints"),
                        "ledger_dir": str(directory / "ledgers"),
                    },
                    "redis": {"tls": "off"},
                },
            }
            (directory / "fl.yaml").write_text(yaml.safe_dump(settings))
            write_model(
                directory / "model.safetensors", {"w": np.zeros(arguments.floats, np.float32)}, set(), {}
            )
            redis = RedisServer(family, redis_port)
            redis.start()
            command = [sys.executable, str(HERE / "reactor_turns.py"), str(turns), "fl-serverd"]
            command += [
                "--yaml-config",
                str(directory / "fl.yaml"),
                "--model",
                str(directory / "model.safetensors"),
            ]
            server = family.start("serverd", command)
            family.wait_ready(server, f"http://{HOST}:{first + 1}/readyz")
        yield Cluster(redis.child, [server], [first]), redis_port
        family.check()
        _end(server)


def _end(server: Child) -> None:
    server.process.terminate()
    server.wait(30)


class Devices:
    """All devices, each round of all of them at once."""

    def __init__(self, group: Group, dropout: int, floats: int, port: int, concurrency: int) -> None:
        self._group, self._port = group, port
        self._uploaders = group.uploaders(dropout)
        self._reports = group.reports(self._uploaders)
        self._weights = (wire.FeatureMap("w", np.ones(floats, np.float32)),)
        self._pool = ThreadPoolExecutor(concurrency)
        self._local = threading.local()

    def _ask(self, path: str, reply: type[T], *body: bytes | memoryview) -> T:
        if not hasattr(self._local, "device"):
            self._local.device = Device(self._port)
        return codec.decode(reply, self._local.device.post(f"/{path}", *body))

    def _burst(self, name: str, reply: type[T], who: Sequence[str], body: Callable[[str], Any]) -> None:
        """Let devices ask until each has its 200."""

        def one(fl_id: str) -> None:
            sent, limit = body(fl_id), time.monotonic() + PATIENCE_S
            pieces = sent if isinstance(sent, list) else [codec.encode(sent)]
            while (answer := self._ask(name, reply, *pieces)).retcode != 200:  # type: ignore[attr-defined]
                assert time.monotonic() < limit, (name, answer.retcode, answer.reason)  # type: ignore[attr-defined]
                time.sleep(0.05)

        list(self._pool.map(one, who))

    def iterate(self, number: int) -> dict[str, float]:
        """Run an iteration; return when each round began, monotonic."""
        ids, stamp, began = self._group.ids, "1", {}
        fitting: dict[str, tuple[type[Any], Sequence[str], Callable[[str], Any]]] = {
            "startFLJob": (
                wire.ResponseFLJob,
                ids,
                lambda i: wire.RequestFLJob("bench", i, data_size=1, timestamp="1"),
            ),
            "exchangeKeys": (wire.ResponseExchangeKeys, ids, lambda i: self._keys(i, number)),
            "getKeys": (wire.ReturnExchangeKeys, ids, lambda i: wire.GetExchangeKeys(i, number, stamp)),
            "shareSecrets": (wire.ResponseShareSecrets, ids, lambda i: self._shares(i, number)),
            "getSecrets": (wire.ReturnShareSecrets, ids, lambda i: wire.GetShareSecrets(i, number, stamp)),
            "updateModel": (wire.ResponseUpdateModel, self._uploaders, self._update(number)),
            "getClientList": (
                wire.ReturnClientList,
                self._uploaders,
                lambda i: wire.GetClientList(i, number, stamp),
            ),
            "reconstructSecrets": (
                wire.ReconstructSecret,
                list(self._reports),
                lambda i: self._report(i, number),
            ),
            "getModel": (
                wire.ResponseGetModel,
                self._uploaders,
                lambda i: wire.RequestGetModel("bench", number, stamp),
            ),
        }
        for name, (reply, who, body) in fitting.items():
            began[name] = time.monotonic()
            self._burst(name, reply, who, body)
        began["end"] = time.monotonic()
        return began

    def _keys(self, fl_id: str, number: int) -> wire.RequestExchangeKeys:
        member = self._group.members[fl_id]
        return wire.RequestExchangeKeys(
            fl_id=fl_id,
            c_pk=self._group.c_pairs[fl_id].public,
            s_pk=member.s_pk,
            iteration=number,
            timestamp="1",
            ind_iv=member.ind_iv,
            pw_iv=member.pw_iv,
            pw_salt=member.pw_salt,
        )

    def _shares(self, fl_id: str, number: int) -> wire.RequestShareSecrets:
        sealed = tuple(wire.ClientShare(other, SEALED) for other in self._group.ids if other != fl_id)
        return wire.RequestShareSecrets(fl_id, sealed, number, "1")

    def _update(self, number: int) -> Callable[[str], list[bytes | memoryview]]:
        any_id = self._group.ids[0].encode()
        request = wire.RequestUpdateModel(
            "bench", any_id.decode(), number, self._weights, "1", upload_loss=0.5
        )
        whole = memoryview(codec.encode(request))
        at = bytes(whole).index(any_id)
        return lambda fl_id: [whole[:at], fl_id.encode(), whole[at + len(any_id) :]]

    def _report(self, fl_id: str, number: int) -> wire.SendReconstructSecret:
        told = tuple(
            wire.ClientShare(owner, share, index) for owner, (share, index) in self._reports[fl_id].items()
        )
        return wire.SendReconstructSecret(fl_id, told, number, "1")


def redis_answer(port: int, *words: bytes) -> bytes:
    """Return what Redis says to one command, up to 1 MiB."""
    with socket.create_connection((HOST, port)) as link:
        link.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
        time.sleep(0.1)
        return link.recv(1 << 20)


def slow_commands(port: int) -> list[str]:
    """Return the slowest commands of Redis: name and milliseconds, those of a core's other work included."""
    answer = redis_answer(port, b"SLOWLOG", b"GET", b"128")
    found = re.findall(
        rb"\r\n:\d+\r\n:\d{9,}\r\n:(\d+)\r\n\*\d+\r\n\$\d+\r\n(\w+)\r\n\$\d+\r\n([\w:.-]{0,60})", answer
    )
    longest = sorted(((int(us), name.decode()) for us, name, _ in found), reverse=True)
    return [f"{name} {us / 1000:.1f}" for us, name in longest[:SHOWN]]


def main() -> None:
    """Run it and print what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--floats", type=int, default=66_404)
    parser.add_argument("--dropout", type=int, default=30, help="per cent")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    group = Group.of(arguments.clients)
    with tempfile.TemporaryDirectory() as folder:
        turns = Path(folder) / "turns.json"
        with server_with_redis(arguments, group, turns) as (cluster, redis_port):
            redis_answer(redis_port, b"CONFIG", b"SET", b"slowlog-log-slower-than", b"%d" % SLOW_US)
            devices = Devices(
                group, arguments.dropout, arguments.floats, cluster.ports[0], arguments.concurrency
            )
            meter = Meter(cluster)
            before, began = meter.all(), []
            for number in range(1, arguments.iterations + 1):
                began.append(devices.iterate(number))
            used = spent(before, meter.all())
            slow = slow_commands(redis_port)
        figures = json.loads(turns.read_text())
    rounds = sorted((at, name) for one in began for name, at in one.items())
    for found in (*figures["turns"], *figures["pieces"], *figures["collections"]):
        found["round"] = next((name for at, name in reversed(rounds) if at <= found["at"]), "before")
    print(
        f"server {used['servers']:.2f} s of CPU, Redis {used['redis']:.2f}, others {used['others']:.2f}; "
        f"{used['wall']:.1f} s in all"
    )
    for one in began:
        names = list(one)
        print("  ".join(f"{a} {one[b] - one[a]:.2f}" for a, b in pairwise(names)))
    for kind in ("turns", "pieces", "collections"):
        print(f"the longest {kind} in the reactor's thread:")
        for found in figures[kind][:SHOWN]:
            print(
                f"{found['ms']:6.1f} ms ({found['cpu_ms']:.1f} of CPU, {found['wall_ms']:.1f} in all), "
                f"{found['events']} sockets were ready, in {found['round']}"
            )
            for where in found["where"][:2]:
                print("         ", where[:WIDTH])
    print(f"Redis held up for more than {SLOW_US / 1000:.0f} ms: {', '.join(slow) or 'never'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "used": used}, indent=1))


if __name__ == "__main__":
    main()
