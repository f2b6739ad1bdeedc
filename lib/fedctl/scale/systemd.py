"""Servers as units: systemctl and journalctl, asked and told.

Rules kept here:

* Nothing waits for ever: each question has a time limit, and starts and stops are only ordered (--no-block) and then
  looked at, so that their progress can be told and given up.
* What is enabled is read from the links that enabling makes: systemctl lists no instances of a template.
* systemd is never asked for a password.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedctl.deployed import CONFIGURATION, find_configuration
from fedctl.scale.addresses import NO_ANSWER, Addresses, addresses_of, readiness
from fedctl.scale.local import KILL_S, Say
from fedctl.scale.units import (
    PATTERN,
    PROPERTIES,
    TEMPLATE,
    Activity,
    Start,
    Unit,
    plan,
    start_of,
    stopped,
    unit_name,
    units_of,
)

LINKS = Path("/etc/systemd/system/fl.target.wants")
DRAIN_S = 120.0  # the unit allows a stop 60 s, and the daemon may ask for more
ANSWER_S = 30.0  # for systemctl, which waits for nothing but the bus
TAIL_LINES = 15
_LOOK_S = 0.2


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    """Run one of systemd's programs and return how it went.

    Raises:
        ClickException: it is not there, or does not end.
    """
    try:
        return subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_S,
            check=False,
        )
    except FileNotFoundError:
        raise click.ClickException(f"there is no {words[0]} on this host") from None
    except subprocess.TimeoutExpired:
        raise click.ClickException(
            f"{' '.join(words)} does not end within {ANSWER_S:g} s: is systemd well? (systemctl is-system-running)"
        ) from None


def why_no_units() -> str:
    """Return why servers are no units on this host, "" if they are."""
    if shutil.which("systemctl") is None:
        return "there is no systemctl on this host"
    answer = ask("systemctl", "cat", TEMPLATE)
    return "" if answer.returncode == 0 else (answer.stderr.strip() or f"no {TEMPLATE}").splitlines()[0]


def look(instances: Iterable[int] = ()) -> dict[int, Unit]:
    """Ask systemd about all servers of this host.

    Args:
        instances: whom to return even if there is nothing to tell.

    Raises:
        ClickException: it does not answer.
    """
    try:
        links = sorted(os.listdir(LINKS))
    except FileNotFoundError:
        links = []
    except OSError as error:
        raise click.ClickException(f"{LINKS} cannot be read: {error.strerror}") from error
    properties = "--property=" + ",".join(PROPERTIES)
    answer = ask("systemctl", "show", properties, PATTERN, *(f"{unit_name(n)}.service" for n in instances))
    if answer.returncode:
        raise click.ClickException(f"systemctl show: {_last_line(answer.stderr)}")
    units = units_of(answer.stdout, links)
    return units | {n: Unit(n, False) for n in instances if n not in units}


def _tell(*words: str) -> None:
    """Have systemctl change something.

    Raises:
        ClickException: it refuses.
    """
    answer = ask("systemctl", "--no-ask-password", *words)
    if answer.returncode:
        reason = _last_line(answer.stderr) or f"exit code {answer.returncode}"
        remedy = "" if os.geteuid() == 0 else "; units belong to root: repeat the command with sudo"
        raise click.ClickException(f"systemctl {words[0]}: {reason}{remedy}")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def _names(instances: Iterable[int]) -> list[str]:
    return [f"{unit_name(instance)}.service" for instance in instances]


# ---- starting


def start(addresses: Mapping[int, Addresses], before: Mapping[int, Unit], patience: float, say: Say) -> None:
    """Enable and start units, and wait until their servers are ready.

    Args:
        addresses: instance -> where it will listen.
        before: what was known of them.
        patience: seconds until all shall be ready.
        say: told each step.

    Raises:
        ClickException: systemd refuses; or a server has failed or is not ready in time, and the others go on.
    """
    failed = [n for n in addresses if n in before and before[n].activity is Activity.FAILED]
    if failed:
        _tell("reset-failed", *_names(failed))  # else a unit that was started too often is not started
    _tell("enable", "--now", "--no-block", *_names(addresses))
    say(f"enabled and started: {', '.join(map(unit_name, addresses))}")
    failures = _await_ready(addresses, patience, say)
    if failures:
        raise click.ClickException("\n".join(failures))


def _await_ready(addresses: Mapping[int, Addresses], patience: float, say: Say) -> list[str]:
    """Wait for new servers, telling why they are not ready yet; return what went wrong."""
    began = time.monotonic()
    told = dict.fromkeys(addresses, NO_ANSWER)
    failures: list[str] = []
    while told:
        late = time.monotonic() - began > patience
        units = look(told)
        for instance in list(told):
            unit = units[instance]
            ready, words = False, ", ".join(filter(None, (unit.words, unit.result)))
            state = start_of(unit)
            if state is Start.UP:
                ready, words = readiness(addresses[instance].admin)
            if ready:
                say(f"{unit.name}: ready after {time.monotonic() - began:.1f} s")
            elif state is Start.IN_VAIN:
                failures.append(f"{unit.name} has ended: {unit.result or unit.words}{_remedy(unit.name)}")
            elif late:
                failures.append(
                    f"{unit.name} goes on, but is not ready within {patience:g} s: {words}{_remedy(unit.name)}"
                )
            else:
                if words != told[instance]:
                    say(f"{unit.name}: {words}")
                told[instance] = words
                continue
            del told[instance]
        if told:
            time.sleep(_LOOK_S)  # there is no notice of readiness to wait for
    return failures


def _remedy(name: str) -> str:
    journal = ask("journalctl", "--no-pager", "--output=cat", f"--lines={TAIL_LINES}", f"--unit={name}")
    last = journal.stdout.strip()
    tail = "; " if last in ("", "-- No entries --") else f"; its journal ends with:\n{last}\n"
    return f"{tail}see: systemctl status {name}, journalctl -u {name}"


# ---- stopping


def stop(instances: Sequence[int], patience: float, kill: bool, say: Say) -> None:
    """Disable and stop units, in this order, and wait for their end.

    Args:
        instances: which.
        patience: seconds until all shall have ended.
        kill: whether to kill those that have not.
        say: told each step.

    Raises:
        ClickException: systemd refuses, or some go on.
    """
    _tell("disable", "--now", "--no-block", *_names(instances))
    say(f"disabled and asked to end: {', '.join(map(unit_name, instances))}")
    left = _await_ends(instances, patience, say)
    if left and kill:
        _tell("kill", "--signal=SIGKILL", *_names(unit.instance for unit in left))
        say(f"killed, they went on after {patience:g} s: {', '.join(unit.name for unit in left)}")
        left = _await_ends([unit.instance for unit in left], KILL_S, say)
    if left:
        names = ", ".join(f"{unit.name} ({unit.words})" for unit in left)
        raise click.ClickException(
            f"not ended within {patience:g} s: {names}; systemd kills them when TimeoutStopSec is over. See "
            f"journalctl -u {left[0].name}, repeat the command, or add --kill"
        )


def _await_ends(instances: Sequence[int], patience: float, say: Say) -> list[Unit]:
    """Wait for the end of servers, and return those that go on."""
    left = list(instances)
    deadline = time.monotonic() + patience
    while True:
        units = look(left)
        for instance in list(left):
            unit = units[instance]
            if stopped(unit):
                left.remove(instance)
                say(f"{unit.name}: ended" + (f" ({unit.result})" if unit.result else ""))
                if unit.activity is Activity.FAILED:
                    _tell("reset-failed", *_names([instance]))  # else it is shown as failed for good
        if not left or time.monotonic() > deadline:
            return [units[instance] for instance in left]
        time.sleep(_LOOK_S)  # systemd gives its notices on the bus only


# ---- all of it


def show(units: Mapping[int, Unit], addresses: Mapping[int, Addresses]) -> None:
    """Print what there is: a table on a terminal, a line per unit elsewhere."""
    if not units:
        click.echo("no server is enabled or running on this host; to have two: fl scale 2")
        return
    table = Table("unit", "state", "pid", "devices", "nodes", "admin", "ready", "about")
    lines = []
    for instance, unit in units.items():
        own = addresses[instance]
        places = str(own.devices), str(own.node_port), str(own.admin)
        running = unit.activity is Activity.RUNNING
        words = readiness(own.admin)[1] if running else "-"
        about = "" if unit.status.startswith("not ready") else unit.status  # newer from the server itself
        table.add_row(unit.name, Text(unit.standing), str(unit.pid or "-"), *places, Text(words), Text(about))
        line = f"{unit.name}  {unit.standing}"
        if running:
            line += "  pid {}  devices {}  nodes {}  admin {}  {}".format(unit.pid, *places, words)
        lines.append(line + (f"  [{about}]" if about else ""))
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table)
    else:
        click.echo("\n".join(lines))


def scale_units(n: int | None, *, ready_timeout: float, drain_timeout: float, kill: bool) -> None:
    """Make the first N units be enabled and run, or show those that are there; the arguments are the command's.

    Raises:
        ClickException: something stands against it.
    """
    configuration = find_configuration()
    if configuration is None:
        raise click.ClickException(
            f"there is no {CONFIGURATION}, which {TEMPLATE} reads; deploy this host (ansible/site.yml), or give "
            "--yaml-config FILE for servers that are no units"
        )
    units = look()
    if n is not None:
        say = partial(Console(highlight=False).print, markup=False, soft_wrap=True)
        todo = plan(n, units)
        if todo.start:
            start(addresses_of(configuration, todo.start), units, ready_timeout, say)
        if todo.stop:
            stop(todo.stop, drain_timeout, kill, say)
        units = look()
    show(units, addresses_of(configuration, units))
