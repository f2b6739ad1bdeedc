"""SIGNDS: a device tells a few positions of the model, mostly among those that its training moves the most.

It tosses a coin for a sign. Of the k positions that moved furthest that way it tells v, of all others h - v, each
chosen at random. v is drawn so that to tell ``threshold`` or more of the k is exp(epsilon) times as likely as chance
would have it, which is all that an update can say about a device's data; updates add their epsilons up. The server
moves what it is told by a fixed step in the direction of the sign.

h, threshold and the distribution of v depend on nothing but the job and the size of the model. They are computed in
logarithms, as the binomial coefficients of a large model and exp(epsilon) overflow doubles.

Chance comes in as an argument, ``random(n)`` giving n secret random bytes.

Source: Jiang, Zhou and Grossklags, SignDS-FL: Local Differentially Private Federated Learning with Sign-based
Dimension Selection, ACM TIST 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedcore.wire.arrays import Floats

Random = Callable[[int], bytes]
Doubles = npt.NDArray[np.float64]

MOST_POSITIONS = 100  # in one update; servers refuse more
WEAK_EPSILON = 10.0  # above it an update practically tells which positions moved the most
_LOG_LARGEST = math.log(float(np.finfo(np.float64).max))


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """How positions are chosen.

    Attributes:
        top: k, positions that count as those that moved the most.
        told: h, positions in an update.
        threshold: of the top ones told, the number from which on an update is exp(epsilon) times as likely.
        chances: float64[h+1], of telling 0..h of the top ones; their sum is 1.
    """

    top: int
    told: int
    threshold: int
    chances: Doubles


def top_of(share: float, size: int) -> int:
    """Return k: ``sign_k`` times the elements of the model, in float32 and truncated, but at least one."""
    return max(1, min(int(np.float32(share) * np.float32(size)), size))


def choice_of(size: int, share: float, epsilon: float, ratio: float, told: int = 0) -> Choice:
    """Work out how positions are chosen.

    Args:
        size: elements of the update's weights, >= 1.
        share: the job's ``sign_k``, 0..0.25.
        epsilon: its ``sign_eps``.
        ratio: its ``sign_thr_ratio``: how many of the positions told shall be top ones, on average.
        told: its ``sign_dim_out``; 0 for as many as keep to the ratio.
    """
    top = top_of(share, size)
    most = min(MOST_POSITIONS, size)
    told = min(told, most) or _most_told(top, size, epsilon, ratio, most)
    ways = _log_ways(top, size, told)
    threshold = _threshold(ways, epsilon)[0]
    return Choice(top, told, threshold, _chances(ways, epsilon, threshold))


def select(change: Floats, sign: int, choice: Choice, random: Random) -> npt.NDArray[np.int32]:
    """Choose the positions to tell.

    Args:
        change: float32[size], what training changed, finite.
        sign: 1 for those that grew the most, -1 for those that shrank the most.
        choice: how.
        random: secret chance.

    Returns:
        int32[h], ascending.
    """
    drawn = _below(2**53, random) * 2.0**-53
    of_top = min(int(np.searchsorted(np.cumsum(choice.chances), drawn)), choice.told)
    order = np.argsort(-change if sign > 0 else change, kind="stable")
    picked = [
        *_sample(order[: choice.top], of_top, random),
        *_sample(order[choice.top :], choice.told - of_top, random),
    ]
    return np.sort(np.array(picked, np.int32))


def coin(random: Random) -> int:
    """Return 1 or -1, each as likely."""
    return 1 if random(1)[0] & 1 else -1


# ---- h and threshold


def _most_told(top: int, size: int, epsilon: float, ratio: float, most: int) -> int:
    """Return the last h of those, from 1 on, at which enough of the positions told are top ones.

    The search also ends where the original's doubles overflow, so that all devices of a job tell as many.
    """
    for told in range(1, most + 1):
        ways = _log_ways(top, size, told)
        overflows = float(np.logaddexp.reduce(_weights(ways, epsilon, 1))) > _LOG_LARGEST
        if overflows or _threshold(ways, epsilon)[1] < ratio * told:
            return max(1, told - 1)
    return most


def _threshold(ways: Doubles, epsilon: float) -> tuple[int, float]:
    """Return the first threshold that the next one does not surpass, and how many top ones it tells on average."""
    best, expected = 1, _expected(ways, epsilon, 1)
    for threshold in range(2, len(ways)):
        further = _expected(ways, epsilon, threshold)
        if not further > expected:
            break
        best, expected = threshold, further
    return best, expected


def _expected(ways: Doubles, epsilon: float, threshold: int) -> float:
    return float(np.dot(np.arange(len(ways)), _chances(ways, epsilon, threshold)))


def _chances(ways: Doubles, epsilon: float, threshold: int) -> Doubles:
    weights = _weights(ways, epsilon, threshold)
    chances: Doubles = np.exp(weights - weights.max())
    chances /= chances.sum()
    return chances


def _weights(ways: Doubles, epsilon: float, threshold: int) -> Doubles:
    """Return the logarithms of how likely each number of top ones is, but for a common factor."""
    return ways + np.where(np.arange(len(ways)) >= threshold, epsilon, 0.0)


def _log_ways(top: int, size: int, told: int) -> Doubles:
    """Return float64[told+1]: the logarithm of how many choices have 0..told of the top ones; -inf for none."""
    of_top = _log_binomials(top, told)
    return of_top + _log_binomials(size - top, told)[::-1]


def _log_binomials(of: int, most: int) -> Doubles:
    """Return float64[most+1]: the logarithms of the ways to choose 0..most of some things."""
    with np.errstate(divide="ignore", invalid="ignore"):
        chosen = np.arange(1, most + 1, dtype=np.float64)
        steps = np.log(np.maximum(of + 1 - chosen, 0) / chosen)
    return np.concatenate([[0.0], np.cumsum(steps)])


# ---- chance


def _sample(among: npt.NDArray[np.intp], count: int, random: Random) -> list[int]:
    """Choose so many different ones, each set as likely as any other."""
    chosen: set[int] = set()
    while len(chosen) < count:
        chosen.add(_below(len(among), random))
    return [int(among[place]) for place in chosen]


def _below(limit: int, random: Random) -> int:
    """Return a number of 0..limit-1, each as likely."""
    whole = 2**64 - 2**64 % limit
    while (number := int.from_bytes(random(8), "little")) >= whole:
        pass
    return number % limit
