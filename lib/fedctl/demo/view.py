"""What the reader of a demo sees: a live table and a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedctl.demo.plan import Addresses, Plan
from fedctl.demo.report import DeviceRecord, IterationRecord, Report
from fedctl.processes import HOST

GOOD_ACCURACY = 0.95  # of what comparisons count the iterations to
_ROWS_BESIDE_TABLE = 8  # head and frame of the table, the bar, and a line to spare


class View(Protocol):
    """One way to show a run; used as a context while the training lasts."""

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def say(self, sentence: str) -> None:
        """Tell a step."""
        ...

    def tick(self, iteration: int, clients: int) -> None:
        """Show how far the current iteration is."""
        ...

    def record(self, record: IterationRecord) -> None:
        """Show an iteration that has ended."""
        ...

    def summarise(self, report: Report) -> None:
        """Show what came of it."""
        ...


def view_for(plan: Plan, before: Report | None = None) -> View:
    """Return the live view on a terminal, the plain one elsewhere.

    Args:
        plan: of the run that is shown.
        before: a run whose accuracy is shown beside it.
    """
    console = Console(highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return TerminalView(plan, console, before)
    return PlainView(plan, before)


def _accuracy_of(before: Report, number: int) -> str:
    return f"{before.iterations[number - 1].accuracy:.1%}"


class PlainView:
    """A line per step and iteration, for pipes and files."""

    def __init__(self, plan: Plan, before: Report | None = None) -> None:
        self._plan = plan
        self._before = before

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is open."""

    def say(self, sentence: str) -> None:
        click.echo(sentence)

    def tick(self, iteration: int, clients: int) -> None:
        """Plain lines tell of ended iterations only."""

    def record(self, record: IterationRecord) -> None:
        number = f"{record.number:{len(str(self._plan.iterations))}}/{self._plan.iterations}"
        click.echo(
            f"iteration {number}   loss {record.loss:7.4f}   accuracy {record.accuracy:6.1%}"
            f"{self._beside(record.number)}   clients {record.clients}   {record.seconds:6.2f} s"
        )

    def _beside(self, number: int) -> str:
        if self._before is None:
            return ""
        return f"   {self._before.plan.name} {_accuracy_of(self._before, number):>6}"

    def summarise(self, report: Report) -> None:
        for device in report.devices:
            click.echo(
                f"{device.name:10} {sum(device.samples.values()):6} samples, mostly {favourites(device.samples)}; "
                f"{device.iterations} iterations; accuracy on {device.held_out} that it holds out "
                f"{_share(device.accuracy)}"
            )
        for line in totals(report):
            click.echo(line)


class TerminalView:
    """A table that grows and a bar that moves."""

    def __init__(self, plan: Plan, console: Console, before: Report | None = None) -> None:
        self._plan = plan
        self._before = before
        self._console = console
        self._records: list[IterationRecord] = []
        self._bar = Progress(
            TextColumn("iteration {task.fields[iteration]} of {task.fields[last]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[clients]} of {task.fields[devices]} {task.fields[who]}s"),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            expand=True,
        )
        self._task: TaskID | None = None
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> View:
        steps = self._plan.iterations * self._plan.devices
        fields = {
            "iteration": 1,
            "clients": 0,
            "last": self._plan.iterations,
            "devices": self._plan.devices,
            "who": self._plan.who,
        }
        self._task = self._bar.add_task("", total=steps, **fields)  # type: ignore[arg-type]
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.update(self._table(self._records))  # all of it stays on the screen
        self._live.stop()

    def say(self, sentence: str) -> None:
        self._console.print(sentence, markup=False, soft_wrap=True)  # a path may hold [brackets]

    def tick(self, iteration: int, clients: int) -> None:
        assert self._task is not None
        last, devices = self._plan.iterations, self._plan.devices
        if iteration > last:
            iteration, clients = last, devices
        done = (iteration - 1) * devices + clients
        self._bar.update(self._task, completed=done, iteration=iteration, clients=clients)
        room = max(1, self._console.height - _ROWS_BESIDE_TABLE)
        self._live.update(Group(self._table(self._records[-room:]), self._bar), refresh=True)

    def record(self, record: IterationRecord) -> None:
        self._records.append(record)

    def summarise(self, report: Report) -> None:
        table = Table(self._plan.who, title="who did what", title_justify="left")
        for column in ("samples", "mostly", "iterations", "last loss", "held out", "accuracy on these"):
            table.add_column(column, justify="left" if column == "mostly" else "right")
        for device in report.devices:
            table.add_row(*_device_row(device))
        self._console.print(table)
        for line in totals(report):
            self.say(line)

    def _table(self, records: list[IterationRecord]) -> Table:
        table = Table()
        beside = [] if self._before is None else [self._before.plan.name]
        for column in ("iteration", "loss", "accuracy", *beside, "clients", "seconds"):
            table.add_column(column, justify="right")
        for record in records:
            accuracy = [] if self._before is None else [_accuracy_of(self._before, record.number)]
            table.add_row(
                str(record.number),
                f"{record.loss:.4f}",
                f"{record.accuracy:.1%}",
                *accuracy,
                str(record.clients),
                f"{record.seconds:.2f}",
            )
        return table


