"""``python -m lab``, which tests/lab/run calls: prepares what is made once, then carries the lab.

A lab lives in mount, process and network namespaces of its own. Whatever is mounted, started or connected there
is gone as soon as this process is, however it ends. inside.py goes on in there.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from lab import supplies
from lab.base_tree import base_tree
from lab.cli import HELP
from lab.commands import STARTED, say
from lab.errors import LabError, Unfit
from lab.machine import make_fit
from lab.places import PREFIX, STATE, Places

PREFIXES = [f"fedlab{number}" for number in range(1, 10)]
MINUTES = 60.0  # for tests; 15 are enough for make lab on two free cores
HELD_MINUTES = 480.0
# If this process is killed, so is unshare, and with it all that is inside.
NAMESPACES = (
    *("setpriv", "--pdeathsig", "KILL", "--"),
    *("unshare", "--mount", "--pid", "--net", "--fork", "--kill-child=KILL", "--mount-proc"),
)


def arguments(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest, which is pytest's or, after --in, a command of the lab."""
    parser = argparse.ArgumentParser(
        prog="tests/lab/run",
        allow_abbrev=False,
        description="Real systemd hosts on this machine. What is not listed here goes to pytest.",
    )
    parser.add_argument(
        "--prefix", default=os.environ.get(PREFIX), help="name of the lab (default: a free one)"
    )
    parser.add_argument("--minutes", type=float, help="end everything after so long")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shell", action="store_true", help="start the hosts, then a prompt beside them")
    what.add_argument("--hold", action="store_true", help="start the hosts, then wait to be ended")
    what.add_argument(
        "--in",
        dest="inside",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="do something in a lab that is held already; --in help lists what",
    )
    return parser.parse_known_args(words)


def main(words: list[str]) -> int:
    """Run what is asked for; returns only if that is not a lab of its own."""
    os.environ.setdefault(STARTED, str(time.monotonic()))
    options, rest = arguments(words)
    try:
        if options.inside is not None:
            if options.inside in ([], ["help"]):
                print(HELP)
                return 0
            enter(options.prefix, options.inside)
        make_fit()
        prefix, lock = take(options.prefix)
        supplies.debs(base_tree())
        supplies.wheels()
        supplies.wheel()
    except Unfit as reason:
        print(f"lab skipped: {reason}")
        print("=" * 25, "0 passed, 0 failed, 1 skipped", "=" * 25)
        return 0
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    return carry(prefix, lock, options, rest)


def take(prefix: str | None) -> tuple[str, int]:
    """Lock a lab of this prefix, or the first free one.

    Returns:
        Its prefix, and the file that holds the lock for as long as any process has it open.

    Raises:
        LabError: it is in use.
    """
    STATE.mkdir(parents=True, exist_ok=True)
    for name in [prefix] if prefix else PREFIXES:
        lock = os.open(Places(name).lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        os.truncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        return name, lock
    raise LabError(f"a lab {prefix or PREFIXES[-1]} is running already; end it or name another with --prefix")


def carry(prefix: str, lock: int, options: argparse.Namespace, rest: list[str]) -> int:
    """Start the lab in its namespaces and wait for its end; returns the exit code of what runs inside."""
    mode = "shell" if options.shell else "hold" if options.hold else "tests"
    minutes = options.minutes or (MINUTES if mode == "tests" else HELD_MINUTES)
    inside = (sys.executable, "-m", "lab.inside", mode, str(minutes), *rest)
    environment = {**os.environ, PREFIX: prefix}
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # in the background of a script it is ignored, which is inherited
    lab = subprocess.Popen([*NAMESPACES, *inside], env=environment, pass_fds=[lock])

    def end(number: int, frame: FrameType | None) -> None:
        if first := _first_process(os.getpid()):
            os.kill(first, signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the tests by itself
    return lab.wait()


def enter(prefix: str | None, command: list[str]) -> None:
    """Replace this process by one in a running lab.

    Raises:
        LabError: it cannot be told which lab is meant.
    """
    labs = {path.stem: first for path in STATE.glob("*.lock") if (first := _first_process(_holder(path)))}
    if prefix:
        labs = {name: pid for name, pid in labs.items() if name == prefix}
    if len(labs) != 1:
        raise LabError(f"which lab? Running: {', '.join(labs) or 'none'}; name one with --prefix")
    ((name, pid),) = labs.items()
    os.environ[PREFIX] = name
    os.environ.pop(STARTED)
    namespaces = ("nsenter", "-t", str(pid), "-m", "-p", "-n", f"--wdns={os.getcwd()}", "--")
    words = [*namespaces, sys.executable, "-m", "lab.cli", *command]
    os.execvp(words[0], words)


def _holder(lock: Path) -> int | None:
    """The process that a lab's lock names, if it is held."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read())
    return None


def _first_process(carrier: int | None) -> int | None:
    """The first process inside the lab: the child of unshare, which is the child of the one that carries the lab."""
    process = carrier
    for _ in range(2):
        children = Path(f"/proc/{process}/task/{process}/children")
        listed = children.read_text().split() if children.exists() else []
        process = int(listed[0]) if listed else None
    return process


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
