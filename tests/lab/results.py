"""The table of what faults cost, as it stands in docs/RELIABILITY.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lab.commands import say
from lab.devices import Seen

COLUMNS = (
    "fault",
    "nobody answers for",
    "no new model for",
    "a device waits at most",
    'requests repeated, told "not ready"',
    "iterations meanwhile",
    "updates accepted",
    "of these lost",
)


class Results:
    """A Markdown table in a file, one row per fault, written as they come.

    Args:
        file: begun anew.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{_line(COLUMNS)}\n{_line(['---'] * len(COLUMNS))}\n")

    def add(self, seen: Seen) -> None:
        """Append a row."""
        say(str(seen))
        with self._file.open("a") as file:
            file.write(row_of(seen) + "\n")


def row_of(seen: Seen) -> str:
    """Return a row of the table."""
    iterations = f"{seen.iterations} in {seen.seconds:.0f} s"
    if seen.failed:
        reasons = "; ".join(sorted(set(seen.failed.values())))
        iterations += f", {len(seen.failed)} without a model ({reasons})"
    lost = str(seen.lost) if not seen.lost else f"{seen.lost}, {seen.missing} in no model"
    if seen.ends:
        lost += f"; unmodified devices gave up: {', '.join(sorted({end.why for end in seen.ends}))}"
    cells = [
        seen.what,
        f"{seen.silence:.1f} s",
        f"{seen.pause:.1f} s",
        f"{seen.wait:.1f} s",
        f"{seen.repeats}, {seen.texts}",
        iterations,
        str(seen.acknowledged),
        lost,
    ]
    return _line([cell.replace("|", "\\|") for cell in cells])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
