"""``fl doctor`` on this machine: real files, ports, certificates, Redis and servers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from integration.cluster import Cluster
from integration.redis_fixture import private_redis, sentinel_group
from integration.test_daemons import make_p12


class Report:
    """What one call has found."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        assert done.stderr == "", done.stderr
        answer = json.loads(done.stdout)
        self.code = done.returncode
        self.findings = [tuple(found.values()) for found in answer["findings"]]
        assert answer["ok"] == (self.code == 0)

    def of(self, check: str) -> list[tuple[str, str, str]]:
        """Return level, text and remedy of a check's findings."""
        return [(level, text, remedy) for name, level, text, remedy in self.findings if name == check]

    def bad(self) -> list[tuple[str, str, str, str]]:
        return [found for found in self.findings if found[1] != "ok"]


def call(cluster: Cluster, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedctl", "doctor", "--yaml-config", str(cluster.yaml)]
    return subprocess.run(
        [*command, "--credentials", str(cluster.directory / "credentials"), *options],
        cwd=cluster.directory,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def examine(cluster: Cluster, *options: str) -> Report:
    return Report(call(cluster, "--json", *options))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        (tmp_path / "credentials").mkdir(0o700)
        yield cluster


def credential(cluster: Cluster, name: str, content: str, mode: int = 0o600) -> Path:
    path = cluster.directory / "credentials" / name
    path.write_text(content)
    path.chmod(mode)
    return path


def change(cluster: Cluster, **sections: Any) -> None:
    for name, values in sections.items():
        if name in cluster.settings["fedcore"]:
            cluster.settings["fedcore"][name] |= values
        elif isinstance(values, dict) and name in cluster.settings:
            cluster.settings[name] |= values
        else:
            cluster.settings[name] = values
    cluster.yaml.write_text(yaml.safe_dump(cluster.settings))


def test_a_healthy_host_before_and_after_the_start(cluster: Cluster) -> None:
    cluster.start_redis()
    report = examine(cluster)
    assert (report.code, report.bad()) == (0, [])
    assert {found[0] for found in report.findings} == {
        *("configuration", "files", "model", "ledgers", "checkpoints", "ports", "redis", "clock", "nodes")
    }
    assert report.of("nodes") == [("ok", "Redis lists no server that is alive", "")]
    assert (
        report.of("model")[0][1]
        == f"{cluster.directory}/model.safetensors, the initial one: 2 weights, 8 values"
    )
    cluster.start_server()
    report = examine(cluster, "--role", "server")
    assert (report.code, report.bad()) == (0, [])
    assert report.of("daemons") == [("ok", "fl-serverd@0 is ready", "")]
    assert report.of("nodes") == [("ok", f"reachable: 127.0.0.1:{cluster.tcp}", "")]
    cluster.run_iteration(1, {"one": 1, "two": 1})
    cluster.weights(1)
    assert "of iteration 1: 2 weights" in examine(cluster).of("model")[0][1]


def test_the_text_for_people(cluster: Cluster) -> None:
    done = call(cluster)
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert f"ok      configuration: {cluster.yaml} is good for scheduler and server" in lines
    assert lines[-2].startswith(f"failed  redis: 127.0.0.1:{cluster.redis_port}: Connection was refused")
    assert lines[-1].startswith("        -> until then no daemon is ready; check distributed_cache.address")


def test_faults_of_the_configuration_are_told_once_for_all_roles(cluster: Cluster) -> None:
    change(cluster, fl_iteration_num=0, nonsense=1)
    report = examine(cluster)
    assert report.code == 1
    (level, text, _), *more = report.of("configuration")
    assert level == "failed" and "'fl_iteration_num': value is expected to be range of [1," in text
    ((level, text, _),) = more
    assert level == "warning" and text.startswith("The parameter 'nonsense' in line ")


def test_what_one_daemon_cannot_serve(cluster: Cluster) -> None:
    asked = {"share_secrets_ratio": 1.0, "cipher_time_window": 300000, "reconstruct_secrets_threshold": 1}
    change(cluster, encrypt={"encrypt_type": "STABLE_PW_ENCRYPT", "pw_encrypt": asked})
    report = examine(cluster)
    assert [level for level, *_ in report.of("configuration")] == ["failed", "ok"]
    assert report.of("configuration")[1][1].endswith("is good for scheduler")


def test_a_model_that_is_none(cluster: Cluster) -> None:
    (cluster.directory / "model.safetensors").write_bytes(b"nonsense")
    assert examine(cluster).of("model")[0][0] == "failed"
    change(cluster, server={"model": ""})
    level, text, remedy = examine(cluster).of("model")[0]
    assert level == "warning" and "no checkpoint of job in" in text and "--model FILE" in remedy


def test_taken_ports(cluster: Cluster) -> None:
    cluster.start_redis()
    with socket.socket() as other:
        other.bind(("127.0.0.1", cluster.http + 1))
        other.listen()
        report = examine(cluster, "--role", "server", "--servers", "2")
    assert [level for level, *_ in report.of("ports")] == ["ok", "failed"]
    assert report.of("ports")[1][1] == f"127.0.0.1:{cluster.http + 1}, devices of fl-serverd@1: taken"
    change(cluster, server={"http_address": "192.0.2.1:6666"})
    assert "no such address on this host" in examine(cluster).of("ports")[1][1]
    change(cluster, server={"http_address": "127.0.0.1:65535"})
    report = examine(cluster, "--servers", "2")
    assert report.of("ports")[-1][1] == "Instance 1 cannot listen on port 65535 + 1: ports are 1..65535"


def test_a_server_that_is_not_ready(cluster: Cluster) -> None:
    cluster.start_server(ready=False)
    level, text, _ = examine(cluster, "--role", "server").of("daemons")[0]
    assert level == "warning" and "fl-serverd@0 is not ready: " in text and "Redis" in text


def test_a_server_that_cannot_be_reached(cluster: Cluster) -> None:
    """Redis says that it lives, but nobody listens at its address."""
    cluster.start_redis()
    cluster.start_server()
    with socket.create_connection(("127.0.0.1", cluster.redis_port)) as redis:
        lines = redis.makefile("rb")
        redis.sendall(b"GET ms_fl:job:InstanceName:String\r\n")
        lines.readline()
        prefix = "ms_fl:job:" + lines.readline().decode().strip()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{closed.getsockname()[1]}"
        cluster.redis("SET", f"{prefix}:server:heartbeat:other:String", gone)
        cluster.redis("HSET", f"{prefix}:server:Hash", "dead", "127.0.0.1:1", "other", gone)
        report = examine(cluster)
    found = {text.partition(" ")[0]: level for level, text, _ in report.of("nodes")}
    assert found == {"reachable:": "ok", gone: "failed"}


# ---- Redis


def test_a_password(cluster: Cluster) -> None:
    with private_redis(cluster.directory / "redis", options={"requirepass": "secret"}) as redis:
        cluster.use_redis(redis.port)
        level, text, _ = examine(cluster).of("redis")[0]
        assert level == "failed" and "Redis asks for a password" in text
        credential(cluster, "redis-password", "wrong\n")
        assert "WRONGPASS" in examine(cluster).of("redis")[0][1]
        credential(cluster, "redis-password", "secret\n")
        assert examine(cluster).of("redis")[0][0] == "ok"
        credential(cluster, "redis-password", "secret\n", 0o644)
        ((level, text, remedy),) = examine(cluster).of("passwords")
        assert (level, remedy) == ("warning", f"chmod 600 {cluster.directory}/credentials/redis-password")
        cluster.settings["fedcore"]["redis"] = {"password_file": "own"}
        change(cluster)
        (cluster.directory / "own").write_text("\n")
        (cluster.directory / "own").chmod(0o600)
        report = examine(cluster)
        assert report.of("passwords")[0][0] == "failed" and report.of("redis")[0][0] == "failed"


def test_sentinels(cluster: Cluster) -> None:
    with sentinel_group(cluster.directory / "group") as group:
        cluster.settings["fedcore"]["redis"] = {"sentinels": group.sentinels}
        change(cluster)
        ((level, text, _),) = examine(cluster).of("redis")
        assert level == "ok" and "fl of the Sentinels" in text and "1 replicas follow" in text


def test_a_redis_that_stands_still_is_not_waited_for(cluster: Cluster) -> None:
    with private_redis(cluster.directory / "redis") as redis:
        cluster.use_redis(redis.port)
        cluster.settings["fedcore"]["redis"] = {"reply_timeout": 0.5, "connect_timeout": 0.5}
        change(cluster)
        with redis.paused():
            ((level, text, _),) = examine(cluster).of("redis")
    assert level == "failed" and "it does not answer" in text


# ---- TLS


def test_certificates(cluster: Cluster) -> None:
    certificate = make_p12(cluster.directory / "server.p12", b"secret")
    (cluster.directory / "ca.crt").write_bytes(certificate.certificate_pem())
    change(
        cluster,
        enable_ssl=True,
        ssl={
            "server_cert_path": "server.p12",
            "client_cert_path": "server.p12",
            "ca_cert_path": "ca.crt",
            "cipher_list": "ECDHE-ECDSA-AES256-GCM-SHA384",
        },
        distributed_cache={"cacert_filename": "ca.crt"},
    )
    ((level, text, _),) = examine(cluster).of("passwords")
    assert level == "warning" and "no password for server.p12" in text
    credential(cluster, "server-password", "secret")
    found = examine(cluster).of("certificates")
    assert [level for level, *_ in found] == ["warning", "warning"]  # good for a day
    assert [text.rpartition(" (")[2].partition(")")[0] for _, text, _ in found] == [
        "ssl.server_cert_path",
        "distributed_cache.cacert_filename",
    ]
    credential(cluster, "server-password", "wrong")
    assert examine(cluster).of("certificates")[0][0] == "failed"
    (cluster.directory / "server.p12").unlink()
    ((level, text, _),) = examine(cluster).of("files")
    assert level == "failed" and text.endswith("server.p12 (ssl.server_cert_path): it is not there")


def test_no_configuration(cluster: Cluster) -> None:
    cluster.yaml.unlink()
    report = examine(cluster)
    assert report.code == 1 and report.findings[0][2] == f"yaml config file {cluster.yaml} not exist"


@pytest.mark.skipif(os.path.exists("/etc/fl/fl.yaml"), reason="this host is deployed")
def test_a_host_that_is_not_deployed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedctl", "doctor"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.splitlines()) == (
        1,
        [
            "failed  configuration: there is no /etc/fl/fl.yaml",
            "        -> deploy this host (ansible/site.yml), or give --yaml-config FILE",
        ],
    )
