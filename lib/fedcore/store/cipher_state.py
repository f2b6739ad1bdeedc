"""The cipher rounds in the shared state: one method per round, each one script, and what the finaliser reads.

A round's hash says who took part in it, and with what. Keys are listed and shares and signatures stored up to the
threshold of their round and never beyond; whoever asks for what is gathered gets the same again as often as it asks.
A script does nothing unless its Redis is the one that has had all of the iteration (``run`` of the status): a list or a
share from a half of the state would spoil the sum, or have clients tell too much.

Shares lie by recipient, in records that name their source by its place among the members (in bytewise order of their
ids). Clients' ids stand only in the members' entries.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedcore.core.cipher import Outcome
from fedcore.core.client_key import client_key
from fedcore.core.iteration import REPORTS_ROUND
from fedcore.store import keys
from fedcore.store.cluster_state import ClusterState, IterationMoved, StateMissing
from fedcore.store.redis import Argument
from fedcore.wire import codec
from fedcore.wire.messages import RequestExchangeKeys

EXCHANGE_KEYS, GET_KEYS, SHARE_SECRETS, GET_SECRETS = "exchangeKeys", "getKeys", "shareSecrets", "getSecrets"
CLIENT_LIST, PUSH_SIGN, GET_SIGN = "getClientList", "pushListSign", "getListSign"
_KEPT_A_WHILE = (GET_KEYS, SHARE_SECRETS, GET_SECRETS, CLIENT_LIST, PUSH_SIGN, GET_SIGN)
_MARK = 16  # bytes
_RECORD = struct.Struct("<IiI")  # place of a member, index, length of the share that follows


class Told(NamedTuple):
    """What the shared state says of a request.

    Attributes:
        outcome: the script's word.
        counted: requests of the round that are counted, where this one is one of them.
        uploader: whether the client's update is counted, where the round asks.
    """

    outcome: Outcome
    counted: int
    uploader: bool = False


class Share(NamedTuple):
    """A share on its way.

    Attributes:
        member: place, among the members, of whose secret it is.
        number: the index, as its sender gives it.
        share: sealed, or in plain in a report.
    """

    member: int
    number: int
    share: bytes


def pack_shares(shares: Iterable[Share]) -> bytes:
    """Return shares as the shared state holds them."""
    return b"".join(_RECORD.pack(member, index, len(share)) + share for member, index, share in shares)


def unpack_shares(packed: bytes) -> list[Share]:
    """Read what ``pack_shares`` gave, or several of it one behind the other."""
    shares, at = [], 0
    while at < len(packed):
        member, index, length = _RECORD.unpack_from(packed, at)
        at += _RECORD.size
        shares.append(Share(member, index, packed[at : at + length]))
        at += length
    return shares


def _mark_of(request: RequestExchangeKeys) -> bytes:
    """Return what tells keys from others; a repeat may bear a later time stamp."""
    parts = request.c_pk, request.s_pk, request.ind_iv, request.pw_iv, request.pw_salt
    return hashlib.sha256(b"".join(b"%d:" % len(part or b"") + (part or b"") for part in parts)).digest()[
        :_MARK
    ]


class Members:
    """The members of an iteration, in bytewise order of their ids.

    Attributes:
        entries: the keys of each, as it sent them.
        ids: of each.
        places: id -> place.
        clients: client key -> id.
    """

    def __init__(self, packed: Iterable[bytes]) -> None:
        """Read the entries of the list; takes some 10 ms for a thousand."""
        entries = [codec.decode(RequestExchangeKeys, bytes(entry[_MARK:])) for entry in packed]
        entries.sort(key=lambda entry: (entry.fl_id or "").encode())
        self.entries: tuple[RequestExchangeKeys, ...] = tuple(entries)
        self.ids: tuple[str, ...] = tuple(entry.fl_id or "" for entry in entries)
        self.places: Mapping[str, int] = {fl_id: place for place, fl_id in enumerate(self.ids)}
        self.clients: Mapping[str, str] = {client_key(fl_id): fl_id for fl_id in self.ids}

    def __len__(self) -> int:
        return len(self.ids)

    def of_clients(self, clients: Collection[str]) -> list[str]:
        """Return the ids of clients that are named by their keys, in bytewise order; others are left out."""
        found = [self.clients[client] for client in clients if client in self.clients]
        return sorted(found, key=str.encode)


class Exchanged:
    """What devices have exchanged in an iteration, and reported at its end.

    Attributes:
        members: id -> its public keys, in bytewise order.
        sharers: ids of those whose shares the others have.
        reports: id of who reports -> id of the owner of a secret -> (share of it in plain, index).
    """

    def __init__(self, material: Material) -> None:
        self._members = members = Members(material.entries)
        self.members: dict[str, RequestExchangeKeys] = dict(zip(members.ids, members.entries, strict=True))
        self.sharers: frozenset[str] = frozenset(members.of_clients(material.sharers))
        self.reports: dict[str, dict[str, tuple[bytes, int]]] = {
            members.clients[client]: {
                members.ids[share.member]: (share.share, share.number) for share in unpack_shares(report)
            }
            for client, report in material.reports.items()
            if client in members.clients
        }

    def of_clients(self, clients: Collection[str]) -> list[str]:
        """Return the ids of clients that are named by their keys, in bytewise order; others are left out."""
        return self._members.of_clients(clients)


@dataclass(frozen=True, slots=True)
class Material:
    """What the finaliser needs of the shared state to take the masks off; bytes yet, ``read`` takes its time.

    Attributes:
        entries: of the members.
        sharers: client keys of those whose shares the others have.
        reports: client key -> report.
    """

    entries: Sequence[bytes]
    sharers: Collection[str]
    reports: Mapping[str, bytes]

    def read(self) -> Exchanged:
        """Read it all; for a thread."""
        return Exchanged(self)


class CipherState:
    """The cipher rounds of one instance of a job.

    Every method that asks for a client raises IterationMoved if the job is disabled or this Redis may not have had all
    of the iteration, and StateMissing if Redis holds no state.
    """

    def __init__(self, cluster: ClusterState) -> None:
        """Use the connection and the keys of the shared state."""
        self._redis = cluster.redis
        self._keys = cluster.keys
        self._ttl = cluster.iteration_ttl
        self._channel = keys.changes(cluster.keys.fl_name)

    def place(self, number: int) -> tuple[str, int, str]:
        """Return what the lists of an iteration belong to: instance, iteration, run id of Redis."""
        return self._keys.instance, number, self._redis.run_id

    # ---- rounds before the updates

    async def exchange_keys(self, request: RequestExchangeKeys, *, completes: int, fit: bool) -> Told:
        """Put a client's keys on the list.

        Args:
            request: the keys; ``certificate_chain`` and ``signature`` are kept where they are there.
            completes: how many clients complete the round.
            fit: False only asks what the answer would be.
        """
        entry = codec.encode(request)
        mark = _mark_of(request) if fit else b""
        return await self._ask(
            "exchange_keys",
            EXCHANGE_KEYS,
            request.iteration,
            request.fl_id,
            completes,
            [self._keys.clients(request.iteration)],
            [int(fit), mark, entry if fit else b""],
        )

    async def get_keys(self, number: int, fl_id: str, *, listed: int, completes: int) -> Told:
        """Ask whether a client may have the list of keys; ``listed`` keys make it whole."""
        return await self._fetch(GET_KEYS, EXCHANGE_KEYS, number, fl_id, listed, completes)

    async def share_secrets(
        self, number: int, fl_id: str, shares: Mapping[str, Share] | None, *, completes: int
    ) -> Told:
        """Store a member's shares for all others.

        Args:
            number: the iteration.
            fl_id: the member.
            shares: recipient's id -> its share, for every other member; None only asks what the answer would be.
            completes: how many clients complete the round.
        """
        stored = shares or {}
        names = [self._keys.shares(number, client_key(recipient)) for recipient in stored]
        return await self._ask(
            "share_secrets",
            SHARE_SECRETS,
            number,
            fl_id,
            completes,
            [self._keys.cipher_round(number, GET_KEYS), *names],
            [int(shares is not None), *(pack_shares([share]) for share in stored.values())],
        )

    async def get_secrets(self, number: int, fl_id: str, *, shared: int, completes: int) -> Told:
        """Ask whether a client may have the shares for it; ``shared`` sharers make them whole."""
        return await self._fetch(GET_SECRETS, SHARE_SECRETS, number, fl_id, shared, completes)

    # ---- rounds after them

    async def client_list(self, number: int, fl_id: str, *, completes: int) -> tuple[Told, list[str]]:
        """Ask for the list of those whose updates count, as client keys."""
        answer = await self._run(
            "client_list",
            CLIENT_LIST,
            number,
            fl_id,
            completes,
            [self._keys.uploads(number), self._keys.clients(number)],
            [],
        )
        return _told(*answer[:2]), [bytes(client).decode() for client in answer[2:]]

    async def push_list_sign(
        self, number: int, fl_id: str, signature: bytes | None, *, completes: int
    ) -> Told:
        """Keep a client's signature under that list; None only asks what the answer would be."""
        return await self._ask(
            "sign_list",
            PUSH_SIGN,
            number,
            fl_id,
            completes,
            [self._keys.cipher_round(number, CLIENT_LIST), self._keys.uploads(number)],
            [int(signature is not None), signature or b""],
        )

    async def get_list_sign(self, number: int, fl_id: str, *, signed: int, completes: int) -> Told:
        """Ask whether a client may have the signatures; ``signed`` signatures make them whole."""
        return await self._fetch(GET_SIGN, PUSH_SIGN, number, fl_id, signed, completes, late=True)

    async def report_secrets(
        self, number: int, fl_id: str, shares: Collection[Share] | None, *, completes: int
    ) -> Told:
        """Keep a client's report; None only asks what the answer would be."""
        return await self._ask(
            "report_secrets",
            REPORTS_ROUND,
            number,
            fl_id,
            completes,
            [self._keys.cipher_round(number, CLIENT_LIST), self._keys.uploads(number)],
            [int(shares is not None), pack_shares(shares or ())],
        )

    # ---- what was gathered

    async def members(self, number: int) -> Sequence[bytes]:
        """Return the entries of the members of an iteration, see Members."""
        entries: Sequence[bytes] = await self._redis.command(
            "HVALS", self._keys.cipher_round(number, EXCHANGE_KEYS)
        )
        return entries

    async def sharers(self, number: int) -> frozenset[str]:
        """Return the client keys of those whose shares are stored."""
        clients = await self._redis.command("HKEYS", self._keys.cipher_round(number, SHARE_SECRETS))
        return frozenset(client.decode() for client in clients)

    async def left_out(self, number: int, fl_id: str, closes: Mapping[str, int]) -> bool:
        """Tell whether a round whose members stay what they are was closed without a client.

        Args:
            number: the iteration.
            fl_id: the client.
            closes: exchangeKeys, shareSecrets -> how many clients close it; 0 if there is no such round.
        """
        for round_name in (EXCHANGE_KEYS, SHARE_SECRETS):
            name, enough = self._keys.cipher_round(number, round_name), closes[round_name]
            if not enough or int(await self._redis.command("HLEN", name)) < enough:
                return False
            if not await self._redis.command("HEXISTS", name, client_key(fl_id)):  # nobody joins any more
                return True
        return False

    async def shares_for(self, number: int, fl_id: str) -> bytes:
        """Return the shares that are for a client, see ``unpack_shares``."""
        packed = await self._redis.command("GET", self._keys.shares(number, client_key(fl_id)))
        return b"" if packed is None else bytes(packed)

    async def signatures(self, number: int) -> dict[str, bytes]:
        """Return the signatures under the list: client key -> signature."""
        return await self._hash(number, PUSH_SIGN)

    async def material(self, number: int) -> Material:
        """Return what there is to take the masks off with."""
        entries, sharers = await self.members(number), await self.sharers(number)
        return Material(entries, sharers, await self._hash(number, REPORTS_ROUND))

    async def release(self, number: int) -> bool:
        """Forget the secrets of an iteration that has ended, and soon all else of it; False if it goes on."""
        start, _, end = self._keys.shares(number, "\0").partition("\0")
        others = [self._keys.cipher_round(number, name) for name in _KEPT_A_WHILE]
        names = [
            self._keys.status,
            self._keys.cipher_round(number, EXCHANGE_KEYS),
            self._keys.cipher_round(number, REPORTS_ROUND),
            *others,
            self._keys.rounds(number),
            self._keys.masked(number),
        ]
        arguments: list[Argument] = [number, keys.RELEASE_TTL_S, start, end]
        return bool(await self._redis.script("release_cipher", names, arguments))

    # ---- asking

    async def _hash(self, number: int, round_name: str) -> dict[str, bytes]:
        found = await self._redis.command("HGETALL", self._keys.cipher_round(number, round_name))
        return {client.decode(): bytes(value) for client, value in zip(found[::2], found[1::2], strict=True)}

    async def _fetch(
        self,
        round_name: str,
        before: str,
        number: int,
        fl_id: str,
        needed: int,
        completes: int,
        *,
        late: bool = False,
    ) -> Told:
        names = [self._keys.cipher_round(number, before), self._keys.uploads(number)]
        return await self._ask(
            "fetch_round", round_name, number, fl_id, completes, names, [needed, round_name, int(late)]
        )

    async def _ask(
        self,
        script: str,
        round_name: str,
        number: int,
        fl_id: str | None,
        completes: int,
        names: Sequence[str],
        arguments: Sequence[Argument],
    ) -> Told:
        word, count, *rest = await self._run(script, round_name, number, fl_id, completes, names, arguments)
        return _told(word, count, *rest)

    async def _run(
        self,
        script: str,
        round_name: str,
        number: int,
        fl_id: str | None,
        completes: int,
        names: Sequence[str],
        arguments: Sequence[Argument],
    ) -> Sequence[bytes | int]:
        common = [
            self._keys.status,
            keys.instance_name(self._keys.fl_name),
            self._keys.rounds(number),
            self._keys.cipher_round(number, round_name),
        ]
        asked: list[Argument] = [
            self._keys.instance,
            number,
            self._redis.run_id,
            self._channel,
            client_key(fl_id or ""),
            self._ttl,
            completes,
        ]
        answer: Sequence[bytes | int] = await self._redis.script(
            script, [*common, *names], [*asked, *arguments]
        )
        return answer


def _told(word: bytes | int, count: bytes | int, uploader: bytes | int = 0) -> Told:
    """Read a script's answer.

    Raises:
        IterationMoved: the job is disabled, or this Redis may have lost a part of the iteration.
        StateMissing: there is no state.
    """
    if word == b"missing":
        raise StateMissing("Redis holds no status of this instance")
    if word == b"closed":
        raise IterationMoved(int(count))
    assert isinstance(word, bytes)
    return Told(Outcome(word.decode()), int(count), bool(int(uploader)))
