"""Brings back what Redis has forgotten: after a fail-over that lost writes, or after the loss of all its data.

Every server brings back the furthest state of the iteration that it has seen, the clients whose updates its ledgers
hold, those that it gave a place, and those that it refused and that will come again. The scripts only ever raise, so
the order in which servers do so does not matter. What Redis does not take back, because the iteration has gone on
without it or from another model, is told as lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from twisted.internet import task
from twisted.logger import Logger

from fedcore.config import hyper_parameters
from fedcore.core import model_info
from fedcore.core.iteration import CipherRound, Iteration
from fedcore.ledger.layout import Epoch
from fedcore.services.ledgers import Ledgers
from fedcore.store.cluster_state import (
    ClientMeta,
    ClusterState,
    LeftOut,
    Look,
    Raised,
    Reserve,
    Roll,
    Snapshot,
)
from fedcore.store.keys import ANYBODY, DOUBT_S, HEARTBEAT_TTL_S, HOLD_OFF_S

if TYPE_CHECKING:
    from fedcore.services.iteration_driver import IterationDriver, Parts

JUMP_S = 2.0  # by so much Redis' clock may differ from one look to the next; more, and it was set
ASK_S = 0.02  # between two looks at who has brought back something; others need milliseconds for it
LOOK_S = 2.0  # of the time since the look before, one look tells at most so much; there is one a second
# Who came and went between two looks is on the list still, unless there was more time between them.
LIST_S = HEARTBEAT_TTL_S - LOOK_S
_SAME_S = 0.0005  # half of the unit in which Redis holds moments
log = Logger()


@dataclass(frozen=True, slots=True)
class Moment:
    """When something happened.

    Attributes:
        by_redis: seconds by Redis' clock, as the status holds it.
        here: seconds by this server's clock.
        sure: whether ``here`` is right within JUMP_S.
    """

    by_redis: float
    here: float
    sure: bool = True


def placed(known: Moment | None, by_redis: float, clock: float, asked: float, now: float) -> Moment:
    """Return when something happened by this server's clock, though somebody may set that of Redis.

    Args:
        known: what was known of it before, None if nothing.
        by_redis: when it happened by Redis' clock.
        clock: when Redis answered, by its clock.
        asked: when Redis was asked, by this server's clock; it answered between then and ``now``.
        now: by this server's clock.

    Returns:
        The moment: what Redis' clock says, unless it says of a moment that was known already something else than
        before. What a clock that was set in the meantime says of news cannot be told from the truth.
    """
    here, sure = min(now, now - (clock - by_redis)), now - asked <= JUMP_S
    same = known is not None and abs(known.by_redis - by_redis) < _SAME_S
    if known is not None and same and known.sure and abs(known.here - here) > JUMP_S:
        return known
    return Moment(by_redis, here, sure)


class Memory:
    """What a server remembers of the shared state, beside its copy of the iteration.

    Attributes:
        ended: success and result of the iteration before.
        epoch: how many instances the job had before this one.
        sealed_at: seconds, when the current iteration was sealed, or None.
        typical: seconds that the last valid iteration took from its last place to its end, or None.
    """

    def __init__(self, reactor: Any) -> None:
        self.ended = (True, "")
        self.sealed_at: float | None = None
        self.typical: float | None = None
        self._reactor = reactor
        self._born = reactor.seconds()
        self._moments: dict[str, Moment] = {}  # of the current iteration
        self._fence = 0  # highest number of a token that was seen
        self.epoch = 0
        self._doubt_until = float("-inf")
        self._lost_at = float("-inf")  # when this server noticed last that Redis had lost data
        self._saw_at = 0.0
        self._missed: dict[
            str, float
        ] = {}  # who was on the list of the living; seconds for which it has not been
        self._unlisted: set[str] = set()  # of these, who was not on it at the last look,
        self._unlisted_for = 0.0  # and for how many seconds that look will have told so
        self._others_before: dict[str, float] = {}  # who lived when Redis may have forgotten them, and when
        # Clients that were refused here: when they return, and until when their places are kept. An instance's end
        # changes nothing of that.
        self._waiting: dict[str, tuple[float, float]] = {}

    @property
    def is_new(self) -> bool:
        """Whether others may await the process before this one, or there may be servers that this one cannot name."""
        return ANYBODY in self._missed or self._reactor.seconds() - self._born < 2 * DOUBT_S

    def sealed_for(self) -> float:
        """Return for how many seconds the iteration has been sealed; infinite if nobody said when."""
        return float("inf") if self.sealed_at is None else float(self._reactor.seconds() - self.sealed_at)

    def localise(self, snapshot: Snapshot, asked: float | None = None) -> Iteration:
        """Take note of what the shared state says; return the iteration with its times by this server's clock.

        Args:
            snapshot: what it says.
            asked: when it was asked, seconds; None: just now.
        """
        self._fence = max(self._fence, snapshot.fence)
        self.epoch = max(self.epoch, snapshot.epoch)
        if snapshot.typical is not None:  # a Redis that has forgotten it is no reason to
            self.typical = snapshot.typical
        self.sealed_at = self._here("sealed", snapshot.sealed_ago, snapshot.clock, asked)
        rounds = []
        for name, count, ago in snapshot.rounds:
            first = self._here(name, ago, snapshot.clock, asked)
            rounds.append(CipherRound(name, count, 0.0 if first is None else first))
        return replace(
            snapshot.iteration,
            rounds=tuple(rounds),
            started=self._here("started", snapshot.started_ago, snapshot.clock, asked),
            first_upload=self._here("first_upload", snapshot.first_upload_ago, snapshot.clock, asked),
        )

    def _here(self, name: str, ago: float | None, clock: float, asked: float | None) -> float | None:
        """Return when something happened by this server's clock, which Redis says was so many seconds ago."""
        if ago is None:
            self._moments.pop(name, None)
            return None
        now = self._reactor.seconds()
        moment = placed(self._moments.get(name), clock - ago, clock, now if asked is None else asked, now)
        self._moments[name] = moment
        return moment.here

    def known(self, iteration: Iteration) -> Snapshot:
        """Return the furthest state that this server has seen; ``iteration`` is its copy."""
        now = self._reactor.seconds()

        def ago(moment: float | None) -> float | None:
            return None if moment is None else now - moment

        sealed = ago(self.sealed_at) if iteration.changing else None
        return Snapshot(
            iteration,
            ago(iteration.started),
            ago(iteration.first_upload),
            sealed,
            self._fence,
            self.epoch,
            *self.ended,
            typical=self.typical,
        )

    def begin_instance(self) -> None:
        """Forget what was known of another instance; who takes part in this one is still to be seen."""
        self._fence = self.epoch = 0
        self._moments.clear()
        self._missed[ANYBODY] = 0.0

    def claimed(self, token: str) -> None:
        """Take note of a token that this server was given."""
        self._fence = max(self._fence, int(token.partition(":")[0]))

    def refused(self, client: str, reserve: Reserve, most: int) -> None:
        """Take note of a refused client, by its key, for which a place is kept; of at most so many."""
        now = self._reactor.seconds()
        self._waiting.pop(client, None)
        while self._waiting and self._waiting[oldest := next(iter(self._waiting))][1] <= now:
            del self._waiting[oldest]
        if len(self._waiting) < most:
            returns = now + reserve.returns_ms / 1000
            self._waiting[client] = (returns, returns + reserve.after_ms / 1000)

    def has_place(self, client: str) -> None:
        """Take note of a client, by its key, that has got a place."""
        self._waiting.pop(client, None)

    @property
    def waiting(self) -> dict[str, Reserve]:
        """The clients that wait for a place, as far as this server knows: key -> how that is kept."""
        now = self._reactor.seconds()
        return {
            client: Reserve(int((returns - now) * 1000), 0, int((until - returns) * 1000))
            for client, (returns, until) in self._waiting.items()
            if until > now
        }

    def saw(self, others: Iterable[str]) -> None:
        """Take note of the servers that are on the list of the living.

        Who is not on it any more is forgotten DOUBT_S later. A list that was emptied a moment ago names only those who
        have come back to it already: that others are not on it says nothing of them. With servers that were never
        seen it is the same: only looks for DOUBT_S, without a gap of LIST_S, tell that there is nobody else; or the
        roll, see ``called``.
        """
        now = self._reactor.seconds()
        # Only now, as the list that they were not on may have been of a Redis whose loss was noticed after that look.
        for peer in self._unlisted:
            self._missed[peer] += self._unlisted_for
        self._missed = {peer: missed for peer, missed in self._missed.items() if missed < DOUBT_S}
        emptied = now - self._lost_at < HOLD_OFF_S
        if now - self._saw_at > LIST_S and not emptied:
            self._missed[ANYBODY] = 0.0
        self._unlisted = self._missed.keys() - set(others)
        self._unlisted_for = 0.0 if emptied else min(now - self._saw_at, LOOK_S)
        self._missed.update(dict.fromkeys(others, 0.0))
        self._saw_at = now

    def called(self, roll: Roll) -> None:
        """Take note of who was called, just after a look at the list; maybe there can be no others than on the two."""
        all_known = roll.all_listed or ANYBODY in roll.back
        if all_known and self._reactor.seconds() - self._lost_at >= HOLD_OFF_S:
            self._missed.pop(ANYBODY, None)
            self._unlisted.discard(ANYBODY)
            self._missed.update(dict.fromkeys(roll.awaited - self._missed.keys(), 0.0))

    def begin_doubt(self, others: Iterable[str]) -> None:
        """From now on Redis may not know yet what the others know, for DOUBT_S.

        A Redis that was emptied lists nobody at first: those that it listed lately count, too, but only for what is
        left of DOUBT_S since it listed them. Else one that is gone would be waited for anew after each loss. But while
        this server did not look, others may have come back to the list that was lost.
        """
        now = self._lost_at = self._reactor.seconds()
        away = now - self._saw_at > LOOK_S
        self._doubt_until = now + DOUBT_S
        self._unlisted = set()
        for peer, missed in self._missed.items():
            lived = now if away and peer != ANYBODY else now - missed
            self._others_before[peer] = max(lived, self._others_before.get(peer, lived))
        self._others_before.update(dict.fromkeys(others, now))

    def in_doubt(self, others: Iterable[str]) -> list[str]:
        """Return the servers that may hold what Redis has forgotten, maybe ANYBODY; none once the doubt is over."""
        now = self._reactor.seconds()
        if now >= self._doubt_until:
            self._others_before.clear()
            return []
        recent = {peer for peer, lived in self._others_before.items() if now - lived < DOUBT_S}
        return sorted({*others, *recent})


