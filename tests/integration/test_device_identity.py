"""Devices that must sign (`client_verify.pki_verify`), before real servers: who gets in, what others are told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from socket import create_connection
from typing import Any

import numpy as np
import pytest
import yaml
from device_pki import Maker, now, pems, sign, stamp, start_fields, update_fields
from integration.cluster import WEIGHTS, Cluster, filled, wait_until
from strict_device import KeyStore, OkHttp, StrictDevice

from fedclient import Client, DeviceIdentity, FitResult, Outcome, Policy, Summary
from fedcore.core.client_key import client_key
from fedcore.pki.authority import Device, KeyKind, certify, lasting, make_key
from fedcore.wire import codec
from fedcore.wire.messages import (
    FeatureMap,
    RequestFLJob,
    RequestUpdateModel,
    ResponseFLJob,
    ResponseUpdateModel,
)

FULL = "Current amount for startFLJob has reached the threshold. Please startFLJob later."
MISSING = "Verify flatbuffers schema failed for RequestFLJob."
UNPROVEN = "startFLJob sign and certificate verify failed."
KEY_KNOWN = "startFLJob: store key attestation failed"
STALE = "verify signature timestamp failed or cannot find its key attestation for fl id {}"
FAILED = "verify signature failed for fl id {}"


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker()


@pytest.fixture(scope="module")
def devices(maker: Maker) -> list[Device]:
    return [maker.device(f"device-{n}") for n in range(4)]


def configure(cluster: Cluster, **section: Any) -> None:
    cluster.settings["client_verify"] = section
    cluster.yaml.write_text(yaml.safe_dump(cluster.settings))


def start(cluster: Cluster, device: Device, **changed: Any) -> ResponseFLJob:
    return send_start(cluster, start_fields(device, **changed))


def send_start(cluster: Cluster, fields: dict[str, Any]) -> ResponseFLJob:
    status, answer = cluster.post("/startFLJob", codec.encode(RequestFLJob(**fields)))
    assert status == 200
    reply = codec.decode(ResponseFLJob, answer)
    assert reply.fl_plan_config is not None and int(reply.next_req_time or "") > int(stamp())
    return reply


def update_of(device: Device, iteration: int, value: float = 1.0, **changed: Any) -> RequestUpdateModel:
    fields = {"fl_name": "job", **update_fields(device, iteration)} | changed
    items = tuple(FeatureMap(name, 10 * values.reshape(-1)) for name, values in filled(value).items())
    return RequestUpdateModel(feature_map=items, **fields)


def upload(cluster: Cluster, request: RequestUpdateModel) -> ResponseUpdateModel:
    status, answer = cluster.post("/updateModel", codec.encode(request))
    assert status == 200
    reply = codec.decode(ResponseUpdateModel, answer)
    assert int(reply.next_req_time or "") > int(stamp())
    return reply


def told(reply: Any) -> tuple[int, str]:
    return reply.retcode, reply.reason


def keys(cluster: Cluster, pattern: str) -> int:
    """How many keys of Redis have such a name."""
    script = f"return #redis.call('KEYS','{pattern}')"
    with create_connection(("127.0.0.1", cluster.redis_port), timeout=5) as connection:
        words = [b"EVAL", script.encode(), b"0"]
        parts = b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
        connection.sendall(b"*3\r\n" + parts)
        return int(connection.makefile("rb").readline().strip().removeprefix(b":"))


# ---- startFLJob

Fields = dict[str, Any]
Case = tuple[Callable[[Device, Device], Fields], int, str]


def retimed(device: Device, timestamp: str) -> Fields:
    """A request whose signature is about another time stamp."""
    return start_fields(device) | {"timestamp": timestamp}


def signed_with(device: Device, key: Any) -> Fields:
    """A request signed with some key."""
    at = stamp()
    return start_fields(device, at, sign_data=sign(key, f"{device.fl_id} {at}".encode()))


def of_stranger(device: Device, _: Device) -> Fields:
    return start_fields(Maker("Stranger").device())


STARTS: dict[str, Case] = {
    **{
        f"without {part}": (lambda a, b, part=part: start_fields(a) | {part: None}, 400, MISSING)
        for part in ("fl_id", "fl_name", "timestamp", "sign_data", "key_attestation", "equip_cert", "equip_ca_cert")
    },
    "an empty signature": (lambda a, b: start_fields(a, sign_data=b""), 400, "sign data is empty."),
    "a short signature": (lambda a, b: start_fields(a, sign_data=b"x"), 400, UNPROVEN),
    "a long signature": (lambda a, b: start_fields(a, sign_data=bytes(100_000)), 400, UNPROVEN),
    "a foreign signature": (
        lambda a, b: start_fields(a, sign_data=start_fields(b)["sign_data"]), 400, UNPROVEN),
    "a foreign key": (lambda a, b: signed_with(a, b.attestation.key), 400, UNPROVEN),
    "the equipment's key": (lambda a, b: signed_with(a, a.equipment.key), 400, UNPROVEN),
    "a foreign id": (lambda a, b: start_fields(a) | {"fl_id": b.fl_id}, 400, UNPROVEN),
    "a foreign attestation": (
        lambda a, b: start_fields(a, key_attestation=pems(b)[0]), 400, UNPROVEN),
    "a foreign equipment certificate": (lambda a, b: start_fields(a, equip_cert=pems(b)[1]), 400, UNPROVEN),
    "no certificate": (lambda a, b: start_fields(a, equip_ca_cert="x"), 400, UNPROVEN),
    "an empty certificate": (lambda a, b: start_fields(a, equip_ca_cert=""), 400, UNPROVEN),
    "another time": (lambda a, b: retimed(a, stamp(1)), 400, UNPROVEN),
    "too old": (lambda a, b: start_fields(a, stamp(-630_000)), 400, UNPROVEN),
    "too new": (lambda a, b: start_fields(a, stamp(630_000)), 400, UNPROVEN),
    "12 digits": (lambda a, b: start_fields(a, stamp()[:-1]), 400, UNPROVEN),
    "14 digits": (lambda a, b: start_fields(a, stamp() + "0"), 400, UNPROVEN),
    "no number": (lambda a, b: start_fields(a, "now"), 400, UNPROVEN),
    "another maker": (of_stranger, 400, UNPROVEN),
    "no samples": (lambda a, b: start_fields(a, data_size=0), 300, "FL job data size is not enough."),
    "too many samples": (lambda a, b: start_fields(a, data_size=65536), 300, "FL job data size is too large."),
}  # fmt: skip


@pytest.fixture(scope="module")
def strict(
    maker: Maker, devices: list[Device], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A job in which nobody gets a place but for one device that is there already."""
    folder = tmp_path_factory.mktemp("strict")
    with Cluster(folder, start_fl_job_threshold=3) as cluster:
        configure(cluster, **maker.client_verify(folder / "pki", crl=maker.crl([devices[3]])))
        cluster.start_redis()
        cluster.start_server()
        assert told(start(cluster, devices[2])) == (200, "success")
        yield cluster


