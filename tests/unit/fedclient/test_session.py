"""One device's session: what every answer of every round leads to, and that nothing ever confuses it."""

from dataclasses import replace

import numpy as np
import pytest
import scripted_server as server
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclient.protection import PrivacyOptions, Protection
from fedclient.session import Phase, Policy, Session
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
    Stop,
    TrainerFailed,
)
from fedclient.trainer import FitConfig, FitResult
from fedcore.compression import quant
from fedcore.errors import ConfigError, LocalError
from fedcore.wire.codec import decode
from fedcore.wire.messages import (
    CipherPublicParams,
    DPParams,
    DSParams,
    FeatureMap,
    RequestFLJob,
    RequestGetModel,
    RequestUpdateModel,
    ResponseFLJob,
)

NOW = 1_800_000_000_000
REQUESTS = {"startFLJob": RequestFLJob, "updateModel": RequestUpdateModel, "getModel": RequestGetModel}
POLICY = Policy(max_restarts=3, max_io_retries=3, poll_patience=5.0)
RESTARTED, COMPLETED = IterationOutcome.RESTARTED, IterationOutcome.COMPLETED


class Device:
    """A session, its latest action, and a clock that only sleeping moves."""

    def __init__(self, policy=POLICY, data_size=4, eval_data_size=0, privacy=None):
        self.session = Session("job", "device-1", policy, protection=Protection(privacy))
        self.now = NOW
        self.action = None
        self.feed(Loaded(data_size, eval_data_size))

    def feed(self, event, jitter=0.0):
        self.action = self.session.step(event, self.now, jitter)
        return self.action

    def reply(self, body, status=200, jitter=0.0):
        return self.feed(Replied(status, body), jitter)

    def rest(self):
        """Go through reports and sleeps; return them."""
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

    def fitted(self, loss=0.5):
        assert isinstance(self.action, Fit)
        weights = {name: values + 1 for name, values in self.action.weights.items()}
        return self.feed(Fitted(FitResult(weights, loss)))

    def until(self, round_, iteration=1):
        """Go as far as the first request of a round."""
        if round_ != "startFLJob":
            self.reply(server.started(iteration))
            self.fitted()
        if round_ == "getModel":
            self.reply(server.updated())
        assert self.action.round == round_
        return self


def test_a_whole_job():
    device = Device()
    for iteration in (1, 2, 3):
        assert device.action.round == "startFLJob"
        device.reply(server.started(iteration))
        assert device.action.config == FitConfig(2, 16, 0.25, iteration)
        device.fitted()
        assert device.request().iteration == iteration
        device.reply(server.updated())
        device.reply(server.model(201))
        assert device.rest() == [Sleep(1.0)]
        device.reply(server.model(200, weights={"a.weight": np.full(3, iteration, np.float32)}))
        assert device.rest() == [IterationDone(iteration, COMPLETED)]
    assert device.action == Finished(Outcome.COMPLETED)
    assert device.session.model["a.weight"].tolist() == [3, 3, 3]
    assert device.session.model["b.bias"].tolist() == [0.5, -0.5], "absent from getModel: not aggregated"
    assert device.feed(Resumed()) == Finished(Outcome.COMPLETED), "the end stays the end"


def test_requests_carry_what_the_protocol_asks_for():
    device = Device(data_size=7, eval_data_size=3)
    start = device.request()
    assert (start.fl_name, start.fl_id, start.data_size, start.eval_data_size) == ("job", "device-1", 7, 3)
    assert (start.timestamp, start.iteration) == (str(NOW), 0)
    assert start.download_compress_types.tolist() == [0, 2]
    device.reply(server.started(5))
    assert isinstance(device.action, Evaluate)
    assert not device.action.weights["a.weight"].flags.writeable
    device.feed(Evaluated(0.75))
    device.fitted(loss=0.125)
    update = device.request()
    assert (update.fl_name, update.fl_id, update.iteration) == ("job", "device-1", 5)
    assert (update.upload_loss, update.upload_accuracy, update.timestamp) == (0.125, 0.75, str(NOW))
    assert [item.weight_fullname for item in update.feature_map] == ["b.bias", "a.weight"], "order received"
    assert update.feature_map[1].data.tolist() == [14, 21, 28], "weights times data size"
    device.reply(server.updated())
    get = device.request()
    assert (get.fl_name, get.iteration, get.timestamp) == ("job", 5, str(NOW))


