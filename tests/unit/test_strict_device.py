"""The model of the original device: it sends what that one sends, and each fatal reaction really comes."""

import ast
import contextlib
import gzip
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import scripted_server as server
import strict_device
from scripted_server import Script, ScriptedServer
from strict_device import Fatal, NotModelled, OkHttp, Status, StrictDevice, Why

from fedcore.wire.codec import decode
from fedcore.wire.messages import (
    CipherPublicParams,
    CompressFeatureMap,
    FeatureMap,
    RequestFLJob,
    RequestGetModel,
    RequestUpdateModel,
)

NOW = 1_800_000_000_000
SOON, PAST = str(NOW + 4_000), str(NOW - 1)


class Device(StrictDevice):
    """A strict device against a script, with a clock that only sleeping moves."""

    def __init__(self, *answers, train=None, **options):
        self.now = NOW
        self.slept = []
        self.script = Script(*answers)
        options = {"fl_id": "device-1", "sleep": self.rest, "clock": lambda: self.now} | options
        super().__init__("http://unused", train or self.add_one, 4, http=self.script, **options)

    def rest(self, seconds):
        self.slept.append(seconds)
        self.now += round(seconds * 1000)

    @staticmethod
    def add_one(weights, plan):
        return {name: values + 1 for name, values in weights.items()}, 0.5


def one(iteration=1, iterations=1, **changes):
    return server.started(iteration, fl_plan_config=server.plan(iterations=iterations), **changes)


def fatal(*answers, **options):
    device = Device(*answers, **options)
    with pytest.raises(Fatal) as caught:
        device.run()
    assert device.script.answers == [], "it ended before the last answer"
    return caught.value.why


# ---- what it sends


def test_a_whole_job():
    device = Device(
        *(a for k in (1, 2, 3) for a in (server.started(k), server.updated(), server.model())),
        evaluate=lambda weights: 0.25,
        eval_data_size=2,
    )
    assert device.run() is Status.SUCCESS
    assert device.callbacks == [(1, 200), (2, 200), (3, 200)]
    assert [e.round for e in device.exchanges] == ["startFLJob", "updateModel", "getModel"] * 3
    assert (device.slept, device.waits) == ([], [])
    start = decode(RequestFLJob, device.exchanges[3].request)
    assert (start.fl_name, start.fl_id, start.iteration) == ("strict.Device", "device-1", 1)
    assert (start.data_size, start.eval_data_size, start.timestamp) == (4, 2, str(NOW))
    assert start.download_compress_types.tolist() == [0, 2]
    update = decode(RequestUpdateModel, device.exchanges[4].request)
    assert (update.fl_id, update.iteration, update.upload_loss, update.upload_accuracy) == (
        "device-1",
        2,
        0.5,
        0.25,
    )
    assert [(f.weight_fullname, f.data.tolist()) for f in update.feature_map] == [
        ("b.bias", [6, 2]),
        ("a.weight", [8, 12, 16]),
    ]


def test_getModel_has_the_fields_of_the_recorded_original():
    recorded = bytes.fromhex(
        "100000000c00140010000c00080004000c0000001000000014000000010000002000000002000000"
        "000200000d000000313739353333373737363133390000000f00000064656d6f2e44656d6f436c69656e7400"
    )
    device = Device(
        *(one(), server.updated(), server.model()), fl_name="demo.DemoClient", clock=lambda: 1795337776139
    )
    device.run()
    ours = device.exchanges[-1].request
    original, sent = decode(RequestGetModel, recorded), decode(RequestGetModel, ours)
    assert sent.download_compress_types.tolist() == original.download_compress_types.tolist()
    assert (sent.fl_name, sent.iteration, sent.timestamp) == (
        *(original.fl_name, original.iteration, original.timestamp),
    )


