"""How far an update is from its model, against NumPy on whole arrays in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedcore.aggregation.bounds import BLOCK, Sent, bring_nearer, distance
from fedcore.aggregation.rules import rule_named

SIZE = 7
RNG = np.random.default_rng(3)
MODEL = {"a": RNG.standard_normal(2 * BLOCK + 5).astype(np.float32), "b": np.float32([0.5])}
MOVED = {
    name: (values + RNG.standard_normal(values.size) / 100).astype(np.float32)
    for name, values in MODEL.items()
}


def true_distance(update: dict[str, np.ndarray]) -> float:
    """The norm over all values at once."""
    return math.sqrt(sum(float(np.sum(np.square(values.astype(np.float64)))) for values in update.values()))


TRUE = true_distance({name: MOVED[name].astype(np.float64) - MODEL[name] for name in MODEL})


def sent_as(kind: Sent) -> dict[str, np.ndarray]:
    """The same move as a client sends it under a rule."""
    wide = {name: (MOVED[name].astype(np.float64), MODEL[name].astype(np.float64)) for name in MODEL}
    match kind:
        case Sent.PRODUCT:
            sent = {name: SIZE * own for name, (own, _) in wide.items()}
        case Sent.MOVE:
            sent = {name: own - base for name, (own, base) in wide.items()}
        case Sent.MOVE_PER_STEP:
            sent = {name: (own - base) / SIZE for name, (own, base) in wide.items()}
    return {name: values.astype(np.float32) for name, values in sent.items()}


@pytest.mark.parametrize("kind", Sent)
def test_the_distance_is_that_of_the_weights_whatever_travels(kind: Sent) -> None:
    assert distance(sent_as(kind), MODEL, lambda name: kind, SIZE) == pytest.approx(TRUE, rel=1e-4)


def test_the_distance_is_summed_in_double_precision() -> None:
    """Ten million times the smallest step of a float32 at 1: single precision would lose half of the digits."""
    base = {"w": np.ones(1 << 20, np.float32)}
    step = np.nextafter(np.float32(1), np.float32(2))
    update = {"w": np.full(1 << 20, step)}
    expected = float(step - np.float32(1)) * 1024
    assert distance(update, base, lambda name: Sent.PRODUCT, 1) == pytest.approx(expected, rel=1e-12)


def test_only_what_was_sent_counts() -> None:
    one = {"b": sent_as(Sent.PRODUCT)["b"]}
    expected = abs(float(MOVED["b"][0]) - float(MODEL["b"][0]))
    assert distance(one, MODEL, lambda name: Sent.PRODUCT, SIZE) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, BLOCK, 2 * BLOCK + 4])
@pytest.mark.parametrize("kind", Sent)
def test_the_distance_shows_a_value_that_is_not_finite(bad: float, place: int, kind: Sent) -> None:
    update = sent_as(kind)
    update["a"][place] = bad
    assert not math.isfinite(distance(update, MODEL, lambda name: kind, SIZE))


def test_the_largest_finite_values_have_a_distance() -> None:
    update = {"b": np.float32([np.finfo(np.float32).max])}
    assert math.isfinite(distance(update, MODEL, lambda name: Sent.MOVE_PER_STEP, 65535))


@pytest.mark.parametrize("kind", Sent)
def test_an_update_is_brought_nearer_in_its_own_memory(kind: Sent) -> None:
    update = sent_as(kind)
    before = {name: values.copy() for name, values in update.items()}
    bring_nearer(update, MODEL, lambda name: kind, SIZE, 0.25)
    assert distance(update, MODEL, lambda name: kind, SIZE) == pytest.approx(TRUE / 4, rel=1e-4)
    if kind is Sent.PRODUCT:
        wanted = MODEL["a"] + (before["a"] / SIZE - MODEL["a"]) / 4
        np.testing.assert_allclose(update["a"] / SIZE, wanted, atol=1e-6)
    else:
        np.testing.assert_allclose(update["a"], before["a"] / 4)


def test_each_rule_says_what_clients_send() -> None:
    """As the rules' own sums have it; see their modules."""
    assert rule_named("FedAvg").sent("w") is rule_named("FedProx").sent("w") is Sent.PRODUCT
    scaffold = rule_named("Scaffold", 9)
    assert (scaffold.sent("w"), scaffold.sent("control.w")) == (Sent.PRODUCT, Sent.MOVE)
    assert rule_named("FedNova").sent("w") is Sent.MOVE_PER_STEP
