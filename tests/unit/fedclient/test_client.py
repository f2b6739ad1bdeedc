"""A client drives its session: trainers, reports, stopping, and a whole job over HTTP."""

import itertools
import logging
import threading

import numpy as np
import pytest
import scripted_server as server
from scripted_server import Script, ScriptedServer

from fedclient import (
    Client,
    FitResult,
    IterationOutcome,
    IterationReport,
    MemoryTransport,
    Outcome,
    Policy,
    Summary,
)
from fedcore.errors import ConfigError
from fedcore.wire.codec import decode
from fedcore.wire.messages import RequestFLJob, RequestUpdateModel

JOB = [answer for k in (1, 2, 3) for answer in (server.started(k), server.updated(), server.model())]


class Adder:
    """Adds one to every weight."""

    def __init__(self, sizes=(4, 0)):
        self.sizes = sizes
        self.fits = []

    def load(self):
        return self.sizes

    def fit(self, weights, config):
        self.fits.append(config)
        return FitResult({name: values + 1 for name, values in weights.items()}, 0.5)

    def evaluate(self, weights):
        return 0.25


def client_of(script, trainer=None, **options):
    """Make a client without waits and chance; its sleeps are in ``client.slept``."""
    slept = []
    seconds = itertools.count()
    usual = {"sleep": slept.append, "chance": lambda: 0.0, "monotonic": lambda: float(next(seconds))}
    made = Client(trainer or Adder(), MemoryTransport(script), fl_name="job", **(usual | options))
    made.slept = slept
    return made


def test_a_job_is_summed_up():
    reports = []
    client = client_of(Script(*JOB), Adder((4, 2)), on_iteration=reports.append)
    summary = client.run()
    assert summary == Summary(Outcome.COMPLETED, "iteration 3 was the last", 3, 0, {})
    assert summary.ok
    assert set(summary.weights) == set(server.MODEL)
    assert reports == [IterationReport(k, IterationOutcome.COMPLETED, 0.5, 0.25, 1.0) for k in (1, 2, 3)]


def test_a_refusal_is_reported_and_waited_for():
    reports = []
    script = Script(*JOB[:3], server.not_started(str(10_000), iteration=2), *JOB[3:])
    client = client_of(script, Adder((4, 1)), on_iteration=reports.append, clock=lambda: 4_000)
    assert client.run().restarted == 1
    assert client.slept == [6.0]
    refusal = IterationReport(2, IterationOutcome.RESTARTED, None, None, 1.0, "startFLJob: 300 full")
    assert reports[1] == refusal
    assert [report.loss for report in reports] == [0.5, None, 0.5, 0.5]


def test_one_line_is_logged_per_iteration(caplog):
    with caplog.at_level(logging.INFO, "fedclient"):
        client_of(Script(*JOB)).run()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        *(f"iteration {k}: uploaded, and its model received, loss 0.5, 1.0 s" for k in (1, 2, 3)),
        "completed: iteration 3 was the last",
    ]


def test_the_end_of_the_job_is_a_good_end():
    summary = client_of(Script(server.OVER)).run()
    assert (summary.outcome, summary.ok, summary.completed) == (Outcome.JOB_OVER, True, 0)


def test_io_errors_are_waited_out():
    script = Script(OSError("no route"), JOB[0], OSError("reset"), *JOB[1:])
    client = client_of(script)
    assert client.run().ok
    assert client.slept == [0.5, 0.5]
    assert script.asked[0] == script.asked[1]


def test_io_errors_end_it_at_last():
    client = client_of(Script(*[OSError("no route")] * 3), policy=Policy(max_io_retries=2))
    summary = client.run()
    assert (summary.outcome, summary.ok) == (Outcome.FAILED, False)
    assert "no route" in summary.reason


def test_names_have_defaults():
    first, second = Client(Adder(), MemoryTransport(Script())), Client(Adder(), MemoryTransport(Script()))
    assert first.fl_name == "Adder"
    assert first.client_id != second.client_id


