"""What compression costs: CPU time of each step on either side, and how many bytes travel.

    python bench/compression.py                            models of 66,404, a million and 5 million values, rate 0.4
    python bench/compression.py --sizes 25000000 --rate 0.08 --json result.json

No sockets. Measured are, as CPU milliseconds, median of ``--rounds`` after one to warm up,

    mask       the choice of an iteration, with the C extension if it is there
    plain      the same without it
    pattern    the chosen elements of each weight
    compress   a device makes its update; an update is values near the model's, times 100
    check      a server looks at one
    restore    a server makes weights of one
    pack       a server makes its model 8 bits, in the form of the answers
    unpack     a device makes floats of that

and the bytes of an update and of a model, compressed and not, without their names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fedcore.compression import mask, quant, sparse
from fedcore.services.packed_models import pack
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.image import ImageTemplate

SIZES = "66404,1000000,5000000"
WEIGHTS = 10  # of the model, nearly all of one size
DATA_SIZE = 100
STEPS = ("mask", "plain", "pattern", "compress", "check", "restore", "pack", "unpack")


def median_ms(work: Callable[[], object], rounds: int) -> float:
    """Return the CPU time of a call, all threads."""
    work()
    spent = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return 1000 * statistics.median(spent)


def measure(size: int, rate: float, rounds: int) -> dict[str, Any]:
    chance = np.random.default_rng(1)
    bounds = np.linspace(0, size, WEIGHTS + 1).astype(int)
    layers = [(f"layer{i}.weight", int(bounds[i + 1] - bounds[i])) for i in range(WEIGHTS)]
    model = {name: chance.normal(0, 0.05, count).astype(np.float32) for name, count in layers}
    trained = {
        name: (values + chance.normal(0, 0.001, values.size).astype(np.float32)) * np.float32(DATA_SIZE)
        for name, values in model.items()
    }
    layout = Layout(tuple(Weight(name, (count,)) for name, count in layers))
    image = ImageTemplate(layout).image(model)
    marks, blank = mask.draw(1, rate, size), np.empty(size, np.bool_)
    pattern = sparse.pattern(layers, marks)
    items = sparse.compress(pattern, trained, model, DATA_SIZE)
    small = [quant.compress(name, values) for name, values in model.items()]
    work: dict[str, Callable[[], object]] = {
        "mask": lambda: mask.draw(1, rate, size),
        "plain": lambda: mask.fill_plainly(blank, mask.kept(rate, size), 1),
        "pattern": lambda: sparse.pattern(layers, marks),
        "compress": lambda: sparse.compress(pattern, trained, model, DATA_SIZE),
        "check": lambda: sparse.fault(pattern, items),
        "restore": lambda: [
            sparse.restore_weight(pattern.places[name], item, model[name], DATA_SIZE)
            for name, item in zip(model, items, strict=True)
        ],
        "pack": lambda: pack(image),
        "unpack": lambda: [quant.restore(item) for item in small],
    }
    return {
        "floats": size,
        "compiled": mask.COMPILED,
        "ms": {step: median_ms(work[step], rounds) for step in STEPS},
        "update_bytes": [sum(item.compress_data.size for item in items), 4 * size],  # type: ignore[union-attr]
        "model_bytes": [sum(item.compress_data.size for item in small), 4 * size],  # type: ignore[union-attr]
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default=SIZES, help="values of the models")
    parser.add_argument("--rate", type=float, default=0.4, help="upload_sparse_rate")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="write the figures to a file")
    options = parser.parse_args()
    rows = [measure(int(size), options.rate, options.rounds) for size in options.sizes.split(",")]
    print(f"C extension: {'yes' if mask.COMPILED else 'no'}; CPU ms")
    print(f"{'floats':>10}", *(f"{step:>9}" for step in STEPS), f"{'update':>9}{'model':>9}")
    for row in rows:
        shares = (sent / plain for sent, plain in (row["update_bytes"], row["model_bytes"]))
        print(
            f"{row['floats']:>10}",
            *(f"{row['ms'][step]:9.2f}" for step in STEPS),
            *(f"{share:8.0%}" for share in shares),
        )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
