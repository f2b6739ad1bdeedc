"""What secure aggregation costs: the real functions of both sides, step by step, in CPU time of one thread.

No sockets but one to a private Redis. One client's part is measured, and all of the server's: recovering the secrets,
the streams of lost clients' pairs, the noise. What is recovered is compared with the truth, and in small groups the
noise with the masks of all.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fedcore.secagg import keys, masks, shamir, shares, unmask
from fedcore.secagg.keys import KeyPair
from fedcore.secagg.masks import Member, Stream
from fedcore.secagg.shares import PlainShares
from fedcore.wire import codec
from fedcore.wire import messages as wire
from fedctl.processes import redis_server

STEPS = ("agreement", "pbkdf2", "stream", "shamir", "records")
CHECKED_CLIENTS = 20  # masks of all clients are made up to so many: their number grows with the square
CHECKED_FLOATS = 1000
_BLOCK = 1 << 17  # bytes
_FL_ID_BYTES = 32  # of an id as devices make them
_STAMP = "1700000000000"
_SEALED_ROW, _PLAIN_ROW = 12, 12  # bytes in front of a share in Redis
_MARK = 16


class Wrong(Exception):
    """What was computed is not what it should be: do not trust the times."""


@dataclass
class Watch:
    """CPU seconds of this thread, by step."""

    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))

    @contextmanager
    def on(self, step: str) -> Iterator[None]:
        """Count what is done inside as a step."""
        began = time.thread_time()
        yield
        self.spent[step] += time.thread_time() - began


def threshold(n: int) -> int:
    """Return how many shares give a secret here: more than half of the clients, so that no two halves can."""
    return n // 2 + 1


def remaining(n: int, dropout: int) -> list[int]:
    """Return who of n clients remains if so many percent drop out, spread over all."""
    lost = {round((place + 0.5) * 100 / dropout) for place in range(n * dropout // 100)} if dropout else set()
    return [place for place in range(n) if place not in lost]


@dataclass(frozen=True)
class Group:
    """Clients of one iteration and what they hold of each other's secrets.

    Attributes:
        t: shares that give a secret.
        pairs: id -> s key.
        c_pairs: id -> c key.
        b: id -> key of its own stream.
        members: id -> what it has published.
    """

    t: int
    pairs: Mapping[str, KeyPair]
    c_pairs: Mapping[str, KeyPair]
    b: Mapping[str, bytes]
    members: Mapping[str, Member]

    @classmethod
    def of(cls, n: int) -> Group:
        """Make n clients; a bit more than half of them can tell a secret."""
        ids = [f"{number:0{_FL_ID_BYTES}d}" for number in range(n)]
        pairs = {fl_id: keys.new_pair(os.urandom) for fl_id in ids}
        members = {
            fl_id: Member(pairs[fl_id].public, os.urandom(16), os.urandom(32), os.urandom(16))
            for fl_id in ids
        }
        c_pairs = {fl_id: keys.new_pair(os.urandom) for fl_id in ids}
        return cls(threshold(n), pairs, c_pairs, {fl_id: os.urandom(32) for fl_id in ids}, members)

    @property
    def ids(self) -> list[str]:
        """All clients, in the order of their ids."""
        return list(self.members)

    def uploaders(self, dropout: int) -> list[str]:
        """Return who uploads if so many percent do not."""
        ids = self.ids
        return [ids[place] for place in remaining(len(ids), dropout)]

    def truth(self, uploaders: Sequence[str]) -> dict[str, bytes]:
        """Return the secrets that are to be recovered."""
        there = set(uploaders)
        return {fl_id: self.b[fl_id] if fl_id in there else self.pairs[fl_id].private for fl_id in self.ids}

    def reports(self, uploaders: Sequence[str]) -> dict[str, dict[str, tuple[bytes, int]]]:
        """Return the reports of t + 1 clients."""
        reports: dict[str, dict[str, tuple[bytes, int]]] = {who: {} for who in uploaders[: self.t + 1]}
        for owner, secret in self.truth(uploaders).items():
            others = [fl_id for fl_id in self.ids if fl_id != owner]
            dealt = shamir.split(int.from_bytes(secret, "big"), self.t, len(others), secrets.randbelow)
            for other, (index, share) in zip(others, dealt, strict=True):
                if other in reports:
                    reports[other][owner] = shares.to_bytes(share), index
        return reports


# ---- a client's part


def client(group: Group, size: int) -> dict[str, float]:
    """Return CPU seconds by step of one client: keys, shares for all others and from them, its mask."""
    own = group.ids[len(group.ids) // 2]
    others = [fl_id for fl_id in group.ids if fl_id != own]
    watch = Watch()
    with watch.on("agreement"):
        keys.new_pair(os.urandom), keys.new_pair(os.urandom)
        agreed = [keys.agree(group.c_pairs[own].private, group.c_pairs[other].public) for other in others]
        seeds = [keys.agree(group.pairs[own].private, group.members[other].s_pk) for other in others]
    with watch.on("pbkdf2"):
        sealing = [keys.derive(secret) for secret in agreed]
        streams = [
            Stream(
                keys.derive(seed, group.members[min(own, other)].pw_salt),
                group.members[min(own, other)].pw_iv,
                masks.pair_sign(own, other),
            )
            for seed, other in zip(seeds, others, strict=True)
        ]
    with watch.on("shamir"):
        dealt = [
            shamir.split(int.from_bytes(secret, "big"), group.t, len(others), secrets.randbelow)
            for secret in (group.pairs[own].private, group.b[own])
        ]
    with watch.on("records"):
        for key, (index, s_share), (_, b_share) in zip(sealing, *dealt, strict=True):
            record = shares.pack(PlainShares(s_share, b_share, index, index))
            shares.unpack(shares.unseal(key, shares.seal(key, record, os.urandom(16))))  # as many come as go
    with watch.on("stream"):
        mask = np.zeros(size, np.float32)
        for stream in (*streams, Stream(group.b[own], group.members[own].ind_iv, 1)):
            masks.add_stream(mask, *stream)
    return watch.spent


# ---- the server's part


@dataclass(frozen=True)
class Server:
    """What does not depend on the size of the model.

    Attributes:
        spent: CPU seconds by step.
        streams: whose sum takes the masks off.
    """

    spent: Mapping[str, float]
    streams: Sequence[Stream]


def server(group: Group, dropout: int) -> Server:
    """Recover all secrets and derive all streams.

    Raises:
        Wrong: a secret is not what it was.
    """
    uploaders = group.uploaders(dropout)
    reports = group.reports(uploaders)
    watch = Watch()
    with watch.on("shamir"):
        found = unmask.recover(reports, group.members, group.ids, uploaders, group.t)
    if found.secrets != group.truth(uploaders):
        raise Wrong("secrets were not recovered")
    there = set(uploaders)
    torn = [(lost, other) for lost in group.ids if lost not in there for other in uploaders]
    with watch.on("agreement"):
        seeds = [keys.agree(found.secrets[lost], group.members[other].s_pk) for lost, other in torn]
    streams = [Stream(found.secrets[fl_id], group.members[fl_id].ind_iv, -1) for fl_id in uploaders]
    with watch.on("pbkdf2"):
        for seed, (lost, other) in zip(seeds, torn, strict=True):
            smaller = group.members[min(lost, other)]
            streams.append(
                Stream(keys.derive(seed, smaller.pw_salt), smaller.pw_iv, masks.pair_sign(lost, other))
            )
    if len(group.ids) <= CHECKED_CLIENTS:
        _check(group, uploaders, streams)
    return Server(watch.spent, streams)


def noise(streams: Sequence[Stream], size: int) -> float:
    """Return CPU seconds of adding all streams."""
    into = np.zeros(size)
    began = time.thread_time()
    unmask.add(streams, into)
    return time.thread_time() - began


def _check(group: Group, uploaders: Sequence[str], streams: Sequence[Stream]) -> None:
    rest = np.zeros(CHECKED_FLOATS)
    unmask.add(streams, rest)
    for fl_id in uploaders:
        rest += masks.client_mask(
            fl_id, group.pairs[fl_id].private, group.b[fl_id], group.members, group.ids, CHECKED_FLOATS
        )
    n = len(group.ids)
    if np.abs(rest).max() > len(uploaders) * 2.0**-24 * n * (n + 1) / 2:
        raise Wrong("the noise does not take the masks off")


# ---- bytes


def traffic(group: Group) -> dict[str, tuple[int, int]]:
    """Return the bytes of a client's cipher rounds without HTTP: round -> (request, reply), everybody taking part."""
    ids, own = group.ids, group.ids[0]
    sealed = tuple(wire.ClientShare(fl_id, bytes(96)) for fl_id in ids[1:])
    plain = tuple(wire.ClientShare(fl_id, bytes(33), 1) for fl_id in ids[1:])
    listed = tuple(_listed(group, fl_id) for fl_id in ids)
    asked: dict[str, Any] = {"fl_id": own, "iteration": 7, "timestamp": _STAMP}
    short: dict[str, Any] = {"iteration": 7, "next_req_time": _STAMP}
    rounds: dict[str, tuple[object, object]] = {
        "exchangeKeys": (_exchanged(group, own), wire.ResponseExchangeKeys(reason="", **short)),
        "getKeys": (
            wire.GetExchangeKeys(**asked),
            wire.ReturnExchangeKeys(remote_publickeys=listed, **short),
        ),
        "shareSecrets": (
            wire.RequestShareSecrets(encrypted_shares=sealed, **asked),
            wire.ResponseShareSecrets(reason="OK", **short),
        ),
        "getSecrets": (
            wire.GetShareSecrets(**asked),
            wire.ReturnShareSecrets(encrypted_shares=sealed, **short),
        ),
        "getClientList": (
            wire.GetClientList(**asked),
            wire.ReturnClientList(reason="", clients=tuple(ids), **short),
        ),
        "reconstructSecrets": (
            wire.SendReconstructSecret(reconstruct_secret_shares=plain, **asked),
            wire.ReconstructSecret(reason="", **short),
        ),
    }
    return {
        name: (len(codec.encode(request)), len(codec.encode(reply)))
        for name, (request, reply) in rounds.items()
    }