def test_names_travel():
    script = Script(server.OVER)
    client_of(script, client_id="me").run()
    request = decode(RequestFLJob, script.asked[0][1])
    assert (request.fl_name, request.fl_id) == ("job", "me")


def test_a_url_that_cannot_be_used():
    with pytest.raises(ConfigError):
        Client(Adder(), "localhost:6666")


class Failing(Adder):
    def __init__(self, where, what):
        super().__init__((4, 1))
        self.where, self.what = where, what

    def load(self):
        return self._do("load", super().load)

    def fit(self, weights, config):
        return self._do("fit", lambda: Adder.fit(self, weights, config))

    def evaluate(self, weights):
        return self._do("evaluate", lambda: 0.5)

    def _do(self, name, call):
        if name != self.where:
            return call()
        if isinstance(self.what, Exception):
            raise self.what
        return self.what


@pytest.mark.parametrize(
    ("where", "what", "word"),
    [
        ("load", OSError("no file"), "no file"),
        ("load", None, "load"),
        ("load", (1, 2, 3), "load"),
        ("load", ("many", 0), "load"),
        ("load", (0, 0), "0 training"),
        ("evaluate", ZeroDivisionError("oh"), "oh"),
        ("evaluate", None, "evaluate"),
        ("evaluate", float("nan"), "nan"),
        ("fit", MemoryError("too much"), "too much"),
        ("fit", None, "FitResult"),
        ("fit", FitResult(None, 0.5), "FitResult"),
        ("fit", FitResult({}, None), "float"),
        ("fit", FitResult({}, float("inf")), "inf"),
        ("fit", FitResult({}, 0.5), "no value"),
        ("fit", FitResult({"b.bias": np.full(2, np.inf)}, 0.5), "NaN or infinity"),
    ],
)
def test_whatever_a_trainer_does_wrong_is_told(where, what, word):
    summary = client_of(Script(*JOB), Failing(where, what)).run()
    assert summary.outcome is Outcome.FAILED
    assert word in summary.reason


def test_what_a_callback_raises_is_passed_on():
    def fail(report):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        client_of(Script(*JOB), on_iteration=fail).run()


def test_stop_between_two_steps():
    script = Script(*JOB)
    client = client_of(script, on_iteration=lambda report: client.stop())
    summary = client.run()
    assert (summary.outcome, summary.completed) == (Outcome.STOPPED, 1)
    assert script.rounds == ["startFLJob", "updateModel", "getModel"]


def test_stop_before_run():
    script = Script()
    client = client_of(script)
    client.stop()
    assert client.run().outcome is Outcome.STOPPED
    assert script.asked == []


def test_stop_wakes_a_sleeper():
    asked = threading.Event()

    def refuse(round_, body):
        asked.set()
        return 200, server.SAFEMODE

    client = Client(Adder(), MemoryTransport(refuse), policy=Policy(retry_time=60.0))
    ends = []
    thread = threading.Thread(target=lambda: ends.append(client.run()))
    thread.start()
    assert asked.wait(10)
    client.stop()
    thread.join(10)
    assert ends[0].outcome is Outcome.STOPPED


def test_stop_wakes_a_request():
    with ScriptedServer(lambda *_: (ScriptedServer.hang, {}, b"")) as hanging:
        client = Client(Adder(), hanging.url)
        ends = []
        thread = threading.Thread(target=lambda: ends.append(client.run()))
        thread.start()
        assert hanging.asked.wait(10)
        client.stop()
        thread.join(10)
        assert ends[0].outcome is Outcome.STOPPED


def test_a_job_over_http():
    script = Script(*JOB)

    def answer(path, headers, body):
        status, reply = script(path, body)
        return status, {}, reply

    with ScriptedServer(answer) as running:
        summary = Client(Adder(), [running.url], fl_name="job").run()
        assert running.connections == 1
    assert summary.completed == 3
    assert script.rounds == ["/startFLJob", "/updateModel", "/getModel"] * 3
    update = decode(RequestUpdateModel, script.asked[1][1])
    assert {item.weight_fullname: item.data.tolist() for item in update.feature_map} == {
        name: ((values + 1) * 4).tolist() for name, values in server.MODEL.items()
    }
