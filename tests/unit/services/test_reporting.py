"""What operators and callbacks hear of iterations."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twisted.internet import defer
from twisted.logger import LogLevel, globalLogPublisher

from fedcore.config import EvalType
from fedcore.core.iteration import CipherRound, Iteration, Phase, Policy
from fedcore.observe.journal import Journal
from fedcore.observe.metrics import ServerMetrics
from fedcore.services.evaluation import Evaluation
from fedcore.services.reporting import Course, IterationEnd, Reporter
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.image import ImageTemplate

MODEL = ImageTemplate(Layout((Weight("w", (1,)),))).image({"w": np.zeros(1, np.float32)})


def end(number: int = 3, *, valid: bool = True, seconds: float | None = 2.0) -> IterationEnd:
    return IterationEnd("job", "i_1", number, valid, "why", MODEL, None, None, 5, seconds)


class Told:
    """A reporter, and all it tells."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.metrics = ServerMetrics()
        self.file = directory / "event.txt"
        journal = Journal(self.file, "10.0.0.1:6000", lambda: datetime(2026, 1, 1))
        self.reporter = Reporter(self.metrics, journal, limit)
        self.logged: list[Any] = []
        self.scores: Any = None
        self.heard: list[IterationEnd] = []
        globalLogPublisher.addObserver(self.logged.append)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

    def levels(self) -> list[Any]:
        return [event["log_level"] for event in self.logged]


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    found = Told(tmp_path, 2)
    yield found
    globalLogPublisher.removeObserver(found.logged.append)


def test_it_begins_collecting(told: Told) -> None:
    assert told.metric("fl_iteration_phase", phase="collecting") == 1


def test_policy(told: Told) -> None:
    told.reporter.policy(Policy(5, 4, 1.0, 1.0, 1.0, 9))
    assert told.metric("fl_iteration_quorum_clients", round="startFLJob") == 5
    assert told.metric("fl_iteration_quorum_clients", round="updateModel") == 4


def test_cipher_rounds_are_shown_where_there_are_any(told: Told) -> None:
    told.reporter.policy(replace(Policy(5, 4, 1.0, 1.0, 1.0, 9), cipher_rounds=(("getKeys", 3),)))
    assert told.metric("fl_iteration_quorum_clients", round="getKeys") == 3
    first = Iteration(3, rounds=(CipherRound("getKeys", 2, 1.0),))
    told.reporter.changed(Iteration(3), first)
    assert told.metric("fl_iteration_clients", round="getKeys") == 2
    told.reporter.changed(first, Iteration(4))
    assert told.metric("fl_iteration_clients", round="getKeys") == 0


def test_a_change_is_shown(told: Told) -> None:
    before = Iteration(3)
    told.reporter.changed(before, Iteration(3, 2, Phase.SEALED, selected=4, uploaded=2))
    assert told.metric("fl_iteration") == 3
    assert told.metric("fl_iteration_attempt") == 2
    assert told.metric("fl_iteration_clients", round="startFLJob") == 4
    assert told.metric("fl_iteration_clients", round="updateModel") == 2
    assert told.metric("fl_iteration_phase", phase="sealed") == 1
    assert told.metric("fl_iteration_phase", phase="collecting") == 0


def test_a_valid_end_is_timed_counted_and_logged(told: Told) -> None:
    heard: list[IterationEnd] = []
    told.reporter.on_iteration_end.append(heard.append)
    told.reporter.ended(end(), 0.25)
    assert heard == [end()]
    assert told.metric("fl_iterations_total", outcome="valid") == 1
    assert told.metric("fl_iteration_duration_seconds_sum") == 2.0
    assert told.metric("fl_publication_duration_seconds_sum") == 0.25
    (record,) = told.logged
    assert (record["log_level"], record["iteration"], record["valid"]) == (LogLevel.info, 3, True)
    assert (record["result"], record["updates"], record["seconds"]) == ("why", 5, 2.0)


def test_an_end_that_this_server_saw_no_upload_of_is_no_publication(told: Told) -> None:
    told.reporter.ended(end(), None)
    assert told.metric("fl_iteration_duration_seconds_count") == 1
    assert told.metric("fl_publication_duration_seconds_count") == 0


def test_an_iteration_that_nobody_began_has_no_duration(told: Told) -> None:
    told.reporter.ended(end(seconds=None), 0.25)
    assert told.metric("fl_iteration_duration_seconds_count") == 0


def test_a_failed_end_is_a_warning_and_not_timed(told: Told) -> None:
    told.reporter.ended(end(valid=False), 0.25)
    assert told.metric("fl_iterations_total", outcome="failed") == 1
    assert told.metric("fl_iteration_duration_seconds_count") == 0
    assert told.levels() == [LogLevel.warn]
    assert told.file.read_text() == ""


def test_so_many_failures_in_a_row_are_an_event(told: Told) -> None:
    told.reporter.ended(end(1, valid=False), None)
    told.reporter.ended(end(2), None)
    told.reporter.ended(end(3, valid=False), None)
    assert told.file.read_text() == "", "the valid one in between begins the count anew"
    told.reporter.ended(end(4, valid=False), None)
    assert "event:Iteration failed 2 times continuously;" in told.file.read_text()
    assert told.levels()[-1] is LogLevel.error


def test_a_callback_that_fails_keeps_nobody_else_from_hearing(told: Told) -> None:
    heard: list[int] = []

    def broken(_: IterationEnd) -> None:
        raise RuntimeError("mine")

    told.reporter.on_iteration_end += [broken, lambda one: heard.append(one.number)]
    told.reporter.ended(end(), None)
    assert heard == [3]
    assert told.levels() == [LogLevel.info, LogLevel.critical]
    told.logged.clear()
    gc.collect()


