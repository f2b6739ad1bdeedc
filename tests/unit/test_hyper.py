"""The shared hyper-parameters: reading, comparing, taking over, and what newInstance may do to them."""

import json
from dataclasses import replace
from operator import attrgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.config import Settings, hyper_parameters
from fedcore.config.hyper import (
    BadRequest,
    adopt,
    conflict,
    differences,
    merge,
    parse_json,
    parse_object,
    parse_shared,
)
from fedcore.config.settings import AggregationType, EncryptType, MaskLayout, UploadCompressType
from fedcore.core.quorum import to_float32
from fedcore.errors import ConfigError, StoreError

OWN = hyper_parameters(Settings())
INTEGERS = [
    "global_iteration_time_window",
    "start_fl_job_threshold",
    "start_fl_job_time_window",
    "update_model_time_window",
    "client_epoch_num",
    "client_batch_size",
    "fl_iteration_num",
]
NUMBERS = ["update_model_ratio", "client_learning_rate"]
IN_ORDER = [
    "global_iteration_time_window",
    "start_fl_job_threshold",
    "start_fl_job_time_window",
    "update_model_ratio",
    "update_model_time_window",
    "client_epoch_num",
    "client_batch_size",
    "client_learning_rate",
    "fl_iteration_num",
]


def unsigned(name: str) -> str:
    return f"Field {name} in hyper param config should be unsigned integer number"


def a_number(name: str) -> str:
    return f"Field {name} in hyper param config should be float or integer number"


def refusal(requested: object) -> str:
    with pytest.raises(BadRequest) as caught:
        merge(OWN, requested)
    return str(caught.value)


class TestParse:
    def test_what_a_server_wrote(self) -> None:
        assert parse_shared(json.dumps(OWN)) == parse_shared(json.dumps(OWN).encode()) == OWN

    def test_keys_of_newer_versions_stay(self) -> None:
        assert parse_shared(json.dumps({**OWN, "laplace_eval_eps": 1.5}))["laplace_eval_eps"] == 1.5

    @pytest.mark.parametrize("name", [name for name in OWN if name != "mask_layout"])  # ours alone
    def test_every_key_is_required(self, name: str) -> None:
        text = json.dumps({key: value for key, value in OWN.items() if key != name})
        with pytest.raises(StoreError, match=f"^the hyper-parameters in Redis lack {name} "):
            parse_shared(text)

    @pytest.mark.parametrize(
        "text",
        [b"", b"{", b"\xff{}", b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1e999}', b"[" * 100_000, b"1" * 5000],
    )
    def test_no_json(self, text: bytes) -> None:
        with pytest.raises(StoreError, match=r"^the hyper-parameters in Redis are not JSON: "):
            parse_object(text)
        with pytest.raises(ValueError):
            parse_json(text)

    @pytest.mark.parametrize("text", ["[]", "1", '"a"', "null"])
    def test_no_object(self, text: str) -> None:
        with pytest.raises(StoreError, match="are not a JSON object"):
            parse_shared(text)


class TestDifferences:
    def test_none(self) -> None:
        assert differences(OWN, parse_shared(json.dumps(OWN))) == []

    def test_each_is_a_sentence_in_the_order_of_the_values(self) -> None:
        shared = {
            **OWN,
            "start_fl_job_threshold": 20,
            "encrypt_type": "DP_ENCRYPT",
            "update_model_ratio": 0.5,
        }
        assert differences({**OWN, "start_fl_job_threshold": 10}, shared) == [
            "start_fl_job_threshold is 10 here, 20 in the cluster; the cluster's value is used",
            "update_model_ratio is 1.0 here, 0.5 in the cluster; the cluster's value is used",
            "encrypt_type is NOT_ENCRYPT here, DP_ENCRYPT in the cluster; the cluster's value is used",
        ]

    def test_fractions_are_compared_as_devices_see_them(self) -> None:
        assert (
            differences({**OWN, "update_model_ratio": to_float32(0.8)}, {**OWN, "update_model_ratio": 0.8})
            == []
        )
        assert differences(OWN, {**OWN, "update_model_ratio": 1}) == []

    def test_one_is_not_true(self) -> None:
        assert len(differences(OWN, {**OWN, "total_client_num": True, "update_model_ratio": True})) == 2

    @pytest.mark.parametrize("name", ["enable_ssl", "pki_verify", "secure_aggregation"])
    def test_what_is_not_taken_over_is_not_told(self, name: str) -> None:
        assert differences(OWN, {**OWN, name: True}) == []