def test_the_head_of_a_request():
    """Byte for byte what OkHttp puts before a body."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        heads = []

        def answer():
            with listener.accept()[0] as connection:
                received = b""
                while not received.endswith(b"body"):
                    received += connection.recv(1000)
                heads.append(received)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        http = OkHttp(f"http://127.0.0.1:{port}")
        assert http.post("startFLJob", b"body") == (200, b"")
        thread.join()
        http.close()
    assert heads == [
        b"POST /startFLJob HTTP/1.1\r\n"
        b"Content-Type: applicatiom/json;charset=utf-8\r\n"
        b"Content-Length: 4\r\n"
        b"Host: 127.0.0.1:%d\r\n"
        b"Connection: Keep-Alive\r\n"
        b"Accept-Encoding: gzip\r\n"
        b"User-Agent: okhttp/3.14.9\r\n"
        b"\r\nbody" % port
    ]


def test_it_knows_nothing_of_fedclient():
    tree = ast.parse(Path(strict_device.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any((name or "").startswith("fedclient") for name in imported)


# ---- the budget of refusals


def refused(next_req_time=SOON, iteration=1, iterations=9):
    plan = server.plan(iterations=iterations)
    return server.not_started(next_req_time, iteration, fl_plan_config=plan)


def test_two_refusals_end_it():
    assert fatal(refused(), refused(str(NOW + 9_000))) is Why.TRIES


def test_two_texts_of_an_unready_server_end_it():
    device = Device(one(1, 9), server.updated(), server.model(), server.SAFEMODE, server.NOT_READY)
    with pytest.raises(Fatal) as caught:
        device.run()
    assert caught.value.why is Why.TRIES
    assert device.slept == [10.0, 10.0]


def test_one_refusal_is_waited_for():
    device = Device(refused(iterations=1, iteration=0), one(), server.updated(), server.model())
    assert device.run() is Status.SUCCESS
    assert (device.slept, device.waits, device.callbacks) == ([4.0], [4000], [(0, 300), (1, 200)])


def test_a_refused_upload_and_a_refused_start_end_it():
    assert fatal(one(1, 9), server.updated(300, SOON), refused(str(NOW + 9_000))) is Why.TRIES


def test_two_refused_uploads_of_one_iteration_end_it():
    late = str(NOW + 9_000)
    assert fatal(one(1, 9), server.updated(300, SOON), one(1, 9), server.updated(300, late)) is Why.TRIES


def test_a_new_iteration_renews_the_budget():
    answers = [one(1, 9), server.updated(300, SOON), one(2, 9), server.updated(300, str(NOW + 9_000))]
    device = Device(*answers, one(9, 9), server.updated(), server.model())
    assert device.run() is Status.SUCCESS


def test_a_finished_iteration_renews_the_budget():
    done = (server.updated(), server.model())
    device = Device(refused(), one(1, 9), *done, refused(str(NOW + 9_000), 2), one(9, 9), *done)
    assert device.run() is Status.SUCCESS


@pytest.mark.parametrize(
    "answers",
    [
        [refused(iteration=3, iterations=3)],
        [one(3, 3), server.updated(300, SOON)],
        [one(3, 3), server.updated(), server.model(300, SOON)],
    ],
)
def test_a_refusal_in_the_last_iteration_ends_the_job(answers):
    device = Device(*answers)
    assert device.run() is Status.RESTART
    assert device.callbacks == [(3, 300)]


def test_a_fresh_device_survives_one_text():
    """Before any answer it stands at iteration 0 of 1, so the loop goes on."""
    device = Device(server.SAFEMODE, one(), server.updated(), server.model())
    assert device.run() is Status.SUCCESS


# ---- times of a refusal


@pytest.mark.parametrize(
    "time", [None, "", "soon", PAST, str(NOW), "1e99", " 1900000000000", "1_900_000_000_000"]
)
def test_a_time_that_kills(time):
    assert fatal(refused(time)) is Why.NEXT_REQ_TIME
    assert fatal(one(), server.updated(300, time)) is Why.NEXT_REQ_TIME
    assert fatal(one(), server.updated(), server.model(300, time)) is Why.NEXT_REQ_TIME


def test_a_long_wait_is_cut():
    device = Device(refused(str(NOW + 10**8), 0, 1), one(), server.updated(), server.model())
    device.run()
    assert (device.slept, device.waits) == ([1800.0], [10**8])


def test_scales_shorten_sleeps_but_not_the_judgement():
    device = Device(
        *(refused(iteration=0, iterations=1), one(), server.updated(), server.model(201), server.model()),
        time_scale=0.1,
        wait_scale=0.5,
    )
    device.run()
    assert (device.slept, device.waits) == ([2.0, 1.0], [4000])


def test_the_real_clock_judges():
    for lead, ends in [(-1_000, True), (60_000, False)]:
        time_ms = time.time_ns() // 1_000_000 + lead
        script = Script(refused(str(time_ms), 0, 1), one(), server.updated(), server.model())
        device = StrictDevice("http://unused", Device.add_one, 4, http=script, sleep=lambda _: None)
        with pytest.raises(Fatal) if ends else contextlib.nullcontext():
            device.run()
        assert ends or 50_000 < device.waits[0] <= 60_000


# ---- bodies and codes


@pytest.mark.parametrize(
    "body",
    [b"", server.INNER, b"Verify flatbuffers schema failed for RequestFLJob.", b"\xff" * 99, b"<html>"],
)
def test_a_body_that_is_no_table_kills(body):
    assert fatal(body) is Why.NOT_A_TABLE
    assert fatal(one(), body) is Why.NOT_A_TABLE
    assert fatal(one(), server.updated(), body) is Why.NOT_A_TABLE


def test_the_job_is_over():
    assert fatal(server.OVER) is Why.JOB_OVER
    assert fatal(one(), server.OVER) is Why.JOB_OVER
    assert fatal(one(), server.updated(), server.OVER) is Why.JOB_OVER


def test_a_text_is_found_anywhere_even_in_a_table():
    assert fatal(one(reason=server.OVER.decode())) is Why.JOB_OVER
    weights = {server.SAFEMODE.decode(): np.ones(1, np.float32)}
    text = one(feature_map=server.feature_map(weights))
    device = Device(text, one(), server.updated(), server.model())
    assert device.run() is Status.SUCCESS
    assert device.waits == [10_000]


@pytest.mark.parametrize("text", [server.SAFEMODE, server.OVER])
@pytest.mark.parametrize("tail", [b":later", b": 7", b":99999999999"])
def test_a_colon_kills(text, tail):
    assert fatal(text + tail) is Why.TEXT_WITH_COLON


def test_colons_that_do_not_kill():
    device = Device(server.SAFEMODE + b":0", one(), server.updated(), server.SAFEMODE + b":", server.model())
    assert device.run() is Status.SUCCESS
    device = Device(server.SAFEMODE + b":5")
    assert (device.run(), device.iteration) == (Status.RESTART, 5), "iteration 5 of 1 ends the job"


@pytest.mark.parametrize("retcode", [200, 201, 300, 400, 500])
def test_every_answer_to_startFLJob_needs_a_plan(retcode):
    assert fatal(server.started(retcode=retcode, fl_plan_config=None)) is Why.NO_PLAN


def test_201_outside_polling_kills():
    assert fatal(one(retcode=201)) is Why.CODE_201
    assert fatal(one(), server.updated(201)) is Why.CODE_201


@pytest.mark.parametrize("retcode", [0, 202, 400, 404, 500])
def test_codes_that_end_the_job(retcode):
    assert fatal(one(retcode=retcode)) is Why.CODE
    assert fatal(one(), server.updated(retcode)) is Why.CODE
    assert fatal(one(), server.updated(), server.model(retcode)) is Why.CODE


@pytest.mark.parametrize("status", [302, 400, 404, 413, 500, 503])
def test_a_status_that_is_not_2xx_kills(status):
    assert fatal((status, one())) is Why.HTTP_STATUS
    assert fatal(one(), (status, server.updated())) is Why.HTTP_STATUS
    assert fatal(one(), server.updated(), (status, server.model())) is Why.HTTP_STATUS


def test_any_2xx_will_do():
    assert Device((201, one()), (204, server.updated()), (299, server.model())).run() is Status.SUCCESS


def test_io_errors_are_never_retried():
    assert fatal(OSError("reset")) is Why.IO
    assert fatal(one(), OSError("reset")) is Why.IO
    assert fatal(one(), server.updated(), OSError("reset")) is Why.IO


# ---- polling


def test_the_patience_of_polling():
    device = Device(one(), server.updated(), *[server.model(201, None)] * 17, server.SAFEMODE, server.model())
    assert device.run() is Status.SUCCESS
    assert device.slept == [10.0] * 18
    assert fatal(one(), server.updated(), *[server.model(201)] * 18, server.NOT_READY) is Why.PATIENCE


def test_every_poll_has_a_new_time_stamp():
    device = Device(one(), server.updated(), server.model(201), server.model())
    device.run()
    stamps = [decode(RequestGetModel, e.request).timestamp for e in device.exchanges[2:]]
    assert stamps == [str(NOW), str(NOW + 10_000)]


# ---- plans and weights


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"server_mode": "CLOUD_TRAINING"}, Why.PLAN),
        ({"server_mode": None}, Why.PLAN),
        ({"epochs": 0}, Why.PLAN),
        ({"mini_batch": 0}, Why.PLAN),
        ({"cipher": None}, Why.CIPHER),
        ({"cipher": CipherPublicParams("STABLE_PW_ENCRYPT")}, Why.CIPHER),
    ],
)
def test_plans_that_cannot_be_followed(changes, why):
    assert fatal(server.started(fl_plan_config=server.plan(**changes))) is why


@pytest.mark.parametrize("cipher", ["PW_ENCRYPT", "DP_ENCRYPT", "SIGNDS"])
def test_what_the_original_can_and_the_model_cannot(cipher):
    plan = server.plan(cipher=CipherPublicParams(cipher))
    with pytest.raises(NotModelled, match=cipher):
        Device(server.started(fl_plan_config=plan)).run()
    with pytest.raises(NotModelled):
        Device(one(upload_compress_type=1)).run()


@pytest.mark.parametrize(
    "cipher", [CipherPublicParams(), CipherPublicParams(""), CipherPublicParams("NOT_ENCRYPT")]
)
def test_no_encryption(cipher):
    plan = server.plan(iterations=1, cipher=cipher)
    device = Device(server.started(fl_plan_config=plan), server.updated(), server.model())
    assert device.run() is Status.SUCCESS


def test_a_learning_rate_of_0_means_the_previous_one():
    rates = []

    def train(weights, plan):
        rates.append(plan.lr)
        return weights, 0.5

    answers = []
    for iteration, rate in enumerate([0, 0.5, 0], 1):
        plan = server.plan(lr=rate, iterations=3)
        answers += [server.started(iteration, fl_plan_config=plan), server.updated(), server.model()]
    Device(*answers, train=train).run()
    assert rates == pytest.approx([0.1, 0.5, 0.5])


QUANT = (CompressFeatureMap("b.bias", np.array([-128, 127], np.int8), -1.0, 1.0),)


@pytest.mark.parametrize(
    "changes",
    [
        {"feature_map": ()},
        {"feature_map": None},
        {"download_compress_type": 2},
        {"download_compress_type": 1},
        {"feature_map": (FeatureMap(None, np.ones(1, np.float32)),)},
        {"feature_map": (FeatureMap("a.weight"),)},
        {"download_compress_type": 2, "compress_feature_map": (CompressFeatureMap("b.bias"),)},
    ],
)
def test_weights_must_be_there(changes):
    assert fatal(one(**changes)) is Why.NO_WEIGHTS
    assert fatal(one(), server.updated(), server.model(**changes)) is Why.NO_WEIGHTS


@pytest.mark.parametrize("weights", [{"stranger": np.ones(2)}, {"b.bias": np.ones(3)}])
def test_weights_must_be_those_of_the_model(weights):
    sizes = {name: values.size for name, values in server.MODEL.items()}
    bad = server.feature_map(server.MODEL | weights)
    assert fatal(one(feature_map=bad), model=sizes) is Why.UNKNOWN_WEIGHT
    assert fatal(one(), server.updated(), server.model(feature_map=bad)) is Why.UNKNOWN_WEIGHT


def test_packed_weights_are_unpacked():
    seen = []

    def train(weights, plan):
        seen.append(weights["b.bias"])
        return weights, 0.5

    packed = {"feature_map": (), "download_compress_type": 2, "compress_feature_map": QUANT}
    Device(one(**packed), server.updated(), server.model(**packed), train=train).run()
    np.testing.assert_allclose(seen[0], [-1, 1], atol=1e-6)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_must_be_a_number(loss):
    assert fatal(one(), train=lambda weights, plan: (weights, loss)) is Why.LOSS
    assert fatal(one(), evaluate=lambda weights: float("nan")) is Why.LOSS


def test_no_data_and_stop():
    device = Device()
    device.data_size = 0
    with pytest.raises(Fatal) as caught:
        device.run()
    assert caught.value.why is Why.NO_DATA
    device = Device()
    device.stop()
    with pytest.raises(Fatal) as caught:
        device.run()
    assert caught.value.why is Why.STOPPED
    device = Device(one(), server.updated(), server.model(201), sleep=lambda _: device.stop())
    with pytest.raises(Fatal) as caught:
        device.run()
    assert caught.value.why is Why.STOPPED


# ---- over real sockets


def over_http(answer, **options):
    with ScriptedServer(answer) as running:
        device = StrictDevice(running.url, Device.add_one, 4, **options)
        return device.run(), device, running.connections


def scripted(*answers, headers=None):
    script = Script(*answers)

    def answer(path, _, body):
        status, reply = script(path, body)
        return status, headers or {}, reply

    return answer


def test_a_job_over_http():
    status, device, connections = over_http(scripted(one(), server.updated(), server.model()))
    assert (status, connections) == (Status.SUCCESS, 1)
    assert all(exchange.seconds > 0 for exchange in device.exchanges)


def test_gzip_and_chunks_are_understood():
    packed = [gzip.compress(body) for body in (one(), server.updated(), server.model())]
    assert over_http(scripted(*packed, headers={"Content-Encoding": "gzip"}))[0] is Status.SUCCESS
    chunks = [
        b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) for body in (one(), server.updated(), server.model())
    ]
    chunked = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    assert over_http(scripted(*chunks, headers=chunked))[0] is Status.SUCCESS


def why_over_http(answer, **options):
    with pytest.raises(Fatal) as caught:
        over_http(answer, **options)
    return caught.value.why


def test_a_silent_server_kills():
    assert why_over_http(lambda *_: (ScriptedServer.hang, {}, b""), read_timeout=0.01) is Why.IO
    assert strict_device.READ_TIMEOUT == 90.0
    assert strict_device.CONNECT_TIMEOUT == 30.0
    http = StrictDevice("http://127.0.0.1:1", Device.add_one, 4).http
    assert (http.connect_timeout, http.read_timeout) == (30.0, 90.0)


def test_a_connection_that_breaks_kills():
    assert why_over_http(lambda *_: None) is Why.IO
    assert why_over_http(lambda *_: (200, {"Content-Length": "9", "Connection": "close"}, b"short")) is Why.IO
    assert why_over_http(lambda *_: (200, {"Content-Encoding": "gzip"}, b"no gzip")) is Why.IO


def test_nobody_there_kills():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        device = StrictDevice(f"http://127.0.0.1:{taken.getsockname()[1]}", Device.add_one, 4)
        with pytest.raises(Fatal) as caught:
            device.run()
        assert caught.value.why is Why.IO


def test_a_kept_connection_that_was_closed_is_opened_again_once():
    with ScriptedServer(lambda path, headers, body: (200, {}, body)) as running:
        http = OkHttp(running.url)
        http.post("getModel", b"x")
        running.drop_connections()
        assert http.post("getModel", b"y") == (200, b"y")
        assert (http.repeats, running.connections) == (1, 2)
        http.close()


def test_the_path_is_appended_verbatim():
    paths = []

    def answer(path, headers, body):
        paths.append(path)
        return 200, {}, b""

    with ScriptedServer(answer) as running:
        for prefix in ("", "/fl", "/fl/"):
            http = OkHttp(running.url + prefix)
            http.post("getModel", b"x")
            http.close()
    assert paths == ["/getModel", "/fl/getModel", "/fl//getModel"]
    with pytest.raises(ValueError, match="domainName"):
        OkHttp("localhost:6666")


def test_elb_draws_a_port_per_request():
    http = OkHttp("http://10.0.0.1:6000", elb_servers=3)
    drawn = []

    def connect(port):
        drawn.append(port)
        raise OSError("no route")

    http._connect = connect
    for _ in range(30):
        with pytest.raises(OSError):
            http.post("getModel", b"x")
    assert set(drawn) == {6000, 6001, 6002}
