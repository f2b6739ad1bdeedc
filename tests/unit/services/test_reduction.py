"""The sum of partials, of this server and of another host: every rule, and accelerators that fail at any moment."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from twisted.internet import defer
from twisted.logger import capturedLogs
from twisted.python.failure import Failure
from unit.ledger.tracing import Tracing

from fedcore.aggregation.arithmetic import (
    NUMPY,
    AcceleratorFailed,
    Arithmetic,
    NumpyArithmetic,
    TorchArithmetic,
)
from fedcore.config import AggregationType, Settings
from fedcore.core import iteration as core
from fedcore.core.client_key import client_key
from fedcore.core.iteration import Iteration
from fedcore.errors import ConfigError
from fedcore.ledger.copy import PartialCopy, copy_in_memory
from fedcore.ledger.files import NoSpace
from fedcore.ledger.layout import Epoch, Shape
from fedcore.ledger.ledger import Ledger, Partial, Update
from fedcore.net.node_client import PeerUnreachable
from fedcore.services.peers import offer_of
from fedcore.services.reduction import Reduced, Reduction
from fedcore.store.cluster_state import Node, Roll
from fedcore.store.keys import ANYBODY, InstanceKeys
from fedcore.wire.arrays import Layout, Weight
from fedcore.wire.image import ImageTemplate, ModelImage
from fedcore.wire.node_messages import PartialOffer

EPOCH = Epoch("i", 3, "ab" * 32)
NOW = Iteration(3, base=EPOCH.base)
PLAIN = (Weight("a", (2,)), Weight("b", ()), Weight("frozen", (1,), aggregated=False))
CONTROLS = tuple(replace(weight, name=f"control.{weight.name}") for weight in PLAIN)
OTHER = "10.0.0.2:1::b"
POPULATION = 10


class Inline:
    """A reactor whose thread does its work at once."""

    def seconds(self) -> float:
        return 0.0

    def getThreadPool(self) -> Inline:
        return self

    def callInThreadWithCallback(self, told: Callable[[bool, Any], None], work: Callable[[], Any]) -> None:
        try:
            result = work()
        except Exception:
            told(False, Failure())
        else:
            told(True, result)

    def callFromThread(self, function: Callable[..., Any], *arguments: Any) -> None:
        function(*arguments)


@dataclass
class World:
    """Three ledgers: the own one, one adopted from a dead neighbour, one at a peer.

    It stands for Ledgers, UpdateIntake, Peers and ClusterState as far as Reduction asks them; ledgers, copies of
    partials, sums and images are real.
    """

    layout: Layout
    partials: list[Partial]
    held: dict[str, list[str]]  # ledger id -> clients
    keys: InstanceKeys = field(default_factory=lambda: InstanceKeys("job", "i"))
    copied: int = 0
    copies: list[weakref.ref[PartialCopy]] = field(default_factory=list)
    short: bool = False  # of memory
    adopted: dict[str, Partial] = field(default_factory=dict)
    called: Roll = field(default_factory=lambda: Roll(frozenset(), frozenset()))
    silent: bool = False  # is the peer
    gone: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.own, adopted, self.distant = self.partials
        self.adopted[adopted.ledger_id] = adopted

    async def seal(self, *where: Any) -> Any:
        """Of the intake: this server's partial; of the peer: what it offers."""
        if len(where) == 2:
            return self.own
        if self.silent or where[0] in self.gone:
            raise PeerUnreachable("nobody answers")
        return [offer_of(self.distant)]

    async def adopt(self, *which: Any) -> None:
        """Everything is adopted already."""

    async def uploads(self, number: int) -> dict[str, str]:
        return {client_key(c): ledger for ledger, clients in self.held.items() for c in clients}

    async def uploads_by_ledger(self, number: int) -> dict[str, int]:
        return {ledger: len(clients) for ledger, clients in self.held.items()}

    async def roll(self) -> Roll:
        return self.called

    async def nodes(self, role: str) -> list[Node]:
        return [Node("me", role, ""), Node(OTHER, role, "")]

    async def ledgers(self) -> dict[str, str]:
        return {self.distant.ledger_id: OTHER}

    def copy_in_memory(self, head: bytes, start: int, length: int) -> PartialCopy:
        if self.short:
            raise NoSpace("no memory", hint="more of it")
        copy = copy_in_memory(head, start, length)
        self.copies.append(weakref.ref(copy))
        return copy

    @property
    def copies_left(self) -> int:
        """How many copies of the peer's partial still take memory."""
        gc.collect()
        return sum(copy() is not None for copy in self.copies)

    async def copy_partial(
        self, peer: str, offer: PartialOffer, instance: str, iteration: int, attempt: int, copy: PartialCopy
    ) -> None:
        self.copied += 1
        copy.fill(0, self.distant.content)


