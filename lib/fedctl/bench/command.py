"""The command ``fl bench``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fedctl.bench import secagg as measures
from fedctl.processes import ChildFailed, NoRedis

EXAMPLES = """
\b
Examples:
  fl bench secagg                                       groups of 20 and 100, two models, three rates of dropout
  fl bench secagg --clients 20 --sizes 5000000          one group, a larger model
  fl bench secagg --clients 50 --dropouts 0,40 --json result.json

Times are CPU seconds of one thread. A real server spreads the streams and their keys over its threads; a client's
part is measured on this machine and is several times longer on a telephone. Nothing is left behind.
"""
_COLUMNS = ("X25519", "PBKDF2", "stream", "Shamir", "other")


def _numbers(least: int, most: int) -> Callable[[click.Context, click.Parameter, str], tuple[int, ...]]:
    """Return what reads whole numbers with commas between them."""

    def read(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"{value!r} is no list of whole numbers; write e.g. 20,100") from None
        if any(not least <= number <= most for number in numbers):
            raise click.BadParameter(f"{value} is not all within {least} and {most}")
        return numbers

    return read


@click.group()
def bench() -> None:
    """Measure what a feature costs on this machine."""


@bench.command(epilog=EXAMPLES)
@click.option(
    "--clients",
    callback=_numbers(3, 1000),
    metavar="N,…",
    default="20,100",
    show_default=True,
    help="Sizes of groups.",
)
@click.option(
    "--sizes",
    callback=_numbers(1, 100_000_000),
    metavar="N,…",
    default="66404,1000000",
    show_default=True,
    help="Floats of the models.",
)
@click.option(
    "--dropouts",
    callback=_numbers(0, 40),
    metavar="N,…",
    default="0,10,30",
    show_default=True,
    help="Percent of the clients that share their secrets and then do not upload.",
)
@click.option(
    "--json", "result", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here."
)
def secagg(
    clients: tuple[int, ...], sizes: tuple[int, ...], dropouts: tuple[int, ...], result: Path | None
) -> None:
    """Measure PW_ENCRYPT, updates under masks that cancel: both sides' CPU time, bytes and Redis' memory."""
    for n in clients:
        if len(measures.remaining(n, max(dropouts))) <= measures.threshold(n):
            raise click.BadParameter(
                f"of {n} clients too few remain to tell secrets if {max(dropouts)} % drop out; take more clients"
            )
    figures = _measured(clients, sizes, dropouts)
    _print(figures)
    if result is not None:
        result.write_text(json.dumps(figures, indent=2) + "\n")


def _measured(clients: tuple[int, ...], sizes: tuple[int, ...], dropouts: tuple[int, ...]) -> dict[str, Any]:
    """Measure everything, with a bar on the terminal."""
    figures: dict[str, Any] = {"clients": [], "server": [], "groups": []}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        work = sum(
            n * (2 * len(sizes) + n * sum(dropouts) // 100) for n in clients
        )  # about the keys to derive
        bar = progress.add_task("rates", total=work)
        figures["rates"] = measures.rates()
        figures["shamir"] = measures.shamir_seconds()
        for n in clients:
            group = measures.Group.of(n)
            for size in sizes:
                progress.update(bar, description=f"a client of {n}, {size:,} floats")
                figures["clients"].append({"n": n, "size": size, "steps": measures.client(group, size)})
                progress.advance(bar, 2 * n)
            for dropout in dropouts:
                progress.update(bar, description=f"the server, {n} clients, {dropout} % dropout")
                figures["server"] += _server(group, dropout, sizes)
                progress.advance(bar, n * n * dropout // 100)
            figures["groups"].append(
                {"n": n, "t": group.t, "bytes": measures.traffic(group), **_redis(group)}
            )
    return figures


def _server(group: measures.Group, dropout: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    done = measures.server(group, dropout)
    return [
        {
            "n": len(group.ids),
            "size": size,
            "dropout": dropout,
            "streams": len(done.streams),
            "steps": {**done.spent, "stream": measures.noise(done.streams, size)},
        }
        for size in sizes
    ]


def _redis(group: measures.Group) -> dict[str, Any]:
    """Return what an iteration takes in Redis: measured, or estimated where there is none."""
    try:
        with tempfile.TemporaryDirectory(prefix="fl-bench-") as folder:
            return {"redis_bytes": measures.redis_bytes(group, Path(folder)), "redis_measured": True}
    except (NoRedis, ChildFailed):
        return {"redis_bytes": measures.estimated_redis_bytes(group), "redis_measured": False}


# ---- on the terminal


def _print(figures: Mapping[str, Any]) -> None:
    console = Console()
    table = Table(title="CPU seconds of one thread", box=None, padding=(0, 1, 0, 0))
    for column in ("side", "n", "floats", "lost", "s", *_COLUMNS):
        table.add_column(column, justify="left" if column == "side" else "right", no_wrap=True)
    for row in figures["clients"]:
        table.add_row("a client", str(row["n"]), f"{row['size']:,}", "", *_shares_of(row["steps"]))
    for row in figures["server"]:
        dropout = f"{row['dropout']} %"
        table.add_row("server", str(row["n"]), f"{row['size']:,}", dropout, *_shares_of(row["steps"]))
    console.print(table)
    for group in figures["groups"]:
        up, down = (sum(sides) for sides in zip(*group["bytes"].values(), strict=True))
        how = "measured" if group["redis_measured"] else "estimated: there is no redis-server"
        console.print(
            f"{group['n']} clients, {group['t']} shares give a secret: each client sends {up / 1e3:.1f} KB "
            f"and gets {down / 1e3:.1f} KB beside the models; Redis holds {group['redis_bytes'] / 1e6:.2f} MB ({how})"
        )
    rates, shamir = figures["rates"], figures["shamir"]
    console.print(
        f"stream: AES-256-CTR alone {rates['AES-256-CTR']:.1f} GB/s, a client's mask {rates['mask']:.1f} GB/s, "
        f"the server's noise {rates['noise']:.1f} GB/s"
    )
    console.print(
        f"Shamir with 1,000 shares of which 667 give a secret: {1e3 * shamir['share']:.0f} ms to share, "
        f"{1e3 * shamir['combine']:.0f} ms to combine, {1e3 * shamir['combine further']:.2f} ms for each further secret"
    )


def _shares_of(steps: Mapping[str, float]) -> list[str]:
    """Return the sum, and each step's part of it."""
    total = sum(steps.values())
    return [f"{total:.3f}", *(f"{100 * steps[step] / total:.0f} %" for step in measures.STEPS)]
