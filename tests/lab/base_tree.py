"""The tree that all hosts start from: a bare Debian 12 with ssh, sudo and the user that Ansible comes as.

Nothing that a role installs is in it. The tree is the lower layer of every host's disk, so it never changes once
it is made; it is kept unpacked and as a tarball (a machine for tests may keep just the tarball from run to run).
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from lab import sources
from lab.commands import call, say
from lab.places import CACHE
from lab.store import keyed

SUITE = "bookworm"
PACKAGES = (
    *("systemd", "systemd-sysv", "libpam-systemd", "dbus", "python3", "openssh-server", "sudo"),
    *("iproute2", "iputils-ping", "procps", "ca-certificates", "netbase"),
    "libfaketime",  # for wrong clocks, see clock.py
)
USER = "deploy"
USER_ID = 1000
INIT = "/usr/local/sbin/lab-init"
# Units that would fail or work in vain in a host without hardware, network or past.
MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "systemd-pstore.service", "console-getty.service"),
)

FILES = {
    "etc/sudoers.d/deploy": (0o440, f"{USER} ALL=(ALL) NOPASSWD:ALL\n"),
    "etc/machine-id": (0o444, ""),
    # One kind of key: making an RSA key takes longer than the rest of the boot.
    "etc/systemd/system/lab-host-key.service": (
        0o644,
        """\
[Unit]
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key
Before=ssh.service
[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key
[Install]
WantedBy=ssh.service
""",
    ),
    # Version 1 controllers arrive read-only; with these writable, MemoryMax=, TasksMax= and CPUQuota= hold.
    # So do the settings of the host's own network.
    INIT.lstrip("/"): (
        0o755,
        """\
#!/bin/sh
for controller in memory pids cpu cpuacct cpu,cpuacct; do
    mount -o remount,bind,rw,nosuid,nodev,noexec "/sys/fs/cgroup/$controller" 2>/dev/null
done
mount --bind /proc/sys/net /proc/sys/net && mount -o remount,bind,rw /proc/sys/net
exec /lib/systemd/systemd "$@"
""",
    ),
}
REMOVED = ("etc/hostname", "etc/resolv.conf", "etc/ssh/ssh_host_*", "var/cache/apt/archives/*.deb")


def base_tree() -> Path:
    """The folder of the tree; made, or unpacked, if need be."""
    recipe = repr((SUITE, PACKAGES, USER, USER_ID, MASKED, sorted(FILES.items()), REMOVED))
    return keyed("base", recipe, _unpack_or_make)


def _unpack_or_make(tree: Path) -> None:
    tarball = CACHE / f"{tree.stem}.tar.zst"
    if tarball.exists():
        with subprocess.Popen(["zstd", "-qdc", str(tarball)], stdout=subprocess.PIPE) as unpacked:
            subprocess.run(_tar(tree, "-x"), stdin=unpacked.stdout, check=True, timeout=300)
        return
    _make(tree)
    part = tarball.with_suffix(".part")
    with part.open("wb") as file, subprocess.Popen(_tar(tree, "-c", "."), stdout=subprocess.PIPE) as packed:
        subprocess.run(["zstd", "-q", "-3", "-T0"], stdin=packed.stdout, stdout=file, check=True, timeout=300)
    part.rename(tarball)
    for old in sorted(CACHE.glob("base-*.tar.zst"), key=lambda path: path.stat().st_mtime)[:-3]:
        old.unlink()


def _tar(tree: Path, *what: str) -> list[str]:
    return ["tar", "-C", str(tree), "--numeric-owner", "--xattrs", *what]


def _make(tree: Path) -> None:
    say("debootstrap: Debian packages for the base tree (about a minute)")
    packages = ",".join(PACKAGES)
    call(
        "debootstrap",
        "--variant=minbase",
        f"--include={packages}",
        SUITE,
        tree,
        sources.mirror(SUITE),
        timeout=900,
    )
    call("chroot", tree, "useradd", "--uid", str(USER_ID), "-m", "-s", "/bin/bash", USER)
    for pattern in REMOVED:
        for path in tree.glob(pattern):
            path.unlink()
    for name, (mode, text) in FILES.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
    (tree / "var/log/journal").mkdir(exist_ok=True)  # the journal survives a power cut
    call("chroot", tree, "systemctl", "--quiet", "enable", "lab-host-key.service")
    call("chroot", tree, "systemctl", "--quiet", "mask", *MASKED)
    shutil.rmtree(tree / "var/lib/apt/lists")
