"""fl-workerd: trains the aggregated model of a hybrid job further, on central labelled data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fedcore.config import Role, address_of_instance, parse_address
from fedcore.config.settings import parse_pairs, parse_training_device
from fedcore.errors import ConfigError
from fedcore.net.sd_notify import Notifier
from fedcore.observe.health import Readiness
from fedcore.observe.metrics import WorkerMetrics
from fedcore.services.admin import admin_site
from fedcore.services.worker import Worker, require_hybrid
from fedcore.services.worker_trainer import choose_device, load_trainer, read_options, trainer_class
from fldaemons import launch
from fldaemons.configuration import Configuration

LARGEST_FREQUENCY = 2**32 - 1  # as of fedcore.worker.sync_frequency
TRAINER_S = 600.0  # for the trainer to be made: it may import torch and read all its data then

EXAMPLES = """
\b
Examples:
  fl-workerd --yaml-config /etc/fl/fl.yaml
  fl-workerd --yaml-config fl.yaml --trainer fedexamples.lenet_worker_numpy:NumpyLeNetWorker --set seed=7
  fl-workerd --yaml-config fl.yaml --trainer mine:Trainer --sync-frequency 50 --device cuda:1
  fl-workerd --yaml-config fl.yaml --instance 1       metrics at port 6967
"""
EXIT_CODES = """
\b
Exit codes:
  0   it was told to stop
  78  the configuration, or trainer and job together, cannot be used: mend it first
  2   the command line cannot be used: an unknown option, a value of the wrong kind
  1   anything else, such as an exception of the trainer: a new start may help
"""


@click.command(epilog=EXAMPLES + launch.COMMON_HELP + EXIT_CODES)
@launch.common_options
@launch.both_spellings(
    "--trainer", help="Who trains, as module:Class; looked for in the current directory first."
)
@click.option(
    "--set",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Tell the trainer something; before what fedcore.worker.options says.",
)
@launch.both_spellings(
    "--sync-frequency", type=int, help="Training steps between a pull and a push, 1 or more."
)
@launch.both_spellings("--device", help="Where the trainer computes: auto, cpu, cuda or cuda:N.")
@launch.both_spellings(
    "--instance",
    type=click.IntRange(0, 99),
    default=0,
    help="Number N of this worker on its host: configured port + N.",
)
def main(**options: Any) -> None:
    """Train a job's aggregated model further: pull it, train, push it.

    Once the job is finished it waits for a new instance of the job, as the servers do.

    It keeps nothing that the servers do not have: it may be stopped, restarted, or run several times. Of several
    workers the first to push counts in an iteration.
    """
    sys.path.insert(0, "")  # a trainer's module is looked for in the current directory first
    workers: list[Worker] = []
    code = launch.run("fl-workerd", lambda reactor, notifier: build(options, reactor, notifier, workers))
    sys.stdout.flush()
    sys.stderr.flush()
    if workers and workers[0].training:
        os._exit(
            code
        )  # the trainer is deep in a training, and may not be where an interpreter can end in order
    sys.exit(code)


def build(
    options: dict[str, Any], reactor: Any, notifier: Notifier, built: list[Worker]
) -> launch.Daemon | None:
    """Build the worker from its command line, and add it to ``built``.

    Raises:
        ConfigError: the configuration cannot be used.
    """
    path: Path = options["yaml_config"]
    configuration = Configuration.read(path, Role.WORKER)
    settings = configuration.settings
    own = settings.fedcore.worker
    admin = address_of_instance(own.admin_address, options["instance"])
    if options["admin_address"]:
        admin = parse_address(options["admin_address"])
    device = choose_device(parse_training_device(options["device"] or own.device))
    trainer_path = options["trainer"] or own.trainer
    frequency = own.sync_frequency if options["sync_frequency"] is None else options["sync_frequency"]
    if not 1 <= frequency <= LARGEST_FREQUENCY:
        raise ConfigError(f"--sync-frequency {frequency} is out of range", hint=f"1..{LARGEST_FREQUENCY}")
    require_hybrid(settings)
    trainer_class(trainer_path)
    told = read_options(own.options) | read_options(
        pair for text in options["options"] for pair in parse_pairs(text)
    )
    links = launch.links_of(configuration, options, reactor)
    metrics = WorkerMetrics()
    redis = launch.redis_of(settings, metrics.redis_errors.inc, reactor)
    if options["check_config"]:
        click.echo(f"{path}: the configuration is good")
        return None
    notifier.extend(TRAINER_S)
    trainer = load_trainer(trainer_path, told, device)
    doing = _Doing()
    node_links = links if links is not None and links.encrypts_nodes else None
    worker = Worker(settings, frequency, trainer, redis, metrics, reactor, doing.tell, node_links)
    if settings.enable_ssl and node_links is None:
        launch.log.warn("fedcore.node.tls is false: keep the port of the node channel inside the subnet")
    readiness = Readiness(worker.checks())
    daemon = launch.Daemon(
        configuration,
        [launch.Listener("admin", admin, admin_site(readiness, metrics))],
        [*worker.services, *launch.certificate_watch(configuration, links, metrics, reactor)],
        status=lambda: readiness.status(doing.text),
        follow=doing.follow,
    )
    worker.on_end = daemon.give_up
    built.append(worker)
    launch.log.info(
        "training {weights} weights, {floats} values, by {trainer} on {device}; {steps} steps between pull and push",
        weights=len(trainer.names),
        floats=trainer.total_floats,
        trainer=trainer_path,
        device=device,
        steps=frequency,
    )
    return daemon


class _Doing:
    """What the worker has said last that it is about."""

    def __init__(self) -> None:
        self.text = "starting"
        self._changed: Callable[[], None] = lambda: None

    def tell(self, text: str) -> None:
        self.text = text
        self._changed()

    def follow(self, changed: Callable[[], None]) -> None:
        self._changed = changed
