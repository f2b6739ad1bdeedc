"""The parts of ``fl demo`` that need no process."""

import io
import json
import signal
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from fedclient.rules import Rule
from fedcore.config import Role, load_settings
from fedcore.errors import ConfigError
from fedcore.models.formats import read_model
from fedcore.services.worker_trainer import load_trainer, read_options
from fedctl.demo import certificates, command, plan, report, view
from fedctl.demo.cluster import Progress, progress_of, read_metrics, read_reports
from fedctl.demo.command import Stopped, run_directory, stopping_on_signals, train
from fedctl.demo.plan import Addresses, Plan
from fedctl.demo.report import DeviceRecord, Examiner, IterationRecord, Report
from fedctl.processes import ChildFailed
from fedexamples import datasets, lenet, silo
from fedexamples.lenet_worker_numpy import WorkerOptions

PLAN = Plan("digits", devices=2, iterations=3, seed=1, alpha=0.5, torch=False)
SECURE = replace(PLAN, tls=True)
ADDRESSES = Addresses(*(f"127.0.0.1:{port}" for port in range(7001, 7008)))


@pytest.fixture
def figures():
    done = Report(PLAN, test_samples=360, seconds=9.0)
    done.iterations = [IterationRecord(k, 1.0 / k, 0.3 * k, 2, 0.5 * k) for k in (1, 2, 3)]
    done.devices = [
        DeviceRecord("device-0", {0: 5, 1: 0, 2: 90}, 3, 0.25, 0.5),
        DeviceRecord("device-1", {0: 1, 1: 0, 2: 0}, 0, None, None),
    ]
    return done


# ---- the plan


def test_the_daemons_understand_the_configuration(tmp_path):
    plan.write_configuration(tmp_path / "fl.yaml", PLAN, ADDRESSES)
    for role in (Role.SERVER, Role.SCHEDULER):
        loaded = load_settings(tmp_path / "fl.yaml", role)
        assert loaded.warnings == ()
    settings = load_settings(tmp_path / "fl.yaml", Role.SERVER).settings
    assert str(settings.distributed_cache.address) == ADDRESSES.redis
    assert str(settings.fedcore.server.http_address) == ADDRESSES.devices
    assert settings.fl_iteration_num == 3
    assert settings.round.start_fl_job_threshold == 2
    assert settings.client.client_epoch_num == lenet.EPOCHS
    assert yaml.safe_load((tmp_path / "fl.yaml").read_text())["fl_name"] == plan.FL_NAME