def _exchanged(group: Group, fl_id: str) -> wire.RequestExchangeKeys:
    member = group.members[fl_id]
    return wire.RequestExchangeKeys(
        fl_id=fl_id,
        c_pk=group.c_pairs[fl_id].public,
        s_pk=member.s_pk,
        iteration=7,
        timestamp=_STAMP,
        ind_iv=member.ind_iv,
        pw_iv=member.pw_iv,
        pw_salt=member.pw_salt,
    )


def _listed(group: Group, fl_id: str) -> wire.ClientPublicKeys:
    member = group.members[fl_id]
    return wire.ClientPublicKeys(
        fl_id=fl_id,
        c_pk=group.c_pairs[fl_id].public,
        s_pk=member.s_pk,
        pw_iv=member.pw_iv,
        pw_salt=member.pw_salt,
    )


# ---- Redis


def entries(group: Group) -> list[tuple[bytes, bytes, list[bytes]]]:
    """Return what an iteration leaves in Redis at most: (command, key, the rest of it)."""
    n, client_key = len(group.ids), b"%064d"
    kept = [
        (b"HSET", b"members", [client_key % place, bytes(_MARK) + codec.encode(_exchanged(group, fl_id))])
        for place, fl_id in enumerate(group.ids)
    ]
    for place in range(n):
        kept += [(b"APPEND", b"shares:" + client_key % place, [bytes(_SEALED_ROW + 96)])] * (n - 1)
        kept.append((b"HSET", b"reports", [client_key % place, bytes((_PLAIN_ROW + 33) * (n - 1))]))
        kept += [
            (b"HSET", name, [client_key % place, b"1"])
            for name in (b"gotkeys", b"shared", b"gotsecrets", b"list")
        ]
    return kept


