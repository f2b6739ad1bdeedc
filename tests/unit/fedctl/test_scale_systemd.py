"""``fl scale`` with systemd: the command itself, with real readiness listeners and a stand-in for systemctl."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fedctl import deployed
from fedctl.__main__ import main
from fedctl.scale import systemd

STAND_IN = Path(__file__).with_name("systemctl.py")
READY = 200, {"ready": True}
NOT_READY = 503, {"ready": False, "reasons": {"redis": "no connection to Redis"}}
UP = {"ActiveState": "active", "SubState": "running", "MainPID": "4711"}
STARTING = {"ActiveState": "activating", "SubState": "start", "Job": "5"}
FAILED = {"ActiveState": "failed", "SubState": "failed", "Result": "exit-code", "ExecMainStatus": "78"}
YAML = """
fl_name: job
fl_iteration_num: 1
server_mode: FEDERATED_LEARNING
enable_ssl: false
distributed_cache: {{address: "127.0.0.1:1"}}
round: {{start_fl_job_threshold: 1, start_fl_job_time_window: 1000, update_model_ratio: 1.0,
         update_model_time_window: 1000, global_iteration_time_window: 1000}}
summary: {{metrics_file: m, failure_event_file: e}}
fedcore: {{server: {{admin_address: "127.0.0.1:{port}"}}}}
"""


class Host:
    """A host with systemd, pretended; one admin listener, that of server 0, is real."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.answers: list[tuple[int, dict[str, Any]]] = [READY]
        (folder / "enabled").mkdir()
        (folder / "fl.yaml").write_text(YAML.format(port=port))

    def write(self, name: str, **values: Any) -> None:
        (self.folder / f"{name}.json").write_text(
            json.dumps({key.removeprefix("_").replace("_", "-"): value for key, value in values.items()})
        )

    def enable(self, *instances: int) -> None:
        for instance in instances:
            (self.folder / "enabled" / f"fl-serverd@{instance}.service").touch()

    @property
    def enabled(self) -> list[str]:
        return sorted(os.listdir(self.folder / "enabled"))

    @property
    def changes(self) -> list[str]:
        """What systemctl was told to change."""
        calls = (self.folder / "calls").read_text().splitlines()
        told = [call.partition(" --no-ask-password ")[2] for call in calls if "--no-ask-password" in call]
        assert all(" --no-block " in call for call in told if call.startswith(("enable", "disable")))
        return [call.replace(" --no-block", "").replace(".service", "") for call in told]

    @staticmethod
    def scale(*words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["scale", *words], prog_name="fl")
        assert result.exit_code == code, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers = host.answers
            status, body = answers[0]
            if len(answers) > 1:
                del answers[0]
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("systemctl", "journalctl"):
        program = programs / name
        program.write_text(f"#!{sys.executable} -IS\n{STAND_IN.read_text()}")
        program.chmod(0o755)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        host = Host(tmp_path, server.server_address[1])
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        monkeypatch.setenv("STAND_IN", str(tmp_path))
        monkeypatch.setattr(systemd, "LINKS", tmp_path / "enabled")
        monkeypatch.setattr(systemd, "_LOOK_S", 0.01)
        monkeypatch.setattr(deployed, "CONFIGURATION", tmp_path / "fl.yaml")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield host
        server.shutdown()
        thread.join()


def test_a_first_server(host: Host) -> None:
    host.write("next", _0=[STARTING, STARTING, UP | {"StatusText": "iteration 1 of 25"}])
    host.answers = [NOT_READY, NOT_READY, READY]
    lines = host.scale("1").stdout.splitlines()
    assert lines[:3] == [
        "enabled and started: fl-serverd@0",
        "fl-serverd@0: activating (start)",
        "fl-serverd@0: not ready: no connection to Redis",
    ]
    assert lines[3].startswith("fl-serverd@0: ready after ")
    assert lines[4:] == [
        "fl-serverd@0  enabled, running  pid 4711  devices 127.0.0.1:6666  nodes 6766  "
        f"admin 127.0.0.1:{host.port}  ready  [iteration 1 of 25]"
    ]
    assert host.changes == ["enable --now fl-serverd@0"]


