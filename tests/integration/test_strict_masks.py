"""Unmodified devices and ours mask their updates together, in several iterations of one job.

A part of the devices are ``StrictDevice``, the model of the original, which makes its bytes by itself; the others are
fedclient's, some of which leave before some round and are back in the next iteration. Every published model is the
plain weighted mean of the updates that count, and no unmodified device is driven out of the job.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from device_pki import Maker, pems
from integration.cluster import wait_until
from integration.faults import Fleet, fleet_of
from integration.oracle import MODEL
from integration.test_secure_aggregation import ONE_SERVER, POLICY, TWO_HOSTS, Trainer, urls_of
from strict_cipher import restored, sparse_mask
from strict_device import Fatal, KeyStore, OkHttp, Status, StrictDevice

from fedclient import Client, DeviceIdentity, HttpTransport, Outcome, PrivacyOptions
from fedcore.pki.authority import Device
from fedcore.secagg.masks import Layout
from fedcore.wire import codec
from fedcore.wire.messages import RequestUpdateModel, ResponseFLJob, ResponseUpdateModel, Round

ITERATIONS = 4
DEADLINE_S = 60.0
Floats = np.ndarray[Any, np.dtype[np.float32]]


def is_table(reply: bytes) -> bool:
    """Tell a table from the texts of a server that is not ready, or has finished."""
    return not reply.startswith((b"The cluster", b"The server's"))


class Crew:
    """What the devices of a job have in common: who has uploaded when, and which iterations have ended."""

    def __init__(self) -> None:
        self.uploads: dict[int, set[int]] = defaultdict(set)
        self.ended = 0
        self.refused: list[tuple[int, str]] = []  # iteration and round of the waits of unmodified devices
        self._news = threading.Condition()

    def took(self, reply: bytes, iteration: int, number: int) -> None:
        """Note an answer to updateModel."""
        if is_table(reply) and codec.decode(ResponseUpdateModel, reply).retcode == 200:
            with self._news:
                self.uploads[iteration].add(number)

    def end(self, iteration: int) -> None:
        with self._news:
            self.ended = iteration
            self._news.notify_all()

    def await_end(self, iteration: int, seconds: float = DEADLINE_S) -> None:
        with self._news:
            self._news.wait_for(lambda: self.ended >= iteration, seconds)


class Way:
    """The way to the servers of a device of ours, which leaves before some rounds; see ``Silent``."""

    def __init__(self, urls: Sequence[str], number: int, leaves: Mapping[int, str], crew: Crew) -> None:
        self._inner = HttpTransport(urls, 10.0, first=number, rotate=True)
        self._number, self._leaves, self._crew = number, leaves, crew
        self.iteration = 0
        self.client: Client | None = None

    def post(self, round_: Round, body: bytes) -> tuple[int, bytes]:
        if self.iteration > self._crew.ended and self._leaves.get(self.iteration) == round_:
            assert self.client is not None
            self.client.stop()
        status, reply = self._inner.post(round_, body)
        if round_ == "startFLJob" and is_table(reply):
            self.iteration = codec.decode(ResponseFLJob, reply).iteration
        if round_ == "updateModel":
            self._crew.took(reply, self.iteration, self._number)
        return status, reply

    def close(self) -> None:
        self._inner.close()


class Noting:
    """The way to the servers of an unmodified device."""

    def __init__(self, inner: OkHttp, number: int, crew: Crew) -> None:
        self._inner, self._number, self._crew = inner, number, crew
        self.device: StrictDevice | None = None
        self.last: Round | str = ""

    def post(self, round_: str, body: bytes) -> tuple[int, bytes]:
        assert self.device is not None
        status, reply = self._inner.post(round_, body)
        self.last = round_
        if round_ == "updateModel":
            self._crew.took(reply, self.device.iteration, self._number)
        return status, reply


def ours(
    urls: Sequence[str], number: int, leaves: Mapping[int, str], crew: Crew, identity: DeviceIdentity | None
) -> Outcome:
    """Run a device of ours; when it has left, it comes back after the iteration."""
    while True:
        way = Way(urls, number, leaves, crew)
        who: dict[str, Any] = {"identity": identity} if identity else {"client_id": f"device-{number:02}"}
        options = PrivacyOptions(mask_layout=Layout.PER_LAYER)
        client = Client(Trainer(number), way, fl_name="job", policy=POLICY, privacy=options, **who)
        way.client = client
        summary = client.run()
        if summary.outcome is not Outcome.STOPPED:
            assert summary.outcome is not Outcome.FAILED, summary.reason
            return summary.outcome
        crew.await_end(way.iteration)


def unmodified(
    fleet: Fleet, servers: int, number: int, crew: Crew, keystore: KeyStore | None
) -> StrictDevice:
    """Run an unmodified device to its end."""
    url = f"http://127.0.0.1:{fleet.cluster.http}"
    inner = OkHttp(url, elb_servers=servers, seed=number)
    http = Noting(inner, number, crew)
    moved = np.float32((number + 1) / 8)

    def sleep(seconds: float) -> None:
        """A next_req_time may be far off: what matters is that it is not before the iteration's end."""
        if seconds < 1:
            threading.Event().wait(seconds)
        else:
            crew.refused.append((device.iteration, http.last))
            crew.await_end(device.iteration, seconds)

    device = StrictDevice(
        url,
        lambda weights, plan: ({name: values + moved for name, values in weights.items()}, 0.5),
        Trainer(number).size,
        f"device-{number:02}",
        "job",
        http=http,
        sleep=sleep,
        time_scale=0.01,
        keystore=keystore,
    )
    http.device = device
    try:
        ended = device.run()
    except Fatal as fatal:
        last = device.exchanges[-1]
        raise AssertionError(f"{device.fl_id}: {fatal}; {last.round} got {last.reply[:300]!r}") from fatal
    finally:
        inner.close()
    assert ended in (Status.SUCCESS, Status.RESTART)
    return device


