"""``fl state``: what it prints, and its one line where there is nothing to print."""

import json
import pathlib
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner

from fedcore.config import Settings
from fedctl import deployed
from fedctl import state as state_module
from fedctl.__main__ import main
from fedctl.processes import free_ports
from fedctl.state import SCHEDULER, scheduler_of

READY = {
    "cluster_state": "CLUSTER_READY",
    "code": "0",
    "message": "Get cluster state successful.",
    "nodes": [{"node_id": "10.0.0.7:6766::2026", "role": "SERVER", "tcp_address": "10.0.0.7:6766"}],
}


@pytest.fixture
def scheduler():
    """A scheduler that answers ``server.answer``: a status and a body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = self.server.answer
            self.server.paths.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.answer, server.paths = (200, json.dumps(READY).encode()), []
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(*arguments):
    return CliRunner().invoke(main, ["state", *arguments], prog_name="fl")


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_cluster_with_a_server(scheduler, slash):
    result = run("--scheduler", scheduler.url + slash)
    assert result.exit_code == 0, result.output
    assert "CLUSTER_READY" in result.stdout
    assert "SERVER" in result.stdout
    assert "10.0.0.7:6766" in result.stdout
    assert scheduler.paths == ["/state"]


def test_the_answer_as_it_is(scheduler):
    result = run("--scheduler", scheduler.url, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == READY


def test_nobody_there(scheduler):
    scheduler.answer = 200, b'{"code":"0","message":"Get cluster state successful."}'
    result = run("--scheduler", scheduler.url)
    assert result.exit_code == 0
    assert result.stdout == "the state is unknown\nno node is alive\n"


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (
            400,
            b'{"code":"1","error_message":"Cannot find cluster info for x"}',
            "refuses: Cannot find cluster info",
        ),
        (404, b"<html>", "is no scheduler"),
        (200, b"<html>", "is no scheduler"),
        (200, b"[]", "is no scheduler"),
        (500, b"{}", "refuses: HTTP status 500"),
    ],
)
def test_a_refusal_is_one_line(scheduler, status, body, message):
    scheduler.answer = status, body
    result = run("--scheduler", scheduler.url)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}", "nonsense", "http://[", "https://127.0.0.1:{port}"]
)
def test_nobody_to_ask_is_one_line(url):
    url = url.format(port=free_ports(1)[0])
    result = run("--scheduler", url)
    assert result.exit_code == 1
    assert f"the scheduler at {url} cannot be asked" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_ca_file_is_one_line(scheduler):
    result = run("--scheduler", scheduler.url, "--ca-file", "/nonexistent.pem")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


def test_a_proxy_is_not_asked(scheduler, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_ports(1)[0]}")
    assert run("--scheduler", scheduler.url).exit_code == 0


# ---- --watch


def test_a_watch_tells_changes_and_ends_quietly_with_ctrl_c(scheduler):
    command = [
        sys.executable,
        "-m",
        "fedctl",
        "state",
        "--watch",
        "--interval",
        "0.1",
        "--scheduler",
        scheduler.url,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:

            def told():
                return process.stdout.readline().rstrip("\n").partition(" ")[2]

            assert told() == "CLUSTER_READY"
            assert told() == "here: SERVER 10.0.0.7:6766 (10.0.0.7:6766::2026)"
            scheduler.answer = 400, b'{"code":"1","error_message":"Please retry later."}'
            assert told() == f"the scheduler at {scheduler.url} refuses: Please retry later."
            scheduler.answer = 200, b'{"cluster_state":"CLUSTER_DISABLE"}'
            assert [told() for _ in range(3)] == [
                "the scheduler answers again",
                "CLUSTER_DISABLE",
                "gone: SERVER 10.0.0.7:6766 (10.0.0.7:6766::2026)",
            ]
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30) == ("", "")
        finally:
            process.kill()
    assert process.returncode == 0


def test_watch_and_json_exclude_each_other():
    result = run("--watch", "--json")
    assert result.exit_code == 2
    assert "exclude each other" in result.stderr


def test_the_scheduler_of_a_configuration(tmp_path):
    address = f"127.0.0.1:{free_ports(1)[0]}"
    path = tmp_path / "fl.yaml"
    path.write_text(
        f"""
