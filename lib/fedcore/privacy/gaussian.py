"""DP_ENCRYPT: a device clips its change of the model, adds Gaussian noise to it, and counts what that has cost.

Everything about a Gaussian mechanism follows from one number, ``mu``: the sensitivity divided by the noise's standard
deviation. ``delta_of`` says which (epsilon, delta) a mu is, exactly; ``mu_of`` and ``epsilon_of`` turn it round. k
mechanisms of the same mu are together one of mu·√k, so that the account (``Spent``) is exact as well and no bound.

The protocol calibrates for changes that are at most the clip bound apart: "this change" against "no change". Any two
changes of that length can be twice as far apart; see ``Spent.epsilon_of_any``.

Chance comes in as an argument, ``random(n)`` giving n secret random bytes.

Sources: Balle and Wang, Improving the Gaussian Mechanism, arXiv:1805.06530 (theorem 8: delta of epsilon); Dong, Roth
and Su, Gaussian Differential Privacy, arXiv:1905.02383 (corollary 2: composition); Mironov, On Significance of the
Least Significant Bits For Differential Privacy, CCS 2012 (why results lie on a grid).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedcore.errors import NonFinite
from fedcore.wire.arrays import Floats

Random = Callable[[int], bytes]

FIRST_CLIP = 0.05  # clip bound of a device that has seen no model change yet; the protocol's
CLIP_FLOOR = (
    1e-3  # below, float32 weights would swallow the noise, and a training that stood still would stay so
)
_GRID = 1024  # steps of the results' grid in one standard deviation
_NEAR = 1e-4  # mu below which the two tails are one derivative apart
_FAR = 25.0  # where exp(x²)·erfc(x) would soon underflow, and its series has long converged


# ---- calibration


def delta_of(epsilon: float, mu: float) -> float:
    """Return the delta of a Gaussian mechanism at an epsilon.

    That is Φ(mu/2 - epsilon/mu) - exp(epsilon)·Φ(-mu/2 - epsilon/mu), without the two numbers that overflow and
    underflow in it.

    Args:
        epsilon: >= 0.
        mu: sensitivity / standard deviation, > 0.
    """
    upper = (mu - 2 * epsilon / mu) / 2
    lower = -(mu + 2 * epsilon / mu) / 2
    scale = math.exp(-upper * upper / 2) / 2
    if mu < _NEAR:
        middle = epsilon / mu / math.sqrt(2)
        slope = 2 / math.sqrt(math.pi) - 2 * middle * _erfcx(middle)
        return scale * max(slope, 0.0) * mu / math.sqrt(2)
    tail = _erfcx(-lower / math.sqrt(2))
    if upper < 0:
        return scale * max(_erfcx(-upper / math.sqrt(2)) - tail, 0.0)
    return math.erfc(-upper / math.sqrt(2)) / 2 - scale * tail


def mu_of(epsilon: float, delta: float) -> float:
    """Return the greatest mu whose delta at an epsilon is at most ``delta``: that of the least noise.

    Args:
        epsilon: > 0.
        delta: 0..1, both excluded.
    """
    high = 1.0
    while delta_of(epsilon, high) <= delta:
        high *= 2
    low = high / 2
    while delta_of(epsilon, low) > delta:
        low, high = low / 2, low
    return _last(low, high, lambda mu: delta_of(epsilon, mu) <= delta)


def epsilon_of(delta: float, mu: float) -> float:
    """Return the least epsilon at which a mechanism's delta is at most ``delta``, 0 for one of mu 0."""
    if mu == 0 or delta_of(0, mu) <= delta:
        return 0.0
    high = 1.0
    while delta_of(high, mu) > delta:
        high *= 2
    return math.nextafter(_last(0.0, high, lambda epsilon: delta_of(epsilon, mu) > delta), math.inf)


def sigma_of(epsilon: float, delta: float, clip: float) -> float:
    """Return the standard deviation of the noise for changes that are at most ``clip`` long."""
    return clip / mu_of(epsilon, delta)


