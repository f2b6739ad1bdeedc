"""Records of shares and their seal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.secagg.vectors import VECTORS, H, drawn

from fedcore.secagg import keys, shamir, shares
from fedcore.secagg.keys import BadKey
from fedcore.secagg.shamir import BadShare
from fedcore.secagg.shares import PlainShares

SEAL = VECTORS["seal"]
CLIENT = VECTORS["client"]
PRIME = int(VECTORS["shamir"]["prime"], 16)


def test_the_seal_is_the_originals_in_both_directions() -> None:
    key, iv, plain, sealed = (H(SEAL[name]) for name in ("key", "iv", "plain", "sealed"))
    assert shares.seal(key, plain, iv) == sealed
    assert shares.unseal(key, sealed) == plain


def test_a_client_of_the_original_is_repeated_share_by_share() -> None:
    own = CLIENT["keys"]["bob"]
    others = [name for name in CLIENT["members"] if name != "bob"]
    dealt = [
        shamir.split(
            int(secret, 16), CLIENT["t"], len(others), drawn(int(CLIENT["coefficients"][kind], 16)), PRIME
        )
        for kind, secret in (("s", own["s_private"]), ("b", CLIENT["b"]))
    ]
    for other, (index, s_share), (_, b_share) in zip(others, *dealt, strict=True):
        key = keys.derive(keys.agree(H(own["c_private"]), H(CLIENT["keys"][other]["c_public"])))
        record = shares.pack(PlainShares(s_share, b_share, index, index))
        sealed = H(CLIENT["sealed"][other])
        assert key == H(CLIENT["share_keys"][other])
        assert record == H(CLIENT["records"][other])
        assert shares.seal(key, record, sealed[:16]) == sealed
        theirs = keys.derive(keys.agree(H(CLIENT["keys"][other]["c_private"]), H(own["c_public"])))
        assert shares.unpack(shares.unseal(theirs, sealed)) == PlainShares(s_share, b_share, index, index)


@given(
    st.integers(0, shamir.PRIME - 1),
    st.integers(0, shamir.PRIME - 1),
    st.integers(1, 2**31 - 1),
    st.integers(1, 2**31 - 1),
)
def test_a_record_comes_back(s_share: int, b_share: int, s_index: int, b_index: int) -> None:
    record = PlainShares(s_share, b_share, s_index, b_index)
    assert shares.unpack(shares.pack(record)) == record


def test_a_share_of_zero_has_no_bytes() -> None:
    assert shares.pack(PlainShares(0, 0, 1, 256)) == b"\0\0\1\2" + b"\1" + b"\1\0"
    assert shares.share_of(b"") == 0


@given(st.binary(max_size=90))
def test_whatever_arrives_is_a_record_or_a_bad_share(content: bytes) -> None:
    try:
        record = shares.unpack(content)
    except BadShare:
        return
    assert min(record.s_index, record.b_index) >= 1
    assert len(shares.pack(record)) <= len(content)  # but for zeros in front the same


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\1\1\1",
        b"\0\0\0\0",  # no index
        b"\1\1\1\1\1\1\1",  # a byte too few
        b"\1\1\1\1\1\1\1\1\1",  # and too many
        b"\0\0\1\1\0\1",  # index 0
        b"\0\0\4\1\x80\0\0\0\1",  # above int32
        b"\0\0\5\1\0\0\0\0\1\1",
        b"\x22\0\1\1\1\1" + bytes(34),  # a share of 34 bytes
    ],
)
def test_records_that_are_none(record: bytes) -> None:
    with pytest.raises(BadShare):
        shares.unpack(record)


def test_parts_that_do_not_fit_are_not_written() -> None:
    with pytest.raises(OverflowError):
        shares.pack(PlainShares(1 << 8 * 127, 1, 1, 1))
    with pytest.raises(OverflowError):
        shares.pack(PlainShares(-1, 1, 1, 1))


def test_reported_shares_are_numbers_of_the_field() -> None:
    prime = shamir.PRIME
    assert shares.share_of((prime - 1).to_bytes(33, "big")) == prime - 1
    assert shares.share_of(b"\0\7") == 7
    for bad in (prime.to_bytes(33, "big"), b"\xff" * 33, bytes(34)):
        with pytest.raises(BadShare):
            shares.share_of(bad)


KEY = bytes(range(32))


@pytest.mark.parametrize("length", [0, 15, 16, 17, 31, 33, 47])
def test_a_sealed_share_of_an_impossible_length(length: int) -> None:
    with pytest.raises(BadShare, match="length"):
        shares.unseal(KEY, bytes(length))


def test_a_wrong_key_opens_nothing() -> None:
    sealed = shares.seal(KEY, b"what is hidden", bytes(16))
    with pytest.raises(BadShare, match="opened"):
        shares.unseal(bytes(32), sealed)


def test_keys_of_other_lengths_are_refused() -> None:
    for use in (
        lambda: shares.seal(KEY[:16], b"", bytes(16)),
        lambda: shares.seal(KEY, b"", bytes(12)),
        lambda: shares.unseal(KEY[:24], bytes(32)),
    ):
        with pytest.raises(BadKey):
            use()
