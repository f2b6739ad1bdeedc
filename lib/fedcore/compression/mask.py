"""Which elements of an update travel: chosen by the iteration's number alone, alike on both sides.

The wire does not carry the choice, so both sides must make it to the last bit, with the original's generator: a
multiplicative one whose products wrap at 32 bits with their sign (in C++ by chance, in Java by definition). It is
no good generator and the choice is no secret; it saves bytes, nothing else.

Element i of ``kept`` ones followed by zeros is exchanged with a random one from i on, for each i in turn. What each
exchange does depends on all before it, so a loop is needed: in C (``_mask.c``, built where there is a compiler), or
in Python, which takes some twenty times as long for the same bytes. Either is work for a thread, once per iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

_Fill = Callable[[npt.NDArray[np.bool_], int, int], None]

MAX_SIZE = 2**31 - 1  # elements; the original counts them in an int
_MULTIPLIER = 48271
_MODULUS = 2147483647  # 2**31 - 1
_SPREAD = 4294967294.0  # 2 * _MODULUS: states lie between -_MODULUS and _MODULUS, both excluded
_BLOCK = 1 << 16  # steps that are computed together: their arrays stay in the cache


def kept(rate: float, size: int) -> int:
    """Return how many of ``size`` elements travel.

    Args:
        rate: 0..1, rounded to float32 as on the wire.
        size: 0..2**31-1.

    Returns:
        The product in float32, truncated. From 2**24 elements on float32 may round ``size`` up: never more than all.
    """
    return min(int(np.float32(size) * np.float32(rate)), size)


def draw(seed: int, rate: float, size: int) -> npt.NDArray[np.bool_]:
    """Choose ``kept(rate, size)`` of ``size`` elements.

    Args:
        seed: int32, the number of the iteration.
        rate: 0..1, the job's ``upload_sparse_rate``.
        size: elements of all weights of the update together, 0..2**31-1.

    Returns:
        bool[size], read-only; True where an element travels.

    Raises:
        ValueError: ``size`` or ``rate`` is out of range.
        OverflowError: ``seed`` is no int32.
    """
    if not 0 <= size <= MAX_SIZE or not 0 <= rate <= 1:
        raise ValueError(f"there is no mask of {size} elements with a rate of {rate}")
    if not -(2**31) <= seed < 2**31:
        raise OverflowError(f"{seed} is no number of an iteration")
    marks = np.empty(size, np.bool_)
    _fill(marks, kept(rate, size), seed)
    marks.flags.writeable = False
    return marks


def fill_plainly(marks: npt.NDArray[np.bool_], kept: int, seed: int) -> None:
    """Write the mask over ``marks`` without the C extension: the same bytes, later."""
    content = bytearray(b"\1" * kept + b"\0" * (len(marks) - kept))
    at = 0
    for others in _partners(seed, len(marks)):
        for other in others:
            content[at], content[other] = content[other], content[at]
            at += 1
    marks[:] = np.frombuffer(content, np.bool_)


def _partners(seed: int, size: int) -> Iterator[list[int]]:
    """Yield, in blocks, the element that each one in turn is exchanged with.

    The remainder changes a product only where that is one of the three numbers at the ends of int32. Everywhere
    else a state is the one before times the multiplier, modulo 2**32: a block of them is one array of products.
    """
    powers = np.full(_BLOCK, _MULTIPLIER, np.uint32).cumprod(dtype=np.uint32)
    state = _step(_wrapped(seed + _MODULUS))
    for start in range(0, size, _BLOCK):
        states = _states(state, powers)
        state = _step(int(states[-1]))
        left = size - np.arange(start, min(start + _BLOCK, size))
        chances = states[: len(left)].astype(np.float64) / _SPREAD + 0.5
        yield ((chances * left).astype(np.int64) + (size - left)).tolist()


def _states(first: int, powers: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
    """Return as many states as a block has, from ``first`` on."""
    states = np.empty(len(powers), np.int32)
    states[0] = first
    done = 1
    while done < len(states):
        products = (powers[: len(states) - done] * np.uint32(int(states[done - 1]) % 2**32)).view(np.int32)
        ends = np.flatnonzero((products >= _MODULUS) | (products <= -_MODULUS))
        good = int(ends[0]) + 1 if len(ends) else len(products)
        states[done : done + good] = products[:good]
        done += good
        states[done - 1] = _remainder(int(states[done - 1]))
    return states


def _step(state: int) -> int:
    return _remainder(_wrapped(state * _MULTIPLIER))


def _wrapped(number: int) -> int:
    """Return a number as an int32 holds it."""
    return (number + 2**31) % 2**32 - 2**31


def _remainder(number: int) -> int:
    """Return the remainder of a division that truncates: it has the sign of the number."""
    return number % _MODULUS if number >= 0 else -(-number % _MODULUS)


_fill: _Fill = fill_plainly
try:
    from fedcore.compression._mask import fill as _fill
except ImportError:
    COMPILED = False
else:
    COMPILED = True
