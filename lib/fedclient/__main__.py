"""``fl-client``: take part in a federated job from the command line.

Exit codes: 0 the job ended, or a signal stopped the client; 1 it failed; 2 the command line cannot be used.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click

from fedclient.client import Client, IterationReport
from fedclient.cloud import PATIENCE, SYNC_TYPES, CloudWorker
from fedclient.identity import DeviceIdentity, load_identity
from fedclient.protection import PrivacyOptions
from fedclient.rules import Rule
from fedclient.session import Policy
from fedclient.steps import Outcome
from fedcore.errors import ConfigError

EXAMPLES = """
Examples:

\b
  fl-client --server http://10.0.0.1:6666 --trainer mytrainer:Digits --fl-name digits
  fl-client --server https://fl-1:6666 --server https://fl-2:6666 --ca-file ca.pem \\
            --trainer mytrainer:Digits --set shard=3 --set data=/var/lib/digits --json
  fl-client --server http://10.0.0.1:6666 --trainer mytrainer:Digits \\
            --identity phone-1/chain.pem --identity-key phone-1/key.pem
  fl-client --server http://10.0.0.1:6666 --trainer mysilo:Digits --rule Scaffold --sync-frequency 50

A trainer is a class with load(), fit() and evaluate(), see fedclient.Trainer. With --rule this is a cloud
worker of a CLOUD_TRAINING job, and its trainer has step() for fit(), see fedclient.SiloTrainer. The module is
looked for in the current directory first. A first SIGINT or SIGTERM stops the client as soon as the trainer's
code returns, a second one at once.

\b
Exit codes:
  0   the job ended, or a signal stopped the client
  1   it failed, such as by an exception of the trainer
  2   the command line cannot be used
