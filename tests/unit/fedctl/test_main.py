"""The ``fl`` command: help without heavy imports, version, ``fl model``."""

import re
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from fedcore import __version__
from fedcore.models.formats import read_model
from fedctl.__main__ import COMMANDS, main
from fedexamples import lenet


def run(*arguments):
    return CliRunner().invoke(main, arguments, prog_name="fl")


def test_version():
    assert run("--version").stdout == f"fl {__version__}\n"


def test_help_names_all_and_gives_examples():
    result = run("--help")
    assert result.exit_code == 0
    assert re.findall(r"^  (\w+)  ", result.stdout.partition("Commands:")[2], re.MULTILINE)[
        : len(COMMANDS)
    ] == sorted(COMMANDS)
    assert "Examples:" in result.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_has_help(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Usage: fl " + name in result.stdout


def test_an_unknown_command():
    result = run("nonsense")
    assert result.exit_code == 2
    assert "No such command 'nonsense'" in result.stderr


def test_help_imports_nothing_heavy():
    words = "import sys; from fedctl.__main__ import main; main(['--help'], standalone_mode=False); "
    words += "print(*(name for name in ('numpy', 'twisted', 'rich') if name in sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == "\n"


def test_a_first_model(tmp_path):
    path = tmp_path / "first.safetensors"
    assert run("model", "init", "--seed", "5", "--output", str(path)).stdout == f"{path}\n"
    read = read_model(path).weights
    for name, weight in lenet.initial_weights(5).items():
        np.testing.assert_array_equal(read[name], weight)


@pytest.mark.parametrize("name", ["model.npz", "missing/model.safetensors"])
def test_a_model_that_cannot_be_written(tmp_path, name):
    result = run("model", "init", "--output", str(tmp_path / name))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
