"""systemd/verify: says nothing about good units, names what is wrong with others."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[3] / "systemd"
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


@pytest.fixture
def units(tmp_path):
    return Path(shutil.copytree(UNITS, tmp_path / "systemd"))


def verify(units, **environment):
    return subprocess.run(
        [units / "verify"],
        check=False,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@needs_systemd
def test_ours(units):
    done = verify(units)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("fl-serverd@.service", "UMask=", "UMsk=", ": Unknown key 'UMsk'"),
        (
            "fl-schedulerd.service",
            "bin/fl-schedulerd",
            "bin/fl-scheduler",
            "bin/fl-scheduler is not executable",
        ),
        ("fl-workerd.service", "ExecStart=/opt", "ExecStart=opt", "opt/fl/current/bin/fl-workerd"),
        ("fl-workerd.service", "LimitCORE=0", "LimitCORE=none", "value, ignoring: none"),
        ("var-lib-fl-ledgers.mount", "Where=/var/lib/fl/ledgers", "Where=/var/lib/fl/ledger", "Where="),
        ("fl.slice", "MemoryMax=85%", "MemoryMax=much", "much"),
        ("fl-workerd.service.d/cuda.conf.sample", "LimitMEMLOCK", "LimitMEM", "Unknown key 'LimitMEM'"),
    ],
)
def test_a_mistake(units, name, old, new, told):
    replace(units / name, old, new)
    done = verify(units)
    assert done.returncode == 1
    assert told in done.stderr
    assert "/etc/systemd" not in done.stderr, "the file of the tree is named, not the copy"
    assert "more exposed" not in done.stderr
    assert "systemd/verify: systemd does not like the units" in done.stderr


@needs_systemd
@pytest.mark.parametrize("name", ["fl-schedulerd.service", "fl-serverd@.service", "fl-workerd.service"])
def test_a_daemon_that_is_more_exposed(units, name):
    for key in ("PrivateUsers", "PrivateDevices", "ProtectSystem", "ProtectHome", "RestrictNamespaces"):
        replace(units / name, f"\n{key}=", f"\n# {key}=")
    done = verify(units)
    assert done.returncode == 1
    assert f"systemd/verify: {name} is more exposed than 1.5" in done.stderr
    assert "PrivateUsers=" in done.stderr and "Overall exposure level" in done.stderr


def test_without_systemd(units, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("env", "bash", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    done = verify(units, PATH=str(tmp_path / "bin"))
    assert done.returncode == 0
    assert done.stderr == (
        "systemd/verify: skipped, systemd-analyze is not on this machine; on Debian: apt-get install systemd\n"
    )
