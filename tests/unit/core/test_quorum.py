import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.core.quorum import to_float32, update_threshold


@pytest.mark.parametrize(
    ("n", "ratio", "threshold"),
    [
        (1, 1.0, 1),
        (1, 0.1, 1),
        (2, 0.5, 1),
        (3, 0.5, 2),
        (1, 1e-45, 1),  # the least float32 above zero
        # float32(0.8) lies above 0.8, but the product is rounded back to a whole number
        (10, 0.8, 8),
        (5, 0.8, 4),
        (100, 0.07, 7),  # 8 in double precision: 100 * 0.07 = 7.000000000000001
        (100, 0.29, 29),
        (100, 0.55, 55),  # 56 in double precision
        (1000, 0.001, 1),
        (30, 0.1, 3),  # float32(0.1) is above 0.1 as well
        (3, 0.33333334, 1),
        (3, 0.3333334, 2),
        (10, 0.9999999999, 10),  # 1 as a float32
        # above 2**24 clients single precision counts in steps
        (16777216, 1.0, 16777216),
        (16777217, 1.0, 16777216),
        (16777219, 1.0, 16777220),
        (4294967295, 1.0, 4294967296),
        (4294967295, 0.5, 2147483648),
    ],
)
def test_thresholds_in_single_precision(n: int, ratio: float, threshold: int) -> None:
    assert update_threshold(n, ratio) == threshold


def test_double_precision_would_differ() -> None:
    assert math.ceil(100 * 0.07) == 8
    assert math.ceil(100 * 0.55) == 56


@given(st.integers(1, 0xFFFFFFFF), st.floats(1e-30, 1.0, width=64))
def test_equals_numpy(n: int, ratio: float) -> None:
    assert update_threshold(n, ratio) == math.ceil(np.float32(n) * np.float32(ratio))


@given(st.integers(1, 1 << 24), st.floats(1e-30, 1.0))
def test_exactly_counted_clients_suffice(n: int, ratio: float) -> None:
    assert 1 <= update_threshold(n, ratio) <= n


@pytest.mark.parametrize("n", [0, -1, 4294967296])
def test_refuses_numbers_of_clients(n: int) -> None:
    with pytest.raises(ValueError, match="no threshold"):
        update_threshold(n, 1.0)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.1, 1e-50, math.nan, math.inf])
def test_refuses_ratios(ratio: float) -> None:
    with pytest.raises(ValueError, match="no threshold"):
        update_threshold(10, ratio)


@pytest.mark.parametrize(
    ("value", "single"),
    [
        (0.8, 0.800000011920929),
        (0.1, 0.10000000149011612),
        (1, 1.0),
        (1e39, math.inf),
        (-1e39, -math.inf),
        (1e-50, 0.0),
        (16777217, 16777216.0),
    ],
)
def test_to_float32(value: float, single: float) -> None:
    assert to_float32(value) == single
