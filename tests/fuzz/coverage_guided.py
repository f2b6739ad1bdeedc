"""The same targets for atheris, which follows coverage: by hand, as atheris is none of our dependencies.

    pip install atheris
    PYTHONPATH=tests python tests/fuzz/coverage_guided.py tables corpus/ -max_total_time=600

The first argument is the target; the rest is libFuzzer's. The folder begins with the target's good inputs. A finding
lies in crash-*; put it into tests/fuzz/seeds/TARGET/NAME.bin, where each test run reads it.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedcore", "httptools"]):
    from fuzz.targets import TARGETS


def main() -> None:
    """Run libFuzzer on one target."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(
            f"usage: coverage_guided.py {{{','.join(sorted(TARGETS))}}} [CORPUS] [-libfuzzer_option=...]"
        )
    target = TARGETS[sys.argv.pop(1)]
    for folder in (argument for argument in sys.argv[1:2] if not argument.startswith("-")):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(target.seeds):
            (Path(folder) / f"seed-{number}").write_bytes(data)

    def one_input(data: bytes) -> None:
        with contextlib.suppress(*target.allowed):
            target.run(data)

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
