"""One cloud worker's side of the protocol: a Session whose runs of local steps end in a synchronisation.

What is as with a device lives in ``fedclient.session``: refusals, repeats, waits, the end. What is different:

* startFLJob brings no weights, with Scaffold the global control. The weights that a run begins with are those of the
  iteration before; a worker that has just received them goes on, any other one (at its start, after an iteration
  that went on without it) asks for them with getModel. The original never does: each of its workers begins with
  weights of its own, and a late one averages old weights in.
* A model that is its base, bit for bit, is that of an iteration that failed. Its run is repeated; nothing of it has
  reached the global control, so the own control stays as well.
* The weights of a run that was refused are dropped: they belong to an iteration that has ended.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedclient import protection, rules
from fedclient.replies import WORKER_MODES, some_weights_of, weights_of
from fedclient.rules import ABS_CHANGE, Rule
from fedclient.schedule import Adaptive, Consistency, Schedule, observe
from fedclient.session import Policy, Session
from fedclient.silo import LocalRun
from fedclient.steps import Action, Fit, IterationDone, IterationOutcome, Outcome
from fedclient.trainer import Weights
from fedcore.errors import ConfigError, MalformedRequest
from fedcore.wire.arrays import Floats, Layout, check_update
from fedcore.wire.messages import (
    CompressType,
    FeatureMap,
    RequestGetModel,
    RequestUpdateModel,
    ResponseFLJob,
    ResponseGetModel,
)


@dataclass(frozen=True, slots=True)
class Synchronisation:
    """How a cloud worker takes part; the same for all workers of a job.

    Attributes:
        rule: the server's aggregation_type.
        frequency: local steps between two synchronisations, of the first run if adaptive; 1..65535.
        iid_rate: FedProx's share of the distance to the global weights, 0..1; nothing for the other rules.
        adaptive: parameters of adaptive synchronisation, None: fixed.
        encrypt_mode: the server's encrypt_type; a job with another one is not joined.

    Raises:
        ConfigError: a value is out of range, or they do not go together.
    """

    rule: Rule = Rule.FEDAVG
    frequency: int = 1
    iid_rate: float = 0.0
    adaptive: Adaptive | None = None
    encrypt_mode: str = protection.PLAIN

    def __post_init__(self) -> None:
        Schedule(self.frequency)
        if not 0 <= self.iid_rate <= 1:
            raise ConfigError(f"iid_rate is {self.iid_rate}", hint="0 to 1")
        if self.rule is Rule.FEDPROX and not self.iid_rate:
            raise ConfigError("FedProx without an iid_rate is FedAvg", hint="iid_rate, above 0 up to 1")
        if self.adaptive is not None and self.rule is Rule.FEDNOVA:
            raise ConfigError(
                "adaptive synchronisation needs the mean of as_abs_grad.*, and FedNova adds changes up",
                hint="sync_type fixed, or another rule",
            )


class CloudSession(Session):
    """The state of one cloud worker in one job.

    Attributes:
        schedule: the run that is due.
        control: Scaffold's own control, name -> float32[n]; empty until the first run.
    """

    MODES: ClassVar[Collection[str]] = WORKER_MODES
    PROTECTIONS: ClassVar[Collection[str]] = (protection.PLAIN, protection.STABLE_MASKS)
    DOWNLOADS: ClassVar[Collection[CompressType]] = (CompressType.NO_COMPRESS,)

    def __init__(
        self,
        fl_name: str,
        fl_id: str,
        synchronisation: Synchronisation,
        policy: Policy | None = None,
        control: Weights | None = None,
    ) -> None:
        """Begin, or go on with the own ``control`` of a worker that is gone."""
        super().__init__(fl_name, fl_id, policy)
        self._way = synchronisation
        self.schedule = Schedule(synchronisation.frequency)
        self.control: Weights = dict(control or {})
        adaptive = synchronisation.adaptive
        self._seen = None if adaptive is None else Consistency.at_first(self.schedule.frequency, adaptive)
        self._base: int | None = None  # iteration whose result is in ``model``
        self._asked = 0  # iteration that getModel asks for
        self._global_control: Weights = {}
        self._next_control: Weights = {}

    # -- the way of an iteration

    @property
    def _declared_size(self) -> int:
        return rules.declared_size(self._way.rule, self._sizes.data_size, self.schedule.frequency)

    def _take(self, reply: ResponseFLJob) -> None:
        self._global_control = rules.named_controls(some_weights_of(reply.feature_map))

    def _fault_of(self, terms: protection.Terms) -> str:
        mode = self._way.encrypt_mode
        if terms.encrypt_type != mode:
            return f"the job's encrypt_type is {terms.encrypt_type!r}, this worker's encrypt_mode {mode!r}"
        return super()._fault_of(terms)

    def _begin(self, now: int) -> Action:
        if self._base != self.iteration - 1:
            self._poll_until = now + round(self._policy.poll_patience * 1000)
            self._asked = self.iteration - 1
            return self._ask_model(now)
        if fault := self._fault():
            return self._finish(Outcome.FAILED, fault)
        return super()._begin(now)

    def _fault(self) -> str:
        """Say why this job cannot be joined in this way; empty if it can."""
        if self._way.rule is Rule.SCAFFOLD:
            if _sizes(self._global_control, self.model) != _sizes(self.model):
                return "the server sends no control.* of each weight: its aggregation_type is not Scaffold"
            if self.control and _sizes(self.control) != _sizes(self.model):
                return "the control to go on with is not that of this model"
        elif self._global_control:
            return f"the server's aggregation_type is Scaffold, this worker's is {self._way.rule}"
        return ""

    def _fit(self) -> Action:
        assert self._config is not None
        plan, scaffold = self._config, self._way.rule is Rule.SCAFFOLD
        if scaffold and not self.control:
            self.control = {name: np.zeros_like(values) for name, values in self.model.items()}
        run = LocalRun(
            plan.epochs,
            plan.batch_size,
            plan.learning_rate,
            plan.iteration,
            first_step=self.schedule.next_begin,
            steps=self.schedule.frequency,
            iid_rate=self._way.iid_rate if self._way.rule is Rule.FEDPROX else 0.0,
            drift=rules.drift(self._global_control, self.control) if scaffold else {},
        )
        action = super()._fit()
        assert isinstance(action, Fit)
        return Fit(action.weights, run)

    def _upload(self, trained: Weights) -> RequestUpdateModel:
        assert self._config is not None
        base, steps, samples = self.model, self.schedule.frequency, self._sizes.data_size
        check_update(Layout.of(base), trained)
        values = rules.uploaded(self._way.rule, trained, base, samples, steps)
        if self._way.rule is Rule.SCAFFOLD:
            self._next_control = rules.new_control(
                self.control, self._global_control, base, trained, steps, self._config.learning_rate
            )
            values |= rules.control_changes(self._next_control, self.control)
        if self._seen is not None:
            values |= rules.weighted(rules.absolute_changes(trained, base), samples)
        check_update(Layout.of(values), values)  # what was multiplied may have overflowed
        if self._masking is not None:
            values = {name: values[name].copy() for name in sorted(values)}
            self._masking.mask(list(values), values)(values)
        return RequestUpdateModel(
            feature_map=tuple(FeatureMap(name, array) for name, array in values.items())
        )

    def _send_update(self, request: RequestUpdateModel) -> Action:
        self._asked = self.iteration
        return super()._send_update(request)

    def _ask_model(self, now: int) -> Action:
        request = RequestGetModel(self._fl_name, self._asked, str(now), self._offered())
        return self._send("getModel", request)

    def _received(self, reply: ResponseGetModel, now: int) -> Action:
        received = weights_of(reply.feature_map)
        weights, absolute = _split(received)  # those of a job that others adapt to are not the trainer's
        if self.model and _sizes(weights) != _sizes(self.model):
            raise MalformedRequest("the new model is not that of the iteration before")
        before, self.model = self.model, weights
        fetched, self._base = self._asked < self.iteration, self._asked
        if self._seen is not None and _sizes(absolute) != _sizes(weights):
            reason = "the server has no as_abs_grad.* of each weight, which adaptive synchronisation needs"
            return self._finish(Outcome.FAILED, f"{reason}: make its initial model with them")
        if fetched:
            return self._begin(now)
        self._restarts = self._undated = 0
        self._masking = None
        if all(np.array_equal(before[name], values) for name, values in weights.items()):
            reason = f"iteration {self.iteration} made no model"
            return self._pause(IterationDone(self.iteration, IterationOutcome.RESTARTED, reason), self._next)
        self._synchronised(before, absolute)
        return self._pause(IterationDone(self.iteration, IterationOutcome.COMPLETED), self._next)

    def _synchronised(self, before: Weights, absolute: Weights) -> None:
        """Move on to the next run."""
        if self._way.rule is Rule.SCAFFOLD:
            self.control = self._next_control
        frequency = self.schedule.frequency
        if self._seen is not None and self._way.adaptive is not None:
            change = {name: values - before[name] for name, values in self.model.items()}
            self._seen = observe(self._seen, self._way.adaptive, change, absolute)
            frequency = self._seen.frequency
        self.schedule = self.schedule.synchronised(frequency)


def _sizes(weights: Weights, among: Weights | None = None) -> dict[str, int]:
    """Return name -> number of elements, of those that are also in ``among``."""
    return {name: values.size for name, values in weights.items() if among is None or name in among}


def _split(received: Weights) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Return a model without its ``as_abs_grad.*``, and those by their weights' names."""
    weights = {name: values for name, values in received.items() if not name.startswith(ABS_CHANGE)}
    absolute = {
        name.removeprefix(ABS_CHANGE): values
        for name, values in received.items()
        if name.startswith(ABS_CHANGE)
    }
    return weights, absolute
