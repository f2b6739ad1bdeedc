"""A few seconds of fuzzing with each test run; the millions are `make fuzz`."""

from __future__ import annotations

import contextlib
import gc
import time
import tracemalloc
from pathlib import Path

import pytest
from fuzz import sockets
from fuzz.mutation import Mutator
from fuzz.runner import Finding, run
from fuzz.targets import SEEDS, TARGETS, Target

from fedcore.errors import MalformedRequest

QUICK = 6000  # inputs of all targets together, of a seed that the long runs do not have
every_target = pytest.mark.parametrize("name", sorted(TARGETS))


@every_target
def test_good_inputs_are_read(name: str) -> None:
    """Seeds that are made are good ones: most are read to their end; some are cut, or an empty ledger."""
    target = TARGETS[name]
    refused = 0
    for data in target.made():
        try:
            target.run(data)
        except target.allowed:
            refused += 1
    assert target.made()
    assert refused <= len(target.made()) // 2


@every_target
def test_damaged_inputs_are_refused_in_order(name: str) -> None:
    target = TARGETS[name]
    report = run(target, 20261122, range(int(QUICK * target.share / 10)), time.monotonic() + 60)
    assert not report.findings, report.findings[0]


@every_target
def test_nothing_is_kept_of_damaged_inputs(name: str) -> None:
    """After the caches are warm, other inputs leave no memory behind that grows with their number."""
    target = TARGETS[name]
    mutator = Mutator(name, target.seeds, target.words, 5)
    count = max(20, int(150 * min(target.share, 1)))

    def feed(numbers: range) -> None:
        for number in numbers:
            with contextlib.suppress(*target.allowed):
                target.run(mutator.input(number))

    feed(range(2 * count))
    tracemalloc.start()
    try:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        feed(range(2 * count, 3 * count))
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert kept < 256 * 1024


def test_what_was_once_a_finding_stays_mended() -> None:
    names = {folder.name for folder in SEEDS.iterdir() if folder.is_dir()}
    assert names <= TARGETS.keys()
    for name in names:
        for file in (SEEDS / name).glob("*.bin"):
            with contextlib.suppress(*TARGETS[name].allowed):
                TARGETS[name].run(file.read_bytes())


# ---- the harness itself


def test_inputs_depend_on_seed_target_and_number_alone() -> None:
    target = TARGETS["tables"]
    one, other = (Mutator("tables", target.seeds, target.words, 3) for _ in range(2))
    numbers = range(500, 700)
    forward = [one.input(number) for number in numbers]
    assert [other.input(number) for number in reversed(numbers)][::-1] == forward
    assert len(set(forward)) > 190
    assert [Mutator("tables", target.seeds, target.words, 4).input(number) for number in numbers] != forward


def test_an_exception_that_is_no_answer_is_a_finding() -> None:
    def reader(data: bytes) -> None:
        if data.startswith(b"\xff"):
            raise KeyError("a bug")
        if not data.startswith(b"a"):
            raise MalformedRequest("refused")

    target = Target("reader", reader, (MalformedRequest,), lambda: [b"abcdef"])
    report = run(target, 1, range(20000), time.monotonic() + 60, most=1)
    assert report.refused > 0
    (finding,) = report.findings
    assert isinstance(finding, Finding)
    assert "KeyError: 'a bug'" in finding.what
    assert finding.data.startswith(b"\xff")


def test_real_daemons_live_through_damaged_bytes_on_every_port(tmp_path: Path) -> None:
    assert not sockets.run(tmp_path, 1200, 20261122, lambda line: None)