@contextmanager
def job(
    directory: Path,
    hosts: Mapping[int, int],
    places: int,
    masks: Mapping[str, Any],
    update: float,
    *,
    hold: float = 2.0,
    **more: Any,
) -> Iterator[Fleet]:
    """Start a job for unmodified devices."""
    layout = {
        "secure_aggregation": {"mask_layout": "per_layer"},
        "device": {"hold_time": hold, "retry_margin": 0.1},
    }
    options = {"start": False, "fl_iteration_num": ITERATIONS, "update_model_ratio": update}
    with fleet_of(directory, hosts, places=places, fedcore=layout, **options) as fleet:
        encrypt = {"encrypt_type": "PW_ENCRYPT", "pw_encrypt": {"cipher_time_window": 20_000, **masks}}
        cluster = fleet.cluster
        cluster.settings |= {"encrypt": encrypt, **more}
        cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
        fleet.start_all()
        yield fleet


def check_models(fleet: Fleet, crew: Crew, places: int) -> dict[int, dict[str, Floats]]:
    """Compare each model, as it comes out, with the plain mean of the updates that count.

    The bound is that of docs/SECURE_AGGREGATION.md for the smallest data size, and once more for the model's float32.
    """
    before = {name: values.reshape(-1) for name, values in MODEL.items()}
    models = {}
    for iteration in range(1, ITERATIONS + 1):
        wait_until(lambda n=iteration: fleet.at(0).model(n).retcode == 200, f"model {iteration}", DEADLINE_S)
        model = fleet.at(0).weights(iteration)
        uploaders = sorted(crew.uploads[iteration])
        crew.end(iteration)
        assert uploaders, f"nobody has uploaded in iteration {iteration}"
        sizes = {number: Trainer(number).size for number in uploaders}
        largest = 0.0
        for name, values in before.items():
            total = np.zeros(values.size)
            for number, size in sizes.items():
                trained = values + np.float32((number + 1) / 8)
                largest = max(largest, float(np.abs(trained).max()))
                total += trained * np.float32(size)
            error = np.abs(model[name] - total / sum(sizes.values())).max()
            bound = (places**2 + 5 * places - 2) / (2 * min(sizes.values())) + 3 * largest
            assert error <= bound * 2.0**-24, (iteration, name, error, uploaders)
        before = models[iteration] = model
    return models