def update(number: int, names: list[str], layout: Layout) -> Update:
    chance = np.random.default_rng(number)
    values = {name: chance.standard_normal(layout.by_name[name].size).astype(np.float32) for name in names}
    return Update(f"client-{number}", values, 3 + number, 0, 0.5, 0.25)


def world(layout: Layout) -> tuple[World, list[Update]]:
    """Six updates in three ledgers; one leaves weights out, and nobody sends ``b`` but the last."""
    everything = [weight.name for weight in layout if "b" not in weight.name.split(".")]
    updates = [update(number, everything, layout) for number in range(5)]
    updates.append(update(5, [n for n in layout.by_name if n != "a"], layout))
    partials, held = [], {}
    for place in range(3):
        shape = Shape.of(layout, "job", 9, 4, 4096)
        ledger = Ledger.create(Tracing(shape.size), layout, shape)
        ledger.begin(EPOCH)
        mine = updates[place::3]
        for each in mine:
            slot = ledger.receive()
            assert slot is not None
            ledger.record(slot, each.fl_id, each.loss, each.accuracy)
            ledger.accept(slot, each)
        ledger.merge()
        partials.append(ledger.seal())
        held[ledger.id] = [each.fl_id for each in mine]
    return World(layout, partials, held), updates


def reduction_of(
    there: World, arithmetic: Arithmetic = NUMPY, rule: str = "FedAvg", *, node_id: str = "me"
) -> Reduction:
    stands_for: Any = there
    reactor: Any = Inline()
    template = ImageTemplate(there.layout)
    made = Reduction(node_id, stands_for, stands_for, stands_for, template, reactor, arithmetic)
    made.follow_terms(terms(rule))
    return made


def terms(rule: str) -> Settings:
    settings = Settings()
    changed = replace(
        settings.aggregation, aggregation_type=AggregationType(rule), total_client_num=POPULATION
    )
    return replace(settings, aggregation=changed)


def before(layout: Layout) -> ModelImage:
    return ImageTemplate(layout).image({w.name: np.full(w.size, 2.0, np.float32) for w in layout})


def reduce(reduction: Reduction, there: World, in_doubt: list[str] | None = None, *, quorum: int = 6) -> Any:
    cluster: Any = there
    others = in_doubt or []
    return result_of(reduction.reduce(cluster, NOW, EPOCH, before(there.layout), quorum, lambda: others))


def result_of(work: Coroutine[Any, Any, Any]) -> Any:
    outcome: list[Any] = []
    defer.Deferred.fromCoroutine(work).addBoth(outcome.append)
    if isinstance(outcome[0], Failure):
        outcome[0].raiseException()
    return outcome[0]


@pytest.mark.parametrize("rule", ["FedAvg", "FedProx", "Scaffold", "FedNova"])
@pytest.mark.parametrize("device", ["numpy", "cpu"])
def test_a_model_of_three_ledgers(rule: str, device: str) -> None:
    """Each rule's formula in one line, over the updates as they were sent."""
    if device != "numpy":
        pytest.importorskip("torch")
    layout = Layout((*PLAIN, *(CONTROLS if rule == "Scaffold" else ())))
    there, updates = world(layout)
    arithmetic = NUMPY if device == "numpy" else TorchArithmetic(device)
    reduced = reduce(reduction_of(there, arithmetic, rule), there)
    assert isinstance(reduced, Reduced)
    assert (reduced.totals.count, there.copied) == (6, 1)
    assert there.copies_left == 0
    for weight in layout:
        sent = [u for u in updates if weight.name in u.weights]
        total = np.sum([u.weights[weight.name].astype(np.float64) for u in sent], axis=0)
        if not weight.aggregated:
            expected = np.full(weight.size, 2.0)
        elif rule == "FedNova":
            expected = 2.0 + sum(u.data_size for u in updates) * total / len(updates) ** 2
        elif weight.name.startswith("control."):
            expected = 2.0 + total / POPULATION
        else:
            expected = total / sum(u.data_size for u in sent)
        np.testing.assert_allclose(reduced.image.arrays[weight.name], expected, rtol=1e-6)


