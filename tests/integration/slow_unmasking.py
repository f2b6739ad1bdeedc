"""Starts fl-serverd so that the thread that takes the masks off stands still in the midst of it, or fails once.

    python slow_unmasking.py FOLDER [options of fl-serverd]

The thread makes FOLDER/begun and goes on as soon as FOLDER/go is there, so that a test can do something to the server
meanwhile; a real one computes for minutes where hundreds of clients were lost. If it finds FOLDER/fail it takes that
away and fails as where no memory is left. Everything else, the daemon included, is as it ever is.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from fedcore.secagg import unmask


def stand_still(folder: Path) -> None:
    """Have whoever takes masks off wait for the test."""
    noise = unmask.noise

    def slow_noise(*given: Any) -> None:
        if (folder / "fail").exists():
            (folder / "fail").unlink()
            raise MemoryError("the test has it so")
        (folder / "begun").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        noise(*given)

    unmask.noise = slow_noise


if __name__ == "__main__":
    from fldaemons.serverd import main

    stand_still(Path(sys.argv.pop(1)))
    main()
