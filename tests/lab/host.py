"""One host: a Debian with its own systemd in a container, which can lose its power.

What a host is made of, all of it gone when the lab's first process ends:

* a disk: an overlay over the base tree. It survives a power cut; what the host has on tmpfs does not. (Not shown
  is the loss of what the machine's kernel had not yet written: its cache stays.)
* a network namespace with a cable to the bridge (network.py), made anew at each start,
* control groups (cgroups.py), through which it is ended and paused, and in which limits hold,
* systemd-nspawn, started by a small shell script that starts it again when the host reboots.

Commands run in a host by entering its namespaces, not over ssh: the test must see what goes on in a host whose
network is cut, and needs no second session for that. Such a command has the capabilities of the host's own first
process and no more; with those of the machine, a ``date -s`` would turn the machine's clock.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import uuid
from collections.abc import Mapping
from ipaddress import IPv4Address
from pathlib import Path

from lab import clock
from lab.base_tree import INIT, USER, USER_ID
from lab.cgroups import HostGroup
from lab.commands import call, wait_until
from lab.errors import CommandFailed, HostDown, LabError
from lab.network import NAMESPACES, Network
from lab.places import Places

BOOT_S = 90
REBOOT_CODE = 133  # what systemd-nspawn ends with when its host asks for a reboot
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "SYSTEMD_PAGER": "",
}
DISK_DIRECTORIES = ("upper", "work", "root")


class Host:
    """A host of the lab. Its state is in the kernel and on disk, so any process of the lab may hold one.

    Args:
        name: as in the inventory.
        address: as in the inventory.
        places: of the lab.
        group: its control groups.
        network: of the lab.
        known: name -> address of all, for its /etc/hosts.
        base: the base tree.
        mounts: folder in the host -> folder of this machine that is seen there, read-only.
    """

    def __init__(
        self,
        name: str,
        address: IPv4Address,
        places: Places,
        group: HostGroup,
        network: Network,
        known: Mapping[str, IPv4Address],
        base: Path,
        mounts: Mapping[str, Path],
    ) -> None:
        self.name = name
        self.address = str(address)
        self._places = places
        self._folder = places.host(name)
        self._group = group
        self._network = network
        self._known = known
        self._base = base
        self._mounts = mounts

    def __repr__(self) -> str:
        return f"<Host {self.name} {self.address}>"

    @property
    def root(self) -> Path:
        """The host's disk as this machine sees it (without the host's tmpfs)."""
        return self._folder / "root"

    @property
    def console(self) -> Path:
        """What the host and systemd-nspawn said on the console, from its first start on."""
        return self._places.artefacts / f"{self.name}.console"

    # --- power

    @property
    def is_up(self) -> bool:
        """Whether it has power: something of it lives, if only paused or half booted."""
        return self._group.populated()

    @property
    def is_paused(self) -> bool:
        """Whether its processes are stopped where they are."""
        return self._group.frozen()

    def start(self) -> None:
        """Switch it on and return at once; does nothing if it is on."""
        if self.is_up:
            return
        self._put_in_disk()
        self._network.connect(self.name)
        self._group.make()
        (self._folder / "nspawn.pid").unlink(missing_ok=True)
        self.console.parent.mkdir(parents=True, exist_ok=True)
        script = self._folder / "start.sh"
        script.write_text(self._start_script())
        call("setsid", "--fork", "sh", "-c", 'exec sh "$0" </dev/null >>"$1" 2>&1', script, self.console)
        wait_until((self._folder / "nspawn.pid").exists, 20, f"systemd-nspawn has started {self.name}")

    def await_up(self, healthy: bool = True) -> None:
        """Wait until everything that it starts at boot is started.

        Args:
            healthy: whether a failed unit is an error.

        Raises:
            LabError: a unit failed, or the host has ended; its console's or the unit's log is in the text.
            TookTooLong: it still boots after BOOT_S seconds.
        """

        def booted() -> bool:
            if not self.is_up:
                raise LabError(f"{self.name} has ended while it booted:\n{self.console.read_text()[-3000:]}")
            try:
                state = self.run(
                    "systemctl", "is-system-running", "--wait", check=False, timeout=BOOT_S
                ).strip()
            except HostDown:
                return False
            if state == "degraded" and healthy:
                failed = self.sh(
                    "systemctl --failed --plain --no-legend; systemctl status --failed --lines 20 || true"
                )
                raise LabError(f"{self.name} is degraded:\n{failed}")
            return state in {"running", "degraded"}

        wait_until(booted, BOOT_S, f"{self.name} has booted")

    def up(self) -> None:
        """Switch it on and wait until it has booted."""
        self.start()
        self.await_up()

    def cut(self) -> None:
        """Cut its power. Nobody hears of it: the link goes first, so no process can say goodbye."""
        if self.is_up:
            self._network.unplug(self.name)
            self._group.kill()
        self._disconnect()

    def poweroff(self, seconds: float = 60) -> None:
        """Shut it down in order: its services are stopped.

        Raises:
            TookTooLong: it still runs after so many seconds.
        """
        if self.is_up:
            call("kill", "-TERM", str(self._nspawn()))
            wait_until(lambda: not self.is_up, seconds, f"{self.name} is off")
        self._disconnect()

    def reboot(self, seconds: float = 60) -> None:
        """Let it reboot, and wait until it is up again."""
        before = self._leader()
        self.run("systemctl", "reboot", check=False)

        def another() -> bool:
            with contextlib.suppress(HostDown):
                return self._leader() != before
            return False

        wait_until(another, seconds, f"{self.name} has begun to boot again")
        self.await_up()

    def pause(self) -> None:
        """Stop all its processes where they are; its kernel still takes connections and data."""
        self._group.freeze(True)

    def resume(self) -> None:
        """Let a paused host go on."""
        self._group.freeze(False)

    def die(self) -> None:
        """End all its processes at once while its link is up: the kernel closes its connections."""
        self._group.kill()
        self._disconnect()

    def erase(self) -> None:
        """Cut its power and take its disk away: at the next start it is a new host of the same name."""
        self.cut()
        if self.root.is_mount():
            call("umount", self.root)
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._group.remove()

    # --- network

    def unplug(self) -> None:
        """Pull its cable."""
        self._network.unplug(self.name)

    def plug(self) -> None:
        """Put its cable back."""
        self._network.plug(self.name)

    # --- inside

    def run(self, *command: str, check: bool = True, timeout: float = 60, text: str | None = None) -> str:
        """Run a command in the host as root, even if its network is down.

        Args:
            command: program and arguments.
            check: whether any code but 0 is an error.
            timeout: seconds.
            text: standard input.

        Returns:
            What it printed, both streams together.

        Raises:
            HostDown: the host has no power, or its first process is not there yet.
            CommandFailed: it ended with another code than 0.
            TookTooLong: it had to be killed.
        """
        what = f"{self.name}: {shlex.join(command)}"
        done = call(*self.entering(*command), check=False, timeout=timeout, text=text, what=what)
        if done.returncode and not self.is_up:
            raise HostDown(f"{self.name} has lost its power during {shlex.join(command)}")
        if check and done.returncode:
            raise CommandFailed(what, done.returncode, done.stdout)
        return done.stdout

    def entering(self, *command: str) -> list[str]:
        """The command for this machine that runs a command in the host.

        Raises:
            HostDown: the host has no power, or its first process is not there yet.
        """
        leader = self._leader()
        environment = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        return [
            *("setpriv", f"--bounding-set=-all,{_capabilities(leader)}", "--"),
            *("nsenter", "-t", str(leader), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "--"),
            *("/usr/bin/env", "-i", *environment, *command),
        ]

    def sh(self, line: str, check: bool = True, timeout: float = 60, text: str | None = None) -> str:
        """Run a line of shell in the host; see run()."""
        return self.run("sh", "-c", line, check=check, timeout=timeout, text=text)

    def read(self, path: str) -> str:
        """The text of a file, on disk or on tmpfs."""
        return self.run("cat", path)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of root's, at once for those who read it meanwhile."""
        quoted = shlex.quote(path)
        part = shlex.quote(f"{path}.part")
        self.sh(
            f'mkdir -p "$(dirname {quoted})" && cat >{part} && chmod {mode:o} {part} && mv {part} {quoted}',
            text=text,
        )

    def journal(self, *arguments: str) -> str:
        """What ``journalctl -o cat`` says, such as journal("-u", "fl-serverd@0", "-b").

        It is read from the disk, so a paused or dead host's journal can be read as well.
        """
        if (self.root / "var/log/journal").is_dir():
            what = ("journalctl", "-D", self.root / "var/log/journal", "--no-pager", "-q", "-o", "cat")
            return call(*what, *arguments).stdout
        return ""

    def show(self, unit: str) -> dict[str, str]:
        """All properties of a unit, as ``systemctl show`` names them."""
        lines = self.run("systemctl", "show", unit).splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def units(self, pattern: str) -> dict[str, str]:
        """Name -> active state of the loaded units that match a pattern, such as ``fl-*.service``."""
        listed = self.run("systemctl", "list-units", "--all", "--plain", "--no-legend", pattern)
        words = [line.split() for line in listed.splitlines()]
        return {word[0]: word[2] for word in words if len(word) > 2}

    def skew(self, seconds: float, prefix: str = "fl-") -> None:
        """Let its services live so many seconds ahead of the others; see clock.py."""
        clock.skew(self, seconds, prefix)

    def step_clock(self, seconds: float) -> None:
        """Change the offset of services with a wrong clock while they run; see clock.py."""
        clock.step(self, seconds)

    def unskew(self, prefix: str = "fl-") -> None:
        """Bring its services back to the right time; see clock.py."""
        clock.unskew(self, prefix)

    # --- how it is made

    def _disconnect(self) -> None:
        self._network.disconnect(self.name)
        for socket in self._places.control_sockets.glob("*"):  # an old connection would hold the next play up
            socket.unlink(missing_ok=True)

    def _put_in_disk(self) -> None:
        """Mount the disk; a new one first gets what tells this host from the others."""
        if self.root.is_mount():
            return
        is_new = not self.root.exists()
        upper, work, root = (self._folder / name for name in DISK_DIRECTORIES)
        for folder in (upper, work, root):
            folder.mkdir(parents=True, exist_ok=True)
        call(
            "mount",
            "-t",
            "overlay",
            "-o",
            f"lowerdir={self._base},upperdir={upper},workdir={work}",
            "overlay",
            root,
        )
        if is_new:
            self._personalise()

    def _personalise(self) -> None:
        identity = uuid.uuid4().hex
        (self._folder / "uuid").write_text(identity)
        hosts = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self._known.items())]
        files = {
            "etc/machine-id": f"{identity}\n",
            "etc/hostname": f"{self.name}\n",
            "etc/hosts": "\n".join(hosts) + "\n",
            "etc/resolv.conf": "",
            "etc/apt/sources.list": "deb [trusted=yes] file:/srv/lab/debs ./\n",
            "etc/pip.conf": "[global]\nno-index = true\nfind-links = /srv/lab/wheels\n",
        }
        for name, text in files.items():
            path = self.root / name
            path.unlink(missing_ok=True)
            path.write_text(text)
        ssh = self.root / "home" / USER / ".ssh"
        ssh.mkdir(mode=0o700)
        (ssh / "authorized_keys").write_text(self._places.key.with_suffix(".pub").read_text())
        for path in (ssh, ssh / "authorized_keys"):
            shutil.chown(path, USER_ID, USER_ID)
        self.root.chmod(0o755)

    def _start_script(self) -> str:
        nspawn = [
            # Entered from outside: /sys then shows the host's own interfaces.
            *("nsenter", f"--net={NAMESPACES / self.name}"),
            *("systemd-nspawn", "--quiet", f"--directory={self.root}", "--settings=no"),
            *(f"--machine={self._places.prefix}-{self.name}", f"--hostname={self.name}"),
            *(f"--uuid={(self._folder / 'uuid').read_text()}", "--register=no", "--keep-unit"),
            *(
                "--resolv-conf=off",
                "--timezone=off",
                "--link-journal=no",
                "--console=read-only",
                "--kill-signal=SIGRTMIN+3",
            ),
            # CAP_BPF for IPAddressDeny= and the like; CAP_NET_ADMIN for the host's own firewall.
            *("--system-call-filter=bpf", "--capability=CAP_BPF,CAP_NET_ADMIN"),
            *("--setenv=TERM=dumb", "--setenv=SYSTEMD_COLORS=0"),
            *(f"--bind-ro={source}:{place}" for place, source in self._mounts.items()),
            INIT,
        ]
        join = "; ".join(f"echo $$ >{path}" for path in self._group.starter_procs)
        join_box = "; ".join(f"echo $$ >{path}" for path in self._group.box_procs)
        pid = self._folder / "nspawn.pid"
        in_box = f"{join_box}; echo $$ >{pid}; exec {shlex.join(nspawn)}"
        return f"{join}\nwhile sh -c {shlex.quote(in_box)}; [ $? = {REBOOT_CODE} ]; do :; done\n"

    def _nspawn(self) -> int:
        """The process id of systemd-nspawn."""
        try:
            return int((self._folder / "nspawn.pid").read_text())
        except (FileNotFoundError, ValueError):
            raise HostDown(f"{self.name} has no power") from None

    def _leader(self) -> int:
        """The process id of the host's first process.

        Raises:
            HostDown: there is none.
        """
        nspawn = self._nspawn()
        try:
            if not self.is_up:
                raise HostDown(f"{self.name} has no power")
            children = Path(f"/proc/{nspawn}/task/{nspawn}/children").read_text().split()
            for child in children:
                if re.search(r"^NSpid:(\t\d+)*\t1$", Path(f"/proc/{child}/status").read_text(), re.MULTILINE):
                    return int(child)
        except FileNotFoundError:
            pass
        raise HostDown(f"{self.name} has not started yet")


def _capabilities(pid: int) -> str:
    """The capabilities that a process can ever have, as setpriv wants them."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        raise HostDown("its first process has just ended") from None
    bounding = int(status.split("CapBnd:")[1].split()[0], 16)
    return ",".join(f"+cap_{number}" for number in range(64) if bounding >> number & 1)