def estimated_redis_bytes(group: Group) -> int:
    """Return the bytes of all entries, and 100 for each key or field."""
    kept = entries(group)
    places = {(key, *rest[:-1]) for _, key, rest in kept}
    return sum(len(rest[-1]) for _, _, rest in kept) + 100 * len(places)


def redis_bytes(group: Group, folder: Path) -> int:
    """Return by how much a private Redis grows, with every client's report.

    Raises:
        NoRedis: there is no redis-server.
        ChildFailed: it does not start.
    """
    with (
        redis_server(folder) as redis,
        socket.create_connection(("127.0.0.1", redis.port), timeout=30) as link,
    ):
        before = _used_memory(link)
        commands = [_command(command, key, *rest) for command, key, rest in entries(group)]
        for start in range(0, len(commands), 500):
            link.sendall(b"".join(commands[start : start + 500]))
            answered = 0
            while answered < len(commands[start : start + 500]):
                answered += link.recv(1 << 16).count(b"\n")
        return _used_memory(link) - before


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def _used_memory(link: socket.socket) -> int:
    link.sendall(_command(b"INFO", b"memory"))
    answer = b""
    while b"\r\n\r\n" not in answer and not answer.endswith(b"\n\r\n"):
        answer += link.recv(1 << 16)
        head, _, body = answer.partition(b"\r\n")
        if len(body) >= int(head[1:] or 0) + 2:
            break
    return int(answer.partition(b"used_memory:")[2].split(b"\r\n", 1)[0])


