"""One server, assembled: which part is given which."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from twisted.internet import defer
from twisted.logger import Logger

from fedcore.aggregation.arithmetic import Arithmetic, choose
from fedcore.aggregation.rules import rule_named
from fedcore.compression import mask
from fedcore.config import Address, Settings
from fedcore.config.settings import ServerMode, SumDevice
from fedcore.core.iteration import REPORTS_ROUND, Iteration, Phase, Policy
from fedcore.core.job import RunningState
from fedcore.errors import ConfigError
from fedcore.models import checkpoints
from fedcore.models.formats import ModelFile, read_model
from fedcore.models.history import ModelHistory
from fedcore.models.kept import with_kept
from fedcore.net.device_http import DeviceSite
from fedcore.net.networks import Networks
from fedcore.net.node_client import NodeClient
from fedcore.net.node_listener import NodeListener
from fedcore.net.routes import Limits
from fedcore.net.tls import Links
from fedcore.observe.journal import Journal
from fedcore.observe.metrics import ServerMetrics
from fedcore.pki.chain import fits
from fedcore.services.callbacks import Callback
from fedcore.services.cipher_rounds import CipherRounds, cipher_routes
from fedcore.services.client_api import ClientApi, DevicePages, device_routes
from fedcore.services.departure import Departure
from fedcore.services.device_identity import device_identity_of
from fedcore.services.evaluation import evaluation_of
from fedcore.services.heartbeat import Heartbeat
from fedcore.services.iteration_driver import IterationDriver, Parts
from fedcore.services.ledgers import Ledgers
from fedcore.services.loss import LossJudge
from fedcore.services.node_api import NodeApi
from fedcore.services.peers import Peers
from fedcore.services.publication import Publication
from fedcore.services.reduction import Reduction
from fedcore.services.reporting import Reporter
from fedcore.services.supervision import WatchedThreads, longest_work
from fedcore.services.terms import ledger_shape, slow_masks, update_limit
from fedcore.services.unmasking import Unmasking
from fedcore.services.update_forms import UpdateForms
from fedcore.services.update_intake import UpdateIntake
from fedcore.services.worker_rounds import WorkerRounds, worker_routes
from fedcore.store.redis import Redis
from fedcore.wire.arrays import Layout
from fedcore.wire.image import ImageTemplate
from fedcore.wire.node import MAX_DATA

DRAIN_TIMEOUT_S = 10.0  # longest wait for requests in flight at a clean stop
NODE_GRACE_S = 2.0  # then, for requests of other nodes
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a server's command line decides.

    Attributes:
        checkpoint_dir: where models are kept.
        model: file of the initial weights, or None.
        ledger_dir: where updates lie until their model is made; shared by the servers of a host.
        tcp_ip: address for other nodes, "" for the one that reaches Redis.
        tcp_port: port for other nodes.
    """

    checkpoint_dir: Path
    model: Path | None
    ledger_dir: Path
    tcp_ip: str
    tcp_port: int


