"""What systemd hears of the daemons: a real notify socket, real processes.

The texts are those of sd_notify(3); the socket is what systemd would listen at.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from integration.cluster import Cluster, filled, wait_until
from integration.test_daemons import make_p12

from fedcore.models.formats import write_model
from fedctl.processes import free_ports

WATCHDOG_S = 0.8
SILENCE_S = 4 * WATCHDOG_S  # without a beat in it, there is no beat


class Systemd:
    """Listens at a notify socket.

    Attributes:
        messages: all that was heard, each a list of lines.
    """

    def __init__(self, path: Path) -> None:
        self.messages: list[list[str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._address = str(path)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while message := self._socket.recv(8192):
            self.messages.append(message.decode().split("\n"))

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", self._address)
        self._thread.join()
        self._socket.close()

    def environment(self, watchdog: float | None = None, pid: int | None = None) -> dict[str, str]:
        """What systemd puts into the environment of a unit."""
        variables = {"NOTIFY_SOCKET": self._address}
        if watchdog is not None:
            variables["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
        if pid is not None:
            variables["WATCHDOG_PID"] = str(pid)
        return variables

    def heard(self, start: str, since: int = 0) -> list[str]:
        """All lines that begin so, from the message number ``since`` on."""
        return [line for message in self.messages[since:] for line in message if line.startswith(start)]

    def wait(self, start: str, since: int = 0) -> str:
        """The first such line, waited for."""
        return wait_until(lambda: self.heard(start, since), start)[0]

    @property
    def status(self) -> str:
        """The last status."""
        return (self.heard("STATUS=") or [""])[-1].removeprefix("STATUS=")

    def wait_status(self, condition: Callable[[str], bool] | str) -> str:
        """Wait for a status; return it."""
        holds = condition if callable(condition) else lambda status: condition in status
        return wait_until(lambda: next(filter(holds, self._statuses()), ""), f"the status {condition}")

    def _statuses(self) -> list[str]:
        return [line.removeprefix("STATUS=") for line in self.heard("STATUS=")]


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    systemd = Systemd(tmp_path / "notify")
    yield systemd
    systemd.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        yield cluster


def start(cluster: Cluster, daemon: str, env: Mapping[str, str], *options: str) -> None:
    """Start a daemon and wait until it listens."""
    name, port = {"serverd": ("server", cluster.admin), "schedulerd": ("scheduler", cluster.scheduler_admin)}[
        daemon
    ]
    command = (*cluster.command(daemon), "--yaml-config", str(cluster.yaml), *options)
    cluster.spawn(name, *command, env=env)
    cluster.wait_listening(port, name)


def change(cluster: Cluster, **sections: object) -> None:
    """Write other values into the configuration file."""
    for section, given in sections.items():
        values = cluster.settings.get(section, {}) | given if isinstance(given, dict) else given
        cluster.settings[section] = values
    cluster.yaml.write_text(yaml.safe_dump(cluster.settings))


TRAINER = """
import time
import numpy as np

class Trainer:
    def __init__(self, options, device):
        self.arrays = {"a.weight": np.zeros((2, 3), np.float32), "b.bias": np.zeros(2, np.float32)}

    def weights(self):
        return self.arrays

    def load(self, weights):
        self.arrays = {name: np.array(values) for name, values in weights.items()}

    def train(self, steps):
        time.sleep(0.01)
        return 0.5, 0.5
