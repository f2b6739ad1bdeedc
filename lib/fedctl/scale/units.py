"""Servers as instances of the unit ``fl-serverd@.service``: what is known of them, and what follows from it.

Values and decisions only; ``systemd`` asks and acts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

TEMPLATE = "fl-serverd@.service"
PATTERN = "fl-serverd@*.service"
PROPERTIES = (
    "Id",
    "ActiveState",
    "SubState",
    "Result",
    "ExecMainStatus",
    "MainPID",
    "StatusText",
    "Job",
)
_NAME = re.compile(r"fl-serverd@(0|[1-9][0-9]?)\.service")


class Activity(Enum):
    """What a unit does, as far as it matters here."""

    RUNNING = 1  # and has said that it is up
    BETWEEN = 2  # starting, stopping, or waiting to be started again
    STOPPED = 3
    FAILED = 4  # stopped, and systemd will not start it again


_ACTIVITIES = {
    "active": Activity.RUNNING,
    "reloading": Activity.RUNNING,
    "refreshing": Activity.RUNNING,
    "inactive": Activity.STOPPED,
    "failed": Activity.FAILED,
}


def unit_name(instance: int) -> str:
    """Return the unit of an instance, as people write it."""
    return f"fl-serverd@{instance}"


@dataclass(frozen=True, slots=True)
class Unit:
    """One instance, as systemd tells it.

    Attributes:
        instance: 0..99.
        enabled: whether it is started with the host.
        activity: what it does.
        words: the same in systemd's words, such as "activating (auto-restart)".
        job: whether systemd is about to start or stop it.
        result: how its last process ended, such as "exit-code 78"; "" for well.
        pid: of its process, 0 for none.
        status: what it says about itself.
    """

    instance: int
    enabled: bool
    activity: Activity = Activity.STOPPED
    words: str = "inactive (dead)"
    job: bool = False
    result: str = ""
    pid: int = 0
    status: str = ""

    @property
    def name(self) -> str:
        """As people write it."""
        return unit_name(self.instance)

    @property
    def standing(self) -> str:
        """Whether it is enabled and running; where the two differ, what to do about it."""
        match self.activity, self.enabled:
            case Activity.RUNNING, True:
                return "enabled, running"
            case Activity.RUNNING, False:
                return f"running, but not enabled: a reboot ends it (systemctl enable {self.name})"
            case Activity.STOPPED, True:
                return f"enabled, but not running (systemctl start {self.name})"
            case Activity.STOPPED, False:
                return "not enabled, not running"
            case Activity.FAILED, _:
                ended = f"failed, {self.result or 'no reason known'} (systemctl status {self.name})"
                return ended if self.enabled else f"not enabled, {ended}"
        return f"{'enabled' if self.enabled else 'not enabled'}, {self.words}"


def instance_of(name: str) -> int | None:
    """Return the instance of a unit's name, None if it is no server's."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def units_of(shown: str, links: Iterable[str]) -> dict[int, Unit]:
    """Read what systemd shows.

    Args:
        shown: PROPERTIES of units as ``systemctl show`` prints them: NAME=VALUE, an empty line between units.
        links: names of the files that make systemd start units with the host.

    Returns:
        Instance -> unit, the lowest first, of all that are enabled or not merely stopped.
    """
    enabled = {instance for name in links if (instance := instance_of(name)) is not None}
    units = {instance: Unit(instance, True) for instance in enabled}
    for block in shown.split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        instance = instance_of(values.get("Id", ""))
        if instance is not None:
            units[instance] = _unit(instance, instance in enabled, values)
    return {
        instance: unit
        for instance, unit in sorted(units.items())
        if unit.enabled or unit.activity is not Activity.STOPPED or unit.job
    }


def _unit(instance: int, enabled: bool, values: Mapping[str, str]) -> Unit:
    result, code = values.get("Result", ""), values.get("ExecMainStatus", "0")
    active = values.get("ActiveState", "")
    return Unit(
        instance,
        enabled,
        _ACTIVITIES.get(active, Activity.BETWEEN),
        f"{active} ({values.get('SubState', '')})",
        values.get("Job", "0") not in ("", "0"),
        "" if result == "success" else f"{result} {code}" if result == "exit-code" else result,
        int(values.get("MainPID", "") or 0),
        values.get("StatusText", ""),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What makes so many servers of what there is.

    Attributes:
        start: instances to enable and start, the lowest first.
        stop: instances to disable and stop, the highest first.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]


def plan(wanted: int, units: Mapping[int, Unit]) -> Plan:
    """Decide what is to be done.

    Args:
        wanted: instances 0 to wanted - 1 shall be enabled and running, and no others.
        units: those that are known.
    """
    good = {unit.instance for unit in units.values() if unit.enabled and unit.activity is Activity.RUNNING}
    return Plan(
        tuple(instance for instance in range(wanted) if instance not in good),
        tuple(sorted((instance for instance in units if instance >= wanted), reverse=True)),
    )


class Start(Enum):
    """How the start of a unit goes."""

    GOES_ON = 1
    UP = 2  # the daemon listens; whether it is ready, it says itself
    IN_VAIN = 3


def start_of(unit: Unit) -> Start:
    """Judge a unit that systemd was told to start."""
    match unit.activity:
        case Activity.RUNNING:
            return Start.UP
        case Activity.FAILED:
            return Start.IN_VAIN
        case Activity.STOPPED if not unit.job:
            return Start.IN_VAIN  # it ended at once, or something that it needs is not there
    return Start.GOES_ON


def stopped(unit: Unit) -> bool:
    """Tell whether a unit that systemd was told to stop has ended."""
    return unit.activity in (Activity.STOPPED, Activity.FAILED) and not unit.job
