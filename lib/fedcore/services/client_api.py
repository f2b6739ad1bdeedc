"""The device routes startFLJob, updateModel and getModel, each one function from body to answer.

A request passes the gate, is decoded, is judged by the shared state and is answered from ``core.admission``'s
verdict. While the iteration changes or Redis is away, a request is held for a moment rather than refused: old
devices give up after two refusals.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import xxhash
from twisted.logger import Logger
from twisted.python.failure import Failure

from fedcore.config import ServerMode, Settings
from fedcore.core import admission, backoff
from fedcore.core.admission import Acceptance, Selection, Standing, Verdict
from fedcore.core.cipher import LAST_BEFORE_UPDATE
from fedcore.core.client_key import client_key
from fedcore.errors import FedcoreError, MalformedRequest, StoreError
from fedcore.identity import freshness, messages
from fedcore.ledger.layout import MAX_FL_ID
from fedcore.ledger.ledger import Slot
from fedcore.ledger.spool import Spool
from fedcore.net.routes import Response, Route, Sink
from fedcore.observe.metrics import OUTCOMES, UNAVAILABLE, ServerMetrics
from fedcore.services.answers import Answer, Answers, Offered
from fedcore.services.device_identity import DeviceIdentity, Entry, Signed, is_provable
from fedcore.services.iteration_driver import IterationDriver
from fedcore.services.packed_models import PackedModels
from fedcore.services.screening import Finding, Screening
from fedcore.services.terms import update_limit
from fedcore.services.update_forms import UpdateForms
from fedcore.services.update_intake import NoRoom, UpdateIntake
from fedcore.store.cipher_state import CipherState
from fedcore.store.cluster_state import (
    ClientMeta,
    ClusterState,
    IterationMoved,
    MaskedUpdate,
    OthersAwaited,
    Reserve,
    StateMissing,
)
from fedcore.wire import codec
from fedcore.wire.arrays import Layout, all_finite
from fedcore.wire.messages import (
    CompressFeatureMap,
    CompressType,
    FeatureMap,
    RequestFLJob,
    RequestGetModel,
    RequestUpdateModel,
    UnsupervisedEvalItems,
)

START_LIMIT = 256 * 1024  # bytes; a request with its certificate chain takes some 20 KiB
GET_LIMIT = 64 * 1024
RETRY_S = 0.1  # until the shared state is asked again that could not say yet, or may have changed meanwhile
_LOOKS = 3  # at the shared state, until it is clear whether this server is behind
INNER_ERROR = "An inner error occurred"
_TEXT = b"text/html; charset=ISO-8859-1"  # what the original sends with everything; old devices do not look


@dataclass(slots=True)
class Memory:
    """A sink in ordinary memory, for small bodies."""

    buffer: memoryview
    length: int = 0


class ClientApi:
    """Answers devices.

    Attributes:
        stopping: True answers every round with the text of a finished job.
        for_workers: whether those who train are cloud workers rather than devices.
    """

    log = Logger()

    def __init__(
        self,
        settings: Settings,
        layout: Layout,
        driver: IterationDriver,
        intake: UpdateIntake,
        metrics: ServerMetrics,
        reactor: Any,
        now_ms: Callable[[], int],
        chance: Callable[[], float],
        identity: DeviceIdentity | None = None,
        forms: UpdateForms | None = None,
    ) -> None:
        """Answer from ``driver`` and ``intake``.

        ``now_ms`` is the wall clock, ``chance`` gives 0..1; ``identity`` judges signatures, if devices must sign;
        ``forms`` reads updates that are not plain, and is shared with whoever recovers them.
        """
        self.stopping = False
        self.for_workers = settings.server_mode is ServerMode.CLOUD_TRAINING
        self.driver = driver
        self.intake = intake
        self.layout = layout
        self.longest_update = update_limit(layout)
        self._packed = PackedModels(reactor)
        self.answers = Answers(settings, driver.models, self._packed)
        self.answers.open(driver.iteration.number)
        self._forms = forms or UpdateForms(settings, layout, driver.models, reactor)
        driver.on_terms += [self._forms.follow_terms, self._follow_terms]
        self._screening = Screening(settings, layout, driver.models, intake, metrics, self._forms)
        self._protection = settings.encrypt.encrypt_type
        self._hold = settings.fedcore.device.hold_time
        self._largest_size = settings.fedcore.update.max_data_size
        self._margin_ms = int(settings.fedcore.device.retry_margin * 1000)
        self._metrics = metrics
        self._reactor = reactor
        self._now_ms = now_ms
        self._chance = chance
        self._identity = identity
        self._answers_of = 0

    # ---- rounds

    async def start_fl_job(self, body: memoryview) -> Answer | str:
        """Give a device a place in the iteration."""
        try:
            request = codec.decode(RequestFLJob, body)
        except MalformedRequest:
            return self._refuse_start(Verdict(400, admission.bad_schema("RequestFLJob")))
        if not is_id(request.fl_id) or request.fl_name is None or request.timestamp is None:
            return self._refuse_start(Verdict(400, admission.MISSING_START_PARTS))
        if self._identity is not None and not is_provable(request):
            return self._refuse_start(Verdict(400, admission.MISSING_START_PARTS))
        entry: Entry | None = None
        proven = self._identity is None
        fault = admission.data_size_fault(request.data_size, self._largest_size)
        if request.data_size > self._largest_size:
            self._metrics.data_sizes_refused.inc()
        until = self._reactor.seconds() + self._hold
        while True:
            await self._pack(request.download_compress_types)
            text = await self.pass_gate("startFLJob", until)
            if text is not None:
                return text
            seen = self.driver.where
            try:
                if self._identity is not None:
                    entry = entry or self._identity.enter(request)
                    refusal = await self._unproven(entry, seen[0], request, body)
                    if refusal is not None:
                        return self._refuse_start(refusal)
                    proven = True
                selection = await self._select(request, seen[0], fault is None, entry)
            except StoreError as error:
                if await self.settled(error, seen, until):
                    continue
                selection = Selection.FULL
            if await self._held(selection, seen, until):
                continue
            verdict = admission.judge_start(selection, request.fl_id, fault)
            changed = seen[0] != self.driver.iteration.number or not self.driver.serving
            if verdict.code == 200 and changed:  # the place was in an iteration that has ended meanwhile
                if self.left(until):
                    continue
                verdict = Verdict(300, admission.START_FULL)
            if verdict.code == 200:
                return self._current.selected(self._opening(), request.download_compress_types)
            if proven and verdict.reason == admission.START_FULL and not self.left(until):
                # It was held in vain: what the shared state was told of its return, if anything, is too early.
                return self._refuse_start(verdict, await self.return_of(request.fl_id))
            return self._refuse_start(verdict)

    async def update_model(self, room: Slot | Spool) -> Answer | str:
        """Count a device's update; the room that its body lies in is ours to keep or release."""
        try:
            slot = await self.intake.slot_for(room)
        except NoRoom:
            return await self._no_room(room.buffer[: room.length])
        kept = False
        try:
            request = codec.decode(RequestUpdateModel, slot.body)
            if not _is_complete(request, self._forms.compressed):
                return self._malformed_update(admission.MISSING_UPDATE_PARTS)
            acceptance, answer = await self._count(slot, request)
            kept = acceptance is Acceptance.ACCEPTED
            return answer
        except MalformedRequest:
            return self._malformed_update(admission.bad_schema("RequestUpdateModel"))
        finally:
            if not kept:
                self.intake.release(slot)

    async def get_model(self, body: memoryview) -> Answer | str:
        """Hand out a model."""
        try:
            request = codec.decode(RequestGetModel, body)
        except MalformedRequest:
            return self._current.model_refused(400, admission.bad_schema("RequestGetModel"))
        text = await self.pass_gate("getModel", self._reactor.seconds())
        if text is not None:
            return text
        until = self._reactor.seconds() + self._hold
        while True:
            if not await self._up_to_date(request.iteration, until):
                return self._current.model_not_ready(self.next_req_time())
            iteration = self.driver.iteration
            if request.iteration == iteration.number:
                while self._complete and self.driver.iteration.number == iteration.number:
                    if not await self._moved_on(self.driver.where, until):
                        break
                if self.driver.iteration.number == iteration.number or not self.driver.serving:
                    return self._current.model_not_ready(self.next_req_time())
            if not await self._pack(request.download_compress_types, request.iteration):
                return self._current.model(
                    request.iteration, self._opening(), request.download_compress_types
                )

    # ---- steps

    async def _pack(self, offered: Offered, requested: int | None = None) -> bool:
        """Have a model ready in 8 bits if a device is to have it so; False if there was nothing to wait for."""
        image = self.answers.to_pack(offered, requested)
        if image is None:
            return False
        await self._packed.make(image)
        return True

    async def _unproven(
        self, entry: Entry, number: int, request: RequestFLJob, body: memoryview
    ) -> Verdict | None:
        cluster = self.driver.cluster
        assert self._identity is not None and cluster is not None
        places = self.driver.policy.start_threshold
        return await self._identity.refusal(cluster, number, places, entry, request, body)

    async def _select(self, request: RequestFLJob, number: int, fit: bool, entry: Entry | None) -> Selection:
        cluster = self.driver.cluster
        assert cluster is not None and request.fl_id is not None
        key = "" if entry is None else entry.key
        meta = ClientMeta(request.data_size, max(0, request.eval_data_size), self._now_ms(), key)
        reserve = self._reserve(self.next_req_time())
        selection, count = await cluster.select_client(
            number, request.fl_id, meta, places=self.driver.policy.start_threshold, fit=fit, reserve=reserve
        )
        if selection is Selection.SELECTED:
            self.driver.place_given(cluster, number, count, client_key(request.fl_id), meta)
        if selection in (Selection.FULL, Selection.RESERVED):
            self.driver.place_kept(client_key(request.fl_id), reserve)
        if selection is Selection.KNOWN and await self._left_out(cluster, number, request.fl_id):
            return Selection.RESERVED
        return selection

    async def _held(self, selection: Selection, seen: tuple[int, int], until: float) -> bool:
        """Hold a device that there is no place for, if one is near; tell whether there is another iteration now."""
        if selection is Selection.RESERVED:
            # Another refusal ends an old device: it is held even by a server that is about to stop.
            left = max(0.0, until - self._reactor.seconds())
            return await self.driver.moved_on(seen, left, to_the_end=True)
        return selection is Selection.FULL and self._complete and await self._moved_on(seen, until)

    async def _left_out(self, cluster: ClusterState, number: int, fl_id: str) -> bool:
        """Tell whether a client that has a place in an iteration with masks can do nothing more in it.

        It was refused in a later round and has come back too early: there it would be refused again, and two refusals
        end an old device. What it waits for is the next iteration.
        """
        if self._protection.value not in LAST_BEFORE_UPDATE:
            return False
        completes = self.driver.policy.completes
        closes = {name: completes(name) for name in ("exchangeKeys", "shareSecrets")}
        return self._complete or await CipherState(cluster).left_out(number, fl_id, closes)

    async def _count(self, slot: Slot, request: RequestUpdateModel) -> tuple[Acceptance | None, Answer | str]:
        signed = await self._signed(slot, request)  # the body may be clipped later
        masked = await self._masked(request)
        screened = self._screening.of(slot, request)
        until = self._reactor.seconds() + self._hold
        while True:
            text = await self.pass_gate("updateModel", until)
            if text is not None:
                return None, text
            cluster, iteration = self.driver.cluster, self.driver.iteration
            assert cluster is not None
            standing, finding = Standing.PASSED, Finding.UNFIT
            try:
                standing = await self._standing(cluster, signed)
                if standing is Standing.PASSED:
                    finding = await screened.finding(cluster, iteration.number, iteration.attempt)
                acceptance, count = await self.intake.accept(
                    slot,
                    screened.request,
                    cluster,
                    iteration.number,
                    iteration.attempt,
                    quorum=self.driver.policy.update_threshold,
                    fit=finding is Finding.FIT,
                    reading=screened.reading,
                    masked=masked,
                )
            except StoreError as error:
                if await self.settled(error, (iteration.number, iteration.attempt), until):
                    continue
                acceptance, count, finding = Acceptance.FULL, 0, Finding.FIT
            if acceptance is Acceptance.UNFIT and finding is Finding.UNKNOWN:
                continue  # it has got its place meanwhile
            too_far = acceptance is Acceptance.UNFIT and finding is Finding.TOO_FAR
            if acceptance is Acceptance.UNFIT and standing is Standing.UNKNOWN and self.left(until):
                continue  # likewise
            refusal: Verdict | None = None
            if acceptance in (Acceptance.UNFIT, Acceptance.REPEATED):
                refusal = admission.judge_signature(standing, request.fl_id)
            if acceptance is Acceptance.ACCEPTED:
                self._metrics.updates_accepted.inc()
                self._metrics.upload_bytes.inc(slot.length)
                self.driver.upload_counted(cluster, iteration.number, iteration.attempt, count)
            elif refusal is not None:
                self._metrics.refuse_update("signature")
            elif acceptance is not Acceptance.REPEATED:
                self._metrics.refuse_update("norm" if too_far else acceptance.value)
            needy = acceptance in admission.NEEDS_PLACE and standing is Standing.PASSED
            next_req_time = await self.return_of(request.fl_id or "") if needy else self.next_req_time()
            number = self.driver.iteration.number
            verdict = refusal or admission.judge_update(
                acceptance,
                request.fl_id or "",
                request.iteration,
                number,
                next_req_time,
                too_far=too_far,
                missing=screened.missing if finding is Finding.INCOMPLETE else "",
            )
            return acceptance, self.answers.update(verdict.code, verdict.reason, next_req_time)

    async def _signed(self, slot: Slot, request: RequestUpdateModel) -> Signed | None:
        """Return what is to be judged of an update's signature, None if devices need not sign."""
        if self._identity is None:
            return None
        digest = await self.intake.compute(lambda: freshness.digest_of(slot.body))
        number, stamp = request.iteration, request.timestamp
        message = messages.of_round(stamp or "", number)
        return Signed("updateModel", request.fl_id, number, stamp, request.signature, message, digest)

    async def _masked(self, request: RequestUpdateModel) -> MaskedUpdate | None:
        """Return what the shared state is to know of a masked update, None where updates are not masked."""
        after = LAST_BEFORE_UPDATE.get(self._protection.value)
        if after is None:
            return None
        return MaskedUpdate(after, await self.intake.compute(lambda: _digest_of(request.feature_map or ())))

    async def _standing(self, cluster: ClusterState, signed: Signed | None) -> Standing:
        """Judge the signature of an update; what need not be signed has passed."""
        if self._identity is None or signed is None:
            return Standing.PASSED
        return await self._identity.standing(cluster, signed)

    async def _no_room(self, body: memoryview) -> Answer:
        """Refuse a complete update that no slot came free for; who sent it can be read wherever it lies."""
        fl_id = None
        with contextlib.suppress(MalformedRequest):
            fl_id = codec.decode(RequestUpdateModel, body).fl_id
        known = self._identity is None and is_id(fl_id)  # whoever must sign has not shown here that it can
        next_req_time = await self.return_of(fl_id or "") if known else self.next_req_time()
        return self.answers.update(300, admission.UPDATE_FULL, next_req_time)

    async def return_of(self, fl_id: str) -> int:
        """Return when a refused client shall come back, and keep a place for it: two refusals end an old device."""
        next_req_time, cluster = self.next_req_time(), self.driver.cluster
        if cluster is not None:
            with contextlib.suppress(StoreError):  # then it must take its chance
                places, reserve = self.driver.policy.start_threshold, self._reserve(next_req_time)
                if await cluster.reserve_place(fl_id, places=places, reserve=reserve):
                    self.driver.place_kept(client_key(fl_id), reserve)
        return max(next_req_time, self._now_ms() + self._margin_ms)  # Redis may have let us wait

    def _reserve(self, next_req_time: int) -> Reserve:
        """Return how the place of a client is kept that returns within two margins after the expected opening."""
        return Reserve(next_req_time - self._now_ms(), 2 * self._margin_ms, self._margin_ms)

    # ---- holding and refusing

    async def pass_gate(self, round_name: str, until: float) -> str | None:
        """Return the text that refuses a round, or None; waits for Redis until the given moment."""
        while True:
            text = admission.gate(
                round_name=round_name,
                stopping=self.stopping,
                running=self.driver.iteration.running,
                store_available=self.driver.joined,
            )
            if text is not admission.SAFEMODE or not await self._store_back(until):
                return text

    async def _store_back(self, until: float) -> bool:
        """Wait until the shared state can be reached; False if that takes too long."""
        left = self.left(until)
        return left > 0 and await self.driver.store_back(left)

    def left(self, until: float) -> float:
        """Return for how many seconds a request may still be held, at most until the given moment."""
        return 0.0 if self.driver.letting_go else max(0.0, until - self._reactor.seconds())

    async def _up_to_date(self, wanted: int, until: float) -> bool:
        """Make sure that this server has its model in front, and is not behind the others; False if it cannot.

        A device that asks for a later iteration than this server's was served by another one: whether the job is
        there, or the device only says so, is for the shared state to tell.
        """
        driver = self.driver
        for _ in range(_LOOKS):
            seen = driver.where
            if seen[0] >= wanted or driver.cluster is None:
                break
            try:
                await driver.look()
            except StoreError:
                if not await self._store_back(until):
                    return False
                continue
            if driver.iteration.number >= wanted or not (driver.busy or driver.iteration.changing):
                break
            if not await self._moved_on(seen, until):
                return False
        return driver.serving or await self._store_back(until)

    async def _moved_on(self, seen: tuple[int, int], until: float) -> bool:
        return await self.driver.moved_on(seen, self.left(until))

    async def settled(self, error: StoreError, seen: tuple[int, int], until: float) -> bool:
        """After the shared state proved to be elsewhere or away: whether another try is worth it."""
        if not self.left(until):
            return False
        if isinstance(error, OthersAwaited):
            await self.driver.others_back(self.left(until))
            return True
        try:
            await self.driver.look()
        except StoreError:
            return await self._store_back(until)
        if isinstance(error, StateMissing) or self.driver.where != seen:
            return True
        if isinstance(error, IterationMoved):
            return await self._moved_on(seen, until)
        await self.driver.moved_on(seen, min(RETRY_S, self.left(until)))
        return True

    @property
    def _complete(self) -> bool:
        """Whether the quorum is reached, so that the next iteration is near."""
        now = self.driver.iteration
        return now.changing or now.uploaded >= self.driver.policy.update_threshold

    @property
    def _window_ms(self) -> int:
        """Longest time that the rounds of an iteration may take."""
        policy = self.driver.policy
        hidden = policy.cipher_window * len(policy.cipher_rounds)
        return int(1000 * (policy.start_window + policy.update_window + hidden))

    def _follow_terms(self, settings: Settings) -> None:
        """Tell devices what the settings say that are in force now."""
        self._protection = settings.encrypt.encrypt_type
        self.answers = Answers(settings, self.driver.models, self._packed)
        self._answers_of = 0
        self._screening = Screening(
            settings, self.layout, self.driver.models, self.intake, self._metrics, self._forms
        )

    @property
    def _current(self) -> Answers:
        """The answers, those of an ended iteration forgotten."""
        number = self.driver.iteration.number
        if self._answers_of != number:
            self._answers_of = number
            self.answers.open(number)
        return self.answers

    def _opening(self) -> int:
        """Return when the next iteration opens at the latest, milliseconds since the epoch."""
        return backoff.next_request_time(
            self._now_ms(), self._now_ms() + self._window_ms, self._margin_ms, 0.0
        )

    def next_req_time(self) -> int:
        """Return when a refused device shall come back."""
        filled, typical = self.driver.filled, self.driver.typical
        now = self._now_ms()
        filled_ms = None if filled is None else now - int((self._reactor.seconds() - filled) * 1000)
        typical_ms = None if typical is None else int(typical * 1000)
        opens = backoff.expected_opening(now, filled_ms, self._window_ms, typical_ms)
        return backoff.next_request_time(now, opens, self._margin_ms, self._chance())

    def _refuse_start(self, verdict: Verdict, next_req_time: int | None = None) -> Answer:
        moment = self.next_req_time() if next_req_time is None else next_req_time
        return self._current.start_refused(verdict.code, verdict.reason, moment)

    def _malformed_update(self, reason: str) -> Answer:
        self._metrics.refuse_update("malformed")
        return self.answers.update(400, reason, self.next_req_time())


