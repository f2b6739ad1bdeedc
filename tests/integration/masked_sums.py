"""How exact a masked mean must be: the bound that docs/SECURE_AGGREGATION.md derives, for tests of real sums."""

from __future__ import annotations

from collections.abc import Collection

UNIT = 2.0**-24  # half a unit in the last place of 1 in float32


def bound(members: int, sizes: Collection[int], largest: float) -> float:
    """Return how far a masked model may be from the one that the same updates make without masks.

    Steps 1 and 2 of the derivation hold for each update by itself. Their sum, and what is left of masks in step 4, is
    divided by the sum of the data sizes: with different ones D is their mean.

    Args:
        members: n, devices in the frozen list of keys.
        sizes: data sizes of the updates in the sum.
        largest: w, largest weight in absolute value.
    """
    mean = sum(sizes) / len(sizes)
    return UNIT * ((members**2 + 5 * members - 2) / (2 * mean) + 2 * largest)


def bound_of_exact(members: int, sizes: Collection[int], largest: float) -> float:
    """Return how far a published model may be from the exact mean of the trained float32 weights.

    Without masks as well each weight times the data size is rounded, and the published model.
    """
    return bound(members, sizes, largest) + 2 * UNIT * largest
