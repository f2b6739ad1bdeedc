"""What the finaliser of an iteration does: it claims the token, makes the model, makes it safe, or goes back.

Each step on the shared state is a compare-and-set; one that is lost is answered with a fresh look.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from twisted.logger import Logger

from fedcore.core import iteration as core
from fedcore.core.iteration import Phase
from fedcore.services.publication import Candidate, Found
from fedcore.services.recovery import Memory
from fedcore.services.reduction import Reduced
from fedcore.services.unmasking import Unmasked

if TYPE_CHECKING:
    from fedcore.services.iteration_driver import IterationDriver, Parts

TRAINED_WAIT_S = 10.0  # how long a worker's model is waited for that no living server has
STALE_S = 5.0  # a longer pause between two searches is no waiting: this server was paused, or cut off
CLAIM_PAUSE_S = 0.5  # the server that sealed an iteration makes its model, unless it dies first


class Finaliser:
    """One server in the part of the finaliser; it works for the driver."""

    log = Logger()

    def __init__(self, driver: IterationDriver, parts: Parts, memory: Memory, reactor: Any) -> None:
        self._driver = driver
        self._parts = parts
        self._memory = memory
        self._reactor = reactor
        self._sealed_here: tuple[int, int] | None = None  # iteration and attempt that this server sealed
        self._offered: tuple[str, set[str]] = "", set()  # digest of what the worker works on, and who has it
        self._offering = False
        self._restored = ""  # digest of an aggregate that was seen to
        self._missed = ("", 0.0, 0.0)  # a worker's model that nobody has, since when, and when last
        self._inside = ("", 0)  # digest of the model that was made last, and of how many updates

    async def seal(self, effect: core.Seal) -> core.Event | None:
        """Stop the counting."""
        driver = self._driver
        self._sealed_here = (effect.number, effect.attempt)
        done = await driver.joined_cluster().seal(
            effect.number, effect.attempt, driver.policy.update_threshold
        )
        return core.Sealed() if done else await driver.observed()

    async def claim(self, effect: core.ClaimReduction) -> core.Event | None:
        """Become the finaliser; the server that sealed goes first, one without the model not at all."""
        driver, where = self._driver, (effect.number, effect.attempt)
        if not driver.serving:
            return None
        waits = self._sealed_here != where and self._memory.sealed_for() < CLAIM_PAUSE_S
        if not effect.token and waits:
            return None  # the next look comes within a second
        claimed = await driver.joined_cluster().claim_reduction(*where, effect.token, driver.node_id)
        if claimed is None:
            return await driver.observed()
        self._memory.claimed(claimed[0])
        reached = replace(driver.iteration, phase=claimed[1])
        if reached.rank < driver.iteration.rank:
            return await driver.observed()  # Redis has lost data since this server looked
        return core.ReductionClaimed(*claimed)

    async def reduce(self) -> core.Event | None:
        """Make the model of all counted updates; nothing if another instance was joined while this was on its way."""
        driver = self._driver
        if not driver.iteration.changing:
            return None  # its ledger takes updates, and must not be sealed
        outcome = await self._parts.reduction.reduce(
            driver.joined_cluster(),
            driver.iteration,
            driver.epoch(),
            driver.models.newest_image,
            driver.policy.update_threshold,
            lambda: [peer for peer in self._memory.in_doubt(driver.others) if peer != driver.node_id],
        )
        if not isinstance(outcome, Reduced):
            return outcome
        self._parts.publication.hold(Candidate(driver.iteration.number, outcome.image, outcome.totals))
        self._inside = outcome.image.digest, outcome.totals.count
        return core.ModelReduced(outcome.image.digest)

    async def unmask(self, effect: core.Unmask) -> core.Event | None:
        """Take the masks off the mean of the updates, by what devices have reported."""
        return await self._unmask(effect.aggregate)

    async def _unmask(self, aggregate: str) -> core.Event | None:
        """Take the masks off a model that this server holds; nothing if it does not, or Redis has gone on meanwhile."""
        driver, publication = self._driver, self._parts.publication
        masked, number = publication.held(aggregate), driver.iteration.number
        if masked is None:
            return None
        t = driver.policy.completes(core.REPORTS_ROUND) - 1
        outcome = await self._parts.unmasking.unmask(driver.joined_cluster(), number, masked, t)
        if not isinstance(outcome, Unmasked):
            return outcome
        held = publication.candidate(aggregate)
        totals = None if held is None else held.totals
        publication.hold(Candidate(number, outcome.image, totals))
        self._inside = outcome.image.digest, outcome.updates
        return core.ModelReduced(outcome.image.digest)

    async def record(self, effect: core.RecordCandidate | core.RecordAggregate) -> core.Event | None:
        """Name the model of the updates in the shared state: it is published now, or others work on it further."""
        policy = self._driver.policy
        made, updates = self._inside
        final = isinstance(effect, core.RecordCandidate)
        further = Phase.UNMASKING if policy.unmask else Phase.TRAINING
        done = await self._driver.joined_cluster().record_model(
            effect.number,
            effect.attempt,
            effect.token,
            effect.digest,
            updates if made == effect.digest else 0,
            Phase.CANDIDATE if final else further,
            exchanged=bool(policy.cipher_rounds),
        )
        if not done:
            return await self._driver.observed()
        return (core.CandidateRecorded if final else core.AggregateRecorded)(effect.digest)

    async def keep(self, effect: core.Keep) -> core.Event | None:
        """Hold what others work on, or a worker has trained, here and at the others; the mean can be made again."""
        publication, driver = self._parts.publication, self._driver
        others, began = await driver.refresh_others(), self._reactor.seconds()
        found = await publication.obtain(effect.digest, effect.number, others)
        if found is not Found.HERE and effect.phase is Phase.TRAINED:
            return self._without_trained(effect.number, effect.digest, began)
        if found is not Found.HERE:
            return await self._make_again(effect.digest)
        candidate = publication.nominate(effect.digest, effect.number)
        if candidate is not None and not self._offering:
            driver.run(self._offer(candidate, others))  # behind: who does not answer holds up nothing
        if effect.phase is Phase.TRAINED:
            await self._have_aggregate(driver.iteration.aggregate, effect.number, others)
        return None

    async def _have_aggregate(self, digest: str, number: int, others: list[str]) -> None:
        """See once that this server has what the worker has trained further: another worker may go on from there.

        What a worker has trained already does not depend on it.
        """
        publication = self._parts.publication
        if digest == self._restored or publication.held(digest) is not None:
            return
        if await publication.obtain(digest, number, others) is Found.HERE or await self.reduce() is not None:
            self._restored = digest

    async def _offer(self, candidate: Candidate, others: list[str]) -> None:
        """Give a model to those who do not have it yet; those who come later, or refuse now, are offered it again."""
        digest = candidate.image.digest
        if self._offered[0] != digest:
            self._offered = digest, set()
        held = self._offered[1]
        new = sorted(set(others) - held)
        self._offering = True
        try:
            held.update(await self._parts.publication.offer(candidate, new))
        finally:
            self._offering = False

    async def spread(self, digest: str) -> core.Event | None:
        """Make the candidate safe; one that died with its finaliser is made again."""
        driver, publication = self._driver, self._parts.publication
        number = driver.iteration.number
        others, began = await driver.refresh_others(), self._reactor.seconds()
        if publication.candidate(digest) is None:
            found = await publication.obtain(digest, number, others)
            if found is not Found.HERE and driver.policy.hybrid:
                return self._without_trained(number, digest, began)
        if publication.nominate(digest, number) is None:
            failed = await self._make_candidate_again(digest, number, others)
            if failed is not None:
                return failed
        candidate = publication.candidate(digest)
        if candidate is None:
            return None  # another instance has begun meanwhile
        try:
            await publication.spread(candidate, driver.joined_cluster().keys.instance, others)
        except OSError as error:
            driver.opening.problem = f"the new model cannot be written: {error}"
            raise
        return core.CandidateSpread()

    async def _make_candidate_again(self, digest: str, number: int, others: list[str]) -> core.Event | None:
        """Make a candidate once more: of the updates, and of the reports if masks were taken off."""
        aggregate, publication = self._driver.iteration.aggregate, self._parts.publication
        if not aggregate:
            return await self._make_again(digest)
        if publication.held(aggregate) is None:
            found = await publication.obtain(aggregate, number, others)
            failed = None if found is Found.HERE else await self._make_again(aggregate)
            if failed is not None:
                return failed
        return self._same(await self._unmask(aggregate), digest, number)

    async def _make_again(self, digest: str) -> core.Event | None:
        """Make a model once more that was lost with its finaliser; return what prevents it."""
        number = self._driver.iteration.number
        return self._same(await self.reduce(), digest, number)

    def _same(self, again: core.Event | None, digest: str, number: int) -> core.Event | None:
        """Return what prevents that a model was made again, None if nothing has."""
        if isinstance(again, core.NotUnmasked):
            return core.ReductionFailed(core.unmask_failed(number))
        if not isinstance(again, core.ModelReduced):
            return again
        if again.digest != digest:
            self.log.error(
                "the model of iteration {iteration} came out different the second time", iteration=number
            )
            return core.ReductionFailed(core.server_exited(number))
        return None

    def _without_trained(self, number: int, digest: str, began: float) -> core.Event | None:
        """Wait for the server that has a worker's model; end the iteration if it does not come back.

        Args:
            number: the iteration.
            digest: of the model.
            began: when the search began that was in vain, seconds.
        """
        now = self._reactor.seconds()
        missed, since, last = self._missed
        if missed != digest or began - last > STALE_S:
            since = began
            self.log.warn(
                "no server that lives has the worker's model of iteration {iteration}", iteration=number
            )
        self._missed = digest, since, now
        if now - since < TRAINED_WAIT_S:
            return None
        return core.ReductionFailed(core.trained_lost(number))

    async def reopen(self, effect: core.Reopen) -> core.Event | None:
        """Go on without the updates that are lost."""
        cluster = self._driver.joined_cluster()
        owners = {ledger_id: await cluster.ledger_owner(ledger_id) for ledger_id in effect.ledgers}
        uploads = await cluster.uploads_by_ledger(effect.number)
        lost = await cluster.reopen(
            effect.number,
            effect.attempt,
            phase=effect.phase,
            token=self._driver.iteration.token,
            ledgers=effect.ledgers,
        )
        for ledger_id in () if lost is None else effect.ledgers:
            self._parts.reporter.lost(
                effect.number, effect.attempt, uploads.get(ledger_id, 0), owners[ledger_id] or "nobody"
            )
            self._parts.ledgers.drop(ledger_id)
        return await self._driver.observed()