def _device_row(device: DeviceRecord) -> tuple[str, ...]:
    return (
        device.name,
        str(sum(device.samples.values())),
        favourites(device.samples),
        str(device.iterations),
        "-" if device.loss is None else f"{device.loss:.4f}",
        str(device.held_out),
        _share(device.accuracy),
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def favourites(samples: Mapping[int, int]) -> str:
    """Name the two classes that a device has most of."""
    most = sorted(samples, key=lambda label: -samples[label])[:2]
    return " and ".join(str(label) for label in most if samples[label])


def totals(report: Report) -> list[str]:
    """Say in a few lines what came of it."""
    last = report.iterations[-1]
    nobody = "neither device nor worker has" if report.plan.worker else f"no {report.plan.who} has"
    return [
        f"test accuracy {last.accuracy:.1%} on {report.test_samples} images that {nobody} seen, "
        f"after {last.number} iterations",
        f"{report.seconds:.1f} s in all, {report.training_seconds:.1f} s of training, "
        f"{report.updates} updates, {report.updates_per_second:.1f} updates/s",
    ]


def comparison(reports: Sequence[Report]) -> list[str]:
    """Say in a small table how several runs on the same data did, of which the rule or the worker differs."""
    good = f"iterations to {GOOD_ACCURACY:.0%}"
    what = "" if reports[0].plan.rule is None else "rule"
    width = max(10, *(len(report.plan.name) for report in reports))
    lines = [f"{what:{width}} {'accuracy':>8} {'loss':>8} {good:>18} {'seconds':>8}"]
    for report in reports:
        last = report.iterations[-1]
        reached = [record.number for record in report.iterations if record.accuracy >= GOOD_ACCURACY]
        first = str(reached[0]) if reached else "-"
        lines.append(
            f"{report.plan.name:{width}} {last.accuracy:8.1%} {last.loss:8.4f} {first:>18} {report.seconds:8.1f}"
        )
    if reports[-1].plan.worker:
        lines.append(gain(reports[0], reports[-1]))
    return lines


def gain(without: Report, with_worker: Report) -> str:
    """Say what a worker was good for."""
    pairs = zip(without.iterations, with_worker.iterations, strict=True)
    gains = [record.accuracy - before.accuracy for before, record in pairs]
    above = sum(each > 0 for each in gains)
    return (
        f"with the worker, accuracy is higher in {above} of {len(gains)} iterations, "
        f"by {100 * sum(gains) / len(gains):.1f} points on average"
    )


def commands_to_look_around(addresses: Addresses, ca_file: Path | None = None) -> list[str]:
    """Return what to type beside a running demo.

    Args:
        addresses: where it listens.
        ca_file: the authority of its certificates, None without TLS. Admin listeners have none in any case.
    """
    daemon = [
        f"curl http://{addresses.server_admin}/readyz",
        f"curl http://{addresses.server_admin}/metrics",
    ]
    if ca_file is None:
        return [
            f"fl state --scheduler http://{addresses.scheduler}",
            f"curl http://{addresses.scheduler}/state",
            *daemon,
        ]
    folder = ca_file.parent
    return [
        f"fl state --scheduler https://{addresses.scheduler} --ca-file {ca_file}",
        f"curl --cacert {ca_file} https://{addresses.scheduler}/state",
        *daemon,
        f"fl certs list --ca {folder}",
        f"fl certs verify {folder}/hosts/node/server.crt --ca {folder} --host {HOST}",
        f"openssl s_client -connect {addresses.devices} -CAfile {ca_file} -brief",
    ]