class TestConflict:
    def test_none(self) -> None:
        assert conflict(OWN, {**OWN, "start_fl_job_threshold": 99, "secure_aggregation": True}) is None

    @pytest.mark.parametrize("name", ["enable_ssl", "pki_verify"])
    def test_each(self, name: str) -> None:
        here = conflict({**OWN, name: True}, OWN)
        assert here == f"Context '{name}' 1 of local != that 0 declared in distributed cache."
        there = conflict(OWN, {**OWN, name: True})
        assert there == f"Context '{name}' 0 of local != that 1 declared in distributed cache."

    def test_the_layout_of_masks_where_there_are_some(self) -> None:
        masked = {**OWN, "encrypt_type": "PW_ENCRYPT"}
        other = {**OWN, "mask_layout": "per_layer"}  # whatever this server's file says of the encryption
        here = conflict(other, masked)
        assert here == (
            "Context 'mask_layout' per_layer of local != that contiguous declared in distributed cache."
        )
        assert conflict(masked, {**masked, "mask_layout": "per_layer"}) == (
            "Context 'mask_layout' contiguous of local != that per_layer declared in distributed cache."
        )
        assert conflict(other, {**other, "encrypt_type": "PW_ENCRYPT"}) is None
        assert conflict(other, OWN) is None
        assert conflict(other, {**OWN, "encrypt_type": "STABLE_PW_ENCRYPT"}) is None  # nothing is taken off

    def test_a_version_without_layouts_has_told_none(self) -> None:
        shared = {name: value for name, value in OWN.items() if name != "mask_layout"}
        assert conflict({**OWN, "mask_layout": "per_layer"}, {**shared, "encrypt_type": "PW_ENCRYPT"}) is None

    def test_ssl_comes_first(self) -> None:
        assert "enable_ssl" in (conflict(OWN, {**OWN, "enable_ssl": True, "pki_verify": True}) or "")


