"""Whether this machine can carry a lab: programs, rights, namespaces, mounts. What can be installed is installed."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from lab.cgroups import find_hierarchies
from lab.commands import call, say
from lab.errors import CommandFailed, TookTooLong, Unfit
from lab.places import STATE

# Program -> Debian package that has it.
PROGRAMS = {
    "debootstrap": "debootstrap",
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "dpkg-scanpackages": "dpkg-dev",
    "ssh": "openssh-client",
    "setpriv": "util-linux",
    "zstd": "zstd",
    "nft": "nftables",
}
# Each systemd takes about ten of them, of one number for the whole machine, which is 128 on many.
INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
INOTIFY_NEEDED = 1024

# What a lab does with the kernel, tried in namespaces of its own; each line tells what is missing.
PROBES = {
    "new namespaces": "true",
    "an overlay file system on {state}": (
        'd=$(mktemp -d {state}/probe.XXXXXX); trap \'rm -rf "$d"\' EXIT; mkdir "$d/l" "$d/u" "$d/w" "$d/m"; '
        'mount -t overlay -o "lowerdir=$d/l,upperdir=$d/u,workdir=$d/w" lab "$d/m" && umount "$d/m"'
    ),
    "bridges and virtual cables": (
        "ip link add name lab0 type bridge && ip link add name lab1 type veth peer name lab2 && "
        "ip link set lab1 master lab0"
    ),
    "nftables": "nft add table bridge probe",
}


def make_fit() -> None:
    """Install what is missing, and try what a lab needs.

    Raises:
        Unfit: something is missing that cannot be had; the text is the reason for skipping.
    """
    if not sys.platform.startswith("linux"):
        raise Unfit("needs Linux")
    if os.geteuid() != 0:
        raise Unfit("needs root (control groups, mounts, network namespaces)")
    _install_missing()
    find_hierarchies()
    _raise_inotify()
    STATE.mkdir(parents=True, exist_ok=True)
    for what, probe in PROBES.items():
        command = ("unshare", "--mount", "--pid", "--net", "--fork", "--mount-proc", "sh", "-c")
        try:
            call(*command, probe.replace("{state}", str(STATE)))
        except (CommandFailed, TookTooLong) as error:
            reason = str(error).strip().splitlines()[-1]
            raise Unfit(f"this machine refuses {what.replace('{state}', str(STATE))}: {reason}") from None


def _raise_inotify() -> None:
    """Let several labs run beside each other: without, units of their hosts fail with "Result: resources"."""
    if INOTIFY.exists() and int(INOTIFY.read_text()) < INOTIFY_NEEDED:
        try:
            INOTIFY.write_text(str(INOTIFY_NEEDED))
        except OSError as error:
            say(f"{INOTIFY} stays at {INOTIFY.read_text().strip()} ({error.strerror}): one lab at a time")
        else:
            say(f"{INOTIFY} is {INOTIFY_NEEDED} now")


def _install_missing() -> None:
    packages = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)})
    if not packages:
        return
    if not shutil.which("apt-get"):
        raise Unfit(f"programs are missing, and there is no apt-get to install them: {' '.join(packages)}")
    say(f"installing on this machine: {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        call("apt-get", "-qq", "update", timeout=300, env=environment)
        install = ("apt-get", "-qq", "install", "--yes", "--no-install-recommends", *packages)
        call(*install, timeout=600, env=environment)
    except (CommandFailed, TookTooLong) as error:
        reason = str(error).strip().splitlines()[-1]
        raise Unfit(
            f"programs are missing and could not be installed ({' '.join(packages)}): {reason}"
        ) from None