def test_with_tls_the_daemons_understand_it_and_openssl_the_certificates(tmp_path):
    plan.write_configuration(tmp_path / "fl.yaml", SECURE, ADDRESSES)
    for role in (Role.SERVER, Role.SCHEDULER):
        loaded = load_settings(tmp_path / "fl.yaml", role)
        assert loaded.warnings == ()
        assert loaded.settings.enable_ssl
    certificates.write_certificates(tmp_path, datetime.now(UTC))
    ssl = loaded.settings.ssl
    for name, option in (("server", ssl.server_cert_path), ("client", ssl.client_cert_path)):
        words = SECURE.daemon_arguments
        password = words[words.index(f"--{name}-password-file") + 1]
        opening = ["openssl", "pkcs12", "-in", option, "-passin", f"file:{password}", "-nokeys"]
        leaf = subprocess.run(opening, capture_output=True, check=True, cwd=tmp_path).stdout
        checking = ["openssl", "verify", "-CAfile", ssl.ca_cert_path, "-CRLfile", ssl.crl_path, "-crl_check"]
        checking += ["-verify_ip", "127.0.0.1"]
        done = subprocess.run(checking, input=leaf, capture_output=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_with_tls_devices_trust_its_authority_and_no_other():
    arguments = SECURE.device_arguments(0, ADDRESSES)
    assert arguments[arguments.index("--server") + 1] == f"https://{ADDRESSES.devices}"
    assert arguments[arguments.index("--ca-file") + 1] == "pki/ca.crt"
    assert "--ca-file" not in PLAN.device_arguments(0, ADDRESSES)
    assert PLAN.daemon_arguments == ["--yaml-config", "fl.yaml"]


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("encrypt", ["NOT_ENCRYPT", *plan.ENCRYPT_TYPES])
def test_the_daemons_understand_how_updates_are_protected(tmp_path, encrypt, compress):
    protected = replace(PLAN, devices=3, encrypt=encrypt, compress=compress)
    plan.write_configuration(tmp_path / "fl.yaml", protected, ADDRESSES)
    loaded = load_settings(tmp_path / "fl.yaml", Role.SERVER)
    assert loaded.warnings == ()
    settings = loaded.settings
    assert settings.encrypt.encrypt_type == encrypt
    packed = compress and encrypt in ("NOT_ENCRYPT", "DP_ENCRYPT")
    assert settings.compression.upload_compress_type == ("DIFF_SPARSE_QUANT" if packed else "NO_COMPRESS")
    assert settings.compression.download_compress_type == ("QUANT" if compress else "NO_COMPRESS")
    assert settings.encrypt.dp_encrypt.dp_eps == 50
    assert settings.encrypt.signds.sign_eps == 100


def test_the_budget_of_an_update_can_be_chosen(tmp_path):
    for encrypt, read in (
        ("DP_ENCRYPT", lambda encrypt: encrypt.dp_encrypt.dp_eps),
        ("SIGNDS", lambda encrypt: encrypt.signds.sign_eps),
    ):
        chosen = replace(PLAN, encrypt=encrypt, epsilon=2.5)
        plan.write_configuration(tmp_path / "fl.yaml", chosen, ADDRESSES)
        assert read(load_settings(tmp_path / "fl.yaml", Role.SERVER).settings.encrypt) == 2.5
        assert f"{encrypt} with epsilon 2.5" in report._title(chosen)


def test_one_device_cannot_mask_its_update():
    with pytest.raises(ConfigError, match="--devices 2 or more"):
        replace(PLAN, devices=1, encrypt="PW_ENCRYPT").check()
    replace(PLAN, devices=2, encrypt="PW_ENCRYPT").check()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--encrypt", "DP_ENCRYPT", "--silo"), "for devices alone"),
        (("--compress", "--hybrid"), "for devices alone"),
        (("--epsilon", "1"), "--epsilon is for --encrypt DP_ENCRYPT and SIGNDS"),
        (("--epsilon", "1", "--encrypt", "PW_ENCRYPT"), "--epsilon is for --encrypt DP_ENCRYPT and SIGNDS"),
        (("--encrypt", "ROT13"), "'ROT13' is not one of"),
    ],
)
def test_protection_that_does_not_go_together_is_refused(arguments, word):
    done = CliRunner().invoke(command.demo, arguments)
    assert done.exit_code == 2
    assert word in " ".join(done.output.split())


def test_the_first_model_is_the_examples(tmp_path):
    plan.write_initial_model(tmp_path / "initial.safetensors", seed=3)
    read = read_model(tmp_path / "initial.safetensors").weights
    for name, weight in lenet.initial_weights(3).items():
        np.testing.assert_array_equal(read[name], weight)


@pytest.mark.parametrize("rule", list(Rule))
def test_the_servers_of_silos_understand_theirs(tmp_path, rule):
    silos = replace(PLAN, devices=3, rule=rule)
    plan.write_configuration(tmp_path / "fl.yaml", silos, ADDRESSES)
    loaded = load_settings(tmp_path / "fl.yaml", Role.SERVER)
    assert loaded.warnings == ()
    assert loaded.settings.server_mode == "CLOUD_TRAINING"
    assert loaded.settings.aggregation.aggregation_type == rule
    assert loaded.settings.client.client_learning_rate == silo.LEARNING_RATE
    if rule is Rule.SCAFFOLD:
        assert loaded.settings.aggregation.total_client_num == 3


@pytest.mark.parametrize("rule", list(Rule))
def test_a_silo_is_a_cloud_worker(rule):
    silos = replace(PLAN, devices=3, rule=rule)
    arguments = silos.device_arguments(2, ADDRESSES)
    assert arguments[arguments.index("--rule") + 1] == rule
    assert arguments[arguments.index("--client-id") + 1] == "silo-2"
    assert arguments[arguments.index("--sync-frequency") + 1] == str(plan.SILO_STEPS)
    assert ("--iid-rate" in arguments) == (rule is Rule.FEDPROX)
    assert silos.trainer == "fedexamples.silo:LeNetSilo"
    assert "framework=torch" not in arguments
    assert "framework=torch" in replace(silos, torch=True).device_arguments(2, ADDRESSES)