class Failing(NumpyArithmetic):
    """Fails from its n-th operation on, as a device without memory does; a broken one gives nothing back either."""

    def __init__(self, works: int, broken: bool = False) -> None:
        self.works, self.broken = works, broken
        self.asked = 0

    def _use(self) -> None:
        self.asked += 1
        if self.asked > self.works:
            raise AcceleratorFailed("CUDA out of memory")

    def take(self, values: Any, *, share: bool) -> tuple[Any, bool]:
        if values.size:  # not what a sum begins with
            self._use()
        return super().take(values, share=share)

    def add(self, total: Any, values: Any) -> None:
        self._use()
        super().add(total, values)

    def doubles(self, values: Any) -> Any:
        self._use()
        return super().doubles(values)

    def floats(self, values: Any) -> Any:
        self._use()
        return super().floats(values)

    def host(self, values: Any) -> Any:
        if self.broken and self.asked > self.works:
            raise AcceleratorFailed("CUDA error: unspecified launch failure")
        return super().host(values)


SCAFFOLD = Layout((*PLAIN, *CONTROLS))


def operations(there: World) -> int:
    """How many there are depends on the order of the ledgers' ids."""
    counting = Failing(1000)
    reduce(reduction_of(there, counting, "Scaffold"), there)
    return counting.asked


def test_an_accelerator_without_memory_at_any_moment() -> None:
    """The CPU goes on with what was added: nothing is read twice, and the model is the same to the bit."""
    there, _ = world(SCAFFOLD)
    steps = operations(there)
    assert steps > 8
    expected = reduce(reduction_of(there, NUMPY, "Scaffold"), there).image.digest
    for works in range(steps):
        there.copied = 0
        failing = Failing(works)
        reduction = reduction_of(there, failing, "Scaffold")
        with capturedLogs() as logged:
            assert reduce(reduction, there).image.digest == expected
        assert there.copied == 1
        asked = failing.asked
        assert reduce(reduction, there).image.digest == expected
        assert failing.asked == asked  # it is given up for good
        told = [event for event in logged if event["log_level"].name == "warn"]
        assert [str(event["error"]) for event in told] == ["CUDA out of memory"]
        assert there.copies_left == 0


def test_an_accelerator_that_loses_what_was_added() -> None:
    """The sum begins anew, on the CPU; the first try says to try again."""
    there, _ = world(SCAFFOLD)
    expected = reduce(reduction_of(there, NUMPY, "Scaffold"), there).image.digest
    for works in range(operations(there)):
        reduction = reduction_of(there, Failing(works, broken=True), "Scaffold")
        with capturedLogs() as logged:
            assert reduce(reduction, there) is None
        told = [event for event in logged if event["log_level"].name == "warn"]
        assert [str(event["error"]) for event in told] == ["CUDA out of memory"]  # and no peer is blamed
        assert reduction.had == frozenset()
        assert there.copies_left == 0
        assert reduce(reduction, there).image.digest == expected


def test_a_partial_that_finds_no_memory_is_told_once_in_an_attempt_and_tried_again() -> None:
    there, _ = world(Layout(PLAIN))
    expected = reduce(reduction_of(there), there).image.digest
    reduction = reduction_of(there)
    there.short = True
    for attempt in (1, 2):
        with capturedLogs() as logged:
            assert [reduce(reduction, there) for _ in range(3)] == [None] * 3, attempt
        assert [(event["peer"], event["error"]) for event in logged] == [(OTHER, "no memory (more of it)")]
        reduction.forget()
    there.short = False
    assert reduce(reduction, there).image.digest == expected


