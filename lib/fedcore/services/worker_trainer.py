"""What a user of fl-workerd implements, and the checks on all that goes in and out of it.

A WorkerTrainer knows a model and central, labelled data, never the protocol. ``load_trainer`` makes one of
``module:Class``; CheckedTrainer is what the worker drives: names, shapes and finiteness are looked at in both
directions, and the last weights that were good are kept, for the day when the servers' are not.

All calls of a trainer come from one thread, one after the other; the constructor is called in the main thread.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from twisted.logger import Logger

from fedcore.errors import ConfigError, LocalError, NonFinite, ShapeMismatch
from fedcore.wire.arrays import Floats, all_finite
from fedcore.wire.messages import FeatureMap

EXAMPLE = "fedexamples.lenet_worker_numpy:NumpyLeNetWorker"  # needs no torch

log = Logger()

Weights = Mapping[str, npt.NDArray[np.float32]]


class WorkerTrainer(Protocol):
    """The user's side of hybrid training: ``fl-workerd --trainer module:Class`` makes one and drives it.

    The constructor is called as ``Class(options, device)`` with the keys and values of ``fedcore.worker.options`` and
    one of "cpu", "cuda" and "cuda:N", and should check the options. ConfigError says what is wrong with them.
    """

    def weights(self) -> Weights:
        """Return the weights of the model as they are now.

        Returns:
            Name -> float32 array of the model's shape; the names are those of the job's model, all of them or some, the
            same at every call. Arrays that are not float32 are converted. They are copied before the next call.
        """
        ...

    def load(self, weights: Weights) -> None:
        """Go on from other weights.

        Args:
            weights: the names of ``weights()``, each with its shape; finite, read-only, and to be copied.
        """
        ...

    def train(self, steps: int) -> tuple[float, float]:
        """Train on the central data.

        Args:
            steps: how many steps of the optimizer, at least 1. The data may be gone through more than once; where one
                call stopped the next one should go on.

        Returns:
            Loss and accuracy (0..1) of the trained weights, both finite.

        Raises:
            NonFinite: training has diverged. The worker leaves this iteration to others, and ``load`` is called before
                the next training. Any other exception ends the worker.
        """
        ...


class TrainerFailed(LocalError):
    """The user's code raised what it should not, or broke its promise."""


@dataclass(frozen=True, slots=True)
class Training:
    """What a training has given.

    Attributes:
        loss: finite.
        accuracy: finite.
        weights: flat, the trainer's names; finite.
    """

    loss: float
    accuracy: float
    weights: tuple[FeatureMap, ...]


def read_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs; a value is JSON if it can be read as such, else text."""
    options = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options


def choose_device(wanted: str) -> str:
    """Return where to compute: "auto" becomes "cuda" if there is one, else "cpu".

    Raises:
        ConfigError: a CUDA device is asked for by name and is not there.
    """
    if wanted == "cpu":
        return wanted
    try:
        import torch
    except ImportError as error:
        if wanted == "auto":
            return "cpu"
        raise ConfigError(
            f"fedcore.worker.device is {wanted}, but torch is not installed",
            hint="pip install 'fedcore[worker]'",
        ) from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return "cuda" if count else "cpu"
    if int(wanted.partition(":")[2] or 0) >= count:
        raise ConfigError(
            f"fedcore.worker.device is {wanted}, but torch sees {count} CUDA devices here",
            hint="set it to auto or cpu, or mend the driver",
        )
    return wanted


def trainer_class(path: str) -> Callable[[Mapping[str, Any], str], WorkerTrainer]:
    """Return the class that ``module:Class`` names.

    Raises:
        ConfigError: there is none, or it lacks a method of WorkerTrainer.
    """
    module_name, colon, class_name = path.partition(":")
    if not (module_name and colon and class_name):
        raise ConfigError(
            f"the trainer {path!r} is not written as module:Class",
            hint=f"give fedcore.worker.trainer or --trainer, such as {EXAMPLE}",
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        hint = _missing_module(error.name or "", module_name)
        raise ConfigError(
            f"the trainer {path} cannot be had: {type(error).__name__}: {error}", hint=hint
        ) from error
    except Exception as error:  # whatever foreign code raises when it is imported
        log.failure("the trainer {path} cannot be imported", path=path)
        raise ConfigError(f"the trainer {path} cannot be had: {type(error).__name__}: {error}") from error
    missing = [name for name in ("weights", "load", "train") if not callable(getattr(found, name, None))]
    if missing:
        raise ConfigError(
            f"the trainer {path} has no {'(), '.join(missing)}()",
            hint="what it must have is in fedcore.services.worker_trainer.WorkerTrainer",
        )
    return found  # type: ignore[no-any-return]


def _missing_module(missing: str, trainers: str) -> str:
    """Return the remedy where a module is missing: the trainer's own one, or one that it needs."""
    if f"{trainers}.".startswith(f"{missing}."):
        return "looked for in the working directory, then in PYTHONPATH and the installed packages"
    if missing == "torch":
        return f"pip install 'fedcore[worker]', or take one that needs no torch, such as {EXAMPLE}"
    return f"install what has the module {missing}; the trainer's module imports it"


