"""What one update costs, stage by stage, in one process and without sockets: microseconds of CPU per update.

    python bench/upload_stages.py                    LeNet-5, 66,404 values
    python bench/upload_stages.py --floats 5000000 --updates 40

Lines in brackets are no part of the sum: what takes the place of the check of finiteness where
fedcore.update.norm_bound is set, and the plain sum in memory that a server without a ledger would do.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from cluster_load import LENET

from fedcore.aggregation.bounds import Sent, distance
from fedcore.aggregation.sums import Spans
from fedcore.ledger.files import create_file
from fedcore.ledger.layout import Epoch, Shape
from fedcore.ledger.ledger import MERGE_BATCH, Ledger
from fedcore.services.answers import Answers
from fedcore.services.client_api import update_limit
from fedcore.services.ledgers import update_of
from fedcore.wire import codec
from fedcore.wire.arrays import Layout, check_shapes, check_update
from fedcore.wire.messages import FeatureMap, RequestUpdateModel

SLOTS = 16


class Stages:
    """CPU seconds by stage."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.process_time_ns()
        yield
        self.spent[name] += (time.process_time_ns() - began) / 1e9


def run(shapes: dict[str, tuple[int, ...]], updates: int, directory: Path) -> dict[str, float]:
    """Take updates through all stages; return CPU seconds by stage."""
    rng = np.random.default_rng(1)
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    model = Layout.of(arrays)
    shape = Shape.of(model, "bench", updates, SLOTS, update_limit(model))
    ledger = Ledger.create(create_file(directory, "bench", shape.size), model, shape)
    maps = tuple(FeatureMap(name, values.reshape(-1)) for name, values in arrays.items())
    bodies = [codec.encode(RequestUpdateModel("bench", f"client-{i}", 1, maps, "1")) for i in range(updates)]
    flat = {name: values.reshape(-1) for name, values in arrays.items()}
    sums, spans = np.zeros(model.total_floats), list(Spans(model))
    stages = Stages()
    for epoch in (1, 2):  # the first warms up caches and pages
        ledger.begin(Epoch("bench", epoch, "00" * 32))
        stages.spent.clear()
        for body in bodies:
            slot = ledger.receive()
            assert slot is not None
            with stages.stage("receive: copy into the slot"):
                slot.buffer[: len(body)] = body
                slot.length = len(body)
            with stages.stage("decode"):
                request = codec.decode(RequestUpdateModel, slot.body)
            with stages.stage("check names, sizes, finiteness"):
                update = update_of(request, 7, 0)
                check_update(model, update.weights)
            with stages.stage("ledger: checksum and record"):
                ledger.record(slot, update.fl_id, 0.5, 0.0)
            with stages.stage("ledger: mark accepted"):
                ledger.accept(slot, update)
            if ledger.unmerged == MERGE_BATCH:
                with stages.stage("ledger: merge"):
                    merged = ledger.merge()
                for each in merged:
                    ledger.reuse(each)
            with stages.stage("answer"):
                Answers.update(200, "success not ready", 1_700_000_000_000)
            with stages.stage("(with norm_bound: names, sizes, distance)"):
                check_shapes(model, update.weights)
                distance(update.weights, flat, lambda name: Sent.PRODUCT, 7)
            with stages.stage("(plain float64 sum in memory)"):
                for name, span in spans:
                    np.add(sums[span], update.weights[name], out=sums[span])
        while ledger.unmerged:
            ledger.merge()
        del slot, request, update
    return stages.spent


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--floats", type=int, help="values of the model, in ten weights (default: LeNet-5)")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument(
        "--directory", type=Path, help="for the ledger, e.g. on tmpfs (default: a temporary one)"
    )
    arguments = parser.parse_args()
    shapes = LENET if arguments.floats is None else {f"w{i}": (arguments.floats // 10,) for i in range(10)}
    measure: Callable[[Path], dict[str, float]] = lambda folder: run(shapes, arguments.updates, folder)  # noqa: E731
    if arguments.directory:
        spent = measure(arguments.directory)
    else:
        with tempfile.TemporaryDirectory() as folder:
            spent = measure(Path(folder))
    for name, seconds in spent.items():
        print(f"{name:42} {1e6 * seconds / arguments.updates:10.1f} us")
    own = sum(seconds for name, seconds in spent.items() if not name.startswith("("))
    print(f"{'all of these':42} {1e6 * own / arguments.updates:10.1f} us")


if __name__ == "__main__":
    main()
