"""What follows from the settings in force: they are the file's, with the values that the cluster shares."""

from __future__ import annotations

from fedcore.config import Settings
from fedcore.config.settings import ServerMode
from fedcore.core.iteration import Policy
from fedcore.core.quorum import update_threshold
from fedcore.ledger.layout import Shape
from fedcore.wire.arrays import Layout

LEAST_SLOTS = 8
MOST_SLOTS = 64  # bodies received at a time; more would only wait for the same network


def policy_of(settings: Settings) -> Policy:
    """Return the numbers that rule an iteration."""
    windows = settings.round
    return Policy(
        start_threshold=windows.start_fl_job_threshold,
        update_threshold=update_threshold(windows.start_fl_job_threshold, windows.update_model_ratio),
        start_window=windows.start_fl_job_time_window / 1000,
        update_window=windows.update_model_time_window / 1000,
        global_window=windows.global_iteration_time_window / 1000,
        last_iteration=settings.fl_iteration_num,
        hybrid=settings.server_mode is ServerMode.HYBRID_TRAINING,
    )


def ledger_shape(settings: Settings, layout: Layout) -> Shape:
    """Measure the ledger: as many slots as the budget allows and the clients can use.

    It lists as many clients as there are places: more than the quorum can be counted after Redis has lost data.
    """
    places = settings.round.start_fl_job_threshold
    slot_size = update_limit(layout)
    wanted = min(MOST_SLOTS, 2 * places)
    slots = max(LEAST_SLOTS, min(wanted, settings.fedcore.ledger.memory_budget // slot_size))
    return Shape.of(layout, settings.fl_name, places, slots, slot_size)


def update_limit(layout: Layout) -> int:
    """Return the longest body of an updateModel: all weights, their names, and room for everything else."""
    names = sum(2 * len(weight.name.encode()) + 128 for weight in layout)
    return 4 * layout.total_floats + names + 256 * 1024
