"""Runs commands, waits for things to come true, and tells the person in front of the terminal how far it is.

Nothing here waits without a deadline.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from lab.errors import CommandFailed, TookTooLong

T = TypeVar("T")

STARTED = "FEDCORE_LAB_STARTED"  # time.monotonic() of the start of the whole run, which is the zero of progress lines
PROGRESS_FD = "FEDCORE_LAB_PROGRESS_FD"  # standard error from before pytest took it away


def say(text: str) -> None:
    """Print a line of progress, with the seconds since the start of the run."""
    started = float(os.environ.setdefault(STARTED, str(time.monotonic())))
    seconds = time.monotonic() - started
    os.write(int(os.environ.get(PROGRESS_FD, "2")), f"[lab {seconds:5.1f} s] {text}\n".encode())


def call(
    *command: str | Path,
    timeout: float = 60,
    text: str | None = None,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    what: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Args:
        command: program and arguments.
        timeout: seconds, after which the command is killed.
        text: its standard input.
        check: whether any code but 0 is an error.
        env: its whole environment; this process's if None.
        cwd: where it runs.
        what: names the command in error messages; the command itself if None.

    Returns:
        Its code and what it printed: ``stdout`` holds both streams in their order.

    Raises:
        CommandFailed: it ended with another code than 0.
        TookTooLong: it had to be killed.
    """
    what = what or shlex.join(map(str, command))
    try:
        done = subprocess.run(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=timeout,
            env=env,
            cwd=cwd,
            **({"stdin": subprocess.DEVNULL} if text is None else {"input": text}),
        )
    except subprocess.TimeoutExpired as late:
        printed = (late.stdout or b"").decode(errors="replace")
        raise TookTooLong(f"{what} was not done after {timeout:g} s:\n{printed}") from None
    if check and done.returncode:
        raise CommandFailed(what, done.returncode, done.stdout)
    return done


def wait_until(check: Callable[[], T], seconds: float, what: str, pause: float = 0.05) -> T:
    """Wait for a condition that gives no notice of itself.

    Args:
        check: asked again and again; anything true ends the waiting.
        seconds: how long at most.
        what: for the message, such as "server1 has ended".
        pause: seconds between two questions.

    Returns:
        What ``check`` returned in the end.

    Raises:
        TookTooLong: it never was true.
    """
    deadline = time.monotonic() + seconds
    while True:
        if answer := check():
            return answer
        if time.monotonic() > deadline:
            raise TookTooLong(f"not within {seconds:g} s: {what}")
        time.sleep(pause)
