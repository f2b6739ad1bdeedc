"""A client's part in the cipher rounds of one iteration: keys, shares, its mask, and its report.

A ``Masking`` makes the request of each round and takes in what is answered; when rounds are sent, and what a refusal
leads to, is ``fedclient.session``'s. No clock, no socket, chance as an argument. PW_ENCRYPT has all rounds,
STABLE_PW_ENCRYPT the first two.

What keeps the client's secrets, whatever a server says:

* one pair of secrets stands for one list of members. Another list for the same keys, another set of sharers or another
  list of uploads is refused and the keys are given up, so nobody ever gets both secrets of a client from us;
* under one mask only one upload is ever made: after a refusal the same keys, shares and masked weights are sent again;
* a list of uploads must hold the client itself, more than t clients, and nobody whose shares it did not get;
* keys must have their lengths and must not be such that everybody agrees on zero with them;
* where devices sign, every member's keys and every signature under the list are verified.

A share that cannot be opened is left out of the report: one bad member shall not silence the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fedclient.protection import Mask
from fedclient.trainer import Weights
from fedcore.errors import CryptoError
from fedcore.secagg import keys, masks, shamir, shares
from fedcore.secagg.keys import KeyPair
from fedcore.secagg.masks import IV_BYTES, Layout, Member
from fedcore.secagg.shares import PlainShares
from fedcore.wire.arrays import Floats
from fedcore.wire.messages import (
    CipherReply,
    CipherRequest,
    CipherRound,
    ClientListSign,
    ClientPublicKeys,
    ClientShare,
    GetClientList,
    GetExchangeKeys,
    GetShareSecrets,
    PWParams,
    RequestAllClientListSign,
    RequestExchangeKeys,
    RequestShareSecrets,
    RequestUpdateModel,
    ReturnAllClientListSign,
    ReturnClientList,
    ReturnExchangeKeys,
    ReturnShareSecrets,
    SendClientListSign,
    SendReconstructSecret,
)

log = logging.getLogger("fedclient")

Random = Callable[[int], bytes]
R = TypeVar("R", bound=CipherRequest)
Peers = Mapping[str, ClientPublicKeys]

_BEFORE_TRAINING: tuple[CipherRound, ...] = ("exchangeKeys", "getKeys", "shareSecrets", "getSecrets")
_AFTER_UPLOAD: tuple[CipherRound, ...] = ("getClientList", "reconstructSecrets")
_AFTER_UPLOAD_SIGNED: tuple[CipherRound, ...] = (
    "getClientList",
    "pushListSign",
    "getListSign",
    "reconstructSecrets",
)
_SPARE_BYTES = 16  # drawn beyond a number's own, so that its remainder is as good as even


class Refused(Exception):
    """What a server tells cannot be trusted; the client begins anew, with other keys."""


class CipherSigner(Protocol):
    """Signs cipher rounds, and verifies those of others; see ``fedclient.identity``."""

    def signed_keys(self, request: RequestExchangeKeys) -> RequestExchangeKeys: ...

    def signed_round(self, request: R) -> R: ...

    def list_signature(self, fl_ids: Sequence[str]) -> bytes: ...

    def check_keys(self, peer: ClientPublicKeys, now: int) -> None:
        """Raise CryptoError unless a member's keys are signed by an equipment of the same authority."""

    def check_list(self, peer: ClientPublicKeys, signature: bytes, fl_ids: Sequence[str]) -> None:
        """Raise CryptoError unless this is the member's signature under the list."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """What a client draws for one iteration.

    Attributes:
        c: key with which shares are sealed.
        s: key that seeds the streams of pairs.
        b: key of the own stream, 32 bytes.
        ind_iv: its initial counter, 16 bytes.
        pw_iv: initial counter of pairs in which this client's id is the smaller one, 16 bytes.
        pw_salt: of the keys of the same, 32 bytes.
    """

    c: KeyPair
    s: KeyPair
    b: bytes = field(repr=False)
    ind_iv: bytes
    pw_iv: bytes
    pw_salt: bytes

    @classmethod
    def drawn(cls, random: Random) -> Secrets:
        """Draw them from ``random``, which must be fit for keys (os.urandom)."""
        return cls(
            keys.new_pair(random),
            keys.new_pair(random),
            random(keys.KEY_BYTES),
            random(IV_BYTES),
            random(IV_BYTES),
            random(keys.SALT_BYTES),
        )


class Masking:
    """One client in one iteration's cipher rounds.

    Attributes:
        upload: the one that was made under these secrets; None before.
    """

    def __init__(
        self,
        fl_id: str,
        iteration: int,
        params: PWParams,
        random: Random,
        *,
        stable: bool = False,
        layout: Layout = Layout.CONTIGUOUS,
        least_threshold: float = 0.0,
        signer: CipherSigner | None = None,
    ) -> None:
        """Draw the secrets of an iteration.

        Args:
            fl_id: the client.
            iteration: its number.
            params: of the plan, without fault (``protection.Terms``).
            random: fit for keys.
            stable: STABLE_PW_ENCRYPT: exchange keys, and nothing more.
            layout: which floats of the mask belong to which weight; all clients of a job must have the same.
            least_threshold: share of the members that t must exceed.
            signer: for jobs in which devices sign.
        """
        self.upload: RequestUpdateModel | None = None
        self._fl_id, self._iteration, self._random = fl_id, iteration, random
        self._t, self._prime = params.t, int.from_bytes(params.prime or b"", "big")
        self._stable, self._layout, self._signer = stable, layout, signer
        self._least_threshold = least_threshold
        self._secrets = Secrets.drawn(random)
        self._peers: Peers = {}  # of the list of members, the client itself among them
        self._members: dict[str, Member] = {}
        self._dealt: tuple[ClientShare, ...] = ()
        self._held: dict[str, bytes] = {}  # whose secrets -> the sealed record, in the order received
        self._got_shares = False
        self._list: tuple[str, ...] = ()

    @property
    def iteration(self) -> int:
        """Number of the iteration."""
        return self._iteration

    @property
    def before(self) -> tuple[CipherRound, ...]:
        """The rounds that come before the training."""
        return _BEFORE_TRAINING[:2] if self._stable else _BEFORE_TRAINING

    @property
    def after(self) -> tuple[CipherRound, ...]:
        """The rounds between updateModel and getModel."""
        if self._stable:
            return ()
        return _AFTER_UPLOAD if self._signer is None else _AFTER_UPLOAD_SIGNED

    # ---- requests

    def request(self, round_: CipherRound, now: int) -> CipherRequest:
        """Return the request of a round whose turn it is.

        Args:
            round_: its name.
            now: milliseconds since the epoch.
        """
        fl_id, number, stamp = self._fl_id, self._iteration, str(now)
        match round_:
            case "exchangeKeys":
                return self._keys_request(stamp)
            case "getKeys":
                return self._signed(GetExchangeKeys(fl_id, number, stamp))
            case "shareSecrets":
                return self._signed(RequestShareSecrets(fl_id, self._dealt, number, stamp))
            case "getSecrets":
                return self._signed(GetShareSecrets(fl_id, number, stamp))
            case "getClientList":
                return self._signed(GetClientList(fl_id, number, stamp))
            case "pushListSign":
                signature = self._signer.list_signature(self._list) if self._signer else None
                return self._signed(SendClientListSign(fl_id, number, stamp, signature))
            case "getListSign":
                return self._signed(RequestAllClientListSign(fl_id, number, stamp))
            case "reconstructSecrets":
                return self._signed(SendReconstructSecret(fl_id, self._report(), number, stamp))

    def _keys_request(self, stamp: str) -> RequestExchangeKeys:
        mine = self._secrets
        request = RequestExchangeKeys(
            fl_id=self._fl_id,
            s_pk=mine.s.public,
            iteration=self._iteration,
            pw_iv=mine.pw_iv,
            pw_salt=mine.pw_salt,
        )
        if self._stable:
            return request
        request = replace(request, c_pk=mine.c.public, ind_iv=mine.ind_iv, timestamp=stamp)
        return self._signer.signed_keys(request) if self._signer else request

    def _signed(self, request: R) -> R:
        return self._signer.signed_round(request) if self._signer else request

    # ---- answers

    def take(self, reply: CipherReply, now: int) -> None:
        """Take in the answer, with code 200, to the last request.

        Args:
            reply: its table.
            now: milliseconds since the epoch.

        Raises:
            Refused: it cannot be trusted, or contradicts an earlier one.
        """
        match reply:
            case ReturnExchangeKeys():
                self._take_members(reply.remote_publickeys or (), now)
            case ReturnShareSecrets():
                self._take_shares(reply.encrypted_shares or ())
            case ReturnClientList():
                self._take_list(reply.clients or ())
            case ReturnAllClientListSign():
                self._take_signatures(reply.client_list_sign or ())

    def _take_members(self, entries: Sequence[ClientPublicKeys], now: int) -> None:
        peers = {entry.fl_id or "": entry for entry in entries}
        if len(peers) != len(entries) or "" in peers:
            raise Refused("the list of keys has a client without name, or twice")
        if self._peers:
            if _of_keys(peers) != _of_keys(self._peers):
                raise Refused("another list of keys was told for the same keys")
            return
        own = peers.get(self._fl_id)
        if own is None or (own.s_pk, own.pw_iv, own.pw_salt) != self._own_public:
            raise Refused("the list of keys does not hold the client's own")
        try:
            members = {fl_id: Member.of(entry) for fl_id, entry in peers.items()}
            for fl_id in peers.keys() - {self._fl_id}:
                keys.agree(
                    self._secrets.s.private, members[fl_id].s_pk
                )  # a point that all agree on zero with fails
            if not self._stable:
                self._check_peers(peers, now)
                self._dealt = self._deal(peers)
        except CryptoError as error:
            raise Refused(f"the list of keys cannot be used: {error}") from error
        own_member = members[self._fl_id]
        self._members = members | {self._fl_id: own_member._replace(ind_iv=self._secrets.ind_iv)}
        self._peers = peers

    @property
    def _own_public(self) -> tuple[bytes, bytes, bytes]:
        return self._secrets.s.public, self._secrets.pw_iv, self._secrets.pw_salt

    def _check_peers(self, peers: Peers, now: int) -> None:
        """Raise CryptoError or Refused if a member's keys are not its own, as far as can be seen."""
        if peers[self._fl_id].c_pk != self._secrets.c.public:
            raise Refused("the list of keys does not hold the client's own")
        if self._signer is None:
            return
        for peer in peers.values():
            if peer.iteration != self._iteration:
                raise Refused("keys are signed for another iteration")
            self._signer.check_keys(peer, now)

    def _deal(self, peers: Peers) -> tuple[ClientShare, ...]:
        """Return the shares for all others, sealed.

        Raises:
            Refused: there are not t others, or t is not more than the client asks for.
            CryptoError: a key cannot be used.
        """
        others = [fl_id for fl_id in peers if fl_id != self._fl_id]
        if len(others) < self._t:
            raise Refused(f"{len(others)} others are too few for {self._t} shares that give a secret")
        if self._t <= self._least_threshold * len(peers):
            raise Refused(
                f"{self._t} of {len(peers)} members could find out the client's secrets, which asks for more than "
                f"{self._least_threshold:g} of them: raise the job's reconstruct_secrets_threshold, or lower "
                "least_threshold"
            )
        if 2 * self._t <= len(others):
            log.warning(
                "%d of %d members can find out a client's secrets together: the job's "
                "reconstruct_secrets_threshold should be more than half of them",
                self._t,
                len(others) + 1,
            )
        of_s, of_b = (
            self._shares_of(self._secrets.s.private, len(others)),
            self._shares_of(self._secrets.b, len(others)),
        )
        return tuple(
            ClientShare(other, self._seal(peers[other], PlainShares(s_share, b_share, index, index)))
            for other, (index, s_share), (_, b_share) in zip(others, of_s, of_b, strict=True)
        )

    def _shares_of(self, secret: bytes, count: int) -> list[tuple[int, int]]:
        number = int.from_bytes(secret, "big")
        return shamir.split(number, self._t, count, self._below, self._prime)

    def _below(self, limit: int) -> int:
        drawn = self._random((limit.bit_length() + 7) // 8 + _SPARE_BYTES)
        return int.from_bytes(drawn, "big") % limit

    def _seal(self, peer: ClientPublicKeys, record: PlainShares) -> bytes:
        return shares.seal(self._key_with(peer), shares.pack(record), self._random(shares.IV_BYTES))

    def _key_with(self, peer: ClientPublicKeys) -> bytes:
        return keys.derive(keys.agree(self._secrets.c.private, peer.c_pk or b""))

    def _take_shares(self, items: Sequence[ClientShare]) -> None:
        held = {item.fl_id or "": item.share or b"" for item in items}
        if len(held) != len(items) or not set(held) <= set(self._peers) - {self._fl_id}:
            raise Refused("shares come twice, or from no member")
        if not held:
            raise Refused("nobody has shared secrets with the client")
        if self._got_shares and held != self._held:
            raise Refused("other shares were told for the same keys")
        self._held, self._got_shares = held, True

    def _take_list(self, clients: tuple[str, ...]) -> None:
        listed = set(clients)
        if len(listed) != len(clients) or self._fl_id not in listed:
            raise Refused("the list of uploads names a client twice, or not the client itself")
        if len(listed) < self._t + 1:
            raise Refused(f"the list of uploads has {len(listed)} clients, not more than {self._t}")
        if not listed <= {self._fl_id, *self._held}:
            raise Refused("the list of uploads names clients who have shared no secrets")
        if self._list and self._list != clients:
            raise Refused("another list of uploads was told")
        self._list = clients

    def _take_signatures(self, items: Sequence[ClientListSign]) -> None:
        """Verify that the others were told the same list."""
        assert self._signer is not None
        signers = {item.fl_id or "" for item in items} | {self._fl_id}
        if not signers <= set(self._list) or len(signers) < self._t + 1:
            raise Refused(f"{len(signers)} clients have signed the list of uploads, or others than are on it")
        for item in items:
            if item.fl_id == self._fl_id:
                continue
            try:
                self._signer.check_list(self._peers[item.fl_id or ""], item.signature or b"", self._list)
            except CryptoError as error:
                raise Refused(f"a signature under the list of uploads is wrong: {error}") from error

    # ---- the mask and the report

    def mask(self, names: Collection[str], base: Weights) -> Mask:
        """Return what hides an upload.

        Args:
            names: of the weights, in the order in which all clients lay out their masks.
            base: name -> float32[n], for their sizes.
        """
        sizes = [base[name].size for name in names]
        places = dict(zip(names, self._layout.slices(sizes), strict=True))

        def add(weights: Mapping[str, Floats]) -> None:
            made = self._made(self._layout.length(sizes))
            for name, values in weights.items():
                np.add(values, made[places[name]], out=values)

        return add

    def _made(self, size: int) -> npt.NDArray[np.float32]:
        """Return the mask.

        Raises:
            CryptoError: a member's key cannot be used.
        """
        private = self._secrets.s.private
        if self._stable:
            return masks.pair_mask(self._fl_id, private, self._members, self._members, size)
        return masks.client_mask(self._fl_id, private, self._secrets.b, self._members, self._held, size)

    def _report(self) -> tuple[ClientShare, ...]:
        """Return one share for each owner whose record can be opened: of b if its update counts, else of its s key."""
        report = []
        for owner, record in self._opened():
            index, share = (
                (record.b_index, record.b_share) if owner in self._list else (record.s_index, record.s_share)
            )
            report.append(ClientShare(owner, shares.to_bytes(share), index))
        return tuple(report)

    def _opened(self) -> Iterator[tuple[str, PlainShares]]:
        for owner, sealed in self._held.items():
            try:
                yield owner, shares.unpack(shares.unseal(self._key_with(self._peers[owner]), sealed))
            except CryptoError as error:
                log.warning(
                    "iteration %d: the shares of %.100r are left out: %s", self._iteration, owner, error
                )


def _of_keys(peers: Peers) -> dict[str, tuple[object, ...]]:
    """Return what of a list of members must not change."""
    return {fl_id: (peer.c_pk, peer.s_pk, peer.pw_iv, peer.pw_salt) for fl_id, peer in peers.items()}