def _digest_of(weights: Sequence[FeatureMap]) -> bytes:
    """Return what tells an update's weights from others; a repeat may bear a later time stamp."""
    found = xxhash.xxh3_128()
    for weight in sorted(weights, key=lambda weight: weight.weight_fullname or ""):
        assert weight.data is not None
        name = (weight.weight_fullname or "").encode()
        found.update(b"%d:%b:%d:" % (len(name), name, weight.data.size))
        found.update(weight.data.view(np.uint8).data)
    return found.digest()


def is_id(fl_id: str | None) -> TypeGuard[str]:
    """Tell whether a client's id is there and fits a ledger."""
    return fl_id is not None and len(fl_id.encode()) <= MAX_FL_ID


def _is_complete(request: RequestUpdateModel, compressed: bool) -> bool:
    """Tell whether an update has all its parts and its figures are numbers.

    Args:
        request: the update.
        compressed: whether it may be compressed. The original reads an absent ``feature_map`` where it may not.
    """
    plain = request.upload_compress_type == CompressType.NO_COMPRESS
    if not plain and not compressed:
        return False
    items = request.feature_map if plain else request.compress_feature_map
    return (
        is_id(request.fl_id)
        and request.timestamp is not None
        and items is not None
        and all(_whole(item) for item in items)
        and math.isfinite(request.upload_loss)
        and math.isfinite(request.upload_accuracy)
        and _sound(request.unsupervised_eval_items)
    )


