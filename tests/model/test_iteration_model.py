"""Random histories of a whole cluster: what never happens, and that the job always goes on.

About 20 seconds of them; FEDCORE_SOAK is the number of seconds for more, with other seeds each time. A failure prints
its seed and what happened last; FEDCORE_SEED plays that one again.
"""

from __future__ import annotations

import os
import time

import pytest
from model.simulation import FAULTS, PATIENCE_S, Simulation, Violation, play

from fedcore.core.iteration import SUCCESS

SOAK_S = float(os.environ.get("FEDCORE_SOAK", "0"))
SEED = os.environ.get("FEDCORE_SEED")
SHARE_S = 10.0  # of the time in `make test`, for each of two workers


def play_for(seconds: float, first: int) -> None:
    """Play histories for so long, at least one."""
    limit, seed = time.monotonic() + seconds, first
    while seed == first or time.monotonic() < limit:
        play(seed)
        seed += 1


@pytest.mark.parametrize("part", range(2))
def test_random_histories_keep_all_promises(part: int) -> None:
    if SEED is not None:
        play(int(SEED))
        return
    play_for(SHARE_S, part * 1_000_000)
    if SOAK_S:
        play_for(SOAK_S / 2, time.time_ns() // 1_000_000 * 2 + part)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_kind_of_fault_alone(fault: str) -> None:
    for seed in range(5):
        Simulation(seed, frozenset({fault})).play()


def test_a_quiet_history_makes_a_model_a_second_and_nothing_fails() -> None:
    """The simulation itself works: nothing breaks, and every iteration is valid."""
    for seed in range(5):
        simulation = Simulation(seed, frozenset())
        simulation.loss_rate = 0.0
        simulation.play()
        assert simulation.published >= 4
        assert list(simulation.results) == [SUCCESS]


def test_the_same_seed_gives_the_same_history() -> None:
    first, second = Simulation(7), Simulation(7)
    for simulation in (first, second):
        simulation.play()
    assert list(first.trace) == list(second.trace)
    assert first.steps == second.steps


def test_a_cluster_that_hangs_is_noticed() -> None:
    """The last check bites: a cluster whose servers hear of no time does not go on."""
    simulation = Simulation(3, frozenset())
    simulation.run(2.0)
    for server in simulation.servers.values():
        server.paused = True
    with pytest.raises(Violation, match="the job hangs"):
        simulation.goes_on(True)
    assert simulation.now > PATIENCE_S
    simulation.end()