def _last(low: float, high: float, holds: Callable[[float], bool]) -> float:
    """Return the greatest number for which something holds that holds at ``low`` and not at ``high``."""
    while low < (middle := low + (high - low) / 2) < high:
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _erfcx(x: float) -> float:
    """Return exp(x²)·erfc(x) for x >= 0."""
    if x < _FAR:
        return math.exp(x * x) * math.erfc(x)
    total = term = 1.0
    for factor in range(1, 12, 2):
        term *= -factor / 2 / x / x
        total += term
    return total / x / math.sqrt(math.pi)


# ---- the account


@dataclass(frozen=True, slots=True)
class Spent:
    """What the updates that a device has made so far tell together.

    Attributes:
        updates: their number; one that was made and refused has left the device as well.
        mu_squared: sum of the squares of their mu.
    """

    updates: int = 0
    mu_squared: float = 0.0

    def with_update(self, mu: float) -> Spent:
        """Return the account with one update more."""
        return Spent(self.updates + 1, self.mu_squared + mu * mu)

    def epsilon(self, delta: float) -> float:
        """Return the epsilon by which a device that trained can be told from one that changed nothing."""
        return epsilon_of(delta, math.sqrt(self.mu_squared))

    def epsilon_of_any(self, delta: float) -> float:
        """Return the epsilon by which any two trainings can be told apart: they differ by up to two clip bounds."""
        return epsilon_of(delta, 2 * math.sqrt(self.mu_squared))


# ---- the clip bound


@dataclass(frozen=True, slots=True)
class Clip:
    """The longest change that a device sends as it is; a longer one is shortened to it.

    It follows how far the global model moves, which everybody knows, so it tells nothing of a device's own data.
    """

    bound: float = FIRST_CLIP

    def after(self, iteration: int, factor: float, moved: float, floor: float = CLIP_FLOOR) -> Clip:
        """Return the bound after an iteration.

        The first iteration sets it, later ones only lower it. An iteration that made no model moves nothing and says
        nothing; the original then adds no noise any more, for ever.

        Args:
            iteration: its number, from 1.
            factor: the job's ``dp_norm_clip``.
            moved: length of the step from its base to its model.
            floor: the least bound.
        """
        wished = max(factor * moved, floor)
        if moved <= 0 or (iteration != 1 and wished >= self.bound):
            return self
        return Clip(wished)


def distance(one: Mapping[str, Floats], other: Mapping[str, Floats]) -> float:
    """Return how far apart two models are, over the weights that both have."""
    total = 0.0
    for name in one.keys() & other.keys():
        difference = one[name].astype(np.float64) - other[name]
        total += float(np.dot(difference, difference))
    return math.sqrt(total)


# ---- the noise


def privatise(
    trained: Mapping[str, Floats], base: Mapping[str, Floats], clip: float, sigma: float, random: Random
) -> dict[str, Floats]:
    """Clip a change of the model and add noise to it.

    Change and noise are added in double and rounded to a grid much coarser than doubles and much finer than the
    noise: the last digits of a computed Gaussian would give it away.

    Args:
        trained: name -> float32[n] after training, finite.
        base: the same before; may hold more weights.
        clip: longest change, over all weights together.
        sigma: standard deviation of the noise, > 0.
        random: secret chance.

    Returns:
        name -> float32[n]: base plus clipped change plus noise, not yet times the data size.

    Raises:
        NonFinite: a result does not fit a float32.
    """
    grid = 2.0 ** math.floor(math.log2(sigma / _GRID))
    norm = distance(trained, base)
    factor = clip / norm if norm > clip else 1.0
    noisy = {}
    for name, values in trained.items():
        change = values.astype(np.float64)
        change -= base[name]
        change *= factor
        change += sigma * normals(values.size, random)
        change /= grid
        np.rint(change, out=change)
        change *= grid
        change += base[name]
        with np.errstate(over="ignore"):
            noisy[name] = change.astype(np.float32)
        if not np.isfinite(noisy[name]).all():
            raise NonFinite(f"weight {name!r} is too large for a float32 once noise is added")
    return noisy


def normals(size: int, random: Random) -> npt.NDArray[np.float64]:
    """Return independent numbers of the standard normal distribution, as Box and Muller make them."""
    pairs = (size + 1) // 2
    uniform = (np.frombuffer(random(16 * pairs), "<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2 * np.log(uniform[:pairs] + 2.0**-53))
    angle = 2 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