def test_nothing_to_do(host: Host) -> None:
    host.enable(0)
    host.write("units", _0=[UP])
    assert host.scale("1").stdout.startswith("fl-serverd@0  enabled, running")
    assert host.changes == []


def test_out_and_in(host: Host) -> None:
    """Server 1 has no listener and gets no time: what stands here is what was ordered."""
    host.enable(0)
    host.write("units", _0=[UP])
    assert (
        "fl-serverd@1 goes on, but is not ready within 0 s: no answer"
        in host.scale("2", "--ready-timeout", "0", code=1).stderr
    )
    assert host.scale("0").stdout.splitlines() == [
        "disabled and asked to end: fl-serverd@1, fl-serverd@0",
        "fl-serverd@1: ended",
        "fl-serverd@0: ended",
        "no server is enabled or running on this host; to have two: fl scale 2",
    ]
    assert host.changes == ["enable --now fl-serverd@1", "disable --now fl-serverd@1 fl-serverd@0"]
    assert host.enabled == []


def test_what_is_there_is_shown(host: Host) -> None:
    host.enable(0, 1)
    host.write("units", _0=[UP], _2=[UP], _3=[FAILED])
    lines = host.scale().stdout.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["fl-serverd@0", "enabled, running"],
        ["fl-serverd@1", "enabled, but not running (systemctl start fl-serverd@1)"],
        ["fl-serverd@2", "running, but not enabled: a reboot ends it (systemctl enable fl-serverd@2)"],
        ["fl-serverd@3", "not enabled, failed, exit-code 78 (systemctl status fl-serverd@3)"],
    ]
    assert host.changes == []


def test_nothing_is_there(host: Host) -> None:
    assert host.scale().stdout == "no server is enabled or running on this host; to have two: fl scale 2\n"


def test_a_server_that_runs_is_only_enabled(host: Host) -> None:
    host.write("units", _0=[UP])
    host.scale("1")
    assert host.changes == ["enable --now fl-serverd@0"]
    assert host.enabled == ["fl-serverd@0.service"]


def test_a_failed_server_is_given_another_try(host: Host) -> None:
    host.enable(0)
    host.write("units", _0=[FAILED])
    host.scale("1")
    assert host.changes == ["reset-failed fl-serverd@0", "enable --now fl-serverd@0"]


@pytest.mark.parametrize(("end", "words"), [(FAILED, "exit-code 78"), ({}, "inactive (dead)")])
def test_a_start_in_vain(host: Host, end: dict[str, str], words: str) -> None:
    host.write("next", _0=[STARTING, end])
    errors = host.scale("1", code=1).stderr
    assert (
        f"fl-serverd@0 has ended: {words}; its journal ends with:\nthe first line\nthe last line\n" in errors
    )
    assert errors.endswith("see: systemctl status fl-serverd@0, journalctl -u fl-serverd@0\n")


def test_a_server_that_is_started_again_and_again(host: Host) -> None:
    again = {
        "ActiveState": "activating",
        "SubState": "auto-restart",
        "Result": "exit-code",
        "ExecMainStatus": "1",
    }
    host.write("next", _0=[again])
    result = host.scale("1", "--ready-timeout", "0.2", code=1)
    assert "fl-serverd@0: activating (auto-restart), exit-code 1\n" in result.stdout
    assert (
        "fl-serverd@0 goes on, but is not ready within 0.2 s: activating (auto-restart), exit-code 1;"
        in result.stderr
    )


def test_a_server_that_is_not_ready_in_time(host: Host) -> None:
    host.answers = [NOT_READY]
    errors = host.scale("1", "--ready-timeout", "0.2", code=1).stderr
    assert "is not ready within 0.2 s: not ready: no connection to Redis; its journal ends with:" in errors