"""


def start_worker(cluster: Cluster, env: Mapping[str, str]) -> None:
    """Let the job be a hybrid one, start a worker and wait until it listens."""
    change(cluster, server_mode="HYBRID_TRAINING")
    (cluster.directory / "mine.py").write_text(TRAINER)
    [port] = free_ports(1)
    options = ("--trainer", "mine:Trainer", "--admin-address", f"127.0.0.1:{port}")
    command = (*cluster.command("workerd"), "--yaml-config", str(cluster.yaml), *options)
    cluster.spawn("worker", *command, env=env)
    cluster.wait_listening(port, "worker")


class TestLife:
    def test_ready_comes_first_also_without_redis_and_the_end_is_announced(
        self, cluster: Cluster, systemd: Systemd
    ) -> None:
        start(cluster, "serverd", systemd.environment())
        systemd.wait("READY=1")
        assert systemd.messages[0] == ["STATUS=starting"]
        systemd.wait_status("not ready: redis: no connection to Redis")
        cluster.kill("server", signal.SIGTERM)
        order = [line for message in systemd.messages for line in message]
        assert order.index("READY=1") < order.index("STOPPING=1")
        asked = [int(line.partition("=")[2]) for line in systemd.heard("EXTEND_TIMEOUT_USEC=")]
        assert len(asked) >= 2 and min(asked) >= 1_000_000

    def test_time_for_the_model_is_asked_for_before_it_is_read(
        self, cluster: Cluster, systemd: Systemd
    ) -> None:
        start(cluster, "serverd", systemd.environment())
        systemd.wait("READY=1")
        order = [line.partition("=")[0] for message in systemd.messages for line in message]
        assert order.index("EXTEND_TIMEOUT_USEC") < order.index("READY")

    def test_a_drain_goes_on_asking_for_time(self, cluster: Cluster, systemd: Systemd) -> None:
        """A device that holds its connection is waited for as long as a drain may take."""
        cluster.start_redis()
        start(cluster, "serverd", systemd.environment())
        wait_until(cluster.ready, "the server is ready")
        with socket.create_connection(("127.0.0.1", cluster.http)) as device:
            device.sendall(b"POST /startFLJob HTTP/1.1\r\nContent-Length: 100\r\n\r\nhalf of a body")
            wait_until(lambda: cluster.metric("fl_device_connections") == 1, "the device is connected")
            cluster.processes["server"].send_signal(signal.SIGTERM)
            systemd.wait_status(lambda status: status == "stopping: waiting for requests in flight")
            again = "EXTEND_TIMEOUT_USEC=15000000"
            wait_until(lambda: len(systemd.heard(again)) >= 2, "more time is asked for, and again")
        assert cluster.processes.pop("server").wait(20) == 0

    @pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
    def test_being_told_twice_changes_nothing(
        self, cluster: Cluster, systemd: Systemd, again: signal.Signals
    ) -> None:
        """What was under way at the first signal is finished all the same."""
        cluster.start_redis()
        start(cluster, "serverd", systemd.environment())
        wait_until(cluster.ready, "the server is ready")
        server = cluster.processes["server"]
        with socket.create_connection(("127.0.0.1", cluster.http), timeout=20) as device:
            device.sendall(b"POST /getModel HTTP/1.1\r\nContent-Length: 4\r\n\r\nha")
            wait_until(lambda: cluster.metric("fl_device_connections") == 1, "the device is connected")
            server.send_signal(signal.SIGTERM)
            systemd.wait_status("stopping: waiting for requests in flight")
            server.send_signal(again)
            device.sendall(b"lf")
            assert device.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"
        assert cluster.processes.pop("server").wait(20) == 0
        assert "Traceback" not in cluster.log() and '"critical"' not in cluster.log()

    @pytest.mark.parametrize("daemon", ["server", "scheduler", "worker"])
    def test_being_told_again_and_again_until_it_has_ended(
        self, cluster: Cluster, systemd: Systemd, daemon: str
    ) -> None:
        if daemon == "worker":
            start_worker(cluster, systemd.environment())
        else:
            start(cluster, daemon + "d", systemd.environment())
        systemd.wait("READY=1")
        process = cluster.processes.pop(daemon)

        def ended() -> bool:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            return process.poll() is not None

        wait_until(ended, "the end")
        assert process.returncode == 0
        assert "Traceback" not in cluster.log(daemon)

    def test_it_does_not_ask_for_ever(self, cluster: Cluster, systemd: Systemd) -> None:
        (cluster.directory / "embedded.py").write_text(
            "from fldaemons import launch, schedulerd\n"
            "launch.STOP_LIMIT_S = 0.0\n"
            f"schedulerd.main(['--yaml-config', {str(cluster.yaml)!r}])\n"
        )
        cluster.spawn("scheduler", sys.executable, "embedded.py", env=systemd.environment())
        systemd.wait("READY=1")
        assert cluster.kill("scheduler", signal.SIGTERM) == 0
        systemd.wait("STOPPING=1")
        assert len(systemd.heard("EXTEND_TIMEOUT_USEC=")) <= 1  # for what is under way in threads

    def test_a_scheduler_tells_of_its_job(self, cluster: Cluster, systemd: Systemd) -> None:
        start(cluster, "schedulerd", systemd.environment())
        systemd.wait("READY=1")
        systemd.wait_status("not ready: redis: no connection to Redis; job job")
        cluster.start_redis()
        systemd.wait_status("job job: Cannot find cluster info for job; Redis ok")
        cluster.start_server()
        systemd.wait_status("job job: CLUSTER_READY, 1 server; Redis ok")
        assert cluster.kill("scheduler", signal.SIGTERM) == 0
        systemd.wait("STOPPING=1")


class TestStatus:
    def test_follows_the_iteration(self, cluster: Cluster, systemd: Systemd) -> None:
        cluster.start_redis()
        start(cluster, "serverd", systemd.environment())
        systemd.wait_status("iteration 1 of 100, collecting, 0 of 2 updates; Redis ok")
        assert cluster.start("one").retcode == cluster.start("two").retcode == 200
        assert cluster.update("one", 1, filled(1.0)).retcode == 200
        systemd.wait_status("iteration 1 of 100, collecting, 1 of 2 updates; Redis ok")
        assert cluster.update("two", 1, filled(1.0)).retcode == 200
        systemd.wait_status("iteration 2 of 100, collecting, 0 of 2 updates; Redis ok")

    def test_names_the_reasons_of_readyz_and_that_they_are_gone(
        self, cluster: Cluster, systemd: Systemd
    ) -> None:
        cluster.start_redis()
        start(cluster, "serverd", systemd.environment())
        systemd.wait_status("Redis ok")
        cluster.kill("redis")
        systemd.wait_status(
            "not ready: redis: no connection to Redis; iteration 1 of 100, collecting, 0 of 2 updates"
        )
        cluster.start_redis()
        wait_until(lambda: systemd.status.endswith("updates; Redis ok"), "it is ready again")

    def test_is_not_repeated_and_comes_at_most_once_a_second(
        self, cluster: Cluster, systemd: Systemd
    ) -> None:
        cluster.start_redis()
        start(cluster, "serverd", systemd.environment())
        systemd.wait_status("Redis ok")
        begun, before = time.monotonic(), len(systemd.messages)
        for number in range(1, 6):
            cluster.run_iteration(number, {"one": 1.0, "two": 2.0})
            cluster.weights(number)
        systemd.wait_status("iteration 6 of 100")
        told = systemd.heard("STATUS=", before)
        assert len(told) <= time.monotonic() - begun + 2
        assert all(one != other for one, other in pairwise(told))


class TestWatchdog:
    def test_beats_while_it_runs_whatever_redis_does_and_not_while_it_stands_still(
        self, cluster: Cluster, systemd: Systemd
    ) -> None:
        start(cluster, "serverd", systemd.environment(WATCHDOG_S))
        wait_until(lambda: len(systemd.heard("WATCHDOG=1")) >= 4, "beats without Redis")
        cluster.start_redis()
        wait_until(cluster.ready, "the server is ready")
        since = len(systemd.messages)
        wait_until(lambda: len(systemd.heard("WATCHDOG=1", since)) >= 4, "beats")
        cluster.pause("server")
        assert not self.beats_in(systemd, SILENCE_S)
        cluster.resume("server")
        systemd.wait("WATCHDOG=1", len(systemd.messages))

    @staticmethod
    def beats_in(systemd: Systemd, seconds: float) -> list[str]:
        """The beats of a span of time, of which the first moments do not count: one may be under way."""
        time.sleep(WATCHDOG_S)
        since = len(systemd.messages)
        time.sleep(seconds)  # that nothing comes can only be seen by waiting
        return systemd.heard("WATCHDOG=1", since)

    @pytest.mark.parametrize(
        "watchdog", [None, (WATCHDOG_S, 1)], ids=["none asked for", "for another process"]
    )
    def test_nothing_beats_where_nobody_waits(
        self, cluster: Cluster, systemd: Systemd, watchdog: tuple[float, int] | None
    ) -> None:
        start(cluster, "schedulerd", systemd.environment(*(watchdog or ())))
        systemd.wait("READY=1")
        assert not self.beats_in(systemd, SILENCE_S)

    def test_a_blocked_reactor_is_noticed(self, cluster: Cluster, systemd: Systemd) -> None:
        self.run_embedded(
            cluster,
            systemd,
            "from twisted.internet import reactor\n"
            "def block():\n"
            "    while gate.exists():\n"
            "        time.sleep(0.01)\n"
            "    reactor.callLater(0.05, block)\n"
            "reactor.callWhenRunning(block)\n",
        )
        wait_until(lambda: len(systemd.heard("WATCHDOG=1")) >= 2, "beats")
        self.gate(cluster).touch()
        assert not self.beats_in(systemd, SILENCE_S)
        self.gate(cluster).unlink()
        systemd.wait("WATCHDOG=1", len(systemd.messages))

    def test_a_merge_that_does_not_come_back_is_noticed_and_a_long_one_is_not(
        self, cluster: Cluster, systemd: Systemd
    ) -> None:
        """The reactor turns all the while, and the pool has other threads."""
        change(cluster, fedcore={"ledger": {"fsync": True}})
        cluster.start_redis()
        longest = 4 * WATCHDOG_S
        self.run_embedded(
            cluster,
            systemd,
            "from fedcore.services import supervision\n"
            f"supervision.SPARE_S = {longest}\n"
            "from fedcore.ledger.ledger import Ledger\n"
            "merge = Ledger.merge\n"
            "def slow(self):\n"
            "    while gate.exists():\n"
            "        time.sleep(0.01)\n"
            "    return merge(self)\n"
            "Ledger.merge = slow\n",
        )
        wait_until(cluster.ready, "the server is ready")
        self.gate(cluster).touch()
        assert cluster.start("one").retcode == cluster.start("two").retcode == 200
        assert cluster.update("one", 1, filled(1.0)).retcode == 200
        assert cluster.update("two", 1, filled(1.0)).retcode == 200  # the quorum: now they are merged
        since = len(systemd.messages)
        wait_until(lambda: len(systemd.heard("WATCHDOG=1", since)) >= 3, "beats during a long merge")
        wait_until(
            lambda: "work in a thread has not come back" in cluster.log(),
            "it is told that the merge is stuck",
        )
        assert not self.beats_in(systemd, SILENCE_S)
        assert cluster.get_http(cluster.admin, "/livez")
        self.gate(cluster).unlink()
        systemd.wait("WATCHDOG=1", len(systemd.messages))
        systemd.wait_status("iteration 2 of 100")

    @staticmethod
    def gate(cluster: Cluster) -> Path:
        return cluster.directory / "gate"

    def run_embedded(self, cluster: Cluster, systemd: Systemd, before: str) -> None:
        """Run a server in whose process some lines were run first."""
        (cluster.directory / "embedded.py").write_text(
            "import sys, time\n"
            "from pathlib import Path\n"
            f"gate = Path({str(self.gate(cluster))!r})\n"
            f"{before}"
            "from fldaemons.serverd import main\n"
            f"main(['--yaml-config', {str(cluster.yaml)!r}])\n"
        )
        cluster.spawn("server", sys.executable, "embedded.py", env=systemd.environment(WATCHDOG_S))
        cluster.wait_listening(cluster.admin, "server")


def encrypt(cluster: Cluster) -> None:
    """Have the listeners speak TLS, with the certificate in server.p12."""
    files = dict.fromkeys(("server_cert_path", "client_cert_path", "ca_cert_path"), "server.p12")
    change(cluster, enable_ssl=True, ssl=files | {"cipher_list": "ECDHE-ECDSA-AES256-GCM-SHA384"})
    change(cluster, fedcore={"redis": {"tls": "off"}, "node": {"tls": False}})


def served_certificate(port: int) -> bytes:
    """The certificate that a listener shows to a new connection."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=10)) as connection:
        shown = connection.getpeercert(binary_form=True)
        assert shown is not None
        return shown


