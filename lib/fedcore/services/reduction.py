"""The sum of all servers' sealed partials: the new model of an iteration, made by its finaliser.

Rules kept here:

* Partials are added in the order of their ledger ids, so that whoever repeats the sum gets the same bytes.
* A partial of another host is read whole into memory, verified, added and dropped: memory holds one sum and one
  partial beside the server's own, and the ledgers' directory may be full. What was added counts as had, even if its
  server dies then.
* The clients of every partial must be exactly those that the shared state counted in its ledger.
* An accelerator that fails is given up for good: what was added is read back, the CPU goes on, and the model is the
  same to the last bit. If it cannot be read back, the sum begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from twisted.internet import defer, threads
from twisted.logger import Logger

from fedcore.aggregation.arithmetic import NUMPY, AcceleratorFailed, Arithmetic
from fedcore.aggregation.rule import Total, new_model
from fedcore.aggregation.rules import rule_named
from fedcore.aggregation.sums import RunningSum, Spans
from fedcore.config import Settings
from fedcore.core import iteration as core
from fedcore.core.iteration import Iteration
from fedcore.core.node_id import replaced
from fedcore.errors import ConfigError, FedcoreError, PeerError, StoreError
from fedcore.ledger.layout import Damaged, Epoch, Totals, sum_of
from fedcore.ledger.ledger import Partial
from fedcore.services.ledgers import Ledgers
from fedcore.services.peers import PeerReplaced, Peers
from fedcore.services.update_intake import UpdateIntake
from fedcore.store.cluster_state import ClusterState
from fedcore.store.keys import ANYBODY, DOUBT_S, REVOKED
from fedcore.wire.arrays import all_finite
from fedcore.wire.image import ImageTemplate, ModelImage
from fedcore.wire.node_messages import PartialOffer

TRIES = 3  # then a partial that is damaged each time is given up


@dataclass(frozen=True, slots=True)
class Reduced:
    """A model was made.

    Attributes:
        image: the model.
        totals: of its updates.
    """

    image: ModelImage
    totals: Totals


@dataclass(slots=True)
class _Sum:
    """What of an attempt's partials is added already.

    Attributes:
        attempt: instance, iteration and attempt.
        totals: of each added ledger.
        tries: how often each ledger's partial turned out to be damaged.
        clients: of each added ledger, as keys.
    """

    attempt: tuple[str, int, int]
    sums: RunningSum
    totals: dict[str, Totals] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    clients: dict[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a partial can be had: here, or at a peer."""

    partial: Partial | None
    peer: str = ""
    offer: PartialOffer | None = None

    @property
    def updates(self) -> int:
        if self.partial is not None:
            return self.partial.totals.count
        return 0 if self.offer is None else self.offer.updates


