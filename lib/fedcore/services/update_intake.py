"""Updates on their way into the sum: room for bodies, acceptance by the shared state, merging, sealing.

The evaluation vector that comes with an update goes to the shared state, in the step that counts the update.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from twisted.application.service import Service
from twisted.internet import defer, task, threads
from twisted.logger import Logger

from fedcore.core.admission import Acceptance
from fedcore.errors import FedcoreError, LocalError, StoreUnavailable
from fedcore.ledger.decoding import Decoder, Reading
from fedcore.ledger.layout import Epoch
from fedcore.ledger.ledger import MERGE_BATCH, Ledger, Partial, Slot
from fedcore.ledger.spool import Spool, open_spool
from fedcore.services.evaluation import longest_vector, vector_of
from fedcore.services.ledgers import Ledgers
from fedcore.services.update_forms import update_of
from fedcore.store.cluster_state import (
    ClientMeta,
    ClusterState,
    IterationMoved,
    LeaseLapsed,
    LedgerRevoked,
    MaskedUpdate,
    OthersAwaited,
)
from fedcore.wire.messages import RequestUpdateModel

# A hop to a thread and back costs about as much as adding this many floats; smaller models are merged at once.
INLINE_FLOATS = 1 << 18
REPLICATION_MS = 100  # longest wait for a replica of Redis; the ledger can bring back what a fail-over loses
RETRY_S = 0.1  # pause before a question that Redis could not answer is asked again

T = TypeVar("T")


class NoRoom(FedcoreError):
    """All slots are taken by other bodies, or there is no ledger."""

    wire_code = 300
    http_status = 503
    retry_after = 5.0


class UpdateIntake(Service):
    """Takes updates into the server's own ledger.

    Merges wait until a batch is together or room is short: an accepted update is safe in its slot.
    """

    log = Logger()

    def __init__(
        self,
        ledgers: Ledgers,
        spool_dir: Path,
        node_id: str,
        model_floats: int,
        room_timeout: float,
        reactor: Any,
        vectors_kept: int = 0,
    ) -> None:
        """Fill the own one of ``ledgers``.

        Args:
            ledgers: where updates go.
            spool_dir: where bodies wait that have no slot yet; better on a disk than in memory.
            node_id: this server.
            model_floats: elements of the model; decides whether merges run in a thread.
            room_timeout: seconds that a body may wait for a slot.
            reactor: for threads and time.
            vectors_kept: of how many clients the shared state keeps evaluation vectors; 0 keeps none.
        """
        self._ledgers = ledgers
        self._spool_dir = spool_dir
        self._node_id = node_id
        self._small = model_floats <= INLINE_FLOATS
        self._inline = self._small and not ledgers.durable
        self._room_timeout = room_timeout
        self._reactor = reactor
        self._vectors_kept = vectors_kept
        self._vectors_refused = 0  # in the current iteration
        self._epoch: Epoch | None = None
        self._attempt = 1
        self._begun_in: Ledger | None = None  # the ledger that takes the updates of the epoch
        self._next: Epoch | None = None  # to begin once the merge under way has ended
        self._waiting: deque[defer.Deferred[Slot]] = deque()
        self._asking: set[object] = set()  # one token per question that the shared state has not answered yet
        self._merging = False
        self._sealing = False
        self._fault: BaseException | None = None  # of a merge of the current iteration
        self._settled: list[defer.Deferred[None]] = []
        self._flushing = False
        self._unflushed: list[defer.Deferred[None]] = []

    # ---- room

    def receive(self, length: int) -> Slot | Spool:
        """Return room for a body.

        A body goes to a slot at once while more than a quarter of them are free; the rest are for bodies that are
        complete, so that slow senders cannot keep fast ones out. Others go to a spool until they are complete.

        Raises:
            NoSpace: a spool is needed, and its directory is full.
        """
        ledger = self._ledgers.own
        if ledger is not None and not self._waiting and 4 * ledger.free_slots > ledger.shape.slots:
            slot = ledger.receive()
            if slot is not None:
                return slot
        return open_spool(self._spool_dir, length)

    async def slot_for(self, room: Slot | Spool) -> Slot:
        """Return a complete body's slot; what was spooled is moved into one.

        Raises:
            NoRoom: no slot came free in time.
        """
        if isinstance(room, Slot):
            return room
        ledger = self._ledgers.own
        slot = None if self._waiting or ledger is None else ledger.receive()
        slot = slot or await self.wait_for_room()
        slot.buffer[: room.length] = room.buffer[: room.length]
        slot.length = room.length
        return slot

    async def wait_for_room(self) -> Slot:
        """Wait for a slot.

        Raises:
            NoRoom: none came free in time.
        """
        waiter: defer.Deferred[Slot] = defer.Deferred(self._waiting.remove)
        self._waiting.append(waiter)
        waiter.addTimeout(self._room_timeout, self._reactor)
        self._merge(short=True)
        try:
            return await waiter
        except defer.TimeoutError:
            hint = self._ledgers.problem or "raise fedcore.ledger.memory_budget"
            raise NoRoom("all upload slots are taken", hint=hint) from None

    def release(self, room: Slot | Spool) -> None:
        """Take back the room of a body that does not count."""
        ledger = self._ledgers.own
        slot = room
        if isinstance(slot, Slot) and ledger is not None and ledger.owns(slot):
            ledger.release(slot)
            self._hand_out()

    def _hand_out(self) -> None:
        """Give free slots to those who wait, first come first served."""
        ledger = self._ledgers.own
        while self._waiting and ledger is not None:
            room = ledger.receive()
            if room is None:
                return
            self._waiting.popleft().callback(room)

    async def compute(self, work: Callable[[], T]) -> T:
        """Do work that looks at all values of one update: at once, or in a thread if they are many."""
        if self._small:
            return work()
        done = threads.deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work)
        result: T = await done
        return result

    # ---- acceptance

    async def accept(
        self,
        slot: Slot,
        request: RequestUpdateModel,
        cluster: ClusterState,
        number: int,
        attempt: int,
        *,
        quorum: int,
        fit: bool,
        reading: Reading | None = None,
        masked: MaskedUpdate | None = None,
    ) -> tuple[Acceptance, int]:
        """Ask the shared state to count an update; if it says ACCEPTED, the slot is the ledger's from then on.

        What is in the slot is on record before the question, so that a crash between question and answer can be
        settled by asking again. A lost reply leaves open whether the update counts: the question is repeated until
        it is answered; the shared state answers a repeat as it did before, and ``seal`` waits meanwhile.

        A body in a slot of a ledger that is not this server's any more moves into the present one; ``slot`` names
        its new place then. An update that is not plain comes with its ``reading``, a masked one with what is to be
        known of it.

        Returns:
            The outcome, and the count of accepted updates where it is ACCEPTED.

        Raises:
            StoreError: the shared state is not where the caller is, or the iteration starts from another model than
                the one that the update was read against.
        """
        question = object()
        self._asking.add(question)
        try:
            while True:
                ledger = await self._ledger_of(number, attempt)
                if not ledger.owns(slot):
                    self._move(slot, ledger)
                try:
                    return await self._count(
                        slot,
                        request,
                        cluster,
                        ledger,
                        number,
                        attempt,
                        quorum=quorum,
                        fit=fit,
                        reading=reading,
                        masked=masked,
                    )
                except LedgerRevoked:
                    if self._sealing or self._ledgers.own in (ledger, None):
                        raise
        finally:
            self._asking.remove(question)
            self._settle()

    def _move(self, slot: Slot, ledger: Ledger) -> None:
        """Give a complete body that lies in a lost ledger a slot of the present one."""
        room = ledger.receive()
        if room is None:
            raise LedgerRevoked("the ledger that received this body is not this server's any more")
        room.buffer[: slot.length] = slot.body
        slot.number, slot.buffer, slot.ledger_id = room.number, room.buffer, room.ledger_id

    async def _count(
        self,
        slot: Slot,
        request: RequestUpdateModel,
        cluster: ClusterState,
        ledger: Ledger,
        number: int,
        attempt: int,
        *,
        quorum: int,
        fit: bool,
        reading: Reading | None,
        masked: MaskedUpdate | None,
    ) -> tuple[Acceptance, int]:
        """Have an update counted in a ledger, see ``accept``."""
        epoch, fl_id = self._epoch, request.fl_id or ""
        if reading is not None and (epoch is None or epoch.base != reading.base):
            raise IterationMoved(number)
        if fit and request.iteration == number and not ledger.holds(fl_id):
            decoder = Decoder.PLAIN if reading is None else reading.decoder
            ledger.record(slot, fl_id, request.upload_loss, request.upload_accuracy, decoder)
            await self._on_disk(ledger)
        acceptance, count, meta = await self._ask(
            request, cluster, ledger, number, attempt, quorum, fit, epoch, masked
        )
        if meta is None:
            return acceptance, count
        if self._epoch != epoch:
            raise IterationMoved(0 if self._epoch is None else self._epoch.iteration)
        if not fit or ledger.holds(fl_id):
            # Counted before. If this ledger does not hold it yet, the question that brought it is still open.
            return Acceptance.REPEATED, count
        ledger.accept(slot, update_of(request, meta.data_size, meta.eval_data_size, reading))
        self._merge()
        with contextlib.suppress(
            StoreUnavailable
        ):  # it counts; a new connection begins with what is in ledgers
            await cluster.redis.replicated(REPLICATION_MS)
        return acceptance, count

    async def _ledger_of(self, number: int, attempt: int) -> Ledger:
        """Return the own ledger once it serves an iteration."""
        await self._begun()
        ledger = self._ledgers.own
        if ledger is None:
            raise StoreUnavailable(self._ledgers.problem)
        if self._fault is not None:
            raise StoreUnavailable(f"the ledger of this iteration is broken: {self._fault}")
        self._check_attempt(number, attempt)
        return ledger

    async def _begun(self) -> None:
        """Wait until the iteration that is to begin has begun."""
        while self._next is not None:
            await self._change()

    def _check_attempt(self, number: int, attempt: int) -> None:
        epoch = self._epoch
        if epoch is None or (epoch.iteration, self._attempt) != (number, attempt):
            raise IterationMoved(0 if epoch is None else epoch.iteration)

    async def _ask(
        self,
        request: RequestUpdateModel,
        cluster: ClusterState,
        ledger: Ledger,
        number: int,
        attempt: int,
        quorum: int,
        fit: bool,
        epoch: Epoch | None,
        masked: MaskedUpdate | None,
    ) -> tuple[Acceptance, int, ClientMeta | None]:
        limit = self._reactor.seconds() + self._room_timeout
        # What comes late is in no sum, and ``seal`` does not wait for it. It must not be counted now either, even if
        # Redis, having lost data, says for a moment that the iteration is still collecting.
        late, again = self._sealing, False
        vector = self._vector_of(request) if fit else b""
        while True:
            try:
                return await cluster.accept_upload(
                    number,
                    attempt,
                    request.iteration,
                    request.fl_id or "",
                    quorum=0 if late else quorum,
                    ledger_id=ledger.id,
                    node_id=self._node_id,
                    fit=fit,
                    again=again,
                    vector=vector,
                    kept=self._vectors_kept,
                    masked=masked,
                )
            except LedgerRevoked:
                # Not on record yet, or forgotten: within a second the driver sees to it or drops the ledger.
                if self._sealing or self._ledgers.own is not ledger or self._reactor.seconds() >= limit:
                    raise
            except OthersAwaited:
                if not again:
                    raise
            except StoreUnavailable:
                again = not late
            except LeaseLapsed:
                pass
            await task.deferLater(self._reactor, RETRY_S)
            await cluster.redis.connected()
            if self._epoch != epoch:
                raise IterationMoved(0)  # another instance answers for nothing of the old one

    def _vector_of(self, request: RequestUpdateModel) -> bytes:
        """Return an update's evaluation vector as the shared state holds it, b"" if there is none that may be kept."""
        if not self._vectors_kept or request.unsupervised_eval_items is None:
            return b""
        vector = vector_of(request.unsupervised_eval_items, longest_vector(self._vectors_kept))
        if vector is None:
            self._vectors_refused += 1
        return vector or b""

    async def _on_disk(self, ledger: Ledger) -> None:
        """Wait until what was recorded is on the disk; one flush serves all that wait when it begins."""
        if not self._ledgers.durable:
            return
        flushed: defer.Deferred[None] = defer.Deferred()
        self._unflushed.append(flushed)
        if not self._flushing:
            self._flush(ledger)
        await flushed

    def _flush(self, ledger: Ledger) -> None:
        waiting, self._unflushed = self._unflushed, []

        def ended(result: Any) -> None:
            self._flushing = False
            if self._unflushed:
                self._flush(self._ledgers.own or ledger)
            for flushed in waiting:
                flushed.callback(result)  # a failure as well: what may not be on the disk is not accepted

        self._flushing = True
        threads.deferToThreadPool(self._reactor, self._reactor.getThreadPool(), ledger.sync).addBoth(ended)

    # ---- the sum

    def begin(self, epoch: Epoch, attempt: int = 1) -> None:
        """Start an iteration with empty sums, as soon as the merge under way has ended."""
        self._next, self._attempt = epoch, attempt
        if not self._merging:
            self._begin()

    def holds(self, epoch: Epoch) -> bool:
        """Tell whether the own ledger takes, and may hold, updates of this very epoch: then it can go on."""
        begun, own = self._begun_in, self._ledgers.own
        return self._next is None and self._epoch == epoch and own is not None and own is begun

    def resume(self, attempt: int) -> None:
        """Take updates again, in another attempt of the same iteration; the sums stay."""
        self._attempt, self._sealing = attempt, False
        if self._ledgers.own is not None:
            self._ledgers.own.unseal()
        self._settle()

    def _begin(self) -> None:
        ledger = self._ledgers.own
        epoch, self._next = self._next, None
        assert epoch is not None
        if self._vectors_refused:
            self.log.warn(
                "{vectors} evaluation vectors have more than {longest} values and are not kept; their updates are",
                vectors=self._vectors_refused,
                longest=longest_vector(self._vectors_kept),
            )
            self._vectors_refused = 0
        self._epoch, self._fault, self._sealing = epoch, None, False
        self._begun_in = None
        self._ledgers.begin(epoch)
        try:
            if ledger is not None:
                ledger.begin(epoch)
            self._begun_in = ledger
        except (
            Exception
        ) as error:  # a full or broken disk; whatever it is, nothing may wait for this for ever
            self._fault = error
            self.log.failure("iteration {iteration} has no ledger and will fail", iteration=epoch.iteration)
        self._hand_out()
        self._settle()

    async def seal(self, number: int, attempt: int) -> Partial | None:
        """Return the sums once every update that may count is in them; None if there is no own ledger.

        To be called when the shared state is sealed: only questions that are open now can still be answered with
        ACCEPTED. Later ones are not waited for, or a stream of late uploads could hold up the iteration.

        Raises:
            LocalError: a merge failed: the sums are not to be trusted.
            IterationMoved: that attempt is not the current one, or not any more.
        """
        await self._begun()
        self._check_attempt(number, attempt)
        epoch, open_questions = self._epoch, set(self._asking)
        self._sealing = True
        self._merge()
        while not self._asking.isdisjoint(open_questions) or self._unmerged:
            await self._change()
            self._check_attempt(number, attempt)
            if self._epoch != epoch:
                raise IterationMoved(0)  # another instance, which happens to be at the same number
        ledger = self._ledgers.own
        if self._fault is not None:
            raise LocalError(f"updates could not be added to the sum: {self._fault}") from self._fault
        return None if ledger is None else ledger.seal()

    @property
    def _unmerged(self) -> bool:
        """Whether updates are still on their way into the sums."""
        ledger = self._ledgers.own
        return self._merging or (ledger is not None and ledger.unmerged > 0 and self._fault is None)

    def _merge(self, short: bool = False) -> None:
        """Merge a batch if there is one, or less than one if the iteration ends or room is ``short``."""
        ledger = self._ledgers.own
        if ledger is None or self._merging or self._fault is not None or not ledger.unmerged:
            return
        if ledger.unmerged < MERGE_BATCH and not (short or self._sealing or ledger.free_slots == 0):
            return
        self._merging = True
        if self._inline:
            done = defer.execute(ledger.merge)
        else:
            done = threads.deferToThreadPool(self._reactor, self._reactor.getThreadPool(), ledger.merge)
        done.addCallbacks(self._merged, self._merge_failed, callbackArgs=(ledger,))
        done.addBoth(lambda _: self._merge_ended())

    def _merged(self, slots: list[Slot], ledger: Ledger) -> None:
        for slot in slots:
            ledger.reuse(slot)

    def _merge_failed(self, failure: Any) -> None:
        self._fault = failure.value
        self.log.failure("updates could not be added to the sum of their iteration", failure)

    def _merge_ended(self) -> None:
        self._merging = False
        if self._next is not None:
            self._begin()
        self._hand_out()
        self._merge(short=bool(self._waiting))
        self._settle()

    async def _change(self) -> None:
        """Wait until a question is answered, a merge has ended, or an iteration begins."""
        settled: defer.Deferred[None] = defer.Deferred()
        self._settled.append(settled)
        await settled

    def _settle(self) -> None:
        settled, self._settled = self._settled, []
        for waiter in settled:
            waiter.callback(None)
