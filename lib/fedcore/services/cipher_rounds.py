"""The device routes of the cipher rounds: one frame from body to answer, and what each round asks in it.

With PW_ENCRYPT devices exchange keys and shares before they train, and afterwards help to take off the sum what is left
of their masks; with STABLE_PW_ENCRYPT cloud workers exchange keys alone. A request passes the gate and is held as in
client_api.py; beyond that one that comes before what it asks for is held for a moment, because devices ask again only
after ten seconds.

What a round has gathered does not change any more once it is complete. It is read and packed once per iteration on each
server, and all clients are told the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from twisted.internet import defer, threads

from fedcore.config import EncryptType, Settings
from fedcore.core import admission, cipher
from fedcore.core.admission import Standing, Verdict
from fedcore.core.cipher import Outcome
from fedcore.core.iteration import EXCHANGE_ROUNDS, REPORTS_ROUND, UNMASK_ROUNDS, Phase
from fedcore.core.job import RunningState
from fedcore.errors import MalformedRequest, StoreError
from fedcore.identity import freshness, messages
from fedcore.ledger.layout import MAX_FL_ID
from fedcore.net.reactor import wake_in_turns
from fedcore.net.routes import Response, Route, Sink
from fedcore.observe.metrics import ServerMetrics
from fedcore.services.answers import Answer
from fedcore.services.client_api import (
    GET_LIMIT,
    INNER_ERROR,
    START_LIMIT,
    ClientApi,
    DevicePages,
    SmallRound,
    is_id,
)
from fedcore.services.device_identity import DeviceIdentity, Signed
from fedcore.store.cipher_state import CipherState, Members, Share, Told, unpack_shares
from fedcore.store.cluster_state import ClusterState, IterationMoved
from fedcore.wire import codec
from fedcore.wire.messages import (
    ClientListSign,
    ClientPublicKeys,
    ClientShare,
    GetClientList,
    GetExchangeKeys,
    GetShareSecrets,
    ReconstructSecret,
    RequestAllClientListSign,
    RequestExchangeKeys,
    RequestShareSecrets,
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

INLINE_BYTES = 1 << 16  # longer bodies are read in a thread, which takes about as long as reading this much
INLINE_PARTS = 100  # so many members or shares are packed at once; more of them in a thread
_PER_MEMBER = cipher.MOST_SHARE_BYTES + MAX_FL_ID + 64  # bytes of a body

Request = (
    RequestExchangeKeys
    | GetExchangeKeys
    | RequestShareSecrets
    | GetShareSecrets
    | GetClientList
    | SendClientListSign
    | RequestAllClientListSign
    | SendReconstructSecret
)
T = TypeVar("T")
Given = tuple[Told, Answer | None]  # what the shared state says, and what is handed out in consequence
Ask = Callable[
    [CipherState, Any, str], Awaitable[Given]
]  # of the shared state: for a request, and whose it is

_MESSAGES: dict[str, tuple[type[Request], Callable[..., object]]] = {
    "exchangeKeys": (RequestExchangeKeys, ResponseExchangeKeys),
    "getKeys": (GetExchangeKeys, ReturnExchangeKeys),
    "shareSecrets": (RequestShareSecrets, ResponseShareSecrets),
    "getSecrets": (GetShareSecrets, ReturnShareSecrets),
    "getClientList": (GetClientList, ReturnClientList),
    "pushListSign": (SendClientListSign, ResponseClientListSign),
    "getListSign": (RequestAllClientListSign, ReturnAllClientListSign),
    REPORTS_ROUND: (SendReconstructSecret, ReconstructSecret),
}
_WITHOUT_REASON = ("getKeys", "getSecrets")
_BEFORE = {"getKeys": "exchangeKeys", "getSecrets": "shareSecrets", "getListSign": "pushListSign"}
_TOLD = (Outcome.COUNTED, Outcome.REPEATED)


class Gathering:
    """What the rounds of one iteration have gathered, each thing read once, when it cannot change any more."""

    def __init__(self, place: tuple[str, int, str], reactor: Any) -> None:
        """Keep what belongs to one place: instance, iteration, run id of Redis."""
        self.place = place
        self._reactor = reactor
        self._found: dict[str, Any] = {}
        self._awaited: dict[str, list[defer.Deferred[None]]] = {}

    async def get(self, name: str, find: Callable[[], Awaitable[T]]) -> T:
        """Return a thing, or have it found; whoever asks meanwhile waits, and tries again if that fails."""
        while name not in self._found:
            if name not in self._awaited:
                return await self._find(name, find)
            waiter: defer.Deferred[None] = defer.Deferred()
            self._awaited[name].append(waiter)
            await waiter
        found: T = self._found[name]
        return found

    async def _find(self, name: str, find: Callable[[], Awaitable[T]]) -> T:
        self._awaited[name] = []
        try:
            found = self._found[name] = await find()
        finally:
            wake_in_turns(self._reactor, self._awaited.pop(name))
        return found


class CipherRounds:
    """Answers the cipher rounds.

    Attributes:
        for_workers: whether those who train are cloud workers rather than devices.
    """

    def __init__(
        self, settings: Settings, api: ClientApi, reactor: Any, identity: DeviceIdentity | None = None
    ) -> None:
        """Answer beside ``api``, which holds requests; ``identity`` judges signatures, if there are any."""
        self.for_workers = api.for_workers
        self._api = api
        self._driver = api.driver
        self._reactor = reactor
        self._identity = identity
        self._hold = settings.fedcore.device.hold_time
        self._gatherings: list[Gathering] = []
        self._follow_terms(settings)
        api.driver.on_terms.append(self._follow_terms)

    def _follow_terms(self, settings: Settings) -> None:
        protection = settings.encrypt.encrypt_type
        signed = self._identity is not None
        self._stable = protection is EncryptType.STABLE_PW_ENCRYPT
        self._served: tuple[str, ...] = ()
        if self._stable:
            self._served = EXCHANGE_ROUNDS[:2]
        elif protection is EncryptType.PW_ENCRYPT:
            signs = ("pushListSign", "getListSign")
            self._served = (
                *EXCHANGE_ROUNDS,
                *(name for name in UNMASK_ROUNDS if signed or name not in signs),
            )

    def serves(self, round_name: str) -> bool:
        """Tell whether a round exists under the terms in force."""
        return round_name in self._served

    def limit(self, round_name: str) -> int:
        """Return the longest body of a round."""
        if round_name == "exchangeKeys":
            return START_LIMIT  # with a certificate chain
        if round_name in ("shareSecrets", REPORTS_ROUND) and self.serves(round_name):
            return GET_LIMIT + _PER_MEMBER * self._completes("exchangeKeys")
        return GET_LIMIT

    def routes(self) -> dict[str, Callable[[memoryview], Awaitable[Answer | str]]]:
        """Return name -> function of all rounds, whether they are served or not."""
        asks: dict[str, Ask] = {
            "exchangeKeys": self._exchange_keys,
            "getKeys": self._get_keys,
            "shareSecrets": self._share_secrets,
            "getSecrets": self._get_secrets,
            "getClientList": self._get_client_list,
            "pushListSign": self._push_list_sign,
            "getListSign": self._get_list_sign,
            REPORTS_ROUND: self._reconstruct_secrets,
        }
        return {name: partial(self._round, name, ask) for name, ask in asks.items()}

    async def _round(self, name: str, ask: Ask, body: memoryview) -> Answer | str:
        """Answer a body: all rounds differ in what is asked of the shared state."""
        request = await self._read(_MESSAGES[name][0], body)
        if request is None:
            return self._answer(name, cipher.malformed(name), self._api.next_req_time())
        return await self._serve(name, request, body, ask)

    # ---- what each round asks

    async def _exchange_keys(self, state: CipherState, request: RequestExchangeKeys, fl_id: str) -> Given:
        """List a client's public keys."""
        kept = self._kept(request)
        fit = cipher.are_keys(
            kept.c_pk, kept.s_pk, kept.ind_iv, kept.pw_iv, kept.pw_salt, stable=self._stable
        )
        good = fit and await self._shows_its_chain(request)
        return await state.exchange_keys(kept, completes=self._completes("exchangeKeys"), fit=good), None

    async def _get_keys(self, state: CipherState, request: GetExchangeKeys, fl_id: str) -> Given:
        """Hand out everybody's public keys."""
        number = request.iteration
        listed, completes = self._completes("exchangeKeys"), self._completes("getKeys")
        told = await state.get_keys(number, fl_id, listed=listed, completes=completes)
        return told, await self._all_keys(state, number) if told.outcome in _TOLD else None

    async def _share_secrets(self, state: CipherState, request: RequestShareSecrets, fl_id: str) -> Given:
        """Take a client's shares, one for each other member."""
        number = request.iteration
        members = await self._members(state, number)
        shares = None if members is None else _addressed(members, fl_id, request.encrypted_shares or ())
        completes = self._completes("shareSecrets")
        return await state.share_secrets(number, fl_id, shares, completes=completes), None

    async def _get_secrets(self, state: CipherState, request: GetShareSecrets, fl_id: str) -> Given:
        """Hand out the shares that are for a client."""
        number = request.iteration
        shared, completes = self._completes("shareSecrets"), self._completes("getSecrets")
        told = await state.get_secrets(number, fl_id, shared=shared, completes=completes)
        return told, await self._shares_for(state, number, fl_id) if told.outcome in _TOLD else None

    async def _get_client_list(self, state: CipherState, request: GetClientList, fl_id: str) -> Given:
        """Tell whose updates count."""
        number = request.iteration
        told, clients = await state.client_list(number, fl_id, completes=self._completes("getClientList"))
        return told, await self._list(state, number, clients) if told.outcome in _TOLD else None

    async def _push_list_sign(self, state: CipherState, request: SendClientListSign, fl_id: str) -> Given:
        """Keep a client's signature under that list."""
        completes = self._completes("pushListSign")
        return await state.push_list_sign(
            request.iteration, fl_id, request.signature, completes=completes
        ), None

    async def _get_list_sign(
        self, state: CipherState, request: RequestAllClientListSign, fl_id: str
    ) -> Given:
        """Hand out the signatures under that list."""
        number = request.iteration
        signed, completes = self._completes("pushListSign"), self._completes("getListSign")
        told = await state.get_list_sign(number, fl_id, signed=signed, completes=completes)
        verdict = cipher.judge("getListSign", told.outcome, fl_id, uploader=told.uploader)
        return told, await self._signs(state, number, verdict) if verdict.code == 200 else None

    async def _reconstruct_secrets(
        self, state: CipherState, request: SendReconstructSecret, fl_id: str
    ) -> Given:
        """Take a client's report."""
        number = request.iteration
        members = await self._members(state, number)
        shares: list[Share] | None = None
        if members is not None:
            sharers = await self._sharers(state, number, members)
            shares = _reported(members, sharers, fl_id, request.reconstruct_secret_shares or ())
        completes = self._completes(REPORTS_ROUND)
        return await state.report_secrets(number, fl_id, shares, completes=completes), None

    # ---- steps

    async def _serve(self, round_name: str, request: Request, body: memoryview, ask: Ask) -> Answer | str:
        """Answer a request, holding it while the shared state is away or what it asks for is not gathered."""
        api, driver, fl_id = self._api, self._driver, request.fl_id or ""
        signed = self._signed(round_name, request, body)
        until = self._reactor.seconds() + self._hold
        while True:
            text = await api.pass_gate(round_name, until)
            cluster, seen = driver.cluster, driver.where
            if text is not None and (cluster is None or not self._may_be_late(round_name)):
                return text
            assert cluster is not None
            told, given = Told(Outcome.OTHER, 0), None
            refusal: Verdict | None = None
            try:
                refusal = admission.judge_signature(await self._standing(cluster, signed))
                if refusal is None:
                    told, given = await ask(CipherState(cluster), request, fl_id)
            except StoreError as error:
                if await api.settled(error, seen, until):
                    continue
            if text is not None and told.outcome is Outcome.OTHER:
                return text
            early = refusal is None and told.outcome is Outcome.EARLY
            if early and await self._gathered(round_name, request.iteration, until):
                continue
            if refusal is None and given is not None:
                return given
            enough = told.counted >= self._completes(round_name)
            verdict = refusal or cipher.judge(
                round_name, told.outcome, fl_id, uploader=told.uploader, enough=enough
            )
            next_req_time = (
                await api.return_of(fl_id)
                if refusal is None and verdict.code == 300 and told.outcome is Outcome.FULL
                else api.next_req_time()
            )
            return self._answer(round_name, verdict, next_req_time)

    def _may_be_late(self, round_name: str) -> bool:
        """Tell whether a finished job may still owe an answer: to those who took part in its last iteration."""
        finished = self._driver.iteration.running is RunningState.FINISH
        return finished and not self._api.stopping and round_name in UNMASK_ROUNDS

    async def _gathered(self, round_name: str, number: int, until: float) -> bool:
        """Hold a request that came too early; tell whether to ask again."""
        left = self._api.left(until)
        if not left or number != self._driver.iteration.number:
            return False
        return await self._driver.held_until(lambda: self._is_due(round_name, number), left)

    def _is_due(self, round_name: str, number: int) -> bool:
        """Tell whether what a round hands out may be there by now."""
        now = self._driver.iteration
        if now.number != number:
            return True
        if round_name == "getClientList":
            return now.phase in (Phase.UNMASKING, Phase.CANDIDATE)
        before = now.round_named(_BEFORE[round_name])
        return before is not None and before.count >= self._completes(_BEFORE[round_name])

    async def _read(self, message: type[Request], body: memoryview) -> Request | None:
        """Read a request, None if it is none or does not say whose it is."""
        request: Request
        try:
            if len(body) <= INLINE_BYTES:
                request = codec.decode(message, body)
            else:
                request = await self._in_thread(lambda: codec.decode(message, body))
        except MalformedRequest:
            return None
        return request if request.fl_id and is_id(request.fl_id) else None

    def _kept(self, request: RequestExchangeKeys) -> RequestExchangeKeys:
        """Return what is kept of a client's keys: nothing that no other client is to see."""
        if self._stable:
            request = replace(request, c_pk=None, ind_iv=None)
        if self._identity is None:
            request = replace(request, timestamp=None, signature=None, certificate_chain=None)
        return request

    def _signed(self, round_name: str, request: Request, body: memoryview) -> Signed | None:
        if self._identity is None:
            return None
        signature = request.req_signature if isinstance(request, SendClientListSign) else request.signature
        number, stamp = request.iteration, request.timestamp
        if isinstance(request, RequestExchangeKeys):
            text = messages.of_keys(request.c_pk or b"", request.s_pk or b"", stamp or "", number)
        else:
            text = messages.of_round(stamp or "", number)
        return Signed(round_name, request.fl_id, number, stamp, signature, text, freshness.digest_of(body))

    async def _shows_its_chain(self, request: RequestExchangeKeys) -> bool:
        """Tell whether keys come with the certificates by which others know whose they are, where devices sign."""
        cluster, fl_id = self._driver.cluster, request.fl_id or ""
        if self._identity is None or cluster is None:
            return self._identity is None
        return await self._identity.owns(cluster, request.iteration, fl_id, request.certificate_chain)

    async def _standing(self, cluster: ClusterState, signed: Signed | None) -> Standing:
        if self._identity is None or signed is None:
            return Standing.PASSED
        return await self._identity.standing(cluster, signed)

    def _completes(self, round_name: str) -> int:
        return self._driver.policy.completes(round_name)

    # ---- what was gathered

    def _gathering(self, state: CipherState, number: int) -> Gathering:
        """Return what is kept of an iteration; the last two are, for those who come late."""
        place = state.place(number)
        for known in self._gatherings:
            if known.place == place:
                return known
        found = Gathering(place, self._reactor)
        self._gatherings = [found, *self._gatherings[:1]]
        return found

    async def _members(self, state: CipherState, number: int) -> Members | None:
        """Return the members of an iteration, None while there may be others."""
        whole = self._completes("exchangeKeys")

        async def find() -> Members:
            entries = await state.members(number)
            if len(entries) < whole:
                raise _Incomplete(number)
            return await self._packed(len(entries), lambda: Members(entries))

        try:
            return await self._gathering(state, number).get("members", find)
        except _Incomplete:
            return None

    async def _known_members(self, state: CipherState, number: int) -> Members:
        members = await self._members(state, number)
        if members is None:  # they were complete a moment ago
            raise IterationMoved(number)
        return members

    async def _sharers(self, state: CipherState, number: int, members: Members) -> frozenset[str]:
        async def find() -> frozenset[str]:
            sharers = await state.sharers(number)
            if len(sharers) < self._completes("shareSecrets"):
                raise IterationMoved(number)
            return frozenset(members.of_clients(sharers))

        return await self._gathering(state, number).get("sharers", find)

    async def _all_keys(self, state: CipherState, number: int) -> Answer:
        members = await self._known_members(state, number)
        moment = str(self._api.next_req_time())

        def build() -> Answer:
            keys = tuple(map(_public, members.entries))
            return _answer(ReturnExchangeKeys(200, number, keys, moment))

        return await self._gathering(state, number).get("keys", lambda: self._packed(len(members), build))

    async def _shares_for(self, state: CipherState, number: int, fl_id: str) -> Answer:
        members = await self._known_members(state, number)
        packed = await state.shares_for(number, fl_id)
        moment = str(self._api.next_req_time())

        def build() -> tuple[int, Answer]:
            shares = sorted(unpack_shares(packed))
            items = tuple(
                ClientShare(members.ids[share.member], share.share, share.number) for share in shares
            )
            return len(items), _answer(ReturnShareSecrets(200, number, items, moment))

        count, answer = await self._packed(len(members), build)
        if count != self._completes("shareSecrets") - 1:  # each sharer but itself has shared with it
            raise IterationMoved(number)
        return answer

    async def _list(self, state: CipherState, number: int, clients: Sequence[str]) -> Answer:
        members = await self._known_members(state, number)

        async def find() -> Answer:
            ids = members.of_clients(clients)
            if len(ids) != len(clients):
                raise IterationMoved(number)
            moment = str(self._api.next_req_time())
            return _answer(ReturnClientList(200, cipher.LIST_OK, tuple(ids), number, moment))

        return await self._gathering(state, number).get("list", find)

    async def _signs(self, state: CipherState, number: int, verdict: Verdict) -> Answer:
        members = await self._known_members(state, number)
        moment = str(self._api.next_req_time())

        async def find() -> Answer:
            signatures = await state.signatures(number)
            signed = {members.clients[client]: signature for client, signature in signatures.items()}
            items = tuple(ClientListSign(fl_id, signed[fl_id]) for fl_id in sorted(signed, key=str.encode))
            return _answer(ReturnAllClientListSign(200, verdict.reason, items or None, number, moment))

        return await self._gathering(state, number).get(f"signs: {verdict.reason}", find)

    # ---- answers

    async def _packed(self, parts: int, work: Callable[[], T]) -> T:
        """Do work on so many parts: at once, or in a thread if they are many."""
        return work() if parts <= INLINE_PARTS else await self._in_thread(work)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        done = threads.deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work)
        result: T = await done
        return result

    def failed(self, round_name: str) -> Answer:
        """Answer a request that a bug has stopped."""
        return self._answer(round_name, Verdict(500, INNER_ERROR), self._api.next_req_time())

    def _answer(self, round_name: str, verdict: Verdict, next_req_time: int) -> Answer:
        fields: dict[str, object] = {
            "retcode": verdict.code,
            "iteration": self._driver.iteration.number,
            "next_req_time": str(next_req_time),
        }
        if round_name not in _WITHOUT_REASON:
            fields["reason"] = verdict.reason
        if round_name == "getClientList":
            fields["clients"] = ()
        return _answer(_MESSAGES[round_name][1](**fields))


