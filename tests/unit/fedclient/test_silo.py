"""Single steps made into runs: what a user's trainer is given, and what of its answers is refused."""

import numpy as np
import pytest

from fedclient.silo import LocalRun, Steps
from fedclient.trainer import FitConfig, FitResult
from fedcore.errors import LocalError, NonFinite, ShapeMismatch

BASE = {"a": np.float32([1, 2])}


class Descent:
    """Takes steps with the gradient 1 for every element."""

    def __init__(self, answer=None):
        self.seen = []
        self._answer = answer

    def load(self):
        return 7, 3

    def step(self, weights, step):
        self.seen.append((step, weights))
        if self._answer is not None:
            return FitResult(self._answer, 0.0)
        gradient = {name: 1 + step.extra_gradient.get(name, 0) for name in weights}
        return FitResult(
            {n: w - step.learning_rate * gradient[n] for n, w in weights.items()}, float(step.number)
        )

    def evaluate(self, weights):
        return 0.5


def run_of(steps=3, iid_rate=0.0, drift=None):
    return LocalRun(1, 16, 0.5, 9, first_step=4, steps=steps, iid_rate=iid_rate, drift=drift or {})


def test_a_run_is_its_steps_one_after_the_other():
    trainer = Descent()
    result = Steps(trainer).fit(BASE, run_of())
    assert result.weights["a"].tolist() == [-0.5, 0.5]
    assert result.loss == 5.0, "the mean"
    numbers = [(s.number, s.batch_size, s.learning_rate, s.iteration) for s, _ in trainer.seen]
    assert numbers == [(n, 16, 0.5, 9) for n in (4, 5, 6)]
    assert all(not weights["a"].flags.writeable for _, weights in trainer.seen[1:])
    assert all(step.extra_gradient == {} for step, _ in trainer.seen)


def test_the_proximal_term_pulls_back_to_where_the_run_began():
    trainer = Descent()
    Steps(trainer).fit(BASE, run_of(iid_rate=0.5))
    assert [step.extra_gradient["a"].tolist() for step, _ in trainer.seen] == [
        [0, 0],
        [-0.25, -0.25],
        [-0.4375, -0.4375],
    ]


def test_scaffolds_correction_comes_after_each_step_and_before_the_next():
    trainer = Descent()
    result = Steps(trainer).fit(BASE, run_of(steps=2, drift={"a": np.float32([-2, 0])}))
    assert trainer.seen[1][1]["a"].tolist() == [1 - 0.5 + 1, 2 - 0.5]
    assert result.weights["a"].tolist() == [2, 1]


def test_what_a_step_returns_may_have_any_shape_and_precision_that_fits():
    result = Steps(Descent({"a": np.float64([[1.5], [2.5]])})).fit(BASE, run_of(steps=1))
    assert result.weights["a"].tolist() == [1.5, 2.5]
    assert result.weights["a"].dtype == np.float32


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({}, ShapeMismatch),
        ({"a": np.float32([1, 2]), "c": np.float32([1])}, ShapeMismatch),
        ({"a": np.float32([1])}, ShapeMismatch),
        ({"a": np.float32([1, np.nan])}, NonFinite),
        ({"a": np.float64([1e300, 0])}, NonFinite),
        ({"a": np.array([1j, 2])}, TypeError),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_what_a_step_may_not_return(answer, error):
    with pytest.raises(error):
        Steps(Descent(answer)).fit(BASE, run_of())


def test_no_step_is_begun_after_the_stop():
    trainer = Descent()
    Steps(trainer, lambda: len(trainer.seen) == 2).fit(BASE, run_of(steps=100))
    assert len(trainer.seen) == 2


def test_a_devices_plan_is_no_run():
    with pytest.raises(LocalError):
        Steps(Descent()).fit(BASE, FitConfig(1, 16, 0.5, 1))


def test_the_rest_is_the_trainers():
    steps = Steps(Descent())
    assert steps.load() == (7, 3)
    assert steps.evaluate(BASE) == 0.5
