"""Run a daemon and note how long its reactor is busy at a stretch: nobody else is served meanwhile.

    python bench/reactor_turns.py turns.json fl-serverd --yaml-config fl.yaml --model lenet.safetensors

A turn is what happens between two looks at the sockets: each of those that are ready is served once, one after the
other, and then timers and what comes from threads. Noted are the longest turns and the longest single pieces of them.
Their time is that of the clock, less what the thread waited for a core: waiting for the interpreter's lock, for a disk
or for anything else counts, other processes do not. All is written, with where it was found, when the daemon ends.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet import reactor

from fldaemons import schedulerd, serverd, workerd

PROGRAMS = {"fl-schedulerd": schedulerd.main, "fl-serverd": serverd.main, "fl-workerd": workerd.main}
KEPT = 40  # longest turns
LOOK_S = 0.004  # between two looks at where a turn is
FRAMES = 14


class Turns:
    """Stands where the reactor looks at its sockets."""

    def __init__(self, poller: Any) -> None:
        self._poller = poller
        self._schedule = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
        self._thread = threading.get_ident()
        self._began: tuple[float, float, float] | None = None
        self._began_piece = 0.0
        self._where: list[str] = []
        self._events = 0
        self.count = 0
        self.longest: list[dict[str, Any]] = []
        self.pieces: list[dict[str, Any]] = []
        self.collections: list[dict[str, Any]] = []
        self._collecting = (0.0, 0.0, 0.0)
        gc.callbacks.append(self._collected)
        threading.Thread(target=self._watch, daemon=True).start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._poller, name)

    def poll(self, *arguments: Any) -> Any:
        """End a turn, look, begin the next."""
        if self._began is not None:
            self._note(*self._began)
        self._began = None
        found = self._poller.poll(*arguments)
        self._where, self._events = [], len(found)
        self._began = self._clocks()
        return found

    def _clocks(self) -> tuple[float, float, float]:
        waited = int(os.pread(self._schedule, 100, 0).split()[1]) / 1e9
        return time.monotonic(), waited, time.thread_time()

    def piece(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is noted each time."""

        def noted(*arguments: Any) -> Any:
            began, self._where = self._clocks(), []
            self._began_piece = began[0]
            try:
                return work(*arguments)
            finally:
                self._keep(self.pieces, began)

        return noted

    def _note(self, *began: float) -> None:
        self.count += 1
        self._keep(self.longest, began)

    def _keep(self, longest: list[dict[str, Any]], began: tuple[float, ...]) -> None:
        now, waited, worked = (after - before for after, before in zip(self._clocks(), began, strict=True))
        ms = 1e3 * (now - waited)
        if len(longest) < KEPT or ms > longest[-1]["ms"]:
            found = {"ms": ms, "cpu_ms": 1e3 * worked, "wall_ms": 1e3 * now, "at": began[0]}
            longest.append({**found, "events": self._events, "where": self._where})
            longest.sort(key=lambda one: -float(one["ms"]))
            del longest[KEPT:]

    def _collected(self, phase: str, about: dict[str, int]) -> None:
        """Note what Python takes for finding cycles of dead objects; it may come upon the reactor anywhere."""
        if threading.get_ident() != self._thread:
            return
        if phase == "start":
            self._collecting = self._clocks()
        else:
            self._keep(self.collections, self._collecting)

    def _watch(self) -> None:
        """Note where a turn is that goes on for long, again and again."""
        while True:
            time.sleep(LOOK_S)
            where = self._where
            if self._began is not None and time.monotonic() - self._began_piece > LOOK_S and len(where) < 5:
                frame = sys._current_frames()[self._thread]
                calls = traceback.extract_stack(frame)[-FRAMES:]
                where.append(
                    " < ".join(f"{Path(c.filename).name}:{c.lineno} {c.name}" for c in reversed(calls))
                )


def main() -> None:
    """Run a daemon with its own arguments."""
    written, program, *arguments = sys.argv[1:]
    turns = reactor._poller = Turns(reactor._poller)  # type: ignore[attr-defined]
    reactor._doReadOrWrite = turns.piece(reactor._doReadOrWrite)  # type: ignore[attr-defined]
    reactor.runUntilCurrent = turns.piece(reactor.runUntilCurrent)  # type: ignore[attr-defined]
    reactor.addSystemEventTrigger(  # type: ignore[attr-defined]
        "after",
        "shutdown",
        lambda: Path(written).write_text(
            json.dumps(
                {
                    "count": turns.count,
                    "turns": turns.longest,
                    "pieces": turns.pieces,
                    "collections": turns.collections,
                }
            )
        ),
    )
    sys.argv = [program, *arguments]
    PROGRAMS[program]()


if __name__ == "__main__":
    main()
