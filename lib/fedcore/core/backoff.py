"""When to come back: chance and the clock are arguments."""

from __future__ import annotations


def next_request_time(now_ms: int, opens_ms: int, margin_ms: int, jitter: float) -> int:
    """Return the ``next_req_time`` of a refusal.

    Old devices die of a time that is not in the future of *their* clock and give up after two refusals in a row,
    so the answer lies a margin after the expected start of the next iteration, and never closer than the margin.

    Args:
        now_ms: the server's clock, milliseconds since the epoch.
        opens_ms: when the next iteration is expected to open, same clock.
        margin_ms: distance that absorbs clock skew and late iterations, > 0.
        jitter: 0..1, spreads the returns over one more margin.
    """
    return max(now_ms, opens_ms) + margin_ms + int(jitter * margin_ms)


def expected_opening(now_ms: int, filled_ms: int | None, window_ms: int, typical_ms: int | None) -> int:
    """Estimate when the next iteration opens.

    What is learnt from the past is the time from the moment when all places were taken. The whole duration of an
    iteration would be the wrong measure: it holds the wait for refused devices, whose return it would then delay.

    Args:
        now_ms: the server's clock.
        filled_ms: when all places of the current iteration were taken, or None if some are left.
        window_ms: sum of the round windows, the longest an iteration may take.
        typical_ms: what the last iteration took from its last place to its end, None before the first has ended.
    """
    filled = now_ms if filled_ms is None else filled_ms
    return max(now_ms, filled + (window_ms if typical_ms is None else min(window_ms, typical_ms)))


FIRST_RECONNECT_S = 0.1
LONGEST_RECONNECT_S = 2.0


def reconnect_delay(failures: int, jitter: float) -> float:
    """Return how many seconds to leave a peer alone that could not be reached.

    The time doubles with every failure from FIRST_RECONNECT_S to LONGEST_RECONNECT_S; half of it is chance, so that
    nodes that lost the same peer do not all come back at once.

    Args:
        failures: attempts in a row that have failed, from 1.
        jitter: 0..1.
    """
    doublings = min(failures - 1, 16)  # many more, and the power would be no float
    full = min(FIRST_RECONNECT_S * 2.0**doublings, LONGEST_RECONNECT_S)
    return full * (1.0 + jitter) / 2.0
