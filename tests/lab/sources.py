"""Where Debian packages come from: the places that this machine's own apt uses, if it is a Debian of that suite."""

from __future__ import annotations

import shutil
from pathlib import Path

from lab.commands import call

MIRROR = "http://deb.debian.org/debian"
SECURITY = "http://deb.debian.org/debian-security"
_FORMAT = "$(REPO_URI)|$(CODENAME)|$(COMPONENT)|$(ORIGIN)"


def repositories(suite: str) -> list[tuple[str, str]]:
    """(address, name of the suite) of each: the main one first, then updates and security."""
    found: dict[tuple[str, str], None] = {}
    if shutil.which("apt-get"):
        listed = call("apt-get", "indextargets", "--format", _FORMAT, "Created-By: Packages").stdout
        for line in listed.splitlines():
            address, name, component, origin = [*line.split("|"), "", "", ""][:4]
            if (origin, component) == ("Debian", "main") and name.split("-")[0] == suite:
                found[address, name] = None
    ours = sorted(found, key=lambda repository: repository[1] != suite)
    if not ours or ours[0][1] != suite:
        return [(MIRROR, suite), (MIRROR, f"{suite}-updates"), (SECURITY, f"{suite}-security")]
    return ours


def mirror(suite: str) -> str:
    """The address of the main repository."""
    return repositories(suite)[0][0]


def write_list(suite: str, keyring: Path, file: Path) -> None:
    """Write an apt source list of these repositories."""
    lines = [f"deb [signed-by={keyring}] {address} {name} main" for address, name in repositories(suite)]
    file.write_text("\n".join(lines) + "\n")
