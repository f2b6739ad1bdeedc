"""The first process inside a lab: ``python -m lab.inside MODE MINUTES [PYTEST ARGUMENTS]``.

It sweeps away what an earlier lab of this prefix left behind, lays the network, runs the tests (or holds the
hosts), and removes everything. It is process 1 of its namespace: it also buries processes whose parents ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from lab import supplies
from lab.base_tree import base_tree
from lab.cgroups import find_hierarchies, sweep
from lab.commands import PROGRESS_FD, call, say
from lab.errors import LabError
from lab.lab import Lab
from lab.places import PREFIX, Places
from lab.pytest_command import pytest_command

PRIVATE = ("/run/netns", "/run/systemd/nspawn")  # folders of the machine that the lab has for itself
GRACE_S = 60  # between the end of the time and SIGKILL
BASHRC = """\
PS1='(lab) \\w\\$ '
lab() {{ {python} -m lab.cli "$@"; }}
lab help
"""


def main(mode: str, minutes: str, rest: Sequence[str]) -> int:
    """Run a lab from its start to its end; returns the exit code of the tests."""
    for folder in PRIVATE:
        Path(folder).mkdir(parents=True, exist_ok=True)
        call("mount", "-t", "tmpfs", "-o", "mode=755", "lab", folder)
    places = Places(os.environ[PREFIX])
    sweep(find_hierarchies(), places.prefix)
    shutil.rmtree(places.run, ignore_errors=True)
    places.artefacts.mkdir(parents=True)
    base = base_tree()
    for name, supply in {"base": base, "debs": supplies.debs(base), "wheels": supplies.wheels()}.items():
        places.supply(name).symlink_to(supply)
    os.environ[PROGRESS_FD] = str(os.dup(2))
    os.set_inheritable(int(os.environ[PROGRESS_FD]), True)
    lab = Lab(places.prefix)
    lab.prepare()
    say(f"lab {places.prefix}: {', '.join(host.name for host in lab)}; logs in {places.artefacts}")
    try:
        if mode != "tests":
            lab.up()
        return run(mode, command(mode, rest, places), float(minutes) * 60)
    finally:
        lab.erase()


def command(mode: str, rest: Sequence[str], places: Places) -> list[str]:
    """What the lab is for."""
    if mode == "shell":
        bashrc = places.run / "bashrc"
        bashrc.write_text(BASHRC.format(python=sys.executable))
        return ["bash", "--rcfile", str(bashrc), "-i"]
    if mode == "hold":
        say(
            f"held; use it with tests/lab/run --prefix {places.prefix} --in COMMAND, end it with Ctrl-C or SIGTERM"
        )
        return ["sleep", "infinity"]
    return pytest_command(rest)


def run(mode: str, command: Sequence[str], seconds: float) -> int:
    """Run a program to its end, or to the end of its time, and bury all who die meanwhile."""
    farewell = signal.SIGINT if mode == "tests" else signal.SIGHUP  # at SIGINT pytest still reports
    limit = ("timeout", "--foreground", f"--signal={farewell.name}", f"--kill-after={GRACE_S}", str(seconds))
    child = subprocess.Popen([*limit, *command], pass_fds=[int(os.environ[PROGRESS_FD])])

    def end(number: int, frame: FrameType | None) -> None:
        os.kill(child.pid, farewell)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the child by itself
    while True:
        pid, status = os.wait()
        if pid == child.pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        sys.exit(2)
