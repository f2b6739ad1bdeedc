"""Models in 8 bits: made once, in a thread, and gone with their model."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from memory_reactor import MemoryReactor
from twisted.internet import defer
from twisted.logger import globalLogPublisher

from fedcore.services.packed_models import PackedModels
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.image import ImageTemplate, ModelImage

LAYOUT = Layout((Weight("w", (2, 2)), Weight("b", ())))


def model(value: float) -> ModelImage:
    return ImageTemplate(LAYOUT).image({"w": np.float32([value, 1, 2, 3]), "b": np.float32([4])})


class World:
    def __init__(self) -> None:
        self.reactor = MemoryReactor()
        self.packed = PackedModels(self.reactor)
        self.logged: list[dict[str, Any]] = []

    def make(self, image: ModelImage) -> list[bool]:
        """Have a model packed; the list holds whether it is still due once that is done."""
        done: list[bool] = []
        making = defer.Deferred.fromCoroutine(self.packed.make(image))
        making.addCallback(lambda _: done.append(self.packed.is_due(image)))
        return done


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    globalLogPublisher.addObserver(world.logged.append)
    yield world
    globalLogPublisher.removeObserver(world.logged.append)


def test_it_is_made_in_a_thread(world: World) -> None:
    image = model(0)
    assert world.packed.is_due(image)
    done = world.make(image)
    assert (done, world.packed.get(image)) == ([], None)
    world.reactor.work()
    assert done == [False]
    packed = world.packed.get(image)
    assert packed is not None and packed.layout is LAYOUT


def test_it_is_made_once(world: World) -> None:
    image = model(0)
    first, second = world.make(image), world.make(image)
    assert len(world.reactor.jobs) == 1
    world.reactor.work()
    assert (first, second) == ([False], [False])
    assert world.make(image) == [False]
    assert not world.reactor.jobs


def test_whoever_gives_up_takes_nothing_from_the_others(world: World) -> None:
    image = model(0)
    leaving = defer.Deferred.fromCoroutine(world.packed.make(image))
    staying = world.make(image)
    leaving.addErrback(lambda failure: failure.trap(defer.CancelledError))
    leaving.cancel()
    world.reactor.work()
    assert staying == [False]
    assert world.packed.get(image) is not None


def test_models_are_packed_one_by_one(world: World) -> None:
    one, other = model(0), model(9)
    world.make(one), world.make(other)
    world.reactor.work(), world.reactor.work()
    first, second = world.packed.get(one), world.packed.get(other)
    assert first is not None and second is not None
    assert first.tail != second.tail


def test_one_that_cannot_be_packed_is_not_tried_again(world: World) -> None:
    image = model(math.inf)
    done = world.make(image)
    world.reactor.work()
    assert done == [False]
    assert world.packed.get(image) is None
    assert [event["error"] for event in world.logged if "8 bits" in (event["log_format"] or "")] == [
        "weight 'w' cannot be compressed: its values lie between 1.0 and inf"
    ]


def test_it_goes_with_its_model(world: World) -> None:
    image = model(0)
    world.make(image)
    world.reactor.work()
    packed = weakref.ref(world.packed.get(image) or world)
    del image
    gc.collect()
    assert packed() is None
