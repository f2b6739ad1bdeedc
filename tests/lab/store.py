"""Things that are made once and kept: each has a key made of all that it depends on.

    CACHE/KIND-KEY      what was made; touched whenever it is used
    CACHE/KIND.lock     held by whoever makes one of this kind, so that two labs do not make the same thing twice

A thing appears under its name only when it is complete. What nobody used for two weeks is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.commands import say
from lab.places import CACHE

KEPT_S = 14 * 24 * 3600


def keyed(kind: str, ingredients: str, make: Callable[[Path], None]) -> Path:
    """The thing of this kind made of these ingredients; made now if it is not there.

    Args:
        kind: its name in the cache.
        ingredients: all that its content depends on.
        make: fills the empty folder that it is given.
    """
    place = CACHE / f"{kind}-{hashlib.sha256(ingredients.encode()).hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / f"{kind}.lock"):
        if not place.exists():
            started = time.monotonic()
            say(f"making {place}")
            _make(place, make)
            say(f"made {place.name} in {time.monotonic() - started:.0f} s")
        os.utime(place)
        _remove_unused(kind, but=place)
    return place


def _make(place: Path, make: Callable[[Path], None]) -> None:
    growing = place.with_name(f"{place.name}.growing")
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir()
    make(growing)
    growing.rename(place)


def _remove_unused(kind: str, but: Path) -> None:
    for other in CACHE.glob(f"{kind}-*"):
        if other != but and time.time() - other.stat().st_mtime > KEPT_S:
            shutil.rmtree(other, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
