"""Streams and the masks made of them."""

from __future__ import annotations

import importlib.util
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.secagg.vectors import VECTORS, H

from fedcore.secagg import keys, masks
from fedcore.secagg.keys import BadKey
from fedcore.secagg.masks import Layout, Member, Stream

CLIENT = VECTORS["client"]
KEY, IV = bytes(range(32)), bytes(range(16))
BLOCK = 1 << 15  # floats that are made at once

needs_c = pytest.mark.skipif(not masks.COMPILED, reason="the C extension could not be built here")


@pytest.fixture(params=[pytest.param("c", marks=needs_c), "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of adding: what a test says holds with and without the extension."""
    if request.param == "plain":
        monkeypatch.setattr(masks, "_add", masks.add_plainly)
    return str(request.param)


def floats(hexes: list[str]) -> Any:
    return np.array([int(h, 16) for h in hexes], np.uint32).view(np.float32)


def by_the_book(key: bytes, iv: bytes, size: int) -> Any:
    """Return a stream with one call of everything: int32, float32, divided by 2**31."""
    stream = Cipher(AES256(key), CTR(iv)).encryptor().update(bytes(4 * size))
    return np.frombuffer(stream, "<i4").astype(np.float32) / np.float32(2147483647)


def members() -> dict[str, Member]:
    known = {
        name: Member(H(entry["s_public"]), H(entry["pw_iv"]), H(entry["pw_salt"]))
        for name, entry in CLIENT["keys"].items()
    }
    known["bob"] = known["bob"]._replace(ind_iv=H(CLIENT["ind_iv"]))
    return known


def test_a_stream_is_the_originals(way: str) -> None:
    known = VECTORS["stream"]
    into = np.zeros(8, np.float32)
    masks.add_stream(into, H(known["key"]), H(known["iv"]), 1)
    assert into.tobytes() == floats(known["floats"]).tobytes()


def test_a_client_of_the_original_makes_the_same_mask(way: str) -> None:
    private = H(CLIENT["keys"]["bob"]["s_private"])
    sources = CLIENT["sources"]
    mask = masks.client_mask("bob", private, H(CLIENT["b"]), members(), sources, 6)
    assert mask.tobytes() == floats(CLIENT["mask"]).tobytes()
    masks.add_stream(mask, H(CLIENT["b"]), H(CLIENT["ind_iv"]), -1)
    pairs = masks.pair_mask("bob", private, members(), ["bob", *sources], 6)  # itself is left out
    assert np.allclose(mask, pairs, rtol=0, atol=2.0**-22)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # a way stays
@given(
    size=st.integers(0, 2 * BLOCK + 5),
    start=st.integers(0, BLOCK).map(lambda blocks: 4 * blocks),
    sign=st.sampled_from([1, -1]),
    double=st.booleans(),
    iv=st.one_of(st.binary(min_size=16, max_size=16), st.just(b"\xff" * 16), st.just(b"\xff" * 15 + b"\xfe")),
)
def test_a_stream_in_blocks_from_anywhere_is_a_part_of_the_whole(
    way: str, size: int, start: int, sign: int, double: bool, iv: bytes
) -> None:
    before = np.arange(size).astype(np.float64 if double else np.float32) / 7
    into = before.copy()
    masks.add_stream(into, KEY, iv, sign, start)
    whole = by_the_book(KEY, iv, start + size)[start:]
    assert into.tobytes() == (before + sign * whole).tobytes()


def test_a_stream_reaches_both_ends_of_its_range(way: str) -> None:
    into = np.zeros(1 << 16, np.float32)
    masks.add_stream(into, KEY, IV, 1)
    assert np.abs(into).max() <= 1.0 and into.max() > 0.9999 and into.min() < -0.9999


def test_streams_are_made_in_threads_alike(way: str) -> None:
    def made(number: int) -> bytes:
        into = np.zeros(3 * BLOCK, np.float32)
        masks.add_stream(into, bytes([number]) * 32, IV, 1)
        return into.tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(made, range(8))) == [made(number) for number in range(8)]


def test_both_ends_of_a_pair_derive_one_stream_with_opposite_signs() -> None:
    bob, carol = (H(CLIENT["keys"][name]["s_private"]) for name in ("bob", "carol"))
    one = masks.pair("bob", bob, "carol", members())
    other = masks.pair("carol", carol, "bob", members())
    assert one == Stream(other.key, other.iv, -1) and other.sign == 1
    assert one.iv == H(CLIENT["keys"]["bob"]["pw_iv"])  # of the smaller id


@pytest.mark.parametrize(
    ("own", "other", "sign"),
    [("b", "a", 1), ("a", "b", -1), ("a", "aa", -1), ("a", "B", 1), ("é", "z", 1), ("10", "9", -1)],
)
def test_signs_go_by_the_bytes_of_the_ids(own: str, other: str, sign: int) -> None:
    assert masks.pair_sign(own, other) == sign
    assert (own.encode() > other.encode()) == (sign > 0)


def test_a_client_makes_no_pair_with_itself() -> None:
    with pytest.raises(ValueError, match="itself"):
        masks.pair_sign("a", "a")


def test_layouts() -> None:
    sizes = [3, 0, 5]
    assert Layout.CONTIGUOUS.length(sizes) == 8 and Layout.PER_LAYER.length(sizes) == 5
    assert Layout.CONTIGUOUS.slices(sizes) == [slice(0, 3), slice(3, 3), slice(3, 8)]
    assert Layout.PER_LAYER.slices(sizes) == [slice(0, 3), slice(0, 0), slice(0, 5)]
    assert Layout("per_layer") is Layout.PER_LAYER  # as the option says it
    assert Layout.PER_LAYER.length([]) == 0


def test_a_private_key_or_stream_key_is_not_shown() -> None:
    assert "7a7a" not in repr(Stream(b"z" * 32, IV, 1)) and "zzz" not in repr(Stream(b"z" * 32, IV, 1))


@pytest.mark.parametrize(
    ("key", "iv"), [(b"", IV), (KEY[:16], IV), (KEY + b"1", IV), (KEY, b""), (KEY, IV[:12])]
)
def test_a_stream_needs_whole_keys(key: bytes, iv: bytes) -> None:
    with pytest.raises(BadKey):
        masks.add_stream(np.zeros(4, np.float32), key, iv, 1)


@pytest.mark.parametrize(("sign", "start"), [(0, 0), (2, 0), (1, -4), (1, 2)])
def test_a_stream_has_a_sign_and_starts_at_a_block_of_the_cipher(sign: int, start: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        masks.add_stream(np.zeros(4, np.float32), KEY, IV, sign, start)


def published(**parts: Any) -> Any:
    fit = {"s_pk": bytes(32), "pw_iv": bytes(16), "pw_salt": bytes(32), "ind_iv": bytes(16)}
    return SimpleNamespace(**(fit | parts))


def test_a_member_is_taken_from_what_it_published() -> None:
    assert Member.of(published()) == Member(bytes(32), bytes(16), bytes(32), bytes(16))
    assert Member.of(published(ind_iv=None)).ind_iv == b""


@pytest.mark.parametrize("part", ["s_pk", "pw_iv", "pw_salt", "ind_iv"])
@pytest.mark.parametrize("length", [1, 15, 31, 33])
def test_a_member_with_a_part_of_another_length_is_refused(part: str, length: int) -> None:
    with pytest.raises(BadKey):
        Member.of(published(**{part: bytes(length)}))


@pytest.mark.parametrize("part", ["s_pk", "pw_iv", "pw_salt"])
def test_a_member_without_a_part_is_refused(part: str) -> None:
    with pytest.raises(BadKey):
        Member.of(published(**{part: None}))


def test_a_member_whose_key_makes_no_secret_ends_the_mask() -> None:
    known = members() | {"carol": members()["carol"]._replace(s_pk=bytes(32))}
    with pytest.raises(BadKey, match="zero"):
        masks.pair_mask("bob", keys.clamp(KEY), known, ["carol"], 4)


def test_does_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fedcore.secagg._stream", None)
    spec = importlib.util.spec_from_file_location("masks_without_c", masks.__file__)
    assert spec is not None and spec.loader is not None
    without = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "masks_without_c", without)
    spec.loader.exec_module(without)
    into = np.zeros(9, np.float32)
    without.add_stream(into, KEY, IV, 1)
    assert not without.COMPILED
    assert into.tobytes() == by_the_book(KEY, IV, 9).tobytes()


EDGES = [0, 1, -1, 2**24, 2**24 + 1, -(2**24) - 1, 2**25 + 2, 2**31 - 1, 2**31 - 64, -(2**31), -(2**31) + 65]


@needs_c
class TestExtension:
    @pytest.fixture
    def add(self) -> Any:
        from fedcore.secagg._stream import add

        return add

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @given(
        words=st.lists(st.one_of(st.sampled_from(EDGES), st.integers(-(2**31), 2**31 - 1)), max_size=70),
        before=st.sampled_from([0.0, -0.0, 0.3, -1e30, 2.0**-31]),
        shift=st.integers(0, 3),
    )
    @settings(max_examples=50, deadline=None)
    def test_gives_the_same_bytes(
        self, dtype: Any, sign: int, words: list[int], before: float, shift: int
    ) -> None:
        """However many, wherever they begin, whatever is rounded: all ends of vectors and ties of the rounding."""
        from fedcore.secagg._stream import add

        stream = bytearray(np.array(words, "<i4").tobytes())
        ours, plain = np.full(len(words) + shift, before, dtype), np.full(len(words) + shift, before, dtype)
        add(ours[shift:], stream, sign)
        masks.add_plainly(plain[shift:], stream, sign)
        assert ours.tobytes() == plain.tobytes()

    def test_adds_as_many_as_there_are_floats(self, add: Any) -> None:
        into = np.zeros(3, np.float32)
        add(into, np.full(5, 2**30, "<i4").tobytes(), -1)
        assert into.tolist() == [-0.5, -0.5, -0.5]

    @pytest.mark.parametrize("dtype", [np.int32, np.float16, ">f4", np.longdouble, np.complex64])
    def test_adds_to_floats_only(self, add: Any, dtype: Any) -> None:
        with pytest.raises(TypeError, match="float32 or float64"):
            add(np.zeros(4, dtype), bytes(64), 1)

    @pytest.mark.parametrize("stream", [bytes(15), memoryview(bytes(24))[1:]], ids=["short", "not in place"])
    def test_refuses_other_words(self, add: Any, stream: Any) -> None:
        with pytest.raises(ValueError, match="a word of four bytes"):
            add(np.zeros(4, np.float32), stream, 1)

    def test_refuses_floats_that_are_not_in_place(self, add: Any) -> None:
        with pytest.raises(TypeError, match="float32 or float64"):
            add(memoryview(bytearray(17))[1:].cast("f"), bytes(16), 1)

    def test_refuses_what_it_cannot_write_to(self, add: Any) -> None:
        fixed = np.zeros(4, np.float32)
        fixed.flags.writeable = False
        for floats in (fixed, np.zeros(8, np.float32)[::2]):
            with pytest.raises((ValueError, BufferError)):
                add(floats, bytes(16), 1)
        for floats in (None, "text", 7):
            with pytest.raises(TypeError):
                add(floats, bytes(16), 1)

    def test_lets_other_threads_run(self, add: Any) -> None:
        """This thread sees the work half done, which it could not if the other one held the interpreter."""
        into, done = np.zeros(20_000_000, np.float32), threading.Event()
        stream = np.full(len(into), 2**30, "<i4")

        def work() -> None:
            add(into, stream, 1)
            done.set()

        thread = threading.Thread(target=work)
        thread.start()
        seen = set()
        while not done.is_set():
            first = float(
                into[0]
            )  # read before the last one: in this order they differ only while there is work
            seen.add((first, float(into[-1])))
        thread.join()
        assert (0.5, 0.0) in seen