def test_servers_that_were_never_seen_are_not_asked_and_waited_for() -> None:
    there, _ = world(Layout(PLAIN))
    reduction = reduction_of(there)
    assert reduce(reduction, there, [ANYBODY, OTHER]) is None
    assert there.copied == 0
    assert isinstance(reduce(reduction, there, [OTHER]), Reduced)


class TestBelowTheQuorum:
    """An iteration that was sealed with seven updates, of which Redis counts six after a loss of its data."""

    BACK = frozenset({"me", OTHER, ANYBODY})
    FAILED = core.ReductionFailed(core.status_lost(NOW.number))

    def test_it_fails_at_once_when_everybody_is_back_and_no_update_is_left_to_tell(self) -> None:
        there, _ = world(Layout(PLAIN))
        there.called = Roll(self.BACK, frozenset())
        assert reduce(reduction_of(there), there, quorum=7) == self.FAILED
        assert reduce(reduction_of(there), there, [OTHER, ANYBODY], quorum=7) == self.FAILED, "also in doubt"

    @pytest.mark.parametrize("awaited", [OTHER, ANYBODY])
    def test_who_is_not_back_may_have_the_rest(self, awaited: str) -> None:
        there, _ = world(Layout(PLAIN))
        there.called = Roll(self.BACK - {awaited}, frozenset({awaited}))
        assert reduce(reduction_of(there), there, quorum=7) is None

    def test_without_a_loss_that_is_known_only_time_tells(self) -> None:
        there, _ = world(Layout(PLAIN))
        assert reduce(reduction_of(there), there, quorum=7) is None

    def test_a_living_server_that_does_not_answer_may_have_the_rest(self) -> None:
        there, _ = world(Layout(PLAIN))
        there.called = Roll(self.BACK, frozenset())
        there.adopted[there.distant.ledger_id] = there.distant  # or it would be missed before
        there.silent = True
        assert reduce(reduction_of(there), there, quorum=7) is None
        there.silent = False
        assert reduce(reduction_of(there), there, quorum=7) == self.FAILED

    def test_so_may_a_server_whose_ledger_is_not_counted_yet(self) -> None:
        there, _ = world(Layout(PLAIN))
        there.called = Roll(self.BACK, frozenset())
        del there.held[there.distant.ledger_id]
        assert reduce(reduction_of(there), there, quorum=7) is None


def test_servers_that_were_never_seen_are_not_waited_for_once_another_server_has_named_all() -> None:
    there, _ = world(Layout(PLAIN))
    there.called = Roll(frozenset({OTHER, ANYBODY}), frozenset())
    assert isinstance(reduce(reduction_of(there), there, [ANYBODY, OTHER]), Reduced)
    there.called = Roll(frozenset({OTHER}), frozenset({ANYBODY}))
    assert reduce(reduction_of(there), there, [ANYBODY, OTHER]) is None


def test_a_process_that_is_gone_is_not_waited_for_though_its_address_cannot_be_reached() -> None:
    """Its successor answers, or is this very server, which has looked for what it left."""
    there, _ = world(Layout(PLAIN))
    reduction = reduction_of(there)
    before = "10.0.0.1:1::2026-01-01-00:00:00.000.000::10001"
    there.gone = frozenset({before})
    assert reduce(reduction, there, [before, OTHER]) is None
    reduction = reduction_of(there, node_id="10.0.0.1:1::2026-01-01-00:00:09.000.000::10009")
    assert isinstance(reduce(reduction, there, [before, OTHER]), Reduced)


class TestTerms:
    def test_a_rule_that_keeps_what_the_model_lacks_ends_the_start(self) -> None:
        there, _ = world(Layout(PLAIN))
        fault = "aggregates by Scaffold, and this server's model has no 'control.a'.*on all servers"
        with pytest.raises(ConfigError, match=fault):
            reduction_of(there, NUMPY, "Scaffold")

    def test_in_force_are_the_last_ones(self) -> None:
        there, _ = world(Layout(PLAIN))
        reduction = reduction_of(there)
        mean = reduce(reduction, there).image.digest
        reduction.follow_terms(terms("FedNova"))
        assert reduce(reduction, there).image.digest != mean
        reduction.follow_terms(terms("FedProx"))
        assert reduce(reduction, there).image.digest == mean
