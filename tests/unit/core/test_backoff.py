"""When a refused device is told to come back, and when an unreachable peer is tried again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.core.backoff import LONGEST_RECONNECT_S, expected_opening, next_request_time, reconnect_delay

MOMENTS = st.integers(0, 2**50)


@pytest.mark.parametrize(
    ("now", "opens", "margin", "jitter", "expected"),
    [
        (1000, 5000, 100, 0.0, 5100),
        (1000, 5000, 100, 0.5, 5150),
        (1000, 5000, 100, 1.0, 5200),
        (1000, 1000, 100, 0.0, 1100),
        (9000, 5000, 100, 0.0, 9100),  # an iteration that is late already
        (1000, 5000, 1, 0.99, 5001),
    ],
)
def test_a_margin_after_the_opening(now: int, opens: int, margin: int, jitter: float, expected: int) -> None:
    assert next_request_time(now, opens, margin, jitter) == expected


@given(MOMENTS, MOMENTS, st.integers(1, 3_600_000), st.floats(0, 1))
def test_always_in_the_future_and_never_more_than_two_margins_late(
    now: int, opens: int, margin: int, jitter: float
) -> None:
    told = next_request_time(now, opens, margin, jitter)
    assert told > now
    assert max(now, opens) + margin <= told <= max(now, opens) + 2 * margin


@pytest.mark.parametrize(
    ("now", "filled", "window", "typical", "expected"),
    [
        (1000, None, 600, None, 1600),  # places are left: as if the last one were taken now
        (1000, 900, 600, None, 1500),
        (1000, 900, 600, 50, 1000),  # usually it would have ended by now
        (1000, 900, 600, 300, 1200),
        (1000, 900, 600, 5000, 1500),  # never later than the windows allow
        (1000, None, 600, 300, 1300),
        (9000, 900, 600, None, 9000),  # overdue
        (9000, 900, 600, 300, 9000),
    ],
)
def test_the_expected_opening(
    now: int, filled: int | None, window: int, typical: int | None, expected: int
) -> None:
    assert expected_opening(now, filled, window, typical) == expected


@given(MOMENTS, st.none() | MOMENTS, st.integers(0, 10**9), st.none() | st.integers(0, 10**9))
def test_the_expected_opening_is_never_in_the_past(
    now: int, filled: int | None, window: int, typical: int | None
) -> None:
    assert now <= expected_opening(now, filled, window, typical)


@pytest.mark.parametrize(
    ("failures", "jitter", "expected"),
    [(1, 0.0, 0.05), (1, 1.0, 0.1), (2, 1.0, 0.2), (3, 0.5, 0.3), (6, 1.0, 2.0), (6, 0.0, 1.0)],
)
def test_an_unreachable_peer_is_left_alone(failures: int, jitter: float, expected: float) -> None:
    assert reconnect_delay(failures, jitter) == pytest.approx(expected)


@given(st.integers(1, 10**9), st.floats(0, 1))
def test_a_peer_is_left_alone_longer_but_never_for_good(failures: int, jitter: float) -> None:
    delay = reconnect_delay(failures, jitter)
    assert 0 < delay <= LONGEST_RECONNECT_S
    assert delay <= reconnect_delay(failures + 1, jitter)