class TestReload:
    @pytest.fixture
    def secured(self, cluster: Cluster) -> Cluster:
        make_p12(cluster.directory / "server.p12", b"secret")
        (cluster.directory / "password").write_text("secret\n")
        encrypt(cluster)
        return cluster

    @staticmethod
    def reload(cluster: Cluster, systemd: Systemd, name: str = "server") -> list[list[str]]:
        """Send SIGHUP and wait for the end of the reload; return what was said, status lines aside."""
        since = len(systemd.messages)
        cluster.processes[name].send_signal(signal.SIGHUP)
        systemd.wait("READY=1", since)
        said = systemd.messages[since:]
        return [message for message in said if not message[0].startswith(("STATUS=", "WATCHDOG="))]

    def test_is_told_as_systemd_252_wants_it(self, cluster: Cluster, systemd: Systemd) -> None:
        start(cluster, "schedulerd", systemd.environment())
        systemd.wait("READY=1")
        before = time.monotonic_ns() // 1000
        (reloading, stamp), (ready, *_) = self.reload(cluster, systemd, "scheduler")
        assert (reloading, ready) == ("RELOADING=1", "READY=1")
        assert before <= int(stamp.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000

    @pytest.mark.parametrize("daemon", ["serverd", "schedulerd"])
    def test_new_connections_get_the_new_certificate_and_old_ones_go_on(
        self, secured: Cluster, systemd: Systemd, daemon: str
    ) -> None:
        start(secured, daemon, systemd.environment(), "--server-password-file", "password")
        name, port = {"serverd": ("server", secured.http), "schedulerd": ("scheduler", secured.manage)}[
            daemon
        ]
        first = served_certificate(port)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        plain = socket.create_connection(("127.0.0.1", port), timeout=10)
        with context.wrap_socket(plain) as old:
            make_p12(secured.directory / "server.p12", b"changed")
            (secured.directory / "password").write_text("changed\n")
            self.reload(secured, systemd, name)
            second = served_certificate(port)
            assert second != first
            assert old.getpeercert(binary_form=True) == first
            old.sendall(b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert old.recv(100).startswith(b"HTTP/1.1 ")

    @pytest.mark.parametrize(
        ("file", "content", "text"),
        [
            (
                "server.p12",
                b"nonsense",
                "PKCS12_parse failed. (server.p12: wrong password or no PKCS#12 file)",
            ),
            ("password", b"wrong", "PKCS12_parse failed. (server.p12: wrong password or no PKCS#12 file)"),
            ("fl.yaml", b"fl_name: [", "Syntax error in yaml config file"),
            ("fl.yaml", b"fl_name: job\n", "The parameter 'fl_iteration_num' is missing"),
        ],
        ids=["p12", "password", "syntax", "missing"],
    )
    def test_a_bad_file_changes_nothing_and_is_told(
        self, secured: Cluster, systemd: Systemd, file: str, content: bytes, text: str
    ) -> None:
        start(secured, "serverd", systemd.environment(), "--server-password-file", "password")
        first, good = served_certificate(secured.http), (secured.directory / file).read_bytes()
        (secured.directory / file).write_bytes(content)
        self.reload(secured, systemd)
        assert text in systemd.wait_status("NOT RELOADED: ")
        assert '"level": "error"' in next(
            line for line in secured.log().splitlines() if "not reloaded" in line
        )
        assert served_certificate(secured.http) == first
        (secured.directory / file).write_bytes(good)
        self.reload(secured, systemd)
        assert "NOT RELOADED" not in systemd.status

    def test_the_level_changes_and_the_rest_is_named(self, cluster: Cluster, systemd: Systemd) -> None:
        cluster.start_redis()
        start(cluster, "serverd", systemd.environment())
        wait_until(cluster.ready, "the server is ready")
        change(cluster, fedcore={"log": {"level": "error"}}, fl_iteration_num=7)
        self.reload(cluster, systemd)
        before = cluster.log()
        cluster.run_iteration(1, {"one": 1.0, "two": 1.0})
        cluster.weights(1)
        assert cluster.log() == before
        change(cluster, fedcore={"log": {"level": "info"}, "device": {"hold_time": 3.0}})
        self.reload(cluster, systemd)
        text = "takes effect at the next start: fl_iteration_num, fedcore.device.hold_time"
        wait_until(lambda: text in cluster.log(), "the other keys are named")
        cluster.run_iteration(2, {"one": 1.0, "two": 1.0})
        wait_until(lambda: "iteration 2 ended" in cluster.log(), "the log goes on")

    def test_without_systemd_it_works_as_well(self, secured: Cluster) -> None:
        start(secured, "serverd", {}, "--server-password-file", "password")
        first = served_certificate(secured.http)
        make_p12(secured.directory / "server.p12", b"secret")
        os.kill(secured.processes["server"].pid, signal.SIGHUP)
        wait_until(lambda: served_certificate(secured.http) != first, "the new certificate")


class TestCredentials:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "credentials"
        folder.mkdir()
        return folder

    def test_the_listeners_password_comes_from_there(self, cluster: Cluster, folder: Path) -> None:
        make_p12(cluster.directory / "server.p12", b"secret")
        encrypt(cluster)
        (folder / "server-password").write_text("secret\n")
        start(cluster, "serverd", {"CREDENTIALS_DIRECTORY": str(folder)})
        assert served_certificate(cluster.http)
        start(cluster, "schedulerd", {"CREDENTIALS_DIRECTORY": str(folder)})
        assert served_certificate(cluster.manage)

    def test_an_empty_one_counts_as_none(self, cluster: Cluster, folder: Path) -> None:
        for name in ("server-password", "client-password", "redis-password", "sentinel-password"):
            (folder / name).write_text("")
        cluster.start_redis()  # it has no password, and would refuse one
        cluster.start_server(env={"CREDENTIALS_DIRECTORY": str(folder)})

    def test_that_of_redis_too(self, cluster: Cluster, folder: Path, systemd: Systemd) -> None:
        cluster.start_redis()
        assert cluster.redis("CONFIG SET requirepass sesame") == b"+OK"
        (folder / "redis-password").write_text("wrong\n")
        environment = systemd.environment() | {"CREDENTIALS_DIRECTORY": str(folder)}
        start(cluster, "serverd", environment)
        status = systemd.wait_status("not ready: redis: Redis refuses us: ")
        assert "WRONGPASS" in status and "fedcore.redis.password_file" in status
        assert cluster.kill("server", signal.SIGTERM) == 0
        (folder / "redis-password").write_text("sesame\n")
        start(cluster, "serverd", environment)
        wait_until(cluster.ready, "the server is ready")

    def test_a_file_that_is_named_goes_first(self, cluster: Cluster, folder: Path) -> None:
        cluster.start_redis()
        assert cluster.redis("CONFIG SET requirepass sesame") == b"+OK"
        (folder / "redis-password").write_text("wrong\n")
        named = cluster.directory / "named"
        named.write_text("sesame\n")
        change(cluster, fedcore={"redis": {"password_file": str(named)}})
        cluster.start_server(env={"CREDENTIALS_DIRECTORY": str(folder)})


class TestWorker:
    def test_tells_its_step_and_beats_while_it_waits(self, cluster: Cluster, systemd: Systemd) -> None:
        start_worker(cluster, systemd.environment(WATCHDOG_S))
        systemd.wait("READY=1")
        systemd.wait_status(
            "not ready: redis: no connection to Redis; membership: not on the list of workers yet"
        )
        cluster.start_redis()
        cluster.start_server()
        systemd.wait_status("pulling, iteration 1; Redis ok")
        cluster.run_iteration(1, {"one": 1.0, "two": 1.0})
        systemd.wait_status("pulling, iteration 2; Redis ok")
        since = len(systemd.messages)
        wait_until(lambda: len(systemd.heard("WATCHDOG=1", since)) >= 3, "beats")
        os.kill(cluster.processes["worker"].pid, signal.SIGHUP)
        systemd.wait("RELOADING=1", since)
        systemd.wait("READY=1", since)
        assert cluster.kill("worker", signal.SIGTERM) == 0
        systemd.wait("STOPPING=1", since)


Preparation = Callable[[Cluster], tuple[str, ...] | None]


def powerless(command: tuple[str, ...]) -> tuple[str, ...]:
    """A command for which the permissions of files count, even if root runs it."""
    if os.geteuid() != 0:
        return command
    return ("setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command)


def deny(path: Path, mode: int = 0o700) -> None:
    """Leave the owner's rights to somebody else, or take them from ourselves."""
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    path.chmod(mode if os.geteuid() == 0 else mode & 0o555 & ~0o200)


def in_folder(name: str, option: str) -> Preparation:
    def prepare(cluster: Cluster) -> tuple[str, ...]:
        folder = cluster.directory / name
        folder.mkdir()
        deny(folder, 0o755)
        return option, str(folder)

    return prepare


def a_p12_but(what: str) -> Preparation:
    def prepare(cluster: Cluster) -> tuple[str, ...]:
        encrypt(cluster)
        (cluster.directory / "password").write_text("wrong" if what == "wrong password" else "secret")
        if what != "missing":
            make_p12(cluster.directory / "server.p12", b"secret")
        if what == "unreadable":
            deny(cluster.directory / "server.p12", 0o600)
        return () if what == "no password" else ("--server-password-file", "password")

    return prepare


def a_redis_password_that_is_unreadable(cluster: Cluster) -> None:
    file = cluster.directory / "redis-password"
    file.write_text("sesame")
    deny(file, 0o600)
    change(cluster, fedcore={"redis": {"password_file": str(file)}})


def an_event_file_that_is_denied(cluster: Cluster) -> None:
    in_folder("events", "")(cluster)
    change(cluster, summary={"failure_event_file": str(cluster.directory / "events" / "events.txt")})


def no_model(cluster: Cluster) -> None:
    del cluster.settings["fedcore"]["server"]["model"]
    change(cluster)


FAULTS: dict[str, tuple[Preparation, int, str, int | None]] = {
    "no file": (lambda c: c.yaml.unlink(), 78, "fl.yaml not exist", None),
    "file denied": (
        lambda c: deny(c.yaml, 0o600),
        78,
        "fl.yaml cannot be read: Permission denied",
        errno.EACCES,
    ),
    "syntax": (lambda c: c.yaml.write_text("a: [") and None, 78, "Syntax error in yaml config file", None),
    "unknown key": (
        lambda c: change(c, fedcore={"sever": {"a": 1}}),
        78,
        "is unknown, did you mean 'fedcore.server'?",
        None,
    ),
    "p12 missing": (a_p12_but("missing"), 78, "is not exist. (set ssl.server_cert_path)", errno.ENOENT),
    "p12 denied": (
        a_p12_but("unreadable"),
        78,
        "cannot read server.p12: Permission denied (let ssl.server_cert_path name a file",
        errno.EACCES,
    ),
    "no password": (
        a_p12_but("no password"),
        78,
        "(give --server-password-file, or the credential server-password)",
        None,
    ),
    "wrong password": (
        a_p12_but("wrong password"),
        78,
        "(server.p12: wrong password or no PKCS#12 file)",
        None,
    ),
    "Redis' password denied": (
        a_redis_password_that_is_unreadable,
        78,
        "redis-password: Permission denied (check the path, and that the daemon's user may read it)",
        errno.EACCES,
    ),
    "events denied": (
        an_event_file_that_is_denied,
        78,
        "set summary.failure_event_file to a file that this server may write",
        errno.EACCES,
    ),
    "checkpoints denied": (
        in_folder("models", "--checkpoint-dir"),
        78,
        "or let fedcore.server.checkpoint_dir name another folder)",
        None,
    ),
    "checkpoints in a file": (
        lambda c: ("--checkpoint-dir", str(c.directory / "model.safetensors" / "below")),
        78,
        "model.safetensors is no folder)",
        None,
    ),
    "no model": (no_model, 78, "give the initial weights with --model FILE or fedcore.server.model", None),
    "foreign address": (
        lambda c: ("--http-server-address", "192.0.2.1:7777"),
        1,
        "(this host does not have that address: choose another one)",
        errno.EADDRNOTAVAIL,
    ),
}


class TestFaults:
    """What a daemon says when it cannot start: to the operator, to systemd, and in its exit code."""

    @pytest.mark.parametrize("fault", FAULTS)
    def test_names_the_remedy(self, cluster: Cluster, systemd: Systemd, fault: str) -> None:
        prepare, code, text, number = FAULTS[fault]
        options = prepare(cluster) or ()
        said = self.run(cluster, systemd, code, *options)
        assert text in said and text in systemd.status
        assert systemd.heard("ERRNO=") == ([] if number is None else [f"ERRNO={number}"])

    def test_an_instance_that_runs_already_is_named(self, cluster: Cluster, systemd: Systemd) -> None:
        cluster.start_redis()
        cluster.start_server()
        said = self.run(cluster, systemd, 1)
        text = (
            "Address already in use (end what uses it (perhaps this daemon, started twice), or choose another"
        )
        assert f"cannot listen at 127.0.0.1:{cluster.http} (device API): {text}" in said
        assert text in systemd.status
        assert systemd.heard("ERRNO=") == [f"ERRNO={errno.EADDRINUSE}"]

    def test_a_contradiction_with_the_cluster_is_told_at_the_end(
        self, cluster: Cluster, systemd: Systemd
    ) -> None:
        cluster.start_redis()
        cluster.start_server()
        cluster.kill("server", signal.SIGTERM)
        write_model(cluster.directory / "model.safetensors", {"other": np.zeros(3, np.float32)}, set(), {})
        said = self.run(cluster, systemd, 78)
        assert "give all servers of job the same model" in said
        assert "give all servers of job the same model" in systemd.status
        order = [line for message in systemd.messages for line in message]
        assert order.index("STOPPING=1") < len(order) - 1 and order[-1].startswith("STATUS=")

    def test_a_bug_is_told_with_its_traceback(self, cluster: Cluster, systemd: Systemd) -> None:
        (cluster.directory / "embedded.py").write_text(
            "import fldaemons.serverd as daemon\n"
            "def broken(*arguments):\n    raise KeyError('what')\n"
            "daemon.check_writable = broken\n"
            f"daemon.main(['--yaml-config', {str(cluster.yaml)!r}])\n"
        )
        done = subprocess.run(
            [sys.executable, "embedded.py"],
            cwd=cluster.directory,
            env={**os.environ, **systemd.environment()},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("fl-serverd: KeyError('what') (this is a bug")
        systemd.wait_status("KeyError('what') (this is a bug")

    def test_a_ledger_folder_that_is_denied_is_waited_for(self, cluster: Cluster, systemd: Systemd) -> None:
        cluster.start_redis()
        option, folder = in_folder("ledgers", "--ledger-dir")(cluster) or ()
        command = (*cluster.command("serverd"), "--yaml-config", str(cluster.yaml), option, folder)
        cluster.spawn("server", *powerless(command), env=systemd.environment())
        text = f"the update ledger cannot be made at {folder}: Permission denied (give the folder to the daemon's user"
        systemd.wait_status(f"not ready: ledger: {text}")
        assert text in cluster.log()
        os.chown(folder, os.geteuid(), os.getegid())
        Path(folder).chmod(0o755)
        systemd.wait_status("iteration 1 of 100, collecting, 0 of 2 updates; Redis ok")

    @staticmethod
    def run(cluster: Cluster, systemd: Systemd, code: int, *options: str) -> str:
        """Run a server that ends by itself; return what it says last."""
        command = (*cluster.command("serverd"), "--yaml-config", str(cluster.yaml), *options)
        done = subprocess.run(
            powerless(command),
            cwd=cluster.directory,
            env={**os.environ, **systemd.environment()},
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        said = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("{"))
        assert said.startswith("fl-serverd: ")
        wait_until(lambda: systemd.status != "starting", "the last status")
        return said


class TestJournal:
    def test_lines_have_priorities_where_stderr_is_the_journal(self, cluster: Cluster) -> None:
        """A file takes the place of the journal's socket: systemd names it by device and inode."""
        log = cluster.directory / "server.log"
        log.touch()
        status = log.stat()
        cluster.start_redis()
        cluster.start_server(env={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        cluster.run_iteration(1, {"one": 1, "two": 1})
        cluster.weights(1)
        assert cluster.kill("server", signal.SIGTERM) == 0
        lines = cluster.log().splitlines()
        assert all(re.match("<[2-7]>", line) for line in lines)
        assert any(line.startswith("<6>iteration 1 ended: Weight aggregation finished!") for line in lines)
        cluster.yaml.unlink()
        cluster.spawn(
            "server",
            *cluster.command("serverd"),
            *("--yaml-config", str(cluster.yaml)),
            env={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
        )
        assert cluster.processes.pop("server").wait(20) == 78
        assert cluster.log().splitlines()[-1] == f"<3>fl-serverd: yaml config file {cluster.yaml} not exist"


def test_on_a_terminal_a_hangup_ends_a_daemon_in_order(cluster: Cluster, systemd: Systemd) -> None:
    """Whoever closes the window of a server that was started by hand does not leave it behind."""
    master, terminal = os.openpty()
    process = subprocess.Popen(
        [*cluster.command("schedulerd"), "--yaml-config", str(cluster.yaml)],
        cwd=cluster.directory,
        env={**os.environ, **systemd.environment()},
        stdin=subprocess.DEVNULL,
        stderr=terminal,
    )
    try:
        systemd.wait("READY=1")
        process.send_signal(signal.SIGHUP)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
        os.close(master)
    assert not systemd.heard("RELOADING=1")
    systemd.wait("STOPPING=1")
