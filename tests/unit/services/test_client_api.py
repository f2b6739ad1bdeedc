"""What an update is once it has been judged, and what is counted of it; with the real intake and a ledger in memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from twisted.internet import defer
from unit.ledger.tracing import Tracing
from unit.services.test_update_intake import ACCEPTED, META, Ledgers, Reactor, SharedState

from fedcore.compression import mask, sparse
from fedcore.config import NormAction, Settings, UploadCompressType
from fedcore.core.iteration import Policy
from fedcore.core.job import RunningState
from fedcore.ledger.layout import Epoch, Shape
from fedcore.ledger.ledger import Ledger
from fedcore.models.history import ModelHistory
from fedcore.observe.metrics import ServerMetrics
from fedcore.services.client_api import ClientApi
from fedcore.services.evaluation import longest_vector, vector_of
from fedcore.services.terms import policy_of
from fedcore.services.update_intake import UpdateIntake
from fedcore.wire import codec
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.image import ImageTemplate
from fedcore.wire.messages import (
    CompressType,
    RequestUpdateModel,
    ResponseUpdateModel,
    UnsupervisedEvalItem,
    UnsupervisedEvalItems,
)

LAYOUT = Layout((Weight("a", (30,)), Weight("b", (10,))))
SIZE, NUMBER, KEPT, BOUND = 40, 5, 10, 1.0
RATE = float(np.float32(0.4))
IMAGE = ImageTemplate(LAYOUT).image(
    {weight.name: np.linspace(-1, 1, weight.size, dtype=np.float32) for weight in LAYOUT}
)
VECTOR = np.linspace(-3.5, 17.0, 100, dtype=np.float32)


class State(SharedState):
    """The shared state of one client's place, which counts what it is asked to."""

    async def client_meta(self, number: int, fl_id: str) -> Any:
        return META

    async def accept_upload(self, *arguments: Any, **options: Any) -> Any:
        asked = defer.ensureDeferred(super().accept_upload(*arguments, **options))
        self.questions[-1].answer(ACCEPTED)
        return await asked


@dataclass
class Driver:
    """An iteration that collects updates."""

    cluster: State
    models: ModelHistory
    policy: Policy
    joined = True
    letting_go = False
    filled = typical = None
    iteration: Any = field(
        default_factory=lambda: SimpleNamespace(
            number=NUMBER, attempt=1, running=RunningState.RUNNING, changing=False, uploaded=0
        )
    )
    on_terms: list[Any] = field(default_factory=list)
    counted: list[Any] = field(default_factory=list)

    def upload_counted(self, *what: Any) -> None:
        self.counted.append(what)


def api_of(directory: Path, state: State, reactor: Reactor) -> ClientApi:
    """Return what answers devices in a job that compresses updates, clips them and collects their vectors."""
    base = Settings()
    settings = replace(
        base,
        compression=replace(
            base.compression,
            upload_compress_type=UploadCompressType.DIFF_SPARSE_QUANT,
            upload_sparse_rate=RATE,
        ),
        fedcore=replace(
            base.fedcore,
            update=replace(base.fedcore.update, norm_bound=BOUND, norm_action=NormAction.CLIP),
        ),
    )
    shape = Shape.of(LAYOUT, "job", clients=8, slots=2, slot_size=4096)
    ledgers: Any = Ledgers(Ledger.create(Tracing(shape.size), LAYOUT, shape), durable=False)
    intake = UpdateIntake(ledgers, directory / "spool", "node-1", SIZE, 8.0, reactor, KEPT)
    intake.begin(Epoch("instance", NUMBER, IMAGE.digest))
    driver: Any = Driver(state, ModelHistory(NUMBER - 1, IMAGE), policy_of(settings))
    metrics = ServerMetrics()
    return ClientApi(settings, LAYOUT, driver, intake, metrics, reactor, lambda: 1000, lambda: 0.5)


def far() -> RequestUpdateModel:
    """Return a compressed update far beyond the bound, with a vector."""
    pattern = sparse.pattern([(weight.name, weight.size) for weight in LAYOUT], mask.draw(NUMBER, RATE, SIZE))
    size = META.data_size
    trained = {name: (values + np.float32(3)) * np.float32(size) for name, values in IMAGE.arrays.items()}
    return RequestUpdateModel(
        fl_name="job",
        fl_id="a",
        iteration=NUMBER,
        timestamp="1",
        compress_feature_map=sparse.compress(pattern, trained, dict(IMAGE.arrays), size),
        upload_compress_type=CompressType.DIFF_SPARSE_QUANT,
        upload_sparse_rate=RATE,
        name_vec=pattern.names,
        unsupervised_eval_items=UnsupervisedEvalItems((UnsupervisedEvalItem("", VECTOR),)),
    )


def laid_out_otherwise(body: bytes) -> bytes:
    """Return the same table, further back: other builders lay it out in their own way."""
    root = int.from_bytes(body[:4], "little")
    return (root + 16).to_bytes(4, "little") + bytes(16) + body[4:]


def answer_of(api: ClientApi, body: bytes, reactor: Reactor) -> Any:
    room = api.intake.receive(len(body))
    room.buffer[: len(body)] = body
    room.length = len(body)
    answers: list[Any] = []
    defer.ensureDeferred(api.update_model(room)).addBoth(answers.append)
    while not answers and reactor.jobs:
        reactor.work()
    (answer,) = answers
    return codec.decode(ResponseUpdateModel, b"".join(answer.response.parts)), room


def test_a_clipped_update_brings_the_vector_that_was_sent(tmp_path: Path) -> None:
    """Clipping writes the body anew in its slot, over what the values of the first reading lie in."""
    state, reactor = State(), Reactor()
    api = api_of(tmp_path, state, reactor)
    reply, slot = answer_of(api, laid_out_otherwise(codec.encode(far())), reactor)
    assert (reply.retcode, reply.reason) == (200, "success not ready")
    (question,) = state.questions
    sent = UnsupervisedEvalItems((UnsupervisedEvalItem("", VECTOR),))
    assert question.vector == vector_of(sent, longest_vector(KEPT)) != b""
    kept = codec.decode(RequestUpdateModel, slot.body)
    assert kept.unsupervised_eval_items.eval_items[0].eval_data.tolist() == VECTOR.tolist()
    highest = max(item.max_val for item in kept.compress_feature_map)
    assert 0 < highest < max(item.max_val for item in far().compress_feature_map) / 2, "it was clipped"
