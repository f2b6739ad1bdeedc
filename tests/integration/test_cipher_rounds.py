"""The cipher rounds as devices meet them: real servers, real Redis, real HTTP."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import yaml
from device_pki import Maker, sign, stamp, start_fields, update_fields
from integration.cluster import WEIGHTS, Cluster, filled, wait_until

from fedcore.identity.pem import bare_form
from fedcore.pki.authority import Device
from fedcore.secagg.shamir import PRIME
from fedcore.wire import codec
from fedcore.wire.messages import (
    ClientListSign,
    ClientShare,
    FeatureMap,
    GetClientList,
    GetExchangeKeys,
    GetShareSecrets,
    ReconstructSecret,
    RequestAllClientListSign,
    RequestExchangeKeys,
    RequestFLJob,
    RequestShareSecrets,
    RequestUpdateModel,
    ResponseClientListSign,
    ResponseExchangeKeys,
    ResponseFLJob,
    ResponseShareSecrets,
    ResponseUpdateModel,
    ReturnAllClientListSign,
    ReturnClientList,
    ReturnExchangeKeys,
    ReturnShareSecrets,
    SendClientListSign,
    SendReconstructSecret,
)

R = TypeVar("R")


class Devices:
    """Devices of one cluster; each asks the server with its turn."""

    def __init__(self, *servers: Cluster) -> None:
        self.servers = servers
        self._turn = 0

    @property
    def cluster(self) -> Cluster:
        self._turn += 1
        return self.servers[self._turn % len(self.servers)]

    def ask(self, path: str, request: object, reply: type[R]) -> R:
        return codec.decode(reply, self.cluster.post(f"/{path}", codec.encode(request))[1])

    def exchange(self, fl_id: str, number: int = 1, first: int = 1, **other: Any) -> ResponseExchangeKeys:
        parts: dict[str, Any] = {
            "c_pk": fl_id[:1].encode() * 31 + bytes([first]),
            "s_pk": fl_id[:1].encode() * 31 + bytes([first + 1]),
            "ind_iv": bytes([first]) * 16,
            "pw_iv": bytes([first]) * 16,
            "pw_salt": bytes([first]) * 32,
        }
        request = RequestExchangeKeys(fl_id=fl_id, iteration=number, timestamp="1", **(parts | other))
        return self.ask("exchangeKeys", request, ResponseExchangeKeys)

    def get_keys(self, fl_id: str, number: int = 1) -> ReturnExchangeKeys:
        return self.ask("getKeys", GetExchangeKeys(fl_id, number, "1"), ReturnExchangeKeys)

    def share(self, fl_id: str, recipients: str, number: int = 1) -> ResponseShareSecrets:
        shares = tuple(ClientShare(other, f"{fl_id}->{other}".encode(), 0) for other in recipients)
        return self.ask("shareSecrets", RequestShareSecrets(fl_id, shares, number, "1"), ResponseShareSecrets)

    def get_secrets(self, fl_id: str, number: int = 1) -> ReturnShareSecrets:
        return self.ask("getSecrets", GetShareSecrets(fl_id, number, "1"), ReturnShareSecrets)

    def get_list(self, fl_id: str, number: int = 1) -> ReturnClientList:
        return self.ask("getClientList", GetClientList(fl_id, number, "1"), ReturnClientList)

    def report(self, fl_id: str, shares: dict[str, bytes], number: int = 1) -> ReconstructSecret:
        items = tuple(ClientShare(owner, share, 1) for owner, share in shares.items())
        request = SendReconstructSecret(fl_id, items, number, "1")
        return self.ask("reconstructSecrets", request, ReconstructSecret)

    def prepare(self, *fl_ids: str) -> None:
        """Go through all rounds before the updates."""
        for fl_id in fl_ids:
            assert self.cluster.start(fl_id).retcode == 200
        for fl_id in fl_ids:
            assert self.exchange(fl_id).retcode == 200
        for fl_id in fl_ids:
            assert self.get_keys(fl_id).retcode == 200
        for fl_id in fl_ids:
            assert self.share(fl_id, "".join(other for other in fl_ids if other != fl_id)).retcode == 200
        for fl_id in fl_ids:
            assert self.get_secrets(fl_id).retcode == 200


def configure(cluster: Cluster, **encrypt: Any) -> None:
    """Have updates masked: three devices, two of which must report."""
    masks = {"share_secrets_ratio": 1.0, "cipher_time_window": 30_000, "reconstruct_secrets_threshold": 2}
    cluster.settings["encrypt"] = {"encrypt_type": "PW_ENCRYPT", "pw_encrypt": masks} | encrypt
    cluster.settings["round"] |= {"start_fl_job_threshold": 3, "global_iteration_time_window": 120_000}
    cluster.yaml.write_text(yaml.safe_dump(cluster.settings))


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[Devices]:
    with Cluster(tmp_path, fedcore={"device": {"hold_time": 0.5}}) as cluster:
        configure(cluster)
        cluster.start_redis()
        cluster.start_server()
        yield Devices(cluster)


def future(text: str | None) -> bool:
    return text is not None and text.isdigit() and int(text) > time.time_ns() // 1_000_000


def test_the_plan_carries_the_parameters(devices: Devices) -> None:
    plan = devices.cluster.start("a").fl_plan_config
    assert plan is not None and plan.cipher is not None and plan.cipher.pw_params is not None
    assert plan.cipher.encrypt_type == "PW_ENCRYPT"
    params = plan.cipher.pw_params
    assert (params.t, params.g, params.p) == (2, 1, bytes(32))
    assert params.prime is not None and len(params.prime) == 33 and params.prime[0] >= 0x80
    assert int.from_bytes(params.prime, "big") == PRIME


def test_the_rounds_before_the_updates(devices: Devices) -> None:
    for fl_id in "abc":
        devices.cluster.start(fl_id)

    stranger = devices.exchange("x")
    assert (stranger.retcode, stranger.reason) == (300, "devices_meta for x is not set. Please retry later.")
    assert future(stranger.next_req_time)
    stale = devices.exchange("a", number=7)
    assert (stale.retcode, stale.reason, future(stale.next_req_time)) == (300, "iter num is error.", True)

    first = devices.exchange("a")
    assert (first.retcode, first.reason) == (200, "Success, but the server is not ready yet.")
    early = devices.get_keys("a")
    assert (early.retcode, early.remote_publickeys) == (201, None)
    again = devices.exchange("a")
    assert again.reason == "The server has received the request, please do not request again."
    assert devices.exchange("b").retcode == 200
    assert devices.exchange("b", first=9).reason == "Success, but the server is not ready yet."
    assert devices.exchange("c").retcode == 200
    assert devices.exchange("c").retcode == 200
    full = devices.exchange("a", first=5)
    assert full.reason == "Current amount for exchangeKey is enough. Please retry later."
    assert (full.retcode, future(full.next_req_time)) == (300, True)

    keys = devices.get_keys("a")
    assert keys.retcode == 200 and keys.iteration == 1 and keys.remote_publickeys is not None
    assert [item.fl_id for item in keys.remote_publickeys] == ["a", "b", "c"]
    assert [item.pw_iv for item in keys.remote_publickeys] == [bytes([n]) * 16 for n in (1, 9, 1)]
    assert [(item.timestamp, item.iteration, item.signature) for item in keys.remote_publickeys] == [
        (None, 0, None)
    ] * 3
    assert devices.get_keys("a") == keys == devices.get_keys("b")
    assert devices.get_keys("x").retcode == 400

    illegal = devices.share("c", "ab")
    assert illegal.reason == "client share secret is not in getkeys list. && client is illegal"
    assert illegal.retcode == 400
    for recipients in ("b", "bb", "bx", "abc", ""):
        unfit = devices.share("a", recipients)
        assert (unfit.retcode, unfit.reason) == (300, "update client of shares and shares failed")
        assert future(unfit.next_req_time)
    assert (devices.share("a", "bc").retcode, devices.share("a", "cb").reason) == (
        200,
        "client sharesecret already exists.",
    )
    assert devices.get_secrets("a").retcode == 201
    devices.get_keys("c")
    assert devices.share("b", "ac").reason == "OK"
    assert devices.share("c", "ab").reason == "OK"
    secrets = devices.get_secrets("c")
    assert secrets.encrypted_shares == (ClientShare("a", b"a->c", 0), ClientShare("b", b"b->c", 0))
    assert devices.get_secrets("c").encrypted_shares == secrets.encrypted_shares
    assert devices.get_secrets("x").retcode == 400

    unprepared = devices.cluster.update("a", 1, WEIGHTS)
    assert unprepared.retcode == 300
    assert unprepared.reason == "fl_id: a is not in get_secrets_clients. Please retry later."
    devices.get_secrets("a")
    partial = devices.cluster.update("a", 1, {"a.weight": WEIGHTS["a.weight"]})
    assert partial.retcode == 400
    assert devices.cluster.update("a", 1, WEIGHTS).retcode == 200
    assert devices.cluster.update("a", 1, WEIGHTS).retcode == 200
    assert devices.get_list("a").reason == "The server is not ready."


def test_bodies_that_are_no_requests(devices: Devices) -> None:
    devices.cluster.start("a")
    reply = codec.decode(ResponseExchangeKeys, devices.cluster.post("/exchangeKeys", b"nonsense")[1])
    assert (reply.retcode, reply.reason) == (400, "The schema of RequestExchangeKeys is invalid.")
    nameless = devices.ask("getClientList", GetClientList(None, 1, "1"), ReturnClientList)
    assert (nameless.retcode, nameless.reason) == (400, "The schema of GetClientList is invalid.")
    assert nameless.clients == ()
    assert devices.ask("getKeys", GetExchangeKeys("a" * 400, 1), ReturnExchangeKeys).retcode == 400


@pytest.mark.parametrize(
    "parts",
    [
        {"c_pk": None},
        {"s_pk": bytes(32)},
        {"c_pk": (1).to_bytes(32, "little")},
        {"s_pk": b"k" * 31},
        {"ind_iv": None},
        {"pw_iv": bytes(15)},
        {"pw_salt": bytes(31)},
    ],
)
def test_keys_that_would_spoil_the_sum_are_refused(devices: Devices, parts: dict[str, Any]) -> None:
    devices.cluster.start("a")
    reply = devices.exchange("a", **parts)
    assert (reply.retcode, reply.reason) == (300, "update key or client failed")
    assert future(reply.next_req_time)


def test_who_comes_early_is_held_until_there_is_an_answer(tmp_path: Path) -> None:
    with Cluster(tmp_path, fedcore={"device": {"hold_time": 8.0}}) as cluster:
        configure(cluster)
        cluster.start_redis()
        cluster.start_server()
        devices = Devices(cluster)
        for fl_id in "abc":
            cluster.start(fl_id)
        devices.exchange("a")
        found: list[ReturnExchangeKeys] = []
        asking = threading.Thread(target=lambda: found.append(devices.get_keys("a")))
        asking.start()
        devices.exchange("b")
        devices.exchange("c")
        asking.join(15)
        assert [reply.retcode for reply in found] == [200]


def test_rounds_of_signatures_need_signatures(devices: Devices) -> None:
    assert devices.cluster.post("/pushListSign", b"x")[0] == 404
    assert devices.cluster.post("/getListSign", b"x")[0] == 404


def test_without_masks_there_are_no_rounds(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.start_redis()
        cluster.start_server()
        assert cluster.post("/exchangeKeys", b"x")[0] == 404


def test_two_servers_tell_the_same(tmp_path: Path) -> None:
    with Cluster(tmp_path, fedcore={"device": {"hold_time": 0.5}}) as cluster:
        configure(cluster)
        cluster.start_redis()
        host = cluster.host(0)
        for n in (0, 1):
            cluster.start_server_on(host, n)
        devices = Devices(cluster.at(0), cluster.at(1))
        devices.prepare("c", "a", "b")
        here, there = (Devices(server) for server in devices.servers)
        assert here.get_keys("a").remote_publickeys == there.get_keys("b").remote_publickeys
        assert here.get_secrets("b").encrypted_shares == there.get_secrets("b").encrypted_shares
        assert here.exchange("d").retcode == there.exchange("d").retcode == 300


def test_the_list_and_the_reports(devices: Devices) -> None:
    devices.prepare("c", "a", "b")
    for fl_id in "abc":
        assert devices.cluster.update(fl_id, 1, filled(1.0)).retcode == 200
    deadline = time.monotonic() + 20
    while (listed := devices.get_list("a")).retcode == 201:
        assert time.monotonic() < deadline
    assert (listed.retcode, listed.reason) == (200, "send clients_list succeed!")
    assert listed.clients == ("a", "b", "c")
    assert devices.get_list("a").clients == listed.clients
    stranger = devices.get_list("x")
    assert (stranger.retcode, stranger.reason) == (400, "fl_id: x is not in the update_model_clients")

    unlisted = devices.report("b", {"a": b"1"})
    assert unlisted.reason == "The client b is not in get clients list, but in update model client list."
    assert unlisted.retcode == 200
    for shares in ({"a": b"1"}, {"x": b"1"}, {"b": b"s" * 34}, {}):
        unfit = devices.report("a", shares)
        assert (unfit.retcode, unfit.reason) == (300, "reconstruct update shares or client failed.")
    taken = devices.report("a", {"b": b"1", "c": b"2"})
    assert taken.reason == "Success, but the server is not ready to reconstruct secret yet."
    assert devices.report("a", {"b": b"3"}).reason == "Client has sended messages."
    assert devices.report("x", {"a": b"3"}).reason == "The client is not in update model client list."


def test_a_finished_job_still_tells_those_who_were_in_its_last_iteration(devices: Devices) -> None:
    devices.prepare("a", "b", "c")
    for fl_id in "abc":
        assert devices.cluster.update(fl_id, 1, filled(1.0)).retcode == 200
    deadline = time.monotonic() + 20
    while (listed := devices.get_list("a")).retcode == 201:
        assert time.monotonic() < deadline
    cluster = devices.cluster
    with socket.create_connection(("127.0.0.1", cluster.redis_port), timeout=5) as connection:
        connection.sendall(b"GET ms_fl:job:InstanceName:String\r\n")
        answer = connection.makefile("rb")
        instance = [answer.readline() for _ in range(2)][1].strip().decode()
    cluster.redis("HSET", f"ms_fl:job:{instance}:status:Hash", "iterationNum", "2", "runningState", "2")
    wait_until(lambda: finished(cluster), "the server sees that the job is over")
    late = devices.get_list("b")
    assert (late.retcode, late.clients) == (200, listed.clients)
    report = devices.report("b", {"a": b"1"})
    assert (report.retcode, report.reason) == (200, "Current amount for ReconstructSecretsKernel is enough.")
    body = codec.encode(GetClientList("b", 2, "1"))
    assert cluster.post("/getClientList", body)[1] == b"The server's training job is disabled or finished."


def finished(cluster: Cluster) -> bool:
    """Whether the server has seen that the job is over."""
    request = codec.encode(RequestExchangeKeys("x", iteration=2))
    return cluster.post("/exchangeKeys", request)[1] == b"The server's training job is disabled or finished."


def test_cloud_workers_exchange_keys_alone(tmp_path: Path) -> None:
    with Cluster(tmp_path, fedcore={"device": {"hold_time": 0.5}}) as cluster:
        cluster.settings["server_mode"] = "CLOUD_TRAINING"
        configure(cluster, encrypt_type="STABLE_PW_ENCRYPT")
        cluster.start_redis()
        cluster.start_server()
        devices = Devices(cluster)
        for fl_id in "abc":
            cluster.start(fl_id)
        for fl_id in "abc":
            assert devices.exchange(fl_id, c_pk=None, ind_iv=None).retcode == 200
        unprepared = cluster.update("a", 1, WEIGHTS)
        assert (unprepared.retcode, "get_secrets_clients" in (unprepared.reason or "")) == (300, True)
        keys = devices.get_keys("a").remote_publickeys
        assert keys is not None
        assert [(item.fl_id, item.c_pk, item.pw_iv, item.pw_salt) for item in keys] == [
            (fl_id, None, b"\x01" * 16, b"\x01" * 32) for fl_id in "abc"
        ]
        assert cluster.update("a", 1, WEIGHTS).retcode == 200
        assert cluster.post("/shareSecrets", b"x")[0] == 404


def test_answers_are_counted(devices: Devices) -> None:
    devices.cluster.start("a")
    devices.exchange("a")
    devices.exchange("x")
    metrics = devices.cluster.get_http(devices.cluster.admin, "/metrics")
    assert metrics is not None
    lines = [line for line in metrics[1].decode().splitlines() if 'route="exchangeKeys"' in line]
    counts = {line.partition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert counts['fl_requests_total{outcome="accepted",route="exchangeKeys"}'] == 1
    assert counts['fl_requests_total{outcome="come_back",route="exchangeKeys"}'] == 1


def test_many_members_are_told_in_one_answer(tmp_path: Path) -> None:
    """More of them than are packed on the reactor, all asking at once."""
    with Cluster(tmp_path, fedcore={"device": {"hold_time": 2.0}}) as cluster:
        configure(cluster)
        cluster.settings["round"]["start_fl_job_threshold"] = 120
        cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
        cluster.start_redis()
        cluster.start_server()
        devices = Devices(cluster)
        ids = [f"{number:03d}" for number in range(120)]
        for fl_id in ids:
            cluster.start(fl_id)
        for fl_id in ids:
            assert devices.exchange(fl_id).retcode == 200
        replies: list[ReturnExchangeKeys] = []
        asking = [threading.Thread(target=lambda: replies.append(devices.get_keys("000"))) for _ in range(8)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(20)
        assert len(replies) == 8 and all(reply == replies[0] for reply in replies)
        assert [item.fl_id for item in replies[0].remote_publickeys or ()] == ids
        shares = tuple(ClientShare(other, np.random.default_rng(1).bytes(96), 0) for other in ids[1:])
        told = devices.ask("shareSecrets", RequestShareSecrets("000", shares, 1, "1"), ResponseShareSecrets)
        assert told.reason == "OK"


# ---- devices that sign


class Signing:
    """A device that signs its requests."""

    def __init__(self, cluster: Cluster, device: Device) -> None:
        self.cluster, self.device, self.fl_id = cluster, device, device.fl_id

    def signed(self, message: bytes) -> bytes:
        return sign(self.device.attestation.key, message)

    def ask(self, path: str, request: object, reply: type[R]) -> R:
        return codec.decode(reply, self.cluster.post(f"/{path}", codec.encode(request))[1])

    def start(self) -> int:
        request = RequestFLJob(**start_fields(self.device))
        return self.ask("startFLJob", request, ResponseFLJob).retcode

    def exchange(self, **changed: Any) -> ResponseExchangeKeys:
        at, c_pk, s_pk = stamp(), bytes(range(32)), bytes(range(1, 33))
        chain = tuple(bare_form(certificate) for certificate in self.device.chain[:2])
        fields: dict[str, Any] = {
            "signature": self.signed(c_pk + s_pk + f"{at}1".encode()),
            "certificate_chain": chain,
        }
        request = RequestExchangeKeys(
            self.fl_id, c_pk, s_pk, 1, at, bytes(16), bytes(16), bytes(32), **(fields | changed)
        )
        return self.ask("exchangeKeys", request, ResponseExchangeKeys)

    def call(self, path: str, table: type[Any], reply: type[R], name: str = "signature", **parts: Any) -> R:
        at = stamp()
        fields = {name: self.signed(f"{at}1".encode())} | parts
        return self.ask(path, table(fl_id=self.fl_id, iteration=1, timestamp=at, **fields), reply)


def test_devices_that_sign(tmp_path: Path) -> None:
    maker = Maker()
    with Cluster(tmp_path, fedcore={"device": {"hold_time": 0.5}}) as cluster:
        cluster.settings["client_verify"] = maker.client_verify(tmp_path / "roots")
        configure(cluster)
        cluster.start_redis()
        cluster.start_server()
        one, two, three = devices = sorted(
            (Signing(cluster, maker.device(f"device-{n}")) for n in range(3)), key=lambda device: device.fl_id
        )
        for device in devices:
            assert device.start() == 200
        unsigned = one.exchange(signature=None)
        assert (unsigned.retcode, unsigned.reason) == (400, "verify signature failed.")
        stranger = Signing(cluster, maker.device("another")).exchange()
        assert stranger.retcode == 300
        assert stranger.reason == "verify signature timestamp failed or cannot find its key attestation."
        for chain in (None, (), tuple(bare_form(certificate) for certificate in two.device.chain[:2])):
            unfit = one.exchange(certificate_chain=chain)
            assert (unfit.retcode, unfit.reason) == (300, "update key or client failed")
        for device in devices:
            assert device.exchange().retcode == 200
        for device in devices:
            reply = device.call("getKeys", GetExchangeKeys, ReturnExchangeKeys)
            assert reply.retcode == 200 and reply.remote_publickeys is not None
            for item, other in zip(reply.remote_publickeys, devices, strict=True):
                assert (item.fl_id, item.iteration) == (other.fl_id, 1)
                assert item.certificate_chain == tuple(map(bare_form, other.device.chain[:2]))
                assert item.signature and item.timestamp
        for device in devices:
            shares = tuple(ClientShare(other.fl_id, b"x" * 96) for other in devices if other is not device)
            assert (
                device.call(
                    "shareSecrets", RequestShareSecrets, ResponseShareSecrets, encrypted_shares=shares
                ).reason
                == "OK"
            )
        for device in devices:
            assert device.call("getSecrets", GetShareSecrets, ReturnShareSecrets).retcode == 200
        for device in devices:
            weights = tuple(FeatureMap(name, values.reshape(-1)) for name, values in WEIGHTS.items())
            request = RequestUpdateModel(
                fl_name="job", feature_map=weights, **update_fields(device.device, 1)
            )
            assert device.ask("updateModel", request, ResponseUpdateModel).retcode == 200

        deadline = time.monotonic() + 20
        while (listed := one.call("getClientList", GetClientList, ReturnClientList)).retcode == 201:
            assert time.monotonic() < deadline
        assert listed.clients == tuple(device.fl_id for device in devices)
        digest = hashlib.sha256("".join(listed.clients).encode()).digest()

        def push(device: Signing, signature: bytes | None) -> tuple[int, str | None]:
            parts = {"signature": signature}
            told = device.call(
                "pushListSign", SendClientListSign, ResponseClientListSign, "req_signature", **parts
            )
            return told.retcode, told.reason

        two.call("getClientList", GetClientList, ReturnClientList)
        success = "send update model client list signature success. "
        assert push(three, b"s")[0] == 200  # it was not told the list, but has done its part
        assert push(one, None) == (300, "store client list signature failed")
        signatures = [device.signed(digest) for device in devices]
        assert push(one, signatures[0]) == (200, success)
        assert one.call("getListSign", RequestAllClientListSign, ReturnAllClientListSign).retcode == 201
        assert push(two, signatures[1]) == (200, success)
        three.call("getClientList", GetClientList, ReturnClientList)
        assert push(three, signatures[2]) == (200, success)
        for device in devices:
            told = device.call("getListSign", RequestAllClientListSign, ReturnAllClientListSign)
            assert (told.retcode, told.reason) == (200, success)
            assert told.client_list_sign == tuple(
                ClientListSign(other.fl_id, signature)
                for other, signature in zip(devices, signatures, strict=True)
            )
