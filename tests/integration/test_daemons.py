"""The daemons' command lines, exit codes, readiness notice and logs, as systemd and operators meet them."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from integration.cluster import Cluster, filled, wait_until

from fedcore import __version__
from fedcore.pki.authority import Issued, KeyKind, certify, lasting, make_key


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        yield cluster


def run(cluster: Cluster, daemon: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*cluster.command(daemon), *options]
    return subprocess.run(
        command,
        cwd=cluster.directory,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.mark.parametrize("daemon", ["serverd", "schedulerd"])
class TestCommandLine:
    def test_help_has_examples(self, cluster: Cluster, daemon: str) -> None:
        text = run(cluster, daemon, "--help").stdout
        assert "Examples:" in text
        assert "--yaml-config, --yaml_config" in text
        assert "server-password, client-password, redis-password or sentinel-password" in text
        assert "SIGHUP " in text and "  78  the configuration cannot be used" in text

    def test_version(self, cluster: Cluster, daemon: str) -> None:
        assert run(cluster, daemon, "--version").stdout.strip().endswith(__version__)

    @pytest.mark.parametrize("spelling", ["--yaml-config", "--yaml_config"])
    def test_check_config(self, cluster: Cluster, daemon: str, spelling: str) -> None:
        done = run(cluster, daemon, spelling, str(cluster.yaml), "--check-config")
        assert (done.returncode, done.stdout) == (0, f"{cluster.yaml}: the configuration is good\n"), (
            done.stderr
        )

    def test_a_check_leaves_nothing_behind(self, cluster: Cluster, daemon: str) -> None:
        """Root may check what another user is to run."""
        before = sorted(cluster.directory.rglob("*"))
        assert run(cluster, daemon, "--yaml-config", str(cluster.yaml), "--check-config").returncode == 0
        assert sorted(cluster.directory.rglob("*")) == before

    def test_a_missing_file_exits_with_78(self, cluster: Cluster, daemon: str) -> None:
        done = run(cluster, daemon, "--yaml-config", "nowhere.yaml")
        assert (done.returncode, done.stderr) == (
            78,
            f"fl-{daemon}: yaml config file nowhere.yaml not exist\n",
        )

    def test_a_bad_value_exits_with_78(self, cluster: Cluster, daemon: str) -> None:
        text = cluster.yaml.read_text().replace("fl_iteration_num: 100", "fl_iteration_num: 0")
        cluster.yaml.write_text(text)
        done = run(cluster, daemon, "--yaml-config", str(cluster.yaml))
        assert done.returncode == 78
        assert "Failed to check value of parameter 'fl_iteration_num': value is expected" in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_taken_port_is_named(self, cluster: Cluster, daemon: str) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            done = run(cluster, daemon, "--yaml-config", str(cluster.yaml), "--admin-address", address)
        assert done.returncode == 1
        assert address.rpartition(":")[2] in done.stderr and "Traceback" not in done.stderr


class TestServerOptions:
    def test_no_model_exits_with_78(self, cluster: Cluster) -> None:
        (cluster.directory / "model.safetensors").unlink()
        text = cluster.yaml.read_text()
        cluster.yaml.write_text("\n".join(line for line in text.splitlines() if "model:" not in line))
        done = run(cluster, "serverd", "--yaml-config", str(cluster.yaml))
        assert done.returncode == 78
        assert "--model FILE" in done.stderr

    def test_what_this_version_cannot_serve_exits_with_78(self, cluster: Cluster) -> None:
        protection = (
            "encrypt:\n  encrypt_type: STABLE_PW_ENCRYPT\n  pw_encrypt:\n    share_secrets_ratio: 1.0\n"
        )
        protection += "    cipher_time_window: 300000\n    reconstruct_secrets_threshold: 1\n"
        cluster.yaml.write_text(cluster.yaml.read_text() + protection)
        done = run(cluster, "serverd", "--yaml-config", str(cluster.yaml))
        assert done.returncode == 78
        assert "set server_mode to CLOUD_TRAINING, or another encrypt_type" in done.stderr

    @pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:0", "127.0.0.1:70000", ":6666"])
    def test_a_bad_address_has_the_originals_text(self, cluster: Cluster, address: str) -> None:
        done = run(cluster, "serverd", "--yaml-config", str(cluster.yaml), "--http_server_address", address)
        assert done.returncode == 78
        assert f"The format of http server address '{address}' is invalid" in done.stderr
        done = run(
            cluster, "schedulerd", "--yaml-config", str(cluster.yaml), "--scheduler-manage-address", address
        )
        assert done.returncode == 78
        text = f"Failed to start scheduler http server, invalid server address: {address}"
        assert text in done.stderr

    def test_an_instance_listens_on_ports_of_its_own(self, cluster: Cluster) -> None:
        cluster.start_redis()
        cluster.admin += 3
        cluster.http += 3
        cluster.start_server("--instance", "3")
        assert cluster.start("one").retcode == 200


class TestLog:
    def test_is_one_json_object_per_line(self, cluster: Cluster) -> None:
        cluster.start_redis()
        cluster.start_server()
        cluster.run_iteration(1, {"one": 1, "two": 1})
        cluster.weights(1)
        cluster.kill("server", 15)
        records = [json.loads(line) for line in cluster.log().splitlines()]
        assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
        (ended,) = [record for record in records if record["message"].startswith("iteration 1 ended")]
        assert (ended["iteration"], ended["valid"], ended["updates"]) == (1, True, 2)
        assert records[-1]["message"] == "fl-serverd has stopped"
        assert not [record for record in records if record["level"] in ("error", "critical")]


class TestMetrics:
    def test_tell_what_happens(self, cluster: Cluster) -> None:
        cluster.start_redis()
        cluster.start_server()
        cluster.run_iteration(1, {"one": 1, "two": 1})
        cluster.weights(1)
        cluster.start("three", 0)
        assert cluster.metric("fl_iteration") == 2
        assert cluster.metric('fl_iteration_phase{phase="collecting"}') == 1
        assert cluster.metric('fl_iteration_quorum_clients{round="updateModel"}') == 2
        assert cluster.metric('fl_requests_total{outcome="accepted",route="startFLJob"}') == 2
        assert cluster.metric('fl_requests_total{outcome="come_back",route="startFLJob"}') == 1
        assert cluster.metric('fl_request_duration_seconds_count{route="updateModel"}') == 2
        assert cluster.metric("fl_updates_accepted_total") == 2
        assert cluster.metric('fl_iterations_total{outcome="valid"}') == 1
        assert cluster.metric("fl_redis_up") == 1
        _, text = cluster.get_http(cluster.admin, "/metrics")
        assert f'version="{__version__}"'.encode() in text

    def test_the_scheduler_has_some_too(self, cluster: Cluster) -> None:
        cluster.start_scheduler(ready=False)
        assert cluster.get_http(cluster.scheduler_admin, "/livez") == (200, b'{"live":true}\n')
        status, body = cluster.get_http(cluster.scheduler_admin, "/readyz")
        assert (status, json.loads(body)["reasons"]) == (503, {"redis": "no connection to Redis"})
        cluster.start_redis()
        wait_until(
            lambda: cluster.get_http(cluster.scheduler_admin, "/readyz")[0] == 200, "the scheduler is ready"
        )
        assert b"fl_build_info{" in cluster.get_http(cluster.scheduler_admin, "/metrics")[1]


class TestEmbedding:
    def test_callbacks_are_called(self, cluster: Cluster) -> None:
        cluster.start_redis()
        (cluster.directory / "embedded.py").write_text(
            "import sys\n"
            "from fedcore.services.callbacks import Callback\n"
            "from fldaemons.serverd import main, serve\n"
            "class Mine(Callback):\n"
            "    def after_started(self): print('started', flush=True)\n"
            "    def before_stopped(self): print('stopping', flush=True)\n"
            "    def on_iteration_end(self, end):\n"
            "        weights = end.model.arrays['b.bias'].tolist()\n"
            "        print('ended', end.number, end.valid, weights, end.checkpoint.name, flush=True)\n"
            "        raise RuntimeError('a callback that fails changes nothing')\n"
            f"options = main.make_context('embedded', ['--yaml-config', {str(cluster.yaml)!r}]).params\n"
            "sys.exit(serve(options, Mine()))\n"
        )
        import sys

        cluster.spawn("server", sys.executable, "embedded.py")
        cluster.wait_listening(cluster.admin, "server")
        wait_until(cluster.ready, "the server is ready")
        cluster.run_iteration(1, {"one": 3, "two": 3})
        cluster.weights(1)
        wait_until(lambda: "ended 1" in cluster.log(), "the callback is called")
        assert cluster.kill("server", 15) == 0
        lines = [line for line in cluster.log().splitlines() if not line.startswith("{")]
        assert lines[0] == "started"
        assert lines[1].startswith("ended 1 True [3.0, 3.0] job_recovery_iteration_1_")
        assert lines[2] == "stopping"


def make_p12(path: Path, password: bytes) -> Issued:
    """Write a certificate that is its own authority, as the simplest of set-ups has it."""
    now = datetime.now(UTC)
    key = make_key(KeyKind.EC_P256)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    extensions = [(names, False), (x509.BasicConstraints(True, None), True)]
    made = Issued(key, certify(name, key, None, lasting(now, 2), extensions))
    path.write_bytes(made.p12(password))
    return made


class TestTls:
    @pytest.fixture
    def secured(self, cluster: Cluster) -> Cluster:
        made = make_p12(cluster.directory / "server.p12", b"secret")
        (cluster.directory / "ca.crt").write_bytes(made.certificate_pem())
        (cluster.directory / "password").write_text("secret\n")
        text = cluster.yaml.read_text().replace("enable_ssl: false", "enable_ssl: true")
        text += (
            "ssl:\n  server_cert_path: server.p12\n  client_cert_path: server.p12\n  ca_cert_path: ca.crt\n"
            "  cipher_list: ECDHE-ECDSA-AES256-GCM-SHA384:DHE-RSA-AES256-SHA\n"
            "fedcore.redis.tls: off\nfedcore.node.tls: false\n"  # this Redis has none; a certificate for devices only
        )
        cluster.yaml.write_text(text)
        cluster.start_redis()
        return cluster

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    @pytest.mark.parametrize("offered", [[], ["h2", "http/1.1"]], ids=["no ALPN", "ALPN"])
    def test_both_listeners_speak_it(
        self, secured: Cluster, version: ssl.TLSVersion, offered: list[str]
    ) -> None:
        """Old devices offer HTTP/2 as well: that is for their HTTP library to do without."""
        secured.start_server("--server-password-file", "password")
        secured.start_scheduler("--server_password_file", "password")
        assert "these suites of ssl.cipher_list are not used: DHE-RSA-AES256-SHA" in secured.log()
        context = ssl.create_default_context(cafile=secured.directory / "ca.crt")
        context.minimum_version = context.maximum_version = version
        if offered:
            context.set_alpn_protocols(offered)
        url = f"https://localhost:{secured.manage}/state"
        with urllib.request.urlopen(url, context=context, timeout=10) as answer:
            assert json.load(answer)["cluster_state"] == "CLUSTER_READY"
        url = f"https://localhost:{secured.http}/getModel"
        with pytest.raises(urllib.error.HTTPError, match="500"):
            urllib.request.urlopen(url, context=context, timeout=10)

    def test_an_idle_device_does_not_delay_a_stop(self, secured: Cluster) -> None:
        """It sleeps, and does not agree to the end of its connection."""
        secured.start_server("--server-password-file", "password")
        context = ssl.create_default_context(cafile=secured.directory / "ca.crt")
        with (
            socket.create_connection(("localhost", secured.http), timeout=10) as connection,
            context.wrap_socket(connection, server_hostname="localhost") as device,
        ):
            device.sendall(b"POST /getModel HTTP/1.1\r\nContent-Length: 4\r\n\r\nhalf")
            assert device.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")
            began = time.monotonic()
            assert secured.kill("server", signal.SIGTERM) == 0
            assert time.monotonic() - began < 6

    def test_a_wrong_password_exits_with_78(self, secured: Cluster) -> None:
        (secured.directory / "password").write_text("wrong")
        done = run(
            secured, "serverd", "--yaml-config", str(secured.yaml), "--server-password-file", "password"
        )
        assert (done.returncode, "PKCS12_parse failed." in done.stderr) == (78, True)
        done = run(secured, "serverd", "--yaml-config", str(secured.yaml))
        assert (done.returncode, "The client password's value is empty." in done.stderr) == (78, True)


def test_a_second_server_of_the_same_job_is_told_apart(cluster: Cluster) -> None:
    """Two servers share the counts; an update on each is more than one ledger holds, and that is said by name."""
    cluster.start_redis()
    cluster.start_server()
    first = cluster.http
    cluster.processes["first"] = cluster.processes.pop("server")
    cluster.admin, cluster.http = cluster.admin + 1, cluster.http + 1
    cluster.start_server("--instance", "1")
    assert cluster.start("one").retcode == cluster.start("two").retcode == 200
    assert cluster.update("one", 1, filled(1.0)).retcode == 200
    cluster.http = first
    assert cluster.update("two", 1, filled(1.0)).retcode == 200
    wait_until(lambda: cluster.start("one").iteration == 2, "the next iteration")
