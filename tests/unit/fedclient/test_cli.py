"""``fl-client``: options, exit codes, JSON lines, signals."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import scripted_server as server
from click.testing import CliRunner
from scripted_server import Script, ScriptedServer

import fedclient
from fedclient.__main__ import main, parse_settings
from fedcore.wire.codec import decode
from fedcore.wire.messages import CipherPublicParams, DPParams, DSParams, RequestFLJob

TRAINER = """
from fedclient import FitResult

class Adder:
    def __init__(self, size=4, name="x"):
        self.size = size

    def load(self):
        return self.size, 1

    def fit(self, weights, config):
        return FitResult({name: values + 1 for name, values in weights.items()}, 0.5)

    def evaluate(self, weights):
        return 0.25

class Stepper(Adder):
    def step(self, weights, step):
        return FitResult({name: values + 1 for name, values in weights.items()}, 0.5)

class Sleepless(Adder):
    def load(self):
        raise OSError("no data")

class NoTrainer:
    def load(self):
        pass
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command in a directory that holds ``adder_trainer.py``."""
    (tmp_path / "adder_trainer.py").write_text(TRAINER)
    (tmp_path / "broken_trainer.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda *arguments: CliRunner().invoke(main, arguments, prog_name="fl-client")
    sys.modules.pop("adder_trainer", None)


@pytest.fixture
def job():
    """A server of a whole job of three iterations; its script remembers the requests."""
    script = Script(*(a for k in (1, 2, 3) for a in (server.started(k), server.updated(), server.model())))

    def answer(path, headers, body):
        status, reply = script(path, body)
        return status, {}, reply

    with ScriptedServer(answer) as running:
        running.script = script
        yield running


@pytest.mark.parametrize("names", [("--fl-name", "--client-id"), ("--fl_name", "--client_id")])
def test_a_job(run, job, names):
    fl_name, client_id = names
    result = run(
        *("--server", job.url, "--trainer", "adder_trainer:Adder", "--set", "size=7", "--set", "name=digits"),
        *(fl_name, "job-1", client_id, "device-1", "--json", "--log-level", "warning"),
    )
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line.pop("seconds") >= 0 for line in lines] == [True] * 3
    assert lines == [
        {"iteration": k, "outcome": "completed", "loss": 0.5, "accuracy": 0.25} for k in (1, 2, 3)
    ]
    request = decode(RequestFLJob, job.script.asked[0][1])
    assert (request.fl_name, request.fl_id, request.data_size) == ("job-1", "device-1", 7)


def test_a_device_stops_before_its_budget_is_overspent(run):
    cipher = CipherPublicParams("SIGNDS", None, DPParams(), DSParams(0.25, 5.0, 0.6, 0.1, 2))
    script = Script(
        *(
            reply
            for k in (1, 2, 3)
            for reply in (
                server.started(k, fl_plan_config=server.plan(cipher=cipher)),
                server.updated(),
                server.model(),
            )
        )
    )

    def answer(path, headers, body):
        status, reply = script(path, body)
        return status, {}, reply

    with ScriptedServer(answer) as job:
        result = run("--server", job.url, "--trainer", "adder_trainer:Adder", "--max-epsilon", "10", "--json")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 2
    assert len(script.asked) == 6, "it takes no place that it would not use"


def test_several_servers(run, job):
    with ScriptedServer(lambda *_: None) as broken:
        result = run(
            *("--server", broken.url, "--server", job.url, "--trainer", "adder_trainer:Adder"),
            *("--poll-interval", "0.1", "--client-id", "device-2"),
        )
    assert result.exit_code == 0, result.output


def test_without_json_stdout_is_empty(run, job):
    result = run("--server", job.url, "--trainer", "adder_trainer:Adder")
    assert (result.exit_code, result.stdout) == (0, "")


def test_the_end_of_the_job_is_success(run):
    with ScriptedServer(lambda *_: (200, {}, server.OVER)) as over:
        assert run("--server", over.url, "--trainer", "adder_trainer:Adder").exit_code == 0


def test_a_failure_exits_with_1(run, job):
    assert run("--server", job.url, "--trainer", "adder_trainer:Sleepless").exit_code == 1


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"--trainer": "adder_trainer"}, "module:Class"),
        ({"--trainer": "no_such_module:Adder"}, r"'no_such_module' \(looked for in the working directory"),
        ({"--trainer": "broken_trainer:Adder"}, "install what has the module nowhere_to_be_found"),
        ({"--trainer": "adder_trainer:Other"}, "Other"),
        ({"--trainer": "adder_trainer:NoTrainer"}, r"no fit\(\), evaluate\(\) \(see fedclient.Trainer\)"),
        ({"--set": "colour=1"}, "colour"),
        ({"--set": "size"}, "key=value"),
        ({"--server": "nowhere"}, "nowhere"),
        ({"--ca-file": "missing.pem", "--server": "https://127.0.0.1:1"}, "missing.pem"),
        ({"--poll-interval": "0"}, "poll_interval"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(run, changes, word):
    options = {"--server": "http://127.0.0.1:1", "--trainer": "adder_trainer:Adder"} | changes
    result = run(*(text for option in options.items() for text in option))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert re.search(word, result.stderr)


def test_help_shows_examples(run):
    result = run("--help")
    assert result.exit_code == 0
    for part in (
        "Examples:",
        "--server https://fl-1:6666",
        "--fl-name",
        "--poll-interval",
        "a second one",
        "Exit codes:",
    ):
        assert part in result.stdout


def test_values_are_json_or_text():
    pairs = ("a=1", "b=0.5", "c=true", "d=text", "e=[1, 2]", 'f="1"', "g=", "h=x=y")
    assert parse_settings(pairs) == {
        **{"a": 1, "b": 0.5, "c": True, "d": "text", "e": [1, 2], "f": "1", "g": "", "h": "x=y"}
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["in a request", "asleep"])
def test_signals_stop_it(tmp_path, number, where):
    (tmp_path / "adder_trainer.py").write_text(TRAINER)
    hang = where == "in a request"
    reply = (ScriptedServer.hang, {}, b"") if hang else (200, {}, server.SAFEMODE)
    with ScriptedServer(lambda *_: reply) as running:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "fedclient", "--server", running.url, "--json"),
                *("--trainer", "adder_trainer:Adder", "--log-level", "debug"),
            ],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(fedclient.__file__).parents[1])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert running.asked.wait(30)
        if not hang:
            assert any("waiting" in line for line in process.stderr)
        process.send_signal(number)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "stopped on request" in errors


SILO = ("--trainer", "adder_trainer:Stepper", "--rule", "fednova", "--sync-frequency", "5")


def test_a_cloud_worker(run):
    cloud = server.plan(server_mode="CLOUD_TRAINING", iterations=1)
    new = {name: values + 1 for name, values in server.MODEL.items()}
    script = Script(
        server.started(1, fl_plan_config=cloud, feature_map=()),
        server.model(),
        server.updated(),
        server.model(weights=new),
    )
    with ScriptedServer(lambda path, headers, body: (200, {}, script(path, body)[1])) as running:
        result = run(
            "--server", running.url, *SILO, "--client-id", "silo-1", "--json", "--log-level", "error"
        )
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["outcome"] for line in result.stdout.splitlines()] == ["completed"]
    assert script.rounds == ["/startFLJob", "/getModel", "/updateModel", "/getModel"]
    start = decode(RequestFLJob, script.asked[0][1])
    assert (start.data_size, start.fl_id, start.fl_name) == (5, "silo-1", "Stepper")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--trainer", "adder_trainer:Adder", "--sync-frequency", "5"), "are for cloud workers: add --rule"),
        (("--trainer", "adder_trainer:Adder", "--iid-rate", "0.5"), "are for cloud workers: add --rule"),
        (
            ("--trainer", "adder_trainer:Adder", "--sync-type", "adaptive"),
            "are for cloud workers: add --rule",
        ),
        (("--trainer", "adder_trainer:Stepper", "--rule", "fedavg"), "needs --sync-frequency"),
        ((*SILO, "--sync-frequency", "0"), "sync_frequency is 0"),
        ((*SILO, "--rule", "fedprox"), "iid_rate"),
        ((*SILO, "--max-epsilon", "3"), "are for devices, not for cloud workers: leave --rule out"),
        ((*SILO, "--error-feedback"), "are for devices, not for cloud workers: leave --rule out"),
        (("--trainer", "adder_trainer:Adder", "--clip-floor", "0"), "clip_floor is 0.0 (a number above 0)"),
        (("--trainer", "adder_trainer:Adder", "--max-epsilon", "-1"), "max_epsilon is -1.0"),
        ((*SILO, "--trainer", "adder_trainer:Adder"), "it has no step() (see fedclient.SiloTrainer)"),
    ],
)
def test_what_a_cloud_worker_cannot_be(run, arguments, fault):
    result = run("--server", "http://127.0.0.1:1", *arguments)
    assert result.exit_code == 2
    assert fault in result.output
