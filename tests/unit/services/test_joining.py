"""How a server and its cluster come to agree, or do not."""

from __future__ import annotations

import json
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest
from model.server_in_memory import PromptRedis, RecordedStore
from twisted.internet import defer
from twisted.logger import globalLogPublisher

from fedcore.config import EncryptType, Settings, UploadCompressType, hyper_parameters
from fedcore.config.settings import MaskLayout
from fedcore.core.job import RunningState
from fedcore.errors import ConfigError, StoreError, StoreUnavailable
from fedcore.services.joining import Joined, join
from fedcore.wire.arrays import Layout, Weight

LAYOUT = Layout((Weight("w", (4,)),))
BASE = "b0" * 32
SETTINGS = Settings(fl_name="job", fl_iteration_num=20)
VALUES, MODEL = "ms_fl:job:i_1:hyperParams:String", "ms_fl:job:ModelInfo:String"


def result_of(work: Coroutine[Any, Any, Any]) -> Any:
    outcome: list[Any] = []
    defer.Deferred.fromCoroutine(work).addBoth(outcome.append)
    if hasattr(outcome[0], "raiseException"):
        outcome[0].raiseException()
    return outcome[0]


@pytest.fixture
def store() -> RecordedStore:
    return RecordedStore(lambda: 0.0, lambda word: None)


def joined(
    store: RecordedStore,
    settings: Settings = SETTINGS,
    layout: Layout = LAYOUT,
    *,
    proposed: str = "i_1",
    first: int = 1,
) -> Joined:
    redis: Any = PromptRedis(store)
    return result_of(join(redis, settings, layout, proposed, first, BASE))  # type: ignore[no-any-return]


def with_round(**values: Any) -> Settings:
    return replace(SETTINGS, round=replace(SETTINGS.round, **values))


def test_the_first_server_makes_the_instance(store: RecordedStore) -> None:
    found = joined(store, first=4)
    assert store.name == found.cluster.keys.instance == "i_1"
    assert json.loads(store.texts[VALUES]) == hyper_parameters(SETTINGS)
    assert '"w"' in store.texts[MODEL]
    iteration = found.snapshot.iteration
    assert (iteration.number, iteration.base, iteration.running) == (4, BASE, RunningState.RUNNING)
    assert (found.snapshot.success, found.snapshot.result) == (True, "")


@pytest.mark.parametrize(("first", "waits"), [(1, False), (2, True)])
def test_who_makes_an_instance_of_a_job_under_way_counts_nothing_yet(
    store: RecordedStore, first: int, waits: bool
) -> None:
    """Servers that live may know an older instance, and bring it back."""
    assert bool(joined(store, first=first).cluster.keys.instance) and bool(store.now.awaited) is waits
    store.now.awaited.clear()
    joined(store, first=first, proposed="i_2")  # it is there already
    assert not store.now.awaited


def test_a_job_whose_iterations_are_all_done_is_finished(store: RecordedStore) -> None:
    assert joined(store, first=21).snapshot.iteration.running is RunningState.FINISH


def test_its_last_iteration_is_not(store: RecordedStore) -> None:
    assert joined(store, first=20).snapshot.iteration.running is RunningState.RUNNING


def test_a_later_server_takes_everything_over(store: RecordedStore) -> None:
    joined(store, with_round(start_fl_job_threshold=7), first=4)
    found = joined(store, with_round(start_fl_job_threshold=9), proposed="i_2", first=1)
    assert found.cluster.keys.instance == "i_1"
    assert found.snapshot.iteration.number == 4
    assert found.settings.round.start_fl_job_threshold == 7


def test_what_gives_way_is_logged(store: RecordedStore) -> None:
    joined(store, with_round(start_fl_job_threshold=7))
    logged: list[Any] = []
    globalLogPublisher.addObserver(logged.append)
    joined(store, with_round(start_fl_job_threshold=9))
    globalLogPublisher.removeObserver(logged.append)
    said = [event["difference"] for event in logged if "difference" in event]
    assert said == [
        "start_fl_job_threshold is 9 here, 7 in the cluster; the cluster's value is used",
    ]


def test_servers_that_agree_log_no_difference(store: RecordedStore) -> None:
    joined(store)
    logged: list[Any] = []
    globalLogPublisher.addObserver(logged.append)
    joined(store)
    globalLogPublisher.removeObserver(logged.append)
    assert [event for event in logged if "difference" in event] == []


def test_what_must_agree_is_a_conflict(store: RecordedStore) -> None:
    joined(store)
    values = json.loads(store.texts[VALUES])
    store.texts[VALUES] = json.dumps({**values, "pki_verify": not values["pki_verify"]})
    with pytest.raises(ConfigError, match=r"Context 'pki_verify' 0 of local != that 1 declared") as caught:
        joined(store)
    assert "Sync hyper params with distributed cache failed, distributed_cache_address: " in str(caught.value)
    assert "same value on all servers" in str(caught.value.hint)


