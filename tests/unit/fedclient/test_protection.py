"""Uploads as the server's plan asks for them: what leaves a device, and what a server makes of it."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclient.protection import PrivacyOptions, Protection, Terms
from fedcore.compression import mask, sparse
from fedcore.errors import ConfigError, NonFinite, ShapeMismatch
from fedcore.ledger import decoding
from fedcore.privacy import gaussian
from fedcore.wire.arrays import Layout
from fedcore.wire.codec import decode, encode
from fedcore.wire.messages import (
    CipherPublicParams,
    DPParams,
    DSParams,
    FLPlan,
    RequestUpdateModel,
    ResponseFLJob,
)

F = np.float32
BASE = {
    "b.bias": np.linspace(-1, 1, 40, dtype=F),
    "a.weight": np.linspace(2, 3, 960, dtype=F),
}
LAYOUT = Layout.of(BASE)
SIZE = 1000
PLAIN = Terms(3)
NOISE = Terms(3, "DP_ENCRYPT", noise=DPParams(8.0, 1e-5, 1.0))
SIGNS = Terms(3, "SIGNDS", signs=DSParams(0.02, 5.0, 0.6, 0.1, 10))
PACKED = Terms(3, compress_type=1, sparse_rate=0.25)


def trained(by: float = 0.5) -> dict[str, Any]:
    steps = np.random.default_rng(2)
    return {name: values + steps.normal(0, by, values.size).astype(F) for name, values in BASE.items()}


def protection(**options: Any) -> Protection:
    return Protection(PrivacyOptions(**options), random.Random(1).randbytes)


def on_the_wire(request: RequestUpdateModel) -> RequestUpdateModel:
    return decode(RequestUpdateModel, encode(request))


def plain_of(request: RequestUpdateModel) -> dict[str, Any]:
    return {item.weight_fullname: item.data for item in request.feature_map or ()}


def read_packed(request: RequestUpdateModel, terms: Terms, data_size: int) -> dict[str, Any]:
    """What a server reads, times the data size."""
    layers = decoding.sparse_layers(LAYOUT, request, terms.sparse_rate)
    pattern = sparse.pattern(layers, mask.draw(terms.iteration, terms.sparse_rate, SIZE))
    weights = decoding.sparse_reading(request, pattern, BASE, "base", 3.0).weights(data_size)
    return {name: values[slice(0, values.size)] for name, values in weights.items()}


# ---- the terms


def test_terms_are_what_the_answer_says() -> None:
    cipher = CipherPublicParams("SIGNDS", None, NOISE.noise, SIGNS.signs)
    reply = ResponseFLJob(
        iteration=3, fl_plan_config=FLPlan(cipher=cipher), upload_compress_type=1, upload_sparse_rate=0.25
    )
    assert Terms.of(reply) == Terms(
        3, "SIGNDS", noise=NOISE.noise, signs=SIGNS.signs, compress_type=1, sparse_rate=0.25
    )
    assert Terms.of(ResponseFLJob(iteration=3, fl_plan_config=FLPlan())).encrypt_type == "NOT_ENCRYPT"


@pytest.mark.parametrize(
    ("terms", "word"),
    [
        (Terms(1, "ROT13"), "'ROT13', this client knows NOT_ENCRYPT"),
        (replace(NOISE, noise=DPParams(0.0, 0.1, 1.0)), "dp_eps of 0.0"),
        (replace(NOISE, noise=DPParams(math.inf, 0.1, 1.0)), "dp_eps of inf"),
        (replace(NOISE, noise=DPParams(1.0, 1.0, 1.0)), "dp_delta of 1.0"),
        (replace(NOISE, noise=DPParams(1.0, math.nan, 1.0)), "dp_delta of nan"),
        (replace(NOISE, noise=DPParams(1.0, 0.1, -1.0)), "dp_norm_clip of -1.0"),
        (replace(SIGNS, signs=DSParams(0.3, 5.0, 0.6, 0.1, 10)), "sign_k of 0.3"),
        (replace(SIGNS, signs=DSParams(0.1, 101.0, 0.6, 0.1, 10)), "sign_eps of 101.0"),
        (replace(SIGNS, signs=DSParams(0.1, 5.0, 0.4, 0.1, 10)), "sign_thr_ratio of 0.4"),
        (replace(SIGNS, signs=DSParams(0.1, 5.0, 0.6, 0.1, -1)), "sign_dim_out of -1"),
        (replace(PACKED, compress_type=2), "compress type 2"),
        (replace(PACKED, sparse_rate=0.0), "sparse rate of 0.0"),
    ],
)
def test_terms_that_cannot_be_followed_say_why(terms: Terms, word: str) -> None:
    assert word in terms.fault()


@pytest.mark.parametrize("terms", [PLAIN, NOISE, SIGNS, PACKED, replace(SIGNS, compress_type=1)])
def test_terms_that_can_be_followed(terms: Terms) -> None:
    assert terms.fault() == ""
    assert bool(terms.fault(known=())) is True


@pytest.mark.parametrize(
    "options",
    [{"clip_floor": 0.0}, {"max_epsilon": -1.0}, {"max_epsilon": math.nan}, {"least_threshold": 1.0}],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name} is"):
        PrivacyOptions(**options)  # type: ignore[arg-type]


# ---- plain, masked


def test_plain_weights_travel_times_the_data_size_in_the_order_received() -> None:
    values = trained()
    shuffled = {"a.weight": values["a.weight"].reshape(30, 32).astype(np.float64), "b.bias": values["b.bias"]}
    request = on_the_wire(protection().protect(PLAIN, BASE, shuffled, 7))
    assert list(plain_of(request)) == ["b.bias", "a.weight"]
    for name, sent in plain_of(request).items():
        np.testing.assert_array_equal(sent, values[name] * F(7))
    assert request.compress_feature_map is None
    assert request.index_array is None
    assert (request.sign, request.upload_compress_type) == (0, 0)


def test_a_mask_lies_over_weights_times_data_size_and_nothing_is_packed() -> None:
    def add(weights: Any) -> None:
        for values in weights.values():
            np.add(values, F(1000), out=values)

    terms = Terms(3, "PW_ENCRYPT", compress_type=1, sparse_rate=0.25)
    sent = plain_of(protection().protect(terms, BASE, trained(), 2, add))
    for name, values in trained().items():
        np.testing.assert_array_equal(sent[name], values * F(2) + F(1000))


@pytest.mark.parametrize("terms", [PLAIN, NOISE, SIGNS, PACKED])
def test_what_is_no_update_is_refused(terms: Terms) -> None:
    for wrong in ({}, {"stranger": np.ones(3, F)}, {"b.bias": np.ones(3, F)}):
        with pytest.raises(ShapeMismatch):
            protection().protect(terms, BASE, wrong, 1)
    with pytest.raises(NonFinite):
        protection().protect(terms, BASE, {**BASE, "b.bias": np.full(40, np.nan, F)}, 1)
    with pytest.raises((TypeError, ValueError)):
        protection().protect(terms, BASE, {**BASE, "b.bias": np.full(40, "x")}, 1)


# ---- noise


def test_noise_has_the_size_that_the_plan_asks_for() -> None:
    mechanism = protection()
    sent = plain_of(on_the_wire(mechanism.protect(NOISE, BASE, BASE, 4)))
    noise = np.concatenate([sent[name] / 4 - BASE[name] for name in BASE])
    sigma = gaussian.sigma_of(8.0, 1e-5, gaussian.FIRST_CLIP)
    assert noise.std() == pytest.approx(sigma, rel=0.1)
    assert abs(noise.mean()) < sigma / 5


def test_a_change_is_clipped_to_the_bound_that_the_models_set() -> None:
    mechanism = protection()
    mechanism.completed(replace(NOISE, iteration=1), BASE, {"b.bias": BASE["b.bias"] + F(1)})
    assert mechanism.clip.bound == pytest.approx(math.sqrt(40), rel=1e-6)
    mechanism.completed(NOISE, BASE, {"b.bias": BASE["b.bias"] + F(2)})
    assert mechanism.clip.bound == pytest.approx(math.sqrt(40), rel=1e-6), "only downwards"
    weak = replace(NOISE, noise=DPParams(1e12, 0.5, 1.0))
    sent = plain_of(mechanism.protect(weak, BASE, {**BASE, "b.bias": BASE["b.bias"] + F(10)}, 1))
    np.testing.assert_allclose(sent["b.bias"], BASE["b.bias"] + 1, atol=1e-3)
    mechanism.completed(NOISE, BASE, BASE)
    assert mechanism.clip.bound == pytest.approx(math.sqrt(40), rel=1e-6), (
        "a model that stood still says nothing"
    )
    mechanism.completed(NOISE, BASE, {"b.bias": BASE["b.bias"] + F(1e-6)})
    assert mechanism.clip.bound == gaussian.CLIP_FLOOR
    mechanism.completed(PLAIN, BASE, {"b.bias": BASE["b.bias"] + F(1e-9)})


def test_the_account_stops_before_the_budget_is_overspent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fedclient")
    mechanism = protection(max_epsilon=20.0)
    updates = 0
    while not mechanism.exhausted(NOISE):
        mechanism.protect(NOISE, BASE, BASE, 1)
        updates += 1
    assert mechanism.spent.updates == updates
    assert (
        mechanism.spent.epsilon(1e-5)
        <= 20
        < mechanism.spent.with_update(gaussian.mu_of(8, 1e-5)).epsilon(1e-5)
    )
    assert updates > 20 / 8, "better than adding up"
    assert "20 is allowed" in mechanism.exhausted(NOISE)
    assert mechanism.exhausted(PLAIN) == ""
    assert f"{updates} updates have spent epsilon" in caplog.text
    assert protection().exhausted(NOISE) == ""


# ---- signs


def test_signs_carry_names_positions_and_no_value() -> None:
    request = on_the_wire(protection().protect(SIGNS, BASE, trained(), 9))
    assert request.sign in (-1, 1)
    assert [(item.weight_fullname, item.data.size) for item in request.feature_map or ()] == [  # type: ignore[union-attr]
        ("b.bias", 0),
        ("a.weight", 0),
    ]
    assert request.compress_feature_map is None
    layers = decoding.sign_layers(LAYOUT, request)
    assert layers == (("b.bias", 40), ("a.weight", 960))
    assert len(request.index_array) == 10  # type: ignore[arg-type]


def test_the_server_moves_what_moved_most() -> None:
    terms = replace(SIGNS, signs=DSParams(0.02, 100.0, 0.6, 0.1, 10))
    changed = {name: values.copy() for name, values in BASE.items()}
    changed["b.bias"][:10] += 1
    changed["a.weight"][-10:] += 1
    changed["b.bias"][10:20] -= 1
    changed["a.weight"][:10] -= 1
    moved = {1: set(range(10)) | set(range(990, 1000)), -1: set(range(10, 20)) | set(range(40, 50))}
    mechanism = protection()
    seen = set()
    for _ in range(20):
        request = mechanism.protect(terms, BASE, changed, 9)
        seen.add(request.sign)
        reading = decoding.sign_reading(
            request, decoding.sign_layers(LAYOUT, request), 0.1, BASE, "base", 3.0
        )
        update = {name: values[slice(0, values.size)] / 9 for name, values in reading.weights(9).items()}
        steps = np.concatenate([update[name] - BASE[name] for name in BASE])
        places = set(np.flatnonzero(np.abs(steps) > 0.05).tolist())
        assert places <= moved[request.sign]
        np.testing.assert_allclose(steps[list(places)], request.sign * 0.1, atol=1e-5)
    assert seen == {1, -1}


def test_signs_are_accounted_for_and_weak_ones_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    mechanism = protection(max_epsilon=12.0)
    for _ in range(2):
        assert not mechanism.exhausted(SIGNS)
        mechanism.protect(SIGNS, BASE, trained(), 1)
    assert mechanism.signs_epsilon == 10
    assert "to 15" in mechanism.exhausted(SIGNS)
    assert "which weights moved most" not in caplog.text
    for _ in range(2):
        mechanism.protect(replace(SIGNS, signs=replace(SIGNS.signs, sign_eps=10.5)), BASE, trained(), 1)
    assert caplog.text.count("sign_eps is 10.5") == 1


# ---- packed


def test_packed_updates_are_what_the_server_decodes() -> None:
    request = on_the_wire(protection().protect(PACKED, BASE, trained(), 5))
    assert request.feature_map is None
    assert request.name_vec == ("b.bias", "a.weight")
    assert request.upload_sparse_rate == 0.25
    decoded = read_packed(request, PACKED, 5)
    chosen = mask.draw(3, 0.25, SIZE)
    sent = np.concatenate([decoded[name] / 5 for name in BASE])
    meant = np.concatenate([trained()[name] for name in BASE])
    base = np.concatenate(list(BASE.values()))
    np.testing.assert_allclose(sent[chosen], meant[chosen], atol=0.02)
    np.testing.assert_allclose(sent[~chosen], base[~chosen], atol=1e-6)


def test_noise_comes_before_packing() -> None:
    both = replace(NOISE, compress_type=1, sparse_rate=1.0)
    mechanism = protection()
    decoded = read_packed(mechanism.protect(both, BASE, BASE, 5), both, 5)
    noise = np.concatenate([decoded[name] / 5 - BASE[name] for name in BASE])
    assert noise.std() == pytest.approx(gaussian.sigma_of(8.0, 1e-5, gaussian.FIRST_CLIP), rel=0.1)
    assert mechanism.spent.updates == 1


def test_what_is_left_out_comes_with_the_updates_that_follow() -> None:
    """The same change in each of many iterations: what arrives in all is what was meant in all."""
    meant = trained(0.01)
    steps = np.concatenate([meant[name] - BASE[name] for name in BASE])
    error = {}
    for feedback in (True, False):
        total = np.zeros(SIZE)
        mechanism = protection(error_feedback=feedback)
        for iteration in range(1, 61):
            terms = replace(PACKED, iteration=iteration)
            decoded = read_packed(mechanism.protect(terms, BASE, meant, 5), terms, 5)
            mechanism.taken()
            total += np.concatenate([decoded[name] / 5 - BASE[name] for name in BASE])
        error[feedback] = np.abs(total / 60 - steps).mean()
    assert error[False] > 0.7 * np.abs(steps).mean(), "three of four elements are lost each time"
    assert error[True] < 0.15 * np.abs(steps).mean()


def test_an_update_that_was_refused_leaves_nothing_behind() -> None:
    mechanism, other = protection(error_feedback=True), protection(error_feedback=True)
    mechanism.protect(PACKED, BASE, trained(), 5)
    again, first = (each.protect(PACKED, BASE, trained(), 5) for each in (mechanism, other))
    for one, two in zip(again.compress_feature_map or (), first.compress_feature_map or (), strict=True):
        np.testing.assert_array_equal(one.compress_data, two.compress_data)


@given(st.sampled_from([PLAIN, NOISE, SIGNS, PACKED]), st.integers(1, 65535))
def test_every_upload_can_be_encoded(terms: Terms, data_size: int) -> None:
    request = protection().protect(terms, BASE, {"a.weight": BASE["a.weight"] + F(0.5)}, data_size)
    assert encode(on_the_wire(request)) == encode(request)
