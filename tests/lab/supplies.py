"""What hosts install from, since they reach nothing outside: a Debian repository and a folder of wheels.

Both are mounted read-only into every host, and its apt and pip are configured to use nothing else:

    /srv/lab/debs     DEBS and what they need beyond the base tree
    /srv/lab/wheels   what requirements/run.lock names, and EXTRA_WHEELS, for the hosts' Python

The project's own wheel is not there: Ansible brings it from the controller.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from lab import base_tree, sources
from lab.commands import call
from lab.places import TREE
from lab.store import keyed

# Debian packages that roles install; add here what a new role needs.
DEBS = (
    *("python3-venv", "python3-apt", "python3-packaging", "acl", "chrony"),  # common
    *("redis-server", "redis-sentinel", "redis-tools"),  # redis
    "nftables",  # firewall
    "haproxy",  # haproxy
    "prometheus",  # prometheus
    *("curl", "openssl", "rsync"),  # for people and tests
)
LOCK = TREE / "requirements/run.lock"
# What the worker's example trainer imports on top; in the versions, and with the hashes, of this list.
EXTRA_WHEELS = ("scikit-learn",)
EXTRA_LOCK = TREE / "requirements/demo.lock"
HOST_PYTHON = (3, 11)
# What the project's wheel is made of.
SOURCES = ("setup.py", "pyproject.toml", "README.md", "lib", "daemons", "examples")
VERSION_FILE = "lib/fedcore/__init__.py"
_VERSION_LINE = r"^__version__ = .*$"


def debs(base: Path) -> Path:
    """The folder of the Debian repository.

    The machine's apt downloads the packages with its own settings (a proxy, for instance), looking at the base
    tree's list of installed packages instead of the machine's.
    """

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="lab-apt-") as own:
            apt = _apt(Path(own), base, folder)
            call(*apt, "update", timeout=300)
            call(*apt, "install", "--yes", "--download-only", "--no-install-recommends", *DEBS, timeout=900)
        shutil.rmtree(folder / "partial", ignore_errors=True)
        (folder / "lock").unlink(missing_ok=True)
        index = call(
            "sh", "-c", 'cd "$1" && dpkg-scanpackages --multiversion . 2>/dev/null', "sh", folder
        ).stdout
        (folder / "Packages").write_text(index)

    return keyed("debs", repr((base.name, DEBS)), make)


def _apt(own: Path, base: Path, archives: Path) -> list[str]:
    sources.write_list(base_tree.SUITE, base / "usr/share/keyrings/debian-archive-keyring.gpg", own / "list")
    for folder in ("lists/partial", "parts", "state"):
        (own / folder).mkdir(parents=True)
    (archives / "partial").mkdir()
    options = {
        "Dir::Etc::sourcelist": own / "list",
        "Dir::Etc::sourceparts": own / "parts",
        "Dir::Etc::preferencesparts": own / "parts",
        "Dir::State": own / "state",
        "Dir::State::lists": own / "lists",
        "Dir::State::status": base / "var/lib/dpkg/status",
        "Dir::Cache::archives": archives,
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Sandbox::User": "root",
        "APT::Update::Post-Invoke-Success::": "true",
    }
    return ["apt-get", "-qq", *(f"--option={name}={value}" for name, value in options.items())]


def wheels() -> Path:
    """The folder of wheels that the hosts' venvs are filled from."""

    def make(folder: Path) -> None:
        for text in texts:
            with tempfile.NamedTemporaryFile("w", suffix=".lock") as lock:
                lock.write(text)
                lock.flush()
                call(
                    *_pip(),
                    "download",
                    "--require-hashes",
                    "-r",
                    lock.name,
                    "-d",
                    folder,
                    *_for_hosts(),
                    timeout=900,
                )

    texts = (LOCK.read_text(), part_of_lock(EXTRA_LOCK.read_text(), EXTRA_WHEELS))
    return keyed("wheels", repr((HOST_PYTHON, platform.machine(), texts)), make)


def part_of_lock(lock: str, wanted: Iterable[str]) -> str:
    """The lines of a lock file for some packages and what they need, as its "via" comments say."""
    blocks = {block.split("==")[0]: block for block in re.split(r"\n(?=[a-z])", lock) if "==" in block}
    needed_by = {
        name: set(re.findall(r"# +(?:via )?([a-z0-9-]+)$", text, re.M)) for name, text in blocks.items()
    }
    chosen: set[str] = set()
    new = set(wanted)
    while new:
        chosen |= new
        new = {name for name, users in needed_by.items() if users & chosen} - chosen
    return "\n".join(blocks[name] for name in sorted(chosen)) + "\n"


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def _for_hosts() -> list[str]:
    """Make pip choose for the hosts' Python when its own is another."""
    if sys.version_info[:2] == HOST_PYTHON:
        return []
    version = "".join(map(str, HOST_PYTHON))
    machine = platform.machine()
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(36, 16, -1)] + [
        f"manylinux2014_{machine}"
    ]
    return [
        "--only-binary=:all:",
        f"--python-version={version}",
        "--implementation=cp",
        *(f"--abi={abi}" for abi in (f"cp{version}", "abi3", "none")),
        *(f"--platform={name}" for name in platforms),
    ]


def wheel(version: str | None = None) -> Path:
    """A wheel of this tree.

    Args:
        version: what it says that its version is, for tests of an upgrade; the tree's own if None.
    """
    ingredients = hashlib.sha256(repr((sys.version_info[:2], version)).encode())
    for path in _source_files():
        ingredients.update(
            f"{path.relative_to(TREE)}\0{os.access(path, os.X_OK)}\0".encode() + path.read_bytes()
        )

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="lab-wheel-") as own:
            for path in _source_files():
                copy = own / path.relative_to(TREE)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
            if version:
                stated = Path(own, VERSION_FILE)
                stated.write_text(
                    re.sub(_VERSION_LINE, f'__version__ = "{version}"', stated.read_text(), flags=re.M)
                )
            offline = ("--no-deps", "--no-build-isolation", "--no-index")
            call(*_pip(), "wheel", *offline, "-w", folder, own, timeout=300)

    folder = keyed("dist", ingredients.hexdigest(), make)
    return next(folder.glob("fedcore-*.whl"))


def _source_files() -> list[Path]:
    found = [path for name in SOURCES for path in (TREE / name, *(TREE / name).rglob("*"))]
    generated = re.compile(r"__pycache__|\.egg-info|\.(pyc|so)$")
    return sorted(path for path in found if path.is_file() and not generated.search(str(path)))
