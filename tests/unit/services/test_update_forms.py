"""In which form updates come and how they are read, with a thread that works when the test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from twisted.internet import defer, task
from twisted.python.failure import Failure

from fedcore.compression import mask, sparse
from fedcore.config import EncryptType, Settings, UploadCompressType
from fedcore.errors import ArrayError, MalformedRequest, ShapeMismatch
from fedcore.ledger.decoding import Decoder, Reading
from fedcore.ledger.layout import Damaged
from fedcore.models.history import ModelHistory
from fedcore.services.update_forms import PlainForms, UpdateForms
from fedcore.wire import codec
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.image import ImageTemplate, ModelImage
from fedcore.wire.messages import FeatureMap, RequestUpdateModel

LAYOUT = Layout((Weight("w", (20,)), Weight("v", (5,))))
TEMPLATE = ImageTemplate(LAYOUT)
RATE = float(np.float32(0.4))


def image_of(value: float) -> ModelImage:
    return TEMPLATE.image({"w": np.full(20, value), "v": np.full(5, -value)})


class Reactor(task.Clock):
    """A thread that works when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: deque[Callable[[], None]] = deque()

    def getThreadPool(self) -> Reactor:
        return self

    def callFromThread(self, function: Callable[..., Any], *arguments: Any) -> None:
        function(*arguments)

    def callInThreadWithCallback(self, done: Callable[[bool, Any], None], work: Callable[[], Any]) -> None:
        def job() -> None:
            try:
                result = work()
            except Exception:
                done(False, Failure())
            else:
                done(True, result)

        self.jobs.append(job)

    def work(self) -> int:
        done = len(self.jobs)
        while self.jobs:
            self.jobs.popleft()()
        return done


def terms(
    protection: EncryptType = EncryptType.NOT_ENCRYPT, compressed: bool = True, unsigned: bool = True
) -> Settings:
    base = Settings()
    kind = UploadCompressType.DIFF_SPARSE_QUANT if compressed else UploadCompressType.NO_COMPRESS
    update = replace(base.fedcore.update, unsigned_signds=unsigned)
    return replace(
        base,
        encrypt=replace(base.encrypt, encrypt_type=protection),
        compression=replace(base.compression, upload_compress_type=kind, upload_sparse_rate=RATE),
        fedcore=replace(base.fedcore, update=update),
    )


class World:
    def __init__(self, settings: Settings) -> None:
        self.reactor = Reactor()
        self.image = image_of(1.0)
        self.models = ModelHistory(0, self.image)
        self.forms = UpdateForms(settings, LAYOUT, self.models, self.reactor)

    def reading(
        self, request: RequestUpdateModel, image: ModelImage | None = None
    ) -> defer.Deferred[Reading]:
        layers = self.forms.layers(request)
        work: Coroutine[Any, Any, Reading] = self.forms.reading(request, layers, image or self.image)
        return defer.Deferred.fromCoroutine(work)


def result_of(done: defer.Deferred[Any]) -> Any:
    assert done.called, "still under way"
    outcome: list[Any] = []
    done.addBoth(outcome.append)
    if isinstance(outcome[0], Failure):
        outcome[0].raiseException()
    return outcome[0]


def sparse_request(
    iteration: int = 1, names: tuple[str, ...] = ("w", "v"), size: int = 2
) -> RequestUpdateModel:
    """An update that moves every weight by one."""
    layers = [(name, LAYOUT.by_name[name].size) for name in names]
    pattern = sparse.pattern(layers, mask.draw(iteration, RATE, sum(n for _, n in layers)))
    arrays = image_of(1.0).arrays
    trained = {name: (arrays[name] + 1) * np.float32(size) for name in names}
    return RequestUpdateModel(
        fl_name="job",
        fl_id="a",
        iteration=iteration,
        timestamp="1",
        compress_feature_map=sparse.compress(pattern, trained, dict(arrays), size),
        upload_compress_type=1,
        upload_sparse_rate=RATE,
        name_vec=names,
        upload_loss=0.5,
    )


