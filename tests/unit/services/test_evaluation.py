"""Evaluation of the clients' vectors: what of them is kept, and when the score is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from memory_reactor import MemoryReactor
from twisted.internet import defer
from twisted.logger import globalLogPublisher

from fedcore.config import EvalType, Settings
from fedcore.config.settings import UnsupervisedSettings
from fedcore.errors import StoreUnavailable
from fedcore.services.evaluation import (
    INLINE_VALUES,
    MEASURES,
    MOST_KEPT_VALUES,
    MOST_VALUES,
    Evaluation,
    evaluation_of,
    longest_vector,
    vector_of,
)
from fedcore.wire.messages import UnsupervisedEvalItem, UnsupervisedEvalItems

THREE = [[1, 2, 3], [2, 3, 4], [5, 4, 3]]


def items(*vectors: list[float]) -> UnsupervisedEvalItems:
    return UnsupervisedEvalItems(tuple(UnsupervisedEvalItem("", np.float32(vector)) for vector in vectors))


def packed(vectors: Any) -> list[bytes]:
    return [np.float32(vector).tobytes() for vector in vectors]


class Shared:
    """Stands for ClusterState; keeps every question until the test answers it."""

    def __init__(self) -> None:
        self.questions: list[defer.Deferred[list[bytes]]] = []

    async def vectors(self) -> list[bytes]:
        self.questions.append(defer.Deferred())
        return await self.questions[-1]

    def answer(self, vectors: Any) -> None:
        self.questions.pop(0).callback(packed(vectors))


class World:
    def __init__(self) -> None:
        self.shared = Shared()
        self.reactor = MemoryReactor()
        self.evaluation = Evaluation(EvalType.SILHOUETTE_SCORE, 3, self.reactor)
        self.logged: list[dict[str, Any]] = []

    def begin(self, number: int = 7) -> None:
        self.evaluation.begin(self.shared, number)  # type: ignore[arg-type]

    def score(self, number: int = 7) -> list[float | None]:
        """The score of an iteration, in a list once it is there."""
        found: list[float | None] = []
        score = self.evaluation.take(number)
        assert score is not None
        score.addCallback(found.append)
        return found

    def warned(self, word: str) -> bool:
        return any(word in (event["log_format"] or "") for event in self.logged)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    globalLogPublisher.addObserver(world.logged.append)
    yield world
    globalLogPublisher.removeObserver(world.logged.append)


class TestVectors:
    def test_all_items_of_a_client_are_one_vector(self) -> None:
        vector = vector_of(items([1, 2], [], [3]), 3)
        assert vector is not None
        assert np.frombuffer(vector, "<f4").tolist() == [1, 2, 3]

    def test_no_value_is_no_vector(self) -> None:
        assert vector_of(items([], []), 3) == b""
        assert vector_of(UnsupervisedEvalItems(()), 3) == b""

    def test_a_vector_beyond_the_bound_is_none(self) -> None:
        assert vector_of(items([1, 2], [3, 4]), 4) is not None
        assert vector_of(items([1, 2], [3, 4]), 3) is None

    @pytest.mark.parametrize("clients", [1, 2, 100, 1024, 1025, 100_000, MOST_KEPT_VALUES, 10**9])
    def test_all_clients_together_have_a_bound(self, clients: int) -> None:
        longest = longest_vector(clients)
        assert 1 <= longest <= MOST_VALUES
        assert longest == 1 or longest * clients <= MOST_KEPT_VALUES

    def test_a_thousand_clients_may_have_a_thousand_classes(self) -> None:
        assert longest_vector(1000) >= 1000


class TestSettings:
    @pytest.mark.parametrize("kind", [kind for kind in EvalType if kind is not EvalType.NOT_EVAL])
    def test_each_score_is_there(self, kind: EvalType) -> None:
        evaluation = evaluation_of(Settings(unsupervised=UnsupervisedSettings(9, kind)), None)
        assert evaluation is not None
        assert (evaluation.eval_type, evaluation.clients) == (kind, 9)
        assert len(set(MEASURES.values())) == len(EvalType) - 1

    def test_none_is_none(self) -> None:
        assert evaluation_of(Settings(unsupervised=UnsupervisedSettings(9)), None) is None


class TestScore:
    def test_it_asks_at_once_and_is_there_with_the_answer(self, world: World) -> None:
        world.begin()
        assert len(world.shared.questions) == 1, "before the iteration ends"
        score = world.score()
        assert score == []
        world.shared.answer(THREE)
        assert score == [pytest.approx(0.363489, abs=1e-6)]

    def test_too_few_clients_have_the_score_0(self, world: World) -> None:
        world.evaluation = Evaluation(EvalType.SILHOUETTE_SCORE, 4, world.reactor)
        world.begin()
        world.shared.answer(THREE)
        assert world.score() == [0.0]

    def test_clients_of_another_length_are_named_by_their_number(self, world: World) -> None:
        world.begin()
        world.shared.answer([*THREE, [1, 2]])
        assert world.score() == [pytest.approx(0.363489, abs=1e-6)]
        assert world.warned("have another length")

    def test_many_are_scored_in_a_thread(self, world: World) -> None:
        vectors = np.random.default_rng(1).random((300, 3)).astype(np.float32)
        assert vectors.size * len(vectors) > INLINE_VALUES
        world.begin()
        score = world.score()
        world.shared.answer(vectors)
        assert score == []
        world.reactor.work()
        assert len(score) == 1 and score[0] != 0.0

    def test_one_at_a_time(self, world: World) -> None:
        world.begin(7)
        seven = world.score(7)
        world.begin(8)
        assert len(world.shared.questions) == 1
        assert world.evaluation.take(8) is None
        assert world.warned("takes too long")
        world.shared.answer(THREE)
        assert len(seven) == 1
        world.begin(9)
        world.shared.answer(THREE)
        assert len(world.score(9)) == 1

    def test_a_lost_redis_is_no_score(self, world: World) -> None:
        world.begin()
        world.shared.questions.pop().errback(StoreUnavailable("gone"))
        assert world.score() == [None]
        assert world.warned("is not evaluated: {error}")
        world.begin(8)
        world.shared.answer(THREE)
        assert len(world.score(8)) == 1

    def test_a_bug_is_logged_and_is_no_score(self, world: World) -> None:
        world.begin()
        world.shared.questions.pop().callback([b"123"] * 3)  # no float has three bytes
        assert world.score() == [None]
        assert world.warned("is not evaluated")

    def test_what_others_end_is_theirs(self, world: World) -> None:
        world.begin(7)
        world.evaluation.forget()
        assert world.evaluation.take(7) is None
        world.shared.answer(THREE)
        world.begin(7)  # in its next attempt
        assert world.evaluation.take(8) is None
        world.begin(8)
