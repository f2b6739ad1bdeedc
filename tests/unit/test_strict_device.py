"""The model of the original device: it sends what that one sends, and each fatal reaction really comes."""

import ast
import contextlib
import gzip
import hashlib
import json
import random
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import scripted_server as server
import strict_cipher
import strict_device
from scripted_server import Script, ScriptedServer
from strict_cipher import Broken, Pairwise
from strict_device import Fatal, NotModelled, OkHttp, Status, StrictDevice, Why

from fedcore.wire.codec import decode, encode
from fedcore.wire.messages import (
    CipherPublicParams,
    ClientPublicKeys,
    ClientShare,
    CompressFeatureMap,
    DPParams,
    DSParams,
    FeatureMap,
    PWParams,
    ReconstructSecret,
    RequestExchangeKeys,
    RequestFLJob,
    RequestGetModel,
    RequestShareSecrets,
    RequestUpdateModel,
    ResponseExchangeKeys,
    ResponseShareSecrets,
    ReturnClientList,
    ReturnExchangeKeys,
    ReturnShareSecrets,
    SendReconstructSecret,
)

VECTORS = Path(__file__).parents[1] / "vectors"
SECAGG, COMPRESSION, PRIVACY = (
    json.loads((VECTORS / f"{name}.json").read_text()) for name in ("secagg", "compression", "privacy")
)
PRIME = bytes.fromhex(SECAGG["shamir"]["prime"])
NOW = 1_800_000_000_000
SOON, PAST = str(NOW + 4_000), str(NOW - 1)


class Device(StrictDevice):
    """A strict device against a script, with a clock that only sleeping moves."""

    def __init__(self, *answers, train=None, **options):
        self.now = NOW
        self.slept = []
        self.script = Script(*answers)
        usual = {"fl_id": "device-1", "sleep": self.rest, "clock": lambda: self.now, "http": self.script}
        super().__init__("http://unused", train or self.add_one, 4, **usual | options)

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


@pytest.mark.parametrize("module", [strict_device, strict_cipher])
def test_it_knows_nothing_of_our_devices_and_ciphers(module):
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    common = {"fedcore.errors", "fedcore.wire.codec", "fedcore.wire.messages"}
    assert {name for name in imported if name.startswith("fed")} <= common


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
def test_a_cipher_needs_its_parameters(cipher):
    plan = server.plan(cipher=CipherPublicParams(cipher))
    assert fatal(server.started(fl_plan_config=plan)) is Why.CIPHER


def test_what_the_model_cannot():
    with pytest.raises(NotModelled, match="upload_compress_type 2"):
        Device(one(upload_compress_type=2)).run()
    masks = server.plan(cipher=CipherPublicParams("PW_ENCRYPT", PWParams(2, prime=PRIME)))
    with pytest.raises(NotModelled, match="with PW_ENCRYPT"):
        Device(server.started(upload_compress_type=1, fl_plan_config=masks)).run()


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


# ---- golden vectors


def H(text):
    return bytes.fromhex(text)


def bits(values):
    return [f"{word:08x}" for word in np.asarray(values, np.float32).view(np.uint32)]


def test_keys_streams_and_seals():
    known = SECAGG["agreement"]
    private, public = H(known["a_private"]), H(known["b_public"])
    assert strict_cipher.agreed(private, public).hex() == known["key_without_salt"]
    assert strict_cipher.agreed(private, public, H(known["salt"])).hex() == known["key_with_salt"]
    assert strict_cipher.public_of(private).hex() == known["a_public"]
    known = SECAGG["stream"]
    assert bits(strict_cipher.stream(H(known["key"]), H(known["iv"]), 8)) == known["floats"]
    known = SECAGG["seal"]
    wire = strict_cipher.sealed(H(known["key"]), H(known["iv"]), H(known["plain"]))
    assert wire.hex() == known["sealed"]
    assert strict_cipher.opened(H(known["key"]), wire) == H(known["plain"])


def test_shares():
    known = SECAGG["shamir"]
    coefficients = [int(one, 16) for one in known["coefficients"]]
    for case in known["secrets"]:
        for index, share in case["shares"].items():
            made = strict_cipher.share_of(
                H(case["secret"]), coefficients, int(index), int(known["prime"], 16)
            )
            assert made.hex() == share
    assert strict_cipher.share_of(bytes(32), [], 1, 97) == b"", "nothing stands for 0"


CLIENT = SECAGG["client"]


