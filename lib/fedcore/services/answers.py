"""The tables that answer devices; those that carry the model are built once per iteration and kind."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.aggregation.scaffold import PREFIX as CONTROL
from fedcore.config import AggregationType, EvalType, ServerMode, Settings
from fedcore.models.history import ModelHistory
from fedcore.net.routes import Response
from fedcore.wire import codec
from fedcore.wire.arrays import Weight
from fedcore.wire.messages import (
    CipherPublicParams,
    CompressType,
    DPParams,
    DSParams,
    FLPlan,
    PWParams,
    ResponseCode,
    ResponseFLJob,
    ResponseGetModel,
    ResponseUpdateModel,
    UnsupervisedEvalFlg,
)

_P_BYTES = 32
_PRIME_BYTES = 33


class Shown:
    """Which weights travel in which answer, by server mode and rule.

    ===================  ==============================  ==================================
    mode                 startFLJob                      getModel
    ===================  ==============================  ==================================
    FEDERATED_LEARNING   all                             aggregated, without control.*
    HYBRID_TRAINING      all                             all
    CLOUD_TRAINING       none; control.* with Scaffold   aggregated, without control.*
    ===================  ==============================  ==================================

    Only Scaffold has a control.*; with every other rule such a name is a weight like any other.
    """

    def __init__(self, settings: Settings) -> None:
        self._mode = settings.server_mode
        self._scaffold = settings.aggregation.aggregation_type is AggregationType.SCAFFOLD

    def at_start(self, weight: Weight) -> bool:
        """Tell whether the answer to startFLJob carries a weight."""
        return self._mode is not ServerMode.CLOUD_TRAINING or self._is_control(weight)

    def as_model(self, weight: Weight) -> bool:
        """Tell whether the answer to getModel carries a weight."""
        if self._mode is ServerMode.HYBRID_TRAINING:
            return True
        return weight.aggregated and not self._is_control(weight)

    def _is_control(self, weight: Weight) -> bool:
        return self._scaffold and weight.name.startswith(CONTROL)


def plan_of(settings: Settings) -> FLPlan:
    """Build the training plan; every cipher table is always there, all zero while nothing is encrypted.

    The rule of aggregation is never in it: whoever must know the rule has it in a configuration of its own.
    """
    cipher = CipherPublicParams(
        settings.encrypt.encrypt_type.value,
        PWParams(p=bytes(_P_BYTES), prime=bytes(_PRIME_BYTES)),
        DPParams(),
        DSParams(),
    )
    return FLPlan(
        server_mode=settings.server_mode.value,
        fl_name=settings.fl_name,
        iterations=settings.fl_iteration_num,
        epochs=settings.client.client_epoch_num,
        mini_batch=settings.client.client_batch_size,
        lr=settings.client.client_learning_rate,
        cipher=cipher,
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """A response and the code it carries, for the metrics."""

    code: int
    response: Response


class Answers:
    """Builds the answers of one job.

    The model part of an answer is the model image itself; only the small head in front of it is written anew.
    """

    def __init__(self, settings: Settings, models: ModelHistory) -> None:
        self._plan = plan_of(settings)
        self._shown = Shown(settings)
        self._sparse_rate = settings.compression.upload_sparse_rate
        evaluated = settings.unsupervised.eval_type is not EvalType.NOT_EVAL
        self._evaluation = UnsupervisedEvalFlg.EVAL_ENABLE if evaluated else UnsupervisedEvalFlg.EVAL_DISABLE
        self._models = models
        self._selected: Answer | None = None
        self._model_of: dict[int, Answer] = {}
        self._iteration = 0

    def open(self, iteration: int) -> None:
        """Forget the answers of earlier iterations."""
        self._iteration = iteration
        self._selected = None
        self._model_of.clear()

    # ---- startFLJob

    def selected(self, next_req_time: int) -> Answer:
        """Answer a startFLJob that has its place: the plan and, by mode, of the newest model all or a part."""
        if self._selected is None:
            reply = ResponseFLJob(
                retcode=ResponseCode.SUCCEED,
                reason="success",
                iteration=self._iteration,
                is_selected=True,
                next_req_time=str(next_req_time),
                fl_plan_config=self._plan,
                feature_map=self._models.newest_image.select(self._shown.at_start),  # type: ignore[arg-type]
                upload_compress_type=CompressType.NO_COMPRESS,
                upload_sparse_rate=self._sparse_rate,
                download_compress_type=CompressType.NO_COMPRESS,
                compress_feature_map=(),
                unsupervised_eval_flg=self._evaluation,
            )
            self._selected = _answer(reply.retcode, codec.encode_parts(reply))
        return self._selected

    def start_refused(self, code: int, reason: str, next_req_time: int) -> Answer:
        """Answer a startFLJob that gets no place."""
        reply = ResponseFLJob(
            retcode=code,
            reason=reason,
            iteration=self._iteration,
            next_req_time=str(next_req_time),
            fl_plan_config=self._plan,
            feature_map=(),
            upload_compress_type=CompressType.NO_COMPRESS,
            upload_sparse_rate=self._sparse_rate,
            compress_feature_map=(),
        )
        return _answer(code, codec.encode_parts(reply))

    # ---- updateModel

    @staticmethod
    def update(code: int, reason: str, next_req_time: int) -> Answer:
        """Answer an updateModel."""
        reply = ResponseUpdateModel(retcode=code, reason=reason, next_req_time=str(next_req_time))
        return _answer(code, codec.encode_parts(reply))

    # ---- getModel

    def model(self, requested: int, next_req_time: int) -> Answer:
        """Answer a getModel with the model of an iteration, or with the newest if that one is not kept."""
        answer = self._model_of.get(requested)
        if answer is None:
            image = self._models.get(requested) or self._models.newest_image
            reply = ResponseGetModel(
                retcode=ResponseCode.SUCCEED,
                reason=f"Get model for iteration {_unsigned(requested)}",
                iteration=self._iteration,
                feature_map=image.select(self._shown.as_model),  # type: ignore[arg-type]
                timestamp=str(next_req_time),
                compress_feature_map=(),
            )
            answer = _answer(reply.retcode, codec.encode_parts(reply))
            if self._models.get(requested) is not None:  # not for any number that a client makes up
                self._model_of[requested] = answer
        return answer

    def model_not_ready(self, next_req_time: int) -> Answer:
        """Answer a getModel that comes before its model."""
        reply = ResponseGetModel(
            retcode=ResponseCode.NOT_READY,
            reason=(
                f"The model is not ready yet for iteration {self._iteration}. Maybe this is because\n"
                "1. Client doesn't not send enough update model request.\n"
                "2. Worker has not push weights to server."
            ),
            iteration=self._iteration,
            feature_map=(),
            timestamp=str(next_req_time),
            compress_feature_map=(),
        )
        return _answer(reply.retcode, codec.encode_parts(reply))

    def model_refused(self, code: int, reason: str) -> Answer:
        """Answer a getModel that is none."""
        reply = ResponseGetModel(retcode=code, reason=reason, iteration=self._iteration, timestamp="")
        return _answer(code, codec.encode_parts(reply))


def _answer(code: int, parts: tuple[bytes, ...]) -> Answer:
    return Answer(code, Response(parts))


def _unsigned(number: int) -> int:
    """Return a number as the original prints it: negative ones widened to 64 bits without a sign."""
    return number % (1 << 64)
