"""Updates that are not plain weights: golden vectors, blocks, and what strangers may write into them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.aggregation.bounds import Sent, distance
from fedcore.compression import mask, sparse
from fedcore.errors import ArrayError, NonFinite, ShapeMismatch
from fedcore.ledger.decoding import (
    MOST_INDICES,
    Decoder,
    Reading,
    missing,
    sign_layers,
    sign_reading,
    sparse_layers,
    sparse_reading,
)
from fedcore.wire.arrays import Floats, Layout, Weight
from fedcore.wire.messages import CompressFeatureMap, FeatureMap, RequestUpdateModel

LAYOUT = Layout((Weight("a", (2, 3)), Weight("b", (4,)), Weight("fixed", (2,), aggregated=False)))
BASE: dict[str, Floats] = {
    "a": np.arange(1, 7, dtype=np.float32),
    "b": np.arange(7, 11, dtype=np.float32),
    "fixed": np.float32([0.5, -0.5]),
}
RATE = float(np.float32(0.4))
LARGEST = 3.4028235e38


def in_full(reading: Reading, data_size: int = 3) -> dict[str, Floats]:
    return {name: values[0 : values.size] for name, values in reading.weights(data_size).items()}


# ---- sparse


def sparse_request(steps: dict[str, list[int]], **changed: Any) -> RequestUpdateModel:
    items = tuple(
        CompressFeatureMap(name, np.array(each, np.int8), -1.5, 2.25)
        if each
        else CompressFeatureMap(name, np.empty(0, np.int8), LARGEST, -LARGEST)
        for name, each in steps.items()
    )
    request = RequestUpdateModel(
        fl_name="job",
        fl_id="c",
        iteration=1,
        timestamp="1",
        compress_feature_map=items,
        upload_compress_type=1,
        upload_sparse_rate=RATE,
        name_vec=tuple(steps),
    )
    return replace(request, **changed)


def read_sparse(
    request: RequestUpdateModel,
    layout: Layout = LAYOUT,
    base: dict[str, Floats] | None = None,
    peak: float = 10.0,
) -> Reading:
    layers = sparse_layers(layout, request, RATE)
    total = sum(size for _, size in layers)
    pattern = sparse.pattern(layers, mask.draw(request.iteration, request.upload_sparse_rate, total))
    return sparse_reading(request, pattern, BASE if base is None else base, "ab", peak)


GOOD = {
    "a": [76],
    "b": [0, -26, 25],
}  # of 10 elements the mask of iteration 1 chooses one of a and three of b


class TestSparse:
    def test_a_golden_vector_of_the_original(self) -> None:
        layout, base = Layout((Weight("w", (10,)),)), {"w": np.arange(1, 11, dtype=np.float32)}
        reading = read_sparse(sparse_request({"w": [76, 0, -26, 25]}), layout, base)
        assert (reading.decoder, reading.base) == (Decoder.SPARSE, "ab")
        expected = np.float32([3, 6, 9, 12, 16.5, 18, 21.3823528, 24, 27, 30.75])
        assert in_full(reading)["w"].tobytes() == expected.tobytes()

    def test_a_mask_lies_over_the_weights_in_the_order_of_the_names(self) -> None:
        marks = mask.draw(1, RATE, 10)
        for names in (("a", "b"), ("b", "a")):
            sizes = [BASE[name].size for name in names]
            first = int(marks[: sizes[0]].sum())
            steps = {names[0]: [127] * first, names[1]: [127] * (4 - first)}
            found = in_full(read_sparse(sparse_request(steps)), 1)
            moved = np.concatenate([found[name] - BASE[name] for name in names])
            assert (moved > 2).tolist() == marks.tolist()

    def test_weights_without_a_chosen_element_are_as_the_model(self) -> None:
        layout = Layout((Weight("a", (1,)), Weight("b", (1,))))
        base = {"a": np.float32([2]), "b": np.float32([3])}
        request = sparse_request({"a": [], "b": []})  # 0.4 of two elements is none
        assert {name: v.tolist() for name, v in in_full(read_sparse(request, layout, base)).items()} == {
            "a": [6.0],
            "b": [9.0],
        }

    @given(st.integers(1, 3000), st.integers(1, 700), st.integers(0, 50))
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    def test_blocks_are_parts_of_the_whole(self, size: int, block: int, seed: int) -> None:
        chance = np.random.default_rng(seed)
        layout = Layout((Weight("w", (size,)),))
        base = {"w": chance.standard_normal(size).astype(np.float32)}
        pattern = sparse.pattern([("w", size)], mask.draw(1, RATE, size))
        trained = {"w": chance.standard_normal(size).astype(np.float32) * np.float32(5)}
        items = sparse.compress(pattern, trained, base, 5)
        reading = read_sparse(sparse_request({"w": []}, compress_feature_map=items), layout, base)
        dense = sparse.restore_weight(pattern.places["w"], items[0], base["w"], 5)
        values = reading.weights(5)["w"]
        parts = [values[start : min(start + block, size)] for start in range(0, size, block)]
        assert np.concatenate(parts).tobytes() == dense.tobytes()
        kind = lambda name: Sent.PRODUCT  # noqa: E731
        assert distance({"w": values}, base, kind, 5) == distance({"w": dense}, base, kind, 5)

    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({"upload_compress_type": 2}, "compress type 2"),
            ({"upload_compress_type": -1}, "compress type -1"),
            ({"upload_sparse_rate": 0.4000001}, "sparse rate"),
            ({"upload_sparse_rate": float("nan")}, "sparse rate"),
            ({"name_vec": None}, "no value at all"),
            ({"name_vec": ()}, "no value at all"),
            ({"name_vec": ("a", "c")}, "'c' is not in the model"),
            ({"name_vec": ("a", "a")}, "names a weight twice"),
            ({"name_vec": ("b", "a")}, "has another name"),
            ({"name_vec": ("a",)}, "2 entries for 1 weights"),
            ({"compress_feature_map": None}, "0 entries for 2 weights"),
            ({"compress_feature_map": ()}, "0 entries for 2 weights"),
            ({"iteration": 2}, "that the mask has chosen"),
        ],
    )
    def test_what_is_no_update_of_the_job_is_refused(self, changed: dict[str, Any], why: str) -> None:
        assert read_sparse(sparse_request(GOOD)).decoder is Decoder.SPARSE
        with pytest.raises(ShapeMismatch, match=why):
            read_sparse(sparse_request(GOOD, **changed))

    @pytest.mark.parametrize(
        ("low", "high"),
        [
            (2.0, 1.0),
            (float("nan"), 1.0),
            (0.0, float("nan")),
            (float("-inf"), 1.0),
            (0.0, float("inf")),
            (-LARGEST, LARGEST),
            (LARGEST, -LARGEST),  # what an entry without values has
            (0.0, LARGEST),  # a step above it would be infinite
        ],
    )
    def test_ranges_that_are_none_are_refused(self, low: float, high: float) -> None:
        items = sparse_request(GOOD).compress_feature_map
        assert items is not None
        bad = (items[0], replace(items[1], min_val=low, max_val=high))
        with pytest.raises(ArrayError):
            read_sparse(sparse_request(GOOD, compress_feature_map=bad))

    def test_a_model_that_is_too_large_to_be_multiplied_is_refused(self) -> None:
        with pytest.raises(NonFinite):
            read_sparse(sparse_request(GOOD), peak=1e34)

    @pytest.mark.parametrize("steps", [{"a": [1, 1], "b": [1, 1]}, {"a": [], "b": [1, 1, 1, 1]}])
    def test_an_entry_lends_no_value_to_another(self, steps: dict[str, list[int]]) -> None:
        with pytest.raises(ShapeMismatch, match="values that the mask has chosen"):
            read_sparse(sparse_request(steps))

    @given(
        st.lists(st.integers(-128, 127), max_size=6),
        st.floats(width=32),
        st.floats(width=32),
        st.sampled_from([1, 65535]),
    )
    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    def test_whatever_is_let_through_decodes_to_finite_values(
        self, steps: list[int], low: float, high: float, data_size: int
    ) -> None:
        items = tuple(CompressFeatureMap(n, np.array(steps, np.int8), low, high) for n in ("a", "b"))
        try:
            reading = read_sparse(sparse_request(GOOD, compress_feature_map=items))
        except ArrayError:
            return
        for values in in_full(reading, data_size).values():
            assert np.isfinite(values).all()


# ---- sign


def sign_request(indices: list[int] | None, sign: int = 1, **changed: Any) -> RequestUpdateModel:
    names = ("a", "b", "fixed")
    request = RequestUpdateModel(
        fl_name="job",
        fl_id="c",
        iteration=1,
        timestamp="1",
        feature_map=tuple(FeatureMap(name, np.empty(0, np.float32)) for name in names),
        sign=sign,
        index_array=None if indices is None else np.array(indices, np.int32),
    )
    return replace(request, **changed)


def read_signed(request: RequestUpdateModel, step: float = 0.25, peak: float = 10.0) -> Reading:
    return sign_reading(request, sign_layers(LAYOUT, request), step, BASE, "ab", peak)


class TestSign:
    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_step_is_added_to_the_chosen_elements(self, sign: int) -> None:
        reading = read_signed(sign_request([0, 5, 6, 11], sign))
        assert (reading.decoder, reading.base) == (Decoder.SIGN, "ab")
        found, step = in_full(reading), sign * 0.25
        moved = {name: (values / 3 - BASE[name]).tolist() for name, values in found.items()}
        assert moved["a"] == pytest.approx([step, 0, 0, 0, 0, step], abs=1e-6)
        assert moved["b"] == pytest.approx([step, 0, 0, 0], abs=1e-6)
        assert moved["fixed"] == pytest.approx([0, step], abs=1e-6)

    def test_every_operation_is_rounded_to_float32(self) -> None:
        found = in_full(read_signed(sign_request([2]), step=0.1), 7)["a"]
        expected = (np.float32(3) + np.float32(0.1)) * np.float32(7)
        assert found[2].tobytes() == expected.tobytes()
        assert found[:2].tobytes() == (BASE["a"][:2] * np.float32(7)).tobytes()

    def test_positions_count_in_the_order_of_the_request(self) -> None:
        names = tuple(FeatureMap(name, np.empty(0, np.float32)) for name in ("b", "a"))
        found = in_full(read_signed(sign_request([4], feature_map=names)), 1)
        assert (found["a"] - BASE["a"]).tolist() == [0.25, 0, 0, 0, 0, 0]
        assert (found["b"] == BASE["b"]).all()

    @given(st.sets(st.integers(0, 11), min_size=1), st.integers(1, 12))
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    def test_blocks_are_parts_of_the_whole(self, chosen: set[int], block: int) -> None:
        for values in read_signed(sign_request(sorted(chosen))).weights(3).values():
            parts = [values[i : min(i + block, values.size)] for i in range(0, values.size, block)]
            assert np.concatenate(parts).tobytes() == values[0 : values.size].tobytes()

    @pytest.mark.parametrize(
        ("request_", "why"),
        [
            (sign_request([1], 2), "sign 2"),
            (sign_request([1], 1000), "sign 1000"),
            (sign_request([1], -(2**31)), "sign -2147483648"),
            (sign_request(None), "1 to 100 indices"),
            (sign_request([]), "1 to 100 indices"),
            (sign_request(list(range(MOST_INDICES + 1))), "1 to 100 indices"),
            (sign_request([3, 2]), "not ascending"),
            (sign_request([3, 3]), "not ascending"),
            (sign_request([-1, 3]), "not ascending"),
            (sign_request([3, 12]), "not ascending"),
            (sign_request([2**31 - 1]), "not ascending"),
            (sign_request([1], feature_map=()), "no value at all"),
            (sign_request([1], feature_map=(FeatureMap("x", np.empty(0, np.float32)),)), "not in the model"),
            (sign_request([1], feature_map=(FeatureMap("a", np.empty(0, np.float32)),) * 2), "twice"),
        ],
    )
    def test_what_is_no_signed_update_is_refused(self, request_: RequestUpdateModel, why: str) -> None:
        with pytest.raises(ShapeMismatch, match=why):
            read_signed(request_)

    def test_values_that_would_be_too_large_are_refused(self) -> None:
        with pytest.raises(NonFinite):
            read_signed(sign_request([1]), step=1e35)


def test_only_aggregated_weights_can_be_missing() -> None:
    assert missing(LAYOUT, {"a": 1, "b": 1}) is None
    assert missing(LAYOUT, ["b", "fixed"]) == "a"
