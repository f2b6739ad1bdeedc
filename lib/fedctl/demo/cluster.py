"""The demo's processes, and the questions that are put to them.

The questions are those that anybody may ask: /metrics and /readyz of the daemons, getModel as a device asks it,
and what fl-client prints with --json.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedclient.replies import Verdict, judge, weights_of
from fedclient.transport import HttpTransport
from fedcore.wire.codec import encode
from fedcore.wire.messages import CompressType, RequestGetModel, ResponseGetModel
from fedctl.demo import certificates
from fedctl.demo.plan import FL_NAME, Addresses, Plan, write_configuration, write_initial_model
from fedctl.processes import (
    HOST,
    Child,
    ChildFailed,
    Family,
    RedisServer,
    fetch,
    program,
    redis_server,
    reserved_ports,
    wait_until,
)

Weights = Mapping[str, npt.NDArray[np.float32]]

MODELS_KEPT = 3  # by a server; see fedcore.models.history
LAST_WORDS_S = 20.0  # patience with devices that have had their last model
CULPRIT_S = 0.5  # a process is gone a moment after its connections
NUMPY_THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Progress:
    """What the server's metrics say.

    Attributes:
        iteration: number of the current one.
        selected: devices that have taken their place in it.
        uploaded: updates in it so far.
        accepted: updates since the start.
        failed: iterations that made no model.
    """

    iteration: int
    selected: int
    uploaded: int
    accepted: int
    failed: int


def read_metrics(text: str) -> dict[str, float]:
    """Read the text format of Prometheus: ``name{labels}`` as it stands -> value."""
    samples = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def progress_of(metrics: Mapping[str, float]) -> Progress:
    """Pick what the demo shows."""

    def count(name: str) -> int:
        return int(metrics.get(name, 0))

    return Progress(
        iteration=count("fl_iteration"),
        selected=count('fl_iteration_clients{round="startFLJob"}'),
        uploaded=count('fl_iteration_clients{round="updateModel"}'),
        accepted=count("fl_updates_accepted_total"),
        failed=count('fl_iterations_total{outcome="failed"}'),
    )


class Cluster:
    """A running cluster: see ``running_cluster``.

    Attributes:
        plan: what it trains.
        directory: where its files are.
        addresses: where it listens.
    """

    def __init__(
        self, plan: Plan, directory: Path, addresses: Addresses, redis: RedisServer, family: Family
    ) -> None:
        self.plan = plan
        self.directory = directory
        self.addresses = addresses
        self.redis = redis
        self._family = family
        ca_file = str(directory / certificates.CA_FILE) if plan.tls else None
        self._transport = HttpTransport(f"{plan.scheme}://{addresses.devices}", timeout=10.0, ca_file=ca_file)
        self._devices: list[Child] = []
        self._server: Child | None = None
        self._worker: Child | None = None

    def start_daemons(self) -> None:
        """Start scheduler and server, and wait until both are ready.

        Raises:
            ChildFailed: one is not.
        """
        options = self.plan.daemon_arguments
        scheduler = self._family.start("schedulerd", [*program("fl-schedulerd"), *options])
        self._server = self._family.start("serverd", [*program("fl-serverd"), *options])
        for child, address in (
            (scheduler, self.addresses.scheduler_admin),
            (self._server, self.addresses.server_admin),
        ):
            self._family.wait_ready(child, f"http://{address}/readyz")

    def start_worker(self) -> None:
        """Start the worker, and wait until it is ready.

        Raises:
            ChildFailed: it is not.
        """
        self._worker = self._family.start("workerd", [*program("fl-workerd"), *self.plan.daemon_arguments])
        self._family.wait_ready(self._worker, f"http://{self.addresses.worker_admin}/readyz")

    def start_devices(self) -> None:
        """Start all devices; they are not waited for."""
        for shard in range(self.plan.devices):
            command = [*program("fl-client"), *self.plan.device_arguments(shard, self.addresses)]
            name = f"{self.plan.who}-{shard}"
            self._devices.append(self._family.start(name, command, output=self._report_of(name)))

    def _report_of(self, name: str) -> Path:
        return self._family.directory / f"{name}.jsonl"

    def _learners(self) -> list[Child]:
        """Return all that end by themselves after the last iteration."""
        return [*self._devices, self._worker] if self._worker else self._devices

    def check_daemons(self) -> None:
        """Look whether redis-server, scheduler and server are running.

        Raises:
            ChildFailed: one is not.
        """
        self.redis.family.check()
        learners = self._learners()
        for child in self._family.children:
            if child not in learners and not child.running:
                raise child.failure(child.end())

    def progress(self) -> Progress:
        """Ask the server how far it is.

        Raises:
            ChildFailed: a process has ended; devices may, once the last iteration is over.
        """
        ended = [child for child in self._learners() if child.exit_code is not None]
        try:
            status, text = fetch(f"http://{self.addresses.server_admin}/metrics")
        except OSError as error:
            raise self._culprit("gives no metrics", error) from error
        if status != 200:
            raise self._culprit(f"answers /metrics with {status}")
        progress = progress_of(read_metrics(text.decode()))
        over = progress.iteration > self.plan.iterations
        for child in ended:
            if child.exit_code != 0 or not over:
                raise child.failure(child.end())
        self.check_daemons()
        if progress.failed:
            assert self._server is not None
            raise self._server.failure("made no model in an iteration")
        return progress

    def stalled(self, seconds: float) -> ChildFailed:
        """Return the failure that says that nothing happens."""
        assert self._server is not None
        return self._server.failure(f"has seen no {self.plan.who} do anything for {seconds:.0f} s")

    def _culprit(self, what: str, error: OSError | None = None) -> ChildFailed:
        """Return the failure of the process that ended, else that of the server."""
        server = self._server
        assert server is not None
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not server.running, "the end of the server", CULPRIT_S)
        try:
            self.check_daemons()
        except ChildFailed as failure:
            return failure
        return server.failure(f"{what}: {error}" if error else what)

    def model(self, iteration: int) -> Weights | None:
        """Ask for the model of an iteration as a device does.

        Returns:
            Name -> float32[n], or None while there is none.

        Raises:
            ChildFailed: the server does not answer as it should, or no longer has that model.
        """
        request = RequestGetModel(
            FL_NAME,
            iteration,
            str(time.time_ns() // 1_000_000),
            np.array([CompressType.NO_COMPRESS], np.int8),
        )
        try:
            judgement = judge("getModel", *self._transport.post("getModel", encode(request)))
        except OSError as error:
            raise self._culprit("does not answer getModel", error) from error
        if judgement.verdict is Verdict.WAIT:
            return None
        reply = judgement.reply
        if judgement.verdict is not Verdict.SUCCESS or not isinstance(reply, ResponseGetModel):
            raise self._culprit(f"answers getModel with {judgement.reason}")
        if reply.iteration - iteration > MODELS_KEPT:
            raise self._culprit(f"no longer has the model of iteration {iteration}")
        return weights_of(reply.feature_map)

    def device_reports(self) -> dict[str, list[dict[str, Any]]]:
        """Wait for the devices' end and return what each printed, one object per iteration.

        Raises:
            ChildFailed: a device failed or does not end.
        """
        try:
            for child in self._devices:
                if child.wait(LAST_WORDS_S) != 0:
                    raise child.failure(child.end())
        except TimeoutError:
            raise child.failure("does not end after the last iteration") from None
        return {child.name: read_reports(self._report_of(child.name).read_text()) for child in self._devices}

    def close(self) -> None:
        """Close the connection for getModel."""
        self._transport.close()


def read_reports(text: str) -> list[dict[str, Any]]:
    """Read the lines that ``fl-client --json`` prints."""
    return [json.loads(line) for line in text.splitlines()]


@contextmanager
def running_cluster(plan: Plan, directory: Path, say: Callable[[str], object]) -> Iterator[Cluster]:
    """Run a whole federation: redis-server, fl-schedulerd, fl-serverd, the devices, and a worker if one is planned.

    Args:
        plan: what it trains.
        directory: for its files; exists.
        say: told each step.

    Raises:
        NoRedis: there is no redis-server.
        ChildFailed: a process does not start.
    """
    logs = directory / "logs"
    with ExitStack() as stack:
        names = ("devices", "server_admin", "scheduler", "scheduler_admin", "nodes", "worker_admin")
        ports = stack.enter_context(reserved_ports(len(names)))
        say("starting redis-server, fl-schedulerd and fl-serverd")
        redis = stack.enter_context(redis_server(logs))
        listeners = {name: f"{HOST}:{port}" for name, port in zip(names, ports, strict=True)}
        addresses = Addresses(redis=redis.address, **listeners)
        write_configuration(directory / "fl.yaml", plan, addresses)
        write_initial_model(directory / "initial.safetensors", plan.seed)
        if plan.tls:
            certificates.write_certificates(directory, datetime.now(UTC))
        family = stack.enter_context(Family(logs, NUMPY_THREADS, runs_in=directory))
        cluster = stack.enter_context(closing(Cluster(plan, directory, addresses, redis, family)))
        cluster.start_daemons()
        if plan.worker:
            say(f"starting fl-workerd, which has {plan.central} labelled images")
            cluster.start_worker()
        say(f"starting {plan.devices} {plan.who}s")
        cluster.start_devices()
        yield cluster
