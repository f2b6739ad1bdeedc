"""One cloud worker's session: what is asked when, what is uploaded, and what every odd answer leads to."""

import numpy as np
import pytest
import scripted_server as server
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclient.cloud_session import CloudSession, Synchronisation
from fedclient.replies import WORKER_MODES
from fedclient.rules import Rule
from fedclient.schedule import Adaptive
from fedclient.session import Policy
from fedclient.steps import (
    Evaluate,
    Evaluated,
    Finished,
    Fit,
    Fitted,
    IoFailed,
    IterationDone,
    IterationOutcome,
    Loaded,
    Outcome,
    Replied,
    Resumed,
    Send,
    Sleep,
)
from fedclient.trainer import FitResult
from fedcore.errors import ConfigError
from fedcore.wire.codec import decode
from fedcore.wire.messages import CipherPublicParams, RequestFLJob, RequestGetModel, RequestUpdateModel

NOW = 1_800_000_000_000
REQUESTS = {"startFLJob": RequestFLJob, "updateModel": RequestUpdateModel, "getModel": RequestGetModel}
POLICY = Policy(max_restarts=3, max_io_retries=3, poll_patience=5.0)
RESTARTED, COMPLETED = IterationOutcome.RESTARTED, IterationOutcome.COMPLETED
MODEL = {"a": np.float32([1, 2]), "b": np.float32([4])}
CONTROL = {"control.a": np.float32([0.5, 0]), "control.b": np.float32([0])}


def started(iteration=1, weights=None, **plan):
    plan = server.plan(**({"server_mode": "CLOUD_TRAINING"} | plan))
    return server.started(iteration, fl_plan_config=plan, feature_map=server.feature_map(weights or {}))


def filled(value):
    return {name: np.full_like(values, value) for name, values in MODEL.items()}


class Worker:
    """A session, its latest action, and a clock that only sleeping moves."""

    def __init__(self, rule=Rule.FEDAVG, samples=4, evaluation=0, frequency=2, control=None, **more):
        way = Synchronisation(rule, frequency, **more)
        self.session = CloudSession("job", "silo-1", way, POLICY, control)
        self.now = NOW
        self.feed(Loaded(samples, evaluation))

    def feed(self, event):
        self.action = self.session.step(event, self.now, 0.0)
        return self.action

    def reply(self, body):
        return self.feed(Replied(200, body))

    def rest(self):
        seen = []
        while isinstance(self.action, Sleep | IterationDone):
            seen.append(self.action)
            if isinstance(self.action, Sleep):
                self.now += round(self.action.seconds * 1000)
            self.feed(Resumed())
        return seen

    def request(self):
        assert isinstance(self.action, Send)
        return decode(REQUESTS[self.action.round], self.action.body)

    def begin(self, iteration=1, weights=None, model=None):
        """Take a place, and the base if it is asked for."""
        self.reply(started(iteration, weights))
        if isinstance(self.action, Send) and self.action.round == "getModel":
            assert self.request().iteration == iteration - 1
            self.reply(server.model(weights=MODEL if model is None else model))
        return self

    def train(self, value=3.0):
        assert isinstance(self.action, Fit)
        self.feed(Fitted(FitResult(filled(value), 0.5)))
        return self.uploaded()

    def uploaded(self):
        items = self.request().feature_map
        return {item.weight_fullname: item.data.tolist() for item in items}

    def receive(self, model):
        self.reply(server.updated())
        self.reply(server.model(weights=model))
        return self.rest()


def test_a_whole_job():
    worker = Worker()
    assert worker.request().data_size == 4
    worker.reply(started(1))
    assert worker.request() == RequestGetModel("job", 0, str(NOW), worker.request().download_compress_types)
    worker.reply(server.model(weights=MODEL))
    for iteration in (1, 2, 3):
        run = worker.action.config
        assert (run.iteration, run.first_step, run.steps) == (iteration, 2 * iteration - 1, 2)
        assert (run.batch_size, run.learning_rate, run.iid_rate, run.drift) == (16, 0.25, 0, {})
        assert worker.train(iteration) == {"a": [4 * iteration] * 2, "b": [4 * iteration]}
        update = worker.request()
        assert (update.fl_name, update.fl_id, update.iteration) == ("job", "silo-1", iteration)
        assert worker.receive(filled(10 * iteration)) == [IterationDone(iteration, COMPLETED)]
        if iteration < 3:
            assert worker.action.round == "startFLJob"
            worker.reply(started(iteration + 1))
            assert worker.action.weights["a"].tolist() == [10 * iteration] * 2, "no second getModel"
    assert worker.action == Finished(Outcome.COMPLETED)