def sign_request(sign: int = 1) -> RequestUpdateModel:
    features = tuple(FeatureMap(name, np.empty(0, np.float32)) for name in ("w", "v"))
    indices = np.int32([0, 24])
    return RequestUpdateModel("job", "a", 1, features, "1", sign=sign, index_array=indices)


def body_of(request: RequestUpdateModel) -> memoryview:
    return memoryview(codec.encode(request))


class TestTerms:
    @pytest.mark.parametrize(
        ("settings", "plain", "compressed", "signed"),
        [
            (terms(compressed=False), Decoder.PLAIN, Decoder.PLAIN, Decoder.PLAIN),
            (terms(), Decoder.PLAIN, Decoder.SPARSE, Decoder.PLAIN),
            (terms(EncryptType.DP_ENCRYPT), Decoder.PLAIN, Decoder.SPARSE, Decoder.PLAIN),
            (terms(EncryptType.SIGNDS, False), Decoder.PLAIN, Decoder.PLAIN, Decoder.SIGN),
        ],
    )
    def test_say_in_which_form_an_update_comes(
        self, settings: Settings, plain: Decoder, compressed: Decoder, signed: Decoder
    ) -> None:
        forms = World(settings).forms
        found = [forms.decoder_of(r) for r in (RequestUpdateModel(), sparse_request(), sign_request())]
        assert found == [plain, compressed, signed]

    def test_are_followed(self) -> None:
        forms = World(terms(compressed=False)).forms
        assert not forms.compressed
        forms.follow_terms(terms())
        assert forms.compressed
        assert forms.decoder_of(sparse_request()) is Decoder.SPARSE

    def test_may_ask_for_signs(self) -> None:
        World(terms(EncryptType.SIGNDS, False)).forms.check_unsigned()
        World(terms(unsigned=False)).forms.check_unsigned()  # nobody signs in such a job
        with pytest.raises(ShapeMismatch, match="only signed ones"):
            World(terms(EncryptType.SIGNDS, False, unsigned=False)).forms.check_unsigned()

    @pytest.mark.parametrize("kind", EncryptType)
    def test_with_masks_an_update_must_hold_every_weight(self, kind: EncryptType) -> None:
        masked = kind in (EncryptType.PW_ENCRYPT, EncryptType.STABLE_PW_ENCRYPT)
        assert World(terms(kind, False)).forms.whole is masked


class TestArriving:
    def test_a_mask_is_drawn_once_and_in_a_thread(self) -> None:
        world, request = World(terms()), sparse_request()
        with patch.object(mask, "draw", wraps=mask.draw) as draw:
            readings = [world.reading(request) for _ in range(3)]
            assert (draw.call_count, [each.called for each in readings]) == (0, [False] * 3)
            assert world.reactor.work() == 3
            readings.append(world.reading(request))  # answered at once
            assert draw.call_count == 1
        for reading in map(result_of, readings):
            values = reading.weights(2)["w"]
            marks = mask.draw(1, RATE, 25)[:20]
            assert values[0:20] == pytest.approx(np.where(marks, 4.0, 2.0))

    def test_another_order_of_the_weights_needs_no_other_mask(self) -> None:
        world = World(terms())
        requests = [sparse_request(names=names) for names in (("w", "v"), ("v", "w"))]
        with patch.object(mask, "draw", wraps=mask.draw) as draw:
            for request in requests:
                reading = world.reading(request)
                world.reactor.work()
                assert result_of(reading).decoder is Decoder.SPARSE
            assert draw.call_count == 1

    def test_only_a_few_patterns_are_kept(self) -> None:
        world = World(terms())
        for iteration in range(1, 9):
            world.reading(sparse_request(iteration))
            world.reactor.work()
        reading = world.reading(sparse_request(8))
        assert reading.called
        world.reading(sparse_request(1))
        assert world.reactor.work() == 1

    def test_what_is_no_update_is_refused_before_a_mask_is_drawn(self) -> None:
        world = World(terms())
        with pytest.raises(ShapeMismatch, match="sparse rate"):
            world.reading(replace(sparse_request(), upload_sparse_rate=0.5))
        assert world.reactor.work() == 0

    def test_entries_that_contradict_the_mask_are_refused(self) -> None:
        world = World(terms())
        chosen = [int(mask.draw(iteration, RATE, 25)[:20].sum()) for iteration in range(1, 9)]
        other = next(i for i, each in enumerate(chosen, 1) if each != chosen[0])
        reading = world.reading(replace(sparse_request(), iteration=other))
        world.reactor.work()
        with pytest.raises(ArrayError):
            result_of(reading)

    def test_a_signed_update_moves_by_the_step_of_the_terms(self) -> None:
        settings = terms(EncryptType.SIGNDS, False)
        signs = replace(settings.encrypt.signds, sign_global_lr=0.25)
        world = World(replace(settings, encrypt=replace(settings.encrypt, signds=signs)))
        reading = world.reading(sign_request(-1))
        world.reactor.work()
        weights = result_of(reading).weights(2)
        assert weights["w"][0:20].tolist() == [1.5] + 19 * [2.0]
        assert weights["v"][0:5].tolist() == 4 * [-2.0] + [-2.5]


