"""What a demo trains, and the files and command lines that make the daemons and devices do it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedcore.errors import ConfigError
from fedcore.models.formats import write_model
from fedexamples import datasets, lenet

FL_NAME = "demo"
WINDOW_MS = 120_000  # a device that is only slow, on a busy machine, shall not fail an iteration
DEVICE_POLL_S = 0.05  # a federation of phones asks every ten seconds; here everybody is at hand
EPOCHS = {"digits": lenet.EPOCHS, "fashion-mnist": 1}  # clothes: 40 times as many samples, one pass will do


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the demo's processes listen, each "host:port"."""

    redis: str
    devices: str
    server_admin: str
    scheduler: str
    scheduler_admin: str
    nodes: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What is trained.

    Attributes:
        data: "digits" or "fashion-mnist".
        devices: number of clients, all of which take part in every iteration.
        iterations: number of the last one.
        seed: decides first weights, division of the data and order of training.
        alpha: concentration of the Dirichlet distribution that divides the data.
        torch: whether devices train with torch rather than numpy.
    """

    data: str
    devices: int
    iterations: int
    seed: int
    alpha: float
    torch: bool

    @property
    def trainer(self) -> str:
        """The class that devices train with, module:Class."""
        return "fedexamples.lenet_torch:TorchLeNetTrainer" if self.torch else "fedexamples.lenet:LeNetTrainer"

    def check(self) -> None:
        """Find out what is missing before anything is started.

        Raises:
            ConfigError: torch is not installed.
        """
        if self.torch and importlib.util.find_spec("torch") is None:
            raise ConfigError(
                "torch is not installed", hint="make demo TORCH=1, or pip install 'fedcore[torch]'"
            )

    def device_arguments(self, shard: int, addresses: Addresses) -> list[str]:
        """Return the arguments of fl-client for one device."""
        settings = {
            "shard": shard,
            "shards": self.devices,
            "data": self.data,
            "seed": self.seed,
            "alpha": self.alpha,
        }
        return [
            *("--server", f"http://{addresses.devices}"),
            *("--trainer", self.trainer),
            *(word for name, value in settings.items() for word in ("--set", f"{name}={value}")),
            *("--fl-name", FL_NAME),
            *("--client-id", f"device-{shard}"),
            *("--poll-interval", str(DEVICE_POLL_S)),
            "--json",
        ]


def write_configuration(path: Path, plan: Plan, addresses: Addresses) -> None:
    """Write the file that scheduler and server read."""
    configuration: dict[str, Any] = {
        "fl_name": FL_NAME,
        "fl_iteration_num": plan.iterations,
        "server_mode": "FEDERATED_LEARNING",
        "enable_ssl": False,
        "distributed_cache": {"address": addresses.redis},
        "round": {
            "start_fl_job_threshold": plan.devices,
            "start_fl_job_time_window": WINDOW_MS,
            "update_model_ratio": 1.0,
            "update_model_time_window": WINDOW_MS,
            "global_iteration_time_window": 2 * WINDOW_MS,
        },
        "summary": {"metrics_file": "metrics.json", "failure_event_file": "event.txt"},
        "client": {
            "client_epoch_num": EPOCHS[plan.data],
            "client_batch_size": lenet.BATCH_SIZE,
            "client_learning_rate": lenet.LEARNING_RATE,
        },
        "fedcore": {
            "scheduler": {
                "manage_address": addresses.scheduler,
                "admin_address": addresses.scheduler_admin,
            },
            "server": {
                "http_address": addresses.devices,
                "admin_address": addresses.server_admin,
                "tcp_port": int(addresses.nodes.rpartition(":")[2]),
                "checkpoint_dir": "models",
                "model": "initial.safetensors",
            },
        },
    }
    head = "# Written by fl demo; every option is explained in etc/fl.yaml.sample.\n"
    path.write_text(head + yaml.safe_dump(configuration, sort_keys=False))


def write_initial_model(path: Path, seed: int) -> None:
    """Write a LeNet-5 that has learned nothing yet, as safetensors."""
    write_model(path, lenet.initial_weights(seed), (), {})


def divide(plan: Plan, data: datasets.Dataset) -> list[dict[int, int]]:
    """Return class -> samples for each device, training and evaluation together.

    Raises:
        ConfigError: there are too many devices for the data.
    """
    labels = data.train_labels
    parts = datasets.dirichlet_shards(labels, plan.devices, plan.alpha, plan.seed)
    counts = [[int((labels[part] == label).sum()) for label in range(datasets.CLASSES)] for part in parts]
    return [dict(enumerate(row)) for row in counts]