def bob():
    """The device of the vectors, which has the others' keys and knows who has shared with it."""
    device = Pairwise("bob", 4, PWParams(CLIENT["t"], prime=PRIME))
    own = CLIENT["keys"]["bob"]
    device.c, device.s, device.b = H(own["c_private"]), H(own["s_private"]), H(CLIENT["b"])
    device.ind_iv, device.pw_iv, device.pw_salt = H(CLIENT["ind_iv"]), H(own["pw_iv"]), H(own["pw_salt"])
    entries = [
        ClientPublicKeys(
            name, *(H(CLIENT["keys"][name][part]) for part in ("c_public", "s_public", "pw_iv", "pw_salt"))
        )
        for name in CLIENT["members"]
    ]
    device.take_keys(ReturnExchangeKeys(200, 4, tuple(entries)), NOW)
    items = tuple(ClientShare(name, b"sealed") for name in CLIENT["sources"])
    device.take_shares(ReturnShareSecrets(200, 4, items), NOW)
    return device


def test_a_mask():
    assert bits(bob().mask(6)) == CLIENT["mask"]


def test_the_shares_of_a_device():
    device = bob()
    drawn = iter([int(CLIENT["coefficients"][name], 16) for name in "sb"])
    device._coefficients = lambda: [next(drawn)]
    ivs = iter([H(CLIENT["sealed"][name])[:16] for name in ("alice", "carol")])
    device._random = lambda count: next(ivs)
    shares = device.share_secrets("1").encrypted_shares
    assert {one.fl_id: one.share.hex() for one in shares} == CLIENT["sealed"]
    assert {one.index for one in shares} == {0}
    for name in ("alice", "carol"):
        record = strict_cipher.opened(device._key_with(name), H(CLIENT["sealed"][name]))
        assert record.hex() == CLIENT["records"][name]
        s_share, b_share, *places = strict_cipher.read_record(record)
        assert places == [{"alice": 1, "carol": 2}[name]] * 2
        assert strict_cipher.record_of(s_share, b_share, places[0]) == record


def test_a_word_of_ones_breaks_the_mask(monkeypatch):
    class Ones:
        def __init__(self, *_):
            pass

        def encryptor(self):
            return self

        def update(self, zeros):
            return bytes(len(zeros) - 4) + b"\xff" * 4

    monkeypatch.setattr(strict_cipher, "Cipher", Ones)
    with pytest.raises(Broken, match="-1"):
        strict_cipher.stream(bytes(32), bytes(16), 3)


def test_layers_begin_at_the_masks_start():
    layers = {"a": np.float32([1, 2, 3]), "b": np.float32([4])}
    made = strict_cipher.masked(layers, 2, np.float32([0.5, 0, -1, 9]))
    assert {name: values.tolist() for name, values in made.items()} == {"a": [2.5, 4, 5], "b": [8.5]}


@pytest.mark.parametrize("record", [b"", b"\1\1\1", b"\1\1\1\1abc", b"\x80\0\0\0" + bytes(128)])
def test_records_that_do_not_fit(record):
    with pytest.raises(Broken, match="record"):
        strict_cipher.read_record(record)


def test_ids_are_compared_as_in_java():
    assert strict_cipher.comes_after("b", "a") and not strict_cipher.comes_after("a", "a")
    assert strict_cipher.comes_after("\uffff", "\U00010000"), "by UTF-16 units, where bytes say otherwise"


def test_the_mask_of_positions():
    for case in COMPRESSION["mask"]["cases"]:
        made = strict_cipher.sparse_mask(case["seed"], case["n"], case["rate"])
        if "mask" in case:
            assert "".join("1" if one else "0" for one in made) == case["mask"]
        else:
            assert made.sum() == case["ones"]
            assert hashlib.sha256(made.astype(np.uint8).tobytes()).hexdigest() == case["sha256_of_01_bytes"]


def test_packed_weights():
    known = COMPRESSION["download"]
    item = CompressFeatureMap("a", np.int8(known["steps"]), known["low"], known["high"])
    assert bits(strict_cipher.restored(item)) == known["restored_bits"]
    known = COMPRESSION["upload_of_a_device"]
    base, trained = {"a": np.float32(known["model"])}, {"a": np.float32(known["trained"]) * np.float32(3)}
    chosen = np.array([one == "1" for one in known["mask"]])
    (layer,) = strict_cipher.packed_update(trained, base, 3, chosen)
    assert (layer.min_val, layer.max_val) == (known["low"], known["high"])
    assert layer.compress_data.tolist() == known["steps"]
    (layer,) = strict_cipher.packed_update(trained, base, 3, np.zeros(10, bool))
    assert {"low": layer.min_val, "high": layer.max_val} == known["nothing_chosen"]
    assert layer.compress_data.size == 0


