"""The lab by hand: ``lab COMMAND`` at the prompt of a lab, ``tests/lab/run --in COMMAND`` from outside."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from collections.abc import Callable

from lab.commands import PROGRESS_FD
from lab.errors import LabError
from lab.host import Host
from lab.lab import Lab
from lab.pytest_command import pytest_command

HELP = """\
  status                              which hosts have power, and what is wrong with the network
  up [HOST...]                        switch on and wait until booted
  renew [HOST...]                     replace by new hosts with nothing installed
  run HOST COMMAND...                 as root in the host, even without a network
  sh                                  a shell on the controller; with words after it: that command there
  ssh HOST [COMMAND...]               as deploy, over the network
  play PLAYBOOK [ARGUMENTS...]        ansible-playbook on ansible/inventories/lab.yml
  journal HOST [ARGUMENTS...]         journalctl of a host, running or not
  cut|off|reboot|die HOST             power cut; orderly; reboot; all processes killed with the cable in
  pause|resume HOST                   stop its processes where they are; let them go on
  unplug|plug HOST                    its network cable
  part A[,B...] C[,D...]              let nothing through between two groups ("controller" is one, too)
  lose HOST PERCENT                   lose frames at random
  slow HOST DELAY_MS [JITTER_MS [LOSS_PERCENT]]
  heal                                end all that is wrong with the network
  skew HOST SECONDS | step HOST SECONDS | unskew HOST    clock of the units fl-*; step: without a restart
  pytest [ARGUMENTS...]               the tests, against these hosts as they are"""

Command = Callable[..., object]


def status(lab: Lab) -> None:
    """Print one line per host."""
    for host in lab:
        state = (
            host.run("systemctl", "is-system-running", check=False, timeout=10).strip()
            if host.is_up
            else "off"
        )
        print(f"{host.name:12} {host.address:16} {state}")
    print(f"controller   {lab.controller.address}")
    if faults := lab.network.describe():
        print(faults)


def state_of(host: Host) -> str:
    """The state of a host in a word."""
    if host.is_paused:
        return "paused"
    return (
        host.run("systemctl", "is-system-running", check=False, timeout=10).strip() if host.is_up else "off"
    )


def replace(lab: Lab, *command: str) -> None:
    """Become another program, on the controller."""
    try:
        os.execvpe(command[0], command, lab.controller.environment)
    except FileNotFoundError:
        raise LabError(f"there is no program {command[0]} on this machine") from None


def run(lab: Lab, host: str, *command: str) -> None:
    """Become a command in a host, with this terminal."""
    words = lab[host].entering(*command)
    os.execvp(words[0], words)


def play(lab: Lab, playbook: str, *words: str) -> int:
    """Run a playbook and show what it printed."""
    played = lab.controller.play(playbook, *words, check=False, timeout=3600)
    print(played.output)
    return played.code


def pytest(lab: Lab, *words: str) -> None:
    """Become the tests, with lines of progress on this standard error."""
    progress = os.dup(2)
    os.set_inheritable(progress, True)
    os.environ[PROGRESS_FD] = str(progress)
    replace(lab, *pytest_command(words))


def with_hosts(method: str) -> Command:
    """A command that does something to one host: its name, then the method's numbers."""

    def do(lab: Lab, host: str, *numbers: str) -> object:
        return getattr(lab[host], method)(*map(float, numbers))

    return do


COMMANDS: dict[str, Command] = {
    "status": status,
    "up": Lab.up,
    "renew": Lab.renew,
    "run": run,
    "sh": lambda lab, *words: replace(lab, *(words or ("bash",))),
    "ssh": lambda lab, host, *words: replace(lab, "ssh", lab[host].address, *words),
    "play": play,
    "journal": lambda lab, host, *words: print(lab[host].journal("-o", "short", *words), end=""),
    "off": with_hosts("poweroff"),
    **{
        name: with_hosts(name)
        for name in ("cut", "reboot", "die", "pause", "resume", "unplug", "plug", "unskew")
    },
    "skew": with_hosts("skew"),
    "step": with_hosts("step_clock"),
    "part": lambda lab, some, others: lab.network.part(some.split(","), others.split(",")),
    "lose": lambda lab, host, percent: lab.network.lose(host, float(percent)),
    "slow": lambda lab, host, *numbers: lab.network.slow(host, *map(float, numbers)),
    "heal": lambda lab: lab.network.heal(),
    "pytest": pytest,
}


def main(words: list[str]) -> int:
    """Do what a command line says."""
    name, *rest = words or ["help"]
    if name not in COMMANDS:
        print(HELP)
        return 0 if name == "help" else 2
    lab = Lab.current()
    try:
        inspect.signature(COMMANDS[name]).bind(lab, *rest)
    except TypeError as error:
        print(f"lab {shlex.join(words)}: {error}\n{HELP}", file=sys.stderr)
        return 2
    outcome = COMMANDS[name](lab, *rest)
    return outcome if isinstance(outcome, int) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        sys.exit(1)