def test_the_known_iteration_travels_with_the_next_startFLJob():
    device = Device().until("getModel", 2)
    device.reply(server.model())
    device.rest()
    assert device.request().iteration == 2


FUTURE, PAST = str(NOW + 4_000), str(NOW - 1)
DATED, UNDATED = [Sleep(4.0)], [Sleep(10.0)]
LAST = Finished(Outcome.FAILED)
ANSWERS = [
    # round, status, body, -> what follows up to the next request, and that request or the end
    ("startFLJob", 200, server.not_started(FUTURE), DATED, "startFLJob"),
    ("startFLJob", 200, server.not_started(str(NOW + 10**8)), [Sleep(1800.0)], "startFLJob"),
    ("startFLJob", 200, server.not_started(PAST), UNDATED, "startFLJob"),
    ("startFLJob", 200, server.not_started(str(NOW)), UNDATED, "startFLJob"),
    ("startFLJob", 200, server.not_started(""), UNDATED, "startFLJob"),
    ("startFLJob", 200, server.not_started(None), UNDATED, "startFLJob"),
    ("startFLJob", 200, server.not_started("soon"), UNDATED, "startFLJob"),
    ("startFLJob", 200, server.not_started("9" * 5000), UNDATED, "startFLJob"),
    ("startFLJob", 200, server.not_started("²"), UNDATED, "startFLJob"),
    ("startFLJob", 200, server.not_started(FUTURE, fl_plan_config=None), DATED, "startFLJob"),
    ("startFLJob", 200, server.not_started(FUTURE, retcode=201), [], LAST),
    ("startFLJob", 200, server.not_started(FUTURE, retcode=400), [], LAST),
    ("startFLJob", 200, server.not_started(FUTURE, retcode=500), [], LAST),
    ("startFLJob", 200, server.not_started(FUTURE, retcode=0), [], LAST),
    ("startFLJob", 200, server.SAFEMODE, UNDATED, "startFLJob"),
    ("startFLJob", 200, b"\n" + server.SAFEMODE + b"\r\n", UNDATED, "startFLJob"),
    ("startFLJob", 200, server.NOT_READY, UNDATED, "startFLJob"),
    ("startFLJob", 200, server.OVER, [], Finished(Outcome.JOB_OVER)),
    ("startFLJob", 299, b" " + server.OVER + b"\r\n", [], Finished(Outcome.JOB_OVER)),
    ("startFLJob", 200, b"it is said: " + server.OVER, UNDATED, "startFLJob"),
    ("startFLJob", 200, server.INNER, UNDATED, "startFLJob"),
    ("startFLJob", 200, b"Verify flatbuffers schema failed for RequestFLJob.", UNDATED, "startFLJob"),
    ("startFLJob", 200, b"", UNDATED, "startFLJob"),
    ("startFLJob", 200, b"\0" * 64, UNDATED, "startFLJob"),
    ("startFLJob", 200, server.started(fl_plan_config=None), UNDATED, "startFLJob"),
    ("startFLJob", 200, server.started(feature_map=()), UNDATED, "startFLJob"),
    ("startFLJob", 200, server.started(feature_map=(FeatureMap("a"),)), UNDATED, "startFLJob"),
    ("startFLJob", 200, server.started(feature_map=server.feature_map() * 2), UNDATED, "startFLJob"),
    ("startFLJob", 200, server.started(0), [], LAST),
    ("startFLJob", 200, server.started(download_compress_type=1), [], LAST),
    ("startFLJob", 200, server.started(download_compress_type=2), UNDATED, "startFLJob"),
    ("startFLJob", 200, server.started(fl_plan_config=server.plan(server_mode="CLOUD_TRAINING")), [], LAST),
    ("startFLJob", 200, server.started(fl_plan_config=server.plan(epochs=0)), [], LAST),
    ("startFLJob", 200, server.started(fl_plan_config=server.plan(mini_batch=-1)), [], LAST),
    ("startFLJob", 200, server.started(fl_plan_config=server.plan(lr=float("nan"))), [], LAST),
    ("updateModel", 200, server.updated(300, FUTURE), DATED, "startFLJob"),
    ("updateModel", 200, server.updated(300, PAST), UNDATED, "startFLJob"),
    ("updateModel", 200, server.updated(300, None), UNDATED, "startFLJob"),
    ("updateModel", 200, server.updated(201), [], LAST),
    ("updateModel", 200, server.updated(400), [], LAST),
    ("updateModel", 200, server.updated(500), [], LAST),
    ("updateModel", 200, server.SAFEMODE, UNDATED, "startFLJob"),
    ("updateModel", 200, server.OVER, [], Finished(Outcome.JOB_OVER)),
    ("updateModel", 200, server.INNER, UNDATED, "startFLJob"),
    ("updateModel", 200, b"?", UNDATED, "startFLJob"),
    ("getModel", 200, server.model(201), [Sleep(1.0)], "getModel"),
    ("getModel", 200, server.model(300, FUTURE), DATED, "startFLJob"),
    ("getModel", 200, server.model(300, ""), UNDATED, "startFLJob"),
    ("getModel", 200, server.model(400), [], LAST),
    ("getModel", 200, server.model(500), [], LAST),
    ("getModel", 200, server.SAFEMODE, [Sleep(1.0)], "getModel"),
    ("getModel", 200, server.NOT_READY, [Sleep(1.0)], "getModel"),
    ("getModel", 200, server.OVER, [], Finished(Outcome.JOB_OVER)),
    ("getModel", 200, server.INNER, UNDATED, "startFLJob"),
    ("getModel", 200, server.model(weights={}), UNDATED, "startFLJob"),
    ("getModel", 200, server.model(weights={"stranger": np.ones(1, np.float32)}), UNDATED, "startFLJob"),
    ("getModel", 200, server.model(weights={"b.bias": np.ones(3, np.float32)}), UNDATED, "startFLJob"),
    *(
        (round_, status, b"<html>", steps, follows)
        for round_ in REQUESTS
        for status, steps, follows in [
            (500, [Sleep(0.5)], round_),
            (503, [Sleep(0.5)], round_),
            (408, [Sleep(0.5)], round_),
            (429, [Sleep(0.5)], round_),
            (302, [], LAST),
            (404, [], LAST),
            (413, [], LAST),
        ]
    ),
]


