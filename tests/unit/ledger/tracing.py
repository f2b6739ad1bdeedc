"""A storage that remembers every write, and can show what a crash at any point would have left."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

SECTORS = (4096, 512)  # what a disk writes at once, or not at all


@dataclass(frozen=True)
class Written:
    """One write: a word is a single store, anything longer may be cut anywhere."""

    at: int
    data: bytes

    @property
    def atomic(self) -> bool:
        return len(self.data) == 8 and self.at % 8 == 0

    def torn(self, unit: int) -> list[Written]:
        """The pieces that reach a disk each for itself."""
        bounds = range(self.at // unit * unit + unit, self.at + len(self.data), unit)
        cuts = [0, *(bound - self.at for bound in bounds), len(self.data)]
        return [Written(self.at + a, self.data[a:b]) for a, b in pairwise(cuts) if a < b]


Trace = Sequence[Written | None]


@dataclass
class Tracing:
    """Bytes in memory; ``trace`` holds writes, and None for each sync."""

    size: int
    trace: list[Written | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.content = bytearray(self.size)
        self.buffer = memoryview(self.content)

    def write(self, at: int, data: bytes | memoryview) -> None:
        self.note(at, data)
        self.buffer[at : at + len(data)] = data

    def note(self, at: int, data: bytes | memoryview) -> None:
        """Remember what somebody writes into the buffer by himself."""
        assert at + len(data) <= self.size
        self.trace.append(Written(at, bytes(data)))

    def sync(self) -> None:
        self.trace.append(None)


class Held(Tracing):
    """A storage that begins with given bytes."""

    def __init__(self, content: bytes | bytearray) -> None:
        super().__init__(len(content))
        self.buffer[:] = content


def put(content: bytearray, written: Written) -> None:
    content[written.at : written.at + len(written.data)] = written.data


def prefixes(trace: Trace, before: bytes | bytearray) -> Iterator[tuple[int, bool, bytearray]]:
    """Yield (writes done, whether the next one is half done, bytes) for every prefix of a trace on some bytes.

    The bytes are those of the generator; whoever keeps or changes them makes a copy.
    """
    content = bytearray(before)
    for done, written in enumerate(trace):
        yield done, False, content
        if written is None:
            continue
        if not written.atomic:
            put(content, Written(written.at, written.data[: len(written.data) // 2]))
            yield done, True, content
        put(content, written)
    yield len(trace), False, content


def unsynced(trace: Trace, done: int) -> tuple[list[Written], list[Written]]:
    """Split the first ``done`` writes into those that a disk has for certain and those since the last sync."""
    before = list(trace[:done])
    last = max((i for i, written in enumerate(before) if written is None), default=-1)
    return [w for w in before[:last] if w is not None], [w for w in before[last + 1 :] if w is not None]


def pieces(writes: Sequence[Written], chance: random.Random | None = None) -> list[Written]:
    """Cut writes as a disk may: at sectors, or now and then between any two words."""
    found: list[Written] = []
    for written in writes:
        unit = 512 if chance is None else chance.choice((*SECTORS, 8))
        found += written.torn(unit)
    return found


def subsets(parts: Sequence[Written], chance: random.Random, most: int) -> Iterator[list[Written]]:
    """Yield what of some writes may have reached the disk: every subset, or ``most`` of them by chance."""
    if 2 ** len(parts) <= most:
        for choice in product((False, True), repeat=len(parts)):
            yield [part for part, kept in zip(parts, choice, strict=True) if kept]
        return
    yield []
    yield list(parts)
    for _ in range(most - 2):
        share = chance.choice((0.1, 0.5, 0.9))
        yield [part for part in parts if chance.random() < share]
