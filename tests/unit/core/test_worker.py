"""The worker's state machine: each step by a table, and whole lives against a pretended job."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.core import worker as core
from fedcore.core.admission import DISABLED_OR_FINISHED, SAFEMODE
from fedcore.core.job import RunningState
from fedcore.core.worker import (
    Answered,
    Blind,
    Diverged,
    Look,
    Looked,
    Place,
    Progress,
    Pull,
    Pulled,
    Push,
    PushMetrics,
    Remark,
    Step,
    Train,
    Trained,
    Unavailable,
    Unreachable,
    Wait,
    Waited,
    begin,
    step,
)
from fedcore.errors import LocalError

HERE, RETRY, NEXT = Place("i_1", 3), Place("i_1", 3, 2), Place("i_1", 4)
BEFORE, ELSEWHERE = Place("i_1", 2), Place("i_2", 1)
RUNNING, DISABLED, FINISHED = RunningState.RUNNING, RunningState.DISABLE, RunningState.FINISH
LATE = "Model of iteration of 3 has finished"
OURS = "PushWeight succeed."
SHORT, LONG = Wait(0.35), Wait(0.75)  # half-way between their ends

AT = {each: Progress(5, each, HERE, loss=0.5, accuracy=0.75) for each in Step}
GOOD = replace(AT[Step.PULLING], has_good=True)
AFTER = Progress(5, Step.LOOKING, HERE, done=HERE, loss=0.5, accuracy=0.75)
LOST = replace(AT[Step.PUSHING], doubt=True)
PUSHED = replace(AT[Step.CHECKING], pushed=True)
METRICS = PushMetrics(HERE, 0.5, 0.75)

TABLE = [
    # looking for a place
    (begin(5).progress, Looked(HERE, RUNNING), Step.PULLING, Pull(HERE), None),
    (begin(5).progress, Blind(), Step.LOOKING, LONG, None),
    (begin(5).progress, Waited(), Step.LOOKING, Look(), None),
    (begin(5).progress, Looked(HERE, DISABLED), Step.LOOKING, Wait(1.0), Remark.DISABLED),
    (begin(5).progress, Looked(HERE, FINISHED), Step.PROBING, Pull(HERE), None),
    (begin(5).progress, Looked(HERE, RunningState.STOP), Step.PROBING, Pull(HERE), None),
    (AFTER, Looked(HERE, RUNNING), Step.LOOKING, SHORT, None),
    (AFTER, Looked(BEFORE, RUNNING), Step.LOOKING, SHORT, None),
    (AFTER, Looked(RETRY, RUNNING), Step.PULLING, Pull(RETRY), None),
    (AFTER, Looked(NEXT, RUNNING), Step.PULLING, Pull(NEXT), None),
    (AFTER, Looked(ELSEWHERE, RUNNING), Step.PULLING, Pull(ELSEWHERE), None),
    # is a finished job finished?
    (AT[Step.PROBING], Unavailable(DISABLED_OR_FINISHED), Step.FINISHED, Wait(1.0), Remark.FINISHED),
    (AT[Step.PROBING], Unreachable(), Step.FINISHED, Wait(1.0), Remark.FINISHED),
    (AT[Step.PROBING], Unavailable(SAFEMODE), Step.LOOKING, LONG, None),
    (AT[Step.PROBING], Answered(201), Step.LOOKING, LONG, None),
    (AT[Step.PROBING], Pulled(3, True), Step.LOOKING, LONG, None),
    # it is, unless it begins anew
    (AT[Step.FINISHED], Waited(), Step.FINISHED, Look(), None),
    (AT[Step.FINISHED], Blind(), Step.FINISHED, Wait(1.0), None),
    (AT[Step.FINISHED], Looked(HERE, FINISHED), Step.FINISHED, Wait(1.0), None),
    (AT[Step.FINISHED], Looked(ELSEWHERE, FINISHED), Step.FINISHED, Wait(1.0), None),
    (AT[Step.FINISHED], Looked(ELSEWHERE, DISABLED), Step.LOOKING, Wait(1.0), Remark.DISABLED),
    (AT[Step.FINISHED], Looked(ELSEWHERE, RUNNING), Step.PULLING, Pull(ELSEWHERE), None),
    # pulling
    (AT[Step.PULLING], Pulled(3, True), Step.TRAINING, Train(5), Remark.PULLED),
    (AT[Step.PULLING], Pulled(2, True), Step.LOOKING, SHORT, Remark.MISPLACED),
    (AT[Step.PULLING], Pulled(3, False), Step.LOOKING, SHORT, Remark.SKIPPED),
    (GOOD, Pulled(3, False), Step.TRAINING, Train(5, True), Remark.LAST_GOOD),
    (AT[Step.PULLING], Answered(201), Step.LOOKING, SHORT, None),
    (AT[Step.PULLING], Answered(500), Step.LOOKING, SHORT, None),
    (AT[Step.PULLING], Unavailable(DISABLED_OR_FINISHED), Step.LOOKING, LONG, None),
    (AT[Step.PULLING], Unreachable(True), Step.LOOKING, LONG, None),
    # training
    (AT[Step.TRAINING], Trained(0.5, 0.75), Step.CHECKING, Look(), Remark.TRAINED),
    (AT[Step.TRAINING], Diverged(), Step.LOOKING, SHORT, Remark.DIVERGED),
    # is the job still there?
    (AT[Step.CHECKING], Looked(HERE, RUNNING), Step.PUSHING, Push(HERE), None),
    (AT[Step.CHECKING], Looked(HERE, DISABLED), Step.CHECKING, Wait(1.0), Remark.DISABLED),
    (AT[Step.CHECKING], Looked(BEFORE, RUNNING), Step.CHECKING, SHORT, None),
    (AT[Step.CHECKING], Looked(RETRY, RUNNING), Step.PULLING, Pull(RETRY), Remark.DISCARDED),
    (AT[Step.CHECKING], Looked(NEXT, RUNNING), Step.PULLING, Pull(NEXT), Remark.DISCARDED),
    (AT[Step.CHECKING], Looked(ELSEWHERE, RUNNING), Step.PULLING, Pull(ELSEWHERE), Remark.DISCARDED),
    (AT[Step.CHECKING], Looked(NEXT, FINISHED), Step.PROBING, Pull(NEXT), Remark.DISCARDED),
    (AT[Step.CHECKING], Blind(), Step.CHECKING, LONG, None),
    (AT[Step.CHECKING], Waited(), Step.CHECKING, Look(), None),
    (PUSHED, Looked(HERE, RUNNING), Step.REPORTING, METRICS, None),
    (PUSHED, Looked(NEXT, RUNNING), Step.PULLING, Pull(NEXT), Remark.DONE),
    # pushing
    (AT[Step.PUSHING], Answered(200, OURS), Step.REPORTING, METRICS, Remark.PUSHED),
    (AT[Step.PUSHING], Answered(200, LATE), Step.LOOKING, SHORT, Remark.LATE),
    (AT[Step.PUSHING], Answered(200, LATE, doubt=True), Step.REPORTING, METRICS, Remark.PERHAPS_OURS),
    (LOST, Answered(200, LATE), Step.REPORTING, METRICS, Remark.PERHAPS_OURS),
    (AT[Step.PUSHING], Answered(201), Step.CHECKING, SHORT, None),
    (AT[Step.PUSHING], Answered(300), Step.CHECKING, SHORT, None),
    (AT[Step.PUSHING], Answered(400), Step.LOOKING, SHORT, Remark.REFUSED),
    (AT[Step.PUSHING], Unavailable(SAFEMODE), Step.CHECKING, LONG, None),
    (AT[Step.PUSHING], Unreachable(True), Step.CHECKING, LONG, None),
    # telling loss and accuracy
    (AT[Step.REPORTING], Answered(200), Step.LOOKING, SHORT, Remark.DONE),
    (AT[Step.REPORTING], Answered(300), Step.CHECKING, SHORT, None),
    (AT[Step.REPORTING], Unavailable(SAFEMODE), Step.CHECKING, LONG, None),
    (AT[Step.REPORTING], Unreachable(), Step.CHECKING, LONG, None),
]


@pytest.mark.parametrize(("now", "event", "then", "effect", "remark"), TABLE)
def test_each_event_has_one_consequence(now, event, then, effect, remark):
    turn = step(now, event, 0.5)
    assert (turn.progress.step, turn.effect, turn.remark) == (then, effect, remark)


def test_a_job_of_another_model_ends_the_worker():
    turn = step(AT[Step.PULLING], Answered(400, "Parameter x is not registered in server."), 0.0)
    assert turn.progress.step is Step.ENDED
    assert "Parameter x" in turn.effect.fault


def test_a_training_has_at_least_one_step():
    with pytest.raises(LocalError):
        begin(0)


@pytest.mark.parametrize(
    ("where", "event"),
    [(each, Waited()) for each in (Step.PULLING, Step.TRAINING, Step.PUSHING, Step.REPORTING, Step.PROBING)]
    + [(Step.ENDED, Looked(HERE, RUNNING)), (Step.TRAINING, Answered(200)), (Step.PUSHING, Trained(1, 1))],
)
def test_an_event_out_of_turn_is_a_bug(where, event):
    with pytest.raises(LocalError):
        step(AT[where], event, 0.0)


def test_an_answer_lost_once_is_doubt_until_the_next_pull():
    lost = step(AT[Step.PUSHING], Unreachable(True), 0.0).progress
    again = step(lost, Looked(HERE, RUNNING), 0.0).progress
    assert again.doubt
    elsewhere = step(replace(again, step=Step.CHECKING), Looked(NEXT, RUNNING), 0.0).progress
    assert not elsewhere.doubt


def test_a_faster_worker_that_tells_no_metrics_is_stood_in_for_after_a_while():
    turn = step(AT[Step.PUSHING], Answered(200, LATE), 1.0)
    waited = 0.0
    while not isinstance(turn.effect, PushMetrics):
        assert isinstance(turn.effect, Wait)
        waited += turn.effect.seconds
        assert waited < core.STAND_IN_S + 1.0
        turn = step(turn.progress, Waited(), 1.0)
        turn = step(turn.progress, Looked(HERE, RUNNING), 1.0)
    assert waited >= core.STAND_IN_S
    assert (turn.effect, turn.remark) == (METRICS, Remark.STANDS_IN)
    done = step(turn.progress, Answered(200), 1.0).progress
    assert isinstance(step(replace(done, waited=99.0), Looked(HERE, RUNNING), 1.0).effect, Wait)


def test_our_own_place_needs_no_stand_in():
    assert step(replace(AFTER, waited=99.0), Looked(HERE, RUNNING), 0.5).effect == SHORT


# ---- whole lives

PLACES = [
    Place("i_1", 1),
    Place("i_1", 1, 2),
    Place("i_1", 2),
    Place("i_1", 3),
    Place("i_2", 1),
    Place("i_2", 2),
]


class Job:
    """A job that moves on, fails and lies still as it is drawn; keeps what a worker must not do."""

    def __init__(self, draw) -> None:
        self.draw = draw
        self.at = 0
        self.running = RUNNING
        self.pulled: Place | None = None  # what the weights in hand were pulled from
        self.trained = 0  # trainings since that pull
        self.in_hand = False
        self.first_pushes: set[Place] = set()
        self.remarks: list[Remark] = []

    @property
    def place(self) -> Place:
        return PLACES[min(self.at, len(PLACES) - 1)]

    def moves_on(self) -> None:
        if self.draw(st.integers(0, 5)) == 0:
            self.at += 1
            self.running = RUNNING if self.at < len(PLACES) else FINISHED
        elif self.running is not FINISHED:
            self.running = DISABLED if self.draw(st.integers(0, 9)) == 9 else RUNNING

    def do(self, effect):
        """Carry an effect out."""
        self.moves_on()
        match effect:
            case Wait(seconds):
                assert seconds > 0
                return Waited()
            case Look():
                return Blind() if self.draw(st.integers(0, 6)) == 6 else Looked(self.place, self.running)
            case Train(steps):
                assert self.pulled is not None, "trained without a pull"
                assert self.trained == 0, "trained twice on one pull"
                assert steps == 5
                self.trained += 1
                self.in_hand = True
                return Diverged() if self.draw(st.integers(0, 9)) == 9 else Trained(0.5, 0.75)
            case Pull(place):
                assert self.pulled is None or self.trained == 1, "pulled again without training"
                return self._pull(place)
        fault = self.draw(st.integers(0, 6))
        if fault == 6:
            if isinstance(effect, Push) and self.draw(st.booleans()):
                self._push(effect.place)
            return Unreachable(True)
        if fault == 5:
            return Unavailable(SAFEMODE)
        if isinstance(effect, PushMetrics):
            return Answered(200 if effect.place == self.place else 300)
        return self._push(effect.place)

    def _pull(self, place):
        if self.running is not RUNNING:
            return Unavailable(DISABLED_OR_FINISHED)
        fault = self.draw(st.integers(0, 6))
        if fault > 3:
            return (Unreachable(), Unavailable(SAFEMODE), Answered(201))[fault - 4]
        if place != self.place:
            return (
                Answered(201)
                if place.iteration == self.place.iteration
                else Pulled(self.place.iteration, True)
            )
        self.pulled, self.trained, self.in_hand = place, 0, False
        finite = fault < 3
        return Pulled(place.iteration, finite)

    def _push(self, place):
        assert place == self.pulled, "pushed the weights of another pull"
        assert self.trained == 1
        if place != self.place or self.running is not RUNNING:
            return Answered(201)
        if place in self.first_pushes or self.draw(st.integers(0, 3)) == 3:
            return Answered(200, LATE)
        self.first_pushes.add(place)
        return Answered(200, OURS)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_happens_a_worker_keeps_the_rules_and_ends_with_the_job(data):
    job = Job(data.draw)
    turn = begin(5)
    since_pause = []
    for _ in range(5000):
        if turn.progress.step is Step.FINISHED:
            break
        assert turn.effect not in since_pause, "repeated without a wait"
        since_pause = [] if isinstance(turn.effect, Wait | Train) else [*since_pause, turn.effect]
        had_weights = job.in_hand
        before = turn.progress
        turn = step(before, job.do(turn.effect), 0.5)
        if turn.remark is Remark.SKIPPED:
            job.pulled = None  # nothing was given to the trainer
        if had_weights and isinstance(turn.effect, Pull) and before.step is Step.CHECKING:
            assert turn.remark in (Remark.DISCARDED, Remark.DONE), "trained weights vanished without a word"
            job.in_hand = False
    assert turn.remark is Remark.FINISHED
    assert job.running is FINISHED
