"""SignDS: how many positions, which ones, and that no position says more than it may."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from unit.privacy.vectors import VECTORS

from fedcore.privacy import signds

CASES = VECTORS["positions"]["cases"]


def chance(seed: int) -> Any:
    return random.Random(seed).randbytes


@pytest.mark.parametrize(("ratio", "top", "size", "epsilon", "told", "threshold"), CASES)
def test_as_many_positions_are_told_as_by_the_original(
    ratio: float, top: int, size: int, epsilon: float, told: int, threshold: int
) -> None:
    choice = signds.choice_of(size, top / size, epsilon, ratio)
    assert (choice.top, choice.told, choice.threshold) == (top, told, threshold)
    again = signds.choice_of(size, top / size, epsilon, ratio, told)
    assert (again.told, again.threshold) == (told, threshold)


@pytest.mark.parametrize("told", [1, 3, 6])
def test_the_chances_are_the_hypergeometric_ones_tilted(told: int) -> None:
    choice = signds.choice_of(12, 0.25, 2.0, 0.6, told)
    ways = [math.comb(3, v) * math.comb(9, told - v) for v in range(told + 1)]
    tilted = [way * (math.exp(2) if v >= choice.threshold else 1) for v, way in enumerate(ways)]
    np.testing.assert_allclose(choice.chances, np.array(tilted) / sum(tilted), rtol=1e-12)


def test_large_models_and_small_ones_have_a_choice() -> None:
    """In doubles the coefficients of the first overflow; of the second, one hundredth is nothing."""
    huge = signds.choice_of(50_000_000, 0.25, 100.0, 0.5, 50)
    assert huge.told == 50
    assert np.isfinite(huge.chances).all()
    assert huge.chances.sum() == pytest.approx(1)
    tiny = signds.choice_of(3, 0.01, 1.0, 0.6)
    assert (tiny.top, tiny.told) == (1, 1)
    assert signds.choice_of(3, 0.25, 1.0, 0.6, 50).told == 3
    assert signds.choice_of(10_000, 0.25, 100.0, 0.5).told <= signds.MOST_POSITIONS


def test_positions_come_ascending_and_mostly_from_the_top() -> None:
    change = np.random.default_rng(5).normal(size=1000).astype(np.float32)
    choice = signds.choice_of(1000, 0.02, 100.0, 0.6)
    for sign in (1, -1):
        top = set(np.argsort(-sign * change, kind="stable")[:20].tolist())
        told = signds.select(change, sign, choice, chance(6))
        assert told.dtype == np.int32
        assert len(told) == 33
        assert (np.diff(told) > 0).all()
        assert len(top & set(told.tolist())) >= choice.threshold


def test_equal_changes_are_ordered_by_position() -> None:
    choice = signds.choice_of(5000, 0.001, 100.0, 0.6, 5)
    assert choice.threshold == 5
    for sign in (1, -1):
        assert signds.select(np.zeros(5000, np.float32), sign, choice, chance(7)).tolist() == [0, 1, 2, 3, 4]


def test_no_update_is_more_likely_than_its_epsilon_allows() -> None:
    """All sets of two out of six, by what was drawn and by what was computed."""
    epsilon, draws = 1.0, 30_000
    choice = signds.choice_of(6, 0.34, epsilon, 0.6, 2)
    assert choice.top == 2
    change = np.float32([9, 8, 0, 0, 0, 0])
    source = chance(8)
    seen = Counter(tuple(signds.select(change, 1, choice, source).tolist()) for _ in range(draws))
    assert set(seen) == set(combinations(range(6), 2))
    for told, times in seen.items():
        of_top = len({0, 1} & set(told))
        one = choice.chances[of_top] / (math.comb(2, of_top) * math.comb(4, 2 - of_top))
        assert times / draws == pytest.approx(one, abs=5 * math.sqrt(one / draws))
    ways = [math.comb(2, v) * math.comb(4, 2 - v) for v in range(3)]
    each = np.array(choice.chances) / ways
    assert math.log(each.max() / each.min()) == pytest.approx(epsilon)


def test_the_coin_is_fair() -> None:
    source = chance(9)
    tosses = [signds.coin(source) for _ in range(4000)]
    assert set(tosses) == {1, -1}
    assert abs(sum(tosses)) < 400