class TestRefusedStarts:
    """Each gets the protocol's own answer, and leaves nothing behind."""

    @pytest.mark.parametrize("fault", STARTS)
    def test_table(self, fault: str, strict: Cluster, devices: list[Device]) -> None:
        make, code, reason = STARTS[fault]
        assert told(send_start(strict, make(devices[0], devices[1]))) == (code, reason)
        assert strict.redis("HLEN", f"ms_fl:job:{strict_instance(strict)}:1:clients:Hash") == b":1"
        assert keys(strict, "ms_fl:job:*waiting*") == 0

    def test_a_revoked_device(self, strict: Cluster, devices: list[Device]) -> None:
        assert told(start(strict, devices[3])) == (400, UNPROVEN)

    def test_only_who_proves_something_is_remembered(self, strict: Cluster, devices: list[Device]) -> None:
        def known(device: Device) -> int:
            return keys(strict, f"ms_fl:job:signatures:{client_key(device.fl_id)}:String")

        stranger = Maker("Stranger").device()
        assert told(start(strict, stranger)) == (400, UNPROVEN)
        assert (known(stranger), known(devices[3]), known(devices[2])) == (0, 0, 1)


def strict_instance(cluster: Cluster) -> str:
    with create_connection(("127.0.0.1", cluster.redis_port), timeout=5) as connection:
        connection.sendall(b"GET ms_fl:job:InstanceName:String\r\n")
        stream = connection.makefile("rb")
        stream.readline()
        return stream.readline().strip().decode()