@pytest.mark.parametrize(("round_", "status", "body", "steps", "follows"), ANSWERS)
def test_every_answer_of_every_round(round_, status, body, steps, follows):
    device = Device().until(round_)
    device.reply(body, status)
    seen = device.rest()
    assert [step for step in seen if isinstance(step, Sleep)] == steps
    if isinstance(follows, Finished):
        assert device.action == follows
        assert device.action.reason
    else:
        assert device.action.round == follows
        restarted = follows == "startFLJob" and status == 200
        assert [step for step in seen if isinstance(step, IterationDone)] == (
            [IterationDone(device.session.iteration, RESTARTED)] if restarted else []
        )


@pytest.mark.parametrize("cipher", ["PW_ENCRYPT", "STABLE_PW_ENCRYPT", "DP_ENCRYPT", "SIGNDS", "ROT13"])
def test_a_plan_that_asks_for_more_than_plain_training_is_not_followed(cipher):
    device = Device()
    device.reply(server.started(fl_plan_config=server.plan(cipher=CipherPublicParams(cipher))))
    assert device.action == LAST
    assert cipher in device.action.reason


NOISE = CipherPublicParams("DP_ENCRYPT", None, DPParams(8.0, 1e-5, 1.0), DSParams())
SIGNS = CipherPublicParams("SIGNDS", None, DPParams(), DSParams(0.25, 5.0, 0.6, 0.1, 2))


def started(cipher, iteration=1, **changes):
    return server.started(iteration, fl_plan_config=server.plan(cipher=cipher), **changes)


def test_noise_is_added_and_follows_the_models():
    device = Device()
    protection = device.session._protection
    for iteration, bound in ((1, 0.05), (2, 3**0.5), (3, 3**0.5)):
        assert protection.clip.bound == pytest.approx(bound)
        device.reply(started(NOISE, iteration))
        device.fitted()
        update = device.request()
        assert update.feature_map[1].data.size == 3
        assert not np.array_equal(update.feature_map[1].data, server.MODEL["a.weight"] * 4 + 4)
        device.reply(server.updated())
        device.reply(
            server.model(200, weights={"a.weight": server.MODEL["a.weight"] + np.float32(iteration)})
        )
        device.rest()
    assert protection.spent.updates == 3


def test_signs_are_sent_in_place_of_weights():
    device = Device()
    device.reply(started(SIGNS))
    device.fitted()
    update = device.request()
    assert update.sign in (-1, 1)
    assert update.index_array.size == 2
    assert [item.data.size for item in update.feature_map] == [0, 0]
    assert (update.fl_id, update.iteration, update.upload_loss) == ("device-1", 1, 0.5)


