"""What servers say to each other: what one packs the other unpacks, and nothing else is a message."""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import MalformedRequest
from fedcore.wire import node_messages
from fedcore.wire.node_messages import (
    Done,
    Located,
    LocateLedger,
    PartialOffer,
    ReadPartial,
    TakeLedger,
    offer_of,
    pack,
    pack_offers,
    unpack,
    unpack_offers,
)

KINDS = sorted(
    (kind for kind in vars(node_messages).values() if isinstance(kind, type) and is_dataclass(kind)),
    key=lambda kind: kind.__name__,
)
VALUES = {"int": st.integers(0, 2**63), "str": st.text(st.characters(exclude_categories=("Cs",)))}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def types_of(kind: type[Any]) -> dict[str, str]:
    return {field.name: str(field.type) for field in fields(kind)}


def sample(kind: type[Any]) -> Any:
    return kind(**{name: 7 if type_name == "int" else "seven" for name, type_name in types_of(kind).items()})


def messages(kind: type[Any]) -> st.SearchStrategy[Any]:
    return st.builds(kind, **{name: VALUES[type_name] for name, type_name in types_of(kind).items()})


def as_dict(kind: type[Any]) -> dict[str, Any]:
    content = json.loads(pack(sample(kind)))
    assert isinstance(content, dict)
    return content


def refuse(kind: type[Any], content: object) -> str:
    """Return why a JSON value is no message of a kind."""
    with pytest.raises(MalformedRequest) as caught:
        unpack(kind, json.dumps(content).encode())
    return str(caught.value)


def test_all_kinds_are_tested() -> None:
    assert len(KINDS) == 11
    assert {type_name for kind in KINDS for type_name in types_of(kind).values()} == {"int", "str"}


class TestThereAndBack:
    @every_kind
    @given(st.data())
    def test_a_message_is_what_it_was(self, kind: type[Any], data: st.DataObject) -> None:
        message = data.draw(messages(kind))
        packed = pack(message)
        for received in (packed, memoryview(packed), bytearray(packed)):
            assert unpack(kind, received) == message  # type: ignore[arg-type]

    @given(st.lists(messages(PartialOffer), max_size=4))
    def test_a_list_of_offers_is_what_it_was(self, offers: list[PartialOffer]) -> None:
        assert unpack_offers(memoryview(pack_offers(offers))) == offers

    @given(st.binary(max_size=100))
    def test_a_head_is_what_it_was(self, head: bytes) -> None:
        offer = unpack(PartialOffer, pack(offer_of("l", 3, head, 4096, 8192)))
        assert offer.head_bytes() == head
        assert (offer.ledger, offer.updates, offer.start, offer.length) == ("l", 3, 4096, 8192)

    def test_a_hand_over_holds_its_offer(self) -> None:
        offer = offer_of("l", 3, b"head", 4096, 8192)
        taken = TakeLedger("i", 5, 1, offer.ledger, offer.updates, offer.head, offer.start, offer.length)
        assert taken.offer == offer

    def test_packed_is_plain_and_small(self) -> None:
        assert pack(ReadPartial("i_1", 5, 1, "ab", 0, 100)) == (
            b'{"instance":"i_1","iteration":5,"attempt":1,"ledger":"ab","offset":0,"length":100}'
        )
        assert pack(Done()) == b"{}"
        assert pack_offers([]) == b"[]"


class TestHostile:
    @every_kind
    def test_a_field_too_few_or_too_many(self, kind: type[Any]) -> None:
        content = as_dict(kind)
        assert f"is no {kind.__name__}" in refuse(kind, {**content, "more": 1})
        for name in content:
            fewer = {key: value for key, value in content.items() if key != name}
            assert f"is no {kind.__name__}" in refuse(kind, fewer)
            assert f"is no {kind.__name__}" in refuse(kind, {**fewer, name.upper(): content[name]})

    @every_kind
    def test_a_field_of_another_type(self, kind: type[Any]) -> None:
        for name, type_name in types_of(kind).items():
            others: list[object] = [None, True, False, 1.0, [], {}, [1], {"a": 1}]
            others.append("1" if type_name == "int" else 1)
            for other in others:
                text = refuse(kind, {**as_dict(kind), name: other})
                assert f"{name} of a {kind.__name__} between nodes is not a sound {type_name}" in text

    @every_kind
    def test_a_number_below_nothing(self, kind: type[Any]) -> None:
        for name, type_name in types_of(kind).items():
            if type_name == "int":
                assert "not a sound int" in refuse(kind, {**as_dict(kind), name: -1})

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e9", "1e999", "0.0"])
    def test_numbers_that_are_no_integers(self, number: str) -> None:
        text = pack(ReadPartial("i", 5, 1, "l", 0, 7)).decode().replace(":7}", f":{number}}}")
        with pytest.raises(MalformedRequest, match="not a sound int"):
            unpack(ReadPartial, text.encode())

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"{",
            b"\0",
            b"\xff\xfe",
            b'{"whereabouts":"\xff"}',
            b'{"whereabouts":"here"} ',
            b"[" * 200_000,
            b'{"a":' * 200_000,
            b'{"whereabouts":' + b"9" * 5000 + b"}",
            '{"whereabouts":"here"'.encode("utf-16"),
        ],
        ids=lambda data: repr(data[:12]),
    )
    def test_what_is_no_json(self, data: bytes) -> None:
        with contextlib.suppress(MalformedRequest):
            assert unpack(Located, data) == Located("here"), "only white space is put up with"
        with pytest.raises(MalformedRequest):
            unpack_offers(data)

    @every_kind
    @given(JSON)
    def test_any_other_json(self, kind: type[Any], content: object) -> None:
        data = json.dumps(content).encode()
        if not (isinstance(content, dict) and content.keys() == types_of(kind).keys()):
            with pytest.raises(MalformedRequest):
                unpack(kind, data)
        if not isinstance(content, list) or content:
            with pytest.raises(MalformedRequest):
                unpack_offers(data)

    @given(st.binary(max_size=60))
    def test_any_bytes(self, data: bytes) -> None:
        with pytest.raises(MalformedRequest):
            unpack(LocateLedger, data)

    @every_kind
    @given(st.data())
    def test_a_changed_byte_is_refused_or_another_message(self, kind: type[Any], data: st.DataObject) -> None:
        packed = bytearray(pack(sample(kind)))
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
        try:
            message = unpack(kind, packed)  # type: ignore[arg-type]
        except MalformedRequest:
            return
        assert unpack(kind, pack(message)) == message

    def test_one_bad_offer_spoils_the_list(self) -> None:
        good = json.loads(pack(sample(PartialOffer)))
        for bad in ({}, None, [], {**good, "start": -1}, {**good, "start": "0"}):
            with pytest.raises(MalformedRequest):
                unpack_offers(json.dumps([good, bad]).encode())

    @pytest.mark.parametrize("head", ["x", "====", "aGVhZA", "aGVh\nZA==", "aGVhZA== ", "ü", "\ud800", "\0"])
    def test_a_head_that_is_no_base64(self, head: str) -> None:
        offer = unpack(PartialOffer, pack(replace(sample(PartialOffer), head=head)))
        with pytest.raises(MalformedRequest, match="base64"):
            offer.head_bytes()
