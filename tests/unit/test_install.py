"""What ``make demo`` does before it installs anything, and the lists of what is installed."""

import os
import re
import subprocess
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = ("run.lock", "demo.lock", "dev.lock", "ansible.lock")
PYTHONS = ("3.11.2", "3.11.9", "3.12.3", "3.13.1", "3.14.0")


@pytest.fixture
def tree(tmp_path):
    """A copy of what installing needs, and a PATH of its own with fake interpreters."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "requirements/install.sh").write_bytes((ROOT / "requirements/install.sh").read_bytes())
    for name in ("sh", "dirname", "flock", "cat", "cmp"):
        (tmp_path / "bin" / name).symlink_to(f"/usr/bin/{name}")
    return tmp_path


def interpreter(tree, name, script):
    path = tree / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def install(tree, **environment):
    return subprocess.run(
        ["/bin/sh", "requirements/install.sh", "demo.lock"],
        check=False,
        cwd=tree,
        env={"PATH": str(tree / "bin"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_no_python(tree):
    done = install(tree)
    assert done.returncode == 1
    assert done.stderr == "there is no Python 3.11 or later: apt-get install python3 python3-venv\n"


def test_an_old_python(tree):
    interpreter(tree, "python3", "exit 1")
    assert install(tree).returncode == 1
    done = install(tree, PYTHON="python3")
    assert done.returncode == 1
    assert done.stderr == "python3 is not Python 3.11 or later; give another: make demo PYTHON=python3.12\n"


def test_no_venv_module(tree):
    interpreter(tree, "python3", 'case "$2" in *ensurepip*) exit 1 ;; esac')
    done = install(tree)
    assert done.returncode == 1
    assert done.stderr == "Python's venv module is missing: apt-get install python3-venv\n"
    assert not (tree / ".venv").exists()


def test_a_newer_python_beside_an_old_one(tree):
    interpreter(tree, "python3", "exit 1")
    interpreter(tree, "python3.12", 'if [ "$2" = venv ]; then echo chosen "$0" >&2; exit 5; fi')
    done = install(tree)
    assert done.returncode == 5
    assert done.stderr == f"chosen {tree}/bin/python3.12\n"


def locked(name):
    """Return canonical package name -> version of a lock."""
    text = (ROOT / "requirements" / name).read_text()
    return {
        canonicalize_name(package): version
        for package, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.M)
    }


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("python", PYTHONS)
def test_a_lock_holds_what_its_packages_ask_for(lock, python):
    """pip-compile sees only the Python it runs on; this looks at the others."""
    packages = locked(lock)
    environment = {
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "os_name": "posix",
        "extra": "",
    }
    missing = set()
    for package in packages:
        try:
            wanted = [Requirement(text) for text in requires(package) or ()]
        except PackageNotFoundError:
            continue  # not for the Python of this run
        for requirement in wanted:
            if requirement.marker is None or requirement.marker.evaluate(environment):
                version = packages.get(canonicalize_name(requirement.name))
                if version is None or not requirement.specifier.contains(version, prereleases=True):
                    missing.add(f"{package}: {requirement}")
    assert missing == set()


def test_the_locks_agree():
    run, demo, dev, ansible = (locked(lock) for lock in LOCKS)
    assert run.items() <= demo.items() <= dev.items()
    assert all(dev.get(name, version) == version for name, version in ansible.items())


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_packages_and_hashes_only(lock):
    text = (ROOT / "requirements" / lock).read_text()
    assert "://" not in text
    assert not re.search(r"^\s*--(?!hash=sha256:[0-9a-f]{64}\b)", text, re.M)
    assert str(ROOT) not in text


def test_make_help_lists_every_word():
    words = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    shown = subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory", "help"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert re.findall(r"^  make ([\w-]+) ", shown, re.M) == words[1].split()
