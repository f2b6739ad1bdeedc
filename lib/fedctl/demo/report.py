"""What came of a demo: the verdict of the test set after each iteration, and the files that keep it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
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
        accuracy: of the last model it was given, on the samples that it holds out; None if there was none.
    """

    name: str
    samples: Mapping[int, int]
    iterations: int
    loss: float | None
    accuracy: float | None

    @property
    def held_out(self) -> int:
        """Samples that it does not train on, but judges by."""
        count: int = round(sum(self.samples.values()) * datasets.EVALUATION_SHARE)
        return count


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


def save_json(figures: Mapping[str, Any], path: Path) -> None:
    """Write figures, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, [json.dumps(figures, indent=1).encode(), b"\n"])


def compared(reports: Sequence[Report]) -> dict[str, Any]:
    """Return what ``--json`` writes of several runs.

    Of several rules: rule -> what it writes of one. Of the last run with a worker: the same as of a single run, and the
    curves and the duration of the first one, which was without.
    """
    if reports[-1].plan.worker:
        first = reports[0].as_json()
        without = {f"{name}_without_worker": first[name] for name in ("accuracy", "loss", "seconds")}
        return {**reports[-1].as_json(), **without, "worker_trainer": reports[-1].plan.worker_trainer}
    return {"rules": {str(report.plan.rule): report.as_json() for report in reports}}


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
    figure.suptitle(_title(plan))
    _save_figure(figure, path)


def save_compared_curves(reports: Sequence[Report], path: Path) -> None:
    """Draw the accuracy of several runs over the iterations.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for report in reports:
        numbers = [record.number for record in report.iterations]
        accuracy = [100 * record.accuracy for record in report.iterations]
        axes.plot(numbers, accuracy, "o-", markersize=4, label=report.plan.name)
    axes.set(xlabel="iteration", ylabel="test accuracy, %", ylim=(0, 101))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.suptitle(_title(reports[-1].plan))
    _save_figure(figure, path)


def _title(plan: Plan) -> str:
    few = f"{plan.devices} {plan.who}s" + (f" with {plan.labelled} labels each" if plan.labelled else "")
    budget = f" with epsilon {plan.update_epsilon:g}" if plan.update_epsilon else ""
    protected = "" if plan.encrypt == "NOT_ENCRYPT" else f", {plan.encrypt}{budget}"
    packed = ", compressed" if plan.compress else ""
    return f"LeNet-5 on {plan.data}, {few}, uneven shares (alpha {plan.alpha:g}){protected}{packed}"


def _save_figure(figure: Any, path: Path) -> None:
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
