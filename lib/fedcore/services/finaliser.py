"""What the finaliser of an iteration does: it claims the token, makes the model, makes it safe, or goes back.

Each step on the shared state is a compare-and-set; one that is lost is answered with a fresh look.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.logger import Logger

from fedcore.core import iteration as core
from fedcore.services.publication import Candidate
from fedcore.services.recovery import Memory
from fedcore.services.reduction import Reduced

if TYPE_CHECKING:
    from fedcore.services.iteration_driver import IterationDriver, Parts

CLAIM_PAUSE_S = 0.5  # the server that sealed an iteration makes its model, unless it dies first


class Finaliser:
    """One server in the part of the finaliser; it works for the driver."""

    log = Logger()

    def __init__(self, driver: IterationDriver, parts: Parts, memory: Memory) -> None:
        self._driver = driver
        self._parts = parts
        self._memory = memory
        self._sealed_here: tuple[int, int] | None = None  # iteration and attempt that this server sealed

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
        return core.ReductionClaimed(*claimed)

    async def reduce(self) -> core.Event | None:
        """Make the model of all counted updates."""
        driver = self._driver
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
        return core.ModelReduced(outcome.image.digest)

    async def record(self, effect: core.RecordCandidate) -> core.Event | None:
        """Name the model in the shared state."""
        candidate = self._parts.publication.candidate(effect.digest)
        updates = 0 if candidate is None or candidate.totals is None else candidate.totals.count
        done = await self._driver.joined_cluster().record_candidate(
            effect.number, effect.attempt, effect.token, effect.digest, updates
        )
        return core.CandidateRecorded(effect.digest) if done else await self._driver.observed()

    async def spread(self, digest: str) -> core.Event | None:
        """Make the candidate safe; one that died with its finaliser is made again."""
        driver, publication = self._driver, self._parts.publication
        number = driver.iteration.number
        others = await driver.refresh_others()
        if publication.candidate(digest) is None:
            await publication.obtain(digest, number, others)
        if publication.candidate(digest) is None:
            again = await self.reduce()
            if not isinstance(again, core.ModelReduced):
                return again
            if again.digest != digest:
                self.log.error(
                    "the model of iteration {iteration} came out different the second time", iteration=number
                )
                return core.ReductionFailed(core.server_exited(number))
        candidate = publication.candidate(digest)
        if candidate is None:
            return None  # another instance has begun meanwhile
        try:
            await publication.spread(candidate, driver.joined_cluster().keys.instance, others)
        except OSError as error:
            driver.opening.problem = f"the new model cannot be written: {error}"
            raise
        return core.CandidateSpread()

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
