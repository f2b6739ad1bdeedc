"""The Gaussian mechanism: how much noise, what it costs, and that it is noise."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.privacy.vectors import VECTORS

from fedcore.errors import NonFinite
from fedcore.privacy import gaussian
from fedcore.privacy.gaussian import Clip, Spent

CASES = VECTORS["sigma"]["cases"]
LITTLE_TOLERANCE = 1e-6  # of delta, of the original's search


def chance(seed: int) -> Any:
    return random.Random(seed).randbytes


def single(number: float) -> float:
    return float(np.float32(number))


def delta_by_integration(epsilon: float, mu: float) -> float:
    """The definition: by how much one distribution exceeds exp(epsilon) times the other."""
    x = np.linspace(-40, 40 + mu, 4_000_001)
    gap = np.exp(-((x - mu) ** 2) / 2) - np.exp(np.minimum(epsilon - x**2 / 2, 700))
    return float(np.maximum(gap, 0).sum() * (x[1] - x[0]) / math.sqrt(2 * math.pi))


def sigma_by_the_original(epsilon: float, delta: float, clip: float) -> float:
    """The original's procedure, with its error function in float32 and its tolerance."""

    def cumulative(x: float) -> float:
        argument = x / math.sqrt(2)
        step = argument / 10000
        terms = np.exp(-((np.arange(1, 10000) * step) ** 2)) * 2
        total = 1 + float(terms.sum()) + math.exp(-((10000 * step) ** 2))
        return 0.5 * (1 + single(total * step / math.sqrt(math.pi)))

    def excess(v: float, side: int) -> float:
        return cumulative(side * math.sqrt(epsilon * v)) - math.exp(epsilon) * cumulative(
            -math.sqrt(epsilon * (v + 2))
        )

    side = 1 if delta > excess(0, 1) else -1
    low, high = 0.0, 1.0
    while (excess(high, 1) <= delta) if side > 0 else (excess(high, -1) > delta):
        low, high = high, 2 * high
    for _ in range(1001):
        middle = low + (high - low) / 2
        found = excess(middle, side)
        if found <= delta and delta - found <= LITTLE_TOLERANCE:
            break
        if (found <= delta) == (side > 0):
            low = middle
        else:
            high = middle
    alpha = math.sqrt(1 + middle / 2) - side * math.sqrt(middle / 2)
    return alpha * clip / math.sqrt(2 * epsilon)


@pytest.mark.parametrize(("epsilon", "delta", "clip", "sigma"), CASES)
def test_the_noise_is_the_originals_but_for_its_rounding(
    epsilon: float, delta: float, clip: float, sigma: float
) -> None:
    epsilon, delta, clip = single(epsilon), single(delta), float(clip)
    assert sigma_by_the_original(epsilon, delta, clip) == pytest.approx(sigma, rel=1e-9)
    ours = gaussian.sigma_of(epsilon, delta, clip)
    assert gaussian.delta_of(epsilon, clip / ours) == pytest.approx(delta, rel=1e-9)
    # exp(epsilon) multiplies an error function in float32: the original is off by some percents of delta or less.
    assert ours == pytest.approx(sigma, rel=0.011)
    if epsilon <= 1:
        assert delta - 2 * LITTLE_TOLERANCE <= gaussian.delta_of(epsilon, clip / sigma) <= delta


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 8.0])
@pytest.mark.parametrize("mu", [5e-5, 0.5, 2.0, 7.0])
def test_delta_is_what_the_definition_says(epsilon: float, mu: float) -> None:
    expected = delta_by_integration(epsilon, mu)
    assert gaussian.delta_of(epsilon, mu) == pytest.approx(expected, rel=1e-6, abs=1e-14)


def test_delta_far_out_is_what_the_definition_says() -> None:
    assert gaussian.delta_of(1000, 40) == pytest.approx(delta_by_integration(1000, 40), rel=1e-6)


@given(st.floats(1e-3, 1e6), st.floats(1e-12, 0.999))
@settings(max_examples=60, deadline=None)
def test_calibration_keeps_its_promise_and_wastes_nothing(epsilon: float, delta: float) -> None:
    mu = gaussian.mu_of(epsilon, delta)
    assert gaussian.delta_of(epsilon, mu) <= delta
    assert gaussian.delta_of(epsilon, mu * 1.001) > delta
    assert gaussian.epsilon_of(delta, mu) == pytest.approx(epsilon, rel=1e-6)


