"""How many clients complete a cipher round."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.secagg import thresholds
from fedcore.secagg.thresholds import Thresholds


def test_each_round_is_a_part_of_the_one_before() -> None:
    assert thresholds.of(100, 50, 0.9, 30, signed=True) == Thresholds(90, 81, 73, 66, 45, 41, 37, 31)


def test_no_round_needs_fewer_than_the_updates_or_than_the_reports() -> None:
    assert thresholds.of(100, 90, 0.5, 80, signed=True) == Thresholds(90, 90, 90, 90, 81, 81, 81, 81)


def test_products_are_those_of_float32() -> None:
    # 0.1 is a little more than a tenth in float32; 30 of them are 3 in float32 and more than 3 in double precision.
    assert thresholds.of(30, 1, 0.1, 1, signed=False).exchange_keys == 3


def test_without_signatures_there_are_no_rounds_for_them() -> None:
    assert thresholds.of(4, 4, 1.0, 2, signed=False)[5:] == (0, 0, 3)


def test_a_job_with_too_few_shares_is_told() -> None:
    assert thresholds.of(4, 4, 1.0, 3, signed=False).enough
    assert not thresholds.of(4, 4, 1.0, 4, signed=False).enough


@given(
    st.integers(1, 10_000),
    st.integers(1, 10_000),
    st.floats(0.015625, 1.0, width=32),
    st.integers(1, 10_000),
)
def test_rounds_never_grow(start: int, update: int, ratio: float, t: int) -> None:
    of = thresholds.of(max(start, update), update, ratio, t, signed=True)
    assert of[:4] == tuple(sorted(of[:4], reverse=True)) and of[3] >= update
    assert of[4:] == tuple(sorted(of[4:], reverse=True)) and of.reconstruct == t + 1


@pytest.mark.parametrize(
    "numbers", [(0, 1, 1.0, 1), (1, 0, 1.0, 1), (1, 1, 0.0, 1), (1, 1, 1.1, 1), (1, 1, 1.0, 0)]
)
def test_numbers_out_of_range_are_refused(numbers: tuple[int, int, float, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        thresholds.of(*numbers, signed=False)
