"""Fuzzing in process, by damage to good inputs.

    PYTHONPATH=tests python -m fuzz --inputs 10000000          all targets, each with its share
    PYTHONPATH=tests python -m fuzz --seconds 300 --nice
    PYTHONPATH=tests python -m fuzz --target tables --seed 7 --from 123456 --inputs 1      one input again
    PYTHONPATH=tests python -m fuzz --keep found               findings as files, to be put into seeds/TARGET/

Exit code 1 if there is a finding. Inputs depend on seed, target and number alone; those of certificates also on the
keys, which are new in each process.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fuzz.runner import Finding, Report, describe, run, shares
from fuzz.targets import TARGETS


def main() -> int:
    """Parse the arguments, run, print; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--inputs", type=int, default=1_000_000, help="of all targets together (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="end after this time, whatever is done"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--from", dest="first", type=int, default=0, help="number of the first input")
    parser.add_argument(
        "--target", action="append", choices=sorted(TARGETS), help="only this one; may be repeated"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--nice", action="store_true", help="leave the processors to others")
    parser.add_argument("--keep", type=Path, help="folder for inputs that are findings")
    arguments = parser.parse_args()
    if arguments.nice:
        os.nice(15)
    targets = [TARGETS[name] for name in arguments.target or sorted(TARGETS)]
    began = time.monotonic()
    jobs = [
        (target.name, arguments.seed, arguments.first, count, arguments.seconds * target.share)
        for target, count in shares(targets, arguments.inputs)
    ]
    whole = sum(target.share for target in targets)
    jobs = [(*job[:4], job[4] / whole * arguments.processes) for job in jobs]
    if arguments.processes == 1:
        reports = [_job(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(arguments.processes, max_tasks_per_child=1) as pool:
            reports = list(pool.map(_job, *zip(*jobs, strict=True)))
    for report in reports:
        if arguments.keep:
            _keep(arguments.keep, report.findings)
    inputs, spent = sum(report.inputs for report in reports), time.monotonic() - began
    found = sum(len(report.findings) for report in reports)
    print(f"{inputs:,} inputs in {spent:.0f} s, {inputs / spent:,.0f}/s: {found} findings")
    return int(found > 0)


def _job(name: str, seed: int, first: int, count: int, seconds: float) -> Report:
    report = run(TARGETS[name], seed, range(first, first + count), time.monotonic() + seconds)
    describe(report, lambda line: print(line, flush=True))
    return report


def _keep(folder: Path, findings: list[Finding]) -> None:
    for finding in findings:
        if finding.number >= 0:
            (folder / finding.target).mkdir(parents=True, exist_ok=True)
            (folder / finding.target / f"{finding.number}.bin").write_bytes(finding.data)


if __name__ == "__main__":
    sys.exit(main())
