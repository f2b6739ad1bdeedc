"""How well the clients' vectors fall into clusters: three scores without labels of the data.

A client sends the mean of its model's outputs over its own data. The cluster of a vector, its *label*, is the place of
its largest component, the first on ties. Clusters are whatever labels occur; labels between them may be missing.

* ``silhouette``: Rousseeuw 1987, 1 is best, -1 worst. As in MindSpore Federated 0.1 a vector counts 0 that is alone in
  its cluster or lies exactly on all others of it; scikit-learn counts the latter 1.
* ``calinski_harabasz``: Caliński and Harabasz 1974, more is better; 1 if every vector is its cluster's centre.
* ``davies_bouldin``: Davies and Bouldin 1979, 0 is best. Two clusters with the same centre are no pair.

``score`` is what to call. It takes any vectors of finite float32, never raises on them and never gives NaN or infinity.
What it gives does not depend on the order of the vectors, to the last bit. All sums are float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedcore.wire.arrays import Floats

Vectors = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]
Measure = Callable[[Vectors, Labels], float]

_BLOCK = 1 << 17  # distances that are looked at at a time: 1 MiB, what a core keeps close


class Score(NamedTuple):
    """A score, and what it was made of.

    Attributes:
        value: the score, finite; 0.0 if there is none.
        vectors: how many vectors are in it.
        left_out: how many are not, as their length is another one.
    """

    value: float
    vectors: int
    left_out: int


def score(measure: Measure, vectors: Sequence[Floats]) -> Score:
    """Score the vectors that have the commonest length; of several such lengths, the greatest.

    Args:
        measure: one of this module's measures.
        vectors: float32[n] each, finite; those without an element are left out.

    Returns:
        The score; 0.0 for fewer than two clusters or as many as vectors.

    Source:
        The limits of the number of clusters are those of MindSpore Federated 0.1, and of scikit-learn.
    """
    lengths = Counter(vector.size for vector in vectors if vector.size)
    if not lengths:
        return Score(0.0, 0, len(vectors))
    length = max(lengths, key=lambda size: (lengths[size], size))
    alike = np.array([vector for vector in vectors if vector.size == length], np.float64)
    left_out = len(vectors) - len(alike)
    labels = labels_of(alike)
    if not 2 <= np.unique(labels).size <= len(alike) - 1:
        return Score(0.0, len(alike), left_out)
    order = np.lexsort((*alike.T, labels))
    return Score(float(measure(alike[order], labels[order])), len(alike), left_out)


def labels_of(vectors: Vectors) -> Labels:
    """Return the cluster of each vector: the place of its largest component, the first on ties.

    Args:
        vectors: float64[m, n], n >= 1.
    """
    labels: Labels = np.argmax(vectors, axis=1)
    return labels


def silhouette(vectors: Vectors, labels: Labels) -> float:
    """Return the mean silhouette; it looks at every pair, m * m * n steps, in memory of m * n and a block.

    Args:
        vectors: float64[m, n].
        labels: intp[m], at least two different ones.
    """
    order = np.argsort(labels, kind="stable")
    columns = np.ascontiguousarray(vectors[order].T)
    _, starts, own, sizes = np.unique(
        labels[order], return_index=True, return_inverse=True, return_counts=True
    )
    total, count = 0.0, len(labels)
    rows = max(1, _BLOCK // count)
    for first in range(0, count, rows):
        block = slice(first, min(first + rows, count))
        sums = np.add.reduceat(_distances(columns, block), starts, axis=1)  # [rows, clusters]
        total += float(_silhouettes(sums, own[block], sizes).sum())
    return total / count


def _distances(columns: Vectors, block: slice) -> Vectors:
    """Return the distances of a block of vectors to all: differences, as equal vectors must have distance 0.

    Args:
        columns: float64[n, m], the vectors' components.
        block: of the m vectors.
    """
    squares = np.zeros((block.stop - block.start, columns.shape[1]))
    for column in columns:
        difference = column[block, None] - column
        difference *= difference
        squares += difference
    return np.sqrt(squares, out=squares)


def _silhouettes(sums: Vectors, own: Labels, sizes: Labels) -> Vectors:
    """Return the silhouettes of vectors.

    Args:
        sums: float64[rows, clusters], each vector's sum of distances to each cluster's vectors.
        own: intp[rows], each vector's cluster.
        sizes: intp[clusters], vectors of each cluster.
    """
    here = np.arange(len(own))
    inner = sums[here, own] / np.maximum(sizes[own] - 1, 1)  # alone: 0 / 1
    means = sums / sizes
    means[here, own] = np.inf
    outer = means.min(axis=1)
    largest = np.maximum(inner, outer)
    return np.where(inner > 0, (outer - inner) / np.where(largest > 0, largest, 1.0), 0.0)


def calinski_harabasz(vectors: Vectors, labels: Labels) -> float:
    """Return how much more the clusters' centres spread than the vectors around them.

    Args:
        vectors: float64[m, n].
        labels: intp[m], at least two different ones, fewer than m.
    """
    centres, own, sizes = _centres(vectors, labels)
    between = float((sizes * ((centres - vectors.mean(axis=0)) ** 2).sum(axis=1)).sum())
    within = float(((vectors - centres[own]) ** 2).sum())
    if within == 0.0:
        return 1.0
    return (between / within) * ((len(vectors) - len(sizes)) / (len(sizes) - 1))


def davies_bouldin(vectors: Vectors, labels: Labels) -> float:
    """Return how alike each cluster is to the one most like it, on average.

    Args:
        vectors: float64[m, n].
        labels: intp[m], at least two different ones.
    """
    centres, own, sizes = _centres(vectors, labels)
    distances = np.sqrt(((vectors - centres[own]) ** 2).sum(axis=1))
    spread = np.bincount(own, weights=distances) / sizes
    total = 0.0
    for cluster, centre in enumerate(centres):
        apart = np.sqrt(((centres - centre) ** 2).sum(axis=1))
        alike = np.divide(spread + spread[cluster], apart, out=np.zeros_like(apart), where=apart > 0)
        total += float(alike.max())
    return total / len(sizes)


def _centres(vectors: Vectors, labels: Labels) -> tuple[Vectors, Labels, Labels]:
    """Return each cluster's mean, each vector's cluster counted from 0 without gaps, and the clusters' sizes."""
    _, own, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(own, kind="stable")
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    return np.add.reduceat(vectors[order], starts, axis=0) / sizes[:, None], own, sizes
