"""Every metric, declared once.

Names are fl_<noun>_<unit>[_total] in base units; labels come from closed sets, never from a client.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fedcore import __version__
from fedcore.core.iteration import Phase
from fedcore.core.worker import Step

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = {200: "accepted", 201: "not_ready", 300: "come_back", 400: "rejected", 500: "failed"}
UNAVAILABLE = "unavailable"
REFUSED = "refused"
UNREACHABLE = "unreachable"
_REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_NORM_BUCKETS = tuple(step * 10.0**power for power in range(-3, 4) for step in (1, 2, 5))
_ITERATION_BUCKETS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 14400)


class CommonMetrics:
    """What every daemon tells."""

    def __init__(self, role: str) -> None:
        self.registry = CollectorRegistry()
        build = Gauge(
            "fl_build_info",
            "Version of this daemon; always 1",
            ["version", "python", "role"],
            registry=self.registry,
        )
        build.labels(__version__, platform.python_version(), role).set(1)
        self.redis_errors = Counter(
            "fl_redis_errors_total", "Redis commands that failed", registry=self.registry
        )
        self.redis_up = Gauge("fl_redis_up", "1 while the connection to Redis stands", registry=self.registry)
        self._certificates = Gauge(
            "fl_certificate_expiry_timestamp_seconds",
            "End of each certificate in use, in seconds since the epoch",
            ["file", "subject"],
            registry=self.registry,
        )
        self._revocations = Gauge(
            "fl_revocation_list_next_update_timestamp_seconds",
            "When the revocation lists in use should be followed by others, in seconds since the epoch",
            ["file"],
            registry=self.registry,
        )

    def show_certificates(
        self, ends: Iterable[tuple[str, str, float]], lists: Iterable[tuple[str, float]]
    ) -> None:
        """Show the ends of the certificates in use: (file, subject, seconds); of revocation lists: (file, seconds)."""
        self._certificates.clear()
        for file, subject, seconds in ends:
            self._certificates.labels(file, subject).set(seconds)
        self._revocations.clear()
        for file, seconds in lists:
            self._revocations.labels(file).set(seconds)

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


class SchedulerMetrics(CommonMetrics):
    """What fl-schedulerd tells."""

    def __init__(self) -> None:
        super().__init__("schedulerd")
        self._denied = Counter(
            "fl_operator_denials_total",
            "Requests to change the job that were refused for want of an operator's token or certificate, by reason",
            ["reason"],
            registry=self.registry,
        )

    def deny_operator(self, reason: str) -> None:
        """Count one refused request; ``reason`` is that of an ``operator_access.Denial``."""
        self._denied.labels(reason).inc()


class ServerMetrics(CommonMetrics):
    """What fl-serverd tells."""

    def __init__(self) -> None:
        super().__init__("serverd")
        registry = self.registry
        self._requests = Counter(
            "fl_requests_total", "Answered device requests", ["route", "outcome"], registry=registry
        )
        self._durations = Histogram(
            "fl_request_duration_seconds",
            "From the complete body to the answer, held time included",
            ["route"],
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self.upload_bytes = Counter("fl_upload_bytes_total", "Bytes of accepted updates", registry=registry)
        self.updates_accepted = Counter("fl_updates_accepted_total", "Updates counted", registry=registry)
        self._updates_refused = Counter(
            "fl_updates_refused_total", "Updates not counted, by reason", ["reason"], registry=registry
        )
        self.updates_clipped = Counter(
            "fl_updates_clipped_total",
            "Updates beyond fedcore.update.norm_bound that were brought nearer to the model",
            registry=registry,
        )
        self.update_norm = Histogram(
            "fl_update_norm",
            "L2 norm of an update's difference to the model it was trained from; with a norm_bound only",
            buckets=_NORM_BUCKETS,
            registry=registry,
        )
        self.data_sizes_refused = Counter(
            "fl_data_sizes_refused_total",
            "Requests of startFLJob whose data size is above fedcore.update.max_data_size",
            registry=registry,
        )
        self._device_trust = Gauge(
            "fl_device_trust_expiry_timestamp_seconds",
            "With client_verify.pki_verify: end of each root, and when the revocation list should be followed by "
            "another one, in seconds since the epoch",
            ["file"],
            registry=registry,
        )
        self.updates_lost = Counter(
            "fl_updates_lost_total",
            "Updates that were counted and then lost, with a server and its ledger",
            registry=registry,
        )
        self.attempt = Gauge(
            "fl_iteration_attempt", "Attempt at the current iteration, from 1", registry=registry
        )
        self.peers = Gauge("fl_peers", "Other servers of the job that live", registry=registry)
        self._devices_refused = Counter(
            "fl_device_refusals_total",
            "Device connections and requests turned away or cut off by the listener, by reason",
            ["reason"],
            registry=registry,
        )
        self.connections = Gauge("fl_device_connections", "Open device connections", registry=registry)
        self.iteration = Gauge("fl_iteration", "Number of the current iteration", registry=registry)
        self._phase = Gauge("fl_iteration_phase", "1 for the current phase", ["phase"], registry=registry)
        self.counts = Gauge(
            "fl_iteration_clients", "Clients counted in this iteration", ["round"], registry=registry
        )
        self.quorums = Gauge("fl_iteration_quorum_clients", "Clients needed", ["round"], registry=registry)
        self.iterations = Counter(
            "fl_iterations_total", "Ended iterations by outcome", ["outcome"], registry=registry
        )
        self.iteration_duration = Histogram(
            "fl_iteration_duration_seconds",
            "From the first startFLJob to the next iteration",
            buckets=_ITERATION_BUCKETS,
            registry=registry,
        )
        self.publication = Histogram(
            "fl_publication_duration_seconds",
            "From the last accepted update to the new model being served",
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self.unmasking_duration = Histogram(
            "fl_unmasking_duration_seconds",
            "With encrypt_type PW_ENCRYPT, at the server that makes the model: from enough reports to the model",
            buckets=_ITERATION_BUCKETS,
            registry=registry,
        )
        self.cipher_dropouts = Counter(
            "fl_cipher_dropouts_total",
            "Clients that shared secrets and whose update is not in the model, told by the server that made it",
            registry=registry,
        )
        self.reports_excluded = Counter(
            "fl_cipher_reports_excluded_total",
            "Reports of reconstructSecrets whose shares do not go with those of others",
            registry=registry,
        )
        self._evaluation = Gauge(
            "fl_evaluation_score",
            "Score of the clients' evaluation vectors; told by the server that ended the last iteration",
            ["eval_type"],
            registry=registry,
        )
        self._trained = Gauge(
            "fl_trained_model",
            "What the worker of hybrid training told of the newest model",
            ["figure"],
            registry=registry,
        )
        self._children: dict[tuple[str, str], Counter] = {}
        self._timers: dict[str, Histogram] = {}

    def request(self, route: str, outcome: str, seconds: float) -> None:
        """Count one answered request; ``outcome`` is one of OUTCOMES or UNAVAILABLE."""
        counter = self._children.get((route, outcome))
        if counter is None:
            counter = self._children[route, outcome] = self._requests.labels(route, outcome)
            self._timers[route] = self._durations.labels(route)
        counter.inc()
        self._timers[route].observe(seconds)

    def show_device_trust(self, ends: Mapping[str, float]) -> None:
        """Show until when the files are good that devices' certificates are judged by: file -> seconds."""
        self._device_trust.clear()
        for file, seconds in ends.items():
            self._device_trust.labels(file).set(seconds)

    def refuse_update(self, reason: str) -> None:
        """Count one refused update; ``reason`` is an Acceptance, ``malformed``, ``norm`` or ``signature``."""
        self._updates_refused.labels(reason).inc()

    def refuse_device(self, reason: str) -> None:
        """Count what the device listener turned away; ``reason`` is a net.routes.Refused."""
        self._devices_refused.labels(str(reason)).inc()

    def show_evaluation(self, eval_type: str, score: float | None) -> None:
        """Show the score of the last iteration; None if another server has it."""
        if score is None:
            self._evaluation.clear()
        else:
            self._evaluation.labels(eval_type).set(score)

    def show_worker_metrics(self, loss: float, accuracy: float) -> None:
        """Show what a worker told of the newest model."""
        self._trained.labels("loss").set(loss)
        self._trained.labels("accuracy").set(accuracy)

    def show_phase(self, current: Phase) -> None:
        """Mark the current phase."""
        for phase in Phase:
            self._phase.labels(phase.value).set(phase is current)