def test_a_worker_and_its_servers_understand_theirs(tmp_path):
    without, beside = plan.beside_a_worker(PLAN)
    assert (without.server_mode, beside.server_mode) == ("FEDERATED_LEARNING", "HYBRID_TRAINING")
    plan.write_configuration(tmp_path / "fl.yaml", beside, ADDRESSES)
    for role in (Role.SERVER, Role.SCHEDULER, Role.WORKER):
        loaded = load_settings(tmp_path / "fl.yaml", role)
        assert loaded.warnings == ()
    assert loaded.settings.server_mode == "HYBRID_TRAINING"
    assert loaded.settings.client.client_epoch_num == plan.FEW_EPOCHS
    worker = loaded.settings.fedcore.worker
    assert worker.sync_frequency == plan.WORKER_STEPS
    assert str(worker.admin_address) == ADDRESSES.worker_admin
    trainer = load_trainer(worker.trainer, read_options(worker.options), worker.device)
    assert trainer.names == tuple(sorted(lenet.SHAPES))


def test_devices_train_alike_with_and_without_a_worker():
    without, beside = plan.beside_a_worker(PLAN)
    assert without.device_arguments(1, ADDRESSES) == beside.device_arguments(1, ADDRESSES)
    assert (without.epochs, without.learning_rate) == (beside.epochs, beside.learning_rate)
    assert f"labelled={plan.LABELLED}" in without.device_arguments(1, ADDRESSES)
    assert not any("labelled" in word for word in PLAN.device_arguments(1, ADDRESSES))


def test_a_worker_trains_with_torch_if_devices_do():
    assert replace(PLAN, torch=True, worker=True).worker_trainer == "fedexamples.lenet_worker:LeNetWorker"


def test_nobody_holds_what_another_one_does():
    data = datasets.load("digits")
    _, beside = plan.beside_a_worker(replace(PLAN, devices=8))
    shares = plan.divide(beside, data)
    assert [sum(share.values()) for share in shares] == [plan.LABELLED] * 8
    options = datasets.ShardOptions(shard=0, **beside.division)
    held = [set(part.tolist()) for part in datasets.divide(data.train_labels, options)]
    _, central = datasets._set_aside(data.train_labels, options)
    assert len(set(central.tolist()).union(*held)) == plan.WORKER_SAMPLES + 8 * plan.LABELLED
    assert np.bincount(data.train_labels[central]).min() >= plan.WORKER_SAMPLES // 10 - 3
    trainer = lenet.LeNetTrainer(shard=3, **beside.division)
    assert sum(trainer.load()) == plan.LABELLED
    worker = WorkerOptions.parse(beside.worker_options, "test").load()
    assert len(worker.train_labels) + len(worker.evaluation_labels) == plan.WORKER_SAMPLES
    images = np.concatenate([worker.train_images, worker.evaluation_images])
    assert {image.tobytes() for image in images} == {data.train_images[k].tobytes() for k in central}


def test_too_many_central_samples_say_how_many_there_are():
    options = datasets.ShardOptions(shard=0, shards=2, data="digits", seed=0, alpha=0.5, central=1438)
    with pytest.raises(ConfigError, match="central=1438 is too many for 1437 samples"):
        datasets.load_central(options)


def test_every_device_has_its_own_shard():
    arguments = [PLAN.device_arguments(shard, ADDRESSES) for shard in range(2)]
    assert arguments[0] != arguments[1]
    assert "shard=1" in arguments[1]
    assert "device-1" in arguments[1]
    assert PLAN.trainer in arguments[0]


def test_torch_is_asked_for_before_anything_starts(monkeypatch):
    torch = Plan("digits", 2, 3, 1, 0.5, torch=True)
    assert torch.trainer == "fedexamples.lenet_torch:TorchLeNetTrainer"
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    PLAN.check()
    with pytest.raises(ConfigError, match="torch is not installed"):
        torch.check()


