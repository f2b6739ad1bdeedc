"""Sums of partials, with every arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest

from fedcore.aggregation.arithmetic import NUMPY, Arithmetic, Doubles
from fedcore.aggregation.sums import RunningSum, Spans
from fedcore.wire.arrays import Layout, Weight

LAYOUT = Layout(
    (
        Weight("conv", (3, 2)),
        Weight("bias", ()),
        Weight("head", (5,)),
        Weight("frozen", (4,), aggregated=False),
    )
)
SPANS = Spans(LAYOUT)


@dataclass
class Partial:
    """What a ledger gives when it is sealed."""

    sums: Doubles
    sizes: npt.NDArray[np.uint64]


def parts(count: int) -> list[Partial]:
    chance = np.random.default_rng(5)
    return [
        Partial(chance.standard_normal(SPANS.total), np.full(len(SPANS.names), 10 + i, np.uint64))
        for i in range(count)
    ]


def sums_of(total: RunningSum) -> Doubles:
    return total.arithmetic.host(total.sums)


class TestSpans:
    def test_aggregated_weights_lie_one_after_another_in_the_order_of_their_names(self) -> None:
        assert SPANS.names == ("bias", "conv", "head")
        assert dict(SPANS) == {"bias": slice(0, 1), "conv": slice(1, 7), "head": slice(7, 12)}
        assert SPANS.total == 12

    def test_a_model_without_aggregated_weights(self) -> None:
        spans = Spans(Layout((Weight("w", (2,), aggregated=False),)))
        assert (spans.names, spans.total, list(spans)) == ((), 0, [])


class TestRunningSum:
    @pytest.mark.parametrize("keeps", list(product((True, False), repeat=3)))
    def test_is_that_of_all_whichever_stay(self, keeps: tuple[bool, ...], arithmetic: Arithmetic) -> None:
        total, expected = RunningSum(SPANS, arithmetic), np.zeros(SPANS.total)
        for part, keep in zip(parts(3), keeps, strict=True):
            expected = expected + part.sums
            total.add(part, keep=keep)
            if not keep:  # its file is gone, and something else is there
                part.sums[:], part.sizes[:] = np.nan, 99
        assert sums_of(total).tobytes() == expected.tobytes()
        assert total.sizes.tolist() == [10 + 11 + 12] * 3

    @pytest.mark.parametrize("keep", [True, False])
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_leaves_partials_alone(self, count: int, keep: bool, arithmetic: Arithmetic) -> None:
        given = parts(count)
        before = [(part.sums.copy(), part.sizes.copy()) for part in given]
        total = RunningSum(SPANS, arithmetic)
        for part in given:
            total.add(part, keep=keep)
        for part, (sums, sizes) in zip(given, before, strict=True):
            np.testing.assert_array_equal(part.sums, sums)
            np.testing.assert_array_equal(part.sizes, sizes)

    @pytest.mark.parametrize("keep", [True, False])
    def test_of_partials_that_cannot_be_written(self, keep: bool, arithmetic: Arithmetic) -> None:
        """Those of another process' file."""
        total, expected = RunningSum(SPANS, arithmetic), np.zeros(SPANS.total)
        for part in parts(3):
            part.sums.setflags(write=False)
            expected += part.sums
            total.add(part, keep=keep)
        assert sums_of(total).tobytes() == expected.tobytes()

    def test_copies_a_single_partial_only_if_it_does_not_stay(self) -> None:
        (part,) = parts(1)
        for keep in (True, False):
            total = RunningSum(SPANS)
            total.add(part, keep=keep)
            assert np.shares_memory(total.sums, part.sums) is keep
            assert total.sizes.tolist() == part.sizes.tolist()

    @pytest.mark.parametrize("had", [1, 2])
    def test_without_memory_nothing_is_added(self, had: int, arithmetic: Arithmetic) -> None:
        """The caller may try that partial again."""

        class TooLarge(Partial):
            @property
            def sums(self) -> Doubles:  # type: ignore[override]
                raise MemoryError

        *first, last = parts(had + 1)
        total = RunningSum(SPANS, arithmetic)
        for part in first:
            total.add(part, keep=True)
        before = sums_of(total).tobytes(), total.sizes.tolist()
        vast = object.__new__(TooLarge)
        vast.sizes = last.sizes
        with pytest.raises(MemoryError):
            total.add(vast, keep=False)
        assert (sums_of(total).tobytes(), total.sizes.tolist()) == before
        total.add(last, keep=False)
        expected = sum((part.sums for part in first), np.zeros(SPANS.total)) + last.sums
        assert sums_of(total).tobytes() == expected.tobytes()

    def test_of_a_model_in_which_nothing_is_summed(self, arithmetic: Arithmetic) -> None:
        spans = Spans(Layout((Weight("w", (2,), aggregated=False),)))
        total = RunningSum(spans, arithmetic)
        for _ in range(3):
            total.add(Partial(np.zeros(0), np.zeros(0, np.uint64)), keep=False)
        assert sums_of(total).size == 0 and total.sizes.tolist() == []

    @pytest.mark.parametrize("moved_after", [0, 1, 2])
    def test_goes_on_with_another_arithmetic(self, moved_after: int, arithmetic: Arithmetic) -> None:
        given, total = parts(3), RunningSum(SPANS, arithmetic)
        before = [part.sums.copy() for part in given]
        for index, part in enumerate(given):
            if index == moved_after:
                total.move(NUMPY)
            total.add(part, keep=True)
        assert total.arithmetic is NUMPY and isinstance(total.sums, np.ndarray)
        assert total.sums.tobytes() == (before[0] + before[1] + before[2]).tobytes()
        for part, values in zip(given, before, strict=True):
            np.testing.assert_array_equal(part.sums, values)