def test_a_session_ends_before_its_budget_is_overspent():
    device = Device(privacy=PrivacyOptions(max_epsilon=9.0))
    device.reply(started(SIGNS))
    device.fitted()
    device.reply(server.updated())
    device.reply(server.model())
    device.rest()
    assert device.action == Finished(Outcome.STOPPED), "without a place that it would not use"
    assert "epsilon" in device.action.reason
    device = Device(privacy=PrivacyOptions(max_epsilon=4.0))
    assert device.reply(started(SIGNS)) == Finished(Outcome.STOPPED)


def test_uploads_are_packed_as_the_server_says():
    device = Device()
    device.reply(server.started(upload_compress_type=1, upload_sparse_rate=0.5))
    device.fitted()
    update = device.request()
    assert (update.upload_compress_type, update.upload_sparse_rate) == (1, 0.5)
    assert update.feature_map is None
    assert update.name_vec == ("b.bias", "a.weight")
    assert sum(item.compress_data.size for item in update.compress_feature_map) == 2


def test_models_may_come_packed():
    packed = tuple(quant.compress(name, values) for name, values in server.MODEL.items())
    as_packed = {"download_compress_type": 2, "feature_map": (), "compress_feature_map": packed}
    device = Device()
    device.reply(server.started(**as_packed))
    assert isinstance(device.action, Fit)
    assert list(device.action.weights) == list(server.MODEL)
    for name, values in server.MODEL.items():
        np.testing.assert_allclose(device.action.weights[name], values, atol=0.01)
        assert not device.action.weights[name].flags.writeable
    device.fitted()
    device.reply(server.updated())
    device.reply(server.model(200, **as_packed))
    assert device.rest() == [IterationDone(1, COMPLETED)]


@pytest.mark.parametrize(
    "changes",
    [{"compress_data": None}, {"min_val": float("nan")}, {"max_val": -9.0}, {"weight_fullname": None}],
)
def test_packed_models_that_cannot_be_read_are_refusals(changes):
    item = replace(quant.compress("a", np.float32([1, 2])), **changes)
    device = Device()
    device.reply(server.started(download_compress_type=2, feature_map=(), compress_feature_map=(item,)))
    assert IterationDone(0, RESTARTED) in device.rest()


@pytest.mark.parametrize("cipher", [None, CipherPublicParams(), CipherPublicParams("")])
def test_no_cipher_is_plain_training(cipher):
    device = Device()
    device.reply(server.started(fl_plan_config=server.plan(cipher=cipher)))
    assert isinstance(device.action, Fit)


def test_refusals_without_a_date_back_off_and_end():
    device = Device()
    pauses = []
    while not isinstance(device.action, Finished):
        device.reply(server.INNER, jitter=0.5)
        pauses += [step.seconds for step in device.rest() if isinstance(step, Sleep)]
    assert pauses == [12.5, 25.0, 50.0]
    assert device.action == LAST
    assert "4 times" in device.action.reason


def test_a_date_ends_the_growth_of_pauses():
    device = Device()
    for body, seconds in [(server.INNER, 10), (server.not_started(str(NOW + 14_000)), 4), (server.INNER, 10)]:
        device.reply(body)
        assert device.rest()[-1] == Sleep(seconds)


def test_pauses_have_a_ceiling():
    policy = Policy()
    assert policy.backoff(10.0, 10_000, 0.0) == 60.0
    assert policy.backoff(100.0, 5, 0.0) == 100.0, "never below the first pause"


def test_a_finished_iteration_renews_the_budget():
    device = Device()
    pauses = []
    for iteration in (1, 2):
        for _ in range(3):
            device.reply(server.INNER)
            pauses += [step.seconds for step in device.rest() if isinstance(step, Sleep)]
        device.until("getModel", iteration)
        device.reply(server.model())
        device.rest()
    assert device.action.round == "startFLJob"
    assert pauses == [10.0, 20.0, 40.0] * 2


def test_a_refusal_in_the_last_iteration_goes_on():
    device = Device()
    device.reply(server.not_started(FUTURE, iteration=3))
    device.rest()
    assert device.action.round == "startFLJob"
    device.reply(server.started(3))
    device.fitted()
    device.reply(server.updated(300, PAST))
    device.rest()
    device.until("getModel", 3)
    device.reply(server.model())
    device.rest()
    assert device.action == Finished(Outcome.COMPLETED)


