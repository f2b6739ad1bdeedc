"""Taking the masks off a sum: the secrets from what clients report, and from them what is to be added.

A client whose update is in the sum needs its own stream taken off, so the others report shares of its ``b``; of one
that has shared but not uploaded, the streams of its pairs are left over in the others' masks, so they report shares of
its private ``s`` key. For each client one of the two is recovered, never both.

Reports are not believed. A recovered ``s`` key must have the public half that its owner has registered; ``b`` has none,
so there surplus shares must agree, and any secret must be a number of 32 bytes. Where shares contradict each other the
secret is found if there are two surplus ones for each wrong one (``shamir.decode``; for a key, one is enough for a
single wrong one), and the wrong ones are named by who reported them. That is a suspicion, no proof: the owner may have
dealt a bad share in the first place.

What this cannot find: a wrong share of a ``b`` of which there are no more than t.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedcore.errors import CryptoError, LocalError
from fedcore.secagg import keys, masks, shamir, shares
from fedcore.secagg.masks import Layout, Member, Stream
from fedcore.secagg.shamir import BadShare, Point

__all__ = ["Layout", "Member", "Recovered", "add", "noise", "recover", "streams"]

Report = Mapping[str, tuple[bytes, int]]
Run = Callable[..., Iterable[Any]]  # as ``map``: a function and what it is called with, one by one

_SURPLUS = 8  # shares beyond t that are compared at first; all of them only if these contradict each other
_RANGE = 1 << 17  # floats of the noise that are made in one piece: 1 MiB, which stays in the second cache


@dataclass(frozen=True, slots=True)
class Recovered:
    """What reports give.

    Attributes:
        secrets: owner -> b of one that has uploaded, private s key of one that has not; 32 bytes.
        bad: who reported -> owners of whose secret it reported a wrong share.
        lacking: owners whose secret more reports may give.
    """

    secrets: Mapping[str, bytes] = field(repr=False)
    bad: Mapping[str, tuple[str, ...]]
    lacking: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether the secrets of all are there."""
        return not self.lacking


def recover(
    reports: Mapping[str, Report],
    members: Mapping[str, Member],
    sharers: Collection[str],
    uploaders: Collection[str],
    t: int,
    prime: int = shamir.PRIME,
) -> Recovered:
    """Recover a secret of each client that has shared its secrets.

    Good reports of t + 1 clients are enough. It takes some milliseconds for each secret with t in the hundreds, and
    up to a second for each of the first that bad shares are found in; reports that were bad once count last afterwards.

    Args:
        reports: who reports -> owner of a secret -> (share, index). Reports of others than ``uploaders`` do not
            count, nor do shares of one's own secret.
        members: what clients have registered, those who have shared at least.
        sharers: who has shared.
        uploaders: whose updates are in the sum.
        t: shares that give a secret, at least 1.
        prime: of the field.
    """
    evidence = _Evidence(reports, members, frozenset(uploaders), t, prime)
    # Private keys first: each can be checked, so what contradicts them is known to be bad before the others' turn.
    lost = sorted(set(sharers) - evidence.uploaders)
    remaining = sorted(evidence.uploaders.intersection(sharers))
    secrets = evidence.secrets(lost)
    while True:
        known = len(evidence.bad)
        found = secrets | evidence.secrets(remaining)
        if len(evidence.bad) == known:
            break
        # Some of what was found may rest on shares of those that are suspected only now.
        secrets |= evidence.secrets(owner for owner in lost if owner not in secrets)
    bad = {reporter: tuple(sorted(owners)) for reporter, owners in sorted(evidence.bad.items())}
    return Recovered(found, bad, tuple(owner for owner in lost + remaining if owner not in found))


def streams(
    members: Mapping[str, Member], uploaders: Collection[str], secrets: Mapping[str, bytes], run: Run = map
) -> list[Stream]:
    """Return what is to be added to a sum to take its masks off; one to four ms for each pair that was torn.

    Args:
        members: what clients have registered.
        uploaders: whose updates are in the sum.
        secrets: of ``recover``, complete. Whoever is there and has not uploaded was lost.
        run: calls a function for many, one after the other (``map``) or in threads (``map`` of an executor).

    Raises:
        LocalError: a secret is missing.
        CryptoError: a key cannot be used.
    """
    remaining = sorted(uploaders)
    lost = sorted(secrets.keys() - set(remaining))
    if missing := set(remaining) - secrets.keys():
        raise LocalError(f"the secrets of {len(missing)} clients are not recovered")
    own = [Stream(secrets[owner], members[owner].ind_iv, -1) for owner in remaining]
    torn = [(owner, other) for owner in lost for other in remaining]
    pairs: Iterable[Stream] = run(lambda ends: masks.pair(ends[0], secrets[ends[0]], ends[1], members), torn)
    return [*own, *pairs]  # pairs of two that were lost are in nobody's mask


def noise(
    members: Mapping[str, Member],
    uploaders: Collection[str],
    secrets: Mapping[str, bytes],
    into: npt.NDArray[np.float64],
    run: Run = map,
) -> None:
    """Add to ``into`` what takes the masks off a sum; divided by the sum of data sizes, off the mean.

    The result is the same to the last bit however it is run.

    Args:
        members: what clients have registered.
        uploaders: whose updates are in the sum.
        secrets: of ``recover``, complete.
        into: float64[n], zeros or the sum itself, n being the layout's ``length``; its ``slices`` say which weight is
            where.
        run: calls a function for many, one after the other (``map``) or in threads (``map`` of an executor).

    Raises:
        LocalError: a secret is missing.
        CryptoError: a key cannot be used.
    """
    add(streams(members, uploaders, secrets, run), into, run)