def test_the_deviation_of_noise():
    for epsilon, delta, clip, sigma in PRIVACY["sigma"]["cases"]:
        made = strict_cipher.sigma(*(float(np.float32(one)) for one in (epsilon, delta)), clip)
        assert made == pytest.approx(sigma, rel=1e-12)


def test_the_number_of_positions():
    for ratio, top, size, epsilon, told, threshold in PRIVACY["positions"]["cases"]:
        params = DSParams(sign_k=top / size * (1 + 1e-6), sign_eps=epsilon, sign_thr_ratio=ratio)
        assert strict_cipher.dimensions(params, size) == (top, told, threshold)


# ---- masked uploads


class Peers:
    """A server as a masked device meets it, with two other devices; ``answers`` hold what it says instead, by round."""

    POLLED = ("getKeys", "getSecrets", "getClientList")

    def __init__(self, polls=0, clients=("alice", "carol", "device-1"), **answers):
        params = PWParams(2, prime=PRIME)
        self.others = {name: Pairwise(name, 1, params) for name in ("alice", "carol")}
        plan = server.plan(iterations=1, cipher=CipherPublicParams("PW_ENCRYPT", params))
        self.plan, self.clients, self.answers = plan, clients, {k: list(v) for k, v in answers.items()}
        self.polls = dict.fromkeys(self.POLLED, polls)
        self.asked = []
        self.update = self.report = None

    def post(self, round_, body):
        self.asked.append(round_)
        if self.answers.get(round_):
            answer = self.answers[round_].pop(0)
            if isinstance(answer, Exception):
                raise answer
            return 200, answer
        if self.polls.get(round_):
            self.polls[round_] -= 1
            reply = {"getKeys": ReturnExchangeKeys, "getSecrets": ReturnShareSecrets}.get(
                round_, ReturnClientList
            )
            return 200, encode(reply(retcode=201))
        return 200, getattr(self, round_)(body)

    def startFLJob(self, body):
        return server.started(fl_plan_config=self.plan)

    def exchangeKeys(self, body):
        own = decode(RequestExchangeKeys, body)
        asked = [one.exchange_keys("1") for one in self.others.values()]
        self.keys = tuple(
            ClientPublicKeys(one.fl_id, one.c_pk, one.s_pk, one.pw_iv, one.pw_salt) for one in (own, *asked)
        )
        for one in self.others.values():
            one.take_keys(ReturnExchangeKeys(200, 1, self.keys), NOW)
        return encode(ResponseExchangeKeys(retcode=200))

    def getKeys(self, body):
        return encode(ReturnExchangeKeys(200, 1, self.keys))

    def shareSecrets(self, body):
        shared = decode(RequestShareSecrets, body).encrypted_shares
        self.dealt = {one.fl_id: one.share for one in shared}
        return encode(ResponseShareSecrets(retcode=200))

    def getSecrets(self, body):
        shares = {
            name: {share.fl_id: share.share for share in one.share_secrets("1").encrypted_shares}
            for name, one in self.others.items()
        }
        for name, one in self.others.items():
            got = [("device-1", bytes(self.dealt[name]))]
            got += [(other, dealt[name]) for other, dealt in shares.items() if other != name]
            items = tuple(ClientShare(*item) for item in got)
            one.take_shares(ReturnShareSecrets(200, 1, items), NOW)
        items = tuple(ClientShare(name, dealt["device-1"]) for name, dealt in shares.items())
        return encode(ReturnShareSecrets(200, 1, items))

    def updateModel(self, body):
        self.update = decode(RequestUpdateModel, body)
        return server.updated()

    def getClientList(self, body):
        return encode(ReturnClientList(retcode=200, clients=self.clients))

    def reconstructSecrets(self, body):
        self.report = decode(SendReconstructSecret, body)
        return encode(ReconstructSecret(retcode=200))

    def getModel(self, body):
        return server.model()


class Masked(Device):
    def __init__(self, peers, **options):
        super().__init__(http=peers, **options)


MASKED_ROUNDS = [
    *("startFLJob", "exchangeKeys", "getKeys", "shareSecrets", "getSecrets"),
    *("updateModel", "getClientList", "reconstructSecrets", "getModel"),
]


def combined(shares):
    """Return the secret that two shares (index, bytes) give."""
    prime = int.from_bytes(PRIME)
    (x, y), (v, w) = ((index, int.from_bytes(share)) for index, share in shares)
    return (y * v * pow(v - x, -1, prime) + w * x * pow(x - v, -1, prime)) % prime