def test_the_shares_are_those_of_the_trainers():
    data = datasets.load("digits")
    shares = plan.divide(PLAN, data)
    assert sum(sum(share.values()) for share in shares) == len(data.train_labels)
    for shard, share in enumerate(shares):
        trainer = lenet.LeNetTrainer(shard=shard, shards=2, seed=1, alpha=0.5)
        assert sum(trainer.load()) == sum(share.values())


# ---- what the cluster says


def test_progress_from_metrics():
    text = """\
# HELP fl_iteration Number of the current iteration
# TYPE fl_iteration gauge
fl_iteration 4.0
fl_iteration_clients{round="startFLJob"} 7.0
fl_iteration_clients{round="updateModel"} 5.0
fl_updates_accepted_total 29.0
fl_iterations_total{outcome="valid"} 2.0
fl_iterations_total{outcome="failed"} 1.0
fl_request_duration_seconds_bucket{le="+Inf",route="get Model"} 3.0
"""
    assert progress_of(read_metrics(text)) == Progress(
        iteration=4, selected=7, uploaded=5, accepted=29, failed=1
    )
    assert progress_of({}) == Progress(0, 0, 0, 0, 0)


def test_device_reports():
    text = '{"iteration": 1, "outcome": "completed"}\n{"iteration": 2, "outcome": "restarted"}\n'
    assert [line["iteration"] for line in read_reports(text)] == [1, 2]
    reports = [
        {"outcome": "completed", "loss": 0.5, "accuracy": 0.25},
        {"outcome": "completed", "loss": 0.125, "accuracy": 0.75},
        {"outcome": "restarted", "loss": None, "accuracy": None},
    ]
    assert command.device_record("d", {1: 2}, reports) == DeviceRecord("d", {1: 2}, 2, 0.125, 0.75)
    assert command.device_record("d", {1: 2}, []) == DeviceRecord("d", {1: 2}, 0, None, None)


# ---- following a training


class ScriptedCluster:
    """Says what a list says; has a model of every iteration that has ended, and keeps three."""

    def __init__(self, *seen):
        self._seen = list(seen)
        self._now = seen[0]
        self.asked = []

    def progress(self):
        if self._seen:
            self._now = self._seen.pop(0)
        return self._now

    def model(self, iteration):
        assert self._now.iteration - 3 <= iteration < self._now.iteration
        self.asked.append(iteration)
        return iteration

    def stalled(self, seconds):
        return ChildFailed("stalled")


class ScriptedExaminer:
    """The model of iteration k has loss k."""

    def examine(self, weights):
        return float(weights), 0.5


class Silent:
    def tick(self, iteration, clients):
        pass


def follow(*seen):
    cluster = ScriptedCluster(*(Progress(*each, failed=0) for each in seen))
    return cluster, [
        (r.number, r.loss, r.clients) for r in train(PLAN, cluster, ScriptedExaminer(), Silent())
    ]


def test_each_iteration_is_judged_by_its_own_model():
    cluster, records = follow(
        (1, 0, 0, 0), (1, 2, 1, 1), (2, 0, 0, 2), (2, 2, 1, 3), (3, 2, 1, 5), (4, 0, 0, 6)
    )
    assert records == [(1, 1.0, 2), (2, 2.0, 2), (3, 3.0, 2)]
    assert cluster.asked == [1, 2, 3]


def test_models_are_fetched_before_they_are_judged():
    cluster, records = follow((1, 2, 0, 0), (4, 0, 0, 6))
    assert cluster.asked == [1, 2, 3]
    assert records == [(1, 1.0, 2), (2, 2.0, 2), (3, 3.0, 2)]


def test_a_standstill_is_given_up(monkeypatch):
    monkeypatch.setattr(command, "STALL_S", 0.0)
    monkeypatch.setattr(command, "LOOK_S", 0.001)
    with pytest.raises(ChildFailed, match="stalled"):
        follow((1, 0, 0, 0))


def test_the_examiner_agrees_with_the_example():
    data = datasets.load("digits")
    weights = lenet.initial_weights(2)
    loss, accuracy = Examiner(data).examine({name: value.reshape(-1) for name, value in weights.items()})
    expected, _ = lenet.loss_and_gradients(weights, data.test_images, data.test_labels)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert accuracy == lenet.accuracy(weights, data.test_images, data.test_labels)