def test_servers_of_a_masked_job_have_one_layout_of_masks(store: RecordedStore) -> None:
    """Each may be the one that takes the masks off; the layout is right or wrong whatever its file says of masking."""
    plain = with_round(start_fl_job_threshold=3)
    masked = replace(plain, encrypt=replace(plain.encrypt, encrypt_type=EncryptType.PW_ENCRYPT))
    own = plain.fedcore
    layout = replace(own.secure_aggregation, mask_layout=MaskLayout.PER_LAYER)
    other = replace(plain, fedcore=replace(own, secure_aggregation=layout))
    joined(store, masked)
    assert joined(store, masked).settings.encrypt.encrypt_type is EncryptType.PW_ENCRYPT
    with pytest.raises(
        ConfigError, match=r"Context 'mask_layout' per_layer of local != that contiguous declared"
    ):
        joined(store, other)


def test_another_model_is_refused_with_a_remedy(store: RecordedStore) -> None:
    joined(store)
    with pytest.raises(ConfigError, match="The feature size 20 of local != that 16") as caught:
        joined(store, layout=Layout((Weight("w", (5,)),)))
    assert "ModelInfo" in str(caught.value.hint)


def test_a_value_of_the_cluster_that_is_not_served_is_refused(store: RecordedStore) -> None:
    joined(store)
    values = json.loads(store.texts[VALUES])
    store.texts[VALUES] = json.dumps({**values, "encrypt_type": EncryptType.STABLE_PW_ENCRYPT.value})
    with pytest.raises(ConfigError, match="STABLE_PW_ENCRYPT") as caught:
        joined(store)
    assert "cluster's hyper-parameters" in str(caught.value.hint)


def test_a_value_of_the_cluster_that_does_not_go_with_the_file_is_refused(store: RecordedStore) -> None:
    joined(store)
    values = json.loads(store.texts[VALUES])
    store.texts[VALUES] = json.dumps({**values, "encrypt_type": EncryptType.SIGNDS.value})
    assert joined(store).settings.encrypt.encrypt_type is EncryptType.SIGNDS
    bound = replace(SETTINGS.fedcore.update, norm_bound=1.0)
    bounded = replace(SETTINGS, fedcore=replace(SETTINGS.fedcore, update=bound))
    with pytest.raises(ConfigError, match="norm_bound measures updates") as caught:
        joined(store, bounded)
    assert "cluster's hyper-parameters" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("protection", "expected"),
    [
        (EncryptType.SIGNDS, UploadCompressType.NO_COMPRESS),
        (EncryptType.DP_ENCRYPT, UploadCompressType.DIFF_SPARSE_QUANT),
    ],
)
def test_signed_uploads_are_not_compressed_whatever_the_cluster_says(
    store: RecordedStore, protection: EncryptType, expected: UploadCompressType
) -> None:
    joined(store)
    sparse = {"encrypt_type": protection.value, "upload_compress_type": "DIFF_SPARSE_QUANT"}
    store.texts[VALUES] = json.dumps({**json.loads(store.texts[VALUES]), **sparse})
    assert joined(store).settings.compression.upload_compress_type is expected


def test_a_refused_server_has_made_no_status(store: RecordedStore) -> None:
    store.claim_instance("i_1")
    store.texts[MODEL] = '{"features":{}}'
    with pytest.raises(ConfigError):
        joined(store)
    assert store.at("i_1").status is None


def test_unreadable_values_are_not_guessed(store: RecordedStore) -> None:
    store.claim_instance("i_1")
    store.texts[VALUES] = "{"
    with pytest.raises(StoreError, match="not JSON"):
        joined(store)


class Forgetful(RecordedStore):
    """Loses what is written under some kind of key."""

    def __init__(self, kind: str) -> None:
        super().__init__(lambda: 0.0, lambda word: None)
        self.kind = kind

    def command(self, *words: Any) -> Any:
        return None if f":{self.kind}:" in str(words[1]) else super().command(*words)

    def script(self, name: str, keys: Any, words: Any) -> Any:
        return 1 if name == "create_status" and self.kind == "status" else super().script(name, keys, words)


@pytest.mark.parametrize(
    ("kind", "said"), [("hyperParams", "the hyper-parameters"), ("status", "the status")]
)
def test_a_redis_that_forgets_at_once_is_not_available(kind: str, said: str) -> None:
    with pytest.raises(StoreUnavailable, match=f"Redis forgets {said}"):
        joined(Forgetful(kind))
