"""The controller: where playbooks, operators and devices run. It is this process's own network namespace.

So whatever a test does in its own process, or starts, is on the controller and reaches the hosts, and nothing
else. ``ssh deploy@ADDRESS`` works as it stands: the lab's mount namespace has its own /etc/ssh/ssh_config.d.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import supplies
from lab.base_tree import USER
from lab.commands import call, say
from lab.errors import CommandFailed, LabError, TookTooLong
from lab.places import INVENTORY, TREE, Places

SSH_CONFIG = Path("/etc/ssh/ssh_config.d")
_RECAP = re.compile(r"^(\S+)\s+: (ok=\d+ .*)$", re.MULTILINE)


@dataclass(frozen=True)
class Played:
    """What a playbook has done.

    Attributes:
        recap: host -> word of the recap (ok, changed, unreachable, failed, skipped, rescued, ignored) -> number.
        output: all that ansible-playbook printed.
        code: its exit code.
        seconds: how long it took.
    """

    recap: Mapping[str, Mapping[str, int]]
    output: str
    code: int
    seconds: float

    @property
    def changed(self) -> dict[str, int]:
        """Host -> number of changes, of the hosts where there were any."""
        return {host: words["changed"] for host, words in self.recap.items() if words["changed"]}

    @property
    def failed(self) -> dict[str, int]:
        """Host -> number of failed tasks (an unreachable host is one), of the hosts where there were any."""
        troubles = {host: words["failed"] + words["unreachable"] for host, words in self.recap.items()}
        return {host: number for host, number in troubles.items() if number}


class Controller:
    """What runs beside the hosts.

    Args:
        places: of the lab.
        address: the controller's.
    """

    def __init__(self, places: Places, address: str) -> None:
        self._places = places
        self.address = address

    @property
    def secrets(self) -> Path:
        """What playbooks get as fl_secrets_dir: the CA and the passwords of this lab's cluster."""
        return self._places.run / "secrets"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of all that runs here: Ansible's programs on PATH, and settings that suit a lab."""
        path = [str(Path(sys.executable).parent), os.environ["PATH"]]
        return {
            **os.environ,
            "PATH": os.pathsep.join(path),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_FORCE_COLOR": "0",
            "ANSIBLE_LOCAL_TEMP": str(self._places.run / "ansible"),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self._places.control_sockets),
        }

    def sh(
        self,
        line: str,
        *,
        check: bool = True,
        timeout: float = 120,
        cwd: Path = TREE,
        env: Mapping[str, str] = {},
    ) -> subprocess.CompletedProcess[str]:
        """Run a line of bash; ``stdout`` of what it returns has both streams. See commands.call()."""
        environment = {**self.environment, **env}
        return call("bash", "-c", line, check=check, timeout=timeout, cwd=cwd, env=environment)

    def spawn(self, command: Sequence[str | Path], log: Path, cwd: Path = TREE) -> subprocess.Popen[bytes]:
        """Start a program that goes on beside the test, in a process group of its own; the caller ends it.

        Args:
            command: program and arguments.
            log: takes both its streams.
            cwd: where it runs.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            return subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=self.environment,
                process_group=0,
            )

    def play(
        self,
        playbook: str,
        *arguments: str,
        check: bool = True,
        timeout: float = 600,
        inventory: Path = INVENTORY,
        env: Mapping[str, str] = {},
    ) -> Played:
        """Run a playbook of ansible/ against the hosts. What it prints is kept among the artefacts.

        Args:
            playbook: such as "site.yml".
            arguments: more for ansible-playbook, such as "--check", "-e", "fl_servers=4".
            check: whether a failure is an error.
            timeout: seconds, after which it is interrupted.
            inventory: the hosts, if other than the lab's.
            env: settings for Ansible beyond the lab's.

        Raises:
            CommandFailed: it failed; the end of what it printed is in the text.
            TookTooLong: it had to be interrupted.
        """
        number = len(list(self._places.artefacts.glob("play-*.log"))) + 1
        log = self._places.artefacts / f"play-{number:02}-{Path(playbook).stem}.log"
        ours = ("-e", f"fl_secrets_dir={self.secrets}", "-e", f"fl_wheel={supplies.wheel()}")
        command = ["ansible-playbook", "-i", str(inventory), playbook, *ours, *arguments]
        what = shlex.join([playbook, *arguments])
        say(f"play {what}")
        started = time.monotonic()
        code = self._run_logged(command, log, TREE / "ansible", timeout, {**self.environment, **env})
        output = log.read_text(errors="replace")
        played = Played(read_recap(output), output, code, time.monotonic() - started)
        outcome = f"changed {sum(played.changed.values())}, failed {sum(played.failed.values())}"
        say(f"played {what} in {played.seconds:.0f} s: ended with {code}, {outcome}")
        if check and code:
            raise CommandFailed(f"{what} (all of it: {log})", code, output[-6000:])
        return played

    def _run_logged(
        self, command: Sequence[str], log: Path, cwd: Path, timeout: float, env: Mapping[str, str]
    ) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=cwd,
                    env=env,
                    process_group=0,
                )
            except FileNotFoundError:
                raise LabError(f"{command[0]} is neither beside {sys.executable} nor on PATH") from None
            try:
                return process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise TookTooLong(
                    f"{shlex.join(command)} was not done after {timeout:g} s; see {log}"
                ) from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def prepare(self) -> None:
        """Make the key and the configuration of ssh; called once, by the lab's first process."""
        key = self._places.key
        key.parent.mkdir(parents=True)
        self._places.control_sockets.mkdir()
        self.secrets.mkdir(mode=0o700)
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", key)
        SSH_CONFIG.mkdir(parents=True, exist_ok=True)
        call("mount", "-t", "tmpfs", "-o", "mode=755", "lab", SSH_CONFIG)
        (SSH_CONFIG / "lab.conf").write_text(
            f"""\
Host *
    User {USER}
    IdentityFile {key}
    IdentitiesOnly yes
    # Each host has new keys after it was erased.
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    # A host that lost its power must not hold anyone up.
    ConnectTimeout 10
    ServerAliveInterval 5
    ServerAliveCountMax 3
"""
        )


def read_recap(output: str) -> dict[str, dict[str, int]]:
    """The numbers below PLAY RECAP."""
    recap = output.rpartition("PLAY RECAP")[2]
    return {
        host: {word: int(number) for word, number in (pair.split("=") for pair in words.split())}
        for host, words in _RECAP.findall(recap)
    }