fl_name: job
fl_iteration_num: 1
server_mode: FEDERATED_LEARNING
enable_ssl: false
distributed_cache: {{type: redis, address: "127.0.0.1:6379"}}
fedcore: {{scheduler: {{manage_address: "{address}"}}}}
"""
    )
    assert f"the scheduler at http://{address} cannot" in run("--yaml-config", str(path)).stderr
    given = run("--yaml-config", str(path), "--scheduler", "http://[")
    assert "the scheduler at http://[ cannot" in given.stderr


def test_a_scheduler_with_a_certificate():
    assert scheduler_of(Settings(enable_ssl=True)) == "https://127.0.0.1:11202"
    assert scheduler_of(Settings()) == SCHEDULER


def test_a_configuration_that_cannot_be_used(tmp_path):
    result = run("--yaml-config", str(tmp_path / "none.yaml"))
    assert result.exit_code == 1
    assert result.stderr == f"Error: yaml config file {tmp_path}/none.yaml not exist\n"


# ---- a deployed host


@pytest.fixture
def deployed_host(tmp_path, monkeypatch):
    """The configuration of a deployed host, whose scheduler listens nowhere."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    path = tmp_path / "fl.yaml"
    path.write_text(
        f"""
fl_name: job
fl_iteration_num: 1
server_mode: FEDERATED_LEARNING
enable_ssl: false
distributed_cache: {{address: "127.0.0.1:6379"}}
fedcore: {{scheduler: {{manage_address: "{address}"}}}}
"""
    )
    monkeypatch.setattr(deployed, "CONFIGURATION", path)
    return path, address


def test_a_deployed_host_needs_no_options(deployed_host):
    _, address = deployed_host
    assert f"the scheduler at http://{address} cannot" in run().stderr


def test_an_option_comes_before_the_hosts_configuration(deployed_host, scheduler):
    path, _ = deployed_host
    path.write_text("nonsense")
    assert run("--scheduler", scheduler.url).exit_code == 0
    assert "Expect content of yaml config file" in run().stderr


def test_who_may_not_read_the_hosts_configuration_is_told(deployed_host, monkeypatch):
    def refuse(self, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", refuse)  # root may read anything
    assert run().stderr == (
        f"Error: {deployed_host[0]} cannot be read by this user: repeat the command with sudo, or join the group fl\n"
    )


def test_no_deployed_host(tmp_path, monkeypatch):
    monkeypatch.setattr(deployed, "CONFIGURATION", tmp_path / "none" / "fl.yaml")
    assert deployed.find_configuration() is None


def test_the_authorities_of_the_configuration_are_trusted(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(state_module, "ask", lambda *words: asked.append(words) or READY)
    path = tmp_path / "fl.yaml"
    path.write_text(
        """
fl_name: job
fl_iteration_num: 1
server_mode: FEDERATED_LEARNING
enable_ssl: true
distributed_cache: {address: "127.0.0.1:6379", cacert_filename: /x/ca.crt}
ssl: {server_cert_path: /x/s.p12, client_cert_path: /x/c.p12, ca_cert_path: /x/ca.crt,
      cipher_list: ECDHE-RSA-AES128-GCM-SHA256}
fedcore: {scheduler: {manage_address: "0.0.0.0:11202"}}
"""
    )
    assert run("--yaml-config", str(path)).exit_code == 0
    assert run("--yaml-config", str(path), "--ca-file", "/y").exit_code == 0
    assert asked == [
        ("https://127.0.0.1:11202", "/state", "/x/ca.crt"),
        ("https://127.0.0.1:11202", "/state", "/y"),
    ]
