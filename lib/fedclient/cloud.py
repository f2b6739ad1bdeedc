"""The public class of silos: a CloudWorker takes part in a CLOUD_TRAINING job with a SiloTrainer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from fedclient.client import Client, IterationReport, Summary
from fedclient.cloud_session import CloudSession, Synchronisation
from fedclient.rules import Rule
from fedclient.schedule import Adaptive
from fedclient.session import Policy
from fedclient.silo import SiloTrainer, Steps
from fedclient.trainer import Weights
from fedclient.transport import Transport
from fedcore.errors import ConfigError

SYNC_TYPES = ("fixed", "adaptive")
ENCRYPT_MODES = ("NOT_ENCRYPT", "STABLE_PW_ENCRYPT")
REQUEST_S = 10.0  # the protocol's wait for one answer to a cloud worker
PATIENCE = Policy(
    poll_interval=1.0, poll_patience=512.0
)  # the protocol's 512 questions for a model, one a second


def new_worker_id() -> str:
    """Return a worker's id as the protocol writes it: ``worker_fl_{time}::{chance}``."""
    return f"worker_fl_{time.strftime('%Y%m%d%H%M%S')}::{random.SystemRandom().getrandbits(64):016x}"


class CloudWorker:
    """Trains one silo's data together with others, through a server in CLOUD_TRAINING mode.

    Args:
        trainer: the user's model and data.
        server: a URL, several URLs of equal servers, or a transport, which the worker closes at its end.
        rule: the server's aggregation_type: FedAvg, FedProx, Scaffold or FedNova.
        sync_frequency: local steps between two synchronisations, 1..65535; of the first run if adaptive.
        sync_type: "fixed" or "adaptive"; for the latter the server's initial model must hold ``as_abs_grad.*``, see
            ``fedclient.with_absolute_changes``.
        adaptive: parameters of adaptive synchronisation; None: the protocol's.
        iid_rate: FedProx's, above 0 up to 1.
        encrypt_mode: the server's encrypt_type: NOT_ENCRYPT, or STABLE_PW_ENCRYPT, which hides what each worker sends
            from the server; all workers of an iteration must then stay until it ends.
        fl_name: name of the job; None: the trainer's class name.
        worker_id: identity towards the servers, unique in the job; None: a new one.
        control: Scaffold's own control of a worker that this one replaces, see ``control``; None: zero.
        policy: waits and limits.
        on_iteration: called after every synchronisation and every refusal; what it raises ends ``run``.
        timeout: seconds for a connection and each part of a request; a reply may take three times as long.
        ca_file: PEM file of the authorities that sign the servers' certificates.
        rotate: change the server at every request.
        more: of ``fedclient.Client``: clock, monotonic, sleep, chance.

    Raises:
        ConfigError: an argument cannot be used.
    """

    def __init__(
        self,
        trainer: SiloTrainer,
        server: str | Sequence[str] | Transport,
        *,
        rule: str = Rule.FEDAVG,
        sync_frequency: int,
        sync_type: str = "fixed",
        adaptive: Adaptive | None = None,
        iid_rate: float = 0.0,
        encrypt_mode: str = "NOT_ENCRYPT",
        fl_name: str | None = None,
        worker_id: str | None = None,
        control: Weights | None = None,
        policy: Policy | None = None,
        on_iteration: Callable[[IterationReport], object] | None = None,
        timeout: float = REQUEST_S,
        ca_file: str | None = None,
        rotate: bool = False,
        **more: Any,
    ) -> None:
        _check_encrypt_mode(encrypt_mode)
        if sync_type not in SYNC_TYPES:
            raise ConfigError(f"sync_type is {sync_type!r}", hint=" or ".join(SYNC_TYPES))
        if adaptive is not None and sync_type != "adaptive":
            raise ConfigError("parameters of adaptive synchronisation are given", hint="sync_type adaptive")
        way = Synchronisation(
            Rule.named(rule),
            sync_frequency,
            iid_rate,
            (adaptive or Adaptive()) if sync_type == "adaptive" else None,
            encrypt_mode,
        )
        fl_name, worker_id = fl_name or type(trainer).__name__, worker_id or new_worker_id()
        self._session = CloudSession(fl_name, worker_id, way, policy or PATIENCE, control)
        self._client = Client(
            Steps(trainer, lambda: self._client.stopping),
            server,
            fl_name=fl_name,
            client_id=worker_id,
            on_iteration=on_iteration,
            timeout=timeout,
            ca_file=ca_file,
            rotate=rotate,
            session=self._session,
            fit_name="step",
            **more,
        )

    @property
    def fl_name(self) -> str:
        """The job's name."""
        return self._client.fl_name

    @property
    def worker_id(self) -> str:
        """Who this worker is to the servers."""
        return self._client.client_id

    @property
    def sync_frequency(self) -> int:
        """Local steps of the run that is due."""
        return self._session.schedule.frequency

    @property
    def control(self) -> Weights:
        """Scaffold's own control, name -> float32[n]: keep it to let another worker go on; empty until it is used."""
        return dict(self._session.control)

    def run(self) -> Summary:
        """Take part until the job ends, gives up or is stopped; to be called once.

        An exception of the trainer ends the run as FAILED, one of ``on_iteration`` is passed on.
        """
        return self._client.run()

    def stop(self) -> None:
        """End ``run`` soon: at once while it waits or talks to a server, else after the step that is being taken.

        May be called from any thread; not from a signal handler.
        """
        self._client.stop()


def _check_encrypt_mode(mode: str) -> None:
    """Refuse what a worker cannot do."""
    if mode not in ENCRYPT_MODES:
        raise ConfigError(f"encrypt_mode must be in {ENCRYPT_MODES}, but got {mode}.")
