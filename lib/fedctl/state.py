"""``fl state``: ask a scheduler for the state of the cluster."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from fedcore.config import Address, Role, Settings
from fedctl import deployed
from fedctl.watch import LocalServers, view_for
from fedctl.watch import watch as follow

SCHEDULER = "http://127.0.0.1:11202"
TIMEOUT_S = 10.0
EXAMPLES = """
\b
Examples:
  fl state                                     on a deployed host: the scheduler that /etc/fl/fl.yaml names
  fl state --scheduler http://10.0.0.5:11202
  fl state --watch --yaml-config fl.yaml       with the iteration of the servers on this host
  fl state --watch --interval 10 | tee changes.log
"""


class Unanswered(click.ClickException):
    """The scheduler cannot be reached or refuses; one line, exit code 1."""


@dataclass(frozen=True, slots=True)
class Operator:
    """What shows that somebody may change a job.

    Attributes:
        token: of the scheduler, "" for none.
        certificate: PEM file of a certificate and its key, None for none.
    """

    token: str = field(default="", repr=False)
    certificate: str | None = None


NOBODY = Operator()


def ask(
    scheduler: str,
    path: str,
    ca_file: str | None = None,
    *,
    body: bytes | None = None,
    operator: Operator = NOBODY,
) -> dict[str, Any]:
    """GET a route of a scheduler, or POST to it.

    Args:
        scheduler: its URL.
        path: with its slash.
        ca_file: PEM file of the authorities that may have signed its certificate; None: those of the system.
        body: to be sent by POST, None for a GET.
        operator: who asks.

    Returns:
        The answer.

    Raises:
        Unanswered: it cannot be reached, refuses, or answers with something else than JSON.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
        if operator.certificate is not None:
            context.load_cert_chain(operator.certificate)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),  # a cluster is next door
            urllib.request.HTTPSHandler(context=context),
        )
        headers = {"Authorization": f"Bearer {operator.token}"} if operator.token else {}
        request = urllib.request.Request(scheduler.rstrip("/") + path, body, headers)
        with opener.open(request, timeout=TIMEOUT_S) as reply:
            return _object(scheduler, reply.read())
    except urllib.error.HTTPError as error:
        with error:
            refusal = _object(scheduler, error.read()).get("error_message", f"HTTP status {error.code}")
        raise Unanswered(f"the scheduler at {scheduler} refuses: {refusal}") from error
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise Unanswered(
            f"the scheduler at {scheduler} cannot be asked: {reason}; is fl-schedulerd running there? If it is "
            "elsewhere, give --scheduler URL"
        ) from error


def _object(scheduler: str, body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Unanswered(f"what answers at {scheduler} is no scheduler")
    return answer


@click.command(epilog=EXAMPLES)
@click.option(
    "--scheduler",
    metavar="URL",
    help=f"Whom to ask; default: the one that the configuration names, without one {SCHEDULER}.",
)
@click.option(
    "--ca-file",
    type=click.Path(dir_okay=False),
    help="Authorities of its certificate (PEM); default: ssl.ca_cert_path of the configuration, without one those of "
    "the system.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the scheduler's answer as it is.")
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C; in a pipe, print a line for each change.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=2.0,
    show_default=True,
    help="Seconds between two looks with --watch.",
)
@click.option(
    "--yaml-config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Configuration of the job: tells where the scheduler is, and lets --watch show the iteration, from the "
    f"servers on this host. Default: {deployed.CONFIGURATION}, if it is there and --scheduler is not given.",
)
def state(
    scheduler: str | None,
    ca_file: str | None,
    as_json: bool,
    watch: bool,
    interval: float,
    yaml_config: Path | None,
) -> None:
    """Show the state of a cluster and its nodes."""
    if watch and as_json:
        raise click.UsageError("--json and --watch exclude each other")
    if yaml_config is None and scheduler is None:
        yaml_config = deployed.find_configuration()
    settings = None if yaml_config is None else deployed.read_settings(yaml_config, Role.SCHEDULER)
    if scheduler is None:
        scheduler = SCHEDULER if settings is None else scheduler_of(settings)
    if ca_file is None and settings is not None and settings.enable_ssl:
        ca_file = settings.ssl.ca_cert_path
    if watch:
        own = None if settings is None else settings.fedcore.server
        local = None if own is None else LocalServers(own.tcp_port, own.admin_address)
        follow(lambda: ask(scheduler, "/state", ca_file), local, interval, view_for(Console(highlight=False)))
        return
    show(ask(scheduler, "/state", ca_file), as_json)


def scheduler_of(settings: Settings) -> str:
    """Return the URL of a job's scheduler; one that listens everywhere is asked on this host."""
    address = settings.fedcore.scheduler.manage_address
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    return f"http{'s' if settings.enable_ssl else ''}://{Address(host, address.port)}"


def show(answer: dict[str, Any], as_json: bool) -> None:
    """Print a scheduler's answer."""
    if as_json:
        click.echo(json.dumps(answer))
        return
    console = Console(highlight=False)
    console.print(answer.get("cluster_state", "the state is unknown"))
    nodes = answer.get("nodes", [])
    if not nodes:
        console.print("no node is alive")
        return
    table = Table("role", "address", "node")
    for node in nodes:
        table.add_row(node.get("role", ""), node.get("tcp_address", ""), node.get("node_id", ""))
    console.print(table)
