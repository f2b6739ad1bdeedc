"""What the lab's tests share. They run inside a lab only: ``make lab``, or tests/lab/run."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator

import pytest
from lab.commands import say
from lab.fixtures import cluster, devices, results, watch  # noqa: F401 (fixtures of the scenarios)
from lab.lab import Lab
from lab.places import PREFIX, Places

collect_ignore_glob = [] if PREFIX in os.environ else ["test_*.py"]

ORDER = (
    "test_framework",
    "test_deployment_doc",
    "test_deployment",
    "test_scenarios",
    "test_failures",
    "test_faults",
)
_LAB: list[Lab] = []  # the one of this session, once a test has asked for it


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: takes long; make lab leaves it out, make lab-full runs it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those come first that want empty hosts; once devices train, they do so to the end of the session."""
    items.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER))


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Hosts that have booted, with nothing installed (or, in a lab that is held, as they are)."""
    lab = Lab.current()
    lab.up()
    _LAB.append(lab)
    yield lab
    _LAB.remove(lab)


@pytest.fixture(autouse=True)
def progress(request: pytest.FixtureRequest) -> None:
    """Tell on the terminal which test runs."""
    say(f"test {request.node.name}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """When a test fails, keep the hosts' journals as they are now, and say where."""
    report = yield
    if report.failed and _LAB:
        folder = _LAB[0].places.artefacts / re.sub(r"[^\w.-]+", "_", f"{item.name}-{report.when}")
        _LAB[0].save_journals(folder)
        report.sections.append(("Lab", f"journals of all hosts: {folder}\nconsoles, plays: {folder.parent}"))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if PREFIX in os.environ:
        terminalreporter.write_line(f"logs of the lab: {Places(os.environ[PREFIX]).artefacts}")