def test_a_masked_job():
    peers = Peers()
    device = Masked(peers)
    assert device.run() is Status.SUCCESS
    assert (peers.asked, device.slept) == (MASKED_ROUNDS, [])
    alice, carol = peers.others.values()
    for one in (alice, carol):
        one.take_list(ReturnClientList(200, clients=("alice", "device-1")), NOW)
    told = {
        one.fl_id: one
        for other in (alice, carol)
        for one in other.reconstruct_secrets("1").reconstruct_secret_shares
    }
    assert set(told) == {"alice", "carol", "device-1"}
    # Its own secret b, from the others' shares, takes its own stream off; the masks with the others cancel theirs.
    records = [(s[4], s[2]) for one in (alice, carol) for s in one._secrets if s[0] == "device-1"]
    seed = combined(records).to_bytes(32)
    ind_iv = decode(RequestExchangeKeys, device.exchanges[1].request).ind_iv
    rest = {}
    for name, values in zip(("b.bias", "a.weight"), peers.update.feature_map, strict=True):
        assert values.weight_fullname == name
        plain = (server.MODEL[name] + 1) * 4
        size = plain.size
        others = sum(
            strict_cipher.stream(
                strict_cipher.agreed(
                    one.s, device_key(peers), alice.pw_salt if one is alice else carol.pw_salt
                ),
                one.pw_iv,
                size,
            )
            for one in (alice, carol)
        )
        rest[name] = values.data - plain - others - strict_cipher.stream(seed, ind_iv, size)
    assert max(np.abs(one).max() for one in rest.values()) < 1e-5, "device-1 is the greatest id, so it adds"


def device_key(peers):
    return peers.keys[0].s_pk


def test_a_report_holds_one_share_of_each_owner():
    peers = Peers(clients=("device-1", "carol"))
    Masked(peers).run()
    alice, carol = peers.others.values()
    told = {one.fl_id: (one.index, bytes(one.share)) for one in peers.report.reconstruct_secret_shares}
    others = {
        name: next(s for s in one._secrets if s[0] == owner)
        for one, name, owner in ((carol, "alice", "alice"), (alice, "carol", "carol"))
        if one.take_list(ReturnClientList(200, clients=()), NOW) is None
    }
    assert combined([told["alice"], (others["alice"][3], others["alice"][1])]) == int.from_bytes(alice.s)
    assert combined([told["carol"], (others["carol"][4], others["carol"][2])]) == int.from_bytes(carol.b)


def test_each_poll_of_a_masked_job_waits_ten_seconds():
    device = Masked(Peers(polls=18), time_scale=0.5)
    assert device.run() is Status.SUCCESS
    assert device.slept == [5.0] * 54
    with pytest.raises(Fatal) as caught:
        Masked(Peers(polls=19)).run()
    assert caught.value.why is Why.PATIENCE


REPLIES = {
    "exchangeKeys": ResponseExchangeKeys,
    "getKeys": ReturnExchangeKeys,
    "shareSecrets": ResponseShareSecrets,
    "getSecrets": ReturnShareSecrets,
    "getClientList": ReturnClientList,
    "reconstructSecrets": ReconstructSecret,
}


def masked_fatal(**answers):
    with pytest.raises(Fatal) as caught:
        Masked(Peers(**answers)).run()
    return caught.value.why


@pytest.mark.parametrize("round_", REPLIES)
def test_how_each_cipher_round_ends_a_device(round_):
    reply = REPLIES[round_]
    assert masked_fatal(**{round_: [encode(reply(retcode=400))]}) is Why.CODE
    assert masked_fatal(**{round_: [encode(reply(retcode=300, next_req_time=PAST))]}) is Why.NEXT_REQ_TIME
    assert masked_fatal(**{round_: [encode(reply(retcode=300))]}) is Why.NEXT_REQ_TIME
    assert masked_fatal(**{round_: [server.OVER]}) is Why.JOB_OVER
    assert masked_fatal(**{round_: [server.INNER]}) is Why.NOT_A_TABLE
    assert masked_fatal(**{round_: [OSError("reset")]}) is Why.IO
    if round_ not in Peers.POLLED:
        assert masked_fatal(**{round_: [encode(reply(retcode=201))]}) is Why.CODE_201


