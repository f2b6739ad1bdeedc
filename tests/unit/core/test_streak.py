"""When failed iterations in a row deserve an alarm."""

import pytest

from fedcore.core.streak import Streak, follow


def alarms(limit, ends):
    """Return what is reported after each end, given as a string of V (valid) and F (failed)."""
    streak, reported = Streak(limit), []
    for end in ends:
        streak, alarm = follow(streak, end == "V")
        reported.append(alarm)
    return reported


@pytest.mark.parametrize(
    ("limit", "ends", "expected"),
    [
        (3, "FFF", [None, None, 3]),
        (3, "FFVFFF", [None, None, None, None, None, 3]),  # a valid one in between begins anew
        (2, "FFFF", [None, 2, None, 2]),  # and so does an alarm
        (1, "FVF", [1, None, 1]),
        (2, "VVV", [None] * 3),
    ],
)
def test_alarms(limit, ends, expected):
    assert alarms(limit, ends) == expected


def test_a_streak_that_is_over_the_limit_already():
    assert follow(Streak(limit=2, length=6), valid=False) == (Streak(2), 7)


def test_the_limit_stays():
    assert follow(Streak(5, 2), valid=True) == (Streak(5, 0), None)
    assert follow(Streak(5, 2), valid=False) == (Streak(5, 3), None)
