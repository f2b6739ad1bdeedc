"""What a demo trains, and the files and command lines that make the daemons and devices do it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fedclient.rules import Rule
from fedcore.errors import ConfigError
from fedcore.models.formats import write_model
from fedctl.demo import certificates
from fedexamples import datasets, lenet, silo

FL_NAME = "demo"
WINDOW_MS = 120_000  # a device that is only slow, on a busy machine, shall not fail an iteration
DEVICE_POLL_S = 0.05  # a federation of phones asks every ten seconds; here everybody is at hand
SILO_STEPS = 30  # between two uploads of a cloud worker; about one pass over its share of the digits
SILO_IID_RATE = 0.01  # of FedProx
LABELLED = 16  # samples of each device beside a worker: too few to learn all digits from
FEW_EPOCHS, FEW_LEARNING_RATE = (
    4,
    0.01,
)  # of these: more passes at a lower rate, as a batch holds all that they have
WORKER_SAMPLES = 200
WORKER_STEPS = 10  # between pull and push: not quite an epoch of its samples
WORKER_LEARNING_RATE = 0.01  # its momentum goes on from iteration to iteration, so less than a device's
# Few devices learn little from noisy updates: with eight of them these budgets protect hardly anything, and with
# smaller ones nothing is learned (docs/PRIVACY.md).
EPSILONS = {"DP_ENCRYPT": 50.0, "SIGNDS": 100.0}
DP_DELTA = 0.01
SIGN_STEP = 0.5
ENCRYPT_TYPES = ("PW_ENCRYPT", *EPSILONS)
MASKS = "PW_ENCRYPT"
FEWEST_MASKED = 2  # devices: one alone has nobody to hide among
UNPACKED = (MASKS, "SIGNDS")  # what has uploads that cannot be compressed
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
    worker_admin: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What is trained.

    Attributes:
        data: "digits" or "fashion-mnist".
        devices: number of clients, all of which take part in every iteration.
        iterations: number of the last one.
        seed: decides first weights, division of the data and order of training.
        alpha: concentration of the Dirichlet distribution that divides the data.
        torch: whether torch trains rather than numpy.
        rule: of aggregation, if cloud workers train rather than devices; they are the plan's "devices" then.
        central: samples that are kept back for a worker.
        labelled: samples of each device, 0 for all of its share.
        worker: whether a worker trains each aggregate further.
        tls: whether devices, operators and nodes use TLS.
        encrypt: the encrypt type, in the word of the configuration.
        epsilon: of DP_ENCRYPT or SIGNDS in each iteration, None for the demo's own.
        compress: whether uploads and downloads are compressed, where they can be.
    """

    data: str
    devices: int
    iterations: int
    seed: int
    alpha: float
    torch: bool
    rule: Rule | None = None
    central: int = 0
    labelled: int = 0
    worker: bool = False
    tls: bool = False
    encrypt: str = "NOT_ENCRYPT"
    epsilon: float | None = None
    compress: bool = False

    @property
    def scheme(self) -> str:
        """Of the URLs of devices and operators."""
        return "https" if self.tls else "http"

    @property
    def daemon_arguments(self) -> list[str]:
        """What every daemon is given."""
        return ["--yaml-config", "fl.yaml", *(certificates.daemon_arguments() if self.tls else [])]

    @property
    def name(self) -> str:
        """What this plan is called beside others."""
        if self.rule is not None:
            return str(self.rule)
        return "with worker" if self.worker else "without worker"

    @property
    def server_mode(self) -> str:
        """In the word of the configuration."""
        if self.rule is not None:
            return "CLOUD_TRAINING"
        return "HYBRID_TRAINING" if self.worker else "FEDERATED_LEARNING"

    @property
    def epochs(self) -> int:
        """Passes of a device over its samples in an iteration."""
        return FEW_EPOCHS if self.labelled else EPOCHS[self.data]

    @property
    def learning_rate(self) -> float:
        """Of devices or silos."""
        if self.rule is not None:
            rate: float = silo.LEARNING_RATE
        else:
            rate = FEW_LEARNING_RATE if self.labelled else lenet.LEARNING_RATE
        return rate

    @property
    def who(self) -> str:
        """One of those who train."""
        return "device" if self.rule is None else "silo"

    @property
    def trainer(self) -> str:
        """The class that devices train with, module:Class."""
        if self.rule is not None:
            return "fedexamples.silo:LeNetSilo"
        return "fedexamples.lenet_torch:TorchLeNetTrainer" if self.torch else "fedexamples.lenet:LeNetTrainer"

    @property
    def worker_trainer(self) -> str:
        """The class that the worker trains with, module:Class."""
        if self.torch:
            return "fedexamples.lenet_worker:LeNetWorker"
        return "fedexamples.lenet_worker_numpy:NumpyLeNetWorker"

    def check(self) -> None:
        """Find out what is missing before anything is started.

        Raises:
            ConfigError: torch is not installed, or too few devices are to mask their updates.
        """
        if self.encrypt == MASKS and self.devices < FEWEST_MASKED:
            raise ConfigError(
                f"{self.devices} device cannot mask its update: the sum would be its own",
                hint=f"--devices {FEWEST_MASKED} or more",
            )
        if self.torch and importlib.util.find_spec("torch") is None:
            raise ConfigError(
                "torch is not installed", hint="make demo TORCH=1, or pip install 'fedcore[torch]'"
            )

    @property
    def division(self) -> dict[str, int | str | float]:
        """How the data are divided, in the words of ``datasets.ShardOptions``."""
        scarce = {"central": self.central, "labelled": self.labelled}
        return {
            "shards": self.devices,
            "data": self.data,
            "seed": self.seed,
            "alpha": self.alpha,
            **{name: value for name, value in scarce.items() if value},
        }

    def device_arguments(self, shard: int, addresses: Addresses) -> list[str]:
        """Return the arguments of fl-client for one device."""
        settings = {
            "shard": shard,
            **self.division,
            **({"framework": "torch"} if self.torch and self.rule else {}),
        }
        return [
            *("--server", f"{self.scheme}://{addresses.devices}"),
            *(("--ca-file", str(certificates.CA_FILE)) if self.tls else ()),
            *("--trainer", self.trainer),
            *(word for name, value in settings.items() for word in ("--set", f"{name}={value}")),
            *("--fl-name", FL_NAME),
            *("--client-id", f"{self.who}-{shard}"),
            *self._silo_arguments(),
            *("--poll-interval", str(DEVICE_POLL_S)),
            "--json",
        ]

    def _silo_arguments(self) -> Iterable[str]:
        """Return what makes fl-client a cloud worker."""
        if self.rule is None:
            return ()
        rate = ("--iid-rate", str(SILO_IID_RATE)) if self.rule is Rule.FEDPROX else ()
        return ("--rule", self.rule, "--sync-frequency", str(SILO_STEPS), *rate)

    @property
    def aggregation(self) -> dict[str, Any]:
        """What the servers are told of the rule, in the words of the configuration."""
        match self.rule:
            case None | Rule.FEDAVG | Rule.FEDNOVA:
                more: dict[str, Any] = {}
            case Rule.FEDPROX:
                more = {"iid_rate": SILO_IID_RATE}
            case Rule.SCAFFOLD:
                more = {"total_client_num": self.devices}
        return {"aggregation_type": str(self.rule or Rule.FEDAVG), **more}

    @property
    def protection(self) -> dict[str, Any]:
        """How updates are protected and packed, in the words of the configuration."""
        own: dict[str, dict[str, Any]] = {
            "NOT_ENCRYPT": {},
            MASKS: {
                "pw_encrypt": {
                    "share_secrets_ratio": 1.0,
                    "cipher_time_window": WINDOW_MS,
                    "reconstruct_secrets_threshold": max(1, 2 * self.devices // 3),
                }
            },
            "DP_ENCRYPT": {"dp_encrypt": {"dp_eps": self.update_epsilon, "dp_delta": DP_DELTA}},
            "SIGNDS": {"signds": {"sign_eps": self.update_epsilon, "sign_global_lr": SIGN_STEP}},
        }
        configuration: dict[str, Any] = {"encrypt": {"encrypt_type": self.encrypt, **own[self.encrypt]}}
        if self.compress:
            upload = {} if self.encrypt in UNPACKED else {"upload_compress_type": "DIFF_SPARSE_QUANT"}
            configuration["compression"] = {**upload, "download_compress_type": "QUANT"}
        return configuration

    @property
    def rounds(self) -> int:
        """How many rounds of an iteration have a time window: two, and six more where masks are agreed on."""
        return 8 if self.encrypt == MASKS else 2

    @property
    def update_epsilon(self) -> float | None:
        """What one update may tell, of an encrypt type that has such a thing."""
        return self.epsilon or EPSILONS.get(self.encrypt)

    @property
    def worker_options(self) -> dict[str, int | str | float]:
        """What the worker's trainer is told."""
        return {
            "data": self.data,
            "seed": self.seed,
            "central": self.central,
            "learning_rate": WORKER_LEARNING_RATE,
        }


def beside_a_worker(plan: Plan) -> list[Plan]:
    """Return a plan for devices with few labels, and the same with a worker that has some."""
    scarce = replace(plan, central=WORKER_SAMPLES, labelled=LABELLED)
    return [scarce, replace(scarce, worker=True)]


def write_configuration(path: Path, plan: Plan, addresses: Addresses) -> None:
    """Write the file that scheduler and server read."""
    configuration: dict[str, Any] = {
        "fl_name": FL_NAME,
        "fl_iteration_num": plan.iterations,
        "server_mode": plan.server_mode,
        "enable_ssl": plan.tls,
        "distributed_cache": {"address": addresses.redis},
        "aggregation": plan.aggregation,
        "round": {
            "start_fl_job_threshold": plan.devices,
            "start_fl_job_time_window": WINDOW_MS,
            "update_model_ratio": 1.0,
            "update_model_time_window": WINDOW_MS,
            "global_iteration_time_window": plan.rounds * WINDOW_MS,
        },
        **plan.protection,
        "summary": {"metrics_file": "metrics.json", "failure_event_file": "event.txt"},
        "client": {
            "client_epoch_num": plan.epochs,
            "client_batch_size": lenet.BATCH_SIZE,
            "client_learning_rate": plan.learning_rate,
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
    if plan.tls:
        configuration["ssl"] = certificates.configuration()
        # Redis is the demo's own, on this machine, and not every redis-server has TLS.
        configuration["fedcore"]["redis"] = {"tls": "off"}
    if plan.worker:
        configuration["fedcore"]["worker"] = {
            "trainer": plan.worker_trainer,
            "options": ",".join(f"{name}={value}" for name, value in plan.worker_options.items()),
            "sync_frequency": WORKER_STEPS,
            "device": "cpu",
            "admin_address": addresses.worker_admin,
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
    parts = datasets.divide(labels, datasets.ShardOptions(shard=0, **plan.division))
    counts = [[int((labels[part] == label).sum()) for label in range(datasets.CLASSES)] for part in parts]
    return [dict(enumerate(row)) for row in counts]
