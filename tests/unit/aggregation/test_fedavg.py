"""The mean of weighted updates, against the same sums written down plainly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.aggregation import fedavg
from fedcore.aggregation.fedavg import BLOCK, RunningSum, WeightedUpdate
from fedcore.wire.arrays import Layout, Weight

LAYOUT = Layout(
    (
        Weight("conv", (3, 2)),
        Weight("bias", ()),
        Weight("head", (5,)),
        Weight("frozen", (4,), aggregated=False),
    )
)
Model = dict[str, npt.NDArray[np.floating]]


def reference(
    layout: Layout, updates: Sequence[WeightedUpdate], previous: dict[str, npt.NDArray[np.float32]]
) -> Model:
    """The definition: for each weight, the sum over those who sent it, divided by their data sizes."""
    model: Model = {}
    for weight in layout:
        senders = [update for update in updates if weight.name in update.weights]
        if not weight.aggregated or not senders:
            model[weight.name] = previous[weight.name]
            continue
        total = np.zeros(weight.size, np.float64)
        for update in senders:
            total = total + update.weights[weight.name].astype(np.float64)
        model[weight.name] = total / sum(update.data_size for update in senders)
    return model


def arrays(layout: Layout, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    chance = np.random.default_rng(seed)
    return {weight.name: chance.standard_normal(weight.size).astype(np.float32) for weight in layout}


def updates_of(layout: Layout, shapes: Sequence[tuple[int, int, Sequence[str]]]) -> list[WeightedUpdate]:
    """Make updates of (seed, data size, names); every value is multiplied by the data size, as devices do."""
    made = []
    for seed, data_size, names in shapes:
        values = arrays(layout, seed)
        weights = {name: values[name] * np.float32(data_size) for name in names}
        made.append(WeightedUpdate(weights, data_size))
    return made


def assert_same(model: Model, expected: Model) -> None:
    assert list(model) == list(expected)
    for name in expected:
        np.testing.assert_allclose(model[name], expected[name], rtol=1e-12, err_msg=name)


NAMES = [weight.name for weight in LAYOUT]
ANY_UPDATE = st.tuples(
    st.integers(0, 1000), st.integers(1, 65535), st.lists(st.sampled_from(NAMES), unique=True)
)
PREVIOUS = arrays(LAYOUT, 424242)


def summed(updates: Sequence[WeightedUpdate], layout: Layout = LAYOUT, batch: int = 3) -> RunningSum:
    sums = RunningSum(layout)
    for start in range(0, len(updates), batch):
        sums.add(updates[start : start + batch])
    return sums


@given(st.lists(ANY_UPDATE, max_size=12), st.integers(1, 12))
def test_the_mean_is_that_of_those_who_sent_the_weight(
    shapes: list[tuple[int, int, list[str]]], batch: int
) -> None:
    updates = updates_of(LAYOUT, shapes)
    model = summed(updates, batch=batch).mean(PREVIOUS)
    assert_same(model, reference(LAYOUT, updates, PREVIOUS))


@given(st.lists(ANY_UPDATE, max_size=10), st.integers(0, 10), st.integers(0, 10))
def test_partial_sums_add_up_to_the_whole(
    shapes: list[tuple[int, int, list[str]]], first: int, second: int
) -> None:
    updates = updates_of(LAYOUT, shapes)
    first, second = sorted((first, second))
    parts = [summed(updates[:first]), summed(updates[first:second]), summed(updates[second:])]
    total = RunningSum(LAYOUT)
    for part in parts:
        total.merge(part)
    assert_same(total.mean(PREVIOUS), reference(LAYOUT, updates, PREVIOUS))
    assert total.sizes == summed(updates).sizes


@given(st.permutations(range(8)), st.integers(1, 8))
def test_order_matters_only_in_the_last_digits(order: list[int], batch: int) -> None:
    updates = updates_of(LAYOUT, [(i, 1 + 7919 * i, NAMES) for i in range(8)])
    straight = summed(updates).mean(PREVIOUS)
    shuffled = summed([updates[i] for i in order], batch=batch).mean(PREVIOUS)
    for name in straight:
        np.testing.assert_allclose(straight[name], shuffled[name], rtol=1e-9, atol=1e-12)
        as_sent = [model[name].astype(np.float32) for model in (straight, shuffled)]
        np.testing.assert_allclose(as_sent[0], as_sent[1], rtol=2e-7, atol=1e-9)


def test_equal_models_of_any_data_sizes_have_themselves_as_mean() -> None:
    values = {"conv": np.full(6, 0.5, np.float32)}
    sizes = [1, 3, 65535, 40000]
    updates = [WeightedUpdate({"conv": values["conv"] * np.float32(n)}, n) for n in sizes]
    np.testing.assert_array_equal(summed(updates).mean(PREVIOUS)["conv"], values["conv"])


def test_data_sizes_are_weights() -> None:
    layout = Layout((Weight("w", (1,)),))
    updates = [
        WeightedUpdate({"w": np.float32([1.0 * 10])}, 10),
        WeightedUpdate({"w": np.float32([5.0 * 30])}, 30),
    ]
    assert summed(updates, layout).mean({"w": np.zeros(1, np.float32)})["w"].tolist() == [4.0]


def test_single_precision_would_lose_what_this_keeps() -> None:
    """Thousands of products of 65535: a float32 sum would be off in the third digit."""
    layout = Layout((Weight("w", (1,)),))
    update = WeightedUpdate({"w": np.float32([0.1]) * np.float32(65535)}, 65535)
    sums = RunningSum(layout)
    for _ in range(500):
        sums.add([update] * 8)
    exact = float(update.weights["w"][0]) / 65535
    assert sums.mean({"w": np.zeros(1, np.float32)})["w"][0] == pytest.approx(exact, rel=1e-13)


class TestWhatStays:
    def test_without_updates_everything(self) -> None:
        model = RunningSum(LAYOUT).mean(PREVIOUS)
        assert_same(model, dict(PREVIOUS))

    def test_a_weight_that_nobody_sent(self) -> None:
        model = summed(updates_of(LAYOUT, [(1, 10, ["head"])])).mean(PREVIOUS)
        for name in ("conv", "bias", "frozen"):
            np.testing.assert_array_equal(model[name], PREVIOUS[name])
        assert not np.array_equal(model["head"], PREVIOUS["head"])

    def test_a_weight_that_is_not_aggregated_whoever_sends_it(self) -> None:
        sums = summed(updates_of(LAYOUT, [(1, 10, NAMES)]))
        np.testing.assert_array_equal(sums.mean(PREVIOUS)["frozen"], PREVIOUS["frozen"])
        assert "frozen" not in sums.sizes
        assert sums.sums.size == 12

    def test_a_sum_of_zero_is_a_mean_of_zero(self) -> None:
        """What counts is whether somebody sent a weight, not what."""
        updates = [WeightedUpdate({"head": np.zeros(5, np.float32)}, 7)]
        np.testing.assert_array_equal(summed(updates).mean(PREVIOUS)["head"], np.zeros(5))

    def test_the_model_before_is_left_alone(self) -> None:
        before = {name: values.copy() for name, values in PREVIOUS.items()}
        summed(updates_of(LAYOUT, [(1, 10, NAMES)])).mean(PREVIOUS)
        for name, values in before.items():
            np.testing.assert_array_equal(PREVIOUS[name], values)

    def test_the_sums_are_not_changed_by_their_mean(self) -> None:
        sums = summed(updates_of(LAYOUT, [(1, 10, NAMES)]))
        first = sums.mean(PREVIOUS)
        assert_same(sums.mean(PREVIOUS), first)


class TestBlocks:
    """A weight longer than a block is added piece by piece."""

    @pytest.mark.parametrize("size", [1, 6, 7, 8, 14, 15, 20])
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_no_element_is_left_out_or_added_twice(
        self, monkeypatch: pytest.MonkeyPatch, size: int, count: int
    ) -> None:
        monkeypatch.setattr(fedavg, "BLOCK", 7)
        layout = Layout((Weight("a", (3,)), Weight("w", (size,)), Weight("z", (3,))))
        updates = updates_of(layout, [(i, i + 1, ["a", "w", "z"]) for i in range(count)])
        previous = arrays(layout, 99)
        assert_same(summed(updates, layout).mean(previous), reference(layout, updates, previous))

    def test_at_the_real_length(self) -> None:
        layout = Layout((Weight("w", (BLOCK + 3,)), Weight("v", (2,))))
        updates = updates_of(layout, [(i, i + 1, ["w", "v"][i % 2 :]) for i in range(3)])
        previous = arrays(layout, 99)
        assert_same(summed(updates, layout).mean(previous), reference(layout, updates, previous))

    def test_views_that_are_not_aligned(self) -> None:
        """Weights lie where the device's buffer puts them."""
        raw = bytearray(4 * 5 + 1)
        raw[1:] = np.arange(5, dtype="<f4").tobytes()
        layout = Layout((Weight("w", (5,)),))
        view = np.frombuffer(raw, "<f4", 5, 1)
        model = summed([WeightedUpdate({"w": view}, 1)], layout).mean(arrays(layout, 1))
        assert model["w"].tolist() == [0, 1, 2, 3, 4]


class TestMemory:
    def test_clear_begins_anew_in_the_same_place(self) -> None:
        sums = summed(updates_of(LAYOUT, [(1, 10, NAMES)]))
        memory = sums.sums
        sums.clear()
        assert sums.sums is memory
        assert not memory.any()
        assert_same(sums.mean(PREVIOUS), dict(PREVIOUS))
        updates = updates_of(LAYOUT, [(2, 3, ["bias"])])
        sums.add(updates)
        assert_same(sums.mean(PREVIOUS), reference(LAYOUT, updates, PREVIOUS))

    def test_updates_are_read_only(self) -> None:
        values = np.ones(5, np.float32)
        values.flags.writeable = False
        summed([WeightedUpdate({"head": values}, 1)])
        assert values.tolist() == [1.0] * 5
