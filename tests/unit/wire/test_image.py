"""A model image: one copy of the weights behind any head, read alike by every reader."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.wire import reference
from unit.wire.samples import arrays_in, full, plain

from fedcore.errors import ShapeMismatch
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.codec import decode, encode, encode_parts
from fedcore.wire.image import ImageTemplate, ModelImage, PackedImage
from fedcore.wire.messages import (
    CompressFeatureMap,
    FeatureMap,
    FLPlan,
    ResponseFLJob,
    ResponseGetModel,
    ResponsePullWeight,
)

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
models = st.dictionaries(st.text(max_size=8), shapes, max_size=6)


def counted(layout: Layout) -> dict[str, Any]:
    """Return arrays of the layout's shapes in which no two values are alike."""
    values = np.arange(layout.total_floats, dtype=np.float32) + 0.5
    ends = np.cumsum([weight.size for weight in layout])
    parts = np.split(values, ends[:-1]) if len(layout) else []
    return {weight.name: part.reshape(weight.shape) for weight, part in zip(layout, parts, strict=True)}


def image_of(model: dict[str, tuple[int, ...]]) -> ModelImage:
    layout = Layout(tuple(Weight(name, shape) for name, shape in model.items()))
    return ImageTemplate(layout).image(counted(layout))


def check(image: ModelImage, names: set[str], reason: str | None, plan: FLPlan | None) -> None:
    """Encode some weights behind a head; compare what our reader and another one make of it."""
    selection = image.select(lambda weight: weight.name in names)
    reply = ResponseFLJob(200, reason, 7, True, "1", plan, selection, "2", 1, 0.5, 2)  # type: ignore[arg-type]
    buffer = encode(reply)
    expected = ResponseFLJob(
        200,
        reason,
        7,
        True,
        "1",
        plan,
        tuple(FeatureMap(w.name, image.arrays[w.name]) for w in image.layout if w.name in names),
        "2",
        1,
        0.5,
        2,
    )
    assert plain(decode(ResponseFLJob, buffer)) == plain(expected)
    assert plain(reference.read(ResponseFLJob, buffer)) == plain(expected)  # asserts the alignment too
    assert buffer.endswith(image.tail)
    assert all(place_of(array, buffer) % 4 == 0 for array in arrays_in(decode(ResponseFLJob, buffer)))


def place_of(array: np.ndarray[Any, Any], buffer: bytes) -> int:
    """Return the position in the buffer at which a view begins."""
    views = array, np.frombuffer(buffer, np.uint8)
    start, zero = (int(view.__array_interface__["data"][0]) for view in views)
    return start - zero


# ---- any weights behind any head


@given(models, st.data(), st.none() | st.text(max_size=9), st.booleans())
def test_any_subset_of_any_model(
    model: dict[str, tuple[int, ...]], data: st.DataObject, reason: str | None, planned: bool
) -> None:
    names = data.draw(st.sets(st.sampled_from(sorted(model)))) if model else set()
    check(image_of(model), names, reason, full(FLPlan) if planned else None)


@pytest.mark.parametrize("length", range(20))
def test_heads_of_any_length(length: int) -> None:
    check(image_of({"w": (2, 3), "b": ()}), {"w", "b"}, "x" * length, None)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"scalar": ()},
        {"empty": (0,)},
        {"empty": (3, 0, 2), "scalar": (), "more": (2, 2)},
        {"": (1,), "é": (2,), "😀.weight": (3,), "a\0b": (4,)},
        {"x" * length: (1,) for length in range(12)},
    ],
    ids=lambda model: f"{len(model)} weights",
)
def test_models_of_any_kind(model: dict[str, tuple[int, ...]]) -> None:
    check(image_of(model), set(model), "fine", None)


def test_weights_come_in_bytewise_order() -> None:
    image = image_of({"é": (1,), "a.b": (1,), "B": (1,), "a": (1,)})
    reply = decode(ResponseGetModel, encode(ResponseGetModel(feature_map=image.select())))  # type: ignore[arg-type]
    assert [weight.weight_fullname for weight in reply.feature_map or ()] == ["B", "a", "a.b", "é"]


def test_a_selection_sees_the_whole_weight() -> None:
    layout = Layout((Weight("a", (2,)), Weight("b", (3,), aggregated=False)))
    image = ImageTemplate(layout).image(counted(layout))
    shown = image.select(lambda weight: weight.aggregated)
    reply = decode(ResponseGetModel, encode(ResponseGetModel(feature_map=shown)))  # type: ignore[arg-type]
    assert plain(reply.feature_map) == plain((FeatureMap("a", np.array([0.5, 1.5], np.float32)),))


@pytest.mark.parametrize("reply", [ResponseFLJob, ResponseGetModel, ResponsePullWeight])
def test_every_reply_with_weights_takes_an_image(reply: Any) -> None:
    image = image_of({"w": (5,)})
    buffer = encode(reply(retcode=200, feature_map=image.select()))
    assert plain(decode(reply, buffer).feature_map) == plain((FeatureMap("w", image.arrays["w"]),))