LeftOutTold = Callable[[str, Epoch, LeftOut], object]


async def bring_back(
    cluster: ClusterState,
    known: Snapshot,
    ledgers: Ledgers,
    node_id: str,
    places: Mapping[str, ClientMeta],
    left_out: LeftOutTold = lambda ledger_id, epoch, why: None,
) -> Raised:
    """Make Redis know what this server knows; what Redis knows better stays.

    Args:
        cluster: the shared state.
        known: the furthest state that this server has seen.
        ledgers: those in its hands.
        node_id: this server.
        places: the clients that it gave a place in the current iteration, client key -> what they declared.
        left_out: is told of each ledger that Redis does not take back, what it holds updates of, and why.

    Returns:
        What became of the status. NEWER: nothing was changed, the job has another instance.

    Raises:
        StoreError: the shared state cannot be reached.
    """
    raised = await cluster.raise_to(known)
    if raised is Raised.NEWER:
        return raised
    if raised is Raised.RAISED:
        await cluster.announce_loss()
    number, epoch = known.iteration.number, ledgers.epoch
    restored = 0
    if epoch is not None and (epoch.instance, epoch.iteration) == (cluster.keys.instance, number):
        # First the places: these say what was declared.
        await _restore(cluster, epoch, "", node_id, places, left_out)
        restored = await _bring_back_ledgers(cluster, epoch, ledgers, node_id, left_out)
    if raised is Raised.RAISED or restored:
        log.warn(
            "Redis had lost data of iteration {iteration}; what this server knows is there again",
            iteration=number,
            attempt=known.iteration.attempt,
            phase=known.iteration.phase.value,
            updates=restored,
        )
    return raised