class _Incomplete(IterationMoved):
    """The list of members is still open."""


def _answer(reply: Any) -> Answer:
    return Answer(reply.retcode, Response(codec.encode_parts(reply)))


def _public(entry: RequestExchangeKeys) -> ClientPublicKeys:
    """Return what others are to see of a member's keys; never its own initial counter."""
    return ClientPublicKeys(
        fl_id=entry.fl_id,
        c_pk=entry.c_pk,
        s_pk=entry.s_pk,
        pw_iv=entry.pw_iv,
        pw_salt=entry.pw_salt,
        timestamp=entry.timestamp,
        iteration=entry.iteration if entry.signature is not None else 0,
        signature=entry.signature,
        certificate_chain=entry.certificate_chain,
    )


def _addressed(members: Members, fl_id: str, sent: Sequence[ClientShare]) -> Mapping[str, Share] | None:
    """Return recipient -> share of what a member has sent, None if that may not be stored."""
    recipients = [item.fl_id or "" for item in sent]
    if fl_id not in members.places or not cipher.is_for_all(members.ids, fl_id, recipients):
        return None
    if not all(item.share and len(item.share) <= cipher.MOST_SHARE_BYTES for item in sent):
        return None
    source = members.places[fl_id]
    return {item.fl_id or "": Share(source, item.index, item.share or b"") for item in sent}


