"""From reports to secrets to sums without masks."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import LocalError
from fedcore.secagg import keys, masks, shamir, shares, unmask
from fedcore.secagg.keys import BadKey, KeyPair
from fedcore.secagg.masks import Layout, Member
from fedcore.secagg.shares import PlainShares

Reports = dict[str, dict[str, tuple[bytes, int]]]
U = 2.0**-24  # half a unit in the last place of 1 in float32


@dataclass
class Group:
    """Clients that have all shared their secrets with each other."""

    t: int
    pairs: dict[str, KeyPair]
    b: dict[str, bytes]
    members: dict[str, Member]
    held: dict[str, dict[str, PlainShares]]  # who holds -> owner -> shares

    @classmethod
    def of(cls, n: int, t: int, private: Callable[[int], bytes] = secrets.token_bytes) -> Group:
        ids = [f"client-{number}" for number in range(n)]
        pairs = {fl_id: keys.new_pair(private) for fl_id in ids}
        b = {fl_id: secrets.token_bytes(32) for fl_id in ids}
        members = {
            fl_id: Member(
                pairs[fl_id].public, secrets.token_bytes(16), secrets.token_bytes(32), secrets.token_bytes(16)
            )
            for fl_id in ids
        }
        group = cls(t, pairs, b, members, {fl_id: {} for fl_id in ids})
        for owner in ids:
            group.deal(owner, pairs[owner].private, b[owner])
        return group

    @property
    def ids(self) -> list[str]:
        return list(self.members)

    def deal(self, owner: str, s: bytes, b: bytes) -> None:
        others = [fl_id for fl_id in self.ids if fl_id != owner]
        dealt = (
            shamir.split(int.from_bytes(secret, "big"), self.t, len(others), secrets.randbelow)
            for secret in (s, b)
        )
        for other, (index, s_share), (_, b_share) in zip(others, *dealt, strict=True):
            self.held[other][owner] = PlainShares(s_share, b_share, index, index)

    def reports(self, reporters: list[str], uploaders: list[str]) -> Reports:
        """Return what honest clients report."""
        return {
            reporter: {
                owner: (shares.to_bytes(held.b_share if owner in uploaders else held.s_share), held.s_index)
                for owner, held in self.held[reporter].items()
            }
            for reporter in reporters
        }

    def secrets_of(self, uploaders: list[str]) -> dict[str, bytes]:
        return {
            owner: self.b[owner] if owner in uploaders else self.pairs[owner].private for owner in self.ids
        }

    def recover(self, reports: Reports, uploaders: list[str]) -> unmask.Recovered:
        return unmask.recover(reports, self.members, self.ids, uploaders, self.t)

    def mask(self, fl_id: str, size: int) -> Any:
        private, b = self.pairs[fl_id].private, self.b[fl_id]
        return masks.client_mask(fl_id, private, b, self.members, self.ids, size)


def other_share(told: tuple[bytes, int]) -> tuple[bytes, int]:
    number = (shares.share_of(told[0]) + 1) % shamir.PRIME
    return shares.to_bytes(number), told[1]


def greatest_residue(n: int, weight: float, data_size: int) -> float:
    """Return how far a mean of masked updates can be from that without masks; docs/SECURE_AGGREGATION.md derives it."""
    additions = U * (n * (n + 1) / 2 - 1) + U * (weight * data_size + n)
    return 1.01 * (additions / data_size + U * (weight + n / data_size))


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(2, 6),
    chance=st.randoms(use_true_random=False),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    data_size=st.sampled_from([1, 32, 1000]),
    layout=st.sampled_from(Layout),
)
def test_noise_takes_the_masks_off_whoever_drops_out(
    n: int, chance: Random, sizes: list[int], data_size: int, layout: Layout
) -> None:
    t = chance.randint(1, n - 1)
    group = Group.of(n, t)
    uploaders = sorted(chance.sample(group.ids, chance.randint(min(t + 1, n), n)))
    reporters = chance.sample(uploaders, chance.randint(t + 1, len(uploaders)))
    recovered = group.recover(group.reports(reporters, uploaders), uploaders)
    assert recovered.complete and not recovered.bad
    assert recovered.secrets == group.secrets_of(uploaders)  # never both of one client

    length, places = layout.length(sizes), layout.slices(sizes)
    generator = np.random.default_rng(chance.randint(0, 2**32))
    weights = {
        fl_id: [generator.normal(0, 1, size).astype(np.float32) for size in sizes] for fl_id in uploaders
    }
    noise = np.zeros(length)
    unmask.noise(group.members, uploaders, recovered.secrets, noise)
    applied = {fl_id: group.mask(fl_id, length) for fl_id in uploaders}
    for layer, place in enumerate(places):
        masked, plain = np.zeros(sizes[layer]), np.zeros(sizes[layer])
        for fl_id in uploaders:
            values = weights[fl_id][layer] * np.float32(data_size)
            masked += values + applied[fl_id][place]
            plain += values
        total = data_size * len(uploaders)
        mean = (masked / total).astype(np.float32) + noise[
            place
        ] / total  # the masked mean is kept in float32
        expected = plain / (data_size * len(uploaders))
        largest = max((float(np.abs(w[layer]).max(initial=0)) for w in weights.values()), default=0)
        assert np.abs(mean - expected).max(initial=0) <= greatest_residue(n, largest, data_size)


def test_noise_is_the_same_however_it_is_run() -> None:
    group = Group.of(4, 2)
    uploaders = group.ids[:3]
    known = group.secrets_of(uploaders)
    size = 2 * unmask._RANGE + 7
    alone, together = np.zeros(size), np.zeros(size)
    unmask.noise(group.members, uploaders, known, alone)
    with ThreadPoolExecutor(3) as pool:
        unmask.noise(group.members, uploaders, known, together, run=pool.map)
    whole = np.zeros(size)  # each stream in one piece
    for stream in unmask.streams(group.members, uploaders, known):
        masks.add_stream(whole, *stream)
    assert alone.tobytes() == together.tobytes() == whole.tobytes()


def test_two_lost_clients_leave_no_pair_of_their_own() -> None:
    group = Group.of(4, 1)
    uploaders = group.ids[:2]
    made = unmask.streams(group.members, uploaders, group.secrets_of(uploaders))
    assert len(made) == 2 + 2 * 2


def test_noise_needs_all_secrets() -> None:
    group = Group.of(3, 1)
    with pytest.raises(LocalError, match="1 clients"):
        unmask.noise(group.members, group.ids, {fl_id: bytes(32) for fl_id in group.ids[1:]}, np.zeros(1))


def test_a_registered_key_of_zero_ends_it() -> None:
    group = Group.of(3, 1)
    uploaders = group.ids[:2]
    group.members[uploaders[0]] = group.members[uploaders[0]]._replace(s_pk=bytes(32))
    with pytest.raises(BadKey, match="zero"):
        unmask.streams(group.members, uploaders, group.secrets_of(uploaders))


def test_secrets_that_begin_with_zeros_are_whole() -> None:
    group = Group.of(4, 2, private=lambda count: bytes(3) + secrets.token_bytes(count - 3))
    group.b = {owner: bytes(2) + b[2:] for owner, b in group.b.items()}
    for owner in group.ids:
        group.deal(owner, group.pairs[owner].private, group.b[owner])
    uploaders = group.ids[:3]
    recovered = group.recover(group.reports(uploaders, uploaders), uploaders)
    assert recovered.secrets == group.secrets_of(uploaders)
    assert all(len(secret) == 32 and secret[0] == 0 for secret in recovered.secrets.values())


# ---- reports that are not honest


def spoil_share(report: dict[str, tuple[bytes, int]]) -> None:
    for owner, told in report.items():
        report[owner] = other_share(told)


def spoil_with_noise(report: dict[str, tuple[bytes, int]]) -> None:
    for owner in report:
        report[owner] = secrets.token_bytes(32), report[owner][1]


def too_long(report: dict[str, tuple[bytes, int]]) -> None:
    for owner in report:
        report[owner] = b"\1" * 34, report[owner][1]


def outside_the_field(report: dict[str, tuple[bytes, int]]) -> None:
    for owner in report:
        report[owner] = shamir.PRIME.to_bytes(33, "big"), report[owner][1]


def no_index(report: dict[str, tuple[bytes, int]]) -> None:
    for owner in report:
        report[owner] = report[owner][0], 0


def negative_index(report: dict[str, tuple[bytes, int]]) -> None:
    for owner in report:
        report[owner] = report[owner][0], -5


def shifted_index(report: dict[str, tuple[bytes, int]]) -> None:
    for owner in report:
        report[owner] = report[owner][0], report[owner][1] % 6 + 1


def only_one_owner(report: dict[str, tuple[bytes, int]]) -> None:
    report["client-5"] = other_share(report["client-5"])


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_share,
        spoil_with_noise,
        too_long,
        outside_the_field,
        no_index,
        negative_index,
        shifted_index,
        only_one_owner,
    ],
)
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_bad_report_is_found_and_named(
    spoil: Callable[[dict[str, tuple[bytes, int]]], None], lost: int
) -> None:
    group = Group.of(8, 3)
    uploaders = group.ids[: 8 - lost]
    reports = group.reports(uploaders[:6] if lost < 2 else uploaders, uploaders)
    spoil(reports["client-2"])
    recovered = group.recover(reports, uploaders)
    assert recovered.complete and recovered.secrets == group.secrets_of(uploaders)
    assert set(recovered.bad) == {"client-2"}


def test_two_bad_reports_are_found_and_named() -> None:
    group = Group.of(9, 3)
    uploaders = group.ids[:8]
    reports = group.reports(uploaders, uploaders)
    for liar in ("client-0", "client-4"):
        spoil_share(reports[liar])
    recovered = group.recover(reports, uploaders)
    assert recovered.complete and recovered.secrets == group.secrets_of(uploaders)
    assert set(recovered.bad) == {"client-0", "client-4"}


def test_an_index_that_was_taken_from_another_report_hurts_only_the_thief() -> None:
    group = Group.of(8, 3)
    uploaders = group.ids[:7]
    reports = group.reports(uploaders, uploaders)
    for owner in reports["client-2"]:
        victim = "client-3" if owner != "client-3" else "client-4"
        index = reports[victim][owner][1] if owner in reports[victim] else 1
        reports["client-2"][owner] = secrets.token_bytes(32), index
    recovered = group.recover(reports, uploaders)
    assert recovered.complete and recovered.secrets == group.secrets_of(uploaders)
    assert set(recovered.bad) == {"client-2"}


def test_shares_with_one_index_count_neither_until_the_others_decide() -> None:
    group = Group.of(12, 3)
    uploaders = group.ids[:11]
    reports = group.reports(uploaders[:5], uploaders)
    for owner in reports["client-1"]:
        if owner in reports["client-2"]:
            reports["client-1"][owner] = secrets.token_bytes(32), reports["client-2"][owner][1]
    owners = [owner for owner in group.ids if owner not in reports]
    recovered = unmask.recover(reports, group.members, owners, uploaders, group.t)
    expected = group.secrets_of(uploaders)
    assert recovered.secrets == {owner: expected[owner] for owner in owners}
    assert set(recovered.bad) == {"client-1"}


def test_the_same_share_twice_counts_once() -> None:
    group = Group.of(5, 2)
    uploaders = group.ids
    reports = group.reports(uploaders[:2], uploaders)
    copied = {owner: told for owner, told in reports["client-0"].items() if owner == "client-4"}
    recovered = group.recover({"client-0": copied, "client-1": copied}, uploaders)
    assert "client-4" in recovered.lacking and not recovered.bad


def test_a_key_is_told_from_one_share_too_many_by_its_public_half() -> None:
    group = Group.of(5, 2)
    uploaders = group.ids[:4]
    reports = group.reports(uploaders[:3], uploaders)  # t + 1
    reports["client-1"]["client-4"] = other_share(reports["client-1"]["client-4"])
    recovered = group.recover(reports, uploaders)
    assert recovered.secrets["client-4"] == group.pairs["client-4"].private
    assert recovered.bad == {"client-1": ("client-4",)}
    # The streams of those that remain have no public half: without client-1 there are too few shares of some.
    assert set(recovered.lacking) == {"client-0", "client-2"}


def test_shares_that_contradict_each_other_are_not_believed() -> None:
    group = Group.of(5, 2)
    reports = group.reports(group.ids[:4], group.ids)
    reports["client-1"]["client-4"] = other_share(reports["client-1"]["client-4"])
    reports["client-2"]["client-4"] = other_share(reports["client-2"]["client-4"])
    recovered = group.recover(reports, group.ids)
    assert recovered.lacking == ("client-4",) and not recovered.complete


def test_a_key_that_does_not_fit_the_registered_one_is_none() -> None:
    group = Group.of(5, 2)
    group.deal("client-4", keys.clamp(bytes(32)), group.b["client-4"])
    uploaders = group.ids[:4]
    recovered = group.recover(group.reports(uploaders, uploaders), uploaders)
    assert recovered.lacking == ("client-4",) and "client-4" not in recovered.secrets


def test_a_number_that_is_no_secret_is_none() -> None:
    group = Group.of(4, 2)
    for other, (index, share) in zip(
        group.ids[1:], shamir.split(2**256, 2, 3, secrets.randbelow), strict=True
    ):
        group.held[other]["client-0"] = PlainShares(share, share, index, index)
    recovered = group.recover(group.reports(group.ids, group.ids), group.ids)
    assert recovered.lacking == ("client-0",)


def test_what_is_found_without_surplus_is_found_again_without_those_who_lied() -> None:
    group = Group.of(6, 3)
    uploaders = group.ids
    reports = group.reports(uploaders, uploaders)
    # Of client-0 there are just t shares, one of them wrong, which nothing contradicts; of the others there are more.
    for honest in ("client-4", "client-5"):
        del reports[honest]["client-0"]
    spoil_share(reports["client-1"])
    recovered = group.recover(reports, uploaders)
    assert set(recovered.bad) == {"client-1"}
    assert recovered.lacking == ("client-0",)


def test_reports_of_strangers_and_about_oneself_do_not_count() -> None:
    group = Group.of(5, 2)
    uploaders = group.ids[:4]
    reports = group.reports(group.ids, uploaders)
    spoil_share(reports["client-4"])  # has not uploaded
    reports["client-0"]["client-0"] = b"\7", 9
    recovered = group.recover(reports, uploaders)
    assert recovered.complete and not recovered.bad
    assert recovered.secrets == group.secrets_of(uploaders)


def test_too_few_reports_tell_what_is_lacking() -> None:
    group = Group.of(5, 3)
    uploaders = group.ids[:4]
    recovered = group.recover(group.reports(uploaders[:3], uploaders), uploaders)
    assert set(recovered.secrets) == {
        "client-3",
        "client-4",
    }  # the others do not report shares of their own secrets
    assert set(recovered.lacking) == set(uploaders[:3])
    assert group.recover({}, uploaders).lacking


def test_a_threshold_of_none_is_a_fault() -> None:
    group = Group.of(2, 1)
    with pytest.raises(ValueError, match="at least one"):
        unmask.recover({}, group.members, group.ids, group.ids, 0)


def test_recovered_secrets_are_not_shown() -> None:
    group = Group.of(3, 1)
    recovered = group.recover(group.reports(group.ids, group.ids), group.ids)
    assert repr(recovered) == "Recovered(bad={}, lacking=())"


def test_many_reports_are_compared_at_once() -> None:
    group = Group.of(30, 12)
    uploaders = group.ids[:27]
    reports = group.reports(uploaders, uploaders)
    liars = {"client-2", "client-20", "client-21", "client-22", "client-23", "client-24"}
    for liar in liars:
        spoil_share(reports[liar])
    recovered = group.recover(reports, uploaders)
    assert recovered.complete and recovered.secrets == group.secrets_of(uploaders)
    assert set(recovered.bad) == liars
