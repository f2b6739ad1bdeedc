"""How the lab's tests are started, in a lab of their own or in one that is held."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from lab.places import TREE


def pytest_command(words: Sequence[str]) -> list[str]:
    """The command for these arguments; if they name no file, all of tests/lab is run."""
    own = ("-p", "no:cacheprovider", "--rootdir", str(TREE), "-c", str(TREE / "pyproject.toml"))
    names_a_file = any(re.search(r"\.py(::|$)", word) for word in words)
    everything = () if names_a_file else (str(TREE / "tests/lab"),)
    return [sys.executable, "-m", "pytest", *own, *words, *everything]