class WorkerMetrics(CommonMetrics):
    """What fl-workerd tells."""

    def __init__(self) -> None:
        super().__init__("workerd")
        registry = self.registry
        self._requests = Counter(
            "fl_worker_requests_total",
            "Rounds that servers were asked for, by what came of it",
            ["round", "outcome"],
            registry=registry,
        )
        self._iterations = Counter(
            "fl_worker_iterations_total",
            "Iterations of the job that this worker is through with, by what it did for them",
            ["outcome"],
            registry=registry,
        )
        self._step = Gauge("fl_worker_step", "1 for what the worker is about", ["step"], registry=registry)
        self.iteration = Gauge("fl_worker_iteration", "Iteration that the worker is at", registry=registry)
        self.training_steps = Counter(
            "fl_worker_training_steps_total", "Training steps that are done", registry=registry
        )
        self.training_duration = Histogram(
            "fl_worker_training_duration_seconds",
            "From the pulled weights to the trained ones",
            buckets=_ITERATION_BUCKETS,
            registry=registry,
        )
        self.loss = Gauge(
            "fl_worker_loss", "Loss of the last training, NaN before the first", registry=registry
        )
        self.accuracy = Gauge(
            "fl_worker_accuracy", "Accuracy of the last training, NaN before the first", registry=registry
        )
        for figure in (self.loss, self.accuracy):
            figure.set(math.nan)  # 0 would be a value that a training may have
        self.registered = Gauge(
            "fl_worker_registered", "1 while the worker is on the job's list", registry=registry
        )

    def request(self, round_name: str, outcome: str) -> None:
        """Count one asked round; ``outcome`` is one of OUTCOMES, UNAVAILABLE, REFUSED or UNREACHABLE."""
        self._requests.labels(round_name, outcome).inc()

    def end_iteration(self, outcome: str) -> None:
        """Count one iteration; ``outcome`` is a core.worker.Remark."""
        self._iterations.labels(outcome).inc()

    def show_step(self, current: Step) -> None:
        """Mark what the worker is about."""
        for step in Step:
            self._step.labels(step.value).set(step is current)