# ---- one copy


def test_each_weight_of_an_answer_costs_one_offset() -> None:
    image = image_of({f"w{number:03}": (1000,) for number in range(100)})
    sizes = [
        len(encode(ResponseGetModel(feature_map=image.select(lambda w: w.name < f"w{n:03}"))))  # type: ignore[arg-type] # noqa: B023
        for n in range(101)
    ]
    assert [size - sizes[0] for size in sizes] == [4 * n for n in range(101)]
    assert sizes[0] - len(image.tail) < 50


def test_answers_in_pieces_hold_the_tail_itself() -> None:
    image = image_of({"w": (2, 3), "b": ()})
    reply = ResponseGetModel(200, "fine", 3, image.select())  # type: ignore[arg-type]
    head, tail = encode_parts(reply)
    assert tail is image.tail
    assert head + tail == encode(reply)


def test_answers_without_an_image_are_one_piece() -> None:
    assert encode_parts(ResponseGetModel(200)) == (encode(ResponseGetModel(200)),)


def test_arrays_are_read_only_views_into_the_tail() -> None:
    image = image_of({"w": (2, 3), "b": (), "e": (0,)})
    tail = np.frombuffer(image.tail, np.uint8)
    for array in [*image.arrays.values(), *image.shaped().values()]:
        assert not array.size or np.shares_memory(array, tail)
        assert not array.flags.writeable
        assert not array.flags.owndata
        assert array.flags.aligned


def test_the_tail_holds_the_weights_in_order() -> None:
    image = image_of(dict.fromkeys("dbace", (3,)))
    places = [place_of(image.arrays[weight.name], image.tail) for weight in image.layout]
    assert places == sorted(places)
    assert [image.tables[weight.name] for weight in image.layout] == sorted(image.tables.values())


def test_one_answer_may_hold_two_images() -> None:
    first, second = image_of({"a": (2,), "b": ()}), image_of({"c": (1,)})
    buffer = encode(ResponseGetModel(feature_map=first.select(), compress_feature_map=second.select()))  # type: ignore[arg-type]
    reply = decode(ResponseGetModel, buffer)
    assert [weight.weight_fullname for weight in reply.feature_map or ()] == ["a", "b"]
    assert [weight.weight_fullname for weight in reply.compress_feature_map or ()] == ["c"]


def test_shapes_return() -> None:
    image = image_of({"w": (2, 3), "b": (), "e": (0, 4)})
    expected = counted(image.layout)
    for name, array in image.shaped().items():
        assert array.shape == expected[name].shape
        assert np.array_equal(array, expected[name])
    assert {name: array.ndim for name, array in image.arrays.items()} == {"w": 1, "b": 1, "e": 1}


def test_a_decoded_answer_shares_the_buffer() -> None:
    image = image_of({"w": (2, 3), "b": ()})
    buffer = encode(ResponseGetModel(feature_map=image.select()))  # type: ignore[arg-type]
    for array in arrays_in(decode(ResponseGetModel, buffer)):
        assert np.shares_memory(array, np.frombuffer(buffer, np.uint8))


# ---- templates


def test_images_of_one_template_are_independent() -> None:
    layout = Layout((Weight("a", (3,)), Weight("b", ())))
    template = ImageTemplate(layout)
    first = template.image(counted(layout))
    second = template.image({name: array * 2 for name, array in counted(layout).items()})
    assert plain(first.arrays["a"]) == plain(np.array([0.5, 1.5, 2.5], np.float32))
    assert plain(second.arrays["a"]) == plain(np.array([1, 3, 5], np.float32))
    assert plain(second.arrays["b"]) == plain(np.array([7], np.float32))


def test_an_image_does_not_follow_its_source() -> None:
    layout = Layout((Weight("a", (3,)),))
    source = np.zeros(3, np.float32)
    image = ImageTemplate(layout).image({"a": source})
    source[:] = 1
    assert not image.arrays["a"].any()


def test_any_float_type_and_order_is_converted() -> None:
    layout = Layout((Weight("a", (2, 3)),))
    source = np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3))
    image = ImageTemplate(layout).image({"a": source, "not in the layout": np.zeros(9)})
    assert plain(image.arrays["a"]) == plain(np.arange(6, dtype=np.float32))


@pytest.mark.parametrize(
    "arrays", [{}, {"a": np.zeros(2)}, {"a": np.zeros(4)}, {"a": np.zeros(1)}, {"b": np.zeros(3)}]
)
def test_arrays_that_do_not_fit_are_refused(arrays: dict[str, Any]) -> None:
    with pytest.raises(ShapeMismatch, match="'a'"):
        ImageTemplate(Layout((Weight("a", (3,)),))).image(arrays)


# ---- digests


def test_equal_models_have_equal_digests() -> None:
    layout = Layout((Weight("a", (3,)), Weight("b", ())))
    arrays = counted(layout)
    first = ImageTemplate(layout).image(arrays)
    again = ImageTemplate(layout).image(dict(reversed(arrays.items())))
    assert first.digest == again.digest
    assert len(first.digest) == 64


