"""Who a connection is counted for, and how many requests each may send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.net.parties import Allowance, Headcount, party_of


@pytest.mark.parametrize(
    ("host", "party"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2::", "2001:db8:1:2::"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("fe80::1%eth0", "fe80::"),
        ("", ""),
        ("no:address", "no:address"),
    ],
)
def test_a_party_is_an_address_or_a_subscribers_prefix(host: str, party: str) -> None:
    assert party_of(host) == party


def test_a_headcount_forgets_who_has_left() -> None:
    count = Headcount(2)
    count.enter("a")
    assert not count.full("a")
    count.enter("a")
    assert count.full("a")
    assert not count.full("b")
    count.leave("a")
    assert not count.full("a")
    count.leave("a")
    assert count["a"] == 0
    assert not count._counts


def test_a_headcount_without_a_bound_is_never_full() -> None:
    count = Headcount()
    for _ in range(100):
        count.enter("a")
    assert not count.full("a")


def test_an_allowance_is_spent_and_comes_back() -> None:
    allowance = Allowance(2.0, 3)
    assert [allowance.take("a", 10.0) for _ in range(4)] == [True, True, True, False]
    assert allowance.take("b", 10.0)
    assert [allowance.take("a", 10.5) for _ in range(2)] == [True, False]
    assert [allowance.take("a", 99.0) for _ in range(4)] == [True, True, True, False]


def test_an_allowance_without_a_rate_keeps_nothing() -> None:
    allowance = Allowance(0.0, 1)
    assert all(allowance.take("a", 0.0) for _ in range(100))
    assert not len(allowance)


def test_an_allowance_forgets_full_buckets_only() -> None:
    allowance = Allowance(1.0, 5)
    for _ in range(5):
        allowance.take("a", 0.0)
    allowance.take("b", 4.0)
    allowance.forget(5.0)
    assert len(allowance) == 1
    allowance.forget(4.9)
    assert not allowance.take("b", 4.0) or len(allowance) == 1


@given(st.lists(st.floats(0.0, 1.0), max_size=200), st.integers(1, 10), st.floats(0.1, 50.0))
def test_nobody_gets_more_than_the_rate_and_the_burst(pauses: list[float], burst: int, rate: float) -> None:
    """Over any time t, at most burst + rate t requests pass; forgetting changes nothing."""
    allowance, now, passed = Allowance(rate, burst), 0.0, 0
    for pause in pauses:
        now += pause
        passed += allowance.take("a", now)
        allowance.forget(now)
        assert passed <= burst + rate * now + 1e-6
