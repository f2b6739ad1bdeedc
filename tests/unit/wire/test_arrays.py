"""The checks that every foreign array must pass, and the order of a model's weights."""

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import NonFinite, ShapeMismatch
from fedcore.wire.arrays import Floats, Layout, Weight, all_finite, check_update

HUGE = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).smallest_subnormal)
floats = st.floats(width=32)


def vector(*values: float) -> Floats:
    return np.array(values, np.float32)


def misaligned(values: Floats) -> Floats:
    """Return the same values at an odd address."""
    result: Floats = np.frombuffer(b"\0" + values.tobytes(), np.uint8)[1:].view(np.float32)
    assert not values.size or not result.flags.aligned
    return result


# ---- finiteness


@pytest.mark.parametrize(
    "values",
    [
        vector(),
        vector(0.0, -0.0),
        vector(1.0, -2.5),
        vector(HUGE),  # the dot product overflows
        vector(HUGE, -HUGE, HUGE),
        vector(TINY),
        np.full(100_003, HUGE, np.float32),
        np.full(100_003, 1e16, np.float32),  # each square is finite, their sum is not
    ],
    ids=lambda values: f"{values[:2]}*{values.size}",
)
def test_finite(values: Floats) -> None:
    with warnings.catch_warnings(action="error"):
        assert all_finite(values)
        assert all_finite(misaligned(values))


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 100_003])
def test_not_finite(bad: float, size: int) -> None:
    for place in {0, size // 2, size - 1}:
        for filler in (0.0, HUGE):
            values = np.full(size, filler, np.float32)
            values[place] = bad
            with warnings.catch_warnings(action="error"):
                assert not all_finite(values)
                assert not all_finite(misaligned(values))


def test_opposite_infinities_do_not_cancel() -> None:
    assert not all_finite(vector(np.inf, -np.inf))


@given(st.lists(st.floats(width=32), max_size=40))
def test_finite_means_every_element(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert all_finite(array) is bool(np.isfinite(array).all())
    assert all_finite(misaligned(array)) is bool(np.isfinite(array).all())


# ---- an update against the model

MODEL = Layout(
    (Weight("a", (2, 3)), Weight("b", ()), Weight("control.c", (2,), aggregated=False), Weight("d", (0,)))
)


@pytest.mark.parametrize(
    "update",
    [
        {"a": vector(1, 2, 3, 4, 5, 6)},
        {"b": vector(HUGE)},
        {"control.c": vector(1, 2)},
        {"d": vector(), "b": vector(0)},
        {"control.c": vector(1, 2), "b": vector(0), "a": np.zeros(6, np.float32), "d": vector()},
        {"a": misaligned(vector(1, 2, 3, 4, 5, 6))},
    ],
    ids="+".join,
)
def test_any_subset_in_any_order_is_accepted(update: dict[str, Floats]) -> None:
    check_update(MODEL, update)


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        ({"e": vector(1)}, "'e' is not in the model"),
        ({"A": vector(1)}, "'A' is not in the model"),
        ({"b": vector(1), "e": vector()}, "'e' is not in the model"),
        ({"a": np.zeros(5, np.float32)}, "'a' has 5 elements, the model has 6"),
        ({"a": np.zeros(7, np.float32)}, "'a' has 7 elements, the model has 6"),
        ({"b": vector()}, "'b' has 0 elements, the model has 1"),
        ({"d": vector(1)}, "'d' has 1 elements, the model has 0"),
        ({}, "no value at all"),
        ({"d": vector()}, "no value at all"),
    ],
)
def test_what_does_not_fit_is_refused(update: dict[str, Floats], reason: str) -> None:
    with pytest.raises(ShapeMismatch, match=reason):
        check_update(MODEL, update)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a", "b", "control.c"])
def test_values_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    update = {weight.name: np.zeros(weight.size, np.float32) for weight in MODEL}
    update[name][-1] = bad
    with pytest.raises(NonFinite, match=f"'{name}'"):
        check_update(MODEL, update)


def test_a_read_only_update_is_checked_without_a_copy() -> None:
    values = np.zeros(6, np.float32)
    values.flags.writeable = False
    check_update(MODEL, {"a": values})


# ---- the layout

NAMES = ["a", "B", "é", "a.b", "a.B", "", "z", "a\0", "ﬀ", "😀", "a-b"]


@given(st.permutations(NAMES))
def test_weights_are_in_bytewise_order(names: list[str]) -> None:
    layout = Layout(tuple(Weight(name, (1,)) for name in names))
    assert [w.name for w in layout] == ["", "B", "a", "a\0", "a-b", "a.B", "a.b", "z", "é", "ﬀ", "😀"]


@given(st.lists(st.text(max_size=6), unique=True))
def test_order_is_that_of_utf_8(names: list[str]) -> None:
    layout = Layout(tuple(Weight(name, ()) for name in names))
    assert [w.name.encode() for w in layout] == sorted(name.encode() for name in names)


def test_one_name_twice_is_refused() -> None:
    with pytest.raises(ShapeMismatch, match="one name"):
        Layout((Weight("a", (1,)), Weight("b", ()), Weight("a", (2,))))


def test_a_layout_of_arrays() -> None:
    arrays: dict[str, Any] = {"w": np.zeros((2, 3)), "b": np.float32(1), "control.x": np.zeros(0)}
    layout = Layout.of(arrays, not_aggregated={"control.x"})
    assert tuple(layout) == (
        Weight("b", ()),
        Weight("control.x", (0,), aggregated=False),
        Weight("w", (2, 3)),
    )
    assert [weight.size for weight in layout] == [1, 0, 6]
    assert len(layout) == 3
    assert layout.total_floats == 7
    assert [weight.name for weight in layout.aggregated] == ["b", "w"]
    assert layout.by_name["w"].shape == (2, 3)


def test_an_empty_layout() -> None:
    assert (len(Layout(())), Layout(()).total_floats, Layout(()).aggregated) == (0, 0, ())


def test_layouts_are_values() -> None:
    first, second = Weight("a", (1,)), Weight("b", (2,))
    assert Layout((first, second)) == Layout((second, first))
    assert Layout((first, second)) != Layout((first,))
    assert len({Layout((first, second)), Layout((second, first))}) == 1


def test_the_digest_tells_layouts_apart() -> None:
    layouts = [
        Layout(()),
        Layout((Weight("a", ()),)),
        Layout((Weight("a", (1,)),)),
        Layout((Weight("a", (1,), aggregated=False),)),
        Layout((Weight("a", (2, 3)),)),
        Layout((Weight("a", (3, 2)),)),
        Layout((Weight("a", (23,)),)),
        Layout((Weight("a", (1,)), Weight("b", (1,)))),
        Layout((Weight("é", (1,)),)),
    ]
    assert len({layout.digest for layout in layouts}) == len(layouts)
    assert Layout(tuple(reversed(layouts[-2].weights))).digest == layouts[-2].digest