# ---- what came of it


def test_the_figures(figures, tmp_path):
    report.save_json(figures.as_json(), tmp_path / "new" / "figures.json")
    read = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert read["accuracy"] == pytest.approx([0.3, 0.6, 0.9])
    assert read["loss"] == pytest.approx([1, 1 / 2, 1 / 3])
    assert read["iteration_seconds"] == [0.5, 1.0, 1.5]
    assert read["seconds"] == 9.0
    assert read["training_seconds"] == 3.0
    assert read["updates"] == 6
    assert read["updates_per_second"] == 2.0
    assert read["samples_per_device"] == [95, 1]
    assert {"data": "digits", "devices": 2, "iterations": 3, "seed": 1, "alpha": 0.5}.items() <= read.items()


def test_the_curves(figures, tmp_path):
    pytest.importorskip("matplotlib")
    report.save_curves(figures, tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_rules_beside_each_other(figures, tmp_path):
    pytest.importorskip("matplotlib")
    figures.plan = replace(PLAN, rule=Rule.SCAFFOLD)
    slow = replace(figures, plan=replace(PLAN, rule=Rule.FEDNOVA))
    slow.iterations = [IterationRecord(1, 0.5, 0.25, 2, 1.0), IterationRecord(2, 0.25, 0.96, 2, 1.0)]
    assert view.comparison([figures, slow]) == [
        "rule       accuracy     loss  iterations to 95%  seconds",
        "Scaffold      90.0%   0.3333                  -      9.0",
        "FedNova       96.0%   0.2500                  2      9.0",
    ]
    told = report.compared([figures, slow])["rules"]
    assert list(told) == ["Scaffold", "FedNova"]
    assert json.loads(json.dumps(told))["FedNova"]["rule"] == "FedNova"
    assert told["FedNova"]["accuracy"] == [0.25, 0.96]
    report.save_compared_curves([figures, slow], tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def beside(figures):
    """A run without a worker, and one with."""
    figures.plan, planned = plan.beside_a_worker(PLAN)
    gained = replace(figures, plan=planned, seconds=12.0)
    gained.iterations = [replace(r, accuracy=r.accuracy + 0.06, loss=r.loss / 2) for r in figures.iterations]
    gained.iterations[0] = replace(figures.iterations[0], accuracy=0.18)
    return [figures, gained]


def test_with_and_without_a_worker_beside_each_other(beside, tmp_path):
    pytest.importorskip("matplotlib")
    assert view.comparison(beside) == [
        "               accuracy     loss  iterations to 95%  seconds",
        "without worker    90.0%   0.3333                  -      9.0",
        "with worker       96.0%   0.1667                  3     12.0",
        "with the worker, accuracy is higher in 2 of 3 iterations, by 0.0 points on average",
    ]
    told = json.loads(json.dumps(report.compared(beside)))
    assert told["accuracy"] == pytest.approx([0.18, 0.66, 0.96])
    assert told["accuracy_without_worker"] == pytest.approx([0.3, 0.6, 0.9])
    assert told["loss_without_worker"] == pytest.approx([1, 1 / 2, 1 / 3])
    assert (told["seconds"], told["seconds_without_worker"]) == (12.0, 9.0)
    assert told["worker"] and told["worker_trainer"].endswith("NumpyLeNetWorker")
    assert told.keys() > beside[0].as_json().keys()
    report.save_compared_curves(beside, tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_second_run_shows_the_first_beside_it(beside, capsys):
    without, gained = beside
    with view.PlainView(gained.plan, without) as shown:
        shown.record(gained.iterations[1])
    assert "accuracy  66.0%   without worker  60.0%   clients 2" in capsys.readouterr().out
    console = Console(force_terminal=True, width=90, height=30, record=True, file=io.StringIO())
    with view.TerminalView(gained.plan, console, without) as shown:
        for record in gained.iterations:
            shown.tick(record.number, 1)
            shown.record(record)
    text = console.export_text()
    assert "without worker" in text
    assert "60.0%" in text and "66.0%" in text


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--hybrid", "--silo"), "--hybrid and --silo do not go together"),
        (("--hybrid", "--rule", "fedavg"), "--rule is for --silo"),
        (("--rule", "fedavg"), "--rule is for --silo"),
        (("--silo", "--stay"), "--stay needs one --rule"),
        (("--silo", "--rule", "qffl"), "'qffl' is not one of"),
    ],
)
def test_options_that_do_not_go_together(arguments, fault):
    result = CliRunner().invoke(command.demo, arguments)
    assert result.exit_code == 2
    assert fault in result.output


def test_no_curves_without_matplotlib(figures, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise ImportError

    monkeypatch.setattr(command, "save_curves", refuse)
    shown = view.PlainView(PLAN)
    command.write(figures, shown, command.Outputs(None, tmp_path / "curves.png", stay=False))
    assert capsys.readouterr().out == "no curves: matplotlib is not installed (pip install 'fedcore[demo]')\n"


# ---- what the reader sees


def test_plain_lines(figures, capsys):
    with view.PlainView(PLAN) as shown:
        shown.say("hello")
        shown.tick(1, 1)
        shown.record(figures.iterations[0])
    shown.summarise(figures)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "hello"
    assert lines[1].split() == [
        "iteration",
        "1/3",
        "loss",
        "1.0000",
        "accuracy",
        "30.0%",
        "clients",
        "2",
        "0.50",
        "s",
    ]
    assert lines[2].startswith("device-0       95 samples, mostly 2 and 0; 3 iterations;")
    assert lines[2].endswith("accuracy on 12 that it holds out 50.0%")
    assert lines[3].endswith("accuracy on 0 that it holds out -")
    assert "test accuracy 90.0% on 360 images" in lines[4]
    assert "6 updates, 2.0 updates/s" in lines[5]
    assert all(line.isascii() for line in lines)


@pytest.mark.parametrize("height", [6, 12, 60])
def test_a_terminal_of_any_height(figures, height):
    console = Console(force_terminal=True, width=90, height=height, record=True, file=io.StringIO())
    with view.TerminalView(PLAN, console) as shown:
        shown.say("hello")
        for record in figures.iterations:
            shown.tick(record.number, 1)
            shown.record(record)
        shown.tick(4, 0)
    shown.summarise(figures)
    text = console.export_text()
    assert "hello" in text
    assert all(f"{record.loss:.4f}" in text for record in figures.iterations)
    assert "who did what" in text


def test_a_pipe_gets_plain_lines(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert isinstance(view.view_for(PLAN), view.PlainView)


@pytest.mark.parametrize(
    ("samples", "words"), [({0: 1, 5: 9, 7: 3}, "5 and 7"), ({3: 4, 4: 0}, "3"), ({}, "")]
)
def test_favourites(samples, words):
    assert view.favourites(samples) == words


# ---- directories and signals


def test_a_temporary_directory_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path))
    with run_directory(None, keep=False) as folder:
        assert folder.is_dir()
        (folder / "file").touch()
    assert not folder.exists()


@pytest.mark.parametrize("error", [KeyError, Stopped])
def test_a_temporary_directory_goes_after_a_stop(tmp_path, monkeypatch, error):
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(error), run_directory(None, keep=False):
        raise error(2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("keep", "error"), [(True, KeyError), (False, ChildFailed)])
def test_a_temporary_directory_stays(tmp_path, monkeypatch, keep, error):
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(error), run_directory(None, keep=keep):
        raise error("x")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_named_directory_is_new_or_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new/below", "empty"):
        with run_directory(tmp_path / name, keep=False) as folder:
            assert folder.is_absolute()
        assert folder.is_dir()
    (tmp_path / "file").touch()
    for used in (tmp_path, tmp_path / "file"):
        with (
            pytest.raises(command.click.ClickException, match="not an empty directory"),
            run_directory(used, False),
        ):
            pass


def test_the_first_signal_stops_and_the_others_are_ignored():
    before = [signal.getsignal(number) for number in command.STOPPING]
    with pytest.raises(Stopped) as stopped, stopping_on_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
    assert stopped.value.number == signal.SIGTERM
    assert [signal.getsignal(number) for number in command.STOPPING] == before


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_on_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_curves_have_a_default_place():
    assert Path("demo-run/curves.png") == command.CURVES