class TestAdopt:
    def test_own_values_change_nothing_but_precision(self) -> None:
        settings = Settings()
        adopted = adopt(settings, OWN)
        assert hyper_parameters(adopted) == OWN
        assert adopt(adopted, OWN) == adopted
        assert (adopted.fedcore, adopted.summary) == (settings.fedcore, settings.summary)
        assert (adopted.fl_name, adopted.server_mode) == (settings.fl_name, settings.server_mode)

    def test_all_values_arrive(self) -> None:
        shared: dict[str, object] = {
            "global_iteration_time_window": 11,
            "start_fl_job_threshold": 12,
            "start_fl_job_time_window": 13,
            "update_model_ratio": 0.25,
            "update_model_time_window": 14,
            "client_epoch_num": 15,
            "client_batch_size": 16,
            "client_learning_rate": 0.125,
            "fl_iteration_num": 17,
            "aggregation_type": "Scaffold",
            "iid_rate": 0.75,
            "total_client_num": 18,
            "secure_aggregation": True,
            "encrypt_type": "PW_ENCRYPT",
            "share_secrets_ratio": 0.5,
            "cipher_time_window": 19,
            "reconstruct_secrets_threshold": 20,
            "dp_eps": 2.5,
            "dp_delta": 0.5,
            "dp_norm_clip": 3.5,
            "sign_k": 0.0625,
            "sign_eps": 4.5,
            "sign_thr_ratio": 0.875,
            "sign_global_lr": 5.5,
            "sign_dim_out": 21,
            "upload_compress_type": "DIFF_SPARSE_QUANT",
            "upload_sparse_rate": 0.375,
            "download_compress_type": "QUANT",
            "enable_ssl": True,
            "pki_verify": True,
            "mask_layout": "contiguous",
        }
        assert shared.keys() == OWN.keys()
        adopted = adopt(Settings(), shared)
        assert hyper_parameters(adopted) == {**shared, "secure_aggregation": False}
        assert adopted.aggregation.aggregation_type is AggregationType.SCAFFOLD
        assert adopted.encrypt.encrypt_type is EncryptType.PW_ENCRYPT
        assert adopted.compression.upload_compress_type is UploadCompressType.DIFF_SPARSE_QUANT
        assert (adopted.round.start_fl_job_threshold, adopted.client_verify.pki_verify) == (12, True)

    def test_a_whole_number_is_a_fraction_too(self) -> None:
        assert repr(adopt(Settings(), {**OWN, "update_model_ratio": 1}).round.update_model_ratio) == "1.0"

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            (
                "encrypt_type",
                "ROT13",
                "encrypt_type is ROT13 in the cluster: this version knows NOT_ENCRYPT, ",
            ),
            ("aggregation_type", 7, "aggregation_type is 7 in the cluster: this version knows FedAvg, "),
            (
                "upload_compress_type",
                ["x"],
                "upload_compress_type is ['x'] in the cluster: this version knows ",
            ),
            ("fl_iteration_num", "5", "fl_iteration_num is 5 in the cluster: its type should be int"),
            ("fl_iteration_num", True, "fl_iteration_num is true in the cluster: its type should be int"),
            ("fl_iteration_num", 5.0, "fl_iteration_num is 5.0 in the cluster: its type should be int"),
            ("fl_iteration_num", 0, "fl_iteration_num is 0 in the cluster: it should be in [1, 4294967295]"),
            ("client_batch_size", 0, "client_batch_size is 0 in the cluster: it should be in >= 1"),
            ("update_model_ratio", 1.5, "update_model_ratio is 1.5 in the cluster: it should be in (0, 1]"),
            (
                "update_model_ratio",
                1e-50,
                "update_model_ratio is 1e-50 in the cluster: it should be in (0, 1]",
            ),
            (
                "update_model_ratio",
                None,
                "update_model_ratio is None in the cluster: its type should be float",
            ),
            ("client_learning_rate", 1e39, "client_learning_rate is 1e+39 in the cluster: its type "),
            ("enable_ssl", 1, "enable_ssl is 1 in the cluster: its type should be bool"),
        ],
    )
    def test_what_cannot_be_used(self, name: str, value: object, reason: str) -> None:
        with pytest.raises(ConfigError) as caught:
            adopt(Settings(), {**OWN, name: value})
        assert str(caught.value).startswith(reason)
        assert "start a new instance, or delete the key hyperParams" in str(caught.value)

    def test_all_faults_at_once(self) -> None:
        with pytest.raises(ConfigError) as caught:
            adopt(Settings(), {**OWN, "client_epoch_num": 0, "encrypt_type": "x", "pki_verify": "no"})
        assert [line.split()[0] for line in str(caught.value).splitlines()] == [
            "client_epoch_num",
            "encrypt_type",
            "pki_verify",
        ]

    def test_a_range_counts_only_where_the_value_is_in_force(self) -> None:
        unused = {**OWN, "cipher_time_window": 0, "dp_eps": 0.0, "sign_k": 0.0}
        assert adopt(Settings(), unused).encrypt.pw_encrypt.cipher_time_window == 0
        for protection, name in (
            ("PW_ENCRYPT", "cipher_time_window"),
            ("DP_ENCRYPT", "dp_eps"),
            ("SIGNDS", "sign_k"),
        ):
            with pytest.raises(ConfigError, match=f"^{name} is "):
                adopt(Settings(), {**unused, "encrypt_type": protection})


