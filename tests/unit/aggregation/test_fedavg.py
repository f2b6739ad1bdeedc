"""The mean of weighted updates, against the same sums written down plainly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.aggregation.arithmetic import Doubles
from fedcore.aggregation.fedavg import FedAvg
from fedcore.aggregation.rule import Total
from fedcore.aggregation.sums import RunningSum, Spans
from fedcore.wire.arrays import Floats, Layout, Weight

LAYOUT = Layout(
    (
        Weight("conv", (3, 2)),
        Weight("bias", ()),
        Weight("head", (5,)),
        Weight("frozen", (4,), aggregated=False),
    )
)
SPANS = Spans(LAYOUT)
NAMES = [weight.name for weight in LAYOUT]


@dataclass
class Partial:
    """What a ledger gives when it is sealed."""

    sums: Doubles
    sizes: npt.NDArray[np.uint64]


@dataclass
class Update:
    weights: Mapping[str, Floats]
    data_size: int


def arrays(layout: Layout, seed: int) -> dict[str, Floats]:
    chance = np.random.default_rng(seed)
    return {weight.name: chance.standard_normal(weight.size).astype(np.float32) for weight in layout}


PREVIOUS = arrays(LAYOUT, 424242)


def updates_of(shapes: Sequence[tuple[int, int, Sequence[str]]]) -> list[Update]:
    """Make updates of (seed, data size, names); every value is multiplied by the data size, as devices do."""
    made = []
    for seed, data_size, names in shapes:
        values = arrays(LAYOUT, seed)
        made.append(Update({name: values[name] * np.float32(data_size) for name in names}, data_size))
    return made


def partial(updates: Sequence[Update]) -> Partial:
    made = Partial(np.zeros(SPANS.total), np.zeros(len(SPANS.names), np.uint64))
    for update in updates:
        for index, (name, span) in enumerate(SPANS):
            if name in update.weights:
                made.sums[span] += update.weights[name]
                made.sizes[index] += np.uint64(update.data_size)
    return made


def mean_of(partials: Sequence[Partial], keep: bool = True) -> dict[str, npt.NDArray[np.floating]]:
    """The model of all partials, added one after another, before it is rounded."""
    total = RunningSum(SPANS)
    for part in partials:
        total.add(part, keep=keep)
    return finished(total.sums, total.sizes)


def finished(sums: Doubles, sizes: npt.NDArray[np.uint64]) -> dict[str, npt.NDArray[np.floating]]:
    total = Total(SPANS, sums, sizes, 0, 0)  # FedAvg looks at no other figures
    return {**PREVIOUS, **dict(FedAvg().finish(total, PREVIOUS.__getitem__))}


def exact(updates: Sequence[Update], name: str, element: int) -> Fraction | None:
    """The definition, without rounding: the sum over those who sent a weight, divided by their data sizes."""
    senders = [update for update in updates if name in update.weights]
    if not senders:
        return None
    total = sum((Fraction(float(update.weights[name][element])) for update in senders), Fraction())
    return total / sum(update.data_size for update in senders)


def assert_is_the_mean(model: Mapping[str, npt.NDArray[np.floating]], updates: Sequence[Update]) -> None:
    assert list(model) == list(PREVIOUS)
    for weight in LAYOUT:
        for element in range(weight.size):
            expected = exact(updates, weight.name, element) if weight.aggregated else None
            if expected is None:
                assert model[weight.name][element] == PREVIOUS[weight.name][element]
            else:
                largest = max(abs(u.weights[weight.name]).max() for u in updates if weight.name in u.weights)
                assert abs(float(model[weight.name][element]) - expected) <= 1e-14 * largest


ANY_UPDATE = st.tuples(
    st.integers(0, 1000), st.integers(1, 65535), st.lists(st.sampled_from(NAMES), unique=True)
)


@given(st.lists(ANY_UPDATE, max_size=10), st.lists(st.integers(0, 10), max_size=3))
def test_the_mean_is_that_of_those_who_sent_the_weight(
    shapes: list[tuple[int, int, list[str]]], cuts: list[int]
) -> None:
    """However the updates are spread over ledgers, some of them empty."""
    updates = updates_of(shapes)
    bounds = [0, *sorted(min(cut, len(updates)) for cut in cuts), len(updates)]
    partials = [partial(updates[a:b]) for a, b in pairwise(bounds)]
    assert_is_the_mean(mean_of(partials), updates)


@given(st.lists(ANY_UPDATE, min_size=1, max_size=6))
def test_the_same_partials_in_the_same_order_give_the_same_bytes(
    shapes: list[tuple[int, int, list[str]]],
) -> None:
    partials = [partial([update]) for update in updates_of(shapes)]
    first, second = (mean_of(partials) for _ in range(2))
    assert [values.tobytes() for values in first.values()] == [values.tobytes() for values in second.values()]


@pytest.mark.parametrize("count", [1, 2])
def test_partials_and_the_model_before_are_left_alone(count: int) -> None:
    partials = [partial(updates_of([(i, 10, NAMES)])) for i in range(count)]
    sums = [(p.sums.copy(), p.sizes.copy()) for p in partials]
    before = {name: values.copy() for name, values in PREVIOUS.items()}
    model = mean_of(partials)
    for p, (values, sizes) in zip(partials, sums, strict=True):
        np.testing.assert_array_equal(p.sums, values)
        np.testing.assert_array_equal(p.sizes, sizes)
        assert not any(np.shares_memory(p.sums, model[name]) for name in SPANS.names)
    for name, values in before.items():
        np.testing.assert_array_equal(PREVIOUS[name], values)


def test_equal_models_of_any_data_sizes_have_themselves_as_mean() -> None:
    values = np.full(6, 0.5, np.float32)
    updates = [Update({"conv": values * np.float32(n)}, n) for n in (1, 3, 65535, 40000)]
    np.testing.assert_array_equal(mean_of([partial(updates)])["conv"], values)


def test_data_sizes_are_weights() -> None:
    updates = [Update({"bias": np.float32([10.0])}, 10), Update({"bias": np.float32([150.0])}, 30)]
    assert mean_of([partial(updates)])["bias"].tolist() == [4.0]


def test_single_precision_would_lose_what_this_keeps() -> None:
    """Thousands of products of 65535: a float32 sum would be off in the third digit."""
    update = Update({"bias": np.float32([0.1]) * np.float32(65535)}, 65535)
    model = mean_of([partial([update] * 2000), partial([update] * 2000)])
    expected = float(update.weights["bias"][0]) / 65535
    assert model["bias"].dtype == np.float64
    assert model["bias"][0] == pytest.approx(expected, rel=1e-13)


class TestWhatStays:
    def test_without_updates_everything(self) -> None:
        assert_is_the_mean(mean_of([]), [])
        assert_is_the_mean(mean_of([partial([]), partial([])]), [])

    def test_a_weight_that_nobody_sent_or_that_is_not_aggregated(self) -> None:
        model = mean_of([partial(updates_of([(1, 10, ["head", "frozen"])]))])
        for name in ("conv", "bias", "frozen"):
            np.testing.assert_array_equal(model[name], PREVIOUS[name])
        assert not np.array_equal(model["head"], PREVIOUS["head"])

    def test_a_sum_of_zero_is_a_mean_of_zero(self) -> None:
        """What counts is whether somebody sent a weight, not what."""
        updates = [Update({"head": np.zeros(5, np.float32)}, 7)]
        np.testing.assert_array_equal(mean_of([partial(updates)])["head"], np.zeros(5))

    def test_sizes_beyond_double_precision_are_exact_integers(self) -> None:
        sums = np.full(SPANS.total, 2.0**60)
        sizes = np.full(len(SPANS.names), 2**60, np.uint64)
        np.testing.assert_array_equal(finished(sums, sizes)["head"], np.ones(5))