@pytest.fixture
def cluster(maker: Maker, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        configure(cluster, **maker.client_verify(tmp_path / "pki", crl=maker.crl()))
        cluster.start_redis()
        yield cluster


@pytest.fixture
def server(cluster: Cluster) -> Cluster:
    cluster.start_server()
    return cluster


class TestPlaces:
    def test_who_comes_too_late_is_told_so_first(self, server: Cluster, devices: list[Device]) -> None:
        for device in devices[:2]:
            assert told(start(server, device)) == (200, "success")
        assert told(start(server, devices[2])) == (300, FULL)
        assert told(start(server, devices[2], sign_data=b"x")) == (300, FULL)
        assert told(start(server, devices[2], sign_data=b"")) == (300, FULL)
        assert told(start(server, devices[2], sign_data=None)) == (400, MISSING)

    def test_a_repetition(self, server: Cluster, devices: list[Device]) -> None:
        fields = start_fields(devices[0])
        assert told(send_start(server, fields)) == told(send_start(server, fields)) == (200, "success")
        assert told(start(server, devices[0])) == (200, "success")  # signed anew
        assert told(send_start(server, fields | {"data_size": 60_000})) == (300, KEY_KNOWN)

    def test_another_key_of_a_device_with_a_place(self, server: Cluster, devices: list[Device]) -> None:
        device = devices[0]
        assert told(start(server, device)) == (200, "success")
        key = make_key(KeyKind.RSA_2048)
        leaf = certify(device.attestation.certificate.subject, key, device.equipment, lasting_now(), [])
        other = replace(device, attestation=replace(device.attestation, key=key, certificate=leaf))
        assert told(start(server, other)) == (300, KEY_KNOWN)
        assert told(upload(server, update_of(other, 1))) == (400, FAILED.format(device.fl_id))
        assert told(upload(server, update_of(device, 1))) == (200, "success not ready")
        assert told(start(server, other)) == (300, KEY_KNOWN)
        assert told(start(server, device)) == (
            300,
            f"Updating device metadata failed for fl id {device.fl_id}",
        )

    def test_a_signature_is_good_for_one_iteration(self, server: Cluster, devices: list[Device]) -> None:
        first = [start_fields(device) for device in devices[:2]]
        for fields, device in zip(first, devices, strict=False):
            assert told(send_start(server, fields)) == (200, "success")
            assert told(upload(server, update_of(device, 1))) == (200, "success not ready")
        server.weights(1)
        assert told(send_start(server, first[0])) == (300, KEY_KNOWN)
        assert told(start(server, devices[0])) == (200, "success")


def lasting_now() -> Any:
    return lasting(now(), 9)


# ---- updateModel


class TestUpdates:
    def test_table(self, server: Cluster, devices: list[Device]) -> None:
        one, other = devices[:2]
        failed, stale = FAILED.format(one.fl_id), STALE.format(one.fl_id)
        assert told(upload(server, update_of(one, 1))) == (
            300, f"devices_meta for {one.fl_id} is not set. Please retry later.")  # fmt: skip
        for device in (one, other):
            assert told(start(server, device)) == (200, "success")
        reply = upload(server, update_of(one, 2))
        assert reply.retcode == 300 and reply.reason.startswith("UpdateModel iteration number is invalid:2, ")

        def signed(key: Any, message: str, **more: Any) -> RequestUpdateModel:
            return update_of(one, 1, signature=sign(key, message.encode()), **more)

        at, late, soon = stamp(), stamp(-601_000), stamp(660_000)
        incomplete = "Verify flatbuffers schema failed for RequestUpdateModel."
        own = one.attestation.key
        for request, answer in (
            (update_of(one, 1, signature=None), (400, failed)),
            (update_of(one, 1, signature=b""), (400, failed)),
            (update_of(one, 1, signature=bytes(257)), (400, failed)),
            (update_of(other, 1, fl_id=one.fl_id), (400, failed)),  # foreign
            (signed(one.equipment.key, f"{at}1", timestamp=at), (400, failed)),
            (signed(own, f"{at}2", timestamp=at), (400, failed)),  # of another iteration
            (signed(own, f"{at}", timestamp=at), (400, failed)),
            (signed(own, f"{stamp(1)}1", timestamp=at), (400, failed)),  # of another time
            (signed(own, f"{at[:-1]}1", timestamp=at[:-1]), (400, failed)),
            (signed(own, f"{at}11", timestamp=f"{at}1"), (400, failed)),
            (signed(own, "now1", timestamp="now"), (400, failed)),
            (signed(own, f"{late}1", timestamp=late), (300, stale)),
            (signed(own, f"{soon}1", timestamp=soon), (300, stale)),
            (signed(own, "99999999999991", timestamp="9999999999999"), (300, stale)),
            (update_of(one, 1, signature=None, timestamp=None), (400, incomplete)),
        ):  # fmt: skip
            assert told(upload(server, request)) == answer, request
        assert server.metric('fl_updates_refused_total{reason="signature"}') == 14
        assert server.metric("fl_updates_accepted_total") == 0

    def test_a_signature_serves_one_request(self, server: Cluster, devices: list[Device]) -> None:
        one, other = devices[:2]
        for device in (one, other):
            start(server, device)
        genuine = update_of(one, 1, 5.0)
        bad = replace(genuine, feature_map=(FeatureMap("nobody", np.float32([1])),))
        assert upload(server, bad).retcode == 400
        assert told(upload(server, genuine)) == (300, STALE.format(one.fl_id))  # that signature was used
        genuine = update_of(one, 1, 5.0)
        assert told(upload(server, genuine)) == (200, "success not ready")
        assert told(upload(server, genuine)) == (200, "success not ready")  # an HTTP library's repetition
        poison = replace(genuine, feature_map=update_of(one, 1, 1e6).feature_map)
        assert told(upload(server, poison)) == (300, STALE.format(one.fl_id))
        assert told(upload(server, update_of(one, 1, 7.0, signature=b"x"))) == (400, FAILED.format(one.fl_id))
        assert told(upload(server, update_of(one, 1, 7.0))) == (200, "success not ready")  # counted once
        assert told(upload(server, update_of(other, 1, 3.0))) == (200, "success not ready")
        np.testing.assert_array_equal(server.weights(1)["b.bias"], [4, 4])
        assert told(upload(server, genuine)) == (200, "success not ready")  # a late repetition

    def test_a_signature_of_startFLJob_is_no_other(self, server: Cluster, devices: list[Device]) -> None:
        fields = start_fields(devices[0])
        send_start(server, fields)
        request = update_of(devices[0], 1, signature=fields["sign_data"], timestamp=fields["timestamp"])
        assert told(upload(server, request)) == (400, FAILED.format(devices[0].fl_id))


# ---- several servers


class TestSeveralServers:
    @pytest.fixture
    def both(self, cluster: Cluster) -> Cluster:
        cluster.start_server_on(cluster.host(0), 0)
        cluster.start_server_on(cluster.host(1), 1)
        return cluster

    def test_all_know_what_was_shown_to_one(self, both: Cluster, devices: list[Device]) -> None:
        here, there = both.at(0), both.at(1)
        fields = [start_fields(device) for device in devices[:2]]
        for each in fields:
            assert told(send_start(here, each)) == (200, "success")
            assert told(send_start(there, each)) == (200, "success")
            assert told(send_start(there, each | {"data_size": 9})) == (300, KEY_KNOWN)
        request = update_of(devices[0], 1, 2.0)
        nameless = replace(request, feature_map=(FeatureMap("nobody", np.float32([1])),))
        assert upload(here, nameless).retcode == 400
        assert told(upload(there, request)) == (300, STALE.format(devices[0].fl_id))
        request = update_of(devices[0], 1, 2.0)
        assert told(upload(there, request)) == told(upload(here, request)) == (200, "success not ready")
        assert told(upload(here, update_of(devices[1], 1, 4.0))) == (200, "success not ready")
        np.testing.assert_array_equal(there.weights(1)["b.bias"], [3, 3])
        np.testing.assert_array_equal(here.weights(1)["b.bias"], [3, 3])

    def test_keys_are_brought_back_to_an_empty_redis(self, both: Cluster, devices: list[Device]) -> None:
        here, there = both.at(0), both.at(1)
        assert told(start(here, devices[0])) == (200, "success")
        assert told(start(there, devices[1])) == (200, "success")
        both.wipe_redis()
        wait_until(lambda: both.ready(0) and both.ready(1), "both servers are ready again")
        for device, at, value in ((devices[0], there, 2.0), (devices[1], here, 6.0)):
            reply = wait_until(
                lambda device=device, at=at, value=value: (
                    (r := upload(at, update_of(device, 1, value))).retcode != 300 and r
                ),
                "the update is taken",
            )
            assert told(reply) == (200, "success not ready")
        np.testing.assert_array_equal(here.weights(1)["b.bias"], [4, 4])

    def test_unmodified_devices_train(self, maker: Maker, tmp_path: Path) -> None:
        """Each of their requests goes to one of two servers, by chance."""
        with Cluster(tmp_path, fl_iteration_num=4) as cluster:
            configure(cluster, **maker.client_verify(tmp_path / "pki", crl=maker.crl()))
            cluster.start_redis()
            for n in range(2):
                cluster.start_server_on(cluster.host(n), n)

            def run(number: int) -> StrictDevice:
                device = maker.device(f"unmodified-{number}")
                store = KeyStore(device.attestation.key, tuple(pems(device)))  # type: ignore[arg-type]
                url = f"http://127.0.0.1:{cluster.http}"
                made = StrictDevice(
                    url,
                    lambda weights, plan: ({name: values + 1 for name, values in weights.items()}, 0.5),
                    10,
                    fl_name="job",
                    http=OkHttp(url, elb_servers=2, seed=number),
                    time_scale=0.02,
                    keystore=store,
                )
                made.run()
                return made

            with ThreadPoolExecutor(2) as pool:
                ended = list(pool.map(run, range(2)))
            for device in ended:
                assert device.callbacks == [(number, 200) for number in (1, 2, 3, 4)]
                np.testing.assert_array_equal(device.weights["b.bias"], WEIGHTS["b.bias"] + 4)

    def test_devices_that_change_servers_train(
        self, maker: Maker, devices: list[Device], tmp_path: Path
    ) -> None:
        """fedclient signs, and asks another server with every request."""
        with Cluster(tmp_path, fl_iteration_num=3) as cluster:
            configure(cluster, **maker.client_verify(tmp_path / "pki", crl=maker.crl()))
            cluster.start_redis()
            for n in range(2):
                cluster.start_server_on(cluster.host(n), n)
            urls = [f"http://127.0.0.1:{cluster.http + n}" for n in range(2)]

            def run(device: Device, value: float) -> Summary:
                identity = DeviceIdentity(device.attestation.key, device.chain)  # type: ignore[arg-type]
                policy = Policy(poll_interval=0.1)
                client = Client(
                    Trainer(value), urls, fl_name="job", identity=identity, policy=policy, rotate=True
                )
                return client.run()

            with ThreadPoolExecutor(2) as pool:
                ended = list(pool.map(run, devices[:2], (1.0, 3.0)))
            for summary in ended:
                assert (summary.outcome, summary.completed) == (Outcome.COMPLETED, 3), summary
                np.testing.assert_array_equal(summary.weights["b.bias"], [2, 2])


class Trainer:
    """Fits every value to one number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def load(self) -> tuple[int, int]:
        return 10, 0

    def evaluate(self, weights: Any) -> float:
        return 0.0

    def fit(self, weights: Any, config: Any) -> FitResult:
        return FitResult(
            {name: np.full(array.size, self.value, np.float32) for name, array in WEIGHTS.items()}, 1.0
        )


# ---- files


class TestFiles:
    def run(self, cluster: Cluster) -> subprocess.CompletedProcess[bytes]:
        command = (*cluster.command("serverd"), "--yaml-config", str(cluster.yaml))
        return subprocess.run(command, capture_output=True, timeout=60, check=False, cwd=cluster.directory)

    @pytest.mark.parametrize(
        ("change", "hint"),
        [
            ({"root_first_ca_path": ""}, "give client_verify.root_first_ca_path"),
            ({"root_second_ca_path": "/nonexistent/root.pem"}, "cannot read /nonexistent/root.pem"),
            ({"root_second_ca_path": "fl.yaml"}, "fl.yaml holds no certificate in PEM form"),
            ({"equip_crl_path": "fl.yaml"}, "fl.yaml holds no usable revocation list"),
        ],
    )
    def test_a_server_does_not_start(self, cluster: Cluster, maker: Maker, change: Fields, hint: str) -> None:
        configure(cluster, **maker.client_verify(cluster.directory / "pki", **change))
        ended = self.run(cluster)
        assert ended.returncode == 78
        assert b"init root cert and crl failed." in ended.stderr and hint.encode() in ended.stderr

    def test_a_list_is_missing(self, cluster: Cluster, maker: Maker, devices: list[Device]) -> None:
        section = maker.client_verify(cluster.directory / "pki", equip_crl_path="/nonexistent/devices.crl")
        configure(cluster, **section)
        cluster.start_server()
        assert "no device is refused as revoked" in cluster.log()
        assert told(start(cluster, devices[0])) == (200, "success")
        cluster.kill("server")
        cluster.settings["fedcore"]["device"]["crl_required"] = True
        configure(cluster, **section)
        ended = self.run(cluster)
        assert ended.returncode == 78 and b"fedcore.device.crl_required is true" in ended.stderr

    def test_a_new_list_takes_effect_at_once(
        self, server: Cluster, maker: Maker, devices: list[Device]
    ) -> None:
        path = server.directory / "pki" / "devices.crl"
        ends = [
            f'fl_device_trust_expiry_timestamp_seconds{{file="{one}"}}'
            for one in (path.with_name("root.pem"), path)
        ]
        assert [server.metric(end) > now().timestamp() for end in ends] == [True, True]
        assert told(start(server, devices[0])) == (200, "success")
        path.write_bytes(maker.crl([devices[1]]))
        assert told(start(server, devices[1])) == (400, UNPROVEN)
        path.write_bytes(b"half a li")
        assert told(start(server, devices[1])) == (400, UNPROVEN)
        wait_until(lambda: "stay as they were" in server.log(), "the fault is told")
        path.write_bytes(maker.crl())
        assert told(start(server, devices[1])) == (200, "success")


# ---- the commands


COMMAND_TRAINER = """
from fedclient import FitResult

class Filler:
    def load(self):
        return 10, 0

    def fit(self, weights, config):
        return FitResult({name: values * 0 + 5 for name, values in weights.items()}, 1.0)

    def evaluate(self, weights):
        return 0.0
"""


def test_as_an_operator_does_it(tmp_path: Path) -> None:
    """`fl certs` makes the maker and its devices, `fl-client` signs, a revoked device is turned away."""
    (tmp_path / "command_trainer.py").write_text(COMMAND_TRAINER)

    def certs(*arguments: str) -> None:
        command = [sys.executable, "-m", "fedctl", "certs", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done

    certs("ca", "maker", "--devices", "--name", "Example Ltd")
    certs("device", "phone-1", "phone-2", "--ca", "maker")
    certs("revoke", "maker/devices/phone-2/chain.pem", "--ca", "maker")
    with Cluster(tmp_path, fl_iteration_num=2, start_fl_job_threshold=1) as cluster:
        root = str(tmp_path / "maker" / "root.crt")
        configure(
            cluster,
            pki_verify=True,
            root_first_ca_path=root,
            root_second_ca_path=root,
            equip_crl_path=str(tmp_path / "maker" / "ca.crl"),
        )
        cluster.start_redis()
        cluster.start_server()

        def client(name: str) -> subprocess.CompletedProcess[bytes]:
            files = tmp_path / "maker" / "devices" / name
            command = [sys.executable, "-m", "fedclient", "--server", f"http://127.0.0.1:{cluster.http}"]
            command += ["--trainer", "command_trainer:Filler", "--fl-name", "job", "--poll-interval", "0.1"]
            command += ["--identity", str(files / "chain.pem"), "--identity-key", str(files / "key.pem")]
            return subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=False)

        refused = client("phone-2")
        assert refused.returncode == 1 and UNPROVEN.encode() in refused.stderr, refused
        trained = client("phone-1")
        assert trained.returncode == 0, trained
        np.testing.assert_array_equal(cluster.weights(2)["b.bias"], [5, 5])
