"""The tables that answer devices; those that carry the model are built once per iteration and kind."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from fedcore.aggregation.scaffold import PREFIX as CONTROL
from fedcore.config import AggregationType, EncryptType, EvalType, ServerMode, Settings
from fedcore.config.settings import EncryptSettings
from fedcore.models.history import ModelHistory
from fedcore.net.routes import Response
from fedcore.secagg.shamir import PRIME
from fedcore.services.packed_models import PackedModels
from fedcore.wire import codec
from fedcore.wire.arrays import Weight
from fedcore.wire.image import ModelImage, PackedImage
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

Offered = Collection[int] | None  # a request's download_compress_types; None takes weights in full only

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

    Only Scaffold has a control.*; with every other rule such a name is a weight like any other. In 8 bits getModel
    carries those that are not aggregated, too, as the original does.
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

    def as_packed_model(self, weight: Weight) -> bool:
        """Tell whether the answer to getModel carries a weight if it carries them in 8 bits."""
        return self._mode is ServerMode.HYBRID_TRAINING or not self._is_control(weight)

    def _is_control(self, weight: Weight) -> bool:
        return self._scaffold and weight.name.startswith(CONTROL)


def plan_of(settings: Settings) -> FLPlan:
    """Build the training plan; every cipher table is always there, all zero while nothing is encrypted.

    The rule of aggregation is never in it: whoever must know the rule has it in a configuration of its own.
    """
    encrypt = settings.encrypt
    plain = encrypt.encrypt_type is EncryptType.NOT_ENCRYPT
    noise, signs = encrypt.dp_encrypt, encrypt.signds
    cipher = CipherPublicParams(
        encrypt.encrypt_type.value,
        _masking(encrypt),
        DPParams() if plain else DPParams(noise.dp_eps, noise.dp_delta, noise.dp_norm_clip),
        DSParams()
        if plain
        else DSParams(
            signs.sign_k, signs.sign_eps, signs.sign_thr_ratio, signs.sign_global_lr, signs.sign_dim_out
        ),
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


def _masking(encrypt: EncryptSettings) -> PWParams:
    """Build the parameters of masks; numbers with every protection, a prime only where secrets are shared."""
    zero, no_prime = bytes(_P_BYTES), bytes(_PRIME_BYTES)
    match encrypt.encrypt_type:
        case EncryptType.NOT_ENCRYPT:
            return PWParams(p=zero, prime=no_prime)
        case EncryptType.PW_ENCRYPT:
            prime = PRIME.to_bytes(_PRIME_BYTES, "big")
        case _:
            prime = no_prime
    return PWParams(t=encrypt.pw_encrypt.reconstruct_secrets_threshold, p=zero, g=1, prime=prime)


@dataclass(frozen=True, slots=True)
class Answer:
    """A response and the code it carries, for the metrics."""

    code: int
    response: Response


class Answers:
    """Builds the answers of one job.

    The model part of an answer is the model image itself; only the small head in front of it is written anew.
    """

    def __init__(self, settings: Settings, models: ModelHistory, packed: PackedModels) -> None:
        self._plan = plan_of(settings)
        self._shown = Shown(settings)
        self._sparse_rate = settings.compression.upload_sparse_rate
        evaluated = settings.unsupervised.eval_type is not EvalType.NOT_EVAL
        self._evaluation = UnsupervisedEvalFlg.EVAL_ENABLE if evaluated else UnsupervisedEvalFlg.EVAL_DISABLE
        self._upload_type = CompressType[settings.compression.upload_compress_type.name]
        self._download_type = CompressType[settings.compression.download_compress_type.name]
        self._models = models
        self._packed = packed
        self._selected: dict[bool, Answer] = {}  # by whether its weights are packed
        self._model_of: dict[tuple[int, bool], Answer] = {}  # by iteration, and that
        self._iteration = 0

    def open(self, iteration: int) -> None:
        """Forget the answers of earlier iterations."""
        self._iteration = iteration
        self._selected.clear()
        self._model_of.clear()

    # ---- weights in 8 bits

    def to_pack(self, offered: Offered, requested: int | None = None) -> ModelImage | None:
        """Return the model that is to be packed before a device can have it as it is to have it, None if none is.

        Args:
            offered: the types that the device takes.
            requested: the iteration whose model it asks for, None for the newest.
        """
        image = self._image(requested)
        return image if self._are_packed(offered) and self._packed.is_due(image) else None

    def _are_packed(self, offered: Offered) -> bool:
        wanted = self._download_type
        return wanted is not CompressType.NO_COMPRESS and offered is not None and wanted in offered

    def _packed_of(self, image: ModelImage, offered: Offered) -> PackedImage | None:
        """Return what a device gets instead of a model that it can have in full."""
        return self._packed.get(image) if self._are_packed(offered) else None

    def _image(self, requested: int | None) -> ModelImage:
        kept = None if requested is None else self._models.get(requested)
        return kept or self._models.newest_image

    # ---- startFLJob

    def selected(self, next_req_time: int, offered: Offered = None) -> Answer:
        """Answer a startFLJob that has its place: the plan and, by mode, of the newest model all or a part."""
        image = self._models.newest_image
        packed = self._packed_of(image, offered)
        answer = self._selected.get(packed is not None)
        if answer is None:
            reply = ResponseFLJob(
                retcode=ResponseCode.SUCCEED,
                reason="success",
                iteration=self._iteration,
                is_selected=True,
                next_req_time=str(next_req_time),
                fl_plan_config=self._plan,
                upload_compress_type=self._upload_type,
                upload_sparse_rate=self._sparse_rate,
                unsupervised_eval_flg=self._evaluation,
                **_weights(image, packed, self._shown.at_start, self._shown.at_start),
            )
            answer = self._selected[packed is not None] = _answer(reply.retcode, codec.encode_parts(reply))
        return answer

    def start_refused(self, code: int, reason: str, next_req_time: int) -> Answer:
        """Answer a startFLJob that gets no place."""
        reply = ResponseFLJob(
            retcode=code,
            reason=reason,
            iteration=self._iteration,
            next_req_time=str(next_req_time),
            fl_plan_config=self._plan,
            feature_map=(),
            upload_compress_type=self._upload_type,
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

    def model(self, requested: int, next_req_time: int, offered: Offered = None) -> Answer:
        """Answer a getModel with the model of an iteration, or with the newest if that one is not kept."""
        image = self._image(requested)
        packed = self._packed_of(image, offered)
        answer = self._model_of.get((requested, packed is not None))
        if answer is None:
            reply = ResponseGetModel(
                retcode=ResponseCode.SUCCEED,
                reason=f"Get model for iteration {_unsigned(requested)}",
                iteration=self._iteration,
                timestamp=str(next_req_time),
                **_weights(image, packed, self._shown.as_model, self._shown.as_packed_model),
            )
            answer = _answer(reply.retcode, codec.encode_parts(reply))
            if self._models.get(requested) is not None:  # not for any number that a client makes up
                self._model_of[requested, packed is not None] = answer
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


def _weights(
    image: ModelImage,
    packed: PackedImage | None,
    shown: Callable[[Weight], bool],
    shown_packed: Callable[[Weight], bool],
) -> dict[str, Any]:
    """Return the fields of an answer that carry weights: packed, if there is such a model. Either vector is there."""
    if packed is None:
        return {"feature_map": image.select(shown), "compress_feature_map": ()}
    return {
        "feature_map": (),
        "download_compress_type": CompressType.QUANT,
        "compress_feature_map": packed.select(shown_packed),
    }


def _answer(code: int, parts: tuple[bytes, ...]) -> Answer:
    return Answer(code, Response(parts))


def _unsigned(number: int) -> int:
    """Return a number as the original prints it: negative ones widened to 64 bits without a sign."""
    return number % (1 << 64)