@pytest.mark.parametrize("round_", REPLIES)
def test_a_refusal_in_each_cipher_round(round_):
    """The iteration is the last one, so the device ends after its wait."""
    for answer, slept in (
        (encode(REPLIES[round_](retcode=300, next_req_time=SOON)), 4.0),
        (server.SAFEMODE, 10.0),
    ):
        device = Masked(Peers(**{round_: [answer]}))
        assert device.run() is Status.RESTART
        assert (device.slept, device.callbacks) == ([slept], [(1, 300)])


def test_answers_that_break_a_masked_job():
    few = (ClientPublicKeys("alice", b"\1" * 32, b"\2" * 32, bytes(16), bytes(32)),)
    for answers in (
        {"getKeys": [encode(ReturnExchangeKeys(200, 1))]},
        {"getKeys": [encode(ReturnExchangeKeys(200, 1, few))]},  # one share, of which two give the secret
        {"getSecrets": [encode(ReturnShareSecrets(200, 1))]},
        {"getSecrets": [encode(ReturnShareSecrets(200, 1, ()))]},
        {"getSecrets": [encode(ReturnShareSecrets(200, 1, (ClientShare("eve", bytes(96)),)))]},
        {"getSecrets": [encode(ReturnShareSecrets(200, 1, (ClientShare("alice", bytes(95)),)))]},
        {"getClientList": [encode(ReturnClientList(retcode=200))]},
    ):
        assert masked_fatal(**answers) is Why.SECRETS, answers


# ---- noise, signs, compressed uploads


def uploaded(device):
    return decode(RequestUpdateModel, next(e.request for e in device.exchanges if e.round == "updateModel"))


def one_of(cipher, **changes):
    return server.started(fl_plan_config=server.plan(iterations=1, cipher=cipher), **changes)


def test_noise():
    cipher = CipherPublicParams("DP_ENCRYPT", dp_params=DPParams(50, 0.01, 0.5))
    moved = {name: values + 3 for name, values in server.MODEL.items()}
    device = Device(one_of(cipher), server.updated(), server.model(weights=moved))
    device._normal = lambda count: [2.0] * count
    device.run()
    sigma, step = 0.125933817291993 * 0.05, 0.05 / 5**0.5
    for item in uploaded(device).feature_map:
        expected = (server.MODEL[item.weight_fullname] + step + 2 * sigma) * 4
        np.testing.assert_allclose(item.data, expected, rtol=1e-6)
    assert device.clip == pytest.approx(0.5 * (5 * 9) ** 0.5), "half of what the global model has moved"


def test_the_clip_bound_only_falls_after_the_first_iteration():
    cipher = CipherPublicParams("DP_ENCRYPT", dp_params=DPParams(50, 0.01, 1.0))
    for moved, clip in ((3, 0.05), (0.01, 0.01 * 5**0.5)):
        model = server.model(weights={name: values + moved for name, values in server.MODEL.items()})
        plan = server.plan(iterations=2, cipher=cipher)
        device = Device(server.started(2, fl_plan_config=plan), server.updated(), model)
        device.run()
        assert device.clip == pytest.approx(clip, rel=1e-4)


def test_signs():
    cipher = CipherPublicParams("SIGNDS", ds_params=DSParams(0.25, 100, 0.6, 0.1, 3))
    base = {"a": np.zeros(40, np.float32)}
    change = np.arange(40, dtype=np.float32)[::-1].copy()
    start = one_of(cipher, feature_map=server.feature_map(base))
    answers = start, server.updated(), server.model(weights=base)
    device = Device(*answers, train=lambda weights, plan: ({"a": change}, 0.5))
    device._chance = random.Random(3)
    device.run()
    update = uploaded(device)
    assert [(one.weight_fullname, one.data.size) for one in update.feature_map] == [("a", 0)]
    assert update.sign in (-1, 1) and len(update.index_array) == 3
    top = update.index_array < 10 if update.sign == 1 else update.index_array >= 30
    assert top.all(), "with an epsilon of 100 nearly all are of the top quarter"
    assert update.index_array.tolist() == sorted(update.index_array.tolist())


def test_compressed_uploads():
    sparse = one(iteration=1, upload_compress_type=1, upload_sparse_rate=0.4)
    device = Device(sparse, server.updated(), server.model())
    device.run()
    update = uploaded(device)
    assert (update.upload_compress_type, update.name_vec) == (1, ("b.bias", "a.weight"))
    assert update.upload_sparse_rate == np.float32(0.4)
    assert update.feature_map is None
    counts = [one.compress_data.size for one in update.compress_feature_map]
    mask = strict_cipher.sparse_mask(1, 5, 0.4)
    assert counts == [mask[:2].sum(), mask[2:].sum()] and sum(counts) == 2
