"""Where the lab keeps things on this machine.

    FEDCORE_LAB_CACHE (/var/cache/fedcore-lab)   what is made once: base tree, packages, wheels; shared by all labs
    FEDCORE_LAB_STATE (/var/tmp/fedcore-lab)     one folder per running lab: its hosts' disks, logs, keys

A lab's prefix tells it from the others on the machine: it names the folder, the control groups and the lock.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]  # the project
CACHE = Path(os.environ.get("FEDCORE_LAB_CACHE", "/var/cache/fedcore-lab"))
STATE = Path(os.environ.get("FEDCORE_LAB_STATE", "/var/tmp/fedcore-lab"))
PREFIX = "FEDCORE_LAB_PREFIX"  # environment variable: the lab that this process belongs to
INVENTORY = TREE / "ansible/inventories/lab.yml"


@dataclass(frozen=True)
class Places:
    """The folders and files of one lab."""

    prefix: str

    @property
    def lock(self) -> Path:
        """Held while anything of this lab lives; its text is the process that holds it."""
        return STATE / f"{self.prefix}.lock"

    @property
    def run(self) -> Path:
        """All that this lab writes. Kept after its end but for the hosts' disks; emptied at the next start."""
        return STATE / self.prefix

    @property
    def artefacts(self) -> Path:
        """Logs for whoever wants to know why a test failed."""
        return self.run / "artefacts"

    @property
    def key(self) -> Path:
        """The throwaway key with which the controller comes to the hosts."""
        return self.run / "ssh/id_ed25519"

    def supply(self, name: str) -> Path:
        """Link to what was made once and this lab uses: "base", "debs", "wheels". It stays the same to its end."""
        return self.run / name

    @property
    def control_sockets(self) -> Path:
        """Where ssh keeps its connections for the next command, when Ansible runs it."""
        return self.run / "cp"

    def host(self, name: str) -> Path:
        """One host's disk and what the lab remembers about the host."""
        return self.run / "hosts" / name
