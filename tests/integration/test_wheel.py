"""The wheel that playbooks install: with the C extensions where there is a compiler, and good everywhere without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedcore.compression import mask

ROOT = Path(__file__).parents[2]
EXTENSIONS = {"fedcore/compression/_mask.abi3.so", "fedcore/secagg/_stream.abi3.so"}
WITHOUT_COMPILER = {"CC": "/nonexistent/cc"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a wheel is made of, and nothing that was built before."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    for name in ("lib", "daemons", "examples"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    return tree


def build(tree: Path, folder: Path, **environment: str) -> Path:
    """Build a wheel as ``make wheel`` does."""
    shutil.rmtree(tree / "build", ignore_errors=True)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", *offline, "--wheel-dir", folder, tree],
        check=True,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000", **environment},
        timeout=120,
    )
    (wheel,) = folder.glob("fedcore-*.whl")
    return wheel


@pytest.mark.skipif(not mask.COMPILED, reason="the C extensions cannot be built here")
def test_one_wheel_is_for_all_pythons_of_a_machine(tree: Path, tmp_path: Path) -> None:
    wheel = build(tree, tmp_path / "one")
    assert wheel.name.endswith(f"-cp311-abi3-linux_{os.uname().machine}.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.endswith(".so")} == EXTENSIONS
    assert not [name for name in names if name.endswith(".c")]
    again = build(tree, tmp_path / "two")
    assert again.read_bytes() == wheel.read_bytes(), "equal sources give equal wheels"


@pytest.mark.parametrize(
    "environment", [WITHOUT_COMPILER, {"FEDCORE_PURE": "1"}], ids=["no compiler", "asked for"]
)
def test_without_the_extension_it_is_for_every_machine(
    tree: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    wheel = build(tree, tmp_path, **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fedcore/compression/mask.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_installing_in_place_needs_no_compiler(tree: Path, tmp_path: Path) -> None:
    """As ``make demo`` does; with one, the extension comes to lie beside its source."""
    build_in_place(tree, **WITHOUT_COMPILER)
    assert not list(tree.rglob("*.so"))
    if mask.COMPILED:
        build_in_place(tree)
        assert all((tree / "lib" / extension).exists() for extension in EXTENSIONS)


def build_in_place(tree: Path, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        check=True,
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        timeout=120,
    )