def test_different_models_have_different_digests() -> None:
    layout = Layout((Weight("a", (3,)),))
    template = ImageTemplate(layout)
    images = [template.image({"a": np.eye(3)[row]}) for row in range(3)]
    renamed = ImageTemplate(Layout((Weight("b", (3,)),))).image({"b": np.eye(3)[0]})
    assert len({image.digest for image in [*images, renamed]}) == 4


# ---- from another server

SMALL: dict[str, tuple[int, ...]] = {"a": (2, 3), "ü": (), "b": (5,)}


class TestRestore:
    def template(self, model: dict[str, tuple[int, ...]] | None = None) -> ImageTemplate:
        model = model or SMALL
        return ImageTemplate(Layout(tuple(Weight(name, shape) for name, shape in model.items())))

    @given(models)
    def test_the_tail_of_an_image_is_that_image(self, model: dict[str, tuple[int, ...]]) -> None:
        image, template = image_of(model), self.template(model) if model else ImageTemplate(Layout(()))
        assert len(image.tail) == template.size
        for tail in (image.tail, bytearray(image.tail)):
            again = template.restore(tail, image.digest)
            assert (again.tail, again.digest) == (image.tail, image.digest)
            assert {n: v.tolist() for n, v in again.arrays.items()} == {
                n: v.tolist() for n, v in image.arrays.items()
            }

    def test_it_does_not_change_with_what_it_was_read_into(self) -> None:
        image = image_of(SMALL)
        received = bytearray(image.tail)
        again = self.template().restore(received, image.digest)
        received[:] = bytes(len(received))
        assert again.tail == image.tail
        assert not any(values.flags.writeable for values in again.arrays.values())

    def test_a_changed_float_is_noticed(self) -> None:
        image, template = image_of(SMALL), self.template()
        for values in image.arrays.values():
            changed = bytearray(image.tail)
            changed[place_of(values, image.tail)] ^= 1
            with pytest.raises(ShapeMismatch, match="not what its digest says"):
                template.restore(changed, image.digest)

    def test_a_changed_frame_is_never_served(self) -> None:
        """Around the floats stands what this server itself would write."""
        image, template = image_of(SMALL), self.template()
        floats = {
            place_of(values, image.tail) + i for values in image.arrays.values() for i in range(values.nbytes)
        }
        for place in set(range(len(image.tail))) - floats:
            changed = bytearray(image.tail)
            changed[place] ^= 255
            assert template.restore(changed, image.digest).tail == image.tail

    @pytest.mark.parametrize("by", [-4, -1, 1, 4])
    def test_another_length_is_refused(self, by: int) -> None:
        image = image_of(SMALL)
        tail = image.tail[:by] if by < 0 else image.tail + bytes(by)
        with pytest.raises(ShapeMismatch, match=f"a model of {len(tail)} bytes does not fit"):
            self.template().restore(tail, image.digest)

    def test_another_layout_of_the_same_length_is_refused(self) -> None:
        image, other = image_of({"a": (2,), "b": (3,)}), self.template({"a": (3,), "b": (2,)})
        assert len(image.tail) == other.size
        with pytest.raises(ShapeMismatch):
            other.restore(image.tail, image.digest)

    @pytest.mark.parametrize("digest", ["", "00" * 32])
    def test_another_digest_is_refused(self, digest: str) -> None:
        with pytest.raises(ShapeMismatch, match="digest"):
            self.template().restore(image_of(SMALL).tail, digest)


# ---- packed images


@given(models, st.data(), st.none() | st.text(max_size=9))
def test_any_subset_of_any_packed_model(
    model: dict[str, tuple[int, ...]], data: st.DataObject, reason: str | None
) -> None:
    """The same for the tables of 8 bits, given in any order."""
    names = data.draw(st.sets(st.sampled_from(sorted(model)))) if model else set()
    layout = Layout(tuple(Weight(name, shape) for name, shape in model.items()))
    edges = st.floats(width=32, allow_nan=False)
    items = {
        name: CompressFeatureMap(
            name,
            (np.arange(layout.by_name[name].size) % 256).astype(np.int8),
            data.draw(edges),
            data.draw(edges),
        )
        for name in data.draw(st.permutations(sorted(model)))
    }
    image = PackedImage.of(layout, items.values())
    selection = image.select(lambda weight: weight.name in names)
    reply = ResponseGetModel(200, reason, 7, (), "1", 2, selection)  # type: ignore[arg-type]
    shown = tuple(items[weight.name] for weight in layout if weight.name in names)
    expected = plain(ResponseGetModel(200, reason, 7, (), "1", 2, shown))
    buffer = encode(reply)
    assert plain(decode(ResponseGetModel, buffer)) == expected
    assert plain(reference.read(ResponseGetModel, buffer)) == expected
    assert encode_parts(reply)[-1] is image.tail