class Server:
    """The parts of one server.

    Attributes:
        site: the devices' listener.
        node_listener: the other nodes' listener.
        node_address: where it is to listen.
        driver: drives the iterations; it tells when the server shall end.
        services: to be started in this order.
        threads: where merges and sums are done; it tells whether they come back.
        leaving: what of its end the server is about, "" before that.
    """

    log = Logger()
    leaving = ""

    def __init__(
        self,
        settings: Settings,
        options: ServerOptions,
        redis: Redis,
        metrics: ServerMetrics,
        callback: Callback,
        reactor: Any,
        links: Links | None = None,
    ) -> None:
        """Build a server; nothing is started.

        Args:
            settings: the job's.
            options: of the command line.
            redis: the connection.
            metrics: of this daemon.
            callback: follows the training.
            reactor: for time and connections.
            links: TLS of the node channel, None if it has none.

        Raises:
            ConfigError: there is no model to serve.
        """
        self._callback = callback
        self._reactor = reactor
        self._redis = redis
        newest, model, initial = _find_model(settings.fl_name, options)
        named = settings.aggregation
        rule = rule_named(named.aggregation_type.value, named.total_client_num)
        model = with_kept(model, rule)
        layout = Layout.of(model.weights, model.not_aggregated)
        template = ImageTemplate(layout)
        history = _history(newest, model, None if initial is None else with_kept(initial, rule), template)
        device = settings.fedcore.device
        address = Address(options.tcp_ip or _address_towards(settings), options.tcp_port)
        node_id = f"{address}::{_stamp()}::{random.SystemRandom().randint(10000, 99999)}"
        self.node_address = address
        longest = max(MAX_DATA, update_limit(layout), template.size + (1 << 20))
        self._client = NodeClient(
            node_id,
            max_data=longest,
            jitter=random.random,
            reactor=reactor,
            encrypt=links.node_connecting if links is not None else None,
        )
        peers = Peers(self._client)
        shape = ledger_shape(settings, layout)
        self.threads = threads = WatchedThreads(reactor, longest_work(shape.size))
        forms = UpdateForms(settings, layout, history, threads)
        self._ledgers = ledgers = Ledgers(
            options.ledger_dir, layout, shape, settings.fedcore.ledger.fsync, threads, forms
        )
        evaluation = evaluation_of(settings, reactor)
        self._intake = intake = UpdateIntake(
            ledgers,
            options.checkpoint_dir,
            node_id,
            layout.total_floats,
            device.hold_time,
            threads,
            0 if evaluation is None else evaluation.clients,
        )
        publication = Publication(
            settings.fl_name, options.checkpoint_dir, history, template, peers, reactor, datetime.now
        )
        journal = Journal(Path(settings.summary.failure_event_file), str(address), datetime.now)
        reporter = Reporter(metrics, journal, settings.summary.continuous_failure_times, evaluation)
        computing = self._arithmetic(settings.fedcore.aggregation.device)
        reduction = Reduction(node_id, ledgers, intake, peers, template, threads, computing)
        parts = Parts(
            redis,
            ledgers,
            intake,
            history,
            reduction,
            publication,
            peers,
            LossJudge(node_id, ledgers, peers, reactor),
            reporter,
            metrics,
            Unmasking(template, settings.fedcore.secure_aggregation.mask_layout, metrics, reactor),
        )
        self.driver = driver = IterationDriver(node_id, settings, parts, lambda: "i_" + _stamp(), reactor)
        self._departure = Departure(driver, parts)
        reporter.on_iteration_end.append(callback.on_iteration_end)
        self._on_iteration_end = reporter.on_iteration_end
        identity = device_identity_of(settings, _now_ms, metrics.show_device_trust)
        self._api = ClientApi(
            settings,
            layout,
            driver,
            intake,
            metrics,
            reactor,
            _now_ms,
            random.random,
            identity,
            forms,
        )
        self._heartbeat = heartbeat = Heartbeat(
            lambda: driver.cluster, "server", node_id, str(address), reactor
        )
        driver.on_join.append(heartbeat.beat)
        driver.on_terms += [
            reduction.follow_terms,
            lambda terms: self._measure(ledger_shape(terms, layout).size),
        ]
        prefix, allowed = settings.client.http_url_prefix, Networks(settings.fedcore.node.allow)
        workers: WorkerRounds | None = None
        if settings.server_mode is ServerMode.HYBRID_TRAINING:
            workers = WorkerRounds(driver, publication, template, device.hold_time, reactor)
        self.site = DeviceSite(
            {
                **device_routes(self._api, prefix, metrics, reactor.seconds),
                **cipher_routes(
                    CipherRounds(settings, self._api, reactor, identity), prefix, metrics, reactor.seconds
                ),
            },
            DevicePages(),
            Limits(
                device.header_timeout,
                device.body_timeout,
                device.min_body_rate,
                device.idle_timeout,
                device.connections_per_address,
                device.request_rate,
                device.request_burst,
            ),
            device.max_connections,
            reactor,
            private=worker_routes(workers, prefix, longest, metrics, reactor.seconds)
            if workers is not None and settings.fedcore.node.worker_http
            else {},
            insiders=allowed,
            refused=metrics.refuse_device,
        )
        node_api = NodeApi(driver, self._api, intake, ledgers, publication, peers, allowed, workers)
        self.node_listener = NodeListener(
            node_id,
            node_api.handlers(),
            max_data=longest,
            max_connections=settings.client.connection_num,
            allowed=lambda host: True,  # each command says whom it serves
            reactor=reactor,
            names_fit=links.names_fit if links is not None else fits,
        )
        metrics.connections.set_function(lambda: len(self.site.connections))
        metrics.redis_up.set_function(lambda: redis.available)
        self.services: list[Any] = [redis, self._client, intake, driver, heartbeat]
        self._tell(settings, layout, newest)

    def _tell(self, settings: Settings, layout: Layout, newest: int) -> None:
        """Tell what is served, and what an operator should know of it."""
        self.log.info(
            "serving {name}: {weights} weights, {floats} values, model of iteration {newest}",
            name=settings.fl_name,
            weights=len(layout),
            floats=layout.total_floats,
            newest=newest,
        )
        if warning := slow_masks(settings, layout, mask.COMPILED):
            self.log.warn("{warning}", warning=warning)

    def _arithmetic(self, device: SumDevice) -> Arithmetic:
        """Choose what computes sums and models, and tell where it is not what was asked for."""
        arithmetic, why_not = choose(device.value)
        if why_not:
            tell = self.log.warn if device is SumDevice.CUDA else self.log.info
            tell("sums and models are computed on the CPU: {reason}", reason=why_not)
        return arithmetic

    def checks(self) -> dict[str, Callable[[], str | None]]:
        """Return what must hold for the server to be ready."""
        return {
            "redis": lambda: self._redis.problem or None,
            "job": lambda: None if self.driver.cluster is not None else "not joined to the job yet",
            "membership": lambda: None if self._heartbeat.registered else "not on the list of servers yet",
            "ledger": lambda: self._ledgers.problem or None,
            "model": lambda: (
                self.driver.problem or (None if self.driver.serving else "not at the current model yet")
            ),
            "stopping": lambda: "the server is stopping" if self._api.stopping else None,
        }

    def has_no_room(self) -> bool:
        """Tell whether there is no ledger for what devices send."""
        return self._ledgers.own is None

    def doing(self) -> str:
        """Return what the server is about, in a few words."""
        if self.driver.cluster is None:
            return f"joining job {self.driver.settings.fl_name}"
        return course_of(self.driver.iteration, self.driver.policy)

    def follow(self, changed: Callable[[], None]) -> None:
        """Have a function called when the server may be about something else, or may have become ready or not."""
        self._redis.on_change.append(lambda available: changed())
        self.driver.on_join.append(changed)
        self._on_iteration_end.append(lambda end: changed())

    def _measure(self, ledger: int) -> None:
        self.threads.longest = longest_work(ledger)

    def drop_nodes(self, unwanted: Callable[[x509.Certificate], bool]) -> None:
        """Close the connections from and to nodes whose certificate is not wanted any more."""
        self.node_listener.drop(unwanted)
        self._client.drop(unwanted)

    def started(self) -> None:
        """Make room for updates, if there is any, and tell the callback that the server listens."""
        self._ledgers.open()
        self._callback.after_started()

    async def drain(self) -> None:
        """Stop taking requests, let those in flight finish, and leave the updates in good hands."""
        self._callback.before_stopped()
        self.site.stop()
        self.driver.let_go()
        self.leaving = "stopping: waiting for requests in flight"
        limit = self._reactor.seconds() + DRAIN_TIMEOUT_S
        while self.site.under_way and self._reactor.seconds() < limit:
            pause: defer.Deferred[None] = defer.Deferred()
            self._reactor.callLater(_POLL_S, pause.callback, None)
            await pause
        self._api.stopping = True
        self.leaving = "stopping: handing over updates"
        handed_over = defer.Deferred.fromCoroutine(self._departure.hand_over())
        handed_over.addTimeout(DRAIN_TIMEOUT_S, self._reactor)
        with contextlib.suppress(defer.TimeoutError):
            await handed_over
        self._ledgers.close()
        await self._departure.release()
        await self.node_listener.stop(NODE_GRACE_S)