def test_extreme_terms_overflow_nothing() -> None:
    """The original's exp(epsilon) is infinite from 710 on, and its noise not a number."""
    assert gaussian.mu_of(1e30, 0.01) == pytest.approx(math.sqrt(2e30), rel=1e-6)
    assert gaussian.mu_of(1e-30, 1e-10) == pytest.approx(1e-10 * math.sqrt(2 * math.pi), rel=1e-6)


# ---- the account


def test_updates_of_one_mu_cost_what_one_of_their_root_does() -> None:
    spent = Spent()
    for _ in range(9):
        spent = spent.with_update(0.5)
    assert spent.updates == 9
    assert spent.epsilon(1e-5) == pytest.approx(gaussian.epsilon_of(1e-5, 1.5))
    assert spent.epsilon_of_any(1e-5) == pytest.approx(gaussian.epsilon_of(1e-5, 3.0))
    assert Spent().epsilon(1e-5) == 0


@given(st.floats(0.01, 5), st.integers(1, 50))
@settings(max_examples=40, deadline=None)
def test_the_account_only_grows_and_beats_adding_up(mu: float, updates: int) -> None:
    once, often = Spent(1, mu * mu), Spent(updates, updates * mu * mu)
    assert once.epsilon(1e-6) <= often.epsilon(1e-6) <= often.epsilon_of_any(1e-6)
    zcdp = often.mu_squared / 2 + 2 * math.sqrt(often.mu_squared / 2 * math.log(1e6))
    assert often.epsilon(1e-6) <= zcdp


# ---- the clip bound


def test_the_first_iteration_sets_the_bound_and_later_ones_lower_it() -> None:
    clip = Clip()
    assert clip.bound == 0.05
    clip = clip.after(1, 0.5, 4.0)
    assert clip.bound == 2.0
    assert clip.after(2, 0.5, 8.0).bound == 2.0
    assert clip.after(2, 0.5, 1.0).bound == 0.5
    assert Clip().after(7, 1.0, 3.0).bound == 0.05, "who comes late can only go down"


def test_a_model_that_does_not_move_leaves_the_noise_as_it_is() -> None:
    assert Clip(2.0).after(1, 1.0, 0.0).bound == 2.0
    assert Clip(2.0).after(5, 1.0, 1e-9, floor=0.25).bound == 0.25


# ---- the noise


def test_distance_is_over_what_both_models_have() -> None:
    one = {"a": np.float32([3, 0]), "b": np.float32([4]), "c": np.float32([9])}
    assert gaussian.distance(one, {name: one[name] * 0 for name in ("a", "b")}) == 5


def test_normals_are_normal() -> None:
    values = gaussian.normals(200_001, chance(1))
    assert values.shape == (200_001,)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    shares = [(np.abs(values) < bound).mean() for bound in (1, 2, 3)]
    assert shares == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.005)
    assert abs(np.corrcoef(values[:100_000], values[100_001:])[0, 1]) < 0.02
    assert np.isfinite(gaussian.normals(2, bytes)).all(), "the worst of chances"


def test_a_long_change_is_clipped_and_a_short_one_is_not() -> None:
    base = {"a": np.zeros(4, np.float32), "b": np.ones(1, np.float32), "unsent": np.ones(1, np.float32)}
    trained = {"a": np.float32([3, 0, 0, 0]), "b": np.float32([5])}
    sent = gaussian.privatise(trained, base, 1.0, 1e-4, chance(2))
    assert list(sent) == ["a", "b"]
    np.testing.assert_allclose(sent["a"], [0.6, 0, 0, 0], atol=1e-3)
    np.testing.assert_allclose(sent["b"], [1.8], atol=1e-3)
    sent = gaussian.privatise(trained, base, 10.0, 1e-4, chance(2))
    np.testing.assert_allclose(sent["a"], [3, 0, 0, 0], atol=1e-3)


def test_the_noise_has_its_size_and_lies_on_a_grid() -> None:
    base = {"a": np.zeros(50_000, np.float32)}
    sent = gaussian.privatise(base, base, 1.0, 0.5, chance(3))["a"]
    assert sent.dtype == np.float32
    assert sent.std() == pytest.approx(0.5, rel=0.02)
    grid = 0.5 / 1024
    np.testing.assert_array_equal(np.rint(sent / grid) * grid, sent)
    again = gaussian.privatise(base, base, 1.0, 0.5, chance(4))["a"]
    assert np.mean(again == sent) < 0.01


def test_what_leaves_float32_is_refused() -> None:
    base = {"a": np.full(1000, 3.4e38, np.float32)}
    with pytest.raises(NonFinite, match="'a' is too large"):
        gaussian.privatise(base, base, 1e37, 1e37, chance(5))
