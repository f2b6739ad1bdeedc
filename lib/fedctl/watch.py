"""``fl state --watch``: the cluster's state over time.

``note`` decides what has changed; the rest asks and shows. The scheduler knows who belongs to the cluster, and
nothing about iterations; those are told by the admin listeners of the servers on this host. Whoever does not
answer is missing from the picture until he does; the watch goes on.
"""

from __future__ import annotations

import contextlib
import http.client
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import TracebackType
from typing import Any, Protocol

import click
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedcore.config import Address, address_of_instance
from fedcore.errors import ConfigError
from fedctl.processes import fetch

PROBE_S = 2.0  # patience with an admin listener, which answers at once or not at all
MOST = 100  # fl-serverd knows instances 0..99
GONE_SHOWN = 5  # nodes that have left stay on the screen until so many others have
ASKED = "startFLJob", "updateModel"  # rounds whose clients are counted


# ---- what is seen


@dataclass(frozen=True, slots=True)
class Node:
    """A member of the cluster, as the scheduler tells it."""

    node_id: str
    role: str
    address: str

    def __str__(self) -> str:
        return f"{self.role} {self.address or '-'} ({self.node_id})"


@dataclass(frozen=True, slots=True)
class Figures:
    """How far a server is.

    Attributes:
        iteration: current one, 0 before the server has joined its job.
        phase: of that iteration; empty if unknown.
        counts: round -> clients counted and clients needed.
        valid: iterations that this server saw end with a model.
        failed: those without.
    """

    iteration: int
    phase: str
    counts: Mapping[str, tuple[int, int]]
    valid: int
    failed: int

    def count(self, asked: str) -> str:
        """Clients of a round in words."""
        return "{} of {}".format(*self.counts[asked])

    def __str__(self) -> str:
        if not self.iteration:
            return "has not joined the job yet"
        counts = ", ".join(f"{asked} {self.count(asked)}" for asked in ASKED)
        where = f"iteration {self.iteration} {self.phase}".rstrip()
        return f"{where}, {counts}; {self.valid} valid, {self.failed} failed"


@dataclass(frozen=True, slots=True)
class Look:
    """What one look has found.

    Attributes:
        trouble: why the scheduler could not be asked; empty if it answered.
        state: of the cluster, in the scheduler's words.
        nodes: that are alive.
        servers: instance on this host -> its figures.
    """

    trouble: str = ""
    state: str = ""
    nodes: tuple[Node, ...] = ()
    servers: Mapping[int, Figures] = field(default_factory=dict)


# ---- what has changed


@dataclass(frozen=True, slots=True)
class Member:
    """A node over time.

    Attributes:
        node: who.
        since: when it was first seen; None if it was there when the watch began.
        gone: when it was first missed, None while it is there.
    """

    node: Node
    since: datetime | None
    gone: datetime | None = None


@dataclass(frozen=True, slots=True)
class Board:
    """What is known after some looks; in trouble, what was known before."""

    trouble: str = ""
    state: str | None = None
    members: tuple[Member, ...] = ()
    servers: Mapping[int, Figures] = field(default_factory=dict)

    @property
    def alive(self) -> tuple[Node, ...]:
        """Nodes that are there."""
        return tuple(member.node for member in self.members if member.gone is None)


def note(board: Board, look: Look, now: datetime) -> tuple[Board, list[str]]:
    """Take note of a look.

    Args:
        board: what was known.
        look: what is seen.
        now: when.

    Returns:
        What is known now, and a line for each change.
    """
    changes: list[str] = []
    if look.trouble != board.trouble:
        changes.append(look.trouble or "the scheduler answers again")
    state, members = board.state, board.members
    if not look.trouble:
        state = look.state
        if state != board.state:
            changes.append(state)
        members, moves = _members(board, look.nodes, now)
        changes += moves
    changes += [
        f"serverd-{instance}: {look.servers.get(instance, 'no answer')}"
        for instance in sorted({*board.servers, *look.servers})
        if board.servers.get(instance) != look.servers.get(instance)
    ]
    return Board(look.trouble, state, members, look.servers), changes


def _members(board: Board, nodes: tuple[Node, ...], now: datetime) -> tuple[tuple[Member, ...], list[str]]:
    first = board.state is None
    known = set(board.alive)
    left = known - set(nodes)
    new = [node for node in nodes if node not in known]
    kept = [
        replace(member, gone=now) if member.node in left and member.gone is None else member
        for member in board.members
    ]
    members = [*kept, *(Member(node, None if first else now) for node in new)]
    forgotten = [member for member in members if member.gone is not None][:-GONE_SHOWN]
    moves = [f"{'here' if first else 'joined'}: {node}" for node in new]
    moves += [
        f"gone: {member.node}" for member in board.members if member.node in left and member.gone is None
    ]
    return tuple(member for member in members if member not in forgotten), moves


# ---- asking


def nodes_of(answer: Mapping[str, Any]) -> tuple[Node, ...]:
    """Read the nodes in a scheduler's answer."""
    keys = "node_id", "role", "tcp_address"
    return tuple(Node(*(str(node.get(key, "")) for key in keys)) for node in answer.get("nodes", []))


