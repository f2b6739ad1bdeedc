"""X25519 and the keys made of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.secagg.vectors import VECTORS, H

from fedcore.errors import CryptoError
from fedcore.secagg import keys
from fedcore.secagg.keys import BadKey

KNOWN = VECTORS["agreement"]
P = 2**255 - 19
# RFC 7748, section 6.1, and the numbers that are the same modulo P
WEAK = [
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    P - 1,
    P,
    P + 1,
]


def test_both_sides_agree_on_what_the_original_agrees_on() -> None:
    a, b = H(KNOWN["a_private"]), H(KNOWN["b_private"])
    assert keys.public_of(a) == H(KNOWN["a_public"])
    assert keys.public_of(b) == H(KNOWN["b_public"])
    assert keys.agree(a, H(KNOWN["b_public"])) == H(KNOWN["shared"])
    assert keys.agree(b, H(KNOWN["a_public"])) == H(KNOWN["shared"])


def test_cipher_keys_are_the_originals() -> None:
    assert keys.derive(H(KNOWN["shared"])) == H(KNOWN["key_without_salt"])
    assert keys.derive(H(KNOWN["shared"]), H(KNOWN["salt"])) == H(KNOWN["key_with_salt"])


@settings(max_examples=50)
@given(st.binary(min_size=32, max_size=32))
def test_a_new_key_is_clamped_and_its_public_half_does_not_depend_on_that(chance: bytes) -> None:
    pair = keys.new_pair(lambda count: chance[:count])
    first, last = pair.private[0], pair.private[31]
    assert first & 7 == 0 and last & 0x80 == 0 and last & 0x40 == 0x40
    assert keys.clamp(pair.private) == pair.private
    assert pair.public == keys.public_of(chance)


@pytest.mark.parametrize("point", WEAK)
def test_no_secret_is_made_of_a_point_everybody_agrees_on_zero_with(point: int) -> None:
    with pytest.raises(BadKey, match="zero"):
        keys.agree(H(KNOWN["a_private"]), point.to_bytes(32, "little"))


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_keys_of_other_lengths_are_refused(length: int) -> None:
    key, other = H(KNOWN["a_private"]), bytes(length)
    for use in (
        lambda: keys.agree(other, key),
        lambda: keys.agree(key, other),
        lambda: keys.public_of(other),
        lambda: keys.clamp(other),
        lambda: keys.derive(other),
        lambda: keys.new_pair(lambda count: other),
    ):
        with pytest.raises(BadKey, match=f"not {length}"):
            use()
    assert issubclass(BadKey, CryptoError)


def test_a_pair_does_not_show_its_private_half() -> None:
    pair = keys.new_pair(lambda count: b"\x5a" * count)
    assert pair.private.hex() not in repr(pair) and repr(pair.private) not in repr(pair)