async def _bring_back_ledgers(
    cluster: ClusterState, epoch: Epoch, ledgers: Ledgers, node_id: str, left_out: LeftOutTold
) -> int:
    """Make Redis know the clients whose updates of the epoch are in this server's ledgers, see ``bring_back``.

    Returns:
        How many updates it did not know of.
    """
    restored = 0
    for ledger_id, partial in list(ledgers.adopted.items()):
        await ledgers.claim_again(cluster, ledger_id, node_id)
        held = {client.hex(): ClientMeta(0, 0, 0) for client in partial.clients}
        restored += await _restore(cluster, epoch, ledger_id, node_id, held, left_out)
    own = ledgers.own
    if own is not None and ledgers.epoch == epoch:
        held = {client.hex(): ClientMeta(size, 0, 0) for client, size in own.clients().items()}
        restored += await _restore(cluster, epoch, own.id, node_id, held, left_out)
    return restored


async def _restore(
    cluster: ClusterState,
    epoch: Epoch,
    ledger_id: str,
    node_id: str,
    clients: Mapping[str, ClientMeta],
    left_out: LeftOutTold,
) -> int:
    try:
        taken = await cluster.restore_clients(epoch.iteration, ledger_id, node_id, clients, epoch.base)
    except LeftOut as why:
        left_out(ledger_id, epoch, why)
        return 0
    return taken or 0