def test_nothing_is_stopped_after_a_start_in_vain(host: Host) -> None:
    host.enable(5)
    host.write("units", _5=[UP])
    host.write("next", _0=[FAILED])
    host.scale("1", code=1)
    assert host.changes == ["enable --now fl-serverd@0"]


def test_a_server_that_does_not_end(host: Host) -> None:
    stopping = {"ActiveState": "deactivating", "SubState": "stop-sigterm"}
    host.enable(0)
    host.write("units", _0=[UP])
    host.write("end", _0=[stopping])
    errors = host.scale("0", "--drain-timeout", "0.1", code=1).stderr
    assert (
        "not ended within 0.1 s: fl-serverd@0 (deactivating (stop-sigterm)); systemd kills them when"
        in errors
    )
    output = host.scale("0", "--drain-timeout", "0.1", "--kill").stdout
    assert "killed, they went on after 0.1 s: fl-serverd@0\nfl-serverd@0: ended\n" in output
    assert "kill --signal=SIGKILL fl-serverd@0" in host.changes


def test_an_end_in_failure_is_told_and_forgotten(host: Host) -> None:
    host.enable(0)
    host.write("units", _0=[UP])
    host.write("end", _0=[FAILED | {"Result": "timeout"}])
    output = host.scale("0").stdout
    assert "fl-serverd@0: ended (timeout)\n" in output
    assert output.endswith("no server is enabled or running on this host; to have two: fl scale 2\n")
    assert host.changes[-1] == "reset-failed fl-serverd@0"


def test_who_is_not_root_is_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.write("fails", enable=[1, "Failed to enable unit: Access denied"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert host.scale("1", code=1).stderr == (
        "Error: systemctl enable: Failed to enable unit: Access denied; units belong to root: repeat the command with "
        "sudo\n"
    )


def test_a_systemd_that_does_not_answer(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.write("fails", show=[-1, ""])
    monkeypatch.setattr(systemd, "ANSWER_S", 0.5)
    assert "does not end within 0.5 s: is systemd well?" in host.scale(code=1).stderr


@pytest.mark.parametrize("says", ["", "-- No entries --"])
def test_a_journal_that_is_not_to_be_had(host: Host, says: str) -> None:
    host.write("next", _0=[FAILED])
    journalctl = host.folder / "bin" / "journalctl"
    journalctl.write_text(f"#!/bin/sh\necho '{says}'\nexit 1\n")
    errors = host.scale("1", code=1).stderr
    assert errors.startswith(
        "Error: fl-serverd@0 has ended: exit-code 78; see: systemctl status fl-serverd@0"
    )


def test_a_host_where_nothing_was_ever_enabled(host: Host) -> None:
    (host.folder / "enabled").rmdir()
    assert host.scale().stdout.startswith("no server is enabled or running on this host")


def test_a_host_without_the_unit(host: Host) -> None:
    host.write("fails", cat=[1, "No files found for fl-serverd@.service.\nmore"])
    errors = host.scale("1", code=1).stderr
    assert "servers are no units of systemd on this host (No files found for fl-serverd@.service.)" in errors
    assert "or give --yaml-config FILE" in errors


def test_a_host_without_systemd(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(host.folder))
    assert "(there is no systemctl on this host)" in host.scale(code=1).stderr


def test_a_host_without_a_configuration(host: Host) -> None:
    (host.folder / "fl.yaml").unlink()
    assert "fl.yaml, which fl-serverd@.service reads; deploy this host" in host.scale("1", code=1).stderr
    assert host.changes == []


def test_a_bad_configuration_starts_nothing(host: Host) -> None:
    file = host.folder / "fl.yaml"
    file.write_text(file.read_text().replace("fl_iteration_num: 1", "fl_iteration_num: 0"))
    assert "'fl_iteration_num'" in host.scale("1", code=1).stderr
    assert host.changes == []


def test_options_of_processes_are_not_for_units(host: Host) -> None:
    for words in (["--run-dir", "x"], ["2", "--", "--model", "x"]):
        assert "are for processes: give --yaml-config as well" in host.scale(*words, code=2).stderr
