"""What a user's trainer may be, and the checks on what goes in and out of it."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest

from fedcore.config.settings import parse_pairs, parse_training_device
from fedcore.errors import ConfigError, NonFinite, ShapeMismatch
from fedcore.services.worker_trainer import (
    CheckedTrainer,
    TrainerFailed,
    choose_device,
    load_trainer,
    read_options,
    trainer_class,
)
from fedcore.wire.messages import FeatureMap


class Doubling:
    """Doubles its weights in each step."""

    def __init__(self, options=None, device="cpu"):
        self.told = (options, device)
        self.arrays = {"b": np.float32([1, 2]), "a": np.ones((2, 2), np.float32)}
        self.result = (0.5, 0.75)

    def weights(self):
        return self.arrays

    def load(self, weights):
        assert not any(array.flags.writeable for array in weights.values())
        self.arrays = {name: np.array(array) for name, array in weights.items()}

    def train(self, steps):
        for array in self.arrays.values():
            np.multiply(array, 2**steps, out=array)
        return self.result


class Lacking:
    """Cannot train."""

    def weights(self):
        return {}

    def load(self, weights):
        pass


class Failing(Doubling):
    """Cannot be made."""

    def __init__(self, options, device):
        raise OSError("no such file: labels.csv")


class Choosy(Doubling):
    """Takes no options."""

    def __init__(self, options, device):
        raise ConfigError("data=x is not a known data set")


@pytest.fixture
def module(monkeypatch):
    made = ModuleType("trainers")
    for each in (Doubling, Lacking, Failing, Choosy):
        setattr(made, each.__name__, each)
    monkeypatch.setitem(sys.modules, "trainers", made)


def sent(**arrays):
    maps = []
    for name, values in arrays.items():
        array = np.float32(values)
        array.flags.writeable = False
        maps.append(FeatureMap(name, array))
    return maps


def values(training):
    return {item.weight_fullname: item.data.tolist() for item in training.weights}


def test_a_trainer_is_made_with_its_options_and_device(module):
    trainer = load_trainer("trainers:Doubling", read_options(["n=3", "data=digits", "lr=1e-3"]), "cpu")
    assert trainer.names == ("a", "b")
    assert trainer.total_floats == 6
    assert trainer._trainer.told == ({"n": 3, "data": "digits", "lr": 0.001}, "cpu")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "is not written as module:Class"),
        ("trainers", "is not written as module:Class"),
        ("nowhere:Class", "the trainer nowhere:Class cannot be had: ModuleNotFoundError"),
        ("nowhere:Class", "looked for in the working directory"),
        ("trainers.nowhere:Class", "looked for in the working directory"),
        ("trainers:Nothing", "the trainer trainers:Nothing cannot be had: AttributeError"),
        ("trainers:Lacking", "the trainer trainers:Lacking has no train() (what it must have is in fedcore."),
        ("trainers:Failing", "cannot be made: OSError: no such file: labels.csv"),
        ("trainers:Choosy", "the trainer trainers:Choosy: data=x is not a known data set"),
    ],
)
def test_a_trainer_that_cannot_be_had_is_told_with_the_reason(module, path, words):
    with pytest.raises(ConfigError) as refused:
        load_trainer(path, {}, "cpu")
    assert words in str(refused.value)


@pytest.mark.parametrize("arrays", [{}, {"a": np.zeros(0)}, {"a": "text"}, {"a": [[1], [1, 2]]}])
def test_a_trainer_has_weights_of_numbers(arrays):
    trainer = Doubling()
    trainer.arrays = arrays
    with pytest.raises(ConfigError):
        CheckedTrainer(trainer)


def test_flat_weights_become_the_trainers_and_come_back_flat():
    trainer = CheckedTrainer(Doubling())
    trainer.take(sent(a=[1, 2, 3, 4], b=[5, 6]))
    training = trainer.train(2)
    assert (training.loss, training.accuracy) == (0.5, 0.75)
    assert values(training) == {"a": [4, 8, 12, 16], "b": [20, 24]}
    assert all(item.data.dtype == np.float32 for item in training.weights)


def test_what_was_trained_does_not_change_with_the_trainer():
    own = Doubling()
    trainer = CheckedTrainer(own)
    training = trainer.train(1)
    own.train(1)
    assert values(training) == {"a": [2, 2, 2, 2], "b": [2, 4]}


@pytest.mark.parametrize("maps", [sent(a=[1, 2, 3, 4]), sent(a=[1, 2, 3], b=[5, 6]), []])
def test_weights_of_another_model_are_refused(maps):
    own = Doubling()
    trainer = CheckedTrainer(own)
    with pytest.raises(ShapeMismatch):
        trainer.take(maps)
    assert own.arrays["b"].tolist() == [1, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_do_not_reach_the_trainer(bad):
    own = Doubling()
    trainer = CheckedTrainer(own)
    trainer.take(sent(a=[1, 2, 3, 4], b=[5, 6]))
    with pytest.raises(NonFinite):
        trainer.take(sent(a=[9, 9, 9, 9], b=[5, bad]))
    assert own.arrays["a"].tolist() == [[1, 2], [3, 4]]


def test_the_last_good_weights_are_those_of_the_last_good_training():
    own = Doubling()
    trainer = CheckedTrainer(own)
    with pytest.raises(TrainerFailed):
        trainer.take_last_good()
    trainer.take(sent(a=[1, 1, 1, 1], b=[1, 1]))
    trainer.train(1)
    own.result = (np.nan, 0.5)
    with pytest.raises(NonFinite):
        trainer.train(1)
    trainer.take_last_good()
    assert own.arrays["b"].tolist() == [2, 2]


@pytest.mark.parametrize("result", [(np.inf, 0.5), (0.5, np.nan)])
def test_a_loss_or_accuracy_that_is_not_finite_is_a_training_that_diverged(result):
    own = Doubling()
    own.result = result
    with pytest.raises(NonFinite):
        CheckedTrainer(own).train(1)


@pytest.mark.parametrize("result", [None, 1.0, (1, 2, 3), ("a", "b")])
def test_a_result_that_is_no_pair_of_numbers_is_the_trainers_fault(result):
    own = Doubling()
    own.result = result
    with pytest.raises(TrainerFailed) as failed:
        CheckedTrainer(own).train(1)
    assert str(failed.value).endswith(f"Doubling must return (loss, accuracy), not {result!r}")


@pytest.mark.parametrize("change", [{"c": np.float32([1])}, {"b": np.float32([1])}])
def test_other_weights_than_at_the_start_are_the_trainers_fault(change):
    own = Doubling()
    trainer = CheckedTrainer(own)
    own.arrays = own.arrays | change
    with pytest.raises(TrainerFailed):
        trainer.train(1)


def test_an_exception_keeps_its_name_and_text():
    own = Doubling()
    own.load = lambda weights: 1 / 0
    with pytest.raises(TrainerFailed) as failed:
        CheckedTrainer(own).take(sent(a=[1, 2, 3, 4], b=[5, 6]))
    assert "ZeroDivisionError: division by zero" in str(failed.value)
    assert isinstance(failed.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("text", "pairs"),
    [("", ()), ("a=1", ("a=1",)), (" a=1 , b=x=y,", ("a=1", "b=x=y")), ("a=", ("a=",))],
)
def test_options_are_pairs(text, pairs):
    assert parse_pairs(text) == pairs


@pytest.mark.parametrize("text", ["a", "=1", "a b=1", "a=1,a=2"])
def test_options_that_are_no_pairs_are_refused(text):
    with pytest.raises(ConfigError):
        parse_pairs(text)


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "CPU", "cpu "])
def test_a_device_is_one_that_torch_knows(text):
    with pytest.raises(ConfigError):
        parse_training_device(text)


def test_the_processor_needs_no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert choose_device("cpu") == choose_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="torch is not installed"):
        choose_device("cuda")


def test_a_device_that_is_not_there_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(ConfigError, match="CUDA devices"):
        choose_device(f"cuda:{torch.cuda.device_count()}")


def test_a_trainer_without_its_torch_is_told_the_remedies(monkeypatch, tmp_path):
    (tmp_path / "torchy.py").write_text("import torch\n")
    (tmp_path / "needy.py").write_text("import nowhere.at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError) as refused:
        trainer_class("torchy:Class")
    assert "pip install 'fedcore[worker]'" in str(refused.value)
    assert "lenet_worker_numpy:NumpyLeNetWorker" in str(refused.value)
    with pytest.raises(ConfigError, match="install what has the module nowhere"):
        trainer_class("needy:Class")


def test_the_class_is_found_without_making_a_trainer(module):
    assert trainer_class("trainers:Failing") is Failing
