"""The README's own worker, as it stands there, trains what the README's own devices upload."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from integration.cluster import Cluster, wait_until

from fedclient import Client, Policy
from fedcore.models.formats import write_model
from fedctl.processes import free_ports

README = (Path(__file__).parents[2] / "README.md").read_text()
ITERATIONS = 3


def block(language: str, words: str = "") -> str:
    """Return the one block of a language that holds some words."""
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (code,) = (each for each in found if words in each)
    return code


def final_line(directory: Path) -> tuple[float, float]:
    """Let a device and the worker train to the end; return slope and offset of the last model."""
    code: dict[str, Any] = {}
    exec(block("python"), code)
    told = yaml.safe_load(block("yaml", "HYBRID_TRAINING"))
    with Cluster(directory, fedcore=told["fedcore"], start_fl_job_threshold=1) as cluster:
        [admin] = free_ports(1)
        cluster.settings |= {"server_mode": told["server_mode"], "fl_iteration_num": ITERATIONS}
        cluster.settings["fedcore"]["worker"]["admin_address"] = f"127.0.0.1:{admin}"
        cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
        (directory / "myworker.py").write_text(block("python3"))
        zeros = {"w": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
        write_model(directory / "model.safetensors", zeros, set(), {})
        cluster.start_redis()
        cluster.start_server()
        cluster.spawn("worker", *cluster.command("workerd"), "--yaml-config", str(cluster.yaml))
        url = f"http://127.0.0.1:{cluster.http}"
        device = Client(code["Line"](), url, fl_name="job", policy=Policy(poll_interval=0.05))
        assert device.run().completed == ITERATIONS
        wait_until(lambda: "the job is finished" in cluster.log("worker"), "the worker sees the end")
        log = cluster.log("worker")
        assert cluster.processes["worker"].poll() is None
        assert cluster.kill("worker", signal.SIGINT) == 0
        for words in (
            "pulled the aggregate of",
            "trained 50 steps for",
            "pushed the weights of",
            "done with",
        ):
            assert f"{words} iteration {ITERATIONS}" in log
        weights = cluster.weights(ITERATIONS)
    return float(weights["w"][0]), float(weights["b"][0])


def test_the_worker_learns(tmp_path: Path) -> None:
    slope, offset = final_line(tmp_path)
    assert 2.5 < slope < 3.01  # a device alone does not come near in so few iterations
    assert 0.95 < offset < 1.05


def test_the_metrics_that_the_readme_names_are_there() -> None:
    code = (Path(__file__).parents[2] / "lib/fedcore/observe/metrics.py").read_text()
    for name in re.findall(r"`(fl_(?:worker|iteration)_\w+)`", README):
        assert f'"{name}"' in code