class TestMerge:
    def test_nothing_asked_changes_nothing(self) -> None:
        assert merge(OWN, {}) == OWN

    def test_what_is_not_named_stays_and_others_are_ignored(self) -> None:
        current = {**OWN, "later": [1]}
        before = dict(current)
        asked = {"start_fl_job_threshold": 7, "encrypt_type": "PW_ENCRYPT", "enable_ssl": True, "x": {}}
        assert merge(current, asked) == {**current, "start_fl_job_threshold": 7}
        assert current == before

    def test_all_that_can_be_changed(self) -> None:
        asked = {name: index + 1 for index, name in enumerate(INTEGERS)} | {
            "update_model_ratio": 0.8,
            "client_learning_rate": 0.01,
        }
        widened = {"update_model_ratio": 0.800000011920929, "client_learning_rate": 0.009999999776482582}
        assert merge(OWN, asked) == {**OWN, **asked, **widened}

    def test_a_whole_number_becomes_a_fraction(self) -> None:
        merged = merge(OWN, {"update_model_ratio": 1, "client_learning_rate": 2})
        assert (repr(merged["update_model_ratio"]), repr(merged["client_learning_rate"])) == ("1.0", "2.0")

    @pytest.mark.parametrize("asked", [[], 1, "{}", None, True, [{}]])
    def test_no_object(self, asked: object) -> None:
        assert refusal(asked) == "Expect hyper param config to be json object"

    @pytest.mark.parametrize("name", INTEGERS)
    def test_integers(self, name: str) -> None:
        for value in (-1, 1.0, 2.5, "1", True, False, None, [], {}, 1 << 32, 10**40, float("nan")):
            assert refusal({name: value}) == unsigned(name), value
        assert refusal({name: 0}) == f"Field {name} in hyper param config should be larger than 0"
        assert merge(OWN, {name: 1})[name] == 1
        assert merge(OWN, {name: 4294967295})[name] == 4294967295

    @pytest.mark.parametrize("name", NUMBERS)
    def test_numbers(self, name: str) -> None:
        for value in (
            "1",
            True,
            False,
            None,
            [],
            {},
            float("nan"),
            float("inf"),
            -float("inf"),
            10**400,
            1e39,
        ):
            assert refusal({name: value}) == a_number(name), value

    @pytest.mark.parametrize("value", [0, 0.0, -0.0, -1, -0.5, 1.0000001, 2, 1e-50])
    def test_the_ratio(self, value: float) -> None:
        text = "Field update_model_ratio in hyper param config should be in range of (0,1.0]"
        assert refusal({"update_model_ratio": value}) == text

    @pytest.mark.parametrize("value", [0, 0.0, -1, -0.5, 1e-50])
    def test_the_learning_rate(self, value: float) -> None:
        text = "Field client_learning_rate in hyper param config should be greater than 0"
        assert refusal({"client_learning_rate": value}) == text

    def test_the_order_of_the_checks(self) -> None:
        for place, first in enumerate(IN_ORDER):
            asked = dict.fromkeys(reversed(IN_ORDER[place:]), "bad")
            assert refusal(asked) == (a_number if first in NUMBERS else unsigned)(first)

    @given(
        st.dictionaries(
            st.sampled_from([*IN_ORDER, "encrypt_type"]),
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        )
    )
    def test_what_is_merged_can_be_adopted(self, asked: dict[str, object]) -> None:
        try:
            merged = merge(OWN, asked)
        except BadRequest:
            return
        assert hyper_parameters(adopt(Settings(), parse_shared(json.dumps(merged)))) == merged


def test_the_layout_of_masks_is_shared() -> None:
    settings = Settings()
    masks = replace(settings.fedcore.secure_aggregation, mask_layout=MaskLayout.PER_LAYER)
    fedcore = replace(settings.fedcore, secure_aggregation=masks)
    assert OWN["mask_layout"] == "contiguous"
    assert hyper_parameters(replace(settings, fedcore=fedcore))["mask_layout"] == "per_layer"
    assert merge(OWN, {})["mask_layout"] == "contiguous"


def test_the_places_are_the_files() -> None:
    """A value put into the settings at its place is the one that is shared under its name."""
    settings = Settings()
    round_ = replace(settings.round, start_fl_job_threshold=77)
    assert hyper_parameters(replace(settings, round=round_))["start_fl_job_threshold"] == 77
    assert (
        attrgetter("round.start_fl_job_threshold")(adopt(settings, {**OWN, "start_fl_job_threshold": 78}))
        == 78
    )
