"""``fl state``: ask a scheduler for the state of the cluster."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from typing import Any

import click
from rich.console import Console
from rich.table import Table

SCHEDULER = "http://127.0.0.1:11202"
TIMEOUT_S = 10.0


class Unanswered(click.ClickException):
    """The scheduler cannot be reached or refuses; one line, exit code 1."""


def ask(scheduler: str, path: str, ca_file: str | None = None) -> dict[str, Any]:
    """GET a route of a scheduler.

    Args:
        scheduler: its URL.
        path: with its slash.
        ca_file: PEM file of the authorities that may have signed its certificate; None: those of the system.

    Returns:
        The answer.

    Raises:
        Unanswered: it cannot be reached, refuses, or answers with something else than JSON.
    """
    try:
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),  # a cluster is next door
            urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca_file)),
        )
        with opener.open(scheduler.rstrip("/") + path, timeout=TIMEOUT_S) as reply:
            return _object(scheduler, reply.read())
    except urllib.error.HTTPError as error:
        with error:
            refusal = _object(scheduler, error.read()).get("error_message", f"HTTP status {error.code}")
        raise Unanswered(f"the scheduler at {scheduler} refuses: {refusal}") from error
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise Unanswered(f"the scheduler at {scheduler} cannot be asked: {reason}") from error


def _object(scheduler: str, body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Unanswered(f"what answers at {scheduler} is no scheduler")
    return answer


@click.command()
@click.option("--scheduler", default=SCHEDULER, show_default=True, metavar="URL")
@click.option("--ca-file", type=click.Path(dir_okay=False), help="Authorities of its certificate (PEM).")
@click.option("--json", "as_json", is_flag=True, help="Print the scheduler's answer as it is.")
def state(scheduler: str, ca_file: str | None, as_json: bool) -> None:
    """Show the state of a cluster and its nodes."""
    answer = ask(scheduler, "/state", ca_file)
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