def test_a_base_that_is_not_there_yet_is_waited_for():
    worker = Worker()
    worker.reply(started(4))
    worker.reply(server.model(201))
    assert worker.rest() == [Sleep(1.0)]
    assert worker.request().iteration == 3
    worker.reply(server.SAFEMODE)
    worker.rest()
    worker.reply(server.model(weights=MODEL))
    assert isinstance(worker.action, Fit)


def test_a_base_that_never_comes_ends_it():
    worker = Worker()
    worker.reply(started(4))
    for _ in range(6):
        worker.reply(server.model(201))
        worker.rest()
    assert worker.action.outcome is Outcome.FAILED


def test_the_global_model_is_evaluated_before_the_run():
    worker = Worker(evaluation=2)
    assert worker.request().eval_data_size == 2
    worker.begin()
    assert isinstance(worker.action, Evaluate)
    worker.feed(Evaluated(0.75))
    worker.train()
    update = worker.request()
    assert (update.upload_loss, update.upload_accuracy) == (0.5, 0.75)


def test_a_refused_update_is_dropped_and_the_next_run_begins_with_the_newest_model():
    worker = Worker().begin(1)
    worker.train()
    worker.reply(server.updated(300, str(NOW + 2000)))
    assert worker.rest() == [IterationDone(1, RESTARTED), Sleep(2.0)]
    worker.reply(started(3))
    assert worker.request().iteration == 2, "the base is fetched"
    worker.reply(server.model(weights=filled(7)))
    assert worker.action.weights["a"].tolist() == [7, 7]
    assert worker.action.config.first_step == 1, "the steps of the dropped run are taken again"


def test_a_refusal_is_waited_for_as_long_as_it_says():
    worker = Worker()
    worker.reply(
        server.not_started(str(NOW + 3500), fl_plan_config=server.plan(server_mode="CLOUD_TRAINING"))
    )
    assert worker.rest() == [IterationDone(1, RESTARTED), Sleep(3.5)]
    assert worker.action.round == "startFLJob"


@pytest.mark.parametrize("round_", ["startFLJob", "updateModel", "getModel"])
def test_the_end_of_the_job_ends_the_worker(round_):
    worker = Worker()
    if round_ != "startFLJob":
        worker.begin().train()
    if round_ == "getModel":
        worker.reply(server.updated())
    assert worker.action.round == round_
    assert worker.reply(server.OVER) == Finished(Outcome.JOB_OVER)


def test_a_model_that_did_not_change_is_that_of_a_failed_iteration():
    worker = Worker(Rule.SCAFFOLD).begin(weights=CONTROL)
    worker.train()
    (done,) = worker.receive(MODEL)
    assert done == IterationDone(1, RESTARTED)
    assert done.reason == "iteration 1 made no model"
    assert worker.session.control["a"].tolist() == [0, 0], "the global control has not moved either"
    worker.reply(started(2, CONTROL))
    assert worker.action.config.first_step == 1, "the run is repeated, from the base that is there"


def test_fedprox():
    worker = Worker(Rule.FEDPROX, iid_rate=0.25).begin()
    assert worker.action.config.iid_rate == 0.25
    assert worker.train(3) == {"a": [12, 12], "b": [12]}


def test_the_rate_is_fedproxs_only():
    assert Worker(Rule.FEDAVG, iid_rate=0.25).begin().action.config.iid_rate == 0


def test_fednova_declares_and_divides_by_its_steps():
    worker = Worker(Rule.FEDNOVA, frequency=4)
    assert worker.request().data_size == 4
    worker = Worker(Rule.FEDNOVA, samples=100, frequency=2)
    assert worker.request().data_size == 2
    assert worker.begin().train(3) == {"a": [1, 0.5], "b": [-0.5]}