class Recovery:
    """What one server does about a Redis that has lost data; it works for the driver."""

    def __init__(self, driver: IterationDriver, parts: Parts, memory: Memory, reactor: Any) -> None:
        self._driver = driver
        self._reactor = reactor
        self._held_off = False
        self._parts = parts
        self._memory = memory
        self._warned = False
        self._contradicted: Epoch | None = None  # of which Redis names another model to train from
        self._told: set[tuple[str, Epoch]] = set()  # ledgers that were left out
        parts.ledgers.on_left_out = self._left_out

    def others_say_so(self) -> None:
        """Take notice that Redis had lost data: this server must tell what it knows before it follows the others."""
        self._warned = True

    def due(self, look: Look) -> bool:
        """Tell whether Redis may have forgotten what this server knows, or contradicts it."""
        warned, self._warned = self._warned, False
        snapshot, cluster = look.snapshot, self._driver.joined_cluster()
        if snapshot is None or look.instance != cluster.keys.instance or warned:
            return True
        return self._contradicts(snapshot.iteration) or snapshot.iteration.rank < self._driver.iteration.rank

    def _contradicts(self, seen: Iteration) -> bool:
        """Tell whether Redis has begun the iteration again, from another model; True once."""
        held = self._parts.ledgers.epoch
        if held is None or held == self._contradicted or self._parts.ledgers.idle:
            return False
        instance = self._driver.joined_cluster().keys.instance
        if (held.instance, held.iteration) != (instance, seen.number) or seen.base in ("", held.base):
            return False
        self._contradicted = held
        return True

    async def bring_back(self, cluster: ClusterState, run_id: str) -> Raised:
        """Tell the Redis with this run id what it has forgotten; see ``bring_back``.

        No place is given and no update counted meanwhile, by nobody: others may know a later iteration, and a client
        may come again to another server than the one that holds its update, and must be told so.
        """
        driver = self._driver
        self._memory.begin_doubt(driver.others)
        driver.opening.be_patient()
        self._parts.reduction.be_patient()
        self._parts.judge.forget()
        others = self._memory.in_doubt(driver.others)
        call = await cluster.await_nodes(run_id, driver.node_id, others)
        raised = await bring_back(
            cluster,
            self._memory.known(driver.iteration),
            self._parts.ledgers,
            driver.node_id,
            driver.places,
            self._left_out,
        )
        if raised is not Raised.NEWER and (waiting := self._memory.waiting):
            number, places = driver.iteration.number, driver.policy.start_threshold
            await cluster.restore_waiting(number, waiting, places=places)
        vouched = () if ANYBODY in others else (ANYBODY,)  # it has named all that there are
        told = (driver.node_id, *vouched, *self._parts.ledgers.inherited)
        await cluster.nodes_are_back(run_id, driver.node_id, told, call)
        if raised is not Raised.NEWER:
            await cluster.offer_hyper_parameters(hyper_parameters(driver.settings))
            await cluster.offer_model_info(model_info.describe(driver.models.newest_image.layout))
        return raised

    async def others_back(self, seconds: float) -> None:
        """Hold a request until all have brought back what Redis had forgotten, or are waited for no more.

        However many are held, Redis is asked by one.
        """
        if not self._held_off:
            self._held_off = True
            self._driver.run(self._await_others())
        await self._driver.held_until(lambda: not self._held_off, seconds)

    async def _await_others(self) -> None:
        try:
            while self._driver.joined and await self._driver.joined_cluster().holds_off():
                await task.deferLater(self._reactor, ASK_S)
        finally:
            self._held_off = False
            self._driver.wake()

    async def tell_again(self) -> None:
        """Tell which clients' updates this server holds, after a ledger was given up.

        One of them may have been counted in that ledger: it was asked for its update a second time, when Redis had
        forgotten the first one and nobody could say so.
        """
        cluster, epoch = self._driver.joined_cluster(), self._parts.ledgers.epoch
        here = (cluster.keys.instance, self._driver.iteration.number)
        if epoch is not None and (epoch.instance, epoch.iteration) == here:
            await _bring_back_ledgers(
                cluster, epoch, self._parts.ledgers, self._driver.node_id, self._left_out
            )

    def _left_out(self, ledger_id: str, epoch: Epoch, why: LeftOut) -> None:
        """Take notice of a ledger that Redis does not take back; what is lost with it is told once."""
        if why.updates and (ledger_id, epoch) not in self._told:
            self._told.add((ledger_id, epoch))
            self._parts.reporter.left_out(
                epoch.iteration,
                self._driver.iteration.attempt,
                why.updates,
                why.rebased,
                self._driver.node_id,
            )
