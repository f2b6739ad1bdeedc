"""Inputs made of good ones by damage. Input number i of a seed is always the same, so a finding is two numbers."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

LONGEST = 1 << 16  # bytes of an input; what grows beyond that is cut
_WORDS = (0, 1, 4, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF)
_LONG_WORDS = (*_WORDS, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)

Change = Callable[[random.Random, bytearray], None]


class Mutator:
    """Makes the inputs of one target."""

    def __init__(self, name: str, seeds: Sequence[bytes], words: Sequence[bytes], seed: int) -> None:
        """Damage ``seeds``; ``words`` are bytes that mean something to the target."""
        self._seeds = tuple(seeds)
        self._words = tuple(words)
        self._chance = random.Random()
        self._base = (seed << 72) | (sum(name.encode()) << 48)
        self._changes: tuple[Change, ...] = (
            _flip,
            _flip,
            _byte,
            _byte,
            _word,
            _word,
            _nudge,
            _cut,
            _remove,
            _repeat,
            _swap,
            self._insert,
            self._splice,
        )

    def input(self, number: int) -> bytes:
        """Return input ``number``, from 0; the first ones are the seeds themselves."""
        if number < len(self._seeds):
            return self._seeds[number]
        chance = self._chance
        chance.seed(self._base | number)
        data = bytearray(chance.choice(self._seeds))
        for _ in range(1 + min(int(chance.expovariate(0.7)), 12)):
            if data:
                chance.choice(self._changes)(chance, data)
        return bytes(data[:LONGEST])

    def _insert(self, chance: random.Random, data: bytearray) -> None:
        word = chance.choice(self._words) if self._words else bytes([chance.randrange(256)])
        at = chance.randrange(len(data) + 1)
        data[at : at + (len(word) if chance.random() < 0.5 else 0)] = word

    def _splice(self, chance: random.Random, data: bytearray) -> None:
        other = chance.choice(self._seeds)
        if other:
            data[chance.randrange(len(data)) :] = other[chance.randrange(len(other)) :]


def _flip(chance: random.Random, data: bytearray) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _byte(chance: random.Random, data: bytearray) -> None:
    data[chance.randrange(len(data))] = chance.choice((0, 1, 0x20, 0x7F, 0x80, 0xFF, chance.randrange(256)))


def _word(chance: random.Random, data: bytearray) -> None:
    if chance.random() < 0.75:
        word = struct.pack("<I", chance.choice((*_WORDS, len(data), chance.randrange(len(data)))))
    else:
        word = struct.pack("<Q", chance.choice(_LONG_WORDS))
    at = chance.randrange(len(data)) & (~3 if chance.random() < 0.8 else ~0)
    data[at : at + len(word)] = word


def _nudge(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data))
    data[at] = (data[at] + chance.randrange(-9, 10)) & 0xFF


def _cut(chance: random.Random, data: bytearray) -> None:
    del data[chance.randrange(len(data)) :]


def _remove(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data))
    del data[at : at + 1 + int(chance.expovariate(0.1))]


def _repeat(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data))
    part = bytes(data[at : at + 1 + int(chance.expovariate(0.05))])
    data[at:at] = part * chance.choice((1, 1, 2, 9, 100))


def _swap(chance: random.Random, data: bytearray) -> None:
    one, two = chance.randrange(len(data)), chance.randrange(len(data))
    size = 1 + chance.randrange(16)
    data[one : one + size], data[two : two + size] = data[two : two + size], data[one : one + size]