@pytest.mark.parametrize("round_", REQUESTS)
def test_an_io_error_repeats_the_same_bytes(round_):
    device = Device().until(round_)
    first = device.action
    pauses = []
    for _ in range(3):
        device.feed(IoFailed("connection reset"), jitter=0.5)
        pauses += device.rest()
        assert device.action == first
    assert pauses == [Sleep(0.625), Sleep(1.25), Sleep(2.5)]
    assert device.feed(IoFailed("connection reset")) == LAST
    assert "connection reset" in device.action.reason


def test_an_answer_renews_the_io_budget():
    device = Device()
    for round_ in ("startFLJob", "updateModel", "getModel"):
        device.until(round_) if round_ == "startFLJob" else None
        for _ in range(3):
            device.feed(IoFailed("x"))
            device.rest()
        if round_ == "startFLJob":
            device.reply(server.started())
            device.fitted()
        elif round_ == "updateModel":
            device.reply(server.updated())
    device.reply(server.model())
    assert device.action == IterationDone(1, COMPLETED)


def test_the_patience_for_a_model_ends():
    device = Device().until("getModel")
    polls = 0
    while not isinstance(device.action, Finished):
        assert device.request().timestamp == str(device.now), "a new time stamp each time"
        device.reply(server.model(201))
        device.rest()
        polls += 1
    assert polls == 6
    assert device.action == LAST


@pytest.mark.parametrize(("data", "evaluation"), [(0, 0), (-1, 0), (65_536, 0), (1, -1)])
def test_impossible_data_sizes(data, evaluation):
    assert Device(data_size=data, eval_data_size=evaluation).action == LAST


@pytest.mark.parametrize("accuracy", [float("nan"), float("inf"), 1e39, None, "good"])
def test_an_accuracy_must_be_a_number(accuracy):
    device = Device(eval_data_size=2)
    device.reply(server.started())
    assert device.feed(Evaluated(accuracy)) == LAST


GOOD = {name: values.copy() for name, values in server.MODEL.items()}


@pytest.mark.parametrize(
    ("weights", "loss"),
    [
        (GOOD, float("nan")),
        (GOOD, float("-inf")),
        (GOOD, 1e300),
        (GOOD, None),
        ({}, 0.5),
        (None, 0.5),
        (GOOD | {"stranger": np.ones(2)}, 0.5),
        (GOOD | {"b.bias": np.ones(3)}, 0.5),
        (GOOD | {"b.bias": np.array([1, np.nan])}, 0.5),
        (GOOD | {"b.bias": np.array([1, 3e38])}, 0.5),  # times 4 is no float32
        (GOOD | {"b.bias": ["x", "y"]}, 0.5),
        (GOOD | {"b.bias": [1j, 2j]}, 0.5),
        (GOOD | {"b.bias": object()}, 0.5),
    ],
)
def test_a_training_that_cannot_be_sent_is_not_sent(weights, loss):
    device = Device()
    device.reply(server.started())
    assert device.feed(Fitted(FitResult(weights, loss))) == LAST


@pytest.mark.parametrize("vector", [np.array([[0.25, 0.5]]), np.float32([0.25, 0.5])])
def test_an_evaluation_vector_is_sent_if_the_server_asks_for_it(vector):
    for asked in (1, 0):
        device = Device()
        device.reply(server.started(unsupervised_eval_flg=asked))
        device.feed(Fitted(FitResult(GOOD, 0.5, vector)))
        items = device.request().unsupervised_eval_items
        assert (items is not None) == bool(asked)
        if asked:
            assert [item.eval_data.tolist() for item in items.eval_items] == [[0.25, 0.5]]


def test_a_trainer_need_not_give_an_evaluation_vector():
    device = Device()
    device.reply(server.started(unsupervised_eval_flg=1))
    device.feed(Fitted(FitResult(GOOD, 0.5)))
    assert device.request().unsupervised_eval_items is None


@pytest.mark.parametrize("vector", [np.array([np.nan]), np.array([1e39]), np.array([1j]), ["x"], object()])
def test_an_evaluation_vector_that_cannot_be_sent_is_not_sent(vector):
    device = Device()
    device.reply(server.started(unsupervised_eval_flg=1))
    end = device.feed(Fitted(FitResult(GOOD, 0.5, vector)))
    assert end == LAST
    assert end.reason.startswith("the evaluation vector cannot be sent: ")


