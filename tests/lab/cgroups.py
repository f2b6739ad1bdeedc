"""Control groups of the hosts: how a host is ended at one blow, paused, and given limits that hold.

Two layouts of /sys/fs/cgroup are served: *unified* (version 2 only, as on current distributions) and *hybrid*
(version 1 controllers, and version 2 without controllers at ``unified/``). Killing, freezing and "is anything
alive in there" always go by version 2. Of each host there are two groups:

    PREFIX/HOST/box      systemd-nspawn and all of the host; it may make groups below
    PREFIX/HOST/starter  the shell that starts nspawn again when the host reboots

They are two because version 2 wants no processes beside groups that have controllers.
"""

from __future__ import annotations

import contextlib
import errno
from dataclasses import dataclass
from pathlib import Path

from lab.commands import wait_until
from lab.errors import Unfit

MOUNTS = Path("/proc/self/mounts")
# Those that systemd in a host uses for MemoryMax=, TasksMax=, CPUQuota= and for its own book-keeping.
WANTED = ("name=systemd", "memory", "pids", "cpu", "cpuacct", "freezer")


@dataclass(frozen=True)
class Hierarchies:
    """Where this machine has its control groups.

    Attributes:
        unified: the version 2 hierarchy.
        version_1: the version 1 hierarchies that hosts need; empty on machines with version 2 only.
    """

    unified: Path
    version_1: tuple[Path, ...] = ()

    @property
    def all(self) -> tuple[Path, ...]:
        return (self.unified, *self.version_1)


def find_hierarchies(mounts: str | None = None) -> Hierarchies:
    """Read from the mounts where the control groups are.

    Raises:
        Unfit: version 2 is not mounted.
    """
    unified: Path | None = None
    version_1: list[Path] = []
    for line in (MOUNTS.read_text() if mounts is None else mounts).splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2" and place.startswith("/sys/fs/cgroup"):
            unified = unified or Path(place)
        elif kind == "cgroup" and set(options.split(",")) & set(WANTED):
            version_1.append(Path(place))
    if unified is None:
        raise Unfit("control groups of version 2 are not mounted at /sys/fs/cgroup or /sys/fs/cgroup/unified")
    return Hierarchies(unified, tuple(version_1))


class HostGroup:
    """The control groups of one host."""

    def __init__(self, hierarchies: Hierarchies, prefix: str, host: str) -> None:
        self._hierarchies = hierarchies
        self._path = Path(prefix, host)
        self._top = hierarchies.unified / self._path

    def make(self) -> None:
        """Make the groups; does nothing if they are there."""
        for hierarchy in self._hierarchies.all:
            (hierarchy / self._path / "box").mkdir(parents=True, exist_ok=True)
        (self._top / "starter").mkdir(exist_ok=True)
        if not self._hierarchies.version_1:
            for folder in (self._hierarchies.unified, self._top.parent, self._top):
                there = (folder / "cgroup.controllers").read_text().split()
                enabled = " ".join(f"+{name}" for name in ("memory", "pids", "cpu") if name in there)
                (folder / "cgroup.subtree_control").write_text(enabled)

    @property
    def starter_procs(self) -> list[Path]:
        """Files that the starter writes its process id to."""
        return [self._top / "starter/cgroup.procs"]

    @property
    def box_procs(self) -> list[Path]:
        """Files that nspawn writes its process id to."""
        return [hierarchy / self._path / "box/cgroup.procs" for hierarchy in self._hierarchies.all]

    def populated(self) -> bool:
        """Whether any process of the host lives."""
        try:
            return "populated 1" in (self._top / "cgroup.events").read_text()
        except FileNotFoundError:
            return False

    def frozen(self) -> bool:
        """Whether the host is paused."""
        try:
            return "frozen 1" in (self._top / "cgroup.events").read_text()
        except FileNotFoundError:
            return False

    def freeze(self, on: bool) -> None:
        """Stop all processes of the host where they are, or let them go on."""
        (self._top / "cgroup.freeze").write_text("1" if on else "0")
        wait_until(lambda: self.frozen() == on, 10, f"{self._path}: frozen is {on}", pause=0.01)

    def kill(self) -> None:
        """Kill every process of the host at once, paused or not."""
        with contextlib.suppress(FileNotFoundError):
            (self._top / "cgroup.kill").write_text("1")
            (self._top / "cgroup.freeze").write_text("0")
        wait_until(lambda: not self.populated(), 20, f"{self._path}: all processes have ended", pause=0.01)

    def remove(self) -> None:
        """Remove the groups, which must be empty."""
        for hierarchy in self._hierarchies.all:
            remove_groups(hierarchy / self._path)


def remove_groups(top: Path) -> None:
    """Remove a group and all below it, deepest first; a group that the kernel still empties is waited for."""

    def gone(folder: Path) -> bool:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    if top.exists():
        folders = [folder for folder in top.rglob("*") if folder.is_dir()]
        for folder in sorted([top, *folders], key=lambda path: len(path.parts), reverse=True):
            wait_until(lambda folder=folder: gone(folder), 10, f"{folder} is empty")  # type: ignore[misc]


def sweep(hierarchies: Hierarchies, prefix: str) -> None:
    """End and remove what a lab of this prefix left behind when it was killed."""
    for host in sorted((hierarchies.unified / prefix).glob("*/")):
        HostGroup(hierarchies, prefix, host.name).kill()
    for hierarchy in hierarchies.all:
        remove_groups(hierarchy / prefix)
