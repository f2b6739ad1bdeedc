"""What follows from settings: policy and measures of the ledger."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedcore.config import Settings
from fedcore.core.iteration import Policy
from fedcore.services.terms import LEAST_SLOTS, MOST_SLOTS, ledger_shape, policy_of, update_limit
from fedcore.wire.arrays import Layout, Weight

SMALL = Layout((Weight("w", (4,)), Weight("fixed", (2, 3), aggregated=False)))


def settings(places: int, ratio: float = 1.0, budget: int = 1 << 40) -> Settings:
    base = Settings(fl_name="job", fl_iteration_num=7)
    return replace(
        base,
        round=replace(
            base.round,
            start_fl_job_threshold=places,
            update_model_ratio=ratio,
            start_fl_job_time_window=1_500,
            update_model_time_window=2_500,
            global_iteration_time_window=9_000,
        ),
        fedcore=replace(base.fedcore, ledger=replace(base.fedcore.ledger, memory_budget=budget)),
    )


def test_policy_is_in_seconds_and_its_quorum_is_rounded_up() -> None:
    assert policy_of(settings(10, 0.72)) == Policy(10, 8, 1.5, 2.5, 9.0, 7)


def test_the_longest_update_holds_all_weights_their_names_and_the_rest() -> None:
    assert update_limit(SMALL) == 4 * 10 + (2 * 1 + 128) + (2 * 5 + 128) + 256 * 1024


def test_the_name_counts_in_bytes() -> None:
    assert update_limit(Layout((Weight("ü", (1,)),))) == update_limit(Layout((Weight("uu", (1,)),)))


@pytest.mark.parametrize(
    ("places", "slots"), [(1, LEAST_SLOTS), (4, LEAST_SLOTS), (5, 10), (32, MOST_SLOTS), (1000, MOST_SLOTS)]
)
def test_a_ledger_has_two_slots_per_client_within_bounds(places: int, slots: int) -> None:
    shape = ledger_shape(settings(places), SMALL)
    assert (shape.slots, shape.clients) == (slots, places)
    assert shape.slot_size >= update_limit(SMALL)


@pytest.mark.parametrize(("updates", "slots"), [(0, LEAST_SLOTS), (9, 9), (20, 20), (10**6, MOST_SLOTS)])
def test_the_budget_limits_the_slots_but_never_below_the_least(updates: int, slots: int) -> None:
    shape = ledger_shape(settings(100, budget=updates * update_limit(SMALL)), SMALL)
    assert shape.slots == slots


def test_a_ledger_lists_all_places_not_only_the_quorum() -> None:
    """After Redis has lost data more than the quorum may be counted."""
    assert ledger_shape(settings(9, 0.5), SMALL).clients == 9