def _reported(
    members: Members, sharers: frozenset[str], fl_id: str, sent: Sequence[ClientShare]
) -> list[Share] | None:
    """Return the shares of a report, None if it may not be stored."""
    owners = [item.fl_id or "" for item in sent]
    if not cipher.is_report(sharers, fl_id, owners):
        return None
    for item in sent:
        short = item.share is not None and len(item.share) <= cipher.MOST_PLAIN_SHARE_BYTES
        if not short or not 1 <= item.index <= len(members):
            return None
    return [Share(members.places[item.fl_id or ""], item.index, item.share or b"") for item in sent]


# ---- the listener's view


@dataclass(slots=True)
class CipherRound:
    """The route of a cipher round; without one under the terms in force its path leads nowhere."""

    name: str
    small: SmallRound
    rounds: CipherRounds
    pages: DevicePages

    def limit(self) -> int:
        return self.rounds.limit(self.name)

    def sink(self, length: int) -> Sink:
        return self.small.sink(length)

    def discard(self, sink: Sink) -> None:
        self.small.discard(sink)

    async def handle(self, sink: Sink) -> Response:
        if not self.rounds.serves(self.name):
            return self.pages.not_found()
        return await self.small.handle(sink)


def cipher_routes(
    rounds: CipherRounds,
    prefix: str,
    metrics: ServerMetrics,
    clock: Callable[[], float],
) -> dict[bytes, Route]:
    """Return path -> route of the cipher rounds, as ``device_routes`` does for the others."""
    pages = DevicePages()
    routes: dict[bytes, Route] = {}
    for name, answer in rounds.routes().items():

        def failed(name: str = name) -> Answer:
            return rounds.failed(name)

        route = CipherRound(name, SmallRound(name, answer, failed, GET_LIMIT, metrics, clock), rounds, pages)
        for start in {prefix or "/", *(("/",) if rounds.for_workers else ())}:
            routes[(start + name).encode()] = route
    return routes
