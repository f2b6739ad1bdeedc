"""Runs targets on their inputs, and tells what does not belong there: other exceptions, slow inputs, lost memory."""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fuzz.mutation import Mutator
from fuzz.targets import Target

SLOWEST_S = 2.0  # of process time for one input of at most 64 KiB; the machine may have other work
GROWTH = 48 << 20  # bytes that a process may grow by, after the first inputs have filled all caches
WARM = 2000  # inputs that do so
_LOOK = 4096  # inputs between two looks at the clock
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Finding:
    """An input whose answer is none of those that are allowed."""

    target: str
    number: int
    data: bytes
    what: str


@dataclass
class Report:
    """What became of a target's inputs.

    Attributes:
        inputs: how many.
        refused: answered with an exception that is allowed.
        seconds: that it took.
        growth: bytes that the process has grown by.
        findings: what is wrong; the first ones only.
    """

    target: str
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    growth: int = 0
    findings: list[Finding] = field(default_factory=list)


def resident() -> int:
    """Return the bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * _PAGE


def run(target: Target, seed: int, numbers: range, until: float, most: int = 5) -> Report:
    """Run a target on some of its inputs.

    Args:
        target: which.
        seed: of all inputs.
        numbers: of the inputs.
        until: monotonic seconds when to end in any case.
        most: findings after which to end.
    """
    report = Report(target.name)
    mutator = Mutator(target.name, target.seeds, target.words, seed)
    before, begun = 0, time.monotonic()
    for number in numbers:
        data = mutator.input(number)
        what = _answer(target, data, report)
        report.inputs += 1
        if what:
            report.findings.append(Finding(target.name, number, data, what))
            if len(report.findings) >= most:
                break
        if report.inputs == WARM:
            gc.collect()
            before = resident()
        if report.inputs % _LOOK == 0 and time.monotonic() >= until:
            break
    report.seconds = time.monotonic() - begun
    if report.inputs > WARM:
        gc.collect()
        report.growth = resident() - before
        if report.growth > GROWTH:
            text = f"{report.growth >> 20} MiB more than after the first {WARM} inputs"
            report.findings.append(Finding(target.name, -1, b"", text))
    return report


def _answer(target: Target, data: bytes, report: Report) -> str:
    """Return what is wrong with a target's answer to an input, "" if nothing is."""
    began = time.process_time()
    try:
        target.run(data)
    except target.allowed:
        report.refused += 1
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return "".join(traceback.format_exception(error))
    spent = time.process_time() - began
    return f"took {spent:.1f} s" if spent > SLOWEST_S else ""


def shares(targets: list[Target], inputs: int) -> Iterator[tuple[Target, int]]:
    """Divide inputs among targets."""
    whole = sum(target.share for target in targets)
    for target in targets:
        yield target, max(1, round(inputs * target.share / whole))


def describe(report: Report, say: Callable[[str], None]) -> None:
    """Print a report."""
    rate = report.inputs / report.seconds if report.seconds else 0.0
    say(
        f"{report.target:14} {report.inputs:10,} inputs {rate:9,.0f}/s   refused {report.refused:10,}   "
        f"memory {report.growth / 2**20:+6.1f} MiB   findings {len(report.findings)}"
    )
    for finding in report.findings:
        say(f"  input {finding.number}: {finding.data[:200]!r}{'...' if len(finding.data) > 200 else ''}")
        say("  " + finding.what.rstrip().replace("\n", "\n  "))
