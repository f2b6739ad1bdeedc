"""What each aggregation rule costs: CPU time and peak memory from accepted updates to a finished model.

    python bench/rules.py                                1,000 clients x 65,536 values and 20 clients x 5 million
    python bench/rules.py --size 50x25000000 --rules FedAvg,Scaffold --on numpy
    python bench/rules.py --ledgers 3 --on numpy,torch-cpu,torch-cuda --json result.json

No sockets and no Redis. The updates lie in the slots of so many ledgers (``--ledgers``, one per server) in files of
``--directory``. Measured are

    merge    all updates into the sums of their ledgers
    add      the ledgers' sums into one
    rule     the new weights from the sum and the old weights
    image    the model in the form of the answers, its digest, and whether it is finite

each as CPU milliseconds of all threads, median of ``--rounds`` after one to warm up. The memory is the largest resident
set less the one at the start: of the merge (ledger files, which are shared memory, included), and what the other three
take on top of it. Each row is a process of its own. Scaffold's updates are twice as long: each value has a control.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.aggregation.arithmetic import NUMPY, Arithmetic, TorchArithmetic
from fedcore.aggregation.rule import Rule, Total, new_model
from fedcore.aggregation.rules import rule_named
from fedcore.aggregation.sums import RunningSum, Spans
from fedcore.ledger.files import create_file
from fedcore.ledger.layout import Epoch, Shape, sum_of
from fedcore.ledger.ledger import MERGE_BATCH, Ledger, Partial, Update
from fedcore.wire.arrays import Floats, Layout, Weight, all_finite
from fedcore.wire.image import ImageTemplate

SIZES = "1000x65536,20x5000000"
RULES = "FedAvg,FedProx,Scaffold,FedNova"
WEIGHTS = 10  # of the model, all of one size
STAGES = ("merge", "add", "rule", "image")
MIB = 1 << 20


class Meter:
    """CPU seconds by stage, and the peak of the resident set since it was last reset."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {stage: [] for stage in STAGES}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.spent[name].append(time.process_time() - began)

    def reset_peak(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)

    def resident(self, kind: str) -> float:
        """MiB that are resident now (VmRSS), or were at most (VmHWM)."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind + ":"))


def ledgers_of(layout: Layout, count: int, clients: int, directory: Path) -> list[Ledger]:
    made = []
    for number in range(count):
        shape = Shape.of(layout, "bench", clients, MERGE_BATCH, 4 * layout.total_floats)
        made.append(Ledger.create(create_file(directory, f"bench-{number}", shape.size), layout, shape))
    return made


def fill(ledger: Ledger, layout: Layout, count: int, values: Floats, first: int) -> None:
    """Put updates into the slots and have them accepted."""
    for number in range(first, first + count):
        slot = ledger.receive()
        assert slot is not None
        floats = np.frombuffer(slot.buffer, "<f4", layout.total_floats)
        np.add(values, np.float32(number % 7), out=floats)
        slot.length = floats.nbytes
        ends = np.cumsum([weight.size for weight in layout])
        weights = {w.name: floats[end - w.size : end] for w, end in zip(layout, ends, strict=True)}
        update = Update(f"client-{number}", weights, 1 + number % 50, 0, 0.5, 0.0)
        ledger.record(slot, update.fl_id, update.loss, update.accuracy)
        ledger.accept(slot, update)


def collect(
    ledgers: list[Ledger], layout: Layout, clients: int, values: Floats, meter: Meter
) -> list[Partial]:
    """Merge all updates; only the merges are measured."""
    spent = 0.0
    for place, ledger in enumerate(ledgers):
        mine = len(range(place, clients, len(ledgers)))
        for done in range(0, mine, MERGE_BATCH):
            fill(ledger, layout, min(MERGE_BATCH, mine - done), values, done)
            began = time.process_time()
            merged = ledger.merge()
            spent += time.process_time() - began
            for slot in merged:
                ledger.reuse(slot)
    meter.spent["merge"].append(spent)
    return [ledger.seal() for ledger in ledgers]


def finish(
    rule: Rule,
    layout: Layout,
    partials: list[Partial],
    previous: dict[str, Floats],
    meter: Meter,
    on: Arithmetic,
) -> None:
    """Make the model as the finaliser does: its own partial stays, the others are added and dropped."""
    spans, template = Spans(layout), ImageTemplate(layout)
    with meter.stage("add"):
        running = RunningSum(spans, on)
        for number, partial in enumerate(partials):
            running.add(partial, keep=number == 0)
    totals = sum_of(partial.totals for partial in partials)
    with meter.stage("rule"):
        total = Total(spans, running.sums, running.sizes, totals.count, totals.data_size, on)
        model = new_model(rule, total, previous)
    with meter.stage("image"):
        image = template.image(model)
        assert image.digest and all(map(all_finite, image.arrays.values()))


def measure(
    name: str, on: str, clients: int, floats: int, ledgers: int, rounds: int, directory: Path
) -> dict[str, Any]:
    """Measure one row in this process."""
    arithmetic = NUMPY if on == "numpy" else TorchArithmetic(on.removeprefix("torch-"))
    rule, meter = rule_named(name, clients), Meter()
    plain = Layout(tuple(Weight(f"w{i}", (floats // WEIGHTS,)) for i in range(WEIGHTS)))
    layout = Layout((*plain.weights, *rule.keeps(plain)))
    baseline = meter.resident("VmRSS")
    values = np.random.default_rng(1).standard_normal(layout.total_floats).astype(np.float32)
    previous = {weight.name: np.ones(weight.size, np.float32) for weight in layout}
    servers = ledgers_of(layout, ledgers, clients, directory)
    peaks: dict[str, list[float]] = {"merge": [], "model": []}
    for number in range(rounds + 1):
        for ledger in servers:
            ledger.begin(Epoch("bench", number, "00" * 32))
        meter.reset_peak()
        partials = collect(servers, layout, clients, values, meter)
        peaks["merge"].append(meter.resident("VmHWM") - baseline)
        before = meter.resident("VmRSS")
        meter.reset_peak()
        finish(rule, layout, partials, previous, meter, arithmetic)
        peaks["model"].append(meter.resident("VmHWM") - before)
        del partials
    row: dict[str, Any] = {"rule": name, "on": on, "clients": clients, "floats": floats}
    row |= {stage: statistics.median(spent[1:]) for stage, spent in meter.spent.items()}
    return row | {f"{stage}_mib": max(found[1:]) for stage, found in peaks.items()}


def child(arguments: argparse.Namespace, name: str, on: str, clients: int, floats: int) -> dict[str, Any]:
    """Measure one row in a process of its own."""
    row = json.dumps([name, on, clients, floats, arguments.ledgers, arguments.rounds])
    command = [sys.executable, __file__, "--row", row]
    if arguments.directory:
        command += ["--directory", str(arguments.directory)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def table(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all rows, printing each."""
    print(f"{'':34}{'CPU ms':>36}{'peak MiB':>20}")
    print(
        f"{'clients x values':18}{'rule':10}{'on':11}{'':4}"
        + "".join(f"{s:>8}" for s in STAGES)
        + "   merge  model"
    )
    rows = []
    for size in arguments.size.split(","):
        clients, floats = map(int, size.split("x"))
        for name in arguments.rules.split(","):
            for on in arguments.on.split(","):
                row = child(arguments, name, on, clients, floats)
                rows.append(row)
                figures = "".join(f"{1000 * row[stage]:8.1f}" for stage in STAGES)
                print(
                    f"{size:18}{name:10}{on:15}{figures}{row['merge_mib']:8.0f}{row['model_mib']:7.0f}",
                    flush=True,
                )
    return rows


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", default=SIZES, help="clients x values, separated by commas (default: %(default)s)"
    )
    parser.add_argument("--rules", default=RULES, help="separated by commas (default: %(default)s)")
    parser.add_argument(
        "--on", default="numpy,torch-cpu", help="numpy, torch-cpu, torch-cuda (default: %(default)s)"
    )
    parser.add_argument(
        "--ledgers", type=int, default=2, help="that the updates are spread over (default: 2)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="measured ones (default: 3)")
    parser.add_argument(
        "--directory", type=Path, help="for the ledgers, e.g. on tmpfs (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is None:
        rows = table(arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        print(json.dumps(measure(*json.loads(arguments.row), Path(folder))))


if __name__ == "__main__":
    main()
