r"""The LeNets of ``fedexamples.lenet`` and ``fedexamples.lenet_torch``, trained in single steps by cloud workers.

    fl-client --server http://10.0.0.1:6666 --rule Scaffold --sync-frequency 30 \
              --trainer fedexamples.silo:LeNetSilo --set shard=0 --set shards=3

A step is plain stochastic gradient descent on one batch. There is no momentum: it would live on from before one
synchronisation to after it, where the weights are others. torch is imported only by who asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedclient.silo import LocalStep
from fedclient.trainer import FitResult
from fedcore.errors import ConfigError
from fedexamples import lenet

LEARNING_RATE = 0.05  # suits three uneven shards of "digits"; the server's configuration has the last word
FRAMEWORKS = ("numpy", "torch")

Weights = Mapping[str, npt.NDArray[np.float32]]


class LeNetSilo(lenet.LeNetTrainer):
    """One silo's LeNet.

    Args:
        framework: "numpy" or "torch".
        options: as of ``lenet.LeNetTrainer``: shard, shards, data, seed, alpha.

    Raises:
        ConfigError: an option is malformed or out of range.
    """

    def __init__(self, *, framework: str = "numpy", **options: int | str | float) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        if framework not in FRAMEWORKS:
            raise ConfigError(f"framework is {framework!r}", hint=" or ".join(FRAMEWORKS))
        self._gradients = lenet.loss_and_gradients
        if framework == "torch":
            import torch

            from fedexamples import lenet_torch

            torch.set_num_threads(1)
            self._gradients = lenet_torch.loss_and_gradients
        self._samples = lru_cache(maxsize=1)(self._order)

    def step(self, weights: Weights, step: LocalStep) -> FitResult:
        """Descend on the step's batch; all samples come once, in an order of its own, before one comes again."""
        images, labels = self._data.train_images, self._data.train_labels
        batches = max(1, len(labels) // step.batch_size)
        epoch, place = divmod(step.number - 1, batches)
        batch = self._samples(epoch)[place * step.batch_size : (place + 1) * step.batch_size]
        loss, gradients = self._gradients(lenet.shaped(weights), images[batch], labels[batch])
        trained = {}
        for name, values in weights.items():
            gradient = gradients[name].reshape(-1) + step.extra_gradient.get(name, np.float32(0))
            trained[name] = values - np.float32(step.learning_rate) * gradient
        return FitResult(trained, loss)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        random = np.random.default_rng((self._options.seed, self._options.shard, epoch))
        return random.permutation(len(self._data.train_labels))
