"""The cipher rounds of a device: against a server in memory that takes the masks off with fedcore's own functions."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
import scripted_server as server
from device_pki import Maker

from fedclient import protection
from fedclient.cipher_session import Refused
from fedclient.identity import DeviceIdentity
from fedclient.protection import PrivacyOptions, Protection, Terms
from fedclient.replies import POLLING, REPLIES, Verdict, judge
from fedclient.session import Policy, Session
from fedclient.steps import (
    Finished,
    Fit,
    Fitted,
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
from fedcore.core.cipher import LIST_LOST
from fedcore.identity import pss
from fedcore.secagg import shamir, unmask
from fedcore.secagg.masks import Layout, Member
from fedcore.wire.codec import decode, encode
from fedcore.wire.messages import (
    CipherPublicParams,
    ClientListSign,
    ClientPublicKeys,
    ClientShare,
    GetClientList,
    GetExchangeKeys,
    GetShareSecrets,
    PWParams,
    ReconstructSecret,
    RequestAllClientListSign,
    RequestExchangeKeys,
    RequestFLJob,
    RequestGetModel,
    RequestShareSecrets,
    RequestUpdateModel,
    ResponseClientListSign,
    ResponseExchangeKeys,
    ResponseShareSecrets,
    ReturnAllClientListSign,
    ReturnClientList,
    ReturnExchangeKeys,
    ReturnShareSecrets,
    SendClientListSign,
    SendReconstructSecret,
)

NOW = round(datetime.now(UTC).timestamp() * 1000)
T = 3
PARAMS = PWParams(T, bytes(32), 1, shamir.PRIME.to_bytes(33, "big"))
BASE = {"a.weight": np.arange(3, dtype=np.float32), "b.bias": np.float32([0.5, -0.5])}
SIZES = [3, 2]
POLICY = Policy(max_restarts=3, poll_patience=1000.0)
TABLES = {
    "startFLJob": RequestFLJob,
    "exchangeKeys": RequestExchangeKeys,
    "getKeys": GetExchangeKeys,
    "shareSecrets": RequestShareSecrets,
    "getSecrets": GetShareSecrets,
    "updateModel": RequestUpdateModel,
    "getClientList": GetClientList,
    "pushListSign": SendClientListSign,
    "getListSign": RequestAllClientListSign,
    "reconstructSecrets": SendReconstructSecret,
    "getModel": RequestGetModel,
}


def started(iteration=1, params=PARAMS, weights=BASE):
    cipher = CipherPublicParams("PW_ENCRYPT", params)
    plan = server.plan(cipher=cipher)
    return server.started(iteration, fl_plan_config=plan, feature_map=server.feature_map(weights))


class Counterpart:
    """A server whose rounds are complete when all who are not lost before them were there."""

    def __init__(self, ids, lost=None):
        self.ids, self.lost = list(ids), lost or {}  # fl_id -> round that it does not come to
        self.keys, self.shares, self.uploads, self.reports, self.signs = {}, {}, {}, {}, {}
        self.seen = []
        self.model = None
        self.layout = Layout.CONTIGUOUS

    def expected(self, round_):
        order = list(TABLES)
        return {one for one in self.ids if order.index(self.lost.get(one, "getModel")) > order.index(round_)}

    def there(self, round_, gathered):
        return self.expected(round_) <= set(gathered)

    def answer(self, round_, body):
        request = decode(TABLES[round_], body)
        self.seen.append((round_, request))
        return getattr(self, round_)(request)

    def startFLJob(self, request):
        return started()

    def exchangeKeys(self, request):
        self.keys[request.fl_id] = request
        return encode(ResponseExchangeKeys(200, "", "0", 1))

    def getKeys(self, request):
        if not self.there("exchangeKeys", self.keys):
            return encode(ReturnExchangeKeys(201, 1))
        return encode(ReturnExchangeKeys(200, 1, tuple(self.listed())))

    def listed(self):
        for fl_id in sorted(self.keys):
            one = self.keys[fl_id]
            yield ClientPublicKeys(
                fl_id,
                one.c_pk,
                one.s_pk,
                one.pw_iv,
                one.pw_salt,
                one.timestamp,
                one.iteration,
                one.signature,
                one.certificate_chain,
            )

    def shareSecrets(self, request):
        self.shares[request.fl_id] = {item.fl_id: item.share for item in request.encrypted_shares}
        return encode(ResponseShareSecrets(200, "", "0", 1))

    def getSecrets(self, request):
        if not self.there("shareSecrets", self.shares):
            return encode(ReturnShareSecrets(201, 1))
        items = [
            ClientShare(source, self.shares[source][request.fl_id])
            for source in sorted(self.shares)
            if source != request.fl_id
        ]
        return encode(ReturnShareSecrets(200, 1, tuple(items)))

    def updateModel(self, request):
        self.uploads[request.fl_id] = request
        return server.updated()

    def getClientList(self, request):
        if not self.there("updateModel", self.uploads):
            return encode(ReturnClientList(201, "", ()))
        return encode(ReturnClientList(200, "", tuple(sorted(self.uploads)), 1))

    def pushListSign(self, request):
        self.signs[request.fl_id] = request.signature
        return encode(ResponseClientListSign(200))

    def getListSign(self, request):
        if not self.there("pushListSign", self.signs):
            return encode(ReturnAllClientListSign(201))
        items = tuple(ClientListSign(*item) for item in sorted(self.signs.items()))
        return encode(ReturnAllClientListSign(200, "", items))

    def reconstructSecrets(self, request):
        shares = {item.fl_id: (item.share or b"", item.index) for item in request.reconstruct_secret_shares}
        self.reports[request.fl_id] = shares
        return encode(ReconstructSecret(200))

    def getModel(self, request):
        if not self.there("reconstructSecrets", self.reports):
            return server.model(201)
        self.unmask()
        return server.model(200, weights=self.model)

    def unmask(self):
        members = {fl_id: Member.of(request) for fl_id, request in self.keys.items()}
        recovered = unmask.recover(self.reports, members, self.shares, self.uploads, T)
        assert recovered.complete and not recovered.bad
        noise = np.zeros(self.layout.length(SIZES))
        unmask.noise(members, self.uploads, recovered.secrets, noise)
        self.model = {}
        for name, part in zip(BASE, self.layout.slices(SIZES), strict=True):
            sums = [
                {item.weight_fullname: item.data for item in upload.feature_map}[name]
                for upload in self.uploads.values()
            ]
            total = np.sum(np.float64(sums), axis=0) + noise[part]
            self.model[name] = np.float32(total / sum(map(data_size_of, self.uploads)))


def data_size_of(fl_id):
    return 1 + sum(fl_id.encode()) % 7


def trained_by(fl_id):
    return {name: values + np.float32(data_size_of(fl_id)) / 8 for name, values in BASE.items()}


class Device:
    def __init__(self, fl_id, signer=None, layout=Layout.CONTIGUOUS, least_threshold=0.0):
        self.fl_id = fl_id
        guard = Protection(PrivacyOptions(mask_layout=layout, least_threshold=least_threshold))
        self.session = Session("job", fl_id, POLICY, signer, guard)
        self.now = NOW
        self.fits = 0
        self.done = []
        self.action = self.session.step(Loaded(data_size_of(fl_id)), NOW)

    def feed(self, event):
        self.action = self.session.step(event, self.now)
        return self.action

    def step(self, counterpart):
        """Perform one action; False when the device is through, or lost."""
        match self.action:
            case Send():
                if counterpart.lost.get(self.fl_id) == self.action.round:
                    return False
                self.feed(Replied(200, counterpart.answer(self.action.round, self.action.body)))
            case Fit():
                self.fits += 1
                self.feed(Fitted(FitResult(trained_by(self.fl_id), 0.5)))
            case Sleep():
                self.now += round(self.action.seconds * 1000)
                self.feed(Resumed())
            case IterationDone():
                self.done.append(self.action)
                return False
            case Finished():
                return False
        return True

    def is_at(self, round_):
        return isinstance(self.action, Send) and self.action.round == round_

    def until(self, round_, counterpart):
        for _ in range(40):
            if self.is_at(round_):
                return self
            self.step(counterpart)
            if isinstance(self.action, IterationDone):
                self.feed(Resumed())
        raise AssertionError(f"{self.action} instead of {round_}")


def run(devices, counterpart):
    left = list(devices)
    for _ in range(100):
        left = [device for device in left if device.step(counterpart)]
    assert not left


def run_until(devices, counterpart, round_):
    """Bring all devices before a round."""
    for _ in range(100):
        for device in devices:
            if not device.is_at(round_):
                device.step(counterpart)
    assert all(device.is_at(round_) for device in devices)


def expected_of(uploaders):
    total = sum(map(data_size_of, uploaders))
    return {
        name: sum(np.float64(trained_by(one)[name]) * data_size_of(one) for one in uploaders) / total
        for name in BASE
    }


def check(counterpart, uploaders):
    for name, values in expected_of(uploaders).items():
        assert counterpart.model[name] == pytest.approx(values, abs=1e-5)


IDS = [f"device-{n}" for n in range(7)]


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(
    "lost",
    [
        {},
        {IDS[0]: "exchangeKeys"},
        {IDS[1]: "shareSecrets", IDS[6]: "shareSecrets"},
        {IDS[2]: "getSecrets"},
        {IDS[3]: "updateModel", IDS[0]: "updateModel"},
        {IDS[4]: "getClientList", IDS[5]: "reconstructSecrets"},
        {IDS[0]: "getKeys", IDS[1]: "updateModel", IDS[2]: "reconstructSecrets"},
    ],
)
def test_the_sum_is_right_whoever_is_lost(lost, layout):
    counterpart = Counterpart(IDS, lost)
    counterpart.layout = layout
    devices = [Device(fl_id, layout=layout) for fl_id in IDS]
    run(devices, counterpart)
    uploaders = counterpart.expected("updateModel")
    assert set(counterpart.uploads) == uploaders
    check(counterpart, uploaders)
    for device in devices:
        if device.fl_id not in lost:
            assert [one.outcome for one in device.done] == [IterationOutcome.COMPLETED]
    # What is uploaded is not what was trained.
    for fl_id, upload in counterpart.uploads.items():
        for item in upload.feature_map:
            plain = trained_by(fl_id)[item.weight_fullname] * data_size_of(fl_id)
            assert not np.allclose(item.data, plain, atol=1e-3)


def test_the_same_request_order_as_the_original():
    counterpart = Counterpart(IDS)
    run([Device(fl_id) for fl_id in IDS], counterpart)
    asked = [round_ for round_, request in counterpart.seen if getattr(request, "fl_id", IDS[0]) == IDS[0]]
    once = list(dict.fromkeys(asked))
    unsigned = [one for one in TABLES if one not in ("pushListSign", "getListSign")]
    assert once == unsigned


# ---- what is sent again


def test_a_refused_device_sends_the_same_keys_shares_and_upload_again():
    counterpart = Counterpart(IDS)
    devices = [Device(fl_id) for fl_id in IDS]
    first = devices[0]
    run_until(devices, counterpart, "updateModel")
    before = decode(RequestUpdateModel, first.action.body)
    first.feed(Replied(200, server.updated(300, next_req_time=str(NOW + 1000))))
    first.feed(Resumed())  # from the report to the wait
    first.until("updateModel", counterpart)
    after = decode(RequestUpdateModel, first.action.body)
    assert first.fits == 1 and after.timestamp != before.timestamp
    for one, other in zip(before.feature_map, after.feature_map, strict=True):
        assert one.data.tobytes() == other.data.tobytes()
    for round_, fields in (("exchangeKeys", ("c_pk", "s_pk", "ind_iv", "pw_iv", "pw_salt")),):
        sent = [request for name, request in counterpart.seen if name == round_ and request.fl_id == IDS[0]]
        assert len(sent) == 2 and all(getattr(sent[0], f) == getattr(sent[1], f) for f in fields)
    shared = [
        request for name, request in counterpart.seen if name == "shareSecrets" and request.fl_id == IDS[0]
    ]
    assert shared[0].encrypted_shares == shared[1].encrypted_shares
    run(devices, counterpart)
    check(counterpart, IDS)


def test_a_device_whose_update_was_lost_sends_it_again_in_a_moment():
    counterpart = Counterpart(IDS)
    devices = [Device(fl_id) for fl_id in IDS]
    first = devices[0]
    run_until(devices, counterpart, "getClientList")
    before = counterpart.uploads.pop(IDS[0])
    first.feed(Replied(200, encode(ReturnClientList(201, LIST_LOST, (), 1, str(NOW + 3_600_000)))))
    assert isinstance(first.action, IterationDone) and first.action.outcome is IterationOutcome.RESTARTED
    assert isinstance(first.feed(Resumed()), Sleep) and first.action.seconds <= 1.5 * POLICY.retry_time
    first.until("updateModel", counterpart)
    after = decode(RequestUpdateModel, first.action.body)
    assert first.fits == 1
    for one, other in zip(before.feature_map, after.feature_map, strict=True):
        assert one.data.tobytes() == other.data.tobytes()
    run(devices, counterpart)
    check(counterpart, IDS)


def test_another_iteration_has_other_keys():
    counterpart = Counterpart(IDS)
    device = Device(IDS[0]).until("getKeys", counterpart)
    device.feed(Replied(200, encode(ReturnExchangeKeys(300, 2, None, str(NOW + 1)))))
    device.until("startFLJob", counterpart)
    device.feed(Replied(200, started(2)))
    again = decode(RequestExchangeKeys, device.action.body)
    first = counterpart.keys[IDS[0]]
    assert again.iteration == 2
    for name in ("c_pk", "s_pk", "ind_iv", "pw_iv", "pw_salt"):
        assert getattr(again, name) != getattr(first, name)


def test_another_base_has_other_keys():
    counterpart = Counterpart(IDS)
    device = Device(IDS[0]).until("getKeys", counterpart)
    device.feed(Replied(200, encode(ReturnExchangeKeys(300, 1, None, str(NOW + 1)))))
    device.until("startFLJob", counterpart)
    other = {name: values + 1 for name, values in BASE.items()}
    device.feed(Replied(200, started(weights=other)))
    assert decode(RequestExchangeKeys, device.action.body).s_pk != counterpart.keys[IDS[0]].s_pk


# ---- what is refused


def masking_at(round_, counterpart=None):
    """Return one device's masking that has just been told what comes before a round, and everybody's counterpart."""
    counterpart = counterpart or Counterpart(IDS)
    devices = [Device(fl_id) for fl_id in IDS]
    run_until(devices, counterpart, round_)
    return devices[0].session._masking, counterpart


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda entries: entries[1:], "does not hold the client's own"),
        (lambda entries: (replace(entries[0], s_pk=entries[1].s_pk), *entries[1:]), "the client's own"),
        (lambda entries: (replace(entries[0], c_pk=entries[1].c_pk), *entries[1:]), "the client's own"),
        (lambda entries: (*entries, entries[1]), "twice"),
        (lambda entries: (*entries, replace(entries[1], fl_id=None)), "without name"),
        (lambda entries: entries[:T], "too few"),
        (lambda entries: (*entries[:6], replace(entries[6], s_pk=bytes(32))), "cannot be used"),
        (lambda entries: (*entries[:6], replace(entries[6], c_pk=bytes(32))), "cannot be used"),
        (lambda entries: (*entries[:6], replace(entries[6], s_pk=bytes(31))), "cannot be used"),
        (lambda entries: (*entries[:6], replace(entries[6], c_pk=b"\x09" * 33)), "cannot be used"),
        (lambda entries: (*entries[:6], replace(entries[6], pw_iv=bytes(15))), "cannot be used"),
        (lambda entries: (*entries[:6], replace(entries[6], pw_salt=None)), "cannot be used"),
    ],
)
def test_lists_of_keys_that_are_refused(change, reason):
    masking, counterpart = masking_at("getKeys")
    entries = tuple(counterpart.listed())
    with pytest.raises(Refused, match=reason):
        masking.take(ReturnExchangeKeys(200, 1, change(entries)), NOW)
    masking.take(ReturnExchangeKeys(200, 1, entries), NOW)  # nothing was kept of the others


@pytest.mark.parametrize(("least", "shares"), [(0.42, True), (3 / 7, False), (0.67, False)])
def test_a_client_may_ask_for_a_threshold(least, shares):
    """T of 7 members restore a secret."""
    counterpart, device = Counterpart(IDS), Device(IDS[0], least_threshold=least)
    run_until([device, *map(Device, IDS[1:])], counterpart, "getKeys")
    listed = ReturnExchangeKeys(200, 1, tuple(counterpart.listed()))
    if shares:
        device.session._masking.take(listed, NOW)
        return
    with pytest.raises(Refused, match="raise the job's reconstruct_secrets_threshold"):
        device.session._masking.take(listed, NOW)


def test_one_list_of_keys_for_one_set_of_keys():
    masking, counterpart = masking_at("shareSecrets")
    entries = tuple(counterpart.listed())
    masking.take(ReturnExchangeKeys(200, 1, entries), NOW)
    with pytest.raises(Refused, match="another list of keys"):
        masking.take(ReturnExchangeKeys(200, 1, entries[:-1]), NOW)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda items: (), "nobody"),
        (lambda items: (*items, items[0]), "twice"),
        (lambda items: (*items, ClientShare("stranger", b"x" * 96)), "no member"),
        (lambda items: (*items, ClientShare(IDS[0], b"x" * 96)), "no member"),
    ],
)
def test_shares_that_are_refused(change, reason):
    masking, counterpart = masking_at("getSecrets")
    given = decode(ReturnShareSecrets, counterpart.getSecrets(GetShareSecrets(IDS[0], 1))).encrypted_shares
    with pytest.raises(Refused, match=reason):
        masking.take(ReturnShareSecrets(200, 1, change(given)), NOW)
    masking.take(ReturnShareSecrets(200, 1, given), NOW)
    with pytest.raises(Refused, match="other shares"):
        masking.take(ReturnShareSecrets(200, 1, given[:-1]), NOW)


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        (IDS[1:], "not the client itself"),
        (IDS[:T], "not more than 3"),
        ([*IDS, IDS[1]], "twice"),
        ([*IDS, "stranger"], "shared no secrets"),
        ([], "not the client itself"),
    ],
)
def test_lists_of_uploads_that_are_refused(listed, reason):
    masking, _ = masking_at("getClientList")
    with pytest.raises(Refused, match=reason):
        masking.take(ReturnClientList(200, "", tuple(listed), 1), NOW)
    masking.take(ReturnClientList(200, "", tuple(IDS[:5]), 1), NOW)
    masking.take(ReturnClientList(200, "", tuple(IDS[:5]), 1), NOW)
    with pytest.raises(Refused, match="another list of uploads"):
        masking.take(ReturnClientList(200, "", tuple(IDS), 1), NOW)


def test_a_refused_list_gives_the_keys_up():
    counterpart = Counterpart(IDS)
    devices = [Device(fl_id) for fl_id in IDS]
    run_until(devices, counterpart, "getClientList")
    device = devices[0]
    device.feed(Replied(200, encode(ReturnClientList(200, "", tuple(IDS[1:]), 1))))
    assert isinstance(device.action, IterationDone)
    assert device.action.outcome is IterationOutcome.RESTARTED
    assert "not the client itself" in device.action.reason
    device.feed(Resumed())
    device.until("exchangeKeys", counterpart)
    assert decode(RequestExchangeKeys, device.action.body).s_pk != counterpart.keys[IDS[0]].s_pk


def test_a_record_that_cannot_be_opened_is_left_out():
    masking, _ = masking_at("reconstructSecrets")
    masking._held[IDS[4]] = bytes(96)
    report = masking.request("reconstructSecrets", NOW).reconstruct_secret_shares
    assert [item.fl_id for item in report] == [IDS[1], IDS[2], IDS[3], IDS[5], IDS[6]]


def test_no_report_holds_shares_of_both_secrets():
    counterpart = Counterpart(IDS, {IDS[2]: "updateModel"})
    run([Device(fl_id) for fl_id in IDS], counterpart)
    for report in counterpart.reports.values():
        assert len(report) == len(IDS) - 1  # one share for each owner
    members = {fl_id: Member.of(request) for fl_id, request in counterpart.keys.items()}
    # Of one that has uploaded the shares do not give the private key, of one that was lost they do.
    wrong = unmask.recover(
        counterpart.reports, members, counterpart.shares, set(counterpart.uploads) - {IDS[5]}, T
    )
    assert IDS[5] in wrong.lacking and IDS[2] in wrong.secrets


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (PWParams(0, None, 1, PARAMS.prime), "0 shares that give a secret"),
        (PWParams(3, None, 1, None), "none of 264 bits"),
        (PWParams(3, None, 1, b"\xff" * 33), "none of 264 bits"),
        (PWParams(3, None, 1, b"\x7f" + bytes(31) + b"\x01"), "none of 264 bits"),
        (None, "0 shares"),
    ],
)
def test_plans_that_cannot_be_followed(params, reason):
    terms = Terms(1, protection.MASKS, masks=params or PWParams())
    assert reason in terms.fault()
    device = Device(IDS[0])
    device.feed(Replied(200, started(params=params)))
    assert device.action == Finished(Outcome.FAILED) and reason in device.action.reason


def test_the_original_draws_its_own_prime():
    prime = 0xCB95B5979E26CE9103109576F1F7189974E3ECA5EBDD3748962403C95E0E8BB933
    assert Terms(1, protection.MASKS, masks=PWParams(2, None, 1, prime.to_bytes(33, "big"))).fault() == ""


def test_devices_do_not_take_part_in_the_workers_kind():
    assert "STABLE_PW_ENCRYPT" in Terms(1, protection.STABLE_MASKS).fault()


# ---- verdicts


@pytest.mark.parametrize(
    "round_", [one for one in TABLES if one not in ("startFLJob", "updateModel", "getModel")]
)
def test_what_answers_mean(round_):
    reply = REPLIES[round_]
    waits = round_ in POLLING
    for code, verdict in {
        200: Verdict.SUCCESS,
        201: Verdict.WAIT if waits else Verdict.FAILED,
        300: Verdict.RESTART,
        400: Verdict.FAILED,
        500: Verdict.FAILED,
    }.items():
        assert judge(round_, 200, encode(reply(code))).verdict is verdict
    assert judge(round_, 200, b"The cluster is in safemode.").verdict is Verdict.WAIT
    over = b"The server's training job is disabled or finished."
    assert judge(round_, 200, over).verdict is Verdict.OVER
    assert judge(round_, 503, b"").verdict is Verdict.REPEAT


# ---- signatures


@pytest.fixture(scope="module")
def identities():
    maker = Maker()
    made = [maker.device(f"device {n}") for n in range(T + 2)]
    return [DeviceIdentity(one.attestation.key, one.chain) for one in made]


@pytest.fixture(scope="module")
def stranger():
    made = Maker("Another").device("stranger")
    return DeviceIdentity(made.attestation.key, made.chain)


def signing(identities, round_=None, lost=None):
    """Return devices that sign, before a round or through, and their counterpart."""
    counterpart = Counterpart([one.fl_id for one in identities], lost)
    devices = [Device(one.fl_id, one) for one in identities]
    if round_ is None:
        run(devices, counterpart)
    else:
        run_until(devices, counterpart, round_)
    return devices, counterpart


def test_devices_that_sign(identities):
    devices, counterpart = signing(identities)
    check(counterpart, counterpart.ids)
    assert [one.outcome for device in devices for one in device.done] == [IterationOutcome.COMPLETED] * 5
    rounds = list(dict.fromkeys(round_ for round_, _ in counterpart.seen))
    assert rounds == list(TABLES)
    public = identities[0].key.public_key()
    for round_, request in counterpart.seen:
        if getattr(request, "fl_id", "") != identities[0].fl_id or round_ == "startFLJob":
            continue
        message = f"{request.timestamp}1".encode()
        if round_ == "exchangeKeys":
            message = request.c_pk + request.s_pk + message
        signature = request.req_signature if round_ == "pushListSign" else request.signature
        assert pss.verify(public, signature, message)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"signature": None}, "signature is wrong"),
        ({"s_pk": b"\x09" + bytes(31)}, "signature is wrong"),
        ({"timestamp": "1"}, "signature is wrong"),
        ({"iteration": 7}, "another iteration"),
        ({"certificate_chain": None}, "shows no certificates"),
        ({"certificate_chain": ("x", "y")}, "cannot be used"),
    ],
)
def test_keys_of_others_that_are_refused(identities, change, reason):
    devices, counterpart = signing(identities, "getKeys")
    entries = tuple(counterpart.listed())
    other = next(one for one in entries if one.fl_id != devices[0].fl_id)
    changed = tuple(replace(one, **change) if one is other else one for one in entries)
    with pytest.raises(Refused, match=reason):
        devices[0].session._masking.take(ReturnExchangeKeys(200, 1, changed), NOW)
    devices[0].session._masking.take(ReturnExchangeKeys(200, 1, entries), NOW)


def test_keys_of_another_maker_or_under_another_id_are_refused(identities, stranger):
    devices, counterpart = signing(identities, "getKeys")
    masking = devices[0].session._masking
    entries = tuple(counterpart.listed())
    other = next(one for one in entries if one.fl_id != devices[0].fl_id)
    request = RequestExchangeKeys(
        other.fl_id, other.c_pk, other.s_pk, 1, "5", b"", other.pw_iv, other.pw_salt
    )
    for fl_id, reason in ((stranger.fl_id, "authority"), (other.fl_id, "equipment")):
        signed = stranger.signed_keys(replace(request, fl_id=fl_id))
        forged = replace(
            other,
            fl_id=fl_id,
            timestamp="5",
            signature=signed.signature,
            certificate_chain=signed.certificate_chain,
        )
        changed = tuple(forged if one is other else one for one in entries)
        with pytest.raises(Refused, match=reason):
            masking.take(ReturnExchangeKeys(200, 1, changed), NOW)
    years = 100 * 365 * 86_400_000
    with pytest.raises(Refused, match="not valid now"):
        masking.take(ReturnExchangeKeys(200, 1, entries), NOW + years)


def test_signatures_under_another_list_are_refused(identities):
    devices, counterpart = signing(identities, "getListSign")
    masking = devices[0].session._masking
    items = [ClientListSign(*item) for item in sorted(counterpart.signs.items())]
    masking.take(ReturnAllClientListSign(200, "", tuple(items)), NOW)
    ours = devices[0].fl_id
    other = next(one for one in items if one.fl_id != ours)
    liar = next(one for one in identities if one.fl_id == other.fl_id)
    told = replace(other, signature=liar.list_signature(counterpart.ids[:-1]))
    with pytest.raises(Refused, match="signature under the list"):
        masking.take(
            ReturnAllClientListSign(200, "", tuple(told if one is other else one for one in items)), NOW
        )
    with pytest.raises(Refused, match=r"\d clients have signed"):
        masking.take(ReturnAllClientListSign(200, "", tuple(items[:2])), NOW)
    with pytest.raises(Refused, match="others than are on it"):
        masking.take(ReturnAllClientListSign(200, "", (*items, ClientListSign("stranger", b"x"))), NOW)
