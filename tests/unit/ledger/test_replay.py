"""Proof by replay: whatever a ledger wrote before a crash, what is recovered is what the shared state counted.

The number of histories is small enough for every test run; FEDCORE_SOAK multiplies it, with other histories each time.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.ledger.histories import EVERYTHING, Device, History, assert_holds, recover, step
from unit.ledger.tracing import Held, pieces, prefixes, put, subsets, unsynced

SOAK = int(os.environ.get("FEDCORE_SOAK", "0"))


def many(examples: int) -> settings:
    return settings(
        max_examples=examples * max(SOAK, 1),
        derandomize=not SOAK,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


REPLIES = st.sampled_from(["heard", "heard", "heard", "lost", "refused", "cut"])
UPLOAD = st.tuples(
    st.just("upload"),
    st.integers(0, 5),
    st.integers(0, 3),
    st.integers(1, EVERYTHING),
    st.sampled_from([1, 7, 301, 65535]),
    REPLIES,
)
OTHERS = st.one_of(
    st.tuples(st.just("merge"), st.integers(1, 4), st.booleans()),
    st.tuples(st.sampled_from(["ask", "next", "fail", "again", "reuse"])),
)
STEPS = st.lists(st.one_of(UPLOAD, UPLOAD, OTHERS), min_size=1, max_size=12)


def perform(steps: Sequence[tuple[object, ...]], durable: bool) -> History:
    history = History(durable)
    for what in steps:
        step(history, what)
    return history


def replay(history: History) -> int:
    """Check every prefix of a history's trace; return how many there were."""
    count = 0
    for done, half, content in prefixes(history.storage.trace, bytes(history.shape.size)):
        # what the server learnt between two writes may or may not have come before the crash
        moments = [done + 1] if half else [done, done + 1]
        history.check(content, moments, history.account_at(done))
        count += 1
    return count


@many(2500)
@given(STEPS)
def test_after_every_write_the_counted_updates_are_recovered(steps: list[tuple[object, ...]]) -> None:
    replay(perform(steps, durable=False))


@many(400)
@given(STEPS, st.integers(0, 1 << 30))
def test_after_every_write_of_an_adopter_another_one_recovers_the_same(
    steps: list[tuple[object, ...]], seed: int
) -> None:
    """Servers that die while they adopt, at three moments of each history."""
    history, chance = perform(steps, durable=False), random.Random(seed)
    trace = history.storage.trace
    moments = {len(trace), chance.randrange(len(trace)), chance.randrange(len(trace))}
    for done, half, content in prefixes(trace, bytes(history.shape.size)):
        served = history.account_at(done)
        if done not in moments or half or served is None:
            continue
        counted = {device.fl_id: device for position, device in served.counted if position <= done}
        storage = Held(content)
        recover(storage, served.epoch, counted)
        for _, _, left in prefixes(storage.trace, content):
            partial, lost = recover(Held(left), served.epoch, counted)
            assert not lost
            assert_holds(partial, counted)


def cut_power(history: History, chance: random.Random, most: int) -> int:
    """Check what a disk may hold after a power cut at any moment; return how many cases there were."""
    trace, count = history.storage.trace, 0
    base_of: tuple[int, bytearray] = (-1, bytearray(history.shape.size))
    for done in range(len(trace) + 1):
        certain, pending = unsynced(trace, done)
        if base_of[0] != len(certain):
            base_of = (len(certain), bytearray(history.shape.size))
            for written in certain:
                put(base_of[1], written)
        certain_done = done - len(pending)
        stands = history.account_at(certain_done)
        for chosen in subsets(pieces(pending, chance), chance, most):
            content = bytearray(base_of[1])
            for written in chosen:
                put(content, written)
            served = stands
            for later in history.served:
                if certain_done <= later.since < done and trace[later.since] in chosen:
                    served = later
            history.check(content, [done, done + 1], served)
            count += 1
    return count


@many(400)
@given(STEPS, st.integers(0, 1 << 30))
def test_whatever_part_of_the_writes_a_disk_has_kept(steps: list[tuple[object, ...]], seed: int) -> None:
    cut_power(perform(steps, durable=True), random.Random(seed), most=6)


SMALL: dict[str, list[tuple[object, ...]]] = {
    "a slot that is used again": [
        ("upload", 0, 1, 15, 7, "heard"),
        ("merge", 1, False),
        ("upload", 1, 2, 3, 9, "heard"),
        ("merge", 1, False),
    ],
    "a refusal and a lost reply": [
        ("upload", 0, 1, 15, 7, "refused"),
        ("upload", 1, 2, 3, 9, "lost"),
        ("upload", 1, 3, 3, 9, "heard"),
        ("ask",),
        ("merge", 4, False),
    ],
    "an iteration that fails, and the file of the next": [
        ("upload", 0, 1, 15, 7, "heard"),
        ("fail",),
        ("upload", 0, 1, 15, 7, "heard"),
        ("next",),
    ],
    "the same iteration once more": [
        ("upload", 0, 1, 15, 7, "heard"),
        ("upload", 1, 1, 15, 7, "heard"),
        ("merge", 1, False),
        ("again",),
        ("upload", 1, 1, 15, 7, "heard"),
        ("upload", 0, 1, 15, 7, "refused"),
    ],
}


def test_every_subset_of_what_a_disk_may_have_kept() -> None:
    """Exhaustive wherever there are at most eleven pieces between two syncs."""
    for name, steps in SMALL.items():
        history = perform(steps, durable=True)
        for done in range(len(history.storage.trace) + 1):
            assert len(unsynced(history.storage.trace, done)[1]) <= 16, name
        cut_power(history, random.Random(name), most=1 << 11 if SOAK else 1 << 8)


def test_a_client_whose_two_copies_were_both_asked_about_counts_once() -> None:
    """Two connections, one client: the process died before it heard either answer."""
    history = History()
    for seed in (1, 1):
        history.upload(Device("client-1", seed), "lost")
    assert len(history.open) == 2
    replay(history)
    history.ask_again()
    history.merge(1)
    replay(history)