# ---- rates


def rates(size: int = 1_000_000, rounds: int = 100) -> dict[str, float]:
    """Return GB of stream per second of CPU: AES alone, added to a client's mask, added to the server's noise.

    The three take turns, because the machine has other work, too.
    """
    zeros, out = bytes(_BLOCK), bytearray(_BLOCK)
    cipher = Cipher(AES256(bytes(32)), CTR(bytes(16))).encryptor()
    mask, noise = np.zeros(size, np.float32), np.zeros(size)
    stream, blocks = Stream(bytes(32), bytes(16), 1), 4 * size // _BLOCK

    def alone() -> None:
        for _ in range(blocks):
            cipher.update_into(zeros, out)

    works: dict[str, tuple[int, Callable[[], object]]] = {
        "AES-256-CTR": (blocks * _BLOCK, alone),
        "mask": (4 * size, lambda: masks.add_stream(mask, *stream)),
        "noise": (
            4 * 4 * size,
            lambda: unmask.add([stream] * 4, noise),
        ),  # each piece is used again, as there
    }
    best = dict.fromkeys(works, 0.0)
    for _ in range(rounds):
        for name, (made, work) in works.items():
            best[name] = max(best[name], made / _best(work, 1) / 1e9)
    return best


def shamir_seconds(n: int = 1000, t: int = 667) -> dict[str, float]:
    """Return CPU seconds: to share a secret, to combine it, and each further one whose shares have the same indices."""
    secret = secrets.randbits(256)
    dealt = shamir.split(secret, t, n, secrets.randbelow)
    used = dealt[n - t :]
    weights = shamir.weights_at_zero([index for index, _ in used])
    if shamir.combine(used) != secret or shamir.agreed(used, t, weights) != secret:
        raise Wrong("shares do not give their secret")
    return {
        "share": _best(lambda: shamir.split(secret, t, n, secrets.randbelow), 3),
        "combine": _best(lambda: shamir.combine(used), 3),
        "combine further": _best(lambda: shamir.agreed(used, t, weights), 5),
    }


def _best(work: Callable[[], object], rounds: int) -> float:
    spent = []
    for _ in range(rounds):
        began = time.thread_time()
        work()
        spent.append(time.thread_time() - began)
    return min(spent)
