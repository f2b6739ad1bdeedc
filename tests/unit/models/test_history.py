"""Which models are kept, and under which numbers."""

from __future__ import annotations

import numpy as np
import pytest

from fedcore.models.history import KEPT, ModelHistory
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.image import ImageTemplate, ModelImage

TEMPLATE = ImageTemplate(Layout((Weight("w", (1,)),)))


def model(value: int) -> ModelImage:
    return TEMPLATE.image({"w": np.float32([value])})


def held(history: ModelHistory, numbers: range = range(-2, 20)) -> dict[int, int]:
    """Iteration -> value of its model."""
    found = ((number, history.get(number)) for number in numbers)
    return {number: int(image.arrays["w"][0]) for number, image in found if image is not None}


def after(*numbers: int) -> ModelHistory:
    history = ModelHistory(0, model(0))
    for number in numbers:
        history.add(number, model(number))
    return history


@pytest.mark.parametrize("first", [0, 7])
def test_at_first_there_is_one(first: int) -> None:
    history = ModelHistory(first, model(first))
    assert held(history) == {first: first}
    assert history.newest == first
    assert history.newest_image is history.get(first)


@pytest.mark.parametrize(
    ("added", "kept"),
    [
        ((1,), [0, 1]),
        ((1, 2), [0, 1, 2]),
        ((1, 2, 3), [1, 2, 3]),
        ((1, 2, 3, 4, 5), [3, 4, 5]),
        ((5,), [0, 5]),
        ((1, 2, 9), [1, 2, 9]),
        ((1, 2, 2), [0, 1, 2]),  # stored again
        ((1, 2, 3, 2), [1, 2]),  # the shared state stepped back: what came later never was
        ((1, 2, 3, 1), [1]),
        ((1, 2, 3, 0), [0]),
    ],
)
def test_the_three_newest_are_kept_and_none_beyond_the_last(added: tuple[int, ...], kept: list[int]) -> None:
    history = after(*added)
    assert KEPT == 3
    assert held(history) == {number: number for number in kept}
    assert history.newest == added[-1]


def test_a_newer_model_of_the_same_iteration_replaces_the_older() -> None:
    history = after(1)
    history.add(1, model(100))
    assert held(history) == {0: 0, 1: 100}


def test_a_model_is_found_by_its_digest_as_long_as_it_is_kept() -> None:
    history = after(1, 2)
    assert history.find(model(1).digest) is history.get(1)
    assert history.find(model(2).digest) is history.newest_image
    assert history.find(model(9).digest) is None
    assert history.find("") is None
    history.add(3, model(3))
    assert history.find(model(0).digest) is None, "the oldest has made room"


def test_an_iteration_without_a_model_keeps_the_one_before() -> None:
    history = after(1, 2)
    before = history.newest_image
    history.carry_over(3)
    assert history.newest == 3
    assert history.get(3) is before
    assert held(history) == {1: 1, 2: 2, 3: 2}


def test_many_failed_iterations_lose_nothing() -> None:
    history = after(1)
    for number in range(2, 12):
        history.carry_over(number)
    assert held(history) == {9: 1, 10: 1, 11: 1}


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_step_back_keeps_the_newest_weights(number: int) -> None:
    history = after(1, 2, 3)
    history.carry_over(number)
    assert history.newest == number
    assert int(history.newest_image.arrays["w"][0]) == 3