def add(every: Iterable[Stream], into: npt.NDArray[np.float64], run: Run = map) -> None:
    """Add streams to floats, piece by piece; the second half of ``noise``."""
    every = list(every)
    for _ in run(partial(_add_part, every, into), range(0, len(into), _RANGE)):
        pass


def _add_part(every: Iterable[Stream], into: npt.NDArray[np.float64], start: int) -> None:
    part = into[start : start + _RANGE]
    for stream in every:
        masks.add_stream(part, *stream, start)


class _Held(NamedTuple):
    """A share of somebody's secret, and who reported it."""

    reporter: str
    point: Point


class _Evidence:
    """The reports of an iteration, and what they have shown about each other so far."""

    def __init__(
        self,
        reports: Mapping[str, Report],
        members: Mapping[str, Member],
        uploaders: frozenset[str],
        t: int,
        prime: int,
    ) -> None:
        if t < 1:
            raise ValueError("a secret needs at least one share")
        self._reports = {who: reports[who] for who in sorted(reports) if who in uploaders}
        self._members, self._t, self._prime = members, t, prime
        self._xs: tuple[int, ...] = ()
        self._weights: list[
            int
        ] = []  # for the indices above; clients that are neighbours by id mostly have the same
        self.uploaders = uploaders
        self.bad: dict[str, set[str]] = {}

    def secrets(self, owners: Iterable[str]) -> dict[str, bytes]:
        """Return the secrets that can be told from the reports; note whose shares are wrong."""
        found = ((owner, self._secret(owner)) for owner in owners)
        return {owner: secret for owner, secret in found if secret is not None}

    def _secret(self, owner: str) -> bytes | None:
        held = self._held(owner)
        trusted = [share for share in held if share.reporter not in self.bad]
        choices = [trusted[: self._t + _SURPLUS]]
        if len(trusted) > len(choices[-1]):
            choices.append(trusted)
        # With a suspected share among just t of them nothing could be checked, unless by a public key.
        if len(held) > len(trusted) and (len(held) > self._t or owner not in self.uploaders):
            choices.append(held)
        for choice in choices:
            if (found := self._found(owner, choice)) is not None:
                secret, polynomial = found
                self._compare(owner, held, polynomial)
                return secret
        return None

    def _accuse(self, reporter: str, owner: str) -> None:
        self.bad.setdefault(reporter, set()).add(owner)

    def _held(self, owner: str) -> list[_Held]:
        """Return the shares of a secret that are numbers; those that are none speak against their reporters."""
        held = []
        for reporter, report in self._reports.items():
            if reporter == owner or owner not in report:
                continue
            content, index = report[owner]
            try:
                if not 1 <= index < 2**31:
                    raise BadShare("A share has no index")
                held.append(_Held(reporter, (index, shares.share_of(content, self._prime))))
            except BadShare:
                self._accuse(reporter, owner)
        return held

    def _found(self, owner: str, held: list[_Held]) -> tuple[bytes, list[int] | None] | None:
        """Return a secret and, if shares contradicted each other, the polynomial of the good ones."""
        points = _without_conflicts(held)
        if len(points) < self._t:
            return None
        in_conflict = len({share.point for share in held}) > len(points)
        if not in_conflict:
            number = shamir.agreed(points, self._t, self._weights_of(points), self._prime)
            if number is not None and (secret := self._checked(owner, number)):
                return secret, None
        for polynomial in self._candidates(owner, points):
            if secret := self._checked(owner, shamir.value_at(polynomial, 0, self._prime)):
                return secret, polynomial
        return None

    def _candidates(self, owner: str, points: list[Point]) -> Iterator[list[int]]:
        """Yield the polynomials that shares which contradict each other may stand for."""
        polynomial = shamir.decode(points, self._t, self._prime)
        if polynomial is not None:
            yield polynomial
        elif len(points) == self._t + 1 and owner not in self.uploaders:
            yield from self._by_trial(owner, points)

    def _by_trial(self, owner: str, points: list[Point]) -> Iterator[list[int]]:
        """Yield the polynomial of all points but one: which one is wrong the public key tells."""
        weights = self._weights_of(points)
        for left_out, number in enumerate(shamir.each_left_out(points, weights, self._prime)):
            if self._checked(owner, number):
                rest = points[:left_out] + points[left_out + 1 :]
                yield shamir.decode(rest, self._t, self._prime) or []

    def _weights_of(self, points: list[Point]) -> list[int]:
        xs = tuple(x for x, _ in points)
        if xs != self._xs:
            self._xs, self._weights = xs, shamir.weights_at_zero(xs, self._prime)
        return self._weights

    def _checked(self, owner: str, number: int) -> bytes | None:
        """Return a secret if it can be the owner's."""
        try:
            secret = shamir.secret_bytes(number)
            if owner in self.uploaders or keys.public_of(secret) == self._members[owner].s_pk:
                return secret
        except CryptoError:
            pass
        return None

    def _compare(self, owner: str, held: list[_Held], polynomial: list[int] | None) -> None:
        """Name who reported a share that is not on the polynomial."""
        if polynomial is None:
            return
        for reporter, (x, y) in held:
            if shamir.value_at(polynomial, x, self._prime) != y:
                self._accuse(reporter, owner)


def _without_conflicts(held: Iterable[_Held]) -> list[Point]:
    """Return the shares whose index nobody else reports another share with; the same one twice counts once."""
    shares_of: dict[int, set[int]] = {}
    for _, (x, y) in held:
        shares_of.setdefault(x, set()).add(y)
    return [(x, ys.pop()) for x, ys in shares_of.items() if len(ys) == 1]
