"""Secrets in shares."""

from __future__ import annotations

import secrets
from itertools import combinations
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from unit.secagg.vectors import VECTORS, H, drawn

from fedcore.secagg import shamir
from fedcore.secagg.shamir import PRIME, BadShare

KNOWN = VECTORS["shamir"]
KNOWN_PRIME = int(KNOWN["prime"], 16)
SECRETS = st.one_of(st.integers(0, 2**256 - 1), st.sampled_from([0, 1, 2**248 - 1, 2**256 - 1]))


def probably_prime(number: int) -> bool:
    return all(pow(base, number - 1, number) == 1 for base in (2, 3, 5, 7, 11, 13, 17))


def test_the_prime_is_safe_and_has_the_size_devices_expect() -> None:
    assert PRIME.bit_length() == 264 and len(PRIME.to_bytes(shamir.PRIME_BYTES, "big")) == 33
    assert probably_prime(PRIME) and probably_prime(PRIME // 2)


def test_the_prime_is_the_largest_one() -> None:
    candidates = (2**264 - below for below in range(1, 2**264 - PRIME, 2))
    small = [p for p in range(3, 200, 2) if all(p % q for q in range(3, p, 2))]
    for number in candidates:
        if all(number % p and (number // 2) % p for p in small):
            assert not (probably_prime(number) and probably_prime(number // 2))


def test_shares_are_the_originals_in_both_directions() -> None:
    for known in KNOWN["secrets"]:
        secret = int(known["secret"], 16)
        coefficients = drawn(*(int(a, 16) for a in KNOWN["coefficients"]))
        dealt = shamir.split(secret, KNOWN["t"], KNOWN["n"], coefficients, KNOWN_PRIME)
        expected = {int(index): int(share, 16) for index, share in known["shares"].items()}
        assert expected.items() <= dict(dealt).items()
        for chosen in combinations(dealt, KNOWN["t"]):
            number = shamir.combine(chosen, KNOWN_PRIME)
            assert shamir.secret_bytes(number) == H(known["secret"])  # zeros in front are there


@settings(max_examples=60, deadline=None)
@given(st.data(), SECRETS, st.integers(1, 12), st.integers(0, 8))
def test_any_t_shares_give_the_secret(data: Any, secret: int, t: int, more: int) -> None:
    points = shamir.split(secret, t, t + more, secrets.randbelow)
    chosen = data.draw(st.permutations(points))[:t]
    assert shamir.combine(chosen) == secret
    weights = shamir.weights_at_zero([x for x, _ in points])
    assert shamir.agreed(points, t, weights) == secret
    assert shamir.value_at(shamir.decode(points, t) or [], 0) == secret


def test_fewer_than_t_shares_fit_any_secret() -> None:
    held = shamir.split(5, 3, 4, secrets.randbelow)[:2]
    weights = shamir.weights_at_zero([1, 2, 3])
    known = sum(weight * y for weight, (_, y) in zip(weights[:2], held, strict=True))
    for guess in (0, 5, 2**255):
        third = 3, (guess - known) * pow(weights[2], -1, PRIME) % PRIME
        assert shamir.combine([*held, third]) == guess


@settings(max_examples=60, deadline=None)
@given(st.data(), SECRETS, st.integers(1, 8), st.integers(1, 8))
@example(None, 0, 3, 2)
def test_a_wrong_share_beyond_t_is_seen_and_left_out(data: Any, secret: int, t: int, surplus: int) -> None:
    points = shamir.split(secret, t, t + surplus, secrets.randbelow)
    count = data.draw(st.integers(1, max(1, surplus // 2))) if data else 1
    wrong = data.draw(st.permutations(range(len(points))))[:count] if data else [0]
    for place in wrong:
        x, y = points[place]
        points[place] = x, (y + 1 + secrets.randbelow(PRIME - 1)) % PRIME
    weights = shamir.weights_at_zero([x for x, _ in points])
    assert shamir.agreed(points, t, weights) is None
    polynomial = shamir.decode(points, t)
    if surplus < 2:
        assert polynomial is None  # seen, but any of them may be the one
        return
    assert polynomial is not None and shamir.value_at(polynomial, 0) == secret
    off = [place for place, (x, y) in enumerate(points) if shamir.value_at(polynomial, x) != y]
    assert off == sorted(wrong)


@settings(max_examples=30, deadline=None)
@given(SECRETS, st.integers(1, 8), st.data())
def test_with_one_left_out_the_right_number_is_among_those_found(secret: int, t: int, data: Any) -> None:
    points = shamir.split(secret, t, t + 1, secrets.randbelow)
    place = data.draw(st.integers(0, t))
    points[place] = points[place][0], secrets.randbelow(PRIME)
    weights = shamir.weights_at_zero([x for x, _ in points])
    found = shamir.each_left_out(points, weights)
    assert found[place] == secret
    for left_out, number in enumerate(found):
        assert number == shamir.combine(points[:left_out] + points[left_out + 1 :])


@given(st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=9, unique=True))
def test_indices_may_be_any(xs: list[int]) -> None:
    assume(len(set(xs)) == len(xs))
    line = [(x, (7 + 3 * x) % PRIME) for x in xs]
    assert len(xs) < 2 or shamir.combine(line) == 7


def test_too_many_wrong_shares_are_not_believed() -> None:
    points = shamir.split(9, 3, 7, secrets.randbelow)
    points[:3] = [(x, secrets.randbelow(PRIME)) for x, _ in points[:3]]
    assert shamir.decode(points, 3) is None


@pytest.mark.parametrize(
    "points",
    [
        [(0, 5), (1, 5)],
        [(-1, 5)],
        [(1, 5), (1, 5)],
        [(1, 5), (2, PRIME)],
        [(1, -1)],
        [(PRIME, 1)],
    ],
)
def test_points_that_are_none(points: list[tuple[int, int]]) -> None:
    with pytest.raises(BadShare):
        shamir.combine(points)
    with pytest.raises(BadShare):
        shamir.decode(points, 1)


def test_numbers_that_are_no_secret() -> None:
    assert shamir.secret_bytes(1) == bytes(31) + b"\1"
    assert shamir.secret_bytes(2**256 - 1) == b"\xff" * 32
    for number in (2**256, PRIME - 1, -1):
        with pytest.raises(BadShare):
            shamir.secret_bytes(number)


@pytest.mark.parametrize(("secret", "t", "n"), [(1, 0, 3), (1, 4, 3), (1, 1, 0), (-1, 2, 3), (PRIME, 2, 3)])
def test_shares_that_cannot_be_made(secret: int, t: int, n: int) -> None:
    with pytest.raises(ValueError, match="no "):
        shamir.split(secret, t, n, secrets.randbelow)
