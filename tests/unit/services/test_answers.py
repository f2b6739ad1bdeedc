"""Every field of every table that answers a device, read back from the bytes that are sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from memory_reactor import MemoryReactor
from twisted.internet import defer

from fedcore.compression import quant
from fedcore.config import AggregationType, EncryptType, EvalType, ServerMode, Settings
from fedcore.config.settings import DownloadCompressType, UnsupervisedSettings, UploadCompressType
from fedcore.models.history import ModelHistory
from fedcore.secagg.shamir import PRIME
from fedcore.services.answers import Answer, Answers
from fedcore.services.packed_models import PackedModels
from fedcore.wire import codec
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.image import ImageTemplate, ModelImage
from fedcore.wire.messages import (
    CipherPublicParams,
    DPParams,
    DSParams,
    FLPlan,
    PWParams,
    ResponseFLJob,
    ResponseGetModel,
    ResponseUpdateModel,
)

LAYOUT = Layout((Weight("b", (2,)), Weight("a", (1, 2)), Weight("fixed", (), aggregated=False)))
TEMPLATE = ImageTemplate(LAYOUT)
NRT = 1_700_000_000_123


def model(value: float) -> ModelImage:
    return TEMPLATE.image(
        {"a": np.float32([value, value]), "b": np.float32([-value, 0]), "fixed": np.float32([9])}
    )


def settings(**client: Any) -> Settings:
    base = Settings(fl_name="demo.DemoClient", fl_iteration_num=25)
    client = {"client_epoch_num": 3, "client_batch_size": 16, "client_learning_rate": 0.125, **client}
    return replace(
        base,
        client=replace(base.client, **client),
        compression=replace(base.compression, upload_sparse_rate=0.25),
    )


PLAN = FLPlan(
    server_mode="FEDERATED_LEARNING",
    fl_name="demo.DemoClient",
    iterations=25,
    epochs=3,
    mini_batch=16,
    lr=0.125,
    cipher=CipherPublicParams("NOT_ENCRYPT", PWParams(p=bytes(32), prime=bytes(33)), DPParams(), DSParams()),
)


@pytest.fixture
def history() -> ModelHistory:
    """Models 4, 5 and 6 are kept; iteration 7 is the current one."""
    history = ModelHistory(4, model(4))
    history.add(5, model(5))
    history.add(6, model(6))
    return history


@pytest.fixture
def answers(history: ModelHistory) -> Answers:
    answers = answers_of(settings(), history)
    answers.open(7)
    return answers


def answers_of(settings: Settings, history: ModelHistory) -> Answers:
    return Answers(settings, history, PackedModels(MemoryReactor()))


def table(answer: Answer, kind: type) -> Any:
    response = answer.response
    assert (response.status, response.content_type) == (200, b"application/octet-stream")
    reply = codec.decode(kind, b"".join(response.parts))
    assert reply.retcode == answer.code
    return reply


def weights(reply: Any) -> dict[str, list[float]]:
    """The weights in the order in which they were sent."""
    return {item.weight_fullname: item.data.tolist() for item in reply.feature_map}


def bare(reply: Any) -> Any:
    """The table without its weights."""
    return replace(reply, feature_map=None)


class TestStartFLJob:
    def test_a_selected_device_gets_the_plan_and_every_weight(self, answers: Answers) -> None:
        reply = table(answers.selected(NRT), ResponseFLJob)
        assert bare(reply) == ResponseFLJob(
            retcode=200,
            reason="success",
            iteration=7,
            is_selected=True,
            next_req_time=str(NRT),
            fl_plan_config=PLAN,
            timestamp=None,
            upload_compress_type=0,
            upload_sparse_rate=0.25,
            download_compress_type=0,
            compress_feature_map=(),
            unsupervised_eval_flg=0,
        )
        assert weights(reply) == {"a": [6, 6], "b": [-6, 0], "fixed": [9]}
        assert list(weights(reply)) == ["a", "b", "fixed"]

    @pytest.mark.parametrize("code", [300, 400, 500])
    def test_a_refused_device_gets_the_plan_too(self, answers: Answers, code: int) -> None:
        """Old devices give up for ever when it is not there."""
        reply = table(answers.start_refused(code, "warum: ü", NRT), ResponseFLJob)
        assert reply == ResponseFLJob(
            retcode=code,
            reason="warum: ü",
            iteration=7,
            is_selected=False,
            next_req_time=str(NRT),
            fl_plan_config=PLAN,
            feature_map=(),
            timestamp=None,
            upload_compress_type=0,
            upload_sparse_rate=0.25,
            download_compress_type=0,
            compress_feature_map=(),
            unsupervised_eval_flg=0,
        )

    def test_devices_are_asked_for_evaluation_vectors_if_these_are_evaluated(
        self, history: ModelHistory
    ) -> None:
        evaluated = UnsupervisedSettings(9, EvalType.DAVIES_BOULDIN_SCORE)
        answers = answers_of(replace(settings(), unsupervised=evaluated), history)
        assert table(answers.selected(NRT), ResponseFLJob).unsupervised_eval_flg == 1

    def test_all_devices_of_an_iteration_get_the_same_bytes(self, answers: Answers) -> None:
        first = answers.selected(NRT)
        assert answers.selected(NRT + 1) is first

    def test_the_weights_are_the_model_itself_and_not_a_copy(
        self, answers: Answers, history: ModelHistory
    ) -> None:
        assert answers.selected(NRT).response.parts[-1] is history.newest_image.tail

    def test_the_next_iteration_gets_the_next_model(self, answers: Answers, history: ModelHistory) -> None:
        answers.selected(NRT)
        history.add(7, model(7))
        answers.open(8)
        reply = table(answers.selected(NRT + 5), ResponseFLJob)
        assert (reply.iteration, reply.next_req_time) == (8, str(NRT + 5))
        assert weights(reply)["a"] == [7, 7]
        assert table(answers.start_refused(300, "", NRT), ResponseFLJob).iteration == 8

    def test_a_learning_rate_travels_in_single_precision(self, history: ModelHistory) -> None:
        answers = answers_of(settings(client_learning_rate=0.001), history)
        plan = table(answers.start_refused(300, "", NRT), ResponseFLJob).fl_plan_config
        assert plan.lr == np.float32(0.001)

    @pytest.mark.parametrize(
        ("kind", "t", "prime"),
        [
            ("NOT_ENCRYPT", 0, bytes(33)),
            ("PW_ENCRYPT", 7, PRIME.to_bytes(33, "big")),
            ("STABLE_PW_ENCRYPT", 7, bytes(33)),
            ("DP_ENCRYPT", 7, bytes(33)),
            ("SIGNDS", 7, bytes(33)),
        ],
    )
    def test_the_parameters_of_masks(self, history: ModelHistory, kind: str, t: int, prime: bytes) -> None:
        base = settings()
        masks = replace(base.encrypt.pw_encrypt, reconstruct_secrets_threshold=7)
        encrypt = replace(base.encrypt, encrypt_type=EncryptType(kind), pw_encrypt=masks)
        answers = answers_of(replace(base, encrypt=encrypt), history)
        plan = table(answers.start_refused(300, "", NRT), ResponseFLJob).fl_plan_config
        assert plan.cipher.pw_params == PWParams(t, bytes(32), int(t > 0), prime)


SCAFFOLD_LAYOUT = Layout(
    (*LAYOUT, Weight("control.a", (1, 2)), Weight("control.b", (2,)), Weight("control.fixed", (), False))
)
EVERYTHING = ["a", "b", "control.a", "control.b", "control.fixed", "fixed"]
OTHER_RULES = [rule for rule in AggregationType if rule is not AggregationType.SCAFFOLD]


class TestModes:
    """Which weights travel, by mode and rule."""

    def names(self, mode: ServerMode, rule: AggregationType) -> tuple[list[str], list[str]]:
        """Return what startFLJob and getModel carry."""
        base = settings()
        chosen = replace(base, server_mode=mode, aggregation=replace(base.aggregation, aggregation_type=rule))
        ones = {name: np.ones(weight.size) for name, weight in SCAFFOLD_LAYOUT.by_name.items()}
        answers = answers_of(chosen, ModelHistory(6, ImageTemplate(SCAFFOLD_LAYOUT).image(ones)))
        answers.open(7)
        start = table(answers.selected(NRT), ResponseFLJob)
        assert start.fl_plan_config.server_mode == mode
        assert start.fl_plan_config.aggregation is None, "whoever must know the rule has it of its own"
        return list(weights(start)), list(weights(table(answers.model(6, NRT), ResponseGetModel)))

    @pytest.mark.parametrize("rule", list(AggregationType))
    def test_hybrid_shows_everything(self, rule: AggregationType) -> None:
        assert self.names(ServerMode.HYBRID_TRAINING, rule) == (EVERYTHING, EVERYTHING)

    @pytest.mark.parametrize("mode", [ServerMode.FEDERATED_LEARNING, ServerMode.CLOUD_TRAINING])
    def test_scaffolds_control_is_no_part_of_a_model(self, mode: ServerMode) -> None:
        assert self.names(mode, AggregationType.SCAFFOLD)[1] == ["a", "b"]

    @pytest.mark.parametrize("mode", [ServerMode.FEDERATED_LEARNING, ServerMode.CLOUD_TRAINING])
    @pytest.mark.parametrize("rule", OTHER_RULES)
    def test_only_scaffold_has_a_control(self, mode: ServerMode, rule: AggregationType) -> None:
        assert self.names(mode, rule)[1] == ["a", "b", "control.a", "control.b"]

    @pytest.mark.parametrize("rule", list(AggregationType))
    def test_devices_begin_with_everything(self, rule: AggregationType) -> None:
        assert self.names(ServerMode.FEDERATED_LEARNING, rule)[0] == EVERYTHING

    @pytest.mark.parametrize("rule", OTHER_RULES)
    def test_workers_begin_with_their_own(self, rule: AggregationType) -> None:
        assert self.names(ServerMode.CLOUD_TRAINING, rule)[0] == []

    def test_workers_of_scaffold_begin_with_the_control(self) -> None:
        names = ["control.a", "control.b", "control.fixed"]
        assert self.names(ServerMode.CLOUD_TRAINING, AggregationType.SCAFFOLD)[0] == names


class TestUpdateModel:
    @pytest.mark.parametrize(
        ("code", "reason"), [(200, "success not ready"), (300, "later: ü"), (400, ""), (500, "oh")]
    )
    def test_says_what_became_of_it(self, answers: Answers, code: int, reason: str) -> None:
        reply = table(answers.update(code, reason, NRT), ResponseUpdateModel)
        assert reply == ResponseUpdateModel(
            retcode=code, reason=reason, feature_map=None, next_req_time=str(NRT), timestamp=None
        )


class TestGetModel:
    @pytest.mark.parametrize(
        ("asked", "value"),
        [(6, 6), (5, 5), (4, 4), (3, 6), (0, 6), (7, 6), (8, 6), (2**31 - 1, 6), (-1, 6), (-(2**31), 6)],
    )
    def test_the_model_of_that_iteration_or_the_newest(
        self, answers: Answers, asked: int, value: float
    ) -> None:
        for _ in range(2):  # the second time from memory, or not
            reply = table(answers.model(asked, NRT), ResponseGetModel)
            assert weights(reply) == {"a": [value, value], "b": [-value, 0]}
            assert reply.iteration == 7

    def test_every_field(self, answers: Answers) -> None:
        assert bare(table(answers.model(6, NRT), ResponseGetModel)) == ResponseGetModel(
            retcode=200,
            reason="Get model for iteration 6",
            iteration=7,
            timestamp=str(NRT),
            download_compress_type=0,
            compress_feature_map=(),
        )

    @pytest.mark.parametrize(
        ("asked", "printed"), [(-1, "18446744073709551615"), (-(2**31), "18446744071562067968"), (9, "9")]
    )
    def test_negative_numbers_print_as_the_original_prints_them(
        self, answers: Answers, asked: int, printed: str
    ) -> None:
        reply = table(answers.model(asked, NRT), ResponseGetModel)
        assert reply.reason == f"Get model for iteration {printed}"

    def test_answers_that_are_asked_for_often_are_made_once(self, answers: Answers) -> None:
        first = answers.model(6, NRT)
        assert answers.model(6, NRT + 1) is first
        answers.open(8)
        assert table(answers.model(6, NRT + 1), ResponseGetModel).timestamp == str(NRT + 1)

    def test_made_up_numbers_take_no_memory(self, answers: Answers) -> None:
        for asked in range(1000, 1100):
            answers.model(asked, NRT)
        answers.model(5, NRT)
        assert list(answers._model_of) == [(5, False)]

    def test_a_model_that_does_not_exist_yet(self, answers: Answers) -> None:
        assert table(answers.model_not_ready(NRT), ResponseGetModel) == ResponseGetModel(
            retcode=201,
            reason=(
                "The model is not ready yet for iteration 7. Maybe this is because\n"
                "1. Client doesn't not send enough update model request.\n"
                "2. Worker has not push weights to server."
            ),
            iteration=7,
            feature_map=(),
            timestamp=str(NRT),
            download_compress_type=0,
            compress_feature_map=(),
        )

    @pytest.mark.parametrize("code", [400, 500])
    def test_a_request_that_is_none(self, answers: Answers, code: int) -> None:
        reply = table(
            answers.model_refused(code, "The schema of RequestGetModel is invalid."), ResponseGetModel
        )
        assert (reply.reason, reply.iteration, reply.timestamp) == (
            "The schema of RequestGetModel is invalid.",
            7,
            "",
        )
        assert not reply.feature_map
        assert not reply.compress_feature_map


QUANT = [0, 2]  # what old devices say that they take


class Packing:
    """Answers of a server that sends weights in 8 bits, and the thread that makes them so."""

    def __init__(self, history: ModelHistory, **changes: Any) -> None:
        self.reactor, self.history = MemoryReactor(), history
        base = settings()
        compression = replace(base.compression, download_compress_type=DownloadCompressType.QUANT)
        self.packed = PackedModels(self.reactor)
        self.answers = Answers(replace(base, compression=compression, **changes), history, self.packed)
        self.answers.open(7)

    def pack(self, requested: int | None = None) -> None:
        image = self.answers.to_pack(QUANT, requested)
        assert image is not None
        defer.Deferred.fromCoroutine(self.packed.make(image))
        self.reactor.work()
        assert self.answers.to_pack(QUANT, requested) is None


@pytest.fixture
def packing(history: ModelHistory) -> Packing:
    packing = Packing(history)
    for number in (None, 5, 4):
        packing.pack(number)
    return packing


def restored(reply: Any) -> dict[str, list[float]]:
    """The weights as a device restores them, in the order in which they were sent."""
    assert (reply.download_compress_type, reply.feature_map) == (2, ())
    return {item.weight_fullname: quant.restore(item).tolist() for item in reply.compress_feature_map}


class TestDownloadsIn8Bits:
    def test_a_selected_device_gets_every_weight(self, packing: Packing) -> None:
        reply = table(packing.answers.selected(NRT, QUANT), ResponseFLJob)
        assert restored(reply) == {"a": [6, 6], "b": [-6, 0], "fixed": [9]}
        plain = table(packing.answers.selected(NRT), ResponseFLJob)
        assert replace(reply, compress_feature_map=(), download_compress_type=0) == replace(
            plain, feature_map=()
        )

    def test_get_model_carries_every_weight_as_the_original_does(self, packing: Packing) -> None:
        for asked, value in ((6, 6), (5, 5), (4, 4), (99, 6), (-1, 6)):
            reply = table(packing.answers.model(asked, NRT, QUANT), ResponseGetModel)
            assert restored(reply) == {"a": [value, value], "b": [-value, 0], "fixed": [9]}
            assert weights(table(packing.answers.model(asked, NRT), ResponseGetModel)) == {
                "a": [value, value],
                "b": [-value, 0],
            }

    @pytest.mark.parametrize("offered", [None, [], [0], [1], [0, 1, 7]])
    def test_a_device_that_does_not_take_them_gets_floats(self, packing: Packing, offered: Any) -> None:
        start = table(packing.answers.selected(NRT, offered), ResponseFLJob)
        model = table(packing.answers.model(6, NRT, offered), ResponseGetModel)
        for reply in (start, model):
            assert (reply.download_compress_type, reply.compress_feature_map) == (0, ())
        assert packing.answers.to_pack(offered) is None
        assert weights(start)["a"] == weights(model)["a"] == [6, 6]

    def test_the_offer_comes_as_an_array(self, packing: Packing) -> None:
        offered = np.array([2], np.int8)
        assert table(packing.answers.selected(NRT, offered), ResponseFLJob).download_compress_type == 2  # type: ignore[arg-type]

    def test_a_server_that_does_not_send_them_sends_floats(self, answers: Answers) -> None:
        assert answers.to_pack(QUANT) is None
        assert table(answers.selected(NRT, QUANT), ResponseFLJob).download_compress_type == 0
        assert table(answers.model(6, NRT, QUANT), ResponseGetModel).download_compress_type == 0

    def test_each_answer_is_made_once_per_type(self, packing: Packing) -> None:
        answers = packing.answers
        start, model = answers.selected(NRT, QUANT), answers.model(5, NRT, QUANT)
        plain = answers.selected(NRT), answers.model(5, NRT)
        assert answers.selected(NRT + 1, QUANT) is start
        assert answers.model(5, NRT + 1, QUANT) is model
        assert (answers.selected(NRT + 1), answers.model(5, NRT + 1)) == plain
        answers.open(8)
        assert table(answers.selected(NRT + 1, QUANT), ResponseFLJob).next_req_time == str(NRT + 1)

    def test_all_answers_share_the_weights(self, packing: Packing) -> None:
        start, model = packing.answers.selected(NRT, QUANT), packing.answers.model(6, NRT, QUANT)
        assert start.response.parts[-1] is model.response.parts[-1]

    def test_a_model_that_is_not_packed_goes_out_in_full_and_later_packed(
        self, history: ModelHistory
    ) -> None:
        packing = Packing(history)
        assert table(packing.answers.selected(NRT, QUANT), ResponseFLJob).download_compress_type == 0
        assert table(packing.answers.model(5, NRT, QUANT), ResponseGetModel).download_compress_type == 0
        packing.pack()
        packing.pack(5)
        assert table(packing.answers.selected(NRT, QUANT), ResponseFLJob).download_compress_type == 2
        assert table(packing.answers.model(5, NRT, QUANT), ResponseGetModel).download_compress_type == 2

    def test_the_next_model_is_packed_anew(self, packing: Packing) -> None:
        packing.history.add(7, model(7))
        packing.answers.open(8)
        packing.pack()
        reply = table(packing.answers.selected(NRT, QUANT), ResponseFLJob)
        assert restored(reply)["a"] == [7, 7]

    @pytest.mark.parametrize("mode", list(ServerMode))
    def test_scaffolds_control_stays_with_the_workers(self, mode: ServerMode) -> None:
        base = settings()
        rule = replace(base.aggregation, aggregation_type=AggregationType.SCAFFOLD)
        ones = {name: np.ones(weight.size) for name, weight in SCAFFOLD_LAYOUT.by_name.items()}
        history = ModelHistory(6, ImageTemplate(SCAFFOLD_LAYOUT).image(ones))
        packing = Packing(history, server_mode=mode, aggregation=rule)
        packing.pack()
        start = restored(table(packing.answers.selected(NRT, QUANT), ResponseFLJob))
        sent = restored(table(packing.answers.model(6, NRT, QUANT), ResponseGetModel))
        control = ["control.a", "control.b", "control.fixed"]
        if mode is ServerMode.HYBRID_TRAINING:
            assert (list(start), list(sent)) == (EVERYTHING, EVERYTHING)
        else:
            assert list(start) == (control if mode is ServerMode.CLOUD_TRAINING else EVERYTHING)
            assert list(sent) == ["a", "b", "fixed"]

    def test_names_of_a_range_are_names_like_any_other(self) -> None:
        """The original drops such weights."""
        layout = Layout((Weight("w.min_val", ()), Weight("max_val", (2,))))
        ones = {name: np.ones(weight.size) for name, weight in layout.by_name.items()}
        packing = Packing(ModelHistory(6, ImageTemplate(layout).image(ones)))
        packing.pack()
        reply = table(packing.answers.selected(NRT, QUANT), ResponseFLJob)
        assert restored(reply) == {"max_val": [1, 1], "w.min_val": [1]}


class TestUploadType:
    @pytest.mark.parametrize("upload", list(UploadCompressType))
    def test_every_answer_to_start_fl_job_names_it(
        self, history: ModelHistory, upload: UploadCompressType
    ) -> None:
        base = settings()
        chosen = replace(base, compression=replace(base.compression, upload_compress_type=upload))
        answers = answers_of(chosen, history)
        for answer in (answers.selected(NRT), answers.start_refused(300, "later", NRT)):
            reply = table(answer, ResponseFLJob)
            assert reply.upload_compress_type == {"NO_COMPRESS": 0, "DIFF_SPARSE_QUANT": 1}[upload.name]
            assert reply.upload_sparse_rate == 0.25
