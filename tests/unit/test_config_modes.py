"""What the configuration says about who trains and by which rule, together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedcore.config import AggregationType, EncryptType, Role, ServerMode, Settings, unsupported
from fedcore.config.crosscheck import cross_checks
from fedcore.config.settings import PwEncryptSettings

FOUND = ("aggregation.", "encrypt.")


def findings(mode: ServerMode, rule: AggregationType, **more: Any) -> list[str]:
    """Return what is said about a rule in a mode, with two places and a population of two."""
    base = Settings(fl_name="job", fl_iteration_num=5)
    encrypt = more.pop("encrypt_type", EncryptType.NOT_ENCRYPT)
    kind = {"aggregation_type": rule, "total_client_num": 2, "iid_rate": 0.5} | more
    settings = replace(
        base,
        server_mode=mode,
        aggregation=replace(base.aggregation, **kind),
        encrypt=replace(base.encrypt, encrypt_type=encrypt),
        round=replace(base.round, start_fl_job_threshold=2, update_model_ratio=1.0),
    )
    assert not [text for text in cross_checks(settings, Role.SCHEDULER) if text.startswith(FOUND)]
    return [text for text in cross_checks(settings, Role.SERVER) if text.startswith(FOUND)]


@pytest.mark.parametrize("rule", list(AggregationType))
def test_cloud_workers_know_every_rule(rule: AggregationType) -> None:
    assert findings(ServerMode.CLOUD_TRAINING, rule) == []


@pytest.mark.parametrize("mode", [ServerMode.FEDERATED_LEARNING, ServerMode.HYBRID_TRAINING])
def test_devices_know_no_rule_of_workers(mode: ServerMode) -> None:
    for rule in (AggregationType.SCAFFOLD, AggregationType.FEDNOVA):
        (text,) = findings(mode, rule)
        assert f"{rule} adds up what only cloud workers upload, but server_mode is {mode}" in text
    for rule in (AggregationType.FEDAVG, AggregationType.FEDPROX):
        assert findings(mode, rule) == []


def test_scaffolds_population_is_at_least_who_takes_part() -> None:
    (text,) = findings(ServerMode.CLOUD_TRAINING, AggregationType.SCAFFOLD, total_client_num=1)
    assert "total_client_num 1 is below round.start_fl_job_threshold 2" in text
    assert findings(ServerMode.CLOUD_TRAINING, AggregationType.FEDNOVA, total_client_num=1) == []


def test_fedprox_needs_its_rate_where_it_is_used() -> None:
    assert "iid_rate is 0" in findings(ServerMode.CLOUD_TRAINING, AggregationType.FEDPROX, iid_rate=0.0)[0]
    assert findings(ServerMode.FEDERATED_LEARNING, AggregationType.FEDPROX, iid_rate=0.0) == []


def test_cloud_workers_know_one_kind_of_masks() -> None:
    for cipher in EncryptType:
        found = findings(ServerMode.CLOUD_TRAINING, AggregationType.FEDAVG, encrypt_type=cipher)
        refused = [text for text in found if "is for devices" in text]
        assert bool(refused) == (cipher not in (EncryptType.NOT_ENCRYPT, EncryptType.STABLE_PW_ENCRYPT)), (
            cipher
        )


def test_cloud_workers_sign_nothing() -> None:
    for mode in ServerMode:
        base = Settings(fl_name="job", fl_iteration_num=5, server_mode=mode)
        settings = replace(base, client_verify=replace(base.client_verify, pki_verify=True))
        told = [text for text in cross_checks(settings, Role.SERVER) if "cloud workers sign nothing" in text]
        assert bool(told) == (mode is ServerMode.CLOUD_TRAINING)


# --- masks


def masked(
    mode: ServerMode = ServerMode.FEDERATED_LEARNING,
    kind: EncryptType = EncryptType.PW_ENCRYPT,
    *,
    places: int = 6,
    updates: float = 0.5,
    ratio: float = 1.0,
    threshold: int = 4,
    bound: float = 0.0,
) -> Settings:
    """Settings with masks; without other arguments they can be served and are sound."""
    base = Settings(fl_name="job", fl_iteration_num=5, server_mode=mode)
    masks = PwEncryptSettings(ratio, 3000, threshold)
    return replace(
        base,
        encrypt=replace(base.encrypt, encrypt_type=kind, pw_encrypt=masks),
        round=replace(base.round, start_fl_job_threshold=places, update_model_ratio=updates),
        fedcore=replace(base.fedcore, update=replace(base.fedcore.update, norm_bound=bound)),
    )


def test_masks_are_served_where_they_can_be_taken_off() -> None:
    served = {
        (mode, kind)
        for mode in ServerMode
        for kind in (EncryptType.PW_ENCRYPT, EncryptType.STABLE_PW_ENCRYPT)
        if unsupported(masked(mode, kind), Role.SERVER) == []
    }
    assert served == {
        (ServerMode.FEDERATED_LEARNING, EncryptType.PW_ENCRYPT),
        (ServerMode.CLOUD_TRAINING, EncryptType.STABLE_PW_ENCRYPT),
    }
    assert unsupported(masked(ServerMode.HYBRID_TRAINING), Role.SCHEDULER) == []


def test_a_norm_is_not_measured_through_masks() -> None:
    (fault,) = unsupported(masked(bound=1.0), Role.SERVER)
    assert fault.startswith("fedcore.update.norm_bound would refuse every update")


def test_masks_that_nobody_could_take_off_are_refused() -> None:
    assert unsupported(masked(threshold=5), Role.SERVER) == []
    (fault,) = unsupported(masked(threshold=6), Role.SERVER)
    assert fault.startswith(
        "cipher init fail. encrypt.pw_encrypt.reconstruct_secrets_threshold 6 needs the reports of 7"
    )
    (fault,) = unsupported(masked(places=8, ratio=0.5, updates=0.125, threshold=1), Role.SERVER)
    assert "1 are to share" in fault  # 8 places, 4 members, 2 with their keys, 1 sharer


def test_few_shares_that_give_a_secret_are_warned_of() -> None:
    assert not [
        text for text in cross_checks(masked(threshold=4), Role.SERVER) if "not more than half" in text
    ]
    (found,) = [
        text for text in cross_checks(masked(threshold=3), Role.SERVER) if "not more than half" in text
    ]
    assert found.startswith(
        "encrypt.pw_encrypt.reconstruct_secrets_threshold 3 is not more than half of the 6 clients"
    )