def _whole(item: FeatureMap | CompressFeatureMap) -> bool:
    """Tell whether a weight has both its name and its values."""
    values = item.data if isinstance(item, FeatureMap) else item.compress_data
    return item.weight_fullname is not None and values is not None


def _sound(evaluation: UnsupervisedEvalItems | None) -> bool:
    """Tell whether evaluation vectors are absent, or there and finite."""
    if evaluation is None:
        return True
    vectors = [item.eval_data for item in evaluation.eval_items or ()]
    present = evaluation.eval_items is not None and all(vector is not None for vector in vectors)
    return present and all(all_finite(vector) for vector in vectors if vector is not None)


# ---- the listener's view


@dataclass(slots=True)
class SmallRound:
    """A round whose bodies are small: they are received into ordinary memory."""

    name: str
    answer: Callable[[memoryview], Awaitable[Answer | str]]
    failed: Callable[[], Answer]
    most: int
    metrics: ServerMetrics
    clock: Callable[[], float]

    def limit(self) -> int:
        return self.most

    def sink(self, length: int) -> Sink:
        return Memory(memoryview(bytearray(length)))

    def discard(self, sink: Sink) -> None:
        """Leave the memory to the garbage collector."""

    async def handle(self, sink: Sink) -> Response:
        return await _timed(self, self.answer(sink.buffer[: sink.length]))