def test_scaffold():
    worker = Worker(Rule.SCAFFOLD).begin(weights=CONTROL)
    drift = worker.action.config.drift
    assert {name: values.tolist() for name, values in drift.items()} == {"a": [0.5, 0], "b": [0]}
    # 0 - control + (base - 3) / (2 steps * rate 0.25)
    control = {"a": [-0.5 - 4, -2], "b": [2]}
    assert worker.train(3) == {"a": [12, 12], "b": [12], "control.a": control["a"], "control.b": control["b"]}
    assert worker.session.control["a"].tolist() == [0, 0], "until it is sure that it counted"
    worker.receive(filled(5))
    assert {n: v.tolist() for n, v in worker.session.control.items()} == control
    worker.begin(2, CONTROL)
    assert worker.action.config.drift["b"].tolist() == [-2]


def test_scaffold_goes_on_with_the_control_of_another_worker():
    worker = Worker(Rule.SCAFFOLD, control={"a": np.float32([1, 1]), "b": np.float32([0])}).begin(
        weights=CONTROL
    )
    assert worker.action.config.drift["a"].tolist() == [-0.5, -1]


@pytest.mark.parametrize(
    ("rule", "weights", "control", "reason"),
    [
        (Rule.SCAFFOLD, {}, None, "aggregation_type is not Scaffold"),
        (Rule.SCAFFOLD, {"control.a": np.float32([1, 2])}, None, "aggregation_type is not Scaffold"),
        (
            Rule.SCAFFOLD,
            CONTROL | {"control.b": np.float32([1, 2])},
            None,
            "aggregation_type is not Scaffold",
        ),
        (Rule.SCAFFOLD, CONTROL, {"a": np.float32([1, 1])}, "the control to go on with"),
        (Rule.FEDNOVA, CONTROL, None, "aggregation_type is Scaffold, this worker's is FedNova"),
    ],
)
def test_rules_that_do_not_agree(rule, weights, control, reason):
    worker = Worker(rule, control=control).begin(weights=weights)
    assert worker.action.outcome is Outcome.FAILED
    assert reason in worker.action.reason


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"server_mode": "FEDERATED_LEARNING"}, "the server's mode is"),
        ({"cipher": CipherPublicParams("STABLE_PW_ENCRYPT")}, "STABLE_PW_ENCRYPT"),
    ],
)
def test_jobs_that_are_not_for_this_worker(plan, reason):
    assert WORKER_MODES == ("CLOUD_TRAINING",)
    worker = Worker()
    worker.reply(started(**plan))
    assert worker.action.outcome is Outcome.FAILED
    assert reason in worker.action.reason


@pytest.mark.parametrize("model", [{"a": np.float32([1, 2])}, MODEL | {"b": np.float32([1, 2])}])
def test_another_model_than_before_is_not_believed(model):
    worker = Worker().begin()
    worker.train()
    assert worker.receive(model)[0] == IterationDone(1, RESTARTED)


@pytest.mark.parametrize(
    "weights", [{"x": np.float32([1])}, {"a": np.float32([np.inf, 0]), "b": np.float32([0])}]
)
def test_weights_that_cannot_be_sent(weights):
    worker = Worker().begin()
    worker.feed(Fitted(FitResult(weights, 0.5)))
    assert worker.action.outcome is Outcome.FAILED
    assert "cannot be sent" in worker.action.reason


def test_a_product_that_overflows_cannot_be_sent():
    worker = Worker().begin()
    worker.feed(Fitted(FitResult({"a": np.float32([3e38, 0]), "b": np.float32([0])}, 0.5)))
    assert worker.action.outcome is Outcome.FAILED


