"""Uploads of a part of the differences: as devices write, and servers judge and read them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from unit.compression.test_quant import single
from unit.compression.vectors import VECTORS

from fedcore.compression import mask, sparse
from fedcore.compression.sparse import Pattern
from fedcore.errors import NonFinite, ShapeMismatch
from fedcore.wire.messages import CompressFeatureMap

F = np.float32
LARGEST = float(np.finfo(F).max)
LAYERS = (("a", 7), ("b", 1), ("c", 12))


def array(numbers: Any) -> Any:
    return np.array(numbers, F)


def pattern_of(seed: int = 1, rate: float = 0.4) -> Pattern:
    return sparse.pattern(LAYERS, mask.draw(seed, rate, 20))


def test_a_device_writes_what_the_original_writes() -> None:
    known = VECTORS["upload_of_a_device"]
    marks = np.array([mark == "1" for mark in known["mask"]])
    size = known["data_size"]
    item = sparse.compress(
        sparse.pattern([("w", 10)], marks),
        {"w": array(known["trained"]) * F(size)},
        {"w": array(known["model"])},
        size,
    )[0]
    assert (item.weight_fullname, item.min_val, item.max_val) == ("w", known["low"], known["high"])
    assert item.compress_data.tolist() == known["steps"]  # type: ignore[union-attr]


def test_a_device_writes_an_empty_range_where_nothing_is_chosen() -> None:
    known = VECTORS["upload_of_a_device"]["nothing_chosen"]
    pattern = sparse.pattern([("w", 4)], np.zeros(4, np.bool_))
    (item,) = sparse.compress(pattern, {"w": array([1] * 4)}, {"w": array([2] * 4)}, 3)
    assert (item.min_val, item.max_val) == (known["low"], known["high"])
    assert item.compress_data is not None and item.compress_data.size == 0
    assert sparse.fault(pattern, [item]) is None
    with np.errstate(all="raise"):
        assert sparse.restore(item).size == 0


def test_a_server_reads_what_the_original_reads() -> None:
    known = VECTORS["upload_at_a_server"]
    pattern = sparse.pattern([("w", 10)], mask.draw(known["seed"], known["rate"], 10))
    item = CompressFeatureMap("w", np.array(known["steps"], np.int8), known["low"], known["high"])
    assert sparse.fault(pattern, [item]) is None
    weight = sparse.restore_weight(pattern.places["w"], item, array(known["model"]), known["data_size"])
    np.testing.assert_array_equal(weight, array(known["weights"]))


@given(npst.arrays(F, st.integers(1, 30), elements=st.floats(-(2.0**60), 2.0**60, width=32)))
def test_a_device_rounds_as_the_book_says(values: Any) -> None:
    everything = sparse.pattern([("w", len(values))], np.ones(len(values), np.bool_))
    (item,) = sparse.compress(everything, {"w": values}, {"w": np.zeros_like(values)}, 1)
    low, high = float(min(values)), float(max(values))
    scale = single(single(single(high - low) / 255) + single(1e-10))
    book = [
        math.floor(single(single(single(float(value) - low) / scale) - 128) + 0.5)
        for value in values.tolist()
    ]
    assert item.compress_data.tolist() == book  # type: ignore[union-attr]


def test_a_device_rounds_halves_upwards() -> None:
    values = array([0, 255, 126.5, 127.5, 128.5, 127.49999])
    everything = sparse.pattern([("w", 6)], np.ones(6, np.bool_))
    (item,) = sparse.compress(everything, {"w": values}, {"w": np.zeros_like(values)}, 1)
    assert item.compress_data.tolist() == [-128, 127, -1, 0, 1, -1]  # type: ignore[union-attr]


@given(st.data(), st.integers(1, 2**31 - 1), st.floats(0, 1, width=32), st.integers(1, 65535))
def test_a_server_gets_near_what_a_device_has(data: Any, seed: int, rate: float, size: int) -> None:
    pattern = pattern_of(seed, rate)
    numbers = st.floats(-100, 100, width=32)
    model = {name: data.draw(npst.arrays(F, count, elements=numbers)) for name, count in LAYERS}
    trained = {name: data.draw(npst.arrays(F, count, elements=numbers)) * F(size) for name, count in LAYERS}
    items = sparse.compress(pattern, trained, model, size)
    assert sparse.fault(pattern, items) is None
    assert [item.weight_fullname for item in items] == ["a", "b", "c"]
    for item in items:
        name = str(item.weight_fullname)
        places = pattern.places[name]
        found = sparse.restore_weight(places, item, model[name], size)
        wanted = model[name] * F(size)
        wanted[places] = trained[name][places]
        assert np.abs(found - wanted).max() <= 400 * size / 255 * 0.51 + 1e-4 * size
        others = np.setdiff1d(np.arange(len(found)), places)
        np.testing.assert_array_equal(found[others], wanted[others])


class TestPattern:
    def test_lies_over_all_weights_one_behind_the_other(self) -> None:
        marks = mask.draw(1, 0.4, 20)
        pattern = sparse.pattern(LAYERS, marks)
        assert pattern.names == ("a", "b", "c")
        assert pattern.total == 20
        assert {name: places.tolist() for name, places in pattern.places.items()} == {
            "a": [4, 5, 6],
            "b": [],
            "c": [1, 6, 7, 9, 11],
        }

    def test_follows_the_order_of_the_update(self) -> None:
        turned = sparse.pattern(reversed(LAYERS), mask.draw(1, 0.4, 20))
        assert turned.names == ("c", "b", "a")
        assert turned.places["c"].tolist() == [4, 5, 6, 9]

    @pytest.mark.parametrize("layers", [[("a", 10), ("a", 10)], [("a", 19)], [("a", 20), ("b", 1)]])
    def test_fits_the_update(self, layers: list[tuple[str, int]]) -> None:
        with pytest.raises(ShapeMismatch):
            sparse.pattern(layers, mask.draw(1, 0.4, 20))


class TestFault:
    def items(self, **changes: Any) -> list[CompressFeatureMap]:
        """A good update, but for the changes in its last entry."""
        good = [
            CompressFeatureMap(name, np.zeros(places.size, np.int8), -1.0, 1.0)
            for name, places in pattern_of().places.items()
        ]
        return [*good[:-1], replace(good[-1], **changes)]

    def test_none(self) -> None:
        assert sparse.fault(pattern_of(), self.items()) is None
        assert sparse.fault(pattern_of(), self.items(min_val=1.0, max_val=1.0)) is None

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"weight_fullname": "a"}, "another name"),
            ({"weight_fullname": None}, "another name"),
            ({"compress_data": None}, "does not have the 5 values"),
            ({"compress_data": np.zeros(4, np.int8)}, "does not have the 5 values"),
            ({"compress_data": np.zeros(6, np.int8)}, "does not have the 5 values"),
            ({"min_val": 1.5}, "range"),
            ({"min_val": math.nan}, "range"),
            ({"max_val": math.nan}, "range"),
            ({"min_val": -math.inf}, "range"),
            ({"max_val": math.inf}, "range"),
            ({"min_val": -LARGEST, "max_val": LARGEST}, "range"),
        ],
    )
    def test_of_an_entry(self, changes: dict[str, Any], words: str) -> None:
        assert words in (sparse.fault(pattern_of(), self.items(**changes)) or "")

    def test_of_their_number(self) -> None:
        good = self.items()
        assert sparse.fault(pattern_of(), good[:-1]) == "2 entries for 3 weights"
        assert sparse.fault(pattern_of(), [*good, good[-1]]) == "4 entries for 3 weights"

    def test_of_values_that_are_the_neighbours(self) -> None:
        """The original would take them, one behind the other."""
        first, second, third = self.items()
        longer = replace(first, compress_data=np.zeros(4, np.int8))
        shorter = replace(third, compress_data=np.zeros(4, np.int8))
        assert sparse.fault(pattern_of(), [longer, second, shorter])

    def test_no_range_is_needed_without_values(self) -> None:
        first, second, third = self.items()
        for low in (math.nan, LARGEST, math.inf):
            assert sparse.fault(pattern_of(), [first, replace(second, min_val=low), third]) is None


@pytest.mark.parametrize(("one", "other", "same"), [(0.4, float(F(0.4)), True), (0.4, 0.40000004, False)])
def test_rates_are_compared_in_single_precision(one: float, other: float, same: bool) -> None:
    assert sparse.same_rate(one, other) is same


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_device_sends_nothing_that_is_not_finite(bad: float) -> None:
    everything = sparse.pattern([("w", 2)], np.ones(2, np.bool_))
    with pytest.raises(NonFinite):
        sparse.compress(everything, {"w": array([bad, 1])}, {"w": array([1, 1])}, 1)


def test_a_server_takes_nothing_that_is_not_finite() -> None:
    everything = sparse.pattern([("w", 2)], np.ones(2, np.bool_))
    item = CompressFeatureMap("w", np.zeros(2, np.int8), 0, 0)
    with pytest.raises(NonFinite, match="a data size of 65535"):
        sparse.restore_weight(everything.places["w"], item, array([1e36, 1]), 65535)