"""


class UsageFault(click.ClickException):
    """The command line cannot be used; one line, exit code 2."""

    exit_code = 2


def make_trainer(path: str, settings: dict[str, Any], methods: tuple[str, ...]) -> Any:
    """Import ``module:Class`` and call it with keyword arguments; it must have these methods.

    Raises:
        UsageFault: there is no such class, or it cannot be imported or made.
    """
    module_name, _, class_name = path.partition(":")
    if not module_name or not class_name:
        raise UsageFault(f"--trainer {path}: written as module:Class")
    try:
        made = getattr(importlib.import_module(module_name), class_name)(**settings)
    except ModuleNotFoundError as error:
        raise UsageFault(
            f"--trainer {path}: {error} ({_missing_module(error.name or '', module_name)})"
        ) from error
    except Exception as error:  # whatever foreign code raises
        logging.getLogger("fedclient").debug("the trainer cannot be made", exc_info=True)
        raise UsageFault(f"--trainer {path}: {type(error).__name__}: {error}") from error
    missing = [name for name in methods if not callable(getattr(made, name, None))]
    if missing:
        what = "SiloTrainer" if "step" in methods else "Trainer"
        raise UsageFault(f"--trainer {path}: it has no {'(), '.join(missing)}() (see fedclient.{what})")
    return made


def _missing_module(missing: str, trainers: str) -> str:
    """Return the remedy where a module is missing: the trainer's own one, or one that it needs."""
    if f"{trainers}.".startswith(f"{missing}."):
        return "looked for in the working directory, then in PYTHONPATH and the installed packages"
    return f"install what has the module {missing}; the trainer's module imports it"


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Read ``key=value`` pairs; a value is JSON if it can be read as such, else text."""
    settings = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageFault(f"--set {pair}: written as key=value")
        try:
            settings[key] = json.loads(text)
        except ValueError:
            settings[key] = text
    return settings


def read_identity(identity: str | None, key: str | None, password_file: str | None) -> DeviceIdentity | None:
    """Read the device's key and certificates, if it is to sign.

    Raises:
        UsageFault: options without the one that they belong to.
        ConfigError: a file cannot be used.
    """
    if identity is None:
        if key is not None or password_file is not None:
            raise UsageFault("--identity-key and --identity-password-file belong to --identity")
        return None
    password = b""
    if password_file is not None:
        try:
            password = Path(password_file).read_bytes().split(b"\n", 1)[0].rstrip(b"\r")
        except OSError as problem:
            raise UsageFault(f"cannot read {password_file}: {problem.strerror}") from problem
    return load_identity(Path(identity), None if key is None else Path(key), password)


def print_json(report: IterationReport) -> None:
    """Print one line per attempt at an iteration."""
    line = {
        "iteration": report.iteration,
        "outcome": report.outcome.value,
        "loss": report.loss,
        "accuracy": report.accuracy,
        "seconds": round(report.seconds, 3),
    }
    print(json.dumps(line), flush=True)


@contextlib.contextmanager
def stopping_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` at the first SIGINT or SIGTERM; a second one has its default effect.

    A handler interrupts the main thread anywhere, even while it holds a lock that ``stop`` wants. So it only
    puts a word into a queue made for that, and a thread of its own makes the call.
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    caught: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def handle(*_: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
        caught.put(True)

    def wait() -> None:
        if caught.get():
            stop()

    before = {number: signal.signal(number, handle) for number in signals}
    waiter = threading.Thread(target=wait, name="signals", daemon=True)
    waiter.start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        caught.put(False)
        waiter.join()


@click.command(
    epilog=EXAMPLES,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 110},
)
@click.option(
    "--server", "servers", multiple=True, required=True, metavar="URL", help="Server; may be repeated."
)
@click.option("--trainer", required=True, metavar="MODULE:CLASS", help="What to train.")
@click.option(
    "--set", "pairs", multiple=True, metavar="KEY=VALUE", help="Argument of the trainer; may be repeated."
)
@click.option("--fl-name", help="Name of the job.  [default: the trainer's class name]")
@click.option("--client-id", help="Identity of this client, unique in the job.  [default: a random UUID]")
@click.option(
    "--identity",
    "identity_file",
    metavar="FILE",
    help="Sign requests as this device: its four certificates and its key, as PEM or PKCS#12 (.p12).",
)
@click.option(
    "--identity-key", metavar="FILE", help="The device's key (PEM), if it is not in the file of --identity."
)
@click.option(
    "--identity-password-file",
    metavar="FILE",
    help="File whose first line is the password of --identity, or of its key.",
)
@click.option("--ca-file", metavar="FILE", help="Authorities that sign the servers' certificates (PEM).")
@click.option("--rotate", is_flag=True, help="Change the server at every request, not only after errors.")
@click.option(
    "--poll-interval",
    type=float,
    default=Policy().poll_interval,
    show_default=True,
    metavar="SECONDS",
    help="Pause between two questions for the new model.",
)
@click.option(
    "--timeout",
    type=float,
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Longest wait for a connection; a reply may take three times as long.",
)
@click.option(
    "--max-epsilon",
    type=float,
    metavar="EPSILON",
    help="With DP_ENCRYPT or SIGNDS: stop before an update with which more would be spent in all.",
)
@click.option(
    "--clip-floor",
    type=float,
    default=PrivacyOptions().clip_floor,
    show_default=True,
    metavar="LENGTH",
    help="With DP_ENCRYPT: the least clip bound; it follows the global model's moves, and the noise follows it.",
)
@click.option(
    "--error-feedback",
    is_flag=True,
    help="With DIFF_SPARSE_QUANT: keep what compression leaves out of an update, and add it to the next one.",
)
@click.option(
    "--least-threshold",
    type=float,
    default=PrivacyOptions().least_threshold,
    show_default=True,
    metavar="SHARE",
    help="With PW_ENCRYPT: take part only where more than this share of the devices is needed to take a mask off; "
    "0.67 is good against servers that lie.",
)
@click.option(
    "--rule",
    type=click.Choice([*Rule], case_sensitive=False),
    help="Be a cloud worker; the aggregation_type of the server.",
)
@click.option(
    "--sync-frequency", type=int, metavar="STEPS", help="Cloud worker: local steps between two uploads."
)
@click.option(
    "--sync-type",
    type=click.Choice(SYNC_TYPES),
    default="fixed",
    show_default=True,
    help="Cloud worker: whether the steps between two uploads grow fewer as the workers diverge.",
)
@click.option(
    "--iid-rate",
    type=float,
    default=0.0,
    metavar="SHARE",
    help="Cloud worker: FedProx's pull to the global model.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    show_default=True,
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line per iteration; logs go to stderr.")
def main(
    servers: tuple[str, ...],
    trainer: str,
    pairs: tuple[str, ...],
    fl_name: str | None,
    client_id: str | None,
    identity_file: str | None,
    identity_key: str | None,
    identity_password_file: str | None,
    ca_file: str | None,
    rotate: bool,
    poll_interval: float,
    timeout: float,
    max_epsilon: float | None,
    clip_floor: float,
    error_feedback: bool,
    least_threshold: float,
    rule: str | None,
    sync_frequency: int | None,
    sync_type: str,
    iid_rate: float,
    log_level: str,
    as_json: bool,
) -> NoReturn:
    """Train a model together with other devices, or with other silos; the data stay here.

    All options are understood with - or _ in their names (--fl-name, --fl_name).
    """
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    sys.path.insert(0, os.getcwd())
    common: dict[str, Any] = {
        "fl_name": fl_name,
        "on_iteration": print_json if as_json else None,
        "timeout": timeout,
        "ca_file": ca_file,
        "rotate": rotate,
    }
    settings = parse_settings(pairs)
    client: Client | CloudWorker
    try:
        if rule is None:
            if sync_frequency is not None or sync_type != "fixed" or iid_rate:
                raise UsageFault(
                    "--sync-frequency, --sync-type and --iid-rate are for cloud workers: add --rule"
                )
            device = make_trainer(trainer, settings, ("load", "fit", "evaluate"))
            policy = Policy(poll_interval=poll_interval)
            identity = read_identity(identity_file, identity_key, identity_password_file)
            privacy = PrivacyOptions(clip_floor, max_epsilon, error_feedback, least_threshold=least_threshold)
            client = Client(
                device,
                servers,
                client_id=client_id,
                policy=policy,
                identity=identity,
                privacy=privacy,
                **common,
            )
        else:
            if identity_file is not None:
                raise UsageFault("--identity is for devices, not for cloud workers: leave --rule out")
            if max_epsilon is not None or error_feedback or least_threshold:
                raise UsageFault(
                    "--max-epsilon, --error-feedback and --least-threshold are for devices, not for cloud workers: "
                    "leave --rule out"
                )
            if sync_frequency is None:
                raise UsageFault("a cloud worker needs --sync-frequency")
            silo = make_trainer(trainer, settings, ("load", "step", "evaluate"))
            client = CloudWorker(
                silo,
                servers,
                rule=rule,
                sync_frequency=sync_frequency,
                sync_type=sync_type,
                iid_rate=iid_rate,
                worker_id=client_id,
                policy=replace(PATIENCE, poll_interval=poll_interval),
                **common,
            )
    except ConfigError as error:
        raise UsageFault(str(error)) from error
    with stopping_on_signals(client.stop):
        summary = client.run()
    sys.exit(0 if summary.ok or summary.outcome is Outcome.STOPPED else 1)


if __name__ == "__main__":
    main(prog_name="fl-client")
