"""The model as servers describe it to each other, and the four ways not to agree about it."""

import json

import pytest

from fedcore.core.model_info import describe, mismatch
from fedcore.errors import StoreError
from fedcore.wire.arrays import Layout, Weight

MODEL = Layout((Weight("b", (2, 3)), Weight("a", (4,), False), Weight("é", ())))


def without(name: str) -> tuple[Weight, ...]:
    return tuple(weight for weight in MODEL if weight.name != name)


def test_the_form() -> None:
    assert describe(MODEL) == (
        '{"features":{"a":{"require_aggr":false,"shape":[4],"size":16,"type":"fp32"},'
        '"b":{"require_aggr":true,"shape":[2,3],"size":24,"type":"fp32"},'
        '"é":{"require_aggr":true,"shape":[],"size":4,"type":"fp32"}}}'
    )
    assert describe(Layout(())) == '{"features":{}}'


def test_a_model_agrees_with_itself() -> None:
    assert mismatch(MODEL, describe(MODEL)) is None
    assert mismatch(MODEL, describe(MODEL).encode()) is None


def test_shape_and_type_are_not_compared() -> None:
    assert mismatch(Layout((*without("b"), Weight("b", (6,)))), describe(MODEL)) is None
    assert mismatch(MODEL, describe(MODEL).replace("fp32", "fp16")) is None


def test_the_number_of_weights() -> None:
    text = "The number 2 of local features != the number 3 declared in the the distributed cache"
    assert mismatch(Layout(without("a")), describe(MODEL)) == text


def test_a_weight_that_is_missing() -> None:
    text = "The features are inconsistent with that declared in distributed cache: cannot find feature b in local"
    assert mismatch(Layout((*without("b"), Weight("c", (6,)))), describe(MODEL)) == text


def test_the_size() -> None:
    text = "The feature size 20 of local != that 24 declared in the distributed cache, feature: b"
    assert mismatch(Layout((*without("b"), Weight("b", (5,)))), describe(MODEL)) == text


@pytest.mark.parametrize("here", [0, 1])
def test_the_aggregation(here: int) -> None:
    text = f"The feature require_aggr {here} of local != that {1 - here} declared in the distributed cache, feature: b"
    flags = [Layout((*without("b"), Weight("b", (6,), bool(flag)))) for flag in (here, 1 - here)]
    assert mismatch(flags[0], describe(flags[1])) == text


def test_the_order_of_the_checks() -> None:
    """Number, names, sizes, aggregation; each in bytewise order of the names."""
    shared = describe(Layout((Weight("a", (1,)), Weight("b", (1,)), Weight("c", (1,)))))
    others = [
        ((Weight("a", (1,), False), Weight("x", (9,))), "The number"),
        ((Weight("a", (1,), False), Weight("b", (9,)), Weight("x", (1,))), "cannot find feature c"),
        ((Weight("a", (1,), False), Weight("b", (9,)), Weight("c", (8,))), "feature size 36"),
        ((Weight("a", (1,)), Weight("b", (1,), False), Weight("c", (1,), False)), "cache, feature: b"),
    ]
    for weights, text in others:
        assert text in (mismatch(Layout(weights), shared) or "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"features":[]}',
        '{"features":{"a":1}}',
        '{"features":{"a":{"size":1}}}',
        '{"features":{"a":{"size":"1","require_aggr":true}}}',
        '{"features":{"a":{"size":true,"require_aggr":true}}}',
        '{"features":{"a":{"size":1,"require_aggr":1}}}',
        b"\xff",
        '{"features":' * 100_000,
    ],
)
def test_what_is_no_description(text: str | bytes) -> None:
    with pytest.raises(StoreError, match=r"^the description of the model in Redis cannot be read"):
        mismatch(MODEL, text)


def test_it_is_json() -> None:
    assert set(json.loads(describe(MODEL))["features"]) == {"a", "b", "é"}