def course_of(now: Iteration, policy: Policy) -> str:
    """Return where an iteration is, in a few words."""
    last = policy.last_iteration
    if now.running is RunningState.FINISH or now.number > last:
        return f"finished: all {last} iterations are done"
    where = f"iteration {now.number} of {last}"
    if now.running is not RunningState.RUNNING:
        return f"{where}, disabled"
    again = f", attempt {now.attempt}" if now.attempt > 1 else ""
    if now.phase is Phase.UNMASKING:
        reports = now.round_named(REPORTS_ROUND)
        come = 0 if reports is None else reports.count
        return f"{where}{again}, {now.phase}, {come} of {policy.completes(REPORTS_ROUND)} reports"
    return f"{where}{again}, {now.phase}, {now.uploaded} of {policy.update_threshold} updates"


def size_of_models(fl_name: str, options: ServerOptions) -> int:
    """Return the bytes that may have to be read to find a server's model."""
    paths = [] if options.model is None else [options.model]
    with contextlib.suppress(OSError):
        paths += [path for path in options.checkpoint_dir.iterdir() if path.name.startswith(fl_name)]
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def check_writable(folder: Path) -> None:
    """Make sure that models can be kept in a folder, which may be missing yet.

    Raises:
        ConfigError: they cannot.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not os.path.isdir(there):
        raise ConfigError(f"checkpoints cannot be written to {folder}", hint=f"{there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"checkpoints cannot be written to {folder}",
            hint=f"give {there} to the daemon's user, or let fedcore.server.checkpoint_dir name another folder",
        )


def _history(
    newest: int, model: ModelFile, initial: ModelFile | None, template: ImageTemplate
) -> ModelHistory:
    """Return the newest model, after the initial one if the first iteration may not be over yet."""
    image = template.image(model.weights)
    # Somebody may have put another model there meanwhile.
    fits = initial is not None and Layout.of(initial.weights, initial.not_aggregated) == template.layout
    if newest != 1 or initial is None or not fits:
        return ModelHistory(newest, image)
    history = ModelHistory(0, template.image(initial.weights))
    history.add(newest, image)
    return history


def _find_model(fl_name: str, options: ServerOptions) -> tuple[int, ModelFile, ModelFile | None]:
    """Return the newest iteration and its checkpoint, or the initial model as that of iteration 0; and the initial one.

    A MindSpore checkpoint does not say which weights are aggregated; the initial model does, if there is one.
    """
    checkpoint = checkpoints.load_newest(options.checkpoint_dir, fl_name)
    initial = None if options.model is None else read_model(options.model)
    if checkpoint is not None:
        model = checkpoint.model
        if checkpoint.path.suffix == ".ckpt" and initial is not None:
            model = replace(model, not_aggregated=initial.not_aggregated & model.weights.keys())
        return checkpoint.iteration, model, initial
    if initial is None:
        raise ConfigError(
            f"there is no model to serve: no checkpoint of {fl_name} in {options.checkpoint_dir}",
            hint="give the initial weights with --model FILE or fedcore.server.model",
        )
    return 0, initial, initial


def _address_towards(settings: Settings) -> str:
    """Return this host's address on the way to Redis: all nodes of a job share a subnet with it."""
    redis = settings.distributed_cache.address
    if not isinstance(redis, Address):
        return "127.0.0.1"
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            redis.host, redis.port, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # a datagram socket sends nothing here
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"cannot find this host's address on the way to Redis at {redis}: {error}",
            hint="give --tcp-server-ip",
        ) from error


def _stamp() -> str:
    """Return the local time as the protocol's names carry it: to the microsecond, in groups of three digits."""
    now = datetime.now()
    return f"{now:%Y-%m-%d-%H:%M:%S}.{now.microsecond // 1000:03d}.{now.microsecond % 1000:03d}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