def load_trainer(path: str, options: Mapping[str, Any], device: str) -> CheckedTrainer:
    """Make the trainer that ``module:Class`` names.

    Args:
        path: ``module:Class``.
        options: see WorkerTrainer.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: it cannot be made.
    """
    made = trainer_class(path)
    try:
        return CheckedTrainer(made(dict(options), device))
    except ConfigError as error:
        raise ConfigError(f"the trainer {path}: {error}") from error
    except Exception as error:  # whatever foreign code raises
        log.failure("the trainer {path} cannot be made", path=path)
        raise ConfigError(f"the trainer {path} cannot be made: {type(error).__name__}: {error}") from error


class CheckedTrainer:
    """A trainer, with everything checked that goes in and out.

    Attributes:
        names: of its weights, in bytewise order.
        total_floats: values of all of them.
    """

    def __init__(self, trainer: WorkerTrainer) -> None:
        """Take a trainer; its weights tell the shapes.

        Raises:
            ConfigError: it has no weights, or what it has are no arrays of numbers.
        """
        self._trainer = trainer
        try:
            arrays = {name: np.asarray(value, np.float32) for name, value in trainer.weights().items()}
        except (TypeError, ValueError) as error:
            raise ConfigError(f"its weights are no arrays of numbers: {error}") from error
        if not sum(array.size for array in arrays.values()):
            raise ConfigError("its model has no weights")
        self._shapes = {name: arrays[name].shape for name in sorted(arrays, key=str.encode)}
        self._good: dict[str, Floats] = {}
        self.names = tuple(self._shapes)
        self.total_floats = sum(array.size for array in arrays.values())

    def take(self, weights: Iterable[FeatureMap]) -> None:
        """Give the trainer the weights of the servers.

        Raises:
            ShapeMismatch: they are not those that it trains.
            NonFinite: one of them holds NaN or infinity; the trainer has not seen any of them.
            TrainerFailed: the trainer raised something.
        """
        given = {item.weight_fullname or "": item.data for item in weights}
        shaped: dict[str, Floats] = {}
        for name, shape in self._shapes.items():
            values = given.get(name)
            if values is None or values.size != math.prod(shape):
                size = "no" if values is None else values.size
                raise ShapeMismatch(
                    f"the servers sent {size} values of {name!r}, the trainer has {math.prod(shape)}"
                )
            if not all_finite(values):
                raise NonFinite(f"weight {name!r} holds NaN or infinity")
            shaped[name] = values.reshape(shape)
        self._load(shaped)
        self._good = shaped

    def take_last_good(self) -> None:
        """Give the trainer the weights that were good the last time.

        Raises:
            TrainerFailed: there are none, or the trainer raised something.
        """
        if not self._good:
            raise TrainerFailed("there are no good weights to go back to")
        self._load(self._good)

    def train(self, steps: int) -> Training:
        """Train, and return what came of it.

        Raises:
            NonFinite: training has diverged.
            TrainerFailed: the trainer raised something, or its weights are others than before.
        """
        try:
            result = self._trainer.train(steps)
            arrays = self._trainer.weights()
        except NonFinite:
            raise
        except Exception as error:  # whatever foreign code raises
            raise TrainerFailed(f"training has failed: {type(error).__name__}: {error}") from error
        loss, accuracy = self._figures(result)
        if not (math.isfinite(loss) and math.isfinite(accuracy)):
            raise NonFinite(f"the loss is {loss}, the accuracy {accuracy}")
        trained = self._checked(arrays)
        self._good = trained
        return Training(
            loss, accuracy, tuple(FeatureMap(name, array.reshape(-1)) for name, array in trained.items())
        )

    def _figures(self, result: Any) -> tuple[float, float]:
        """Return what ``train`` of the trainer has returned, once it is found to be two numbers."""
        try:
            loss, accuracy = (float(value) for value in result)
        except Exception:  # whatever foreign objects raise
            kind = type(self._trainer)
            raise TrainerFailed(
                f"train() of {kind.__module__}:{kind.__qualname__} must return (loss, accuracy), not {result!r:.80}"
            ) from None
        return loss, accuracy

    def _checked(self, arrays: Weights) -> dict[str, Floats]:
        if set(arrays) != set(self.names):
            odd = ", ".join(sorted(set(arrays) ^ set(self.names)))
            raise TrainerFailed(f"the trainer's weights have other names than at its start: {odd}")
        checked = {}
        for name, shape in self._shapes.items():
            array = np.array(arrays[name], np.float32)  # a copy: the trainer may go on using its own
            if array.shape != shape:
                raise TrainerFailed(
                    f"weight {name!r} has the shape {array.shape}, at the start it had {shape}"
                )
            if not all_finite(array.reshape(-1)):
                raise NonFinite(f"trained weight {name!r} holds NaN or infinity")
            array.flags.writeable = False
            checked[name] = array
        return checked

    def _load(self, weights: dict[str, Floats]) -> None:
        try:
            self._trainer.load(weights)
        except Exception as error:  # whatever foreign code raises
            raise TrainerFailed(f"loading weights has failed: {type(error).__name__}: {error}") from error