def take_part(
    fleet: Fleet,
    hosts: Mapping[int, int],
    places: int,
    strict: int,
    leaving: Mapping[int, Mapping[int, str]],
    devices: Sequence[Device] | None = None,
    crl: Path | None = None,
) -> tuple[list[StrictDevice], Crew]:
    """Let ``strict`` unmodified devices and ``places - strict`` of ours train; return the former."""
    crew, urls = Crew(), urls_of(fleet, hosts)

    def start(number: int) -> Callable[[], Any]:
        device = devices[number] if devices else None
        if number < strict:
            store = KeyStore(device.attestation.key, tuple(pems(device)), crl) if device else None  # type: ignore[arg-type]
            return lambda: unmodified(fleet, len(hosts), number, crew, store)
        identity = DeviceIdentity(device.attestation.key, device.chain) if device else None  # type: ignore[arg-type]
        return lambda: ours(urls, number, leaving.get(number, {}), crew, identity)

    with ThreadPoolExecutor(places) as pool:
        running: list[Future[Any]] = [pool.submit(start(number)) for number in range(places)]
        try:
            models = check_models(fleet, crew, places)
        finally:
            crew.end(ITERATIONS)
        ended = [one.result(DEADLINE_S) for one in running]
    told = fleet.outcomes()
    assert {number for number, outcome in told if outcome.valid} == set(range(1, ITERATIONS + 1)), told
    for n in hosts:
        for name, values in fleet.at(n).weights(ITERATIONS).items():
            assert np.array_equal(values, models[ITERATIONS][name])
    fleet.check_alive()
    return ended[:strict], crew


ROUNDS_THAT_LOSE = (
    "exchangeKeys",
    "exchangeKeys",
    "getKeys",
    "shareSecrets",
    "getSecrets",
    "updateModel",
    "getClientList",
    "reconstructSecrets",
)


@pytest.mark.parametrize("hosts", [ONE_SERVER, TWO_HOSTS], ids=["one", "two hosts"])
def test_unmodified_devices_among_ours(tmp_path: Path, hosts: dict[int, int]) -> None:
    """Where none leave, some come too late for each round; where some leave, all others are needed in each."""
    leaving = {12 + n: {2: round_, 3: ROUNDS_THAT_LOSE[-1 - n]} for n, round_ in enumerate(ROUNDS_THAT_LOSE)}
    masks = {"share_secrets_ratio": 0.9, "reconstruct_secrets_threshold": 11}
    with job(tmp_path, hosts, 20, masks, 0.7) as fleet:
        devices, crew = take_part(fleet, hosts, 20, 10, leaving)
        assert all(len(crew.uploads[number]) == 14 for number in range(1, ITERATIONS + 1)), crew.uploads
        refused = {round_ for _, round_ in crew.refused}
        assert refused <= {"exchangeKeys", "shareSecrets", "updateModel"}, crew.refused
        for device in devices:
            assert {(2, 200), (3, 200)} <= set(device.callbacks), device.callbacks


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker()


@pytest.fixture(scope="module")
def devices(maker: Maker) -> list[Device]:
    return [maker.device(f"device-{number}") for number in range(12)]


@pytest.mark.parametrize("hosts", [ONE_SERVER, TWO_HOSTS], ids=["one", "two hosts"])
def test_devices_that_sign(
    tmp_path: Path, maker: Maker, devices: list[Device], hosts: dict[int, int]
) -> None:
    """All requests are signed, each device verifies the others' keys, and that all were told one list of uploads."""
    leaving = {
        4 + n: {2: round_, 3: round_}
        for n, round_ in enumerate(
            ("exchangeKeys",) * 3 + ("getKeys", "shareSecrets", "shareSecrets", "updateModel", "pushListSign")
        )
    }
    verify = maker.client_verify(tmp_path / "pki", crl=maker.crl())
    masks = {"share_secrets_ratio": 0.75, "reconstruct_secrets_threshold": 3}
    with job(tmp_path, hosts, 12, masks, 0.4, client_verify=verify) as fleet:
        crl = tmp_path / "pki" / "devices.crl"
        unmodified_ones, crew = take_part(fleet, hosts, 12, 4, leaving, devices, crl)
        assert all(len(crew.uploads[number]) == 5 for number in range(1, ITERATIONS + 1)), crew.uploads
        for device in unmodified_ones:
            rounds = [one.round for one in device.exchanges if one.round in ("pushListSign", "getListSign")]
            assert set(rounds) == {"pushListSign", "getListSign"}


class Returning(Noting):
    """The way to the server of a device that, once refused, asks again at once."""

    def __init__(self, url: str, number: int, away: threading.Event) -> None:
        super().__init__(OkHttp(url), number, Crew())
        self.away, self.refused = away, False

    def post(self, round_: str, body: bytes) -> tuple[int, bytes]:
        assert self.device is not None
        if self.refused and self.device.iteration == 1 and self.last in REFUSING:
            self.away.set()
        return super().post(round_, body)


REFUSING = ("exchangeKeys", "shareSecrets")