@dataclass(slots=True)
class UploadRound:
    """updateModel: bodies are received into the slots of the ledger."""

    name: str
    api: ClientApi
    failed: Callable[[], Answer]
    metrics: ServerMetrics
    clock: Callable[[], float]

    def limit(self) -> int:
        return self.api.longest_update

    def sink(self, length: int) -> Slot | Spool:
        return self.api.intake.receive(length)

    def discard(self, sink: Slot | Spool) -> None:
        self.api.intake.release(sink)

    async def handle(self, sink: Slot | Spool) -> Response:
        return await _timed(self, self.api.update_model(sink))


async def _timed(round_: SmallRound | UploadRound, answering: Awaitable[Answer | str]) -> Response:
    """Await an answer, count it, and make even a bug a table that a device can read."""
    start = round_.clock()
    try:
        answer = await answering
    except Exception:
        ClientApi.log.failure("{round} failed", round=round_.name)
        answer = round_.failed()
    if isinstance(answer, str):
        round_.metrics.request(round_.name, UNAVAILABLE, round_.clock() - start)
        return Response((answer.encode(),), 200, _TEXT)
    round_.metrics.request(round_.name, OUTCOMES[answer.code], round_.clock() - start)
    return answer.response


def device_routes(
    api: ClientApi, prefix: str, metrics: ServerMetrics, clock: Callable[[], float]
) -> dict[bytes, Route]:
    """Return path -> route; a prefix is put before the round's name as it is, without a slash between them.

    Cloud workers of the original know no prefix: for them each round is at its plain path as well.
    """
    failures: dict[str, Callable[[], Answer]] = {
        "startFLJob": lambda: api.answers.start_refused(500, INNER_ERROR, 0),
        "updateModel": lambda: api.answers.update(500, INNER_ERROR, 0),
        "getModel": lambda: api.answers.model_refused(500, INNER_ERROR),
    }
    rounds: list[Route] = [
        SmallRound("startFLJob", api.start_fl_job, failures["startFLJob"], START_LIMIT, metrics, clock),
        UploadRound("updateModel", api, failures["updateModel"], metrics, clock),
        SmallRound("getModel", api.get_model, failures["getModel"], GET_LIMIT, metrics, clock),
    ]
    prefixes = {prefix or "/", *(("/",) if api.for_workers else ())}
    return {(start + round_.name).encode(): round_ for start in prefixes for round_ in rounds}


class DevicePages:
    """What answers a request that reaches no round."""

    log = Logger()

    def empty_body(self) -> Response:
        return _failure_page(500, "Get post message failed")

    def not_found(self) -> Response:
        page = b"<html><head><title>404 Not Found</title></head><body><h1>Not Found</h1></body></html>\n"
        return Response((page,), 404, b"text/html")

    def too_many(self) -> Response:
        # Of all answers only this text makes an unmodified device wait and try again, and only with a 200.
        return Response((admission.SAFEMODE.encode(),), 200, _TEXT)

    def error(self, error: BaseException) -> Response:
        if isinstance(error, FedcoreError):
            return _failure_page(error.http_status, str(error))
        self.log.failure("a device request failed", Failure(error))
        return _failure_page(500, INNER_ERROR)


def _failure_page(status: int, text: str) -> Response:
    body = json.dumps({"code": "1", "error_message": text}, separators=(",", ":"))
    return Response((body.encode(),), status, b"application/json", b"Client" if status == 500 else b"")