def test_lost_updates_are_counted_logged_and_in_the_journal(told: Told) -> None:
    told.reporter.lost(3, 2, 4, "10.0.0.9:1")
    assert told.metric("fl_updates_lost_total") == 4
    assert (
        "Iteration 3 attempt 2 lost 4 accepted updates in the ledger of 10.0.0.9:1" in told.file.read_text()
    )
    (record,) = told.logged
    assert (record["log_level"], record["updates"], record["owner"]) == (LogLevel.error, 4, "10.0.0.9:1")


# ---- evaluation


class Scores:
    """Stands for Evaluation; each score comes when the test gives it."""

    eval_type = EvalType.SILHOUETTE_SCORE

    def __init__(self) -> None:
        self.begun: dict[int, defer.Deferred[float | None]] = {}

    def begin(self, cluster: Any, number: int) -> None:
        self.begun = {number: defer.Deferred()}

    def forget(self) -> None:
        self.begun = {}

    def take(self, number: int) -> defer.Deferred[float | None] | None:
        return self.begun.get(number)


def test_the_evaluation_of_these_tests_has_the_real_one_s_interface() -> None:
    for name in ("begin", "forget", "take"):
        ours, real = (signature(getattr(each, name)).parameters.keys() for each in (Scores, Evaluation))
        assert ours == real


@pytest.fixture
def evaluated(told: Told) -> Told:
    journal = Journal(told.file, "10.0.0.1:6000", lambda: datetime(2026, 1, 1))
    told.scores = Scores()
    told.reporter = Reporter(told.metrics, journal, 2, told.scores)  # type: ignore[arg-type]
    told.reporter.on_iteration_end.append(told.heard.append)
    return told


def shown(told: Told) -> float | None:
    return told.metric("fl_evaluation_score", eval_type="SILHOUETTE_SCORE")


def test_an_end_that_is_there_before_its_score_is_told_with_it(evaluated: Told) -> None:
    evaluated.reporter.ending(None, 3)  # type: ignore[arg-type]
    score = evaluated.scores.begun[3]
    evaluated.reporter.ended(end(3), 0.25)
    assert (evaluated.heard, shown(evaluated)) == ([], None)
    assert evaluated.metric("fl_iterations_total", outcome="valid") == 1, "nothing else waits"
    score.callback(0.5)
    assert evaluated.heard == [replace(end(3), evaluation=0.5)]
    assert shown(evaluated) == 0.5
    assert evaluated.logged[-1]["evaluation"] == 0.5


def test_ends_are_told_in_their_order(evaluated: Told) -> None:
    scores = []
    for number in (3, 4):
        evaluated.reporter.ending(None, number)  # type: ignore[arg-type]
        scores.append(evaluated.scores.begun[number])
        evaluated.reporter.ended(end(number, valid=False), None)
    evaluated.reporter.ended(end(5), None)
    scores[1].callback(0.25)
    assert evaluated.heard == []
    scores[0].callback(None)
    assert [(one.number, one.evaluation) for one in evaluated.heard] == [(3, None), (4, 0.25), (5, None)]
    assert "event:Iteration failed 2 times" in evaluated.file.read_text()


@pytest.mark.parametrize("lost", [True, False])
def test_what_another_server_has_ended_is_that_server_s_to_tell(evaluated: Told, lost: bool) -> None:
    evaluated.reporter.ending(None, 3)  # type: ignore[arg-type]
    evaluated.scores.begun[3].callback(0.5)
    evaluated.reporter.ended(end(3), None)
    assert shown(evaluated) == 0.5
    if lost:
        evaluated.reporter.ending(None, 4)  # type: ignore[arg-type]
        evaluated.reporter.not_ended()
    evaluated.reporter.ended(end(4), None)
    assert shown(evaluated) is None
    assert evaluated.heard[-1].evaluation is None
    assert "evaluation" not in evaluated.logged[-1]


def test_without_evaluation_there_is_no_score(told: Told) -> None:
    told.reporter.ending(None, 3)  # type: ignore[arg-type]
    told.reporter.not_ended()
    told.reporter.ended(end(3), None)
    assert shown(told) is None
    assert "evaluation" not in told.logged[-1]


@pytest.mark.parametrize(("rebased", "why"), [(True, "another model"), (False, "too late")])
def test_updates_that_are_left_out(told: Told, rebased: bool, why: str) -> None:
    told.reporter.left_out(3, 2, 7, rebased, "me")
    assert told.metric("fl_updates_lost_total") == 7
    line = told.file.read_text()
    assert "Iteration 3 attempt 2 lost 7 accepted updates in the ledger of me" in line and why in line
    assert told.logged[-1]["log_level"] is LogLevel.error
    assert (told.logged[-1]["updates"], told.logged[-1]["iteration"]) == (7, 3)


class TestCourse:
    def test_of_an_iteration_that_made_a_model(self) -> None:
        course = Course()
        course.changed(Iteration(1), Iteration(1, selected=4, started=1.0), 4, 2.0)
        course.uploaded(5.0)
        assert course.filled == 2.0
        course.changed(Iteration(1, selected=4, uploaded=3, started=1.0), Iteration(2), 4, 7.0)
        assert (course.filled, course.updates_before, course.seconds_until(8.0)) == (None, 3, 7.0)
        assert course.end(8.0) == 3.0
        assert course.end(8.0) is None, "told once"

    def test_of_one_that_made_none(self) -> None:
        course = Course()
        course.changed(Iteration(1), Iteration(2), 4, 7.0)
        assert course.seconds_until(8.0) is None
        assert course.end(8.0) is None
