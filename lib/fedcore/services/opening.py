"""Opens an iteration on this server: the model that it starts from in front, the ledger ready for its updates.

Rules kept here:

* A server answers for an iteration only with the model that the shared state names as its base. One that it missed is
  read from whoever has it; until then it does not serve.
* If nobody who lives has that model, the newest one here takes its place for all, after REBASE_S.
* A ledger that holds updates of the very epoch that is opened is gone on with, not emptied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.logger import Logger

from fedcore.core import iteration as core
from fedcore.services.publication import Candidate, Found
from fedcore.services.reporting import IterationEnd
from fedcore.store.cipher_state import CipherState
from fedcore.store.cluster_state import Rebased

if TYPE_CHECKING:
    from fedcore.services.iteration_driver import IterationDriver, Parts

REBASE_S = 10.0  # how long a model that nobody has is waited for, until the newest one here takes its place


class Opening:
    """The iteration that one server serves; it works for the driver.

    Attributes:
        number: the iteration whose model is in front, 0 while there is none.
        problem: why none is; "" if one is, or if it is not known yet.
    """

    log = Logger()

    def __init__(self, driver: IterationDriver, parts: Parts, reactor: Any) -> None:
        self.number = 0
        self.problem = ""
        self._driver = driver
        self._parts = parts
        self._models = parts.models
        self._reactor = reactor
        self._baseless_since: float | None = None

    def close(self) -> None:
        """Serve nothing until an iteration is opened."""
        self.number = 0

    def be_patient(self) -> None:
        """Begin anew to wait for a model that nobody has: those who are not back yet may have it."""
        self._baseless_since = None

    async def open(self, effect: core.Open) -> None:
        """Serve the next iteration; if its model cannot be had now, ``open_late`` is to try again."""
        again, self.number = self.number == effect.number, 0
        if self._driver.policy.cipher_rounds:
            self._driver.run(CipherState(self._driver.joined_cluster()).release(effect.ended))
        candidate = self._parts.publication.take(effect.base) if effect.success else None
        made = candidate if candidate is not None and candidate.number == effect.ended else None
        if made is not None:
            self._models.add(effect.ended, made.image)
        elif not effect.base or effect.base == self._models.newest_image.digest:
            self._models.carry_over(effect.ended)
        elif not await self._catch_up(effect.ended, effect.base):
            return
        driver = self._driver
        if driver.iteration.number != effect.number:
            return  # another instance has begun meanwhile
        self.serve(effect.number)
        if not again:  # else it was only rebased
            self._tell_end(effect, made)
            if driver.policy.hybrid:
                driver.run(self._clear_up(made, effect.ended))

    async def open_late(self) -> None:
        """Try again to get the model that the current iteration starts from."""
        number, base = self._driver.iteration.number, self._driver.iteration.base
        there = await self._catch_up(number - 1, base)
        if there and number == self._driver.iteration.number and not self._driver.busy:
            self.serve(number)

    def serve(self, number: int) -> None:
        """Put the newest model in front."""
        driver, intake = self._driver, self._parts.intake
        self.number, self.problem, self._baseless_since = number, "", None
        self._parts.reduction.forget()
        if intake.holds(driver.epoch()):  # this server is back where it was
            intake.resume(driver.iteration.attempt)
        else:
            driver.places.clear()
            intake.begin(driver.epoch(), driver.iteration.attempt)
        driver.wake()

    def _tell_end(self, effect: core.Open, made: Candidate | None) -> None:
        driver, course = self._driver, self._driver.course
        instance, now = driver.joined_cluster().keys.instance, self._reactor.seconds()
        end = IterationEnd(
            driver.settings.fl_name,
            instance,
            effect.ended,
            effect.success,
            effect.result,
            self._models.newest_image,
            None if made is None else made.checkpoint,
            None if made is None else made.totals,
            course.updates_before,
            course.seconds_until(now),
            metrics=course.metrics_before,
        )
        self._parts.reporter.ended(end, course.end(now))
        if made is not None and made.checkpoint is None and not driver.policy.hybrid:
            driver.run(self._parts.publication.save_behind(made, instance))

    async def _clear_up(self, made: Candidate | None, ended: int) -> None:
        """Drop from the disk what workers have pushed, once its model is a checkpoint or not needed."""
        publication, instance = self._parts.publication, self._driver.joined_cluster().keys.instance
        if made is not None and made.checkpoint is None:
            await publication.save_behind(made, instance)
        await publication.drop_pushed(ended, instance)

    async def _catch_up(self, ended: int, base: str) -> bool:
        """Get the model that an iteration starts from; tell whether it is here.

        After REBASE_S without anybody who has it, the newest model of this server takes its place for all.
        """
        driver = self._driver
        cluster = driver.joined_cluster()
        found = await self._parts.publication.obtain(base, ended, await driver.refresh_others())
        if cluster is not driver.cluster or (driver.iteration.number, driver.iteration.base) != (
            ended + 1,
            base,
        ):
            return False  # that was long ago
        image = self._parts.publication.held(base)
        if image is not None:
            self._models.add(ended, image)
            return True
        now = self._reactor.seconds()
        if found is Found.UNKNOWN:
            self._baseless_since = None
            self.problem = f"the model of iteration {ended} is at servers that cannot be reached from here"
            return False
        if self._baseless_since is None:
            self._baseless_since = now
            self.log.warn("no living server has the model of iteration {iteration}", iteration=ended)
        self.problem = f"the model of iteration {ended} is at no server that lives"
        if now - self._baseless_since >= REBASE_S:
            self._baseless_since = None
            await self._rebase(ended, base)
        return False  # the shared state may name another server's model by now

    async def _rebase(self, ended: int, base: str) -> None:
        """Name the newest model of this server as the one that devices train from."""
        driver, newest = self._driver, self._models.newest
        number = ended + 1
        done = await driver.joined_cluster().rebase(
            number,
            base,
            self._models.newest_image.digest,
            result=core.base_lost(number),
            finishes=number >= driver.policy.last_iteration,
        )
        if done is not Rebased.OTHER:
            self.log.error(
                "the model of iteration {missing} is lost; that of iteration {newest} stands for it",
                missing=ended,
                newest=newest,
            )
        driver.look_soon()
