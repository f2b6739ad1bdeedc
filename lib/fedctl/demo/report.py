"""What came of a demo: the verdict of the test set after each iteration, and the files that keep it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore import __version__
from fedcore.models.durable import replace_file
from fedctl.demo.plan import Plan
from fedexamples import datasets, lenet

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class IterationRecord:
    """One iteration, judged on the test set.

    Attributes:
        number: from 1.
        loss: mean cross-entropy of the new model, in nats.
        accuracy: share of the test images that the new model reads rightly.
        clients: updates in the new model.
        seconds: from the end of the iteration before; of the first one, from the first device's arrival.
    """

    number: int
    loss: float
    accuracy: float
    clients: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """One device's part.

    Attributes:
        name: its client id.
        samples: class -> samples it holds.
        iterations: that it completed.
        loss: of its last local training, None if there was none.
        accuracy: of the last model it was given, on its own samples; None if there was none.
    """

    name: str
    samples: Mapping[int, int]
    iterations: int
    loss: float | None
    accuracy: float | None


@dataclass
class Report:
    """A whole run.

    Attributes:
        plan: what was to be trained.
        test_samples: size of the test set.
        iterations: in order.
        devices: filled in at the end.
        seconds: from the first process's start to the last model.
    """

    plan: Plan
    test_samples: int
    iterations: list[IterationRecord] = field(default_factory=list)
    devices: list[DeviceRecord] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def updates(self) -> int:
        """Updates in all models."""
        return sum(record.clients for record in self.iterations)

    @property
    def training_seconds(self) -> float:
        """From the first device's arrival to the last model."""
        return sum(record.seconds for record in self.iterations)

    @property
    def updates_per_second(self) -> float:
        """Mean rate while training."""
        return self.updates / self.training_seconds if self.training_seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return what ``--json`` writes."""
        return {
            "accuracy": [record.accuracy for record in self.iterations],
            "loss": [record.loss for record in self.iterations],
            "clients": [record.clients for record in self.iterations],
            "iteration_seconds": [round(record.seconds, 3) for record in self.iterations],
            "seconds": round(self.seconds, 3),
            "training_seconds": round(self.training_seconds, 3),
            "updates": self.updates,
            "updates_per_second": round(self.updates_per_second, 3),
            "test_samples": self.test_samples,
            **asdict(self.plan),
            "trainer": self.plan.trainer,
            "samples_per_device": [sum(device.samples.values()) for device in self.devices],
            "fedcore": __version__,
        }


def save_json(report: Report, path: Path) -> None:
    """Write a report, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, [json.dumps(report.as_json(), indent=1).encode(), b"\n"])


def save_curves(report: Report, path: Path) -> None:
    """Draw accuracy and loss over the iterations.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    numbers = [record.number for record in report.iterations]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.add_subplot()
    left.plot(numbers, [100 * record.accuracy for record in report.iterations], "o-", color="tab:blue")
    left.set(xlabel="iteration", ylim=(0, 101))
    left.set_ylabel("test accuracy, %", color="tab:blue")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(alpha=0.3)
    right = left.twinx()
    right.plot(numbers, [record.loss for record in report.iterations], "s--", color="tab:red", markersize=4)
    right.set_ylim(bottom=0)
    right.set_ylabel("test loss, nats", color="tab:red")
    plan = report.plan
    figure.suptitle(f"LeNet-5 on {plan.data}, {plan.devices} devices, uneven shares (alpha {plan.alpha:g})")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, [image.getvalue()])


class Examiner:
    """Judges models on a test set that no device has seen."""

    def __init__(self, data: datasets.Dataset) -> None:
        with contextlib.suppress(ImportError):
            from threadpoolctl import threadpool_limits  # the devices need the other cores

            threadpool_limits(1, user_api="blas")
        self._images = data.test_images
        self._labels = data.test_labels

    def __len__(self) -> int:
        return len(self._labels)

    def examine(self, weights: Mapping[str, Floats]) -> tuple[float, float]:
        """Return mean loss in nats and accuracy, 0..1, of flat weights as they come off the wire."""
        model = lenet.shaped(weights)
        step = lenet.PREDICT_BATCH
        batches = (self._images[start : start + step] for start in range(0, len(self._labels), step))
        scores = np.concatenate([lenet.logits(model, batch) for batch in batches]).astype(np.float64)
        scores -= scores.max(axis=1, keepdims=True)
        own = scores[np.arange(len(self._labels)), self._labels]
        loss = np.mean(np.log(np.exp(scores).sum(axis=1)) - own)
        return float(loss), float(np.mean(scores.argmax(axis=1) == self._labels))
