"""When a cloud worker synchronises, and when adaptive synchronisation shortens its runs."""

from dataclasses import replace

import numpy as np
import pytest

from fedclient.schedule import Adaptive, Consistency, Schedule, consistent_rate, observe
from fedcore.errors import ConfigError


def of(*values):
    return {"a": np.float32(values)}


def test_synchronisations_of_a_fixed_schedule():
    due, moments = Schedule(3), []
    for _ in range(3):
        moments.append((due.next_begin, due.next_end))
        due = due.synchronised(3)
    assert moments == [(1, 3), (4, 6), (7, 9)]


def test_every_step_may_be_a_run():
    due = Schedule(1)
    assert (due.next_begin, due.next_end) == (1, 1)
    assert due.synchronised(1).next_begin == 2


def test_a_shorter_run_begins_right_after_the_longer_one():
    due = Schedule(10).synchronised(4)
    assert (due.next_begin, due.next_end) == (11, 14)


@pytest.mark.parametrize("frequency", [0, -1, 65_536])
def test_frequencies_that_cannot_be(frequency):
    with pytest.raises(ConfigError, match="sync_frequency"):
        Schedule(frequency)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_consistent_rate": 0},
        {"min_consistent_rate_at_round": -1},
        {"ema_alpha": 0},
        {"ema_alpha": 1},
        {"observation_window_size": 0},
        {"frequency_increase_ratio": 1},
        {"frequency_increase_ratio": float("inf")},
        {"unchanged_round": -1},
    ],
)
def test_parameters_that_cannot_be(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        Adaptive(**wrong)


def test_the_parameters_of_the_protocol():
    assert Adaptive() == Adaptive(1.1, 0, 0.5, 5, 2, 0)


def test_the_rate_is_the_share_of_movement_that_is_progress():
    assert consistent_rate(of(1, -2), of(2, 2)) == 0.75
    assert consistent_rate(of(0, 1), of(0, 1)) == 0.5, "nothing of nothing: 0 / 1"
    assert consistent_rate({}, {}) == 0.0
    both = {"a": np.float32([1, 1, 1]), "b": np.float32([0])}
    assert consistent_rate(both, {"a": np.float32([1, 1, 1]), "b": np.float32([2])}) == 0.75, "over elements"


def test_averages_move():
    policy = Adaptive(ema_alpha=0.25)
    seen = Consistency.at_first(8, policy)
    seen = observe(seen, policy, of(4), of(4))
    assert (seen.change["a"].tolist(), seen.absolute["a"].tolist()) == ([3], [3])
    seen = observe(seen, policy, of(-4), of(4))
    assert seen.change["a"].tolist() == [0.25 * 3 - 0.75 * 4]
    assert seen.absolute["a"].tolist() == [0.25 * 3 + 0.75 * 4]


def test_a_new_minimum_is_noted_and_changes_nothing_else():
    policy = Adaptive()
    seen = observe(Consistency.at_first(8, policy), policy, of(1), of(2))
    assert (seen.minimum, seen.minimum_at, seen.round, seen.frequency) == (0.5, 1, 1, 8)
    seen = observe(seen, policy, of(-1), of(2))
    assert seen.minimum < 0.5
    assert (seen.minimum_at, seen.frequency) == (2, 8)


def test_runs_are_cut_once_the_window_has_passed_without_a_minimum():
    policy = Adaptive(observation_window_size=2, frequency_increase_ratio=3)
    seen = Consistency.at_first(10, policy)
    frequencies = []
    for _ in range(4):
        seen = observe(seen, policy, of(1), of(1))  # the rate is 1 each time: a minimum only the first time
        frequencies.append(seen.frequency)
    assert frequencies == [10, 10, 10, 4], "3 since round 1 is more than 2; 10 / 3 is rounded up"
    assert (seen.minimum, seen.window) == (1.1, 6)
    assert (seen.change, seen.absolute) == ({}, {}), "the averages begin anew"
    seen = observe(seen, policy, of(1), of(1))
    assert (seen.minimum, seen.minimum_at) == (1, 5), "and the next rate is a minimum again"


def test_a_run_of_one_step_is_not_cut():
    policy = Adaptive()
    waited = replace(Consistency.at_first(1, policy), minimum=0.0, round=99)
    assert observe(waited, policy, of(1), of(1)).window == 5


def test_nothing_is_cut_in_the_first_rounds_if_so_wished():
    policy = Adaptive(unchanged_round=50, observation_window_size=1)
    waited = replace(Consistency.at_first(8, policy), minimum=0.0, round=49)
    waited = observe(waited, policy, of(1), of(1))
    assert (waited.round, waited.frequency) == (50, 8)
    assert observe(waited, policy, of(1), of(1)).frequency == 4
