"""A CloudWorker: its arguments, its identity, its end."""

import re

import numpy as np
import pytest
import scripted_server as server
from scripted_server import Script

from fedclient import Adaptive, CloudWorker, FitResult, MemoryTransport, Outcome
from fedcore.errors import ConfigError
from fedcore.wire.codec import decode
from fedcore.wire.messages import RequestFLJob, RequestUpdateModel

PLAN = server.plan(server_mode="CLOUD_TRAINING", iterations=2)
CONTROL = server.feature_map({"control." + name: np.zeros_like(v) for name, v in server.MODEL.items()})


class Adder:
    """Adds one to every weight."""

    def __init__(self):
        self.steps = []

    def load(self):
        return 4, 0

    def step(self, weights, step):
        self.steps.append(step.number)
        return FitResult({name: values + 1 for name, values in weights.items()}, 0.5)

    def evaluate(self, weights):
        return 0.25


def shifted(by):
    return {name: values + np.float32(by) for name, values in server.MODEL.items()}


def job(control=()):
    return Script(
        server.started(1, fl_plan_config=PLAN, feature_map=control),
        server.model(),
        server.updated(),
        server.model(weights=shifted(2)),
        server.started(2, fl_plan_config=PLAN, feature_map=control),
        server.updated(),
        server.model(weights=shifted(4)),
    )


def worker_of(script, trainer=None, **options):
    usual = {"sync_frequency": 2, "sleep": lambda seconds: None, "chance": lambda: 0.0}
    return CloudWorker(trainer or Adder(), MemoryTransport(script), **(usual | options))


def test_a_job():
    script, trainer, reports = job(), Adder(), []
    worker = worker_of(script, trainer, on_iteration=reports.append)
    summary = worker.run()
    assert (summary.outcome, summary.completed, summary.restarted) == (Outcome.COMPLETED, 2, 0)
    assert script.rounds == [
        "startFLJob",
        "getModel",
        "updateModel",
        "getModel",
        "startFLJob",
        "updateModel",
        "getModel",
    ]
    assert trainer.steps == [1, 2, 3, 4]
    assert summary.weights["a.weight"].tolist() == [5, 6, 7]
    assert [report.loss for report in reports] == [0.5, 0.5]


def test_it_is_called_as_the_protocol_says_and_each_is_another():
    ids = set()
    for _ in range(3):
        script = job()
        worker = worker_of(script)
        worker.run()
        request = decode(RequestFLJob, script.asked[0][1])
        assert request.fl_id == worker.worker_id
        assert (request.fl_name, worker.fl_name) == ("Adder", "Adder")
        assert re.fullmatch(r"worker_fl_\d{14}::[0-9a-f]{16}", request.fl_id)
        ids.add(request.fl_id)
    assert len(ids) == 3


def test_its_control_can_be_handed_on():
    worker = worker_of(job(CONTROL), rule="scaffold")
    assert worker.control == {}
    worker.run()
    kept = worker.control
    # The first run gives 0 - 0 + (base - trained) / (2 steps * rate 0.25) = -4, and from then on each step is
    # corrected by -0.25 * 4: nothing moves any more.
    assert kept["b.bias"].tolist() == [-4, -4]
    script = job(CONTROL)
    again = worker_of(script, rule="scaffold", control=kept)
    again.run()
    update = decode(RequestUpdateModel, script.asked[2][1])
    uploaded = {item.weight_fullname: item.data.tolist() for item in update.feature_map}
    assert uploaded["b.bias"] == [4 * 0.5, 4 * -0.5], "it holds from the first step on"
    assert again.control["b.bias"].tolist() == [-4, -4], "it stays where it is right"


def test_it_stops_between_two_steps():
    class Stopping(Adder):
        def step(self, weights, step):
            if step.number == 2:
                worker.stop()
            return super().step(weights, step)

    trainer = Stopping()
    worker = worker_of(job(), trainer, sync_frequency=1000)
    assert worker.run().outcome is Outcome.STOPPED
    assert trainer.steps == [1, 2]


def test_what_its_trainer_does_wrong_is_told_by_the_name_that_the_user_wrote(caplog):
    class Failing(Adder):
        def step(self, weights, step):
            raise OSError("no data")

    summary = worker_of(job(), Failing()).run()
    assert summary.reason == "the trainer failed: step(): OSError: no data"
    assert "the trainer's step() failed" in caplog.text


def test_adaptive_runs():
    worker = worker_of(job(), sync_type="adaptive", adaptive=Adaptive(ema_alpha=0.25))
    summary = worker.run()
    assert summary.outcome is Outcome.FAILED
    assert "as_abs_grad" in summary.reason
    assert worker.sync_frequency == 2


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (
            {"rule": "qffl"},
            r"aggregation_type must be in \('FedAvg', 'FedProx', 'Scaffold', 'FedNova'\), but got qffl\.",
        ),
        (
            {"encrypt_mode": "DP"},
            r"encrypt_mode must be in \('NOT_ENCRYPT', 'STABLE_PW_ENCRYPT'\), but got DP\.",
        ),
        ({"sync_type": "now and then"}, "sync_type"),
        ({"adaptive": Adaptive()}, "sync_type adaptive"),
        ({"sync_frequency": 0}, "sync_frequency"),
        ({"rule": "fedprox"}, "iid_rate"),
    ],
)
def test_what_cannot_be(options, fault):
    with pytest.raises(ConfigError, match=fault):
        worker_of(Script(), **options)
