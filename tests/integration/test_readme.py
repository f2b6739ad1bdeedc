"""The README's tour, typed as it stands there, answers as printed there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.cluster import Cluster, wait_until

from fedclient import Client, Policy
from fedcore.models.formats import write_model
from fedctl.processes import find_redis_server, free_ports

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
WILDCARD = "…"


def tour() -> list[tuple[str, list[str]]]:
    """Return the README's commands, each with the lines printed below it."""
    commands: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                commands.append((line[2:], []))
            else:
                commands[-1][1].append(line)
    return commands


class Shell:
    """One bash in a folder of its own, with the installed commands and free ports in place of the README's."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.run.mkdir()
        (folder / "examples").mkdir()
        used = sorted(set(re.findall(r"127\.0\.0\.1:(\d{4,5})", README)) | {"23456", "11302"})
        self.ports = dict(zip(used, map(str, free_ports(len(used))), strict=True))
        for name in ("lenet.yaml", "startFLJob.bin"):
            (folder / "examples" / name).write_bytes((ROOT / "examples" / name).read_bytes())
        yaml = folder / "examples" / "lenet.yaml"
        own = (
            "fedcore:\n"
            "  scheduler: {manage_address: '127.0.0.1:11202', admin_address: '127.0.0.1:11302'}\n"
            "  server: {http_address: '127.0.0.1:6666', tcp_port: 6766, admin_address: '127.0.0.1:6866'}\n"
        )
        yaml.write_text(self.translate(yaml.read_text() + own))
        tools = folder / "bin"
        tools.mkdir()
        (tools / "redis-server").symlink_to(find_redis_server())
        path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.bash = subprocess.Popen(
            ["bash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.run,
            env={**os.environ, "PATH": path, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def translate(self, text: str) -> str:
        for shown, real in self.ports.items():
            text = text.replace(shown, real)
        return text

    def type(self, command: str) -> list[str]:
        """Type one command; return the lines that it prints."""
        assert self.bash.stdin is not None and self.bash.stdout is not None
        quiet = " > /dev/null 2>&1 &" if command.endswith("&") and ">" not in command else ""
        line = command.removesuffix("&") + quiet if quiet else command
        self.bash.stdin.write(f"{self.translate(line)}\nprintf '\\n==done==\\n'\n")
        self.bash.stdin.flush()
        lines = []
        for printed in iter(self.bash.stdout.readline, ""):
            if printed == "==done==\n":  # with a line of its own before it, as not every answer ends in one
                return lines[:-1] if lines[-1] == "" else lines
            lines.append(printed.rstrip("\n"))
        raise AssertionError("the shell ended")

    def end(self) -> None:
        os.killpg(self.bash.pid, 9)
        self.bash.wait()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    shell.end()


def as_printed(lines: list[str], shown: list[str]) -> bool:
    pattern = "\n".join(shown)
    return re.fullmatch(re.escape(pattern).replace(re.escape(WILDCARD), ".*?"), "\n".join(lines)) is not None


def test_the_tour(shell: Shell) -> None:
    commands = tour()
    assert sum(command.startswith("curl") for command, _ in commands) == 4
    for command, shown in commands:
        expected = [shell.translate(line) for line in shown]
        if (
            command.startswith("curl") and "startFLJob" not in command
        ):  # may be typed before the daemons are up
            wait_until(lambda: as_printed(shell.type(command), expected), command)  # noqa: B023
        else:
            printed = shell.type(command)
            assert as_printed(printed, expected) or not shown, printed
    models = shell.run / "fl_ckpt"
    wait_until(lambda: list(models.glob("lenet_recovery_iteration_*.safetensors")), "the devices train", 80)


def test_the_trainer_learns(tmp_path: Path) -> None:
    """The README's own trainer, as it stands there, trains against a server."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    with Cluster(tmp_path, start_fl_job_threshold=1, fl_iteration_num=5) as cluster:
        zeros = {"w": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
        write_model(tmp_path / "model.safetensors", zeros, set(), {})
        cluster.start_redis()
        cluster.start_server()
        client = Client(
            namespace["Line"](),
            f"http://127.0.0.1:{cluster.http}",
            fl_name="job",
            policy=Policy(poll_interval=0.05),
        )
        assert client.run().completed == 5
        weights = cluster.weights(5)
    assert 0 < weights["w"][0] < 3 and 0 < weights["b"][0] < 1


def test_relative_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
