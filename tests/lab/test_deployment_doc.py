"""docs/DEPLOYMENT.md, typed as it stands there, on hosts with nothing installed.

Each ``yaml`` block that begins with "all:" is put into the inventory; what an earlier one says, and it does not, stays.
Each ``console`` block is typed into one shell on the controller, in the page's order. A line that begins with "$ "
is a command, which lines with "> " continue. It must end with 0; what stands below it must be what it prints (… is
anything). Left out are blocks below a comment ``<!-- not in the lab: REASON -->``.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab import supplies
from lab.commands import say
from lab.host import Host
from lab.lab import Lab
from lab.places import TREE
from unit.docs.pages import WILDCARD, codes, page, table
from unit.docs.pages import section as table_section

PATIENCE_S = 1200  # for one command, on a machine with other work
WATCHED_S = 10  # what is to be ended with Ctrl-C is ended so after this time
PARTS = re.compile(
    r"^(## [^\n]*|<!-- not in the lab: [^\n]* -->\n+```.*?^```|```console\n.*?^```|```yaml\nall:\n.*?^```)$",
    re.MULTILINE | re.DOTALL,
)
ANSIBLE = TREE / "ansible"
MINE = ANSIBLE / "inventories/mine.yml"
MADE = (MINE, ANSIBLE / "secrets/mine", ANSIBLE / "lenet.safetensors")
HAS_VENV = Path(sys.executable).is_relative_to(TREE / ".venv")


@dataclass(frozen=True)
class Step:
    """Something that the page asks for.

    Attributes:
        section: heading that it stands below.
        command: what is typed; empty: there is something to be put into the inventory.
        shown: lines below it, or the inventory's.
    """

    section: str
    command: str
    shown: tuple[str, ...] = ()


def steps() -> list[Step]:
    """Return what the page asks for and a lab can do."""
    found: list[Step] = []
    section = ""
    for part in PARTS.split(page("DEPLOYMENT.md")):
        lines = part.splitlines()[1:-1]
        if part.startswith("## "):
            section = part.removeprefix("## ")
        elif part.startswith("```yaml\n"):
            found.append(Step(section, "", tuple(lines)))
        elif part.startswith("```console\n"):
            for line in lines:
                if line.startswith("$ "):
                    found.append(Step(section, line[2:]))
                elif line.startswith("> "):
                    found.append(replace(last := found.pop(), command=f"{last.command}\n{line[2:]}"))
                else:
                    found.append(replace(last := found.pop(), shown=(*last.shown, line)))
    return found


def as_printed(printed: str, shown: tuple[str, ...]) -> bool:
    """Whether a command printed what the page shows."""
    pattern = re.escape("\n".join(shown)).replace(re.escape(WILDCARD), ".*?")
    return not shown or re.fullmatch(pattern, printed.rstrip("\n"), re.DOTALL) is not None


class Shell:
    """One bash on the controller, in the project's folder."""

    def __init__(self, lab: Lab) -> None:
        self._bash = subprocess.Popen(
            ["bash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=TREE,
            env={**lab.controller.environment, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def type(self, command: str) -> tuple[str, int]:
        """Type a command; return what it prints and its exit code."""
        assert self._bash.stdin is not None and self._bash.stdout is not None
        line = f"{{\n{command}\n}} </dev/null"  # ssh would read what is typed next
        self._bash.stdin.write(f"{line}\nprintf '\\n==done %s==\\n' $?\n".encode())
        self._bash.stdin.flush()
        deadline = time.monotonic() + PATIENCE_S
        printed = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._bash.stdout, selectors.EVENT_READ)
            while not (end := re.search(rb"\n==done (\d+)==\n$", printed)):
                assert selector.select(deadline - time.monotonic()), (
                    f"{command} goes on for ever:\n{printed.decode()}"
                )
                more = os.read(self._bash.stdout.fileno(), 1 << 16)
                assert more, f"the shell ended:\n{printed.decode()}"
                printed += more
        return printed[: end.start()].decode(), int(end[1])

    def end(self) -> None:
        """End it and what it has started."""
        os.killpg(self._bash.pid, 9)
        self._bash.wait()


def follow(shell: Shell, step: Step) -> None:
    """Do one thing that the page asks for."""
    command = step.command
    if not command:
        write_inventory("\n".join(step.shown))
        return
    if not HAS_VENV and re.match(r"make |source |\S*requirements/install\.sh ", command):
        say(f"left out, as the tests run with another Python than .venv's: {command}")
        return
    if "--watch" in command:
        command = f"timeout --signal=INT {WATCHED_S} {command} || [ $? = 124 ]"
    say(command)
    printed, code = shell.type(command)
    assert code == 0, f"{step.section}: {command} ended with {code}:\n{printed[-6000:]}"
    assert as_printed(printed, step.shown), f"{step.section}: {command} printed:\n{printed[-6000:]}"


def write_inventory(text: str) -> None:
    """Put a block of the page into the inventory."""
    present = yaml.safe_load(MINE.read_text()) if MINE.exists() else {}
    wanted = merged(present, yaml.safe_load(text))
    if not HAS_VENV:
        wanted["all"]["children"]["cluster"]["vars"]["fl_wheel"] = str(supplies.wheel())
    MINE.write_text(yaml.safe_dump(wanted, sort_keys=False))


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, key by key; the second wins."""
    both = dict(first)
    for key, value in second.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


@pytest.fixture(scope="module")
def shell(lab: Lab) -> Iterator[Shell]:
    """A shell beside new hosts. Nothing stays of what is made with it."""
    for path in MADE:
        assert not path.exists(), f"{path} is in the way; is it yours?"
    lab.renew()
    shell = Shell(lab)
    yield shell
    shell.end()
    for path in [*MADE, *ANSIBLE.glob("device-*.log")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # others' secrets may lie there
        MADE[1].parent.rmdir()
    lab.renew()


@pytest.mark.full
@pytest.mark.parametrize("section", dict.fromkeys(step.section for step in steps()))
def test_the_page_leads_from_empty_hosts_to_training_devices(section: str, shell: Shell, lab: Lab) -> None:
    """One section after another; each needs what those before it have made."""
    for step in steps():
        if step.section == section:
            follow(shell, step)
    if section.endswith("Deploy"):
        owners_are_as_told(lab["server1"])


def owners_are_as_told(host: Host) -> None:
    """Compare owners and modes on a server host with the table of OPERATIONS.md."""
    text = table_section(page("OPERATIONS.md"), "Users, files, units")
    found = 0
    for paths, told, _ in table(text, "path", "owner, mode", "what"):
        for path in codes(paths):
            owner, _, mode = told.partition(" ")
            printed = host.sh(
                f"stat --format='%U:%G 0%a' {path}", check=False
            ).strip()  # a * in it is the shell's
            if printed.startswith(owner if not mode else told):
                found += 1
            else:
                assert "No such file" in printed, f"{path}: {printed}, not {told}"
    assert found >= 9