def test_trained_weights_may_have_any_shape_and_number_type_and_be_some_of_the_model():
    device = Device()
    device.reply(server.started())
    device.feed(Fitted(FitResult({"a.weight": np.array([[1], [2], [3]], np.float64)}, 0.5)))
    (item,) = device.request().feature_map
    assert (item.weight_fullname, item.data.tolist()) == ("a.weight", [4, 8, 12])


@pytest.mark.parametrize(
    "prepare",
    [
        lambda device: None,
        lambda device: device.reply(server.INNER),
        lambda device: device.feed(IoFailed("x")),
        lambda device: device.reply(server.started()),
        lambda device: device.until("updateModel"),
        lambda device: device.until("getModel"),
    ],
)
def test_stop_ends_it_anywhere(prepare):
    device = Device(eval_data_size=0)
    prepare(device)
    assert device.feed(Stop()) == Finished(Outcome.STOPPED)


def test_failing_trainers_end_it():
    session = Session("job", "device-1")
    assert session.step(TrainerFailed("no data"), NOW) == LAST
    device = Device()
    device.reply(server.started())
    assert device.feed(TrainerFailed("no memory")) == LAST
    assert "no memory" in device.action.reason


def test_an_event_that_answers_nothing_is_a_bug_of_the_caller():
    with pytest.raises(LocalError, match="Resumed"):
        Device().feed(Resumed())


def test_every_phase_but_the_end_has_a_rule():
    assert {phase for phase, _ in Session.TABLE} == set(Phase) - {Phase.OVER}


@pytest.mark.parametrize(
    "faulty",
    [{"retry_time": 0}, {"poll_interval": float("nan")}, {"max_wait": float("inf")}, {"max_restarts": -1}],
)
def test_a_policy_names_its_fault(faulty):
    with pytest.raises(ConfigError, match=next(iter(faulty))):
        Policy(**faulty)


# ---- any history


def mutated(body, cut, position, value):
    changed = bytearray(body[: max(1, len(body) - cut)] or b"?")
    changed[position % len(changed)] = value
    return bytes(changed)


iterations = st.integers(-1, 5)
times = st.sampled_from([None, "", PAST, FUTURE, "junk"])
codes = st.sampled_from([0, 200, 201, 300, 400, 500])
bodies = st.one_of(
    st.builds(server.started, iterations),
    st.builds(server.not_started, times, iterations, codes),
    st.builds(server.updated, codes, times),
    st.builds(server.model, codes, times),
    st.sampled_from([server.SAFEMODE, server.NOT_READY, server.OVER, server.INNER, b""]),
    st.binary(max_size=200),
)
broken = st.builds(mutated, bodies, st.integers(0, 40), st.integers(0, 2000), st.integers(0, 255))
replies = st.one_of(
    st.builds(Replied, st.just(200), bodies),
    st.builds(Replied, st.just(200), broken),
    st.builds(Replied, st.integers(100, 599), st.binary(max_size=20)),
    st.builds(IoFailed, st.text(max_size=10)),
)
good = {
    "startFLJob": st.builds(Replied, st.just(200), st.builds(server.started, st.integers(1, 3))),
    "updateModel": st.just(Replied(200, server.updated())),
    "getModel": st.just(Replied(200, server.model())),
}
PERSISTENT = Policy(max_restarts=10**6, max_io_retries=10**6)


@settings(deadline=None)
@given(st.data(), st.integers(0, 3))
def test_no_history_confuses_it(data, eval_data_size):
    """Any replies: never an exception, always an action, uploads only for the iteration announced."""
    device = Device(PERSISTENT, eval_data_size=eval_data_size)
    announced = None  # by the last answer to the last startFLJob
    for _ in range(data.draw(st.integers(0, 25))):
        request = device.request()
        if isinstance(request, RequestFLJob):
            announced = None
        else:
            assert request.iteration == announced
        event = data.draw(st.one_of(good[device.action.round], replies))
        device.feed(event, data.draw(st.floats(0, 0.999)))
        if isinstance(device.action, Evaluate):
            device.feed(Evaluated(0.5))
        if isinstance(device.action, Fit):
            announced = decode(ResponseFLJob, event.body).iteration
            device.fitted()
        device.rest()
        if isinstance(device.action, Finished):
            break
        assert isinstance(device.action, Send)
