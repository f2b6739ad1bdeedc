"""The scores of evaluation vectors: against their definitions, scikit-learn, and whatever vectors a client may send."""

from __future__ import annotations

import math
import time
from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedcore.aggregation import clustering
from fedcore.aggregation.clustering import (
    Score,
    calinski_harabasz,
    davies_bouldin,
    labels_of,
    score,
    silhouette,
)

MEASURES = [silhouette, calinski_harabasz, davies_bouldin]
EACH = pytest.mark.parametrize("measure", MEASURES)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
PLAIN = st.integers(-20, 20).map(float)


def floats(*rows: list[float]) -> list[np.ndarray]:
    return [np.float32(row) for row in rows]


def tables(elements: st.SearchStrategy[float], most: int = 12) -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(1, most), st.integers(1, 5))
    return shapes.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=elements))


def clustered(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and labels that have a score."""
    vectors = table.astype(np.float64)
    labels = labels_of(vectors)
    assume(2 <= len(set(labels)) < len(labels))
    return vectors, labels


# ---- the definitions, word by word


def plain_silhouette(vectors: np.ndarray, labels: np.ndarray) -> float:
    total = 0.0
    for i, x in enumerate(vectors):
        apart = {
            label: [math.dist(x, vectors[j]) for j in range(len(labels)) if j != i and labels[j] == label]
            for label in set(labels)
        }
        mine = apart.pop(labels[i])
        a = sum(mine) / len(mine) if mine else 0.0
        b = min(sum(others) / len(others) for others in apart.values())
        total += (b - a) / max(a, b) if a > 0 else 0.0
    return total / len(vectors)


def plain_calinski_harabasz(vectors: np.ndarray, labels: np.ndarray) -> float:
    clusters = [vectors[labels == label] for label in sorted(set(labels))]
    middle, m, k = vectors.mean(axis=0), len(vectors), len(clusters)
    extra = sum(len(c) * math.dist(c.mean(axis=0), middle) ** 2 for c in clusters)
    intra = sum(math.dist(x, c.mean(axis=0)) ** 2 for c in clusters for x in c)
    return extra * (m - k) / (intra * (k - 1)) if intra > 0 else 1.0


def plain_davies_bouldin(vectors: np.ndarray, labels: np.ndarray) -> float:
    clusters = [vectors[labels == label] for label in sorted(set(labels))]
    centres = [c.mean(axis=0) for c in clusters]
    s = [sum(math.dist(x, centre) for x in c) / len(c) for c, centre in zip(clusters, centres, strict=True)]
    k = range(len(clusters))
    return sum(max((s[c] + s[d]) / math.dist(centres[c], centres[d]) for d in k if d != c) for c in k) / len(
        k
    )


@pytest.mark.parametrize(
    ("measure", "plain"),
    [
        (silhouette, plain_silhouette),
        (calinski_harabasz, plain_calinski_harabasz),
        (davies_bouldin, plain_davies_bouldin),
    ],
)
@given(table=tables(PLAIN))
def test_the_definition(measure, plain, table: np.ndarray) -> None:
    vectors, labels = clustered(table)
    expected = plain(vectors, labels)
    assume(expected < 1e20)  # centres that are equal but for rounding
    assert measure(vectors, labels) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_protocol_s_check_value() -> None:
    assert score(silhouette, floats([1, 2, 3], [2, 3, 4], [5, 4, 3])).value == pytest.approx(
        0.363489, abs=1e-6
    )


# ---- scikit-learn, where it means the same


def well_spread(seed: int, count: int, size: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around some corners of the simplex: the labels between these do not occur."""
    chance = np.random.default_rng(seed)
    corners = chance.choice(size, clusters, replace=False)
    vectors = chance.uniform(0, 0.5, (count, size))
    vectors[np.arange(count), corners[chance.integers(0, clusters, count)]] += chance.uniform(0.5, 1, count)
    vectors = np.float64(np.float32(vectors))
    return vectors, labels_of(vectors)


@pytest.mark.parametrize("shape", [(12, 3, 2), (60, 10, 4), (300, 7, 7), (700, 30, 12)])
@pytest.mark.parametrize("seed", range(3))
def test_scikit_learn_agrees(seed: int, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    monkeypatch.setattr(clustering, "_BLOCK", 5000)  # several blocks, the last of another size
    vectors, labels = well_spread(seed, *shape)
    assert silhouette(vectors, labels) == pytest.approx(metrics.silhouette_score(vectors, labels), rel=1e-9)
    assert calinski_harabasz(vectors, labels) == pytest.approx(
        metrics.calinski_harabasz_score(vectors, labels), rel=1e-9
    )
    assert davies_bouldin(vectors, labels) == pytest.approx(
        metrics.davies_bouldin_score(vectors, labels), rel=1e-9
    )


def test_where_scikit_learn_means_something_else() -> None:
    """Equal vectors in one cluster: 0 in the protocol, 1 there."""
    metrics = pytest.importorskip("sklearn.metrics")
    vectors, labels = np.float64([[1, 0], [1, 0], [0, 1], [0, 1]]), np.array([0, 0, 1, 1])
    assert metrics.silhouette_score(vectors, labels) == 1.0
    assert silhouette(vectors, labels) == 0.0
    assert calinski_harabasz(vectors, labels) == metrics.calinski_harabasz_score(vectors, labels) == 1.0
    assert davies_bouldin(vectors, labels) == metrics.davies_bouldin_score(vectors, labels) == 0.0


# ---- labels, lengths, and when there is no score


def test_a_label_is_the_first_largest_component() -> None:
    assert labels_of(np.float64([[1, 3, 3], [0, 0, 0], [-3, -2, -1]])).tolist() == [1, 0, 2]


@EACH
@pytest.mark.parametrize(
    "rows",
    [[], [[1, 0]], [[1, 0], [2, 0], [3, 1]], [[1, 0], [0, 1]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]],
    ids=["no vector", "one", "one cluster", "two clusters of two", "three of three"],
)
def test_too_few_or_too_many_clusters(measure, rows: list[list[float]]) -> None:
    assert score(measure, floats(*rows)) == Score(0.0, len(rows), 0)


def test_a_vector_alone_in_its_cluster_counts_nothing() -> None:
    two, alone = floats([1, 0], [2, 0]), floats([0, 5])
    first = 1 - 1 / math.hypot(1, 5)
    second = 1 - 1 / math.hypot(2, 5)
    assert score(silhouette, two + alone).value == pytest.approx((first + second) / 3)


@EACH
def test_the_commonest_length_counts(measure) -> None:
    alike = floats([1, 0, 0], [2, 0, 1], [0, 4, 1], [0, 5, 0])
    others = floats([1, 9], [3, 9], [9, 1], [1], [])
    assert score(measure, others + alike) == (score(measure, alike).value, 4, 5)


def test_of_two_lengths_as_common_the_greater_counts() -> None:
    long, short = floats([1, 0, 0], [2, 0, 1], [0, 4, 1]), floats([1, 0], [2, 0], [0, 4])
    assert score(silhouette, short + long) == (score(silhouette, long).value, 3, 3)
    assert score(silhouette, long + short) == (score(silhouette, long).value, 3, 3)


def test_empty_vectors_are_left_out_even_if_they_are_the_most() -> None:
    assert score(silhouette, floats([], [], [1])) == Score(0.0, 1, 2)
    assert score(silhouette, floats([], [])) == Score(0.0, 0, 2)


# ---- whatever clients send


@EACH
@given(table=tables(FINITE), ragged=st.lists(st.lists(FINITE, max_size=6), max_size=3))
def test_no_vectors_make_it_fail(measure, table: np.ndarray, ragged: list[list[float]]) -> None:
    with np.errstate(all="raise", under="ignore"):
        found = score(measure, [*table, *floats(*ragged)])
    assert math.isfinite(found.value)
    assert found.vectors + found.left_out == len(table) + len(ragged)
    if measure is silhouette:
        assert -1 <= found.value <= 1
    else:
        assert found.value >= 0


@EACH
@pytest.mark.parametrize("size", [3.4e38, 1e-45])
def test_the_largest_and_the_smallest_floats(measure, size: float) -> None:
    found = score(measure, floats([size, 0], [size, -size], [0, size], [-size, size], [-size, 0]))
    assert math.isfinite(found.value) and found.value > 0


@EACH
@given(data=st.data())
def test_the_order_of_the_vectors_does_not_matter(measure, data: st.DataObject) -> None:
    table = data.draw(tables(FINITE))
    mixed = data.draw(st.permutations(list(table)))
    assert score(measure, mixed) == score(measure, list(table))


@EACH
@given(table=tables(PLAIN), names=st.permutations(range(5)))
def test_the_names_of_the_labels_do_not_matter(measure, table: np.ndarray, names: list[int]) -> None:
    """Gaps between the labels are among the names: not all of them occur."""
    vectors, labels = clustered(table)
    renamed = np.array(names)[labels]
    expected = measure(vectors, labels)
    assert measure(vectors, renamed) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert measure(vectors, labels * 1000) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_all_orders_of_a_few_give_the_same_bits() -> None:
    rows = floats([0.1, 0.7], [0.3, 0.9], [0.8, 0.2], [0.6, 0.1], [0.7, 0.7])
    for measure in MEASURES:
        assert len({score(measure, list(order)) for order in permutations(rows)}) == 1


def test_two_thousand_vectors_take_no_minute() -> None:
    """Every pair is looked at, but never are all distances in memory."""
    vectors, labels = well_spread(1, 2000, 10, 10)
    before = time.monotonic()
    assert 0 < silhouette(vectors, labels) < 1
    assert time.monotonic() - before < 60