@dataclass(frozen=True, slots=True)
class LocalServers:
    """Finds the servers of this host that belong to the cluster, and asks them how far they are.

    Attributes:
        tcp_port: configured port of other nodes; with the addresses of the nodes it tells the instances.
        admin: configured admin address.
    """

    tcp_port: int
    admin: Address

    def ask(self, nodes: Iterable[Node]) -> dict[int, Figures]:
        """Return instance -> figures of those that answer; the nodes may be of other hosts."""
        found = ((instance, self._figures(instance)) for instance in sorted(self._instances(nodes)))
        return {instance: figures for instance, figures in found if figures is not None}

    def _instances(self, nodes: Iterable[Node]) -> set[int]:
        ports = (node.address.rpartition(":")[2] for node in nodes if node.role == "SERVER")
        offsets = {int(port) - self.tcp_port for port in ports if port.isdecimal()}
        return {offset for offset in offsets if 0 <= offset < MOST}

    def _figures(self, instance: int) -> Figures | None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, ConfigError):
            status, body = fetch(f"http://{address_of_instance(self.admin, instance)}/metrics", PROBE_S)
            return figures_of(body.decode()) if status == 200 else None
        return None


def figures_of(metrics: str) -> Figures | None:
    """Read a server's metrics, in the text format of Prometheus; None if they are not a server's.

    Raises:
        ValueError: they have another form.
    """
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    }
    if ("fl_iteration",) not in values:
        return None

    def number(*key: str) -> int:
        return int(values.get(key, 0))

    return Figures(
        iteration=number("fl_iteration"),
        phase=next((key[1] for key, value in values.items() if key[0] == "fl_iteration_phase" and value), ""),
        counts={
            asked: (number("fl_iteration_clients", asked), number("fl_iteration_quorum_clients", asked))
            for asked in ASKED
        },
        valid=number("fl_iterations_total", "valid"),
        failed=number("fl_iterations_total", "failed"),
    )


# ---- showing


class View(Protocol):
    """One way to show a watch; used as a context."""

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def show(self, board: Board, changes: list[str], now: datetime) -> None:
        """Show what is known and what has changed."""
        ...


class PlainView:
    """A line per change, for pipes and files."""

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is open."""

    def show(self, board: Board, changes: list[str], now: datetime) -> None:
        for change in changes:
            click.echo(f"{now:%H:%M:%S} {change}")


class TerminalView:
    """Tables that are drawn anew at each look."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> View:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, board: Board, changes: list[str], now: datetime) -> None:
        self._live.update(Group(*_picture(board, now)), refresh=True)


def _picture(board: Board, now: datetime) -> Iterable[RenderableType]:
    yield Text(f"{now:%H:%M:%S}  {'' if board.state is None else board.state}", style="bold")
    if board.trouble:
        yield Text(board.trouble, style="red")
    if board.members:
        yield _members_table(board.members)
    elif board.state is not None:
        yield Text("no node is alive")
    if board.servers:
        yield _servers_table(board.servers)


def _members_table(members: Iterable[Member]) -> Table:
    table = Table("role", "address", "node", "since", "gone")
    for member in members:
        node = member.node
        since = "before" if member.since is None else f"{member.since:%H:%M:%S}"
        gone = "" if member.gone is None else f"{member.gone:%H:%M:%S}"
        words = (node.role, node.address, node.node_id, since, gone)
        table.add_row(*map(Text, words), style="dim" if gone else None)
    return table


def _servers_table(servers: Mapping[int, Figures]) -> Table:
    table = Table("server", "iteration", "phase", *ASKED, "valid", "failed")
    for instance, figures in sorted(servers.items()):
        table.add_row(
            f"serverd-{instance}",
            str(figures.iteration or "-"),
            figures.phase,
            *(figures.count(asked) for asked in ASKED),
            str(figures.valid),
            str(figures.failed),
        )
    return table


def view_for(console: Console) -> View:
    """Return the live view on a terminal, the plain one elsewhere."""
    return TerminalView(console) if console.is_terminal and not console.is_dumb_terminal else PlainView()


# ---- the loop


def watch(
    ask: Callable[[], Mapping[str, Any]], local: LocalServers | None, interval: float, view: View
) -> None:
    """Look and show until Ctrl-C.

    Args:
        ask: gives the scheduler's answer to /state; raises ClickException if there is none.
        local: the servers of this host, None not to ask any.
        interval: seconds between two looks.
        view: where to show.
    """
    board = Board()
    with contextlib.suppress(KeyboardInterrupt), view:
        while True:
            look = _look(ask, local, board)
            now = datetime.now()
            board, changes = note(board, look, now)
            view.show(board, changes, now)
            time.sleep(interval)


def _look(ask: Callable[[], Mapping[str, Any]], local: LocalServers | None, board: Board) -> Look:
    trouble, state, nodes = "", "", board.alive
    try:
        answer = ask()
        state, nodes = str(answer.get("cluster_state", "the state is unknown")), nodes_of(answer)
    except click.ClickException as error:
        trouble = error.format_message()
    return Look(trouble, state, nodes, {} if local is None else local.ask(nodes))
