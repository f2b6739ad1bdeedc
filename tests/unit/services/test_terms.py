"""What follows from settings: policy and measures of the ledger."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedcore.config import EncryptType, Settings
from fedcore.config.settings import UploadCompressType
from fedcore.core.iteration import Policy
from fedcore.services.terms import (
    LEAST_SLOTS,
    MOST_SLOTS,
    ledger_shape,
    policy_of,
    slow_masks,
    update_limit,
)
from fedcore.wire.arrays import Layout, Weight

SMALL = Layout((Weight("w", (4,)), Weight("fixed", (2, 3), aggregated=False)))


def settings(places: int, ratio: float = 1.0, budget: int = 1 << 40) -> Settings:
    base = Settings(fl_name="job", fl_iteration_num=7)
    return replace(
        base,
        round=replace(
            base.round,
            start_fl_job_threshold=places,
            update_model_ratio=ratio,
            start_fl_job_time_window=1_500,
            update_model_time_window=2_500,
            global_iteration_time_window=9_000,
        ),
        fedcore=replace(base.fedcore, ledger=replace(base.fedcore.ledger, memory_budget=budget)),
    )


def test_policy_is_in_seconds_and_its_quorum_is_rounded_up() -> None:
    assert policy_of(settings(10, 0.72)) == Policy(10, 8, 1.5, 2.5, 9.0, 7)


def masked(kind: EncryptType, signed: bool = False) -> Settings:
    base = settings(10, 0.4)
    masks = replace(
        base.encrypt.pw_encrypt,
        share_secrets_ratio=0.8,
        cipher_time_window=3_999,
        reconstruct_secrets_threshold=2,
    )
    return replace(
        base,
        encrypt=replace(base.encrypt, encrypt_type=kind, pw_encrypt=masks),
        client_verify=replace(base.client_verify, pki_verify=signed),
    )


def test_with_masks_there_are_cipher_rounds_whose_windows_are_whole_seconds() -> None:
    policy = policy_of(masked(EncryptType.PW_ENCRYPT))
    assert policy.unmask and policy.cipher_window == 3.0 and policy.update_threshold == 4
    assert policy.cipher_rounds == (
        ("exchangeKeys", 8),
        ("getKeys", 7),
        ("shareSecrets", 6),
        ("getSecrets", 5),
        ("getClientList", 4),
        ("reconstructSecrets", 3),
    )
    signed = dict(policy_of(masked(EncryptType.PW_ENCRYPT, signed=True)).cipher_rounds)
    assert list(signed)[4:] == ["getClientList", "pushListSign", "getListSign", "reconstructSecrets"]
    assert (signed["pushListSign"], signed["getListSign"]) == (4, 4)


def test_masks_that_nobody_takes_off_need_all_that_have_them() -> None:
    policy = policy_of(masked(EncryptType.STABLE_PW_ENCRYPT))
    assert not policy.unmask and policy.update_threshold == 8
    assert policy.cipher_rounds == (("exchangeKeys", 8), ("getKeys", 7))


@pytest.mark.parametrize("kind", [EncryptType.NOT_ENCRYPT, EncryptType.DP_ENCRYPT, EncryptType.SIGNDS])
def test_without_masks_there_are_none(kind: EncryptType) -> None:
    policy = policy_of(masked(kind))
    assert policy == replace(policy, unmask=False, cipher_window=0.0, cipher_rounds=())


def test_the_longest_update_holds_all_weights_their_names_and_the_rest() -> None:
    assert update_limit(SMALL) == 4 * 10 + (2 * 1 + 128) + (2 * 5 + 128) + 256 * 1024


def test_the_name_counts_in_bytes() -> None:
    assert update_limit(Layout((Weight("ü", (1,)),))) == update_limit(Layout((Weight("uu", (1,)),)))


@pytest.mark.parametrize(
    ("places", "slots"), [(1, LEAST_SLOTS), (4, LEAST_SLOTS), (5, 10), (32, MOST_SLOTS), (1000, MOST_SLOTS)]
)
def test_a_ledger_has_two_slots_per_client_within_bounds(places: int, slots: int) -> None:
    shape = ledger_shape(settings(places), SMALL)
    assert (shape.slots, shape.clients) == (slots, places)
    assert shape.slot_size >= update_limit(SMALL)


@pytest.mark.parametrize(("updates", "slots"), [(0, LEAST_SLOTS), (9, 9), (20, 20), (10**6, MOST_SLOTS)])
def test_the_budget_limits_the_slots_but_never_below_the_least(updates: int, slots: int) -> None:
    shape = ledger_shape(settings(100, budget=updates * update_limit(SMALL)), SMALL)
    assert shape.slots == slots


def test_a_ledger_lists_all_places_not_only_the_quorum() -> None:
    """After Redis has lost data more than the quorum may be counted."""
    assert ledger_shape(settings(9, 0.5), SMALL).clients == 9


class TestSlowMasks:
    SPARSE = UploadCompressType.DIFF_SPARSE_QUANT

    @staticmethod
    def warning(upload: UploadCompressType, values: int, compiled: bool = False) -> str | None:
        base = settings(10)
        chosen = replace(base, compression=replace(base.compression, upload_compress_type=upload))
        return slow_masks(chosen, Layout((Weight("w", (values,)),)), compiled)

    def test_are_worth_a_warning(self) -> None:
        warning = self.warning(self.SPARSE, 5_000_000)
        assert warning is not None
        assert warning.startswith("the mask of sparse uploads takes about 1.0 s of each iteration")
        assert "gcc and python3-dev" in warning

    def test_of_small_models_are_not(self) -> None:
        assert self.warning(self.SPARSE, 1_000_000) is None
        assert self.warning(self.SPARSE, 1_000_001) is not None

    def test_are_none_with_the_extension_or_without_sparse_uploads(self) -> None:
        assert self.warning(self.SPARSE, 5_000_000, compiled=True) is None
        assert self.warning(UploadCompressType.NO_COMPRESS, 5_000_000) is None