def test_devices_that_return_before_the_iteration_is_over(tmp_path: Path) -> None:
    """Refused once for good, they must not be refused again: startFLJob waits until there is something to do.

    Of six devices one comes too late for exchangeKeys, one for shareSecrets; the others train until both are back.
    """
    masks = {"share_secrets_ratio": 0.8, "reconstruct_secrets_threshold": 2}
    returned = [threading.Event() for _ in range(6)]
    with job(tmp_path, ONE_SERVER, 6, masks, 0.6, hold=30.0) as fleet:
        url = urls_of(fleet, ONE_SERVER)[0]

        def run(number: int) -> StrictDevice:
            http = Returning(url, number, returned[number])

            def sleep(seconds: float) -> None:
                if seconds < 1:
                    threading.Event().wait(seconds)
                else:
                    http.refused = True

            def train(weights: dict[str, Floats], plan: Any) -> tuple[dict[str, Floats], float]:
                wait_until(lambda: sum(one.is_set() for one in returned) == 2, "both are back")
                return weights, 0.5

            device = StrictDevice(
                url, train, 1, f"device-{number}", "job", http=http, sleep=sleep, time_scale=0.01
            )
            http.device = device
            device.run()
            return device

        with ThreadPoolExecutor(6) as pool:
            devices = list(pool.map(run, range(6)))
        early = [device.callbacks for device in devices if device.callbacks[0] == (1, 300)]
        assert [callbacks[1][0] for callbacks in early] == [2, 2], early
        assert all(device.waits[0] > 1_250_000 for device in devices if device.callbacks[0] == (1, 300))


# ---- the other forms of uploads

FORMS: dict[str, dict[str, Any]] = {
    "DP_ENCRYPT": {"encrypt": {"encrypt_type": "DP_ENCRYPT"}},
    "SIGNDS": {"encrypt": {"encrypt_type": "SIGNDS", "signds": {"sign_k": 0.25, "sign_dim_out": 5}}},
    "DIFF_SPARSE_QUANT": {
        "compression": {
            "upload_compress_type": "DIFF_SPARSE_QUANT",
            "upload_sparse_rate": 0.4,
            "download_compress_type": "QUANT",
        }
    },
}


def meant_by(update: RequestUpdateModel, model: Mapping[str, Floats], size: int) -> Floats:
    """Return the weights x data size, one behind the other, that an update stands for."""
    whole = np.concatenate([model[name] for name in sorted(model)]).astype(np.float64)
    if update.sign:
        moved = np.zeros(whole.size)
        moved[update.index_array] = update.sign * 0.1
        return (whole + moved) * size
    if update.compress_feature_map:
        mask = sparse_mask(update.iteration, whole.size, update.upload_sparse_rate)
        moved = np.zeros(whole.size)
        moved[mask] = np.concatenate([restored(one) for one in update.compress_feature_map])
        return whole * size + moved
    assert update.feature_map is not None
    return np.concatenate([np.float64(one.data) for one in update.feature_map])


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_uploads(tmp_path: Path, form: str) -> None:
    """What unmodified devices make of their weights, servers take for the same; no cipher hides it from the test."""
    options = {"start": False, "fl_iteration_num": 3}
    with fleet_of(tmp_path, ONE_SERVER, places=3, **options) as fleet:
        fleet.cluster.settings |= FORMS[form]
        fleet.cluster.yaml.write_text(yaml.safe_dump(fleet.cluster.settings))
        fleet.start_all()

        def run(number: int) -> StrictDevice:
            def train(weights: dict[str, Floats], plan: Any) -> tuple[dict[str, Floats], float]:
                steps = np.float32(number + 1) / 8
                return {n: v + steps * np.arange(v.size, dtype=np.float32) for n, v in weights.items()}, 0.5

            url = urls_of(fleet, ONE_SERVER)[0]
            device = StrictDevice(url, train, number + 1, f"device-{number}", "job", time_scale=0.01)
            assert device.run() is Status.SUCCESS
            return device

        with ThreadPoolExecutor(3) as pool:
            devices = list(pool.map(run, range(3)))
        models = [{name: values.reshape(-1) for name, values in MODEL.items()}]
        models += [fleet.at(0).weights(iteration) for iteration in (1, 2, 3)]
        for iteration in (1, 2, 3):
            total = np.zeros(sum(values.size for values in MODEL.values()))
            for number, device in enumerate(devices):
                bodies = [one.request for one in device.exchanges if one.round == "updateModel"]
                update = codec.decode(RequestUpdateModel, bodies[iteration - 1])
                total += meant_by(update, models[iteration - 1], number + 1)
            published = np.concatenate([models[iteration][name] for name in sorted(MODEL)])
            assert published.any()
            np.testing.assert_allclose(published, total / 6, rtol=1e-5, atol=1e-6)
