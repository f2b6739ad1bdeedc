"""The LeNet of ``fedexamples.lenet``, trained by a worker on central, labelled data; and the options of such a worker.

    fl-workerd --yaml-config fl.yaml --trainer fedexamples.lenet_worker_numpy:NumpyLeNetWorker --set central=200

A WorkerTrainer needs no framework, as can be seen here. ``fedexamples.lenet_worker`` is the same in torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import ConfigError, NonFinite
from fedexamples import datasets, lenet

_DEFAULTS: dict[str, Any] = {
    "data": "digits",
    "shard": 0,
    "shards": 1,
    "seed": 0,
    "alpha": 100.0,
    "central": 0,
    "batch_size": lenet.BATCH_SIZE,
    "learning_rate": lenet.LEARNING_RATE,
    "momentum": lenet.MOMENTUM,
    "threads": 1,
}
_DATA = ("data", "shard", "shards", "seed", "alpha", "central")


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a LeNet's worker is told.

    Attributes:
        part: which samples it holds.
        batch_size: samples of a step, >= 1.
        learning_rate: step size, > 0.
        momentum: share of the last step that is repeated, 0..1.
        threads: to compute with, >= 1.
    """

    part: datasets.ShardOptions
    batch_size: int
    learning_rate: float
    momentum: float
    threads: int

    @classmethod
    def parse(cls, options: Mapping[str, Any], whose: str) -> WorkerOptions:
        """Read options: any of those above, and of ``part`` data, seed, and central, or shard, shards and alpha.

        Args:
            options: name -> value.
            whose: the class that is told, for messages.

        Raises:
            ConfigError: an option is unknown, malformed or out of range.
        """
        unknown = sorted(set(options) - set(_DEFAULTS))
        if unknown:
            raise ConfigError(
                f"{', '.join(unknown)} is no option of {whose}", hint=f"known: {', '.join(_DEFAULTS)}"
            )
        chosen = {**_DEFAULTS, **options}
        return cls(
            batch_size=int(_number("batch_size", chosen["batch_size"], least=1)),
            learning_rate=_number("learning_rate", chosen["learning_rate"], least=1e-9),
            momentum=_number("momentum", chosen["momentum"], least=0, most=1),
            threads=int(_number("threads", chosen["threads"], least=1)),
            part=datasets.ShardOptions.parse(**{name: chosen[name] for name in _DATA}),
        )

    def load(self) -> datasets.Shard:
        """Load the worker's samples: the central ones, if there are any, else those of a client.

        Raises:
            ConfigError: as of ``datasets.load_shard``.
        """
        return datasets.load_central(self.part) if self.part.central else datasets.load_shard(self.part)


def shuffled(samples: int, batch_size: int, seed: tuple[int, ...]) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the sample numbers of one batch after the other, epoch after epoch, each in an order of its own.

    Args:
        samples: how many there are, >= 1.
        batch_size: samples of a batch, >= 1; the last one of an epoch takes what is left.
        seed: same seed, same order.
    """
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(samples)
        for start in range(0, samples, batch_size):
            yield order[start : start + batch_size]


class NumpyLeNetWorker:
    """LeNet-5 on central data in plain numpy, by stochastic gradient descent with momentum.

    The momentum goes on from one training to the next. Accuracy is that on about one in eight of the worker's own
    samples, which it does not train on.

    Args:
        options: see ``WorkerOptions``.
        device: "cpu".

    Raises:
        ConfigError: an option is unknown, malformed or out of range, or the device is another one.
    """

    def __init__(self, options: Mapping[str, Any], device: str) -> None:
        if device != "cpu":
            raise ConfigError(f"numpy does not compute on {device}", hint="set fedcore.worker.device to cpu")
        self._options = WorkerOptions.parse(options, type(self).__name__)
        with contextlib.suppress(ImportError):
            from threadpoolctl import threadpool_limits

            threadpool_limits(self._options.threads, user_api="blas")
        part = self._options.part
        self._data = self._options.load()
        samples = len(self._data.train_labels)
        self._batches = shuffled(samples, self._options.batch_size, (part.seed, part.shard))
        self._weights = lenet.initial_weights(part.seed)
        self._velocity = {name: np.zeros_like(values) for name, values in self._weights.items()}

    def weights(self) -> dict[str, npt.NDArray[np.float32]]:
        return self._weights

    def load(self, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
        self._weights = {name: np.array(values) for name, values in weights.items()}

    def train(self, steps: int) -> tuple[float, float]:
        total = 0.0
        for batch in islice(self._batches, steps):
            images, labels = self._data.train_images[batch], self._data.train_labels[batch]
            loss, gradients = lenet.loss_and_gradients(self._weights, images, labels)
            lenet.descend(
                self._weights, self._velocity, gradients, self._options.learning_rate, self._options.momentum
            )
            total += loss / steps
        if not np.isfinite(total):
            for values in self._velocity.values():
                values[...] = 0
            raise NonFinite(f"training diverged: the loss is {total}", hint="lower the learning rate")
        return total, lenet.accuracy(
            self._weights, self._data.evaluation_images, self._data.evaluation_labels
        )


def _number(name: str, value: Any, *, least: float, most: float = 1e9) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ConfigError(f"{name}={value!r} is out of range", hint=f"allowed: {least:g}..{most:g}")
    return value