class TestRecovered:
    def test_nothing_is_read_without_the_model(self) -> None:
        world = World(terms())
        assert world.forms.reader("00" * 32) is None
        world.models.add(1, image_of(2.0))
        assert world.forms.reader(image_of(2.0).digest) is not None

    @pytest.mark.parametrize("request_", [sparse_request(), sign_request()])
    def test_gives_the_same_bytes_as_on_arrival(self, request_: RequestUpdateModel) -> None:
        protection = EncryptType.SIGNDS if request_.sign else EncryptType.NOT_ENCRYPT
        world = World(terms(protection, not request_.sign))
        arrived = world.reading(request_)
        world.reactor.work()
        reading = result_of(arrived)
        restarted = World(terms(protection, not request_.sign))  # has drawn nothing yet
        read = restarted.forms.reader(reading.base)
        assert read is not None
        update = read(body_of(request_), 2, 3, reading.decoder)
        assert (update.fl_id, update.data_size, update.eval_data_size) == ("a", 2, 3)
        assert update.loss == request_.upload_loss
        for name, values in reading.weights(2).items():
            assert update.weights[name][0 : values.size].tobytes() == values[0 : values.size].tobytes()

    def test_the_record_tells_the_form_and_not_the_terms(self) -> None:
        """A signed update in a slot that says PLAIN came to a job without signs."""
        world = World(terms(EncryptType.SIGNDS, False))
        read = world.forms.reader(world.image.digest)
        assert read is not None
        weights = read(body_of(sign_request()), 2, 0, Decoder.PLAIN).weights
        assert {name: values.size for name, values in weights.items()} == {"w": 0, "v": 0}

    @pytest.mark.parametrize(
        ("body", "decoder", "error"),
        [
            (body_of(sparse_request()), 3, Damaged),
            (body_of(sign_request()), Decoder.SPARSE, ShapeMismatch),
            (body_of(sparse_request()), Decoder.SIGN, ShapeMismatch),
            (memoryview(b"nothing"), Decoder.PLAIN, MalformedRequest),
        ],
    )
    def test_what_is_not_as_recorded_is_named(
        self, body: memoryview, decoder: int, error: type[Exception]
    ) -> None:
        world = World(terms())
        read = world.forms.reader(world.image.digest)
        assert read is not None
        with pytest.raises(error):
            read(body, 2, 0, decoder)

    def test_where_only_plain_ones_are_expected(self) -> None:
        read = PlainForms().reader("")
        assert read is not None
        request = RequestUpdateModel("job", "a", 1, (FeatureMap("w", np.float32([1, 2])),), "1")
        values = read(body_of(request), 2, 0, Decoder.PLAIN).weights["w"]
        assert values[0:2].tolist() == [1.0, 2.0]
        with pytest.raises(Damaged, match="decoder 1"):
            read(body_of(request), 2, 0, Decoder.SPARSE)
