"""Devices train against the real server: the strict model of the original, and our own SDK, side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from integration.cluster import WEIGHTS, Cluster, wait_until
from strict_device import Fatal, Status, StrictDevice, Why

from fedclient import Client, FitConfig, FitResult, Outcome, Policy, Summary

FAST = Policy(poll_interval=0.05)


def add_one(weights: Mapping[str, np.ndarray], plan: object) -> tuple[dict[str, np.ndarray], float]:
    return {name: values + np.float32(1) for name, values in weights.items()}, 0.5


class AddOne:
    """A trainer whose result is known: every iteration adds one to every weight."""

    def load(self) -> tuple[int, int]:
        return 7, 3

    def fit(self, weights: Mapping[str, np.ndarray], config: FitConfig) -> FitResult:
        return FitResult(add_one(weights, config)[0], 0.25)

    def evaluate(self, weights: Mapping[str, np.ndarray]) -> float:
        return 0.5


def together(jobs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, object]:
    """Run all jobs in threads of their own; return what each gave, an exception included."""
    results: dict[str, object] = {}

    def keep(name: str, job: Callable[[], object]) -> None:
        try:
            results[name] = job()
        except Exception as error:
            results[name] = error

    threads = [threading.Thread(target=keep, args=item, daemon=True) for item in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return results


def strict(cluster: Cluster, name: str, data_size: int, seconds: float = 0.0) -> StrictDevice:
    """Make a strict device whose training takes so many seconds."""

    def train(weights: Mapping[str, np.ndarray], plan: object) -> tuple[dict[str, np.ndarray], float]:
        threading.Event().wait(seconds)
        return add_one(weights, plan)

    url = f"http://127.0.0.1:{cluster.http}"
    return StrictDevice(url, train, data_size, fl_id=name, time_scale=0.01)


def test_strict_devices_train_through_twenty_iterations(tmp_path: Path) -> None:
    with Cluster(tmp_path, start_fl_job_threshold=8, fl_iteration_num=20) as cluster:
        cluster.start_redis()
        cluster.start_server()
        devices = {f"device-{i}": strict(cluster, f"device-{i}", 5 + i) for i in range(8)}
        results = together({name: device.run for name, device in devices.items()}, 120)
        assert results == dict.fromkeys(devices, Status.SUCCESS)
        for device in devices.values():
            assert device.callbacks == [(k, 200) for k in range(1, 21)]
        for name, values in cluster.weights(20).items():
            np.testing.assert_allclose(values, WEIGHTS[name].reshape(-1) + 20, rtol=1e-6)
        assert cluster.metric('fl_iterations_total{outcome="valid"}') == 20


def test_strict_devices_survive_more_devices_than_places(tmp_path: Path) -> None:
    quick = {"device": {"retry_margin": 0.3, "hold_time": 8.0}}
    windows = {"start_fl_job_time_window": 3000, "update_model_time_window": 2000}
    with Cluster(
        tmp_path, fedcore=quick, start_fl_job_threshold=4, fl_iteration_num=1000, **windows
    ) as cluster:
        cluster.start_redis()
        cluster.start_server()
        devices = {f"device-{i}": strict(cluster, f"device-{i}", 5, seconds=0.05) for i in range(6)}
        results: dict[str, object] = {}
        jobs = {name: device.run for name, device in devices.items()}
        training = threading.Thread(target=lambda: results.update(together(jobs, 100)), daemon=True)
        training.start()
        wait_until(
            lambda: all(len(device.callbacks) > 20 for device in devices.values()), "all take part", 90
        )
        for device in devices.values():
            device.stop()
        training.join(10)
        assert {name: getattr(end, "why", end) for name, end in results.items()} == dict.fromkeys(
            devices, Why.STOPPED
        )
        for device in devices.values():
            codes = [code for _, code in device.callbacks]
            assert codes.count(200) >= 5
            assert (300, 300) not in pairwise(codes)


def test_strict_devices_survive_updates_that_are_not_needed_any_more(tmp_path: Path) -> None:
    """Of the eight that have places two are refused with their updates, and others wait for their places."""
    quick = {"device": {"retry_margin": 0.3, "hold_time": 8.0}}
    windows = {"start_fl_job_time_window": 3000, "update_model_time_window": 2000}
    with Cluster(
        tmp_path,
        fedcore=quick,
        start_fl_job_threshold=8,
        update_model_ratio=0.75,
        fl_iteration_num=10_000,
        **windows,
    ) as cluster:
        cluster.start_redis()
        cluster.start_server()
        devices = {f"device-{i}": strict(cluster, f"device-{i}", 5, seconds=0.05) for i in range(12)}
        ends: dict[str, object] = {}

        def run(name: str) -> None:
            try:
                ends[name] = devices[name].run()
            except Fatal as end:
                ends[name] = end.why

        jobs = {name: partial(run, name) for name in devices}
        training = threading.Thread(target=together, args=(jobs, 100), daemon=True)
        training.start()

        def refused() -> float:
            return sum(
                cluster.metric(f'fl_updates_refused_total{{reason="{reason}"}}')
                for reason in ("full", "unknown")
            )

        wait_until(lambda: ends or refused() >= 20, "many updates are refused", 60)
        for device in devices.values():
            device.stop()
        training.join(20)
        assert ends == dict.fromkeys(devices, Why.STOPPED)


def test_the_sdk_trains_beside_strict_devices(tmp_path: Path) -> None:
    with Cluster(tmp_path, start_fl_job_threshold=4, fl_iteration_num=10) as cluster:
        cluster.start_redis()
        cluster.start_server()
        url = f"http://127.0.0.1:{cluster.http}"
        jobs: dict[str, Callable[[], object]] = {
            f"strict-{i}": strict(cluster, f"strict-{i}", 5).run for i in range(2)
        }
        jobs |= {
            f"sdk-{i}": Client(AddOne(), url, fl_name="job", client_id=f"sdk-{i}", policy=FAST).run
            for i in range(2)
        }
        results = together(jobs, 60)
        assert results["strict-0"] == results["strict-1"] == Status.SUCCESS
        for name in ("sdk-0", "sdk-1"):
            summary = results[name]
            assert isinstance(summary, Summary), summary
            assert (summary.outcome, summary.completed) == (Outcome.COMPLETED, 10)
        np.testing.assert_allclose(cluster.weights(10)["b.bias"], WEIGHTS["b.bias"] + 10, rtol=1e-6)


@pytest.mark.parametrize("victim", ["server", "redis"])
def test_the_sdk_trains_on_through_a_restart(tmp_path: Path, victim: str) -> None:
    with Cluster(tmp_path, start_fl_job_threshold=3, fl_iteration_num=40) as cluster:
        cluster.start_redis(keep=True)
        cluster.start_server()
        url = f"http://127.0.0.1:{cluster.http}"
        jobs = {
            f"sdk-{i}": Client(AddOne(), url, fl_name="job", client_id=f"sdk-{i}", policy=FAST).run
            for i in range(3)
        }
        results: dict[str, object] = {}
        training = threading.Thread(target=lambda: results.update(together(jobs, 100)), daemon=True)
        training.start()
        wait_until(lambda: cluster.metric("fl_iteration") >= 5, "some iterations")
        cluster.kill(victim)
        cluster.start_server() if victim == "server" else cluster.start_redis(keep=True)
        training.join(110)
        outcomes = {name: getattr(result, "outcome", result) for name, result in results.items()}
        assert outcomes == dict.fromkeys(jobs, Outcome.COMPLETED)
