"""Become another program that the kernel kills as soon as the parent is gone, however it went.

Run as a file: ``python -I -S leash.py PARENT_PID PROGRAM ARGUMENTS...``. The process keeps its pid, its files and
its environment; only Linux knows how. Nothing but the standard library is imported, so that this is quick.

Source: prctl(2), PR_SET_PDEATHSIG: kept over execve(2), and bound to the *thread* that started the child.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent: int, command: list[str]) -> NoReturn:
    """Tie this process to its parent and execute the command.

    Args:
        parent: pid of the process that started this one.
        command: program, found on PATH unless it holds a slash, and its arguments.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), zero, zero, zero) != 0:
        sys.exit(f"leash: prctl failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it went before the kernel knew of us
        sys.exit("leash: the parent is gone")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
