"""8 bits a value, as servers write and devices read them."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from unit.compression.vectors import VECTORS

from fedcore.compression import quant
from fedcore.errors import NonFinite
from fedcore.wire.messages import CompressFeatureMap

KNOWN = VECTORS["download"]
F = np.float32
FINITE = npst.arrays(F, st.integers(1, 40), elements=st.floats(-(2.0**100), 2.0**100, width=32))


def single(number: float) -> float:
    """Round to float32 without numpy."""
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def steps_by_the_book(values: Any) -> list[int]:
    low, high = float(min(values)), float(max(values))
    scale = single(single(single(high - low) / 255) + single(1e-10))
    found = []
    for value in values:
        step = single(single(single(float(value) - low) / scale) - 128)
        found.append(int(math.copysign(math.floor(abs(step) + 0.5), step)))
    return found


def test_the_server_writes_what_the_original_writes() -> None:
    item = quant.compress("w", np.array(KNOWN["values"], F))
    assert item.weight_fullname == "w"
    assert item.compress_data.tolist() == KNOWN["steps"]  # type: ignore[union-attr]
    assert (F(item.min_val), F(item.max_val)) == (F(KNOWN["low"]), F(KNOWN["high"]))


def test_a_device_reads_what_the_original_reads() -> None:
    item = CompressFeatureMap("w", np.array(KNOWN["steps"], np.int8), KNOWN["low"], KNOWN["high"])
    restored = quant.restore(item)
    assert restored.dtype == F
    assert restored.astype(">f4").tobytes().hex() == "".join(KNOWN["restored_bits"])


@given(st.floats(-1, 1, width=32), st.floats(0, 2.0**-20, width=32))
@example(0.0, 1.682728445473458e-08)
@example(0.0, 1.9858772404290903e-08)
def test_a_device_sums_its_scale_in_double(low: float, span: float) -> None:
    high = single(low + span)
    scale = single(single(single(high - low) / 255) + 1e-10)
    item = CompressFeatureMap("w", np.array([-128, 0, 127], np.int8), low, high)
    assert quant.restore(item).tolist() == [single(single(k * scale) + low) for k in (0, 128, 255)]


@given(FINITE)
def test_the_server_writes_what_the_book_says(values: Any) -> None:
    assert quant.compress("w", values).compress_data.tolist() == steps_by_the_book(values)  # type: ignore[union-attr]


@given(FINITE)
def test_what_is_read_is_near_what_was_written(values: Any) -> None:
    item = quant.compress("w", values)
    span = float(values.max()) - float(values.min())
    rounding = 4 * float(np.finfo(F).eps) * float(np.abs(values).max())
    away = np.abs(quant.restore(item).astype(np.float64) - values.astype(np.float64))
    assert away.max() <= span / 255 * 0.5001 + 2e-8 + rounding


@pytest.mark.parametrize("value", [0.0, -2.5, 1e30])
def test_equal_values_stay_what_they_are(value: float) -> None:
    item = quant.compress("w", np.full(5, value, F))
    assert item.compress_data.tolist() == [-128] * 5  # type: ignore[union-attr]
    np.testing.assert_array_equal(quant.restore(item), np.full(5, value, F))


@pytest.mark.parametrize("values", [[0, 255, 127.5, 128.5, 126.5], [0, 255, 0.5, 254.5, 127.49999]])
def test_halves_are_rounded_away_from_zero(values: list[float]) -> None:
    found = quant.compress("w", np.array(values, F)).compress_data.tolist()  # type: ignore[union-attr]
    assert found == steps_by_the_book(np.array(values, F))
    assert found[:2] == [-128, 127]


def test_an_empty_weight_stays_empty() -> None:
    item = quant.compress("w", np.empty(0, F))
    assert (item.min_val, item.max_val) == (0, 0)
    assert quant.restore(item).size == 0


@pytest.mark.parametrize("name", ["min_val", "layer.max_val.weight"])
def test_no_name_is_special(name: str) -> None:
    assert quant.compress(name, np.ones(1, F)).weight_fullname == name


@pytest.mark.parametrize("bad", [[1, math.nan], [math.inf, 1], [1, -math.inf], [3e38, -3e38]])
def test_what_has_no_range_cannot_be_compressed(bad: list[float]) -> None:
    with pytest.raises(NonFinite, match="weight 'w' cannot be compressed"):
        quant.compress("w", np.array(bad, F))


@pytest.mark.parametrize(
    ("low", "high"), [(1, 0), (math.nan, 1), (0, math.nan), (-math.inf, 0), (0, math.inf), (-3e38, 3e38)]
)
def test_a_device_reads_nothing_without_a_range(low: float, high: float) -> None:
    with pytest.raises(NonFinite, match="which is no range"):
        quant.restore(CompressFeatureMap("w", np.zeros(1, np.int8), low, high))