class Reduction:
    """Makes models of partials."""

    log = Logger()

    def __init__(
        self,
        node_id: str,
        ledgers: Ledgers,
        intake: UpdateIntake,
        peers: Peers,
        template: ImageTemplate,
        reactor: Any,
        arithmetic: Arithmetic = NUMPY,
    ) -> None:
        """Sum what is in ``ledgers``, in the own ledger that ``intake`` seals, and at ``peers``.

        The rule is FedAvg until ``follow_terms`` names another one.
        """
        self._node_id = node_id
        self._ledgers = ledgers
        self._intake = intake
        self._peers = peers
        self._template = template
        self._spans = Spans(template.layout)
        self._reactor = reactor
        self._arithmetic = arithmetic
        self._rule = rule_named("FedAvg")
        self._sum: _Sum | None = None
        self._short: tuple[tuple[str, int, int], float] | None = (
            None  # which attempt is below the quorum, since when
        )
        self._complained: set[tuple[str, int, int]] = set()  # peers that offered nothing, in which attempt
        self._untaken: set[tuple[str, str, int, int]] = set()  # whose partial found no room, in which attempt

    @property
    def had(self) -> frozenset[str]:
        """Ledgers that are added to the sum under way."""
        return frozenset() if self._sum is None else frozenset(self._sum.totals)

    def follow_terms(self, settings: Settings) -> None:
        """Take the rule of the settings that are in force.

        Raises:
            ConfigError: the model does not have what the rule keeps.
        """
        terms = settings.aggregation
        rule = rule_named(terms.aggregation_type.value, terms.total_client_num)
        missing = [
            w.name for w in rule.keeps(self._template.layout) if w.name not in self._template.layout.by_name
        ]
        if missing:
            raise ConfigError(
                f"the cluster aggregates by {terms.aggregation_type}, and this server's model has no {missing[0]!r}",
                hint="set aggregation.aggregation_type to the cluster's on all servers and start them again",
            )
        self._rule = rule

    def forget(self) -> None:
        """Drop the sum under way."""
        self._sum = self._short = None
        self._complained.clear()
        self._untaken.clear()

    def be_patient(self) -> None:
        """Begin anew to wait for updates that Redis does not count: those who are not back yet may have them."""
        self._short = None

    async def reduce(
        self,
        cluster: ClusterState,
        now: Iteration,
        epoch: Epoch,
        previous: ModelImage,
        quorum: int,
        in_doubt: Callable[[], list[str]],
    ) -> Reduced | core.ReductionFailed | core.UpdatesLost | None:
        """Make the model of all counted updates of a sealed iteration.

        Args:
            cluster: the shared state.
            now: the iteration.
            epoch: which updates count.
            previous: the model that they were trained from.
            quorum: fewer updates make no model.
            in_doubt: gives further servers to ask and to wait for, while Redis may have forgotten what they hold;
                ANYBODY can only be waited for.

        Returns:
            The model, or why there is none; None if a partial cannot be had at present: to be tried again.
        """
        number = now.number
        try:
            own = await self._intake.seal(number, now.attempt)
        except StoreError:
            return None  # this server's ledger is not where the iteration is, or not yet
        except FedcoreError as error:
            self.log.error(
                "the sum of iteration {iteration} is unusable: {error}", iteration=number, error=error
            )
            return core.ReductionFailed(core.aggregation_failed(number))
        await self._ledgers.adopt(cluster, epoch, self._node_id)
        everybody = in_doubt()
        sources, silent = await self._find(cluster, now, own, everybody)
        vouched = (await cluster.roll()).back & {ANYBODY} if everybody else set()
        uploads = await cluster.uploads(number)  # after all have sealed: nothing can be added any more
        counted: dict[str, set[str]] = {}
        for client, ledger_id in uploads.items():
            counted.setdefault(ledger_id, set()).add(client)
        if in_doubt() != everybody:
            return None  # Redis was lost meanwhile
        uncounted = {i for i, source in sources.items() if source.updates} - counted.keys()
        if everybody and (uncounted or (silent & set(everybody)) - vouched):
            return None  # they bring back what Redis has forgotten, or the doubt ends
        held = {ledger_id for ledger_id, source in sources.items() if source.updates} | self.had
        if not counted.keys() <= held:
            return self._missed(sources, counted, now)
        if len(uploads) < quorum:
            lasting = self._is_short((cluster.keys.instance, number, now.attempt)) and not everybody
            final = lasting or await self._is_told(cluster, now, own)
            return core.ReductionFailed(core.status_lost(number)) if final else None
        self._short = None
        try:
            return await self._add_all(cluster, now, epoch, previous, sources, counted)
        except AcceleratorFailed:
            return None

    def _is_short(self, attempt: tuple[str, int, int]) -> bool:
        """Tell whether an attempt has been below the quorum for DOUBT_S, as a sealed one is after a loss of data."""
        now = self._reactor.seconds()
        if self._short is None or self._short[0] != attempt:
            self._short = attempt, now
        return bool(now - self._short[1] >= DOUBT_S)

    async def _is_told(self, cluster: ClusterState, now: Iteration, own: Partial | None) -> bool:
        """Tell whether nobody is left who could bring back more of what Redis has forgotten.

        So it is if everybody is back after the loss, every living server has closed its ledgers, and Redis counts all
        that is in them.
        """
        if not (await cluster.roll()).complete:
            return False
        before = await cluster.uploads_by_ledger(now.number)
        living = [node.node_id for node in await cluster.nodes("server")]
        sources, silent = await self._find(cluster, now, own, living)
        counted = await cluster.uploads_by_ledger(now.number)
        uncounted = {i for i, source in sources.items() if source.updates} - counted.keys()
        told = counted == before and not uncounted and not silent - {ANYBODY}
        return told and (await cluster.roll()).complete  # or Redis was lost meanwhile

    def _missed(
        self, sources: Mapping[str, _Source], counted: Mapping[str, set[str]], now: Iteration
    ) -> core.UpdatesLost | None:
        """Tell ledgers that turned out empty from those that nobody offers at present."""
        missing = counted.keys() - self.had
        empty = tuple(sorted(i for i in missing if i in sources and not sources[i].updates))
        return core.UpdatesLost(now.number, now.attempt, empty) if empty else None

    async def _find(
        self, cluster: ClusterState, now: Iteration, own: Partial | None, everybody: list[str]
    ) -> tuple[dict[str, _Source], set[str]]:
        """Return where each partial of the iteration is, ledger id -> source, and who did not answer, with ANYBODY.

        Asked are those who own counted ledgers, and everybody in doubt.
        """
        here = [*self._ledgers.adopted.values(), *([] if own is None else [own])]
        found = {partial.ledger_id: _Source(partial) for partial in here}
        elsewhere = (await cluster.uploads_by_ledger(now.number)).keys() - found.keys() - self.had
        owners = await cluster.ledgers() if elsewhere else {}
        wanted = {owners.get(ledger_id, "") for ledger_id in elsewhere} | set(everybody)
        before = replaced(wanted, [self._node_id])  # what they left is adopted
        asked = sorted(wanted - before - {"", ANYBODY, REVOKED, self._node_id})
        instance = cluster.keys.instance
        answers = await defer.DeferredList(
            [
                defer.Deferred.fromCoroutine(self._offers_of(peer, instance, now.number, now.attempt))
                for peer in asked
            ]
        )
        silent = {ANYBODY}
        for peer, (_, offers) in zip(asked, answers, strict=True):
            if offers is None:
                silent.add(peer)
            for offer in offers or ():
                found.setdefault(offer.ledger, _Source(None, peer, offer))
        return found, silent - replaced(silent, {self._node_id, *asked} - silent)

    async def _offers_of(
        self, peer: str, instance: str, number: int, attempt: int
    ) -> list[PartialOffer] | None:
        """Return what a peer holds of the iteration; None if it cannot tell."""
        try:
            return await self._peers.seal(peer, instance, number, attempt)
        except PeerReplaced:
            return []  # its process is gone; the next one at its address answers for itself
        except PeerError as error:
            if (peer, number, attempt) not in self._complained:
                self._complained.add((peer, number, attempt))
                self.log.warn("{peer} does not offer its partials: {error}", peer=peer, error=str(error))
            return None

    async def _add_all(
        self,
        cluster: ClusterState,
        now: Iteration,
        epoch: Epoch,
        previous: ModelImage,
        sources: Mapping[str, _Source],
        counted: Mapping[str, set[str]],
    ) -> Reduced | core.ReductionFailed | core.UpdatesLost | None:
        attempt = (cluster.keys.instance, now.number, now.attempt)
        if self._sum is None or self._sum.attempt != attempt or not self.had <= counted.keys():
            self._sum = _Sum(attempt, RunningSum(self._spans, self._arithmetic))
        total = self._sum
        for ledger_id in sorted(counted):
            if ledger_id in total.totals:
                continue
            source = sources.get(ledger_id)
            if source is None:
                return None
            added = await self._add(total, source, attempt, epoch)
            if added is None:
                return None
            if not added:
                tries = total.tries[ledger_id] = total.tries.get(ledger_id, 0) + 1
                return core.UpdatesLost(now.number, now.attempt, (ledger_id,)) if tries >= TRIES else None
        wrong = self._mismatch(total, counted, now)
        if wrong is not None:
            self._sum = None
            return wrong
        image, finite = await self._compute(total, lambda: self._finish(total, previous))
        if self._sum is total:
            self._sum = None
        if not finite:
            return core.ReductionFailed(core.aggregation_failed(now.number))
        return Reduced(image, sum_of(list(total.totals.values())))

    def _finish(self, total: _Sum, previous: ModelImage) -> tuple[ModelImage, bool]:
        """Return the new model, its digest computed, and whether all its values are finite."""
        sums, updates = total.sums, sum_of(total.totals.values())
        whole = Total(self._spans, sums.sums, sums.sizes, updates.count, updates.data_size, sums.arithmetic)
        image = self._template.image(new_model(self._rule, whole, previous.arrays))
        return image, bool(image.digest) and all(all_finite(values) for values in image.arrays.values())

    async def _add(
        self, total: _Sum, source: _Source, attempt: tuple[str, int, int], epoch: Epoch
    ) -> bool | None:
        """Add one partial; False if it is damaged, None if it cannot be had now."""
        if source.partial is not None:
            await self._compute(total, lambda: self._include(total, source.partial, keep=True))
            return True
        assert source.offer is not None
        offer = source.offer
        try:
            copy = self._ledgers.copy_in_memory(offer.head_bytes(), offer.start, offer.length)
        except FedcoreError as error:
            if (source.peer, *attempt) not in self._untaken:
                self._untaken.add((source.peer, *attempt))
                self.log.error(
                    "a partial of {peer} cannot be taken: {error}", peer=source.peer, error=str(error)
                )
            return False if isinstance(error, Damaged) else None
        try:
            await self._peers.copy_partial(source.peer, offer, *attempt, copy)
            partial = await self._heavy(lambda: copy.finish(self._template.layout, epoch))
            await self._compute(total, lambda: self._include(total, partial, keep=False))
        except AcceleratorFailed:
            raise
        except (FedcoreError, OSError) as error:
            self.log.warn(
                "the partial of {peer} could not be read: {error}", peer=source.peer, error=str(error)
            )
            return False if isinstance(error, Damaged) else None
        return True

    def _include(self, total: _Sum, partial: Partial | None, *, keep: bool) -> None:
        assert partial is not None
        total.sums.add(partial, keep=keep)
        total.totals[partial.ledger_id] = partial.totals
        total.clients[partial.ledger_id] = frozenset(client.hex() for client in partial.clients)

    def _mismatch(
        self, total: _Sum, counted: Mapping[str, set[str]], now: Iteration
    ) -> core.ReductionFailed | core.UpdatesLost | None:
        """Compare what is in the sum with what was counted."""
        short = tuple(sorted(i for i, clients in counted.items() if clients - total.clients[i]))
        if short:
            self.log.error(
                "ledgers hold fewer updates than were counted", iteration=now.number, ledgers=len(short)
            )
            return core.UpdatesLost(now.number, now.attempt, short)
        if any(total.clients[ledger_id] != clients for ledger_id, clients in counted.items()):
            self.log.error(
                "ledgers hold updates that are counted elsewhere, or not at all",
                iteration=now.number,
                held=sum(map(len, total.clients.values())),
                counted=sum(map(len, counted.values())),
            )
            return core.ReductionFailed(core.server_exited(now.number))
        return None

    async def _compute(self, total: _Sum, work: Callable[[], Any]) -> Any:
        """Run work on the sum under way, on the CPU if the accelerator fails.

        Raises:
            AcceleratorFailed: what it had added is lost, and the sum is dropped.
        """
        try:
            return await self._heavy(work)
        except AcceleratorFailed as error:
            self.log.warn("the sums go on on the CPU: {error}", error=str(error))
            self._arithmetic = NUMPY
        try:
            await self._heavy(lambda: total.sums.move(NUMPY))
        except AcceleratorFailed:
            if self._sum is total:
                self._sum = None
            raise
        return await self._heavy(work)

    async def _heavy(self, work: Callable[[], Any]) -> Any:
        """Run work that takes long for large models in a thread."""
        return await threads.deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work)
