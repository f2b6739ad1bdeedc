"""The mask: as the original draws it, and the same bytes with and without the C extension."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from unit.compression.vectors import VECTORS

from fedcore.compression import mask

CASES = VECTORS["mask"]["cases"]
INVERSE = pow(48271, -1, 2**32)
BLOCK = mask._BLOCK
SEEDS = st.integers(-(2**31), 2**31 - 1)
RATES = st.floats(0, 1, width=32)

needs_c = pytest.mark.skipif(not mask.COMPILED, reason="the C extension could not be built here")


def wrap(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


def truncated(number: int) -> int:
    return abs(number) % 2147483647 * (1 if number >= 0 else -1)


def states(seed: int, count: int) -> list[int]:
    """The generator, one step after the other."""
    state, found = truncated(wrap(wrap(seed + 2147483647) * 48271)), []
    for _ in range(count):
        found.append(state)
        state = truncated(wrap(state * 48271))
    return found


def slowly(seed: int, kept: int, size: int) -> list[bool]:
    """The mask by the book."""
    marks = [True] * kept + [False] * (size - kept)
    for i, state in enumerate(states(seed, size)):
        j = int((state / 4294967294.0 + 0.5) * (size - i)) + i
        marks[i], marks[j] = marks[j], marks[i]
    return marks


def plainly(seed: int, rate: float, size: int) -> np.ndarray[Any, Any]:
    marks = np.empty(size, np.bool_)
    mask.fill_plainly(marks, mask.kept(rate, size), seed)
    return marks


def seed_with(state: int, step: int) -> int:
    """A seed whose product before the remainder, in a step from 0 on, is ``state`` modulo 2**32."""
    return wrap(state * pow(INVERSE, step + 1, 2**32) - 2147483647)


@pytest.mark.parametrize("draw", [mask.draw, plainly], ids=["draw", "plain"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed {case['seed']}, {case['n']}")
def test_is_the_originals(draw: Any, case: dict[str, Any]) -> None:
    marks = draw(case["seed"], case["rate"], case["n"])
    assert marks.dtype == np.bool_
    if "mask" in case:
        assert "".join("01"[mark] for mark in marks.tolist()) == case["mask"]
    else:
        assert marks.sum() == case["ones"]
        assert hashlib.sha256(marks.tobytes()).hexdigest() == case["sha256_of_01_bytes"]


def test_the_book_has_the_originals_states() -> None:
    known = VECTORS["mask"]["states_of_seed_1"]
    assert states(1, len(known)) == known


@given(SEEDS, RATES, st.integers(0, 300))
@example(-(2**31 - 1), 0.5, 9)  # the generator stands at zero from its first step on
def test_is_the_one_by_the_book(seed: int, rate: float, size: int) -> None:
    expected = slowly(seed, mask.kept(rate, size), size)
    assert mask.draw(seed, rate, size).tolist() == expected
    assert plainly(seed, rate, size).tolist() == expected


@pytest.mark.parametrize("step", [0, 1, 5, 99])
@pytest.mark.parametrize("end", [2**31 - 1, -(2**31 - 1), -(2**31)])
def test_is_the_one_by_the_book_where_a_remainder_is_none(end: int, step: int) -> None:
    """The three products that a remainder changes are met on the way."""
    seed = seed_with(end, step)
    expected = slowly(seed, 60, 150)
    assert mask.draw(seed, 0.4, 150).tolist() == expected
    assert plainly(seed, 0.4, 150).tolist() == expected


@needs_c
@settings(max_examples=8)
@given(SEEDS, RATES, st.integers(BLOCK - 3, 2 * BLOCK + 3))
@example(seed_with(2**31 - 1, BLOCK - 1), 0.5, 2 * BLOCK)
@example(seed_with(-(2**31 - 1), BLOCK), 0.5, 2 * BLOCK)
@example(5, 0.3, BLOCK)
@example(5, 0.3, BLOCK + 1)
def test_both_ways_give_the_same_bytes(seed: int, rate: float, size: int) -> None:
    assert mask.draw(seed, rate, size).tobytes() == plainly(seed, rate, size).tobytes()


@given(SEEDS, RATES, st.integers(0, 3000))
def test_keeps_as_many_as_it_says(seed: int, rate: float, size: int) -> None:
    marks = mask.draw(seed, rate, size)
    assert (len(marks), marks.sum()) == (size, mask.kept(rate, size))


@pytest.mark.parametrize(
    ("rate", "size", "kept"),
    [
        (0.4, 20, 8),
        (0.29, 100, 29),  # the product is rounded to 29, while 100 * 0.29 is less in double
        (0.3, 1_000_000, 300_000),
        (0.1, 9, 0),
        (1.0, 16777219, 16777219),  # float32 rounds the size up
        (0.0, 9, 0),
    ],
)
def test_counts_in_single_precision(rate: float, size: int, kept: int) -> None:
    assert mask.kept(rate, size) == kept


def test_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        mask.draw(1, 0.4, 20)[0] = True


@pytest.mark.parametrize(("rate", "size"), [(-0.1, 5), (1.1, 5), (float("nan"), 5), (0.5, -1), (0.5, 2**31)])
def test_refuses_what_is_no_mask(rate: float, size: int) -> None:
    with pytest.raises(ValueError, match="there is no mask of"):
        mask.draw(1, rate, size)


@pytest.mark.parametrize("seed", [2**31, -(2**31) - 1])
def test_refuses_what_is_no_seed(seed: int) -> None:
    with pytest.raises(OverflowError):
        mask.draw(seed, 0.5, 5)


def test_does_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fedcore.compression._mask", None)
    spec = importlib.util.spec_from_file_location("mask_without_c", mask.__file__)
    assert spec is not None and spec.loader is not None
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    assert not without.COMPILED
    assert without.draw(1, 0.4, 20).tolist() == slowly(1, 8, 20)


@needs_c
class TestExtension:
    @pytest.fixture
    def fill(self) -> Any:
        from fedcore.compression._mask import fill

        return fill

    def test_refuses_more_ones_than_there_are_elements(self, fill: Any) -> None:
        for kept in (-1, 6, 2**62):
            with pytest.raises(ValueError, match="at most"):
                fill(bytearray(5), kept, 1)

    @pytest.mark.parametrize("arguments", [(b"12345", 1, 1), (bytearray(5), 1), ("text", 1, 1), (None, 1, 1)])
    def test_refuses_what_it_cannot_write_to(self, fill: Any, arguments: tuple[Any, ...]) -> None:
        with pytest.raises(TypeError):
            fill(*arguments)

    def test_refuses_seeds_that_do_not_fit(self, fill: Any) -> None:
        with pytest.raises(OverflowError):
            fill(bytearray(5), 1, 2**31)

    def test_lets_other_threads_run(self, fill: Any) -> None:
        """This thread sees the work half done, which it could not if the other one held the interpreter."""
        marks, done = bytearray(20_000_000), threading.Event()

        def work() -> None:
            fill(marks, 10_000_000, 1)
            done.set()

        thread = threading.Thread(target=work)
        thread.start()
        seen = {bytes(1000)}
        while not done.is_set():
            seen.add(bytes(marks[-1000:]))
        thread.join()
        assert len(seen - {bytes(1000), bytes(marks[-1000:])}) >= 1