class TestAdaptive:
    NOW = Adaptive(observation_window_size=1, frequency_increase_ratio=2)

    def model(self, value, moved):
        return filled(value) | {
            "as_abs_grad." + name: np.full_like(values, moved) for name, values in MODEL.items()
        }

    def test_moves_are_uploaded_and_runs_grow_shorter(self):
        worker = Worker(frequency=8, adaptive=self.NOW).begin(model=self.model(0, 0))
        assert set(worker.action.weights) == {"a", "b"}, "the trainer sees the model only"
        frequencies = []
        for iteration in (1, 2, 3):
            frequencies.append(worker.action.config.steps)
            uploaded = worker.train(iteration - 3)
            assert uploaded["as_abs_grad.a"] == [8, 8], "times the samples, as the server divides by them"
            worker.receive(self.model(iteration, 2))
            if iteration < 3:
                worker.begin(iteration + 1)
                assert isinstance(worker.action, Fit)
        assert frequencies == [8, 8, 8]
        assert worker.session.schedule.frequency == 4, "two rounds since the first, which was a minimum"

    def test_a_server_without_the_names_is_told_apart(self):
        worker = Worker(adaptive=self.NOW).begin()
        assert worker.action.outcome is Outcome.FAILED
        assert "as_abs_grad" in worker.action.reason

    @pytest.mark.parametrize("rule", [Rule.FEDAVG, Rule.FEDNOVA])
    def test_a_fixed_worker_takes_part_beside_them_and_its_trainer_sees_the_model_only(self, rule):
        worker = Worker(rule).begin(model=self.model(1, 0))
        assert set(worker.action.weights) == {"a", "b"}
        assert set(worker.train()) == {"a", "b"}
        assert worker.receive(self.model(2, 3)) == [IterationDone(1, COMPLETED)]
        assert set(worker.begin(2).action.weights) == {"a", "b"}

    def test_fednova_has_no_mean_to_adapt_to(self):
        with pytest.raises(ConfigError, match="adaptive synchronisation"):
            Synchronisation(Rule.FEDNOVA, 2, adaptive=Adaptive())


@pytest.mark.parametrize(
    "wrong", [{"iid_rate": 1.5}, {"iid_rate": -1}, {"frequency": 0}, {"rule": Rule.FEDPROX}]
)
def test_what_cannot_be(wrong):
    with pytest.raises(ConfigError):
        Synchronisation(**wrong)


MODELS = [MODEL, filled(1), filled(2), {"a": np.float32([1, 2])}, MODEL | {"x": np.float32([1])}]
GOOD = {
    "startFLJob": st.builds(
        lambda k, c: started(k, c, iterations=9), st.integers(1, 4), st.sampled_from([CONTROL, {}])
    ),
    "updateModel": st.just(server.updated()),
    "getModel": st.builds(lambda weights: server.model(weights=weights), st.sampled_from(MODELS)),
}
ODD = st.sampled_from(
    [
        server.SAFEMODE,
        server.NOT_READY,
        server.INNER,
        b"",
        b"\0" * 40,
        server.model(201),
        server.model(300, str(NOW + 50)),
        server.updated(300),
        server.not_started("", fl_plan_config=server.plan(server_mode="CLOUD_TRAINING")),
    ]
)


@given(st.data(), st.sampled_from(list(Rule)), st.booleans())
@settings(deadline=None)
def test_no_history_confuses_it(data, rule, adaptive):
    """Any replies: never an exception, an upload only for the iteration announced, and from the model before it."""
    adaptive = adaptive and rule is not Rule.FEDNOVA
    worker = Worker(rule, iid_rate=0.5, adaptive=Adaptive() if adaptive else None)
    worker.session._policy = Policy(max_restarts=99, max_io_retries=99)
    announced = 0
    for _ in range(data.draw(st.integers(0, 25))):
        round_, request = worker.action.round, worker.request()
        if round_ == "getModel":
            assert request.iteration in (announced - 1, announced)
        event = data.draw(
            st.one_of(GOOD[round_].map(lambda body: Replied(200, body)), ODD.map(lambda b: Replied(200, b)))
        )
        if data.draw(st.integers(0, 9)) == 0:
            event = IoFailed("reset")
        worker.feed(event)
        if worker.session.iteration:
            announced = worker.session.iteration
        if isinstance(worker.action, Fit):
            assert worker.session._base == announced - 1
            assert worker.action.config.iteration == announced
            model = worker.action.weights
            worker.feed(Fitted(FitResult({name: w + 1 for name, w in model.items()}, 0.5)))
            assert worker.request().iteration == announced
        worker.rest()
        if isinstance(worker.action, Finished):
            break
        assert isinstance(worker.action, Send)
